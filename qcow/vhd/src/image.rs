//! [`Image`]: the metadata of one VHD file, opened for reading.

use block::Storage;

use crate::format::{
    DiskType, DynamicHeader, FOOTER_BYTES, Footer, HEADER_BYTES, Locator, MAX_DISK_BYTES,
    PlatformCode, SECTOR, UNUSED,
};
use crate::{Error, Result};

/// Most bytes of a block. Everybody makes blocks of 2 MiB, or of 512 KiB.
const MAX_BLOCK: u32 = 64 << 20;
/// Most entries of a table that is read: a disk of 2 TiB in blocks of 512 KiB has so many.
const MAX_ENTRIES: u64 = 4 << 20;
/// Most bytes of a parent's name.
const MAX_NAME: u32 = 64 << 10;

/// Where a footer was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FooterAt {
    /// Where it belongs: in the last sector.
    End,
    /// In the last 511 bytes, as early versions of Virtual PC wrote it.
    Short,
    /// At the front: the copy that dynamic and differencing disks have.
    Front,
}

/// What the table says about a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Block {
    /// Nothing is stored for it here.
    Absent,
    /// Its bitmap is at this offset of the file, its sectors behind that.
    At(u64),
}

/// The metadata of one file.
#[derive(Clone, Debug)]
pub struct Image {
    /// What to call it in messages.
    pub name: String,
    /// The footer.
    pub footer: Footer,
    /// The header of a dynamic or differencing disk.
    pub header: Option<DynamicHeader>,
    /// Names of the parent, in the order in which they are tried.
    pub parents: Vec<String>,
    /// Where the footer was.
    pub(crate) footer_at: FooterAt,
    /// Why the last sector is no footer, if it is not.
    pub(crate) no_footer: Option<String>,
    /// As many entries as the disk has blocks.
    pub(crate) table: Vec<u32>,
    /// Bytes of the file.
    pub(crate) file_len: u64,
    /// See [`Image::size`].
    pub(crate) size: u64,
}

impl Image {
    /// Reads the metadata of a disk that is shown to a guest. Entries of the table are not judged:
    /// see [`Image::verify`].
    ///
    /// # Errors
    /// If it cannot be read or says something impossible.
    pub fn read(storage: &mut dyn Storage, name: &str) -> Result<Image> {
        Image::read_as(storage, name, Footer::disk_size)
    }

    /// Reads the metadata of a disk that is the parent of another one, which sees all of it: see
    /// [`Footer::whole_size`].
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn read_parent(storage: &mut dyn Storage, name: &str) -> Result<Image> {
        Image::read_as(storage, name, Footer::whole_size)
    }

    fn read_as(storage: &mut dyn Storage, name: &str, size: fn(&Footer) -> u64) -> Result<Image> {
        let file_len = storage.len();
        let (footer, footer_at, no_footer) = find_footer(storage, name)?;
        let refuse = |why: String| Error::refused(name, why);
        let size = size(&footer);
        if size > MAX_DISK_BYTES {
            return Err(refuse(format!(
                "footer: the disk has {size} bytes; at most {MAX_DISK_BYTES} are possible"
            )));
        }
        let mut image = Image {
            name: name.to_owned(),
            footer,
            header: None,
            parents: Vec::new(),
            footer_at,
            no_footer,
            table: Vec::new(),
            file_len,
            size,
        };
        if image.footer.disk_type == DiskType::Fixed {
            let room = file_len - if footer_at == FooterAt::Short { 511 } else { SECTOR };
            if size > room {
                return Err(refuse(format!(
                    "footer: the disk has {size} bytes, but the file holds {room}; it was cut short"
                )));
            }
            return Ok(image);
        }
        let header = image.read_header(storage)?;
        image.read_table(storage, &header)?;
        if image.footer.disk_type == DiskType::Differencing {
            image.parents = image.read_names(storage, &header)?;
        }
        image.header = Some(header);
        Ok(image)
    }

    fn refuse(&self, why: String) -> Error {
        Error::refused(&self.name, why)
    }

