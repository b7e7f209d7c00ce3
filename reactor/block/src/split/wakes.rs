//! [`Wakes`]: one descriptor for all members that have one to wake their reactor.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::LeafAccess;

/// Readable while one of the members' descriptors is: what epoll itself is to a poll. Events are
/// never taken from it; whoever polls it next has it look at the members again.
#[derive(Debug)]
pub(super) struct Wakes(Option<Epoll>);

impl Wakes {
    /// Of members, whose descriptors stay the same as long as they are there.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub(super) fn of<Q: LeafAccess>(members: &[(Q, u16)]) -> Result<Wakes, String> {
        let fail = |e: nix::Error| format!("no descriptor to wake a reactor by: {e}");
        let mut epoll = None;
        for fd in members.iter().filter_map(|(queue, _)| queue.wake_fd()) {
            let epoll = match &mut epoll {
                Some(epoll) => epoll,
                none => none.insert(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(fail)?),
            };
            epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(fail)?;
        }
        Ok(Wakes(epoll))
    }

    /// The descriptor, if a member has one.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|epoll| epoll.0.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dma::{PageSize, Region};
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;
    use crate::{
        BlockQueue, Completions, DeviceInfo, Flags, Full, HasWork, MemQueue, Op, Request, Status,
        StripeQueue, Submit, Tag,
    };

    /// A device that rings when the test says so, if it can, and hands out nothing before.
    struct Bell {
        queue: MemQueue,
        fd: Option<EventFd>,
        rung: bool,
    }

    impl Submit for Bell {
        fn info(&self, unit: u16) -> Option<&DeviceInfo> {
            self.queue.info(unit)
        }
        fn room(&self) -> usize {
            self.queue.room()
        }
        fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
            self.queue.submit(r)
        }
    }

    impl BlockQueue for Bell {
        fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
            self.queue.register(region)
        }
        fn poll(&mut self, out: &mut Completions) -> usize {
            if !std::mem::take(&mut self.rung) {
                return 0;
            }
            let _ = self.fd.as_ref().map(EventFd::read);
            self.queue.poll(out)
        }
        fn in_flight(&self) -> usize {
            self.queue.in_flight()
        }
        fn arm(&mut self) -> HasWork {
            if self.rung { HasWork::Yes } else { HasWork::No }
        }
        fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
            self.fd.as_ref().map(AsFd::as_fd)
        }
    }

    impl LeafAccess for Bell {
        fn unit_len(&self, unit: u16) -> u64 {
            self.queue.unit_len(unit)
        }
        fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
            self.queue.set_unit_len(unit, len)
        }
    }

    /// A stripe of chunks of 4 KiB over devices, some of which can wake.
    fn stripe<const N: usize>(wake: [bool; N]) -> (StripeQueue<Bell>, Arc<Region>) {
        let member = |wake: bool| {
            let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
            let fd = wake.then(|| EventFd::from_flags(flags).unwrap());
            (Bell { queue: MemQueue::new(1 << 20, 512).unwrap(), fd, rung: false }, 0)
        };
        let mut queue = StripeQueue::new(wake.map(member).into(), 4096).unwrap();
        let memory = Region::new(1 << 20, PageSize::Small).unwrap();
        queue.register(&memory).unwrap();
        (queue, memory)
    }

    fn read(queue: &mut StripeQueue<Bell>, memory: &Region, offset: u64, len: u64) {
        let segs = [memory.seg(0, len as u32).unwrap()];
        let (tag, op, flags) = (Tag::new(1, 0, offset as u32), Op::Read, Flags::NONE);
        queue.submit(&Request { tag, op, flags, unit: 0, offset, len, segs: &segs }).unwrap();
    }

    fn ring(queue: &mut StripeQueue<Bell>, member: usize) {
        let bell = &mut queue.members[member].0;
        bell.rung = true;
        let _ = bell.fd.as_ref().map(|fd| fd.write(1));
    }

    fn readable(queue: &StripeQueue<Bell>) -> bool {
        let mut fds = [PollFd::new(queue.wake_fd().unwrap(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    fn polled(queue: &mut StripeQueue<Bell>) -> usize {
        queue.poll(&mut Completions::new())
    }

    #[test]
    fn a_reactor_sleeps_over_members_that_wake_it() {
        let (mut queue, memory) = stripe([true, true, true]);
        for member in [2, 0, 1, 1] {
            read(&mut queue, &memory, member as u64 * 4096, 4096);
            assert_eq!((queue.in_flight(), queue.arm()), (1, HasWork::No));
            assert!(!readable(&queue), "{member}");
            ring(&mut queue, member);
            assert!(readable(&queue) && queue.arm() == HasWork::Yes, "{member}");
            assert_eq!(polled(&mut queue), 1);
            assert!(!readable(&queue), "{member}: the member has taken its wake-up back");
        }
        // In two parts, of which one comes late.
        read(&mut queue, &memory, 4096, 8192);
        assert_eq!((queue.in_flight(), queue.arm()), (1, HasWork::No));
        ring(&mut queue, 2);
        assert_eq!((polled(&mut queue), queue.in_flight(), queue.arm()), (0, 1, HasWork::No));
        assert!(!readable(&queue));
        ring(&mut queue, 1);
        assert!(readable(&queue));
        assert_eq!((polled(&mut queue), queue.in_flight(), queue.arm()), (1, 0, HasWork::No));
    }

    #[test]
    fn members_that_cannot_wake_are_polled_while_they_have_something() {
        let (mut queue, memory) = stripe([true, false]);
        read(&mut queue, &memory, 0, 4096);
        assert_eq!(queue.arm(), HasWork::No, "the other one would wake");
        read(&mut queue, &memory, 4096, 4096);
        assert_eq!((queue.in_flight(), queue.arm()), (2, HasWork::Yes));
        ring(&mut queue, 1);
        assert_eq!((polled(&mut queue), queue.arm()), (1, HasWork::No));
        let (mut queue, memory) = stripe([false, false]);
        assert!(queue.wake_fd().is_none());
        read(&mut queue, &memory, 0, 4096);
        assert_eq!(queue.arm(), HasWork::Yes);
    }

    #[test]
    fn parts_that_wait_for_a_place_keep_awake_only_where_nothing_else_would() {
        for wake in [true, false] {
            let (mut queue, memory) = stripe([true, wake]);
            let mut n = 0i32;
            while queue.members[0].0.room() > 0 {
                read(&mut queue, &memory, 0, 4096);
                n += 1;
            }
            assert!(queue.room() == 0 && queue.submit(&flush()).is_ok(), "waits for a place");
            assert_eq!(queue.arm() == HasWork::No, wake);
            while queue.in_flight() > 0 {
                (0..2).for_each(|member| ring(&mut queue, member));
                n -= polled(&mut queue) as i32;
            }
            assert_eq!(n, -1, "all reads and the flush were answered");
        }
    }

    fn flush() -> Request<'static> {
        let (tag, op, flags) = (Tag::new(1, 1, 1), Op::Flush, Flags::NONE);
        Request { tag, op, flags, unit: 0, offset: 0, len: 0, segs: &[] }
    }
}
