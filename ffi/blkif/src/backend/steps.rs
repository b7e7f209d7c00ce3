//! What a request needs beyond one trip to the disk: flushes before data, barriers, discards in
//! parts, waiting for space, and the rules for what a guest may be told.

use block::{Flags, Op, Request, Status, Submit, Tag};

use super::{Backend, GATE_BARRIER, GATE_NO_SPACE, GATE_STOPPING, NO_BUFFER, Stage};
use crate::abi::{ERROR, OKAY, PAGE, READ, Segment, WRITE_BARRIER};
use crate::stats::ring_status;
use crate::{EventChannel, Grants, RingMemory};

/// First delay before something is tried again, in nanoseconds; doubled each time…
const RETRY_DELAY: u64 = 10_000_000;
/// …so many times at most.
const RETRY_DOUBLINGS: u8 = 7;
/// A flush that fails is tried again so many times before the disk counts as failed.
const FLUSH_TRIES: u8 = 6;
/// Longest part of a discard that is sent to the disk at a time, in bytes.
const DISCARD_PART: u64 = 128 << 20;

/// Flags of the data of a flush or barrier. Data of a flush is an ordinary write after it; that of
/// a barrier must be durable before anything later is.
pub(super) fn payload_flags(operation: u8, usual: Flags) -> Flags {
    if operation == WRITE_BARRIER { usual.with(Flags::FUA) } else { usual }
}

fn delay(tries: u8) -> u64 {
    RETRY_DELAY << tries.min(RETRY_DOUBLINGS)
}

impl<M: RingMemory, G: Grants, E: EventChannel> Backend<M, G, E> {
    /// Puts a request on the list, to go on at `stage`.
    #[cold]
    pub(super) fn again(&mut self, index: u16, stage: Stage) {
        self.slots[usize::from(index)].stage = stage;
        self.todo.push(index);
    }

    /// The disk did not take a request of one segment, which counts as sent.
    #[cold]
    pub(super) fn no_room(&mut self, index: u16) {
        let page = self.slots[usize::from(index)].stage == Stage::PageWrite;
        self.make_usual(index);
        let slot = &self.slots[usize::from(index)];
        if slot.operation == READ {
            self.stats.other_reads.add(1);
        } else if page {
            self.pages_written -= 1;
            self.stats.plain_writes.add(1);
        } else {
            self.stats.written_bytes.add(u64::from(slot.len).wrapping_neg());
        }
        self.again(index, Stage::PutData);
    }

    /// Answers a request that may need more than that.
    pub(super) fn answer(&mut self, index: u16, status: i16) {
        let slot = &mut self.slots[usize::from(index)];
        if slot.mapping {
            slot.mapping = false;
            slot.status = status;
            return self.again(index, Stage::Maps);
        }
        if status != OKAY {
            self.stats.errors.add(1);
        }
        if slot.operation == WRITE_BARRIER {
            self.gates &= !GATE_BARRIER;
        }
        // A request of one segment is taken without looking at these.
        (slot.tries, slot.due) = (0, 0);
        if slot.large != NO_BUFFER {
            self.large.push(slot.large);
            slot.large = NO_BUFFER;
        }
        self.respond(index, status);
    }

    /// Goes through what is to be done. Returns whether anything was.
    #[inline(never)]
    pub(super) fn do_todo<D: Submit>(&mut self, disk: &mut D) -> bool {
        if self.armed {
            self.armed = false;
            self.ring.disarm();
        }
        if self.pages.pending() > 0 {
            self.hear_of_pages();
        }
        let count = self.todo.len();
        let mut kept = 0;
        for i in 0..count {
            let index = self.todo[i];
            if !self.step(disk, index) {
                self.todo[kept] = index;
                kept += 1;
            }
        }
        self.todo.drain(kept..count);
        kept < count
    }

