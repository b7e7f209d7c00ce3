//! Backends that die in the middle of their work, and others that take the ring up: each request is
//! answered once, and what was answered is there.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, Ordering};

use blkif::abi::{Head, OKAY, REQ_PROD};
use blkif::{
    Abi, Backend, Config, Frontend, Kept, KeptRing, LocalGrants, RegionRing, RingMemory, Setup,
    Signal,
};
use block::{BlockQueue, Completions, Frontend as _};
use dma::{PageSize, Region};

use crate::common::{Disk, Rng, setup};

const DISK: u64 = 1 << 20;
const IDENTITY: u64 = 77;
/// Where a record counts requests, and responses.
const AT_CONS: usize = 20;
const AT_PUBLISHED: usize = 24;
/// Where what it says of a slot begins, and in that its state.
const fn entry(slot: usize) -> usize {
    64 + 128 * slot
}
const AT_STATE: usize = 32;
/// The first and last sector of its segment.
const AT_SECTORS: usize = 28;

type KeptBackend = Backend<KeptRing<RegionRing>, LocalGrants, Signal>;

struct World {
    frontend: Frontend<Signal>,
    config: Config,
    record: Arc<Region>,
    disk: Disk,
    now: u64,
    rng: Rng,
    /// Requests that were taken and not counted when a backend died.
    uncounted: u64,
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng(seed | 1);
        let abi = if rng.one_in(2) { Abi::X86_64 } else { Abi::X86_32 };
        let (order, persistent) = (rng.below(2) as u8, rng.one_in(2));
        // Some rings' indices wrap.
        let start = if rng.one_in(2) { 0 } else { 0u32.wrapping_sub(rng.below(200) as u32) };
        let setup = Setup { start, ..setup(abi, order, persistent) };
        let frontend = Frontend::new(setup, Signal::default()).unwrap();
        let mut config = Config::new(3, abi, order);
        config.large_buffers = 1 + rng.below(8) as u16;
        if persistent {
            config.persistent_pages = [8, config.usual_persistent_pages()][rng.below(2) as usize];
        }
        let bytes = KeptRing::<RegionRing>::record_bytes(abi, order);
        let record = Region::new(bytes.next_multiple_of(4096), PageSize::Small).unwrap();
        let mut disk = Disk::new(DISK);
        disk.shuffle = Some(Rng((seed * 3) | 1));
        World { frontend, config, record, disk, now: 1, rng, uncounted: 0 }
    }

    /// A backend that begins, or goes on.
    fn backend(&mut self) -> KeptBackend {
        let (abi, order) = (self.config.abi, self.config.order);
        let ring = KeptRing::new(self.frontend.ring(), self.record.clone(), abi, order, IDENTITY);
        let grants = self.frontend.grants();
        let made = Backend::new(self.config.clone(), ring, grants, Signal::default());
        let backend = made.unwrap();
        for region in backend.regions() {
            self.disk.register(&region).unwrap();
        }
        // What the one before had sent has ended somehow; nobody hears of it.
        self.disk.shuffle = None;
        let mut out = Completions::new();
        while self.disk.in_flight() > 0 {
            out.clear();
            self.disk.poll(&mut out);
        }
        self.disk.shuffle = Some(Rng(self.rng.next() | 1));
        backend
    }

    /// A turn; or a part of one, after which the backend dies.
    fn turn(&mut self, backend: &mut KeptBackend, dies: bool) {
        let mut out = Completions::new();
        self.disk.poll(&mut out);
        for (n, c) in out.iter().enumerate() {
            if dies && n > 0 && self.rng.one_in(3) {
                return;
            }
            backend.complete(c);
        }
        self.now += 10_000;
        if !dies || self.rng.one_in(2) {
            self.disk.max_in_flight = self.rng.below(12) as usize + 1;
            let before = [AT_CONS, AT_PUBLISHED].map(|at| self.record.load32(at, Relaxed));
            backend.poll(&mut self.disk, self.now);
            let uncounted = self.record.load32(AT_CONS, Relaxed).wrapping_sub(before[0]);
            if dies && self.record.load32(AT_PUBLISHED, Relaxed) == before[1] && self.rng.one_in(2)
            {
                // It died when all that it took was written down, and not counted.
                self.uncounted += u64::from(uncounted);
                self.record.store32(AT_CONS, before[0], Relaxed);
            }
        }
    }
}

