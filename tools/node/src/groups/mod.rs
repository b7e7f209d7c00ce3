//! Volumes of LVM2 groups as nodes: the groups that this process has open, each with its devices,
//! which all of its volumes share.
//!
//! - Control code reaches a device by one queue ([`Member`]), whatever is done on it at the same time.
//! - Reactors that serve several images have one queue to all devices of the group each, with the
//!   volumes as its units ([`queues`]); an image on reactors of its own has queues of its own.
//! - Whoever changes the group itself has it by [`GroupDevices`], and its volumes from there; else a
//!   volume is opened by its node ([`open`]).
//!
//! A group is open in one process at a time if that one writes to any of its volumes, in any number
//! if all only read: its files are locked whole, as images are, and other devices are a process's own
//! anyway. Within the process a volume is in use once if that use writes.
//!
//! Control path; under one lock, as opening and closing wait for devices. No reactor takes it.

mod growing;
mod lease;
mod managed;
mod member;
mod queues;

use std::os::fd::AsRawFd;
use std::path::PathBuf;

use file::ImageLock;
use qcow::open::{FileId, Format};
use reactor::sync::Mutex;
use volume::{Group, HostIds, Id, Vg, View};

pub use self::growing::Growing;
pub(crate) use self::growing::TopVolume;
pub(crate) use self::lease::Lease;
pub use self::managed::GroupDevices;
pub use self::member::Member;

use self::member::{Below, Reach};
use self::queues::Queues;
use crate::chain::lock;
use crate::device::Device;
use crate::kernel::active_volume;
use crate::source::{Kind, Source};
use crate::{Error, HostStorage, NodeSpec, OpenOptions, VolumeSpec, open_source};

static GROUPS: Mutex<Groups> = Mutex::new(Groups { open: Vec::new(), next: 0 });

/// The groups that are open.
struct Groups {
    open: Vec<Shared>,
    /// Number of the next one, and of the next use of a volume.
    next: u64,
}

/// The devices of an open group, in the order in which they were named.
struct Shared {
    number: u64,
    /// Which devices they are, in order; `None` for those that were opened without locks, which
    /// nobody shares.
    key: Option<Vec<Which>>,
    writable: bool,
    /// Somebody changes the group: see [`GroupDevices`].
    managed: bool,
    // Dropped in this order: locks come last.
    queues: Vec<Queues>,
    devices: Vec<Below>,
    locks: Vec<ImageLock>,
    /// The volumes in use.
    uses: Vec<Use>,
}

/// A use of a volume.
#[derive(Clone, Copy)]
struct Use {
    number: u64,
    volume: Id,
    writable: bool,
}

/// Which device a node leads to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Which {
    /// A file or block device, by device and inode number; whether behind a model.
    File(u64, u64, bool),
    Named(String),
}

/// A volume that was found, before its use is noted.
struct Found {
    view: View<'static, Member>,
    lease: Lease,
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
    let at = groups.take_up(&spec.nodes, options)?;
    let shared = &mut groups.open[at];
    let opened = shared.find_volume(spec, options, &node);
    match opened {
        Ok(found) => Ok(groups.used(at, found)),
        Err(e) => {
            groups.tidy(at)?;
            Err(e)
        }
    }
}

impl Groups {
    /// Finds a group's devices among those that are open, or opens them. Returns where they are.
    fn take_up(&mut self, nodes: &[NodeSpec], options: &OpenOptions) -> Result<usize, Error> {
        let shares = !options.force_share || options.writable;
        let key = shares.then(|| which(nodes));
        if let Some(at) = self.open.iter().position(|g| key.is_some() && g.key == key) {
            if options.writable && !self.open[at].writable {
                self.open[at].make_writable(options)?;
            }
            return Ok(at);
        }
        let number = self.next;
        self.next += 1;
        let mut shared = Shared {
            number,
            key,
            writable: options.writable,
            managed: false,
            queues: Vec::new(),
            devices: Vec::new(),
            locks: Vec::new(),
            uses: Vec::new(),
        };
        for node in nodes {
            shared.add(node, options)?;
        }
        self.open.push(shared);
        Ok(self.open.len() - 1)
    }

