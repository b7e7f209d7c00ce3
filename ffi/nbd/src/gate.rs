//! [`Gate`]: where clients knock; and what comes before NBD's options on a connection ([`admit`]).

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{SockType, getsockopt, setsockopt, sockopt};
use reactor::Wake;

use crate::handshake::{End, Line, greet, start_tls};
use crate::listen::Error;
use crate::server::Shared;
use crate::sockio::receive_descriptor;
use crate::tls::TlsServer;
use crate::tls::pump::{Limits, Pump};

/// After how many seconds of silence the kernel asks whether the other host is there, how often, and
/// how long it waits for an answer, also to data (in milliseconds).
const IDLE_S: u32 = 60;
const ASK_S: u32 = 15;
const SILENCE_MS: u32 = 120_000;

/// A listening socket.
pub(crate) enum Gate {
    Unix(UnixListener),
    Network(TcpListener),
}

/// What comes before NBD's options.
pub(crate) enum Way {
    /// Nothing but the greeting.
    Open,
    Tls(TlsServer),
    /// The client's connection is another one, whose descriptor comes on this one.
    Passed,
}

impl Gate {
    /// Listens on an address of a network. `name`: the same, for messages.
    pub(crate) fn listen(address: SocketAddr, name: &Path) -> Result<Gate, Error> {
        let os = |what| move |source| Error::Os { path: name.to_owned(), what, source };
        let listener = TcpListener::bind(address).map_err(os("cannot listen"))?;
        listener.set_nonblocking(true).map_err(os("cannot listen"))?;
        Ok(Gate::Network(listener))
    }

    /// Of a network.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        match self {
            Gate::Unix(_) => None,
            Gate::Network(listener) => listener.local_addr().ok(),
        }
    }

    /// The next client; errors as of `accept(2)`, `EAGAIN` if there is none.
    pub(crate) fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Gate::Unix(listener) => Ok(listener.accept()?.0.into()),
            Gate::Network(listener) => {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                watch_over(&stream);
                Ok(stream.into())
            }
        }
    }
}

impl AsFd for Gate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Gate::Unix(listener) => listener.as_fd(),
            Gate::Network(listener) => listener.as_fd(),
        }
    }
}

/// Has the kernel end a connection whose other host is gone without a word.
pub(crate) fn watch_over(socket: &impl AsFd) {
    // What a kernel does not have is no reason to serve nobody.
    let _ = setsockopt(socket, sockopt::KeepAlive, &true);
    let _ = setsockopt(socket, sockopt::TcpKeepIdle, &IDLE_S);
    let _ = setsockopt(socket, sockopt::TcpKeepInterval, &ASK_S);
    let _ = setsockopt(socket, sockopt::TcpUserTimeout, &SILENCE_MS);
}

/// Takes the descriptor of a client's connection; what else is said is of no interest.
fn take_over(
    shared: &Shared,
    control: &OwnedFd,
    wake: &Wake,
    deadline: u64,
) -> Result<OwnedFd, End> {
    let fd = control.as_fd();
    let line = Line { fd, wake, stop: &shared.stop, clock: &shared.clock, deadline };
    let socket = loop {
        match receive_descriptor(fd) {
            Ok(Some(socket)) => break socket,
            Ok(None) => return Err(End::Broke("no connection was handed over")),
            Err(Errno::EAGAIN | Errno::EINTR) => line.wait(PollFlags::POLLIN)?,
            Err(_) => return Err(End::Left),
        }
    };
    match getsockopt(&socket, sockopt::SockType) {
        Ok(SockType::Stream) => {
            // Most come from another host.
            watch_over(&socket);
            Ok(socket)
        }
        _ => Err(End::Broke("what was handed over is no stream socket")),
    }
}

/// A connection whose next word is an option.
pub(crate) struct Admitted {
    pub(crate) socket: OwnedFd,
    pub(crate) no_zeroes: bool,
    /// What speaks TLS behind the socket.
    pub(crate) pump: Option<Pump>,
}

/// Greets a client and has it go over to TLS, if that is required.
pub(crate) fn admit(
    shared: &Arc<Shared>,
    socket: OwnedFd,
    wake: &Wake,
    deadline: u64,
    number: u64,
) -> Result<Admitted, End> {
    let socket = match shared.way {
        Way::Passed => take_over(shared, &socket, wake, deadline)?,
        Way::Open | Way::Tls(_) => socket,
    };
    let line =
        Line { fd: socket.as_fd(), wake, stop: &shared.stop, clock: &shared.clock, deadline };
    let no_zeroes = greet(&line)?;
    let Way::Tls(tls) = &shared.way else { return Ok(Admitted { socket, no_zeroes, pump: None }) };
    start_tls(&line)?;
    let s = shared.clone();
    let limits = Limits {
        clock: shared.clock.clone(),
        handshake: deadline,
        hurry: move || s.stop.load(Ordering::Acquire),
    };
    let session = tls.begin().map_err(End::Refused)?;
    let started = Pump::start(socket, session, limits, format!("nbd-tls-{number}"));
    let (socket, pump) = started.map_err(|e| End::Refused(e.to_string()))?;
    Ok(Admitted { socket, no_zeroes, pump: Some(pump) })
}
