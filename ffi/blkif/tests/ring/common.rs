//! What the tests of a backend share: a disk that can misbehave, grants that can, a frontend and
//! a backend turned by hand on one thread, and a raw ring for what no frontend would send.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use blkif::abi::{Head, PAGE, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, Response};
use blkif::grants::{CopyOp, GNTST_OKAY, GrantError, Mapped, Page};
use blkif::{
    Abi, Backend, Config, Done, Frontend, GrantTable, Grants, LocalGrants, RegionRing, RingMemory,
    Setup, Signal,
};
use block::{
    BlockQueue, Completion, Completions, DeviceInfo, Flags, Frontend as _, Full, HasWork, MemQueue,
    Op, Request, Status, Submit,
};
use dma::Region;

/// xorshift64*: the same numbers for the same seed everywhere.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// What was sent to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) op: Op,
    pub(crate) fua: bool,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// Says how a request ends instead of being carried out.
type Fault = Box<dyn FnMut(&Sent) -> Option<Status> + Send>;

pub(crate) struct Disk {
    pub(crate) inner: MemQueue,
    pub(crate) info: DeviceInfo,
    pub(crate) log: Vec<Sent>,
    pub(crate) fault: Option<Fault>,
    /// Completions stay here while this is set.
    pub(crate) hold: bool,
    pub(crate) shuffle: Option<Rng>,
    pub(crate) waiting: Vec<Completion>,
    pub(crate) max_in_flight: usize,
    /// Refuses some requests although there is room.
    pub(crate) full: Option<Rng>,
    /// Sectors that it was told to expect.
    pub(crate) expected: RefCell<Vec<u64>>,
    done: Completions,
}

impl Disk {
    pub(crate) fn new(size: u64) -> Disk {
        let inner = MemQueue::new(size, 512).unwrap();
        Disk {
            info: inner.info(0).unwrap().clone(),
            inner,
            log: Vec::new(),
            fault: None,
            hold: false,
            shuffle: None,
            waiting: Vec::new(),
            max_in_flight: usize::MAX,
            full: None,
            expected: RefCell::default(),
            done: Completions::new(),
        }
    }

    pub(crate) fn fail(&mut self, f: impl FnMut(&Sent) -> Option<Status> + Send + 'static) {
        self.fault = Some(Box::new(f));
    }

    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut v = vec![0; len];
        self.inner.data().read(offset as usize, &mut v);
        v
    }

    pub(crate) fn fill(&self, byte: u8) {
        self.inner.data().write(0, &vec![byte; self.info.size as usize]);
    }

    pub(crate) fn ops(&self) -> Vec<Op> {
        self.log.iter().map(|s| s.op).collect()
    }
}

impl Submit for Disk {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        (unit == 0).then_some(&self.info)
    }

    fn room(&self) -> usize {
        self.inner.room().min(self.max_in_flight.saturating_sub(self.in_flight()))
    }

    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if self.room() == 0 || self.full.as_mut().is_some_and(|rng| rng.one_in(3)) {
            return Err(Full);
        }
        let sent = Sent { op: r.op, fua: r.flags.has(Flags::FUA), offset: r.offset, len: r.len };
        self.log.push(sent);
        match self.fault.as_mut().and_then(|f| f(&sent)) {
            Some(status) => self.waiting.push(Completion { tag: r.tag, status, detail: 0 }),
            None => self.inner.submit(r)?,
        }
        Ok(())
    }

    fn prefetch(&self, sectors: impl Iterator<Item = u64>) {
        self.expected.borrow_mut().extend(sectors);
    }
}

