//! [`Server`]: listens on a unix socket, seats connections, ends them.
//!
//! One thread accepts, one thread serves each connection. Made, asked and ended by control code.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
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
use crate::handshake::{End, Line, Session, negotiate};
use crate::listen::{Error, SocketFile, listen_on};
use crate::proto::Rules;
use crate::seats::{Guest, Seats};
use crate::stats::{Counters, Latencies};

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

/// A running NBD server for one export on one unix socket.
pub struct Server {
    shared: Arc<Shared>,
    file: SocketFile,
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
        let os = |what| move |source| Error::Os { path: path.to_owned(), what, source };
        let wake = Wake::new().map_err(|e| os("cannot make a wake-up")(e.into()))?;
        let (listener, file) = listen_on(path)?;
        let shared = Arc::new(Shared {
            export,
            clock: Clock::real(),
            claims: Claims::new(),
            seats: Seats::new(),
            stop: AtomicBool::new(false),
            drain_until: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let (s, w) = (shared.clone(), wake.clone());
        let body = move || accept(&s, &w, &listener);
        match std::thread::Builder::new().name("nbd-accept".to_owned()).spawn(body) {
            Ok(thread) => Ok(Server { shared, file, accept: Some((thread, wake)) }),
            Err(e) => {
                file.remove();
                Err(os("cannot start a thread")(e))
            }
        }
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
        self.file.remove();
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
fn accept(shared: &Arc<Shared>, wake: &Wake, listener: &UnixListener) {
    let stopping = || shared.stop.load(Ordering::Acquire);
    let mut short = false;
    while !stopping() {
        wake.about_to_sleep();
        if !stopping() {
            let mut fds = [
                PollFd::new(wake.fd(), PollFlags::POLLIN),
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            ];
            // A connection that cannot be accepted keeps the listener readable: do not look then.
            let (count, timeout) =
                if short { (1, PollTimeout::from(BACK_OFF_MS)) } else { (2, PollTimeout::NONE) };
            let _ = poll(&mut fds[..count], timeout);
        }
        wake.awake();
        short = false;
        while !stopping() && !short {
            match listener.accept() {
                Ok((stream, _)) => seat(shared, stream),
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
fn seat(shared: &Arc<Shared>, stream: UnixStream) {
    let refuse = |why: &str| {
        if shared.refused.fetch_add(1, Ordering::Relaxed).is_power_of_two() {
            log::warn!("an NBD client was turned away: {why}");
        }
    };
    let Some((seat, guest)) = shared.seats.take() else { return refuse("no free seat") };
    let (s, number) = (shared.clone(), guest.number);
    let name = format!("nbd-{number}");
    let body = move || serve(&s, seat, guest, stream);
    if let Err(e) = std::thread::Builder::new().name(name).spawn(body) {
        shared.seats.leave(seat, None);
        refuse(&e.to_string());
    }
}

/// A connection's thread.
fn serve(shared: &Shared, seat: usize, guest: Guest, stream: UnixStream) {
    // Fails only for a descriptor that is no socket; every call says MSG_DONTWAIT besides.
    let _ = stream.set_nonblocking(true);
    let _ = setsockopt(&stream, sockopt::SndBuf, &SEND_BUFFER);
    let line = Line {
        fd: stream.as_fd(),
        wake: &guest.signal.wake,
        stop: &shared.stop,
        clock: &shared.clock,
        deadline: shared.clock.now() + HANDSHAKE_NS,
    };
    let mut memory = None;
    let number = guest.number;
    let session = negotiate(&line, &shared.export, || {
        if memory.is_none() {
            memory = Some(shared.seats.memory(seat).map_err(|e| e.to_string())?);
        }
        let regions = memory.as_ref().map(|m| m.regions()).unwrap_or_default();
        (shared.export.attach)(DEPTH, regions)
    });
    match (session, memory.take()) {
        (Ok(session), Some(memory)) => {
            let rules = rules(&shared.export, &session);
            let both = (memory, session.attached);
            let memory = Conn::new(shared, (seat, guest), stream, both, rules).run();
            log::debug!("NBD client {number} has left");
            shared.seats.leave(seat, Some(memory));
        }
        (Ok(_), None) => shared.seats.leave(seat, None),
        (Err(end), memory) => {
            match end {
                End::Left | End::Stopped => {}
                End::Late => log::warn!("NBD client {number} took too long to negotiate"),
                End::Broke(what) => log::warn!("NBD client {number} broke the protocol: {what}"),
                End::Refused(why) => log::warn!("NBD client {number} was refused: {why}"),
            }
            shared.seats.leave(seat, memory);
        }
    }
}

fn rules<T>(export: &Export, session: &Session<T>) -> Rules {
    Rules {
        size: export.size(),
        block: export.info.block_size,
        read_only: export.is_read_only(),
        structured: session.structured,
        contexts: session.contexts,
        aligned: session.aligned,
        df_limit: crate::buffers::LARGE
            .min(export.info.max_transfer & !(export.info.block_size - 1)),
        fast_zero: export.info.write_zeroes,
    }
}
