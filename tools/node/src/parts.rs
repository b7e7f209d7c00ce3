//! [`Parts`]: an opened image taken apart, for one reactor or several, and [`Rest`], what is left of
//! that while it runs.

use std::fs::File;
use std::sync::Arc;

use block::{LeafAccess, Port, RawImage, Status};
use file::ImageLock;
use qcow::open::LayerKind;
use qcow::run::{Seat, Stack, Wakes, Workers};
use reactor::Wake;

use crate::chain::file_leaf;
use crate::device::Device;
use crate::reactors::{Places, take_leaves};
use crate::running::RunningChain;
use crate::source::{Kind, Source};
use crate::{Chain, Error, Image, Leaf, Model, ReactorCore, Reactors, VhdChain};

/// Threads that decompress for an image.
const WORKERS: usize = 2;

/// Reactors that serve an image together, at most.
pub const MOST_REACTORS: usize = 16;

/// An opened image taken apart: what a reactor needs to serve it. Can be sent to its thread.
pub struct Parts {
    // On an error dropped in this order: devices wait for their queue pairs, locks come last.
    further: Vec<Further>,
    /// In the order of `places`.
    leaves: Vec<Leaf>,
    places: Places,
    /// Leaf queues that others have, too, in which it has units.
    shared: Vec<u16>,
    plan: Plan,
    /// Where the layers lie, the one that is written to first.
    ports: Vec<Port>,
    /// The files of a QCOW2 chain, in this order.
    chain: RunningChain,
    writable: bool,
    devices: Vec<Device>,
    /// By layer.
    locks: Vec<Vec<ImageLock>>,
    name: String,
}

enum Plan {
    /// Its metadata belongs to one reactor.
    Qcow(Box<Stack>),
    Each(Each),
}

/// An image of which every reactor has one of its own, since there is nothing to agree on.
#[derive(Clone)]
enum Each {
    Raw { size: u64 },
    Vhd(Box<vhd::run::Stack>),
}

impl Each {
    fn attach(self, leaves: &mut [Leaf], top: Port, owner: u16) -> Result<Image, String> {
        Ok(match self {
            Each::Raw { size } => {
                let image = RawImage::new(leaves, top, size, owner);
                Image::Raw(Box::new(image.ok_or("the leaf queue has no such unit")?))
            }
            Each::Vhd(stack) => {
                Image::Vhd(Box::new(vhd::run::Image::attach(*stack, owner, leaves)?))
            }
        })
    }
}

impl Parts {
    /// Takes an opened image apart, for reactors that serve nothing else.
    ///
    /// # Errors
    /// If its metadata contradicts itself, or a leaf cannot be made.
    pub fn new(chain: Chain) -> Result<Parts, Error> {
        Parts::at(chain, |count| Ok(Places::alone(count)))
    }

    /// The same for these reactors, which may serve others.
    ///
    /// # Errors
    /// As [`Parts::new`], or if they serve too many.
    pub fn on(mut chain: Chain, reactors: &Arc<Reactors>) -> Result<Parts, Error> {
        for layer in &mut chain.layers {
            if let Kind::Volume(_, Some(lease)) = &mut layer.storage.kind {
                lease.join(reactors)?;
            }
        }
        Parts::at(chain, |count| reactors.places(count))
    }

    fn at(
        mut chain: Chain,
        places: impl FnOnce(usize) -> Result<Places, Error>,
    ) -> Result<Parts, Error> {
        let name = chain.layers[0].name.clone();
        let storages = chain.layers.iter().flat_map(qcow::open::Layer::storages);
        let places = places(leaf_count(storages.clone()))?;
        let ports = ports(storages, places.first());
        let running = RunningChain::new(&chain, &ports)?;
        let (plan, writable) = match &chain.layers[0].kind {
            LayerKind::Raw(size) => (
                Plan::Each(Each::Raw { size: *size }),
                !block::Storage::read_only(&chain.layers[0].storage),
            ),
            LayerKind::Qcow2(image) => {
                let writable = image.mode == qcow::Mode::Write;
                (Plan::Qcow(Box::new(Stack::new(&mut chain, &ports)?)), writable)
            }
        };
        let storages = chain.layers.into_iter().flat_map(qcow::open::Layer::into_storages);
        let mut parts = Parts::of(storages, plan, places, ports, writable, name)?;
        parts.chain = running;
        parts.chain.take_locks(&mut parts.locks);
        Ok(parts)
    }

