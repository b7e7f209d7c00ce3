//! Bitmaps inside a transaction: [`Held`] is what they will be, and [`Tx`] changes their bits.
//!
//! Bits that change go to clusters that the image on disk does not use, as do the tables and the
//! directory; the header's first sector makes them the image's.

use std::collections::BTreeSet;

use block::Storage;

use super::tx::{Place, Tx};
use crate::bitmaps::{self, Bitmap, fill, inconsistent};
use crate::format::{
    BitmapCluster, BitmapEntry, Bitmaps, Header, MAX_BITMAP_BYTES, MAX_BITMAP_DIRECTORY, autoclear,
};
use crate::{Error, Result};

/// A bitmap as it will be.
pub(super) struct One {
    pub(super) entry: BitmapEntry,
    pub(super) table: Vec<BitmapCluster>,
    /// Whether the table differs from the one on disk.
    dirty: bool,
}

/// A cluster of bits in memory.
struct Cached {
    index: usize,
    at: usize,
    bytes: Vec<u8>,
    dirty: bool,
}

/// All of an image.
pub(super) struct Held {
    pub(super) all: Vec<One>,
    /// Whether directory, tables or bits differ from what is on disk.
    pub(super) changed: bool,
    /// The directory on disk.
    directory: Place,
    cached: Option<Cached>,
}

impl Held {
    pub(super) fn read(st: &mut dyn Storage, name: &str, header: &Header) -> Result<Held> {
        let read = bitmaps::Bitmaps::read(st, name, header)?;
        let directory = match header.bitmaps().filter(|_| !read.all.is_empty()) {
            Some(b) => Place { offset: b.directory_offset, len: b.directory_size },
            None => Place { offset: 0, len: 0 },
        };
        let one = |(entry, table)| One { entry, table, dirty: false };
        let all = read.all.into_iter().map(one).collect();
        Ok(Held { all, changed: false, directory, cached: None })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.all.iter().position(|b| b.entry.name == name.as_bytes())
    }

    /// Where they stand on disk, as (offset, length). For a transaction in which nothing is changed.
    pub(super) fn places(&self, header: &Header) -> Vec<(u64, u64)> {
        let cluster = 1 << header.cluster_bits;
        let mut places = vec![(self.directory.offset, self.directory.len)];
        for one in &self.all {
            places.push((one.entry.table_offset, one.table.len() as u64 * 8));
            places.extend(bitmaps::data_places(&one.table, cluster));
        }
        places
    }

    /// Adds an empty bitmap; its index.
    pub(super) fn push(&mut self, entry: BitmapEntry, table_entries: u64) -> usize {
        let table = vec![BitmapCluster::Zeroes; table_entries as usize];
        self.all.push(One { entry, table, dirty: true });
        self.changed = true;
        self.all.len() - 1
    }
}

impl Tx {
    /// A bitmap as it stands in the transaction, to read its bits.
    pub(super) fn bitmap(&mut self, st: &mut dyn Storage, index: usize) -> Result<Bitmap> {
        self.put_bits(st)?;
        let one = &self.bitmaps.all[index];
        Ok(Bitmap::of(&self.meta.name, &one.entry, self.geometry(), one.table.clone()))
    }

    /// Has one cluster of bits in memory.
    fn load_bits(&mut self, st: &mut dyn Storage, index: usize, at: usize) -> Result<&mut Cached> {
        if !self.has_bits(index, at) {
            self.put_bits(st)?;
            let mut bytes = vec![0; self.geometry().cluster_size() as usize];
            match self.bitmaps.all[index].table[at] {
                BitmapCluster::Zeroes => {}
                BitmapCluster::Ones => bytes.fill(0xff),
                BitmapCluster::Data(offset) => {
                    st.read_at(offset, &mut bytes).map_err(self.io("bitmap"))?;
                }
            }
            self.bitmaps.cached = Some(Cached { index, at, bytes, dirty: false });
        }
        Ok(self.bitmaps.cached.as_mut().expect("was just loaded"))
    }

