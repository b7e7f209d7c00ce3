//! [`Tracked`]: a bitmap that records what guests write, as the datapath needs it. Made when an image
//! is opened for writing.

use block::Storage;

use super::Bitmaps;
use crate::edit::give_bits_places;
use crate::format::{BitmapCluster, BitmapEntry, autoclear};
use crate::{Error, ImageMeta, MetadataSet, Mode, Result};

/// A bitmap that records writes.
#[derive(Clone, Debug)]
pub(crate) struct Tracked {
    /// log2 of the bytes that one bit stands for.
    pub(crate) granularity_bits: u32,
    /// Where its clusters of bits are.
    pub(crate) clusters: Vec<u64>,
    /// Where its flags stand, 4 bytes.
    pub(crate) flags_at: u64,
    /// The flags when it is saved.
    pub(crate) flags: u32,
}

/// Finds the bitmaps that have to record, gives each cluster of their bits a place in the file (so
/// that recording needs no allocation), and notes in `metadata` where bitmaps lie. `None` if there
/// is something about the bitmaps that is not understood: then nothing vouches for them any more.
///
/// # Errors
/// If they cannot be read, or there is no room for the bits.
pub(crate) fn prepare(
    st: &mut dyn Storage,
    image: &mut ImageMeta,
    metadata: &mut MetadataSet,
) -> Result<Option<Vec<Tracked>>> {
    if image.header.autoclear_features & autoclear::BITMAPS == 0 {
        return Ok(None);
    }
    let name = image.name.clone();
    let read = |st: &mut dyn Storage, image: &ImageMeta, metadata: &mut MetadataSet| {
        let bitmaps = match Bitmaps::read(st, &name, &image.header) {
            Ok(bitmaps) => bitmaps,
            Err(e @ Error::Io { .. }) => return Err(e),
            Err(e) => {
                log::warn!("{e}; the image's bitmaps become invalid by writing to it");
                return Ok(None);
            }
        };
        *metadata = MetadataSet::with_snapshots(image, st)?;
        if !metadata.add(&image.geometry, &bitmaps.places(&image.header)) {
            log::warn!(
                "{name}: its bitmaps lie over each other or over other tables; they become invalid \
                 by writing to it"
            );
            return Ok(None);
        }
        Ok(Some(bitmaps))
    };
    let Some(mut bitmaps) = read(st, image, metadata)? else { return Ok(None) };
    let placed = |c: &BitmapCluster| matches!(c, BitmapCluster::Data(_));
    if bitmaps.all.iter().any(|(e, table)| records(e) && !table.iter().all(placed)) {
        give_bits_places(st, &name)?;
        *image = ImageMeta::open(st, &name, Mode::Write)?;
        match read(st, image, metadata)? {
            Some(again) => bitmaps = again,
            None => return Ok(None),
        }
    }
    if bitmaps.all.is_empty() {
        return Ok(None);
    }
    let mut at = image.header.bitmaps().map_or(0, |b| b.directory_offset);
    let mut tracked = Vec::new();
    for (entry, table) in &bitmaps.all {
        if records(entry) {
            let offset = |c: &BitmapCluster| match c {
                BitmapCluster::Data(offset) => Some(*offset),
                _ => None,
            };
            tracked.push(Tracked {
                granularity_bits: entry.granularity_bits.into(),
                clusters: table.iter().filter_map(offset).collect(),
                flags_at: at + BitmapEntry::FLAGS_AT as u64,
                flags: entry.flags,
            });
        }
        at += entry.encoded_len() as u64;
    }
    Ok(Some(tracked))
}

/// Whether a bitmap records what is written; one that was not saved is lost anyway.
fn records(entry: &BitmapEntry) -> bool {
    entry.is_auto() && !entry.is_in_use()
}
