//! [`Copier`]: copies between granted pages and regions, done by the hypervisor.

use std::marker::PhantomData;

use dma::Region;
use nix::errno::Errno;

use super::Gntdev;
use crate::abi::{
    CopySegment, DEST_GREF, GNTST_BAD_COPY_ARG, GNTST_GENERAL_ERROR, GNTST_OKAY, PAGE, SOURCE_GREF,
    foreign,
};

/// Which way a [`Copy`] goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the granted page into the region.
    FromGuest,
    /// From the region into the granted page.
    ToGuest,
}

/// One copy between a granted page and a region.
#[derive(Clone, Copy, Debug)]
pub struct Copy<'a> {
    /// Whose page.
    pub domid: u16,
    /// The page.
    pub gref: u32,
    /// Where in the page, in bytes.
    pub offset: u16,
    /// How many bytes. `offset + len` past 4096 is answered as the hypervisor would.
    pub len: u16,
    /// The region.
    pub region: &'a Region,
    /// Where in the region, in bytes. If it does not cross a page this is one operation, else two.
    pub local: usize,
    /// Which way.
    pub direction: Direction,
}

/// Segments as the kernel takes them, whose addresses lie in regions that live for `'a`: only
/// [`Copier`] makes them.
pub(crate) struct Segments<'a> {
    raw: &'a mut [CopySegment],
    regions: PhantomData<&'a Region>,
}

impl Segments<'_> {
    pub(crate) fn raw_mut(&mut self) -> &mut [CopySegment] {
        self.raw
    }
}

/// A segment that is not to be copied, and whose status is known: the kernel does not look at this
/// word, nor at a segment of no length.
const BAD_ARGUMENT: u16 = 1;

impl Copy<'_> {
    /// Panics if the range leaves the region: the caller laid it out wrong.
    fn segment(&self) -> CopySegment {
        let bad = usize::from(self.offset) + usize::from(self.len) > PAGE;
        let len = if bad { 0 } else { self.len };
        let inside = self.region.seg(self.local as u64, len.into()).is_some();
        assert!(inside, "access outside a DMA region");
        let theirs = foreign(self.gref, if bad { 0 } else { self.offset }, self.domid);
        let ours = self.region.base().as_ptr() as u64 + self.local as u64;
        let (source, dest, flags) = match self.direction {
            Direction::FromGuest => (theirs, ours, SOURCE_GREF),
            Direction::ToGuest => (ours, theirs, DEST_GREF),
        };
        CopySegment {
            source,
            dest,
            len,
            flags,
            // In case that nobody writes it.
            status: GNTST_GENERAL_ERROR,
            pad: if bad { BAD_ARGUMENT } else { 0 },
        }
    }
}

/// Does the copies of one reactor. It has its own device, so that no other thread's calls are near.
#[derive(Debug)]
pub struct Copier {
    device: Gntdev,
    /// The last batch: its statuses are read from here. Addresses in it are used in a call only.
    raw: Vec<CopySegment>,
}

impl Copier {
    /// Without room: see [`Copier::reserve`].
    pub fn new(device: Gntdev) -> Copier {
        Copier { device, raw: Vec::new() }
    }

    /// Makes room for `most` copies at a time. More are done as well, but memory is taken for them.
    pub fn reserve(&mut self, most: usize) {
        self.raw.clear();
        self.raw.reserve(most);
    }

    /// Carries out copies, of any rings and guests, by one system call. Without copies there is no
    /// call.
    ///
    /// # Errors
    /// If the call failed as a whole: then nothing is known of any.
    ///
    /// # Panics
    /// If a range lies outside its region.
    #[inline]
    pub fn copy<'a>(&mut self, copies: impl IntoIterator<Item = Copy<'a>>) -> Result<(), Errno> {
        self.raw.clear();
        self.raw.extend(copies.into_iter().map(|c| c.segment()));
        self.run()
    }

    /// How each of the last copies ended: one of the `GNTST_` values, 0 for fine, in their order.
    pub fn statuses(&self) -> impl ExactSizeIterator<Item = i16> {
        self.raw.iter().map(|s| s.status)
    }

    /// The regions in `raw` live: `copy`'s caller borrows them all the while.
    fn run(&mut self) -> Result<(), Errno> {
        if self.raw.is_empty() {
            return Ok(());
        }
        let mut segments = Segments { raw: &mut self.raw, regions: PhantomData };
        let done = self.device.kernel().copy(&mut segments);
        if done.is_err() {
            self.raw.clear();
        }
        for s in self.raw.iter_mut().filter(|s| s.pad == BAD_ARGUMENT && s.status == GNTST_OKAY) {
            s.status = GNTST_BAD_COPY_ARG;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn segments_are_these_bytes() {
        let region = Region::new(8192, dma::PageSize::Small).unwrap();
        let address = region.base().as_ptr() as u64;
        let mut copy = Copy {
            domid: 0x0102,
            gref: 0x0a0b_0c0d,
            offset: 512,
            len: 1024,
            region: &region,
            local: 4096,
            direction: Direction::FromGuest,
        };
        let bytes = |c: &Copy<'_>| c.segment().as_bytes().to_vec();
        let local = (address + 4096).to_ne_bytes();
        let theirs = [0x0d, 0x0c, 0x0b, 0x0a, 0, 2, 2, 1];
        let rest = |flags: u8| [0, 4, flags, 0, 0xff, 0xff, 0, 0];
        assert_eq!(bytes(&copy), [&theirs[..], &local, &rest(1)].concat());
        copy.direction = Direction::ToGuest;
        assert_eq!(bytes(&copy), [&local[..], &theirs, &rest(2)].concat());
        copy.offset = 4000;
        let segment = copy.segment();
        assert_eq!((segment.len, segment.pad), (0, BAD_ARGUMENT), "it would fail all others too");
    }

    #[test]
    #[should_panic(expected = "outside a DMA region")]
    fn ranges_lie_in_their_regions() {
        let region = Region::new(4096, dma::PageSize::Small).unwrap();
        let (offset, len, local) = (0, 512, 4000);
        let direction = Direction::ToGuest;
        Copy { domid: 1, gref: 8, offset, len, region: &region, local, direction }.segment();
    }
}
