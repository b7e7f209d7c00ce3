//! A guest's ring under a guest that may do anything: requests that are right by default and rarely
//! not, indices, pages that are granted and taken back under the backend's hands, a disk that fails.

use std::sync::Arc;

use blkif::abi::{Head, REQ_PROD, RSP_EVENT, RSP_PROD, Segment};
use blkif::{Abi, Backend, Config, GrantTable, LocalGrants, RegionRing, RingMemory, Signal};
use block::{Completion, DeviceInfo, Frontend, Full, HasWork, Op, Request, Status, Submit, Tag};
use dma::{PageSize, Region};

const PAGE: usize = 4096;
/// Pages of data that the guest has, and references that it uses.
const DATA: usize = 12;
const GREFS: u32 = 24;
const DISK: u64 = 1 << 20;
/// What stands in pages before the guest writes to them.
const FRESH: u8 = 0xA5;

/// The fuzzer's choices; zeroes when it has no more.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn below(&mut self, n: u32) -> u32 {
        u32::from(self.byte()) % n
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    fn rarely(&mut self) -> bool {
        self.byte() > 245
    }
}

/// A disk in memory, which refuses to believe what a backend has to check.
struct Disk {
    info: DeviceInfo,
    data: Vec<u8>,
    bounce: Arc<Region>,
    held: Vec<(Tag, Op, u64, u64, Vec<dma::Seg>)>,
    room: usize,
}

impl Submit for Disk {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        (unit == 0).then_some(&self.info)
    }

    fn room(&self) -> usize {
        self.room.saturating_sub(self.held.len())
    }

    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if self.room() == 0 {
            return Err(Full);
        }
        assert!(r.offset.checked_add(r.len).is_some_and(|end| end <= DISK), "outside the disk");
        assert!((r.offset | r.len).is_multiple_of(512), "not whole sectors");
        assert!(!self.info.read_only || matches!(r.op, Op::Read | Op::Flush), "{:?}", r.op);
        if matches!(r.op, Op::Read | Op::Write) {
            assert_eq!(r.segs.iter().map(|s| u64::from(s.len())).sum::<u64>(), r.len);
        }
        self.held.push((r.tag, r.op, r.offset, r.len, r.segs.to_vec()));
        Ok(())
    }
}

impl Disk {
    fn complete(&mut self, at: usize, status: Status) -> Completion {
        let (tag, op, offset, len, segs) = self.held.swap_remove(at);
        let range = offset as usize..(offset + len) as usize;
        if status.is_ok() {
            match op {
                Op::Read | Op::Write => {
                    let mut at = range.start;
                    for seg in &segs {
                        let bytes = &mut self.data[at..at + seg.len() as usize];
                        match op {
                            Op::Read => self.bounce.write_seg(seg, bytes),
                            _ => self.bounce.read_seg(seg, bytes),
                        }
                        at += bytes.len();
                    }
                }
                Op::WriteZeroes | Op::Discard => self.data[range].fill(0),
                Op::Flush => {}
            }
        }
        Completion { tag, status, detail: 0 }
    }
}

/// A backend and its guest.
struct World<'a> {
    choices: Choices<'a>,
    backend: Backend<RegionRing, LocalGrants, Signal>,
    ring: RegionRing,
    abi: Abi,
    order: u8,
    memory: Arc<Region>,
    table: Arc<GrantTable>,
    disk: Disk,
    now: u64,
    /// Requests written, and published by an honest index.
    written: u32,
    honest: bool,
}