impl BlockQueue for Disk {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.inner.register(region)
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        self.done.clear();
        self.inner.poll(&mut self.done);
        self.waiting.extend(self.done.iter());
        if self.hold {
            return 0;
        }
        if let Some(rng) = &mut self.shuffle {
            for i in (1..self.waiting.len()).rev() {
                self.waiting.swap(i, rng.below(i as u64 + 1) as usize);
            }
        }
        // Some of them only, if they come out of order.
        let most = self.shuffle.as_mut().map_or(usize::MAX, |r| r.below(8) as usize);
        let n = self.waiting.len().min(out.room()).min(most);
        for c in self.waiting.drain(..n) {
            out.push(c);
        }
        n
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.waiting.len()
    }

    fn arm(&mut self) -> HasWork {
        HasWork::Yes
    }
}

/// Says how a copy ends that would be carried out: `GNTST_OKAY` to do so.
pub(crate) type CopyFault = Box<dyn FnMut(&CopyOp) -> i16>;

/// How grants misbehave; a test changes it while the backend owns the grants.
#[derive(Default)]
pub(crate) struct Knobs {
    pub(crate) fault: Option<CopyFault>,
    pub(crate) call_fails: bool,
    /// Mappings do not end while this is set.
    pub(crate) maps_late: bool,
    pub(crate) refuse_maps: bool,
    late: Vec<u32>,
    /// Pages given up, and calls of `settle` after the last of them.
    pub(crate) unmapped: usize,
    pub(crate) settled: bool,
}

/// Grants that can fail, and that map late.
pub(crate) struct TestGrants {
    inner: LocalGrants,
    copies: Vec<CopyOp>,
    pub(crate) knobs: Rc<RefCell<Knobs>>,
}

impl TestGrants {
    pub(crate) fn new(inner: LocalGrants) -> TestGrants {
        TestGrants { inner, copies: Vec::new(), knobs: Rc::default() }
    }
}

impl Grants for TestGrants {
    fn attach(&mut self, local: &Arc<Region>) {
        self.inner.attach(local);
    }

    /// Takes them, as one that has them carried out with others does.
    fn start_copies(&mut self, ops: &mut Vec<CopyOp>) {
        assert!(self.copies.is_empty() && !ops.is_empty());
        std::mem::swap(&mut self.copies, ops);
    }

    fn end_copies(&mut self, ops: &mut Vec<CopyOp>) -> Result<(), GrantError> {
        assert!(ops.is_empty() && !self.copies.is_empty());
        std::mem::swap(&mut self.copies, ops);
        let mut knobs = self.knobs.borrow_mut();
        if knobs.call_fails {
            return Err(GrantError(14));
        }
        self.inner.end_copies(ops)?;
        if let Some(fault) = &mut knobs.fault {
            for op in ops {
                op.status = match fault(op) {
                    GNTST_OKAY => op.status,
                    status => status,
                };
            }
        }
        Ok(())
    }

    fn start_map(&mut self, gref: u32) -> bool {
        let mut knobs = self.knobs.borrow_mut();
        if knobs.maps_late {
            knobs.late.push(gref);
            return true;
        }
        !knobs.refuse_maps && self.inner.start_map(gref)
    }

    fn next_mapped(&mut self) -> Option<Mapped> {
        let mut knobs = self.knobs.borrow_mut();
        if knobs.maps_late {
            return None;
        }
        if let Some(gref) = knobs.late.pop() {
            assert!(self.inner.start_map(gref));
        }
        self.inner.next_mapped()
    }

    fn unmap(&mut self, page: Page) {
        let mut knobs = self.knobs.borrow_mut();
        knobs.unmapped += 1;
        knobs.settled = false;
        self.inner.unmap(page);
    }

    fn settle(&mut self) {
        self.knobs.borrow_mut().settled = true;
        self.inner.settle();
    }

    fn read_page(&self, page: Page, offset: u32, local: &Region, at: usize, len: u32) {
        self.inner.read_page(page, offset, local, at, len);
    }

    fn write_page(&self, page: Page, offset: u32, local: &Region, at: usize, len: u32) {
        self.inner.write_page(page, offset, local, at, len);
    }
}

pub(crate) type TestBackend = Backend<RegionRing, TestGrants, Signal>;

/// Time that passes in a turn, in nanoseconds.
pub(crate) const TURN: u64 = 10_000;

