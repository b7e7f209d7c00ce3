//! [`Link`]: between the home reactor of an image and one that serves it too.
//!
//! A [`super::Satellite`] sends what it cannot do by a look-up; the home reactor does it in a slot
//! of its own and replies. Two bounded lock-free queues, and a wake-up only for who sleeps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use block::{Flags, Op, SegList, Status};
use crossbeam_queue::{ArrayQueue, SegQueue};
use dma::Region;
use reactor::Wake;

use super::epochs::{Announced, Epoch};

/// What all reactors that serve an image know of each other. Written rarely, by anybody; read in
/// every turn, so it has lines of its own.
#[repr(align(128))]
pub(super) struct Common {
    /// Of the mappings; see [`super::epochs`].
    pub(super) epoch: Epoch,
    phase: AtomicU8,
    /// Counts pauses and their ends: odd while nobody may begin anything.
    pause: AtomicU64,
    /// Counts changes of the layers.
    version: AtomicU64,
}

/// What becomes of an image, in this order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub(super) enum Phase {
    /// It is served.
    Open,
    /// Nothing new is taken: the image is being closed.
    Closing,
    /// The same, since a device was lost that may still use memory.
    Lost,
    /// The home reactor has ended: it replies no more.
    Gone,
}

impl Common {
    pub(super) fn new() -> Common {
        let phase = AtomicU8::new(Phase::Open as u8);
        let (pause, version) = (AtomicU64::new(0), AtomicU64::new(0));
        Common { epoch: Epoch::new(), phase, pause, version }
    }

    /// The number of the pause, if it is odd.
    #[inline]
    pub(super) fn pause(&self) -> u64 {
        self.pause.load(Ordering::Acquire)
    }

    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The layers have changed, during a pause. For the home reactor.
    pub(super) fn turn_version(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    /// Begins or ends a pause. For the home reactor.
    pub(super) fn turn_pause(&self) {
        self.pause.fetch_add(1, Ordering::AcqRel);
    }

    #[inline]
    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Open,
            1 => Phase::Closing,
            2 => Phase::Lost,
            _ => Phase::Gone,
        }
    }

    /// Goes on to `phase`, if that is not over yet.
    pub(super) fn enter(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
    }
}

/// A request that a satellite sends home. Its buffers stay the satellite's frontend's.
pub(super) struct Errand {
    /// The satellite's.
    pub(super) slot: u16,
    pub(super) op: Op,
    pub(super) flags: Flags,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) segs: SegList,
}

/// How it ended.
#[derive(Clone, Copy)]
pub(super) struct Reply {
    pub(super) slot: u16,
    pub(super) status: Status,
}

/// See the module's text.
pub(super) struct Link {
    errands: ArrayQueue<Errand>,
    replies: ArrayQueue<Reply>,
    /// Memory that errands sent later may name.
    regions: SegQueue<Arc<Region>>,
    pub(super) announced: Announced,
    /// The satellite has ended: it has nothing in flight, and sends nothing any more.
    gone: AtomicBool,
    /// The last pause for which the satellite had nothing in flight.
    rests: AtomicU64,
    home: Wake,
    away: Wake,
}

impl Link {
    /// For at most `slots` errands at a time; the wake-ups are those of the two reactors.
    pub(super) fn new(slots: u16, home: Wake, away: Wake) -> Link {
        let slots = usize::from(slots.max(1));
        Link {
            errands: ArrayQueue::new(slots),
            replies: ArrayQueue::new(slots),
            regions: SegQueue::new(),
            announced: Announced::new(),
            gone: AtomicBool::new(false),
            rests: AtomicU64::new(0),
            home,
            away,
        }
    }

    // ---- the satellite's side ----

    /// Sends an errand. There is a place for each slot.
    pub(super) fn send(&self, errand: Errand) {
        let sent = self.errands.push(errand);
        debug_assert!(sent.is_ok(), "more errands than slots");
        self.home.wake();
    }

    pub(super) fn send_region(&self, region: Arc<Region>) {
        self.regions.push(region);
    }

    /// Has the home reactor look at [`Common`].
    pub(super) fn wake_home(&self) {
        self.home.wake();
    }

    pub(super) fn take_reply(&self) -> Option<Reply> {
        // Asked in every turn, and to take from an empty queue costs a fence.
        if self.has_reply() { self.replies.pop() } else { None }
    }

    pub(super) fn has_reply(&self) -> bool {
        !self.replies.is_empty()
    }

    /// Nothing is in flight, and nothing begins before the end of this pause.
    pub(super) fn rest(&self, pause: u64) {
        self.rests.store(pause, Ordering::Release);
        self.home.wake();
    }

    pub(super) fn end(&self) {
        self.announced.quiet();
        self.gone.store(true, Ordering::Release);
        self.home.wake();
    }

    // ---- the home reactor's side ----

    /// The next errand. What it names is among the regions taken after this.
    pub(super) fn take_errand(&self) -> Option<Errand> {
        self.errands.pop()
    }

    pub(super) fn take_region(&self) -> Option<Arc<Region>> {
        if self.regions.is_empty() { None } else { self.regions.pop() }
    }

    /// Whether there is anything to look at. Asked in every turn.
    #[inline]
    pub(super) fn has_news(&self) -> bool {
        self.has_errand() || !self.regions.is_empty() || self.is_gone()
    }

    pub(super) fn has_errand(&self) -> bool {
        !self.errands.is_empty()
    }

    /// Whether the satellite rests during this pause, and has left no errand behind.
    pub(super) fn rests(&self, pause: u64) -> bool {
        self.rests.load(Ordering::Acquire) == pause || self.is_gone() && !self.has_errand()
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    pub(super) fn reply(&self, reply: Reply) {
        let sent = self.replies.push(reply);
        debug_assert!(sent.is_ok(), "more replies than slots");
        self.away.wake();
    }

    /// Has the satellite look at [`Common`].
    pub(super) fn wake_satellite(&self) {
        self.away.wake();
    }
}
