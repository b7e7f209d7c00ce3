//! What becomes of a request: pieces, their ends, and the reply.

use block::{Flags, Op, Status};
use reactor::PortalRequest;

use crate::buffers::{Class, Lent, Use};
use crate::conn::{Conn, Need};
use crate::output::{Data, Part};
use crate::pieces::{NONE, Phase};
use crate::proto::{self, Head, Header, Kind, error, flag};

/// Writes of zeroes in flight at a time for a request that the image cannot do itself.
const FILLS: u32 = 4;
/// Most descriptors in the answer to a block-status query, of all contexts together.
const DESCRIPTORS: usize = 2048;

impl Conn {
    /// Begins a request that was found right. The data of a write is then received by the caller.
    pub(crate) fn begin(&mut self, r: u16, kind: Kind, header: &Header) {
        let (offset, len) = (header.offset, u64::from(header.len));
        let block = self.rules.block;
        let mask = u64::from(block) - 1;
        let around = proto::span(offset, len, block);
        let fua = header.flags & flag::FUA != 0;
        let cells = &self.guest.cells;
        cells.begun.add(1);
        let q = &mut self.reqs[r];
        q.kind = kind;
        q.began = self.shared.clock.now();
        (q.cursor, q.end) = (offset, offset + len);
        q.class = match around <= u64::from(self.longest[Class::Small as usize]) {
            true => Class::Small,
            false => Class::Large,
        };
        let longest = u64::from(self.longest[q.class as usize]);
        match kind {
            Kind::Read => {
                cells.reads.add(1);
                cells.read_bytes.add(len);
                q.hold = around.div_ceil(longest) <= self.memory.read_limit(q.class) as u64;
                if len > 0 {
                    let need = if q.class == Class::Small { Need::Small } else { Need::Large };
                    return self.queue(r, need);
                }
            }
            Kind::Write => {
                cells.writes.add(1);
                cells.written_bytes.add(len);
                // One flush at the end costs less than several pieces that go through the cache.
                q.flush = fua && around > longest;
            }
            Kind::Flush => {
                cells.flushes.add(1);
                if !self.rules.read_only {
                    // Its one piece is made in the phase that follows the work.
                    q.flush = true;
                }
                (q.cursor, q.end) = (0, 0);
            }
            Kind::Trim => {
                cells.trims.add(1);
                q.flush = fua;
                // Blocks that are only partly meant stay as they are.
                let (from, to) = ((offset + mask) & !mask, (offset + len) & !mask);
                (q.cursor, q.end) = (from, to.max(from));
                if to > from {
                    return self.queue(r, Need::Plain);
                }
            }
            Kind::WriteZeroes => {
                cells.zeroes.add(1);
                q.flush = fua;
                if len > 0 {
                    return self.queue(r, Need::Plain);
                }
            }
            Kind::BlockStatus => {
                cells.statuses.add(1);
                return self.block_status(r, header);
            }
            Kind::Disconnect => {}
        }
        if kind != Kind::Write || len == 0 {
            self.settle(r);
        }
    }

    fn block_status(&mut self, r: u16, header: &Header) {
        self.reqs[r].cursor = self.reqs[r].end;
        match self.statuses(header) {
            Ok((head, bytes)) => {
                self.reqs[r].phase = Phase::Answered;
                self.push(Part { head, data: Data::Owned(bytes), req: r });
            }
            Err(status) => {
                self.note(r, proto::error_of(status, false), header.offset);
                self.settle(r);
            }
        }
    }

    /// A chunk for each context: the head of the first one, and all that follows it.
    fn statuses(&self, header: &Header) -> Result<(Head, Vec<u8>), Status> {
        let count = self.contexts.len();
        let one = header.flags & flag::REQ_ONE != 0;
        let limit = if one { 1 } else { DESCRIPTORS / count.max(1) };
        let (mut first, mut bytes) = (Head::EMPTY, Vec::new());
        for (n, context) in self.contexts.iter().enumerate() {
            let export = &self.shared.export;
            let list = context.descriptors(export, header.offset, header.len, limit)?;
            let (done, number) = (n + 1 == count, n as u32 + 1);
            let head = Head::status(header.cookie, done, number, list.len() as u32);
            match n {
                0 => first = head,
                _ => bytes.extend(head.bytes()),
            }
            let words = list.iter().map(|&(len, flags)| u64::from(len) << 32 | u64::from(flags));
            bytes.extend(words.flat_map(u64::to_be_bytes));
        }
        Ok((first, bytes))
    }

