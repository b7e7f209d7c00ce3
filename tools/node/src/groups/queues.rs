//! [`Queues`]: on each of several reactors one queue to all devices of a group, which the images there
//! share. The volumes are its units, with the same numbers on all reactors.

use std::sync::Arc;

use block::{Port, SplitQueue};
use volume::Map;

use super::Shared;
use crate::reactors::Places;
use crate::{Error, Leaf, ReactorCore, Reactors};

const ENDED: &str = "a reactor has ended";

/// The queues on some reactors.
pub(super) struct Queues {
    /// The index of each.
    places: Places,
    /// The reactors that have one by now, by number.
    on: Vec<usize>,
    /// The units that are taken.
    units: Vec<bool>,
}

impl Queues {
    /// Takes a number for a volume.
    fn take(&mut self) -> Result<Port, String> {
        let unit = self.units.iter().position(|taken| !taken).unwrap_or(self.units.len());
        let port = Port {
            leaf: self.places.list[0],
            unit: u16::try_from(unit).map_err(|e| e.to_string())?,
        };
        if unit == self.units.len() {
            self.units.push(false);
        }
        self.units[unit] = true;
        Ok(port)
    }
}

impl Shared {
    /// Takes a number for a volume on these reactors, where its group's queue lies.
    pub(super) fn join(&mut self, reactors: &Arc<Reactors>, node: &str) -> Result<Port, Error> {
        let known = self.queues.iter().position(|q| q.places.are_on(reactors));
        let at = match known {
            Some(at) => at,
            None => {
                let places = reactors.places(1)?;
                self.queues.push(Queues { places, on: Vec::new(), units: Vec::new() });
                self.queues.len() - 1
            }
        };
        self.queues[at].take().map_err(|e| Error::node(node, e))
    }

    /// Makes a volume a unit of the queue on one of the reactors. `order`: the devices as the map has
    /// them.
    pub(super) fn put(
        &mut self,
        reactors: &Arc<Reactors>,
        number: usize,
        port: Port,
        (order, map, read_only): (&[usize], Map, bool),
    ) -> Result<(), String> {
        let Shared { queues, devices, .. } = self;
        let queues = queues.iter_mut().find(|q| q.places.are_on(reactors));
        let queues = queues.ok_or("the group has no queues there")?;
        let mailbox = reactors.mailbox(number);
        if !queues.on.contains(&number) {
            let leaves = order.iter().map(|&at| devices[at].queue().map_err(|e| e.to_string()));
            let queue = SplitQueue::of(leaves.collect::<Result<_, _>>()?)?;
            let leaf = Leaf::Volume(Box::new(queue));
            let put = move |core: &mut ReactorCore| core.put_leaf(port.leaf, leaf, Leaf::vacant);
            mailbox.ask(put).ok_or(ENDED)??;
            queues.on.push(number);
        }
        let put = move |core: &mut ReactorCore| match core.leaves().get_mut(usize::from(port.leaf))
        {
            Some(Leaf::Volume(queue)) => queue.put(port.unit, map, read_only),
            _ => Err("the group's queue is not there".to_owned()),
        };
        mailbox.ask(put).ok_or(ENDED)?
    }

    /// Takes a volume away from the queues on all of the reactors; with the last one they go.
    pub(super) fn leave(&mut self, reactors: &Arc<Reactors>, port: Port) {
        let Some(at) = self.queues.iter().position(|q| q.places.are_on(reactors)) else { return };
        let queues = &mut self.queues[at];
        for &number in &queues.on {
            // Not `post`: the unit's number is free after this.
            reactors.mailbox(number).ask(move |core: &mut ReactorCore| {
                if let Some(Leaf::Volume(queue)) = core.leaves().get_mut(usize::from(port.leaf)) {
                    queue.remove(port.unit);
                }
            });
        }
        if let Some(taken) = queues.units.get_mut(usize::from(port.unit)) {
            *taken = false;
        }
        if queues.units.iter().any(|&taken| taken) {
            return;
        }
        let queues = self.queues.swap_remove(at);
        for number in queues.on {
            let take = move |core: &mut ReactorCore| core.take_leaf(port.leaf, Leaf::vacant());
            // Its queue pairs are deleted here, and not on the reactor, which others need.
            drop(reactors.mailbox(number).ask(take));
        }
    }
}
