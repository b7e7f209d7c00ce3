//! [`StripeQueue`]: several devices as one, in stripes (RAID 0).
//!
//! Byte `x` lies in chunk `x / size`; chunk `c` of `n` members lies on member `c % n`, as its chunk
//! `c / n`. A request within one chunk, as nearly all of a guest's are, goes to its member as it is,
//! with another offset, and its answer comes back untouched. Others are taken into a slot and go out
//! in parts: reads and writes chunk by chunk; zeroes and discards as one range on each member, since
//! what a member has of a range is in one piece; a flush to all. The parts of a slot wait for places
//! in their member by themselves, so one slot is all the room that a request needs.
//!
//! Belongs to a reactor, as the queues below it.

mod layout;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use dma::Region;

use self::layout::Layout;
use crate::{
    BlockQueue, Completion, Completions, DeviceInfo, Flags, Full, HasWork, LeafAccess, Op,
    QUARANTINED, Request, SegList, Status, Submit, Tag,
};

/// Owner number in the tags of the requests that the queue makes. Reactors count theirs from 0.
const OWNER: u16 = 0xfffd;

/// Requests in more than one part that may be in flight.
const SLOTS: usize = 64;

/// Chunks that a read or write may touch; bounds the work of one submission.
const MAX_CHUNKS: u64 = 32;
const _: () = assert!(MAX_CHUNKS < 63 && MAX_MEMBERS < 63);

/// Bits of a tag's generation that number the part within its request.
const PART_BITS: u32 = 8;

/// Members at most.
pub const MAX_MEMBERS: usize = 32;

/// A request that goes out in parts.
#[derive(Debug)]
struct Slot {
    generation: u32,
    used: bool,
    tag: Tag,
    op: Op,
    flags: Flags,
    offset: u64,
    len: u64,
    segs: SegList,
    /// Of reads and writes: bytes sent so far. Of others: members served so far.
    sent: u64,
    /// Number of the next part.
    part: u32,
    /// The parts that are in flight, a bit each: at most `MAX_CHUNKS` + 1, or one for each member.
    outstanding: u64,
    status: Status,
    detail: u16,
}

impl Slot {
    const FREE: Slot = Slot {
        generation: 0,
        used: false,
        tag: Tag::new(0, 0, 0),
        op: Op::Flush,
        flags: Flags::NONE,
        offset: 0,
        len: 0,
        segs: SegList::EMPTY,
        sent: 0,
        part: 0,
        outstanding: 0,
        status: Status::Ok,
        detail: 0,
    };

    /// Whether every part went out or none will.
    fn all_sent(&self, members: usize) -> bool {
        let end = match self.op {
            Op::Read | Op::Write => self.len,
            _ => members as u64,
        };
        self.sent >= end || !self.status.is_ok()
    }

    /// Keeps the first failure.
    fn fail(&mut self, status: Status, detail: u16) {
        if self.status.is_ok() {
            (self.status, self.detail) = (status, detail);
        }
        self.detail |= detail & QUARANTINED;
    }
}

/// Several leaf queues, each with one unit of it, as one device.
#[derive(Debug)]
pub struct StripeQueue<Q> {
    members: Vec<(Q, u16)>,
    layout: Layout,
    info: DeviceInfo,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    /// Slots with parts that found no place, in the order in which they came.
    waiting: VecDeque<u16>,
    /// Slots whose answer waits for the next poll.
    finished: VecDeque<u16>,
    /// Requests that every member certainly takes, as of the last poll, less those taken since: a
    /// request takes one place of a member, or is counted anew.
    room: usize,
    /// Requests that went to a member as they were.
    straight: usize,
    /// Bytes that requests may go straight to: the size, or 0 once a member was lost that could not
    /// be stopped. Then everything is refused: a buffer that it may still write to must not be read
    /// into from another member.
    open: u64,
    /// The member that is polled first, so that none is always last.
    first: usize,
    strays: u64,
}

