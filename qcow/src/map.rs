//! The map from guest clusters to where their bytes lie: one atomic word a cluster, flattened over
//! the whole backing chain, so that a look-up costs the same at any depth. Where L2 entries are
//! extended it has a word a subcluster: what is called a cluster here is one of those.
//!
//! Any reactor looks up, by loads alone and without writing a shared line; one owner (see
//! [`Pages`]) fills pages on demand, publishes new words and evicts. A page that is reused while a
//! reader is in it is noticed by the reader: the directory entry, which holds the page's
//! generation, is loaded again behind the word. `tests/memory.rs` runs this file on a model of
//! memory.

use std::collections::VecDeque;

use super::atomics::{AtomicU64, Ordering, prefetch, zeroed};

/// What a word says about its cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Not known: the page is not loaded.
    Absent,
    /// Data at [`Word::host`] of [`Word::layer`].
    Mapped,
    /// Reads as zeroes by an explicit entry; [`Word::host`] is the kept cluster of its layer, if
    /// [`Word::keeps`] says that there is one.
    Zero,
    /// In no layer: reads as zeroes.
    Hole,
    /// Compressed in [`Word::layer`]; its L2 entry says where.
    Compressed,
    /// Different parts of the cluster come from different places: ask the layers.
    Split,
    /// The entry on disk makes no sense.
    Corrupt,
}

/// One cluster's word: layer (bits 63..56), host offset (55..9, a multiple of 512 bytes in its
/// place), claim (8), unmarked (4), owned (3), kind (2..0).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Word(u64);

const LAYER_SHIFT: u32 = 56;
const HOST: u64 = ((1 << LAYER_SHIFT) - 1) & !511;
const CLAIM: u64 = 1 << 8;
const UNMARKED: u64 = 1 << 4;
const OWNED: u64 = 1 << 3;
const KIND: u64 = 7;

/// What must be right about a word for a request to go straight down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    mask: u64,
    want: u64,
}

impl Way {
    /// A read: mapped, in whatever layer, claimed or not.
    pub const READ: Way = Way { mask: KIND, want: Kind::Mapped as u64 };
    /// A write in place: no claim, mapped, in the layer that is written to, owned, and nothing to
    /// record.
    pub const fn write(top: u8) -> Way {
        let layer = (top as u64) << LAYER_SHIFT;
        Way { mask: !HOST, want: layer | Kind::Mapped as u64 | OWNED }
    }

    /// Nothing goes straight down.
    pub const NONE: Way = Way { mask: 0, want: 1 };
}

impl Word {
    /// Nothing known.
    pub const ABSENT: Word = Word(0);

    fn new(kind: Kind, layer: u8, host: u64) -> Word {
        debug_assert!(host & !HOST == 0);
        Word(u64::from(layer) << LAYER_SHIFT | host | kind as u64)
    }

    /// Data at `host` (a multiple of 512, below 2^56) of `layer`; `owned` if it may be written in
    /// place while `layer` is the one that is written to (refcount one).
    pub fn mapped(layer: u8, host: u64, owned: bool) -> Word {
        let flag = if owned { OWNED } else { 0 };
        Word(Word::new(Kind::Mapped, layer, host).0 | flag)
    }

    /// Explicit zeroes in `layer`, with the kept cluster at `host` if not 0 (only in the layer that
    /// is written to).
    pub fn zero(layer: u8, host: u64, owned: bool) -> Word {
        let flag = if owned { OWNED } else { 0 };
        Word(Word::new(Kind::Zero, layer, host).0 | flag)
    }

    /// In no layer.
    pub fn hole() -> Word {
        Word::new(Kind::Hole, 0, 0)
    }

    /// Compressed in `layer`.
    pub fn compressed(layer: u8) -> Word {
        Word::new(Kind::Compressed, layer, 0)
    }

    /// Made of parts.
    pub fn split() -> Word {
        Word::new(Kind::Split, 0, 0)
    }

    /// Nonsense on disk.
    pub fn corrupt() -> Word {
        Word::new(Kind::Corrupt, 0, 0)
    }

