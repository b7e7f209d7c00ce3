//! [`SimQueue`]: one reactor's queue to a [`Disk`]. Requests are carried out in any order, in one
//! piece or several, and answered some time later; all of it drawn from the disk's generator.

use std::sync::Arc;

use block::{
    BlockQueue, Completions, DeviceInfo, Full, HasWork, LeafAccess, Op, Request, SegList, Status,
    Submit,
};
use dma::{Region, RegionId};

use crate::disk::{Fate, Held, Lane, State, answer, is_through};
use crate::{Disk, SECTOR, Sabotage};

/// Requests in flight per queue, at most.
const DEPTH: usize = 64;

/// See the module's text. Dropping it forgets what is in flight.
pub struct SimQueue {
    disk: Disk,
    lane: usize,
    info: DeviceInfo,
}

impl SimQueue {
    /// One more queue to the disk.
    pub fn new(disk: &Disk) -> SimQueue {
        let mut s = disk.state();
        let regions = vec![None; RegionId::MAX];
        s.lanes.push(Lane { regions, held: Vec::new(), polls: 0, still: 0 });
        SimQueue { disk: disk.clone(), lane: s.lanes.len() - 1, info: s.info.clone() }
    }

    /// Does a part of a request, or the rest of it.
    fn step(&self, s: &mut State, at: usize) {
        let lane = self.lane;
        let h = &s.lanes[lane].held[at];
        let (number, op, flags, fate) = (h.number, h.request.op, h.request.flags, h.fate);
        let (offset, len, done) = (h.request.offset, h.request.len, h.at);
        if let Fate::Fails(status, odds) = fate {
            if odds > 0 {
                self.tear(s, at, odds);
            }
            s.trace.add(&[3, number, status as u64]);
            s.lanes[lane].held[at].end = Some(status);
            return;
        }
        if op == Op::Flush {
            s.flush(number);
            s.lanes[lane].held[at].end = Some(Status::Ok);
            return;
        }
        // Nothing makes a device do a long request at one instant.
        let left = len - done;
        let sectors = left / SECTOR as u64;
        let split = sectors > 1 && s.rng.one_in(4);
        let n = if split { s.rng.within(1, sectors - 1) * SECTOR as u64 } else { left };
        let status = self.transfer(s, at, done, n);
        let h = &mut s.lanes[lane].held[at];
        h.at += n;
        if h.at < len && status.is_ok() {
            return;
        }
        h.end = Some(status);
        if op != Op::Read {
            self.disk.count_write();
            if is_through(&s.info, s.sabotage, flags) {
                s.harden(number, offset, len);
            }
        }
    }

    /// Moves `n` bytes of a request, from its `from`th on.
    fn transfer(&self, s: &mut State, at: usize, from: u64, n: u64) -> Status {
        let h = &s.lanes[self.lane].held[at];
        let (number, offset) = (h.number, h.request.offset + from);
        if h.request.op == Op::Read {
            let mut part = SegList::EMPTY;
            if !part.push_part(h.segs.as_slice(), from, n) {
                return Status::Invalid;
            }
            let mut at = offset;
            for seg in part.as_slice() {
                let Some(region) = &s.lanes[self.lane].regions[seg.region().index()] else {
                    return Status::Invalid;
                };
                let mut data = vec![0; seg.len() as usize];
                s.get(at, &mut data);
                region.write_seg(seg, &data);
                at += u64::from(seg.len());
            }
            return Status::Ok;
        }
        let writes = h.request.op == Op::Write;
        let Some(data) = s.contents(self.lane, h, from, n) else {
            return if writes { Status::Invalid } else { Status::Ok };
        };
        let lie = writes && s.sabotage != Sabotage::None && s.rng.one_in(200);
        match s.sabotage {
            Sabotage::LoseWrites if lie => {}
            Sabotage::Misplace if lie && offset + n + SECTOR as u64 <= s.info.size => {
                s.put(number, offset + SECTOR as u64, &data);
            }
            _ => s.put(number, offset, &data),
        }
        Status::Ok
    }

