//! Changed blocks: what backups ask for.
//!
//! A node's image holds what was written since it was put above the one below it, so what two snapshots, or a
//! snapshot and its disk, may differ in is what is held by the images between them and what they have in common:
//! nothing else has to be recorded while guests write, and there is nothing that a crash could leave behind or ahead
//! of the data.
//!
//! Two things take images away: a merge, and the end of a snapshot's data. So a snapshot whose data is destroyed
//! leaves a *record*: a small volume with an image of the disk's size that holds no data, but a persistent bitmap
//! ([`BITMAP`], for `qemu-img info` as for us). A record stands *at* a node, which shows what the snapshot showed but
//! for the blocks whose bits are set. Before a merge into that node is committed the bits of all that the upper image
//! holds are set and on disk ([`note_held`]); if the merge does not come to its end some are set too many, which is
//! never wrong. For the same reason a disk is not merged into a node where a record stands: it goes on in an image of
//! its own until it is frozen by the next snapshot.
//!
//! So what is said covers all that differs. Where that cannot be told, as between disks that have nothing in common,
//! it is an error.

use block::Storage;
use qcow::edit::mark_held;
use qcow::open::{BackingRef, Chain, ChainOptions, Format, Opened};
use qcow::{Bitmap, ChainReader, ImageMeta, Mode, Source};
use volume::{Author, Id, Shape};

use crate::change::{lv_name, put, remove};
use crate::error::{Error, Result, refused};
use crate::repository::{NewImage, Repository};
use crate::state::{Node, Record};

/// Bytes of a block.
pub const BLOCK: u64 = 64 << 10;

/// The name of a record's bitmap.
pub const BITMAP: &str = "changed";

/// Bytes of a record's bits at most: those of disks of 32 TiB stand for a block each.
const MOST_BITS: u64 = 64 << 20;

/// Bytes of the answer about a range of a disk at most; 20 TiB.
const MOST_ANSWER: u64 = 40 << 20;

/// What has to be read to know in which blocks two differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Volumes with images: blocks that they hold themselves.
    pub images: Vec<String>,
    /// Volumes of records: blocks whose bits are set.
    pub records: Vec<String>,
    /// Bytes of the first one's disk.
    pub from: u64,
    /// Bytes of the second one's disk.
    pub to: u64,
}

/// Bytes that one bit of a record stands for.
fn granularity(size: u64) -> u64 {
    let mut granularity = BLOCK;
    while size.div_ceil(granularity) > MOST_BITS * 8 {
        granularity *= 2;
    }
    granularity
}

/// Bytes that a record of a disk needs at most: the image's own tables, and the bits twice, as they are never
/// written in place.
fn record_bytes(size: u64) -> u64 {
    let tables = size / (64 << 10) / 8192 * 8;
    let bits = size.div_ceil(granularity(size)) / 8;
    tables + 2 * bits + (2 << 20)
}

/// The image in a volume, without those below it.
fn alone<S: Storage>(storage: S, lv: &str) -> Result<ChainReader<S>> {
    let opened = Opened { storage, path: None, name: lv.to_owned(), id: None };
    let options =
        ChainOptions { format: Some(Format::Qcow2), top_only: true, ..Default::default() };
    let closed = &mut |b: &BackingRef| {
        Err(qcow::Error::refused(&b.named_by, "its backing file stays closed"))
    };
    Ok(ChainReader::new(Chain::open(opened, options, closed)?))
}

/// Notes in a record, durably, that whatever an image holds may differ from what the record is of.
///
/// # Errors
/// If the record's bitmap cannot be used, the image not be read, or a device fails. The record is as it was then.
pub fn note_held<S: Storage>(
    (record, record_lv): (&mut dyn Storage, &str),
    (image, lv): (S, &str),
) -> Result<()> {
    Ok(mark_held(record, record_lv, BITMAP, &mut alone(image, lv)?)?)
}

impl<S: Storage> Repository<S> {
    /// Has changes of a disk told, or not any more.
    ///
    /// # Errors
    /// If there is no such disk, or it is a snapshot, which stays as its disk was.
    pub fn track(&mut self, key: &str, on: bool, author: &Author) -> Result<()> {
        let (disk, _) = self.known(key)?;
        if disk.read_only && disk.cbt != on {
            return refused(format!("{key} is a snapshot: its disk tells of changes, or does not"));
        }
        self.change(key, "changed blocks", author, |disk| disk.cbt = on)
    }

