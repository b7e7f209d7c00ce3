//! [`RawImage`]: the image format that is none: offsets go through unchanged.

use std::sync::Arc;

use dma::Region;

use crate::{
    BlockQueue, Completion, Completions, DeviceInfo, Flags, Full, HasWork, Layer, Op, Port,
    Request, Status, Tag,
};

/// A unit of a leaf queue as an image. Requests keep the frontend's tag on their way down, so that
/// their completions go straight to the frontend.
#[derive(Debug)]
pub struct RawImage {
    info: DeviceInfo,
    port: Port,
    owner: u16,
    closing: Closing,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Closing {
    No,
    Wanted,
    Flushing,
    Done(Status),
}

impl RawImage {
    /// The first `size` bytes of what is at `port` of `leaves`; `owner` as the reactor gave it.
    /// `None` if there is no such unit.
    pub fn new<L: BlockQueue>(leaves: &[L], port: Port, size: u64, owner: u16) -> Option<RawImage> {
        let mut info = leaves.get(usize::from(port.leaf))?.info(port.unit)?.clone();
        info.size = info.size.min(size) & !u64::from(info.block_size - 1);
        Some(RawImage { info, port, owner, closing: Closing::No })
    }
}

impl<L: BlockQueue> Layer<L> for RawImage {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn register(&mut self, _region: &Arc<Region>) {}

    #[inline]
    fn room(&self, leaves: &[L]) -> usize {
        if self.closing == Closing::No { leaves[usize::from(self.port.leaf)].room() } else { 0 }
    }

    #[inline(always)]
    fn submit(&mut self, leaves: &mut [L], request: &Request<'_>) -> Result<(), Full> {
        if self.closing != Closing::No {
            return Err(Full);
        }
        let mut below = Request { unit: self.port.unit, ..*request };
        if !self.info.contains(request.offset, request.len) {
            // Past our end though maybe not past the leaf's: have the leaf refuse it, later.
            below.offset = u64::MAX;
        }
        leaves[usize::from(self.port.leaf)].submit(&below)
    }

    fn complete(&mut self, _leaves: &mut [L], done: &mut Completion) -> bool {
        if self.closing == Closing::Flushing {
            self.closing = Closing::Done(done.status);
        }
        false
    }

    fn poll(&mut self, leaves: &mut [L], _out: &mut Completions) -> bool {
        if self.closing != Closing::Wanted {
            return false;
        }
        let flush = Request {
            tag: Tag::new(self.owner, 0, 0),
            op: Op::Flush,
            flags: Flags::NONE,
            unit: self.port.unit,
            offset: 0,
            len: 0,
            segs: &[],
        };
        if leaves[usize::from(self.port.leaf)].submit(&flush).is_ok() {
            self.closing = Closing::Flushing;
        }
        true
    }

    fn arm(&mut self) -> HasWork {
        if self.closing == Closing::Wanted { HasWork::Yes } else { HasWork::No }
    }

    fn close(&mut self) {
        if self.closing == Closing::No {
            self.closing =
                if self.info.read_only { Closing::Done(Status::Ok) } else { Closing::Wanted };
        }
    }

    fn closed(&self) -> Option<Status> {
        match self.closing {
            Closing::Done(status) => Some(status),
            _ => None,
        }
    }
}
