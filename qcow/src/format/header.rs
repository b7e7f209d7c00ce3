//! [`Header`]: the fields, extensions and backing file name of the first cluster.

use super::bytes::{array, be32, be64};
use super::{Bitmaps, Extension, FeatureName, FieldError, Geometry, ext, extension};
use super::{
    MAGIC, MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_L1_BYTES, MAX_REFCOUNT_ORDER,
    MAX_REFCOUNT_TABLE_BYTES, MAX_SNAPSHOTS, MIN_CLUSTER_BITS,
};

/// Incompatible feature bits: whoever does not know one must not open the image.
pub mod incompatible {
    /// Refcounts may be too low or too high: repair before writing.
    pub const DIRTY: u64 = 1 << 0;
    /// Any structure may be wrong: do not write.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest clusters stand in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Compressed clusters are not deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have 128 bits, with subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// Those that the format defines.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible feature bits: may be ignored.
pub mod compatible {
    /// Refcounts may be written late while the dirty bit is set.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Autoclear feature bits: whoever does not know one clears it before writing.
pub mod autoclear {
    /// The bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image by itself.
    pub const RAW_DATA: u64 = 1 << 1;
    /// All that are known here: who writes to an image clears the others.
    pub const KNOWN: u64 = BITMAPS | RAW_DATA;
}

/// Offsets of header fields that are rewritten in place.
pub mod field {
    /// `size`, 8 bytes.
    pub const SIZE: u64 = 24;
    /// `l1_size`, 4 bytes, directly followed by `l1_table_offset`, 8 bytes.
    pub const L1_SIZE: u64 = 36;
    /// `l1_table_offset`, 8 bytes.
    pub const L1_TABLE_OFFSET: u64 = 40;
    /// `refcount_table_offset`, 8 bytes, directly followed by `refcount_table_clusters`, 4 bytes.
    pub const REFCOUNT_TABLE_OFFSET: u64 = 48;
    /// `incompatible_features`, 8 bytes; version 3.
    pub const INCOMPATIBLE: u64 = 72;
    /// `compatible_features`, 8 bytes; version 3.
    pub const COMPATIBLE: u64 = 80;
    /// `autoclear_features`, 8 bytes; version 3.
    pub const AUTOCLEAR: u64 = 88;
}

/// Header bytes of version 2.
const V2_LEN: u32 = 72;
/// Header bytes of version 3 at least.
const V3_MIN_LEN: u32 = 104;
/// Header bytes of version 3 as written here: with the compression type and its padding.
const V3_LEN: u32 = 112;
/// Where the compression type stands.
const COMPRESSION_TYPE_AT: usize = 104;
/// Where the fields that are not understood here start, if the header is longer.
const TAIL_AT: usize = 105;

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Compression {
    /// Raw deflate (RFC 1951), called zlib in QEMU's options.
    #[default]
    Deflate,
    /// Zstandard (RFC 8878).
    Zstd,
}

impl Compression {
    /// The name QEMU uses.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Deflate => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// The header. Fields have the specification's names and meanings; all are range-checked by
/// [`Header::parse`], but offsets are not yet compared with the file (opening does that).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Guest disk in bytes; below 2^63.
    pub size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries in the active L1 table; at least as many as the size needs, at most 32 MiB.
    pub l1_size: u32,
    /// Where the active L1 table starts.
    pub l1_table_offset: u64,
    /// Where the refcount table starts.
    pub refcount_table_offset: u64,
    /// Its length in clusters; at most 8 MiB.
    pub refcount_table_clusters: u32,
    /// Internal snapshots, at most 65536.
    pub nb_snapshots: u32,
    /// Where the snapshot table starts.
    pub snapshots_offset: u64,
    /// See [`incompatible`]; 0 in version 2.
    pub incompatible_features: u64,
    /// See [`compatible`]; 0 in version 2.
    pub compatible_features: u64,
    /// See [`autoclear`]; 0 in version 2.
    pub autoclear_features: u64,
    /// log2 of the refcount width in bits, 0 to 6; 4 in version 2.
    pub refcount_order: u32,
    /// Bytes of the header proper; 72 in version 2.
    pub header_length: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Bytes 105 to `header_length`: padding and fields of later versions of the format.
    pub tail: Vec<u8>,
    /// The extensions in their order.
    pub extensions: Vec<Extension>,
    /// The backing file's name as it stands in the image.
    pub backing_name: Option<Vec<u8>>,
}

impl Header {
    /// Bytes that [`Header::peek_cluster_bits`] needs.
    pub const PEEK: usize = 24;

