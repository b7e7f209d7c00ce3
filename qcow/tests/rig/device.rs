//! [`LogQueue`]: a device in memory that carries requests out in any order, has a cache that a power
//! cut loses, and fails, lies and logs as told; and [`cut`], what such a device holds after a
//! power cut.

use std::sync::Arc;

use block::{
    BlockQueue, Completion, Completions, DeviceInfo, Flags, Full, HasWork, LeafAccess, MemQueue,
    Op, Request, SegList, Status, Submit,
};
use dma::Region;

use super::Rng;

pub(crate) const SECTOR: usize = 512;

/// Something that the device did.
pub(crate) struct Event {
    /// How many events there had been when its request was submitted: a flush vouches for those
    /// alone, and a write may land in part from then on.
    pub(crate) sent: usize,
    pub(crate) unit: u16,
    pub(crate) what: What,
}

pub(crate) enum What {
    Write { offset: u64, data: Vec<u8>, fua: bool },
    Flush,
}

/// How a request fails.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Fault {
    /// Nothing happened.
    Nothing,
    /// It was carried out all the same.
    Done,
    /// Nothing happened yet: the device is lost, and was not stopped.
    Stuck,
}

struct Held {
    request: Request<'static>,
    segs: SegList,
    sent: usize,
    stalled: bool,
}

/// See the module's text.
pub(crate) struct LogQueue {
    inner: MemQueue,
    info: DeviceInfo,
    held: Vec<Held>,
    pub(crate) rng: Rng,
    /// What the device held when the log began.
    base: Vec<u8>,
    pub(crate) log: Vec<Event>,
    logging: bool,
    /// The next requests of this kind fail, so many times.
    pub(crate) fail: Option<(Op, Status, u32)>,
    /// The request with this number fails, as [`LogQueue::requests`] counts.
    pub(crate) fail_at: Option<(u64, Fault)>,
    /// Writes behind this byte of the device fail.
    pub(crate) no_space_from: u64,
    /// One in so many answers comes again later; 0: none.
    pub(crate) repeats: u64,
    answered: Vec<Completion>,
    /// Reads are held back.
    pub(crate) slow_reads: bool,
    /// Requests that are taken at a time.
    pub(crate) depth: usize,
    /// Times that memory was made known.
    pub(crate) registered: u64,
    /// Requests carried out or failed so far, and the good ones among them by kind.
    pub(crate) requests: u64,
    pub(crate) writes: u64,
    pub(crate) reads: u64,
    pub(crate) flushes: u64,
    pub(crate) discards: u64,
    /// Bytes written.
    pub(crate) written: u64,
    len: u64,
    /// Where unit 1 begins, and what it is like: a second device in the same memory.
    pub(crate) second: Option<(u64, DeviceInfo)>,
}

impl LogQueue {
    /// A device full of rubbish, with a volatile cache.
    pub(crate) fn new(size: u64, seed: u64) -> LogQueue {
        let inner = MemQueue::new(size, 512).unwrap();
        inner.data().write(0, &vec![0xD5; size as usize]);
        LogQueue {
            info: DeviceInfo {
                volatile_cache: true,
                max_transfer: 1 << 20,
                ..inner.info(0).unwrap().clone()
            },
            inner,
            held: Vec::new(),
            rng: Rng(seed | 1),
            base: Vec::new(),
            log: Vec::new(),
            logging: false,
            registered: 0,
            fail: None,
            fail_at: None,
            no_space_from: u64::MAX,
            repeats: 0,
            answered: Vec::new(),
            slow_reads: false,
            depth: 64,
            requests: 0,
            writes: 0,
            reads: 0,
            flushes: 0,
            discards: 0,
            written: 0,
            len: size,
            second: None,
        }
    }

    /// This device as unit 0, and behind it one of `size` bytes, full of rubbish, as unit 1.
    pub(crate) fn and(self, size: u64) -> LogQueue {
        let first = self.data();
        let start = first.len() as u64;
        let mut both = LogQueue::new(start + size, self.rng.0);
        both.load(&first);
        both.info.volatile_cache = self.info.volatile_cache;
        let info = DeviceInfo { size, ..both.info.clone() };
        both.info.size = start;
        both.len = start;
        both.second = Some((start, info));
        both
    }

    /// What unit 0 holds, and what unit 1 does.
    pub(crate) fn both(&self) -> (Vec<u8>, Vec<u8>) {
        let mut all = self.data();
        let at = self.second.as_ref().map_or(all.len(), |s| s.0 as usize);
        let second = all.split_off(at);
        (all, second)
    }

    /// The same, where a completed write is durable.
    pub(crate) fn without_cache(mut self) -> LogQueue {
        self.info.volatile_cache = false;
        self
    }

