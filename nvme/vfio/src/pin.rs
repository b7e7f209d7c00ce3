//! [`Pin`]: memory that certainly stays where it is.
//!
//! Locking (`mlock`) is not enough: it keeps memory from being swapped out, but the kernel may still
//! move a locked page (compaction, balancing between NUMA nodes, CMA, memory offlining). What holds
//! is a reference that the kernel knows to last long, as it takes for DMA. Without an IOMMU, VFIO
//! takes none; but io_uring does for buffers that are registered with it (`FOLL_LONGTERM`), until
//! they are unregistered. Nothing is ever submitted to the ring.

use dma::Region;
use io_uring::IoUring;

/// The kernel takes at most this much in one registered buffer.
const PIECE: usize = 1 << 30;

/// Keeps a region's pages in place as long as it lives.
pub(crate) struct Pin {
    #[expect(dead_code, reason = "held: its end gives the pages free")]
    ring: IoUring,
}

impl Pin {
    /// Pins all of a region. The region may be dropped before: its pages then stay in use.
    pub(crate) fn new(region: &Region) -> std::io::Result<Pin> {
        let ring = IoUring::new(1)?;
        let base = region.base().as_ptr();
        let pieces: Vec<libc::iovec> = (0..region.len())
            .step_by(PIECE)
            .map(|at| libc::iovec {
                iov_base: base.wrapping_add(at).cast(),
                iov_len: PIECE.min(region.len() - at),
            })
            .collect();
        // SAFETY: the pieces lie in the region, which is mapped during the call; later the kernel
        // holds the pages themselves. Nothing is submitted that would use the buffers.
        unsafe { ring.submitter().register_buffers(&pieces) }?;
        Ok(Pin { ring })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dma::PageSize;

    #[test]
    fn a_region_is_pinned_or_the_kernel_says_no() {
        let region = Region::new(1 << 20, PageSize::Small).unwrap();
        match Pin::new(&region) {
            Ok(pin) => {
                region.write(0, &[1]);
                drop(region);
                drop(pin);
            }
            // Hosts that forbid io_uring.
            Err(e) => assert!(e.raw_os_error().is_some(), "{e}"),
        }
    }
}
