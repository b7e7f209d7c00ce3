//! What `image map` prints: the guest's disk as ranges, each with the place it comes from.

use block::Storage;
use serde::Serialize;

use crate::Result;
use crate::reader::{ChainReader, Source, Span};

/// A range of the guest's disk, with the field names of `qemu-img map --output=json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// The layer it comes from; 0 is the image itself.
    pub depth: usize,
    /// Whether a layer has it (data or zeroes); else it reads as zeroes because none has.
    pub present: bool,
    /// Whether it reads as zeroes.
    pub zero: bool,
    /// Whether there is data in a file for it.
    pub data: bool,
    /// Whether that data is compressed.
    pub compressed: bool,
    /// Where in the layer's file it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

impl Extent {
    /// A span as an extent.
    pub fn of(span: Span) -> Extent {
        let (present, zero, data, compressed, offset) = match span.source {
            Source::Unallocated => (false, true, false, false, None),
            Source::Zero(host) => (true, true, false, false, host),
            Source::Data(host) => (true, false, true, false, Some(host)),
            Source::Compressed(..) => (true, false, true, true, None),
        };
        Extent {
            start: span.start,
            length: span.len,
            depth: span.depth,
            present,
            zero,
            data,
            compressed,
            offset,
        }
    }

    /// Whether `next`, which follows directly, is more of the same.
    pub fn continues_with(&self, next: &Extent) -> bool {
        let same = Extent { start: 0, length: 0, offset: None, ..*self }
            == Extent { start: 0, length: 0, offset: None, ..*next };
        same && self.offset.map(|o| o + self.length) == next.offset
    }
}

/// Calls `each` with the extents of guest range `start..end` (at most to the disk's end), in
/// order and merged, so that memory does not grow with the disk.
///
/// # Errors
/// If a layer cannot be read or says something impossible.
pub fn walk<S: Storage>(
    reader: &mut ChainReader<S>,
    start: u64,
    end: u64,
    each: &mut dyn FnMut(Extent),
) -> Result<()> {
    let end = end.min(reader.size());
    let mut at = start;
    let mut pending: Option<Extent> = None;
    while at < end {
        let Some(span) = reader.span(at, end - at)? else { break };
        at += span.len;
        let next = Extent::of(span);
        match &mut pending {
            Some(p) if p.continues_with(&next) => p.length += next.length,
            _ => {
                if let Some(done) = pending.replace(next) {
                    each(done);
                }
            }
        }
    }
    if let Some(done) = pending {
        each(done);
    }
    Ok(())
}