    fn queue(&mut self, r: u16, need: Need) {
        self.reqs[r].queued = true;
        self.waiting[need as usize].push_back(r);
    }

    /// Makes pieces for requests that wait, as buffers are there. In order for each kind of
    /// buffer, so that the first gets all that it needs to end; those without need none.
    pub(crate) fn issue(&mut self) {
        for need in [Need::Small, Need::Large] {
            while let Some(&r) = self.waiting[need as usize].front() {
                if !self.make_reads(r) {
                    break;
                }
                self.waiting[need as usize].pop_front();
                self.leave_queue(r);
            }
        }
        for _ in 0..self.waiting[Need::Plain as usize].len() {
            let Some(r) = self.waiting[Need::Plain as usize].pop_front() else { break };
            if self.make_plain(r) {
                self.leave_queue(r);
            } else {
                self.waiting[Need::Plain as usize].push_back(r);
            }
        }
    }

    fn leave_queue(&mut self, r: u16) {
        self.reqs[r].queued = false;
        self.settle(r);
    }

    /// Makes a buffer the next piece of a request's data, from the cursor on.
    pub(crate) fn fit(&mut self, r: u16, p: u16, lent: Lent) {
        let q = &mut self.reqs[r];
        let block = self.rules.block;
        let from = q.cursor & !u64::from(block - 1);
        let to = q.end.min(from + u64::from(self.longest[q.class as usize]));
        let len = proto::span(q.cursor, to - q.cursor, block);
        let piece = &mut self.pieces[p];
        piece.req = r;
        piece.offset = from;
        piece.len = len;
        // A piece is no longer than its buffer.
        piece.skip = (q.cursor - from) as u32;
        piece.bytes = (to - q.cursor) as u32;
        piece.seg = lent.seg().slice(0, len as u32);
        piece.buf = Some(lent);
        piece.op = if q.kind == Kind::Read { Op::Read } else { Op::Write };
        if q.kind == Kind::Write && q.flags & flag::FUA != 0 && !q.flush {
            piece.flags = Flags::FUA;
        }
        q.pieces += 1;
    }

    /// Makes the pieces of a read; false if it needs more than can be had now.
    fn make_reads(&mut self, r: u16) -> bool {
        loop {
            let q = &mut self.reqs[r];
            if self.mute {
                q.cursor = q.end;
            }
            if q.all_made() {
                return true;
            }
            let class = q.class;
            let Some(p) = self.pieces.take() else { return false };
            let Some(lent) = self.memory.take(class, Use::Read) else {
                self.pieces.give(p);
                return false;
            };
            self.fit(r, p, lent);
            let q = &mut self.reqs[r];
            q.cursor += u64::from(self.pieces[p].bytes);
            if !self.rules.structured {
                match q.last {
                    NONE => q.first = p,
                    last => self.pieces[last].next = p,
                }
                q.last = p;
            }
            self.busy = true;
            self.submit(p);
        }
    }

    /// Makes the pieces of a request without data, as [`Conn::make_reads`].
    fn make_plain(&mut self, r: u16) -> bool {
        let block = u64::from(self.rules.block);
        let mask = block - 1;
        loop {
            let q = &self.reqs[r];
            let flushing = q.phase == Phase::Flush;
            if !flushing && q.all_made() {
                return true;
            }
            let filling = q.fill < q.fill_end;
            let zeroing = filling || q.kind == Kind::WriteZeroes;
            let by_hand = filling || (zeroing && !self.shared.export.info.write_zeroes);
            if by_hand && q.pieces >= FILLS {
                return false;
            }
            let Some(p) = self.pieces.take() else { return false };
            self.busy = true;
            let q = &mut self.reqs[r];
            q.pieces += 1;
            let piece = &mut self.pieces[p];
            piece.req = r;
            if flushing {
                self.submit(p);
                return true;
            }
            let (cursor, end) =
                if filling { (&mut q.fill, q.fill_end) } else { (&mut q.cursor, q.end) };
            let from = *cursor;
            piece.offset = from & !mask;
            let whole = end & !mask;
            if from & mask != 0 || whole <= from {
                // Part of a block, possible for a write-zeroes only.
                *cursor = end.min(piece.offset + block);
                piece.len = block;
                piece.skip = (from - piece.offset) as u32;
                piece.bytes = (*cursor - from) as u32;
                piece.op = Op::Write;
                self.rmw_queue.push_back(p);
                continue;
            }
            let longest = u64::from(self.longest[Class::Large as usize]);
            *cursor = if by_hand { whole.min(from + longest) } else { whole };
            piece.len = *cursor - from;
            piece.op = match (zeroing, by_hand) {
                (false, _) => Op::Discard,
                (true, false) => Op::WriteZeroes,
                (true, true) => Op::Write,
            };
            if by_hand {
                piece.seg = self.memory.zeroes().slice(0, piece.len as u32);
            } else if zeroing {
                if q.flags & flag::NO_HOLE != 0 {
                    piece.flags = piece.flags.with(Flags::NO_UNMAP);
                }
                if q.flags & flag::FAST_ZERO != 0 {
                    piece.flags = piece.flags.with(Flags::FAST_ONLY);
                }
            }
            self.submit(p);
        }
    }

