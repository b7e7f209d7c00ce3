//! Refcount blocks and the refcount table grow. Called by [`super::alloc`] with the allocator locked.
//!
//! New blocks and tables are durable before anything names them, and nothing in memory changes
//! before that. The same clusters are taken and the same bytes written when a step failed and is
//! tried again: so it does no harm if the disk names them already.

use block::{Op, SegList, Status};
use dma::Seg;

use super::read::check;
use super::shared::Shared;
use crate::format::{MAX_REFCOUNT_TABLE_BYTES, RefcountBlock};

/// Words of the refcount table in a sector: what is written when one of them changes.
const SECTOR_WORDS: usize = 64;

/// What there is of a refcount block.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Block {
    /// It exists.
    There,
    /// There was none, and much may have changed: look again.
    Changed,
    /// There is none and no place for one.
    NoPlace,
}

impl Shared {
    /// Makes sure that there is a refcount block for a host cluster, if that can be.
    pub(super) async fn ref_block(&self, slot: u16, cluster: u64) -> Result<Block, Status> {
        let (index, entries, moving, present) = {
            let a = self.alloc.borrow();
            let index = a.geometry.refcount_table_index(cluster) as usize;
            let present = a.table.get(index).is_some_and(|&e| e != 0);
            (index, a.table.len(), a.table_moving, present)
        };
        if present {
            return Ok(Block::There);
        }
        if index >= entries || moving {
            // While it is not known which table the header names, none of them may change.
            return self.grow_ref_table(slot).await;
        }
        // Nothing in the block's range is counted, so the block itself takes the first cluster of
        // it that is ours to take.
        let place = {
            let a = self.alloc.borrow();
            let start = (index as u64) << a.geometry.refcount_block_bits();
            let end = (start + a.geometry.refcount_block_entries() as u64).min(a.limit);
            (start.max(1)..end).find(|c| !a.metadata.contains(*c))
        };
        let Some(place) = place else { return Ok(Block::NoPlace) };
        self.write_ref_block(slot, index, place, place..place + 1).await?;
        check(self.device_flush(slot).await)?;
        // The block is durable; now the table may name it, and from here on the disk may do so even
        // if that fails: a close must not cut it off.
        let (at, bytes) = {
            let mut a = self.alloc.borrow_mut();
            a.raise(place + 1);
            let first = index & !(SECTOR_WORDS - 1);
            let mut words = a.table[first..(first + SECTOR_WORDS).min(a.table.len())].to_vec();
            words[index - first] = place << a.geometry.cluster_bits();
            let mut bytes: Vec<u8> = words.iter().flat_map(|e| e.to_be_bytes()).collect();
            bytes.resize(SECTOR_WORDS * 8, 0);
            (a.table_offset + first as u64 * 8, bytes)
        };
        self.write_bytes(slot, at, &bytes).await?;
        check(self.device_flush(slot).await)?;
        let mut a = self.alloc.borrow_mut();
        a.table[index] = place << a.geometry.cluster_bits();
        a.metadata.insert(place);
        Ok(Block::Changed)
    }

    /// Writes the refcount block of table entry `index` to its place, with count 1 for `counted`.
    async fn write_ref_block(
        &self,
        slot: u16,
        index: usize,
        place: u64,
        counted: std::ops::Range<u64>,
    ) -> Result<(), Status> {
        let g = self.geometry;
        let mut block = RefcountBlock::new(&g);
        let start = (index as u64) << g.refcount_block_bits();
        let end = start + g.refcount_block_entries() as u64;
        for cluster in counted.start.max(start)..counted.end.min(end) {
            block.set((cluster - start) as usize, 1);
        }
        self.write_cluster(slot, place, block.bytes()).await
    }

    /// Writes a host cluster's worth of metadata and waits.
    async fn write_cluster(&self, slot: u16, cluster: u64, bytes: &[u8]) -> Result<(), Status> {
        let buf = self.data_buf(slot).await;
        let seg = buf.head(bytes.len() as u32).unwrap_or(Seg::NONE);
        self.data_region().write_seg(&seg, bytes);
        let mut segs = SegList::EMPTY;
        let _one = segs.push(seg);
        let host = cluster << self.geometry.cluster_bits();
        let status = self.io(slot, self.top(), Op::Write, host, segs).await;
        self.give_data(buf);
        self.counters.meta_writes.set(self.counters.meta_writes.get() + 1);
        check(status)
    }

    /// Moves the refcount table to a larger place, with blocks that count it there.
    async fn grow_ref_table(&self, slot: u16) -> Result<Block, Status> {
        let g = self.geometry;
        let (mut table, old_offset, limit) = {
            let a = self.alloc.borrow();
            (a.table.clone(), a.table_offset, a.limit)
        };
        let old_len = table.len() as u64;
        // The new table and the blocks that count table and blocks, side by side, from the first
        // cluster that no old block counts. All this follows from the old length alone.
        let base = old_len << g.refcount_block_bits();
        let per_cluster = g.cluster_size() / 8;
        let (mut tables, mut blocks) = ((old_len + old_len / 2 + 1).div_ceil(per_cluster), 1);
        loop {
            let need = (tables + blocks).div_ceil(g.refcount_block_entries() as u64);
            if need <= blocks && tables * per_cluster >= old_len + need {
                break;
            }
            blocks = blocks.max(need);
            tables = tables.max((old_len + need).div_ceil(per_cluster));
        }
        let end = base + tables + blocks;
        if tables * g.cluster_size() > MAX_REFCOUNT_TABLE_BYTES || end > limit {
            return Ok(Block::NoPlace);
        }
        // None of this was ever counted: if an L2 table lies there, nor was that.
        let in_the_way = (base..end).find(|&c| self.alloc.borrow().is_metadata(c));
        if let Some(cluster) = in_the_way {
            self.miscounted(cluster);
            return Err(Status::Corrupt);
        }
        table.resize((tables * per_cluster) as usize, 0);
        for i in 0..blocks {
            let (index, place) = (old_len + i, base + tables + i);
            table[index as usize] = place << g.cluster_bits();
            self.write_ref_block(slot, index as usize, place, base..end).await?;
        }
        for (i, part) in table.chunks(per_cluster as usize).enumerate() {
            let bytes: Vec<u8> = part.iter().flat_map(|e| e.to_be_bytes()).collect();
            self.write_cluster(slot, base + i as u64, &bytes).await?;
        }
        check(self.device_flush(slot).await)?;
        // Offset and length of the table stand side by side in the header's first sector.
        let offset = base << g.cluster_bits();
        let mut header = self.read_meta(slot, self.top(), 0, 512).await?;
        header[48..56].copy_from_slice(&offset.to_be_bytes());
        header[56..60].copy_from_slice(&(tables as u32).to_be_bytes());
        {
            // From here on the header may name the new table, even if that fails: a close must not
            // cut it off.
            let mut a = self.alloc.borrow_mut();
            a.table_moving = true;
            a.raise(end);
        }
        self.write_bytes(slot, 0, &header).await?;
        check(self.device_flush(slot).await)?;
        {
            let mut a = self.alloc.borrow_mut();
            a.table = table;
            a.table_offset = offset;
            a.table_moving = false;
            (base..end).for_each(|c| a.metadata.insert(c));
            a.cursor = end;
        }
        self.free_later(g.cluster(old_offset), g.clusters_for(old_len * 8));
        Ok(Block::Changed)
    }
}
