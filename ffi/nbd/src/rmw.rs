//! Writes of parts of blocks, for clients that do not keep to the image's blocks: read the blocks
//! at the edges, put the client's bytes between, write. One at a time per connection, and under a
//! claim that keeps the writes of all other connections away from the blocks.

use block::{Flags, Op, Status};
use dma::Seg;
use reactor::PortalRequest;

use crate::buffers::Class;
use crate::conn::Conn;
use crate::pieces::PIECES;

/// Reads of edges at a time.
pub(crate) const EDGES: u16 = 2;

/// The one that is in work.
#[derive(Debug)]
pub(crate) struct Rmw {
    pub(crate) piece: u16,
    /// Edges still to be read.
    reads: u32,
    status: Status,
}

impl Conn {
    /// Begins the next one if there is one and it can begin.
    pub(crate) fn step_rmw(&mut self) {
        if self.rmw.is_some() || self.rmw_refused || self.portal.room() < usize::from(EDGES) {
            return;
        }
        let Some(&p) = self.rmw_queue.front() else { return };
        let piece = &self.pieces[p];
        let range = (piece.offset, piece.len);
        if !self.shared.claims.claim(self.seat, p, range, true, &self.guest.signal) {
            self.rmw_refused = true;
            return;
        }
        self.rmw_queue.pop_front();
        self.busy = true;
        let block = self.rules.block;
        let head = piece.skip > 0;
        let tail = u64::from(piece.skip + piece.bytes) < piece.len;
        let (offset, len) = range;
        self.pieces[p].claimed = true;
        let mut reads = 0;
        if head || len == u64::from(block) {
            self.read_edge(0, offset);
            reads += 1;
        }
        if tail && len > u64::from(block) {
            self.read_edge(1, offset + len - u64::from(block));
            reads += 1;
        }
        self.rmw = Some(Rmw { piece: p, reads, status: Status::Ok });
    }

    /// The place for an edge's block in the scratch buffer.
    fn edge(&self, which: u32) -> Seg {
        let block = self.rules.block;
        let place = self.memory.scratch().slice(which * block, block);
        place.expect("the scratch buffer holds two blocks")
    }

    fn read_edge(&mut self, which: u32, offset: u64) {
        let seg = self.edge(which);
        let request = PortalRequest {
            id: PIECES as u64 + u64::from(which),
            op: Op::Read,
            flags: Flags::NONE,
            offset,
            len: u64::from(seg.len()),
            seg: Some(seg),
        };
        let sent = self.portal.send(request);
        debug_assert!(sent.is_ok(), "room was looked at");
    }

    /// An edge was read, or could not be.
    pub(crate) fn end_edge(&mut self, status: Status) {
        let Some(rmw) = &mut self.rmw else { return };
        rmw.reads -= 1;
        if rmw.status.is_ok() {
            rmw.status = status;
        }
        if rmw.reads > 0 {
            return;
        }
        let (p, status) = (rmw.piece, rmw.status);
        if !status.is_ok() {
            return self.end_piece(p, status);
        }
        self.merge(p);
        self.submit(p);
    }

    /// Puts the edges' old bytes around the client's new ones, or zeroes into the edge's block.
    fn merge(&mut self, p: u16) {
        let scratch = self.edge(0);
        let block = self.rules.block as usize;
        let piece = &mut self.pieces[p];
        let (skip, len) = (piece.skip as usize, piece.len as usize);
        let tail = skip + piece.bytes as usize;
        let small = self.memory.region(Class::Small);
        let at = scratch.offset() as usize;
        let Some(lent) = &piece.buf else {
            small.zero(at + skip, piece.bytes as usize);
            piece.seg = Some(scratch);
            return;
        };
        let data = self.memory.region(lent.class());
        let to = lent.seg().offset() as usize;
        if skip > 0 {
            dma::copy(small, at, data, to, skip);
        }
        if tail < len {
            let block_at = if len == block { at } else { at + block };
            dma::copy(small, block_at + tail % block, data, to + tail, len - tail);
        }
    }
}
