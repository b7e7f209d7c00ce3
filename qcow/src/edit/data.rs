//! Writing guest data inside a transaction.

use super::tx::Tx;
use crate::format::{Geometry, L2Entry, RawL2, Unit};
use crate::reader::Files;
use crate::{Error, Result};
use block::Storage;

/// The units of one cluster that `len` bytes from `guest` on cover, as bits of an L2 entry: all, where
/// entries are not extended.
fn mask(g: &Geometry, guest: u64, len: u64) -> u32 {
    if !g.extended_l2() {
        return u32::MAX;
    }
    let first = g.in_cluster(guest) >> g.unit_bits();
    let count = len >> g.unit_bits();
    (((1u64 << count) - 1) << first) as u32
}

impl Tx {
    /// Gives guest units new contents: whole ones of one cluster. With `in_place` what belongs to
    /// nobody else is overwritten, so the change is visible before the commit; else each unit is
    /// written only once in a transaction.
    pub(super) fn write_units(
        &mut self,
        files: &mut Files<'_>,
        guest: u64,
        bytes: &[u8],
        in_place: bool,
    ) -> Result<()> {
        match self.map_units(files, guest, bytes, in_place)? {
            Some(host) => self.write_data(files, host, bytes),
            None => Ok(()),
        }
    }

    /// Writes to where guest data lie.
    fn write_data(&self, files: &mut Files<'_>, host: u64, bytes: &[u8]) -> Result<()> {
        match &mut files.data {
            Some(data) => data.write_at(host, bytes).map_err(self.io("data file")),
            None => files.image.write_at(host, bytes).map_err(self.io("data cluster")),
        }
    }

    /// As [`Tx::write_units`], but returns where the bytes must be written, if they are not there yet:
    /// before the transaction's flush.
    fn map_units(
        &mut self,
        files: &mut Files<'_>,
        guest: u64,
        bytes: &[u8],
        in_place: bool,
    ) -> Result<Option<u64>> {
        let g = self.geometry();
        let (start, inside) = (g.cluster_start(guest), g.in_cluster(guest));
        let mask = mask(&g, guest, bytes.len() as u64);
        let old = self.entry(files.image, start)?;
        let (mut alloc, zero) = old.bits();
        if files.data.is_some() {
            let new = L2Entry::parts(Some((start, true)), alloc | mask, zero & !mask);
            self.set_entry(files.image, start, new)?;
            return Ok(Some(guest));
        }
        let st = &mut *files.image;
        let host = match old.host_cluster() {
            Some((host, _)) => {
                let alone = self.counts.was_free(st, g.cluster(host))?
                    // What the image on disk does not show may be written, too.
                    || (in_place || alloc & mask == 0) && self.counts.get(st, g.cluster(host))? == 1;
                alone.then_some(host)
            }
            None => None,
        };
        if let Some(host) = host {
            self.inside(st, "data cluster", host, 1)?;
            self.counts.check_data(g.cluster(host))?;
            let new = L2Entry::parts(Some((host, true)), alloc | mask, zero & !mask);
            if new != old {
                self.set_entry(st, start, new)?;
            }
            return Ok(Some(host + inside));
        }
        let host = self.take(st, g.cluster_size())?;
        if matches!(old, L2Entry::Compressed { .. }) {
            alloc = u32::MAX;
        }
        let alone = alloc & !mask == 0;
        if !alone {
            let mut whole = vec![0; g.cluster_size() as usize];
            self.read_entry(files, old, &mut whole)?;
            whole[inside as usize..inside as usize + bytes.len()].copy_from_slice(bytes);
            self.write_data(files, host, &whole)?;
        }
        let new = L2Entry::parts(Some((host, true)), alloc | mask, zero & !mask);
        self.set_entry(files.image, start, new)?;
        Ok(alone.then_some(host + inside))
    }

    /// Makes guest units, whole ones of one cluster, read as zeroes. `hidden`: without an entry they
    /// would show something else, the backing file's contents.
    pub(super) fn zero_units(
        &mut self,
        files: &mut Files<'_>,
        guest: u64,
        len: u64,
        hidden: bool,
    ) -> Result<()> {
        let g = self.geometry();
        let start = g.cluster_start(guest);
        let mask = mask(&g, guest, len);
        let old = self.entry(files.image, start)?;
        let (alloc, zero) = old.bits();
        let compressed = matches!(old, L2Entry::Compressed { .. });
        if !compressed && alloc & mask == 0 && (!hidden || zero & mask == mask) {
            return Ok(());
        }
        if self.meta.header.raw_data()
            && let Some(data) = &mut files.data
        {
            data.write_zeroes_at(guest, len).map_err(self.io("data file"))?;
            return Ok(());
        }
        if (hidden && g.version() < 3) || (compressed && mask != u32::MAX) {
            return self.write_units(files, guest, &vec![0; len as usize], false);
        }
        let alloc = alloc & !mask;
        let zero = if hidden { zero | mask } else { zero & !mask };
        let host = old.host_cluster().filter(|_| alloc != 0);
        self.set_entry(files.image, start, L2Entry::parts(host, alloc, zero))
    }

