//! A controller that is ready: its health, its events, overdue commands, queues that come and go,
//! and the orderly end (§7.6.2).

use nvme_spec::{
    AsyncEvent, AsyncEventType, Cc, CriticalWarning, Csts, LogId, NSID_ALL, ShutdownNotice,
    ShutdownStatus, SmartLog, Sqe, notice_event, offset,
};

use super::format::Formatting;
use super::{Controller, MS, Phase, Stage};
use crate::Error;
use crate::admin::{Job, Reply};
use crate::bar::Bar;
use crate::link::Order;

/// How often CSTS is looked at.
const HEALTH_PERIOD: u64 = 100 * MS;

/// How long an overdue command is given after its Abort was sent; never longer than it was given
/// before.
const ABORT_PATIENCE: u64 = 5_000 * MS;

/// Asynchronous Event Requests that are kept out.
const MAX_EVENTS: usize = 4;

/// Time that queue pairs are given to let go, and least time that a shutdown is given.
const SHUTDOWN_TIMEOUT: u64 = 10_000 * MS;

/// Most time that a shutdown is given, however long a device asks for: it may say more than an hour.
const LONGEST_SHUTDOWN: u64 = 60_000 * MS;

/// A command sequence on the admin queue; one at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Task {
    /// Creates the completion queue, then the submission queue, of this identifier.
    CreateCq(u16),
    CreateSq(u16),
    /// Deletes the submission queue, then the completion queue.
    DeleteSq(u16),
    DeleteCq(u16),
    /// Reads a log page, which also has the controller report the next event of its kind.
    Log(LogId),
    /// Looks at the namespaces again.
    Scan,
    /// Formats a namespace, or looks at how it can be.
    Format,
}

impl Task {
    /// The queue that it is about.
    fn queue(self) -> Option<u16> {
        match self {
            Task::CreateCq(q) | Task::CreateSq(q) | Task::DeleteSq(q) | Task::DeleteCq(q) => {
                Some(q)
            }
            Task::Log(_) | Task::Scan | Task::Format => None,
        }
    }
}

/// What a controller that serves has to do.
#[derive(Default)]
pub(super) struct Service {
    pub(super) task: Option<Task>,
    next_health: u64,
    /// Log pages to be read, in turn.
    logs: Vec<LogId>,
    pub(super) rescan: bool,
    /// A format that is wanted or under way.
    pub(super) format: Option<Formatting>,
    /// The health log as it was read last, or why it was not.
    pub(super) smart_read: Option<Result<SmartLog, Error>>,
    /// The controller takes no (more) event requests.
    no_events: bool,
    /// When an event may be logged next: a device must not flood the log.
    next_note: u64,
}

impl Service {
    /// Everything from the start; the health log is looked at first.
    pub(super) fn begin(&mut self, now: u64) {
        *self = Service { next_health: now, logs: vec![LogId::Smart], ..Service::default() };
    }

    /// Has the health log read.
    pub(super) fn want_smart(&mut self) {
        self.smart_read = None;
        self.want(LogId::Smart);
    }

    fn want(&mut self, log: LogId) {
        if !self.logs.contains(&log) {
            self.logs.push(log);
        }
    }
}

/// How far an orderly end has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Closing {
    /// Queues are being deleted, each once its queue pair has let go of it.
    Queues { until: Option<u64> },
    /// The shutdown was notified.
    Shutdown { until: u64 },
    /// EN is 0; RDY must follow.
    Disable { until: u64 },
}

impl<B: Bar> Controller<B> {
    /// One step of service.
    pub(super) fn serve(&mut self, now: u64) -> Result<(), Error> {
        if now >= self.service.next_health {
            self.healthy_csts()?;
            self.service.next_health = now.saturating_add(HEALTH_PERIOD);
        }
        self.answers(now)?;
        self.ask_for_events(now);
        self.overdue(now)?;
        for q in &mut self.queues {
            if q.link.is_dropped() && q.stage == Stage::Running {
                q.stage = Stage::Unwanted;
            }
        }
        self.queues.retain(|q| {
            // A queue that the device does not know needs no farewell.
            !(q.link.is_dropped() && matches!(q.stage, Stage::Wanted | Stage::Ended))
                || self.service.task.and_then(Task::queue) == Some(q.qid)
        });
        self.format_look(now);
        self.next_task(now);
        Ok(())
    }

