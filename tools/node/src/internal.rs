//! Internal snapshots of an image that is being served: taken and deleted in a pause, by the code that
//! does it offline. By control code.

use std::time::Duration;

use block::Storage;
use qcow::edit::{SnapshotKey, create_snapshot, delete_snapshot};
use qcow::info::{Info, SnapshotInfo};

use crate::{Disk, Error};

impl Disk {
    /// The internal snapshots of the image that is written to, in the order of its table.
    ///
    /// # Errors
    /// If the image is not QCOW2, or its snapshot table cannot be read.
    pub fn internal_snapshots(&self) -> Result<Vec<SnapshotInfo>, Error> {
        self.on_image(|_, _| ())?;
        let mut chain = self.read(&self.numbers(), usize::MAX)?;
        Ok(Info::of(&mut chain.layers[0], None)?.snapshots)
    }

    /// Takes an internal snapshot of the disk, `taken` after 1970, and returns its ID. Guests wait
    /// while all tables are counted: with those of a full disk of 1 TiB that is 128 MiB of them.
    ///
    /// # Errors
    /// If the image cannot have it ([`create_snapshot`]); it goes on as it was then.
    pub fn take_internal_snapshot(
        &mut self,
        snapshot: &str,
        taken: Duration,
    ) -> Result<String, Error> {
        self.change_snapshots(|st, name| create_snapshot(st, name, snapshot, taken))
    }

    /// Deletes the first internal snapshot with this name, else the one with this ID. Guests wait as
    /// for [`Disk::take_internal_snapshot`].
    ///
    /// # Errors
    /// If there is none, or a write fails; the image goes on as it was then.
    pub fn delete_internal_snapshot(&mut self, snapshot: &str) -> Result<(), Error> {
        self.change_snapshots(|st, name| delete_snapshot(st, name, SnapshotKey::NameOrId(snapshot)))
    }

    fn change_snapshots<T>(
        &mut self,
        change: impl FnOnce(&mut dyn Storage, &str) -> qcow::Result<T>,
    ) -> Result<T, Error> {
        self.refuse_unfit(false)?;
        self.paused(|disk| {
            disk.refuse_unfit(false)?;
            let layer = &disk.layers()[0];
            let mut storage = layer.reopen(&disk.rest.devices, true)?;
            let changed = change(&mut storage, &layer.name).map_err(Error::from);
            drop(storage);
            // Clusters are shared now, or are not any more: all are looked up again.
            disk.follow(0, changed)
        })
    }
}
