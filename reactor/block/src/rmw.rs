//! [`RmwQueue`]: a device of 4 KiB blocks seen as one of 512-byte blocks (512e).
//!
//! Whole-block requests go through as they are. Of any other, what lies in whole blocks (the middle)
//! goes to the device straight from or into the request's buffers, and each block that is touched in
//! part (an edge; at most two) goes through a small buffer of its own: read and copied out, or read,
//! changed and written back under a claim ([`Claims`]). Middle and edges run side by side, and never
//! wait for each other: an edge that has its claim, and a write that is noted, wait only for places
//! in the leaf and for commands that the device already has. So nothing can wait in a circle.
//!
//! Belongs to a reactor, as the leaf below it.

mod slot;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use dma::{Pool, Region, Table};

use self::slot::{Middle, Slot, Step};
use crate::claims::{Lane, WRITES};
use crate::{
    BlockQueue, Claims, Completion, Completions, DeviceInfo, Flags, Full, HasWork, LeafAccess, Op,
    Request, SegList, Status, Submit, Tag,
};

/// Owner number in the tags of the requests that the queue makes. Reactors count theirs from 0.
const OWNER: u16 = 0xfffe;

/// What is presented above.
const SECTOR: u64 = 512;

/// The largest device block.
const BLOCK_MAX: u32 = 4096;

/// How many edges may be in work at a time; more wait.
const BUFFERS: u32 = 128;

/// What a leaf request does for a request: an edge's read (0 and 1), the middle, an edge's write.
const MIDDLE: u32 = 2;
const WRITE: u32 = 4;

#[derive(Debug)]
struct Unit {
    /// As seen from above.
    info: DeviceInfo,
    /// Size of a device block in bytes.
    block: u64,
}

/// Presents a leaf's units of larger blocks as ones of 512-byte blocks; other units unchanged.
#[derive(Debug)]
pub struct RmwQueue<Q> {
    // Dropped first: when it is gone, so are its requests, and claims may go too.
    leaf: Q,
    lane: Lane,
    units: Vec<Unit>,
    table: Table,
    /// Made when the first edge needs a buffer: few queues ever have one.
    pool: Option<Pool>,
    /// Those that were ever used; the room for all is there from the start.
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Slots of which some part could not go on.
    blocked: VecDeque<u16>,
    /// Slots that ended without the leaf.
    finished: VecDeque<u16>,
    /// The leaf's completions, and how many of them were looked at.
    inner: Completions,
    seen: usize,
    /// Requests that went to the leaf as they were.
    straight: usize,
    strays: u64,
}

impl<Q: BlockQueue> RmwQueue<Q> {
    /// Puts the queue over a leaf. `claims` is shared with the queues of other reactors to the same
    /// device.
    ///
    /// # Errors
    /// If a block is larger than 4 KiB, or if more queues would share the claims than they were made
    /// for.
    pub fn new(leaf: Q, claims: &Arc<Claims>) -> Result<RmwQueue<Q>, String> {
        let mut queue = RmwQueue {
            leaf,
            lane: claims.join().ok_or("too many queues share a device")?,
            units: Vec::new(),
            table: Table::new(),
            pool: None,
            slots: Vec::with_capacity(WRITES),
            free: (0..WRITES as u16).rev().collect(),
            blocked: VecDeque::with_capacity(WRITES),
            finished: VecDeque::with_capacity(WRITES),
            inner: Completions::new(),
            seen: 0,
            straight: 0,
            strays: 0,
        };
        queue.look_at_units()?;
        Ok(queue)
    }

    /// The same for another reactor, over its own queue to the same device.
    ///
    /// # Errors
    /// As for [`RmwQueue::new`].
    pub fn another(&self, leaf: Q) -> Result<RmwQueue<Q>, String> {
        RmwQueue::new(leaf, self.lane.claims())
    }

    /// The leaf.
    pub fn leaf(&self) -> &Q {
        &self.leaf
    }

