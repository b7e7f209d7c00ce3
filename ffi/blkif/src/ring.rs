//! [`BackRing`]: the backend's end of a ring: private indices, one look at each slot, answers
//! published once in a turn, and the notification rule (ring.h).
//!
//! Belongs to one reactor. The truth about indices is private; of the shared ones only `req_prod`
//! and `rsp_event` are ever read after the start, and both are only compared.

use std::sync::atomic::{Ordering, fence};

use block::HasWork;

use crate::abi::{Abi, Head, PAGE, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, Response};
use crate::{Kept, RingMemory};

/// The frontend's producer index went backwards or beyond the ring: nothing in the ring can be
/// believed any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("request producer {producer} outside {consumer}..={consumer} + {room}")]
pub struct Runaway {
    /// What the frontend wrote.
    pub producer: u32,
    /// Requests taken so far.
    pub consumer: u32,
    /// How far the producer may be ahead of that.
    pub room: u32,
}

/// After so many responses old ones are forgotten: often enough before their indices come again.
const FORGET: u32 = 1 << 28;

/// The backend's end of a ring.
#[derive(Debug)]
pub struct BackRing<M> {
    memory: M,
    abi: Abi,
    req_cons: u32,
    rsp_prod: u32,
    /// `rsp_prod` as the frontend sees it.
    published: u32,
    /// The same when old responses were forgotten last.
    forgotten: u32,
    /// The producer index was wrong once. Nothing is taken or published after that.
    broken: bool,
}

impl<M: RingMemory> BackRing<M> {
    /// Attaches to a ring that a frontend made. Starts where its responses end, so that a ring
    /// which another backend served and drained goes on.
    ///
    /// # Errors
    /// If more requests wait than the ring holds.
    pub fn attach(memory: M, abi: Abi, order: u8) -> Result<BackRing<M>, Runaway> {
        BackRing::attach_at(memory, abi, order, None)
    }

    /// The same where another backend was, which left this.
    pub(crate) fn attach_at(
        memory: M,
        abi: Abi,
        order: u8,
        kept: Option<&Kept>,
    ) -> Result<BackRing<M>, Runaway> {
        assert!(memory.bytes() == PAGE << order, "ring memory is not of the size its order says");
        let (cons, start) = match kept {
            Some(kept) => (kept.req_cons, kept.published),
            None => {
                let start = memory.load_index::<RSP_PROD>(Ordering::Acquire);
                (start, start)
            }
        };
        // Counted by who died before the guest could see it, perhaps.
        memory.store_index::<RSP_PROD>(start, Ordering::Release);
        let mut ring = BackRing {
            memory,
            abi,
            req_cons: cons,
            rsp_prod: start,
            published: start,
            forgotten: start,
            broken: false,
        };
        ring.waiting()?;
        Ok(ring)
    }

    /// Slots in the ring.
    #[inline]
    pub fn slots(&self) -> u32 {
        self.memory.mask() + 1
    }

    /// Requests taken and not yet answered.
    #[inline]
    pub fn unanswered(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// Whether no request waits: the cheapest look there is.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.memory.load_index::<REQ_PROD>(Ordering::Relaxed) == self.req_cons
    }

    /// How many requests wait: one look at the producer index, with which the slots before it
    /// become readable.
    ///
    /// # Errors
    /// If the index cannot be right. The ring publishes nothing from then on.
    #[inline]
    pub fn waiting(&mut self) -> Result<u32, Runaway> {
        let producer = self.memory.load_index::<REQ_PROD>(Ordering::Acquire);
        let waiting = producer.wrapping_sub(self.req_cons);
        // An index that went backwards is a huge step forwards.
        if waiting > self.slots() - self.unanswered() {
            return Err(self.runaway(producer));
        }
        Ok(waiting)
    }

    #[cold]
    fn runaway(&mut self, producer: u32) -> Runaway {
        self.broken = true;
        Runaway { producer, consumer: self.req_cons, room: self.slots() - self.unanswered() }
    }

