//! The bitmaps extension, its directory and the bitmaps' tables ("Bitmaps extension", "Bitmaps").

use super::bytes::{be16, be32, be64};
use super::{FieldError, Geometry};

/// Most bitmaps of an image (QEMU's limit).
pub const MAX_BITMAPS: u32 = 65535;
/// Longest name of a bitmap in bytes (QEMU's limit).
pub const MAX_BITMAP_NAME: usize = 1023;
/// Largest bitmap directory in bytes (QEMU's limit: less than the longest names of all take).
pub const MAX_BITMAP_DIRECTORY: u64 = MAX_BITMAPS as u64 * 1024;
/// Most bytes of clusters that a bitmap may take (QEMU's limit).
pub const MAX_BITMAP_BYTES: u64 = 512 << 20;
/// log2 of the bytes that one bit may stand for: 512 bytes to 2 GiB (QEMU's limits).
pub const BITMAP_GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// The bitmaps header extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// How many bitmaps there are, at least 1.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_size: u64,
    /// Where the directory starts.
    pub directory_offset: u64,
}

impl Bitmaps {
    /// Takes the extension's data apart; `None` if it is too short.
    pub fn parse(data: &[u8]) -> Option<Bitmaps> {
        Some(Bitmaps {
            count: be32(data, 0)?,
            directory_size: be64(data, 8)?,
            directory_offset: be64(data, 16)?,
        })
    }

    /// The extension's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(24);
        out.extend_from_slice(&self.count.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.directory_size.to_be_bytes());
        out.extend_from_slice(&self.directory_offset.to_be_bytes());
        out
    }
}

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where the bitmap's table starts.
    pub table_offset: u64,
    /// Entries in the table.
    pub table_size: u32,
    /// See [`BitmapEntry::IN_USE`] and its neighbours.
    pub flags: u32,
    /// 1: it says which parts of the disk were written to.
    pub kind: u8,
    /// log2 of the bytes that one bit stands for.
    pub granularity_bits: u8,
    /// What later versions of the format may add.
    pub extra: Vec<u8>,
    /// Its name, UTF-8 where nobody lies.
    pub name: Vec<u8>,
}

impl BitmapEntry {
    /// It was not saved: contents, size and flags may be outdated.
    pub const IN_USE: u32 = 1 << 0;
    /// It shall record writes.
    pub const AUTO: u32 = 1 << 1;
    /// Where its flags stand in an entry, 4 bytes.
    pub const FLAGS_AT: usize = 12;
    const FIXED_LEN: usize = 24;
    const DIRTY_TRACKING: u8 = 1;

    /// An empty one, without a table.
    pub fn new(name: &[u8], granularity_bits: u8, flags: u32) -> BitmapEntry {
        BitmapEntry {
            table_offset: 0,
            table_size: 0,
            flags,
            kind: Self::DIRTY_TRACKING,
            granularity_bits,
            extra: Vec::new(),
            name: name.to_vec(),
        }
    }

    /// Takes one entry apart. `file_offset` is where it stands, for messages.
    ///
    /// # Errors
    /// If it is longer than the bytes given.
    pub fn parse(bytes: &[u8], file_offset: u64) -> Result<BitmapEntry, FieldError> {
        let cut = || {
            FieldError::new(
                "bitmap directory entry",
                file_offset,
                "longer than the directory",
                "the directory may hold whole entries only",
            )
        };
        let name_len = usize::from(be16(bytes, 18).ok_or_else(cut)?);
        let extra_len = be32(bytes, 20).ok_or_else(cut)? as usize;
        let name_at = Self::FIXED_LEN + extra_len;
        if (name_at + name_len).next_multiple_of(8) > bytes.len() {
            return Err(cut());
        }
        Ok(BitmapEntry {
            table_offset: be64(bytes, 0).ok_or_else(cut)?,
            table_size: be32(bytes, 8).ok_or_else(cut)?,
            flags: be32(bytes, Self::FLAGS_AT).ok_or_else(cut)?,
            kind: bytes[16],
            granularity_bits: bytes[17],
            extra: bytes[Self::FIXED_LEN..name_at].to_vec(),
            name: bytes[name_at..name_at + name_len].to_vec(),
        })
    }

    /// Bytes of the entry, padding included.
    pub fn encoded_len(&self) -> usize {
        (Self::FIXED_LEN + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    /// Appends the entry, padding included. The name has at most 65535 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.table_offset.to_be_bytes());
        out.extend_from_slice(&self.table_size.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&[self.kind, self.granularity_bits]);
        out.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&(self.extra.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.name);
        out.resize(start + self.encoded_len(), 0);
    }

    /// Its name, as it can be shown.
    pub fn shown_name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Whether it was not saved, so that its bits mean nothing.
    pub fn is_in_use(&self) -> bool {
        self.flags & Self::IN_USE != 0
    }

    /// Whether it shall record writes.
    pub fn is_auto(&self) -> bool {
        self.flags & Self::AUTO != 0
    }

    /// How many bits a disk of `size` bytes has in it.
    pub fn bits(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.granularity_bits.min(63))
    }