    /// What it says.
    #[inline]
    pub fn kind(self) -> Kind {
        match self.0 & KIND {
            1 => Kind::Mapped,
            2 => Kind::Zero,
            3 => Kind::Hole,
            4 => Kind::Compressed,
            5 => Kind::Split,
            6 => Kind::Corrupt,
            _ => Kind::Absent,
        }
    }

    /// Which layer of the chain, counted from the bottom: so a new one in front of all changes no
    /// other's number.
    #[inline]
    pub fn layer(self) -> u8 {
        (self.0 >> LAYER_SHIFT) as u8
    }

    /// Host offset in bytes.
    #[inline]
    pub fn host(self) -> u64 {
        self.0 & HOST
    }

    /// Whether the cluster's refcount is one, so that it may be written in place.
    #[inline]
    pub fn owned(self) -> bool {
        self.0 & OWNED != 0
    }

    /// Whether a zero cluster has a place for later writes.
    #[inline]
    pub fn keeps(self) -> bool {
        // At offset 0 is a place only in an external data file, whose clusters are all owned.
        self.0 & (HOST | OWNED) != 0
    }

    /// Whether somebody is changing the mapping. The rest of the word is still the old mapping.
    #[inline]
    pub fn claimed(self) -> bool {
        self.0 & CLAIM != 0
    }

    /// Whether a request may go straight to the device.
    #[inline]
    pub fn allows(self, way: Way) -> bool {
        self.0 & way.mask == way.want
    }

    /// Whether a write may go straight to the device, if `top` is the layer that is written to.
    #[inline]
    pub fn writable_in_place(self, top: u8) -> bool {
        self.allows(Way::write(top))
    }

    /// Whether a read may go straight to the device.
    #[inline]
    pub fn readable(self) -> bool {
        self.allows(Way::READ)
    }

    /// The same without the claim.
    #[inline]
    pub fn unclaimed(self) -> Word {
        Word(self.0 & !CLAIM)
    }

    /// The same, where nothing has to be recorded before a write.
    #[inline]
    pub fn marked(self) -> Word {
        Word(self.0 & !UNMARKED)
    }

    /// The same, where a write has to be recorded first.
    #[inline]
    pub fn unmarked(self) -> Word {
        Word(self.0 | UNMARKED)
    }

    /// The same without what only writes look at.
    #[inline]
    pub fn for_reads(self) -> Word {
        Word(self.0 & !(CLAIM | UNMARKED))
    }

    /// Whether `next` continues this mapped word one cluster of `cluster_size` bytes further on.
    #[inline]
    pub fn continued_by(self, next: Word, cluster_size: u64) -> bool {
        next.0 == self.0.wrapping_add(cluster_size) && next.layer() == self.layer()
    }
}

/// Words of a map that a processor keeps near by itself: 512 KiB of them.
const NEAR: usize = 1 << 16;

/// The shared part of the map. See the module's text. On lines of its own: every look-up reads it,
/// and nothing that one reactor writes lies beside it.
#[derive(Debug)]
#[repr(align(128))]
pub struct Map {
    page_bits: u32,
    /// The clusters of a page, as a mask.
    page_mask: u64,
    clusters: u64,
    /// Per page of clusters: 0, or generation (high half) and one more than where in `words` or `flat`
    /// the page begins (low half).
    directory: Box<[AtomicU64]>,
    /// All pages, one after the other, where not all have a place. Zeroed by the kernel where they are first
    /// used, 2 MiB at a time in large maps where it has such pages: what is not used costs next to nothing.
    words: Box<[AtomicU64]>,
    /// The same where all do. Then each lies in its own place and is never evicted, and a look-up needs no
    /// directory: a word is that of its cluster, or 0 while its page is not loaded.
    flat: Box<[AtomicU64]>,
}

