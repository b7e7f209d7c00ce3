//! Taking requests other than a read or write of one segment, and checking them. What is wrong is
//! answered at once and takes no slot.

use block::Submit;

use super::{Backend, GATE_BARRIER, Head, Limits, NO_BUFFER, SECTOR, Segment, Stage};
use crate::abi::{
    DIRECT_SEGMENTS, DISCARD, EOPNOTSUPP, ERROR, FLUSH_DISKCACHE, INDIRECT, INDIRECT_PAGES, OKAY,
    READ, SEGMENTS_PER_PAGE, WRITE, WRITE_BARRIER,
};
use crate::{EventChannel, Grants, RingMemory};

/// Bytes of the data that `segments` describe, or `None` if one is wrong or the whole is not
/// allowed.
pub(super) fn data_len(
    segments: &[Segment],
    write: bool,
    sector: u64,
    limits: Limits,
) -> Option<u32> {
    let mut sectors = 0;
    for s in segments {
        // At most 4096 segments of at most 8 sectors.
        sectors += s.sectors()?;
    }
    limits.allow(write, sector, u64::from(sectors)).then_some(sectors * SECTOR)
}

impl<M: RingMemory, G: Grants, E: EventChannel> Backend<M, G, E> {
    /// Takes the next request of the ring, whatever it is: it is copied once more, so it may be another
    /// one than was looked at before. Returns false if the ring is not to be read further now; the
    /// request was then taken or left, as may be.
    #[inline(never)]
    pub(super) fn take_next_other<D: Submit>(&mut self, disk: &mut D, limits: &Limits) -> bool {
        let head = self.ring.head();
        self.take_part(disk, head, limits) || self.take_other(disk, head, *limits)
    }

    fn take_other<D: Submit>(&mut self, disk: &mut D, head: Head, limits: Limits) -> bool {
        match head.operation() {
            READ | WRITE => self.take_direct(disk, head, limits),
            INDIRECT => self.take_indirect(disk, head, limits),
            FLUSH_DISKCACHE if self.config.flush => self.take_flush(disk, head, limits),
            WRITE_BARRIER if self.config.barrier => self.take_flush(disk, head, limits),
            DISCARD if self.config.discard => self.take_discard(disk, head, limits),
            operation => {
                self.refuse(head, operation, EOPNOTSUPP);
                true
            }
        }
    }

    /// Takes the next request, to be answered without anything being done.
    #[cold]
    fn refuse(&mut self, head: Head, operation: u8, status: i16) {
        if status != OKAY {
            self.count_refusal();
        }
        let index = self.take_next(head);
        self.slots[usize::from(index)].renew(head.id, operation);
        self.refuse_slot(index, status);
    }

    /// Has a request that was taken answered in the next turn: its slot must not take another one
    /// before its answer is published.
    pub(super) fn refuse_slot(&mut self, index: u16, status: i16) {
        self.slots[usize::from(index)].status = status;
        self.again(index, Stage::Refused);
    }

    /// Takes the next request of the ring, or of those that a backend before this one has left.
    fn take_next(&mut self, head: Head) -> u16 {
        match self.replaying.take() {
            Some(slot) => {
                self.unlink(slot);
                slot
            }
            None => {
                let index = self.free_slot();
                self.ring.take(&self.slots[usize::from(index)].entry, head, true);
                index
            }
        }
    }

    /// Takes a slot out of the list of free ones, wherever it stands in it.
    #[cold]
    fn unlink(&mut self, slot: u16) {
        let next = self.slots[usize::from(slot)].next;
        if self.free == slot {
            self.free = next;
        } else if let Some(before) =
            self.slots.iter_mut().find(|s| s.stage == Stage::Free && s.next == slot)
        {
            before.next = next;
        }
    }

    /// Takes up requests that a backend before this one has left, as far as there is room. Nothing
    /// else is taken before all of them are.
    #[cold]
    pub(super) fn replay<D: Submit>(&mut self, disk: &mut D) {
        let limits = self.limits(disk);
        while let Some(&slot) = self.left.last()
            && disk.room() > 0
        {
            let (head, tail) = self.ring.kept_request(&self.slots[usize::from(slot)].entry);
            (self.replaying, self.tail) = (Some(slot), tail);
            let goes_on = self.take_other(disk, head, limits);
            // Taken, or left for want of a buffer.
            if self.replaying.take().is_none() {
                self.left.pop();
            }
            if !goes_on {
                break;
            }
        }
    }

    /// The rest of the next request.
    fn next_tail(&self) -> [u64; 10] {
        if self.replaying.is_some() { self.tail } else { self.ring.tail() }
    }

    pub(super) fn count_refusal(&mut self) {
        let counter = if self.failed { &self.stats.refused } else { &self.stats.bad_requests };
        counter.add(1);
    }

    #[cold]
    pub(super) fn refuse_data(&mut self, head: Head, operation: u8) {
        self.refuse(head, operation, ERROR);
    }

    /// Copies the segments in the slot, of which there are `count`.
    fn direct_segments(&self, head: Head, count: usize) -> [Segment; DIRECT_SEGMENTS] {
        let mut all = [Segment(head.word); DIRECT_SEGMENTS];
        if count > 1 {
            for (to, from) in all[1..].iter_mut().zip(self.next_tail()) {
                *to = Segment(from);
            }
        }
        all
    }

