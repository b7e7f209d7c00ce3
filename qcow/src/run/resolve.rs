//! Filling the map: reading L2 entries down the chain, and finding single ranges where a cluster
//! is made of parts.

use block::{Port, Status};

use super::shared::{Key, META, Shared};
use super::stack::LayerFormat;
use crate::format::{Geometry, HOST_OFFSET_BITS, L1Entry, L2Entry};
use crate::map::{Kind, Word};

/// Where a range of the guest's disk comes from.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Source {
    /// Data at a host offset of a layer.
    Data { layer: usize, host: u64 },
    /// Zeroes.
    Zero,
    /// A part of a compressed cluster: `from` bytes into it.
    Compressed { layer: usize, host: u64, len: u32, from: u64 },
}

impl Shared {
    /// The word of a cluster, its page loaded if need be. Never [`Kind::Absent`].
    pub(super) async fn word(&self, slot: u16, cluster: u64) -> Result<Word, Status> {
        loop {
            let word = self.map.lookup(cluster);
            if word.kind() != Kind::Absent {
                return Ok(word);
            }
            let page = cluster >> self.map.page_bits();
            if self.tables.borrow().loading.contains(&page) {
                self.park(slot, Key::Page(page)).await;
                continue;
            }
            self.tables.borrow_mut().loading.insert(page);
            let words = self.page_words(slot, page).await;
            self.tables.borrow_mut().loading.remove(&page);
            self.unpark(Key::Page(page));
            let loaded = self.pages.borrow_mut().load(&self.map, page, &words?);
            if !loaded {
                // Claims hold every page: wait until one ends.
                self.pause(slot).await;
            }
        }
    }

    /// The words of a page, resolved through the chain.
    async fn page_words(&self, slot: u16, page: u64) -> Result<Vec<Word>, Status> {
        self.counters.page_loads.set(self.counters.page_loads.get() + 1);
        let bits = self.geometry.cluster_bits();
        let size = self.geometry.cluster_size();
        let first = page << self.map.page_bits();
        let count = (self.map.clusters() - first).min(1 << self.map.page_bits());
        let mut words = vec![Word::ABSENT; count as usize];
        let mut open = words.len();
        for (at, layer) in self.stack.layers.iter().enumerate().rev() {
            if open == 0 {
                break;
            }
            let entries = match &layer.format {
                LayerFormat::Qcow { geometry, .. } if geometry.cluster_size() >= size => {
                    self.page_entries(slot, at, geometry, first << bits, count << bits).await
                }
                _ => Ok(None),
            };
            if entries == Err(Status::Corrupt) {
                words.iter_mut().filter(|w| **w == Word::ABSENT).for_each(|w| *w = Word::corrupt());
                break;
            }
            let entries = entries?;
            for (i, word) in words.iter_mut().enumerate() {
                if *word != Word::ABSENT {
                    continue;
                }
                let guest = (first + i as u64) << bits;
                let end = (guest + size).min(self.geometry.size());
                let found = if guest >= layer.size() {
                    Some(Word::hole())
                } else if end > layer.size() {
                    Some(Word::split())
                } else {
                    match &layer.format {
                        // A word holds no offsets above that, which only a sparse file has.
                        LayerFormat::Raw { .. } if guest >> HOST_OFFSET_BITS != 0 => {
                            Some(Word::split())
                        }
                        LayerFormat::Raw { .. } => Some(Word::mapped(at as u8, guest, false)),
                        LayerFormat::Qcow { geometry, .. } if geometry.cluster_size() < size => {
                            Some(Word::split())
                        }
                        LayerFormat::Qcow { geometry, .. } => {
                            self.layer_word(at, geometry, guest, &entries)
                        }
                    }
                };
                if let Some(found) = found {
                    *word = found;
                    open -= 1;
                }
            }
        }
        for word in &mut words {
            if *word == Word::ABSENT {
                *word = Word::hole();
            }
        }
        Ok(words)
    }

