//! [`Satellite`]: an image on a further reactor.
//!
//! Hits (reads, and writes in place) go straight down through the image's map to this reactor's own
//! leaf queues: by loads alone, with nothing that another reactor writes on the way. Whatever else
//! there is (a miss, an allocation, a discard, a flush) goes to the image's home reactor by a
//! [`Link`]: metadata has one owner.

use std::collections::VecDeque;
use std::sync::Arc;

use block::{
    BlockQueue, Completion, Completions, DeviceInfo, Full, HasWork, Layer, Op, Port, Request,
    SegList, Status, Tag,
};
use dma::Region;
use reactor::Wake;

use super::epochs::QUIET;
use super::flights::Flights;
use super::hits::{Hits, look_at_leaves};
use super::link::{Common, Errand, Link, Phase};
use super::stack::StackLayer;
use crate::format::Geometry;
use crate::map::Map;

/// What a further reactor needs to serve an image: made by [`super::Image::seat`] on the home
/// reactor, and sent to the other.
pub struct Seat {
    pub(super) image: Reseat,
    pub(super) common: Arc<Common>,
    pub(super) link: Away,
    pub(super) slots: u16,
}

/// What the image is like, for a [`Satellite`]: made by [`super::Image::reseat`].
#[derive(Clone)]
pub struct Reseat {
    pub(super) map: Arc<Map>,
    pub(super) layers: Vec<StackLayer>,
    pub(super) info: DeviceInfo,
    pub(super) geometry: Geometry,
    pub(super) version: u64,
}

impl Reseat {
    /// The layers as their files lie at a reactor's own `ports`.
    fn layers_at<L: BlockQueue>(
        &self,
        ports: &[Port],
        leaves: &[L],
    ) -> Result<Vec<StackLayer>, String> {
        let mut layers = self.layers.clone();
        let files = layers.iter_mut().rev().flat_map(|l| [Some(&mut l.port), l.data.as_mut()]);
        let mut places: Vec<&mut Port> = files.flatten().collect();
        if places.len() != ports.len() {
            return Err(format!("{} files lie at {} ports", places.len(), ports.len()));
        }
        for (place, &port) in places.iter_mut().zip(ports) {
            **place = port;
        }
        if look_at_leaves(&mut layers, leaves)? < self.info.max_transfer {
            return Err("a device takes less at a time than on the home reactor".to_owned());
        }
        Ok(layers)
    }
}

/// The satellite's end of a link. Dropped when nothing of it is in flight: by its reactor after the
/// leaves, or with a seat that was never taken.
pub(super) struct Away(pub(super) Arc<Link>);

impl Drop for Away {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// What a slot is used for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Free,
    /// It waits for a place in its leaf.
    Waiting,
    /// The home reactor has it.
    Errand,
    /// Nobody takes it: to be answered so.
    Refused(Status),
}

struct Slot {
    /// The frontend's tag.
    up: Tag,
    used: Use,
}

/// See the module's text. Made on its reactor's thread, and never leaves it.
pub struct Satellite {
    hits: Hits,
    free: Vec<u16>,
    slots: Box<[Slot]>,
    /// What went straight down.
    flights: Flights,
    /// Announced as quiet: no look-up is made.
    quiet: bool,
    // What a hit does not need.
    info: DeviceInfo,
    common: Arc<Common>,
    link: Away,
    announced: u64,
    /// Requests that their leaf had no place for, in order.
    waiting: VecDeque<Errand>,
    /// Slots whose requests were refused.
    refused: VecDeque<u16>,
    /// Free slots during a pause.
    resting: Vec<u16>,
    /// The last one of [`Common::pause`] that was followed.
    pause: u64,
    /// What [`Common::version`] was when the layers were looked at.
    version: u64,
    stale: u64,
    closing: bool,
    ended: bool,
}

impl Satellite {
    /// Attaches the image to this reactor, where its files lie at `ports`, in the order of
    /// [`super::Stack::new`].
    ///
    /// # Errors
    /// If a leaf or unit is not there, or a leaf takes shorter requests than those of the home
    /// reactor.
    pub fn attach<L: BlockQueue>(
        seat: Seat,
        ports: &[Port],
        leaves: &[L],
    ) -> Result<Satellite, String> {
        let Seat { image, common, link, slots } = seat;
        let layers = image.layers_at(ports, leaves)?;
        let Reseat { map, info, geometry, version, .. } = image;
        let slot = |_| Slot { up: Tag::new(0, 0, 0), used: Use::Free };
        Ok(Satellite {
            hits: Hits::new(map, &layers, &info, &geometry),
            free: (0..slots).rev().collect(),
            slots: (0..slots).map(slot).collect(),
            flights: Flights::new(),
            quiet: true,
            info,
            common,
            link,
            announced: QUIET,
            waiting: VecDeque::with_capacity(usize::from(slots)),
            refused: VecDeque::with_capacity(usize::from(slots)),
            resting: Vec::with_capacity(usize::from(slots)),
            // Even, and none that there is: so the first poll looks.
            pause: u64::MAX - 1,
            version,
            stale: 0,
            closing: false,
            ended: false,
        })
    }

