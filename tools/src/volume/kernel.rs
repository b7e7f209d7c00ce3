//! What the kernel does with a block device that is in a group: whether it uses the device at all,
//! and whether it has a volume active. For other nodes there is nothing to be asked.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use anyhow::bail;
use nix::fcntl::OFlag;
use node::NodeSpec;
use volume::{Lv, Vg};

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
pub(crate) fn claim(nodes: &[NodeSpec]) -> anyhow::Result<Vec<File>> {
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
    match node::active_volume(nodes, vg, lv) {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}