    pub(crate) fn data(&self) -> Vec<u8> {
        let mut all = vec![0; self.inner.data().len()];
        self.inner.data().read(0, &mut all);
        all
    }

    pub(crate) fn load(&mut self, bytes: &[u8]) {
        self.inner.data().write(0, bytes);
    }

    pub(crate) fn peek(&self, offset: u64, into: &mut [u8]) {
        self.inner.data().read(offset as usize, into);
    }

    /// Says that the device is of this size, and its file of this length: for offsets that are only
    /// looked at.
    pub(crate) fn pretend(&mut self, size: u64, len: u64) {
        (self.info.size, self.len) = (size, len);
    }

    pub(crate) fn poke(&mut self, offset: u64, bytes: &[u8]) {
        self.inner.data().write(offset as usize, bytes);
    }

    /// Keeps a log from now on; what the device holds now is durable.
    pub(crate) fn start_log(&mut self) {
        assert!(self.held.is_empty());
        self.base = self.data();
        self.log.clear();
        self.logging = true;
    }

    /// Ends the log: what the device held at its start, and what came then.
    pub(crate) fn take_log(&mut self) -> (Vec<u8>, Vec<Event>) {
        self.logging = false;
        (std::mem::take(&mut self.base), std::mem::take(&mut self.log))
    }

    /// Holds back what the device has now, or lets it go on.
    pub(crate) fn stall(&mut self, stalled: bool) {
        self.held.iter_mut().for_each(|h| h.stalled = stalled);
    }

    /// Requests on their way never arrive.
    pub(crate) fn forget(&mut self) {
        self.held.clear();
    }

    fn note(&mut self, sent: usize, unit: u16, what: What) {
        if self.logging {
            self.log.push(Event { sent, unit, what });
        }
    }

    fn fault(&mut self, r: &Request<'_>) -> Option<(Status, Fault)> {
        if let Some((op, status, n)) = &mut self.fail
            && *op == r.op
            && *n > 0
        {
            *n -= 1;
            return Some((*status, Fault::Nothing));
        }
        let writes = matches!(r.op, Op::Write | Op::WriteZeroes);
        if writes && r.offset + r.len > self.no_space_from {
            return Some((Status::NoSpace, Fault::Nothing));
        }
        let moves = matches!(r.op, Op::Read | Op::Write);
        if moves && r.len > u64::from(self.info.max_transfer) {
            return Some((Status::Invalid, Fault::Nothing));
        }
        match self.fail_at {
            Some((n, Fault::Stuck)) if n == self.requests => Some((Status::Gone, Fault::Stuck)),
            Some((n, fault)) if n == self.requests => Some((Status::Medium, fault)),
            _ => None,
        }
    }

    /// Carries a request out. Returns its answer.
    fn run(&mut self, h: &Held) -> Completion {
        let r = Request { segs: h.segs.as_slice(), ..h.request };
        let fault = self.fault(&r);
        self.requests += 1;
        let mut answer = Completion { tag: r.tag, status: Status::Ok, detail: 0 };
        if let Some((status, fault)) = fault {
            answer.status = status;
            if fault == Fault::Stuck {
                answer.detail = block::QUARANTINED;
            }
            if fault != Fault::Done {
                return answer;
            }
        }
        match r.op {
            Op::Read => self.reads += 1,
            Op::Flush => self.flushes += 1,
            Op::Discard => self.discards += 1,
            _ => self.writes += 1,
        }
        if r.op == Op::Write {
            self.written += r.len;
        }
        self.inner.submit(&Request { unit: 0, ..r }).unwrap();
        let mut done = Completions::new();
        assert_eq!(self.inner.poll(&mut done), 1);
        if !done.get(0).status.is_ok() {
            return done.get(0);
        }
        match r.op {
            Op::Read => {}
            Op::Flush => self.note(h.sent, r.unit, What::Flush),
            _ => {
                if r.op == Op::Discard {
                    // What a discarded range reads as is the device's affair.
                    self.poke(r.offset, &vec![0xB7; r.len as usize]);
                }
                if self.logging {
                    let mut data = vec![0; r.len as usize];
                    self.inner.data().read(r.offset as usize, &mut data);
                    let fua = r.flags.has(Flags::FUA);
                    self.note(h.sent, r.unit, What::Write { offset: r.offset, data, fua });
                }
            }
        }
        answer
    }
}

