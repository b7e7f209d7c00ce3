//! [`Unit`]: an opened file: what it is, how it must be accessed, what it turned out not to do.
//!
//! Made on the control path; afterwards only the cached length and the learned limits change.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::AtomicU16;

use block::DeviceInfo;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::uio::pread;

use crate::ahead::Ahead;
use crate::{Error, os};

/// Longest read or write in one request.
pub(crate) const MAX_TRANSFER: u32 = 1 << 20;

/// A file of a queue.
#[derive(Debug)]
pub(crate) struct Unit {
    pub(crate) file: Arc<File>,
    pub(crate) info: DeviceInfo,
    pub(crate) block_device: bool,
    /// O_DIRECT is on, with these alignments of memory, and of offsets and lengths; else both 1.
    pub(crate) direct: bool,
    pub(crate) memory_align: u32,
    pub(crate) offset_align: u32,
    /// A length that the file had lately; another process or reactor may have changed it.
    pub(crate) len: u64,
    /// Holes can be punched. Cleared when the file says no; so are the next two.
    pub(crate) punch: bool,
    /// Ranges can be zeroed and stay allocated.
    pub(crate) zero_range: bool,
    /// Single writes can be made durable. Not through the page cache: there a failure may concern
    /// older data too, which only a flush tells (see `lost`).
    pub(crate) dsync: bool,
    /// The errno of a failed flush of the page cache, which has forgotten the data that it could not
    /// write: no later flush may say that all is well, of whatever reactor, since the kernel tells
    /// one of them only.
    pub(crate) lost: Arc<AtomicU16>,
    /// For a file that is expected to grow; of one queue to it.
    pub(crate) ahead: Option<Ahead>,
}

impl Unit {
    /// Looks at a file that is open for reading, or for reading and writing. Switches O_DIRECT on
    /// if the file takes it.
    pub(crate) fn new(mut file: File) -> Result<Unit, Error> {
        let meta = file.metadata().map_err(Error::os("fstat"))?;
        let block_device = meta.file_type().is_block_device();
        if !block_device && !meta.is_file() {
            return Err(Error::Kind);
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|e| Error::os("fcntl")(e.into()))?;
        let flags = OFlag::from_bits_retain(flags);
        let read_only = match flags & OFlag::O_ACCMODE {
            OFlag::O_RDONLY => true,
            OFlag::O_RDWR => false,
            _ => return Err(Error::NotReadable),
        };
        let len = if block_device {
            file.seek(SeekFrom::End(0)).map_err(Error::os("seek to the end"))?
        } else {
            meta.len()
        };
        let align = direct_io(&file, flags, &meta, len)?;
        let (memory_align, offset_align) = align.unwrap_or((1, 1));
        let block = match align {
            Some((_, offset)) => offset.max(512),
            None if block_device => os::block_size(&file).map_err(Error::os("BLKSSZGET"))?,
            None => 512,
        };
        let mask = !(u64::from(block) - 1);
        let size = match (block_device, read_only) {
            (true, _) => len & mask,
            // As far as an offset can say: somebody else may lengthen it, and what is behind the end
            // reads as zeroes. The file system's own limit answers a write with "no space".
            (false, _) => i64::MAX as u64 & !4095,
        };
        let dev = meta.rdev();
        let punch = !read_only
            && if block_device {
                queue_limit(dev, "write_zeroes_max_bytes").is_none_or(|most| most > 0)
            } else {
                punches_holes(&file, len)
            };
        let granularity = if block_device {
            queue_limit(dev, "discard_granularity").unwrap_or(0)
        } else {
            meta.blksize()
        };
        let granularity = u32::try_from(granularity)
            .ok()
            .filter(|g| g.is_power_of_two() && (block..=1 << 30).contains(g));
        Ok(Unit {
            file: Arc::new(file),
            info: DeviceInfo {
                size,
                block_size: block,
                physical_block_size: block.max(4096),
                read_only,
                volatile_cache: true,
                write_zeroes: punch,
                discard: punch,
                discard_granularity: granularity.unwrap_or(block.max(4096)),
                max_transfer: MAX_TRANSFER,
            },
            block_device,
            direct: align.is_some(),
            memory_align,
            offset_align,
            len,
            punch,
            zero_range: punch,
            dsync: align.is_some(),
            lost: Arc::default(),
            ahead: None,
        })
    }
}

