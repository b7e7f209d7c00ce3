//! `cargo xtask lab …`: a virtual machine with emulated hardware, in which a built `polldisk` is put
//! to work. One line per case; what each lab shows stands in tools/lab/README.md.

mod guest;
mod module;
mod vfio;

use anyhow::Result;

/// The labs.
#[derive(clap::Subcommand)]
pub(crate) enum Lab {
    /// NVMe devices behind an emulated IOMMU, driven through VFIO.
    Vfio(vfio::Args),
}

/// Runs one; false when a case failed.
pub(crate) fn command(lab: &Lab) -> Result<bool> {
    match lab {
        Lab::Vfio(args) => vfio::command(args),
    }
}
