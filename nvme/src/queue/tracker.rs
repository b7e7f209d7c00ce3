//! [`Tracker`]: what is known of a command while the device has it; and the free list.
//!
//! A command identifier is a tracker's slot with a generation above it. A completion is followed
//! only if it names a tracker that is in flight under exactly this identifier, so a late, doubled
//! or invented one does nothing.

use block::Tag;

use crate::prp::Prps;
use crate::ring::LastDword;

/// Low bits of a CID that hold the slot; the rest is the generation. No slot has all of them set,
/// so a CID is never FFFFh, which means "none" in the error log.
const SLOT_BITS: u32 = 10;
pub(super) const MAX_TRACKERS: usize = (1 << SLOT_BITS) - 1;

/// The slot that a CID names.
#[inline]
pub(super) fn slot_of(cid: u16) -> usize {
    usize::from(cid & ((1 << SLOT_BITS) - 1))
}

/// Says that a tracker has no bounce buffer.
pub(super) const NO_BOUNCE: u16 = u16::MAX;

/// A command without its identifier: all of its entry (§4.2) that is ever anything but 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Command {
    /// Opcode and namespace: see [`Command::head`].
    pub(super) head: u64,
    pub(super) prps: Prps,
    /// CDW10 in the low half, CDW11 in the high half.
    pub(super) cdw10_11: u64,
    pub(super) cdw12: u32,
}

impl Command {
    /// CDW0 without an identifier in the low half, NSID in the high half.
    pub(crate) const fn head(opcode: u8, nsid: u32) -> u64 {
        opcode as u64 | (nsid as u64) << 32
    }

    /// The first 64-bit word of the command's entry.
    #[inline]
    pub(super) fn first(&self, cid: u16) -> u64 {
        self.head | u64::from(cid) << 16
    }
}

/// One command. A cache line: the first half is what a completion needs, the second what it takes
/// to send the command again.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tracker {
    /// Who is to be told, if the command is a whole request.
    pub(super) tag: Tag,
    /// When it was sent first.
    pub(super) sent: u64,
    /// CID of this or the next use, and the flags below: one comparison tells whether a
    /// completion belongs here, is a success, and needs nothing special.
    live: u32,
    /// The long request that the command is a part of, if it is [`Tracker::PART`].
    parent: u16,
    /// The next free slot, while this one is free. Of a part: its bounce buffer.
    next: u16,
    prps: Prps,
    cdw10_11: u64,
    head: u64,
    cdw12: u32,
    /// Of a part: which byte of the long request it begins with.
    at: u32,
}

const _: () = assert!(size_of::<Tracker>() == 64);
const _: () = assert!(std::mem::offset_of!(Tracker, next) < 32);

/// A part of a long request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Part {
    /// The long request.
    pub(super) parent: u16,
    /// The part's bounce buffer, or [`NO_BOUNCE`].
    pub(super) bounce: u16,
    /// Which byte of the request it begins with.
    pub(super) at: u32,
}

impl Tracker {
    /// Set with any of what follows. Where a completion has its phase, which is 0 when it is compared
    /// ([`LastDword`]): so it is never equal to that of a tracker with this.
    const SPECIAL: u32 = 1 << 16;
    /// Not in use; the CID is that of the next use.
    pub(super) const FREE: u32 = 1 << 17;
    /// Overdue; its completion is still good.
    pub(super) const LATE: u32 = 1 << 18;
    /// Not with the device: waits to be sent again.
    pub(super) const WAITS: u32 = 1 << 19;
    /// A part of a long request.
    const PART: u32 = 1 << 20;
    /// How often it was sent again: the bits from this one on.
    const RETRY: u32 = 1 << 24;

    #[inline]
    pub(super) fn cid(&self) -> u16 {
        self.live as u16
    }

    pub(super) fn is(&self, flag: u32) -> bool {
        self.live & flag != 0
    }

    /// Sets a flag.
    pub(super) fn mark(&mut self, flag: u32) {
        self.live |= flag | Tracker::SPECIAL;
    }

    /// How often the command was sent again.
    pub(super) fn retries(&self) -> u8 {
        (self.live / Tracker::RETRY) as u8
    }

    /// Counts that it is sent again.
    pub(super) fn count_retry(&mut self) {
        self.live += Tracker::RETRY;
        self.live |= Tracker::SPECIAL;
    }

    /// Makes the command a part of a long request.
    pub(super) fn make_part(&mut self, part: Part) {
        (self.parent, self.next, self.at) = (part.parent, part.bounce, part.at);
        self.mark(Tracker::PART);
    }

