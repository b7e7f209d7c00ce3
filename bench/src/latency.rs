//! [`Latency`]: what a histogram of times is reported as.

use hdrhistogram::Histogram;
use serde::Serialize;

/// Percentiles in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    /// Half are faster.
    pub p50: u64,
    /// 99 % are faster.
    pub p99: u64,
    /// 99.9 % are faster.
    pub p999: u64,
}

impl Latency {
    pub(crate) fn of(times: &Histogram<u64>) -> Latency {
        Latency {
            p50: times.value_at_quantile(0.5),
            p99: times.value_at_quantile(0.99),
            p999: times.value_at_quantile(0.999),
        }
    }
}
