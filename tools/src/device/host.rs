//! [`Host`]: the files by which the kernel tells of the host, what is written into them, and modules.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use node::{HostFiles, printable};
use vfio::{Address, Sysfs};

/// Writes a text into a file of sysfs.
type Poke = Box<dyn Fn(&Path, &str) -> io::Result<()>>;

/// Where the kernel's file systems are, and how modules are loaded.
pub(crate) struct Host {
    files: HostFiles,
    modprobe: PathBuf,
    poke: Poke,
}

impl Host {
    /// This host.
    pub(crate) fn real() -> Host {
        Host { files: HostFiles::below("/"), modprobe: "modprobe".into(), poke: Box::new(write) }
    }

    /// Another one: below `root`, with a program that loads modules, and what writes do.
    #[cfg(test)]
    pub(crate) fn fake(root: &Path, modprobe: &Path, poke: Poke) -> Host {
        Host { files: HostFiles::below(root), modprobe: modprobe.to_owned(), poke }
    }

    /// PCI functions.
    pub(crate) fn sysfs(&self) -> Sysfs {
        Sysfs::new(self.path("sys"))
    }

    /// A file of a PCI function.
    pub(crate) fn pci(&self, address: Address, file: &str) -> String {
        format!("sys/bus/pci/devices/{address}/{file}")
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

impl Deref for Host {
    type Target = HostFiles;

    fn deref(&self) -> &HostFiles {
        &self.files
    }
}

/// Writes into a file that exists, in one piece, as sysfs wants it.
fn write(path: &Path, text: &str) -> io::Result<()> {
    File::options().write(true).open(path)?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_and_modules() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::fake(dir.path(), Path::new("/no/modprobe"), Box::new(write));
        std::fs::write(dir.path().join("empty"), "").unwrap();
        let e = host.write("none", "x\n").unwrap_err().to_string();
        assert!(e.contains("cannot write \"x\"") && e.contains("none"), "{e}");
        assert!(host.load("x").unwrap_err().to_string().contains("cannot run `modprobe x`"));
        host.write("empty", "now\n").unwrap();
        assert_eq!(host.line("empty").unwrap(), "now");
    }
}
