//! [`Shared`]: what the tasks of one image have in common, and how they wait.
//!
//! A task asks for I/O by [`Shared::start`] and waits by [`Shared::wait`] (see [`super::io`]); it
//! waits for another task's doing by [`Shared::park`] on a [`Key`], until that one calls
//! [`Shared::unpark`]. Requests to the leaves collect in an outbox, since only the reactor's calls
//! are lent the leaves.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use block::{DeviceInfo, Flags, Op, SegList, Status, Tag};
use dma::{Buf, Pool, Region, RegionId, Seg};

use super::alloc::Allocator;
use super::corrupt::Mark;
use super::flights::Flights;
use super::flush::Batches;
use super::io::Children;
use super::link::{Common, Link};
use super::marks::Marks;
use super::meta::Tables;
use super::read::Decompressed;
use super::reclaim::LetGo;
use super::space::Space;
use super::stack::Stack;
use super::stream::Stream;
use super::watch::Watch;
use super::workers::Unpacker;
use crate::compress::Decompressor;
use crate::format::Geometry;
use crate::map::{Map, Pages};

/// A request of the frontend, or of the image itself, as a task serves it.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub(super) what: What,
    pub(super) flags: Flags,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) segs: SegList,
}

/// What a job is to do.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum What {
    Guest(Op),
    /// Take what lower layers hold up into the one that is written to: see [`super::stream`].
    Stream,
    /// Write everything back and tidy up: for a clean close, or a pause.
    WriteBack,
    /// Fail, for a request that was wrong.
    Refuse(Status),
}

/// What a task may wait for besides I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Key {
    /// The claim on a unit.
    Unit(u64),
    /// The placing of a guest cluster (see [`super::meta::Tables::placing`]).
    Placing(u64),
    /// The loading of a page of the map (or of its L2 slice).
    Page(u64),
    /// The making of an L2 table, by L1 index.
    Table(u64),
    /// The allocator.
    Alloc,
    /// Space on the device.
    Space,
    /// The end of a batch of metadata writes.
    Batch,
    /// A buffer.
    Buffer,
    /// Leave for the stream to go on.
    Stream,
    /// The contents of a compressed cluster: layer and host offset.
    Packed(usize, u64),
    /// The loading of a page of a bitmap's bits.
    Bits(super::marks::PageKey),
    /// The writing of bits, or of bitmaps' flags.
    Marks,
}

/// A slot as its task sees it.
pub(super) struct Work {
    job: RefCell<Option<Job>>,
    /// Requests to leaves not yet completed, and the first failure among them.
    pub(super) pending: Cell<u32>,
    pub(super) status: Cell<Status>,
    woken: Cell<bool>,
    result: Cell<Option<Status>>,
    /// The frontend's tag.
    pub(super) up: Cell<Tag>,
    /// The link by which the request came, if it did not come from a frontend here.
    pub(super) via: RefCell<Option<Arc<Link>>>,
    /// The image's epoch when the slot's request began; `u64::MAX` when it is idle.
    pub(super) epoch: Cell<u64>,
}

impl Work {
    /// Ends the use of the slot.
    pub(super) fn retire(&self) {
        self.epoch.set(u64::MAX);
    }
}

/// Bytes of a metadata buffer: the unit in which tables are read and written.
pub(super) const META: usize = 4096;

/// Messages about what is wrong with an image's files while it is served.
const COMPLAINTS: u32 = 200;

/// Metadata buffers of an image.
const META_BUFS: u32 = 64;

