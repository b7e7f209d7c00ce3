//! The volatile write cache: an ordered log of writes that are not on stable storage yet.
//!
//! Owned by a namespace whose cache is on. A flush carries the log out in order; a write with FUA
//! goes to stable storage at once and supersedes what the log holds of its blocks; a full cache
//! evicts from the oldest end. A power cut carries out a part of the log that a seed chooses: each
//! write survives, is lost, or is torn at 512 bytes, whatever happened to the others, as the
//! specification allows for writes that were not flushed.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use crate::rng::hash;
use crate::store::Store;

/// What drives write as one: a torn write is torn at multiples of this.
pub(crate) const SECTOR: u64 = 512;

/// Longest zeroing, in blocks, that is logged; longer ones go to stable storage at once, which a
/// device may do at any time.
const MAX_LOGGED_ZEROES: u32 = 4096;

/// Memory that the index takes per logged block, about.
const INDEX_COST: u64 = 64;

/// Memory that an entry of the log takes besides its data, about.
const ENTRY_COST: u64 = 64;

/// What becomes of a write at a power cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    Lost,
    Kept,
    Torn,
}

/// The fate of write number `seq`.
pub(crate) fn fate(seed: u64, seq: u64) -> Fate {
    match hash(seed, seq) % 5 {
        0 | 1 => Fate::Lost,
        2 | 3 => Fate::Kept,
        _ => Fate::Torn,
    }
}

/// Whether a sector of a torn write survives.
pub(crate) fn sector_survives(seed: u64, seq: u64, sector: u64) -> bool {
    hash(seed ^ hash(seq, 1), sector) & 1 == 0
}

#[derive(Debug)]
enum Data {
    Bytes(Vec<u8>),
    Zeroes { deallocate: bool },
}

#[derive(Debug)]
struct Pending {
    lba: u64,
    blocks: u32,
    data: Data,
}

/// The write cache of one namespace.
#[derive(Debug)]
pub(crate) struct Cache {
    /// log2 of the block size.
    shift: u32,
    /// Bytes held at most.
    limit: u64,
    bytes: u64,
    /// Sequence number of `log[0]`.
    first: u64,
    log: VecDeque<Pending>,
    /// For each block that a flush would write: the newest write of it.
    newest: BTreeMap<u64, u64>,
    /// For each block that went to stable storage past the log: the last logged write of it that
    /// is superseded thereby.
    superseded: BTreeMap<u64, u64>,
    /// Buffers to be used again.
    spare: Vec<Vec<u8>>,
}

