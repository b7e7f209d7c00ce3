//! `polldisk volume rename`.

use clap::Args;
use serde::Serialize;

use super::open::{check_idle, open_to_change};
use super::{Devices, VolumeName};
use crate::image::print::{self, Output};
use crate::output::usage;

/// Give a volume another name.
#[derive(Args)]
pub(crate) struct Rename {
    #[command(flatten)]
    output: Output,
    /// The volume.
    #[arg(value_name = "GROUP/NAME", value_parser = super::volume_name)]
    volume: VolumeName,
    /// Its new name, without the group's.
    #[arg(value_name = "NEW")]
    new: String,
    #[command(flatten)]
    devices: Devices,
}

/// What was done.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    group: String,
    old_name: String,
    name: String,
}

/// Renames it.
pub(crate) fn run(args: &Rename) -> anyhow::Result<()> {
    let what = &args.volume;
    let new = &args.new;
    let mut open = open_to_change(&what.group, &args.devices, |vg| {
        if let Err(e) = volume::check_name(&vg.name, new) {
            return usage(format!("{what}: {e}"));
        }
        check_idle(&args.devices, vg, what)?;
        match vg.lv(new) {
            Ok(_) => anyhow::bail!("{what}: the name {new} is taken; remove that volume first"),
            Err(_) => Ok(()),
        }
    })?;
    let why = format!("polldisk volume rename {what} {new}");
    open.change(what, &why, |vg, _| vg.rename_lv(&what.name, new))?;
    open.close()?;
    if args.output.is_json() {
        let (group, old_name, name) = (what.group.clone(), what.name.clone(), new.clone());
        return print::json(&Done { group, old_name, name });
    }
    print::line(&format!("Volume {what} is {}/{new} now.", what.group))
}