    /// Does what a request on the list waits for, if it can be done now.
    fn step<D: Submit>(&mut self, disk: &mut D, index: u16) -> bool {
        let slot = &self.slots[usize::from(index)];
        if slot.held && self.waited_too_long(slot.mark) {
            self.no_more_waiting(index);
            return true;
        }
        if self.now < slot.due {
            return false;
        }
        match slot.stage {
            Stage::Fetch => self.fetch(disk, index),
            Stage::Gather => self.gather(disk, index),
            Stage::Scatter => self.scatter(index),
            Stage::PutData => self.put_data(disk, index),
            Stage::PutFlush => self.put_flush(disk, index),
            Stage::PutDiscard => self.put_discard(disk, index),
            Stage::Barrier => {
                let before = self.ring.unanswered() - self.left.len() as u32;
                if before > self.held_flushes + 1 {
                    return false;
                }
                self.put_flush(disk, index);
            }
            Stage::Maps => {
                if self.awaits_pages(index) {
                    return false;
                }
                let status = slot.status;
                self.answer(index, status);
            }
            Stage::Refused => {
                // One that is a barrier was never one.
                let (status, gate) =
                    (self.slots[usize::from(index)].status, self.gates & GATE_BARRIER);
                self.answer(index, status);
                self.gates |= gate;
            }
            stage => unreachable!("a request at {stage:?} was on the list"),
        }
        true
    }

    fn send<D: Submit>(&mut self, disk: &mut D, index: u16, op: Op, offset: u64, len: u64) -> bool {
        let tag = self.slots[usize::from(index)].tag();
        let request = Request { tag, op, flags: Flags::NONE, unit: 0, offset, len, segs: &[] };
        disk.submit(&request).is_ok()
    }

    pub(super) fn put_flush<D: Submit>(&mut self, disk: &mut D, index: u16) {
        if self.send(disk, index, Op::Flush, 0, 0) {
            self.slots[usize::from(index)].stage = Stage::AtFlush;
        } else {
            self.again(index, Stage::PutFlush);
        }
    }

    /// Sends the next part of a discard. Parts end at multiples of the part's size, so that all
    /// but the first and last are whole for any unit that the disk may have.
    pub(super) fn put_discard<D: Submit>(&mut self, disk: &mut D, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let from = slot.offset;
        let len = (slot.mark - from).min(DISCARD_PART - from % DISCARD_PART);
        slot.len = len as u32;
        if self.send(disk, index, Op::Discard, from, len) {
            self.slots[usize::from(index)].stage = Stage::AtDiscard;
        } else {
            self.again(index, Stage::PutDiscard);
        }
    }

    /// Any completion that is not the end of a read or write of a whole page that is mapped, and
    /// succeeded. Returns whether it is one of a request in flight.
    #[inline(never)]
    pub(super) fn complete_slow(&mut self, tag: Tag, status: Status) -> bool {
        let index = tag.slot();
        let slot = self.slots.get_mut(usize::from(index));
        let Some(slot) = slot.filter(|s| s.at_disk() && s.generation == tag.generation()) else {
            self.stats.strays.add(1);
            return false;
        };
        slot.came_back();
        let part = slot.stage == Stage::Plain && status.is_ok();
        if part && slot.operation != READ {
            self.respond(index, OKAY);
            return true;
        }
        if part && let Some(page) = self.pages.find_at_home(slot.word as u32, self.stamp) {
            let (segment, len) = (Segment(slot.word), slot.len);
            self.stats.plain_reads.add(1);
            self.stats.read_bytes.add(u64::from(len));
            let at = usize::from(index) * PAGE;
            self.grants.write_page(page, segment.offset(), &self.bounce, at, len);
            self.respond(index, OKAY);
            return true;
        }
        let plain = matches!(slot.stage, Stage::PageRead | Stage::PageWrite | Stage::Plain);
        self.make_usual(index);
        let slot = &mut self.slots[usize::from(index)];
        if plain && slot.operation == READ {
            self.stats.other_reads.add(1);
        }
        match (slot.stage, status) {
            (Stage::AtData, Status::NoSpace) if slot.operation != READ => {
                self.wait_for_space(index, Stage::PutData);
            }
            (Stage::AtFlush, Status::NoSpace) => self.wait_for_space(index, Stage::PutFlush),
            (Stage::AtData, Status::Ok) => {
                self.got_space(index);
                if self.slots[usize::from(index)].operation == READ {
                    // In the turn: until then the copies of the last one are not at their end.
                    self.again(index, Stage::Scatter);
                } else {
                    self.answer(index, OKAY);
                }
            }
            (Stage::AtFlush, Status::Ok) => {
                self.got_space(index);
                if self.slots[usize::from(index)].segments() > 0 {
                    self.again(index, Stage::Gather);
                } else {
                    self.answer(index, OKAY);
                }
            }
            (Stage::AtFlush, status) => {
                self.got_space(index);
                self.flush_failed(index, status);
            }
            (Stage::AtDiscard, Status::Ok) if slot.offset + u64::from(slot.len) < slot.mark => {
                slot.offset += u64::from(slot.len);
                self.again(index, Stage::PutDiscard);
            }
            (_, status) => {
                // Nothing of a read that failed goes to the guest: the buffer holds old bytes.
                let status = ring_status(slot.operation, status);
                self.got_space(index);
                self.answer(index, status);
            }
        }
        true
    }

