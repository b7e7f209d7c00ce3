//! Changing a served image by calls: [`Changes`] is the service behind `polldisk nbd --control`.
//!
//! What takes long is a job on a thread of its own, one at a time; calls ask how far it is.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use node::{Disk, JobWatch, Limiter};
use qcow::open::Format;
use reactor::Clock;
use reactor::sync::Mutex;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::rpc::{FAILED, Failure, INVALID_PARAMS, METHOD_NOT_FOUND, Service};

/// Jobs that are remembered.
const REMEMBERED: usize = 32;

const SECOND: u64 = 1_000_000_000;

const ENDING: &str = "the server is ending";

/// Between two looks whether a job has ended.
const LOOK: Duration = Duration::from_millis(5);

/// A running image and its jobs.
pub(crate) struct Changes {
    state: Mutex<State>,
    clock: Clock,
    /// Folders that backing files may be in; any if there are none.
    allow: Vec<PathBuf>,
    /// The disk's size in bytes.
    size: Arc<AtomicU64>,
    limiter: Limiter,
}

struct State {
    /// `None` while a change is under way, or when the end has begun.
    disk: Option<Disk>,
    /// The chain's files by now.
    chain: Vec<String>,
    jobs: Vec<Arc<Job>>,
    next_job: u64,
    ending: bool,
}

/// Something long that is done to an image.
struct Job {
    id: u64,
    what: &'static str,
    done: AtomicU64,
    of: AtomicU64,
    stop: AtomicBool,
    /// How it ended: an error, or nothing.
    ended: Mutex<Option<Option<String>>>,
}

impl Job {
    fn as_json(&self) -> Value {
        let ended = self.ended.lock().clone();
        let state = match &ended {
            None => "running",
            Some(None) => "done",
            Some(Some(_)) if self.stop.load(Ordering::Relaxed) => "stopped",
            Some(Some(_)) => "failed",
        };
        json!({
            "job": self.id,
            "what": self.what,
            "done": self.done.load(Ordering::Relaxed),
            "of": self.of.load(Ordering::Relaxed),
            "state": state,
            "error": ended.flatten(),
        })
    }
}

/// Keeps a job to its rate, and tells those who ask.
struct Paced {
    job: Arc<Job>,
    /// Bytes a second.
    rate: Option<u64>,
    clock: Clock,
    /// Until when bytes were allowed.
    last: u64,
}

impl JobWatch for Paced {
    fn at(&mut self, done: u64, of: u64) -> bool {
        self.job.done.store(done, Ordering::Relaxed);
        self.job.of.store(of, Ordering::Relaxed);
        !self.job.stop.load(Ordering::Relaxed)
    }