    /// Takes answers on the admin queue.
    fn answers(&mut self, now: u64) -> Result<(), Error> {
        self.admin.late(now)?;
        // Bounded by what can be out at a time: each event is asked for again only later.
        while let Some(reply) = self.admin.reap() {
            match reply.job {
                Job::Event => self.event(now, &reply),
                // Whatever it says: what counts is whether the command is completed.
                Job::Abort => {}
                Job::Format => self.format_reply(now, &reply),
                Job::Step => self.task_reply(now, reply)?,
            }
        }
        Ok(())
    }

    /// Keeps event requests out.
    fn ask_for_events(&mut self, now: u64) {
        let most = usize::from(self.info_ref().event_requests).min(MAX_EVENTS);
        while !self.service.no_events && self.admin.count(Job::Event) < most {
            let what = "Asynchronous Event Request";
            if !self.admin.send(now, Job::Event, what, Sqe::async_event_request) {
                break;
            }
        }
    }

    /// The controller reports something.
    fn event(&mut self, now: u64, reply: &Reply) {
        let Ok(result) = reply.ok() else {
            // Not supported, or too many: do without rather than ask for ever.
            self.service.no_events = true;
            return;
        };
        let event = AsyncEvent(result);
        if now >= self.service.next_note {
            self.service.next_note = now.saturating_add(1_000 * MS);
            log::info!("nvme {}: asynchronous event {result:#x}", self.name());
        }
        let changed = u32::from(notice_event::NAMESPACE_ATTRIBUTE);
        match event.event_type() {
            Some(AsyncEventType::Error) => self.events.error += 1,
            Some(AsyncEventType::Smart) => self.events.smart += 1,
            Some(AsyncEventType::Notice) if event.info() == changed => {
                self.events.namespace += 1;
                self.service.rescan = true;
            }
            _ => self.events.other += 1,
        }
        // Reading the page named has the controller report this kind again.
        if let Some(log) = LogId::from_code(event.log_page() as u8) {
            self.service.want(log);
        }
    }

    /// Has overdue commands aborted, and loses patience where that does not help.
    fn overdue(&mut self, now: u64) -> Result<(), Error> {
        let patience = ABORT_PATIENCE.min(self.options.command_timeout.max(MS));
        for q in &mut self.queues {
            let word = q.link.late();
            if word == 0 || q.stage != Stage::Running {
                q.abort = None;
                continue;
            }
            if let Some((aborted, until)) = q.abort
                && aborted == word
            {
                if now >= until {
                    return Err(Error::Lost { qid: q.qid });
                }
                continue;
            }
            // One at a time is what every controller takes (ACL, §5.15.2.2).
            if self.admin.count(Job::Abort) == 0 {
                let (qid, cid) = (q.qid, word as u16);
                log::warn!("nvme: command {cid:#06x} of queue {qid} is overdue: aborting it");
                q.abort = Some((word, now.saturating_add(patience)));
                self.admin.send(now, Job::Abort, "Abort", |a| Sqe::abort(a, qid, cid));
            }
        }
        Ok(())
    }

