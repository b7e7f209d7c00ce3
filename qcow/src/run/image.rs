//! [`Image`]: a QCOW2 image on a reactor; its slots, and the path that a hit takes.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use block::{
    BlockQueue, Completion, Completions, DeviceInfo, Full, HasWork, Layer, MAX_GUEST_SEGS, Op,
    Port, Request, SegList, Status, Tag,
};
use dma::Region;
use reactor::Wake;
use reactor::task::Tasks;

use super::alloc::Allocator;
use super::hits::{Hits, info_at, look_at_leaves};
use super::link::{Errand, Link, Phase, Reply};
use super::marks::Marks;
use super::meta::{Tables, page_bits};
use super::pause::Stage;
use super::satellite::{Away, Reseat, Seat, Wakes};
use super::serve::serve;
use super::shared::{Job, Shared, What};
use super::stack::Stack;
use super::stream::STREAM_SLOTS;
use super::workers::{Unpacker, Workers};
use crate::map::Map;

/// How an image is attached.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Requests in flight at most.
    pub slots: u16,
    /// Memory for the map, in bytes; used as far as the image needs it.
    pub l2_cache: u64,
    /// Write bits of persistent bitmaps to disk before the data that they stand for, so that a crash
    /// does not cost them; the first write to a place takes longer for that.
    pub durable_bitmaps: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { slots: 256, l2_cache: 128 << 20, durable_bitmaps: false }
    }
}

/// What an image has done so far; written on the slow path only.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests served by a slot task.
    pub slow: Cell<u64>,
    /// Times that a task waited for another.
    pub parked: Cell<u64>,
    /// Completions that belong to nothing in flight.
    pub stale: Cell<u64>,
    /// Flushes sent to the device.
    pub flushes: Cell<u64>,
    /// Batches of metadata writes.
    pub batches: Cell<u64>,
    /// Pages of the map loaded.
    pub page_loads: Cell<u64>,
    /// Metadata reads.
    pub meta_reads: Cell<u64>,
    /// Metadata writes.
    pub meta_writes: Cell<u64>,
    /// Host clusters allocated.
    pub allocated: Cell<u64>,
}

/// What a stack is like from above.
pub(super) fn info(stack: &Stack, max_transfer: u32) -> DeviceInfo {
    let geometry = &stack.top.geometry;
    DeviceInfo {
        size: geometry.size() & !511,
        block_size: 512,
        physical_block_size: 4096,
        read_only: !stack.writable,
        volatile_cache: true,
        write_zeroes: true,
        discard: stack.writable,
        discard_granularity: geometry.cluster_size() as u32,
        max_transfer,
    }
}

/// The devices below the layer that is written to: its own, and that of its external data file.
pub(super) fn devices<L: BlockQueue>(
    stack: &Stack,
    leaves: &[L],
) -> Result<(DeviceInfo, Option<DeviceInfo>), String> {
    let top = stack.top_layer();
    let device = info_at(leaves, top, top.port)?.clone();
    let data = top.data.map(|port| info_at(leaves, top, port).cloned()).transpose()?;
    Ok((device, data))
}

/// An image on a reactor. Made on the reactor's thread, and never leaves it.
pub struct Image {
    // What a hit needs, first.
    pub(super) hits: Hits,
    pub(super) shared: Rc<Shared>,
    pub(super) free: Vec<u16>,
    /// To the other reactors that serve the image.
    pub(super) links: Vec<Arc<Link>>,
    /// Slots that have their requests.
    errands: usize,
    /// Whose turn it is to send one.
    next_link: usize,
    pub(super) stage: Stage,
    /// Nobody waits for the pause any more.
    pub(super) given_up: bool,
    // What it does not need.
    writable: bool,
    pub(super) closing: bool,
    /// A device was lost that could not be stopped: see [`block::QUARANTINED`].
    pub(super) lost: bool,
    /// How many slots are for requests. Behind them comes one that writes back, then the stream's.
    pub(super) requests: u16,
    /// Free slots while nothing new may begin.
    pub(super) resting: Vec<u16>,
    pub(super) l2_cache: u64,
    pub(super) tasks: Tasks,
    pub(super) closed: Option<Status>,
}

