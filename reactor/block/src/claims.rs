//! [`Claims`]: keeps read-modify-writes of a device block apart from each other and from whole
//! writes of that block, on every reactor that has a queue to the device.
//!
//! Shared by the reactors' [`crate::RmwQueue`]s; nothing in it waits, and every step is a few atomic
//! operations. Two kinds of users, of very different frequency:
//!
//! - **Whole writes** are common. Each is noted in a word of its own queue's lane, which no other
//!   queue writes, and then looks whether there is any claim at all: one load, nearly always 0.
//! - **Read-modify-writes** are rare. Each takes the claim on its block in the table, and then looks
//!   through all lanes for writes over the block that had begun before.
//!
//! Both first say and then look, in one total order of all these operations (`SeqCst`), so of two
//! that meet at least one sees the other. A whole write that sees a claim takes its note back and
//! tries later; a read-modify-write that sees a write keeps its claim until that has ended. Whoever
//! holds something waits only for writes that the device already has: so there is no deadlock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words of the claim table, a power of two. A claim has one place only, so that two reactors can
/// never both hold one block; another block that belongs at the same place waits for it. With a few
/// dozen claims at a time that hardly happens.
const WORDS: usize = 4096;

/// Whole writes that a queue may have in flight.
pub(crate) const WRITES: usize = 512;

/// Read-modify-writes that a queue may have in flight: two edges for each slot.
pub(crate) const EDGES: usize = 2 * WRITES;

/// A lane's word: 1 bit "in use", 9 bits unit, 14 bits length, 40 bits first block. Numbers that do
/// not fit are cut, or the length said to be endless: then more seems to collide than does.
const FIRST_BITS: u32 = 40;
const LEN_BITS: u32 = 14;
const UNIT_BITS: u32 = 9;
const ENDLESS: u64 = (1 << LEN_BITS) - 1;
const IN_USE: u64 = 1 << 63;

const fn low(bits: u32) -> u64 {
    (1 << bits) - 1
}

/// A word that says which blocks a write covers.
fn note(unit: u16, first: u64, len: u64) -> u64 {
    let unit = u64::from(unit) & low(UNIT_BITS);
    IN_USE
        | unit << (FIRST_BITS + LEN_BITS)
        | len.min(ENDLESS) << FIRST_BITS
        | first & low(FIRST_BITS)
}

/// Whether a noted write may cover a block.
fn covers(word: u64, unit: u16, block: u64) -> bool {
    let len = word >> FIRST_BITS & low(LEN_BITS);
    word & IN_USE != 0
        && word >> (FIRST_BITS + LEN_BITS) & low(UNIT_BITS) == u64::from(unit) & low(UNIT_BITS)
        && (len == ENDLESS || block.wrapping_sub(word) & low(FIRST_BITS) < len)
}

/// A claim: 1 bit "in use", 15 bits unit, 48 bits block.
const BLOCK_BITS: u32 = 48;

fn claim_word(unit: u16, block: u64) -> u64 {
    IN_USE | (u64::from(unit) & low(15)) << BLOCK_BITS | block & low(BLOCK_BITS)
}

/// Where a claim belongs in the table.
fn place(word: u64) -> usize {
    (word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - WORDS.trailing_zeros())) as usize
}

/// The claims on one device's blocks. Made once per device and given to the queue of each reactor.
#[derive(Debug)]
pub struct Claims {
    /// Claims held or being taken.
    active: AtomicU64,
    table: Box<[AtomicU64]>,
    lanes: Box<[LaneWords]>,
    /// One bit per lane that has a queue.
    joined: AtomicU64,
}

/// What one queue writes and the others only read.
#[derive(Debug)]
#[repr(align(128))]
struct LaneWords([AtomicU64; WRITES]);

impl Claims {
    /// For at most `queues` queues at a time, up to 64.
    pub fn new(queues: usize) -> Arc<Claims> {
        assert!(queues <= 64, "at most 64 queues share a device");
        Arc::new(Claims {
            active: AtomicU64::new(0),
            table: (0..WORDS).map(|_| AtomicU64::new(0)).collect(),
            lanes: (0..queues).map(|_| LaneWords([const { AtomicU64::new(0) }; WRITES])).collect(),
            joined: AtomicU64::new(0),
        })
    }

