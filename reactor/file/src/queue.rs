//! [`FileQueue`]: one reactor's requests to all of its files.
//!
//! A request takes a slot, which names it to the kernel, and keeps it until its completion is handed
//! out. A transfer that the kernel cuts short goes on from the same slot; a request whose memory
//! direct I/O cannot take goes through a bounce buffer, and waits for one if none is free.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{
    BlockQueue, Completion, Completions, DeviceInfo, Flags, Full, HasWork, LeafAccess, Op, Request,
    Status, Submit, Tag,
};
use dma::{Buf, Region};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::bounce::Bounces;
use crate::kernel::{Io, Kernel};
use crate::memory::{gather, resolve, scatter, zero};
use crate::unit::{MAX_TRANSFER, Unit};
use crate::{Engine, Error, os};

/// How many requests may be in flight.
const DEPTH: u16 = 512;

/// How often a request that the kernel says to try again is tried again.
const TRIES: u8 = 16;

/// A request that was taken.
#[derive(Debug)]
pub(crate) struct Slot {
    tag: Tag,
    op: Op,
    pub(crate) unit: u16,
    pub(crate) step: Step,
    /// The space must stay allocated.
    keep: bool,
    /// Durability was asked for and the kernel's one-step way is not there: flush afterwards.
    flush_after: bool,
    /// Times that the kernel said "again".
    tries: u8,
    /// How it ended, once it is in `done`.
    pub(crate) status: Status,
    pub(crate) detail: u16,
    /// What is left of the range.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    bounce: Option<Buf>,
}

impl Slot {
    fn new() -> Slot {
        Slot {
            tag: Tag::new(0, 0, 0),
            op: Op::Flush,
            unit: 0,
            step: Step::Flush,
            keep: false,
            flush_after: false,
            tries: 0,
            status: Status::Ok,
            detail: 0,
            offset: 0,
            len: 0,
            bounce: None,
        }
    }
}

/// What the kernel is doing for a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    Transfer,
    Punch,
    Zero,
    /// Lengthen the file to the end of the range.
    Grow,
    /// Space ahead of the writes: nobody's request.
    Ahead,
    Flush,
}

/// The leaf queue of one reactor to any number of files and kernel block devices; a unit is a file.
///
/// Dropping it waits until the kernel is done with every request that it was given.
pub struct FileQueue {
    // Dropped first: waits for the kernel.
    pub(crate) kernel: Kernel,
    pub(crate) units: Vec<Unit>,
    /// Those that were ever used; the room for all is there from the start.
    pub(crate) slots: Vec<Slot>,
    pub(crate) free: Vec<u16>,
    /// Ended and not handed out.
    pub(crate) done: VecDeque<u16>,
    /// Waiting for a bounce buffer.
    waiting: VecDeque<u16>,
    /// Made when the first request needs one: few queues ever do, and it is large.
    bounces: Option<Box<Bounces>>,
    /// Slots kept for what is nobody's request: one for each file that gets its space ahead.
    pub(crate) reserved: usize,
}

impl FileQueue {
    /// A queue without files yet.
    ///
    /// # Errors
    /// If the kernel does not have or not allow the engine.
    pub fn new(engine: Engine) -> Result<FileQueue, Error> {
        os::survive_file_size_limit();
        Ok(FileQueue {
            kernel: Kernel::new(engine, DEPTH)?,
            units: Vec::new(),
            slots: Vec::with_capacity(DEPTH.into()),
            free: (0..DEPTH).rev().collect(),
            done: VecDeque::with_capacity(DEPTH.into()),
            waiting: VecDeque::with_capacity(DEPTH.into()),
            bounces: None,
            reserved: 0,
        })
    }

    /// Adds a file that is open for reading, or for reading and writing; returns its unit. The
    /// queue switches O_DIRECT on for it where the file takes that.
    ///
    /// # Errors
    /// If it is no regular file or block device, or cannot be looked at.
    pub fn add(&mut self, file: File) -> Result<u16, Error> {
        self.add_unit(Unit::new(file)?)
    }

