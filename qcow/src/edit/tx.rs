//! [`Tx`]: a transaction on one image. See the module above for how it is ordered.

use block::Storage;

use super::bitmaps::Held;
use super::counts::{Counts, TablePlace};
use crate::format::{FieldError, Geometry, Header, L1Entry, L2Entry, RawL2};
use crate::open::{ImageMeta, MetadataSet, Mode, read_snapshots, read_word_table};
use crate::reader::Files;
use crate::{Error, Result};

/// Bytes of the header that one write replaces: the smallest sector.
pub(super) const SECTOR: usize = 512;

/// An L2 table in memory.
struct Table {
    l1_index: usize,
    words: Vec<u64>,
    dirty: bool,
}

/// Where something was, to be let go of.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Changes to an image that become visible together.
pub(super) struct Tx {
    /// Header, sizes and L1 table as they will be. Set fields freely; the tables' places are set
    /// by [`Tx::commit`].
    pub(super) meta: ImageMeta,
    pub(super) counts: Counts,
    table: Option<Table>,
    /// The L1 table as it is on disk.
    l1_was: Place,
    pub(super) l1_changed: bool,
    /// Leave the old L1 table where it is: a snapshot has it now.
    pub(super) keep_old_l1: bool,
    /// The snapshot table as it will be, if it changes.
    pub(super) snapshots: Option<(u32, Vec<u8>)>,
    snapshots_were: Place,
    /// Places of snapshots' L1 tables on disk.
    snapshot_l1: Vec<Place>,
    /// Bitmaps as they will be.
    pub(super) bitmaps: Held,
    /// Whether to move tables to the front afterwards: they went behind what is let go of.
    pub(super) compact: bool,
    /// The file's length before.
    len_was: u64,
}

impl Tx {
    /// Opens an image for a change. Whoever changes what a guest reads has bitmaps say so
    /// ([`Tx::mark`]).
    ///
    /// # Errors
    /// As opening for writing; if tables overlap.
    pub(super) fn open(st: &mut dyn Storage, name: &str) -> Result<Tx> {
        let meta = ImageMeta::open(st, name, Mode::Write)?;
        let header = &meta.header;
        let bitmaps = Held::read(st, name, header)?;
        let (snapshots, table_len) = read_snapshots(st, name, header)?;
        let mut snapshot_l1 = Vec::new();
        for s in &snapshots {
            let place = Place { offset: s.l1_table_offset, len: u64::from(s.l1_size) * 8 };
            super::table::check_l1(&meta, s, st.len())?;
            snapshot_l1.push(place);
        }
        let snapshots_were = Place { offset: header.snapshots_offset, len: table_len };
        let metadata = metadata(&meta, &bitmaps, snapshots_were, &snapshot_l1)?;
        super::tree::check_l1_words(&meta, &meta.l1)?;
        Ok(Tx {
            counts: Counts::new(&meta, metadata),
            table: None,
            l1_was: Place { offset: header.l1_table_offset, len: u64::from(header.l1_size) * 8 },
            l1_changed: false,
            keep_old_l1: false,
            snapshots: None,
            snapshots_were,
            snapshot_l1,
            bitmaps,
            compact: false,
            len_was: st.len(),
            meta,
        })
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.meta.geometry
    }

    pub(super) fn refused(&self, reason: impl Into<String>) -> Error {
        Error::refused(&self.meta.name, reason)
    }

