//! The bitmaps extension and its directory ("Bitmaps extension", "Bitmaps"). Bitmaps are not
//! used here; they are counted by check, so that their clusters are not taken for leaks.

use super::FieldError;
use super::bytes::{be16, be32, be64};

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
}

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where the bitmap's table starts.
    pub table_offset: u64,
    /// Entries in the table.
    pub table_size: u32,
    /// Bit 0 in use, bit 1 auto, bit 2 extra data is compatible.
    pub flags: u32,
    /// log2 of the bytes that one bit stands for.
    pub granularity_bits: u8,
    /// Its name.
    pub name: String,
    /// Bytes of the entry, padding included.
    pub entry_len: usize,
}

impl BitmapEntry {
    /// Takes one entry apart. `file_offset` is where it stands, for messages.
    ///
    /// # Errors
    /// If it is longer than the bytes given.
    pub fn parse(bytes: &[u8], file_offset: u64) -> Result<BitmapEntry, FieldError> {
        const FIXED_LEN: usize = 24;
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
        let name_at = FIXED_LEN + extra_len;
        let entry_len = (name_at + name_len).next_multiple_of(8);
        if entry_len > bytes.len() {
            return Err(cut());
        }
        Ok(BitmapEntry {
            table_offset: be64(bytes, 0).ok_or_else(cut)?,
            table_size: be32(bytes, 8).ok_or_else(cut)?,
            flags: be32(bytes, 12).ok_or_else(cut)?,
            granularity_bits: bytes[17],
            name: String::from_utf8_lossy(&bytes[name_at..name_at + name_len]).into_owned(),
            entry_len,
        })
    }
}
