//! The matrix: images of all kinds (cluster size, version, refcount width, extended L2 entries, data
//! file, compression, backing files, who made it, on what it is served), written by QEMU and by
//! polldisk in turns and judged by qemu-img after each turn. `cargo xtask matrix` runs many; docs/
//! reliability.md says how one is run again.

mod case;
mod guest;
mod model;
mod offline;
mod pick;
mod second;

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// As many at a time: they are processes for the most part.
const THREADS: usize = 2;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|v| v.parse().expect("a number"))
}

/// `false` if there is no judge, which only a developer's machine may lack.
fn has_qemu() -> bool {
    let has =
        ["qemu-img", "qemu-io"].iter().all(|p| Command::new(p).arg("--version").output().is_ok());
    assert!(has || std::env::var("CI").as_deref() != Ok("true"), "qemu-img is not installed");
    if !has {
        println!("skipped: qemu-img");
    }
    has
}

#[test]
fn images() {
    if !has_qemu() {
        return;
    }
    let seed = number("MATRIX_SEED").unwrap_or(1);
    let limit = number("MATRIX_SECONDS").map(Duration::from_secs);
    let shapes = if std::env::var("MATRIX_IMAGES").as_deref() == Ok("all") {
        pick::whole(seed)
    } else {
        pick::pick(seed, number("MATRIX_IMAGES").unwrap_or(4) as usize).0
    };
    let count = shapes.len();
    let only = number("MATRIX_ONLY").map(|n| n as usize);
    let (next, done, failed) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let [second, snapshots, bitmaps] = [const { AtomicUsize::new(0) }; 3];
    #[expect(clippy::disallowed_methods, reason = "a test's limit")]
    let began = Instant::now();
    let late = || limit.is_some_and(|limit| began.elapsed() > limit);
    let work = || {
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some(shape) = shapes.get(n).filter(|_| !late()) else { return };
            if only.is_some_and(|only| only != n) {
                continue;
            }
            let dir = tempfile::tempdir().unwrap();
            let result = case::run(dir.path(), shape, seed ^ ((n as u64 + 1) << 32));
            done.fetch_add(1, Ordering::Relaxed);
            match result {
                Ok(had) => {
                    second.fetch_add(had.second.into(), Ordering::Relaxed);
                    snapshots.fetch_add(had.snapshot.into(), Ordering::Relaxed);
                    bitmaps.fetch_add(had.bitmaps.into(), Ordering::Relaxed);
                }
                Err(e) => {
                    failed.fetch_add(1, Ordering::Relaxed);
                    println!("matrix: FAILED {n}: {shape}: {e:#}");
                    println!(
                        "matrix: again: MATRIX_ONLY={n} with these images and --seed {seed}; its \
                         files stay in {}",
                        dir.keep().display()
                    );
                }
            }
            if n % 10 == 9 {
                println!("matrix: {} of {count} images", done.load(Ordering::Relaxed));
            }
        }
    };
    std::thread::scope(|scope| {
        (0..THREADS).for_each(|_| drop(scope.spawn(work)));
    });
    let done = done.into_inner();
    println!(
        "matrix: {done} of {count} images; {} with a snapshot, {} with bitmaps, {} also read by imago",
        snapshots.into_inner(),
        bitmaps.into_inner(),
        second.into_inner()
    );
    assert_eq!(failed.into_inner(), 0, "images failed");
    assert!(done == count || only.is_some() || late(), "{done} of {count}");
    assert!(done > 0);
}