    fn has_bits(&self, index: usize, at: usize) -> bool {
        self.bitmaps.cached.as_ref().is_some_and(|c| (c.index, c.at) == (index, at))
    }

    /// Writes the cluster of bits that is in memory, if it changed, and forgets it.
    fn put_bits(&mut self, st: &mut dyn Storage) -> Result<()> {
        let Some(Cached { index, at, bytes, .. }) = self.bitmaps.cached.take().filter(|c| c.dirty)
        else {
            return Ok(());
        };
        let g = self.geometry();
        let old = self.bitmaps.all[index].table[at];
        if bytes.iter().all(|&b| b == 0) {
            return self.set_cluster(st, index, at, BitmapCluster::Zeroes);
        }
        self.bitmaps.changed = true;
        if let BitmapCluster::Data(offset) = old
            && self.counts.was_free(st, g.cluster(offset))?
        {
            return st.write_at(offset, &bytes).map_err(self.io("bitmap"));
        }
        let offset = self.take(st, g.cluster_size())?;
        st.write_at(offset, &bytes).map_err(self.io("bitmap"))?;
        self.set_cluster(st, index, at, BitmapCluster::Data(offset))
    }

    /// Sets an entry of a bitmap's table; what it named is let go of.
    pub(super) fn set_cluster(
        &mut self,
        st: &mut dyn Storage,
        index: usize,
        at: usize,
        new: BitmapCluster,
    ) -> Result<()> {
        let one = &mut self.bitmaps.all[index];
        let old = std::mem::replace(&mut one.table[at], new);
        if old == new {
            return Ok(());
        }
        one.dirty = true;
        self.bitmaps.changed = true;
        if let BitmapCluster::Data(offset) = old {
            let cluster = self.geometry().cluster(offset);
            self.counts.lower(st, cluster)?;
        }
        Ok(())
    }

    /// Has each bit in `[from, to)` be `value`.
    pub(super) fn set_bits(
        &mut self,
        st: &mut dyn Storage,
        index: usize,
        from: u64,
        to: u64,
        value: bool,
    ) -> Result<()> {
        let per = self.geometry().cluster_size() * 8;
        let uniform = if value { BitmapCluster::Ones } else { BitmapCluster::Zeroes };
        let mut bit = from;
        while bit < to {
            let at = (bit / per) as usize;
            let start = at as u64 * per;
            let end = to.min(start + per);
            let here = self.has_bits(index, at);
            if bit == start && end == start + per {
                if here {
                    self.bitmaps.cached = None;
                }
                self.set_cluster(st, index, at, uniform)?;
            } else if here || self.bitmaps.all[index].table[at] != uniform {
                let cached = self.load_bits(st, index, at)?;
                let changed = fill(&mut cached.bytes, bit - start, end - start, value);
                cached.dirty |= changed;
                self.bitmaps.changed |= changed;
            }
            bit = end;
        }
        Ok(())
    }

