//! The look at the whole image: references counted, compared with the refcounts on disk, flags
//! compared with refcounts.

use std::ops::Range;

use super::refs::{InUse, L2Ref};
use super::window::{WINDOW, Window};
use super::{Checker, Report};
use crate::format::{EntryError, Geometry, L1Entry, L2Entry, RawL2, RefcountBlock};
use crate::open::read_word_table;
use crate::{Error, Result};

/// What a look found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) check_errors: u64,
    pub(super) corruptions: u64,
    /// Those of the corruptions that are COPIED flags which contradict a refcount.
    pub(super) flags: u64,
    pub(super) leaks: u64,
    /// Whether the refcount structures cannot be repaired in place.
    pub(super) rebuild: bool,
    highest: Option<u64>,
    cluster_size: u64,
    total: u64,
    allocated: u64,
    fragmented: u64,
    compressed: u64,
    /// One bit a window: something in it is referred to.
    touched: u128,
}

impl Scan {
    pub(super) fn into_report(self, name: &str) -> Report {
        Report {
            filename: name.to_owned(),
            format: "qcow2",
            check_errors: self.check_errors,
            image_end_offset: self.highest.map_or(0, |c| (c + 1) * self.cluster_size),
            corruptions: self.corruptions,
            leaks: self.leaks,
            corruptions_fixed: 0,
            leaks_fixed: 0,
            total_clusters: self.total,
            allocated_clusters: self.allocated,
            fragmented_clusters: self.fragmented,
            compressed_clusters: self.compressed,
        }
    }
}

/// Where references are counted.
pub(super) struct Counting<'w> {
    pub(super) window: &'w mut Window,
    pub(super) scan: &'w mut Scan,
    /// Whether this is the first walk over the tables, which says what is wrong with entries.
    pub(super) first: bool,
    /// Whether COPIED flags are compared with the window's refcounts on disk.
    pub(super) flags: bool,
}

/// What an L2 entry refers to, however damaged it is.
pub(super) enum Target {
    Nothing,
    /// This range; the flag says whether it is compressed.
    Range(u64, u64, bool),
}

/// An L2 entry as check sees it: what it refers to, what is wrong with it, and what repair makes
/// of it.
pub(super) struct Judged {
    pub(super) target: Target,
    pub(super) wrong: Option<EntryError>,
    /// What repair puts in its place, where it can.
    pub(super) better: Option<RawL2>,
    /// Host cluster offset and COPIED flag of a valid standard entry.
    pub(super) copied: Option<(u64, bool)>,
}

/// Bit 63 of L1 and L2 entries.
pub(super) const COPIED: u64 = 1 << 63;

/// Looks at an L2 entry.
pub(super) fn judge(raw: RawL2, g: &Geometry) -> Judged {
    let nothing = |wrong, better| Judged { target: Target::Nothing, wrong, better, copied: None };
    // What the entry is without the fault counts as in use.
    let without = |why, raw: RawL2| {
        let judged = judge(raw, g);
        Judged { wrong: Some(why), better: Some(judged.better.unwrap_or(raw)), ..judged }
    };
    let RawL2 { word, bitmap } = raw;
    match L2Entry::decode(raw, g) {
        Ok(L2Entry::Compressed { host, len }) => Judged {
            target: Target::Range(host, u64::from(len), true),
            wrong: None,
            better: None,
            copied: None,
        },
        Ok(entry) => match entry.host_cluster() {
            None => nothing(None, None),
            Some((host, copied)) => Judged {
                target: Target::Range(host, g.cluster_size(), false),
                wrong: None,
                better: None,
                copied: Some((host, copied)),
            },
        },
        Err(e @ (EntryError::CompressedTooHigh(_) | EntryError::CompressedWithDataFile)) => {
            nothing(Some(e), None)
        }
        Err(e @ (EntryError::CopiedWithoutCluster | EntryError::CopiedCompressed)) => {
            without(e, RawL2 { word: word & !COPIED, bitmap })
        }
        Err(e @ EntryError::SubclustersCompressed(_)) => without(e, RawL2 { word, bitmap: 0 }),
        // Such subclusters cannot be read: they become zeroes, and the others stay.
        Err(e @ EntryError::Subclusters(_)) => {
            without(e, RawL2 { word, bitmap: bitmap & !(bitmap >> 32) })
        }
        Err(e @ EntryError::SubclustersWithoutCluster(_)) => {
            without(e, RawL2 { word, bitmap: (bitmap | bitmap << 32) & !u64::from(u32::MAX) })
        }
        Err(e @ EntryError::Reserved(bits)) => {
            // What the rest says still counts as in use; QEMU, too, leaves such entries alone.
            let judged = judge(RawL2 { word: word & !bits, bitmap }, g);
            Judged { wrong: Some(e), better: None, ..judged }
        }
        Err(e @ EntryError::Misaligned(host)) => {
            // A place kept for zeroes can be dropped without loss; data cannot.
            let data = match g.extended_l2() {
                true => bitmap as u32 != 0,
                false => word & 1 == 0 || g.version() < 3,
            };
            let zero = if g.extended_l2() { 0 } else { 1 };
            Judged {
                target: Target::Range(host, g.cluster_size(), false),
                wrong: Some(e),
                better: (!data).then_some(RawL2 { word: zero, bitmap }),
                copied: None,
            }
        }
    }
}

