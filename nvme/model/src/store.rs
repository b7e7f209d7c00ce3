//! [`Store`]: the stable storage behind a namespace, memory or a file.
//!
//! Owned by the controller. Offsets and lengths are bytes, multiples of 512, and lie inside the
//! namespace: the caller has checked them against its size.

use std::collections::HashMap;
use std::fs::File;
use std::io;

use crate::file::FileStore;
use crate::memory::{DmaFault, HostMemory};
use crate::prp::{Pieces, Span};

/// Stable storage of a namespace.
#[derive(Debug)]
pub struct Store(Kind);

#[derive(Debug)]
enum Kind {
    Memory(MemoryStore),
    File(FileStore),
}

/// Why data could not be moved.
#[derive(Debug)]
pub(crate) enum MoveError {
    Dma(DmaFault),
    Io(io::Error),
}

impl From<DmaFault> for MoveError {
    fn from(fault: DmaFault) -> MoveError {
        MoveError::Dma(fault)
    }
}

impl From<io::Error> for MoveError {
    fn from(error: io::Error) -> MoveError {
        MoveError::Io(error)
    }
}

/// Source of zeroes for host memory and files.
pub(crate) static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

impl Store {
    /// Memory that takes space only where something was written.
    pub fn memory() -> Store {
        Store(Kind::Memory(MemoryStore::default()))
    }

    /// A file or block device. Reads beyond its end give zeroes, writes extend it; what is zeroed
    /// or deallocated becomes a hole where the filesystem can. `sync`: Flush and FUA end with
    /// fdatasync. The file must be open for reading, and for writing unless the namespace is
    /// read only.
    ///
    /// # Errors
    /// If its length cannot be found out.
    pub fn file(file: File, sync: bool) -> io::Result<Store> {
        Ok(Store(Kind::File(FileStore::new(file, sync)?)))
    }

    /// The file behind the store, if it is one.
    pub fn into_file(self) -> Option<File> {
        match self.0 {
            Kind::Memory(_) => None,
            Kind::File(f) => Some(f.into_file()),
        }
    }

    /// Moves stored bytes from `offset` on into host memory.
    pub(crate) fn read_to<M: HostMemory>(
        &mut self,
        offset: u64,
        mut to: Pieces<'_>,
        mem: &mut M,
    ) -> Result<(), MoveError> {
        match &mut self.0 {
            Kind::Memory(m) => m.read_to(offset, to, mem),
            Kind::File(f) => f.read_to(offset, &mut to, mem),
        }
    }

    /// Moves host memory into the store from `offset` on.
    pub(crate) fn write_from<M: HostMemory>(
        &mut self,
        offset: u64,
        from: &[Span],
        mem: &mut M,
    ) -> Result<(), MoveError> {
        match &mut self.0 {
            Kind::Memory(m) => m.write_from(offset, from, mem),
            Kind::File(f) => f.write_from(offset, from, mem),
        }
    }

    /// Reads into a buffer.
    ///
    /// # Errors
    /// What the file says.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &mut self.0 {
            Kind::Memory(m) => {
                m.read(offset, into);
                Ok(())
            }
            Kind::File(f) => f.read(offset, into),
        }
    }

    /// Writes from a buffer.
    ///
    /// # Errors
    /// What the file says.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        match &mut self.0 {
            Kind::Memory(m) => {
                m.write(offset, from);
                Ok(())
            }
            Kind::File(f) => f.write(offset, from),
        }
    }

    /// Makes a range read as zeroes, giving its space back if `deallocate`.
    pub(crate) fn zero(&mut self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        match &mut self.0 {
            Kind::Memory(m) => {
                m.zero(offset, len);
                Ok(())
            }
            Kind::File(f) => f.zero(offset, len, deallocate),
        }
    }

    /// Makes what was written durable, where durable is more than written.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Kind::Memory(_) => Ok(()),
            Kind::File(f) => f.sync(),
        }
    }
}

const CHUNK: u64 = 64 << 10;

/// Sparse memory in chunks of 64 KiB; a chunk that is not there reads as zeroes.
#[derive(Debug, Default)]
struct MemoryStore {
    chunks: HashMap<u64, Box<[u8]>>,
}

impl MemoryStore {
    fn chunk_mut(&mut self, index: u64) -> &mut [u8] {
        self.chunks.entry(index).or_insert_with(|| vec![0; CHUNK as usize].into())
    }

    fn read_to<M: HostMemory>(
        &mut self,
        mut offset: u64,
        mut to: Pieces<'_>,
        mem: &mut M,
    ) -> Result<(), MoveError> {
        while let Some((addr, n)) = to.next((CHUNK - offset % CHUNK) as usize) {
            let at = (offset % CHUNK) as usize;
            match self.chunks.get(&(offset / CHUNK)) {
                Some(chunk) => mem.write(addr, &chunk[at..at + n])?,
                None => mem.write(addr, &ZEROES[..n])?,
            }
            offset += n as u64;
        }
        Ok(())
    }