#[test]
fn what_a_dead_backend_took_the_next_one_does() {
    let (mut deaths, mut answered, mut taken_up, mut uncounted) = (0, 0, 0, 0);
    for seed in 1..300 {
        let mut w = World::new(seed);
        let mut backend = w.backend();
        // By block of 4 KiB: what it holds if nothing is under way.
        let mut model = vec![0u8; (DISK / 4096) as usize];
        let mut busy = vec![false; model.len()];
        let mut sent: Vec<Option<(usize, usize, u8, bool)>> = Vec::new();
        let (mut open, mut buffer) = (0, vec![0; 32 * 4096]);
        for step in 0..600 {
            if step < 500 && w.rng.one_in(2) {
                let most = if w.rng.one_in(4) { 20 } else { 2 };
                let count = 1 + w.rng.below(most) as usize;
                let first = w.rng.below((model.len() - count) as u64) as usize;
                let range = first..first + count;
                if !busy[range.clone()].iter().any(|&b| b) {
                    let (cookie, sector) = (sent.len() as u64, first as u64 * 8);
                    let write = w.rng.one_in(2);
                    let byte = w.rng.next() as u8;
                    let done = match write {
                        true => w.frontend.write(cookie, sector, &vec![byte; count * 4096]),
                        false => w.frontend.read(cookie, sector, count as u32 * 4096),
                    };
                    if done.is_ok() {
                        busy[range].fill(true);
                        sent.push(Some((first, count, byte, write)));
                        open += 1;
                    }
                }
                if w.rng.one_in(2) {
                    w.frontend.push();
                }
            }
            if step == 500 {
                w.frontend.push();
            }
            let dies = w.rng.one_in(40);
            w.turn(&mut backend, dies);
            if dies {
                deaths += 1;
                drop(backend);
                backend = w.backend();
                taken_up += u64::from(!backend.is_quiet(w.now));
            }
            while let Some(done) = w.frontend.reap(&mut buffer).unwrap() {
                assert_eq!(done.status, OKAY, "seed {seed}");
                let request = sent[done.cookie as usize].take();
                let (first, count, byte, write) = request.expect("each is answered once");
                for n in first..first + count {
                    let block = &buffer[(n - first) * 4096..][..4096];
                    match write {
                        true => model[n] = byte,
                        false => assert!(block.iter().all(|&b| b == model[n]), "seed {seed}"),
                    }
                    busy[n] = false;
                }
                (open, answered) = (open - 1, answered + 1);
            }
        }
        assert_eq!(open, 0, "seed {seed}: some are never answered");
        uncounted += w.uncounted;
        for (n, &byte) in model.iter().enumerate() {
            assert!(w.disk.bytes(n as u64 * 4096, 4096).iter().all(|&b| b == byte), "seed {seed}");
        }
    }
    assert!(uncounted > 100, "{uncounted}");
    assert!(deaths > 1000 && taken_up > 300 && answered > 10_000, "{deaths} {taken_up} {answered}");
}

/// A backend dies when it has written a request down and not counted it: it stays in the ring, where the
/// next one takes it. The one after that finds it once.
#[test]
fn a_request_that_was_not_counted() {
    let mut w = World::new(5);
    let mut backend = w.backend();
    for n in 0..3 {
        w.frontend.write(n, 8 * n, &[1 + n as u8; 4096]).unwrap();
    }
    w.frontend.push();
    backend.poll(&mut w.disk, 1);
    drop(backend);
    // As if it had died in the middle of the third, in a slot that the next one gives to another.
    let cons = w.record.load32(AT_CONS, Relaxed);
    let taken = |slot| w.record.load32(entry(slot) + AT_STATE, Relaxed) == 1;
    assert_eq!([0, 1, 2, 9].map(taken), [true, true, true, false]);
    let last = w.record.read_words::<16>(entry(2));
    w.record.write_words(entry(9), &last);
    w.record.store32(entry(2) + AT_STATE, 0, Relaxed);
    w.record.store32(AT_CONS, cons.wrapping_sub(1), Relaxed);
    for _ in 0..4 {
        let mut backend = w.backend();
        backend.poll(&mut w.disk, 1);
    }
    let mut backend = w.backend();
    let (mut answers, mut buffer) = (0, vec![0; 4096]);
    for _ in 0..20 {
        w.turn(&mut backend, false);
        while let Some(done) = w.frontend.reap(&mut buffer).unwrap() {
            assert_eq!(done.status, OKAY);
            answers += 1;
        }
    }
    assert_eq!(answers, 3);
}

