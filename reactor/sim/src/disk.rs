//! [`Disk`]: what a drive holds, durably and in its cache, and what it has been asked and not
//! answered yet. Queues to it are [`crate::SimQueue`]s; what a power cut leaves is in
//! [`crate::power`]. The control path reads and writes it as [`Storage`].

use std::cell::{Cell, RefCell, RefMut};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use block::{Completion, DeviceInfo, Flags, Op, Request, SegList, Status, Storage, StorageError};
use dma::Region;

use crate::{Rng, SECTOR, Trace};

/// What a disk is like.
#[derive(Clone, Copy, Debug)]
pub struct DiskConfig {
    /// Bytes; a multiple of the block.
    pub size: u64,
    /// Bytes of a block: 512 or 4096.
    pub block_size: u32,
    /// A completed write is durable only after a flush.
    pub volatile_cache: bool,
    /// What a discarded range reads as; `None`: as before.
    pub discarded: Option<u8>,
    /// What stands where nobody wrote.
    pub fresh: u8,
    /// It is a file, which grows up to `size` as it is written to. What it has not got yet reads as
    /// zeroes.
    pub file: bool,
}

/// How often something goes wrong: once in so many requests; 0: never.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// It fails, and nothing was done.
    pub error: u64,
    /// It fails, and some of its sectors were done.
    pub torn: u64,
    /// It fails, and all of it was done.
    pub done: u64,
    /// It is done, but only after several hundred polls.
    pub late: u64,
    /// A queue stands still for several hundred polls: once in so many polls.
    pub stall: u64,
    /// It has no answer until somebody else gives up, after some thousand polls: a time-out. It
    /// may have been done.
    pub lost: u64,
}

/// How a disk lies: to see that a run finds out. Nothing real does this.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Sabotage {
    /// It does not.
    #[default]
    None,
    /// Flushes succeed and do nothing.
    DropFlushes,
    /// One in three flushes does nothing.
    DropSomeFlushes,
    /// FUA is not heeded.
    IgnoreFua,
    /// One in 200 writes lands a sector further on.
    Misplace,
    /// One in 200 writes is not done.
    LoseWrites,
    /// One in 8 flushes lets half of what it vouches for stay in the cache.
    HalfFlush,
}

/// Contents of a sector that is not durable: which write's, and where in its bytes.
#[derive(Clone, Debug)]
pub(crate) struct Version {
    pub(crate) write: u64,
    data: Rc<[u8]>,
    at: usize,
}

impl Version {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.data[self.at..self.at + SECTOR]
    }
}

/// How a request will end.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Fate {
    Fine,
    /// Fails; of its sectors so many in 100 are done.
    Fails(Status, u64),
}

/// A request that was taken and not answered.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) request: Request<'static>,
    pub(crate) segs: SegList,
    /// Number of this request, among all of the disk.
    pub(crate) number: u64,
    /// Bytes done so far.
    pub(crate) at: u64,
    /// It is not looked at before this poll.
    pub(crate) wait: u64,
    pub(crate) fate: Fate,
    /// Done or failed, and not handed out yet.
    pub(crate) end: Option<Status>,
}

/// One queue's part.
pub(crate) struct Lane {
    pub(crate) regions: Vec<Option<Arc<Region>>>,
    pub(crate) held: Vec<Held>,
    pub(crate) polls: u64,
    /// The queue stands still before this poll.
    pub(crate) still: u64,
}

pub(crate) struct State {
    config: DiskConfig,
    pub(crate) info: DeviceInfo,
    /// How long the file is, and how long a power cut leaves it at least.
    len: u64,
    pub(crate) stable_len: u64,
    /// What reads see.
    now: Vec<u8>,
    /// What is durable. Empty if nobody asks for that: see [`Disk::view`].
    pub(crate) stable: Vec<u8>,
    /// By sector: what is newer than `stable`, oldest first.
    pub(crate) cache: BTreeMap<usize, Vec<Version>>,
    /// Writes with versions in the cache that were answered: after which number.
    answered: BTreeMap<u64, u64>,
    pub(crate) numbers: u64,
    pub(crate) faults: Faults,
    pub(crate) no_space_from: u64,
    /// It is lost: everything fails.
    gone: bool,
    /// The control path's changes after which the power fails.
    power_for: u64,
    pub(crate) sabotage: Sabotage,
    pub(crate) rng: Rng,
    pub(crate) trace: Trace,
    pub(crate) lanes: Vec<Lane>,
}

