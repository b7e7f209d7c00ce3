//! [`Notifier`]: a thread that sends events for reactors, so that they make no system call.
//!
//! A reactor rings a [`Bell`]: it marks the bell and puts its number into a lock-free queue, unless it
//! is marked already. So the queue is never full, and however often a bell is rung meanwhile the
//! other side gets one event, after all that was written before the last ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use reactor::sync::Mutex;
use reactor::{Clock, Wake};

use super::Events;
use crate::Error;

/// Most bells of a notifier.
const MOST: usize = 8192;

/// Where a bell's event goes: through which device, on which local port.
type Target = Mutex<Option<(Arc<Events>, u32)>>;

/// A cache line of its own: each is another reactor's.
#[derive(Default, Debug)]
#[repr(align(128))]
struct Slot {
    rung: AtomicBool,
    target: Target,
}

#[derive(Debug)]
struct Shared {
    slots: Box<[Slot]>,
    free: Mutex<Vec<u32>>,
    queue: ArrayQueue<u32>,
    wake: Wake,
    stop: AtomicBool,
    sent: AtomicU64,
}

/// The thread. It ends when this is dropped; bells that are rung later are not heard.
#[derive(Debug)]
pub struct Notifier {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Notifier {
    /// Starts it. It looks for work for `spin` after the last before it sleeps, and a reactor that
    /// rings while it sleeps has to wake it by a system call; with `None` it never sleeps, and takes a
    /// processor for itself (`cpu`, if it is to be a certain one).
    ///
    /// # Errors
    /// If the process has no thread or descriptor left.
    pub fn start(spin: Option<Duration>, cpu: Option<usize>) -> Result<Notifier, Error> {
        let shared = Arc::new(Shared {
            slots: (0..MOST).map(|_| Slot::default()).collect(),
            free: Mutex::new((0..MOST as u32).rev().collect()),
            queue: ArrayQueue::new(MOST),
            wake: Wake::new().map_err(Error::os("eventfd"))?,
            stop: AtomicBool::new(false),
            sent: AtomicU64::new(0),
        });
        let its = shared.clone();
        let body = move || {
            if let Some(cpu) = cpu
                && let Err(why) = reactor::pin_current_thread(cpu)
            {
                log::warn!("the notifier is not pinned: {why}");
            }
            its.run(spin);
        };
        let thread = std::thread::Builder::new().name("xen-notifier".into()).spawn(body);
        let thread = thread.map_err(|e| Error::io("start a thread", &e))?;
        Ok(Notifier { shared, thread: Some(thread) })
    }

    /// A bell that sends events on a local port; `None` if there are too many.
    pub fn bell(&self, events: &Arc<Events>, local: u32) -> Option<Bell> {
        let slot = self.shared.free.lock().pop()?;
        *self.shared.slots[slot as usize].target.lock() = Some((events.clone(), local));
        Some(Bell { shared: self.shared.clone(), slot })
    }

    /// How many events were sent so far.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self, spin: Option<Duration>) {
        let clock = Clock::real();
        let spin = spin.map(|d| d.as_nanos() as u64);
        let mut last = clock.now();
        while !self.stop.load(Ordering::Acquire) {
            if self.send() {
                last = clock.now();
                continue;
            }
            std::hint::spin_loop();
            let Some(spin) = spin else { continue };
            if clock.now().saturating_sub(last) < spin {
                continue;
            }
            self.wake.about_to_sleep();
            if self.queue.is_empty() && !self.stop.load(Ordering::Acquire) {
                let mut fds = [PollFd::new(self.wake.fd(), PollFlags::POLLIN)];
                let _ = poll(&mut fds, PollTimeout::NONE);
            }
            self.wake.awake();
            last = clock.now();
        }
        // What was rung before the end is heard.
        while self.send() {}
    }

    /// Sends one event, if a bell was rung.
    fn send(&self) -> bool {
        let Some(index) = self.queue.pop() else { return false };
        let slot = &self.slots[index as usize];
        self.answer(slot, &slot.target.lock());
        true
    }

    /// Sends a bell's event if it was rung.
    fn answer(&self, slot: &Slot, target: &Option<(Arc<Events>, u32)>) {
        // Before the event: who rings from now on has written something that it may miss.
        if let (true, Some((events, local))) = (slot.rung.swap(false, Ordering::AcqRel), target) {
            match events.notify(*local) {
                Ok(()) => drop(self.sent.fetch_add(1, Ordering::Relaxed)),
                // The port was given up meanwhile.
                Err(why) => log::debug!("port {local}: {why}"),
            }
        }
    }
}

/// Sends events on one port, through the notifier. To be dropped before the port is given up, so that
/// the last ring is heard.
#[derive(Debug)]
pub struct Bell {
    shared: Arc<Shared>,
    slot: u32,
}

impl Bell {
    /// Has an event sent soon, after all that this thread wrote before. No system call, unless the
    /// notifier sleeps.
    #[inline]
    pub fn ring(&self) {
        let slot = &self.shared.slots[self.slot as usize];
        if !slot.rung.swap(true, Ordering::AcqRel) {
            // There is room: a number is in the queue only while its bell is marked.
            let _ = self.shared.queue.push(self.slot);
            self.shared.wake.wake();
        }
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        let slot = &self.shared.slots[self.slot as usize];
        let mut target = slot.target.lock();
        // The last ring is heard, whoever comes first.
        self.shared.answer(slot, &target);
        *target = None;
        drop(target);
        self.shared.free.lock().push(self.slot);
    }
}
