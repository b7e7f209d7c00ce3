//! Requests of a connection and the pieces that they are split into: plain tables of fixed size.
//! Owned by the connection's thread.

use std::ops::{Index, IndexMut};

use block::{Flags, Op};
use dma::Seg;

use crate::buffers::{Class, Lent};
use crate::proto::Kind;

/// Requests of a client that are worked on at a time; more wait in the socket.
pub(crate) const REQUESTS: usize = 128;
/// Pieces of requests at a time: more than all buffers that reads may hold, so that the other
/// kinds always find some.
pub(crate) const PIECES: usize = 256;
/// No request or piece.
pub(crate) const NONE: u16 = u16::MAX;

/// How far a request is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Phase {
    /// Nobody uses this place.
    #[default]
    Free,
    /// Pieces are made, in work, or waited for.
    Work,
    /// All is done but the flush that makes it durable.
    Flush,
    /// The end of the reply is in the output or sent.
    Answered,
}

/// A request of the client.
#[derive(Debug)]
pub(crate) struct Req {
    pub(crate) kind: Kind,
    /// Command flags.
    pub(crate) flags: u16,
    pub(crate) cookie: u64,
    /// When it was found right, on the server's clock in nanoseconds.
    pub(crate) began: u64,
    pub(crate) phase: Phase,
    /// Which buffers its data goes through.
    pub(crate) class: Class,
    /// Bytes of the image: `[cursor, end)` is not yet in a piece.
    pub(crate) cursor: u64,
    pub(crate) end: u64,
    /// As above, the part that is to be overwritten with zeroes because the image cannot do it.
    pub(crate) fill: u64,
    pub(crate) fill_end: u64,
    /// Pieces made and not yet ended.
    pub(crate) pieces: u32,
    /// Parts of the reply in the output.
    pub(crate) unsent: u32,
    /// A flush is to follow the work.
    pub(crate) flush: bool,
    /// It stands in a queue of requests that need more pieces.
    pub(crate) queued: bool,
    /// The protocol's error value, and where in the image it came up.
    pub(crate) error: u32,
    pub(crate) error_at: u64,
    /// Reads with simple replies: pieces in order, and whether the reply has begun.
    pub(crate) first: u16,
    pub(crate) last: u16,
    pub(crate) started: bool,
    /// Reads with simple replies: there are buffers to hold all of the data, so that the reply
    /// begins when it is known to succeed.
    pub(crate) hold: bool,
}

impl Default for Req {
    fn default() -> Req {
        Req {
            kind: Kind::Read,
            flags: 0,
            cookie: 0,
            began: 0,
            phase: Phase::Free,
            class: Class::Small,
            cursor: 0,
            end: 0,
            fill: 0,
            fill_end: 0,
            pieces: 0,
            unsent: 0,
            flush: false,
            queued: false,
            error: 0,
            error_at: 0,
            first: NONE,
            last: NONE,
            started: false,
            hold: false,
        }
    }
}

impl Req {
    /// Whether every piece is made and ended.
    pub(crate) fn all_ended(&self) -> bool {
        self.all_made() && self.pieces == 0 && !self.queued
    }

    /// Whether every piece is made.
    pub(crate) fn all_made(&self) -> bool {
        self.cursor >= self.end && self.fill >= self.fill_end
    }
}

/// One request to the image: a part of a client's request.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) req: u16,
    /// The next piece of a read with a simple reply.
    pub(crate) next: u16,
    pub(crate) op: Op,
    pub(crate) flags: Flags,
    /// Whole blocks of the image.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// The client's bytes are `[skip, skip + bytes)` of these.
    pub(crate) skip: u32,
    pub(crate) bytes: u32,
    /// The buffer, if it has one of its own.
    pub(crate) buf: Option<Lent>,
    pub(crate) seg: Option<Seg>,
    /// Its range is claimed.
    pub(crate) claimed: bool,
    /// It has ended (and is kept for its data).
    pub(crate) done: bool,
}

impl Default for Piece {
    fn default() -> Piece {
        Piece {
            req: NONE,
            next: NONE,
            op: Op::Flush,
            flags: Flags::NONE,
            offset: 0,
            len: 0,
            skip: 0,
            bytes: 0,
            buf: None,
            seg: None,
            claimed: false,
            done: false,
        }
    }
}

impl Piece {
    /// Whether the client's bytes are less than the blocks that they lie in.
    pub(crate) fn is_partial(&self) -> bool {
        u64::from(self.bytes) < self.len
    }
}

/// A table with a list of its free places.
#[derive(Debug)]
pub(crate) struct Slots<T> {
    items: Box<[T]>,
    free: Vec<u16>,
}

impl<T: Default> Slots<T> {
    /// `count` free places, fewer than [`NONE`].
    pub(crate) fn new(count: usize) -> Slots<T> {
        let items = (0..count).map(|_| T::default()).collect();
        Slots { items, free: (0..count as u16).rev().collect() }
    }

    /// Takes a place.
    pub(crate) fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    /// Gives a place back, and what it held to the caller.
    pub(crate) fn give(&mut self, index: u16) -> T {
        debug_assert!(!self.free.contains(&index));
        self.free.push(index);
        std::mem::take(&mut self.items[usize::from(index)])
    }

    /// Whether nothing is taken.
    pub(crate) fn all_free(&self) -> bool {
        self.free.len() == self.items.len()
    }
}

impl<T> Index<u16> for Slots<T> {
    type Output = T;

    fn index(&self, index: u16) -> &T {
        &self.items[usize::from(index)]
    }
}

impl<T> IndexMut<u16> for Slots<T> {
    fn index_mut(&mut self, index: u16) -> &mut T {
        &mut self.items[usize::from(index)]
    }
}
