//! `polldisk image rebase`.

use clap::Args;
use node::{NodeSpec, open_chain};
use qcow::ChainReader;
use qcow::edit::{self, NewBacking};
use qcow::open::Format;
use serde::Serialize;

use super::fresh::{BackingFile, Wanted};
use super::print::{self, Output, Progress};
use super::reader::file_id;
use super::{Backing, close, editing, only_qcow2, open_for_change};

/// Give an image another backing file. What the disk holds stays the same: what the new backing
/// file has otherwise is copied into the image.
#[derive(Args)]
pub(crate) struct Rebase {
    /// The image's format: qcow2.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::format)]
    format: Format,
    /// The new backing file, as its name shall stand in the image: absolute, or relative to the
    /// image; "" for none.
    #[arg(short, long = "backing", value_name = "FILE")]
    backing_file: String,
    /// Format of the backing file, and of those below whose image states none.
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = crate::args::format)]
    backing_format: Option<Format>,
    /// Only change the name in the image, and open no backing file; the disk holds something else
    /// afterwards if the new one does.
    #[arg(short, long = "unsafe")]
    unsafe_mode: bool,
    /// Only open backing files in this folder (may be given several times).
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<std::path::PathBuf>,
    /// Show progress on standard error.
    #[arg(short, long)]
    progress: bool,
    /// Print nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: Output,
    /// The image.
    #[arg(value_name = "IMAGE", value_parser = super::node)]
    image: NodeSpec,
}

/// What was done.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    filename: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<&'static str>,
    data_bytes: u64,
    zero_bytes: u64,
}

/// Rebases.
pub(crate) fn run(args: &Rebase) -> anyhow::Result<()> {
    only_qcow2(args.format)?;
    let name = (!args.backing_file.is_empty()).then(|| args.backing_file.clone());
    let named = BackingFile { name, format: args.backing_format };
    let wanted = Wanted::new(crate::args::AnyFormat::Qcow2, &[], &named)?;
    let backing = wanted.qcow.backing.as_ref().map(|(name, format)| (name.as_str(), *format));
    let done = match args.unsafe_mode {
        true => {
            let mut source = open_for_change(&args.image)?;
            edit::set_backing(&mut source, &args.image.to_string(), backing)?;
            source.close()?;
            edit::Rebased::default()
        }
        false => copy(args, &wanted)?,
    };
    if args.output.is_json() {
        return print::json(&Done {
            filename: args.image.to_string(),
            backing_filename: backing.map(|b| b.0.to_owned()),
            backing_filename_format: backing.map(|b| b.1.name()),
            data_bytes: done.data_bytes,
            zero_bytes: done.zero_bytes,
        });
    }
    if args.quiet { Ok(()) } else { print::line("Image rebased.") }
}

fn copy(args: &Rebase, wanted: &Wanted) -> anyhow::Result<edit::Rebased> {
    super::refuse_special(&args.image)?;
    let allowed =
        Backing { backing_format: args.backing_format, allow_backing: args.allow_backing.clone() };
    // First: it says so if the image is in that chain, which could not be opened later.
    let mut new = wanted.open_backing(&args.image, &allowed)?;
    let chain = open_chain(&args.image, &editing(args.format, &allowed, 0))?;
    let mut reader = ChainReader::new(chain);
    let mut progress = Progress::new(args.progress && !args.quiet, reader.size());
    let to = match (&mut new, &wanted.qcow.backing) {
        (Some(new), Some((name, format))) => {
            let id = new.layers()[0].path.as_deref().and_then(file_id);
            let depth = reader.layers().iter().position(|l| {
                id.is_some() && l.path.as_deref().and_then(file_id) == id && l.format() == *format
            });
            Some(NewBacking { name, format: *format, reader: new.chain()?, depth })
        }
        _ => None,
    };
    let done = edit::rebase(&mut reader, to, &mut |at| progress.at(at))?;
    progress.finish();
    close(reader)?;
    Ok(done)
}