    /// A header for a new image: no tables, no features, no extensions.
    pub fn new(geometry: &Geometry) -> Header {
        let v3 = geometry.version() >= 3;
        Header {
            version: geometry.version(),
            cluster_bits: geometry.cluster_bits(),
            size: geometry.size(),
            crypt_method: 0,
            l1_size: 0,
            l1_table_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: if geometry.extended_l2() {
                incompatible::EXTENDED_L2
            } else {
                0
            } | if geometry.data_file() {
                incompatible::DATA_FILE
            } else {
                0
            },
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: geometry.refcount_order(),
            header_length: if v3 { V3_LEN } else { V2_LEN },
            compression: Compression::Deflate,
            tail: if v3 { vec![0; V3_LEN as usize - TAIL_AT] } else { Vec::new() },
            extensions: Vec::new(),
            backing_name: None,
        }
    }

    /// Looks at the first bytes of a file: says how many must be read for [`Header::parse`].
    ///
    /// # Errors
    /// If it is not a QCOW2 file of a known version, or its cluster size is impossible.
    pub fn peek_cluster_bits(bytes: &[u8]) -> Result<u32, FieldError> {
        let short = || FieldError::new("file", 0, "too short for a QCOW2 header", "72 bytes");
        let magic: [u8; 4] = array(bytes, 0).ok_or_else(short)?;
        if u32::from_be_bytes(magic) != MAGIC {
            return Err(FieldError::header(
                "magic",
                0,
                format!("{:#010x}", u32::from_be_bytes(magic)),
                format!("{MAGIC:#010x} (\"QFI\\xfb\") marks a QCOW2 image"),
            ));
        }
        let version = be32(bytes, 4).ok_or_else(short)?;
        if !matches!(version, 2 | 3) {
            return Err(FieldError::header("version", 4, version, "2 and 3 are possible"));
        }
        let cluster_bits = be32(bytes, 20).ok_or_else(short)?;
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(FieldError::header(
                "cluster_bits",
                20,
                cluster_bits,
                "9 to 21 are possible",
            ));
        }
        Ok(cluster_bits)
    }