    fn write_from<M: HostMemory>(
        &mut self,
        mut offset: u64,
        from: &[Span],
        mem: &mut M,
    ) -> Result<(), MoveError> {
        let mut from = Pieces::new(from);
        while let Some((addr, n)) = from.next((CHUNK - offset % CHUNK) as usize) {
            let at = (offset % CHUNK) as usize;
            mem.read(addr, &mut self.chunk_mut(offset / CHUNK)[at..at + n])?;
            offset += n as u64;
        }
        Ok(())
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        for_chunks(offset, into.len() as u64, |index, at, from, n| {
            let part = &mut into[from..from + n];
            match self.chunks.get(&index) {
                Some(chunk) => part.copy_from_slice(&chunk[at..at + n]),
                None => part.fill(0),
            }
        });
    }

    fn write(&mut self, offset: u64, from: &[u8]) {
        for_chunks(offset, from.len() as u64, |index, at, done, n| {
            self.chunk_mut(index)[at..at + n].copy_from_slice(&from[done..done + n]);
        });
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        if len / CHUNK > self.chunks.len() as u64 {
            // A huge range over few chunks: look at the chunks, not at the range.
            self.chunks.retain(|&index, chunk| {
                let start = index * CHUNK;
                let (from, to) = (offset.max(start), end.min(start + CHUNK));
                if from < to {
                    chunk[(from - start) as usize..(to - start) as usize].fill(0);
                }
                to.saturating_sub(from) < CHUNK
            });
            return;
        }
        let chunks = &mut self.chunks;
        for_chunks(offset, len, |index, at, _, n| {
            if n as u64 == CHUNK {
                chunks.remove(&index);
            } else if let Some(chunk) = chunks.get_mut(&index) {
                chunk[at..at + n].fill(0);
            }
        });
    }
}

/// Calls `f(chunk index, offset in chunk, offset in range, length)` for each chunk of a range.
fn for_chunks(offset: u64, len: u64, mut f: impl FnMut(u64, usize, usize, usize)) {
    let mut done = 0;
    while done < len {
        let at = offset + done;
        let n = (CHUNK - at % CHUNK).min(len - done);
        f(at / CHUNK, (at % CHUNK) as usize, done as usize, n as usize);
        done += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use std::io::Write;

    /// Random writes, zeroes and reads against a plain vector.
    fn agrees_with_a_vector(mut store: Store, seed: u64) {
        const SIZE: usize = 1 << 20;
        let mut rng = Rng::new(seed);
        let mut expect = vec![0u8; SIZE];
        store.read(0, &mut expect).unwrap();
        for round in 0..200 {
            let offset = rng.below(SIZE / 512) * 512;
            let longest = if round % 10 == 0 { SIZE } else { 16 << 10 };
            let len = ((1 + rng.below(longest / 512)) * 512).min(SIZE - offset);
            let range = offset..offset + len;
            match rng.below(4) {
                0 => {
                    let data: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
                    store.write(offset as u64, &data).unwrap();
                    expect[range].copy_from_slice(&data);
                }
                kind @ (1 | 2) => {
                    store.zero(offset as u64, len as u64, kind == 1).unwrap();
                    expect[range].fill(0);
                }
                _ => {
                    let mut data = vec![1; len];
                    store.read(offset as u64, &mut data).unwrap();
                    assert!(data == expect[range], "round {round} offset {offset} len {len}");
                }
            }
        }
        let mut all = vec![1; SIZE];
        store.read(0, &mut all).unwrap();
        assert!(all == expect);
    }

    #[test]
    fn memory_store() {
        agrees_with_a_vector(Store::memory(), 1);
    }

    #[test]
    fn file_store() {
        let mut file = tempfile::tempfile().unwrap();
        // Not a multiple of the block, and shorter than the namespace.
        file.write_all(&[0xa5; 300_001]).unwrap();
        agrees_with_a_vector(Store::file(file, true).unwrap(), 2);
    }

    #[test]
    fn huge_zero_is_quick_and_exact() {
        let mut store = Store::memory();
        store.write(0, &[1; 1024]).unwrap();
        store.write(1 << 40, &[2; 1024]).unwrap();
        store.zero(512, (1 << 40) + 512 - 512, true).unwrap();
        let mut data = [9; 1024];
        store.read(0, &mut data).unwrap();
        assert!(data[..512] == [1; 512] && data[512..] == [0; 512]);
        store.read(1 << 40, &mut data).unwrap();
        assert!(data[..512] == [0; 512] && data[512..] == [2; 512]);
    }
}
