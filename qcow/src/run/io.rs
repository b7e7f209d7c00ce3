//! Requests to the leaves on behalf of tasks: how they start, which answer is whose, and the small
//! reads and writes of metadata.
//!
//! Each request has a place of its own in [`Children`] while a leaf has it, and the place's number
//! and generation are in its tag: so an answer that comes twice is never taken for another
//! request's, and no task goes on while a device still uses its memory.

use std::collections::VecDeque;

use block::{BlockQueue, Flags, Op, Port, Request, SegList, Status, Tag};
use dma::Seg;

use super::read::check;
use super::shared::{META, Shared};

/// A request to a leaf on behalf of a task.
pub(super) struct Child {
    pub(super) port: Port,
    pub(super) op: Op,
    pub(super) flags: Flags,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) segs: SegList,
}

/// Requests of tasks that the leaves have at a time, at most. More wait in the outbox.
const PLACES: usize = 1024;

/// Requests that a task has under way before it waits for some of them to end: what one request of
/// a guest may take in the outbox stays bounded, into however many pieces it falls.
const AT_ONCE: u32 = 32;

#[derive(Clone, Copy)]
struct Place {
    slot: u16,
    generation: u32,
    busy: bool,
}

/// The requests of tasks: those to be sent, and those that the leaves have.
pub(super) struct Children {
    outbox: VecDeque<(u16, Child)>,
    places: Box<[Place]>,
    free: Vec<u16>,
    /// The number of the first place in tags; those below are the image's slots.
    base: u16,
}

impl Children {
    pub(super) fn new(slots: usize) -> Children {
        let none = Place { slot: 0, generation: 0, busy: false };
        Children {
            outbox: VecDeque::with_capacity(slots),
            places: vec![none; PLACES].into_boxed_slice(),
            free: (0..PLACES as u16).rev().collect(),
            base: slots as u16,
        }
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.outbox.is_empty()
    }
}

impl Shared {
    /// Has a request sent to a leaf for `slot`, in pieces if it is longer than a leaf takes. Its end
    /// is counted; see [`Shared::wait`].
    pub(super) fn start(&self, slot: u16, child: Child) {
        // The image offers no more than every leaf takes.
        let most = u64::from(self.info.max_transfer);
        if !matches!(child.op, Op::Read | Op::Write) || child.len <= most {
            return self.start_piece(slot, child);
        }
        let mut at = 0;
        while at < child.len {
            let len = most.min(child.len - at);
            let mut segs = SegList::EMPTY;
            // The leaf says what it thinks of a request whose segments do not add up.
            let _whole = segs.push_part(child.segs.as_slice(), at, len);
            self.start_piece(slot, Child { offset: child.offset + at, len, segs, ..child });
            at += len;
        }
    }

    fn start_piece(&self, slot: u16, child: Child) {
        let work = self.work(slot);
        work.pending.set(work.pending.get() + 1);
        self.children.borrow_mut().outbox.push_back((slot, child));
    }

    /// Waits until all that was started for `slot` has ended; the first failure, or Ok.
    pub(super) async fn wait(&self, slot: u16) -> Status {
        let work = self.work(slot);
        reactor::task::until(|| (work.pending.get() == 0).then_some(())).await;
        work.status.replace(Status::Ok)
    }

    /// Waits as [`Shared::wait`] does if much is under way for `slot` already.
    pub(super) async fn wait_if_crowded(&self, slot: u16) -> Result<(), Status> {
        if self.work(slot).pending.get() >= AT_ONCE {
            return check(self.wait(slot).await);
        }
        Ok(())
    }

    /// Sends what the tasks asked for as far as the leaves have room. Returns whether any went.
    pub(super) fn send<L: BlockQueue>(&self, leaves: &mut [L]) -> bool {
        let mut sent = false;
        let mut children = self.children.borrow_mut();
        let Children { outbox, places, free, base } = &mut *children;
        while let (Some((slot, c)), Some(&at)) = (outbox.front(), free.last()) {
            let leaf = &mut leaves[usize::from(c.port.leaf)];
            if leaf.room() == 0 {
                break;
            }
            let place = &mut places[usize::from(at)];
            let request = Request {
                tag: Tag::new(self.owner, *base + at, place.generation),
                op: c.op,
                flags: c.flags,
                unit: c.port.unit,
                offset: c.offset,
                len: c.len,
                segs: c.segs.as_slice(),
            };
            if leaf.submit(&request).is_err() {
                break;
            }
            place.slot = *slot;
            place.busy = true;
            sent = true;
            free.pop();
            outbox.pop_front();
        }
        sent
    }

