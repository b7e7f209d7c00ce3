//! Changing the size of the disk.

use block::Storage;

use super::tx::{Tx, run_files};
use crate::format::{L2Entry, MAX_L1_BYTES};
use crate::open::{Layer, LayerKind};
use crate::reader::Files;
use crate::{ChainReader, Error, Result};

/// What stands below a disk that grows.
pub(super) struct Below {
    /// Bytes of the backing file's disk.
    size: u64,
    /// What it shows from the start of the cluster in which the growing disk ends up to that end.
    tail: Vec<u8>,
}

impl Below {
    /// Looks below a layer; `None` if it has no backing file.
    pub(super) fn of<S: Storage>(
        reader: &mut ChainReader<S>,
        depth: usize,
    ) -> Result<Option<Below>> {
        let layers = reader.layers();
        let Some(size) = layers.get(depth + 1).map(Layer::size) else { return Ok(None) };
        let Some(g) = layers[depth].image().map(|i| i.geometry) else { return Ok(None) };
        let mut tail = vec![0; g.in_cluster(g.size()) as usize];
        reader.read_below(depth + 1, g.cluster_start(g.size()), &mut tail)?;
        Ok(Some(Below { size, tail }))
    }
}

/// Changes the size of a chain's top image, which must be QCOW2 and whose storage must be writable,
/// to `size` bytes. What is added reads as zeroes, whatever the backing file has there. What is cut
/// off is lost.
///
/// # Errors
/// If the size is no multiple of 512 or too large, the image has version 2 and internal snapshots
/// (which do not say then how large they are) or bitmaps that were not saved or would become too
/// large, there is no room, or a write fails. The image is as it was then.
pub fn resize<S: Storage>(reader: &mut ChainReader<S>, size: u64) -> Result<()> {
    let name = reader.layers()[0].name.clone();
    if !size.is_multiple_of(512) || i64::try_from(size).is_err() {
        let reason = format!("the new size {size} is no multiple of 512 below 2^63");
        return Err(Error::refused(&name, reason));
    }
    let below = Below::of(reader, 0)?;
    let meta =
        run_files(&mut reader.files(0), &name, |tx, files| tx.set_size(files, size, below))?.1;
    if let Some(data) = reader.files(0).data
        && data.len() > size
    {
        data.set_len(size).map_err(Error::io(&name, "data file"))?;
    }
    reader.changed(0, LayerKind::Qcow2(Box::new(meta)));
    Ok(())
}

impl Tx {
    /// Changes the disk's size inside a transaction.
    pub(super) fn set_size(
        &mut self,
        files: &mut Files<'_>,
        size: u64,
        below: Option<Below>,
    ) -> Result<()> {
        if self.meta.header.version < 3 && self.meta.header.nb_snapshots > 0 {
            return Err(self.refused(
                "has version 2 and internal snapshots, whose size is that of the disk: it cannot \
                 be resized",
            ));
        }
        let old = self.geometry().size();
        let mut header = self.meta.header.clone();
        header.size = size;
        let g = header.geometry();
        if g.l1_entries() * 8 > MAX_L1_BYTES {
            return Err(self.refused(format!(
                "a disk of {size} bytes is too large for clusters of {} bytes (its L1 table would \
                 be larger than 32 MiB)",
                g.cluster_size()
            )));
        }
        // Behind the end there may be something: state of a virtual machine, or of another program
        // that shrank the disk.
        let kept = old.min(size);
        self.resize_bitmaps(files.image, size)?;
        let first = g.round_up(kept).unwrap_or(u64::MAX);
        self.drop_from(files.image, first, u64::MAX)?;
        self.meta.header = header;
        self.meta.geometry = g;
        let entries = self.meta.l1.len().max(g.l1_entries() as usize);
        self.l1_changed |= entries != self.meta.l1.len();
        self.meta.l1.resize(entries, 0);
        if size <= old {
            self.compact = true;
            return Ok(());
        }
        if self.meta.header.backing_name.is_some() && below.is_none() {
            return Err(self.refused("its backing file must be open to grow it"));
        }
        if g.data_file() && files.data.is_none() {
            return Err(self.refused("its external data file must be open to grow it"));
        }
        self.clear_tail(files, old, below)?;
        self.grow_data(files, old)
    }

    /// Has an external data file follow a disk that grew. Where it is the disk by itself, what is new
    /// reads as zeroes in it, and all of it is mapped, so that what others write there is seen.
    fn grow_data(&mut self, files: &mut Files<'_>, old: u64) -> Result<()> {
        let g = self.geometry();
        let Some(data) = &mut files.data else { return Ok(()) };
        if data.capacity() < g.size() {
            return Err(self.refused("its external data file cannot grow to that size"));
        }
        let raw = self.meta.header.raw_data();
        if raw && data.len() > old {
            let len = data.len().min(g.size()) - old;
            data.write_zeroes_at(old, len).map_err(self.io("data file"))?;
        }
        data.set_len(g.size()).map_err(self.io("data file"))?;
        let mut guest = g.cluster_start(old);
        while raw && guest < g.size() {
            if self.entry(files.image, guest)? == L2Entry::Unallocated {
                let entry = L2Entry::Normal { host: guest, copied: true };
                self.set_entry(files.image, guest, entry)?;
            }
            guest += g.cluster_size();
        }
        Ok(())
    }

    /// Makes what follows the old end read as zeroes: the rest of its cluster, and what the backing
    /// file would show.
    fn clear_tail(&mut self, files: &mut Files<'_>, old: u64, below: Option<Below>) -> Result<()> {
        let g = self.geometry();
        let below_size = below.as_ref().map_or(0, |b| b.size);
        let used = g.in_cluster(old) as usize;
        if used > 0 {
            let guest = g.cluster_start(old);
            let entry = self.entry(files.image, guest)?;
            let shows_below = below_size > old;
            // What the cluster holds: the backing file's contents where it has none of its own.
            let mut bytes = vec![0; g.cluster_size() as usize];
            let parts = match entry {
                L2Entry::Unallocated => shows_below,
                L2Entry::Parts { alloc, zero, .. } => shows_below && alloc | zero != u32::MAX,
                _ => false,
            };
            if let Some(below) = below.filter(|_| parts) {
                bytes[..used].copy_from_slice(&below.tail);
            }
            self.read_entry(files, entry, &mut bytes)?;
            if parts || bytes[used..].iter().any(|&b| b != 0) {
                bytes[used..].fill(0);
                self.write_units(files, guest, &bytes, false)?;
            }
        }
        let mut guest = g.round_up(old).unwrap_or(u64::MAX);
        while guest < g.size().min(below_size) {
            self.zero_units(files, guest, g.cluster_size(), true)?;
            guest += g.cluster_size();
        }
        Ok(())
    }
}
