//! The snapshot table: entries kept byte for byte, finding one, and where its L1 table may lie.

use block::Storage;

use crate::format::{FieldError, Header, MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, Snapshot};
use crate::open::{ImageMeta, read_snapshots};
use crate::{Error, Result};

/// How a snapshot is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotKey<'a> {
    /// By its ID, else by its name.
    IdOrName(&'a str),
    /// By its name, else by its ID.
    NameOrId(&'a str),
    /// By its ID only.
    Id(&'a str),
    /// By its name only.
    Name(&'a str),
}

impl SnapshotKey<'_> {
    /// The first snapshot that is meant.
    pub(crate) fn find(&self, all: &[Snapshot]) -> Option<usize> {
        let id = |id: &str| all.iter().position(|s| s.id == id);
        let name = |name: &str| all.iter().position(|s| s.name == name);
        match *self {
            SnapshotKey::IdOrName(key) => id(key).or_else(|| name(key)),
            SnapshotKey::NameOrId(key) => name(key).or_else(|| id(key)),
            SnapshotKey::Id(key) => id(key),
            SnapshotKey::Name(key) => name(key),
        }
    }

    fn text(&self) -> &str {
        match self {
            SnapshotKey::IdOrName(t)
            | SnapshotKey::NameOrId(t)
            | SnapshotKey::Id(t)
            | SnapshotKey::Name(t) => t,
        }
    }
}

/// Finds an internal snapshot: its place in the table, and what the table says.
///
/// # Errors
/// If there is none, or the table cannot be read.
pub fn find_snapshot(
    st: &mut dyn Storage,
    name: &str,
    header: &Header,
    key: SnapshotKey<'_>,
) -> Result<(usize, Snapshot)> {
    let (mut all, _) = read_snapshots(st, name, header)?;
    match key.find(&all) {
        Some(at) => Ok((at, all.swap_remove(at))),
        None => Err(Error::refused(name, format!("has no snapshot {:?}", key.text()))),
    }
}

/// Refuses a snapshot whose L1 table lies where none can be.
pub(crate) fn check_l1(meta: &ImageMeta, s: &Snapshot, file_len: u64) -> Result<()> {
    let g = &meta.geometry;
    let bytes = u64::from(s.l1_size) * 8;
    let end = g.round_up(file_len).unwrap_or(u64::MAX);
    let fits = s.l1_table_offset.checked_add(bytes).is_some_and(|e| e <= end);
    if bytes == 0
        || (bytes <= MAX_L1_BYTES
            && fits
            && g.in_cluster(s.l1_table_offset) == 0
            && s.l1_table_offset != 0)
    {
        return Ok(());
    }
    Err(Error::field(
        &meta.name,
        FieldError::new(
            format!("L1 table of snapshot {} ({:?})", s.id, s.name),
            s.l1_table_offset,
            format!("{bytes} bytes long"),
            format!(
                "it must start a cluster, have at most {MAX_L1_BYTES} bytes and end inside the \
                 file, at or before {end:#x}"
            ),
        ),
    ))
}

/// The entries as they stand in the table, padding included.
pub(super) fn raw_entries(
    st: &mut dyn Storage,
    name: &str,
    header: &Header,
) -> Result<(Vec<Snapshot>, Vec<Vec<u8>>)> {
    let (snapshots, len) = read_snapshots(st, name, header)?;
    let mut bytes = vec![0; len as usize];
    st.read_at(header.snapshots_offset, &mut bytes).map_err(Error::io(name, "snapshot table"))?;
    let mut entries = Vec::with_capacity(snapshots.len());
    let mut at = 0;
    for _ in &snapshots {
        let offset = header.snapshots_offset + at as u64;
        let len = Snapshot::entry_len(&bytes[at..], offset).map_err(|e| Error::field(name, e))?;
        let entry = bytes.get(at..at + len as usize);
        entries.push(entry.map(<[u8]>::to_vec).unwrap_or_default());
        at += len as usize;
    }
    Ok((snapshots, entries))
}

/// The table of these entries.
pub(super) fn join(name: &str, entries: &[Vec<u8>]) -> Result<(u32, Vec<u8>)> {
    let bytes = entries.concat();
    if bytes.len() as u64 > MAX_SNAPSHOT_TABLE_BYTES {
        let reason = format!("its snapshot table would exceed {MAX_SNAPSHOT_TABLE_BYTES} bytes");
        return Err(Error::refused(name, reason));
    }
    Ok((entries.len() as u32, bytes))
}
