//! Reads that do not go straight down: several runs, zeroes, compressed clusters, parts.

use block::{Flags, Op, SegList, Status};
use dma::Seg;

use super::io::Child;
use super::resolve::Source;
use super::shared::Shared;
use super::stack::LayerFormat;
use crate::map::{Kind, Word};

/// Decompressed clusters kept for the reads that follow in the same cluster.
const KEPT: usize = 4;

/// The clusters that were decompressed last: (layer, host offset, contents).
#[derive(Default)]
pub(super) struct Decompressed(Vec<(usize, u64, Vec<u8>)>);

impl Decompressed {
    fn get(&self, layer: usize, host: u64) -> Option<&[u8]> {
        self.0.iter().find(|c| c.0 == layer && c.1 == host).map(|c| &c.2[..])
    }

    fn put(&mut self, layer: usize, host: u64, data: Vec<u8>) {
        if self.0.len() == KEPT {
            self.0.remove(0);
        }
        self.0.push((layer, host, data));
    }

    /// Forgets all: a compressed cluster of layer 0 is gone and its place may be used again.
    pub(super) fn clear(&mut self) {
        self.0.clear();
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
        let bits = self.geometry.cluster_bits();
        let size = self.geometry.cluster_size();
        let end = (offset + len).min(self.geometry.size());
        self.zero_memory(segs, end - offset, offset + len - end)?;
        let mut at = offset;
        while at < end {
            self.wait_if_crowded(slot).await?;
            let cluster = at >> bits;
            let word = match self.map.lookup(cluster) {
                w if w.kind() == Kind::Absent => {
                    // Loading reads too, and waits for all that is in flight for this slot.
                    check(self.wait(slot).await)?;
                    self.word(slot, cluster).await?
                }
                w => w,
            }
            .unclaimed();
            let mut to = end.min((cluster + 1) << bits);
            match word.kind() {
                Kind::Mapped => {
                    // As far as the clusters lie side by side.
                    let mut last = word;
                    while to < end {
                        let next = self.map.lookup(to >> bits).unclaimed();
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
                    let (source, run) = self.resolve(slot, at, to - at).await?;
                    to = at + run;
                    match source {
                        Source::Zero => self.zero_memory(segs, at - offset, run)?,
                        Source::Data { layer, host } => {
                            self.start_read(slot, layer, host, segs, at - offset, run)?;
                        }
                        Source::Compressed { layer, host, len, from } => {
                            self.decompress(slot, layer, host, len).await?;
                            self.copy_out(layer, host, from, segs, at - offset, run)?;
                        }
                    }
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
        let port = self.stack.layers[layer].port;
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
        if self.decompressed.borrow().get(layer, host).is_some() {
            return Ok(());
        }
        let l = &self.stack.layers[layer];
        let LayerFormat::Qcow { geometry, compression, .. } = &l.format else {
            return Err(Status::Corrupt);
        };
        let (from, to) = (host & !511, (host + u64::from(len)).next_multiple_of(512));
        let mut packed = Vec::with_capacity((to - from) as usize);
        let buf = self.data_buf(slot).await;
        let mut status = Status::Ok;
        while from + (packed.len() as u64) < to && status.is_ok() {
            let at = from + packed.len() as u64;
            let n = (to - at).min(u64::from(buf.seg().len()));
            let seg = buf.head(n as u32).unwrap_or(Seg::NONE);
            let mut segs = SegList::EMPTY;
            let _one = segs.push(seg);
            status = self.io(slot, l.port, Op::Read, at, segs).await;
            let old = packed.len();
            packed.resize(old + n as usize, 0);
            self.data_region().read_seg(&seg, &mut packed[old..]);
        }
        self.give_data(buf);
        check(status)?;
        let packed = packed.get((host - from) as usize..).unwrap_or(&[]);
        let size = geometry.cluster_size() as usize;
        let mut data = vec![0; size];
        let unpacked = self.decompressor.borrow_mut().decode(*compression, packed, &mut data);
        unpacked.map_err(|e| {
            log::error!("{}: compressed cluster at {host:#x}: {e}", l.name);
            Status::Corrupt
        })?;
        let mut kept = self.decompressed.borrow_mut();
        if kept.get(layer, host).is_none() {
            kept.put(layer, host, data);
        }
        Ok(())
    }

    /// Whether a cluster reads as zeroes by its word alone.
    pub(super) fn reads_zero(word: Word) -> bool {
        matches!(word.kind(), Kind::Zero | Kind::Hole)
    }
}

/// A status as a result.
pub(super) fn check(status: Status) -> Result<(), Status> {
    if status.is_ok() { Ok(()) } else { Err(status) }
}
