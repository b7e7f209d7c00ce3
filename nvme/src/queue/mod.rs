//! [`QueuePair`]: one I/O submission and completion queue, owned by one reactor.
//!
//! All of it runs on the reactor that owns it, without a lock or a system call; what it shares with
//! the controller's control thread is the few words of a [`Link`].
//!
//! - `submit`: requests become commands; - `reap`: completions become answers;
//! - `long`: requests that need several commands or a bounce buffer;
//! - `recover`: orders of the controller, deadlines, retries.

mod long;
mod memory;
mod reap;
mod recover;
mod submit;
mod tracker;

use std::collections::VecDeque;
use std::sync::Arc;

use block::{
    BlockQueue, Completion, Completions, DeviceInfo, Full, HasWork, LeafAccess, QUARANTINED,
    Request, Status, Submit,
};
use dma::Region;

use crate::bar::Bar;
use crate::link::Link;
use crate::memory::{AddressTable, DeviceMemory};
use crate::ring::{CompletionRing, SubmissionRing};
use crate::shadow::Bell;
use crate::units::{Changing, Unit};
use crate::{Error, Stats};
use long::{Bounces, Longs, MAX_LONGS};
pub(crate) use memory::QueueMemory;
pub(crate) use tracker::Command;
use tracker::Trackers;

/// Most entries of a queue.
pub(crate) const MAX_ENTRIES: u32 = tracker::MAX_TRACKERS as u32 + 1;

/// Whether the rings may be touched, and what becomes of requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    /// The controller is (re)starting; requests wait.
    Waiting,
    Running,
    /// The device is no more; requests are answered `Gone`, with this detail.
    Gone(u16),
}

/// What a queue pair is made from; put together by the controller.
pub(crate) struct Parts<B: Bar> {
    pub(crate) memory: Arc<QueueMemory>,
    pub(crate) sq_doorbell: Bell<B::Doorbell>,
    pub(crate) cq_doorbell: Bell<B::Doorbell>,
    pub(crate) link: Arc<Link>,
    pub(crate) device: Arc<DeviceMemory>,
    pub(crate) units: Box<[Unit]>,
    pub(crate) changing: Arc<[Changing]>,
    pub(crate) timeout: u64,
    pub(crate) retry_delays: [u64; 4],
}

/// An I/O queue pair over all usable namespaces of a controller: unit `n` is the `n`th of
/// [`crate::Controller::namespaces`]. Belongs to one reactor.
///
/// Deadlines run only if [`BlockQueue::set_now`] is called once per turn, and resets, aborts and
/// the answers to requests of a lost device happen only as long as somebody steps the
/// [`crate::Controller`].
#[repr(C)]
pub struct QueuePair<B: Bar> {
    // Touched in every poll.
    cq: CompletionRing<B::Doorbell>,
    sq: SubmissionRing<B::Doorbell>,
    link: Arc<Link>,
    /// The order under which the queue runs; no order at all while it does not.
    running: u64,
    /// Entries that the device does not know of, answers in `done`, or long requests with more to
    /// send.
    work: bool,
    polls: u64,
    now: u64,
    /// When to look at deadlines and retries next.
    next_timer: u64,
    // Touched for every request.
    trackers: Trackers,
    units: Box<[Unit]>,
    table: AddressTable,
    /// The region of the rings and lists, once more: one load less than through `memory`.
    lists: Arc<Region>,
    /// Bus address of each tracker's PRP list.
    list_bus: Box<[u64]>,
    memory: Arc<QueueMemory>,
    /// The controller's memory page in bytes less one, and as a power of two.
    page_mask: u64,
    page_shift: u32,
    /// Commands in flight that are parts of long requests.
    parts: u32,
    stats: Stats,
    // Seldom touched.
    mode: Mode,
    busy_polls: u64,
    /// Requests that may be in flight.
    capacity: u32,
    /// Answers that wait for the next poll. Never more than `capacity`.
    done: VecDeque<Completion>,
    longs: Longs,
    bounces: Bounces,
    /// Commands to be sent again: when, and which slot.
    retries: Vec<(u64, u16)>,
    /// The last order that was obeyed.
    seen: u32,
    timeout: u64,
    /// How long to wait before a retry, by the status' CRD field.
    retry_delays: [u64; 4],
    /// The overdue command that the controller was told of.
    late: Option<u16>,
    late_number: u64,
    changing: Arc<[Changing]>,
}

