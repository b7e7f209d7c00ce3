//! Which request is next.

use super::random::{Random, Zipf};
use super::{Distribution, Job, Kind};

/// What to ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Choice {
    pub(super) kind: Kind,
    pub(super) offset: u64,
    pub(super) len: u32,
}

enum Place {
    /// Where the next one is, and how far the one after it is from there at least.
    Sequential(u64, u64),
    Uniform,
    Zipf(Zipf),
}

/// Draws requests of a job. No allocation, no table that grows with the disk.
pub(super) struct Chooser {
    random: Random,
    /// Below this, of 100: reads; below the next: discards.
    reads: u64,
    trims: u64,
    /// Sizes, each with the share of it and those before.
    sizes: Vec<(u32, u64)>,
    /// What offsets are multiples of, counted from the range's start: the smallest size.
    unit: u64,
    start: u64,
    len: u64,
    place: Place,
}

impl Chooser {
    /// For a job that was checked, on a range that holds each of its sizes.
    pub(super) fn new(job: &Job, start: u64, len: u64) -> Chooser {
        let mut sum = 0;
        let cumulative = job.sizes.0.iter().map(|&(size, share)| {
            sum += u64::from(share);
            (size, sum)
        });
        let sizes: Vec<_> = cumulative.collect();
        let unit = u64::from(sizes.iter().map(|s| s.0).min().unwrap_or(512));
        let place = match job.distribution {
            Distribution::Sequential => Place::Sequential(0, 0),
            Distribution::Stride(step) => Place::Sequential(0, step),
            Distribution::Uniform => Place::Uniform,
            Distribution::Zipf(theta) => Place::Zipf(Zipf::new(theta, len / unit, job.seed)),
        };
        let (reads, trims) = (u64::from(job.mix.reads), u64::from(job.mix.trims));
        let random = Random::new(job.seed);
        Chooser { random, reads, trims: reads + trims, sizes, unit, start, len, place }
    }

    #[inline]
    pub(super) fn next(&mut self) -> Choice {
        let kind = match self.random.below(100) {
            n if n < self.reads => Kind::Read,
            n if n < self.trims => Kind::Trim,
            _ => Kind::Write,
        };
        let len = match self.sizes[..] {
            [(only, _)] => only,
            _ => {
                let n = self.random.below(100);
                let found = self.sizes.iter().find(|s| n < s.1).or(self.sizes.last());
                found.map_or(512, |s| s.0)
            }
        };
        let bytes = u64::from(len);
        let block = match &mut self.place {
            Place::Sequential(next, step) => {
                let at = if next.saturating_add(bytes) > self.len { 0 } else { *next };
                *next = at.saturating_add(bytes.max(*step));
                return Choice { kind, offset: self.start + at, len };
            }
            Place::Uniform => self.random.below((self.len - bytes) / self.unit + 1),
            // What would end behind the range ends at its end.
            Place::Zipf(zipf) => zipf.next(&mut self.random).min((self.len - bytes) / self.unit),
        };
        Choice { kind, offset: self.start + block * self.unit, len }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Mix, Sizes};
    use super::*;

    #[test]
    fn sequential_requests_follow_each_other_and_begin_again() {
        let job = Job {
            distribution: Distribution::Sequential,
            sizes: Sizes(vec![(4096, 100)]),
            ..Job::default()
        };
        // The last 100 bytes hold no request.
        let mut c = Chooser::new(&job, 8192, 3 * 4096 + 100);
        let offsets: Vec<u64> = (0..7).map(|_| c.next().offset).collect();
        assert_eq!(offsets, [2, 3, 4, 2, 3, 4, 2].map(|n| n * 4096));
    }

    #[test]
    fn strides_leave_out_what_lies_between() {
        let job = Job { distribution: Distribution::Stride(3 * 4096), ..Job::default() };
        let mut c = Chooser::new(&job, 4096, 7 * 4096);
        let offsets: Vec<u64> = (0..5).map(|_| c.next().offset).collect();
        assert_eq!(offsets, [1, 4, 7, 1, 4].map(|n| n * 4096));
        // Larger than the range: always its first block.
        let job = Job { distribution: Distribution::Stride(u64::MAX - 511), ..Job::default() };
        let mut c = Chooser::new(&job, 4096, 8192);
        assert_eq!([c.next().offset, c.next().offset], [4096, 4096]);
    }

    #[test]
    fn requests_stay_in_their_range_and_are_aligned() {
        for distribution in
            [Distribution::Uniform, Distribution::Zipf(0.9), Distribution::Sequential]
        {
            let job = Job {
                distribution,
                sizes: Sizes(vec![(4096, 50), (65536, 50)]),
                mix: Mix { reads: 30, trims: 20 },
                ..Job::default()
            };
            let (start, len) = (1 << 20, 65536 + 3 * 4096);
            let mut c = Chooser::new(&job, start, len);
            let mut seen = std::collections::HashSet::new();
            for _ in 0..2000 {
                let n = c.next();
                assert!(n.offset >= start && n.offset + u64::from(n.len) <= start + len, "{n:?}");
                assert!(n.offset.is_multiple_of(4096), "{n:?}");
                seen.insert((n.offset, n.len));
            }
            // All 19 blocks and all 4 places of a large one; sequential ones leave some out.
            let all = if distribution == Distribution::Sequential { 10 } else { 19 + 4 };
            assert!(seen.len() >= all, "{distribution:?}: {}", seen.len());
        }
    }

    #[test]
    fn kinds_and_sizes_have_their_shares() {
        let job = Job {
            sizes: Sizes(vec![(4096, 60), (8192, 40)]),
            mix: Mix { reads: 70, trims: 10 },
            ..Job::default()
        };
        let mut c = Chooser::new(&job, 0, 1 << 30);
        let all: Vec<Choice> = (0..20_000).map(|_| c.next()).collect();
        let share = |f: &dyn Fn(&Choice) -> bool| {
            all.iter().filter(|c| f(c)).count() as f64 / all.len() as f64
        };
        // Five standard deviations are less than 0.02.
        for (found, asked) in [
            (share(&|c| c.kind == Kind::Read), 0.7),
            (share(&|c| c.kind == Kind::Trim), 0.1),
            (share(&|c| c.kind == Kind::Write), 0.2),
            (share(&|c| c.len == 4096), 0.6),
        ] {
            assert!((found - asked).abs() < 0.02, "{found}, not {asked}");
        }
        let mut again = Chooser::new(&job, 0, 1 << 30);
        assert!(all.iter().all(|&c| again.next() == c));
    }
}