impl<Q: LeafAccess> StripeQueue<Q> {
    /// Puts stripes of `size` bytes over members, each a queue and a unit of it. The smallest
    /// member counts; what others have more is not used.
    ///
    /// # Errors
    /// If `size` is no power of two from 4 KiB to 1 GiB, there are not 2 to [`MAX_MEMBERS`]
    /// members, a unit does not exist or has less than one chunk, or block sizes differ.
    pub fn new(members: Vec<(Q, u16)>, size: u64) -> Result<StripeQueue<Q>, String> {
        if !size.is_power_of_two() || !(4 << 10..=1 << 30).contains(&size) {
            return Err(format!("stripes of {size} bytes; a power of two from 4k to 1G is needed"));
        }
        if !(2..=MAX_MEMBERS).contains(&members.len()) {
            return Err(format!("{} members; 2 to {MAX_MEMBERS} are possible", members.len()));
        }
        let infos = members.iter().enumerate().map(|(i, (queue, unit))| {
            queue.info(*unit).ok_or_else(|| format!("member {i} has no unit {unit}"))
        });
        let infos: Vec<&DeviceInfo> = infos.collect::<Result<_, _>>()?;
        let block_size = infos[0].block_size;
        if let Some(i) = infos.iter().position(|i| i.block_size != block_size) {
            let other = infos[i].block_size;
            return Err(format!(
                "member 0 has blocks of {block_size} bytes, member {i} of {other}"
            ));
        }
        // Files could grow, but as members they do not: one that grew less than the others would
        // make the whole smaller the next time.
        let lens = members.iter().map(|(queue, unit)| queue.unit_len(*unit));
        let chunks = infos.iter().zip(lens).map(|(i, len)| i.size.min(len) / size).min();
        let chunks = chunks.unwrap_or(0);
        if chunks == 0 {
            return Err(format!("a member is smaller than one stripe of {size} bytes"));
        }
        let layout = Layout::new(size, members.len());
        let most = |f: fn(&DeviceInfo) -> u32| infos.iter().map(|i| f(i)).max().unwrap_or(0);
        let transfer = infos.iter().map(|i| u64::from(i.max_transfer)).min().unwrap_or(0);
        let info = DeviceInfo {
            size: (chunks * size)
                .checked_mul(members.len() as u64)
                .ok_or("the members together exceed 2^64 bytes")?,
            block_size,
            physical_block_size: most(|i| i.physical_block_size),
            read_only: infos.iter().any(|i| i.read_only),
            volatile_cache: infos.iter().any(|i| i.volatile_cache),
            write_zeroes: infos.iter().all(|i| i.write_zeroes),
            discard: infos.iter().all(|i| i.discard),
            discard_granularity: most(|i| i.discard_granularity),
            max_transfer: transfer.min(MAX_CHUNKS * size).min(1 << 30) as u32,
        };
        let mut queue = StripeQueue {
            members,
            layout,
            info,
            slots: (0..SLOTS).map(|_| Slot::FREE).collect(),
            free: (0..SLOTS as u16).rev().collect(),
            waiting: VecDeque::with_capacity(SLOTS),
            finished: VecDeque::with_capacity(SLOTS),
            room: 0,
            straight: 0,
            open: 0,
            first: 0,
            strays: 0,
        };
        queue.open = queue.info.size;
        queue.count_room();
        Ok(queue)
    }

    /// The same stripe for another reactor; `queue` makes another queue to a member's device.
    ///
    /// # Errors
    /// What `queue` says, or that a member has become smaller.
    pub fn another(
        &self,
        mut queue: impl FnMut(&Q) -> Result<Q, String>,
    ) -> Result<StripeQueue<Q>, String> {
        let members = self.members.iter().map(|(q, unit)| Ok((queue(q)?, *unit)));
        let other = StripeQueue::new(members.collect::<Result<_, String>>()?, self.layout.size())?;
        match other.info.size {
            size if size < self.info.size => Err("a member has become smaller".to_owned()),
            _ => Ok(other),
        }
    }

    /// The members' queues.
    pub fn members(&self) -> impl Iterator<Item = &Q> {
        self.members.iter().map(|(queue, _)| queue)
    }

    /// Answers from members that belonged to no request.
    pub fn strays(&self) -> u64 {
        self.strays
    }