    /// Has enabled bitmaps say that `[offset, offset + len)` of the disk changed, as far as that lies
    /// on the disk.
    pub(super) fn mark(&mut self, st: &mut dyn Storage, offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len).min(self.geometry().size());
        if offset >= end {
            return Ok(());
        }
        for index in 0..self.bitmaps.all.len() {
            let entry = &self.bitmaps.all[index].entry;
            if entry.is_auto() && !entry.is_in_use() {
                let bits = entry.granularity_bits;
                self.set_bits(st, index, offset >> bits, ((end - 1) >> bits) + 1, true)?;
            }
        }
        Ok(())
    }

    /// Clears a bitmap.
    pub(super) fn clear_bits(&mut self, st: &mut dyn Storage, index: usize) -> Result<()> {
        self.put_bits(st)?;
        for at in 0..self.bitmaps.all[index].table.len() {
            self.set_cluster(st, index, at, BitmapCluster::Zeroes)?;
        }
        Ok(())
    }

    /// Removes a bitmap.
    pub(super) fn remove_bitmap(&mut self, st: &mut dyn Storage, index: usize) -> Result<()> {
        self.clear_bits(st, index)?;
        let one = self.bitmaps.all.remove(index);
        self.bitmaps.changed = true;
        self.free_table(st, &one.entry)
    }

    fn free_table(&mut self, st: &mut dyn Storage, entry: &BitmapEntry) -> Result<()> {
        match entry.table_offset {
            0 => Ok(()),
            offset => self.free(st, Place { offset, len: u64::from(entry.table_size) * 8 }),
        }
    }

    /// Refuses bits that would take more than QEMU has.
    pub(super) fn check_bits_size(&self, entry: &BitmapEntry, size: u64) -> Result<u64> {
        let bits = self.geometry().cluster_bits();
        let entries = entry.table_entries(bits, size);
        if entries == 0 {
            return Err(self.refused("a disk of 0 bytes has no bitmaps"));
        }
        if entries << bits > MAX_BITMAP_BYTES {
            return Err(self.refused(format!(
                "bitmap {:?} would take more than {MAX_BITMAP_BYTES} bytes; a larger granularity \
                 takes less",
                entry.shown_name()
            )));
        }
        Ok(entries)
    }

    /// Changes the size of all bitmaps for a disk that changes its own to `size` bytes. What is
    /// added to the disk is a change to it.
    pub(super) fn resize_bitmaps(&mut self, st: &mut dyn Storage, size: u64) -> Result<()> {
        let old = self.geometry().size();
        for index in 0..self.bitmaps.all.len() {
            let entry = self.bitmaps.all[index].entry.clone();
            if entry.is_in_use() {
                return Err(inconsistent(&self.meta.name, &entry.shown_name()));
            }
            let entries = self.check_bits_size(&entry, size)? as usize;
            // What stands behind the last bit means nothing, until there are more.
            let per = self.geometry().cluster_size() * 8;
            let kept = entry.bits(old.min(size));
            self.set_bits(st, index, kept, kept.next_multiple_of(per).max(kept), false)?;
            self.put_bits(st)?;
            for at in entries..self.bitmaps.all[index].table.len() {
                self.set_cluster(st, index, at, BitmapCluster::Zeroes)?;
            }
            let one = &mut self.bitmaps.all[index];
            if one.table.len() != entries {
                one.table.resize(entries, BitmapCluster::Zeroes);
                one.dirty = true;
                self.bitmaps.changed = true;
            }
            if size > old && entry.is_auto() {
                let from = old >> entry.granularity_bits;
                self.set_bits(st, index, from, entry.bits(size), true)?;
            }
        }
        Ok(())
    }

    /// Writes tables and directory to new places, if bitmaps changed, and has the header name
    /// them. Returns whether they did.
    pub(super) fn put_bitmaps(&mut self, st: &mut dyn Storage) -> Result<bool> {
        self.put_bits(st)?;
        let g = self.geometry();
        if !self.bitmaps.changed {
            let vouched = if self.bitmaps.is_empty() { 0 } else { autoclear::BITMAPS };
            self.meta.header.autoclear_features &= vouched | autoclear::RAW_DATA;
            return Ok(false);
        }
        for index in 0..self.bitmaps.all.len() {
            if !self.bitmaps.all[index].dirty {
                continue;
            }
            let words: Vec<u64> =
                self.bitmaps.all[index].table.iter().map(|c| c.encode()).collect();
            let bytes = words.len() as u64 * 8;
            let offset = self.take(st, bytes)?;
            let padded = g.clusters_for(bytes) << g.cluster_bits();
            super::write_words(st, &self.meta.name, "bitmap table", offset, padded, &words)?;
            let old = self.bitmaps.all[index].entry.clone();
            self.free_table(st, &old)?;
            let one = &mut self.bitmaps.all[index];
            one.entry.table_offset = offset;
            one.entry.table_size = words.len() as u32;
            one.dirty = false;
        }
        let old = self.bitmaps.directory;
        let mut bytes = Vec::new();
        self.bitmaps.all.iter().for_each(|b| b.entry.encode(&mut bytes));
        let len = bytes.len() as u64;
        if len > MAX_BITMAP_DIRECTORY {
            return Err(self.refused("has too many bitmaps with long names"));
        }
        let header = &mut self.meta.header;
        if bytes.is_empty() {
            header.set_bitmaps(None);
            header.autoclear_features &= autoclear::RAW_DATA;
            self.bitmaps.directory = Place { offset: 0, len: 0 };
        } else {
            let offset = self.take(st, len)?;
            bytes.resize((g.clusters_for(len) << g.cluster_bits()) as usize, 0);
            st.write_at(offset, &bytes).map_err(self.io("bitmap directory"))?;
            let header = &mut self.meta.header;
            header.set_bitmaps(Some(Bitmaps {
                count: self.bitmaps.all.len() as u32,
                directory_size: len,
                directory_offset: offset,
            }));
            header.autoclear_features &= autoclear::RAW_DATA;
            header.autoclear_features |= autoclear::BITMAPS;
            self.bitmaps.directory = Place { offset, len };
        }
        if old.len > 0 {
            self.free(st, old)?;
        }
        self.bitmaps.changed = false;
        Ok(true)
    }

    /// Sets those bits of a bitmap whose part of the disk has a bit set in another one, which is read
    /// from `from` if it is of another image.
    pub(super) fn merge_bits(
        &mut self,
        st: &mut dyn Storage,
        index: usize,
        source: &mut Bitmap,
        mut from: Option<&mut dyn Storage>,
    ) -> Result<()> {
        let ours = u32::from(self.bitmaps.all[index].entry.granularity_bits);
        let theirs = source.granularity_bits();
        let bits = self.bitmaps.all[index].entry.bits(self.geometry().size());
        let all = source.disk_size().div_ceil(1 << theirs);
        let mut at = 0;
        loop {
            let next = match from.as_deref_mut() {
                Some(from) => source.next_set(from, at, all)?,
                None => source.next_set(st, at, all)?,
            };
            let Some((first, end)) = next else { return Ok(()) };
            let to = (((end << theirs) - 1) >> ours) + 1;
            self.set_bits(st, index, (first << theirs) >> ours, to.min(bits), true)?;
            at = end;
        }
    }
}

