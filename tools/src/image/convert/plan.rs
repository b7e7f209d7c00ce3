//! What is to be copied: the source read in order, cut into what is data, what is zeroes, and what
//! the destination's backing file already has. Runs on a thread of its own.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender};

use qcow::{Source, Span};

use crate::image::reader::Reader;

/// Bytes read at a time; a multiple of every cluster size below it.
const PIECE: u64 = 1 << 20;
/// Bytes that need no reading are joined up to about this many.
const RUN: u64 = 1 << 40;

/// What the destination's backing file already holds.
pub(super) enum Under {
    /// There is none.
    Nothing,
    /// It is this layer of the source, with a disk of `size` bytes.
    Layer {
        /// Index of the layer.
        depth: usize,
        /// Bytes of its disk.
        size: u64,
    },
    /// It is another image: its contents are compared.
    Other(Box<Reader>),
}

/// A part of the disk. Starts are multiples of the unit, and so are lengths but at the disk's end.
pub(super) enum Piece {
    /// Reads as zeroes.
    Zeroes {
        /// Where.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Is in the backing file.
    Kept {
        /// Where.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Was read: data, with parts that turned out to be something else.
    Data {
        /// Where.
        at: u64,
        /// The contents.
        bytes: Vec<u8>,
        /// What they are, in order and without gaps.
        parts: Vec<(Part, Range<usize>)>,
    },
}

/// What a part of a piece is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    /// Must be written.
    Data,
    /// Is zeroes.
    Zeroes,
    /// Is in the backing file.
    Kept,
}

/// The source, with what is to be done with it.
pub(super) struct Plan {
    source: Reader,
    under: Under,
    /// Bytes that belong together: a cluster of the destination.
    unit: u64,
    /// Bytes that are told apart in what was read; divides the unit.
    grain: usize,
    /// Zeroes of at least that many bytes are zeroes; 0: everything is data.
    sparse: u64,
}

impl Plan {
    /// A plan for a destination with clusters of `cluster` bytes; `None` if it is raw.
    pub(super) fn new(source: Reader, under: Under, cluster: Option<u64>, sparse: u64) -> Plan {
        // Less than a cluster cannot be left out. Raw files take any block; with fewer than 4 KiB
        // they would be cut into pieces that file systems do not have.
        let (unit, grain) = match cluster {
            Some(cluster) => (cluster, cluster as usize),
            None => (65536, if sparse < 4096 { 512 } else { 4096 }),
        };
        Plan { source, under, unit, grain, sparse }
    }

    /// Bytes of the disk.
    pub(super) fn size(&self) -> u64 {
        self.source.size()
    }

    /// Sends all pieces in order, until the disk ends or nobody receives them. Buffers come back
    /// through `empty`.
    ///
    /// # Errors
    /// If something cannot be read.
    pub(super) fn run(
        mut self,
        pieces: &SyncSender<Piece>,
        empty: &Receiver<Vec<u8>>,
    ) -> anyhow::Result<()> {
        let most = PIECE.max(self.unit);
        let mut compare = Vec::new();
        let mut at = 0;
        // What follows, if it is known: found at the end of a run.
        let mut next: Option<(Part, u64)> = None;
        while at < self.size() {
            let (part, mut len) = match next.take() {
                Some(known) => known,
                None => self.run_at(at)?,
            };
            let longest = if part == Part::Data { most } else { RUN };
            while len < longest && at + len < self.size() {
                let (other, more) = self.run_at(at + len)?;
                if other != part {
                    next = Some((other, more));
                    break;
                }
                len += more;
            }
            let piece = match part {
                Part::Zeroes => Piece::Zeroes { at, len },
                Part::Kept => Piece::Kept { at, len },
                Part::Data => {
                    if len > most {
                        len = most;
                        next = None;
                    }
                    let mut bytes = empty.try_recv().unwrap_or_default();
                    bytes.resize(len as usize, 0);
                    self.source.read_at(at, &mut bytes)?;
                    let parts = self.parts(at, &bytes, &mut compare)?;
                    Piece::Data { at, bytes, parts }
                }
            };
            at += len;
            if pieces.send(piece).is_err() {
                // The other side has failed and says why.
                break;
            }
        }
        Ok(())
    }

    /// What is at `at`, a multiple of the unit, and for how long: whole units, or to the end.
    fn run_at(&mut self, at: u64) -> anyhow::Result<(Part, u64)> {
        let size = self.size();
        let (part, len) = self.classify(at, size - at)?;
        if at + len == size {
            return Ok((part, len));
        }
        if len >= self.unit {
            return Ok((part, len - len % self.unit));
        }
        // The unit has several runs: it is data unless they all are the same.
        let end = size.min(at + self.unit);
        let mut next = at + len;
        while part != Part::Data && next < end {
            let (other, len) = self.classify(next, end - next)?;
            if other != part {
                return Ok((Part::Data, end - at));
            }
            next += len;
        }
        Ok((part, end - at))
    }

