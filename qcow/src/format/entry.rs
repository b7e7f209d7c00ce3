//! L1, L2 and refcount table entries ("Cluster mapping", "Host cluster management").

use super::Geometry;

/// Bit 63 of L1 and L2 entries: the refcount is exactly one, so writing in place is fine.
const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry: reads as zeroes.
const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L1 entry that mean nothing: 0 to 8 and 56 to 62.
const L1_RESERVED: u64 = !(COPIED | OFFSET);
/// Bits of a standard L2 entry that mean nothing: 1 to 8 and 56 to 61.
const L2_RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET | ZERO);

/// What is wrong with an entry. Small and `Copy`: the datapath meets it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Bits are set that must be zero.
    #[error("reserved bits {0:#x} are set")]
    Reserved(u64),
    /// The offset is not a multiple of the cluster size.
    #[error("offset {0:#x} is not a multiple of the cluster size")]
    Misaligned(u64),
    /// The COPIED flag stands without a cluster that it could speak of.
    #[error("the COPIED flag is set without a cluster")]
    CopiedWithoutCluster,
    /// The COPIED flag stands on a compressed cluster.
    #[error("the COPIED flag is set on a compressed cluster")]
    CopiedCompressed,
    /// A compressed cluster claims to lie at or above 64 PiB.
    #[error("compressed cluster offset {0:#x} has bits above 55")]
    CompressedTooHigh(u64),
}

/// An L1 table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// Where the L2 table starts; 0: there is none, all of its clusters are unallocated.
    pub offset: u64,
    /// Whether the table's refcount is exactly one.
    pub copied: bool,
}

impl L1Entry {
    /// No L2 table.
    pub const NONE: L1Entry = L1Entry { offset: 0, copied: false };

    /// Takes an entry (already in the CPU's byte order) apart.
    ///
    /// # Errors
    /// Reserved bits, an unaligned offset, a flag without an offset.
    #[inline]
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<L1Entry, EntryError> {
        if raw == 0 {
            return Ok(L1Entry::NONE);
        }
        if raw & L1_RESERVED != 0 {
            return Err(EntryError::Reserved(raw & L1_RESERVED));
        }
        let offset = raw & OFFSET;
        let copied = raw & COPIED != 0;
        if offset == 0 {
            return Err(EntryError::CopiedWithoutCluster);
        }
        if geometry.in_cluster(offset) != 0 {
            return Err(EntryError::Misaligned(offset));
        }
        Ok(L1Entry { offset, copied })
    }

    /// Puts an entry together.
    #[inline]
    pub fn encode(self) -> u64 {
        debug_assert_eq!(self.offset & !OFFSET, 0);
        self.offset | if self.copied { COPIED } else { 0 }
    }
}

/// An L2 table entry without subclusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// Nothing here: the backing file's contents, or zeroes.
    Unallocated,
    /// Reads as zeroes; no cluster belongs to it. Version 3 only.
    Zero,
    /// Reads as zeroes, and a cluster is kept for later writes. Version 3 only.
    ZeroAllocated {
        /// The kept cluster's offset.
        host: u64,
        /// Whether its refcount is exactly one.
        copied: bool,
    },
    /// A cluster of data.
    Normal {
        /// Its offset; a multiple of the cluster size, never 0.
        host: u64,
        /// Whether its refcount is exactly one.
        copied: bool,
    },
    /// Compressed data.
    Compressed {
        /// Where it starts; any byte.
        host: u64,
        /// Bytes it may take at most: to the end of the last 512-byte sector that it touches.
        len: u32,
    },
}

