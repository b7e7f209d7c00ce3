//! `polldisk volume export-text`.

use std::io::Write;

use anyhow::{Context, bail};
use clap::Args;
use volume::MetadataArea;

use super::Devices;
use super::open::{look, open_devices, reading};
use crate::image::print::{self, STDOUT};

/// Print a group's metadata as it stands on the devices. vgcfgrestore takes it as a backup.
#[derive(Args)]
pub(crate) struct ExportText {
    /// Read even if somebody else writes to the devices.
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    devices: Devices,
}

/// Prints it.
pub(crate) fn run(args: &ExportText) -> anyhow::Result<()> {
    let found = look(open_devices(&args.devices.nodes, reading(args.force_share))?)?;
    let mut text = None;
    let mut sources = Vec::new();
    for (mut device, label) in found.devices {
        for &area in &label.metadata {
            // Copies that are damaged or old are passed over.
            let copy = MetadataArea::read(&mut device.source, area).and_then(|area| {
                if area.ignored { Ok(None) } else { area.text(&mut device.source) }
            });
            if let Ok(Some(copy)) = copy
                && volume::Vg::read(&copy).is_ok_and(|vg| vg == found.vg)
            {
                text.get_or_insert((device.node.clone(), copy));
            }
        }
        sources.push(device.source);
    }
    super::open::close(sources)?;
    let Some((node, text)) = text else { bail!("the metadata has changed while it was read") };
    let mut out = print::out();
    let vg = &found.vg;
    writeln!(
        out,
        "# Metadata of volume group {}, number {}, as it stands on {}\n",
        vg.name,
        vg.seqno,
        node.escape_default()
    )
    .and_then(|()| out.write_all(&text))
    .and_then(|()| if text.ends_with(b"\n") { Ok(()) } else { writeln!(out) })
    .and_then(|()| out.flush())
    .context(STDOUT)
}
