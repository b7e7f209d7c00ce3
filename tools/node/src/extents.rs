//! [`extents`]: what a running image holds where, from its map.

use block::{Layer, Op, Status};
use dma::{PageSize, Region};
use qcow::map::Kind;
use reactor::{Portal, PortalRequest, sync::Mutex};
use std::sync::Arc;

use crate::{Door, Error, Image, Leaf, ReactorCore};

/// A range of an image of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Length in bytes.
    pub len: u64,
    /// Nothing is allocated for it.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

/// Clusters looked at in one turn of the reactor.
const STRIDE: u64 = 4096;

/// How often a page of the map is loaded for one question: others may evict it before it is read.
const TRIES: usize = 16;

/// Extents of `image` from `offset` on as far as its map is loaded, at most `limit` of them and
/// `len` bytes. Empty if the first cluster is not loaded.
fn extents(image: &Image, offset: u64, len: u64, limit: usize) -> Vec<Extent> {
    let info = Layer::<Leaf>::info(image);
    let Image::Qcow(qcow) = image else {
        return vec![Extent { len, hole: false, zero: false }];
    };
    let cluster = qcow.unit_size();
    let end = offset.saturating_add(len).min(info.size);
    let mut list: Vec<Extent> = Vec::new();
    let mut at = offset;
    for _ in 0..STRIDE {
        if at >= end {
            break;
        }
        let word = qcow.map().lookup(at / cluster);
        let (hole, zero) = match word.kind() {
            Kind::Absent => break,
            Kind::Hole => (true, true),
            // A kept cluster is allocated; explicit zeroes without one are not.
            Kind::Zero => (!word.keeps(), true),
            _ => (false, false),
        };
        let to = end.min((at / cluster + 1) * cluster);
        let full = list.len() == limit;
        match list.last_mut() {
            Some(e) if (e.hole, e.zero) == (hole, zero) => e.len += to - at,
            _ if full => break,
            _ => list.push(Extent { len: to - at, hole, zero }),
        }
        at = to;
    }
    list
}

/// Answers questions about a running image's extents, from any thread.
pub struct ExtentSource {
    door: Door,
    /// For the reads that bring pages of the map in.
    portal: Mutex<(Portal, Arc<Region>)>,
}

impl ExtentSource {
    /// One for the image behind `door`.
    ///
    /// # Errors
    /// If memory is short or the reactor has ended.
    pub fn new(door: Door) -> Result<ExtentSource, Error> {
        let region = Region::new(4096, PageSize::Small).map_err(|e| Error::node(door.name(), e))?;
        let portal = door.open_home(1, vec![region.clone()])?;
        Ok(ExtentSource { door, portal: Mutex::new((portal, region)) })
    }

    /// Extents from `offset` on, at least one and at most `limit` of them; they may end before
    /// `offset + len`.
    ///
    /// # Errors
    /// [`Status::Invalid`] if the range is empty or begins past the end; else how the read ended
    /// that was to bring the map in.
    pub fn status(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>, Status> {
        if len == 0 {
            return Err(Status::Invalid);
        }
        for _ in 0..TRIES {
            let image = self.door.image();
            let list = self.door.ask(move |core: &mut ReactorCore| {
                core.image(image).map(|i| extents(i, offset, len, limit.max(1)))
            });
            match list.flatten() {
                None => return Err(Status::Gone),
                Some(list) if !list.is_empty() => return Ok(list),
                Some(_) => self.load(offset)?,
            }
        }
        // True of anything that is inside, as the read just found the offset to be.
        Ok(vec![Extent { len: len.min(512 - offset % 512), hole: false, zero: false }])
    }

    /// Has the page of the map around `offset` loaded.
    fn load(&self, offset: u64) -> Result<(), Status> {
        let mut held = self.portal.lock();
        let (portal, region) = &mut *held;
        let request = PortalRequest {
            id: 0,
            op: Op::Read,
            flags: block::Flags::NONE,
            offset: offset & !511,
            len: 512,
            seg: region.seg(0, 512),
        };
        match portal.call(request) {
            Status::Ok => Ok(()),
            status => Err(status),
        }
    }
}
