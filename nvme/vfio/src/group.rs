//! Groups of the kernel's older interface, and the type1 container that they are put into.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use zerocopy::FromBytes;

use crate::abi::{self, DmaUnmap, GroupStatus, Pair, Type1Info};
use crate::{Address, Error, Function, Group, Sysfs, ioctl};

/// Room for the information on an IOMMU with its capabilities: they take some hundred bytes.
const INFO_ROOM: usize = 4096;

/// Opens a new container.
pub(crate) fn open_container(dev: &Path) -> Result<OwnedFd, Error> {
    let path = dev.join("vfio/vfio");
    let fd = open(&path)?;
    let version = ioctl::plain(fd.as_fd(), ioctl::GET_API_VERSION, 0)
        .map_err(Error::os(format!("{}: asking for the version", path.display())))?;
    if version != abi::API_VERSION {
        return Err(Error::Odd(format!("VFIO has version {version}, not {}", abi::API_VERSION)));
    }
    Ok(fd)
}

/// Opens one of VFIO's files.
pub(crate) fn open(path: &Path) -> Result<OwnedFd, Error> {
    match File::options().read(true).write(true).open(path) {
        Ok(file) => Ok(file.into()),
        Err(e) => {
            let next = match e.kind() {
                ErrorKind::NotFound => "; load the driver: modprobe vfio-pci",
                ErrorKind::PermissionDenied => "; run as root, or give the file to your user",
                ErrorKind::ResourceBusy => {
                    "; another process drives a device of this group (fuser names it)"
                }
                _ => "",
            };
            Err(Error::Host(format!("{}: {e}{next}", path.display())))
        }
    }
}

/// Opens a function's group and puts it into the container.
pub(crate) fn open_group(
    dev: &Path,
    sysfs: &Sysfs,
    function: &Function,
    group: Group,
    container: BorrowedFd<'_>,
) -> Result<OwnedFd, Error> {
    let prefix = if group.no_iommu { "noiommu-" } else { "" };
    let fd = open(&dev.join(format!("vfio/{prefix}{}", group.number)))?;
    let mut status = GroupStatus::default();
    ioctl::sized(fd.as_fd(), ioctl::GROUP_GET_STATUS, &mut status)
        .map_err(Error::os(format!("asking for IOMMU group {}", group.number)))?;
    if status.flags & abi::GROUP_VIABLE == 0 {
        return Err(Error::Host(not_viable(function.address, group, &sysfs.members(group))));
    }
    ioctl::set_container(fd.as_fd(), container)
        .map_err(Error::os(format!("putting IOMMU group {} into a container", group.number)))?;
    Ok(fd)
}

/// Who stands in the way of a group's use.
fn not_viable(address: Address, group: Group, members: &[(Address, Option<String>)]) -> String {
    let others: Vec<String> = members
        .iter()
        .filter(|(a, driver)| *a != address && driver.as_deref() != Some("vfio-pci"))
        .filter_map(|(a, driver)| Some(format!("{a} (driver {})", driver.as_deref()?)))
        .collect();
    format!(
        "{address} shares IOMMU group {} with {}: devices of a group cannot be kept apart, so bind \
         those to vfio-pci too, or leave them without a driver",
        group.number,
        if others.is_empty() { "others".to_owned() } else { others.join(", ") }
    )
}

/// Says what kind of container it is; it has its first group.
pub(crate) fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> Result<(), Error> {
    match ioctl::plain(container, ioctl::SET_IOMMU, kind) {
        Ok(_) => Ok(()),
        Err(Errno::EPERM) if kind == abi::TYPE1V2_IOMMU => Err(Error::Host(
            "the platform does not remap interrupts, so VFIO refuses the device: switch interrupt \
             remapping on in the firmware, or, if nobody hostile drives devices here, modprobe \
             vfio_iommu_type1 allow_unsafe_interrupts=1"
                .to_owned(),
        )),
        Err(Errno::EPERM) => Err(Error::Host(
            "driving a device without an IOMMU needs CAP_SYS_RAWIO (run as root)".to_owned(),
        )),
        Err(e) => Err(Error::os("setting up the IOMMU")(e)),
    }
}