    /// Takes the first cluster apart (`bytes`; what lies past the cluster is ignored).
    ///
    /// # Errors
    /// The first field that is impossible by itself or together with others of the header.
    pub fn parse(bytes: &[u8]) -> Result<Header, FieldError> {
        let cluster_bits = Self::peek_cluster_bits(bytes)?;
        let cluster = &bytes[..bytes.len().min(1 << cluster_bits)];
        let short = || FieldError::new("file", 0, "too short for a QCOW2 header", "72 bytes");
        let u32_at = |at| be32(cluster, at).ok_or_else(short);
        let u64_at = |at| be64(cluster, at).ok_or_else(short);
        let version = u32_at(4)?;
        let v3 = version >= 3;
        let v3_u64 = |at| if v3 { u64_at(at) } else { Ok(0) };

        let refcount_order = if v3 { u32_at(96)? } else { 4 };
        if refcount_order > MAX_REFCOUNT_ORDER {
            return Err(FieldError::header(
                "refcount_order",
                96,
                refcount_order,
                "0 to 6 are possible",
            ));
        }
        let header_length = if v3 { u32_at(100)? } else { V2_LEN };
        let longest = cluster.len();
        if v3
            && (header_length < V3_MIN_LEN
                || header_length % 8 != 0
                || header_length as usize > longest)
        {
            return Err(FieldError::header(
                "header_length",
                100,
                header_length,
                format!("multiples of 8 from {V3_MIN_LEN} to {longest} are possible"),
            ));
        }
        let incompatible_features = v3_u64(72)?;
        let compression_byte = if header_length as usize > COMPRESSION_TYPE_AT {
            cluster[COMPRESSION_TYPE_AT]
        } else {
            0
        };
        let header = Header {
            version,
            cluster_bits,
            size: u64_at(24)?,
            crypt_method: u32_at(32)?,
            l1_size: u32_at(36)?,
            l1_table_offset: u64_at(40)?,
            refcount_table_offset: u64_at(48)?,
            refcount_table_clusters: u32_at(56)?,
            nb_snapshots: u32_at(60)?,
            snapshots_offset: u64_at(64)?,
            incompatible_features,
            compatible_features: v3_u64(80)?,
            autoclear_features: v3_u64(88)?,
            refcount_order,
            header_length,
            compression: Self::parse_compression(incompatible_features, compression_byte)?,
            tail: cluster.get(TAIL_AT..header_length as usize).unwrap_or_default().to_vec(),
            extensions: Vec::new(),
            backing_name: None,
        };
        header.check_ranges()?;
        header.parse_rest(cluster)
    }

    fn parse_compression(incompatible_features: u64, byte: u8) -> Result<Compression, FieldError> {
        match (incompatible_features & incompatible::COMPRESSION != 0, byte) {
            (false, 0) => Ok(Compression::Deflate),
            (true, 1) => Ok(Compression::Zstd),
            (flag, _) => Err(FieldError::header(
                "compression_type",
                COMPRESSION_TYPE_AT,
                byte,
                if flag {
                    "1 (zstd) is possible when the compression type feature bit is set"
                } else {
                    "0 (deflate) is possible when the compression type feature bit is not set"
                },
            )),
        }
    }

    fn check_ranges(&self) -> Result<(), FieldError> {
        if self.size > i64::MAX as u64 {
            return Err(FieldError::header("size", 24, self.size, "sizes below 2^63 are possible"));
        }
        if self.crypt_method > 2 {
            return Err(FieldError::header(
                "crypt_method",
                32,
                self.crypt_method,
                "0 (none), 1 (AES) and 2 (LUKS) are defined",
            ));
        }
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            return Err(FieldError::header(
                "l1_size",
                36,
                self.l1_size,
                format!("at most {} entries (32 MiB) are possible", MAX_L1_BYTES / 8),
            ));
        }
        if self.extended_l2() && self.plain_geometry().with_extended_l2(true).is_none() {
            return Err(FieldError::header(
                "cluster_bits",
                20,
                self.cluster_bits,
                "14 to 21 are possible with extended L2 entries",
            ));
        }
        if self.raw_data() && !self.has_data_file() {
            return Err(FieldError::header(
                "autoclear_features",
                88,
                format!("{:#x}", self.autoclear_features),
                "bit 1 (raw external data) is possible with an external data file",
            ));
        }
        let need = self.geometry().l1_entries();
        if u64::from(self.l1_size) < need {
            return Err(FieldError::header(
                "l1_size",
                36,
                self.l1_size,
                format!("a disk of {} bytes needs at least {need} entries", self.size),
            ));
        }
        let most = MAX_REFCOUNT_TABLE_BYTES >> self.cluster_bits;
        if u64::from(self.refcount_table_clusters) > most {
            return Err(FieldError::header(
                "refcount_table_clusters",
                56,
                self.refcount_table_clusters,
                format!("at most {most} clusters (8 MiB) are possible"),
            ));
        }
        if self.nb_snapshots > MAX_SNAPSHOTS {
            return Err(FieldError::header(
                "nb_snapshots",
                60,
                self.nb_snapshots,
                format!("at most {MAX_SNAPSHOTS} are possible"),
            ));
        }
        Ok(())
    }

