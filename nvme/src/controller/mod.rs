//! [`Controller`]: bring-up, the admin queue, events, queue creation, resets, shutdown.
//!
//! A state machine that never waits: [`Controller::step`] looks at what is there, does the next
//! thing and returns. A control thread steps it every millisecond or so; a test steps it under a
//! virtual clock. The calls that take a [`Clock`] step it until they are done. Queue pairs live on
//! their reactors and hear of it through a [`Link`].
//!
//! - `boot`: from any state of the registers to ready (§7.6.1); `scan`: namespaces;
//! - `serve`: health, events, aborts, creating and deleting queues; `format`: Format NVM;
//! - `ladder`: CC.EN=0, function reset, bus master off, or else quarantine.

mod boot;
mod format;
mod ladder;
mod scan;
mod serve;

use std::sync::Arc;

use nvme_spec::{Cap, Csts, SmartLog, cq_head_doorbell, offset, sq_tail_doorbell};

use crate::Error;
use crate::admin::AdminQueue;
use crate::bar::Bar;
use crate::clock::Clock;
use crate::identify::{ControllerInfo, Namespace, Refused};
use crate::link::{Link, Order};
use crate::memory::{DeviceMemory, DmaMapper, keep_for_good};
use crate::queue::{MAX_ENTRIES, Parts, QueueMemory, QueuePair};
use crate::shadow::{Bell, ShadowBuffers};
use crate::units::{Changing, Unit};
use boot::{Boot, Origin};
pub use format::{BlockFormat, Format};
use ladder::Ladder;
use scan::Scan;
use serve::{Closing, Service};

/// Milliseconds in nanoseconds.
const MS: u64 = 1_000_000;

/// Largest CAP.MPSMIN that is served: pages of 64 KiB. Each queue takes some whole pages.
const MAX_MPSMIN: u64 = 4;

/// What may be chosen when a controller is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// I/O queue pairs to ask for; the controller may grant fewer. At least 1.
    pub io_queues: u16,
    /// Entries of each I/O queue, 2 to 1024: rounded down to a power of two and to what the
    /// controller can do. One less is the depth.
    pub queue_entries: u32,
    /// How long an I/O command may take, in nanoseconds, before it is aborted; 1 ms at least.
    pub command_timeout: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options { io_queues: 16, queue_entries: 256, command_timeout: 30_000 * MS }
    }
}

/// What a controller is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It is being brought up.
    Starting,
    /// It serves.
    Ready,
    /// It is being reset, after which it starts again.
    Resetting,
    /// It is being closed.
    Closing,
    /// It was shut down; memory is free of it.
    Closed,
    /// It is lost: see [`Controller::error`].
    Failed,
}

/// What a controller has reported by itself since it was opened.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Events {
    /// Errors.
    pub error: u64,
    /// SMART / health.
    pub smart: u64,
    /// Namespaces changed.
    pub namespace: u64,
    /// Anything else.
    pub other: u64,
}

enum Phase {
    Boot(Boot),
    Ready,
    Ladder(Ladder),
    Closing(Closing),
    Closed,
    /// Lost. The memory may still be written to by the device if not `safe`.
    Dead {
        safe: bool,
    },
}

/// How far the device knows a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Not at all; it is created as soon as its queue pair waits.
    Wanted,
    /// It runs.
    Running,
    /// It is to be deleted: its queue pair is gone, or the controller is being closed.
    Unwanted,
    /// The device refused it, or deleted it.
    Ended,
}

/// A queue pair, as the controller sees it.
struct Entry {
    qid: u16,
    link: Arc<Link>,
    memory: Arc<QueueMemory>,
    stage: Stage,
    /// Why it ended.
    error: Option<Error>,
    /// The overdue command that an Abort was sent for, and when patience ends.
    abort: Option<(u64, u64)>,
}

/// An NVMe controller. Lives on a control thread, or on the thread of its one reactor.
///
/// Dropped without [`Controller::close`] it is disabled at once; where that cannot be confirmed
/// its memory is kept until the process ends.
pub struct Controller<B: Bar> {
    bar: B,
    memory: Arc<DeviceMemory>,
    options: Options,
    cap: Cap,
    admin: AdminQueue<B::Doorbell>,
    phase: Phase,
    /// From where bring-up began.
    origin: Origin,
    info: Option<ControllerInfo>,
    namespaces: Vec<Namespace>,
    refused: Vec<Refused>,
    changing: Option<Arc<[Changing]>>,
    /// Doorbells in memory, if the device offered them.
    shadow: Option<Arc<ShadowBuffers>>,
    scan: Scan,
    service: Service,
    /// Queue pairs that the controller granted.
    granted: u16,
    queues: Vec<Entry>,
    media_read_only: bool,
    smart: Option<SmartLog>,
    events: Events,
    error: Option<Error>,
    /// Resets, each soon after the one before; and when the last was.
    resets: u32,
    last_reset: u64,
}

