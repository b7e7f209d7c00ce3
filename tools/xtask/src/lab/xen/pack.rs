//! What the Xen lab boots: the hypervisor, dom0's kernel and initramfs, and the guests' in it. All of it
//! comes from Debian's packages, unpacked into the cache folder and not installed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cmd::{self, program};
use crate::lab::{guest, module};
use crate::qemu::Machine;
use crate::tools;

const DOM0: &str = include_str!("../../../../lab/xen/dom0.sh");
const CASES: &str = include_str!("../../../../lab/xen/cases.sh");
const CALLS: &str = include_str!("../../../../lab/xen/calls.sh");
const ROGUE: &str = include_str!("../../../../lab/xen/rogue.sh");
const GUESTS: &str = include_str!("../../../../lab/xen/guests.sh");
const BACKENDS: &str = include_str!("../../../../lab/xen/backends.sh");
const XL: &str = include_str!("../../../../lab/xen/xl.sh");
const HVM: &str = include_str!("../../../../lab/xen/hvm.sh");
const SCRIPT: &str = include_str!("../../../../xen/block-polldisk");
const SAVE: &str = include_str!("../../../../lab/xen/save.sh");
const GUEST: &str = include_str!("../../../../lab/xen/guest.sh");

/// The release of Xen. Its tools must be of the same one.
const XEN: &str = "4.17";

/// What dom0 loads. The kernel's own backend (xen-blkback) must not be there: it would take disks.
const DOM0_DRIVERS: [&str; 9] = [
    "xen-privcmd",
    "xenfs",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "crc32c_generic",
    "nvme",
    "ext4",
    "loop",
];

/// What dom0 loads besides for a device that it drives without an IOMMU of its own.
const VFIO_DRIVERS: [&str; 2] = ["vfio-pci", "vfio_iommu_type1"];

/// The guests' disk driver is loaded by their first process, with the options of the case.
const GUEST_DRIVERS: [&str; 5] =
    ["xen-blkfront", "xen-evtchn", "xen-gntalloc", "crc32c_generic", "ext4"];

/// The programs of Xen's tools that dom0 runs.
const XEN_TOOLS: [&str; 6] =
    ["xl", "libxl-save-helper", "xenstored", "xenconsoled", "xen-init-dom0", "lsevtchn"];

/// Everything of a boot, as files.
pub(super) struct Parts {
    /// The machine's emulator with dom0's kernel.
    pub(super) machine: Machine,
    /// The hypervisor, as QEMU's multiboot loader takes it: unpacked.
    pub(super) xen: PathBuf,
    /// dom0's kernel, unpacked as well: under emulation that saves seconds.
    pub(super) kernel: PathBuf,
    /// The packages' folder.
    root: PathBuf,
    /// The boot loader of the guests that have firmware.
    boot_loader: PathBuf,
    /// The guests' kernel and initramfs.
    guest: (PathBuf, Vec<u8>),
}

impl Parts {
    /// Finds, fetches and makes everything; what is made goes into `folder`. `rogue` is the program of
    /// the guest that is hostile.
    pub(super) fn prepare(folder: &Path, rogue: PathBuf) -> Result<Parts> {
        tools::need(&["mke2fs", "e2fsck", "resize2fs", "qemu-img", "strace", "xz"])?;
        let machine = Machine::with_kernel("kernel-dom0", "linux-image-amd64")?;
        let small = Machine::prepare()?;
        let root = tools::unpack("xen", packages)?;
        let boot_loader = tools::unpack("extlinux", || Ok(vec!["extlinux".to_owned()]))?;
        let boot_loader = boot_loader.join("usr/bin/extlinux");
        let xen = folder.join("xen");
        let packed = root.join(format!("boot/xen-{XEN}-amd64.gz"));
        fs::write(&xen, unpacked("gzip", &["-dc"], &packed)?)?;
        let kernel = folder.join("vmlinux");
        fs::write(&kernel, vmlinux(machine.kernel(), folder)?)?;
        let tools = ["mke2fs", "e2fsck", "resize2fs"];
        let mut tools: Vec<_> = tools.map(|name| tools::find(name).unwrap_or_default()).into();
        tools.push(rogue);
        let files = guest::programs(&tools)?;
        let files: Vec<_> = files.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
        let initramfs = small.initramfs(GUEST, &GUEST_DRIVERS, &files)?;
        let guest = (small.kernel().to_owned(), initramfs);
        Ok(Parts { machine, xen, kernel, root, boot_loader, guest })
    }