impl Image {
    /// Attaches an opened stack; `owner` as the reactor gave it. The image's own memory is
    /// registered with the leaves that it lies on.
    ///
    /// # Errors
    /// If memory is short or a leaf cannot reach it.
    pub fn attach<L: BlockQueue>(
        mut stack: Stack,
        owner: u16,
        leaves: &mut [L],
        options: Options,
    ) -> Result<Image, String> {
        let max_transfer = look_at_leaves(&mut stack.layers, leaves)?;
        let (device, data_device) = devices(&stack, leaves)?;
        let top = &mut stack.top;
        let geometry = top.geometry;
        let slots = options.slots.clamp(1, 1024);
        let least = 2 * usize::from(slots) + 16;
        let bits = page_bits(&geometry);
        let map = Arc::new(Map::new(geometry.guest_units(), bits, options.l2_cache, least)?);
        let tables = Tables::new(geometry, std::mem::take(&mut top.l1));
        let alloc = Allocator::new(top, device.size, Arc::default());
        let bitmaps = std::mem::take(&mut top.bitmaps);
        let marks = Marks::new(bitmaps, geometry.cluster_bits(), options.durable_bitmaps);
        let info = info(&stack, max_transfer);
        let hits = Hits::new(map.clone(), &stack.layers, &info, &geometry);
        let writable = stack.writable;
        let count = usize::from(slots + 1 + STREAM_SLOTS);
        let shared = Shared::new(
            stack,
            device,
            data_device,
            geometry,
            info,
            map,
            tables,
            alloc,
            marks,
            owner,
            count,
        )
        .map_err(|e| e.to_string())?;
        for region in shared.own_regions() {
            shared.register(&region);
            shared.stack.register(leaves, &region)?;
        }
        let of = shared.clone();
        let tasks = Tasks::new(count, move |slot| serve(of.clone(), slot as u16));
        Ok(Image {
            hits,
            free: (0..slots).rev().collect(),
            links: Vec::new(),
            errands: 0,
            next_link: 0,
            writable,
            stage: Stage::Serving,
            given_up: false,
            closing: false,
            lost: false,
            requests: slots,
            resting: Vec::with_capacity(usize::from(slots)),
            l2_cache: options.l2_cache,
            shared,
            tasks,
            closed: None,
        })
    }

    /// What the image has done so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Has changes that are not durable yet noted where they outlive the process. Before anything is
    /// served.
    pub fn keep_journal(&mut self, mut journal: super::Journal) {
        journal.bind(self.shared.stack.top.shape);
        self.shared.tables.borrow_mut().journal = Some(journal);
    }

    /// Says whose the journal is, after the image has come to lie in another file
    /// ([`Image::put_in_front`]).
    pub fn journal_is_of(&mut self, owner: u64) {
        if let Some(journal) = &mut self.shared.tables.borrow_mut().journal {
            journal.own(owner);
        }
    }

    /// Has compressed clusters decompressed by these threads, instead of by the reactor, which `wake`
    /// wakes.
    pub fn use_workers(&mut self, workers: Arc<Workers>, wake: Wake) {
        *self.shared.unpacker.borrow_mut() = Some(Unpacker::new(workers, wake));
    }

    /// The map, for look-ups from other reactors.
    pub fn map(&self) -> &Arc<Map> {
        self.hits.map()
    }

    /// Bytes that have a word of their own in the map: a cluster, or a subcluster where L2 entries are
    /// extended.
    pub fn unit_size(&self) -> u64 {
        self.shared.geometry.unit_size()
    }

