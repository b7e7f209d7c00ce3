//! [`Histogram`]: how long requests took, counted by one thread and read by others without
//! disturbing it; and [`Distribution`], what was read.

use crate::stats::Counter;

/// Buckets of each power of two, as a power of two: a bucket is at most an eighth of its value wide.
const PARTS: u32 = 3;
/// Everything below 2^`FIRST` ns is in the first bucket.
const FIRST: u32 = 9;
/// Everything from 2^`LAST` ns, about a minute, is in the last one.
const LAST: u32 = 36;
/// How many buckets there are.
const BUCKETS: usize = ((LAST - FIRST) << PARTS) as usize;

/// A log-linear histogram of times. It has one writer (a plain load and store each) and any number
/// of readers; all of its memory is there from the start.
#[derive(Debug)]
pub struct Histogram {
    sum: Counter,
    counts: [Counter; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { sum: Counter::default(), counts: std::array::from_fn(|_| Counter::default()) }
    }
}

impl Histogram {
    /// Counts a time, in nanoseconds. For the one writer.
    #[inline]
    pub fn record(&self, ns: u64) {
        self.sum.add(ns);
        self.counts[bucket(ns)].add(1);
    }

    /// What was counted up to now. While the writer goes on, it may be one time ahead in one bucket of
    /// what it is in the sum.
    pub fn read(&self) -> Distribution {
        let counts = self.counts.each_ref().map(Counter::get);
        Distribution { sum: self.sum.get(), counts: Box::new(counts) }
    }
}

/// The bucket of a time.
#[inline]
fn bucket(ns: u64) -> usize {
    let ns = ns.clamp(1 << FIRST, (1 << LAST) - 1);
    let power = ns.ilog2();
    // The bits below the highest one; that one itself is what is subtracted.
    let part = (ns >> (power - PARTS)) - (1 << PARTS);
    (((power - FIRST) << PARTS) as usize) + part as usize
}

/// The first time above a bucket, in nanoseconds.
fn end(bucket: usize) -> u64 {
    let (power, part) = ((bucket >> PARTS) as u32 + FIRST, bucket as u64 & ((1 << PARTS) - 1));
    ((1 << PARTS) + part + 1) << (power - PARTS)
}

/// What a [`Histogram`] had counted at some moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Distribution {
    sum: u64,
    counts: Box<[u64; BUCKETS]>,
}

impl Default for Distribution {
    fn default() -> Distribution {
        Distribution { sum: 0, counts: Box::new([0; BUCKETS]) }
    }
}

impl Distribution {
    /// How many times there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// Their sum in nanoseconds.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// How many of them are shorter than 2^`power` nanoseconds: exactly, for 10 to 35.
    pub fn below(&self, power: u32) -> u64 {
        let end = (power.clamp(FIRST, LAST) - FIRST) << PARTS;
        self.counts[..end as usize].iter().sum()
    }

    /// What has come since an earlier moment; all of it, if the histogram was begun anew since then.
    pub fn since(&self, earlier: &Distribution) -> Distribution {
        let both = self.counts.iter().zip(&*earlier.counts);
        if both.clone().any(|(now, then)| now < then) {
            return self.clone();
        }
        let mut counts = Box::new([0; BUCKETS]);
        for (n, (now, then)) in counts.iter_mut().zip(both) {
            *n = now - then;
        }
        Distribution { sum: self.sum.wrapping_sub(earlier.sum), counts }
    }

    /// A time in nanoseconds that this share of all, from 0 to 1, are not longer than, at most an eighth
    /// above the shortest such; `None` if there are none.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let count = self.count();
        let wanted = ((count as f64 * share).ceil() as u64).clamp(1, count.max(1));
        let mut seen = 0u64;
        let at = self.counts.iter().position(|n| {
            seen = seen.saturating_add(*n);
            seen >= wanted
        });
        at.map(end)
    }

    /// Buckets that are not empty: where each ends, in nanoseconds, and how many times are in it.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        let all = self.counts.iter().enumerate().filter(|(_, n)| **n > 0);
        all.map(|(bucket, &n)| (end(bucket), n))
    }

    /// Adds so many times to the bucket that ends there: what [`Distribution::buckets`] has said.
    /// Counts from outside may be anything.
    pub fn put(&mut self, end: u64, count: u64) {
        let n = &mut self.counts[bucket(end.saturating_sub(1))];
        *n = n.saturating_add(count);
    }
}

impl std::ops::AddAssign<&Distribution> for Distribution {
    fn add_assign(&mut self, other: &Distribution) {
        self.sum = self.sum.wrapping_add(other.sum);
        for (n, more) in self.counts.iter_mut().zip(&*other.counts) {
            *n = n.saturating_add(*more);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        assert_eq!((bucket(0), bucket(511), bucket(575), bucket(576)), (0, 0, 0, 1));
        for b in 0..BUCKETS - 1 {
            assert_eq!((bucket(end(b) - 1), bucket(end(b))), (b, b + 1));
            assert!(b < 8 || end(b) - end(b - 1) <= end(b - 1) / 8 + 1, "{b}");
        }
        assert_eq!((bucket(u64::MAX), end(BUCKETS - 1)), (BUCKETS - 1, 1 << LAST));
    }

    #[test]
    fn what_is_recorded_is_read() {
        let histogram = Histogram::default();
        [0, 1023, 1024, 5_000_000, u64::MAX].iter().for_each(|&ns| histogram.record(ns));
        let read = histogram.read();
        assert_eq!((read.count(), read.sum()), (5, 5_002_046));
        assert_eq!([9, 10, 11, 22, 23, 99].map(|p| read.below(p)), [0, 2, 3, 3, 4, 5]);
    }

    #[test]
    fn buckets_go_to_somebody_else_and_back() {
        let histogram = Histogram::default();
        (0..5000).for_each(|n: u64| histogram.record(n * n * 57));
        let (read, mut again) = (histogram.read(), Distribution::default());
        read.buckets().for_each(|(end, n)| again.put(end, n));
        assert_eq!(again.counts, read.counts);
        // Whatever it says.
        again.put(0, 1);
        again.put(u64::MAX, u64::MAX);
        again.put(u64::MAX, u64::MAX);
        again += &read;
        assert_eq!((again.count(), again.quantile(1.0)), (u64::MAX, Some(1 << LAST)));
    }

    #[test]
    fn quantiles_and_differences() {
        let histogram = Histogram::default();
        assert_eq!(histogram.read().quantile(0.5), None);
        (1..=1000).for_each(|n| histogram.record(n * 1000));
        let first = histogram.read();
        for (share, exact) in [(0.0, 1000), (0.5, 500_000), (0.99, 990_000), (1.0, 1_000_000)] {
            let found = first.quantile(share).unwrap();
            assert!(found >= exact && found <= exact + exact / 8 + 64, "{share}: {found}");
        }
        (0..10).for_each(|_| histogram.record(7_000_000));
        let new = histogram.read().since(&first);
        assert_eq!((new.count(), new.sum()), (10, 70_000_000));
        assert!((7_000_000..8_000_000).contains(&new.quantile(0.001).unwrap()));
        // A ring that was connected anew.
        assert_eq!(new.since(&first), new);
    }
}
