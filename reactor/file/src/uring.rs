//! [`Uring`]: requests to the kernel through one io_uring.
//!
//! The ring is made without SQPOLL (a kernel thread's whole core) and without deferred task work
//! (which would cost a system call to see a completion): a completion appears in the ring by itself.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::with_exposed_provenance_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dma::{Region, RegionId};
use io_uring::{IoUring, Probe, opcode, squeue, types};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::geteuid;

use crate::kernel::{Io, Start};

/// One ring.
pub(crate) struct Uring {
    ring: IoUring,
    /// Entries in the ring that the kernel has not been told of.
    queued: usize,
    /// Entries that the kernel has taken and not answered.
    running: usize,
    calls: u64,
    /// Which regions of the table the kernel has pinned.
    pinned: Box<[bool]>,
    allowance: Allowance,
    /// Whether a refused call was already logged.
    complained: bool,
}

impl Uring {
    /// A ring for `depth` requests at a time.
    pub(crate) fn new(depth: u32) -> io::Result<Uring> {
        // A forked child must not get the rings: it could never use them, and its copy of the
        // process would keep them alive. The completion ring is twice as long, so never overflows.
        let ring = IoUring::builder().dontfork().build(depth)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        for code in [opcode::Read::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE] {
            if !probe.is_supported(code) {
                return Err(io::ErrorKind::Unsupported.into());
            }
        }
        // From Linux 5.19 on; without, nothing is ever pinned.
        let tabled = ring.submitter().register_buffers_sparse(RegionId::MAX as u32).is_ok();
        let pinned = vec![false; if tabled { RegionId::MAX } else { 0 }].into_boxed_slice();
        Ok(Uring {
            ring,
            queued: 0,
            running: 0,
            calls: 0,
            pinned,
            allowance: Allowance(0),
            complained: false,
        })
    }

    /// Has the kernel pin a region's pages once, which otherwise it does for each request. Not more
    /// than a favour: the memory may be more than a process may lock, or of a kind that cannot be, or
    /// such that it is better not resident.
    pub(crate) fn pin(&mut self, region: &Arc<Region>) {
        let at = region.id().index();
        let Some(pinned) = self.pinned.get_mut(at) else { return };
        if *pinned || region.is_lazy() || !self.allowance.take(region.len()) {
            return;
        }
        let done = enter(&self.ring, at, Some(region));
        *pinned = done.is_ok();
        if let Err(e) = done {
            self.allowance.give(region.len());
            log::debug!("{} bytes not pinned for io_uring: {e}", region.len());
        }
    }

    /// Has the kernel let go of a region's pages, if it has pinned them: at once, or before Linux 6.13
    /// perhaps when the requests that it has now have ended and up to a second later. No entry that
    /// names the region is to be pushed any more, nor may one be waiting to be sent. `false`: the
    /// kernel is out of memory and does not; nothing has changed.
    pub(crate) fn unpin(&mut self, region: &Region) -> bool {
        let at = region.id().index();
        let Some(pinned) = self.pinned.get_mut(at).filter(|pinned| **pinned) else { return true };
        // Requests with the kernel hold on to the buffer that they were given.
        let done = enter(&self.ring, at, None);
        if let Err(e) = done {
            log::debug!("{} bytes stay pinned for io_uring for now: {e}", region.len());
            return false;
        }
        *pinned = false;
        self.allowance.give(region.len());
        true
    }

    /// Whether the kernel has pinned the region of this number.
    #[cfg(test)]
    pub(crate) fn is_pinned(&self, region: usize) -> bool {
        self.pinned.get(region) == Some(&true)
    }

    /// Bytes of the process's allowance that the ring has taken.
    #[cfg(test)]
    pub(crate) fn allowance(&self) -> usize {
        self.allowance.0
    }

    /// Queues a request.
    ///
    /// # Safety
    /// `start.vecs` must stay where it is, and the memory that it names stay mapped, until
    /// [`Uring::next`] returns `slot` or the ring is dropped.
    pub(crate) unsafe fn push(&mut self, slot: u32, start: &Start<'_>) {
        let entry = self.entry(start).user_data(u64::from(slot));
        // SAFETY: the caller keeps the memory; the entry's other fields are plain values.
        let done = unsafe { self.ring.submission().push(&entry) };
        done.expect("the ring has as many entries as there are slots");
        self.queued += 1;
    }

