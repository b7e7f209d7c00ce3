//! [`Slot`]: a request that goes out in parts, and which of them are under way.

use crate::{Flags, Op, QUARANTINED, SegList, Status, Tag};

/// Bits of a tag's generation that number the part within its request.
const PART_BITS: u32 = 8;

/// A request that goes out in parts.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) generation: u32,
    pub(super) used: bool,
    pub(super) unit: u16,
    pub(super) tag: Tag,
    pub(super) op: Op,
    pub(super) flags: Flags,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) segs: SegList,
    /// Of reads and writes: bytes sent so far. Of others: the next piece or member.
    pub(super) sent: u64,
    /// Where `sent` ends.
    pub(super) end: u64,
    /// How many parts went out.
    pub(super) part: u32,
    /// The parts that are in flight, a bit each: part `n` has bit `n % 64`, and waits for it.
    pub(super) outstanding: u64,
    pub(super) status: Status,
    pub(super) detail: u16,
}

impl Slot {
    pub(super) const FREE: Slot = Slot {
        generation: 0,
        used: false,
        unit: 0,
        tag: Tag::new(0, 0, 0),
        op: Op::Flush,
        flags: Flags::NONE,
        offset: 0,
        len: 0,
        segs: SegList::EMPTY,
        sent: 0,
        end: 0,
        part: 0,
        outstanding: 0,
        status: Status::Ok,
        detail: 0,
    };

    /// Whether every part went out or none will.
    pub(super) fn all_sent(&self) -> bool {
        self.sent >= self.end || !self.status.is_ok()
    }

    /// The generation of the next request here.
    pub(super) fn next_generation(&self) -> u32 {
        self.generation.wrapping_add(1) & (u32::MAX >> PART_BITS)
    }

    /// The generation in the tag of part `n`.
    pub(super) fn generation_of(&self, n: u32) -> u32 {
        self.generation << PART_BITS | n & ((1 << PART_BITS) - 1)
    }

    /// The bit of the part in flight that has this generation in its tag.
    pub(super) fn bit_of(&self, generation: u32) -> Option<u64> {
        // Of 64 parts in a row each has another bit, so the bit says which one it can be.
        let ahead = self.part.wrapping_sub(1).wrapping_sub(generation) % u64::BITS;
        let number = self.part.wrapping_sub(1).wrapping_sub(ahead);
        let bit = 1 << (number % u64::BITS);
        let known =
            self.used && self.outstanding & bit != 0 && self.generation_of(number) == generation;
        known.then_some(bit)
    }

    /// Keeps the first failure.
    pub(super) fn fail(&mut self, status: Status, detail: u16) {
        if self.status.is_ok() {
            (self.status, self.detail) = (status, detail);
        }
        self.detail |= detail & QUARANTINED;
    }
}
