//! A stand-in for the hypervisor and the kernel's two devices, with guests whose memory lies in this
//! process: for tests. Calls and their errors are those of the real ones.
//!
//! [`Host`] is the machine: it has guests and opens devices. [`Guest`] is a guest's side: it grants
//! pages of its memory, makes ports, and sends and gets events.

mod events;
mod grants;
mod memory;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, PoisonError};
use std::time::Duration;

use dma::{PageSize, Region};
use reactor::sync::Mutex;

use crate::abi::PAGE;
use crate::evtchn::Events;
use crate::gntdev::Gntdev;

pub use grants::Table;

/// What a guest grants. The stand-in asks it as the hypervisor asks a grant table.
pub trait Grants: Send + Sync + std::fmt::Debug {
    /// The page that a reference grants, as a number within the guest's memory, and whether it is for
    /// reading only.
    fn find(&self, gref: u32) -> Option<(u32, bool)>;
    /// Counts a mapping, if the page may be written: its page.
    fn map(&self, gref: u32) -> Option<u32>;
    /// Takes a count back.
    fn unmap(&self, gref: u32);
}

/// Calls of the devices so far.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Calls {
    /// Mappings that were tried.
    pub maps: u64,
    /// Mappings that ended.
    pub unmaps: u64,
    /// Calls to copy.
    pub copies: u64,
    /// Segments of these.
    pub segments: u64,
    /// Events that were sent.
    pub notifies: u64,
    /// Reads and writes of the event channel device.
    pub event_calls: u64,
}

#[derive(Debug)]
struct Domain {
    memory: Arc<Region>,
    grants: Arc<dyn Grants>,
    /// Ports: to which of ours they are connected, and whether an event is pending.
    ports: BTreeMap<u32, (Option<u32>, bool)>,
    next_port: u32,
    /// References whose pages are paged out, and for how many more looks.
    paged_out: BTreeMap<u32, u32>,
}

/// One of our ports.
#[derive(Debug)]
struct Port {
    device: u64,
    remote: (u16, u32),
    pending: bool,
    enabled: bool,
}

#[derive(Debug)]
struct State {
    domains: BTreeMap<u16, Domain>,
    ports: BTreeMap<u32, Port>,
    event_devices: BTreeMap<u64, events::Queue>,
    next: u64,
    handles: usize,
    most_handles: usize,
    failing_copies: u32,
    calls: Calls,
}

#[derive(Debug)]
struct Machine {
    state: Mutex<State>,
    /// A guest got an event.
    event: Condvar,
}

/// A machine. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Host(Arc<Machine>);

impl Default for Host {
    fn default() -> Host {
        Host::new()
    }
}

impl Host {
    /// One without guests.
    pub fn new() -> Host {
        let state = State {
            domains: BTreeMap::new(),
            ports: BTreeMap::new(),
            event_devices: BTreeMap::new(),
            next: 1,
            handles: 0,
            most_handles: 262_144,
            failing_copies: 0,
            calls: Calls::default(),
        };
        Host(Arc::new(Machine { state: Mutex::new(state), event: Condvar::new() }))
    }

    /// A guest with so many pages of memory, and a table of grants of its own.
    pub fn guest(&self, domid: u16, pages: u32) -> Guest {
        let memory = Region::new(pages as usize * PAGE, PageSize::Small);
        let memory = memory.expect("a test has memory left");
        let table = Arc::new(Table::default());
        self.guest_of(domid, memory, table.clone());
        Guest { host: self.clone(), domid, table }
    }

    /// A guest whose memory and grants are somebody else's. The memory has pages of 4 KiB.
    pub fn guest_of(&self, domid: u16, memory: Arc<Region>, grants: Arc<dyn Grants>) {
        assert_eq!(memory.page_size(), PageSize::Small, "single pages are mapped");
        let domain = Domain {
            memory,
            grants,
            ports: BTreeMap::new(),
            next_port: 1,
            paged_out: BTreeMap::new(),
        };
        self.0.state.lock().domains.insert(domid, domain);
    }

