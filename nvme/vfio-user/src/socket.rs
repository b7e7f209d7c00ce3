//! Whole messages, with their descriptors, on a socket that never blocks.
//!
//! [`Inbox`] is used by the one thread that reads a socket, [`send`] by any, one at a time.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::time::TimeSpec;
use reactor::Clock;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::Error;
use crate::version::MAX_FDS;
use crate::wire::{HEADER, Header};

/// The kernel passes no more descriptors at a time: with room for all of them none can get lost on
/// the way, which would leave them open for good.
const KERNEL_MAX_FDS: usize = 253;

/// A message that arrived.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    /// At most [`MAX_FDS`], all of them closed on exec.
    pub(crate) fds: Vec<OwnedFd>,
}

/// What has arrived of the next message.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    head: [u8; HEADER],
    got: usize,
    header: Option<Header>,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// When its first byte came.
    began: Option<u64>,
}

impl Inbox {
    /// Takes what is there; the message if it is complete.
    pub(crate) fn take(&mut self, stream: &UnixStream, now: u64) -> Result<Option<Message>, Error> {
        loop {
            let into = match self.header {
                None => &mut self.head[self.got..],
                Some(_) => &mut self.body[self.got..],
            };
            if !into.is_empty() {
                match receive(stream, into, &mut self.fds)? {
                    None => return Ok(None),
                    Some(n) => self.got += n,
                }
                self.began.get_or_insert(now);
                if self.fds.len() > MAX_FDS {
                    return Error::protocol(format!("{} descriptors at once", self.fds.len()));
                }
            }
            match self.header {
                None if self.got == HEADER => {
                    let Some(header) = Header::decode(&self.head) else {
                        return Error::protocol("a message that begins with no header");
                    };
                    self.header = Some(header);
                    self.body = vec![0; header.body()];
                    self.got = 0;
                }
                Some(header) if self.got == self.body.len() => {
                    let Inbox { body, fds, .. } = std::mem::take(self);
                    return Ok(Some(Message { header, body, fds }));
                }
                _ => {}
            }
        }
    }

    /// When the message that is arriving began to.
    pub(crate) fn began(&self) -> Option<u64> {
        self.began
    }
}

/// Reads what is there, 1 byte at least; `None` if nothing is.
fn receive(
    stream: &UnixStream,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, Error> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(into)];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = loop {
        match recvmsg(stream, &mut iov, &mut control, flags) {
            Ok(got) => break got,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::CONNRESET) => return Err(Error::Closed),
            Err(e) => {
                let e = Errno::from_raw(e.raw_os_error());
                return Err(Error::os("reading the socket")(e));
            }
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        // The process had no more: what came of them is closed with the connection.
        return Err(Error::os("reading descriptors")(Errno::EMFILE));
    }
    match got.bytes {
        0 => Err(Error::Closed),
        n => Ok(Some(n)),
    }
}

/// Sends a whole message, the descriptors with its first bytes. Waits until `until` at most if the
/// other side does not read.
pub(crate) fn send(
    stream: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    clock: &Clock,
    until: u64,
) -> Result<(), Error> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let mut sent = 0;
    while sent < bytes.len() {
        let with: &[ControlMessage<'_>] = if sent == 0 && !raw.is_empty() { &rights } else { &[] };
        match sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&bytes[sent..])], with, flags, None)
        {
            Ok(n) => sent += n,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let now = clock.now();
                if now >= until {
                    return Err(Error::Late("room for a message"));
                }
                wait(&[(stream.as_fd(), PollFlags::POLLOUT)], Some(until - now))?;
            }
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(Error::Closed),
            Err(e) => return Err(Error::os("writing to the socket")(e)),
        }
    }
    Ok(())
}

