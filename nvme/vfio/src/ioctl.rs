//! The kernel's calls, as safe functions: each takes memory that it cannot leave.
//!
//! VFIO's and iommufd's calls share a rule that makes this possible: the first word of a structure
//! is its size, and the kernel reads and writes no more than that. [`sized`] sets it.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A call whose argument is a structure that begins with its size, and holds no pointer that the
/// kernel would write through.
#[derive(Clone, Copy)]
pub(crate) struct Sized(u32);

/// A call whose argument is a number.
#[derive(Clone, Copy)]
pub(crate) struct Plain(u32);

/// `_IO(';', n)`
const fn io(n: u32) -> u32 {
    0x3b00 + n
}

pub(crate) const GET_API_VERSION: Plain = Plain(io(100));
pub(crate) const SET_IOMMU: Plain = Plain(io(102));
pub(crate) const GROUP_GET_STATUS: Sized = Sized(io(103));
const GROUP_SET_CONTAINER: u32 = io(104);
const GROUP_GET_DEVICE_FD: u32 = io(106);
pub(crate) const DEVICE_GET_INFO: Sized = Sized(io(107));
pub(crate) const DEVICE_GET_REGION_INFO: Sized = Sized(io(108));
pub(crate) const DEVICE_GET_IRQ_INFO: Sized = Sized(io(109));
pub(crate) const DEVICE_SET_IRQS: Sized = Sized(io(110));
pub(crate) const DEVICE_RESET: Plain = Plain(io(111));
pub(crate) const IOMMU_GET_INFO: Sized = Sized(io(112));
pub(crate) const IOMMU_UNMAP_DMA: Sized = Sized(io(114));
const IOMMU_MAP_DMA: u32 = io(113);
pub(crate) const DEVICE_BIND_IOMMUFD: Sized = Sized(io(118));
pub(crate) const DEVICE_ATTACH_PT: Sized = Sized(io(119));
pub(crate) const IOAS_ALLOC: Sized = Sized(io(0x81));
const IOAS_IOVA_RANGES: u32 = io(0x84);
const IOAS_MAP: u32 = io(0x85);
pub(crate) const IOAS_UNMAP: Sized = Sized(io(0x86));

/// A structure that the kernel is passed as it is.
pub(crate) trait Abi: FromBytes + IntoBytes + Immutable + KnownLayout {}
impl<T: FromBytes + IntoBytes + Immutable + KnownLayout> Abi for T {}

/// Calls with a structure, whose first word is set to its size.
pub(crate) fn sized<T: Abi>(fd: BorrowedFd<'_>, call: Sized, arg: &mut T) -> Result<i32, Errno> {
    sized_bytes(fd, call, arg.as_mut_bytes())
}

/// The same with a structure and room behind it. Panics if there is not even a size.
pub(crate) fn sized_bytes(fd: BorrowedFd<'_>, call: Sized, arg: &mut [u8]) -> Result<i32, Errno> {
    let size = arg.len() as u32;
    arg[..4].copy_from_slice(&size.to_ne_bytes());
    pointer(fd, call.0, arg)
}

/// Calls with bytes. Private: the caller above keeps to what the call may do with them.
fn pointer(fd: BorrowedFd<'_>, call: u32, arg: &mut [u8]) -> Result<i32, Errno> {
    // SAFETY: the constants of this module are calls that access the argument within the size in
    // its first word (set by `sized_bytes` and the functions below), or, for SET_CONTAINER and
    // GET_DEVICE_FD, one number or a string with its end. The descriptor is open; one that is of
    // another kind refuses the call.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), call as libc::Ioctl, arg.as_mut_ptr()) };
    Errno::result(done)
}

/// Calls with a number.
pub(crate) fn plain(fd: BorrowedFd<'_>, call: Plain, arg: u32) -> Result<i32, Errno> {
    // SAFETY: the constants of this type take a number or nothing; no memory is involved.
    let done =
        unsafe { libc::ioctl(fd.as_raw_fd(), call.0 as libc::Ioctl, libc::c_ulong::from(arg)) };
    Errno::result(done)
}

/// Puts a group into a container.
pub(crate) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
    pointer(group, GROUP_SET_CONTAINER, &mut container.as_raw_fd().to_ne_bytes()).map(drop)
}

/// Opens a device of a group.
pub(crate) fn device_fd(group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let mut bytes = name.to_bytes_with_nul().to_vec();
    let fd: RawFd = pointer(group, GROUP_GET_DEVICE_FD, &mut bytes)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Lets devices of a type1 container reach a region.
pub(crate) fn dma_map(
    container: BorrowedFd<'_>,
    region: &dma::Region,
    iova: u64,
) -> Result<(), Errno> {
    let mut map = crate::abi::DmaMap {
        argsz: size_of::<crate::abi::DmaMap>() as u32,
        flags: crate::abi::DMA_READ_WRITE,
        vaddr: region.base().as_ptr() as u64,
        iova,
        size: region.len() as u64,
    };
    // What a device does in a region is what regions are for: no reference ever covers them.
    pointer(container, IOMMU_MAP_DMA, map.as_mut_bytes()).map(drop)
}

/// The same for an address space of an iommufd.
pub(crate) fn ioas_map(
    iommufd: BorrowedFd<'_>,
    ioas_id: u32,
    region: &dma::Region,
    iova: u64,
) -> Result<(), Errno> {
    let mut map = crate::abi::IoasMap {
        size: size_of::<crate::abi::IoasMap>() as u32,
        flags: crate::abi::IOAS_FIXED_READ_WRITE,
        ioas_id,
        reserved: 0,
        user_va: region.base().as_ptr() as u64,
        length: region.len() as u64,
        iova,
    };
    pointer(iommufd, IOAS_MAP, map.as_mut_bytes()).map(drop)
}

/// The ranges of an iommufd's address space, at most as many as there is room for.
pub(crate) fn ioas_ranges(
    iommufd: BorrowedFd<'_>,
    ioas_id: u32,
    into: &mut [crate::abi::Pair],
) -> Result<usize, Errno> {
    let mut arg = crate::abi::IoasRanges {
        size: size_of::<crate::abi::IoasRanges>() as u32,
        ioas_id,
        num_iovas: into.len() as u32,
        reserved: 0,
        // Written through, at most `num_iovas` entries: they are borrowed for writing here.
        allowed_iovas: into.as_mut_ptr() as u64,
        out_iova_alignment: 0,
    };
    pointer(iommufd, IOAS_IOVA_RANGES, arg.as_mut_bytes())?;
    Ok((arg.num_iovas as usize).min(into.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn numbers_are_those_of_the_header() {
        assert_eq!((GET_API_VERSION.0, IOMMU_MAP_DMA, DEVICE_RESET.0), (0x3b64, 0x3b71, 0x3b6f));
        assert_eq!((IOAS_ALLOC.0, IOAS_MAP), (0x3b81, 0x3b85));
    }

    #[test]
    fn other_files_refuse_the_calls() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(plain(file.as_fd(), GET_API_VERSION, 0), Err(Errno::ENOTTY));
        let mut info = crate::abi::DeviceInfo::default();
        assert_eq!(sized(file.as_fd(), DEVICE_GET_INFO, &mut info), Err(Errno::ENOTTY));
        assert_eq!(info.argsz, 24);
        assert!(device_fd(file.as_fd(), c"0000:00:00.0").is_err());
    }
}
