//! [`Lodger`]: a connection whose work is done on the reactor's own thread for a while.
//!
//! A service thread with a [`crate::Portal`] and a reactor that sleeps wake each other for every
//! request that comes alone: four switches of threads and as many system calls, beside those of the
//! socket. A service that never blocks can come over instead; it keeps its portal, whose other end
//! is then on the same thread. Only reactors without guests let lodgers in: theirs makes system
//! calls in its turns.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use block::HasWork;
use nix::poll::PollFlags;

/// How many lodgers a reactor has at most.
pub(crate) const LODGERS: usize = 32;

/// How long a reactor works without sleep before it sends its lodgers away, in nanoseconds, if more
/// than one frontend had work: several threads do that sooner.
pub(crate) const CROWDED_NS: u64 = 2_000_000;
/// A shorter wait was no sleep, in nanoseconds.
pub(crate) const NAP_NS: u64 = 10_000;

/// What came of a lodger's turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// It did something.
    Busy,
    /// There was nothing to do.
    Idle,
    /// It wants to leave.
    Leave,
}

/// A service on the reactor's thread. Nothing in it may wait. It is dropped when it has to leave,
/// wherever that is, and goes on elsewhere by that.
pub trait Lodger: Send {
    /// Does what there is to do, a bounded amount. `now`: the reactor's clock in nanoseconds.
    fn turn(&mut self, now: u64) -> Turn;

    /// The final check before the reactor sleeps.
    fn arm(&mut self) -> HasWork;

    /// What a sleeping reactor is woken by.
    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)>;

    /// What of that has come, perhaps nothing; told after each sleep before which it waited.
    fn heard(&mut self, events: PollFlags);
}

/// Asks a reactor to let a lodger in; it is dropped if that does not.
pub type Lodging = Arc<dyn Fn(Box<dyn Lodger>) + Send + Sync>;