    pub(super) fn io(&self, what: &'static str) -> impl FnOnce(block::StorageError) -> Error + '_ {
        Error::io(&self.meta.name, what)
    }

    /// Takes a new cluster; its offset.
    pub(super) fn take(&mut self, st: &mut dyn Storage, bytes: u64) -> Result<u64> {
        let g = self.geometry();
        Ok(self.counts.take(st, g.clusters_for(bytes))? << g.cluster_bits())
    }

    /// Lets go of a place.
    pub(super) fn free(&mut self, st: &mut dyn Storage, place: Place) -> Result<()> {
        let g = self.geometry();
        let first = g.cluster(place.offset);
        (0..g.clusters_for(place.len)).try_for_each(|i| self.counts.lower(st, first + i))
    }

    /// Checks that a cluster lies inside the file.
    pub(super) fn inside(&self, st: &dyn Storage, what: &str, offset: u64, len: u64) -> Result<()> {
        let end = self.meta.host_end(st);
        match offset.checked_add(len) {
            Some(e) if e <= end => Ok(()),
            _ => Err(Error::field(
                &self.meta.name,
                FieldError::new(
                    what,
                    offset,
                    format!("{len} bytes long"),
                    format!("it must end inside the file, at or before {end:#x}"),
                ),
            )),
        }
    }

    /// Decodes an L1 entry.
    pub(super) fn l1_entry(&self, raw: u64) -> Result<L1Entry> {
        L1Entry::decode(raw, &self.meta.geometry)
            .map_err(|e| self.refused(format!("an L1 entry is {raw:#x}: {e}; repair it first")))
    }

    /// Decodes an L2 entry.
    pub(super) fn l2_entry(&self, raw: RawL2) -> Result<L2Entry> {
        L2Entry::decode(raw, &self.meta.geometry)
            .map_err(|e| self.refused(format!("an L2 entry is {raw:#x}: {e}; repair it first")))
    }

    /// Reads an L2 table.
    pub(super) fn read_l2(&self, st: &mut dyn Storage, offset: u64) -> Result<Vec<u64>> {
        let len = self.geometry().cluster_size();
        self.inside(st, "L2 table", offset, len)?;
        read_word_table(st, &self.meta.name, "L2 table", offset, len)
    }

    /// Has the L2 table below an entry of the active L1 table in memory; `None` if there is none
    /// and `make` is not set.
    fn load(
        &mut self,
        st: &mut dyn Storage,
        l1_index: usize,
        make: bool,
    ) -> Result<Option<&mut Table>> {
        if self.table.as_ref().is_none_or(|t| t.l1_index != l1_index) {
            self.put_table(st)?;
            let entry = self.l1_entry(self.meta.l1[l1_index])?;
            let words = match entry.offset {
                0 if !make => return Ok(None),
                0 => vec![0; self.geometry().l2_entries() * self.geometry().l2_words()],
                offset => self.read_l2(st, offset)?,
            };
            self.table = Some(Table { l1_index, words, dirty: false });
        }
        Ok(self.table.as_mut())
    }

    /// Writes the L2 table that is in memory, if it changed, to a place that the image on disk
    /// does not use.
    pub(super) fn put_table(&mut self, st: &mut dyn Storage) -> Result<()> {
        let Some(table) = self.table.take().filter(|t| t.dirty) else { return Ok(()) };
        let g = self.geometry();
        let old = self.l1_entry(self.meta.l1[table.l1_index])?.offset;
        let mut offset = old;
        if old == 0 || !self.counts.was_free(st, g.cluster(old))? {
            offset = self.take(st, g.cluster_size())?;
            if old != 0 {
                self.counts.lower(st, g.cluster(old))?;
            }
            self.set_l1(table.l1_index, L1Entry { offset, copied: true });
        }
        super::write_words(st, &self.meta.name, "L2 table", offset, g.cluster_size(), &table.words)
    }

    /// Forgets the L2 table that is in memory, changed or not.
    pub(super) fn forget_table(&mut self) {
        self.table = None;
    }

    /// Sets an entry of the active L1 table.
    pub(super) fn set_l1(&mut self, index: usize, entry: L1Entry) {
        let raw = entry.encode();
        self.l1_changed |= self.meta.l1[index] != raw;
        self.meta.l1[index] = raw;
    }

    /// The words of the L2 table below an entry of the active L1 table.
    pub(super) fn words(
        &mut self,
        st: &mut dyn Storage,
        l1_index: usize,
    ) -> Result<Option<&[u64]>> {
        Ok(self.load(st, l1_index, false)?.map(|t| t.words.as_slice()))
    }

    /// The entry that maps this guest offset.
    pub(super) fn entry(&mut self, st: &mut dyn Storage, guest: u64) -> Result<L2Entry> {
        let g = self.geometry();
        let index = g.l1_index(guest) as usize;
        if index >= self.meta.l1.len() {
            return Ok(L2Entry::Unallocated);
        }
        let raw = self.load(st, index, false)?.map(|t| RawL2::of(&t.words, g.l2_index(guest), &g));
        let entry = self.l2_entry(raw.unwrap_or_default())?;
        if g.data_file() && entry.host_cluster().is_some_and(|(h, _)| h != g.cluster_start(guest)) {
            return Err(self.refused(format!(
                "offset {guest:#x} is not at its place in the external data file; repair it first"
            )));
        }
        Ok(entry)
    }

    /// Sets an entry of the L2 table below an entry of the active L1 table.
    pub(super) fn set_raw(
        &mut self,
        st: &mut dyn Storage,
        l1_index: usize,
        index: usize,
        raw: RawL2,
    ) -> Result<()> {
        let g = self.geometry();
        if let Some(table) = self.load(st, l1_index, true)? {
            table.dirty |= RawL2::of(&table.words, index, &g) != raw;
            raw.put(&mut table.words, index, &g);
        }
        Ok(())
    }

    /// Maps a guest cluster anew; what it was mapped to is let go of, unless it stays there.
    pub(super) fn set_entry(
        &mut self,
        st: &mut dyn Storage,
        guest: u64,
        entry: L2Entry,
    ) -> Result<()> {
        let old = self.entry(st, guest)?;
        self.change_entry(st, guest, entry)?;
        // Where it lies: the COPIED flag may have been wrong.
        let place = |e: L2Entry| e.host_cluster().map(|(host, _)| host);
        if place(entry).is_some() && place(entry) == place(old) {
            return Ok(());
        }
        self.lower_entry(st, old)
    }

    /// Replaces the entry of a guest cluster; its references stay what they are.
    fn change_entry(&mut self, st: &mut dyn Storage, guest: u64, entry: L2Entry) -> Result<()> {
        let g = self.geometry();
        self.set_raw(st, g.l1_index(guest) as usize, g.l2_index(guest), entry.encode(&g))
    }

    /// Lets go of what an L2 entry refers to.
    pub(super) fn lower_entry(&mut self, st: &mut dyn Storage, entry: L2Entry) -> Result<()> {
        let moved = self.counts.flags_moved;
        for cluster in self.clusters_of(entry) {
            self.counts.lower(st, cluster)?;
        }
        if let L2Entry::Compressed { .. } = entry {
            // Compressed clusters share a host cluster without flags that could be wrong.
            self.counts.flags_moved = moved;
        }
        Ok(())
    }

    /// The host clusters that an L2 entry refers to: none in an external data file.
    pub(super) fn clusters_of(&self, entry: L2Entry) -> std::ops::Range<u64> {
        let g = self.geometry();
        match (entry, entry.host_cluster()) {
            _ if g.data_file() => 0..0,
            (L2Entry::Compressed { host, len }, _) => {
                g.cluster(host)..g.cluster(host + u64::from(len) - 1) + 1
            }
            (_, Some((host, _))) => g.cluster(host)..g.cluster(host) + 1,
            (_, None) => 0..0,
        }
    }

    /// Makes the new state the image's, durably, and cuts the file where it ends. The transaction
    /// can go on with further changes.
    ///
    /// # Errors
    /// If there is no room, a count is impossible, or a write fails.
    pub(super) fn commit(&mut self, st: &mut dyn Storage) -> Result<()> {
        self.commit_watched(st, &mut || Ok(()))
    }

    /// The same; `switched` is called when the image is the new one, before anything that the old
    /// one had is used again or given back: somebody may still be reading there.
    ///
    /// # Errors
    /// Also what `switched` says; the image is the new one then, and nothing is given back.
    pub(super) fn commit_watched(
        &mut self,
        st: &mut dyn Storage,
        switched: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        self.put_table(st)?;
        if self.counts.flags_moved {
            self.fix_flags(st)?;
            self.put_table(st)?;
        }
        let g = self.geometry();
        if self.l1_changed || self.keep_old_l1 {
            let len = self.meta.l1.len() as u64 * 8;
            let offset = if len == 0 { 0 } else { self.take(st, len)? };
            let padded = g.clusters_for(len) << g.cluster_bits();
            super::write_words(st, &self.meta.name, "L1 table", offset, padded, &self.meta.l1)?;
            if !self.keep_old_l1 {
                self.free(st, self.l1_was)?;
            }
            self.meta.header.l1_table_offset = offset;
            self.meta.header.l1_size = self.meta.l1.len() as u32;
        }
        if let Some((count, bytes)) = self.snapshots.take() {
            self.put_snapshots(st, count, bytes)?;
        }
        let relaid = self.put_bitmaps(st)?;
        let header = &self.meta.header;
        let old = TablePlace {
            offset: header.refcount_table_offset,
            clusters: header.refcount_table_clusters,
        };
        let counted = self.counts.finish(st, old)?;
        if let Some(new) = counted {
            self.meta.header.refcount_table_offset = new.offset;
            self.meta.header.refcount_table_clusters = new.clusters;
            self.meta.refcount_table = self.counts.table();
        }
        let first = if relaid { Some(self.lay_out_header(st)?) } else { None };
        st.flush().map_err(self.io("flush"))?;
        // From here on what was added may be the image, whatever fails.
        self.len_was = u64::MAX;
        self.write_header(st, first)?;
        st.flush().map_err(self.io("flush"))?;
        switched()?;
        self.committed(st, counted.is_some())?;
        if relaid { self.restore_names(st) } else { Ok(()) }
    }

    /// Makes data in an external data file durable: to be called before what refers to it.
    pub(super) fn flush_data(&self, files: &mut Files<'_>) -> Result<()> {
        match &mut files.data {
            Some(data) => data.flush().map_err(self.io("data file")),
            None => Ok(()),
        }
    }

    fn put_snapshots(
        &mut self,
        st: &mut dyn Storage,
        count: u32,
        mut bytes: Vec<u8>,
    ) -> Result<()> {
        let g = self.geometry();
        let len = bytes.len() as u64;
        let mut offset = 0;
        if len > 0 {
            offset = self.take(st, len)?;
            bytes.resize((g.clusters_for(len) << g.cluster_bits()) as usize, 0);
            st.write_at(offset, &bytes).map_err(self.io("snapshot table"))?;
        }
        self.free(st, self.snapshots_were)?;
        self.snapshots_were = Place { offset, len };
        self.meta.header.nb_snapshots = count;
        self.meta.header.snapshots_offset = offset;
        Ok(())
    }

    /// Writes the fields that a transaction changes: all of them stand in the first sector.
    /// `sector`: the sector as it was laid out anew.
    fn write_header(&self, st: &mut dyn Storage, sector: Option<[u8; SECTOR]>) -> Result<()> {
        let sector = match sector {
            Some(sector) => sector,
            None => {
                let mut sector = [0; SECTOR];
                st.read_at(0, &mut sector).map_err(self.io("header"))?;
                put_fields(&mut sector, &self.meta.header);
                sector
            }
        };
        st.write_at(0, &sector).map_err(self.io("header"))
    }

    /// After the header was written: what was new is now the image.
    fn committed(&mut self, st: &mut dyn Storage, counted: bool) -> Result<()> {
        let header = &self.meta.header;
        self.l1_was = Place { offset: header.l1_table_offset, len: u64::from(header.l1_size) * 8 };
        self.l1_changed = false;
        self.keep_old_l1 = false;
        let (snapshots, _) = read_snapshots(st, &self.meta.name, header)?;
        self.snapshot_l1 = snapshots
            .iter()
            .map(|s| Place { offset: s.l1_table_offset, len: u64::from(s.l1_size) * 8 })
            .collect();
        let metadata = metadata(&self.meta, &self.bitmaps, self.snapshots_were, &self.snapshot_l1)?;
        if counted {
            let end = self.counts.end(st)?;
            if st.len() > end {
                st.set_len(end).map_err(self.io("set length"))?;
            }
            self.counts.discard_freed(st)?;
        }
        self.counts.committed(metadata);
        self.len_was = st.len();
        Ok(())
    }

    /// Moves tables that lie further behind than the image is long, so that the file can be cut.
    fn move_to_front(&mut self, st: &mut dyn Storage) -> Result<()> {
        let g = self.geometry();
        let used = self.counts.used(st)?;
        let end = g.cluster(self.counts.end(st)?);
        if end - used <= end / 8 {
            return Ok(());
        }
        let behind = |offset: u64| g.cluster(offset) >= used;
        for index in 0..self.meta.l1.len() {
            if behind(self.l1_entry(self.meta.l1[index])?.offset)
                && let Some(table) = self.load(st, index, false)?
            {
                table.dirty = true;
                self.put_table(st)?;
            }
        }
        self.l1_changed |= behind(self.l1_was.offset);
        if behind(self.snapshots_were.offset) {
            let Place { offset, len } = self.snapshots_were;
            let mut bytes = vec![0; len as usize];
            st.read_at(offset, &mut bytes).map_err(self.io("snapshot table"))?;
            self.snapshots = Some((self.meta.header.nb_snapshots, bytes));
        }
        self.counts.move_blocks(st, used)?;
        self.commit(st)
    }

    /// After a failure: the file gets its old length back, since nothing in it refers to what was
    /// written behind that.
    pub(super) fn abort(self, st: &mut dyn Storage) {
        if st.len() > self.len_was
            && let Err(e) = st.set_len(self.len_was)
        {
            log::warn!("{}: cannot be cut to its old length again: {e}", self.meta.name);
        }
    }
}

/// Opens a transaction, runs it and commits; what came of it, and the image as it is now. After a
/// failure it is as it was.
pub(super) fn run<T>(
    st: &mut dyn Storage,
    name: &str,
    change: impl FnOnce(&mut Tx, &mut dyn Storage) -> Result<T>,
) -> Result<(T, ImageMeta)> {
    let mut files = Files { image: st, data: None };
    run_files(&mut files, name, |tx, files| change(tx, files.image))
}

/// As [`run`], for changes that move guests' data, too.
pub(super) fn run_files<T>(
    files: &mut Files<'_>,
    name: &str,
    change: impl FnOnce(&mut Tx, &mut Files<'_>) -> Result<T>,
) -> Result<(T, ImageMeta)> {
    let mut tx = Tx::open(files.image, name)?;
    let changed = change(&mut tx, files).and_then(|t| tx.flush_data(files).map(|()| t));
    match changed.and_then(|t| tx.commit(files.image).map(|()| t)) {
        Ok(t) => {
            if tx.compact
                && let Err(e) = tx.move_to_front(files.image)
            {
                log::warn!("{name}: is fine, but longer than it must be: {e}");
                tx.abort(files.image);
                return Ok((t, ImageMeta::open(files.image, name, Mode::Write)?));
            }
            Ok((t, tx.meta))
        }
        Err(e) => {
            tx.abort(files.image);
            Err(e)
        }
    }
}

/// Puts the fields that a transaction may change into a header's first sector.
fn put_fields(sector: &mut [u8; SECTOR], h: &Header) {
    let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
    put(24, &h.size.to_be_bytes());
    put(36, &h.l1_size.to_be_bytes());
    put(40, &h.l1_table_offset.to_be_bytes());
    put(48, &h.refcount_table_offset.to_be_bytes());
    put(56, &h.refcount_table_clusters.to_be_bytes());
    put(60, &h.nb_snapshots.to_be_bytes());
    put(64, &h.snapshots_offset.to_be_bytes());
    if h.version >= 3 {
        put(72, &h.incompatible_features.to_be_bytes());
        put(80, &h.compatible_features.to_be_bytes());
        put(88, &h.autoclear_features.to_be_bytes());
    }
}

/// Where the image's metadata lies, bitmaps and snapshots' tables included.
fn metadata(
    meta: &ImageMeta,
    bitmaps: &Held,
    snapshots: Place,
    l1: &[Place],
) -> Result<MetadataSet> {
    let mut places: Vec<(u64, u64)> =
        l1.iter().chain([&snapshots]).map(|p| (p.offset, p.len)).collect();
    places.extend(bitmaps.places(&meta.header));
    let mut set = MetadataSet::new(meta)?;
    match set.add(&meta.geometry, &places) {
        true => Ok(set),
        false => Err(Error::refused(
            &meta.name,
            "tables of its snapshots or its bitmaps lie over each other or over other tables; it \
             must be repaired first",
        )),
    }
}
