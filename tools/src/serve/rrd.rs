//! [`Rrd`]: figures for the toolstack's rrdd, by which XenCenter and Xen Orchestra draw: a file in memory
//! in its protocol for plugins, version 2 (xapi-project/xen-api, ocaml/xcp-rrdd/lib/transport), written anew
//! every five seconds. Names, units and kinds are those of xcp-rrdd-iostat, which knows tapdisks only.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use reactor::{Clock, Distribution};
use serde_json::json;

use super::device::Id;
use super::figures::{Disk, Figures, Io, OfReactor, Source, User};

/// The folder in which rrdd looks.
const FOLDER: &str = "/dev/shm/metrics";

/// Between two writes: what rrdd reads plugins by.
const EVERY: Duration = Duration::from_secs(5);

/// What the file begins with.
const MAGIC: &[u8; 11] = b"DATASOURCES";

/// Files grow by this: rrdd maps whole pages.
const PAGE: u64 = 4096;

const MIB: f64 = 1048576.0;

/// A value as it stands in the file.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Value {
    Int(u64),
    Float(f64),
}

impl Value {
    fn bytes(self) -> [u8; 8] {
        match self {
            Value::Int(n) => i64::try_from(n).unwrap_or(i64::MAX).to_be_bytes(),
            Value::Float(x) => x.to_be_bytes(),
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Value::Int(_) => "int64",
            Value::Float(_) => "float",
        }
    }
}

/// What rrdd makes of values: it takes gauges as they are, the growth in a second of those to derive, and
/// divides absolute ones, what there was since the last time, by the time.
type Kind = &'static str;

/// A line of a graph.
#[derive(Clone, Debug)]
struct DataSource {
    name: String,
    owner: String,
    description: String,
    kind: Kind,
    units: &'static str,
    value: Value,
}

impl DataSource {
    /// Its part of the metadata: a name and its object, all of whose values are strings.
    fn metadata(&self) -> String {
        let about = json!({
            "description": self.description,
            "owner": self.owner,
            "value_type": self.value.kind(),
            "type": self.kind,
            "default": "true",
            "units": self.units,
            "min": "0",
            "max": "inf",
        });
        format!("{}:{about}", json!(self.name))
    }
}

/// Which disk: an image, and the guest's device, or that it is over NBD.
type Key = (String, Option<Id>);

/// What was there at the last write.
#[derive(Default)]
struct Last {
    at_ns: u64,
    disks: BTreeMap<Key, Io>,
    reactors: Vec<OfReactor>,
}

/// The growth of a counter.
fn since(now: u64, last: u64) -> u64 {
    now.checked_sub(last).unwrap_or(now)
}

/// Mean microseconds.
fn mean_us(times: &Distribution) -> u64 {
    times.sum().checked_div(times.count()).unwrap_or(0) / 1000
}

/// What of a disk or a repository is told, in a time: whose it is, what it is called in texts, and the form
/// of the names.
struct Told<'a> {
    owner: String,
    what: &'static str,
    name: &'a dyn Fn(&str) -> String,
    passed_ns: u64,
}

