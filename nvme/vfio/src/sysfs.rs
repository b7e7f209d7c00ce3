//! [`Sysfs`]: which PCI functions there are, and what holds them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Address, Error};

/// The class code of an NVMe controller: mass storage, non-volatile memory, NVM Express.
const CLASS_NVME: u32 = 0x01_08_02;

/// A view of sysfs. Reads files when asked, keeps nothing.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

/// A PCI function as the kernel describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Function {
    /// Where it is.
    pub address: Address,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code, 24 bits.
    pub class: u32,
    /// The kernel driver that holds it.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<Group>,
    /// The NUMA node that it is nearest to; `None` if there is only one or nobody knows.
    pub numa_node: Option<u32>,
    /// Size in bytes of each base address register's range; 0 for none.
    pub bars: [u64; 6],
}

/// An IOMMU group: the functions that cannot be kept apart from each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Group {
    /// Its number.
    pub number: u32,
    /// There is no IOMMU behind it: VFIO made it up, since `enable_unsafe_noiommu_mode` is set.
    pub no_iommu: bool,
}

impl Function {
    /// Whether it is an NVMe controller.
    pub fn is_nvme(&self) -> bool {
        self.class == CLASS_NVME
    }
}

impl Default for Sysfs {
    fn default() -> Sysfs {
        Sysfs::new("/sys")
    }
}

impl Sysfs {
    /// The sysfs that is mounted at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Sysfs {
        Sysfs { root: root.into() }
    }

    /// The folder of a function.
    pub fn folder(&self, address: Address) -> PathBuf {
        self.root.join("bus/pci/devices").join(address.to_string())
    }

    /// Whether there is such a function at present.
    pub fn exists(&self, address: Address) -> bool {
        self.folder(address).join("vendor").is_file()
    }

    /// What is at `address`.
    ///
    /// # Errors
    /// If there is nothing (the text names the NVMe controllers that there are), or a file cannot
    /// be read.
    pub fn function(&self, address: Address) -> Result<Function, Error> {
        if !self.exists(address) {
            let others = self.nvme().unwrap_or_default();
            let list: Vec<String> = others.iter().map(|f| f.address.to_string()).collect();
            let there = match list.len() {
                0 => "and no NVMe controller at all".to_owned(),
                _ => format!("NVMe controllers are at {}", list.join(", ")),
            };
            return Err(Error::Host(format!("no PCI function at {address}; {there}")));
        }
        self.read(address)
    }

    /// All NVMe controllers, in the order of their addresses.
    ///
    /// # Errors
    /// If sysfs cannot be read. A function that vanishes meanwhile is left out.
    pub fn nvme(&self) -> Result<Vec<Function>, Error> {
        let folder = self.root.join("bus/pci/devices");
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|e| unreadable(&folder, &e))? {
            let entry = entry.map_err(|e| unreadable(&folder, &e))?;
            // Domains above ffff (behind a VMD) cannot be used with VFIO.
            let Some(address) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            let class = number(&self.folder(address).join("class"));
            if class != Ok(u64::from(CLASS_NVME)) {
                continue;
            }
            match self.read(address) {
                Ok(f) => found.push(f),
                Err(e) if self.exists(address) => return Err(e),
                Err(_) => {}
            }
        }
        found.sort_by_key(|f| f.address);
        Ok(found)
    }

    fn read(&self, address: Address) -> Result<Function, Error> {
        let folder = self.folder(address);
        let field = |name: &str| number(&folder.join(name));
        let small = |name: &str| {
            let value = field(name)?;
            u16::try_from(value)
                .map_err(|_| Error::Odd(format!("{name} of {address} is {value:#x}")))
        };
        let class = field("class")?;
        let numa = fs::read_to_string(folder.join("numa_node")).ok();
        Ok(Function {
            address,
            vendor: small("vendor")?,
            device: small("device")?,
            class: u32::try_from(class)
                .map_err(|_| Error::Odd(format!("class of {address} is {class:#x}")))?,
            driver: link_name(&folder.join("driver")),
            group: self.group(&folder),
            // -1: the firmware does not say.
            numa_node: numa.and_then(|t| t.trim().parse().ok()),
            bars: bars(&fs::read_to_string(folder.join("resource")).unwrap_or_default()),
        })
    }

    fn group(&self, folder: &Path) -> Option<Group> {
        let number: u32 = link_name(&folder.join("iommu_group"))?.parse().ok()?;
        let name = self.root.join("kernel/iommu_groups").join(number.to_string()).join("name");
        let name = fs::read_to_string(name).unwrap_or_default();
        Some(Group { number, no_iommu: name.trim() == "vfio-noiommu" })
    }

    /// The functions of a group and the driver of each.
    pub fn members(&self, group: Group) -> Vec<(Address, Option<String>)> {
        let folder = self.root.join("kernel/iommu_groups").join(group.number.to_string());
        let Ok(entries) = fs::read_dir(folder.join("devices")) else { return Vec::new() };
        let mut members: Vec<_> = entries
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .map(|a| (a, link_name(&self.folder(a).join("driver"))))
            .collect();
        members.sort();
        members
    }

    /// The function's character device under `/dev/vfio/devices`, where the kernel has such.
    pub(crate) fn cdev(&self, address: Address) -> Option<String> {
        let entries = fs::read_dir(self.folder(address).join("vfio-dev")).ok()?;
        entries
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .find(|n| n.starts_with("vfio"))
    }

    /// The first word of a file, or nothing.
    pub(crate) fn word(&self, file: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join(file)).ok()?;
        text.split_whitespace().next().map(str::to_owned)
    }
}

fn unreadable(path: &Path, why: &io::Error) -> Error {
    Error::Host(format!("{}: {why}", path.display()))
}

