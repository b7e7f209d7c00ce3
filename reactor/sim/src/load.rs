//! [`Load`]: what a guest does next, drawn from the seed. Each run weighs the operations in its own
//! way, and keeps to a few places, so that clusters come and go and requests meet.

use block::{Flags, Op};

use crate::{GuestOp, Rng};

/// How often each operation comes.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// Reads.
    pub read: u64,
    /// Writes.
    pub write: u64,
    /// Writes that are durable when they are answered.
    pub fua: u64,
    /// Flushes.
    pub flush: u64,
    /// Write zeroes that gives space back.
    pub zero: u64,
    /// Write zeroes that keeps the space.
    pub zero_keep: u64,
    /// Discards.
    pub discard: u64,
}

/// A guest's habits.
#[derive(Clone, Debug)]
pub struct Load {
    /// How often each operation comes.
    pub weights: Weights,
    /// Whether changes of one sector may be in flight together.
    pub overlap: bool,
    /// Where half of the requests go: first sector, and how many.
    pub crowd: (u64, u64),
    /// Sectors that the larger requests are lined up with: a cluster, mostly.
    pub unit: u64,
    /// Sectors of a read or write at most.
    pub longest: u64,
}

impl Load {
    /// Draws the habits of a guest with a disk of `sectors`, whose clusters have `unit` sectors.
    pub fn draw(rng: &mut Rng, sectors: u64, unit: u64, longest: u64) -> Load {
        let weights = Weights {
            read: rng.pick(&[2, 6, 20]),
            write: rng.pick(&[10, 20, 40]),
            fua: rng.pick(&[0, 2, 8]),
            flush: rng.pick(&[1, 4, 10]),
            zero: rng.pick(&[0, 2, 10]),
            zero_keep: rng.pick(&[0, 2, 10]),
            discard: rng.pick(&[0, 4, 16]),
        };
        let crowded = rng.within(1, sectors.min(unit * 6).max(1));
        let crowd = (rng.below(sectors - crowded + 1), crowded);
        Load { weights, overlap: rng.one_in(2), crowd, unit, longest: longest.max(1) }
    }

    /// The next request to a disk of `sectors`.
    pub fn next(&self, rng: &mut Rng, sectors: u64) -> GuestOp {
        let w = &self.weights;
        let all = [w.read, w.write, w.fua, w.flush, w.zero, w.zero_keep, w.discard];
        let (op, flags) = match rng.weighted(&all) {
            0 => (Op::Read, Flags::NONE),
            1 => (Op::Write, Flags::NONE),
            2 => (Op::Write, Flags::FUA),
            3 => return GuestOp { op: Op::Flush, flags: Flags::NONE, first: 0, count: 0 },
            4 => (Op::WriteZeroes, rng.pick(&[Flags::NONE, Flags::NONE, Flags::FAST_ONLY])),
            5 => (Op::WriteZeroes, rng.pick(&[Flags::NO_UNMAP, Flags::NO_UNMAP.with(Flags::FUA)])),
            _ => (Op::Discard, Flags::NONE),
        };
        let moves = matches!(op, Op::Read | Op::Write);
        let longest = if moves { self.longest } else { (self.unit * 6).max(self.longest) };
        let mut count = match rng.below(8) {
            0 => rng.within(1, longest),
            1..3 => rng.within(1, self.unit.min(longest)),
            3 => self.unit.min(longest),
            _ => rng.within(1, longest.min(8)),
        };
        let mut first =
            if rng.one_in(2) { self.crowd.0 + rng.below(self.crowd.1) } else { rng.below(sectors) };
        if rng.one_in(3) {
            first -= first % self.unit;
            if !moves || count > self.unit {
                count = count.next_multiple_of(self.unit).min(longest);
            }
        }
        count = count.clamp(1, sectors - first);
        GuestOp { op, flags, first, count }
    }
}