    /// Does some of the sectors of a request that fails.
    fn tear(&self, s: &mut State, at: usize, odds: u64) {
        let h = &s.lanes[self.lane].held[at];
        let (number, offset, len) = (h.number, h.request.offset, h.request.len);
        let block = s.info.block_size as usize;
        let Some(data) = s.contents(self.lane, h, 0, len) else { return };
        for (i, bytes) in data.chunks(block).enumerate() {
            if s.rng.below(100) < odds {
                s.put(number, offset + (i * block) as u64, bytes);
            }
        }
        self.disk.count_write();
    }
}

impl Drop for SimQueue {
    fn drop(&mut self) {
        let mut s = self.disk.state();
        let lane = &mut s.lanes[self.lane];
        lane.held.clear();
        lane.regions.clear();
    }
}

impl Submit for SimQueue {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        (unit == 0).then_some(&self.info)
    }

    fn room(&self) -> usize {
        DEPTH.saturating_sub(self.in_flight())
    }

    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if self.room() == 0 {
            return Err(Full);
        }
        let mut s = self.disk.state();
        s.numbers += 1;
        let number = s.numbers;
        let (mut fate, wait) = s.draw_fate(r);
        let segs = SegList::from_slice(r.segs).unwrap_or_else(|| {
            fate = Fate::Fails(Status::Invalid, 0);
            SegList::EMPTY
        });
        s.trace.add(&[4, number, r.op as u64, r.offset, r.len]);
        let lane = &mut s.lanes[self.lane];
        let wait = lane.polls + wait;
        let request =
            Request { tag: r.tag, op: r.op, flags: r.flags, unit: r.unit, segs: &[], ..*r };
        lane.held.push(Held { request, segs, number, at: 0, wait, fate, end: None });
        Ok(())
    }
}

impl BlockQueue for SimQueue {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.disk.state().lanes[self.lane].regions[region.id().index()] = Some(region.clone());
        Ok(())
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        let mut s = self.disk.state();
        let before = out.len();
        s.lanes[self.lane].polls += 1;
        let now = s.lanes[self.lane].polls;
        if now < s.lanes[self.lane].still {
            return 0;
        }
        // Not while it stands still, or it would for ever.
        let stall = s.faults.stall;
        if s.rng.one_in(stall) {
            s.lanes[self.lane].still = now + s.rng.within(50, 500);
            return 0;
        }
        let tries = s.lanes[self.lane].held.len() as u64;
        let tries = if tries == 0 { 0 } else { s.rng.below(tries + 2) };
        for _ in 0..tries.min(out.room() as u64) {
            let count = s.lanes[self.lane].held.len() as u64;
            if count == 0 {
                break;
            }
            let at = s.rng.below(count) as usize;
            if s.lanes[self.lane].held[at].wait > now {
                continue;
            }
            if s.lanes[self.lane].held[at].end.is_none() {
                self.step(&mut s, at);
                // The answer may come at once or later.
                if s.rng.one_in(2) {
                    continue;
                }
            }
            if let Some(status) = s.lanes[self.lane].held[at].end {
                let h = s.lanes[self.lane].held.swap_remove(at);
                if !matches!(h.request.op, Op::Read | Op::Flush) {
                    s.note_answer(h.number);
                }
                out.push(answer(&h, status));
            }
        }
        out.len() - before
    }

    fn in_flight(&self) -> usize {
        self.disk.state().lanes[self.lane].held.len()
    }

    fn arm(&mut self) -> HasWork {
        if self.in_flight() == 0 { HasWork::No } else { HasWork::Yes }
    }
}

impl LeafAccess for SimQueue {
    fn unit_len(&self, _unit: u16) -> u64 {
        self.disk.state().len()
    }

    fn set_unit_len(&mut self, _unit: u16, len: u64) -> Result<(), Status> {
        self.disk.state().set_len(len);
        Ok(())
    }
}