/// A disk. Clones are the same disk.
#[derive(Clone)]
pub struct Disk {
    state: Rc<RefCell<State>>,
    /// Changes carried out so far.
    writes: Rc<Cell<u64>>,
}

impl Disk {
    /// A disk that holds these bytes, all durable; behind them up to its size what no one wrote. A
    /// file ends with them.
    pub fn new(config: DiskConfig, bytes: Vec<u8>, rng: Rng, trace: Trace) -> Disk {
        let disk = Disk::with(config, bytes, rng, trace);
        {
            let mut s = disk.state();
            s.stable = s.now.clone();
        }
        disk
    }

    /// A disk to be looked at, and written to as if no power could fail.
    pub fn view(config: DiskConfig, bytes: Vec<u8>) -> Disk {
        let disk = Disk::with(config, bytes, Rng::new(0), Trace::default());
        disk.state().info.volatile_cache = false;
        disk
    }

    fn with(config: DiskConfig, mut bytes: Vec<u8>, rng: Rng, trace: Trace) -> Disk {
        let len = if config.file { bytes.len() as u64 } else { config.size };
        bytes.resize(config.size as usize, if config.file { 0 } else { config.fresh });
        let info = DeviceInfo {
            size: config.size,
            block_size: config.block_size,
            physical_block_size: config.block_size.max(4096),
            read_only: false,
            volatile_cache: config.volatile_cache,
            write_zeroes: true,
            discard: true,
            discard_granularity: config.block_size,
            max_transfer: 1 << 20,
        };
        let state = State {
            config,
            info,
            len,
            stable_len: len,
            stable: Vec::new(),
            now: bytes,
            cache: BTreeMap::new(),
            answered: BTreeMap::new(),
            numbers: 0,
            faults: Faults::default(),
            no_space_from: u64::MAX,
            gone: false,
            power_for: u64::MAX,
            sabotage: Sabotage::None,
            rng,
            trace,
            lanes: Vec::new(),
        };
        Disk { state: Rc::new(RefCell::new(state)), writes: Rc::default() }
    }

    pub(crate) fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// How often requests fail from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// Writes behind this byte fail for want of space from now on.
    pub fn set_no_space_from(&self, offset: u64) {
        self.state().no_space_from = offset;
    }

    /// The device has so many bytes from now on, up to those of its configuration. Queues say what was so
    /// when they were made, and take what is so now.
    pub fn set_size(&self, bytes: u64) {
        let mut s = self.state();
        s.info.size = bytes.min(s.config.size);
    }

    /// The disk is lost: from now on everything fails, also what it was asked already.
    pub fn lose(&self) {
        let mut s = self.state();
        s.gone = true;
        let State { lanes, rng, .. } = &mut *s;
        for h in lanes.iter_mut().flat_map(|l| &mut l.held).filter(|h| h.end.is_none()) {
            h.fate = Fate::Fails(Status::Gone, rng.pick(&[0, 50, 100]));
        }
    }

    /// The power fails after so many changes that the control path makes: it gets errors then, and
    /// [`Disk::survivor`] is what is left.
    pub fn set_power_for(&self, changes: u64) {
        self.state().power_for = changes;
    }

    /// Whether the control path used up what [`Disk::set_power_for`] gave it.
    pub fn is_out(&self) -> bool {
        self.state().power_for == 0
    }

    /// Whether a part of these bytes is newer than what is durable.
    pub fn is_volatile(&self, offset: u64, len: u64) -> bool {
        let sector = |at: u64| at as usize / SECTOR;
        self.state().cache.range(sector(offset)..=sector(offset + len.max(1) - 1)).next().is_some()
    }

    /// What the disk is like, or would be if it were not a [`Disk::view`].
    pub fn config(&self) -> DiskConfig {
        self.state().config
    }

    /// How the disk lies from now on.
    pub fn set_sabotage(&self, sabotage: Sabotage) {
        self.state().sabotage = sabotage;
    }

    /// Changes (writes, zeroes, discards) carried out so far, for all queues.
    pub fn writes(&self) -> u64 {
        self.writes.get()
    }

    pub(crate) fn count_write(&self) {
        self.writes.set(self.writes.get() + 1);
    }

    /// What a power cut would leave, to be looked at: see [`Disk::view`]. The disk itself if nothing
    /// could be lost.
    pub fn frozen(&self, rng: &mut Rng) -> Disk {
        let config = {
            let s = self.state();
            // A view already: nobody writes to it.
            if s.stable.is_empty() {
                drop(s);
                return self.clone();
            }
            s.config
        };
        Disk::view(config, self.survivor(rng))
    }