    /// Does something to the leaf itself, such as adding a unit. Not for requests.
    ///
    /// # Errors
    /// If a unit came that has blocks larger than 4 KiB.
    pub fn with_leaf<R>(&mut self, f: impl FnOnce(&mut Q) -> R) -> Result<R, String> {
        let result = f(&mut self.leaf);
        self.look_at_units()?;
        Ok(result)
    }

    /// Lets go of regions that have no user any more and that no request in work names.
    fn prune(&mut self) {
        let in_work = self.slots.iter().filter(|s| !s.done());
        let segs = in_work.flat_map(|s| s.segs.as_slice());
        self.table.prune(|region| !segs.clone().any(|seg| seg.region() == region.id()));
    }

    /// Answers from the leaf that belonged to no request.
    pub fn strays(&self) -> u64 {
        self.strays
    }

    fn look_at_units(&mut self) -> Result<(), String> {
        self.units.clear();
        // Units are numbered from 0 without gaps.
        while let Some(info) = self.leaf.info(self.units.len() as u16) {
            let mut info = info.clone();
            let block = info.block_size;
            if !block.is_power_of_two() || block > BLOCK_MAX {
                return Err(format!("blocks of {block} bytes are not possible"));
            }
            if u64::from(block) > SECTOR {
                info.block_size = SECTOR as u32;
                info.physical_block_size = info.physical_block_size.max(block);
            }
            self.units.push(Unit { info, block: block.into() });
        }
        Ok(())
    }

    /// Whether the leaf can have the request as it is, without anyone else being told.
    #[inline]
    fn goes_straight(&self, r: &Request<'_>) -> bool {
        let Some(Unit { block, .. }) = self.units.get(usize::from(r.unit)) else { return false };
        let harmless = *block <= SECTOR || matches!(r.op, Op::Read | Op::Flush);
        harmless && (r.offset | r.len) & (block - 1) == 0 && r.tag.owner() != OWNER
    }

    /// Takes a request into a slot and starts what can start. The slot is free until here.
    fn take(&mut self, slot: u16, r: &Request<'_>) {
        let s = &mut self.slots[usize::from(slot)];
        s.tag = r.tag;
        s.op = r.op;
        s.flags = r.flags;
        s.unit = r.unit;
        s.generation = s.generation.wrapping_add(1);
        (s.status, s.detail) = (Status::Ok, 0);
        if let Err(status) = self.plan(slot, r) {
            self.slots[usize::from(slot)].status = status;
            self.finished.push_back(slot);
            return;
        }
        // The usual case, a write of whole blocks over which there is no claim: nothing is copied.
        let s = &mut self.slots[usize::from(slot)];
        if s.len == r.len {
            let block = self.units[usize::from(r.unit)].block;
            let (first, count) = (s.offset / block, s.len / block);
            let noted =
                !s.writes() || self.lane.begin_write(usize::from(slot), r.unit, first, count);
            s.middle = if noted { Middle::Send } else { Middle::Note };
            let tag = own_tag(slot, s.generation, MIDDLE);
            if noted && self.leaf.submit(&Request { tag, ..*r }).is_ok() {
                s.middle = Middle::Sent;
                return;
            }
        }
        // Cannot fail: the length of the list was checked.
        s.segs = SegList::from_slice(r.segs).unwrap_or(SegList::EMPTY);
        if !self.advance(slot) {
            self.block(slot);
        } else if self.slots[usize::from(slot)].done() {
            self.finished.push_back(slot);
        }
    }

