//! [`Reader`]: an image with its backing files, read blockingly. Knows what QCOW2 tables do not
//! say: where raw files, and the blocks of VHD files, have holes.

use std::fs::File;

use anyhow::bail;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use node::{NodeSpec, OpenOptions, Source, open_chain, open_vhd};
use qcow::edit::SnapshotKey;
use qcow::open::{FileId, Format, Layer};
use qcow::{ChainReader, Source as From, Span};

use super::{Backing, reading};
use crate::args::AnyFormat;

/// An opened image.
pub(crate) struct Reader {
    kind: Kind,
    size: u64,
    hole: Option<Stretch>,
}

enum Kind {
    Chain(Box<ChainReader<Source>>),
    Vhd(Box<vhd::Reader<Source>>),
}

/// What a file's system said last: a range that is all hole or all data.
struct Stretch {
    depth: usize,
    start: u64,
    end: u64,
    hole: bool,
}

impl Reader {
    /// Opens an image and its backing files, under locks.
    ///
    /// # Errors
    /// As [`open_chain`].
    pub(crate) fn open(spec: &NodeSpec, options: &OpenOptions) -> anyhow::Result<Reader> {
        Reader::open_at(spec, options, None)
    }

    /// As [`Reader::open`], for any format.
    ///
    /// # Errors
    /// As [`open_chain`] and [`open_vhd`].
    pub(crate) fn open_any(
        spec: &NodeSpec,
        format: AnyFormat,
        backing: &Backing,
        force_share: bool,
    ) -> anyhow::Result<Reader> {
        if let Some(format) = format.chained() {
            return Reader::open(spec, &reading(format, backing, force_share));
        }
        super::refuse_special(spec)?;
        let chain = open_vhd(spec, &reading(Format::Raw, backing, force_share))?;
        let size = chain.size();
        Ok(Reader { kind: Kind::Vhd(Box::new(vhd::Reader::new(chain))), size, hole: None })
    }

    /// As [`Reader::open`]; with a snapshot the disk is as it was when that was taken.
    ///
    /// # Errors
    /// As [`open_chain`]; if there is no such snapshot.
    pub(crate) fn open_at(
        spec: &NodeSpec,
        options: &OpenOptions,
        snapshot: Option<SnapshotKey<'_>>,
    ) -> anyhow::Result<Reader> {
        super::refuse_special(spec)?;
        let mut chain = open_chain(spec, options)?;
        if let Some(key) = snapshot {
            chain.show_snapshot(key)?;
        }
        // Disks are whole sectors; the rest of a file's last one reads as zeroes.
        let size = chain.size().next_multiple_of(512);
        Ok(Reader { kind: Kind::Chain(Box::new(ChainReader::new(chain))), size, hole: None })
    }

    /// The reader below, which does not look for holes.
    ///
    /// # Errors
    /// If it is a VHD image.
    pub(crate) fn chain(&mut self) -> anyhow::Result<&mut ChainReader<Source>> {
        match &mut self.kind {
            Kind::Chain(chain) => Ok(chain),
            Kind::Vhd(_) => bail!("vhd images stand in no backing chain"),
        }
    }

    /// Bytes of the guest's disk, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The layers, from the top; none of a VHD image.
    pub(crate) fn layers(&self) -> &[Layer<Source>] {
        match &self.kind {
            Kind::Chain(chain) => chain.layers(),
            Kind::Vhd(_) => &[],
        }
    }

    /// Names of the layers, from the top.
    pub(crate) fn names(&self) -> Vec<String> {
        match &self.kind {
            Kind::Chain(chain) => chain.layers().iter().map(|l| l.name.clone()).collect(),
            Kind::Vhd(reader) => reader.layers().iter().map(|l| l.name.clone()).collect(),
        }
    }

    /// Which files the layers are, from the top.
    fn files(&self) -> Vec<Option<FileId>> {
        match &self.kind {
            Kind::Chain(c) => {
                c.layers().iter().map(|l| l.path.as_deref().and_then(file_id)).collect()
            }
            Kind::Vhd(v) => {
                v.layers().iter().map(|l| l.path.as_deref().and_then(file_id)).collect()
            }
        }
    }

    /// The layer that is this file, if there is one.
    pub(crate) fn find_file(&self, file: FileId) -> Option<usize> {
        self.files().iter().position(|&f| f == Some(file))
    }

    /// As [`ChainReader::read_at`].
    ///
    /// # Errors
    /// If a layer cannot be read or its tables say something impossible.
    pub(crate) fn read_at(&mut self, offset: u64, into: &mut [u8]) -> anyhow::Result<()> {
        match &mut self.kind {
            Kind::Chain(chain) => Ok(chain.read_at(offset, into)?),
            Kind::Vhd(reader) => Ok(reader.read_at(offset, into)?),
        }
    }

