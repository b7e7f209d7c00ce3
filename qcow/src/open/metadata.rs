//! [`MetadataSet`]: which host clusters hold metadata, so that no data is written over it.

use std::collections::BTreeSet;

use super::ImageMeta;
use crate::format::{L1Entry, decode_refcount_table_entry};
use crate::{Error, Result};

/// The host clusters of header, tables and blocks. Built when an image is opened for writing; the
/// datapath asks it when it loads an L2 table, so that an entry of a damaged or hostile image
/// that points at metadata is found before a guest's data goes there.
#[derive(Clone, Debug, Default)]
pub struct MetadataSet {
    /// Sorted, each once.
    initial: Vec<u64>,
    added: BTreeSet<u64>,
}

impl MetadataSet {
    /// Collects the clusters of header, L1 table, refcount table, L2 tables and refcount blocks.
    ///
    /// # Errors
    /// If two of them share a cluster, or an entry is impossible.
    pub fn new(image: &ImageMeta) -> Result<MetadataSet> {
        let g = &image.geometry;
        let h = &image.header;
        let mut all: Vec<(u64, Kind)> = vec![(0, Kind::Header)];
        let mut range = |offset: u64, len: u64, kind| {
            all.extend((0..g.clusters_for(len)).map(|i| (g.cluster(offset) + i, kind)));
        };
        range(h.l1_table_offset, u64::from(h.l1_size) * 8, Kind::L1);
        range(h.refcount_table_offset, image.refcount_table.len() as u64 * 8, Kind::RefcountTable);
        for (i, &raw) in image.l1.iter().enumerate() {
            let entry = L1Entry::decode(raw, g)
                .map_err(|e| bad_entry(image, "L1", i, h.l1_table_offset, raw, &e))?;
            if entry.offset != 0 {
                let kind = if entry.copied { Kind::L2 } else { Kind::SharedL2 };
                all.push((g.cluster(entry.offset), kind));
            }
        }
        for (i, &raw) in image.refcount_table.iter().enumerate() {
            let offset = decode_refcount_table_entry(raw, g).map_err(|e| {
                bad_entry(image, "refcount table", i, h.refcount_table_offset, raw, &e)
            })?;
            if offset != 0 {
                all.push((g.cluster(offset), Kind::RefcountBlock));
            }
        }
        all.sort_unstable();
        for pair in all.windows(2) {
            let ((cluster, a), (other, b)) = (pair[0], pair[1]);
            if cluster == other && (a, b) != (Kind::SharedL2, Kind::SharedL2) {
                return Err(Error::refused(
                    &image.name,
                    format!(
                        "the cluster at offset {:#x} is used as {} and as {}; the image can be \
                         read, but not be written",
                        cluster << g.cluster_bits(),
                        a.name(),
                        b.name()
                    ),
                ));
            }
        }
        let mut initial: Vec<u64> = all.into_iter().map(|(cluster, _)| cluster).collect();
        initial.dedup();
        initial.shrink_to_fit();
        Ok(MetadataSet { initial, added: BTreeSet::new() })
    }

    /// Whether this host cluster (a number, not an offset) holds metadata.
    pub fn contains(&self, cluster: u64) -> bool {
        self.initial.binary_search(&cluster).is_ok() || self.added.contains(&cluster)
    }

    /// Adds places (offset and length) that nothing else may use. Whether nothing did.
    pub(crate) fn add(&mut self, g: &crate::format::Geometry, places: &[(u64, u64)]) -> bool {
        let before = self.initial.len();
        for &(offset, len) in places {
            self.initial.extend(g.cluster(offset)..g.cluster(offset) + g.clusters_for(len));
        }
        let all = self.initial.len();
        self.initial.sort_unstable();
        self.initial.dedup();
        all == self.initial.len() || before == all
    }

    /// Whether any of these clusters holds metadata.
    pub(crate) fn meets(&self, clusters: &std::ops::Range<u64>) -> bool {
        let at = self.initial.partition_point(|&c| c < clusters.start);
        self.initial.get(at).is_some_and(|&c| c < clusters.end)
            || self.added.range(clusters.clone()).next().is_some()
    }

    /// Adds a cluster that became metadata.
    pub fn insert(&mut self, cluster: u64) {
        self.added.insert(cluster);
    }
}

fn bad_entry(
    image: &ImageMeta,
    table: &str,
    index: usize,
    table_offset: u64,
    raw: u64,
    why: &dyn std::fmt::Display,
) -> Error {
    Error::refused(
        &image.name,
        format!(
            "{table} entry {index} at offset {:#x} is {raw:#x}: {why}; the image can be read, \
             but not be written",
            table_offset.saturating_add(index as u64 * 8)
        ),
    )
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Kind {
    Header,
    L1,
    RefcountTable,
    RefcountBlock,
    L2,
    /// Named by an L1 entry without COPIED: it may be named by several, and is copied on write.
    SharedL2,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Header => "header",
            Kind::L1 => "L1 table",
            Kind::RefcountTable => "refcount table",
            Kind::RefcountBlock => "refcount block",
            Kind::L2 | Kind::SharedL2 => "L2 table",
        }
    }
}
