//! [`Host`]: sysfs, procfs and devfs below one folder, so that tests can bring their own.
//!
//! Nothing that is read is trusted: files may be missing, empty, garbage, or vanish meanwhile.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use vfio::{Address, Sysfs};

/// Most that is read of one file: /proc/interrupts of a large machine has a megabyte.
const MOST: u64 = 16 << 20;

/// Writes a text into a file of sysfs.
type Poke = Box<dyn Fn(&Path, &str) -> io::Result<()>>;

/// Where the kernel's file systems are, and how modules are loaded.
pub(crate) struct Host {
    root: PathBuf,
    modprobe: PathBuf,
    poke: Poke,
}

impl Host {
    /// This host.
    pub(crate) fn real() -> Host {
        Host { root: "/".into(), modprobe: "modprobe".into(), poke: Box::new(write) }
    }

    /// Another one: below `root`, with a program that loads modules, and what writes do.
    #[cfg(test)]
    pub(crate) fn fake(root: &Path, modprobe: &Path, poke: Poke) -> Host {
        Host { root: root.to_owned(), modprobe: modprobe.to_owned(), poke }
    }

    /// PCI functions.
    pub(crate) fn sysfs(&self) -> Sysfs {
        Sysfs::new(self.path("sys"))
    }

    /// A path without its leading slash, like `proc/swaps`.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A file of a PCI function.
    pub(crate) fn pci(&self, address: Address, file: &str) -> String {
        format!("sys/bus/pci/devices/{address}/{file}")
    }

    /// All of a file, if it can be read.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        let mut bytes = Vec::new();
        File::open(self.path(path)).ok()?.take(MOST).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The first line of a file without blanks around it, safe to print; `None` if there is
    /// nothing.
    pub(crate) fn line(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let line = printable(text.lines().next()?.trim());
        (!line.is_empty()).then_some(line)
    }

    /// A decimal number that is all of a file.
    pub(crate) fn number(&self, path: &str) -> Option<u64> {
        self.line(path)?.parse().ok()
    }

    /// Where a link leads, as it stands there.
    pub(crate) fn link(&self, path: &str) -> Option<String> {
        fs::read_link(self.path(path)).ok()?.to_str().map(str::to_owned)
    }

    /// The names in a folder, in order; none if it cannot be read.
    pub(crate) fn names(&self, path: &str) -> Vec<String> {
        self.list(path).unwrap_or_default()
    }

    /// The names in a folder, in order. Those that are no UTF-8 are not of the kernel's making.
    pub(crate) fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(self.path(path))?;
        let mut names: Vec<String> =
            entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
        names.sort_by_key(|n| natural(n));
        Ok(names)
    }

    /// Whether there is such a file or folder.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// Writes into a file of sysfs that is there.
    ///
    /// # Errors
    /// Names the file, and what helps.
    pub(crate) fn write(&self, path: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path(path);
        (self.poke)(&path, text).map_err(|e| {
            let next = match e.kind() {
                io::ErrorKind::PermissionDenied => "; run as root",
                _ => "",
            };
            anyhow::anyhow!("cannot write {:?} to {}: {e}{next}", text.trim(), path.display())
        })
    }

    /// Loads a kernel module.
    ///
    /// # Errors
    /// What modprobe says.
    pub(crate) fn load(&self, module: &str) -> anyhow::Result<()> {
        log::info!("loading the kernel module {module}");
        let out = std::process::Command::new(&self.modprobe).arg(module).output();
        match out {
            Ok(out) if out.status.success() => Ok(()),
            Ok(out) => {
                let said = printable(String::from_utf8_lossy(&out.stderr).trim());
                anyhow::bail!("`modprobe {module}` failed: {said}")
            }
            Err(e) => anyhow::bail!("cannot run `modprobe {module}`: {e}"),
        }
    }
}

/// Writes into a file that exists, in one piece, as sysfs wants it.
fn write(path: &Path, text: &str) -> io::Result<()> {
    File::options().write(true).open(path)?.write_all(text.as_bytes())
}

/// What cannot be printed replaced, so that a device's name cannot play with a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A key by which `nvme2` comes before `nvme10`.
pub(crate) fn natural(name: &str) -> Vec<(bool, u64, char)> {
    let mut key = Vec::new();
    let mut number = None;
    for c in name.chars() {
        if let Some(d) = c.to_digit(10) {
            number = Some(number.unwrap_or(0u64).saturating_mul(10).saturating_add(d.into()));
        } else {
            key.extend(number.take().map(|n| (false, n, '0')));
            key.push((true, 0, c));
        }
    }
    key.extend(number.map(|n| (false, n, '0')));
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_files_are_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::fake(dir.path(), Path::new("/no/modprobe"), Box::new(write));
        fs::write(dir.path().join("empty"), "").unwrap();
        fs::write(dir.path().join("blank"), " \n x").unwrap();
        fs::write(dir.path().join("bytes"), b"\xff\x1b[31mred\n").unwrap();
        fs::write(dir.path().join("n"), "12\n").unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        for nothing in ["empty", "blank", "none", "folder"] {
            assert_eq!(host.line(nothing), None, "{nothing}");
            assert_eq!(host.number(nothing), None);
        }
        assert_eq!(host.line("bytes").unwrap(), "\u{fffd}?[31mred");
        assert_eq!((host.number("n"), host.number("bytes")), (Some(12), None));
        assert!(host.names("none").is_empty() && host.list("n").is_err());
        let e = host.write("none", "x\n").unwrap_err().to_string();
        assert!(e.contains("cannot write \"x\"") && e.contains("none"), "{e}");
        assert!(host.load("x").unwrap_err().to_string().contains("cannot run `modprobe x`"));
        host.write("empty", "now\n").unwrap();
        assert_eq!(host.line("empty").unwrap(), "now");
    }

    #[test]
    fn names_in_the_order_of_their_numbers() {
        let mut names = ["nvme10n1", "nvme2n1", "nvme2", "sda", "nvme2n1p10", "nvme2n1p9"];
        names.sort_by_key(|n| natural(n));
        assert_eq!(names, ["nvme2", "nvme2n1", "nvme2n1p9", "nvme2n1p10", "nvme10n1", "sda"]);
    }
}
