//! Where the first-level tables lie: checked against the file and each other, then loaded.

use block::Storage;

use super::{ImageMeta, Mode};
use crate::format::{FieldError, Geometry, Header, MAX_SNAPSHOT_TABLE_BYTES, Snapshot};
use crate::{Error, Result};

/// A table in the file.
struct Place {
    what: &'static str,
    /// The header field that says where it is.
    field: &'static str,
    /// Where that field stands.
    field_at: u64,
    offset: u64,
    len: u64,
}

impl Place {
    /// Checks that the table is aligned, behind the header and inside the file. `end` is the
    /// file's end, rounded up to a cluster.
    fn check(&self, geometry: &Geometry, end: u64) -> Result<(), FieldError> {
        let bad = |allowed: String| {
            let what = format!("header field {}", self.field);
            FieldError::new(what, self.field_at, format!("{:#x}", self.offset), allowed)
        };
        let cluster = geometry.cluster_size();
        if geometry.in_cluster(self.offset) != 0 || self.offset == 0 {
            return Err(bad(format!(
                "multiples of the cluster size {cluster} above 0 are possible"
            )));
        }
        match self.offset.checked_add(self.len) {
            Some(table_end) if table_end <= end => Ok(()),
            _ => Err(bad(format!(
                "the {} of {} bytes must end inside the file, at or before {end:#x}",
                self.what, self.len
            ))),
        }
    }
}

fn l1_place(header: &Header) -> Place {
    Place {
        what: "L1 table",
        field: "l1_table_offset",
        field_at: 40,
        offset: header.l1_table_offset,
        len: u64::from(header.l1_size) * 8,
    }
}

fn refcount_place(header: &Header) -> Place {
    Place {
        what: "refcount table",
        field: "refcount_table_offset",
        field_at: 48,
        offset: header.refcount_table_offset,
        len: u64::from(header.refcount_table_clusters) << header.cluster_bits,
    }
}

/// The snapshot table, with the smallest length it can have: its real one is known only after
/// reading it.
fn snapshot_place(header: &Header) -> Place {
    Place {
        what: "snapshot table",
        field: "snapshots_offset",
        field_at: 64,
        offset: header.snapshots_offset,
        len: u64::from(header.nb_snapshots) * Snapshot::FIXED_LEN as u64,
    }
}

fn check_refcount_table(header: &Header, g: &Geometry, end: u64) -> Result<(), FieldError> {
    if header.refcount_table_clusters == 0 {
        return Err(FieldError::new(
            "header field refcount_table_clusters",
            56,
            0,
            "an image needs at least 1",
        ));
    }
    refcount_place(header).check(g, end)
}

/// Checks the places of all tables and loads L1 and refcount table.
pub(super) fn load(
    storage: &mut dyn Storage,
    name: &str,
    mode: Mode,
    header: Header,
) -> Result<ImageMeta> {
    let geometry = header.geometry();
    let field = |e| Error::field(name, e);
    let end = geometry.round_up(storage.len()).unwrap_or(u64::MAX).min(i64::MAX as u64);

    if header.l1_size > 0 {
        l1_place(&header).check(&geometry, end).map_err(field)?;
    }
    let refcount_table_error = match check_refcount_table(&header, &geometry, end) {
        Err(e) if mode != Mode::Check => return Err(field(e)),
        result => result.err(),
    };
    if mode != Mode::Check {
        if header.nb_snapshots > 0 {
            snapshot_place(&header).check(&geometry, end).map_err(field)?;
        }
        check_overlaps(&header).map_err(field)?;
    }
    let l1 = read_words(storage, name, "L1 table", &l1_place(&header))?;
    let refcount_table = match refcount_table_error {
        None => read_words(storage, name, "refcount table", &refcount_place(&header))?,
        Some(_) => Vec::new(),
    };
    Ok(ImageMeta {
        name: name.to_owned(),
        mode,
        header,
        geometry,
        l1,
        refcount_table,
        refcount_table_error,
    })
}

