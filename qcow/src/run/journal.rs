//! [`Journal`]: which L2 entries a running image has changed that are not durable yet, in memory that
//! outlives the process.
//!
//! A guest's write is answered when its data is on the device; the entry that maps it goes there with a
//! batch, later. If the process dies in between and the guest does not, the guest has an answer to a
//! write that the image on disk does not know of. Whoever opens the image next has
//! [`crate::edit::redo`] put these entries in.
//!
//! Two halves: entries of a batch that is being written, and those that came after it was sealed.
//! When the batch has ended its half is empty again. Written by the image's home reactor alone; read
//! when it is gone.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dma::Region;

use crate::format::RawL2;

/// A changed entry: the guest cluster's number, and what its L2 entry is now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The guest cluster.
    pub cluster: u64,
    /// The entry's word.
    pub word: u64,
    /// Its second word, where entries are extended; else 0.
    pub bitmap: u64,
}

/// What a process that died has left of an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Changes {
    /// As it was given to [`Journal::new`]; 0 if another file was put in front since.
    pub owner: u64,
    /// Tells the image from what it becomes if others change it: see [`crate::edit::redo`].
    pub(crate) shape: u64,
    /// The changed entries, oldest first.
    pub list: Vec<Change>,
}

/// Bytes of the head, and of an entry.
const HEAD: usize = 64;
const ENTRY: usize = 32;

/// `HEAD` holds: this, then whether changes were lost, the halves' counts, which of them is the later
/// one, and to whom and to which image all of it belongs.
const MAGIC: u64 = 0x6c61_6e72_756f_6a71;
const AT_LOST: usize = 8;
const AT_COUNTS: usize = 16;
const AT_ACTIVE: usize = 32;
const AT_OWNER: usize = 40;
const AT_SHAPE: usize = 48;

/// See the module's text.
#[derive(Debug)]
pub struct Journal {
    region: Arc<Region>,
    /// Entries of a half.
    room: u64,
    active: usize,
    counts: [u64; 2],
    /// By half: changes did not fit into it.
    lost: [bool; 2],
    /// Where the active half stood when a batch was sealed that follows one that failed: that batch
    /// has both halves.
    both: Option<(u64, bool)>,
}

impl Journal {
    /// An empty one, in memory of at least a page that others may map. `owner` says whose it is, to
    /// whoever reads it.
    pub fn new(region: Arc<Region>, owner: u64) -> Journal {
        let room = ((region.len() - HEAD) / ENTRY / 2) as u64;
        let journal =
            Journal { region, room, active: 0, counts: [0; 2], lost: [false; 2], both: None };
        journal.region.store64(0, 0, Ordering::Release);
        for at in [AT_LOST, AT_COUNTS, AT_COUNTS + 8, AT_ACTIVE, AT_SHAPE] {
            journal.region.store64(at, 0, Ordering::Relaxed);
        }
        journal.region.store64(AT_OWNER, owner, Ordering::Relaxed);
        journal.region.store64(0, MAGIC, Ordering::Release);
        journal
    }

    /// What a process that died has left. `None` if some of it did not fit, or this is none.
    pub fn read(region: &Region) -> Option<Changes> {
        if region.load64(0, Ordering::Acquire) != MAGIC
            || region.load64(AT_LOST, Ordering::Acquire) != 0
        {
            return None;
        }
        let room = ((region.len() - HEAD) / ENTRY / 2) as u64;
        let active = region.load64(AT_ACTIVE, Ordering::Acquire) as usize & 1;
        let mut list = Vec::new();
        for half in [1 - active, active] {
            let count = region.load64(AT_COUNTS + 8 * half, Ordering::Acquire);
            if count > room {
                return None;
            }
            for n in 0..count {
                let [cluster, word, bitmap] = region.read_words(place(room, half, n));
                list.push(Change { cluster, word, bitmap });
            }
        }
        let [owner, shape] = [AT_OWNER, AT_SHAPE].map(|at| region.load64(at, Ordering::Acquire));
        Some(Changes { owner, shape, list })
    }

    /// Says for which image the entries are. While it is empty.
    pub(super) fn bind(&mut self, shape: u64) {
        self.region.store64(AT_SHAPE, shape, Ordering::Release);
    }

    /// Says whose it is from now on. 0: the image lies in another file, and only its shape tells it from
    /// others.
    pub(super) fn own(&mut self, owner: u64) {
        self.region.store64(AT_OWNER, owner, Ordering::Release);
    }

    /// Whose a journal is, whatever stands in it. `None` if this is none.
    pub fn owner(region: &Region) -> Option<u64> {
        (region.load64(0, Ordering::Acquire) == MAGIC)
            .then(|| region.load64(AT_OWNER, Ordering::Acquire))
    }

    /// An entry has changed.
    pub(super) fn push(&mut self, cluster: u64, raw: RawL2) {
        let n = self.counts[self.active];
        if n == self.room {
            self.lost[self.active] = true;
            return self.tell_lost();
        }
        let at = place(self.room, self.active, n);
        self.region.write_words(at, &[cluster, raw.word, raw.bitmap]);
        self.set_count(self.active, n + 1);
    }

    /// Whether a batch should be written for it.
    pub(super) fn is_much(&self) -> bool {
        self.counts[self.active] > self.room / 2
    }

