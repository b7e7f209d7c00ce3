//! The receiving half of a connection: requests out of the socket, write data into DMA memory.
//!
//! A small staging buffer takes whatever is there in one system call, so that many small requests
//! cost one; what is known to be the data of a large write is received straight into its buffers.

use std::os::fd::AsFd;

use nix::errno::Errno;

use crate::buffers::Use;
use crate::conn::Conn;
use crate::pieces::{NONE, Phase};
use crate::proto::{Header, Kind, error};
use crate::sockio;

/// Size of the staging buffer in bytes.
const STAGE: usize = 32 << 10;
/// Requests and system calls in one turn of the loop.
const BUDGET: usize = 64;

/// What comes next from the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Next {
    /// A request.
    Header,
    /// Data of a write: `got` bytes of `piece` are there; it may be [`NONE`] yet.
    Payload { req: u16, piece: u16, got: u32 },
    /// Data that nobody wants, of a request that is answered with an error after it.
    Drain { req: u16, left: u64 },
    /// Nothing any more.
    Ended,
}

/// Where the receiving half is.
pub(crate) struct Input {
    next: Next,
    staged: Box<[u8; STAGE]>,
    from: usize,
    to: usize,
}

impl Input {
    /// At the first request.
    pub(crate) fn new() -> Input {
        Input { next: Next::Header, staged: Box::new([0; STAGE]), from: 0, to: 0 }
    }

    /// Whether nothing more will come.
    pub(crate) fn ended(&self) -> bool {
        self.next == Next::Ended
    }

    fn staged(&self) -> &[u8] {
        &self.staged[self.from..self.to]
    }

    /// Takes up to `len` staged bytes away; returns how many.
    fn skip(&mut self, len: u64) -> usize {
        let n = len.min((self.to - self.from) as u64) as usize;
        self.from += n;
        n
    }
}

/// What a look at the staged bytes came to.
#[derive(PartialEq, Eq)]
enum Step {
    /// A request was begun.
    Begun,
    /// Something else went on.
    On,
    /// More bytes are needed.
    Hungry,
    /// A request, piece or buffer is needed.
    Blocked,
    /// There will be no more.
    Ended,
}

impl Conn {
    /// Takes what the client sent, as far as there is a place for it.
    pub(crate) fn receive(&mut self) {
        self.blocked = false;
        let mut budget = BUDGET;
        while budget > 0 {
            match self.step_input() {
                Step::Begun => {
                    budget -= 1;
                    self.busy = true;
                }
                Step::On => self.busy = true,
                Step::Hungry if !self.readable => return,
                Step::Hungry => {
                    budget -= 1;
                    self.fill();
                }
                Step::Blocked => {
                    self.blocked = true;
                    return;
                }
                Step::Ended => return,
            }
        }
    }

    fn step_input(&mut self) -> Step {
        match self.input.next {
            Next::Header => self.step_header(),
            Next::Payload { req, piece: NONE, .. } => self.step_piece(req),
            Next::Payload { req, piece, got } => self.step_payload(req, piece, got),
            Next::Drain { req, left } => {
                let left = left - self.input.skip(left) as u64;
                if left > 0 {
                    self.input.next = Next::Drain { req, left };
                    return Step::Hungry;
                }
                self.input.next = Next::Header;
                self.reqs[req].cursor = self.reqs[req].end;
                self.settle(req);
                Step::On
            }
            Next::Ended => Step::Ended,
        }
    }

    fn step_header(&mut self) -> Step {
        let Some(&raw) = self.input.staged().first_chunk::<{ Header::LEN }>() else {
            if self.stopping {
                self.end_input();
                return Step::Ended;
            }
            return Step::Hungry;
        };
        let Some(req) = self.reqs.take() else { return Step::Blocked };
        let header = Header::parse(&raw);
        // A wrong one is reported, for which others may have to wait.
        if self.stay.lodging && header.as_ref().is_none_or(Header::may_take_long) {
            self.reqs.give(req);
            self.stay.leave = true;
            return Step::Blocked;
        }
        self.input.skip(Header::LEN as u64);
        let Some(header) = header else {
            self.reqs.give(req);
            self.cut_off("wrong request magic");
            return Step::Ended;
        };
        let q = &mut self.reqs[req];
        q.phase = Phase::Work;
        q.cookie = header.cookie;
        q.flags = header.flags;
        let mut verdict = header.check(&self.rules);
        if self.stopping && verdict != Ok(Kind::Disconnect) {
            verdict = Err(error::SHUTDOWN);
        }
        match verdict {
            Ok(Kind::Disconnect) => {
                self.reqs.give(req);
                self.say_goodbye();
                return Step::Ended;
            }
            Ok(kind) => {
                self.begin(req, kind, &header);
                if kind == Kind::Write && header.len > 0 {
                    self.input.next = Next::Payload { req, piece: NONE, got: 0 };
                }
            }
            Err(error) => {
                let left = if header.has_payload() { u64::from(header.len) } else { 0 };
                q.kind = if header.command == 0 { Kind::Read } else { Kind::Write };
                q.error = error;
                q.error_at = header.offset;
                (q.cursor, q.end) = (0, left);
                if left > 0 {
                    self.input.next = Next::Drain { req, left };
                } else {
                    self.settle(req);
                }
            }
        }
        Step::Begun
    }

