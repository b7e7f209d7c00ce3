//! Boots a Debian kernel with a small initramfs in QEMU, from a disk that an NBD server exports.
//!
//! Only QEMU's own emulation (TCG) is used: a `/dev/kvm` that exists may still not work. Nothing
//! here is installed: the emulator, the kernel and busybox are unpacked into the cache folder.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cmd::{self, program};
use crate::tools;

/// A boot that takes longer is broken: a busy 2-core machine needs about 60 s for all we do.
pub(crate) const BOOT: Duration = Duration::from_secs(180);

/// What a boot needs, all found or fetched.
pub(crate) struct Machine {
    emulator: PathBuf,
    /// Root of the unpacked QEMU packages; `None` for an installed QEMU.
    unpacked: Option<PathBuf>,
    kernel: PathBuf,
    /// Every `.ko` of the kernel with the modules that it needs is found under this folder.
    modules: PathBuf,
    busybox: PathBuf,
}

impl Machine {
    /// Finds or fetches everything, with Debian's small kernel for virtual machines.
    pub(crate) fn prepare() -> Result<Self> {
        Self::with_kernel("kernel", "linux-image-cloud-amd64")
    }

    /// The same with the kernel that the package `meta` stands for, kept as `name`.
    pub(crate) fn with_kernel(name: &str, meta: &str) -> Result<Self> {
        let (emulator, unpacked) = match tools::find("qemu-system-x86_64") {
            Some(installed) => (installed, None),
            None => {
                let root = tools::unpack("qemu", || tools::with_dependencies("qemu-system-x86"))?;
                (root.join("usr/bin/qemu-system-x86_64"), Some(root))
            }
        };
        let kernel = tools::unpack(name, || tools::behind(meta))?;
        let busybox = tools::unpack("busybox", || Ok(vec!["busybox-static".to_owned()]))?;
        let modules = ["lib/modules", "usr/lib/modules"].map(|path| kernel.join(path));
        let modules = modules.into_iter().find(|path| path.is_dir()).context("no modules")?;
        let busybox = ["bin/busybox", "usr/bin/busybox"].map(|path| busybox.join(path));
        let busybox = busybox.into_iter().find(|path| path.is_file()).context("no busybox")?;
        Ok(Self {
            emulator,
            unpacked,
            kernel: tools::entry(&kernel.join("boot"), "vmlinuz-")?,
            modules: tools::entry(&modules, "")?,
            busybox,
        })
    }

    /// An initramfs with busybox, `init`, the modules that `drivers` need in loading order (listed
    /// in `/modules`), and `files`: those in `bin` and `lib64` can be run, one in `lib` with a
    /// module's name stands in for it.
    pub(crate) fn initramfs(
        &self,
        init: &str,
        drivers: &[&str],
        files: &[(&str, &[u8])],
    ) -> Result<Vec<u8>> {
        let mut archive = Archive::default();
        for folder in ["bin", "etc", "lib", "lib64", "proc", "sys", "dev", "mnt", "tmp"] {
            archive.add(folder, 0o040_755, &[]);
        }
        archive.add("bin/busybox", 0o100_755, &fs::read(&self.busybox)?);
        archive.add("init", 0o100_755, init.as_bytes());
        let mut order = String::new();
        for (name, bytes) in self.load_order(drivers)? {
            archive.add(&format!("lib/{name}.ko"), 0o100_644, &bytes);
            order.push_str(&format!("/lib/{name}.ko\n"));
        }
        archive.add("modules", 0o100_644, order.as_bytes());
        for (name, bytes) in files {
            let program = name.starts_with("bin/") || name.starts_with("lib64/");
            archive.add(name, if program { 0o100_755 } else { 0o100_644 }, bytes);
        }
        Ok(archive.finish())
    }