    /// What the tables say about `at`, and for how long.
    fn classify(&mut self, at: u64, max: u64) -> anyhow::Result<(Part, u64)> {
        let Some(span) = self.source.span(at, max)? else { return Ok((Part::Zeroes, max)) };
        let zero = match span.source {
            Source::Unallocated | Source::Zero(_) => true,
            Source::Data(_) | Source::Compressed(..) => false,
        };
        let mut len = span.len;
        let part = match &mut self.under {
            Under::Nothing if zero => Part::Zeroes,
            Under::Nothing => Part::Data,
            Under::Layer { depth, size } => {
                if at < *size {
                    len = len.min(*size - at);
                }
                below(&span, *depth, *size, zero)
            }
            Under::Other(backing) => match backing.span(at, len)? {
                None if zero => Part::Kept,
                None => Part::Data,
                Some(other) => {
                    len = len.min(other.len);
                    match other.source {
                        Source::Unallocated | Source::Zero(_) if zero => Part::Kept,
                        _ if zero => Part::Zeroes,
                        _ => Part::Data,
                    }
                }
            },
        };
        // Everything is to be written, but what the backing file has.
        let part = if part == Part::Zeroes && self.sparse == 0 { Part::Data } else { part };
        Ok((part, len))
    }

    /// What data that was read turned out to be.
    fn parts(
        &mut self,
        at: u64,
        bytes: &[u8],
        compare: &mut Vec<u8>,
    ) -> anyhow::Result<Vec<(Part, Range<usize>)>> {
        let other = match &mut self.under {
            Under::Other(backing) => {
                compare.resize(bytes.len(), 0);
                backing.read_at(at, compare)?;
                Some(&compare[..])
            }
            _ => None,
        };
        Ok(cut(bytes, other, self.grain, self.sparse))
    }
}

/// What a span is to a destination whose backing file is layer `depth`, with `size` bytes.
fn below(span: &Span, depth: usize, size: u64, zero: bool) -> Part {
    match zero {
        _ if span.depth >= depth => Part::Kept,
        // A layer above hides what the backing file has here, be it only by ending before.
        true if span.start < size => Part::Zeroes,
        true => Part::Kept,
        false => Part::Data,
    }
}

/// Cuts data into runs of `grain` bytes that are alike. `other` is what the backing file has in the
/// same place. Runs of zeroes shorter than `sparse` are data; 0: all are.
fn cut(bytes: &[u8], other: Option<&[u8]>, grain: usize, sparse: u64) -> Vec<(Part, Range<usize>)> {
    let mut parts: Vec<(Part, Range<usize>)> = Vec::new();
    let mut push = |part, range: Range<usize>| match parts.last_mut() {
        Some((last, r)) if *last == part => r.end = range.end,
        _ => parts.push((part, range)),
    };
    let kind = |range: Range<usize>| {
        let here = &bytes[range.clone()];
        if other.is_some_and(|o| &o[range] == here) {
            Part::Kept
        } else if sparse > 0 && is_zero(here) {
            Part::Zeroes
        } else {
            Part::Data
        }
    };
    let mut at = 0;
    while at < bytes.len() {
        let mut end = bytes.len().min(at + grain);
        let part = kind(at..end);
        while end < bytes.len() {
            let next = bytes.len().min(end + grain);
            if kind(end..next) != part {
                break;
            }
            end = next;
        }
        let short = part == Part::Zeroes && ((end - at) as u64) < sparse && end < bytes.len();
        push(if short { Part::Data } else { part }, at..end);
        at = end;
    }
    parts
}

/// Whether all bytes are 0.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|w| u128::from_ne_bytes(*w) == 0) && rest.iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_cut_at_zeroes_and_at_what_is_below() {
        let mut bytes = vec![1; 8 * 512];
        bytes[512..1024].fill(0);
        bytes[5 * 512..7 * 512].fill(0);
        let z = Part::Zeroes;
        let got = cut(&bytes, None, 512, 512);
        let d = Part::Data;
        assert_eq!(
            got,
            [(d, 0..512), (z, 512..1024), (d, 1024..2560), (z, 2560..3584), (d, 3584..4096)]
        );
        assert_eq!(cut(&bytes, None, 512, 1024), [(d, 0..2560), (z, 2560..3584), (d, 3584..4096)]);
        assert_eq!(cut(&bytes, None, 512, 0), [(d, 0..4096)]);
        assert_eq!(cut(&bytes, None, 4096, 512), [(d, 0..4096)]);
        let mut other = bytes.clone();
        other[600] = 7;
        other[4000] = 7;
        let k = Part::Kept;
        let got = cut(&bytes, Some(&other), 512, 512);
        assert_eq!(got, [(k, 0..512), (z, 512..1024), (k, 1024..3584), (d, 3584..4096)]);
        let got = cut(&bytes, Some(&other), 512, 0);
        assert_eq!(got, [(k, 0..512), (d, 512..1024), (k, 1024..3584), (d, 3584..4096)]);
    }

    #[test]
    fn the_last_grain_may_be_short() {
        let bytes = vec![0; 1536];
        assert_eq!(cut(&bytes, None, 1024, 1 << 20), [(Part::Zeroes, 0..1536)]);
        assert!(is_zero(&[0; 33]) && !is_zero(&[&[0; 32][..], &[1]].concat()));
    }
}
