//! [`Counts`]: the refcounts of a transaction. What is on disk stays as it is; blocks that change
//! get new places, and a new refcount table names those.

use std::collections::BTreeMap;
use std::ops::Range;

use block::Storage;

use crate::format::{
    Geometry, HOST_OFFSET_BITS, MAX_REFCOUNT_TABLE_BYTES, RefcountBlock,
    decode_refcount_table_entry,
};
use crate::open::{ImageMeta, MetadataSet};
use crate::{Error, Result};

/// Bytes of refcount blocks kept in memory, both states counted.
const CACHE_BYTES: u64 = 32 << 20;

/// A refcount block in memory.
struct Block {
    /// As the image on disk has it.
    old: RefcountBlock,
    /// As it will be.
    new: RefcountBlock,
    /// Whether `new` is not in its place yet.
    dirty: bool,
    used: u64,
}

/// Refcounts before and after.
pub(super) struct Counts {
    name: String,
    geometry: Geometry,
    /// Offsets of the blocks on disk; 0: none.
    old_table: Vec<u64>,
    /// Offsets of the blocks as they will be. Where they differ from the old ones, the place is new.
    new_table: Vec<u64>,
    /// Which of the old blocks that were replaced are let go of already.
    freed: Vec<bool>,
    cache: BTreeMap<u64, Block>,
    clock: u64,
    /// Taken, but not counted yet.
    reserved: Vec<Range<u64>>,
    /// Where the search for a free cluster goes on.
    next: u64,
    metadata: MetadataSet,
    /// Whether a count became one, or was one: then COPIED flags may have to change.
    pub(super) flags_moved: bool,
}

/// Where the refcount table is.
#[derive(Clone, Copy)]
pub(super) struct TablePlace {
    pub(super) offset: u64,
    pub(super) clusters: u32,
}

impl Counts {
    pub(super) fn new(meta: &ImageMeta, metadata: MetadataSet) -> Counts {
        let geometry = meta.geometry;
        let table: Vec<u64> = meta
            .refcount_table
            .iter()
            .map(|&raw| decode_refcount_table_entry(raw, &geometry).unwrap_or(0))
            .collect();
        Counts {
            name: meta.name.clone(),
            geometry,
            freed: vec![false; table.len()],
            new_table: table.clone(),
            old_table: table,
            cache: BTreeMap::new(),
            clock: 0,
            reserved: Vec::new(),
            next: 1,
            metadata,
            flags_moved: false,
        }
    }

