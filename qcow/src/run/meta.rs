//! [`Tables`]: L1 and L2 tables of the layer that is written to that are being changed.
//!
//! Each table part is kept twice: as it is *now*, and as an *image* of what may go to disk in the
//! batch that is being written. What changes during a batch waits for the next one: so an entry
//! whose data is not durable yet is never written along by chance. See [`super::flush`] for the
//! order.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::journal::Journal;
use super::shared::META;
use crate::format::{Geometry, RawL2};

/// L1 entries in one metadata buffer.
pub(super) const L1_PART: usize = META / 8;

/// A part of an L2 table, as many entries as a page of the map has.
pub(super) struct Slice {
    now: Box<[u64]>,
    image: Box<[u64]>,
    /// `now` may differ from the image.
    changed: bool,
    /// The image is not known to be durable.
    dirty: bool,
    /// Tasks that are about to change it: it must stay in memory.
    users: u32,
}

/// See the module's text.
pub(super) struct Tables {
    /// The L1 table with all changes.
    l1: Vec<u64>,
    l1_image: Vec<u64>,
    l1_pending: Vec<(usize, u64)>,
    l1_dirty: BTreeSet<usize>,
    slices: BTreeMap<u64, Slice>,
    /// Changes are noted there, too.
    pub(super) journal: Option<Journal>,
    geometry: Geometry,
    /// L2 tables being made, by L1 index, and pages being loaded.
    pub(super) making: HashSet<usize>,
    pub(super) loading: HashSet<u64>,
    /// Guest clusters that are about to get a host cluster, where claims are on subclusters only.
    pub(super) placing: HashSet<u64>,
}

impl Tables {
    pub(super) fn new(geometry: Geometry, l1: Vec<u64>) -> Tables {
        Tables {
            geometry,
            l1_image: l1.clone(),
            l1,
            l1_pending: Vec::new(),
            l1_dirty: BTreeSet::new(),
            slices: BTreeMap::new(),
            journal: None,
            making: HashSet::new(),
            loading: HashSet::new(),
            placing: HashSet::new(),
        }
    }

    pub(super) fn l1(&self, index: u64) -> u64 {
        self.l1.get(index as usize).copied().unwrap_or(0)
    }

    /// All of the L1 table, with all changes.
    pub(super) fn all_l1(&self) -> &[u64] {
        &self.l1
    }

    pub(super) fn set_l1(&mut self, index: usize, raw: u64) {
        self.l1[index] = raw;
        self.l1_pending.push((index, raw));
    }

    pub(super) fn has_slice(&self, page: u64) -> bool {
        self.slices.contains_key(&page)
    }

    /// Takes the words of a slice.
    pub(super) fn insert(&mut self, page: u64, words: Vec<u64>) {
        let now: Box<[u64]> = words.into();
        let image = now.clone();
        let slice = Slice { now, image, changed: false, dirty: false, users: 0 };
        self.slices.entry(page).or_insert(slice);
    }

    /// Keeps a slice in memory until [`Tables::unuse`].
    pub(super) fn hold(&mut self, page: u64) {
        if let Some(s) = self.slices.get_mut(&page) {
            s.users += 1;
        }
    }

    pub(super) fn unuse(&mut self, page: u64) {
        if let Some(s) = self.slices.get_mut(&page) {
            s.users -= 1;
        }
    }

    /// The words of `count` entries from `index` on, with all changes, if the slice is in memory.
    pub(super) fn words(&self, page: u64, index: usize, count: usize) -> Option<&[u64]> {
        let n = self.geometry.l2_words();
        self.slices.get(&page)?.now.get(index * n..(index + count) * n)
    }

    /// An entry with all changes, if its slice is in memory.
    pub(super) fn entry(&self, page: u64, index: usize) -> Option<RawL2> {
        Some(RawL2::of(self.words(page, index, 1)?, 0, &self.geometry))
    }

    /// Changes an entry of a held slice, from the next batch on.
    pub(super) fn stage(&mut self, page: u64, index: usize, raw: RawL2) {
        let n = self.geometry.l2_words();
        if let Some(s) = self.slices.get_mut(&page)
            && let Some(entry) = s.now.get_mut(index * n..(index + 1) * n)
        {
            raw.put(entry, 0, &self.geometry);
            s.changed = true;
            if let Some(journal) = &mut self.journal {
                let bits = page_bits(&self.geometry) - self.geometry.sub_bits();
                journal.push((page << bits) + index as u64, raw);
            }
        }
    }

    /// Lets changes into the images: the start of a batch. What they rely on has completed on the
    /// device before this call. Returns the pages whose slices are to be written.
    pub(super) fn seal(&mut self) -> Vec<u64> {
        self.journal.iter_mut().for_each(Journal::seal);
        for (index, raw) in self.l1_pending.drain(..) {
            self.l1_image[index] = raw;
            self.l1_dirty.insert(index / L1_PART);
        }
        let mut dirty = Vec::new();
        for (&page, s) in &mut self.slices {
            if std::mem::take(&mut s.changed) && s.now != s.image {
                s.image.copy_from_slice(&s.now);
                s.dirty = true;
            }
            if s.dirty {
                dirty.push(page);
            }
        }
        dirty
    }

    /// The sealed parts of the L1 table that differ from the disk.
    pub(super) fn dirty_l1_parts(&self) -> Vec<usize> {
        self.l1_dirty.iter().copied().collect()
    }

