//! L2 tables of the layer that is written to, on their way into memory, to be changed: new ones are
//! made, shared ones copied.

use block::{Op, SegList, Status};

use super::read::check;
use super::shared::{Key, Shared};
use crate::format::L1Entry;

impl Shared {
    /// Makes sure that the L2 table for a page exists, is ours alone, and that the page's slice of
    /// it is in memory; holds the slice until [`super::meta::Tables::unuse`]. For a task
    /// as in [`Shared::at_rest`].
    pub(super) async fn slice_ready(&self, slot: u16, page: u64) -> Result<(), Status> {
        let g = self.geometry;
        let guest = self.page_start(page);
        let index = g.l1_index(guest) as usize;
        loop {
            if self.tables.borrow().has_slice(page) {
                self.tables.borrow_mut().hold(page);
                return Ok(());
            }
            if self.tables.borrow().making.contains(&index) {
                self.at_rest(slot, self.park(slot, Key::Table(index as u64))).await;
                continue;
            }
            self.tables.borrow_mut().making.insert(index);
            let result = self.load_slice(slot, page, guest, index).await;
            self.tables.borrow_mut().making.remove(&index);
            self.unpark(Key::Table(index as u64));
            result?;
        }
    }

    /// Guest offset where a page begins.
    pub(super) fn page_start(&self, page: u64) -> u64 {
        (page << self.map.page_bits()) << self.geometry.unit_bits()
    }

    /// The page that a guest cluster is in, and its entry's index in the slice.
    pub(super) fn place_of_entry(&self, cluster: u64) -> (u64, usize) {
        let bits = self.map.page_bits() - self.geometry.sub_bits();
        (cluster >> bits, cluster as usize & ((1 << bits) - 1))
    }

    async fn load_slice(
        &self,
        slot: u16,
        page: u64,
        guest: u64,
        index: usize,
    ) -> Result<(), Status> {
        let g = self.geometry;
        let entries = 1 << (self.map.page_bits() - g.sub_bits());
        let mut table = self.l1_entry(self.top_at(), &g, guest)?;
        if table.offset == 0 || !table.copied {
            let old = table.offset;
            let cluster = self.allocate(slot, 1).await?.first;
            let host = cluster << g.cluster_bits();
            let made = match old {
                0 => self.write_zero_cluster(slot, host).await,
                // Shared with somebody else: changed in a copy, as any cluster.
                old => self.copy_cluster(slot, old, host).await,
            };
            if let Err(status) = made {
                self.unallocate(cluster, 1);
                return Err(status);
            }
            self.alloc.borrow_mut().metadata.insert(cluster);
            table = L1Entry { offset: host, copied: true };
            self.tables.borrow_mut().set_l1(index, table.encode());
            if old == 0 {
                self.tables.borrow_mut().insert(page, vec![0; entries * g.l2_words()]);
                return Ok(());
            }
            self.free_later(g.cluster(old), 1);
        }
        let first = g.l2_index(guest);
        let last = first + entries - 1;
        let list = self.read_entries(slot, self.top(), table.offset, &g, first, last).await?;
        self.tables.borrow_mut().insert(page, list);
        Ok(())
    }

    async fn copy_cluster(&self, slot: u16, from: u64, to: u64) -> Result<(), Status> {
        let buf = self.data_buf(slot).await;
        let mut segs = SegList::EMPTY;
        let _one = segs.push(buf.seg());
        let mut status = self.io(slot, self.top(), Op::Read, from, segs).await;
        if status.is_ok() {
            status = self.io(slot, self.top(), Op::Write, to, segs).await;
        }
        self.give_data(buf);
        self.counters.meta_writes.set(self.counters.meta_writes.get() + 1);
        check(status)
    }

    /// Fills a host cluster with zeroes.
    async fn write_zero_cluster(&self, slot: u16, host: u64) -> Result<(), Status> {
        let mut segs = SegList::EMPTY;
        let _one = segs.push(self.zero_seg(self.geometry.cluster_size()));
        self.counters.meta_writes.set(self.counters.meta_writes.get() + 1);
        check(self.io(slot, self.top(), Op::Write, host, segs).await)
    }
}
