//! [`Reader`]: an image with its backing files, read blockingly. Knows what QCOW2 tables do not
//! say: where raw files have holes.

use std::fs::File;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use node::{NodeSpec, OpenOptions, Source, open_chain};
use qcow::edit::SnapshotKey;
use qcow::open::{FileId, Layer};
use qcow::{ChainReader, Source as From, Span};

/// An opened image.
pub(crate) struct Reader {
    chain: ChainReader<Source>,
    size: u64,
    hole: Option<Stretch>,
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
        Ok(Reader { chain: ChainReader::new(chain), size, hole: None })
    }

    /// The reader below, which does not look for holes.
    pub(crate) fn chain(&mut self) -> &mut ChainReader<Source> {
        &mut self.chain
    }

    /// Bytes of the guest's disk, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The layers; 0 is the top.
    pub(crate) fn layers(&self) -> &[Layer<Source>] {
        self.chain.layers()
    }

    /// The layer that is this file, if there is one.
    pub(crate) fn find_file(&self, file: FileId) -> Option<usize> {
        self.layers().iter().position(|l| l.path.as_deref().and_then(file_id) == Some(file))
    }

    /// As [`ChainReader::read_at`].
    ///
    /// # Errors
    /// If a layer cannot be read or its tables say something impossible.
    pub(crate) fn read_at(&mut self, offset: u64, into: &mut [u8]) -> qcow::Result<()> {
        self.chain.read_at(offset, into)
    }

    /// As [`ChainReader::span`], with holes in raw files as zeroes.
    ///
    /// # Errors
    /// If a table cannot be read or says something impossible.
    pub(crate) fn span(&mut self, start: u64, max: u64) -> qcow::Result<Option<Span>> {
        if start >= self.size {
            return Ok(None);
        }
        let end = self.chain.size();
        let Some(mut span) = self.chain.span(start, max)? else {
            let len = max.min(self.size - start);
            return Ok(Some(Span { start, len, depth: 0, source: From::Zero(None) }));
        };
        if let From::Data(host) = span.source {
            self.look_for_hole(&mut span, host);
        }
        if span.start + span.len == end {
            span.len = max.min(self.size - start);
        }
        Ok(Some(span))
    }

    /// Cuts a span of a raw file to a stretch that is all hole or all data.
    fn look_for_hole(&mut self, span: &mut Span, host: u64) {
        let layer = &self.chain.layers()[span.depth];
        let (None, Some(storage)) = (layer.image(), layer.storage.host()) else { return };
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
    }
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