    /// Takes a snapshot's data away; what is left is a record.
    ///
    /// # Errors
    /// If there is no such snapshot, changes of its disk were not told, or there is no space.
    pub fn destroy_data(&mut self, key: &str, author: &Author) -> Result<()> {
        let (disk, node) = self.known(key)?;
        if node.record.is_some() {
            return Ok(());
        }
        if !disk.read_only || !disk.cbt {
            return refused(format!(
                "{key} is no snapshot of a disk whose changes are told: all of it can be destroyed"
            ));
        }
        let state = self.state().clone();
        let stays = state.children(&node.lv) > 0;
        let record = Node {
            lv: lv_name(),
            parent: None,
            onto: None,
            disk: Some(disk),
            record: Some(Record { at: stays.then(|| node.lv.clone()) }),
            ..node.clone()
        };
        let image = NewImage {
            lv: record.lv.clone(),
            options: qcow::create::CreateOptions::new(node.size),
            bitmap: Some((BITMAP, granularity(node.size))),
        };
        self.commit(author, &format!("destroy the data of {key}"), &[image], |vg| {
            let extents = vg.extents_for(record_bytes(record.size));
            let id = Id::random().map_err(|e| Error::Refused(format!("random numbers: {e}")))?;
            vg.create_lv(id, &record.lv, extents, Shape::LINEAR, author)?;
            put(vg, &record)?;
            match stays {
                true => put(vg, &Node { disk: None, ..node }),
                false => remove(vg, &state, &node),
            }
        })
    }

    /// The records that stand at a node.
    pub fn records_at(&self, lv: &str) -> impl Iterator<Item = &Node> {
        let at = move |node: &&Node| {
            node.record.as_ref().is_some_and(|record| record.at.as_deref() == Some(lv))
        };
        self.state().nodes.values().filter(at)
    }

    /// What has to be read to know in which blocks two snapshots differ, or a snapshot and a disk.
    ///
    /// # Errors
    /// If one of them is not there; [`Error::NoChanges`] if changes of one are not told, or nothing says how they
    /// are related.
    pub fn difference(&self, from: &str, to: &str) -> Result<Difference> {
        let unknown = |why: &str| {
            let (from, to, why) = (from.to_owned(), to.to_owned(), why.to_owned());
            Error::NoChanges { from, to, why }
        };
        let both = [self.disk(from)?, self.disk(to)?];
        if from == to {
            return Err(unknown("they are one"));
        }
        if !both.iter().all(|(disk, _)| disk.cbt) {
            return Err(unknown("changed block tracking is not enabled for both"));
        }
        if !both[0].0.read_only {
            return Err(unknown("the first one is no snapshot"));
        }
        let mut records = Vec::new();
        let [mut left, mut right] = both.map(|(_, node)| {
            let shown = match &node.record {
                None => Some(&node.lv),
                Some(record) => {
                    records.push(node.lv.clone());
                    record.at.as_ref()
                }
            };
            shown.map_or(Vec::new(), |lv| self.state().chain(lv).collect())
        });
        let mut in_common = false;
        while let (Some(a), Some(b)) = (left.last(), right.last())
            && a.lv == b.lv
        {
            in_common = true;
            left.pop();
            right.pop();
        }
        if !in_common {
            return Err(unknown("they have nothing in common any more"));
        }
        let images = left.into_iter().chain(right).map(|node| node.lv.clone()).collect();
        Ok(Difference { images, records, from: both[0].1.size, to: both[1].1.size })
    }
}

/// Blocks of a range of a disk that may have changed: a bit for each, the most significant one of a byte first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Blocks {
    /// Number of the first block.
    first: u64,
    /// How many there are.
    count: u64,
    bytes: Vec<u8>,
}

impl Blocks {
    /// Those of bytes `offset` to `offset + len` of the second one's disk, as far as they are on it. Those are set
    /// that the first one did not have.
    ///
    /// # Errors
    /// If these are too many.
    pub fn new(difference: &Difference, offset: u64, len: u64) -> Result<Blocks> {
        let (first, size) = (offset / BLOCK, difference.to);
        let count = offset.saturating_add(len).min(size).div_ceil(BLOCK).saturating_sub(first);
        // Backup programs read words of 32 bits.
        let bytes = count.div_ceil(32) * 4;
        if bytes > MOST_ANSWER {
            return refused(format!(
                "changes of {len} bytes: at most {} can be asked for at a time",
                MOST_ANSWER * 8 * BLOCK
            ));
        }
        let mut blocks = Blocks { first, count, bytes: vec![0; bytes as usize] };
        blocks.add(difference.from, size.saturating_sub(difference.from));
        Ok(blocks)
    }

    /// Adds the blocks of a range of bytes, as far as they are in here.
    pub fn add(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let from = (offset / BLOCK).max(self.first) - self.first;
        let to =
            offset.saturating_add(len).div_ceil(BLOCK).saturating_sub(self.first).min(self.count);
        let mut at = from;
        while at < to {
            let byte = &mut self.bytes[(at / 8) as usize];
            if at.is_multiple_of(8) && to - at >= 8 {
                *byte = 0xff;
                at += 8;
            } else {
                *byte |= 0x80 >> (at % 8);
                at += 1;
            }
        }
    }

    /// The bytes that all of them stand for.
    fn range(&self) -> std::ops::Range<u64> {
        self.first * BLOCK..(self.first + self.count) * BLOCK
    }

