//! Who uses a device: file systems, swap, device-mapper, md, loop devices, and processes.
//!
//! What is found here is for people to read. That nothing uses a disk is decided by the kernel
//! ([`super::claim`]), which also knows of other mount namespaces, ZFS, or an iSCSI target.

use std::collections::BTreeMap;

use node::{natural, printable};
use serde::Serialize;
use vfio::Function;

use super::host::Host;

/// Layers of holders that are followed: md on dm on md is more than anybody has.
const DEPTH: usize = 8;

/// A namespace as the kernel's driver has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Disk {
    /// Like `nvme0n1`.
    pub(crate) name: String,
    pub(crate) nsid: Option<u64>,
    /// In bytes.
    pub(crate) size: Option<u64>,
    /// Bytes of a block.
    pub(crate) lba: Option<u64>,
    /// Its partitions, like `nvme0n1p1`.
    pub(crate) parts: Vec<String>,
}

/// A use of a device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Use {
    /// The disk, partition, or what stands on it.
    pub(crate) device: String,
    /// mount, swap, lvm, dm, md, loop, btrfs, holder or process.
    pub(crate) kind: &'static str,
    /// Where it is mounted, what the holder is called, or which process it is.
    pub(crate) by: String,
}

impl std::fmt::Display for Use {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Use { device, kind, by } = self;
        match *kind {
            "mount" => write!(f, "{device} mounted on {by}"),
            "swap" => write!(f, "{device} is swap"),
            "process" => write!(f, "{device} open by {by}"),
            kind => write!(f, "{device} held by {kind} {by}"),
        }
    }
}

/// What all devices of a host are used for: looked at once, asked for each.
pub(crate) struct Uses<'a> {
    host: &'a Host,
    /// Device number, name of the source, where; of each mount.
    mounts: Vec<(String, String, String)>,
    swaps: Vec<String>,
    /// Name of the backing device, and the loop device.
    loops: Vec<(String, String)>,
    /// Name of a member, and the file system.
    btrfs: Vec<(String, String)>,
    /// Processes that have a file below /dev open, by its path.
    open: BTreeMap<String, Vec<u64>>,
    /// Not all processes could be looked into.
    pub(crate) partial: bool,
}

