//! What happens when a register of a function that is gone is touched.
//!
//! The kernel answers an access to a mapped register of a function that was pulled, or is being
//! taken away, with SIGBUS. The handler here, installed once, looks whether the address lies in a
//! mapped range of ours; then it puts a page of ordinary memory in its place, marks the range as
//! gone and returns, so that the access is repeated and succeeds. What is read there means nothing:
//! `mmio` takes every register of a range that is gone as all ones, as from an empty slot. For any
//! other address the handler puts back the action that was there before and returns, so that the
//! access faults again and is dealt with as if we were not here.
//!
//! Everything that the handler does is safe in a signal handler: loads and stores of atomics, and
//! the calls `mmap` and `sigaction` (on Linux plain system calls).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::errno::Errno;
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

/// The action that was there before the handler was installed.
static BEFORE: OnceLock<Result<SigAction, Errno>> = OnceLock::new();

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
        // The handler sees the length if it sees the start; and if it sees this length, then also
        // that the range before was given up.
        slot.len.store(len, Ordering::Release);
        slot.start.store(start, Ordering::Release);
        Ok(Some(slot))
    }

    /// The slot that watches an address.
    pub(crate) fn of(address: usize) -> Option<&'static Slot> {
        TABLE.iter().find(|s| s.covers(address))
    }

    fn covers(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        let len = self.len.load(Ordering::Acquire);
        // Another thread may just be giving the slot to another range: the two must belong together,
        // or memory of others would be taken for registers.
        start != 0
            && self.start.load(Ordering::Acquire) == start
            && address.checked_sub(start).is_some_and(|at| at < len)
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

    /// Puts memory over the whole range, whatever was there, and marks it as gone.
    pub(crate) fn cover(&self) -> Result<(), Errno> {
        let (start, len) = self.range();
        self.replace(start, len)
    }

    /// Puts memory in place of a part of the range. Marked as gone before, so that nobody trusts
    /// what is read there; and after, for [`crate::Bar::attach`] may have mapped registers
    /// meanwhile, a part of which is now missing.
    fn replace(&self, at: usize, len: usize) -> Result<(), Errno> {
        self.set_gone(true);
        let done = put_memory(at, len);
        self.set_gone(true);
        done
    }
}

/// Installs the handler, once per process.
fn install() -> Result<(), Errno> {
    let done = BEFORE.get_or_init(|| {
        // On the stack that the runtime has set aside for signals: the thread's own may be short.
        let action = SigAction::new(
            SigHandler::SigAction(handler),
            SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK,
            SigSet::empty(),
        );
        // SAFETY: the handler does only what is safe in one: see the module's head.
        unsafe { sigaction(Signal::SIGBUS, &action) }
    });
    match done {
        Ok(_) => Ok(()),
        Err(e) => Err(*e),
    }
}

/// Maps memory of this process alone in place of what is there: in one piece however large, since a
/// process may have some ten thousand mappings only.
fn put_memory(at: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: whole pages in a slot's range, a mapping that `mmio` owns and that nothing but
    // volatile accesses goes to; those cope with whatever is read.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(at),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
}

extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let errno = Errno::last_raw();
    // SAFETY: the kernel passes a valid record, since SA_SIGINFO is set.
    let info = unsafe { &*info };
    // SAFETY: for SIGBUS the record has the address of the fault.
    let address = unsafe { info.si_addr() } as usize;
    let ours = Slot::of(address);
    let mended = ours.is_some_and(|slot| slot.replace(address & !(PAGE - 1), PAGE).is_ok());
    if !mended {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        let before = match BEFORE.get() {
            Some(Ok(before)) => before,
            _ => &default,
        };
        // SAFETY: the action is the one that was there before, or the system's own.
        let _ = unsafe { sigaction(Signal::SIGBUS, before) };
    }
    Errno::set_raw(errno);
}
