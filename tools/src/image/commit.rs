//! `polldisk image commit`.

use std::path::Path;

use anyhow::bail;
use clap::Args;
use node::{Chain, NodeSpec, open_chain};
use qcow::ChainReader;
use qcow::open::Format;
use serde::Serialize;

use super::print::{self, Output, Progress};
use super::reader::file_id;
use super::{Backing, close, editing, only_qcow2, reading};

/// Write what an image holds into its backing file, and empty the image.
#[derive(Args)]
pub(crate) struct Commit {
    /// The image's format: qcow2.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::format)]
    format: Format,
    /// The backing file to commit to, if it is not the image's own but one further down; the image
    /// is not emptied then.
    #[arg(short, long, value_name = "FILE")]
    base: Option<String>,
    /// Do not empty the image.
    #[arg(short = 'd', long)]
    keep: bool,
    /// Show progress on standard error.
    #[arg(short, long)]
    progress: bool,
    /// Print nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    backing: Backing,
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
    base: String,
    virtual_size: u64,
    data_bytes: u64,
    zero_bytes: u64,
    emptied: bool,
}

/// Commits.
pub(crate) fn run(args: &Commit) -> anyhow::Result<()> {
    only_qcow2(args.format)?;
    super::refuse_special(&args.image)?;
    // A look first: which layer is to be locked for writing.
    let chain = open_chain(&args.image, &reading(args.format, &args.backing, false))?;
    let depth = find(args, &chain)?;
    drop(chain);
    let chain = open_chain(&args.image, &editing(args.format, &args.backing, depth))?;
    if find(args, &chain)? != depth {
        bail!("{}: its backing chain was changed just now", args.image);
    }
    let mut reader = ChainReader::new(chain);
    let emptied = depth == 1 && !args.keep;
    let size = reader.size();
    let base = reader.layers()[depth].name.clone();
    let mut progress = Progress::new(args.progress && !args.quiet, size);
    let done = qcow::edit::commit(&mut reader, depth, emptied, &mut |at| progress.at(at))?;
    progress.finish();
    close(reader)?;
    if args.output.is_json() {
        return print::json(&Done {
            filename: args.image.to_string(),
            base,
            virtual_size: size,
            data_bytes: done.data_bytes,
            zero_bytes: done.zero_bytes,
            emptied,
        });
    }
    if args.quiet { Ok(()) } else { print::line("Image committed.") }
}

/// The layer to commit to.
fn find(args: &Commit, chain: &Chain) -> anyhow::Result<usize> {
    if chain.layers.len() < 2 {
        bail!("{}: has no backing file", args.image);
    }
    let Some(base) = &args.base else { return Ok(1) };
    let id = file_id(Path::new(base));
    let found = (1..chain.layers.len()).find(|&depth| {
        let named = chain.layers[depth - 1].backing.as_ref();
        named.is_some_and(|b| b.name == *base)
            || (id.is_some() && chain.layers[depth].path.as_deref().and_then(file_id) == id)
    });
    match found {
        Some(depth) => Ok(depth),
        None => bail!("{}: {base:?} is none of its backing files", args.image),
    }
}
