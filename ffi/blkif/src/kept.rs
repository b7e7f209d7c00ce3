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
use std::sync::atomic::Ordering;

use dma::{Entries, Entry, Region};

use crate::RingMemory;
use crate::abi::{Abi, Head, RSP_PROD};

/// Bytes of the head, and of what stands behind it for each slot.
const HEAD: usize = 64;
const ENTRY: usize = 128;

const MAGIC: u64 = 0x676e_6972_6465_7076;
const AT_IDENTITY: usize = 8;
const AT_SLOTS: usize = 16;
const AT_REQ_CONS: usize = 20;
const AT_PUBLISHED: usize = 24;

// In an entry: the four words of a request's head, which are those of the 64-bit layout, with its index
// in the upper half of the first; its state; the index of its answer; and the rest of the request.
const AT_INDEX: usize = 4;
const AT_ID: usize = 8;
const AT_SEGMENT: usize = 24;
const AT_STATE: usize = 32;
const AT_ANSWER: usize = 36;
const AT_TAIL: usize = 40;

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
#[derive(Debug)]
pub struct KeptRing<M> {
    ring: M,
    record: Arc<Region>,
    /// What stands before the entries, as one entry.
    head: Entries<HEAD>,
    entries: Entries<ENTRY>,
}

impl<M: RingMemory> KeptRing<M> {
    /// How much memory a record needs, in bytes.
    pub fn record_bytes(abi: Abi, order: u8) -> usize {
        HEAD + ENTRY * abi.slots(order) as usize
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
        let entries = Entries::new(record.clone(), HEAD, slots);
        let head = Entries::new(record.clone(), 0, 1);
        let kept = KeptRing { ring, record, head, entries };
        let r = &kept.record;
        if !KeptRing::<M>::is_of(r, abi, order, identity) {
            r.store64(0, 0, Ordering::Release);
            let start = kept.ring.load_index::<RSP_PROD>(Ordering::Acquire);
            r.store64(AT_IDENTITY, identity, Ordering::Relaxed);
            r.store32(AT_SLOTS, slots, Ordering::Relaxed);
            r.store32(AT_REQ_CONS, start, Ordering::Relaxed);
            r.store32(AT_PUBLISHED, start, Ordering::Relaxed);
            (0..slots).for_each(|slot| set_state(kept.entries.at(slot), FREE));
            r.store64(0, MAGIC, Ordering::Release);
        }
        kept
    }
}

/// After all that was written before, also for whoever finds it half done.
#[inline(always)]
fn set_state(entry: Entry<'_, ENTRY>, state: u32) {
    entry.store32::<AT_STATE>(state, Ordering::Release);
}

impl<M: RingMemory> RingMemory for KeptRing<M> {
    const KEEPS: bool = true;

    type Entry = Entries<ENTRY>;

    /// # Panics
    /// If the record is of a shorter ring.
    fn entry(&self, slot: u16) -> Entries<ENTRY> {
        assert!(u32::from(slot) <= self.entries.mask(), "an entry for each slot");
        // One alone, at its own place: an access to it needs no index.
        Entries::new(self.record.clone(), HEAD + ENTRY * usize::from(slot), 1)
    }

    #[inline]
    fn bytes(&self) -> usize {
        self.ring.bytes()
    }

    #[inline]
    fn mask(&self) -> u32 {
        self.ring.mask()
    }

    #[inline(always)]
    fn load_slot<const N: usize>(&self, index: u32) -> [u64; N] {
        self.ring.load_slot(index)
    }

    #[inline(always)]
    fn store_slot<const N: usize>(&self, index: u32, words: &[u64; N]) {
        self.ring.store_slot(index, words);
    }

    #[inline]
    fn load32(&self, offset: usize, order: Ordering) -> u32 {
        self.ring.load32(offset, order)
    }

    #[inline]
    fn store32(&self, offset: usize, value: u32, order: Ordering) {
        self.ring.store32(offset, value, order);
    }

    #[inline(always)]
    fn load_index<const AT: usize>(&self, order: Ordering) -> u32 {
        self.ring.load_index::<AT>(order)
    }

