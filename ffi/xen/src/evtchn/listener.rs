//! [`Listener`]: a thread that waits for the events of a reactor and wakes it.
//!
//! A reactor that polls looks at no event. Before it sleeps it calls [`Listener::rearm`], then arms its
//! rings, looks once more, and sleeps. Ports that fire stay silent until then, so that a guest which
//! sends events without end makes work once for each sleep.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_queue::ArrayQueue;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use reactor::Wake;

use super::Events;
use crate::Error;

/// Ports that are read at a time, and that are kept; more are written back at once.
const KEPT: usize = 1024;

#[derive(Debug)]
struct Shared {
    events: Arc<Events>,
    /// Ports that fired and are silent.
    fired: ArrayQueue<u32>,
    wake: Wake,
    stop: EventFd,
}

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Listener {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Starts it, for the device of one reactor, that nobody else reads from.
    ///
    /// # Errors
    /// If the process has no thread or descriptor left.
    pub fn start(events: Arc<Events>, wake: Wake) -> Result<Listener, Error> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let stop = stop.map_err(Error::os("eventfd"))?;
        let shared = Arc::new(Shared { events, fired: ArrayQueue::new(KEPT), wake, stop });
        let its = shared.clone();
        let thread = std::thread::Builder::new().name("xen-events".into()).spawn(move || its.run());
        let thread = thread.map_err(|e| Error::io("start a thread", &e))?;
        Ok(Listener { shared, thread: Some(thread) })
    }

    /// Lets all ports fire again. A system call if any had fired, else none. To be called by the
    /// reactor after it said that it is going to sleep, and before it arms its rings.
    pub fn rearm(&self) {
        let mut ports = [0; 64];
        loop {
            let mut n = 0;
            while n < ports.len()
                && let Some(port) = self.shared.fired.pop()
            {
                ports[n] = port;
                n += 1;
            }
            if n == 0 {
                return;
            }
            if let Err(why) = self.shared.events.unmask(&ports[..n]) {
                log::error!("a guest may not be heard any more: {why}");
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut ports = [0; KEPT];
        loop {
            let mut fds = [self.events.as_fd(), self.stop.as_fd()]
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let _ = poll(&mut fds, PollTimeout::NONE);
            if fds[1].any() == Some(true) {
                return;
            }
            if fds[0].any() != Some(true) {
                continue;
            }
            match self.events.pending(&mut ports) {
                Ok(n) => {
                    for &port in &ports[..n] {
                        if self.fired.push(port).is_err() {
                            let _ = self.events.unmask(&[port]);
                        }
                    }
                }
                // All is enabled again, and the reactor looks at all.
                Err(Error::Overflow) => {}
                Err(why) => {
                    log::error!("no events any more, guests are served late: {why}");
                    return;
                }
            }
            // After they are kept: a reactor that does not see them yet is woken.
            self.wake.wake();
        }
    }
}