impl<B: Bar> Controller<B> {
    /// Looks at the registers that never change and makes the admin queue. Touches nothing yet:
    /// [`Controller::step`] does.
    ///
    /// # Errors
    /// If the device is gone, cannot be driven, or memory cannot be had.
    pub fn new(bar: B, mapper: Arc<dyn DmaMapper>, options: Options) -> Result<Self, Error> {
        let cap = Cap(bar.read64(offset::CAP));
        if cap.0 == u64::MAX || bar.read32(offset::VS) == u32::MAX {
            return Err(Error::Gone);
        }
        let unsupported = |why: String| Err(Error::Unsupported(why));
        if cap.css() & Cap::CSS_NVM == 0 {
            return unsupported(format!("it has no NVM command set (CAP.CSS {:#x})", cap.css()));
        }
        if cap.mqes() == 0 {
            return unsupported("its queues may have one entry only (CAP.MQES 0)".to_owned());
        }
        // The smallest page that it takes: 4 KiB but for rare ones.
        if cap.mpsmin() > MAX_MPSMIN {
            let page = 4u64 << cap.mpsmin();
            return unsupported(format!("it wants memory pages of {page} KiB"));
        }
        let memory = DeviceMemory::new(mapper, 12 + cap.mpsmin() as u32);
        let dstrd = cap.dstrd() as u8;
        let bells =
            [sq_tail_doorbell(0, dstrd), cq_head_doorbell(0, dstrd)].map(|o| bar.doorbell(o));
        let [Some(sq), Some(cq)] = bells else {
            return unsupported(format!("its doorbells cannot be reached (CAP.DSTRD {dstrd})"));
        };
        let admin = AdminQueue::new(&memory, sq, cq)?;
        Ok(Controller {
            bar,
            memory,
            options,
            cap,
            admin,
            phase: Phase::Boot(Boot::Begin),
            origin: Origin::Open,
            info: None,
            namespaces: Vec::new(),
            refused: Vec::new(),
            changing: None,
            shadow: None,
            scan: Scan::default(),
            service: Service::default(),
            granted: 0,
            queues: Vec::new(),
            media_read_only: false,
            smart: None,
            events: Events::default(),
            error: None,
            resets: 0,
            last_reset: 0,
        })
    }

    /// Opens a controller and waits until it is ready.
    ///
    /// # Errors
    /// Why it is not. It was disabled again then, as far as that was possible.
    pub fn open(
        bar: B,
        mapper: Arc<dyn DmaMapper>,
        options: Options,
        clock: &mut impl Clock,
    ) -> Result<Self, Error> {
        let mut c = Controller::new(bar, mapper, options)?;
        loop {
            match c.step(clock.now()) {
                State::Ready => return Ok(c),
                State::Failed | State::Closed => {
                    return Err(c.error.clone().unwrap_or(Error::NotOpen));
                }
                _ => clock.pause(),
            }
        }
    }

    /// Does what is next and returns what the controller is doing. `now`: nanoseconds, never
    /// running backwards. Everything that happens without a request happens here: deadlines,
    /// events, resets. Call it at least every few milliseconds; it does a bounded amount of work,
    /// but a function reset may block it.
    pub fn step(&mut self, now: u64) -> State {
        let result = match self.phase {
            Phase::Boot(_) => self.boot(now),
            Phase::Ready => self.serve(now),
            Phase::Ladder(_) => {
                self.climb(now);
                Ok(())
            }
            Phase::Closing(_) => self.closing(now),
            Phase::Closed | Phase::Dead { .. } => Ok(()),
        };
        if let Err(e) = result {
            self.trouble(now, e);
        }
        if matches!(self.phase, Phase::Closed | Phase::Dead { safe: true }) {
            self.queues.retain(|q| !q.link.is_dropped());
        }
        self.state()
    }

    /// What the controller is doing.
    pub fn state(&self) -> State {
        match self.phase {
            Phase::Boot(_) if self.origin == Origin::Open => State::Starting,
            Phase::Boot(_) => State::Resetting,
            Phase::Ready => State::Ready,
            Phase::Ladder(_) => State::Resetting,
            Phase::Closing(_) => State::Closing,
            Phase::Closed => State::Closed,
            Phase::Dead { .. } => State::Failed,
        }
    }

    /// Why the controller is lost, or was reset the last time.
    pub fn error(&self) -> Option<&Error> {
        self.error.as_ref()
    }

    /// What it is; `None` before it was ready for the first time.
    pub fn info(&self) -> Option<&ControllerInfo> {
        self.info.as_ref()
    }

    /// The namespaces that can be used: unit `n` of a queue pair is the `n`th. Never gets shorter
    /// or longer while queue pairs are there; sizes may change.
    pub fn namespaces(&self) -> &[Namespace] {
        &self.namespaces
    }

