//! Volumes of LVM2 groups as nodes: the groups that this process has open, each with its devices,
//! which all of its volumes share.
//!
//! A group is open in one process at a time if that one writes to any of its volumes, in any number
//! if all only read: its files are locked whole, as images are, and other devices are a process's own
//! anyway. Within the process a volume is in use once if that use writes.
//!
//! Control path; under one lock, as opening and closing wait for devices.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use block::{Blocking, LeafAccess, SplitQueue, Storage, StorageError};
use file::ImageLock;
use qcow::open::{FileId, Format};
use reactor::sync::Mutex;
use volume::{Author, Group, HostIds, Id, Map, Vg};

use crate::chain::{file_leaf, lock};
use crate::device::Device;
use crate::kernel::active_volume;
use crate::running::Lies;
use crate::source::{Kind, Source, blocking};
use crate::{
    Disk, Error, HostStorage, Image, Leaf, NodeSpec, OpenOptions, ReactorCore, VolumeSpec,
    open_source,
};

static GROUPS: Mutex<Groups> = Mutex::new(Groups { open: Vec::new(), next: 0 });

/// The groups that are open.
struct Groups {
    open: Vec<Shared>,
    /// Number of the next one.
    next: u64,
}

/// The devices of an open group, in the order in which they were named.
struct Shared {
    number: u64,
    /// Which devices they are, in order; `None` for those that were opened without locks, which
    /// nobody shares.
    key: Option<Vec<Which>>,
    writable: bool,
    // Dropped in this order: locks come last.
    devices: Vec<Below>,
    locks: Vec<ImageLock>,
    /// The volumes in use, and whether for writing.
    uses: Vec<(Id, bool)>,
}

/// Which device a node leads to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Which {
    /// A file or block device, by device and inode number; whether behind a model.
    File(u64, u64, bool),
    Named(String),
}

/// A device of a group.
struct Below {
    node: String,
    kind: Reach,
}

/// How a queue to a device is made.
enum Reach {
    File(File),
    /// By the unit of a queue.
    Device(Box<Device>, u16),
}

impl Below {
    /// A queue of its own to the device, and the unit in it.
    fn queue(&self) -> Result<(Leaf, u16), Error> {
        match &self.kind {
            Reach::File(file) => {
                let leaf = file.try_clone().map_err(|e| e.to_string());
                let leaf = leaf.and_then(|file| file_leaf(vec![file]));
                Ok((leaf.map_err(|e| Error::node(&self.node, e))?, 0))
            }
            Reach::Device(device, unit) => Ok((device.another_queue()?, *unit)),
        }
    }
}

/// A device as the group's metadata is read from it.
struct Member {
    storage: Box<Blocking<Leaf>>,
    /// Index among the group's devices.
    at: usize,
    read_only: bool,
}

impl Storage for Member {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn capacity(&self) -> u64 {
        // A file as a device has the length that it has.
        self.storage.len()
    }

    fn read_only(&self) -> bool {
        self.read_only || self.storage.read_only()
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.storage.read_at(offset, into)
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.storage.write_at(offset, from)
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.storage.write_zeroes_at(offset, len)
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        self.storage.flush()
    }

    fn set_len(&mut self, _: u64) -> Result<(), StorageError> {
        Ok(())
    }
}

/// The use of a volume; given back by [`Lease::close`] after its queues are gone.
pub(crate) struct Lease {
    /// Number of the group.
    group: u64,
    node: String,
    volume: Id,
    writable: bool,
    /// The group's devices in the order of its metadata.
    order: Vec<usize>,
    map: Map,
    /// The system ID by which the group is used.
    ours: Option<String>,
    open: bool,
}

