//! A device that answers anything: random registers, data, statuses, identifiers and phases.
//! Whatever it does, the driver neither panics nor hangs, and answers each request at most once;
//! and when the device falls silent, every request is answered in bounded time.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;

use block::{BlockQueue, Completions, Flags, Op, Request, Submit, Tag};
use dma::{PageSize, Region};
use nvme::{Bar, Controller, DmaMapper, Doorbell, Options, QueuePair, ResetError, State};
use nvme_model::HostMemory;
use nvme_spec::{AdminOpcode, Aqa, Cap, Cc, Cns, Cqe, Csts, Sqe, Status, offset};
use zerocopy::FromBytes;

use crate::common::{Layout, MS, Memory, SECOND};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    /// True once in `n`.
    fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len / 8).flat_map(|_| self.next().to_le_bytes()).collect();
        // Much of what a device says is zero.
        let keep = self.below(256) as u8;
        for b in &mut bytes {
            if self.0.rotate_left(u32::from(*b)) as u8 >= keep {
                *b = 0;
            }
        }
        bytes
    }
}

#[derive(Default)]
struct Ring {
    base: u64,
    size: u32,
    head: u32,
    phase: bool,
}

/// The device.
struct Noise {
    random: RefCell<Random>,
    memory: RefCell<Memory>,
    registers: RefCell<BTreeMap<u64, u32>>,
    csts: Cell<u32>,
    silent: Cell<bool>,
    /// By doorbell offset.
    rings: RefCell<BTreeMap<u64, Ring>>,
    /// How seldom it misbehaves.
    calm: u64,
}

#[derive(Clone)]
struct NoiseBar(Rc<Noise>);

struct NoiseBell(Rc<Noise>, u64);

impl Doorbell for NoiseBell {
    fn ring(&self, value: u32) {
        self.0.registers.borrow_mut().insert(self.1, value);
    }
}

impl Bar for NoiseBar {
    type Doorbell = NoiseBell;

    fn read32(&self, at: u64) -> u32 {
        match at {
            _ if self.0.silent.get() => u32::MAX,
            offset::CSTS => self.0.csts.get(),
            _ => self.0.registers.borrow().get(&at).copied().unwrap_or(0),
        }
    }

    fn read64(&self, at: u64) -> u64 {
        u64::from(self.read32(at)) | u64::from(self.read32(at + 4)) << 32
    }

    fn write32(&self, at: u64, value: u32) {
        self.0.registers.borrow_mut().insert(at, value);
    }

    fn write64(&self, at: u64, value: u64) {
        self.write32(at, value as u32);
        self.write32(at + 4, (value >> 32) as u32);
    }

    fn doorbell(&self, at: u64) -> Option<NoiseBell> {
        Some(NoiseBell(self.0.clone(), at))
    }

    fn function_reset(&self) -> Result<(), ResetError> {
        match self.0.random.borrow_mut().below(3) {
            0 => Ok(()),
            1 => Err(ResetError::Unsupported),
            _ => Err(ResetError::Failed("noise".to_owned())),
        }
    }

    fn bus_master_off(&self) -> Result<(), ResetError> {
        if self.0.random.borrow_mut().once_in(6) { Err(ResetError::Unsupported) } else { Ok(()) }
    }
}

impl Noise {
    fn new(seed: u64, calm: u64) -> Rc<Noise> {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let cap = Cap(0).with_css(1).with_mqes(1 + random.below(100)).with_to(random.below(4));
        let registers = BTreeMap::from([
            (offset::CAP, cap.0 as u32),
            (offset::CAP + 4, (cap.0 >> 32) as u32),
            (
                offset::VS,
                0x1_0000 + 0x1_0000 * random.below(2) as u32 + (random.below(5) << 8) as u32,
            ),
        ]);
        Rc::new(Noise {
            random: RefCell::new(random),
            memory: RefCell::new(Memory::new(Layout::Contiguous)),
            registers: RefCell::new(registers),
            csts: Cell::new(0),
            silent: Cell::new(false),
            rings: RefCell::default(),
            calm,
        })
    }

    fn register(&self, at: u64) -> u32 {
        self.registers.borrow().get(&at).copied().unwrap_or(0)
    }

