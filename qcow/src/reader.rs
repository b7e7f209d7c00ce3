//! [`ChainReader`]: reads a guest's disk through the chain, one blocking access at a time.
//!
//! For converting, comparing and mapping images. It shares only the format's decoding with the
//! datapath, so tests use it as the independent second opinion.

use block::Storage;

use crate::compress::Decompressor;
use crate::format::{Compression, FieldError, Geometry, L1Entry, L2Entry, RawL2, Unit};
use crate::open::{Chain, ImageMeta, Layer, LayerKind};
use crate::{Error, Result};

/// The files of one image, to change them.
pub(crate) struct Files<'a> {
    /// Its metadata, and guest clusters unless they are in `data`.
    pub(crate) image: &'a mut dyn Storage,
    /// The external data file.
    pub(crate) data: Option<&'a mut dyn Storage>,
}

/// Most bytes of L2 tables kept in memory (one table may have 2 MiB).
const L2_CACHE_BYTES: usize = 16 << 20;

/// Where the contents of a range come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// No layer has anything: zeroes.
    Unallocated,
    /// Zeroes, as the layer says; perhaps with clusters kept for them at this offset of its file.
    Zero(Option<u64>),
    /// Data at this offset of the layer's file (or of its external data file).
    Data(u64),
    /// A compressed cluster, which starts at this offset of the layer's file and has at most this
    /// many bytes. The span may be a part of it.
    Compressed(u64, u32),
}

/// A range of the guest's disk that comes from one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First guest byte.
    pub start: u64,
    /// Bytes, never 0.
    pub len: u64,
    /// The layer it comes from. For unallocated ranges the last one that was asked.
    pub depth: usize,
    /// Where in the layer.
    pub source: Source,
}

/// An L2 table in memory.
struct CachedTable {
    layer: usize,
    offset: u64,
    words: Vec<u64>,
    used: u64,
}

/// Tables used last.
#[derive(Default)]
struct L2Cache {
    tables: Vec<CachedTable>,
    clock: u64,
    bytes: usize,
}

impl L2Cache {
    fn find(&mut self, layer: usize, offset: u64) -> Option<usize> {
        self.clock += 1;
        let at = self.tables.iter().position(|t| t.layer == layer && t.offset == offset)?;
        self.tables[at].used = self.clock;
        Some(at)
    }

    fn insert(&mut self, layer: usize, offset: u64, words: Vec<u64>) -> usize {
        self.bytes += words.len() * 8;
        while self.bytes > L2_CACHE_BYTES && !self.tables.is_empty() {
            let (oldest, _) = self
                .tables
                .iter()
                .enumerate()
                .min_by_key(|(_, t)| t.used)
                .expect("the cache is not empty");
            self.bytes -= self.tables.swap_remove(oldest).words.len() * 8;
        }
        self.tables.push(CachedTable { layer, offset, words, used: self.clock });
        self.tables.len() - 1
    }
}

/// Reads through a chain.
pub struct ChainReader<S> {
    layers: Vec<Layer<S>>,
    cache: L2Cache,
    decompressor: Decompressor,
    packed: Vec<u8>,
    plain: Vec<u8>,
    /// Layer and offset of the compressed cluster that `plain` holds.
    plain_is: Option<(usize, u64)>,
}

impl<S: Storage> ChainReader<S> {
    /// Takes the chain over.
    pub fn new(chain: Chain<S>) -> ChainReader<S> {
        ChainReader {
            layers: chain.layers,
            cache: L2Cache::default(),
            decompressor: Decompressor::new(),
            packed: Vec::new(),
            plain: Vec::new(),
            plain_is: None,
        }
    }

    /// Gives the chain back.
    pub fn into_chain(self) -> Chain<S> {
        Chain { layers: self.layers }
    }

    /// The layers; 0 is the top.
    pub fn layers(&self) -> &[Layer<S>] {
        &self.layers
    }

    /// Bytes that a guest sees.
    pub fn size(&self) -> u64 {
        self.layers[0].size()
    }

