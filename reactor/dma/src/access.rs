//! The CPU's accesses to a region: copies that the compiler cannot look into, and atomic words.
//!
//! A guest or device may change the bytes at any instant, so no access here makes a reference, and
//! a copy is one opaque instruction: neither split, repeated nor assumed stable by the compiler.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::{Region, Seg};

/// Copies `len` bytes between two places of this process that do not overlap.
///
/// The one symbol that a profile shows for data copies. `rep movsb` is opaque to the compiler, so
/// that a racing writer can spoil the copied bytes but not the program, and it is the fastest copy
/// of a page on processors that have ERMS (every one since 2012).
///
/// # Safety
/// `src` must be readable and `dst` writable for `len` bytes, and they must not overlap.
#[inline(never)]
unsafe fn copy_bytes(src: *const u8, dst: *mut u8, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") src => _,
            inout("rdi") dst => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    for i in 0..len {
        // SAFETY: the caller vouches for both ranges, of which this is a byte.
        let from = unsafe { src.add(i) };
        // SAFETY: as above.
        let to = unsafe { dst.add(i) };
        // SAFETY: as above; volatile, so that it is one read of whatever is there.
        let byte = unsafe { from.read_volatile() };
        // SAFETY: as above.
        unsafe { to.write_volatile(byte) };
    }
}

