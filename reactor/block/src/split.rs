//! [`SplitQueue`]: several devices as one or more, its units, whose bytes lie on them as a [`Layout`]
//! says; with [`Stripes`] it is a [`StripeQueue`].
//!
//! A request whose bytes lie in one run on one member, as nearly all of a guest's do, goes to that
//! member as it is, with another offset, and its answer comes back untouched. Others are taken into a
//! slot and go out in parts: reads and writes run by run; zeroes and discards by the layout's pieces,
//! which are longer; a flush to all members that have something of it. The parts of a slot wait for
//! places in their member by themselves, so one slot is all the room that a request needs.
//!
//! Belongs to a reactor, as the queues below it.

mod members;
mod slot;
mod stripes;
#[cfg(test)]
mod tests;
mod wakes;

use std::collections::VecDeque;
use std::hint::cold_path;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use dma::Region;

use self::members::{fits, infos};
use self::slot::Slot;
pub use self::stripes::{StripeQueue, Stripes};
use self::wakes::Wakes;
use crate::{
    BlockQueue, Completion, Completions, DeviceInfo, Full, HasWork, LeafAccess, Op, Request,
    SegList, Status, Submit, Tag,
};

/// Owner number in the tags of the requests that the queue makes. Reactors count theirs from 0.
const OWNER: u16 = 0xfffd;

/// Requests in more than one part that may be in flight.
const SLOTS: usize = 64;

/// Runs that a read or write may touch, as the layout was at first; bounds the work of one submission.
const MAX_RUNS: u64 = 32;

/// Members at most.
pub const MAX_MEMBERS: usize = 32;

/// Bytes in a row, on one member and in the whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Index of the member.
    pub member: usize,
    /// First byte on the member.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// Which byte lies where: plain data, asked for each request, so it neither waits nor allocates.
pub trait Layout {
    /// The members are not the whole's own: they take writes though the whole may only be read, and
    /// the whole may become longer, so that a write past its end finds no space.
    const SHARED: bool;

    /// Nothing: no bytes on no members.
    fn nothing() -> Self;

    /// Bytes of the whole.
    fn size(&self) -> u64;

    /// How many members it needs.
    fn members(&self) -> usize;

    /// Bytes that are in one run everywhere, but at the end of longer ones.
    fn run(&self) -> u64;

    /// Where byte `at` is, and how many from there on are in one run. Past the end: none are.
    fn locate(&self, at: u64) -> Place;

    /// The numbers of the pieces that together have `len` bytes from `offset` on.
    fn pieces(&self, offset: u64, len: u64) -> Range<u64>;

    /// What a piece has of these bytes: it is in a row on a member, though not in the whole. It may
    /// be nothing.
    fn piece(&self, piece: u64, offset: u64, len: u64) -> Place;

    /// Whether the member has something of the whole.
    fn uses(&self, member: usize) -> bool;

    /// Behind the last byte that a member has.
    fn end_on(&self, member: usize) -> u64;
}

/// A device that the members are together.
#[derive(Debug)]
struct Unit<L> {
    layout: L,
    info: DeviceInfo,
    /// Bytes that requests may go straight to: the size, or 0 once a member was lost that could not
    /// be stopped.
    open: u64,
}

impl<L: Layout> Unit<L> {
    /// What stands where there is none: without bytes, so that a request finds that out as it finds
    /// out where it ends.
    fn nothing() -> Unit<L> {
        let info = DeviceInfo {
            size: 0,
            block_size: 512,
            physical_block_size: 512,
            read_only: true,
            volatile_cache: false,
            write_zeroes: false,
            discard: false,
            discard_granularity: 512,
            max_transfer: 512,
        };
        Unit { layout: L::nothing(), info, open: 0 }
    }

    fn is_there(&self) -> bool {
        self.info.size > 0
    }

    /// Whether a request is right.
    fn takes(&self, r: &Request<'_>) -> bool {
        let moves = matches!(r.op, Op::Read | Op::Write);
        let too_long = moves && r.len > u64::from(self.info.max_transfer);
        self.info.contains(r.offset, r.len) && r.segs_fit() && !too_long
    }

