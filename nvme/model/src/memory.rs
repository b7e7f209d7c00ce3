//! Host memory as the device reaches it: by bus address, with faults.
//!
//! [`HostMemory`] is the seam; [`Iommu`] and [`RegionMemory`] are its two halves over
//! [`dma::Region`]s: the host maps regions at bus addresses through the first, from a control
//! thread, and the controller reads and writes through the second, on the thread that steps it.
//! A new mapping is seen before any doorbell rung after it; an unmapped one is no longer entered
//! once `unmap` has returned (a copy that was under way may still end, into memory that is kept
//! until then).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use dma::{Held, Region};
use nvme_spec::{Cqe, Sqe};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// The device touched a bus address that nothing is mapped at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("DMA fault: {} at bus address {addr:#x}", if *.write { "write" } else { "read" })]
pub struct DmaFault {
    /// First address that could not be reached.
    pub addr: u64,
    /// Whether the device wrote.
    pub write: bool,
}

/// Memory of the host, by bus address.
pub trait HostMemory {
    /// The device reads `into.len()` bytes at `addr`.
    ///
    /// # Errors
    /// If any byte is not mapped; `into` then holds anything.
    fn read(&mut self, addr: u64, into: &mut [u8]) -> Result<(), DmaFault>;

    /// The device writes `from` at `addr`.
    ///
    /// # Errors
    /// If any byte is not mapped; bytes before it may have been written.
    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), DmaFault>;

    /// The device reads a dword at a multiple of 4, in one access, and nothing later before it.
    ///
    /// # Errors
    /// If it is not mapped.
    fn read_u32(&mut self, addr: u64) -> Result<u32, DmaFault>;

    /// The device writes a dword at a multiple of 4, in one access, and nothing earlier after it.
    ///
    /// # Errors
    /// If it is not mapped.
    fn write_u32(&mut self, addr: u64, value: u32) -> Result<(), DmaFault>;

    /// The device fetches a submission queue entry, at a multiple of 64.
    ///
    /// # Errors
    /// If it is not mapped.
    fn read_sqe(&mut self, addr: u64) -> Result<Sqe, DmaFault> {
        let mut sqe = Sqe::new_zeroed();
        self.read(addr, sqe.as_mut_bytes())?;
        Ok(sqe)
    }

    /// The device publishes a completion queue entry, at a multiple of 16. A host that sees the
    /// new phase bit must see the whole entry, and all data written before.
    ///
    /// # Errors
    /// If it is not mapped.
    fn write_cqe(&mut self, addr: u64, cqe: &Cqe) -> Result<(), DmaFault>;

    /// The device raises an interrupt vector: a write of its own on the bus, after the entry that it
    /// is about. Nobody listens here; a host that polls needs none.
    fn raise(&mut self, _vector: u16) {}
}

/// Pages are mapped whole: bus addresses and lengths are multiples of this.
pub const IOVA_PAGE: u64 = 4096;

/// Where [`Iommu::map`] begins; lower addresses, 0 above all, fault.
const FIRST_IOVA: u64 = 1 << 32;

/// Why a region cannot be mapped or unmapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// The bus address is not a multiple of [`IOVA_PAGE`], or the region's end exceeds 64 bits.
    #[error("cannot map {len} bytes at bus address {iova:#x}: not whole pages below 2^64")]
    Range {
        /// Bus address asked for.
        iova: u64,
        /// Length of the region.
        len: usize,
    },
    /// Part of the range is mapped already.
    #[error("bus address {0:#x} is mapped already")]
    Overlap(u64),
    /// Nothing is mapped at that address.
    #[error("nothing is mapped at bus address {0:#x}")]
    NotMapped(u64),
    /// The region is not mapped.
    #[error("the region is not mapped")]
    Unknown,
    /// The controller is gone.
    #[error("the controller no longer exists")]
    Closed,
}