    fn step(&self) {
        let cc = Cc(self.register(offset::CC));
        let r = &mut *self.random.borrow_mut();
        if self.silent.get() || r.once_in(3) {
            return;
        }
        let mut csts = Csts(0).with_rdy(cc.en()).with_shst(if cc.shn() != 0 { 2 } else { 0 });
        if r.once_in(self.calm * 40) {
            csts = Csts(r.next() as u32);
        }
        self.csts.set(csts.0);
        if cc.en() == 0 {
            self.rings.borrow_mut().clear();
            return;
        }
        let rings = &mut *self.rings.borrow_mut();
        let (sq0, cq0) = (offset::DOORBELLS, offset::DOORBELLS + 4);
        if !rings.contains_key(&sq0) {
            let aqa = Aqa(self.register(offset::AQA));
            let base = |at| u64::from(self.register(at)) | u64::from(self.register(at + 4)) << 32;
            let (asq, acq) = (base(offset::ASQ), base(offset::ACQ));
            rings.insert(sq0, Ring { base: asq, size: aqa.asqs() + 1, ..Ring::default() });
            rings.insert(cq0, Ring { base: acq, size: aqa.acqs() + 1, head: 0, phase: true });
        }
        let tails: Vec<u64> = rings.keys().copied().filter(|k| k % 8 == 0).collect();
        for sq in tails {
            for _ in 0..r.below(5) {
                let tail = self.register(sq);
                let Some(ring) = rings.get_mut(&sq) else { break };
                if ring.head == tail % ring.size {
                    break;
                }
                let at = ring.base + u64::from(ring.head) * 64;
                ring.head = (ring.head + 1) % ring.size;
                let mut bytes = [0; 64];
                if self.memory.borrow_mut().read(at, &mut bytes).is_err() {
                    break;
                }
                let sqe = Sqe::read_from_bytes(&bytes).unwrap();
                self.answer(r, rings, sq, &sqe);
            }
            if r.once_in(self.calm * 10) {
                let cid = r.next() as u16;
                self.post(r, rings, sq + 4, cid);
            }
        }
    }

    fn answer(&self, r: &mut Random, rings: &mut BTreeMap<u64, Ring>, sq: u64, sqe: &Sqe) {
        if sq == offset::DOORBELLS {
            let size = sqe.queue_entries();
            let at = offset::DOORBELLS + 8 * u64::from(sqe.queue_id());
            match AdminOpcode::from_code(sqe.opcode()) {
                Some(AdminOpcode::CreateIoCq) => {
                    let base = sqe.prp1.get();
                    rings.insert(at + 4, Ring { base, size, head: 0, phase: true });
                }
                Some(AdminOpcode::CreateIoSq) => {
                    let base = sqe.prp1.get();
                    rings.insert(at, Ring { base, size, ..Ring::default() });
                }
                Some(AdminOpcode::DeleteIoSq) => drop(rings.remove(&at)),
                Some(AdminOpcode::DeleteIoCq) => drop(rings.remove(&(at + 4))),
                Some(AdminOpcode::Identify | AdminOpcode::GetLogPage) => {
                    let mut data = r.bytes(4096);
                    self.soothe(r, sqe, &mut data);
                    let _ = self.memory.borrow_mut().write(sqe.prp1.get(), &data);
                }
                Some(AdminOpcode::AsyncEventRequest) if !r.once_in(8) => return,
                _ => {}
            }
        }
        if r.once_in(self.calm * 4) {
            return;
        }
        let cid = if r.once_in(self.calm * 2) { r.next() as u16 } else { sqe.cid() };
        self.post(r, rings, sq + 4, cid);
        if r.once_in(self.calm * 2) {
            self.post(r, rings, sq + 4, cid);
        }
    }

    /// Makes random Identify data so plausible that it is not always refused at once.
    fn soothe(&self, r: &mut Random, sqe: &Sqe, data: &mut [u8]) {
        if r.once_in(self.calm) {
            return;
        }
        match Cns::from_code(sqe.dword(0) as u8) {
            Some(Cns::Controller) => {
                data[4..64].fill(b'x');
                data[77] = 1 + (r.below(4)) as u8;
                data[111] = 1;
                data[512..514].copy_from_slice(&[0x66, 0x44]);
                data[520] = 0x0c;
            }
            Some(Cns::ActiveNamespaces) => {
                data.fill(0);
                data[0] = 1;
                data[4] = 2;
            }
            Some(Cns::Namespace) => {
                data[..8].copy_from_slice(&(1u64 << 20).to_le_bytes());
                data[25..30].copy_from_slice(&[0, 0, 0, 0, 0]);
                data[128..132].copy_from_slice(&[0, 0, 9 + 3 * r.below(2) as u8, 0]);
            }
            _ => {}
        }
    }

