//! Backends that die in the middle of their work, and others that take the ring up: each request is
//! answered once, and what was answered is there.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use blkif::abi::{OKAY, REQ_PROD};
use blkif::{
    Abi, Backend, Config, Frontend, KeptRing, LocalGrants, RegionRing, RingMemory, Signal,
};
use block::{BlockQueue, Completions, Frontend as _};
use dma::{PageSize, Region};

use crate::common::{Disk, Rng, setup};

const DISK: u64 = 1 << 20;
const IDENTITY: u64 = 77;
/// Where a record counts requests, and responses.
const AT_CONS: usize = 20;
const AT_PUBLISHED: usize = 24;

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
        let frontend = Frontend::new(setup(abi, order, persistent), Signal::default()).unwrap();
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
    let slots = w.config.abi.slots(w.config.order) as usize;
    let (at_cons, answer) = (AT_CONS, |slot: usize| 64 + 8 * slot);
    let place = |slot: usize| 64 + 8 * slots + 128 * slot;
    assert_eq!(w.record.load32(at_cons, Relaxed), 3);
    let last = w.record.read_words::<16>(place(2));
    w.record.write_words(place(9), &last);
    w.record.write_words(answer(9), &w.record.read_words::<1>(answer(2)));
    w.record.write_words(answer(2), &[0]);
    w.record.store32(at_cons, 2, Relaxed);
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
    let state = 64 + 32;
    assert_eq!(w.record.load32(state, Relaxed), 1);
    w.record.store32(state, 0, Relaxed);
    let refused = make(IDENTITY).map(drop).expect_err("a request without a slot").to_string();
    assert!(refused.contains("contradicts itself"), "{refused}");
    let ring = w.frontend.ring();
    let index = ring.load32(REQ_PROD, Relaxed);
    assert_eq!(index, 1);
    assert!(make(IDENTITY + 1).is_ok(), "begun anew");
}