    /// The disk when whoever used it has died, to be written to as if no power could fail: see
    /// [`Disk::after_death`].
    pub fn left(&self, rng: &mut Rng) -> Disk {
        let bytes = self.after_death(rng);
        Disk::view(self.config(), bytes)
    }

    /// Ends the disk: what reads saw last. Of a file as much as it has.
    pub fn take_bytes(self) -> Vec<u8> {
        let mut s = self.state();
        let len = s.len as usize;
        let mut bytes = std::mem::take(&mut s.now);
        bytes.truncate(len);
        bytes
    }

    fn range(&self, offset: u64, len: u64) -> Result<(u64, u64), Status> {
        let s = self.state();
        let block = u64::from(s.info.block_size);
        let end = offset.checked_add(len).filter(|&end| end <= s.info.size);
        let end = end.ok_or(Status::Invalid)?;
        Ok((offset & !(block - 1), end.next_multiple_of(block)))
    }
}

impl State {
    /// Carries a change out, in the cache.
    pub(crate) fn put(&mut self, number: u64, offset: u64, data: &[u8]) {
        let at = offset as usize;
        self.now[at..at + data.len()].copy_from_slice(data);
        self.len = self.len.max(offset + data.len() as u64);
        self.trace.add(&[1, number, offset, data.len() as u64, first_word(data)]);
        if self.stable.is_empty() {
            return;
        }
        let data: Rc<[u8]> = data.into();
        for from in (0..data.len()).step_by(SECTOR) {
            let version = Version { write: number, data: data.clone(), at: from };
            self.cache.entry((at + from) / SECTOR).or_default().push(version);
        }
    }

