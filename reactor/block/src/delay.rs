//! [`DelayQueue`]: a leaf whose completions come late and in another order, for tests of what
//! stands above. Deterministic: time is counted in polls, chance comes from a seed.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use dma::Region;

use crate::{
    BlockQueue, Completion, Completions, DeviceInfo, Full, HasWork, LeafAccess, Request, Status,
    Submit,
};

/// When completions are handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delay {
    /// This many polls after the leaf had them, in the leaf's order.
    Polls(u32),
    /// After 0 to `most` polls by chance, so in any order.
    Random {
        /// Begins the sequence; the same seed makes the same sequence.
        seed: u64,
        /// Most polls to wait.
        most: u32,
    },
}

/// Delays the completions of the leaf below. The requests themselves reach the leaf at once.
#[derive(Debug)]
pub struct DelayQueue<Q> {
    leaf: Q,
    delay: Delay,
    random: u64,
    now: u64,
    /// Completions and the poll in which they are due.
    held: Vec<(u64, Completion)>,
    inner: Completions,
}

impl<Q: BlockQueue> DelayQueue<Q> {
    /// Puts the queue over a leaf.
    pub fn new(leaf: Q, delay: Delay) -> DelayQueue<Q> {
        let random = match delay {
            // Any number but 0, from which xorshift never gets away.
            Delay::Random { seed, .. } => (seed ^ 0x9e37_79b9_7f4a_7c15).max(1),
            Delay::Polls(_) => 1,
        };
        DelayQueue { leaf, delay, random, now: 0, held: Vec::new(), inner: Completions::new() }
    }

    /// The leaf.
    pub fn leaf(&self) -> &Q {
        &self.leaf
    }

    /// The leaf.
    pub fn leaf_mut(&mut self) -> &mut Q {
        &mut self.leaf
    }

    /// How many polls the next completion waits.
    fn wait(&mut self) -> u64 {
        match self.delay {
            Delay::Polls(n) => n.into(),
            Delay::Random { most, .. } => {
                // Xorshift: enough chance to shuffle, and the same on every machine.
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                (self.random >> 16) % (u64::from(most) + 1)
            }
        }
    }
}

impl<Q: BlockQueue> Submit for DelayQueue<Q> {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        self.leaf.info(unit)
    }

    fn room(&self) -> usize {
        self.leaf.room()
    }

    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        self.leaf.submit(request)
    }
}

impl<Q: BlockQueue> BlockQueue for DelayQueue<Q> {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.leaf.register(region)
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        self.inner.clear();
        self.leaf.poll(&mut self.inner);
        for i in 0..self.inner.len() {
            let due = self.now + self.wait();
            self.held.push((due, self.inner.get(i)));
        }
        let (now, before) = (self.now, out.len());
        self.now += 1;
        self.held.retain(|&(due, c)| {
            let keep = due > now || out.room() == 0;
            if !keep {
                out.push(c);
            }
            keep
        });
        out.len() - before
    }

    fn start(&mut self) {
        self.leaf.start();
    }

    fn in_flight(&self) -> usize {
        self.leaf.in_flight() + self.held.len()
    }

    fn arm(&mut self) -> HasWork {
        if self.held.is_empty() { self.leaf.arm() } else { HasWork::Yes }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.leaf.wake_fd()
    }

    fn set_now(&mut self, now: u64) {
        self.leaf.set_now(now);
    }
}

impl<Q: LeafAccess> LeafAccess for DelayQueue<Q> {
    fn unit_len(&self, unit: u16) -> u64 {
        self.leaf.unit_len(unit)
    }

    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
        self.leaf.set_unit_len(unit, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Flags, MemQueue, Op, Tag};

    fn order(delay: Delay) -> Vec<(usize, u16)> {
        let mut q = DelayQueue::new(MemQueue::new(1 << 20, 512).unwrap(), delay);
        for slot in 0..20 {
            let tag = Tag::new(0, slot, 0);
            let r = Request {
                tag,
                op: Op::Flush,
                flags: Flags::NONE,
                unit: 0,
                offset: 0,
                len: 0,
                segs: &[],
            };
            q.submit(&r).unwrap();
        }
        let mut order = Vec::new();
        let mut out = Completions::new();
        for poll in 0..100 {
            out.clear();
            q.poll(&mut out);
            order.extend(out.iter().map(|c| (poll, c.tag.slot())));
            assert_eq!(q.arm() == HasWork::Yes, q.in_flight() > 0);
        }
        assert_eq!(q.in_flight(), 0);
        order
    }

    #[test]
    fn a_fixed_delay_keeps_the_order() {
        assert_eq!(order(Delay::Polls(0)), (0..20).map(|s| (0, s)).collect::<Vec<_>>());
        assert_eq!(order(Delay::Polls(3)), (0..20).map(|s| (3, s)).collect::<Vec<_>>());
    }

    #[test]
    fn a_random_delay_shuffles_the_same_way_each_time() {
        let a = order(Delay::Random { seed: 42, most: 10 });
        assert_eq!(a, order(Delay::Random { seed: 42, most: 10 }));
        assert_ne!(a, order(Delay::Random { seed: 43, most: 10 }));
        let mut slots: Vec<u16> = a.iter().map(|&(_, s)| s).collect();
        assert!(!slots.is_sorted());
        slots.sort_unstable();
        assert_eq!(slots, (0..20).collect::<Vec<_>>());
        assert!(a.iter().all(|&(poll, _)| poll <= 10));
    }
}