    /// Checks a request and divides it into middle and edges.
    fn plan(&mut self, slot: u16, r: &Request<'_>) -> Result<(), Status> {
        let s = &mut self.slots[usize::from(slot)];
        s.middle = Middle::Done;
        let unit = self.units.get(usize::from(r.unit)).ok_or(Status::Invalid)?;
        let moves = matches!(r.op, Op::Read | Op::Write);
        let too_long = moves && r.len > u64::from(unit.info.max_transfer);
        if !unit.info.contains(r.offset, r.len) || !r.segs_fit() || too_long {
            return Err(Status::Invalid);
        }
        if unit.info.read_only && s.writes() {
            return Err(Status::ReadOnly);
        }
        let (mask, end) = (unit.block - 1, r.offset + r.len);
        // Whole blocks from `from` to `to`; if there is no block boundary inside, `from > to`.
        let (from, to) = (r.offset.next_multiple_of(unit.block), end & !mask);
        (s.offset, s.len, s.at) = (from, to.saturating_sub(from), from - r.offset);
        if s.len > 0 || r.len == 0 {
            s.middle = if s.writes() { Middle::Note } else { Middle::Send };
        }
        if s.op == Op::Discard || (r.offset | end) & mask == 0 {
            return Ok(());
        }
        // What is copied here must be memory that is known here.
        for seg in r.segs {
            if self.table.find(seg).is_none() {
                s.middle = Middle::Done;
                return Err(Status::Invalid);
            }
        }
        let mut add = |n: usize, start: u64, stop: u64| {
            let e = &mut s.edges[n];
            e.step = Step::Buffer;
            e.block = start / unit.block;
            (e.from, e.len) = ((start & mask) as u32, (stop - start) as u32);
            e.at = start - r.offset;
        };
        if from > to {
            add(0, r.offset, end);
        } else {
            if from > r.offset {
                add(0, r.offset, from);
            }
            if to < end {
                add(1, to, end);
            }
        }
        Ok(())
    }

    /// Goes on with all parts of a request as far as they can. `false` if one cannot and no
    /// completion of its own will come.
    fn advance(&mut self, slot: u16) -> bool {
        let middle = self.advance_middle(slot);
        let first = self.advance_edge(slot, 0);
        let second = self.advance_edge(slot, 1);
        middle && first && second
    }

    fn advance_middle(&mut self, slot: u16) -> bool {
        let s = &mut self.slots[usize::from(slot)];
        let block = self.units[usize::from(s.unit)].block;
        if s.middle == Middle::Note {
            let (first, count) = (s.offset / block, s.len / block);
            if !self.lane.begin_write(usize::from(slot), s.unit, first, count) {
                return false;
            }
            s.middle = Middle::Send;
        }
        if s.middle == Middle::Send {
            let mut segs = SegList::EMPTY;
            if matches!(s.op, Op::Read | Op::Write) {
                // Cannot fail: the segments add up, and a part of them has no more than all.
                let cut = segs.push_part(s.segs.as_slice(), s.at, s.len);
                debug_assert!(cut);
            }
            let r = Request {
                tag: own_tag(slot, s.generation, MIDDLE),
                op: s.op,
                flags: s.flags,
                unit: s.unit,
                offset: s.offset,
                len: s.len,
                segs: segs.as_slice(),
            };
            if self.leaf.submit(&r).is_err() {
                return false;
            }
            s.middle = Middle::Sent;
        }
        true
    }

