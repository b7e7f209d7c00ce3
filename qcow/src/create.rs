//! [`create`]: makes an empty image, with the options of `qemu-img create -o`.

use block::Storage;

use crate::format::{
    Compression, Extension, Geometry, Header, L1Entry, L2Entry, MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES, RefcountBlock, autoclear, compatible, ext, incompatible,
};
use crate::open::Format;
use crate::{Error, Result};

/// What is laid out in advance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All tables, with a (sparse) place for each cluster.
    Metadata,
    /// That, and the clusters are written with zeroes.
    Full,
}

/// What to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Guest disk in bytes; rounded up to 512.
    pub size: u64,
    /// 2 (compat=0.10) or 3 (compat=1.1).
    pub version: u32,
    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Refcount width: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: bool,
    /// How compressed clusters will be compressed.
    pub compression: Compression,
    /// What is laid out in advance.
    pub preallocation: Preallocation,
    /// Name of the backing file, as it shall stand in the image, and its format.
    pub backing: Option<(String, Format)>,
    /// Whether L2 entries are extended, with 32 subclusters in each cluster.
    pub extended_l2: bool,
    /// Name of the external data file, as it shall stand in the image.
    pub data_file: Option<String>,
    /// Whether the external data file shall be the guest's disk by itself. Everything is mapped in
    /// advance then, as with [`Preallocation::Metadata`].
    pub data_file_raw: bool,
}

impl CreateOptions {
    /// QEMU's defaults: version 3, 64 KiB clusters, 16-bit refcounts.
    pub fn new(size: u64) -> CreateOptions {
        CreateOptions {
            size,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            lazy_refcounts: false,
            compression: Compression::Deflate,
            preallocation: Preallocation::Off,
            backing: None,
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
        }
    }

    /// What is laid out in advance, all options considered.
    pub(crate) fn preallocation(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            other => other,
        }
    }

    /// Sets an option by the name that `qemu-img create -o name=value` uses: cluster_size,
    /// refcount_bits, compat, lazy_refcounts, preallocation, compression_type, extended_l2, data_file
    /// or data_file_raw.
    ///
    /// # Errors
    /// A sentence: the option is unknown, or what its value may be.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let bad = |allowed: &str| Err(format!("option {name}={value}: {allowed}"));
        match (name, value) {
            ("cluster_size", _) => match parse_size(value) {
                Some(n) => self.cluster_size = n,
                None => return bad("a size like 65536, 64k or 2M is needed"),
            },
            ("refcount_bits", _) => match value.parse() {
                Ok(n) => self.refcount_bits = n,
                Err(_) => return bad("a number is needed"),
            },
            ("compat", "0.10" | "v2") => self.version = 2,
            ("compat", "1.1" | "v3") => self.version = 3,
            ("compat", _) => return bad("0.10 (or v2) and 1.1 (or v3) are possible"),
            ("lazy_refcounts", "on") => self.lazy_refcounts = true,
            ("lazy_refcounts", "off") => self.lazy_refcounts = false,
            ("lazy_refcounts", _) => return bad("on and off are possible"),
            ("preallocation", "off") => self.preallocation = Preallocation::Off,
            ("preallocation", "metadata") => self.preallocation = Preallocation::Metadata,
            ("preallocation", "full") => self.preallocation = Preallocation::Full,
            ("preallocation", _) => return bad("off, metadata and full are supported"),
            ("compression_type", "zlib") => self.compression = Compression::Deflate,
            ("compression_type", "zstd") => self.compression = Compression::Zstd,
            ("compression_type", _) => return bad("zlib and zstd are possible"),
            ("extended_l2", "on") => self.extended_l2 = true,
            ("extended_l2", "off") => self.extended_l2 = false,
            ("data_file", "") => return bad("a name is needed"),
            ("data_file", _) => self.data_file = Some(value.to_owned()),
            ("data_file_raw", "on") => self.data_file_raw = true,
            ("data_file_raw", "off") => self.data_file_raw = false,
            ("extended_l2" | "data_file_raw", _) => return bad("on and off are possible"),
            _ => return bad("this option is not supported"),
        }
        Ok(())
    }
}