    /// Notes the end of a task's request. Returns the task's slot if it can go on.
    pub(super) fn child_done(&self, tag: Tag, status: Status) -> Option<u16> {
        let mut children = self.children.borrow_mut();
        let at = tag.slot().wrapping_sub(children.base);
        let place = children.places.get_mut(usize::from(at));
        let Some(place) = place.filter(|p| p.busy && p.generation == tag.generation()) else {
            self.stale();
            return None;
        };
        place.busy = false;
        place.generation = place.generation.wrapping_add(1);
        let slot = place.slot;
        children.free.push(at);
        let work = self.work(slot);
        if status != Status::Ok && work.status.get() == Status::Ok {
            work.status.set(status);
        }
        let left = work.pending.get() - 1;
        work.pending.set(left);
        (left == 0).then_some(slot)
    }

    /// Counts an answer that belongs to nothing in flight.
    #[cold]
    pub(super) fn stale(&self) {
        self.counters.stale.set(self.counters.stale.get() + 1);
    }

    /// Where the layer lies that is written to.
    pub(super) fn top(&self) -> Port {
        self.stack.top_layer().port
    }

    /// Reads or writes one run of bytes at `port` and waits.
    pub(super) async fn io(
        &self,
        slot: u16,
        port: Port,
        op: Op,
        offset: u64,
        segs: SegList,
    ) -> Status {
        let len = segs.bytes();
        self.start(slot, Child { port, op, flags: Flags::NONE, offset, len, segs });
        self.wait(slot).await
    }

    /// Has the device of the layer that is written to make everything durable that was completed;
    /// nothing to do where it has no volatile cache.
    pub(super) async fn device_flush(&self, slot: u16) -> Status {
        if !self.device.volatile_cache {
            return Status::Ok;
        }
        self.counters.flushes.set(self.counters.flushes.get() + 1);
        self.io(slot, self.top(), Op::Flush, 0, SegList::EMPTY).await
    }

    /// The same, and of the external data file where there is one; then the image's own device
    /// need only be asked if metadata has changed.
    pub(super) async fn flush_both(&self, slot: u16, changes: bool) -> Status {
        let Some(data) = &self.data_device else { return self.device_flush(slot).await };
        let port = self.stack.top_layer().data_port();
        let flush = |port| Child {
            port,
            op: Op::Flush,
            flags: Flags::NONE,
            offset: 0,
            len: 0,
            segs: SegList::EMPTY,
        };
        for (port, wanted) in
            [(port, data.volatile_cache), (self.top(), changes && self.device.volatile_cache)]
        {
            if wanted {
                self.counters.flushes.set(self.counters.flushes.get() + 1);
                self.start(slot, flush(port));
            }
        }
        self.wait(slot).await
    }

    /// Reads up to a metadata buffer's worth of bytes, a multiple of 512.
    pub(super) async fn read_meta(
        &self,
        slot: u16,
        port: Port,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, Status> {
        let buf = self.meta_buf(slot).await;
        let seg = buf.head(len as u32).unwrap_or(Seg::NONE);
        let mut segs = SegList::EMPTY;
        let _one = segs.push(seg);
        let status = self.io(slot, port, Op::Read, offset, segs).await;
        let mut bytes = vec![0; len];
        self.meta_region().read_seg(&seg, &mut bytes);
        self.give_meta(buf);
        self.counters.meta_reads.set(self.counters.meta_reads.get() + 1);
        match status {
            Status::Ok => Ok(bytes),
            // The guest asked for nothing wrong: a table sent us behind the device's end.
            Status::Invalid => Err(Status::Corrupt),
            status => Err(status),
        }
    }

    /// Writes up to a metadata buffer's worth of bytes, a multiple of 512, and waits.
    pub(super) async fn write_bytes(
        &self,
        slot: u16,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Status> {
        debug_assert!(bytes.len() <= META && bytes.len().is_multiple_of(512));
        let buf = self.meta_buf(slot).await;
        let mut segs = SegList::EMPTY;
        if let Some(seg) = buf.head(bytes.len() as u32) {
            self.meta_region().write_seg(&seg, bytes);
            let _one = segs.push(seg);
        }
        let status = self.io(slot, self.top(), Op::Write, offset, segs).await;
        self.give_meta(buf);
        self.counters.meta_writes.set(self.counters.meta_writes.get() + 1);
        check(status)
    }
}