    /// Of which long request it is which part, if it is one.
    pub(super) fn part(&self) -> Option<Part> {
        let part = Part { parent: self.parent, bounce: self.next, at: self.at };
        self.is(Tracker::PART).then_some(part)
    }

    pub(super) fn command(&self) -> Command {
        Command { head: self.head, prps: self.prps, cdw10_11: self.cdw10_11, cdw12: self.cdw12 }
    }

    /// Gives the tracker another CID, so that completions under the old one are stale. Of what it is in
    /// now, sets `flags` alone.
    pub(super) fn renew(&mut self, flags: u32) {
        let kept = self.live & (Tracker::PART | !(Tracker::RETRY - 1));
        let special = if flags | kept != 0 { Tracker::SPECIAL } else { 0 };
        let cid = self.cid().wrapping_add(1 << SLOT_BITS);
        self.live = u32::from(cid) | flags | kept | special;
    }
}

/// All trackers of a queue pair, and which are free: last in, first out, for the warmest line.
pub(super) struct Trackers {
    items: Box<[Tracker]>,
    /// First of the free slots, which form a list that ends at a slot that does not exist.
    free: u16,
    free_len: u32,
}

impl Trackers {
    pub(super) fn new(count: usize) -> Trackers {
        assert!(count <= MAX_TRACKERS, "a slot fits its bits of a CID");
        let none = Tracker {
            tag: Tag::new(0, 0, 0),
            sent: 0,
            live: 0,
            parent: 0,
            next: 0,
            prps: Prps { prp1: 0, prp2: 0 },
            cdw10_11: 0,
            head: 0,
            cdw12: 0,
            at: 0,
        };
        let mut items = vec![none; count].into_boxed_slice();
        for (slot, t) in items.iter_mut().enumerate() {
            t.live = slot as u32;
            t.mark(Tracker::FREE);
            t.next = slot as u16 + 1;
        }
        Trackers { items, free: 0, free_len: count as u32 }
    }

    #[inline]
    pub(super) fn free_len(&self) -> usize {
        self.free_len as usize
    }

    /// Commands that are not free.
    pub(super) fn busy(&self) -> usize {
        self.items.len() - self.free_len as usize
    }

    /// The slot that [`Trackers::take`] would take.
    #[inline]
    pub(super) fn next(&self) -> Option<usize> {
        let slot = usize::from(self.free);
        (slot < self.items.len()).then_some(slot)
    }

    /// Takes the slot that [`Trackers::next`] named, for this command; returns its CID.
    #[inline(always)]
    pub(super) fn take(&mut self, slot: usize, command: &Command, tag: Tag, now: u64) -> u16 {
        let t = &mut self.items[slot];
        self.free = t.next;
        self.free_len -= 1;
        let cid = t.cid();
        t.tag = tag;
        t.sent = now;
        t.live = u32::from(cid);
        t.prps = command.prps;
        t.cdw10_11 = command.cdw10_11;
        t.head = command.head;
        t.cdw12 = command.cdw12;
        cid
    }

    /// Ends the use of a slot. Once for each time it was taken.
    pub(super) fn free(&mut self, slot: usize) {
        let t = &mut self.items[slot];
        t.live = u32::from(t.cid());
        t.renew(Tracker::FREE);
        t.next = self.free;
        self.free = slot as u16;
        self.free_len += 1;
    }

    /// Ends the use of the slot that a completion names if it is in flight under exactly this CID, as a
    /// whole request with nothing special about it, and has succeeded. Returns who is to be told.
    /// The list of free slots begins at `free` meanwhile: [`Trackers::set_first_free`] and
    /// [`Trackers::count_free`] are told of it later.
    #[inline(always)]
    pub(super) fn free_plain(&mut self, done: LastDword, free: &mut u16) -> Option<Tag> {
        let slot = slot_of(done.cid());
        let t = self.items.get_mut(slot)?;
        if t.live != done.bits() {
            return None;
        }
        // The next CID. It may flow over into the bit that is set then.
        t.live = (done.bits() + (1 << SLOT_BITS)) | Tracker::SPECIAL | Tracker::FREE;
        t.next = *free;
        *free = slot as u16;
        Some(t.tag)
    }

    /// Where the list of free slots begins.
    #[inline(always)]
    pub(super) fn first_free(&self) -> u16 {
        self.free
    }

    /// It begins there now.
    #[inline(always)]
    pub(super) fn set_first_free(&mut self, slot: u16) {
        self.free = slot;
    }

    /// So many slots were freed by [`Trackers::free_plain`].
    #[inline]
    pub(super) fn count_free(&mut self, count: u32) {
        self.free_len += count;
    }

    #[inline]
    pub(super) fn get_mut(&mut self, slot: usize) -> Option<&mut Tracker> {
        self.items.get_mut(slot)
    }