    /// First byte of the layer that is written to behind everything that was ever in use: where its
    /// file may be cut after a clean close. `u64::MAX` if that is not known.
    pub fn end(&self) -> u64 {
        self.shared.alloc.borrow().end()
    }

    /// Requests that went straight down so far.
    pub fn hits(&self) -> u64 {
        self.shared.flights.begun()
    }

    /// Where the byte at `offset` of the disk lies, if an operation of this kind may go straight
    /// there: mapped, and no change of metadata.
    #[inline(always)]
    pub fn translate(&self, op: Op, offset: u64) -> Option<(Port, u64)> {
        self.hits.translate(op, offset)
    }

    /// A place for one more reactor, for a [`super::Satellite`] of as many slots as the image has.
    pub fn seat(&mut self, wakes: Wakes) -> Seat {
        let link = Arc::new(Link::new(self.requests, wakes.home, wakes.away));
        self.shared.links.borrow_mut().push(link.clone());
        self.links.push(link.clone());
        let (common, slots) = (self.shared.common.clone(), self.requests);
        Seat { image: self.reseat(), common, link: Away(link), slots }
    }

    /// What the image is like now, for [`super::Satellite::reseat`].
    pub fn reseat(&self) -> Reseat {
        Reseat {
            map: self.hits.map().clone(),
            layers: self.shared.stack.layers.clone(),
            info: self.shared.info.clone(),
            geometry: self.shared.geometry,
            version: self.shared.common.version(),
        }
    }

    /// Takes what cannot go straight down.
    #[cold]
    fn take_slow<L: BlockQueue>(&mut self, leaves: &mut [L], r: &Request<'_>) -> Result<(), Full> {
        let at = self.free.pop().ok_or(Full)?;
        self.submit_slow(leaves, at, r);
        Ok(())
    }

    fn submit_slow<L: BlockQueue>(&mut self, leaves: &mut [L], at: u16, r: &Request<'_>) {
        self.shared.work(at).up.set(r.tag);
        let c = &self.shared.counters.slow;
        c.set(c.get() + 1);
        let flushes = r.op == Op::Flush;
        let epoch = if flushes { u64::MAX } else { self.shared.common.epoch.get() };
        self.shared.work(at).epoch.set(epoch);
        let segs = SegList::from_slice(r.segs).unwrap_or(SegList::EMPTY);
        let what = match self.refusal(r) {
            Some(status) => What::Refuse(status),
            None => What::Guest(r.op),
        };
        let job = Job { what, flags: r.flags, offset: r.offset, len: r.len, segs };
        self.shared.give_job(at, job);
        self.tasks.run(usize::from(at));
        self.shared.send(leaves);
    }

    /// Why a request is refused, if it is.
    fn refusal(&self, r: &Request<'_>) -> Option<Status> {
        let info = &self.shared.info;
        let data = matches!(r.op, Op::Read | Op::Write);
        if self.closing || self.lost {
            Some(Status::Gone)
        } else if r.op == Op::Flush {
            None
        } else if !info.contains(r.offset, r.len)
            || !r.segs_fit()
            || r.segs.len() > MAX_GUEST_SEGS
            || (data && r.len > u64::from(info.max_transfer))
        {
            Some(Status::Invalid)
        } else if r.op != Op::Read && !self.writable {
            Some(Status::ReadOnly)
        } else if r.len == 0 {
            Some(Status::Ok)
        } else {
            None
        }
    }

    /// A request of a task ended.
    #[inline(never)]
    fn complete_child<L: BlockQueue>(&mut self, leaves: &mut [L], tag: Tag, status: Status) {
        if let Some(at) = self.shared.child_done(tag, status) {
            self.tasks.run(usize::from(at));
        }
        self.shared.send(leaves);
    }

    /// Whether there is anything to do for satellites: a few loads for each, in every turn.
    #[inline]
    fn has_news(&self) -> bool {
        let waits = || self.stage == Stage::Draining || self.shared.common.phase() == Phase::Lost;
        self.links.iter().any(|l| l.has_news()) || (!self.links.is_empty() && waits())
    }

