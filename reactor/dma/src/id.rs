//! [`RegionId`]: the numbers of regions.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Names a region within this process; small, and free for reuse once the region is gone.
///
/// A queue indexes its table of registered regions by it, and keeps the region itself in that
/// table: so an id found there can never mean another region.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RegionId(u16);

impl RegionId {
    /// How many regions may exist at a time.
    pub const MAX: usize = 4096;

    pub(crate) const FIRST: RegionId = RegionId(0);

    /// Index into a table of [`RegionId::MAX`] entries at most.
    #[inline]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// A free one, of which all others have had their turn since it was last free: a segment that
    /// somebody kept too long names nothing for as long as can be, rather than another region.
    pub(crate) fn take() -> Option<RegionId> {
        let start = TURN.load(Ordering::Relaxed);
        let (first, before) = (start / 64, (1 << (start % 64)) - 1);
        // The word where the turn begins comes twice: first without what lies before.
        for step in 0..=IDS.len() {
            let i = (first + step) % IDS.len();
            let not_yet = if step == 0 { before } else { 0 };
            let mut seen = IDS[i].load(Ordering::Relaxed);
            while seen | not_yet != u64::MAX {
                let bit = (seen | not_yet).trailing_ones();
                match IDS[i].compare_exchange_weak(
                    seen,
                    seen | 1 << bit,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => {
                        let at = i * 64 + bit as usize;
                        TURN.store((at + 1) % RegionId::MAX, Ordering::Relaxed);
                        return Some(RegionId(at as u16));
                    }
                    Err(now) => seen = now,
                }
            }
        }
        None
    }

    pub(crate) fn give_back(self) {
        IDS[self.index() / 64].fetch_and(!(1 << (self.0 % 64)), Ordering::Release);
    }
}

/// Where the search for a free id begins.
static TURN: AtomicUsize = AtomicUsize::new(0);

/// One bit per id that is taken.
static IDS: [AtomicU64; RegionId::MAX / 64] = [const { AtomicU64::new(0) }; RegionId::MAX / 64];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PageSize, Region};

    #[test]
    fn ids_are_distinct_and_come_back() {
        let a = Region::new(1, PageSize::Small).unwrap();
        let b = Region::new(4097, PageSize::Small).unwrap();
        assert_ne!(a.id(), b.id());
        assert_eq!((a.len(), b.len()), (4096, 8192));
        drop((a, b));
        // More than there are at a time. Miri takes its time over each.
        let many = if cfg!(miri) { 10 } else { RegionId::MAX + 100 };
        let mut last = None;
        for _ in 0..many {
            let id = Region::new(1, PageSize::Small).unwrap().id();
            assert_ne!(last.replace(id), Some(id), "not again at once");
        }
    }
}
