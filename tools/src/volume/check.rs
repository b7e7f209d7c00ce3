//! `polldisk volume check`.

use anyhow::Context;
use block::Storage;
use clap::Args;
use serde::Serialize;
use volume::{Id, Label, MetadataArea, Vg};

use super::open::{Device, close, finish, open_devices, reading};
use super::{Devices, signature};
use crate::image::print::{self, Output};

/// Tell whether a volume group is sound: labels, all copies of its metadata, extents. Nothing is
/// changed. Exit code 1 if something is wrong.
#[derive(Args)]
pub(crate) struct Check {
    /// Read even if somebody else writes to the devices.
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Print nothing but what is wrong.
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    devices: Devices,
}

/// What was found.
#[derive(Serialize, Default)]
#[serde(rename_all = "kebab-case")]
struct Report {
    sound: bool,
    group: Option<String>,
    id: Option<String>,
    seqno: Option<u32>,
    system_id: Option<String>,
    volumes: usize,
    devices: Vec<OfDevice>,
    problems: Vec<String>,
}

#[derive(Serialize)]
struct OfDevice {
    node: String,
    id: Option<String>,
    copies: Vec<OfCopy>,
}

/// A metadata area. Sizes are bytes.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct OfCopy {
    offset: u64,
    size: u64,
    /// It is not used: other devices have the metadata.
    ignored: bool,
    /// Number of the state in it; none if there is no valid one.
    seqno: Option<u32>,
    text_size: u64,
}

/// A valid copy.
struct Copy {
    node: String,
    vg: Vg,
}

/// Checks; returns the exit code.
pub(crate) fn run(args: &Check) -> anyhow::Result<u8> {
    let mut report = Report::default();
    let mut copies = Vec::new();
    let mut devices = Vec::new();
    let mut unlabelled = Vec::new();
    for mut device in open_devices(&args.devices.nodes, reading(args.force_share))? {
        match one(&mut device, &mut report, &mut copies)? {
            Some(label) => devices.push((device, label)),
            None => unlabelled.push(device.source),
        }
    }
    close(unlabelled)?;
    let newest = copies.iter().max_by_key(|copy| copy.vg.seqno);
    let problems = &mut report.problems;
    match newest {
        None => problems.push("no device has a valid copy of a volume group's metadata".to_owned()),
        Some(Copy { vg, .. }) => {
            report.group = Some(vg.name.clone());
            report.id = Some(vg.id.to_string());
            report.seqno = Some(vg.seqno);
            report.system_id = vg.system_id.clone();
            report.volumes = vg.lvs.len();
            agree(vg, &copies, problems);
            let ids: Vec<(&str, Id)> =
                devices.iter().map(|(d, label)| (d.node.as_str(), label.id)).collect();
            members(vg, &ids, problems);
        }
    }
    match newest {
        // Whatever else opening looks at: sizes of devices, and where their metadata is.
        Some(Copy { vg, .. }) if problems.is_empty() => {
            match finish(devices, vg, vg.system_id.as_deref()) {
                Ok(open) => open.close()?,
                Err(e) => problems.push(crate::output::explain(&e)),
            }
        }
        _ => close(devices.into_iter().map(|(device, _)| device.source).collect())?,
    }
    report.sound = report.problems.is_empty();
    print(args, &report)?;
    Ok(u8::from(!report.sound))
}

fn print(args: &Check, report: &Report) -> anyhow::Result<()> {
    if args.output.is_json() {
        return print::json(report);
    }
    for problem in &report.problems {
        tell!("{problem}");
    }
    if let (true, false, Some(name), Some(seqno)) =
        (report.sound, args.quiet, &report.group, report.seqno)
    {
        let (n, copies) =
            (report.volumes, report.devices.iter().map(|d| d.copies.len()).sum::<usize>());
        print::line(&format!(
            "Volume group {name} is sound: {n} volume(s), state {seqno} in {copies} copies of the metadata."
        ))?;
    }
    Ok(())
}

/// Looks at what one device alone says. Its label, if it has one.
fn one(
    device: &mut Device,
    report: &mut Report,
    copies: &mut Vec<Copy>,
) -> anyhow::Result<Option<Label>> {
    let node = device.node.clone();
    let mut wrong = |text: String| report.problems.push(format!("{node}: {text}"));
    let mut found = OfDevice { node: node.clone(), id: None, copies: Vec::new() };
    let label = match Label::read(&mut device.source) {
        Ok(Some(label)) => Some(label),
        Ok(None) => {
            let marks = signature::detect(&mut device.source).with_context(|| node.clone())?;
            let has = marks.first().map_or("nothing that is known", |f| f.what.as_str());
            wrong(format!("no LVM2 label in the first four sectors, but {has}"));
            None
        }
        Err(e) => {
            wrong(e.to_string());
            None
        }
    };
    if let Some(label) = &label {
        found.id = Some(label.id.to_string());
        let len = device.source.len();
        if label.device_size > len {
            let said = label.device_size;
            wrong(format!("has {len} bytes, but had {said} when its label was written"));
        }
        for &area in &label.metadata {
            let mut copy = OfCopy {
                offset: area.offset,
                size: area.size,
                ignored: false,
                seqno: None,
                text_size: 0,
            };
            let state = MetadataArea::read(&mut device.source, area).and_then(|area| {
                copy.ignored = area.ignored;
                copy.text_size = area.live.map_or(0, |live| live.size);
                let text = if area.ignored { None } else { area.text(&mut device.source)? };
                text.map(|text| Vg::read(&text)).transpose()
            });
            match state {
                Ok(Some(vg)) => {
                    copy.seqno = Some(vg.seqno);
                    copies.push(Copy { node: format!("{node}, metadata at {}", area.offset), vg });
                }
                Ok(None) if copy.ignored => {}
                Ok(None) => wrong(format!("the metadata area at {} is empty", area.offset)),
                Err(e) => wrong(format!("the metadata area at {}: {e}", area.offset)),
            }
            found.copies.push(copy);
        }
    }
    report.devices.push(found);
    Ok(label)
}

/// All copies are the newest state.
fn agree(newest: &Vg, copies: &[Copy], problems: &mut Vec<String>) {
    for Copy { node, vg } in copies {
        let seqno = newest.seqno;
        if vg.id != newest.id {
            problems.push(format!("{node}: is of volume group {}, not {}", vg.name, newest.name));
        } else if vg.seqno != seqno {
            problems.push(format!(
                "{node}: has state {}, but the newest is {seqno}; the next change repairs it",
                vg.seqno
            ));
        } else if vg != newest {
            problems.push(format!("{node}: has another state of number {seqno} than others"));
        }
    }
}

/// The devices are those of the group.
fn members(vg: &Vg, devices: &[(&str, Id)], problems: &mut Vec<String>) {
    for pv in &vg.pvs {
        match devices.iter().filter(|(_, id)| *id == pv.id).count() {
            0 => problems.push(format!(
                "device {} ({}) of volume group {} is not among those that are named",
                pv.key, pv.id, vg.name
            )),
            1 => {}
            _ => problems.push(format!("two devices are {} ({}): one is a copy", pv.key, pv.id)),
        }
    }
    for (node, id) in devices {
        if vg.pvs.iter().all(|pv| pv.id != *id) {
            problems.push(format!("{node}: is not in volume group {}", vg.name));
        }
    }
}