impl Checker<'_> {
    /// Looks at everything, changes nothing.
    pub(super) fn scan(mut self) -> Scan {
        let g = self.meta.geometry;
        let mut scan = Scan {
            corruptions: self.refs.corruptions,
            check_errors: self.refs.errors,
            rebuild: self.refs.rebuild,
            cluster_size: g.cluster_size(),
            total: g.guest_clusters(),
            ..Scan::default()
        };
        for (number, range) in self.windows().enumerate() {
            let first = number == 0;
            if !first && scan.touched & (1 << number) == 0 && !self.has_blocks(&range) {
                continue;
            }
            let mut window = Window::new(range);
            self.load_ones(&mut window, &mut scan);
            let into = Counting { window: &mut window, scan: &mut scan, first, flags: true };
            self.count(into, true);
            self.compare(&window, &mut scan);
        }
        scan
    }

    /// The ranges of clusters that are counted at a time. One cluster past the file's end is
    /// counted, too: the last sectors of a compressed cluster may lie there.
    pub(super) fn windows(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let end = self.clusters + 1;
        (0..end.div_ceil(WINDOW)).map(move |n| n * WINDOW..((n + 1) * WINDOW).min(end))
    }

    fn has_blocks(&self, range: &Range<u64>) -> bool {
        let bits = self.meta.geometry.refcount_block_bits();
        self.refs
            .refcount_blocks
            .iter()
            .any(|&(index, _)| range.contains(&(u64::from(index) << bits)))
    }

    /// The refcount blocks of a window: index of the first cluster and offset of the block.
    pub(super) fn blocks_of(&self, range: Range<u64>) -> Vec<(u64, u64)> {
        let bits = self.meta.geometry.refcount_block_bits();
        let blocks = self.refs.refcount_blocks.iter();
        blocks
            .map(|&(index, offset)| (u64::from(index) << bits, offset))
            .filter(|(first, _)| range.contains(first))
            .collect()
    }

    pub(super) fn read_block(&mut self, offset: u64, block: &mut RefcountBlock) -> Result<()> {
        self.storage
            .read_at(offset, block.bytes_mut())
            .map_err(Error::io(&self.meta.name, "refcount block"))
    }

    /// Counts a failed read, or passes other errors on.
    fn unreadable(&mut self, error: &Error, scan: &mut Scan) {
        self.say(&format!("ERROR {error}"));
        scan.check_errors += 1;
    }

    /// Notes which clusters have a refcount of exactly one on disk.
    pub(super) fn load_ones(&mut self, window: &mut Window, scan: &mut Scan) {
        let g = self.meta.geometry;
        let mut block = RefcountBlock::new(&g);
        for (first, offset) in self.blocks_of(window.range()) {
            if let Err(e) = self.read_block(offset, &mut block) {
                self.unreadable(&e, scan);
                continue;
            }
            if block.is_zero() {
                continue;
            }
            for index in 0..g.refcount_block_entries() {
                if block.get(index) == 1 {
                    window.set_one(first + index as u64);
                }
            }
        }
    }

    /// Counts all references into the window. With `refcounts`, the refcount structures count as
    /// in use.
    pub(super) fn count(&mut self, mut into: Counting<'_>, refcounts: bool) {
        let cluster = self.meta.geometry.cluster_size();
        for i in 0..self.refs.in_use.len() {
            let place = self.refs.in_use[i];
            self.add(&mut into, 1, place);
        }
        if refcounts {
            if let Some(place) = self.refs.refcount_table {
                self.add(&mut into, 1, place);
            }
            for i in 0..self.refs.refcount_blocks.len() {
                let (_, offset) = self.refs.refcount_blocks[i];
                let block = InUse { what: "refcount block", offset, len: cluster };
                self.add(&mut into, 1, block);
            }
        }
        for i in 0..self.refs.l2.len() {
            let table = self.refs.l2[i];
            let place = InUse { what: "L2 table", offset: table.offset, len: cluster };
            self.add(&mut into, table.times(), place);
        }
        for i in 0..self.refs.l2.len() {
            let table = self.refs.l2[i];
            match self.read_l2(&table) {
                Ok(Some(words)) => self.count_l2(&mut into, &table, &words),
                Ok(None) => {}
                // Counted in every window: a repair must not go on with references unknown.
                Err(e) => {
                    if into.first {
                        self.say(&format!("ERROR {e}"));
                    }
                    into.scan.check_errors += 1;
                }
            }
        }
        if into.flags {
            self.compare_l1_flags(into.window, into.scan);
        }
        if into.first && self.meta.geometry.data_file() {
            self.compare_places(into.scan);
        }
    }

    /// Compares where clusters are in an external data file with where they must be.
    fn compare_places(&mut self, scan: &mut Scan) {
        let g = self.meta.geometry;
        for l1_index in 0..self.meta.l1.len() {
            let Ok(entry) = L1Entry::decode(self.meta.l1[l1_index], &g) else { continue };
            let table = L2Ref { offset: entry.offset, active: 1, inactive: 0 };
            // What cannot be read was counted already.
            let words = if entry.offset == 0 { Ok(None) } else { self.read_l2(&table) };
            let Ok(Some(words)) = words else { continue };
            for (index, raw) in RawL2::all(&words, &g).enumerate() {
                let guest = (((l1_index as u64) << g.l2_bits()) + index as u64) << g.cluster_bits();
                if let Some((host, _)) = judge(raw, &g).copied
                    && host != guest
                {
                    self.say(&format!(
                        "ERROR L2 entry {index} of the table at offset {:#x} is {raw:#x}: in an \
                         external data file it must be at {guest:#x}",
                        table.offset
                    ));
                    scan.corruptions += 1;
                }
            }
        }
    }

    /// The words of a table; `None` if it lies past the file's end.
    pub(super) fn read_l2(&mut self, table: &L2Ref) -> Result<Option<Vec<u64>>> {
        if table.offset >= self.file_len {
            return Ok(None);
        }
        let len = self.meta.geometry.cluster_size();
        read_word_table(self.storage, &self.meta.name, "L2 table", table.offset, len).map(Some)
    }

    fn count_l2(&mut self, into: &mut Counting<'_>, table: &L2Ref, words: &[u64]) {
        let g = self.meta.geometry;
        let active = u64::from(table.active);
        let mut expected = None;
        for (index, raw) in RawL2::all(words, &g).enumerate() {
            if raw == RawL2::default() {
                continue;
            }
            let judged = judge(raw, &g);
            if into.first
                && let Some(why) = judged.wrong
            {
                self.say(&format!(
                    "ERROR L2 entry {index} of the table at offset {:#x} is {raw:#x}: {why}",
                    table.offset
                ));
                into.scan.corruptions += 1;
            }
            if let Target::Range(host, len, compressed) = judged.target {
                let what = if compressed { "compressed data" } else { "data cluster" };
                // Nothing in an external data file is counted.
                if !g.data_file() {
                    self.add(into, table.times(), InUse { what, offset: host, len });
                }
                if into.first {
                    into.scan.allocated += active;
                    if compressed {
                        into.scan.compressed += active;
                        into.scan.fragmented += active;
                    } else {
                        if expected.is_some_and(|e| e != host) {
                            into.scan.fragmented += active;
                        }
                        expected = Some(host + len);
                    }
                }
            }
            if into.flags
                && active > 0
                && let Some((host, copied)) = judged.copied
                && into.window.is_one_at(host, &g).is_some_and(|one| one != copied)
            {
                self.say(&format!(
                    "ERROR COPIED flag of L2 entry {index} of the table at offset {:#x} \
                     ({raw:#x}) contradicts the refcount of its cluster",
                    table.offset
                ));
                into.scan.corruptions += 1;
                into.scan.flags += 1;
            }
        }
    }

    /// Compares the COPIED flags of the active L1 table with the refcounts of its L2 tables.
    fn compare_l1_flags(&mut self, window: &Window, scan: &mut Scan) {
        let g = self.meta.geometry;
        for index in 0..self.meta.l1.len() {
            let raw = self.meta.l1[index];
            let Ok(L1Entry { offset, copied }) = L1Entry::decode(raw, &g) else { continue };
            if offset != 0 && window.is_one(g.cluster(offset)).is_some_and(|one| one != copied) {
                self.say(&format!(
                    "ERROR COPIED flag of L1 entry {index} ({raw:#x}) contradicts the refcount of \
                     its L2 table"
                ));
                scan.corruptions += 1;
                scan.flags += 1;
            }
        }
    }

    /// Adds references to all clusters that a range touches.
    fn add(&mut self, into: &mut Counting<'_>, times: u64, place: InUse) {
        let InUse { what, offset, len } = place;
        if len == 0 {
            return;
        }
        let g = self.meta.geometry;
        let end = offset.checked_add(len);
        // The end of the last cluster may be missing from the file, but no whole cluster.
        let most = self.file_len.saturating_add(g.cluster_size() - 1);
        let Some(end) = end.filter(|&e| e <= most) else {
            if into.first {
                self.say(&format!(
                    "ERROR {what} at offset {offset:#x} ({len} bytes) lies past the file's end at \
                     {:#x}",
                    self.file_len
                ));
                into.scan.corruptions += 1;
            }
            return;
        };
        for cluster in g.cluster(offset)..=g.cluster(end - 1) {
            if into.first {
                into.scan.touched |= 1 << (cluster / WINDOW);
            }
            into.window.add(cluster, times);
        }
    }

    /// Compares the counted references with the refcounts on disk.
    fn compare(&mut self, window: &Window, scan: &mut Scan) {
        let g = self.meta.geometry;
        let range = window.range();
        for i in 0..self.refs.refcount_blocks.len() {
            let (index, offset) = self.refs.refcount_blocks[i];
            let cluster = g.cluster(offset);
            if range.contains(&cluster) && window.get(cluster) != 1 {
                self.say(&format!(
                    "ERROR refcount block {index} at offset {offset:#x} is used {} times",
                    window.get(cluster)
                ));
                scan.corruptions += 1;
                scan.rebuild = true;
            }
        }
        let per_block = g.refcount_block_entries() as u64;
        let mut blocks = self.blocks_of(range.clone()).into_iter().peekable();
        let mut block = RefcountBlock::new(&g);
        let mut first = range.start;
        while first < range.end {
            let next = (first + per_block).min(range.end);
            let mut present = false;
            if let Some((_, offset)) = blocks.next_if(|&(at, _)| at == first) {
                // What the block says is not known then, so nothing is compared.
                if let Err(e) = self.read_block(offset, &mut block) {
                    self.unreadable(&e, scan);
                    first = next;
                    continue;
                }
                present = true;
            } else {
                block.bytes_mut().fill(0);
            }
            for cluster in first..next {
                let on_disk = block.get((cluster - first) as usize);
                let counted = window.get(cluster);
                if on_disk == 0 && counted == 0 {
                    continue;
                }
                // Past the file's end only what is referred to is of interest.
                if cluster >= self.clusters && counted == 0 {
                    continue;
                }
                scan.highest = scan.highest.max(Some(cluster));
                if on_disk != counted {
                    self.mismatch(scan, cluster, on_disk, counted, present);
                }
            }
            first = next;
        }
    }

    fn mismatch(
        &mut self,
        scan: &mut Scan,
        cluster: u64,
        on_disk: u64,
        counted: u64,
        present: bool,
    ) {
        let leak = on_disk > counted;
        self.say(&format!(
            "{} cluster {cluster}: refcount {on_disk}, references {counted}",
            if leak { "Leaked" } else { "ERROR" }
        ));
        if leak {
            scan.leaks += 1;
        } else {
            scan.corruptions += 1;
            scan.rebuild |= !present;
        }
    }
}
