//! Where two chains show different bytes: what a rebase of an image that runs must take up into it
//! first. Blocking, on the control path.

use block::Storage;

use super::commit::{LOOK, PIECE, Watch};
use crate::reader::Span;
use crate::{ChainReader, Result, Source};

/// Clusters of a guest's disk: a bit for each.
pub struct ClusterSet {
    words: Vec<u64>,
    bits: u32,
}

impl ClusterSet {
    /// None, of a disk of `size` bytes with clusters of `1 << bits`.
    fn new(size: u64, bits: u32) -> ClusterSet {
        let words = (size >> bits) / 64 + 1;
        ClusterSet { words: vec![0; words as usize], bits }
    }

    /// Adds the clusters of a range of bytes, inside the disk.
    fn insert(&mut self, start: u64, len: u64) {
        for cluster in start >> self.bits..(start + len).div_ceil(1 << self.bits) {
            self.words[(cluster / 64) as usize] |= 1 << (cluster % 64);
        }
    }

    /// Whether it has this one.
    pub fn contains(&self, cluster: u64) -> bool {
        let word = self.words.get((cluster / 64) as usize).copied().unwrap_or(0);
        word & 1 << (cluster % 64) != 0
    }
}

/// In which clusters of `1 << bits` bytes the chain `old` shows something else than `new` (no chain
/// at all shows zeroes), on a disk of `size` bytes. Past its end a chain shows zeroes.
///
/// # Errors
/// If a layer cannot be read, or the watcher ends it.
pub fn differing<S: Storage>(
    old: &mut ChainReader<S>,
    mut new: Option<&mut ChainReader<S>>,
    size: u64,
    bits: u32,
    watch: &mut dyn Watch,
) -> Result<ClusterSet> {
    let mut found = ClusterSet::new(size, bits);
    let (mut a, mut b) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    let zero = |s: &Option<Span>| {
        s.as_ref().is_none_or(|s| matches!(s.source, Source::Unallocated | Source::Zero(_)))
    };
    let mut at = 0;
    while at < size {
        // What may be long is zeroes; the rest is read in pieces that end with clusters.
        let most = LOOK.min(size - at);
        let x = old.span(at, most)?;
        let y = new.as_deref_mut().map(|n| n.span(at, most)).transpose()?.flatten();
        let len = [&x, &y].into_iter().flatten().map(|s| s.len).min().unwrap_or(most);
        if zero(&x) && zero(&y) {
            at += len;
            watch.at(at)?;
            continue;
        }
        let len = (PIECE - at % PIECE).min(size - at) as usize;
        watch.moves(len as u64)?;
        old.read_at(at, &mut a[..len])?;
        match new.as_deref_mut() {
            Some(new) => new.read_at(at, &mut b[..len])?,
            None => b[..len].fill(0),
        }
        let mut done = 0;
        while done < len {
            let start = at + done as u64;
            let n = ((1 << bits) - start % (1 << bits)).min((len - done) as u64) as usize;
            if a[done..done + n] != b[done..done + n] {
                found.insert(start, n as u64);
            }
            done += n;
        }
        at += len as u64;
        watch.at(at)?;
    }
    Ok(found)
}
