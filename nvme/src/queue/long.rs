//! Long requests: those that take more than one command, or whose segments PRPs cannot express.
//!
//! Such a request gets a record of its own. Its commands are sent in order as trackers (and bounce
//! buffers) come free, at most [`PIPELINE`] at a time, so a request of any length needs one record
//! and is taken whole. What PRPs cannot express goes through a bounce buffer rather than as several
//! small commands: the copy is cheap beside a command, and a write stays as atomic as it was.

use std::collections::VecDeque;
use std::sync::Arc;

use block::{Flags, MAX_SEGS, Op, QUARANTINED, Request, Status, Tag};
use dma::{Region, Seg};

use crate::memory::AddressTable;

/// Long requests at a time.
pub(super) const MAX_LONGS: usize = 64;

/// Commands of one long request that are with the device at a time.
pub(super) const PIPELINE: u16 = 8;

/// Bounce buffers of a queue pair, and the size of each in bytes.
pub(super) const BOUNCES: u16 = 8;
pub(super) const BOUNCE_BYTES: u32 = 128 << 10;

/// A long request.
pub(super) struct Long {
    pub(super) tag: Tag,
    /// When it was submitted.
    pub(super) sent: u64,
    /// Where on the unit the next command begins, in bytes, and what is left from there.
    pub(super) offset: u64,
    pub(super) left: u64,
    /// Bytes of the request before `offset`.
    pub(super) done: u64,
    pub(super) op: Op,
    pub(super) flags: Flags,
    /// The first error, and what the device said.
    pub(super) status: Status,
    pub(super) detail: u16,
    pub(super) unit: u16,
    /// Commands with the device.
    pub(super) outstanding: u16,
    /// Commands sent so far, as far as it matters: none, one, more.
    pub(super) commands: u8,
    /// In the list of those that have more to send.
    pub(super) queued: bool,
    /// Data of the next command: segment, and how much of it was sent.
    pub(super) seg: usize,
    pub(super) skip: u32,
    pub(super) segs: Vec<Seg>,
}

impl Long {
    /// Goes on by `len` bytes.
    pub(super) fn advance(&mut self, len: u64) {
        self.offset += len;
        self.done += len;
        self.left -= len;
        let mut n = len;
        while let Some(seg) = self.segs.get(self.seg) {
            let here = u64::from(seg.len() - self.skip);
            if n < here {
                self.skip += n as u32;
                break;
            }
            n -= here;
            self.seg += 1;
            self.skip = 0;
        }
    }

    /// Remembers the first error and sends no more.
    pub(super) fn fail(&mut self, status: Status, detail: u16) {
        if self.status.is_ok() {
            self.status = status;
            self.detail = detail;
        }
        // Whichever part it was: the request's memory may still be in use.
        self.detail |= detail & QUARANTINED;
        self.left = 0;
    }
}

/// All long requests of a queue pair.
pub(super) struct Longs {
    items: Vec<Long>,
    free: Vec<u16>,
    /// Those with more to send, in turn.
    pub(super) waiting: VecDeque<u16>,
}

impl Longs {
    pub(super) fn new() -> Longs {
        let none = |_| Long {
            tag: Tag::new(0, 0, 0),
            sent: 0,
            offset: 0,
            left: 0,
            done: 0,
            op: Op::Flush,
            flags: Flags::NONE,
            status: Status::Ok,
            detail: 0,
            unit: 0,
            outstanding: 0,
            commands: 0,
            queued: false,
            seg: 0,
            skip: 0,
            segs: Vec::with_capacity(MAX_SEGS),
        };
        Longs {
            items: (0..MAX_LONGS).map(none).collect(),
            free: (0..MAX_LONGS as u16).rev().collect(),
            waiting: VecDeque::with_capacity(MAX_LONGS),
        }
    }

    #[inline]
    pub(super) fn free_len(&self) -> usize {
        self.free.len()
    }

    /// How many are not answered.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }

    /// Takes a request in. The caller has seen that a record is free and the request is valid.
    pub(super) fn insert(&mut self, r: &Request<'_>, now: u64) {
        let Some(index) = self.free.pop() else { return };
        let l = &mut self.items[usize::from(index)];
        l.tag = r.tag;
        l.sent = now;
        l.offset = r.offset;
        l.left = r.len;
        l.done = 0;
        l.op = r.op;
        l.flags = r.flags;
        l.status = Status::Ok;
        l.detail = 0;
        l.unit = r.unit;
        l.outstanding = 0;
        l.commands = 0;
        l.queued = true;
        l.seg = 0;
        l.skip = 0;
        l.segs.clear();
        l.segs.extend_from_slice(r.segs);
        self.waiting.push_back(index);
    }

    pub(super) fn get_mut(&mut self, index: u16) -> &mut Long {
        &mut self.items[usize::from(index)]
    }

    /// Gives a record back.
    pub(super) fn remove(&mut self, index: u16) {
        self.free.push(index);
    }

    /// When the oldest was submitted.
    pub(super) fn oldest(&self) -> Option<u64> {
        let taken = |i: &usize| !self.free.contains(&(*i as u16));
        (0..self.items.len()).filter(taken).map(|i| self.items[i].sent).min()
    }
}

/// The bounce buffers of a queue pair.
pub(super) struct Bounces {
    region: Arc<Region>,
    free: Vec<u16>,
}

impl Bounces {
    pub(super) fn new() -> Result<Bounces, dma::Error> {
        let region = Region::new_best(usize::from(BOUNCES) * BOUNCE_BYTES as usize)?;
        Ok(Bounces { region, free: (0..BOUNCES).rev().collect() })
    }

    pub(super) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    pub(super) fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    pub(super) fn give(&mut self, buffer: u16) {
        self.free.push(buffer);
    }

    /// The first `len` bytes of a buffer.
    pub(super) fn seg(&self, buffer: u16, len: u32) -> Option<Seg> {
        self.region.seg(u64::from(buffer) * u64::from(BOUNCE_BYTES), len)
    }

    /// Copies `[at, at + len)` of a request's data into a buffer (`in_`) or out of it. `false` if
    /// the data lies in memory that is not known any more.
    pub(super) fn copy(
        &self,
        table: &AddressTable,
        segs: &[Seg],
        at: u64,
        len: u32,
        buffer: u16,
        in_: bool,
    ) -> bool {
        let mut bounce = usize::from(buffer) * BOUNCE_BYTES as usize;
        let (mut skip, mut left) = (at, u64::from(len));
        for seg in segs {
            let size = u64::from(seg.len());
            if skip >= size {
                skip -= size;
                continue;
            }
            let n = (size - skip).min(left) as usize;
            let offset = (seg.offset() + skip) as usize;
            let Some(region) = table.region(seg.region()) else { return false };
            // A stale segment could lie outside a region that took over its id.
            if offset + n > region.len() {
                return false;
            }
            if in_ {
                dma::copy(region, offset, &self.region, bounce, n);
            } else {
                dma::copy(&self.region, bounce, region, offset, n);
            }
            bounce += n;
            left -= n as u64;
            skip = 0;
            if left == 0 {
                break;
            }
        }
        left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_a_device_may_still_use_is_told_whichever_part_it_was() {
        for order in [[7, QUARANTINED | 9], [QUARANTINED | 7, 9]] {
            let mut longs = Longs::new();
            let long = &mut longs.items[0];
            long.left = 4096;
            order.iter().for_each(|&detail| long.fail(Status::Medium, detail));
            assert_eq!((long.status, long.left), (Status::Medium, 0));
            assert_eq!(long.detail, QUARANTINED | 7, "the first one's, and the mark");
        }
    }
}
