//! [`Portal`]: how a service thread does I/O through a reactor.
//!
//! NBD connections, conversion and verification run on ordinary threads that may block; they hand
//! requests to the reactor that owns the image and get replies, both through bounded queues. The
//! reactor makes a system call only if the other side sleeps.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Completion, Flags, Frontend, HasWork, Op, Request, Status, Submit, Tag};
use crossbeam_queue::ArrayQueue;
use dma::{Region, Seg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{Lodging, Wake};

/// A request through a portal. Its buffer belongs to the sender, who keeps it until the reply.
#[derive(Clone, Copy, Debug)]
pub struct PortalRequest {
    /// Comes back in the reply.
    pub id: u64,
    /// What to do.
    pub op: Op,
    /// Modifiers.
    pub flags: Flags,
    /// Where, in bytes; a multiple of the image's block size.
    pub offset: u64,
    /// How much, in bytes; a multiple of the image's block size.
    pub len: u64,
    /// The data of a read or write: one segment of `len` bytes.
    pub seg: Option<Seg>,
}

/// How a request through a portal ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortalReply {
    /// As in the request.
    pub id: u64,
    /// How it ended.
    pub status: Status,
}

struct Shared {
    requests: ArrayQueue<PortalRequest>,
    replies: ArrayQueue<PortalReply>,
    /// Wakes the service thread.
    client: Wake,
    /// The service thread's end was dropped.
    gone: AtomicBool,
    /// The reactor's end was dropped: all that it took is answered.
    ended: AtomicBool,
}

/// The service thread's end.
pub struct Portal {
    shared: Arc<Shared>,
    reactor: Wake,
    depth: usize,
    in_flight: usize,
    lodging: Option<Lodging>,
}

/// The reactor's end.
pub struct PortalFrontend {
    shared: Arc<Shared>,
    owner: u16,
    regions: Vec<Arc<Region>>,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    replied: bool,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    id: u64,
    generation: u32,
    busy: bool,
}

impl Portal {
    /// Both ends of a portal for `depth` requests in flight; `reactor` is [`crate::Core::wake`] of
    /// the reactor that will have the other end, `regions` is all memory that requests may name.
    /// The second part makes the reactor's end when it is told its owner number.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn new(
        depth: u16,
        regions: Vec<Arc<Region>>,
        reactor: Wake,
    ) -> Result<(Portal, impl FnOnce(u16) -> PortalFrontend + Send + use<>), nix::Error> {
        let count = usize::from(depth.max(1));
        let shared = Arc::new(Shared {
            requests: ArrayQueue::new(count),
            replies: ArrayQueue::new(count),
            client: Wake::new()?,
            gone: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let portal =
            Portal { shared: shared.clone(), reactor, depth: count, in_flight: 0, lodging: None };
        let make = move |owner| PortalFrontend {
            shared,
            owner,
            regions,
            slots: vec![Slot::default(); count].into_boxed_slice(),
            free: (0..depth.max(1)).rev().collect(),
            replied: false,
        };
        Ok((portal, make))
    }

    /// The same portal for one who may lodge with the reactor.
    #[must_use]
    pub fn with_lodging(mut self, lodging: Lodging) -> Portal {
        self.lodging = Some(lodging);
        self
    }

    /// How its owner can lodge with the reactor, if that is foreseen.
    pub fn lodging(&self) -> Option<Lodging> {
        self.lodging.clone()
    }

    /// What wakes the reactor.
    pub fn reactor(&self) -> &Wake {
        &self.reactor
    }

    /// How many requests can be sent now.
    pub fn room(&self) -> usize {
        self.depth - self.in_flight
    }

    /// Requests sent and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Sends a request, or gives it back if there is no room.
    ///
    /// # Errors
    /// The request itself.
    pub fn send(&mut self, request: PortalRequest) -> Result<(), PortalRequest> {
        if self.in_flight == self.depth {
            return Err(request);
        }
        self.shared.requests.push(request)?;
        self.in_flight += 1;
        self.reactor.wake();
        Ok(())
    }

    /// The next reply that is there. What the reactor has not taken when its end goes is answered
    /// with [`Status::Gone`].
    pub fn receive(&mut self) -> Option<PortalReply> {
        let reply = self.shared.replies.pop().or_else(|| self.unanswered())?;
        self.in_flight -= 1;
        Some(reply)
    }

    fn unanswered(&self) -> Option<PortalReply> {
        if !self.shared.ended.load(Ordering::Acquire) {
            return None;
        }
        // Replies from just before the end come first; then nobody else takes requests.
        let gone = |r: PortalRequest| PortalReply { id: r.id, status: Status::Gone };
        self.shared.replies.pop().or_else(|| self.shared.requests.pop().map(gone))
    }

    /// Waits for a reply. Panics if no request is in flight: there would never be one.
    pub fn wait(&mut self) -> PortalReply {
        assert!(self.in_flight > 0, "waiting for a reply to nothing");
        loop {
            // A reply of a fast device is there before a sleep would have begun.
            for _ in 0..200 {
                if let Some(r) = self.receive() {
                    return r;
                }
                std::hint::spin_loop();
            }
            self.arm();
            if !self.has_reply() {
                let mut fds = [PollFd::new(self.shared.client.fd(), PollFlags::POLLIN)];
                let _ = poll(&mut fds, PollTimeout::from(1000u16));
            }
            self.disarm();
        }
    }

    /// Asks for [`Portal::fd`] to become readable at the next reply. Look at
    /// [`Portal::has_reply`] afterwards, before sleeping.
    pub fn arm(&self) {
        self.shared.client.about_to_sleep();
    }

    /// Takes [`Portal::arm`] back and empties the descriptor.
    pub fn disarm(&self) {
        self.shared.client.awake();
    }

    /// Whether a reply waits.
    pub fn has_reply(&self) -> bool {
        !self.shared.replies.is_empty()
            || (self.in_flight > 0 && self.shared.ended.load(Ordering::Acquire))
    }

    /// Readable when a reply came after [`Portal::arm`].
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.shared.client.fd()
    }

    /// Sends a request and waits for its reply; other requests must not be in flight.
    pub fn call(&mut self, request: PortalRequest) -> Status {
        assert!(self.in_flight == 0, "a blocking call beside requests in flight");
        match self.send(request) {
            Ok(()) => self.wait().status,
            Err(_) => Status::Gone,
        }
    }
}

