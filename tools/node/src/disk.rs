//! [`Disk`]: an image that runs on a reactor thread, and [`Parts`], what it is made of.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::Duration;

use block::{Layer, LeafAccess, Port, RawImage, Status};
use dma::Region;
use file::ImageLock;
use qcow::open::LayerKind;
use qcow::run::Stack;
use reactor::{Clock, Core, Mailbox, Portal, Reactor, Start};

use crate::chain::file_leaf;
use crate::device::Device;
use crate::source::{Kind, Source};
use crate::{Chain, Error, Frontend, Image, Leaf, Model, VhdChain};

/// The core of a reactor that serves any node.
pub type ReactorCore = Core<Leaf, Image, Frontend>;

/// How an image is served.
#[derive(Clone, Copy, Debug)]
pub struct DiskOptions {
    /// Processor and idle policy of the reactor.
    pub start: Start,
    /// Requests in flight and memory for the map.
    pub image: qcow::run::Options,
}

/// An opened image taken apart: what a reactor needs to serve it. Can be sent to its thread.
pub struct Parts {
    leaves: Vec<Leaf>,
    plan: Plan,
    top: Port,
    writable: bool,
    devices: Vec<Device>,
    locks: Vec<ImageLock>,
    name: String,
}

enum Plan {
    Qcow(Box<Stack>),
    Raw { size: u64 },
    Vhd(Box<vhd::run::Stack>),
}

impl Parts {
    /// Takes an opened image apart.
    ///
    /// # Errors
    /// If its metadata contradicts itself, or a leaf cannot be made.
    pub fn new(mut chain: Chain) -> Result<Parts, Error> {
        let name = chain.layers[0].name.clone();
        let ports = ports(chain.layers.iter().map(|l| &l.storage));
        let (plan, writable) = match &chain.layers[0].kind {
            LayerKind::Raw(size) => {
                (Plan::Raw { size: *size }, !block::Storage::read_only(&chain.layers[0].storage))
            }
            LayerKind::Qcow2(image) => {
                let writable = image.mode == qcow::Mode::Write;
                (Plan::Qcow(Box::new(Stack::new(&mut chain, &ports)?)), writable)
            }
        };
        let storages = chain.layers.into_iter().map(|l| l.storage);
        Parts::of(storages, plan, ports[0], writable, name)
    }

    /// Takes an opened VHD chain apart.
    ///
    /// # Errors
    /// If a leaf cannot be made.
    pub fn of_vhd(chain: VhdChain) -> Result<Parts, Error> {
        let name = chain.layers[0].name.clone();
        let ports = ports(chain.layers.iter().map(|l| &l.storage));
        let plan = Plan::Vhd(Box::new(vhd::run::Stack::new(&chain, &ports)));
        let storages = chain.layers.into_iter().map(|l| l.storage);
        Parts::of(storages, plan, ports[0], false, name)
    }

    fn of(
        storages: impl Iterator<Item = Source>,
        plan: Plan,
        top: Port,
        writable: bool,
        name: String,
    ) -> Result<Parts, Error> {
        // On an error dropped in reverse: devices wait for their queue pairs, locks come last.
        let (mut locks, mut devices, mut leaves) = (Vec::new(), Vec::new(), Vec::new());
        let mut files: Vec<File> = Vec::new();
        for storage in storages {
            locks.extend(storage.locks);
            match storage.kind {
                Kind::Host(h) => files.push(h.into_file()),
                Kind::Leaf(b, below) => {
                    leaves.push(b.into_leaf());
                    devices.extend(below);
                }
            }
        }
        if !files.is_empty() {
            let mut leaf = file_leaf(files).map_err(|e| Error::node(&name, e))?;
            if let (Leaf::File(queue), Plan::Qcow(_), true) = (&mut leaf, &plan, top.leaf == 0) {
                // It grows, and is cut where the image ends.
                let ahead = queue.with_leaf(|q| q.allocate_ahead(top.unit));
                ahead.map_err(|e| Error::node(&name, e))?;
            }
            leaves.insert(0, leaf);
        }
        Ok(Parts { leaves, plan, top, writable, devices, locks, name })
    }

    /// The models among the nodes.
    pub fn models(&mut self) -> impl Iterator<Item = &mut Model> {
        self.devices.iter_mut().filter_map(Device::as_model)
    }

    /// The queue to the top layer's device, the unit in it, and what is needed to end: for
    /// measurements of a device, without an image.
    pub fn into_leaf(mut self) -> (Leaf, u16, Rest) {
        let leaf = self.leaves.swap_remove(usize::from(self.top.leaf));
        let Parts { top, writable, devices, locks, name, .. } = self;
        (leaf, top.unit, Rest { top, writable, devices, locks, name })
    }

