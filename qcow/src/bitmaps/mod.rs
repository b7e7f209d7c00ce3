//! Persistent bitmaps ("Bitmaps extension"): the directory, the tables, and reading the bits of
//! one. Control path; changing them offline is [`crate::edit`]'s, recording what guests write is
//! the datapath's.

mod bits;
mod tracked;

pub use bits::{Bitmap, BitmapRun};
pub(crate) use bits::{all_set, fill, inconsistent};
pub(crate) use tracked::{Tracked, prepare};

use std::collections::HashSet;

use block::Storage;
use serde::Serialize;

use crate::format::{
    BitmapCluster, BitmapEntry, FieldError, Geometry, Header, MAX_BITMAP_DIRECTORY, MAX_BITMAPS,
    autoclear,
};
use crate::open::read_word_table;
use crate::{Error, Result};

/// Most bytes of bitmaps' tables that are held in memory together. Those of a terabyte have a few
/// hundred; a hostile sparse file could ask for any number.
pub(crate) const MAX_TABLE_BYTES: u64 = 16 << 20;

/// A persistent bitmap, with the field names of `qemu-img info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BitmapInfo {
    /// "in-use" if it was not saved, so that its bits mean nothing; "auto" if it records writes.
    pub flags: Vec<&'static str>,
    /// Its name.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
}

/// The bitmaps for `image info`.
pub(crate) fn list(st: &mut dyn Storage, name: &str, header: &Header) -> Result<Vec<BitmapInfo>> {
    let describe = |e: BitmapEntry| {
        let flags = [(BitmapEntry::IN_USE, "in-use"), (BitmapEntry::AUTO, "auto")];
        BitmapInfo {
            flags: flags.into_iter().filter(|f| e.flags & f.0 != 0).map(|f| f.1).collect(),
            name: e.shown_name(),
            granularity: 1u64.checked_shl(e.granularity_bits.into()).unwrap_or(0),
        }
    };
    Ok(read_directory(st, name, header)?.into_iter().map(describe).collect())
}

/// Reads the bitmap directory. Without the feature bit that vouches for it there are no bitmaps.
/// What entries say is not compared with anything yet.
///
/// # Errors
/// If the directory does not fit the file or its entries do not fill it.
pub(crate) fn read_directory(
    st: &mut dyn Storage,
    name: &str,
    header: &Header,
) -> Result<Vec<BitmapEntry>> {
    let vouched = header.autoclear_features & autoclear::BITMAPS != 0;
    let Some(place) = header.bitmaps().filter(|_| vouched) else { return Ok(Vec::new()) };
    let (offset, size) = (place.directory_offset, place.directory_size);
    let bad = |what: &str, found: u64, allowed: String| {
        let what = format!("bitmaps extension field {what}");
        Error::field(name, FieldError::new(what, offset, found, allowed))
    };
    let g = header.geometry();
    let end = g.round_up(st.len()).unwrap_or(u64::MAX);
    if size > MAX_BITMAP_DIRECTORY || offset.checked_add(size).is_none_or(|e| e > end) {
        let allowed = format!(
            "the directory must end inside the file and have at most {MAX_BITMAP_DIRECTORY} bytes"
        );
        return Err(bad("bitmap_directory_size", size, allowed));
    }
    if offset == 0 || g.in_cluster(offset) != 0 {
        let allowed = "the directory must start a cluster behind the header".to_owned();
        return Err(bad("bitmap_directory_offset", offset, allowed));
    }
    // Each entry has 24 bytes at least.
    let most = (size / 24).min(MAX_BITMAPS.into());
    if u64::from(place.count) > most || place.count == 0 {
        let allowed = format!("a directory of {size} bytes has 1 to {most} entries");
        return Err(bad("nb_bitmaps", place.count.into(), allowed));
    }
    let mut directory = vec![0; size as usize];
    st.read_at(offset, &mut directory).map_err(Error::io(name, "bitmap directory"))?;
    let mut all = Vec::new();
    let mut at = 0;
    for _ in 0..place.count {
        let entry = BitmapEntry::parse(&directory[at..], offset + at as u64)
            .map_err(|e| Error::field(name, e))?;
        at += entry.encoded_len();
        all.push(entry);
    }
    if at != directory.len() {
        let allowed = format!("its {} entries have {at} bytes", place.count);
        return Err(bad("bitmap_directory_size", size, allowed));
    }
    Ok(all)
}

