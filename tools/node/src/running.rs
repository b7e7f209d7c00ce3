//! The chain of a running image as control code knows it ([`RunningChain`]), and how a [`Disk`] is
//! paused and goes on with another.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block::{Flags, LeafAccess, Op, Port, Status};
use file::ImageLock;
use qcow::open::{BackingRef, ChainOptions, FileId, Format, Opened};
use qcow::run::{Space, Stack};
use reactor::PortalRequest;

use crate::chain::Chain;
use crate::device::Device;
use crate::groups::Lease;
use crate::source::{Kind, Source, blocking};
use crate::{Disk, Error, HostStorage, Image, Leaf, ReactorCore};

/// Between two looks at whether a pause is reached.
const LOOK: Duration = Duration::from_micros(20);

/// How long a pause is waited for, in nanoseconds: longer than a device may take for a command, and
/// a file for a flush behind much that others write.
const PAUSE_NS: u64 = 180_000_000_000;

/// How long requests that wait for space may keep a pause from being reached, in nanoseconds. Whoever
/// pauses the image may have what is needed to make its volume larger.
const SPACE_NS: u64 = 2_000_000_000;

/// Of somebody who waits for a running image to come to rest.
struct Patience<'d> {
    disk: &'d Disk,
    space: Arc<Space>,
    began: u64,
    /// When no request waited for space.
    room: u64,
}

impl Patience<'_> {
    fn new(disk: &Disk) -> Result<Patience<'_>, Error> {
        let space = disk.on_image(|i, _| i.space())?;
        let now = disk.clock.now();
        Ok(Patience { disk, space, began: now, room: now })
    }

    /// Waits for a moment.
    ///
    /// # Errors
    /// If that was done for too long.
    fn wait(&mut self) -> Result<(), Error> {
        let now = self.disk.clock.now();
        if self.space.waiting() == 0 {
            self.room = now;
        }
        let name = self.disk.rest.name();
        if now.saturating_sub(self.room) > SPACE_NS {
            return Err(Error::node(name, "requests wait for space in its volume: try again"));
        }
        if now.saturating_sub(self.began) > PAUSE_NS {
            return Err(Error::node(name, "requests in flight do not end"));
        }
        std::thread::sleep(LOOK);
        Ok(())
    }
}

/// The files of the chain of a running image, the one that is written to first.
#[derive(Default)]
pub(crate) struct RunningChain {
    pub(crate) layers: Vec<RunningLayer>,
    /// Format of backing files whose image states none.
    backing_format: Option<Format>,
    /// Files of each layer, as long as their locks are not with it.
    files: Vec<usize>,
}

/// One of them.
pub(crate) struct RunningLayer {
    /// Where it lies, on every reactor.
    pub(crate) port: Port,
    /// No other layer has that leaf queue.
    pub(crate) alone: bool,
    /// What it lies in.
    pub(crate) lies: Lies,
    pub(crate) name: String,
    pub(crate) path: Option<PathBuf>,
    pub(crate) format: Format,
    pub(crate) id: Option<FileId>,
    /// The layer below it, as it names that.
    pub(crate) backing: Option<BackingRef>,
    pub(crate) locks: Vec<ImageLock>,
}

/// What a layer lies in.
pub(crate) enum Lies {
    /// A file, as it is served.
    File(File),
    /// A namespace of one of the image's devices.
    Device(usize),
    /// Something that only the reactors reach.
    Elsewhere,
}

impl Lies {
    /// Which of the image's devices it lies on, if it does.
    pub(crate) fn device(&self) -> Option<usize> {
        match self {
            Lies::Device(n) => Some(*n),
            Lies::File(_) | Lies::Elsewhere => None,
        }
    }
}

impl RunningChain {
    /// Of an opened chain whose layers will lie at `ports`.
    pub(crate) fn new(chain: &Chain, ports: &[Port]) -> Result<RunningChain, Error> {
        let mut all = RunningChain::default();
        let mut devices = 0;
        let mut ports = ports.iter().copied();
        for layer in &chain.layers {
            let Some(port) = ports.next() else { break };
            let data = layer.data.as_ref().and_then(|_| ports.next()).is_some();
            let lies = match &layer.storage.kind {
                _ if data => Lies::Elsewhere,
                Kind::Host(host) => {
                    let file = host.file().try_clone();
                    Lies::File(file.map_err(|e| Error::node(&layer.name, e))?)
                }
                Kind::Leaf(_, below) => {
                    devices += below.len();
                    if below.len() == 1 { Lies::Device(devices - 1) } else { Lies::Elsewhere }
                }
                Kind::Volume(..) => {
                    devices += 1;
                    Lies::Device(devices - 1)
                }
            };
            all.layers.push(RunningLayer {
                port,
                alone: false,
                lies,
                name: layer.name.clone(),
                path: layer.path.clone(),
                format: layer.format(),
                id: layer.storage.id,
                backing: layer.backing.clone(),
                locks: Vec::new(),
            });
            all.files.push(1 + usize::from(data));
            let states_none = layer.image().is_some_and(|i| i.header.backing_format().is_none());
            if let Some(below) = layer.backing.as_ref().filter(|_| states_none) {
                all.backing_format = Some(below.format);
            }
        }
        Ok(all)
    }