/// A backend dies between an answer and the event for it.
#[test]
fn the_guest_is_told_of_what_was_answered() {
    let mut w = World::new(5);
    let mut backend = w.backend();
    w.frontend.write(0, 0, &[1; 4096]).unwrap();
    w.frontend.push();
    for _ in 0..4 {
        w.turn(&mut backend, false);
    }
    drop(backend);
    let ring =
        KeptRing::new(w.frontend.ring(), w.record.clone(), w.config.abi, w.config.order, IDENTITY);
    let event = Signal::default();
    let next = Backend::new(w.config.clone(), ring, w.frontend.grants(), event.clone()).unwrap();
    assert_eq!((event.count(), next.drained()), (1, true), "it may not know");
}

/// A record of another ring is not this one's, and one that makes no sense is refused.
#[test]
fn records_that_do_not_fit() {
    let mut w = World::new(5);
    let mut backend = w.backend();
    w.frontend.read(1, 0, 4096).unwrap();
    w.frontend.push();
    backend.poll(&mut w.disk, 1);
    drop(backend);
    let (abi, order) = (w.config.abi, w.config.order);
    let make = |identity| {
        let ring = KeptRing::new(w.frontend.ring(), w.record.clone(), abi, order, identity);
        Backend::new(w.config.clone(), ring, w.frontend.grants(), Signal::default())
    };
    // Taken: counted, and its slot says so.
    let state = entry(0) + AT_STATE;
    assert_eq!(w.record.load32(state, Relaxed), 1);
    w.record.store32(state, 0, Relaxed);
    let refused = make(IDENTITY).map(drop).expect_err("a request without a slot").to_string();
    assert!(refused.contains("contradicts itself"), "{refused}");
    let ring = w.frontend.ring();
    assert_eq!(ring.load32(REQ_PROD, Relaxed), w.record.load32(AT_CONS, Relaxed));
    assert!(make(IDENTITY + 1).is_ok(), "begun anew");
}

/// Answers come in any order, so a request may be the last to be answered of many more than the ring
/// holds. It is found, and before younger ones.
#[test]
fn a_request_that_all_others_overtake() {
    let mut w = World::new(5);
    let mut backend = w.backend();
    (w.disk.shuffle, w.disk.max_in_flight) = (None, 64);
    w.frontend.write(0, 0, &[1; 4096]).unwrap();
    w.frontend.push();
    // Copied in, then sent.
    for _ in 0..2 {
        backend.poll(&mut w.disk, 1);
    }
    let (mut out, mut buffer) = (Completions::new(), vec![0; 4096]);
    // Its end is not heard of.
    assert_eq!(w.disk.poll(&mut out), 1);
    let slots = u64::from(w.config.abi.slots(w.config.order));
    for n in 1..=3 * slots {
        w.frontend.write(n, 8 * (n % 50 + 1), &[2; 4096]).unwrap();
        w.frontend.push();
        for _ in 0..4 {
            w.turn(&mut backend, false);
        }
        assert_eq!(w.frontend.reap(&mut buffer).unwrap().map(|done| done.cookie), Some(n));
    }
    w.frontend.write(1000, 8 * 100, &[3; 4096]).unwrap();
    w.frontend.push();
    backend.poll(&mut w.disk, 1);
    drop(backend);
    let mut backend = w.backend();
    w.disk.log.clear();
    w.disk.shuffle = None;
    for _ in 0..10 {
        w.turn(&mut backend, false);
    }
    let again: Vec<u64> = w.disk.log.iter().map(|sent| sent.offset).collect();
    assert_eq!(again, [0, 100 * 4096], "the oldest first");
    let answered = [(); 3].map(|()| w.frontend.reap(&mut buffer).unwrap().map(|done| done.cookie));
    assert_eq!(answered, [Some(0), Some(1000), None]);
}

