//! The protocol of [`super::Wake`] without the descriptor, so that a test can run it on a model of
//! memory (`tests/wake.rs`).

use super::atomics::{AtomicBool, AtomicU64, Ordering, fence};

/// "I sleep", and what follows from it. One thread sleeps, any number wake.
#[derive(Debug)]
pub(super) struct Flag {
    sleeping: AtomicBool,
    /// Rings that wakers have promised by taking the flag, and that the sleeper has not read. Only
    /// the sleeper uses it.
    owed: AtomicU64,
}

impl Flag {
    pub(super) fn new() -> Flag {
        Flag { sleeping: AtomicBool::new(false), owed: AtomicU64::new(0) }
    }

    /// For a waker whose work is visible: whether it has to ring. It then has to, once.
    #[inline]
    pub(super) fn must_ring(&self) -> bool {
        fence(Ordering::SeqCst);
        self.sleeping.load(Ordering::Relaxed) && self.take()
    }

    #[cold]
    fn take(&self) -> bool {
        self.sleeping.swap(false, Ordering::AcqRel)
    }

    /// For the sleeper, who then looks for work once more.
    pub(super) fn about_to_sleep(&self) {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// For the sleeper. `read` takes all rings that have arrived and returns how many. A waker may
    /// be late with its ring: it is then read after the next sleep, which it may cut short, and is
    /// not left to cut short all that follow.
    pub(super) fn awake(&self, read: impl FnOnce() -> u64) {
        let taken = !self.take();
        let owed = self.owed.load(Ordering::Relaxed) + u64::from(taken);
        if owed > 0 {
            self.owed.store(owed.saturating_sub(read()), Ordering::Relaxed);
        }
    }
}
