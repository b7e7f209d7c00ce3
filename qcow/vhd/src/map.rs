//! [`Map`]: where the bytes of a chain's disk come from. Says which bitmap it needs to know more;
//! the blocking reader and the datapath fetch that, each in its own way.

use std::collections::HashMap;
use std::sync::Arc;

use crate::format::SECTOR;
use crate::image::{Block, Image};

/// Memory for bitmaps, in bytes.
const CACHE_BYTES: usize = 16 << 20;
/// Blocks that are looked at in one layer for one answer, at most. A layer below may cut the answer
/// short, and then all of this is looked at again for the next one.
const AHEAD: u64 = 32;

/// Where the contents of a range come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// No layer has anything: zeroes.
    Unallocated,
    /// Data at this offset of the layer's file.
    Data(u64),
}

/// A range of the disk that comes from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// Bytes, never 0.
    pub len: u64,
    /// The layer it comes from. For unallocated ranges the last one that was asked.
    pub depth: usize,
    /// Where in the layer.
    pub source: Source,
}

/// One layer.
#[derive(Clone, Debug)]
pub(crate) enum MapLayer {
    /// A VHD image.
    Vhd(Arc<Image>),
    /// A raw disk of so many bytes, the last layer.
    Raw(u64),
}

impl MapLayer {
    /// Bytes of its disk, whole sectors.
    pub(crate) fn size(&self) -> u64 {
        match self {
            MapLayer::Vhd(image) => image.size(),
            MapLayer::Raw(size) => size.next_multiple_of(SECTOR),
        }
    }
}

/// What is known about a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// This.
    Run(Span),
    /// This bitmap must be loaded first.
    Load(Load),
}

/// A bitmap to be loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Load {
    /// Whose.
    pub(crate) layer: usize,
    /// Of which block.
    pub(crate) block: u64,
    /// Where in the layer's file.
    pub(crate) offset: u64,
    /// Bytes, whole sectors.
    pub(crate) len: u64,
}

/// Data that the file does not have: it was cut short or is damaged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "block {block} has data at offset {host:#x}, behind the file's end; the file was cut short or \
     is damaged"
)]
pub(crate) struct Cut {
    /// Whose.
    pub(crate) layer: usize,
    /// Of which block.
    pub(crate) block: u64,
    /// Where it would be.
    pub(crate) host: u64,
}

/// A look-up under way. It goes from layer to layer, down from the top, and keeps what it has learnt
/// while a bitmap is loaded: others may throw bitmaps out meanwhile, so one that needed those of all
/// layers at once might never end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Walk {
    start: u64,
    /// Bytes for which no layer above `depth` has anything.
    len: u64,
    depth: usize,
}

/// A bitmap: a bit for each sector, the highest of each byte first.
#[derive(Clone, Debug)]
enum Bitmap {
    /// All are set.
    Full,
    /// These are.
    Some(Box<[u8]>),
}

/// What a layer says: something and for how many bytes, or that a bitmap is missing.
type Look = Result<(Source, u64), Load>;

/// The layers and what is known of their bitmaps.
#[derive(Clone, Debug)]
pub(crate) struct Map {
    pub(crate) layers: Vec<MapLayer>,
    bitmaps: HashMap<(usize, u64), Bitmap>,
    bytes: usize,
    /// Most of these.
    pub(crate) limit: usize,
}

impl Map {
    pub(crate) fn new(layers: Vec<MapLayer>) -> Map {
        Map { layers, bitmaps: HashMap::new(), bytes: 0, limit: CACHE_BYTES }
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.layers[0].size()
    }

