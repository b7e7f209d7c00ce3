//! The stand-in's event channel device: queues of ports that fired, which stay silent until they are
//! written back.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Machine, Port, State};
use crate::evtchn::Kernel;

/// What a device has to be read.
#[derive(Debug)]
pub(super) struct Queue {
    ports: VecDeque<u32>,
    overflow: bool,
    /// Readable while there is something.
    ready: Arc<EventFd>,
}

impl Queue {
    fn ring(&self) {
        let _ = self.ready.write(1);
    }

    fn still(&self) {
        let _ = self.ready.read();
    }

    pub(super) fn overflow(&mut self) {
        self.ports.clear();
        self.overflow = true;
        self.ring();
    }
}

impl State {
    /// An event for one of our ports.
    pub(super) fn raise(&mut self, port: u32) {
        if let Some(p) = self.ports.get_mut(&port) {
            p.pending = true;
        }
        self.deliver(port);
    }

    /// If it is pending and not silent it is put into its device's queue, and is silent from now on.
    fn deliver(&mut self, port: u32) {
        let Some(p) = self.ports.get_mut(&port) else { return };
        if !p.pending || !p.enabled {
            return;
        }
        (p.pending, p.enabled) = (false, false);
        if let Some(queue) = self.event_devices.get_mut(&p.device) {
            queue.ports.push_back(port);
            queue.ring();
        }
    }

    fn unbind(&mut self, port: u32) {
        let Some(p) = self.ports.remove(&port) else { return };
        let domain = self.domains.get_mut(&p.remote.0);
        // The other side can be connected to again.
        if let Some(theirs) = domain.and_then(|d| d.ports.get_mut(&p.remote.1)) {
            theirs.0 = None;
        }
    }
}

#[derive(Debug)]
pub(super) struct Device {
    machine: Arc<Machine>,
    id: u64,
    ready: Arc<EventFd>,
}

impl Device {
    pub(super) fn new(machine: Arc<Machine>) -> Device {
        let ready = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let ready = Arc::new(ready.expect("a test has descriptors left"));
        let mut state = machine.state.lock();
        state.next += 1;
        let id = state.next;
        let queue = Queue { ports: VecDeque::new(), overflow: false, ready: ready.clone() };
        state.event_devices.insert(id, queue);
        drop(state);
        Device { machine, id, ready }
    }

    fn own(&self, state: &State, port: u32) -> Result<(), Errno> {
        let own = state.ports.get(&port).is_some_and(|p| p.device == self.id);
        if own { Ok(()) } else { Err(Errno::ENOTCONN) }
    }
}

impl Kernel for Device {
    fn bind(&self, domid: u16, port: u32) -> Result<u32, Errno> {
        let mut state = self.machine.state.lock();
        // The lowest that is free, so that numbers come again soon.
        let local = (1..).find(|n| !state.ports.contains_key(n)).ok_or(Errno::ENOSPC)?;
        let domain = state.domains.get_mut(&domid).ok_or(Errno::ESRCH)?;
        let theirs = domain.ports.get_mut(&port).filter(|p| p.0.is_none()).ok_or(Errno::EINVAL)?;
        theirs.0 = Some(local);
        let ours = Port { device: self.id, remote: (domid, port), pending: false, enabled: true };
        state.ports.insert(local, ours);
        // An event may have been sent before there was anybody to get it.
        state.raise(local);
        Ok(local)
    }

    fn unbind(&self, port: u32) -> Result<(), Errno> {
        let mut state = self.machine.state.lock();
        self.own(&state, port)?;
        state.unbind(port);
        Ok(())
    }

    fn notify(&self, port: u32) -> Result<(), Errno> {
        let mut state = self.machine.state.lock();
        state.calls.notifies += 1;
        self.own(&state, port)?;
        let (domid, theirs) = state.ports[&port].remote;
        let domain = state.domains.get_mut(&domid);
        if let Some(theirs) = domain.and_then(|d| d.ports.get_mut(&theirs)) {
            theirs.1 = true;
        }
        self.machine.event.notify_all();
        Ok(())
    }

    fn reset(&self) -> Result<(), Errno> {
        let mut state = self.machine.state.lock();
        if let Some(queue) = state.event_devices.get_mut(&self.id) {
            queue.ports.clear();
            queue.overflow = false;
            queue.still();
        }
        Ok(())
    }

    fn read(&self, into: &mut [u32]) -> Result<usize, Errno> {
        let mut state = self.machine.state.lock();
        state.calls.event_calls += 1;
        let queue = state.event_devices.get_mut(&self.id).ok_or(Errno::EBADF)?;
        if queue.overflow {
            return Err(Errno::EFBIG);
        }
        if queue.ports.is_empty() {
            return Err(Errno::EAGAIN);
        }
        let n = queue.ports.len().min(into.len());
        for (place, port) in into.iter_mut().zip(queue.ports.drain(..n)) {
            *place = port;
        }
        if queue.ports.is_empty() {
            queue.still();
        }
        Ok(n)
    }

    fn write(&self, ports: &[u32]) -> Result<usize, Errno> {
        let mut state = self.machine.state.lock();
        state.calls.event_calls += 1;
        for &port in ports {
            // Others' ports, and those that may fire, are passed over.
            if self.own(&state, port).is_ok() {
                if let Some(p) = state.ports.get_mut(&port) {
                    p.enabled = true;
                }
                state.deliver(port);
            }
        }
        Ok(ports.len())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let mut state = self.machine.state.lock();
        state.event_devices.remove(&self.id);
        let own: Vec<u32> =
            state.ports.iter().filter(|(_, p)| p.device == self.id).map(|(&n, _)| n).collect();
        for port in own {
            state.unbind(port);
        }
    }
}