    /// The modules behind `drivers`, each after those that it needs. Built-in ones are left out.
    fn load_order(&self, drivers: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let listing = cmd::ok(&mut program(
            "find",
            [self.modules.as_os_str(), "-name".as_ref(), "*.ko*".as_ref()],
        ))?;
        let builtin = fs::read_to_string(self.modules.join("modules.builtin"))?;
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for driver in drivers {
            self.visit(driver, &listing, &builtin, &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        listing: &str,
        builtin: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<(String, Vec<u8>)>,
    ) -> Result<()> {
        let name = name.replace('-', "_");
        if !seen.insert(name.clone()) {
            return Ok(());
        }
        let Some(path) = listing.lines().find(|path| module_name(path) == name) else {
            if builtin.lines().any(|path| module_name(path) == name) {
                return Ok(());
            }
            bail!("the kernel has no module {name}");
        };
        let bytes = match Path::new(path).extension().map(OsStrExt::as_bytes) {
            Some(b"ko") => fs::read(path)?,
            Some(b"xz") => {
                let done = Command::new("xz").args(["-dc", path]).output().context("xz")?;
                if !done.status.success() {
                    bail!("xz cannot unpack {path}");
                }
                done.stdout
            }
            _ => bail!("{path}: packed in a way that this harness does not know"),
        };
        for needed in needs(&bytes) {
            self.visit(&needed, listing, builtin, seen, order)?;
        }
        order.push((name, bytes));
        Ok(())
    }

    /// Boots with `file` (an export's URI or a path) in this format as the first virtio disk and
    /// returns the console's text. The guest must power itself off within [`BOOT`].
    pub(crate) fn boot(
        &self,
        initramfs: &Path,
        (file, format): (&str, &str),
        words: &str,
    ) -> Result<String> {
        let mut qemu = self.emulator(initramfs, words);
        qemu.args(["-machine", "pc", "-smp", "1", "-m", "512"])
            .args(["-drive", &format!("file={file},format={format},if=none,id=disk,discard=unmap")])
            .args(["-device", "virtio-blk-pci,drive=disk"]);
        let done = cmd::run(&mut qemu, BOOT)?;
        if !done.status.success() {
            bail!("QEMU failed ({})\n{}", done.status, done.tail());
        }
        Ok(format!("{}{}", done.stdout, done.stderr))
    }
}

impl Machine {
    /// The kernel's release, as `uname -r` prints it.
    pub(crate) fn release(&self) -> String {
        let name = self.kernel.file_name().unwrap_or_default().to_string_lossy();
        name.trim_start_matches("vmlinuz-").to_owned()
    }

    /// The kernel as it was packaged.
    pub(crate) fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The emulator with a console on its standard output, to be given all else.
    pub(crate) fn bare_emulator(&self) -> Command {
        let mut qemu = Command::new(&self.emulator);
        if let Some(root) = &self.unpacked {
            qemu.env("LD_LIBRARY_PATH", root.join("usr/lib/x86_64-linux-gnu"));
            for folder in ["usr/share/qemu", "usr/share/seabios"] {
                qemu.arg("-L").arg(root.join(folder));
            }
        }
        qemu.args(["-accel", "tcg,thread=multi"]).args([
            "-nodefaults",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
        ]);
        qemu
    }

    /// The emulator with kernel and console, to be given a machine and devices.
    pub(crate) fn emulator(&self, initramfs: &Path, words: &str) -> Command {
        let mut qemu = self.bare_emulator();
        qemu.args(["-cpu", "max"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(initramfs)
            // no_timer_check: on a loaded host the kernel's timer test fails and it panics.
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 no_timer_check {words}")]);
        qemu
    }
}

/// `virtio_blk` for `…/virtio-blk.ko.xz`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The modules that must be loaded before this one, from the strings that the kernel's build puts
/// into each module.
fn needs(module: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    for field in module.split(|byte| *byte == 0) {
        let Ok(field) = std::str::from_utf8(field) else { continue };
        if let Some(list) = field.strip_prefix("depends=") {
            names.extend(list.split(',').filter(|name| !name.is_empty()).map(str::to_owned));
        }
    }
    names
}

/// A `newc` cpio archive, the format of an initramfs.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds an entry; `mode` holds the file type too.
    fn add(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.entries += 1;
        let fields = [self.entries, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields.into_iter().chain([name.len() as u32 + 1, 0]) {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_names_and_needs() {
        assert_eq!(module_name("/k/lib/virtio-blk.ko.xz"), "virtio_blk");
        assert_eq!(module_name("kernel/fs/ext4/ext4.ko"), "ext4");
        let module = b"\x7fELF\xff\0depends=virtio,virtio_ring\0name=x\0depends=\0";
        assert_eq!(needs(module), ["virtio", "virtio_ring"]);
    }

    #[test]
    fn archive_layout() {
        let mut archive = Archive::default();
        archive.add("a", 0o100_644, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[94..102], b"00000002");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..117], b"hello");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
