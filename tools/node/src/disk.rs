//! [`Disk`]: an image that runs on reactor threads of its own.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::Duration;

use block::{Layer, Status};
use dma::Region;
use reactor::{Clock, Core, Mailbox, Portal, Reactor, Start};

use crate::door::{Door, Entry};
use crate::parts::{Further, Parts, Rest, take_seat};
use crate::{Error, Frontend, Image, Leaf, Model};

/// The core of a reactor that serves any node.
pub type ReactorCore = Core<Leaf, Image, Frontend>;

/// A reactor thread of such a core.
pub type NodeReactor = Reactor<Leaf, Image, Frontend>;

/// How an image is served.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Processor and idle policy of each reactor, 1 to [`crate::MOST_REACTORS`] of them. The first
    /// one is the image's home, where its metadata is; the others serve it too.
    pub reactors: Vec<Start>,
    /// Requests in flight and memory for the map.
    pub image: qcow::run::Options,
}

/// The image on one of its reactors.
pub(crate) struct Running {
    pub(crate) reactor: NodeReactor,
    pub(crate) image: usize,
}

/// An image that runs on reactor threads of its own. To be ended by [`Disk::close`].
pub struct Disk {
    pub(crate) home: Running,
    pub(crate) further: Vec<Running>,
    /// Without a close the reactors run on until the process ends, and so must what is below them:
    /// controllers, and the locks that keep others from the image.
    pub(crate) rest: ManuallyDrop<Rest>,
    pub(crate) info: block::DeviceInfo,
    pub(crate) clock: Clock,
}

impl Disk {
    /// Starts the reactors and the image on them. After an error nothing is left of it.
    ///
    /// # Errors
    /// If a thread cannot run where it should, memory is short, or a device has too few queues.
    pub fn start(mut parts: Parts, options: DiskOptions, clock: Clock) -> Result<Disk, Error> {
        let name = parts.name().to_owned();
        let (&start, starts) = options
            .reactors
            .split_first()
            .ok_or_else(|| Error::node(&name, "a reactor is needed to serve it"))?;
        parts.reserve(starts.len())?;
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        let time = clock.clone();
        let reactor = Reactor::start("reactor", start, move || {
            let mut core = ReactorCore::new(time).map_err(|e| e.to_string())?;
            let (index, rest) = parts.attach(&mut core, options.image)?;
            let info = core.image(index).map(|i| Layer::<Leaf>::info(i).clone());
            // The starter waits for this.
            let _ = send.send((index, rest, info));
            Ok(core)
        });
        let reactor = reactor.map_err(|e| Error::node(&name, e))?;
        let Ok((image, rest, Some(info))) = receive.recv() else {
            return Err(Error::node(&name, "the reactor ended at once"));
        };
        let (home, further) = (Running { reactor, image }, Vec::new());
        let mut disk =
            Disk { home, further, rest: ManuallyDrop::new(rest), info, clock: clock.clone() };
        for (&start, number) in starts.iter().zip(2..) {
            if let Err(e) = disk.start_further(start, number, clock.clone()) {
                if let Err(e) = disk.close() {
                    log::error!("{e}");
                }
                return Err(Error::node(&name, format!("reactor {number}: {e}")));
            }
        }
        Ok(disk)
    }

    /// Starts one more reactor.
    fn start_further(&mut self, start: Start, number: usize, clock: Clock) -> Result<(), String> {
        let further: Further = self.rest.further().ok_or("no queues were reserved for it")?;
        let (home, image) = (self.home.reactor.mailbox().clone(), self.home.image);
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        let reactor = Reactor::start(&format!("reactor-{number}"), start, move || {
            let mut core = ReactorCore::new(clock).map_err(|e| e.to_string())?;
            let index = further.attach(&mut core, |away| {
                home.ask(move |home| take_seat(home, image, away)).flatten()
            })?;
            let _ = send.send(index);
            Ok(core)
        })?;
        let image = receive.recv().map_err(|_| "it ended at once")?;
        self.further.push(Running { reactor, image });
        Ok(())
    }

    /// What the image is like.
    pub fn info(&self) -> &block::DeviceInfo {
        &self.info
    }

    /// The home reactor.
    pub fn reactor(&self) -> &NodeReactor {
        &self.home.reactor
    }

    /// All reactors, the home reactor first.
    pub fn reactors(&self) -> impl Iterator<Item = &NodeReactor> {
        self.running().map(|r| &r.reactor)
    }