/// No order word: they have 32 bits.
const NOT_RUNNING: u64 = u64::MAX;

impl<B: Bar> QueuePair<B> {
    pub(crate) fn new(parts: Parts<B>) -> Result<QueuePair<B>, Error> {
        let Parts { memory, link, device, .. } = parts;
        let page_shift = device.page_shift();
        let failed = |why: String| Error::Memory { what: "bounce buffers", why };
        let bounces = Bounces::new().map_err(|e| failed(e.to_string()))?;
        let mut table = AddressTable::new(device);
        table.register(bounces.region()).map_err(failed)?;
        let region = memory.mapping.region().clone();
        // One entry of a ring stays empty, so that full and empty differ (§4.1.2).
        let commands = memory.entries as usize - 1;
        let capacity = commands + MAX_LONGS;
        let entries = memory.entries;
        Ok(QueuePair {
            cq: CompletionRing::new(region.clone(), memory.cq(), entries, parts.cq_doorbell),
            sq: SubmissionRing::new(region.clone(), 0, entries, parts.sq_doorbell),
            seen: link.order(),
            link,
            running: NOT_RUNNING,
            work: false,
            polls: 0,
            now: 0,
            next_timer: 0,
            trackers: Trackers::new(commands),
            units: parts.units,
            table,
            lists: region,
            list_bus: (0..commands)
                .map(|slot| memory.mapping.bus(memory.list(slot) as u64))
                .collect(),
            memory,
            page_mask: (1 << page_shift) - 1,
            page_shift,
            parts: 0,
            stats: Stats::default(),
            mode: Mode::Waiting,
            busy_polls: 0,
            capacity: capacity as u32,
            done: VecDeque::with_capacity(capacity),
            longs: Longs::new(),
            bounces,
            retries: Vec::with_capacity(commands),
            timeout: parts.timeout,
            retry_delays: parts.retry_delays,
            late: None,
            late_number: 0,
            changing: parts.changing,
        })
    }

    /// Looks for an order, as every poll does.
    pub(crate) fn look(&mut self) {
        self.obey(self.link.order());
    }

    /// What the queue has counted since it was made.
    pub fn stats(&self) -> Stats {
        let empty_polls = self.polls - self.busy_polls;
        let submitted = self.stats.submitted + u64::from(self.sq.pending());
        Stats { polls: self.polls, empty_polls, submitted, ..self.stats }
    }

    /// Most commands that can be with the device at a time.
    pub fn depth(&self) -> usize {
        self.list_bus.len()
    }

    /// Whether the device has the queue: not while the controller is being reset, nor after the
    /// device was lost.
    pub fn is_running(&self) -> bool {
        self.mode == Mode::Running
    }

    /// Answers a request in the next poll.
    fn answer(&mut self, tag: block::Tag, status: Status, detail: u16) {
        if !status.is_ok() {
            self.stats.errors[status as usize] += 1;
        }
        self.done.push_back(Completion { tag, status, detail });
        self.work = true;
    }

    /// Hands out answers that wait, as far as there is room.
    fn drain(&mut self, out: &mut Completions) {
        let n = self.done.len().min(out.room());
        for c in self.done.drain(..n) {
            out.push(c);
        }
    }
}

impl<B: Bar> Submit for QueuePair<B> {
    #[inline]
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        self.units.get(usize::from(unit)).map(|u| &u.info)
    }

    /// A request needs one tracker, or one record of a long request, whatever it is: the commands
    /// of a long request wait for trackers by themselves.
    #[inline]
    fn room(&self) -> usize {
        let room = (self.capacity as usize).saturating_sub(self.in_flight());
        match self.mode {
            Mode::Running => room.min(self.trackers.free_len()).min(self.longs.free_len()),
            Mode::Waiting => 0,
            Mode::Gone(_) => room,
        }
    }

    #[inline(always)]
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        self.take(request)
    }
}