    /// Sends a piece to the image, now or when there is room and its range is free.
    pub(crate) fn submit(&mut self, p: u16) {
        let piece = &mut self.pieces[p];
        let writes = matches!(piece.op, Op::Write | Op::WriteZeroes | Op::Discard);
        if self.portal.room() == 0 {
            return self.parked.push_back(p);
        }
        if writes && !piece.claimed {
            let range = (piece.offset, piece.len);
            piece.claimed =
                self.shared.claims.claim(self.seat, p, range, false, &self.guest.signal);
            if !piece.claimed {
                return self.parked.push_back(p);
            }
        }
        let request = PortalRequest {
            id: u64::from(p),
            op: piece.op,
            flags: piece.flags,
            offset: piece.offset,
            len: piece.len,
            seg: piece.seg,
        };
        let sent = self.portal.send(request);
        debug_assert!(sent.is_ok(), "room was looked at");
    }

    /// A piece has ended at the image.
    pub(crate) fn end_piece(&mut self, p: u16, status: Status) {
        let piece = &mut self.pieces[p];
        if std::mem::take(&mut piece.claimed) {
            self.shared.claims.release(self.seat, p);
        }
        if self.rmw.as_ref().is_some_and(|rmw| rmw.piece == p) {
            self.rmw = None;
        }
        let (r, op, offset, len) = (piece.req, piece.op, piece.offset, piece.len);
        let q = &self.reqs[r];
        let fast = q.flags & flag::FAST_ZERO != 0 && q.kind == Kind::WriteZeroes;
        match (op, status) {
            (Op::Read, _) => return self.end_read(p, status),
            // A trim is a hint.
            (_, Status::Ok) | (Op::Discard, Status::Unsupported) => {}
            (Op::WriteZeroes, Status::Unsupported) if !fast => {
                let q = &mut self.reqs[r];
                (q.fill, q.fill_end) = (offset, offset + len);
                if !q.queued {
                    self.queue(r, Need::Plain);
                }
            }
            _ => self.note(r, proto::error_of(status, fast), offset),
        }
        self.drop_piece(p);
        self.settle(r);
    }

    /// A piece of a read has ended.
    fn end_read(&mut self, p: u16, status: Status) {
        let piece = &mut self.pieces[p];
        piece.done = true;
        let (r, at) = (piece.req, piece.offset + u64::from(piece.skip));
        let bytes = piece.bytes;
        if !status.is_ok() {
            self.note(r, proto::error_of(status, false), at);
        }
        self.reqs[r].pieces -= 1;
        if !self.rules.structured {
            return self.settle(r);
        }
        let q = &mut self.reqs[r];
        if q.error != 0 || self.mute {
            self.free_piece(p);
            return self.settle(r);
        }
        let last = q.all_ended();
        if last {
            q.phase = Phase::Answered;
        }
        let head = Head::data(q.cookie, last, at, bytes);
        self.push_data(r, p, head);
    }