    /// The namespaces that are there and cannot be used, each with why.
    pub fn refused(&self) -> &[Refused] {
        &self.refused
    }

    /// I/O queue pairs that the controller granted.
    pub fn max_queue_pairs(&self) -> u16 {
        self.granted
    }

    /// The health log as it was read last; `None` if it was not.
    pub fn smart(&self) -> Option<&SmartLog> {
        self.smart.as_ref()
    }

    /// Reads the health log.
    ///
    /// # Errors
    /// If the controller is not ready, or does not give it.
    pub fn read_smart(&mut self, clock: &mut impl Clock) -> Result<SmartLog, Error> {
        if !matches!(self.phase, Phase::Ready) {
            return Err(Error::NotOpen);
        }
        self.service.want_smart();
        loop {
            match (self.step(clock.now()), self.service.smart_read.take()) {
                (_, Some(read)) => return read,
                (State::Ready, None) => clock.pause(),
                _ => return Err(self.error.clone().unwrap_or(Error::NotOpen)),
            }
        }
    }

    /// What the controller reported by itself.
    pub fn events(&self) -> Events {
        self.events
    }

    /// Completions on the admin queue that named no command in flight.
    pub fn stale_admin_cids(&self) -> u64 {
        self.admin.stale
    }

    /// Makes a queue pair and waits until it runs.
    ///
    /// # Errors
    /// If all are in use, memory cannot be had, the controller refuses it or is lost.
    pub fn create_queue_pair(&mut self, clock: &mut impl Clock) -> Result<QueuePair<B>, Error> {
        let mut pair = self.start_queue_pair()?;
        let qid = self.queues.last().map(|q| q.qid);
        loop {
            let state = self.step(clock.now());
            // Nobody else polls it yet: after a reset the controller waits for its acknowledgement.
            pair.look();
            let entry = self.queues.iter().find(|q| Some(q.qid) == qid);
            let stage = entry.as_ref().map(|q| q.stage);
            match (stage, state) {
                (Some(Stage::Running), _) => return Ok(pair),
                (Some(Stage::Wanted), State::Ready | State::Resetting) => clock.pause(),
                (_, State::Failed) => return Err(self.error.clone().unwrap_or(Error::NotOpen)),
                _ => return Err(entry.and_then(|q| q.error.clone()).unwrap_or(Error::NotOpen)),
            }
        }
    }

    /// Makes a queue pair that takes requests as soon as [`Controller::step`] has told the device
    /// of it. If the device refuses it, it answers everything with `Gone`.
    ///
    /// # Errors
    /// If the controller is not ready, all queues are in use, or memory cannot be had.
    pub fn start_queue_pair(&mut self) -> Result<QueuePair<B>, Error> {
        let (Phase::Ready, Some(info), Some(changing)) = (&self.phase, &self.info, &self.changing)
        else {
            return Err(Error::NotOpen);
        };
        let free = |qid: &u16| !self.queues.iter().any(|q| q.qid == *qid);
        let qid = (1..=self.granted).find(free).ok_or(Error::NoQueue(self.granted))?;
        let dstrd = self.cap.dstrd() as u8;
        let bell = |at: u64, head: bool| {
            let unreachable = || format!("the doorbells of queue {qid} cannot be reached");
            let register = self.bar.doorbell(at);
            let register = register.ok_or_else(|| Error::Unsupported(unreachable()))?;
            Ok(Bell::new(register, self.shadow.as_ref(), qid, head))
        };
        let most = self.options.queue_entries.min(self.cap.max_queue_entries()).min(MAX_ENTRIES);
        let entries = 1 << most.max(2).ilog2();
        let memory = Arc::new(QueueMemory::new(&self.memory, entries)?);
        let link = Arc::new(Link::new());
        // Where the controller names no delay: 10 ms, so that four retries span 40 ms.
        let delay = |crdt: u16| if crdt == 0 { 10 * MS } else { u64::from(crdt) * 100 * MS };
        let [a, b, c] = info.retry_delays.map(delay);
        let shift = self.memory.page_shift();
        let pair = QueuePair::new(Parts {
            memory: memory.clone(),
            sq_doorbell: bell(sq_tail_doorbell(qid, dstrd), false)?,
            cq_doorbell: bell(cq_head_doorbell(qid, dstrd), true)?,
            link: link.clone(),
            device: self.memory.clone(),
            units: self.namespaces.iter().map(|n| Unit::new(n, info, shift)).collect(),
            changing: changing.clone(),
            timeout: self.options.command_timeout.max(MS),
            retry_delays: [10 * MS, a, b, c],
        })?;
        let (stage, error, abort) = (Stage::Wanted, None, None);
        self.queues.push(Entry { qid, link, memory, stage, error, abort });
        Ok(pair)
    }