    /// Closes a group that nobody uses.
    fn tidy(&mut self, at: usize) -> Result<(), Error> {
        if !self.open[at].uses.is_empty() || self.open[at].managed {
            return Ok(());
        }
        let Shared { devices, locks, queues, .. } = self.open.swap_remove(at);
        drop(queues);
        let mut result = Ok(());
        for device in devices {
            result = result.and(device.close());
        }
        drop(locks);
        result
    }

    /// Notes a use of a volume.
    fn used(&mut self, at: usize, found: Found) -> Source {
        let Found { view, mut lease } = found;
        let number = self.next;
        self.next += 1;
        let (volume, writable) = (lease.volume, lease.writable());
        self.open[at].uses.push(Use { number, volume, writable });
        lease.number = Some(number);
        let kind = Kind::Volume(Box::new(view), Some(Box::new(lease)));
        Source { kind, locks: Vec::new(), id: None }
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
        let (kind, unit) = match source.kind {
            Kind::Host(host) => (Reach::File(host.into_file()), 0),
            Kind::Leaf(storage, mut below) => {
                let unit = storage.unit();
                drop(storage);
                match (below.pop(), below.is_empty()) {
                    (Some(device), true) => (Reach::Device(Box::new(device)), unit),
                    _ => return Err(Error::node(node, "has no volume group, as it is empty")),
                }
            }
            Kind::Volume(..) => return Err(Error::node(node, "a volume is no device of a group")),
        };
        self.devices.push(Below::new(node, kind, unit)?);
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
                Reach::Device(device) if matches!(**device, Device::Model(_)) => {
                    let why = "this process has opened the group for reading only";
                    return Err(Error::in_use(&below.node, why));
                }
                Reach::Device(_) => files.push(None),
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
                    Reach::Device(_) => None,
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
                *below = Below::new(below.node.clone(), Reach::File(file.into_file()), 0)?;
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

    /// All devices, for control code.
    fn members(&self, read_only: bool) -> Vec<Member> {
        let devices = self.devices.iter().enumerate();
        devices.map(|(at, below)| below.member(at, read_only)).collect()
    }

    /// Looks for a volume of the group, of the name that the node says.
    fn find_volume(
        &self,
        spec: &VolumeSpec,
        options: &OpenOptions,
        node: &str,
    ) -> Result<Found, Error> {
        let fail = |e: &dyn std::fmt::Display| Error::node(node, e);
        // What is in use has been opened already, and nobody else can have written to it since.
        let mut members = self.members(!options.writable);
        let ours = self.look(&mut members, spec, node)?;
        let group = Group::open(members, ours.as_deref()).map_err(|e| fail(&e))?;
        let lv = group.vg().lv(&spec.volume).map_err(|e| fail(&e))?;
        if !lv.visible() {
            return Err(fail(&"is no volume of its own"));
        }
        // Whoever takes no locks does not ask who else is there.
        if self.key.is_some()
            && let Some(why) = active_volume(&spec.nodes, group.vg(), lv)
        {
            return Err(Error::in_use(node, why));
        }
        self.volume_of(&group, &spec.volume, options.writable, node)
    }

    /// A volume of the group, as a use of it may begin.
    fn volume_of(
        &self,
        group: &Group<Member>,
        name: &str,
        writable: bool,
        node: &str,
    ) -> Result<Found, Error> {
        let fail = |e: &dyn std::fmt::Display| Error::node(node, e);
        let lv = group.vg().lv(name).map_err(|e| fail(&e))?;
        if !lv.writable() && writable {
            return Err(fail(&"the volume may only be read, as the group's metadata says"));
        }
        if self.uses.iter().any(|u| u.volume == lv.id && (u.writable || writable)) {
            let why = "the volume is in use by this process already, and one of the two writes";
            return Err(Error::in_use(node, why));
        }
        let map = group.map(name).map_err(|e| fail(&e))?;
        if map.is_empty() {
            return Err(fail(&"the volume has no extents"));
        }
        // Queues keep their read-modify-writes of 4 KiB apart by the blocks of a device.
        if map.align() < 4096 {
            return Err(fail(
                &"the volume has extents that do not begin at multiples of 4096 bytes",
            ));
        }
        let lease = Lease::new(self.number, node, lv.id, writable, group, map);
        Ok(Found { view: lease.view(self, writable), lease })
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
            let at = member.at();
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
