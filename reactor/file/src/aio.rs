//! [`Aio`]: requests to the kernel through Linux AIO, for kernels without io_uring.
//!
//! `io_submit` takes any number of requests in one call. Completions are read from the ring that
//! `io_setup` maps into this process (its layout, `struct aio_ring`, has been the same since Linux
//! 2.5 and says so with a magic number); where the number is another, `io_getevents` is called.
//! `fallocate` is not known to AIO and goes to a helper thread, as does `fdatasync` before 4.18.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::with_exposed_provenance_mut;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::eventfd::EventFd;

use crate::Error;
use crate::helper::{Helper, event_fd};
use crate::kernel::{Io, Start};

/// `struct iocb` of linux/aio_abi.h, little-endian.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    reqprio: i16,
    fd: u32,
    buf: u64,
    nbytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    resfd: u32,
}

const _: () = assert!(size_of::<Iocb>() == 64);

const PREAD: u16 = 0;
const PWRITE: u16 = 1;
const FDSYNC: u16 = 3;
const PREADV: u16 = 7;
const PWRITEV: u16 = 8;
/// Count up the eventfd `resfd` on completion.
const RESFD: u32 = 1;

/// `struct io_event`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Event {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// Offsets in `struct aio_ring`: 32-bit words, then the events.
const RING_NR: usize = 4;
const RING_HEAD: usize = 8;
const RING_TAIL: usize = 12;
const RING_MAGIC: usize = 16;
const RING_INCOMPAT: usize = 24;
const RING_EVENTS: usize = 32;
const MAGIC: u32 = 0xa10a_10a1;

/// Requests in one call: those to files in memory are carried out in it, and all else waits meanwhile.
const BATCH: usize = 64;

/// A completion ring that the kernel mapped into this process.
struct Ring {
    base: usize,
    nr: u32,
}

impl Ring {
    /// The ring of a context, if its layout is the one known here.
    ///
    /// # Safety
    /// `context` must be from `io_setup`, and destroyed only after the last use of the ring.
    unsafe fn new(context: u64) -> Option<Ring> {
        let ring = Ring { base: context as usize, nr: 0 };
        let word = |at| ring.word(at).load(Ordering::Relaxed);
        let known = word(RING_MAGIC) == MAGIC && word(RING_INCOMPAT) == 0 && word(RING_NR) > 0;
        let nr = word(RING_NR);
        known.then_some(Ring { nr, ..ring })
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        let word = with_exposed_provenance_mut(self.base + at);
        // SAFETY: within the first 32 bytes of the mapping, which `new`'s caller keeps; both sides
        // access these words atomically.
        unsafe { AtomicU32::from_ptr(word) }
    }

    #[inline]
    fn next(&self) -> Option<(u64, i64)> {
        let head = self.word(RING_HEAD).load(Ordering::Relaxed);
        if head == self.word(RING_TAIL).load(Ordering::Acquire) || head >= self.nr {
            return None;
        }
        let at = self.base + RING_EVENTS + head as usize * size_of::<Event>();
        let event = with_exposed_provenance_mut::<Event>(at);
        // SAFETY: one of the ring's `nr` events; the kernel filled it before it moved the tail, and
        // leaves it alone until the head has passed it.
        let event = unsafe { event.read_volatile() };
        let next = if head + 1 == self.nr { 0 } else { head + 1 };
        self.word(RING_HEAD).store(next, Ordering::Release);
        Some((event.data, event.res))
    }
}

/// Whether the eventfd tells of a slot's request. Of the helper's it always does.
fn is_told(iocbs: &[Iocb], slot: u16) -> bool {
    iocbs[usize::from(slot)].flags & RESFD != 0
}