    /// Begins the next task, if none is under way.
    fn next_task(&mut self, now: u64) {
        if self.service.task.is_some() {
            return;
        }
        let wanted = |q: &&mut super::Entry| {
            q.stage == Stage::Wanted && q.link.given() == Order::Wait && q.link.acknowledged()
        };
        if let Some(q) = self.queues.iter_mut().find(wanted) {
            if q.qid > self.granted {
                // After a reset the controller may grant fewer.
                q.error = Some(Error::NoQueue(self.granted));
                q.stage = Stage::Ended;
                q.link.give(Order::Gone);
                return;
            }
            q.memory.clear();
            if let Some(shadow) = &self.shadow {
                shadow.clear_queue(q.qid);
            }
            let (qid, entries, bus) = (q.qid, q.memory.entries, q.memory.cq_bus());
            self.service.task = Some(Task::CreateCq(qid));
            self.send_step(now, "Create I/O Completion Queue", |cid| {
                Sqe::create_io_cq(cid, qid, entries, bus, None)
            });
            return;
        }
        // A queue pair that waits, or is no more, sends nothing to its queue.
        let gone = |q: &&super::Entry| {
            q.stage == Stage::Unwanted && (q.link.is_dropped() || q.link.acknowledged())
        };
        if let Some(qid) = self.queues.iter().find(gone).map(|q| q.qid) {
            self.service.task = Some(Task::DeleteSq(qid));
            self.send_step(now, "Delete I/O Submission Queue", |cid| Sqe::delete_io_sq(cid, qid));
            return;
        }
        if self.format_begin(now) {
            return;
        }
        if !self.service.logs.is_empty() {
            let log = self.service.logs.remove(0);
            self.service.task = Some(Task::Log(log));
            self.admin.clear_data();
            let (data, bytes) = (self.admin.bus()[2], log_bytes(log));
            self.send_step(now, "Get Log Page", |cid| {
                Sqe::get_log_page(cid, NSID_ALL, log, 0, bytes, false).with_prps(data, 0)
            });
        } else if std::mem::take(&mut self.service.rescan) {
            self.service.task = Some(Task::Scan);
            self.scan_begin(now);
        }
    }

    /// The answer to the command of a task: takes it, and sends the next.
    fn task_reply(&mut self, now: u64, reply: Reply) -> Result<(), Error> {
        let Some(task) = self.service.task.take() else { return Ok(()) };
        match task {
            Task::CreateCq(qid) => {
                let Some(q) = self.queues.iter().find(|q| q.qid == qid) else { return Ok(()) };
                if let Err(e) = reply.ok() {
                    self.refused_queue(qid, e);
                    return Ok(());
                }
                let (entries, bus) = (q.memory.entries, q.memory.sq_bus());
                self.service.task = Some(Task::CreateSq(qid));
                self.send_step(now, "Create I/O Submission Queue", |cid| {
                    Sqe::create_io_sq(cid, qid, entries, bus, qid)
                });
            }
            Task::CreateSq(qid) => match reply.ok() {
                Err(e) => {
                    self.refused_queue(qid, e);
                    // The completion queue is there, and its memory is the device's until it
                    // is deleted.
                    self.service.task = Some(Task::DeleteCq(qid));
                    self.send_step(now, "Delete I/O Completion Queue", |cid| {
                        Sqe::delete_io_cq(cid, qid)
                    });
                }
                Ok(_) => {
                    if let Some(q) = self.queues.iter_mut().find(|q| q.qid == qid) {
                        q.stage = Stage::Running;
                        q.link.give(Order::Run);
                    }
                }
            },
            Task::DeleteSq(qid) => {
                // Were it not deleted, its memory would stay the device's: only a reset helps.
                reply.ok()?;
                self.service.task = Some(Task::DeleteCq(qid));
                self.send_step(now, "Delete I/O Completion Queue", |cid| {
                    Sqe::delete_io_cq(cid, qid)
                });
            }
            Task::DeleteCq(qid) => {
                reply.ok()?;
                if let Some(q) = self.queues.iter_mut().find(|q| q.qid == qid) {
                    q.stage = Stage::Ended;
                    q.link.give(Order::Gone);
                }
            }
            Task::Log(log) => self.read_log(log, &reply),
            Task::Format => self.format_identified(now, &reply),
            Task::Scan => {
                if self.scan_reply(now, reply)? {
                    self.format_scanned();
                } else {
                    self.service.task = Some(Task::Scan);
                }
            }
        }
        Ok(())
    }

    fn refused_queue(&mut self, qid: u16, error: Error) {
        log::error!("nvme {}: queue {qid}: {error}", self.name());
        if let Some(q) = self.queues.iter_mut().find(|q| q.qid == qid) {
            q.stage = Stage::Ended;
            q.error = Some(error);
            q.link.give(Order::Gone);
        }
    }

