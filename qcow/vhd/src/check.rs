//! Looking for damage in one file. Control path.

use std::ops::Range;

use block::Storage;

use crate::format::{BatMap, Footer, SECTOR};
use crate::image::{Block, FooterAt, Image};
use crate::{Error, Result};

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Things that are wrong.
    pub corruptions: u64,
    /// Blocks of the disk; 0 if it is fixed.
    pub total_blocks: u64,
    /// Blocks that are allocated.
    pub allocated_blocks: u64,
    /// Bytes of the file.
    pub end: u64,
}

/// Checks footer and copy, header, table, bitmaps, and tapdisk's map of full blocks. `found` is told
/// what is wrong, a sentence at a time.
///
/// # Errors
/// If the file cannot be read, or so much is wrong that it is no image at all.
pub fn run(storage: &mut dyn Storage, name: &str, found: &mut dyn FnMut(&str)) -> Result<Report> {
    let image = Image::read(storage, name)?;
    let mut count = 0;
    let mut wrong = |why: String| {
        count += 1;
        found(&why);
    };
    if let Some(why) = &image.no_footer {
        wrong(format!("footer: the last sector {why}; the copy at the front is used"));
    } else if image.header.is_some() {
        let mut bytes = [0; SECTOR as usize];
        storage.read_at(0, &mut bytes).map_err(Error::io(name, "copy of the footer"))?;
        match Footer::decode(&bytes) {
            Err(why) => wrong(format!("copy of the footer: it {why}")),
            // tapdisk hides files by the footer at the front only.
            Ok(copy) if Footer { hidden: image.footer.hidden, ..copy.clone() } != image.footer => {
                wrong("copy of the footer: it says other things than the footer".to_owned());
            }
            Ok(_) => {}
        }
    }
    let map = check_map(&image, storage, &mut wrong)?;
    let mut more: Vec<(&'static str, Range<u64>)> = map.iter().map(Full::place).collect();
    if image.footer_at == FooterAt::End {
        more.push(("footer", image.file_len - SECTOR..image.file_len));
    }
    image.judge(&more, &mut wrong);
    check_bitmaps(&image, storage, map.as_ref(), &mut wrong)?;
    Ok(Report {
        corruptions: count,
        total_blocks: image.table.len() as u64,
        allocated_blocks: image.allocated(),
        end: image.file_len,
    })
}

/// tapdisk's map of full blocks.
struct Full {
    offset: u64,
    bytes: Vec<u8>,
}

impl Full {
    fn place(&self) -> (&'static str, Range<u64>) {
        let end = self.offset + (self.bytes.len() as u64).next_multiple_of(SECTOR);
        ("map of full blocks", self.offset..end)
    }

    fn has(&self, block: u64) -> bool {
        let byte = self.bytes.get((block / 8) as usize);
        byte.is_some_and(|b| b & (0x80 >> (block % 8)) != 0)
    }
}

/// Reads that map, if there is one.
fn check_map(
    image: &Image,
    storage: &mut dyn Storage,
    wrong: &mut dyn FnMut(String),
) -> Result<Option<Full>> {
    let Some(header) = &image.header else { return Ok(None) };
    if !image.footer.creator.is_tapdisk() || image.footer.creator.version <= 1 {
        return Ok(None);
    }
    let table = (u64::from(header.max_entries) * 4).next_multiple_of(SECTOR);
    let at = header.table_offset + table;
    let mut bytes = [0; SECTOR as usize];
    if at + SECTOR <= image.file_len {
        let io = Error::io(&image.name, "header of the map of full blocks");
        storage.read_at(at, &mut bytes).map_err(io)?;
    }
    let Some(found) = BatMap::decode(&bytes) else {
        // Version 1.1 need not have one.
        if image.footer.creator.version >= 0x1_0002 {
            wrong(
                "map of full blocks: there is none, but this creator's files have one".to_owned(),
            );
        }
        return Ok(None);
    };
    // The checksum is over as much as the disk's blocks need.
    let used = (image.size() >> 24).max(1).next_multiple_of(SECTOR);
    let space = u64::from(found.sectors) * SECTOR;
    let end = found.offset.checked_add(space);
    if used > space || end.is_none_or(|end| end > image.file_len) {
        wrong(format!(
            "map of full blocks: {space} bytes at offset {:#x} are not in the file, or too few",
            found.offset
        ));
        return Ok(None);
    }
    let mut bytes = vec![0; used as usize];
    let io = Error::io(&image.name, "map of full blocks");
    storage.read_at(found.offset, &mut bytes).map_err(io)?;
    let sum = !found.sum(0, &bytes);
    if sum != found.checksum {
        wrong(format!(
            "map of full blocks: has checksum {:#010x}, but its bytes give {sum:#010x}",
            found.checksum
        ));
        return Ok(None);
    }
    Ok(Some(Full { offset: found.offset, bytes }))
}

/// Each allocated block: what its bitmap says must be in the file, and all be there where tapdisk's
/// map says so.
fn check_bitmaps(
    image: &Image,
    storage: &mut dyn Storage,
    map: Option<&Full>,
    wrong: &mut dyn FnMut(String),
) -> Result<()> {
    let len = image.bitmap_bytes();
    let sectors = image.block_size() / SECTOR;
    let mut bytes = vec![0; len as usize];
    for block in 0..image.table.len() as u64 {
        let full = map.is_some_and(|m| m.has(block));
        let Block::At(at) = image.block(block) else {
            if full {
                wrong(format!("map of full blocks: has block {block}, which is not allocated"));
            }
            continue;
        };
        if at + len > image.file_len {
            // Said already.
            continue;
        }
        storage.read_at(at, &mut bytes).map_err(Error::io(&image.name, "bitmap of a block"))?;
        let swapped = image.footer.creator.swaps_bits();
        let set = |s: u64| {
            let mask = if swapped { 1 << (s % 8) } else { 0x80 >> (s % 8) };
            bytes[(s / 8) as usize] & mask != 0
        };
        if full && !(0..sectors).all(set) {
            wrong(format!("map of full blocks: has block {block}, whose bitmap is not full"));
        }
        let there = (image.file_len.saturating_sub(at + len)).div_ceil(SECTOR).min(sectors);
        if (there..sectors).any(set) {
            wrong(format!("block {block} has data behind the file's end; the file was cut short"));
        }
    }
    Ok(())
}
