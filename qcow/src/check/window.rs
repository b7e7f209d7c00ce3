//! Reference counts of a range of host clusters.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::format::Geometry;

/// Clusters in a window: 64 MiB of counts. A multiple of the refcounts in any refcount block.
pub(super) const WINDOW: u64 = 1 << 25;

/// How often each cluster of a window is referred to.
pub(super) struct Window {
    first: u64,
    counts: Vec<u16>,
    /// Counts from `u16::MAX` on.
    large: BTreeMap<usize, u64>,
    /// One bit a cluster: its refcount on disk is exactly one.
    ones: Vec<u64>,
}

impl Window {
    /// Counts of these clusters, all 0.
    pub(super) fn new(clusters: Range<u64>) -> Window {
        let len = (clusters.end - clusters.start) as usize;
        Window {
            first: clusters.start,
            counts: vec![0; len],
            large: BTreeMap::new(),
            ones: vec![0; len.div_ceil(64)],
        }
    }

    /// The clusters.
    pub(super) fn range(&self) -> Range<u64> {
        self.first..self.first + self.counts.len() as u64
    }

    fn index(&self, cluster: u64) -> Option<usize> {
        let index = cluster.checked_sub(self.first)? as usize;
        (index < self.counts.len()).then_some(index)
    }

    /// Adds references to a cluster, if it lies in the window.
    #[inline]
    pub(super) fn add(&mut self, cluster: u64, times: u64) {
        let Some(index) = self.index(cluster) else { return };
        let sum = u64::from(self.counts[index]).saturating_add(times);
        if sum < u64::from(u16::MAX) {
            self.counts[index] = sum as u16;
        } else {
            self.counts[index] = u16::MAX;
            let old = u64::from(u16::MAX) - (sum - times).min(u64::from(u16::MAX));
            let large = self.large.entry(index).or_insert(u64::from(u16::MAX) - old);
            *large = large.saturating_add(times);
        }
    }

    /// The references to a cluster; 0 outside of the window.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let Some(index) = self.index(cluster) else { return 0 };
        match self.counts[index] {
            u16::MAX => self.large.get(&index).copied().unwrap_or(u64::from(u16::MAX)),
            n => u64::from(n),
        }
    }

    /// Notes that the cluster's refcount on disk is exactly one.
    pub(super) fn set_one(&mut self, cluster: u64) {
        if let Some(index) = self.index(cluster) {
            self.ones[index / 64] |= 1 << (index % 64);
        }
    }

    /// Whether the cluster's refcount on disk is exactly one; `None` outside of the window.
    #[inline]
    pub(super) fn is_one(&self, cluster: u64) -> Option<bool> {
        let index = self.index(cluster)?;
        Some(self.ones[index / 64] & (1 << (index % 64)) != 0)
    }

    /// The same of a guest cluster by its offset. One in an external data file, of which there is one
    /// each, belongs to the first window.
    pub(super) fn is_one_at(&self, host: u64, g: &Geometry) -> Option<bool> {
        match g.data_file() {
            true => (self.first == 0).then_some(true),
            false => self.is_one(g.cluster(host)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_exact_past_the_small_ones() {
        let mut w = Window::new(100..200);
        w.add(99, 1);
        w.add(200, 1);
        for n in [1, 65533, 1, 1, 10, u64::from(u32::MAX)] {
            w.add(150, n);
        }
        w.add(151, 65534);
        w.add(152, 65535);
        w.add(153, 65536);
        assert_eq!(w.get(150), 65546 + u64::from(u32::MAX));
        assert_eq!((w.get(151), w.get(152), w.get(153)), (65534, 65535, 65536));
        assert_eq!((w.get(99), w.get(200), w.get(149)), (0, 0, 0));
        w.add(150, u64::MAX);
        assert_eq!(w.get(150), u64::MAX);
        w.set_one(164);
        w.set_one(99);
        assert_eq!((w.is_one(164), w.is_one(165), w.is_one(99)), (Some(true), Some(false), None));
    }
}
