//! Socket calls whose bytes lie partly in DMA regions: the one place of this crate with `unsafe`.
//!
//! Region memory is never behind a reference, so the standard library's reads and writes cannot
//! be used on it; the kernel is given checked addresses instead. Called by service threads.

use std::io::IoSliceMut;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use dma::Region;
use nix::errno::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// As many as the kernel lets through with one message: all of them are taken, so that none is lost.
const DESCRIPTORS: usize = 253;

/// Most parts of one gathered send.
const PARTS: usize = 64;

/// The parts of one gathered send, in order.
pub(crate) struct Gather<'a> {
    iov: [libc::iovec; PARTS],
    count: usize,
    life: PhantomData<&'a [u8]>,
}

/// An entry that names nothing.
const EMPTY: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// The address of `[offset, offset + len)` of a region, for the kernel. Panics if that is outside.
fn region_part(region: &Region, offset: usize, len: usize) -> libc::iovec {
    assert!(offset <= region.len() && len <= region.len() - offset, "I/O outside a DMA region");
    // SAFETY: the offset was just found to lie within the mapping that `region` keeps alive.
    let base = unsafe { region.base().as_ptr().add(offset) };
    libc::iovec { iov_base: base.cast(), iov_len: len }
}

impl<'a> Gather<'a> {
    /// No parts.
    pub(crate) fn new() -> Gather<'a> {
        Gather { iov: [EMPTY; PARTS], count: 0, life: PhantomData }
    }

    /// Whether `n` more parts fit.
    pub(crate) fn fits(&self, n: usize) -> bool {
        self.count + n <= PARTS
    }

    /// Adds private bytes; an empty part is left out. Panics if there is no place.
    pub(crate) fn bytes(&mut self, bytes: &'a [u8]) {
        let base = bytes.as_ptr().cast_mut().cast();
        self.part(libc::iovec { iov_base: base, iov_len: bytes.len() });
    }

    /// Adds `[offset, offset + len)` of a region. Panics if that is outside or there is no place.
    pub(crate) fn region(&mut self, region: &'a Region, offset: usize, len: usize) {
        self.part(region_part(region, offset, len));
    }

    fn part(&mut self, part: libc::iovec) {
        if part.iov_len > 0 {
            self.iov[self.count] = part;
            self.count += 1;
        }
    }

    /// Sends what the socket takes now, without waiting and without a signal; returns how much.
    ///
    /// # Errors
    /// `EAGAIN` if it takes nothing now, `EPIPE` if the peer reads no more.
    pub(crate) fn send(&self, fd: BorrowedFd<'_>) -> Result<usize, Errno> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: all-zero is a valid `msghdr`: no name, no parts, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.iov.as_ptr().cast_mut();
        message.msg_iovlen = self.count as _;
        // SAFETY: the kernel only reads the parts. Each lies in a slice or region that is borrowed
        // for 'a (checked when it was added), and `self` outlives the call.
        let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) };
        Errno::result(sent).map(|n| n as usize)
    }
}

/// Receives what is there, without waiting: first into `[offset, offset + len)` of the region
/// given, then into `rest`. Returns the number of bytes, 0 at the end of the stream.
///
/// # Errors
/// `EAGAIN` if nothing is there now. Panics if the range lies outside the region.
pub(crate) fn receive(
    fd: BorrowedFd<'_>,
    first: Option<(&Region, usize, usize)>,
    rest: &mut [u8],
) -> Result<usize, Errno> {
    let tail = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
    let mut iov = match first {
        Some((region, offset, len)) => [region_part(region, offset, len), tail],
        None => [tail, EMPTY],
    };
    // SAFETY: all-zero is a valid `msghdr`: no name, no parts, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iov.as_mut_ptr();
    message.msg_iovlen = iov.len() as _;
    let flags = libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes to the parts only: a checked range of a region that `first` keeps
    // alive (which anybody may write at any time), and `rest`, which is exclusively ours.
    let got = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
    Errno::result(got).map(|n| n as usize)
}

