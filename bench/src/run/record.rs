//! What is measured while a job runs: latencies, windows, whether the rate has settled.

use hdrhistogram::Histogram;

use super::{Kind, Outcome, Percentiles, Steady};
use crate::Error;

/// Length of a window in nanoseconds.
pub(super) const WINDOW: u64 = 100_000_000;

/// Longest latency that is told from longer ones, in nanoseconds: an hour.
const LONGEST: u64 = 3_600_000_000_000;

/// Equal parts of the counted time that are compared: the five rounds of SNIA's measurement window.
const ROUNDS: usize = 5;

/// Figures of requests. Takes all its memory when it is made.
pub(super) struct Record {
    /// By [`Kind`]; three digits.
    times: [Histogram<u64>; 4],
    windows: Vec<u64>,
    pub(super) requests: u64,
    pub(super) bytes: u64,
}

impl Record {
    pub(super) fn new(seconds: f64) -> Result<Record, Error> {
        let new = || Histogram::new_with_bounds(1, LONGEST, 3).map_err(Error::other);
        // The one that is under way at the end is not whole.
        let windows = (seconds * 1e9) as u64 / WINDOW + 1;
        Ok(Record {
            times: [new()?, new()?, new()?, new()?],
            windows: vec![0; windows as usize],
            requests: 0,
            bytes: 0,
        })
    }

    /// A request that was answered `since` the beginning, after `took`, in nanoseconds.
    #[inline]
    pub(super) fn answered(&mut self, kind: Kind, bytes: u32, since: u64, took: u64) {
        self.times[kind as usize].saturating_record(took.max(1));
        if kind != Kind::Flush {
            self.requests += 1;
            self.bytes += u64::from(bytes);
            if let Some(n) = self.windows.get_mut((since / WINDOW) as usize) {
                *n += 1;
            }
        }
    }

    /// So many requests that were not answered before the end: their latency counts, and nothing else.
    pub(super) fn late(&mut self, kind: Kind, took: u64, count: u64) {
        self.times[kind as usize].saturating_record_n(took.max(1), count);
    }

    /// What came of it in `ns` nanoseconds.
    pub(super) fn outcome(mut self, ns: u64) -> Result<Outcome, Error> {
        self.windows.truncate((ns / WINDOW) as usize);
        let [reads, writes, trims, flushes] = &self.times;
        let mut all = reads.clone();
        for more in [writes, trims] {
            all.add(more).map_err(Error::other)?;
        }
        let of = |h: &Histogram<u64>| (!h.is_empty()).then(|| percentiles(h));
        let seconds = ns as f64 / 1e9;
        Ok(Outcome {
            seconds,
            requests: self.requests,
            bytes: self.bytes,
            errors: 0,
            iops: if ns == 0 { 0.0 } else { self.requests as f64 / seconds },
            latency_ns: percentiles(&all),
            reads: of(reads),
            writes: of(writes),
            trims: of(trims),
            flushes: of(flushes),
            cdf: cdf(&all),
            steady: steady(&self.windows),
            windows: self.windows,
            server: super::Server::default(),
            verified_bytes: 0,
        })
    }
}

fn percentiles(h: &Histogram<u64>) -> Percentiles {
    if h.is_empty() {
        return Percentiles::default();
    }
    Percentiles {
        mean: h.mean(),
        min: h.min(),
        p50: h.value_at_quantile(0.5),
        p90: h.value_at_quantile(0.9),
        p99: h.value_at_quantile(0.99),
        p99_9: h.value_at_quantile(0.999),
        p99_99: h.value_at_quantile(0.9999),
        p99_999: h.value_at_quantile(0.999_99),
        max: h.max(),
    }
}

/// Every hundredth up to 0.99, then ten points to each further nine, and the slowest.
fn cdf(h: &Histogram<u64>) -> Vec<(u64, f64)> {
    let hundredths = (0..99).map(|n| f64::from(n) / 100.0);
    let nines = (20..=60).map(|n| 1.0 - 10f64.powf(f64::from(-n) / 10.0));
    let mut points: Vec<(u64, f64)> = Vec::new();
    for quantile in hundredths.chain(nines).chain([1.0]) {
        let value = h.value_at_quantile(quantile);
        if !h.is_empty() && points.last().is_none_or(|p| value > p.0) {
            points.push((value, h.quantile_below(value)));
        }
    }
    points
}

