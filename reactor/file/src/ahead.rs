//! [`Ahead`]: allocating the space of a growing file ahead of its writes.
//!
//! A direct write behind a file's end makes it longer, which file systems do one at a time and
//! io_uring on threads of the kernel's: several times the processor time of a write into space that
//! is there already. So a file that is written to behind its end gets space in large steps.

use crate::FileQueue;
use crate::queue::Step;
use crate::unit::Unit;

/// Space asked for at a time, at least and at most: a quarter of the file between these.
const LEAST: u64 = 32 << 20;
const MOST: u64 = 256 << 20;

/// How far ahead the space of a file is.
#[derive(Debug)]
pub(crate) struct Ahead {
    /// The file's length as asked for; 0: it has not grown yet.
    to: u64,
    /// A request for space is under way.
    pub(crate) busy: bool,
    /// The file system has no space or cannot do it: writes make the file longer themselves.
    pub(crate) off: bool,
}

impl Ahead {
    pub(crate) fn new() -> Ahead {
        Ahead { to: 0, busy: false, off: false }
    }

    /// Looks at a write up to `end` in a file of `len` bytes. Returns offset and length of the space
    /// that is to be asked for now.
    #[inline]
    pub(crate) fn look(&mut self, end: u64, len: u64) -> Option<(u64, u64)> {
        if self.busy || self.off || end <= len && self.to == 0 {
            return None;
        }
        self.grow(end, len)
    }

    fn grow(&mut self, end: u64, len: u64) -> Option<(u64, u64)> {
        let step = (len / 4).clamp(LEAST, MOST).next_multiple_of(4096);
        let from = self.to.max(len).max(end).next_multiple_of(4096);
        if end.saturating_add(step / 2) < self.to || from.checked_add(step).is_none() {
            return None;
        }
        self.busy = true;
        self.to = from + step;
        Some((from, step))
    }
}

impl FileQueue {
    /// Has the file get its space in large steps when it grows, ahead of the writes: it is then longer
    /// than what was written. For whoever shortens it in the end ([`LeafAccess::set_unit_len`]).
    pub fn allocate_ahead(&mut self, unit: u16) {
        if let Some(u) = self.units.get_mut(usize::from(unit))
            && !u.block_device
            && !u.info.read_only
            && u.ahead.is_none()
        {
            u.ahead = Some(Ahead::new());
            self.reserved += 1;
        }
    }

    /// Asks for more space if the file grows.
    #[inline]
    pub(crate) fn look_ahead(&mut self, unit: u16, end: u64) {
        let u = &mut self.units[usize::from(unit)];
        if let Some(ahead) = &mut u.ahead
            && let Some((offset, len)) = ahead.look(end, u.len)
        {
            self.ask_ahead(unit, offset, len);
        }
    }

    #[cold]
    fn ask_ahead(&mut self, unit: u16, offset: u64, len: u64) {
        let Some(slot) = self.take_slot() else {
            if let Some(ahead) = &mut self.units[usize::from(unit)].ahead {
                ahead.busy = false;
            }
            return;
        };
        let s = &mut self.slots[usize::from(slot)];
        (s.step, s.unit, s.offset, s.len) = (Step::Ahead, unit, offset, len);
        self.start(slot);
    }

    /// The kernel has made space, or has not.
    #[cold]
    pub(crate) fn is_ahead(&mut self, slot: u16, result: i64) {
        let s = &self.slots[usize::from(slot)];
        let unit = &mut self.units[usize::from(s.unit)];
        if result >= 0 {
            unit.len = unit.len.max(s.offset + s.len);
        }
        if let Some(ahead) = &mut unit.ahead {
            ahead.busy = false;
            ahead.off |= result < 0;
        }
        self.free.push(slot);
    }

    /// Waits until no space is asked for any more: what comes then stays.
    pub(crate) fn end_ahead(&mut self, unit: u16) {
        while self.units.get(usize::from(unit)).is_some_and(Unit::grows_now) {
            self.kernel.send();
            while let Some((slot, result)) = self.kernel.next() {
                if self.slots[usize::from(slot)].step == Step::Ahead {
                    self.is_ahead(slot, result);
                } else if let Some(end) = self.result(slot, result) {
                    let s = &mut self.slots[usize::from(slot)];
                    (s.status, s.detail) = end;
                    self.done.push_back(slot);
                }
            }
        }
        if let Some(u) = self.units.get_mut(usize::from(unit))
            && u.ahead.take().is_some()
        {
            self.reserved -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_asked_for_when_a_file_grows_and_well_ahead() {
        let mut a = Ahead::new();
        assert_eq!(a.look(4096, 8192), None, "a write inside");
        assert_eq!(a.look(12288, 8192), Some((12288, LEAST)));
        assert_eq!(a.look(16384, 8192), None, "one at a time");
        a.busy = false;
        assert_eq!(a.look(16384, 12288 + LEAST), None, "far enough");
        let end = LEAST * 3 / 4;
        assert_eq!(a.look(end, 12288 + LEAST), Some((12288 + LEAST, LEAST)));
        a.busy = false;
        let far = 1 << 40;
        assert_eq!(a.look(far, far / 2), Some((far, MOST)));
        a.off = true;
        a.busy = false;
        assert_eq!(a.look(far * 2, far), None);
        assert_eq!(Ahead::new().look(u64::MAX - 4096, 0), None);
    }
}
