//! Without an IOMMU: [`BusAddresses`] says where memory is for the bus, page by page.
//!
//! A device then reaches all of memory, and an address that is wrong by a page lets it write over
//! somebody's data. So whatever is not certain is an error.

use std::any::Any;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use dma::{PageSize, Region};

use crate::Sysfs;
use crate::pin::Pin;

/// Size of the pages that are looked up.
const PAGE: usize = 4096;

/// Where a region's pages are for the bus.
pub struct Located {
    /// The address of each page of 4 KiB, in order.
    pub pages: Box<[u64]>,
    /// Keeps the pages there as long as it lives.
    pub hold: Box<dyn Any + Send + Sync>,
}

/// Vouches for bus addresses of memory.
pub trait BusAddresses: Send + Sync {
    /// Says where every page of a region is, and keeps it there.
    ///
    /// # Errors
    /// If any address is not certain, or might change.
    fn locate(&self, region: &Region) -> Result<Located, String>;
}

/// Bus addresses from `/proc/self/pagemap`: right where the bus sees memory as this kernel does, on
/// bare metal and in guests whose memory the host has mapped for the device.
///
/// Huge pages (hugetlb) are not swapped, compacted or balanced; they can still be moved by force
/// (`migrate_pages`, taking memory offline). Ordinary pages can be moved at any time, locked or not.
/// Both are pinned, which nothing moves; where the kernel pins nothing (no io_uring), huge pages
/// are accepted as they are, as every driver without an IOMMU does, and ordinary ones are refused.
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens the map of this process.
    ///
    /// # Errors
    /// If this kernel's addresses are not the bus's, or it does not tell them.
    pub fn open(sysfs: &Sysfs) -> Result<Pagemap, String> {
        refuse_xen(sysfs)?;
        let path = "/proc/self/pagemap";
        let file = File::open(path).map_err(|e| format!("{path}: {e}"))?;
        Ok(Pagemap { file })
    }

    /// Looks up all pages until two looks in a row agree. The kernel may just be trying to move a
    /// page: then it is mapped nowhere for a moment, until the kernel finds that it is pinned.
    fn settled(&self, region: &Region) -> Result<Box<[u64]>, String> {
        let mut before = Err("nothing was looked up".to_owned());
        for _ in 0..TRIES {
            let now = self.look_up(region);
            match (&before, &now) {
                (Ok(a), Ok(b)) if a == b => return now,
                (_, Err(e)) if e == NO_FRAMES => return now,
                _ => {}
            }
            // Brings a page back that is not mapped.
            for at in (0..region.len()).step_by(PAGE) {
                region.read(at, &mut [0]);
            }
            before = now;
            std::thread::sleep(Duration::from_millis(1));
        }
        before.and_then(|_| Err("DMA memory is moved about although it is pinned".to_owned()))
    }

    fn look_up(&self, region: &Region) -> Result<Box<[u64]>, String> {
        let first = region.base().as_ptr() as u64 / PAGE as u64;
        let mut bytes = vec![0; region.len() / PAGE * 8];
        let read = self.file.read_exact_at(&mut bytes, first * 8);
        read.map_err(|e| format!("/proc/self/pagemap: {e}"))?;
        bytes
            .chunks_exact(8)
            .map(|b| frame(u64::from_ne_bytes(b.try_into().unwrap_or_default())))
            .collect()
    }
}

/// Bit 63: the page is in memory; 62: it is swapped out; 54 to 0: its frame, 0 for those who may
/// not know.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FRAME: u64 = (1 << 55) - 1;

const NO_FRAMES: &str =
    "the kernel does not tell where DMA memory is: CAP_SYS_ADMIN is needed (run as root)";

/// How often addresses are looked up, a millisecond apart, until they stay the same.
const TRIES: usize = 1000;

