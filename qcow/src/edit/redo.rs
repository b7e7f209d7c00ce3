//! [`redo`]: puts in what a process that died had answered and not written.

use std::collections::BTreeMap;

use block::Storage;

use super::tx;
use crate::Result;
use crate::format::{L2Entry, RawL2};
use crate::run::Change;

/// Puts changed L2 entries into an image, in one step: what [`crate::run::Journal::read`] found when the
/// process that served the image had died. Entries that are on disk already stay as they are. Before
/// anything else is done to the image: new data lies in clusters that no refcount counts.
///
/// # Errors
/// If an entry is none or lies behind the disk, if the image has to be repaired first, or a write
/// fails; then it is as it was.
pub fn redo(st: &mut dyn Storage, name: &str, changes: &[Change]) -> Result<()> {
    // The last one counts.
    let last: BTreeMap<u64, RawL2> =
        changes.iter().map(|c| (c.cluster, RawL2 { word: c.word, bitmap: c.bitmap })).collect();
    if last.is_empty() {
        return Ok(());
    }
    let redone = tx::run(st, name, |tx, st| {
        let g = tx.geometry();
        let mut all: Vec<(u64, L2Entry)> = Vec::with_capacity(last.len());
        let mut used = Vec::new();
        for (&cluster, &raw) in &last {
            let guest = cluster.checked_mul(g.cluster_size()).filter(|&guest| guest < g.size());
            let guest = guest.ok_or_else(|| tx.refused("a journal names what is not there"))?;
            let entry = tx.l2_entry(raw)?;
            let alone = entry.host_cluster().is_some_and(|(_, copied)| copied);
            used.extend(tx.clusters_of(entry).map(|cluster| (cluster, alone)));
            all.push((guest, entry));
        }
        // First all of them: no table may take such a cluster for a free one.
        tx.counts.adopt(st, &used)?;
        for (guest, entry) in all {
            tx.set_entry(st, guest, entry)?;
        }
        Ok(())
    });
    redone.map(|_| ())
}
