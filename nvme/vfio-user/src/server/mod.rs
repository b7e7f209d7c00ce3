//! [`Server`]: offers a [`Device`] to one client at a time.
//!
//! One thread does everything: it steps the device, and looks at the socket every so many steps or
//! when there is nothing to do. So no access to the client's memory is under way while a command of
//! the client is carried out, and memory that it takes back is free when it is told so.
//!
//! When a client goes, however it goes, the device is reset and its memory and interrupts are
//! dropped; the next client finds it as the first did.

mod bus;
mod commands;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dma::Region;
use nix::errno::Errno;
use nix::poll::PollFlags;
use reactor::Clock;

use crate::Error;
use crate::socket::{Message, wait};
use crate::wire::Area;
use bus::Peer;
pub use bus::{Bus, BusFault};

/// Steps of a busy device between two looks at the socket.
const STEPS: u32 = 64;
/// Messages that are handled before the device is stepped again.
const MESSAGES: usize = 16;
/// Empty steps before the thread yields.
const SPINS: u32 = 4000;
/// Yields before it sleeps.
const YIELDS: u32 = 200;
/// The first sleep, in nanoseconds; the last is `FIRST_SLEEP << MAX_DOUBLINGS`: how late a doorbell
/// is seen at worst. A message wakes it at once.
const FIRST_SLEEP: u64 = 20_000;
const MAX_DOUBLINGS: u32 = 4;
/// How often it is looked whether to stop, while there is no client: nanoseconds.
const STOP_LOOK: u64 = 50_000_000;

/// A region of a device.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// Bytes; 0 if it is not there.
    pub size: u64,
    /// The client may write it. It may always read it.
    pub write: bool,
    /// Memory that begins as the region does, and which parts of the region the client may map of
    /// it: whole pages.
    pub shared: Option<(Arc<Region>, Vec<Area>)>,
}

/// A PCI device that can be served. Ranges are checked before it is asked.
pub trait Device {
    /// One of its regions.
    fn shape(&self, index: u32) -> Shape;

    /// How many MSI-X vectors it has: at most 2048.
    fn vectors(&self) -> u32;

    /// The client reads bytes of a region.
    fn read(&mut self, region: u32, offset: u64, into: &mut [u8]);

    /// The client writes bytes of a region that may be written.
    fn write(&mut self, region: u32, offset: u64, from: &[u8]);

    /// Back to the state after power-on; it makes no more access to memory until it is told to.
    fn reset(&mut self);

    /// Does what is next. `now`: nanoseconds that never run backwards. Whether there was anything to
    /// do, or will be soon by itself.
    fn step(&mut self, now: u64) -> bool;
}

/// A device on a socket.
#[derive(Debug)]
pub struct Server<D> {
    listener: UnixListener,
    device: D,
    bus: Bus,
    clock: Clock,
}