/// Writes `len` zeroes, as opaquely as [`copy_bytes`] and for the same reason.
///
/// # Safety
/// `dst` must be writable for `len` bytes.
unsafe fn zero_bytes(dst: *mut u8, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the caller vouches for the range; the direction flag is clear by the ABI.
    unsafe {
        core::arch::asm!(
            "rep stosb",
            inout("rcx") len => _,
            inout("rdi") dst => _,
            in("al") 0u8,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    for i in 0..len {
        // SAFETY: the caller vouches for the range, of which this is a byte.
        let to = unsafe { dst.add(i) };
        // SAFETY: as above.
        unsafe { to.write_volatile(0) };
    }
}

/// Copies `len` bytes from one region to another (or within one, if the ranges do not overlap).
///
/// # Panics
/// If a range lies outside its region, or the two overlap: both would be bugs of the caller.
#[inline]
pub fn copy(from: &Region, from_offset: usize, to: &Region, to_offset: usize, len: usize) {
    let src = from.at(from_offset, len);
    let dst = to.at(to_offset, len);
    assert!(
        from.id() != to.id() || from_offset.abs_diff(to_offset) >= len,
        "overlapping copy within a DMA region"
    );
    // SAFETY: `at` checked both ranges, and the assertion that they do not overlap.
    unsafe { copy_bytes(src, dst, len) }
}

impl Region {
    /// Copies out of the region into private memory. Panics if the range lies outside.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let src = self.at(offset, into.len());
        // SAFETY: `at` checked the source; `into` is exclusive and no part of the region.
        unsafe { copy_bytes(src, into.as_mut_ptr(), into.len()) }
    }

    /// Copies private memory into the region. Panics if the range lies outside.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) {
        let dst = self.at(offset, from.len());
        // SAFETY: `at` checked the destination; `from` is no part of the region.
        unsafe { copy_bytes(from.as_ptr(), dst, from.len()) }
    }

    /// Copies out of the region into memory that is no Rust object of this process, as pages that a
    /// guest granted. Panics if the range lies outside.
    ///
    /// # Safety
    /// `to` must be writable for `len` bytes, no part of this region, and never behind a reference.
    #[inline]
    pub unsafe fn copy_to(&self, offset: usize, to: *mut u8, len: usize) {
        let src = self.at(offset, len);
        // SAFETY: `at` checked the source; the caller vouches for the destination.
        unsafe { copy_bytes(src, to, len) }
    }

    /// Copies such memory into the region. Panics if the range lies outside.
    ///
    /// # Safety
    /// `from` must be readable for `len` bytes, no part of this region, and never behind a reference.
    #[inline]
    pub unsafe fn copy_from(&self, offset: usize, from: *const u8, len: usize) {
        let dst = self.at(offset, len);
        // SAFETY: `at` checked the destination; the caller vouches for the source.
        unsafe { copy_bytes(from, dst, len) }
    }

    /// Fills `[offset, offset + len)` with zeroes. Panics if the range lies outside.
    #[inline]
    pub fn zero(&self, offset: usize, len: usize) {
        let dst = self.at(offset, len);
        // SAFETY: `at` checked the range.
        unsafe { zero_bytes(dst, len) }
    }

    /// Copies the bytes of `seg` (which must be of this region) into private memory of its length.
    pub fn read_seg(&self, seg: &Seg, into: &mut [u8]) {
        assert!(
            seg.region == self.id() && seg.len as usize == into.len(),
            "segment of another region"
        );
        self.read(seg.offset as usize, into);
    }

    /// Copies private memory into the bytes of `seg` (which must be of this region).
    pub fn write_seg(&self, seg: &Seg, from: &[u8]) {
        assert!(
            seg.region == self.id() && seg.len as usize == from.len(),
            "segment of another region"
        );
        self.write(seg.offset as usize, from);
    }

    /// Copies `N` 64-bit words out, each read once: for a ring entry that is then looked at in
    /// private memory only. `offset` must be a multiple of 8.
    #[inline(always)]
    pub fn read_words<const N: usize>(&self, offset: usize) -> [u64; N] {
        let at = self.aligned::<u64>(offset, N);
        core::array::from_fn(|i| {
            // SAFETY: `aligned` checked N words from here.
            let word = unsafe { at.add(i) };
            // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
            unsafe { AtomicU64::from_ptr(word) }.load(Ordering::Relaxed)
        })
    }

    /// Writes `N` 64-bit words, each once. `offset` must be a multiple of 8.
    #[inline(always)]
    pub fn write_words<const N: usize>(&self, offset: usize, words: &[u64; N]) {
        let at = self.aligned::<u64>(offset, N);
        for (i, &value) in words.iter().enumerate() {
            // SAFETY: `aligned` checked N words from here.
            let word = unsafe { at.add(i) };
            // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
            unsafe { AtomicU64::from_ptr(word) }.store(value, Ordering::Relaxed);
        }
    }

    /// Loads a 16-bit word. `offset` must be a multiple of 2.
    #[inline]
    pub fn load16(&self, offset: usize, order: Ordering) -> u16 {
        let at = self.aligned::<u16>(offset, 1);
        // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
        unsafe { AtomicU16::from_ptr(at) }.load(order)
    }

    /// Stores a 16-bit word. `offset` must be a multiple of 2.
    #[inline]
    pub fn store16(&self, offset: usize, value: u16, order: Ordering) {
        let at = self.aligned::<u16>(offset, 1);
        // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
        unsafe { AtomicU16::from_ptr(at) }.store(value, order);
    }

    /// Loads a 32-bit word. `offset` must be a multiple of 4.
    #[inline]
    pub fn load32(&self, offset: usize, order: Ordering) -> u32 {
        let at = self.aligned::<u32>(offset, 1);
        // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
        unsafe { AtomicU32::from_ptr(at) }.load(order)
    }

    /// Stores a 32-bit word. `offset` must be a multiple of 4.
    #[inline]
    pub fn store32(&self, offset: usize, value: u32, order: Ordering) {
        let at = self.aligned::<u32>(offset, 1);
        // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
        unsafe { AtomicU32::from_ptr(at) }.store(value, order);
    }

    /// Stores a 32-bit word if it still is `old`, and orders everything around that. Whether it was.
    /// `offset` must be a multiple of 4.
    #[inline]
    pub fn replace32(&self, offset: usize, old: u32, new: u32) -> bool {
        let at = self.aligned::<u32>(offset, 1);
        // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
        let word = unsafe { AtomicU32::from_ptr(at) };
        word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Loads a 64-bit word. `offset` must be a multiple of 8.
    #[inline]
    pub fn load64(&self, offset: usize, order: Ordering) -> u64 {
        let at = self.aligned::<u64>(offset, 1);
        // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
        unsafe { AtomicU64::from_ptr(at) }.load(order)
    }

    /// Stores a 64-bit word. `offset` must be a multiple of 8.
    #[inline]
    pub fn store64(&self, offset: usize, value: u64, order: Ordering) {
        let at = self.aligned::<u64>(offset, 1);
        // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
        unsafe { AtomicU64::from_ptr(at) }.store(value, order);
    }

    /// Pointer to `count` words at `offset`, inside the mapping and aligned (the base is a page).
    #[inline(always)]
    fn aligned<T>(&self, offset: usize, count: usize) -> *mut T {
        assert!(offset.is_multiple_of(align_of::<T>()), "misaligned word in a DMA region");
        self.at_words(offset, count * size_of::<T>()).cast()
    }
}

/// A ring of equal entries of `SIZE` bytes in a region, a power of two of them. An index is cut to
/// the ring, and the ring was found to lie in the region when this was made: so an access needs no
/// check.
#[derive(Clone, Debug)]
pub struct Entries<const SIZE: usize> {
    /// The first one; a multiple of 8.
    base: NonNull<u8>,
    mask: u32,
    /// Keeps the memory where it is.
    _region: Arc<Region>,
}

// SAFETY: `base` points into the region that this holds, which may itself be sent, and is only accessed
// atomically or by opaque copies.
unsafe impl<const SIZE: usize> Send for Entries<SIZE> {}
// SAFETY: as above.
unsafe impl<const SIZE: usize> Sync for Entries<SIZE> {}

impl<const SIZE: usize> Entries<SIZE> {
    /// `count` entries (a power of two) from `base` on, which must be a multiple of 8.
    ///
    /// # Panics
    /// If they do not lie inside the region: its owner laid it out wrong.
    pub fn new(region: Arc<Region>, base: usize, count: u32) -> Entries<SIZE> {
        const { assert!(SIZE > 0 && SIZE.is_multiple_of(8), "entries of whole words") };
        assert!(count.is_power_of_two(), "ring indices wrap by a mask");
        assert!(base.is_multiple_of(8), "misaligned ring in a DMA region");
        let end = (count as usize).checked_mul(SIZE).and_then(|bytes| bytes.checked_add(base));
        assert!(end.is_some_and(|end| end <= region.len()), "ring outside a DMA region");
        // SAFETY: inside the region, as was just asserted.
        let first = unsafe { region.base().add(base) };
        Entries { base: first, mask: count - 1, _region: region }
    }

    /// How many entries there are, less one: what an index is cut by.
    #[inline(always)]
    pub fn mask(&self) -> u32 {
        self.mask
    }

    /// An entry.
    #[inline(always)]
    pub fn at(&self, index: u32) -> Entry<'_, SIZE> {
        let at = (index & self.mask) as usize * SIZE;
        // SAFETY: `new` found all entries up to the mask inside the region, whose length is fixed.
        Entry(unsafe { self.base.add(at) }, PhantomData)
    }
}

