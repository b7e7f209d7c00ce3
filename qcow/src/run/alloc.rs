//! Host clusters: refcounts in memory, and who gets which cluster. What was let go of comes back by
//! [`super::reclaim`]; refcount blocks and their table grow in [`super::refblocks`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use block::Status;

use super::refblocks::Block;
use super::shared::{Key, META, Shared};
use super::space::Space;
use super::stack::Top;
use crate::format::{Geometry, get_refcount, set_refcount};
use crate::open::MetadataSet;

/// Freed clusters remembered for reuse; more are found again by their refcount.
const FREED_MAX: usize = 1 << 16;

/// Refcount slices kept in memory, as far as they are on disk.
const SLICES_KEEP: usize = 1024;

/// Slices that a search goes through before other tasks have their turn.
const STRIDE: u32 = 16;

/// A part of a refcount block, at most a metadata buffer's worth.
struct RefSlice {
    bytes: Vec<u8>,
    /// Not known to be durable.
    dirty: bool,
    /// Changed since the last batch took it.
    changed: bool,
}

/// See the module's text.
pub(super) struct Allocator {
    pub(super) geometry: Geometry,
    pub(super) table: Vec<u64>,
    pub(super) table_offset: u64,
    /// The header may already name the next table ([`super::refblocks`]).
    pub(super) table_moving: bool,
    /// log2 of the refcounts in a slice.
    slice_bits: u32,
    /// By host cluster >> `slice_bits`.
    slices: BTreeMap<u64, RefSlice>,
    /// Where the search goes on.
    pub(super) cursor: u64,
    /// Everything at and behind this cluster has never been in use.
    high: u64,
    /// Where others read `high`.
    space: Arc<Space>,
    /// The file's length when it was opened.
    len: u64,
    /// First byte behind everything that was handed out.
    grown: u64,
    /// The search has come round; nothing is free but what is in `freed`.
    exhausted: bool,
    /// Clusters that the device has room for.
    pub(super) limit: u64,
    /// Free for use: refcount 0 in memory.
    freed: BTreeSet<u64>,
    busy: bool,
    /// Header, tables and refcount blocks: never handed out, never mapped to a guest.
    pub(super) metadata: MetadataSet,
    /// A cluster is in use that no refcount counts: any other that seems free may be in use too.
    miscounted: bool,
}

/// A dirty slice: key, offset on disk, bytes.
pub(super) type RefPart = (u64, u64, Vec<u8>);

/// Host clusters side by side that were handed out.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
    /// Nobody ever wrote here: they lie in a file, behind all that it held when it was opened and
    /// all that was handed out since. So they read as zeroes ([`block::Storage::capacity`]).
    pub(super) fresh: bool,
}

impl Allocator {
    /// For the image that is written to, on a device (or in a file that may grow) of `capacity`.
    pub(super) fn new(top: &mut Top, capacity: u64, space: Arc<Space>) -> Allocator {
        let g = top.geometry;
        let slice_bytes = META.min(g.cluster_size() as usize);
        let slice_bits = (slice_bytes as u32 * 8).ilog2() - g.refcount_order();
        space.set_used(g.clusters_for(top.end) << g.cluster_bits());
        Allocator {
            geometry: g,
            table: std::mem::take(&mut top.refcount_table),
            table_offset: top.refcount_table_offset,
            table_moving: false,
            slice_bits,
            slices: BTreeMap::new(),
            cursor: g.clusters_for(top.end),
            high: g.clusters_for(top.end),
            space,
            len: top.len,
            grown: 0,
            exhausted: false,
            limit: g.cluster(capacity),
            freed: BTreeSet::new(),
            busy: false,
            metadata: std::mem::take(&mut top.metadata),
            miscounted: false,
        }
    }

    /// The device has become larger, up to so many bytes.
    pub(super) fn has_more_space(&mut self, capacity: u64) {
        let limit = self.geometry.cluster(capacity);
        if limit > self.limit {
            (self.limit, self.exhausted) = (limit, false);
        }
    }

    pub(super) fn space(&self) -> &Arc<Space> {
        &self.space
    }

    pub(super) fn is_metadata(&self, cluster: u64) -> bool {
        self.metadata.contains(cluster)
    }

