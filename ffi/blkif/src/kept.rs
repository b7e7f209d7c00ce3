//! [`KeptRing`]: a ring beside which its backend notes what it does, in memory that outlives it.
//!
//! Responses overwrite the slots of other requests, so the ring alone does not say which requests a
//! backend that died had taken and not answered. Here each is copied into a record when it is taken,
//! and the record says by which response it was answered. The indices stand there, too: what the ring
//! says of them is the guest's word.
//!
//! Order of the stores, of one thread: records are whole before `req_cons` counts them, once for all
//! that are taken in a row, and that is before any of them is answered; a response is in its slot before
//! `published` counts it, and that before the guest sees it. Whoever comes next publishes once more what
//! was counted, and takes up each request that was counted and has no published response; those that
//! were not are still in the ring.

use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use dma::{Entries, Region};

use crate::RingMemory;
use crate::abi::{Abi, Head};

/// Bytes of the head, of what stands in `Answers`, and in `Requests`.
const HEAD: usize = 64;
const ANSWER: usize = 8;
const REQUEST: usize = 128;

const MAGIC: u64 = 0x676e_6972_6465_7075;
const AT_IDENTITY: usize = 8;
const AT_SLOTS: usize = 16;
const AT_REQ_CONS: usize = 20;
const AT_PUBLISHED: usize = 24;

/// Behind the four words of a request's head, which are those of the 64-bit layout. Its index is in the
/// upper half of the first.
const AT_TAIL: usize = 32;

// The upper half of an answer's word. Below `ANSWERED` is the index of the response.
const FREE: u64 = 0;
const TAKEN: u64 = 1;
const ANSWERED: u64 = 2;

/// What a backend that is gone has left.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kept {
    /// Requests taken so far.
    pub req_cons: u32,
    /// Responses published so far.
    pub published: u32,
    /// The slots of requests without a published response, oldest request first.
    pub slots: Vec<u16>,
}

/// See the module's text.
#[derive(Debug)]
pub struct KeptRing<M> {
    ring: M,
    record: Arc<Region>,
    answers: Entries<ANSWER>,
    requests: Entries<REQUEST>,
    slots: u32,
}

impl<M: RingMemory> KeptRing<M> {
    /// How much memory a record needs, in bytes.
    pub fn record_bytes(abi: Abi, order: u8) -> usize {
        HEAD + (ANSWER + REQUEST) * abi.slots(order) as usize
    }

    /// Whether a record is that of this very ring: `identity` tells rings apart (its grants and port).
    pub fn is_of(record: &Region, abi: Abi, order: u8, identity: u64) -> bool {
        record.load64(0, Ordering::Acquire) == MAGIC
            && record.load64(AT_IDENTITY, Ordering::Relaxed) == identity
            && record.load32(AT_SLOTS, Ordering::Relaxed) == abi.slots(order)
    }

    /// A ring with its record, which is begun anew if it is another's: see [`KeptRing::is_of`].
    ///
    /// # Panics
    /// If the record is shorter than [`KeptRing::record_bytes`].
    pub fn new(ring: M, record: Arc<Region>, abi: Abi, order: u8, identity: u64) -> KeptRing<M> {
        let slots = abi.slots(order);
        let answers = Entries::new(record.clone(), HEAD, slots);
        let requests = Entries::new(record.clone(), requests_at(slots), slots);
        let kept = KeptRing { ring, record, answers, requests, slots };
        let r = &kept.record;
        if !KeptRing::<M>::is_of(r, abi, order, identity) {
            r.store64(0, 0, Ordering::Release);
            let start = kept.ring.load32(crate::abi::RSP_PROD, Ordering::Acquire);
            r.store64(AT_IDENTITY, identity, Ordering::Relaxed);
            r.store32(AT_SLOTS, kept.slots, Ordering::Relaxed);
            r.store32(AT_REQ_CONS, start, Ordering::Relaxed);
            r.store32(AT_PUBLISHED, start, Ordering::Relaxed);
            (0..slots).for_each(|slot| kept.answers.write_words(slot, &[FREE]));
            r.store64(0, MAGIC, Ordering::Release);
        }
        kept
    }