    /// What layer `at` says of the cluster at `guest`; `None`: ask the next one.
    fn layer_word(
        &self,
        at: usize,
        g: &Geometry,
        guest: u64,
        entries: &Option<(u64, Vec<u64>)>,
    ) -> Option<Word> {
        let (start, list) = entries.as_ref()?;
        let index = (guest >> g.cluster_bits()) - (start >> g.cluster_bits());
        let raw = *list.get(index as usize)?;
        let inside = g.in_cluster(guest);
        let top = at == self.top_at();
        let entry = self.decode(at, g, guest, raw);
        if top && !self.info.read_only {
            self.look_at_count(g, entry);
        }
        match entry {
            Err(_) => Some(Word::corrupt()),
            Ok(L2Entry::Unallocated) => None,
            Ok(L2Entry::Normal { host, copied }) => {
                Some(Word::mapped(at as u8, host + inside, top && copied))
            }
            Ok(L2Entry::Zero) => Some(Word::zero(at as u8, 0, false)),
            Ok(L2Entry::ZeroAllocated { host, copied }) if top => {
                Some(Word::zero(at as u8, host, copied))
            }
            Ok(L2Entry::ZeroAllocated { .. }) => Some(Word::zero(at as u8, 0, false)),
            Ok(L2Entry::Compressed { .. }) => Some(Word::compressed(at as u8)),
        }
    }

    /// Looks whether the refcount of what an entry names is 0, as far as that is known without a
    /// read.
    fn look_at_count(&self, g: &Geometry, entry: Result<L2Entry, Status>) {
        let (Ok(L2Entry::Normal { host, .. } | L2Entry::ZeroAllocated { host, .. })
        | Ok(L2Entry::Compressed { host, .. })) = entry
        else {
            return;
        };
        if !self.alloc.borrow().seems_counted(g.cluster(host)) {
            self.miscounted(g.cluster(host));
        }
    }

    /// First byte behind everything that a layer can hold.
    fn end_of(&self, at: usize) -> u64 {
        let end = self.stack.layers[at].end;
        if at == self.top_at() { end.max(self.alloc.borrow().grown()) } else { end }
    }

    /// Decodes an L2 entry and checks that it points neither at metadata nor behind the file's end;
    /// logs what is wrong.
    pub(super) fn decode(
        &self,
        at: usize,
        g: &Geometry,
        guest: u64,
        raw: u64,
    ) -> Result<L2Entry, Status> {
        let entry = L2Entry::decode(raw, g).map_err(|e| {
            self.complain(at, format_args!("L2 entry {raw:#x} of guest offset {guest:#x}: {e}"));
            Status::Corrupt
        })?;
        let (host, len, needed) = match entry {
            L2Entry::Normal { host, .. } => (host, g.cluster_size(), true),
            L2Entry::ZeroAllocated { host, .. } => (host, g.cluster_size(), false),
            L2Entry::Compressed { host, len } => (host, u64::from(len), true),
            L2Entry::Unallocated | L2Entry::Zero => return Ok(entry),
        };
        let mut clusters = g.cluster(host)..=g.cluster(host + len - 1);
        if at == self.top_at() && clusters.any(|c| self.alloc.borrow().is_metadata(c)) {
            self.complain(at, format_args!("offset {guest:#x} is mapped to metadata at {host:#x}"));
            return Err(Status::Corrupt);
        }
        // The file was cut, or the entry is wrong. A kept cluster need not be there yet.
        if needed && host >= self.end_of(at) {
            self.complain(
                at,
                format_args!("offset {guest:#x} is mapped past the end at {host:#x}"),
            );
            return Err(Status::Corrupt);
        }
        Ok(entry)
    }