    pub(super) fn dirty_slices(&self) -> usize {
        self.slices.values().filter(|s| s.dirty).count()
    }

    /// Where the file may be cut: behind everything that was ever counted, and nothing that was
    /// there when the image was opened, since counts may be wrong.
    pub(super) fn end(&self) -> u64 {
        if self.miscounted {
            return u64::MAX;
        }
        (self.high << self.geometry.cluster_bits()).max(self.len)
    }

    /// First byte behind everything that was handed out since the image was opened; 0: nothing.
    pub(super) fn grown(&self) -> u64 {
        self.grown
    }

    /// Dirty slices, to be written, in the order of the disk.
    ///
    /// # Errors
    /// Never: a slice is only changed when it has a block.
    pub(super) fn begin_write(&mut self) -> Result<Vec<RefPart>, Status> {
        let (bits, order) = (self.slice_bits, self.geometry.refcount_order());
        let block_bits = self.geometry.refcount_block_bits();
        let mut list = Vec::new();
        for (&key, s) in self.slices.iter_mut().filter(|(_, s)| s.dirty) {
            let cluster = key << bits;
            let block = self.table.get((cluster >> block_bits) as usize).copied().unwrap_or(0);
            if block == 0 {
                debug_assert!(false, "counts without a block");
                return Err(Status::Corrupt);
            }
            let inside = ((cluster & ((1 << block_bits) - 1)) << order) >> 3;
            s.changed = false;
            list.push((key, block + inside, s.bytes.clone()));
        }
        list.sort_unstable_by_key(|e| e.1);
        Ok(list)
    }

    /// What [`Allocator::begin_write`] gave is durable.
    pub(super) fn end_write(&mut self, list: &[RefPart]) {
        for (key, _, _) in list {
            if let Some(s) = self.slices.get_mut(key) {
                s.dirty = s.changed;
            }
        }
        self.trim();
    }

    fn trim(&mut self) {
        if self.slices.len() >= SLICES_KEEP {
            self.slices.retain(|_, s| s.dirty);
        }
    }

    pub(super) fn get(&self, cluster: u64) -> Option<u64> {
        let slice = self.slices.get(&(cluster >> self.slice_bits))?;
        Some(get_refcount(&slice.bytes, self.geometry.refcount_order(), self.index(cluster)))
    }

    /// Sets a count whose slice is in memory.
    pub(super) fn set(&mut self, cluster: u64, value: u64) {
        let (order, index) = (self.geometry.refcount_order(), self.index(cluster));
        if let Some(s) = self.slices.get_mut(&(cluster >> self.slice_bits)) {
            set_refcount(&mut s.bytes, order, index, value);
            s.dirty = true;
            s.changed = true;
        }
    }

    fn index(&self, cluster: u64) -> usize {
        cluster as usize & ((1 << self.slice_bits) - 1)
    }

    /// First cluster behind the slice that `cluster` lies in, or behind the device.
    fn slice_end(&self, cluster: u64) -> u64 {
        (((cluster >> self.slice_bits) + 1) << self.slice_bits).min(self.limit)
    }

    /// The free clusters from `from` to its slice's end.
    fn free_from(&self, from: u64) -> impl Iterator<Item = u64> {
        let slice = self.slices.get(&(from >> self.slice_bits));
        let order = self.geometry.refcount_order();
        let end = if slice.is_some() { self.slice_end(from) } else { from };
        (from..end).filter(move |&c| {
            slice.is_some_and(|s| get_refcount(&s.bytes, order, self.index(c)) == 0)
                && !self.metadata.contains(c)
        })
    }

    /// Takes up to `want` free clusters side by side from `first` on, all within one slice; `None` if
    /// the first is not free.
    fn take_run(&mut self, first: u64, want: u64) -> Option<Run> {
        let held = self.high.max(self.geometry.clusters_for(self.len));
        let fresh = self.len > 0 && first >= held;
        let run = self.free_from(first).zip(first..).take_while(|(free, c)| free == c);
        let count = run.take(want as usize).count() as u64;
        for cluster in first..first + count {
            self.set(cluster, 1);
            self.freed.remove(&cluster);
        }
        if count > 0 {
            self.raise(first + count);
            self.grown = self.grown.max((first + count) << self.geometry.cluster_bits());
        }
        (count > 0).then_some(Run { first, count, fresh })
    }

