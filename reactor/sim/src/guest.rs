//! [`Guest`]: a frontend that sends what a run tells it to, and compares what comes back with the
//! [`Model`].

use std::collections::VecDeque;
use std::sync::Arc;

use block::{Completion, Flags, Frontend, HasWork, Op, Request, SegList, Status, Submit, Tag};
use dma::{Buf, Error, Pool, Region};

use crate::model::{fill, ident};
use crate::{Model, Rng, SECTOR, Trace};

/// Bytes of the largest read or write.
const BUFFER: u32 = 128 << 10;

/// Something that a guest asks, in sectors.
#[derive(Clone, Copy, Debug)]
pub struct GuestOp {
    /// What.
    pub op: Op,
    /// How.
    pub flags: Flags,
    /// From which sector on.
    pub first: u64,
    /// How many; at most [`Guest::LONGEST`] of a read or write.
    pub count: u64,
}

/// A request that was sent.
struct Sent {
    op: GuestOp,
    /// When, by the model's time.
    sent: u64,
    buf: Option<Buf>,
    segs: SegList,
    generation: u32,
}

/// The guest's end of a disk on one reactor.
pub struct Guest {
    owner: u16,
    pool: Pool,
    slots: Vec<Option<Sent>>,
    generation: u32,
    /// Slots that the image has not taken yet.
    queue: VecDeque<u16>,
    answers: VecDeque<(u16, Status)>,
    taken: usize,
    trace: Trace,
}

impl Guest {
    /// Sectors of the largest read or write.
    pub const LONGEST: u64 = BUFFER as u64 / SECTOR as u64;

    /// A guest with at most `depth` requests in flight; `owner` as the reactor gave it.
    ///
    /// # Errors
    /// If there is no memory for the buffers.
    pub fn new(owner: u16, depth: u16, trace: Trace) -> Result<Guest, Error> {
        Ok(Guest {
            owner,
            pool: Pool::new(depth.into(), BUFFER)?,
            slots: (0..depth).map(|_| None).collect(),
            generation: 0,
            queue: VecDeque::new(),
            answers: VecDeque::new(),
            taken: 0,
            trace,
        })
    }

    /// Requests that were sent and whose answers nobody has looked at.
    pub fn open(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Sends a request. `false` if as many as may be are in flight.
    pub fn send(&mut self, op: GuestOp, model: &mut Model, rng: &mut Rng) -> bool {
        let Some(slot) = self.slots.iter().position(Option::is_none) else { return false };
        let (mut segs, mut buf) = (SegList::EMPTY, None);
        let id = if op.op == Op::Write { model.identity() } else { 0 };
        if matches!(op.op, Op::Read | Op::Write) {
            let len = op.count as usize * SECTOR;
            let taken = self.pool.take().filter(|b| b.seg().len() as usize >= len);
            let Some(taken) = taken else { return false };
            let mut data = vec![0x5a; len];
            if op.op == Op::Write {
                fill(id, op.first, &mut data);
            }
            self.pool.region().write(taken.seg().offset() as usize, &data);
            let mut at = 0;
            while at < op.count {
                let most = op.count - at;
                // As a guest's pages are: not side by side.
                let n = if segs.as_slice().len() < 8 { rng.within(1, most) } else { most };
                let part = (at as usize * SECTOR) as u32;
                let part = taken.seg().slice(part, (n as usize * SECTOR) as u32);
                if !part.is_some_and(|p| segs.push(p)) {
                    return false;
                }
                at += n;
            }
            buf = Some(taken);
        }
        let sent = match op.op {
            Op::Read => model.read_sent(),
            Op::Flush => model.tick(),
            _ => model.sent(op.first, op.count, id),
        };
        self.trace.add(&[10, op.op as u64, op.first, op.count, u64::from(id)]);
        self.generation += 1;
        self.slots[slot] = Some(Sent { op, sent, buf, segs, generation: self.generation });
        self.queue.push_back(slot as u16);
        true
    }

    /// Takes one answer, tells the model, and compares what was read.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn receive(&mut self, model: &mut Model) -> Result<Option<(GuestOp, Status)>, String> {
        let Some((slot, status)) = self.answers.pop_front() else { return Ok(None) };
        let Some(Sent { op, sent, buf, .. }) = self.slots[usize::from(slot)].take() else {
            return Err("an answer to nothing".to_owned());
        };
        self.trace.add(&[11, op.op as u64, op.first, op.count, status as u64]);
        let ok = status.is_ok();
        let mut result = Ok(Some((op, status)));
        match op.op {
            Op::Flush if ok => model.flushed(sent),
            Op::Flush => {}
            Op::Read => {
                model.read_done(sent);
                if let Some(buf) = buf.as_ref().filter(|_| ok)
                    && let Err(e) = self.compare(buf, &op, sent, model)
                {
                    result = Err(e);
                }
            }
            _ => {
                let sure = ok && op.op != Op::Discard;
                let durable = op.flags.has(Flags::FUA);
                model.done(op.first, op.count, sent, sure, durable);
            }
        }
        if let Some(buf) = buf {
            self.pool.give(buf);
        }
        result
    }

