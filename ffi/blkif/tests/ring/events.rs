//! Who tells whom, and when: no event too few, and none that nobody wants.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blkif::abi::OKAY;
use blkif::{Abi, Backend, Config, Frontend, Setup, Signal};
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
    // A request that came before is found by the last look.
    p.frontend.write(1, 0, &[1; 512]).unwrap();
    p.frontend.push();
    assert_eq!(p.backend.arm(), HasWork::Yes);
    assert_eq!(p.one(), OKAY);
}

/// Both sides sleep whenever they may, on two threads. A lost event is a hang.
#[test]
fn no_wake_up_is_lost() {
    const REQUESTS: u64 = 60_000;
    let to_backend = Signal::default();
    let to_frontend = Signal::default();
    let setup = Setup { max_segments: 1, ..setup(Abi::NATIVE, 0, true) };
    let mut frontend = Frontend::new(setup, to_backend.clone()).unwrap();
    let config = Config { persistent_pages: 64, ..Config::new(1, Abi::NATIVE, 0) };
    let (ring, grants) = (frontend.ring(), frontend.grants());
    let mut backend = Backend::new(config, ring, grants, to_frontend.clone()).unwrap();
    let stats = backend.stats();
    let done = AtomicBool::new(false);
    let (naps, hung) = (AtomicU64::new(0), AtomicBool::new(false));
    // Waits for an event, as one sleeps in the kernel; gives up when nothing comes for long.
    let sleep = |signal: &Signal, seen: u64| {
        naps.fetch_add(1, Ordering::Relaxed);
        for i in 0u64.. {
            if signal.count() != seen || done.load(Ordering::Relaxed) {
                return;
            }
            if i > 20_000_000 {
                hung.store(true, Ordering::Relaxed);
                done.store(true, Ordering::Relaxed);
            }
            if i % 64 == 63 {
                std::thread::yield_now();
            }
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
            while !done.load(Ordering::Relaxed) {
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
                    sleep(&to_backend, seen);
                }
            }
        });
        let (mut sent, mut got) = (0, 0);
        let mut depth = 1;
        while got < REQUESTS && !done.load(Ordering::Relaxed) {
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
                sleep(&to_frontend, seen);
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(!hung.load(Ordering::Relaxed), "a wake-up was lost");
    assert_eq!(stats.reads.get(), REQUESTS);
    assert!(naps.load(Ordering::Relaxed) > 100, "they never slept, so this showed nothing");
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
