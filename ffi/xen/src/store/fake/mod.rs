//! [`Daemon`]: a stand-in for xenstored that speaks the wire protocol, for tests.
//!
//! It keeps the rules that clients depend on: permissions and who owns what is made, transactions
//! that fail if others changed what they saw, watches that fire once when they are set, for all
//! below, after a commit and for what is removed; quotas of guests; the limit of 4096 bytes, past
//! which a client is cut off. Errors go by name. Who connects as domain 0 is the toolstack, or a
//! backend there; who connects as another domain is a guest.

mod session;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use reactor::sync::Mutex;

use super::{Perm, Store};
use session::Session;
use tree::{Change, Tree};

/// A client that does not read is cut off when so much waits for it.
const MOST_OUTPUT: usize = 1 << 20;

/// What `epoll` says of what is no client.
const WAKE: u64 = 0;
const LISTENER: u64 = 1;

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    session: Session,
    /// Whether it is waited for that the stream takes more.
    full: bool,
}

#[derive(Debug)]
struct State {
    tree: Tree,
    clients: BTreeMap<u64, Client>,
    /// Those that were told of a change and were not sent that.
    told: BTreeSet<u64>,
    /// Waits for all streams, at a cost that does not grow with their number.
    epoll: Arc<Epoll>,
    next: u64,
    listener: Option<UnixListener>,
    /// State of the generator that chops, if it does.
    chop: Option<u64>,
    frozen: bool,
    stop: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: EventFd,
    epoll: Arc<Epoll>,
}

/// The stand-in; it serves until it is dropped, which its clients see as the daemon's death.
#[derive(Debug)]
pub struct Daemon {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Starts one with an empty tree.
    pub fn start() -> Daemon {
        Daemon::with(None)
    }

    /// Starts one that listens on a socket as well. Who connects there is domain 0.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn listen(socket: &Path) -> std::io::Result<Daemon> {
        let listener = UnixListener::bind(socket)?;
        listener.set_nonblocking(true)?;
        Ok(Daemon::with(Some(listener)))
    }

    fn with(listener: Option<UnixListener>) -> Daemon {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let wake = wake.expect("a test has descriptors left");
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("a test has descriptors");
        let readable = |of| EpollEvent::new(EpollFlags::EPOLLIN, of);
        epoll.add(&wake, readable(WAKE)).expect("a descriptor of ours");
        if let Some(listener) = &listener {
            epoll.add(listener, readable(LISTENER)).expect("a descriptor of ours");
        }
        let epoll = Arc::new(epoll);
        let state = State {
            tree: Tree::new(),
            clients: BTreeMap::new(),
            told: BTreeSet::new(),
            epoll: epoll.clone(),
            next: LISTENER,
            listener,
            chop: None,
            frozen: false,
            stop: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), wake, epoll });
        let its = shared.clone();
        let thread = std::thread::spawn(move || its.serve());
        Daemon { shared, thread: Some(thread) }
    }

    /// A client of a domain.
    pub fn connect(&self, domid: u16) -> Store {
        Store::from_stream(self.stream(domid)).expect("a test has threads left")
    }

    /// A connection of a domain, for who speaks the protocol itself.
    pub fn stream(&self, domid: u16) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a test has descriptors left");
        self.change(|s| s.add(ours, domid));
        theirs
    }

    /// From now on answers and events come in small pieces, drawn from a seed.
    pub fn chop(&self, seed: u64) {
        self.change(|s| s.chop = Some(seed));
    }

    /// Serves nobody until it is told to go on.
    pub fn freeze(&self, frozen: bool) {
        self.change(|s| s.frozen = frozen);
    }

    /// Tells those who watch `@introduceDomain` that there is a domain, or `@releaseDomain` that
    /// one is gone.
    pub fn domain(&self, introduced: bool) {
        let path: &[u8] = if introduced { b"@introduceDomain" } else { b"@releaseDomain" };
        // Only for who is privileged.
        let change = Change { path: path.to_vec(), exact: true, perms: vec![Perm::none(0)] };
        self.change(|s| s.tell(&[change]));
    }

    fn change(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.shared.state.lock());
        let _ = self.shared.wake.write(1);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.change(|s| s.stop = true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn serve(&self) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let mut state = self.state.lock();
            if state.stop {
                state.clients.clear();
                state.listener = None;
                return;
            }
            let frozen = state.frozen;
            drop(state);
            if frozen {
                let mut fds = [PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut fds, PollTimeout::NONE);
                let _ = self.wake.read();
                continue;
            }
            let count = self.epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or(0);
            let _ = self.wake.read();
            let mut state = self.state.lock();
            if !state.frozen {
                state.turn(events[..count].iter().map(EpollEvent::data));
            }
        }
    }
}

impl State {
    fn add(&mut self, stream: UnixStream, domid: u16) {
        stream.set_nonblocking(true).expect("a socket");
        self.next += 1;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, self.next);
        self.epoll.add(&stream, readable).expect("a socket");
        let client = Client { stream, session: Session::new(domid), full: false };
        self.clients.insert(self.next, client);
    }

    fn random(&mut self, n: u64) -> Option<u64> {
        let seed = self.chop.as_mut()?;
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Some((*seed >> 33) % n)
    }

    fn turn(&mut self, ready: impl Iterator<Item = u64>) {
        while let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) {
            self.add(stream, 0);
        }
        for id in ready.filter(|&id| id > LISTENER) {
            if !self.serve_one(id) {
                self.clients.remove(&id);
            }
        }
        while let Some(id) = self.told.pop_first() {
            if !self.send(id) {
                self.clients.remove(&id);
            }
        }
    }

    /// Reads what a client has, and sends what it takes; false if it is to be cut off.
    fn serve_one(&mut self, id: u64) -> bool {
        let piece = self.random(40).map_or(1 << 13, |n| 1 + n as usize);
        let mut buffer = [0; 1 << 13];
        let mut fired = Vec::new();
        let Some(client) = self.clients.get_mut(&id) else { return false };
        match (&client.stream).read(&mut buffer[..piece]) {
            Ok(0) => return false,
            Ok(n) => {
                let taken = client.session.take(&buffer[..n], &mut self.tree, &mut fired);
                if taken.is_err() {
                    return false;
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
        self.tell(&fired);
        self.told.remove(&id);
        self.send(id)
    }

    /// Sends what a client takes; false if it is to be cut off.
    fn send(&mut self, id: u64) -> bool {
        let piece = self.random(40).map_or(usize::MAX, |n| 1 + n as usize);
        let Some(Client { stream, session, full }) = self.clients.get_mut(&id) else {
            return false;
        };
        while !session.output.is_empty() {
            let (first, _) = session.output.as_slices();
            match (&*stream).write(&first[..first.len().min(piece)]) {
                Ok(n) => drop(session.output.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
            if piece != usize::MAX {
                // The rest in another turn, so that the other side sees the piece alone.
                std::thread::yield_now();
                break;
            }
        }
        if *full == session.output.is_empty() {
            *full = !*full;
            let out = if *full { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
            let mut event = EpollEvent::new(EpollFlags::EPOLLIN | out, id);
            self.epoll.modify(&*stream, &mut event).expect("a socket that was added");
        }
        session.output.len() <= MOST_OUTPUT
    }

    fn tell(&mut self, changes: &[Change]) {
        for change in changes {
            for (&id, client) in &mut self.clients {
                if client.session.changed(change) {
                    self.told.insert(id);
                }
            }
        }
    }
}