/// Whether the rate had settled: see [`Steady`]. `None` with less than a window to each round.
fn steady(windows: &[u64]) -> Option<Steady> {
    if windows.len() < ROUNDS {
        return None;
    }
    let each = |n: usize| {
        let part = &windows[n * windows.len() / ROUNDS..(n + 1) * windows.len() / ROUNDS];
        part.iter().sum::<u64>() as f64 / part.len() as f64
    };
    let rounds: [f64; ROUNDS] = std::array::from_fn(each);
    let mean = rounds.iter().sum::<f64>() / ROUNDS as f64;
    if mean == 0.0 {
        return Some(Steady { reached: false, spread: 0.0, slope: 0.0 });
    }
    let spread = rounds.iter().map(|r| (r - mean).abs() / mean).fold(0.0, f64::max);
    // Least squares; x from -2 to 2, so its squares add up to 10, and the line is 4 long.
    let rise: f64 = rounds.iter().zip([-2.0, -1.0, 0.0, 1.0, 2.0]).map(|(r, x)| r * x).sum();
    let slope = rise / 10.0 * 4.0 / mean;
    Some(Steady { reached: spread <= 0.1 && slope.abs() <= 0.1, spread, slope })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_that_settles_is_told_from_one_that_does_not() {
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        let s = steady(&[100; 50]).unwrap();
        assert!(s.reached && s.spread == 0.0 && s.slope == 0.0, "{s:?}");
        // 12 % over the five rounds: none is far off the mean, but it rises.
        let s = steady(&[94, 97, 100, 103, 106]).unwrap();
        assert!(!s.reached && near(s.spread, 0.06) && near(s.slope, 0.12), "{s:?}");
        let s = steady(&[106, 103, 100, 97, 94]).unwrap();
        assert!(!s.reached && near(s.slope, -0.12), "{s:?}");
        // No slope, but one round stands out.
        let s = steady(&[100, 100, 130, 100, 100]).unwrap();
        assert!(!s.reached && s.spread > 0.2 && near(s.slope, 0.0), "{s:?}");
        // Windows that differ within a round do not matter.
        assert!(steady(&[90, 110].repeat(10)).unwrap().reached);
        assert!(!steady(&[0; 10]).unwrap().reached);
        assert_eq!(steady(&[100; 4]), None);
    }

    #[test]
    fn percentiles_and_distribution_agree() {
        let mut r = Record::new(1.0).unwrap();
        for n in 1..=100_000u64 {
            r.answered(Kind::Read, 4096, n * 10_000, n * 1000);
        }
        r.answered(Kind::Flush, 0, 5, 7_000_000_000);
        let o = r.outcome(1_000_000_000).unwrap();
        assert_eq!((o.requests, o.bytes, o.iops), (100_000, 100_000 * 4096, 100_000.0));
        // Ten windows; what was answered in the very last moment is beyond.
        assert_eq!(o.windows[1..], [10_000; 9]);
        let close = |a: u64, b: f64| (a as f64 / b - 1.0).abs() < 0.002;
        let l = o.latency_ns;
        assert!(close(l.p50, 5e7) && close(l.p99, 9.9e7) && close(l.p99_999, 1e8), "{l:?}");
        assert!(close(l.min, 1000.0) && close(l.max, 1e8) && (l.mean / 5e7 - 1.0).abs() < 0.01);
        assert_eq!(o.reads, Some(l));
        assert!(o.writes.is_none() && close(o.flushes.unwrap().max, 7e9));
        assert!((100..=200).contains(&o.cdf.len()), "{}", o.cdf.len());
        assert!(o.cdf.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1));
        assert!(o.cdf.iter().all(|&(ns, share)| (ns as f64 / 1e8 - share).abs() < 0.002));
        assert_eq!(o.cdf.last().unwrap().1, 1.0);
        assert!(Record::new(1.0).unwrap().outcome(0).unwrap().cdf.is_empty());
    }
}
