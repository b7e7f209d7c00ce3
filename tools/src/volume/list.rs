//! `polldisk volume list`.

use std::io::Write;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use volume::{HostIds, Lv, Vg};

use super::Devices;
use super::open::{Open, open_to_read, reading};
use crate::image::print::{self, Output, STDOUT, bytes};

/// Tell what a volume group is and which volumes it has. A group of another host is listed, too.
#[derive(Args)]
pub(crate) struct List {
    /// Read even if somebody else writes to the devices.
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    devices: Devices,
}

/// A group with all that is in it. Sizes are bytes.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Printed {
    group: OfGroup,
    devices: Vec<OfDevice>,
    volumes: Vec<OfVolume>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct OfGroup {
    name: String,
    id: String,
    seqno: u32,
    system_id: Option<String>,
    /// Whether this host may use it.
    ours: bool,
    extent_size: u64,
    size: u64,
    free: u64,
    tags: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct OfDevice {
    node: String,
    name: String,
    id: String,
    size: u64,
    free: u64,
    allocatable: bool,
}

/// A volume.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct OfVolume {
    name: String,
    id: String,
    pub(super) size: u64,
    stripes: usize,
    /// 0 without stripes.
    stripe_size: u64,
    tags: Vec<String>,
    read_only: bool,
    visible: bool,
    segments: Vec<OfSegment>,
}

/// A part of a volume.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct OfSegment {
    /// Byte of the volume.
    start: u64,
    size: u64,
    stripes: usize,
    stripe_size: u64,
    areas: Vec<OfArea>,
}

/// Where the bytes of a stripe begin.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct OfArea {
    node: String,
    /// Byte of the device.
    offset: u64,
}

impl OfVolume {
    pub(super) fn of(vg: &Vg, nodes: &[String], lv: &Lv) -> OfVolume {
        let extent = vg.extent_bytes();
        let area = |place: &volume::Place| OfArea {
            node: nodes[place.pv].clone(),
            offset: vg.pvs[place.pv].pe_start * 512 + place.extent * extent,
        };
        let segment = |s: &volume::Segment| OfSegment {
            start: s.start * extent,
            size: s.count * extent,
            stripes: s.areas.len(),
            stripe_size: s.stripe_size * 512,
            areas: s.areas.iter().map(area).collect(),
        };
        // Growth takes the shape of the last one.
        let last = lv.segments.last();
        OfVolume {
            name: lv.name.clone(),
            id: lv.id.to_string(),
            size: lv.extents().saturating_mul(extent),
            stripes: last.map_or(1, |s| s.areas.len()),
            stripe_size: last.map_or(0, |s| s.stripe_size * 512),
            tags: lv.tags.clone(),
            read_only: !lv.writable(),
            visible: lv.visible(),
            segments: lv.segments.iter().map(segment).collect(),
        }
    }
}

impl Printed {
    /// An open group; `ours` is the system ID of this host.
    pub(super) fn of(open: &Open, ours: Option<&str>) -> Printed {
        let vg = open.vg();
        let extent = vg.extent_bytes();
        let free = vg.free();
        // Each device is as large as its extents; all of them may be more than fits.
        let bytes = |extents: u64| extents.saturating_mul(extent);
        let all = vg.pvs.iter().map(|pv| pv.pe_count).sum::<u64>();
        let device = |at: usize| OfDevice {
            node: open.nodes[at].clone(),
            name: vg.pvs[at].key.clone(),
            id: vg.pvs[at].id.to_string(),
            size: vg.pvs[at].pe_count * extent,
            free: free[at].iter().map(|run| run.count).sum::<u64>() * extent,
            allocatable: vg.pvs[at].allocatable(),
        };
        let mut volumes: Vec<OfVolume> =
            vg.lvs.iter().map(|lv| OfVolume::of(vg, &open.nodes, lv)).collect();
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Printed {
            group: OfGroup {
                name: vg.name.clone(),
                id: vg.id.to_string(),
                seqno: vg.seqno,
                system_id: vg.system_id.clone(),
                ours: vg.system_id.is_none() || vg.system_id.as_deref() == ours,
                extent_size: extent,
                size: bytes(all),
                free: bytes(vg.free_extents()),
                tags: vg.tags.clone(),
            },
            devices: (0..vg.pvs.len()).map(device).collect(),
            volumes,
        }
    }
}

/// Prints it.
pub(crate) fn run(args: &List) -> anyhow::Result<()> {
    let open = open_to_read(&args.devices, reading(args.force_share))?;
    let ids = HostIds::of_this_host().context("the system ID of this host")?;
    let ours = args.devices.system_id.as_deref().or(ids.matching(open.vg()));
    let printed = Printed::of(&open, ours);
    open.close()?;
    if args.output.is_json() {
        return print::json(&printed);
    }
    let mut out = print::out();
    human(&mut out, &printed).context(STDOUT)?;
    out.flush().context(STDOUT)
}

fn human(out: &mut impl Write, printed: &Printed) -> std::io::Result<()> {
    let g = &printed.group;
    writeln!(out, "volume group: {}", g.name)?;
    writeln!(
        out,
        "size: {}, {} free, extents of {}",
        bytes(g.size),
        bytes(g.free),
        bytes(g.extent_size)
    )?;
    match (&g.system_id, g.ours) {
        (None, _) => writeln!(out, "belongs to: no system; any host that sees it may change it")?,
        (Some(id), true) => writeln!(out, "belongs to: {}, this host", id.escape_default())?,
        (Some(id), false) => writeln!(out, "belongs to: {}, another host", id.escape_default())?,
    }
    tags(out, "", &g.tags)?;
    writeln!(out, "devices:")?;
    for d in &printed.devices {
        let closed = if d.allocatable { "" } else { ", not to be allocated from" };
        writeln!(out, "    {}: {}, {} free{closed}", d.node, bytes(d.size), bytes(d.free))?;
    }
    if printed.volumes.is_empty() {
        return writeln!(out, "no volumes");
    }
    writeln!(out, "volumes:")?;
    for v in &printed.volumes {
        let mut text = format!("    {}: {}", v.name, bytes(v.size));
        if v.stripes > 1 {
            text += &format!(", {} stripes of {}", v.stripes, bytes(v.stripe_size));
        }
        if v.segments.len() > 1 {
            text += &format!(", {} segments", v.segments.len());
        }
        text += if v.read_only { ", read-only" } else { "" };
        text += if v.visible { "" } else { ", hidden" };
        writeln!(out, "{text}")?;
        tags(out, "        ", &v.tags)?;
    }
    Ok(())
}

fn tags(out: &mut impl Write, indent: &str, tags: &[String]) -> std::io::Result<()> {
    match tags.is_empty() {
        true => Ok(()),
        false => writeln!(out, "{indent}tags: {}", tags.join(", ").escape_default()),
    }
}
