//! [`Bar`]: registers of a function mapped into this process, and [`Register`], one of them.
//!
//! Accesses are single volatile loads and stores of 32 bits: that is what a device sees. The
//! mapping is uncached, so on x86 they arrive in program order, after everything stored before.
//!
//! The address range belongs to the `Bar` and its `Register`s together and is unmapped with the
//! last of them. What is mapped there may change: the function's registers, or mere memory when it
//! is gone (see `sigbus`). So a `Register` may be used at any time.

use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::Error;
use crate::sigbus::Slot;

/// Largest range of registers that is mapped, in bytes: an NVMe controller has 16 KiB or so.
const MOST: u64 = 1 << 30;

const PAGE: u64 = 4096;

/// A part of the registers: offsets of its first byte and of the one behind its last.
pub(crate) type Area = (u64, u64);

/// The mapped registers of a function.
#[derive(Debug)]
pub struct Bar {
    base: NonNull<u8>,
    len: usize,
    /// The parts that can be reached by memory accesses; not, for example, a table of interrupts.
    areas: OnceLock<Box<[Area]>>,
    slot: &'static Slot,
}

// SAFETY: registers are accessed by single volatile instructions only, and the mapping lives as
// long as the value.
unsafe impl Send for Bar {}
// SAFETY: as above; concurrent accesses are the device's to order, not undefined behaviour.
unsafe impl Sync for Bar {}

/// One register, for the thread that writes it.
#[derive(Debug)]
pub struct Register(NonNull<u32>);

// SAFETY: as for `Bar`.
unsafe impl Send for Register {}

const _: () = assert!(size_of::<Register>() == 8);

impl Bar {
    /// Takes an address range of `len` bytes in which nothing can be reached yet.
    pub(crate) fn reserve(len: u64) -> Result<Bar, Error> {
        let odd = || Error::Odd(format!("registers of {len} bytes"));
        if len == 0 || len > MOST {
            return Err(odd());
        }
        let len = len.next_multiple_of(PAGE);
        let size = NonZeroUsize::new(len as usize).ok_or_else(odd)?;
        // SAFETY: a fresh mapping at an address that the kernel chooses; it overlaps nothing.
        let base =
            unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) };
        let base = base.map_err(Error::os("reserving addresses for registers"))?.cast::<u8>();
        let len = len as usize;
        let watched = Slot::watch(base.as_ptr() as usize, len);
        let slot = match watched {
            Ok(Some(slot)) => slot,
            refused => {
                unmap(base, len);
                return Err(match refused {
                    Err(e) => Error::os("installing a handler for SIGBUS")(e),
                    Ok(_) => Error::Host("too many devices are open in this process".to_owned()),
                });
            }
        };
        Ok(Bar { base, len, areas: OnceLock::new(), slot })
    }

    /// Maps `areas` of the file's part that begins at `offset`, in place of what was there; the same
    /// areas each time. Offsets and lengths that are no whole pages inside the range are an error.
    pub(crate) fn attach(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        areas: &[Area],
    ) -> Result<(), Error> {
        if self.areas.get().is_some_and(|before| &before[..] != areas) {
            return Err(Error::Odd(format!("the registers' parts were others before: {areas:x?}")));
        }
        let mut parts = Vec::new();
        for area @ &(start, end) in areas {
            let len = end.saturating_sub(start);
            let whole = start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
            let inside = end <= self.len as u64 && len > 0;
            let at = offset.checked_add(start).and_then(|o| i64::try_from(o).ok());
            let (Some(at), true, true) = (at, whole, inside) else {
                let text = format!("{:#x} bytes of registers with a part at {area:x?}", self.len);
                return Err(Error::Odd(text));
            };
            parts.push((at, start as usize, len as usize));
        }
        // Not after mapping: an access to what was there before may still be faulting on another
        // thread, and cover a page of what is mapped now. That must not go unnoticed.
        self.slot.set_gone(false);
        for (at, start, len) in parts {
            if let Err(e) = self.map_one(fd, at, start, len) {
                // What is mapped already would keep the device's file open.
                self.detach()?;
                return Err(Error::os("mapping registers")(e));
            }
        }
        self.areas.get_or_init(|| areas.into());
        Ok(())
    }

    fn map_one(&self, fd: BorrowedFd<'_>, at: i64, start: usize, len: usize) -> Result<(), Errno> {
        let len = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        let start = NonZeroUsize::new(self.base.as_ptr() as usize + start);
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: the area was found to lie inside the range that this value owns, where nothing
        // but volatile accesses go.
        unsafe { mmap(start, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, fd, at) }
            .map(drop)
    }

    /// Lets go of the function: from now on registers read all ones and swallow writes.
    pub(crate) fn detach(&self) -> Result<(), Error> {
        self.slot.cover().map_err(Error::os("letting go of registers"))
    }

    /// Whether an access found the function gone, or it was let go of.
    pub fn is_gone(&self) -> bool {
        self.slot.is_gone()
    }

    /// Where a 32-bit register lies; `None` if that is not mapped, or not aligned.
    fn at(&self, offset: u64) -> Option<NonNull<u32>> {
        let end = offset.checked_add(4)?;
        let mapped = self.areas.get()?.iter().any(|a| a.0 <= offset && end <= a.1);
        if !mapped || !offset.is_multiple_of(4) {
            return None;
        }
        // SAFETY: the areas lie inside the range, so this does too.
        Some(unsafe { self.base.add(offset as usize) }.cast())
    }

    /// Reads a register. All ones if the function is gone, or if there is none that can be reached.
    pub fn read32(&self, offset: u64) -> u32 {
        let Some(register) = self.at(offset) else { return u32::MAX };
        // SAFETY: the address is mapped, aligned, and holds a device's register or memory that
        // nobody has a reference to.
        let value = unsafe { register.as_ptr().read_volatile() };
        // What lies in place of registers that are gone means nothing.
        if self.is_gone() { u32::MAX } else { value }
    }

    /// Writes a register; nothing if the function is gone or there is none that can be reached.
    pub fn write32(&self, offset: u64, value: u32) {
        if let Some(register) = self.at(offset) {
            // SAFETY: as for reading.
            unsafe { register.as_ptr().write_volatile(value) };
        }
    }

    /// A handle to one register; `None` if it cannot be reached.
    pub fn register(&self, offset: u64) -> Option<Register> {
        let at = self.at(offset)?;
        self.slot.hold();
        Some(Register(at))
    }
}

