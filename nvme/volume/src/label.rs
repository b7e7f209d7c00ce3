//! [`Label`]: what makes a device a physical volume: one sector of the first four that says who it
//! is and where its metadata areas and its data are. Read at opening, written at creation.

use block::Storage;

use crate::crc::crc;
use crate::error::{Error, Result, corrupt, unsupported};
use crate::id::Id;

/// Bytes of a sector of LVM, whatever the device's block.
pub(crate) const SECTOR: u64 = 512;
/// The label is in one of so many sectors at the front.
const SCANNED: usize = 4;
/// All of them.
pub(crate) const HEAD: Area = Area { offset: 0, size: SCANNED as u64 * SECTOR };
const MAGIC: &[u8; 8] = b"LABELONE";
const KIND: &[u8; 8] = b"LVM2 001";
/// Where the physical volume's header begins in a label that we write.
const BODY: usize = 32;
/// Version of the header's extension that we know.
const EXTENSION: u32 = 2;
/// The device belongs to a group.
const USED: u32 = 1;

/// A range of bytes on the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Area {
    /// First byte.
    pub offset: u64,
    /// How many; 0 in a data area that goes on to the end of the device.
    pub size: u64,
}

impl Area {
    /// Where it ends.
    pub(crate) fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.size)
    }
}

/// A physical volume's label and header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Label {
    /// The device's identity.
    pub id: Id,
    /// Size of the device in bytes when the label was written.
    pub device_size: u64,
    /// Where the extents are. Of one area the first byte counts.
    pub data: Vec<Area>,
    /// Where the metadata areas are.
    pub metadata: Vec<Area>,
    /// Whether the label says that the device belongs to a group.
    pub used: bool,
    /// Sector that it is in.
    pub sector: u64,
}

impl Label {
    /// Looks for a label in the first four sectors. `None`: no physical volume of LVM2.
    ///
    /// # Errors
    /// If the device cannot be read; if there is a label and it is damaged or of a newer kind.
    pub fn read(st: &mut dyn Storage) -> Result<Option<Label>> {
        let mut head = vec![0; SCANNED * SECTOR as usize];
        st.read_at(0, &mut head).map_err(Error::io("label"))?;
        for (number, sector) in head.chunks_exact(SECTOR as usize).enumerate() {
            if sector.starts_with(MAGIC) {
                let label = Label::parse(sector, number as u64)?;
                label.check(st.len())?;
                return Ok(Some(label));
            }
        }
        Ok(None)
    }

    fn parse(sector: &[u8], number: u64) -> Result<Label> {
        let mut at = Cursor { bytes: sector, at: 8 };
        let said = at.u64()?;
        if said != number {
            return corrupt(format!("the label in sector {number} says it is in sector {said}"));
        }
        let sum = at.u32()?;
        if sum != crc(&sector[20..]) {
            return corrupt(format!("the label in sector {number} has a wrong checksum"));
        }
        let body = at.u32()? as usize;
        if at.take::<8>()? != *KIND {
            return unsupported("a label of another kind than `LVM2 001` is");
        }
        if body < BODY {
            return corrupt("the label's header lies inside the label");
        }
        at.at = body;
        let id = Id::from_raw(at.take()?)?;
        let device_size = at.u64()?;
        let data = at.areas()?;
        let metadata = at.areas()?;
        // Before extensions existed zeroes followed.
        let used = match at.u32().unwrap_or(0) {
            0 => false,
            version if version > EXTENSION => {
                return unsupported(format!("version {version} of the label's extension is"));
            }
            _ => {
                let flags = at.u32()?;
                if flags & !USED != 0 {
                    return unsupported(format!("flags {flags:#x} of the label are"));
                }
                // Bootloader areas: nothing of ours is put there, and nothing is written to them.
                at.areas()?;
                flags & USED != 0
            }
        };
        Ok(Label { id, device_size, data, metadata, used, sector: number })
    }

