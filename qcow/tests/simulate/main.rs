//! The deterministic simulation: real images on simulated disks, under a guest that knows what it
//! wrote. Each seed is a run of its own; docs/reliability.md says what is simulated and how a seed
//! is replayed.

mod images;
mod life;
mod plan;
mod verify;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use life::{Outcome, run};
use plan::Plan;
use sim::Sabotage;

/// Seeds that found something, and what.
const FOUND: &[(u64, &str)] = &[];

/// One run; a panic is a failure like another.
fn one(seed: u64, long: bool, sabotage: Sabotage) -> Result<Outcome, String> {
    let plan = Plan::draw(seed, long);
    let run = catch_unwind(AssertUnwindSafe(|| run(&plan, seed, sabotage)));
    run.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied());
        Err(format!("panic: {}", text.unwrap_or("of an unknown kind")))
    })
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().expect("a number"))
}

/// `cargo xtask simulate` runs this with more seeds.
#[test]
fn seeds() {
    let first = number("SIM_SEED").unwrap_or(1);
    let count = number("SIM_SEEDS").unwrap_or(60);
    let long = number("SIM_LONG").is_some();
    let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let all = Mutex::new((Outcome::default(), Vec::new()));
    let work = || {
        loop {
            let seed = first.wrapping_add(next.fetch_add(1, Ordering::Relaxed));
            if seed.wrapping_sub(first) >= count {
                return;
            }
            let result = one(seed, long, Sabotage::None);
            let mut all = all.lock().expect("no panic in here");
            match result {
                Ok(o) => all.0.add(&o),
                Err(e) => {
                    println!("seed {seed} failed: {e}");
                    println!("  its plan: {:?}", Plan::draw(seed, long));
                    let long = if long { " --long" } else { "" };
                    println!("  replay: cargo xtask simulate --seeds 1 --seed {seed}{long}");
                    all.1.push(seed);
                }
            }
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if done % 250 == 0 && done < count {
                println!("simulate: {done} of {count} runs, {} failed", all.1.len());
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(count as usize);
    thread::scope(|s| (0..threads).for_each(|_| drop(s.spawn(work))));
    let (o, failed) = all.into_inner().expect("no panic in there");
    println!(
        "simulate: {count} runs from seed {first}: {} lives, {} requests, {} power cuts looked at, \
         {} images by qemu-img; trace {:016x}",
        o.lives, o.requests, o.cuts, o.qemu, o.hash
    );
    if o.no_qemu > 0 {
        println!("simulate: skipped: qemu-img is not installed, {} images", o.no_qemu);
    }
    assert!(failed.is_empty(), "{} of {count} seeds failed: {failed:?}", failed.len());
}

#[test]
fn what_was_found_once() {
    for &(seed, what) in FOUND {
        if let Err(e) = one(seed, false, Sabotage::None) {
            panic!("seed {seed}, which once found: {what}: {e}");
        }
    }
}

#[test]
fn a_seed_gives_the_same_run_again() {
    for seed in 1..12 {
        let first = one(seed, false, Sabotage::None).unwrap();
        assert_eq!(first, one(seed, false, Sabotage::None).unwrap(), "seed {seed}");
    }
}

/// A disk that lies is found out: else nothing that passes here would mean anything.
#[test]
fn disks_that_lie_are_found_out() {
    let lies = [
        (Sabotage::DropFlushes, 30),
        (Sabotage::DropSomeFlushes, 60),
        (Sabotage::IgnoreFua, 120),
        (Sabotage::Misplace, 60),
        (Sabotage::LoseWrites, 60),
        (Sabotage::HalfFlush, 200),
    ];
    for (lie, seeds) in lies {
        let found = (1..=seeds).find(|&seed| one(seed, false, lie).is_err());
        println!("{lie:?}: found by seed {found:?}");
        assert!(found.is_some(), "{lie:?} was not found by {seeds} seeds");
    }
}
