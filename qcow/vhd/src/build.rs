//! [`Builder`]: makes an image, from front to back. Control path.

use block::Storage;

use crate::format::{
    BLOCK_BYTES, Creator, DiskType, DynamicHeader, FOOTER_BYTES, Footer, Geometry, HEADER_BYTES,
    LOCATORS, Locator, MAX_DISK_BYTES, SECTOR, UNUSED,
};
use crate::image::bitmap_bytes;
use crate::{Error, Result};

/// What files made here say about who made them: what QEMU says in files whose current size counts,
/// the geometry being the nearest below. QEMU before version 10 takes others by their geometry, except
/// for the largest one, and that one is not permitted to small disks (vhd-util calls it too large).
const CREATOR: Creator = Creator { app: *b"qem2", version: 0x5_0003 };
/// Data begins at multiples of this, so that it can be read without other data around it.
const ALIGN: u64 = 4096;

/// How much of a file is allocated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subformat {
    /// Blocks that have data.
    Dynamic,
    /// All, as a raw disk with a footer.
    Fixed,
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// How much is allocated.
    pub subformat: Subformat,
    /// The disk has exactly that size, and its geometry may have up to a cylinder less. Else the
    /// size is rounded up to the next one that a geometry has, for programs that go by that.
    pub exact: bool,
    /// The disk's identity: 16 random bytes.
    pub uuid: [u8; 16],
    /// Seconds since 2000-01-01 00:00 UTC.
    pub timestamp: u32,
}

impl BuildOptions {
    /// The disk's geometry and size.
    fn shape(&self) -> Result<(Geometry, u64), String> {
        if self.size > MAX_DISK_BYTES {
            return Err(format!(
                "a VHD image cannot hold {} bytes; at most {MAX_DISK_BYTES} are possible",
                self.size
            ));
        }
        let held = Geometry::holding(self.size / SECTOR);
        let rounded = held.total() * SECTOR;
        if self.exact || rounded < self.size {
            return Ok((Geometry::of(self.size / SECTOR), self.size));
        }
        Ok((held, rounded))
    }

    /// Bytes of the disk that will be made: at least `size`.
    ///
    /// # Errors
    /// A sentence, if it is larger than the format permits.
    pub fn disk_size(&self) -> Result<u64, String> {
        self.shape().map(|(_, size)| size)
    }

    /// Bytes of the file, if the disk is all zeroes.
    ///
    /// # Errors
    /// As [`BuildOptions::disk_size`].
    pub fn image_len(&self) -> Result<u64, String> {
        let size = self.disk_size()?;
        Ok(match self.subformat {
            Subformat::Fixed => size + SECTOR,
            Subformat::Dynamic => tables_end(size) + SECTOR,
        })
    }
}

/// Where the table is: behind copy and header.
const TABLE_AT: u64 = (FOOTER_BYTES + HEADER_BYTES) as u64;

fn blocks(size: u64) -> u64 {
    size.div_ceil(u64::from(BLOCK_BYTES))
}

fn tables_end(size: u64) -> u64 {
    TABLE_AT + (blocks(size) * 4).next_multiple_of(SECTOR)
}

/// The block that is being filled.
struct Open {
    index: u64,
    at: u64,
    bitmap: Vec<u8>,
}

/// An image that is being made.
pub struct Builder<'s> {
    storage: &'s mut dyn Storage,
    name: String,
    footer: Footer,
    /// Empty if the disk is fixed.
    table: Vec<u32>,
    /// First byte that is not used yet.
    end: u64,
    open: Option<Open>,
}