    /// Whether something is to be written that is right but for its end, which is past ours.
    fn is_short_for(&self, r: &Request<'_>) -> bool {
        let end = r.offset.checked_add(r.len);
        let whole = DeviceInfo { size: u64::MAX, ..self.info.clone() };
        matches!(r.op, Op::Write | Op::WriteZeroes)
            && end.is_some_and(|end| end > self.info.size)
            && whole.contains(r.offset, r.len)
    }
}

/// Several leaf queues, each with one unit of it, as one device or more.
#[derive(Debug)]
pub struct SplitQueue<Q, L> {
    members: Vec<(Q, u16)>,
    /// Unit 0, which most queues have alone, and the others.
    zero: Unit<L>,
    others: Vec<Unit<L>>,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    /// Slots with parts that found no place, in the order in which they came.
    waiting: VecDeque<u16>,
    /// Slots whose answer waits for the next poll.
    finished: VecDeque<u16>,
    /// Parts in flight.
    parts: usize,
    /// Requests that every member certainly takes, as of the last poll, less those taken since: a
    /// request takes one place of a member, or is counted anew. Below 0 for a caller who did not ask.
    room: isize,
    /// A member was lost that could not be stopped. Everything is refused: a buffer that it may still
    /// write to must not be read into from another member.
    lost: bool,
    /// The member that is polled first: another one after a poll that filled the array, so that none
    /// is always last.
    first: usize,
    /// The reactor's time, for the members at the next poll.
    now: u64,
    strays: u64,
    wakes: Wakes,
}

impl<Q: LeafAccess, L: Layout> SplitQueue<Q, L> {
    /// Puts a layout over members, each a queue and a unit of it, as unit 0. `read_only`: that may only
    /// be read, also where the members can be written to, if they are [`Layout::SHARED`].
    ///
    /// # Errors
    /// As [`SplitQueue::of`] and [`SplitQueue::put`].
    pub fn over(
        members: Vec<(Q, u16)>,
        layout: L,
        read_only: bool,
    ) -> Result<SplitQueue<Q, L>, String> {
        let mut queue = SplitQueue::of(members)?;
        queue.put(0, layout, read_only)?;
        Ok(queue)
    }

    /// Members without a unit, each a queue and a unit of that.
    ///
    /// # Errors
    /// If there are not 1 to [`MAX_MEMBERS`] of them, a unit does not exist, or block sizes differ.
    pub fn of(members: Vec<(Q, u16)>) -> Result<SplitQueue<Q, L>, String> {
        infos(&members)?;
        let wakes = Wakes::of(&members)?;
        let mut queue = SplitQueue {
            members,
            zero: Unit::nothing(),
            others: Vec::new(),
            slots: (0..SLOTS).map(|_| Slot::FREE).collect(),
            free: (0..SLOTS as u16).rev().collect(),
            waiting: VecDeque::with_capacity(SLOTS),
            finished: VecDeque::with_capacity(SLOTS),
            parts: 0,
            room: 0,
            lost: false,
            first: 0,
            now: 0,
            strays: 0,
            wakes,
        };
        queue.count_room();
        Ok(queue)
    }

