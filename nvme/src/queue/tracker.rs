//! [`Tracker`]: what is known of a command while the device has it; and the free list.
//!
//! A command identifier is a tracker's slot with a generation above it. A completion is followed
//! only if it names a tracker that is in flight under exactly this identifier, so a late, doubled
//! or invented one does nothing.

use block::Tag;
use nvme_spec::Sqe;

use crate::prp::Prps;

/// Low bits of a CID that hold the slot; the rest is the generation. No slot has all of them set,
/// so a CID is never FFFFh, which means "none" in the error log.
const SLOT_BITS: u32 = 10;
pub(super) const MAX_TRACKERS: usize = (1 << SLOT_BITS) - 1;

/// The slot that a CID names.
#[inline]
pub(super) fn slot_of(cid: u16) -> usize {
    usize::from(cid & ((1 << SLOT_BITS) - 1))
}

/// Says that a tracker belongs to no long request.
pub(super) const NO_PARENT: u16 = u16::MAX;
/// Says that a tracker has no bounce buffer.
pub(super) const NO_BOUNCE: u16 = u16::MAX;

/// A command without its identifier.
#[derive(Clone, Copy)]
pub(super) struct Command {
    pub(super) opcode: u8,
    pub(super) nsid: u32,
    pub(super) prps: Prps,
    /// CDW10 in the low half, CDW11 in the high half.
    pub(super) cdw10_11: u64,
    pub(super) cdw12: u32,
}

impl Command {
    #[inline]
    pub(super) fn sqe(&self, cid: u16) -> Sqe {
        Sqe::new(self.opcode, cid, self.nsid)
            .with_prps(self.prps.prp1, self.prps.prp2)
            .with_cdw(0, self.cdw10_11 as u32)
            .with_cdw(1, (self.cdw10_11 >> 32) as u32)
            .with_cdw(2, self.cdw12)
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
    /// completion belongs here and needs nothing special.
    pub(super) live: u32,
    /// The long request that the command is a part of.
    pub(super) parent: u16,
    /// Its bounce buffer.
    pub(super) bounce: u16,
    prps: Prps,
    cdw10_11: u64,
    nsid: u32,
    cdw12: u32,
    /// Which byte of the long request it begins with.
    pub(super) at: u32,
    opcode: u8,
    pub(super) retries: u8,
    /// The next free slot, while this one is free.
    next: u16,
}

const _: () = assert!(size_of::<Tracker>() == 64);
const _: () = assert!(std::mem::offset_of!(Tracker, bounce) < 32);

impl Tracker {
    /// Not in use; the CID is that of the next use.
    pub(super) const FREE: u32 = 1 << 16;
    /// Overdue; its completion is still good.
    pub(super) const LATE: u32 = 1 << 17;
    /// Not with the device: waits to be sent again.
    pub(super) const WAITS: u32 = 1 << 18;

    #[inline]
    pub(super) fn cid(&self) -> u16 {
        self.live as u16
    }

    pub(super) fn is(&self, flag: u32) -> bool {
        self.live & flag != 0
    }

    pub(super) fn command(&self) -> Command {
        Command {
            opcode: self.opcode,
            nsid: self.nsid,
            prps: self.prps,
            cdw10_11: self.cdw10_11,
            cdw12: self.cdw12,
        }
    }

    /// Gives the tracker another CID, so that completions under the old one are stale. Keeps
    /// nothing of the flags but `flags`.
    #[inline]
    pub(super) fn renew(&mut self, flags: u32) {
        self.live = u32::from(self.cid().wrapping_add(1 << SLOT_BITS)) | flags;
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
            live: Tracker::FREE,
            parent: NO_PARENT,
            bounce: NO_BOUNCE,
            prps: Prps { prp1: 0, prp2: 0 },
            cdw10_11: 0,
            nsid: 0,
            cdw12: 0,
            at: 0,
            opcode: 0,
            retries: 0,
            next: 0,
        };
        let mut items = vec![none; count].into_boxed_slice();
        for (slot, t) in items.iter_mut().enumerate() {
            t.live = slot as u32 | Tracker::FREE;
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
        t.parent = NO_PARENT;
        t.bounce = NO_BOUNCE;
        t.prps = command.prps;
        t.cdw10_11 = command.cdw10_11;
        t.nsid = command.nsid;
        t.cdw12 = command.cdw12;
        t.opcode = command.opcode;
        t.retries = 0;
        cid
    }

    /// Ends the use of a slot. Once for each time it was taken.
    pub(super) fn free(&mut self, slot: usize) {
        let t = &mut self.items[slot];
        t.renew(Tracker::FREE);
        t.next = self.free;
        self.free = slot as u16;
        self.free_len += 1;
    }

    /// Ends the use of the slot that `cid` names if it is in flight under exactly this CID, as a
    /// whole request with nothing special about it. Returns who is to be told.
    #[inline(always)]
    pub(super) fn free_plain(&mut self, cid: u16) -> Option<Tag> {
        let slot = slot_of(cid);
        let t = self.items.get_mut(slot)?;
        if t.live != u32::from(cid) || t.parent != NO_PARENT {
            return None;
        }
        t.renew(Tracker::FREE);
        t.next = self.free;
        self.free = slot as u16;
        self.free_len += 1;
        Some(t.tag)
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
            opcode: 2,
            nsid: 1,
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
        let again = t.items[slot].command().sqe(cid);
        assert_eq!(again, command().sqe(cid));
        assert_eq!((again.slba(), again.dword(2)), (7 << 32 | 6, 5));
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
