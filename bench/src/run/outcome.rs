//! [`Outcome`]: what came of a job.

use serde::{Deserialize, Serialize};

/// Latencies in nanoseconds.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Percentiles {
    /// Mean.
    pub mean: f64,
    /// Fastest.
    pub min: u64,
    /// Half are faster.
    pub p50: u64,
    /// 90 % are faster.
    pub p90: u64,
    /// 99 % are faster.
    pub p99: u64,
    /// 99.9 % are faster.
    pub p99_9: u64,
    /// 99.99 % are faster.
    pub p99_99: u64,
    /// 99.999 % are faster.
    pub p99_999: u64,
    /// Slowest.
    pub max: u64,
}

/// What the server took while requests were counted; `None` what cannot be told here.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Server {
    /// Processor time of all its threads, in the kernel too, in nanoseconds.
    pub cpu_ns: Option<u64>,
    /// The part of that in which a polling thread had work.
    pub busy_ns: Option<u64>,
    /// Instructions, in the kernel too.
    pub instructions: Option<u64>,
    /// Context switches, voluntary and not.
    pub switches: Option<u64>,
    /// System calls. Counted in a run of its own where counting takes time, and put in proportion.
    pub syscalls: Option<u64>,
    /// Allocations, of a server in this process.
    #[serde(default)]
    pub allocations: Option<u64>,
}

/// Whether the rate had settled, by the rules of SNIA's Solid State Storage Performance Test
/// Specification, over five equal parts of the counted time: none is further than 10 % from the mean of
/// all, and a line through them rises or falls by no more than 10 % of it.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Steady {
    /// Whether it had.
    pub reached: bool,
    /// Furthest part from the mean, as a share of it.
    pub spread: f64,
    /// Rise of the line through the parts, as a share of the mean.
    pub slope: f64,
}

/// What came of a job. Latencies are of all requests that were counted; at a fixed rate also of those
/// that were due and not answered when the time was over.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Seconds that were counted.
    pub seconds: f64,
    /// Requests that were answered in them. Flushes are not among them.
    pub requests: u64,
    /// Bytes that they moved.
    pub bytes: u64,
    /// Requests that were answered with an error; they are not among the others.
    pub errors: u64,
    /// Requests a second.
    pub iops: f64,
    /// Latency of all.
    pub latency_ns: Percentiles,
    /// Of reads, writes, discards and flushes, where there were any.
    pub reads: Option<Percentiles>,
    /// Of writes.
    pub writes: Option<Percentiles>,
    /// Of discards.
    pub trims: Option<Percentiles>,
    /// Of flushes.
    pub flushes: Option<Percentiles>,
    /// The distribution of all latencies: upper bound of a bucket in nanoseconds, and the share of
    /// requests that were not slower. At most 200 points.
    pub cdf: Vec<(u64, f64)>,
    /// Requests in each whole tenth of a second.
    pub windows: Vec<u64>,
    /// Whether the rate had settled; `None` in a run too short to tell.
    pub steady: Option<Steady>,
    /// What the server took.
    pub server: Server,
    /// Bytes that were read back and found right.
    pub verified_bytes: u64,
}
