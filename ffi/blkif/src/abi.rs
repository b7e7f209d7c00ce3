//! The layout of ring pages and slots, for each ABI that a frontend may choose (blkif.h).
//!
//! Pure but for the loads and stores that it is handed a [`RingMemory`] for. Used by both ends of
//! a ring, on whatever thread they run.
//!
//! The ABI is one predictable branch per slot instead of a type parameter: the two layouts differ
//! in the alignment of `id` only, the branch costs two instructions, and everything above the ring
//! exists once.

use crate::RingMemory;

/// Size of a ring page and of a granted page, whatever page size the guest's kernel has.
pub const PAGE: usize = 4096;
/// Unit of every sector number and count in a ring.
pub const SECTOR: u32 = 512;
/// Segments in a slot itself.
pub const DIRECT_SEGMENTS: usize = 11;
/// Pages of segments that an indirect request can name.
pub const INDIRECT_PAGES: usize = 8;
/// Segments in one indirect page.
pub const SEGMENTS_PER_PAGE: usize = PAGE / 8;
/// Largest ring that is offered, as a power of two of pages.
pub const MAX_ORDER: u8 = 4;

/// Offset of the producer index of requests in the first ring page.
pub const REQ_PROD: usize = 0;
/// Offset of the index at which the backend wants an event.
pub const REQ_EVENT: usize = 4;
/// Offset of the producer index of responses.
pub const RSP_PROD: usize = 8;
/// Offset of the index at which the frontend wants an event.
pub const RSP_EVENT: usize = 12;
/// Offset of the first slot.
pub const SLOTS: usize = 64;

/// `BLKIF_OP_READ`
pub const READ: u8 = 0;
/// `BLKIF_OP_WRITE`
pub const WRITE: u8 = 1;
/// `BLKIF_OP_WRITE_BARRIER`
pub const WRITE_BARRIER: u8 = 2;
/// `BLKIF_OP_FLUSH_DISKCACHE`
pub const FLUSH_DISKCACHE: u8 = 3;
/// `BLKIF_OP_DISCARD`
pub const DISCARD: u8 = 5;
/// `BLKIF_OP_INDIRECT`
pub const INDIRECT: u8 = 6;

/// `BLKIF_RSP_OKAY`
pub const OKAY: i16 = 0;
/// `BLKIF_RSP_ERROR`
pub const ERROR: i16 = -1;
/// `BLKIF_RSP_EOPNOTSUPP`
pub const EOPNOTSUPP: i16 = -2;

/// How a slot is laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Abi {
    /// 64-bit integers are aligned to 8 bytes: x86_64, and Arm of both widths.
    X86_64,
    /// 64-bit integers are aligned to 4 bytes.
    X86_32,
}

impl Abi {
    /// The layout that this machine's own compiler would choose.
    pub const NATIVE: Abi = if cfg!(target_arch = "x86") { Abi::X86_32 } else { Abi::X86_64 };

    /// Both.
    pub const ALL: [Abi; 2] = [Abi::X86_64, Abi::X86_32];

    /// Size of a slot in bytes.
    #[inline]
    pub const fn slot_size(self) -> usize {
        match self {
            Abi::X86_64 => 112,
            Abi::X86_32 => 108,
        }
    }

    /// Slots in a ring of `1 << order` pages: the largest power of two that fits.
    pub const fn slots(self, order: u8) -> u32 {
        let room = ((PAGE << order) - SLOTS) / self.slot_size();
        1 << room.ilog2()
    }

    /// Where a slot begins; `index` is below [`Abi::slots`].
    #[inline]
    pub fn slot_at(self, index: u32) -> usize {
        SLOTS + index as usize * self.slot_size()
    }

    /// Where the slot of a ring's index begins.
    #[inline]
    fn slot_of<M: RingMemory>(self, memory: &M, index: u32) -> usize {
        self.slot_at(index & memory.mask())
    }

