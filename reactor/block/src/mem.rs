//! [`MemQueue`]: a leaf in memory, for tests, for measurements of what stands above, and as the
//! node `mem:`. Completes in the poll after the submit, as a device would at the earliest.

use std::sync::Arc;

use dma::{Region, Table};

use crate::{
    BlockQueue, Completion, Completions, DeviceInfo, Full, HasWork, LeafAccess, Op, Request,
    Status, Submit,
};

/// How many requests may be in flight.
const DEPTH: usize = 1024;

/// A device in memory with one unit.
#[derive(Debug)]
pub struct MemQueue {
    info: DeviceInfo,
    data: Arc<Region>,
    table: Table,
    /// Finished requests not yet handed out: a ring of `DEPTH`.
    done: Box<[Completion]>,
    head: usize,
    count: usize,
    writes: u64,
    flushes: u64,
}

impl MemQueue {
    /// A device of `size` bytes (a multiple of `block_size`), all zero.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(size: u64, block_size: u32) -> Result<MemQueue, dma::Error> {
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        Ok(MemQueue::over(
            Region::new_best(len)?,
            DeviceInfo {
                size,
                block_size,
                physical_block_size: block_size.max(4096),
                read_only: false,
                volatile_cache: false,
                write_zeroes: true,
                discard: true,
                discard_granularity: block_size,
                max_transfer: 1 << 30,
            },
        ))
    }

    /// Another queue to the same memory, for another reactor.
    pub fn another(&self) -> MemQueue {
        MemQueue::over(self.data.clone(), self.info.clone())
    }

    fn over(data: Arc<Region>, info: DeviceInfo) -> MemQueue {
        let none = Completion { tag: crate::Tag::new(0, 0, 0), status: Status::Ok, detail: 0 };
        MemQueue {
            info,
            data,
            table: Table::new(),
            done: vec![none; DEPTH].into_boxed_slice(),
            head: 0,
            count: 0,
            writes: 0,
            flushes: 0,
        }
    }

    /// The device's own memory.
    pub fn data(&self) -> &Arc<Region> {
        &self.data
    }

    /// Requests that changed the device so far (writes, zeroes, discards), and flushes.
    pub fn writes_and_flushes(&self) -> (u64, u64) {
        (self.writes, self.flushes)
    }

    fn run(&mut self, r: &Request<'_>) -> Status {
        if r.unit != 0 || !self.info.contains(r.offset, r.len) || !r.segs_fit() {
            return Status::Invalid;
        }
        match r.op {
            Op::Flush => {
                self.flushes += 1;
                return Status::Ok;
            }
            Op::WriteZeroes | Op::Discard => {
                self.writes += 1;
                self.data.zero(r.offset as usize, r.len as usize);
                return Status::Ok;
            }
            Op::Write => self.writes += 1,
            Op::Read => {}
        }
        let mut at = r.offset as usize;
        for seg in r.segs {
            let Some(region) = self.table.find(seg) else { return Status::Invalid };
            let (offset, len) = (seg.offset() as usize, seg.len() as usize);
            if r.op == Op::Read {
                dma::copy(&self.data, at, region, offset, len);
            } else {
                dma::copy(region, offset, &self.data, at, len);
            }
            at += len;
        }
        Status::Ok
    }
}

impl Submit for MemQueue {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        (unit == 0).then_some(&self.info)
    }

    fn room(&self) -> usize {
        DEPTH - self.count
    }

    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        if self.count == DEPTH {
            return Err(Full);
        }
        let status = self.run(request);
        let at = (self.head + self.count) % DEPTH;
        self.done[at] = Completion { tag: request.tag, status, detail: 0 };
        self.count += 1;
        Ok(())
    }
}

impl BlockQueue for MemQueue {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        // Requests are done when they are submitted: they need no memory afterwards.
        self.table.prune(|_| true);
        self.table.register(region);
        Ok(())
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        let n = self.count.min(out.room());
        for _ in 0..n {
            out.push(self.done[self.head]);
            self.head = (self.head + 1) % DEPTH;
        }
        self.count -= n;
        n
    }

    fn in_flight(&self) -> usize {
        self.count
    }

    fn arm(&mut self) -> HasWork {
        self.table.prune(|_| true);
        if self.count > 0 { HasWork::Yes } else { HasWork::No }
    }
}

impl LeafAccess for MemQueue {
    fn unit_len(&self, _unit: u16) -> u64 {
        self.info.size
    }

    fn set_unit_len(&mut self, _unit: u16, _len: u64) -> Result<(), Status> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Flags, Tag};

    #[test]
    fn completes_in_order_and_only_from_poll() {
        let mut q = MemQueue::new(1 << 20, 512).unwrap();
        let buf = Region::new(4096, dma::PageSize::Small).unwrap();
        q.register(&buf).unwrap();
        let segs = [buf.seg(0, 4096).unwrap()];
        let mut r = Request {
            tag: Tag::new(1, 0, 7),
            op: Op::Write,
            flags: Flags::NONE,
            unit: 0,
            offset: 8192,
            len: 4096,
            segs: &segs,
        };
        buf.write(0, &[5; 4096]);
        q.submit(&r).unwrap();
        buf.zero(0, 4096);
        r.op = Op::Read;
        r.tag = Tag::new(1, 1, 8);
        q.submit(&r).unwrap();
        r.offset = 1 << 20;
        r.tag = Tag::new(1, 2, 9);
        q.submit(&r).unwrap();
        let mut out = Completions::new();
        assert_eq!(q.poll(&mut out), 3);
        assert_eq!(out.get(1).tag, Tag::new(1, 1, 8));
        assert_eq!(out.get(2).status, Status::Invalid);
        let mut back = [0; 4096];
        buf.read(0, &mut back);
        assert_eq!(back, [5; 4096]);
    }

    #[test]
    fn a_stale_segment_is_refused() {
        let [r, other] = [0, 1].map(|_| Region::new(4096, dma::PageSize::Small).unwrap());
        let mut q = MemQueue::new(1 << 20, 512).unwrap();
        q.register(&r).unwrap();
        let (op, flags, tag) = (Op::Read, Flags::NONE, Tag::new(1, 0, 0));
        let segs = [r.seg(0, 4096).unwrap()];
        let request = Request { tag, op, flags, unit: 0, offset: 0, len: 4096, segs: &segs };
        let mut r = Some(r);
        for expected in [Status::Ok, Status::Invalid] {
            q.submit(&request).unwrap();
            let mut out = Completions::new();
            q.poll(&mut out);
            assert_eq!(out.get(0).status, expected);
            r = None;
            q.register(&other).unwrap();
        }
        drop(r);
    }

    #[test]
    fn an_unregistered_region_is_refused() {
        let mut q = MemQueue::new(1 << 20, 512).unwrap();
        let buf = Region::new(4096, dma::PageSize::Small).unwrap();
        let segs = [buf.seg(0, 512).unwrap()];
        let r = Request {
            tag: Tag::new(1, 0, 0),
            op: Op::Read,
            flags: Flags::NONE,
            unit: 0,
            offset: 0,
            len: 512,
            segs: &segs,
        };
        q.submit(&r).unwrap();
        let mut out = Completions::new();
        q.poll(&mut out);
        assert_eq!(out.get(0).status, Status::Invalid);
    }
}
