//! [`Image`]: a chain of VHD files on a reactor, for reading.
//!
//! Blocks are found in tables in memory, sectors in bitmaps that are loaded as they are needed. A
//! request goes through the chain run by run, one after another; requests do not wait for each
//! other.

use std::collections::VecDeque;
use std::sync::Arc;

use block::{
    BlockQueue, Completion, Completions, DeviceInfo, Flags, Full, HasWork, Layer, MAX_GUEST_SEGS,
    Op, Port, Request, SegList, Status, Tag,
};
use dma::{PageSize, Region, Table};

use crate::chain::{Chain, Kind};
use crate::map::{Load, Map, MapLayer, Source, Step, Walk};

/// Requests in flight at most.
const SLOTS: u16 = 128;
/// Memory for bitmaps that are on their way.
const LOAD_BYTES: u64 = 4 << 20;
/// Complaints about one image at most: a guest can read the same damage again and again.
const COMPLAINTS: u32 = 100;

/// An opened chain as the datapath needs it. Can be sent to the reactor's thread.
#[derive(Clone)]
pub struct Stack {
    map: Map,
    ports: Vec<Port>,
    names: Vec<String>,
}

impl Stack {
    /// What is needed of a chain, whose layers lie at `ports`.
    pub fn new<S>(chain: &Chain<S>, ports: &[Port]) -> Stack {
        let layer = |kind: &Kind| match kind {
            Kind::Vhd(image) => MapLayer::Vhd(image.clone()),
            Kind::Raw(size) => MapLayer::Raw(*size),
        };
        Stack {
            map: Map::new(chain.layers.iter().map(|l| layer(&l.kind)).collect()),
            ports: ports.to_vec(),
            names: chain.layers.iter().map(|l| l.name.clone()).collect(),
        }
    }
}

/// What a slot waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wait {
    /// Nothing: it is free, or its answer is on its way.
    Nothing,
    /// Data, this many bytes.
    Data(u64),
    /// A bitmap.
    Bitmap(Load),
    /// Room in a leaf queue.
    Room,
}

/// A request.
struct Slot {
    up: Tag,
    offset: u64,
    len: u64,
    done: u64,
    segs: SegList,
    generation: u32,
    wait: Wait,
    /// The look-up of what comes next.
    walk: Option<Walk>,
}

/// An image on a reactor. Made on the reactor's thread, and never leaves it.
pub struct Image {
    map: Map,
    ports: Vec<Port>,
    names: Vec<String>,
    info: DeviceInfo,
    owner: u16,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Requests that ended and are not yet answered.
    ended: VecDeque<(u16, Status)>,
    /// Requests that wait for room in a leaf queue.
    blocked: VecDeque<u16>,
    table: Table,
    /// For bitmaps, a place for each slot.
    own: Arc<Region>,
    place: u32,
    scratch: Vec<u8>,
    complaints: u32,
    stale: u64,
    closing: bool,
    /// A device was lost that could not be stopped: see [`block::QUARANTINED`].
    lost: bool,
}

