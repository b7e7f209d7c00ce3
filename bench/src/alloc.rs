//! [`CountingAllocator`]: the system's allocator, counting per thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// Allocations (and reallocations) that the calling thread has made since it began, if the
/// process runs on [`CountingAllocator`].
pub fn allocations() -> u64 {
    COUNT.try_with(Cell::get).unwrap_or(0)
}

fn bump() {
    // A thread that is ending has no counter any more; nobody measures it.
    let _ = COUNT.try_with(|n| n.set(n.get() + 1));
}

/// The system's allocator, counting what each thread takes from it. To be the global allocator of
/// whatever wants to measure.
#[derive(Clone, Copy, Debug)]
pub struct CountingAllocator;

// SAFETY: every call goes to the system's allocator unchanged; counting neither allocates nor
// unwinds.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        bump();
        // SAFETY: the caller keeps the contract, which is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        bump();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        bump();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}
