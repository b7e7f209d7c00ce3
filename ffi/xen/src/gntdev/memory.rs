//! [`Memory`]: granted pages as they are mapped here, and all accesses to them.
//!
//! The guest may write any byte at any instant, so no access makes a reference: words are atomic,
//! and copies go through `dma`'s one opaque copy. All `unsafe` of mapping is in this file.

use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use dma::Region;
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags};

use super::Mapping;
use crate::abi::PAGE;

/// A range of mapped pages; unmapped when it is dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    /// At least a page, a multiple of it.
    bytes: usize,
    /// By this a stand-in of the kernel sees that the range is still mapped.
    #[cfg(any(test, feature = "fake"))]
    _mapped: Arc<()>,
}

// SAFETY: the range is mapped for the life of the value, and all accesses are opaque copies or
// atomic words, so that no two threads can make a data race that Rust would call undefined.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps grants for which the kernel has prepared a place in the file.
    pub(crate) fn of_grants(fd: BorrowedFd<'_>, index: u64, pages: usize) -> Result<Memory, Errno> {
        let bytes = pages.checked_mul(PAGE).and_then(NonZeroUsize::new).ok_or(Errno::EINVAL)?;
        let offset = i64::try_from(index).map_err(|_| Errno::EINVAL)?;
        // SAFETY: a fresh mapping at an address that the kernel chooses; it overlaps nothing.
        let base = unsafe {
            nix::sys::mman::mmap(
                None,
                bytes,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                fd,
                offset,
            )
        }?;
        Ok(Memory::new(base.cast(), bytes.get()))
    }

    fn new(base: NonNull<u8>, bytes: usize) -> Memory {
        #[cfg(any(test, feature = "fake"))]
        let memory = Memory { base, bytes, _mapped: Arc::default() };
        #[cfg(not(any(test, feature = "fake")))]
        let memory = Memory { base, bytes };
        memory
    }

    /// Maps pages of a guest of the stand-in side by side: the same memory as the guest's.
    #[cfg(any(test, feature = "fake"))]
    pub(crate) fn of_pages(guest: &Region, pages: &[u32]) -> Result<Memory, Errno> {
        use std::os::fd::AsFd;

        let bytes = NonZeroUsize::new(pages.len() * PAGE).ok_or(Errno::EINVAL)?;
        // SAFETY: a fresh mapping at an address that the kernel chooses, which keeps the range.
        let base = unsafe {
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            nix::sys::mman::mmap_anonymous(None, bytes, ProtFlags::PROT_NONE, flags)
        }?;
        let memory = Memory::new(base.cast(), bytes.get());
        for (i, &page) in pages.iter().enumerate() {
            let place = NonZeroUsize::new(base.as_ptr() as usize + i * PAGE);
            // SAFETY: takes the place of a page of the range just made, which nobody knows yet.
            unsafe {
                nix::sys::mman::mmap(
                    place,
                    NonZeroUsize::new(PAGE).ok_or(Errno::EINVAL)?,
                    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                    MapFlags::MAP_SHARED | MapFlags::MAP_FIXED,
                    guest.fd().as_fd(),
                    i64::from(page) * PAGE as i64,
                )
            }?;
        }
        Ok(memory)
    }

    /// What tells whether the range is still mapped.
    #[cfg(any(test, feature = "fake"))]
    pub(crate) fn witness(&self) -> std::sync::Weak<()> {
        Arc::downgrade(&self._mapped)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Pointer to `count` words at `offset`, inside and aligned. Panics if that is not so, since
    /// offsets come from our own layouts.
    #[inline(always)]
    fn words<T>(&self, offset: usize, count: usize) -> *mut T {
        let len = count * size_of::<T>();
        assert!(len <= PAGE, "a few words");
        assert!(offset.is_multiple_of(align_of::<T>()), "misaligned word in granted pages");
        // No underflow: no range is shorter than a page.
        assert!(offset <= self.bytes - len, "access outside granted pages");
        // SAFETY: the offset was just found to lie within the mapping, `len` bytes before its end.
        unsafe { self.base.as_ptr().add(offset) }.cast()
    }

    #[inline]
    pub(crate) fn load32(&self, offset: usize, order: Ordering) -> u32 {
        let at = self.words::<u32>(offset, 1);
        // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
        unsafe { AtomicU32::from_ptr(at) }.load(order)
    }

    #[inline]
    pub(crate) fn store32(&self, offset: usize, value: u32, order: Ordering) {
        let at = self.words::<u32>(offset, 1);
        // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
        unsafe { AtomicU32::from_ptr(at) }.store(value, order);
    }

    #[inline]
    pub(crate) fn load64s<const N: usize>(&self, offset: usize) -> [u64; N] {
        let at = self.words::<u64>(offset, N);
        core::array::from_fn(|i| {
            // SAFETY: `words` checked N of them from here.
            let word = unsafe { at.add(i) };
            // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
            unsafe { AtomicU64::from_ptr(word) }.load(Ordering::Relaxed)
        })
    }

    #[inline]
    pub(crate) fn store64s<const N: usize>(&self, offset: usize, words: &[u64; N]) {
        let at = self.words::<u64>(offset, N);
        for (i, &value) in words.iter().enumerate() {
            // SAFETY: `words` checked N of them from here.
            let word = unsafe { at.add(i) };
            // SAFETY: aligned, inside the mapping, and only ever accessed atomically or by copies.
            unsafe { AtomicU64::from_ptr(word) }.store(value, Ordering::Relaxed);
        }
    }

    fn page(&self, page: usize) -> NonNull<u8> {
        assert!(page < self.bytes / PAGE, "a page outside granted pages");
        // SAFETY: the page was just found to lie within the mapping.
        unsafe { self.base.add(page * PAGE) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the range was mapped with this length when this was made; all that could still
        // reach into it holds it.
        let done = unsafe { nix::sys::mman::munmap(self.base.cast(), self.bytes) };
        if let Err(why) = done {
            log::error!("cannot unmap granted pages: {why}");
        }
    }
}

/// One page of a mapping, which stays mapped as long as this is there.
#[derive(Debug)]
pub(crate) struct Page {
    at: NonNull<u8>,
    of: Arc<Mapping>,
}

// SAFETY: the page is part of a `Memory`, which may be accessed from any thread, and which `of`
// keeps mapped.
unsafe impl Send for Page {}

impl Page {
    pub(crate) fn new(of: &Arc<Mapping>, page: usize) -> Page {
        Page { at: of.memory().page(page), of: of.clone() }
    }

    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.of
    }

    /// Pointer to a range of the page; panics if it lies outside.
    #[inline(always)]
    fn range(&self, offset: u32, len: u32) -> *mut u8 {
        let inside = offset as usize <= PAGE && len as usize <= PAGE - offset as usize;
        assert!(inside, "access outside a granted page");
        // SAFETY: the offset was just found to lie in the page, which `of` keeps mapped.
        unsafe { self.at.as_ptr().add(offset as usize) }
    }

    /// Copies from the page into a region.
    #[inline]
    pub(crate) fn read(&self, offset: u32, local: &Region, at: usize, len: u32) {
        let from = self.range(offset, len);
        // SAFETY: `range` checked the source: granted pages, mapped apart from any region.
        unsafe { local.copy_from(at, from, len as usize) }
    }

    /// Copies from a region into the page.
    #[inline]
    pub(crate) fn write(&self, offset: u32, local: &Region, at: usize, len: u32) {
        let to = self.range(offset, len);
        // SAFETY: `range` checked the destination: granted pages, mapped apart from any region.
        unsafe { local.copy_to(at, to, len as usize) }
    }
}