impl<'a> Uses<'a> {
    pub(crate) fn look(host: &'a Host) -> Uses<'a> {
        let mut uses = Uses {
            host,
            mounts: mounts(&host.text("proc/self/mountinfo").unwrap_or_default()),
            swaps: swaps(&host.text("proc/swaps").unwrap_or_default()),
            loops: Vec::new(),
            btrfs: Vec::new(),
            open: BTreeMap::new(),
            partial: false,
        };
        for name in host.names("sys/block").into_iter().filter(|n| n.starts_with("loop")) {
            if let Some(file) = host.line(&format!("sys/block/{name}/loop/backing_file")) {
                uses.loops.push((base(&file).to_owned(), name));
            }
        }
        for fs in host.names("sys/fs/btrfs") {
            for member in host.names(&format!("sys/fs/btrfs/{fs}/devices")) {
                uses.btrfs.push((member, printable(&fs)));
            }
        }
        uses.look_at_processes();
        uses
    }

    fn look_at_processes(&mut self) {
        for pid in self.host.names("proc").iter().filter_map(|n| n.parse::<u64>().ok()) {
            let fds = match self.host.list(&format!("proc/{pid}/fd")) {
                Ok(fds) => fds,
                Err(e) => {
                    // One that has ended meanwhile uses nothing.
                    self.partial |= e.kind() == std::io::ErrorKind::PermissionDenied;
                    continue;
                }
            };
            for fd in fds {
                let Some(link) = self.host.link(&format!("proc/{pid}/fd/{fd}")) else { continue };
                let path = link.strip_suffix(" (deleted)").unwrap_or(&link);
                if path.starts_with("/dev/") {
                    let pids = self.open.entry(path.to_owned()).or_default();
                    if pids.last() != Some(&pid) {
                        pids.push(pid);
                    }
                }
            }
        }
    }

    /// Uses of a function that the kernel's driver has: of its disks, their partitions, and what
    /// stands on them; and its character devices.
    pub(crate) fn of_disks(&self, controller: Option<&str>, disks: &[Disk]) -> Vec<Use> {
        let mut found = Vec::new();
        for disk in disks {
            self.of_block(&disk.name, &format!("sys/block/{}", disk.name), 0, &mut found);
            for part in &disk.parts {
                let folder = format!("sys/block/{}/{part}", disk.name);
                self.of_block(part, &folder, 0, &mut found);
            }
            // The generic device of a namespace: nvme0n1 is ng0n1.
            if let Some(rest) = disk.name.strip_prefix("nvme") {
                self.of_file(&format!("/dev/ng{rest}"), &mut found);
            }
        }
        if let Some(name) = controller {
            self.of_file(&format!("/dev/{name}"), &mut found);
        }
        found
    }

    /// Uses of a function that vfio-pci has: processes that have its group or itself open.
    pub(crate) fn of_vfio(&self, function: &Function) -> Vec<Use> {
        let mut found = Vec::new();
        if let Some(group) = function.group {
            self.of_file(&format!("/dev/vfio/{}", group.number), &mut found);
            self.of_file(&format!("/dev/vfio/noiommu-{}", group.number), &mut found);
        }
        for name in self.host.names(&self.host.pci(function.address, "vfio-dev")) {
            self.of_file(&format!("/dev/vfio/devices/{name}"), &mut found);
        }
        found
    }

    fn of_file(&self, path: &str, found: &mut Vec<Use>) {
        for &pid in self.open.get(path).into_iter().flatten() {
            let name = self.host.line(&format!("proc/{pid}/comm"));
            let by = format!("{} ({pid})", name.as_deref().unwrap_or("?"));
            let device = path.trim_start_matches("/dev/").to_owned();
            found.push(Use { device, kind: "process", by });
        }
    }

    /// Uses of a block device whose folder in sysfs is `folder`, and of what stands on it.
    fn of_block(&self, name: &str, folder: &str, depth: usize, found: &mut Vec<Use>) {
        let mut add = |kind, by: &str| {
            let u = Use { device: printable(name), kind, by: printable(by) };
            if !found.contains(&u) {
                found.push(u);
            }
        };
        let number = self.host.line(&format!("{folder}/dev"));
        for (dev, source, at) in &self.mounts {
            if Some(dev) == number.as_ref() || source == name {
                add("mount", at);
            }
        }
        if self.swaps.iter().any(|s| s == name) {
            add("swap", "swap");
        }
        for (_, by) in self.loops.iter().filter(|(on, _)| on == name) {
            add("loop", by);
        }
        for (_, by) in self.btrfs.iter().filter(|(on, _)| on == name) {
            add("btrfs", by);
        }
        let holders = self.host.names(&format!("{folder}/holders"));
        for holder in &holders {
            let (kind, by) = self.holder(holder);
            add(kind, &by);
        }
        self.of_file(&format!("/dev/{name}"), found);
        if depth < DEPTH {
            for holder in &holders {
                self.of_block(holder, &format!("sys/block/{holder}"), depth + 1, found);
            }
        }
    }

    /// What kind of device a holder is, and what people call it.
    fn holder(&self, name: &str) -> (&'static str, String) {
        if name.starts_with("dm-") {
            let of = |file: &str| self.host.line(&format!("sys/block/{name}/dm/{file}"));
            let kind = match of("uuid") {
                Some(uuid) if uuid.starts_with("LVM-") => "lvm",
                _ => "dm",
            };
            let by = of("name").map_or(name.to_owned(), |n| format!("{n} ({name})"));
            return (kind, by);
        }
        (if name.starts_with("md") { "md" } else { "holder" }, name.to_owned())
    }
}

/// The controller's name and the disks that the kernel's driver has of a function.
pub(crate) fn disks(host: &Host, function: &Function) -> (Option<String>, Vec<Disk>) {
    let folder = host.pci(function.address, "nvme");
    let Some(controller) = host.names(&folder).into_iter().find(|n| n.starts_with("nvme")) else {
        return (None, Vec::new());
    };
    let mut disks = Vec::new();
    for entry in host.names(&format!("{folder}/{controller}")) {
        let Some(name) = disk_name(&entry) else { continue };
        let of = |file: &str| host.number(&format!("sys/block/{name}/{file}"));
        let mut parts = host.names(&format!("sys/block/{name}"));
        parts.retain(|p| {
            p.starts_with(&name) && host.has(&format!("sys/block/{name}/{p}/partition"))
        });
        disks.push(Disk {
            nsid: of("nsid"),
            // In units of 512 bytes whatever the block size.
            size: of("size").and_then(|n| n.checked_mul(512)),
            lba: of("queue/logical_block_size"),
            parts,
            name,
        });
    }
    disks.sort_by_key(|d| natural(&d.name));
    (Some(controller), disks)
}

/// The disk of an entry of a controller's folder: nvme0n1, or for a path of a disk that has
/// several, nvme0c1n1, the disk of all of them, nvme0n1.
fn disk_name(entry: &str) -> Option<String> {
    let (controller, nsid) = entry.strip_prefix("nvme")?.split_once('n')?;
    let digits = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
    let (instance, path) = match controller.split_once('c') {
        Some((instance, path)) => (instance, Some(path)),
        None => (controller, None),
    };
    let fine = digits(instance) && digits(nsid) && path.is_none_or(digits);
    fine.then(|| format!("nvme{instance}n{nsid}"))
}

/// Lines of /proc/self/mountinfo: device number, last part of the source, where.
fn mounts(text: &str) -> Vec<(String, String, String)> {
    text.lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ');
            let (dev, at) = (left.nth(2)?, left.nth(1)?);
            let source = unescape(right.split(' ').nth(1)?);
            Some((dev.to_owned(), base(&source).to_owned(), unescape(at)))
        })
        .collect()
}

