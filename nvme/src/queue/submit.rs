//! Requests become commands.

use block::{BlockQueue as _, Flags, Full, Op, Request, Status, Tag};
use nvme_spec::{DsmRange, IoOpcode, Sqe};

use super::long::{BOUNCE_BYTES, PIPELINE};
use super::tracker::{Command, NO_BOUNCE, Part};
use super::{Mode, QueuePair};
use crate::bar::Bar;
use crate::prp::{self, ListSlot, PrpError, Prps};
use crate::units::{PAGE, Unit};

const NO_DATA: Prps = Prps { prp1: 0, prp2: 0 };

/// Read or Write of `len` bytes (whole blocks, at most 64 Ki of them).
#[inline(always)]
fn transfer(unit: &Unit, op: Op, flags: Flags, offset: u64, len: u32, prps: Prps) -> Command {
    let head = unit.heads[usize::from(op != Op::Read)];
    blocks(unit, head, fua(flags), offset, u64::from(len), prps)
}

/// Whether a request reads or writes, may do so, lies inside and is as a straight one must be: of whole
/// blocks, at least one, and no longer than a page. Short where operation and length are known when this is
/// compiled.
#[inline(always)]
fn is_straight(unit: &Unit, op: Op, offset: u64, len: u64) -> bool {
    if len == PAGE {
        let end = unit.pages_end.get(op as usize).copied().unwrap_or(0);
        return offset < end && offset & unit.block_mask == 0;
    }
    (op as u8) < unit.transfers
        && len.wrapping_sub(1) < u64::from(unit.max_page)
        && (offset | len) & unit.block_mask == 0
        && offset.checked_add(len).is_some_and(|end| end <= unit.info.size)
}

#[inline]
fn fua(flags: Flags) -> u32 {
    const { assert!(Sqe::FUA == (Flags::FUA.bits() as u32) << 30) };
    u32::from(flags.bits() & Flags::FUA.bits()) << 30
}

#[inline(always)]
fn blocks(unit: &Unit, head: u64, bits: u32, offset: u64, len: u64, prps: Prps) -> Command {
    let nlb = match len {
        PAGE => unit.page_nlb,
        _ => ((len >> unit.block_shift) as u32 - 1) & 0xffff,
    };
    Command { head, prps, cdw10_11: offset >> unit.block_shift, cdw12: nlb | bits }
}

fn zeroes(unit: &Unit, flags: Flags, offset: u64, len: u64) -> Command {
    let deac = unit.zeroes_deallocate && !flags.has(Flags::NO_UNMAP);
    let bits = fua(flags) | if deac { Sqe::DEAC } else { 0 };
    let head = Command::head(IoOpcode::WriteZeroes.code(), unit.nsid);
    blocks(unit, head, bits, offset, len, NO_DATA)
}

impl<B: Bar> QueuePair<B> {
    /// [`block::Submit::submit`]: by far the most requests read or write one segment that lies within
    /// one page, from its beginning on. This is their straight way; whatever differs goes the other.
    #[inline(always)]
    pub(super) fn take(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if let [seg] = r.segs
            && let Some(unit) = self.units.get(usize::from(r.unit))
            && r.len == u64::from(seg.len())
            && is_straight(unit, r.op, r.offset, r.len)
            && let Some(bus) = self.table.run(seg)
            && bus & self.page_mask == 0
            && let Some(slot) = self.trackers.next()
        {
            let prps = Prps { prp1: bus, prp2: 0 };
            let command = transfer(unit, r.op, r.flags, r.offset, r.len as u32, prps);
            self.send(slot, &command, r.tag);
            return Ok(());
        }
        // A copy, so that the caller's need not be in memory for the straight way.
        self.take_any(&{ *r })
    }

