//! The straight path of reads and writes of one segment, from ring slot to disk and back.
//!
//! Nearly all are of a whole page, for which most of what is to be known is known before: those have
//! stages of their own, if the ring is of the 64-bit layout. What is special about any of them is left to
//! `steps`.

use std::hint::cold_path;

use block::{Completion, Flags, Op, Request, Submit, Tag};

use super::{Backend, Limits, Stage};
use crate::abi::{Abi, Head, OKAY, PAGE, READ, Response, SECTOR, Segment, WRITE};
use crate::{EventChannel, Grants, RingMemory};

// The first two bytes of a slot that asks for one segment.
const ONE_READ: u16 = READ as u16 | 1 << 8;
const ONE_WRITE: u16 = WRITE as u16 | 1 << 8;

// The same, with the sectors of the page above them, of a request for one whole page: what nearly all are
// in a busy guest.
const READ_PAGE: u32 = ONE_READ as u32 | Segment::PAGE << 16;
const WRITE_PAGE: u32 = ONE_WRITE as u32 | Segment::PAGE << 16;

/// What tells those from all others.
#[inline(always)]
fn shape(head: &Head) -> u32 {
    u32::from(head.first as u16) | ((head.word >> 32) as u32) << 16
}

impl<M: RingMemory, G: Grants, E: EventChannel> Backend<M, G, E> {
    /// Makes the request in a slot one to which unusual things may happen.
    #[cold]
    pub(super) fn make_usual(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let operation = match slot.stage {
            Stage::PageRead => READ,
            Stage::PageWrite => WRITE,
            Stage::Plain => {
                slot.stage = Stage::AtData;
                return;
            }
            _ => return,
        };
        if M::KEEPS {
            // It was looked at when it was taken, and the record is believed as our own memory is; but for the
            // segment, on which copies rely: that of a whole page is known.
            let (head, _) = self.ring.kept_request(&slot.entry);
            let gref = Segment(head.word).gref();
            (slot.id, slot.word) = (head.id, u64::from(gref) | u64::from(Segment::PAGE) << 32);
            slot.offset = head.sector.saturating_mul(u64::from(SECTOR));
        }
        (slot.operation, slot.len, slot.stage) = (operation, PAGE as u32, Stage::AtData);
    }

    /// Tells the disk of the next `count` requests, of each once: one that must wait for a buffer is here in
    /// each turn until then, and all behind it.
    #[inline(always)]
    fn expect<D: Submit>(&mut self, disk: &D, count: u32) {
        let (ring, taken) = (&self.ring, self.ring.taken());
        // Never behind what is taken: that was told of before.
        let from = self.expected.wrapping_sub(taken).min(count);
        disk.prefetch((from..count).map(|n| ring.sector(n)));
        if from < count {
            self.expected = taken.wrapping_add(count);
        }
    }

    /// Takes the `waiting` requests, as far as the disk has room.
    #[inline]
    pub(super) fn take<D: Submit>(&mut self, disk: &mut D, waiting: u32) {
        let limits = self.limits(disk);
        let first = self.free;
        let count = (waiting as usize).min(disk.room());
        self.expect(disk, count as u32);
        if self.ring.abi() == Abi::X86_64 {
            // No counter but the ring's: each request that is taken brings it one nearer.
            let end = self.ring.taken().wrapping_add(count as u32);
            while self.ring.taken() != end {
                let head = self.ring.head64();
                let taken = match shape(&head) {
                    WRITE_PAGE => self.take_one::<D, true, true>(disk, head, &limits),
                    READ_PAGE => self.take_one::<D, false, true>(disk, head, &limits),
                    _ => false,
                };
                if !taken && !self.take_next_other(disk, &limits) {
                    break;
                }
                debug_assert!(end.wrapping_sub(self.ring.taken()) < count as u32, "one was taken");
            }
        } else {
            cold_path();
            let _all = (0..count).all(|_| self.take_next_other(disk, &limits));
        }
        let pages = std::mem::take(&mut self.pages_written);
        if pages > 0 {
            self.stats.plain_writes.add(pages);
            self.stats.written_bytes.add(pages * PAGE as u64);
        }
        // Before any of them can be answered: that is done in other turns.
        self.ring.count_taken();
        self.watch(first);
    }

    /// Takes the next request if it is a read or write of a part of a page, and right.
    pub(super) fn take_part<D: Submit>(
        &mut self,
        disk: &mut D,
        head: Head,
        limits: &Limits,
    ) -> bool {
        match head.first as u16 {
            ONE_READ => self.take_one::<D, false, false>(disk, head, limits),
            ONE_WRITE => self.take_one::<D, true, false>(disk, head, limits),
            _ => false,
        }
    }

