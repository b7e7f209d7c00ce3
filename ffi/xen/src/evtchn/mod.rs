//! Event channels through `/dev/xen/evtchn`.
//!
//! [`Events`] is an open device: one for each reactor, since the kernel takes a lock of the device for
//! each call. [`Notifier`] is a thread that sends events for reactors, which then make no system call;
//! [`Listener`] a thread that waits for events and wakes a reactor that sleeps.
//!
//! Facts of the kernel that this rests on: a port that fired stays silent until it is written back
//! ([`Events::unmask`]), and what happens meanwhile is told right after; a port fires once when it is
//! bound; nothing but the number of the port is told, so an event is a hint to look, and there may be
//! some for nothing.

mod listener;
mod notifier;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use nix::errno::Errno;
use reactor::sync::Mutex;
use zerocopy::IntoBytes;

use crate::error::errno;
use crate::{Error, ioctl};

pub use listener::Listener;
pub use notifier::{Bell, Notifier};

/// Most ports that one call reads or writes: a page of them.
const MOST: usize = 1024;

/// What is asked of the device.
pub(crate) trait Kernel: Send + Sync + std::fmt::Debug {
    fn bind(&self, domid: u16, port: u32) -> Result<u32, Errno>;
    fn unbind(&self, port: u32) -> Result<(), Errno>;
    fn notify(&self, port: u32) -> Result<(), Errno>;
    fn reset(&self) -> Result<(), Errno>;
    /// Reads whole ports, without waiting; how many.
    fn read(&self, into: &mut [u32]) -> Result<usize, Errno>;
    /// Writes whole ports; how many were taken.
    fn write(&self, ports: &[u32]) -> Result<usize, Errno>;
    fn fd(&self) -> BorrowedFd<'_>;
}

impl Kernel for File {
    fn bind(&self, domid: u16, port: u32) -> Result<u32, Errno> {
        ioctl::bind(self.as_fd(), domid, port)
    }

    fn unbind(&self, port: u32) -> Result<(), Errno> {
        ioctl::unbind(self.as_fd(), port)
    }

    fn notify(&self, port: u32) -> Result<(), Errno> {
        ioctl::notify(self.as_fd(), port)
    }

    fn reset(&self) -> Result<(), Errno> {
        ioctl::reset(self.as_fd())
    }

    fn read(&self, into: &mut [u32]) -> Result<usize, Errno> {
        let read = Read::read(&mut &*self, into.as_mut_bytes());
        read.map(|n| n / size_of::<u32>()).map_err(|e| errno(&e))
    }

    fn write(&self, ports: &[u32]) -> Result<usize, Errno> {
        let written = Write::write(&mut &*self, ports.as_bytes());
        written.map(|n| n / size_of::<u32>()).map_err(|e| errno(&e))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }
}

/// An open event channel device: local ports, each connected to one of another domain. Any thread may
/// use it. Ports are unbound when it is dropped.
#[derive(Debug)]
pub struct Events {
    kernel: Box<dyn Kernel>,
    bound: Mutex<BTreeSet<u32>>,
}

impl Events {
    /// Opens the kernel's.
    ///
    /// # Errors
    /// If there is none (this is no domain of Xen, or the driver is not loaded), or it may not be used.
    pub fn open() -> Result<Arc<Events>, Error> {
        let place = "/dev/xen/evtchn";
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
        options.open(place).map(Events::on).map_err(|e| Error::open(place, &e))
    }

    pub(crate) fn on(kernel: impl Kernel + 'static) -> Arc<Events> {
        Arc::new(Events { kernel: Box::new(kernel), bound: Mutex::default() })
    }

    /// Connects to a port that another domain made for this one. The local port, which fires once at
    /// once.
    ///
    /// # Errors
    /// [`Error::Bind`]: there is no such port, it is meant for another, or somebody is connected.
    pub fn bind(&self, domid: u16, port: u32) -> Result<u32, Error> {
        let local = self.kernel.bind(domid, port);
        let local = local.map_err(|why| Error::Bind { domid, port, why })?;
        self.bound.lock().insert(local);
        Ok(local)
    }

    /// Gives a local port up. Its number may be read once more, and be another's soon.
    ///
    /// # Errors
    /// If it is not bound here.
    pub fn unbind(&self, local: u32) -> Result<(), Error> {
        self.bound.lock().remove(&local);
        self.kernel.unbind(local).map_err(Error::os("unbind an event channel"))
    }

    /// Sends an event to the other side: one system call and one hypercall.
    ///
    /// # Errors
    /// If the port is not bound here. A domain that is gone is no error.
    #[inline]
    pub fn notify(&self, local: u32) -> Result<(), Error> {
        self.kernel.notify(local).map_err(Error::os("send an event"))
    }

    /// Reads the ports that fired, without waiting: how many. Each stays silent until
    /// [`Events::unmask`].
    ///
    /// # Errors
    /// [`Error::Overflow`], which should never be: then every ring has to be looked at.
    pub fn pending(&self, into: &mut [u32]) -> Result<usize, Error> {
        let most = into.len().min(MOST);
        match self.kernel.read(&mut into[..most]) {
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            Err(Errno::EFBIG) => {
                self.kernel.reset().map_err(Error::os("reset the event channel device"))?;
                // Which of them fired is lost, and with it who is silent.
                let all: Vec<u32> = self.bound.lock().iter().copied().collect();
                self.unmask(&all)?;
                Err(Error::Overflow)
            }
            other => other.map_err(Error::os("read events")),
        }
    }

    /// Lets ports fire again; those that meanwhile got an event do at once. One system call.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn unmask(&self, ports: &[u32]) -> Result<(), Error> {
        let mut rest = ports;
        while !rest.is_empty() {
            match self.kernel.write(&rest[..rest.len().min(MOST)]) {
                Ok(0) => return Err(Error::Os { what: "write ports back", why: Errno::EIO }),
                Ok(n) => rest = &rest[n.min(rest.len())..],
                Err(Errno::EINTR) => {}
                Err(why) => return Err(Error::Os { what: "write ports back", why }),
            }
        }
        Ok(())
    }
}

impl AsFd for Events {
    /// Readable while there are ports to be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.kernel.fd()
    }
}