/// See the module's text.
pub(super) struct Shared {
    pub(super) stack: Stack,
    /// What lies below the layer that is written to.
    pub(super) device: DeviceInfo,
    /// The device of its external data file, if it has one.
    pub(super) data_device: Option<DeviceInfo>,
    /// Of that layer.
    pub(super) geometry: Geometry,
    pub(super) info: DeviceInfo,
    pub(super) map: Arc<Map>,
    pub(super) pages: RefCell<Pages>,
    pub(super) tables: RefCell<Tables>,
    pub(super) alloc: RefCell<Allocator>,
    pub(super) space: Arc<Space>,
    /// See [`super::Image::may_grow`].
    pub(super) grows: Cell<bool>,
    pub(super) batches: RefCell<Batches>,
    pub(super) let_go: RefCell<LetGo>,
    pub(super) decompressed: RefCell<Decompressed>,
    pub(super) decompressor: RefCell<Decompressor>,
    /// Who decompresses, if not the reactor itself.
    pub(super) unpacker: RefCell<Option<Unpacker>>,
    /// Slots that wait for an answer of theirs.
    unpacking: RefCell<Vec<u16>>,
    pub(super) counters: super::image::Counters,
    pub(super) stream: Stream,
    pub(super) marks: RefCell<Marks>,
    /// What changes, while somebody wants to know.
    pub(super) watch: RefCell<Option<Watch>>,
    /// Words of the map may have flags on account of `watch`, now or before.
    pub(super) flags: Cell<bool>,
    /// What other reactors know of the image too.
    pub(super) common: Arc<Common>,
    /// Requests of this reactor's frontends that went straight down.
    pub(super) flights: Flights,
    /// To the satellites.
    pub(super) links: RefCell<Vec<Arc<Link>>>,
    complaints: Cell<u32>,
    pub(super) mark: Cell<Mark>,
    pub(super) owner: u16,
    pub(super) children: RefCell<Children>,
    works: Box<[Work]>,
    parked: RefCell<Vec<(Key, u16)>>,
    ready: RefCell<VecDeque<u16>>,
    finished: RefCell<VecDeque<u16>>,
    meta: RefCell<Pool>,
    data: RefCell<Pool>,
    /// Zeroes, never written: one cluster of them.
    zeroes: Arc<Region>,
    /// Of frontends, here and elsewhere: theirs to keep.
    regions: RefCell<Vec<Weak<Region>>>,
}

impl Shared {
    #[expect(clippy::too_many_arguments, reason = "called once, where all of these are made")]
    pub(super) fn new(
        stack: Stack,
        device: DeviceInfo,
        data_device: Option<DeviceInfo>,
        geometry: Geometry,
        info: DeviceInfo,
        map: Arc<Map>,
        tables: Tables,
        alloc: Allocator,
        marks: Marks,
        owner: u16,
        slots: usize,
    ) -> Result<Rc<Shared>, dma::Error> {
        let cluster = geometry.cluster_size() as usize;
        let pages = RefCell::new(Pages::new(&map));
        let work = |_| Work {
            job: RefCell::new(None),
            pending: Cell::new(0),
            status: Cell::new(Status::Ok),
            woken: Cell::new(false),
            result: Cell::new(None),
            up: Cell::new(Tag::new(0, 0, 0)),
            via: RefCell::new(None),
            epoch: Cell::new(u64::MAX),
        };
        // Enough data buffers that copy-on-write is not serialised, without taking more than a few
        // MiB for large clusters.
        let data_bufs = ((4 << 20) / cluster).clamp(4, 32) as u32;
        Ok(Rc::new(Shared {
            stack,
            device,
            data_device,
            geometry,
            info,
            map,
            pages,
            tables: RefCell::new(tables),
            space: alloc.space().clone(),
            grows: Cell::new(false),
            alloc: RefCell::new(alloc),
            batches: RefCell::default(),
            let_go: RefCell::default(),
            decompressed: RefCell::default(),
            decompressor: RefCell::default(),
            unpacker: RefCell::default(),
            unpacking: RefCell::default(),
            counters: super::image::Counters::default(),
            stream: Stream::default(),
            marks: RefCell::new(marks),
            watch: RefCell::default(),
            flags: Cell::default(),
            common: Arc::new(Common::new()),
            flights: Flights::new(),
            links: RefCell::default(),
            complaints: Cell::new(0),
            mark: Cell::default(),
            owner,
            children: RefCell::new(Children::new(slots)),
            works: (0..slots).map(work).collect(),
            parked: RefCell::new(Vec::with_capacity(slots)),
            ready: RefCell::new(VecDeque::with_capacity(slots)),
            finished: RefCell::new(VecDeque::with_capacity(slots)),
            meta: RefCell::new(Pool::new(META_BUFS, META as u32)?),
            // Many images never use them, and a host has many.
            data: RefCell::new(Pool::new_lazy(data_bufs, cluster as u32)?),
            zeroes: Region::new_best(cluster.max(META))?,
            regions: RefCell::new((0..RegionId::MAX).map(|_| Weak::new()).collect()),
        }))
    }

