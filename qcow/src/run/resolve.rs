//! Filling the map: reading L2 entries down the chain, and finding single ranges where a unit (a
//! cluster, or a subcluster of the image's own) is made of parts.

use block::{Port, Status};

use super::shared::{Key, META, Shared};
use super::stack::LayerFormat;
use crate::format::{Geometry, HOST_OFFSET_BITS, L1Entry, L2Entry, RawL2, Unit};
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
    /// The word of a unit, its page loaded if need be. Never [`Kind::Absent`].
    pub(super) async fn word(&self, slot: u16, unit: u64) -> Result<Word, Status> {
        loop {
            let word = self.map.lookup(unit);
            if word.kind() != Kind::Absent {
                return Ok(word);
            }
            let page = unit >> self.map.page_bits();
            if self.tables.borrow().loading.contains(&page) {
                self.park(slot, Key::Page(page)).await;
                continue;
            }
            self.tables.borrow_mut().loading.insert(page);
            let words = self.page_words(slot, page).await;
            self.tables.borrow_mut().loading.remove(&page);
            self.unpark(Key::Page(page));
            let mut words = words?;
            let first = page << self.map.page_bits();
            if self.records() {
                let all = words.iter_mut().enumerate();
                all.for_each(|(i, word)| *word = self.flagged(first + i as u64, *word));
            }
            let loaded = self.pages.borrow_mut().load(&self.map, page, &words);
            if !loaded {
                // Claims hold every page: wait until one ends.
                self.pause(slot).await;
            }
        }
    }

    /// The words of a page, resolved through the chain.
    async fn page_words(&self, slot: u16, page: u64) -> Result<Vec<Word>, Status> {
        self.counters.page_loads.set(self.counters.page_loads.get() + 1);
        let bits = self.geometry.unit_bits();
        let size = self.geometry.unit_size();
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
            let mut entries = LayerEntries { list: entries?, last: None };
            if let (LayerFormat::Qcow { geometry, .. }, Some((_, list))) =
                (&layer.format, &entries.list)
                && geometry.cluster_size() == size
            {
                open -= self.take_plain(at, geometry, first << bits, list, &mut words);
                if open == 0 {
                    break;
                }
            }
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
                            self.layer_word(at, geometry, guest, &mut entries)
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

    /// What layer `at` says of the unit at `guest`; `None`: ask the next one.
    fn layer_word(
        &self,
        at: usize,
        g: &Geometry,
        guest: u64,
        entries: &mut LayerEntries,
    ) -> Option<Word> {
        let (start, list) = entries.list.as_ref()?;
        let index = (guest >> g.cluster_bits()) - (start >> g.cluster_bits());
        let entry = match entries.last {
            Some((last, entry)) if last == index => entry,
            _ => {
                if (index + 1) as usize * g.l2_words() > list.len() {
                    return None;
                }
                let entry = self.decode(at, g, guest, RawL2::of(list, index as usize, g));
                if at == self.top_at() && !self.info.read_only {
                    self.look_at_count(g, entry);
                }
                entries.last = Some((index, entry));
                entry
            }
        };
        let Ok(entry) = entry else { return Some(Word::corrupt()) };
        // The subclusters of the layer that lie in this unit.
        let first = g.in_cluster(guest) >> g.unit_bits();
        let count = (self.geometry.unit_size() >> g.unit_bits()).max(1);
        if g.extended_l2() && u64::from(entry.run(first as u32)) < count {
            return Some(Word::split());
        }
        self.word_of(at, g, guest, entry)
    }

    /// The word of a unit for which `entry` of layer `at` is the same throughout; `None`: the next
    /// layer knows.
    pub(super) fn word_of(
        &self,
        at: usize,
        g: &Geometry,
        guest: u64,
        entry: L2Entry,
    ) -> Option<Word> {
        let top = at == self.top_at();
        let inside = g.in_cluster(guest);
        let host = entry.host_cluster();
        match (entry.unit((inside >> g.unit_bits()) as u32), host) {
            (Unit::Unallocated, _) => None,
            (Unit::Compressed, _) => Some(Word::compressed(at as u8)),
            (Unit::Data, Some((host, copied))) => {
                Some(Word::mapped(at as u8, host + inside, top && copied))
            }
            (Unit::Data, None) => Some(Word::corrupt()),
            (Unit::Zero, Some((host, copied))) if top => {
                Some(Word::zero(at as u8, host + inside, copied))
            }
            (Unit::Zero, _) => Some(Word::zero(at as u8, 0, false)),
        }
    }

    /// Looks whether the refcount of what an entry names is 0, as far as that is known without a
    /// read.
    fn look_at_count(&self, g: &Geometry, entry: Result<L2Entry, Status>) {
        let host = match entry {
            _ if g.data_file() => return,
            Ok(L2Entry::Compressed { host, .. }) => host,
            Ok(entry) => match entry.host_cluster() {
                Some((host, _)) => host,
                None => return,
            },
            Err(_) => return,
        };
        if !self.alloc.borrow().seems_counted(g.cluster(host)) {
            self.miscounted(g.cluster(host));
        }
    }

    /// First byte behind everything that a layer can hold.
    pub(super) fn end_of(&self, at: usize) -> u64 {
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
        raw: RawL2,
    ) -> Result<L2Entry, Status> {
        let entry = L2Entry::decode(raw, g).map_err(|e| {
            self.contradiction(
                at,
                format_args!("L2 entry {raw:#x} of guest offset {guest:#x}: {e}"),
            );
            Status::Corrupt
        })?;
        let (host, len, needed) = match (entry, entry.host_cluster()) {
            (L2Entry::Compressed { host, len }, _) => (host, u64::from(len), true),
            (_, Some((host, _))) => (host, g.cluster_size(), entry.bits().0 != 0),
            (_, None) => return Ok(entry),
        };
        if g.data_file() {
            if host != g.cluster_start(guest) {
                let what = "is not at its place in the external data file, but at";
                self.contradiction(at, format_args!("offset {guest:#x} {what} {host:#x}"));
                return Err(Status::Corrupt);
            }
            // Nobody else can have it, whatever the flag says.
            return Ok(entry.with_copied(true));
        }
        let mut clusters = g.cluster(host)..=g.cluster(host + len - 1);
        if at == self.top_at() && clusters.any(|c| self.alloc.borrow().is_metadata(c)) {
            let what = format_args!("offset {guest:#x} is mapped to metadata at {host:#x}");
            self.contradiction(at, what);
            return Err(Status::Corrupt);
        }
        // The file was cut, or the entry is wrong. A kept cluster need not be there yet.
        if needed && host >= self.end_of(at) {
            self.complain(
                at,
                format_args!("offset {guest:#x} is mapped past the end at {host:#x}"),
            );
            // What was cut off is counted. What is not would be handed out when the file grows, and
            // somebody else's bytes show here.
            let cluster = g.cluster(host);
            let ours = at == self.top_at() && !self.info.read_only;
            let grows = ours && cluster < self.alloc.borrow().limit;
            if grows && !self.alloc.borrow().seems_counted(cluster) {
                self.miscounted(cluster);
            }
            return Err(Status::Corrupt);
        }
        Ok(entry)
    }

    /// The words of a layer's L2 entries for `[guest, guest + len)`, with the guest offset of the
    /// first; `None` if there is no table. In layer 0 the range lies in one page of the map.
    async fn page_entries(
        &self,
        slot: u16,
        at: usize,
        g: &Geometry,
        guest: u64,
        len: u64,
    ) -> Result<Option<(u64, Vec<u64>)>, Status> {
        let end = guest.saturating_add(len).min(g.size());
        let mut words = Vec::new();
        let mut found = false;
        let mut from = guest;
        // A lower layer with small clusters may have several tables for the range.
        while from < end {
            let last = (from | (g.l2_span() - 1)).min(end - 1);
            let count = g.l2_index(last) + 1 - g.l2_index(from);
            match self.table_entries(slot, at, g, from, count).await? {
                Some(part) if words.is_empty() => (found, words) = (true, part),
                Some(mut part) => {
                    found = true;
                    words.append(&mut part);
                }
                None => words.resize(words.len() + count * g.l2_words(), 0),
            }
            from = last + 1;
        }
        Ok(found.then_some((g.cluster_start(guest), words)))
    }

    /// The words of `count` entries from `guest` on, all of one table, if that exists.
    async fn table_entries(
        &self,
        slot: u16,
        at: usize,
        g: &Geometry,
        guest: u64,
        count: usize,
    ) -> Result<Option<Vec<u64>>, Status> {
        let table = self.l1_entry(at, g, guest)?.offset;
        if table == 0 {
            return Ok(None);
        }
        if at == self.top_at() {
            // Changes that are not on disk yet count too.
            let (page, index) = self.place_of_entry(g.cluster(guest));
            if let Some(words) = self.tables.borrow().words(page, index, count) {
                return Ok(Some(words.to_vec()));
            }
        }
        let (port, first) = (self.stack.layers[at].port, g.l2_index(guest));
        self.read_entries(slot, port, table, g, first, first + count - 1).await.map(Some)
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
            self.contradiction(
                at,
                format_args!("L1 entry {raw:#x} of guest offset {guest:#x}: {e}"),
            );
            Status::Corrupt
        })?;
        if entry.offset != 0 && entry.offset >= self.end_of(at) {
            self.complain(at, format_args!("the L2 table of offset {guest:#x} is past the end"));
            return Err(Status::Corrupt);
        }
        Ok(entry)
    }

    /// The words of entries `first..=last` of the table at `table`.
    pub(super) async fn read_entries(
        &self,
        slot: u16,
        port: Port,
        table: u64,
        g: &Geometry,
        first: usize,
        last: usize,
    ) -> Result<Vec<u64>, Status> {
        let size = g.l2_entry_size();
        let from = (first as u64 * size) & !511;
        let to = ((last as u64 + 1) * size).next_multiple_of(512);
        let mut bytes = Vec::new();
        let mut at = from;
        while at < to {
            let len = (to - at).min(META as u64);
            let mut part = self.read_meta(slot, port, table + at, len as usize).await?;
            // Nearly always there is but one.
            if bytes.is_empty() {
                bytes = part
            } else {
                bytes.append(&mut part)
            }
            at += len;
        }
        let skip = first * size as usize - from as usize;
        let words = bytes[skip..].chunks_exact(8).take((last - first + 1) * g.l2_words());
        Ok(words.map(|b| u64::from_be_bytes(b.try_into().unwrap_or([0; 8]))).collect())
    }

    /// Where `[guest, …)` comes from and for how many bytes at most `len` that holds, asked of the
    /// layers one by one: for units made of parts.
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
            let raw = match self.page_entries(slot, at, g, guest, 1).await? {
                Some((_, list)) => RawL2::of(&list, 0, g),
                None => RawL2::default(),
            };
            let inside = g.in_cluster(guest);
            let entry = self.decode(at, g, guest, raw)?;
            if let L2Entry::Compressed { host, len } = entry {
                run = run.min(g.cluster_size() - inside);
                return Ok((Source::Compressed { layer: at, host, len, from: inside }, run));
            }
            run = run.min(g.unit_size() - (guest & (g.unit_size() - 1)));
            match (entry.unit((inside >> g.unit_bits()) as u32), entry.host_cluster()) {
                (Unit::Data, Some((host, _))) => {
                    return Ok((Source::Data { layer: at, host: host + inside }, run));
                }
                (Unit::Zero, _) => return Ok((Source::Zero, run)),
                _ => {}
            }
        }
        Ok((Source::Zero, run))
    }
}

/// What a layer says of a page.
struct LayerEntries {
    /// Guest offset of the first entry, and the words.
    list: Option<(u64, Vec<u64>)>,
    /// The entry looked at last: several units lie in one cluster.
    last: Option<(u64, Result<L2Entry, Status>)>,
}
