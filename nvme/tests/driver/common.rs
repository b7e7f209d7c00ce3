//! A controller model, the driver, and virtual time, turned by hand on one thread.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{BlockQueue, Completion, Completions, Flags, Op, Request, Status, Submit, Tag};
use dma::{Held, PageSize, Region, Seg};
use nvme::{
    Bar, Clock, Controller, DmaMapper, Doorbell, IovaMap, Options, QueuePair, ResetError, State,
};
use nvme_model::{DmaFault, HostMemory, NamespaceConfig, Registers, Store};
use nvme_spec::{Cqe, Csts, offset};
use reactor::sync::Mutex;
use zerocopy::IntoBytes;

pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1_000 * MS;

/// How regions lie on the bus.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Layout {
    /// Each in one piece.
    Contiguous,
    /// In single pages, no two of them neighbours, in descending order.
    Scattered,
}

/// By bus address: region (as an index that is never reused) and offset.
type Pages = BTreeMap<u64, (usize, usize)>;

/// Host memory by bus address: both what maps it and what the device sees.
#[derive(Clone)]
pub(crate) struct Memory {
    layout: Layout,
    pages: Arc<Mutex<Pages>>,
    regions: Arc<Mutex<Vec<Option<Held>>>>,
    next: Arc<Mutex<u64>>,
    /// The device does not master the bus.
    cut: Arc<AtomicBool>,
}

impl Memory {
    pub(crate) fn new(layout: Layout) -> Memory {
        let next = Arc::new(Mutex::new(1 << 32));
        let (pages, regions, cut) = Default::default();
        Memory { layout, pages, regions, next, cut }
    }

    pub(crate) fn mapped_pages(&self) -> usize {
        self.pages.lock().len()
    }

    fn each(
        &self,
        addr: u64,
        len: usize,
        write: bool,
        mut f: impl FnMut(&Region, usize, std::ops::Range<usize>),
    ) -> Result<(), DmaFault> {
        let (pages, regions) = (self.pages.lock(), self.regions.lock());
        if self.cut.load(Ordering::Relaxed) {
            return Err(DmaFault { addr, write });
        }
        let mut done = 0;
        while done < len {
            let at = addr + done as u64;
            let (region, page) = pages.get(&(at & !4095)).ok_or(DmaFault { addr: at, write })?;
            let region = regions[*region].as_ref().expect("its pages are mapped");
            let n = (4096 - (at & 4095) as usize).min(len - done);
            f(region, page + (at & 4095) as usize, done..done + n);
            done += n;
        }
        Ok(())
    }
}

impl DmaMapper for Memory {
    fn map(&self, region: &Arc<Region>) -> Result<IovaMap, String> {
        let mut next = self.next.lock();
        let n = region.len() as u64 / 4096;
        let step = if self.layout == Layout::Contiguous { 4096 } else { 8192 };
        let first = *next;
        *next += n * step + (1 << 20);
        let bus = |i: u64| match self.layout {
            Layout::Contiguous => first + i * step,
            Layout::Scattered => first + (n - 1 - i) * step,
        };
        let (mut pages, mut regions) = (self.pages.lock(), self.regions.lock());
        assert!(!regions.iter().flatten().any(|r| r.id() == region.id()), "mapped twice");
        for i in 0..n {
            pages.insert(bus(i), (regions.len(), i as usize * 4096));
        }
        regions.push(Some(Held::new(region)));
        Ok(match self.layout {
            Layout::Contiguous => IovaMap::Contiguous(first),
            Layout::Scattered => IovaMap::Pages((0..n).map(bus).collect()),
        })
    }

    fn unmap(&self, region: &Region) {
        let (mut pages, mut regions) = (self.pages.lock(), self.regions.lock());
        let id = |r: &Option<Held>| r.as_ref().is_some_and(|r| r.id() == region.id());
        let at = regions.iter().position(id).expect("unmapped once for each map");
        pages.retain(|_, (r, _)| *r != at);
        regions[at] = None;
    }
}

impl HostMemory for Memory {
    fn read(&mut self, addr: u64, into: &mut [u8]) -> Result<(), DmaFault> {
        let len = into.len();
        self.each(addr, len, false, |region, at, part| region.read(at, &mut into[part]))
    }

    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.each(addr, from.len(), true, |region, at, part| region.write(at, &from[part]))
    }

    fn read_u32(&mut self, addr: u64) -> Result<u32, DmaFault> {
        let mut word = 0;
        self.each(addr, 4, false, |region, at, _| word = region.load32(at, Ordering::Acquire))?;
        Ok(word)
    }

    fn write_u32(&mut self, addr: u64, value: u32) -> Result<(), DmaFault> {
        self.each(addr, 4, true, |region, at, _| region.store32(at, value, Ordering::Release))
    }

    fn write_cqe(&mut self, addr: u64, cqe: &Cqe) -> Result<(), DmaFault> {
        self.write(addr, cqe.as_bytes())
    }
}