    /// Puts leaves and image into a core; returns the image's index and what is needed to close.
    /// To be called on the reactor's thread, on a core without leaves.
    ///
    /// # Errors
    /// If memory is short or a device cannot reach it.
    pub fn attach(
        self,
        core: &mut ReactorCore,
        options: qcow::run::Options,
    ) -> Result<(usize, Rest), String> {
        let Parts { leaves, plan, top, writable, devices, locks, name } = self;
        match attach_image(core, leaves, plan, top, options) {
            Ok(index) => Ok((index, Rest { top, writable, devices, locks, name })),
            Err(e) => {
                // Before the devices, whose controllers wait for their queue pairs, and the locks.
                drop(core.take_leaves());
                Err(e)
            }
        }
    }
}

/// Where each layer will lie: all files are units of the first leaf queue, if there are any.
fn ports<'s>(storages: impl Iterator<Item = &'s Source> + Clone) -> Vec<Port> {
    let hosts = storages.clone().filter(|s| matches!(s.kind, Kind::Host(_)));
    let (mut files, mut others) = (0, u16::from(hosts.count() > 0));
    storages
        .map(|s| match &s.kind {
            Kind::Host(_) => {
                files += 1;
                Port { leaf: 0, unit: files - 1 }
            }
            Kind::Leaf(storage, _) => {
                others += 1;
                Port { leaf: others - 1, unit: storage.unit() }
            }
        })
        .collect()
}

fn attach_image(
    core: &mut ReactorCore,
    leaves: Vec<Leaf>,
    plan: Plan,
    top: Port,
    options: qcow::run::Options,
) -> Result<usize, String> {
    for leaf in leaves {
        core.add_leaf(leaf)?;
    }
    core.add_image(|owner, leaves| match plan {
        Plan::Qcow(stack) => qcow::run::Image::attach(*stack, owner, leaves, options)
            .map(|i| Image::Qcow(Box::new(i))),
        Plan::Vhd(stack) => {
            vhd::run::Image::attach(*stack, owner, leaves).map(|i| Image::Vhd(Box::new(i)))
        }
        Plan::Raw { size } => RawImage::new(leaves, top, size, owner)
            .map(|i| Image::Raw(Box::new(i)))
            .ok_or_else(|| "the leaf queue has no such unit".to_owned()),
    })
}

/// What is left of [`Parts`] while the image runs: needed to close it.
pub struct Rest {
    top: Port,
    writable: bool,
    devices: Vec<Device>,
    locks: Vec<ImageLock>,
    name: String,
}

impl Rest {
    /// The models among the nodes.
    pub fn models(&mut self) -> impl Iterator<Item = &mut Model> {
        self.devices.iter_mut().filter_map(Device::as_model)
    }

    /// Ends everything below an image that was closed and taken out of its core: cuts the file
    /// where the image ends, shuts controllers down, gives locks back.
    ///
    /// # Errors
    /// If the image's own close failed, or a device does not shut down.
    pub fn finish(self, image: &Image, status: Status, mut leaves: Vec<Leaf>) -> Result<(), Error> {
        let striped = matches!(leaves.get(usize::from(self.top.leaf)), Some(Leaf::Stripe(_)));
        let end = match image {
            // The members of a stripe are not the image's own files, and keep their length.
            Image::Qcow(i) if self.writable && status.is_ok() && !striped => Some(i.end()),
            _ => None,
        };
        if let Some(end) = end
            && let Some(leaf) = leaves.get_mut(usize::from(self.top.leaf))
            && end < leaf.unit_len(self.top.unit)
            && let Err(s) = leaf.set_unit_len(self.top.unit, end)
        {
            log::warn!("{}: cannot cut the file at the image's end: {s}", self.name);
        }
        drop(leaves);
        let name = self.name.clone();
        self.end(end)?;
        match status {
            Status::Ok => Ok(()),
            s => Err(Error::node(name, format!("closing the image: {s}"))),
        }
    }

    /// Ends everything below a leaf that was dropped, see [`Parts::into_leaf`].
    ///
    /// # Errors
    /// If a device does not shut down.
    pub fn finish_leaf(self) -> Result<(), Error> {
        self.end(None)
    }

    /// Shuts controllers down and gives locks back. The file of a model that holds the image is cut
    /// at `cut`.
    fn end(self, cut: Option<u64>) -> Result<(), Error> {
        for device in self.devices {
            let Some(file) = device.close()? else { continue };
            let shorten = || -> std::io::Result<()> {
                match cut {
                    Some(end) if end < file.metadata()?.len() => {
                        file.set_len(end)?;
                        file.sync_all()
                    }
                    _ => Ok(()),
                }
            };
            shorten().map_err(|e| Error::node(&self.name, e))?;
        }
        drop(self.locks);
        Ok(())
    }
}

/// An image that runs on a reactor thread of its own. To be ended by [`Disk::close`].
pub struct Disk {
    reactor: Reactor<Leaf, Image, Frontend>,
    image: usize,
    /// Without a close the reactor runs on until the process ends, and so must what is below it:
    /// controllers, and the locks that keep others from the image.
    rest: ManuallyDrop<Rest>,
    info: block::DeviceInfo,
}

