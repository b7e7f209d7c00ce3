//! [`Frontend`]: what brings guest requests in and carries answers out: a blkif ring, a portal to
//! another thread.

use std::sync::Arc;

use dma::Region;

use crate::{Completion, HasWork, Submit};

/// A source of requests on a reactor.
///
/// In each turn the reactor first hands out completions ([`Frontend::complete`]), then calls
/// [`Frontend::poll`] once, unless [`Frontend::is_quiet`]. Requests carry the owner number that the frontend was attached with.
pub trait Frontend {
    /// Memory that the frontend's requests may name, to be registered with every leaf queue.
    fn regions(&self) -> Vec<Arc<Region>>;

    /// One of the frontend's requests ended. Only notes it; answers leave in `poll`. Returns whether it
    /// was in flight: a late or doubled completion does nothing.
    fn complete(&mut self, done: Completion) -> bool;

    /// The same for all of `done`, whose tags may have [`Tag::MARK`]. Returns how many were in flight.
    ///
    /// [`Tag::MARK`]: crate::Tag::MARK
    #[inline]
    fn complete_all(&mut self, done: &[Completion]) -> usize {
        let plain = |c: &Completion| Completion { tag: c.tag.without_mark(), ..*c };
        done.iter().map(|c| usize::from(self.complete(plain(c)))).sum()
    }

    /// Whether a poll at this time would find nothing to do: the cheapest look there is, since most
    /// frontends of a host are idle in most turns. Says no if that is not easily told.
    fn is_quiet(&self, now: u64) -> bool {
        let _ = now;
        false
    }

    /// Takes new requests as far as there is room for them (a bounded number, so that other
    /// frontends do not starve), submits them, then publishes all answers that are ready, at once.
    /// `now` is the reactor's clock in nanoseconds, read once in this turn. Returns whether
    /// anything was done.
    fn poll<D: Submit>(&mut self, disk: &mut D, now: u64) -> bool;

    /// The final check before the reactor sleeps: asks the other side for a wake-up, then looks
    /// once more. Cancelled by the next `poll`.
    fn arm(&mut self) -> HasWork;

    /// Requests submitted and not yet completed. A frontend is dropped only when it is 0.
    fn in_flight(&self) -> usize;

    /// The other side has gone and nothing is in flight: the reactor may drop the frontend.
    fn closed(&self) -> bool;
}