    /// Whether the file has these bytes.
    fn holds(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.file_len)
    }

    fn read_header(&self, storage: &mut dyn Storage) -> Result<DynamicHeader> {
        let at = self.footer.data_offset;
        if at < SECTOR || !self.holds(at, HEADER_BYTES as u64) {
            return Err(self.refuse(format!(
                "footer: the header would be at offset {at:#x}, which is not in the file"
            )));
        }
        let mut bytes = [0; HEADER_BYTES];
        storage.read_at(at, &mut bytes).map_err(Error::io(&self.name, "header"))?;
        let header = DynamicHeader::decode(&bytes)
            .map_err(|e| self.refuse(format!("the header at offset {at:#x} {e}")))?;
        let size = header.block_size;
        if !size.is_power_of_two() || u64::from(size) < SECTOR || size > MAX_BLOCK {
            return Err(self.refuse(format!(
                "header: blocks of {size} bytes; a power of two from 512 to {MAX_BLOCK} is possible"
            )));
        }
        let need = self.size.div_ceil(u64::from(size));
        if need > u64::from(header.max_entries) {
            return Err(self.refuse(format!(
                "header: the block allocation table has {} entries, but the disk has {need} blocks",
                header.max_entries
            )));
        }
        if need > MAX_ENTRIES {
            return Err(self.refuse(format!(
                "header: the disk has {need} blocks; at most {MAX_ENTRIES} are possible"
            )));
        }
        Ok(header)
    }

    fn read_table(&mut self, storage: &mut dyn Storage, header: &DynamicHeader) -> Result<()> {
        let count = self.size.div_ceil(u64::from(header.block_size));
        let at = header.table_offset;
        if at < SECTOR || !at.is_multiple_of(SECTOR) || !self.holds(at, count * 4) {
            return Err(self.refuse(format!(
                "header: the block allocation table would be at offset {at:#x} with {count} \
                 entries, which is not in the file"
            )));
        }
        let mut bytes = vec![0; count as usize * 4];
        let io = Error::io(&self.name, "block allocation table");
        storage.read_at(at, &mut bytes).map_err(io)?;
        self.table = bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_be_bytes(b)).collect();
        Ok(())
    }

    /// Names of the parent: what the locators say, then the name in the header.
    fn read_names(&self, storage: &mut dyn Storage, header: &DynamicHeader) -> Result<Vec<String>> {
        let mut names: Vec<String> = Vec::new();
        for locator in &header.locators {
            let Some(code) = PlatformCode::from_code(locator.code) else { continue };
            let &Locator { len, offset, .. } = locator;
            if len > MAX_NAME || !self.holds(offset, u64::from(len)) {
                return Err(self.refuse(format!(
                    "header: a parent's name of {len} bytes would be at offset {offset:#x}"
                )));
            }
            let mut bytes = vec![0; len as usize];
            storage.read_at(offset, &mut bytes).map_err(Error::io(&self.name, "parent's name"))?;
            match code.path(&bytes) {
                // What a drive letter means only Windows knows.
                Ok(name) if !has_drive(&name) && !name.is_empty() => names.push(name),
                Ok(_) => {}
                Err(e) => log::warn!("{}: a name of the parent is left out: {e}", self.name),
            }
        }
        if !header.parent_name.is_empty() && !has_drive(&header.parent_name) {
            names.push(header.parent_name.clone());
        }
        let mut seen = Vec::new();
        names.retain(|n| !seen.contains(n) && (seen.push(n.clone()), true).1);
        Ok(names)
    }

    /// Bytes that a guest or a child sees, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of a block; 0 if the disk is fixed.
    pub fn block_size(&self) -> u64 {
        self.header.as_ref().map_or(0, |h| u64::from(h.block_size))
    }

    /// Bytes of a block's bitmap, whole sectors; 0 if the disk is fixed.
    pub fn bitmap_bytes(&self) -> u64 {
        bitmap_bytes(self.block_size())
    }

    /// Blocks that are allocated here.
    pub fn allocated(&self) -> u64 {
        self.table.iter().filter(|&&e| e != UNUSED).count() as u64
    }

    /// Where a block is; absent if the disk has no such block.
    pub fn block(&self, index: u64) -> Block {
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i));
        match entry {
            Some(&e) if e != UNUSED => Block::At(u64::from(e) * SECTOR),
            _ => Block::Absent,
        }
    }

    /// The ranges of the file that hold other metadata than blocks: what each is, and where.
    pub(crate) fn metadata(&self) -> Vec<(&'static str, std::ops::Range<u64>)> {
        let Some(header) = &self.header else { return Vec::new() };
        let table = u64::from(header.max_entries) * 4;
        let from = |at: u64, len: u64| at..at.saturating_add(len.next_multiple_of(SECTOR));
        let mut list = vec![
            ("copy of the footer", 0..SECTOR),
            ("header", from(self.footer.data_offset, HEADER_BYTES as u64)),
            ("block allocation table", from(header.table_offset, table)),
        ];
        let used = header.locators.iter().filter(|l| l.code != 0);
        list.extend(used.map(|l| ("parent's name", from(l.offset, l.space_bytes()))));
        list
    }

    /// Calls `wrong` with each block whose entry cannot be right: it begins behind the file's end,
    /// or lies over other metadata or over another block.
    pub(crate) fn judge(
        &self,
        more: &[(&'static str, std::ops::Range<u64>)],
        wrong: &mut dyn FnMut(String),
    ) {
        let len = self.bitmap_bytes() + self.block_size();
        let mut metadata = self.metadata();
        metadata.extend_from_slice(more);
        let mut used: Vec<(u64, usize)> = Vec::new();
        for (index, &entry) in self.table.iter().enumerate() {
            if entry == UNUSED {
                continue;
            }
            let at = u64::from(entry) * SECTOR;
            if at + self.bitmap_bytes() > self.file_len {
                wrong(format!("block {index} would be at offset {at:#x}, behind the file's end"));
                continue;
            }
            if let Some((what, _)) = metadata.iter().find(|(_, r)| at < r.end && r.start < at + len)
            {
                wrong(format!("block {index} at offset {at:#x} lies over the {what}"));
            }
            used.push((at, index));
        }
        used.sort_unstable();
        for pair in used.windows(2) {
            let ((a, first), (b, second)) = (pair[0], pair[1]);
            if b < a + len {
                wrong(format!("block {second} at offset {b:#x} lies over block {first} at {a:#x}"));
            }
        }
    }

    /// Refuses an image whose table cannot be right.
    ///
    /// # Errors
    /// The first thing that is wrong, and how much more there is.
    pub fn verify(&self) -> Result<()> {
        let (mut first, mut count) = (None, 0u64);
        self.judge(&[], &mut |why| {
            first.get_or_insert(why);
            count += 1;
        });
        match first {
            None => Ok(()),
            Some(why) => Err(self.refuse(format!(
                "block allocation table: {why}{}",
                if count > 1 {
                    format!(", and {} more like this", count - 1)
                } else {
                    String::new()
                }
            ))),
        }
    }
}

/// Bytes of the bitmap of a block of so many bytes.
pub(crate) fn bitmap_bytes(block: u64) -> u64 {
    (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
}

/// Whether a path begins with a drive letter, or names a server of Windows.
fn has_drive(path: &str) -> bool {
    let letter = path.starts_with(|c: char| c.is_ascii_alphabetic());
    (letter && path[1..].starts_with(':')) || path.starts_with("//")
}

/// The footer, where it was, and why it was not where it belongs.
///
/// The one at the end counts first: the front of a fixed disk belongs to its guest, who could make
/// it look like the header of something else.
fn find_footer(
    storage: &mut dyn Storage,
    name: &str,
) -> Result<(Footer, FooterAt, Option<String>)> {
    let len = storage.len();
    if len < SECTOR {
        return Err(Error::refused(name, format!("is no VHD image: it has only {len} bytes")));
    }
    let mut read = |at: u64, from: usize| -> Result<[u8; FOOTER_BYTES]> {
        let mut bytes = [0; FOOTER_BYTES];
        let part = &mut bytes[..FOOTER_BYTES - from];
        storage.read_at(at, part).map_err(Error::io(name, "footer"))?;
        Ok(bytes)
    };
    let why = match Footer::decode(&read(len - SECTOR, 0)?) {
        Ok(footer) => return Ok((footer, FooterAt::End, None)),
        Err(why) => why,
    };
    if let Ok(footer) = Footer::decode(&read(len - 511, 1)?) {
        return Ok((footer, FooterAt::Short, None));
    }
    match Footer::decode(&read(0, 0)?) {
        Ok(footer) if footer.disk_type != DiskType::Fixed => {
            Ok((footer, FooterAt::Front, Some(why)))
        }
        _ => Err(Error::refused(
            name,
            format!("is no VHD image: its last sector {why}, and there is no copy at the front"),
        )),
    }
}
