//! `polldisk volume take-over`.

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use volume::HostIds;

use super::Devices;
use super::open::{Access, expect_name, finish, look, open_devices, own};
use crate::image::print::{self, Output};

/// Make a group of another host one of this host. Only if that host is gone for good, or has let go
/// of the group: what two hosts write to at a time is destroyed.
#[derive(Args)]
pub(crate) struct TakeOver {
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
    old_system_id: Option<String>,
    system_id: String,
}

/// Takes it over.
pub(crate) fn run(args: &TakeOver) -> anyhow::Result<()> {
    let name = &args.group;
    let ids = HostIds::of_this_host().context("the system ID of this host")?;
    let id = own(&args.devices, &ids)?;
    let found = look(open_devices(&args.devices.nodes, Access::Write)?)?;
    expect_name(&found.vg, name)?;
    let old = found.vg.system_id.clone();
    for lv in &found.vg.lvs {
        super::kernel::refuse_active(&args.devices.nodes, &found.vg, lv)?;
    }
    let mut open = finish(found.devices, &found.vg, old.as_deref())?;
    if old.as_ref() != Some(&id) {
        let what = format!("volume group {name}");
        open.change(&what, "polldisk volume take-over", |vg, _| vg.set_system_id(&id))?;
    }
    open.close()?;
    if args.output.is_json() {
        let done = Done { group: name.clone(), old_system_id: old, system_id: id };
        return print::json(&done);
    }
    print::line(&match old {
        Some(old) if old == id => format!("Volume group {name} belongs to `{id}` already."),
        Some(old) => format!(
            "Volume group {name} belongs to `{id}` now, not to `{}`. That host must not use it again.",
            old.escape_default()
        ),
        None => format!("Volume group {name} belongs to `{id}` now; before, to no system."),
    })
}
