//! [`Source`]: an opened node as bytes, for the control path.

use block::{Blocking, LeafAccess, Status, Storage, StorageError};
use file::ImageLock;
use qcow::open::FileId;
use volume::View;

use crate::device::Device;
use crate::groups::{Lease, Member};
use crate::{HostStorage, Leaf};

/// An opened node.
pub struct Source {
    pub(crate) kind: Kind,
    /// Held as long as the node is in use.
    pub(crate) locks: Vec<ImageLock>,
    /// The file behind it.
    pub(crate) id: Option<FileId>,
}

pub(crate) enum Kind {
    Host(HostStorage),
    Leaf(Box<Blocking<Leaf>>, Vec<Device>),
    /// A volume, and its use; without if somebody else has that.
    Volume(Box<View<'static, Member>>, Option<Box<Lease>>),
}

macro_rules! each {
    ($self:expr, $s:ident => $e:expr) => {
        match &$self.kind {
            Kind::Host($s) => $e,
            Kind::Leaf($s, _) => $e,
            Kind::Volume($s, _) => $e,
        }
    };
    (mut $self:expr, $s:ident => $e:expr) => {
        match &mut $self.kind {
            Kind::Host($s) => $e,
            Kind::Leaf($s, _) => $e,
            Kind::Volume($s, _) => $e,
        }
    };
}

impl Storage for Source {
    fn len(&self) -> u64 {
        each!(self, s => s.len())
    }

    fn capacity(&self) -> u64 {
        each!(self, s => s.capacity())
    }

    fn read_only(&self) -> bool {
        self.is_for_reading() || each!(self, s => s.read_only())
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        each!(mut self, s => s.read_at(offset, into))
    }

    fn will_read(&mut self, offset: u64, len: u64) {
        each!(mut self, s => s.will_read(offset, len));
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.check("write", offset, from.len() as u64)?;
        each!(mut self, s => s.write_at(offset, from))
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.check("write zeroes", offset, len)?;
        each!(mut self, s => s.write_zeroes_at(offset, len))
    }

    fn discard_at(&mut self, offset: u64, len: u64) {
        if !self.is_for_reading() {
            each!(mut self, s => s.discard_at(offset, len));
        }
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        each!(mut self, s => s.flush())
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        each!(mut self, s => s.set_len(len))
    }
}

impl Source {
    /// Whether a device below was opened for reading only, and does not know it.
    fn is_for_reading(&self) -> bool {
        matches!(&self.kind, Kind::Leaf(_, below) if below.iter().any(Device::is_for_reading))
    }

    /// Whether a write may go on.
    fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), StorageError> {
        if self.is_for_reading() {
            let status = Status::ReadOnly;
            return Err(StorageError { what, offset, len, status, detail: 0 });
        }
        Ok(())
    }

    /// The file behind a host node.
    pub fn host(&self) -> Option<&HostStorage> {
        match &self.kind {
            Kind::Host(h) => Some(h),
            _ => None,
        }
    }

    /// Ends the use of a node in order: controllers are shut down, and what a model wrote is in its
    /// file.
    ///
    /// # Errors
    /// If the shutdown fails.
    pub fn close(self) -> Result<(), crate::Error> {
        match self.kind {
            Kind::Host(_) | Kind::Volume(_, None) => Ok(()),
            Kind::Leaf(storage, devices) => {
                drop(storage);
                devices.into_iter().try_for_each(|device| device.close().map(drop))
            }
            Kind::Volume(view, Some(lease)) => {
                drop(view);
                lease.close()
            }
        }
    }
}

/// A leaf's unit as storage.
pub(crate) fn blocking(
    leaf: Leaf,
    unit: u16,
    node: &str,
) -> Result<Box<Blocking<Leaf>>, crate::Error> {
    debug_assert!(leaf.unit_len(unit) > 0);
    Blocking::new(leaf, unit).map(Box::new).map_err(|e| crate::Error::node(node, e))
}
