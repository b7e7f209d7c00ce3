//! [`Hits`]: the path that a hit takes, on whatever reactor: from a request to the place on a
//! device, by loads alone.
//!
//! Used by [`super::Image`] on its home reactor and by [`super::Satellite`] on the others.

use std::sync::Arc;

use block::{DeviceInfo, Flags, Op, Port, Request};

use super::stack::StackLayer;
use crate::format::Geometry;
use crate::map::{Map, Way, Word};

/// No leaf queue has this number.
const NO_PORT: Port = Port { leaf: u16::MAX, unit: u16::MAX };

/// What a hit needs.
pub(super) struct Hits {
    map: Arc<Map>,
    /// Where the data of each layer is; [`NO_PORT`] where there is none.
    ports: Box<[Port; 256]>,
    /// By operation: what lets a request go straight down.
    ways: [Way; 5],
    /// Bytes of the disk, whole sectors.
    size: u64,
    /// Where a page may not begin any more.
    pages_end: u64,
    /// log2 of what has a word in the map: a cluster, or a subcluster.
    unit_bits: u32,
    /// Offsets within such a unit, as a mask.
    unit_mask: u64,
    /// How far from its beginning a page leaves a unit; 0 if units are smaller.
    page_leaves: u64,
}

/// Bytes of a sector, in which requests are counted.
const SECTOR: u64 = 512;

/// Bytes that are most often asked for. What is known of them is known before.
const PAGE: u64 = 4096;

impl Hits {
    /// For these layers.
    pub(super) fn new(
        map: Arc<Map>,
        layers: &[StackLayer],
        info: &DeviceInfo,
        geometry: &Geometry,
    ) -> Hits {
        let mut table = Box::new([NO_PORT; 256]);
        for (place, layer) in table.iter_mut().zip(layers) {
            *place = layer.data_port();
        }
        let mut ways = [Way::NONE; 5];
        ways[Op::Read as usize] = Way::READ;
        if !info.read_only {
            ways[Op::Write as usize] = Way::write((layers.len() - 1) as u8);
        }
        Hits {
            map,
            ports: table,
            ways,
            size: info.size,
            pages_end: (info.size + 1).saturating_sub(PAGE),
            unit_bits: geometry.unit_bits(),
            unit_mask: geometry.unit_size() - 1,
            page_leaves: (geometry.unit_size() + 1).saturating_sub(PAGE),
        }
    }

    /// Nothing goes straight down any more.
    #[cold]
    pub(super) fn end(&mut self) {
        self.ways = [Way::NONE; 5];
    }

    /// The map.
    pub(super) fn map(&self) -> &Arc<Map> {
        &self.map
    }

    /// Where the byte at `offset` of the disk lies, if an operation of this kind may go straight
    /// there: mapped, and no change of metadata.
    #[inline(always)]
    pub(super) fn translate(&self, op: Op, offset: u64) -> Option<(Port, u64)> {
        self.word_for(op, offset).map(|word| self.place(word, offset))
    }

    /// Has the words fetched that requests at these sectors will look at, where they are far away.
    #[inline(always)]
    pub(super) fn prefetch(&self, sectors: impl Iterator<Item = u64>) {
        if self.map.is_far() {
            self.fetch(sectors);
        }
    }

    /// By itself, so that it takes no room where most maps are not that large.
    #[inline(never)]
    fn fetch(&self, sectors: impl Iterator<Item = u64>) {
        // No unit is smaller than a sector.
        let bits = self.unit_bits - SECTOR.ilog2();
        self.map.prefetch(sectors.map(|sector| sector >> bits));
    }

    #[inline(always)]
    fn word_for(&self, op: Op, offset: u64) -> Option<Word> {
        let word = self.map.lookup(offset >> self.unit_bits);
        word.allows(self.ways[op as usize]).then_some(word)
    }

    #[inline(always)]
    fn place(&self, word: Word, offset: u64) -> (Port, u64) {
        (self.ports[usize::from(word.layer())], word.host() + (offset & self.unit_mask))
    }

    /// Where a request goes if it can go straight down as a whole: one mapped run.
    #[inline(always)]
    pub(super) fn straight(&self, r: &Request<'_>) -> Option<(Port, u64)> {
        let inside = match r.len {
            PAGE => r.offset < self.pages_end,
            // A length of 0 wraps beyond any size; nothing else wraps.
            len => len.wrapping_sub(1) < self.size && r.offset <= self.size - len,
        };
        if !(inside && r.flags == Flags::NONE && (r.offset | r.len) & 511 == 0) {
            return None;
        }
        let word = self.word_for(r.op, r.offset)?;
        let within = r.offset & self.unit_mask;
        let crosses = match r.len {
            PAGE => within >= self.page_leaves,
            len => within + (len - 1) > self.unit_mask,
        };
        if crosses && !self.runs_on(r.op, r.offset, r.len, word) {
            return None;
        }
        Some(self.place(word, r.offset))
    }

    /// Whether the clusters behind the first one, whose word is `first`, continue it.
    #[inline(never)]
    fn runs_on(&self, op: Op, offset: u64, len: u64, first: Word) -> bool {
        let Some(end) = offset.checked_add(len) else { return false };
        let last = (end - 1) >> self.unit_bits;
        let mut before = first.for_reads();
        ((offset >> self.unit_bits) + 1..=last).all(|cluster| {
            let next = self.map.lookup(cluster);
            // What is claimed or unmarked may be read, but not written.
            let next = if op == Op::Read { next.for_reads() } else { next };
            let on = before.continued_by(next, 1 << self.unit_bits);
            before = next;
            on
        })
    }
}

/// Fills in how far each layer's unit can be read, and returns the most bytes that all of them take
/// at a time.
///
/// # Errors
/// If a leaf or unit is not there, or takes less than 4 KiB at a time.
pub(super) fn look_at_leaves<L: block::BlockQueue>(
    layers: &mut [StackLayer],
    leaves: &[L],
) -> Result<u32, String> {
    let mut max_transfer = 1 << 20;
    for l in layers {
        let info = info_at(leaves, l, l.port)?;
        l.capacity = info.size;
        max_transfer = max_transfer.min(info.max_transfer & !4095);
        if let Some(port) = l.data {
            max_transfer = max_transfer.min(info_at(leaves, l, port)?.max_transfer & !4095);
        }
    }
    if max_transfer == 0 {
        return Err("a device takes less than 4 KiB at a time".to_owned());
    }
    Ok(max_transfer)
}

/// What the unit is like at which a file of a layer lies.
///
/// # Errors
/// If it is not there.
pub(super) fn info_at<'l, L: block::BlockQueue>(
    leaves: &'l [L],
    layer: &StackLayer,
    port: Port,
) -> Result<&'l DeviceInfo, String> {
    let leaf = leaves.get(usize::from(port.leaf));
    let leaf =
        leaf.ok_or_else(|| format!("{}: there is no leaf queue {}", layer.name, port.leaf))?;
    leaf.info(port.unit).ok_or_else(|| format!("{}: the leaf queue has no such unit", layer.name))
}