impl Map {
    /// An empty map of `clusters` clusters in pages of `1 << page_bits`, which keeps at most
    /// `budget` bytes of words (but never fewer than `least` pages).
    ///
    /// # Errors
    /// If there is no memory for the directory.
    pub fn new(clusters: u64, page_bits: u32, budget: u64, least: usize) -> Result<Map, String> {
        let no_memory = || format!("no memory for a map of {clusters} clusters");
        let entries =
            usize::try_from(clusters.div_ceil(1 << page_bits)).map_err(|_| no_memory())?;
        let zeroed = |n| zeroed(n).ok_or_else(no_memory);
        let directory = zeroed(entries)?;
        let afford = usize::try_from(budget / (8 << page_bits)).unwrap_or(usize::MAX);
        let count = afford.max(least).min(entries).min((u32::MAX as usize) >> page_bits);
        let words = zeroed(count.checked_mul(1 << page_bits).ok_or_else(no_memory)?)?;
        let (flat, words) =
            if count == entries { (words, zeroed(0)?) } else { (zeroed(0)?, words) };
        Ok(Map { page_bits, page_mask: (1 << page_bits) - 1, clusters, directory, words, flat })
    }

    /// The words of all pages that can be loaded at a time.
    fn all(&self) -> &[AtomicU64] {
        if self.is_flat() { &self.flat } else { &self.words }
    }

    fn is_flat(&self) -> bool {
        !self.flat.is_empty()
    }

    /// Whether the map is so large that its words are likely to be far from the processor.
    #[inline]
    pub fn is_far(&self) -> bool {
        self.all().len() > NEAR
    }

    /// Has the words of those clusters fetched that exist, for look-ups that follow soon. Changes nothing.
    #[inline]
    pub fn prefetch(&self, clusters: impl Iterator<Item = u64>) {
        // By itself: what it is lies in registers then, as nothing shows that a prefetch does not change it.
        let flat = &*self.flat;
        if flat.is_empty() {
            return self.prefetch_paged(clusters);
        }
        clusters.for_each(|cluster| {
            if let Some(word) = flat.get(cluster as usize) {
                prefetch(word);
            }
        });
    }

    /// The same where not all pages have a place.
    fn prefetch_paged(&self, clusters: impl Iterator<Item = u64>) {
        for cluster in clusters {
            let entry = self.directory.get((cluster >> self.page_bits) as usize);
            let entry = entry.map(|entry| entry.load(Ordering::Relaxed));
            if let Some(word) = entry.and_then(|entry| self.word(&self.words, entry, cluster)) {
                prefetch(word);
            }
        }
    }

    /// How many clusters there are.
    #[inline]
    pub fn clusters(&self) -> u64 {
        self.clusters
    }

    /// log2 of the clusters in a page.
    #[inline]
    pub fn page_bits(&self) -> u32 {
        self.page_bits
    }

    /// How many pages can be loaded at a time.
    pub fn page_count(&self) -> usize {
        self.all().len() >> self.page_bits
    }

    /// The word of a cluster; [`Word::ABSENT`] if its page is not loaded or it does not exist.
    #[inline(always)]
    pub fn lookup(&self, cluster: u64) -> Word {
        if let Some(word) = self.flat.get(cluster as usize) {
            return Word(word.load(Ordering::Acquire));
        }
        self.lookup_paged(cluster)
    }

    /// The same where not all pages have a place; there is nothing where they have.
    #[inline(always)]
    fn lookup_paged(&self, cluster: u64) -> Word {
        let Some(entry) = self.directory.get((cluster >> self.page_bits) as usize) else {
            return Word::ABSENT;
        };
        let seen = entry.load(Ordering::Acquire);
        let Some(word) = self.word(&self.words, seen, cluster) else { return Word::ABSENT };
        // Acquire: the directory is looked at again after this load. If the word belongs to the
        // page's next use, then that use began with emptying this entry, and we see it.
        let value = word.load(Ordering::Acquire);
        if entry.load(Ordering::Relaxed) != seen {
            return Map::evicted();
        }
        Word(value)
    }

    /// What a reader gets that a page was taken from. By itself, so that the hit has a branch here
    /// that is never taken, rather than a choice that waits for both loads.
    #[cold]
    fn evicted() -> Word {
        Word::ABSENT
    }

