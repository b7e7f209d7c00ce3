//! [`Conn`]: one client in transmission, from its first request until the last buffer is back.
//!
//! One loop on the connection's own thread: take replies from the reactor, take requests from the
//! socket, make pieces as buffers come, send replies; spin briefly, then sleep on the socket, the
//! portal and the connection's signal. Where the reactor has nothing better to do the same turns
//! are taken there ([`crate::lodging`]). A buffer is given back only when the reactor has answered
//! for it, however the client leaves.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use reactor::Portal;

use crate::buffers::{Buffers, Class, LARGE, SMALL};
use crate::contexts::Context;
use crate::input::Input;
use crate::lodging::Stay;
use crate::output::Output;
use crate::pieces::{PIECES, Piece, REQUESTS, Req, Slots};
use crate::proto::Rules;
use crate::rmw::{EDGES, Rmw};
use crate::seats::Guest;
use crate::server::Shared;

/// Requests that a connection's portal takes at a time: never fewer than there can be.
pub(crate) const DEPTH: u16 = PIECES as u16 + EDGES;

/// How long the thread looks for a reply of the reactor before it sleeps, in nanoseconds: as long
/// as a fast device takes, and about what a sleep and wake-up would cost.
const SPIN_NS: u64 = 10_000;

/// How long it looks for another reply after one came, before it sends what it has: a fast device
/// answers nearly at once what was asked at once, and one system call sends all of it.
const GATHER_NS: u64 = 1_000;

/// How long a client that said good-bye may take to read its last replies, in nanoseconds.
const LINGER_NS: u64 = 10_000_000_000;

/// Queues of requests that need more pieces: by what the pieces need.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Need {
    Small = Class::Small as isize,
    Large = Class::Large as isize,
    /// No buffer.
    Plain,
}

/// One client in transmission.
pub(crate) struct Conn {
    pub(crate) shared: Arc<Shared>,
    pub(crate) seat: usize,
    pub(crate) guest: Guest,
    pub(crate) socket: OwnedFd,
    pub(crate) portal: Portal,
    pub(crate) memory: Buffers,
    pub(crate) rules: Rules,
    /// Metadata contexts: their numbers are counted from 1.
    pub(crate) contexts: Vec<Context>,
    /// Longest piece per class of buffer, in bytes, whole blocks.
    pub(crate) longest: [u32; 2],
    pub(crate) reqs: Slots<Req>,
    pub(crate) pieces: Slots<Piece>,
    pub(crate) waiting: [VecDeque<u16>; 3],
    /// Pieces that found no room in the portal, or their range claimed by another.
    pub(crate) parked: VecDeque<u16>,
    /// Writes of parts of blocks, which are done one at a time.
    pub(crate) rmw_queue: VecDeque<u16>,
    pub(crate) rmw: Option<Rmw>,
    /// The first of `rmw_queue` waits for somebody else's claim.
    pub(crate) rmw_refused: bool,
    pub(crate) input: Input,
    pub(crate) output: Output,
    /// Something was done in this turn.
    pub(crate) busy: bool,
    /// The socket may have bytes for us.
    pub(crate) readable: bool,
    /// The socket may have room for replies.
    pub(crate) writable: bool,
    /// The input waits for a request, piece or buffer to become free.
    pub(crate) blocked: bool,
    /// Nobody reads replies any more: they are dropped.
    pub(crate) mute: bool,
    /// The server shuts down: what is there is finished, nothing new begun.
    pub(crate) stopping: bool,
    /// When the client is cut off, in the clock's nanoseconds.
    pub(crate) deadline: Option<u64>,
    pub(crate) stay: Stay,
}

impl Conn {
    /// A connection that has just entered transmission.
    pub(crate) fn new(
        shared: Arc<Shared>,
        (seat, guest): (usize, Guest),
        socket: OwnedFd,
        (memory, portal): (Buffers, Portal),
        (rules, contexts): (Rules, Vec<Context>),
    ) -> Conn {
        let whole = shared.export.info.max_transfer & !(rules.block - 1);
        Conn {
            shared,
            seat,
            guest,
            socket,
            portal,
            memory,
            rules,
            contexts,
            longest: [SMALL.min(whole), LARGE.min(whole)],
            reqs: Slots::new(REQUESTS),
            pieces: Slots::new(PIECES),
            waiting: std::array::from_fn(|_| VecDeque::with_capacity(REQUESTS)),
            parked: VecDeque::with_capacity(PIECES),
            rmw_queue: VecDeque::with_capacity(PIECES),
            rmw: None,
            rmw_refused: false,
            input: Input::new(),
            output: Output::default(),
            busy: false,
            readable: true,
            writable: true,
            blocked: false,
            mute: false,
            stopping: false,
            deadline: None,
            stay: Stay::default(),
        }
    }

    /// Serves the client until it has gone and all its requests have ended; gives the memory back.
    /// `None` if a reactor has lost it.
    pub(crate) fn run(mut self) -> Option<Buffers> {
        loop {
            self.turn();
            if self.input.ended() && self.reqs.all_free() {
                break;
            }
            if let Some(lodging) = self.may_lodge() {
                self = self.lodge(&lodging)?;
            } else if !self.busy {
                self.idle();
            }
        }
        debug_assert!(self.portal.in_flight() == 0 && self.pieces.all_free());
        Some(self.memory)
    }

    /// Does what can be done without waiting.
    pub(crate) fn turn(&mut self) {
        self.busy = false;
        // On a thread of its own a failed attempt costs nobody else anything.
        self.writable |= !self.stay.lodging;
        self.reap();
        self.receive();
        self.issue();
        self.step_rmw();
        self.send();
        self.look_at_the_time();
    }