    /// Loads what every operation needs of a slot: each byte once. Here and below `index` is one of
    /// the ring's, and is cut to it.
    #[inline(always)]
    pub(crate) fn load_head<M: RingMemory>(self, memory: &M, index: u32) -> Head {
        match self {
            Abi::X86_64 => {
                let [first, id, sector, word] = memory.load_slot::<4>(index);
                Head { first: first as u32, id, sector, word }
            }
            Abi::X86_32 => {
                let at = self.slot_of(memory, index);
                let [first, i0, i1, s0, s1, w0, w1] = memory.load32s::<7>(at);
                Head { first, id: join(i0, i1), sector: join(s0, s1), word: join(w0, w1) }
            }
        }
    }

    /// Loads the first sector of a slot alone.
    #[inline]
    pub(crate) fn load_sector<M: RingMemory>(self, memory: &M, index: u32) -> u64 {
        match self {
            // All before it, too: without anything to check that costs less.
            Abi::X86_64 => memory.load_slot::<3>(index)[2],
            Abi::X86_32 => {
                let at = self.slot_of(memory, index);
                let [low, high] = memory.load32s::<2>(at + 12);
                join(low, high)
            }
        }
    }

    /// Loads the ten 64-bit words of a slot that follow the head: each byte once.
    #[inline]
    pub(crate) fn load_tail<M: RingMemory>(self, memory: &M, index: u32) -> [u64; 10] {
        let at = self.slot_of(memory, index);
        match self {
            Abi::X86_64 => memory.load64s::<10>(at + 32),
            Abi::X86_32 => {
                let words = memory.load32s::<20>(at + 28);
                core::array::from_fn(|i| join(words[2 * i], words[2 * i + 1]))
            }
        }
    }

    /// Writes a response over slot `index`: id, operation and status; padding becomes zero.
    #[inline]
    pub(crate) fn store_response<M: RingMemory>(self, memory: &M, index: u32, r: Response) {
        let end = u32::from(r.operation) | u32::from(r.status as u16) << 16;
        match self {
            Abi::X86_64 => memory.store_slot(index, &[r.id, u64::from(end)]),
            Abi::X86_32 => {
                let at = self.slot_of(memory, index);
                memory.store32s(at, &[r.id as u32, (r.id >> 32) as u32, end]);
            }
        }
    }

    /// Loads a response: what a frontend does.
    #[inline]
    pub fn load_response<M: RingMemory>(self, memory: &M, index: u32) -> Response {
        let [i0, i1, end] = memory.load32s::<3>(self.slot_of(memory, index));
        Response { id: join(i0, i1), operation: end as u8, status: (end >> 16) as i16 }
    }

    /// Writes a request's head and the words that follow it (at most ten): what a frontend does.
    #[inline]
    pub fn store_request<M: RingMemory>(self, memory: &M, index: u32, head: Head, tail: &[u64]) {
        let at = self.slot_of(memory, index);
        let halves = |w: u64| (w as u32, (w >> 32) as u32);
        let after = match self {
            Abi::X86_64 => {
                memory.store64s(at, &[u64::from(head.first), head.id, head.sector, head.word]);
                at + 32
            }
            Abi::X86_32 => {
                let ((i0, i1), (s0, s1)) = (halves(head.id), halves(head.sector));
                let (w0, w1) = halves(head.word);
                memory.store32s(at, &[head.first, i0, i1, s0, s1, w0, w1]);
                at + 28
            }
        };
        for (i, &w) in tail.iter().take(10).enumerate() {
            let (low, high) = halves(w);
            memory.store32s(after + 8 * i, &[low, high]);
        }
    }
}

#[inline]
fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// The first fields of a slot, in the form that both ABIs share. All of it is the guest's word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// The four bytes before `id`: operation, then what the operation puts there.
    pub first: u32,
    /// The guest's name for the request; opaque.
    pub id: u64,
    /// First sector.
    pub sector: u64,
    /// The eight bytes after `sector`: first segment, number of sectors of a discard, or handle
    /// and first page of an indirect request.
    pub word: u64,
}