    /// Requests that went straight down so far.
    pub fn hits(&self) -> u64 {
        self.flights.begun()
    }

    /// Completions that belong to nothing in flight.
    pub fn stale(&self) -> u64 {
        self.stale
    }

    /// Where the byte at `offset` of the disk lies, if an operation of this kind may go straight
    /// there.
    #[inline(always)]
    pub fn translate(&self, op: Op, offset: u64) -> Option<(Port, u64)> {
        self.hits.translate(op, offset)
    }

    /// What to do with a request that did not go straight down.
    #[cold]
    fn take_slow(&mut self, r: &Request<'_>) -> Result<(), Full> {
        let at = self.free.pop().ok_or(Full)?;
        self.submit_slow(at, r);
        Ok(())
    }

    fn submit_slow(&mut self, at: u16, r: &Request<'_>) {
        self.slots[usize::from(at)].up = r.tag;
        let Some(segs) = SegList::from_slice(r.segs) else {
            return self.refuse(at, Status::Invalid);
        };
        let (op, flags) = (r.op, r.flags);
        let errand = Errand { slot: at, op, flags, offset: r.offset, len: r.len, segs };
        if self.hits.straight(r).is_some() {
            // Its leaf is full, which the home reactor's need not be: but that would be no help.
            self.slots[usize::from(at)].used = Use::Waiting;
            self.waiting.push_back(errand);
        } else {
            self.send_home(errand);
        }
    }

    fn send_home(&mut self, errand: Errand) {
        let at = errand.slot;
        if self.ended || self.closing || self.common.phase() == Phase::Gone {
            return self.refuse(at, Status::Gone);
        }
        self.slots[usize::from(at)].used = Use::Errand;
        self.link.0.send(errand);
    }

    fn refuse(&mut self, at: u16, status: Status) {
        self.slots[usize::from(at)].used = Use::Refused(status);
        self.refused.push_back(at);
    }

    /// Sends what waits for places in leaves, as far as there are any.
    #[cold]
    fn send_waiting<L: BlockQueue>(&mut self, leaves: &mut [L]) {
        while let Some(e) = self.waiting.pop_front() {
            let slot = &self.slots[usize::from(e.slot)];
            let (op, flags, segs) = (e.op, e.flags, e.segs.as_slice());
            let r =
                Request { tag: slot.up, op, flags, unit: 0, offset: e.offset, len: e.len, segs };
            if self.go_straight(leaves, &r) {
                self.release(e.slot);
                continue;
            }
            if self.hits.straight(&r).is_some() {
                self.waiting.push_front(e);
                return;
            }
            // What it was mapped to has changed.
            self.send_home(e);
        }
    }

    /// Sends a request straight down, if it may go there and its leaf has a place.
    #[inline(always)]
    fn go_straight<L: BlockQueue>(&mut self, leaves: &mut [L], r: &Request<'_>) -> bool {
        if let Some((port, offset)) = self.hits.straight(r)
            && let Some(leaf) = leaves.get_mut(usize::from(port.leaf))
        {
            let below = Request { tag: self.flights.begin(r.tag), unit: port.unit, offset, ..*r };
            if leaf.submit(&below).is_ok() {
                return true;
            }
            self.flights.take_back();
        }
        false
    }

    /// Frees a slot; returns whose it was.
    fn release(&mut self, at: u16) -> Tag {
        let slot = &mut self.slots[usize::from(at)];
        slot.used = Use::Free;
        let up = slot.up;
        // Never grows: a slot is free once.
        self.free.push(at);
        up
    }

    /// Says which look-ups are still of importance, if that is news.
    #[inline]
    fn announce(&mut self) {
        if self.quiet || self.common.epoch.get() != self.announced {
            self.announce_new();
        }
    }

    /// Whether nothing is under way, as nearly always when the reactor wakes up or goes to sleep. It
    /// may have hundreds of images, and should not look at all slots of each for that.
    fn idle(&self) -> bool {
        self.free.len() == self.slots.len() && self.flights.count() == 0
    }

    #[cold]
    fn announce_new(&mut self) {
        let now = match std::mem::take(&mut self.quiet) {
            true => self.link.0.announced.wake(&self.common.epoch),
            false => self.common.epoch.get(),
        };
        self.flights.see(now);
        self.announced = self.flights.oldest().min(now);
        self.link.0.announced.announce(self.announced);
    }

    /// Takes part in a pause, or ends that.
    #[cold]
    fn follow_pause(&mut self, pause: u64) {
        if pause.is_multiple_of(2) || self.common.phase() != Phase::Open {
            self.free.append(&mut self.resting);
            self.pause = pause;
            if self.version != self.common.version() {
                // The layers are others, and nobody has told us: the home reactor knows them.
                self.hits.end();
            }
            return;
        }
        // Without a free slot nobody sends anything.
        self.resting.append(&mut self.free);
        if self.pause != pause
            && self.resting.len() == self.slots.len()
            && self.flights.count() == 0
        {
            self.pause = pause;
            self.link.0.rest(pause);
        }
    }

