//! Committing: what an overlay holds goes down into a layer below.
//!
//! While it runs the overlay keeps all that it holds, so the chain reads the same whatever was
//! written below already; then the overlay is emptied by one transaction.

use block::Storage;

use super::resize::Below;
use super::tx::{Tx, run};
use crate::open::LayerKind;
use crate::{ChainReader, Error, Result, Source};

/// Bytes read and written at a time.
pub(super) const PIECE: u64 = 1 << 20;
/// How far tables are looked through for where a run ends. Some pieces far, since what lies behind the
/// next piece is looked at again after it.
pub(super) const LOOK: u64 = 16 << 20;
/// How far ahead layers are told what will be read.
const AHEAD: u64 = 4 << 20;
/// Bytes that go to new clusters before they are made part of the image: what a cut can cost.
pub(super) const STEP: u64 = 256 << 20;

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Bytes that were written.
    pub data_bytes: u64,
    /// Bytes that became zeroes.
    pub zero_bytes: u64,
}

/// Who looks on at something long.
pub trait Watch {
    /// So many bytes of the disk are done.
    ///
    /// # Errors
    /// Ends it here.
    fn at(&mut self, bytes: u64) -> Result<()>;

    /// So many bytes are read now, to be compared or written elsewhere.
    ///
    /// # Errors
    /// Ends it here.
    fn moves(&mut self, bytes: u64) -> Result<()> {
        let _ = bytes;
        Ok(())
    }

    /// An image that is changed has new tables on disk; where the old ones were, others will soon be.
    ///
    /// # Errors
    /// Ends it here, with nothing of the old tables given back.
    fn switched(&mut self) -> Result<()> {
        Ok(())
    }
}

impl<F: FnMut(u64)> Watch for F {
    fn at(&mut self, bytes: u64) -> Result<()> {
        self(bytes);
        Ok(())
    }
}

/// Writes what the layers above `depth` (at least 1) hold into that layer; its storage must be
/// writable, and with `empty` the top's, too, which is emptied then. The layer grows to the top's
/// size if it is smaller.
///
/// # Errors
/// If the top has internal snapshots (they would show something else afterwards), the layer must grow
/// and has some in version 2, something cannot be read or written, or there is no room. The chain shows what it did before, and the call can be
/// repeated.
pub fn commit<S: Storage>(
    reader: &mut ChainReader<S>,
    depth: usize,
    empty: bool,
    watch: &mut dyn Watch,
) -> Result<Committed> {
    let layers = reader.layers();
    let name = layers[0].name.clone();
    if depth == 0 || depth >= layers.len() {
        return Err(Error::refused(&name, "there is no layer below to commit to"));
    }
    for layer in &layers[..depth] {
        refuse_snapshots(layer)?;
    }
    let done = match layers[depth].kind {
        LayerKind::Raw(_) => into_raw(reader, depth, watch)?,
        LayerKind::Qcow2(_) => into_image(reader, depth, watch)?,
    };
    if empty && let Some(size) = reader.layers()[0].image().map(|i| i.geometry.size()) {
        let (_, meta) = run(reader.storage(0), &name, |tx, st| {
            tx.compact = true;
            tx.drop_from(st, 0, size)
        })?;
        reader.changed(0, LayerKind::Qcow2(Box::new(meta)));
    }
    Ok(done)
}

/// Refuses a layer with internal snapshots, which show what is below where they hold nothing.
pub(super) fn refuse_snapshots<S>(layer: &crate::open::Layer<S>) -> Result<()> {
    match layer.image().map_or(0, |i| i.header.nb_snapshots) {
        0 => Ok(()),
        n => Err(Error::refused(
            &layer.name,
            format!("has {n} internal snapshots, which would show something else afterwards"),
        )),
    }
}

/// The next range from `at` on that layers above `depth` have something for, and whether it is
/// zeroes: as many bytes as are handled at a time, or more, if it does not end before.
fn next_above<S: Storage>(
    reader: &mut ChainReader<S>,
    depth: usize,
    mut at: u64,
) -> Result<Option<(u64, u64, bool)>> {
    let mut found = None;
    while let Some(span) = reader.span(at, LOOK)? {
        // An unallocated range ends here, too, where a layer above is shorter.
        let zero = matches!(span.source, Source::Unallocated | Source::Zero(_));
        let above = span.depth < depth;
        match &mut found {
            None if above => found = Some((at, span.len, zero)),
            None => {}
            Some((_, len, was)) if above && *was == zero => *len += span.len,
            Some(_) => break,
        }
        at += span.len;
        let most = if zero { STEP } else { PIECE };
        if found.is_some_and(|(_, len, _)| len >= most) {
            break;
        }
    }
    Ok(found)
}

/// Before `len` bytes at `at` are read: has layers above `depth` fetch what comes behind them, too.
/// `told`: up to where they know already.
fn read_ahead<S: Storage>(
    reader: &mut ChainReader<S>,
    depth: usize,
    (at, len): (u64, u64),
    told: &mut u64,
) {
    let to = at.saturating_add(len).saturating_add(AHEAD);
    reader.will_read(depth, at.max(*told), to);
    *told = to.max(*told);
}

