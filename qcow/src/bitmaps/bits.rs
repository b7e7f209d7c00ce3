//! [`Bitmap`]: the bits of one bitmap, read from the file.

use block::Storage;

use super::{MAX_TABLE_BYTES, read_directory, read_table};
use crate::format::{BitmapCluster, BitmapEntry, Geometry};
use crate::{Error, ImageMeta, Result};

/// A bitmap of an image, to be read: what is on disk.
#[derive(Clone, Debug)]
pub struct Bitmap {
    image: String,
    entry: BitmapEntry,
    geometry: Geometry,
    table: Vec<BitmapCluster>,
    /// The cluster of bits that was read last.
    cached: Option<(u64, Vec<u8>)>,
}

/// A range of the disk whose bits are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapRun {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// Whether the bits are set.
    pub dirty: bool,
}

impl Bitmap {
    /// Opens a bitmap.
    ///
    /// # Errors
    /// If there is none of that name, it was not saved, or is damaged.
    pub fn open(st: &mut dyn Storage, image: &ImageMeta, bitmap: &str) -> Result<Bitmap> {
        let name = &image.name;
        let all = read_directory(st, name, &image.header)?;
        let Some(entry) = all.into_iter().find(|e| e.name == bitmap.as_bytes()) else {
            return Err(Error::refused(name, format!("has no bitmap {bitmap:?}")));
        };
        let geometry = image.geometry;
        entry
            .check(&geometry)
            .map_err(|why| Error::refused(name, format!("bitmap {bitmap:?} cannot be: {why}")))?;
        if entry.is_in_use() {
            return Err(inconsistent(name, bitmap));
        }
        let table = read_table(st, name, &geometry, &entry, &mut { MAX_TABLE_BYTES })?;
        Ok(Bitmap::of(name, &entry, geometry, table))
    }

    pub(crate) fn of(
        image: &str,
        entry: &BitmapEntry,
        geometry: Geometry,
        table: Vec<BitmapCluster>,
    ) -> Bitmap {
        Bitmap { image: image.to_owned(), entry: entry.clone(), geometry, table, cached: None }
    }

    /// log2 of the bytes that one bit stands for.
    pub fn granularity_bits(&self) -> u32 {
        self.entry.granularity_bits.into()
    }

    /// Bytes of the disk that it describes.
    pub fn disk_size(&self) -> u64 {
        self.geometry.size()
    }

    /// Whether it records writes.
    pub fn is_enabled(&self) -> bool {
        self.entry.is_auto()
    }

    /// The byte at `index` of the bits; bit 0 of byte 0 is the first one.
    fn byte(&mut self, st: &mut dyn Storage, index: u64) -> Result<u8> {
        let cluster = self.geometry.cluster(index);
        match self.table.get(cluster as usize) {
            None | Some(BitmapCluster::Zeroes) => Ok(0),
            Some(BitmapCluster::Ones) => Ok(0xff),
            Some(&BitmapCluster::Data(offset)) => {
                if self.cached.as_ref().is_none_or(|c| c.0 != cluster) {
                    let mut bytes = vec![0; self.geometry.cluster_size() as usize];
                    st.read_at(offset, &mut bytes).map_err(Error::io(&self.image, "bitmap"))?;
                    self.cached = Some((cluster, bytes));
                }
                let at = self.geometry.in_cluster(index) as usize;
                Ok(self.cached.as_ref().map_or(0, |c| c.1[at]))
            }
        }
    }

    /// The first bit in `[from, to)` that is (not) set, or `to`.
    fn find(&mut self, st: &mut dyn Storage, from: u64, to: u64, set: bool) -> Result<u64> {
        let per_cluster = self.geometry.cluster_size() * 8;
        let mut at = from;
        while at < to {
            let known = match self.table.get((at / per_cluster) as usize) {
                None | Some(BitmapCluster::Zeroes) => Some(false),
                Some(BitmapCluster::Ones) => Some(true),
                Some(BitmapCluster::Data(_)) => None,
            };
            if let Some(is) = known {
                if is == set {
                    return Ok(at);
                }
                at = (at / per_cluster + 1) * per_cluster;
                continue;
            }
            let byte = self.byte(st, at / 8)?;
            let wanted = (if set { byte } else { !byte }) & (0xff << (at % 8)) as u8;
            if wanted != 0 {
                return Ok(to.min(at / 8 * 8 + u64::from(wanted.trailing_zeros())));
            }
            at = (at / 8 + 1) * 8;
        }
        Ok(to)
    }