    /// Takes over what has changed during a pause, where the files now lie at `ports`.
    ///
    /// # Errors
    /// As [`Satellite::attach`].
    pub fn reseat<L: BlockQueue>(
        &mut self,
        news: &Reseat,
        ports: &[Port],
        leaves: &[L],
    ) -> Result<(), String> {
        let layers = news.layers_at(ports, leaves)?;
        self.hits = Hits::new(news.map.clone(), &layers, &news.info, &news.geometry);
        self.info = news.info.clone();
        self.version = news.version;
        if self.common.phase() != Phase::Open {
            self.hits.end();
        }
        Ok(())
    }

    /// Takes part in the end of the image.
    #[cold]
    fn leave(&mut self) {
        self.hits.end();
        if self.common.phase() == Phase::Gone && !self.link.0.has_reply() {
            // Nobody replies any more, and nobody uses the buffers.
            for (at, slot) in (0..).zip(self.slots.iter_mut()) {
                if slot.used == Use::Errand {
                    slot.used = Use::Refused(Status::Gone);
                    self.refused.push_back(at);
                }
            }
        }
        // A pause has no end any more.
        self.free.append(&mut self.resting);
        if !self.ended && self.idle() {
            self.ended = true;
            self.link.0.end();
        }
    }

    /// A device was lost that may still use memory: nobody may have it filled any more.
    #[cold]
    fn lose(&mut self) {
        self.common.enter(Phase::Lost);
        self.link.0.wake_home();
        self.hits.end();
    }
}

impl<L: BlockQueue> Layer<L> for Satellite {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn register(&mut self, region: &Arc<Region>) {
        self.link.0.send_region(region.clone());
    }

    /// Those that go straight down need no slot, but are not more than there are slots either.
    #[inline]
    fn room(&self, _leaves: &[L]) -> usize {
        self.free.len().saturating_sub(self.flights.count())
    }

    #[inline(always)]
    fn submit(&mut self, leaves: &mut [L], r: &Request<'_>) -> Result<(), Full> {
        if self.free.is_empty() {
            return Err(Full);
        }
        if self.quiet {
            self.announce_new();
        }
        if self.go_straight(leaves, r) {
            return Ok(());
        }
        // A copy, so that the caller's need not be in memory for the straight way.
        self.take_slow(&{ *r })
    }

    #[inline(always)]
    fn prefetch(&self, sectors: impl Iterator<Item = u64>) {
        self.hits.prefetch(sectors);
    }

    /// It sends nothing under its own name.
    fn complete(&mut self, _leaves: &mut [L], _done: &mut Completion) -> bool {
        self.stale += 1;
        false
    }

    #[inline]
    fn ended(&mut self, marked: bool, count: usize) {
        self.flights.end(marked, count);
    }

    fn lost_device(&mut self) {
        self.lose();
    }

    #[inline(always)]
    fn poll(&mut self, leaves: &mut [L], out: &mut Completions) -> bool {
        self.announce();
        let mut busy = false;
        // Asked first, since taking from an empty queue costs a fence.
        while self.link.0.has_reply()
            && out.room() > 0
            && let Some(reply) = self.link.0.take_reply()
        {
            busy = true;
            let tag = self.release(reply.slot);
            out.push(Completion { tag, status: reply.status, detail: 0 });
        }
        while out.room() > 0
            && let Some(at) = self.refused.pop_front()
        {
            busy = true;
            let used = self.slots[usize::from(at)].used;
            let status = if let Use::Refused(status) = used { status } else { Status::Gone };
            let tag = self.release(at);
            out.push(Completion { tag, status, detail: 0 });
        }
        if !self.waiting.is_empty() {
            self.send_waiting(leaves);
        }
        let pause = self.common.pause();
        let rests = !pause.is_multiple_of(2) && !self.free.is_empty();
        if pause != self.pause || rests {
            self.follow_pause(pause);
        }
        // Behind the replies, so that one which came after a loss is not handed out before it.
        if self.closing || self.common.phase() != Phase::Open {
            self.leave();
        }
        busy
    }

    fn arm(&mut self) -> HasWork {
        let ending = self.common.phase() != Phase::Open && !self.ended;
        let ending = ending || self.common.pause() != self.pause || !self.waiting.is_empty();
        if self.link.0.has_reply() || !self.refused.is_empty() || ending {
            return HasWork::Yes;
        }
        if !self.quiet && self.flights.count() == 0 {
            self.quiet = true;
            self.link.0.announced.quiet();
        }
        HasWork::No
    }

    fn close(&mut self) {
        self.closing = true;
        self.leave();
    }

    fn closed(&self) -> Option<Status> {
        (self.closing && self.ended).then_some(Status::Ok)
    }
}

/// The two wake-ups of a [`Seat`].
pub struct Wakes {
    /// The image's home reactor's.
    pub home: Wake,
    /// The satellite's reactor's.
    pub away: Wake,
}