    /// Extensions and backing file name: what follows the fixed fields.
    fn parse_rest(mut self, cluster: &[u8]) -> Result<Header, FieldError> {
        let offset = be64(cluster, 8).unwrap_or(0);
        let len = be32(cluster, 16).unwrap_or(0);
        let start = self.header_length as usize;
        let mut end = cluster.len();
        if offset != 0 {
            let fits = usize::try_from(offset).ok().filter(|&o| o >= start && o <= end);
            let Some(at) = fits else {
                return Err(FieldError::header(
                    "backing_file_offset",
                    8,
                    offset,
                    format!("0 (none) and {start} to {end} are possible"),
                ));
            };
            let most = (end - at).min(MAX_BACKING_NAME as usize);
            if len as usize > most {
                return Err(FieldError::header(
                    "backing_file_size",
                    16,
                    len,
                    format!("a name of at most {most} bytes is possible"),
                ));
            }
            if len > 0 {
                self.backing_name = Some(cluster[at..at + len as usize].to_vec());
            }
            end = at;
        }
        self.extensions = extension::parse(cluster, start, end)?;
        Ok(self)
    }

    /// The sizes.
    pub fn geometry(&self) -> Geometry {
        self.plain_geometry()
            .with_extended_l2(self.extended_l2())
            .expect("a header's fields are in range")
            .with_data_file(self.has_data_file())
    }

    fn plain_geometry(&self) -> Geometry {
        Geometry::new(self.version, self.cluster_bits, self.refcount_order, self.size)
            .expect("a header's fields are in range")
    }

