//! [`Mapping`]: a batch of one domain's grants, mapped side by side.

use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::errno::Errno;

use super::Gntdev;
use super::memory::Memory;
use crate::abi::GrantRef;

/// How often a page that is paged out is waited for, a millisecond each time.
const TRIES: u32 = 8;

/// Why grants could not be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// At least one of them is not granted, or for reading only. Which is not told.
    #[error("a grant reference cannot be mapped")]
    Grant,
    /// A page of the guest's is paged out, and did not come back in time.
    #[error("a granted page is paged out")]
    PagedOut,
    /// The host has no room for it, or refuses.
    #[error("cannot map grants: {0}")]
    Host(Errno),
}

/// Granted pages, readable and writable, in the order in which their references were given. Offsets
/// are in bytes from the first; an access outside panics, since offsets come from our own layouts.
/// Unmapped when it is dropped, by system calls that disturb all processors of this process: never
/// while a ring is being served.
#[derive(Debug)]
pub struct Mapping {
    // In this order: the range goes first, since an entry that goes before it stays until it does.
    memory: Memory,
    entry: Entry,
}

/// An entry of the device's table.
#[derive(Debug)]
struct Entry {
    device: Gntdev,
    index: u64,
    pages: usize,
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Err(why) = self.device.kernel().unmap(self.index, self.pages) {
            log::error!("cannot give {} granted pages back: {why}", self.pages);
        }
    }
}

impl Gntdev {
    /// Maps grants of a domain as one range. Control threads only: it may wait some milliseconds.
    ///
    /// # Errors
    /// If one of them cannot be mapped, none is.
    pub fn map(&self, domid: u16, refs: &[u32]) -> Result<Mapping, MapError> {
        for _ in 1..TRIES {
            match self.try_map(domid, refs) {
                Err(MapError::PagedOut) => std::thread::sleep(Duration::from_millis(1)),
                other => return other,
            }
        }
        self.try_map(domid, refs)
    }

    fn try_map(&self, domid: u16, refs: &[u32]) -> Result<Mapping, MapError> {
        let refs: Vec<GrantRef> =
            refs.iter().map(|&reference| GrantRef { domid: domid.into(), reference }).collect();
        let pages = refs.len();
        // No grant is looked at yet.
        let index = self.kernel().map(&refs).map_err(MapError::Host)?;
        // Goes again if the range cannot be had.
        let entry = Entry { device: self.clone(), index, pages };
        match self.kernel().mmap(index, pages) {
            Ok(memory) => Ok(Mapping { memory, entry }),
            Err(Errno::EINVAL) => Err(MapError::Grant),
            Err(Errno::EAGAIN) => Err(MapError::PagedOut),
            Err(why) => Err(MapError::Host(why)),
        }
    }
}

impl Mapping {
    #[inline]
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.entry.pages
    }

    /// Length in bytes.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The entry's place in the device, which no other has at the same time.
    pub(super) fn index(&self) -> u64 {
        self.entry.index
    }

    /// Loads a 32-bit word. `offset` is a multiple of 4.
    #[inline]
    pub fn load32(&self, offset: usize, order: Ordering) -> u32 {
        self.memory.load32(offset, order)
    }

    /// Stores a 32-bit word. `offset` is a multiple of 4.
    #[inline]
    pub fn store32(&self, offset: usize, value: u32, order: Ordering) {
        self.memory.store32(offset, value, order);
    }

    /// Loads 64-bit words, each once. `offset` is a multiple of 8.
    #[inline]
    pub fn load64s<const N: usize>(&self, offset: usize) -> [u64; N] {
        self.memory.load64s(offset)
    }

    /// Stores 64-bit words, each once. `offset` is a multiple of 8.
    #[inline]
    pub fn store64s<const N: usize>(&self, offset: usize, words: &[u64; N]) {
        self.memory.store64s(offset, words);
    }
}
