//! [`Wire`]: the socket of a client, whose waiting has an end.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, MsgFlags};
use reactor::Clock;

use super::{ClientError, Result, remote::Remote};
use crate::tls::pump::{Limits, Pump};

/// How often it is looked whether to stop, in milliseconds.
const LOOK_MS: u64 = 100;

/// See the module's text.
pub(super) struct Wire {
    socket: Option<OwnedFd>,
    pump: Option<Pump>,
    hurry: Arc<AtomicBool>,
    clock: Clock,
    patience: u64,
    /// Until when all of the handshake must have been said.
    handshake: Option<u64>,
    stop: Arc<AtomicBool>,
}

fn lost(why: impl ToString) -> ClientError {
    ClientError::Lost(why.to_string())
}

impl Wire {
    pub(super) fn connect(
        remote: &Remote,
        clock: &Clock,
        patience: u64,
        stop: Arc<AtomicBool>,
    ) -> Result<Wire> {
        let handshake = Some(clock.now().saturating_add(patience));
        let connected = remote.connect(std::time::Duration::from_nanos(patience));
        let socket = connected.map_err(|e| ClientError::Connect(remote.to_string(), e))?;
        let (clock, hurry) = (clock.clone(), Arc::default());
        Ok(Wire { socket: Some(socket), pump: None, hurry, clock, patience, handshake, stop })
    }

    /// Speaks TLS from now on.
    pub(super) fn seal(&mut self, session: rustls::Connection) -> Result<()> {
        let Some(socket) = self.socket.take() else { return Err(lost("it has ended")) };
        let (hurry, stop) = (self.hurry.clone(), self.stop.clone());
        let limits = Limits {
            clock: self.clock.clone(),
            handshake: self.until(),
            hurry: move || hurry.load(Ordering::Acquire) || stop.load(Ordering::Acquire),
        };
        let started = Pump::start(socket, session, limits, "nbd-tls-client".to_owned());
        let (inside, pump) = started.map_err(lost)?;
        (self.socket, self.pump) = (Some(inside), Some(pump));
        Ok(())
    }

    /// The handshake has ended: what follows has its own time.
    pub(super) fn has_agreed(&mut self) {
        self.handshake = None;
    }

    /// Until when what begins now may take.
    fn until(&self) -> u64 {
        let until = self.clock.now().saturating_add(self.patience);
        self.handshake.map_or(until, |handshake| until.min(handshake))
    }

    /// Whether it goes on.
    fn check(&self, until: u64) -> Result<()> {
        if self.stop.load(Ordering::Acquire) {
            return Err(lost("it was ended from here"));
        }
        match self.clock.now() >= until {
            true => Err(lost("the other side takes too long")),
            false => Ok(()),
        }
    }

    fn socket(&self) -> Result<&OwnedFd> {
        self.socket.as_ref().ok_or_else(|| lost("it has ended"))
    }

    /// Waits until the socket is ready, or it takes too long.
    fn wait(&self, events: PollFlags, until: u64) -> Result<()> {
        self.check(until)?;
        let left = until.saturating_sub(self.clock.now()).div_ceil(1_000_000);
        let mut fds = [PollFd::new(self.socket()?.as_fd(), events)];
        let timeout = PollTimeout::try_from(left.min(LOOK_MS)).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(lost(e.desc())),
        }
    }

    /// What to say of a connection that has ended.
    fn ended(&mut self) -> ClientError {
        self.socket = None;
        match self.pump.take().map(Pump::join) {
            Some(Err(e)) => ClientError::Tls(e),
            _ => lost("the other side has closed it"),
        }
    }

    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<()> {
        let until = self.until();
        if self.handshake.is_some() {
            // Also of one who never has this wait.
            self.check(until)?;
        }
        let mut at = 0;
        while at < into.len() {
            let fd = self.socket()?.as_raw_fd();
            match socket::recv(fd, &mut into[at..], MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err(self.ended()),
                Ok(n) => at += n,
                Err(Errno::EAGAIN | Errno::EINTR) => self.wait(PollFlags::POLLIN, until)?,
                Err(Errno::ECONNRESET) => return Err(self.ended()),
                Err(e) => return Err(lost(e.desc())),
            }
        }
        Ok(())
    }

    pub(super) fn read_array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut raw = [0; N];
        self.read(&mut raw)?;
        Ok(raw)
    }

    /// Sends two parts, one after the other.
    pub(super) fn write(&mut self, mut first: &[u8], mut rest: &[u8]) -> Result<()> {
        let until = self.until();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while !first.is_empty() || !rest.is_empty() {
            let fd = self.socket()?.as_raw_fd();
            let both = [IoSlice::new(first), IoSlice::new(rest)];
            match socket::sendmsg::<()>(fd, &both, &[], flags, None) {
                Ok(n) => {
                    rest = &rest[n.saturating_sub(first.len())..];
                    first = &first[n.min(first.len())..];
                }
                Err(Errno::EAGAIN | Errno::EINTR) => self.wait(PollFlags::POLLOUT, until)?,
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(self.ended()),
                Err(e) => return Err(lost(e.desc())),
            }
        }
        Ok(())
    }

    /// Whether nothing has come, not even the end.
    pub(super) fn is_silent(&self) -> Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        match socket::recv(self.socket()?.as_raw_fd(), &mut [0], flags) {
            Ok(0) => Err(lost("the other side has closed it")),
            Ok(_) => Err(ClientError::Protocol("it says something that was not asked")),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(e) => Err(lost(e.desc())),
        }
    }

    /// Closes it; what was sent still goes out.
    pub(super) fn end(&mut self) {
        self.socket = None;
        // How it ends does not matter any more.
        let _ = self.pump.take().map(Pump::join);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.hurry.store(true, Ordering::Release);
        self.end();
    }
}
