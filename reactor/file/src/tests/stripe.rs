//! Stripes over files: what they cost in system calls, and that a reactor may sleep over them.

use block::{BlockQueue, Completions, Flags, HasWork, Op, Request, StripeQueue, Submit, Tag};
use dma::{PageSize, Region};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{dirs, open};
use crate::{Engine, FileQueue};

#[test]
fn a_stripe_makes_one_call_a_file_a_turn_and_wakes_who_sleeps() {
    const ROUNDS: u64 = 50;
    const DEPTH: u64 = 32;
    for (engine, dir) in [Engine::IoUring, Engine::Aio].into_iter().zip(dirs().iter().cycle()) {
        for files in [2u64, 4] {
            let member = |n: u64| {
                let path = dir.path().join(format!("{engine:?}{n}"));
                std::fs::write(&path, vec![n as u8; 1 << 20]).unwrap();
                let mut queue = FileQueue::new(engine).unwrap();
                queue.add(open(&path)).unwrap();
                (queue, 0)
            };
            let mut stripe = StripeQueue::new((0..files).map(member).collect(), 4096).unwrap();
            let memory = Region::new(1 << 20, PageSize::Small).unwrap();
            stripe.register(&memory).unwrap();
            let mut out = Completions::new();
            for round in 0..ROUNDS {
                for n in 0..DEPTH {
                    let segs = [memory.seg(n * 4096, 4096).unwrap()];
                    let (tag, flags) = (Tag::new(1, n as u16, round as u32), Flags::NONE);
                    let (op, offset, len) = (Op::Read, n * 4096, 4096);
                    let r = Request { tag, op, flags, unit: 0, offset, len, segs: &segs };
                    stripe.submit(&r).unwrap();
                }
                let mut left = DEPTH as usize;
                loop {
                    out.clear();
                    left -= stripe.poll(&mut out);
                    assert!(out.iter().all(|c| c.status.is_ok()));
                    if left == 0 {
                        break;
                    }
                    if stripe.arm() == HasWork::No {
                        let fd = stripe.wake_fd().expect("files wake a reactor");
                        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
                        let woken = poll(&mut fds, PollTimeout::from(10_000u16)).unwrap();
                        assert_eq!(woken, 1, "{left} of a round's reads ended and nothing woke");
                    }
                }
            }
            // Nothing is left that would keep a reactor awake, also where the kernel tells of a completion
            // after that was taken.
            let quiet = (0..1000).any(|_| {
                assert_eq!(stripe.arm(), HasWork::No);
                let fd = stripe.wake_fd().expect("files wake a reactor");
                let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
                poll(&mut fds, PollTimeout::from(1u16)).unwrap() == 0
            });
            assert!(quiet, "{engine:?}: awake with nothing in flight");
            for n in 0..DEPTH {
                let mut page = [0; 4096];
                memory.read((n * 4096) as usize, &mut page);
                assert!(page.iter().all(|&b| u64::from(b) == n % files), "{engine:?} {files} {n}");
            }
            let calls: u64 = stripe.members().map(FileQueue::calls).sum();
            assert_eq!(calls, ROUNDS * files, "{engine:?}, {files} files");
            assert_eq!((stripe.in_flight(), stripe.arm()), (0, HasWork::No));
        }
    }
}
