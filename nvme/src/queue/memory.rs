//! [`QueueMemory`]: the memory of one queue pair that the device reads and writes besides data:
//! submission queue, completion queue, and a PRP list per tracker, in one region.
//!
//! Shared by the queue pair and the controller, which tells the device where it is.

use std::sync::Arc;

use dma::Region;
use nvme_spec::{CQE_SIZE, SQE_SIZE};

use crate::Error;
use crate::memory::{DeviceMemory, Mapping};
use crate::prp::LIST_BYTES;

/// Where the parts lie in the region.
pub(crate) struct QueueMemory {
    pub(crate) mapping: Arc<Mapping>,
    /// Entries of each ring, a power of two.
    pub(crate) entries: u32,
    cq: usize,
    lists: usize,
}

/// Entries of a submission queue within one 4 KiB page.
const ONE_PAGE: u32 = 4096 / SQE_SIZE as u32;

impl QueueMemory {
    /// Rings of `entries` (a power of two), or of as many as fit one page where more are not
    /// contiguous for the device (CAP.CQR; PRP lists for queues are not used).
    pub(crate) fn new(device: &Arc<DeviceMemory>, entries: u32) -> Result<QueueMemory, Error> {
        let what = "an I/O queue";
        let memory = |why: String| Error::Memory { what, why };
        let page = 1usize << device.page_shift();
        let mut entries = entries;
        loop {
            let cq = (entries as usize * SQE_SIZE).next_multiple_of(page);
            let lists = (cq + entries as usize * CQE_SIZE).next_multiple_of(page);
            let bytes = lists + entries as usize * LIST_BYTES;
            let region = Region::new_best(bytes).map_err(|e| memory(e.to_string()))?;
            let mapping = device.map(&region).map_err(memory)?;
            if mapping.contiguous(0, entries as u64 * SQE_SIZE as u64)
                && mapping.contiguous(cq as u64, entries as u64 * CQE_SIZE as u64)
            {
                return Ok(QueueMemory { mapping, entries, cq, lists });
            }
            if entries <= ONE_PAGE {
                return Err(memory("not even one page is contiguous for the device".to_owned()));
            }
            entries = ONE_PAGE;
        }
    }

    /// Bus address of the submission queue.
    pub(crate) fn sq_bus(&self) -> u64 {
        self.mapping.bus(0)
    }

    /// Bus address of the completion queue.
    pub(crate) fn cq_bus(&self) -> u64 {
        self.mapping.bus(self.cq as u64)
    }

    /// Where the completion queue begins in the region; the submission queue begins at 0.
    pub(super) fn cq(&self) -> usize {
        self.cq
    }

    /// Where the PRP list of a tracker begins in the region.
    #[inline]
    pub(super) fn list(&self, slot: usize) -> usize {
        self.lists + slot * LIST_BYTES
    }

    /// Makes the completion queue what a device expects of a new one: no entry has phase 1.
    pub(crate) fn clear(&self) {
        self.mapping.region().zero(self.cq, self.entries as usize * CQE_SIZE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::FakeMapper;
    use crate::memory::{DeviceMemory, IovaMap};

    #[test]
    fn parts_are_page_aligned_and_lists_cross_no_page() {
        for (shift, entries) in [(12, 2), (12, 64), (12, 1024), (14, 256)] {
            let mapper = FakeMapper::new(|_| IovaMap::Contiguous(1 << 30));
            let memory = DeviceMemory::new(mapper, shift);
            let m = QueueMemory::new(&memory, entries).unwrap();
            assert_eq!(m.entries, entries);
            assert!((m.sq_bus() | m.cq_bus()).is_multiple_of(1 << shift));
            assert!(m.cq_bus() >= m.sq_bus() + u64::from(entries) * 64);
            for slot in [0, 1, entries as usize - 1] {
                let at = m.mapping.bus(m.list(slot) as u64);
                assert_eq!(at >> shift, (at + LIST_BYTES as u64 - 1) >> shift);
                assert!(m.list(slot) + LIST_BYTES <= m.mapping.region().len());
            }
        }
    }

    #[test]
    fn scattered_pages_shrink_the_queue_to_one() {
        let mapper = FakeMapper::new(|r| {
            IovaMap::Pages((0..r.len() as u64 / 4096).map(|i| (1 << 30) - i * 8192).collect())
        });
        let memory = DeviceMemory::new(mapper, 12);
        assert_eq!(QueueMemory::new(&memory, 1024).unwrap().entries, 64);
        assert_eq!(QueueMemory::new(&memory, 32).unwrap().entries, 32);
    }
}
