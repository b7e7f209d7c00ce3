//! Reads that do not go straight down: several runs, zeroes, compressed clusters, parts.

use block::{Flags, MAX_SEGS, Op, SegList, Status};
use dma::Seg;

use super::io::Child;
use super::resolve::Source;
use super::shared::{Key, META, Shared};
use super::stack::LayerFormat;
use super::workers::unpack;
use crate::map::{Kind, Word};

/// Decompressed clusters kept for the reads that follow in the same cluster.
const KEPT: usize = 4;

/// The clusters that were decompressed last: (layer, host offset, contents). Nothing is compressed
/// while an image is open, so that what is at a place never becomes something else.
#[derive(Default)]
pub(super) struct Decompressed {
    kept: Vec<(usize, u64, Vec<u8>)>,
    /// Being decompressed: (layer, host offset).
    under_way: Vec<(usize, u64)>,
}

impl Decompressed {
    fn get(&self, layer: usize, host: u64) -> Option<&[u8]> {
        self.kept.iter().find(|c| c.0 == layer && c.1 == host).map(|c| &c.2[..])
    }

    fn put(&mut self, layer: usize, host: u64, data: Vec<u8>) {
        if self.kept.len() == KEPT {
            self.kept.remove(0);
        }
        self.kept.push((layer, host, data));
    }
}

impl Shared {
    /// Reads `[offset, offset + len)` of the guest's disk into `segs`, whatever it is made of.
    /// Bytes behind the end of the disk read as zeroes.
    pub(super) async fn read(&self, slot: u16, offset: u64, len: u64, segs: &[Seg]) -> Status {
        match self.read_runs(slot, offset, len, segs).await {
            // What is in flight writes into the request's buffers: it must end first.
            Err(status) => {
                let _ = self.wait(slot).await;
                status
            }
            Ok(()) => self.wait(slot).await,
        }
    }

    async fn read_runs(
        &self,
        slot: u16,
        offset: u64,
        len: u64,
        segs: &[Seg],
    ) -> Result<(), Status> {
        let bits = self.geometry.unit_bits();
        let size = self.geometry.unit_size();
        let end = (offset + len).min(self.geometry.size().next_multiple_of(512));
        self.zero_memory(segs, end - offset, offset + len - end)?;
        let mut at = offset;
        while at < end {
            self.wait_if_crowded(slot).await?;
            let unit = at >> bits;
            let word = match self.map.lookup(unit) {
                w if w.kind() == Kind::Absent => {
                    // Loading reads too, and waits for all that is in flight for this slot.
                    check(self.wait(slot).await)?;
                    self.word(slot, unit).await?
                }
                w => w,
            }
            .for_reads();
            let mut to = end.min((unit + 1) << bits);
            match word.kind() {
                Kind::Mapped => {
                    // As far as they lie side by side.
                    let mut last = word;
                    while to < end {
                        let next = self.map.lookup(to >> bits).for_reads();
                        if !last.continued_by(next, size) {
                            break;
                        }
                        last = next;
                        to = end.min(to + size);
                    }
                    let host = word.host() + (at & (size - 1));
                    self.start_read(
                        slot,
                        usize::from(word.layer()),
                        host,
                        segs,
                        at - offset,
                        to - at,
                    )?;
                }
                Kind::Zero | Kind::Hole => self.zero_memory(segs, at - offset, to - at)?,
                Kind::Compressed | Kind::Split => {
                    check(self.wait(slot).await)?;
                    if word.kind() == Kind::Compressed {
                        // All subclusters are.
                        let size = self.geometry.cluster_size();
                        to = end.min(self.geometry.cluster_start(at) + size);
                    }
                    let (source, run) = self.resolve(slot, at, to - at).await?;
                    // A layer that ends within a sector: zeroes follow.
                    let whole = run.next_multiple_of(512);
                    to = at + whole;
                    match source {
                        Source::Zero => self.zero_memory(segs, at - offset, run)?,
                        Source::Data { layer, host } => {
                            self.start_read(slot, layer, host, segs, at - offset, whole)?;
                            if whole > run {
                                check(self.wait(slot).await)?;
                            }
                        }
                        Source::Compressed { layer, host, len, from } => {
                            self.decompress(slot, layer, host, len).await?;
                            self.copy_out(layer, host, from, segs, at - offset, run)?;
                        }
                    }
                    self.zero_memory(segs, at - offset + run, whole - run)?;
                }
                Kind::Corrupt | Kind::Absent => return Err(Status::Corrupt),
            }
            at = to;
        }
        Ok(())
    }

    fn start_read(
        &self,
        slot: u16,
        layer: usize,
        host: u64,
        segs: &[Seg],
        from: u64,
        len: u64,
    ) -> Result<(), Status> {
        let mut part = SegList::EMPTY;
        if !part.push_part(segs, from, len) {
            return Err(Status::Invalid);
        }
        let port = self.stack.layers[layer].data_port();
        let child = Child { port, op: Op::Read, flags: Flags::NONE, offset: host, len, segs: part };
        self.start(slot, child);
        Ok(())
    }

