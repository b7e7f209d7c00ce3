//! When is nobody on any reactor on the way to a host cluster that was let go of?
//!
//! The home reactor counts *epochs*: it begins a new one each time that clusters have durably been
//! let go of, after the map says so ([`Epoch::advance`]). Every request is stamped with the epoch in
//! which its look-up was made. A further reactor *announces* the oldest stamp among its requests in
//! flight, or the newest epoch that it has seen ([`Announced`]), once a turn between its look-ups.
//! A cluster let go of in epoch `e` is free when everybody has announced more than `e`: what is in
//! flight then was looked up after the map had changed. A reactor that sleeps announces nothing
//! ([`QUIET`]), and is not waited for.
//!
//! A look-up costs nothing for all of this; a turn costs one load of a line that is rarely written.
//! `tests/memory.rs` runs this file on a model of memory.

use super::atomics::{AtomicU64, Ordering, fence};

/// Announced by a reactor that makes no look-ups and has nothing in flight.
pub(super) const QUIET: u64 = u64::MAX;

/// The home reactor's count.
#[derive(Debug)]
pub(super) struct Epoch(AtomicU64);

impl Epoch {
    pub(super) fn new() -> Epoch {
        Epoch(AtomicU64::new(0))
    }

    /// The epoch now.
    #[inline(always)]
    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Begins a new epoch; returns the one that ended. For the home reactor alone, when what was let
    /// go of is not in the map any more.
    pub(super) fn advance(&self) -> u64 {
        let now = self.0.load(Ordering::Relaxed);
        self.0.store(now + 1, Ordering::Release);
        now
    }
}

/// What one further reactor says.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Announced(AtomicU64);

impl Announced {
    /// Quiet.
    pub(super) fn new() -> Announced {
        Announced(AtomicU64::new(QUIET))
    }

    /// For its reactor, between look-ups: everything in flight has this stamp or a later one.
    #[inline]
    pub(super) fn announce(&self, oldest: u64) {
        self.0.store(oldest, Ordering::Release);
    }

    /// For its reactor, before the first look-up after it was quiet. Returns the epoch now.
    pub(super) fn wake(&self, epoch: &Epoch) -> u64 {
        // Until the epoch is known, as if everything old were in flight.
        self.0.store(0, Ordering::Relaxed);
        // Pairs with the one in `all_past`: either the home reactor sees the 0, or the look-ups that
        // follow see what it had put into the map.
        fence(Ordering::SeqCst);
        let now = epoch.get();
        self.announce(now);
        now
    }

    /// For its reactor: no look-ups from now on, and nothing is in flight.
    pub(super) fn quiet(&self) {
        self.announce(QUIET);
    }
}

/// For the home reactor: whether everybody has announced more than `epoch`, which has ended.
pub(super) fn all_past<'a>(mut all: impl Iterator<Item = &'a Announced>, epoch: u64) -> bool {
    fence(Ordering::SeqCst);
    all.all(|a| a.0.load(Ordering::Acquire) > epoch)
}
