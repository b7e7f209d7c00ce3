//! [`Server`]: listens on a unix socket or an address of a network, seats connections, ends them.
//!
//! One thread accepts, one thread serves each connection. Made, asked and ended by control code.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use reactor::{Clock, Wake};

use crate::claims::Claims;
use crate::conn::{Conn, DEPTH};
use crate::export::Export;
use crate::gate::{Gate, Way, admit};
use crate::handshake::{End, Line, Session, Terms, negotiate};
use crate::listen::{Error, SocketFile, listen_on};
use crate::proto::Rules;
use crate::seats::{Guest, Seats};
use crate::stats::{Counters, Latencies};
use crate::tls::TlsServer;
use crate::tls::pump::Pump;

/// How long a client may take from its connection until it enters transmission.
const HANDSHAKE_NS: u64 = 10_000_000_000;
/// How long accepting pauses when the process has no descriptor or memory for another connection.
const BACK_OFF_MS: u16 = 200;
/// How long [`Server::shutdown`] waits for threads to notice that their time is over.
const GRACE_NS: u64 = 1_000_000_000;
/// Send buffer asked of the kernel, in bytes: a large reply in one call. It caps this itself.
const SEND_BUFFER: usize = 1 << 20;

/// What the threads of a server share.
pub(crate) struct Shared {
    pub(crate) export: Export,
    pub(crate) clock: Clock,
    pub(crate) claims: Claims,
    pub(crate) seats: Seats,
    /// What comes before NBD on a connection.
    pub(crate) way: Way,
    pub(crate) stop: AtomicBool,
    /// Until when clients may finish, once `stop` is set.
    pub(crate) drain_until: AtomicU64,
    refused: AtomicU64,
}

/// A connection, for people and scripts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConnectionInfo {
    /// Counted from 1 in the order of arrival.
    pub number: u64,
    /// What it did so far.
    pub counters: Counters,
}

/// Who may come over a network, and how.
#[derive(Clone, Debug)]
pub enum Security {
    /// Nothing is said of the export before TLS is spoken, and nothing served without.
    Tls(TlsServer),
    /// Anybody of this host: the address must be the loopback's.
    Loopback,
    /// Anybody who can reach the address, in plain text.
    Plain,
}

/// A running NBD server for one export on one socket.
pub struct Server {
    shared: Arc<Shared>,
    file: Option<SocketFile>,
    address: Option<SocketAddr>,
    accept: Option<(JoinHandle<()>, Wake)>,
}

impl Server {
    /// Listens on `path`: when this returns, clients can connect. The socket has mode 0600. A
    /// socket file that nobody listens on is replaced.
    ///
    /// # Errors
    /// If another server listens there, something else has the name, the export makes no sense or
    /// the kernel refuses.
    pub fn bind(path: &Path, export: Export) -> Result<Server, Error> {
        export.check()?;
        let (listener, file) = listen_on(path)?;
        Server::start(Gate::Unix(listener), Way::Open, Some(file), path, export)
    }

    /// Listens on `path` as [`Server::bind`] does, for those who hand connections over: on each of
    /// theirs comes the descriptor of another one (`SCM_RIGHTS`), and the client on that is served,
    /// whatever it calls the export.
    ///
    /// # Errors
    /// As [`Server::bind`].
    pub fn bind_passing(path: &Path, export: Export) -> Result<Server, Error> {
        export.check()?;
        let (listener, file) = listen_on(path)?;
        Server::start(Gate::Unix(listener), Way::Passed, Some(file), path, export)
    }

    /// Listens on an address of a network: when this returns, clients can connect.
    ///
    /// # Errors
    /// If the address cannot be had, plain text is not meant for it, the export makes no sense or the
    /// kernel refuses.
    pub fn listen(
        address: SocketAddr,
        security: Security,
        export: Export,
    ) -> Result<Server, Error> {
        export.check()?;
        let way = match security {
            Security::Tls(tls) => Way::Tls(tls),
            Security::Loopback if !address.ip().is_loopback() => return Err(Error::Plain(address)),
            Security::Loopback | Security::Plain => Way::Open,
        };
        let name = address.to_string();
        let gate = Gate::listen(address, Path::new(&name))?;
        Server::start(gate, way, None, Path::new(&name), export)
    }

