//! `polldisk image info`.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use block::Storage;
use clap::Args;
use node::{HostStorage, NodeSpec, OpenOptions, Source, open_chain};
use qcow::open::{Format, Layer};
use serde::Serialize;

use super::print::{self, Output, STDOUT, bytes};
use super::{Backing, reading, vhd_image};
use crate::args::AnyFormat;

/// Tell what an image is.
#[derive(Args)]
pub(crate) struct Info {
    /// The image's format: qcow2, raw or vhd. Found by looking at the contents if not given.
    #[arg(short, long, value_parser = crate::args::any_format)]
    format: Option<AnyFormat>,
    /// Tell about the backing files, too.
    #[arg(long)]
    backing_chain: bool,
    /// Open the image even if somebody else writes to it.
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    backing: Backing,
    #[command(flatten)]
    output: Output,
    /// The image.
    #[arg(value_name = "IMAGE", value_parser = super::node)]
    image: NodeSpec,
}

/// What is printed about a layer.
#[derive(Serialize)]
struct Printed {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    children: Vec<Child>,
    #[serde(flatten)]
    info: qcow::info::Info,
}

/// The file below a format, as qemu-img shows it.
#[derive(Serialize)]
struct Child {
    name: &'static str,
    info: FileInfo,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct FileInfo {
    children: [u8; 0],
    virtual_size: u64,
    filename: String,
    format: &'static str,
    actual_size: u64,
    format_specific: FileSpecific,
    dirty_flag: bool,
}

#[derive(Serialize)]
struct FileSpecific {
    #[serde(rename = "type")]
    kind: &'static str,
    data: Empty,
}

#[derive(Serialize)]
struct Empty {}

/// Prints it.
pub(crate) fn run(args: &Info) -> anyhow::Result<()> {
    super::refuse_special(&args.image)?;
    let format = match args.format {
        Some(format) => format,
        None => guess(&args.image)?,
    };
    let options = OpenOptions {
        top_only: !args.backing_chain,
        ..reading(format.chained().unwrap_or(Format::Raw), &args.backing, args.force_share)
    };
    if format == AnyFormat::Vhd {
        let json = args.output.is_json();
        return vhd_image::info(&args.image, &options, args.backing_chain, json);
    }
    let mut chain = open_chain(&args.image, &options)?;
    let mut all = Vec::with_capacity(chain.layers.len());
    for layer in &mut chain.layers {
        all.push(describe(layer)?);
    }
    if args.output.is_json() {
        return if args.backing_chain { print::json(&all) } else { print::json(&all[0]) };
    }
    let mut out = print::out();
    for (i, printed) in all.iter().enumerate() {
        if i > 0 {
            writeln!(out).context(STDOUT)?;
        }
        human(&mut out, printed).context(STDOUT)?;
    }
    out.flush().context(STDOUT)
}

/// Looks at an image's first bytes, and at the last sector, where VHD images have a cookie. Only for reading: a guest can write to a raw disk whatever
/// looks like another format.
fn guess(spec: &NodeSpec) -> anyhow::Result<AnyFormat> {
    let (mut first, mut last) = ([0; 8], [0; 8]);
    let mut look = |storage: &mut dyn Storage| {
        storage.read_at(0, &mut first)?;
        storage.read_at(storage.len().saturating_sub(512), &mut last)
    };
    match spec.path() {
        Some(path) => HostStorage::open(path, false)
            .map_err(anyhow::Error::new)
            .and_then(|mut s| Ok(look(&mut s)?))
            .with_context(|| spec.to_string())?,
        None => {
            let mut source = node::open_source(spec, &node::OpenOptions::read(Format::Raw))?;
            look(&mut source).with_context(|| spec.to_string())?;
            source.close()?;
        }
    }
    let format = if first.starts_with(&qcow::format::MAGIC.to_be_bytes()) {
        AnyFormat::Qcow2
    } else if &first == vhd::format::COOKIE || &last == vhd::format::COOKIE {
        AnyFormat::Vhd
    } else {
        AnyFormat::Raw
    };
    tell!(
        "polldisk: {spec}: taken for {}, by its contents; state the format with -f",
        format.name()
    );
    Ok(format)
}

fn describe(layer: &mut Layer<Source>) -> anyhow::Result<Printed> {
    let meta = layer.path.as_deref().and_then(|p| p.metadata().ok());
    let actual = meta.map(|m| std::os::unix::fs::MetadataExt::blocks(&m) * 512);
    let mut info = qcow::info::Info::of(layer, actual)?;
    info.virtual_size = info.virtual_size.next_multiple_of(512);
    if let (Some(name), None, Some(path)) =
        (&info.backing_filename, &info.full_backing_filename, &layer.path)
    {
        // Not opened, so not judged: where the name leads as it stands.
        let full = path.parent().unwrap_or(Path::new("")).join(name);
        info.full_backing_filename = Some(full.to_string_lossy().into_owned());
    }
    let children = layer.storage.host().map(|host| {
        let device = host.capacity() == host.len();
        let kind = if device { "host_device" } else { "file" };
        let info = FileInfo {
            children: [],
            virtual_size: host.len().next_multiple_of(512),
            filename: info.filename.clone(),
            format: kind,
            actual_size: actual.unwrap_or(0),
            format_specific: FileSpecific { kind: "file", data: Empty {} },
            dirty_flag: false,
        };
        Child { name: "file", info }
    });
    Ok(Printed { children: children.into_iter().collect(), info })
}

fn human(out: &mut impl Write, printed: &Printed) -> std::io::Result<()> {
    let info = &printed.info;
    writeln!(out, "image: {}", info.filename)?;
    writeln!(out, "file format: {}", info.format)?;
    writeln!(out, "virtual size: {} ({} bytes)", bytes(info.virtual_size), info.virtual_size)?;
    if let Some(actual) = info.actual_size {
        writeln!(out, "disk size: {}", bytes(actual))?;
    }
    if info.dirty_flag {
        writeln!(out, "cleanly shut down: no")?;
    }
    if let Some(size) = info.cluster_size {
        writeln!(out, "cluster_size: {size}")?;
    }
    if let Some(name) = &info.backing_filename {
        write!(out, "backing file: {name}")?;
        match &info.full_backing_filename {
            Some(full) if full != name => writeln!(out, " (actual path: {full})")?,
            _ => writeln!(out)?,
        }
    }
    if let Some(format) = &info.backing_filename_format {
        writeln!(out, "backing file format: {format}")?;
    }
    snapshots(out, &info.snapshots)?;
    if let Some(specific) = &info.format_specific {
        let data = &specific.data;
        writeln!(out, "Format specific information:")?;
        writeln!(out, "    compat: {}", data.compat)?;
        writeln!(out, "    compression type: {}", data.compression_type)?;
        if let Some(lazy) = data.lazy_refcounts {
            writeln!(out, "    lazy refcounts: {lazy}")?;
        }
        for (i, bitmap) in data.bitmaps.iter().enumerate() {
            if i == 0 {
                writeln!(out, "    bitmaps:")?;
            }
            writeln!(out, "        [{i}]:")?;
            writeln!(out, "            flags: {}", bitmap.flags.join(", "))?;
            writeln!(out, "            name: {}", bitmap.name)?;
            writeln!(out, "            granularity: {}", bitmap.granularity)?;
        }
        writeln!(out, "    refcount bits: {}", data.refcount_bits)?;
        if let Some(name) = &data.data_file {
            writeln!(out, "    data file: {name}")?;
        }
        if let Some(raw) = data.data_file_raw {
            writeln!(out, "    data file raw: {raw}")?;
        }
        if let Some(corrupt) = data.corrupt {
            writeln!(out, "    corrupt: {corrupt}")?;
        }
        if let Some(extended) = data.extended_l2 {
            writeln!(out, "    extended l2: {extended}")?;
        }
    }
    for child in &printed.children {
        writeln!(out, "Child node '/file':")?;
        writeln!(out, "    filename: {}", child.info.filename)?;
        writeln!(out, "    protocol type: {}", child.info.format)?;
        let len = child.info.virtual_size;
        writeln!(out, "    file length: {} ({len} bytes)", bytes(len))?;
        writeln!(out, "    disk size: {}", bytes(child.info.actual_size))?;
    }
    Ok(())
}

/// Prints a list of snapshots as qemu-img does; nothing if there are none.
pub(crate) fn snapshots(
    out: &mut impl Write,
    list: &[qcow::info::SnapshotInfo],
) -> std::io::Result<()> {
    if list.is_empty() {
        return Ok(());
    }
    writeln!(out, "Snapshot list:")?;
    writeln!(
        out,
        "{:8}{:16}{:>9}{:>20}{:>16}{:>11}",
        "ID", "TAG", "VM_SIZE", "DATE (UTC)", "VM_CLOCK", "ICOUNT"
    )?;
    for s in list {
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            s.vm_clock_sec / 3600,
            s.vm_clock_sec / 60 % 60,
            s.vm_clock_sec % 60,
            s.vm_clock_nsec / 1_000_000
        );
        let icount = s.icount.map_or(String::new(), |n| n.to_string());
        writeln!(
            out,
            "{:7} {:15} {:>9} {:>19} {clock:>15} {icount:>10}",
            s.id,
            s.name,
            bytes(s.vm_state_size),
            date(s.date_sec)
        )?;
    }
    Ok(())
}

/// Seconds since 1970 as a date and time in UTC.
fn date(seconds: u32) -> String {
    let leap = |year: u32| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let (mut days, time) = (seconds / 86400, seconds % 86400);
    let mut year = 1970;
    while days >= 365 + u32::from(leap(year)) {
        days -= 365 + u32::from(leap(year));
        year += 1;
    }
    let february = 28 + u32::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{:02} {hour:02}:{minute:02}:{second:02}", days + 1)
}

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_735_689_599), "2024-12-31 23:59:59");
        assert_eq!(date(u32::MAX), "2106-02-07 06:28:15");
    }
}
