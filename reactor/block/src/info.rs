//! [`DeviceInfo`]: what a device or image is like, for whoever stands above it.

/// What a device or image can do. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Capacity; a multiple of `block_size`.
    pub size: u64,
    /// Smallest unit of a request: offsets and lengths are multiples of it. 512 or 4096.
    pub block_size: u32,
    /// Unit below which a write costs a read-modify-write somewhere below.
    pub physical_block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// A completed write may be lost at a power cut until a flush completes. Where there is none,
    /// a flush costs no command.
    pub volatile_cache: bool,
    /// [`crate::Op::WriteZeroes`] is done by the device itself.
    pub write_zeroes: bool,
    /// [`crate::Op::Discard`] does something.
    pub discard: bool,
    /// Unit of discards that have an effect, in bytes; a multiple of `block_size`.
    pub discard_granularity: u32,
    /// Longest read or write in one request, in bytes; longer ones are refused. The queue splits
    /// what its device cannot take in one command.
    pub max_transfer: u32,
}

impl DeviceInfo {
    /// Whether `[offset, offset + len)` is whole blocks inside the device.
    #[inline]
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        let mask = u64::from(self.block_size) - 1;
        (offset | len) & mask == 0 && offset <= self.size && len <= self.size - offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contains_checks_range_and_alignment() {
        let info = DeviceInfo {
            size: 1 << 20,
            block_size: 512,
            physical_block_size: 4096,
            read_only: false,
            volatile_cache: false,
            write_zeroes: true,
            discard: true,
            discard_granularity: 512,
            max_transfer: 1 << 20,
        };
        assert!(info.contains(0, 1 << 20));
        assert!(info.contains(1 << 20, 0));
        assert!(!info.contains(512, 1 << 20));
        assert!(!info.contains(u64::MAX - 511, 512));
        assert!(!info.contains(256, 512));
        assert!(!info.contains(0, 100));
    }
}
