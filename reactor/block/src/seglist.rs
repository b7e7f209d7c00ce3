//! [`SegList`]: the segments of a request, kept in place by whoever outlives `submit`.

use dma::Seg;

use crate::MAX_SEGS;

/// Up to [`MAX_SEGS`] segments without memory of their own on the heap.
#[derive(Clone, Copy, Debug)]
pub struct SegList {
    items: [Seg; MAX_SEGS],
    len: usize,
}

impl SegList {
    /// None.
    pub const EMPTY: SegList = SegList { items: [Seg::NONE; MAX_SEGS], len: 0 };

    /// A copy of `segs`; `None` if there are more than fit.
    pub fn from_slice(segs: &[Seg]) -> Option<SegList> {
        let mut list = SegList::EMPTY;
        list.items.get_mut(..segs.len())?.copy_from_slice(segs);
        list.len = segs.len();
        Some(list)
    }

    /// Adds a segment if it has bytes. Returns whether there was a place.
    #[must_use]
    pub fn push(&mut self, seg: Seg) -> bool {
        if seg.len() == 0 {
            return true;
        }
        let Some(place) = self.items.get_mut(self.len) else { return false };
        *place = seg;
        self.len += 1;
        true
    }

    /// Adds the bytes `[from, from + len)` of what `other` describes. Returns whether they exist
    /// and there was room.
    #[must_use]
    pub fn push_part(&mut self, other: &[Seg], from: u64, len: u64) -> bool {
        let (mut skip, mut left) = (from, len);
        for seg in other {
            if left == 0 {
                break;
            }
            let have = u64::from(seg.len());
            if skip >= have {
                skip -= have;
                continue;
            }
            let n = left.min(have - skip);
            // Both fit 32 bits: they are at most a segment's length.
            match seg.slice(skip as u32, n as u32) {
                Some(part) if self.push(part) => {}
                _ => return false,
            }
            skip = 0;
            left -= n;
        }
        left == 0
    }

    /// The segments.
    #[inline]
    pub fn as_slice(&self) -> &[Seg] {
        &self.items[..self.len]
    }

    /// Bytes in all segments.
    pub fn bytes(&self) -> u64 {
        self.as_slice().iter().map(|s| u64::from(s.len())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dma::{PageSize, Region};

    #[test]
    fn parts_are_cut_across_segments() {
        let r = Region::new(16384, PageSize::Small).unwrap();
        let segs = [r.seg(0, 4096).unwrap(), r.seg(8192, 4096).unwrap()];
        let mut list = SegList::EMPTY;
        assert!(list.push_part(&segs, 3584, 1024));
        let got: Vec<_> = list.as_slice().iter().map(|s| (s.offset(), s.len())).collect();
        assert_eq!(got, [(3584, 512), (8192, 512)]);
        assert_eq!(list.bytes(), 1024);
        assert!(!list.push_part(&segs, 8192, 512));
        assert!(SegList::from_slice(&[segs[0]; MAX_SEGS + 1]).is_none());
        let mut full = SegList::from_slice(&[segs[0]; MAX_SEGS]).unwrap();
        assert!(!full.push(segs[0]));
    }
}
