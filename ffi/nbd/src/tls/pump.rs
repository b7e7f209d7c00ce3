//! The thread between a connection's socket and whoever speaks NBD on it: seals what comes from within,
//! and opens what comes from outside. Within is a pair of sockets, so that client and server are the
//! same with TLS and without.
//!
//! Its memory is bounded: rustls' buffers, and one of ours. It never waits for one side alone, and not
//! for longer than it was given to agree on keys, or to send the last words.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, MsgFlags};
use reactor::Clock;
use rustls::Connection;

/// Bytes that are sealed or opened at a time.
const CHUNK: usize = 64 << 10;
/// What rustls may hold of bytes that the other side does not take.
const SEALED_MAX: usize = 2 * CHUNK;
/// How often it is looked whether to stop, while there is nobody to tell.
const LOOK_MS: u16 = 100;
/// Turns without a pause after which it is looked whether somebody is within.
const TURNS: u32 = 64;
/// How long the other side may take to read the last words, in nanoseconds; and so if nobody wants to
/// wait for that.
const LINGER_NS: u64 = 10_000_000_000;
const HURRY_NS: u64 = 300_000_000;

const WENT: &str = "the other side went before keys were agreed on";

/// How long a pump may take.
pub(crate) struct Limits<F> {
    pub(crate) clock: Clock,
    /// Until when keys must have been agreed on.
    pub(crate) handshake: u64,
    /// Whether to end soon.
    pub(crate) hurry: F,
}

/// A running pump. It ends when both sides have gone.
pub(crate) struct Pump(JoinHandle<Result<(), String>>);

impl Pump {
    /// Starts one on a connection to the outside; returns what speaks on the inside.
    ///
    /// # Errors
    /// If descriptors or threads are short.
    pub(crate) fn start<F: Fn() -> bool + Send + 'static>(
        outside: OwnedFd,
        session: Connection,
        limits: Limits<F>,
        name: String,
    ) -> io::Result<(OwnedFd, Pump)> {
        let (inside, ours) = UnixStream::pair()?;
        let body = move || run(outside.as_fd(), ours, session, &limits);
        let thread = std::thread::Builder::new().name(name).spawn(body)?;
        Ok((inside.into(), Pump(thread)))
    }

    /// Waits for its end, which comes soon after the inside was closed.
    ///
    /// # Errors
    /// What went wrong.
    pub(crate) fn join(self) -> Result<(), String> {
        self.0.join().unwrap_or_else(|_| Err("its thread panicked".to_owned()))
    }
}

/// A socket that is read and written without waiting, and without a signal.
struct Socket<'a>(BorrowedFd<'a>);

impl Read for Socket<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Ok(socket::recv(self.0.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT)?)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(socket::send(self.0.as_raw_fd(), from, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How an attempt to move bytes ended.
enum Moved {
    Some(usize),
    /// Nothing can be moved now.
    Blocked,
    /// The other side has gone.
    End,
}

fn moved(result: io::Result<usize>) -> Moved {
    match result {
        Ok(0) => Moved::End,
        Ok(n) => Moved::Some(n),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Moved::Blocked
        }
        Err(_) => Moved::End,
    }
}

struct State<'a> {
    outside: BorrowedFd<'a>,
    inside: UnixStream,
    session: Connection,
    chunk: Vec<u8>,
    /// What of `opened` has not gone inside.
    opened: Vec<u8>,
    went: usize,
    /// Nothing more comes from there.
    outside_ended: bool,
    inside_ended: bool,
    /// Nobody is within any more, though what he said may not be read yet.
    left: bool,
    /// The inside takes nothing more.
    deaf: bool,
    /// The outside takes nothing more.
    gone: bool,
}