    fn read_log(&mut self, log: LogId, reply: &Reply) {
        if log != LogId::Smart {
            return;
        }
        let no_data = Error::Memory { what: "the health log", why: "no data".to_owned() };
        let read = reply.ok().and_then(|_| self.admin.data::<SmartLog>().ok_or(no_data));
        self.service.smart_read = Some(read.clone());
        let Ok(smart) = read else { return };
        let warning = CriticalWarning(smart.critical_warning);
        if warning.0 != 0 && self.smart.is_none_or(|s| s.critical_warning != warning.0) {
            log::error!("nvme {}: critical warning {:#04x}", self.name(), warning.0);
        }
        let read_only = warning.read_only() != 0;
        if read_only != self.media_read_only {
            self.media_read_only = read_only;
            // The namespaces' own state comes with it.
            self.service.rescan = true;
        }
        self.smart = Some(smart);
    }

    /// One step of an orderly end.
    pub(super) fn closing(&mut self, now: u64) -> Result<(), Error> {
        let Phase::Closing(stage) = self.phase else { return Ok(()) };
        match stage {
            Closing::Queues { until } => {
                self.healthy_csts()?;
                self.answers(now)?;
                self.service.logs.clear();
                self.service.rescan = false;
                // A queue whose creation was under way is there now.
                for q in self.queues.iter_mut().filter(|q| q.stage == Stage::Running) {
                    q.stage = Stage::Unwanted;
                    q.link.give(Order::Wait);
                }
                self.next_task(now);
                let until = until.unwrap_or(now.saturating_add(SHUTDOWN_TIMEOUT));
                let busy = self.queues.iter().find(|q| q.stage == Stage::Unwanted);
                if let Some(q) = busy {
                    if now >= until && self.service.task.is_none() {
                        return Err(Error::InUse { qid: q.qid });
                    }
                    self.phase = Phase::Closing(Closing::Queues { until: Some(until) });
                } else if self.service.task.is_none() {
                    let cc = Cc(self.bar.read32(offset::CC));
                    let cc = cc.with_shn(ShutdownNotice::Normal.code());
                    self.bar.write32(offset::CC, cc.0);
                    let patience = shutdown_patience(self.info_ref().shutdown_us);
                    let until = now.saturating_add(patience);
                    self.phase = Phase::Closing(Closing::Shutdown { until });
                }
            }
            Closing::Shutdown { until } => {
                let csts = self.healthy_csts()?;
                let done = csts.shst() == ShutdownStatus::Complete.code();
                if !done && now >= until {
                    log::warn!("nvme {}: the shutdown did not complete", self.name());
                }
                if done || now >= until {
                    self.disable();
                    let until = now.saturating_add(self.ready_timeout());
                    self.phase = Phase::Closing(Closing::Disable { until });
                }
            }
            Closing::Disable { until } => match self.csts() {
                Csts::GONE => return Err(Error::Gone),
                csts if csts.rdy() == 0 => {
                    for q in &self.queues {
                        q.link.give(Order::Gone);
                    }
                    self.phase = Phase::Closed;
                }
                _ if now >= until => {
                    let ms = self.ready_timeout() / MS;
                    return Err(Error::NotReady { what: "disabled", ms });
                }
                _ => {}
            },
        }
        Ok(())
    }
}

/// How long a shutdown may take, if the device asks for so many microseconds (RTD3E).
fn shutdown_patience(microseconds: u32) -> u64 {
    (u64::from(microseconds) * 1000).clamp(SHUTDOWN_TIMEOUT, LONGEST_SHUTDOWN)
}

/// How much of a log page is read.
fn log_bytes(log: LogId) -> u32 {
    match log {
        LogId::Error => 64,
        LogId::Smart | LogId::FirmwareSlot => 512,
        LogId::ChangedNamespaces | LogId::CommandEffects => 4096,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_device_is_waited_for_longer_than_a_minute() {
        let seconds = |rtd3e| shutdown_patience(rtd3e) / (1000 * MS);
        assert_eq!([0, 20_000_000, u32::MAX].map(seconds), [10, 20, 60]);
    }
}
