//! `cargo xtask lab …`: a virtual machine with emulated hardware, in which a built `polldisk` is put
//! to work. One line per case; what each lab shows stands in tools/lab/README.md.

pub(crate) mod guest;
mod module;
mod vfio;
mod xen;

use anyhow::Result;

/// The labs.
#[derive(clap::Subcommand)]
pub(crate) enum Lab {
    /// NVMe devices driven through VFIO, with an emulated IOMMU and without one.
    #[command(alias = "vfio")]
    Nvme(vfio::Args),
    /// Guests of Xen whose disks a backend in dom0 serves.
    Xen(xen::Args),
}

/// Runs one; false when a case failed.
pub(crate) fn command(lab: &Lab) -> Result<bool> {
    match lab {
        Lab::Nvme(args) => vfio::command(args),
        Lab::Xen(args) => xen::command(args),
    }
}