    /// Fills `into` from guest offset `offset`; past the disk's end with zeroes.
    ///
    /// # Errors
    /// If a layer cannot be read or its tables say something impossible.
    pub fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.read_below(0, offset, into)
    }

    /// Reads what the chain without the layers above `depth` shows; past its end zeroes.
    ///
    /// # Errors
    /// As [`ChainReader::read_at`].
    pub fn read_below(&mut self, depth: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < into.len() {
            let at = offset.saturating_add(done as u64);
            let Some(span) = self.span_below(depth, at, (into.len() - done) as u64)? else {
                into[done..].fill(0);
                return Ok(());
            };
            let part = &mut into[done..done + span.len as usize];
            match span.source {
                Source::Unallocated | Source::Zero(_) => part.fill(0),
                Source::Data(host) => {
                    let layer = &mut self.layers[span.depth];
                    let read = layer.data_storage().read_at(host, part);
                    read.map_err(Error::io(&layer.name, "data"))?;
                }
                Source::Compressed(host, len) => {
                    self.unpack(span.depth, host, len)?;
                    let cluster = self.plain.len() as u64;
                    let skip = (span.start % cluster) as usize;
                    part.copy_from_slice(&self.plain[skip..skip + part.len()]);
                }
            }
            done += span.len as usize;
        }
        Ok(())
    }

    /// Tells the layers above `depth` what of the guest's bytes from `from` to `to` they will soon be
    /// asked for. What cannot be told now is found out when it is read.
    pub(crate) fn will_read(&mut self, depth: usize, mut from: u64, to: u64) {
        while from < to
            && let Ok(Some(span)) = self.span(from, to - from)
        {
            let (host, len) = match span.source {
                Source::Data(host) => (host, span.len),
                Source::Compressed(host, len) => (host, u64::from(len)),
                Source::Unallocated | Source::Zero(_) => (0, 0),
            };
            if span.depth < depth && len > 0 {
                self.layers[span.depth].data_storage().will_read(host, len);
            }
            from += span.len;
        }
    }

    /// Where the guest's bytes from `start` on come from, at most `max` (not 0) of them: the
    /// longest run that one table shows. `None` at the disk's end.
    ///
    /// # Errors
    /// If a table cannot be read or says something impossible.
    pub fn span(&mut self, start: u64, max: u64) -> Result<Option<Span>> {
        self.span_below(0, start, max)
    }

    /// As [`ChainReader::span`], for the chain without the layers above `depth`, which is counted
    /// from the top all the same.
    fn span_below(&mut self, mut depth: usize, start: u64, max: u64) -> Result<Option<Span>> {
        let size = self.layers.get(depth).map_or(0, Layer::size);
        if start >= size {
            return Ok(None);
        }
        let mut len = max.min(size - start);
        loop {
            let (run, source) = match self.layers[depth].kind {
                LayerKind::Raw(_) => (len, Source::Data(start)),
                LayerKind::Qcow2(_) => self.run_in_image(depth, start, len)?,
            };
            len = run;
            if source != Source::Unallocated {
                return Ok(Some(Span { start, len, depth, source }));
            }
            match self.layers.get(depth + 1).map(Layer::size) {
                Some(below) if start < below => {
                    len = len.min(below - start);
                    depth += 1;
                }
                // No backing file, or it ends before: zeroes.
                _ => return Ok(Some(Span { start, len, depth, source })),
            }
        }
    }

    /// What the top layer itself says about `start`, inside the disk, and for how many bytes, at most `max` (not 0):
    /// [`Source::Unallocated`] where it holds nothing, so that what is below shows.
    ///
    /// # Errors
    /// As [`ChainReader::span`].
    pub fn top_run(&mut self, start: u64, max: u64) -> Result<(u64, Source)> {
        match self.layers[0].kind {
            LayerKind::Raw(_) => Ok((max, Source::Data(start))),
            LayerKind::Qcow2(_) => self.run_in_image(0, start, max),
        }
    }

    /// The bytes of a layer, to change them.
    pub(crate) fn storage(&mut self, depth: usize) -> &mut S {
        &mut self.layers[depth].storage
    }

    /// The files of a layer, to change them.
    pub(crate) fn files(&mut self, depth: usize) -> Files<'_> {
        let layer = &mut self.layers[depth];
        let data = layer.data.as_mut().map(|d| &mut d.storage as &mut dyn Storage);
        Files { image: &mut layer.storage, data }
    }

    /// A layer was changed: these are its tables now.
    pub(crate) fn changed(&mut self, depth: usize, kind: LayerKind) {
        self.layers[depth].kind = kind;
        self.cache = L2Cache::default();
        self.plain_is = None;
    }

    /// What one image says about a range: the bytes of the run from `start` on, and its source.
    fn run_in_image(&mut self, depth: usize, start: u64, max: u64) -> Result<(u64, Source)> {
        let layer = &mut self.layers[depth];
        let LayerKind::Qcow2(image) = &layer.kind else { return Ok((max, Source::Unallocated)) };
        let g = image.geometry;
        let l1_index = g.l1_index(start);
        let to_table_end = ((l1_index + 1) << (g.cluster_bits() + g.l2_bits())) - start;
        let max = max.min(to_table_end);
        let raw = image.l1[l1_index as usize];
        let l1_entry = L1Entry::decode(raw, &g).map_err(|e| {
            let at = image.header.l1_table_offset + l1_index * 8;
            bad_entry(image, "L1 entry", at, raw, &e)
        })?;
        if l1_entry.offset == 0 {
            return Ok((max, Source::Unallocated));
        }
        let cached = match self.cache.find(depth, l1_entry.offset) {
            Some(at) => at,
            None => {
                inside_file(image, &layer.storage, "L2 table", l1_entry.offset)?;
                let words = crate::open::read_word_table(
                    &mut layer.storage,
                    &layer.name,
                    "L2 table",
                    l1_entry.offset,
                    g.cluster_size(),
                )?;
                self.cache.insert(depth, l1_entry.offset, words)
            }
        };
        let words = &self.cache.tables[cached].words;
        let external = g.data_file();
        let end_of_file = if external { u64::MAX } else { layer.storage.len() };
        let decode = |index: usize| {
            let raw = RawL2::of(words, index, &g);
            let bad = |why: &dyn std::fmt::Display| {
                let at = l1_entry.offset + index as u64 * g.l2_entry_size();
                Err(bad_entry(image, "L2 entry", at, raw, why))
            };
            let guest = ((l1_index << g.l2_bits()) + index as u64) << g.cluster_bits();
            match L2Entry::decode(raw, &g) {
                Ok(entry) if external && entry.host_cluster().is_some_and(|(h, _)| h != guest) => {
                    bad(&format!("in an external data file it must be at {guest:#x}"))
                }
                Ok(entry) => Ok(entry),
                Err(e) => bad(&e),
            }
        };
        let first = g.l2_index(start);
        let entry = decode(first)?;
        if external && layer.data.is_none() {
            return Err(Error::refused(&layer.name, "its external data file is not open"));
        }
        if let L2Entry::Normal { host, .. }
        | L2Entry::Compressed { host, .. }
        | L2Entry::Parts { host: Some((host, _)), alloc: 1.., .. } = entry
            && !external
        {
            inside_file(image, &layer.storage, "data cluster", host)?;
        }
        let into = g.in_cluster(start);
        let (mut run, source) = source_in(entry, &g, into);
        // As far as the entries behind go on with it.
        let mut whole = into + run == g.cluster_size();
        for index in first + 1..g.l2_entries() {
            if run >= max || !whole {
                break;
            }
            // A bad entry ends the run; it is reported when it is asked for itself.
            let Ok(next) = decode(index) else { break };
            let (more, other) = source_in(next, &g, 0);
            let goes_on = match (source, other) {
                (Source::Unallocated, Source::Unallocated)
                | (Source::Zero(None), Source::Zero(None)) => true,
                (Source::Zero(Some(host)), Source::Zero(Some(h))) => host + run == h,
                (Source::Data(host), Source::Data(h)) => host + run == h && h < end_of_file,
                _ => false,
            };
            if !goes_on {
                break;
            }
            run += more;
            whole = more == g.cluster_size();
        }
        Ok((run.min(max), source))
    }

    /// Unpacks a compressed cluster into `self.plain`, if it is not there already.
    fn unpack(&mut self, depth: usize, host: u64, len: u32) -> Result<()> {
        if self.plain_is == Some((depth, host)) {
            return Ok(());
        }
        self.plain_is = None;
        let layer = &mut self.layers[depth];
        let (compression, cluster) = match &layer.kind {
            LayerKind::Qcow2(i) => (i.header.compression, i.geometry.cluster_size() as usize),
            LayerKind::Raw(_) => (Compression::Deflate, 0),
        };
        self.packed.resize(len as usize, 0);
        self.plain.resize(cluster, 0);
        // An entry counts whole sectors: the last one may end behind a device.
        let room = layer.storage.capacity().saturating_sub(host).min(u64::from(len)) as usize;
        self.packed[room..].fill(0);
        layer
            .storage
            .read_at(host, &mut self.packed[..room])
            .map_err(Error::io(&layer.name, "compressed cluster"))?;
        self.decompressor.decode(compression, &self.packed, &mut self.plain).map_err(|e| {
            Error::field(
                &layer.name,
                FieldError::new("compressed cluster", host, "damaged", e.to_string()),
            )
        })?;
        self.plain_is = Some((depth, host));
        Ok(())
    }
}

