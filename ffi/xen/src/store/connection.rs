//! [`Connection`]: one stream to the store, its reader thread, and the request that is under way.
//!
//! The store serves a connection's requests one after the other, so there is one request at a time;
//! the lock of [`Connection::talk`] is the queue of control threads that wait for their turn. The
//! reader thread takes all that comes: the answer goes to who waits for it, events are kept. What
//! fits neither, or comes too late, ends the connection, since nothing after it could be trusted.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use reactor::sync::Mutex;

use super::watches::{Event, Watches};
use super::wire::{HEADER, MAX_PAYLOAD, Message, Parser, encode, error, kind};

/// How long an answer may take. Much longer than a busy host needs, or a store that is replaced.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// It is waited for in so many parts: so that a machine that stood still for as long, with the store
/// on it, does not come to the end of it when it goes on.
const SLICES: u32 = 30;

/// What the other end is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// The daemon's socket.
    Socket,
    /// The kernel's device. It hands messages on, but answers WATCH and UNWATCH itself (with 0 for
    /// the request's number), takes no more than a page with the header, and tells some refusals by
    /// the error of the write.
    Device,
}

#[derive(Debug)]
struct State {
    /// Kind and number of the request that waits.
    waiting: Option<(u32, u32)>,
    answer: Option<Message>,
    watches: Watches,
    /// Why there is nothing more to come.
    over: Option<String>,
}

#[derive(Debug)]
struct Shared {
    file: File,
    kind: Kind,
    patience: Duration,
    /// The last request's number; held while a request is under way.
    turn: Mutex<u32>,
    state: Mutex<State>,
    answered: Condvar,
    happened: Condvar,
    /// Readable while there are events, or the connection is over.
    ready: EventFd,
    /// Ends the reader.
    stop: EventFd,
}

/// Why a request got no answer.
#[derive(Debug)]
pub(super) enum Failure {
    Refused(Errno),
    Closed(String),
}

#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

impl Connection {
    pub(super) fn new(file: File, kind: Kind, patience: Duration) -> Result<Connection, Errno> {
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let state = State { waiting: None, answer: None, watches: Watches::default(), over: None };
        let shared = Arc::new(Shared {
            file,
            kind,
            patience,
            turn: Mutex::new(0),
            state: Mutex::new(state),
            answered: Condvar::new(),
            happened: Condvar::new(),
            ready: event()?,
            stop: event()?,
        });
        let its = shared.clone();
        let reader = std::thread::Builder::new()
            .name("xenstore".into())
            .spawn(move || its.read_all())
            .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))?;
        Ok(Connection { shared, reader: Some(reader) })
    }

    /// Most bytes of a request's payload.
    pub(super) fn room(&self) -> usize {
        match self.shared.kind {
            Kind::Socket => MAX_PAYLOAD,
            Kind::Device => MAX_PAYLOAD - HEADER,
        }
    }

    /// Sends a request and waits for its answer.
    pub(super) fn talk(&self, kind: u32, tx_id: u32, payload: &[u8]) -> Result<Vec<u8>, Failure> {
        let shared = &*self.shared;
        let mut turn = shared.turn.lock();
        *turn = turn.wrapping_add(1).max(1);
        let req_id = *turn;
        {
            let mut state = shared.state.lock();
            if let Some(why) = &state.over {
                return Err(Failure::Closed(why.clone()));
            }
            state.waiting = Some((kind, req_id));
        }
        let bytes = encode(kind, req_id, tx_id, payload);
        // The device takes a message by one write, whole or not at all.
        if let Err(e) = (&shared.file).write_all(&bytes) {
            let errno = Errno::from_raw(e.raw_os_error().unwrap_or(0));
            if shared.kind == Kind::Device && errno != Errno::UnknownErrno {
                shared.state.lock().waiting = None;
                return Err(Failure::Refused(errno));
            }
            return Err(Failure::Closed(shared.end(format!("cannot send a request: {e}"))));
        }
        let mut state = shared.state.lock();
        for _ in 0..SLICES {
            let waits = |s: &mut State| s.answer.is_none() && s.over.is_none();
            let waited = shared.answered.wait_timeout_while(state, shared.patience / SLICES, waits);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if let Some(answer) = state.answer.take() {
            return match answer.kind {
                kind::ERROR => Err(Failure::Refused(error(&answer.payload))),
                _ => Ok(answer.payload),
            };
        }
        let late = || format!("no answer within {} s", shared.patience.as_secs_f32());
        let why = state.over.get_or_insert_with(late).clone();
        drop(state);
        Err(Failure::Closed(shared.end(why)))
    }

    /// Looks at the watches, or changes them.
    pub(super) fn watches<R>(&self, f: impl FnOnce(&mut Watches) -> R) -> R {
        self.shared.with_watches(&mut self.shared.state.lock(), f)
    }

    /// The next event; `None` if there is none in time.
    pub(super) fn next_event(&self, wait: Option<Duration>) -> Result<Option<Event>, String> {
        let shared = &*self.shared;
        let nothing = |s: &mut State| s.watches.is_empty() && s.over.is_none();
        let state = shared.state.lock();
        // No lock of this kind is ever poisoned: panics abort.
        let mut state = match wait {
            Some(wait) => {
                let waited = shared.happened.wait_timeout_while(state, wait, nothing);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => {
                let waited = shared.happened.wait_while(state, nothing);
                waited.unwrap_or_else(PoisonError::into_inner)
            }
        };
        match &state.over {
            Some(why) => Err(why.clone()),
            None => Ok(shared.with_watches(&mut state, Watches::take)),
        }
    }

    pub(super) fn ready(&self) -> BorrowedFd<'_> {
        self.shared.ready.as_fd()
    }
}

