//! Memory that a device, a guest or another process may read and write at any moment.
//!
//! This is the ground floor of polldisk: every byte that moves between a guest ring and a drive
//! lies in a [`Region`]. The crate owns the mapping of such memory and every access of the CPU to
//! it; nothing above ever holds a `&` or `&mut` into it, because somebody else may change the bytes
//! while the reference lives. What is handed around instead is a [`Seg`]: (region, offset, length),
//! made only from a buffer that the maker owns. A device queue turns it into a bus address through
//! a table that it filled when the region was registered.
//!
//! - [`Region`]: a mapping of a memfd, of huge pages where the host has them.
//! - [`Pool`] and [`Buf`]: equal buffers cut from a region, owned by one reactor.
//! - [`Seg`]: what a request carries.
//! - [`Table`]: the regions that a queue knows, and lets go of when they have no user any more.
//! - [`prefetch`], [`prefer_huge_pages`]: for memory of this process alone.
//!
//! Threads: a `Region` is shared by any number of threads; a `Pool` belongs to one.

mod access;
mod hint;
mod id;
mod pool;
mod region;
mod table;

pub use access::{Entries, Entry, copy};
pub use hint::{prefer_huge_pages, prefetch};
pub use id::RegionId;
pub use pool::{Buf, Pool};
pub use region::{Error, PageSize, Region};
pub use table::{Held, Table};

/// A piece of a region, as a request carries it: which region, where in it, how long.
///
/// Plain data, and only plain data: it keeps nothing alive. Whoever submits a request owns the
/// buffer that the segment was made from and keeps it until the request completes; every queue
/// that resolves segments holds the regions that it resolves. A segment cannot be made from an
/// integer address, so a request can never name memory outside a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seg {
    region: RegionId,
    len: u32,
    offset: u64,
}

impl Seg {
    /// A segment of no bytes, to fill places of a list that are not in use.
    pub const NONE: Seg = Seg { region: RegionId::FIRST, len: 0, offset: 0 };

    /// The region that the bytes lie in.
    #[inline]
    pub fn region(&self) -> RegionId {
        self.region
    }

    /// Where the segment begins, in bytes from the region's start.
    #[inline]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length in bytes.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "an empty segment is never sent to a queue")]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// The part `[from, from + len)` of this segment, or `None` if it does not lie inside.
    #[inline]
    pub fn slice(&self, from: u32, len: u32) -> Option<Seg> {
        if from.checked_add(len)? > self.len {
            return None;
        }
        Some(Seg { region: self.region, len, offset: self.offset + u64::from(from) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slice_stays_inside() {
        let region = Region::new(8192, PageSize::Small).unwrap();
        let seg = region.seg(4096, 4096).unwrap();
        let part = seg.slice(512, 1024).unwrap();
        assert_eq!((part.offset(), part.len()), (4608, 1024));
        assert_eq!(seg.slice(4096, 0).map(|s| s.len()), Some(0));
        assert_eq!(seg.slice(4000, 97), None);
        assert_eq!(seg.slice(u32::MAX, 2), None);
    }
}