impl Head {
    /// A request with segments in the slot.
    pub fn direct(operation: u8, segments: u8, id: u64, sector: u64, word: u64) -> Head {
        Head { first: u32::from(operation) | u32::from(segments) << 8, id, sector, word }
    }

    /// An indirect request; `page` is the grant of its first page of segments.
    pub fn indirect(operation: u8, segments: u16, id: u64, sector: u64, page: u32) -> Head {
        let first = u32::from(INDIRECT) | u32::from(operation) << 8 | u32::from(segments) << 16;
        Head { first, id, sector, word: u64::from(page) << 32 }
    }

    /// What is asked.
    #[inline]
    pub fn operation(self) -> u8 {
        self.first as u8
    }

    /// Segments of a direct request; the flags of a discard; the operation of an indirect request.
    #[inline]
    pub fn second(self) -> u8 {
        (self.first >> 8) as u8
    }

    /// Segments of an indirect request.
    #[inline]
    pub fn indirect_segments(self) -> u16 {
        (self.first >> 16) as u16
    }

    /// The grant of an indirect request's first page of segments.
    #[inline]
    pub fn indirect_page(self) -> u32 {
        (self.word >> 32) as u32
    }
}

/// A segment as the guest wrote it: a grant, and the sectors of the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct Segment(pub u64);

impl Segment {
    /// Sectors `first..=last` of the page that `gref` grants.
    pub fn new(gref: u32, first: u8, last: u8) -> Segment {
        Segment(u64::from(gref) | u64::from(first) << 32 | u64::from(last) << 40)
    }

    /// The grant reference.
    #[inline]
    pub fn gref(self) -> u32 {
        self.0 as u32
    }

    /// First sector of the page, unchecked.
    #[inline]
    pub fn first(self) -> u32 {
        (self.0 >> 32) as u32 & 0xff
    }

    /// Last sector of the page, unchecked.
    #[inline]
    pub fn last(self) -> u32 {
        (self.0 >> 40) as u32 & 0xff
    }

    /// How many sectors, or `None` unless `first` ≤ `last` ≤ 7.
    #[inline]
    pub fn sectors(self) -> Option<u32> {
        (self.first() <= self.last() && self.last() < PAGE as u32 / SECTOR)
            .then(|| self.last() - self.first() + 1)
    }

    /// First and last sector of a whole page, as they stand behind the grant.
    pub(crate) const PAGE: u32 = (PAGE as u32 / SECTOR - 1) << 8;

    /// Where in the page it begins, in bytes. For a segment that [`Segment::sectors`] accepted.
    #[inline]
    pub fn offset(self) -> u32 {
        self.first() * SECTOR
    }

    /// Length in bytes. For a segment that [`Segment::sectors`] accepted.
    #[inline]
    pub fn bytes(self) -> u32 {
        (self.last() - self.first() + 1) * SECTOR
    }
}

