//! A file or block device as stable storage.
//!
//! Plain positioned reads and writes through one staging buffer made at start; holes are punched
//! where the filesystem can. Called by the controller, on the thread that steps it.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::memory::HostMemory;
use crate::prp::{Pieces, Span};
use crate::store::{MoveError, ZEROES};

/// Bytes moved per system call at most.
const STAGING: usize = 256 << 10;

#[derive(Debug)]
pub(crate) struct FileStore {
    file: File,
    /// Where the file ends; bytes from here on read as zeroes.
    len: u64,
    sync: bool,
    staging: Box<[u8]>,
    can_zero_range: bool,
    can_punch: bool,
}

impl FileStore {
    pub(crate) fn new(file: File, sync: bool) -> io::Result<FileStore> {
        // Seeking finds the size of a block device too, which the metadata do not tell.
        let len = (&file).seek(SeekFrom::End(0))?;
        Ok(FileStore {
            file,
            len,
            sync,
            staging: vec![0; STAGING].into(),
            can_zero_range: true,
            can_punch: true,
        })
    }

    pub(crate) fn into_file(self) -> File {
        self.file
    }

    pub(crate) fn read_to<M: HostMemory>(
        &mut self,
        mut offset: u64,
        to: &mut Pieces<'_>,
        mem: &mut M,
    ) -> Result<(), MoveError> {
        // How much of the staging buffer is filled, and handed out.
        let (mut filled, mut used) = (0, 0);
        let mut left = to.remaining();
        while left > 0 {
            if used == filled {
                filled = left.min(STAGING as u64) as usize;
                used = 0;
                read_zero_filled(&self.file, self.len, offset, &mut self.staging[..filled])?;
                offset += filled as u64;
            }
            let Some((addr, n)) = to.next(filled - used) else { break };
            mem.write(addr, &self.staging[used..used + n])?;
            used += n;
            left -= n as u64;
        }
        Ok(())
    }

    pub(crate) fn write_from<M: HostMemory>(
        &mut self,
        mut offset: u64,
        from: &[Span],
        mem: &mut M,
    ) -> Result<(), MoveError> {
        let mut from = Pieces::new(from);
        let mut filled = 0;
        while let Some((addr, n)) = from.next(STAGING - filled) {
            mem.read(addr, &mut self.staging[filled..filled + n])?;
            filled += n;
            if filled == STAGING {
                self.write_staged(offset, filled)?;
                offset += filled as u64;
                filled = 0;
            }
        }
        Ok(self.write_staged(offset, filled)?)
    }

    fn write_staged(&mut self, offset: u64, len: usize) -> io::Result<()> {
        self.file.write_all_at(&self.staging[..len], offset)?;
        self.grown_to(offset + len as u64, len);
        Ok(())
    }

    fn grown_to(&mut self, end: u64, len: usize) {
        if len > 0 {
            self.len = self.len.max(end);
        }
    }

    pub(crate) fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        read_zero_filled(&self.file, self.len, offset, into)
    }

    pub(crate) fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, offset)?;
        self.grown_to(offset + from.len() as u64, from.len());
        Ok(())
    }

    pub(crate) fn zero(&mut self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        // Beyond the end all is zero already.
        let end = offset.saturating_add(len).min(self.len);
        if offset >= end {
            return Ok(());
        }
        let len = end - offset;
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if !deallocate && self.can_zero_range {
            match self.allocate(keep | FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, len) {
                Err(e) if unsupported(&e) => self.can_zero_range = false,
                other => return other,
            }
        }
        if self.can_punch {
            match self.allocate(keep | FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len) {
                Err(e) if unsupported(&e) => self.can_punch = false,
                other => return other,
            }
        }
        let mut at = offset;
        while at < end {
            let n = (end - at).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(Errno::EFBIG.into());
        };
        loop {
            match fallocate(&self.file, flags, offset, len) {
                Err(Errno::EINTR) => {}
                other => return other.map_err(Into::into),
            }
        }
    }

    pub(crate) fn sync(&mut self) -> io::Result<()> {
        if self.sync { self.file.sync_data() } else { Ok(()) }
    }
}

fn unsupported(error: &io::Error) -> bool {
    error.raw_os_error().map(Errno::from_raw).is_some_and(|e| {
        matches!(e, Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV)
    })
}

/// Reads a range; what lies at or beyond `end`, or beyond where the file really ends, is zero.
fn read_zero_filled(file: &File, end: u64, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let inside = end.saturating_sub(offset).min(into.len() as u64) as usize;
    let mut done = 0;
    while done < inside {
        match file.read_at(&mut into[done..inside], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    into[done..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_written_where_no_holes_can_be() {
        let mut store = FileStore::new(tempfile::tempfile().unwrap(), false).unwrap();
        store.can_zero_range = false;
        store.can_punch = false;
        store.write(0, &[7; 200 << 10]).unwrap();
        store.zero(512, 150 << 10, true).unwrap();
        store.zero(199 << 10, 1 << 40, false).unwrap();
        assert_eq!(store.file.metadata().unwrap().len(), 200 << 10, "nothing to do past the end");
        let mut data = vec![1; 201 << 10];
        store.read(0, &mut data).unwrap();
        let zero = |at: usize| (512..512 + (150 << 10)).contains(&at) || at >= 199 << 10;
        assert!(data.iter().enumerate().all(|(at, &b)| b == if zero(at) { 0 } else { 7 }));
    }
}