/// Gives each cluster of bits of those bitmaps (by their numbers in the directory, each has one) a
/// place, so that bits can be set without any change to tables.
///
/// # Errors
/// If there is no room, or a write fails. The image is as it was then.
pub(crate) fn give_bits_places(
    st: &mut dyn Storage,
    name: &str,
    wanted: &BTreeSet<usize>,
) -> Result<()> {
    super::tx::run(st, name, |tx, st| {
        let cluster = tx.geometry().cluster_size();
        for &index in wanted {
            let table = tx.bitmaps.all[index].table.clone();
            let mut at = 0;
            while at < table.len() {
                let is = table[at];
                if matches!(is, BitmapCluster::Data(_)) {
                    at += 1;
                    continue;
                }
                let zeroes = table[at..].iter().take_while(|c| **c == BitmapCluster::Zeroes);
                let mut count = zeroes.count().max(1);
                // Side by side where there is room.
                let offset = loop {
                    match tx.take(st, count as u64 * cluster) {
                        Err(_) if count > 1 => count /= 2,
                        taken => break taken?,
                    }
                };
                match is {
                    BitmapCluster::Ones => st.write_at(offset, &vec![0xff; cluster as usize]),
                    _ => st.write_zeroes_at(offset, count as u64 * cluster),
                }
                .map_err(tx.io("bitmap"))?;
                for i in 0..count {
                    let place = BitmapCluster::Data(offset + i as u64 * cluster);
                    tx.set_cluster(st, index, at + i, place)?;
                }
                at += count;
            }
        }
        Ok(())
    })
    .map(|_| ())
}

/// A transaction's error for a bitmap that is not there.
pub(super) fn not_there(image: &str, bitmap: &str) -> Error {
    Error::refused(image, format!("has no bitmap {bitmap:?}"))
}