/// Whoever takes a ring up and is stopped at once answers all that the one before took.
#[test]
fn what_a_dead_backend_took_is_answered_before_the_end() {
    let mut w = World::new(5);
    w.config.large_buffers = 8;
    let mut backend = w.backend();
    w.disk.max_in_flight = 64;
    for n in 0..5 {
        w.frontend.write(n, 16 * n, &[1 + n as u8; 8192]).unwrap();
    }
    w.frontend.push();
    for _ in 0..2 {
        backend.poll(&mut w.disk, 1);
    }
    drop(backend);
    // Not all at once.
    w.config.large_buffers = 1;
    let mut backend = w.backend();
    backend.stop();
    let mut turns = 0;
    while !backend.closed() {
        w.turn(&mut backend, false);
        turns += 1;
        assert!(turns < 500, "it does not end");
    }
    let (mut answers, mut buffer) = (0, vec![0; 8192]);
    while let Some(done) = w.frontend.reap(&mut buffer).unwrap() {
        assert_eq!(done.status, OKAY);
        answers += 1;
    }
    assert_eq!(answers, 5);
}

/// A request of a page whose pages are not mapped: its segment is in the record alone while it is at the
/// disk. Whatever becomes of it there, it is one page that is copied.
#[test]
fn a_segment_that_was_damaged_in_flight_is_still_a_page() {
    for sectors in [200 << 8, 9 | 3 << 8, 0xffff] {
        let fits = |w: &World| w.config.abi == Abi::X86_64 && w.config.persistent_pages == 0;
        let mut w = (1..).map(World::new).find(fits).unwrap();
        let mut backend = w.backend();
        let mut buffer = vec![0; 4096];
        w.frontend.write(1, 0, &[7; 4096]).unwrap();
        for cookie in 1..3 {
            w.frontend.push();
            w.disk.max_in_flight = 64;
            for _ in 0..4 {
                // Until it is at the disk, as the write is one turn later.
                backend.poll(&mut w.disk, 1);
            }
            assert_eq!(w.disk.in_flight(), 1);
            let taken = |&slot: &usize| w.record.load32(entry(slot) + AT_STATE, Relaxed) == 1;
            let slot = (0..32).find(taken).unwrap();
            w.record.store32(entry(slot) + AT_SECTORS, sectors, Relaxed);
            for _ in 0..4 {
                w.turn(&mut backend, false);
            }
            let done = w.frontend.reap(&mut buffer).unwrap().unwrap();
            assert_eq!((done.cookie, done.status), (cookie, OKAY), "{sectors:#x}");
            w.frontend.read(2, 0, 4096).unwrap();
        }
        assert_eq!(buffer, [7; 4096]);
    }
}

/// A record whose backend dies at its so many'th step: between any two of them, that is.
struct Dying {
    inner: KeptRing<RegionRing>,
    steps: Arc<AtomicU32>,
}

impl Dying {
    fn step(&self) -> &KeptRing<RegionRing> {
        let left = self.steps.load(Relaxed);
        assert!(left > 0, "it dies");
        self.steps.store(left - 1, Relaxed);
        &self.inner
    }
}

impl RingMemory for Dying {
    const KEEPS: bool = true;

    type Entry = <KeptRing<RegionRing> as RingMemory>::Entry;

    fn entry(&self, slot: u16) -> Self::Entry {
        self.inner.entry(slot)
    }

    fn bytes(&self) -> usize {
        self.inner.bytes()
    }

    fn mask(&self) -> u32 {
        self.inner.mask()
    }

    fn load32(&self, offset: usize, order: Ordering) -> u32 {
        self.inner.load32(offset, order)
    }

    fn store32(&self, offset: usize, value: u32, order: Ordering) {
        self.step().store32(offset, value, order);
    }