    #[inline(always)]
    fn store_index<const AT: usize>(&self, value: u32, order: Ordering) {
        self.ring.store_index::<AT>(value, order);
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
    fn keep(&self, entry: &Entries<ENTRY>, index: u32, head: Head, tail: Option<[u64; 10]>) {
        let Head { first, id, sector, word } = head;
        let entry = entry.at(0);
        // By halves: cheaper than to put them together.
        entry.store32::<0>(first, Ordering::Relaxed);
        entry.store32::<AT_INDEX>(index, Ordering::Relaxed);
        entry.write_words_at::<AT_ID, 3>(&[id, sector, word]);
        if let Some(tail) = tail {
            entry.write_words_at::<AT_TAIL, 10>(&tail);
        }
        set_state(entry, TAKEN);
    }

    #[inline]
    fn counted(&self, index: u32) {
        self.head.at(0).store32::<AT_REQ_CONS>(index, Ordering::Release);
    }

    #[inline(always)]
    fn answered(&self, entry: &Entries<ENTRY>, index: u32) {
        // The state last: without it this is not answered, whatever else there is. Before the answer is
        // counted by `publishing` it is taken for none anyhow.
        entry.at(0).store32::<AT_ANSWER>(index, Ordering::Relaxed);
        set_state(entry.at(0), ANSWERED);
    }

    #[inline]
    fn publishing(&self, index: u32) {
        self.head.at(0).store32::<AT_PUBLISHED>(index, Ordering::Release);
    }

    fn forget(&self, published: u32) {
        for slot in 0..=self.entries.mask() as u16 {
            let entry = self.entries.at(slot.into());
            let answer = entry.load32::<AT_ANSWER>(Ordering::Relaxed);
            let seen = answer.wrapping_sub(published) > self.entries.mask();
            if seen && entry.load32::<AT_STATE>(Ordering::Relaxed) == ANSWERED {
                set_state(entry, FREE);
            }
        }
    }

    fn kept(&self) -> Result<Option<Kept>, &'static str> {
        let req_cons = self.record.load32(AT_REQ_CONS, Ordering::Acquire);
        let published = self.record.load32(AT_PUBLISHED, Ordering::Acquire);
        let entry = |slot: u16| self.entries.at(slot.into());
        let index = |slot: u16| entry(slot).load32::<AT_INDEX>(Ordering::Relaxed);
        let near = |ahead: u32| ahead <= self.entries.mask();
        let open = |&slot: &u16| match entry(slot).load32::<AT_STATE>(Ordering::Acquire) {
            // Others may have overtaken it, any number of them: only one that is not counted is near.
            TAKEN => !near(index(slot).wrapping_sub(req_cons)),
            ANSWERED => {
                let answer = entry(slot).load32::<AT_ANSWER>(Ordering::Relaxed);
                near(answer.wrapping_sub(published))
            }
            _ => false,
        };
        let all = 0..=self.entries.mask() as u16;
        let mut slots: Vec<u16> = all.clone().filter(open).collect();
        slots.sort_by_key(|&slot| index(slot).wrapping_sub(req_cons));
        if slots.len() as u32 != req_cons.wrapping_sub(published) {
            return Err("the record of a ring contradicts itself");
        }
        for slot in all {
            // An answer that nobody saw is none: its index will be another's. So will that of a request
            // that was not counted, in whatever slot it is taken next.
            set_state(entry(slot), if slots.contains(&slot) { TAKEN } else { FREE });
        }
        Ok(Some(Kept { req_cons, published, slots }))
    }

    fn kept_request(&self, entry: &Entries<ENTRY>) -> (Head, [u64; 10]) {
        let [first, id, sector, word] = entry.at(0).read_words();
        let head = Head { first: first as u32, id, sector, word };
        (head, entry.at(0).read_words_at::<AT_TAIL, 10>())
    }

    #[inline(always)]
    fn kept_id(entry: &Entries<ENTRY>) -> u64 {
        entry.at(0).read_words_at::<AT_ID, 1>()[0]
    }

    #[inline(always)]
    fn kept_segment(entry: &Entries<ENTRY>) -> u64 {
        entry.at(0).read_words_at::<AT_SEGMENT, 1>()[0]
    }
}
