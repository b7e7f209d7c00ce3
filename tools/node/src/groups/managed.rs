//! [`GroupDevices`]: a group for whoever changes it, and its volumes from there.

use volume::{Group, Id, Map};

use super::{GROUPS, Member};
use crate::{Disk, Error, Leaf, NodeSpec, OpenOptions, ReactorCore, Source};
use qcow::open::Format;

/// The devices of a group that its holder may change: nobody else in the process, and none outside.
pub struct GroupDevices {
    number: u64,
    node: String,
    open: bool,
}

impl GroupDevices {
    /// Opens the devices, for reading and writing. Volumes of theirs may be in use already, of which
    /// the holder has to know before it changes anything.
    ///
    /// # Errors
    /// If one cannot be had, or is in use, or somebody has them like this already.
    pub fn open(nodes: &[NodeSpec]) -> Result<GroupDevices, Error> {
        let node = nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let mut groups = GROUPS.lock();
        let at = groups.take_up(nodes, &OpenOptions::write(Format::Raw))?;
        let shared = &mut groups.open[at];
        if shared.managed {
            return Err(Error::in_use(node, "this process has opened the group already"));
        }
        shared.managed = true;
        Ok(GroupDevices { number: shared.number, node, open: true })
    }

    /// All devices, in the order in which they were named.
    ///
    /// # Errors
    /// If the group was closed.
    pub fn members(&self) -> Result<Vec<Member>, Error> {
        let groups = GROUPS.lock();
        let at = groups.find(self.number);
        let at = at.ok_or_else(|| Error::node(&self.node, "the group was closed"))?;
        Ok(groups.open[at].members(false))
    }

    /// Opens a volume of the group, which is open over [`GroupDevices::members`].
    ///
    /// # Errors
    /// If there is no such volume, or it is in use.
    pub fn volume(
        &self,
        group: &Group<Member>,
        name: &str,
        writable: bool,
    ) -> Result<Source, Error> {
        let node = format!("{}/{name}", group.vg().name);
        let mut groups = GROUPS.lock();
        let at = groups.find(self.number);
        let at = at.ok_or_else(|| Error::node(&node, "the group was closed"))?;
        let found = groups.open[at].volume_of(group, name, writable, &node)?;
        Ok(groups.used(at, found))
    }

    /// How often a volume is in use.
    pub fn uses(&self, volume: Id) -> usize {
        let groups = GROUPS.lock();
        let uses = groups.find(self.number).map(|at| groups.open[at].uses.iter());
        uses.map_or(0, |uses| uses.filter(|u| u.volume == volume).count())
    }

    /// Ends it. What is in use stays open until that ends.
    ///
    /// # Errors
    /// If a device does not shut down in order.
    pub fn close(mut self) -> Result<(), Error> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.open) {
            return Ok(());
        }
        let mut groups = GROUPS.lock();
        let Some(at) = groups.find(self.number) else { return Ok(()) };
        groups.open[at].managed = false;
        groups.tidy(at)
    }
}

impl Drop for GroupDevices {
    fn drop(&mut self) {
        if let Err(e) = self.give_back() {
            log::error!("{e}");
        }
    }
}

impl Disk {
    /// A volume that one of the layers lies in has grown to what the map says: what found no space in
    /// it goes on.
    ///
    /// # Errors
    /// If no layer lies in it, or the map is none of it.
    pub fn volume_has_grown(&mut self, volume: Id, map: Map) -> Result<(), Error> {
        let name = self.rest.name().to_owned();
        let rest = &mut *self.rest;
        let devices = &mut rest.devices;
        let mut is_it = |n: usize| devices[n].as_volume().is_some_and(|l| l.volume() == volume);
        let layers = rest.chain.layers.iter();
        let mut found = layers.filter_map(|layer| Some((layer.port, layer.lies.device()?)));
        let found = found.find(|&(_, device)| is_it(device));
        let nowhere = || Error::node(&name, "no layer lies in that volume");
        let (port, device) = found.ok_or_else(nowhere)?;
        let lease = rest.devices[device].as_volume().ok_or_else(nowhere)?;
        lease.grown(map.clone())?;
        let size = map.len();
        // All queues before the first request that goes past the old end.
        for running in self.running() {
            let map = map.clone();
            let grown = self.mailbox(running).ask(move |core: &mut ReactorCore| {
                match core.leaves().get_mut(usize::from(port.leaf)) {
                    Some(Leaf::Volume(queue)) => queue.grow(port.unit, map),
                    _ => Err("the volume has no queue".to_owned()),
                }
            });
            grown
                .unwrap_or_else(|| Err("its reactor has ended".to_owned()))
                .map_err(|e| Error::node(&name, e))?;
        }
        match port == self.rest.top {
            true => self.on_image(move |image, _| image.has_more_space(size)),
            false => Ok(()),
        }
    }
}
