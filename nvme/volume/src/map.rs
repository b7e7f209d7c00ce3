//! [`Map`]: where the bytes of a volume are. Plain data without references: it may be given to a
//! reactor, whose queues to the devices go by it ([`block::SplitQueue`]), and a newer one after the
//! volume has grown.

use std::ops::Range;

use block::{Layout, Place, Stripes};

use crate::label::SECTOR;
use crate::model::{Lv, Vg};

/// Where the bytes of a volume are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Map {
    segments: Vec<Piece>,
    /// The areas of all segments, in their order.
    areas: Vec<Area>,
    len: u64,
    align: u64,
    run: u64,
}

/// A segment in bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Piece {
    /// First byte of the volume.
    start: u64,
    len: u64,
    /// Its first area.
    first: usize,
    /// How its bytes are dealt out to its areas.
    stripes: Stripes,
}

/// What a segment has on one device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Area {
    pv: usize,
    /// First byte on the device.
    begin: u64,
}

/// Bytes of a device in a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Index into [`Vg::pvs`].
    pub pv: usize,
    /// First byte on the device.
    pub offset: u64,
    /// How many follow each other there and in the volume.
    pub len: u64,
}

impl Map {
    /// The map of a volume. The group has been checked, so that nothing overflows.
    pub(crate) fn new(vg: &Vg, lv: &Lv) -> Map {
        let extent = vg.extent_bytes();
        let len = lv.extents() * extent;
        let (segments, areas) = (Vec::new(), Vec::new());
        let mut map = Map { segments, areas, len, align: 1 << 63, run: u64::MAX };
        for segment in &lv.segments {
            let (count, len) = (segment.areas.len(), segment.count * extent);
            let stripe = segment.stripe_size * SECTOR;
            let stripes = match count {
                1 => Stripes::linear(len),
                _ => Stripes::new(stripe, count, len).expect("a checked group has such stripes"),
            };
            map.run = map.run.min(if count == 1 { len } else { stripe });
            let (start, first) = (segment.start * extent, map.areas.len());
            map.segments.push(Piece { start, len, first, stripes });
            map.align = map.align.min(lowest_bit(len));
            for place in &segment.areas {
                let begin = vg.pvs[place.pv].pe_start * SECTOR + place.extent * extent;
                map.align = map.align.min(lowest_bit(begin));
                map.areas.push(Area { pv: place.pv, begin });
            }
        }
        map
    }

    /// Bytes of the volume.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the volume has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The largest power of two of which every run's first byte, on its device and in the volume, is
    /// a multiple, unless a stripe is smaller.
    pub fn align(&self) -> u64 {
        self.align
    }

    /// Where a byte is, and how many more from there on. `None`: past the end.
    pub fn find(&self, offset: u64) -> Option<Extent> {
        let Place { member: pv, offset, len } = self.locate(offset);
        (len > 0).then_some(Extent { pv, offset, len })
    }

    /// Whether the volume of this map is the one of `old` or has become longer, and nothing of it
    /// has moved.
    pub fn extends(&self, old: &Map) -> bool {
        let same = |(at, (new, was)): (usize, (&Piece, &Piece))| {
            let last = at + 1 == old.segments.len();
            let kind = new.stripes.resized(0) == was.stripes.resized(0);
            let len = new.len == was.len || last && new.len > was.len;
            (new.start, new.first) == (was.start, was.first) && kind && len
        };
        self.segments.len() >= old.segments.len()
            && self.segments.iter().zip(&old.segments).enumerate().all(same)
            && self.areas.starts_with(&old.areas)
    }

    /// The segment that has a byte, or the last one.
    #[inline]
    fn segment(&self, at: u64) -> Option<&Piece> {
        let after = self.segments.partition_point(|piece| piece.start <= at);
        self.segments.get(after.checked_sub(1)?)
    }
}

fn lowest_bit(n: u64) -> u64 {
    1 << n.trailing_zeros().min(63)
}

/// Members are the devices, in the order of [`Vg::pvs`]. A piece is what a segment has on a device.
impl Layout for Map {
    const SHARED: bool = true;

    fn nothing() -> Map {
        Map { segments: Vec::new(), areas: Vec::new(), len: 0, align: 1 << 63, run: u64::MAX }
    }

    fn size(&self) -> u64 {
        self.len
    }

    fn members(&self) -> usize {
        self.areas.iter().map(|area| area.pv + 1).max().unwrap_or(0)
    }

    fn run(&self) -> u64 {
        self.run
    }

    #[inline]
    fn locate(&self, at: u64) -> Place {
        const NOWHERE: Place = Place { member: 0, offset: 0, len: 0 };
        let Some(piece) = self.segment(at) else { return NOWHERE };
        let within = at - piece.start;
        let place = piece.stripes.locate(within);
        let Some(area) = self.areas.get(piece.first + place.member) else { return NOWHERE };
        let len = place.len.min(piece.len.saturating_sub(within));
        Place { member: area.pv, offset: area.begin.wrapping_add(place.offset), len }
    }

    fn pieces(&self, offset: u64, len: u64) -> Range<u64> {
        let last = len.checked_sub(1).and_then(|more| offset.checked_add(more));
        let (Some(from), Some(to)) = (self.segment(offset), last.and_then(|at| self.segment(at)))
        else {
            return 0..0;
        };
        from.first as u64..(to.first + to.stripes.members()) as u64
    }

    fn piece(&self, piece: u64, offset: u64, len: u64) -> Place {
        let at = piece as usize;
        let after = self.segments.partition_point(|p| p.first <= at);
        let p = &self.segments[after - 1];
        let from = offset.clamp(p.start, p.start + p.len) - p.start;
        let to = (offset + len).clamp(p.start, p.start + p.len) - p.start;
        let place = p.stripes.piece((at - p.first) as u64, from, to - from);
        let area = self.areas[at];
        Place { member: area.pv, offset: area.begin + place.offset, len: place.len }
    }

    fn uses(&self, member: usize) -> bool {
        self.areas.iter().any(|area| area.pv == member)
    }

    fn end_on(&self, member: usize) -> u64 {
        let ends = self.segments.iter().flat_map(|p| {
            let count = p.stripes.members();
            let areas = &self.areas[p.first..p.first + count];
            let here = areas.iter().filter(move |area| area.pv == member);
            here.map(move |area| area.begin + p.len / count as u64)
        });
        ends.max().unwrap_or(0)
    }
}
