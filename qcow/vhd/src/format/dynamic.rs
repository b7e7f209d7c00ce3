//! [`DynamicHeader`]: what dynamic and differencing disks have beyond the footer; the names of
//! parents; tapdisk's map of full blocks ([`BatMap`]).

use super::{HEADER_BYTES, SECTOR, Wrong, checksum, put, u32_at, u64_at};

/// Places for parent locators in a header.
pub const LOCATORS: usize = 8;

/// How the bytes of a parent locator are meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlatformCode {
    /// "W2ku": an absolute path, UTF-16 little-endian.
    Absolute,
    /// "W2ru": a path relative to the child, UTF-16 little-endian.
    Relative,
    /// "MacX": a file URL, UTF-8.
    Url,
}

impl PlatformCode {
    /// The number that stands for it; `None` for those that nobody uses any more.
    pub fn from_code(code: u32) -> Option<PlatformCode> {
        match &code.to_be_bytes() {
            b"W2ku" => Some(PlatformCode::Absolute),
            b"W2ru" => Some(PlatformCode::Relative),
            b"MacX" => Some(PlatformCode::Url),
            _ => None,
        }
    }

    /// The path that a locator's bytes mean, with slashes. tapdisk writes relative paths into all
    /// kinds, and does not escape those in URLs.
    ///
    /// # Errors
    /// Why there is none.
    pub fn path(self, bytes: &[u8]) -> Result<String, Wrong> {
        match self {
            PlatformCode::Absolute | PlatformCode::Relative => {
                Ok(from_windows(&utf16(bytes, u16::from_le_bytes)?))
            }
            PlatformCode::Url => {
                let text = std::str::from_utf8(bytes).map_err(|_| "is not UTF-8".to_owned())?;
                let text = text.trim_end_matches('\0');
                let rest = text.strip_prefix("file://").ok_or("is no file URL".to_owned())?;
                Ok(rest.strip_prefix("localhost/").map_or(rest.to_owned(), |r| format!("/{r}")))
            }
        }
    }
}

/// Where a name of the parent is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Locator {
    /// See [`PlatformCode`]; 0 if there is nothing.
    pub code: u32,
    /// Space for the name: sectors, but bytes where Microsoft or tapdisk wrote it.
    pub space: u32,
    /// Bytes of the name.
    pub len: u32,
    /// Where in the file it is.
    pub offset: u64,
}

impl Locator {
    /// Bytes that are set aside for the name.
    pub fn space_bytes(&self) -> u64 {
        let space = u64::from(self.space);
        let bytes = if space < SECTOR { space * SECTOR } else { space };
        bytes.max(u64::from(self.len)).next_multiple_of(SECTOR)
    }
}

/// The header.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DynamicHeader {
    /// Where the block allocation table is.
    pub table_offset: u64,
    /// Its entries.
    pub max_entries: u32,
    /// Bytes of a block, a power of two.
    pub block_size: u32,
    /// The parent's identity; zeroes if the parent is a raw disk, as tapdisk has it.
    pub parent_uuid: [u8; 16],
    /// When the parent was last changed: seconds since 2000.
    pub parent_timestamp: u32,
    /// The parent's name, usually without its folder. Empty if there is none.
    pub parent_name: String,
    /// Names of the parent.
    pub locators: [Locator; LOCATORS],
}

impl DynamicHeader {
    const CHECKSUM_AT: usize = 36;
    const NAME_AT: usize = 64;
    const NAME_BYTES: usize = 512;
    const LOCATORS_AT: usize = 576;

    /// Takes a header apart.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<DynamicHeader, Wrong> {
        if &bytes[..8] != b"cxsparse" {
            return Err("has no cookie \"cxsparse\"".to_owned());
        }
        let (said, is) = (u32_at(bytes, Self::CHECKSUM_AT), checksum(bytes, Self::CHECKSUM_AT));
        if said != is {
            return Err(format!("has checksum {said:#010x}, but its bytes give {is:#010x}"));
        }
        let version = u32_at(bytes, 24);
        if version >> 16 != 1 {
            return Err(format!("has version {version:#x}; only 0x10000 is known"));
        }
        let mut parent_uuid = [0; 16];
        parent_uuid.copy_from_slice(&bytes[40..56]);
        let name = &bytes[Self::NAME_AT..Self::NAME_AT + Self::NAME_BYTES];
        let mut locators = [Locator::default(); LOCATORS];
        for (i, l) in locators.iter_mut().enumerate() {
            let at = Self::LOCATORS_AT + i * 24;
            *l = Locator {
                code: u32_at(bytes, at),
                space: u32_at(bytes, at + 4),
                len: u32_at(bytes, at + 8),
                offset: u64_at(bytes, at + 16),
            };
        }
        Ok(DynamicHeader {
            table_offset: u64_at(bytes, 16),
            max_entries: u32_at(bytes, 28),
            block_size: u32_at(bytes, 32),
            parent_uuid,
            parent_timestamp: u32_at(bytes, 56),
            // A name that is none: there still are the locators.
            parent_name: utf16(name, u16::from_be_bytes)
                .map_or(String::new(), |n| from_windows(&n)),
            locators,
        })
    }

    /// The bytes, with their checksum. Of the parent's name as much as there is room for.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        put(&mut b, 0, b"cxsparse");
        put(&mut b, 8, &u64::MAX.to_be_bytes());
        put(&mut b, 16, &self.table_offset.to_be_bytes());
        put(&mut b, 24, &0x1_0000u32.to_be_bytes());
        put(&mut b, 28, &self.max_entries.to_be_bytes());
        put(&mut b, 32, &self.block_size.to_be_bytes());
        put(&mut b, 40, &self.parent_uuid);
        put(&mut b, 56, &self.parent_timestamp.to_be_bytes());
        for (i, unit) in self.parent_name.encode_utf16().take(Self::NAME_BYTES / 2).enumerate() {
            put(&mut b, Self::NAME_AT + i * 2, &unit.to_be_bytes());
        }
        for (i, l) in self.locators.iter().enumerate() {
            let at = Self::LOCATORS_AT + i * 24;
            put(&mut b, at, &l.code.to_be_bytes());
            put(&mut b, at + 4, &l.space.to_be_bytes());
            put(&mut b, at + 8, &l.len.to_be_bytes());
            put(&mut b, at + 16, &l.offset.to_be_bytes());
        }
        let sum = checksum(&b, Self::CHECKSUM_AT);
        put(&mut b, Self::CHECKSUM_AT, &sum.to_be_bytes());
        b
    }
}

