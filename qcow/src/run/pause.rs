//! A pause of an image: everybody who serves it comes to rest, what is in memory goes to disk, and
//! then its files may be changed by others, or its layers ([`Image::restack`]). Frontends see an
//! image without room. The clean close ends in the same way.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use block::{BlockQueue, Flags, SegList, Status};
use reactor::task::Tasks;

use super::alloc::Allocator;
use super::corrupt::Mark;
use super::hits::{Hits, look_at_leaves};
use super::image::{Image, devices, info};
use super::marks::Marks;
use super::meta::{Tables, page_bits};
use super::serve::serve;
use super::shared::{Job, What};
use super::stack::{LayerFormat, Stack, StackLayer};
use crate::map::{Map, Pages};
use crate::open::can_be_chain;

/// How far an image has come to rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    Serving,
    /// Requests are in flight, here or on other reactors.
    Draining,
    /// What is in memory goes to disk; for the last time, or for a pause.
    WritingBack {
        last: bool,
    },
    /// So it ended.
    Resting(Status),
}

impl Image {
    /// Begins a pause: requests in flight end, no others begin, and metadata goes to disk.
    pub fn pause(&mut self) {
        self.given_up = false;
        if self.stage == Stage::Serving && !self.closing {
            self.shared.common.turn_pause();
            self.shared.links.borrow().iter().for_each(|l| l.wake_satellite());
            self.stage = Stage::Draining;
            self.shared.hold_stream();
            self.drained();
        }
    }

    /// How the pause was reached: the image rests, and on disk it is complete if this is
    /// [`Status::Ok`]. `None` while it is not reached.
    pub fn paused(&self) -> Option<Status> {
        match self.stage {
            Stage::Resting(status) if !self.closing => Some(status),
            _ => None,
        }
    }

    /// Has a leaf queue that came after the image learn of all memory that it may be asked about.
    /// Before a stack with that leaf.
    ///
    /// # Errors
    /// If it cannot reach that memory.
    pub fn take_leaf<L: BlockQueue>(&self, index: u16, leaves: &mut [L]) -> Result<(), String> {
        let leaf = leaves.get_mut(usize::from(index)).ok_or("there is no such leaf queue")?;
        self.shared.regions().iter().try_for_each(|region| leaf.register(region))
    }