    /// A queue to the same files for another reactor: the same descriptors, units of the same
    /// numbers, the same engine if that can be had once more.
    ///
    /// # Errors
    /// If the kernel or memory has no more.
    pub fn another(&self) -> Result<FileQueue, Error> {
        let mut queue = FileQueue::new(self.engine())?;
        for unit in &self.units {
            queue.add_unit(unit.another())?;
        }
        Ok(queue)
    }

    fn add_unit(&mut self, unit: Unit) -> Result<u16, Error> {
        let at = u16::try_from(self.units.len()).map_err(|_| Error::TooMany)?;
        self.units.push(unit);
        Ok(at)
    }

    /// Lets go of a file that nothing is asked of any more; its unit answers with errors from now on.
    ///
    /// # Errors
    /// If there is no such unit, or the process is out of descriptors.
    pub fn close_unit(&mut self, unit: u16) -> Result<(), Error> {
        self.end_ahead(unit);
        let u = self.units.get_mut(usize::from(unit)).ok_or(Error::Kind)?;
        // Not opened by a name: the daemon's reactors may not do that.
        let nothing = memfd_create(c"nothing", MFdFlags::MFD_CLOEXEC);
        let nothing = nothing.map_err(|e| Error::os("memfd_create")(e.into()))?;
        u.file = Arc::new(nothing.into());
        (u.info.size, u.info.read_only, u.len) = (0, true, 0);
        // Memory of those who used it may have gone before.
        self.prune();
        Ok(())
    }

    /// The engine in use: any but [`Engine::Auto`].
    pub fn engine(&self) -> Engine {
        self.kernel.engine()
    }

    /// Whether a unit is accessed without the page cache; `false` if there is no such unit.
    pub fn is_direct(&self, unit: u16) -> bool {
        self.units.get(usize::from(unit)).is_some_and(|u| u.direct)
    }

    /// System calls made for requests so far.
    pub fn calls(&self) -> u64 {
        self.kernel.calls()
    }

    /// Makes the AIO engine do without what old kernels lack.
    #[cfg(test)]
    pub(crate) fn cripple(&mut self) {
        self.kernel.cripple();
    }

    /// Lets go of regions that have no user any more and that no request in work names.
    fn prune(&mut self) {
        let FileQueue { kernel, slots, waiting, bounces, .. } = self;
        let bounced = |s: &Slot, region: &Region| match (&s.bounce, &bounces) {
            (Some(buf), Some(bounces)) => bounces.of(buf).name(region),
            _ => false,
        };
        kernel.prune(
            |slot| waiting.iter().any(|&w| usize::from(w) == slot),
            |region| slots.iter().any(|s| bounced(s, region)),
        );
    }

    /// A free slot.
    #[inline(always)]
    pub(crate) fn take_slot(&mut self) -> Option<u16> {
        let slot = self.free.pop()?;
        // Never grows: those that were never used lie below the others in `free`, in their order.
        if usize::from(slot) == self.slots.len() {
            self.slots.push(Slot::new());
        }
        Some(slot)
    }

    /// Checks a request and starts it, or says how it ended.
    #[inline]
    fn begin(&mut self, slot: u16, r: &Request<'_>) -> Option<Status> {
        let Some(unit) = self.units.get(usize::from(r.unit)) else {
            return Some(Status::Invalid);
        };
        if !unit.info.contains(r.offset, r.len) || !r.segs_fit() {
            return Some(Status::Invalid);
        }
        if unit.info.read_only && r.op != Op::Read {
            // Nothing was written, so nothing is left to make durable.
            return Some(if r.op == Op::Flush { Status::Ok } else { Status::ReadOnly });
        }
        let s = &mut self.slots[usize::from(slot)];
        s.keep = r.flags.has(Flags::NO_UNMAP);
        s.flush_after = r.flags.has(Flags::FUA) && r.op != Op::Read && r.op != Op::Flush;
        match r.op {
            Op::Read | Op::Write => {
                if r.len > u64::from(MAX_TRANSFER) {
                    return Some(Status::Invalid);
                }
                let (table, vecs) = self.kernel.data(slot);
                if !resolve(table, r.segs, vecs) {
                    return Some(Status::Invalid);
                }
                s.step = Step::Transfer;
                if !vecs.aligned(unit.memory_align, unit.offset_align) {
                    self.waiting.push_back(slot);
                    return None;
                }
            }
            Op::Flush => s.step = Step::Flush,
            Op::WriteZeroes | Op::Discard if r.len == 0 => return Some(Status::Ok),
            Op::WriteZeroes => match zeroing(unit, s) {
                Some(step) => s.step = step,
                None => return Some(Status::Unsupported),
            },
            Op::Discard if unit.punch => s.step = Step::Punch,
            Op::Discard => return Some(Status::Unsupported),
        }
        self.start(slot);
        if r.op == Op::Write {
            self.look_ahead(r.unit, r.offset + r.len);
        }
        None
    }

