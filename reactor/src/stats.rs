//! [`Stats`]: counters of a reactor that others read without disturbing it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters written by one reactor only (a plain load and store each) and read by anybody.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Stats {
    /// Turns of the loop.
    pub turns: Counter,
    /// Turns in which nothing was found to do.
    pub idle_turns: Counter,
    /// Times that the reactor went to sleep.
    pub sleeps: Counter,
    /// Completions handed to an image or frontend.
    pub completions: Counter,
    /// Completions for an owner that does not exist: a bug or a lying device.
    pub strays: Counter,
    /// Calls from the mailbox.
    pub calls: Counter,
    /// Nanoseconds spent in turns that had work.
    pub busy_ns: Counter,
    /// Nanoseconds spent in turns without work, sleep included.
    pub idle_ns: Counter,
}

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. For the one writer: not a read-modify-write of the processor.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The value now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