    /// Takes up what the satellites send. Returns whether they sent anything.
    #[inline(never)]
    fn serve_links<L: BlockQueue>(&mut self, leaves: &mut [L]) -> bool {
        let links = std::mem::take(&mut self.links);
        let mut busy = false;
        // One of each in turn, so that none waits for ever; the other half of the slots is for
        // frontends here.
        let most = usize::from(self.requests / 2).max(1);
        let mut empty = 0;
        while empty < links.len() && self.errands < most {
            let link = &links[self.next_link % links.len()];
            self.next_link = self.next_link.wrapping_add(1);
            // Asked first, since taking from an empty queue costs a fence.
            if !link.has_errand() {
                // Of frontends that came, and may have gone again.
                self.learn_regions(leaves, link);
                empty += 1;
                continue;
            }
            let Some(at) = self.free.pop().or_else(|| self.resting.pop()) else { break };
            let Some(errand) = link.take_errand() else {
                self.give_back(at);
                break;
            };
            empty = 0;
            busy = true;
            self.serve_errand(leaves, at, link, errand);
        }
        self.links = links;
        if self.links.iter().any(|l| l.is_gone()) {
            self.links.retain(|l| !l.is_gone() || l.has_errand());
            self.shared.links.borrow_mut().clone_from(&self.links);
            self.drained();
        }
        if self.stage == Stage::Draining {
            self.drained();
        }
        if self.shared.common.phase() == Phase::Lost {
            self.lose();
        }
        busy
    }

    fn serve_errand<L: BlockQueue>(
        &mut self,
        leaves: &mut [L],
        at: u16,
        link: &Arc<Link>,
        errand: Errand,
    ) {
        self.learn_regions(leaves, link);
        self.errands += 1;
        *self.shared.work(at).via.borrow_mut() = Some(link.clone());
        let Errand { slot, op, flags, offset, len, segs } = errand;
        let (tag, segs) = (Tag::new(0, slot, 0), segs.as_slice());
        self.submit_slow(leaves, at, &Request { tag, op, flags, unit: 0, offset, len, segs });
    }

    /// Makes the memory known that a satellite's requests name.
    fn learn_regions<L: BlockQueue>(&self, leaves: &mut [L], link: &Link) {
        while let Some(region) = link.take_region() {
            self.shared.register(&region);
            if let Err(e) = self.shared.stack.register(leaves, &region) {
                log::error!("memory of another reactor's requests cannot be reached: {e}");
            }
        }
    }

    /// Lets tasks go on that can, and hands out their results.
    #[inline(never)]
    fn go_on<L: BlockQueue>(&mut self, leaves: &mut [L], out: &mut Completions) {
        for _ in 0..self.shared.ready_count() {
            if let Some(slot) = self.shared.take_ready() {
                self.tasks.run(usize::from(slot));
            }
        }
        while out.room() > 0
            && let Some((at, status)) = self.shared.take_finished()
        {
            if at == self.requests {
                self.written_back(status);
            } else if at > self.requests {
                self.shared.stream_slot_ended(status);
                self.drained();
            } else {
                let work = self.shared.work(at);
                let tag = work.up.get();
                let via = work.via.borrow_mut().take();
                self.release(at);
                match via {
                    Some(link) => {
                        self.errands -= 1;
                        link.reply(Reply { slot: tag.slot(), status });
                    }
                    None => out.push(Completion { tag, status, detail: 0 }),
                }
            }
        }
        self.shared.send(leaves);
    }

    /// Frees a slot.
    fn release(&mut self, at: u16) {
        self.shared.work(at).retire();
        self.give_back(at);
    }

    fn give_back(&mut self, at: u16) {
        // Never grows: a slot is free once.
        self.free.push(at);
        if self.stage != Stage::Serving {
            self.drained();
        }
    }

