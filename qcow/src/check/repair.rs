//! Repair: entries that lose nothing, refcounts in place, COPIED flags.

use super::scan::{COPIED, Counting, Scan, judge};
use super::window::Window;
use super::{Checker, Repair};
use crate::format::{L1Entry, RawL2, RefcountBlock};
use crate::{Error, Result};

impl Checker<'_> {
    /// Repairs what a look found (which read everything, else nothing may be repaired). Returns
    /// how many COPIED flags were set right.
    pub(super) fn repair(&mut self, repair: Repair, before: &Scan) -> Result<u64> {
        if repair == Repair::All {
            self.repair_entries()?;
            self.flush()?;
        }
        if before.rebuild {
            self.say("Rebuilding the refcount structures");
            self.rebuild()?;
        } else {
            self.repair_refcounts(repair)?;
        }
        self.flush()?;
        // Flags are derived from refcounts, so those must be right.
        let refcounts_right = before.corruptions == before.flags;
        if repair == Repair::Leaks && !refcounts_right {
            return Ok(0);
        }
        let fixed = self.repair_flags()?;
        self.flush()?;
        Ok(fixed)
    }

    fn flush(&mut self) -> Result<()> {
        self.storage.flush().map_err(Error::io(&self.meta.name, "flush"))
    }

    fn write(&mut self, what: &'static str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.storage.write_at(offset, bytes).map_err(Error::io(&self.meta.name, what))
    }

    fn write_l1(&mut self, index: usize, raw: u64) -> Result<()> {
        self.meta.l1[index] = raw;
        let offset = self.meta.header.l1_table_offset + index as u64 * 8;
        self.write("L1 table", offset, &raw.to_be_bytes())
    }

    /// Whether a table may be written: where it is not aligned, its entry is damaged, and who
    /// knows what stands there.
    fn writable_table(&self, offset: u64) -> bool {
        self.meta.geometry.in_cluster(offset) == 0 && offset < self.file_len
    }

    /// Replaces damaged entries whose repair loses nothing: places kept for zeroes that are not
    /// aligned, and flags where there can be none; and subclusters that cannot be read.
    fn repair_entries(&mut self) -> Result<()> {
        let g = self.meta.geometry;
        for index in 0..self.meta.l1.len() {
            if self.meta.l1[index] == COPIED {
                self.write_l1(index, 0)?;
            }
        }
        for i in 0..self.refs.l2.len() {
            let table = self.refs.l2[i];
            if !self.writable_table(table.offset) {
                continue;
            }
            let Some(words) = self.read_l2(&table)? else { continue };
            for (index, raw) in RawL2::all(&words, &g).enumerate() {
                if let Some(better) = judge(raw, &g).better {
                    let at = table.offset + index as u64 * g.l2_entry_size();
                    self.write("L2 table", at, &better.to_bytes(&g))?;
                }
            }
        }
        Ok(())
    }

    /// Sets the refcounts on disk to the references; with [`Repair::Leaks`] only lowers them.
    fn repair_refcounts(&mut self, repair: Repair) -> Result<()> {
        let g = self.meta.geometry;
        let per_block = g.refcount_block_entries() as u64;
        let mut block = RefcountBlock::new(&g);
        for range in self.windows() {
            let blocks = self.blocks_of(range.clone());
            if blocks.is_empty() {
                continue;
            }
            let mut window = Window::new(range.clone());
            self.count_quietly(&mut window, true)?;
            for (first, offset) in blocks {
                self.read_block(offset, &mut block)?;
                let mut changed = false;
                for cluster in first..(first + per_block).min(range.end).min(self.clusters) {
                    let index = (cluster - first) as usize;
                    let (on_disk, counted) = (block.get(index), window.get(cluster));
                    let wanted = counted.min(g.refcount_max());
                    if wanted < on_disk || (wanted > on_disk && repair == Repair::All) {
                        block.set(index, wanted);
                        changed = true;
                    }
                }
                if changed {
                    self.write("refcount block", offset, block.bytes())?;
                }
            }
        }
        Ok(())
    }

    /// Counts references without saying anything.
    pub(super) fn count_quietly(&mut self, window: &mut Window, refcounts: bool) -> Result<()> {
        let mut scan = Scan::default();
        let into = Counting { window, scan: &mut scan, first: false, flags: false };
        self.count(into, refcounts);
        if scan.check_errors > 0 {
            // The look before could read everything; by now something has failed.
            let reason = "a table that could be read before cannot be read now; repair stopped";
            return Err(Error::refused(&self.meta.name, reason));
        }
        Ok(())
    }

    /// Sets COPIED where a refcount on disk is one and clears it elsewhere; returns how many.
    fn repair_flags(&mut self) -> Result<u64> {
        let g = self.meta.geometry;
        let mut fixed = 0;
        for range in self.windows() {
            let mut window = Window::new(range);
            let mut scan = Scan::default();
            self.load_ones(&mut window, &mut scan);
            if scan.check_errors > 0 {
                continue;
            }
            for index in 0..self.meta.l1.len() {
                let raw = self.meta.l1[index];
                let Ok(L1Entry { offset, copied }) = L1Entry::decode(raw, &g) else { continue };
                let wrong = window.is_one(g.cluster(offset)).is_some_and(|one| one != copied);
                if offset != 0 && wrong {
                    self.write_l1(index, raw ^ COPIED)?;
                    fixed += 1;
                }
            }
            for i in 0..self.refs.l2.len() {
                let table = self.refs.l2[i];
                if table.active > 0 && self.writable_table(table.offset) {
                    fixed += self.repair_flags_of(&window, &table)?;
                }
            }
        }
        Ok(fixed)
    }

    fn repair_flags_of(&mut self, window: &Window, table: &super::refs::L2Ref) -> Result<u64> {
        let g = self.meta.geometry;
        let Some(mut words) = self.read_l2(table)? else { return Ok(0) };
        let mut fixed = 0;
        for entry in words.chunks_exact_mut(g.l2_words()) {
            if let Some((host, copied)) = judge(RawL2::of(entry, 0, &g), &g).copied
                && window.is_one_at(host, &g).is_some_and(|one| one != copied)
            {
                entry[0] ^= COPIED;
                fixed += 1;
            }
        }
        if fixed > 0 {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
            self.write("L2 table", table.offset, &bytes)?;
        }
        Ok(fixed)
    }
}
