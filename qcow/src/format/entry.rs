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
/// Every subcluster.
const ALL: u64 = u32::MAX as u64;

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
    /// Compressed data in an image whose data stands in another file.
    #[error("compressed data cannot be in an external data file")]
    CompressedWithDataFile,
    /// A compressed cluster has bits for subclusters.
    #[error("subclusters {0:#x} of a compressed cluster")]
    SubclustersCompressed(u64),
    /// A subcluster has data and reads as zeroes.
    #[error("subclusters {0:#x}: one of them has data and reads as zeroes")]
    Subclusters(u64),
    /// A subcluster has data, and there is no cluster for that.
    #[error("subclusters {0:#x} have data without a cluster")]
    SubclustersWithoutCluster(u64),
    /// A compressed cluster claims to lie at or above 64 PiB.
    #[error("compressed cluster offset {0:#x} has bits above 55")]
    CompressedTooHigh(u64),
}

/// What `list` (of entries that are not extended, of an image without an external data file) begins with:
/// clusters of plain data side by side, as host offset of the first, whether their refcounts are exactly
/// one, and how many they are; or one entry that is something else, without an offset. `None` if it is empty.
///
/// What it finds is what [`L2Entry::decode`] would find for each of them.
pub(crate) fn plain_run(list: &[u64], geometry: &Geometry) -> Option<(Option<u64>, bool, usize)> {
    let (&first, step) = (list.first()?, geometry.cluster_size());
    let plain = COPIED | (OFFSET & !(step - 1));
    let host = first & OFFSET;
    if first & !plain != 0 || host == 0 {
        return Some((None, false, 1));
    }
    // Each of them is plain as long as the offset does not overflow.
    let most = ((OFFSET - host) >> geometry.cluster_bits()) + 1;
    let most = list.len().min(usize::try_from(most).unwrap_or(usize::MAX));
    let run = list[..most].iter().zip(0u64..);
    let count = run.take_while(|&(&raw, i)| raw == first.wrapping_add(i * step)).count();
    Some((Some(host), first & COPIED != 0, count))
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

/// An L2 table entry as it stands on disk, in the CPU's byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RawL2 {
    /// The descriptor.
    pub word: u64,
    /// Two bits a subcluster, where entries are extended: allocated (bits 0 to 31), reads as zeroes
    /// (32 to 63). Else 0.
    pub bitmap: u64,
}

impl RawL2 {
    /// The entry with number `index` of a table (or a part of one) of words.
    ///
    /// # Panics
    /// If the table ends before.
    #[inline]
    pub fn of(words: &[u64], index: usize, geometry: &Geometry) -> RawL2 {
        match geometry.extended_l2() {
            true => RawL2 { word: words[2 * index], bitmap: words[2 * index + 1] },
            false => RawL2 { word: words[index], bitmap: 0 },
        }
    }

    /// Puts it into a table (or a part of one) of words.
    ///
    /// # Panics
    /// If the table ends before.
    #[inline]
    pub fn put(self, words: &mut [u64], index: usize, geometry: &Geometry) {
        match geometry.extended_l2() {
            true => (words[2 * index], words[2 * index + 1]) = (self.word, self.bitmap),
            false => words[index] = self.word,
        }
    }

    /// The entries of a table (or a part of one) of words.
    pub fn all<'w>(words: &'w [u64], geometry: &Geometry) -> impl Iterator<Item = RawL2> + 'w {
        words
            .chunks_exact(geometry.l2_words())
            .map(|w| RawL2 { word: w[0], bitmap: w.get(1).copied().unwrap_or(0) })
    }

    /// Its bytes on disk.
    pub fn to_bytes(self, geometry: &Geometry) -> Vec<u8> {
        let mut bytes = self.word.to_be_bytes().to_vec();
        if geometry.extended_l2() {
            bytes.extend_from_slice(&self.bitmap.to_be_bytes());
        }
        bytes
    }
}

/// Shown as in the table: one number, or two.
impl std::fmt::LowerHex for RawL2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::LowerHex::fmt(&self.word, f)?;
        match self.bitmap {
            0 => Ok(()),
            bitmap => write!(f, " with subclusters {bitmap:#x}"),
        }
    }
}

/// What an L2 entry says of one unit: a subcluster where entries are extended, else the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nothing: the backing file's contents, or zeroes.
    Unallocated,
    /// Reads as zeroes.
    Zero,
    /// Data.
    Data,
    /// A part of a compressed cluster.
    Compressed,
}