    /// dom0's initramfs. `ours` are our programs; with `vfio`, a device can be driven without an IOMMU.
    pub(super) fn dom0(&self, ours: &[PathBuf], vfio: bool) -> Result<Vec<u8>> {
        let bin = self.root.join(format!("usr/lib/xen-{XEN}/bin"));
        let mut programs: Vec<PathBuf> = XEN_TOOLS.iter().map(|name| bin.join(name)).collect();
        programs.push(self.root.join("usr/bin/xenstore"));
        programs.push(self.root.join("usr/libexec/xen-qemu-system-i386"));
        programs.push(self.boot_loader.clone());
        programs.extend(
            ["qemu-img", "mke2fs", "e2fsck", "strace"]
                .map(|name| tools::find(name).unwrap_or_default()),
        );
        programs.extend_from_slice(ours);
        let programs = guest::programs_from(&programs, &self.root)?;
        let keymap = self.shared("qemu/keymaps/en-us")?;
        let seabios = self.shared("seabios/bios-256k.bin")?;
        let hvmloader = fs::read(self.root.join(format!("usr/lib/xen-{XEN}/boot/hvmloader")))?;
        let xl = fs::read(self.root.join("etc/xen/xl.conf"))?;
        let kernel = fs::read(&self.guest.0)?;
        let vfio_module;
        let mut files: Vec<(&str, &[u8])> = vec![
            ("cases.sh", CASES.as_bytes()),
            ("save.sh", SAVE.as_bytes()),
            ("xl.sh", XL.as_bytes()),
            ("hvm.sh", HVM.as_bytes()),
            ("block-polldisk", SCRIPT.as_bytes()),
            ("calls.sh", CALLS.as_bytes()),
            ("rogue.sh", ROGUE.as_bytes()),
            ("guests.sh", GUESTS.as_bytes()),
            ("backends.sh", BACKENDS.as_bytes()),
            ("etc/keymap", &keymap),
            ("etc/xl.conf", &xl),
            ("hvmloader", &hvmloader),
            ("seabios", &seabios),
            ("guest.kernel", &kernel),
            ("guest.initramfs", &self.guest.1),
        ];
        files.extend(programs.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
        let mut drivers = DOM0_DRIVERS.to_vec();
        if vfio {
            drivers.extend(VFIO_DRIVERS);
            vfio_module = module::vfio_without_iommu(&self.machine.release())?;
            files.push(("lib/vfio.ko", &vfio_module));
            files.push(("lib/vfio.ko.options", b"enable_unsafe_noiommu_mode=1"));
        }
        self.machine.initramfs(DOM0, &drivers, &files)
    }

    /// A file of `/usr/share`, unpacked or installed.
    fn shared(&self, path: &str) -> Result<Vec<u8>> {
        let path = Path::new("usr/share").join(path);
        let mut places =
            [self.root.as_path(), Path::new("/")].map(|root| root.join(&path)).into_iter();
        let found = places.find(|place| place.is_file());
        Ok(fs::read(found.with_context(|| format!("no {}", path.display()))?)?)
    }
}

/// Xen, its tools, the QEMU that it calls, and the libraries that this machine lacks.
fn packages() -> Result<Vec<String>> {
    let mut names = vec![
        format!("xen-hypervisor-{XEN}-amd64"),
        format!("xen-utils-{XEN}"),
        "xen-utils-common".to_owned(),
        "xenstore-utils".to_owned(),
    ];
    names.extend(tools::with_dependencies("qemu-system-xen")?);
    Ok(names)
}

/// What a program that unpacks prints about `file`.
fn unpacked(name: &str, arguments: &[&str], file: &Path) -> Result<Vec<u8>> {
    let done = program(name, arguments).arg(file).output().with_context(|| name.to_owned())?;
    if !done.status.success() {
        let why = String::from_utf8_lossy(&done.stderr);
        bail!("{name} cannot unpack {}\n{}", file.display(), cmd::tail(&why, 500));
    }
    Ok(done.stdout)
}

/// The kernel inside a bzImage if it is packed with xz, which is slow to unpack under emulation; else
/// the bzImage as it is, which Xen takes too.
fn vmlinux(image: &Path, folder: &Path) -> Result<Vec<u8>> {
    let image = fs::read(image)?;
    let Some(payload) = payload(&image).filter(|bytes| bytes.starts_with(b"\xfd7zXZ\0")) else {
        return Ok(image);
    };
    let packed = folder.join("vmlinux.xz");
    fs::write(&packed, payload)?;
    // Behind the stream stands its length.
    let kernel = unpacked("xz", &["-dc", "--single-stream"], &packed)?;
    fs::remove_file(&packed)?;
    Ok(kernel)
}

/// The packed kernel in a bzImage, by the fields of Linux's x86 boot protocol 2.08.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at.checked_add(4)?)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup = (usize::from(*image.get(0x1f1)?) + 1) * 512;
    let start = setup.checked_add(word(0x248)?)?;
    image.get(start..start.checked_add(word(0x24c)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_of_a_kernel() {
        let mut image = vec![0; 2048];
        assert_eq!(payload(&image), None);
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 16;
        image[0x24c] = 4;
        image[1040..1044].copy_from_slice(b"abcd");
        assert_eq!(payload(&image), Some(b"abcd".as_slice()));
        image[0x24f] = 0x7f;
        assert_eq!(payload(&image), None, "longer than the file");
        assert_eq!(payload(&image[..0x24c]), None);
    }
}
