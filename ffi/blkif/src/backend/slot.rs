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
    /// operation and length is not set, nor is the offset if the ring keeps that
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

/// A request of the guest. What the straight path needs, and nearly all else, is one cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Slot {
    /// Its page of the buffers: see [`super::Backend::buffer_at`]. Never changes.
    pub(super) page: Seg,
    /// The guest's name for it.
    pub(super) id: u64,
    /// First byte on the disk.
    pub(super) offset: u64,
    /// The one segment of a request that has one.
    pub(super) word: u64,
    /// Counts what came back from the disk to this slot: the lower half of its tags.
    pub(super) generation: u32,
    /// The upper half of its tags. Never changes.
    pub(super) upper: u32,
    /// Bytes of data; of a discard, of the part at the disk.
    pub(super) len: u32,
    /// How many segments, if it has a large buffer.
    pub(super) listed: u16,
    /// Its large buffer, if it has more than one segment or an indirect list.
    pub(super) large: u16,
    /// The next free slot, while this one is free.
    pub(super) next: u16,
    /// What its answer names.
    pub(super) operation: u8,
    pub(super) stage: Stage,
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

impl Slot {
    const FREE: Slot = Slot {
        page: Seg::NONE,
        id: 0,
        offset: 0,
        word: 0,
        generation: 0,
        upper: 0,
        len: 0,
        listed: 0,
        large: NO_BUFFER,
        next: 0,
        operation: 0,
        stage: Stage::Free,
        mapping: false,
        held: false,
        tries: 0,
        pages: 0,
        status: 0,
        due: 0,
        mark: 0,
    };

    /// How many segments of data it has. Not for discards.
    pub(super) fn segments(&self) -> usize {
        if self.large == NO_BUFFER { usize::from(self.len > 0) } else { usize::from(self.listed) }
    }

    /// Slot number `index` as it is at first.
    pub(super) fn first(owner: u16, index: u16, page: Seg) -> Slot {
        let upper = (Tag::new(owner, index, 0).bits() >> 32) as u32;
        Slot { page, upper, next: index + 1, ..Slot::FREE }
    }

    /// The same, for another request.
    pub(super) fn fresh(&self) -> Slot {
        let Slot { page, upper, generation, .. } = *self;
        Slot { page, upper, generation, ..Slot::FREE }
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

const _: () = assert!(std::mem::offset_of!(Slot, status) == 64 && size_of::<Slot>() == 128);