/// Refuses tables that lie over each other. (None lies over the header: offset 0 was refused.)
fn check_overlaps(header: &Header) -> Result<(), FieldError> {
    let mut places = vec![l1_place(header), refcount_place(header)];
    if header.nb_snapshots > 0 {
        places.push(snapshot_place(header));
    }
    places.retain(|p| p.len > 0);
    places.sort_by_key(|p| p.offset);
    for pair in places.windows(2) {
        let (a, b) = (&pair[0], &pair[1]);
        if a.offset + a.len > b.offset {
            return Err(FieldError::new(
                format!("header field {}", b.field),
                b.field_at,
                format!("{:#x}", b.offset),
                format!(
                    "the {} must not lie over the {}, which takes {} bytes from {:#x}",
                    b.what, a.what, a.len, a.offset
                ),
            ));
        }
    }
    Ok(())
}

/// Reads a table of 8-byte words whose place was checked: its size is backed by the file and at
/// most 32 MiB.
fn read_words(
    storage: &mut dyn Storage,
    name: &str,
    what: &'static str,
    place: &Place,
) -> Result<Vec<u64>> {
    read_word_table(storage, name, what, place.offset, place.len)
}

/// Reads `len` bytes (checked by the caller, a multiple of 8) of big-endian words.
pub(crate) fn read_word_table(
    storage: &mut dyn Storage,
    name: &str,
    what: &'static str,
    offset: u64,
    len: u64,
) -> Result<Vec<u64>> {
    const PIECE: u64 = 1 << 20;
    let mut words = Vec::with_capacity((len / 8) as usize);
    let mut buffer = vec![0; len.min(PIECE) as usize];
    let mut at = 0;
    while at < len {
        let piece = &mut buffer[..(len - at).min(PIECE) as usize];
        storage.read_at(offset + at, piece).map_err(Error::io(name, what))?;
        words.extend(piece.as_chunks::<8>().0.iter().map(|w| u64::from_be_bytes(*w)));
        at += piece.len() as u64;
    }
    Ok(words)
}

/// Reads the snapshot table: the snapshots and its length in bytes.
///
/// # Errors
/// If it is not where it can be, larger than [`MAX_SNAPSHOT_TABLE_BYTES`], or cannot be read.
pub(crate) fn read_snapshots(
    storage: &mut dyn Storage,
    name: &str,
    header: &Header,
) -> Result<(Vec<Snapshot>, u64)> {
    if header.nb_snapshots == 0 {
        return Ok((Vec::new(), 0));
    }
    let geometry = header.geometry();
    let field = |e| Error::field(name, e);
    let end = geometry.round_up(storage.len()).unwrap_or(u64::MAX).min(i64::MAX as u64);
    snapshot_place(header).check(&geometry, end).map_err(field)?;

    let mut snapshots = Vec::new();
    let start = header.snapshots_offset;
    let mut at = start;
    for _ in 0..header.nb_snapshots {
        let mut fixed = [0; Snapshot::FIXED_LEN];
        storage.read_at(at, &mut fixed).map_err(Error::io(name, "snapshot table"))?;
        let len = Snapshot::entry_len(&fixed, at).map_err(field)?;
        let over = at - start + len > MAX_SNAPSHOT_TABLE_BYTES || at + len > end;
        if over {
            return Err(field(FieldError::new(
                "length of the snapshot table entry",
                at,
                len,
                format!(
                    "the table must end inside the file and be at most \
                     {MAX_SNAPSHOT_TABLE_BYTES} bytes long"
                ),
            )));
        }
        let mut entry = vec![0; len as usize];
        storage.read_at(at, &mut entry).map_err(Error::io(name, "snapshot table"))?;
        snapshots.push(Snapshot::parse(&entry, at).map_err(field)?);
        at += len;
    }
    Ok((snapshots, at - start))
}
