//! What a comparison finds: the one form in which figures leave it, as JSON, CSV and page.

use std::collections::BTreeMap;

use bench::run::{Outcome, Percentiles};
use serde::{Deserialize, Serialize};

/// A comparison.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// The profile.
    pub profile: String,
    /// What the profile asks, in a sentence.
    pub question: String,
    /// Whether it was shortened.
    pub quick: bool,
    /// When it began, as seconds since 1970.
    pub began: u64,
    /// The command that does it again.
    pub command: String,
    /// Where it was done.
    pub host: Host,
    /// Who took part, and who could not, with the reason.
    pub peers: Vec<PeerInfo>,
    /// What was found: one for each peer, frontend, variant and workload.
    pub results: Vec<Row>,
    /// What to keep in mind when reading: what this host could not measure or did wrong.
    pub notes: Vec<String>,
    /// Flame graphs of servers under load: who, and the folded stacks.
    pub flames: Vec<Flame>,
}

/// The host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Host {
    /// What it is, in order, as name and value: CPU, governor, kernel, Xen, device, firmware, preconditioning.
    pub facts: Vec<(String, String)>,
    /// Processors that were to be had.
    pub processors: usize,
    /// Processors of generator and server; `None`: not pinned.
    pub cores: Option<[usize; 2]>,
}

/// A peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerInfo {
    /// Its name in results.
    pub name: String,
    /// What its program says of itself.
    pub version: Option<String>,
    /// Why it took no part, and what to do about that.
    pub absent: Option<String>,
}

/// How requests come to a server.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Frontend {
    /// A guest's ring.
    Ring,
    /// NBD over a Unix socket.
    Nbd,
    /// A block device or file of this kernel.
    Kernel,
    /// The device's own queue.
    Device,
}

/// What one server made of one workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Whose.
    pub peer: String,
    /// Through what.
    pub frontend: Frontend,
    /// How the server was set up, as the profile varies it; empty if it does not.
    pub variant: String,
    /// What was sent.
    pub workload: String,
    /// Bytes of a request; of most, where sizes differ.
    pub block_size: u32,
    /// Requests under way.
    pub depth: u32,
    /// Requests a second: median of the rounds.
    pub iops: f64,
    /// Median latency in nanoseconds: median of the rounds.
    pub latency_ns: u64,
    /// Processor time of the server for each request, in microseconds: median of the rounds. Of a
    /// server that polls, the time in which it had work.
    pub cpu_us_per_io: Option<f64>,
    /// The same with the time in which it polled in vain.
    pub cpu_us_per_io_polling: Option<f64>,
    /// System calls of the server for each request.
    pub syscalls_per_io: Option<f64>,
    /// Instructions of the server for each request.
    pub instructions_per_io: Option<f64>,
    /// Context switches of the server for each request.
    pub switches_per_io: Option<f64>,
    /// This peer's `cpu_us_per_io` over polldisk's, through the same frontend where polldisk has it, else
    /// its ring.
    pub ratio: Option<f64>,
    /// 95 % confidence interval of `ratio`, over the rounds.
    pub ratio_interval: Option<[f64; 2]>,
    /// Processor time above what NBD itself costs (nbdkit's memory plugin in the same rounds), in
    /// microseconds; `None` for other frontends.
    pub cpu_us_above_floor: Option<f64>,
    /// All percentiles, of all rounds together or of the median one.
    pub percentiles_ns: Percentiles,
    /// The rounds, in order.
    pub rounds: Vec<Outcome>,
    /// What else the profile says of it: cache, chain depth, devices, …
    pub labels: BTreeMap<String, String>,
    /// The command that measures this again, alone.
    pub command: String,
}

/// A flame graph's data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Flame {
    /// Whose.
    pub peer: String,
    /// Under what.
    pub workload: String,
    /// Lines of `frame;frame;frame count`, as `inferno` takes them.
    pub folded: Vec<String>,
}