    /// The areas lie on the device and apart from each other.
    fn check(&self, len: u64) -> Result<()> {
        if self.data.len() != 1 {
            return unsupported(format!("{} data areas on one device are", self.data.len()));
        }
        let mut taken = vec![HEAD];
        for area in &self.metadata {
            let Some(end) = area.end().filter(|&end| end <= len) else {
                return corrupt("a metadata area lies past the end of the device");
            };
            if area.offset % SECTOR != 0 || area.size < 2 * SECTOR {
                return corrupt("a metadata area is too small or not at a sector");
            }
            if taken.iter().any(|t| area.offset < t.offset + t.size && t.offset < end) {
                return corrupt("metadata areas overlap");
            }
            taken.push(*area);
        }
        Ok(())
    }

    /// The sector's bytes.
    ///
    /// # Errors
    /// If there are more areas than a sector has room for.
    pub fn encode(&self) -> Result<[u8; SECTOR as usize]> {
        let mut body = Vec::with_capacity(SECTOR as usize);
        body.extend_from_slice(self.id.raw());
        body.extend_from_slice(&self.device_size.to_le_bytes());
        let nothing = Area { offset: 0, size: 0 };
        let lists = self.data.iter().chain([&nothing]).chain(&self.metadata).chain([&nothing]);
        for area in lists {
            body.extend_from_slice(&area.offset.to_le_bytes());
            body.extend_from_slice(&area.size.to_le_bytes());
        }
        body.extend_from_slice(&EXTENSION.to_le_bytes());
        body.extend_from_slice(&u32::from(self.used).to_le_bytes());
        // The end of the list of bootloader areas, of which there are none.
        body.extend_from_slice(&[0; 16]);
        let mut sector = [0; SECTOR as usize];
        let Some(room) = sector.get_mut(BODY..BODY + body.len()) else {
            return corrupt("more areas than a label has room for");
        };
        room.copy_from_slice(&body);
        sector[..8].copy_from_slice(MAGIC);
        sector[8..16].copy_from_slice(&self.sector.to_le_bytes());
        sector[20..24].copy_from_slice(&(BODY as u32).to_le_bytes());
        sector[24..32].copy_from_slice(KIND);
        let sum = crc(&sector[20..]);
        sector[16..20].copy_from_slice(&sum.to_le_bytes());
        Ok(sector)
    }

    /// Writes it, and zeroes over whatever else is in the sectors where a label is looked for.
    ///
    /// # Errors
    /// If the device cannot be written.
    pub fn write(&self, st: &mut dyn Storage) -> Result<()> {
        let mut head = [0; SCANNED * SECTOR as usize];
        let at = self.sector as usize * SECTOR as usize;
        let Some(room) = head.get_mut(at..at + SECTOR as usize) else {
            return corrupt(format!("a label is not looked for in sector {}", self.sector));
        };
        room.copy_from_slice(&self.encode()?);
        st.write_at(0, &head).map_err(Error::io("label"))
    }

    /// Makes a device no physical volume any more.
    ///
    /// # Errors
    /// If the device cannot be written.
    pub fn wipe(st: &mut dyn Storage) -> Result<()> {
        let head = [0; SCANNED * SECTOR as usize];
        st.write_at(0, &head).map_err(Error::io("label"))
    }
}

/// Reads fields one after another; whoever reads too far is told so.
pub(crate) struct Cursor<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) at: usize,
}

impl Cursor<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let end = self.at.checked_add(N);
        let field = end.and_then(|end| self.bytes.get(self.at..end));
        match field.and_then(|field| <[u8; N]>::try_from(field).ok()) {
            Some(field) => {
                self.at += N;
                Ok(field)
            }
            None => corrupt("a header goes on past its sector"),
        }
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// A list that ends with an offset of 0.
    fn areas(&mut self) -> Result<Vec<Area>> {
        let mut areas = Vec::new();
        loop {
            let area = Area { offset: self.u64()?, size: self.u64()? };
            if area.offset == 0 {
                return Ok(areas);
            }
            areas.push(area);
        }
    }
}