/// Does what the fuzzer says.
pub fn ring(data: &[u8]) {
    let mut choices = Choices(data);
    let (abi, order) =
        ([Abi::X86_64, Abi::X86_32][choices.below(2) as usize], choices.below(3) as u8);
    let ring_pages = 1usize << order;
    let memory = Region::new((ring_pages + DATA) * PAGE, PageSize::Small).expect("memory");
    for page in 0..DATA {
        memory.write((ring_pages + page) * PAGE, &[FRESH; PAGE]);
    }
    let ring = RegionRing::new(memory.clone(), 0, order).expect("it was made for it");
    let table = GrantTable::new(GREFS);
    let mut config = Config::new(1, abi, order);
    config.persistent_pages = [0, 3, 64][choices.below(3) as usize];
    config.max_indirect_segments = [0, 8, 32][choices.below(3) as usize];
    config.large_buffers = 1 + choices.below(3) as u16;
    let flags = choices.byte();
    config.read_only = flags & 7 == 7;
    config.flush = flags & 8 == 0;
    config.barrier = flags & 16 != 0;
    config.discard = flags & 32 == 0;
    config.no_space_timeout = (flags & 64 != 0).then_some(1 << 30);
    let grants = LocalGrants::new(table.clone(), memory.clone());
    let backend = Backend::new(config.clone(), ring.clone(), grants, Signal::default());
    let mut backend = backend.expect("an empty ring is a good one");
    let bounce = backend.regions().remove(0);
    let info = DeviceInfo {
        size: DISK,
        block_size: 512,
        physical_block_size: 4096,
        read_only: config.read_only,
        volatile_cache: true,
        write_zeroes: true,
        discard: true,
        discard_granularity: 4096,
        max_transfer: 1 << 20,
    };
    let disk = Disk { info, data: vec![0x11; DISK as usize], bounce, held: Vec::new(), room: 64 };
    let _ = backend.arm();
    let (now, written, honest) = (0, 0, true);
    let mut world =
        World { choices, backend, ring, abi, order, memory, table, disk, now, written, honest };
    while !world.choices.0.is_empty() {
        world.step();
    }
    world.end();
}

