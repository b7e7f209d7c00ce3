//! `polldisk volume create`.

use anyhow::Context;
use block::Storage;
use clap::Args;
use serde::Serialize;
use volume::{Id, Shape, Vg};

use super::open::{Open, open_to_change};
use super::{Devices, VolumeName, list};
use crate::image::print::{self, Output, bytes};
use crate::output::usage;

/// Make a volume. Its first MiB is emptied; behind that it holds what was on its extents before.
#[derive(Args)]
pub(crate) struct Create {
    /// Bytes, rounded up to extents.
    #[arg(long, short = 'L', value_name = "SIZE", value_parser = super::size)]
    size: u64,
    /// On how many devices it is in stripes; 1: on one after another.
    #[arg(long, short = 'i', value_name = "N", default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..=128))]
    stripes: u32,
    /// Bytes of a stripe: a power of two from 4k, at most an extent. By default 64k.
    #[arg(long, short = 'I', value_name = "SIZE", value_parser = super::size)]
    stripe_size: Option<u64>,
    /// Give the volume a tag (may be given several times).
    #[arg(long, value_parser = super::tag)]
    tag: Vec<String>,
    #[command(flatten)]
    output: Output,
    /// The volume.
    #[arg(value_name = "GROUP/NAME", value_parser = super::volume_name)]
    volume: VolumeName,
    #[command(flatten)]
    devices: Devices,
}

/// So much at the begin is emptied: nobody shall take what was there for a file system or an image.
const EMPTIED: u64 = 1 << 20;

/// What was made.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    group: String,
    #[serde(flatten)]
    volume: list::OfVolume,
    /// Bytes of the group.
    free: u64,
}

/// Makes it.
pub(crate) fn run(args: &Create) -> anyhow::Result<()> {
    let what = &args.volume;
    if args.stripes == 1 && args.stripe_size.is_some() {
        return usage("--stripe-size is for --stripes 2 and more");
    }
    let stripe = args.stripe_size.unwrap_or(64 << 10);
    let shape = Shape { stripes: args.stripes, stripe_size: stripe / 512 };
    let id = Id::random().context("no random numbers")?;
    let mut unit = 0;
    let mut open = open_to_change(&what.group, &args.devices, |vg| {
        if let Err(e) = volume::check_name(&vg.name, &what.name) {
            return usage(format!("{what}: {e}"));
        }
        if vg.lv(&what.name).is_ok() {
            anyhow::bail!("{what}: exists already; `polldisk volume extend` makes it larger");
        }
        unit = vg.extent_bytes() * u64::from(args.stripes);
        check_shape(args, vg, stripe)
    })?;
    let extents = open.vg().extents_for(args.size);
    let why = format!("polldisk volume create {what}");
    open.change(what, &why, |vg, author| {
        vg.create_lv(id, &what.name, extents, shape, author)?;
        args.tag.iter().try_for_each(|tag| vg.tag_lv(&what.name, tag))
    })?;
    empty(&mut open, what)?;
    let vg = open.vg();
    let volume = list::OfVolume::of(vg, &open.nodes, vg.lv(&what.name)?);
    let free = vg.free_extents().saturating_mul(vg.extent_bytes());
    open.close()?;
    super::tell_rounded(what, args.size, volume.size, unit);
    if args.output.is_json() {
        return print::json(&Done { group: what.group.clone(), volume, free });
    }
    print::line(&format!(
        "Volume {what} created: {}; {} are free in the group.",
        bytes(volume.size),
        bytes(free)
    ))
}

/// There are as many devices as stripes, and stripes that extents are made of.
fn check_shape(args: &Create, vg: &Vg, stripe: u64) -> anyhow::Result<()> {
    let n = args.stripes as usize;
    if n > vg.pvs.len() {
        return usage(format!(
            "{}: --stripes {n}, but the volume group has {} device(s)",
            args.volume,
            vg.pvs.len()
        ));
    }
    let right = stripe.is_power_of_two() && stripe >= 4096 && stripe <= vg.extent_bytes();
    if n > 1 && !right {
        return usage(format!(
            "{}: --stripe-size {stripe}: a power of two from 4k to the {} of an extent",
            args.volume,
            bytes(vg.extent_bytes())
        ));
    }
    Ok(())
}

fn empty(open: &mut Open, what: &VolumeName) -> anyhow::Result<()> {
    let mut volume = open.group.volume(&what.name)?;
    let len = volume.len().min(EMPTIED);
    volume
        .write_zeroes_at(0, len)
        .and_then(|()| volume.flush())
        .with_context(|| format!("{what}: is made, but cannot be emptied at its begin"))
}