/// What the kernel says of a type1 IOMMU.
#[derive(Debug, PartialEq, Eq, Default)]
pub(crate) struct Info {
    /// Usable ranges; `None` if it does not say.
    pub(crate) ranges: Option<Vec<(u64, u64)>>,
    /// Sizes of pages, a bit for each; 0 if it does not say.
    pub(crate) page_sizes: u64,
    /// How many mappings it takes yet.
    pub(crate) mappings: Option<u32>,
}

/// Asks for it.
pub(crate) fn info(container: BorrowedFd<'_>) -> Result<Info, Error> {
    let mut bytes = vec![0; INFO_ROOM];
    ioctl::sized_bytes(container, ioctl::IOMMU_GET_INFO, &mut bytes)
        .map_err(Error::os("asking for the IOMMU's ranges"))?;
    parse(&bytes).ok_or_else(|| Error::Odd("the kernel says nothing of the IOMMU".to_owned()))
}

fn parse(bytes: &[u8]) -> Option<Info> {
    let (head, _) = Type1Info::read_from_prefix(bytes).ok()?;
    let mut info = Info::default();
    if head.flags & abi::TYPE1_PGSIZES != 0 {
        info.page_sizes = head.iova_pgsizes;
    }
    let first = if head.flags & abi::TYPE1_CAPS != 0 { head.cap_offset } else { 0 };
    for (id, body) in abi::capabilities(bytes, first) {
        match id {
            abi::CAP_TYPE1_RANGES => {
                info.ranges = Some(abi::pairs(body).iter().map(|p| (p.start, p.end)).collect());
            }
            abi::CAP_TYPE1_DMA_AVAIL => {
                info.mappings = body.get(8..12).and_then(|b| u32::read_from_bytes(b).ok());
            }
            _ => {}
        }
    }
    Some(info)
}

impl Info {
    /// The ranges, or what is assumed where the kernel does not say.
    pub(crate) fn usable(&self) -> Vec<Pair> {
        match &self.ranges {
            Some(r) => r.iter().map(|&(start, end)| Pair { start, end }).collect(),
            None => crate::iova::ASSUMED.to_vec(),
        }
    }
}

/// Ends a mapping; returns how many bytes were unmapped.
pub(crate) fn unmap(container: BorrowedFd<'_>, iova: u64, size: u64) -> Result<u64, Errno> {
    let mut arg = DmaUnmap { iova, size, ..Default::default() };
    ioctl::sized(container, ioctl::IOMMU_UNMAP_DMA, &mut arg)?;
    Ok(arg.size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn capabilities_of_an_iommu() {
        let head = Type1Info {
            argsz: 0,
            flags: abi::TYPE1_PGSIZES | abi::TYPE1_CAPS,
            iova_pgsizes: 0x4020_1000,
            cap_offset: 24,
            pad: 0,
        };
        let mut bytes = head.as_bytes().to_vec();
        // DMA available, then ranges.
        bytes.extend([3, 0, 1, 0, 36, 0, 0, 0, 255, 255, 0, 0]);
        bytes.extend([1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(Pair { start: 0, end: 0xfedf_ffff }.as_bytes());
        let info = parse(&bytes).unwrap();
        assert_eq!(info.ranges, Some(vec![(0, 0xfedf_ffff)]));
        assert_eq!((info.page_sizes, info.mappings), (0x4020_1000, Some(65535)));
        let bare = parse(&[0; 24]).unwrap();
        assert_eq!(bare, Info::default());
        assert_eq!(bare.usable().len(), 2);
        assert!(parse(&[0; 10]).is_none());
    }

    #[test]
    fn who_stands_in_the_way_is_named() {
        let [a, b, c, d]: [Address; 4] =
            std::array::from_fn(|i| Address { domain: 0, bus: 1, device: 0, function: i as u8 });
        let vfio = || Some("vfio-pci".to_owned());
        let members = [(a, vfio()), (b, Some("snd".to_owned())), (c, None), (d, vfio())];
        let text = not_viable(a, Group { number: 4, no_iommu: false }, &members);
        assert!(text.contains("group 4 with 0000:01:00.1 (driver snd): "), "{text}");
    }
}