/// A file that holds one hexadecimal number with 0x before it.
fn number(path: &Path) -> Result<u64, Error> {
    let text = fs::read_to_string(path).map_err(|e| unreadable(path, &e))?;
    let digits = text.trim().strip_prefix("0x");
    digits
        .and_then(|d| u64::from_str_radix(d, 16).ok())
        .ok_or_else(|| Error::Odd(format!("{}: {text:?} is no number", path.display())))
}

/// The last part of what a link points to.
fn link_name(path: &Path) -> Option<String> {
    fs::read_link(path).ok()?.file_name()?.to_str().map(str::to_owned)
}

/// Sizes from the file `resource`: a line each with first address, last address, flags.
fn bars(text: &str) -> [u64; 6] {
    let mut sizes = [0; 6];
    for (size, line) in sizes.iter_mut().zip(text.lines()) {
        let mut words = line.split_whitespace();
        let mut next = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
        if let (Some(first), Some(last)) = (next(), next())
            && last > first
        {
            *size = (last - first).saturating_add(1);
        }
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A tree with one function.
    fn tree(address: &str, class: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        add(dir.path(), address, class);
        dir
    }

    fn add(root: &Path, address: &str, class: &str) -> PathBuf {
        let f = root.join("bus/pci/devices").join(address);
        fs::create_dir_all(&f).unwrap();
        for (name, text) in [
            ("vendor", "0x1b36\n"),
            ("device", "0x0010\n"),
            ("class", class),
            ("numa_node", "-1\n"),
        ] {
            fs::write(f.join(name), text).unwrap();
        }
        let resource = "0x00000000fe400000 0x00000000fe403fff 0x0000000000140204\n\
                        0x0000000000000000 0x0000000000000000 0x0000000000000000\n";
        fs::write(f.join("resource"), resource).unwrap();
        f
    }

    fn put_in_group(root: &Path, address: &str, number: u32, name: Option<&str>) {
        let group = root.join("kernel/iommu_groups").join(number.to_string());
        let f = root.join("bus/pci/devices").join(address);
        fs::create_dir_all(group.join("devices")).unwrap();
        symlink(&f, group.join("devices").join(address)).unwrap();
        symlink(&group, f.join("iommu_group")).unwrap();
        if let Some(name) = name {
            fs::write(group.join("name"), name).unwrap();
        }
    }

    #[test]
    fn a_function_is_described() {
        let dir = tree("0000:00:03.0", "0x010802\n");
        let f = dir.path().join("bus/pci/devices/0000:00:03.0");
        symlink("../../../bus/pci/drivers/vfio-pci", f.join("driver")).unwrap();
        fs::write(f.join("numa_node"), "1\n").unwrap();
        put_in_group(dir.path(), "0000:00:03.0", 7, None);
        let address = "0000:00:03.0".parse().unwrap();
        let sysfs = Sysfs::new(dir.path());
        let f = sysfs.function(address).unwrap();
        assert_eq!((f.vendor, f.device, f.class), (0x1b36, 0x10, 0x01_08_02));
        assert_eq!(f.driver.as_deref(), Some("vfio-pci"));
        assert_eq!(f.group, Some(Group { number: 7, no_iommu: false }));
        assert_eq!((f.numa_node, f.bars), (Some(1), [0x4000, 0, 0, 0, 0, 0]));
        assert!(f.is_nvme());
        let members = sysfs.members(f.group.unwrap());
        assert_eq!(members, [(address, Some("vfio-pci".to_owned()))]);
    }

    #[test]
    fn little_is_known_of_a_bare_function() {
        let dir = tree("0000:00:03.0", "0x010802\n");
        let f = Sysfs::new(dir.path()).function("0000:00:03.0".parse().unwrap()).unwrap();
        assert_eq!((f.driver, f.group, f.numa_node), (None, None, None));
    }

    #[test]
    fn only_nvme_is_listed_in_order() {
        let dir = tree("0000:02:00.0", "0x010802\n");
        add(dir.path(), "0000:01:00.0", "0x010802\n");
        add(dir.path(), "0000:00:01.0", "0x030000\n");
        add(dir.path(), "10000:00:01.0", "0x010802\n");
        put_in_group(dir.path(), "0000:02:00.0", 0, Some("vfio-noiommu\n"));
        let sysfs = Sysfs::new(dir.path());
        let found = sysfs.nvme().unwrap();
        let names: Vec<String> = found.iter().map(|f| f.address.to_string()).collect();
        assert_eq!(names, ["0000:01:00.0", "0000:02:00.0"]);
        assert!(found[1].group.is_some_and(|g| g.no_iommu));
        let missing = sysfs.function("0000:03:00.0".parse().unwrap()).unwrap_err().to_string();
        assert!(
            missing.contains("NVMe controllers are at 0000:01:00.0, 0000:02:00.0"),
            "{missing}"
        );
    }

    #[test]
    fn broken_files_are_errors() {
        let dir = tree("0000:00:03.0", "0x010802\n");
        let f = dir.path().join("bus/pci/devices/0000:00:03.0");
        let sysfs = Sysfs::new(dir.path());
        for (name, text) in [("device", "zz"), ("device", "0x12345"), ("class", "0x1ffffffff")] {
            let before = fs::read(f.join(name)).unwrap();
            fs::write(f.join(name), text).unwrap();
            assert!(sysfs.function("0000:00:03.0".parse().unwrap()).is_err(), "{name} {text}");
            fs::write(f.join(name), before).unwrap();
        }
        fs::write(f.join("resource"), "0x5 0x1 0\nrubbish\n0x0 0xffffffffffffffff 0").unwrap();
        let function = sysfs.function("0000:00:03.0".parse().unwrap()).unwrap();
        assert_eq!(function.bars, [0, 0, u64::MAX, 0, 0, 0]);
    }
}