    fn compare(&self, buf: &Buf, op: &GuestOp, sent: u64, model: &Model) -> Result<(), String> {
        let mut data = vec![0; op.count as usize * SECTOR];
        self.pool.region().read(buf.seg().offset() as usize, &mut data);
        // The disk may have become smaller meanwhile.
        for (sector, bytes) in (op.first..model.len()).zip(data.chunks(SECTOR)) {
            let id = ident(sector, bytes);
            self.trace.add(&[12, u64::from(id.unwrap_or(u32::MAX))]);
            if !id.is_some_and(|id| model.may_read(sector, id, sent)) {
                let (found, told) = (show(sector, bytes), model.explain(sector));
                return Err(format!("read sector {sector}: {found}; it was told {told}"));
            }
        }
        Ok(())
    }
}

/// What stands in a sector, for a message.
pub fn show(sector: u64, bytes: &[u8]) -> String {
    match ident(sector, bytes) {
        Some(id) => format!("holds {id:#x}"),
        None => {
            let word =
                |n: usize| bytes[n * 8..].first_chunk().map_or(0, |w| u64::from_le_bytes(*w));
            format!("holds neither old nor new: {:#018x} .. {:#018x}", word(0), word(63))
        }
    }
}

impl Frontend for Guest {
    fn regions(&self) -> Vec<Arc<Region>> {
        vec![self.pool.region().clone()]
    }

    fn complete(&mut self, done: Completion) -> bool {
        let slot = self.slots.get(usize::from(done.tag.slot())).and_then(Option::as_ref);
        let known = slot.is_some_and(|s| s.generation == done.tag.generation());
        assert!(known && self.taken > 0, "a completion of nothing: {done:?}");
        self.taken -= 1;
        self.answers.push_back((done.tag.slot(), done.status));
        true
    }

    fn poll<D: Submit>(&mut self, disk: &mut D, _now: u64) -> bool {
        let mut busy = false;
        while let Some(&slot) = self.queue.front().filter(|_| disk.room() > 0) {
            let Some(s) = &self.slots[usize::from(slot)] else { break };
            let request = Request {
                tag: Tag::new(self.owner, slot, s.generation),
                op: s.op.op,
                flags: s.op.flags,
                unit: 0,
                offset: s.op.first * SECTOR as u64,
                len: s.op.count * SECTOR as u64,
                segs: s.segs.as_slice(),
            };
            disk.submit(&request).expect("there is room");
            self.queue.pop_front();
            self.taken += 1;
            busy = true;
        }
        busy
    }

    fn arm(&mut self) -> HasWork {
        if self.queue.is_empty() { HasWork::No } else { HasWork::Yes }
    }

    fn in_flight(&self) -> usize {
        self.taken
    }

    fn closed(&self) -> bool {
        false
    }
}
