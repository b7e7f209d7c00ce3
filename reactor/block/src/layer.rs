//! [`Layer`]: an image format between a frontend and the leaf queues of a reactor.

use std::sync::Arc;

use dma::Region;

use crate::limit::Limited;
use crate::{
    BlockQueue, Completion, Completions, DeviceInfo, Frontend, Full, HasWork, Limit, Request,
    Status, Submit,
};

/// Where a node's bytes lie: which of the reactor's leaf queues, and which unit of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Port {
    /// Index into the reactor's leaf queues.
    pub leaf: u16,
    /// Namespace, file or memory within that queue.
    pub unit: u16,
}

/// Translation without a queue of its own: it is lent the reactor's leaf queues at each call.
///
/// Requests of a frontend go to [`Layer::submit`]; each is answered by one completion under the
/// frontend's tag, from [`Layer::complete`] or [`Layer::poll`]. Requests that the layer makes
/// itself carry the owner number that it was attached with.
pub trait Layer<L: BlockQueue> {
    /// What the image is like from above.
    fn info(&self) -> &DeviceInfo;

    /// Makes memory known that requests may name, for what the layer does with data itself
    /// (zeroes, decompression). Control path; the leaves are told separately.
    fn register(&mut self, region: &Arc<Region>);

    /// How many requests will certainly be taken now.
    fn room(&self, leaves: &[L]) -> usize;

    /// As [`crate::Submit::submit`].
    ///
    /// # Errors
    /// [`Full`] if there is no place; never while [`Layer::room`] is not 0.
    fn submit(&mut self, leaves: &mut [L], request: &Request<'_>) -> Result<(), Full>;

    /// As [`Submit::prefetch`].
    #[inline(always)]
    fn prefetch(&self, _sectors: impl Iterator<Item = u64>)
    where
        Self: Sized,
    {
    }

    /// One of the layer's own requests ended. If that ends one of a frontend, `done` becomes the frontend's
    /// completion. Returns whether it did.
    fn complete(&mut self, leaves: &mut [L], done: &mut Completion) -> bool;

    /// So many requests ended that were sent down under a frontend's own tag, all with or all without
    /// [`crate::Tag::MARK`].
    #[inline]
    fn ended(&mut self, _marked: bool, _count: usize) {}

    /// A device may still use the memory of such a request, which ended: see [`crate::QUARANTINED`].
    fn lost_device(&mut self) {}

    /// Goes on with what waits for something else than a completion, as far as `out` has room.
    /// Called once in each turn of the reactor. Returns whether anything was done.
    fn poll(&mut self, leaves: &mut [L], out: &mut Completions) -> bool;

    /// Has a frontend bring its requests: [`Frontend::poll`] on this image. An enum of images chooses
    /// here, once in a turn, instead of at each request.
    #[inline(never)]
    fn serve<F: Frontend>(&mut self, leaves: &mut [L], frontend: &mut F, now: u64) -> bool
    where
        Self: Sized,
    {
        frontend.poll(&mut Bound { image: self, leaves }, now)
    }

    /// The same, as far as a limit allows.
    #[inline(never)]
    fn serve_within<F: Frontend>(
        &mut self,
        limit: &Limit,
        leaves: &mut [L],
        frontend: &mut F,
        now: u64,
    ) -> bool
    where
        Self: Sized,
    {
        let disk = Bound { image: self, leaves };
        frontend.poll(&mut Limited { disk, limit, now }, now)
    }

    /// Whether the layer has work that no completion will wake: asked before the reactor sleeps.
    fn arm(&mut self) -> HasWork;

    /// Begins the clean close: what is in memory only goes to disk. No request is submitted from
    /// now on; the reactor goes on calling `complete` and `poll` until [`Layer::closed`].
    fn close(&mut self);

    /// How the close ended; `None` while it has not.
    fn closed(&self) -> Option<Status>;
}

/// An image with the leaf queues lent to it: what a frontend sees.
struct Bound<'a, L, I> {
    image: &'a mut I,
    leaves: &'a mut [L],
}

impl<L: BlockQueue, I: Layer<L>> Submit for Bound<'_, L, I> {
    #[inline]
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        (unit == 0).then(|| self.image.info())
    }

    #[inline]
    fn room(&self) -> usize {
        self.image.room(self.leaves)
    }

    #[inline(always)]
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        self.image.submit(self.leaves, request)
    }

    #[inline(always)]
    fn prefetch(&self, sectors: impl Iterator<Item = u64>) {
        self.image.prefetch(sectors);
    }
}