#[derive(Debug)]
struct Mapping {
    iova: u64,
    region: Held,
    revoked: AtomicBool,
}

impl Mapping {
    fn end(&self) -> u64 {
        self.iova + self.region.len() as u64
    }
}

/// The host's half: maps and unmaps regions.
#[derive(Debug)]
pub struct Iommu {
    to_device: Sender<Arc<Mapping>>,
    changes: Arc<AtomicU64>,
    live: Vec<Live>,
    /// Where [`Iommu::map`] puts the next region.
    next: u64,
}

#[derive(Debug)]
struct Live {
    mapping: Arc<Mapping>,
    /// How often the region was mapped.
    count: usize,
}

/// The device's half: [`HostMemory`] over what is mapped.
#[derive(Debug)]
pub struct RegionMemory {
    from_host: Receiver<Arc<Mapping>>,
    changes: Arc<AtomicU64>,
    seen: u64,
    /// Sorted by bus address.
    live: Vec<Arc<Mapping>>,
    /// Index of the mapping hit last.
    last: usize,
}

/// An empty address space: the host's half and the device's.
pub fn iommu() -> (Iommu, RegionMemory) {
    let (to_device, from_host) = channel();
    let changes = Arc::new(AtomicU64::new(0));
    let memory = RegionMemory {
        from_host,
        changes: Arc::clone(&changes),
        seen: 0,
        live: Vec::new(),
        last: 0,
    };
    (Iommu { to_device, changes, live: Vec::new(), next: FIRST_IOVA }, memory)
}

impl Iommu {
    /// Maps a region at a bus address chosen here, with unmapped pages before and behind it. A
    /// region that is mapped already gets the same address again, and is counted.
    ///
    /// # Errors
    /// If the controller is gone or the address space used up.
    pub fn map(&mut self, region: &Arc<Region>) -> Result<u64, MapError> {
        if let Some(live) = self.live.iter_mut().find(|l| l.mapping.region.id() == region.id()) {
            live.count += 1;
            return Ok(live.mapping.iova);
        }
        let iova = self.next;
        let len = region.len() as u64;
        // Huge pages are looked for at multiples of themselves.
        let after = iova.checked_add(len).and_then(|end| end.checked_next_multiple_of(1 << 21));
        let after = after.and_then(|end| end.checked_add(1 << 21));
        self.next = after.ok_or(MapError::Range { iova, len: region.len() })?;
        self.map_at(iova, region)?;
        Ok(iova)
    }

    /// Undoes one [`Iommu::map`].
    ///
    /// # Errors
    /// If the region is not mapped.
    pub fn unmap(&mut self, region: &Region) -> Result<(), MapError> {
        let found = self.live.iter().position(|l| l.mapping.region.id() == region.id());
        let at = found.ok_or(MapError::Unknown)?;
        self.live[at].count -= 1;
        if self.live[at].count == 0 {
            self.revoke(at);
        }
        Ok(())
    }

    /// Maps a whole region at bus address `iova`.
    ///
    /// # Errors
    /// If the range is not whole pages, or overlaps another mapping.
    pub fn map_at(&mut self, iova: u64, region: &Arc<Region>) -> Result<(), MapError> {
        let range = MapError::Range { iova, len: region.len() };
        let end = iova.checked_add(region.len() as u64).ok_or(range)?;
        if !iova.is_multiple_of(IOVA_PAGE) || !(region.len() as u64).is_multiple_of(IOVA_PAGE) {
            return Err(range);
        }
        let overlaps = |l: &&Live| l.mapping.iova < end && iova < l.mapping.end();
        if let Some(other) = self.live.iter().find(overlaps) {
            return Err(MapError::Overlap(other.mapping.iova.max(iova)));
        }
        let mapping =
            Arc::new(Mapping { iova, region: Held::new(region), revoked: AtomicBool::new(false) });
        self.to_device.send(Arc::clone(&mapping)).map_err(|_| MapError::Closed)?;
        self.live.push(Live { mapping, count: 1 });
        self.changes.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Removes the mapping that begins at `iova`, however often it was made.
    ///
    /// # Errors
    /// If there is none.
    pub fn unmap_at(&mut self, iova: u64) -> Result<(), MapError> {
        let at = self.live.iter().position(|l| l.mapping.iova == iova);
        self.revoke(at.ok_or(MapError::NotMapped(iova))?);
        Ok(())
    }

    fn revoke(&mut self, at: usize) {
        let live = self.live.swap_remove(at);
        live.mapping.revoked.store(true, Ordering::Release);
        self.changes.fetch_add(1, Ordering::Release);
    }
}

impl RegionMemory {
    #[cold]
    fn refresh(&mut self, changes: u64) {
        self.seen = changes;
        self.live.extend(self.from_host.try_iter());
        self.live.retain(|m| !m.revoked.load(Ordering::Acquire));
        self.live.sort_by_key(|m| m.iova);
    }

