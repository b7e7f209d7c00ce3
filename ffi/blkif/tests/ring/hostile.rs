//! A guest that does what it likes with its ring, its pages and its grants, beside one that
//! behaves.

use std::sync::atomic::Ordering;

use blkif::Abi;
use blkif::abi::{
    DISCARD, ERROR, FLUSH_DISKCACHE, Head, OKAY, PAGE, READ, REQ_EVENT, REQ_PROD, RSP_EVENT,
    RSP_PROD, Response, Segment, WRITE, WRITE_BARRIER,
};
use blkif::{RingMemory, Setup};
use block::{BlockQueue, Completions, Frontend as _, HasWork, Op, Status};

use crate::common::{DISK, GREF, PAGES, Pair, Raw, Rng, setup};

fn full(page: u32) -> u64 {
    Segment::new(GREF + page, 0, 7).0
}

#[test]
fn a_producer_that_runs_away_ends_the_ring_for_good() {
    for abi in Abi::ALL {
        for jump in [33u32, 1000, u32::MAX, 1 << 31] {
            let mut r = Raw::new(abi, |c| c.persistent_pages = 32);
            assert_eq!(r.one(Head::direct(READ, 1, 1, 0, full(0)), &[]).1, OKAY);
            r.disk.hold = true;
            r.put(Head::direct(READ, 1, 2, 0, full(0)), &[]);
            r.turn();
            let good = r.prod;
            r.memory.store32(REQ_PROD, good.wrapping_add(jump).wrapping_sub(1), Ordering::Release);
            r.turn();
            assert!(r.backend.broken());
            let stats = r.backend.stats();
            assert_eq!(stats.ring_stops.get(), 1);
            // Not even if the index becomes right again; and nothing is published any more.
            let published = r.memory.load32(RSP_PROD, Ordering::Relaxed);
            r.memory.store32(REQ_PROD, good.wrapping_add(1), Ordering::Release);
            r.disk.hold = false;
            assert!(r.run().is_empty());
            assert_eq!(r.memory.load32(RSP_PROD, Ordering::Relaxed), published);
            assert_eq!((stats.ring_stops.get(), r.backend.in_flight()), (1, 0));
            assert_eq!(r.backend.arm(), HasWork::No);
            assert!(!r.turn(), "it costs nothing any more");
            r.backend.stop();
            assert!(r.backend.closed());
        }
    }
}

#[test]
fn a_producer_that_runs_away_while_the_ring_sleeps() {
    let mut r = Raw::new(Abi::NATIVE, |_| {});
    r.memory.store32(REQ_PROD, 77, Ordering::Release);
    assert_eq!(r.backend.arm(), HasWork::No);
    assert!(r.backend.broken());
}

#[test]
fn what_the_guest_writes_into_the_shared_indices_does_not_matter() {
    let mut r = Raw::new(Abi::NATIVE, |_| {});
    for i in 0..200u64 {
        r.memory.store32(RSP_PROD, i as u32 * 7919, Ordering::Relaxed);
        r.memory.store32(REQ_EVENT, i as u32 * 104_729, Ordering::Relaxed);
        r.memory.store32(RSP_EVENT, i as u32 * 31, Ordering::Relaxed);
        r.put(Head::direct(READ, 1, i, 0, full(0)), &[]);
        for _ in 0..3 {
            r.turn();
        }
        assert_eq!(r.answers(), [Response { id: i, operation: READ, status: OKAY }]);
    }
}

#[test]
fn a_slot_rewritten_after_it_was_taken() {
    for persistent in [0, 32] {
        for count in [1u8, 3] {
            let mut r = Raw::new(Abi::NATIVE, |c| c.persistent_pages = persistent);
            r.region.write(r.page_at(0), &[0x77; PAGE]);
            r.disk.hold = true;
            r.put(Head::direct(WRITE, count, 5, 64, full(0)), &[full(0), full(0)]);
            r.turn();
            // Other operation, id, place and page; none of it is looked at.
            r.prod -= 1;
            r.put(Head::direct(READ, 11, 6, 8, full(9)), &[u64::MAX; 10]);
            r.disk.hold = false;
            assert_eq!(r.run(), [Response { id: 5, operation: WRITE, status: OKAY }]);
            assert_eq!(r.disk.bytes(64 * 512, PAGE), [0x77; PAGE]);
            assert_eq!(r.disk.log.len(), 1);
        }
    }
}

