//! The clean close: everything in memory goes to disk, and nothing leaks.

use block::Status;

use super::shared::Shared;

impl Shared {
    /// Writes back until nothing is left. No request is in flight any more.
    pub(super) async fn close(&self, slot: u16) -> Status {
        if self.info.read_only {
            return Status::Ok;
        }
        // One batch lets clusters go, the next one counts that, and counting may (once in a long
        // while) have to make a refcount block, which is counted in the third.
        for _ in 0..8 {
            let status = self.flush_tables(slot).await;
            if !status.is_ok() {
                return status;
            }
            if !self.is_dirty() {
                return Status::Ok;
            }
        }
        Status::Ok
    }
}