    /// Memory of the image itself, for the leaves.
    pub(super) fn own_regions(&self) -> [Arc<Region>; 3] {
        [
            self.meta.borrow().region().clone(),
            self.data.borrow().region().clone(),
            self.zeroes.clone(),
        ]
    }

    /// The number of the layer that is written to.
    #[inline]
    pub(super) fn top_at(&self) -> usize {
        usize::from(self.stack.top_number())
    }

    pub(super) fn register(&self, region: &Arc<Region>) {
        self.regions.borrow_mut()[region.id().index()] = Arc::downgrade(region);
    }

    /// All memory that requests may name.
    pub(super) fn regions(&self) -> Vec<Arc<Region>> {
        self.regions.borrow().iter().filter_map(Weak::upgrade).collect()
    }

    /// The memory that a segment names, if it was registered.
    pub(super) fn region(&self, seg: &Seg) -> Option<Arc<Region>> {
        self.regions.borrow().get(seg.region().index())?.upgrade()
    }

    /// Says what is wrong with the file of a layer. Guests can have the same found again and again, so
    /// that ends somewhere.
    pub(super) fn complain(&self, layer: usize, what: std::fmt::Arguments<'_>) {
        let count = self.complaints.get() + 1;
        let name = &self.stack.layers[layer].name;
        if count <= COMPLAINTS {
            self.complaints.set(count);
            log::error!("{name}: {what}");
        }
        if count == COMPLAINTS {
            log::error!("{name}: there is more, of which nothing is said");
        }
    }

    pub(super) fn slots(&self) -> usize {
        self.works.len()
    }

    #[inline]
    pub(super) fn work(&self, slot: u16) -> &Work {
        &self.works[usize::from(slot)]
    }

    // ---- jobs ----

    pub(super) fn give_job(&self, slot: u16, job: Job) {
        *self.work(slot).job.borrow_mut() = Some(job);
    }

    pub(super) fn take_job(&self, slot: u16) -> Option<Job> {
        self.work(slot).job.borrow_mut().take()
    }

    pub(super) fn finish(&self, slot: u16, status: Status) {
        debug_assert_eq!(self.work(slot).pending.get(), 0, "a job ended with I/O in flight");
        self.work(slot).result.set(Some(status));
        self.finished.borrow_mut().push_back(slot);
    }

    /// The next slot whose job ended, and how.
    pub(super) fn take_finished(&self) -> Option<(u16, Status)> {
        let slot = self.finished.borrow_mut().pop_front()?;
        let status = self.work(slot).result.take().unwrap_or(Status::Corrupt);
        Some((slot, status))
    }

    /// Whether no task can go on, nothing waits to be sent and no result to be handed out.
    #[inline]
    pub(super) fn is_quiet(&self) -> bool {
        self.ready.borrow().is_empty()
            && self.finished.borrow().is_empty()
            && self.children.borrow().is_quiet()
    }

    /// Has a task run in the next turn.
    pub(super) fn make_ready(&self, slot: u16) {
        self.ready.borrow_mut().push_back(slot);
    }

    // ---- waiting for each other ----

