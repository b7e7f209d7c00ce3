//! [`Reactor`]: a core on a pinned thread, and what it does when there is nothing to do.

use std::sync::Arc;
use std::thread::JoinHandle;

use block::{BlockQueue, Frontend, HasWork, Layer};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::core::WAKERS;
use crate::{Core, Mailbox, Stats, pin_current_thread};

/// What a reactor does in idle turns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Policy {
    /// Never sleeps: the lowest latency, at the price of a whole processor.
    Poll,
    /// Spins for a while, then sleeps until a guest, a device or a control thread wakes it.
    Adaptive,
}

impl Policy {
    /// As the command line writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Policy::Poll => "poll",
            Policy::Adaptive => "adaptive",
        }
    }
}

impl std::str::FromStr for Policy {
    type Err = String;

    fn from_str(s: &str) -> Result<Policy, String> {
        match s {
            "poll" => Ok(Policy::Poll),
            "adaptive" => Ok(Policy::Adaptive),
            _ => Err(format!("unknown policy {s:?}; there are poll and adaptive")),
        }
    }
}

/// How long idle turns go on before the thread sleeps, in nanoseconds: longer than an Optane read
/// and the wake-up that it would cost, short enough that an idle guest costs nothing.
const SPIN_NS: u64 = 50_000;

/// How to start a reactor.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// The processor to run on; `None` leaves it to the scheduler.
    pub cpu: Option<usize>,
    /// What to do in idle turns.
    pub policy: Policy,
}

/// A running reactor thread. Ends when its core was told to stop, or on [`Reactor::stop`].
pub struct Reactor<L, I, F> {
    mailbox: Mailbox<Core<L, I, F>>,
    stats: Arc<Stats>,
    thread: Option<JoinHandle<()>>,
}

impl<L, I, F> Reactor<L, I, F>
where
    L: BlockQueue + 'static,
    I: Layer<L> + 'static,
    F: Frontend + 'static,
{
    /// Starts the thread; `build` makes the core on it (what a core holds need not be `Send`).
    ///
    /// # Errors
    /// What `build` says, or why the thread cannot run where it should.
    pub fn start(
        name: &str,
        start: Start,
        build: impl FnOnce() -> Result<Core<L, I, F>, String> + Send + 'static,
    ) -> Result<Self, String> {
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        let body = move || {
            let made = match start.cpu {
                Some(cpu) => pin_current_thread(cpu).and_then(|()| build()),
                None => build(),
            };
            match made {
                Ok(mut core) => {
                    let _ = send.send(Ok((core.mailbox(), core.stats())));
                    run(&mut core, start.policy);
                }
                Err(e) => {
                    let _ = send.send(Err(e));
                }
            }
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(body);
        let thread = thread.map_err(|e| format!("cannot start a reactor thread: {e}"))?;
        let (mailbox, stats) =
            receive.recv().map_err(|_| "the reactor thread ended at once".to_owned())??;
        Ok(Reactor { mailbox, stats, thread: Some(thread) })
    }

    /// The way in.
    pub fn mailbox(&self) -> &Mailbox<Core<L, I, F>> {
        &self.mailbox
    }

    /// Counters.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Has the loop end after the turn it is in, and waits for it.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.mailbox.post(Core::stop);
            if thread.join().is_err() {
                log::error!("a reactor thread panicked");
            }
        }
    }
}

impl<L, I, F> Drop for Reactor<L, I, F> {
    fn drop(&mut self) {
        // A running thread keeps its memory alive; dropping the handle alone leaves it running.
        if self.thread.is_some() {
            log::warn!("a reactor was dropped without being stopped");
        }
    }
}

/// The loop.
fn run<L: BlockQueue, I: Layer<L>, F: Frontend>(core: &mut Core<L, I, F>, policy: Policy) {
    let mut last_work = 0;
    if policy == Policy::Adaptive {
        core.sleeps();
    }
    while !core.stopping() {
        if core.turn() {
            last_work = core.now();
            continue;
        }
        std::hint::spin_loop();
        if policy == Policy::Adaptive
            && (core.now().saturating_sub(last_work) > SPIN_NS || core.waits_for_sockets())
        {
            sleep(core);
        }
    }
}

/// Sleeps until something wakes the reactor, if the final check finds nothing to do.
#[cold]
fn sleep<L: BlockQueue, I: Layer<L>, F: Frontend>(core: &mut Core<L, I, F>) {
    let wake = core.wake();
    wake.about_to_sleep();
    if core.arm() == HasWork::No {
        core.stats().sleeps.add(1);
        let nap = core.nap().map_or(SLEEP_MS, |ns| {
            u16::try_from(ns.div_ceil(1_000_000)).unwrap_or(SLEEP_MS).min(SLEEP_MS)
        });
        let mut fds: [_; 1 + WAKERS] =
            std::array::from_fn(|_| PollFd::new(wake.fd(), PollFlags::POLLIN));
        let mut n = 1;
        for (fd, what) in core.wakers() {
            fds[n] = PollFd::new(fd, what);
            n += 1;
        }
        let began = core.clock().now();
        // A signal or a time-out only means one turn more.
        let _ = poll(&mut fds[..n], PollTimeout::from(nap));
        let events = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        let took = core.clock().now().saturating_sub(began);
        let lodgers = n - core.lodger_wakers();
        core.slept(took, events[lodgers..n].iter().copied());
    }
    wake.awake();
}

/// Longest sleep in milliseconds: bounds the harm of a wake-up that a buggy peer forgot.
const SLEEP_MS: u16 = 100;
