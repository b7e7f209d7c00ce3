//! What `image bitmap` does: adding, removing, clearing, enabling, disabling and merging bitmaps, in
//! one transaction.

use block::Storage;

use super::bitmaps::not_there;
use super::tx::{Tx, run};
use crate::bitmaps::inconsistent;
use crate::format::{BITMAP_GRANULARITY_BITS, BitmapEntry, MAX_BITMAP_NAME, MAX_BITMAPS};
use crate::{Bitmap, ChainReader, ImageMeta, Mode, Result, Source};

/// What is to be done to a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapAction {
    /// It is made: empty, and it records writes.
    Add {
        /// Bytes that one bit stands for, a power of two from 512 to 2^31. `None`: the cluster
        /// size, but at least 4 KiB and at most 64 KiB.
        granularity: Option<u64>,
    },
    /// It is removed; one that was not saved, too.
    Remove,
    /// All its bits are cleared.
    Clear,
    /// It records writes from now on.
    Enable,
    /// It records none from now on.
    Disable,
    /// It gets the bits of the bitmap of this name as well.
    Merge(String),
}

/// Does to bitmap `bitmap` of an image what the actions say, in their order; all or nothing.
/// Bitmaps that are merged are those of `source`, if there is one, else of the image itself.
///
/// # Errors
/// If a bitmap is not there, is there already, was not saved (which only permits to remove it) or
/// would be too large, sizes of disks differ, the image has version 2, there is no room, or a write
/// fails. The image is as it was then.
pub fn change_bitmap<S: Storage>(
    st: &mut dyn Storage,
    name: &str,
    bitmap: &str,
    actions: &[BitmapAction],
    mut source: Option<(&str, &mut S)>,
) -> Result<()> {
    run(st, name, |tx, st| {
        for action in actions {
            match action {
                BitmapAction::Add { granularity } => tx.add_bitmap(bitmap, *granularity)?,
                BitmapAction::Remove => {
                    let index = tx.bitmaps.find(bitmap).ok_or_else(|| not_there(name, bitmap))?;
                    tx.remove_bitmap(st, index)?;
                }
                BitmapAction::Clear => {
                    let index = tx.usable(bitmap)?;
                    tx.clear_bits(st, index)?;
                }
                BitmapAction::Enable | BitmapAction::Disable => {
                    let index = tx.usable(bitmap)?;
                    let flag = match action {
                        BitmapAction::Enable => BitmapEntry::AUTO,
                        _ => 0,
                    };
                    let flags = &mut tx.bitmaps.all[index].entry.flags;
                    tx.bitmaps.changed |= *flags != flag;
                    *flags = flag;
                }
                BitmapAction::Merge(other) => {
                    let index = tx.usable(bitmap)?;
                    match &mut source {
                        None => {
                            let other = tx.usable(other)?;
                            let mut from = tx.bitmap(st, other)?;
                            tx.merge_bits(st, index, &mut from, None)?;
                        }
                        Some((name, from_st)) => {
                            let meta = ImageMeta::open(*from_st, name, Mode::Read)?;
                            let mut from = Bitmap::open(*from_st, &meta, other)?;
                            tx.same_size(from.disk_size())?;
                            tx.merge_bits(st, index, &mut from, Some(*from_st))?;
                        }
                    }
                }
            }
        }
        Ok(())
    })
    .map(|_| ())
}

/// Sets those bits of bitmap `bitmap` of an image whose part of the disk the uppermost layer of `of` itself holds
/// something for, be it data or zeroes; all or nothing. What that has behind the end of the image's disk is left
/// out.
///
/// # Errors
/// If the bitmap is not there or was not saved, a layer cannot be read, there is no room, or a write fails. The
/// image is as it was then.
pub fn mark_held<S: Storage>(
    st: &mut dyn Storage,
    name: &str,
    bitmap: &str,
    of: &mut ChainReader<S>,
) -> Result<()> {
    run(st, name, |tx, st| {
        let index = tx.usable(bitmap)?;
        let bits = tx.bitmaps.all[index].entry.granularity_bits;
        let end = tx.geometry().size().min(of.size());
        let mut at = 0;
        while at < end {
            let (len, source) = of.top_run(at, end - at)?;
            if source != Source::Unallocated {
                tx.set_bits(st, index, at >> bits, ((at + len - 1) >> bits) + 1, true)?;
            }
            at += len;
        }
        Ok(())
    })
    .map(|_| ())
}

impl Tx {
    /// A bitmap that is there and was saved.
    fn usable(&self, bitmap: &str) -> Result<usize> {
        let name = &self.meta.name;
        let index = self.bitmaps.find(bitmap).ok_or_else(|| not_there(name, bitmap))?;
        match self.bitmaps.all[index].entry.is_in_use() {
            false => Ok(index),
            true => Err(inconsistent(name, bitmap)),
        }
    }

    fn same_size(&self, theirs: u64) -> Result<()> {
        let ours = self.geometry().size();
        match ours == theirs {
            true => Ok(()),
            false => Err(self.refused(format!(
                "has a disk of {ours} bytes, but the other image one of {theirs}: their bitmaps \
                 cannot be merged"
            ))),
        }
    }

    fn add_bitmap(&mut self, bitmap: &str, granularity: Option<u64>) -> Result<()> {
        let g = self.geometry();
        if g.version() < 3 {
            return Err(self.refused("has version 2, which has no bitmaps; see `image amend`"));
        }
        if bitmap.is_empty() || bitmap.len() > MAX_BITMAP_NAME {
            return Err(self.refused(format!("a bitmap's name has 1 to {MAX_BITMAP_NAME} bytes")));
        }
        if self.bitmaps.find(bitmap).is_some() {
            return Err(self.refused(format!("has a bitmap {bitmap:?} already")));
        }
        if self.bitmaps.all.len() >= MAX_BITMAPS as usize {
            return Err(self.refused(format!("has {MAX_BITMAPS} bitmaps, the most possible")));
        }
        let granularity = granularity.unwrap_or(g.cluster_size().clamp(4096, 65536));
        let bits = granularity.trailing_zeros() as u8;
        if !granularity.is_power_of_two() || !BITMAP_GRANULARITY_BITS.contains(&bits) {
            return Err(self.refused(format!(
                "a granularity is a power of two from 512 to {}, not {granularity}",
                1u64 << BITMAP_GRANULARITY_BITS.end()
            )));
        }
        let entry = BitmapEntry::new(bitmap.as_bytes(), bits, BitmapEntry::AUTO);
        let entries = self.check_bits_size(&entry, g.size())?;
        self.bitmaps.push(entry, entries);
        Ok(())
    }
}
