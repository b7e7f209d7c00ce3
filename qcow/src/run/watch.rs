//! [`Watch`]: which parts of the disk have changed since somebody last took them: for a copy of a disk
//! that goes on being written to. In memory alone.
//!
//! A part that was taken is read afterwards, so nothing that changes it may be missed from then on. Changes
//! are recorded when they have ended, before anybody is told. Who takes a part clears its bit and flags
//! the words of its units in the map, as bitmaps do ([`super::marks`]): from now on writes to it do not
//! go straight down, and the first one to end sets the bit and takes the flag away. Those that had
//! looked before are in flight; they have ended, and can be read, when everybody is past the epoch that
//! began with the flags ([`super::epochs`]). So without a watch no instruction is spent on it, and with
//! one only for the first write to a part after it was taken.

use super::image::Image;
use super::shared::Shared;
use crate::bitmaps::{all_set, fill};

/// Bytes that one bit stands for, unless the bits would be too many.
const GRANULARITY: u64 = 64 << 10;
const BITS_MAX: u64 = 1 << 23;
/// Bytes of bits that are looked at in one turn of the reactor.
const STRIDE: usize = 16 << 10;

/// See the module's text.
pub(super) struct Watch {
    /// log2 of the bytes of a bit.
    shift: u32,
    /// Bits in all.
    count: u64,
    bits: Vec<u8>,
    /// Of them set.
    set: u64,
}

/// Parts that were taken. They may be read when [`Image::has_settled`] says so of the stamp.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Taken {
    /// Start and length of each in bytes, in order.
    pub parts: Vec<(u64, u64)>,
    /// Where to go on; `None` at the end of the disk.
    pub next: Option<u64>,
    /// What [`Image::has_settled`] takes.
    pub stamp: u64,
}

impl Watch {
    /// Of a disk of `size` bytes; all of it has changed.
    fn new(size: u64) -> Watch {
        let mut shift = GRANULARITY.trailing_zeros();
        while size.div_ceil(1 << shift) > BITS_MAX {
            shift += 1;
        }
        let count = size.div_ceil(1 << shift);
        let mut bits = vec![0; count.div_ceil(8) as usize];
        fill(&mut bits, 0, count, true);
        Watch { shift, count, bits, set: count }
    }

    /// First and last bit of a range of at least one byte.
    fn bits_of(&self, offset: u64, len: u64) -> (u64, u64) {
        (offset >> self.shift, ((offset + len - 1) >> self.shift) + 1)
    }

    fn covers(&self, offset: u64, len: u64) -> bool {
        let (from, to) = self.bits_of(offset, len);
        all_set(&self.bits, from, to.min(self.count))
    }

    fn is_set(&self, bit: u64) -> bool {
        self.bits[(bit / 8) as usize] >> (bit % 8) & 1 == 1
    }

    fn record(&mut self, offset: u64, len: u64) {
        let (from, to) = self.bits_of(offset, len);
        for bit in from..to.min(self.count) {
            if !self.is_set(bit) {
                self.bits[(bit / 8) as usize] |= 1 << (bit % 8);
                self.set += 1;
            }
        }
    }

    /// Clears bits from the one on that holds `from`, of at most `most` bytes in all.
    fn take(&mut self, from: u64, most: u64, size: u64) -> Taken {
        let mut taken = Taken::default();
        let mut bit = from >> self.shift;
        let mut left = (most >> self.shift).max(1);
        let end = self.count.min(bit + STRIDE as u64 * 8);
        while bit < end && left > 0 {
            if bit.is_multiple_of(8) && self.bits[(bit / 8) as usize] == 0 {
                bit += 8;
                continue;
            }
            if self.is_set(bit) {
                self.bits[(bit / 8) as usize] &= !(1 << (bit % 8));
                self.set -= 1;
                left -= 1;
                let start = bit << self.shift;
                let len = (1u64 << self.shift).min(size.saturating_sub(start));
                match taken.parts.last_mut() {
                    Some(last) if last.0 + last.1 == start => last.1 += len,
                    _ => taken.parts.push((start, len)),
                }
            }
            bit += 1;
        }
        taken.next = (bit < self.count).then_some(bit << self.shift);
        taken
    }
}

impl Shared {
    /// Whether no write to this range has to be recorded.
    pub(super) fn watch_covers(&self, offset: u64, len: u64) -> bool {
        self.watch.borrow().as_ref().is_none_or(|w| w.covers(offset, len))
    }

    /// A change of this range has ended, well or not.
    pub(super) fn record(&self, offset: u64, len: u64) {
        if let Some(watch) = &mut *self.watch.borrow_mut() {
            watch.record(offset, len);
        }
        if self.flags.get() {
            self.unflag(offset, len);
        }
    }

