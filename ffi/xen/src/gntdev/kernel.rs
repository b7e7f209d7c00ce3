//! [`Gntdev`]: the device, or a stand-in for it.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::copy::Segments;
use super::memory::Memory;
use crate::abi::GrantRef;
use crate::{Error, ioctl};

/// What is asked of the device: its calls, one by one.
pub(crate) trait Kernel: Send + Sync + std::fmt::Debug {
    /// MAP_GRANT_REF: prepares a mapping; its place in the file.
    fn map(&self, refs: &[GrantRef]) -> Result<u64, Errno>;
    /// mmap, readable and writable.
    fn mmap(&self, index: u64, pages: usize) -> Result<Memory, Errno>;
    /// UNMAP_GRANT_REF.
    fn unmap(&self, index: u64, pages: usize) -> Result<(), Errno>;
    /// GRANT_COPY.
    fn copy(&self, segments: &mut Segments<'_>) -> Result<(), Errno>;
}

impl Kernel for File {
    fn map(&self, refs: &[GrantRef]) -> Result<u64, Errno> {
        ioctl::map_grants(self.as_fd(), refs)
    }

    fn mmap(&self, index: u64, pages: usize) -> Result<Memory, Errno> {
        Memory::of_grants(self.as_fd(), index, pages)
    }

    fn unmap(&self, index: u64, pages: usize) -> Result<(), Errno> {
        ioctl::unmap_grants(self.as_fd(), index, pages as u32)
    }

    fn copy(&self, segments: &mut Segments<'_>) -> Result<(), Errno> {
        ioctl::grant_copy(self.as_fd(), segments)
    }
}

/// An open grant device. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Gntdev(Arc<dyn Kernel>);

impl Gntdev {
    /// Opens the kernel's.
    ///
    /// # Errors
    /// If there is none (this is no domain of Xen, or the driver is not loaded), or it may not be used.
    pub fn open() -> Result<Gntdev, Error> {
        let place = "/dev/xen/gntdev";
        let file = OpenOptions::new().read(true).write(true).open(place);
        file.map(|f| Gntdev(Arc::new(f))).map_err(|e| Error::open(place, &e))
    }

    #[cfg(any(test, feature = "fake"))]
    pub(crate) fn stand_in(kernel: Arc<dyn Kernel>) -> Gntdev {
        Gntdev(kernel)
    }

    pub(crate) fn kernel(&self) -> &dyn Kernel {
        &*self.0
    }
}