    /// Makes a unit of this number, which nobody asks for anything yet: see [`SplitQueue::over`].
    ///
    /// # Errors
    /// If there is one, the layout has no bytes or says more than a member has, or runs are not whole
    /// blocks.
    pub fn put(&mut self, unit: u16, layout: L, read_only: bool) -> Result<(), String> {
        let infos = infos(&self.members)?;
        let block_size = infos[0].block_size;
        fits(&self.members, &layout)?;
        if !(layout.run() | layout.size()).is_multiple_of(block_size.into()) {
            let run = layout.run();
            return Err(format!("runs of {run} bytes on devices with blocks of {block_size}"));
        }
        let most = |f: fn(&DeviceInfo) -> u32| infos.iter().map(|i| f(i)).max().unwrap_or(0);
        let transfer = infos.iter().map(|i| u64::from(i.max_transfer)).min().unwrap_or(0);
        let info = DeviceInfo {
            size: layout.size(),
            block_size,
            physical_block_size: most(|i| i.physical_block_size),
            read_only: read_only || infos.iter().any(|i| i.read_only),
            volatile_cache: infos.iter().any(|i| i.volatile_cache),
            write_zeroes: infos.iter().all(|i| i.write_zeroes),
            discard: infos.iter().all(|i| i.discard),
            discard_granularity: most(|i| i.discard_granularity),
            max_transfer: transfer.min(layout.run().saturating_mul(MAX_RUNS)).min(1 << 30) as u32,
        };
        if info.size == 0 {
            return Err("a unit of no bytes".to_owned());
        }
        if usize::from(unit) > self.others.len() {
            self.others.resize_with(usize::from(unit), Unit::nothing);
        }
        let open = if self.lost { 0 } else { info.size };
        match self.place(unit) {
            Some(place) if !place.is_there() => *place = Unit { layout, info, open },
            _ => return Err(format!("there is a unit {unit} already")),
        }
        Ok(())
    }

    /// Takes a unit away of which nothing is in flight. Returns whether that was the last one.
    pub fn remove(&mut self, unit: u16) -> bool {
        if let Some(place) = self.place(unit) {
            *place = Unit::nothing();
        }
        std::iter::once(&self.zero).chain(&self.others).all(|unit| !unit.is_there())
    }

    /// Where a unit of this number is, or would be.
    fn place(&mut self, unit: u16) -> Option<&mut Unit<L>> {
        match unit.checked_sub(1) {
            None => Some(&mut self.zero),
            Some(other) => self.others.get_mut(usize::from(other)),
        }
    }

    fn unit(&self, unit: u16) -> Option<&Unit<L>> {
        find(&self.zero, &self.others, unit)
    }

    /// A unit's layout.
    pub fn layout(&self, unit: u16) -> Option<&L> {
        self.unit(unit).map(|unit| &unit.layout)
    }

    /// Puts another layout in the place of a unit's present one, of which it has all, and more: what is
    /// in flight goes on. After an error all is as before.
    ///
    /// # Errors
    /// If there is no such unit, it is smaller, or a member is shorter than it says.
    pub fn grow(&mut self, unit: u16, layout: L) -> Result<(), String> {
        let size = layout.size();
        fits(&self.members, &layout)?;
        let Some(unit) = self.place(unit).filter(|unit| unit.is_there()) else {
            return Err(format!("there is no unit {unit}"));
        };
        if size < unit.info.size || !size.is_multiple_of(unit.info.block_size.into()) {
            return Err(format!("{size} bytes after {}", unit.info.size));
        }
        if unit.open != 0 {
            unit.open = size;
        }
        (unit.info.size, unit.layout) = (size, layout);
        Ok(())
    }

    /// The members' queues.
    pub fn members(&self) -> impl Iterator<Item = &Q> {
        self.members.iter().map(|(queue, _)| queue)
    }

    /// Answers from members that belonged to no request.
    pub fn strays(&self) -> u64 {
        self.strays
    }