    fn place(&self, slot: u16) -> usize {
        requests_at(self.slots) + REQUEST * usize::from(slot)
    }
}

fn requests_at(slots: u32) -> usize {
    HEAD + ANSWER * slots as usize
}

impl<M: RingMemory> RingMemory for KeptRing<M> {
    const KEEPS: bool = true;

    #[inline]
    fn bytes(&self) -> usize {
        self.ring.bytes()
    }

    #[inline]
    fn load32(&self, offset: usize, order: Ordering) -> u32 {
        self.ring.load32(offset, order)
    }

    #[inline]
    fn store32(&self, offset: usize, value: u32, order: Ordering) {
        self.ring.store32(offset, value, order);
    }

    #[inline]
    fn load64s<const N: usize>(&self, offset: usize) -> [u64; N] {
        self.ring.load64s(offset)
    }

    #[inline]
    fn store64s<const N: usize>(&self, offset: usize, words: &[u64; N]) {
        self.ring.store64s(offset, words);
    }

    #[inline(always)]
    fn keep(&self, slot: u16, index: u32, head: Head, tail: Option<[u64; 10]>) {
        let Head { first, id, sector, word } = head;
        let first = u64::from(first) | u64::from(index) << 32;
        self.requests.write_words(slot.into(), &[first, id, sector, word]);
        if let Some(tail) = tail {
            self.record.write_words(self.place(slot) + AT_TAIL, &tail);
        }
        // In this order also for whoever finds it half done.
        compiler_fence(Ordering::Release);
        self.answers.write_words(slot.into(), &[TAKEN << 32]);
    }

    #[inline]
    fn counted(&self, index: u32) {
        self.record.store32(AT_REQ_CONS, index, Ordering::Release);
    }

    #[inline(always)]
    fn answered(&self, slot: u16, index: u32) {
        self.answers.write_words(slot.into(), &[ANSWERED << 32 | u64::from(index)]);
    }

    #[inline]
    fn publishing(&self, index: u32) {
        self.record.store32(AT_PUBLISHED, index, Ordering::Release);
    }

    fn kept(&self) -> Result<Option<Kept>, &'static str> {
        let req_cons = self.record.load32(AT_REQ_CONS, Ordering::Acquire);
        let published = self.record.load32(AT_PUBLISHED, Ordering::Acquire);
        let index = |slot: u16| {
            let [first] = self.record.read_words(self.place(slot));
            (first >> 32) as u32
        };
        let open = |&slot: &u16| {
            let [answer] = self.record.read_words(HEAD + ANSWER * usize::from(slot));
            match answer >> 32 {
                TAKEN => req_cons.wrapping_sub(1).wrapping_sub(index(slot)) < self.slots,
                ANSWERED => (answer as u32).wrapping_sub(published) < self.slots,
                _ => false,
            }
        };
        let mut slots: Vec<u16> = (0..self.slots as u16).filter(open).collect();
        slots.sort_by_key(|&slot| index(slot).wrapping_sub(published));
        if slots.len() as u32 != req_cons.wrapping_sub(published) {
            return Err("the record of a ring contradicts itself");
        }
        for slot in 0..self.slots as u16 {
            // An answer that nobody saw is none: its index will be another's. So will that of a request
            // that was not counted, in whatever slot it is taken next.
            let state = if slots.contains(&slot) { TAKEN } else { FREE };
            self.answers.write_words(slot.into(), &[state << 32]);
        }
        Ok(Some(Kept { req_cons, published, slots }))
    }

    fn kept_request(&self, slot: u16) -> (Head, [u64; 10]) {
        let at = self.place(slot);
        let [first, id, sector, word] = self.record.read_words(at);
        (Head { first: first as u32, id, sector, word }, self.record.read_words(at + AT_TAIL))
    }
}