    /// Requests taken so far, modulo 2^32.
    #[inline(always)]
    pub(crate) fn taken(&self) -> u32 {
        self.req_cons
    }

    /// The layout of the slots.
    #[inline]
    pub(crate) fn abi(&self) -> Abi {
        self.abi
    }

    /// [`BackRing::head`] of a ring of the 64-bit layout.
    #[inline(always)]
    pub(crate) fn head64(&self) -> Head {
        Abi::X86_64.load_head(&self.memory, self.req_cons)
    }

    /// Copies the head of the next request. The same slot may be looked at again in a later turn
    /// if nothing is kept of this look.
    #[inline]
    pub fn head(&self) -> Head {
        self.abi.load_head(&self.memory, self.req_cons)
    }

    /// The first sector of the request that is so many behind the next one, if it is a plain one. Only a
    /// hint: when the request is taken, its slot may hold another.
    #[inline(always)]
    pub(crate) fn sector(&self, ahead: u32) -> u64 {
        self.abi.load_sector(&self.memory, self.req_cons.wrapping_add(ahead))
    }

    /// Copies the rest of the next request.
    #[inline]
    pub fn tail(&self) -> [u64; 10] {
        self.abi.load_tail(&self.memory, self.req_cons)
    }

    /// Where the request in a slot of the backend's is kept, if at all.
    pub fn entry(&self, slot: u16) -> M::Entry {
        self.memory.entry(slot)
    }

    /// Takes the next request, whose head this is, into the slot of this entry: from now on its place
    /// in the ring may be overwritten by an answer. A slot takes another request only when the answer
    /// to the last one is published. `long`: there is more to it than its head.
    #[inline]
    pub fn take(&mut self, entry: &M::Entry, head: Head, long: bool) {
        if M::KEEPS {
            let tail = if long { Some(self.tail()) } else { None };
            self.memory.keep(entry, self.req_cons, head, tail);
        }
        self.req_cons = self.req_cons.wrapping_add(1);
    }

    /// All that was taken up to now counts as taken also for whoever comes after this backend.
    #[inline]
    pub fn count_taken(&self) {
        self.memory.counted(self.req_cons);
    }

    /// A request that a backend before this one took.
    pub(crate) fn kept_request(&self, entry: &M::Entry) -> (Head, [u64; 10]) {
        self.memory.kept_request(entry)
    }

    /// To be called now and then: see [`RingMemory::forget`]. Looks at all slots after very many
    /// requests only.
    pub(crate) fn forget_published(&mut self) {
        // Nothing is published of a broken ring.
        if !self.broken && self.published.wrapping_sub(self.forgotten) >= FORGET {
            self.memory.forget(self.published);
            self.forgotten = self.published;
        }
    }

    /// Writes the answer to the request of an entry; the frontend does not see it before
    /// [`BackRing::publish`].
    #[inline]
    pub fn respond(&mut self, entry: &M::Entry, response: Response) {
        self.respond_in(self.abi, entry, response);
    }

    /// The same in a ring of the 64-bit layout.
    #[inline(always)]
    pub(crate) fn respond64(&mut self, entry: &M::Entry, response: Response) {
        debug_assert!(self.abi == Abi::X86_64);
        self.respond_in(Abi::X86_64, entry, response);
    }

    #[inline(always)]
    fn respond_in(&mut self, abi: Abi, entry: &M::Entry, response: Response) {
        debug_assert!(self.unanswered() > 0);
        let index = self.rsp_prod;
        self.rsp_prod = index.wrapping_add(1);
        abi.store_response(&self.memory, index, response);
        self.memory.answered(entry, index);
    }

    /// Answers written and not yet published.
    #[inline]
    pub fn unpublished(&self) -> u32 {
        self.rsp_prod.wrapping_sub(self.published)
    }

