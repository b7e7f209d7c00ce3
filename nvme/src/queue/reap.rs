//! Completions become answers.

use block::{BlockQueue as _, Completions, Op, Status as Outcome};
use nvme_spec::Status;

use super::QueuePair;
use super::tracker::{NO_BOUNCE, Part, Tracker, slot_of};
use crate::bar::Bar;
use crate::ring::LastDword;
use crate::status;

impl<B: Bar> QueuePair<B> {
    /// A poll that has something to do.
    #[inline(never)]
    pub(super) fn poll_busy(&mut self, order: u32, out: &mut Completions) -> usize {
        let before = out.len();
        if u64::from(order) == self.running || self.obey(order) {
            // The device first: what was submitted since the last poll can begin.
            self.start();
            self.reap(out);
            if !self.longs.waiting.is_empty() {
                self.send_longs();
            }
        }
        if !self.done.is_empty() {
            self.drain(out);
        }
        self.work = self.sq.dirty() || !self.done.is_empty() || !self.longs.waiting.is_empty();
        out.len() - before
    }

    /// Takes completions as far as `out` has room (so at most [`Completions::CAPACITY`] a poll),
    /// then tells the device, once they are worth it.
    #[inline]
    fn reap(&mut self, out: &mut Completions) {
        let (mut succeeded, mut others) = (0, 0);
        loop {
            // The usual ones in a loop of their own, which is short.
            let (cq, trackers) = (&self.cq, &mut self.trackers);
            let (mut next, mut free) = (cq.next(), trackers.first_free());
            succeeded += out.fill_ok(|| {
                let tag = trackers.free_plain(cq.peek_at(next)?, &mut free)?;
                next = cq.after(next);
                Some(tag)
            });
            trackers.set_first_free(free);
            self.cq.set_next(next);
            if out.room() == 0 {
                break;
            }
            // None, or one of another kind; or a usual one that came just now, for which this is good, too.
            let Some(entry) = self.cq.peek() else { break };
            self.cq.advance();
            others += 1;
            self.reap_other(entry);
            if others == Completions::CAPACITY {
                break;
            }
        }
        if succeeded + others > 0 {
            self.trackers.count_free(succeeded as u32);
            self.stats.completed += succeeded as u64;
            self.stats.cq_doorbells += u64::from(self.cq.ring((succeeded + others) as u32));
            self.busy_polls += 1;
        }
    }

    /// Errors, parts of long requests, overdue commands, and completions that name none.
    #[cold]
    fn reap_other(&mut self, entry: LastDword) {
        let slot = slot_of(entry.cid());
        let Some(t) = self.trackers.get_mut(slot) else {
            self.stats.stale_cids += 1;
            return;
        };
        if t.cid() != entry.cid() || t.is(Tracker::FREE | Tracker::WAITS) {
            self.stats.stale_cids += 1;
            return;
        }
        self.stats.completed += 1;
        let status = Status::from_raw(entry.status());
        if t.is(Tracker::LATE) {
            self.no_longer_late(entry.cid());
        } else if status::retryable(status) && t.retries() < status::MAX_RETRIES {
            t.count_retry();
            t.renew(Tracker::WAITS);
            // A queue that is never told the time cannot wait.
            if self.now == 0 {
                self.stats.retries += 1;
                self.resend(slot);
                return;
            }
            let delay = self.retry_delays[usize::from(status.crd())];
            let due = self.now.saturating_add(delay);
            // Never grows: one entry per tracker at most.
            self.retries.push((due, slot as u16));
            self.next_timer = self.next_timer.min(due);
            return;
        }
        self.end(slot, status::outcome(status), status.raw());
    }

    /// Ends a command, and with it the request, or its part in a long one.
    pub(super) fn end(&mut self, slot: usize, outcome: Outcome, detail: u16) {
        let Some(t) = self.trackers.get_mut(slot) else { return };
        let (tag, part) = (t.tag, t.part());
        let blocks = (t.command().cdw12 & 0xffff) + 1;
        self.trackers.free(slot);
        let Some(Part { parent, bounce, at }) = part else {
            self.answer(tag, outcome, detail);
            return;
        };
        self.parts -= 1;
        let long = self.longs.get_mut(parent);
        long.outstanding -= 1;
        if !outcome.is_ok() {
            long.fail(outcome, detail);
        }
        if bounce != NO_BOUNCE {
            if long.op == Op::Read && outcome.is_ok() {
                let len = blocks << self.units[usize::from(long.unit)].block_shift;
                let at = u64::from(at);
                if !self.bounces.copy(&self.table, &long.segs, at, len, bounce, false) {
                    long.fail(Outcome::Invalid, 0);
                }
            }
            self.bounces.give(bounce);
        }
        self.end_long(parent);
    }

    /// Answers a long request if nothing of it is left.
    pub(super) fn end_long(&mut self, index: u16) {
        let long = self.longs.get_mut(index);
        if long.left == 0 && long.outstanding == 0 && !long.queued {
            let (tag, status, detail) = (long.tag, long.status, long.detail);
            self.longs.remove(index);
            self.answer(tag, status, detail);
        }
    }
}
