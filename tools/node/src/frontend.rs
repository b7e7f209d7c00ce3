//! [`Frontend`]: everything that brings requests to a reactor, dispatched by a match.

use std::sync::Arc;

use blkif::{Backend, KeptRing, LocalGrants, RegionRing, Signal};
use block::{Completion, HasWork, Submit};
use dma::Region;
use reactor::PortalFrontend;

use crate::guests::GuestRing;

/// A blkif ring whose frontend lives in this process.
pub type Ring = Backend<KeptRing<RegionRing>, LocalGrants, Signal>;

/// A source of requests.
pub enum Frontend {
    /// A guest ring in this process's memory.
    Ring(Box<Ring>),
    /// A ring of a Xen guest.
    Guest(Box<GuestRing>),
    /// A service thread.
    Portal(Box<PortalFrontend>),
}

macro_rules! each {
    ($self:expr, $f:ident => $e:expr) => {
        match $self {
            Frontend::Ring($f) => $e,
            Frontend::Guest($f) => $e,
            Frontend::Portal($f) => $e,
        }
    };
}

impl block::Frontend for Frontend {
    fn regions(&self) -> Vec<Arc<Region>> {
        each!(self, f => f.regions())
    }

    #[inline]
    fn is_quiet(&self, now: u64) -> bool {
        each!(self, f => f.is_quiet(now))
    }

    fn complete(&mut self, done: Completion) -> bool {
        each!(self, f => f.complete(done))
    }

    #[inline]
    fn complete_run(&mut self, done: &[Completion]) -> (usize, usize) {
        each!(self, f => f.complete_run(done))
    }

    #[inline]
    fn poll<D: Submit>(&mut self, disk: &mut D, now: u64) -> bool {
        each!(self, f => f.poll(disk, now))
    }

    fn arm(&mut self) -> HasWork {
        each!(self, f => f.arm())
    }

    fn is_guest(&self) -> bool {
        each!(self, f => f.is_guest())
    }

    fn in_flight(&self) -> usize {
        each!(self, f => f.in_flight())
    }

    fn closed(&self) -> bool {
        each!(self, f => f.closed())
    }
}
