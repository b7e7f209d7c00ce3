//! The two rings of a queue pair (§4.1): entries in shared memory, head and tail, phase, doorbells.
//!
//! Ordering, in one place. Submission: entries are stored, then a release fence, then the doorbell.
//! Completion: the dword that holds the phase is loaded, then an acquire fence, then whatever the
//! device wrote before it (the rest of the entry, the data) may be read.

use std::hint::cold_path;
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use dma::{Entries, Region};
use nvme_spec::{CQE_SIZE, Cqe, SQE_SIZE, Sqe};

use crate::bar::Doorbell;
use crate::shadow::Bell;

/// The host's side of a submission queue. Its owner never has more commands in flight than
/// entries less one, so the tail never meets the head and the head need not be known.
pub(crate) struct SubmissionRing<D> {
    entries: Entries<SQE_SIZE>,
    /// Entries pushed since the ring was empty.
    tail: u32,
    /// Of these, those that the device knows of.
    rung: u32,
    doorbell: Bell<D>,
}

impl<D: Doorbell> SubmissionRing<D> {
    /// A ring of `entries` (a power of two) at `base` in the region.
    pub(crate) fn new(region: Arc<Region>, base: usize, entries: u32, doorbell: Bell<D>) -> Self {
        let entries = Entries::new(region, base, entries);
        SubmissionRing { entries, tail: 0, rung: 0, doorbell }
    }

    /// Writes an entry; the device learns of it at [`SubmissionRing::ring`].
    pub(crate) fn push(&mut self, sqe: Sqe) {
        let words: [u64; SQE_SIZE / 8] = zerocopy::transmute!(sqe);
        self.entries.at(self.tail).write_words(&words.map(u64::from_le));
        self.tail = self.tail.wrapping_add(1);
    }

    /// The same for an entry that is 0 but for its first word and the four behind the metadata pointer:
    /// data pointer and CDW10 to CDW13. For a ring of which all entries are, so that their other words are
    /// what they were when the memory was made.
    #[inline(always)]
    pub(crate) fn push_plain(&mut self, first: u64, data: u64, data2: u64, cdw10_13: [u64; 2]) {
        const { assert!(offset_of!(Sqe, prp1) == 24 && offset_of!(Sqe, cdw) == 40) };
        let entry = self.entries.at(self.tail);
        let [cdw10_11, cdw12_13] = cdw10_13;
        entry.write_words(&[first.to_le()]);
        entry.write_words_at::<24, 4>(&[data, data2, cdw10_11, cdw12_13].map(u64::to_le));
        self.tail = self.tail.wrapping_add(1);
    }

    /// How many entries were pushed that the device does not know of.
    #[inline]
    pub(crate) fn pending(&self) -> u32 {
        self.tail.wrapping_sub(self.rung)
    }

    /// Whether entries were pushed that the device does not know of.
    #[inline]
    pub(crate) fn dirty(&self) -> bool {
        self.tail != self.rung
    }

    /// Tells the device of all entries. Returns whether that took a register write.
    #[inline]
    pub(crate) fn ring(&mut self) -> bool {
        self.rung = self.tail;
        self.doorbell.ring(self.tail & self.entries.mask())
    }

    /// Back to an empty ring, as the device sees a queue that was just created.
    pub(crate) fn reset(&mut self) {
        self.tail = 0;
        self.rung = 0;
        self.doorbell.reset();
    }
}

/// The host's side of a completion queue.
pub(crate) struct CompletionRing<D> {
    entries: Entries<CQE_SIZE>,
    next: Next,
    /// Entries taken that the device was not told of.
    untold: u32,
    doorbell: Bell<D>,
}

/// Which entry of a completion queue is looked at next. A loop over entries has a copy of its own: what it
/// writes cannot be that, so it need not be loaded and stored again for each.
#[derive(Clone, Copy)]
pub(crate) struct Next {
    head: u32,
    /// The phase bit of a fresh entry, where it stands in an entry's last dword.
    phase: u32,
}

impl Next {
    const FIRST: Next = Next { head: 0, phase: PHASE };
}

/// The last dword of a fresh completion entry: CID, 0 in the place of the phase, status. So one that
/// succeeded is its CID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LastDword(u32);

impl LastDword {
    #[cfg(test)]
    pub(crate) fn of(bits: u32) -> LastDword {
        LastDword(bits)
    }

    /// All of it.
    #[inline]
    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    #[inline]
    pub(crate) fn cid(self) -> u16 {
        self.0 as u16
    }

    /// The 15-bit status field.
    #[inline]
    pub(crate) fn status(self) -> u16 {
        (self.0 >> 17) as u16
    }
}

const LAST_DWORD: usize = 12;
const PHASE: u32 = 1 << 16;
const _: () = assert!(Cqe::STATUS_OFFSET == LAST_DWORD + 2 && CQE_SIZE == 16);

impl<D: Doorbell> CompletionRing<D> {
    /// A ring of `entries` (a power of two) at `base` in the region, whose memory is zero.
    pub(crate) fn new(region: Arc<Region>, base: usize, entries: u32, doorbell: Bell<D>) -> Self {
        let entries = Entries::new(region, base, entries);
        CompletionRing { entries, next: Next::FIRST, untold: 0, doorbell }
    }

    /// Where entries are taken next.
    #[inline(always)]
    pub(crate) fn next(&self) -> Next {
        self.next
    }

    /// Entries were taken up to there.
    #[inline(always)]
    pub(crate) fn set_next(&mut self, next: Next) {
        self.next = next;
    }