/// Lines of /proc/swaps after the first: last part of the path.
fn swaps(text: &str) -> Vec<String> {
    let path = |line: &str| Some(base(&unescape(line.split_whitespace().next()?)).to_owned());
    text.lines().skip(1).filter_map(path).collect()
}

fn base(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Octal escapes, as procfs writes blanks and backslashes.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&b, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        let code = octal.filter(|_| b == b'\\').and_then(|d| u8::from_str_radix(d, 8).ok());
        bytes.push(code.unwrap_or(b));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::fake::Fake;

    fn said(fake: &Fake, address: &str) -> Vec<String> {
        let host = fake.host();
        let function = host.sysfs().function(address.parse().unwrap()).unwrap();
        let (controller, disks) = disks(&host, &function);
        let uses = Uses::look(&host);
        let mut found = uses.of_disks(controller.as_deref(), &disks);
        found.extend(uses.of_vfio(&function));
        found.iter().map(ToString::to_string).collect()
    }

    const A: &str = "0000:01:00.0";

    #[test]
    fn nothing_uses_an_idle_disk() {
        let fake = Fake::new();
        fake.nvme(A, 0).partition("nvme0n1", 1);
        assert!(said(&fake, A).is_empty());
    }

    #[test]
    fn mounts_by_number_and_by_name() {
        let fake = Fake::new();
        fake.nvme(A, 0).partition("nvme0n1", 1).partition("nvme0n1", 2);
        let number = fake.device_number("nvme0n1p1");
        fake.mount(&format!("36 35 {number} / /a\\040b rw shared:1 - ext4 /dev/root rw"));
        // btrfs has a number of its own.
        fake.mount("37 35 0:41 /sub /home rw - btrfs /dev/nvme0n1p2 rw,subvol=/sub");
        fake.mount("not a mount at all");
        fake.mount("1 2 3 - ");
        assert_eq!(said(&fake, A), ["nvme0n1p1 mounted on /a b", "nvme0n1p2 mounted on /home"]);
    }

    #[test]
    fn lvm_md_crypt_and_swap_are_followed_upwards() {
        let fake = Fake::new();
        fake.nvme(A, 0).partition("nvme0n1", 1).partition("nvme0n1", 2).partition("nvme0n1", 3);
        fake.holder("nvme0n1/nvme0n1p1", "md127");
        fake.holder("md127", "dm-0").dm("dm-0", "vg-root", "LVM-abc");
        fake.holder("nvme0n1/nvme0n1p2", "dm-1").dm("dm-1", "crypt", "CRYPT-LUKS2-x");
        let number = fake.device_number("dm-0");
        fake.mount(&format!("36 35 {number} / / rw - xfs /dev/mapper/vg-root rw"));
        fake.swap("/dev/nvme0n1p3 partition 1 2 3").swap("/dev/dm-1 partition 1 2 3");
        assert_eq!(
            said(&fake, A),
            [
                "nvme0n1p1 held by md md127",
                "md127 held by lvm vg-root (dm-0)",
                "dm-0 mounted on /",
                "nvme0n1p2 held by dm crypt (dm-1)",
                "dm-1 is swap",
                "nvme0n1p3 is swap",
            ]
        );
    }

    #[test]
    fn holders_that_go_in_a_circle_end() {
        let fake = Fake::new();
        fake.nvme(A, 0);
        fake.holder("nvme0n1", "dm-0").holder("dm-0", "dm-0").holder("dm-0", "odd");
        let said = said(&fake, A);
        assert!(
            said.len() < 10 && said.contains(&"dm-0 held by holder odd".to_owned()),
            "{said:?}"
        );
    }

    #[test]
    fn processes_loops_and_members_of_btrfs() {
        let fake = Fake::new();
        fake.nvme(A, 3).partition("nvme3n1", 1);
        fake.process(77, "dd\x1b", &["/dev/nvme3n1p1", "socket:[1]", "/dev/nvme3n1p1"]);
        fake.process(9, "smartd", &["/dev/nvme3", "/dev/nvme30", "/dev/nvme3n1 (deleted)"]);
        fake.process(8, "tool", &["/dev/ng3n1"]);
        fake.file("sys/block/loop7/loop/backing_file", "/dev/nvme3n1\n");
        fake.file("sys/fs/btrfs/f00/devices/nvme3n1p1", "");
        assert_eq!(
            said(&fake, A),
            [
                "nvme3n1 held by loop loop7",
                "nvme3n1 open by smartd (9)",
                "nvme3n1p1 held by btrfs f00",
                "nvme3n1p1 open by dd? (77)",
                "ng3n1 open by tool (8)",
                "nvme3 open by smartd (9)",
            ]
        );
    }

    #[test]
    fn holders_of_a_group() {
        let fake = Fake::new();
        fake.function(A).driver(A, "vfio-pci").group(7, &[A]);
        fake.process(5, "qemu", &["/dev/vfio/7", "/dev/vfio/vfio"]);
        fake.process(6, "other", &["/dev/vfio/70", "/dev/vfio/devices/vfio0"]);
        assert_eq!(said(&fake, A), ["vfio/7 open by qemu (5)"]);
        fake.file(&format!("sys/bus/pci/devices/{A}/vfio-dev/vfio0/dev"), "");
        assert_eq!(
            said(&fake, A),
            ["vfio/7 open by qemu (5)", "vfio/devices/vfio0 open by other (6)"]
        );
    }

    #[test]
    fn disks_of_a_controller() {
        let fake = Fake::new();
        fake.nvme(A, 0);
        fake.multipath(A, "nvme0", "nvme1c0n2", "nvme1n2");
        let host = fake.host();
        let function = host.sysfs().function(A.parse().unwrap()).unwrap();
        let (controller, found) = disks(&host, &function);
        assert_eq!(controller.as_deref(), Some("nvme0"));
        let names: Vec<_> = found.iter().map(|d| d.name.as_str()).collect();
        assert_eq!(names, ["nvme0n1", "nvme1n2"]);
        assert_eq!(
            (found[0].size, found[0].lba, found[0].nsid),
            (Some(1 << 30), Some(512), Some(1))
        );
        for (entry, disk) in [
            ("nvme12n34", Some("nvme12n34")),
            ("nvme0c3n1", Some("nvme0n1")),
            ("nvme0", None),
            ("nvmen1", None),
            ("nvme0n", None),
            ("nvme0n1p1", None),
            ("nvme0cn1", None),
            ("ng0n1", None),
            ("hwmon3", None),
        ] {
            assert_eq!(disk_name(entry).as_deref(), disk, "{entry}");
        }
    }

    #[test]
    fn garbage_in_the_kernels_files_is_passed_over() {
        let fake = Fake::new();
        fake.nvme(A, 0);
        for file in ["size", "nsid", "queue/logical_block_size", "dev"] {
            for text in ["", "\u{0}\n", "-1", "99999999999999999999", "18446744073709551615\n"] {
                fake.file(&format!("sys/block/nvme0n1/{file}"), text);
                assert!(said(&fake, A).is_empty());
            }
        }
        fake.file("proc/swaps", "\n\n \n");
        fake.file("proc/self/mountinfo", " - \n - - -\n\n");
        fake.process(4, "", &[]);
        assert!(said(&fake, A).is_empty());
        assert_eq!(unescape("a\\040\\134\\0\\9x\\777"), "a \\\\0\\9x\\777");
    }
}