    /// A part of the L1 table as it shall stand on disk.
    pub(super) fn l1_bytes(&self, part: usize) -> Vec<u8> {
        let first = part * L1_PART;
        let last = (first + L1_PART).min(self.l1_image.len());
        let mut bytes: Vec<u8> =
            self.l1_image[first..last].iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    /// A slice as it shall stand on disk.
    pub(super) fn slice_bytes(&self, page: u64) -> Vec<u8> {
        let image = self.slices.get(&page).map_or(&[][..], |s| &s.image);
        image.iter().flat_map(|e| e.to_be_bytes()).collect()
    }

    /// The end of a batch: what it wrote is durable.
    pub(super) fn written(&mut self, pages: &[u64], l1_parts: &[usize]) {
        self.journal.iter_mut().for_each(Journal::written);
        for page in pages {
            if let Some(s) = self.slices.get_mut(page) {
                s.dirty = false;
            }
        }
        for part in l1_parts {
            self.l1_dirty.remove(part);
        }
    }

    /// Whether anything is not on disk.
    pub(super) fn is_dirty(&self) -> bool {
        self.l1_is_dirty() || self.slices.values().any(|s| s.dirty || s.changed)
    }

    /// Whether a slice, or the way to it, is not on disk.
    pub(super) fn page_is_dirty(&self, page: u64) -> bool {
        self.l1_is_dirty() || self.slices.get(&page).is_some_and(|s| s.dirty || s.changed)
    }

    fn l1_is_dirty(&self) -> bool {
        !self.l1_pending.is_empty() || !self.l1_dirty.is_empty()
    }

    pub(super) fn slice_count(&self) -> usize {
        self.slices.len()
    }

    /// Forgets clean slices that nobody uses, if there are more than `keep`.
    pub(super) fn trim(&mut self, keep: usize) {
        if self.slices.len() > keep {
            self.slices.retain(|_, s| s.dirty || s.changed || s.users > 0);
        }
    }
}

/// log2 of the units in a page of the map, which has as many entries as a slice: a metadata buffer's
/// worth, or a whole table. With subclusters half of that, so that pages do not get too large.
pub(super) fn page_bits(geometry: &Geometry) -> u32 {
    let bytes = if geometry.extended_l2() { META as u64 / 2 } else { META as u64 };
    let entries = (bytes / geometry.l2_entry_size()).trailing_zeros();
    geometry.l2_bits().min(entries) + geometry.sub_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(extended: bool, l1: Vec<u64>) -> Tables {
        let g = Geometry::new(3, 16, 4, 1 << 30).unwrap().with_extended_l2(extended).unwrap();
        Tables::new(g, l1)
    }

    fn plain(word: u64) -> RawL2 {
        RawL2 { word, bitmap: 0 }
    }

    #[test]
    fn extended_entries_have_two_words() {
        let mut t = tables(true, vec![]);
        t.insert(7, vec![0; 256]);
        t.stage(7, 127, RawL2 { word: 5, bitmap: 6 });
        t.stage(7, 128, plain(1));
        assert_eq!((t.entry(7, 127), t.entry(7, 128)), (Some(RawL2 { word: 5, bitmap: 6 }), None));
        assert_eq!(t.words(7, 126, 2), Some(&[0, 0, 5, 6][..]));
        assert_eq!(t.seal(), [7]);
        let bytes = t.slice_bytes(7);
        assert_eq!(bytes[2032..], [5u64.to_be_bytes(), 6u64.to_be_bytes()].concat());
        let g = t.geometry;
        assert_eq!((page_bits(&g), page_bits(&g.with_extended_l2(false).unwrap())), (12, 9));
    }

    #[test]
    fn a_batch_holds_what_was_sealed_and_no_more() {
        let mut t = tables(false, vec![0; 600]);
        t.insert(7, vec![0; 512]);
        t.stage(7, 3, plain(11));
        assert_eq!(t.entry(7, 3), Some(plain(11)));
        assert_eq!(t.seal(), [7]);
        t.stage(7, 3, plain(12));
        t.stage(7, 4, plain(13));
        assert_eq!(t.slice_bytes(7)[24..40], [[0; 7].as_slice(), &[11], &[0; 8]].concat());
        assert_eq!((t.entry(7, 3), t.entry(7, 4)), (Some(plain(12)), Some(plain(13))));
        t.written(&[7], &[]);
        assert!(t.is_dirty() && t.page_is_dirty(7) && !t.page_is_dirty(8));
        assert_eq!(t.seal(), [7]);
        assert_eq!(t.seal(), [7], "what is not known to be durable stays dirty");
        t.written(&[7], &[]);
        t.stage(7, 4, plain(13));
        assert!(t.seal().is_empty(), "nothing is new");
    }

    #[test]
    fn l1_parts() {
        let mut t = tables(false, vec![0; 600]);
        t.set_l1(599, 0x10000);
        assert_eq!(t.l1(599), 0x10000);
        assert!(t.dirty_l1_parts().is_empty());
        t.seal();
        assert_eq!(t.dirty_l1_parts(), [1]);
        let bytes = t.l1_bytes(1);
        assert_eq!(bytes.len(), 1024);
        assert_eq!(bytes[87 * 8..88 * 8], 0x10000u64.to_be_bytes());
        t.written(&[], &[1]);
        assert!(!t.is_dirty());
    }

    #[test]
    fn trimming_spares_what_is_needed() {
        let mut t = tables(false, vec![]);
        for p in 0..4 {
            t.insert(p, vec![0; 8]);
        }
        t.hold(1);
        t.stage(2, 0, plain(5));
        t.trim(1);
        assert!(!t.has_slice(0) && t.has_slice(1) && t.has_slice(2) && !t.has_slice(3));
    }
}