impl L2Entry {
    /// Takes an entry (already in the CPU's byte order) apart.
    ///
    /// # Errors
    /// Reserved bits (bit 0 is one of them in version 2), an unaligned or too high offset, a
    /// COPIED flag where there can be none.
    #[inline]
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<L2Entry, EntryError> {
        if raw == 0 {
            return Ok(L2Entry::Unallocated);
        }
        let copied = raw & COPIED != 0;
        if raw & COMPRESSED != 0 {
            return Self::decode_compressed(raw, copied, geometry);
        }
        let zero_flag = if geometry.version() < 3 { ZERO } else { 0 };
        let reserved = raw & (L2_RESERVED | zero_flag);
        if reserved != 0 {
            return Err(EntryError::Reserved(reserved));
        }
        let host = raw & OFFSET;
        if geometry.in_cluster(host) != 0 {
            return Err(EntryError::Misaligned(host));
        }
        match (host, raw & ZERO != 0) {
            (0, _) if copied => Err(EntryError::CopiedWithoutCluster),
            (0, true) => Ok(L2Entry::Zero),
            (0, false) => Ok(L2Entry::Unallocated),
            (_, true) => Ok(L2Entry::ZeroAllocated { host, copied }),
            (_, false) => Ok(L2Entry::Normal { host, copied }),
        }
    }

    fn decode_compressed(
        raw: u64,
        copied: bool,
        geometry: &Geometry,
    ) -> Result<L2Entry, EntryError> {
        if copied {
            return Err(EntryError::CopiedCompressed);
        }
        let shift = geometry.compressed_shift();
        let host = raw & ((1 << shift) - 1);
        if host >= geometry.compressed_limit() {
            return Err(EntryError::CompressedTooHigh(host));
        }
        // At most 13 bits: fits 32 bits times 512 with room.
        let sectors = ((raw & !(COMPRESSED | COPIED)) >> shift) as u32 + 1;
        Ok(L2Entry::Compressed { host, len: sectors * 512 - (host & 511) as u32 })
    }

    /// Puts an entry together. A compressed cluster must lie below
    /// [`Geometry::compressed_limit`] and be at most two clusters long.
    #[inline]
    pub fn encode(self, geometry: &Geometry) -> u64 {
        let flag = |copied| if copied { COPIED } else { 0 };
        match self {
            L2Entry::Unallocated => 0,
            L2Entry::Zero => ZERO,
            L2Entry::ZeroAllocated { host, copied } => host | flag(copied) | ZERO,
            L2Entry::Normal { host, copied } => host | flag(copied),
            L2Entry::Compressed { host, len } => {
                debug_assert!(host < geometry.compressed_limit() && len > 0);
                let more = ((host + u64::from(len) - 1) >> 9) - (host >> 9);
                COMPRESSED | host | (more << geometry.compressed_shift())
            }
        }
    }

    /// The host cluster that belongs to the entry alone, if there is one: not compressed data,
    /// which shares its clusters.
    #[inline]
    pub fn host_cluster(self) -> Option<u64> {
        match self {
            L2Entry::ZeroAllocated { host, .. } | L2Entry::Normal { host, .. } => Some(host),
            L2Entry::Unallocated | L2Entry::Zero | L2Entry::Compressed { .. } => None,
        }
    }
}