impl Image {
    /// Attaches a stack; `owner` as the reactor gave it. The image's own memory is registered with
    /// the leaves.
    ///
    /// # Errors
    /// If memory is short, a leaf cannot reach it, or a leaf is not there.
    pub fn attach<L: BlockQueue>(
        stack: Stack,
        owner: u16,
        leaves: &mut [L],
    ) -> Result<Image, String> {
        let Stack { map, ports, names } = stack;
        let mut max_transfer = 1 << 20;
        for (port, name) in ports.iter().zip(&names) {
            let info = leaves.get(usize::from(port.leaf)).and_then(|l| l.info(port.unit));
            let info = info.ok_or_else(|| format!("{name}: the leaf queue has no such unit"))?;
            if info.block_size != 512 {
                return Err(format!("{name}: the device has no blocks of 512 bytes"));
            }
            max_transfer = max_transfer.min(info.max_transfer & !511);
        }
        let bitmap = |l: &MapLayer| match l {
            MapLayer::Vhd(image) => image.bitmap_bytes(),
            MapLayer::Raw(_) => 0,
        };
        let place = map.layers.iter().map(bitmap).max().unwrap_or(0).max(512);
        if max_transfer < place as u32 {
            return Err(format!("a device takes less than {place} bytes at a time"));
        }
        let count = u64::from(SLOTS).min(LOAD_BYTES / place);
        let own = Region::new((count * place).next_multiple_of(4096) as usize, PageSize::Small)
            .map_err(|e| e.to_string())?;
        for leaf in leaves.iter_mut() {
            leaf.register(&own)?;
        }
        let info = DeviceInfo {
            size: map.size(),
            block_size: 512,
            physical_block_size: 4096,
            read_only: true,
            volatile_cache: false,
            write_zeroes: false,
            discard: false,
            discard_granularity: 512,
            max_transfer,
        };
        let slot = |_| Slot {
            up: Tag::new(0, 0, 0),
            offset: 0,
            len: 0,
            done: 0,
            segs: SegList::EMPTY,
            generation: 0,
            wait: Wait::Nothing,
            walk: None,
        };
        Ok(Image {
            map,
            ports,
            names,
            info,
            owner,
            slots: (0..count).map(slot).collect(),
            free: (0..count as u16).rev().collect(),
            ended: VecDeque::with_capacity(count as usize),
            blocked: VecDeque::with_capacity(count as usize),
            table: Table::new(),
            own,
            place: place as u32,
            scratch: vec![0; place as usize],
            complaints: 0,
            stale: 0,
            closing: false,
            lost: false,
        })
    }

    /// Completions so far that belong to nothing in flight.
    pub fn stale(&self) -> u64 {
        self.stale
    }

    /// How a request ends at once, if it does.
    fn verdict(&self, r: &Request<'_>) -> Option<Status> {
        if self.closing || self.lost {
            return Some(Status::Gone);
        }
        match r.op {
            Op::Flush => Some(Status::Ok),
            Op::Write | Op::WriteZeroes | Op::Discard => Some(Status::ReadOnly),
            Op::Read => {
                let good = self.info.contains(r.offset, r.len)
                    && r.segs_fit()
                    && r.segs.len() <= MAX_GUEST_SEGS
                    && r.len <= u64::from(self.info.max_transfer);
                (!good).then_some(Status::Invalid)
            }
        }
    }

    /// Goes on with a request until it has something in flight, waits for room, or has ended.
    fn go_on<L: BlockQueue>(&mut self, leaves: &mut [L], at: u16) -> Option<Status> {
        loop {
            let slot = &mut self.slots[usize::from(at)];
            slot.wait = Wait::Nothing;
            let (start, left) = (slot.offset + slot.done, slot.len - slot.done);
            if left == 0 && !self.lost {
                return Some(Status::Ok);
            }
            if self.closing || self.lost {
                return Some(Status::Gone);
            }
            let walk = slot.walk.get_or_insert_with(|| self.map.walk(start, left));
            let (layer, offset, len, segs, wait) = match self.map.step(walk) {
                Err(cut) => {
                    if self.complaints < COMPLAINTS {
                        self.complaints += 1;
                        log::error!("{}: {cut}", self.names[cut.layer]);
                    }
                    return Some(Status::Corrupt);
                }
                Ok(Step::Load(load)) => {
                    let mut segs = SegList::EMPTY;
                    let place = u64::from(at) * u64::from(self.place);
                    let seg = self.own.seg(place, load.len as u32);
                    if !seg.is_some_and(|s| segs.push(s)) {
                        return Some(Status::Corrupt);
                    }
                    (load.layer, load.offset, load.len, segs, Wait::Bitmap(load))
                }
                Ok(Step::Run(span)) => {
                    let mut segs = SegList::EMPTY;
                    if !segs.push_part(slot.segs.as_slice(), slot.done, span.len) {
                        return Some(Status::Invalid);
                    }
                    match span.source {
                        Source::Unallocated => {
                            for seg in segs.as_slice() {
                                let Some(region) = self.table.find(seg) else {
                                    return Some(Status::Invalid);
                                };
                                region.zero(seg.offset() as usize, seg.len() as usize);
                            }
                            slot.done += span.len;
                            slot.walk = None;
                            continue;
                        }
                        Source::Data(host) => {
                            (span.depth, host, span.len, segs, Wait::Data(span.len))
                        }
                    }
                }
            };
            let port = self.ports[layer];
            let below = Request {
                tag: Tag::new(self.owner, at, slot.generation),
                op: Op::Read,
                flags: Flags::NONE,
                unit: port.unit,
                offset,
                len,
                segs: segs.as_slice(),
            };
            match leaves[usize::from(port.leaf)].submit(&below) {
                Ok(()) => slot.wait = wait,
                Err(Full) => {
                    slot.wait = Wait::Room;
                    self.blocked.push_back(at);
                }
            }
            return None;
        }
    }