/// The data sources of something that has done so much in all, and so much since the last write.
fn of_io(told: &Told<'_>, io: &Io, new: &Io) -> Vec<DataSource> {
    let (reads, writes) = (new.reads, new.writes);
    let all =
        [reads, writes, new.flushes, new.discards].iter().fold(0u64, |n, m| n.saturating_add(*m));
    let [read, written] = [new.read_bytes, new.written_bytes].map(|bytes| bytes as f64 / MIB);
    let waited = new.in_flight_ns as f64;
    let passed_ns = told.passed_ns;
    let what = told.what;
    let (int, float) = (Value::Int, Value::Float);
    let both = reads.saturating_add(writes);
    let sources: [(&str, String, Kind, &str, Value); 14] = [
        ("read", format!("Reads from device {what}, in B/s"), "derive", "B/s", int(io.read_bytes)),
        (
            "write",
            format!("Writes to device {what}, in B/s"),
            "derive",
            "B/s",
            int(io.written_bytes),
        ),
        (
            "read_latency",
            format!("Read latency from device {what}, in microseconds"),
            "gauge",
            "μs",
            int(mean_us(&new.read_latency)),
        ),
        (
            "write_latency",
            format!("Write latency from device {what}, in microseconds"),
            "gauge",
            "μs",
            int(mean_us(&new.write_latency)),
        ),
        (
            "io_throughput_read",
            format!("Data read from the {what}, in MiB/s"),
            "absolute",
            "MiB/s",
            float(read),
        ),
        (
            "io_throughput_write",
            format!("Data written to the {what}, in MiB/s"),
            "absolute",
            "MiB/s",
            float(written),
        ),
        (
            "io_throughput_total",
            format!("All {what} I/O, in MiB/s"),
            "absolute",
            "MiB/s",
            float(read + written),
        ),
        ("iops_read", "Read requests per second".into(), "absolute", "requests/s", int(reads)),
        ("iops_write", "Write requests per second".into(), "absolute", "requests/s", int(writes)),
        ("iops_total", "I/O Requests per second".into(), "absolute", "requests/s", int(both)),
        (
            "iowait",
            "Total I/O wait time (all requests) per second".into(),
            "absolute",
            "s/s",
            float(waited / 1e9),
        ),
        (
            "inflight",
            "Number of I/O requests currently in flight".into(),
            "gauge",
            "requests",
            int(io.in_flight),
        ),
        (
            "latency",
            "Average I/O latency".into(),
            "gauge",
            "μs",
            float(waited / 1e3 / all.max(1) as f64),
        ),
        (
            "avgqu_sz",
            "Average I/O queue size".into(),
            "gauge",
            "requests",
            float(waited / passed_ns.max(1) as f64),
        ),
    ];
    let source = |(line, description, kind, units, value): (&str, _, Kind, _, Value)| DataSource {
        name: (told.name)(line),
        owner: told.owner.clone(),
        description,
        kind,
        units,
        value,
    };
    sources.map(source).into()
}

fn of_reactor(number: usize, now: &OfReactor, last: Option<&OfReactor>) -> DataSource {
    let last = last.unwrap_or(now);
    let (busy, idle) = (since(now.busy_ns, last.busy_ns), since(now.idle_ns, last.idle_ns));
    DataSource {
        name: format!("polldisk_reactor{number}_busy"),
        owner: "host".to_owned(),
        description: format!("Share of its time that reactor {number} of polldisk has work"),
        kind: "gauge",
        units: "(fraction)",
        value: Value::Float(busy as f64 / (busy + idle).max(1) as f64),
    }
}

/// All data sources, and what is to be known of now the next time.
fn sources(figures: Figures, last: &Last, at_ns: u64) -> (Vec<DataSource>, Last) {
    let mut list = Vec::new();
    for (n, reactor) in figures.reactors.iter().enumerate() {
        list.push(of_reactor(n, reactor, last.reactors.get(n)));
    }
    let passed_ns = at_ns.saturating_sub(last.at_ns);
    let (mut disks, mut repositories) = (BTreeMap::new(), BTreeMap::new());
    for Disk { image, sr, user, io } in figures.disks {
        let id = match &user {
            User::Guest { id, .. } => Some(*id),
            User::Nbd => None,
        };
        let key = (image, id);
        // Of one that has just come nothing is known of before.
        let new = io.since(last.disks.get(&key).unwrap_or(&io));
        // rrdd draws what belongs to a VM; a guest without a toolstack has no UUID.
        if let User::Guest { name: vbd, vm: Some(vm), .. } = user {
            let owner = format!("vm {vm}");
            let name = |line: &str| format!("vbd_{vbd}_{line}");
            list.extend(of_io(&Told { owner, what: "VDI", name: &name, passed_ns }, &io, &new));
        }
        if let Some(sr) = sr {
            let (all, grown): &mut (Io, Io) = repositories.entry(sr).or_default();
            all.add(&io);
            grown.add(&new);
        }
        disks.insert(key, io);
    }
    for (sr, (all, grown)) in repositories {
        let short: String = sr.chars().take(8).collect();
        let (owner, name) = ("host".to_owned(), |line: &str| format!("{line}_{short}"));
        list.extend(of_io(&Told { owner, what: "SR", name: &name, passed_ns }, &all, &grown));
    }
    (list, Last { at_ns, disks, reactors: figures.reactors })
}