    /// Zeroes `len` bytes of the request's memory from `from` on.
    fn zero_memory(&self, segs: &[Seg], from: u64, len: u64) -> Result<(), Status> {
        let mut part = SegList::EMPTY;
        if !part.push_part(segs, from, len) {
            return Err(Status::Invalid);
        }
        for seg in part.as_slice() {
            let region = self.region(seg).ok_or(Status::Invalid)?;
            region.zero(seg.offset() as usize, seg.len() as usize);
        }
        Ok(())
    }

    /// Copies from a decompressed cluster to the request's memory.
    fn copy_out(
        &self,
        layer: usize,
        host: u64,
        inside: u64,
        segs: &[Seg],
        from: u64,
        len: u64,
    ) -> Result<(), Status> {
        let kept = self.decompressed.borrow();
        let data = kept.get(layer, host).ok_or(Status::Corrupt)?;
        let mut part = SegList::EMPTY;
        if !part.push_part(segs, from, len) {
            return Err(Status::Invalid);
        }
        let mut at = inside as usize;
        for seg in part.as_slice() {
            let next = at + seg.len() as usize;
            let bytes = data.get(at..next).ok_or(Status::Corrupt)?;
            self.region(seg).ok_or(Status::Invalid)?.write_seg(seg, bytes);
            at = next;
        }
        Ok(())
    }

    /// Makes sure that a compressed cluster is among those kept.
    async fn decompress(&self, slot: u16, layer: usize, host: u64, len: u32) -> Result<(), Status> {
        let key = (layer, host);
        while self.decompressed.borrow().get(layer, host).is_none() {
            if self.decompressed.borrow().under_way.contains(&key) {
                self.park(slot, Key::Packed(layer, host)).await;
                continue;
            }
            self.decompressed.borrow_mut().under_way.push(key);
            let result = self.decompress_now(slot, layer, host, len).await;
            self.decompressed.borrow_mut().under_way.retain(|k| *k != key);
            self.unpark(Key::Packed(layer, host));
            return result;
        }
        Ok(())
    }

    async fn decompress_now(
        &self,
        slot: u16,
        layer: usize,
        host: u64,
        len: u32,
    ) -> Result<(), Status> {
        let l = &self.stack.layers[layer];
        let LayerFormat::Qcow { geometry, compression, .. } = &l.format else {
            return Err(Status::Corrupt);
        };
        let packed = self.read_packed(slot, layer, host, len).await?;
        let size = geometry.cluster_size() as usize;
        let sent = match self.unpacker.borrow().as_ref() {
            Some(unpacker) => Ok(unpacker.send(*compression, packed, size)),
            None => Err(packed),
        };
        let unpacked = match sent {
            Ok(reply) => self.answer(slot, || reply.pop()).await,
            Err(packed) => unpack(&mut self.decompressor.borrow_mut(), *compression, &packed, size),
        };
        let data = unpacked.map_err(|e| {
            self.complain(layer, format_args!("compressed cluster at {host:#x}: {e}"));
            Status::Corrupt
        })?;
        self.decompressed.borrow_mut().put(layer, host, data);
        Ok(())
    }

    /// Reads `len` bytes from `host` on, by way of metadata buffers: the caller may hold a data buffer
    /// already, and whoever waits for a second one may wait for ever.
    async fn read_packed(
        &self,
        slot: u16,
        layer: usize,
        host: u64,
        len: u32,
    ) -> Result<Vec<u8>, Status> {
        let l = &self.stack.layers[layer];
        let mut at = host & !511;
        // An entry counts whole sectors: the last ones may lie behind the file's end.
        let to = (host + u64::from(len)).next_multiple_of(512).min(l.capacity);
        let skip = (host - at) as usize;
        let mut packed = Vec::with_capacity(skip + len as usize);
        while at < to {
            let mut bufs = vec![self.meta_buf(slot).await];
            let mut segs = SegList::EMPTY;
            loop {
                let left = (to - at).saturating_sub(segs.bytes());
                let Some(buf) = bufs.last() else { break };
                let seg = buf.head(left.min(META as u64) as u32).unwrap_or(Seg::NONE);
                let full = !segs.push(seg) || segs.bytes() >= to - at || bufs.len() == MAX_SEGS;
                match if full { None } else { self.try_meta_buf() } {
                    Some(buf) => bufs.push(buf),
                    None => break,
                }
            }
            let status = self.io(slot, l.port, Op::Read, at, segs).await;
            for seg in segs.as_slice() {
                let old = packed.len();
                packed.resize(old + seg.len() as usize, 0);
                self.meta_region().read_seg(seg, &mut packed[old..]);
            }
            bufs.drain(..).for_each(|b| self.give_meta(b));
            check(status)?;
            at += segs.bytes();
        }
        packed.resize(packed.len().max(skip), 0);
        packed.drain(..skip);
        Ok(packed)
    }

    /// Whether a unit reads as zeroes by its word alone.
    pub(super) fn reads_zero(word: Word) -> bool {
        matches!(word.kind(), Kind::Zero | Kind::Hole)
    }
}

/// A status as a result.
pub(super) fn check(status: Status) -> Result<(), Status> {
    if status.is_ok() { Ok(()) } else { Err(status) }
}
