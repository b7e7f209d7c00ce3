//! [`Tracked`]: a bitmap that records what guests write, as the datapath needs it. Made when an image
//! is opened for writing.

use std::collections::BTreeSet;

use block::{Status, Storage};

use super::Bitmaps;
use crate::edit::give_bits_places;
use crate::format::{BitmapCluster, BitmapEntry, MAX_BITMAP_BYTES, autoclear};
use crate::{Error, ImageMeta, MetadataSet, Mode, Result};

/// Most clusters of bits, and most bytes of them, that get a place when an image is opened. More than
/// bitmaps of 128 TiB need; a hostile file of some megabytes could ask for millions.
const MAX_PLACES: u64 = 1 << 16;
const MAX_PLACED_BYTES: u64 = MAX_BITMAP_BYTES;

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
/// that recording needs no allocation), and notes in `metadata` where bitmaps lie. Those for whose
/// bits there is no room are lost, and say so on disk. `None` if there is something about the bitmaps
/// that is not understood: then nothing vouches for them any more.
///
/// # Errors
/// If they cannot be read or written.
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
    let (wanted, too_much) = choose(&bitmaps, image.geometry.cluster_size());
    if !too_much.is_empty() {
        lose(st, image, &mut bitmaps, &too_much, "their bits are too many")?;
    }
    if !wanted.is_empty() {
        let failed = match give_bits_places(st, &name, &wanted) {
            Err(Error::Io { file, what, source }) if source.status != Status::NoSpace => {
                return Err(Error::Io { file, what, source });
            }
            done => done.err(),
        };
        *image = ImageMeta::open(st, &name, Mode::Write)?;
        match read(st, image, metadata)? {
            Some(again) => bitmaps = again,
            None => return Ok(None),
        }
        if let Some(e) = failed {
            let (without, _) = choose(&bitmaps, image.geometry.cluster_size());
            lose(st, image, &mut bitmaps, &without, &e.to_string())?;
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

/// Which bitmaps (their numbers) are to get places for bits, and which need too many.
fn choose(bitmaps: &Bitmaps, cluster: u64) -> (BTreeSet<usize>, BTreeSet<usize>) {
    let most = MAX_PLACES.min(MAX_PLACED_BYTES / cluster);
    let (mut wanted, mut too_much) = (BTreeSet::new(), BTreeSet::new());
    let mut left = most;
    for (index, (entry, table)) in bitmaps.all.iter().enumerate() {
        let placed = |c: &&BitmapCluster| matches!(c, BitmapCluster::Data(_));
        let need = (table.len() - table.iter().filter(placed).count()) as u64;
        if need == 0 || !records(entry) {
            continue;
        }
        match left.checked_sub(need) {
            Some(rest) => {
                left = rest;
                wanted.insert(index);
            }
            None => {
                too_much.insert(index);
            }
        }
    }
    (wanted, too_much)
}

/// Has bitmaps say, durably, that their bits mean nothing.
fn lose(
    st: &mut dyn Storage,
    image: &ImageMeta,
    bitmaps: &mut Bitmaps,
    lost: &BTreeSet<usize>,
    why: &str,
) -> Result<()> {
    let Some(place) = image.header.bitmaps() else { return Ok(()) };
    let name = &image.name;
    let first = lost.first().map(|&i| bitmaps.all[i].0.shown_name()).unwrap_or_default();
    log::warn!(
        "{name}: {} bitmaps ({first:?} and so on) cannot record what is written, so they are lost: \
         {why}",
        lost.len()
    );
    // Flags lie each in one sector, so a cut leaves the old or the new ones.
    let mut directory = vec![0; place.directory_size as usize];
    let io = || Error::io(name, "bitmap directory");
    st.read_at(place.directory_offset, &mut directory).map_err(io())?;
    let mut at = 0;
    for (index, (entry, _)) in bitmaps.all.iter_mut().enumerate() {
        if lost.contains(&index) {
            entry.flags |= BitmapEntry::IN_USE;
            let flags = at + BitmapEntry::FLAGS_AT;
            directory[flags..flags + 4].copy_from_slice(&entry.flags.to_be_bytes());
        }
        at += entry.encoded_len();
    }
    st.write_at(place.directory_offset, &directory).map_err(io())?;
    st.flush().map_err(io())
}

/// Whether a bitmap records what is written; one that was not saved is lost anyway.
fn records(entry: &BitmapEntry) -> bool {
    entry.is_auto() && !entry.is_in_use()
}
