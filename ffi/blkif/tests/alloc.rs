//! Neither side of a ring takes memory once it is set up, whatever is asked of it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use blkif::abi::OKAY;
use blkif::{Abi, Backend, Config, Frontend, Setup, Signal};
use block::{BlockQueue, Completions, Frontend as _, MemQueue};

/// Counts what each thread asks the allocator for.
struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|c| c.set(c.get() + 1));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn requests_take_no_memory() {
    for abi in Abi::ALL {
        for persistent in [false, true] {
            let setup = Setup { abi, order: 1, persistent, max_segments: 32, start: 0 };
            let mut frontend = Frontend::new(setup, Signal::default()).unwrap();
            let mut config = Config::new(1, abi, 1);
            config.barrier = true;
            config.persistent_pages = if persistent { 100 } else { 0 };
            let (ring, grants) = (frontend.ring(), frontend.grants());
            let mut backend = Backend::new(config, ring, grants, Signal::default()).unwrap();
            let mut disk = MemQueue::new(8 << 20, 512).unwrap();
            for region in backend.regions() {
                disk.register(&region).unwrap();
            }
            let mut out = Completions::new();
            let data = vec![1; 128 << 10];
            let mut back = vec![0; 128 << 10];
            let before = COUNT.with(Cell::get);
            let mut answers = 0;
            for turn in 1..3000u64 {
                for i in 0..(turn % 40).min(frontend.room() as u64) {
                    let (sector, len) = (i * 256, ((turn * 7 + i * 13) % 256 + 1) as usize * 512);
                    match (turn + i) % 16 {
                        0..=3 => frontend.read(i, sector, 4096).unwrap(),
                        4..=7 => frontend.write(i, sector, &data[..4096]).unwrap(),
                        8..=10 => frontend.read(i, sector, len as u32).unwrap(),
                        11..=12 => frontend.write(i, sector, &data[..len]).unwrap(),
                        13 => frontend.flush(i, sector, &data[..len.min(45_056)]).unwrap(),
                        14 if turn % 8 == 0 => frontend.barrier(i, sector, &[]).unwrap(),
                        _ => frontend.discard(i, sector, 64).unwrap(),
                    }
                }
                frontend.push();
                out.clear();
                disk.poll(&mut out);
                for c in out.iter() {
                    backend.complete(c);
                }
                // Time enough for pages to be exchanged now and then.
                backend.poll(&mut disk, turn * 400_000_000);
                while let Some(done) = frontend.reap(&mut back).unwrap() {
                    assert_eq!(done.status, OKAY);
                    answers += 1;
                }
            }
            let taken = COUNT.with(Cell::get) - before;
            assert_eq!(taken, 0, "{abi:?}, persistent {persistent}");
            assert!(answers > 20_000, "{answers}");
            let stats = backend.stats();
            assert_eq!(stats.pages_evicted.get() > 0, persistent);
            // The count counts.
            drop(std::hint::black_box(Box::new(1)));
            assert_eq!(COUNT.with(Cell::get) - before, 1);
        }
    }
}
