//! [`Space`]: which I/O virtual addresses are taken. Pure arithmetic.

use crate::abi::Pair;

/// Addresses below are never given out: 0 means "none" in too many places.
const LOWEST: u64 = 1 << 20;

/// What is assumed where the kernel does not say (before 5.4): 39 bits, the least that an IOMMU of
/// this kind has, without the window that x86 writes interrupts to.
pub(crate) const ASSUMED: [Pair; 2] =
    [Pair { start: 0, end: 0xfedf_ffff }, Pair { start: 0xfef0_0000, end: (1 << 39) - 1 }];

/// The addresses that devices of one container can use.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// Usable ranges, `end` inclusive.
    ranges: Vec<Pair>,
    /// What is taken: start and length, sorted.
    taken: Vec<(u64, u64)>,
}

impl Space {
    /// Says which ranges are usable: they may change with each device that comes.
    pub(crate) fn set_ranges(&mut self, ranges: &[Pair]) {
        self.ranges = ranges.to_vec();
        self.ranges.sort_by_key(|r| r.start);
    }

    /// The usable ranges.
    pub(crate) fn ranges(&self) -> &[Pair] {
        &self.ranges
    }

    /// Takes the lowest free `len` bytes at a multiple of `align` (a power of two).
    pub(crate) fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        for range in &self.ranges {
            let mut at = up(range.start.max(LOWEST), align)?;
            for &(start, taken) in &self.taken {
                if at.checked_add(len)? <= start {
                    break;
                }
                if at < start + taken {
                    at = up(start + taken, align)?;
                }
            }
            let last = at.checked_add(len)?.checked_sub(1)?;
            if last <= range.end {
                let index = self.taken.partition_point(|t| t.0 < at);
                self.taken.insert(index, (at, len));
                return Some(at);
            }
        }
        None
    }

    /// Gives back what was taken at `start`.
    pub(crate) fn give_back(&mut self, start: u64) {
        self.taken.retain(|t| t.0 != start);
    }
}

/// The next multiple of `align`.
fn up(at: u64, align: u64) -> Option<u64> {
    at.checked_next_multiple_of(align)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(ranges: &[(u64, u64)]) -> Space {
        let mut s = Space::default();
        let pairs: Vec<Pair> = ranges.iter().map(|&(start, end)| Pair { start, end }).collect();
        s.set_ranges(&pairs);
        s
    }

    #[test]
    fn lowest_free_and_aligned() {
        let mut s = space(&[(0, 0xfedf_ffff)]);
        assert_eq!(s.take(4096, 4096), Some(LOWEST));
        assert_eq!(s.take(2 << 20, 2 << 20), Some(2 << 20));
        assert_eq!(s.take(8192, 4096), Some(LOWEST + 4096));
        s.give_back(LOWEST);
        assert_eq!(s.take(8192, 4096), Some(LOWEST + 12288), "the hole is too small");
        assert_eq!(s.take(4096, 4096), Some(LOWEST));
        assert_eq!(s.take(1 << 30, 1 << 30), Some(1 << 30));
    }

    #[test]
    fn holes_in_the_space_are_kept() {
        let mut s = space(&[(0xfef0_0000, (1 << 39) - 1), (0, 0xfedf_ffff)]);
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push(s.take(1 << 30, 1 << 30).unwrap() >> 30);
        }
        assert_eq!(seen, [1, 2, 4, 5], "the fourth GiB holds the interrupt window");
    }

    #[test]
    fn the_end_is_inclusive_and_nothing_overflows() {
        let mut s = space(&[(LOWEST, LOWEST + 8191)]);
        assert_eq!(s.take(4096, 4096), Some(LOWEST));
        assert_eq!(s.take(8192, 4096), None);
        assert_eq!(s.take(4096, 4096), Some(LOWEST + 4096));
        assert_eq!(s.take(4096, 4096), None);
        let mut s = space(&[(u64::MAX - 4095, u64::MAX)]);
        assert_eq!(s.take(8192, 4096), None);
        assert_eq!(space(&[]).take(1, 1), None);
    }
}
