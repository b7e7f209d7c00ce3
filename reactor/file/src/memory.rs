//! The table of registered regions, and requests' data as the kernel wants it: lists of addresses.
//!
//! An [`IoVec`] can only be made here, from a segment of a registered region, and the table only
//! grows: so every address in one is memory that lives as long as the table.

use std::mem::offset_of;
use std::sync::Arc;

use block::MAX_SEGS;
use dma::{Region, RegionId, Seg};

/// An address range of a registered region; laid out as the kernel's `struct iovec`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(crate) struct IoVec {
    base: usize,
    len: usize,
}

const _: () = assert!(size_of::<IoVec>() == size_of::<libc::iovec>());
const _: () = assert!(offset_of!(IoVec, base) == offset_of!(libc::iovec, iov_base));
const _: () = assert!(offset_of!(IoVec, len) == offset_of!(libc::iovec, iov_len));

impl IoVec {
    pub(crate) fn base(self) -> usize {
        self.base
    }

    pub(crate) fn len(self) -> usize {
        self.len
    }
}

/// The data of one request that is still to be moved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vecs {
    items: [IoVec; MAX_SEGS],
    first: u8,
    end: u8,
    /// Table index of the last piece's region.
    region: u16,
}

impl Vecs {
    pub(crate) const EMPTY: Vecs =
        Vecs { items: [IoVec { base: 0, len: 0 }; MAX_SEGS], first: 0, end: 0, region: 0 };

    pub(crate) fn as_slice(&self) -> &[IoVec] {
        &self.items[usize::from(self.first)..usize::from(self.end)]
    }

    /// If the data is in one piece: that, and the table index of its region.
    #[inline]
    pub(crate) fn single(&self) -> Option<(IoVec, usize)> {
        match self.as_slice() {
            [v] => Some((*v, self.region.into())),
            _ => None,
        }
    }

    /// Drops the first `n` bytes, which were moved.
    pub(crate) fn advance(&mut self, mut n: usize) {
        while n > 0 && self.first < self.end {
            let v = &mut self.items[usize::from(self.first)];
            let step = n.min(v.len);
            v.base += step;
            v.len -= step;
            n -= step;
            if v.len == 0 {
                self.first += 1;
            }
        }
    }

    /// Whether all addresses are multiples of `memory` and all lengths of `length` (powers of two).
    pub(crate) fn aligned(&self, memory: u32, length: u32) -> bool {
        let bits = self.as_slice().iter().fold((0, 0), |a, v| (a.0 | v.base, a.1 | v.len));
        bits.0 & (memory as usize - 1) == 0 && bits.1 & (length as usize - 1) == 0
    }
}

/// The registered regions.
#[derive(Debug)]
pub(crate) struct Memory {
    regions: Box<[Option<Arc<Region>>]>,
}

impl Memory {
    pub(crate) fn new() -> Memory {
        Memory { regions: vec![None; RegionId::MAX].into_boxed_slice() }
    }

    /// Adds a region, for good. `false` if it was there already.
    pub(crate) fn register(&mut self, region: &Arc<Region>) -> bool {
        // Its number cannot be another region's while the table holds that.
        let place = &mut self.regions[region.id().index()];
        let new = place.is_none();
        place.get_or_insert_with(|| region.clone());
        new
    }

    /// Fills `out` with the segments' addresses; segments that adjoin become one. `false` if a
    /// segment is of no registered region or does not lie inside.
    #[inline]
    pub(crate) fn resolve(&self, segs: &[Seg], out: &mut Vecs) -> bool {
        (out.first, out.end) = (0, 0);
        let mut next = 0;
        for seg in segs {
            let Some(region) = self.regions.get(seg.region().index()).and_then(Option::as_ref)
            else {
                return false;
            };
            // A stale segment may name a region that has since got the number of another.
            let len = u64::from(seg.len());
            if seg.offset().checked_add(len).is_none_or(|end| end > region.len() as u64) {
                return false;
            }
            let base = region.base().as_ptr().expose_provenance() + seg.offset() as usize;
            // Two regions may adjoin in the address space; they stay two pieces.
            let id = seg.region().index() as u16;
            if base == next && out.region == id {
                out.items[usize::from(out.end) - 1].len += len as usize;
            } else if usize::from(out.end) < MAX_SEGS {
                out.items[usize::from(out.end)] = IoVec { base, len: len as usize };
                out.end += 1;
            } else {
                return false;
            }
            next = base + len as usize;
            out.region = id;
        }
        true
    }

