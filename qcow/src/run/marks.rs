//! [`Marks`]: persistent bitmaps that record what guests write.
//!
//! A unit's word in the map has a flag while some bitmap lacks a bit for it: so a write to it does
//! not go straight down, and its task comes here first. Where all bits are there, no instruction is
//! spent on bitmaps. Before the data of a write goes to the disk it must be sure that no crash leaves
//! a bitmap that is trusted and lacks the bit. Two ways ([`super::Options::durable_bitmaps`]):
//!
//! - the bitmap is marked in use on disk, once, before the first bit that is not on disk; so after
//!   a crash it is not trusted. Bits go to disk at the close, or when there are too many in memory;
//! - or the bits go to disk before the data, those of all writes that wait together; so after a
//!   crash it can be trusted: it has at least the bits that it must have.

use std::collections::{BTreeMap, BTreeSet};

use block::{Flags, Status};

use super::read::check;
use super::shared::{Key, META, Shared};
use crate::bitmaps::{Tracked, all_set, fill};
use crate::format::BitmapEntry;
use crate::map::{Kind, Word};

/// Bytes of bits in memory at most; there are two copies of each.
const BYTES_MAX: usize = 8 << 20;

/// Pages that one task looks at before others have their turn.
const STRIDE: u32 = 64;

/// Which part of which bitmap: their numbers.
pub(super) type PageKey = (u32, u32);

/// A part of a bitmap's bits.
struct Page {
    now: Vec<u8>,
    /// What no crash takes away.
    disk: Vec<u8>,
}

/// What the disk says of the bitmaps.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Said {
    /// That they are saved.
    Saved,
    /// The one or the other: a write of the flags failed, or is under way.
    Either,
    /// That they are in use.
    InUse,
}

/// See the module's text.
pub(super) struct Marks {
    bitmaps: Vec<Tracked>,
    durable: bool,
    /// log2 of the bytes of a page.
    page_bits: u32,
    cluster_bits: u32,
    pages: BTreeMap<PageKey, Page>,
    /// Those with bits that are not on disk for sure.
    dirty: BTreeSet<PageKey>,
    loading: BTreeSet<PageKey>,
    /// Bits or flags are being written.
    writing: bool,
    said: Said,
}

impl Marks {
    pub(super) fn new(bitmaps: Vec<Tracked>, cluster_bits: u32, durable: bool) -> Marks {
        Marks {
            bitmaps,
            durable,
            page_bits: cluster_bits.min(META.trailing_zeros()),
            cluster_bits,
            pages: BTreeMap::new(),
            dirty: BTreeSet::new(),
            loading: BTreeSet::new(),
            writing: false,
            said: Said::Saved,
        }
    }

    /// Whether there is anything to record.
    pub(super) fn is_active(&self) -> bool {
        !self.bitmaps.is_empty()
    }

    pub(super) fn is_durable(&self) -> bool {
        self.durable
    }

    /// log2 of the bits in a page.
    fn bits_shift(&self) -> u32 {
        self.page_bits + 3
    }

    /// Where a page stands on disk.
    fn place(&self, key: PageKey) -> Option<u64> {
        let at = u64::from(key.1) << self.page_bits;
        let cluster =
            self.bitmaps.get(key.0 as usize)?.clusters.get((at >> self.cluster_bits) as usize)?;
        Some(cluster + (at & ((1 << self.cluster_bits) - 1)))
    }

    /// Whether bits `[from, to)` of a page, which lie in it, are set such that no crash can make
    /// them look clear.
    fn is_covered(&self, key: PageKey, from: u64, to: u64) -> bool {
        let Some(page) = self.pages.get(&key) else { return false };
        all_set(if self.said == Said::InUse { &page.now } else { &page.disk }, from, to)
    }

    /// Sets bits of a page that is loaded; whether it is.
    fn set(&mut self, key: PageKey, from: u64, to: u64) -> bool {
        let Some(page) = self.pages.get_mut(&key) else { return false };
        if fill(&mut page.now, from, to, true) {
            self.dirty.insert(key);
        }
        true
    }

    /// Whether all bitmaps have all bits of a range, which lies in one cluster, for sure.
    fn covers(&self, offset: u64, len: u64) -> bool {
        let shift = self.bits_shift();
        self.bitmaps.iter().enumerate().all(|(i, b)| {
            let (first, last) =
                (offset >> b.granularity_bits, (offset + len - 1) >> b.granularity_bits);
            let page = first >> shift;
            let base = page << shift;
            // Bits of a cluster lie in one page: a cluster has at most 8 of them a sector.
            last >> shift == page
                && self.is_covered((i as u32, page as u32), first - base, last + 1 - base)
        })
    }