#[test]
fn a_turn_is_bounded_by_the_ring() {
    // A guest that fills the ring again in every turn gets one ring full a turn, and the
    // neighbour on the same disk its requests.
    let mut r = Raw::new(Abi::NATIVE, |c| c.persistent_pages = 32);
    let mut p = Pair::new(setup(Abi::NATIVE, 0, true));
    let mut out = Completions::new();
    for region in p.backend.regions() {
        r.disk.register(&region).unwrap();
    }
    r.disk.max_in_flight = 64;
    let mut served = 0;
    for turn in 0..500u64 {
        while r.prod.wrapping_sub(r.cons) < 32 {
            r.put(Head::direct(READ, 1, turn, 0, full(0)), &[]);
        }
        if p.frontend.in_flight() == 0 {
            p.frontend.read(turn, 0, 4096).unwrap();
            p.frontend.push();
        }
        out.clear();
        r.disk.poll(&mut out);
        let before = r.backend.stats().reads();
        for c in out.iter() {
            let backend = if c.tag.owner() == 1 { &mut r.backend } else { &mut p.backend };
            assert!(backend.complete(c));
        }
        r.backend.poll(&mut r.disk, turn * 1000);
        assert!(r.backend.stats().reads() - before <= 32);
        p.backend.poll(&mut r.disk, turn * 1000);
        r.answers();
        while p.frontend.reap(&mut []).unwrap().is_some() {
            served += 1;
        }
    }
    assert!(served > 150, "{served}");
}

/// What a hostile guest does next. Mostly what a good one would.
struct Attack {
    rng: Rng,
    ring: Raw,
    sent: u64,
    answered: u64,
}

fn attacked_ring(rng: &mut Rng) -> Raw {
    let abi = if rng.one_in(2) { Abi::X86_64 } else { Abi::X86_32 };
    let (persistent, order) = (rng.below(3) as u32 * 20, rng.below(3) as u8);
    let (barrier, flags) = (rng.one_in(2), rng.next());
    let mut r = Raw::new(abi, |c| {
        c.persistent_pages = persistent;
        c.order = order;
        c.barrier = barrier;
        c.large_buffers = 1 + (flags % 31) as u16;
        c.max_indirect_segments = [0, 1, 11, 32, 600][flags as usize / 64 % 5];
        c.no_space_timeout = Some(1_000_000_000);
        c.sector_size = if flags >> 30 & 7 != 0 { 512 } else { 4096 };
        c.read_only = flags >> 21 & 7 == 0;
        c.flush = flags >> 24 & 7 != 0;
        c.discard = flags >> 27 & 7 != 0;
    });
    r.disk.shuffle = Some(Rng(rng.next() | 1));
    if rng.one_in(3) {
        r.disk.max_in_flight = 1 + rng.below(20) as usize;
    }
    let mut faults = Rng(rng.next() | 1);
    if rng.one_in(2) {
        let size = DISK;
        r.disk.fail(move |s| {
            assert!(s.offset + s.len <= size, "outside the disk: {s:?}");
            faults.one_in(20).then(|| Status::ALL[faults.below(Status::ALL.len() as u64) as usize])
        });
    } else {
        r.disk.fail(|s| {
            assert!(s.offset + s.len <= DISK && (s.op == Op::Flush || s.len > 0));
            None
        });
    }
    let mut faults = Rng(rng.next() | 1);
    r.knobs.borrow_mut().fault =
        Some(Box::new(move |_| if faults.one_in(300) { -(faults.below(14) as i16) } else { 0 }));
    r
}

impl Attack {
    fn segment(&mut self) -> u64 {
        let (a, b) = (self.rng.below(8) as u8, self.rng.below(8) as u8);
        let s = Segment::new(GREF + self.rng.below(u64::from(PAGES)) as u32, a.min(b), a.max(b)).0;
        match self.rng.below(200) {
            0 => self.rng.next(),
            1 => s ^ 1 << self.rng.below(64),
            2 => full(0),
            _ => s,
        }
    }

