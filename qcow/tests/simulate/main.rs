//! The deterministic simulation: real images on simulated disks, under a guest that knows what it
//! wrote. Each seed is a run of its own; docs/reliability.md says what is simulated and how a seed
//! is replayed.

mod bitmaps;
mod change;
mod commit;
mod images;
mod kept;
mod life;
mod plan;
mod reactors;
mod verify;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use life::{Outcome, run};
use plan::Plan;
use sim::Sabotage;

/// Seeds that found something, and what.
const FOUND: &[(u64, &str)] = &[
    (1952, "a stream forgot that a shorter layer which goes had hidden what is below"),
    (1661, "so did a commit"),
    (235, "bitmaps counted as saved after a pause that failed at its last flush"),
    (1342, "a raw data file kept what a zero entry hid, after a write that failed"),
    (1045, "and after a cut between that entry and newer data"),
];

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

/// What the crates log, for a single seed.
struct Print;

impl log::Log for Print {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        println!("  {}: {}", record.level(), record.args());
    }

    fn flush(&self) {}
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
    if count == 1 && log::set_logger(&Print).is_ok() {
        log::set_max_level(log::LevelFilter::Debug);
    }
    let (next, done, bad) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        let (mut all, mut failed) = (Outcome::default(), Vec::new());
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                return (all, failed);
            }
            let seed = first.wrapping_add(at);
            match one(seed, long, Sabotage::None) {
                Ok(o) => all.add(&o),
                Err(e) => {
                    let long_option = if long { " --long" } else { "" };
                    println!(
                        "seed {seed} failed: {e}\n  its plan: {:?}\n  \
                         replay: cargo xtask simulate --seeds 1 --seed {seed}{long_option}",
                        Plan::draw(seed, long)
                    );
                    failed.push(seed);
                    bad.fetch_add(1, Ordering::Relaxed);
                }
            }
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            if done % 250 == 0 && done < count {
                let bad = bad.load(Ordering::Relaxed);
                println!("simulate: {done} of {count} runs, {bad} failed");
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(count as usize);
    let (mut o, mut failed) = (Outcome::default(), Vec::new());
    thread::scope(|s| {
        let running: Vec<_> = (0..threads).map(|_| s.spawn(work)).collect();
        for thread in running {
            let (part, seeds) = thread.join().expect("failures of runs were caught");
            o.add(&part);
            failed.extend(seeds);
        }
    });
    println!("simulate: {count} runs from seed {first}, trace {:016x}:", o.hash);
    println!(
        "simulate: {} lives ({} in a file, {} with a data file), {} requests ({} failed, {} of them for want of \
         space), {} clusters allocated, {} times more space, {} entries redone after {} deaths, {} pages loaded, {} waits, {} overlays, {} internal \
         snapshots, {} streams, {} commits, \
         {} other sizes; {} power cuts looked at, {} bitmaps found good in them, {} not saved; {} images \
         by qemu-img",
        o.lives,
        o.files,
        o.data_files,
        o.requests,
        o.failed,
        o.no_space,
        o.allocated,
        o.extended,
        o.redone,
        o.deaths,
        o.loads,
        o.parked,
        o.snapshots,
        o.kept,
        o.streams,
        o.commits,
        o.resizes,
        o.cuts,
        o.trusted,
        o.unsaved,
        o.qemu
    );
    if o.no_qemu > 0 {
        println!("simulate: skipped: qemu-img is not installed, {} images", o.no_qemu);
    }
    if count >= 50 {
        // Runs in which nothing happens prove nothing.
        let all = [
            o.failed,
            o.no_space,
            o.extended,
            o.allocated,
            o.loads,
            o.parked,
            o.snapshots,
            o.streams,
        ];
        let later = [
            o.kept,
            o.files,
            o.deaths,
            o.redone,
            o.data_files,
            o.commits,
            o.resizes,
            o.trusted,
            o.unsaved,
        ];
        let all = [&all[..], &later].concat();
        assert!(all.iter().all(|&n| n > 0) && o.cuts > count, "too little happened");
        assert!(o.no_place * 20 < o.lives, "{} bitmaps had no room", o.no_place);
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