/// Receives some bytes and the descriptor that came with them, without waiting; `None` if none came.
/// The bytes, and further descriptors, are dropped.
///
/// # Errors
/// `EAGAIN` if nothing is there now.
pub(crate) fn receive_descriptor(fd: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let mut iov = [IoSliceMut::new(&mut bytes)];
    recvmsg(fd, &mut iov, &mut control, flags).map_err(|e| Errno::from_raw(e.raw_os_error()))?;
    // What is not taken the buffer closes, also of a message that the process had no descriptors left for.
    let rights = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    Ok(rights)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dma::PageSize;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_cross_between_regions_and_private_memory() {
        let (a, b) = UnixStream::pair().unwrap();
        let region = Region::new(8192, PageSize::Small).unwrap();
        region.write(4090, b"region");
        let mut out = Gather::new();
        out.bytes(b"head ");
        out.bytes(b"");
        out.region(&region, 4090, 6);
        out.bytes(b" tail");
        assert_eq!(out.count, 3);
        assert_eq!(out.send(a.as_fd()), Ok(16));
        let mut rest = [0; 32];
        assert_eq!(receive(b.as_fd(), Some((&region, 100, 7)), &mut rest), Ok(16));
        let mut first = [0; 7];
        region.read(100, &mut first);
        assert_eq!((&first[..], &rest[..9]), (&b"head re"[..], &b"gion tail"[..]));
        assert_eq!(receive(b.as_fd(), None, &mut rest), Err(Errno::EAGAIN));
        drop(a);
        assert_eq!(receive(b.as_fd(), None, &mut rest), Ok(0));
        let mut out = Gather::new();
        out.bytes(b"x");
        assert_eq!(out.send(b.as_fd()), Err(Errno::EPIPE));
    }

    #[test]
    #[should_panic(expected = "outside a DMA region")]
    fn a_range_outside_the_region_is_never_given_to_the_kernel() {
        let region = Region::new(4096, PageSize::Small).unwrap();
        Gather::new().region(&region, 4090, 7);
    }

    /// Sends one end of so many new pairs with a byte; returns the other ends.
    fn send_ends(to: &UnixStream, count: usize) -> Vec<UnixStream> {
        let (mine, theirs): (Vec<_>, Vec<_>) =
            (0..count).map(|_| UnixStream::pair().unwrap()).unzip();
        let raw: Vec<_> = theirs.iter().map(AsRawFd::as_raw_fd).collect();
        let (iov, rights) = ([std::io::IoSlice::new(b"x")], [ControlMessage::ScmRights(&raw)]);
        assert_eq!(sendmsg::<()>(to.as_raw_fd(), &iov, &rights, MsgFlags::empty(), None), Ok(1));
        mine
    }

    /// Whether nobody has the other end of a pair any more.
    fn is_closed(end: &UnixStream) -> bool {
        end.set_nonblocking(true).unwrap();
        matches!((&*end).read(&mut [0]), Ok(0))
    }

    #[test]
    fn one_descriptor_is_taken_and_the_others_are_closed() {
        let (a, b) = UnixStream::pair().unwrap();
        let ends = send_ends(&a, 3);
        let taken = receive_descriptor(b.as_fd()).unwrap().unwrap();
        assert_eq!(ends.iter().map(is_closed).collect::<Vec<_>>(), [false, true, true]);
        drop(taken);
        assert!(is_closed(&ends[0]));
        (&a).write_all(b"y").unwrap();
        assert!(receive_descriptor(b.as_fd()).unwrap().is_none());
        assert_eq!(receive_descriptor(b.as_fd()).unwrap_err(), Errno::EAGAIN);
    }

    /// In a process of its own: its limit holds for all of it.
    #[test]
    fn nothing_stays_open_of_what_a_process_has_no_room_for() {
        const ALONE: &str = "SOCKIO_ALONE";
        if std::env::var_os(ALONE).is_none() {
            let name = "sockio::tests::nothing_stays_open_of_what_a_process_has_no_room_for";
            let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
            let done = alone.args(["--exact", name]).env(ALONE, "").output().unwrap();
            let said = String::from_utf8_lossy(&done.stdout);
            assert!(done.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let (a, b) = UnixStream::pair().unwrap();
        let ends = send_ends(&a, 8);
        // Room for two more.
        let highest = std::fs::File::open("/proc/self/stat").unwrap().as_raw_fd();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, highest as u64 + 2, hard).unwrap();
        drop(receive_descriptor(b.as_fd()));
        assert!(ends.iter().all(is_closed));
    }
}