/// Waits until one of the descriptors is ready, or for so many nanoseconds.
pub(crate) fn wait(
    fds: &[(BorrowedFd<'_>, PollFlags)],
    nanoseconds: Option<u64>,
) -> Result<(), Error> {
    let mut fds: Vec<PollFd<'_>> = fds.iter().map(|&(fd, flags)| PollFd::new(fd, flags)).collect();
    let time = nanoseconds.map(std::time::Duration::from_nanos).map(TimeSpec::from_duration);
    match ppoll(&mut fds, time, None) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(Error::os("waiting for the socket")(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Kind, command};

    fn pair() -> (UnixStream, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        b.set_nonblocking(true).unwrap();
        (a, b)
    }

    fn message(body: &[u8]) -> Vec<u8> {
        let header = Header::new(7, command::DMA_MAP, Kind::Command, body.len());
        [&header.encode()[..], body].concat()
    }

    fn later(clock: &Clock) -> u64 {
        clock.now() + 1_000_000_000
    }

    #[test]
    fn messages_arrive_whole_however_they_are_cut() {
        let clock = Clock::real();
        let (a, b) = pair();
        let bytes = message(&[1, 2, 3]);
        let mut inbox = Inbox::default();
        for (i, byte) in bytes.iter().enumerate() {
            assert!(inbox.take(&b, 5).unwrap().is_none());
            assert_eq!(inbox.began(), (i > 0).then_some(5));
            let file = std::fs::File::open("/dev/null").unwrap();
            // Descriptors come with any byte.
            let fds = [file.as_fd()];
            let fds = if i == 0 || i == 17 { &fds[..] } else { &[] };
            send(&a, &[*byte], fds, &clock, later(&clock)).unwrap();
        }
        // And the next one right behind.
        send(&a, &message(&[]), &[], &clock, later(&clock)).unwrap();
        let m = inbox.take(&b, 9).unwrap().unwrap();
        assert_eq!((m.body.as_slice(), m.fds.len(), m.header.id), (&[1u8, 2, 3][..], 2, 7));
        for fd in &m.fds {
            let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags & 1, 1, "closed on exec");
        }
        let next = inbox.take(&b, 9).unwrap().unwrap();
        assert!(next.body.is_empty() && next.fds.is_empty());
        drop(a);
        assert!(matches!(inbox.take(&b, 9), Err(Error::Closed)));
    }

    #[test]
    fn descriptors_without_end_are_refused_and_closed() {
        let clock = Clock::real();
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let (a, b) = pair();
        let before = open();
        let file = std::fs::File::open("/dev/null").unwrap();
        let many = [file.as_fd(); KERNEL_MAX_FDS];
        send(&a, &message(&[0; 8]), &many, &clock, later(&clock)).unwrap();
        let mut inbox = Inbox::default();
        assert!(matches!(inbox.take(&b, 0), Err(Error::Protocol(_))));
        drop(inbox);
        drop(file);
        // Other tests of this process open some meanwhile, but not 253.
        assert!(open() < before + 200);
    }

    #[test]
    fn headers_that_lie_are_refused_before_memory_is_taken() {
        for size in [0u32, 15, u32::MAX] {
            let (a, b) = pair();
            let mut bytes = message(&[]);
            bytes[4..8].copy_from_slice(&size.to_le_bytes());
            let clock = Clock::real();
            send(&a, &bytes, &[], &clock, later(&clock)).unwrap();
            let mut inbox = Inbox::default();
            assert!(matches!(inbox.take(&b, 0), Err(Error::Protocol(_))));
            assert_eq!(inbox.body.capacity(), 0);
        }
    }

    #[test]
    fn a_peer_that_does_not_read_is_not_waited_for_longer_than_said() {
        let clock = Clock::real();
        let (a, _b) = pair();
        let until = clock.now() + 50_000_000;
        let big = vec![0; 4 << 20];
        assert!(matches!(send(&a, &big, &[], &clock, until), Err(Error::Late(_))));
        assert!((50_000_000..2_000_000_000).contains(&(clock.now() - until + 50_000_000)));
    }
}
