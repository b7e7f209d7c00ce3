//! [`active_volume`]: whether the kernel uses a volume that is to be used here.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{major, minor};
use volume::{Id, Lv, Vg};

use crate::NodeSpec;

/// Whether the kernel has a volume active on one of these devices; then it would go on with the extents
/// that it knows, and with what it has in its caches. The answer says so, and what to do.
pub fn active_volume(nodes: &[NodeSpec], vg: &Vg, lv: &Lv) -> Option<String> {
    let active = |spec: &NodeSpec| {
        let device = number(spec)?;
        let folder = format!("/sys/dev/block/{}:{}/holders", major(device), minor(device));
        let name = holder(Path::new(&folder), vg.id, lv.id)?;
        let (vg, lv) = (&vg.name, &lv.name);
        Some(format!(
            "{vg}/{lv}: is in use: the kernel has it active as /dev/mapper/{name}, on {spec}. \
             Unmount it and deactivate it first: `lvchange -an {vg}/{lv}`"
        ))
    };
    nodes.iter().find_map(active)
}

/// The device's number, if it is a block device.
fn number(spec: &NodeSpec) -> Option<u64> {
    let NodeSpec::File(path) = spec else { return None };
    let meta = std::fs::metadata(path).ok()?;
    meta.file_type().is_block_device().then(|| meta.rdev())
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