/// A number with an optional suffix k, M, G or T (powers of 1024; any case).
fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().next_back()? {
        (at, 'k' | 'K') => (&text[..at], 10),
        (at, 'm' | 'M') => (&text[..at], 20),
        (at, 'g' | 'G') => (&text[..at], 30),
        (at, 't' | 'T') => (&text[..at], 40),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Where everything goes, in clusters.
pub(crate) struct Layout {
    l1_entries: u64,
    refcount_table: u64,
    refcount_blocks: u64,
    l1: u64,
    l2: u64,
    data: u64,
}

impl Layout {
    pub(crate) fn total(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.l1 + self.l2 + self.data
    }

    pub(crate) fn new(g: &Geometry, preallocation: Preallocation) -> Result<Layout, String> {
        let l1_entries = g.l1_entries().max(1);
        if l1_entries > MAX_L1_BYTES / 8 {
            return Err(format!(
                "a disk of {} bytes is too large for clusters of {} bytes (its L1 table would \
                 be larger than 32 MiB)",
                g.size(),
                g.cluster_size()
            ));
        }
        let (l2, data) = match preallocation {
            Preallocation::Off => (0, 0),
            Preallocation::Metadata | Preallocation::Full if g.data_file() => (g.l1_entries(), 0),
            Preallocation::Metadata | Preallocation::Full => (g.l1_entries(), g.guest_clusters()),
        };
        let mut layout = Layout {
            l1_entries,
            refcount_table: 1,
            refcount_blocks: 1,
            l1: g.clusters_for(l1_entries * 8),
            l2,
            data,
        };
        // More blocks need more blocks; each turn grows them, and a block covers at least 64
        // clusters, so this settles after a few turns.
        loop {
            let blocks = layout.total().div_ceil(g.refcount_block_entries() as u64);
            let table = g.clusters_for(blocks * 8);
            if (blocks, table) == (layout.refcount_blocks, layout.refcount_table) {
                break;
            }
            layout.refcount_blocks = blocks;
            layout.refcount_table = table;
        }
        if layout.refcount_table * g.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
            return Err(format!(
                "a preallocated disk of {} bytes is too large for clusters of {} bytes (its \
                 refcount table would be larger than 8 MiB)",
                g.size(),
                g.cluster_size()
            ));
        }
        Ok(layout)
    }
}

/// Makes `storage` an empty image; what was in it is lost. Its header is written last, so that a
/// half-made image is none.
///
/// # Errors
/// If the options contradict each other or the format, they ask for an external data file, or a
/// write fails.
pub fn create(storage: &mut dyn Storage, name: &str, options: &CreateOptions) -> Result<()> {
    create_with(storage, None, name, options)
}

/// As [`create`], for an image with an external data file. What was in `data` is lost, too.
///
/// # Errors
/// As [`create`]; if the data file has too little room.
pub fn create_with_data(
    storage: &mut dyn Storage,
    data: &mut dyn Storage,
    name: &str,
    options: &CreateOptions,
) -> Result<()> {
    create_with(storage, Some(data), name, options)
}

fn create_with(
    storage: &mut dyn Storage,
    data: Option<&mut dyn Storage>,
    name: &str,
    options: &CreateOptions,
) -> Result<()> {
    let refuse = |reason: String| Error::refused(name, reason);
    let geometry = check(options).map_err(refuse)?;
    let preallocation = options.preallocation();
    let layout = Layout::new(&geometry, preallocation).map_err(refuse)?;
    let header = make_header(&geometry, &layout, options);
    let mut first = header.encode().map_err(|e| {
        refuse(format!("{} is {}; {} (file names too long?)", e.what, e.found, e.allowed))
    })?;
    first.resize(geometry.cluster_size() as usize, 0);
    if data.is_some() != geometry.data_file() {
        return Err(refuse("an external data file must be named and be open".to_owned()));
    }

    let bytes = layout.total() * geometry.cluster_size();
    if storage.capacity() < bytes {
        return Err(refuse(format!(
            "has room for {} bytes, but the new image needs {bytes}",
            storage.capacity()
        )));
    }
    if let Some(data) = &data {
        room_for_data(&**data, name, geometry.size())?;
    }
    storage.set_len(0).map_err(Error::io(name, "set length"))?;
    let is_file = storage.is_empty();
    if !is_file {
        let io = |e| Error::io(name, "header")(e);
        storage.write_zeroes_at(0, geometry.cluster_size()).map_err(io)?;
        storage.flush().map_err(io)?;
    }
    write_tables(storage, name, &geometry, &layout)?;
    match (preallocation, data) {
        (_, Some(data)) => make_data(data, name, geometry.size(), preallocation)?,
        (Preallocation::Off, _) => {}
        (Preallocation::Metadata, _) if is_file => {
            storage.set_len(bytes).map_err(Error::io(name, "set length"))?;
        }
        // A device's old contents must not show.
        (Preallocation::Metadata | Preallocation::Full, _) => {
            let len = layout.data * geometry.cluster_size();
            write_data(storage, name, bytes - len..bytes, preallocation)?;
        }
    }
    let io = |e| Error::io(name, "header")(e);
    storage.flush().map_err(io)?;
    storage.write_at(0, &first).map_err(io)?;
    storage.flush().map_err(io)
}