    /// Entries that a table for a disk of `size` bytes has.
    pub fn table_entries(&self, cluster_bits: u32, size: u64) -> u64 {
        self.bits(size).div_ceil(8).div_ceil(1 << cluster_bits)
    }

    /// Says what about it is impossible in an image of this geometry, as QEMU sees it.
    ///
    /// # Errors
    /// The first thing that is.
    pub fn check(&self, g: &Geometry) -> Result<(), String> {
        let bytes = u64::from(self.table_size) << g.cluster_bits();
        if self.kind != Self::DIRTY_TRACKING {
            return Err(format!("its type {} is unknown", self.kind));
        }
        if !self.extra.is_empty() {
            return Err("it has extra data, which is unknown".to_owned());
        }
        if self.flags & !(Self::IN_USE | Self::AUTO) != 0 {
            return Err(format!("its flags {:#x} are unknown", self.flags));
        }
        if !BITMAP_GRANULARITY_BITS.contains(&self.granularity_bits) {
            return Err(format!("its granularity is 2^{}", self.granularity_bits));
        }
        if self.name.is_empty() || self.name.len() > MAX_BITMAP_NAME {
            return Err(format!("its name has {} bytes", self.name.len()));
        }
        if self.table_size == 0 || bytes > MAX_BITMAP_BYTES {
            return Err(format!("its table has {} entries", self.table_size));
        }
        if self.table_offset == 0 || g.in_cluster(self.table_offset) != 0 {
            return Err(format!("its table is at offset {:#x}", self.table_offset));
        }
        // One that was not saved may have a wrong size, after a change of the disk's.
        let need = self.table_entries(g.cluster_bits(), g.size());
        if !self.is_in_use() && u64::from(self.table_size) != need {
            return Err(format!("its table has {} entries instead of {need}", self.table_size));
        }
        Ok(())
    }
}

/// An entry of a bitmap's table: what one cluster of bits is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapCluster {
    /// No bit is set.
    Zeroes,
    /// All are.
    Ones,
    /// They stand at this offset.
    Data(u64),
}

impl BitmapCluster {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    const ALL_ONES: u64 = 1;

    /// Takes an entry apart; `None` if it is impossible.
    pub fn decode(raw: u64, g: &Geometry) -> Option<BitmapCluster> {
        match raw {
            0 => Some(BitmapCluster::Zeroes),
            Self::ALL_ONES => Some(BitmapCluster::Ones),
            _ if raw & !Self::OFFSET == 0 && g.in_cluster(raw) == 0 => {
                Some(BitmapCluster::Data(raw))
            }
            _ => None,
        }
    }

    /// The entry's word.
    pub fn encode(self) -> u64 {
        match self {
            BitmapCluster::Zeroes => 0,
            BitmapCluster::Ones => Self::ALL_ONES,
            BitmapCluster::Data(offset) => offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back() {
        let mut entry = BitmapEntry::new(b"backup", 16, BitmapEntry::AUTO);
        (entry.table_offset, entry.table_size) = (0x50000, 1);
        let mut bytes = Vec::new();
        entry.encode(&mut bytes);
        assert_eq!((bytes.len(), entry.encoded_len()), (32, 32));
        assert_eq!(BitmapEntry::parse(&bytes, 0).unwrap(), entry);
        assert!(BitmapEntry::parse(&bytes[..31], 0).is_err());
        let g = Geometry::new(3, 16, 4, 1 << 30).unwrap();
        assert_eq!(entry.check(&g), Ok(()));
        let bad = |change: fn(&mut BitmapEntry)| {
            let mut e = entry.clone();
            change(&mut e);
            e.check(&g).unwrap_err();
        };
        bad(|e| e.flags = 4);
        bad(|e| e.granularity_bits = 8);
        bad(|e| e.granularity_bits = 32);
        bad(|e| e.kind = 2);
        bad(|e| e.name.clear());
        bad(|e| e.name = vec![b'x'; 1024]);
        bad(|e| e.table_size = 0);
        bad(|e| e.table_size = 2);
        bad(|e| e.table_offset = 512);
        bad(|e| e.extra = vec![0; 8]);
        let small = Geometry::new(3, 9, 4, 1 << 40).unwrap();
        assert!(entry.check(&small).is_err());
        entry.flags |= BitmapEntry::IN_USE;
        assert_eq!(entry.check(&small), Ok(()));
    }

    #[test]
    fn clusters_of_bits() {
        let g = Geometry::new(3, 12, 4, 1 << 30).unwrap();
        for c in [BitmapCluster::Zeroes, BitmapCluster::Ones, BitmapCluster::Data(0x7000)] {
            assert_eq!(BitmapCluster::decode(c.encode(), &g), Some(c));
        }
        for raw in [2, 0x200, 0x7001, 1 << 56, 0x7000 | 1 << 63] {
            assert_eq!(BitmapCluster::decode(raw, &g), None, "{raw:#x}");
        }
    }
}
