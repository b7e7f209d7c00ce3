//! How long requests take. A request bears no time: that would cost each of them several
//! instructions twice. Instead, of all that is in flight one read and one write are *watched*, each the first
//! that was taken in a turn in which none was. Which ones are is decided when they are taken and not by
//! what becomes of them, so those are a fair sample; at depth 1 they are all there are.
//!
//! All times are the reactor's of a turn, which begins a little before a request is looked at and before
//! its answer is published.

use super::{Backend, READ, Stage, WRITE};
use crate::{EventChannel, Grants, RingMemory};

/// No request.
const NONE: u16 = u16::MAX;

/// The slots that are watched, and when their requests were taken, in nanoseconds.
#[derive(Debug)]
pub(super) struct Watched {
    read: (u16, u64),
    write: (u16, u64),
}

impl Watched {
    pub(super) const NOTHING: Watched = Watched { read: (NONE, 0), write: (NONE, 0) };
}

impl<M: RingMemory, G: Grants, E: EventChannel> Backend<M, G, E> {
    /// What is in flight now has been for the time since the last poll: since then nothing was taken,
    /// and what has ended did in this turn.
    #[inline]
    pub(super) fn count_in_flight(&mut self, now: u64) {
        let passed = now.saturating_sub(self.now);
        self.stats.in_flight_ns.add(self.stats.in_flight.get().wrapping_mul(passed));
    }

    /// Counts what the watched requests took, if their answers are about to be published.
    #[inline]
    pub(super) fn see_ends(&mut self) {
        let stats = &*self.stats;
        let both = [
            (&mut self.watched.read, &stats.read_latency),
            (&mut self.watched.write, &stats.write_latency),
        ];
        for (watched, latency) in both {
            let Some(slot) = self.slots.get(usize::from(watched.0)) else { continue };
            if slot.stage == Stage::Free {
                latency.record(self.now.saturating_sub(watched.1));
                watched.0 = NONE;
            }
        }
    }

    /// Watches the request that was the first to be taken in this turn, into this slot if into any.
    #[inline]
    pub(super) fn watch(&mut self, slot: u16) {
        let Some(taken) = self.slots.get(usize::from(slot)) else { return };
        let watched = if taken.stage == Stage::PageRead {
            &mut self.watched.read
        } else if taken.stage == Stage::PageWrite {
            &mut self.watched.write
        } else {
            match (taken.stage, taken.operation) {
                // What was refused took nothing.
                (Stage::Free | Stage::Refused, _) => return,
                (_, READ) => &mut self.watched.read,
                (_, WRITE) => &mut self.watched.write,
                _ => return,
            }
        };
        if watched.0 == NONE {
            *watched = (slot, self.now);
        }
    }
}