    /// Puts a request whose segments are known and right into a slot, with a buffer. `None` if all
    /// large buffers are in use: the request is then left in the ring.
    fn take_slot(&mut self, head: Head, segments: &[Segment], len: u32) -> Option<u16> {
        let large = if segments.len() > 1 { self.large.pop()? } else { NO_BUFFER };
        let index = self.take_next(head);
        if large != NO_BUFFER {
            let list = self.list_at(large);
            self.lists[list..list + segments.len()].copy_from_slice(segments);
        }
        let slot = &mut self.slots[usize::from(index)];
        slot.renew(head.id, head.operation());
        slot.offset = head.sector.wrapping_mul(u64::from(SECTOR));
        slot.word = segments.first().map_or(0, |s| s.0);
        slot.len = len;
        (slot.listed, slot.large) = (segments.len() as u16, large);
        Some(index)
    }

    fn take_direct<D: Submit>(&mut self, disk: &mut D, head: Head, limits: Limits) -> bool {
        let (count, write) = (usize::from(head.second()), head.operation() == WRITE);
        let segments = self.direct_segments(head, count);
        let len = (1..=DIRECT_SEGMENTS)
            .contains(&count)
            .then(|| data_len(&segments[..count], write, head.sector, limits))
            .flatten();
        let Some(len) = len else {
            self.refuse_data(head, head.operation());
            return true;
        };
        let Some(index) = self.take_slot(head, &segments[..count], len) else { return false };
        if write {
            self.stats.other_writes.add(1);
            self.gather(disk, index);
        } else {
            self.stats.other_reads.add(1);
            self.put_data(disk, index);
        }
        true
    }

    fn take_indirect<D: Submit>(&mut self, disk: &mut D, head: Head, limits: Limits) -> bool {
        let (operation, count) = (head.second(), usize::from(head.indirect_segments()));
        let (most, write) = (usize::from(self.config.max_indirect_segments), operation == WRITE);
        if most == 0 {
            self.refuse(head, operation, EOPNOTSUPP);
            return true;
        }
        // The rest is checked when the segments are there.
        let possible = operation <= WRITE
            && (1..=most).contains(&count)
            && limits.allow(write, head.sector, 0);
        if !possible {
            self.refuse_data(head, operation);
            return true;
        }
        let Some(large) = self.large.pop() else { return false };
        let pages = count.div_ceil(SEGMENTS_PER_PAGE);
        let mut grefs = [head.indirect_page(); INDIRECT_PAGES];
        if pages > 1 {
            let tail = self.next_tail();
            for (i, gref) in grefs.iter_mut().skip(1).enumerate() {
                *gref = (tail[i / 2] >> (32 * (i % 2))) as u32;
            }
        }
        let index = self.take_next(head);
        self.list_pages[usize::from(large)] = grefs;
        let slot = &mut self.slots[usize::from(index)];
        slot.renew(head.id, operation);
        slot.offset = head.sector * u64::from(SECTOR);
        (slot.listed, slot.large, slot.pages) = (count as u16, large, pages as u8);
        self.stats.indirect.add(1);
        if write {
            self.stats.other_writes.add(1)
        } else {
            self.stats.other_reads.add(1)
        }
        self.fetch(disk, index);
        true
    }

    /// Takes a flush or a barrier, with or without data.
    fn take_flush<D: Submit>(&mut self, disk: &mut D, head: Head, limits: Limits) -> bool {
        let (operation, count) = (head.operation(), usize::from(head.second()));
        let barrier = operation == WRITE_BARRIER;
        let segments = self.direct_segments(head, count);
        let len = match count {
            0 if barrier && limits.read_only && !self.failed => None,
            0 => Some(0),
            1..=DIRECT_SEGMENTS => data_len(&segments[..count], true, head.sector, limits),
            _ => None,
        };
        let Some(len) = len else {
            self.refuse_data(head, operation);
            return true;
        };
        let Some(index) = self.take_slot(head, &segments[..count], len) else { return false };
        if barrier {
            self.stats.barriers.add(1);
        } else {
            self.stats.flushes.add(1);
        }
        if self.failed {
            // Only an empty one comes here: see `Stage::Held`.
            self.hold_for_ever(index);
            return true;
        }
        if barrier {
            self.gates |= GATE_BARRIER;
            self.again(index, Stage::Barrier);
            return false;
        }
        self.put_flush(disk, index);
        true
    }

    fn take_discard<D: Submit>(&mut self, disk: &mut D, head: Head, limits: Limits) -> bool {
        let (sector, count) = (head.sector, head.word);
        if !(Limits { align: 0, ..limits }).allow(true, sector, count) {
            self.refuse_data(head, DISCARD);
            return true;
        }
        self.stats.discards.add(1);
        // A discard is a hint: what does not fill the disk's unit is left alone.
        let least = self.config.sector_size;
        let unit = disk.info(0).map_or(least, |i| i.discard_granularity.max(least));
        let (unit, bytes) = (u64::from(unit), u64::from(SECTOR));
        let from = (sector * bytes).checked_next_multiple_of(unit);
        let end = (sector + count) * bytes / unit * unit;
        match from {
            Some(from) if from < end => {
                let Some(index) = self.take_slot(head, &[], 0) else { return false };
                let slot = &mut self.slots[usize::from(index)];
                slot.offset = from;
                slot.mark = end;
                self.put_discard(disk, index);
            }
            _ => self.refuse(head, DISCARD, OKAY),
        }
        true
    }
}
