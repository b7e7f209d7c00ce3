//! A guest of an image that polldisk serves: requests in flight at once, but never two that meet.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use block::{Flags, Op as Request, Status};
use dma::{Buf, Pool, Region};
use node::{Disk, DiskOptions, NodeSpec, OpenOptions, Parts, open_chain};
use qcow::open::Format;
use reactor::{Clock, Policy, Portal, PortalRequest, Start};

use crate::model::{Model, Noise, Op};
use crate::pick::Node;

/// Requests in flight.
const DEPTH: u16 = 8;
/// Longest read or write, where the image takes that much.
const PIECE: u32 = 1 << 20;

/// What one request needs until its answer.
struct Open {
    at: u64,
    len: u64,
    buf: Option<Buf>,
    read: bool,
}

struct Guest<'m> {
    portal: Portal,
    pool: Pool,
    region: Arc<Region>,
    open: HashMap<u64, Open>,
    next: u64,
    /// Longest read or write.
    piece: u64,
    model: &'m mut Model,
}

/// Serves the image at `path`, does all of `ops`, reads the whole disk, and closes the image. With
/// nothing to do it is opened for reading only.
pub(crate) fn run(
    path: &Path,
    node: Node,
    ops: &[Op],
    noise: &Noise,
    model: &mut Model,
) -> Result<()> {
    let text = match node {
        Node::File | Node::TwoReactors => format!("file:{}", path.display()),
        Node::Model => format!("model:{}?lba=4096", path.display()),
    };
    let open = if ops.is_empty() { OpenOptions::read } else { OpenOptions::write };
    let chain = open_chain(&NodeSpec::parse(&text)?, &open(Format::Qcow2))?;
    let start = Start { cpu: None, policy: Policy::Adaptive };
    let reactors = vec![start; if node == Node::TwoReactors { 2 } else { 1 }];
    let options = DiskOptions { reactors, image: qcow::run::Options::default() };
    let disk = Disk::start(Parts::new(chain)?, options, Clock::real())?;
    let done = work(&disk, ops, noise, model);
    let closed = disk.close();
    done?;
    Ok(closed?)
}

fn work(disk: &Disk, ops: &[Op], noise: &Noise, model: &mut Model) -> Result<()> {
    let size = disk.info().size;
    ensure!(size == model.size(), "the disk has {size} bytes, not {}", model.size());
    let door = disk.door();
    let piece = disk.info().max_transfer.min(PIECE);
    // The door's portals go to the reactors by turns: half of the work is done through each.
    let (first, second) = ops.split_at(ops.len() / 2);
    for ops in [first, second] {
        let mut guest = Guest::new(&door, piece, model)?;
        for op in ops {
            guest.act(op, noise).with_context(|| format!("{op:?}"))?;
        }
        guest.settle_all()?;
    }
    let mut guest = Guest::new(&door, piece, model)?;
    // Odd pieces, so that reads begin and end inside clusters.
    let odd = 333u64 << 9;
    for at in (0..size).step_by(odd as usize) {
        let len = odd.min(size - at);
        guest.act(&Op::Read { at, len }, noise).context("the whole disk")?;
    }
    guest.settle_all()
}

impl<'m> Guest<'m> {
    fn new(door: &node::Door, piece: u32, model: &'m mut Model) -> Result<Guest<'m>> {
        let pool = Pool::new(DEPTH.into(), piece)?;
        let region = pool.region().clone();
        let portal = door.open(DEPTH, vec![region.clone()])?;
        Ok(Guest {
            portal,
            pool,
            region,
            open: HashMap::new(),
            next: 0,
            piece: piece.into(),
            model,
        })
    }

    fn act(&mut self, op: &Op, noise: &Noise) -> Result<()> {
        let (at, len) = match *op {
            Op::Write { at, len, .. } | Op::Zero { at, len, .. } => (at, len),
            Op::Discard { at, len } | Op::Read { at, len } => (at, len),
            Op::Flush => return self.send(Request::Flush, Flags::NONE, 0, 0, None),
            Op::Compressed { .. } => bail!("not through a portal"),
        };
        // Which of two that meet comes last is nobody's to say.
        while self.open.values().any(|o| o.at < at + len && at < o.at + o.len) {
            self.answer()?;
        }
        let piece = self.piece;
        let pieces = (at..at + len).step_by(piece as usize);
        let pieces = pieces.map(|from| (from, piece.min(at + len - from)));
        match *op {
            Op::Zero { unmap, .. } => {
                let flags = if unmap { Flags::NONE } else { Flags::NO_UNMAP };
                self.send(Request::WriteZeroes, flags, at, len, None)?;
            }
            Op::Discard { .. } => self.send(Request::Discard, Flags::NONE, at, len, None)?,
            Op::Write { noise: which, .. } => {
                for (from, part) in pieces {
                    let bytes = noise.bytes(which, from - at, part);
                    self.send(Request::Write, Flags::NONE, from, part, Some(&bytes))?;
                }
            }
            _ => {
                for (from, part) in pieces {
                    self.send(Request::Read, Flags::NONE, from, part, None)?;
                }
            }
        }
        self.model.apply(op, noise);
        Ok(())
    }

    fn send(
        &mut self,
        op: Request,
        flags: Flags,
        offset: u64,
        len: u64,
        bytes: Option<&[u8]>,
    ) -> Result<()> {
        while self.portal.room() == 0 || self.pool.available() == 0 {
            self.answer()?;
        }
        let read = op == Request::Read;
        let buf = if read || bytes.is_some() { self.pool.take() } else { None };
        let seg = buf.as_ref().and_then(|b| b.head(len as u32));
        if let (Some(bytes), Some(seg)) = (bytes, &seg) {
            self.region.write_seg(seg, bytes);
        }
        let request = PortalRequest { id: self.next, op, flags, offset, len, seg };
        self.open.insert(self.next, Open { at: offset, len, buf, read });
        self.next += 1;
        self.portal.send(request).ok().context("no room in the portal")
    }

    /// Waits for an answer.
    fn answer(&mut self) -> Result<()> {
        let reply = self.portal.wait();
        let open = self.open.remove(&reply.id).context("an answer to no request")?;
        let (at, len) = (open.at, open.len);
        ensure!(reply.status == Status::Ok, "{} at {at}, {len} bytes", reply.status);
        let Some(buf) = open.buf else { return Ok(()) };
        if open.read {
            let mut seen = vec![0; len as usize];
            let seg = buf.head(len as u32).context("a segment")?;
            self.region.read_seg(&seg, &mut seen);
            self.model.settle(at, &seen)?;
        }
        self.pool.give(buf);
        Ok(())
    }

    fn settle_all(&mut self) -> Result<()> {
        while !self.open.is_empty() {
            self.answer()?;
        }
        Ok(())
    }
}
