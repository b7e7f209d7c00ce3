//! [`Stripes`]: the layout of RAID 0, without a division, and [`StripeQueue`], devices in it.

use std::ops::Range;

use super::members::{infos, usable};
use super::{Layout, MAX_MEMBERS, Place, SplitQueue};
use crate::LeafAccess;

/// Several devices as one, in stripes (RAID 0).
pub type StripeQueue<Q> = SplitQueue<Q, Stripes>;

/// Chunks of a power of two of bytes, dealt out to members in turn: byte `x` lies in chunk `x / size`;
/// chunk `c` of `n` members lies on member `c % n`, as its chunk `c / n`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stripes {
    /// A chunk's bytes as a power of two, and less one.
    shift: u32,
    mask: u64,
    members: u64,
    /// ⌊2^64 / members⌋ + 1: a product with it, shifted by 64, is the quotient for all numbers below
    /// 2^64 / members, so for all chunks that there can be (chunks are 4 KiB at least). For one
    /// member it is 0: there is one chunk then, which has number 0.
    inverse: u64,
    /// Bytes of all members together.
    size: u64,
}

impl Stripes {
    /// One chunk on one member, of so many bytes.
    pub fn linear(size: u64) -> Stripes {
        let (shift, mask) = (u64::BITS - 1, u64::MAX >> 1);
        Stripes { shift, mask, members: 1, inverse: 0, size: size.min(1 << 63) }
    }

    /// Chunks of `chunk` bytes on `members` members, `size` bytes in all. `None` unless the chunk is
    /// a power of two from 4 KiB on and there are 2 to 2^12 members.
    pub fn new(chunk: u64, members: usize, size: u64) -> Option<Stripes> {
        if !chunk.is_power_of_two() || chunk < 4 << 10 || !(2..=1 << 12).contains(&members) {
            return None;
        }
        let members = members as u64;
        let inverse = u64::MAX / members + 1;
        Some(Stripes { shift: chunk.ilog2(), mask: chunk - 1, members, inverse, size })
    }

    /// The same with so many bytes in all.
    #[must_use]
    pub fn resized(self, size: u64) -> Stripes {
        Stripes { size, ..self }
    }

    /// Row and column of a chunk.
    #[inline]
    fn place(&self, chunk: u64) -> (u64, u64) {
        let row = ((u128::from(chunk) * u128::from(self.inverse)) >> 64) as u64;
        (row, chunk - row * self.members)
    }

    /// How many of the bytes before `at` lie on the member.
    fn before(&self, member: usize, at: u64) -> u64 {
        let (row, column) = self.place(at >> self.shift);
        let here = match column.cmp(&(member as u64)) {
            std::cmp::Ordering::Less => 0,
            std::cmp::Ordering::Equal => at & self.mask,
            std::cmp::Ordering::Greater => self.mask + 1,
        };
        (row << self.shift) + here
    }
}

impl Layout for Stripes {
    const SHARED: bool = false;

    fn nothing() -> Stripes {
        Stripes::linear(0)
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn members(&self) -> usize {
        self.members as usize
    }

    fn run(&self) -> u64 {
        (1 << self.shift).min(self.size)
    }

    #[inline]
    fn locate(&self, at: u64) -> Place {
        let within = at & self.mask;
        let (row, column) = self.place(at >> self.shift);
        let offset = row << self.shift | within;
        Place { member: column as usize, offset, len: self.mask - within + 1 }
    }

    fn pieces(&self, _: u64, _: u64) -> Range<u64> {
        0..self.members
    }

    fn piece(&self, piece: u64, offset: u64, len: u64) -> Place {
        let member = piece as usize;
        let from = self.before(member, offset);
        Place { member, offset: from, len: self.before(member, offset + len) - from }
    }

    fn uses(&self, _: usize) -> bool {
        true
    }

    fn end_on(&self, member: usize) -> u64 {
        self.before(member, self.size)
    }
}

impl<Q: LeafAccess> StripeQueue<Q> {
    /// Puts stripes of `size` bytes over members, each a queue and a unit of it. The smallest
    /// member counts; what others have more is not used.
    ///
    /// # Errors
    /// If `size` is no power of two from 4 KiB to 1 GiB, there are not 2 to [`MAX_MEMBERS`]
    /// members, a unit does not exist or has less than one chunk, or block sizes differ.
    pub fn new(members: Vec<(Q, u16)>, size: u64) -> Result<StripeQueue<Q>, String> {
        if !size.is_power_of_two() || !(4 << 10..=1 << 30).contains(&size) {
            return Err(format!("stripes of {size} bytes; a power of two from 4k to 1G is needed"));
        }
        if !(2..=MAX_MEMBERS).contains(&members.len()) {
            return Err(format!("{} members; 2 to {MAX_MEMBERS} are possible", members.len()));
        }
        infos(&members)?;
        let chunks = members.iter().map(|(queue, unit)| usable(queue, *unit) / size).min();
        let chunks = chunks.unwrap_or(0);
        if chunks == 0 {
            return Err(format!("a member is smaller than one stripe of {size} bytes"));
        }
        let total = (chunks * size)
            .checked_mul(members.len() as u64)
            .ok_or("the members together exceed 2^64 bytes")?;
        let stripes = Stripes::new(size, members.len(), total).ok_or("no such stripes")?;
        SplitQueue::over(members, stripes, false)
    }

    /// The same stripe for another reactor; `queue` makes another queue to a member's device.
    ///
    /// # Errors
    /// What `queue` says, or that a member has become smaller.
    pub fn another(
        &self,
        mut queue: impl FnMut(&Q) -> Result<Q, String>,
    ) -> Result<StripeQueue<Q>, String> {
        let members = self.members.iter().map(|(q, unit)| Ok((queue(q)?, *unit)));
        let members = members.collect::<Result<_, String>>()?;
        let layout = self.layout(0).ok_or("has no unit")?;
        SplitQueue::over(members, *layout, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_place_and_every_place_one_byte() {
        for members in 2..=7 {
            let l = Stripes::new(4096, members, u64::MAX).unwrap();
            let mut next = vec![0; members];
            for chunk in 0..200u64 {
                let Place { member, offset: at, len: left } = l.locate(chunk * 4096 + 512);
                assert_eq!((member as u64, left), (chunk % members as u64, 4096 - 512));
                assert_eq!(at, next[member] + 512);
                next[member] += 4096;
            }
        }
    }

    #[test]
    fn far_away_chunks_are_divided_right() {
        for members in 2..=32u64 {
            for shift in [12, 16, 30] {
                let l = Stripes::new(1 << shift, members as usize, u64::MAX).unwrap();
                let last = u64::MAX >> shift;
                for chunk in [last, last - 1, last / 3, last / members * members, 1 << 40] {
                    let chunk = chunk.min(last);
                    assert_eq!(l.place(chunk), (chunk / members, chunk % members));
                }
            }
        }
    }

    #[test]
    fn ranges_are_counted_per_member() {
        let l = Stripes::new(4096, 3, u64::MAX).unwrap();
        for (from, to) in [(0, 0), (0, 4096), (512, 8192), (4096, 100 * 4096), (5 * 4096, 6 * 4096)]
        {
            let mut count = [0u64; 3];
            let mut at = from;
            while at < to {
                count[l.locate(at).member] += 512;
                at += 512;
            }
            for (member, n) in count.into_iter().enumerate() {
                assert_eq!(l.before(member, to) - l.before(member, from), n);
            }
        }
    }
}