    /// Takes a lost device up again, e.g. after it came back: from reset on, as when it was
    /// opened. Its queue pairs go on if it is the same device. Nothing if it is not lost.
    pub fn restart(&mut self) {
        if let Phase::Dead { .. } = self.phase {
            self.origin = Origin::Restart;
            self.resets = 0;
            for q in self.queues.iter_mut().filter(|q| q.stage != Stage::Ended) {
                q.stage = Stage::Wanted;
                q.link.give(Order::Wait);
            }
            self.phase = Phase::Boot(Boot::Begin);
        }
    }

    /// Begins an orderly shutdown: queues deleted, shutdown notified, controller disabled; goes on
    /// in [`Controller::step`] until [`State::Closed`]. Requests still in flight are answered
    /// `Gone` once the device has let go of them.
    pub fn begin_close(&mut self) {
        match self.phase {
            Phase::Ready => {
                for q in &mut self.queues {
                    if q.stage != Stage::Ended {
                        q.link.give(Order::Wait);
                        q.stage =
                            if q.stage == Stage::Running { Stage::Unwanted } else { Stage::Ended };
                    }
                }
                self.phase = Phase::Closing(Closing::Queues { until: None });
            }
            Phase::Boot(_) | Phase::Ladder(_) => self.abandon(Error::NotOpen),
            Phase::Closing(_) | Phase::Closed | Phase::Dead { .. } => {}
        }
    }

    /// Shuts the controller down and waits for the end of it. Queue pairs are dropped before, or
    /// go on being polled meanwhile.
    ///
    /// # Errors
    /// Why it did not end in order. Memory that the device may still use is kept then.
    pub fn close(mut self, clock: &mut impl Clock) -> Result<(), Error> {
        self.begin_close();
        loop {
            match self.step(clock.now()) {
                State::Closed => return Ok(()),
                State::Failed => return Err(self.error.clone().unwrap_or(Error::NotOpen)),
                _ => clock.pause(),
            }
        }
    }

    /// What to call it in the log.
    fn name(&self) -> &str {
        self.info.as_ref().map_or("(opening)", |i| i.serial.as_str())
    }

    /// What Identify said. Only called after it was asked.
    fn info_ref(&self) -> &ControllerInfo {
        self.info.as_ref().expect("identified before anything else is asked")
    }

    fn csts(&self) -> Csts {
        Csts(self.bar.read32(offset::CSTS))
    }

    /// CSTS, if the device is there and well.
    fn healthy_csts(&self) -> Result<Csts, Error> {
        match self.csts() {
            Csts::GONE => Err(Error::Gone),
            csts if csts.cfs() != 0 => Err(Error::Fatal),
            csts => Ok(csts),
        }
    }

    /// Has running queue pairs look at the namespaces again.
    fn publish(&self) {
        for q in self.queues.iter().filter(|q| q.stage == Stage::Running) {
            q.link.give(Order::Run);
        }
    }

    /// The end: tells every queue pair, and keeps the memory if the device was not stopped.
    fn die(&mut self, error: Error, safe: bool) {
        log::error!(
            "nvme {}: lost: {error}{}",
            self.name(),
            if safe { "" } else { "; it could not be stopped, its memory is kept for good" }
        );
        for q in &mut self.queues {
            q.abort = None;
            q.link.give(if safe { Order::Gone } else { Order::Unsafe });
        }
        if !safe {
            self.keep_memory();
        }
        self.error = Some(error);
        self.phase = Phase::Dead { safe };
    }

    fn keep_memory(&self) {
        keep_for_good(self.admin.memory().clone());
        if let Some(shadow) = &self.shadow {
            keep_for_good(shadow.mapping().clone());
        }
        for q in &self.queues {
            // The link too: commands' memory comes to it when the queue pair is dropped.
            keep_for_good(q.memory.clone());
            keep_for_good(q.link.clone());
        }
    }
}

impl<B: Bar> Drop for Controller<B> {
    fn drop(&mut self) {
        if matches!(self.phase, Phase::Closed | Phase::Dead { .. }) {
            return;
        }
        self.disable();
        // No clock here: a moment's worth of reads, else the memory stays.
        let stopped = (0..1000).any(|_| {
            let csts = self.csts();
            csts != Csts::GONE && csts.rdy() == 0
        });
        for q in &self.queues {
            q.link.give(if stopped { Order::Gone } else { Order::Unsafe });
        }
        if !stopped {
            log::error!("nvme {}: dropped, and did not stop; its memory is kept", self.name());
            self.keep_memory();
        }
    }
}

impl<B: Bar> std::fmt::Debug for Controller<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller")
            .field("state", &self.state())
            .field("info", &self.info)
            .field("namespaces", &self.namespaces)
            .field("error", &self.error)
            .finish_non_exhaustive()
    }
}
