//! [`Refs`]: who refers to which clusters, except for the contents of L2 tables.

use block::Storage;

use crate::Error;
use crate::bitmaps::Bitmaps;
use crate::format::{EntryError, Geometry, L1Entry, MAX_L1_BYTES, autoclear};
use crate::format::{Header, Snapshot, decode_refcount_table_entry};
use crate::open::{ImageMeta, read_snapshots, read_word_table};

/// A range of the file that is in use.
#[derive(Clone, Copy, Debug)]
pub(super) struct InUse {
    pub(super) what: &'static str,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// An L2 table, and how often L1 tables name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct L2Ref {
    /// As it stands in the entry, so perhaps not aligned.
    pub(super) offset: u64,
    /// By the active L1 table.
    pub(super) active: u32,
    /// By snapshots' L1 tables.
    pub(super) inactive: u32,
}

impl L2Ref {
    /// How often, all in all.
    pub(super) fn times(&self) -> u64 {
        u64::from(self.active) + u64::from(self.inactive)
    }
}

/// Who refers to which clusters.
#[derive(Debug, Default)]
pub(super) struct Refs {
    /// Header, tables, bitmaps.
    pub(super) in_use: Vec<InUse>,
    /// The refcount table, if it can be used.
    pub(super) refcount_table: Option<InUse>,
    /// Refcount blocks: index in the table and offset.
    pub(super) refcount_blocks: Vec<(u32, u64)>,
    /// L2 tables by offset, each once.
    pub(super) l2: Vec<L2Ref>,
    /// Contradictions found while collecting.
    pub(super) corruptions: u64,
    /// What could not be read.
    pub(super) errors: u64,
    /// Whether the refcount table or an entry of it cannot be used.
    pub(super) rebuild: bool,
}

/// The offset bits of an L1 entry, whatever else is wrong with it.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Refs {
    /// Reads the first-level tables. What cannot be read is counted.
    pub(super) fn collect(
        storage: &mut dyn Storage,
        meta: &ImageMeta,
        log: &mut dyn FnMut(&str),
    ) -> Refs {
        let mut c = Collector { refs: Refs::default(), meta, log };
        let g = &meta.geometry;
        let h = &meta.header;
        c.add("header", 0, g.cluster_size());
        if h.l1_size > 0 {
            c.add("L1 table", h.l1_table_offset, u64::from(h.l1_size) * 8);
        }
        c.l1_entries(&meta.l1, true);
        c.snapshots(storage, h);
        c.bitmaps(storage);
        c.refcounts(storage.len());
        c.finish_l2();
        c.refs
    }
}

struct Collector<'a> {
    refs: Refs,
    meta: &'a ImageMeta,
    log: &'a mut dyn FnMut(&str),
}