    /// Writes to these parts have to be recorded again.
    fn flag(&self, parts: &[(u64, u64)]) {
        let bits = self.geometry.unit_bits();
        for &(start, len) in parts {
            for unit in start >> bits..=(start + len - 1) >> bits {
                let word = self.map.lookup(unit);
                let now = self.flagged(unit, word);
                if now != word {
                    // Nobody else changes words but on this thread.
                    self.map.replace(unit, word, now);
                }
            }
        }
    }
}

impl Image {
    /// Begins to record changes for [`Image::take_changed`]; all of the disk counts as changed at first.
    /// It goes on whatever becomes of the layers, until [`Image::unwatch`] or another size.
    ///
    /// # Errors
    /// If somebody else has it recorded, or the image is being closed.
    pub fn watch(&mut self) -> Result<(), String> {
        if self.closing || self.lost {
            return Err("the image is being closed, or out of service".to_owned());
        }
        let mut watch = self.shared.watch.borrow_mut();
        if watch.is_some() {
            return Err("its changes are recorded for somebody else".to_owned());
        }
        *watch = Some(Watch::new(self.shared.info.size));
        self.shared.flags.set(true);
        Ok(())
    }

    /// Ends [`Image::watch`].
    pub fn unwatch(&mut self) {
        // Flags that are left in the map go with the next write to each.
        *self.shared.watch.borrow_mut() = None;
    }

    /// Bytes that have changed and were not taken, rounded up; `None` if they are not recorded (any more).
    pub fn changed(&self) -> Option<u64> {
        let watch = self.shared.watch.borrow();
        watch.as_ref().map(|w| (w.set << w.shift).min(self.shared.info.size))
    }

    /// Takes changed parts from `from` on, at most `most` bytes (but at least one part); looks at a part of
    /// the disk at a time. `None` if changes are not recorded (any more).
    pub fn take_changed(&mut self, from: u64, most: u64) -> Option<Taken> {
        let size = self.shared.info.size;
        let mut taken = self.shared.watch.borrow_mut().as_mut()?.take(from, most, size);
        if !taken.parts.is_empty() {
            self.shared.flag(&taken.parts);
            taken.stamp = self.shared.begin_epoch();
        }
        Some(taken)
    }

    /// Whether all that may have changed parts before they were taken has ended: what is read now is at
    /// least as new as when they were taken, and what comes is recorded.
    pub fn has_settled(&self, stamp: u64) -> bool {
        self.shared.is_past(stamp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_taken_once_and_come_again_when_they_change() {
        let size = (100 << 20) + 512;
        let mut w = Watch::new(size);
        assert_eq!((w.count, w.set), (1601, 1601));
        let first = w.take(0, 1 << 20, size);
        assert_eq!((first.parts, first.next), (vec![(0, 1 << 20)], Some(1 << 20)));
        let rest = w.take(1 << 20, u64::MAX, size);
        assert_eq!((rest.parts, rest.next), (vec![(1 << 20, size - (1 << 20))], None));
        assert_eq!((w.set, w.take(0, 1, size).parts), (0, vec![]));
        w.record(65535, 2);
        w.record(size - 1, 1);
        w.record(5 << 20, 1);
        w.record(5 << 20, 65536);
        assert_eq!(w.set, 4);
        assert!(w.covers(0, 131_072) && !w.covers(0, 131_073) && w.covers(size - 512, 512));
        let some = w.take(0, 65536, size);
        assert_eq!((some.parts, some.next), (vec![(0, 65536)], Some(65536)));
        let rest = w.take(65536, 1 << 30, size);
        assert_eq!(rest.parts, [(65536, 65536), (5 << 20, 65536), (100 << 20, 512)]);
        assert_eq!((rest.next, w.set), (None, 0));
    }

    #[test]
    fn a_huge_disk_has_larger_parts_and_is_looked_at_in_strides() {
        let size = 64 << 40;
        let mut w = Watch::new(size);
        assert_eq!((w.shift, w.count), (23, BITS_MAX));
        fill(&mut w.bits, 0, BITS_MAX, false);
        w.set = 0;
        w.record(size - 1, 1);
        let (mut at, mut strides) = (0, 0);
        let last = loop {
            let taken = w.take(at, 1 << 30, size);
            strides += 1;
            match taken.next {
                Some(next) => at = next,
                None => break taken,
            }
        };
        assert_eq!(last.parts, [(size - (8 << 20), 8 << 20)]);
        assert_eq!(strides, BITS_MAX / 8 / STRIDE as u64);
    }
}
