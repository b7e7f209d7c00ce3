//! [`Lease`]: the use of a volume.

use std::sync::Arc;

use block::{Port, SplitQueue};
use reactor::sync::Mutex;
use volume::{Group, Id, Map, View};

use super::{GROUPS, Member, Shared, Use};
use crate::{Error, Leaf, Reactors};

/// The use of a volume; given back by [`Lease::close`] after its queues are gone.
pub(crate) struct Lease {
    /// Number of the group.
    group: u64,
    /// Its own, from the moment that it is noted until it is given back.
    pub(super) number: Option<u64>,
    node: String,
    pub(super) volume: Id,
    writable: bool,
    /// The group's devices in the order of its metadata.
    order: Vec<usize>,
    /// Who makes it larger has it too.
    map: Arc<Mutex<Map>>,
    /// Where it lies on reactors that others share.
    port: Option<(Arc<Reactors>, Port)>,
}

impl Lease {
    pub(super) fn new(
        group: u64,
        node: &str,
        volume: Id,
        writable: bool,
        of: &Group<Member>,
        map: Map,
    ) -> Lease {
        let order = of.storages().map(Member::at).collect();
        let (number, node, port) = (None, node.to_owned(), None);
        let map = Arc::new(Mutex::new(map));
        Lease { group, number, node, volume, writable, order, map, port }
    }

    /// The volume for control code.
    pub(super) fn view(&self, shared: &Shared, writable: bool) -> View<'static, Member> {
        let read_only = !writable || !self.writable;
        let members = self.order.iter().map(|&at| shared.devices[at].member(at, read_only));
        View::own(self.map.lock().clone(), read_only, members.collect())
    }

    /// The same of an open group.
    ///
    /// # Errors
    /// If it was closed.
    pub(crate) fn again(&self, writable: bool) -> Result<View<'static, Member>, Error> {
        self.with(|shared| Ok(self.view(shared, writable)))
    }

    fn with<T>(&self, f: impl FnOnce(&mut Shared) -> Result<T, Error>) -> Result<T, Error> {
        let mut groups = GROUPS.lock();
        let at = groups.find(self.group);
        let at = at.ok_or_else(|| Error::node(&self.node, "the group was closed"))?;
        f(&mut groups.open[at])
    }

    /// A queue of its own to the volume, which is unit 0 of it.
    ///
    /// # Errors
    /// If a device has none left, or is lost.
    pub(crate) fn another_queue(&self) -> Result<Leaf, Error> {
        self.with(|shared| {
            let leaves = self.order.iter().map(|&at| shared.devices[at].queue());
            let leaves = leaves.collect::<Result<_, _>>()?;
            let queue = SplitQueue::over(leaves, self.map.lock().clone(), !self.writable);
            Ok(Leaf::Volume(Box::new(queue.map_err(|e| Error::node(&self.node, e))?)))
        })
    }

    /// Takes a place in the queue to the group that these reactors have or will have. Returns where.
    ///
    /// # Errors
    /// If there are too many.
    pub(crate) fn join(&mut self, reactors: &Arc<Reactors>) -> Result<Port, Error> {
        let port = self.with(|shared| shared.join(reactors, &self.node))?;
        self.port = Some((reactors.clone(), port));
        Ok(port)
    }

    /// Where it lies on reactors that others share, if it does.
    pub(crate) fn port(&self) -> Option<Port> {
        self.port.as_ref().map(|(_, port)| *port)
    }

    /// Has one of the reactors that it has joined reach it.
    ///
    /// # Errors
    /// If a device has no queue left, or the reactor has ended.
    pub(crate) fn appear_on(&self, number: usize) -> Result<(), Error> {
        let Some((reactors, port)) = &self.port else { return Ok(()) };
        self.with(|shared| {
            let volume = (&self.order[..], self.map.lock().clone(), !self.writable);
            let done = shared.put(reactors, number, *port, volume);
            done.map_err(|e| Error::node(&self.node, e))
        })
    }

    /// Which volume it is.
    pub(crate) fn volume(&self) -> Id {
        self.volume
    }

    /// Where it lies, for [`extended`].
    pub(super) fn map(&self) -> Arc<Mutex<Map>> {
        self.map.clone()
    }

    /// From now on nobody writes to it through this use, and others may read it.
    pub(crate) fn share(&mut self) {
        if let Err(e) = self.set_writable(false) {
            log::error!("{e}");
        }
    }

    /// Control code is going to write to it, and nobody else may use it.
    ///
    /// # Errors
    /// If somebody does.
    pub(crate) fn upgrade(&mut self) -> Result<(), Error> {
        self.set_writable(true)
    }

    fn set_writable(&mut self, writable: bool) -> Result<(), Error> {
        let (number, volume) = (self.number, self.volume);
        self.with(|shared| {
            let mine = |u: &&mut Use| Some(u.number) == number;
            if writable && shared.uses.iter_mut().any(|u| u.volume == volume && !mine(&u)) {
                return Err(Error::in_use(&self.node, "the volume is in use by others"));
            }
            shared.uses.iter_mut().filter(mine).for_each(|u| u.writable = writable);
            Ok(())
        })?;
        self.writable = writable;
        Ok(())
    }

    /// Whether the volume may be written to.
    pub(crate) fn writable(&self) -> bool {
        self.writable
    }

    /// Ends the use of the volume, after its queues are gone; with the last one the group's devices
    /// are closed. Not on a reactor's thread.
    ///
    /// # Errors
    /// If a device does not shut down in order.
    pub(crate) fn close(mut self) -> Result<(), Error> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), Error> {
        let mut groups = GROUPS.lock();
        let Some(at) = groups.find(self.group) else { return Ok(()) };
        let shared = &mut groups.open[at];
        if let Some((reactors, port)) = self.port.take() {
            shared.leave(&reactors, port);
        }
        let Some(number) = self.number.take() else { return Ok(()) };
        shared.uses.retain(|u| u.number != number);
        groups.tidy(at)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.number.is_some()
            && let Err(e) = self.give_back()
        {
            log::error!("{e}");
        }
    }
}

/// The volume lies as `map` says: it has grown, and nothing of it has moved.
///
/// # Errors
/// If that is not so.
pub(super) fn extended(known: &mut Map, map: Map) -> Result<(), String> {
    if !map.extends(known) || map.align() < 4096 {
        return Err("the volume was moved: close it".to_owned());
    }
    *known = map;
    Ok(())
}