    /// Takes an opened VHD chain apart.
    ///
    /// # Errors
    /// If a leaf cannot be made.
    pub fn of_vhd(chain: VhdChain) -> Result<Parts, Error> {
        let name = chain.layers[0].name.clone();
        let storages = chain.layers.iter().map(|l| &l.storage);
        let places = Places::alone(leaf_count(storages.clone()));
        let ports = ports(storages, places.first());
        let plan = Each::Vhd(Box::new(vhd::run::Stack::new(&chain, &ports)));
        let storages = chain.layers.into_iter().map(|l| l.storage);
        Parts::of(storages, Plan::Each(plan), places, ports, false, name)
    }

    fn of(
        storages: impl Iterator<Item = Source>,
        plan: Plan,
        places: Places,
        ports: Vec<Port>,
        writable: bool,
        name: String,
    ) -> Result<Parts, Error> {
        let top = ports[0];
        // On an error dropped in reverse: devices wait for their queue pairs, locks come last.
        let (mut locks, mut devices, mut leaves) = (Vec::new(), Vec::new(), Vec::new());
        let mut files: Vec<File> = Vec::new();
        let mut shared: Vec<u16> = Vec::new();
        for storage in storages {
            locks.push(storage.locks);
            match storage.kind {
                Kind::Volume(_, None) => {
                    return Err(Error::node(&name, "a volume without its use"));
                }
                Kind::Volume(_, Some(lease)) => {
                    match lease.port() {
                        Some(port) if shared.contains(&port.leaf) => {}
                        Some(port) => shared.push(port.leaf),
                        None => leaves.push(lease.another_queue()?),
                    }
                    devices.push(Device::Volume(lease));
                }
                Kind::Host(h) => files.push(h.into_file()),
                Kind::Leaf(b, below) => {
                    leaves.push(b.into_leaf());
                    devices.extend(below);
                }
            }
        }
        if !files.is_empty() {
            let mut leaf = file_leaf(files).map_err(|e| Error::node(&name, e))?;
            if let (Leaf::File(queue), Plan::Qcow(_), true) =
                (&mut leaf, &plan, top.leaf == places.first())
            {
                // It grows, and is cut where the image ends.
                let ahead = queue.with_leaf(|q| q.allocate_ahead(top.unit));
                ahead.map_err(|e| Error::node(&name, e))?;
            }
            leaves.insert(0, leaf);
        }
        let (further, chain) = (Vec::new(), RunningChain::default());
        Ok(Parts {
            further,
            leaves,
            places,
            shared,
            plan,
            ports,
            chain,
            writable,
            devices,
            locks,
            name,
        })
    }

    /// The name of the image, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Takes the places that these parts were made for on reactors that serve nothing yet.
    pub(crate) fn move_to(mut self, reactors: &Arc<Reactors>) -> Result<Parts, Error> {
        self.places = reactors.places(self.places.list.len())?;
        Ok(self)
    }

    /// Takes out what is below the queues, to be put into [`Rest::put_below`] when they run: what of
    /// it ends waits for others, which a reactor must not.
    pub(crate) fn take_below(&mut self) -> Vec<Device> {
        std::mem::take(&mut self.devices)
    }

    /// Has one of the reactors reach what it shares with others.
    ///
    /// # Errors
    /// If there is no queue left, or the reactor has ended.
    pub(crate) fn appear_on(&self, number: usize) -> Result<(), Error> {
        self.devices.iter().try_for_each(|device| device.appear_on(number))
    }