    fn running(&self) -> impl Iterator<Item = &Running> {
        std::iter::once(&self.home).chain(&self.further)
    }

    /// Index of the image in its home reactor's core.
    pub fn image(&self) -> usize {
        self.home.image
    }

    /// The models among the nodes.
    pub fn models(&mut self) -> impl Iterator<Item = &mut Model> {
        self.rest.models()
    }

    /// Something that makes portals to this image, for other threads to use at will.
    pub fn door(&self) -> Door {
        let entry = |r: &Running| Entry { mailbox: r.reactor.mailbox().clone(), image: r.image };
        Door::new(self.running().map(entry).collect(), self.rest.name())
    }

    /// A portal to the home reactor for `depth` requests in flight over `regions`.
    ///
    /// # Errors
    /// If a device cannot reach the memory, or descriptors are short.
    pub fn portal(&self, depth: u16, regions: Vec<Arc<Region>>) -> Result<Portal, Error> {
        self.door().open_home(depth, regions)
    }

    /// Closes the image in order, on the further reactors first, after all portals were dropped
    /// (those that are not are waited for, a while), and ends the reactors.
    ///
    /// # Errors
    /// If what was in memory could not be written, or a device does not shut down.
    pub fn close(self) -> Result<(), Error> {
        let Disk { home, further, rest, .. } = self;
        let mut rest = ManuallyDrop::into_inner(rest);
        let name = rest.name().to_owned();
        let gone = || Error::node(&name, "a reactor has ended");
        wait_for_frontends(std::iter::once(&home).chain(&further));
        // Their queue pairs go before the devices below the home reactor.
        while rest.further().is_some() {}
        let mut first_error = None;
        for running in further {
            let Running { reactor, image } = running;
            let ended = end_further(reactor.mailbox(), image);
            // Portals that are still open get their answers now.
            reactor.stop();
            let error = match ended {
                None => gone(),
                Some(Status::Ok) => continue,
                Some(s) => Error::node(&name, format!("closing the image: {s}")),
            };
            first_error.get_or_insert(error);
        }
        let Running { reactor, image } = home;
        let mailbox = reactor.mailbox().clone();
        // Images never leave their thread: what comes next runs there too, models' threads live on.
        let done = close_image(&mailbox, image).and_then(|()| {
            mailbox.ask(move |core: &mut ReactorCore| {
                let leaves = core.take_leaves();
                match core.remove_closed_image(image) {
                    Some((i, status)) => rest.finish(&i, status, leaves),
                    None => Err(Error::node("image", "was not there to be closed")),
                }
            })
        });
        reactor.stop();
        first_error.map_or(Ok(()), Err).and(done.unwrap_or_else(|| Err(gone())))
    }
}

/// How long a close waits for frontends that are still attached, in nanoseconds.
const FRONTENDS_NS: u64 = 2_000_000_000;

/// Waits for the frontends to go, for a while.
fn wait_for_frontends<'a>(running: impl Iterator<Item = &'a Running> + Clone) {
    let look = |core: &mut ReactorCore| (core.frontend_count(), core.now());
    let mut began = None;
    loop {
        let seen: Vec<(usize, u64)> =
            running.clone().filter_map(|r| r.reactor.mailbox().ask(look)).collect();
        let Some(&(_, now)) = seen.first() else { return };
        let began = *began.get_or_insert(now);
        if seen.iter().all(|s| s.0 == 0) || now.saturating_sub(began) >= FRONTENDS_NS {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Closes the image and waits for that. `None` if the reactor has ended.
fn close_image(mailbox: &Mailbox<ReactorCore>, image: usize) -> Option<()> {
    mailbox.post(move |core| {
        if let Some(i) = core.image(image) {
            Layer::<Leaf>::close(i);
        }
    });
    let closed = move |core: &mut ReactorCore| {
        core.image(image).is_none_or(|i| Layer::<Leaf>::closed(i).is_some())
    };
    while !mailbox.ask(closed)? {
        std::thread::sleep(Duration::from_micros(200));
    }
    Some(())
}

/// Ends the image on a further reactor, its queues first; returns how its close ended.
fn end_further(mailbox: &Mailbox<ReactorCore>, image: usize) -> Option<Status> {
    close_image(mailbox, image)?;
    mailbox.ask(move |core: &mut ReactorCore| {
        drop(core.take_leaves());
        core.remove_closed_image(image).map_or(Status::Gone, |(_, status)| status)
    })
}
