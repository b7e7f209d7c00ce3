//! What the kernel does with a block device that is in a group: whether it uses the device at all,
//! and whether it has a volume active. For other nodes there is nothing to be asked.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::bail;
use nix::fcntl::OFlag;
use nix::sys::stat::{major, minor};
use node::NodeSpec;
use volume::{Id, Lv, Vg};

/// The device's number, if it is a block device.
fn number(spec: &NodeSpec) -> Option<u64> {
    let NodeSpec::File(path) = spec else { return None };
    let meta = std::fs::metadata(path).ok()?;
    meta.file_type().is_block_device().then(|| meta.rdev())
}

/// Which file or device a node is on, as far as that can be seen from outside.
pub(super) fn identity(spec: &NodeSpec) -> Option<(u64, u64)> {
    let meta = std::fs::metadata(spec.path()?).ok()?;
    match meta.file_type().is_block_device() {
        // All names of one device.
        true => Some((u64::MAX, meta.rdev())),
        false => Some((meta.dev(), meta.ino())),
    }
}

/// Has the kernel keep everybody else off whole block devices: what is open exclusively can neither
/// be mounted nor used by device-mapper, md or swap.
///
/// # Errors
/// If something in the kernel uses one.
pub(super) fn claim(nodes: &[NodeSpec]) -> anyhow::Result<Vec<File>> {
    let mut claims = Vec::new();
    for spec in nodes.iter().filter(|spec| number(spec).is_some()) {
        let Some(path) = spec.path() else { continue };
        let flags = OFlag::O_EXCL | OFlag::O_NONBLOCK;
        match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
            Ok(file) => claims.push(file),
            Err(e) if e.kind() == ErrorKind::ResourceBusy => bail!(
                "{spec}: is in use by the kernel: it (or a part of it) is mounted, swap, or in a \
                 device-mapper or md device; `lsblk {spec}` shows which. End that first"
            ),
            Err(e) => bail!("{spec}: cannot be opened: {e}"),
        }
    }
    Ok(claims)
}

/// Refuses a volume that the kernel has active: it would go on with the extents that it knows.
///
/// # Errors
/// If it is.
pub(super) fn refuse_active(nodes: &[NodeSpec], vg: &Vg, lv: &Lv) -> anyhow::Result<()> {
    for spec in nodes {
        let Some(device) = number(spec) else { continue };
        let folder = format!("/sys/dev/block/{}:{}/holders", major(device), minor(device));
        if let Some(name) = holder(Path::new(&folder), vg.id, lv.id) {
            bail!(
                "{}/{}: is in use: the kernel has it active as /dev/mapper/{name}, on {spec}. \
                 Unmount it and deactivate it first: `lvchange -an {}/{}`",
                vg.name,
                lv.name,
                vg.name,
                lv.name
            );
        }
    }
    Ok(())
}

/// The name of the device-mapper device that is this volume, among holders of a device.
fn holder(folder: &Path, vg: Id, lv: Id) -> Option<String> {
    let text = |id: Id| String::from_utf8_lossy(id.raw()).into_owned();
    let wanted = format!("LVM-{}{}", text(vg), text(lv));
    for entry in std::fs::read_dir(folder).ok()?.flatten() {
        let dm = entry.path().join("dm");
        let uuid = std::fs::read_to_string(dm.join("uuid")).unwrap_or_default();
        // Parts of a volume have a suffix.
        if uuid.starts_with(&wanted) {
            let name = std::fs::read_to_string(dm.join("name")).unwrap_or_default();
            return Some(name.trim().escape_default().to_string());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_active_volume_is_found_by_its_identity() {
        let dir = tempfile::tempdir().unwrap();
        let (vg, lv) = (Id::from_noise([1; 32]), Id::from_noise([2; 32]));
        assert_eq!(holder(&dir.path().join("none"), vg, lv), None);
        for (dm, uuid, name) in [
            ("dm-0", format!("LVM-{}{}\n", "1".repeat(32), "3".repeat(32)), "vg-other\n"),
            ("dm-1", format!("LVM-{}{}\n", "1".repeat(32), "2".repeat(32)), "vg-my--disk\n"),
            ("md0", String::new(), ""),
        ] {
            let folder = dir.path().join(dm).join("dm");
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("uuid"), uuid).unwrap();
            std::fs::write(folder.join("name"), name).unwrap();
        }
        assert_eq!(holder(dir.path(), vg, lv).as_deref(), Some("vg-my--disk"));
        assert_eq!(holder(dir.path(), vg, Id::from_noise([4; 32])), None);
    }
}