/// One turn of a reactor with one disk and one ring.
pub(crate) fn turn(
    disk: &mut Disk,
    backend: &mut TestBackend,
    out: &mut Completions,
    now: u64,
) -> bool {
    out.clear();
    disk.poll(out);
    for c in out.iter() {
        backend.complete(c);
    }
    backend.poll(disk, now)
}

/// A frontend and a backend, turned by hand.
pub(crate) struct Pair {
    pub(crate) frontend: Frontend<Signal>,
    pub(crate) backend: TestBackend,
    pub(crate) disk: Disk,
    pub(crate) knobs: Rc<RefCell<Knobs>>,
    /// Events to the frontend.
    pub(crate) events: Signal,
    pub(crate) now: u64,
    out: Completions,
}

pub(crate) const DISK: u64 = 8 << 20;

pub(crate) fn setup(abi: Abi, order: u8, persistent: bool) -> Setup {
    Setup { abi, order, persistent, max_segments: 32, start: 0 }
}

impl Pair {
    pub(crate) fn new(setup: Setup) -> Pair {
        Pair::with(setup, |_| {})
    }

    pub(crate) fn with(setup: Setup, change: impl FnOnce(&mut Config)) -> Pair {
        let frontend = Frontend::new(setup, Signal::default()).unwrap();
        let mut config = Config::new(3, setup.abi, setup.order);
        if setup.persistent {
            config.persistent_pages = config.usual_persistent_pages();
        }
        change(&mut config);
        let events = Signal::default();
        let grants = TestGrants::new(frontend.grants());
        let knobs = grants.knobs.clone();
        let backend = Backend::new(config, frontend.ring(), grants, events.clone()).unwrap();
        let mut disk = Disk::new(DISK);
        for region in backend.regions() {
            disk.register(&region).unwrap();
        }
        Pair { frontend, backend, disk, knobs, events, now: 1, out: Completions::new() }
    }

    pub(crate) fn turn(&mut self) -> bool {
        self.now += TURN;
        turn(&mut self.disk, &mut self.backend, &mut self.out, self.now)
    }

    pub(crate) fn turns(&mut self, n: usize) {
        for _ in 0..n {
            self.turn();
        }
    }

    /// Lets time pass in larger steps.
    pub(crate) fn wait(&mut self, ns: u64) {
        for _ in 0..100 {
            self.now += ns / 100;
            self.turn();
        }
    }

    pub(crate) fn reap(&mut self) -> Option<Done> {
        self.frontend.reap(&mut []).unwrap()
    }

    /// Sends what was put into the ring and runs until all of it is answered.
    pub(crate) fn run(&mut self) -> Vec<Done> {
        let mut all = Vec::new();
        self.frontend.push();
        for _ in 0..2000 {
            self.turn();
            while let Some(done) = self.reap() {
                all.push(done);
            }
            if self.frontend.in_flight() == 0 {
                return all;
            }
        }
        panic!("{} requests are not answered", self.frontend.in_flight());
    }

    /// Runs one request and returns its status.
    pub(crate) fn one(&mut self) -> i16 {
        let all = self.run();
        assert_eq!(all.len(), 1);
        all[0].status
    }

    /// Reads and waits: status and data.
    pub(crate) fn read(&mut self, sector: u64, len: usize) -> (i16, Vec<u8>) {
        self.frontend.read(1, sector, len as u32).unwrap();
        self.finish_read(len)
    }

    pub(crate) fn finish_read(&mut self, len: usize) -> (i16, Vec<u8>) {
        self.frontend.push();
        let mut data = vec![0xaa; len];
        for _ in 0..2000 {
            self.turn();
            if let Some(done) = self.frontend.reap(&mut data).unwrap() {
                return (done.status, data);
            }
        }
        panic!("a read is not answered");
    }

    pub(crate) fn write(&mut self, sector: u64, data: &[u8]) -> i16 {
        self.frontend.write(2, sector, data).unwrap();
        self.one()
    }
}