impl Collector<'_> {
    fn geometry(&self) -> Geometry {
        self.meta.geometry
    }

    fn add(&mut self, what: &'static str, offset: u64, len: u64) {
        self.refs.in_use.push(InUse { what, offset, len });
    }

    fn corrupt(&mut self, text: &str) {
        (self.log)(&format!("ERROR {text}"));
        self.refs.corruptions += 1;
    }

    /// Counts a failed look: a bad field as corruption, a failed read as error.
    fn failed(&mut self, error: &Error) {
        match error {
            Error::Io { .. } => {
                (self.log)(&format!("ERROR {error}"));
            }
            _ => self.corrupt(&error.to_string()),
        }
        // Either way references are unknown now, so nothing may be called a leak.
        self.refs.errors += 1;
    }

    fn l1_entries(&mut self, words: &[u64], active: bool) {
        let g = self.geometry();
        // A hostile table may have 4 million entries: take the memory once, not by doubling.
        self.refs.l2.reserve_exact(words.iter().filter(|&&w| w != 0).count());
        let (active, inactive) = (u32::from(active), u32::from(!active));
        for (index, &raw) in words.iter().enumerate() {
            if raw == 0 {
                continue;
            }
            if let Err(why) = L1Entry::decode(raw, &g) {
                self.corrupt(&format!("L1 entry {index} is {raw:#x}: {why}"));
                if why == EntryError::CopiedWithoutCluster {
                    continue;
                }
            }
            if raw & L1_OFFSET != 0 {
                self.refs.l2.push(L2Ref { offset: raw & L1_OFFSET, active, inactive });
            }
        }
    }

    fn snapshots(&mut self, storage: &mut dyn Storage, header: &Header) {
        if header.nb_snapshots == 0 {
            return;
        }
        let name = &self.meta.name;
        let (snapshots, len) = match read_snapshots(storage, name, header) {
            Ok(found) => found,
            Err(e) => return self.failed(&e),
        };
        self.add("snapshot table", header.snapshots_offset, len);
        // Tables of a valid image do not share clusters, so together they fit the file. This
        // bounds the work that a small hostile file can ask for.
        let mut left = storage.len();
        for snapshot in &snapshots {
            let bytes = u64::from(snapshot.l1_size) * 8;
            if let Err(why) = self.snapshot_fits(snapshot, bytes, &mut left, storage.len()) {
                let Snapshot { id, name, .. } = snapshot;
                self.corrupt(&format!("snapshot {id} ({name:?}): its L1 table {why}"));
                self.refs.errors += 1;
                continue;
            }
            if bytes == 0 {
                continue;
            }
            self.add("snapshot's L1 table", snapshot.l1_table_offset, bytes);
            match read_word_table(
                storage,
                name,
                "snapshot's L1 table",
                snapshot.l1_table_offset,
                bytes,
            ) {
                Ok(words) => self.l1_entries(&words, false),
                Err(e) => self.failed(&e),
            }
        }
    }

    fn snapshot_fits(
        &self,
        snapshot: &Snapshot,
        bytes: u64,
        left: &mut u64,
        file_len: u64,
    ) -> Result<(), String> {
        let g = self.geometry();
        let offset = snapshot.l1_table_offset;
        if g.in_cluster(offset) != 0 {
            return Err(format!("at offset {offset:#x} is not aligned to a cluster"));
        }
        if bytes > MAX_L1_BYTES {
            return Err(format!("is {bytes} bytes long; at most {MAX_L1_BYTES} are possible"));
        }
        let end = g.round_up(file_len).unwrap_or(u64::MAX);
        if offset.checked_add(bytes).is_none_or(|e| e > end) {
            return Err(format!("at offset {offset:#x} lies past the file's end"));
        }
        *left = left.checked_sub(bytes).ok_or("and those of others do not fit the file")?;
        Ok(())
    }

    /// Bitmaps count only while their autoclear bit vouches for them; without it their clusters
    /// are leaks (as in QEMU).
    fn bitmaps(&mut self, storage: &mut dyn Storage) {
        let header = &self.meta.header;
        if header.autoclear_features & autoclear::BITMAPS == 0 {
            return;
        }
        if header.bitmaps().is_none() {
            return self.corrupt("the bitmaps feature bit is set without a bitmaps extension");
        }
        match Bitmaps::read(storage, &self.meta.name, header) {
            Ok(bitmaps) => {
                for (offset, len) in bitmaps.places(header) {
                    self.add("bitmap", offset, len);
                }
            }
            Err(e) => self.failed(&e),
        }
    }

    fn refcounts(&mut self, file_len: u64) {
        let g = self.geometry();
        let h = &self.meta.header;
        if let Some(why) = &self.meta.refcount_table_error {
            self.corrupt(&why.to_string());
            self.refs.rebuild = true;
            return;
        }
        let len = u64::from(h.refcount_table_clusters) << g.cluster_bits();
        let place = InUse { what: "refcount table", offset: h.refcount_table_offset, len };
        self.refs.refcount_table = Some(place);
        for (index, &raw) in self.meta.refcount_table.iter().enumerate() {
            let why = match decode_refcount_table_entry(raw, &g) {
                Ok(0) => continue,
                Ok(offset) if offset < file_len => {
                    self.refs.refcount_blocks.push((index as u32, offset));
                    continue;
                }
                Ok(_) => "it lies past the file's end".to_owned(),
                Err(e) => e.to_string(),
            };
            self.corrupt(&format!("refcount table entry {index} is {raw:#x}: {why}"));
            self.refs.rebuild = true;
        }
    }

    /// Sorts the L2 tables and merges those that are named more than once.
    fn finish_l2(&mut self) {
        let l2 = &mut self.refs.l2;
        l2.sort_unstable_by_key(|t| t.offset);
        l2.dedup_by(|next, kept| {
            let same = next.offset == kept.offset;
            if same {
                kept.active = kept.active.saturating_add(next.active);
                kept.inactive = kept.inactive.saturating_add(next.inactive);
            }
            same
        });
    }
}
