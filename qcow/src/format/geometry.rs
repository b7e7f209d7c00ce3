//! [`Geometry`]: sizes and the arithmetic of indexes that follow from the header.

use super::{HOST_OFFSET_BITS, MAX_CLUSTER_BITS, MAX_REFCOUNT_ORDER, MIN_CLUSTER_BITS};

/// log2 of the subclusters in a cluster where L2 entries are extended.
pub const SUBCLUSTER_BITS: u32 = 5;
/// log2 of the smallest cluster that can have subclusters: none is smaller than 512 bytes.
const MIN_EXTENDED_BITS: u32 = MIN_CLUSTER_BITS + SUBCLUSTER_BITS;

/// The sizes of an image. All arithmetic on offsets is here; offsets are bytes, `u64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    size: u64,
    extended_l2: bool,
    data_file: bool,
}

impl Geometry {
    /// A geometry, if the numbers are possible: version 2 or 3, clusters of 512 bytes to 2 MiB,
    /// refcounts of 1 to 64 bits (version 2: 16).
    pub fn new(version: u32, cluster_bits: u32, refcount_order: u32, size: u64) -> Option<Self> {
        let fine = matches!(version, 2 | 3)
            && (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits)
            && refcount_order <= MAX_REFCOUNT_ORDER
            && (version > 2 || refcount_order == 4);
        fine.then_some(Geometry {
            version,
            cluster_bits,
            refcount_order,
            size,
            extended_l2: false,
            data_file: false,
        })
    }

    /// The same with or without extended L2 entries, if that is possible: with them in version 3
    /// with clusters of at least 16 KiB.
    pub fn with_extended_l2(self, extended_l2: bool) -> Option<Self> {
        let fine = self.version >= 3 && self.cluster_bits >= MIN_EXTENDED_BITS;
        (fine || !extended_l2).then_some(Geometry { extended_l2, ..self })
    }

    /// The same with or without an external data file.
    pub fn with_data_file(self, data_file: bool) -> Self {
        Geometry { data_file, ..self }
    }

    /// The same with a guest's disk of another size.
    pub fn with_size(self, size: u64) -> Self {
        Geometry { size, ..self }
    }

    /// Whether L2 entries are extended: each has a second word, with two bits a subcluster.
    #[inline]
    pub fn extended_l2(&self) -> bool {
        self.extended_l2
    }

    /// Whether guest clusters stand in another file, each at its guest offset.
    #[inline]
    pub fn data_file(&self) -> bool {
        self.data_file
    }

    /// Format version, 2 or 3. Version 2 knows no zero flag.
    #[inline]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Size of the guest's disk in bytes.
    #[inline]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// log2 of the cluster size, 9 to 21.
    #[inline]
    pub fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Cluster size in bytes.
    #[inline]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the units in a cluster: 0, or 5 with extended L2 entries.
    #[inline]
    pub fn sub_bits(&self) -> u32 {
        if self.extended_l2 { SUBCLUSTER_BITS } else { 0 }
    }

    /// log2 of the unit's size. A unit is what can be mapped by itself: a subcluster with extended
    /// L2 entries, else a cluster.
    #[inline]
    pub fn unit_bits(&self) -> u32 {
        self.cluster_bits - self.sub_bits()
    }

    /// Size of a unit in bytes.
    #[inline]
    pub fn unit_size(&self) -> u64 {
        1 << self.unit_bits()
    }

    /// Units that the guest's disk has, the last one perhaps partly.
    #[inline]
    pub fn guest_units(&self) -> u64 {
        self.size.div_ceil(self.unit_size())
    }

    /// 8-byte words of an L2 entry: 2 if they are extended, else 1.
    #[inline]
    pub fn l2_words(&self) -> usize {
        if self.extended_l2 { 2 } else { 1 }
    }

    /// Bytes of an L2 entry.
    #[inline]
    pub fn l2_entry_size(&self) -> u64 {
        8 * self.l2_words() as u64
    }

    /// log2 of the entries in an L2 table (a table is one cluster of 8- or 16-byte entries).
    #[inline]
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Entries in an L2 table.
    #[inline]
    pub fn l2_entries(&self) -> usize {
        1 << self.l2_bits()
    }