    pub(super) fn items(&self) -> &[Tracker] {
        &self.items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        Command {
            head: Command::head(2, 1),
            prps: Prps { prp1: 8, prp2: 9 },
            cdw10_11: 7 << 32 | 6,
            cdw12: 5,
        }
    }

    #[test]
    fn every_use_of_a_slot_has_its_own_cid_for_a_while() {
        let mut t = Trackers::new(MAX_TRACKERS);
        let mut seen = Vec::new();
        for _ in 0..64 {
            let slot = t.next().unwrap();
            let cid = t.take(slot, &command(), Tag::new(1, 2, 3), 4);
            assert_eq!((slot_of(cid), slot), (slot, 0), "last in, first out");
            assert!(!seen.contains(&cid));
            seen.push(cid);
            t.free(slot);
        }
    }

    #[test]
    fn no_cid_is_ffff() {
        let mut t = Trackers::new(MAX_TRACKERS);
        for slot in (0..MAX_TRACKERS).take(MAX_TRACKERS) {
            for _ in 0..64 {
                t.items[slot].renew(Tracker::FREE);
                assert_ne!(t.items[slot].cid(), u16::MAX);
            }
        }
    }

    #[test]
    fn a_command_is_sent_again_as_it_was() {
        let mut t = Trackers::new(4);
        let slot = t.next().unwrap();
        let cid = t.take(slot, &command(), Tag::new(1, 2, 3), 4);
        let again = t.items[slot].command();
        assert_eq!(again, command());
        assert_eq!(again.first(cid), 2 | u64::from(cid) << 16 | 1 << 32);
        assert_eq!(t.items[slot].part(), None);
        // As a part of another request, and again, under other CIDs.
        let part = Part { parent: 3, bounce: NO_BOUNCE, at: 4096 };
        t.items[slot].make_part(part);
        for n in 1..=4 {
            t.items[slot].count_retry();
            t.items[slot].renew(Tracker::WAITS);
            t.items[slot].renew(0);
            let again = &t.items[slot];
            assert_eq!(
                (again.retries(), again.part(), again.command()),
                (n, Some(part), command())
            );
            assert!(again.cid() != cid && !again.is(Tracker::WAITS | Tracker::FREE));
        }
        t.free(slot);
        t.take(slot, &command(), Tag::new(1, 2, 4), 4);
        assert_eq!((t.items[slot].retries(), t.items[slot].part()), (0, None));
    }

    fn free_plain(t: &mut Trackers, done: LastDword) -> Option<Tag> {
        let mut free = t.first_free();
        let tag = t.free_plain(done, &mut free);
        t.set_first_free(free);
        tag
    }

    #[test]
    fn only_a_success_under_the_very_cid_ends_a_command_the_short_way() {
        let mut t = Trackers::new(MAX_TRACKERS);
        // All CIDs of a slot, also where they flow over.
        for n in 0..200u32 {
            let slot = t.next().unwrap();
            let cid = t.take(slot, &command(), Tag::new(1, 2, n), 4);
            let word = |status: u32, cid: u16| LastDword::of(status << 17 | u32::from(cid));
            for status in 1..1 << 15 {
                assert_eq!(free_plain(&mut t, word(status, cid)), None);
            }
            for other in (0..=u16::MAX).filter(|&other| other != cid) {
                assert_eq!(free_plain(&mut t, word(0, other)), None);
            }
            for flag in [Tracker::LATE, Tracker::WAITS, Tracker::PART] {
                let live = t.items[slot].live;
                t.items[slot].mark(flag);
                for status in (0..1 << 15).chain([flag >> 17]) {
                    assert_eq!(free_plain(&mut t, word(status, cid)), None);
                }
                t.items[slot].live = live;
            }
            assert_eq!(free_plain(&mut t, word(0, cid)), Some(Tag::new(1, 2, n)));
            t.count_free(1);
            for status in 0..1 << 15 {
                assert_eq!(free_plain(&mut t, word(status, cid)), None, "it is free");
                let next = word(status, t.items[slot].cid());
                assert_eq!(free_plain(&mut t, next), None);
            }
            assert_eq!(t.busy(), 0);
        }
    }

    #[test]
    fn all_are_taken_once() {
        let mut t = Trackers::new(5);
        let mut slots: Vec<_> = (0..5)
            .map(|_| {
                let slot = t.next().unwrap();
                t.take(slot, &command(), Tag::new(0, 0, 0), 0);
                slot
            })
            .collect();
        assert_eq!((t.next(), t.busy()), (None, 5));
        slots.sort_unstable();
        assert_eq!(slots, [0, 1, 2, 3, 4]);
    }
}
