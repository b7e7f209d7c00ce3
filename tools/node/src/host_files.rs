//! [`HostFiles`]: what sysfs, procfs and devfs say of a host, below one folder, so that tests can bring
//! their own.
//!
//! Nothing that is read is trusted: files may be missing, empty, garbage, or vanish meanwhile.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Most that is read of one file: /proc/interrupts of a large machine has a megabyte.
const MOST: u64 = 16 << 20;

/// More processors than any host has: a list that names more is nonsense.
const MOST_CPUS: u32 = 16384;

/// The files by which a kernel tells of its host.
#[derive(Clone, Debug)]
pub struct HostFiles {
    root: PathBuf,
}

impl HostFiles {
    /// Below a folder; `/` is this host.
    pub fn below(root: impl Into<PathBuf>) -> HostFiles {
        HostFiles { root: root.into() }
    }

    /// A path without its leading slash, like `proc/swaps`.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// All of a file, if it can be read.
    pub fn text(&self, path: &str) -> Option<String> {
        let mut bytes = Vec::new();
        File::open(self.path(path)).ok()?.take(MOST).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The first line of a file without blanks around it, safe to print; `None` if there is
    /// nothing.
    pub fn line(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let line = printable(text.lines().next()?.trim());
        (!line.is_empty()).then_some(line)
    }

    /// A decimal number that is all of a file.
    pub fn number(&self, path: &str) -> Option<u64> {
        self.line(path)?.parse().ok()
    }

    /// Where a link leads, as it stands there.
    pub fn link(&self, path: &str) -> Option<String> {
        fs::read_link(self.path(path)).ok()?.to_str().map(str::to_owned)
    }

    /// The names in a folder, in order; none if it cannot be read.
    pub fn names(&self, path: &str) -> Vec<String> {
        self.list(path).unwrap_or_default()
    }

    /// The names in a folder, in order. Those that are no UTF-8 are not of the kernel's making.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(self.path(path))?;
        let mut names: Vec<String> =
            entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
        names.sort_by_key(|n| natural(n));
        Ok(names)
    }

    /// Whether there is such a file or folder.
    pub fn has(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The processors in a list like `0-3,8` that is all of a file; none if it is no such list.
    pub fn cpus(&self, path: &str) -> Vec<u32> {
        cpu_list(&self.line(path).unwrap_or_default())
    }
}

/// A list like `0-3,8`; what is none of it is left out.
pub fn cpu_list(text: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        (last < MOST_CPUS).then_some(first..=last)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

/// What cannot be printed replaced, so that a device's name cannot play with a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A key by which `nvme2` comes before `nvme10`.
pub fn natural(name: &str) -> Vec<(bool, u64, char)> {
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
        let host = HostFiles::below(dir.path());
        fs::write(dir.path().join("empty"), "").unwrap();
        fs::write(dir.path().join("blank"), " \n x").unwrap();
        fs::write(dir.path().join("bytes"), b"\xff\x1b[31mred\n").unwrap();
        fs::write(dir.path().join("n"), "12\n").unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        for nothing in ["empty", "blank", "none", "folder"] {
            assert_eq!(host.line(nothing), None, "{nothing}");
            assert_eq!(host.number(nothing), None);
            assert!(host.cpus(nothing).is_empty());
        }
        assert_eq!(host.line("bytes").unwrap(), "\u{fffd}?[31mred");
        assert_eq!((host.number("n"), host.number("bytes")), (Some(12), None));
        assert_eq!(host.cpus("n"), [12]);
        assert!(host.names("none").is_empty() && host.list("n").is_err());
    }

    #[test]
    fn names_in_the_order_of_their_numbers() {
        let mut names = ["nvme10n1", "nvme2n1", "nvme2", "sda", "nvme2n1p10", "nvme2n1p9"];
        names.sort_by_key(|n| natural(n));
        assert_eq!(names, ["nvme2", "nvme2n1", "nvme2n1p9", "nvme2n1p10", "nvme10n1", "sda"]);
    }

    #[test]
    fn lists() {
        assert_eq!(cpu_list("0-3,8\n"), [0, 1, 2, 3, 8]);
        for nothing in ["", "(null)", "-", "a-b", "3-1", "0-4294967295", "managed_irq"] {
            assert!(cpu_list(nothing).is_empty(), "{nothing}");
        }
    }
}