    /// The run that begins at byte `offset` of the disk and ends where bits change, or after `len`
    /// bytes, or at the disk's end; `None` from there on.
    ///
    /// # Errors
    /// If the bits cannot be read.
    pub fn run(
        &mut self,
        st: &mut dyn Storage,
        offset: u64,
        len: u64,
    ) -> Result<Option<BitmapRun>> {
        let end = offset.saturating_add(len).min(self.disk_size());
        if offset >= end {
            return Ok(None);
        }
        let bits = self.granularity_bits();
        let first = offset >> bits;
        let last = (end - 1) >> bits;
        let dirty = self.find(st, first, first + 1, true)? == first;
        let until = self.find(st, first, last + 1, !dirty)?;
        let end = if until > last { end } else { until << bits };
        Ok(Some(BitmapRun { offset, len: end - offset, dirty }))
    }

    /// The set bits in `[from, to)`, as ranges.
    pub(crate) fn next_set(
        &mut self,
        st: &mut dyn Storage,
        from: u64,
        to: u64,
    ) -> Result<Option<(u64, u64)>> {
        let start = self.find(st, from, to, true)?;
        if start >= to {
            return Ok(None);
        }
        Ok(Some((start, self.find(st, start, to, false)?)))
    }
}

/// What is said of a bitmap that was not saved.
pub(crate) fn inconsistent(image: &str, bitmap: &str) -> Error {
    Error::refused(
        image,
        format!(
            "bitmap {bitmap:?} was not saved when the image was last written to, so its bits mean \
             nothing; it can only be removed"
        ),
    )
}

/// Bits `[from, to)`, at least one, of some bytes: the bytes between the first and the last one, and
/// which bits those two have of it. Where both are the same byte, only the first counts.
fn edges(from: u64, to: u64) -> ((usize, u8), std::ops::Range<usize>, (usize, u8)) {
    let (first, last) = ((from / 8) as usize, ((to - 1) / 8) as usize);
    let (head, tail) = (0xff << (from % 8), 0xff >> (7 - (to - 1) % 8));
    if first == last {
        return ((first, head & tail), 0..0, (last, 0));
    }
    ((first, head), first + 1..last, (last, tail))
}

/// Sets or clears bits `[from, to)` of some bytes; whether any changed.
pub(crate) fn fill(bytes: &mut [u8], from: u64, to: u64, value: bool) -> bool {
    if from >= to {
        return false;
    }
    let (head, middle, tail) = edges(from, to);
    let whole = if value { 0xff } else { 0 };
    let middle = &mut bytes[middle];
    let mut changed = middle.iter().any(|&b| b != whole);
    middle.fill(whole);
    for (at, mask) in [head, tail] {
        let new = bytes[at] & !mask | whole & mask;
        changed |= new != bytes[at];
        bytes[at] = new;
    }
    changed
}

/// Whether bits `[from, to)` of some bytes are all set.
pub(crate) fn all_set(bytes: &[u8], from: u64, to: u64) -> bool {
    if from >= to {
        return true;
    }
    let (head, middle, tail) = edges(from, to);
    [head, tail].into_iter().all(|(at, mask)| bytes[at] & mask == mask)
        && bytes[middle].iter().all(|&b| b == 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_bits() {
        let is = |bytes: &[u8], bit: u64| bytes[(bit / 8) as usize] >> (bit % 8) & 1 != 0;
        for (from, to) in (0..40).flat_map(|from| (from..=40).map(move |to| (from, to))) {
            for value in [false, true] {
                let old = [if value { 0 } else { 0xff }; 5];
                let mut new = old;
                assert_eq!(fill(&mut new, from, to, value), from < to);
                assert!(!fill(&mut new, from, to, value), "{from}..{to}");
                for bit in 0..40 {
                    assert_eq!(is(&new, bit) == value, (from..to).contains(&bit), "{from}..{to}");
                }
                assert_eq!(all_set(&new, from, to), value || from == to, "{from}..{to}");
            }
            for gap in from..to {
                let mut bytes = [0xff; 5];
                fill(&mut bytes, gap, gap + 1, false);
                assert!(!all_set(&bytes, from, to), "{from}..{to} without {gap}");
            }
        }
    }
}
