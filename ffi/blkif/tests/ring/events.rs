//! Who tells whom, and when: no event too few, and none that nobody wants.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blkif::abi::{OKAY, READ, Response};
use blkif::{Abi, BackRing, Backend, Config, Frontend, Setup, Signal};
use block::{BlockQueue, Completions, Frontend as _, HasWork, MemQueue};

use crate::common::{Pair, setup};

#[test]
fn a_polling_backend_gets_one_event_in_all() {
    for start in [0, u32::MAX - 100] {
        let mut p = Pair::new(Setup { start, ..setup(Abi::NATIVE, 0, true) });
        for i in 0..500u64 {
            p.frontend.write(i, i % 64 * 8, &[1; 4096]).unwrap();
            assert_eq!(p.one(), OKAY);
        }
        // The one that a fresh ring asks for.
        assert_eq!(p.frontend.events_sent(), 1);
    }
}

#[test]
fn answers_of_a_turn_are_one_event() {
    let mut p = Pair::new(setup(Abi::NATIVE, 0, true));
    let stats = p.backend.stats();
    for round in 1..=20u64 {
        for i in 0..32 {
            p.frontend.read(i, i * 8, 4096).unwrap();
        }
        p.frontend.push();
        p.turns(3);
        assert_eq!((stats.events.get(), p.events.count()), (round, round));
        while p.reap().is_some() {}
    }
    // A frontend that has not caught up is not told again.
    p.disk.hold = true;
    for i in 0..8 {
        p.frontend.read(i, i * 8, 4096).unwrap();
    }
    p.frontend.push();
    p.turn();
    p.disk.hold = false;
    p.turn();
    let (events, publishes) = (stats.events.get(), stats.publishes.get());
    for i in 0..8 {
        p.frontend.read(i, i * 8, 4096).unwrap();
    }
    p.frontend.push();
    p.turns(2);
    assert_eq!((stats.events.get(), stats.publishes.get()), (events, publishes + 1));
}

#[test]
fn an_armed_backend_gets_an_event_for_the_next_request() {
    let mut p = Pair::new(setup(Abi::NATIVE, 0, true));
    assert_eq!(p.write(0, &[1; 512]), OKAY);
    for i in 0..10 {
        p.turns(2);
        let before = p.frontend.events_sent();
        assert_eq!(p.backend.arm(), HasWork::No);
        p.frontend.write(1, i, &[1; 512]).unwrap();
        assert!(p.frontend.push());
        p.run();
        // Awake again: no more events.
        p.frontend.write(1, i, &[1; 512]).unwrap();
        assert!(!p.frontend.push());
        p.run();
        assert_eq!(p.frontend.events_sent(), before + 1);
    }
    // It did not fall asleep after all: no event either.
    let before = p.frontend.events_sent();
    assert_eq!(p.backend.arm(), HasWork::No);
    p.turn();
    p.frontend.write(1, 0, &[1; 512]).unwrap();
    assert!(!p.frontend.push());
    p.run();
    assert_eq!(p.frontend.events_sent(), before);
    // A request that came before is found by the last look.
    p.frontend.write(1, 0, &[1; 512]).unwrap();
    p.frontend.push();
    assert_eq!(p.backend.arm(), HasWork::Yes);
    assert_eq!(p.one(), OKAY);
}

/// A side that waits for an event, as one sleeps in the kernel: the count of events that it had
/// seen when it fell asleep, and one more; 0 while it is awake.
#[derive(Default)]
struct Bed(AtomicU64);

impl Bed {
    /// Waits until `mine` moves on from `seen`. False if that can never be: both sides wait, and
    /// no event is on its way to either.
    fn sleep(&self, mine: &Signal, seen: u64, other: &Bed, others: &Signal) -> bool {
        self.0.store(seen + 1, Ordering::SeqCst);
        for look in 0u64.. {
            let asleep = other.0.load(Ordering::SeqCst);
            let lost = asleep != 0 && others.count() == asleep - 1;
            if mine.count() != seen {
                self.0.store(0, Ordering::SeqCst);
                return true;
            }
            // Looked at again after `mine`: the other side slept all the while.
            if lost && other.0.load(Ordering::SeqCst) == asleep {
                return false;
            }
            if look % 64 == 63 {
                std::thread::yield_now();
            }
        }
        unreachable!("looked for ever")
    }
}

