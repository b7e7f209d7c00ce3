//! The slot task: takes the job of its slot, does it, says how it ended, for ever.

use std::rc::Rc;

use block::{Flags, Op, Status};

use super::corrupt::Mark;
use super::shared::{Job, Shared, What};

/// The task of one slot.
pub(super) async fn serve(shared: Rc<Shared>, slot: u16) {
    loop {
        let job = reactor::task::until(|| shared.take_job(slot)).await;
        let status = shared.run(slot, &job).await;
        shared.finish(slot, status);
    }
}

impl Shared {
    async fn run(&self, slot: u16, job: &Job) -> Status {
        let fua = job.flags.has(Flags::FUA);
        let changes = matches!(job.what, What::Guest(Op::Write | Op::WriteZeroes | Op::Discard));
        if changes && self.marks.borrow().is_active() {
            let marked = self.at_rest(slot, self.mark(slot, job.offset, job.len)).await;
            if let Err(status) = marked {
                return status;
            }
        }
        let status = match job.what {
            What::Refuse(status) => status,
            What::WriteBack => self.write_all_back(slot).await,
            What::Stream => self.stream(slot).await,
            What::Guest(Op::Read) => {
                self.read(slot, job.offset, job.len, job.segs.as_slice()).await
            }
            What::Guest(Op::Flush) => self.flush(slot).await,
            What::Guest(Op::Write) => {
                let flags = if fua { Flags::FUA } else { Flags::NONE };
                self.write(slot, job.offset, job.len, job.segs.as_slice(), flags).await
            }
            What::Guest(Op::WriteZeroes) => {
                self.write_zeroes(slot, job.offset, job.len, job.flags).await
            }
            What::Guest(Op::Discard) => self.discard(slot, job.offset, job.len).await,
        };
        if changes {
            self.record(job.offset, job.len);
        }
        if changes && self.mark.get() == Mark::Wanted {
            self.at_rest(slot, self.mark_corrupt(slot)).await;
        }
        if !fua || !status.is_ok() || matches!(job.what, What::Guest(Op::Read | Op::Flush)) {
            return status;
        }
        // The data of a plain overwrite is durable by the device's own FUA; anything that changed
        // a mapping needs the metadata too.
        let written = job.what == What::Guest(Op::Write);
        if written && !self.range_is_dirty(job.offset, job.len) {
            return status;
        }
        // The slot keeps no cluster from being reused while it waits for the batch.
        self.work(slot).epoch.set(u64::MAX);
        self.flush(slot).await
    }

    /// Whether metadata for a range of the guest's disk is not durable.
    fn range_is_dirty(&self, offset: u64, len: u64) -> bool {
        let shift = self.geometry.unit_bits() + self.map.page_bits();
        let tables = self.tables.borrow();
        (offset >> shift..=(offset + len - 1) >> shift).any(|p| tables.page_is_dirty(p))
    }
}
