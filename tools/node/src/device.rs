//! [`Device`]: what stands below a leaf queue, lives as long, and is closed after it.

use std::fs::File;

use crate::{Error, Model};

/// A device that a leaf queue leads to, beyond what the queue itself holds.
pub(crate) enum Device {
    /// A controller in this process.
    Model(Model),
}

impl Device {
    /// Shuts it down, after its queue is gone. Returns the file of a model.
    ///
    /// # Errors
    /// If it does not end in order.
    pub(crate) fn close(self) -> Result<Option<File>, Error> {
        match self {
            Device::Model(model) => model.close().map(Some),
        }
    }

    /// The model, if it is one.
    pub(crate) fn as_model(&mut self) -> Option<&mut Model> {
        match self {
            Device::Model(model) => Some(model),
        }
    }
}
