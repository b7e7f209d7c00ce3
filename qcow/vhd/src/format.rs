//! The structures of a VHD file ("Virtual Hard Disk Image Format Specification" 1.0, 2006, and what
//! tapdisk adds): bytes to fields and back. All numbers are big-endian. Pure.

mod dynamic;
mod footer;

pub use dynamic::{BatMap, DynamicHeader, LOCATORS, Locator, PlatformCode};
pub use footer::{Creator, DiskType, Footer, Geometry};

/// Bytes of a sector: the unit of the block allocation table.
pub const SECTOR: u64 = 512;
/// Bytes of the footer.
pub const FOOTER_BYTES: usize = 512;
/// Bytes of the header of dynamic and differencing disks.
pub const HEADER_BYTES: usize = 1024;
/// What a footer begins with.
pub const COOKIE: &[u8; 8] = b"conectix";
/// An entry of the block allocation table that names no block.
pub const UNUSED: u32 = u32::MAX;
/// Bytes of a block, as everybody makes them.
pub const BLOCK_BYTES: u32 = 2 << 20;
/// Most bytes of a disk, 2040 GiB: more cannot be had with 32-bit sector numbers.
pub const MAX_DISK_BYTES: u64 = 0xff00_0000 * SECTOR;

/// Why bytes are not the structure that they should be: a sentence without subject.
pub type Wrong = String;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// The complement of the sum of all bytes, those of the checksum itself (at `at`) left out.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |part: &[u8]| part.iter().map(|&b| u32::from(b)).sum::<u32>();
    !(sum(&bytes[..at]) + sum(&bytes[at + 4..]))
}