    /// Takes a request into a slot and sends what can be sent.
    #[cold]
    #[inline(never)]
    fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        let index = self.free.pop().ok_or(Full)?;
        let slot = &mut self.slots[usize::from(index)];
        *slot = Slot {
            generation: slot.generation.wrapping_add(1) & (u32::MAX >> PART_BITS),
            used: true,
            tag: r.tag,
            op: r.op,
            flags: r.flags,
            offset: r.offset,
            len: r.len,
            ..Slot::FREE
        };
        let moves = matches!(r.op, Op::Read | Op::Write);
        let too_long = moves && r.len > u64::from(self.info.max_transfer);
        let fits = self.info.contains(r.offset, r.len) && r.segs_fit() && !too_long;
        match SegList::from_slice(r.segs) {
            Some(segs) if fits => slot.segs = segs,
            _ => slot.fail(Status::Invalid, 0),
        }
        if self.info.read_only && !matches!(r.op, Op::Read | Op::Flush) {
            slot.fail(Status::ReadOnly, 0);
        }
        if self.open == 0 {
            slot.fail(Status::Gone, 0);
        }
        self.send(index);
        self.count_room();
        Ok(())
    }

    /// Sends the parts of a slot as far as there is room; the slot waits for the rest.
    fn send(&mut self, index: u16) {
        let count = self.members.len();
        while !self.slots[usize::from(index)].all_sent(count) {
            if !self.send_part(index) {
                self.waiting.push_back(index);
                return;
            }
        }
        if self.slots[usize::from(index)].outstanding == 0 {
            self.finished.push_back(index);
        }
    }

    /// Sends the next part. Returns whether there was room for it.
    fn send_part(&mut self, index: u16) -> bool {
        let slot = &mut self.slots[usize::from(index)];
        let mut segs = SegList::EMPTY;
        let (member, offset, len, step) = match slot.op {
            Op::Read | Op::Write => {
                let (member, offset, left) = self.layout.locate(slot.offset + slot.sent);
                let len = left.min(slot.len - slot.sent);
                if !segs.push_part(slot.segs.as_slice(), slot.sent, len) {
                    // Cannot be: the segments add up to the length.
                    slot.fail(Status::Invalid, 0);
                    return true;
                }
                (member, offset, len, len)
            }
            Op::Flush => (slot.sent as usize, 0, 0, 1),
            Op::WriteZeroes | Op::Discard => {
                let member = slot.sent as usize;
                let from = self.layout.before(member, slot.offset);
                let to = self.layout.before(member, slot.offset + slot.len);
                if from == to {
                    slot.sent += 1;
                    return true;
                }
                (member, from, to - from, 1)
            }
        };
        let (queue, unit) = &mut self.members[member];
        let request = Request {
            tag: Tag::new(OWNER, index, slot.generation << PART_BITS | slot.part),
            op: slot.op,
            flags: slot.flags,
            unit: *unit,
            offset,
            len,
            segs: segs.as_slice(),
        };
        if queue.room() == 0 || queue.submit(&request).is_err() {
            return false;
        }
        slot.outstanding |= 1 << slot.part;
        slot.part += 1;
        slot.sent += step;
        true
    }

    /// Sends what waits, in turn, until one finds no place.
    fn send_waiting(&mut self) {
        for _ in 0..self.waiting.len() {
            let Some(index) = self.waiting.pop_front() else { break };
            self.send(index);
        }
    }

    /// Takes the answer to a part.
    fn answered(&mut self, c: &Completion) {
        let slot = self.slots.get_mut(usize::from(c.tag.slot()));
        let generation = c.tag.generation();
        let part = 1u64.checked_shl(generation & ((1 << PART_BITS) - 1)).unwrap_or(0);
        let known = |s: &&mut Slot| {
            s.used && s.generation == generation >> PART_BITS && s.outstanding & part != 0
        };
        let Some(slot) = slot.filter(known) else {
            self.strays += 1;
            return;
        };
        slot.outstanding &= !part;
        if !c.status.is_ok() {
            slot.fail(c.status, c.detail);
        }
        // One that waits is looked at when it is its turn.
        if slot.outstanding == 0
            && slot.all_sent(self.members.len())
            && !self.waiting.contains(&c.tag.slot())
        {
            self.finished.push_back(c.tag.slot());
        }
    }

    #[inline]
    fn count_room(&mut self) {
        let mut least = self.free.len();
        for (queue, _) in &self.members {
            least = least.min(queue.room());
        }
        self.room = least;
    }

    /// Whether parts are in flight, wait, or are to be answered.
    fn has_slots(&self) -> bool {
        self.free.len() < SLOTS
    }
}

