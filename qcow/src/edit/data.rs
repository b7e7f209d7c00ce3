//! Writing guest data inside a transaction.

use block::Storage;

use super::tx::Tx;
use crate::format::L2Entry;
use crate::{Error, Result};

impl Tx {
    /// Gives a guest cluster new contents: `bytes`, a whole cluster. With `in_place` a cluster that
    /// belongs to nobody else is overwritten, so the change is visible before the commit.
    pub(super) fn write_cluster(
        &mut self,
        st: &mut dyn Storage,
        guest: u64,
        bytes: &[u8],
        in_place: bool,
    ) -> Result<()> {
        let g = self.geometry();
        let old = self.entry(st, guest)?;
        if let L2Entry::Normal { host, .. } = old
            && (self.counts.was_free(st, g.cluster(host))?
                || in_place && self.counts.get(st, g.cluster(host))? == 1)
        {
            self.inside(st, "data cluster", host, 1)?;
            self.counts.check_data(g.cluster(host))?;
            return st.write_at(host, bytes).map_err(self.io("data cluster"));
        }
        let host = self.take(st, g.cluster_size())?;
        st.write_at(host, bytes).map_err(self.io("data cluster"))?;
        self.set_entry(st, guest, L2Entry::Normal { host, copied: true })
    }

    /// Makes a guest cluster read as zeroes. `hidden`: without an entry it would show something
    /// else, the backing file's contents.
    pub(super) fn zero_cluster(
        &mut self,
        st: &mut dyn Storage,
        guest: u64,
        hidden: bool,
    ) -> Result<()> {
        let g = self.geometry();
        match (self.entry(st, guest)?, hidden) {
            (L2Entry::Zero | L2Entry::ZeroAllocated { .. }, _) | (L2Entry::Unallocated, false) => {
                Ok(())
            }
            (_, false) => self.set_entry(st, guest, L2Entry::Unallocated),
            (_, true) if g.version() >= 3 => self.set_entry(st, guest, L2Entry::Zero),
            (_, true) => self.write_cluster(st, guest, &vec![0; g.cluster_size() as usize], false),
        }
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
            for (index, &raw) in words.iter().enumerate().skip(g.l2_index(guest)) {
                if raw != 0 {
                    let entry = self.l2_entry(raw)?;
                    self.set_word(st, l1_index, index, 0)?;
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
        for raw in words {
            let entry = self.l2_entry(raw)?;
            self.lower_entry(st, entry)?;
        }
        let offset = self.l1_entry(self.meta.l1[l1_index])?.offset;
        let cluster = self.geometry().cluster(offset);
        self.counts.lower(st, cluster)?;
        self.set_l1(l1_index, crate::format::L1Entry::NONE);
        Ok(())
    }

    /// Reads a guest cluster that this image maps; `None` if it does not, zeroes included.
    pub(super) fn read_cluster(
        &mut self,
        st: &mut dyn Storage,
        guest: u64,
    ) -> Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; self.geometry().cluster_size() as usize];
        match self.entry(st, guest)? {
            L2Entry::Unallocated | L2Entry::Zero | L2Entry::ZeroAllocated { .. } => {
                return Ok(None);
            }
            L2Entry::Normal { host, .. } => {
                self.inside(st, "data cluster", host, 1)?;
                st.read_at(host, &mut bytes).map_err(self.io("data cluster"))?;
            }
            L2Entry::Compressed { host, len } => {
                self.inside(st, "compressed cluster", host, 1)?;
                let mut packed = vec![0; len as usize];
                // An entry counts whole sectors: the last one may end behind a device.
                let room = st.capacity().saturating_sub(host).min(u64::from(len)) as usize;
                st.read_at(host, &mut packed[..room]).map_err(self.io("compressed cluster"))?;
                crate::Decompressor::new()
                    .decode(self.meta.header.compression, &packed, &mut bytes)
                    .map_err(|e| {
                        Error::refused(
                            &self.meta.name,
                            format!("the compressed cluster at offset {host:#x} is damaged: {e}"),
                        )
                    })?;
            }
        }
        Ok(Some(bytes))
    }
}
