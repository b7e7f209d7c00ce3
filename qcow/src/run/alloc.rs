//! Host clusters: refcounts in memory, allocation, and the way back of what was freed.
//!
//! A cluster that is let go of passes three gates before it is used again: the change that freed it
//! is durable ([`super::flush`]); every request that began before has completed, since its I/O may
//! still be under way to the old place (epochs); its refcount in memory is lowered. The refcount on
//! disk follows in a later batch, so it is never too low.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use block::{Flags, Op, SegList, Status};

use super::io::Child;
use super::read::check;
use super::shared::{Key, META, Shared};
use super::stack::Top;
use crate::format::{Geometry, L1Entry, get_refcount, set_refcount};
use crate::open::MetadataSet;

/// Freed clusters remembered for reuse; more are found again by their refcount.
const FREED_MAX: usize = 1 << 16;

/// Clean refcount slices kept in memory.
const SLICES_KEEP: usize = 1024;

/// A part of a refcount block, at most a metadata buffer's worth.
struct RefSlice {
    bytes: Vec<u8>,
    dirty: bool,
    /// Changed again while it is being written.
    changed: bool,
}

/// See the module's text.
pub(super) struct Allocator {
    geometry: Geometry,
    table: Vec<u64>,
    table_offset: u64,
    /// log2 of the refcounts in a slice.
    slice_bits: u32,
    /// By host cluster >> `slice_bits`.
    slices: BTreeMap<u64, RefSlice>,
    /// Where the search goes on.
    cursor: u64,
    /// Everything at and behind this cluster has never been in use.
    high: u64,
    /// The search has come round; nothing is free but what is in `freed`.
    exhausted: bool,
    /// Clusters that the device has room for.
    limit: u64,
    /// Free for use: refcount 0 in memory.
    freed: BTreeSet<u64>,
    /// Durably let go of, by the epoch at which that was so.
    retired: VecDeque<(u64, Vec<u64>)>,
    busy: bool,
    /// Header, tables and refcount blocks: never handed out, never mapped to a guest.
    metadata: MetadataSet,
}

impl Allocator {
    /// For the image that is written to, on a device (or in a file that may grow) of `capacity`.
    pub(super) fn new(top: &Top, capacity: u64) -> Allocator {
        let g = top.geometry;
        let slice_bytes = META.min(g.cluster_size() as usize);
        let slice_bits = (slice_bytes as u32 * 8).ilog2() - g.refcount_order();
        Allocator {
            geometry: g,
            table: top.refcount_table.clone(),
            table_offset: top.refcount_table_offset,
            slice_bits,
            slices: BTreeMap::new(),
            cursor: g.clusters_for(top.end),
            high: g.clusters_for(top.end),
            exhausted: false,
            limit: g.cluster(capacity),
            freed: BTreeSet::new(),
            retired: VecDeque::new(),
            busy: false,
            metadata: top.metadata.clone(),
        }
    }

    pub(super) fn is_metadata(&self, cluster: u64) -> bool {
        self.metadata.contains(cluster)
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.slices.values().any(|s| s.dirty) || !self.retired.is_empty()
    }

    /// The first byte behind the last cluster that was ever in use.
    pub(super) fn end(&self) -> u64 {
        self.high << self.geometry.cluster_bits()
    }

    /// Takes over what a durable batch let go of.
    pub(super) fn retire(&mut self, epoch: &Cell<u64>, clusters: Vec<u64>) {
        if !clusters.is_empty() {
            self.retired.push_back((epoch.get(), clusters));
            epoch.set(epoch.get() + 1);
        }
    }

    /// Dirty slices, to be written: key, offset on disk, bytes; in the order of the disk.
    pub(super) fn begin_write(&mut self) -> Vec<(u64, u64, Vec<u8>)> {
        let (bits, order) = (self.slice_bits, self.geometry.refcount_order());
        let block_bits = self.geometry.refcount_block_bits();
        let mut list = Vec::new();
        for (&key, s) in self.slices.iter_mut().filter(|(_, s)| s.dirty) {
            let cluster = key << bits;
            let block = self.table.get((cluster >> block_bits) as usize).copied().unwrap_or(0);
            let inside = ((cluster & ((1 << block_bits) - 1)) << order) >> 3;
            s.changed = false;
            list.push((key, block + inside, s.bytes.clone()));
        }
        list.sort_unstable_by_key(|e| e.1);
        list
    }

