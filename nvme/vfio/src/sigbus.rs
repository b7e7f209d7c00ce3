//! What happens when a register of a function that is gone is touched.
//!
//! The kernel answers an access to a mapped register of a function that was pulled, or is being
//! taken away, with SIGBUS. The handler here, installed once, looks whether the address lies in a
//! mapped range of ours; then it puts a page of all ones in its place, marks the range as gone and
//! returns, so that the access is repeated and reads all ones, as from an empty slot. For any
//! other address it puts back the action that was there before and returns, so that the access
//! faults again and is dealt with as if we were not here.
//!
//! Everything that the handler does is safe in a signal handler: loads and stores of atomics, and
//! the calls `mmap` and `sigaction` (on Linux plain system calls).

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// How many ranges can be watched at a time.
const SLOTS: usize = 64;

const PAGE: usize = 4096;

/// A range that is watched. Its owner writes it, the handler reads it.
#[derive(Debug)]
pub(crate) struct Slot {
    taken: AtomicBool,
    /// First address; 0 while nothing is watched.
    start: AtomicUsize,
    len: AtomicUsize,
    gone: AtomicBool,
    /// How many handles into the range there are; the last one unmaps it.
    handles: AtomicUsize,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        gone: AtomicBool::new(false),
        handles: AtomicUsize::new(0),
    }
}; SLOTS];

/// The descriptor of a page of all ones; -1 before the handler is installed. Never closed.
static ONES: AtomicI32 = AtomicI32::new(-1);

struct Installed {
    before: SigAction,
    #[expect(dead_code, reason = "kept open for the handler")]
    ones: OwnedFd,
}

static INSTALLED: OnceLock<Result<Installed, Errno>> = OnceLock::new();

impl Slot {
    /// Watches `len` bytes from `start`, a mapping with one handle; `None` if too many are watched.
    pub(crate) fn watch(start: usize, len: usize) -> Result<Option<&'static Slot>, Errno> {
        install()?;
        let free = |s: &&Slot| {
            s.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let Some(slot) = TABLE.iter().find(free) else { return Ok(None) };
        slot.gone.store(false, Ordering::Relaxed);
        slot.handles.store(1, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        // The handler sees the length if it sees the start.
        slot.start.store(start, Ordering::Release);
        Ok(Some(slot))
    }

    /// The slot that watches an address.
    pub(crate) fn of(address: usize) -> Option<&'static Slot> {
        TABLE.iter().find(|s| s.covers(address))
    }

    fn covers(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        start != 0
            && address.checked_sub(start).is_some_and(|at| at < self.len.load(Ordering::Relaxed))
    }

    /// First address and length of what is watched.
    pub(crate) fn range(&self) -> (usize, usize) {
        (self.start.load(Ordering::Acquire), self.len.load(Ordering::Relaxed))
    }

    /// Whether an access has faulted, or [`Slot::set_gone`] was called.
    #[inline]
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Says whether the range is gone.
    pub(crate) fn set_gone(&self, gone: bool) {
        self.gone.store(gone, Ordering::Release);
    }

    /// One handle more.
    pub(crate) fn hold(&self) {
        self.handles.fetch_add(1, Ordering::Relaxed);
    }

    /// One handle less; `true` if that was the last: the range is watched no more, and the caller
    /// unmaps it and calls [`Slot::free`].
    pub(crate) fn release(&self) -> bool {
        let last = self.handles.fetch_sub(1, Ordering::AcqRel) == 1;
        if last {
            self.start.store(0, Ordering::Release);
        }
        last
    }

    /// Lets others have the slot.
    pub(crate) fn free(&self) {
        self.taken.store(false, Ordering::Release);
    }

    /// Puts pages of all ones over the whole range, whatever was there.
    pub(crate) fn cover(&self) -> Result<(), Errno> {
        self.set_gone(true);
        let (start, len) = self.range();
        match (start..start + len).step_by(PAGE).all(put_ones) {
            true => Ok(()),
            false => Err(Errno::last()),
        }
    }
}

/// Installs the handler, once per process.
fn install() -> Result<(), Errno> {
    let done = INSTALLED.get_or_init(|| {
        let ones = memfd_create("polldisk-ones", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::write(&ones, &[0xff; PAGE])?;
        ONES.store(ones.as_raw_fd(), Ordering::Release);
        // On the stack that the runtime has set aside for signals: the thread's own may be short.
        let action = SigAction::new(
            SigHandler::SigAction(handler),
            SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK,
            SigSet::empty(),
        );
        // SAFETY: the handler does only what is safe in one: see the module's head.
        let before = unsafe { sigaction(Signal::SIGBUS, &action) }?;
        Ok(Installed { before, ones })
    });
    match done {
        Ok(_) => Ok(()),
        Err(e) => Err(*e),
    }
}

/// Maps the page of all ones at a page's address, in place of what is there. Writes to it stay in
/// this process and change what is read back there; so a range that is gone is never trusted for
/// the registers that it shows, only for the ones that nobody writes.
fn put_ones(page: usize) -> bool {
    // SAFETY: the page lies in a slot's range, a mapping that `mmio` owns and that nothing but
    // volatile accesses goes to; those cope with whatever is read.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(page),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED,
            ONES.load(Ordering::Acquire),
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let errno = Errno::last_raw();
    // SAFETY: the kernel passes a valid record, since SA_SIGINFO is set.
    let info = unsafe { &*info };
    // SAFETY: for SIGBUS the record has the address of the fault.
    let address = unsafe { info.si_addr() } as usize;
    let ours = Slot::of(address);
    let mended = ours.is_some_and(|slot| {
        slot.set_gone(true);
        put_ones(address & !(PAGE - 1))
    });
    if !mended {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        let before = match INSTALLED.get() {
            Some(Ok(installed)) => &installed.before,
            _ => &default,
        };
        // SAFETY: the action is the one that was there before, or the system's own.
        let _ = unsafe { sigaction(Signal::SIGBUS, before) };
    }
    Errno::set_raw(errno);
}