    /// Region and offset of an address from [`Memory::resolve`]. Slow.
    fn locate(&self, v: IoVec) -> (&Region, usize) {
        self.regions
            .iter()
            .flatten()
            .find_map(|r| {
                let at = v.base.checked_sub(r.base().as_ptr().addr())?;
                (at < r.len() && v.len <= r.len() - at).then_some((&**r, at))
            })
            .expect("an address made from a registered region, and none is ever removed")
    }

    /// Fills what is left of `vecs` with zeroes.
    #[cold]
    pub(crate) fn zero(&self, vecs: &Vecs) {
        for &v in vecs.as_slice() {
            let (region, at) = self.locate(v);
            region.zero(at, v.len);
        }
    }

    /// Copies the bytes of `vecs` into `to`, which is long enough.
    pub(crate) fn gather(&self, vecs: &Vecs, to: &Region, mut to_at: usize) {
        for &v in vecs.as_slice() {
            let (region, at) = self.locate(v);
            dma::copy(region, at, to, to_at, v.len);
            to_at += v.len;
        }
    }

    /// Copies bytes of `from`, which is long enough, over those of `vecs`.
    pub(crate) fn scatter(&self, from: &Region, mut from_at: usize, vecs: &Vecs) {
        for &v in vecs.as_slice() {
            let (region, at) = self.locate(v);
            dma::copy(from, from_at, region, at, v.len);
            from_at += v.len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dma::PageSize;

    #[test]
    fn adjoining_segments_become_one_and_advance_crosses_them() {
        let region = Region::new(64 << 10, PageSize::Small).unwrap();
        let mut m = Memory::new();
        let mut v = Vecs::EMPTY;
        let seg = |at, len| region.seg(at, len).unwrap();
        assert!(!m.resolve(&[seg(0, 512)], &mut v), "not registered yet");
        m.register(&region);
        assert!(m.resolve(&[seg(0, 4096), seg(4096, 512), seg(8192, 4096)], &mut v));
        let base = region.base().as_ptr().addr();
        assert_eq!(
            v.as_slice(),
            [IoVec { base, len: 4608 }, IoVec { base: base + 8192, len: 4096 }]
        );
        assert!(v.aligned(4096, 512) && !v.aligned(4096, 4096) && !v.aligned(16384, 512));
        v.advance(4608 + 100);
        assert_eq!(v.as_slice(), [IoVec { base: base + 8292, len: 3996 }]);
        assert_eq!(v.single(), Some((v.as_slice()[0], region.id().index())));
        v.advance(3996);
        assert!(v.as_slice().is_empty());
    }

    #[test]
    fn regions_that_adjoin_stay_two_pieces() {
        let mut m = Memory::new();
        let regions: Vec<_> =
            (0..32).map(|_| Region::new(4096, PageSize::Small).unwrap()).collect();
        regions.iter().for_each(|r| assert!(m.register(r)));
        let base = |r: &Region| r.base().as_ptr().addr();
        // The kernel places mappings side by side unless somebody else got in between.
        let pairs = regions.iter().flat_map(|a| regions.iter().map(move |b| (a, b)));
        let (a, b) = { pairs }.find(|(a, b)| base(a) + 4096 == base(b)).unwrap();
        let mut v = Vecs::EMPTY;
        assert!(m.resolve(&[a.seg(0, 4096).unwrap(), b.seg(0, 4096).unwrap()], &mut v));
        assert_eq!(v.as_slice().len(), 2);
        m.zero(&v);
        v.advance(4096);
        assert_eq!(v.single().unwrap().1, b.id().index());
    }

    #[test]
    fn a_stale_segment_of_a_longer_region_is_refused() {
        // The next regions take the lowest free numbers; but other tests run beside this one.
        for _ in 0..100 {
            let long = Region::new(64 << 10, PageSize::Small).unwrap();
            let seg = long.seg(60 << 10, 4096).unwrap();
            let id = long.id();
            drop(long);
            let short = Region::new(4096, PageSize::Small).unwrap();
            if short.id() == id {
                let mut m = Memory::new();
                m.register(&short);
                let mut v = Vecs::EMPTY;
                assert!(!m.resolve(&[seg], &mut v));
                assert!(m.resolve(&[short.seg(0, 4096).unwrap()], &mut v));
                return;
            }
        }
        panic!("never got the same number twice");
    }
}
