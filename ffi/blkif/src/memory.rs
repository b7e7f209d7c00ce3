//! [`RingMemory`]: the shared pages of a ring, as one contiguous range.
//!
//! The other side may write any byte at any instant, so there are loads and stores of single
//! words only, and each happens exactly once.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use dma::{Entries, Region};

use crate::Kept;
use crate::abi::{Abi, Head, MAX_ORDER, PAGE, SLOTS};

/// The pages of a ring. Offsets are in bytes from the first page and come from our own layout
/// tables, never from the guest; an implementation may panic if one lies outside.
pub trait RingMemory {
    /// Length in bytes: whole pages, a power of two of them.
    fn bytes(&self) -> usize;

    /// Slots in the ring, less one: the same for all layouts.
    fn mask(&self) -> u32;

    /// Loads the first 64-bit words of a slot of the 64-bit layout, each once. `index` is cut to the
    /// ring.
    #[inline]
    fn load_slot<const N: usize>(&self, index: u32) -> [u64; N] {
        self.load64s(Abi::X86_64.slot_at(index & self.mask()))
    }

    /// Stores the first 64-bit words of such a slot.
    #[inline]
    fn store_slot<const N: usize>(&self, index: u32, words: &[u64; N]) {
        self.store64s(Abi::X86_64.slot_at(index & self.mask()), words);
    }

    /// Loads a 32-bit word. `offset` is a multiple of 4.
    fn load32(&self, offset: usize, order: Ordering) -> u32;

    /// Stores a 32-bit word. `offset` is a multiple of 4.
    fn store32(&self, offset: usize, value: u32, order: Ordering);

    /// Loads one of the indices, which stand before the slots, at byte `AT`.
    #[inline]
    fn load_index<const AT: usize>(&self, order: Ordering) -> u32 {
        self.load32(AT, order)
    }

    /// Stores one of them.
    #[inline]
    fn store_index<const AT: usize>(&self, value: u32, order: Ordering) {
        self.store32(AT, value, order);
    }

    /// Loads 64-bit words, each once. `offset` is a multiple of 8.
    fn load64s<const N: usize>(&self, offset: usize) -> [u64; N];

    /// Stores 64-bit words. `offset` is a multiple of 8.
    fn store64s<const N: usize>(&self, offset: usize, words: &[u64; N]);

    /// Loads 32-bit words, each once. `offset` is a multiple of 4.
    #[inline]
    fn load32s<const N: usize>(&self, offset: usize) -> [u32; N] {
        core::array::from_fn(|i| self.load32(offset + 4 * i, Ordering::Relaxed))
    }

    /// Whether requests are kept for whoever comes after a backend that dies: see
    /// [`crate::KeptRing`], which this and what follows is for.
    const KEEPS: bool = false;

    /// Where the request in a backend's slot is kept; the slot holds this, so that it need not be looked
    /// for with each request. Nothing where none is kept.
    type Entry: fmt::Debug;

    /// That of a slot.
    fn entry(&self, slot: u16) -> Self::Entry;

    /// The request of this index was taken into a backend's slot. Without a tail it has one segment
    /// at most.
    #[inline]
    fn keep(&self, _entry: &Self::Entry, _index: u32, _head: Head, _tail: Option<[u64; 10]>) {}

    /// Requests before this index were taken. Before one of them is answered.
    #[inline]
    fn counted(&self, _index: u32) {}

    /// It was answered, by the response of this index.
    #[inline]
    fn answered(&self, _entry: &Self::Entry, _index: u32) {}

    /// Responses before this index are going to be seen by the guest.
    #[inline]
    fn publishing(&self, _index: u32) {}

    /// Responses before this index were seen long ago. To be said now and then: an index comes again
    /// after 2^32 requests, and a slot may be unused for as many.
    fn forget(&self, _published: u32) {}