    /// Ends [`Allocator::begin_write`].
    pub(super) fn end_write(&mut self, list: &[(u64, u64, Vec<u8>)], done: bool) {
        for (key, _, _) in list {
            if let Some(s) = self.slices.get_mut(key) {
                s.dirty = !done || s.changed;
            }
        }
        if self.slices.len() > SLICES_KEEP {
            self.slices.retain(|_, s| s.dirty);
        }
    }

    fn get(&self, cluster: u64) -> Option<u64> {
        let slice = self.slices.get(&(cluster >> self.slice_bits))?;
        let index = cluster as usize & ((1 << self.slice_bits) - 1);
        Some(get_refcount(&slice.bytes, self.geometry.refcount_order(), index))
    }

    fn set(&mut self, cluster: u64, value: u64) {
        let order = self.geometry.refcount_order();
        if let Some(s) = self.slices.get_mut(&(cluster >> self.slice_bits)) {
            let index = cluster as usize & ((1 << self.slice_bits) - 1);
            set_refcount(&mut s.bytes, order, index, value);
            s.dirty = true;
            s.changed = true;
        }
    }

    fn is_free(&self, cluster: u64) -> bool {
        self.get(cluster) == Some(0) && !self.metadata.contains(cluster)
    }

    /// Takes up to `want` free clusters side by side from `first` on, all within one slice.
    fn take_run(&mut self, first: u64, want: u64) -> u64 {
        let end = ((first >> self.slice_bits) + 1) << self.slice_bits;
        let mut count = 0;
        while count < want && first + count < end.min(self.limit) && self.is_free(first + count) {
            self.set(first + count, 1);
            self.freed.remove(&(first + count));
            count += 1;
        }
        self.high = self.high.max(first + count);
        count
    }

    fn insert_slice(&mut self, key: u64, bytes: Vec<u8>, dirty: bool) {
        self.slices.entry(key).or_insert(RefSlice { bytes, dirty, changed: dirty });
    }

    fn slice_bytes(&self) -> usize {
        META.min(self.geometry.cluster_size() as usize)
    }
}

impl Shared {
    /// Takes 1 to `want` host clusters side by side. Returns the first one's number and how many.
    pub(super) async fn allocate(&self, slot: u16, want: u64) -> Result<(u64, u64), Status> {
        self.lock_alloc(slot).await;
        let result = self.allocate_locked(slot, want).await;
        self.unlock_alloc();
        if let Ok((_, count)) = result {
            let c = &self.counters.allocated;
            c.set(c.get() + count);
        }
        result
    }

    async fn lock_alloc(&self, slot: u16) {
        while self.alloc.borrow().busy {
            self.park(slot, Key::Alloc).await;
        }
        self.alloc.borrow_mut().busy = true;
    }

    fn unlock_alloc(&self) {
        self.alloc.borrow_mut().busy = false;
        self.unpark(Key::Alloc);
    }

    async fn allocate_locked(&self, slot: u16, want: u64) -> Result<(u64, u64), Status> {
        loop {
            let first = self.alloc.borrow().freed.first().copied();
            let Some(first) = first else { break };
            self.ref_slice(slot, first).await?;
            let mut a = self.alloc.borrow_mut();
            let count = a.take_run(first, want);
            if count > 0 {
                return Ok((first, count));
            }
            a.freed.remove(&first);
        }
        let began = self.alloc.borrow().cursor;
        let mut wrapped = false;
        loop {
            let (cursor, limit, exhausted) = {
                let a = self.alloc.borrow();
                (a.cursor, a.limit, a.exhausted)
            };
            if exhausted {
                return Err(Status::NoSpace);
            }
            if cursor >= limit || (wrapped && cursor >= began) {
                let mut a = self.alloc.borrow_mut();
                if wrapped || cursor >= limit && began == 0 {
                    a.exhausted = true;
                    a.cursor = limit;
                } else {
                    wrapped = true;
                    a.cursor = 0;
                }
                continue;
            }
            self.ref_block(slot, cursor).await?;
            self.ref_slice(slot, cursor).await?;
            let mut a = self.alloc.borrow_mut();
            let end = (((cursor >> a.slice_bits) + 1) << a.slice_bits).min(limit);
            let Some(first) = (cursor..end).find(|&c| a.is_free(c)) else {
                a.cursor = end;
                continue;
            };
            let count = a.take_run(first, want);
            a.cursor = first + count;
            return Ok((first, count));
        }
    }