    /// Whether they were made for these reactors.
    pub(crate) fn are_for(&self, reactors: &Arc<Reactors>) -> bool {
        self.places.are_on(reactors)
    }

    /// Makes queues to the same devices for `count` more reactors: see [`Rest::further`].
    ///
    /// # Errors
    /// If a device, the kernel or memory has no more, or so many reactors are too many.
    pub fn reserve(&mut self, count: usize) -> Result<(), Error> {
        if self.further.len() + count >= MOST_REACTORS {
            let why = format!("at most {MOST_REACTORS} reactors can serve an image");
            return Err(Error::node(&self.name, why));
        }
        for _ in 0..count {
            let own = |d: &&Device| d.shared_port().is_none();
            let mut below = self.devices.iter().filter(own);
            let leaves = self.leaves.iter().map(|l| l.another(&mut below));
            let leaves =
                leaves.collect::<Result<_, _>>().map_err(|e| Error::node(&self.name, e))?;
            let own = match &self.plan {
                Plan::Each(each) => Some(each.clone()),
                Plan::Qcow(_) => None,
            };
            let (places, shared) = (self.places.list.clone(), self.shared.clone());
            let ports = self.ports.clone();
            self.further.push(Further { leaves, places, shared, ports, own });
        }
        Ok(())
    }

    /// The models among the nodes.
    pub fn models(&mut self) -> impl Iterator<Item = &mut Model> {
        self.devices.iter_mut().filter_map(Device::as_model)
    }

    /// The queue to the top layer's device, the unit in it, and what is needed to end: for
    /// measurements of a device, without an image.
    pub fn into_leaf(mut self) -> (Leaf, u16, Rest) {
        let top = self.ports[0];
        let leaf = self.leaves.swap_remove(usize::from(top.leaf));
        let Parts { further, places, shared, chain, writable, devices, locks, name, .. } = self;
        let spare = Vec::new();
        let rest =
            Rest { further, top, places, shared, chain, spare, writable, devices, locks, name };
        (leaf, top.unit, rest)
    }

    /// Puts leaves and image into a core; returns the image's index and what is needed to close.
    /// To be called on the reactor's thread, on a core without leaves if they are for one.
    ///
    /// # Errors
    /// If memory is short or a device cannot reach it.
    pub fn attach(
        self,
        core: &mut ReactorCore,
        options: qcow::run::Options,
    ) -> Result<(usize, Rest), String> {
        // On an error dropped in reverse.
        let Parts {
            name,
            locks,
            devices,
            writable,
            chain,
            ports,
            plan,
            shared,
            places,
            leaves,
            further,
        } = self;
        let top = ports[0];
        match attach_image(core, leaves, (&places.list, &shared), plan, top, options) {
            Ok(index) => {
                let spare = Vec::new();
                let rest = Rest {
                    further,
                    top,
                    places,
                    shared,
                    chain,
                    spare,
                    writable,
                    devices,
                    locks,
                    name,
                };
                Ok((index, rest))
            }
            Err(e) => {
                drop(further);
                // Before the devices, whose controllers wait for their queue pairs, and the locks.
                drop(take_leaves(core, &places.list));
                Err(e)
            }
        }
    }
}

/// How many leaf queues layers need.
fn leaf_count<'s>(storages: impl Iterator<Item = &'s Source> + Clone) -> usize {
    let storages = storages.filter(|s| shared_port(s).is_none());
    let hosts = storages.clone().filter(|s| matches!(s.kind, Kind::Host(_))).count();
    storages.count() - hosts + hosts.min(1)
}

/// Where a volume lies whose group has a queue on reactors that others share.
fn shared_port(storage: &Source) -> Option<Port> {
    match &storage.kind {
        Kind::Volume(_, lease) => lease.as_ref()?.port(),
        Kind::Host(_) | Kind::Leaf(..) => None,
    }
}