/// The disk after a power cut behind the first `at` events: what was durable, and of what was cached
/// or in flight each sector or none.
pub(crate) fn cut(base: &[u8], log: &[Event], at: usize, cache: bool, rng: &mut Rng) -> Vec<u8> {
    let mut disk = base.to_vec();
    // Writes that are not under all older ones on the disk, and whether they must land.
    let mut late: Vec<(usize, bool)> = Vec::new();
    for (i, event) in log[..at].iter().enumerate() {
        match &event.what {
            What::Write { fua, .. } => late.push((i, *fua || !cache)),
            What::Flush => {
                // All that is older than what it vouches for, too: so the order stays.
                let vouched =
                    |l: &mut (usize, bool)| l.0 < event.sent && log[l.0].unit == event.unit;
                for (i, _) in late.extract_if(.., vouched) {
                    land(&mut disk, &log[i], || true);
                }
            }
        }
    }
    let flying = (at..log.len()).filter(|&i| log[i].sent <= at).map(|i| (i, false));
    let mood = rng.below(3);
    for (i, must) in late.into_iter().chain(flying) {
        let whole = if rng.one_in(2) { Some(rng.one_in(2)) } else { None };
        land(&mut disk, &log[i], || {
            must || match mood {
                0 => false,
                1 => whole.unwrap_or_else(|| rng.one_in(2)),
                _ => rng.below(10) < 9,
            }
        });
    }
    disk
}

/// For each write of the log: the disk if the power fails then, and of all that no flush had vouched
/// for, that write alone lands, whole or some of its sectors. What it relies on must be durable.
pub(crate) fn each_alone(
    base: &[u8],
    log: &[Event],
    rng: &mut Rng,
    mut then: impl FnMut(usize, Vec<u8>),
) {
    let mut durable = base.to_vec();
    let mut late: Vec<usize> = Vec::new();
    for (i, event) in log.iter().enumerate() {
        if matches!(event.what, What::Flush) {
            let vouched = |l: &mut usize| *l < event.sent && log[*l].unit == event.unit;
            late.extract_if(.., vouched).for_each(|l| land(&mut durable, &log[l], || true));
            continue;
        }
        late.push(i);
        let mut disk = durable.clone();
        let whole = rng.one_in(2);
        land(&mut disk, event, || whole || rng.one_in(2));
        then(i, disk);
    }
}

/// Puts those sectors of a write on the disk for which `lands` says so.
fn land(disk: &mut [u8], event: &Event, mut lands: impl FnMut() -> bool) {
    let What::Write { offset, data, .. } = &event.what else { return };
    for (n, sector) in data.chunks(SECTOR).enumerate() {
        if lands() {
            let from = *offset as usize + n * SECTOR;
            disk[from..from + sector.len()].copy_from_slice(sector);
        }
    }
}

impl Submit for LogQueue {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        match unit {
            0 => Some(&self.info),
            1 => self.second.as_ref().map(|s| &s.1),
            _ => None,
        }
    }

    fn room(&self) -> usize {
        self.depth.saturating_sub(self.held.len())
    }

    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if self.room() == 0 {
            return Err(Full);
        }
        let segs = SegList::from_slice(r.segs).unwrap();
        let mut offset = r.offset;
        if let Some((start, info)) = &self.second {
            let size = if r.unit == 1 { info.size } else { *start };
            assert!(r.offset + r.len <= size, "behind the end of unit {}", r.unit);
            offset += if r.unit == 1 { *start } else { 0 };
        }
        let request =
            Request { tag: r.tag, op: r.op, flags: r.flags, unit: r.unit, segs: &[], offset, ..*r };
        self.held.push(Held { request, segs, sent: self.log.len(), stalled: false });
        Ok(())
    }
}

impl BlockQueue for LogQueue {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.registered += 1;
        self.inner.register(region)
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        let before = out.len();
        if self.repeats > 0 && !self.answered.is_empty() && self.rng.one_in(self.repeats) {
            let at = self.rng.below(self.answered.len() as u64) as usize;
            out.push(self.answered[at]);
        }
        if !self.held.is_empty() {
            let n = self.rng.below(self.held.len() as u64 + 1).min(out.room() as u64);
            for _ in 0..n {
                let at = self.rng.below(self.held.len() as u64) as usize;
                let slow = self.slow_reads && self.held[at].request.op == Op::Read;
                if slow || self.held[at].stalled {
                    continue;
                }
                let h = self.held.swap_remove(at);
                let answer = self.run(&h);
                out.push(answer);
                if self.repeats > 0 {
                    self.answered.push(answer);
                    let from = self.answered.len().saturating_sub(8);
                    self.answered.drain(..from);
                }
            }
        }
        out.len() - before
    }

    fn in_flight(&self) -> usize {
        self.held.len()
    }

    fn arm(&mut self) -> HasWork {
        if self.held.is_empty() { HasWork::No } else { HasWork::Yes }
    }
}

impl LeafAccess for LogQueue {
    fn unit_len(&self, _unit: u16) -> u64 {
        self.len
    }

    fn set_unit_len(&mut self, _unit: u16, _len: u64) -> Result<(), Status> {
        Ok(())
    }
}
