//! `polldisk volume remove-group`.

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;

use super::open::{close, open_to_change};
use super::{Devices, kernel};
use crate::image::print::{self, Output};

/// Remove a volume group that has no volumes; its devices are free then.
#[derive(Args)]
pub(crate) struct RemoveGroup {
    #[command(flatten)]
    output: Output,
    /// The group.
    #[arg(value_name = "GROUP")]
    group: String,
    #[command(flatten)]
    devices: Devices,
}

/// What was done.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    group: String,
    devices: Vec<String>,
}

/// Removes it.
pub(crate) fn run(args: &RemoveGroup) -> anyhow::Result<()> {
    let _claims = kernel::claim(&args.devices.nodes)?;
    let name = &args.group;
    let open = open_to_change(name, &args.devices, |vg| match vg.lvs.len() {
        0 => Ok(()),
        n => bail!(
            "volume group {name} has {n} volume{}: remove {} first with `polldisk volume remove`",
            if n == 1 { "" } else { "s" },
            if n == 1 { "it" } else { "them" },
        ),
    })?;
    let devices = open.nodes.clone();
    let sources = open.group.remove().with_context(|| format!("volume group {name}"))?;
    close(sources)?;
    if args.output.is_json() {
        return print::json(&Done { group: name.clone(), devices });
    }
    print::line(&format!("Volume group {name} removed from {}.", devices.join(", ")))
}