    /// Asks the kernel for the slot's step.
    #[inline]
    pub(crate) fn start(&mut self, slot: u16) {
        let s = &mut self.slots[usize::from(slot)];
        let unit = &self.units[usize::from(s.unit)];
        let io = match (s.step, s.op) {
            (Step::Transfer, Op::Read) => Io::Read,
            (Step::Transfer, _) => {
                let dsync = s.flush_after && unit.dsync;
                Io::Write { dsync }
            }
            (Step::Punch, _) => Io::Allocate {
                mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                len: s.len,
            },
            (Step::Zero, _) => Io::Allocate { mode: libc::FALLOC_FL_ZERO_RANGE, len: s.len },
            // The last block alone: that is enough, and unlike a truncation it never shortens a
            // file that another reactor has lengthened meanwhile.
            (Step::Grow, _) => {
                let block = u64::from(unit.info.block_size);
                let io = Io::Allocate { mode: 0, len: block };
                self.kernel.start(slot, &unit.file, io, s.offset + s.len - block);
                return;
            }
            (Step::Ahead, _) => Io::Allocate { mode: 0, len: s.len },
            (Step::Flush, _) => Io::Sync,
        };
        self.kernel.start(slot, &unit.file, io, s.offset);
    }

    /// Starts requests that wait for a bounce buffer, as far as there are any.
    #[cold]
    fn start_waiting(&mut self) {
        if self.bounces.is_none() && !self.waiting.is_empty() && !self.make_bounces() {
            for slot in self.waiting.drain(..) {
                self.slots[usize::from(slot)].status = Status::Medium;
                self.done.push_back(slot);
            }
        }
        while let Some(&slot) = self.waiting.front() {
            let Some(bounces) = &mut self.bounces else { return };
            let Some(buf) = bounces.pool.take() else { return };
            self.waiting.pop_front();
            let s = &mut self.slots[usize::from(slot)];
            let (table, vecs) = self.kernel.data(slot);
            bounces.stand_for(&buf, vecs);
            if s.op == Op::Write {
                gather(table, vecs, bounces.pool.region(), buf.seg().offset() as usize);
            }
            let whole = buf.head(s.len as u32).expect("a bounce buffer holds the longest request");
            assert!(resolve(table, &[whole], vecs), "the bounce pool is registered");
            s.bounce = Some(buf);
            self.start(slot);
        }
    }

    /// Takes memory for bounce buffers; false if there is none.
    fn make_bounces(&mut self) -> bool {
        match Bounces::new() {
            Ok(bounces) => {
                self.kernel.register(bounces.pool.region(), false);
                self.bounces = Some(Box::new(bounces));
                true
            }
            Err(e) => {
                log::error!("no buffers for requests that are not aligned as a file needs it: {e}");
                false
            }
        }
    }

