//! [`Claim`]: what keeps others out of a device while it changes hands.
//!
//! It ends as soon as no driver has the device. Looking for users tells people who they are, but between the look and the change somebody may
//! come. The kernel decides: a disk that is open exclusively can neither be mounted nor swapped on
//! nor taken by device-mapper or md (nor its partitions), and none that is can be opened so. A VFIO
//! group has one opener at a time.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::bail;
use nix::fcntl::OFlag;
use vfio::Function;

use super::host::Host;
use super::uses::Disk;

/// Held until no driver has the device.
pub(crate) struct Claim(#[expect(dead_code, reason = "open is all that it is for")] Vec<File>);

impl Claim {
    /// Claims all disks of a controller.
    ///
    /// # Errors
    /// If somebody has one, or it cannot be opened.
    pub(crate) fn disks(host: &Host, disks: &[Disk]) -> anyhow::Result<Claim> {
        let mut files = Vec::new();
        for disk in disks {
            let path = host.path("dev").join(&disk.name);
            let flags = OFlag::O_EXCL | OFlag::O_NONBLOCK;
            let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(&path);
            match file {
                Ok(file) => files.push(file),
                Err(e) if e.kind() == io::ErrorKind::ResourceBusy => bail!(
                    "{} is in use, by something that is not seen from here (another mount \
                     namespace, ZFS, an iSCSI target, …)",
                    disk.name
                ),
                Err(e) => bail!(
                    "cannot open {} to see that nobody uses it: {e}{}",
                    path.display(),
                    if e.kind() == io::ErrorKind::PermissionDenied { "; run as root" } else { "" }
                ),
            }
        }
        Ok(Claim(files))
    }

    /// Claims the group of a function that vfio-pci has.
    ///
    /// # Errors
    /// If a process has it.
    pub(crate) fn group(host: &Host, function: &Function) -> anyhow::Result<Claim> {
        let Some(group) = function.group else { return Ok(Claim(Vec::new())) };
        let prefix = if group.no_iommu { "noiommu-" } else { "" };
        let path = host.path("dev/vfio").join(format!("{prefix}{}", group.number));
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => Ok(Claim(vec![file])),
            // A kernel without groups, or the group's last device has no driver already.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Claim(Vec::new())),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => bail!(
                "IOMMU group {} is in use by a process (fuser {} names it)",
                group.number,
                path.display()
            ),
            Err(e) => bail!("cannot open {}: {e}", path.display()),
        }
    }
}