    /// `name`: of the socket, for messages.
    fn start(
        gate: Gate,
        way: Way,
        file: Option<SocketFile>,
        name: &Path,
        export: Export,
    ) -> Result<Server, Error> {
        let os = |what| move |source| Error::Os { path: name.to_owned(), what, source };
        let address = gate.address();
        let shared = Arc::new(Shared {
            export,
            clock: Clock::real(),
            claims: Claims::new(),
            seats: Seats::new(),
            way,
            stop: AtomicBool::new(false),
            drain_until: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let started = Wake::new().map_err(|e| os("cannot make a wake-up")(e.into()));
        let started = started.and_then(|wake| {
            let (s, w) = (shared.clone(), wake.clone());
            let body = move || accept(&s, &w, &gate);
            let thread = std::thread::Builder::new().name("nbd-accept".to_owned()).spawn(body);
            Ok((thread.map_err(os("cannot start a thread"))?, wake))
        });
        match started {
            Ok(accept) => Ok(Server { shared, file, address, accept: Some(accept) }),
            Err(e) => {
                file.iter().for_each(SocketFile::remove);
                Err(e)
            }
        }
    }

    /// Where it listens, if that is an address of a network: with the port that it was given.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// How many clients came so far, and what all of them did together.
    pub fn totals(&self) -> (u64, Counters) {
        self.shared.seats.totals()
    }

    /// How long the requests of all clients took, of those who have left too.
    pub fn latencies(&self) -> Latencies {
        self.shared.seats.latencies()
    }

    /// How many connections were closed at once because all seats were taken or the process was
    /// short of memory or descriptors.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::Relaxed)
    }

    /// The connections that are there now.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        let info = |g: Guest| ConnectionInfo { number: g.number, counters: g.cells.read() };
        self.shared.seats.guests().into_iter().map(info).collect()
    }

    /// Stops accepting, lets clients finish what they have asked for during at most `drain`, cuts
    /// them off and removes the socket file if it is still this server's. Must be called while
    /// the image's reactor runs. Returns how many connections still have requests in flight at
    /// the image (their threads end when it answers): 0 but for a device that hangs.
    pub fn shutdown(mut self, drain: Duration) -> usize {
        self.end(drain)
    }