/// One AIO context.
pub(crate) struct Aio {
    context: u64,
    ring: Option<Ring>,
    /// One per slot; the kernel accesses it during `io_submit` only (and writes `key`).
    iocbs: Box<[Iocb]>,
    /// Slots to be submitted, in order.
    queued: VecDeque<u16>,
    /// Addresses of their iocbs, as `io_submit` wants them.
    list: Vec<usize>,
    /// Requests that `io_submit` refused, and results from `io_getevents`.
    results: VecDeque<(u16, i64)>,
    /// Requests that the kernel has taken and not answered.
    running: usize,
    /// Those of them that the eventfd will not tell of.
    untold: usize,
    /// All files are in memory: whatever moves data is done when `io_submit` returns, and nobody who sleeps
    /// has to be told.
    at_once: bool,
    event: EventFd,
    /// Completions that it has told of, as far as it was read, and those that were taken. All in it is old
    /// while these differ.
    told: u64,
    ended: u64,
    /// The kernel knows FDSYNC.
    fdsync: bool,
    helper: Helper,
    /// What the helper needs if the kernel turns FDSYNC down.
    files: Box<[Option<std::sync::Arc<std::fs::File>>]>,
    calls: u64,
}

impl Aio {
    /// A context for `depth` requests at a time. `at_once`: to files in memory.
    pub(crate) fn new(depth: u16, at_once: bool) -> Result<Aio, Error> {
        let event = event_fd()?;
        let helper = Helper::new(&event)?;
        let mut context = 0u64;
        // SAFETY: the kernel writes one word, which must be 0 before.
        let done = unsafe {
            libc::syscall(libc::SYS_io_setup, libc::c_long::from(depth), &raw mut context)
        };
        if done != 0 {
            return Err(Error::os("io_setup")(io::Error::last_os_error()));
        }
        // SAFETY: just made, and destroyed in `drop` only.
        let ring = unsafe { Ring::new(context) };
        let depth = usize::from(depth);
        Ok(Aio {
            context,
            ring,
            iocbs: vec![Iocb::default(); depth].into_boxed_slice(),
            queued: VecDeque::with_capacity(depth),
            list: Vec::with_capacity(depth),
            results: VecDeque::with_capacity(depth),
            running: 0,
            untold: 0,
            at_once,
            told: 0,
            ended: 0,
            event,
            fdsync: true,
            helper,
            files: vec![None; depth].into_boxed_slice(),
            calls: 0,
        })
    }

    /// Queues a request.
    ///
    /// # Safety
    /// `start.vecs` must stay where it is, and the memory that it names stay mapped, until
    /// [`Aio::next`] returns `slot` or this is dropped.
    pub(crate) unsafe fn push(&mut self, slot: u16, start: &Start<'_>) {
        let (opcode, rw_flags) = match (start.io, start.vecs.as_slice().len()) {
            (Io::Read, 1) => (PREAD, 0),
            (Io::Read, _) => (PREADV, 0),
            (Io::Write { dsync }, n) => {
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                (if n == 1 { PWRITE } else { PWRITEV }, flags)
            }
            (Io::Sync, _) if self.fdsync => {
                self.files[usize::from(slot)] = Some(start.file.clone());
                (FDSYNC, 0)
            }
            (Io::Sync | Io::Allocate { .. }, _) => {
                self.iocbs[usize::from(slot)].flags = RESFD;
                self.helper.push(slot, start.file, start.io, start.offset);
                return;
            }
        };
        let (buf, nbytes) = match start.vecs.as_slice() {
            _ if opcode == FDSYNC => (0, 0),
            [v] => (v.base(), v.len()),
            list => (list.as_ptr().expose_provenance(), list.len()),
        };
        let told = !self.at_once || opcode == FDSYNC;
        self.iocbs[usize::from(slot)] = Iocb {
            data: u64::from(slot),
            rw_flags,
            opcode,
            fd: start.file.as_raw_fd() as u32,
            buf: buf as u64,
            nbytes: nbytes as u64,
            offset: start.offset as i64,
            flags: if told { RESFD } else { 0 },
            resfd: self.event.as_fd().as_raw_fd() as u32,
            ..Iocb::default()
        };
        self.queued.push_back(slot);
    }

    /// Whether [`Aio::send`] has something to send.
    #[inline]
    pub(crate) fn queued(&self) -> bool {
        !self.queued.is_empty()
    }