    /// Whether a map for a disk of `size` bytes can be had.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn could_be(&self, size: u64) -> Result<(), String> {
        let g = self.shared.geometry;
        let units = size.div_ceil(g.unit_size());
        let least = 2 * usize::from(self.requests) + 16;
        Map::new(units, page_bits(&g), self.l2_cache, least).map(|_| ())
    }

    /// Whether nothing was found in the image that is written to that contradicts itself.
    pub fn is_consistent(&self) -> bool {
        self.shared.mark.get() == Mark::No && !self.shared.alloc.borrow().is_distrusted()
    }

    /// Ends a pause, also one that is not reached yet; soon, if metadata goes to disk for it.
    pub fn resume(&mut self) {
        self.given_up = self.stage == Stage::WritingBack { last: false };
        if self.closing || !matches!(self.stage, Stage::Draining | Stage::Resting(_)) {
            return;
        }
        self.stage = Stage::Serving;
        self.free.append(&mut self.resting);
        self.shared.common.turn_pause();
        self.shared.links.borrow().iter().for_each(|l| l.wake_satellite());
        self.begin_stream();
    }

    /// Serves this stack from now on, in which each layer was read from disk during the pause, on
    /// leaf queues that were there before the image or were shown to it ([`Image::take_leaf`]).
    /// `keep`: all layers that were there before are there still, from the bottom on, and the guest's
    /// clusters lie where they did; others may have come on top. A stream ends if the layers are
    /// more or fewer, or the size is another.
    ///
    /// # Errors
    /// If the image is not paused, the new stack cannot take its place (clusters of another size,
    /// a device that takes less at a time), or memory is short. The image is as before then.
    pub fn restack<L: BlockQueue>(
        &mut self,
        mut stack: Stack,
        leaves: &mut [L],
        keep: bool,
    ) -> Result<(), String> {
        if self.paused() != Some(Status::Ok) {
            return Err("the image is not paused, or not all of it is on disk".to_owned());
        }
        let max_transfer = look_at_leaves(&mut stack.layers, leaves)?;
        let old = &self.shared;
        // Some may have come since a leaf was shown to the image.
        for region in old.regions() {
            stack.register(leaves, &region)?;
        }
        if max_transfer < old.info.max_transfer {
            return Err("a device takes less at a time than those so far".to_owned());
        }
        let geometry = stack.top.geometry;
        if geometry.cluster_size() != old.geometry.cluster_size() {
            return Err("the clusters of the new layer have another size".to_owned());
        }
        if stack.writable == old.info.read_only {
            return Err("the image cannot change between reading and writing".to_owned());
        }
        let (device, data_device) = devices(&stack, leaves)?;
        let (units, bits) = (geometry.guest_units(), page_bits(&geometry));
        // The last cluster may end elsewhere, which changes what is in it.
        let same_size = geometry.size() == old.geometry.size();
        let same_unit = geometry.unit_size() == old.geometry.unit_size();
        // Bits may have been cleared, of which words of the map know nothing.
        let known = stack.top.bitmaps.is_empty();
        let same_map = keep && known && same_size && same_unit && old.map.page_bits() == bits;
        if !same_size || stack.layers.len() != old.stack.layers.len() {
            old.end_stream();
        }
        let map = match same_map {
            true => old.map.clone(),
            false => {
                let least = 2 * usize::from(self.requests) + 16;
                Arc::new(Map::new(units, bits, self.l2_cache, least)?)
            }
        };
        old.no_backing_comes();
        // From here on nothing fails. The tasks wait for jobs, and hold nothing else.
        self.tasks = Tasks::new(0, |_| std::future::ready(()));
        let Some(shared) = Rc::get_mut(&mut self.shared) else {
            unreachable!("the tasks alone share it, and they are gone");
        };
        // Frontends know how much they may send at a time, so that stays.
        let info = info(&stack, shared.info.max_transfer);
        self.hits = Hits::new(map.clone(), &stack.layers, &info, &geometry);
        if self.lost {
            self.hits.end();
        }
        // What is wrong with a file stays so.
        let same_top = shared.stack.top_layer().port == stack.top_layer().port;
        let distrusted = same_top && shared.alloc.borrow().is_distrusted();
        if !same_top {
            shared.mark.set(Mark::No);
        }
        // Everything is durable in a pause, so it is empty.
        let mut journal = shared.tables.get_mut().journal.take();
        if let Some(journal) = &mut journal {
            journal.bind(stack.top.shape);
            if !same_top {
                journal.own(0);
            }
        }
        shared.tables = RefCell::new(Tables::new(geometry, std::mem::take(&mut stack.top.l1)));
        shared.tables.get_mut().journal = journal;
        let mut alloc = Allocator::new(&mut stack.top, device.size, shared.space.clone());
        if distrusted {
            let _ = alloc.distrust();
        }
        shared.alloc = RefCell::new(alloc);
        if !same_map {
            shared.pages = RefCell::new(Pages::new(&map));
            shared.map = map;
        }
        let durable = shared.marks.borrow().is_durable();
        let bitmaps = std::mem::take(&mut stack.top.bitmaps);
        shared.marks = RefCell::new(Marks::new(bitmaps, geometry.cluster_bits(), durable));
        if !same_size {
            shared.watch = RefCell::default();
        }
        shared.batches = RefCell::default();
        shared.let_go = RefCell::default();
        shared.decompressed = RefCell::default();
        shared.stack = stack;
        shared.device = device;
        shared.data_device = data_device;
        shared.geometry = geometry;
        shared.info = info;
        shared.common.turn_version();
        let shared = self.shared.clone();
        let of = shared.clone();
        self.tasks = Tasks::new(shared.slots(), move |slot| serve(of.clone(), slot as u16));
        Ok(())
    }

    /// Puts an empty image in front of all layers: its stack alone, opened for writing. With
    /// [`Image::restack`] and `keep`, but nothing is read for it, so the pause is short.
    ///
    /// # Errors
    /// As [`Image::restack`].
    pub fn put_in_front<L: BlockQueue>(
        &mut self,
        mut overlay: Stack,
        leaves: &mut [L],
    ) -> Result<(), String> {
        let old = &self.shared;
        let mut layers = old.stack.layers.clone();
        if let Some(below) = layers.last_mut()
            && let LayerFormat::Qcow { l1, .. } = &mut below.format
        {
            *l1 = old.tables.borrow().all_l1().to_vec();
            below.end = old.end_of(old.top_at());
        }
        let l1_bytes = |l: &StackLayer| match &l.format {
            LayerFormat::Qcow { l1, .. } => l1.len() * 8,
            LayerFormat::Raw { .. } => 0,
        };
        let below: usize = layers.iter().map(l1_bytes).sum();
        layers.append(&mut overlay.layers);
        // What is served now must be opened later.
        can_be_chain(layers.len(), below + overlay.top.l1.len() * 8)?;
        overlay.layers = layers;
        self.restack(overlay, leaves, true)
    }

    /// Begins the close: with [`Image::pause`], but for good.
    #[cold]
    pub(super) fn begin_close(&mut self) {
        // Requests that come are refused, which takes a slot.
        self.free.append(&mut self.resting);
        self.shared.hold_stream();
        if self.stage != (Stage::WritingBack { last: false }) {
            self.stage = Stage::Draining;
            self.drained();
        }
    }

    /// Goes on if nothing is in flight any more, on any reactor.
    #[cold]
    pub(super) fn drained(&mut self) {
        if self.stage == Stage::Serving {
            return;
        }
        if !self.closing {
            // Without a free slot nobody sends anything.
            self.resting.append(&mut self.free);
        }
        let free = self.free.len() + self.resting.len();
        let pause = self.shared.common.pause();
        // Not `self.links`, which is away while errands are taken.
        let alone = match self.closing {
            true => self.shared.links.borrow().is_empty(),
            false => self.shared.links.borrow().iter().all(|l| l.rests(pause)),
        };
        let busy = free < usize::from(self.requests)
            || self.shared.flights.count() > 0
            || self.shared.streams();
        if self.stage != Stage::Draining || busy || !alone {
            return;
        }
        self.stage = Stage::WritingBack { last: self.closing };
        self.give(self.requests, What::WriteBack);
    }

    /// Everything is on disk, or cannot be written.
    pub(super) fn written_back(&mut self, status: Status) {
        self.shared.work(self.requests).retire();
        let last = self.stage == Stage::WritingBack { last: true };
        self.stage = Stage::Resting(status);
        if last {
            self.closed = Some(status);
        } else if self.closing {
            self.begin_close();
        } else if self.given_up {
            self.resume();
        }
    }

    /// Has a task of the image's own begin.
    pub(super) fn give(&self, slot: u16, what: What) {
        let job = Job { what, flags: Flags::NONE, offset: 0, len: 0, segs: SegList::EMPTY };
        self.shared.give_job(slot, job);
        self.shared.make_ready(slot);
    }
}
