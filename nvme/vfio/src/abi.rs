//! The kernel's interface as it stands in `linux/vfio.h` and `linux/iommufd.h`: numbers, layouts and
//! the chain of capabilities. Pure; fields have the kernel's names.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Defines structures that are passed to the kernel as they are, with their sizes.
macro_rules! kernel {
    ($($(#[doc = $doc:literal])* $name:ident($size:literal) { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Default, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(crate) struct $name { $(pub(crate) $field: $kind),* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

kernel! {
    /// `vfio_group_status`
    GroupStatus(8) { argsz: u32, flags: u32 }
    /// `vfio_device_info`
    DeviceInfo(24) { argsz: u32, flags: u32, num_regions: u32, num_irqs: u32, cap_offset: u32, pad: u32 }
    /// `vfio_region_info`
    RegionInfo(32) { argsz: u32, flags: u32, index: u32, cap_offset: u32, size: u64, offset: u64 }
    /// `vfio_irq_info`
    IrqInfo(16) { argsz: u32, flags: u32, index: u32, count: u32 }
    /// `vfio_irq_set` with one descriptor behind it
    IrqSet(24) { argsz: u32, flags: u32, index: u32, start: u32, count: u32, fd: i32 }
    /// `vfio_irq_set` with nothing behind it
    IrqSetNone(20) { argsz: u32, flags: u32, index: u32, start: u32, count: u32 }
    /// `vfio_iommu_type1_info`
    Type1Info(24) { argsz: u32, flags: u32, iova_pgsizes: u64, cap_offset: u32, pad: u32 }
    /// `vfio_iommu_type1_dma_map`
    DmaMap(32) { argsz: u32, flags: u32, vaddr: u64, iova: u64, size: u64 }
    /// `vfio_iommu_type1_dma_unmap`
    DmaUnmap(24) { argsz: u32, flags: u32, iova: u64, size: u64 }
    /// `vfio_info_cap_header`
    CapHeader(8) { id: u16, version: u16, next: u32 }
    /// A range of addresses, of an IOMMU (`end` inclusive) or of a region's mappable part (`end` is
    /// the size there)
    Pair(16) { start: u64, end: u64 }
    /// `vfio_device_bind_iommufd`
    BindIommufd(16) { argsz: u32, flags: u32, iommufd: i32, out_devid: u32 }
    /// `vfio_device_attach_iommufd_pt`
    AttachPt(12) { argsz: u32, flags: u32, pt_id: u32 }
    /// `iommu_ioas_alloc`
    IoasAlloc(12) { size: u32, flags: u32, out_ioas_id: u32 }
    /// `iommu_ioas_iova_ranges`
    IoasRanges(32) { size: u32, ioas_id: u32, num_iovas: u32, reserved: u32, allowed_iovas: u64, out_iova_alignment: u64 }
    /// `iommu_ioas_map`
    IoasMap(40) { size: u32, flags: u32, ioas_id: u32, reserved: u32, user_va: u64, length: u64, iova: u64 }
    /// `iommu_ioas_unmap`
    IoasUnmap(24) { size: u32, ioas_id: u32, iova: u64, length: u64 }
}

/// `VFIO_API_VERSION`
pub(crate) const API_VERSION: i32 = 0;
pub(crate) const TYPE1V2_IOMMU: u32 = 3;
pub(crate) const NOIOMMU_IOMMU: u32 = 8;
pub(crate) const GROUP_VIABLE: u32 = 1;
pub(crate) const DEVICE_RESET: u32 = 1;
pub(crate) const DEVICE_PCI: u32 = 2;
pub(crate) const REGION_READ: u32 = 1;
pub(crate) const REGION_WRITE: u32 = 2;
pub(crate) const REGION_MMAP: u32 = 4;
pub(crate) const REGION_CAPS: u32 = 8;
pub(crate) const REGION_BAR0: u32 = 0;
pub(crate) const REGION_CONFIG: u32 = 7;
pub(crate) const CAP_REGION_SPARSE: u16 = 1;
pub(crate) const IRQ_EVENTFD: u32 = 1;
pub(crate) const IRQ_SET_NONE: u32 = 1;
pub(crate) const IRQ_SET_EVENTFD: u32 = 4;
pub(crate) const IRQ_SET_TRIGGER: u32 = 32;
pub(crate) const IRQ_MSIX: u32 = 2;
pub(crate) const IRQ_ERR: u32 = 3;
pub(crate) const IRQ_REQ: u32 = 4;
pub(crate) const TYPE1_PGSIZES: u32 = 1;
pub(crate) const TYPE1_CAPS: u32 = 2;
pub(crate) const CAP_TYPE1_RANGES: u16 = 1;
pub(crate) const CAP_TYPE1_DMA_AVAIL: u16 = 3;
pub(crate) const DMA_READ_WRITE: u32 = 1 | 2;
pub(crate) const IOAS_FIXED_READ_WRITE: u32 = 1 | 2 | 4;

/// Most capabilities that a chain is followed for: there are a handful.
const MOST_CAPS: usize = 64;

/// The capabilities behind an information structure: (id, bytes from its header on). `bytes` is all
/// that the kernel wrote. Offsets that lead outside or round in circles end the chain.
pub(crate) fn capabilities(bytes: &[u8], first: u32) -> impl Iterator<Item = (u16, &[u8])> {
    let mut at = first as usize;
    let mut left = MOST_CAPS;
    std::iter::from_fn(move || {
        if at == 0 || left == 0 {
            return None;
        }
        left -= 1;
        let body = bytes.get(at..)?;
        let (header, _) = CapHeader::read_from_prefix(body).ok()?;
        at = header.next as usize;
        Some((header.id, body))
    })
}

/// The list of pairs in a capability of ranges or areas: a header, a count, a gap, the pairs.
pub(crate) fn pairs(capability: &[u8]) -> Vec<Pair> {
    let Some(count) = capability.get(8..12).and_then(|b| u32::read_from_bytes(b).ok()) else {
        return Vec::new();
    };
    let list = capability.get(16..).unwrap_or(&[]);
    list.chunks_exact(size_of::<Pair>())
        .take(count as usize)
        .filter_map(|c| Pair::read_from_bytes(c).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capability(id: u16, next: u32, pairs: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = CapHeader { id, version: 1, next }.as_bytes().to_vec();
        bytes.extend((pairs.len() as u32).to_ne_bytes());
        bytes.extend([0; 4]);
        for &(start, end) in pairs {
            bytes.extend(Pair { start, end }.as_bytes());
        }
        bytes
    }

    #[test]
    fn chains_are_followed() {
        let mut bytes = vec![0; 24];
        bytes.extend(capability(3, 24 + 32, &[(1, 2)]));
        bytes.extend(capability(1, 0, &[(3, 4), (5, 6)]));
        let found: Vec<_> = capabilities(&bytes, 24).map(|(id, b)| (id, pairs(b).len())).collect();
        assert_eq!(found, [(3, 1), (1, 2)]);
        assert_eq!(capabilities(&bytes, 0).count(), 0);
    }

    #[test]
    fn broken_chains_end() {
        let mut bytes = vec![0; 24];
        bytes.extend(capability(1, 24, &[]));
        assert_eq!(capabilities(&bytes, 24).count(), MOST_CAPS, "a circle");
        assert_eq!(capabilities(&bytes, 1000).count(), 0);
        assert_eq!(capabilities(&bytes, 36).count(), 0, "a header that is cut off");
        let mut lie = capability(1, 0, &[(1, 2)]);
        lie[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(pairs(&lie).len(), 1, "a count past the end");
        assert!(pairs(&lie[..9]).is_empty());
    }
}