    fn io(&self) -> impl FnOnce(block::StorageError) -> Error + '_ {
        Error::io(&self.name, "refcount block")
    }

    fn read(&self, st: &mut dyn Storage, offset: u64) -> Result<RefcountBlock> {
        let mut block = RefcountBlock::new(&self.geometry);
        if offset != 0 {
            st.read_at(offset, block.bytes_mut()).map_err(self.io())?;
        }
        Ok(block)
    }

    /// Has a block in the cache.
    fn load(&mut self, st: &mut dyn Storage, index: u64) -> Result<&mut Block> {
        self.clock += 1;
        let clock = self.clock;
        if !self.cache.contains_key(&index) {
            self.evict(st)?;
            let at = index as usize;
            let old_offset = self.old_table.get(at).copied().unwrap_or(0);
            let new_offset = self.new_table.get(at).copied().unwrap_or(0);
            let old = self.read(st, old_offset)?;
            let new = match new_offset == old_offset {
                true => old.clone(),
                false => self.read(st, new_offset)?,
            };
            self.cache.insert(index, Block { old, new, dirty: false, used: clock });
        }
        let block = self.cache.get_mut(&index).expect("was put in");
        block.used = clock;
        Ok(block)
    }

    /// Makes room in the cache for one more block.
    fn evict(&mut self, st: &mut dyn Storage) -> Result<()> {
        let most = (CACHE_BYTES / (2 * self.geometry.cluster_size())).max(4) as usize;
        if self.cache.len() < most {
            return Ok(());
        }
        // A batch at a time, so that finding the oldest costs little.
        let mut ages: Vec<(u64, u64)> = self.cache.iter().map(|(&i, b)| (b.used, i)).collect();
        ages.sort_unstable();
        for (_, index) in ages.into_iter().take((most / 4).max(1)) {
            self.write_back(st, index)?;
            self.cache.remove(&index);
        }
        Ok(())
    }

    fn write_back(&mut self, st: &mut dyn Storage, index: u64) -> Result<()> {
        let offset = self.new_table[index as usize];
        let Some(block) = self.cache.get_mut(&index) else { return Ok(()) };
        if block.dirty {
            block.dirty = false;
            st.write_at(offset, block.new.bytes())
                .map_err(Error::io(&self.name, "refcount block"))?;
        }
        Ok(())
    }

    /// The count of a cluster as it will be.
    pub(super) fn get(&mut self, st: &mut dyn Storage, cluster: u64) -> Result<u64> {
        let index = self.geometry.refcount_table_index(cluster);
        if self.new_table.get(index as usize).copied().unwrap_or(0) == 0 {
            return Ok(0);
        }
        let at = self.geometry.refcount_block_index(cluster);
        Ok(self.load(st, index)?.new.get(at))
    }

    /// Whether the image on disk does not use a cluster, so that it may be written.
    pub(super) fn was_free(&mut self, st: &mut dyn Storage, cluster: u64) -> Result<bool> {
        let index = self.geometry.refcount_table_index(cluster);
        if self.old_table.get(index as usize).copied().unwrap_or(0) == 0 {
            return Ok(true);
        }
        let at = self.geometry.refcount_block_index(cluster);
        Ok(self.load(st, index)?.old.get(at) == 0)
    }

    fn set(&mut self, st: &mut dyn Storage, cluster: u64, value: u64) -> Result<()> {
        let index = self.geometry.refcount_table_index(cluster);
        let at = self.geometry.refcount_block_index(cluster);
        self.give_place(st, index)?;
        let block = self.load(st, index)?;
        block.new.set(at, value);
        block.dirty = true;
        Ok(())
    }

    /// Finds a new place for a block that is going to change, if it has none yet. The place is
    /// reserved, and counted later.
    fn give_place(&mut self, st: &mut dyn Storage, index: u64) -> Result<()> {
        let at = index as usize;
        if at >= self.new_table.len() {
            if (index + 1) * 8 > MAX_REFCOUNT_TABLE_BYTES {
                return Err(Error::refused(
                    &self.name,
                    format!(
                        "would have too many clusters of {} bytes (its refcount table would be \
                         larger than 8 MiB)",
                        self.geometry.cluster_size()
                    ),
                ));
            }
            self.new_table.resize(at + 1, 0);
            self.old_table.resize(at + 1, 0);
            self.freed.resize(at + 1, false);
        }
        if self.new_table[at] != self.old_table[at] {
            return Ok(());
        }
        let place = self.find(st, 1)?;
        self.next = place + 1;
        self.reserved.push(place..place + 1);
        // The old contents must be in memory before the table names the new place.
        self.load(st, index)?.dirty = true;
        self.new_table[at] = place << self.geometry.cluster_bits();
        Ok(())
    }

    /// Counts what is reserved.
    fn settle(&mut self, st: &mut dyn Storage) -> Result<()> {
        while let Some(range) = self.reserved.last().cloned() {
            for cluster in range.clone() {
                self.set(st, cluster, 1)?;
            }
            let at = self.reserved.iter().position(|r| *r == range).expect("is reserved still");
            self.reserved.remove(at);
        }
        Ok(())
    }

    /// Finds `count` clusters side by side that are free before and after.
    fn find(&mut self, st: &mut dyn Storage, count: u64) -> Result<u64> {
        let mut start = self.next;
        let mut cluster = start;
        while cluster < start + count {
            if let Some(range) = self.reserved.iter().find(|r| r.contains(&cluster)) {
                cluster = range.end;
                start = cluster;
                continue;
            }
            let index = self.geometry.refcount_table_index(cluster);
            let known = |t: &Vec<u64>| t.get(index as usize).copied().unwrap_or(0) != 0;
            if !known(&self.old_table) && !known(&self.new_table) {
                cluster += 1;
                continue;
            }
            let entries = self.geometry.refcount_block_entries();
            let mut at = self.geometry.refcount_block_index(cluster);
            let block = self.load(st, index)?;
            if block.old.get(at) == 0 && block.new.get(at) == 0 {
                cluster += 1;
                continue;
            }
            while at < entries && (block.old.get(at) != 0 || block.new.get(at) != 0) {
                at += 1;
                cluster += 1;
            }
            start = cluster;
        }
        self.check_place(st, start, count)?;
        Ok(start)
    }

    /// Refuses to write guest data over what is metadata on disk.
    pub(super) fn check_data(&self, cluster: u64) -> Result<()> {
        match self.metadata.contains(cluster) {
            false => Ok(()),
            true => Err(Error::refused(
                &self.name,
                format!(
                    "an L2 entry points at metadata at offset {:#x}; the image must be repaired \
                     before it is changed",
                    cluster << self.geometry.cluster_bits()
                ),
            )),
        }
    }

    fn check_place(&self, st: &dyn Storage, first: u64, count: u64) -> Result<()> {
        let end = (first + count).checked_mul(self.geometry.cluster_size());
        let most = st.capacity().min(1 << HOST_OFFSET_BITS);
        if end.is_none_or(|end| end > most) {
            let reason = format!("has no room: it would grow past {most} bytes");
            return Err(Error::refused(&self.name, reason));
        }
        if let Some(c) = (first..first + count).find(|&c| self.metadata.contains(c)) {
            return Err(Error::refused(
                &self.name,
                format!(
                    "the cluster at offset {:#x} holds metadata, but its refcount is 0; the image \
                     must be repaired before it is changed",
                    c << self.geometry.cluster_bits()
                ),
            ));
        }
        Ok(())
    }

    /// Takes `count` clusters side by side, whose counts become 1. The first one's number.
    pub(super) fn take(&mut self, st: &mut dyn Storage, count: u64) -> Result<u64> {
        let first = self.find(st, count)?;
        if first == self.next || count == 1 {
            self.next = first + count;
        }
        self.reserved.push(first..first + count);
        self.settle(st)?;
        Ok(first)
    }

    /// Counts clusters as in use by one alone, whatever stands on disk: nothing yet, or more than that,
    /// of references that are gone.
    pub(super) fn adopt(&mut self, st: &mut dyn Storage, clusters: &[u64]) -> Result<()> {
        for &cluster in clusters {
            self.check_data(cluster)?;
            let count = self.get(st, cluster)?;
            if count != 1 {
                self.reserved.push(cluster..cluster + 1);
            }
        }
        self.settle(st)
    }

    /// Counts one reference more.
    pub(super) fn raise(&mut self, st: &mut dyn Storage, cluster: u64) -> Result<()> {
        let count = self.get(st, cluster)?;
        if count == 0 {
            return Err(self.too_low(cluster, count));
        }
        if count >= self.geometry.refcount_max() {
            return Err(Error::refused(
                &self.name,
                format!(
                    "its refcounts have {} bits and cannot count {} references to the cluster at \
                     offset {:#x}; this needs an image with wider ones",
                    1 << self.geometry.refcount_order(),
                    u128::from(count) + 1,
                    cluster << self.geometry.cluster_bits()
                ),
            ));
        }
        self.flags_moved |= count == 1;
        self.set(st, cluster, count + 1)?;
        self.settle(st)
    }

    /// Counts one reference less.
    pub(super) fn lower(&mut self, st: &mut dyn Storage, cluster: u64) -> Result<()> {
        let count = self.get(st, cluster)?;
        if count == 0 {
            return Err(self.too_low(cluster, count));
        }
        self.flags_moved |= count == 2;
        self.set(st, cluster, count - 1)?;
        self.settle(st)
    }

    fn too_low(&self, cluster: u64, count: u64) -> Error {
        Error::refused(
            &self.name,
            format!(
                "the refcount of the cluster at offset {:#x} is {count}, fewer than the references \
                 to it; the image must be repaired before it is changed",
                cluster << self.geometry.cluster_bits()
            ),
        )
    }

    /// Writes what changed: all blocks and the table, in new places. `None` if nothing changed.
    pub(super) fn finish(
        &mut self,
        st: &mut dyn Storage,
        old: TablePlace,
    ) -> Result<Option<TablePlace>> {
        if self.new_table == self.old_table {
            return Ok(None);
        }
        let g = self.geometry;
        for i in 0..u64::from(old.clusters) {
            self.lower(st, g.cluster(old.offset) + i)?;
        }
        let mut table: Option<(u64, u64)> = None;
        loop {
            let mut changed = false;
            for i in 0..self.new_table.len() {
                let was = self.old_table[i];
                if was != 0 && was != self.new_table[i] && !self.freed[i] {
                    self.freed[i] = true;
                    self.lower(st, g.cluster(was))?;
                    changed = true;
                }
            }
            let need = g.clusters_for(self.new_table.len() as u64 * 8);
            if table.is_none_or(|(_, clusters)| clusters < need) {
                if let Some((first, clusters)) = table {
                    for i in 0..clusters {
                        self.lower(st, first + i)?;
                    }
                }
                // It never shrinks: what it had room for may come again.
                let clusters = need.max(u64::from(old.clusters));
                table = Some((self.take(st, clusters)?, clusters));
                changed = true;
            }
            if !changed {
                break;
            }
        }
        let (first, clusters) = table.expect("was just made");
        let blocks: Vec<u64> = self.cache.keys().copied().collect();
        for index in blocks {
            self.write_back(st, index)?;
        }
        let offset = first << g.cluster_bits();
        let len = clusters << g.cluster_bits();
        super::write_words(st, &self.name, "refcount table", offset, len, &self.new_table)?;
        Ok(Some(TablePlace { offset, clusters: clusters as u32 }))
    }

    /// The table as it will be, word by word.
    pub(super) fn table(&self) -> Vec<u64> {
        self.new_table.clone()
    }

    /// What was new is now what is on disk; `metadata` says where that is.
    pub(super) fn committed(&mut self, metadata: MetadataSet) {
        self.metadata = metadata;
        self.old_table.clone_from(&self.new_table);
        self.freed.fill(false);
        for block in self.cache.values_mut() {
            block.old = block.new.clone();
        }
        self.next = 1;
        self.flags_moved = false;
    }

    /// After a commit: gives back the space of clusters that were in use before and are not now.
    pub(super) fn discard_freed(&mut self, st: &mut dyn Storage) -> Result<()> {
        let g = self.geometry;
        let mut run = 0..0;
        for index in 0..self.new_table.len() {
            if self.new_table[index] == self.old_table[index] {
                continue;
            }
            let first = (index as u64) << g.refcount_block_bits();
            let block = self.load(st, index as u64)?;
            let freed = |&at: &usize| block.old.get(at) != 0 && block.new.get(at) == 0;
            let all: Vec<u64> =
                (0..g.refcount_block_entries()).filter(freed).map(|at| first + at as u64).collect();
            for cluster in all {
                if run.end != cluster {
                    discard(st, &g, &run);
                    run = cluster..cluster;
                }
                run.end = cluster + 1;
            }
        }
        discard(st, &g, &run);
        Ok(())
    }

    /// How many clusters are in use.
    pub(super) fn used(&mut self, st: &mut dyn Storage) -> Result<u64> {
        let mut used = 0;
        for index in 0..self.new_table.len() {
            if self.new_table[index] != 0 {
                let entries = self.geometry.refcount_block_entries();
                let block = self.load(st, index as u64)?;
                used += (0..entries).filter(|&at| block.new.get(at) != 0).count() as u64;
            }
        }
        Ok(used)
    }

    /// Gives refcount blocks that lie at or behind this cluster new places, further in front.
    pub(super) fn move_blocks(&mut self, st: &mut dyn Storage, from: u64) -> Result<()> {
        for index in 0..self.new_table.len() {
            if self.geometry.cluster(self.new_table[index]) >= from {
                self.give_place(st, index as u64)?;
                self.settle(st)?;
            }
        }
        Ok(())
    }

    /// The end of the last cluster in use, in bytes.
    pub(super) fn end(&mut self, st: &mut dyn Storage) -> Result<u64> {
        let g = self.geometry;
        for index in (0..self.new_table.len()).rev() {
            if self.new_table[index] == 0 {
                continue;
            }
            let block = self.load(st, index as u64)?;
            if let Some(at) =
                (0..g.refcount_block_entries()).rev().find(|&at| block.new.get(at) != 0)
            {
                let first = (index as u64) << g.refcount_block_bits();
                return Ok((first + at as u64 + 1) << g.cluster_bits());
            }
        }
        Ok(0)
    }
}

fn discard(st: &mut dyn Storage, g: &Geometry, clusters: &Range<u64>) {
    if !clusters.is_empty() {
        let len = (clusters.end - clusters.start) << g.cluster_bits();
        st.discard_at(clusters.start << g.cluster_bits(), len);
    }
}