    /// Finds a buffer for the next piece of a write.
    fn step_piece(&mut self, req: u16) -> Step {
        let q = &self.reqs[req];
        if q.error != 0 {
            // An earlier piece failed: the rest is not written.
            self.input.next = Next::Drain { req, left: q.end - q.cursor };
            return Step::On;
        }
        let Some(p) = self.pieces.take() else { return Step::Blocked };
        let Some(lent) = self.memory.take(q.class, Use::Write) else {
            self.pieces.give(p);
            return Step::Blocked;
        };
        self.fit(req, p, lent);
        self.input.next = Next::Payload { req, piece: p, got: 0 };
        Step::On
    }

    /// Takes staged bytes into a piece; ends the piece when it is full.
    fn step_payload(&mut self, req: u16, p: u16, got: u32) -> Step {
        let piece = &self.pieces[p];
        let lent = piece.buf.as_ref().expect("a piece that is filled has a buffer");
        let staged = self.input.staged();
        let n = staged.len().min((piece.bytes - got) as usize);
        let at = lent.seg().offset() as usize + (piece.skip + got) as usize;
        self.memory.region(lent.class()).write(at, &staged[..n]);
        self.input.skip(n as u64);
        let got = got + n as u32;
        if got < self.pieces[p].bytes {
            self.input.next = Next::Payload { req, piece: p, got };
            return Step::Hungry;
        }
        self.end_payload(req, p);
        Step::On
    }

    /// All of a piece's data is there.
    fn end_payload(&mut self, req: u16, p: u16) {
        let q = &mut self.reqs[req];
        q.cursor += u64::from(self.pieces[p].bytes);
        let more = q.cursor < q.end;
        self.input.next =
            if more { Next::Payload { req, piece: NONE, got: 0 } } else { Next::Header };
        if self.pieces[p].is_partial() {
            self.rmw_queue.push_back(p);
        } else {
            self.submit(p);
        }
    }

    /// Receives from the socket: the rest of a piece's data into its buffer, what comes after it
    /// (and everything else) into the staging buffer.
    fn fill(&mut self) {
        let input = &mut self.input;
        // What is staged is less than one request's header here.
        input.staged.copy_within(input.from..input.to, 0);
        input.to -= input.from;
        input.from = 0;
        let mut direct = 0;
        let mut target = None;
        if let Next::Payload { piece, got, .. } = input.next
            && piece != NONE
            && let Some(lent) = &self.pieces[piece].buf
        {
            let (skip, bytes) = (self.pieces[piece].skip, self.pieces[piece].bytes);
            direct = (bytes - got) as usize;
            let at = lent.seg().offset() as usize + (skip + got) as usize;
            target = Some((&**self.memory.region(lent.class()), at, direct));
        }
        let rest = &mut input.staged[input.to..];
        let asked = direct + rest.len();
        match sockio::receive(self.socket.as_fd(), target, rest) {
            Ok(0) => self.end_of_stream(),
            Ok(n) => {
                self.guest.cells.receives.add(1);
                self.busy = true;
                // Less than asked for means that no more is there.
                self.readable = n == asked;
                input.to += n.saturating_sub(direct);
                if let Next::Payload { req, piece, got } = input.next
                    && piece != NONE
                {
                    let got = got + n.min(direct) as u32;
                    input.next = Next::Payload { req, piece, got };
                }
            }
            Err(Errno::EAGAIN) => self.readable = false,
            Err(Errno::EINTR) => {}
            Err(_) => self.end_of_stream(),
        }
    }

    fn end_of_stream(&mut self) {
        self.busy = true;
        if self.input.next != Next::Header || !self.input.staged().is_empty() {
            log::debug!("NBD client {} left in the middle of a request", self.guest.number);
        }
        self.say_goodbye();
    }

    /// Takes nothing more from the client; a write whose data is not all there ends.
    pub(crate) fn end_input(&mut self) {
        let was = std::mem::replace(&mut self.input.next, Next::Ended);
        let req = match was {
            Next::Payload { req, piece, .. } => {
                if piece != NONE {
                    self.drop_piece(piece);
                }
                req
            }
            Next::Drain { req, .. } => req,
            Next::Header | Next::Ended => return,
        };
        self.note(req, error::IO, self.reqs[req].cursor);
        self.reqs[req].cursor = self.reqs[req].end;
        self.settle(req);
    }
}
