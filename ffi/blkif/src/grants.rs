//! [`Grants`] and [`EventChannel`]: all that a backend needs of the hypervisor, so that a ring can
//! be served from memory of this process as well.
//!
//! Implementations belong to one ring (one frontend domain) and are called on the reactor. What
//! costs a system call may happen only where it is said to.

use std::sync::Arc;

use dma::Region;

/// A granted page that is mapped: a number below [`Page::LIMIT`] that the implementation chose,
/// normally the page's place in one contiguous range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page(pub u32);

impl Page {
    /// Numbers from here on have other meanings in the page table.
    pub const LIMIT: u32 = 1 << 31;
}

/// The end of a mapping that was started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapped {
    /// The grant reference.
    pub gref: u32,
    /// Where its page is, or `None` if it could not be mapped.
    pub page: Option<Page>,
}

/// Which way a [`CopyOp`] goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the granted page into local memory.
    FromGuest,
    /// From local memory into the granted page.
    ToGuest,
}

/// One copy between a granted page and local memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopyOp {
    /// The page.
    pub gref: u32,
    /// Where in the local region, in bytes.
    pub local: u32,
    /// Where in the page, in bytes.
    pub offset: u16,
    /// How many bytes; `offset + len` is at most 4096.
    pub len: u16,
    /// Which way.
    pub direction: Direction,
    /// How it ended: one of the `GNTST_` values.
    pub status: i16,
}

/// `GNTST_okay`
pub const GNTST_OKAY: i16 = 0;
/// `GNTST_general_error`
pub const GNTST_GENERAL_ERROR: i16 = -1;
/// `GNTST_bad_gntref`
pub const GNTST_BAD_GNTREF: i16 = -3;
/// `GNTST_permission_denied`
pub const GNTST_PERMISSION_DENIED: i16 = -8;
/// `GNTST_bad_copy_arg`: the range leaves its page
pub const GNTST_BAD_COPY_ARG: i16 = -10;
/// `GNTST_eagain`: the page is paged out, try again later
pub const GNTST_EAGAIN: i16 = -12;

/// A call failed as a whole; no status in its batch means anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("grant operation failed with errno {0}")]
pub struct GrantError(pub i32);

/// Access to the pages that one domain grants.
pub trait Grants {
    /// Says which region is the local one of all copies. Called once, before there are any.
    fn attach(&mut self, local: &Arc<Region>);

    /// Hands over all copies of a turn, to be carried out together with those of other rings. They
    /// may be taken out of `ops`, for an empty vector with as much room.
    fn start_copies(&mut self, ops: &mut Vec<CopyOp>);

    /// The end of the copies that were started: back in `ops`, each with its status. Called once
    /// for each [`Grants::start_copies`], in the next turn. Whichever ring asks first has all that
    /// were started carried out, by one call.
    ///
    /// # Errors
    /// If the call failed as a whole.
    fn end_copies(&mut self, ops: &mut Vec<CopyOp>) -> Result<(), GrantError>;

    /// Asks for a page to be mapped, readable and writable, by somebody else than the reactor.
    /// Returns false if it cannot be done now; else [`Grants::next_mapped`] tells the end, within
    /// a bounded time.
    fn start_map(&mut self, gref: u32) -> bool;

    /// The end of a mapping that was started. Costs no system call. Ends that nobody asked for are
    /// undone when this value is dropped.
    fn next_mapped(&mut self) -> Option<Mapped>;

    /// Gives a mapped page up. It is not accessed through this any more when the call returns;
    /// how soon the hypervisor hears of it is up to the implementation.
    fn unmap(&mut self, page: Page);

    /// Returns when every page that was given up is unmapped for the hypervisor as well. Control
    /// path: before a device is reported closed.
    fn settle(&mut self);

    /// Copies from a mapped page. The range lies inside the page. Costs no system call.
    fn read_page(&self, page: Page, offset: u32, local: &Region, at: usize, len: u32);

    /// Copies into a mapped page. The range lies inside the page. Costs no system call.
    fn write_page(&self, page: Page, offset: u32, local: &Region, at: usize, len: u32);
}

/// The way to signal the other side.
pub trait EventChannel {
    /// Sends an event. The other side takes it as a hint to look.
    fn notify(&mut self);
}

/// A frontend in this process can wake a reactor that sleeps.
impl EventChannel for reactor::Wake {
    #[inline]
    fn notify(&mut self) {
        self.wake();
    }
}