/// Refuses a data file that cannot hold the disk.
pub(crate) fn room_for_data(data: &dyn Storage, name: &str, size: u64) -> Result<()> {
    match data.capacity() {
        room if room < size => Err(Error::refused(
            name,
            format!("its data file has room for {room} bytes, but the disk has {size}"),
        )),
        _ => Ok(()),
    }
}

/// Makes an external data file for an empty disk of `size` bytes, durably. What is mapped in advance
/// reads as zeroes.
pub(crate) fn make_data(
    data: &mut dyn Storage,
    name: &str,
    size: u64,
    preallocation: Preallocation,
) -> Result<()> {
    let io = |e| Error::io(name, "data file")(e);
    data.set_len(0).map_err(io)?;
    let is_file = data.is_empty();
    data.set_len(size).map_err(io)?;
    match preallocation {
        Preallocation::Full => write_data(data, name, 0..size, preallocation)?,
        Preallocation::Metadata if !is_file => write_data(data, name, 0..size, preallocation)?,
        Preallocation::Metadata | Preallocation::Off => {}
    }
    data.flush().map_err(io)
}

/// Checks the options against each other.
pub(crate) fn check(options: &CreateOptions) -> Result<Geometry, String> {
    let power = |what: &str, n: u64, least: u64, most: u64| {
        if n.is_power_of_two() && (least..=most).contains(&n) {
            Ok(n.trailing_zeros())
        } else {
            Err(format!("{what}={n}: powers of two from {least} to {most} are possible"))
        }
    };
    let cluster_bits = power("cluster_size", options.cluster_size, 512, 2 << 20)?;
    let order = power("refcount_bits", u64::from(options.refcount_bits), 1, 64)?;
    if options.version < 3 {
        if order != 4 {
            return Err("refcount_bits other than 16 need compat=1.1".to_owned());
        }
        if options.lazy_refcounts {
            return Err("lazy_refcounts=on needs compat=1.1".to_owned());
        }
        if options.compression != Compression::Deflate {
            return Err("compression_type other than zlib needs compat=1.1".to_owned());
        }
        if options.extended_l2 {
            return Err("extended_l2=on needs compat=1.1".to_owned());
        }
        if options.data_file.is_some() {
            return Err("data_file needs compat=1.1".to_owned());
        }
    }
    if options.data_file_raw && options.data_file.is_none() {
        return Err("data_file_raw=on needs data_file".to_owned());
    }
    if options.data_file_raw && options.backing.is_some() {
        return Err("data_file_raw=on leaves no place for a backing file".to_owned());
    }
    if let Some((backing, _)) = &options.backing {
        if backing.is_empty() || backing.len() > crate::format::MAX_BACKING_NAME as usize {
            return Err(format!(
                "the backing file name has {} bytes; 1 to 1023 are possible",
                backing.len()
            ));
        }
        if options.preallocation != Preallocation::Off {
            return Err("preallocation hides the backing file; use one of the two".to_owned());
        }
    }
    let size = options.size.checked_next_multiple_of(512).filter(|&s| s <= i64::MAX as u64);
    let size = size.ok_or_else(|| format!("size {} is too large", options.size))?;
    let geometry = Geometry::new(options.version, cluster_bits, order, size)
        .ok_or_else(|| "the options do not fit the format".to_owned())?;
    let geometry = geometry.with_extended_l2(options.extended_l2);
    let geometry = geometry.ok_or("extended_l2=on needs clusters of at least 16 KiB")?;
    Ok(geometry.with_data_file(options.data_file.is_some()))
}

