//! [`redo`]: puts in what a process that died had answered and not written.

use std::collections::BTreeMap;

use block::Storage;

use super::tx::{self, Tx};
use crate::Result;
use crate::format::{Geometry, L2Entry, RawL2};
use crate::run::Changes;

/// Puts changed L2 entries into an image, in one step: what [`crate::run::Journal::read`] found when the
/// process that served the image had died. Entries that are on disk already stay as they are, so this
/// can be done again. Before anything else is done to the image: new data lies in clusters that no
/// refcount counts.
///
/// If somebody else has written to the image since, those clusters may be another's by now. Each that
/// is not mapped yet must be free of that: it lies in the file, and nothing else refers to it. And the
/// image must have the size, the snapshots, the backing file and the L1 table that it had.
///
/// # Errors
/// If it is not as it was, an entry is none or lies behind the disk, if the image has to be repaired
/// first, or a write fails; then it is as it was.
pub fn redo(st: &mut dyn Storage, name: &str, changes: &Changes) -> Result<()> {
    // The last one counts.
    let last: BTreeMap<u64, RawL2> = changes
        .list
        .iter()
        .map(|c| (c.cluster, RawL2 { word: c.word, bitmap: c.bitmap }))
        .collect();
    if last.is_empty() {
        return Ok(());
    }
    let redone = tx::run(st, name, |tx, st| {
        let g = tx.geometry();
        let same = tx.meta.shape() == changes.shape;
        let mut all: Vec<(u64, L2Entry)> = Vec::with_capacity(last.len());
        for (&cluster, &raw) in &last {
            let guest = cluster.checked_mul(g.cluster_size()).filter(|&guest| guest < g.size());
            let guest = guest.ok_or_else(|| tx.refused("a journal names what is not there"))?;
            let entry = tx.l2_entry(raw)?;
            if tx.entry(st, guest)? != entry {
                all.push((guest, entry));
            }
        }
        if !all.is_empty() && !same {
            return Err(changed(tx));
        }
        let used = check_places(tx, st, &last, &all)?;
        // First all of them: no table may take such a cluster for a free one.
        tx.counts.adopt(st, &used)?;
        for (guest, entry) in all {
            tx.set_entry(st, guest, entry)?;
        }
        Ok(())
    });
    redone.map(|_| ())
}

fn changed(tx: &Tx) -> crate::Error {
    tx.refused(
        "has been changed by others since the process that served it died, and what that had not \
         written yet cannot be put in any more",
    )
}

/// Refuses places that are, or may be, somebody else's by now. Answers the clusters that the others are
/// in.
fn check_places(
    tx: &mut Tx,
    st: &mut dyn Storage,
    last: &BTreeMap<u64, RawL2>,
    all: &[(u64, L2Entry)],
) -> Result<Vec<u64>> {
    let g = tx.geometry();
    let mut places: BTreeMap<u64, u64> = BTreeMap::new();
    let (len, mut counted) = (st.len(), false);
    for &(guest, entry) in all {
        let before = tx.entry(st, guest)?.host_cluster();
        // A running image changes no entry to what is shared; of one that is, subclusters may read as
        // zeroes now.
        let host = match (entry, entry.host_cluster()) {
            _ if g.data_file() => continue,
            (L2Entry::Compressed { .. }, _) => return Err(changed(tx)),
            (_, place @ Some((_, false))) if place != before => return Err(changed(tx)),
            (_, None | Some((_, false))) => continue,
            (_, Some((host, true))) => host,
        };
        let shared = before.is_some_and(|(place, copied)| place == host && !copied);
        if shared || host >= len || places.insert(host, guest).is_some() {
            return Err(changed(tx));
        }
        counted |= tx.counts.get(st, g.cluster(host))? > 0;
    }
    // Whoever refers to a cluster has counted it before.
    let tables = if counted { tx.meta.l1.len() } else { 0 };
    for index in 0..tables {
        let Some(words) = tx.words(st, index)? else { continue };
        let (n, first) = (g.l2_entries(), (index * g.l2_entries()) as u64);
        let other = |i: usize| {
            let cluster = first + i as u64;
            let raw = last.get(&cluster).copied().unwrap_or_else(|| RawL2::of(words, i, &g));
            let mine = place(raw, &g).and_then(|host| places.get(&host));
            mine.is_some_and(|&guest| guest != cluster << g.cluster_bits())
        };
        if (0..n).any(other) {
            return Err(changed(tx));
        }
    }
    Ok(places.into_keys().map(|host| g.cluster(host)).collect())
}

fn place(raw: RawL2, g: &Geometry) -> Option<u64> {
    L2Entry::decode(raw, g).ok()?.host_cluster().map(|(host, _)| host)
}