/// A ring written by hand, with pages to grant behind it: page `p` is granted as `GREF + p`.
pub(crate) struct Raw {
    pub(crate) memory: RegionRing,
    pub(crate) region: Arc<Region>,
    pub(crate) table: Arc<GrantTable>,
    pub(crate) backend: TestBackend,
    pub(crate) disk: Disk,
    pub(crate) knobs: Rc<RefCell<Knobs>>,
    pub(crate) abi: Abi,
    pub(crate) slots: u32,
    pub(crate) prod: u32,
    pub(crate) cons: u32,
    pub(crate) now: u64,
    first_page: usize,
    out: Completions,
}

pub(crate) const GREF: u32 = 100;
pub(crate) const PAGES: u32 = 64;

impl Raw {
    pub(crate) fn new(abi: Abi, change: impl FnOnce(&mut Config)) -> Raw {
        let mut config = Config::new(1, abi, 0);
        change(&mut config);
        let ring_pages = 1usize << config.order;
        let pages = ring_pages + PAGES as usize;
        let region = Region::new(pages * PAGE, dma::PageSize::Small).unwrap();
        let memory = RegionRing::new(region.clone(), 0, config.order).unwrap();
        memory.store32(REQ_EVENT, 1, Ordering::Relaxed);
        memory.store32(RSP_EVENT, 1, Ordering::Relaxed);
        let table = GrantTable::new(GREF + PAGES + 8);
        for p in 0..PAGES {
            table.grant(GREF + p, ring_pages as u32 + p, false);
        }
        let grants = TestGrants::new(LocalGrants::new(table.clone(), region.clone()));
        let knobs = grants.knobs.clone();
        let slots = abi.slots(config.order);
        let backend = Backend::new(config, memory.clone(), grants, Signal::default()).unwrap();
        let mut disk = Disk::new(DISK);
        disk.fill(0xdd);
        for r in backend.regions() {
            disk.register(&r).unwrap();
        }
        Raw {
            memory,
            region,
            table,
            backend,
            disk,
            knobs,
            abi,
            slots,
            prod: 0,
            cons: 0,
            now: 1,
            first_page: ring_pages * PAGE,
            out: Completions::new(),
        }
    }

    /// Where a page lies in the region.
    pub(crate) fn page_at(&self, page: u32) -> usize {
        self.first_page + page as usize * PAGE
    }

    pub(crate) fn page(&self, page: u32) -> Vec<u8> {
        let mut v = vec![0; PAGE];
        self.region.read(self.page_at(page), &mut v);
        v
    }

    pub(crate) fn put(&mut self, head: Head, tail: &[u64]) {
        self.abi.store_request(&self.memory, self.prod & (self.slots - 1), head, tail);
        self.prod = self.prod.wrapping_add(1);
        self.memory.store32(REQ_PROD, self.prod, Ordering::Release);
    }

    pub(crate) fn turn(&mut self) -> bool {
        self.now += TURN;
        turn(&mut self.disk, &mut self.backend, &mut self.out, self.now)
    }

    pub(crate) fn answers(&mut self) -> Vec<Response> {
        let prod = self.memory.load32(RSP_PROD, Ordering::Acquire);
        let mut all = Vec::new();
        while self.cons != prod {
            all.push(self.abi.load_response(&self.memory, self.cons & (self.slots - 1)));
            self.cons = self.cons.wrapping_add(1);
        }
        all
    }

    /// Some turns, then the answers.
    pub(crate) fn run(&mut self) -> Vec<Response> {
        for _ in 0..8 {
            self.turn();
        }
        self.answers()
    }

    /// Puts one request and expects one answer with its id.
    pub(crate) fn one(&mut self, head: Head, tail: &[u64]) -> (u8, i16) {
        self.put(head, tail);
        let answers = self.run();
        assert_eq!(answers.len(), 1, "{answers:?}");
        assert_eq!(answers[0].id, head.id);
        (answers[0].operation, answers[0].status)
    }
}