/// Opens a volume.
///
/// # Errors
/// If a device cannot be had, or is in use; if the devices are not all those of the group of this
/// name, or it is another host's; if the volume is not there, or is in use.
pub(crate) fn open(spec: &VolumeSpec, options: &OpenOptions) -> Result<Source, Error> {
    let node = spec.to_string();
    let mut groups = GROUPS.lock();
    let groups = &mut *groups;
    let at = groups.take_up(spec, options)?;
    let shared = &mut groups.open[at];
    let opened = shared.volume(spec, options, &node).and_then(|(queue, lease)| {
        let storage = blocking(Leaf::Volume(Box::new(queue)), 0, &node)?;
        Ok((storage, lease))
    });
    match opened {
        Ok((storage, mut lease)) => {
            shared.uses.push((lease.volume, lease.writable));
            lease.open = true;
            let kind = Kind::Leaf(storage, vec![Device::Volume(lease)]);
            Ok(Source { kind, locks: Vec::new(), id: None })
        }
        Err(e) => {
            groups.tidy(at)?;
            Err(e)
        }
    }
}

impl Groups {
    /// Finds a group's devices among those that are open, or opens them. Returns where they are.
    fn take_up(&mut self, spec: &VolumeSpec, options: &OpenOptions) -> Result<usize, Error> {
        let shares = !options.force_share || options.writable;
        let key = shares.then(|| which(&spec.nodes));
        if let Some(at) = self.open.iter().position(|g| key.is_some() && g.key == key) {
            if options.writable && !self.open[at].writable {
                self.open[at].make_writable(options)?;
            }
            return Ok(at);
        }
        let number = self.next;
        self.next += 1;
        let (devices, locks, uses) = (Vec::new(), Vec::new(), Vec::new());
        let writable = options.writable;
        let mut shared = Shared { number, key, writable, devices, locks, uses };
        for node in &spec.nodes {
            shared.add(node, options)?;
        }
        self.open.push(shared);
        Ok(self.open.len() - 1)
    }

    /// Closes a group that nobody uses.
    fn tidy(&mut self, at: usize) -> Result<(), Error> {
        if !self.open[at].uses.is_empty() {
            return Ok(());
        }
        let Shared { devices, locks, .. } = self.open.swap_remove(at);
        let mut result = Ok(());
        for device in devices {
            if let Reach::Device(device, _) = device.kind {
                result = result.and(device.close().map(drop));
            }
        }
        drop(locks);
        result
    }

    fn find(&self, number: u64) -> Option<usize> {
        self.open.iter().position(|g| g.number == number)
    }
}

impl Shared {
    /// Opens a device.
    fn add(&mut self, spec: &NodeSpec, options: &OpenOptions) -> Result<(), Error> {
        let node = spec.to_string();
        let alone = matches!(spec, NodeSpec::Vfio(_) | NodeSpec::Remote(_));
        // Devices that are a process's own whatever it does with them can be written to: a volume may
        // be opened for that later.
        let writable = options.writable || alone;
        // Members are whole devices: their length does not depend on what is in them.
        let options = OpenOptions { format: Format::Raw, writable, ..options.clone() };
        let source = open_source(spec, &options)?;
        self.locks.extend(source.locks);
        let kind = match source.kind {
            Kind::Host(host) => Reach::File(host.into_file()),
            Kind::Leaf(storage, mut below) => {
                let unit = storage.unit();
                drop(storage);
                match (below.pop(), below.is_empty()) {
                    (Some(device), true) => Reach::Device(Box::new(device), unit),
                    _ => return Err(Error::node(node, "has no volume group, as it is empty")),
                }
            }
        };
        self.devices.push(Below { node, kind });
        Ok(())
    }