impl<B: Bar> BlockQueue for QueuePair<B> {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        let oldest = self.oldest();
        self.table.prune(self.now, oldest);
        self.table.register(region)
    }

    #[inline]
    fn poll(&mut self, out: &mut Completions) -> usize {
        self.polls += 1;
        // Nothing to do, as most often: no new order, nothing submitted, no completion.
        let order = self.link.order();
        if u64::from(order) == self.running && !self.work && self.cq.peek().is_none() {
            return 0;
        }
        self.poll_busy(order, out)
    }

    /// Not while the rings are the controller's: the mode changes in polls only.
    #[inline]
    fn start(&mut self) {
        if self.sq.dirty() && self.mode == Mode::Running {
            self.stats.submitted += u64::from(self.sq.pending());
            self.stats.sq_doorbells += u64::from(self.sq.ring());
            self.work = !self.done.is_empty() || !self.longs.waiting.is_empty();
        }
    }

    /// Whole requests among the commands, long ones, and answers that wait.
    #[inline]
    fn in_flight(&self) -> usize {
        self.trackers.busy() - self.parts as usize + self.longs.len() + self.done.len()
    }

    fn arm(&mut self) -> HasWork {
        // What is submitted, and so what is not rung for, is in flight too.
        if self.in_flight() > 0 || self.link.order() != self.seen {
            HasWork::Yes
        } else {
            HasWork::No
        }
    }

    #[inline]
    fn set_now(&mut self, now: u64) {
        // Back in time: another owner, with another clock.
        let due = now >= self.next_timer || now < self.now;
        self.now = now;
        if due {
            self.timers();
        }
    }
}

impl<B: Bar> LeafAccess for QueuePair<B> {
    fn unit_len(&self, unit: u16) -> u64 {
        self.info(unit).map_or(0, |i| i.size)
    }

    fn set_unit_len(&mut self, _: u16, _: u64) -> Result<(), Status> {
        Ok(())
    }
}

impl<B: Bar> Drop for QueuePair<B> {
    fn drop(&mut self) {
        // What commands may still be using goes to the controller, which lets it go when the
        // device has certainly let go, or never.
        let safe = self.trackers.busy() == 0 && self.mode != Mode::Gone(QUARANTINED);
        let orphans = if safe { Vec::new() } else { self.table.take_mappings() };
        self.link.leave(orphans);
    }
}

impl<B: Bar> std::fmt::Debug for QueuePair<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueuePair")
            .field("mode", &self.mode)
            .field("depth", &self.depth())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bar::Doorbell;
    use std::mem::offset_of;

    /// A bar of the size of a mapped one: a pointer.
    struct Mapped;
    struct Bell(#[expect(dead_code, reason = "for its size")] usize);

    impl Doorbell for Bell {
        fn ring(&self, _: u32) {}
    }

    impl Bar for Mapped {
        type Doorbell = Bell;
        fn read32(&self, _: u64) -> u32 {
            0
        }
        fn read64(&self, _: u64) -> u64 {
            0
        }
        fn write32(&self, _: u64, _: u32) {}
        fn write64(&self, _: u64, _: u64) {}
        fn doorbell(&self, _: u64) -> Option<Bell> {
            None
        }
    }

    type Pair = QueuePair<Mapped>;

    // What every poll touches lies on the first two cache lines and a bit, what every request
    // touches on the next ones, and the rest behind.
    const _: () = assert!(offset_of!(Pair, cq) == 0);
    const _: () = assert!(offset_of!(Pair, work) < 128);
    const _: () = assert!(offset_of!(Pair, next_timer) + 8 <= 192);
    const _: () = assert!(offset_of!(Pair, parts) + 4 <= 320);
    const _: () = assert!(offset_of!(Pair, mode) > offset_of!(Pair, stats));

    #[test]
    fn a_queue_pair_can_move_to_its_reactor() {
        fn is_send<T: Send>() {}
        is_send::<Pair>();
        is_send::<crate::Controller<Mapped>>();
    }
}