    /// Gives guest clusters (a range of whole units) new contents: what is zeroes in it takes no
    /// space, and what comes to lie side by side is written at once. Returns the bytes written and the
    /// bytes that became zeroes. See [`Tx::write_units`] and [`Tx::zero_units`].
    pub(super) fn put(
        &mut self,
        files: &mut Files<'_>,
        guest: u64,
        bytes: &[u8],
        in_place: bool,
        hidden: bool,
    ) -> Result<(u64, u64)> {
        let g = self.geometry();
        let unit = g.unit_size() as usize;
        let is_zero = |at: usize| bytes[at..at + unit].iter().all(|&b| b == 0);
        let (mut written, mut zeroed) = (0, 0);
        // Where what lies before `at` must be written, and where in `bytes` that begins.
        let mut pending: Option<(u64, usize)> = None;
        let mut at = 0;
        while at < bytes.len() {
            let here = guest + at as u64;
            let room = (g.cluster_size() - g.in_cluster(here)) as usize;
            let end = bytes.len().min(at + room);
            let zero = is_zero(at);
            let mut to = at + unit;
            while to < end && is_zero(to) == zero {
                to += unit;
            }
            let len = (to - at) as u64;
            let host =
                if zero { None } else { self.map_units(files, here, &bytes[at..to], in_place)? };
            if let Some((began, from)) = pending
                && host != Some(began + (at - from) as u64)
            {
                self.write_data(files, began, &bytes[from..at])?;
                pending = None;
            }
            if zero {
                self.zero_units(files, here, len, hidden)?;
                zeroed += len;
            } else {
                pending = pending.or(host.map(|host| (host, at)));
                written += len;
            }
            at = to;
        }
        if let Some((began, from)) = pending {
            self.write_data(files, began, &bytes[from..])?;
        }
        Ok((written, zeroed))
    }

    /// Lets go of everything that is mapped from this guest offset on (the start of a cluster), up
    /// to the one where `end` lies or the L1 table's end.
    pub(super) fn drop_from(&mut self, st: &mut dyn Storage, guest: u64, end: u64) -> Result<()> {
        let g = self.geometry();
        let span = g.cluster_size() << g.l2_bits();
        let entries = (end.div_ceil(span) as usize).min(self.meta.l1.len());
        for l1_index in g.l1_index(guest) as usize..entries {
            if self.meta.l1[l1_index] == 0 {
                continue;
            }
            let start = l1_index as u64 * span;
            if start >= guest {
                self.drop_table(st, l1_index)?;
                continue;
            }
            let Some(words) = self.words(st, l1_index)? else { continue };
            let words = words.to_vec();
            for (index, raw) in RawL2::all(&words, &g).enumerate().skip(g.l2_index(guest)) {
                if raw != RawL2::default() {
                    let entry = self.l2_entry(raw)?;
                    self.set_raw(st, l1_index, index, RawL2::default())?;
                    self.lower_entry(st, entry)?;
                }
            }
        }
        Ok(())
    }

    /// Lets go of an L2 table and all that it maps.
    fn drop_table(&mut self, st: &mut dyn Storage, l1_index: usize) -> Result<()> {
        let Some(words) = self.words(st, l1_index)? else { return Ok(()) };
        let words = words.to_vec();
        self.forget_table();
        for raw in RawL2::all(&words, &self.geometry()) {
            let entry = self.l2_entry(raw)?;
            self.lower_entry(st, entry)?;
        }
        let offset = self.l1_entry(self.meta.l1[l1_index])?.offset;
        let cluster = self.geometry().cluster(offset);
        self.counts.lower(st, cluster)?;
        self.set_l1(l1_index, crate::format::L1Entry::NONE);
        Ok(())
    }

    /// Reads what an entry maps into a whole cluster's `bytes`; where it maps nothing they stay as
    /// they are.
    pub(super) fn read_entry(
        &mut self,
        files: &mut Files<'_>,
        entry: L2Entry,
        bytes: &mut [u8],
    ) -> Result<()> {
        let g = self.geometry();
        if let L2Entry::Compressed { host, len } = entry {
            return self.read_compressed(files.image, host, len, bytes);
        }
        let count = 1u32 << g.sub_bits();
        let mut index = 0;
        while index < count {
            let run = entry.run(index).min(count - index);
            let from = u64::from(index) << g.unit_bits();
            let to = u64::from(index + run) << g.unit_bits();
            let part = &mut bytes[from as usize..to as usize];
            match (entry.unit(index), entry.host_cluster()) {
                (Unit::Zero, _) => part.fill(0),
                (Unit::Data, Some((host, _))) => match &mut files.data {
                    Some(data) => {
                        data.read_at(host + from, part).map_err(self.io("data file"))?;
                    }
                    None => {
                        self.inside(files.image, "data cluster", host, 1)?;
                        let read = files.image.read_at(host + from, part);
                        read.map_err(self.io("data cluster"))?;
                    }
                },
                _ => {}
            }
            index += run;
        }
        Ok(())
    }

    fn read_compressed(
        &mut self,
        st: &mut dyn Storage,
        host: u64,
        len: u32,
        bytes: &mut [u8],
    ) -> Result<()> {
        self.inside(st, "compressed cluster", host, 1)?;
        let mut packed = vec![0; len as usize];
        // An entry counts whole sectors: the last one may end behind a device.
        let room = st.capacity().saturating_sub(host).min(u64::from(len)) as usize;
        st.read_at(host, &mut packed[..room]).map_err(self.io("compressed cluster"))?;
        let decoded =
            crate::Decompressor::new().decode(self.meta.header.compression, &packed, bytes);
        decoded.map_err(|e| {
            Error::refused(
                &self.meta.name,
                format!("the compressed cluster at offset {host:#x} is damaged: {e}"),
            )
        })
    }
}