    /// Joins as one more queue; `None` if there are as many as may be.
    pub(crate) fn join(self: &Arc<Claims>) -> Option<Lane> {
        for index in 0..self.lanes.len() {
            if self.joined.fetch_or(1 << index, Ordering::AcqRel) & 1 << index == 0 {
                let held = vec![None; EDGES].into_boxed_slice();
                return Some(Lane { claims: self.clone(), index, held });
            }
        }
        None
    }

    /// Whether a claim on one of `[first, first + len)` is held.
    #[cold]
    fn claimed(&self, unit: u16, first: u64, len: u64) -> bool {
        if len >= WORDS as u64 {
            let unit = claim_word(unit, 0) >> BLOCK_BITS;
            return self.table.iter().any(|word| {
                let word = word.load(Ordering::SeqCst);
                word >> BLOCK_BITS == unit && word.wrapping_sub(first) & low(BLOCK_BITS) < len
            });
        }
        (first..first + len).any(|block| {
            let word = claim_word(unit, block);
            self.table[place(word)].load(Ordering::SeqCst) == word
        })
    }
}

/// One queue's part in the claims. Dropping it gives back whatever it holds.
#[derive(Debug)]
pub(crate) struct Lane {
    claims: Arc<Claims>,
    index: usize,
    /// Places in the table that this queue's edges hold.
    held: Box<[Option<u16>]>,
}

impl Lane {
    /// The claims that it is a part of.
    pub(crate) fn claims(&self) -> &Arc<Claims> {
        &self.claims
    }

    fn words(&self) -> &[AtomicU64; WRITES] {
        &self.claims.lanes[self.index].0
    }

    /// Notes a write of whole blocks, unless one of them is claimed. The write may go to the device
    /// if this returns `true`; then [`Lane::end_write`] must follow when it is done.
    #[inline]
    pub(crate) fn begin_write(&self, slot: usize, unit: u16, first: u64, len: u64) -> bool {
        // A swap and not a store: it is also the barrier between saying and looking.
        self.words()[slot].swap(note(unit, first, len), Ordering::SeqCst);
        if self.claims.active.load(Ordering::SeqCst) == 0 || !self.claims.claimed(unit, first, len)
        {
            return true;
        }
        self.end_write(slot);
        false
    }

    /// The write is done.
    #[inline]
    pub(crate) fn end_write(&self, slot: usize) {
        self.words()[slot].store(0, Ordering::Release);
    }