/// Takes a refcount table entry apart: the refcount block's offset, or 0 if there is none (then
/// all refcounts in it are 0).
///
/// # Errors
/// Reserved bits (0 to 8), an unaligned offset.
#[inline]
pub fn decode_refcount_table_entry(raw: u64, geometry: &Geometry) -> Result<u64, EntryError> {
    if raw & 511 != 0 {
        return Err(EntryError::Reserved(raw & 511));
    }
    if geometry.in_cluster(raw) != 0 {
        return Err(EntryError::Misaligned(raw));
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(version: u32, bits: u32) -> Geometry {
        Geometry::new(version, bits, 4, 1 << 30).unwrap()
    }

    #[test]
    fn l1() {
        let g = geometry(3, 16);
        assert_eq!(L1Entry::decode(0, &g), Ok(L1Entry::NONE));
        let e = L1Entry { offset: 0x5_0000, copied: true };
        assert_eq!(e.encode(), 0x8000_0000_0005_0000);
        assert_eq!(L1Entry::decode(e.encode(), &g), Ok(e));
        assert_eq!(L1Entry::decode(0x5_0001, &g), Err(EntryError::Reserved(1)));
        assert_eq!(L1Entry::decode(1 << 62, &g), Err(EntryError::Reserved(1 << 62)));
        assert_eq!(L1Entry::decode(0x5_0200, &g), Err(EntryError::Misaligned(0x5_0200)));
        assert_eq!(L1Entry::decode(1 << 63, &g), Err(EntryError::CopiedWithoutCluster));
    }

    #[test]
    fn l2_standard_round_trip_at_all_cluster_sizes() {
        for bits in 9..=21 {
            let g = geometry(3, bits);
            for host in [g.cluster_size(), (1 << 56) - g.cluster_size()] {
                for copied in [false, true] {
                    for e in
                        [L2Entry::Normal { host, copied }, L2Entry::ZeroAllocated { host, copied }]
                    {
                        assert_eq!(L2Entry::decode(e.encode(&g), &g), Ok(e));
                        assert_eq!(e.host_cluster(), Some(host));
                    }
                }
            }
            for e in [L2Entry::Unallocated, L2Entry::Zero] {
                assert_eq!(L2Entry::decode(e.encode(&g), &g), Ok(e));
            }
        }
    }

    #[test]
    fn l2_compressed_round_trip_at_all_cluster_sizes() {
        for bits in 9..=21 {
            let g = geometry(3, bits);
            for host in [1 << 9, 12345, g.compressed_limit() - 1] {
                for sectors in [1, 2, 1 << (bits - 8)] {
                    let e = L2Entry::Compressed { host, len: sectors * 512 - (host & 511) as u32 };
                    assert_eq!(L2Entry::decode(e.encode(&g), &g), Ok(e));
                }
            }
        }
        // As the specification's formula says for 64 KiB clusters: x = 54.
        let g = geometry(3, 16);
        let raw = (1 << 62) | (3 << 54) | 0x5_0005;
        let want = L2Entry::Compressed { host: 0x5_0005, len: 4 * 512 - 5 };
        assert_eq!(L2Entry::decode(raw, &g), Ok(want));
    }

    #[test]
    fn l2_impossible() {
        let g = geometry(3, 16);
        let decode = |raw| L2Entry::decode(raw, &g).unwrap_err();
        assert_eq!(decode(0x5_0002), EntryError::Reserved(2));
        assert_eq!(decode(0x5_0000 | (1 << 61)), EntryError::Reserved(1 << 61));
        assert_eq!(decode(0x5_0200), EntryError::Misaligned(0x5_0200));
        assert_eq!(decode(1 << 63), EntryError::CopiedWithoutCluster);
        assert_eq!(decode((1 << 63) | 1), EntryError::CopiedWithoutCluster);
        assert_eq!(decode(3 << 62), EntryError::CopiedCompressed);
        assert_eq!(
            L2Entry::decode((1 << 62) | (1 << 56), &geometry(3, 9)),
            Err(EntryError::CompressedTooHigh(1 << 56))
        );
        assert_eq!(L2Entry::decode(1, &geometry(2, 16)), Err(EntryError::Reserved(1)));
        assert_eq!(decode_refcount_table_entry(0x1_0001, &g), Err(EntryError::Reserved(1)));
        assert_eq!(decode_refcount_table_entry(0x200, &g), Err(EntryError::Misaligned(0x200)));
        assert_eq!(decode_refcount_table_entry(0x1_0000, &g), Ok(0x1_0000));
    }

    #[test]
    fn any_word_decodes_or_fails_without_panic_and_round_trips() {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        for i in 0..200_000u64 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let g = geometry(if i % 5 == 0 { 2 } else { 3 }, 9 + (i % 13) as u32);
            // Sparse words too: dense ones nearly always hit reserved bits.
            let raw = if i % 2 == 0 { x } else { x & x.rotate_left(21) & x.rotate_left(43) };
            if let Ok(e) = L2Entry::decode(raw, &g) {
                assert_eq!(e.encode(&g), raw);
            }
            if let Ok(e) = L1Entry::decode(raw, &g) {
                assert_eq!(e.encode(), raw);
            }
        }
    }
}