    /// The fresh entry at the head, if there is one: one 32-bit load.
    #[inline(always)]
    pub(crate) fn peek(&self) -> Option<LastDword> {
        self.peek_at(self.next)
    }

    /// The same at another place.
    #[inline(always)]
    pub(crate) fn peek_at(&self, next: Next) -> Option<LastDword> {
        let dword = self.entries.at(next.head).load32::<LAST_DWORD>(Ordering::Relaxed);
        let dword = dword ^ next.phase;
        if dword & PHASE != 0 {
            return None;
        }
        fence(Ordering::Acquire);
        Some(LastDword(dword))
    }

    /// Dword 0 of the entry at the head, after [`CompletionRing::peek`] found it fresh.
    pub(crate) fn result(&self) -> u32 {
        self.entries.at(self.next.head).load32::<0>(Ordering::Relaxed)
    }

    /// Goes on to the next entry; the device learns of it at [`CompletionRing::ring`].
    #[inline(always)]
    pub(crate) fn advance(&mut self) {
        self.next = self.after(self.next);
    }

    /// The place behind that.
    #[inline(always)]
    pub(crate) fn after(&self, mut next: Next) -> Next {
        next.head = (next.head + 1) & self.entries.mask();
        if next.head == 0 {
            cold_path();
            next.phase ^= PHASE;
        }
        next
    }

    /// After `taken` entries were taken: tells the device, once they are a quarter of the ring. It
    /// overwrites none of them before. A device waits for that only when the ring is full of entries
    /// that it takes for unread, and once they are read they are more than a quarter: so nothing ever
    /// waits for the rest of a batch. Returns whether a register was written.
    #[inline]
    pub(crate) fn ring(&mut self, taken: u32) -> bool {
        self.untold += taken;
        if self.untold <= self.entries.mask() / 4 {
            return false;
        }
        self.tell()
    }

    /// Tells the device which entries were taken, now.
    #[inline]
    pub(crate) fn tell(&mut self) -> bool {
        self.untold = 0;
        self.doorbell.ring(self.next.head)
    }

    /// Back to the start, for a queue that was created anew over zeroed memory.
    pub(crate) fn reset(&mut self) {
        self.next = Next::FIRST;
        self.untold = 0;
        self.doorbell.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dma::PageSize;
    use nvme_spec::{Status, StatusCode};
    use zerocopy::IntoBytes;

    struct Wire(std::sync::mpsc::Sender<u32>);

    impl Doorbell for Wire {
        fn ring(&self, value: u32) {
            self.0.send(value).unwrap();
        }
    }

    #[test]
    fn entries_land_and_one_ring_tells_of_all() {
        let region = Region::new(8192, PageSize::Small).unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        let mut sq = SubmissionRing::new(region.clone(), 4096, 4, Bell::plain(Wire(tx)));
        assert!(!sq.dirty());
        let sqe = Sqe::write(7, 1, 99, 7, 0).with_prps(0x1000, 0x2000);
        for _ in 0..3 {
            sq.push(sqe);
        }
        assert!(sq.dirty());
        sq.ring();
        sq.push(sqe);
        sq.ring();
        assert_eq!(rx.try_iter().collect::<Vec<_>>(), [3, 0], "the tail wraps");
        let mut bytes = [0; 64];
        region.read(4096 + 3 * 64, &mut bytes);
        assert_eq!(bytes, sqe.as_bytes());
    }

    #[test]
    fn a_plain_entry_is_the_same_as_a_whole_one() {
        let region = Region::new(4096, PageSize::Small).unwrap();
        let (tx, _rx) = std::sync::mpsc::channel();
        let mut sq = SubmissionRing::new(region.clone(), 0, 4, Bell::plain(Wire(tx)));
        let sqe = Sqe::write(7, 3, 0x12_3456_789a, 7, Sqe::FUA).with_prps(0x1000, 0x2000);
        let words: [u64; 8] = zerocopy::transmute!(sqe);
        for _ in 0..5 {
            sq.push_plain(words[0], words[3], words[4], [words[5], words[6]]);
        }
        for at in 0..4 {
            let mut bytes = [0; 64];
            region.read(at * 64, &mut bytes);
            assert_eq!(bytes, sqe.as_bytes());
        }
    }

    #[test]
    fn phase_tells_fresh_from_old_over_many_rounds() {
        let region = Region::new(4096, PageSize::Small).unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        let mut cq = CompletionRing::new(region.clone(), 0, 8, Bell::plain(Wire(tx)));
        let (mut at, mut phase, mut untold) = (0usize, true, 0);
        for round in 0..1000u32 {
            assert_eq!(cq.peek(), None);
            let n = round % 8;
            for i in 0..n {
                let status = Status::retryable(StatusCode::UNRECOVERED_READ);
                let cqe = Cqe::new(i, 0, 1, i as u16 + 0x100, status, phase);
                region.write(at * 16, cqe.as_bytes());
                at = (at + 1) % 8;
                phase ^= at == 0;
            }
            for i in 0..n {
                let e = cq.peek().unwrap();
                assert_eq!((e.cid(), e.status()), (i as u16 + 0x100, 0x281));
                assert_eq!(cq.result(), i);
                cq.advance();
            }
            untold += n;
            assert_eq!(cq.ring(n), untold >= 2, "a quarter of the ring");
            if untold >= 2 {
                untold = 0;
                assert_eq!(rx.try_iter().last(), Some(at as u32));
            }
        }
    }
}
