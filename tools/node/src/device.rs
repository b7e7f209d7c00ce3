//! [`Device`]: what stands below a leaf queue, lives as long, and is closed after it.

use std::fs::File;

use block::Port;

use crate::{Error, Leaf, Model, groups, remote, vfio};

/// A device that a leaf queue leads to, beyond what the queue itself holds.
pub(crate) enum Device {
    /// A controller in this process.
    Model(Model),
    /// A namespace of a device that this process drives.
    Vfio(vfio::Lease),
    /// A namespace of a controller in another process.
    Remote(remote::Lease),
    /// A volume, with the devices of its group.
    Volume(Box<groups::Lease>),
}

impl Device {
    /// Shuts it down, after its queue is gone. Returns the file of a model.
    ///
    /// # Errors
    /// If it does not end in order.
    pub(crate) fn close(self) -> Result<Option<File>, Error> {
        match self {
            Device::Model(model) => model.close().map(Some),
            Device::Vfio(lease) => lease.close().map(|()| None),
            Device::Remote(lease) => lease.close().map(|()| None),
            Device::Volume(lease) => lease.close().map(|()| None),
        }
    }

    /// Another queue to it, for another reactor; to be dropped before [`Device::close`].
    ///
    /// # Errors
    /// If the controller has none left, or is lost.
    pub(crate) fn another_queue(&self) -> Result<Leaf, Error> {
        match self {
            Device::Model(model) => model.another_queue(),
            Device::Vfio(lease) => lease.another_queue(),
            Device::Remote(lease) => lease.another_queue(),
            Device::Volume(lease) => lease.another_queue(),
        }
    }

    /// The model, if it is one.
    pub(crate) fn as_model(&mut self) -> Option<&mut Model> {
        match self {
            Device::Model(model) => Some(model),
            Device::Vfio(_) | Device::Remote(_) | Device::Volume(_) => None,
        }
    }

    /// The use of a volume, if it is one.
    pub(crate) fn as_volume(&mut self) -> Option<&mut groups::Lease> {
        match self {
            Device::Volume(lease) => Some(lease),
            Device::Model(_) | Device::Vfio(_) | Device::Remote(_) => None,
        }
    }

    /// Where it lies in a queue that other images have, too, if it does.
    pub(crate) fn shared_port(&self) -> Option<Port> {
        match self {
            Device::Volume(lease) => lease.port(),
            Device::Model(_) | Device::Vfio(_) | Device::Remote(_) => None,
        }
    }

    /// Has one of the reactors that share a queue to it reach it.
    ///
    /// # Errors
    /// If there is no queue left, or the reactor has ended.
    pub(crate) fn appear_on(&self, number: usize) -> Result<(), Error> {
        match self {
            Device::Volume(lease) => lease.appear_on(number),
            Device::Model(_) | Device::Vfio(_) | Device::Remote(_) => Ok(()),
        }
    }

    /// Whether it was opened for reading only, which the device itself does not know.
    pub(crate) fn is_for_reading(&self) -> bool {
        match self {
            Device::Vfio(lease) => !lease.writable(),
            Device::Remote(lease) => !lease.writable(),
            Device::Volume(lease) => !lease.writable(),
            Device::Model(_) => false,
        }
    }
}