    pub(crate) fn now(&self) -> &[u8] {
        &self.now
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Ends a file here, as a file system's journal does it: at once and for good.
    pub(crate) fn set_len(&mut self, len: u64) {
        if !self.config.file || len > self.info.size {
            return;
        }
        self.now[len as usize..].fill(0);
        if !self.stable.is_empty() {
            self.stable[len as usize..].fill(0);
        }
        self.cache.retain(|&sector, _| ((sector * SECTOR) as u64) < len);
        (self.len, self.stable_len) = (len, self.stable_len.min(len));
    }

    pub(crate) fn get(&self, offset: u64, into: &mut [u8]) {
        let at = offset as usize;
        into.copy_from_slice(&self.now[at..at + into.len()]);
    }

    /// The bytes that a change writes, if it writes any.
    pub(crate) fn contents(&self, lane: usize, h: &Held, from: u64, len: u64) -> Option<Vec<u8>> {
        match h.request.op {
            Op::Read | Op::Flush => None,
            Op::WriteZeroes => Some(vec![0; len as usize]),
            Op::Discard => self.config.discarded.map(|byte| vec![byte; len as usize]),
            Op::Write => {
                let mut data = vec![0; len as usize];
                let mut part = SegList::EMPTY;
                if !part.push_part(h.segs.as_slice(), from, len) {
                    return None;
                }
                let mut at = 0;
                for seg in part.as_slice() {
                    let region = self.lanes[lane].regions[seg.region().index()].as_ref()?;
                    let n = seg.len() as usize;
                    region.read_seg(seg, &mut data[at..at + n]);
                    at += n;
                }
                Some(data)
            }
        }
    }

    /// A write was answered: flushes that are sent from now on vouch for it.
    pub(crate) fn note_answer(&mut self, number: u64) {
        self.answered.insert(number, self.numbers);
    }

    /// Makes durable what a flush of this number vouches for.
    pub(crate) fn flush(&mut self, number: u64) {
        let lie = match self.sabotage {
            Sabotage::DropFlushes => true,
            Sabotage::DropSomeFlushes => self.rng.one_in(3),
            _ => false,
        };
        self.trace.add(&[2, number]);
        if lie {
            return;
        }
        let half = self.sabotage == Sabotage::HalfFlush && self.rng.one_in(8);
        let State { answered, cache, stable, stable_len, rng, .. } = self;
        // It vouches for what was answered before it was sent, when there were fewer requests.
        cache.retain(|&sector, versions| {
            let vouched = |v: &Version| answered.get(&v.write).is_some_and(|&then| then < number);
            if let Some(last) = versions.iter().rposition(vouched)
                && !(half && rng.one_in(2))
            {
                let at = sector * SECTOR;
                stable[at..at + SECTOR].copy_from_slice(versions[last].bytes());
                *stable_len = (*stable_len).max((at + SECTOR) as u64);
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
        if !half {
            answered.retain(|_, &mut then| then >= number);
        }
    }

    /// Makes one write durable by itself, and what it came after in its sectors.
    pub(crate) fn harden(&mut self, number: u64, offset: u64, len: u64) {
        for sector in offset as usize / SECTOR..(offset + len) as usize / SECTOR {
            let Some(versions) = self.cache.get_mut(&sector) else { continue };
            if let Some(last) = versions.iter().rposition(|v| v.write == number) {
                let at = sector * SECTOR;
                self.stable[at..at + SECTOR].copy_from_slice(versions[last].bytes());
                self.stable_len = self.stable_len.max((at + SECTOR) as u64);
                versions.drain(..=last);
            }
            if versions.is_empty() {
                self.cache.remove(&sector);
            }
        }
    }

    /// Draws how a request will end, and how long it takes to.
    pub(crate) fn draw_fate(&mut self, r: &Request<'_>) -> (Fate, u64) {
        if !self.info.contains(r.offset, r.len) || !r.segs_fit() {
            return (Fate::Fails(Status::Invalid, 0), 0);
        }
        let moves = matches!(r.op, Op::Read | Op::Write);
        if moves && r.len > u64::from(self.info.max_transfer) {
            return (Fate::Fails(Status::Invalid, 0), 0);
        }
        if r.op == Op::Write && r.offset + r.len > self.no_space_from {
            let some = if self.rng.one_in(2) { 50 } else { 0 };
            return (Fate::Fails(Status::NoSpace, some), 0);
        }
        if self.gone {
            return (Fate::Fails(Status::Gone, 0), 0);
        }
        let f = self.faults;
        let status = match r.op {
            Op::WriteZeroes | Op::Discard => self.rng.pick(&[Status::Medium, Status::Unsupported]),
            _ => self.rng.pick(&[Status::Medium, Status::Timeout]),
        };
        if self.rng.one_in(f.error) {
            (Fate::Fails(status, 0), 0)
        } else if self.rng.one_in(f.torn) {
            (Fate::Fails(Status::Medium, 50), 0)
        } else if self.rng.one_in(f.done) {
            (Fate::Fails(Status::Medium, 100), 0)
        } else if self.rng.one_in(f.late) {
            (Fate::Fine, self.rng.within(50, 400))
        } else if self.rng.one_in(f.lost) {
            let some = self.rng.pick(&[0, 50, 100]);
            (Fate::Fails(Status::Timeout, some), self.rng.within(1000, 3000))
        } else {
            (Fate::Fine, 0)
        }
    }
}

fn first_word(data: &[u8]) -> u64 {
    data.first_chunk().map_or(0, |w| u64::from_le_bytes(*w))
}

/// An answer.
pub(crate) fn answer(h: &Held, status: Status) -> Completion {
    Completion { tag: h.request.tag, status, detail: 0 }
}

/// Whether a change is durable when it is answered.
pub(crate) fn is_through(info: &DeviceInfo, sabotage: Sabotage, flags: Flags) -> bool {
    !info.volatile_cache || (flags.has(Flags::FUA) && sabotage != Sabotage::IgnoreFua)
}

impl Storage for Disk {
    fn len(&self) -> u64 {
        self.state().len()
    }

    fn capacity(&self) -> u64 {
        self.state().info.size
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let len = into.len() as u64;
        self.range(offset, len).map_err(|s| failed("read", offset, len, s))?;
        self.state().get(offset, into);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        let len = from.len() as u64;
        let (start, end) = self.range(offset, len).map_err(|s| failed("write", offset, len, s))?;
        let mut whole = vec![0; (end - start) as usize];
        let mut s = self.state();
        if s.power_for == 0 {
            return Err(failed("write", offset, len, Status::Gone));
        }
        s.power_for -= 1;
        s.get(start, &mut whole);
        whole[(offset - start) as usize..][..from.len()].copy_from_slice(from);
        s.numbers += 1;
        let number = s.numbers;
        s.put(number, start, &whole);
        if is_through(&s.info, s.sabotage, Flags::NONE) {
            s.harden(number, start, end - start);
        }
        s.note_answer(number);
        drop(s);
        self.count_write();
        Ok(())
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.write_at(offset, &vec![0; len as usize])
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        let mut s = self.state();
        if s.power_for == 0 {
            return Err(failed("flush", 0, 0, Status::Gone));
        }
        s.numbers += 1;
        let number = s.numbers;
        s.flush(number);
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        self.state().set_len(len);
        Ok(())
    }
}

fn failed(what: &'static str, offset: u64, len: u64, status: Status) -> StorageError {
    StorageError { what, offset, len, status, detail: 0 }
}
