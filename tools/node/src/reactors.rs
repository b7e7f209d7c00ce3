//! [`Reactors`]: threads that serve any number of images, and [`Places`], which of their leaf queues
//! are whose.

use std::sync::Arc;

use reactor::sync::Mutex;
use reactor::{Clock, Mailbox, Reactor, Start};

use crate::{Error, Leaf, NodeReactor, ReactorCore};

/// Reactor threads. To be ended by [`Reactors::stop`], when no image is on them any more.
pub struct Reactors {
    all: Vec<NodeReactor>,
    clock: Clock,
    /// Indexes of leaf queues that belong to somebody. An image's queues have the same index on all
    /// reactors that serve it, so an index is taken on all of them.
    taken: Mutex<Vec<bool>>,
}

impl Reactors {
    /// Starts one thread for each of `starts`.
    ///
    /// # Errors
    /// If there is none to start, or a thread cannot run where it should; then none is left.
    pub fn start(starts: &[Start], clock: Clock) -> Result<Arc<Reactors>, Error> {
        let mut all = Vec::new();
        for (&start, number) in starts.iter().zip(1..) {
            let time = clock.clone();
            let name = if number == 1 { "reactor".to_owned() } else { format!("reactor-{number}") };
            let started = Reactor::start(&name, start, move || {
                ReactorCore::new(time).map_err(|e| format!("a reactor's descriptors: {e}"))
            });
            match started {
                Ok(reactor) => all.push(reactor),
                Err(e) => {
                    all.into_iter().for_each(NodeReactor::stop);
                    return Err(Error::node(format!("reactor {number}"), e));
                }
            }
        }
        if all.is_empty() {
            return Err(Error::node("reactors", "at least one is needed"));
        }
        Ok(Arc::new(Reactors { all, clock, taken: Mutex::new(Vec::new()) }))
    }

    /// The threads.
    pub fn iter(&self) -> impl Iterator<Item = &NodeReactor> {
        self.all.iter()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// Their clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(crate) fn at(&self, number: usize) -> &NodeReactor {
        &self.all[number]
    }

    pub(crate) fn mailbox(&self, number: usize) -> &Mailbox<ReactorCore> {
        self.all[number].mailbox()
    }

    /// Takes indexes for `count` leaf queues, side by side.
    ///
    /// # Errors
    /// If so many do not fit.
    pub(crate) fn places(self: &Arc<Self>, count: usize) -> Result<Places, Error> {
        let mut taken = self.taken.lock();
        let free = |at: usize| taken[at..].iter().take(count).all(|&t| !t);
        let first = (0..taken.len()).find(|&at| free(at)).unwrap_or(taken.len());
        // The last number stands for none.
        if first + count >= usize::from(u16::MAX) {
            return Err(Error::node("reactors", "too many leaf queues"));
        }
        let end = taken.len().max(first + count);
        taken.resize(end, false);
        taken[first..first + count].fill(true);
        let list = (first..first + count).map(|at| at as u16).collect();
        Ok(Places { list, of: Some(self.clone()) })
    }

    /// Ends the threads and waits for them. Whoever still serves an image on them keeps them running.
    pub fn stop(self: Arc<Self>) {
        match Arc::into_inner(self) {
            Some(reactors) => reactors.all.into_iter().for_each(NodeReactor::stop),
            None => log::debug!("reactors run on, for somebody who still knows them"),
        }
    }
}

/// Indexes of leaf queues. On reactors that are shared they are free again when this goes.
pub(crate) struct Places {
    pub(crate) list: Vec<u16>,
    of: Option<Arc<Reactors>>,
}

impl Places {
    /// The first `count` indexes of cores that serve nothing else.
    pub(crate) fn alone(count: usize) -> Places {
        Places { list: (0..count as u16).collect(), of: None }
    }

    /// The first of them, if there are any.
    pub(crate) fn first(&self) -> u16 {
        self.list.first().copied().unwrap_or(u16::MAX)
    }

    /// Whether they are those of these reactors.
    pub(crate) fn are_on(&self, reactors: &Arc<Reactors>) -> bool {
        self.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, reactors))
    }

    /// Takes over another's.
    pub(crate) fn append(&mut self, mut other: Places) {
        self.list.append(&mut other.list);
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        if let Some(of) = &self.of {
            let mut taken = of.taken.lock();
            for &at in &self.list {
                taken[usize::from(at)] = false;
            }
        }
    }
}

/// Takes an image's leaf queues out of a core, to be closed. Nothing is asked of them any more.
pub(crate) fn take_leaves(core: &mut ReactorCore, places: &[u16]) -> Vec<Leaf> {
    places.iter().filter_map(|&at| core.take_leaf(at, Leaf::vacant())).collect()
}
