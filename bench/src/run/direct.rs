//! [`Direct`]: a block node's own queue, as a [`Target`]: no server, no image, no ring.

use std::sync::Arc;

use block::{BlockQueue, Completions, Flags, LeafAccess, Op, Status, Submit, Tag};
use dma::Region;
use node::{Leaf, NodeSpec, OpenOptions, Parts};
use qcow::open::Format;
use reactor::Clock;

use super::ring::filler;
use super::{Done, Kind, Limits, Request, Target};
use crate::Error;

/// Longest request in bytes.
const MAX_LEN: u32 = 2 << 20;
/// Most requests under way.
const MAX_DEPTH: u32 = 1024;
/// How long nothing may be answered, in nanoseconds: longer than the driver gives a device.
const PATIENCE: u64 = 120_000_000_000;

/// A node's bytes, through the queue that a reactor would have. The calling thread is driver, and steps
/// models of devices.
pub struct Direct {
    leaf: Leaf,
    unit: u16,
    rest: node::Rest,
    devices: Vec<node::ModelController>,
    clock: Clock,
    limits: Limits,
    data: Option<Arc<Region>>,
    /// Bytes of the region for each slot.
    stride: usize,
    slots: Vec<Slot>,
    out: Completions,
    into: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Slot {
    kind: Kind,
    len: u32,
    /// How often it was used.
    generation: u32,
    busy: bool,
}

impl Direct {
    /// Opens a node as bytes.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(spec: &NodeSpec, writable: bool) -> Result<Direct, Error> {
        let clock = Clock::real();
        let read = OpenOptions { clock: clock.clone(), ..OpenOptions::read(Format::Raw) };
        let parts = Parts::new(node::open_chain(spec, &OpenOptions { writable, ..read })?)?;
        let (leaf, unit, mut rest) = parts.into_leaf();
        let devices = rest.models().filter_map(node::Model::take_device).collect();
        let info = leaf.info(unit).ok_or_else(|| Error::other("the node has no such unit"))?;
        let limits = Limits {
            name: format!("node {spec}"),
            // A file may grow; what is asked for is what it has.
            size: info.size.min(leaf.unit_len(unit)),
            block: info.block_size,
            max_len: info.max_transfer.min(MAX_LEN),
            max_depth: MAX_DEPTH,
            writable: writable && !info.read_only,
            flush: true,
            trim: writable && info.discard,
            patience: PATIENCE,
        };
        Ok(Direct {
            leaf,
            unit,
            rest,
            devices,
            clock,
            limits,
            data: None,
            stride: 0,
            slots: Vec::new(),
            out: Completions::new(),
            into: Vec::new(),
        })
    }

    /// Ends it. Nothing may be under way.
    ///
    /// # Errors
    /// If a device does not shut down.
    pub fn close(self) -> Result<(), Error> {
        let Direct { leaf, mut rest, devices, .. } = self;
        for (model, device) in rest.models().zip(devices) {
            model.give_device(device)?;
        }
        drop(leaf);
        Ok(rest.finish_leaf()?)
    }
}

/// The error number that Linux would say.
fn errno(status: Status) -> Option<i32> {
    Some(match status {
        Status::Ok => return None,
        Status::Invalid => libc::EINVAL,
        Status::ReadOnly => libc::EROFS,
        Status::NoSpace => libc::ENOSPC,
        Status::Unsupported => libc::EOPNOTSUPP,
        Status::Timeout => libc::ETIMEDOUT,
        Status::Gone => libc::ENODEV,
        Status::Medium | Status::Corrupt => libc::EIO,
    })
}

impl Target for Direct {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn prepare(&mut self, depth: u32, max_len: u32, keep: bool) -> Result<(), Error> {
        self.stride = max_len.next_multiple_of(4096) as usize;
        let data = Region::new_best(depth as usize * self.stride).map_err(Error::other)?;
        self.leaf.register(&data).map_err(Error::other)?;
        let filler = filler(max_len);
        (0..depth as usize).for_each(|slot| data.write(slot * self.stride, &filler));
        self.data = Some(data);
        let free = Slot { kind: Kind::Flush, len: 0, generation: 0, busy: false };
        self.slots = vec![free; depth as usize];
        self.into = vec![0; if keep { max_len as usize } else { 0 }];
        Ok(())
    }

    #[inline]
    fn send(&mut self, request: &Request, data: Option<&[u8]>) -> Result<bool, Error> {
        let Request { slot: number, kind, offset, len } = *request;
        let Some(region) = &self.data else { return Ok(false) };
        if self.leaf.room() == 0 {
            return Ok(false);
        }
        let at = number as usize * self.stride;
        if let Some(data) = data {
            region.write(at, data);
        }
        let (op, seg) = match kind {
            Kind::Read => (Op::Read, region.seg(at as u64, len)),
            Kind::Write => (Op::Write, region.seg(at as u64, len)),
            Kind::Trim => (Op::Discard, None),
            Kind::Flush => (Op::Flush, None),
        };
        let slot = &mut self.slots[number as usize];
        let generation = slot.generation.wrapping_add(1);
        *slot = Slot { kind, len, generation, busy: true };
        let request = block::Request {
            tag: Tag::new(0, number as u16, generation),
            op,
            flags: Flags::NONE,
            unit: self.unit,
            offset,
            len: len.into(),
            segs: seg.as_slice(),
        };
        // It has room, so it takes it.
        slot.busy = self.leaf.submit(&request).is_ok();
        Ok(slot.busy)
    }

    #[inline]
    fn poll(&mut self, _: u64, done: &mut impl FnMut(Done<'_>)) -> Result<(), Error> {
        let now = self.clock.now();
        self.leaf.set_now(now);
        if !self.devices.is_empty() {
            self.leaf.start();
            for device in &mut self.devices {
                device.step(now);
            }
        }
        self.out.clear();
        self.leaf.poll(&mut self.out);
        for c in self.out.iter() {
            let number = c.tag.slot();
            let Some(slot) = self.slots.get_mut(usize::from(number)) else { continue };
            if !std::mem::take(&mut slot.busy) || slot.generation != c.tag.generation() {
                return Err(Error::other(format!("{}: a stray answer", self.limits.name)));
            }
            let len = match slot.kind {
                Kind::Read => (slot.len as usize).min(self.into.len()),
                _ => 0,
            };
            if let (Some(region), true) = (&self.data, len > 0) {
                region.read(usize::from(number) * self.stride, &mut self.into[..len]);
            }
            done(Done { slot: number.into(), error: errno(c.status), data: &self.into[..len] });
        }
        Ok(())
    }
}