    /// What a backend that is gone has left.
    ///
    /// # Errors
    /// If that makes no sense.
    fn kept(&self) -> Result<Option<Kept>, &'static str> {
        Ok(None)
    }

    /// A request that was kept.
    fn kept_request(&self, _entry: &Self::Entry) -> (Head, [u64; 10]) {
        unreachable!("nothing is kept here")
    }

    /// The guest's name for it, [`Head::id`].
    fn kept_id(_entry: &Self::Entry) -> u64 {
        unreachable!("nothing is kept here")
    }

    /// Its segment, [`Head::word`], if it has one.
    fn kept_segment(_entry: &Self::Entry) -> u64 {
        unreachable!("nothing is kept here")
    }

    /// Stores 32-bit words. `offset` is a multiple of 4.
    #[inline]
    fn store32s<const N: usize>(&self, offset: usize, words: &[u32; N]) {
        for (i, &w) in words.iter().enumerate() {
            self.store32(offset + 4 * i, w, Ordering::Relaxed);
        }
    }
}

/// Ring pages that lie in a [`Region`].
#[derive(Clone, Debug)]
pub struct RegionRing {
    region: Arc<Region>,
    /// First page within the region; as a number, so that words are seen to be aligned.
    page: usize,
    bytes: usize,
    slots: Entries<{ Abi::X86_64.slot_size() }>,
    /// What stands before them, as one entry.
    head: Entries<SLOTS>,
}

impl RegionRing {
    /// `1 << order` pages at `offset` (a multiple of the page size), or `None` if they do not lie
    /// inside the region or the order is not possible.
    pub fn new(region: Arc<Region>, offset: usize, order: u8) -> Option<RegionRing> {
        let bytes = PAGE << order.min(MAX_ORDER);
        let inside = offset.checked_add(bytes)? <= region.len();
        (inside && order <= MAX_ORDER && offset.is_multiple_of(PAGE)).then(|| {
            let slots = Entries::new(region.clone(), offset + SLOTS, Abi::X86_64.slots(order));
            let head = Entries::new(region.clone(), offset, 1);
            RegionRing { region, page: offset / PAGE, bytes, slots, head }
        })
    }

    /// The region.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }
}

impl RingMemory for RegionRing {
    type Entry = ();

    fn entry(&self, _slot: u16) {}

    #[inline]
    fn bytes(&self) -> usize {
        self.bytes
    }

    #[inline]
    fn mask(&self) -> u32 {
        self.slots.mask()
    }

    #[inline(always)]
    fn load_slot<const N: usize>(&self, index: u32) -> [u64; N] {
        self.slots.at(index).read_words()
    }

    #[inline(always)]
    fn store_slot<const N: usize>(&self, index: u32, words: &[u64; N]) {
        self.slots.at(index).write_words(words);
    }

    #[inline]
    fn load32(&self, offset: usize, order: Ordering) -> u32 {
        self.region.load32(self.page * PAGE + offset, order)
    }

    #[inline]
    fn store32(&self, offset: usize, value: u32, order: Ordering) {
        self.region.store32(self.page * PAGE + offset, value, order);
    }

    #[inline(always)]
    fn load_index<const AT: usize>(&self, order: Ordering) -> u32 {
        self.head.at(0).load32::<AT>(order)
    }

    #[inline(always)]
    fn store_index<const AT: usize>(&self, value: u32, order: Ordering) {
        self.head.at(0).store32::<AT>(value, order);
    }

    #[inline]
    fn load64s<const N: usize>(&self, offset: usize) -> [u64; N] {
        self.region.read_words(self.page * PAGE + offset)
    }

    #[inline]
    fn store64s<const N: usize>(&self, offset: usize, words: &[u64; N]) {
        self.region.write_words(self.page * PAGE + offset, words);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_lie_inside_their_region() {
        let region = Region::new(4 * PAGE, dma::PageSize::Small).unwrap();
        assert!(RegionRing::new(region.clone(), PAGE, 1).is_some());
        assert!(RegionRing::new(region.clone(), 3 * PAGE, 1).is_none());
        assert!(RegionRing::new(region.clone(), 0, 5).is_none());
        assert!(RegionRing::new(region.clone(), 64, 0).is_none());
        assert!(RegionRing::new(region, usize::MAX - 4095, 0).is_none());
    }
}