impl World<'_> {
    fn step(&mut self) {
        match self.choices.byte() % 16 {
            0..=4 => self.request(),
            5 | 6 => self.publish(),
            7..=9 => self.poll(),
            10 | 11 => self.complete(),
            12 => self.grant(),
            13 => self.scribble(),
            14 => {
                // A time that passes: retries come due, pages get old.
                self.now += 1 << self.choices.below(40);
            }
            _ => {
                let armed = self.backend.arm();
                assert!(armed == HasWork::No || armed == HasWork::Yes);
                let _ = self.backend.is_quiet(self.now);
            }
        }
    }

    /// A reference: one that is granted, if the fuzzer does not insist.
    fn gref(&mut self) -> u32 {
        if self.choices.rarely() { self.choices.word() as u32 } else { self.choices.below(GREFS) }
    }

    fn segment(&mut self) -> u64 {
        let gref = self.gref();
        if self.choices.rarely() {
            return self.choices.word();
        }
        let (a, b) = (self.choices.byte() % 8, self.choices.byte() % 8);
        Segment::new(gref, a.min(b), a.max(b)).0
    }

    fn request(&mut self) {
        let operation = self.choices.byte() % 8;
        let id = u64::from(self.choices.byte());
        let sector = match self.choices.rarely() {
            true => self.choices.word(),
            false => u64::from(self.choices.byte()) * 8,
        };
        let mut tail = [0; 10];
        let head = match operation {
            5 => Head { word: u64::from(self.choices.byte()), ..Head::direct(5, 0, id, sector, 0) },
            6 => {
                let count = 1 + u16::from(self.choices.byte()) % 40;
                let page = self.gref();
                self.list(page, count.into());
                let inner = self.choices.byte() % 3;
                Head::indirect(inner, count, id, sector, page)
            }
            _ => {
                let most = if operation == 3 { 12 } else { 13 };
                let count = (self.choices.byte() % most).max(u8::from(operation < 2));
                for word in tail.iter_mut().take(usize::from(count).saturating_sub(1)) {
                    *word = self.segment();
                }
                let first = self.segment();
                Head::direct(operation, count, id, sector, first)
            }
        };
        let slots = self.abi.slots(self.order);
        self.abi.store_request(&self.ring, self.written & (slots - 1), head, &tail);
        self.written = self.written.wrapping_add(1);
        if self.choices.rarely() {
            self.scribble();
        }
    }

    /// Writes a list of segments into the page of a reference, if that is granted.
    fn list(&mut self, gref: u32, count: usize) {
        let segments: Vec<u64> = (0..count.min(512)).map(|_| self.segment()).collect();
        let first = 1u32 << self.order;
        if let Some((page, _)) = self.table.find(gref)
            && (first..first + DATA as u32).contains(&page)
        {
            let bytes: Vec<u8> = segments.iter().flat_map(|s| s.to_le_bytes()).collect();
            self.memory.write(page as usize * PAGE, &bytes);
        }
    }

    fn publish(&mut self) {
        use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
        if self.choices.rarely() {
            let index = self.choices.word() as u32;
            self.honest = false;
            return self.ring.store32(REQ_PROD, index, Release);
        }
        let answered = self.ring.load32(RSP_PROD, Acquire);
        let slots = self.abi.slots(self.order);
        if self.honest && self.written.wrapping_sub(answered) > slots {
            // A frontend that keeps to the rules waits.
            self.written = answered.wrapping_add(slots);
        }
        self.ring.store32(REQ_PROD, self.written, Release);
        let event = answered.wrapping_add(u32::from(self.choices.byte() % 4));
        self.ring.store32(RSP_EVENT, event, Relaxed);
    }

    /// One turn of the backend: what is not granted for writing stays as it is.
    fn poll(&mut self) {
        let first = 1usize << self.order;
        let mut open = [false; DATA];
        for gref in 0..GREFS {
            if let Some((page, read_only)) = self.table.find(gref)
                && (!read_only || self.table.mapped(gref))
                && let Some(place) = open.get_mut((page as usize).wrapping_sub(first))
            {
                *place = true;
            }
        }
        let before = self.pages();
        self.backend.poll(&mut self.disk, self.now);
        let after = self.pages();
        for (n, (a, b)) in before.iter().zip(&after).enumerate() {
            assert!(a == b || open[n], "page {n} was written to and is not granted");
        }
        self.answers();
    }

    fn pages(&self) -> Vec<Vec<u8>> {
        let first = 1usize << self.order;
        let page = |n: usize| {
            let mut bytes = vec![0; PAGE];
            self.memory.read((first + n) * PAGE, &mut bytes);
            bytes
        };
        (0..DATA).map(page).collect()
    }

    /// No more answers than requests.
    fn answers(&self) {
        use std::sync::atomic::Ordering::Acquire;
        if self.honest {
            let answered = self.ring.load32(RSP_PROD, Acquire);
            assert!(answered <= self.written, "{answered} answers to {} requests", self.written);
        }
    }

    fn complete(&mut self) {
        let Some(last) = self.disk.held.len().checked_sub(1) else {
            // An answer to nothing.
            let tag = Tag::new(1, self.choices.byte().into(), self.choices.byte().into());
            let done = Completion { tag, status: Status::Ok, detail: 0 };
            assert!(!self.backend.complete(done), "an answer to nothing was taken for one");
            return;
        };
        let at = usize::from(self.choices.byte()).min(last);
        let status = match self.choices.byte() {
            0..=200 => Status::Ok,
            n => Status::ALL[usize::from(n) % Status::ALL.len()],
        };
        let done = self.disk.complete(at, status);
        // Layers below count what is in flight by these answers.
        assert!(self.backend.complete(done), "an answer was not taken");
        if self.choices.rarely() {
            assert!(!self.backend.complete(done), "an answer was taken twice");
        }
        self.answers();
    }

    fn grant(&mut self) {
        let gref = self.choices.below(GREFS);
        if self.table.find(gref).is_some() {
            let _ = self.table.end_access(gref);
            return;
        }
        let first = 1u32 << self.order;
        // A page that is not there, the ring itself, or the same page twice: all may be granted.
        let page = match self.choices.rarely() {
            true => self.choices.byte().into(),
            false => first + self.choices.below(DATA as u32),
        };
        self.table.grant(gref, page, self.choices.byte() % 8 == 0);
    }

    /// A byte anywhere in the guest's memory.
    fn scribble(&mut self) {
        let at = (self.choices.word() as usize) % self.memory.len();
        // Not the index that tells how many answers there are: the guest fools only itself.
        if !(REQ_PROD..RSP_EVENT + 4).contains(&at) {
            self.memory.write(at, &[self.choices.byte()]);
        }
    }

    /// Whatever was done, the backend lets go of everything soon.
    fn end(&mut self) {
        self.backend.stop();
        for _ in 0..400 {
            while !self.disk.held.is_empty() {
                let done = self.disk.complete(0, Status::Ok);
                assert!(self.backend.complete(done), "an answer was not taken");
            }
            self.now += 1 << 31;
            self.backend.poll(&mut self.disk, self.now);
            if self.backend.closed() {
                return;
            }
        }
        panic!("the backend does not come to an end");
    }
}
