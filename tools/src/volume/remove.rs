//! `polldisk volume remove`.

use clap::Args;
use serde::Serialize;

use super::open::{check_idle, open_to_change};
use super::{Devices, VolumeName};
use crate::image::print::{self, Output, bytes};

/// Remove a volume: what is in it is lost. Its devices are told that nobody needs its bytes.
#[derive(Args)]
pub(crate) struct Remove {
    #[command(flatten)]
    output: Output,
    /// The volume.
    #[arg(value_name = "GROUP/NAME", value_parser = super::volume_name)]
    volume: VolumeName,
    #[command(flatten)]
    devices: Devices,
}

/// What was done. Sizes are bytes.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    group: String,
    name: String,
    /// What its devices were told to discard.
    discarded: u64,
    /// Of the group.
    free: u64,
}

/// Removes it.
pub(crate) fn run(args: &Remove) -> anyhow::Result<()> {
    let what = &args.volume;
    let mut open =
        open_to_change(&what.group, &args.devices, |vg| check_idle(&args.devices, vg, what))?;
    let why = format!("polldisk volume remove {what}");
    let freed = open.change(what, &why, |vg, _| vg.remove_lv(&what.name))?;
    // Only now that nobody can come back to the state that had it.
    open.group.discard(&freed);
    let extent = open.vg().extent_bytes();
    let freed: u64 = freed.iter().map(|run| run.count).sum();
    let discarded = freed.saturating_mul(extent);
    let free = open.vg().free_extents().saturating_mul(extent);
    open.close()?;
    if args.output.is_json() {
        let (group, name) = (what.group.clone(), what.name.clone());
        return print::json(&Done { group, name, discarded, free });
    }
    print::line(&format!(
        "Volume {what} removed: {} discarded; {} are free in the group.",
        bytes(discarded),
        bytes(free)
    ))
}
