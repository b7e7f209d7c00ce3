//! Requests: what is asked, of which unit, with which data, and to whom the answer goes.

use dma::{Region, Seg};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::{Completions, DeviceInfo};

/// Most segments that a request to a leaf may have: a guest's 128 KiB of 32 pages that begin within
/// a page ([`MAX_GUEST_SEGS`]), and what an image puts before and behind it to fill a cluster.
pub const MAX_SEGS: usize = 36;

/// Most segments that a frontend may put into a request.
pub const MAX_GUEST_SEGS: usize = 33;

/// Says to whom a completion goes: owner, the owner's slot, and the slot's generation.
///
/// The generation tells an answer to this request from a late or doubled answer to an earlier one
/// in the same slot: whoever gets a tag of the wrong generation counts it and follows it no further.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(transparent)]
pub struct Tag(u64);

impl Tag {
    /// Makes a tag. `owner` is the number that the reactor gave to the image or frontend.
    #[inline]
    pub const fn new(owner: u16, slot: u16, generation: u32) -> Tag {
        Tag((owner as u64) << 48 | (slot as u64) << 32 | generation as u64)
    }

    /// Who is to get the completion.
    #[inline]
    pub const fn owner(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// The bit of the owner that is a layer's to use where it sends a frontend's request on under this
    /// tag: two kinds of those can be told apart by it ([`crate::Layer::ended`]). No owner has it.
    pub const MARK: u16 = 1 << 14;

    /// The same with [`Tag::MARK`].
    #[inline]
    pub const fn with_mark(self) -> Tag {
        Tag(self.0 | Tag::new(Tag::MARK, 0, 0).0)
    }

    /// The same without [`Tag::MARK`].
    #[inline]
    pub const fn without_mark(self) -> Tag {
        Tag(self.0 & !Tag::new(Tag::MARK, 0, 0).0)
    }

    /// Which of the owner's slots.
    #[inline]
    pub const fn slot(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// Which use of the slot.
    #[inline]
    pub const fn generation(self) -> u32 {
        self.0 as u32
    }

    /// As one word.
    #[inline]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// From [`Tag::bits`].
    #[inline]
    pub const fn from_bits(bits: u64) -> Tag {
        Tag(bits)
    }
}

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum Op {
    /// Device to segments.
    Read = 0,
    /// Segments to device.
    Write = 1,
    /// All writes that completed before this was submitted become durable. Offset and length 0.
    Flush = 2,
    /// The range reads as zeroes afterwards. No segments.
    WriteZeroes = 3,
    /// The range is not needed any more: a hint, and what it reads as afterwards is the device's
    /// affair. No segments.
    Discard = 4,
}

/// Modifiers of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct Flags(u8);

impl Flags {
    /// None.
    pub const NONE: Flags = Flags(0);
    /// The write is durable before it completes (force unit access).
    pub const FUA: Flags = Flags(1);
    /// WriteZeroes: the space must stay allocated.
    pub const NO_UNMAP: Flags = Flags(2);
    /// WriteZeroes: fail with `Unsupported` rather than write zeroes the slow way.
    pub const FAST_ONLY: Flags = Flags(4);

    /// As a number.
    #[inline]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Whether all of `other` is set here.
    #[inline]
    pub fn has(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both together.
    #[inline]
    pub const fn with(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}

/// A request. Lives only for the call of [`Submit::submit`]; what the queue needs longer it copies.
/// The buffers behind `segs` stay with the submitter until the completion comes.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Comes back in the completion.
    pub tag: Tag,
    /// What to do.
    pub op: Op,
    /// Modifiers.
    pub flags: Flags,
    /// Which namespace, file or memory of the queue; 0 where there is one.
    pub unit: u16,
    /// Where, in bytes; a multiple of the unit's block size.
    pub offset: u64,
    /// How much, in bytes; a multiple of the unit's block size.
    pub len: u64,
    /// The data of a Read or Write: at least 1 and at most [`MAX_SEGS`] segments whose lengths add
    /// up to `len`. Empty for other operations. A leaf takes segments of any alignment to 4 bytes
    /// and any length that is a multiple of 512.
    pub segs: &'a [Seg],
}

impl Request<'_> {
    /// Whether the segments fit operation and length.
    #[inline]
    pub fn segs_fit(&self) -> bool {
        match self.op {
            Op::Read | Op::Write => {
                self.segs.len() <= MAX_SEGS
                    && self.len > 0
                    && self.segs.iter().map(|s| u64::from(s.len())).sum::<u64>() == self.len
            }
            _ => self.segs.is_empty(),
        }
    }
}

/// The queue has no place for the request now; nothing of it was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// Whether something is waiting to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HasWork {
    /// Nothing; sleeping is safe.
    No,
    /// Something: poll again.
    Yes,
}

/// Where requests can be sent: the submitting half of a queue, and all that a frontend sees.
pub trait Submit {
    /// What the unit is like; `None` if there is no such unit.
    fn info(&self, unit: u16) -> Option<&DeviceInfo>;