impl<D: Device> Server<D> {
    /// A device on a listening socket. `patience`: how long a client may take for the rest of a
    /// message, for an answer, or to read one. `device` is given its way to the client; if it fails,
    /// its error is the inner one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new<E>(
        listener: UnixListener,
        patience: Duration,
        device: impl FnOnce(Bus) -> Result<D, E>,
    ) -> Result<Result<Server<D>, E>, Error> {
        let nonblocking = listener.set_nonblocking(true);
        nonblocking.map_err(|source| Error::Os { what: "a listening socket", source })?;
        let clock = Clock::real();
        let patience = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX / 2);
        let bus = Bus::new(clock.clone(), patience);
        let device = device(bus.clone());
        Ok(device.map(|device| Server { listener, device, bus, clock }))
    }

    /// Serves until told to stop, and gives the device back, reset.
    ///
    /// # Errors
    /// If the listening socket fails. What clients do is no error.
    pub fn run(mut self, stop: &AtomicBool) -> Result<D, Error> {
        let (mut idle, mut steps) = (0u32, 0u32);
        while !stop.load(Ordering::Acquire) {
            if self.bus.0.borrow().peer.is_none() {
                wait(&[(self.listener.as_fd(), PollFlags::POLLIN)], Some(STOP_LOOK))?;
                self.accept()?;
                (idle, steps) = (0, 0);
                continue;
            }
            let busy = self.device.step(self.clock.now());
            if busy {
                self.bus.tell();
                idle = 0;
            } else {
                idle = idle.saturating_add(1);
            }
            steps += 1;
            if steps >= STEPS || idle >= SPINS {
                steps = 0;
                if self.serve()? {
                    idle = 0;
                }
            }
            match idle {
                0 => {}
                1..SPINS => std::hint::spin_loop(),
                _ if idle < SPINS + YIELDS => std::thread::yield_now(),
                _ => self.sleep(FIRST_SLEEP << (idle - SPINS - YIELDS).min(MAX_DOUBLINGS))?,
            }
        }
        self.leave("the server ends");
        Ok(self.device)
    }

    /// Waits for the client or another, for a moment.
    fn sleep(&self, nanoseconds: u64) -> Result<(), Error> {
        let state = self.bus.0.borrow();
        let Some(peer) = &state.peer else { return Ok(()) };
        let fds =
            [(peer.stream.as_fd(), PollFlags::POLLIN), (self.listener.as_fd(), PollFlags::POLLIN)];
        wait(&fds, Some(nanoseconds))
    }

    /// Looks at the sockets. Whether there was anything.
    fn serve(&mut self) -> Result<bool, Error> {
        let busy = self.messages();
        Ok(self.accept()? || busy)
    }

    /// Takes what the client sent. Whether there was anything.
    fn messages(&mut self) -> bool {
        for done in 0..MESSAGES {
            match self.next() {
                Ok(Some(message)) => {
                    let what = message.header;
                    if let Err(e) = self.handle(message) {
                        log::debug!("vfio-user: {what:?}");
                        self.leave(&e.to_string());
                        return true;
                    }
                }
                Ok(None) => return done > 0,
                Err(e) => {
                    self.leave(&e.to_string());
                    return true;
                }
            }
        }
        true
    }

    /// The client's next message, if there is one. An error: it is to be left.
    fn next(&mut self) -> Result<Option<Message>, Error> {
        let now = self.clock.now();
        let mut state = self.bus.0.borrow_mut();
        let patience = state.patience;
        let Some(peer) = &mut state.peer else { return Ok(None) };
        if let Some(e) = peer.broken.take() {
            return Err(e);
        }
        if let Some(message) = peer.backlog.pop_front() {
            return Ok(Some(message));
        }
        let message = peer.inbox.take(&peer.stream, now)?;
        let late = |since: u64| now.saturating_sub(since) >= patience;
        if message.is_none() {
            if !peer.greeted && late(peer.since) {
                return Err(Error::Late("version"));
            }
            if peer.inbox.began().is_some_and(late) {
                return Err(Error::Late("rest of a message"));
            }
        }
        Ok(message)
    }

    /// Takes a new client, if one is there and none is served; else turns it away.
    fn accept(&mut self) -> Result<bool, Error> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) => match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
                Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED => return Ok(false),
                // Out of descriptors: perhaps not for long.
                Errno::EMFILE | Errno::ENFILE => {
                    log::warn!("vfio-user: cannot take a client: {e}");
                    std::thread::sleep(Duration::from_millis(10));
                    return Ok(false);
                }
                _ => return Err(Error::Os { what: "taking a client", source: e }),
            },
        };
        // The one before may have gone a moment ago.
        self.messages();
        if self.bus.0.borrow().peer.is_some() {
            log::warn!("vfio-user: a second client was turned away");
            return Ok(true);
        }
        if let Err(e) = stream.set_nonblocking(true) {
            log::warn!("vfio-user: a client's socket: {e}");
            return Ok(true);
        }
        log::info!("vfio-user: a client came");
        self.bus.0.borrow_mut().peer = Some(Peer::new(stream, self.clock.now()));
        Ok(true)
    }

    /// The client is gone, or is made to go.
    fn leave(&mut self, why: &str) {
        if self.bus.0.borrow().peer.is_some() {
            log::info!("vfio-user: the client is gone: {why}");
        }
        self.device.reset();
        self.bus.clear();
    }
}

/// Descriptors that came with a message, by number.
type Fds = Vec<OwnedFd>;