/// The address in an entry of the page map.
fn frame(entry: u64) -> Result<u64, String> {
    if entry & PRESENT == 0 || entry & SWAPPED != 0 {
        return Err("a page of DMA memory is not resident, so it has no bus address".to_owned());
    }
    match entry & FRAME {
        0 => Err(NO_FRAMES.to_owned()),
        frame => frame
            .checked_mul(PAGE as u64)
            .ok_or_else(|| format!("page frame {frame:#x} has no address")),
    }
}

/// Under Xen a PV kernel's frame numbers are not the machine's.
fn refuse_xen(sysfs: &Sysfs) -> Result<(), String> {
    if sysfs.word("hypervisor/type").as_deref() != Some("xen") {
        return Ok(());
    }
    match sysfs.word("hypervisor/guest_type").as_deref() {
        Some("HVM" | "PVH") => Ok(()),
        kind => Err(format!(
            "this is a Xen {} domain: what its kernel says of memory are no machine addresses, and \
             a device given them would write over somebody's memory. Use the disk through the \
             kernel's driver (a file: node), or drive it from an HVM or PVH domain",
            kind.unwrap_or("PV (or unknown)")
        )),
    }
}

impl BusAddresses for Pagemap {
    fn locate(&self, region: &Region) -> Result<Located, String> {
        // First pinned, then looked up: pinning may move pages out of places that must stay movable.
        let hold: Box<dyn Any + Send + Sync> = match (Pin::new(region), region.page_size()) {
            (Ok(pin), _) => Box::new(pin),
            (Err(e), PageSize::Huge2M | PageSize::Huge1G) => {
                log::info!("huge pages for DMA are not pinned ({e})");
                Box::new(())
            }
            (Err(e), PageSize::Small) => {
                return Err(format!(
                    "ordinary pages of memory may be moved at any time, and they cannot be pinned \
                     ({e}): reserve huge pages (sysctl vm.nr_hugepages=128), or allow io_uring \
                     (sysctl kernel.io_uring_disabled=0) and as much locked memory (ulimit -l)"
                ));
            }
        };
        let pages = self.settled(region)?;
        Ok(Located { pages, hold })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn entries_of_the_page_map() {
        assert_eq!(frame(PRESENT | 0x1234 | 1 << 55), Ok(0x123_4000));
        for bad in [0, 0x1234, SWAPPED | 0x1234, PRESENT | SWAPPED | 1, PRESENT] {
            assert!(frame(bad).is_err(), "{bad:#x}");
        }
        assert!(frame(PRESENT).unwrap_err().contains("CAP_SYS_ADMIN"));
    }

    #[test]
    fn a_pv_domain_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let sysfs = Sysfs::new(dir.path());
        assert_eq!(refuse_xen(&sysfs), Ok(()), "no hypervisor that says so");
        fs::create_dir(dir.path().join("hypervisor")).unwrap();
        fs::write(dir.path().join("hypervisor/type"), "xen\n").unwrap();
        let says = |text: &str| fs::write(dir.path().join("hypervisor/guest_type"), text).unwrap();
        assert!(refuse_xen(&sysfs).is_err(), "it does not say which kind");
        for (text, good) in [("PV\n", false), ("PVH\n", true), ("HVM\n", true), ("", false)] {
            says(text);
            assert_eq!(refuse_xen(&sysfs).is_ok(), good, "{text:?}");
        }
    }

    #[test]
    fn where_the_kernel_tells_every_page_has_its_own_frame() {
        let region = Region::new(64 << 10, PageSize::Small).unwrap();
        let Ok(map) = Pagemap::open(&Sysfs::default()) else { return };
        match map.locate(&region) {
            Ok(found) => {
                let mut pages = found.pages.to_vec();
                assert_eq!(pages.len(), 16);
                pages.sort_unstable();
                pages.dedup();
                assert_eq!(pages.len(), 16);
                assert_eq!(map.look_up(&region).unwrap(), found.pages, "they stay there");
            }
            Err(e) => assert!(e.contains("CAP_SYS_ADMIN") || e.contains("pinned"), "{e}"),
        }
    }
}
