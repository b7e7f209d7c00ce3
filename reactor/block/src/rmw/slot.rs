//! A request in work in the [`super::RmwQueue`], and how far its parts are.

use dma::Buf;

use crate::{Flags, Op, QUARANTINED, SegList, Status, Tag};

/// How far the whole blocks of a request are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Middle {
    /// There are none, or they are done.
    Done,
    /// To be noted as a write over unclaimed blocks.
    Note,
    /// To be sent; a write is noted.
    Send,
    /// With the leaf.
    Sent,
}

/// How far a block that is touched in part is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    Done,
    /// Needs a buffer.
    Buffer,
    /// Needs the claim on the block.
    Claim,
    /// Has it; writes of the whole block, begun before, must end.
    Drain,
    Read,
    Reading,
    Write,
    Writing,
}

#[derive(Debug)]
pub(super) struct Edge {
    pub(super) step: Step,
    /// The device block's number.
    pub(super) block: u64,
    /// The part of the block: first byte and length.
    pub(super) from: u32,
    pub(super) len: u32,
    /// The same part's place in the request.
    pub(super) at: u64,
    pub(super) buf: Option<Buf>,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) tag: Tag,
    pub(super) op: Op,
    pub(super) flags: Flags,
    pub(super) unit: u16,
    /// Tells the answers to this use of the slot from others.
    pub(super) generation: u32,
    pub(super) status: Status,
    pub(super) detail: u16,
    pub(super) middle: Middle,
    /// The whole blocks: offset on the device, length, place in the request.
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) at: u64,
    pub(super) edges: [Edge; 2],
    pub(super) segs: SegList,
}

impl Slot {
    pub(super) fn new() -> Slot {
        let edge = || Edge { step: Step::Done, block: 0, from: 0, len: 0, at: 0, buf: None };
        Slot {
            tag: Tag::new(0, 0, 0),
            op: Op::Flush,
            flags: Flags::NONE,
            unit: 0,
            generation: 0,
            status: Status::Ok,
            detail: 0,
            middle: Middle::Done,
            offset: 0,
            len: 0,
            at: 0,
            edges: [edge(), edge()],
            segs: SegList::EMPTY,
        }
    }

    pub(super) fn done(&self) -> bool {
        self.middle == Middle::Done && self.edges.iter().all(|e| e.step == Step::Done)
    }

    pub(super) fn fail(&mut self, status: Status, detail: u16) {
        if self.status.is_ok() {
            (self.status, self.detail) = (status, detail);
        }
        self.detail |= detail & QUARANTINED;
    }

    pub(super) fn writes(&self) -> bool {
        matches!(self.op, Op::Write | Op::WriteZeroes | Op::Discard)
    }

    /// What of the request's flags concerns a single write.
    pub(super) fn fua(&self) -> Flags {
        if self.flags.has(Flags::FUA) { Flags::FUA } else { Flags::NONE }
    }
}