/// Where each layer will lie, its leaf queues counted from `first` on: all files are units of the
/// first one, if there are any.
fn ports<'s>(storages: impl Iterator<Item = &'s Source> + Clone, first: u16) -> Vec<Port> {
    let hosts = storages.clone().filter(|s| matches!(s.kind, Kind::Host(_)));
    let (mut files, mut others) = (0, first + u16::from(hosts.count() > 0));
    storages
        .map(|s| match &s.kind {
            Kind::Host(_) => {
                files += 1;
                Port { leaf: first, unit: files - 1 }
            }
            Kind::Leaf(storage, _) => {
                others += 1;
                Port { leaf: others - 1, unit: storage.unit() }
            }
            Kind::Volume(..) => shared_port(s).unwrap_or_else(|| {
                others += 1;
                Port { leaf: others - 1, unit: 0 }
            }),
        })
        .collect()
}

fn attach_image(
    core: &mut ReactorCore,
    leaves: Vec<Leaf>,
    (places, shared): (&[u16], &[u16]),
    plan: Plan,
    top: Port,
    options: qcow::run::Options,
) -> Result<usize, String> {
    put_leaves(core, leaves, places)?;
    let wake = core.wake();
    let index = core.add_image(|owner, leaves| match plan {
        Plan::Qcow(stack) => {
            let mut image = qcow::run::Image::attach(*stack, owner, leaves, options)?;
            image.use_workers(Workers::new(WORKERS), wake);
            Ok::<_, String>(Image::Qcow(Box::new(image)))
        }
        Plan::Each(each) => each.attach(leaves, top, owner),
    })?;
    core.stand_on(index, &[places, shared].concat()).map(|()| index)
}

fn put_leaves(core: &mut ReactorCore, leaves: Vec<Leaf>, places: &[u16]) -> Result<(), String> {
    for (leaf, &at) in leaves.into_iter().zip(places) {
        core.put_leaf(at, leaf, Leaf::vacant)?;
    }
    Ok(())
}

/// What one more reactor needs to serve an image. Can be sent to its thread.
pub struct Further {
    leaves: Vec<Leaf>,
    places: Vec<u16>,
    shared: Vec<u16>,
    ports: Vec<Port>,
    /// `None` for a satellite of the home reactor's.
    own: Option<Each>,
}

impl Further {
    /// Puts leaves and image into a core; returns the image's index. `seat` asks the home reactor
    /// for [`take_seat`], given what wakes this one. To be called on the reactor's thread. After an
    /// error nothing is left in the core.
    ///
    /// # Errors
    /// If memory is short, a device cannot reach it, or the home reactor has ended.
    pub fn attach(
        self,
        core: &mut ReactorCore,
        seat: impl FnOnce(Wake) -> Option<Seat>,
    ) -> Result<usize, String> {
        let Further { leaves, places, shared, ports, own } = self;
        let wake = core.wake();
        let attached = put_leaves(core, leaves, &places).and_then(|()| {
            let index = core.add_image(|owner, leaves| match own {
                Some(each) => each.attach(leaves, ports[0], owner),
                None => {
                    let seat = seat(wake).ok_or("the image's home reactor has ended")?;
                    let image = qcow::run::Satellite::attach(seat, &ports, leaves)?;
                    Ok(Image::Satellite(Box::new(image)))
                }
            })?;
            core.stand_on(index, &[&places[..], &shared].concat()).map(|()| index)
        });
        attached.inspect_err(|_| drop(take_leaves(core, &places)))
    }
}

/// A place for one more reactor, which `away` wakes, at the image of this index on its home reactor.
pub fn take_seat(home: &mut ReactorCore, image: usize, away: Wake) -> Option<Seat> {
    let wakes = Wakes { home: home.wake(), away };
    match home.image(image) {
        Some(Image::Qcow(i)) => Some(i.seat(wakes)),
        _ => None,
    }
}

