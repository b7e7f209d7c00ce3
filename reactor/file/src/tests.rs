//! Tests of the whole queue, over every engine and two file systems.

mod behaviour;
mod device;
mod model;
mod regions;
mod stripe;

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;

use block::{BlockQueue, Completion, Completions, Flags, Op, Request, Submit, Tag};
use dma::{PageSize, Region, Seg};

use crate::{Engine, FileQueue};

/// The engines, and AIO as an old kernel has it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Kind {
    Uring,
    Aio,
    OldAio,
    /// Also of files that are not, for which it must do as well.
    InMemory,
}

pub(super) const KINDS: [Kind; 4] = [Kind::Uring, Kind::Aio, Kind::OldAio, Kind::InMemory];

/// Directories on file systems of different habits: a disk's, and memory's where there is one.
pub(super) fn dirs() -> Vec<tempfile::TempDir> {
    let mut dirs = vec![tempfile::tempdir().unwrap()];
    dirs.extend(tempfile::tempdir_in("/dev/shm"));
    dirs
}

pub(super) fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// A queue with a region to take data from.
pub(super) struct Rig {
    pub(super) q: FileQueue,
    pub(super) region: Arc<Region>,
    out: Completions,
    generation: u32,
}

impl Rig {
    pub(super) fn new(kind: Kind) -> Rig {
        let engine = match kind {
            Kind::Uring => Engine::IoUring,
            Kind::Aio | Kind::OldAio => Engine::Aio,
            Kind::InMemory => Engine::InMemory,
        };
        let mut q = FileQueue::new(engine).unwrap();
        assert_eq!(q.engine(), engine);
        if kind == Kind::OldAio {
            q.cripple();
        }
        let region = Region::new(4 << 20, PageSize::Small).unwrap();
        q.register(&region).unwrap();
        Rig { q, region, out: Completions::new(), generation: 0 }
    }

    /// Submits with a tag of its own; the slot number is the caller's.
    pub(super) fn submit(
        &mut self,
        slot: u16,
        op: Op,
        flags: Flags,
        offset: u64,
        len: u64,
        segs: &[Seg],
    ) {
        self.generation += 1;
        let tag = Tag::new(3, slot, self.generation);
        self.q.submit(&Request { tag, op, flags, unit: 0, offset, len, segs }).unwrap();
    }

    /// Polls until nothing is in flight.
    pub(super) fn drain(&mut self) -> Vec<Completion> {
        let mut all = Vec::new();
        while self.q.in_flight() > 0 {
            self.out.clear();
            let n = self.q.poll(&mut self.out);
            assert_eq!(n, self.out.len());
            all.extend(self.out.iter());
            if n == 0 {
                std::thread::yield_now();
            }
        }
        all
    }

    /// One request over the region's first bytes.
    pub(super) fn one(&mut self, op: Op, flags: Flags, offset: u64, len: u64) -> Completion {
        let seg = match op {
            Op::Read | Op::Write => self.region.seg(0, len as u32),
            _ => None,
        };
        self.submit(0, op, flags, offset, len, seg.as_slice());
        let all = self.drain();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].tag, Tag::new(3, 0, self.generation));
        all[0]
    }
}