    fn allow(&mut self) -> u64 {
        let Some(rate) = self.rate else { return u64::MAX / 2 };
        let now = self.clock.now();
        // At most what a second allows, however long nobody asked.
        self.last = self.last.max(now.saturating_sub(SECOND));
        // Another processor's clock may be a little behind.
        let bytes =
            u128::from(rate) * u128::from(now.saturating_sub(self.last)) / u128::from(SECOND);
        if bytes > 0 {
            self.last = now;
        }
        bytes as u64
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot {
    overlay: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Delete {
    snapshot: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    size: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stream {
    base: Option<usize>,
    rate: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Commit {
    layer: usize,
    rate: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rebase {
    backing: Option<String>,
    format: Option<String>,
    rate: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Limit {
    iops: Option<u64>,
    bandwidth: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cancel {
    job: u64,
}

impl Changes {
    /// For a disk that runs.
    pub(crate) fn new(disk: Disk, clock: Clock, allow: Vec<PathBuf>) -> Arc<Changes> {
        let size = Arc::new(AtomicU64::new(disk.info().size));
        let chain = disk.chain().map(str::to_owned).collect();
        let limiter = disk.limiter();
        let state = State { disk: Some(disk), chain, jobs: Vec::new(), next_job: 1, ending: false };
        Arc::new(Changes { state: Mutex::new(state), clock, allow, size, limiter })
    }

    /// Limits the requests and bytes of a second; 0: as many as come.
    pub(crate) fn limit(&self, requests: u64, bytes: u64) {
        self.limiter.set(requests, bytes);
    }

    /// The disk's size in bytes, by now.
    pub(crate) fn size(&self) -> Arc<AtomicU64> {
        self.size.clone()
    }

    /// Stops a job that is under way and gives the disk back; no changes from now on.
    pub(crate) fn end(&self) -> Disk {
        loop {
            {
                let mut state = self.state.lock();
                state.ending = true;
                state.jobs.iter().for_each(|j| j.stop.store(true, Ordering::Relaxed));
                if let Some(disk) = state.disk.take() {
                    return disk;
                }
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Has the disk for a change that does not wait for a job that is under way, but stops it.
    pub(crate) fn hold(self: &Arc<Self>) -> Result<Held, Failure> {
        loop {
            {
                let mut state = self.state.lock();
                if state.ending {
                    return Err(Failure { code: FAILED, message: ENDING.to_owned() });
                }
                if let Some(disk) = state.disk.take() {
                    return Ok(Held { changes: self.clone(), disk: Some(disk) });
                }
                let running = state.jobs.iter().filter(|j| j.ended.lock().is_none());
                running.for_each(|j| j.stop.store(true, Ordering::Relaxed));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Takes the disk for a change.
    fn take(&self) -> Result<Disk, Failure> {
        let mut state = self.state.lock();
        let busy = || match state.jobs.last() {
            Some(j) => format!("job {} ({}) is under way", j.id, j.what),
            None => "another change is under way".to_owned(),
        };
        let why = if state.ending { ENDING.to_owned() } else { busy() };
        let disk = if state.ending { None } else { state.disk.take() };
        disk.ok_or(Failure { code: FAILED, message: why })
    }

    fn give(&self, disk: Disk) {
        self.size.store(disk.info().size, Ordering::Relaxed);
        let mut state = self.state.lock();
        state.chain = disk.chain().map(str::to_owned).collect();
        state.disk = Some(disk);
    }

    /// Does something short.
    fn change<T>(&self, f: impl FnOnce(&mut Disk) -> Result<T, node::Error>) -> Result<T, Failure> {
        let mut disk = self.take()?;
        let done = f(&mut disk);
        self.give(disk);
        done.map_err(|e| anyhow::Error::from(e).into())
    }

    /// Begins something long.
    fn begin(
        self: &Arc<Self>,
        what: &'static str,
        rate: Option<u64>,
        f: impl FnOnce(&mut Disk, &mut dyn JobWatch) -> Result<(), node::Error> + Send + 'static,
    ) -> Result<Value, Failure> {
        let disk = self.take()?;
        let job = self.new_job(what);
        let id = job.id;
        let (all, mut slot) = (self.clone(), Some(disk));
        let mut watch = self.paced(&job, rate);
        let (send, receive) = std::sync::mpsc::sync_channel::<Disk>(1);
        let body = move || {
            let Ok(mut disk) = receive.recv() else { return };
            let ended = f(&mut disk, &mut watch).err();
            all.give(disk);
            *watch.job.ended.lock() = Some(ended.map(|e| e.to_string()));
        };
        if let Err(e) = std::thread::Builder::new().name("job".to_owned()).spawn(body) {
            *job.ended.lock() = Some(Some(format!("no thread for it: {e}")));
        } else if let Some(disk) = slot.take() {
            // Received at once: the thread waits for nothing else.
            if let Err(back) = send.send(disk) {
                slot = Some(back.0);
            }
        }
        if let Some(disk) = slot {
            self.give(disk);
        }
        Ok(json!({"job": id}))
    }

    fn new_job(&self, what: &'static str) -> Arc<Job> {
        let mut state = self.state.lock();
        let id = state.next_job;
        state.next_job += 1;
        let (done, of, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let job = Arc::new(Job { id, what, done, of, stop, ended: Mutex::new(None) });
        if state.jobs.len() == REMEMBERED {
            state.jobs.remove(0);
        }
        state.jobs.push(job.clone());
        job
    }

    fn paced(&self, job: &Arc<Job>, rate: Option<u64>) -> Paced {
        let (clock, last) = (self.clock.clone(), self.clock.now());
        Paced { job: job.clone(), rate, clock, last }
    }

    /// Does something long on the caller's thread, as a job like others.
    pub(crate) fn work(
        &self,
        what: &'static str,
        rate: Option<u64>,
        f: impl FnOnce(&mut Disk, &mut dyn JobWatch) -> Result<(), node::Error>,
    ) -> Result<(), Failure> {
        let mut disk = self.take()?;
        let job = self.new_job(what);
        let ended = f(&mut disk, &mut self.paced(&job, rate));
        self.give(disk);
        *job.ended.lock() = Some(ended.as_ref().err().map(ToString::to_string));
        ended.map_err(|e| anyhow::Error::from(e).into())
    }

    fn cancel(&self, id: u64) -> Result<Value, Failure> {
        let state = self.state.lock();
        match state.jobs.iter().find(|j| j.id == id) {
            Some(job) => {
                if job.ended.lock().is_none() {
                    job.stop.store(true, Ordering::Relaxed);
                }
                Ok(job.as_json())
            }
            None => Err(Failure { code: FAILED, message: format!("there is no job {id}") }),
        }
    }
}

/// A running disk that somebody has for himself; given back with this.
pub(crate) struct Held {
    changes: Arc<Changes>,
    disk: Option<Disk>,
}

impl Held {
    pub(crate) fn disk(&mut self) -> &mut Disk {
        self.disk.as_mut().expect("it is there until the end")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(disk) = self.disk.take() {
            self.changes.give(disk);
        }
    }
}

/// Reads a call's parameters.
pub(crate) fn parse<T: DeserializeOwned>(params: &Value) -> Result<T, Failure> {
    // No parameters at all are an empty object.
    let params = if params.is_null() { json!({}) } else { params.clone() };
    serde_json::from_value(params)
        .map_err(|e| Failure { code: INVALID_PARAMS, message: format!("parameters: {e}") })
}

/// A service for each connection's thread to share.
pub(crate) struct Shared(pub(crate) Arc<Changes>);

impl Service for Shared {
    fn call(&self, method: &str, params: &Value) -> Result<Value, Failure> {
        let all = &self.0;
        match method {
            "chain" => {
                let size = all.size.load(Ordering::Relaxed);
                Ok(json!({"layers": all.state.lock().chain, "virtual-size": size}))
            }
            "snapshot" => {
                let p: Snapshot = parse(params)?;
                all.change(|disk| disk.snapshot(&p.overlay)).map(|()| json!({}))
            }
            "snapshot-internal-list" => {
                all.change(|disk| disk.internal_snapshots()).map(|list| json!({"snapshots": list}))
            }
            "snapshot-internal-create" => {
                let p: Create = parse(params)?;
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                let now = now.unwrap_or(Duration::ZERO);
                let id = all.change(|disk| disk.take_internal_snapshot(&p.name, now))?;
                Ok(json!({"id": id, "name": p.name}))
            }
            "snapshot-internal-delete" => {
                let p: Delete = parse(params)?;
                all.change(|disk| disk.delete_internal_snapshot(&p.snapshot)).map(|()| json!({}))
            }
            "resize" => {
                let p: Resize = parse(params)?;
                all.change(|disk| disk.resize(p.size)).map(|()| json!({}))
            }
            "stream" => {
                let p: Stream = parse(params)?;
                all.begin("stream", p.rate, move |disk, watch| disk.stream(p.base, watch))
            }
            "commit" => {
                let p: Commit = parse(params)?;
                all.begin("commit", p.rate, move |disk, watch| disk.commit(p.layer, watch))
            }
            "rebase" => {
                let p: Rebase = parse(params)?;
                let format = p.format.as_deref().map(|f| {
                    Format::from_name(f).ok_or_else(|| Failure {
                        code: INVALID_PARAMS,
                        message: format!("format {f:?}: there are qcow2 and raw"),
                    })
                });
                let format = format.transpose()?;
                if p.backing.is_some() != format.is_some() {
                    let message = "a backing file and its format go together".to_owned();
                    return Err(Failure { code: INVALID_PARAMS, message });
                }
                let allow = all.allow.clone();
                all.begin("rebase", p.rate, move |disk, watch| {
                    disk.rebase(p.backing.as_deref().zip(format), &allow, watch)
                })
            }
            "limit" => {
                let p: Limit = parse(params)?;
                all.limit(p.iops.unwrap_or(0), p.bandwidth.unwrap_or(0));
                Ok(json!({}))
            }
            "jobs" => {
                let jobs = all.state.lock().jobs.clone();
                Ok(jobs.iter().map(|j| j.as_json()).collect())
            }
            "cancel" => all.cancel(parse::<Cancel>(params)?.job),
            m => Err(Failure { code: METHOD_NOT_FOUND, message: format!("no method {m:?}") }),
        }
    }
}