/// What is left of [`Parts`] while the image runs: needed to close it.
pub struct Rest {
    // First, as its queue pairs go before their devices.
    further: Vec<Further>,
    pub(crate) top: Port,
    /// Its leaf queues, on every reactor.
    pub(crate) places: Places,
    /// Leaf queues that others have, too, in which it has units.
    pub(crate) shared: Vec<u16>,
    pub(crate) chain: RunningChain,
    /// Leaf queues, on every reactor, whose files were let go of.
    pub(crate) spare: Vec<u16>,
    writable: bool,
    pub(crate) devices: Vec<Device>,
    locks: Vec<Vec<ImageLock>>,
    name: String,
}

impl Rest {
    /// The name of the image, for messages.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// All leaf queues that it stands on.
    pub(crate) fn stands_on(&self) -> Vec<u16> {
        [&self.places.list[..], &self.shared].concat()
    }

    /// See [`Parts::take_below`].
    pub(crate) fn put_below(&mut self, devices: Vec<Device>) {
        self.devices = devices;
    }

    /// What was reserved for one more reactor; to be taken out of its core before the end.
    pub fn further(&mut self) -> Option<Further> {
        self.further.pop()
    }

    /// The models among the nodes.
    pub fn models(&mut self) -> impl Iterator<Item = &mut Model> {
        self.devices.iter_mut().filter_map(Device::as_model)
    }

    /// Takes a closed image out of its home reactor's core and ends everything below it: see
    /// [`Rest::leave`] and [`Rest::end`].
    ///
    /// # Errors
    /// If the image's own close failed, or a device does not shut down.
    pub fn finish(self, core: &mut ReactorCore, image: usize) -> Result<(), Error> {
        let left = self.leave(core, image);
        self.end(left)
    }

    /// Takes a closed image out of its home reactor's core, and its queues, and cuts its file where the
    /// image ends. Returns where that is, and how the image's close ended.
    pub(crate) fn leave(&self, core: &mut ReactorCore, image: usize) -> Left {
        let Some((image, status)) = core.remove_closed_image(image) else {
            let leaves = Vec::new();
            return Left { leaves, cut: None, status: Status::Gone };
        };
        let mut leaves = take_leaves(core, &self.places.list);
        let top = self.places.list.iter().position(|&at| at == self.top.leaf);
        let top = top.and_then(|at| leaves.get_mut(at));
        let striped = matches!(top, Some(Leaf::Stripe(_)));
        let cut = match &image {
            // The members of a stripe are not the image's own files, and keep their length.
            Image::Qcow(i) if self.writable && status.is_ok() && !striped => Some(i.end()),
            _ => None,
        };
        if let Some(end) = cut
            && let Some(leaf) = top
            && end < leaf.unit_len(self.top.unit)
            && let Err(s) = leaf.set_unit_len(self.top.unit, end)
        {
            log::warn!("{}: cannot cut the file at the image's end: {s}", self.name);
        }
        Left { leaves, cut, status }
    }

    /// Ends everything below a leaf that was dropped, see [`Parts::into_leaf`].
    ///
    /// # Errors
    /// If a device does not shut down.
    pub fn finish_leaf(self) -> Result<(), Error> {
        self.end(Left { leaves: Vec::new(), cut: None, status: Status::Ok })
    }

    /// Shuts controllers down and gives locks back. The file of a model that holds the image is cut
    /// where that ends.
    ///
    /// # Errors
    /// If the image's own close failed, or a device does not shut down.
    pub(crate) fn end(self, left: Left) -> Result<(), Error> {
        let Left { leaves, cut, status } = left;
        drop((leaves, self.further));
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
        drop((self.chain, self.locks));
        match status {
            Status::Ok => Ok(()),
            s => Err(Error::node(self.name, format!("closing the image: {s}"))),
        }
    }
}

/// What a closed image leaves behind.
pub(crate) struct Left {
    /// Its queues; their devices wait for them.
    leaves: Vec<Leaf>,
    /// Where it ends in its file.
    cut: Option<u64>,
    status: Status,
}
