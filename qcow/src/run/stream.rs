//! Streaming: what lower layers hold is taken up into the layer that is written to, while guests go
//! on. Several slots each take the next cluster; a cluster is copied under its claim, as an
//! allocation with copy-on-write but without a guest's bytes. Afterwards the chain may be cut below
//! what was taken up, see [`super::pause`].

use std::cell::{Cell, RefCell};

use block::Status;

use super::image::Image;
use super::pause::Stage;
use super::resolve::Source;
use super::shared::{Key, Shared, What};
use super::write::Rest;
use crate::edit::ClusterSet;
use crate::map::{Kind, Word};

/// Clusters on their way up at a time.
pub(super) const STREAM_SLOTS: u16 = 8;

/// Clusters looked at before others of the same turn get their share.
const STRIDE: u32 = 64;

/// The state of a stream. It outlives pauses, its tasks do not.
#[derive(Default)]
pub(super) struct Stream {
    /// There is one that has not ended.
    active: Cell<bool>,
    /// Layers that stay, from the bottom.
    keep: Cell<u64>,
    /// Only these clusters are taken up, and zeroes too: another backing file is to come. From the
    /// stream's begin until the next stack is there.
    only: RefCell<Option<ClusterSet>>,
    /// The next cluster, and how many there are.
    next: Cell<u64>,
    end: Cell<u64>,
    /// Bytes copied, and bytes that may be copied in all.
    copied: Cell<u64>,
    granted: Cell<u64>,
    /// Slots at work.
    running: Cell<u16>,
    /// The slots are to end at the next cluster.
    held: Cell<bool>,
    status: Cell<Option<Status>>,
}

/// How far a stream has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Bytes of the guest's disk that were looked at.
    pub at: u64,
    /// Of so many.
    pub of: u64,
    /// Bytes that had to be copied.
    pub copied: u64,
    /// How it ended.
    pub ended: Option<Status>,
}

impl Image {
    /// Begins to take up what layers hold above the lowest `keep` ones, but for as many bytes as are
    /// granted ([`Image::grant_stream`]). Returns whether it does: not while there is one already.
    /// An error ends it for good; what was copied stays.
    ///
    /// `only`: another backing file is to come, which differs in these clusters. Others stay where
    /// they are, zeroes are taken up too, and what guests empty is said to be so. The image must be
    /// paused, and is to be given the other stack, or the stream cancelled, also after it has ended.
    #[must_use]
    pub fn start_stream(&mut self, keep: usize, only: Option<ClusterSet>) -> bool {
        let s = &self.shared.stream;
        if s.active.get() {
            return false;
        }
        s.active.set(true);
        s.keep.set(keep as u64);
        *s.only.borrow_mut() = only;
        s.next.set(0);
        s.end.set(self.shared.geometry.guest_clusters());
        s.copied.set(0);
        s.granted.set(0);
        s.status.set(None);
        self.begin_stream();
        true
    }

    /// Lets the stream copy so many bytes more.
    pub fn grant_stream(&mut self, bytes: u64) {
        let s = &self.shared.stream;
        s.granted.set(s.granted.get().saturating_add(bytes));
        self.shared.unpark(Key::Stream);
    }

    /// Ends the stream soon. What was copied stays. No other backing file is to come.
    pub fn cancel_stream(&mut self) {
        self.shared.end_stream();
        self.shared.no_backing_comes();
    }

    /// How far the last stream has come.
    pub fn stream_progress(&self) -> Progress {
        let s = &self.shared.stream;
        let bits = self.shared.geometry.cluster_bits();
        let size = self.shared.geometry.size();
        Progress {
            at: (s.next.get() << bits).min(size),
            of: size,
            copied: s.copied.get(),
            ended: s.status.get().filter(|_| !s.active.get()),
        }
    }

    /// Has the stream's slots begin, if there is a stream.
    pub(super) fn begin_stream(&mut self) {
        let s = &self.shared.stream;
        if !s.active.get() || s.running.get() > 0 || self.stage != Stage::Serving {
            return;
        }
        s.held.set(false);
        s.running.set(STREAM_SLOTS);
        for n in 0..STREAM_SLOTS {
            self.give(self.requests + 1 + n, What::Stream);
        }
    }
}

impl Shared {
    /// Has the stream's slots end, so that it can go on later.
    pub(super) fn hold_stream(&self) {
        self.stream.held.set(true);
        self.unpark(Key::Stream);
    }

    /// Ends the stream before it is done, if there is one.
    pub(super) fn end_stream(&self) {
        let s = &self.stream;
        if s.active.get() && s.status.get().is_none() {
            s.status.set(Some(Status::Gone));
        }
        if s.running.get() == 0 {
            s.active.set(false);
        }
        self.unpark(Key::Stream);
    }

    /// What guests empty may be without a say of the image again.
    pub(super) fn no_backing_comes(&self) {
        *self.stream.only.borrow_mut() = None;
    }

    /// Whether a cluster that no layer holds reads as zeroes, now and later: there is one layer, and
    /// none will come below it.
    pub(super) fn stands_alone(&self) -> bool {
        self.stack.layers.len() == 1 && self.stream.only.borrow().is_none()
    }

    /// Whether slots of a stream are at work.
    pub(super) fn streams(&self) -> bool {
        self.stream.running.get() > 0
    }