    fn dirty_pages(&self) -> Vec<(PageKey, u64, Vec<u8>)> {
        let one = |&key| Some((key, self.place(key)?, self.pages.get(&key)?.now.clone()));
        self.dirty.iter().filter_map(one).collect()
    }

    /// These bits of a page are on disk for sure.
    fn wrote(&mut self, key: PageKey, bytes: Vec<u8>) {
        let Some(page) = self.pages.get_mut(&key) else { return };
        page.disk = bytes;
        // Others may have been set meanwhile.
        if page.disk == page.now {
            self.dirty.remove(&key);
        }
    }

    /// Makes room for a page by forgetting others, if that is possible.
    fn make_room(&mut self) -> bool {
        let most = BYTES_MAX >> self.page_bits;
        if self.pages.len() >= most {
            let dirty = &self.dirty;
            self.pages.retain(|key, _| dirty.contains(key));
        }
        self.pages.len() < most
    }
}

impl Shared {
    /// Records in all bitmaps that `[offset, offset + len)` of the disk is going to change. When this
    /// returns, it may.
    pub(super) async fn mark(&self, slot: u16, offset: u64, len: u64) -> Result<(), Status> {
        let count = self.marks.borrow().bitmaps.len();
        let shift = self.marks.borrow().bits_shift();
        for i in 0..count {
            let granularity = self.marks.borrow().bitmaps[i].granularity_bits;
            let (first, end) = (offset >> granularity, ((offset + len - 1) >> granularity) + 1);
            let mut bit = first;
            let mut looked = 0;
            while bit < end {
                looked += 1;
                if looked % STRIDE == 0 {
                    self.pause(slot).await;
                }
                let page = bit >> shift;
                let base = page << shift;
                let to = end.min(base + (1 << shift));
                self.mark_page(slot, (i as u32, page as u32), bit - base, to - base).await?;
                bit = to;
            }
        }
        self.unflag(offset, len);
        Ok(())
    }

    /// Sets bits of one page, and waits until that is sure.
    async fn mark_page(&self, slot: u16, key: PageKey, from: u64, to: u64) -> Result<(), Status> {
        loop {
            self.bit_page(slot, key).await?;
            {
                let mut marks = self.marks.borrow_mut();
                if marks.is_covered(key, from, to) {
                    return Ok(());
                }
                if !marks.set(key, from, to) {
                    continue;
                }
                if marks.said == Said::InUse {
                    return Ok(());
                }
            }
            self.secure(slot).await?;
        }
    }

    /// Makes sure of the bits that are set in memory, or waits for another that does.
    async fn secure(&self, slot: u16) -> Result<(), Status> {
        if self.marks.borrow().writing {
            self.park(slot, Key::Marks).await;
            return Ok(());
        }
        self.marks.borrow_mut().writing = true;
        let durable = self.marks.borrow().durable;
        let done = match durable {
            true => self.write_bits(slot, true).await,
            false => self.write_in_use(slot, true).await,
        };
        self.marks.borrow_mut().writing = false;
        self.unpark(Key::Marks);
        done
    }

    /// Has a page of bits in memory.
    async fn bit_page(&self, slot: u16, key: PageKey) -> Result<(), Status> {
        loop {
            if self.marks.borrow().pages.contains_key(&key) {
                return Ok(());
            }
            if self.marks.borrow().loading.contains(&key) {
                self.park(slot, Key::Bits(key)).await;
                continue;
            }
            if !self.marks.borrow_mut().make_room() {
                // All of them have bits that are not on disk.
                if self.marks.borrow().writing {
                    self.park(slot, Key::Marks).await;
                    continue;
                }
                self.marks.borrow_mut().writing = true;
                let written = self.write_bits(slot, false).await;
                self.marks.borrow_mut().writing = false;
                self.unpark(Key::Marks);
                written?;
                continue;
            }
            let place = self.marks.borrow().place(key);
            let Some(place) = place else { return Err(Status::Corrupt) };
            let len = 1 << self.marks.borrow().page_bits;
            self.marks.borrow_mut().loading.insert(key);
            let read = self.read_meta(slot, self.top(), place, len).await;
            let page = match read {
                // An image's file is flushed when it is opened: what can be read stays.
                Ok(bytes) => Page { disk: bytes.clone(), now: bytes },
                Err(status) => {
                    // Too many bits make a backup larger, but not wrong.
                    let at = self.top_at();
                    self.complain(
                        at,
                        format_args!("bits of a bitmap at {place:#x}: {status}; all set"),
                    );
                    Page { now: vec![0xff; len], disk: vec![0; len] }
                }
            };
            let mut marks = self.marks.borrow_mut();
            marks.loading.remove(&key);
            if page.now != page.disk {
                marks.dirty.insert(key);
            }
            marks.pages.insert(key, page);
            drop(marks);
            self.unpark(Key::Bits(key));
            return Ok(());
        }
    }

