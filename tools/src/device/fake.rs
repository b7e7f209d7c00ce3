//! A host made of files in a scratch folder, with a kernel that obeys what is written into sysfs.
//! For tests: none of them looks at the real one.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::errno::Errno;

use super::host::Host;

/// What the kernel does to a write: which file's end, which write to it (from 0), what it answers.
type Failure = (&'static str, usize, Errno);

#[derive(Default)]
struct Kernel {
    /// Path below the root, and text.
    writes: Vec<(String, String)>,
    failures: Vec<Failure>,
    /// Drivers that refuse every device.
    refusing: Vec<&'static str>,
}

/// The host.
pub(crate) struct Fake {
    dir: tempfile::TempDir,
    kernel: Rc<RefCell<Kernel>>,
}

impl Fake {
    /// With the kernel's drivers nvme and vfio-pci, and no device.
    pub(crate) fn new() -> Fake {
        let fake = Fake { dir: tempfile::tempdir().unwrap(), kernel: Rc::default() };
        for folder in ["sys/bus/pci/devices", "sys/bus/pci/drivers", "sys/block", "proc", "dev"] {
            fs::create_dir_all(fake.path(folder)).unwrap();
        }
        fake.has_driver("nvme").has_driver("vfio-pci");
        fake.file("sys/bus/pci/drivers_probe", "");
        fake.file("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n");
        fake.file("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 9 0 -2\n");
        fake
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// The host as the commands see it.
    pub(crate) fn host(&self) -> Host {
        let (root, kernel) = (self.dir.path().to_owned(), self.kernel.clone());
        let obey = move |path: &Path, text: &str| {
            let path = path.strip_prefix(&root).expect("a write outside of the fake host");
            obey(&root, &mut kernel.borrow_mut(), path.to_str().unwrap(), text)
        };
        Host::fake(self.dir.path(), &self.path("modprobe"), Box::new(obey))
    }

    /// Writes a file; its folders are made.
    pub(crate) fn file(&self, path: &str, text: &str) -> &Fake {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    pub(crate) fn remove(&self, path: &str) -> &Fake {
        let path = self.path(path);
        let folder = fs::symlink_metadata(&path).unwrap().is_dir();
        if folder { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        self
    }

    fn append(&self, path: &str, line: &str) {
        let mut text = fs::read_to_string(self.path(path)).unwrap();
        text.push_str(line);
        text.push('\n');
        self.file(path, &text);
    }

    pub(crate) fn has_driver(&self, name: &str) -> &Fake {
        let folder = format!("sys/bus/pci/drivers/{name}");
        self.file(&format!("{folder}/bind"), "").file(&format!("{folder}/unbind"), "")
    }

    /// Programs and what they do, in a shell's language; `$1` is the module.
    pub(crate) fn modprobe(&self, script: &str) -> &Fake {
        let script = format!("#!/bin/sh\ncd '{}'\n{script}\n", self.dir.path().display());
        self.file("modprobe", &script);
        fs::set_permissions(self.path("modprobe"), fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    /// An NVMe function without a driver.
    pub(crate) fn function(&self, address: &str) -> &Fake {
        let file = |name: &str, text: &str| {
            self.file(&format!("sys/bus/pci/devices/{address}/{name}"), text);
        };
        file("vendor", "0x8086\n");
        file("device", "0x2700\n");
        file("class", "0x010802\n");
        file("numa_node", "1\n");
        file("resource", "");
        file("driver_override", "(null)\n");
        self
    }

    /// Gives a function a driver.
    pub(crate) fn driver(&self, address: &str, name: &str) -> &Fake {
        self.has_driver(name);
        let link = self.path(&format!("sys/bus/pci/devices/{address}/driver"));
        symlink(format!("../../../bus/pci/drivers/{name}"), link).unwrap();
        self
    }

    /// Which driver it has.
    pub(crate) fn driver_of(&self, address: &str) -> Option<String> {
        let link = fs::read_link(self.path(&format!("sys/bus/pci/devices/{address}/driver")));
        Some(link.ok()?.file_name()?.to_str()?.to_owned())
    }

    pub(crate) fn driver_override(&self, address: &str) -> String {
        let path = self.path(&format!("sys/bus/pci/devices/{address}/driver_override"));
        fs::read_to_string(path).unwrap().trim().to_owned()
    }

    /// A function that the kernel's driver has as controller `n`, with one namespace of 1 GiB.
    pub(crate) fn nvme(&self, address: &str, n: u32) -> &Fake {
        self.function(address).driver(address, "nvme");
        let controller = format!("sys/bus/pci/devices/{address}/nvme/nvme{n}");
        self.file(&format!("{controller}/model"), "INTEL SSDPE21K375GA                     \n");
        self.file(&format!("{controller}/serial"), &format!("PHKE000{n}            \n"));
        self.file(&format!("{controller}/firmware_rev"), "E2010325\n");
        self.disk(&controller, &format!("nvme{n}n1"), &format!("nvme{n}n1"), 1)
    }

    /// A disk that has several paths; one of them is this controller's.
    pub(crate) fn multipath(
        &self,
        address: &str,
        controller: &str,
        path: &str,
        disk: &str,
    ) -> &Fake {
        let controller = format!("sys/bus/pci/devices/{address}/nvme/{controller}");
        self.disk(&controller, path, disk, 2)
    }

    fn disk(&self, controller: &str, entry: &str, disk: &str, nsid: u32) -> &Fake {
        fs::create_dir_all(self.path(&format!("{controller}/{entry}"))).unwrap();
        let block = format!("sys/block/{disk}");
        self.file(&format!("{block}/size"), "2097152\n");
        self.file(&format!("{block}/nsid"), &format!("{nsid}\n"));
        self.file(&format!("{block}/queue/logical_block_size"), "512\n");
        self.numbered(&block).file(&format!("dev/{disk}"), "")
    }

    /// Gives a block device its number.
    fn numbered(&self, folder: &str) -> &Fake {
        fs::create_dir_all(self.path(&format!("{folder}/holders"))).unwrap();
        let minor = folder.bytes().fold(0u32, |n, b| n.wrapping_mul(31).wrapping_add(b.into()));
        self.file(&format!("{folder}/dev"), &format!("259:{}\n", minor % 100_000))
    }

    pub(crate) fn partition(&self, disk: &str, n: u32) -> &Fake {
        let folder = format!("sys/block/{disk}/{disk}p{n}");
        self.numbered(&folder).file(&format!("{folder}/partition"), &format!("{n}\n"))
    }

    /// `major:minor` of a disk, partition or holder.
    pub(crate) fn device_number(&self, name: &str) -> String {
        let mut path = self.path(&format!("sys/block/{name}/dev"));
        if let Some((disk, _)) = name.rsplit_once('p')
            && !path.exists()
        {
            path = self.path(&format!("sys/block/{disk}/{name}/dev"));
        }
        fs::read_to_string(path).unwrap().trim().to_owned()
    }

    /// Puts a device onto another.
    pub(crate) fn holder(&self, below: &str, holder: &str) -> &Fake {
        self.numbered(&format!("sys/block/{holder}"));
        fs::create_dir_all(self.path(&format!("sys/block/{below}/holders/{holder}"))).unwrap();
        self
    }

    /// Says what a device-mapper device is.
    pub(crate) fn dm(&self, name: &str, called: &str, uuid: &str) -> &Fake {
        self.file(&format!("sys/block/{name}/dm/name"), &format!("{called}\n"));
        self.file(&format!("sys/block/{name}/dm/uuid"), &format!("{uuid}\n"))
    }

    pub(crate) fn mount(&self, line: &str) -> &Fake {
        self.append("proc/self/mountinfo", line);
        self
    }

    pub(crate) fn swap(&self, line: &str) -> &Fake {
        self.append("proc/swaps", line);
        self
    }

    /// A process that has these open.
    pub(crate) fn process(&self, pid: u32, name: &str, open: &[&str]) -> &Fake {
        self.file(&format!("proc/{pid}/comm"), &format!("{name}\n"));
        let fds = self.path(&format!("proc/{pid}/fd"));
        fs::create_dir_all(&fds).unwrap();
        for (fd, path) in open.iter().enumerate() {
            symlink(path, fds.join(fd.to_string())).unwrap();
        }
        self
    }

    pub(crate) fn group(&self, number: u32, members: &[&str]) -> &Fake {
        let group = format!("sys/kernel/iommu_groups/{number}");
        self.file(&format!("dev/vfio/{number}"), "");
        for member in members {
            let folder = self.path(&format!("{group}/devices"));
            fs::create_dir_all(&folder).unwrap();
            symlink(format!("../../../bus/pci/devices/{member}"), folder.join(member)).unwrap();
            let link = self.path(&format!("sys/bus/pci/devices/{member}/iommu_group"));
            symlink(format!("../../../kernel/iommu_groups/{number}"), link).unwrap();
        }
        self
    }

    /// Has the kernel answer a write with an error.
    pub(crate) fn fail(&self, file: &'static str, nth: usize, with: Errno) -> &Fake {
        self.kernel.borrow_mut().failures.push((file, nth, with));
        self
    }

    /// Has a driver refuse every device.
    pub(crate) fn refusing(&self, driver: &'static str) -> &Fake {
        self.kernel.borrow_mut().refusing.push(driver);
        self
    }

    /// What was written so far: the file's name and the text.
    pub(crate) fn writes(&self) -> Vec<String> {
        let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
        let kernel = self.kernel.borrow();
        kernel.writes.iter().map(|(p, t)| format!("{}={}", name(p), t.trim())).collect()
    }
}

/// What the kernel does.
fn obey(root: &Path, kernel: &mut Kernel, path: &str, text: &str) -> io::Result<()> {
    let before = kernel.writes.iter().filter(|(p, _)| p == path).count();
    kernel.writes.push((path.to_owned(), text.to_owned()));
    if let Some(&(.., errno)) =
        kernel.failures.iter().find(|(file, nth, _)| path.ends_with(file) && *nth == before)
    {
        return Err(errno.into());
    }
    if !root.join(path).is_file() {
        return Err(Errno::ENOENT.into());
    }
    let device = |address: &str| root.join("sys/bus/pci/devices").join(address);
    let text = text.trim();
    match path.rsplit('/').next() {
        Some("driver_override") => {
            let value = if text.is_empty() { "(null)" } else { text };
            fs::write(root.join(path), format!("{value}\n"))
        }
        Some("unbind") => {
            let _no_disks = fs::remove_dir_all(device(text).join("nvme"));
            fs::remove_file(device(text).join("driver"))
        }
        Some("drivers_probe") => {
            let device = device(text);
            if device.join("driver").is_symlink() {
                return Ok(());
            }
            let wanted = fs::read_to_string(device.join("driver_override"))?;
            let driver = match wanted.trim() {
                "(null)" => "nvme",
                name => name,
            };
            let folder = root.join("sys/bus/pci/drivers").join(driver);
            let no_group = driver == "vfio-pci" && !device.join("iommu_group").is_symlink();
            if !folder.is_dir() || kernel.refusing.contains(&driver) || no_group {
                return Err(Errno::EINVAL.into());
            }
            symlink(folder, device.join("driver"))
        }
        _ => panic!("no command writes {path}"),
    }
}
