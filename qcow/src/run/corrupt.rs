//! An image whose metadata contradict themselves: a write that meets that fails, and has the image
//! marked as corrupt on disk, as QEMU does: nobody opens it for writing before it was repaired. Who
//! has it open goes on with what is sound.

use block::Status;

use super::read::check;
use super::shared::Shared;
use crate::format::incompatible;

/// Whether the header says that the image is corrupt.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) enum Mark {
    #[default]
    No,
    /// It shall, with the next request that changes the disk.
    Wanted,
    Done,
}

/// Where the header has its incompatible features, big-endian.
const FEATURES: std::ops::Range<usize> = 72..80;

impl Shared {
    /// Says that metadata of a layer contradict themselves. Of a backing file that is all.
    pub(super) fn contradiction(&self, layer: usize, what: std::fmt::Arguments<'_>) {
        self.complain(layer, what);
        if layer == self.top_at() && self.mark.get() == Mark::No {
            self.mark.set(Mark::Wanted);
        }
    }

    /// Marks the image, if that is wanted. For a task as in [`Shared::at_rest`].
    pub(super) async fn mark_corrupt(&self, slot: u16) {
        self.mark.set(Mark::Done);
        let name = &self.stack.top_layer().name;
        log::error!(
            "{name}: is marked as corrupt, and cannot be opened for writing again before `polldisk \
             image check --repair all`"
        );
        if self.geometry.version() < 3 {
            return;
        }
        // The header changes too when a refcount table moves, which is an allocation.
        self.lock_alloc(slot).await;
        let marked = self.write_mark(slot).await;
        self.unlock_alloc();
        if let Err(status) = marked {
            log::error!("{name}: cannot be marked as corrupt: {status}");
            self.mark.set(Mark::Wanted);
        }
    }

    async fn write_mark(&self, slot: u16) -> Result<(), Status> {
        let mut header = self.read_meta(slot, self.top(), 0, 512).await?;
        let mut features = [0; 8];
        features.copy_from_slice(&header[FEATURES]);
        let features = u64::from_be_bytes(features) | incompatible::CORRUPT;
        header[FEATURES].copy_from_slice(&features.to_be_bytes());
        self.write_bytes(slot, 0, &header).await?;
        check(self.device_flush(slot).await)
    }
}