    fn advance_edge(&mut self, slot: u16, n: usize) -> bool {
        let s = &mut self.slots[usize::from(slot)];
        let block = self.units[usize::from(s.unit)].block;
        let reads_only = s.op == Op::Read;
        let claim = 2 * usize::from(slot) + n;
        if s.edges[n].step == Step::Buffer {
            if self.pool.is_none() {
                self.pool = make_pool(&mut self.leaf);
            }
            let Some(pool) = &mut self.pool else {
                s.fail(Status::Medium, 0);
                s.edges[n].step = Step::Done;
                return true;
            };
            let Some(buf) = pool.take() else { return false };
            s.edges[n].buf = Some(buf);
            s.edges[n].step = if reads_only { Step::Read } else { Step::Claim };
        }
        if s.edges[n].step == Step::Claim {
            if !self.lane.claim(claim, s.unit, s.edges[n].block) {
                return false;
            }
            s.edges[n].step = Step::Drain;
        }
        if s.edges[n].step == Step::Drain {
            if !self.lane.clear(s.unit, s.edges[n].block) {
                return false;
            }
            s.edges[n].step = Step::Read;
        }
        let (op, flags, next, part) = match s.edges[n].step {
            Step::Read => (Op::Read, Flags::NONE, Step::Reading, n as u32),
            Step::Write => (Op::Write, s.fua(), Step::Writing, n as u32 + WRITE),
            _ => return true,
        };
        let e = &mut s.edges[n];
        let seg = e.buf.as_ref().and_then(|b| b.head(block as u32));
        let r = Request {
            tag: own_tag(slot, s.generation, part),
            op,
            flags,
            unit: s.unit,
            offset: e.block * block,
            len: block,
            segs: seg.as_slice(),
        };
        if self.leaf.submit(&r).is_err() {
            return false;
        }
        e.step = next;
        true
    }

    /// One of the queue's own requests ended. Returns the slot if that was the last of a request.
    fn answered(&mut self, c: Completion) -> Option<u16> {
        let (slot, part) = (c.tag.slot(), c.tag.generation() & 7);
        let Some(s) = self.slots.get_mut(usize::from(slot)) else {
            self.strays += 1;
            return None;
        };
        let awaited = match part {
            MIDDLE => s.middle == Middle::Sent,
            0 | 1 => s.edges[part as usize].step == Step::Reading,
            4 | 5 => s.edges[(part - WRITE) as usize].step == Step::Writing,
            _ => false,
        };
        if !awaited || c.tag != own_tag(slot, s.generation, part) {
            self.strays += 1;
            return None;
        }
        if !c.status.is_ok() {
            s.fail(c.status, c.detail);
        }
        if part == MIDDLE {
            s.middle = Middle::Done;
            if s.writes() {
                self.lane.end_write(usize::from(slot));
            }
        } else {
            let n = (part & 1) as usize;
            if s.edges[n].step == Step::Reading && c.status.is_ok() {
                self.copy(slot, n);
            }
            let s = &mut self.slots[usize::from(slot)];
            let e = &mut s.edges[n];
            if e.step == Step::Reading && c.status.is_ok() && s.op != Op::Read {
                e.step = Step::Write;
                if !self.advance_edge(slot, n) {
                    self.block(slot);
                }
            } else {
                e.step = Step::Done;
                if let (Some(buf), Some(pool)) = (e.buf.take(), &mut self.pool) {
                    pool.give(buf);
                }
                self.lane.release(2 * usize::from(slot) + n);
            }
        }
        self.slots[usize::from(slot)].done().then_some(slot)
    }

    /// Notes that a slot has something to try again, once.
    fn block(&mut self, slot: u16) {
        if !self.blocked.contains(&slot) {
            self.blocked.push_back(slot);
        }
    }

    /// Moves an edge's bytes between its buffer, which holds the block, and the request's memory.
    fn copy(&mut self, slot: u16, n: usize) {
        let s = &self.slots[usize::from(slot)];
        let e = &s.edges[n];
        let (Some(buf), Some(pool)) = (&e.buf, &self.pool) else { return };
        let bounce = pool.region();
        let mut at = buf.seg().offset() as usize + e.from as usize;
        if s.op == Op::WriteZeroes {
            bounce.zero(at, e.len as usize);
            return;
        }
        let mut part = SegList::EMPTY;
        let cut = part.push_part(s.segs.as_slice(), e.at, e.len.into());
        debug_assert!(cut);
        for seg in part.as_slice() {
            let Some(region) = self.table.find(seg) else { return };
            let (offset, len) = (seg.offset() as usize, seg.len() as usize);
            if s.op == Op::Read {
                dma::copy(bounce, at, region, offset, len);
            } else {
                dma::copy(region, offset, bounce, at, len);
            }
            at += len;
        }
    }