    /// Format of backing files whose image states none, if it was said.
    pub(crate) fn backing_format(&self) -> Option<Format> {
        self.backing_format
    }

    /// Takes over the locks of each layer.
    pub(crate) fn take_locks(&mut self, locks: &mut Vec<Vec<ImageLock>>) {
        let mut locks = locks.drain(..);
        for (layer, files) in self.layers.iter_mut().zip(self.files.drain(..)) {
            layer.locks = locks.by_ref().take(files).flatten().collect();
        }
    }

    /// Opens the files of these layers once more. The bytes of the `edit`th of them can be written,
    /// those of the first if that is not said.
    pub(crate) fn open(
        &self,
        devices: &[Device],
        which: &[usize],
        edit: Option<usize>,
    ) -> Result<Vec<Source>, Error> {
        let open =
            |(n, &at): (usize, &usize)| self.layers[at].reopen(devices, n == edit.unwrap_or(0));
        which.iter().enumerate().map(open).collect()
    }

    /// Reads the chain of these layers out of their files. Without `edit` the first image is opened
    /// for writing.
    pub(crate) fn read(
        &self,
        files: Vec<Source>,
        which: &[usize],
        edit: Option<usize>,
    ) -> Result<Chain, Error> {
        let mut opened = files.into_iter().zip(which).map(|(storage, &at)| {
            let layer = &self.layers[at];
            let (path, name, id) = (layer.path.clone(), layer.name.clone(), layer.id);
            Opened { storage, path, name, id }
        });
        let name = &self.layers[which[0]].name;
        let first = opened.next().ok_or_else(|| Error::node(name, "has no layers"))?;
        let options = ChainOptions {
            format: Some(self.layers[which[0]].format),
            writable: edit.is_none(),
            backing_format: self.backing_format,
            top_only: false,
        };
        let chain = Chain::open(first, options, &mut |backing| {
            let why = "names a layer that is not served";
            opened.next().ok_or_else(|| qcow::Error::refused(&backing.named_by, why))
        })?;
        if chain.layers.len() != which.len() {
            return Err(Error::node(
                &self.layers[which[0]].name,
                "somebody else has cut its chain",
            ));
        }
        Ok(chain)
    }
}

impl RunningLayer {
    /// The layer's bytes once more, without a lock: a file through the page cache, a namespace by a
    /// queue of its own.
    pub(crate) fn reopen(&self, devices: &[Device], writable: bool) -> Result<Source, Error> {
        let fail = |why: String| Error::node(&self.name, why);
        let file = match &self.lies {
            Lies::File(file) => file,
            Lies::Device(n) if writable && devices[*n].is_for_reading() => {
                return Err(fail("was opened for reading only".into()));
            }
            Lies::Device(n) => {
                if let Device::Volume(lease) = &devices[*n] {
                    let kind = Kind::Volume(Box::new(lease.again(writable)?), None);
                    return Ok(Source { kind, locks: Vec::new(), id: self.id });
                }
                let storage = blocking(devices[*n].another_queue()?, self.port.unit, &self.name)?;
                let kind = Kind::Leaf(storage, Vec::new());
                return Ok(Source { kind, locks: Vec::new(), id: self.id });
            }
            Lies::Elsewhere => return Err(fail("cannot be changed while it runs".into())),
        };
        // The file itself, wherever its name may lead by now.
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let host = HostStorage::open(Path::new(&again), writable);
        let host = host.map_err(|e| fail(format!("cannot be opened again: {e}")))?;
        Ok(Source { kind: Kind::Host(host), locks: Vec::new(), id: self.id })
    }
}

impl Disk {
    pub(crate) fn layers(&self) -> &[RunningLayer] {
        &self.rest.chain.layers
    }

    /// See [`RunningChain::open`].
    pub(crate) fn open(&self, which: &[usize]) -> Result<Vec<Source>, Error> {
        self.rest.chain.open(&self.rest.devices, which, None)
    }

