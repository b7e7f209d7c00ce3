//! Before a clean close or a change of layers: everything in memory goes to disk, and nothing leaks.

use block::Status;

use super::shared::Shared;

/// Batches at most: each lets some thousand refcount slices follow, so this is more than any image
/// has.
const ROUNDS: u32 = 1 << 16;

impl Shared {
    /// Writes back until nothing is left. No request is in flight any more.
    pub(super) async fn write_all_back(&self, slot: u16) -> Status {
        if self.info.read_only {
            return Status::Ok;
        }
        // One batch lets clusters go, later ones count that.
        for _ in 0..ROUNDS {
            let status = self.flush_tables(slot).await;
            if !status.is_ok() {
                return status;
            }
            if !self.is_dirty() {
                return self.save_marks(slot).await.err().unwrap_or(Status::Ok);
            }
            // Others have their turn: what is waited for may be theirs.
            self.pause(slot).await;
        }
        log::warn!("{}: refcounts stay too high; a check finds them", self.stack.top_layer().name);
        Status::Ok
    }
}
