//! [`MetadataSet`]: which host clusters hold metadata, so that no data is written over it.

use std::collections::BTreeSet;
use std::ops::Range;

use block::Storage;

use super::{ImageMeta, read_snapshots};
use crate::edit::check_l1;
use crate::format::{Geometry, L1Entry, decode_refcount_table_entry};
use crate::{Error, Result};

/// The host clusters of header, tables and blocks. Built when an image is opened for writing; the
/// datapath asks it when it loads an L2 table, so that an entry of a damaged or hostile image
/// that points at metadata is found before a guest's data goes there.
#[derive(Clone, Debug, Default)]
pub struct MetadataSet {
    /// Sorted, each once.
    initial: Vec<u64>,
    /// Of snapshots' tables and of bitmaps: sorted and apart.
    others: Vec<Range<u64>>,
    added: BTreeSet<u64>,
    /// Of `initial` and `added`.
    sieve: Sieve,
}

/// A bit for each of many places, over which clusters are scattered: where it is 0 there is none of the
/// set. So most questions, which come for each entry of a table, need no search.
#[derive(Clone, Debug, Default)]
struct Sieve {
    bits: Box<[u64]>,
    /// How far a scattered number is shifted to be one of a bit.
    shift: u32,
}

impl Sieve {
    /// A sixteenth of the bits are set, or fewer: at least 4 KiB, at most 1 MiB of them.
    fn of(clusters: &[u64]) -> Sieve {
        let order = (clusters.len() * 16).next_power_of_two().clamp(1 << 15, 1 << 23).ilog2();
        let mut sieve = Sieve { bits: vec![0; 1 << (order - 6)].into(), shift: 64 - order };
        clusters.iter().for_each(|&c| sieve.insert(c));
        sieve
    }

    #[inline]
    fn place(&self, cluster: u64) -> (usize, u64) {
        // Clusters that lie side by side, or at equal distances, come to places far apart.
        let bit = cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> self.shift;
        ((bit >> 6) as usize, 1 << (bit & 63))
    }

    fn insert(&mut self, cluster: u64) {
        let (at, bit) = self.place(cluster);
        if let Some(bits) = self.bits.get_mut(at) {
            *bits |= bit;
        }
    }

    /// Whether the set may hold a cluster. One that holds none has no bits.
    #[inline]
    fn may_hold(&self, cluster: u64) -> bool {
        let (at, bit) = self.place(cluster);
        self.bits.get(at).is_some_and(|bits| bits & bit != 0)
    }
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
        let sieve = Sieve::of(&initial);
        Ok(MetadataSet { initial, sieve, ..MetadataSet::default() })
    }

    /// The same, with the snapshot table and the L1 tables of snapshots.
    ///
    /// # Errors
    /// As for [`MetadataSet::new`], or if the snapshot table makes no sense or cannot be read.
    pub(crate) fn with_snapshots(
        image: &ImageMeta,
        storage: &mut dyn Storage,
    ) -> Result<MetadataSet> {
        let mut set = MetadataSet::new(image)?;
        let (snapshots, len) = read_snapshots(storage, &image.name, &image.header)?;
        let mut places = vec![(image.header.snapshots_offset, len)];
        for s in &snapshots {
            check_l1(image, s, storage.len())?;
            places.push((s.l1_table_offset, u64::from(s.l1_size) * 8));
        }
        match set.add(&image.geometry, &places) {
            true => Ok(set),
            false => Err(Error::refused(
                &image.name,
                "tables of its snapshots lie over each other or over other tables; the image can \
                 be read, but not be written",
            )),
        }
    }

    /// Whether this host cluster (a number, not an offset) holds metadata.
    pub fn contains(&self, cluster: u64) -> bool {
        let found =
            || self.initial.binary_search(&cluster).is_ok() || self.added.contains(&cluster);
        self.in_others(&(cluster..cluster.saturating_add(1)))
            || (self.sieve.may_hold(cluster) && found())
    }

    /// Whether any of these host clusters holds metadata.
    pub fn meets_any(&self, clusters: &Range<u64>) -> bool {
        self.in_others(clusters) || self.meets(clusters)
    }

    fn in_others(&self, clusters: &Range<u64>) -> bool {
        let at = self.others.partition_point(|r| r.end <= clusters.start);
        self.others.get(at).is_some_and(|r| r.start < clusters.end)
    }

    /// Adds places (offset and length) that nothing else may use. Whether nothing does; else the set
    /// stays as it was.
    pub(crate) fn add(&mut self, g: &Geometry, places: &[(u64, u64)]) -> bool {
        let range = |&(offset, len): &(u64, u64)| {
            let first = g.cluster(offset);
            first..first + g.clusters_for(len)
        };
        let new: Vec<Range<u64>> = places.iter().filter(|p| p.1 > 0).map(range).collect();
        if new.iter().any(|r| self.meets(r)) {
            return false;
        }
        let mut all = [&self.others[..], &new].concat();
        all.sort_unstable_by_key(|r| r.start);
        if all.windows(2).any(|w| w[0].end > w[1].start) {
            return false;
        }
        all.dedup_by(|next, kept| {
            let joined = kept.end == next.start;
            if joined {
                kept.end = next.end;
            }
            joined
        });
        self.others = all;
        true
    }

    /// Whether any of these clusters holds metadata, but for what was added by [`MetadataSet::add`].
    fn meets(&self, clusters: &Range<u64>) -> bool {
        let at = self.initial.partition_point(|&c| c < clusters.start);
        self.initial.get(at).is_some_and(|&c| c < clusters.end)
            || self.added.range(clusters.clone()).next().is_some()
    }

    /// Adds a cluster that became metadata.
    pub fn insert(&mut self, cluster: u64) {
        if self.sieve.bits.is_empty() {
            self.sieve = Sieve::of(&self.initial);
        }
        self.sieve.insert(cluster);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sieve_lets_nothing_pass_that_is_metadata_and_keeps_back_most_of_the_rest() {
        // As the L2 tables of an image that was made at once lie, and some that came later.
        let initial: Vec<u64> = (0..2048).map(|n| n * 8193 + 5).collect();
        let sieve = Sieve::of(&initial);
        let others = vec![100..107, 9000..9001];
        let mut set = MetadataSet { initial, others, sieve, ..MetadataSet::default() };
        (0..500).for_each(|n| set.insert(3_000_000 + n * 3));
        let slow = |set: &MetadataSet, c: u64| {
            set.initial.contains(&c)
                || set.added.contains(&c)
                || set.others.iter().any(|r| r.contains(&c))
        };
        let mut searched = 0;
        for c in (0..20_000).chain(2_999_000..3_003_000).chain([u64::MAX]) {
            assert_eq!(set.contains(c), slow(&set, c), "{c}");
            let end = c.saturating_add(3);
            let any = (c..end).any(|c| slow(&set, c));
            assert_eq!(set.meets_any(&(c..end)), any, "{c}");
            searched += u32::from(set.sieve.may_hold(c) && !slow(&set, c));
        }
        assert!(searched < 2400, "{searched} of 24,000 searched in vain");
        let mut empty = MetadataSet::default();
        assert!(!empty.contains(7) && !empty.contains(u64::MAX));
        empty.insert(7);
        assert!(empty.contains(7) && !empty.contains(8));
    }
}