    /// Gives clusters back that were just allocated and never written into a table.
    pub(super) fn unallocate(&self, first: u64, count: u64) {
        let mut a = self.alloc.borrow_mut();
        for cluster in first..first + count {
            a.set(cluster, 0);
            a.freed.insert(cluster);
        }
    }

    /// Makes sure that the refcounts around a host cluster are in memory; its block exists.
    async fn ref_slice(&self, slot: u16, cluster: u64) -> Result<(), Status> {
        let (key, block, inside, len) = {
            let a = self.alloc.borrow();
            let key = cluster >> a.slice_bits;
            if a.slices.contains_key(&key) {
                return Ok(());
            }
            let g = &a.geometry;
            let block = a.table.get(g.refcount_table_index(cluster) as usize).copied();
            let first = g.refcount_block_index(key << a.slice_bits) as u64;
            (key, block.unwrap_or(0), (first << g.refcount_order()) >> 3, a.slice_bytes())
        };
        let bytes = match block {
            0 => vec![0; len],
            _ => self.read_meta(slot, self.top(), block + inside, len).await?,
        };
        self.alloc.borrow_mut().insert_slice(key, bytes, false);
        Ok(())
    }

    /// Makes sure that there is a refcount block for a host cluster.
    async fn ref_block(&self, slot: u16, cluster: u64) -> Result<(), Status> {
        let (index, entries, present) = {
            let a = self.alloc.borrow();
            let index = a.geometry.refcount_table_index(cluster) as usize;
            (index, a.table.len(), a.table.get(index).is_some_and(|&e| e != 0))
        };
        if present {
            return Ok(());
        }
        if index >= entries {
            return self.grow_ref_table(slot, index).await;
        }
        // Nothing in the block's range is counted, so the block itself takes the first cluster of
        // it that is ours to take.
        let place = {
            let a = self.alloc.borrow();
            let start = (index as u64) << a.geometry.refcount_block_bits();
            let end = (start + a.geometry.refcount_block_entries() as u64).min(a.limit);
            (start.max(1)..end).find(|c| !a.metadata.contains(*c))
        };
        let place = place.ok_or(Status::NoSpace)?;
        self.write_ref_blocks(slot, place, 1, &[(index, place)], 0).await?;
        // The block is durable; now the table may point to it.
        self.write_ref_table_entry(slot, index, place).await?;
        Ok(())
    }

    /// Writes new refcount blocks `(table index, place)` whose counts say 1 for the clusters
    /// `[first, first + count)`, plus `extra` behind; durable when this returns.
    async fn write_ref_blocks(
        &self,
        slot: u16,
        first: u64,
        count: u64,
        blocks: &[(usize, u64)],
        extra: u64,
    ) -> Result<(), Status> {
        let g = self.geometry;
        for &(index, place) in blocks {
            self.write_zero_cluster(slot, place << g.cluster_bits()).await?;
            let mut image = crate::format::RefcountBlock::new(&g);
            let start = (index as u64) << g.refcount_block_bits();
            let end = start + g.refcount_block_entries() as u64;
            for cluster in first.max(start)..(first + count + extra).min(end) {
                image.set((cluster - start) as usize, 1);
            }
            let (bits, len) = {
                let a = self.alloc.borrow();
                (a.slice_bits, a.slice_bytes())
            };
            for (i, bytes) in image.bytes().chunks(len).enumerate() {
                let key = (start >> bits) + i as u64;
                if bytes.iter().any(|&b| b != 0) {
                    let at = (place << g.cluster_bits()) + (i * len) as u64;
                    self.write_bytes(slot, at, bytes).await?;
                    self.alloc.borrow_mut().insert_slice(key, bytes.to_vec(), false);
                }
            }
            let mut a = self.alloc.borrow_mut();
            a.metadata.insert(place);
            a.high = a.high.max(place + 1);
        }
        check(self.device_flush(slot).await)
    }

    async fn write_ref_table_entry(
        &self,
        slot: u16,
        index: usize,
        place: u64,
    ) -> Result<(), Status> {
        let offset = place << self.geometry.cluster_bits();
        let (at, bytes) = {
            let mut a = self.alloc.borrow_mut();
            a.table[index] = offset;
            let first = index & !63;
            let part = a.table[first..(first + 64).min(a.table.len())].iter();
            let mut bytes: Vec<u8> = part.flat_map(|e| e.to_be_bytes()).collect();
            bytes.resize(512, 0);
            (a.table_offset + first as u64 * 8, bytes)
        };
        let mut wrote = self.write_bytes(slot, at, &bytes).await;
        if wrote.is_ok() {
            wrote = check(self.device_flush(slot).await);
        }
        if wrote.is_err() {
            // Not known to be on disk: the block leaks, at worst.
            self.alloc.borrow_mut().table[index] = 0;
        }
        wrote
    }

