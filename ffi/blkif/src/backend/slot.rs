//! [`Slot`]: a request of the guest that was taken and not yet answered.

use block::Tag;
use dma::Seg;

/// No large buffer.
pub(super) const NO_BUFFER: u16 = u16::MAX;

/// Where a request is on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// No request here.
    Free,
    /// At the disk: a read of a whole page to which nothing unusual has happened. What the slot says of
    /// operation and length is not set, nor are offset, name and segment if the ring keeps those
    /// ([`crate::RingMemory::KEEPS`]).
    PageRead,
    /// The same of a write.
    PageWrite,
    /// At the disk: a read or write of a part of a page to which nothing unusual has happened.
    Plain,
    /// At the disk: its read or write.
    AtData,
    /// At the disk: its flush, alone or before its write.
    AtFlush,
    /// At the disk: a part of its discard.
    AtDiscard,
    /// Its pages of segments are to be copied in, or are in the batch.
    Fetch,
    /// Its data is to be copied in, or is in the batch.
    Gather,
    /// Its data is to be copied out, or is in the batch.
    Scatter,
    /// Its read or write is to be sent to the disk.
    PutData,
    /// Its flush is to be sent to the disk.
    PutFlush,
    /// The next part of its discard is to be sent to the disk.
    PutDiscard,
    /// A barrier that waits for all before it.
    Barrier,
    /// Its answer waits for mappings to end.
    Maps,
    /// It is refused: its answer waits for the next turn, see [`super::Backend`].
    Refused,
    /// An empty flush that failed for good: never answered, since every answer that says so would
    /// be reported as success by the guest.
    Held,
}

/// A request of the guest. What the straight path needs for a whole page is one cache line.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Slot<E> {
    /// Its page of the buffers: see [`super::Backend::buffer_at`]. Never changes.
    pub(super) page: Seg,
    /// Where it is kept: see [`crate::RingMemory::Entry`]. Never changes.
    pub(super) entry: E,
    /// Counts what came back from the disk to this slot: the lower half of its tags.
    pub(super) generation: u32,
    /// The upper half of its tags. Never changes.
    pub(super) upper: u32,
    /// The next free slot, while this one is free.
    pub(super) next: u16,
    pub(super) stage: Stage,
    /// What its answer names.
    pub(super) operation: u8,
    /// How many segments, if it has a large buffer.
    pub(super) listed: u16,
    /// Its large buffer, if it has more than one segment or an indirect list.
    pub(super) large: u16,
    /// The guest's name for it.
    pub(super) id: u64,
    /// The one segment of a request that has one.
    pub(super) word: u64,
    /// First byte on the disk.
    pub(super) offset: u64,
    /// Bytes of data; of a discard, of the part at the disk.
    pub(super) len: u32,
    /// Some page of it is being mapped: its answer must wait for that.
    pub(super) mapping: bool,
    /// Counted in the backend's held writes.
    pub(super) held: bool,
    /// Attempts that failed so far.
    pub(super) tries: u8,
    /// Pages of segments.
    pub(super) pages: u8,
    /// The answer that waits in [`Stage::Maps`] or [`Stage::Refused`].
    pub(super) status: i16,
    /// Nothing is to be done before this time.
    pub(super) due: u64,
    /// End of a discard in bytes; or the time since when a write has been held.
    pub(super) mark: u64,
}

impl<E> Slot<E> {
    /// Slot number `index` as it is at first.
    pub(super) fn first(owner: u16, index: u16, page: Seg, entry: E) -> Slot<E> {
        let upper = (Tag::new(owner, index, 0).bits() >> 32) as u32;
        Slot {
            page,
            entry,
            generation: 0,
            upper,
            next: index + 1,
            stage: Stage::Free,
            operation: 0,
            listed: 0,
            large: NO_BUFFER,
            id: 0,
            word: 0,
            offset: 0,
            len: 0,
            mapping: false,
            held: false,
            tries: 0,
            pages: 0,
            status: 0,
            due: 0,
            mark: 0,
        }
    }

    /// Makes it that of another request, of which nothing but this is known yet.
    pub(super) fn renew(&mut self, id: u64, operation: u8) {
        (self.id, self.operation, self.stage) = (id, operation, Stage::Free);
        (self.word, self.offset, self.len) = (0, 0, 0);
        (self.listed, self.large, self.pages) = (0, NO_BUFFER, 0);
        (self.mapping, self.held, self.tries) = (false, false, 0);
        (self.status, self.due, self.mark) = (0, 0, 0);
    }

    /// How many segments of data it has. Not for discards.
    pub(super) fn segments(&self) -> usize {
        if self.large == NO_BUFFER { usize::from(self.len > 0) } else { usize::from(self.listed) }
    }

    /// The tag of what is at the disk from this slot, or is sent there next.
    #[inline]
    pub(super) fn tag(&self) -> Tag {
        Tag::from_bits(u64::from(self.upper) << 32 | u64::from(self.generation))
    }

    /// That came back: an answer to this tag is a stray from now on.
    #[inline]
    pub(super) fn came_back(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    pub(super) fn at_disk(&self) -> bool {
        use Stage::{AtData, AtDiscard, AtFlush, PageRead, PageWrite, Plain};
        matches!(self.stage, PageRead | PageWrite | Plain | AtData | AtFlush | AtDiscard)
    }
}

const _: () = {
    // Of one whose request is kept: of others there is less.
    type Kept = Slot<<crate::KeptRing<crate::RegionRing> as crate::RingMemory>::Entry>;
    assert!(std::mem::offset_of!(Kept, id) <= 64 && size_of::<Kept>() == 128);
};
