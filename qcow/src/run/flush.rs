//! Metadata goes to disk in batches, in an order that is right at any power cut.
//!
//! A batch seals what has been changed so far, then writes
//!
//! 1. refcount blocks (what was allocated is counted; nothing freed is, yet),
//! 2. a flush, if the device has a volatile cache, and one of the external data file's: now the
//!    counts, the data and any new, zeroed L2 tables are durable,
//! 3. L2 table parts and L1 entries, which only point at what is durable,
//! 4. a flush again.
//!
//! Only then does anything count as written, and are the clusters that the batch's L2 entries let go
//! of handed to [`super::reclaim`], which lowers their refcounts in a later batch. All flushes of
//! guests that arrive before a batch begins share it. So on stable storage refcount ≥ references
//! holds at every instant. A step that fails ends the batch, and the next one does all of it again.

use block::{Flags, Op, SegList, Status};
use dma::{Buf, Seg};

use super::io::Child;
use super::read::check;
use super::shared::{Key, META, Shared};

/// L2 slices kept in memory before a writer has to write back.
pub(super) const SLICES_MAX: usize = 2048;

/// Clean slices kept for the next changes in them.
const SLICES_KEEP: usize = 512;

/// Which batches have begun and ended.
#[derive(Default)]
pub(super) struct Batches {
    running: bool,
    begun: u64,
    ended: u64,
    /// How the last one ended.
    last: Option<Status>,
}

impl Shared {
    /// A guest's flush: everything that completed before it becomes durable.
    pub(super) async fn flush(&self, slot: u16) -> Status {
        if !self.info.read_only {
            return self.flush_tables(slot).await;
        }
        Status::Ok
    }

    /// Runs a batch that begins after this call, or joins one that others wait for.
    pub(super) async fn flush_tables(&self, slot: u16) -> Status {
        let wanted = self.batches.borrow().begun + 1;
        loop {
            let (running, ended) = {
                let b = self.batches.borrow();
                (b.running, b.ended)
            };
            if ended >= wanted {
                return self.batches.borrow().last.unwrap_or(Status::Ok);
            }
            if running {
                self.park(slot, Key::Batch).await;
                continue;
            }
            {
                let mut b = self.batches.borrow_mut();
                b.running = true;
                b.begun += 1;
            }
            let status = self.batch(slot).await;
            {
                let mut b = self.batches.borrow_mut();
                b.running = false;
                b.ended = b.begun;
                b.last = Some(status);
            }
            self.unpark(Key::Batch);
            if status.is_ok() {
                // Not part of the flush's promise: its failure only delays reuse.
                self.reclaim(slot).await;
            }
            return status;
        }
    }

    /// Whether anything in memory is not on disk.
    pub(super) fn is_dirty(&self) -> bool {
        self.tables.borrow().is_dirty()
            || self.let_go.borrow().is_anything()
            || self.alloc.borrow().dirty_slices() > 0
    }

    async fn batch(&self, slot: u16) -> Status {
        self.counters.batches.set(self.counters.batches.get() + 1);
        let pages = self.tables.borrow_mut().seal();
        let parts = self.tables.borrow().dirty_l1_parts();
        let frees = self.let_go.borrow_mut().seal();
        match self.write_batch(slot, &pages, &parts).await {
            Ok(()) => {
                let mut tables = self.tables.borrow_mut();
                tables.written(&pages, &parts);
                tables.trim(SLICES_KEEP);
                self.retire(frees);
                Status::Ok
            }
            Err(status) => {
                self.let_go.borrow_mut().unseal(frees);
                status
            }
        }
    }

    async fn write_batch(&self, slot: u16, pages: &[u64], parts: &[usize]) -> Result<(), Status> {
        // In one go with the sealing: what is sealed is counted in these.
        let refs = self.alloc.borrow_mut().begin_write()?;
        let pieces = refs.iter().map(|(_, offset, bytes)| (*offset, bytes.clone()));
        self.write_meta(slot, pieces, Flags::NONE).await?;
        let changes = !(refs.is_empty() && pages.is_empty() && parts.is_empty());
        check(self.flush_both(slot, changes).await)?;
        self.alloc.borrow_mut().end_write(&refs);
        if pages.is_empty() && parts.is_empty() {
            return Ok(());
        }
        let slices = pages.iter().map(|&page| {
            let bytes = self.tables.borrow().slice_bytes(page);
            (self.slice_offset(page), bytes)
        });
        self.write_meta(slot, slices, Flags::NONE).await?;
        let l1 = parts.iter().map(|&part| {
            let offset = self.stack.top.l1_offset + (part * META) as u64;
            (offset, self.tables.borrow().l1_bytes(part))
        });
        self.write_meta(slot, l1, Flags::NONE).await?;
        check(self.device_flush(slot).await)
    }

    /// Where a page's part of its L2 table stands on disk.
    fn slice_offset(&self, page: u64) -> u64 {
        let guest = self.page_start(page);
        let raw = self.tables.borrow().l1(self.geometry.l1_index(guest));
        let table = crate::format::L1Entry::decode(raw, &self.geometry).map_or(0, |e| e.offset);
        table + self.geometry.l2_index(guest) as u64 * self.geometry.l2_entry_size()
    }

    /// Writes metadata parts (offset, bytes): neighbours that follow each other go in one request.
    /// Waits for all of it.
    pub(super) async fn write_meta(
        &self,
        slot: u16,
        parts: impl Iterator<Item = (u64, Vec<u8>)>,
        flags: Flags,
    ) -> Result<(), Status> {
        let mut bufs: Vec<Buf> = Vec::new();
        let mut run = SegList::EMPTY;
        let mut start = 0;
        let mut failed = Status::Ok;
        for (offset, bytes) in parts {
            let mut buf = self.try_meta_buf();
            if buf.is_none() {
                self.send_run(slot, start, &mut run, flags);
                failed = worse(failed, self.wait(slot).await);
                bufs.drain(..).for_each(|b| self.give_meta(b));
                buf = Some(self.meta_buf(slot).await);
            }
            let Some(buf) = buf else { continue };
            let seg = buf.head(bytes.len() as u32).unwrap_or(Seg::NONE);
            self.meta_region().write_seg(&seg, &bytes);
            bufs.push(buf);
            if start + run.bytes() != offset || !run.push(seg) {
                self.send_run(slot, start, &mut run, flags);
                start = offset;
                let _first = run.push(seg);
            }
        }
        self.send_run(slot, start, &mut run, flags);
        failed = worse(failed, self.wait(slot).await);
        bufs.drain(..).for_each(|b| self.give_meta(b));
        check(failed)
    }

    fn send_run(&self, slot: u16, offset: u64, run: &mut SegList, flags: Flags) {
        let segs = std::mem::replace(run, SegList::EMPTY);
        let len = segs.bytes();
        if len > 0 {
            self.counters.meta_writes.set(self.counters.meta_writes.get() + 1);
            let child = Child { port: self.top(), op: Op::Write, flags, offset, len, segs };
            self.start(slot, child);
        }
    }
}

fn worse(a: Status, b: Status) -> Status {
    if a.is_ok() { b } else { a }
}
