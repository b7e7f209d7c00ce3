//! Submission and completion queues as the controller keeps them (§4.1).
//!
//! Indices and sizes come from the host and are checked when they enter: a queue here always has
//! at least 2 entries, and all indices are below its size.

use nvme_spec::{CQE_SIZE, SQE_SIZE};

use crate::registers::{Doorbell, Registers};

#[derive(Debug)]
pub(crate) struct Sq {
    pub(crate) base: u64,
    pub(crate) size: u32,
    pub(crate) head: u32,
    pub(crate) tail: u32,
    /// Doorbell value of the last look, good or bad.
    pub(crate) seen: u32,
    pub(crate) cqid: u16,
}

#[derive(Debug)]
pub(crate) struct Cq {
    pub(crate) base: u64,
    pub(crate) size: u32,
    pub(crate) head: u32,
    pub(crate) tail: u32,
    pub(crate) seen: u32,
    pub(crate) phase: bool,
    /// The interrupt vector that is raised when something is posted.
    pub(crate) vector: Option<u16>,
    /// Entries that commands already taken will need.
    pub(crate) reserved: u32,
    /// Submission queues that complete here.
    pub(crate) users: u32,
}

/// What a look at a doorbell found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Look {
    Same,
    Moved,
    /// The value is out of range, or moves past what there is.
    Bad,
}

impl Sq {
    pub(crate) fn new(base: u64, size: u32, cqid: u16) -> Sq {
        Sq { base, size, head: 0, tail: 0, seen: 0, cqid }
    }

    /// Takes note of the tail doorbell's value.
    #[inline]
    pub(crate) fn look(&mut self, raw: u32) -> Look {
        if raw == self.seen {
            return Look::Same;
        }
        self.seen = raw;
        if raw >= self.size {
            return Look::Bad;
        }
        let used = distance(self.head, self.tail, self.size);
        let added = distance(self.tail, raw, self.size);
        if used + added >= self.size {
            return Look::Bad;
        }
        self.tail = raw;
        Look::Moved
    }

    /// Bus address of the entry at the head.
    #[inline]
    pub(crate) fn head_address(&self) -> u64 {
        self.base.wrapping_add(u64::from(self.head) * SQE_SIZE as u64)
    }

    #[inline]
    pub(crate) fn advance(&mut self) {
        self.head = if self.head + 1 == self.size { 0 } else { self.head + 1 };
    }
}

impl Cq {
    pub(crate) fn new(base: u64, size: u32, vector: Option<u16>) -> Cq {
        Cq { base, size, head: 0, tail: 0, seen: 0, phase: true, vector, reserved: 0, users: 0 }
    }

    /// Takes note of the head doorbell's value.
    #[inline]
    pub(crate) fn look(&mut self, raw: u32) -> Look {
        if raw == self.seen {
            return Look::Same;
        }
        self.seen = raw;
        if raw >= self.size {
            return Look::Bad;
        }
        let posted = distance(self.head, self.tail, self.size);
        if distance(self.head, raw, self.size) > posted {
            return Look::Bad;
        }
        self.head = raw;
        Look::Moved
    }

    /// Entries that can be posted or promised now.
    #[inline]
    pub(crate) fn room(&self) -> u32 {
        let used = distance(self.head, self.tail, self.size) + self.reserved;
        (self.size - 1).saturating_sub(used)
    }

    /// Bus address of the entry at the tail.
    #[inline]
    pub(crate) fn tail_address(&self) -> u64 {
        self.base.wrapping_add(u64::from(self.tail) * CQE_SIZE as u64)
    }

    #[inline]
    pub(crate) fn advance(&mut self) {
        if self.tail + 1 == self.size {
            self.tail = 0;
            self.phase = !self.phase;
        } else {
            self.tail += 1;
        }
    }
}

/// Steps from `from` forward to `to` in a ring.
#[inline]
fn distance(from: u32, to: u32, size: u32) -> u32 {
    if to >= from { to - from } else { to + size - from }
}

/// A submission queue with its completion queue, and the doorbell values last seen: all that a
/// step without work looks at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    pub(crate) sqid: u16,
    pub(crate) cqid: u16,
    pub(crate) tail: u32,
    pub(crate) head: u32,
    /// It has work, and so looks at shadow doorbells by itself.
    pub(crate) awake: bool,
}

/// All queues of a controller; index is the queue identifier, 0 the admin pair.
#[derive(Debug, Default)]
pub(crate) struct Queues {
    pub(crate) sqs: Vec<Option<Sq>>,
    pub(crate) cqs: Vec<Option<Cq>>,
    /// The submission queues there are, in the order they are visited.
    pub(crate) watch: Vec<Watch>,
}

