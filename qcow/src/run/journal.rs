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

/// Bytes of the head, and of an entry.
const HEAD: usize = 64;
const ENTRY: usize = 32;

/// `HEAD` holds: this, then whether changes were lost, then the halves' counts.
const MAGIC: u64 = 0x6c61_6e72_756f_6a71;
const AT_LOST: usize = 8;
const AT_COUNTS: usize = 16;
const AT_ACTIVE: usize = 32;

/// See the module's text.
#[derive(Debug)]
pub struct Journal {
    region: Arc<Region>,
    /// Entries of a half.
    room: u64,
    active: usize,
    counts: [u64; 2],
    /// Changes did not fit; and they did not before the batch that is being written was sealed.
    lost: bool,
    lost_sealed: bool,
    /// The other half belongs to a batch.
    sealed: bool,
}

impl Journal {
    /// An empty one, in memory of at least a page that others may map.
    pub fn new(region: Arc<Region>) -> Journal {
        let room = ((region.len() - HEAD) / ENTRY / 2) as u64;
        let journal = Journal {
            region,
            room,
            active: 0,
            counts: [0; 2],
            lost: false,
            lost_sealed: false,
            sealed: false,
        };
        for at in [AT_LOST, AT_COUNTS, AT_COUNTS + 8, AT_ACTIVE] {
            journal.region.store64(at, 0, Ordering::Relaxed);
        }
        journal.region.store64(0, MAGIC, Ordering::Release);
        journal
    }

    /// What a process that died has left: its changes, oldest first. `None` if some did not fit, or
    /// this is none.
    pub fn read(region: &Region) -> Option<Vec<Change>> {
        if region.load64(0, Ordering::Acquire) != MAGIC
            || region.load64(AT_LOST, Ordering::Acquire) != 0
        {
            return None;
        }
        let room = ((region.len() - HEAD) / ENTRY / 2) as u64;
        let active = region.load64(AT_ACTIVE, Ordering::Acquire) as usize & 1;
        let mut all = Vec::new();
        for half in [1 - active, active] {
            let count = region.load64(AT_COUNTS + 8 * half, Ordering::Acquire);
            if count > room {
                return None;
            }
            for n in 0..count {
                let [cluster, word, bitmap] = region.read_words(place(room, half, n));
                all.push(Change { cluster, word, bitmap });
            }
        }
        Some(all)
    }

    /// An entry has changed.
    pub(super) fn push(&mut self, cluster: u64, raw: RawL2) {
        let n = self.counts[self.active];
        if n == self.room {
            self.lost = true;
            return self.region.store64(AT_LOST, 1, Ordering::Release);
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
        self.lost_sealed = self.lost;
        // After a batch that failed its half is not empty, and the new entries stay where they are.
        self.sealed = self.counts[1 - self.active] == 0;
        if self.sealed {
            self.active = 1 - self.active;
            self.region.store64(AT_ACTIVE, self.active as u64, Ordering::Release);
        }
    }

    /// The batch that was sealed last is durable.
    pub(super) fn written(&mut self) {
        self.set_count(1 - self.active, 0);
        if self.lost_sealed && self.sealed {
            (self.lost, self.lost_sealed) = (false, false);
            self.region.store64(AT_LOST, 0, Ordering::Release);
        }
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
        Some(Journal::read(region)?.iter().map(|c| c.word).collect())
    }

    #[test]
    fn what_a_batch_wrote_is_forgotten_and_no_more() {
        let region = Region::new(4096, dma::PageSize::Small).unwrap();
        assert_eq!(Journal::read(&region), None);
        let mut j = Journal::new(region.clone());
        j.push(7, raw(1));
        j.push(8, raw(2));
        assert_eq!(Journal::read(&region).unwrap()[1], Change { cluster: 8, word: 2, bitmap: 3 });
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
        assert_eq!(words(&region).unwrap(), [4, 5]);
        j.seal();
        j.written();
        assert_eq!(words(&region).unwrap(), []);
    }

    #[test]
    fn what_does_not_fit_is_said_until_all_is_written() {
        let region = Region::new(4096, dma::PageSize::Small).unwrap();
        let mut j = Journal::new(region.clone());
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
