//! [`Disk`]: an image that runs on reactor threads, its own or shared ones.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::Duration;

use block::{Layer, Status};
use dma::Region;
use reactor::sync::Mutex;
use reactor::{Clock, Core, Mailbox, Portal, Reactor, Start};

use crate::door::{Door, Entry};
use crate::groups::TopVolume;
use crate::parts::{Further, Parts, Rest, take_seat};
use crate::reactors::take_leaves;
use crate::{Error, Frontend, Image, Leaf, Model, Reactors};

/// The core of a reactor that serves any node.
pub type ReactorCore = Core<Leaf, Image, Frontend>;

/// A reactor thread of such a core.
pub type NodeReactor = Reactor<Leaf, Image, Frontend>;

/// How an image is served on reactors of its own.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Processor and idle policy of each reactor, 1 to [`crate::MOST_REACTORS`] of them. The first
    /// one is the image's home, where its metadata is; the others serve it too.
    pub reactors: Vec<Start>,
    /// Requests in flight and memory for the map.
    pub image: qcow::run::Options,
}

/// The image on one of its reactors.
#[derive(Clone, Copy)]
pub(crate) struct Running {
    /// Number among [`Disk::reactors`].
    pub(crate) reactor: usize,
    pub(crate) image: usize,
}

/// An image that runs on reactor threads. To be ended by [`Disk::close`].
pub struct Disk {
    reactors: Arc<Reactors>,
    /// They serve nothing else.
    alone: bool,
    pub(crate) home: Running,
    pub(crate) further: Vec<Running>,
    /// Without a close the reactors run on until the process ends, and so must what is below them:
    /// controllers, and the locks that keep others from the image.
    pub(crate) rest: ManuallyDrop<Rest>,
    /// The volume that is written to, if it is one, until the end. Locked while the image goes over to
    /// another one, or is told that it has grown.
    pub(crate) volume: Arc<Mutex<Option<TopVolume>>>,
    pub(crate) info: block::DeviceInfo,
    pub(crate) clock: Clock,
}

impl Disk {
    /// Starts reactors, and the image on them. After an error nothing is left of it.
    ///
    /// # Errors
    /// If a thread cannot run where it should, memory is short, or a device has too few queues.
    pub fn start(mut parts: Parts, options: DiskOptions, clock: Clock) -> Result<Disk, Error> {
        let name = parts.name().to_owned();
        parts.reserve(options.reactors.len().saturating_sub(1))?;
        let reactors = Reactors::start(&options.reactors, clock)
            .map_err(|e| Error::node(&name, format!("cannot be served: {e}")))?;
        let all: Vec<usize> = (0..reactors.count()).collect();
        let started = parts
            .move_to(&reactors)
            .and_then(|parts| Disk::run(parts, &reactors, &all, options.image));
        match started {
            Ok(mut disk) => {
                disk.alone = true;
                Ok(disk)
            }
            Err(e) => {
                reactors.stop();
                Err(e)
            }
        }
    }

    /// Has reactors that may serve others serve an image whose parts were made for them, the first of
    /// `numbers` as its home. After an error nothing is left of it.
    ///
    /// # Errors
    /// If memory is short, or a device has too few queues.
    pub fn start_on(
        mut parts: Parts,
        reactors: &Arc<Reactors>,
        numbers: &[usize],
        image: qcow::run::Options,
    ) -> Result<Disk, Error> {
        parts.reserve(numbers.len().saturating_sub(1))?;
        Disk::run(parts, reactors, numbers, image)
    }

    fn run(
        mut parts: Parts,
        reactors: &Arc<Reactors>,
        numbers: &[usize],
        options: qcow::run::Options,
    ) -> Result<Disk, Error> {
        let name = parts.name().to_owned();
        let fail = |e: String| Error::node(&name, e);
        let known = numbers.iter().all(|&n| n < reactors.count()) && parts.are_for(reactors);
        let (Some((&first, others)), true) = (numbers.split_first(), known) else {
            return Err(fail("there are no such reactors".into()));
        };
        for &number in numbers {
            parts.appear_on(number)?;
        }
        let below = parts.take_below();
        let attached = reactors.mailbox(first).ask(move |core: &mut ReactorCore| {
            let (index, rest) = parts.attach(core, options)?;
            let info = core.image(index).map(|i| Layer::<Leaf>::info(i).clone());
            info.map(|info| (index, rest, info)).ok_or_else(|| "the image is not there".to_owned())
        });
        let (image, mut rest, info) =
            attached.unwrap_or_else(|| Err(ENDED.into())).map_err(fail)?;
        rest.put_below(below);
        let mut disk = Disk {
            reactors: reactors.clone(),
            alone: false,
            home: Running { reactor: first, image },
            further: Vec::new(),
            rest: ManuallyDrop::new(rest),
            volume: Arc::default(),
            info,
            clock: reactors.clock().clone(),
        };
        *disk.volume.lock() = disk.top_volume(0);
        for &number in others {
            if let Err(e) = disk.start_further(number) {
                if let Err(e) = disk.close() {
                    log::error!("{e}");
                }
                return Err(fail(format!("reactor {}: {e}", number + 1)));
            }
        }
        Ok(disk)
    }