    /// Hot: the member that a request within one run goes to, and the request as it is there. `None`:
    /// it is none, to be submitted as any other. Only what the member cannot see is looked at here. One place
    /// of [`Submit::room`] is gone, whether or not the request is given to the member, which must stay the
    /// queue that it is.
    #[inline(always)]
    pub fn straight<'r>(&mut self, r: &Request<'r>) -> Option<(&mut Q, Request<'r>)> {
        // Only what is shared has more units than one. Where there is none nothing is open.
        let unit = match r.unit.checked_sub(1) {
            Some(other) if L::SHARED => self.others.get(usize::from(other))?,
            _ => &self.zero,
        };
        let Place { member, offset, len: left } = unit.layout.locate(r.offset);
        // A flush, like everything without length, is no request within a run. What is open has a run.
        if r.offset < unit.open
            && r.len.wrapping_sub(1) <= left.wrapping_sub(1)
            && (!L::SHARED || !unit.info.read_only || r.op == Op::Read)
            && let Some((queue, unit)) = self.members.get_mut(member)
        {
            self.room -= 1;
            return Some((queue, Request { unit: *unit, offset, ..*r }));
        }
        None
    }

    /// Takes a request into a slot and sends what can be sent.
    #[cold]
    #[inline(never)]
    fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        let index = self.free.pop().ok_or(Full)?;
        let slot = &mut self.slots[usize::from(index)];
        *slot = Slot {
            generation: slot.next_generation(),
            used: true,
            unit: r.unit,
            tag: r.tag,
            op: r.op,
            flags: r.flags,
            offset: r.offset,
            len: r.len,
            ..Slot::FREE
        };
        match find(&self.zero, &self.others, r.unit) {
            Some(unit) => {
                let pieces = match r.op {
                    Op::Read | Op::Write => 0..r.len,
                    Op::Flush => 0..self.members.len() as u64,
                    Op::WriteZeroes | Op::Discard => unit.layout.pieces(r.offset, r.len),
                };
                (slot.sent, slot.end) = (pieces.start, pieces.end);
                match SegList::from_slice(r.segs).filter(|_| unit.takes(r)) {
                    Some(segs) => slot.segs = segs,
                    _ if L::SHARED && unit.is_short_for(r) => slot.fail(Status::NoSpace, 0),
                    _ => slot.fail(Status::Invalid, 0),
                }
                if unit.info.read_only && !matches!(r.op, Op::Read | Op::Flush) {
                    slot.fail(Status::ReadOnly, 0);
                }
            }
            None => slot.fail(Status::Invalid, 0),
        }
        if self.lost {
            slot.fail(Status::Gone, 0);
        }
        self.send(index);
        self.count_room();
        Ok(())
    }

    /// Sends the parts of a slot as far as there is room; the slot waits for the rest.
    fn send(&mut self, index: u16) {
        while !self.slots[usize::from(index)].all_sent() {
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
        let Some(Unit { layout, .. }) = find(&self.zero, &self.others, slot.unit) else {
            slot.fail(Status::Gone, 0);
            return true;
        };
        let mut segs = SegList::EMPTY;
        let (place, step) = match slot.op {
            Op::Read | Op::Write => {
                let place = layout.locate(slot.offset + slot.sent);
                let len = place.len.min(slot.len - slot.sent);
                if len == 0 || !segs.push_part(slot.segs.as_slice(), slot.sent, len) {
                    // Cannot be: it is inside, and the segments add up to the length.
                    slot.fail(Status::Invalid, 0);
                    return true;
                }
                (Place { len, ..place }, len)
            }
            Op::Flush => (Place { member: slot.sent as usize, offset: 0, len: 0 }, 1),
            Op::WriteZeroes | Op::Discard => (layout.piece(slot.sent, slot.offset, slot.len), 1),
        };
        let Place { member, offset, len } = place;
        let nothing = match slot.op {
            Op::Flush => !layout.uses(member),
            _ => len == 0,
        };
        if nothing {
            slot.sent += 1;
            return true;
        }
        let bit = 1 << (slot.part % u64::BITS);
        if slot.outstanding & bit != 0 {
            return false;
        }
        let (queue, unit) = &mut self.members[member];
        let request = Request {
            tag: Tag::new(OWNER, index, slot.generation_of(slot.part)),
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
        slot.outstanding |= bit;
        self.parts += 1;
        slot.part = slot.part.wrapping_add(1);
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
        let known = slot.and_then(|s| s.bit_of(c.tag.generation()).map(|bit| (s, bit)));
        let Some((slot, bit)) = known else {
            self.strays += 1;
            return;
        };
        slot.outstanding &= !bit;
        self.parts -= 1;
        if !c.status.is_ok() {
            slot.fail(c.status, c.detail);
        }
        // One that waits is looked at when it is its turn.
        if slot.outstanding == 0 && slot.all_sent() && !self.waiting.contains(&c.tag.slot()) {
            self.finished.push_back(c.tag.slot());
        }
    }

    #[inline]
    fn count_room(&mut self) {
        let least = |least: usize, (queue, _): &(Q, u16)| least.min(queue.room());
        self.room = self.members.iter().fold(self.free.len(), least) as isize;
    }

    /// Whether parts are in flight, wait, or are to be answered.
    fn has_slots(&self) -> bool {
        self.free.len() < SLOTS
    }
}

impl<Q: LeafAccess, L: Layout> Submit for SplitQueue<Q, L> {
    #[inline]
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        self.unit(unit).map(|unit| &unit.info)
    }

    #[inline]
    fn room(&self) -> usize {
        self.room.max(0) as usize
    }

    #[inline(always)]
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        if let Some((queue, request)) = self.straight(request) {
            return queue.submit(&request);
        }
        self.take(request)
    }
}