impl Cache {
    pub(crate) fn new(shift: u32, limit: u64) -> Cache {
        Cache {
            shift,
            limit,
            bytes: 0,
            first: 0,
            log: VecDeque::new(),
            newest: BTreeMap::new(),
            superseded: BTreeMap::new(),
            spare: Vec::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.log.is_empty()
    }

    /// A buffer of `len` bytes to fill and hand to [`Cache::write`].
    pub(crate) fn buffer(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.resize(len, 0);
        buffer
    }

    /// Takes a buffer back unused.
    pub(crate) fn give_back(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < 64 {
            self.spare.push(buffer);
        }
    }

    /// Logs a write of whole blocks.
    pub(crate) fn write(&mut self, store: &mut Store, lba: u64, data: Vec<u8>) -> io::Result<()> {
        let blocks = (data.len() >> self.shift) as u32;
        self.push(store, Pending { lba, blocks, data: Data::Bytes(data) })
    }

    /// Logs a zeroing, or carries it out if it is long.
    pub(crate) fn zero(
        &mut self,
        store: &mut Store,
        lba: u64,
        blocks: u32,
        deallocate: bool,
    ) -> io::Result<()> {
        if blocks > MAX_LOGGED_ZEROES {
            store.zero(lba << self.shift, u64::from(blocks) << self.shift, deallocate)?;
            self.supersede(lba, blocks);
            return Ok(());
        }
        self.push(store, Pending { lba, blocks, data: Data::Zeroes { deallocate } })
    }

    fn push(&mut self, store: &mut Store, write: Pending) -> io::Result<()> {
        let seq = self.first + self.log.len() as u64;
        for lba in write.lba..write.lba + u64::from(write.blocks) {
            self.newest.insert(lba, seq);
        }
        self.bytes += cost(&write);
        self.log.push_back(write);
        while self.bytes > self.limit && !self.log.is_empty() {
            self.evict(store)?;
        }
        Ok(())
    }

    /// These blocks have just been written to stable storage past the log.
    pub(crate) fn supersede(&mut self, lba: u64, blocks: u32) {
        if self.newest.is_empty() {
            return;
        }
        let end = lba + u64::from(blocks);
        while let Some((&block, &seq)) = self.newest.range(lba..end).next() {
            self.newest.remove(&block);
            self.superseded.insert(block, seq);
        }
    }

    /// Blocks of a range that the log holds, ascending: LBA, and bytes or `None` for zeroes.
    pub(crate) fn blocks(
        &self,
        lba: u64,
        blocks: u32,
    ) -> impl Iterator<Item = (u64, Option<&[u8]>)> {
        self.newest.range(lba..lba + u64::from(blocks)).map(|(&block, &seq)| {
            let write = &self.log[(seq - self.first) as usize];
            match &write.data {
                Data::Zeroes { .. } => (block, None),
                Data::Bytes(data) => {
                    let at = ((block - write.lba) << self.shift) as usize;
                    (block, Some(&data[at..at + (1 << self.shift)]))
                }
            }
        })
    }

    /// Carries out everything. If the store fails, all stays in the log.
    pub(crate) fn flush(&mut self, store: &mut Store) -> io::Result<()> {
        for (seq, write) in (self.first..).zip(&self.log) {
            let live = |block: u64| self.newest.get(&block) == Some(&seq);
            carry_out(store, write, self.shift, live)?;
        }
        self.first += self.log.len() as u64;
        while let Some(write) = self.log.pop_front() {
            if let Data::Bytes(buffer) = write.data {
                self.give_back(buffer);
            }
        }
        self.bytes = 0;
        self.newest.clear();
        self.superseded.clear();
        Ok(())
    }

    /// Carries out the oldest write.
    fn evict(&mut self, store: &mut Store) -> io::Result<()> {
        let seq = self.first;
        let Some(write) = self.log.front() else { return Ok(()) };
        let dead = &self.superseded;
        carry_out(store, write, self.shift, |b| dead.get(&b).is_none_or(|&last| last < seq))?;
        for block in write.lba..write.lba + u64::from(write.blocks) {
            remove_if(&mut self.newest, block, seq);
            remove_if(&mut self.superseded, block, seq);
        }
        self.bytes -= cost(write);
        self.first += 1;
        if let Some(Pending { data: Data::Bytes(buffer), .. }) = self.log.pop_front() {
            self.give_back(buffer);
        }
        Ok(())
    }

    /// The power goes: what the seed keeps reaches stable storage, the rest is gone.
    pub(crate) fn power_cut(&mut self, store: &mut Store, seed: u64) -> io::Result<()> {
        let log = std::mem::take(&mut self.log);
        for (seq, write) in (self.first..).zip(&log) {
            let alive = |block: u64| self.superseded.get(&block).is_none_or(|&last| last < seq);
            match fate(seed, seq) {
                Fate::Lost => {}
                Fate::Kept => carry_out(store, write, self.shift, alive)?,
                Fate::Torn => tear(store, write, self.shift, seed, seq, alive)?,
            }
        }
        self.first += log.len() as u64;
        self.bytes = 0;
        self.newest.clear();
        self.superseded.clear();
        Ok(())
    }
}

fn cost(write: &Pending) -> u64 {
    let data = match &write.data {
        Data::Bytes(bytes) => bytes.len() as u64,
        Data::Zeroes { .. } => 0,
    };
    ENTRY_COST + data + u64::from(write.blocks) * INDEX_COST
}

fn remove_if(map: &mut BTreeMap<u64, u64>, key: u64, value: u64) {
    if map.get(&key) == Some(&value) {
        map.remove(&key);
    }
}

/// Writes those blocks of a logged write for which `live` holds, in runs as long as may be.
fn carry_out(
    store: &mut Store,
    write: &Pending,
    shift: u32,
    live: impl Fn(u64) -> bool,
) -> io::Result<()> {
    let end = write.lba + u64::from(write.blocks);
    let mut at = write.lba;
    while at < end {
        let run = (at..end).take_while(|&b| live(b)).count() as u64;
        if run == 0 {
            at += 1;
            continue;
        }
        match &write.data {
            Data::Bytes(data) => {
                let from = ((at - write.lba) << shift) as usize;
                store.write(at << shift, &data[from..from + (run << shift) as usize])?;
            }
            Data::Zeroes { deallocate } => store.zero(at << shift, run << shift, *deallocate)?,
        }
        at += run;
    }
    Ok(())
}

/// Writes those sectors of a logged write that the seed keeps.
fn tear(
    store: &mut Store,
    write: &Pending,
    shift: u32,
    seed: u64,
    seq: u64,
    alive: impl Fn(u64) -> bool,
) -> io::Result<()> {
    let start = write.lba << shift;
    let end = (write.lba + u64::from(write.blocks)) << shift;
    for at in (start..end).step_by(SECTOR as usize) {
        if !alive(at >> shift) || !sector_survives(seed, seq, at / SECTOR) {
            continue;
        }
        match &write.data {
            Data::Bytes(data) => {
                let from = (at - start) as usize;
                store.write(at, &data[from..from + SECTOR as usize])?;
            }
            Data::Zeroes { deallocate } => store.zero(at, SECTOR, *deallocate)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn block(store: &mut Store, lba: u64) -> u8 {
        let mut data = [0; 512];
        store.read(lba * 512, &mut data).unwrap();
        assert!(data.iter().all(|&b| b == data[0]));
        data[0]
    }

    #[test]
    fn fua_beats_older_logged_writes() {
        let mut store = Store::memory();
        let mut cache = Cache::new(9, 1 << 20);
        cache.write(&mut store, 0, vec![1; 2048]).unwrap();
        store.write(512, &[2; 512]).unwrap();
        cache.supersede(1, 1);
        assert_eq!(cache.blocks(0, 4).map(|(b, _)| b).collect::<Vec<_>>(), [0, 2, 3]);
        cache.flush(&mut store).unwrap();
        assert_eq!((0..4).map(|b| block(&mut store, b)).collect::<Vec<_>>(), [1, 2, 1, 1]);
    }

    #[test]
    fn eviction_keeps_order_and_limit() {
        let mut store = Store::memory();
        let mut cache = Cache::new(9, 3 * (ENTRY_COST + 512 + INDEX_COST));
        cache.write(&mut store, 5, vec![1; 512]).unwrap();
        store.write(5 * 512, &[2; 512]).unwrap();
        cache.supersede(5, 1);
        for (lba, value) in [(5, 3), (6, 4), (5, 5)] {
            cache.write(&mut store, lba, vec![value; 512]).unwrap();
        }
        // The first write was evicted and must not undo the superseding one.
        assert_eq!(block(&mut store, 5), 2);
        assert_eq!(cache.log.len(), 3);
        assert!(cache.superseded.is_empty());
        assert_eq!(cache.blocks(5, 1).next().unwrap().1.unwrap()[0], 5);
        cache.write(&mut store, 7, vec![6; 512]).unwrap();
        assert_eq!(block(&mut store, 5), 3);
        cache.flush(&mut store).unwrap();
        assert_eq!((5..8).map(|b| block(&mut store, b)).collect::<Vec<_>>(), [5, 4, 6]);
        assert_eq!(cache.bytes, 0);
    }

    #[test]
    fn the_log_is_bounded_whatever_is_logged() {
        let mut store = Store::memory();
        let mut cache = Cache::new(9, 10_000);
        for i in 0..1000 {
            cache.zero(&mut store, i, 0, true).unwrap();
            cache.zero(&mut store, i, 1, true).unwrap();
            cache.write(&mut store, i, vec![1; 512]).unwrap();
            assert!(cache.log.len() < 200 && cache.bytes <= 10_000);
            assert!(cache.newest.len() <= cache.log.len());
        }
    }

    /// After a cut each sector holds its last durable value or a later one; every such outcome
    /// occurs; and values older than the last durable one never come back.
    #[test]
    fn power_cut_outcomes() {
        let mut outcomes = std::collections::BTreeSet::new();
        let mut torn = 0;
        for seed in 0..200 {
            let mut store = Store::memory();
            let mut cache = Cache::new(12, 1 << 20);
            cache.write(&mut store, 0, vec![1; 4096]).unwrap();
            cache.flush(&mut store).unwrap();
            cache.write(&mut store, 0, vec![2; 4096]).unwrap();
            store.write(0, &[3; 4096]).unwrap();
            cache.supersede(0, 1);
            cache.write(&mut store, 0, vec![4; 4096]).unwrap();
            cache.zero(&mut store, 0, 1, true).unwrap();
            cache.power_cut(&mut store, seed).unwrap();
            assert!(cache.is_empty());
            let mut data = [9; 4096];
            store.read(0, &mut data).unwrap();
            for sector in data.chunks(512) {
                assert!(sector.iter().all(|&b| b == sector[0]));
                outcomes.insert(sector[0]);
            }
            torn += u32::from(data.iter().any(|&b| b != data[0]));
        }
        assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), [0, 3, 4]);
        assert!(torn > 20, "{torn}");
    }

    /// Through any mix of writes the cache reads as if it were not there.
    #[test]
    fn transparent() {
        let mut rng = Rng::new(3);
        for limit in [0, 4 << 10, 1 << 20] {
            let mut store = Store::memory();
            let mut cache = Cache::new(9, limit);
            let mut expect = [0u8; 64];
            for round in 0..2000u32 {
                let lba = rng.below(60) as u64;
                let n = 1 + rng.below(4);
                let value = rng.next() as u8;
                let range = lba as usize..lba as usize + n;
                match rng.below(8) {
                    0 => {
                        cache.zero(&mut store, lba, n as u32, false).unwrap();
                        expect[range].fill(0);
                    }
                    1 => {
                        store.write(lba * 512, &vec![value; n * 512]).unwrap();
                        cache.supersede(lba, n as u32);
                        expect[range].fill(value);
                    }
                    2 => cache.flush(&mut store).unwrap(),
                    _ => {
                        cache.write(&mut store, lba, vec![value; n * 512]).unwrap();
                        expect[range].fill(value);
                    }
                }
                let mut seen = [0u8; 64];
                for b in 0..64 {
                    seen[b as usize] = block(&mut store, b);
                }
                for (b, data) in cache.blocks(0, 64) {
                    seen[b as usize] = data.map_or(0, |d| d[0]);
                }
                assert_eq!(seen, expect, "round {round} limit {limit}");
            }
        }
    }
}
