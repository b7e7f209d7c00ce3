//! [`Builder`]: writes a new image from front to back, for `image convert`.
//!
//! Faster and tighter than the datapath, since nothing is in the way: clusters are appended in
//! guest order, compressed ones packed byte by byte as QEMU packs them, each table is written once.
//! The header comes last, so an image that was not finished is none. Control path.

use block::Storage;

use crate::create::room_for_data;
use crate::create::{CreateOptions, Layout, Preallocation, check, make_data, make_header};
use crate::format::{
    Geometry, HOST_OFFSET_BITS, Header, L1Entry, L2Entry, MAX_REFCOUNT_TABLE_BYTES, RefcountBlock,
};
use crate::{Error, Result};

/// Compressed clusters are written in pieces of at least this many bytes.
const PACK_BYTES: usize = 1 << 20;

/// An image that is being written.
pub struct Builder<'s> {
    storage: &'s mut dyn Storage,
    /// The external data file, if the image has one.
    data: Option<&'s mut dyn Storage>,
    name: String,
    header: Header,
    geometry: Geometry,
    preallocation: Preallocation,
    refcounts: Refcounts,
    /// The L1 table's words, and where it will be.
    l1: Vec<u64>,
    l1_offset: u64,
    /// The L2 table being filled: its L1 index and its words.
    l2: Option<(u64, Vec<u64>)>,
    /// Guest offset up to which everything was given.
    at: u64,
    pack: Pack,
}

/// Compressed data that waits to be written.
#[derive(Default)]
struct Pack {
    /// Where the next compressed cluster may start; 0 if in a cluster of its own.
    next: u64,
    /// Host offset of the bytes.
    start: u64,
    bytes: Vec<u8>,
}

/// The refcounts of clusters that are handed out in ascending order. A block is complete, and gets
/// a cluster itself, when the last cluster that it counts was handed out.
struct Refcounts {
    geometry: Geometry,
    /// First cluster that was not handed out.
    next: u64,
    /// Counts of the clusters around `next`.
    block: RefcountBlock,
    /// Complete blocks that have no place yet, with their index.
    complete: Vec<(u64, RefcountBlock)>,
    /// Where each block is.
    table: Vec<u64>,
}

impl Refcounts {
    fn index(&self, cluster: u64) -> u64 {
        self.geometry.refcount_table_index(cluster)
    }

    /// Takes `count` clusters, side by side; the first one's number.
    fn take(&mut self, count: u64) -> u64 {
        let first = self.next;
        for cluster in first..first + count {
            let at = self.geometry.refcount_block_index(cluster);
            self.block.set(at, 1);
            if at + 1 == self.geometry.refcount_block_entries() {
                let block = std::mem::replace(&mut self.block, RefcountBlock::new(&self.geometry));
                self.complete.push((self.index(cluster), block));
            }
        }
        self.next += count;
        first
    }

    /// Counts one more reference to a cluster, if its block is not complete and the count can be
    /// held.
    fn share(&mut self, cluster: u64) -> bool {
        let at = self.geometry.refcount_block_index(cluster);
        let here = self.index(cluster) == self.index(self.next);
        let fits = here && self.block.get(at) < self.geometry.refcount_max();
        if fits {
            self.block.set(at, self.block.get(at) + 1);
        }
        fits
    }

    fn place(&mut self, index: u64, offset: u64) {
        let index = index as usize;
        if self.table.len() <= index {
            self.table.resize(index + 1, 0);
        }
        self.table[index] = offset;
    }
}

impl CreateOptions {
    /// Length in bytes of the empty image that these options make.
    ///
    /// # Errors
    /// A sentence, if they contradict each other or the format.
    pub fn image_len(&self) -> Result<u64, String> {
        let geometry = check(self)?;
        let layout = Layout::new(&geometry, self.preallocation())?;
        make_header(&geometry, &layout, self).encode().map_err(|e| e.to_string())?;
        Ok(layout.total() * geometry.cluster_size())
    }
}