impl Unit {
    /// Whether space is being asked for.
    pub(crate) fn grows_now(&self) -> bool {
        self.ahead.as_ref().is_some_and(|a| a.busy)
    }
}

impl Unit {
    /// The same file in the queue of another reactor, which makes it no longer.
    pub(crate) fn another(&self) -> Unit {
        let (file, info, lost) = (self.file.clone(), self.info.clone(), self.lost.clone());
        Unit { file, info, lost, ahead: None, ..*self }
    }
}

/// Switches O_DIRECT on and finds the alignments that it demands: (memory, offset and length).
/// `None` if the file does not take it, or with larger alignments than a block may have.
fn direct_io(
    file: &File,
    flags: OFlag,
    meta: &std::fs::Metadata,
    len: u64,
) -> Result<Option<(u32, u32)>, Error> {
    let fits = |a: u32| a.is_power_of_two() && a <= 4096;
    let set = |flags: OFlag| fcntl(file, FcntlArg::F_SETFL(flags));
    if set(flags | OFlag::O_DIRECT).is_ok() {
        let align = match os::dio_alignment(file) {
            Some(align) => Some(align),
            None if meta.file_type().is_block_device() => {
                os::block_size(file).ok().map(|size| (size, size))
            }
            None => probe(file, meta.dev(), len).map(|size| (size, size)),
        };
        if let Some((memory, offset)) = align
            && fits(memory)
            && fits(offset)
        {
            return Ok(Some((memory, offset)));
        }
    }
    log::info!("no direct I/O on file {}:{}: using the page cache", meta.dev(), meta.ino());
    set(flags & !OFlag::O_DIRECT).map_err(|e| Error::os("fcntl")(e.into()))?;
    Ok(None)
}

/// Tries direct reads of 512 and of 4096 bytes, into memory of just that alignment.
fn probe(file: &File, dev: u64, len: u64) -> Option<u32> {
    if len == 0 {
        // A read of nothing proves nothing. What is below a disk's file system, if anything, says.
        let logical = queue_limit(dev, "logical_block_size");
        return Some(logical.and_then(|n| u32::try_from(n).ok()).unwrap_or(4096));
    }
    let mut memory = vec![0u8; 4 * 4096];
    let page = memory.as_ptr().align_offset(4096);
    [512, 4096]
        .into_iter()
        .find(|&align| {
            // At `align` from a page of twice that alignment: aligned to `align` and no better.
            let at = page + if align == 4096 { 0 } else { align };
            pread(file, &mut memory[at..at + align], 0).is_ok()
        })
        .map(|align| align as u32)
}

/// Whether a hole can be punched, tried where it changes nothing: past the end.
fn punches_holes(file: &File, len: u64) -> bool {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let at = len.checked_next_multiple_of(4096).and_then(|at| i64::try_from(at).ok());
    at.is_some_and(|at| fallocate(file, mode, at, 4096).is_ok())
}

/// A limit of the request queue of block device `dev` (or of the disk that it is a part of).
fn queue_limit(dev: u64, name: &str) -> Option<u64> {
    let dir = format!("/sys/dev/block/{}:{}", libc::major(dev), libc::minor(dev));
    let read = |path: String| std::fs::read_to_string(path).ok()?.trim().parse().ok();
    read(format!("{dir}/queue/{name}")).or_else(|| read(format!("{dir}/../queue/{name}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn probing_agrees_with_what_the_kernel_says() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("f");
        std::fs::write(&path, [1; 8192]).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let said = os::dio_alignment(&file);
        let unit = Unit::new(file.try_clone().unwrap()).unwrap();
        if let Some((_, offset)) = said
            && unit.direct
        {
            let probed = probe(&file, 0, 8192).unwrap();
            assert_eq!(probed, offset.max(512));
            // By the disk below, for an empty file; 4096 where that is not to be found.
            let dev = file.metadata().unwrap().dev();
            assert!([offset.max(512), 4096].contains(&probe(&file, dev, 0).unwrap()));
        }
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        assert!(matches!(Unit::new(null), Err(Error::Kind)));
        assert!(matches!(Unit::new(File::open("/").unwrap()), Err(Error::Kind)));
        let temp = tempfile::NamedTempFile::new().unwrap();
        let file = OpenOptions::new().write(true).open(temp.path()).unwrap();
        assert!(matches!(Unit::new(file), Err(Error::NotReadable)));
    }
}
