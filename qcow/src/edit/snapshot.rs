//! Internal snapshots: making, applying and deleting one.
//!
//! A new snapshot gets the active L1 table as it stands, and all that it leads to counts one
//! reference more; the active disk goes on with a new L1 table, and with copies of those L2 tables
//! in which COPIED flags must be cleared.

use block::Storage;

use super::table::{SnapshotKey, check_l1, join, raw_entries};
use super::tree::{Way, check_l1_words};
use super::tx::{Place, Tx, run};
use crate::format::{Geometry, MAX_SNAPSHOTS, Snapshot};
use crate::open::read_word_table;
use crate::{Error, Result};

/// Longest name that a new snapshot may have; QEMU cuts longer ones.
const MAX_NAME: usize = 255;

/// Takes a snapshot of the disk. `taken` is the time since 1970. Returns its ID: a number above all
/// others, as in QEMU. Names need not be unique.
///
/// # Errors
/// If the name is empty or longer than 255 bytes, there are too many snapshots, refcounts are too
/// narrow, there is no room, or a write fails. The image is as it was then.
pub fn create_snapshot(
    st: &mut dyn Storage,
    name: &str,
    snapshot: &str,
    taken: std::time::Duration,
) -> Result<String> {
    if snapshot.is_empty() || snapshot.len() > MAX_NAME {
        let reason = format!("a snapshot's name has 1 to {MAX_NAME} bytes");
        return Err(Error::refused(name, reason));
    }
    run(st, name, |tx, st| {
        if tx.geometry().data_file() {
            let reason = "has an external data file, and so cannot have internal snapshots";
            return Err(tx.refused(reason));
        }
        let (all, mut entries) = raw_entries(st, name, &tx.meta.header)?;
        if all.len() >= MAX_SNAPSHOTS as usize {
            return Err(tx.refused(format!("has {MAX_SNAPSHOTS} snapshots, the most possible")));
        }
        let id = next_id(&all);
        let header = &tx.meta.header;
        let new = Snapshot {
            l1_table_offset: header.l1_table_offset,
            l1_size: header.l1_size,
            id: id.clone(),
            name: snapshot.to_owned(),
            date_sec: u32::try_from(taken.as_secs()).unwrap_or(u32::MAX),
            date_nsec: taken.subsec_nanos(),
            vm_clock_nsec: 0,
            vm_state_size: 0,
            disk_size: Some(header.size),
            icount: Some(0),
        };
        entries.push(new.encode());
        let l1 = tx.meta.l1.clone();
        tx.count_tree(st, &l1, Way::Up)?;
        tx.keep_old_l1 = true;
        tx.snapshots = Some(join(name, &entries)?);
        Ok(id)
    })
    .map(|(id, _)| id)
}

/// One more than the largest ID that is a number.
fn next_id(all: &[Snapshot]) -> String {
    let number = |s: &Snapshot| {
        let digits: String = s.id.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().unwrap_or(0)
    };
    let largest = all.iter().map(number).max().unwrap_or(0);
    let mut id = largest.wrapping_add(1).to_string();
    // A hostile table may hold the largest number there is.
    while all.iter().any(|s| s.id == id) {
        id.push('0');
    }
    id
}

/// Makes the disk what it was when the snapshot was taken, its size included. What it held is lost.
///
/// # Errors
/// If there is no such snapshot, the image has bitmaps, refcounts are too narrow, there is no room,
/// or a write fails. The image is as it was then.
pub fn apply_snapshot(st: &mut dyn Storage, name: &str, key: SnapshotKey<'_>) -> Result<()> {
    run(st, name, |tx, st| {
        if !tx.bitmaps.is_empty() {
            return Err(tx.refused(
                "has persistent bitmaps, which would not know what changed; remove them first",
            ));
        }
        let (_, snapshot) = super::find_snapshot(st, name, &tx.meta.header, key)?;
        let mut l1 = snapshot_l1(tx, st, &snapshot)?;
        let size = snapshot.disk_size.unwrap_or(tx.meta.header.size);
        let g = size_of(tx, &snapshot, size)?;
        // Up first: so nothing is free in between that is used afterwards.
        tx.count_tree(st, &l1, Way::Up)?;
        let old = std::mem::take(&mut tx.meta.l1);
        tx.count_tree(st, &old, Way::Down)?;
        l1.resize(l1.len().max(g.l1_entries() as usize), 0);
        tx.meta.l1 = l1;
        tx.l1_changed = true;
        // A snapshot's tables may have flags from the time before it was taken.
        tx.counts.flags_moved = true;
        tx.compact = true;
        tx.meta.header.size = size;
        tx.meta.geometry = g;
        Ok(())
    })
    .map(|_| ())
}

/// Deletes a snapshot.
///
/// # Errors
/// If there is no such snapshot, there is no room for changed tables, or a write fails. The image
/// is as it was then.
pub fn delete_snapshot(st: &mut dyn Storage, name: &str, key: SnapshotKey<'_>) -> Result<()> {
    run(st, name, |tx, st| {
        let (_, mut entries) = raw_entries(st, name, &tx.meta.header)?;
        let (at, snapshot) = super::find_snapshot(st, name, &tx.meta.header, key)?;
        let l1 = snapshot_l1(tx, st, &snapshot)?;
        tx.count_tree(st, &l1, Way::Down)?;
        let len = u64::from(snapshot.l1_size) * 8;
        tx.free(st, Place { offset: snapshot.l1_table_offset, len })?;
        entries.remove(at);
        tx.compact = true;
        tx.snapshots = Some(join(name, &entries)?);
        Ok(())
    })
    .map(|_| ())
}

/// Reads a snapshot's L1 table.
fn snapshot_l1(tx: &Tx, st: &mut dyn Storage, s: &Snapshot) -> Result<Vec<u64>> {
    check_l1(&tx.meta, s, st.len())?;
    let len = u64::from(s.l1_size) * 8;
    let words = read_word_table(st, &tx.meta.name, "snapshot's L1 table", s.l1_table_offset, len)?;
    check_l1_words(&tx.meta, &words)?;
    Ok(words)
}

/// The image's sizes with a disk as the snapshot had it.
fn size_of(tx: &Tx, s: &Snapshot, size: u64) -> Result<Geometry> {
    let new = Some(tx.meta.geometry.with_size(size));
    new.filter(|g| size <= i64::MAX as u64 && g.l1_entries() * 8 <= crate::format::MAX_L1_BYTES)
        .ok_or_else(|| {
            tx.refused(format!("snapshot {:?} claims an impossible disk of {size} bytes", s.name))
        })
}