    /// Notes a bitmap that was loaded.
    pub(crate) fn loaded(&mut self, load: &Load, bytes: &[u8]) {
        let MapLayer::Vhd(image) = &self.layers[load.layer] else { return };
        let count = (image.block_size() / SECTOR) as usize;
        let used = &bytes[..count.div_ceil(8)];
        let full = count.is_multiple_of(8) && used.iter().all(|&b| b == 0xff);
        let bitmap = match full {
            true => Bitmap::Full,
            false if image.footer.creator.swaps_bits() => {
                Bitmap::Some(used.iter().map(|b| b.reverse_bits()).collect())
            }
            false => Bitmap::Some(used.into()),
        };
        // Roughly what an entry costs beside the bitmap.
        let cost = 64 + if full { 0 } else { used.len() };
        if self.bytes + cost > self.limit {
            self.bitmaps.clear();
            self.bytes = 0;
        }
        self.bytes += cost;
        self.bitmaps.insert((load.layer, load.block), bitmap);
    }

    /// Begins to ask where the bytes from `start` on come from, at most `max` (not 0) of them.
    /// `start` lies in the disk; both are whole sectors.
    pub(crate) fn walk(&self, start: u64, max: u64) -> Walk {
        Walk { start, len: max.min(self.size().saturating_sub(start)), depth: 0 }
    }

    /// Goes on with that. After [`Step::Load`] the same again once the bitmap was given to
    /// [`Map::loaded`].
    ///
    /// # Errors
    /// If the range should be in a file that does not have it.
    pub(crate) fn step(&self, walk: &mut Walk) -> Result<Step, Cut> {
        loop {
            let Walk { start, len, depth } = *walk;
            let (source, len) = match self.look(depth, start, len)? {
                Ok(found) => found,
                Err(load) => return Ok(Step::Load(load)),
            };
            let span = Span { start, len, depth, source };
            if source != Source::Unallocated {
                return Ok(Step::Run(span));
            }
            match self.layers.get(depth + 1).map(MapLayer::size) {
                Some(below) if start < below => {
                    *walk = Walk { start, len: len.min(below - start), depth: depth + 1 };
                }
                // No parent, or it ends before: zeroes.
                _ => return Ok(Step::Run(span)),
            }
        }
    }

    /// What one layer says about a range, and for how many bytes.
    fn look(&self, depth: usize, start: u64, max: u64) -> Result<Look, Cut> {
        let image = match &self.layers[depth] {
            MapLayer::Raw(_) => return Ok(Ok((Source::Data(start), max))),
            MapLayer::Vhd(image) => image,
        };
        let size = image.block_size();
        if size == 0 {
            return Ok(Ok((Source::Data(start), max)));
        }
        let (block, within) = (start / size, start % size);
        let mut run = (size - within).min(max);
        let Block::At(at) = image.block(block) else {
            let mut next = block + 1;
            while run < max && next < block + AHEAD && image.block(next) == Block::Absent {
                run = (run + size).min(max);
                next += 1;
            }
            #[cfg(test)]
            tests::LOOKED.set(tests::LOOKED.get() + next - block);
            return Ok(Ok((Source::Unallocated, run)));
        };
        let bits = match self.bitmaps.get(&(depth, block)) {
            None => {
                let len = image.bitmap_bytes();
                return Ok(Err(Load { layer: depth, block, offset: at, len }));
            }
            Some(Bitmap::Full) => None,
            Some(Bitmap::Some(bits)) => Some(bits),
        };
        let set = match bits {
            None => true,
            Some(bits) => {
                let first = within / SECTOR;
                let set = bit(bits, first);
                run = same(bits, first, first + run / SECTOR, set) * SECTOR;
                set
            }
        };
        if !set {
            return Ok(Ok((Source::Unallocated, run)));
        }
        let host = at + image.bitmap_bytes() + within;
        if host + run > image.file_len.next_multiple_of(SECTOR) {
            return Err(Cut { layer: depth, block, host });
        }
        Ok(Ok((Source::Data(host), run)))
    }
}

fn bit(bits: &[u8], at: u64) -> bool {
    bits[(at / 8) as usize] & (0x80 >> (at % 8)) != 0
}