    /// Goes on with a read that gets a simple reply: its data must go in order, after a head that
    /// says that all of it is good.
    fn step_simple(&mut self, r: u16) {
        let q = &self.reqs[r];
        let ended = q.all_ended();
        if q.error != 0 || self.mute {
            let started = q.started;
            if started && !self.mute {
                self.cut_off("a read failed when half of its reply was sent");
            }
            if !ended {
                return;
            }
            let mut at = std::mem::replace(&mut self.reqs[r].first, NONE);
            while at != NONE {
                at = self.free_piece(at);
            }
            if started {
                self.reqs[r].phase = Phase::Answered;
                return self.forget(r);
            }
            return self.answer(r);
        }
        if !ended && q.hold && !q.started {
            return;
        }
        loop {
            let q = &mut self.reqs[r];
            let p = q.first;
            if p == NONE || !self.pieces[p].done {
                break;
            }
            let head = match q.started {
                true => Head::EMPTY,
                false => Head::simple(q.cookie, 0),
            };
            q.started = true;
            q.first = self.pieces[p].next;
            if q.first == NONE {
                q.last = NONE;
                if ended {
                    q.phase = Phase::Answered;
                }
            }
            self.push_data(r, p, head);
        }
    }

    fn push_data(&mut self, r: u16, p: u16, head: Head) {
        let piece = &self.pieces[p];
        let Some(lent) = &piece.buf else { return };
        let data = Data::Piece {
            piece: p,
            class: lent.class(),
            offset: lent.seg().offset() as usize + piece.skip as usize,
            len: piece.bytes as usize,
        };
        self.push(Part { head, data, req: r });
    }

    /// Remembers the first error of a request, which then needs no more pieces.
    pub(crate) fn note(&mut self, r: u16, error: u32, at: u64) {
        let q = &mut self.reqs[r];
        if q.error == 0 {
            q.error = error;
            q.error_at = at;
        }
        if q.kind != Kind::Write {
            q.cursor = q.end;
        }
        q.fill = q.fill_end;
    }

    /// Goes on with a request if there is nothing left to wait for.
    pub(crate) fn settle(&mut self, r: u16) {
        let q = &mut self.reqs[r];
        if matches!(q.phase, Phase::Answered | Phase::Free) {
            return;
        }
        if q.kind == Kind::Read && !self.rules.structured && (q.first != NONE || q.started) {
            return self.step_simple(r);
        }
        if !q.all_ended() {
            return;
        }
        if q.flush && q.error == 0 {
            q.flush = false;
            q.phase = Phase::Flush;
            return self.queue(r, Need::Plain);
        }
        self.answer(r);
    }

    /// Ends a request with a reply without data.
    fn answer(&mut self, r: u16) {
        let q = &mut self.reqs[r];
        q.phase = Phase::Answered;
        let structured = self.rules.structured;
        let head = match q.error {
            0 if structured && q.kind == Kind::Read => Head::none(q.cookie),
            e if e != 0 && structured => {
                // Where a read failed tells which of the data already sent is good.
                let at = (q.kind == Kind::Read && e == error::IO).then_some(q.error_at);
                Head::error(q.cookie, e, at, proto::error_text(e))
            }
            e => Head::simple(q.cookie, e),
        };
        self.guest.cells.errors.add(u64::from(q.error != 0));
        self.push(Part { head, data: Data::None, req: r });
    }

    fn push(&mut self, part: Part) {
        self.busy = true;
        self.reqs[part.req].unsent += 1;
        if self.mute {
            self.end_part(part);
        } else {
            self.output.push(part);
        }
    }

    /// A part of a reply was sent, or nobody wants it.
    pub(crate) fn end_part(&mut self, part: Part) {
        if let Data::Piece { piece, .. } = part.data {
            self.free_piece(piece);
        }
        self.reqs[part.req].unsent -= 1;
        self.forget(part.req);
    }

    /// Frees a request's place if its reply is complete and gone.
    fn forget(&mut self, r: u16) {
        let q = &self.reqs[r];
        if q.phase == Phase::Answered && q.unsent == 0 {
            debug_assert!(q.pieces == 0 && !q.queued);
            // One that was wrong never began.
            if q.began > 0 {
                let took = self.shared.clock.now().saturating_sub(q.began);
                match q.kind {
                    Kind::Read => self.guest.latency.read.record(took),
                    Kind::Write => self.guest.latency.write.record(took),
                    _ => {}
                }
                self.guest.cells.ended.add(1);
            }
            self.reqs.give(r);
        }
    }

    /// Frees a piece that still counts as in work.
    pub(crate) fn drop_piece(&mut self, p: u16) {
        let r = self.pieces[p].req;
        self.reqs[r].pieces -= 1;
        self.free_piece(p);
    }

    /// Frees a piece and its buffer; returns the piece that follows it.
    fn free_piece(&mut self, p: u16) -> u16 {
        let piece = self.pieces.give(p);
        if let Some(lent) = piece.buf {
            self.memory.give(lent);
        }
        piece.next
    }
}
