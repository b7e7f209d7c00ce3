//! The newer of the kernel's two interfaces: an address space of `/dev/iommu`, and devices opened
//! by themselves, without groups (Linux 6.2 and 6.6).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use crate::abi::{AttachPt, BindIommufd, IoasAlloc, IoasUnmap, Pair};
use crate::{Error, group, ioctl};

/// More ranges than any host has.
const MOST_RANGES: usize = 64;

/// An address space.
pub(crate) struct Iommufd {
    fd: OwnedFd,
    ioas: u32,
}

impl Iommufd {
    /// Makes an address space.
    pub(crate) fn open(path: &Path) -> Result<Iommufd, Error> {
        let shown = path.display().to_string();
        let fd = group::open(path)?;
        let mut alloc = IoasAlloc::default();
        ioctl::sized(fd.as_fd(), ioctl::IOAS_ALLOC, &mut alloc)
            .map_err(Error::os(format!("{shown}: making an address space")))?;
        Ok(Iommufd { fd, ioas: alloc.out_ioas_id })
    }

    /// Takes a device: from now on it reaches what is mapped here and nothing else.
    pub(crate) fn attach(&self, device: &OwnedFd) -> Result<(), Error> {
        let mut bind = BindIommufd { iommufd: self.fd.as_raw_fd(), ..Default::default() };
        match ioctl::sized(device.as_fd(), ioctl::DEVICE_BIND_IOMMUFD, &mut bind) {
            // What the kernel says when it is bound elsewhere already.
            Err(Errno::EINVAL | Errno::EBUSY) => {
                return Err(Error::Host("another process drives the device".to_owned()));
            }
            done => done.map_err(Error::os("binding the device to an iommufd"))?,
        };
        let mut attach = AttachPt { pt_id: self.ioas, ..Default::default() };
        ioctl::sized(device.as_fd(), ioctl::DEVICE_ATTACH_PT, &mut attach)
            .map_err(Error::os("attaching the device to an address space"))?;
        Ok(())
    }

    /// The addresses that all devices here can use.
    pub(crate) fn ranges(&self) -> Result<Vec<Pair>, Error> {
        let mut ranges = [Pair::default(); MOST_RANGES];
        let n = ioctl::ioas_ranges(self.fd.as_fd(), self.ioas, &mut ranges)
            .map_err(Error::os("asking for the IOMMU's ranges"))?;
        Ok(ranges[..n].to_vec())
    }

    pub(crate) fn map(&self, region: &dma::Region, iova: u64) -> Result<(), Errno> {
        ioctl::ioas_map(self.fd.as_fd(), self.ioas, region, iova)
    }

    /// Returns how many bytes were unmapped.
    pub(crate) fn unmap(&self, iova: u64, length: u64) -> Result<u64, Errno> {
        let mut arg = IoasUnmap { ioas_id: self.ioas, iova, length, ..Default::default() };
        ioctl::sized(self.fd.as_fd(), ioctl::IOAS_UNMAP, &mut arg)?;
        Ok(arg.length)
    }
}
