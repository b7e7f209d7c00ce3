//! The one lock that control paths may use. It counts what is taken on each thread, so that a
//! measurement can show that a hot path takes none.

#![expect(clippy::disallowed_types, reason = "this is the wrapper that others use instead")]

use std::cell::Cell;
use std::sync::{MutexGuard, PoisonError};

thread_local! {
    static TAKEN: Cell<u64> = const { Cell::new(0) };
}

/// How many locks the calling thread has taken since it began.
pub fn locks_taken() -> u64 {
    TAKEN.with(Cell::get)
}

/// A mutual exclusion lock for control paths.
#[derive(Debug, Default)]
pub struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Mutex<T> {
        Mutex(std::sync::Mutex::new(value))
    }

    /// Waits for the lock and takes it. A panic of another holder does not poison it: panics abort.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        TAKEN.with(|n| n.set(n.get() + 1));
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was locked, back from its only owner.
    pub fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_per_thread() {
        let before = locks_taken();
        let m = Mutex::new(1);
        *m.lock() += 1;
        assert_eq!((*m.lock(), locks_taken() - before), (2, 2));
        std::thread::spawn(|| assert_eq!(locks_taken(), 0)).join().unwrap();
    }
}
