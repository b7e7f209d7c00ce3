//! The stand-in's side of a copy: it reaches the addresses in a segment, as the hypervisor does.

use dma::Region;

use crate::abi::{CopySegment, DEST_GREF, SOURCE_GREF};
use crate::gntdev::Segments;

/// Does a copy whose granted side is `[at, at + len)` of a guest's memory.
pub(super) fn copy(segments: &mut Segments<'_>, index: usize, guest: &Region, at: usize) {
    let CopySegment { source, dest, len, flags, .. } = segments.raw_mut()[index];
    let len = usize::from(len);
    match flags {
        // SAFETY: `Segments` has only addresses of regions that live, each with its length; the
        // guest's region is another one.
        SOURCE_GREF => unsafe { guest.copy_to(at, dest as *mut u8, len) },
        // SAFETY: as above.
        DEST_GREF => unsafe { guest.copy_from(at, source as *const u8, len) },
        _ => {}
    }
}