fn run<F: Fn() -> bool>(
    outside: BorrowedFd<'_>,
    inside: UnixStream,
    mut session: Connection,
    limits: &Limits<F>,
) -> Result<(), String> {
    session.set_buffer_limit(Some(SEALED_MAX));
    let mut s = State {
        outside,
        inside,
        session,
        chunk: vec![0; CHUNK],
        opened: Vec::with_capacity(CHUNK),
        went: 0,
        outside_ended: false,
        inside_ended: false,
        left: false,
        deaf: false,
        gone: false,
    };
    let mut until = limits.handshake;
    let mut lingers = false;
    let mut turns = 0;
    loop {
        let busy = s.turn()?;
        let hurry = (limits.hurry)();
        if s.gone && s.session.is_handshaking() {
            return Err(WENT.to_owned());
        }
        if s.gone || (s.inside_ended && !s.session.wants_write()) {
            return Ok(());
        }
        let now = limits.clock.now();
        let early = s.session.is_handshaking();
        if (s.inside_ended || s.left) && !lingers {
            lingers = true;
            until = now + LINGER_NS;
        }
        if (early || lingers) && hurry {
            until = until.min(now + HURRY_NS);
        }
        if (early || lingers) && now >= until {
            return match early {
                true => Err("the other side took too long to agree on keys".to_owned()),
                false => Ok(()),
            };
        }
        turns = if busy { turns + 1 } else { 0 };
        if !busy {
            s.sleep();
        } else if turns == TURNS {
            // The other side may keep this busy for ever.
            turns = 0;
            s.look();
        }
    }
}