    /// Any request.
    #[inline(never)]
    fn take_any(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if self.mode != Mode::Running {
            return self.take_stopped(r);
        }
        let Some(unit) = self.units.get(usize::from(r.unit)) else {
            return self.refuse(r, Status::Invalid);
        };
        if matches!(r.op, Op::Read | Op::Write)
            && r.len <= u64::from(unit.max_command)
            && unit.info.contains(r.offset, r.len)
            && r.segs_fit()
            && !(unit.gone || (r.op == Op::Write && unit.info.read_only))
        {
            let Some(slot) = self.trackers.next() else { return Err(Full) };
            let len = r.len as u32;
            let list = ListSlot {
                region: &self.lists,
                offset: self.memory.list(slot),
                bus: self.list_bus[slot],
            };
            match prp::build(&self.table, self.page_shift, r.segs, 0, len, &list) {
                Ok(prps) => {
                    self.stats.prp_lists += u64::from(prps.prp2 == list.bus);
                    let command = transfer(unit, r.op, r.flags, r.offset, len, prps);
                    self.send(slot, &command, r.tag);
                    return Ok(());
                }
                Err(PrpError::Unmapped) => return self.refuse(r, Status::Invalid),
                Err(PrpError::Inexpressible) => return self.take_long(r),
            }
        }
        self.take_other(r)
    }

    /// Gives a command to the ring under the tracker of a slot that is next.
    #[inline(always)]
    fn send(&mut self, slot: usize, command: &Command, tag: Tag) {
        let cid = self.trackers.take(slot, command, tag, self.now);
        self.push(command, cid);
    }

    #[inline(always)]
    pub(super) fn push(&mut self, command: &Command, cid: u16) {
        let Command { prps, cdw10_11, cdw12, .. } = *command;
        let cdw10_13 = [cdw10_11, u64::from(cdw12)];
        self.sq.push_plain(command.first(cid), prps.prp1, prps.prp2, cdw10_13);
        self.work = true;
    }

    /// All that is no plain read or write of one command: checks first, then the way it goes.
    #[cold]
    fn take_other(&mut self, r: &Request<'_>) -> Result<(), Full> {
        let Some(unit) = self.units.get(usize::from(r.unit)) else {
            return self.refuse(r, Status::Invalid);
        };
        let transfers = matches!(r.op, Op::Read | Op::Write);
        let wrong = match r.op {
            _ if unit.gone => Some(Status::Gone),
            Op::Flush => (!r.segs.is_empty()).then_some(Status::Invalid),
            _ if !r.segs_fit() || !unit.info.contains(r.offset, r.len) => Some(Status::Invalid),
            Op::Read | Op::Write if r.len > u64::from(unit.info.max_transfer) => {
                Some(Status::Invalid)
            }
            Op::Read => None,
            _ if unit.info.read_only => Some(Status::ReadOnly),
            Op::WriteZeroes if !unit.info.write_zeroes => Some(Status::Unsupported),
            Op::Discard if !unit.info.discard => Some(Status::Unsupported),
            _ => None,
        };
        if let Some(status) = wrong {
            return self.refuse(r, status);
        }
        if transfers {
            if r.segs.iter().any(|s| self.table.place(s).is_none()) {
                return self.refuse(r, Status::Invalid);
            }
            return self.take_long(r);
        }
        // Nothing to do: no cache to flush, or no blocks.
        if if r.op == Op::Flush { !unit.info.volatile_cache } else { r.len == 0 } {
            return self.refuse(r, Status::Ok);
        }
        let command = match r.op {
            Op::Flush => Command {
                head: Command::head(IoOpcode::Flush.code(), unit.nsid),
                prps: NO_DATA,
                cdw10_11: 0,
                cdw12: 0,
            },
            Op::WriteZeroes if r.len <= unit.max_zeroes => zeroes(unit, r.flags, r.offset, r.len),
            _ => return self.take_long(r),
        };
        let Some(slot) = self.trackers.next() else { return Err(Full) };
        self.send(slot, &command, r.tag);
        Ok(())
    }

    /// Answers at the next poll, without a command.
    #[cold]
    fn refuse(&mut self, r: &Request<'_>, status: Status) -> Result<(), Full> {
        if self.in_flight() >= self.capacity as usize {
            return Err(Full);
        }
        self.answer(r.tag, status, 0);
        Ok(())
    }

    #[cold]
    fn take_stopped(&mut self, r: &Request<'_>) -> Result<(), Full> {
        match self.mode {
            // Without a mark: this request's buffers were never given to the device.
            Mode::Gone(_) => self.refuse(r, Status::Gone),
            _ => Err(Full),
        }
    }

