//! [`Footer`]: the last sector of every VHD file, and the first one of dynamic and differencing ones.

use super::{COOKIE, FOOTER_BYTES, SECTOR, Wrong, checksum, put, u16_at, u32_at, u64_at};

/// What a file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskType {
    /// The disk's bytes, then the footer.
    Fixed,
    /// Blocks that are allocated as they are needed.
    Dynamic,
    /// As dynamic, over a parent.
    Differencing,
}

impl DiskType {
    fn code(self) -> u32 {
        match self {
            DiskType::Fixed => 2,
            DiskType::Dynamic => 3,
            DiskType::Differencing => 4,
        }
    }

    /// The name that options and messages use.
    pub fn name(self) -> &'static str {
        match self {
            DiskType::Fixed => "fixed",
            DiskType::Dynamic => "dynamic",
            DiskType::Differencing => "differencing",
        }
    }
}

/// Cylinders, heads and sectors per track.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors per track.
    pub sectors: u8,
}

impl Geometry {
    /// The largest, which says nothing about the size.
    pub const MAX: Geometry = Geometry { cylinders: 65535, heads: 16, sectors: 255 };

    /// Sectors of a disk that has exactly this geometry.
    pub fn total(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }

    /// The geometry that the specification's appendix gives a disk of so many sectors; its total is
    /// at most that.
    pub fn of(sectors: u64) -> Geometry {
        let total = sectors.min(Geometry::MAX.total()) as u32;
        let (mut spt, mut heads);
        let mut tracks;
        if total >= 65535 * 16 * 63 {
            (spt, heads) = (255, 16);
            tracks = total / spt;
        } else {
            spt = 17;
            tracks = total / spt;
            heads = tracks.div_ceil(1024).max(4);
            if tracks >= heads * 1024 || heads > 16 {
                (spt, heads) = (31, 16);
                tracks = total / spt;
            }
            if tracks >= heads * 1024 {
                (spt, heads) = (63, 16);
                tracks = total / spt;
            }
        }
        let cylinders = (tracks / heads).min(65535) as u16;
        Geometry { cylinders, heads: heads as u8, sectors: spt as u8 }
    }

    /// A geometry that holds so many sectors, or the largest: the next one that is the geometry of
    /// a disk that has just its sectors. (Some are not: other heads would fit such a disk better.)
    pub fn holding(sectors: u64) -> Geometry {
        let mut ask = sectors;
        loop {
            let g = Geometry::of(ask);
            let total = g.total();
            if (total >= sectors && Geometry::of(total) == g) || total >= Geometry::MAX.total() {
                return g;
            }
            // At most a cylinder is missing.
            ask += sectors.saturating_sub(total).max(1);
        }
    }
}

/// The program that made a file: its name and version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Creator {
    /// Four characters.
    pub app: [u8; 4],
    /// Major and minor number, 16 bits each.
    pub version: u32,
}

impl Creator {
    /// Whether it is tapdisk or vhd-util.
    pub fn is_tapdisk(self) -> bool {
        self.app.starts_with(b"tap")
    }

    /// Whether its sector bitmaps have the lowest bit first: tapdisk's first version.
    pub fn swaps_bits(self) -> bool {
        self.is_tapdisk() && self.version == 1
    }

    /// Whether its early versions, which did not renew the checksum when they hid a file, made it.
    fn forgets_checksum(self) -> bool {
        self.is_tapdisk() && (self.version == 1 || self.version == 0x1_0001)
    }

    /// The name, printable.
    pub fn name(self) -> String {
        let text: String = self.app.iter().take_while(|&&b| b != 0).map(|&b| b as char).collect();
        text.trim_end().chars().filter(|c| c.is_ascii_graphic()).collect()
    }
}

/// The footer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Footer {
    /// Where the dynamic header is; all ones if there is none.
    pub data_offset: u64,
    /// Seconds since 2000-01-01 00:00 UTC.
    pub timestamp: u32,
    /// Who made it.
    pub creator: Creator,
    /// The disk's size in bytes when it was made.
    pub original_size: u64,
    /// The disk's size in bytes.
    pub current_size: u64,
    /// The disk's size as cylinders, heads and sectors.
    pub geometry: Geometry,
    /// What the file is.
    pub disk_type: DiskType,
    /// The disk's identity, which a child of it names.
    pub uuid: [u8; 16],
    /// tapdisk's mark on files that are only there for their children.
    pub hidden: bool,
}

impl Footer {
    const CHECKSUM_AT: usize = 64;
    const HIDDEN_AT: usize = 85;