    /// Moves the refcount table to a larger place, with blocks that count it there.
    async fn grow_ref_table(&self, slot: u16, index: usize) -> Result<(), Status> {
        let g = self.geometry;
        let (old_len, old_offset, limit) = {
            let a = self.alloc.borrow();
            (a.table.len() as u64, a.table_offset, a.limit)
        };
        let per_cluster = g.cluster_size() / 8;
        let wanted = (index as u64 + 1).max(old_len + old_len / 2);
        // The new table and the blocks that count table and blocks, side by side, from the first
        // cluster that no old block counts.
        let base = old_len << g.refcount_block_bits();
        let (mut tables, mut blocks) = (wanted.div_ceil(per_cluster), 1);
        loop {
            let need = (tables + blocks).div_ceil(g.refcount_block_entries() as u64);
            let fits = tables * per_cluster >= old_len + need;
            if need <= blocks && fits {
                break;
            }
            blocks = blocks.max(need);
            tables = tables.max((old_len + need).div_ceil(per_cluster));
        }
        if (tables * per_cluster) * 8 > crate::format::MAX_REFCOUNT_TABLE_BYTES
            || base + tables + blocks > limit
        {
            return Err(Status::NoSpace);
        }
        let list: Vec<(usize, u64)> =
            (0..blocks).map(|i| ((old_len + i) as usize, base + tables + i)).collect();
        let mut table = self.alloc.borrow().table.clone();
        table.resize((tables * per_cluster) as usize, 0);
        for &(i, place) in &list {
            table[i] = place << g.cluster_bits();
        }
        let offset = base << g.cluster_bits();
        for (i, part) in table.chunks(META / 8).enumerate() {
            let bytes: Vec<u8> = part.iter().flat_map(|e| e.to_be_bytes()).collect();
            self.write_bytes(slot, offset + (i * META) as u64, &bytes).await?;
        }
        self.write_ref_blocks(slot, base, tables, &list, blocks).await?;
        // Offset and length of the table stand side by side in the header's first sector.
        let mut header = self.read_meta(slot, self.top(), 0, 512).await?;
        header[48..56].copy_from_slice(&offset.to_be_bytes());
        header[56..60].copy_from_slice(&(tables as u32).to_be_bytes());
        self.write_bytes(slot, 0, &header).await?;
        check(self.device_flush(slot).await)?;
        let old_clusters = g.clusters_for(old_len * 8);
        {
            let mut a = self.alloc.borrow_mut();
            a.table = table;
            a.table_offset = offset;
            (base..base + tables).for_each(|c| a.metadata.insert(c));
            a.cursor = a.cursor.max(base + tables + blocks);
            a.high = a.high.max(base + tables + blocks);
        }
        self.free_later(g.cluster(old_offset), old_clusters);
        Ok(())
    }

    /// Lowers the refcounts of clusters that passed all gates, and tells the device of those that
    /// are free now.
    pub(super) async fn reclaim(&self, slot: u16) {
        if self.alloc.borrow().retired.is_empty() {
            return;
        }
        self.lock_alloc(slot).await;
        loop {
            let oldest = (0..self.slots()).map(|s| self.work(s as u16).epoch.get()).min();
            let next = {
                let mut a = self.alloc.borrow_mut();
                match a.retired.front() {
                    Some(&(epoch, _)) if oldest.is_none_or(|o| o > epoch) => a.retired.pop_front(),
                    _ => None,
                }
            };
            let Some((_, clusters)) = next else { break };
            self.lower(slot, &clusters).await;
        }
        self.unlock_alloc();
    }

    async fn lower(&self, slot: u16, clusters: &[u64]) {
        let mut free = Vec::new();
        for &cluster in clusters {
            if self.ref_slice(slot, cluster).await.is_err() {
                // The count stays too high: a leak that a check finds.
                continue;
            }
            let mut a = self.alloc.borrow_mut();
            match a.get(cluster) {
                Some(0) | None => {
                    let name = &self.stack.layers[0].name;
                    log::error!("{name}: cluster {cluster:#x} was in use with refcount 0");
                }
                Some(1) => free.push(cluster),
                Some(n) => a.set(cluster, n - 1),
            }
        }
        free.sort_unstable();
        if self.device.discard {
            self.discard_clusters(slot, &free).await;
        }
        let mut a = self.alloc.borrow_mut();
        for cluster in free {
            a.set(cluster, 0);
            a.exhausted = false;
            if a.freed.len() < FREED_MAX {
                a.freed.insert(cluster);
            } else {
                a.cursor = a.cursor.min(cluster);
            }
        }
    }

