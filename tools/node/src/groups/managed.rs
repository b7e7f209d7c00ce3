//! [`GroupDevices`]: a group for whoever changes it, and its volumes from there.

use volume::{Group, Id};

use super::{GROUPS, Member};
use crate::{Error, NodeSpec, OpenOptions, Source};
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