impl Shared {
    /// Keeps `ready` in step with what is there to take.
    fn with_watches<R>(&self, state: &mut State, f: impl FnOnce(&mut Watches) -> R) -> R {
        let before = state.watches.is_empty();
        let result = f(&mut state.watches);
        match (before, state.watches.is_empty()) {
            (true, false) => drop(self.ready.write(1)),
            // Once it is over it stays readable.
            (false, true) if state.over.is_none() => drop(self.ready.read()),
            _ => {}
        }
        result
    }

    /// Ends the connection, for the reason given if it has not ended before. Why it did.
    fn end(&self, why: String) -> String {
        let mut state = self.state.lock();
        state.waiting = None;
        let why = state.over.get_or_insert(why).clone();
        drop(state);
        self.answered.notify_all();
        self.happened.notify_all();
        let _ = self.ready.write(1);
        let _ = self.stop.write(1);
        why
    }

    /// The reader thread: until the connection ends.
    fn read_all(&self) {
        let mut parser = Parser::default();
        let mut buffer = [0; HEADER + MAX_PAYLOAD];
        let why = loop {
            let mut fds =
                [self.file.as_fd(), self.stop.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => break format!("cannot wait for an answer: {e}"),
            }
            if fds[1].any() == Some(true) {
                break "it was closed".to_owned();
            }
            if fds[0].any() != Some(true) {
                continue;
            }
            match (&self.file).read(&mut buffer) {
                Ok(0) => break "the store hung up".to_owned(),
                Ok(n) => parser.push(&buffer[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(e) => break format!("cannot read an answer: {e}"),
            }
            if let Err(why) = self.take(&mut parser) {
                break why;
            }
        };
        self.end(why);
    }

    /// Hands on all messages that are whole.
    fn take(&self, parser: &mut Parser) -> Result<(), String> {
        loop {
            match parser.next() {
                Ok(Some(message)) if message.kind == kind::WATCH_EVENT => self.event(&message)?,
                Ok(Some(message)) => self.answer(message)?,
                Ok(None) => return Ok(()),
                Err(e) => return Err(format!("an answer of {} bytes", e.0)),
            }
        }
    }

    /// The numbers in an event's header are not looked at: old kernels leave them as they come.
    fn event(&self, message: &Message) -> Result<(), String> {
        let event = |w: &mut Watches| w.event(&message.payload);
        if !self.with_watches(&mut self.state.lock(), event) {
            return Err("a watch event that is none".to_owned());
        }
        self.happened.notify_all();
        Ok(())
    }

    fn answer(&self, message: Message) -> Result<(), String> {
        let mut state = self.state.lock();
        let fits = state.waiting.is_some_and(|(kind, req_id)| {
            let by_kernel =
                self.kind == Kind::Device && matches!(kind, kind::WATCH | kind::UNWATCH);
            (message.kind == kind || message.kind == kind::ERROR)
                && (message.req_id == req_id || by_kernel && message.req_id == 0)
        });
        if !fits {
            return Err(format!("an answer to nothing that was asked (type {})", message.kind));
        }
        state.waiting = None;
        state.answer = Some(message);
        drop(state);
        self.answered.notify_all();
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.end("it was closed".to_owned());
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