impl Queues {
    pub(crate) fn new(io_queues: u16) -> Queues {
        let none = usize::from(io_queues) + 1;
        Queues {
            sqs: (0..none).map(|_| None).collect(),
            cqs: (0..none).map(|_| None).collect(),
            watch: Vec::with_capacity(none),
        }
    }

    #[inline]
    pub(crate) fn sq(&mut self, qid: u16) -> Option<&mut Sq> {
        self.sqs.get_mut(usize::from(qid))?.as_mut()
    }

    #[inline]
    pub(crate) fn cq(&mut self, qid: u16) -> Option<&mut Cq> {
        self.cqs.get_mut(usize::from(qid))?.as_mut()
    }

    /// The completion queue of a submission queue, with its identifier.
    #[inline]
    pub(crate) fn cq_of(&mut self, sqid: u16) -> Option<(u16, &mut Cq)> {
        let cqid = self.sq(sqid)?.cqid;
        Some((cqid, self.cq(cqid)?))
    }

    pub(crate) fn add_cq(&mut self, regs: &Registers, qid: u16, cq: Cq) {
        self.cqs[usize::from(qid)] = Some(cq);
        regs.open_doorbell(qid, Doorbell::CqHead);
    }

    /// The completion queue must exist.
    pub(crate) fn add_sq(&mut self, regs: &Registers, qid: u16, sq: Sq) {
        if let Some(cq) = self.cq(sq.cqid) {
            cq.users += 1;
        }
        let head = self.cq(sq.cqid).map_or(0, |cq| cq.seen);
        self.watch.push(Watch { sqid: qid, cqid: sq.cqid, tail: 0, head, awake: false });
        self.sqs[usize::from(qid)] = Some(sq);
        regs.open_doorbell(qid, Doorbell::SqTail);
    }

    pub(crate) fn remove_sq(&mut self, regs: &Registers, qid: u16) {
        regs.close_doorbell(qid, Doorbell::SqTail);
        if let Some((_, cq)) = self.cq_of(qid) {
            cq.users -= 1;
        }
        self.sqs[usize::from(qid)] = None;
        self.watch.retain(|w| w.sqid != qid);
    }

    pub(crate) fn remove_cq(&mut self, regs: &Registers, qid: u16) {
        regs.close_doorbell(qid, Doorbell::CqHead);
        self.cqs[usize::from(qid)] = None;
    }

    pub(crate) fn clear(&mut self, regs: &Registers) {
        regs.close_all_doorbells();
        self.sqs.fill_with(|| None);
        self.cqs.fill_with(|| None);
        self.watch.clear();
    }

    /// Whether no doorbell has changed.
    #[inline]
    pub(crate) fn quiet(&self, regs: &Registers) -> bool {
        self.watch.iter().all(|w| {
            regs.doorbell(w.sqid, Doorbell::SqTail) == w.tail
                && regs.doorbell(w.cqid, Doorbell::CqHead) == w.head
        })
    }

    /// Whether any I/O queue exists.
    pub(crate) fn any_io(&self) -> bool {
        self.sqs[1..].iter().any(Option::is_some) || self.cqs[1..].iter().any(Option::is_some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_that_cannot_be() {
        let mut sq = Sq::new(0, 4, 0);
        assert_eq!(sq.look(4), Look::Bad);
        assert_eq!(sq.look(u32::MAX), Look::Bad);
        assert_eq!(sq.look(3), Look::Moved);
        // Full: any further movement would overwrite entries not fetched yet.
        assert_eq!(sq.look(0), Look::Bad);
        assert_eq!((sq.tail, sq.head), (3, 0));
        sq.advance();
        assert_eq!(sq.look(1), Look::Bad);
        assert_eq!(sq.look(0), Look::Moved);
        for _ in 0..3 {
            sq.advance();
        }
        assert_eq!(sq.head, 0);
    }

    #[test]
    fn heads_that_cannot_be() {
        let mut cq = Cq::new(0, 4, None);
        assert_eq!(cq.room(), 3);
        assert_eq!(cq.look(1), Look::Bad);
        cq.advance();
        cq.advance();
        cq.reserved = 1;
        assert_eq!(cq.room(), 0);
        assert_eq!(cq.look(3), Look::Bad);
        assert_eq!(cq.look(1), Look::Moved);
        assert_eq!(cq.room(), 1);
        assert_eq!(cq.look(0), Look::Bad);
        assert!(cq.phase);
        cq.advance();
        cq.advance();
        assert!(!cq.phase);
        assert_eq!(cq.tail_address(), 0);
    }
}
