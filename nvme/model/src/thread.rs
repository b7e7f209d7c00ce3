//! [`ThreadDriver`]: a thread that steps a controller.
//!
//! Busy, it steps without a pause. Idle, it spins for some tens of microseconds, then yields, then
//! sleeps for 20 microseconds, twice as long each time up to a bound: the host rings doorbells by
//! plain stores and so cannot wake it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::controller::Controller;
use crate::memory::HostMemory;

/// Empty steps before the thread yields.
const SPINS: u32 = 4000;
/// Yields before it sleeps.
const YIELDS: u32 = 200;
const FIRST_SLEEP: Duration = Duration::from_micros(20);
/// The last sleep is `FIRST_SLEEP << MAX_DOUBLINGS`: how late a doorbell is seen at worst.
const MAX_DOUBLINGS: u32 = 4;

type Call<M> = Box<dyn FnOnce(&mut Controller<M>) + Send>;

/// Owns the stepping thread. Dropping it stops the thread; [`ThreadDriver::stop`] also gives the
/// controller back.
#[derive(Debug)]
pub struct ThreadDriver<M> {
    thread: Option<JoinHandle<Controller<M>>>,
    attention: Arc<Attention>,
    calls: Sender<Call<M>>,
}

#[derive(Debug, Default)]
struct Attention {
    stop: AtomicBool,
    /// Something may be in the channel, or `stop` is set.
    look: AtomicBool,
}

impl<M: HostMemory + Send + 'static> ThreadDriver<M> {
    /// Starts a thread that steps `controller`. `on_start` runs on it first, e.g. to pin it.
    ///
    /// # Errors
    /// If no thread can be made; the controller is lost then.
    pub fn spawn(
        controller: Controller<M>,
        on_start: impl FnOnce() + Send + 'static,
    ) -> io::Result<ThreadDriver<M>> {
        let attention = Arc::new(Attention::default());
        let (calls, incoming) = channel();
        let theirs = Arc::clone(&attention);
        let thread = Builder::new().name("nvme-model".to_owned()).spawn(move || {
            on_start();
            run(controller, &theirs, &incoming)
        })?;
        Ok(ThreadDriver { thread: Some(thread), attention, calls })
    }

    /// Runs `f` on the stepping thread, between two steps, and returns what it returns. `None` if
    /// the thread is gone, which only a panic in an earlier `f` can bring about.
    pub fn call<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Controller<M>) -> R + Send + 'static,
    ) -> Option<R> {
        let (back, answer) = channel();
        let call: Call<M> = Box::new(move |controller| {
            let _ = back.send(f(controller));
        });
        self.calls.send(call).ok()?;
        self.notify();
        answer.recv().ok()
    }

    /// Stops the thread and gives the controller back, as it stands. `None` if the thread is gone,
    /// see [`ThreadDriver::call`].
    pub fn stop(mut self) -> Option<Controller<M>> {
        self.join()
    }
}

impl<M> ThreadDriver<M> {
    fn notify(&self) {
        self.attention.look.store(true, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    fn join(&mut self) -> Option<Controller<M>> {
        self.attention.stop.store(true, Ordering::Release);
        self.notify();
        self.thread.take()?.join().ok()
    }
}

impl<M> Drop for ThreadDriver<M> {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

#[expect(clippy::disallowed_methods, reason = "the model's clock; it is no part of the datapath")]
fn run<M: HostMemory>(
    mut controller: Controller<M>,
    attention: &Attention,
    calls: &Receiver<Call<M>>,
) -> Controller<M> {
    let start = Instant::now();
    let timed = controller.wants_time();
    let mut idle = 0u32;
    loop {
        if attention.look.load(Ordering::Relaxed) {
            // The swap acquires what the notifier wrote before.
            attention.look.swap(false, Ordering::AcqRel);
            while let Ok(call) = calls.try_recv() {
                call(&mut controller);
            }
            if attention.stop.load(Ordering::Acquire) {
                return controller;
            }
            idle = 0;
        }
        let now = if timed { start.elapsed().as_nanos() as u64 } else { 0 };
        if controller.step(now) {
            idle = 0;
            continue;
        }
        idle = idle.saturating_add(1);
        if idle < SPINS {
            std::hint::spin_loop();
        } else if idle < SPINS + YIELDS || controller.has_in_flight() {
            std::thread::yield_now();
        } else {
            let doublings = (idle - SPINS - YIELDS).min(MAX_DOUBLINGS);
            std::thread::park_timeout(FIRST_SLEEP * (1 << doublings));
        }
    }
}
