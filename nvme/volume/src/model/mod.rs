//! What a group consists of: [`Vg`], its devices [`Pv`] and volumes [`Lv`], in the units of the
//! metadata: extents, and sectors of 512 bytes. Made from text, checked, turned into text again.
//! Changes are in [`edit`], places for new extents in [`alloc`].

mod alloc;
mod check;
mod edit;
mod read;
mod write;

pub use alloc::MAX_SEGMENTS;
pub use check::{check_name, check_tag};
pub use edit::Shape;

use crate::error::{Error, Result};
use crate::id::Id;
use crate::text::Node;

/// Whoever makes something, as metadata records it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Author {
    /// Name of the host.
    pub host: String,
    /// Seconds since 1970.
    pub time: u64,
}

/// A volume group.
#[derive(Clone, PartialEq, Debug)]
pub struct Vg {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: Id,
    /// Number of this state; each change has a higher one.
    pub seqno: u32,
    /// The host that may use it; `None`: any.
    pub system_id: Option<String>,
    /// Flags that each reader must know.
    pub status: Vec<String>,
    /// Flags that may be unknown.
    pub flags: Vec<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Sectors of an extent.
    pub extent_size: u64,
    /// Its devices.
    pub pvs: Vec<Pv>,
    /// Its volumes.
    pub lvs: Vec<Lv>,
    /// Values without meaning for us, kept.
    pub extra: Vec<Node>,
}

/// A device of a group.
#[derive(Clone, PartialEq, Debug)]
pub struct Pv {
    /// What segments call it, e.g. `pv0`.
    pub key: String,
    /// Its identity, also in its label.
    pub id: Id,
    /// Flags that each reader must know.
    pub status: Vec<String>,
    /// Flags that may be unknown.
    pub flags: Vec<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Sector where extent 0 begins.
    pub pe_start: u64,
    /// How many extents it has.
    pub pe_count: u64,
    /// Values without meaning for us, kept.
    pub extra: Vec<Node>,
}

/// A volume.
#[derive(Clone, PartialEq, Debug)]
pub struct Lv {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: Id,
    /// Flags that each reader must know.
    pub status: Vec<String>,
    /// Flags that may be unknown.
    pub flags: Vec<String>,
    /// Tags.
    pub tags: Vec<String>,
    /// Its parts, in order and without gaps.
    pub segments: Vec<Segment>,
    /// Values without meaning for us, kept.
    pub extra: Vec<Node>,
}

/// A part of a volume: extents of one device, or of several in stripes.
#[derive(Clone, PartialEq, Debug)]
pub struct Segment {
    /// Its first extent in the volume.
    pub start: u64,
    /// How many extents it has, on all devices together.
    pub count: u64,
    /// Sectors of a stripe; 0 on one device.
    pub stripe_size: u64,
    /// Where the extents are.
    pub areas: Vec<Place>,
    /// Tags.
    pub tags: Vec<String>,
    /// Values without meaning for us, kept.
    pub extra: Vec<Node>,
}

/// An extent of a device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// Index into [`Vg::pvs`].
    pub pv: usize,
    /// The extent.
    pub extent: u64,
}

/// Extents of a device in a row.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Run {
    /// Index into [`Vg::pvs`].
    pub pv: usize,
    /// The first extent.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl Segment {
    /// How many extents it has on each device.
    pub fn depth(&self) -> u64 {
        self.count / (self.areas.len().max(1) as u64)
    }

    /// The extents that it uses.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let count = self.depth();
        self.areas.iter().map(move |area| Run { pv: area.pv, first: area.extent, count })
    }
}

impl Lv {
    /// How many extents it has.
    pub fn extents(&self) -> u64 {
        self.segments.iter().map(|segment| segment.count).sum()
    }

    /// Whether it may be written to.
    pub fn writable(&self) -> bool {
        writable(&self.status, &self.flags)
    }

    /// Whether it is a volume of its own, and no part of something that is not known here.
    pub fn visible(&self) -> bool {
        self.status.iter().any(|flag| flag == "VISIBLE")
    }
}

impl Pv {
    /// Whether volumes may get extents of it.
    pub fn allocatable(&self) -> bool {
        self.status.iter().any(|flag| flag == "ALLOCATABLE")
    }
}

/// The flag that stands for `WRITE` where a system ID or a lock manager is: tools that are too old
/// to know those then take the group as one to be read only.
pub(crate) const WRITE_LOCKED: &str = "WRITE_LOCKED";

fn writable(status: &[String], flags: &[String]) -> bool {
    status.iter().any(|flag| flag == "WRITE") || flags.iter().any(|flag| flag == WRITE_LOCKED)
}

impl Vg {
    /// Whether it may be changed.
    pub fn writable(&self) -> bool {
        writable(&self.status, &self.flags)
    }

    /// The volume of this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn lv(&self, name: &str) -> Result<&Lv> {
        let found = self.lvs.iter().find(|lv| lv.name == name);
        found.ok_or_else(|| Error::NoVolume(format!("{}/{name}", self.name)))
    }

    /// Bytes of an extent.
    pub fn extent_bytes(&self) -> u64 {
        self.extent_size * crate::label::SECTOR
    }

    /// How many extents so many bytes need.
    pub fn extents_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.extent_bytes())
    }

    /// All extents of volumes, in no order.
    pub fn used(&self) -> impl Iterator<Item = Run> + '_ {
        self.lvs.iter().flat_map(|lv| &lv.segments).flat_map(Segment::runs)
    }
}