/// Both sides sleep whenever they may, on two threads.
#[test]
fn no_wake_up_is_lost() {
    const REQUESTS: u64 = 10_000;
    let to_backend = Signal::default();
    let to_frontend = Signal::default();
    let setup = Setup { max_segments: 1, ..setup(Abi::NATIVE, 0, true) };
    let mut frontend = Frontend::new(setup, to_backend.clone()).unwrap();
    let config = Config { persistent_pages: 64, ..Config::new(1, Abi::NATIVE, 0) };
    let (ring, grants) = (frontend.ring(), frontend.grants());
    let mut backend = Backend::new(config, ring, grants, to_frontend.clone()).unwrap();
    let stats = backend.stats();
    let (front_bed, back_bed) = (Bed::default(), Bed::default());
    let (naps, lost, done) = (AtomicU64::new(0), AtomicBool::new(false), AtomicBool::new(false));
    let over = |fine: bool| {
        naps.fetch_add(1, Ordering::Relaxed);
        if !fine {
            lost.store(!done.load(Ordering::SeqCst), Ordering::SeqCst);
            done.store(true, Ordering::SeqCst);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut disk = MemQueue::new(1 << 20, 512).unwrap();
            for region in backend.regions() {
                disk.register(&region).unwrap();
            }
            let mut out = Completions::new();
            let mut now = 0;
            while !done.load(Ordering::SeqCst) {
                let seen = to_backend.count();
                out.clear();
                disk.poll(&mut out);
                for c in out.iter() {
                    backend.complete(c);
                }
                now += 1000;
                let busy = backend.poll(&mut disk, now);
                let idle = !busy && disk.in_flight() == 0;
                if idle && backend.arm() == HasWork::No {
                    over(back_bed.sleep(&to_backend, seen, &front_bed, &to_frontend));
                }
            }
        });
        let (mut sent, mut got) = (0, 0);
        let mut depth = 1;
        while got < REQUESTS && !done.load(Ordering::SeqCst) {
            let seen = to_frontend.count();
            // Mostly few, so that both sides fall asleep often.
            while sent < REQUESTS && sent - got < depth && frontend.room() > 0 {
                frontend.read(sent, sent % 1000, 512).unwrap();
                sent += 1;
            }
            frontend.push();
            let before = got;
            while let Some(answer) = frontend.reap(&mut []).unwrap() {
                assert_eq!(answer.status, OKAY);
                got += 1;
            }
            depth = 1 + got % 7 * (got % 3);
            if got == before {
                over(front_bed.sleep(&to_frontend, seen, &back_bed, &to_backend));
            }
        }
        done.store(true, Ordering::SeqCst);
        // The backend may sleep now for good reason.
        front_bed.0.store(to_frontend.count() + 1, Ordering::SeqCst);
    });
    assert!(!lost.load(Ordering::SeqCst), "a wake-up was lost");
    assert_eq!(stats.reads(), REQUESTS);
    assert!(naps.load(Ordering::Relaxed) > 100, "they never slept, so this showed nothing");
}

/// The two last looks, at the very moment in which the other side publishes: one of the two must
/// notice the other. What is left of the fences without which this fails now and then.
#[test]
fn one_of_two_always_notices() {
    const ROUNDS: u64 = 40_000;
    let setup = Setup { max_segments: 1, start: u32::MAX - 1000, ..setup(Abi::NATIVE, 0, true) };
    let mut frontend = Frontend::new(setup, Signal::default()).unwrap();
    let mut ring = BackRing::attach(frontend.ring(), Abi::NATIVE, 0).unwrap();
    let (start, ended) = (AtomicU64::new(0), AtomicU64::new(0));
    let wait = |word: &AtomicU64, value: u64| {
        let mut looks = 0u32;
        while word.load(Ordering::Acquire) < value {
            looks += 1;
            if looks.is_multiple_of(512) {
                std::thread::yield_now();
            }
        }
    };
    let (worked, told) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                ring.disarm();
                wait(&start, 2 * round + 1);
                let work = ring.arm().unwrap();
                worked.store(work == HasWork::Yes, Ordering::Relaxed);
                ended.store(2 * round + 1, Ordering::Release);
                wait(&start, 2 * round + 2);
                assert_eq!(ring.waiting(), Ok(1));
                let head = ring.head();
                ring.take(&(), head, false);
                ring.respond(&(), Response { id: head.id, operation: READ, status: OKAY });
                told.store(ring.publish(), Ordering::Relaxed);
                ended.store(2 * round + 2, Ordering::Release);
            }
        });
        // The other thread hears of the start late; how late is tried out.
        let dawdle = |round: u64| {
            for i in 0..round % 400 {
                std::hint::black_box(i);
            }
        };
        for round in 0..ROUNDS {
            frontend.read(round, 0, 512).unwrap();
            start.store(2 * round + 1, Ordering::Release);
            dawdle(round);
            let event = frontend.push();
            wait(&ended, 2 * round + 1);
            assert!(
                event || worked.load(Ordering::Relaxed),
                "round {round}: nobody saw the request"
            );
            start.store(2 * round + 2, Ordering::Release);
            dawdle(round / 3);
            // Looks once more only if nothing was said.
            let answer = frontend.reap(&mut []).unwrap();
            wait(&ended, 2 * round + 2);
            if answer.is_none() {
                assert!(told.load(Ordering::Relaxed), "round {round}: nobody saw the answer");
                assert!(frontend.reap(&mut []).unwrap().is_some());
            }
            // The wish for the next event is that of the last look.
            assert_eq!(frontend.in_flight(), 0);
        }
    });
}

#[test]
fn an_idle_turn_does_nothing() {
    let mut p = Pair::new(setup(Abi::NATIVE, 0, true));
    assert_eq!(p.write(0, &[1; 4096]), OKAY);
    let publishes = p.backend.stats().publishes.get();
    for _ in 0..100 {
        assert!(!p.turn());
    }
    assert_eq!(p.backend.stats().publishes.get(), publishes);
}