/// The header of tapdisk's map of blocks in which every sector is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatMap {
    /// Where the map is.
    pub offset: u64,
    /// Its sectors.
    pub sectors: u32,
    /// Its version: 0x10002; 0x10001 has a checksum over signed bytes.
    pub version: u32,
    /// The complement of the sum of its bytes.
    pub checksum: u32,
}

impl BatMap {
    /// Takes the header apart; `None` if there is none.
    pub fn decode(bytes: &[u8; 512]) -> Option<BatMap> {
        let header = BatMap {
            offset: u64_at(bytes, 8),
            sectors: u32_at(bytes, 16),
            version: u32_at(bytes, 20),
            checksum: u32_at(bytes, 24),
        };
        (&bytes[..8] == b"tdbatmap" && header.version <= 0x1_0002).then_some(header)
    }

    /// The sum of the map's bytes as this version has it, to be continued with further bytes.
    pub fn sum(&self, sum: u32, bytes: &[u8]) -> u32 {
        let signed = self.version == 0x1_0001;
        let word = |b: u8| if signed { i32::from(b as i8) as u32 } else { u32::from(b) };
        bytes.iter().fold(sum, |sum, &b| sum.wrapping_add(word(b)))
    }
}

/// Text of 16-bit units, up to the first zero.
fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Result<String, Wrong> {
    let units = bytes.as_chunks::<2>().0.iter().map(|&b| unit(b)).take_while(|&u| u != 0);
    char::decode_utf16(units).collect::<Result<_, _>>().map_err(|_| "is not UTF-16".to_owned())
}

/// A path with slashes.
fn from_windows(path: &str) -> String {
    path.replace('\\', "/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_there_and_back() {
        let mut header = DynamicHeader {
            table_offset: 1536,
            max_entries: 5,
            block_size: 2 << 20,
            parent_uuid: *b"0123456789abcdef",
            parent_timestamp: 9,
            parent_name: "bäse.vhd".to_owned(),
            locators: [Locator::default(); LOCATORS],
        };
        header.locators[3] =
            Locator { code: u32::from_be_bytes(*b"MacX"), space: 512, len: 17, offset: 4096 };
        let good = header.encode();
        assert_eq!(DynamicHeader::decode(&good), Ok(header));
        for at in 0..HEADER_BYTES {
            let mut bad = good;
            bad[at] ^= 0x80;
            assert!(DynamicHeader::decode(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn names_of_parents() {
        let le = |s: &str| s.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let relative = PlatformCode::Relative.path(&le(".\\a b\\c.vhd\0junk"));
        assert_eq!(relative, Ok("./a b/c.vhd".to_owned()));
        assert_eq!(PlatformCode::Absolute.path(&le("\\x\\y")), Ok("/x/y".to_owned()));
        assert_eq!(PlatformCode::Url.path(b"file://./c.vhd"), Ok("./c.vhd".to_owned()));
        assert_eq!(PlatformCode::Url.path(b"file:///x/c.vhd\0"), Ok("/x/c.vhd".to_owned()));
        assert_eq!(PlatformCode::Url.path(b"file://localhost/x"), Ok("/x".to_owned()));
        assert!(PlatformCode::Url.path(b"http://x/c.vhd").is_err());
        assert!(PlatformCode::Absolute.path(&[0, 0xd8, 0x41, 0]).is_err());
    }

    #[test]
    fn space_is_sectors_or_bytes() {
        let space = |space, len| Locator { code: 1, space, len, offset: 0 }.space_bytes();
        assert_eq!(
            (space(1, 20), space(512, 20), space(1024, 20), space(0, 20)),
            (512, 512, 1024, 512)
        );
    }
}