    /// How many requests will certainly be taken now, each counted with its worst fan-out.
    fn room(&self) -> usize;

    /// Takes the request whole or not at all. Never completes it before returning: a request that
    /// is wrong is taken too, and its completion says so.
    ///
    /// # Errors
    /// [`Full`] if there is no place; never while [`Submit::room`] is not 0.
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full>;

    /// Requests that begin at these sectors of 512 bytes are about to come: what will be looked up for them may
    /// be fetched meanwhile, all at once instead of one after the other. Sectors may be any; nothing changes.
    #[inline(always)]
    fn prefetch(&self, _sectors: impl Iterator<Item = u64>)
    where
        Self: Sized,
    {
    }
}

/// A leaf: the queue of one reactor to one device.
pub trait BlockQueue: Submit {
    /// Makes a region's memory known, so that segments of it can be resolved. Control path. A
    /// request with a segment of an unknown region completes with `Invalid`.
    ///
    /// # Errors
    /// Says why the device cannot reach this memory.
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String>;

    /// Starts what was submitted (rings doorbells once) and hands out what completed, as far as
    /// `out` has room. Returns how many were added.
    fn poll(&mut self, out: &mut Completions) -> usize;

    /// Starts what was submitted, without looking for completions. The reactor calls it at the end
    /// of a turn, so that nothing waits for the next one; a poll does the same first.
    fn start(&mut self) {}

    /// Requests taken and not yet handed out as completed.
    fn in_flight(&self) -> usize;

    /// The final check before the reactor sleeps: asks for a wake-up where the leaf has one, and
    /// says whether there is work after all. A leaf without a wake-up says [`HasWork::Yes`] while
    /// anything is in flight.
    fn arm(&mut self) -> HasWork;

    /// A descriptor that becomes readable when a completion waits, for a reactor that sleeps with
    /// requests in flight (the leaf clears it itself); `None` if the leaf must be polled.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Tells the queue the reactor's time, in nanoseconds, once in each turn: for deadlines. Time
    /// goes back only when nothing is in flight: the queue has another owner.
    fn set_now(&mut self, _now: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_keep_their_parts() {
        let t = Tag::new(0xabcd, 0x1234, 0xdead_beef);
        assert_eq!((t.owner(), t.slot(), t.generation()), (0xabcd, 0x1234, 0xdead_beef));
        assert_eq!(Tag::from_bits(t.bits()), t);
        let t = Tag::new(7, 0x1234, 1);
        let marked = t.with_mark();
        assert_eq!((marked.owner(), marked.slot()), (7 | Tag::MARK, 0x1234));
        assert_eq!((marked.without_mark(), marked.with_mark()), (t, marked));
    }

    #[test]
    fn segments_must_add_up() {
        let region = Region::new(8192, dma::PageSize::Small).unwrap();
        let segs = [region.seg(0, 4096).unwrap(), region.seg(4096, 512).unwrap()];
        let mut r = Request {
            tag: Tag::new(0, 0, 0),
            op: Op::Read,
            flags: Flags::NONE,
            unit: 0,
            offset: 0,
            len: 4608,
            segs: &segs,
        };
        assert!(r.segs_fit());
        r.len = 4096;
        assert!(!r.segs_fit());
        r.op = Op::Flush;
        assert!(!r.segs_fit());
        r.segs = &[];
        assert!(r.segs_fit());
    }

    #[test]
    fn flags_combine() {
        let f = Flags::FUA.with(Flags::NO_UNMAP);
        assert!(f.has(Flags::FUA) && f.has(Flags::NO_UNMAP) && !f.has(Flags::FAST_ONLY));
    }
}