/// What an entry says from `into` its cluster on, and for how many bytes of the cluster.
fn source_in(entry: L2Entry, g: &Geometry, into: u64) -> (u64, Source) {
    let host = entry.host_cluster().map(|(host, _)| host + into);
    let to_end = g.cluster_size() - into;
    if let L2Entry::Compressed { host, len } = entry {
        return (to_end, Source::Compressed(host, len));
    }
    let index = if g.extended_l2() { (into >> g.unit_bits()) as u32 } else { 0 };
    let run = match g.extended_l2() {
        true => (u64::from(index + entry.run(index)) << g.unit_bits()) - into,
        false => to_end,
    };
    let source = match (entry.unit(index), host) {
        (Unit::Data, Some(host)) => Source::Data(host),
        (Unit::Zero, host) => Source::Zero(host),
        _ => Source::Unallocated,
    };
    (run, source)
}

/// Refuses a table or data cluster that starts past the file's end: the file was cut, and what
/// it held must not silently read as zeroes.
fn inside_file(image: &ImageMeta, storage: &dyn Storage, what: &str, offset: u64) -> Result<()> {
    let len = storage.len();
    if offset < len {
        return Ok(());
    }
    Err(Error::field(
        &image.name,
        FieldError::new(
            what,
            offset,
            "past the end of the file",
            format!("the file has {len} bytes; it was cut short or is damaged"),
        ),
    ))
}

fn bad_entry(
    image: &ImageMeta,
    what: &str,
    offset: u64,
    raw: impl std::fmt::LowerHex,
    why: &dyn std::fmt::Display,
) -> Error {
    Error::field(&image.name, FieldError::new(what, offset, format!("{raw:#x}"), why.to_string()))
}
