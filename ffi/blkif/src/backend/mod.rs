//! [`Backend`]: serves one ring from a disk. Owned by one reactor, which calls it through
//! [`block::Frontend`].
//!
//! `plain` is the straight path of a read or write of one segment, from ring slot to disk and
//! back. Everything else has a slot of the same kind and goes through a list of things to do:
//! `request` takes and checks it, `data` moves its bytes, `steps` brings it to its end. How long
//! requests take is found out by `watch`.

mod data;
mod plain;
mod request;
mod slot;
mod steps;
mod watch;

use std::hint::cold_path;
use std::sync::Arc;

use block::{Completion, Flags, Frontend as _, HasWork, Op, Request, Submit, Tag};
use dma::Region;

use crate::abi::{
    Abi, DIRECT_SEGMENTS, Head, INDIRECT_PAGES, MAX_ORDER, PAGE, READ, Response, SECTOR,
    SEGMENTS_PER_PAGE, Segment, WRITE,
};
use crate::pages::{AGE_SHIFT, PageTable};
use crate::{BackRing, EventChannel, Grants, RingMemory, Runaway, Stats};
use data::Batch;
use slot::{NO_BUFFER, Slot, Stage};
use watch::Watched;

/// What a ring is served with: what was agreed with the frontend, and what it was offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The owner number that the reactor gave.
    pub owner: u16,
    /// Layout of the slots.
    pub abi: Abi,
    /// Pages of the ring, as a power of two: 0 to 4.
    pub order: u8,
    /// How many pages may stay mapped (persistent grants); 0 if that was not agreed.
    pub persistent_pages: u32,
    /// Most segments of an indirect request, as offered; 0 if there are none.
    pub max_indirect_segments: u16,
    /// Requests of more than one segment that can be under way at a time. While all are, the ring
    /// is not read further.
    pub large_buffers: u16,
    /// What `sector-size` says: 512 or 4096.
    pub sector_size: u32,
    /// Refuse all that would change the disk.
    pub read_only: bool,
    /// `feature-flush-cache` was offered.
    pub flush: bool,
    /// `feature-barrier` was offered.
    pub barrier: bool,
    /// `feature-discard` was offered.
    pub discard: bool,
    /// How long a write may wait for space, in nanoseconds, before it fails; `None` for ever.
    pub no_space_timeout: Option<u64>,
}

impl Config {
    /// The defaults for a ring: everything but barriers, 32 indirect segments, no persistent
    /// grants. A flush is offered, and without a barrier no guest ever needs the ring drained.
    pub fn new(owner: u16, abi: Abi, order: u8) -> Config {
        Config {
            owner,
            abi,
            order,
            persistent_pages: 0,
            max_indirect_segments: 32,
            large_buffers: 32,
            sector_size: SECTOR,
            read_only: false,
            flush: true,
            barrier: false,
            discard: true,
            no_space_timeout: None,
        }
    }

    /// The most grant copies of one batch: one for each slot, and with large buffers one for each
    /// segment and page of a list.
    pub fn most_copies(&self) -> usize {
        let slots = self.abi.slots(self.order.min(MAX_ORDER)) as usize;
        slots + usize::from(self.large_buffers) * (self.large_size() / PAGE + INDIRECT_PAGES)
    }

    /// Enough persistent pages for a frontend that fills the ring with the largest requests and
    /// keeps a page for every segment, up to a limit that a full table of grants can bear.
    pub fn usual_persistent_pages(&self) -> u32 {
        let each = u32::from(self.max_indirect_segments).max(DIRECT_SEGMENTS as u32) + 1;
        (self.abi.slots(self.order.min(MAX_ORDER)) * each).min(4224)
    }

    /// Bytes of a buffer for requests of more than one segment.
    fn large_size(&self) -> usize {
        usize::from(self.max_indirect_segments).max(DIRECT_SEGMENTS) * PAGE
    }
}