pub(crate) fn make_header(geometry: &Geometry, layout: &Layout, options: &CreateOptions) -> Header {
    let cluster = geometry.cluster_size();
    let mut header = Header::new(geometry);
    header.refcount_table_offset = cluster;
    header.refcount_table_clusters = layout.refcount_table as u32;
    header.l1_table_offset = (1 + layout.refcount_table + layout.refcount_blocks) * cluster;
    header.l1_size = layout.l1_entries as u32;
    if options.lazy_refcounts {
        header.compatible_features |= compatible::LAZY_REFCOUNTS;
    }
    if options.compression != Compression::Deflate {
        header.incompatible_features |= incompatible::COMPRESSION;
        header.compression = options.compression;
    }
    if let Some((backing, format)) = &options.backing {
        header.backing_name = Some(backing.clone().into_bytes());
        let data = format.name().as_bytes().to_vec();
        header.extensions.push(Extension { kind: ext::BACKING_FORMAT, data });
    }
    if let Some(name) = &options.data_file {
        let data = name.clone().into_bytes();
        header.extensions.push(Extension { kind: ext::DATA_FILE, data });
    }
    if options.data_file_raw {
        header.autoclear_features |= autoclear::RAW_DATA;
    }
    // The name table is for people; where clusters are tiny, the backing file name matters more.
    if header.version >= 3 {
        let plain = header.clone();
        header.add_feature_names();
        if header.encode().is_err() {
            header = plain;
        }
    }
    header
}

/// Refcount table and blocks, L1 table and, if preallocated, L2 tables.
fn write_tables(
    storage: &mut dyn Storage,
    name: &str,
    g: &Geometry,
    layout: &Layout,
) -> Result<()> {
    let cluster = g.cluster_size();
    let first_block = 1 + layout.refcount_table;
    let first_l1 = first_block + layout.refcount_blocks;
    let first_l2 = first_l1 + layout.l1;
    let first_data = first_l2 + layout.l2;

    let table = (0..layout.refcount_blocks).map(|i| (first_block + i) * cluster);
    write_words(storage, name, "refcount table", cluster, layout.refcount_table * cluster, table)?;

    let per_block = g.refcount_block_entries() as u64;
    for i in 0..layout.refcount_blocks {
        let mut block = RefcountBlock::new(g);
        let used = (layout.total() - i * per_block).min(per_block);
        for index in 0..used as usize {
            block.set(index, 1);
        }
        storage
            .write_at((first_block + i) * cluster, block.bytes())
            .map_err(Error::io(name, "refcount block"))?;
    }

    let l1 =
        (0..layout.l2).map(|i| L1Entry { offset: (first_l2 + i) * cluster, copied: true }.encode());
    write_words(storage, name, "L1 table", first_l1 * cluster, layout.l1 * cluster, l1)?;

    let per_table = g.l2_entries() as u64;
    for i in 0..layout.l2 {
        let first = i * per_table;
        let entries = (first..(first + per_table).min(g.guest_clusters())).flat_map(|n| {
            let host = if g.data_file() { n } else { first_data + n } * cluster;
            let raw = L2Entry::Normal { host, copied: true }.encode(g);
            [raw.word, raw.bitmap].into_iter().take(g.l2_words())
        });
        write_words(storage, name, "L2 table", (first_l2 + i) * cluster, cluster, entries)?;
    }
    Ok(())
}

/// Writes a table of `len` bytes: these words, then zeroes.
fn write_words(
    storage: &mut dyn Storage,
    name: &str,
    what: &'static str,
    offset: u64,
    len: u64,
    words: impl Iterator<Item = u64>,
) -> Result<()> {
    const PIECE: usize = 1 << 20;
    let mut words = words.fuse();
    let mut at = 0;
    let mut buffer = Vec::with_capacity(PIECE.min(len as usize));
    while at < len {
        let piece = (len - at).min(PIECE as u64) as usize;
        buffer.clear();
        buffer.extend(words.by_ref().take(piece / 8).flat_map(u64::to_be_bytes));
        buffer.resize(piece, 0);
        storage.write_at(offset + at, &buffer).map_err(Error::io(name, what))?;
        at += piece as u64;
    }
    Ok(())
}

