//! Requests' data as the kernel wants it: lists of addresses.
//!
//! An [`IoVec`] can only be made here, from a segment of a region that is in the queue's table; and
//! the table lets go of no region that a list names ([`crate::kernel::Kernel::prune`]). So every
//! address in a list is memory that is mapped.

use std::mem::offset_of;

use block::MAX_SEGS;
use dma::{Region, Seg, Table};

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

    /// No data: names no memory.
    pub(crate) fn clear(&mut self) {
        (self.first, self.end) = (0, 0);
    }

    /// Whether some of the data that is still to be moved lies in a region.
    pub(crate) fn name(&self, region: &Region) -> bool {
        let base = region.base().as_ptr().addr();
        self.as_slice().iter().any(|v| v.base.wrapping_sub(base) < region.len())
    }

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

/// Fills `out` with the segments' addresses; segments that adjoin become one. `false` if a segment is
/// of no registered region or does not lie inside.
#[inline]
pub(crate) fn resolve(table: &Table, segs: &[Seg], out: &mut Vecs) -> bool {
    (out.first, out.end) = (0, 0);
    let mut next = 0;
    for seg in segs {
        let Some(region) = table.find(seg) else { return false };
        let len = seg.len() as usize;
        let base = region.base().as_ptr().expose_provenance() + seg.offset() as usize;
        // Two regions may adjoin in the address space; they stay two pieces.
        let id = seg.region().index() as u16;
        if base == next && out.region == id {
            out.items[usize::from(out.end) - 1].len += len;
        } else if usize::from(out.end) < MAX_SEGS {
            out.items[usize::from(out.end)] = IoVec { base, len };
            out.end += 1;
        } else {
            return false;
        }
        next = base + len;
        out.region = id;
    }
    true
}

/// Region and offset of an address from [`resolve`]. Slow.
fn locate(table: &Table, v: IoVec) -> (&Region, usize) {
    table
        .iter()
        .find_map(|r| {
            let at = v.base.checked_sub(r.base().as_ptr().addr())?;
            (at < r.len() && v.len <= r.len() - at).then_some((r, at))
        })
        .expect("the table keeps a region that a request in work names")
}

/// Fills what is left of `vecs` with zeroes.
#[cold]
pub(crate) fn zero(table: &Table, vecs: &Vecs) {
    for &v in vecs.as_slice() {
        let (region, at) = locate(table, v);
        region.zero(at, v.len);
    }
}

/// Copies the bytes of `vecs` into `to`, which is long enough.
pub(crate) fn gather(table: &Table, vecs: &Vecs, to: &Region, mut to_at: usize) {
    for &v in vecs.as_slice() {
        let (region, at) = locate(table, v);
        dma::copy(region, at, to, to_at, v.len);
        to_at += v.len;
    }
}

/// Copies bytes of `from`, which is long enough, over those of `vecs`.
pub(crate) fn scatter(table: &Table, from: &Region, mut from_at: usize, vecs: &Vecs) {
    for &v in vecs.as_slice() {
        let (region, at) = locate(table, v);
        dma::copy(from, from_at, region, at, v.len);
        from_at += v.len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dma::PageSize;

    #[test]
    fn adjoining_segments_become_one_and_advance_crosses_them() {
        let region = Region::new(64 << 10, PageSize::Small).unwrap();
        let mut m = Table::new();
        let mut v = Vecs::EMPTY;
        let seg = |at, len| region.seg(at, len).unwrap();
        assert!(!resolve(&m, &[seg(0, 512)], &mut v), "not registered yet");
        m.register(&region);
        assert!(resolve(&m, &[seg(0, 4096), seg(4096, 512), seg(8192, 4096)], &mut v));
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
        let mut m = Table::new();
        let regions: Vec<_> =
            (0..32).map(|_| Region::new(4096, PageSize::Small).unwrap()).collect();
        regions.iter().for_each(|r| assert!(m.register(r)));
        let base = |r: &Region| r.base().as_ptr().addr();
        // The kernel places mappings side by side unless somebody else got in between.
        let pairs = regions.iter().flat_map(|a| regions.iter().map(move |b| (a, b)));
        let (a, b) = { pairs }.find(|(a, b)| base(a) + 4096 == base(b)).unwrap();
        let mut v = Vecs::EMPTY;
        assert!(resolve(&m, &[a.seg(0, 4096).unwrap(), b.seg(0, 4096).unwrap()], &mut v));
        assert_eq!(v.as_slice().len(), 2);
        zero(&m, &v);
        v.advance(4096);
        assert_eq!(v.single().unwrap().1, b.id().index());
    }

    #[test]
    fn lists_name_the_regions_of_what_is_left() {
        let mut m = Table::new();
        let [a, b] = [0, 1].map(|_| Region::new(8192, PageSize::Small).unwrap());
        let mut v = Vecs::EMPTY;
        assert!(m.register(&a) && m.register(&b) && !v.name(&a));
        assert!(resolve(&m, &[a.seg(8191, 1).unwrap(), b.seg(0, 4096).unwrap()], &mut v));
        assert!(v.name(&a) && v.name(&b));
        v.advance(1);
        assert!(!v.name(&a) && v.name(&b));
        v.clear();
        assert!(!v.name(&b));
    }

    #[test]
    fn a_stale_segment_of_a_longer_region_is_refused() {
        // A number comes back when all others had their turn; but other tests run beside this one.
        let long = Region::new(64 << 10, PageSize::Small).unwrap();
        let (seg, id) = (long.seg(60 << 10, 4096).unwrap(), long.id());
        drop(long);
        let short = (0..10 * dma::RegionId::MAX)
            .map(|_| Region::new(4096, PageSize::Small).unwrap())
            .find(|r| r.id() == id)
            .expect("never got the same number twice");
        let mut m = Table::new();
        m.register(&short);
        let mut v = Vecs::EMPTY;
        assert!(!resolve(&m, &[seg], &mut v));
        assert!(resolve(&m, &[short.seg(0, 4096).unwrap()], &mut v));
    }
}