    /// Publishes all answers. Returns whether the frontend asked to be told.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        self.published = self.rsp_prod;
        if self.broken {
            return false;
        }
        self.memory.publishing(self.rsp_prod);
        self.memory.store_index::<RSP_PROD>(self.rsp_prod, Ordering::Release);
        // Either the frontend sees the answers in its last look, or its wish for an event is seen
        // here: a full fence on both sides.
        fence(Ordering::SeqCst);
        let event = self.memory.load_index::<RSP_EVENT>(Ordering::Relaxed);
        notify(old, self.rsp_prod, event)
    }

    /// The final check before sleep: asks for an event at the next request, then looks once more.
    ///
    /// # Errors
    /// As [`BackRing::waiting`].
    pub fn arm(&mut self) -> Result<HasWork, Runaway> {
        self.memory.store_index::<REQ_EVENT>(self.req_cons.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Ok(if self.waiting()? > 0 { HasWork::Yes } else { HasWork::No })
    }

    /// Asks for no event: an index that the producer has passed already.
    pub fn disarm(&mut self) {
        self.memory.store_index::<REQ_EVENT>(self.req_cons, Ordering::Relaxed);
    }
}

/// Whether whoever moves a producer index from `old` to `new` must send an event to the other side,
/// which asked for one at `event`: iff that lies in (old, new], modulo 2^32.
#[inline]
pub fn notify(old: u32, new: u32, event: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::OKAY;
    use crate::{KeptRing, RegionRing};

    fn ring(abi: Abi, order: u8, start: u32) -> (RegionRing, BackRing<RegionRing>) {
        let region = dma::Region::new(PAGE << order, dma::PageSize::Small).unwrap();
        let m = RegionRing::new(region, 0, order).unwrap();
        m.store32(REQ_PROD, start, Ordering::Relaxed);
        m.store32(RSP_PROD, start, Ordering::Relaxed);
        m.store32(REQ_EVENT, start.wrapping_add(1), Ordering::Relaxed);
        m.store32(RSP_EVENT, start.wrapping_add(1), Ordering::Relaxed);
        let back = BackRing::attach(m.clone(), abi, order).unwrap();
        (m, back)
    }

    #[test]
    fn events_are_sent_for_the_half_open_range() {
        for old in [0u32, 1, 31, u32::MAX - 2, u32::MAX] {
            for step in 0..6u32 {
                let new = old.wrapping_add(step);
                for d in 0..10u32 {
                    let event = old.wrapping_sub(2).wrapping_add(d);
                    let inside = (1..=step).any(|k| old.wrapping_add(k) == event);
                    assert_eq!(notify(old, new, event), inside, "{old} {new} {event}");
                }
            }
        }
        // The frontend's initial event index gives one event for the first push, then none.
        assert!(notify(0, 3, 1));
        assert!(!notify(3, 5, 1));
        // A stale one is crossed again when the indices wrap.
        assert!(notify(u32::MAX, 2, 1));
    }

    #[test]
    fn the_producer_may_fill_the_ring_and_not_more() {
        for start in [0, u32::MAX - 3] {
            let (m, mut b) = ring(Abi::NATIVE, 0, start);
            m.store32(REQ_PROD, start.wrapping_add(32), Ordering::Relaxed);
            assert_eq!(b.waiting(), Ok(32));
            m.store32(REQ_PROD, start.wrapping_add(33), Ordering::Relaxed);
            let e = b.waiting().unwrap_err();
            assert_eq!((e.producer, e.consumer, e.room), (start.wrapping_add(33), start, 32));
            // Backwards.
            m.store32(REQ_PROD, start.wrapping_sub(1), Ordering::Relaxed);
            assert!(b.waiting().is_err());
            // Requests that are taken but not answered still take their slots.
            m.store32(REQ_PROD, start.wrapping_add(10), Ordering::Relaxed);
            for _ in 0..10 {
                b.take(&(), Head::direct(0, 1, 0, 0, 0), false);
            }
            m.store32(REQ_PROD, start.wrapping_add(33), Ordering::Relaxed);
            assert!(b.waiting().is_err());
            b.respond(&(), Response { id: 1, operation: 0, status: OKAY });
            assert_eq!(b.waiting(), Ok(23));
            // Below what was taken already.
            m.store32(REQ_PROD, start.wrapping_add(9), Ordering::Relaxed);
            assert!(b.waiting().is_err());
        }
    }

    #[test]
    fn attach_goes_on_where_responses_end_and_refuses_nonsense() {
        let (m, _) = ring(Abi::NATIVE, 0, 1000);
        m.store32(REQ_PROD, 1005, Ordering::Relaxed);
        let mut b = BackRing::attach(m.clone(), Abi::NATIVE, 0).unwrap();
        assert_eq!(b.waiting(), Ok(5));
        m.store32(REQ_PROD, 1033, Ordering::Relaxed);
        assert!(BackRing::attach(m, Abi::NATIVE, 0).is_err());
    }

    /// A slot that is not used for 2^32 requests does not look as if it was answered just now.
    #[test]
    fn answers_of_long_ago_are_forgotten() {
        let (m, _) = ring(Abi::NATIVE, 0, 0);
        let record = dma::Region::new(2 * PAGE, dma::PageSize::Small).unwrap();
        let kept = || KeptRing::new(m.clone(), record.clone(), Abi::NATIVE, 0, 1);
        let mut b = BackRing::attach(kept(), Abi::NATIVE, 0).unwrap();
        b.take(&b.entry(7), Head::direct(0, 1, 0, 0, 0), false);
        b.count_taken();
        b.respond(&b.entry(7), Response { id: 0, operation: 0, status: OKAY });
        b.publish();
        b.forget_published();
        // As if all other requests were in other slots.
        let mut seen = 1u32;
        while seen != 0 {
            seen = seen.checked_add(1 << 20).unwrap_or(0);
            (b.req_cons, b.rsp_prod) = (seen, seen);
            b.publish();
            b.forget_published();
        }
        b.take(&b.entry(8), Head::direct(0, 1, 0, 0, 0), false);
        b.count_taken();
        b.respond(&b.entry(8), Response { id: 0, operation: 0, status: OKAY });
        b.forget_published();
        let left = kept().kept().unwrap().unwrap();
        assert_eq!((left.req_cons, left.published, left.slots), (1, 0, vec![8]));
    }

    #[test]
    fn answers_wrap_and_are_seen_only_when_published() {
        for abi in Abi::ALL {
            let start = u32::MAX - 40;
            let (m, mut b) = ring(abi, 0, start);
            for i in 0..100u32 {
                let at = start.wrapping_add(i);
                m.store32(REQ_PROD, at.wrapping_add(1), Ordering::Relaxed);
                assert_eq!(b.waiting(), Ok(1));
                b.take(&(), Head::direct(0, 1, 0, 0, 0), false);
                let r = Response { id: u64::from(i) << 40 | 7, operation: 1, status: OKAY };
                b.respond(&(), r);
                assert_eq!(m.load32(RSP_PROD, Ordering::Relaxed), at);
                m.store32(RSP_EVENT, at.wrapping_add(1), Ordering::Relaxed);
                assert!(b.publish(), "the frontend asked for it");
                assert_eq!(m.load32(RSP_PROD, Ordering::Relaxed), at.wrapping_add(1));
                assert_eq!(abi.load_response(&m, at & 31), r);
                assert_eq!(b.unpublished(), 0);
            }
        }
    }

    #[test]
    fn arming_asks_for_the_next_request_and_disarming_for_none() {
        let (m, mut b) = ring(Abi::NATIVE, 0, 0);
        assert_eq!(b.arm(), Ok(HasWork::No));
        assert!(notify(0, 1, m.load32(REQ_EVENT, Ordering::Relaxed)));
        b.disarm();
        assert!(!notify(0, 1, m.load32(REQ_EVENT, Ordering::Relaxed)));
        m.store32(REQ_PROD, 1, Ordering::Relaxed);
        assert_eq!(b.arm(), Ok(HasWork::Yes));
        m.store32(REQ_PROD, 99, Ordering::Relaxed);
        assert!(b.arm().is_err());
    }
}