    /// Waits until somebody calls [`Shared::unpark`] with this key.
    pub(super) async fn park(&self, slot: u16, key: Key) {
        self.work(slot).woken.set(false);
        self.parked.borrow_mut().push((key, slot));
        self.counters.parked.set(self.counters.parked.get() + 1);
        reactor::task::until(|| self.work(slot).woken.get().then_some(())).await;
    }

    /// Waits until `ready` returns something, asked whenever workers have answered.
    pub(super) async fn answer<T>(&self, slot: u16, ready: impl FnMut() -> Option<T>) -> T {
        self.unpacking.borrow_mut().push(slot);
        let answer = reactor::task::until(ready).await;
        self.unpacking.borrow_mut().retain(|&s| s != slot);
        answer
    }

    /// Whether workers have answered.
    #[inline]
    pub(super) fn has_answers(&self) -> bool {
        self.unpacker.borrow().as_ref().is_some_and(Unpacker::has_answers)
    }

    /// Has those look that wait for answers.
    #[cold]
    pub(super) fn take_answers(&self) {
        if let Some(u) = self.unpacker.borrow().as_ref() {
            u.clear();
        }
        self.ready.borrow_mut().extend(self.unpacking.borrow().iter());
    }

    /// Lets the others of this turn go first.
    pub(super) async fn pause(&self, slot: u16) {
        self.ready.borrow_mut().push_back(slot);
        let mut asked = false;
        reactor::task::until(|| std::mem::replace(&mut asked, true).then_some(())).await;
    }

    /// Lets all go on that wait for `key`, in the order in which they came.
    pub(super) fn unpark(&self, key: Key) {
        let mut ready = self.ready.borrow_mut();
        self.parked.borrow_mut().retain(|&(k, slot)| {
            if k != key {
                return true;
            }
            self.work(slot).woken.set(true);
            ready.push_back(slot);
            false
        });
    }

    /// The next task that can go on.
    pub(super) fn take_ready(&self) -> Option<u16> {
        self.ready.borrow_mut().pop_front()
    }

    /// How many tasks can go on.
    pub(super) fn ready_count(&self) -> usize {
        self.ready.borrow().len()
    }

    // ---- buffers ----

    /// A metadata buffer, when one is free.
    pub(super) async fn meta_buf(&self, slot: u16) -> Buf {
        loop {
            let free = self.meta.borrow_mut().take();
            match free {
                Some(buf) => return buf,
                None => self.park(slot, Key::Buffer).await,
            }
        }
    }

    /// A metadata buffer if one is free now: for a task that holds others already.
    pub(super) fn try_meta_buf(&self) -> Option<Buf> {
        self.meta.borrow_mut().take()
    }

    pub(super) fn give_meta(&self, buf: Buf) {
        self.meta.borrow_mut().give(buf);
        self.unpark(Key::Buffer);
    }

    /// A buffer of one cluster, when one is free. Whoever holds one waits for I/O only.
    pub(super) async fn data_buf(&self, slot: u16) -> Buf {
        loop {
            let free = self.data.borrow_mut().take();
            match free {
                Some(buf) => return buf,
                None => self.park(slot, Key::Buffer).await,
            }
        }
    }

    pub(super) fn give_data(&self, buf: Buf) {
        self.data.borrow_mut().give(buf);
        self.unpark(Key::Buffer);
    }

    /// The memory of metadata buffers.
    pub(super) fn meta_region(&self) -> Arc<Region> {
        self.meta.borrow().region().clone()
    }

    /// The memory of data buffers.
    pub(super) fn data_region(&self) -> Arc<Region> {
        self.data.borrow().region().clone()
    }

    /// `len` zero bytes, at most a cluster.
    pub(super) fn zero_seg(&self, len: u64) -> Seg {
        debug_assert!(len <= self.zeroes.len() as u64);
        self.zeroes.seg(0, len as u32).unwrap_or(Seg::NONE)
    }
}