pub(crate) type Model = nvme_model::Controller<Memory>;

/// What a hook of the ladder does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Hook {
    #[default]
    Unsupported,
    /// Says that it worked, and it did.
    Works,
    /// Says that it worked, and nothing happened.
    Lies,
    /// Says that it failed.
    Fails,
}

/// The device's side, shared by the bar, the doorbells and the test.
pub(crate) struct World {
    pub(crate) model: RefCell<Model>,
    registers: RefCell<Arc<Registers>>,
    pub(crate) now: Cell<u64>,
    /// How much time a turn takes.
    pub(crate) tick: Cell<u64>,
    /// When a driver that still waits fails its test.
    pub(crate) patience: Cell<u64>,
    /// What CSTS reads as, if not what the model says.
    pub(crate) csts: Cell<Option<u32>>,
    /// What VS reads as, if not what the model says.
    pub(crate) vs: Cell<Option<u32>>,
    /// What CAP reads as, if not what the model says.
    pub(crate) cap: Cell<Option<u64>>,
    /// All reads give ones, while the model goes on.
    pub(crate) all_ones: Cell<bool>,
    /// Writes to registers below the doorbells are dropped.
    pub(crate) deaf: Cell<bool>,
    pub(crate) function_reset: Cell<Hook>,
    pub(crate) bus_master_off: Cell<Hook>,
    /// The device does nothing any more.
    pub(crate) mute: Cell<bool>,
    /// The bus as the device sees it.
    memory: Memory,
    /// Register writes below the doorbells, and hooks: (offset, value), in order.
    pub(crate) writes: RefCell<Vec<(u64, u64)>>,
    pub(crate) doorbells: RefCell<BTreeMap<u64, u64>>,
}

pub(crate) const FUNCTION_RESET: u64 = u64::MAX;
pub(crate) const BUS_MASTER_OFF: u64 = u64::MAX - 1;

#[derive(Clone)]
pub(crate) struct TestBar(pub(crate) Rc<World>);

pub(crate) struct TestBell {
    world: Rc<World>,
    at: u64,
}

impl Doorbell for TestBell {
    fn ring(&self, value: u32) {
        *self.world.doorbells.borrow_mut().entry(self.at).or_default() += 1;
        self.world.regs().write32(self.at, value);
    }
}

impl Bar for TestBar {
    type Doorbell = TestBell;

    fn read32(&self, at: u64) -> u32 {
        match (self.0.all_ones.get(), at, self.0.csts.get()) {
            (true, ..) => u32::MAX,
            (_, offset::CSTS, Some(csts)) => csts,
            (_, offset::VS, _) if self.0.vs.get().is_some() => self.0.vs.get().unwrap(),
            _ => self.0.regs().read32(at),
        }
    }

    fn read64(&self, at: u64) -> u64 {
        match (self.0.all_ones.get(), at, self.0.cap.get()) {
            (true, ..) => u64::MAX,
            (_, offset::CAP, Some(cap)) => cap,
            _ => self.0.regs().read64(at),
        }
    }

    fn write32(&self, at: u64, value: u32) {
        self.0.writes.borrow_mut().push((at, value.into()));
        if !self.0.deaf.get() {
            self.0.regs().write32(at, value);
        }
    }

    fn write64(&self, at: u64, value: u64) {
        self.0.writes.borrow_mut().push((at, value));
        if !self.0.deaf.get() {
            self.0.regs().write64(at, value);
        }
    }

    fn doorbell(&self, at: u64) -> Option<TestBell> {
        (at + 4 <= self.0.regs().len()).then(|| TestBell { world: self.0.clone(), at })
    }

    fn function_reset(&self) -> Result<(), ResetError> {
        self.0.writes.borrow_mut().push((FUNCTION_RESET, 0));
        match self.0.function_reset.get() {
            Hook::Unsupported => Err(ResetError::Unsupported),
            Hook::Fails => Err(ResetError::Failed("no".to_owned())),
            Hook::Lies => Ok(()),
            Hook::Works => {
                self.0.model.borrow_mut().power_cut(0).unwrap();
                self.0.csts.set(None);
                self.0.all_ones.set(false);
                Ok(())
            }
        }
    }

