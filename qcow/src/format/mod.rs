//! The bytes of a QCOW2 file: parsing and encoding, without I/O. Section names in the comments
//! are those of the format's specification (qcow2.rst in QEMU's `docs/interop`).
//!
//! Called from the control path for whole structures and from the datapath for single entries
//! ([`L1Entry`], [`L2Entry`], [`RefcountBlock`]), which neither allocate nor panic.

mod bitmap;
mod bytes;
mod entry;
mod error;
mod extension;
mod geometry;
mod header;
mod refcount;
mod snapshot;

pub use bitmap::{
    BITMAP_GRANULARITY_BITS, BitmapCluster, BitmapEntry, Bitmaps, MAX_BITMAP_BYTES,
    MAX_BITMAP_DIRECTORY, MAX_BITMAP_NAME, MAX_BITMAPS,
};
pub(crate) use entry::plain_run;
pub use entry::{EntryError, L1Entry, L2Entry, RawL2, Unit, decode_refcount_table_entry};
pub use error::FieldError;
pub use extension::{Extension, FeatureName, ext};
pub use geometry::{Geometry, SUBCLUSTER_BITS};
pub use header::{Compression, Header, autoclear, compatible, field, incompatible};
pub use refcount::{RefcountBlock, get_refcount, set_refcount};
pub use snapshot::Snapshot;

/// "QFI\xfb", the first four bytes.
pub const MAGIC: u32 = 0x5146_49fb;
/// Smallest cluster: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster: 2 MiB (an implementation limit that QEMU has too).
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Widest refcount: 64 bits.
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Longest backing file name in bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Largest L1 table in bytes (QEMU's limit).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes (QEMU's limit).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most internal snapshots (QEMU's limit).
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Largest snapshot table in bytes (QEMU's limit: 1 KiB for each possible snapshot).
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// Bits of a host offset that entries can hold: clusters lie below 64 PiB.
pub const HOST_OFFSET_BITS: u32 = 56;