/// How many bits from `from` on (at least one, at most to `end`) are as this one.
fn same(bits: &[u8], from: u64, end: u64, set: bool) -> u64 {
    let whole = if set { 0xff } else { 0 };
    let mut at = from + 1;
    while at < end {
        if at.is_multiple_of(8) && end - at >= 8 && bits[(at / 8) as usize] == whole {
            at += 8;
        } else if bit(bits, at) == set {
            at += 1;
        } else {
            break;
        }
    }
    at - from
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::format::{Creator, DiskType, DynamicHeader, Footer, Geometry, LOCATORS, Locator};
    use crate::image::FooterAt;

    thread_local! {
        /// Entries of tables that were looked at.
        pub(super) static LOOKED: Cell<u64> = const { Cell::new(0) };
    }

    fn sparse(blocks: u64) -> MapLayer {
        let header = DynamicHeader {
            table_offset: 1536,
            max_entries: blocks as u32,
            block_size: 2 << 20,
            parent_uuid: [0; 16],
            parent_timestamp: 0,
            parent_name: String::new(),
            locators: [Locator::default(); LOCATORS],
        };
        let footer = Footer {
            data_offset: 512,
            timestamp: 0,
            creator: Creator { app: *b"tap\0", version: 0x1_0003 },
            original_size: blocks << 21,
            current_size: blocks << 21,
            geometry: Geometry::MAX,
            disk_type: DiskType::Differencing,
            uuid: [0; 16],
            hidden: false,
        };
        MapLayer::Vhd(Arc::new(Image {
            name: String::new(),
            footer,
            header: Some(header),
            parents: Vec::new(),
            footer_at: FooterAt::End,
            no_footer: None,
            table: vec![u32::MAX; blocks as usize],
            file_len: u64::MAX >> 1,
            size: blocks << 21,
        }))
    }

    /// A disk whose lowest layer gives short answers, under snapshots in which nothing was written:
    /// who goes through all of it looks at each entry a few times, not at all of them for each
    /// answer.
    #[test]
    fn a_walk_over_sparse_layers_is_linear() {
        const BLOCKS: u64 = 20_000;
        const LAYERS: u64 = 5;
        let mut layers: Vec<MapLayer> = (0..LAYERS).map(|_| sparse(BLOCKS)).collect();
        let Some(MapLayer::Vhd(base)) = layers.last_mut() else { unreachable!() };
        let base = Arc::make_mut(base);
        for (i, entry) in base.table.iter_mut().enumerate().step_by(2) {
            *entry = (1 + i as u32) * 5000;
        }
        let mut map = Map::new(layers);
        LOOKED.set(0);
        let (mut at, mut answers) = (0, 0);
        while at < map.size() {
            let mut walk = map.walk(at, map.size() - at);
            let span = loop {
                match map.step(&mut walk).unwrap() {
                    Step::Load(load) => map.loaded(&load, &[0xff; 512]),
                    Step::Run(span) => break span,
                }
            };
            assert_eq!(span.len, 2 << 20);
            let data = matches!(span.source, Source::Data(_));
            assert_eq!(data, (at >> 21).is_multiple_of(2));
            at += span.len;
            answers += 1;
        }
        assert_eq!(answers, BLOCKS);
        assert!(LOOKED.get() > BLOCKS * LAYERS);
        assert!(LOOKED.get() <= BLOCKS * LAYERS * 32, "{}", LOOKED.get());
        // Nothing at all: as many answers as that takes.
        let map = Map::new(vec![sparse(BLOCKS), sparse(BLOCKS)]);
        let span = map.step(&mut map.walk(0, u64::MAX)).unwrap();
        let Step::Run(Span { len, depth: 1, source: Source::Unallocated, .. }) = span else {
            panic!("{span:?}")
        };
        assert_eq!(len, AHEAD << 21);
    }

    #[test]
    fn runs_of_bits() {
        let bits = [0b0000_1111, 0xff, 0xff, 0b1000_0000, 0];
        assert_eq!(same(&bits, 0, 40, false), 4);
        assert_eq!(same(&bits, 4, 40, true), 21);
        assert_eq!(same(&bits, 4, 9, true), 5);
        assert_eq!(same(&bits, 25, 40, false), 15);
        assert_eq!(same(&bits, 25, 26, false), 1);
        assert!(bit(&bits, 4) && !bit(&bits, 3));
    }
}