/// The file's bytes at a time, in seconds since 1970.
fn encode(list: &[DataSource], time: f64) -> anyhow::Result<Vec<u8>> {
    // Written by hand: disks of several guests have the same names, and an object that has a name twice
    // is what rrdd wants there.
    let each: Vec<String> = list.iter().map(DataSource::metadata).collect();
    let metadata = format!("{{\"datasources\":{{{}}}}}", each.join(","));
    let count = u32::try_from(list.len()).context("too many data sources")?;
    let len = u32::try_from(metadata.len()).context("too many data sources")?;
    let mut data = time.to_be_bytes().to_vec();
    data.extend(list.iter().flat_map(|source| source.value.bytes()));
    Ok([
        MAGIC.as_slice(),
        &crc32fast::hash(&data).to_be_bytes(),
        &crc32fast::hash(metadata.as_bytes()).to_be_bytes(),
        &count.to_be_bytes(),
        &data,
        &len.to_be_bytes(),
        metadata.as_bytes(),
    ]
    .concat())
}

/// The file, which rrdd may have open and mapped: it is always the same one and never gets shorter. It is
/// removed in the end.
pub(crate) struct Target {
    file: File,
    path: PathBuf,
    len: u64,
}

impl Target {
    /// In a folder that anybody may write to, as the one above ours is, somebody else may have made what
    /// is found there.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Target> {
        let named = || format!("rrd: {}", path.display());
        let folder = path.parent().with_context(named)?;
        std::fs::create_dir_all(folder).with_context(named)?;
        let ours = nix::unistd::geteuid().as_raw();
        let owner = std::fs::symlink_metadata(folder).with_context(named)?;
        if !owner.is_dir() || ![0, ours].contains(&owner.uid()) {
            bail!("rrd: {}: somebody else's, not root's or ours", folder.display());
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o644);
        let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
        let file = file.with_context(named)?;
        let found = file.metadata().with_context(named)?;
        if !found.is_file() || found.uid() != ours || found.nlink() != 1 {
            bail!("rrd: {}: no file of ours alone: remove it", path.display());
        }
        Ok(Target { file, path: path.to_owned(), len: found.len() })
    }

    /// The name by which the toolstack is told of it, if it is where rrdd looks.
    pub(crate) fn uid(&self) -> Option<&str> {
        if self.path.parent() != Some(Path::new(FOLDER)) {
            return None;
        }
        self.path.file_name()?.to_str()
    }

    /// The sum over the values comes last: what is read before that is known to be wrong.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let needed = (bytes.len() as u64).next_multiple_of(PAGE);
        if needed > self.len {
            self.file.set_len(needed)?;
            self.len = needed;
        }
        let sum = MAGIC.len();
        self.file.write_all_at(&bytes[sum + 4..], sum as u64 + 4)?;
        self.file.write_all_at(&bytes[..sum], 0)?;
        self.file.write_all_at(&bytes[sum..sum + 4], sum as u64)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_file(&self.path) {
            log::warn!("rrd: {}: {e}", self.path.display());
        }
    }
}

/// Checks the path of the file.
pub(crate) fn check(path: &Path) -> anyhow::Result<()> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
    if !path.is_absolute() || name.is_empty() || !name.bytes().all(plain) {
        bail!(
            "rrd: {}: an absolute path is needed, as {FOLDER}/polldisk, with a name of letters, digits, \
             _, - and .",
            path.display()
        );
    }
    Ok(())
}

/// A thread that writes the file.
pub(crate) struct Rrd {
    stop: SyncSender<()>,
    thread: JoinHandle<()>,
}

impl Rrd {
    pub(crate) fn start(mut target: Target, clock: Clock, source: Source) -> anyhow::Result<Rrd> {
        let (stop, stopped) = sync_channel(1);
        let body = move || {
            let (mut last, mut silent) = (Last::default(), false);
            loop {
                let (list, now) = sources(source(), &last, clock.now());
                last = now;
                let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                let bytes = encode(&list, time.unwrap_or_default().as_secs_f64());
                let done = bytes.and_then(|bytes| Ok(target.write(&bytes)?));
                if let (Err(e), false) = (&done, silent) {
                    log::warn!("rrd: {}: {e:#}", target.path.display());
                }
                silent = done.is_err();
                if stopped.recv_timeout(EVERY) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
        };
        let thread = std::thread::Builder::new().name("rrd".to_owned()).spawn(body);
        Ok(Rrd { stop, thread: thread.context("cannot start a thread")? })
    }

    /// Removes the file.
    pub(crate) fn shutdown(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            log::error!("the thread of rrd panicked");
        }
    }
}

#[cfg(test)]
mod tests;
