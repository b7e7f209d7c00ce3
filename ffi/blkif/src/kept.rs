//! [`KeptRing`]: a ring beside which its backend notes what it does, in memory that outlives it.
//!
//! Responses overwrite the slots of other requests, so the ring alone does not say which requests a
//! backend that died had taken and not answered. Here each is copied into a record when it is taken,
//! and the record says by which response it was answered. The indices stand there, too: what the ring
//! says of them is the guest's word.
//!
//! Order of the stores, of one thread: a record is whole before `req_cons` counts it; a response is in
//! its slot before `published` counts it, and that before the guest sees it. Whoever comes next
//! publishes once more what was counted, and takes up each request that has no published response.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dma::Region;

use crate::RingMemory;
use crate::abi::{Abi, Head};

/// Bytes of the head and of a record.
const HEAD: usize = 64;
const RECORD: usize = 128;

const MAGIC: u64 = 0x676e_6972_6465_7074;
const AT_IDENTITY: usize = 8;
const AT_SLOTS: usize = 16;
const AT_REQ_CONS: usize = 20;
const AT_PUBLISHED: usize = 24;

// Within a record, behind the request's head, whose words are those of the 64-bit layout.
const AT_TAIL: usize = 32;
const AT_REQUEST_INDEX: usize = 112;
const AT_RESPONSE_INDEX: usize = 116;
const AT_STATE: usize = 120;

const FREE: u32 = 0;
const TAKEN: u32 = 1;
const ANSWERED: u32 = 2;

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
#[derive(Clone, Debug)]
pub struct KeptRing<M> {
    ring: M,
    record: Arc<Region>,
    slots: u32,
}

impl<M: RingMemory> KeptRing<M> {
    /// How much memory a record needs, in bytes.
    pub fn record_bytes(abi: Abi, order: u8) -> usize {
        HEAD + RECORD * abi.slots(order) as usize
    }

    /// Whether a record is that of this very ring: `identity` tells rings apart (its grants and port).
    pub fn is_of(record: &Region, abi: Abi, order: u8, identity: u64) -> bool {
        record.load64(0, Ordering::Acquire) == MAGIC
            && record.load64(AT_IDENTITY, Ordering::Relaxed) == identity
            && record.load32(AT_SLOTS, Ordering::Relaxed) == abi.slots(order)
    }

    /// A ring with its record, which is begun anew if it is another's: see [`KeptRing::is_of`].
    pub fn new(ring: M, record: Arc<Region>, abi: Abi, order: u8, identity: u64) -> KeptRing<M> {
        let kept = KeptRing { ring, record, slots: abi.slots(order) };
        assert!(kept.record.len() >= KeptRing::<M>::record_bytes(abi, order), "a record's memory");
        let r = &kept.record;
        if !KeptRing::<M>::is_of(r, abi, order, identity) {
            r.store64(0, 0, Ordering::Release);
            let start = kept.ring.load32(crate::abi::RSP_PROD, Ordering::Acquire);
            r.store64(AT_IDENTITY, identity, Ordering::Relaxed);
            r.store32(AT_SLOTS, kept.slots, Ordering::Relaxed);
            r.store32(AT_REQ_CONS, start, Ordering::Relaxed);
            r.store32(AT_PUBLISHED, start, Ordering::Relaxed);
            for slot in 0..kept.slots {
                r.store32(place(slot as u16) + AT_STATE, FREE, Ordering::Relaxed);
            }
            r.store64(0, MAGIC, Ordering::Release);
        }
        kept
    }

    fn state(&self, slot: u16) -> u32 {
        self.record.load32(place(slot) + AT_STATE, Ordering::Acquire)
    }
}

fn place(slot: u16) -> usize {
    HEAD + RECORD * usize::from(slot)
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

    #[inline]
    fn keep(&self, slot: u16, index: u32, head: Head, tail: Option<[u64; 10]>) {
        let to = place(slot);
        let Head { first, id, sector, word } = head;
        self.record.write_words(to, &[u64::from(first), id, sector, word]);
        if let Some(tail) = tail {
            self.record.write_words(to + AT_TAIL, &tail);
        }
        self.record.store32(to + AT_REQUEST_INDEX, index, Ordering::Relaxed);
        self.record.store32(to + AT_STATE, TAKEN, Ordering::Release);
        self.record.store32(AT_REQ_CONS, index.wrapping_add(1), Ordering::Release);
    }

    #[inline]
    fn answered(&self, slot: u16, index: u32) {
        let to = place(slot);
        self.record.store32(to + AT_RESPONSE_INDEX, index, Ordering::Relaxed);
        self.record.store32(to + AT_STATE, ANSWERED, Ordering::Release);
    }

    #[inline]
    fn publishing(&self, index: u32) {
        self.record.store32(AT_PUBLISHED, index, Ordering::Release);
    }

    fn kept(&self) -> Result<Option<Kept>, &'static str> {
        let req_cons = self.record.load32(AT_REQ_CONS, Ordering::Acquire);
        let published = self.record.load32(AT_PUBLISHED, Ordering::Acquire);
        let number = |slot: u16, at: usize| self.record.load32(place(slot) + at, Ordering::Relaxed);
        let open = |&slot: &u16| match self.state(slot) {
            // One that is not counted is still in the ring.
            TAKEN => number(slot, AT_REQUEST_INDEX) != req_cons,
            ANSWERED => number(slot, AT_RESPONSE_INDEX).wrapping_sub(published) < self.slots,
            _ => false,
        };
        let mut slots: Vec<u16> = (0..self.slots as u16).filter(open).collect();
        slots.sort_by_key(|&slot| number(slot, AT_REQUEST_INDEX).wrapping_sub(published));
        if slots.len() as u32 != req_cons.wrapping_sub(published) {
            return Err("the record of a ring contradicts itself");
        }
        for slot in 0..self.slots as u16 {
            // An answer that nobody saw is none: its index will be another's. So will that of a request
            // that was not counted, in whatever slot it is taken next.
            let state = if slots.contains(&slot) { TAKEN } else { FREE };
            self.record.store32(place(slot) + AT_STATE, state, Ordering::Release);
        }
        Ok(Some(Kept { req_cons, published, slots }))
    }

    fn kept_request(&self, slot: u16) -> (Head, [u64; 10]) {
        let at = place(slot);
        let [first, id, sector, word] = self.record.read_words(at);
        (Head { first: first as u32, id, sector, word }, self.record.read_words(at + AT_TAIL))
    }
}