/// One of [`Entries`]. `AT` is the byte in it where an access begins.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a, const SIZE: usize>(NonNull<u8>, PhantomData<&'a Region>);

impl<const SIZE: usize> Entry<'_, SIZE> {
    /// Loads a 32-bit word.
    #[inline(always)]
    pub fn load32<const AT: usize>(self, order: Ordering) -> u32 {
        // SAFETY: `word` gives words that are aligned, inside the mapping, and only ever accessed
        // atomically or by copies.
        unsafe { AtomicU32::from_ptr(self.word::<u32, AT>()) }.load(order)
    }

    /// Stores a 32-bit word.
    #[inline(always)]
    pub fn store32<const AT: usize>(self, value: u32, order: Ordering) {
        // SAFETY: as in `load32`.
        unsafe { AtomicU32::from_ptr(self.word::<u32, AT>()) }.store(value, order);
    }

    /// Loads the first `N` 64-bit words, each once.
    #[inline(always)]
    pub fn read_words<const N: usize>(self) -> [u64; N] {
        self.read_words_at::<0, N>()
    }

    /// Loads `N` 64-bit words from `AT` on, each once.
    #[inline(always)]
    pub fn read_words_at<const AT: usize, const N: usize>(self) -> [u64; N] {
        const { assert!(AT.is_multiple_of(8) && AT + N * 8 <= SIZE, "words of the entry") };
        core::array::from_fn(|i| {
            // SAFETY: `N` words from `AT` on lie in the entry, as was just asserted.
            let word = unsafe { self.0.cast::<u64>().add(AT / 8 + i) };
            // SAFETY: as in `load32`.
            unsafe { AtomicU64::from_ptr(word.as_ptr()) }.load(Ordering::Relaxed)
        })
    }

    /// Writes the first `N` 64-bit words, each once.
    #[inline(always)]
    pub fn write_words<const N: usize>(self, words: &[u64; N]) {
        self.write_words_at::<0, N>(words);
    }

    /// Writes `N` 64-bit words from `AT` on, each once.
    #[inline(always)]
    pub fn write_words_at<const AT: usize, const N: usize>(self, words: &[u64; N]) {
        const { assert!(AT.is_multiple_of(8) && AT + N * 8 <= SIZE, "words of the entry") };
        for (i, &value) in words.iter().enumerate() {
            // SAFETY: `N` words from `AT` on lie in the entry, as was just asserted.
            let word = unsafe { self.0.cast::<u64>().add(AT / 8 + i) };
            // SAFETY: as in `load32`.
            unsafe { AtomicU64::from_ptr(word.as_ptr()) }.store(value, Ordering::Relaxed);
        }
    }

    #[inline(always)]
    fn word<T, const AT: usize>(self) -> *mut T {
        const { assert!(AT.is_multiple_of(size_of::<T>()) && AT + size_of::<T>() <= SIZE) };
        // SAFETY: byte `AT` lies in the entry, as was just asserted.
        unsafe { self.0.add(AT) }.cast().as_ptr()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageSize;

    #[test]
    fn entries_are_the_bytes_of_the_region_and_wrap() {
        let region = Region::new(4096, PageSize::Small).unwrap();
        let ring = Entries::<16>::new(region.clone(), 4096 - 64, 4);
        ring.at(3).write_words(&[1 << 32 | 2, 3]);
        ring.at(4).write_words(&[4]);
        assert_eq!(region.load64(4096 - 16, Ordering::Relaxed), 1 << 32 | 2);
        assert_eq!(region.load64(4096 - 64, Ordering::Relaxed), 4);
        assert_eq!(ring.at(7).load32::<8>(Ordering::Relaxed), 3);
        assert_eq!(ring.at(3).load32::<4>(Ordering::Relaxed), 1);
        ring.at(1).store32::<12>(9, Ordering::Relaxed);
        assert_eq!(ring.at(5).read_words(), [0, 9 << 32]);
        ring.at(2).write_words_at::<8, 1>(&[5]);
        assert_eq!(ring.at(6).read_words(), [0, 5]);
        assert_eq!(ring.at(2).read_words_at::<8, 1>(), [5]);
    }

    #[test]
    #[should_panic(expected = "ring outside")]
    fn entries_outside_panic() {
        Entries::<16>::new(Region::new(4096, PageSize::Small).unwrap(), 4096 - 56, 4);
    }

    #[test]
    fn copies_and_words_agree() {
        let a = Region::new(8192, PageSize::Small).unwrap();
        let b = Region::new(4096, PageSize::Small).unwrap();
        let text: Vec<u8> = (0..=255).collect();
        a.write(4000, &text);
        copy(&a, 4000, &b, 16, 256);
        let mut back = [0; 256];
        b.read(16, &mut back);
        assert_eq!(back[..], text[..]);
        assert_eq!(b.load32(16, Ordering::Relaxed), 0x0302_0100);
        assert_eq!(b.read_words::<2>(16)[1], 0x0f0e_0d0c_0b0a_0908);
        b.zero(16, 8);
        assert_eq!(b.load64(16, Ordering::Relaxed), 0);
        assert_eq!(b.load16(24, Ordering::Relaxed), 0x0908);
        assert!(b.replace32(16, 0, 7) && !b.replace32(16, 0, 8));
        assert_eq!(b.load32(16, Ordering::Relaxed), 7);
    }

    #[test]
    #[should_panic(expected = "outside a DMA region")]
    fn outside_panics() {
        Region::new(4096, PageSize::Small).unwrap().write(4095, &[1, 2]);
    }

    #[test]
    #[should_panic(expected = "overlapping copy")]
    fn overlap_panics() {
        let a = Region::new(8192, PageSize::Small).unwrap();
        copy(&a, 0, &a, 100, 101);
    }

    #[test]
    #[should_panic(expected = "misaligned")]
    fn misaligned_panics() {
        Region::new(4096, PageSize::Small).unwrap().load32(2, Ordering::Relaxed);
    }
}