/// An answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Response {
    /// As in the request.
    pub id: u64,
    /// As in the request; of an indirect request the operation that it carried.
    pub operation: u8,
    /// [`OKAY`], [`ERROR`] or [`EOPNOTSUPP`].
    pub status: i16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RegionRing;

    fn memory(order: u8) -> RegionRing {
        let region = dma::Region::new(PAGE << order, dma::PageSize::Small).unwrap();
        RegionRing::new(region, 0, order).unwrap()
    }

    #[test]
    fn slots_per_order_are_those_of_the_header() {
        for abi in Abi::ALL {
            let counts: Vec<u32> = (0..=MAX_ORDER).map(|o| abi.slots(o)).collect();
            assert_eq!(counts, [32, 64, 128, 256, 512]);
            for order in 0..=MAX_ORDER {
                let end = abi.slot_at(abi.slots(order) - 1) + abi.slot_size();
                assert!(end <= PAGE << order);
            }
        }
        assert_eq!(Abi::X86_64.slot_at(32), 3648);
        assert_eq!(Abi::X86_32.slot_at(32), 3520);
        assert_eq!(Abi::X86_64.slot_at(512), 57408);
        assert_eq!(Abi::X86_32.slot_at(512), 55360);
    }

    /// Puts numbered bytes into a slot and looks where each field comes from.
    #[test]
    fn fields_lie_where_the_header_has_them() {
        for (abi, id, sector, seg) in [(Abi::X86_64, 8, 16, 24), (Abi::X86_32, 4, 12, 20)] {
            let m = memory(0);
            let at = abi.slot_at(3);
            let bytes: Vec<u8> = (0..abi.slot_size() as u8).collect();
            m.region().write(at, &bytes);
            let field = |from: usize, len: usize| {
                bytes[from..from + len].iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b))
            };
            let h = abi.load_head(&m, 3);
            assert_eq!((h.operation(), h.second()), (0, 1));
            assert_eq!(u64::from(h.indirect_segments()), field(2, 2));
            assert_eq!((h.id, h.sector, h.word), (field(id, 8), field(sector, 8), field(seg, 8)));
            // Indirect: handle at the segments' place, then the pages.
            assert_eq!(u64::from(h.indirect_page()), field(seg + 4, 4));
            let tail = abi.load_tail(&m, 3);
            for (i, &w) in tail.iter().enumerate() {
                assert_eq!(w, field(seg + 8 + 8 * i, 8));
            }
            let s = Segment(h.word);
            assert_eq!(u64::from(s.gref()), field(seg, 4));
            assert_eq!(u64::from(s.first()), field(seg + 4, 1));
            assert_eq!(u64::from(s.last()), field(seg + 5, 1));
        }
    }

    #[test]
    fn a_response_touches_its_own_bytes_only() {
        for (abi, size) in [(Abi::X86_64, 16), (Abi::X86_32, 12)] {
            let m = memory(0);
            m.region().write(0, &[0xee; PAGE]);
            let r = Response { id: 0x1122_3344_5566_7788, operation: 5, status: EOPNOTSUPP };
            abi.store_response(&m, 7, r);
            assert_eq!(abi.load_response(&m, 7), r);
            let mut all = [0; PAGE];
            m.region().read(0, &mut all);
            let at = abi.slot_at(7);
            assert_eq!(all[at..at + 8], 0x1122_3344_5566_7788u64.to_le_bytes());
            assert_eq!(all[at + 8..at + 12], [5, 0, 0xfe, 0xff]);
            assert!(all[at + 12..at + size].iter().all(|&b| b == 0), "padding is zero");
            assert!(all[..at].iter().chain(&all[at + size..]).all(|&b| b == 0xee));
        }
    }

    #[test]
    fn requests_read_back() {
        for abi in Abi::ALL {
            let m = memory(1);
            let tail: [u64; 10] = core::array::from_fn(|i| 0x0101_0101_0101_0101 * (i as u64 + 1));
            let head = Head::direct(WRITE, 11, u64::MAX - 5, 1 << 40, Segment::new(77, 1, 6).0);
            abi.store_request(&m, 40, head, &tail);
            assert_eq!(abi.load_head(&m, 40), head);
            assert_eq!(abi.load_tail(&m, 40), tail);
        }
        let h = Head::indirect(WRITE, 513, 9, 8, 1234);
        assert_eq!((h.operation(), h.second(), h.indirect_segments()), (INDIRECT, WRITE, 513));
        assert_eq!(h.indirect_page(), 1234);
    }

    #[test]
    fn segment_bounds() {
        for first in 0..=255u8 {
            for last in 0..=255u8 {
                let s = Segment::new(0xffff_ffff, first, last);
                match s.sectors() {
                    Some(n) => {
                        assert!(first <= last && last <= 7 && n == u32::from(last - first) + 1);
                        assert!(s.offset() + s.bytes() <= PAGE as u32);
                    }
                    None => assert!(first > last || last > 7),
                }
                assert_eq!((s.0 >> 32) as u32 == Segment::PAGE, (first, last) == (0, 7));
            }
        }
    }
}