    /// Nothing behind this cluster was ever in use.
    pub(super) fn raise(&mut self, end: u64) {
        if end > self.high {
            self.high = end;
            self.space.set_used(end << self.geometry.cluster_bits());
        }
    }

    /// Gives out again what has count 0 now.
    pub(super) fn put_free(&mut self, cluster: u64) {
        if self.freed.len() < FREED_MAX {
            self.freed.insert(cluster);
        } else {
            self.cursor = self.cursor.min(cluster);
            self.exhausted = false;
        }
    }

    /// Looks whether a cluster that a table names is counted, as far as that is known without a
    /// read. Returns whether it is.
    pub(super) fn seems_counted(&self, cluster: u64) -> bool {
        cluster < self.high && self.place_of(cluster).is_some() && self.get(cluster) != Some(0)
    }

    /// The same of all clusters from `first` to `last`.
    pub(super) fn seem_counted(&self, first: u64, last: u64) -> bool {
        let block = |cluster| self.geometry.refcount_table_index(cluster) as usize;
        let blocks = self.table.get(block(first)..=block(last));
        let (key, end) = (first >> self.slice_bits, last >> self.slice_bits);
        let order = self.geometry.refcount_order();
        last < self.high
            && blocks.is_some_and(|blocks| !blocks.contains(&0))
            && self.slices.range(key..=end).all(|(&key, slice)| {
                let start = key << self.slice_bits;
                let end = last.min(start + ((1 << self.slice_bits) - 1));
                (first.max(start)..=end)
                    .all(|c| get_refcount(&slice.bytes, order, self.index(c)) != 0)
            })
    }

    /// Whether nothing is handed out any more, see [`Allocator::distrust`].
    pub(super) fn is_distrusted(&self) -> bool {
        self.miscounted
    }

    /// Hands nothing out any more. Returns whether that was so before.
    pub(super) fn distrust(&mut self) -> bool {
        std::mem::replace(&mut self.miscounted, true)
    }

    /// Where the counts around `cluster` are on disk: slice, offset, bytes. `None` if there is no
    /// block.
    fn place_of(&self, cluster: u64) -> Option<(u64, u64, usize)> {
        let g = &self.geometry;
        let key = cluster >> self.slice_bits;
        let block = *self.table.get(g.refcount_table_index(cluster) as usize)?;
        let first = g.refcount_block_index(key << self.slice_bits) as u64;
        let len = META.min(g.cluster_size() as usize);
        (block != 0).then_some((key, block + ((first << g.refcount_order()) >> 3), len))
    }
}

impl Shared {
    /// Takes 1 to `want` host clusters side by side. For a task as in [`Shared::at_rest`].
    pub(super) async fn allocate(&self, slot: u16, want: u64) -> Result<Run, Status> {
        let mut result = self.try_allocate(slot, want).await;
        while result == Err(Status::NoSpace) {
            if self.let_go.borrow().is_anything() {
                // What guests let go of comes back by a batch of metadata, and when older requests
                // have ended. They do: none of them waits for this one without being `at_rest`.
                self.write_back(slot).await?;
                self.at_rest(slot, self.pause(slot)).await;
            } else if !self.wait_for_space(slot).await {
                break;
            }
            result = self.try_allocate(slot, want).await;
        }
        if let Ok(run) = result {
            let c = &self.counters.allocated;
            c.set(c.get() + run.count);
        }
        result
    }

    async fn try_allocate(&self, slot: u16, want: u64) -> Result<Run, Status> {
        self.lock_alloc(slot).await;
        let result = self.allocate_locked(slot, want).await;
        self.unlock_alloc();
        result
    }

    pub(super) async fn lock_alloc(&self, slot: u16) {
        while self.alloc.borrow().busy {
            self.park(slot, Key::Alloc).await;
        }
        self.alloc.borrow_mut().busy = true;
    }

    pub(super) fn unlock_alloc(&self) {
        self.alloc.borrow_mut().busy = false;
        self.unpark(Key::Alloc);
    }