    fn end(&mut self, drain: Duration) -> usize {
        let Some((thread, wake)) = self.accept.take() else { return 0 };
        let drain = u64::try_from(drain.as_nanos()).unwrap_or(u64::MAX);
        let now = self.shared.clock.now();
        self.shared.drain_until.store(now.saturating_add(drain), Ordering::Release);
        self.shared.stop.store(true, Ordering::Release);
        wake.wake();
        if thread.join().is_err() {
            log::error!("the NBD accepting thread panicked");
        }
        // First the name, so that nobody knocks in vain; then those who are in.
        self.file.iter().for_each(SocketFile::remove);
        let last = now.saturating_add(drain).saturating_add(GRACE_NS);
        loop {
            let guests = self.shared.seats.guests();
            if guests.is_empty() || self.shared.clock.now() > last {
                return guests.len();
            }
            for guest in guests {
                guest.signal.wake.wake();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

/// The accepting thread.
fn accept(shared: &Arc<Shared>, wake: &Wake, gate: &Gate) {
    let stopping = || shared.stop.load(Ordering::Acquire);
    let mut short = false;
    while !stopping() {
        wake.about_to_sleep();
        if !stopping() {
            let mut fds = [
                PollFd::new(wake.fd(), PollFlags::POLLIN),
                PollFd::new(gate.as_fd(), PollFlags::POLLIN),
            ];
            // A connection that cannot be accepted keeps the listener readable: do not look then.
            let (count, timeout) =
                if short { (1, PollTimeout::from(BACK_OFF_MS)) } else { (2, PollTimeout::NONE) };
            let _ = poll(&mut fds[..count], timeout);
        }
        wake.awake();
        short = false;
        while !stopping() && !short {
            match gate.accept() {
                Ok(socket) => seat(shared, socket),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // The client has gone while it waited.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    log::warn!("cannot accept an NBD client now: {e}");
                    short = true;
                }
            }
        }
    }
}

/// Gives a new client a seat and a thread, or turns it away.
fn seat(shared: &Arc<Shared>, socket: OwnedFd) {
    let refuse = |why: &str| {
        if shared.refused.fetch_add(1, Ordering::Relaxed).is_power_of_two() {
            log::warn!("an NBD client was turned away: {why}");
        }
    };
    let Some((seat, guest)) = shared.seats.take() else { return refuse("no free seat") };
    let (s, number) = (shared.clone(), guest.number);
    let name = format!("nbd-{number}");
    let body = move || serve(&s, seat, guest, socket);
    if let Err(e) = std::thread::Builder::new().name(name).spawn(body) {
        shared.seats.leave(seat, None);
        refuse(&e.to_string());
    }
}

/// A connection's thread.
fn serve(shared: &Arc<Shared>, seat: usize, guest: Guest, socket: OwnedFd) {
    let (number, wake) = (guest.number, guest.signal.wake.clone());
    let deadline = shared.clock.now() + HANDSHAKE_NS;
    let mut memory = None;
    let mut pump = None;
    let talk = || {
        let admitted = admit(shared, socket, &wake, deadline, number)?;
        pump = admitted.pump;
        let _ = setsockopt(&admitted.socket, sockopt::SndBuf, &SEND_BUFFER);
        let line = Line {
            fd: admitted.socket.as_fd(),
            wake: &wake,
            stop: &shared.stop,
            clock: &shared.clock,
            deadline,
        };
        let terms = Terms {
            no_zeroes: admitted.no_zeroes,
            secure: pump.is_some(),
            any_name: matches!(shared.way, Way::Passed),
        };
        let session = negotiate(&line, &shared.export, terms, || {
            if memory.is_none() {
                memory = Some(shared.seats.memory(seat).map_err(|e| e.to_string())?);
            }
            let regions = memory.as_ref().map(|m| m.regions()).unwrap_or_default();
            (shared.export.attach)(DEPTH, regions)
        })?;
        Ok((session, admitted.socket))
    };
    let talked = talk();
    let memory = match (talked, memory) {
        (Ok((session, socket)), Some(memory)) => {
            let rules = rules(&shared.export, &session);
            let (both, contexts) = ((memory, session.attached), session.contexts);
            let conn = Conn::new(shared.clone(), (seat, guest), socket, both, (rules, contexts));
            let memory = conn.run();
            log::debug!("NBD client {number} has left");
            memory
        }
        (Ok(_), None) => None,
        (Err(end), memory) => {
            match end {
                End::Left | End::Stopped => {}
                End::Late => log::warn!("NBD client {number} took too long to negotiate"),
                End::Broke(what) => log::warn!("NBD client {number} broke the protocol: {what}"),
                End::Refused(why) => log::warn!("NBD client {number} was refused: {why}"),
            }
            memory
        }
    };
    if let Some(Err(e)) = pump.map(Pump::join) {
        log::warn!("NBD client {number}, TLS: {e}");
    }
    shared.seats.leave(seat, memory);
}

fn rules<T>(export: &Export, session: &Session<T>) -> Rules {
    Rules {
        size: export.size(),
        block: export.info.block_size,
        read_only: export.is_read_only(),
        structured: session.structured,
        contexts: !session.contexts.is_empty(),
        aligned: session.aligned,
        df_limit: crate::buffers::LARGE
            .min(export.info.max_transfer & !(export.info.block_size - 1)),
        fast_zero: export.info.write_zeroes,
    }
}