    /// Takes the next request, of a whole page or of a part of one, unless something is wrong with it.
    #[inline(always)]
    fn take_one<D: Submit, const WRITES: bool, const WHOLE: bool>(
        &mut self,
        disk: &mut D,
        head: Head,
        limits: &Limits,
    ) -> bool {
        let segment = Segment(head.word);
        let len = if WHOLE {
            if !limits.page(WRITES, head.sector) {
                cold_path();
                return false;
            }
            PAGE as u32
        } else {
            match limits.part(WRITES, head.sector, segment) {
                Some(sectors) => sectors * SECTOR,
                None => return false,
            }
        };
        let offset = head.sector * u64::from(SECTOR);
        let index = self.free;
        let slot = &mut self.slots[usize::from(index)];
        self.ring.take(&slot.entry, head, false);
        self.free = slot.next;
        if !(WHOLE && M::KEEPS) {
            (slot.id, slot.word, slot.offset) = (head.id, head.word, offset);
        }
        slot.stage = match (WHOLE, WRITES) {
            (false, _) => Stage::Plain,
            (true, false) => Stage::PageRead,
            (true, true) => Stage::PageWrite,
        };
        if !WHOLE {
            slot.len = len;
            slot.operation = if WRITES { WRITE } else { READ };
        }
        let (op, flags) = if WRITES {
            let Some(page) = self.pages.find_at_home(segment.gref(), self.stamp) else {
                cold_path();
                self.make_usual(index);
                self.stats.other_writes.add(1);
                self.gather(disk, index);
                return true;
            };
            if WHOLE {
                self.pages_written += 1;
            } else {
                self.stats.plain_writes.add(1);
                self.stats.written_bytes.add(u64::from(len));
            }
            let from = if WHOLE { 0 } else { segment.offset() };
            self.grants.read_page(page, from, &self.bounce, usize::from(index) * PAGE, len);
            (Op::Write, self.write_flags)
        } else {
            (Op::Read, Flags::NONE)
        };
        let tag = slot.tag();
        let part;
        let seg = if WHOLE && WRITES {
            // Not to be kept while the copy runs.
            &slot.page
        } else {
            let page = slot.page;
            part = if WHOLE { page } else { page.slice(0, len).expect("a part of a page") };
            &part
        };
        let (len, segs) = (u64::from(len), std::slice::from_ref(seg));
        if disk.submit(&Request { tag, op, flags, unit: 0, offset, len, segs }).is_err() {
            cold_path();
            self.no_room(index);
        }
        true
    }

    /// Requests ended: see [`block::Frontend::complete_run`].
    #[inline(always)]
    pub(super) fn end_run(&mut self, done: &[Completion]) -> (usize, usize) {
        let Some(first) = done.first() else { return (0, 0) };
        let owner = Tag::new(first.tag.owner(), 0, 0);
        self.work = true;
        let (mut rest, mut others, mut wrong) = (done.iter(), 0, 0);
        while let Some(done) = rest.next() {
            if !self.end_page(done, owner) {
                cold_path();
                if done.tag.owner() != owner.owner() {
                    others = rest.len() + 1;
                    break;
                }
                wrong += usize::from(!self.complete_slow(done.tag, done.status));
            }
        }
        let taken = done.len() - others;
        let pages = std::mem::take(&mut self.pages_read);
        if pages > 0 {
            self.stats.plain_reads.add(pages);
            self.stats.read_bytes.add(pages * PAGE as u64);
        }
        (taken, taken - wrong)
    }

    /// Answers a request of a whole page that has succeeded. Returns false if it is anything else, or of
    /// another owner: then nothing has happened.
    #[inline(always)]
    fn end_page(&mut self, done: &Completion, owner: Tag) -> bool {
        // One after the other: each is a branch that is never taken.
        if !done.status.is_ok() {
            cold_path();
            return false;
        }
        // Another owner is a slot that there is not.
        let index = (done.tag.bits() ^ owner.bits()) >> 32;
        let Some(slot) = self.slots.get_mut(index as usize) else {
            cold_path();
            return false;
        };
        let index = index as u16;
        if slot.generation != done.tag.generation() {
            cold_path();
            return false;
        }
        let id = if M::KEEPS { M::kept_id(&slot.entry) } else { slot.id };
        let mut answer = Response { id, operation: WRITE, status: OKAY };
        if slot.stage == Stage::PageRead {
            let word = if M::KEEPS { M::kept_segment(&slot.entry) } else { slot.word };
            let page = self.pages.find_at_home(Segment(word).gref(), self.stamp);
            let Some(page) = page else { return false };
            slot.came_back();
            let at = usize::from(index) * PAGE;
            self.grants.write_page(page, 0, &self.bounce, at, PAGE as u32);
            self.pages_read += 1;
            answer.operation = READ;
        } else if slot.stage == Stage::PageWrite {
            slot.came_back();
        } else {
            cold_path();
            return false;
        }
        slot.stage = Stage::Free;
        slot.next = self.free;
        self.free = index;
        self.ring.respond64(&slot.entry, answer);
        true
    }
}