    /// Takes a result from the kernel: how the request ended, or `None` if it goes on.
    pub(crate) fn result(&mut self, slot: u16, result: i64) -> Option<(Status, u16)> {
        let s = &mut self.slots[usize::from(slot)];
        let unit = &mut self.units[usize::from(s.unit)];
        if result < 0 {
            let errno = i32::try_from(-result).unwrap_or(libc::EIO);
            return self.failed(slot, errno);
        }
        match s.step {
            Step::Transfer => {
                let n = result as u64;
                if n < s.len {
                    return self.short(slot, n);
                }
                if s.op == Op::Write {
                    unit.len = unit.len.max(s.offset + s.len);
                }
                if s.flush_after && !unit.dsync {
                    return self.flush_now(slot);
                }
            }
            Step::Punch if s.op == Op::WriteZeroes && !inside(unit, s) => {
                s.step = Step::Grow;
                self.start(slot);
                return None;
            }
            Step::Punch | Step::Zero | Step::Grow => {
                if s.op == Op::WriteZeroes {
                    unit.len = unit.len.max(s.offset + s.len);
                }
                if s.flush_after {
                    return self.flush_now(slot);
                }
            }
            Step::Ahead => {}
            Step::Flush => match unit.lost.load(Ordering::Relaxed) {
                0 => {}
                lost => return Some((Status::Medium, lost)),
            },
        }
        Some((Status::Ok, 0))
    }

    #[cold]
    fn flush_now(&mut self, slot: u16) -> Option<(Status, u16)> {
        let s = &mut self.slots[usize::from(slot)];
        s.step = Step::Flush;
        s.tries = 0;
        self.start(slot);
        None
    }

    /// A transfer ended after `n` bytes, fewer than were asked for.
    #[cold]
    fn short(&mut self, slot: u16, n: u64) -> Option<(Status, u16)> {
        let s = &mut self.slots[usize::from(slot)];
        let unit = &self.units[usize::from(s.unit)];
        s.offset += n;
        s.len -= n;
        let (table, vecs) = self.kernel.data(slot);
        vecs.advance(n as usize);
        if s.op == Op::Read {
            // Direct reads stop within a block only at the end of the file.
            let at_end = n == 0 || s.offset & (u64::from(unit.offset_align) - 1) != 0;
            if at_end && unit.block_device {
                return Some((Status::Gone, 0));
            }
            if at_end {
                zero(table, vecs);
                return Some((Status::Ok, 0));
            }
        } else if n == 0 {
            return Some((Status::Medium, libc::EIO as u16));
        }
        self.start(slot);
        None
    }

    /// The kernel refused or failed.
    #[cold]
    fn failed(&mut self, slot: u16, errno: i32) -> Option<(Status, u16)> {
        let s = &mut self.slots[usize::from(slot)];
        let unit = &mut self.units[usize::from(s.unit)];
        let detail = errno as u16;
        let unsupported = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY);
        if matches!(errno, libc::EINTR | libc::EAGAIN) && s.tries < TRIES {
            s.tries += 1;
            self.start(slot);
            return None;
        }
        match s.step {
            Step::Transfer if unsupported && s.flush_after && unit.dsync => {
                unit.dsync = false;
                self.start(slot);
                return None;
            }
            // A write across the process's file size limit is cut to it, and the cut is unaligned.
            Step::Transfer if errno == libc::EINVAL && s.op == Op::Write && past_limit(s) => {
                return Some((Status::NoSpace, libc::EFBIG as u16));
            }
            Step::Punch if unsupported => unit.punch = false,
            Step::Zero if unsupported => {
                unit.zero_range = false;
                if let Some(step) = zeroing(unit, s) {
                    s.step = step;
                    self.start(slot);
                    return None;
                }
            }
            // What lies behind the end reads as zeroes anyway.
            Step::Grow if unsupported && s.flush_after => return self.flush_now(slot),
            Step::Grow if unsupported => return Some((Status::Ok, 0)),
            Step::Flush if !unit.direct => unit.lost.store(detail, Ordering::Relaxed),
            _ => {}
        }
        Some((if unsupported { Status::Unsupported } else { Status::from_errno(errno) }, detail))
    }

    /// Gives back what a request that ended holds, and makes its completion.
    #[inline]
    fn finish(&mut self, slot: u16, status: Status, detail: u16) -> Completion {
        let s = &mut self.slots[usize::from(slot)];
        if let Some(buf) = s.bounce.take()
            && let Some(bounces) = &mut self.bounces
        {
            if s.op == Op::Read && status.is_ok() {
                let (table, _) = self.kernel.data(slot);
                let (from, at) = (bounces.pool.region(), buf.seg().offset() as usize);
                scatter(table, from, at, bounces.of(&buf));
            }
            bounces.pool.give(buf);
        }
        self.free.push(slot);
        Completion { tag: s.tag, status, detail }
    }
}

