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

    /// The same for those of `done` that come first and have the owner of the first one, which is the
    /// frontend, perhaps with [`Tag::MARK`]. Returns how many these are, and how many of them were in
    /// flight.
    ///
    /// [`Tag::MARK`]: crate::Tag::MARK
    #[inline]
    fn complete_run(&mut self, done: &[Completion]) -> (usize, usize) {
        let owner = done.first().map(|c| c.tag.owner());
        let (mut taken, mut ended) = (0, 0);
        for c in done.iter().take_while(|c| Some(c.tag.owner()) == owner) {
            taken += 1;
            ended += usize::from(self.complete(Completion { tag: c.tag.without_mark(), ..*c }));
        }
        (taken, ended)
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

    /// Whether a guest waits at the other side, for whose sake the reactor takes nobody in who makes
    /// system calls in its turns.
    fn is_guest(&self) -> bool {
        true
    }

    /// Requests submitted and not yet completed. A frontend is dropped only when it is 0.
    fn in_flight(&self) -> usize;

    /// The other side has gone and nothing is in flight: the reactor may drop the frontend.
    fn closed(&self) -> bool;
}