    /// Opens files again for writing, and locks them for that.
    fn make_writable(&mut self, options: &OpenOptions) -> Result<(), Error> {
        let mut files = Vec::new();
        for below in &self.devices {
            match &below.kind {
                Reach::File(file) => {
                    // The file itself, wherever its name may lead by now.
                    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                    let again = HostStorage::open(&path, true);
                    files.push(Some(again.map_err(|e| Error::node(&below.node, e))?));
                }
                Reach::Device(device, _) if matches!(**device, Device::Model(_)) => {
                    let why = "this process has opened the group for reading only";
                    return Err(Error::in_use(&below.node, why));
                }
                Reach::Device(..) => files.push(None),
            }
        }
        // A process cannot have both kinds of locks: for a moment it has none.
        self.locks.clear();
        let locked = self.lock_all(&mut files, options);
        if let Err(e) = locked {
            let mut old = Vec::new();
            for below in &self.devices {
                old.push(match &below.kind {
                    Reach::File(file) => {
                        let file = file.try_clone().and_then(|f| HostStorage::of(f, true));
                        file.ok()
                    }
                    Reach::Device(..) => None,
                });
            }
            let reading = OpenOptions { writable: false, ..options.clone() };
            if let Err(again) = self.lock_all(&mut old, &reading) {
                log::error!("{again}; the volumes that are read are without a lock");
            }
            return Err(e);
        }
        for (below, file) in self.devices.iter_mut().zip(files) {
            if let Some(file) = file {
                below.kind = Reach::File(file.into_file());
            }
        }
        self.writable = true;
        Ok(())
    }

    fn lock_all(
        &mut self,
        files: &mut [Option<HostStorage>],
        options: &OpenOptions,
    ) -> Result<(), Error> {
        let mut locks = Vec::new();
        for (below, file) in self.devices.iter().zip(files) {
            if let Some(file) = file {
                locks.extend(lock(&below.node, file, options)?);
            }
        }
        self.locks = locks;
        Ok(())
    }

    /// Queues of its own to all devices.
    fn members(&self, read_only: bool) -> Result<Vec<Member>, Error> {
        let member = |(at, below): (usize, &Below)| {
            let (leaf, unit) = below.queue()?;
            if leaf.unit_len(unit) == 0 {
                return Err(Error::node(&below.node, "is empty"));
            }
            Ok(Member { storage: blocking(leaf, unit, &below.node)?, at, read_only })
        };
        self.devices.iter().enumerate().map(member).collect()
    }

    /// Opens a volume of the group; its use is not noted yet.
    fn volume(
        &self,
        spec: &VolumeSpec,
        options: &OpenOptions,
        node: &str,
    ) -> Result<(SplitQueue<Leaf, Map>, Lease), Error> {
        let fail = |e: &dyn std::fmt::Display| Error::node(node, e);
        // What is in use has been opened already, and nobody else can have written to it since.
        let mut members = self.members(!options.writable)?;
        let ours = self.look(&mut members, spec, node)?;
        let group = Group::open(members, ours.as_deref()).map_err(|e| fail(&e))?;
        let lv = group.vg().lv(&spec.volume).map_err(|e| fail(&e))?;
        let (volume, visible) = (lv.id, lv.visible());
        let read_only = !lv.writable();
        if !visible {
            return Err(fail(&"is no volume of its own"));
        }
        if read_only && options.writable {
            return Err(fail(&"the volume may only be read, as the group's metadata says"));
        }
        let writable = options.writable;
        if self.uses.iter().any(|&(id, w)| id == volume && (w || writable)) {
            let why = "the volume is in use by this process already, and one of the two writes";
            return Err(Error::in_use(node, why));
        }
        // Whoever takes no locks does not ask who else is there.
        if self.key.is_some()
            && let Some(why) = active_volume(&spec.nodes, group.vg(), lv)
        {
            return Err(Error::in_use(node, why));
        }
        let map = group.map(&spec.volume).map_err(|e| fail(&e))?;
        if map.is_empty() {
            return Err(fail(&"the volume has no extents"));
        }
        // Each queue keeps its read-modify-writes of 4 KiB apart from its own writes only.
        if map.align() < 4096 {
            return Err(fail(
                &"the volume has extents that do not begin at multiples of 4096 bytes",
            ));
        }
        let members = group.into_devices();
        let order = members.iter().map(|m| m.at).collect();
        let leaves = members.into_iter().map(|m| {
            let unit = m.storage.unit();
            (m.storage.into_leaf(), unit)
        });
        let queue = SplitQueue::over(leaves.collect(), map.clone(), !writable);
        let queue = queue.map_err(|e| fail(&e))?;
        let (group, node) = (self.number, node.to_owned());
        Ok((queue, Lease { group, node, volume, writable, order, map, ours, open: false }))
    }