    /// Adds what the image in a volume itself holds.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn add_image<S: Storage>(&mut self, storage: S, lv: &str) -> Result<()> {
        let mut reader = alone(storage, lv)?;
        Ok(self.add_held(&mut reader)?)
    }

    /// Adds what the uppermost layer of a chain itself holds.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn add_held<S: Storage>(&mut self, reader: &mut ChainReader<S>) -> qcow::Result<()> {
        let range = self.range();
        let end = range.end.min(reader.size());
        let mut at = range.start;
        while at < end {
            let (len, source) = reader.top_run(at, end - at)?;
            if source != Source::Unallocated {
                self.add(at, len);
            }
            at += len;
        }
        Ok(())
    }

    /// Adds what a record in a volume says.
    ///
    /// # Errors
    /// If its bitmap cannot be read, or means nothing.
    pub fn add_record(&mut self, storage: &mut dyn Storage, lv: &str) -> Result<()> {
        let image = ImageMeta::open(storage, lv, Mode::Read)?;
        let mut bitmap = Bitmap::open(storage, &image, BITMAP)?;
        let range = self.range();
        let mut at = range.start;
        while at < range.end
            && let Some(run) = bitmap.run(storage, at, range.end - at)?
        {
            if run.dirty {
                self.add(run.offset, run.len);
            }
            at = run.offset + run.len;
        }
        Ok(())
    }

    /// A bit for each block, the most significant one of a byte first; whole words of 32 bits.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn is_set(&self, block: u64) -> bool {
        let byte = self.bytes.get((block / 8) as usize).copied().unwrap_or(0);
        byte & (0x80 >> (block % 8)) != 0
    }

    /// Whether the block with this byte of the disk has changed, and for how many bytes from there on that is so, at
    /// most `most` of them.
    pub fn run(&self, offset: u64, most: u64) -> (u64, bool) {
        let first = (offset / BLOCK).saturating_sub(self.first);
        let is = self.is_set(first);
        let whole = if is { 0xff } else { 0 };
        let mut at = first + 1;
        while at < self.count && (at + self.first) * BLOCK - offset < most {
            if at.is_multiple_of(8) && self.bytes[(at / 8) as usize] == whole {
                at += 8;
            } else if self.is_set(at) == is {
                at += 1;
            } else {
                break;
            }
        }
        (((at + self.first) * BLOCK).saturating_sub(offset).min(most), is)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(blocks: u64) -> Blocks {
        let size = blocks * BLOCK;
        let difference = Difference { images: vec![], records: vec![], from: size, to: size };
        Blocks::new(&difference, 0, u64::MAX).unwrap()
    }

    #[test]
    fn bits_are_where_backup_programs_look_for_them() {
        let mut b = blocks(70);
        b.add(0, 1);
        b.add(9 * BLOCK - 1, 2);
        b.add(16 * BLOCK, 20 * BLOCK);
        b.add(69 * BLOCK + 5, u64::MAX);
        b.add(u64::MAX, 1);
        b.add(40 * BLOCK, 0);
        let want = [0x80, 0xc0, 0xff, 0xff, 0xf0, 0, 0, 0, 4, 0, 0, 0];
        assert_eq!(b.bytes(), want);
        let mut runs = Vec::new();
        let mut at = 0;
        while at < 70 * BLOCK {
            let (len, is) = b.run(at, 70 * BLOCK - at);
            runs.push((len / BLOCK, is));
            at += len;
        }
        let want =
            [(1, true), (7, false), (2, true), (6, false), (20, true), (33, false), (1, true)];
        assert_eq!(runs, want);
        assert_eq!(b.run(BLOCK + 512, 1024), (1024, false));
        assert_eq!(b.run(BLOCK - 512, 1024), (512, true));
    }

    #[test]
    fn a_part_of_a_disk_and_one_that_has_grown() {
        let (from, to) = (10 * BLOCK, 20 * BLOCK);
        let difference = Difference { images: vec![], records: vec![], from, to };
        let mut part = Blocks::new(&difference, 8 * BLOCK + 7, 4 * BLOCK).unwrap();
        part.add(0, 9 * BLOCK);
        assert_eq!(part.bytes(), [0b1011_1000, 0, 0, 0]);
        assert_eq!(Blocks::new(&difference, to, 1).unwrap().bytes(), [0; 0]);
        assert_eq!(Blocks::new(&difference, u64::MAX, 9).unwrap().bytes(), [0; 0]);
        let huge = Difference { to: 1 << 50, ..difference };
        assert!(Blocks::new(&huge, 0, u64::MAX).is_err());
        assert!(Blocks::new(&huge, 1 << 49, 20 << 40).is_ok());
    }

    #[test]
    fn records_have_room_for_their_bits() {
        assert_eq!((granularity(1), granularity(32 << 40)), (BLOCK, BLOCK));
        assert_eq!(granularity((32 << 40) + 1), 2 * BLOCK);
        assert_eq!(granularity(1 << 50), 32 * BLOCK);
        assert_eq!(record_bytes(2 << 40), (4096 * 8) + (8 << 20) + (2 << 20));
    }
}
