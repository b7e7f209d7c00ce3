//! [`Control`]: the driver's control thread for one NVMe controller, whatever the transport.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use nvme::{Controller, DmaMapper, Namespace, Options, QueuePair, Refused};
use reactor::Clock;

use crate::Error;
use crate::transport::Transport;

/// How often the control thread looks after a controller that is well.
const PERIOD: Duration = Duration::from_millis(2);

/// What a transport does on the control thread besides.
pub(crate) trait Watch: Send + 'static {
    /// Lets `period` pass, or less if something happened.
    fn wait(&mut self, period: Duration) {
        std::thread::park_timeout(period);
    }

    /// Called after each step of the controller.
    fn look(&mut self, _controller: &mut Controller<Transport>, _now: u64) {}
}

/// Nothing besides.
impl Watch for () {}

/// The driver's clock on a control thread.
struct ControlClock(Clock);

impl nvme::Clock for ControlClock {
    fn now(&mut self) -> u64 {
        self.0.now()
    }

    fn pause(&mut self) {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Where a queue pair that was asked for goes.
type Ask = Sender<Result<QueuePair<Transport>, nvme::Error>>;

/// A controller that is up, and the thread that looks after it.
pub(crate) struct Control {
    node: String,
    namespaces: Vec<Namespace>,
    refused: Vec<Refused>,
    asks: Sender<Ask>,
    thread: Option<JoinHandle<Result<(), nvme::Error>>>,
    stop: Arc<AtomicBool>,
}

impl Control {
    /// Brings the controller up and starts its thread.
    ///
    /// # Errors
    /// Why the driver could not bring it up, or that there is no thread to be had.
    pub(crate) fn start(
        node: &str,
        bar: Transport,
        mapper: Arc<dyn DmaMapper>,
        options: Options,
        clock: Clock,
        watch: impl Watch,
    ) -> Result<Control, Error> {
        let fail =
            |what: &str, e: &dyn std::fmt::Display| Error::node(node, format!("{what}: {e}"));
        let mut time = ControlClock(clock);
        let controller = Controller::open(bar, mapper, options, &mut time)
            .map_err(|e| fail("the controller does not come up", &e))?;
        let namespaces = controller.namespaces().to_vec();
        let refused = controller.refused().to_vec();
        let stop = Arc::new(AtomicBool::new(false));
        let (asks, asked) = channel();
        let thread = std::thread::Builder::new()
            .name("nvme-control".to_owned())
            .spawn({
                let stop = stop.clone();
                move || run(controller, time, &asked, &stop, watch)
            })
            .map_err(|e| fail("cannot start a thread", &e))?;
        Ok(Control { node: node.to_owned(), namespaces, refused, asks, thread: Some(thread), stop })
    }

    /// The namespaces that can be used, as they were found: unit `n` of a queue pair is the `n`th.
    pub(crate) fn namespaces(&self) -> &[Namespace] {
        &self.namespaces
    }

    /// The namespaces that cannot, each with why.
    pub(crate) fn refused(&self) -> &[Refused] {
        &self.refused
    }

    /// Makes a queue pair. Waits for the control thread.
    ///
    /// # Errors
    /// If the controller has none left, or is lost.
    pub(crate) fn queue_pair(&self) -> Result<QueuePair<Transport>, Error> {
        let fail =
            |e: &dyn std::fmt::Display| Error::node(&self.node, format!("a queue pair: {e}"));
        let (give, take) = channel();
        let asked = self.asks.send(give).is_ok();
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
        match take.recv() {
            Ok(made) if asked => made.map_err(|e| fail(&e)),
            _ => Err(fail(&"the control thread has ended")),
        }
    }

    /// Shuts the controller down, after its queue pairs are gone.
    ///
    /// # Errors
    /// If the shutdown does not end in order.
    pub(crate) fn close(mut self) -> Result<(), Error> {
        self.end()
    }

    fn end(&mut self) -> Result<(), Error> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.stop.store(true, Ordering::Release);
        thread.thread().unpark();
        match thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(Error::node(&self.node, format!("shutdown: {e}"))),
            Err(_) => Err(Error::node(&self.node, "the control thread panicked")),
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            log::error!("{e}");
        }
    }
}

fn run(
    mut controller: Controller<Transport>,
    mut time: ControlClock,
    asked: &Receiver<Ask>,
    stop: &AtomicBool,
    mut watch: impl Watch,
) -> Result<(), nvme::Error> {
    while !stop.load(Ordering::Acquire) {
        let now = nvme::Clock::now(&mut time);
        controller.step(now);
        watch.look(&mut controller, now);
        while let Ok(answer) = asked.try_recv() {
            // Who asked may have given up.
            let _ = answer.send(controller.create_queue_pair(&mut time));
        }
        watch.wait(PERIOD);
    }
    controller.close(&mut time)
}