    /// Looks at what is on the devices before anything is written: they are those of the group that
    /// is meant. Returns the system ID by which it may be used.
    fn look(
        &self,
        members: &mut [Member],
        spec: &VolumeSpec,
        node: &str,
    ) -> Result<Option<String>, Error> {
        let mut seen: Vec<(Id, usize)> = Vec::new();
        let mut newest: Option<Vg> = None;
        for member in members {
            let name = |at: usize| self.devices[at].node.as_str();
            let at = member.at;
            let fail = |e: &dyn std::fmt::Display| Error::node(name(at), e);
            let found = volume::probe(member).map_err(|e| fail(&e))?;
            let found = found.ok_or_else(|| fail(&"is no physical volume of LVM2"))?;
            if let Some((_, other)) = seen.iter().find(|(id, _)| *id == found.label.id) {
                let why = format!("is the same physical volume as {}", name(*other));
                return Err(fail(&why));
            }
            seen.push((found.label.id, at));
            let Some(vg) = found.group else { continue };
            if vg.name != spec.group {
                return Err(fail(&format!(
                    "is in volume group {}, not in {}",
                    vg.name, spec.group
                )));
            }
            if newest.as_ref().is_some_and(|n| n.id != vg.id) {
                return Err(fail(&format!("is in another volume group of the name {}", vg.name)));
            }
            if newest.as_ref().is_none_or(|n| n.seqno < vg.seqno) {
                newest = Some(vg);
            }
        }
        let fail = |e: &dyn std::fmt::Display| Error::node(node, e);
        let vg = newest.ok_or_else(|| fail(&"there is no volume group on the devices"))?;
        let missing = vg.pvs.iter().filter(|pv| seen.iter().all(|(id, _)| pv.id != *id));
        let missing: Vec<String> = missing.map(|pv| format!("{} ({})", pv.key, pv.id)).collect();
        if !missing.is_empty() {
            let (all, missing) = (vg.pvs.len(), missing.join(", "));
            return Err(fail(&format!(
                "the group has {all} devices, and these are not among the nodes: {missing}"
            )));
        }
        if vg.system_id.is_none() {
            return Ok(None);
        }
        let ids = HostIds::of_this_host().map_err(|e| fail(&e))?;
        Ok(ids.matching(&vg).map(str::to_owned))
    }
}

impl Lease {
    /// Another queue to the volume, for another reactor.
    ///
    /// # Errors
    /// If a device has none left, or is lost.
    pub(crate) fn another_queue(&self) -> Result<Leaf, Error> {
        let groups = GROUPS.lock();
        let closed = || Error::node(&self.node, "the group was closed");
        let shared = &groups.open[groups.find(self.group).ok_or_else(closed)?];
        let leaves = self.order.iter().map(|&at| shared.devices[at].queue());
        let leaves = leaves.collect::<Result<_, _>>()?;
        let queue = SplitQueue::over(leaves, self.map.clone(), !self.writable);
        Ok(Leaf::Volume(Box::new(queue.map_err(|e| Error::node(&self.node, e))?)))
    }