    /// A batch begins: what was pushed until now belongs to it.
    pub(super) fn seal(&mut self) {
        if self.counts[1 - self.active] == 0 {
            self.both = None;
            self.active = 1 - self.active;
            self.region.store64(AT_ACTIVE, self.active as u64, Ordering::Release);
        } else {
            // After a batch that failed its half is not empty, and the new entries stay where they
            // are.
            self.both = Some((self.counts[self.active], self.lost[self.active]));
        }
    }

    /// The batch that was sealed last is durable.
    pub(super) fn written(&mut self) {
        // The older ones first: what is left are always the last of all.
        self.empty(1 - self.active);
        // If some came since, the whole half stays, which does no harm before the next batch ends.
        if self.both.take() == Some((self.counts[self.active], self.lost[self.active])) {
            self.empty(self.active);
        }
        self.tell_lost();
    }

    fn empty(&mut self, half: usize) {
        self.set_count(half, 0);
        self.lost[half] = false;
    }

    fn tell_lost(&self) {
        self.region.store64(AT_LOST, u64::from(self.lost.contains(&true)), Ordering::Release);
    }

    fn set_count(&mut self, half: usize, count: u64) {
        self.counts[half] = count;
        self.region.store64(AT_COUNTS + 8 * half, count, Ordering::Release);
    }
}

fn place(room: u64, half: usize, n: u64) -> usize {
    HEAD + (half as u64 * room + n) as usize * ENTRY
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(word: u64) -> RawL2 {
        RawL2 { word, bitmap: word + 1 }
    }

    fn words(region: &Region) -> Option<Vec<u64>> {
        Some(Journal::read(region)?.list.iter().map(|c| c.word).collect())
    }

    #[test]
    fn what_a_batch_wrote_is_forgotten_and_no_more() {
        let region = Region::new(4096, dma::PageSize::Small).unwrap();
        assert_eq!(Journal::read(&region), None);
        let mut j = Journal::new(region.clone(), 5);
        j.push(7, raw(1));
        j.push(8, raw(2));
        assert_eq!(
            Journal::read(&region).unwrap().list[1],
            Change { cluster: 8, word: 2, bitmap: 3 }
        );
        j.seal();
        j.push(7, raw(3));
        assert_eq!(words(&region).unwrap(), [1, 2, 3]);
        j.written();
        assert_eq!(words(&region).unwrap(), [3]);
        // A batch that fails, and one that does not.
        j.seal();
        j.push(9, raw(4));
        j.seal();
        j.push(9, raw(5));
        assert_eq!(words(&region).unwrap(), [3, 4, 5]);
        j.written();
        // All of the later half, though one of the two is written.
        assert_eq!(words(&region).unwrap(), [4, 5]);
        j.seal();
        j.written();
        assert_eq!(words(&region).unwrap(), []);
    }

    /// Nothing may be left when all is durable: others change the image then.
    #[test]
    fn after_a_batch_that_failed_the_next_one_empties_it() {
        let region = Region::new(4096, dma::PageSize::Small).unwrap();
        let mut j = Journal::new(region.clone(), 5);
        j.push(7, raw(1));
        j.seal();
        j.push(8, raw(2));
        j.seal();
        j.written();
        assert_eq!(words(&region).unwrap(), []);
    }

    #[test]
    fn what_is_lost_during_a_batch_is_not_forgotten_with_what_was_before() {
        let region = Region::new(4096, dma::PageSize::Small).unwrap();
        let mut j = Journal::new(region.clone(), 5);
        for n in 0..64 {
            j.push(n, raw(n));
        }
        j.seal();
        for n in 0..64 {
            j.push(n, raw(n));
        }
        j.written();
        assert_eq!(words(&region), None);
        // Both halves are one batch's, and more did not fit since.
        j.seal();
        j.push(1, raw(1));
        j.seal();
        j.push(2, raw(2));
        j.written();
        assert_eq!(words(&region).unwrap(), [1, 2]);
    }

    /// Memory that anything may stand in.
    #[test]
    fn nonsense_is_no_journal() {
        let region = Region::new(4096, dma::PageSize::Small).unwrap();
        let mut seed = 1u64;
        for round in 0..2000 {
            for at in (0..4096).step_by(8) {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round);
                let word = if seed >> 63 == 0 { seed } else { seed >> 58 };
                region.store64(at, word, Ordering::Relaxed);
            }
            assert_eq!(Journal::read(&region), None);
            region.store64(0, MAGIC, Ordering::Relaxed);
            region.store64(AT_LOST, 0, Ordering::Relaxed);
            let read = Journal::read(&region);
            assert!(read.is_none_or(|c| c.list.len() <= 126));
        }
    }

    #[test]
    fn what_does_not_fit_is_said_until_all_is_written() {
        let region = Region::new(4096, dma::PageSize::Small).unwrap();
        let mut j = Journal::new(region.clone(), 5);
        for n in 0..64 {
            assert_eq!(j.is_much(), n > 31);
            j.push(n, raw(n));
        }
        assert_eq!(words(&region), None);
        j.seal();
        j.push(1, raw(1));
        assert_eq!(words(&region), None);
        j.written();
        assert_eq!(words(&region).unwrap(), [1]);
    }
}
