//! [`MetadataArea`]: one copy of a group's metadata: a header of one sector, and behind it a ring of
//! bytes that texts are put into one after another. The header says which text is in force, so
//! writing it is the commit.

use block::Storage;

use crate::crc::crc;
use crate::error::{Error, Result, corrupt, unsupported};
use crate::label::{Area, Cursor, SECTOR};

const MAGIC: &[u8; 16] = b" LVM2 x[5A%r0N*>";
const VERSION: u32 = 1;
/// Where the ring of texts begins in the area.
const RING: u64 = SECTOR;
/// The area is not used: others hold the group's metadata.
const IGNORED: u32 = 1;
/// Longest text that is read, in bytes. A thousand volumes of 64 segments are a fifth of it.
pub const MAX_TEXT: u64 = 32 << 20;

/// Where in its area a text is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// First byte, from the area's begin.
    pub offset: u64,
    /// Bytes, with the zero byte at the end.
    pub size: u64,
    /// Checksum of all of them.
    pub checksum: u32,
}

/// A metadata area, as its header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MetadataArea {
    /// Where it is on the device.
    pub area: Area,
    /// The text in force.
    pub live: Option<Place>,
    /// Nothing is to be read from it or written to it.
    pub ignored: bool,
}

impl MetadataArea {
    /// An area without a text.
    pub fn empty(area: Area) -> MetadataArea {
        MetadataArea { area, live: None, ignored: false }
    }

    /// Reads the header of an area that a label names.
    ///
    /// # Errors
    /// If it cannot be read or is damaged.
    pub fn read(st: &mut dyn Storage, area: Area) -> Result<MetadataArea> {
        let mut sector = [0; SECTOR as usize];
        st.read_at(area.offset, &mut sector).map_err(Error::io("metadata area header"))?;
        let mut at = Cursor { bytes: &sector, at: 0 };
        if at.u32()? != crc(&sector[4..]) {
            return corrupt("a metadata area's header has a wrong checksum");
        }
        if at.take::<16>()? != *MAGIC {
            return corrupt("a metadata area's header does not begin as it should");
        }
        let version = at.u32()?;
        if version != VERSION {
            return unsupported(format!("version {version} of metadata areas is"));
        }
        let said = Area { offset: at.u64()?, size: at.u64()? };
        if said != area {
            return corrupt("a metadata area's header and the label do not agree where it is");
        }
        let place = Place { offset: at.u64()?, size: at.u64()?, checksum: at.u32()? };
        let ignored = at.u32()? & IGNORED != 0;
        let mut found = MetadataArea { area, live: None, ignored };
        if place.offset != 0 && place.size != 0 {
            found.check(&place)?;
            found.live = Some(place);
        }
        Ok(found)
    }

    fn check(&self, place: &Place) -> Result<()> {
        let room = self.room();
        if place.offset < RING || place.offset >= self.area.size {
            return corrupt("the metadata in force lies outside its area");
        }
        if place.size > room {
            return corrupt("the metadata in force is larger than its area");
        }
        if place.size > MAX_TEXT {
            return unsupported(format!("metadata of {} bytes is", place.size));
        }
        Ok(())
    }

    /// Bytes for texts.
    pub fn room(&self) -> u64 {
        self.area.size.saturating_sub(RING)
    }

    /// The header's sector.
    pub fn encode(&self) -> [u8; SECTOR as usize] {
        let mut sector = [0; SECTOR as usize];
        sector[4..20].copy_from_slice(MAGIC);
        sector[20..24].copy_from_slice(&VERSION.to_le_bytes());
        sector[24..32].copy_from_slice(&self.area.offset.to_le_bytes());
        sector[32..40].copy_from_slice(&self.area.size.to_le_bytes());
        if let Some(live) = &self.live {
            sector[40..48].copy_from_slice(&live.offset.to_le_bytes());
            sector[48..56].copy_from_slice(&live.size.to_le_bytes());
            sector[56..60].copy_from_slice(&live.checksum.to_le_bytes());
        }
        sector[60..64].copy_from_slice(&u32::from(self.ignored).to_le_bytes());
        let sum = crc(&sector[4..]);
        sector[..4].copy_from_slice(&sum.to_le_bytes());
        sector
    }

    /// Writes the header.
    ///
    /// # Errors
    /// If the device cannot be written.
    pub fn write(&self, st: &mut dyn Storage) -> Result<()> {
        let sector = self.encode();
        st.write_at(self.area.offset, &sector).map_err(Error::io("metadata area header"))
    }

    /// The text in force, without the zero byte at its end. `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be read or its checksum is wrong.
    pub fn text(&self, st: &mut dyn Storage) -> Result<Option<Vec<u8>>> {
        let Some(live) = &self.live else { return Ok(None) };
        self.check(live)?;
        let mut text = vec![0; live.size as usize];
        let (first, rest) = text.split_at_mut(self.before_wrap(live) as usize);
        let begin = self.area.offset + live.offset;
        st.read_at(begin, first).map_err(Error::io("metadata"))?;
        if !rest.is_empty() {
            st.read_at(self.area.offset + RING, rest).map_err(Error::io("metadata"))?;
        }
        if crc(&text) != live.checksum {
            return corrupt("the metadata in force has a wrong checksum");
        }
        while text.last() == Some(&0) {
            text.pop();
        }
        Ok(Some(text))
    }

    /// How many of its bytes lie before the ring's end.
    fn before_wrap(&self, place: &Place) -> u64 {
        place.size.min(self.area.size - place.offset)
    }

    /// Where a new text (with a zero byte at its end) goes: behind the one in force, and never over
    /// a sector of it.
    ///
    /// # Errors
    /// If there is no room for both.
    pub fn next(&self, text: &[u8]) -> Result<Place> {
        let ring = self.room() / SECTOR * SECTOR;
        let whole = |bytes: u64| bytes.div_ceil(SECTOR).saturating_mul(SECTOR);
        let size = text.len() as u64;
        // A text may begin anywhere in a sector; the ones that we write begin with it.
        let (offset, live) = match &self.live {
            None => (RING, 0),
            Some(live) => {
                let end = (live.offset % SECTOR) + live.size;
                let next = live.offset - live.offset % SECTOR - RING + whole(end);
                (RING + if ring == 0 { 0 } else { next % ring }, whole(end))
            }
        };
        // An area whose size is no multiple of a sector wraps elsewhere than whole sectors do.
        let odd = self.area.size - RING != ring;
        let fits = whole(size).checked_add(live).is_some_and(|sum| sum <= ring) && size <= MAX_TEXT;
        if !fits || odd {
            let live = self.live.map_or(0, |live| live.size);
            return Err(Error::MetadataFull { size, live, room: ring });
        }
        Ok(Place { offset, size, checksum: crc(text) })
    }

    /// Puts a text into its place. In force it is only with the header.
    ///
    /// # Errors
    /// If the device cannot be written.
    pub fn put(&self, st: &mut dyn Storage, place: &Place, text: &[u8]) -> Result<()> {
        let (first, rest) = text.split_at(self.before_wrap(place) as usize);
        let begin = self.area.offset + place.offset;
        st.write_at(begin, first).map_err(Error::io("metadata"))?;
        if !rest.is_empty() {
            st.write_at(self.area.offset + RING, rest).map_err(Error::io("metadata"))?;
        }
        Ok(())
    }
}