    /// Takes the claim on a block for `edge`, unless its place is taken.
    pub(crate) fn claim(&mut self, edge: usize, unit: u16, block: u64) -> bool {
        debug_assert!(self.held[edge].is_none());
        let word = claim_word(unit, block);
        let at = place(word);
        let table = &self.claims.table;
        if table[at].load(Ordering::Relaxed) != 0 {
            return false;
        }
        self.claims.active.fetch_add(1, Ordering::SeqCst);
        let taken = table[at].compare_exchange(0, word, Ordering::SeqCst, Ordering::Relaxed);
        if taken.is_err() {
            self.claims.active.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        self.held[edge] = Some(at as u16);
        true
    }

    /// Whether no write of any queue covers the block. Once true it stays so while the claim on the
    /// block is held.
    pub(crate) fn clear(&self, unit: u16, block: u64) -> bool {
        let mut joined = self.claims.joined.load(Ordering::SeqCst);
        while joined != 0 {
            let lane = &self.claims.lanes[joined.trailing_zeros() as usize];
            if lane.0.iter().any(|w| covers(w.load(Ordering::SeqCst), unit, block)) {
                return false;
            }
            joined &= joined - 1;
        }
        true
    }

    /// Gives an edge's claim back.
    pub(crate) fn release(&mut self, edge: usize) {
        if let Some(at) = self.held[edge].take() {
            self.claims.table[usize::from(at)].store(0, Ordering::SeqCst);
            self.claims.active.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        for edge in 0..EDGES {
            self.release(edge);
        }
        for slot in 0..WRITES {
            self.end_write(slot);
        }
        self.claims.joined.fetch_and(!(1 << self.index), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_cover_what_they_say() {
        let w = note(3, 100, 8);
        assert!(covers(w, 3, 100) && covers(w, 3, 107));
        assert!(!covers(w, 3, 99) && !covers(w, 3, 108) && !covers(w, 4, 100));
        assert!(!covers(0, 0, 0));
        // What does not fit may cover more, never less.
        assert!(covers(note(0, 5, 1 << 30), 0, 5 + (1 << 29)));
        let far = (1 << 51) - 1;
        assert!(covers(note(600, far, 2), 600, far) && covers(note(600, far, 2), 600, far + 1));
        assert!(!covers(note(600, far, 2), 600, far - 1));
    }

    #[test]
    fn claims_and_writes_exclude_each_other() {
        let claims = Claims::new(2);
        let (mut a, mut b) = (claims.join().unwrap(), claims.join().unwrap());
        assert!(claims.join().is_none());
        assert!(a.claim(0, 1, 7));
        assert!(!b.claim(0, 1, 7));
        assert!(b.claim(1, 2, 7), "another unit");
        // Two writes may cover one block; neither may start over a claim, nor a claim be used.
        assert!(!b.begin_write(0, 1, 0, 8) && !b.begin_write(0, 1, 0, 1 << 20));
        assert!(b.begin_write(0, 1, 8, 100) && a.begin_write(3, 1, 8, 1));
        assert!(a.clear(1, 7) && !a.clear(1, 8) && !a.clear(1, 107) && a.clear(1, 108));
        b.end_write(0);
        assert!(!a.clear(1, 8) && a.clear(1, 9));
        a.release(0);
        assert!(b.claim(0, 1, 7));
        drop(b);
        assert!(a.claim(0, 1, 7), "a queue that goes gives its claims back");
        assert!(claims.join().is_some());
        drop(a);
        assert_eq!(claims.active.load(Ordering::Relaxed), 0);
    }

    /// A write and a read-modify-write of one block, by two threads that both say and then look: if
    /// one of them could look before it has been heard, both would be inside now and then.
    #[test]
    fn of_two_that_meet_one_sees_the_other() {
        const ROUNDS: u64 = 100_000;
        let claims = Claims::new(2);
        // The writer's lane is the first that is looked through, so that the look comes soon.
        let (b, mut a) = (claims.join().unwrap(), claims.join().unwrap());
        let (inside, met) = (AtomicU64::new(0), AtomicU64::new(0));
        let rounds = [AtomicU64::new(0), AtomicU64::new(0)];
        // Both begin a round at the same moment, give or take a few instructions.
        let begin = |me: usize, round: u64| {
            rounds[me].store(round, Ordering::SeqCst);
            for tries in 0u64.. {
                if rounds[1 - me].load(Ordering::SeqCst) >= round {
                    break;
                }
                if tries > 1000 {
                    std::thread::yield_now();
                }
            }
            for i in 0..round / (1 + me as u64) % 40 {
                std::hint::black_box(i);
            }
        };
        let enter = |who: u64| {
            let others = inside.fetch_or(who, Ordering::SeqCst);
            met.fetch_add(u64::from(others != 0), Ordering::Relaxed);
            // Long enough for the other to end its look through the lanes.
            (0..20).for_each(|_| std::hint::spin_loop());
            inside.fetch_and(!who, Ordering::SeqCst);
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    begin(0, round);
                    if b.begin_write(0, 0, 5, 1) {
                        enter(1);
                        b.end_write(0);
                    }
                }
            });
            scope.spawn(|| {
                for round in 1..=ROUNDS {
                    begin(1, round);
                    if a.claim(0, 0, 5) {
                        if a.clear(0, 5) {
                            enter(2);
                        }
                        a.release(0);
                    }
                }
            });
        });
        assert_eq!(met.load(Ordering::Relaxed), 0);
    }
}