    /// A guest is gone. What was mapped of it stays until it is unmapped.
    pub fn destroy(&self, domid: u16) {
        self.0.state.lock().domains.remove(&domid);
    }

    /// Opens a grant device.
    pub fn gntdev(&self) -> Gntdev {
        Gntdev::stand_in(Arc::new(grants::Device::new(self.0.clone())))
    }

    /// Opens an event channel device.
    pub fn events(&self) -> Arc<Events> {
        Events::on(events::Device::new(self.0.clone()))
    }

    /// A new port of a guest, for us to connect to.
    pub fn alloc_port(&self, domid: u16) -> u32 {
        let mut state = self.0.state.lock();
        let domain = state.domains.get_mut(&domid).expect("a guest that there is");
        let port = domain.next_port;
        domain.next_port += 1;
        domain.ports.insert(port, (None, false));
        port
    }

    /// A guest sends an event by one of its ports.
    pub fn notify(&self, domid: u16, port: u32) {
        let mut state = self.0.state.lock();
        let ours = state.domains.get(&domid).and_then(|d| d.ports.get(&port)).and_then(|p| p.0);
        if let Some(ours) = ours {
            state.raise(ours);
        }
    }

    /// Whether a guest got an event by a port, and takes it; waits as long as is said.
    pub fn take_event(&self, domid: u16, port: u32, wait: Duration) -> bool {
        let mut taken = false;
        let state = self.0.state.lock();
        let none = |s: &mut State| {
            let port = s.domains.get_mut(&domid).and_then(|d| d.ports.get_mut(&port));
            taken = port.is_some_and(|p| std::mem::take(&mut p.1));
            !taken
        };
        let waited = self.0.event.wait_timeout_while(state, wait, none);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        taken
    }

    /// The page of a reference is paged out, for so many looks.
    pub fn page_out(&self, domid: u16, gref: u32, looks: u32) {
        let mut state = self.0.state.lock();
        let domain = state.domains.get_mut(&domid).expect("a guest that there is");
        domain.paged_out.insert(gref, looks);
    }

    /// How many pages can be mapped in all; 262,144 at first.
    pub fn limit_handles(&self, most: usize) {
        self.0.state.lock().most_handles = most;
    }

    /// How many pages are mapped.
    pub fn mapped(&self) -> usize {
        self.0.state.lock().handles
    }

    /// The next so many calls to copy fail as a whole.
    pub fn fail_copies(&self, calls: u32) {
        self.0.state.lock().failing_copies = calls;
    }

    /// All event channel devices lose what is in their queues.
    pub fn overflow(&self) {
        self.0.state.lock().event_devices.values_mut().for_each(events::Queue::overflow);
    }

    /// Calls so far.
    pub fn calls(&self) -> Calls {
        self.0.state.lock().calls
    }

    /// Our ports that are bound.
    pub fn bound(&self) -> BTreeSet<u32> {
        self.0.state.lock().ports.keys().copied().collect()
    }
}

/// A guest's side.
#[derive(Clone, Debug)]
pub struct Guest {
    host: Host,
    domid: u16,
    table: Arc<Table>,
}

impl Guest {
    /// Its number.
    pub fn domid(&self) -> u16 {
        self.domid
    }

    /// Its memory.
    pub fn memory(&self) -> Arc<Region> {
        self.host.0.state.lock().domains[&self.domid].memory.clone()
    }

    /// Its table of grants.
    pub fn grants(&self) -> &Table {
        &self.table
    }

    /// As [`Host::alloc_port`].
    pub fn alloc_port(&self) -> u32 {
        self.host.alloc_port(self.domid)
    }

    /// As [`Host::notify`].
    pub fn notify(&self, port: u32) {
        self.host.notify(self.domid, port);
    }

    /// As [`Host::take_event`].
    pub fn take_event(&self, port: u32, wait: Duration) -> bool {
        self.host.take_event(self.domid, port, wait)
    }
}
