//! [`Memory`]: a small file in memory.

use block::{Status, Storage, StorageError};

/// How long the file can become.
const LIMIT: u64 = 4 << 20;

/// A file.
#[derive(Clone)]
pub(crate) struct Memory(pub(crate) Vec<u8>);

fn full(what: &'static str, offset: u64, len: u64) -> StorageError {
    StorageError { what, offset, len, status: Status::NoSpace, detail: 0 }
}

impl Storage for Memory {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn capacity(&self) -> u64 {
        i64::MAX as u64 & !4095
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        let from = &self.0[start..];
        let n = from.len().min(into.len());
        into[..n].copy_from_slice(&from[..n]);
        into[n..].fill(0);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        let len = from.len() as u64;
        let end = offset.checked_add(len).filter(|&end| end <= LIMIT);
        let end = end.ok_or_else(|| full("write", offset, len))? as usize;
        self.0.resize(self.0.len().max(end), 0);
        self.0[offset as usize..end].copy_from_slice(from);
        Ok(())
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        let end = offset.checked_add(len).filter(|&end| end <= LIMIT);
        let end = end.ok_or_else(|| full("write zeroes", offset, len))? as usize;
        self.0.resize(self.0.len().max(end), 0);
        self.0[offset as usize..end].fill(0);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        if len > LIMIT {
            return Err(full("set length", len, 0));
        }
        self.0.resize(len as usize, 0);
        Ok(())
    }
}
