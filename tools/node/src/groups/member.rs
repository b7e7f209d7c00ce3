//! [`Member`]: a device of a group for control code, and [`Below`], what the process holds of it.

use std::fs::File;
use std::sync::Arc;

use block::{Blocking, LeafAccess, Storage, StorageError};
use reactor::sync::Mutex;

use crate::chain::file_leaf;
use crate::device::Device;
use crate::source::blocking;
use crate::{Error, Leaf};

/// A device of an open group, by the one queue to it that all control code of the process shares: each
/// call waits for those of others.
#[derive(Clone)]
pub struct Member {
    storage: Arc<Mutex<Box<Blocking<Leaf>>>>,
    /// Index among the group's devices, as they were named.
    at: usize,
    len: u64,
    read_only: bool,
}

impl Member {
    pub(super) fn at(&self) -> usize {
        self.at
    }
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Member({})", self.at)
    }
}

impl Storage for Member {
    fn len(&self) -> u64 {
        self.len
    }

    fn capacity(&self) -> u64 {
        // A file as a device has the length that it has.
        self.len
    }

    fn read_only(&self) -> bool {
        self.read_only || self.storage.lock().read_only()
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.storage.lock().read_at(offset, into)
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.storage.lock().write_at(offset, from)
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.storage.lock().write_zeroes_at(offset, len)
    }

    fn discard_at(&mut self, offset: u64, len: u64) {
        self.storage.lock().discard_at(offset, len);
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        self.storage.lock().flush()
    }

    fn set_len(&mut self, _: u64) -> Result<(), StorageError> {
        Ok(())
    }
}

/// How a device is reached.
pub(super) enum Reach {
    File(File),
    Device(Box<Device>),
}

/// A device of a group.
pub(super) struct Below {
    // First: a device waits for its queues.
    control: Arc<Mutex<Box<Blocking<Leaf>>>>,
    pub(super) node: String,
    pub(super) kind: Reach,
    /// The unit in queues to it.
    unit: u16,
    len: u64,
}

impl Below {
    pub(super) fn new(node: String, kind: Reach, unit: u16) -> Result<Below, Error> {
        let leaf = match &kind {
            Reach::File(file) => {
                let leaf = file.try_clone().map_err(|e| e.to_string());
                let leaf = leaf.and_then(|file| file_leaf(vec![file]));
                leaf.map_err(|e| Error::node(&node, e))?
            }
            Reach::Device(device) => device.another_queue()?,
        };
        let len = leaf.unit_len(unit);
        if len == 0 {
            return Err(Error::node(node, "is empty"));
        }
        let control = Arc::new(Mutex::new(blocking(leaf, unit, &node)?));
        Ok(Below { control, node, kind, unit, len })
    }

    /// A queue of its own to the device, and the unit in it.
    pub(super) fn queue(&self) -> Result<(Leaf, u16), Error> {
        let leaf = match &self.kind {
            // All of them keep their read-modify-writes apart.
            Reach::File(_) => {
                let leaf = self.control.lock().leaf().another(&mut std::iter::empty());
                leaf.map_err(|e| Error::node(&self.node, e))?
            }
            Reach::Device(device) => device.another_queue()?,
        };
        Ok((leaf, self.unit))
    }

    pub(super) fn member(&self, at: usize, read_only: bool) -> Member {
        Member { storage: self.control.clone(), at, len: self.len, read_only }
    }

    /// Shuts the device down, after all queues to it are gone.
    ///
    /// # Errors
    /// If it does not end in order.
    pub(super) fn close(self) -> Result<(), Error> {
        drop(self.control);
        match self.kind {
            Reach::Device(device) => device.close().map(drop),
            Reach::File(_) => Ok(()),
        }
    }
}