impl Disk {
    /// Starts the reactor and the image on it.
    ///
    /// # Errors
    /// If the thread cannot run where it should, or memory is short.
    pub fn start(parts: Parts, options: DiskOptions, clock: Clock) -> Result<Disk, Error> {
        let name = parts.name.clone();
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        let reactor = Reactor::start("reactor", options.start, move || {
            let mut core = ReactorCore::new(clock).map_err(|e| e.to_string())?;
            let (index, rest) = parts.attach(&mut core, options.image)?;
            let info = core.image(index).map(|i| Layer::<Leaf>::info(i).clone());
            // The starter waits for this.
            let _ = send.send((index, rest, info));
            Ok(core)
        });
        let reactor = reactor.map_err(|e| Error::node(&name, e))?;
        match receive.recv() {
            Ok((image, rest, Some(info))) => {
                Ok(Disk { reactor, image, rest: ManuallyDrop::new(rest), info })
            }
            _ => Err(Error::node(&name, "the reactor ended at once")),
        }
    }

    /// What the image is like.
    pub fn info(&self) -> &block::DeviceInfo {
        &self.info
    }

    /// The reactor.
    pub fn reactor(&self) -> &Reactor<Leaf, Image, Frontend> {
        &self.reactor
    }

    /// Index of the image in its core.
    pub fn image(&self) -> usize {
        self.image
    }

    /// The models among the nodes.
    pub fn models(&mut self) -> impl Iterator<Item = &mut Model> {
        self.rest.models()
    }

    /// Something that makes portals to this image, for other threads to use at will.
    pub fn door(&self) -> Door {
        Door {
            mailbox: self.reactor.mailbox().clone(),
            image: self.image,
            name: self.rest.name.clone(),
        }
    }

    /// A portal for `depth` requests in flight over `regions`.
    ///
    /// # Errors
    /// If a device cannot reach the memory, or descriptors are short.
    pub fn portal(&self, depth: u16, regions: Vec<Arc<Region>>) -> Result<Portal, Error> {
        self.door().open(depth, regions)
    }

    /// Closes the image in order, after all portals were dropped (those that are not are waited
    /// for, a while), and ends the reactor.
    ///
    /// # Errors
    /// If what was in memory could not be written, or a device does not shut down.
    pub fn close(self) -> Result<(), Error> {
        let Disk { reactor, image, rest, .. } = self;
        let rest = ManuallyDrop::into_inner(rest);
        let mailbox = reactor.mailbox().clone();
        let closed = close_image(&mailbox, image);
        // Images never leave their thread: what comes next runs there too, models' threads live on.
        let done = closed.and_then(|()| {
            mailbox.ask(move |core: &mut ReactorCore| {
                let leaves = core.take_leaves();
                match core.remove_closed_image(image) {
                    Some((i, status)) => rest.finish(&i, status, leaves),
                    None => Err(Error::node("image", "was not there to be closed")),
                }
            })
        });
        // Portals that are still open get their answers now.
        reactor.stop();
        done.unwrap_or_else(|| Err(Error::node("reactor", "has ended")))
    }
}

/// How long a close waits for frontends that are still attached, in nanoseconds.
const FRONTENDS_NS: u64 = 2_000_000_000;

/// Waits for the frontends to go, for a while, and then for the image to be closed. `None` if the
/// reactor has ended.
fn close_image(mailbox: &Mailbox<ReactorCore>, image: usize) -> Option<()> {
    let look = |core: &mut ReactorCore| (core.frontend_count(), core.now());
    let (mut attached, began) = mailbox.ask(look)?;
    let mut now = began;
    while attached > 0 && now.saturating_sub(began) < FRONTENDS_NS {
        std::thread::sleep(Duration::from_millis(1));
        (attached, now) = mailbox.ask(look)?;
    }
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

/// Makes portals to a running image.
#[derive(Clone)]
pub struct Door {
    mailbox: Mailbox<ReactorCore>,
    image: usize,
    name: String,
}

impl Door {
    /// The image's name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image's index in its core.
    pub(crate) fn image(&self) -> usize {
        self.image
    }

    /// Runs `call` on the reactor; `None` if it has ended.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut ReactorCore) -> T + Send + 'static,
    ) -> Option<T> {
        self.mailbox.ask(call)
    }

    /// A portal for `depth` requests in flight over `regions`.
    ///
    /// # Errors
    /// If a device cannot reach the memory, descriptors are short, or the reactor has ended.
    pub fn open(&self, depth: u16, regions: Vec<Arc<Region>>) -> Result<Portal, Error> {
        let fail = |why: String| Error::node(&self.name, why);
        let gone = || fail("the reactor has ended".to_owned());
        let wake = self.mailbox.ask(|core| core.wake()).ok_or_else(gone)?;
        let (portal, end) = Portal::new(depth, regions, wake).map_err(|e| fail(e.to_string()))?;
        let image = self.image;
        let added = self.mailbox.ask(move |core: &mut ReactorCore| {
            core.add_frontend(image, |owner, _| Ok(Frontend::Portal(Box::new(end(owner)))))
        });
        added.ok_or_else(gone)?.map_err(fail)?;
        Ok(portal)
    }
}