    /// Reads the chain of these layers once more: see [`RunningChain`].
    pub(crate) fn read(&self, which: &[usize], edit: usize) -> Result<Chain, Error> {
        let chain = &self.rest.chain;
        chain.read(chain.open(&self.rest.devices, which, Some(edit))?, which, Some(edit))
    }

    /// Does something to the image on its home reactor.
    pub(crate) fn on_image<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut qcow::run::Image, &mut [Leaf]) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let image = self.home.image;
        let done = self.home_mailbox().ask(move |core: &mut ReactorCore| {
            core.with_image(image, |i, leaves| match i {
                Image::Qcow(i) => Some(f(i, leaves)),
                _ => None,
            })
            .flatten()
        });
        let done = done.ok_or_else(|| Error::node(self.rest.name(), "its reactor has ended"))?;
        done.ok_or_else(|| Error::node(self.rest.name(), "only qcow2 images can be changed"))
    }

    /// Runs `f` while the image rests and its file is complete, and has it go on afterwards.
    pub(crate) fn paused<T>(
        &mut self,
        f: impl FnOnce(&mut Disk) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let done = self.pause().and_then(|()| f(self));
        self.on_image(|i, _| i.resume())?;
        done
    }

    fn pause(&self) -> Result<(), Error> {
        // What can be written before everybody waits for it is written before. How it ends shows
        // again below.
        let flush = PortalRequest {
            id: 0,
            op: Op::Flush,
            flags: Flags::NONE,
            offset: 0,
            len: 0,
            seg: None,
        };
        let mut portal = self.portal(1, Vec::new())?;
        let mut patience = Patience::new(self)?;
        if portal.send(flush).is_ok() {
            while portal.receive().is_none() {
                patience.wait()?;
            }
        }
        self.on_image(|i, _| i.pause())?;
        let mut patience = Patience::new(self)?;
        loop {
            match self.on_image(|i, _| i.paused())? {
                Some(Status::Ok) => return self.cut_top(),
                Some(status) => {
                    let why = format!("its metadata cannot be written: {status}");
                    return Err(Error::node(self.rest.name(), why));
                }
                None => patience.wait()?,
            }
        }
    }

    /// Cuts the file that is written to where the image ends: it may have been allocated ahead.
    fn cut_top(&self) -> Result<(), Error> {
        let port = self.rest.top;
        let cut = self.on_image(move |i, leaves| {
            let leaf = leaves.get_mut(usize::from(port.leaf))?;
            let end = i.end();
            (end < leaf.unit_len(port.unit)).then(|| leaf.set_unit_len(port.unit, end))
        })?;
        match cut {
            Some(Err(status)) => Err(Error::node(
                self.rest.name(),
                format!("the file cannot be cut at the image's end: {status}"),
            )),
            _ => Ok(()),
        }
    }

    /// Has all reactors serve the chain of these layers, read from these files. While paused.
    pub(crate) fn restack(
        &mut self,
        files: Vec<Source>,
        which: &[usize],
        keep: bool,
    ) -> Result<(), Error> {
        let mut chain = self.rest.chain.read(files, which, None)?;
        let stack = Stack::new(&mut chain, &self.ports(which))?;
        self.go_on_with(which, move |i, leaves| i.restack(stack, leaves, keep))
    }

    pub(crate) fn ports(&self, which: &[usize]) -> Vec<Port> {
        which.iter().map(|&n| self.layers()[n].port).collect()
    }

    /// Has `f` give the image another stack, of these layers, and all reactors follow. While paused.
    pub(crate) fn go_on_with(
        &mut self,
        which: &[usize],
        f: impl FnOnce(&mut qcow::run::Image, &mut [Leaf]) -> Result<(), String> + Send + 'static,
    ) -> Result<(), Error> {
        let name = self.rest.name().to_owned();
        let ports = self.ports(which);
        let top = ports[0];
        let volume = self.volume.clone();
        let mut volume = volume.lock();
        let news = self.on_image(move |i, leaves| {
            f(i, leaves)?;
            if let Some(Leaf::File(queue)) = leaves.get_mut(usize::from(top.leaf)) {
                queue.with_leaf(|q| q.allocate_ahead(top.unit))?;
            }
            Ok::<_, String>((i.reseat(), block::Layer::<Leaf>::info(i).clone()))
        })?;
        let (news, info) = news.map_err(|e| Error::node(&name, e))?;
        for running in &self.further {
            let (news, ports, image) = (news.clone(), ports.clone(), running.image);
            let told = self.mailbox(running).ask(move |core: &mut ReactorCore| {
                core.with_image(image, |i, leaves| match i {
                    Image::Satellite(s) => s.reseat(&news, &ports, leaves),
                    _ => Ok(()),
                })
            });
            // It sends everything home then, which is right, but slow.
            if let Some(Some(Err(e))) = told {
                log::warn!("{name}: a reactor is slow from now on: {e}");
            }
        }
        *volume = self.top_volume(which[0]);
        self.rest.top = top;
        self.info = info;
        Ok(())
    }

    /// Adds a queue to a device to all reactors; returns its index.
    pub(crate) fn add_leaf(&mut self, leaf: Leaf) -> Result<u16, Error> {
        let name = self.rest.name().to_owned();
        let fail = |e: String| Error::node(&name, e);
        let mut all = Vec::new();
        for _ in &self.further {
            all.push(leaf.another(&mut std::iter::empty()).map_err(fail)?);
        }
        all.push(leaf);
        let index = match self.rest.spare.pop() {
            Some(spare) => spare,
            None => {
                let places = self.all_reactors().places(1)?;
                let index = places.list[0];
                self.rest.places.append(places);
                index
            }
        };
        for (running, leaf) in self.further.iter().chain([&self.home]).zip(all) {
            let (image, places) = (running.image, self.rest.stands_on());
            let added = self.mailbox(running).ask(move |core: &mut ReactorCore| {
                core.put_leaf(index, leaf, Leaf::vacant)?;
                core.stand_on(image, &places)
            });
            if let Err(e) = added.ok_or_else(|| "a reactor has ended".into()).and_then(|a| a) {
                // What stands there already is replaced by the next one.
                self.rest.spare.push(index);
                return Err(fail(e));
            }
        }
        let taken = self.on_image(move |i, leaves| i.take_leaf(index, leaves))?;
        if taken.is_err() {
            self.rest.spare.push(index);
        }
        taken.map_err(fail).map(|()| index)
    }

    /// Lets go of files that the chain does not contain any more, and of their queues, if those were
    /// theirs alone.
    pub(crate) fn forget(&mut self, gone: Vec<RunningLayer>) {
        for layer in gone {
            if let Some(device) = layer.lies.device()
                && matches!(self.rest.devices[device], Device::Volume(_))
            {
                self.close_device(device);
                continue;
            }
            let port = layer.port;
            for running in self.further.iter().chain([&self.home]) {
                self.mailbox(running).post(move |core: &mut ReactorCore| {
                    if let Some(Leaf::File(queue)) = core.leaves().get_mut(usize::from(port.leaf))
                        && let Err(e) = queue.with_leaf(|q| q.close_unit(port.unit))
                    {
                        log::warn!("a file stays open: {e}");
                    }
                });
            }
            if layer.alone {
                self.rest.spare.push(port.leaf);
            }
        }
    }

    /// Ends the use of a volume in which no layer lies any more.
    fn close_device(&mut self, at: usize) {
        let gone = self.rest.devices.remove(at);
        for layer in &mut self.rest.chain.layers {
            if let Lies::Device(n) = &mut layer.lies
                && *n > at
            {
                *n -= 1;
            }
        }
        if let Err(e) = gone.close() {
            log::error!("{e}");
        }
    }

    /// Takes a volume in, for all reactors; returns which of the devices it is, and where it lies. After
    /// an error its use has ended.
    pub(crate) fn add_volume(&mut self, mut lease: Box<Lease>) -> Result<(usize, Port), Error> {
        let port = lease.join(self.all_reactors())?;
        for running in self.running() {
            lease.appear_on(running.reactor)?;
        }
        if !self.rest.shared.contains(&port.leaf) {
            // A queue that the image has not used yet.
            self.rest.shared.push(port.leaf);
            let leaves = self.rest.stands_on();
            let name = self.rest.name().to_owned();
            for running in self.running() {
                let (image, leaves) = (running.image, leaves.clone());
                let stands = move |core: &mut ReactorCore| core.stand_on(image, &leaves);
                let stands = self.mailbox(running).ask(stands);
                stands
                    .unwrap_or_else(|| Err("a reactor has ended".to_owned()))
                    .map_err(|e| Error::node(&name, e))?;
            }
            let taken = self.on_image(move |i, leaves| i.take_leaf(port.leaf, leaves))?;
            taken.map_err(|e| Error::node(self.rest.name(), e))?;
        }
        self.rest.devices.push(Device::Volume(lease));
        Ok((self.rest.devices.len() - 1, port))
    }
}