    /// Guest bytes that one L2 table maps.
    #[inline]
    pub fn l2_span(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// Clusters that the guest's disk has, the last one perhaps partly.
    #[inline]
    pub fn guest_clusters(&self) -> u64 {
        self.size.div_ceil(self.cluster_size())
    }

    /// L1 entries that the guest's disk needs.
    #[inline]
    pub fn l1_entries(&self) -> u64 {
        self.size.div_ceil(self.l2_span())
    }

    /// Which L1 entry maps this guest offset.
    #[inline]
    pub fn l1_index(&self, guest: u64) -> u64 {
        guest >> (self.cluster_bits + self.l2_bits())
    }

    /// Which entry of its L2 table maps this guest offset.
    #[inline]
    pub fn l2_index(&self, guest: u64) -> usize {
        (guest >> self.cluster_bits) as usize & (self.l2_entries() - 1)
    }

    /// Number of the cluster (guest or host) in which the offset lies.
    #[inline]
    pub fn cluster(&self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// Position inside the cluster.
    #[inline]
    pub fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Start of the cluster in which the offset lies.
    #[inline]
    pub fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// The next multiple of the cluster size at or above `n`; `None` past 2^64.
    #[inline]
    pub fn round_up(&self, n: u64) -> Option<u64> {
        n.checked_next_multiple_of(self.cluster_size())
    }

    /// Clusters needed for that many bytes.
    #[inline]
    pub fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// log2 of the width of a refcount in bits, 0 to 6.
    #[inline]
    pub fn refcount_order(&self) -> u32 {
        self.refcount_order
    }

    /// Largest refcount that the width can hold.
    #[inline]
    pub fn refcount_max(&self) -> u64 {
        if self.refcount_order == 6 { u64::MAX } else { (1 << (1 << self.refcount_order)) - 1 }
    }

    /// log2 of the refcounts in a refcount block (a block is one cluster).
    #[inline]
    pub fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Refcounts in a refcount block.
    #[inline]
    pub fn refcount_block_entries(&self) -> usize {
        1 << self.refcount_block_bits()
    }

    /// Which refcount table entry covers this host cluster (a number, not an offset).
    #[inline]
    pub fn refcount_table_index(&self, host_cluster: u64) -> u64 {
        host_cluster >> self.refcount_block_bits()
    }

    /// Which entry of its refcount block is this host cluster's.
    #[inline]
    pub fn refcount_block_index(&self, host_cluster: u64) -> usize {
        host_cluster as usize & (self.refcount_block_entries() - 1)
    }

    /// log2 of the first bit of the sector count in a compressed cluster's entry ("Compressed
    /// Clusters Descriptor", x).
    #[inline]
    pub fn compressed_shift(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// First host offset that a compressed cluster's entry cannot hold.
    #[inline]
    pub fn compressed_limit(&self) -> u64 {
        1 << self.compressed_shift().min(HOST_OFFSET_BITS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_image() {
        let g = Geometry::new(3, 16, 4, 16 << 40).unwrap();
        assert_eq!(g.l2_entries(), 8192);
        assert_eq!(g.l2_span(), 512 << 20);
        assert_eq!(g.l1_entries(), 32768);
        assert_eq!(g.refcount_block_entries(), 32768);
        assert_eq!(g.refcount_max(), 65535);
        let guest = (3 << 29) | (77 << 16) | 5;
        assert_eq!((g.l1_index(guest), g.l2_index(guest), g.in_cluster(guest)), (3, 77, 5));
        assert_eq!(g.compressed_shift(), 54);
    }

    #[test]
    fn extremes() {
        let g = Geometry::new(3, 9, 6, u64::MAX).unwrap();
        assert_eq!(g.refcount_block_entries(), 64);
        assert_eq!(g.refcount_max(), u64::MAX);
        assert_eq!(g.l1_entries(), 1 << 49);
        assert_eq!(g.compressed_limit(), 1 << 56);
        let g = Geometry::new(3, 21, 0, 1).unwrap();
        assert_eq!(g.refcount_block_entries(), 1 << 24);
        assert_eq!(g.refcount_max(), 1);
        assert_eq!(g.compressed_limit(), 1 << 49);
        assert_eq!(g.guest_clusters(), 1);
        assert_eq!(g.round_up(u64::MAX), None);
    }

    #[test]
    fn subclusters() {
        let g = Geometry::new(3, 17, 4, (1 << 30) + 1).unwrap();
        assert_eq!((g.unit_bits(), g.l2_bits(), g.l2_entry_size()), (17, 14, 8));
        let g = g.with_extended_l2(true).unwrap();
        assert_eq!((g.unit_bits(), g.l2_bits(), g.l2_entry_size()), (12, 13, 16));
        assert_eq!((g.guest_units(), g.guest_clusters()), ((1 << 18) + 1, (1 << 13) + 1));
        assert_eq!(g.l2_span(), 1 << 30);
        assert_eq!(Geometry::new(3, 13, 4, 0).unwrap().with_extended_l2(true), None);
        assert_eq!(Geometry::new(2, 16, 4, 0).unwrap().with_extended_l2(true), None);
        let plain = Geometry::new(2, 9, 4, 0).unwrap();
        assert_eq!(plain.with_extended_l2(false), Some(plain));
    }

    #[test]
    fn impossible_ones() {
        for (v, c, r) in [(1, 16, 4), (4, 16, 4), (3, 8, 4), (3, 22, 4), (3, 16, 7), (2, 16, 3)] {
            assert_eq!(Geometry::new(v, c, r, 0), None);
        }
    }
}