    /// Takes a footer apart.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8; FOOTER_BYTES]) -> Result<Footer, Wrong> {
        if &bytes[..8] == b"v_poison" {
            return Err("was disabled by vhd-util, in the middle of an operation".to_owned());
        }
        if &bytes[..8] != COOKIE {
            return Err("has no cookie \"conectix\"".to_owned());
        }
        let creator = Creator {
            app: [bytes[28], bytes[29], bytes[30], bytes[31]],
            version: u32_at(bytes, 32),
        };
        let (said, is) = (u32_at(bytes, Self::CHECKSUM_AT), checksum(bytes, Self::CHECKSUM_AT));
        let hidden = bytes[Self::HIDDEN_AT];
        let before = is.wrapping_add(u32::from(hidden));
        if said != is && !(hidden != 0 && creator.forgets_checksum() && said == before) {
            return Err(format!("has checksum {said:#010x}, but its bytes give {is:#010x}"));
        }
        let version = u32_at(bytes, 12);
        if version >> 16 != 1 {
            return Err(format!("has version {version:#x}; only 0x10000 is known"));
        }
        let disk_type = match u32_at(bytes, 60) {
            2 => DiskType::Fixed,
            3 => DiskType::Dynamic,
            4 => DiskType::Differencing,
            other => return Err(format!("has disk type {other}; 2, 3 and 4 are possible")),
        };
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[68..84]);
        Ok(Footer {
            data_offset: u64_at(bytes, 16),
            timestamp: u32_at(bytes, 24),
            creator,
            original_size: u64_at(bytes, 40),
            current_size: u64_at(bytes, 48),
            geometry: Geometry {
                cylinders: u16_at(bytes, 56),
                heads: bytes[58],
                sectors: bytes[59],
            },
            disk_type,
            uuid,
            hidden: hidden != 0,
        })
    }

    /// The bytes, with their checksum.
    pub fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut b = [0; FOOTER_BYTES];
        put(&mut b, 0, COOKIE);
        // Features: a bit that is reserved and always set. Then the version.
        put(&mut b, 8, &2u32.to_be_bytes());
        put(&mut b, 12, &0x1_0000u32.to_be_bytes());
        put(&mut b, 16, &self.data_offset.to_be_bytes());
        put(&mut b, 24, &self.timestamp.to_be_bytes());
        put(&mut b, 28, &self.creator.app);
        put(&mut b, 32, &self.creator.version.to_be_bytes());
        put(&mut b, 36, b"Wi2k");
        put(&mut b, 40, &self.original_size.to_be_bytes());
        put(&mut b, 48, &self.current_size.to_be_bytes());
        put(&mut b, 56, &self.geometry.cylinders.to_be_bytes());
        b[58] = self.geometry.heads;
        b[59] = self.geometry.sectors;
        put(&mut b, 60, &self.disk_type.code().to_be_bytes());
        put(&mut b, 68, &self.uuid);
        b[Self::HIDDEN_AT] = u8::from(self.hidden);
        let sum = checksum(&b, Self::CHECKSUM_AT);
        put(&mut b, Self::CHECKSUM_AT, &sum.to_be_bytes());
        b
    }

    /// Bytes that a guest sees. Virtual PC and QEMU show what the geometry says, and QEMU goes by
    /// the creator's name and by whether the geometry is the largest; everybody else shows the
    /// current size.
    pub fn disk_size(&self) -> u64 {
        let by_geometry = matches!(&self.creator.app, b"vpc " | b"qemu");
        if by_geometry && self.geometry != Geometry::MAX {
            self.geometry.total() * SECTOR
        } else {
            self.whole_size()
        }
    }

    /// Bytes that a child of the disk can see of it, whoever made it: the current size. Whoever
    /// opens a chain is one of those who go by that, and the child may have been made over all of
    /// it.
    pub fn whole_size(&self) -> u64 {
        self.current_size & !(SECTOR - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer() -> Footer {
        Footer {
            data_offset: 512,
            timestamp: 7,
            creator: Creator { app: *b"tap\0", version: 0x1_0003 },
            original_size: 10 << 20,
            current_size: 12 << 20,
            geometry: Geometry::of((12 << 20) / 512),
            disk_type: DiskType::Dynamic,
            uuid: *b"0123456789abcdef",
            hidden: true,
        }
    }

    #[test]
    fn goes_there_and_back() {
        let f = footer();
        assert_eq!(Footer::decode(&f.encode()), Ok(f));
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let good = footer().encode();
        for at in 0..FOOTER_BYTES {
            let mut bad = good;
            bad[at] ^= 1;
            assert!(Footer::decode(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn an_old_tapdisk_hid_files_without_a_new_checksum() {
        let mut f = Footer { hidden: false, ..footer() };
        f.creator.version = 0x1_0001;
        let mut bytes = f.encode();
        bytes[Footer::HIDDEN_AT] = 1;
        assert!(Footer::decode(&bytes).unwrap().hidden);
        f.creator.version = 0x1_0002;
        bytes = f.encode();
        bytes[Footer::HIDDEN_AT] = 1;
        assert!(Footer::decode(&bytes).is_err());
    }

    /// Values of the specification's algorithm, computed by hand.
    #[test]
    fn geometries() {
        let g = |cylinders, heads, sectors| Geometry { cylinders, heads, sectors };
        assert_eq!(Geometry::of(20480), g(301, 4, 17)); // 10 MiB
        assert_eq!(Geometry::of(2_097_152), g(2080, 16, 63)); // 1 GiB
        assert_eq!(Geometry::of(1 << 33), Geometry::MAX);
        assert_eq!(Geometry::of(66_059_280), g(16191, 16, 255));
        for sectors in [1, 68, 69, 20480, 20481, 2_097_152, 66_059_279, 66_059_280, 267_382_799] {
            let held = Geometry::holding(sectors);
            assert!(held.total() >= sectors, "{sectors}: {held:?}");
        }
    }
}
