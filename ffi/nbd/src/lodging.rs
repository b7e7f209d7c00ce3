//! A connection on the reactor's own thread ([`reactor::Lodger`]), where it saves the switches
//! between two threads: and how it comes there and back.
//!
//! The connection's thread lends the whole [`Conn`] and sleeps. It gets it back when the connection
//! needs what may take long (block status, the end, a claim that others hold), when the server
//! stops, when a guest comes, when others work on the reactor too and it does not come to sleep, and when
//! it had nothing to do for a while.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};

use block::HasWork;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use reactor::{Lodger, Lodging, Turn};

use crate::claims::Signal;
use crate::conn::Conn;
use crate::gate::Way;

/// How long a connection that was sent home stays there at least, in nanoseconds; doubled each time
/// that it came to nothing.
const COOL_DOWN_NS: u64 = 50_000_000;
/// And at most.
const COOLEST_NS: u64 = 10_000_000_000;
/// A shorter stay came to nothing, in nanoseconds.
const SHORT_NS: u64 = 5_000_000;

/// A lodger that has nothing to do for so long goes home and makes place, in nanoseconds.
const IDLE_NS: u64 = 1_000_000_000;

/// How often a lodger looks at its socket while the reactor does not sleep, in nanoseconds.
const LOOK_NS: u64 = 50_000;

/// What a connection knows about lodging.
#[derive(Default)]
pub(crate) struct Stay {
    /// It does now.
    pub(crate) lodging: bool,
    /// It met something that only its own thread can do.
    pub(crate) leave: bool,
    /// Since when it does or last did, in the clock's nanoseconds.
    since: u64,
    /// When it may again, and how long after the last time that is.
    not_before: u64,
    cool_down: u64,
    /// When, lodging, it last looked at its socket, and when it last did anything.
    looked: u64,
    worked: u64,
}

/// A connection away from its thread. Dropped, it goes home.
struct Away {
    /// Until then.
    conn: Option<Conn>,
    home: SyncSender<Conn>,
    signal: Arc<Signal>,
    recall: Arc<AtomicBool>,
}

impl Conn {
    /// Whom to ask to take the connection in, if now is the time for it.
    pub(crate) fn may_lodge(&self) -> Option<Lodging> {
        let may = self.busy
            && self.is_plain()
            // Who hands a socket over may still have it, and what it does to it is not known.
            && !matches!(self.shared.way, Way::Passed)
            && self.shared.clock.now() >= self.stay.not_before;
        may.then(|| self.portal.lodging()).flatten()
    }

    /// Whether there is nothing about it but requests and replies.
    fn is_plain(&self) -> bool {
        !(self.input.ended()
            || self.stopping
            || self.mute
            || self.deadline.is_some()
            || self.rmw_refused
            || !self.parked.is_empty()
            || self.stay.leave)
    }

    /// Lodges with the reactor; returns when it is back.
    pub(crate) fn lodge(mut self, lodging: &Lodging) -> Option<Conn> {
        let (home, back) = sync_channel(1);
        let recall = Arc::new(AtomicBool::new(false));
        let (shared, signal) = (self.shared.clone(), self.guest.signal.clone());
        let reactor = self.portal.reactor().clone();
        self.stay.lodging = true;
        self.stay.since = shared.clock.now();
        let (r, s) = (recall.clone(), signal.clone());
        lodging(Box::new(Away { conn: Some(self), home, signal: s, recall: r }));
        let mut conn = wait(&back, &signal, || {
            if shared.stop.load(Ordering::Acquire) {
                recall.store(true, Ordering::Release);
                reactor.wake();
            }
        })?;
        conn.come_home();
        Some(conn)
    }

    fn come_home(&mut self) {
        let now = self.shared.clock.now();
        let stay = &mut self.stay;
        let longer = if now.saturating_sub(stay.since) < SHORT_NS { stay.cool_down * 2 } else { 0 };
        stay.cool_down = longer.clamp(COOL_DOWN_NS, COOLEST_NS);
        stay.not_before = now + stay.cool_down;
        (stay.lodging, stay.leave) = (false, false);
        (self.readable, self.writable) = (true, true);
    }
}

/// Waits for the connection; `look` is called before each sleep. `None` if it is lost.
fn wait(back: &Receiver<Conn>, signal: &Signal, look: impl Fn()) -> Option<Conn> {
    loop {
        signal.wake.about_to_sleep();
        let conn = back.try_recv();
        if matches!(conn, Err(TryRecvError::Empty)) {
            look();
            let mut fds = [PollFd::new(signal.wake.fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, PollTimeout::NONE);
        }
        signal.wake.awake();
        match conn {
            Ok(conn) => return Some(conn),
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return None,
        }
    }
}

impl Lodger for Away {
    fn turn(&mut self, now: u64) -> Turn {
        let Some(conn) = &mut self.conn else { return Turn::Leave };
        if now.saturating_sub(conn.stay.looked) >= LOOK_NS {
            conn.stay.looked = now;
            (conn.readable, conn.writable) = (true, true);
        }
        conn.turn();
        if conn.busy {
            conn.stay.worked = now;
        }
        let idle = now.saturating_sub(conn.stay.worked.max(conn.stay.since)) > IDLE_NS;
        if idle || self.recall.load(Ordering::Relaxed) || !conn.is_plain() {
            return Turn::Leave;
        }
        if conn.busy { Turn::Busy } else { Turn::Idle }
    }

    fn arm(&mut self) -> HasWork {
        let Some(conn) = &self.conn else { return HasWork::Yes };
        let work = conn.portal.has_reply() || self.recall.load(Ordering::Acquire);
        if work { HasWork::Yes } else { HasWork::No }
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let conn = self.conn.as_ref()?;
        let wanted = conn.wanted();
        (!wanted.is_empty()).then(|| (conn.socket.as_fd(), wanted))
    }

    fn heard(&mut self, events: PollFlags) {
        if let Some(conn) = &mut self.conn {
            conn.heard(events);
        }
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            // There is one place, and its thread waits.
            let _ = self.home.try_send(conn);
            self.signal.wake.wake();
        }
    }
}