    #[cold]
    fn take_long(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if self.longs.free_len() == 0 {
            return Err(Full);
        }
        self.longs.insert(r, self.now);
        self.send_longs();
        Ok(())
    }

    /// Sends commands of long requests as far as there are trackers and bounce buffers.
    pub(super) fn send_longs(&mut self) {
        // Each gets its turn; one that has all its commands out, or done, leaves the list.
        for _ in 0..self.longs.waiting.len() {
            let Some(&index) = self.longs.waiting.front() else { break };
            let more = self.send_long(index);
            self.longs.waiting.pop_front();
            let long = self.longs.get_mut(index);
            if long.left > 0 {
                self.longs.waiting.push_back(index);
            } else {
                long.queued = false;
                self.end_long(index);
            }
            if !more {
                break;
            }
        }
        self.work = true;
    }

    /// Sends commands of one long request. `false` if it ran out of trackers.
    fn send_long(&mut self, index: u16) -> bool {
        loop {
            let long = self.longs.get_mut(index);
            if long.left == 0 || long.outstanding >= PIPELINE {
                return true;
            }
            let Some(slot) = self.trackers.next() else { return false };
            let unit = &self.units[usize::from(long.unit)];
            let list_at = self.memory.list(slot);
            let list_bus = self.list_bus[slot];
            let mut bounce = NO_BOUNCE;
            let (command, len) = match long.op {
                Op::WriteZeroes => {
                    let len = long.left.min(unit.max_zeroes);
                    (zeroes(unit, long.flags, long.offset, len), len)
                }
                Op::Discard => {
                    // The range lies where the tracker's PRP list would.
                    let len = long.left.min(unit.max_discard);
                    let range = DsmRange {
                        attributes: 0.into(),
                        blocks: ((len >> unit.block_shift) as u32).into(),
                        slba: (long.offset >> unit.block_shift).into(),
                    };
                    let words: [u64; 2] = zerocopy::transmute!(range);
                    self.lists.write_words(list_at, &words.map(u64::from_le));
                    let command = Command {
                        head: Command::head(IoOpcode::DatasetManagement.code(), unit.nsid),
                        prps: Prps { prp1: list_bus, prp2: 0 },
                        cdw10_11: u64::from(Sqe::DSM_DEALLOCATE) << 32,
                        cdw12: 0,
                    };
                    (command, len)
                }
                op => {
                    let mut len = long.left.min(u64::from(unit.max_command)) as u32;
                    let list = ListSlot { region: &self.lists, offset: list_at, bus: list_bus };
                    let segs = &long.segs[long.seg..];
                    let (table, shift) = (&self.table, self.page_shift);
                    let mut built = prp::build(table, shift, segs, long.skip, len, &list);
                    if built == Err(PrpError::Inexpressible) {
                        len = len.min(BOUNCE_BYTES);
                        let Some(buffer) = self.bounces.take() else { return true };
                        bounce = buffer;
                        let known = op == Op::Read
                            || self.bounces.copy(table, &long.segs, long.done, len, buffer, true);
                        let seg = self.bounces.seg(buffer, len).filter(|_| known);
                        built = match seg {
                            Some(seg) => prp::build(table, shift, &[seg], 0, len, &list),
                            None => Err(PrpError::Unmapped),
                        };
                    }
                    let Ok(prps) = built else {
                        if bounce != NO_BOUNCE {
                            self.bounces.give(bounce);
                        }
                        long.fail(Status::Invalid, 0);
                        return true;
                    };
                    self.stats.prp_lists += u64::from(prps.prp2 == list_bus);
                    self.stats.bounces += u64::from(bounce != NO_BOUNCE);
                    (transfer(unit, op, long.flags, long.offset, len, prps), u64::from(len))
                }
            };
            let (tag, at) = (long.tag, long.done as u32);
            long.advance(len);
            long.outstanding += 1;
            long.commands = long.commands.saturating_add(1);
            self.stats.splits += u64::from(long.commands == 2);
            self.send(slot, &command, tag);
            if let Some(t) = self.trackers.get_mut(slot) {
                t.make_part(Part { parent: index, bounce, at });
                self.parts += 1;
            }
        }
    }
}
