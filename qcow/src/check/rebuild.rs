//! A new refcount table with new blocks, when the old ones cannot be used.

use std::collections::BTreeSet;

use super::Checker;
use super::refs::InUse;
use super::window::{WINDOW, Window};
use crate::format::{MAX_REFCOUNT_TABLE_BYTES, RefcountBlock, field};
use crate::{Error, Result};

/// Where the new structures go, in clusters.
struct Places {
    table: u64,
    table_clusters: u64,
    /// One for each needed block, in their order.
    blocks: Vec<u64>,
}

impl Places {
    fn clusters(&self) -> impl Iterator<Item = u64> + '_ {
        (self.table..self.table + self.table_clusters).chain(self.blocks.iter().copied())
    }
}

impl Checker<'_> {
    /// Writes refcount blocks for all that is in use and a table that names them, in clusters
    /// that hold nothing, then lets the header name the table. Until that last write the image
    /// is what it was.
    pub(super) fn rebuild(&mut self) -> Result<()> {
        let g = self.meta.geometry;
        let bits = g.refcount_block_bits();
        let cannot = |meta: &crate::ImageMeta, why: &str| {
            Error::refused(&meta.name, format!("the refcount structures cannot be rebuilt: {why}"))
        };
        let (mut needed, free) = self.survey()?;
        let places = loop {
            let entries = needed.last().map_or(0, |last| last + 1);
            let table_clusters = g.clusters_for(entries * 8);
            if table_clusters * g.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
                return Err(cannot(&self.meta, "the table would be larger than 8 MiB"));
            }
            let places = self
                .place(table_clusters, needed.len() as u64, &free)
                .ok_or_else(|| cannot(&self.meta, "there is no free space for them"))?;
            // The new clusters are in use themselves; that may need further blocks. The set only
            // grows, and a block covers at least 64 clusters, so this ends.
            let before = needed.len();
            needed.extend(places.clusters().map(|c| c >> bits));
            if needed.len() == before {
                break places;
            }
        };
        self.write_blocks(&needed, &places)?;
        let io = |name: &str, e| Error::io(name, "refcount table")(e);
        self.storage.flush().map_err(|e| io(&self.meta.name, e))?;

        let entries = (places.table_clusters * g.cluster_size() / 8) as usize;
        let mut table = vec![0u64; entries];
        for (&index, &cluster) in needed.iter().zip(&places.blocks) {
            table[index as usize] = cluster << g.cluster_bits();
        }
        let bytes: Vec<u8> = table.iter().flat_map(|w| w.to_be_bytes()).collect();
        let offset = places.table << g.cluster_bits();
        self.storage.write_at(offset, &bytes).map_err(|e| io(&self.meta.name, e))?;
        self.storage.flush().map_err(|e| io(&self.meta.name, e))?;

        // Offset and size stand side by side in one sector: one write switches both.
        let mut named = offset.to_be_bytes().to_vec();
        named.extend_from_slice(&(places.table_clusters as u32).to_be_bytes());
        let io = |name: &str, e| Error::io(name, "header")(e);
        self.storage
            .write_at(field::REFCOUNT_TABLE_OFFSET, &named)
            .map_err(|e| io(&self.meta.name, e))?;
        self.storage.flush().map_err(|e| io(&self.meta.name, e))?;

        self.meta.header.refcount_table_offset = offset;
        self.meta.header.refcount_table_clusters = places.table_clusters as u32;
        self.meta.refcount_table = table;
        self.refs.refcount_table =
            Some(InUse { what: "refcount table", offset, len: bytes.len() as u64 });
        self.refs.refcount_blocks = needed
            .iter()
            .zip(&places.blocks)
            .map(|(&index, &cluster)| (index as u32, cluster << g.cluster_bits()))
            .collect();
        self.file_len = self.storage.len();
        self.clusters = g.clusters_for(self.file_len);
        Ok(())
    }

    /// Which refcount blocks are needed (those with anything but zeroes), and, where the file
    /// cannot grow, clusters that are free.
    fn survey(&mut self) -> Result<(BTreeSet<u64>, Vec<u64>)> {
        let g = self.meta.geometry;
        let bits = g.refcount_block_bits();
        let old: BTreeSet<u64> =
            self.refs.refcount_blocks.iter().map(|&(_, offset)| g.cluster(offset)).collect();
        let old_table = self
            .refs
            .refcount_table
            .map_or(0..0, |t| g.cluster(t.offset)..g.cluster(t.offset) + g.clusters_for(t.len));
        let grows = self.grows();
        // Far more than the structures of a file with that many clusters take.
        let enough = 1024 + (self.clusters >> bits) * 2;
        let mut needed = BTreeSet::new();
        let mut free = Vec::new();
        for range in self.windows() {
            let mut window = Window::new(range.clone());
            self.count_quietly(&mut window, false)?;
            for cluster in range {
                if window.get(cluster) > 0 {
                    if needed.last() != Some(&(cluster >> bits)) {
                        needed.insert(cluster >> bits);
                    }
                } else if !grows
                    && (free.len() as u64) < enough
                    && (cluster + 1) << g.cluster_bits() <= self.file_len
                    && !old.contains(&cluster)
                    && !old_table.contains(&cluster)
                {
                    free.push(cluster);
                }
            }
        }
        Ok((needed, free))
    }

    /// Whether there is room behind the file's end: a file grows, a device does not.
    fn grows(&self) -> bool {
        let g = &self.meta.geometry;
        let room = self.storage.capacity().saturating_sub(self.file_len) >> g.cluster_bits();
        room > 1024 + (self.clusters >> g.refcount_block_bits()) * 2
    }

    /// Finds places for a table and blocks: behind the file's end, or among free clusters.
    fn place(&self, table_clusters: u64, blocks: u64, free: &[u64]) -> Option<Places> {
        if self.grows() {
            let table = self.clusters;
            let first = table + table_clusters;
            return Some(Places {
                table,
                table_clusters,
                blocks: (first..first + blocks).collect(),
            });
        }
        let len = table_clusters as usize;
        let run = free.windows(len).position(|w| w[len - 1] - w[0] == table_clusters - 1)?;
        let rest = free[..run].iter().chain(&free[run + len..]);
        let wanted = blocks as usize;
        let blocks: Vec<u64> = rest.copied().take(wanted).collect();
        (blocks.len() == wanted).then_some(Places { table: free[run], table_clusters, blocks })
    }

    fn write_blocks(&mut self, needed: &BTreeSet<u64>, places: &Places) -> Result<()> {
        let g = self.meta.geometry;
        let bits = g.refcount_block_bits();
        let mut block = RefcountBlock::new(&g);
        let end = places.clusters().max().unwrap_or(0).max(self.clusters) + 1;
        let mut start = 0;
        while start < end {
            let range = start..(start + WINDOW).min(end);
            start = range.end;
            let mut window = Window::new(range.clone());
            self.count_quietly(&mut window, false)?;
            places.clusters().for_each(|cluster| window.add(cluster, 1));
            for (&index, &cluster) in needed.iter().zip(&places.blocks) {
                let first = index << bits;
                if !range.contains(&first) {
                    continue;
                }
                for entry in 0..g.refcount_block_entries() {
                    let counted = window.get(first + entry as u64);
                    block.set(entry, counted.min(g.refcount_max()));
                }
                self.storage
                    .write_at(cluster << g.cluster_bits(), block.bytes())
                    .map_err(Error::io(&self.meta.name, "refcount block"))?;
            }
        }
        Ok(())
    }
}
