//! [`Link`]: the few words through which a controller (on its control thread) and one queue pair
//! (on its reactor) talk. No lock; each word has one writer.
//!
//! The controller gives an [`Order`]; the queue pair sees it at its next poll, obeys, and writes
//! the order back as its acknowledgement. After it acknowledged [`Order::Wait`] it touches neither
//! rings nor doorbells until [`Order::Run`], so in between the rings are the controller's.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::memory::Mapping;

/// What the controller wants of a queue pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Order {
    /// Hands off the rings; requests stay where they are.
    Wait = 0,
    /// The device has the queue, with empty rings over zeroed memory. If it runs already: look
    /// at the namespaces again.
    Run = 1,
    /// The device is no more and does not touch memory: answer everything.
    Gone = 2,
    /// The same, but it was not possible to stop the device: its buffers must never be used again.
    Unsafe = 3,
}

impl Order {
    pub(crate) fn of(word: u32) -> Order {
        match word & 3 {
            0 => Order::Wait,
            1 => Order::Run,
            2 => Order::Gone,
            _ => Order::Unsafe,
        }
    }
}

/// A word on a cache line of its own: read in every poll, written hardly ever.
#[repr(align(64))]
struct Alone(AtomicU32);

/// Shared by a controller and one of its queue pairs.
pub(crate) struct Link {
    /// An order in bits 1:0, above it a number that changes with each. Written by the controller.
    order: Alone,
    /// The last order that was obeyed. Written by the queue pair.
    ack: AtomicU32,
    /// A command that is overdue, 0 if there is none: its CID in bits 15:0, above it a number
    /// that changes with each. Written by the queue pair.
    late: AtomicU64,
    /// The queue pair is no more. Written by the queue pair, last.
    dropped: AtomicBool,
    /// Memory that commands may still have been using when the queue pair was dropped.
    orphans: OnceLock<Vec<Arc<Mapping>>>,
}

impl Link {
    /// A link whose queue pair waits.
    pub(crate) fn new() -> Link {
        Link {
            order: Alone(AtomicU32::new(Order::Wait as u32)),
            ack: AtomicU32::new(Order::Wait as u32),
            late: AtomicU64::new(0),
            dropped: AtomicBool::new(false),
            orphans: OnceLock::new(),
        }
    }

    /// Controller: gives an order. What it did before (zeroed rings, sizes) is visible with it.
    pub(crate) fn give(&self, order: Order) {
        let next = (self.order.0.load(Ordering::Relaxed) & !3).wrapping_add(4) | order as u32;
        self.order.0.store(next, Ordering::Release);
    }

    /// Controller: whether the last order was obeyed. What the queue pair did before is visible.
    pub(crate) fn acknowledged(&self) -> bool {
        self.ack.load(Ordering::Acquire) == self.order.0.load(Ordering::Relaxed)
    }

    /// Controller: the last order that was given.
    pub(crate) fn given(&self) -> Order {
        Order::of(self.order.0.load(Ordering::Relaxed))
    }

    /// Controller: the overdue command, 0 if there is none.
    pub(crate) fn late(&self) -> u64 {
        self.late.load(Ordering::Acquire)
    }

    /// Controller: whether the queue pair is no more.
    pub(crate) fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::Acquire)
    }

    /// Queue pair: the order as a word.
    #[inline]
    pub(crate) fn order(&self) -> u32 {
        self.order.0.load(Ordering::Acquire)
    }

    /// Queue pair: says that the order was obeyed.
    pub(crate) fn acknowledge(&self, word: u32) {
        self.ack.store(word, Ordering::Release);
    }

    /// Queue pair: says which command is overdue, or with `None` that none is any more.
    pub(crate) fn set_late(&self, cid: Option<u16>, number: u64) {
        self.late.store(cid.map_or(0, |c| number << 16 | u64::from(c)), Ordering::Release);
    }

    /// Queue pair: the last thing it does. `orphans`: memory that the device may still use.
    pub(crate) fn leave(&self, orphans: Vec<Arc<Mapping>>) {
        // Set once only: there is one queue pair, and it is dropped once.
        let _ = self.orphans.set(orphans);
        self.dropped.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_seen_and_acknowledged_one_by_one() {
        let link = Link::new();
        assert!(link.acknowledged(), "a new queue pair waits");
        let mut last = link.order();
        for order in [Order::Run, Order::Run, Order::Wait, Order::Gone, Order::Unsafe] {
            link.give(order);
            assert_ne!(link.order(), last, "the same order again is another word");
            last = link.order();
            assert_eq!((Order::of(last), link.given()), (order, order));
            assert!(!link.acknowledged());
            link.acknowledge(last);
            assert!(link.acknowledged());
        }
    }

    #[test]
    fn late_words_differ_for_the_same_cid() {
        let link = Link::new();
        assert_eq!(link.late(), 0);
        link.set_late(Some(0), 1);
        let a = link.late();
        link.set_late(None, 1);
        assert_eq!(link.late(), 0);
        link.set_late(Some(0), 2);
        assert!(link.late() != a && link.late() as u16 == 0);
    }
}