    fn bus_master_off(&self) -> Result<(), ResetError> {
        self.0.writes.borrow_mut().push((BUS_MASTER_OFF, 0));
        match self.0.bus_master_off.get() {
            Hook::Unsupported => Err(ResetError::Unsupported),
            Hook::Fails | Hook::Lies => Err(ResetError::Failed("no".to_owned())),
            Hook::Works => {
                self.0.memory.cut.store(true, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    fn bus_master_on(&self) -> Result<(), ResetError> {
        let disabled = Csts(self.0.regs().read32(offset::CSTS)).rdy() == 0;
        assert!(disabled, "let onto the bus while it may still use old memory");
        self.0.memory.cut.store(false, Ordering::Relaxed);
        Ok(())
    }
}

impl World {
    pub(crate) fn regs(&self) -> Arc<Registers> {
        self.registers.borrow().clone()
    }

    /// Another device in the same place.
    pub(crate) fn swap(&self, model: Model) {
        *self.registers.borrow_mut() = model.registers().clone();
        *self.model.borrow_mut() = model;
    }

    pub(crate) fn turn(&self) {
        self.now.set(self.now.get() + self.tick.get());
        if !self.mute.get() {
            self.model.borrow_mut().step(self.now.get());
        }
    }

    pub(crate) fn count(&self, at: u64) -> usize {
        self.writes.borrow().iter().filter(|w| w.0 == at).count()
    }
}

/// Turns the model while the driver waits.
pub(crate) struct Turning(pub(crate) Rc<World>);

impl Clock for Turning {
    fn now(&mut self) -> u64 {
        self.0.now.get()
    }

    fn pause(&mut self) {
        assert!(self.0.now.get() < self.0.patience.get(), "the driver waits for ever");
        self.0.turn();
    }
}

/// What a test needs to begin.
pub(crate) struct Setup {
    pub(crate) model: nvme_model::Options,
    pub(crate) options: Options,
    pub(crate) layout: Layout,
    pub(crate) namespaces: Vec<NamespaceConfig>,
}

pub(crate) fn disk(blocks: u64, lba: u32) -> NamespaceConfig {
    NamespaceConfig { store: Store::memory(), blocks, lba, read_only: false }
}

impl Setup {
    /// One namespace of 64 MiB, and the faults given.
    pub(crate) fn new(lba: u32, faults: &str) -> Setup {
        let model = nvme_model::Options {
            faults: faults.parse().unwrap(),
            ..nvme_model::Options::default()
        };
        Setup {
            model,
            options: Options { queue_entries: 64, ..Options::default() },
            layout: Layout::Contiguous,
            namespaces: vec![disk((64 << 20) / u64::from(lba), lba)],
        }
    }

    pub(crate) fn world(self) -> (Rc<World>, Memory, Options) {
        let memory = Memory::new(self.layout);
        let model = Model::new(self.model, self.namespaces, memory.clone()).unwrap();
        let world = World {
            registers: RefCell::new(model.registers().clone()),
            model: RefCell::new(model),
            now: Cell::new(0),
            tick: Cell::new(MS / 10),
            patience: Cell::new(600 * SECOND),
            csts: Cell::default(),
            vs: Cell::default(),
            cap: Cell::default(),
            all_ones: Cell::default(),
            deaf: Cell::default(),
            function_reset: Cell::default(),
            bus_master_off: Cell::default(),
            mute: Cell::default(),
            memory: memory.clone(),
            writes: RefCell::default(),
            doorbells: RefCell::default(),
        };
        (Rc::new(world), memory, self.options)
    }

    pub(crate) fn open(self) -> Result<Rig, nvme::Error> {
        let (world, memory, options) = self.world();
        Rig::open(world, memory, options)
    }
}

/// An open controller with one queue pair and some memory for data.
pub(crate) struct Rig {
    pub(crate) world: Rc<World>,
    pub(crate) memory: Memory,
    pub(crate) controller: Controller<TestBar>,
    pub(crate) queue: QueuePair<TestBar>,
    pub(crate) data: Arc<Region>,
    pub(crate) done: Vec<Completion>,
    out: Completions,
    next: u32,
}

impl Rig {
    pub(crate) fn open(
        world: Rc<World>,
        memory: Memory,
        options: Options,
    ) -> Result<Rig, nvme::Error> {
        let mapper: Arc<dyn DmaMapper> = Arc::new(memory.clone());
        let mut clock = Turning(world.clone());
        let controller = Controller::open(TestBar(world.clone()), mapper, options, &mut clock)?;
        Rig::around(world, memory, controller)
    }

    /// With a new queue pair of a controller that is open.
    pub(crate) fn around(
        world: Rc<World>,
        memory: Memory,
        mut controller: Controller<TestBar>,
    ) -> Result<Rig, nvme::Error> {
        let mut clock = Turning(world.clone());
        let mut queue = controller.create_queue_pair(&mut clock)?;
        let data = Region::new(4 << 20, PageSize::Small).unwrap();
        queue.register(&data).unwrap();
        let out = Completions::new();
        Ok(Rig { world, memory, controller, queue, data, done: Vec::new(), out, next: 0 })
    }

    pub(crate) fn clock(&self) -> Turning {
        Turning(self.world.clone())
    }

    /// The reactor's part of a turn.
    pub(crate) fn poll(&mut self) -> usize {
        self.queue.set_now(self.world.now.get());
        self.out.clear();
        let n = self.queue.poll(&mut self.out);
        assert_eq!(n, self.out.len());
        self.done.extend(self.out.iter());
        n
    }

    /// One turn of everything.
    pub(crate) fn turn(&mut self) -> State {
        self.poll();
        self.world.turn();
        self.controller.step(self.world.now.get())
    }

    /// Turns until `until` says so; fails after so much virtual time.
    pub(crate) fn turn_until(&mut self, limit: u64, mut until: impl FnMut(&Rig) -> bool) {
        let end = self.world.now.get() + limit;
        while !until(self) {
            assert!(self.world.now.get() < end, "nothing happened: {self:?}");
            self.turn();
        }
    }

    pub(crate) fn tag(&mut self) -> Tag {
        self.next += 1;
        Tag::new(7, self.next as u16, self.next)
    }

    /// Submits; there must be room.
    pub(crate) fn send(
        &mut self,
        op: Op,
        flags: Flags,
        unit: u16,
        offset: u64,
        segs: &[Seg],
    ) -> Tag {
        let len = segs.iter().map(|s| u64::from(s.len())).sum();
        self.send_len(op, flags, unit, offset, len, segs)
    }

    pub(crate) fn send_len(
        &mut self,
        op: Op,
        flags: Flags,
        unit: u16,
        offset: u64,
        len: u64,
        segs: &[Seg],
    ) -> Tag {
        let tag = self.tag();
        let r = Request { tag, op, flags, unit, offset, len, segs };
        assert!(self.queue.room() > 0, "no room: {self:?}");
        self.queue.submit(&r).expect("there was room");
        tag
    }

    /// Waits for everything in flight.
    pub(crate) fn drain(&mut self) {
        self.turn_until(SECOND * 300, |r| r.queue.in_flight() == 0);
    }

    /// How a request ended; exactly once.
    pub(crate) fn answer(&mut self, tag: Tag) -> Completion {
        let all: Vec<_> = self.done.iter().filter(|c| c.tag == tag).collect();
        assert_eq!(all.len(), 1, "{all:?}");
        *all[0]
    }

    /// One request from begin to end.
    pub(crate) fn run(
        &mut self,
        op: Op,
        flags: Flags,
        unit: u16,
        offset: u64,
        segs: &[Seg],
    ) -> Status {
        let tag = self.send(op, flags, unit, offset, segs);
        self.drain();
        self.answer(tag).status
    }

    /// The same without data.
    pub(crate) fn run_len(&mut self, op: Op, flags: Flags, offset: u64, len: u64) -> Status {
        let tag = self.send_len(op, flags, 0, offset, len, &[]);
        self.drain();
        self.answer(tag).status
    }

    pub(crate) fn seg(&self, offset: u64, len: u32) -> Seg {
        self.data.seg(offset, len).unwrap()
    }

    /// What the medium holds.
    pub(crate) fn peek(&self, nsid: u32, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let peeked = self.world.model.borrow_mut().peek(nsid, offset, &mut bytes).unwrap();
        assert!(peeked.is_some());
        bytes
    }

    pub(crate) fn device(&self) -> nvme_model::StatsSnapshot {
        self.world.model.borrow().stats().snapshot()
    }
}

impl std::fmt::Debug for Rig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "at {} ms: {:?} {:?} {:?}",
            self.world.now.get() / MS,
            self.queue,
            self.queue.stats(),
            self.controller
        )
    }
}

/// Bytes that tell where they are.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; len];
    for word in bytes.chunks_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        word.copy_from_slice(&x.to_ne_bytes()[..word.len()]);
    }
    bytes
}