    /// Submits what is queued, at most [`BATCH`]: one call, and one more after each request that is
    /// refused.
    pub(crate) fn send(&mut self) {
        while !self.queued.is_empty() {
            let iocbs = self.iocbs.as_mut_ptr().expose_provenance();
            let at = |&slot: &u16| iocbs + usize::from(slot) * size_of::<Iocb>();
            self.list.clear();
            self.list.extend(self.queued.iter().take(BATCH).map(at));
            self.calls += 1;
            // SAFETY: a list of iocbs of ours, which nothing borrows during the call, each filled by
            // `push`, whose callers keep what they name.
            let n = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context,
                    self.list.len(),
                    self.list.as_mut_ptr(),
                )
            };
            if let Ok(n) = usize::try_from(n) {
                let (iocbs, sent) = (&self.iocbs, self.queued.drain(..n.min(self.list.len())));
                self.untold += sent.filter(|&slot| !is_told(iocbs, slot)).count();
                self.running += n;
                // What is left is sent in the next turn.
                return;
            }
            let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            if matches!(errno, libc::EAGAIN | libc::EINTR) {
                // The next turn tries again.
                return;
            }
            // The first of them is at fault.
            let Some(slot) = self.queued.pop_front() else { return };
            let file = self.files[usize::from(slot)].take();
            match file {
                // Before Linux 4.18: an operation that it does not know.
                Some(file) if errno == libc::EINVAL => {
                    self.fdsync = false;
                    self.helper.push(slot, &file, Io::Sync, 0);
                }
                _ => self.results.push_back((slot, -i64::from(errno))),
            }
        }
    }

    /// The next completion: slot and result.
    #[inline]
    pub(crate) fn next(&mut self) -> Option<(u32, i64)> {
        if let Some((slot, result)) = self.results.pop_front() {
            return Some((u32::from(slot), result));
        }
        let (slot, result) = self.ended()?;
        Some((u32::from(slot), result))
    }

    /// The next one of the kernel's or the helper's.
    #[inline]
    fn ended(&mut self) -> Option<(u16, i64)> {
        let ended = self.reap().or_else(|| self.helper.next())?;
        if is_told(&self.iocbs, ended.0) {
            self.ended = self.ended.wrapping_add(1);
        } else {
            self.untold -= 1;
        }
        Some(ended)
    }

    /// The next completion of the kernel's.
    fn reap(&mut self) -> Option<(u16, i64)> {
        if self.running == 0 {
            return None;
        }
        let (data, result) = match &self.ring {
            Some(ring) => ring.next(),
            None => self.get_event(),
        }?;
        self.running -= 1;
        self.files[data as usize] = None;
        Some((data as u16, result))
    }

    /// One event by system call.
    #[cold]
    fn get_event(&mut self) -> Option<(u64, i64)> {
        let mut event = Event::default();
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        self.calls += 1;
        // SAFETY: room for one event, and a time-out of nothing.
        let n = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0 as libc::c_long,
                1 as libc::c_long,
                &raw mut event,
                &raw const zero,
            )
        };
        (n == 1).then_some((event.data, event.res))
    }

    /// Empties the eventfd if it tells of what was taken already, so that only another completion makes it
    /// readable, and then says whether one is there. It may be readable while nothing is in flight: the
    /// kernel tells of a completion a moment after that is there. But not for long, if this is called again.
    /// What it will not be told of must be looked for, and counts as there.
    pub(crate) fn arm(&mut self) -> bool {
        if self.told != self.ended
            && let Ok(told) = self.event.read()
        {
            self.told = self.told.wrapping_add(told);
        }
        if self.results.is_empty()
            && let Some(found) = self.ended()
        {
            self.results.push_back(found);
        }
        !self.results.is_empty() || self.untold > 0
    }

    /// Readable after a completion, until [`Aio::arm`].
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Whether it is for files in memory.
    pub(crate) fn at_once(&self) -> bool {
        self.at_once
    }

    /// System calls made for I/O so far.
    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }

    /// Does without the mapped ring and FDSYNC, as a kernel would make us.
    #[cfg(test)]
    pub(crate) fn cripple(&mut self) {
        self.ring = None;
        self.fdsync = false;
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        self.ring = None;
        // SAFETY: the context is ours and not used after this. The call returns when the kernel has
        // completed every request, and so writes to no memory any more.
        let done = unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
        debug_assert_eq!(done, 0);
    }
}
