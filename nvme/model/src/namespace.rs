//! A namespace: its size and format, its stable storage, and its volatile cache.
//!
//! Owned by the controller. Block ranges have been checked against the size by the caller.

use std::io;

use crate::cache::{Cache, Fate, SECTOR, fate, sector_survives};
use crate::memory::HostMemory;
use crate::prp::{Pieces, Span};
use crate::store::{MoveError, Store, ZEROES};

/// A namespace to be put into a controller.
#[derive(Debug)]
pub struct NamespaceConfig {
    /// Where its blocks are.
    pub store: Store,
    /// Size in blocks, at least 1; at most 2^63 bytes.
    pub blocks: u64,
    /// Block size in bytes: 512 or 4096.
    pub lba: u32,
    /// Refuse everything that would change it.
    pub read_only: bool,
}

#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) blocks: u64,
    /// log2 of the block size.
    pub(crate) shift: u32,
    pub(crate) read_only: bool,
    pub(crate) active: bool,
    /// Whether the write cache is on; what is in it is flushed when it is turned off.
    pub(crate) cached: bool,
    store: Store,
    cache: Cache,
}

impl Namespace {
    pub(crate) fn new(config: NamespaceConfig, cache_bytes: u64, cached: bool) -> Namespace {
        let shift = config.lba.trailing_zeros();
        Namespace {
            blocks: config.blocks,
            shift,
            read_only: config.read_only,
            active: true,
            cached,
            store: config.store,
            cache: Cache::new(shift, cache_bytes),
        }
    }

    /// Empties it and gives it blocks of another size; what does not fill a block is lost.
    pub(crate) fn format(&mut self, shift: u32, cache_bytes: u64) -> io::Result<()> {
        let bytes = self.blocks << self.shift;
        self.cache = Cache::new(shift, cache_bytes);
        self.store.zero(0, bytes, true)?;
        self.store.sync()?;
        self.blocks = bytes >> shift;
        self.shift = shift;
        Ok(())
    }

    pub(crate) fn into_store(self) -> Store {
        self.store
    }

    /// Whether a block range lies inside.
    pub(crate) fn holds(&self, lba: u64, blocks: u64) -> bool {
        lba.checked_add(blocks).is_some_and(|end| end <= self.blocks)
    }

    pub(crate) fn read<M: HostMemory>(
        &mut self,
        lba: u64,
        blocks: u32,
        to: &[Span],
        mem: &mut M,
    ) -> Result<(), MoveError> {
        self.store.read_to(lba << self.shift, Pieces::new(to), mem)?;
        if self.cache.is_empty() {
            return Ok(());
        }
        // What the cache holds is newer.
        let mut pieces = Pieces::new(to);
        let mut at = lba;
        for (block, data) in self.cache.blocks(lba, blocks) {
            pieces.skip((block - at) << self.shift);
            let data = data.unwrap_or(&ZEROES[..1 << self.shift]);
            let mut done = 0;
            while done < data.len() {
                let Some((addr, n)) = pieces.next(data.len() - done) else { break };
                mem.write(addr, &data[done..done + n])?;
                done += n;
            }
            at = block + 1;
        }
        Ok(())
    }

    pub(crate) fn write<M: HostMemory>(
        &mut self,
        lba: u64,
        blocks: u32,
        from: &[Span],
        fua: bool,
        mem: &mut M,
    ) -> Result<(), MoveError> {
        if !self.cached || fua {
            let moved = self.store.write_from(lba << self.shift, from, mem);
            // Also after a failure: part of the blocks may have changed.
            self.cache.supersede(lba, blocks);
            moved?;
            if self.cached {
                self.store.sync()?;
            }
            return Ok(());
        }
        let data = self.fetch((blocks as usize) << self.shift, from, mem)?;
        Ok(self.cache.write(&mut self.store, lba, data)?)
    }

    fn fetch<M: HostMemory>(
        &mut self,
        len: usize,
        from: &[Span],
        mem: &mut M,
    ) -> Result<Vec<u8>, MoveError> {
        let mut data = self.cache.buffer(len);
        let mut pieces = Pieces::new(from);
        let mut done = 0;
        while let Some((addr, n)) = pieces.next(len - done) {
            if let Err(fault) = mem.read(addr, &mut data[done..done + n]) {
                self.cache.give_back(data);
                return Err(fault.into());
            }
            done += n;
        }
        Ok(data)
    }

    pub(crate) fn zero(
        &mut self,
        lba: u64,
        blocks: u32,
        deallocate: bool,
        fua: bool,
    ) -> io::Result<()> {
        if !self.cached || fua {
            let len = u64::from(blocks) << self.shift;
            let done = self.store.zero(lba << self.shift, len, deallocate);
            self.cache.supersede(lba, blocks);
            done?;
            return if self.cached { self.store.sync() } else { Ok(()) };
        }
        self.cache.zero(&mut self.store, lba, blocks, deallocate)
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.cache.flush(&mut self.store)?;
        self.store.sync()
    }

    /// Reads bytes as a Read command would see them.
    pub(crate) fn peek(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.store.read(offset, into)?;
        let (size, end) = (1u64 << self.shift, offset + into.len() as u64);
        let first = offset >> self.shift;
        let count = end.div_ceil(size) - first;
        for (block, data) in self.cache.blocks(first, u32::try_from(count).unwrap_or(u32::MAX)) {
            let start = block << self.shift;
            let (from, to) = (start.max(offset), end.min(start + size));
            let part = &mut into[(from - offset) as usize..(to - offset) as usize];
            match data {
                Some(d) => part.copy_from_slice(&d[(from - start) as usize..][..part.len()]),
                None => part.fill(0),
            }
        }
        Ok(())
    }

    /// A write that had not completed when the power went: the seed decides how much of it
    /// reaches stable storage. `seq` numbers such writes.
    pub(crate) fn cut_write<M: HostMemory>(
        &mut self,
        lba: u64,
        blocks: u32,
        from: &[Span],
        seed: u64,
        seq: u64,
        mem: &mut M,
    ) -> Result<(), MoveError> {
        let fate = fate(seed, seq);
        if fate == Fate::Lost {
            return Ok(());
        }
        let data = self.fetch((blocks as usize) << self.shift, from, mem)?;
        let start = lba << self.shift;
        for (i, sector) in data.chunks(SECTOR as usize).enumerate() {
            let at = start + i as u64 * SECTOR;
            if fate == Fate::Kept || sector_survives(seed, seq, at / SECTOR) {
                self.store.write(at, sector)?;
            }
        }
        Ok(())
    }

    pub(crate) fn power_cut(&mut self, seed: u64) -> io::Result<()> {
        self.cache.power_cut(&mut self.store, seed)
    }
}
