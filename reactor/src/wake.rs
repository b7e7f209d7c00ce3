//! [`Wake`]: how another thread wakes a reactor that may sleep, without a system call if it does not.

mod flag;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use flag::Flag;

/// What `flag` is made of; a model of memory in a test.
mod atomics {
    pub(super) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
}

/// A flag that says "I sleep" and the eventfd to write to if so.
///
/// The sleeper: [`Wake::about_to_sleep`], look for work once more, then poll [`Wake::fd`], then
/// [`Wake::awake`]. The waker: make the work visible, then [`Wake::wake`]. A full fence on both
/// sides makes one of the two see the other.
#[derive(Clone, Debug)]
pub struct Wake(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    flag: Flag,
    fd: EventFd,
}

impl Wake {
    /// A new one, awake.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new() -> Result<Wake, nix::Error> {
        let fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Wake(Arc::new(Inner { flag: Flag::new(), fd })))
    }

    /// Wakes the sleeper if it sleeps or is about to.
    #[inline]
    pub fn wake(&self) {
        if self.0.flag.must_ring() {
            self.ring();
        }
    }

    #[cold]
    fn ring(&self) {
        // Fails only if the counter is full, and then the sleeper wakes anyway.
        let _ = self.0.fd.write(1);
    }

    /// Says that the caller is going to sleep unless it now finds work.
    pub fn about_to_sleep(&self) {
        self.0.flag.about_to_sleep();
    }

    /// Takes that back, and empties the eventfd.
    pub fn awake(&self) {
        self.0.flag.awake(|| self.0.fd.read().unwrap_or(0));
    }

    /// Becomes readable on a wake-up.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::sync::atomic::{AtomicU64, Ordering};

    fn sleep_on(w: &Wake, ms: u16) -> bool {
        let mut fds = [PollFd::new(w.fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(ms)).unwrap() == 1
    }

    #[test]
    fn no_wakeup_is_lost() {
        let (w, work) = (Wake::new().unwrap(), Arc::new(AtomicU64::new(0)));
        let waker = {
            let (w, work) = (w.clone(), work.clone());
            std::thread::spawn(move || {
                for i in 1..=2000u64 {
                    work.store(i, Ordering::Release);
                    w.wake();
                    while work.load(Ordering::Acquire) != 0 {
                        std::thread::yield_now();
                    }
                }
            })
        };
        let mut seen = 0;
        while seen < 2000 {
            w.about_to_sleep();
            if work.load(Ordering::Acquire) == 0 {
                assert!(sleep_on(&w, 10_000), "wake-up lost");
            }
            w.awake();
            let now = work.load(Ordering::Acquire);
            if now != 0 {
                assert_eq!(now, seen + 1);
                seen = now;
                work.store(0, Ordering::Release);
            }
        }
        waker.join().unwrap();
    }

    #[test]
    fn a_late_ring_cuts_short_one_sleep_at_most() {
        let w = Wake::new().unwrap();
        w.about_to_sleep();
        assert!(w.0.flag.must_ring(), "the waker takes the flag and is then held up");
        w.awake();
        w.ring();
        for _ in 0..2 {
            w.about_to_sleep();
            sleep_on(&w, 0);
            w.awake();
        }
        w.about_to_sleep();
        assert!(!sleep_on(&w, 0), "still readable");
    }

    #[test]
    fn awake_costs_no_write() {
        let w = Wake::new().unwrap();
        w.wake();
        assert!(!sleep_on(&w, 0));
    }
}