impl State<'_> {
    /// Moves what can be moved; returns whether there was anything.
    fn turn(&mut self) -> Result<bool, String> {
        let busy = self.seal();
        let busy = self.send() | busy;
        let busy = self.open()? | busy;
        Ok(self.pass() | busy)
    }

    /// From within into a sealed buffer.
    fn seal(&mut self) -> bool {
        if !self.wants_inside() {
            return false;
        }
        match moved(Socket(self.inside.as_fd()).read(&mut self.chunk)) {
            Moved::Blocked => return false,
            // There is room: the buffer was empty, and takes more than this.
            Moved::Some(n) if self.session.writer().write_all(&self.chunk[..n]).is_ok() => {}
            Moved::Some(_) => self.gone = true,
            Moved::End => {
                self.inside_ended = true;
                self.session.send_close_notify();
            }
        }
        true
    }

    fn wants_inside(&self) -> bool {
        !self.inside_ended && !self.session.is_handshaking() && !self.session.wants_write()
    }

    /// Sealed bytes to the outside.
    fn send(&mut self) -> bool {
        let mut busy = false;
        while self.session.wants_write() && !self.gone {
            match moved(self.session.write_tls(&mut Socket(self.outside))) {
                Moved::Some(_) => busy = true,
                Moved::Blocked => break,
                Moved::End => self.gone = true,
            }
        }
        busy
    }

    /// From the outside, opened.
    fn open(&mut self) -> Result<bool, String> {
        if !self.wants_outside() {
            return Ok(false);
        }
        match moved(self.session.read_tls(&mut Socket(self.outside))) {
            Moved::Blocked => return Ok(false),
            Moved::End => self.end_outside(),
            Moved::Some(_) => {
                if let Err(e) = self.session.process_new_packets() {
                    // Says why to the other side, if it takes that at once.
                    self.send();
                    return Err(e.to_string());
                }
            }
        }
        if self.outside_ended && self.session.is_handshaking() {
            return Err(WENT.to_owned());
        }
        Ok(true)
    }

    fn wants_outside(&self) -> bool {
        !self.outside_ended && self.opened.is_empty() && self.session.wants_read()
    }

    /// Opened bytes to the inside.
    fn pass(&mut self) -> bool {
        let mut busy = false;
        if self.opened.is_empty() && !self.session.is_handshaking() {
            match self.session.reader().read(&mut self.chunk) {
                Ok(0) if !self.outside_ended => {
                    busy = true;
                    self.end_outside();
                }
                Ok(n) => self.opened.extend_from_slice(&self.chunk[..n]),
                // Nothing yet, or the end without a word, which was seen before.
                Err(_) => {}
            }
        }
        while self.went < self.opened.len() && !self.deaf {
            match moved(Socket(self.inside.as_fd()).write(&self.opened[self.went..])) {
                Moved::Some(n) => {
                    busy = true;
                    self.went += n;
                }
                Moved::Blocked => return busy,
                Moved::End => self.deaf = true,
            }
        }
        self.opened.clear();
        self.went = 0;
        busy
    }

    fn end_outside(&mut self) {
        self.outside_ended = true;
        // Who is within may still have something to say.
        let _ = self.inside.shutdown(Shutdown::Write);
    }

    /// Waits for something to do.
    fn sleep(&mut self) {
        let when = |yes: bool, flag| if yes { flag } else { PollFlags::empty() };
        let outside = when(self.wants_outside(), PollFlags::POLLIN)
            | when(self.session.wants_write(), PollFlags::POLLOUT);
        let inside = when(self.wants_inside(), PollFlags::POLLIN)
            | when(!self.opened.is_empty(), PollFlags::POLLOUT);
        let both = [(self.outside, outside), (self.inside.as_fd(), inside)];
        // Who has gone would be reported again and again where nothing is wanted.
        let mut fds: Vec<PollFd<'_>> = both
            .iter()
            .filter(|(_, events)| !events.is_empty())
            .map(|(fd, events)| PollFd::new(*fd, *events))
            .collect();
        // With both looked at somebody's going is seen; else, and while there is a deadline, by a
        // look now and then.
        let calm = fds.len() == 2 && !self.session.is_handshaking() && !self.inside_ended;
        let timeout = if calm { PollTimeout::NONE } else { PollTimeout::from(LOOK_MS) };
        let _ = poll(&mut fds, timeout);
        if !calm {
            self.look();
        }
    }

    /// Whether somebody is within.
    fn look(&mut self) {
        let mut fds = [PollFd::new(self.inside.as_fd(), PollFlags::empty())];
        let _ = poll(&mut fds, PollTimeout::ZERO);
        self.left = fds[0].revents().is_some_and(|e| e.contains(PollFlags::POLLHUP));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    fn session() -> Connection {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap().into()
    }

    fn pump(ms: u64, hurry: &Arc<AtomicBool>) -> (UnixStream, OwnedFd, Pump) {
        let (outside, theirs) = UnixStream::pair().unwrap();
        let clock = Clock::real();
        let handshake = clock.now() + ms * 1_000_000;
        let hurry = hurry.clone();
        let limits = Limits { clock, handshake, hurry: move || hurry.load(Ordering::Acquire) };
        let started = Pump::start(outside.into(), session(), limits, "pump".to_owned());
        let (inside, pump) = started.unwrap();
        (theirs, inside, pump)
    }

    #[test]
    fn the_silent_and_the_slow_are_not_waited_for() {
        let hurry = Arc::new(AtomicBool::new(false));
        let (_theirs, _inside, pump1) = pump(50, &hurry);
        assert!(pump1.join().unwrap_err().contains("too long"));
        // A byte now and then, of a record that would be right so far.
        let (mut theirs, _inside, pump2) = pump(300, &hurry);
        let slow = std::thread::spawn(move || {
            for byte in [22, 3, 3, 0, 100].into_iter().chain(std::iter::repeat(2)) {
                if theirs.write_all(&[byte]).is_err() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        assert!(pump2.join().is_err());
        slow.join().unwrap();
        // Somebody ends everything.
        let (_theirs, _inside, pump3) = pump(60_000, &hurry);
        hurry.store(true, Ordering::Release);
        assert!(pump3.join().is_err());
    }

    #[test]
    fn either_side_may_go_at_any_time() {
        let hurry = Arc::new(AtomicBool::new(false));
        let (theirs, inside, pump1) = pump(60_000, &hurry);
        drop(theirs);
        assert!(pump1.join().unwrap_err().contains("went before"));
        // Who was within sees that.
        assert_eq!(moved_to_the_end(&inside), 0);
        let (mut theirs, _inside, pump2) = pump(60_000, &hurry);
        theirs.write_all(b"no TLS at all").unwrap();
        assert!(pump2.join().is_err());
    }

    fn moved_to_the_end(inside: &OwnedFd) -> usize {
        socket::recv(inside.as_raw_fd(), &mut [0; 8], MsgFlags::empty()).unwrap()
    }
}
