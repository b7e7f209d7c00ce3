//! What the layer that is written to holds by itself, while guests use it.

use qcow::ChainReader;

use crate::{Disk, Error, Source};

impl Disk {
    /// Has `f` read the chain while guests wait and all that they were answered is on disk: the uppermost layer is
    /// layer 0.
    ///
    /// # Errors
    /// If the image cannot be read, or what was written not be made durable.
    pub fn at_rest<T>(
        &mut self,
        f: impl FnOnce(&mut ChainReader<Source>) -> qcow::Result<T>,
    ) -> Result<T, Error> {
        self.paused(|disk| {
            let chain = disk.read(&disk.numbers(), usize::MAX)?;
            Ok(f(&mut ChainReader::new(chain))?)
        })
    }
}