impl Register {
    /// Writes the register.
    #[inline]
    pub fn write(&self, value: u32) {
        // SAFETY: the handle keeps the range mapped, and the address in it is aligned. What is
        // there is a device's register, or memory that nobody has a reference to.
        unsafe { self.0.as_ptr().write_volatile(value) };
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // Others may go on writing to their registers: they find memory.
        if let Err(e) = self.detach() {
            log::error!("{e}");
        }
        drop_handle(self.slot, self.base, self.len);
    }
}

impl Drop for Register {
    fn drop(&mut self) {
        let address = self.0.as_ptr() as usize;
        if let Some(slot) = Slot::of(address) {
            let (base, len) = slot.range();
            if let Some(base) = NonNull::new(std::ptr::with_exposed_provenance_mut(base)) {
                drop_handle(slot, base, len);
            }
        }
    }
}

/// Gives a handle back, and the range with the last one.
fn drop_handle(slot: &'static Slot, base: NonNull<u8>, len: usize) {
    if slot.release() {
        unmap(base, len);
        slot.free();
    }
}

fn unmap(base: NonNull<u8>, len: usize) {
    // SAFETY: the range was mapped by `reserve` with this length, and its last handle is gone.
    let done = unsafe { munmap(base.cast(), len) };
    debug_assert!(done.is_ok());
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A file in place of a device's registers.
    fn file(len: u64) -> OwnedFd {
        let fd = memfd_create("registers", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, len as i64).unwrap();
        fd
    }

    fn bar(fd: &OwnedFd, len: u64) -> Bar {
        let bar = Bar::reserve(len).unwrap();
        bar.attach(fd.as_fd(), 0, &[(0, len)]).unwrap();
        bar
    }

    #[test]
    fn registers_are_read_and_written() {
        let fd = file(8192);
        let bar = bar(&fd, 8192);
        bar.write32(0, 5);
        bar.register(4096).unwrap().write(6);
        assert_eq!((bar.read32(0), bar.read32(4096)), (5, 6));
        let mut bytes = [0; 4];
        nix::sys::uio::pread(&fd, &mut bytes, 4096).unwrap();
        assert_eq!(bytes, [6, 0, 0, 0]);
        for outside in [8192, 8190, 2, u64::MAX] {
            assert!(bar.register(outside).is_none());
            bar.write32(outside, 1);
            assert_eq!(bar.read32(outside), u32::MAX);
        }
    }

    #[test]
    fn holes_between_areas_are_not_touched() {
        let fd = file(16384);
        let bar = Bar::reserve(16384).unwrap();
        bar.attach(fd.as_fd(), 0, &[(0, 4096), (8192, 16384)]).unwrap();
        bar.write32(8192, 1);
        bar.write32(4096, 1);
        assert_eq!((bar.read32(8192), bar.read32(4096)), (1, u32::MAX));
        assert!(bar.register(4096).is_none() && bar.register(4094).is_none());
        for odd in [(0, 0), (0, 100), (100, 4096), (0, 20480), (8192, 4096)] {
            assert!(bar.attach(fd.as_fd(), 0, &[odd]).is_err(), "{odd:?}");
        }
        assert!(bar.attach(fd.as_fd(), u64::MAX - 4095, &[(0, 4096)]).is_err());
        for len in [0, MOST + 1, u64::MAX] {
            assert!(Bar::reserve(len).is_err());
        }
    }

    /// The same signal as from a device that is gone: a page behind the end of its file.
    #[test]
    fn a_function_that_vanishes_reads_all_ones() {
        let fd = file(8192);
        let bar = bar(&fd, 8192);
        let (doorbell, status) = (bar.register(4096).unwrap(), 28);
        bar.write32(status, 1);
        assert!(!bar.is_gone());
        nix::unistd::ftruncate(&fd, 0).unwrap();
        doorbell.write(7);
        assert!(bar.is_gone());
        assert_eq!(bar.read32(status), u32::MAX);
        bar.write32(status, 3);
        assert_eq!(bar.read32(status), u32::MAX, "what is written is not read back");
        doorbell.write(8);
        // It comes back at the same place.
        nix::unistd::ftruncate(&fd, 8192).unwrap();
        bar.attach(fd.as_fd(), 0, &[(0, 8192)]).unwrap();
        doorbell.write(9);
        assert_eq!((bar.read32(4096), bar.is_gone()), (9, false));
    }

    /// A page may be covered late, by a thread that faulted before the function came back.
    #[test]
    fn registers_that_a_late_fault_covers_are_gone() {
        let fd = file(8192);
        let bar = bar(&fd, 8192);
        let doorbell = bar.register(4096).unwrap();
        let (stop, idle) = (&AtomicBool::new(false), &AtomicBool::new(false));
        std::thread::scope(|threads| {
            threads.spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    for i in 0..50 {
                        doorbell.write(i);
                    }
                    idle.store(true, Ordering::Release);
                    while idle.load(Ordering::Acquire) && !stop.load(Ordering::Acquire) {
                        std::hint::spin_loop();
                    }
                }
            });
            for round in 100..200 {
                bar.detach().unwrap();
                nix::unistd::ftruncate(&fd, 0).unwrap();
                // The function seems to be back, and goes at once.
                bar.attach(fd.as_fd(), 0, &[(0, 8192)]).unwrap();
                idle.store(false, Ordering::Release);
                std::thread::yield_now();
                nix::unistd::ftruncate(&fd, 8192).unwrap();
                bar.attach(fd.as_fd(), 0, &[(0, 8192)]).unwrap();
                while !idle.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                doorbell_arrives(&fd, &bar, round, stop);
            }
            stop.store(true, Ordering::Release);
        });
    }

    /// What is written arrives, or the function is known to be gone.
    fn doorbell_arrives(fd: &OwnedFd, bar: &Bar, value: u32, stop: &AtomicBool) {
        bar.write32(4096, value);
        let mut bytes = [0; 4];
        nix::sys::uio::pread(fd, &mut bytes, 4096).unwrap();
        let fine = bar.is_gone() || u32::from_ne_bytes(bytes) == value;
        stop.fetch_or(!fine, Ordering::AcqRel);
        assert!(fine, "round {value}");
    }

    #[test]
    fn registers_however_large_are_let_go_of() {
        let fd = file(MOST);
        let bar = bar(&fd, MOST);
        bar.write32(MOST - 4, 5);
        assert_eq!(bar.read32(MOST - 4), 5);
        bar.detach().unwrap();
        assert_eq!(bar.read32(MOST - 4), u32::MAX);
    }

    #[test]
    fn what_cannot_be_mapped_whole_is_not_held() {
        let fd = file(8192);
        let bar = bar(&fd, 8192);
        bar.detach().unwrap();
        let pipe = nix::unistd::pipe().unwrap();
        assert!(bar.attach(pipe.0.as_fd(), 0, &[(0, 8192)]).is_err());
        assert!(bar.is_gone());
        assert_eq!(bar.read32(0), u32::MAX);
    }

    #[test]
    fn handles_outlive_the_bar() {
        let fd = file(4096);
        let first = bar(&fd, 4096);
        let register = first.register(0).unwrap();
        register.write(1);
        drop(first);
        register.write(2);
        let mut bytes = [0; 4];
        nix::sys::uio::pread(&fd, &mut bytes, 0).unwrap();
        assert_eq!(bytes, [1, 0, 0, 0], "let go of");
        drop(register);
        // Slots come back: more than there are, one after another.
        for _ in 0..200 {
            let bar = bar(&fd, 4096);
            let r = bar.register(0).unwrap();
            drop(bar);
            drop(r);
        }
    }
}
