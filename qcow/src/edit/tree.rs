//! Whole trees of tables: counting references to all that an L1 table leads to, and the COPIED
//! flags of the active one.

use block::Storage;

use super::tx::Tx;
use crate::format::{L1Entry, RawL2};
use crate::open::ImageMeta;
use crate::{Error, Result};

/// Which way counts go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// One reference more.
    Up,
    /// One less.
    Down,
}

/// Refuses L1 tables that name an L2 table twice: none of a valid image does, and a small hostile
/// file could ask for endless work with them.
pub(super) fn check_l1_words(meta: &ImageMeta, l1: &[u64]) -> Result<()> {
    let offsets =
        l1.iter().map(|&raw| L1Entry::decode(raw, &meta.geometry).map_or(0, |e| e.offset));
    let mut offsets: Vec<u64> = offsets.filter(|&o| o != 0).collect();
    offsets.sort_unstable();
    match offsets.windows(2).find(|w| w[0] == w[1]) {
        None => Ok(()),
        Some(w) => Err(Error::refused(
            &meta.name,
            format!("an L1 table names the L2 table at offset {:#x} twice; repair it first", w[0]),
        )),
    }
}

impl Tx {
    /// Counts one reference more or less to all that these L1 entries lead to.
    pub(super) fn count_tree(&mut self, st: &mut dyn Storage, l1: &[u64], way: Way) -> Result<()> {
        let g = self.geometry();
        self.put_table(st)?;
        for &raw in l1 {
            let offset = self.l1_entry(raw)?.offset;
            if offset == 0 {
                continue;
            }
            let words = self.read_l2(st, offset)?;
            self.count(st, g.cluster(offset), way)?;
            for raw in RawL2::all(&words, &g) {
                let clusters = self.clusters_of(self.l2_entry(raw)?);
                if !clusters.is_empty() {
                    // The last sector of compressed data may be missing from the file.
                    self.inside(st, "data cluster", clusters.start << g.cluster_bits(), 1)?;
                }
                for cluster in clusters {
                    self.count(st, cluster, way)?;
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, st: &mut dyn Storage, cluster: u64, way: Way) -> Result<()> {
        match way {
            Way::Up => self.counts.raise(st, cluster),
            Way::Down => self.counts.lower(st, cluster),
        }
    }

    /// Sets COPIED in the active tables where a count is one, and clears it elsewhere.
    pub(super) fn fix_flags(&mut self, st: &mut dyn Storage) -> Result<()> {
        let g = self.geometry();
        for l1_index in 0..self.meta.l1.len() {
            if self.meta.l1[l1_index] == 0 {
                continue;
            }
            let Some(words) = self.words(st, l1_index)? else { continue };
            let words = words.to_vec();
            for (index, raw) in RawL2::all(&words, &g).enumerate() {
                let entry = self.l2_entry(raw)?;
                let Some((host, _)) = entry.host_cluster() else { continue };
                let copied = g.data_file() || self.counts.get(st, g.cluster(host))? == 1;
                let better = entry.with_copied(copied).encode(&g);
                if better != raw {
                    self.set_raw(st, l1_index, index, better)?;
                }
            }
            self.put_table(st)?;
            let offset = self.l1_entry(self.meta.l1[l1_index])?.offset;
            let copied = self.counts.get(st, g.cluster(offset))? == 1;
            self.set_l1(l1_index, L1Entry { offset, copied });
        }
        Ok(())
    }
}