    /// A ring has no word for "no space": the write waits, and with it the ring.
    fn wait_for_space(&mut self, index: u16, stage: Stage) {
        let slot = &mut self.slots[usize::from(index)];
        if !slot.held {
            slot.held = true;
            slot.mark = self.now;
            slot.tries = 0;
            self.held_no_space += 1;
            self.gates |= GATE_NO_SPACE;
        }
        slot.due = self.now.saturating_add(delay(slot.tries));
        slot.tries = slot.tries.saturating_add(1);
        self.stats.held_no_space.set(u64::from(self.held_no_space));
        self.again(index, stage);
    }

    /// The request does not wait for space any more, if it did.
    fn got_space(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        if slot.held {
            slot.held = false;
            slot.tries = 0;
            slot.due = 0;
            self.held_no_space -= 1;
            if self.held_no_space == 0 {
                self.gates &= !GATE_NO_SPACE;
            }
            self.stats.held_no_space.set(u64::from(self.held_no_space));
        }
    }

    fn waited_too_long(&self, since: u64) -> bool {
        let limit = self.config.no_space_timeout.unwrap_or(u64::MAX);
        self.gates & GATE_STOPPING != 0 || self.now.saturating_sub(since) >= limit
    }

    fn no_more_waiting(&mut self, index: u16) {
        let flush = self.slots[usize::from(index)].stage == Stage::PutFlush;
        self.got_space(index);
        if flush {
            self.fail(index);
        } else {
            self.answer(index, ERROR);
        }
    }

    /// An error would make Linux report an empty flush as done and never flush again. So a flush
    /// is tried some times, and if it cannot be had the disk as a whole has failed.
    fn flush_failed(&mut self, index: u16, status: Status) {
        let slot = &mut self.slots[usize::from(index)];
        let stopping = self.gates & GATE_STOPPING != 0;
        if status == Status::Gone || slot.tries >= FLUSH_TRIES || self.failed || stopping {
            return self.fail(index);
        }
        slot.due = self.now.saturating_add(delay(slot.tries));
        slot.tries += 1;
        self.again(index, Stage::PutFlush);
    }

    /// The disk has failed, found out by this flush: all later requests get errors, which the
    /// guest does report.
    fn fail(&mut self, index: u16) {
        if !self.failed {
            log::error!("a disk cannot flush: the guest gets errors from now on");
            self.failed = true;
            self.stats.failed.set(1);
        }
        if self.slots[usize::from(index)].segments() > 0 {
            self.answer(index, ERROR);
        } else {
            self.hold_for_ever(index);
        }
    }

    pub(super) fn hold_for_ever(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        slot.stage = Stage::Held;
        if slot.operation == WRITE_BARRIER {
            // What comes after it gets errors; the ring need not stand still for that.
            self.gates &= !GATE_BARRIER;
        }
        self.held_flushes += 1;
        self.stats.held_flushes.set(u64::from(self.held_flushes));
    }
}