impl<'s> Builder<'s> {
    /// Starts an image in `storage`; what was in it is lost.
    ///
    /// # Errors
    /// If the options contradict each other or the format (then nothing was written), or a write
    /// fails.
    pub fn new(
        storage: &'s mut dyn Storage,
        name: &str,
        options: &CreateOptions,
    ) -> Result<Builder<'s>> {
        Self::start(storage, None, name, options)
    }

    /// As [`Builder::new`], for an image with an external data file; what was in that is lost, too.
    ///
    /// # Errors
    /// As [`Builder::new`]; if the data file has too little room.
    pub fn with_data(
        storage: &'s mut dyn Storage,
        data: &'s mut dyn Storage,
        name: &str,
        options: &CreateOptions,
    ) -> Result<Builder<'s>> {
        Self::start(storage, Some(data), name, options)
    }

    fn start(
        storage: &'s mut dyn Storage,
        mut data: Option<&'s mut dyn Storage>,
        name: &str,
        options: &CreateOptions,
    ) -> Result<Builder<'s>> {
        let refuse = |reason: String| Error::refused(name, reason);
        let geometry = check(options).map_err(refuse)?;
        let layout = Layout::new(&geometry, Preallocation::Off).map_err(refuse)?;
        let header = make_header(&geometry, &layout, options);
        header.encode().map_err(|e| Error::field(name, e))?;
        let preallocation = options.preallocation();
        if data.is_some() != geometry.data_file() {
            return Err(refuse("an external data file must be named and be open".to_owned()));
        }
        if let Some(data) = &mut data {
            room_for_data(&**data, name, geometry.size())?;
            make_data(&mut **data, name, geometry.size(), preallocation)?;
        }

        storage.set_len(0).map_err(Error::io(name, "set length"))?;
        if !storage.is_empty() {
            // A device: whatever image it held must not be found any more.
            let io = |e| Error::io(name, "header")(e);
            storage.write_zeroes_at(0, geometry.cluster_size()).map_err(io)?;
            storage.flush().map_err(io)?;
        }
        let mut builder = Builder {
            storage,
            data,
            name: name.to_owned(),
            l1: vec![0; header.l1_size as usize],
            header,
            geometry,
            preallocation,
            refcounts: Refcounts {
                geometry,
                next: 0,
                block: RefcountBlock::new(&geometry),
                complete: Vec::new(),
                table: Vec::new(),
            },
            l1_offset: 0,
            l2: None,
            at: 0,
            pack: Pack::default(),
        };
        builder.take(1)?;
        builder.l1_offset = builder.take(geometry.clusters_for(builder.l1.len() as u64 * 8))?;
        Ok(builder)
    }

    /// The sizes.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The next `bytes` of guest data, from `guest` on, which starts a cluster. They are whole
    /// clusters, but for the last of the disk. What lies between the calls stays unallocated.
    ///
    /// # Errors
    /// If there is no space or a write fails.
    pub fn data(&mut self, guest: u64, bytes: &[u8]) -> Result<()> {
        let count = self.advance(guest, bytes.len() as u64);
        if let Some(data) = &mut self.data {
            data.write_at(guest, bytes).map_err(Error::io(&self.name, "data file"))?;
            return self.map(guest, guest, count);
        }
        let host = self.take(count)?;
        self.write("data cluster", host, bytes)?;
        let padding = count * self.geometry.cluster_size() - bytes.len() as u64;
        if padding > 0 {
            // Past the disk's end; a disk that grows must not show what was there.
            let zeroes = vec![0; padding as usize];
            self.write("data cluster", host + bytes.len() as u64, &zeroes)?;
        }
        self.map(guest, host, count)
    }

    /// One compressed cluster, at `guest`: what [`crate::Compressor::encode`] gave.
    ///
    /// # Errors
    /// If there is no space, the file is too long to hold compressed clusters, the image has an
    /// external data file, or a write fails.
    pub fn compressed(&mut self, guest: u64, packed: &[u8]) -> Result<()> {
        let size = self.geometry.cluster_size();
        let len = packed.len() as u64;
        debug_assert!(len > 0 && len < size);
        if self.data.is_some() {
            let reason = "an external data file cannot hold compressed clusters";
            return Err(Error::refused(&self.name, reason));
        }
        self.advance(guest, 1);
        let next = self.pack.next;
        let room = next.next_multiple_of(size) - next;
        let continues = self.refcounts.next * size == next + room;
        let shared = room > 0
            && (len <= room || continues)
            && self.refcounts.share(self.geometry.cluster(next));
        let host = match shared {
            true if len <= room => next,
            true => {
                self.take(1)?;
                next
            }
            false => self.take(1)?,
        };
        if host + len > self.geometry.compressed_limit() {
            return Err(Error::refused(
                &self.name,
                format!(
                    "a compressed cluster would lie at offset {host:#x}; with clusters of {size} \
                     bytes they must lie below {:#x}",
                    self.geometry.compressed_limit()
                ),
            ));
        }
        self.pack.next = host + len;
        if self.pack.start + self.pack.bytes.len() as u64 != host
            || self.pack.bytes.len() >= PACK_BYTES
        {
            self.flush_pack()?;
            self.pack.start = host;
        }
        self.pack.bytes.extend_from_slice(packed);
        let entry = L2Entry::Compressed { host, len: packed.len() as u32 };
        self.set_entry(guest, entry)
    }

    /// `len` bytes of guest zeroes, from `guest` on, which starts a cluster; whole clusters, but at
    /// the disk's end. Costs nothing if there is neither a backing file that they must hide nor
    /// preallocation.
    ///
    /// # Errors
    /// If there is no space or a write fails.
    pub fn zeroes(&mut self, guest: u64, len: u64) -> Result<()> {
        let size = self.geometry.cluster_size();
        match self.preallocation {
            Preallocation::Off if self.header.backing_name.is_none() => {
                self.advance(guest, len);
                Ok(())
            }
            Preallocation::Off if self.geometry.version() >= 3 => {
                let count = self.advance(guest, len);
                (0..count).try_for_each(|i| self.set_entry(guest + i * size, L2Entry::Zero))
            }
            // The data file was made to read as zeroes.
            Preallocation::Metadata | Preallocation::Full if self.data.is_some() => {
                let count = self.advance(guest, len);
                self.map(guest, guest, count)
            }
            Preallocation::Metadata => {
                let count = self.advance(guest, len);
                let host = self.take(count)?;
                if self.storage.len() > host {
                    let io = Error::io(&self.name, "data cluster");
                    self.storage.write_zeroes_at(host, count * size).map_err(io)?;
                }
                self.map(guest, host, count)
            }
            // A version 2 image knows no zero clusters.
            Preallocation::Off | Preallocation::Full => {
                let zeroes = vec![0; len.min((1 << 20).max(size)) as usize];
                let mut at = 0;
                while at < len {
                    let piece = (len - at).min(zeroes.len() as u64);
                    self.data(guest + at, &zeroes[..piece as usize])?;
                    at += piece;
                }
                Ok(())
            }
        }
    }

    /// Writes what is left: tables, then the header. The image is durable when this returns its
    /// length in bytes.
    ///
    /// # Errors
    /// If there is no space or a write fails; then there is no image.
    pub fn finish(mut self) -> Result<u64> {
        self.flush_pack()?;
        self.flush_l2()?;
        let l1: Vec<u8> = self.l1.iter().flat_map(|w| w.to_be_bytes()).collect();
        self.write_padded("L1 table", self.l1_offset, l1)?;
        self.l1 = Vec::new();
        let (table, clusters, end) = self.finish_refcounts()?;
        self.header.l1_table_offset = self.l1_offset;
        self.header.refcount_table_offset = table;
        self.header.refcount_table_clusters = clusters;
        let header = self.header.encode().map_err(|e| Error::field(&self.name, e))?;
        self.storage.set_len(end).map_err(Error::io(&self.name, "set length"))?;
        if let Some(data) = &mut self.data {
            data.flush().map_err(Error::io(&self.name, "data file"))?;
        }
        self.storage.flush().map_err(Error::io(&self.name, "flush"))?;
        self.write_padded("header", 0, header)?;
        self.storage.flush().map_err(Error::io(&self.name, "flush"))?;
        Ok(end)
    }

    /// Writes the refcount blocks that are left and the table: its offset, its clusters and the
    /// image's end.
    fn finish_refcounts(&mut self) -> Result<(u64, u32, u64)> {
        let g = self.geometry;
        let next = self.refcounts.next;
        let first = g.refcount_table_index(next);
        // The blocks and the table are counted, too; that may need further blocks.
        let (mut blocks, mut table) = (1, 1);
        loop {
            let last = g.refcount_table_index(next + blocks + table - 1);
            let need = (last + 1 - first, g.clusters_for((last + 1) * 8));
            if need == (blocks, table) {
                break;
            }
            (blocks, table) = need;
        }
        self.check_room(next + blocks + table)?;
        self.refcounts.take(blocks + table);
        let mut left = std::mem::take(&mut self.refcounts.complete);
        left.push((
            g.refcount_table_index(self.refcounts.next),
            std::mem::replace(&mut self.refcounts.block, RefcountBlock::new(&g)),
        ));
        for (i, (index, block)) in left.into_iter().take(blocks as usize).enumerate() {
            let offset = (next + i as u64) * g.cluster_size();
            self.refcounts.place(index, offset);
            self.write("refcount block", offset, block.bytes())?;
        }
        let offset = (next + blocks) * g.cluster_size();
        let words = self.refcounts.table.iter().flat_map(|w| w.to_be_bytes()).collect();
        let mut bytes: Vec<u8> = words;
        bytes.resize((table * g.cluster_size()) as usize, 0);
        self.write("refcount table", offset, &bytes)?;
        Ok((offset, table as u32, (next + blocks + table) * g.cluster_size()))
    }

    /// Notes that everything up to the end of this range is given; how many clusters it has.
    fn advance(&mut self, guest: u64, len: u64) -> u64 {
        debug_assert!(guest >= self.at && self.geometry.in_cluster(guest) == 0);
        let count = self.geometry.clusters_for(len);
        self.at = guest + count * self.geometry.cluster_size();
        count
    }

    /// Takes clusters side by side, and gives complete refcount blocks their places behind them.
    /// The first one's offset.
    fn take(&mut self, count: u64) -> Result<u64> {
        self.check_room(self.refcounts.next + count)?;
        let first = self.refcounts.take(count);
        while let Some((index, block)) = self.refcounts.complete.pop() {
            self.check_room(self.refcounts.next + 1)?;
            let offset = self.refcounts.take(1) << self.geometry.cluster_bits();
            self.refcounts.place(index, offset);
            self.write("refcount block", offset, block.bytes())?;
        }
        Ok(first << self.geometry.cluster_bits())
    }

    fn check_room(&self, clusters: u64) -> Result<()> {
        let size = self.geometry.cluster_size();
        let table = (self.geometry.refcount_table_index(clusters) + 1) * 8;
        if table.next_multiple_of(size) > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::refused(
                &self.name,
                format!(
                    "the new image has too many clusters of {size} bytes (its refcount table \
                     would be larger than 8 MiB); use larger ones"
                ),
            ));
        }
        let end = clusters.checked_mul(size);
        let most = self.storage.capacity().min(1 << HOST_OFFSET_BITS);
        if end.is_none_or(|end| end > most) {
            return Err(Error::refused(
                &self.name,
                format!("has room for {most} bytes, but the new image needs more"),
            ));
        }
        Ok(())
    }

    /// Maps guest clusters to host clusters that lie side by side.
    fn map(&mut self, guest: u64, host: u64, count: u64) -> Result<()> {
        let size = self.geometry.cluster_size();
        (0..count).try_for_each(|i| {
            let entry = L2Entry::Normal { host: host + i * size, copied: true };
            self.set_entry(guest + i * size, entry)
        })
    }

    fn set_entry(&mut self, guest: u64, entry: L2Entry) -> Result<()> {
        let index = self.geometry.l1_index(guest);
        if self.l2.as_ref().is_none_or(|(i, _)| *i != index) {
            self.flush_l2()?;
        }
        let g = self.geometry;
        let words = g.l2_entries() * g.l2_words();
        let (_, words) = self.l2.get_or_insert_with(|| (index, vec![0; words]));
        entry.encode(&g).put(words, g.l2_index(guest), &g);
        Ok(())
    }

    fn flush_l2(&mut self) -> Result<()> {
        let Some((index, words)) = self.l2.take() else { return Ok(()) };
        let offset = self.take(1)?;
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
        self.write("L2 table", offset, &bytes)?;
        self.l1[index as usize] = L1Entry { offset, copied: true }.encode();
        Ok(())
    }

    fn flush_pack(&mut self) -> Result<()> {
        let bytes = std::mem::take(&mut self.pack.bytes);
        if !bytes.is_empty() {
            self.write("compressed clusters", self.pack.start, &bytes)?;
        }
        self.pack.bytes = bytes;
        self.pack.bytes.clear();
        Ok(())
    }

    /// Writes bytes and zeroes up to the cluster's end.
    fn write_padded(&mut self, what: &'static str, offset: u64, mut bytes: Vec<u8>) -> Result<()> {
        let len = self.geometry.clusters_for(bytes.len() as u64) * self.geometry.cluster_size();
        bytes.resize(len as usize, 0);
        self.write(what, offset, &bytes)
    }

    fn write(&mut self, what: &'static str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.storage.write_at(offset, bytes).map_err(Error::io(&self.name, what))
    }
}
