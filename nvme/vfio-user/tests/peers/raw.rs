//! A peer that sends whatever it is told to.

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vfio_user::wire::{HEADER, Header, Kind, command};

pub(crate) struct Raw(pub(crate) UnixStream);

impl Raw {
    /// Connects and sends nothing.
    pub(crate) fn connect(path: &Path) -> Raw {
        Raw::of(UnixStream::connect(path).unwrap())
    }

    pub(crate) fn of(stream: UnixStream) -> Raw {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Raw(stream)
    }

    /// Connects and says which version it speaks.
    pub(crate) fn greeted(path: &Path) -> Raw {
        let mut raw = Raw::connect(path);
        raw.ask(command::VERSION, b"\0\0\0\0{}\0").unwrap();
        raw
    }

    pub(crate) fn send(&mut self, id: u16, command: u16, kind: Kind, body: &[u8]) {
        let header = Header::new(id, command, kind, body.len());
        // The other side may have gone already.
        let _ = self.0.write_all(&[&header.encode()[..], body].concat());
    }

    pub(crate) fn send_fds(
        &mut self,
        id: u16,
        command: u16,
        kind: Kind,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) {
        let header = Header::new(id, command, kind, body.len());
        let bytes = [&header.encode()[..], body].concat();
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[] } else { &rights[..] };
        let iov = [IoSlice::new(&bytes)];
        let sent = sendmsg::<()>(self.0.as_raw_fd(), &iov, rights, MsgFlags::MSG_NOSIGNAL, None);
        assert_eq!(sent, Ok(bytes.len()));
    }

    /// The next message; `None` when the other side has closed.
    pub(crate) fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut head = [0; HEADER];
        self.0.read_exact(&mut head).ok()?;
        let header = Header::decode(&head).expect("a header");
        let mut body = vec![0; header.body()];
        self.0.read_exact(&mut body).ok()?;
        Some((header, body))
    }

    /// Sends a command; the body of the answer, or the errno.
    pub(crate) fn ask(&mut self, command: u16, body: &[u8]) -> Result<Vec<u8>, u32> {
        self.ask_fds(command, body, &[])
    }

    pub(crate) fn ask_fds(
        &mut self,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, u32> {
        self.send_fds(77, command, Kind::Command, body, fds);
        let (header, body) = self.receive().expect("an answer");
        assert_eq!((header.id, header.command), (77, command));
        match header.kind {
            Kind::Reply => Ok(body),
            Kind::Failed(errno) => {
                assert!(body.is_empty());
                Err(errno)
            }
            kind => panic!("{kind:?} instead of an answer"),
        }
    }

    /// Whether the other side closes the connection, whatever it sends before.
    pub(crate) fn is_left(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