impl<Q: LeafAccess> Submit for StripeQueue<Q> {
    #[inline]
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        (unit == 0).then_some(&self.info)
    }

    #[inline]
    fn room(&self) -> usize {
        self.room
    }

    /// Hot: a request within one chunk. Only what its member cannot see is looked at here.
    #[inline(always)]
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        let r = request;
        let (member, offset, left) = self.layout.locate(r.offset);
        // A flush, like everything without length, is no request within a chunk.
        if r.offset < self.open
            && r.len.wrapping_sub(1) < left
            && let Some((queue, unit)) = self.members.get_mut(member)
        {
            queue.submit(&Request { unit: *unit, offset, ..*r })?;
            self.straight += 1;
            self.room = self.room.saturating_sub(1);
            return Ok(());
        }
        self.take(r)
    }
}

impl<Q: LeafAccess> BlockQueue for StripeQueue<Q> {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.members.iter_mut().try_for_each(|(queue, _)| queue.register(region))
    }

    #[inline]
    fn poll(&mut self, out: &mut Completions) -> usize {
        let before = out.len();
        self.first = if self.first + 1 == self.members.len() { 0 } else { self.first + 1 };
        let (early, late) = self.members.split_at_mut(self.first);
        for (queue, _) in late {
            queue.poll(out);
        }
        for (queue, _) in early {
            queue.poll(out);
        }
        if out.iter_from(before).any(|c| c.is_quarantined()) {
            self.open = 0;
        }
        if self.has_slots() {
            self.settle(before, out);
        } else {
            self.straight -= (out.len() - before).min(self.straight);
        }
        self.count_room();
        out.len() - before
    }

    fn start(&mut self) {
        for (queue, _) in &mut self.members {
            queue.start();
        }
    }

    fn in_flight(&self) -> usize {
        self.straight + SLOTS - self.free.len()
    }

    /// A stripe has no descriptor to sleep on, so it is polled while anything is in flight.
    fn arm(&mut self) -> HasWork {
        let mut work = self.in_flight() > 0;
        for (queue, _) in &mut self.members {
            work |= queue.arm() == HasWork::Yes;
        }
        if work { HasWork::Yes } else { HasWork::No }
    }

    fn set_now(&mut self, now: u64) {
        for (queue, _) in &mut self.members {
            queue.set_now(now);
        }
    }
}

impl<Q: LeafAccess> StripeQueue<Q> {
    /// Takes the answers to parts out of what members handed out, and answers what is finished.
    #[inline(never)]
    fn settle(&mut self, before: usize, out: &mut Completions) {
        out.retain_from(before, |c| {
            let own = c.tag.owner() == OWNER;
            if own {
                self.answered(c);
            } else {
                self.straight = self.straight.saturating_sub(1);
            }
            !own
        });
        self.send_waiting();
        while out.room() > 0
            && let Some(index) = self.finished.pop_front()
        {
            let slot = &mut self.slots[usize::from(index)];
            slot.used = false;
            out.push(Completion { tag: slot.tag, status: slot.status, detail: slot.detail });
            self.free.push(index);
        }
    }
}

impl<Q: LeafAccess> LeafAccess for StripeQueue<Q> {
    fn unit_len(&self, unit: u16) -> u64 {
        if unit == 0 { self.info.size } else { 0 }
    }

    /// Nothing: stripes are as long as their members.
    fn set_unit_len(&mut self, _: u16, _: u64) -> Result<(), Status> {
        Ok(())
    }
}
