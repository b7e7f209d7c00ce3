//! [`Job`]: what a load generator sends.

use serde::{Deserialize, Serialize};

/// What requests do, in percent; what is left of 100 are writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mix {
    /// Reads.
    pub reads: u8,
    /// Discards.
    pub trims: u8,
}

/// Where requests go.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Distribution {
    /// One after the other, from the range's start to its end, and again.
    Sequential,
    /// Every block as often as any other.
    Uniform,
    /// The block that is the `k`th in a random order is asked for in proportion to 1 / k^theta.
    Zipf(f64),
}

/// Sizes of requests in bytes, each with its share; shares add up to 100.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sizes(pub Vec<(u32, u8)>);

/// When requests are sent.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// So many are always under way; the next is sent when one has ended.
    Depth(u32),
    /// So many a second, at times that do not depend on answers, and at most so many under way. Latency
    /// counts from the time that a request was due, not sent: what waits behind a slow one is seen.
    Rate {
        /// Requests a second.
        per_second: f64,
        /// Requests under way at most.
        depth: u32,
    },
}

/// Whether data is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// Reads are not looked at; writes carry any data.
    No,
    /// Writes carry block address, generation and CRC; what this job wrote is read back after it and
    /// checked, and so are reads of it meanwhile.
    Stamped,
}

/// What is sent.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Job {
    /// What it is called in results.
    pub name: String,
    /// What requests do.
    pub mix: Mix,
    /// Their sizes.
    pub sizes: Sizes,
    /// Where they go.
    pub distribution: Distribution,
    /// When they are sent.
    pub shape: Shape,
    /// First byte of the range that is asked for.
    pub offset: u64,
    /// Its length in bytes; to the disk's end without it.
    pub length: Option<u64>,
    /// Seconds that are sent before anything is counted.
    pub ramp: f64,
    /// Seconds that are counted, at most.
    pub seconds: f64,
    /// Ends earlier, after so many requests.
    pub requests: Option<u64>,
    /// Flush after every so many writes.
    pub flush_every: Option<u32>,
    /// Whether data is checked.
    pub verify: Verify,
    /// Where random numbers begin: the same seed asks for the same.
    pub seed: u64,
}