    /// A slot of the stream has ended.
    pub(super) fn stream_slot_ended(&self, status: Status) {
        let s = &self.stream;
        s.running.set(s.running.get() - 1);
        if !status.is_ok() && s.status.get().is_none_or(Status::is_ok) {
            s.status.set(Some(status));
        }
        let over = s.status.get().is_some() || s.next.get() >= s.end.get();
        if s.running.get() == 0 && over {
            s.status.set(s.status.get().or(Some(Status::Ok)));
            s.active.set(false);
        }
    }

    /// Takes clusters up until there are none, the stream fails, or is held.
    pub(super) async fn stream(&self, slot: u16) -> Status {
        let status = self.stream_clusters(slot).await;
        self.work(slot).retire();
        status
    }

    async fn stream_clusters(&self, slot: u16) -> Status {
        let s = &self.stream;
        let mut looked = 0;
        loop {
            if s.held.get() || s.status.get().is_some() {
                return Status::Ok;
            }
            if s.copied.get() >= s.granted.get() {
                self.park(slot, Key::Stream).await;
                continue;
            }
            let cluster = s.next.get();
            if cluster >= s.end.get() {
                return Status::Ok;
            }
            s.next.set(cluster + 1);
            looked += 1;
            if looked % STRIDE == 0 {
                self.pause(slot).await;
            }
            if s.only.borrow().as_ref().is_some_and(|only| !only.contains(cluster)) {
                continue;
            }
            self.work(slot).epoch.set(self.common.epoch.get());
            let done = self.take_up(slot, cluster).await;
            self.work(slot).epoch.set(u64::MAX);
            if let Err(status) = done {
                return status;
            }
        }
    }

    /// Copies what a cluster has into the layer that is written to, as far as a layer holds it that is
    /// to go.
    async fn take_up(&self, slot: u16, cluster: u64) -> Result<(), Status> {
        let (sub, bits) = (self.geometry.sub_bits(), self.geometry.unit_bits());
        let all = cluster << sub..((cluster + 1) << sub).min(self.map.clusters());
        let mut unit = all.start;
        while unit < all.end {
            let word = self.word(slot, unit).await?;
            if word.claimed() {
                self.at_rest(slot, self.park(slot, Key::Unit(unit))).await;
                continue;
            }
            let come = self.is_to_come_up(slot, unit, word).await?;
            if self.map.lookup(unit) != word {
                continue;
            }
            if come == Come::Not {
                unit += 1;
                continue;
            }
            if word.kind() == Kind::Corrupt {
                return Err(Status::Corrupt);
            }
            // With all behind it in the cluster that is alike.
            let alike = |u: &u64| {
                let w = self.map.lookup(*u);
                !w.claimed() && w.kind() != Kind::Corrupt && self.come_of(*u, w) == Some(come)
            };
            let count = 1 + (unit + 1..all.end).take_while(alike).count() as u64;
            let Ok(claim) = self.claim_range(unit..unit + count) else { continue };
            if come == Come::Zero && self.geometry.version() >= 3 {
                let whole = unit == all.start && unit + count == all.end;
                if self.zero_claimed(slot, claim, whole).await? {
                    unit += count;
                }
                continue;
            }
            self.write_claimed(slot, claim, &Rest::nothing(unit << bits)).await?;
            // How far that came is seen by the words.
            let top = self.stack.top_number();
            let moved = |u: &u64| {
                let w = self.map.lookup(*u);
                w.kind() == Kind::Mapped && w.layer() == top
            };
            let s = &self.stream;
            let moved = (unit..unit + count).filter(moved).count() as u64;
            s.copied.set(s.copied.get() + (moved << bits));
        }
        Ok(())
    }

    async fn is_to_come_up(&self, slot: u16, unit: u64, word: Word) -> Result<Come, Status> {
        if let Some(come) = self.come_of(unit, word) {
            return Ok(come);
        }
        let size = self.geometry.unit_size();
        Ok(match self.resolve(slot, unit << self.geometry.unit_bits(), size).await? {
            (Source::Zero, run) if run == size => self.come_zero(),
            _ => Come::Data,
        })
    }

    /// Zeroes show below the last layer, too, but not where another one stays or will come.
    fn come_zero(&self) -> Come {
        let s = &self.stream;
        if s.keep.get() > 0 || s.only.borrow().is_some() { Come::Zero } else { Come::Not }
    }

    /// The same by the word alone; `None` if the layers must be asked.
    fn come_of(&self, unit: u64, word: Word) -> Option<Come> {
        let keep = self.stream.keep.get() as usize;
        let (at, top) = (usize::from(word.layer()), self.top_at());
        let end = (unit + 1) << self.geometry.unit_bits();
        Some(match word.kind() {
            Kind::Zero | Kind::Mapped | Kind::Compressed if at == top || at < keep => Come::Not,
            Kind::Zero => self.come_zero(),
            Kind::Mapped | Kind::Compressed => Come::Data,
            // In no layer at all, but to be taken up.
            Kind::Hole if self.stream.only.borrow().is_some() => Come::Zero,
            // Behind the end of a layer that goes; what stays may be longer.
            Kind::Hole if self.stack.layers[keep.min(top)..top].iter().any(|l| l.size() < end) => {
                self.come_zero()
            }
            Kind::Hole | Kind::Absent => Come::Not,
            Kind::Split => return None,
            Kind::Corrupt => Come::Data,
        })
    }
}

/// What a stream has to do with a unit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Come {
    Not,
    Zero,
    Data,
}