    /// The header proper: `header_length` bytes. `backing` is where the backing file name stands
    /// and how long it is; (0, 0) for none.
    fn encode_fixed(&self, backing: (u64, u32)) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.header_length as usize);
        out.extend_from_slice(&MAGIC.to_be_bytes());
        out.extend_from_slice(&self.version.to_be_bytes());
        out.extend_from_slice(&backing.0.to_be_bytes());
        out.extend_from_slice(&backing.1.to_be_bytes());
        out.extend_from_slice(&self.cluster_bits.to_be_bytes());
        out.extend_from_slice(&self.size.to_be_bytes());
        out.extend_from_slice(&self.crypt_method.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&self.l1_table_offset.to_be_bytes());
        out.extend_from_slice(&self.refcount_table_offset.to_be_bytes());
        out.extend_from_slice(&self.refcount_table_clusters.to_be_bytes());
        out.extend_from_slice(&self.nb_snapshots.to_be_bytes());
        out.extend_from_slice(&self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            out.extend_from_slice(&self.incompatible_features.to_be_bytes());
            out.extend_from_slice(&self.compatible_features.to_be_bytes());
            out.extend_from_slice(&self.autoclear_features.to_be_bytes());
            out.extend_from_slice(&self.refcount_order.to_be_bytes());
            out.extend_from_slice(&self.header_length.to_be_bytes());
            if self.header_length as usize > COMPRESSION_TYPE_AT {
                out.push(match self.compression {
                    Compression::Deflate => 0,
                    Compression::Zstd => 1,
                });
                out.extend_from_slice(&self.tail);
            }
        }
        out
    }

    /// Header, extensions and backing file name, as they stand from offset 0 on.
    ///
    /// # Errors
    /// If they do not fit a cluster.
    pub fn encode(&self) -> Result<Vec<u8>, FieldError> {
        let mut rest = Vec::new();
        extension::encode(&self.extensions, &mut rest);
        let mut backing = (0, 0);
        if let Some(name) = &self.backing_name {
            backing = (u64::from(self.header_length) + rest.len() as u64, name.len() as u32);
            rest.extend_from_slice(name);
        }
        let mut out = self.encode_fixed(backing);
        out.append(&mut rest);
        let most = 1 << self.cluster_bits;
        if out.len() > most {
            return Err(FieldError::new(
                "header with its extensions and the backing file name",
                0,
                format!("{} bytes long", out.len()),
                format!("a cluster holds {most}"),
            ));
        }
        Ok(out)
    }

    /// The data of the extension of this type.
    pub fn extension(&self, kind: u32) -> Option<&[u8]> {
        self.extensions.iter().find(|e| e.kind == kind).map(|e| e.data.as_slice())
    }

    /// The backing file's format as the image states it.
    pub fn backing_format(&self) -> Option<String> {
        self.extension(ext::BACKING_FORMAT).map(|d| String::from_utf8_lossy(d).into_owned())
    }

    /// The external data file's name as it stands in the image, if there is such a file and a name.
    pub fn data_file_name(&self) -> Option<&[u8]> {
        let name = self.extension(ext::DATA_FILE).filter(|name| !name.is_empty());
        name.filter(|_| self.has_data_file())
    }

    /// The bitmaps extension.
    pub fn bitmaps(&self) -> Option<Bitmaps> {
        self.extension(ext::BITMAPS).and_then(Bitmaps::parse)
    }

    /// Sets or removes the bitmaps extension. It stands before all others: so it lies in the first
    /// sector, where one write changes it together with the tables' places.
    pub fn set_bitmaps(&mut self, bitmaps: Option<Bitmaps>) {
        self.extensions.retain(|e| e.kind != ext::BITMAPS);
        if let Some(b) = bitmaps {
            self.extensions.insert(0, Extension { kind: ext::BITMAPS, data: b.encode() });
        }
    }

    /// The feature name table.
    pub fn feature_names(&self) -> Vec<FeatureName> {
        self.extension(ext::FEATURE_NAMES).map_or(Vec::new(), |d| FeatureName::parse(d).collect())
    }

    /// Adds the feature name table that names what the format defines (version 3).
    pub fn add_feature_names(&mut self) {
        let data = FeatureName::encode(&[
            (0, 0, "dirty bit"),
            (0, 1, "corrupt bit"),
            (0, 2, "external data file"),
            (0, 3, "compression type"),
            (0, 4, "extended L2 entries"),
            (1, 0, "lazy refcounts"),
            (2, 0, "bitmaps"),
            (2, 1, "raw external data"),
        ]);
        self.extensions.push(Extension { kind: ext::FEATURE_NAMES, data });
    }

    /// Unknown incompatible features, by name where the image has names: "no. 17 (\"frobs\")".
    pub fn unknown_incompatible(&self) -> Vec<String> {
        let unknown = self.incompatible_features & !incompatible::KNOWN;
        let names = self.feature_names();
        (0..64u8)
            .filter(|bit| unknown & (1 << bit) != 0)
            .map(|bit| match names.iter().find(|n| n.kind == 0 && n.bit == bit) {
                Some(n) => format!("no. {bit} ({:?})", n.name),
                None => format!("no. {bit}"),
            })
            .collect()
    }

    /// Whether refcounts need repair before the image is written.
    pub fn is_dirty(&self) -> bool {
        self.incompatible_features & incompatible::DIRTY != 0
    }

    /// Whether the image was marked corrupt and must not be written.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible_features & incompatible::CORRUPT != 0
    }

    /// Whether guest clusters stand in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible_features & incompatible::DATA_FILE != 0
    }

    /// Whether the external data file is the guest's disk by itself.
    pub fn raw_data(&self) -> bool {
        self.autoclear_features & autoclear::RAW_DATA != 0
    }

    /// Whether L2 entries are extended.
    pub fn extended_l2(&self) -> bool {
        self.incompatible_features & incompatible::EXTENDED_L2 != 0
    }

    /// Whether refcounts may be written late.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible_features & compatible::LAZY_REFCOUNTS != 0
    }
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
