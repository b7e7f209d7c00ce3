//! [`Claims`]: keeps every write away from the blocks of a read-modify-write, on all connections
//! of an export.
//!
//! A write of part of a block reads the block, changes it and writes it back. Any other write to
//! that block in between would be undone, so each write claims its range while it is in flight:
//! an ordinary one shares it with others of its kind (overlapping writes are the client's affair),
//! a read-modify-write has it alone. Claims are held for the time of one device write only, never
//! while data is awaited from a client. Called by service threads.

use reactor::Wake;
use reactor::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::seats::SEATS;

/// A half-open range of bytes.
type Range = (u64, u64);

fn overlap(a: Range, b: Range) -> bool {
    a.0 < b.1 && b.0 < a.1
}

/// How a connection learns that a claim which was refused may succeed now.
#[derive(Debug)]
pub(crate) struct Signal {
    /// Wakes the connection's thread, also for other reasons.
    pub(crate) wake: Wake,
    retry: AtomicBool,
}

impl Signal {
    /// A new one.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub(crate) fn new() -> Result<Signal, nix::Error> {
        Ok(Signal { wake: Wake::new()?, retry: AtomicBool::new(false) })
    }

    /// Whether refused claims should be tried again; said once.
    pub(crate) fn take_retry(&self) -> bool {
        self.retry.load(Ordering::Relaxed) && self.retry.swap(false, Ordering::AcqRel)
    }

    /// Whether [`Signal::take_retry`] would say yes.
    pub(crate) fn has_retry(&self) -> bool {
        self.retry.load(Ordering::Acquire)
    }
}

/// The claims of all connections to one export.
#[derive(Debug)]
pub(crate) struct Claims(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Of each seat: the range that each of its pieces holds; empty where none.
    held: Vec<Vec<Range>>,
    /// Those that are held alone: (seat, piece, range).
    alone: Vec<(usize, u16, Range)>,
    /// Whom to tell when a claim is released, by seat.
    waiting: Vec<Option<std::sync::Arc<Signal>>>,
    any_waiting: bool,
}

impl Claims {
    /// No claims.
    pub(crate) fn new() -> Claims {
        Claims(Mutex::new(State {
            held: vec![Vec::new(); SEATS],
            alone: Vec::new(),
            waiting: vec![None; SEATS],
            any_waiting: false,
        }))
    }

    /// Claims `[offset, offset + len)` for a piece of the connection on a seat, alone or shared.
    /// If it cannot be had now, returns false and sets the retry of `signal` when it may.
    pub(crate) fn claim(
        &self,
        seat: usize,
        piece: u16,
        (offset, len): (u64, u64),
        alone: bool,
        signal: &std::sync::Arc<Signal>,
    ) -> bool {
        let range = (offset, offset + len);
        let mut s = self.0.lock();
        let refused = s.alone.iter().any(|a| overlap(a.2, range))
            || (alone && s.held.iter().flatten().any(|&h| overlap(h, range)));
        if refused {
            s.waiting[seat] = Some(signal.clone());
            s.any_waiting = true;
            return false;
        }
        if alone {
            s.alone.push((seat, piece, range));
            return true;
        }
        let places = &mut s.held[seat];
        if places.len() <= usize::from(piece) {
            places.resize(usize::from(piece) + 1, (0, 0));
        }
        places[usize::from(piece)] = range;
        true
    }

    /// Gives up what a piece holds.
    pub(crate) fn release(&self, seat: usize, piece: u16) {
        let mut s = self.0.lock();
        if let Some(at) = s.alone.iter().position(|a| (a.0, a.1) == (seat, piece)) {
            s.alone.swap_remove(at);
        } else if let Some(place) = s.held[seat].get_mut(usize::from(piece)) {
            *place = (0, 0);
        }
        if s.any_waiting {
            s.any_waiting = false;
            for signal in s.waiting.iter_mut().filter_map(Option::take) {
                signal.retry.store(true, Ordering::Release);
                signal.wake.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn ordinary_writes_share_and_others_do_not() {
        let claims = Claims::new();
        let signal = Arc::new(Signal::new().unwrap());
        let claim = |seat, piece, range, alone| claims.claim(seat, piece, range, alone, &signal);
        assert!(claim(0, 5, (0, 4096), false));
        assert!(claim(1, 5, (512, 512), false));
        assert!(!claim(1, 6, (0, 512), true));
        assert!(claim(1, 7, (4096, 512), true), "touches, but does not overlap");
        assert!(!claim(0, 6, (4000, 200), false));
        assert!(!signal.take_retry());
        claims.release(1, 7);
        assert!(signal.take_retry());
        assert!(!signal.take_retry());
        assert!(claim(0, 6, (4000, 200), false));
        claims.release(0, 6);
        assert!(!signal.has_retry(), "nobody waited");
        claims.release(0, 5);
        assert!(claim(1, 6, (0, 512), true));
        assert!(!claim(2, 0, (0, 512), true));
        claims.release(1, 6);
        claims.release(1, 5);
        assert!(claim(2, 0, (0, 4096), true));
    }
}
