//! Rebasing: another backing file, with the disk reading as before.
//!
//! What the old backing file shows and the new one does not is copied into the image first, which
//! changes nothing as long as the old one is named; then the header names the new one.

use block::Storage;

use super::commit::{LOOK, PIECE, STEP, Watch, checkpoint, refuse_snapshots};
use super::header::set_backing;
use super::tx::Tx;
use crate::open::{Format, LayerKind};
use crate::{ChainReader, Error, Result, Source};

/// The backing file that an image gets.
pub struct NewBacking<'r, S> {
    /// Its name, as it shall stand in the image.
    pub name: &'r str,
    /// Its format.
    pub format: Format,
    /// It, with its own backing files.
    pub reader: &'r mut ChainReader<S>,
    /// The layer of the image's chain that it is, if it is one.
    pub depth: Option<usize>,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rebased {
    /// Bytes that were copied into the image.
    pub data_bytes: u64,
    /// Bytes that became zeroes in it.
    pub zero_bytes: u64,
}

/// Gives the top image, whose storage must be writable, another backing file (or none), with the
/// disk unchanged.
///
/// # Errors
/// If the image has internal snapshots (they would show something else afterwards), something
/// cannot be read or written, the name does not fit, or there is no room. The image shows what it
/// did before, and the call can be repeated.
pub fn rebase<S: Storage>(
    reader: &mut ChainReader<S>,
    mut to: Option<NewBacking<'_, S>>,
    watch: &mut dyn Watch,
) -> Result<Rebased> {
    let top = &reader.layers()[0];
    let name = top.name.clone();
    if top.image().is_none() {
        return Err(Error::refused(&name, "is raw, and so has no backing file"));
    }
    refuse_snapshots(top)?;
    let mut tx = Tx::open(reader.storage(0), &name)?;
    reader.changed(0, LayerKind::Qcow2(Box::new(tx.meta.clone())));
    let done = match copy(reader, to.as_mut(), &mut tx, watch) {
        Ok(done) => done,
        Err(e) => {
            tx.abort(reader.storage(0));
            return Err(e);
        }
    };
    let backing = to.as_ref().map(|t| (t.name, t.format));
    set_backing(reader.storage(0), &name, backing)?;
    Ok(done)
}

fn copy<S: Storage>(
    reader: &mut ChainReader<S>,
    mut to: Option<&mut NewBacking<'_, S>>,
    tx: &mut Tx,
    watch: &mut dyn Watch,
) -> Result<Rebased> {
    let g = tx.geometry();
    // What can be mapped by itself.
    let unit = g.unit_size();
    let size = g.size();
    let mut done = Rebased::default();
    let (mut at, mut since) = (0, 0);
    let (mut old, mut new) = (Vec::new(), Vec::new());
    while at < size {
        let (run, source) = reader.top_run(at, LOOK.min(size - at))?;
        let same = if source == Source::Unallocated {
            alike(reader, to.as_deref_mut(), at, run)?
        } else {
            run
        };
        // Whole units, as far as they are known to be alike.
        let same = if same == run { run } else { same - same % unit };
        if same > 0 {
            at += same;
            watch.at(at)?;
            continue;
        }
        let len = run.min(PIECE.max(unit));
        let whole = len.next_multiple_of(unit) as usize;
        for buffer in [&mut old, &mut new] {
            buffer.clear();
            buffer.resize(whole, 0);
        }
        watch.moves(len)?;
        reader.read_at(at, &mut old[..len as usize])?;
        if let Some(to) = to.as_deref_mut() {
            to.reader.read_at(at, &mut new[..len as usize])?;
        }
        let alike = |i: usize| {
            let range = i * unit as usize..(i + 1) * unit as usize;
            old[range.clone()] == new[range]
        };
        let count = whole / unit as usize;
        let mut i = 0;
        while i < count {
            let n = (i..count).take_while(|&i| !alike(i)).count();
            if n > 0 {
                let (guest, range) =
                    (at + i as u64 * unit, i * unit as usize..(i + n) * unit as usize);
                let put = tx.put(&mut reader.files(0), guest, &old[range], false, true)?;
                done.data_bytes += put.0;
                done.zero_bytes += put.1;
                since += n as u64 * unit;
            }
            i += n.max(1);
        }
        at += len;
        if since >= STEP {
            checkpoint(reader, 0, tx, watch)?;
            since = 0;
        }
        watch.at(at)?;
    }
    checkpoint(reader, 0, tx, watch)?;
    Ok(done)
}

/// For how many bytes from `at` on both chains show the same, as far as tables say: at most `run`.
fn alike<S: Storage>(
    reader: &mut ChainReader<S>,
    mut to: Option<&mut NewBacking<'_, S>>,
    at: u64,
    run: u64,
) -> Result<u64> {
    let mut done = 0;
    while done < run {
        let Some(span) = reader.span(at + done, run - done)? else { break };
        let zero = |s| matches!(s, Source::Unallocated | Source::Zero(_));
        let mut len = span.len;
        let shared = to.as_ref().and_then(|t| t.depth).is_some_and(|d| span.depth >= d);
        let below = match to.as_deref_mut() {
            None => true,
            Some(to) => match to.reader.span(at + done, len)? {
                None => true,
                Some(other) => {
                    len = len.min(other.len);
                    zero(other.source)
                }
            },
        };
        if !(shared || below && zero(span.source)) {
            break;
        }
        done += len;
    }
    Ok(done)
}