    /// The mapping that holds `addr`, with the offset inside its region.
    #[inline]
    fn locate(&mut self, addr: u64, write: bool) -> Result<(&Region, usize), DmaFault> {
        let changes = self.changes.load(Ordering::Acquire);
        if changes != self.seen {
            self.refresh(changes);
        }
        let hit = self.live.get(self.last).is_some_and(|m| m.iova <= addr && addr < m.end());
        if !hit {
            let above = self.live.partition_point(|m| m.iova <= addr);
            let index = above.checked_sub(1).filter(|&i| addr < self.live[i].end());
            self.last = index.ok_or(DmaFault { addr, write })?;
        }
        let mapping = &self.live[self.last];
        Ok((&mapping.region, (addr - mapping.iova) as usize))
    }
}

impl HostMemory for RegionMemory {
    fn read(&mut self, addr: u64, into: &mut [u8]) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < into.len() {
            let at = addr.checked_add(done as u64).ok_or(DmaFault { addr, write: false })?;
            let (region, offset) = self.locate(at, false)?;
            let n = (into.len() - done).min(region.len() - offset);
            region.read(offset, &mut into[done..done + n]);
            done += n;
        }
        Ok(())
    }

    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < from.len() {
            let at = addr.checked_add(done as u64).ok_or(DmaFault { addr, write: true })?;
            let (region, offset) = self.locate(at, true)?;
            let n = (from.len() - done).min(region.len() - offset);
            region.write(offset, &from[done..done + n]);
            done += n;
        }
        Ok(())
    }

    fn read_u32(&mut self, addr: u64) -> Result<u32, DmaFault> {
        let (region, offset) = self.locate(addr, false)?;
        Ok(u32::from_le(region.load32(offset, Ordering::Acquire)))
    }

    fn write_u32(&mut self, addr: u64, value: u32) -> Result<(), DmaFault> {
        let (region, offset) = self.locate(addr, true)?;
        region.store32(offset, value.to_le(), Ordering::Release);
        Ok(())
    }

    fn read_sqe(&mut self, addr: u64) -> Result<Sqe, DmaFault> {
        // Regions are whole pages, so an aligned entry never straddles two.
        let (region, offset) = self.locate(addr, false)?;
        let words: [u64; 8] = region.read_words(offset);
        let mut bytes = [0; 64];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        Ok(Sqe::read_from_bytes(&bytes).unwrap_or_default())
    }

    fn write_cqe(&mut self, addr: u64, cqe: &Cqe) -> Result<(), DmaFault> {
        let (region, offset) = self.locate(addr, true)?;
        let mut halves = [0u64; 2];
        for (half, bytes) in halves.iter_mut().zip(cqe.as_bytes().chunks_exact(8)) {
            *half = bytes.iter().rev().fold(0, |word, &b| word << 8 | u64::from(b));
        }
        region.store64(offset, halves[0].to_le(), Ordering::Relaxed);
        // The second half holds the phase bit; release orders it after the first and after data.
        region.store64(offset + 8, halves[1].to_le(), Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dma::PageSize;
    use nvme_spec::Status;

    #[test]
    fn straddles_neighbours_and_faults_outside() {
        let (mut host, mut dev) = iommu();
        let a = Region::new(4096, PageSize::Small).unwrap();
        let b = Region::new(4096, PageSize::Small).unwrap();
        assert_eq!(dev.read(0x1000, &mut [0]), Err(DmaFault { addr: 0x1000, write: false }));
        host.map_at(0x2000, &b).unwrap();
        host.map_at(0x1000, &a).unwrap();
        dev.write(0x1ffe, &[1, 2, 3, 4]).unwrap();
        let mut tail = [0; 2];
        a.read(4094, &mut tail);
        assert_eq!(tail, [1, 2]);
        b.read(0, &mut tail);
        assert_eq!(tail, [3, 4]);
        assert_eq!(dev.write(0x2fff, &[1, 2]), Err(DmaFault { addr: 0x3000, write: true }));
        assert!(dev.read(u64::MAX, &mut [0; 2]).is_err());
        host.unmap_at(0x1000).unwrap();
        assert!(dev.read(0x1ffe, &mut [0; 4]).is_err());
        assert!(dev.read(0x2000, &mut [0; 4]).is_ok());
    }

    #[test]
    fn bad_maps_are_refused() {
        let (mut host, dev) = iommu();
        let a = Region::new(8192, PageSize::Small).unwrap();
        host.map_at(0x10000, &a).unwrap();
        assert_eq!(host.map_at(0x11000, &a), Err(MapError::Overlap(0x11000)));
        assert_eq!(host.map_at(0xf000, &a), Err(MapError::Overlap(0x10000)));
        assert!(matches!(host.map_at(0x800, &a), Err(MapError::Range { .. })));
        assert!(matches!(host.map_at(u64::MAX - 4095, &a), Err(MapError::Range { .. })));
        assert_eq!(host.unmap_at(0x11000), Err(MapError::NotMapped(0x11000)));
        drop(dev);
        assert_eq!(host.map_at(0x20000, &a), Err(MapError::Closed));
    }

    #[test]
    fn chosen_addresses_are_apart_and_counted() {
        let (mut host, mut dev) = iommu();
        let a = Region::new(4096, PageSize::Small).unwrap();
        let b = Region::new(4096, PageSize::Small).unwrap();
        let at = host.map(&a).unwrap();
        assert_eq!(host.map(&a), Ok(at));
        let next = host.map(&b).unwrap();
        assert!(next > at + 4096);
        assert!(dev.write(at + 4095, &[1, 2]).is_err());
        assert!(dev.write(next, &[1, 2]).is_ok());
        host.unmap(&a).unwrap();
        assert!(dev.write(at, &[1]).is_ok());
        host.unmap(&a).unwrap();
        assert!(dev.write(at, &[1]).is_err());
        assert_eq!(host.unmap(&a), Err(MapError::Unknown));
        // The device lets go of the memory.
        assert_eq!((a.tables(), b.tables()), (0, 1));
    }

    #[test]
    fn entries_keep_their_bytes() {
        let (mut host, mut dev) = iommu();
        let a = Region::new(4096, PageSize::Small).unwrap();
        host.map_at(0, &a).unwrap();
        let sqe = Sqe::write(0x1234, 7, 0x1122_3344_5566, 3, 0).with_prps(1, 2);
        a.write(64, sqe.as_bytes());
        assert_eq!(dev.read_sqe(64).unwrap(), sqe);
        let cqe = Cqe::new(0xdead_beef, 1, 2, 3, Status::from_raw(0x4002), true);
        dev.write_cqe(16, &cqe).unwrap();
        let mut back = [0; 16];
        a.read(16, &mut back);
        assert_eq!(back, cqe.as_bytes());
    }
}