    /// Frees a slot; its tag is stale from now on.
    fn release(&mut self, at: u16, status: Status) -> Completion {
        let slot = &mut self.slots[usize::from(at)];
        slot.generation = slot.generation.wrapping_add(1);
        (slot.wait, slot.walk) = (Wait::Nothing, None);
        self.free.push(at);
        Completion { tag: slot.up, status, detail: 0 }
    }
}

impl<L: BlockQueue> Layer<L> for Image {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn register(&mut self, region: &Arc<Region>) {
        // A number is not free for another region while a request in work names it.
        let (slots, free) = (&self.slots, &self.free);
        let busy =
            slots.iter().enumerate().filter(|(at, _)| !free.iter().any(|&f| usize::from(f) == *at));
        let segs = busy.flat_map(|(_, slot)| slot.segs.as_slice());
        self.table.prune(|region| !segs.clone().any(|seg| seg.region() == region.id()));
        self.table.register(region);
    }

    fn room(&self, _leaves: &[L]) -> usize {
        self.free.len()
    }

    fn submit(&mut self, leaves: &mut [L], r: &Request<'_>) -> Result<(), Full> {
        let Some(at) = self.free.pop() else { return Err(Full) };
        let slot = &mut self.slots[usize::from(at)];
        slot.up = r.tag;
        (slot.offset, slot.len, slot.done) = (r.offset, r.len, 0);
        slot.segs = SegList::from_slice(r.segs).unwrap_or(SegList::EMPTY);
        let ended = match self.verdict(r) {
            Some(status) => Some(status),
            None => self.go_on(leaves, at),
        };
        if let Some(status) = ended {
            self.ended.push_back((at, status));
        }
        Ok(())
    }

    fn complete(&mut self, leaves: &mut [L], done: &mut Completion) -> bool {
        if done.is_quarantined() && !self.lost {
            log::error!("a device was lost and may still use memory: the image is out of service");
            self.lost = true;
        }
        let at = done.tag.slot();
        let known = self.slots.get_mut(usize::from(at));
        let Some(slot) = known.filter(|s| s.generation == done.tag.generation()) else {
            self.stale += 1;
            return false;
        };
        let wait = std::mem::replace(&mut slot.wait, Wait::Nothing);
        let ended = match wait {
            Wait::Nothing | Wait::Room => {
                slot.wait = wait;
                self.stale += 1;
                return false;
            }
            _ if !done.status.is_ok() => Some(done.status),
            Wait::Data(len) => {
                slot.done += len;
                slot.walk = None;
                self.go_on(leaves, at)
            }
            Wait::Bitmap(load) => {
                let bytes = &mut self.scratch[..load.len as usize];
                self.own.read(usize::from(at) * self.place as usize, bytes);
                self.map.loaded(&load, bytes);
                self.go_on(leaves, at)
            }
        };
        if let Some(status) = ended {
            *done = self.release(at, status);
        }
        ended.is_some()
    }

    fn poll(&mut self, leaves: &mut [L], out: &mut Completions) -> bool {
        let busy = !self.ended.is_empty() || !self.blocked.is_empty();
        for _ in 0..self.blocked.len() {
            if let Some(at) = self.blocked.pop_front()
                && let Some(status) = self.go_on(leaves, at)
            {
                self.ended.push_back((at, status));
            }
        }
        while out.room() > 0
            && let Some((at, status)) = self.ended.pop_front()
        {
            let done = self.release(at, status);
            out.push(done);
        }
        busy
    }

    fn arm(&mut self) -> HasWork {
        if self.ended.is_empty() && self.blocked.is_empty() { HasWork::No } else { HasWork::Yes }
    }

    fn close(&mut self) {
        self.closing = true;
    }

    fn closed(&self) -> Option<Status> {
        (self.closing && self.free.len() == self.slots.len()).then_some(Status::Ok)
    }
}

#[cfg(test)]
mod tests;
