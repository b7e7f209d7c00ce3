//! Entries of the snapshot table ("Snapshots").

use super::FieldError;
use super::bytes::{be16, be32, be64};

/// An internal snapshot, as its table entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table starts.
    pub l1_table_offset: u64,
    /// Entries in its L1 table.
    pub l1_size: u32,
    /// Unique ID.
    pub id: String,
    /// Name.
    pub name: String,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u32,
    /// The nanoseconds of that second.
    pub date_nsec: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// The disk's size when it was taken, if the entry says.
    pub disk_size: Option<u64>,
    /// Count of executed instructions, if the entry says and it was counted.
    pub icount: Option<u64>,
}

impl Snapshot {
    /// Bytes of an entry without its variable parts.
    pub const FIXED_LEN: usize = 40;

    /// Bytes of the entry that starts with these (at least [`Snapshot::FIXED_LEN`]) bytes,
    /// padding included. At most 4 GiB and some: check it before taking memory.
    ///
    /// # Errors
    /// If there are too few bytes.
    pub fn entry_len(bytes: &[u8], file_offset: u64) -> Result<u64, FieldError> {
        let cut = || FieldError::new("snapshot table entry", file_offset, "cut off", "40 bytes");
        let id = be16(bytes, 12).ok_or_else(cut)?;
        let name = be16(bytes, 14).ok_or_else(cut)?;
        let extra = be32(bytes, 36).ok_or_else(cut)?;
        let len = Self::FIXED_LEN as u64 + u64::from(id) + u64::from(name) + u64::from(extra);
        Ok(len.next_multiple_of(8))
    }

    /// The entry as it stands in the table, padding included, with 24 bytes of extra data. ID and
    /// name have at most 65535 bytes.
    pub fn encode(&self) -> Vec<u8> {
        self.encode_with(self.id.as_bytes(), self.name.as_bytes())
    }

    /// As [`Snapshot::encode`], with ID and name as bytes: they need not be UTF-8.
    pub(crate) fn encode_with(&self, id: &[u8], name: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::FIXED_LEN + 24 + id.len() + name.len());
        let short = |n: u64| u32::try_from(n).unwrap_or(0);
        debug_assert!(id.len() < 1 << 16 && name.len() < 1 << 16);
        out.extend_from_slice(&self.l1_table_offset.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&(id.len() as u16).to_be_bytes());
        out.extend_from_slice(&(name.len() as u16).to_be_bytes());
        out.extend_from_slice(&self.date_sec.to_be_bytes());
        out.extend_from_slice(&self.date_nsec.to_be_bytes());
        out.extend_from_slice(&self.vm_clock_nsec.to_be_bytes());
        out.extend_from_slice(&short(self.vm_state_size).to_be_bytes());
        out.extend_from_slice(&24u32.to_be_bytes());
        out.extend_from_slice(&self.vm_state_size.to_be_bytes());
        out.extend_from_slice(&self.disk_size.unwrap_or(0).to_be_bytes());
        out.extend_from_slice(&self.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend_from_slice(id);
        out.extend_from_slice(name);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    /// Takes one entry apart. `file_offset` is where it stands, for messages.
    ///
    /// # Errors
    /// If it is longer than the bytes given.
    pub fn parse(bytes: &[u8], file_offset: u64) -> Result<Snapshot, FieldError> {
        let cut = || {
            FieldError::new(
                "snapshot table entry",
                file_offset,
                "longer than the table",
                "the table may hold whole entries only",
            )
        };
        let id_len = usize::from(be16(bytes, 12).ok_or_else(cut)?);
        let name_len = usize::from(be16(bytes, 14).ok_or_else(cut)?);
        let extra_len = be32(bytes, 36).ok_or_else(cut)? as usize;
        let extra = bytes[Self::FIXED_LEN..].get(..extra_len).ok_or_else(cut)?;
        let strings = &bytes[Self::FIXED_LEN + extra_len..];
        let id = strings.get(..id_len).ok_or_else(cut)?;
        let name = strings.get(id_len..id_len + name_len).ok_or_else(cut)?;
        Ok(Snapshot {
            l1_table_offset: be64(bytes, 0).ok_or_else(cut)?,
            l1_size: be32(bytes, 8).ok_or_else(cut)?,
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            date_sec: be32(bytes, 16).ok_or_else(cut)?,
            date_nsec: be32(bytes, 20).ok_or_else(cut)?,
            vm_clock_nsec: be64(bytes, 24).ok_or_else(cut)?,
            vm_state_size: be64(extra, 0).unwrap_or(u64::from(be32(bytes, 32).ok_or_else(cut)?)),
            disk_size: be64(extra, 8),
            icount: be64(extra, 16).filter(|&n| n != u64::MAX),
        })
    }
}