    async fn allocate_locked(&self, slot: u16, want: u64) -> Result<Run, Status> {
        if self.alloc.borrow().miscounted {
            return Err(Status::Corrupt);
        }
        loop {
            let first = self.alloc.borrow().freed.first().copied();
            let Some(first) = first else { break };
            self.ref_slice(slot, first).await?;
            let mut a = self.alloc.borrow_mut();
            if let Some(run) = a.take_run(first, want) {
                return Ok(run);
            }
            a.freed.remove(&first);
        }
        // Once round at most.
        let mut looked_at = 0;
        let mut slices = 0;
        loop {
            let (cursor, limit) = {
                let mut a = self.alloc.borrow_mut();
                a.exhausted |= looked_at > a.limit;
                if a.exhausted {
                    return Err(Status::NoSpace);
                }
                if a.cursor >= a.limit {
                    a.cursor = 0;
                    looked_at += 1;
                }
                (a.cursor, a.limit)
            };
            match self.ref_block(slot, cursor).await? {
                Block::There => {}
                Block::Changed => continue,
                Block::NoPlace => {
                    let mut a = self.alloc.borrow_mut();
                    let end = a.geometry.refcount_table_index(cursor) + 1;
                    // Behind the table's end there is no block to be had at all.
                    let known = end <= a.table.len() as u64;
                    let end = if known { end << a.geometry.refcount_block_bits() } else { limit };
                    looked_at += end.min(limit) - cursor;
                    a.cursor = end;
                    continue;
                }
            }
            self.ref_slice(slot, cursor).await?;
            {
                let mut a = self.alloc.borrow_mut();
                let first = a.free_from(cursor).next();
                if let Some(run) = first.and_then(|first| a.take_run(first, want)) {
                    a.cursor = run.first + run.count;
                    return Ok(run);
                }
                let end = a.slice_end(cursor);
                looked_at += end - cursor;
                a.cursor = end;
            }
            slices += 1;
            if slices % STRIDE == 0 {
                self.pause(slot).await;
            }
        }
    }

    /// Makes sure that the refcounts around a host cluster are in memory. With the allocator locked;
    /// they stay until the next `.await`.
    ///
    /// # Errors
    /// `Corrupt` if there is no block, else what the read gave.
    pub(super) async fn ref_slice(&self, slot: u16, cluster: u64) -> Result<(), Status> {
        let place = {
            let a = self.alloc.borrow();
            if a.slices.contains_key(&(cluster >> a.slice_bits)) {
                return Ok(());
            }
            a.place_of(cluster)
        };
        let (key, offset, len) = place.ok_or(Status::Corrupt)?;
        let bytes = self.read_meta(slot, self.top(), offset, len).await?;
        let mut a = self.alloc.borrow_mut();
        a.trim();
        a.slices.insert(key, RefSlice { bytes, dirty: false, changed: false });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clusters together are judged as one by one, over the ends of slices, of blocks and of the image, also
    /// where slices are not in memory.
    #[test]
    fn many_seem_counted_if_each_does() {
        // Clusters of 512 bytes: 256 counts of 16 bits in a block, which is a slice.
        let geometry = Geometry::new(3, 9, 4, 1 << 20).unwrap();
        let mut alloc = Allocator {
            geometry,
            // One block is missing.
            table: vec![512, 1024, 0, 1536, 2048],
            table_offset: 0,
            table_moving: false,
            slice_bits: 8,
            slices: BTreeMap::new(),
            cursor: 0,
            high: 1200,
            space: Arc::default(),
            len: 0,
            grown: 0,
            exhausted: false,
            limit: 1280,
            freed: BTreeSet::new(),
            busy: false,
            metadata: MetadataSet::default(),
            miscounted: false,
        };
        for key in [0, 3, 4] {
            let bytes = [0, 1].repeat(256);
            alloc.slices.insert(key, RefSlice { bytes, dirty: false, changed: false });
        }
        for free in [7, 255, 768, 900, 1023] {
            alloc.set(free, 0);
        }
        let (mut yes, mut no) = (0, 0);
        for first in 0..1290 {
            for last in (first..first + 12).chain([first + 255, first + 256, first + 600]) {
                let each = (first..=last).all(|cluster| alloc.seems_counted(cluster));
                assert_eq!(alloc.seem_counted(first, last), each, "{first} to {last}");
                if each { yes += 1 } else { no += 1 }
            }
        }
        assert!(yes > 5000 && no > 5000, "{yes} {no}");
    }
}
