//! [`HostStorage`]: a file or kernel block device as [`Storage`], through the page cache.
//!
//! Control path only: opening, checking, creating. What serves a guest goes through a leaf.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use block::{Status, Storage, StorageError};
use nix::fcntl::{
    FallocateFlags, FcntlArg, OFlag, PosixFadviseAdvice as Advice, fallocate, fcntl, posix_fadvise,
};

/// Where a file may end at most.
const MAX: u64 = i64::MAX as u64 & !4095;

/// From so many bytes on reads or writes one after another are a job over a whole image.
const BULK: u64 = 1 << 20;

/// How much further the kernel is told to read while a bulk read is worked on.
const AHEAD: u64 = 4 << 20;

/// How far behind a bulk write the kernel has surely written back what it was told to.
const BEHIND: u64 = 16 << 20;

/// An opened file or block device.
#[derive(Debug)]
pub struct HostStorage {
    file: File,
    len: u64,
    device: bool,
    read_only: bool,
    /// Where the last read ended.
    last_read: u64,
    /// What is read was said before, so the kernel need not keep it.
    read_once: bool,
    /// Where the writes one after another began.
    writes_from: u64,
    /// Bytes written one after another of which the kernel was told nothing.
    written: std::ops::Range<u64>,
}

impl HostStorage {
    /// Opens a file that exists.
    ///
    /// # Errors
    /// As the kernel says; or that it is neither a regular file nor a block device.
    pub fn open(path: &Path, writable: bool) -> io::Result<HostStorage> {
        // A named pipe would keep us until somebody opens its other end, for ever perhaps.
        let mut options = OpenOptions::new();
        options.read(true).write(writable).custom_flags(OFlag::O_NONBLOCK.bits());
        let storage = HostStorage::of(options.open(path)?, !writable)?;
        // What is served must wait: io_uring would answer "try again" else.
        let flags = OFlag::from_bits_retain(fcntl(&storage.file, FcntlArg::F_GETFL)?);
        fcntl(&storage.file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
        Ok(storage)
    }

    /// Takes an opened file.
    ///
    /// # Errors
    /// If it is neither a regular file nor a block device, or its length cannot be found.
    pub fn of(file: File, read_only: bool) -> io::Result<HostStorage> {
        let meta = file.metadata()?;
        let device = meta.file_type().is_block_device();
        if !device && !meta.is_file() {
            return Err(io::Error::other("is neither a regular file nor a block device"));
        }
        let (len, last_read, read_once, writes_from, written) = (0, 0, false, 0, 0..0);
        let mut storage = HostStorage {
            file,
            len,
            device,
            read_only,
            last_read,
            read_once,
            writes_from,
            written,
        };
        storage.measure()?;
        Ok(storage)
    }

    /// Finds its length again, which others may have changed until it was locked.
    ///
    /// # Errors
    /// As the kernel says.
    pub(crate) fn measure(&mut self) -> io::Result<()> {
        self.len = match self.device {
            true => io::Seek::seek(&mut &self.file, io::SeekFrom::End(0))?,
            false => self.file.metadata()?.len(),
        };
        Ok(())
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file back.
    pub fn into_file(self) -> File {
        self.file
    }

    /// Tells the kernel what is to come, so that the device works meanwhile. A favour.
    fn advise(&self, offset: u64, len: u64, advice: Advice) {
        if let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) {
            let _ = posix_fadvise(&self.file, offset, len, advice);
        }
    }

    fn grown(&mut self, end: u64) {
        self.len = self.len.max(end);
    }
}

fn failed(what: &'static str, offset: u64, len: u64) -> impl FnOnce(io::Error) -> StorageError {
    move |e| {
        let errno = e.raw_os_error().unwrap_or(5);
        let detail = u16::try_from(errno).unwrap_or(0);
        StorageError { what, offset, len, status: Status::from_errno(errno), detail }
    }
}

impl Storage for HostStorage {
    fn len(&self) -> u64 {
        self.len
    }

    fn capacity(&self) -> u64 {
        if self.device { self.len } else { MAX }
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let len = into.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.capacity()) {
            return Err(failed("read", offset, len)(io::Error::from_raw_os_error(22)));
        }
        let mut done = 0;
        while done < into.len() {
            match self.file.read_at(&mut into[done..], offset + done as u64) {
                Ok(0) => {
                    into[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(failed("read", offset, len)(e)),
            }
        }
        let before = std::mem::replace(&mut self.last_read, offset + len);
        if len >= BULK && before == offset {
            self.advise(offset + len, AHEAD, Advice::POSIX_FADV_WILLNEED);
        }
        if self.read_once {
            self.advise(offset, len, Advice::POSIX_FADV_DONTNEED);
        }
        Ok(())
    }

    fn will_read(&mut self, offset: u64, len: u64) {
        self.read_once = true;
        self.advise(offset, len, Advice::POSIX_FADV_WILLNEED);
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        let len = from.len() as u64;
        self.file.write_all_at(from, offset).map_err(failed("write", offset, len))?;
        self.grown(offset + len);
        if self.written.end != offset {
            self.written = offset..offset;
            self.writes_from = offset;
        }
        self.written.end = offset + len;
        let run = self.written.end - self.written.start;
        if run >= BULK {
            // Begins to write it back, and gives up what has been, which guests have more use for:
            // a job that goes through ever more memory is slower than one that uses the same again.
            let from = self.writes_from.max(self.written.start.saturating_sub(BEHIND));
            self.advise(from, self.written.end - from, Advice::POSIX_FADV_DONTNEED);
            self.written.start = self.written.end;
        }
        Ok(())
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        let (Ok(start), Ok(count)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(failed("write zeroes", offset, len)(io::Error::from_raw_os_error(27)));
        };
        if len == 0 {
            return Ok(());
        }
        if fallocate(&self.file, FallocateFlags::FALLOC_FL_ZERO_RANGE, start, count).is_err() {
            let zeroes = vec![0; len.min(1 << 20) as usize];
            let mut at = 0;
            while at < len {
                let n = (len - at).min(zeroes.len() as u64);
                self.write_at(offset + at, &zeroes[..n as usize])?;
                at += n;
            }
        }
        self.grown(offset + len);
        Ok(())
    }

    fn discard_at(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        if let (Ok(start), Some(count)) = (i64::try_from(offset), end.checked_sub(offset))
            && count > 0
        {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            // It is a favour: file systems that cannot do it keep the space.
            let _ = fallocate(&self.file, hole, start, count as i64);
        }
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        self.file.sync_data().map_err(failed("flush", 0, 0))
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        if !self.device {
            self.file.set_len(len).map_err(failed("set length", len, 0))?;
            self.len = len;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;

    #[test]
    fn a_named_pipe_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        for writable in [false, true] {
            let error = HostStorage::open(&path, writable).unwrap_err().to_string();
            assert!(error.contains("neither a regular file"), "{error}");
        }
    }

    #[test]
    fn an_opened_file_waits_for_its_data() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let storage = HostStorage::open(temp.path(), true).unwrap();
        let flags = fcntl(storage.file(), FcntlArg::F_GETFL).unwrap();
        assert!(!OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
    }
}
