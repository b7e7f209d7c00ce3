//! The persistent bitmaps that `image info` lists ("Bitmaps extension"). Control path.

use block::Storage;
use serde::Serialize;

use crate::format::{BitmapEntry, FieldError, Header, autoclear};
use crate::{Error, Result};

/// QEMU's limit: 65535 bitmaps with names of up to 1023 bytes.
const MAX_DIRECTORY: u64 = 65535 * (24 + 1024);

/// A persistent bitmap, with the field names of `qemu-img info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BitmapInfo {
    /// "in-use" if it was not closed cleanly, "auto" if it records writes.
    pub flags: Vec<&'static str>,
    /// Its name.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
}

/// Reads the bitmap directory. Without the feature bit that vouches for it there are none.
pub(crate) fn read(
    storage: &mut dyn Storage,
    name: &str,
    header: &Header,
) -> Result<Vec<BitmapInfo>> {
    let vouched = header.autoclear_features & autoclear::BITMAPS != 0;
    let Some(place) = header.bitmaps().filter(|_| vouched) else { return Ok(Vec::new()) };
    let (offset, size) = (place.directory_offset, place.directory_size);
    let bad = |what: &str, found: u64, allowed: String| {
        Error::field(
            name,
            FieldError::new(format!("bitmaps extension field {what}"), offset, found, allowed),
        )
    };
    if size > MAX_DIRECTORY || offset.checked_add(size).is_none_or(|end| end > storage.len()) {
        let allowed = format!(
            "the directory must end inside the file and have at most {MAX_DIRECTORY} bytes"
        );
        return Err(bad("bitmap_directory_size", size, allowed));
    }
    // Each entry has 24 bytes at least.
    if u64::from(place.count) > size / 24 {
        let allowed = format!("a directory of {size} bytes has at most {} entries", size / 24);
        return Err(bad("nb_bitmaps", place.count.into(), allowed));
    }
    let mut directory = vec![0; size as usize];
    storage.read_at(offset, &mut directory).map_err(Error::io(name, "bitmap directory"))?;
    let mut all = Vec::new();
    let mut at = 0;
    for _ in 0..place.count {
        let entry = BitmapEntry::parse(&directory[at..], offset + at as u64)
            .map_err(|e| Error::field(name, e))?;
        at += entry.entry_len;
        let flags = [(1, "in-use"), (2, "auto")];
        all.push(BitmapInfo {
            flags: flags.into_iter().filter(|f| entry.flags & f.0 != 0).map(|f| f.1).collect(),
            name: entry.name,
            granularity: 1u64.checked_shl(entry.granularity_bits.into()).unwrap_or(0),
        });
    }
    Ok(all)
}
