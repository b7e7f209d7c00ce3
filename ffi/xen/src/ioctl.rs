//! The kernel's calls, as safe functions: each takes memory that the call cannot leave.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::abi::{
    BIND_INTERDOMAIN, BindInterdomain, GRANT_COPY, GrantCopy, GrantRef, MAP_GRANT_REF, MapGrantRef,
    NOTIFY, Port, RESET, UNBIND, UNMAP_GRANT_REF, UnmapGrantRef,
};
use crate::gntdev::Segments;

/// Calls with a structure of the call's size at least. Private: the callers below keep to what each
/// call may reach beyond it.
fn call(fd: BorrowedFd<'_>, number: u32, arg: &mut [u8]) -> Result<u32, Errno> {
    assert!(arg.len() >= (number >> 16) as usize, "a structure shorter than its call says");
    // SAFETY: the argument is as long as the call says, which was just checked; what two of the
    // calls reach beyond it their callers below vouch for. The descriptor is open; one of another
    // kind refuses the call.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), number as libc::Ioctl, arg.as_mut_ptr()) };
    Errno::result(done).map(|n| n as u32)
}

/// Prepares a mapping of grants; where in the file it lies.
pub(crate) fn map_grants(fd: BorrowedFd<'_>, refs: &[GrantRef]) -> Result<u64, Errno> {
    let head = MapGrantRef { count: refs.len() as u32, pad: 0, index: 0 };
    // The call reads as many references as `count` says: those that are here.
    let mut arg = [head.as_bytes(), refs.as_bytes()].concat();
    // An empty list has not even the one reference that the size counts; the kernel refuses it too.
    if refs.is_empty() {
        return Err(Errno::EINVAL);
    }
    call(fd, MAP_GRANT_REF, &mut arg)?;
    let (head, _) = MapGrantRef::read_from_prefix(&arg).map_err(|_| Errno::EIO)?;
    Ok(head.index)
}

/// Forgets a mapping.
pub(crate) fn unmap_grants(fd: BorrowedFd<'_>, index: u64, count: u32) -> Result<(), Errno> {
    let mut arg = UnmapGrantRef { index, count, pad: 0 };
    call(fd, UNMAP_GRANT_REF, arg.as_mut_bytes()).map(drop)
}

/// Copies between granted pages and regions.
pub(crate) fn grant_copy(fd: BorrowedFd<'_>, segments: &mut Segments<'_>) -> Result<(), Errno> {
    let raw = segments.raw_mut();
    // The call reads these segments, writes their statuses, and reaches the addresses in them:
    // `Segments` has only such as lie in regions that live as long as it does.
    let mut arg = GrantCopy { count: raw.len() as u32, pad: 0, segments: raw.as_mut_ptr() as u64 };
    call(fd, GRANT_COPY, arg.as_mut_bytes()).map(drop)
}

/// Makes a local port that is connected to another domain's.
pub(crate) fn bind(fd: BorrowedFd<'_>, remote_domain: u16, remote_port: u32) -> Result<u32, Errno> {
    let mut arg = BindInterdomain { remote_domain: remote_domain.into(), remote_port };
    call(fd, BIND_INTERDOMAIN, arg.as_mut_bytes())
}

/// Gives a local port up.
pub(crate) fn unbind(fd: BorrowedFd<'_>, port: u32) -> Result<(), Errno> {
    call(fd, UNBIND, Port { port }.as_mut_bytes()).map(drop)
}

/// Sends an event.
pub(crate) fn notify(fd: BorrowedFd<'_>, port: u32) -> Result<(), Errno> {
    call(fd, NOTIFY, Port { port }.as_mut_bytes()).map(drop)
}

/// Empties the queue of events and makes it usable again.
pub(crate) fn reset(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    call(fd, RESET, &mut []).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn other_files_refuse_the_calls() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let fd = file.as_fd();
        let one = [GrantRef { domid: 1, reference: 8 }];
        assert_eq!(map_grants(fd, &one), Err(Errno::ENOTTY));
        assert_eq!(map_grants(fd, &[]), Err(Errno::EINVAL));
        assert_eq!(unmap_grants(fd, 0, 1), Err(Errno::ENOTTY));
        assert_eq!(bind(fd, 1, 1), Err(Errno::ENOTTY));
        assert_eq!(unbind(fd, 1), Err(Errno::ENOTTY));
        assert_eq!(notify(fd, 1), Err(Errno::ENOTTY));
        assert_eq!(reset(fd), Err(Errno::ENOTTY));
    }
}
