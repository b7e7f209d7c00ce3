//! `polldisk image …`: what qemu-img users expect, one file a command. Control path throughout.

mod amend;
mod bitmap;
mod check;
mod commit;
mod compare;
pub(crate) mod convert;
mod create;
mod fresh;
pub(crate) mod info;
mod map;
pub(crate) mod print;
pub(crate) mod reader;
mod rebase;
mod resize;
mod snapshot;
mod vhd_image;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use node::{NodeSpec, OpenOptions, Source, open_source};
use qcow::ChainReader;
use qcow::open::Format;

use crate::output::usage;

/// The commands.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Tell what an image is.
    Info(info::Info),
    /// Find and repair damage.
    Check(check::Check),
    /// Make an empty image; an existing file is overwritten.
    Create(create::Create),
    /// List which parts of the disk are data, zeroes or nothing, and where they are.
    Map(map::Map),
    /// Copy an image to another format, or compress it.
    Convert(convert::Convert),
    /// Compare what two images hold.
    Compare(compare::Compare),
    /// Change the size of the disk.
    Resize(resize::Resize),
    /// List, take, apply or delete internal snapshots.
    Snapshot(snapshot::Snapshot),
    /// Write what an image holds into its backing file.
    Commit(commit::Commit),
    /// Give an image another backing file.
    Rebase(rebase::Rebase),
    /// Add, remove, clear, enable, disable or merge persistent bitmaps.
    Bitmap(bitmap::Bitmap),
    /// Change options of an image.
    Amend(amend::Amend),
}

/// Runs one; returns the exit code.
pub(crate) fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Info(c) => info::run(&c).map(|()| 0),
        Command::Check(c) => check::run(&c),
        Command::Create(c) => create::run(&c).map(|()| 0),
        Command::Map(c) => map::run(&c).map(|()| 0),
        Command::Convert(c) => convert::run(&c).map(|()| 0),
        Command::Compare(c) => compare::run(&c),
        Command::Resize(c) => resize::run(&c).map(|()| 0),
        Command::Snapshot(c) => snapshot::run(&c).map(|()| 0),
        Command::Commit(c) => commit::run(&c).map(|()| 0),
        Command::Rebase(c) => rebase::run(&c).map(|()| 0),
        Command::Bitmap(c) => bitmap::run(&c).map(|()| 0),
        Command::Amend(c) => amend::run(&c).map(|()| 0),
    }
}

/// What may be opened as a backing file.
#[derive(Args)]
pub(crate) struct Backing {
    /// Format of backing files whose image states none.
    #[arg(long, value_name = "FORMAT", value_parser = crate::args::format)]
    backing_format: Option<Format>,
    /// Only open backing files in this folder (may be given several times).
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<PathBuf>,
}

impl Backing {
    /// Nothing at all: no file is in this folder.
    pub(crate) fn nowhere() -> Backing {
        Backing::in_folders(&[PathBuf::from("/dev/null")])
    }

    /// What is in these folders.
    pub(crate) fn in_folders(folders: &[PathBuf]) -> Backing {
        Backing { backing_format: None, allow_backing: folders.to_vec() }
    }
}

/// How images that are only read are opened.
fn reading(format: Format, backing: &Backing, force_share: bool) -> OpenOptions {
    OpenOptions {
        backing_format: backing.backing_format,
        allow_backing: backing.allow_backing.clone(),
        force_share,
        ..OpenOptions::read(format)
    }
}

/// How images that are changed offline are opened: the top and layer `depth` for writing.
fn editing(format: Format, backing: &Backing, depth: usize) -> OpenOptions {
    OpenOptions { edit: Some(depth), ..reading(format, backing, false) }
}

/// Opens a node to change the image in it, locked.
fn open_for_change(spec: &NodeSpec) -> anyhow::Result<Source> {
    refuse_special(spec)?;
    Ok(open_source(spec, &OpenOptions::write(Format::Qcow2))?)
}

/// Ends the use of all nodes of a chain.
fn close(reader: ChainReader<Source>) -> anyhow::Result<()> {
    for layer in reader.into_chain().layers {
        layer.storage.close()?;
    }
    Ok(())
}

/// Only QCOW2 images can be changed in this way.
fn only_qcow2(format: Format) -> anyhow::Result<()> {
    match format {
        Format::Qcow2 => Ok(()),
        Format::Raw => usage("-f raw: only qcow2 images have this"),
    }
}

/// Parses a node string, for clap.
pub(crate) fn node(text: &str) -> Result<NodeSpec, String> {
    NodeSpec::parse(text).map_err(|e| e.to_string())
}

/// Parses a size, for clap.
fn size(text: &str) -> Result<u64, String> {
    node::parse_size(text)
        .filter(|&n| i64::try_from(n).is_ok())
        .ok_or_else(|| format!("{text:?} is no size like 65536, 64k, 10G or 1T"))
}

/// Refuses what would block or be senseless to open, before it is opened.
pub(crate) fn refuse_special(spec: &NodeSpec) -> anyhow::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let Some(path) = spec.path() else { return Ok(()) };
    // If there is nothing, opening says so.
    let Ok(meta) = std::fs::metadata(path) else { return Ok(()) };
    let kind = meta.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    anyhow::bail!("{}: is neither a regular file nor a block device", path.display())
}
