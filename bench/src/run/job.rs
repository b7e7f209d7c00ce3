//! [`Job`]: what a load generator sends.

use serde::{Deserialize, Serialize};

use super::Limits;
use crate::Error;
use crate::stamp::BLOCK;

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
    /// The same with so many bytes from the beginning of one to that of the next.
    Stride(u64),
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

/// Bytes that verification may keep at hand: depth times the largest size.
const KEPT: u64 = 1 << 30;

impl Default for Job {
    /// Random reads of 4 KiB over all of the disk, one at a time, for ten seconds.
    fn default() -> Job {
        Job {
            name: "job".to_owned(),
            mix: Mix { reads: 100, trims: 0 },
            sizes: Sizes(vec![(4096, 100)]),
            distribution: Distribution::Uniform,
            shape: Shape::Depth(1),
            offset: 0,
            length: None,
            ramp: 0.0,
            seconds: 10.0,
            requests: None,
            flush_every: None,
            verify: Verify::No,
            seed: 1,
        }
    }
}

impl Job {
    /// Whether it writes.
    pub fn writes(&self) -> bool {
        self.mix.reads.saturating_add(self.mix.trims) < 100
    }

    /// Whether it changes what the disk holds: writes or discards.
    pub fn changes(&self) -> bool {
        self.mix.reads < 100
    }

    /// Most requests under way.
    pub fn depth(&self) -> u32 {
        match self.shape {
            Shape::Depth(depth) | Shape::Rate { depth, .. } => depth,
        }
    }

    /// Checks it against what a target takes; returns the range's first byte and its length.
    ///
    /// # Errors
    /// Which part of the job is impossible, and what is possible.
    pub fn check(&self, limits: &Limits) -> Result<(u64, u64), Error> {
        let (name, block) = (&limits.name, limits.block.max(1));
        let fail = |why: String| Err(Error::other(format!("{}: {why}", self.name)));
        if u32::from(self.mix.reads) + u32::from(self.mix.trims) > 100 {
            return fail("reads and discards are more than 100 % together".into());
        }
        let shares: u32 = self.sizes.0.iter().map(|s| u32::from(s.1)).sum();
        if shares != 100 {
            return fail(format!("the shares of its sizes add up to {shares} %, not to 100"));
        }
        let unit = if self.verify == Verify::Stamped { block.max(BLOCK as u32) } else { block };
        for &(size, _) in &self.sizes.0 {
            if size == 0 || !size.is_multiple_of(unit) || size > limits.max_len {
                let most = limits.max_len;
                return fail(format!(
                    "requests of {size} bytes: {name} takes multiples of {unit}, up to {most}"
                ));
            }
        }
        let largest = self.sizes.0.iter().map(|s| s.0).max().unwrap_or(0);
        let smallest = self.sizes.0.iter().map(|s| s.0).min().unwrap_or(0);
        if self.offset > limits.size || !self.offset.is_multiple_of(u64::from(unit)) {
            let (at, size) = (self.offset, limits.size);
            return fail(format!(
                "offset {at}: {name} has {size} bytes, and takes multiples of {unit}"
            ));
        }
        let left = limits.size - self.offset;
        let length = self.length.unwrap_or(left);
        if length > left {
            return fail(format!("{length} bytes from {} on: {name} ends before", self.offset));
        }
        if length < u64::from(largest) || !largest.is_multiple_of(smallest) {
            return fail(format!(
                "a range of {length} bytes must hold the largest request, which must be a multiple \
                 of the smallest"
            ));
        }
        self.check_pace(limits)?;
        self.check_kinds(limits)?;
        if self.verify == Verify::Stamped && u64::from(self.depth()) * u64::from(largest) > KEPT {
            return fail(format!(
                "depth times size: at most {KEPT} bytes can be verified at a time"
            ));
        }
        Ok((self.offset, length))
    }

    fn check_pace(&self, limits: &Limits) -> Result<(), Error> {
        let fail = |why: String| Err(Error::other(format!("{}: {why}", self.name)));
        let depth = self.depth();
        if !(1..=limits.max_depth).contains(&depth) {
            return fail(format!("depth {depth}: 1 to {} are possible", limits.max_depth));
        }
        if let Shape::Rate { per_second, .. } = self.shape
            && !(0.001..=1e8).contains(&per_second)
        {
            return fail(format!("{per_second} requests a second: 0.001 to 10^8 are possible"));
        }
        if let Distribution::Stride(step) = self.distribution
            && (step == 0 || !step.is_multiple_of(u64::from(limits.block.max(1))))
        {
            let block = limits.block.max(1);
            return fail(format!("steps of {step} bytes: multiples of {block} are possible"));
        }
        if let Distribution::Zipf(theta) = self.distribution
            && !(0.01..=20.0).contains(&theta)
        {
            return fail(format!("zipf:{theta}: 0.01 to 20 are possible"));
        }
        for (what, seconds, least) in [("ramp", self.ramp, 0.0), ("time", self.seconds, 0.001)] {
            if !(least..=86_400.0).contains(&seconds) {
                return fail(format!("{what} of {seconds} s: {least} to 86400 are possible"));
            }
        }
        if self.requests == Some(0) || self.flush_every == Some(0) {
            return fail("0 requests are none: 1 or more are possible".into());
        }
        Ok(())
    }

    fn check_kinds(&self, limits: &Limits) -> Result<(), Error> {
        let name = &limits.name;
        let fail = |why: String| Err(Error::other(format!("{}: {why}", self.name)));
        if self.changes() && !limits.writable {
            return fail(format!("{name} cannot be written to"));
        }
        if self.mix.trims > 0 && !limits.trim {
            return fail(format!("{name} knows no discards"));
        }
        if self.flush_every.is_some() && !limits.flush {
            return fail(format!("{name} knows no flushes"));
        }
        if self.flush_every.is_some() && !self.writes() {
            return fail("flushes follow writes, and there are none".into());
        }
        if self.verify == Verify::Stamped && !self.writes() {
            return fail("what this job writes is verified, and it writes nothing".into());
        }
        Ok(())
    }
}