    fn head(&mut self) -> Head {
        let rng = &mut self.rng;
        let sector = match rng.below(30) {
            0 => rng.next(),
            1 => DISK / 512 - rng.below(16),
            2 => u64::MAX - rng.below(16),
            _ => rng.below(DISK / 512 - 64) & !7,
        };
        let id = rng.below(5);
        let word = self.segment();
        let rng = &mut self.rng;
        match rng.below(24) {
            0..=7 => Head::direct(rng.below(2) as u8, 1, id, sector, word),
            8..=13 => Head::direct(rng.below(2) as u8, 1 + rng.below(11) as u8, id, sector, word),
            14..=16 => {
                let (op, n) = (rng.below(2) as u8, 1 + rng.below(40) as u16);
                Head::indirect(op, n, id, sector, GREF + rng.below(u64::from(PAGES)) as u32)
            }
            17 => Head::direct(FLUSH_DISKCACHE, rng.below(3) as u8, id, sector, word),
            18 => Head::direct(WRITE_BARRIER, rng.below(3) as u8, id, sector, word),
            19 => Head::direct(DISCARD, 0, id, sector, rng.below(1 << 14)),
            20 => Head::direct(DISCARD, 1, id, sector, rng.next()),
            21 => Head::direct(rng.next() as u8, rng.next() as u8, id, sector, word),
            22 => Head { first: rng.next() as u32, id, sector, word },
            _ => Head {
                first: rng.next() as u32,
                id: rng.next(),
                sector: rng.next(),
                word: rng.next(),
            },
        }
    }

    /// Does something, and lets some time pass.
    fn act(&mut self) {
        match self.rng.below(40) {
            0 => {
                // Gives a page back, perhaps in use, and grants another in its place.
                let page = self.rng.below(u64::from(PAGES)) as u32;
                if self.ring.table.end_access(GREF + page) && !self.rng.one_in(4) {
                    let order = self.ring.page_at(0) / PAGE;
                    let other = order as u32 + self.rng.below(u64::from(PAGES)) as u32;
                    self.ring.table.grant(GREF + page, other, self.rng.one_in(3));
                }
            }
            1 => {
                // A grant of pages that do not exist.
                let gref = GREF + self.rng.below(u64::from(PAGES)) as u32;
                if self.ring.table.end_access(gref) {
                    self.ring.table.grant(gref, self.rng.next() as u32 | 1 << 20, false);
                }
            }
            2 => {
                let mut knobs = self.ring.knobs.borrow_mut();
                knobs.maps_late = !knobs.maps_late;
            }
            3 => self.ring.now += self.rng.below(100_000_000_000),
            4..=8 => {
                // Writes anywhere in the ring but for the producer index.
                let bytes = self.ring.memory.bytes();
                let at = 4 + 4 * self.rng.below(bytes as u64 / 4 - 1) as usize;
                self.ring.memory.store32(at, self.rng.next() as u32, Ordering::Relaxed);
            }
            9..=14 => {
                // Segments, right ones and wrong ones, into a page.
                let page = self.rng.below(u64::from(PAGES)) as u32;
                for i in 0..64 {
                    let s = self.segment();
                    self.ring.region.write_words(self.ring.page_at(page) + 8 * i, &[s]);
                }
            }
            _ => {}
        }
        let open = self.ring.slots - self.ring.prod.wrapping_sub(self.ring.cons);
        for _ in 0..self.rng.below(u64::from(open) + 1) {
            let head = self.head();
            let tail: [u64; 10] = std::array::from_fn(|_| self.segment());
            self.ring.put(head, &tail);
            self.sent += 1;
        }
        self.ring.now += self.rng.below(200_000);
        self.ring.turn();
        // The producer of answers was perhaps overwritten: the truth is what the backend counts.
        let seen = self.ring.memory.load32(RSP_PROD, Ordering::Acquire);
        if seen.wrapping_sub(self.ring.cons) <= self.ring.slots {
            let n = u64::from(seen.wrapping_sub(self.ring.cons));
            self.answered += n;
            self.ring.cons = seen;
        }
    }
}