    /// Makes the volume larger by so many extents at least, durably. Returns where its bytes are now;
    /// further queues go by that, those that are there have to be told.
    ///
    /// # Errors
    /// If the group has no space, or a device fails: the volume is as before then, unless it was in
    /// the middle of the commit.
    pub(crate) fn grow(&mut self, extents: u64, author: &Author) -> Result<Map, Error> {
        let fail = |e: &dyn std::fmt::Display| Error::node(&self.node, e);
        if !self.writable {
            return Err(fail(&"was opened for reading only"));
        }
        // Locked until the change is in force, as the group's metadata is one thing for all volumes.
        let groups = GROUPS.lock();
        let at = groups.find(self.group).ok_or_else(|| fail(&"the group was closed"))?;
        let members = groups.open[at].members(false)?;
        let mut group = Group::open(members, self.ours.as_deref()).map_err(|e| fail(&e))?;
        // By whatever name it has now.
        let name = group.vg().lvs.iter().find(|lv| lv.id == self.volume).map(|lv| lv.name.clone());
        let name = name.ok_or_else(|| fail(&"the volume is not in its group any more"))?;
        let edit = |vg: &mut Vg| vg.grow_lv(&name, extents).map(drop);
        group.change(author, "polldisk: more space", edit).map_err(|e| fail(&e))?;
        let map = group.map(&name).map_err(|e| fail(&e))?;
        let order: Vec<usize> = group.into_devices().into_iter().map(|m| m.at).collect();
        if !map.extends(&self.map) || order != self.order || map.align() < 4096 {
            return Err(fail(&"the volume has been moved by somebody else: close it"));
        }
        self.map = map.clone();
        Ok(map)
    }

    /// Whether the volume may be written to.
    pub(crate) fn writable(&self) -> bool {
        self.writable
    }

    /// Ends the use of the volume, after its queues are gone; with the last one the group's devices
    /// are closed.
    ///
    /// # Errors
    /// If a device does not shut down in order.
    pub(crate) fn close(mut self) -> Result<(), Error> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.open) {
            return Ok(());
        }
        let mut groups = GROUPS.lock();
        let Some(at) = groups.find(self.group) else { return Ok(()) };
        let uses = &mut groups.open[at].uses;
        if let Some(i) = uses.iter().position(|&u| u == (self.volume, self.writable)) {
            uses.swap_remove(i);
        }
        groups.tidy(at)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Err(e) = self.give_back() {
            log::error!("{e}");
        }
    }
}

/// Which devices nodes lead to, in any order.
fn which(nodes: &[NodeSpec]) -> Vec<Which> {
    let mut key: Vec<Which> = nodes
        .iter()
        .map(|node| {
            let file = node.path().and_then(|path| std::fs::metadata(path).ok());
            match file.map(|m| FileId::of(&m)) {
                Some(id) => Which::File(id.dev, id.ino, matches!(node, NodeSpec::Model(_))),
                None => Which::Named(node.to_string()),
            }
        })
        .collect();
    key.sort();
    key
}

impl Disk {
    /// Makes the volume that the image lies in larger by so many extents at least, while guests go on:
    /// what found no space in it finds some. Returns its bytes.
    ///
    /// # Errors
    /// If the image that is written to lies in no volume, the group has no space, or a device fails.
    pub fn grow_volume(&mut self, extents: u64, author: &Author) -> Result<u64, Error> {
        let name = self.rest.name().to_owned();
        let leaf = usize::from(self.rest.top.leaf);
        let lies = self.layers().first().map(|layer| &layer.lies);
        let device = match lies {
            Some(Lies::Device(n)) => Some(*n),
            _ => None,
        };
        let lease = device.and_then(|n| self.rest.devices.get_mut(n)).and_then(Device::as_volume);
        let lease = lease.ok_or_else(|| Error::node(&name, "the image lies in no volume"))?;
        let map = lease.grow(extents, author)?;
        let size = map.len();
        // All queues before the first request that goes past the old end.
        for running in self.running() {
            let map = map.clone();
            let grown = self.mailbox(running).ask(move |core: &mut ReactorCore| {
                match core.leaves().get_mut(leaf) {
                    Some(Leaf::Volume(queue)) => queue.grow(map),
                    _ => Err("the volume has no queue".to_owned()),
                }
            });
            grown
                .unwrap_or_else(|| Err("its reactor has ended".to_owned()))
                .map_err(|e| Error::node(&name, e))?;
        }
        let image = self.home.image;
        self.home_mailbox().ask(move |core: &mut ReactorCore| {
            if let Some(Image::Qcow(image)) = core.image(image) {
                image.has_more_space(size);
            }
        });
        Ok(size)
    }
}