    /// Has one more reactor serve it.
    fn start_further(&mut self, number: usize) -> Result<(), String> {
        let further: Further = self.rest.further().ok_or("no queues were reserved for it")?;
        let mailbox = self.reactors.mailbox(number);
        // Asked for by this thread: reactors never wait for each other.
        let away = mailbox.ask(|core| core.wake()).ok_or(ENDED)?;
        let image = self.home.image;
        let seat = self.home_mailbox().ask(move |home| take_seat(home, image, away)).flatten();
        let image = mailbox
            .ask(move |core: &mut ReactorCore| further.attach(core, |_| seat))
            .unwrap_or_else(|| Err(ENDED.into()))?;
        self.further.push(Running { reactor: number, image });
        Ok(())
    }

    pub(crate) fn mailbox(&self, running: &Running) -> &Mailbox<ReactorCore> {
        self.reactors.mailbox(running.reactor)
    }

    pub(crate) fn home_mailbox(&self) -> &Mailbox<ReactorCore> {
        self.mailbox(&self.home)
    }

    pub(crate) fn all_reactors(&self) -> &Arc<Reactors> {
        &self.reactors
    }

    /// What the image is like.
    pub fn info(&self) -> &block::DeviceInfo {
        &self.info
    }

    /// The home reactor.
    pub fn reactor(&self) -> &NodeReactor {
        self.reactors.at(self.home.reactor)
    }

    /// All reactors that serve it, the home reactor first.
    pub fn reactors(&self) -> impl Iterator<Item = &NodeReactor> {
        self.running().map(|r| self.reactors.at(r.reactor))
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = &Running> {
        std::iter::once(&self.home).chain(&self.further)
    }

    /// Has changes of a QCOW2 image that are not durable yet noted in memory that outlives the process.
    /// Before anything is served. `owner` tells the image's file from others.
    ///
    /// # Errors
    /// If it is no QCOW2 image.
    pub fn keep_journal(&self, memory: Arc<Region>, owner: u64) -> Result<(), Error> {
        self.on_image(move |i, _| i.keep_journal(qcow::run::Journal::new(memory, owner)))
    }

    /// Says whose the journal is from now on: the image lies in another file or volume
    /// ([`Disk::snapshot_onto`]).
    ///
    /// # Errors
    /// If it is no QCOW2 image.
    pub fn journal_is_of(&self, owner: u64) -> Result<(), Error> {
        self.on_image(move |i, _| i.journal_is_of(owner))
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
        Door::new(self.entries(), self.rest.name())
    }

    pub(crate) fn entries(&self) -> Arc<[Entry]> {
        let entry = |r: &Running| Entry {
            mailbox: self.mailbox(r).clone(),
            image: r.image,
            reactor: r.reactor,
        };
        self.running().map(entry).collect()
    }

    /// A portal to the home reactor for `depth` requests in flight over `regions`.
    ///
    /// # Errors
    /// If a device cannot reach the memory, or descriptors are short.
    pub fn portal(&self, depth: u16, regions: Vec<Arc<Region>>) -> Result<Portal, Error> {
        self.door().open_home(depth, regions)
    }

    /// Closes the image in order, on the further reactors first, after all portals were dropped
    /// (those that are not are waited for, a while), and ends the reactors if they are its own.
    ///
    /// # Errors
    /// If what was in memory could not be written, or a device does not shut down.
    pub fn close(mut self) -> Result<(), Error> {
        let name = self.rest.name().to_owned();
        let gone = || Error::node(&name, ENDED);
        // No more space comes from now on.
        if let Some(growing) = self.growing() {
            growing.may_grow(false);
        }
        *self.volume.lock() = None;
        self.wait_for_frontends();
        // Their queue pairs go before the devices below the home reactor.
        while self.rest.further().is_some() {}
        let mut first_error = None;
        for running in std::mem::take(&mut self.further) {
            let error = match self.end_further(&running) {
                None => gone(),
                Some(Status::Ok) => continue,
                Some(s) => Error::node(&name, format!("closing the image: {s}")),
            };
            first_error.get_or_insert(error);
        }
        let (mailbox, image) = (self.home_mailbox().clone(), self.home.image);
        let Disk { reactors, alone, rest, .. } = self;
        let rest = ManuallyDrop::into_inner(rest);
        // Images never leave their thread. What is below ends here: that takes its time.
        let done = close_image(&mailbox, image).and_then(|()| {
            mailbox.ask(move |core: &mut ReactorCore| {
                let left = rest.leave(core, image);
                (rest, left)
            })
        });
        let done = done.map(|(rest, left)| rest.end(left));
        if alone {
            reactors.stop();
        }
        first_error.map_or(Ok(()), Err).and(done.unwrap_or_else(|| Err(gone())))
    }

    /// Waits for the frontends to go, for a while.
    fn wait_for_frontends(&self) {
        let began = self.clock.now();
        let attached = |r: &Running| {
            let image = r.image;
            self.mailbox(r).ask(move |core: &mut ReactorCore| core.frontends_of(image))
        };
        while self.running().any(|r| attached(r).is_some_and(|n| n > 0))
            && self.clock.now().saturating_sub(began) < FRONTENDS_NS
        {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the image on a further reactor, its queues first; returns how its close ended.
    fn end_further(&self, running: &Running) -> Option<Status> {
        let (mailbox, image) = (self.mailbox(running), running.image);
        close_image(mailbox, image)?;
        let places = self.rest.places.list.clone();
        mailbox.ask(move |core: &mut ReactorCore| {
            drop(take_leaves(core, &places));
            core.remove_closed_image(image).map_or(Status::Gone, |(_, status)| status)
        })
    }
}

/// Of a reactor that does not answer.
const ENDED: &str = "its reactor has ended";

/// How long a close waits for frontends that are still attached, in nanoseconds.
const FRONTENDS_NS: u64 = 2_000_000_000;

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
