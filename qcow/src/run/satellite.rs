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
}

impl Reseat {
    /// The layers as they lie at a reactor's own `ports`.
    fn layers_at<L: BlockQueue>(
        &self,
        ports: &[Port],
        leaves: &[L],
    ) -> Result<Vec<StackLayer>, String> {
        let mut layers = self.layers.clone();
        if layers.len() != ports.len() {
            return Err(format!("{} layers lie at {} ports", layers.len(), ports.len()));
        }
        for (layer, &port) in layers.iter_mut().rev().zip(ports) {
            layer.port = port;
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
    /// A leaf has the request.
    Direct,
    /// The home reactor has it.
    Errand,
    /// Nobody takes it any more: to be answered.
    Refused,
}

struct Slot {
    /// The frontend's tag.
    up: Tag,
    generation: u32,
    /// In which its look-up was made; [`QUIET`] if the leaves have nothing of it.
    epoch: u64,
    used: Use,
}

/// See the module's text. Made on its reactor's thread, and never leaves it.
pub struct Satellite {
    hits: Hits,
    free: Vec<u16>,
    slots: Box<[Slot]>,
    /// The newest epoch seen: the stamp of look-ups.
    epoch: u64,
    /// Announced as quiet: no look-up is made.
    quiet: bool,
    owner: u16,
    direct: u64,
    // What a hit does not need.
    info: DeviceInfo,
    common: Arc<Common>,
    link: Away,
    announced: u64,
    /// Slots whose requests were refused.
    refused: VecDeque<u16>,
    /// Free slots during a pause.
    resting: Vec<u16>,
    /// The last one of [`Common::pause`] that was followed.
    pause: u64,
    stale: u64,
    closing: bool,
    ended: bool,
}

impl Satellite {
    /// Attaches the image to this reactor, where its layers lie at `ports`, the one that is written
    /// to first; `owner` as the reactor
    /// gave it.
    ///
    /// # Errors
    /// If a leaf or unit is not there, or a leaf takes shorter requests than those of the home
    /// reactor.
    pub fn attach<L: BlockQueue>(
        seat: Seat,
        ports: &[Port],
        owner: u16,
        leaves: &[L],
    ) -> Result<Satellite, String> {
        let Seat { image, common, link, slots } = seat;
        let layers = image.layers_at(ports, leaves)?;
        let Reseat { map, info, geometry, .. } = image;
        let slot = |_| Slot { up: Tag::new(0, 0, 0), generation: 0, epoch: QUIET, used: Use::Free };
        Ok(Satellite {
            hits: Hits::new(map, &layers, &info, &geometry),
            free: (0..slots).rev().collect(),
            slots: (0..slots).map(slot).collect(),
            epoch: 0,
            quiet: true,
            owner,
            direct: 0,
            info,
            common,
            link,
            announced: QUIET,
            refused: VecDeque::with_capacity(usize::from(slots)),
            resting: Vec::with_capacity(usize::from(slots)),
            pause: 0,
            stale: 0,
            closing: false,
            ended: false,
        })
    }

    /// Requests that went straight down so far.
    pub fn hits(&self) -> u64 {
        self.direct
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

    #[cold]
    fn send_home(&mut self, at: u16, r: &Request<'_>) {
        let slot = &mut self.slots[usize::from(at)];
        slot.up = r.tag;
        // More segments than anybody may send: the home reactor would refuse it too.
        let segs = SegList::from_slice(r.segs);
        match segs.filter(|_| !self.ended && !self.closing) {
            Some(segs) => {
                slot.used = Use::Errand;
                let (op, flags) = (r.op, r.flags);
                self.link.0.send(Errand {
                    slot: at,
                    op,
                    flags,
                    offset: r.offset,
                    len: r.len,
                    segs,
                });
            }
            None => {
                slot.used = Use::Refused;
                self.refused.push_back(at);
            }
        }
    }

    #[inline(always)]
    fn release(&mut self, at: u16) -> Tag {
        let slot = &mut self.slots[usize::from(at)];
        slot.used = Use::Free;
        slot.epoch = QUIET;
        slot.generation = slot.generation.wrapping_add(1);
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

    #[cold]
    fn announce_new(&mut self) {
        self.epoch = match std::mem::take(&mut self.quiet) {
            true => self.link.0.announced.wake(&self.common.epoch),
            false => self.common.epoch.get(),
        };
        let oldest = self.slots.iter().map(|s| s.epoch).min().unwrap_or(QUIET).min(self.epoch);
        self.announced = oldest;
        self.link.0.announced.announce(oldest);
    }

    /// Takes part in a pause, or ends that.
    #[cold]
    fn follow_pause(&mut self, pause: u64) {
        if pause.is_multiple_of(2) {
            self.free.append(&mut self.resting);
            self.pause = pause;
            return;
        }
        // Without a free slot nobody sends anything.
        self.resting.append(&mut self.free);
        if self.pause != pause && self.resting.len() == self.slots.len() {
            self.pause = pause;
            self.link.0.rest(pause);
        }
    }

    /// Takes over what has changed during a pause, where the layers now lie at `ports`, the one that
    /// is written to first.
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
                    slot.used = Use::Refused;
                    self.refused.push_back(at);
                }
            }
        }
        if !self.ended && self.free.len() + self.resting.len() == self.slots.len() {
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

    #[inline]
    fn room(&self, _leaves: &[L]) -> usize {
        self.free.len()
    }

    #[inline(always)]
    fn submit(&mut self, leaves: &mut [L], r: &Request<'_>) -> Result<(), Full> {
        let Some(at) = self.free.pop() else { return Err(Full) };
        if self.quiet {
            self.announce_new();
        }
        if let Some((port, offset)) = self.hits.straight(r)
            && let Some(leaf) = leaves.get_mut(usize::from(port.leaf))
        {
            let slot = &mut self.slots[usize::from(at)];
            let tag = Tag::new(self.owner, at, slot.generation);
            let below = Request { tag, unit: port.unit, offset, ..*r };
            if leaf.submit(&below).is_ok() {
                slot.up = r.tag;
                slot.used = Use::Direct;
                slot.epoch = self.epoch;
                self.direct += 1;
                return Ok(());
            }
        }
        self.send_home(at, &{ *r });
        Ok(())
    }

    #[inline(always)]
    fn complete(&mut self, _leaves: &mut [L], done: Completion) -> Option<Completion> {
        if done.is_quarantined() {
            self.lose();
        }
        let at = done.tag.slot();
        let slot = self.slots.get(usize::from(at));
        if !slot.is_some_and(|s| s.used == Use::Direct && s.generation == done.tag.generation()) {
            self.stale += 1;
            return None;
        }
        let tag = self.release(at);
        Some(Completion { tag, ..done })
    }

    #[inline(always)]
    fn poll(&mut self, _leaves: &mut [L], out: &mut Completions) -> bool {
        self.announce();
        let mut busy = false;
        while out.room() > 0
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
            let tag = self.release(at);
            out.push(Completion { tag, status: Status::Gone, detail: 0 });
        }
        let pause = self.common.pause();
        if pause != self.pause || !self.free.is_empty() && !pause.is_multiple_of(2) {
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
        let ending = ending || self.common.pause() != self.pause;
        if self.link.0.has_reply() || !self.refused.is_empty() || ending {
            return HasWork::Yes;
        }
        if !self.quiet && self.slots.iter().all(|s| s.epoch == QUIET) {
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