/// Why a ring cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The configuration contradicts itself or a limit; says which part.
    #[error("ring configuration: {0}")]
    Config(&'static str),
    /// There is no memory for the buffers.
    #[error("buffers of the ring: {0}")]
    Memory(#[from] dma::Error),
    /// The ring is broken from the start.
    #[error("ring: {0}")]
    Ring(#[from] Runaway),
}

// Why the ring is not read now; any number of these.
/// The guest broke the protocol.
const GATE_BROKEN: u8 = 1;
/// The owner asked for an end.
const GATE_STOPPING: u8 = 2;
/// A barrier waits for what was before it.
const GATE_BARRIER: u8 = 4;
/// Writes wait for space.
const GATE_NO_SPACE: u8 = 8;

/// Serves one ring. `M` is the ring's memory, `G` and `E` the way to the guest's pages and ears.
#[derive(Debug)]
pub struct Backend<M: RingMemory, G: Grants, E: EventChannel> {
    ring: BackRing<M>,
    grants: G,
    events: E,
    pages: PageTable,
    bounce: Arc<Region>,
    slots: Box<[Slot<M::Entry>]>,
    /// First of the free slots, which form a list.
    free: u16,
    /// The disk was told to expect the requests before this index of the ring.
    expected: u32,
    /// Slots whose requests a backend before this one took and did not answer: the next one last.
    left: Vec<u16>,
    /// The one of them that is taken up now, and the rest of its request.
    replaying: Option<u16>,
    tail: [u64; 10],
    stats: Arc<Stats>,
    watched: Watched,
    /// Time of this turn in units of 2^27 ns.
    stamp: u32,
    gates: u8,
    /// There may be something to do besides what waits in the ring.
    work: bool,
    /// Whole pages of reads and writes in this turn that are not in `stats` yet.
    pages_read: u64,
    pages_written: u64,
    armed: bool,
    failed: bool,
    /// Data is durable before it is answered: for a guest that was offered no way to flush.
    write_flags: Flags,
    /// Sectors below `sector-size`, as a mask.
    align: u64,
    now: u64,
    /// When to look for pages that are not used any more: when `stamp` changes.
    next_sweep: u64,
    /// Slots with something to do, oldest first.
    todo: Vec<u16>,
    batch: Batch,
    large: Vec<u16>,
    /// Segments of the request in each large buffer.
    lists: Box<[Segment]>,
    /// Pages of segments of the request in each large buffer.
    list_pages: Box<[[u32; INDIRECT_PAGES]]>,
    held_no_space: u32,
    held_flushes: u32,
    config: Config,
}

/// A read or write over one range of the bounce region.
#[derive(Clone, Copy)]
struct Ask {
    tag: Tag,
    op: Op,
    flags: Flags,
    offset: u64,
    at: usize,
    len: u32,
}

impl Ask {
    /// Sends it to the disk. Returns false if that has no room.
    #[inline(always)]
    fn send<D: Submit>(self, disk: &mut D, bounce: &Region) -> bool {
        let seg = bounce.seg(self.at as u64, self.len).expect("buffers lie in the bounce region");
        let request = Request {
            tag: self.tag,
            op: self.op,
            flags: self.flags,
            unit: 0,
            offset: self.offset,
            len: u64::from(self.len),
            segs: std::slice::from_ref(&seg),
        };
        disk.submit(&request).is_ok()
    }
}

/// What the disk allows in this turn.
#[derive(Clone, Copy, Debug)]
struct Limits {
    sectors: u64,
    /// Where a page may not begin any more, in sectors: one to be read, and one to be written.
    pages_end: u64,
    writes_end: u64,
    align: u64,
    read_only: bool,
}

impl Limits {
    /// Whether a whole page may be accessed at `sector`.
    #[inline(always)]
    fn page(&self, write: bool, sector: u64) -> bool {
        // One after the other: each is a branch that is never taken.
        if sector >= if write { self.writes_end } else { self.pages_end } {
            cold_path();
            return false;
        }
        if sector & self.align != 0 {
            cold_path();
            return false;
        }
        true
    }

    /// Sectors that a segment asks for, at `sector`; `None` if it may not.
    fn part(&self, write: bool, sector: u64, segment: Segment) -> Option<u32> {
        let count = segment.sectors()?;
        self.allow(write, sector, u64::from(count)).then_some(count)
    }

    /// Whether `count` sectors at `sector` exist, are whole blocks and may be accessed so.
    #[inline(always)]
    fn allow(&self, write: bool, sector: u64, count: u64) -> bool {
        if count > self.sectors || sector > self.sectors - count {
            return false;
        }
        if (sector | count) & self.align != 0 {
            return false;
        }
        !(write && self.read_only)
    }
}

impl<M: RingMemory, G: Grants, E: EventChannel> Backend<M, G, E> {
    /// Connects to a ring. All memory that it will ever use is taken here.
    ///
    /// # Errors
    /// If the configuration is not possible, there is no memory, or the ring is broken already.
    pub fn new(config: Config, memory: M, grants: G, events: E) -> Result<Self, ConnectError> {
        let bad = |what| Err(ConnectError::Config(what));
        if config.order > MAX_ORDER || memory.bytes() != PAGE << config.order {
            return bad("ring order");
        }
        if usize::from(config.max_indirect_segments) > INDIRECT_PAGES * SEGMENTS_PER_PAGE {
            return bad("more indirect segments than the protocol has");
        }
        if !matches!(config.sector_size, 512 | 4096) {
            return bad("sector size");
        }
        let kept = memory.kept().map_err(ConnectError::Config)?;
        let ring = BackRing::attach_at(memory, config.abi, config.order, kept.as_ref())?;
        let (slots, large) = (ring.slots() as usize, usize::from(config.large_buffers));
        if !(1..=slots).contains(&large) {
            return bad("large buffers: at least 1, at most one per slot");
        }
        let large_segments = config.large_size() / PAGE;
        let most_copies = config.most_copies();
        let bytes = slots * PAGE + large * config.large_size();
        if u32::try_from(bytes).is_err() {
            return bad("buffers of 4 GiB and more");
        }
        let durable = !config.flush && !config.barrier;
        let goes_on = kept.is_some();
        let left = kept.map_or_else(Vec::new, |kept| kept.slots);
        let bounce = Region::new_best(bytes)?;
        let page = |index: usize| bounce.seg((index * PAGE) as u64, PAGE as u32);
        let slot = |index: usize| {
            let page = page(index).expect("a page for each slot");
            Slot::first(config.owner, index as u16, page, ring.entry(index as u16))
        };
        let mut backend = Backend {
            expected: ring.taken(),
            slots: (0..slots).map(slot).collect(),
            ring,
            grants,
            events,
            pages: PageTable::new(config.persistent_pages),
            bounce,
            free: 0,
            work: !left.is_empty(),
            left: left.into_iter().rev().collect(),
            replaying: None,
            tail: [0; 10],
            stats: Arc::default(),
            watched: Watched::NOTHING,
            stamp: 0,
            gates: 0,
            pages_read: 0,
            pages_written: 0,
            armed: false,
            failed: false,
            write_flags: if durable { Flags::FUA } else { Flags::NONE },
            align: u64::from(config.sector_size / SECTOR) - 1,
            now: 0,
            next_sweep: 1 << AGE_SHIFT,
            // A slot may be entered again in the moment before its old entry is dropped.
            todo: Vec::with_capacity(2 * slots),
            batch: Batch::new(slots, most_copies),
            large: (0..config.large_buffers).rev().collect(),
            lists: vec![Segment::default(); large * large_segments].into_boxed_slice(),
            list_pages: vec![[0; INDIRECT_PAGES]; large].into_boxed_slice(),
            held_no_space: 0,
            held_flushes: 0,
            config,
        };
        backend.grants.attach(&backend.bounce);
        if goes_on {
            // It may wait for what was answered and never told.
            backend.events.notify();
        }
        Ok(backend)
    }

    /// Counters, readable from any thread, also after the backend is gone.
    pub fn stats(&self) -> Arc<Stats> {
        self.stats.clone()
    }

    /// Takes no more requests; those taken come to their end in later polls, and then
    /// [`block::Frontend::closed`] says so. A write that waits for space fails.
    pub fn stop(&mut self) {
        self.gates |= GATE_STOPPING;
    }

    /// Whether the ring was given up because the guest broke the protocol.
    pub fn broken(&self) -> bool {
        self.gates & GATE_BROKEN != 0
    }

    /// Whether nothing that was taken waits for anything, but for flushes that are held for ever.
    pub fn drained(&self) -> bool {
        self.in_flight() == 0
            && self.left.is_empty()
            && self.todo.is_empty()
            && self.batch.is_empty()
            && self.pages.pending() == 0
            && self.ring.unpublished() == 0
    }

    #[inline]
    fn limits<D: Submit>(&self, disk: &D) -> Limits {
        let none = Limits { sectors: 0, pages_end: 0, writes_end: 0, align: 0, read_only: true };
        // A disk that has failed is one without sectors: everything is out of range.
        if self.failed {
            return none;
        }
        disk.info(0).map_or(none, |info| {
            let sectors = info.size / u64::from(SECTOR);
            let pages_end = (sectors + 1).saturating_sub(PAGE as u64 / u64::from(SECTOR));
            let read_only = info.read_only || self.config.read_only;
            let writes_end = if read_only { 0 } else { pages_end };
            Limits { sectors, pages_end, writes_end, align: self.align, read_only }
        })
    }

    #[inline(never)]
    fn turn<D: Submit>(&mut self, disk: &mut D) -> bool {
        if self.now >= self.next_sweep {
            self.sweep();
        }
        let more = self.has_more();
        let mut busy = (more || self.armed) && self.go_on(disk);
        if self.ring.unpublished() > 0 {
            // Before anything is taken: see [`BackRing::take`].
            self.publish();
            busy = true;
        }
        // It was taken, if by another: it comes to its end, whether or not more is taken.
        let left = more && !self.left.is_empty();
        if left && self.gates & !(GATE_STOPPING | GATE_BROKEN) == 0 {
            self.replay(disk);
            busy = true;
        }
        if self.gates == 0 && (!left || self.left.is_empty()) {
            match self.ring.waiting() {
                Ok(0) => {}
                Ok(waiting) => {
                    self.take(disk, waiting);
                    busy = true;
                }
                Err(why) => self.give_up(why),
            }
        }
        self.work = self.has_more();
        if self.work && !self.batch.is_empty() {
            self.start_batch();
            busy = true;
        }
        if self.ring.unpublished() > 0 {
            self.publish();
            busy = true;
        }
        self.stats.in_flight.set(u64::from(self.ring.unanswered()));
        busy
    }

    /// Whether there is anything to do but for what waits in the ring or is at the disk. Asked twice in each
    /// turn, and nearly never so: one question for all.
    #[inline(always)]
    fn has_more(&self) -> bool {
        let pages = self.pages.pending() as usize;
        self.todo.len() | self.batch.len() | self.left.len() | pages != 0
    }

    /// Does what there is, but for what another backend has left. Returns whether anything was.
    #[inline(never)]
    fn go_on<D: Submit>(&mut self, disk: &mut D) -> bool {
        let copies = !self.batch.is_empty();
        if copies {
            // First, as it may bring more to do.
            self.end_batch(disk);
        }
        let todo = self.armed || !self.todo.is_empty() || self.pages.pending() > 0;
        (todo && self.do_todo(disk)) || copies
    }

    /// A slot for a request that was just taken: there are as many as the ring has.
    #[inline]
    fn free_slot(&mut self) -> u16 {
        let index = self.free;
        self.free = self.slots[usize::from(index)].next;
        index
    }

    /// Sends a request's read or write to the disk.
    fn put_data<D: Submit>(&mut self, disk: &mut D, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let (offset, len) = (slot.offset, slot.len);
        let (op, flags) = match slot.operation {
            READ => (Op::Read, Flags::NONE),
            operation => (Op::Write, steps::payload_flags(operation, self.write_flags)),
        };
        slot.stage = Stage::AtData;
        let tag = slot.tag();
        let at = self.buffer_at(index);
        if !(Ask { tag, op, flags, offset, at, len }).send(disk, &self.bounce) {
            return self.again(index, Stage::PutData);
        }
        if op == Op::Write {
            self.stats.written_bytes.add(u64::from(len));
        }
    }

    /// Where a request's buffer lies in the bounce region: a page for each slot, then the large
    /// ones.
    fn buffer_at(&self, index: u16) -> usize {
        match self.slots[usize::from(index)].large {
            NO_BUFFER => usize::from(index) * PAGE,
            large => self.slots.len() * PAGE + usize::from(large) * self.config.large_size(),
        }
    }

    /// Answers a request without a large buffer and frees its slot.
    fn respond(&mut self, index: u16, status: i16) {
        let slot = &mut self.slots[usize::from(index)];
        let answer = Response { id: slot.id, operation: slot.operation, status };
        self.ring.respond(&slot.entry, answer);
        slot.stage = Stage::Free;
        slot.next = self.free;
        self.free = index;
    }

    #[inline]
    fn publish(&mut self) {
        // Before slots are used again.
        self.see_ends();
        self.stats.publishes.add(1);
        if self.ring.publish() {
            self.stats.events.add(1);
            self.events.notify();
        }
    }

    #[cold]
    fn give_up(&mut self, why: Runaway) {
        // Whoever owns the device says it, and as rarely as it wants: a guest can connect again and
        // again.
        log::debug!("a guest broke its ring, which is given up: {why}");
        self.gates |= GATE_BROKEN;
        self.stats.ring_stops.add(1);
    }

    #[cold]
    fn sweep(&mut self) {
        self.next_sweep = (u64::from(self.stamp) + 1) << AGE_SHIFT;
        let (grants, stats) = (&mut self.grants, &self.stats);
        self.pages.sweep(self.stamp, |page| {
            grants.unmap(page);
            stats.pages_evicted.add(1);
        });
        self.ring.forget_published();
    }
}

impl<M: RingMemory, G: Grants, E: EventChannel> block::Frontend for Backend<M, G, E> {
    fn regions(&self) -> Vec<Arc<Region>> {
        vec![self.bounce.clone()]
    }

    fn complete(&mut self, done: Completion) -> bool {
        self.end_run(&[done]).1 > 0
    }

    #[inline(never)]
    fn complete_run(&mut self, done: &[Completion]) -> (usize, usize) {
        self.end_run(done)
    }

    #[inline]
    fn is_quiet(&self, now: u64) -> bool {
        !self.work && now < self.next_sweep && (self.gates != 0 || self.ring.is_empty())
    }

    #[inline]
    fn poll<D: Submit>(&mut self, disk: &mut D, now: u64) -> bool {
        self.count_in_flight(now);
        self.now = now;
        self.stamp = (now >> AGE_SHIFT) as u32;
        self.turn(disk)
    }

    fn arm(&mut self) -> HasWork {
        // What waits for a clock or for a mapping has nobody to wake the reactor for it.
        let mine = !self.todo.is_empty() || !self.batch.is_empty() || self.pages.pending() > 0;
        if mine || self.ring.unpublished() > 0 {
            return HasWork::Yes;
        }
        if self.gates != 0 {
            return HasWork::No;
        }
        (self.armed, self.work) = (true, true);
        match self.ring.arm() {
            Ok(work) => work,
            Err(why) => {
                self.give_up(why);
                HasWork::No
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.iter().filter(|s| s.at_disk()).count()
    }

    fn closed(&self) -> bool {
        self.gates & GATE_STOPPING != 0 && self.drained()
    }
}

impl<M: RingMemory, G: Grants, E: EventChannel> Drop for Backend<M, G, E> {
    fn drop(&mut self) {
        let grants = &mut self.grants;
        self.pages.clear(|page| grants.unmap(page));
        self.grants.settle();
        self.stats.detached.store(true, std::sync::atomic::Ordering::Release);
    }
}