    fn load64s<const N: usize>(&self, offset: usize) -> [u64; N] {
        self.inner.load64s(offset)
    }

    fn store64s<const N: usize>(&self, offset: usize, words: &[u64; N]) {
        self.step().store64s(offset, words);
    }

    fn keep(&self, entry: &Self::Entry, index: u32, head: Head, tail: Option<[u64; 10]>) {
        self.step().keep(entry, index, head, tail);
    }

    fn counted(&self, index: u32) {
        self.step().counted(index);
    }

    fn answered(&self, entry: &Self::Entry, index: u32) {
        self.step().answered(entry, index);
    }

    fn publishing(&self, index: u32) {
        self.step().publishing(index);
    }

    fn kept(&self) -> Result<Option<Kept>, &'static str> {
        self.inner.kept()
    }

    fn kept_request(&self, entry: &Self::Entry) -> (Head, [u64; 10]) {
        self.inner.kept_request(entry)
    }

    fn kept_id(entry: &Self::Entry) -> u64 {
        KeptRing::<RegionRing>::kept_id(entry)
    }

    fn kept_segment(entry: &Self::Entry) -> u64 {
        KeptRing::<RegionRing>::kept_segment(entry)
    }
}

/// Death at each step in turn. Whoever comes next gets a step more, so that it ends.
#[test]
fn a_backend_that_dies_at_any_step() {
    let mut died = 0;
    for (seed, most) in (1..5).flat_map(|seed| (2..40).map(move |most| (seed, most))) {
        let mut w = World::new(seed);
        w.disk.shuffle = None;
        let (mut seen, mut buffer, mut turns) = ([0; 12], vec![0; 8192], 0);
        let mut before = 0;
        for n in 0..12 {
            match n % 4 {
                3 => w.frontend.flush(n, 0, &[]).unwrap(),
                2 => w.frontend.read(n, 100, 8192).unwrap(),
                _ => w.frontend.write(n, 16 * n, &vec![1 + n as u8; 4096 << (n % 2)]).unwrap(),
            }
        }
        w.frontend.push();
        while seen.contains(&0) {
            let kept = KeptRing::new(
                w.frontend.ring(),
                w.record.clone(),
                w.config.abi,
                w.config.order,
                IDENTITY,
            );
            let steps = Arc::new(AtomicU32::new(most + before));
            let ring = Dying { inner: kept, steps: steps.clone() };
            let (config, grants) = (w.config.clone(), w.frontend.grants());
            let mut backend = Backend::new(config, ring, grants, Signal::default()).unwrap();
            for region in backend.regions() {
                w.disk.register(&region).unwrap();
            }
            let mut out = Completions::new();
            while w.disk.in_flight() > 0 {
                out.clear();
                w.disk.poll(&mut out);
            }
            let lives = catch_unwind(AssertUnwindSafe(|| {
                while turns < 10_000 && w.frontend.in_flight() > 0 {
                    out.clear();
                    w.disk.poll(&mut out);
                    backend.complete_run(out.as_slice());
                    w.now += 10_000;
                    backend.poll(&mut w.disk, w.now);
                    turns += 1;
                    while let Some(done) = w.frontend.reap(&mut buffer).unwrap() {
                        assert_eq!(done.status, OKAY);
                        seen[done.cookie as usize] += 1;
                    }
                }
            }));
            (died, before) = (died + u32::from(lives.is_err()), before + 1);
            assert!(lives.is_ok() || steps.load(Relaxed) == 0, "it panics by itself");
            while let Some(done) = w.frontend.reap(&mut buffer).unwrap() {
                assert_eq!(done.status, OKAY);
                seen[done.cookie as usize] += 1;
            }
            assert!(turns < 10_000, "seed {seed}, {most} steps: {seen:?}");
        }
        assert_eq!(seen, [1; 12], "seed {seed}, {most} steps");
        for n in (0..12).filter(|n| n % 4 < 2) {
            let written = w.disk.bytes(16 * 512 * n, 4096 << (n % 2));
            assert!(written.iter().all(|&b| b == 1 + n as u8), "seed {seed}, {most} steps");
        }
    }
    assert!(died > 200, "{died}");
}