impl<Q: LeafAccess, L: Layout> BlockQueue for SplitQueue<Q, L> {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.members.iter_mut().try_for_each(|(queue, _)| queue.register(region))
    }

    #[inline]
    fn poll(&mut self, out: &mut Completions) -> usize {
        let (before, now) = (out.len(), self.now);
        let (early, late) = self.members.split_at_mut(self.first);
        for (queue, _) in late {
            queue.set_now(now);
            queue.poll(out);
        }
        for (queue, _) in early {
            queue.set_now(now);
            queue.poll(out);
        }
        if out.any_failed() && out.iter_from(before).any(|c| c.is_quarantined()) {
            self.lost = true;
            std::iter::once(&mut self.zero).chain(&mut self.others).for_each(|u| u.open = 0);
        }
        if out.room() == 0 {
            cold_path();
            self.first = (self.first + 1) % self.members.len();
        }
        if self.has_slots() {
            self.settle(before, out);
        }
        self.count_room();
        out.len() - before
    }

    #[inline]
    fn start(&mut self) {
        for (queue, _) in &mut self.members {
            queue.start();
        }
    }

    fn in_flight(&self) -> usize {
        let below: usize = self.members.iter().map(|(queue, _)| queue.in_flight()).sum();
        below.saturating_sub(self.parts) + SLOTS - self.free.len()
    }

    /// A member that has no descriptor is polled while anything of it is in flight, or while parts
    /// wait, which may be for it. Places in others come by completions only.
    fn arm(&mut self) -> HasWork {
        let mut work = !self.finished.is_empty();
        for (queue, _) in &mut self.members {
            work |= queue.arm() == HasWork::Yes;
            let polled = queue.in_flight() > 0 || !self.waiting.is_empty();
            work |= polled && queue.wake_fd().is_none();
        }
        if work { HasWork::Yes } else { HasWork::No }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.wakes.fd()
    }

    /// The members are told when they are polled, which is next; and at once where another owner has
    /// another clock.
    #[inline]
    fn set_now(&mut self, now: u64) {
        if now < self.now {
            cold_path();
            self.members.iter_mut().for_each(|(queue, _)| queue.set_now(now));
        }
        self.now = now;
    }
}

impl<Q: LeafAccess, L: Layout> SplitQueue<Q, L> {
    /// Takes the answers to parts out of what members handed out, and answers what is finished.
    #[inline(never)]
    fn settle(&mut self, before: usize, out: &mut Completions) {
        out.retain_from(before, |c| {
            let own = c.tag.owner() == OWNER;
            if own {
                self.answered(c);
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

impl<Q: LeafAccess, L: Layout> LeafAccess for SplitQueue<Q, L> {
    fn unit_len(&self, unit: u16) -> u64 {
        self.unit(unit).map_or(0, |unit| unit.info.size)
    }

    /// Nothing: the layout says how long it is.
    fn set_unit_len(&mut self, _: u16, _: u64) -> Result<(), Status> {
        Ok(())
    }
}

/// A unit of this number that is there.
fn find<'u, L: Layout>(zero: &'u Unit<L>, others: &'u [Unit<L>], unit: u16) -> Option<&'u Unit<L>> {
    let place = match unit.checked_sub(1) {
        None => Some(zero),
        Some(other) => others.get(usize::from(other)),
    };
    place.filter(|unit| unit.is_there())
}