    /// As [`ChainReader::span`], with holes in raw files as zeroes.
    ///
    /// # Errors
    /// If a table cannot be read or says something impossible.
    pub(crate) fn span(&mut self, start: u64, max: u64) -> anyhow::Result<Option<Span>> {
        if start >= self.size {
            return Ok(None);
        }
        let chain = match &mut self.kind {
            Kind::Chain(chain) => chain,
            Kind::Vhd(reader) => {
                let mut span = reader.span(start, max)?.map(of_vhd);
                if let Some(Span { source: From::Data(host), .. }) = span {
                    span = span.map(|s| self.cut_at_hole(s, host));
                }
                return Ok(span);
            }
        };
        let end = chain.size();
        let Some(mut span) = chain.span(start, max)? else {
            let len = max.min(self.size - start);
            return Ok(Some(Span { start, len, depth: 0, source: From::Zero(None) }));
        };
        if let From::Data(host) = span.source
            && chain.layers()[span.depth].image().is_none()
        {
            span = self.cut_at_hole(span, host);
        }
        if span.start + span.len == end {
            span.len = max.min(self.size - start);
        }
        Ok(Some(span))
    }

    /// Cuts a span of data at `host` of a file to a stretch that is all hole or all data.
    fn cut_at_hole(&mut self, mut span: Span, host: u64) -> Span {
        let storage = match &self.kind {
            Kind::Chain(chain) => &chain.layers()[span.depth].storage,
            Kind::Vhd(reader) => &reader.layers()[span.depth].storage,
        };
        let Some(storage) = storage.host() else { return span };
        let known = |s: &&Stretch| s.depth == span.depth && (s.start..s.end).contains(&host);
        let stretch = match self.hole.as_ref().filter(known) {
            Some(_) => &self.hole,
            None => {
                let (hole, end) = stretch(storage.file(), host);
                self.hole = Some(Stretch { depth: span.depth, start: host, end, hole });
                &self.hole
            }
        };
        if let Some(s) = stretch {
            span.len = span.len.min(s.end - host);
            if s.hole {
                span.source = From::Zero(Some(host));
            }
        }
        span
    }
}

/// A span as chains have it.
fn of_vhd(span: vhd::Span) -> Span {
    let source = match span.source {
        vhd::Source::Unallocated => From::Unallocated,
        vhd::Source::Data(host) => From::Data(host),
    };
    Span { start: span.start, len: span.len, depth: span.depth, source }
}

/// Whether there is a hole at an offset, and where that ends: past the offset.
fn stretch(file: &File, at: u64) -> (bool, u64) {
    const DATA: (bool, u64) = (false, u64::MAX);
    let Ok(offset) = i64::try_from(at) else { return DATA };
    match lseek(file, offset, Whence::SeekData) {
        Err(Errno::ENXIO) => (true, u64::MAX),
        Ok(data) if data > offset => match data as u64 & !511 {
            end if end > at => (true, end),
            _ => (false, (at + 512) & !511),
        },
        Ok(_) => match lseek(file, offset, Whence::SeekHole) {
            Ok(hole) if hole > offset => (false, (hole as u64).next_multiple_of(512)),
            _ => DATA,
        },
        // The file system does not tell.
        Err(_) => DATA,
    }
}

/// Which file a path leads to, if to any.
pub(crate) fn file_id(path: &std::path::Path) -> Option<FileId> {
    std::fs::metadata(path).ok().map(|m| FileId::of(&m))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_of_a_raw_file_are_zeroes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let file = File::create(&path).unwrap();
        file.set_len(4 << 20).unwrap();
        file.write_all_at(&[1; 100], 1 << 20).unwrap();
        file.write_all_at(&[2; 1], 4 << 20).unwrap();
        let spec = NodeSpec::File(path);
        let mut r = Reader::open(&spec, &OpenOptions::read(qcow::open::Format::Raw)).unwrap();
        assert_eq!(r.size(), (4 << 20) + 512);
        let (mut at, mut spans) = (0, Vec::new());
        while let Some(s) = r.span(at, u64::MAX).unwrap() {
            at += s.len;
            spans.push((s.start, s.source));
        }
        assert_eq!(at, r.size());
        assert_eq!(spans[0], (0, From::Zero(Some(0))));
        assert_eq!(spans[1], (1 << 20, From::Data(1 << 20)));
        assert!(matches!(spans[2].1, From::Zero(Some(_))));
        assert_eq!(spans[3], (4 << 20, From::Data(4 << 20)));
        assert_eq!(spans.len(), 4);
        let mut tail = [9; 4];
        r.read_at(4 << 20, &mut tail).unwrap();
        assert_eq!(tail, [2, 0, 0, 0]);
    }
}