    #[inline(always)]
    fn word<'w>(&self, all: &'w [AtomicU64], entry: u64, cluster: u64) -> Option<&'w AtomicU64> {
        // An empty entry gives a place far outside.
        let page = (entry as u32 as usize).wrapping_sub(1);
        all.get(page | (cluster & self.page_mask) as usize)
    }

    /// Replaces a loaded cluster's word if it is `old`. Returns whether it was.
    pub fn replace(&self, cluster: u64, old: Word, new: Word) -> bool {
        let Some(entry) = self.directory.get((cluster >> self.page_bits) as usize) else {
            return false;
        };
        let seen = entry.load(Ordering::Acquire);
        let Some(word) = self.word(self.all(), seen, cluster) else { return false };
        word.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Claims a loaded cluster whose word is `seen` and unclaimed: from now on nobody else changes
    /// its mapping or writes to it in place, until [`Map::publish`]. Returns whether it worked.
    pub fn claim(&self, cluster: u64, seen: Word) -> bool {
        !seen.claimed() && self.replace(cluster, seen, Word(seen.0 | CLAIM))
    }

    /// Ends a claim with a new mapping (or the old one). For the holder of the claim.
    pub fn publish(&self, cluster: u64, word: Word) {
        let old = self.lookup(cluster);
        debug_assert!(old.claimed(), "published without a claim");
        let done = self.replace(cluster, old, word.unclaimed());
        debug_assert!(done, "a claimed word changed");
    }
}

/// The owner's part of the map: which pages are loaded, in which order, and which are held.
#[derive(Debug)]
pub struct Pages {
    /// Loaded pages (numbers in the directory), the oldest first.
    loaded: VecDeque<(u64, u32)>,
    free: Vec<u32>,
    /// Per page place: how many claims hold it.
    held: Vec<u32>,
    generation: u32,
}

impl Pages {
    /// For a fresh map.
    pub fn new(map: &Map) -> Pages {
        let count = map.page_count() as u32;
        Pages {
            loaded: VecDeque::new(),
            free: if map.is_flat() { Vec::new() } else { (0..count).rev().collect() },
            held: vec![0; count as usize],
            generation: 0,
        }
    }

    /// Loads page `number` with `words` (shorter at the disk's end), evicting another if need be.
    /// Returns whether there was a place: not if claims hold every page.
    pub fn load(&mut self, map: &Map, number: u64, words: &[Word]) -> bool {
        let Some(entry) = map.directory.get(number as usize) else { return false };
        if entry.load(Ordering::Relaxed) != 0 {
            return true;
        }
        let place = if map.is_flat() {
            number as u32
        } else {
            let Some(place) = self.free.pop().or_else(|| self.evict(map)) else { return false };
            place
        };
        let start = (place as usize) << map.page_bits;
        let page = &map.all()[start..start + (1 << map.page_bits)];
        let (known, behind) = page.split_at(words.len().min(page.len()));
        for (slot, word) in known.iter().zip(words) {
            slot.store(word.0, Ordering::Release);
        }
        for slot in behind {
            slot.store(0, Ordering::Release);
        }
        self.generation = self.generation.wrapping_add(1);
        let value = u64::from(self.generation) << 32 | (start as u64 + 1);
        entry.store(value, Ordering::Release);
        if !map.is_flat() {
            self.loaded.push_back((number, place));
        }
        true
    }

    /// Takes the place of the oldest page that no claim holds.
    fn evict(&mut self, map: &Map) -> Option<u32> {
        for _ in 0..self.loaded.len() {
            let (number, place) = self.loaded.pop_front()?;
            if self.held[place as usize] > 0 {
                self.loaded.push_back((number, place));
                continue;
            }
            map.directory[number as usize].store(0, Ordering::Release);
            return Some(place);
        }
        None
    }

    /// Keeps the page of a claimed cluster loaded.
    pub fn hold(&mut self, map: &Map, cluster: u64) {
        if let Some(n) = self.place_of(map, cluster) {
            self.held[n] += 1;
        }
    }

    /// Ends [`Pages::hold`].
    pub fn release(&mut self, map: &Map, cluster: u64) {
        if let Some(n) = self.place_of(map, cluster) {
            self.held[n] -= 1;
        }
    }

    fn place_of(&self, map: &Map, cluster: u64) -> Option<usize> {
        let entry = map.directory.get((cluster >> map.page_bits) as usize)?;
        let start = (entry.load(Ordering::Relaxed) as u32 as usize).checked_sub(1)?;
        Some(start >> map.page_bits)
    }
}
