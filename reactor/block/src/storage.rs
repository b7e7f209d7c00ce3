//! [`Storage`]: blocking reads and writes of bytes, for the control path: opening, checking,
//! creating and converting images. Nothing of it runs on a reactor that serves a guest.

use crate::Status;

/// Why an access failed: what was done where, and how it ended.
#[derive(Debug, thiserror::Error)]
#[error("{what} of {len} bytes at offset {offset:#x}: {status}{}", detail_text(*.detail))]
pub struct StorageError {
    /// "read", "write", …
    pub what: &'static str,
    /// First byte.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// How it ended.
    pub status: Status,
    /// What the device said; 0 if nothing.
    pub detail: u16,
}

fn detail_text(detail: u16) -> String {
    if detail == 0 { String::new() } else { format!(" (device status {detail:#x})") }
}

/// A device, file or image seen as bytes. Offsets and lengths may be anything: an implementation
/// reads and writes whole blocks around an unaligned range.
pub trait Storage {
    /// Size in bytes. A file may be written past its end, up to [`Storage::capacity`].
    fn len(&self) -> u64;

    /// Whether there is nothing in it.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How large it can become by writing: for a device its size, for a file a limit far above.
    /// What a file has not got yet reads as zeroes, also when it has become longer by writes behind.
    fn capacity(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Fills `into`. Bytes past the end (as far as the capacity goes) read as zeroes.
    ///
    /// # Errors
    /// If any of it cannot be read.
    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError>;

    /// Says that the range will be read soon, so that it can be fetched meanwhile. Where that is not
    /// possible nothing happens.
    fn will_read(&mut self, offset: u64, len: u64) {
        let _ = (offset, len);
    }

    /// Writes all of `from`; a file grows as needed.
    ///
    /// # Errors
    /// If any of it cannot be written; then none, some or all of it was.
    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError>;

    /// Makes the range read as zeroes, by the device's own means where it has them.
    ///
    /// # Errors
    /// As for a write.
    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError>;

    /// Says that nobody needs the contents of the range any more, so that its space can be given
    /// back: what it reads as is undefined until it is written again. Where that is not possible
    /// nothing happens.
    fn discard_at(&mut self, offset: u64, len: u64) {
        let _ = (offset, len);
    }

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// If the device says that it could not.
    fn flush(&mut self) -> Result<(), StorageError>;

    /// Sets a file's length (an image's clean close cuts what lies past its last cluster). Does
    /// nothing on a device.
    ///
    /// # Errors
    /// If the length cannot be changed.
    fn set_len(&mut self, len: u64) -> Result<(), StorageError>;
}
