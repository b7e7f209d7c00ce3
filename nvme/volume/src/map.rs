//! [`Map`]: where the bytes of a volume are. Plain data without references: it may be given to a
//! reactor, and a newer one after the volume has grown.

use crate::label::SECTOR;
use crate::model::{Lv, Vg};

/// Where the bytes of a volume are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Map {
    segments: Vec<Piece>,
    len: u64,
}

/// A segment in bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Piece {
    /// First byte of the volume.
    start: u64,
    len: u64,
    /// Bytes of a stripe; of a segment on one device all of its length.
    stripe: u64,
    /// Device, and first byte there.
    areas: Vec<(usize, u64)>,
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
        let piece = |segment: &crate::Segment| {
            let len = segment.count * extent;
            let place = |place: &crate::Place| {
                let begin = vg.pvs[place.pv].pe_start * SECTOR;
                (place.pv, begin + place.extent * extent)
            };
            Piece {
                start: segment.start * extent,
                len,
                stripe: if segment.areas.len() > 1 { segment.stripe_size * SECTOR } else { len },
                areas: segment.areas.iter().map(place).collect(),
            }
        };
        Map { segments: lv.segments.iter().map(piece).collect(), len: lv.extents() * extent }
    }

    /// Bytes of the volume.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the volume has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where a byte is, and how many more from there on. `None`: past the end.
    pub fn find(&self, offset: u64) -> Option<Extent> {
        let after = self.segments.partition_point(|piece| piece.start <= offset);
        let piece = self.segments.get(after.checked_sub(1)?)?;
        let at = offset - piece.start;
        if at >= piece.len {
            return None;
        }
        let (stripe, within) = (at / piece.stripe, at % piece.stripe);
        let count = piece.areas.len() as u64;
        let (pv, begin) = piece.areas[(stripe % count) as usize];
        let offset = begin + stripe / count * piece.stripe + within;
        Some(Extent { pv, offset, len: piece.stripe - within })
    }
}