    /// Tells the device that clusters are free. A hint: how it ends does not matter.
    async fn discard_clusters(&self, slot: u16, sorted: &[u64]) {
        let bits = self.geometry.cluster_bits();
        for run in sorted.chunk_by(|a, b| a + 1 == *b) {
            let child = Child {
                port: self.top(),
                op: Op::Discard,
                flags: Flags::NONE,
                offset: run[0] << bits,
                len: (run.len() as u64) << bits,
                segs: SegList::EMPTY,
            };
            self.start(slot, child);
            let _ = self.wait_if_crowded(slot).await;
        }
        let _ = self.wait(slot).await;
    }

    /// Fills a host cluster with zeroes.
    pub(super) async fn write_zero_cluster(&self, slot: u16, host: u64) -> Result<(), Status> {
        let mut segs = SegList::EMPTY;
        let _one = segs.push(self.zero_seg(self.geometry.cluster_size()));
        self.counters.meta_writes.set(self.counters.meta_writes.get() + 1);
        check(self.io(slot, self.top(), Op::Write, host, segs).await)
    }

    // ---- L2 tables ----

    /// Makes sure that the L2 table for a page exists, is ours alone, and that the page's slice of
    /// it is in memory; holds the slice until [`super::meta::Tables::unuse`].
    pub(super) async fn slice_ready(&self, slot: u16, page: u64) -> Result<(), Status> {
        let g = self.geometry;
        let guest = (page << self.map.page_bits()) << g.cluster_bits();
        let index = g.l1_index(guest) as usize;
        loop {
            if self.tables.borrow().has_slice(page) {
                self.tables.borrow_mut().hold(page);
                return Ok(());
            }
            if self.tables.borrow().making.contains(&index) {
                self.park(slot, Key::Table(index as u64)).await;
                continue;
            }
            self.tables.borrow_mut().making.insert(index);
            let result = self.load_slice(slot, page, guest, index).await;
            self.tables.borrow_mut().making.remove(&index);
            self.unpark(Key::Table(index as u64));
            result?;
        }
    }

    async fn load_slice(
        &self,
        slot: u16,
        page: u64,
        guest: u64,
        index: usize,
    ) -> Result<(), Status> {
        let g = self.geometry;
        let entries = g.l2_entries().min(1 << self.map.page_bits());
        let raw = self.tables.borrow().l1(index as u64);
        let table = L1Entry::decode(raw, &g).map_err(|_| Status::Corrupt)?;
        if table.offset == 0 || !table.copied {
            let (cluster, _) = self.allocate(slot, 1).await?;
            let host = cluster << g.cluster_bits();
            let made = match table.offset {
                0 => self.write_zero_cluster(slot, host).await,
                // Shared with somebody else: changed in a copy, as any cluster.
                old => self.copy_cluster(slot, old, host).await,
            };
            if let Err(status) = made {
                self.unallocate(cluster, 1);
                return Err(status);
            }
            self.alloc.borrow_mut().metadata.insert(cluster);
            let entry = L1Entry { offset: host, copied: true };
            self.tables.borrow_mut().set_l1(index, entry.encode());
            if table.offset != 0 {
                self.free_later(g.cluster(table.offset), 1);
            } else {
                self.tables.borrow_mut().insert(page, vec![0; entries]);
                return Ok(());
            }
        }
        let raw = self.tables.borrow().l1(index as u64);
        let table = L1Entry::decode(raw, &g).map_err(|_| Status::Corrupt)?.offset;
        let first = g.l2_index(guest);
        let list = self.read_entries(slot, self.top(), table, first, first + entries - 1).await?;
        self.tables.borrow_mut().insert(page, list);
        Ok(())
    }

    async fn copy_cluster(&self, slot: u16, from: u64, to: u64) -> Result<(), Status> {
        let buf = self.data_buf(slot).await;
        let mut segs = SegList::EMPTY;
        let _one = segs.push(buf.seg());
        let mut status = self.io(slot, self.top(), Op::Read, from, segs).await;
        if status.is_ok() {
            status = self.io(slot, self.top(), Op::Write, to, segs).await;
        }
        self.give_data(buf);
        check(status)
    }
}