impl Drop for Portal {
    fn drop(&mut self) {
        self.shared.gone.store(true, Ordering::Release);
        self.reactor.wake();
    }
}

impl Drop for PortalFrontend {
    fn drop(&mut self) {
        // With requests in flight only if the whole core ends, after its leaves have: nothing
        // touches the buffers any more.
        for slot in self.slots.iter().filter(|s| s.busy) {
            let _ = self.shared.replies.push(PortalReply { id: slot.id, status: Status::Gone });
        }
        self.shared.ended.store(true, Ordering::Release);
        self.shared.client.wake();
    }
}

impl PortalFrontend {
    /// Answers the request that is in flight under this tag. Returns whether there is one.
    fn reply(&mut self, tag: Tag, status: Status) -> bool {
        let Some(slot) = self.slots.get_mut(usize::from(tag.slot())) else { return false };
        if !slot.busy || slot.generation != tag.generation() {
            return false;
        }
        slot.busy = false;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(tag.slot());
        // Never full: as many places as slots, and a slot is free only when its reply is here.
        let _ = self.shared.replies.push(PortalReply { id: slot.id, status });
        self.replied = true;
        true
    }
}

impl Frontend for PortalFrontend {
    fn regions(&self) -> Vec<Arc<Region>> {
        self.regions.clone()
    }

    #[inline]
    fn complete(&mut self, done: Completion) -> bool {
        self.reply(done.tag, done.status)
    }

    fn poll<D: Submit>(&mut self, disk: &mut D, _now: u64) -> bool {
        let mut busy = self.replied;
        while !self.free.is_empty() && disk.room() > 0 {
            let Some(r) = self.shared.requests.pop() else { break };
            let Some(at) = self.free.pop() else { break };
            let slot = &mut self.slots[usize::from(at)];
            *slot = Slot { id: r.id, busy: true, ..*slot };
            let tag = Tag::new(self.owner, at, slot.generation);
            let request = Request {
                tag,
                op: r.op,
                flags: r.flags,
                unit: 0,
                offset: r.offset,
                len: r.len,
                segs: r.seg.as_slice(),
            };
            busy = true;
            if disk.submit(&request).is_err() {
                self.reply(tag, Status::Gone);
            }
        }
        if self.replied {
            self.replied = false;
            self.shared.client.wake();
        }
        busy
    }

    fn arm(&mut self) -> HasWork {
        let waiting = !self.shared.requests.is_empty() || self.replied || self.closed();
        if waiting { HasWork::Yes } else { HasWork::No }
    }

    fn is_guest(&self) -> bool {
        false
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn closed(&self) -> bool {
        self.shared.gone.load(Ordering::Acquire)
            && self.in_flight() == 0
            && self.shared.requests.is_empty()
    }
}