    fn post(&self, r: &mut Random, rings: &mut BTreeMap<u64, Ring>, cq: u64, cid: u16) {
        let Some(ring) = rings.get_mut(&cq) else { return };
        let raw = if r.once_in(self.calm) { r.next() as u16 & 0x7fff } else { 0 };
        let phase = ring.phase ^ r.once_in(self.calm * 20);
        let result = r.next() as u32;
        let cqe = Cqe::new(result, r.next() as u16, 1, cid, Status::from_raw(raw), phase);
        let at = ring.base + u64::from(ring.head) * 16;
        let _ = self.memory.borrow_mut().write_cqe(at, &cqe);
        ring.head = (ring.head + 1) % ring.size;
        ring.phase ^= ring.head == 0;
    }
}

/// What the host does with it.
struct Host {
    device: Rc<Noise>,
    controller: Controller<NoiseBar>,
    queue: Option<QueuePair<NoiseBar>>,
    data: Arc<Region>,
    out: Completions,
    waiting: HashSet<Tag>,
    sent: u32,
    answered: u64,
}

impl Host {
    fn submit(&mut self, r: &mut Random) {
        let Some(queue) = &mut self.queue else { return };
        let ops =
            [Op::Read, Op::Write, Op::Read, Op::Write, Op::Flush, Op::WriteZeroes, Op::Discard];
        let op = ops[r.below(7) as usize];
        let mut segs = Vec::new();
        if matches!(op, Op::Read | Op::Write) {
            for _ in 0..=r.below(4) {
                let at = r.below(64) * 512;
                segs.push(self.data.seg(at, 512 * (1 + r.below(40)) as u32).unwrap());
            }
        }
        let moved: u64 = segs.iter().map(|s| u64::from(s.len())).sum();
        let len = if segs.is_empty() { r.below(1000) * 4096 } else { moved };
        self.sent += 1;
        let tag = Tag::new(3, 0, self.sent);
        let (unit, offset) = (r.below(3) as u16, r.below(1 << 12) * 4096);
        let request = Request { tag, op, flags: Flags::NONE, unit, offset, len, segs: &segs };
        if queue.submit(&request).is_ok() {
            self.waiting.insert(tag);
        }
    }

    fn turn(&mut self, now: u64) {
        self.device.step();
        self.controller.step(now);
        if let Some(queue) = &mut self.queue {
            queue.set_now(now);
            self.out.clear();
            queue.poll(&mut self.out);
            for c in self.out.iter() {
                assert!(self.waiting.remove(&c.tag), "{:?} was answered twice", c.tag);
                self.answered += 1;
            }
            assert_eq!(queue.in_flight(), self.waiting.len());
        }
    }
}

/// Returns whether it was ready, and how many requests were answered before it fell silent.
fn run(seed: u64, calm: u64) -> (bool, u64) {
    let device = Noise::new(seed, calm);
    let mapper: Arc<dyn DmaMapper> = Arc::new(device.memory.borrow().clone());
    let options = Options { io_queues: 2, queue_entries: 16, command_timeout: 2 * SECOND };
    let Ok(controller) = Controller::new(NoiseBar(device.clone()), mapper, options) else {
        return (false, 0);
    };
    let data = Region::new(64 << 10, PageSize::Small).unwrap();
    let mut host = Host {
        device,
        controller,
        queue: None,
        data,
        out: Completions::new(),
        waiting: HashSet::new(),
        sent: 0,
        answered: 0,
    };
    let mut r = Random(seed | 1);
    let (mut now, mut ready) = (0, false);
    for _ in 0..3000 {
        now += r.below(40) * MS;
        host.turn(now);
        if host.controller.state() == State::Ready {
            ready = true;
            if host.queue.is_none()
                && let Ok(mut queue) = host.controller.start_queue_pair()
            {
                queue.register(&host.data).unwrap();
                host.queue = Some(queue);
            }
        }
        for _ in 0..r.below(6) {
            host.submit(&mut r);
        }
        if r.once_in(500) && host.controller.state() == State::Failed {
            host.controller.restart();
        }
    }
    let answered = host.answered;
    host.device.silent.set(true);
    let end = now + 300 * SECOND;
    while host.controller.state() != State::Failed || !host.waiting.is_empty() {
        now += 10 * MS;
        host.turn(now);
        assert!(now < end, "{seed}: {} requests hang: {:?}", host.waiting.len(), host.controller);
    }
    (ready, answered)
}

#[test]
fn whatever_a_device_says() {
    let (mut ready, mut answered) = (0, 0);
    for seed in 1..=120 {
        // From mad to nearly well.
        let (was, n) = run(seed, [2, 8, 30, 200][seed as usize % 4]);
        ready += u32::from(was);
        answered += n;
    }
    // The test means nothing if the driver never got anywhere.
    assert!(ready > 40 && answered > 20_000, "{ready} ready, {answered} answered");
}