/// Makes preallocated clusters zero: `Full` by writing, so that a file's space is taken.
fn write_data(
    storage: &mut dyn Storage,
    name: &str,
    range: std::ops::Range<u64>,
    preallocation: Preallocation,
) -> Result<()> {
    let io = |e| Error::io(name, "data clusters")(e);
    let len = range.end - range.start;
    if preallocation == Preallocation::Metadata {
        return storage.write_zeroes_at(range.start, len).map_err(io);
    }
    let zeroes = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let piece = (len - at).min(zeroes.len() as u64);
        storage.write_at(range.start + at, &zeroes[..piece as usize]).map_err(io)?;
        at += piece;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_by_name() {
        let mut o = CreateOptions::new(1);
        for (name, value) in [
            ("cluster_size", "2M"),
            ("refcount_bits", "1"),
            ("compat", "v3"),
            ("lazy_refcounts", "on"),
            ("preallocation", "metadata"),
            ("compression_type", "zstd"),
            ("extended_l2", "on"),
            ("data_file", "x"),
            ("data_file_raw", "on"),
        ] {
            o.set(name, value).unwrap();
        }
        assert_eq!((o.cluster_size, o.refcount_bits, o.lazy_refcounts), (2 << 20, 1, true));
        assert_eq!(
            o.set("cluster_size", "x").unwrap_err(),
            "option cluster_size=x: a size like 65536, 64k or 2M is needed"
        );
        assert_eq!(
            o.set("preallocation", "falloc").unwrap_err(),
            "option preallocation=falloc: off, metadata and full are supported"
        );
        assert_eq!(o.set("x", "y").unwrap_err(), "option x=y: this option is not supported");
        assert_eq!(parse_size("18446744073709551615k"), None);
        assert_eq!(parse_size(""), None);
        assert_eq!(parse_size("k"), None);
    }

    #[test]
    fn contradictions() {
        let o = CreateOptions::new(1 << 20);
        let bad = |o: CreateOptions| check(&o).unwrap_err();
        assert_eq!(
            bad(CreateOptions { cluster_size: 1000, ..o.clone() }),
            "cluster_size=1000: powers of two from 512 to 2097152 are possible"
        );
        assert_eq!(
            bad(CreateOptions { refcount_bits: 128, ..o.clone() }),
            "refcount_bits=128: powers of two from 1 to 64 are possible"
        );
        assert_eq!(
            bad(CreateOptions { version: 2, refcount_bits: 8, ..o.clone() }),
            "refcount_bits other than 16 need compat=1.1"
        );
        assert_eq!(
            bad(CreateOptions { version: 2, lazy_refcounts: true, ..o.clone() }),
            "lazy_refcounts=on needs compat=1.1"
        );
        assert_eq!(
            bad(CreateOptions { size: u64::MAX, ..o.clone() }),
            "size 18446744073709551615 is too large"
        );
        let data_file = Some("x".to_owned());
        for (options, text) in [
            (
                CreateOptions { data_file_raw: true, ..o.clone() },
                "data_file_raw=on needs data_file",
            ),
            (
                CreateOptions { data_file: data_file.clone(), version: 2, ..o.clone() },
                "data_file needs compat=1.1",
            ),
            (
                CreateOptions {
                    data_file,
                    data_file_raw: true,
                    backing: Some(("b".to_owned(), Format::Raw)),
                    ..o.clone()
                },
                "data_file_raw=on leaves no place for a backing file",
            ),
            (
                CreateOptions { extended_l2: true, cluster_size: 8192, ..o.clone() },
                "extended_l2=on needs clusters of at least 16 KiB",
            ),
            (
                CreateOptions { extended_l2: true, version: 2, ..o.clone() },
                "extended_l2=on needs compat=1.1",
            ),
        ] {
            assert_eq!(bad(options), text);
        }
        let g = check(&CreateOptions { size: 1 << 50, cluster_size: 512, ..o }).unwrap();
        let Err(text) = Layout::new(&g, Preallocation::Off) else { panic!() };
        assert!(text.contains("its L1 table would be larger than 32 MiB"), "{text}");
    }
}