impl<'s> Builder<'s> {
    /// Starts an image in `storage`, a file; what was in it is lost.
    ///
    /// # Errors
    /// If the disk is too large for the format (then nothing was written), `storage` is a device,
    /// or a write fails.
    pub fn new(
        storage: &'s mut dyn Storage,
        name: &str,
        options: &BuildOptions,
    ) -> Result<Builder<'s>> {
        let (geometry, size) = options.shape().map_err(|why| Error::refused(name, why))?;
        storage.set_len(0).map_err(Error::io(name, "set length"))?;
        if !storage.is_empty() {
            return Err(Error::refused(name, "VHD images are only made in files"));
        }
        let (disk_type, data_offset, count) = match options.subformat {
            Subformat::Fixed => (DiskType::Fixed, u64::MAX, 0),
            Subformat::Dynamic => (DiskType::Dynamic, SECTOR, blocks(size)),
        };
        let footer = Footer {
            data_offset,
            timestamp: options.timestamp,
            creator: CREATOR,
            original_size: size,
            current_size: size,
            geometry,
            disk_type,
            uuid: options.uuid,
            hidden: false,
        };
        let end = if count > 0 || disk_type == DiskType::Dynamic { tables_end(size) } else { size };
        let table = vec![UNUSED; count as usize];
        Ok(Builder { storage, name: name.to_owned(), footer, table, end, open: None })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.footer.current_size
    }

    /// The next bytes of the disk, from `at` on; whole sectors. What lies between the calls reads
    /// as zeroes.
    ///
    /// # Errors
    /// If a write fails.
    pub fn data(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        debug_assert!(at.is_multiple_of(SECTOR) && bytes.len().is_multiple_of(512));
        if self.footer.disk_type == DiskType::Fixed {
            return self.write("data", at, bytes);
        }
        let block = u64::from(BLOCK_BYTES);
        let mut done = 0;
        while done < bytes.len() {
            let (index, within) = ((at + done as u64) / block, (at + done as u64) % block);
            let len = ((block - within) as usize).min(bytes.len() - done);
            let host = self.block(index)? + within;
            self.write("data", host, &bytes[done..done + len])?;
            if let Some(open) = &mut self.open {
                for s in within / SECTOR..(within + len as u64) / SECTOR {
                    open.bitmap[(s / 8) as usize] |= 0x80 >> (s % 8);
                }
            }
            done += len;
        }
        Ok(())
    }

    /// Makes a block the one that is being filled; where its first sector is.
    fn block(&mut self, index: u64) -> Result<u64> {
        let bitmap = bitmap_bytes(u64::from(BLOCK_BYTES));
        if let Some(open) = &self.open
            && open.index == index
        {
            return Ok(open.at + bitmap);
        }
        self.end_block()?;
        let at = (self.end + bitmap).next_multiple_of(ALIGN) - bitmap;
        self.table[index as usize] = (at / SECTOR) as u32;
        self.end = at + bitmap + u64::from(BLOCK_BYTES);
        self.open = Some(Open { index, at, bitmap: vec![0; bitmap as usize] });
        Ok(at + bitmap)
    }

    fn end_block(&mut self) -> Result<()> {
        match self.open.take() {
            Some(open) => self.write("bitmap of a block", open.at, &open.bitmap),
            None => Ok(()),
        }
    }

    /// Writes what is left; the footers last. The image is durable when this returns its length in
    /// bytes.
    ///
    /// # Errors
    /// If a write fails; then there is no image.
    pub fn finish(mut self) -> Result<u64> {
        self.end_block()?;
        let end = self.end + SECTOR;
        self.storage.set_len(end).map_err(Error::io(&self.name, "set length"))?;
        let footer = self.footer.encode();
        if self.footer.disk_type == DiskType::Dynamic {
            let header = DynamicHeader {
                table_offset: TABLE_AT,
                max_entries: self.table.len() as u32,
                block_size: BLOCK_BYTES,
                parent_uuid: [0; 16],
                parent_timestamp: 0,
                parent_name: String::new(),
                locators: [Locator::default(); LOCATORS],
            };
            let mut table: Vec<u8> = self.table.iter().flat_map(|e| e.to_be_bytes()).collect();
            table.resize(table.len().next_multiple_of(SECTOR as usize), 0xff);
            self.write("header", SECTOR, &header.encode())?;
            self.write("block allocation table", TABLE_AT, &table)?;
            self.flush()?;
            self.write("copy of the footer", 0, &footer)?;
        }
        self.write("footer", end - SECTOR, &footer)?;
        self.flush()?;
        Ok(end)
    }

    fn flush(&mut self) -> Result<()> {
        self.storage.flush().map_err(Error::io(&self.name, "flush"))
    }

    fn write(&mut self, what: &'static str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.storage.write_at(offset, bytes).map_err(Error::io(&self.name, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What vhd-util's check demands of a footer, and QEMU for the exact size.
    #[test]
    fn a_geometry_is_not_larger_than_the_disk() {
        let encoded = |g: Geometry| {
            u32::from(g.cylinders) << 16 | u32::from(g.heads) << 8 | u32::from(g.sectors)
        };
        let most = Geometry::MAX.total();
        let mut sizes = vec![0, 1, 67, 68, 69, 37 * 2048, 20480, most, MAX_DISK_BYTES / SECTOR];
        // Around each change of heads and of sectors per track.
        let heads = (1..=64).map(|i| i * 1024 * 17);
        let edges = heads.chain([16 * 1024 * 31, 65535 * 16 * 63, 1 << 21, 1 << 27, most]);
        sizes.extend(edges.flat_map(|e| (e - 350..e + 350).step_by(35)));
        for sectors in sizes {
            for exact in [true, false] {
                let size = sectors * SECTOR;
                let (subformat, uuid) = (Subformat::Dynamic, [1; 16]);
                let options = BuildOptions { size, subformat, exact, uuid, timestamp: 0 };
                let (geometry, made) = options.shape().unwrap();
                assert!(encoded(geometry) <= encoded(Geometry::of(made / SECTOR)), "{sectors}");
                assert!(made >= size && (made == size || !exact), "{sectors}");
                // Programs that go by the geometry lose nothing, if they were meant and can do it.
                let total = geometry.total() * SECTOR;
                assert!(exact || total == made || sectors > most, "{sectors}: {geometry:?}");
            }
        }
        // Those whose current size QEMU believed before version 10, when it had a list of them.
        assert!([b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0"].contains(&&CREATOR.app));
    }
}