    /// Refuses everything from now on: other layers' devices must not fill buffers that the lost
    /// one may still write to.
    #[cold]
    fn lose(&mut self) {
        if !self.lost {
            log::error!("a device was lost and may still use memory: the image is out of service");
            self.lost = true;
            self.may_grow(false);
            self.tell_satellites(Phase::Lost);
            self.hits.end();
        }
    }

    /// Refuses everything from now on, since what is in memory does not fit what is on disk.
    pub fn put_out_of_service(&mut self) {
        if !self.lost {
            log::error!("the image is out of service: it must be opened again");
            self.lost = true;
            self.may_grow(false);
            self.tell_satellites(Phase::Lost);
            self.hits.end();
        }
    }

    pub(super) fn tell_satellites(&self, phase: Phase) {
        self.shared.common.enter(phase);
        self.shared.links.borrow().iter().for_each(|l| l.wake_satellite());
    }
}

impl<L: BlockQueue> Layer<L> for Image {
    fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    fn register(&mut self, region: &Arc<Region>) {
        self.shared.register(region);
    }

    /// Those that go straight down need no slot, but are not more than there are slots either.
    #[inline]
    fn room(&self, _leaves: &[L]) -> usize {
        self.free.len().saturating_sub(self.shared.flights.count())
    }

    #[inline(always)]
    fn submit(&mut self, leaves: &mut [L], r: &Request<'_>) -> Result<(), Full> {
        if self.free.is_empty() {
            return Err(Full);
        }
        if let Some((port, offset)) = self.hits.straight(r)
            && let Some(leaf) = leaves.get_mut(usize::from(port.leaf))
        {
            let flights = &self.shared.flights;
            let below = Request { tag: flights.begin(r.tag), unit: port.unit, offset, ..*r };
            if leaf.submit(&below).is_ok() {
                return Ok(());
            }
            flights.take_back();
        }
        // A copy, so that the caller's need not be in memory for the straight way.
        self.take_slow(leaves, &{ *r })
    }

    #[inline(always)]
    fn prefetch(&self, sectors: impl Iterator<Item = u64>) {
        self.hits.prefetch(sectors);
    }

    fn complete(&mut self, leaves: &mut [L], done: &mut Completion) -> bool {
        if done.is_quarantined() {
            self.lose();
        }
        self.complete_child(leaves, done.tag, done.status);
        false
    }

    #[inline]
    fn ended(&mut self, marked: bool, count: usize) {
        self.shared.flights.end(marked, count);
        if self.stage != Stage::Serving {
            self.drained();
        }
    }

    fn lost_device(&mut self) {
        self.lose();
    }

    #[inline(always)]
    fn poll(&mut self, leaves: &mut [L], out: &mut Completions) -> bool {
        let mut busy = self.has_news() && self.serve_links(leaves);
        if self.shared.has_answers() {
            self.shared.take_answers();
        }
        if !self.shared.is_quiet() {
            self.go_on(leaves, out);
            busy = true;
        }
        busy
    }

    fn arm(&mut self) -> HasWork {
        let asked = self.links.iter().any(|l| l.has_errand() || l.is_gone());
        let lost = self.shared.common.phase() == Phase::Lost && !self.lost;
        let resting = matches!(self.stage, Stage::Serving | Stage::Resting(_));
        let asked = asked || self.shared.has_answers();
        if self.shared.is_quiet() && !asked && !lost && resting {
            HasWork::No
        } else {
            HasWork::Yes
        }
    }

    fn close(&mut self) {
        if !self.closing {
            self.closing = true;
            self.may_grow(false);
            self.hits.end();
            self.tell_satellites(Phase::Closing);
            self.begin_close();
        }
    }

    fn closed(&self) -> Option<Status> {
        self.closed
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // The reactor drops its leaves first: nobody uses a request's memory any more.
        self.tell_satellites(Phase::Gone);
    }
}