#[test]
fn random_attacks_hurt_nobody() {
    let mut rng = Rng(0x5eed);
    let good = Setup { max_segments: 32, ..setup(Abi::NATIVE, 0, true) };
    let mut p = Pair::new(good);
    let (mut served, mut all_sent, mut all_answered) = (0, 0, 0);
    let (mut all_ok, mut all_errors, mut stops) = (0, 0, 0);
    for _ in 0..100 {
        let ring = attacked_ring(&mut rng);
        let mut a = Attack { rng: Rng(rng.next() | 1), ring, sent: 0, answered: 0 };
        let stats = a.ring.backend.stats();
        for _ in 0..60 {
            a.act();
            // The neighbour, on the same thread.
            let data = [served as u8; 4096];
            assert_eq!(p.write(served % 1000 * 8, &data), OKAY);
            assert!(p.read(served % 1000 * 8, 4096).1 == data);
            served += 1;
        }
        all_sent += a.sent;
        all_ok += stats.read_bytes.get() / 4096;
        all_errors += stats.errors.get();
        all_answered += a.answered;
        // Then the end: whatever state it is in, it comes to one.
        if a.rng.one_in(4) {
            let jump = a.ring.prod.wrapping_add(a.ring.slots + 1 + a.rng.next() as u32 % 1000);
            a.ring.memory.store32(REQ_PROD, jump, Ordering::Release);
            a.ring.turn();
        }
        stops += stats.ring_stops.get();
        a.ring.knobs.borrow_mut().maps_late = false;
        a.ring.disk.fault = None;
        a.ring.knobs.borrow_mut().fault = None;
        a.ring.backend.stop();
        let mut turns = 0;
        while !a.ring.backend.closed() {
            a.ring.now += 1_000_000;
            a.ring.turn();
            turns += 1;
            assert!(turns < 5000, "it does not come to an end");
        }
        let table = a.ring.table.clone();
        drop(a);
        assert_eq!(table.mappings(), 0);
        assert!(stats.detached());
    }
    println!("{all_sent} sent, {all_answered} answered, {all_ok} pages read, {all_errors} errors");
    assert!(all_sent > 20_000 && all_ok > 4_000, "{all_sent} {all_ok}: the attack is too tame");
    assert!(stops > 8, "{stops}");
    let stats = p.backend.stats();
    assert_eq!((stats.errors.get(), stats.strays.get()), (0, 0));
}

#[test]
fn completions_that_belong_to_nothing_are_counted() {
    for (operation, pages) in [(READ, 0), (READ, 64), (WRITE, 0), (WRITE, 64)] {
        let mut r = Raw::new(Abi::NATIVE, |c| c.persistent_pages = pages);
        assert_eq!(r.one(Head::direct(READ, 1, 0, 0, full(0)), &[]).1, OKAY);
        r.disk.hold = true;
        r.put(Head::direct(operation, 1, 1, 0, full(0)), &[]);
        for _ in 0..3 {
            r.turn();
        }
        let real = r.disk.waiting[0];
        let tag = |slot, generation| block::Completion {
            tag: block::Tag::new(1, slot, generation),
            ..real
        };
        let stats = r.backend.stats();
        // Another generation, another slot, a slot that does not exist.
        let (slot, g) = (real.tag.slot(), real.tag.generation());
        let wrong = [
            tag(slot, g.wrapping_sub(1)),
            tag(slot, g.wrapping_add(1)),
            tag(slot ^ 1, g),
            tag(slot ^ 1, 0),
            tag(32, g),
            tag(u16::MAX, g),
        ];
        for (i, c) in wrong.into_iter().enumerate() {
            r.backend.complete(c);
            assert_eq!(stats.strays.get(), i as u64 + 1);
        }
        assert!(r.answers().is_empty());
        r.disk.hold = false;
        assert_eq!(r.run(), [Response { id: 1, operation, status: OKAY }]);
        // The real one a second time.
        r.backend.complete(real);
        assert_eq!(stats.strays.get(), wrong.len() as u64 + 1);
        assert!(r.run().is_empty());
        assert_eq!(r.one(Head::direct(WRITE, 1, 1, 1 << 40, full(0)), &[]).1, ERROR);
    }
}