    /// Takes what the reactor has answered, and tries again what it or others left no room for.
    fn reap(&mut self) {
        let mut again = self.guest.signal.take_retry();
        // On the reactor's own thread nothing comes while we wait.
        let gather = if self.stay.lodging { 0 } else { GATHER_NS };
        while let Some(reply) = self.next_reply(if again { gather } else { 0 }) {
            again = true;
            match u16::try_from(reply.id) {
                Ok(p) if usize::from(p) < PIECES => self.end_piece(p, reply.status),
                _ => self.end_edge(reply.status),
            }
        }
        if again {
            self.busy = true;
            self.rmw_refused = false;
            for _ in 0..self.parked.len() {
                if let Some(p) = self.parked.pop_front() {
                    self.submit(p);
                }
            }
        }
    }

    /// The next reply of the reactor, if one comes within so many nanoseconds.
    fn next_reply(&mut self, within: u64) -> Option<reactor::PortalReply> {
        let reply = self.portal.receive();
        if reply.is_some() || within == 0 || self.portal.in_flight() == 0 {
            return reply;
        }
        let until = self.shared.clock.now() + within;
        while !self.portal.has_reply() && self.shared.clock.now() < until {
            std::hint::spin_loop();
        }
        self.portal.receive()
    }

    /// Sends what is ready.
    fn send(&mut self) {
        while !self.output.is_empty() && self.writable {
            match self.output.send(self.socket.as_fd(), &self.memory) {
                Ok((offered, went)) => {
                    self.guest.cells.sends.add(1);
                    self.busy = true;
                    // Who gets replies soon has more requests; a reactor does not run after them.
                    self.readable |= !self.stay.lodging;
                    while let Some(part) = self.output.pop_sent() {
                        self.end_part(part);
                    }
                    self.writable = went == offered;
                }
                Err(Errno::EAGAIN) => self.writable = false,
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => {
                    // The client reads no more, but what it asked for before is still done.
                    self.busy = true;
                    self.go_mute();
                }
                // It would wait for ever for replies that are lost.
                Err(e) => self.cut_off(e.desc()),
            }
        }
    }

    /// Drops replies from now on.
    pub(crate) fn go_mute(&mut self) {
        self.mute = true;
        while let Some(part) = self.output.discard() {
            self.end_part(part);
        }
    }

    /// Cuts the client off; what is in flight ends quietly.
    pub(crate) fn cut(&mut self) {
        self.busy = true;
        // Fails if the client has gone already.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        self.end_input();
        self.go_mute();
    }

    /// Cuts the client off and says why.
    pub(crate) fn cut_off(&mut self, what: &str) {
        if !self.mute {
            log::warn!("NBD client {} is cut off: {what}", self.guest.number);
        }
        self.cut();
    }

    /// The client will send nothing more; it may take a while to read.
    pub(crate) fn say_goodbye(&mut self) {
        self.end_input();
        self.deadline.get_or_insert(self.shared.clock.now() + LINGER_NS);
    }

    fn look_at_the_time(&mut self) {
        if !self.stopping && self.shared.stop.load(Ordering::Acquire) {
            self.stopping = true;
            self.busy = true;
            let until = self.shared.drain_until.load(Ordering::Acquire);
            self.deadline = Some(self.deadline.map_or(until, |d| d.min(until)));
        }
        if let Some(deadline) = self.deadline
            && !(self.mute && self.input.ended())
            && self.shared.clock.now() >= deadline
        {
            self.cut();
        }
    }

    /// Waits for something to do.
    fn idle(&mut self) {
        if self.portal.in_flight() > 0 {
            let until = self.shared.clock.now() + SPIN_NS;
            while self.shared.clock.now() < until {
                if self.portal.has_reply() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        self.portal.arm();
        self.guest.signal.wake.about_to_sleep();
        let stop = !self.stopping && self.shared.stop.load(Ordering::Acquire);
        if !stop && !self.portal.has_reply() && !self.guest.signal.has_retry() {
            self.guest.cells.sleeps.add(1);
            self.sleep();
        }
        self.guest.signal.wake.awake();
        self.portal.disarm();
    }

    /// What of the socket would bring work. If that is nothing, the socket must not be polled: it
    /// would still report, again and again, that the client has gone, and that can wait.
    pub(crate) fn wanted(&self) -> PollFlags {
        let mut wanted = PollFlags::empty();
        if !self.input.ended() && !self.blocked {
            wanted |= PollFlags::POLLIN;
        }
        if !self.output.is_empty() {
            wanted |= PollFlags::POLLOUT;
        }
        wanted
    }

    fn sleep(&mut self) {
        let wanted = self.wanted();
        let timeout = match self.deadline {
            Some(deadline) if !(self.mute && self.input.ended()) => {
                let left = deadline.saturating_sub(self.shared.clock.now()).div_ceil(1_000_000);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
            _ if self.portal.in_flight() > 0 => PollTimeout::from(1000u16),
            _ => PollTimeout::NONE,
        };
        let mut fds = [
            PollFd::new(self.portal.fd(), PollFlags::POLLIN),
            PollFd::new(self.guest.signal.wake.fd(), PollFlags::POLLIN),
            PollFd::new(self.socket.as_fd(), wanted),
        ];
        let count = if wanted.is_empty() { 2 } else { 3 };
        let _ = poll(&mut fds[..count], timeout);
        let events = fds[2].revents().unwrap_or(PollFlags::empty());
        self.heard(events);
    }

    /// What the socket has, of what was waited for.
    pub(crate) fn heard(&mut self, events: PollFlags) {
        self.readable |= !(events - PollFlags::POLLOUT).is_empty();
        self.writable |= !(events - PollFlags::POLLIN).is_empty();
    }
}