/// Reads the table of an entry that passed [`BitmapEntry::check`]. `left`: how many bytes tables may
/// have still.
///
/// # Errors
/// If it does not fit the file, or names what cannot be.
pub(crate) fn read_table(
    st: &mut dyn Storage,
    name: &str,
    g: &Geometry,
    entry: &BitmapEntry,
    left: &mut u64,
) -> Result<Vec<BitmapCluster>> {
    let bytes = u64::from(entry.table_size) * 8;
    let end = g.round_up(st.len()).unwrap_or(u64::MAX);
    let bad = |found: String, allowed: String| {
        let what = format!("table of bitmap {:?}", entry.shown_name());
        Error::field(name, FieldError::new(what, entry.table_offset, found, allowed))
    };
    if entry.table_offset.checked_add(bytes).is_none_or(|e| e > end) {
        let allowed = format!("it must end inside the file, at or before {end:#x}");
        return Err(bad(format!("{bytes} bytes long"), allowed));
    }
    *left = left.checked_sub(bytes).ok_or_else(|| {
        let allowed = format!("at most {MAX_TABLE_BYTES} for all bitmaps together");
        bad(format!("{bytes} bytes long"), allowed)
    })?;
    let words = read_word_table(st, name, "bitmap table", entry.table_offset, bytes)?;
    let decode = |(i, raw): (usize, u64)| match BitmapCluster::decode(raw, g) {
        Some(BitmapCluster::Data(offset)) if offset >= end => {
            Err(bad(format!("entry {i} is {raw:#x}"), format!("the file ends at {end:#x}")))
        }
        Some(cluster) => Ok(cluster),
        None => Err(bad(format!("entry {i} is {raw:#x}"), "offsets of clusters".to_owned())),
    };
    words.into_iter().enumerate().map(decode).collect()
}

/// All bitmaps with their tables.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bitmaps {
    /// Entry and table, in the directory's order. Those that were not saved have a table, too.
    pub(crate) all: Vec<(BitmapEntry, Vec<BitmapCluster>)>,
}

impl Bitmaps {
    /// Reads directory and tables, strictly.
    ///
    /// # Errors
    /// If anything about them is impossible.
    pub(crate) fn read(st: &mut dyn Storage, name: &str, header: &Header) -> Result<Bitmaps> {
        let g = header.geometry();
        let mut left = MAX_TABLE_BYTES;
        let mut names = HashSet::new();
        let mut all = Vec::new();
        for entry in read_directory(st, name, header)? {
            let bad = |why: &str| {
                let reason = format!("bitmap {:?} cannot be: {why}", entry.shown_name());
                Error::refused(name, reason)
            };
            entry.check(&g).map_err(|why| bad(&why))?;
            if !names.insert(entry.name.clone()) {
                return Err(bad("there is another one of that name"));
            }
            let table = read_table(st, name, &g, &entry, &mut left)?;
            all.push((entry, table));
        }
        Ok(Bitmaps { all })
    }

    /// Where they stand, as (offset, length): the directory, tables, and clusters of bits.
    pub(crate) fn places(&self, header: &Header) -> Vec<(u64, u64)> {
        let cluster = header.geometry().cluster_size();
        let mut places = Vec::new();
        if let Some(b) = header.bitmaps().filter(|_| !self.all.is_empty()) {
            places.push((b.directory_offset, b.directory_size));
        }
        for (entry, table) in &self.all {
            places.push((entry.table_offset, u64::from(entry.table_size) * 8));
            places.extend(data_places(table, cluster));
        }
        places
    }
}

/// Where a table's clusters of bits stand, as (offset, length).
pub(crate) fn data_places(table: &[BitmapCluster], cluster: u64) -> Vec<(u64, u64)> {
    let mut places: Vec<(u64, u64)> = Vec::new();
    for entry in table {
        let BitmapCluster::Data(offset) = *entry else { continue };
        match places.last_mut() {
            Some(last) if last.0 + last.1 == offset => last.1 += cluster,
            _ => places.push((offset, cluster)),
        }
    }
    places
}
