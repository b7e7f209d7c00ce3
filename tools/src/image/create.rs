//! `polldisk image create`.

use clap::Args;
use node::NodeSpec;
use qcow::create::{create, create_with_data};
use qcow::open::Format;
use serde::Serialize;

use super::fresh::{self, BackingFile, Pairs, Place, Wanted, make_raw};
use super::print::{self, Output};
use super::{Backing, usage};
use crate::args::AnyFormat;

/// Make an empty image; an existing file is overwritten, unless somebody uses it.
#[derive(Args)]
pub(crate) struct Create {
    /// The format: qcow2, raw or vhd.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::any_format)]
    format: AnyFormat,
    /// Options of the format, as in cluster_size=64k,lazy_refcounts=on (may be given several times).
    #[arg(short, value_name = "OPTIONS", value_parser = fresh::pairs)]
    options: Vec<Pairs>,
    /// Backing file, as its name shall stand in the image: absolute, or relative to the image.
    #[arg(short, long = "backing", value_name = "FILE")]
    backing_file: Option<String>,
    /// Format of the backing file, and of those below whose image states none.
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = crate::args::format)]
    backing_format: Option<Format>,
    /// Do not open the backing file; a size is needed then.
    #[arg(short, long = "backing-unsafe")]
    unsafe_backing: bool,
    /// Only open backing files in this folder (may be given several times).
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<std::path::PathBuf>,
    /// Print nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: Output,
    /// Where to make it.
    #[arg(value_name = "IMAGE", value_parser = super::node)]
    image: NodeSpec,
    /// Size of the disk, as in 10G; that of the backing file if not given.
    #[arg(value_parser = super::size)]
    size: Option<u64>,
}

/// What was made.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Made {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<&'static str>,
}

/// Makes it.
pub(crate) fn run(args: &Create) -> anyhow::Result<()> {
    let named = BackingFile { name: args.backing_file.clone(), format: args.backing_format };
    let mut wanted = Wanted::new(args.format, &args.options, &named)?;
    let allowed =
        Backing { backing_format: args.backing_format, allow_backing: args.allow_backing.clone() };
    // Kept open, and so locked, until the image is there.
    let backing = match args.unsafe_backing {
        true => None,
        false => wanted.open_backing(&args.image, &allowed)?,
    };
    wanted.qcow.size = match (args.size, wanted.qcow.size, &backing) {
        (Some(size), _, _) => size,
        (None, size @ 1.., _) => size,
        (None, _, Some(backing)) => backing.size(),
        (None, _, None) => {
            return usage("a size is needed, like 10G (or a backing file that has one)");
        }
    }
    .next_multiple_of(512);
    let end = wanted.check(&args.image)?;
    let mut place = Place::open(&args.image, &wanted)?;
    let mut data = match wanted.open_data(&args.image) {
        Ok(data) => data,
        Err(e) => return Err(place.failed(e)),
    };
    let result = match wanted.format {
        AnyFormat::Raw => make_raw(&mut place, wanted.qcow.size, wanted.raw),
        AnyFormat::Vhd => make_vhd(&mut place, &wanted),
        AnyFormat::Qcow2 => {
            let name = place.name.clone();
            let made = match &mut data {
                Some(data) => create_with_data(&mut place, data, &name, &wanted.qcow),
                None => create(&mut place, &name, &wanted.qcow),
            };
            made.map_err(anyhow::Error::new)
        }
    };
    match result {
        Ok(()) => {
            if let Some(data) = data {
                data.close(wanted.qcow.size)?;
            }
            place.close(end)?;
        }
        Err(e) => return Err(place.both_failed(data, e)),
    }
    report(args, &wanted)
}

/// Makes an empty VHD image.
fn make_vhd(place: &mut Place, wanted: &Wanted) -> anyhow::Result<()> {
    let name = place.name.clone();
    vhd::build::Builder::new(place, &name, &wanted.vhd())?.finish()?;
    Ok(())
}

fn report(args: &Create, wanted: &Wanted) -> anyhow::Result<()> {
    let is_qcow = wanted.format == AnyFormat::Qcow2;
    let backing = wanted.qcow.backing.as_ref();
    let made = Made {
        filename: args.image.to_string(),
        format: wanted.format.name(),
        virtual_size: wanted.disk_size()?,
        cluster_size: is_qcow.then_some(wanted.qcow.cluster_size),
        backing_filename: backing.map(|b| b.0.clone()),
        backing_filename_format: backing.map(|b| b.1.name()),
    };
    if args.output.is_json() {
        return print::json(&made);
    }
    if args.quiet {
        return Ok(());
    }
    let mut text =
        format!("Formatting '{}', fmt={} size={}", made.filename, made.format, made.virtual_size);
    if let Some(size) = made.cluster_size {
        text += &format!(" cluster_size={size}");
    }
    if let (Some(name), Some(format)) = (&made.backing_filename, made.backing_filename_format) {
        text += &format!(" backing_file={name} backing_fmt={format}");
    }
    print::line(&text)
}
