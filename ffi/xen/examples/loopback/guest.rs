//! What a guest does with grants and event channels: pages by `/dev/xen/gntalloc`, ports by
//! `/dev/xen/evtchn`. Used by `loopback` in dom0 for itself, and by `rogue` in a guest.

use std::fs::{File, OpenOptions};
use std::io::{Error, Read, Result, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const PAGE: usize = 4096;
/// `IOCTL_GNTALLOC_ALLOC_GREF`
const ALLOC_GREF: u32 = 0x0018_4705;
const WRITABLE: u16 = 1;
/// `IOCTL_EVTCHN_BIND_UNBOUND_PORT`
const BIND_UNBOUND_PORT: u32 = 0x0004_4502;
/// `IOCTL_EVTCHN_UNBIND`
const UNBIND: u32 = 0x0004_4503;
/// `IOCTL_EVTCHN_NOTIFY`
const NOTIFY: u32 = 0x0004_4504;

/// Domain 0.
pub(crate) const DOM0: u16 = 0;

fn open(place: &str) -> Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(place)
}

/// Calls with words of 32 bits, as many as the call's structure has at least.
fn call(file: &File, number: u32, words: &mut [u32]) -> Result<u32> {
    assert!(size_of_val(words) >= (number >> 16) as usize);
    // SAFETY: the argument is as long as the call says; ALLOC_GREF writes a word for each page more,
    // for which `Granted::new` makes room.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), number as libc::Ioctl, words.as_mut_ptr()) };
    u32::try_from(done).map_err(|_| Error::last_os_error())
}

/// Pages that are granted.
pub(crate) struct Granted {
    pub(crate) grefs: Vec<u32>,
    base: NonNull<u8>,
    _file: File,
}

impl Granted {
    /// Pages that a domain may read, and write if they are `writable`.
    pub(crate) fn new(domid: u16, pages: usize, writable: bool) -> Result<Granted> {
        let file = open("/dev/xen/gntalloc")?;
        let flags = if writable { WRITABLE } else { 0 };
        let mut words = vec![0; 6 + pages];
        words[0] = u32::from(domid) | u32::from(flags) << 16;
        words[1] = pages as u32;
        call(&file, ALLOC_GREF, &mut words)?;
        let index = i64::from(words[2]) | i64::from(words[3]) << 32;
        let len = NonZeroUsize::new(pages * PAGE).ok_or(Error::last_os_error())?;
        // SAFETY: a fresh mapping at an address that the kernel chooses; it overlaps nothing.
        let base = unsafe {
            let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            mmap(None, len, prot, MapFlags::MAP_SHARED, &file, index)
        }?;
        let grefs = words[4..4 + pages].to_vec();
        Ok(Granted { grefs, base: base.cast(), _file: file })
    }

    fn at(&self, byte: usize) -> *mut u8 {
        assert!(byte < self.grefs.len() * PAGE);
        // SAFETY: the byte lies in the mapping, as was just checked.
        unsafe { self.base.as_ptr().add(byte) }
    }

    pub(crate) fn get(&self, byte: usize) -> u8 {
        // SAFETY: a byte of the mapping, which is never behind a reference.
        unsafe { self.at(byte).read_volatile() }
    }

    pub(crate) fn set(&self, byte: usize, value: u8) {
        // SAFETY: as above.
        unsafe { self.at(byte).write_volatile(value) }
    }

    /// The first byte of a word, which is a multiple of 4: so that the word lies in the mapping.
    fn word(&self, byte: usize) -> *mut u32 {
        assert!(byte.is_multiple_of(4));
        self.at(byte).cast()
    }

    pub(crate) fn load32(&self, byte: usize) -> u32 {
        // SAFETY: an aligned word of the mapping, as `word` has checked.
        unsafe { self.word(byte).read_volatile() }
    }

    pub(crate) fn store32(&self, byte: usize, value: u32) {
        // SAFETY: as above.
        unsafe { self.word(byte).write_volatile(value) }
    }
}

// SAFETY: the mapping belongs to the process; each access is one volatile load or store.
unsafe impl Send for Granted {}
// SAFETY: as above; what threads and other domains write at the same time is never behind a reference.
unsafe impl Sync for Granted {}

impl Drop for Granted {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length, and nobody has the pointer.
        let _ = unsafe { munmap(self.base.cast(), self.grefs.len() * PAGE) };
    }
}

/// A guest's ports.
pub(crate) struct Ports(File);

impl Ports {
    pub(crate) fn new() -> Result<Ports> {
        open("/dev/xen/evtchn").map(Ports)
    }

    /// A port that a domain may bind to.
    pub(crate) fn alloc(&self, domid: u16) -> Result<u32> {
        call(&self.0, BIND_UNBOUND_PORT, &mut [domid.into()])
    }

    pub(crate) fn close(&self, port: u32) -> Result<()> {
        call(&self.0, UNBIND, &mut [port]).map(drop)
    }

    pub(crate) fn notify(&self, port: u32) -> Result<()> {
        call(&self.0, NOTIFY, &mut [port]).map(drop)
    }

    /// Whether any port fired within so many milliseconds. It may fire again.
    pub(crate) fn fired(&self, ms: u32) -> bool {
        let mut port = [0; 4];
        for _ in 0..=ms {
            if (&self.0).read_exact(&mut port).is_ok() {
                return (&self.0).write_all(&port).is_ok();
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        false
    }
}