    /// Writes bits that are not on disk, durably; `through`: by writes that are so by themselves,
    /// which is good for few of them.
    async fn write_bits(&self, slot: u16, through: bool) -> Result<(), Status> {
        let dirty = self.marks.borrow().dirty_pages();
        if dirty.is_empty() {
            return Ok(());
        }
        let through = through && self.device.volatile_cache;
        let flags = if through { Flags::FUA } else { Flags::NONE };
        let parts = dirty.iter().map(|(_, place, bytes)| (*place, bytes.clone()));
        self.write_meta(slot, parts, flags).await?;
        if !through {
            check(self.device_flush(slot).await)?;
        }
        let mut marks = self.marks.borrow_mut();
        dirty.into_iter().for_each(|(key, _, bytes)| marks.wrote(key, bytes));
        Ok(())
    }

    /// Marks the bitmaps in use on disk, or as saved, durably. If that fails some may be marked.
    async fn write_in_use(&self, slot: u16, in_use: bool) -> Result<(), Status> {
        let all: Vec<(u64, u32)> = {
            let mut marks = self.marks.borrow_mut();
            // Flags are relied on from their flush on, and not any more from the first write that
            // takes one away.
            marks.said = Said::Either;
            marks.bitmaps.iter().map(|b| (b.flags_at, b.flags)).collect()
        };
        // They stand in the directory's order; a sector is written once.
        for part in all.chunk_by(|a, b| a.0 / 512 == b.0 / 512) {
            let sector = part[0].0 & !511;
            let mut bytes = self.read_meta(slot, self.top(), sector, 512).await?;
            for (at, flags) in part {
                let flags = if in_use { flags | BitmapEntry::IN_USE } else { *flags };
                let at = (at - sector) as usize;
                bytes[at..at + 4].copy_from_slice(&flags.to_be_bytes());
            }
            self.write_bytes(slot, sector, &bytes).await?;
        }
        check(self.device_flush(slot).await)?;
        self.marks.borrow_mut().said = if in_use { Said::InUse } else { Said::Saved };
        Ok(())
    }

    /// Before a close or a pause, when no request is in flight: bits go to disk, and then the bitmaps
    /// count as saved.
    pub(super) async fn save_marks(&self, slot: u16) -> Result<(), Status> {
        if !self.marks.borrow().is_active() {
            return Ok(());
        }
        self.write_bits(slot, false).await?;
        let saved = self.marks.borrow().said == Said::Saved;
        if saved { Ok(()) } else { self.write_in_use(slot, false).await }
    }

    /// Whether writes are recorded, or were, so that words may have flags.
    pub(super) fn records(&self) -> bool {
        self.flags.get() || self.marks.borrow().is_active()
    }

    /// The word of a unit as it is to stand in the map: with the flag if a bitmap lacks a bit, or
    /// whoever watches for changes does.
    pub(super) fn flagged(&self, unit: u64, word: Word) -> Word {
        if !self.records() || word.kind() != Kind::Mapped {
            return word;
        }
        let marks = self.marks.borrow();
        let start = unit << self.geometry.unit_bits();
        let len = self.geometry.unit_size().min(self.info.size.saturating_sub(start));
        let covered = len == 0 || (marks.covers(start, len) && self.watch_covers(start, len));
        if covered { word.marked() } else { word.unmarked() }
    }

    /// Takes the flag from words of this range whose bits are all there.
    pub(super) fn unflag(&self, offset: u64, len: u64) {
        let bits = self.geometry.unit_bits();
        // Longer ones are no writes, and have new words published for what they change.
        if len > u64::from(self.info.max_transfer) {
            return;
        }
        for unit in offset >> bits..=(offset + len - 1) >> bits {
            let word = self.map.lookup(unit);
            let now = self.flagged(unit, word);
            if now != word {
                self.map.replace(unit, word, now);
            }
        }
    }
}