fn into_raw<S: Storage>(
    reader: &mut ChainReader<S>,
    depth: usize,
    watch: &mut dyn Watch,
) -> Result<Committed> {
    let name = reader.layers()[depth].name.clone();
    let io = |what| Error::io(&name, what);
    let size = reader.size();
    let st = reader.storage(depth);
    if st.len() < size {
        st.set_len(size).map_err(io("set length"))?;
    }
    if st.len() < size {
        let reason = format!("has {} bytes, fewer than the {size} of the disk", st.len());
        return Err(Error::refused(&name, reason));
    }
    let len = st.len();
    reader.changed(depth, LayerKind::Raw(len));
    let mut done = Committed::default();
    let (mut at, mut told) = (0, 0);
    let mut buffer = vec![0; PIECE as usize];
    while let Some((start, len, zero)) = next_above(reader, depth, at)? {
        if zero {
            reader.storage(depth).write_zeroes_at(start, len).map_err(io("data"))?;
            done.zero_bytes += len;
            at = start + len;
        } else {
            let len = len.min(PIECE);
            let bytes = &mut buffer[..len as usize];
            watch.moves(len)?;
            read_ahead(reader, depth, (start, len), &mut told);
            reader.read_at(start, bytes)?;
            reader.storage(depth).write_at(start, bytes).map_err(io("data"))?;
            done.data_bytes += len;
            at = start + len;
        }
        watch.at(at)?;
    }
    reader.storage(depth).flush().map_err(io("flush"))?;
    Ok(done)
}

fn into_image<S: Storage>(
    reader: &mut ChainReader<S>,
    depth: usize,
    watch: &mut dyn Watch,
) -> Result<Committed> {
    let name = reader.layers()[depth].name.clone();
    let mut tx = Tx::open(reader.storage(depth), &name)?;
    reader.changed(depth, LayerKind::Qcow2(Box::new(tx.meta.clone())));
    match copy(reader, depth, &mut tx, watch) {
        Ok(done) => Ok(done),
        Err(e) => {
            tx.abort(reader.storage(depth));
            Err(e)
        }
    }
}

/// Makes what the transaction did part of the image, and has the reader know.
pub(super) fn checkpoint<S: Storage>(
    reader: &mut ChainReader<S>,
    depth: usize,
    tx: &mut Tx,
    watch: &mut dyn Watch,
) -> Result<()> {
    tx.flush_data(&mut reader.files(depth))?;
    tx.commit_watched(reader.storage(depth), &mut || watch.switched())?;
    reader.changed(depth, LayerKind::Qcow2(Box::new(tx.meta.clone())));
    Ok(())
}

/// Has the layer's bitmaps say what is going to change, before anything does.
fn mark<S: Storage>(
    reader: &mut ChainReader<S>,
    depth: usize,
    tx: &mut Tx,
    watch: &mut dyn Watch,
) -> Result<()> {
    if tx.bitmaps.is_empty() {
        return Ok(());
    }
    let mut at = 0;
    while let Some((start, len, _)) = next_above(reader, depth, at)? {
        tx.mark(reader.storage(depth), start, len)?;
        at = start + len;
    }
    checkpoint(reader, depth, tx, watch)
}

fn copy<S: Storage>(
    reader: &mut ChainReader<S>,
    depth: usize,
    tx: &mut Tx,
    watch: &mut dyn Watch,
) -> Result<Committed> {
    let size = reader.size();
    if tx.geometry().size() < size {
        let below = Below::of(reader, depth)?;
        tx.set_size(&mut reader.files(depth), size, below)?;
        checkpoint(reader, depth, tx, watch)?;
    }
    mark(reader, depth, tx, watch)?;
    let unit = tx.geometry().unit_size();
    let backed = tx.meta.header.backing_name.is_some();
    let mut done = Committed::default();
    let (mut at, mut since, mut told) = (0, 0, 0);
    let mut buffer = Vec::new();
    while let Some((start, len, zero)) = next_above(reader, depth, at)? {
        // Whole units of the layer: after the commit it shows what the top shows, so that is
        // what fills them.
        let first = start & !(unit - 1);
        let most = if zero { STEP } else { PIECE.max(unit) };
        let end = (start + len).min(first + most).next_multiple_of(unit);
        let whole = zero && first == start && end <= start + len;
        let mut end = end;
        if whole {
            done.zero_bytes += end - first;
            let g = tx.geometry();
            let mut guest = first;
            while guest < end {
                let to = end.min(g.cluster_start(guest) + g.cluster_size());
                tx.zero_units(&mut reader.files(depth), guest, to - guest, backed)?;
                guest = to;
            }
        } else {
            end = end.min(first + PIECE.max(unit));
            buffer.resize((end - first) as usize, 0);
            watch.moves(end - first)?;
            read_ahead(reader, depth, (first, end - first), &mut told);
            reader.read_at(first, &mut buffer)?;
            if end > size {
                // The layer is larger than the top.
                let tail = (size - first) as usize;
                reader.read_below(depth, size, &mut buffer[tail..])?;
            }
            let put = tx.put(&mut reader.files(depth), first, &buffer, true, backed)?;
            done.data_bytes += put.0;
            done.zero_bytes += put.1;
        }
        at = end;
        since += end - first;
        if since >= STEP {
            checkpoint(reader, depth, tx, watch)?;
            since = 0;
        }
        watch.at(at.min(size))?;
        if at >= size {
            break;
        }
    }
    checkpoint(reader, depth, tx, watch)?;
    Ok(done)
}