    /// Tries again what could not go on.
    #[cold]
    fn retry(&mut self) {
        for _ in 0..self.blocked.len() {
            let Some(slot) = self.blocked.pop_front() else { return };
            if !self.advance(slot) {
                self.blocked.push_back(slot);
            }
        }
    }

    fn finish(&mut self, slot: u16, out: &mut Completions) {
        let s = &self.slots[usize::from(slot)];
        out.push(Completion { tag: s.tag, status: s.status, detail: s.detail });
        self.free.push(slot);
    }
}

/// Takes memory for edges, if there is any that the leaf can reach.
#[cold]
fn make_pool<Q: BlockQueue>(leaf: &mut Q) -> Option<Pool> {
    let made = Pool::new(BUFFERS, BLOCK_MAX).map_err(|e| e.to_string()).and_then(|pool| {
        leaf.register(pool.region())?;
        Ok(pool)
    });
    made.inspect_err(|e| log::error!("no buffers for parts of a device's blocks: {e}")).ok()
}

/// The tag of a leaf request: which slot's, which use of it, what for.
fn own_tag(slot: u16, generation: u32, part: u32) -> Tag {
    Tag::new(OWNER, slot, generation << 3 | part)
}

impl<Q: BlockQueue> Submit for RmwQueue<Q> {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        self.units.get(usize::from(unit)).map(|u| &u.info)
    }

    #[inline]
    fn room(&self) -> usize {
        // What the leaf has no place for can wait in a slot, so either kind of request fits as often.
        self.free.len().min(self.leaf.room())
    }

    #[inline(never)]
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        if self.goes_straight(request) && self.leaf.submit(request).is_ok() {
            self.straight += 1;
            return Ok(());
        }
        let slot = self.free.pop().ok_or(Full)?;
        // Never grows: those that were never used lie below the others in `free`, in their order.
        if usize::from(slot) == self.slots.len() {
            self.slots.push(Slot::new());
        }
        self.take(slot, request);
        Ok(())
    }
}

impl<Q: BlockQueue> BlockQueue for RmwQueue<Q> {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.prune();
        self.leaf.register(region)?;
        self.table.register(region);
        Ok(())
    }

    #[inline(never)]
    fn poll(&mut self, out: &mut Completions) -> usize {
        let before = out.len();
        while out.room() > 0
            && let Some(slot) = self.finished.pop_front()
        {
            self.finish(slot, out);
        }
        if self.seen == self.inner.len() {
            self.inner.clear();
            self.seen = 0;
            self.leaf.poll(&mut self.inner);
        }
        while out.room() > 0 && self.seen < self.inner.len() {
            let c = self.inner.get(self.seen);
            self.seen += 1;
            if c.tag.owner() != OWNER {
                self.straight = self.straight.saturating_sub(1);
                out.push(c);
            } else if let Some(slot) = self.answered(c) {
                self.finish(slot, out);
            }
        }
        // After the leaf has got places free, and before anyone above takes them.
        if !self.blocked.is_empty() {
            self.retry();
        }
        out.len() - before
    }

    fn start(&mut self) {
        self.leaf.start();
    }

    fn in_flight(&self) -> usize {
        self.straight + WRITES - self.free.len()
    }

    fn arm(&mut self) -> HasWork {
        self.prune();
        let work =
            !self.blocked.is_empty() || !self.finished.is_empty() || self.seen < self.inner.len();
        if self.leaf.arm() == HasWork::Yes || work { HasWork::Yes } else { HasWork::No }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.leaf.wake_fd()
    }

    fn set_now(&mut self, now: u64) {
        self.leaf.set_now(now);
    }
}

impl<Q: LeafAccess> LeafAccess for RmwQueue<Q> {
    fn unit_len(&self, unit: u16) -> u64 {
        self.leaf.unit_len(unit)
    }

    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
        self.leaf.set_unit_len(unit, len)
    }
}