    #[inline]
    fn entry(&self, start: &Start<'_>) -> squeue::Entry {
        let (fd, at) = (types::Fd(start.file.as_raw_fd()), start.offset);
        let list = start.vecs.as_slice();
        let (ptr, count) = (list.as_ptr().cast::<libc::iovec>(), list.len() as u32);
        // A single piece needs no list that the kernel would have to copy in.
        let single = start.vecs.single().map(|(v, region)| {
            let pinned = self.pinned.get(region) == Some(&true);
            let memory = with_exposed_provenance_mut::<u8>(v.base());
            (memory, v.len() as u32, pinned.then_some(region as u16))
        });
        match start.io {
            Io::Read => match single {
                Some((to, len, Some(region))) => {
                    opcode::ReadFixed::new(fd, to, len, region).offset(at).build()
                }
                Some((to, len, None)) => opcode::Read::new(fd, to, len).offset(at).build(),
                None => opcode::Readv::new(fd, ptr, count).offset(at).build(),
            },
            Io::Write { dsync } => {
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                match single {
                    Some((from, len, Some(region))) => {
                        let write = opcode::WriteFixed::new(fd, from, len, region);
                        write.offset(at).rw_flags(flags).build()
                    }
                    Some((from, len, None)) => {
                        opcode::Write::new(fd, from, len).offset(at).rw_flags(flags).build()
                    }
                    None => opcode::Writev::new(fd, ptr, count).offset(at).rw_flags(flags).build(),
                }
            }
            Io::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Io::Allocate { mode, len } => {
                opcode::Fallocate::new(fd, len).offset(at).mode(mode).build()
            }
        }
    }

    /// Whether [`Uring::send`] has something to send.
    #[inline]
    pub(crate) fn queued(&self) -> bool {
        self.queued > 0
    }

    /// Tells the kernel of all queued requests: one call. What it cannot take now stays queued.
    pub(crate) fn send(&mut self) {
        self.calls += 1;
        match self.ring.submit() {
            Ok(n) => {
                self.queued -= n;
                self.running += n;
            }
            // Interrupted, or short of memory: the next turn tries again.
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
            Err(e) => {
                if !self.complained {
                    log::error!("io_uring_enter fails, trying on: {e}");
                    self.complained = true;
                }
            }
        }
    }

    /// The next completion: slot and result (a count, or a negative errno).
    #[inline]
    pub(crate) fn next(&mut self) -> Option<(u32, i64)> {
        let e = self.ring.completion().next()?;
        self.running -= 1;
        Some((e.user_data() as u32, i64::from(e.result())))
    }

    /// Whether a completion waits.
    pub(crate) fn ready(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Readable while a completion waits in the ring.
    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// System calls made for I/O so far.
    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }
}

/// Enters a region in the ring's table of buffers, or nothing: the entry is then as empty as the sparse
/// table made it.
fn enter(ring: &IoUring, at: usize, region: Option<&Region>) -> io::Result<()> {
    let (iov_base, iov_len) = match region {
        Some(region) => (region.base().as_ptr().cast(), region.len()),
        None => (std::ptr::null_mut(), 0),
    };
    let buffer = libc::iovec { iov_base, iov_len };
    // SAFETY: nothing, or a mapping whose pages stay the same. The kernel holds these itself; the queue's
    // table keeps the region until `unpin`, so that no other gets its address or its number meanwhile.
    unsafe { ring.submitter().register_buffers_update(at as u32, &[buffer], None) }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel writes into the requests' memory until it has answered them. What was only
        // queued dies with the ring.
        while self.running > 0 {
            if self.next().is_none() {
                // SAFETY: no entries are submitted (the count is 0) and no argument is passed.
                let waited =
                    unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, GETEVENTS, None) };
                if waited.is_err() {
                    std::thread::yield_now();
                }
            }
        }
    }
}

/// How many bytes a ring has taken of those that the process may pin.
#[derive(Debug)]
struct Allowance(usize);

impl Allowance {
    /// Takes `len` bytes more if they may be had. Half of what an unprivileged process may lock
    /// is left to the rings themselves: without memory for a ring there is no io_uring at all.
    fn take(&mut self, len: usize) -> bool {
        let limit = match getrlimit(Resource::RLIMIT_MEMLOCK) {
            _ if geteuid().is_root() => usize::MAX,
            Ok((soft, _)) => usize::try_from(soft / 2).unwrap_or(usize::MAX),
            Err(_) => 0,
        };
        let fits = |used: usize| used.checked_add(len).filter(|&sum| sum <= limit);
        if PINNED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_err() {
            return false;
        }
        self.0 += len;
        true
    }

    /// Gives back what was taken in one piece.
    fn give(&mut self, len: usize) {
        self.0 -= len;
        PINNED.fetch_sub(len, Ordering::Relaxed);
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        PINNED.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Bytes that all rings of the process have pinned.
static PINNED: AtomicUsize = AtomicUsize::new(0);

/// `IORING_ENTER_GETEVENTS`.
const GETEVENTS: u32 = 1;
