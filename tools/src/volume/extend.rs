//! `polldisk volume extend`.

use anyhow::bail;
use clap::Args;
use serde::Serialize;

use super::open::{check_idle, open_to_change};
use super::{Devices, VolumeName};
use crate::image::print::{self, Output, bytes};
use crate::output::usage;

/// Make a volume larger. What is added holds what was on its extents before.
#[derive(Args)]
pub(crate) struct Extend {
    /// The new size, as in 10G; +10G counts from the old one. Rounded up to extents.
    #[arg(long, short = 'L', value_name = "[+]SIZE", value_parser = wanted)]
    size: Wanted,
    #[command(flatten)]
    output: Output,
    /// The volume.
    #[arg(value_name = "GROUP/NAME", value_parser = super::volume_name)]
    volume: VolumeName,
    #[command(flatten)]
    devices: Devices,
}

/// A size as it is given.
#[derive(Clone, Copy)]
enum Wanted {
    To(u64),
    By(u64),
}

fn wanted(text: &str) -> Result<Wanted, String> {
    match text.strip_prefix('+') {
        Some(by) => super::size(by).map(Wanted::By),
        None => super::size(text).map(Wanted::To),
    }
}

/// What was done. Sizes are bytes.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    group: String,
    name: String,
    old_size: u64,
    size: u64,
    segments: usize,
    /// Of the group.
    free: u64,
}

/// Extends it.
pub(crate) fn run(args: &Extend) -> anyhow::Result<()> {
    let what = &args.volume;
    let (mut old, mut asked, mut unit) = (0, 0, 0);
    let mut open = open_to_change(&what.group, &args.devices, |vg| {
        check_idle(&args.devices, vg, what)?;
        let lv = vg.lv(&what.name)?;
        old = lv.extents().saturating_mul(vg.extent_bytes());
        let stripes = lv.segments.last().map_or(1, |last| last.areas.len() as u64);
        unit = vg.extent_bytes() * stripes;
        asked = match args.size {
            Wanted::To(size) if size < old => bail!(
                "{what}: has {} ({old} bytes), and is not made smaller: what is in it would be cut off",
                bytes(old)
            ),
            Wanted::To(size) => size,
            Wanted::By(by) => match old.checked_add(by) {
                Some(size) => size,
                None => return usage(format!("{what}: {old} bytes and {by} are too many")),
            },
        };
        Ok(())
    })?;
    let more = open.vg().extents_for(asked - old);
    if more > 0 {
        let why = format!("polldisk volume extend {what}");
        open.change(what, &why, |vg, _| vg.extend_lv(&what.name, more))?;
    }
    let vg = open.vg();
    let lv = vg.lv(&what.name)?;
    let size = lv.extents().saturating_mul(vg.extent_bytes());
    let segments = lv.segments.len();
    let free = vg.free_extents().saturating_mul(vg.extent_bytes());
    open.close()?;
    super::tell_rounded(what, asked, size, unit);
    if args.output.is_json() {
        let (group, name) = (what.group.clone(), what.name.clone());
        return print::json(&Done { group, name, old_size: old, size, segments, free });
    }
    print::line(&match size == old {
        true => format!("Volume {what} has {} already.", bytes(size)),
        false => format!(
            "Volume {what} extended from {} to {}; {} are free in the group.",
            bytes(old),
            bytes(size),
            bytes(free)
        ),
    })
}