/// How a range can be zeroed, if at all.
fn zeroing(unit: &Unit, s: &Slot) -> Option<Step> {
    // A hole does not make the file longer, as other writes do.
    if unit.zero_range && (s.keep || !inside(unit, s)) {
        Some(Step::Zero)
    } else {
        (unit.punch && !s.keep).then_some(Step::Punch)
    }
}

/// Whether the range lies within the file's present length.
fn inside(unit: &Unit, s: &Slot) -> bool {
    unit.block_device || s.offset + s.len <= unit.len
}

/// Whether the range reaches beyond the process's file size limit.
fn past_limit(s: &Slot) -> bool {
    use nix::sys::resource::{Resource, getrlimit};
    getrlimit(Resource::RLIMIT_FSIZE).is_ok_and(|(soft, _)| s.offset + s.len > soft)
}

impl Submit for FileQueue {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        self.units.get(usize::from(unit)).map(|u| &u.info)
    }

    #[inline]
    fn room(&self) -> usize {
        self.free.len().saturating_sub(self.reserved)
    }

    #[inline]
    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        if self.room() == 0 {
            return Err(Full);
        }
        let slot = self.take_slot().ok_or(Full)?;
        let s = &mut self.slots[usize::from(slot)];
        s.tag = request.tag;
        s.op = request.op;
        s.unit = request.unit;
        s.tries = 0;
        s.offset = request.offset;
        s.len = request.len;
        if let Some(status) = self.begin(slot, request) {
            let s = &mut self.slots[usize::from(slot)];
            (s.status, s.detail) = (status, 0);
            self.done.push_back(slot);
        }
        Ok(())
    }
}

impl BlockQueue for FileQueue {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.prune();
        self.kernel.register(region, true);
        Ok(())
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        if self.free.len() == usize::from(DEPTH) {
            return 0;
        }
        if !self.waiting.is_empty() {
            self.start_waiting();
        }
        self.kernel.send();
        let before = out.len();
        while out.room() > 0 {
            if let Some((slot, result)) = self.kernel.next() {
                if self.slots[usize::from(slot)].step == Step::Ahead {
                    self.is_ahead(slot, result);
                } else if let Some((status, detail)) = self.result(slot, result) {
                    let c = self.finish(slot, status, detail);
                    out.push(c);
                }
            } else if let Some(slot) = self.done.pop_front() {
                let s = &self.slots[usize::from(slot)];
                let c = self.finish(slot, s.status, s.detail);
                out.push(c);
            } else {
                break;
            }
        }
        out.len() - before
    }

    fn in_flight(&self) -> usize {
        usize::from(DEPTH) - self.free.len()
    }

    fn arm(&mut self) -> HasWork {
        // Memory that is used no more is not kept from the host until the next one comes.
        self.prune();
        // One that waits for a bounce buffer can go on only after a completion, unless one is free.
        let bounce = !self.waiting.is_empty()
            && self.bounces.as_ref().is_none_or(|b| b.pool.available() > 0);
        if bounce || !self.done.is_empty() || self.kernel.arm() {
            HasWork::Yes
        } else {
            HasWork::No
        }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.kernel.wake_fd())
    }
}

impl LeafAccess for FileQueue {
    fn unit_len(&self, unit: u16) -> u64 {
        let Some(u) = self.units.get(usize::from(unit)) else { return 0 };
        if u.block_device {
            return u.len;
        }
        u.file.metadata().map_or(u.len, |m| m.len())
    }

    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
        self.end_ahead(unit);
        let u = self.units.get_mut(usize::from(unit)).ok_or(Status::Invalid)?;
        if u.info.read_only {
            return Err(Status::ReadOnly);
        }
        if u.block_device {
            return Ok(());
        }
        u.file
            .set_len(len)
            .map_err(|e| Status::from_errno(e.raw_os_error().unwrap_or(libc::EIO)))?;
        u.len = len;
        Ok(())
    }
}