/// An L2 table entry.
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
        /// Its offset; a multiple of the cluster size, 0 only in an external data file.
        host: u64,
        /// Whether its refcount is exactly one.
        copied: bool,
    },
    /// Subclusters differ. Extended entries only.
    Parts {
        /// The cluster's offset and whether its refcount is exactly one, if it has one.
        host: Option<(u64, bool)>,
        /// A bit a subcluster, the first one's lowest: data. None without `host`.
        alloc: u32,
        /// Reads as zeroes. None that are in `alloc`.
        zero: u32,
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
    /// Takes an entry apart.
    ///
    /// # Errors
    /// Reserved bits (bit 0 is one of them in version 2 and in extended entries), an unaligned or
    /// too high offset, a COPIED flag where there can be none, compressed data in an image with an
    /// external data file, impossible subclusters.
    #[inline]
    pub fn decode(raw: RawL2, geometry: &Geometry) -> Result<L2Entry, EntryError> {
        if raw == RawL2::default() {
            return Ok(L2Entry::Unallocated);
        }
        let RawL2 { word, bitmap } = raw;
        let copied = word & COPIED != 0;
        if word & COMPRESSED != 0 {
            return Self::decode_compressed(raw, copied, geometry);
        }
        let knows_zero = geometry.version() >= 3 && !geometry.extended_l2();
        let reserved = word & (L2_RESERVED | if knows_zero { 0 } else { ZERO });
        if reserved != 0 {
            return Err(EntryError::Reserved(reserved));
        }
        let host = word & OFFSET;
        if geometry.in_cluster(host) != 0 {
            return Err(EntryError::Misaligned(host));
        }
        // In an external data file there is a cluster at offset 0, which only the flag tells.
        let there = host != 0 || (copied && geometry.data_file());
        if copied && !there {
            return Err(EntryError::CopiedWithoutCluster);
        }
        if geometry.extended_l2() {
            return Self::decode_parts(there.then_some((host, copied)), bitmap);
        }
        Ok(match (there, word & ZERO != 0) {
            (false, true) => L2Entry::Zero,
            (false, false) => L2Entry::Unallocated,
            (true, true) => L2Entry::ZeroAllocated { host, copied },
            (true, false) => L2Entry::Normal { host, copied },
        })
    }

    /// The entry that these subclusters make.
    fn decode_parts(host: Option<(u64, bool)>, bitmap: u64) -> Result<L2Entry, EntryError> {
        let (alloc, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        if alloc & zero != 0 {
            return Err(EntryError::Subclusters(bitmap));
        }
        if alloc != 0 && host.is_none() {
            return Err(EntryError::SubclustersWithoutCluster(bitmap));
        }
        Ok(L2Entry::parts(host, alloc, zero))
    }

    /// The entry for a cluster with these subclusters: `alloc` holds those with data, and none of
    /// `zero`; it is 0 without `host`.
    pub fn parts(host: Option<(u64, bool)>, alloc: u32, zero: u32) -> L2Entry {
        debug_assert!(alloc & zero == 0 && (alloc == 0 || host.is_some()));
        match (host, alloc, zero) {
            (None, _, 0) => L2Entry::Unallocated,
            (None, _, u32::MAX) => L2Entry::Zero,
            (Some((host, copied)), u32::MAX, _) => L2Entry::Normal { host, copied },
            (Some((host, copied)), _, u32::MAX) => L2Entry::ZeroAllocated { host, copied },
            (host, alloc, zero) => L2Entry::Parts { host, alloc, zero },
        }
    }

    fn decode_compressed(
        raw: RawL2,
        copied: bool,
        geometry: &Geometry,
    ) -> Result<L2Entry, EntryError> {
        if copied {
            return Err(EntryError::CopiedCompressed);
        }
        if geometry.data_file() {
            return Err(EntryError::CompressedWithDataFile);
        }
        if raw.bitmap != 0 {
            return Err(EntryError::SubclustersCompressed(raw.bitmap));
        }
        let shift = geometry.compressed_shift();
        let host = raw.word & ((1 << shift) - 1);
        if host >= geometry.compressed_limit() {
            return Err(EntryError::CompressedTooHigh(host));
        }
        // At most 13 bits: fits 32 bits times 512 with room.
        let sectors = ((raw.word & !(COMPRESSED | COPIED)) >> shift) as u32 + 1;
        Ok(L2Entry::Compressed { host, len: sectors * 512 - (host & 511) as u32 })
    }

    /// Puts an entry together. A compressed cluster must lie below
    /// [`Geometry::compressed_limit`] and be at most two clusters long.
    #[inline]
    pub fn encode(self, geometry: &Geometry) -> RawL2 {
        let flag = |copied| if copied { COPIED } else { 0 };
        let extended = geometry.extended_l2();
        // What a cluster that is the same throughout has: a flag, or a bit for each subcluster.
        let (zero, zeroes, all) = if extended { (0, ALL << 32, ALL) } else { (ZERO, 0, 0) };
        let (word, bitmap) = match self {
            L2Entry::Unallocated => (0, 0),
            L2Entry::Zero => (zero, zeroes),
            L2Entry::ZeroAllocated { host, copied } => (host | flag(copied) | zero, zeroes),
            L2Entry::Normal { host, copied } => (host | flag(copied), all),
            L2Entry::Parts { host, alloc, zero } => {
                debug_assert!(extended);
                let word = host.map_or(0, |(host, copied)| host | flag(copied));
                (word, u64::from(zero) << 32 | u64::from(alloc))
            }
            L2Entry::Compressed { host, len } => {
                debug_assert!(host < geometry.compressed_limit() && len > 0);
                let more = ((host + u64::from(len) - 1) >> 9) - (host >> 9);
                (COMPRESSED | host | (more << geometry.compressed_shift()), 0)
            }
        };
        RawL2 { word, bitmap }
    }

    /// The host cluster that belongs to the entry alone, and whether its refcount is exactly one,
    /// if there is one: not compressed data, which shares its clusters.
    #[inline]
    pub fn host_cluster(self) -> Option<(u64, bool)> {
        match self {
            L2Entry::ZeroAllocated { host, copied } | L2Entry::Normal { host, copied } => {
                Some((host, copied))
            }
            L2Entry::Parts { host, .. } => host,
            L2Entry::Unallocated | L2Entry::Zero | L2Entry::Compressed { .. } => None,
        }
    }

    /// The same with this COPIED flag, if it has a host cluster.
    #[must_use]
    pub fn with_copied(self, copied: bool) -> L2Entry {
        match self {
            L2Entry::ZeroAllocated { host, .. } => L2Entry::ZeroAllocated { host, copied },
            L2Entry::Normal { host, .. } => L2Entry::Normal { host, copied },
            L2Entry::Parts { host: Some((host, _)), alloc, zero } => {
                L2Entry::Parts { host: Some((host, copied)), alloc, zero }
            }
            other => other,
        }
    }

    /// Which subclusters have data and which read as zeroes, as bits; of an entry that is not
    /// extended, all or none.
    #[inline]
    pub fn bits(self) -> (u32, u32) {
        match self {
            L2Entry::Normal { .. } => (u32::MAX, 0),
            L2Entry::Zero | L2Entry::ZeroAllocated { .. } => (0, u32::MAX),
            L2Entry::Parts { alloc, zero, .. } => (alloc, zero),
            L2Entry::Unallocated | L2Entry::Compressed { .. } => (0, 0),
        }
    }

    /// What it says of its unit with this number, below 32.
    #[inline]
    pub fn unit(self, index: u32) -> Unit {
        let (alloc, zero) = self.bits();
        match self {
            L2Entry::Compressed { .. } => Unit::Compressed,
            _ if alloc >> index & 1 != 0 => Unit::Data,
            _ if zero >> index & 1 != 0 => Unit::Zero,
            _ => Unit::Unallocated,
        }
    }

    /// How many units from number `index` on, at most up to the 32nd, are what that one is.
    #[inline]
    pub fn run(self, index: u32) -> u32 {
        let first = self.unit(index);
        (index..32).take_while(|&i| self.unit(i) == first).count() as u32
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

    fn plain(word: u64) -> RawL2 {
        RawL2 { word, bitmap: 0 }
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
                        assert_eq!(e.host_cluster(), Some((host, copied)));
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
        let raw = plain((1 << 62) | (3 << 54) | 0x5_0005);
        let want = L2Entry::Compressed { host: 0x5_0005, len: 4 * 512 - 5 };
        assert_eq!(L2Entry::decode(raw, &g), Ok(want));
    }

    #[test]
    fn l2_impossible() {
        let g = geometry(3, 16);
        let decode = |raw| L2Entry::decode(plain(raw), &g).unwrap_err();
        assert_eq!(decode(0x5_0002), EntryError::Reserved(2));
        assert_eq!(decode(0x5_0000 | (1 << 61)), EntryError::Reserved(1 << 61));
        assert_eq!(decode(0x5_0200), EntryError::Misaligned(0x5_0200));
        assert_eq!(decode(1 << 63), EntryError::CopiedWithoutCluster);
        assert_eq!(decode((1 << 63) | 1), EntryError::CopiedWithoutCluster);
        assert_eq!(decode(3 << 62), EntryError::CopiedCompressed);
        assert_eq!(
            L2Entry::decode(plain((1 << 62) | (1 << 56)), &geometry(3, 9)),
            Err(EntryError::CompressedTooHigh(1 << 56))
        );
        assert_eq!(L2Entry::decode(plain(1), &geometry(2, 16)), Err(EntryError::Reserved(1)));
        assert_eq!(decode_refcount_table_entry(0x1_0001, &g), Err(EntryError::Reserved(1)));
        assert_eq!(decode_refcount_table_entry(0x200, &g), Err(EntryError::Misaligned(0x200)));
        assert_eq!(decode_refcount_table_entry(0x1_0000, &g), Ok(0x1_0000));
    }

    #[test]
    fn subclusters() {
        let g = geometry(3, 16).with_extended_l2(true).unwrap();
        let decode = |word, bitmap| L2Entry::decode(RawL2 { word, bitmap }, &g);
        let all = u64::from(u32::MAX);
        let (host, own) = (0x5_0000, COPIED | 0x5_0000);
        for (word, bitmap, want) in [
            (0, 0, L2Entry::Unallocated),
            (0, all << 32, L2Entry::Zero),
            (own, all << 32, L2Entry::ZeroAllocated { host, copied: true }),
            (host, all, L2Entry::Normal { host, copied: false }),
            (own, 0, L2Entry::Parts { host: Some((host, true)), alloc: 0, zero: 0 }),
            (0, 1 << 63, L2Entry::Parts { host: None, alloc: 0, zero: 1 << 31 }),
            (host, 1 << 33 | 1, L2Entry::Parts { host: Some((host, false)), alloc: 1, zero: 2 }),
        ] {
            assert_eq!(decode(word, bitmap), Ok(want));
            assert_eq!(want.encode(&g), RawL2 { word, bitmap });
        }
        assert_eq!(decode(own, 1 << 32 | 1), Err(EntryError::Subclusters(1 << 32 | 1)));
        assert_eq!(decode(0, 4), Err(EntryError::SubclustersWithoutCluster(4)));
        assert_eq!(decode(own | 1, 0), Err(EntryError::Reserved(1)));
        let packed = (1 << 62) | 0x5_0005;
        assert_eq!(decode(packed, 1), Err(EntryError::SubclustersCompressed(1)));
        assert!(matches!(decode(packed, 0), Ok(L2Entry::Compressed { host: 0x5_0005, .. })));
        let e = L2Entry::Parts { host: Some((host, true)), alloc: 0b0110, zero: 0b1000 };
        let units: Vec<Unit> = (0..5).map(|i| e.unit(i)).collect();
        let want = [Unit::Unallocated, Unit::Data, Unit::Data, Unit::Zero, Unit::Unallocated];
        assert_eq!(units, want);
        assert_eq!((e.run(0), e.run(1), e.run(2), e.run(4)), (1, 2, 1, 28));
    }

    #[test]
    fn external_data_file() {
        let g = geometry(3, 16).with_data_file(true);
        let decode = |word| L2Entry::decode(plain(word), &g);
        assert_eq!(decode(COPIED), Ok(L2Entry::Normal { host: 0, copied: true }));
        assert_eq!(decode(COPIED | 1), Ok(L2Entry::ZeroAllocated { host: 0, copied: true }));
        assert_eq!(decode(1), Ok(L2Entry::Zero));
        assert_eq!(decode(1 << 62), Err(EntryError::CompressedWithDataFile));
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
            if let Ok(e) = L2Entry::decode(plain(raw), &g) {
                assert_eq!(e.encode(&g), plain(raw));
            }
            let g = g.with_data_file(i % 3 == 0);
            let g = g.with_extended_l2(true).unwrap_or(g);
            let bitmap = if g.extended_l2() { x.rotate_left(9) & x.rotate_left(33) } else { 0 };
            let raw = RawL2 { word: raw, bitmap: if i % 7 == 0 { 0 } else { bitmap } };
            if let Ok(e) = L2Entry::decode(raw, &g) {
                assert_eq!(e.encode(&g), raw);
                let (alloc, zero) = e.bits();
                assert!(alloc & zero == 0 && (alloc == 0 || e.host_cluster().is_some()));
            }
            let raw = raw.word;
            if let Ok(e) = L1Entry::decode(raw, &g) {
                assert_eq!(e.encode(), raw);
            }
        }
    }
}