    /// L2 entries of a layer for `[guest, guest + len)`, which lies in one L2 table, with the
    /// guest offset of the first; `None` if there is no table.
    async fn page_entries(
        &self,
        slot: u16,
        at: usize,
        g: &Geometry,
        guest: u64,
        len: u64,
    ) -> Result<Option<(u64, Vec<u64>)>, Status> {
        if guest >= g.size() {
            return Ok(None);
        }
        let table = self.l1_entry(at, g, guest)?.offset;
        if table == 0 {
            return Ok(None);
        }
        let first = g.l2_index(guest);
        let last = g.l2_index(guest.saturating_add(len - 1).min(guest | (g.l2_span() - 1)));
        if at == self.top_at() {
            // Changes that are not on disk yet count too.
            let page = g.cluster(guest) >> self.map.page_bits();
            let tables = self.tables.borrow();
            if tables.has_slice(page) {
                let base = page << self.map.page_bits();
                let low = (g.cluster(guest) - base) as usize;
                let all = (low..=low + (last - first)).filter_map(|i| tables.entry(page, i));
                return Ok(Some((g.cluster_start(guest), all.collect())));
            }
        }
        let raw = self.read_entries(slot, self.stack.layers[at].port, table, first, last).await?;
        Ok(Some((g.cluster_start(guest), raw)))
    }

    /// A layer's L1 entry for `guest`.
    pub(super) fn l1_entry(&self, at: usize, g: &Geometry, guest: u64) -> Result<L1Entry, Status> {
        let index = g.l1_index(guest);
        let raw = match at {
            _ if at == self.top_at() => self.tables.borrow().l1(index),
            _ => match &self.stack.layers[at].format {
                LayerFormat::Qcow { l1, .. } => l1.get(index as usize).copied().unwrap_or(0),
                LayerFormat::Raw { .. } => 0,
            },
        };
        let entry = L1Entry::decode(raw, g).map_err(|e| {
            self.complain(at, format_args!("L1 entry {raw:#x} of guest offset {guest:#x}: {e}"));
            Status::Corrupt
        })?;
        if entry.offset != 0 && entry.offset >= self.end_of(at) {
            self.complain(at, format_args!("the L2 table of offset {guest:#x} is past the end"));
            return Err(Status::Corrupt);
        }
        Ok(entry)
    }

    /// Entries `first..=last` of the table at `table`, at most a metadata buffer's worth.
    pub(super) async fn read_entries(
        &self,
        slot: u16,
        port: Port,
        table: u64,
        first: usize,
        last: usize,
    ) -> Result<Vec<u64>, Status> {
        let from = (first as u64 * 8) & !511;
        let to = ((last as u64 + 1) * 8).next_multiple_of(512);
        debug_assert!(to - from <= META as u64);
        let bytes = self.read_meta(slot, port, table + from, (to - from) as usize).await?;
        let skip = first * 8 - from as usize;
        let words = bytes[skip..].chunks_exact(8).take(last - first + 1);
        Ok(words.map(|b| u64::from_be_bytes(b.try_into().unwrap_or([0; 8]))).collect())
    }

    /// Where `[guest, …)` comes from and for how many bytes at most `len` that holds, asked of the
    /// layers one by one: for clusters made of parts.
    pub(super) async fn resolve(
        &self,
        slot: u16,
        guest: u64,
        len: u64,
    ) -> Result<(Source, u64), Status> {
        let mut run = len;
        for (at, layer) in self.stack.layers.iter().enumerate().rev() {
            if guest >= layer.size() {
                return Ok((Source::Zero, run));
            }
            run = run.min(layer.size() - guest);
            let LayerFormat::Qcow { geometry: g, .. } = &layer.format else {
                return Ok((Source::Data { layer: at, host: guest }, run));
            };
            let inside = g.in_cluster(guest);
            run = run.min(g.cluster_size() - inside);
            let entry = match self.page_entries(slot, at, g, guest, 1).await? {
                Some((_, list)) => list.first().copied().unwrap_or(0),
                None => 0,
            };
            match self.decode(at, g, guest, entry)? {
                L2Entry::Unallocated => {}
                L2Entry::Zero | L2Entry::ZeroAllocated { .. } => return Ok((Source::Zero, run)),
                L2Entry::Normal { host, .. } => {
                    return Ok((Source::Data { layer: at, host: host + inside }, run));
                }
                L2Entry::Compressed { host, len } => {
                    return Ok((Source::Compressed { layer: at, host, len, from: inside }, run));
                }
            }
        }
        Ok((Source::Zero, run))
    }
}
