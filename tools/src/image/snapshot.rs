//! `polldisk image snapshot`.

use std::io::Write;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::Args;
use node::{NodeSpec, OpenOptions, open_chain};
use qcow::edit::{self, SnapshotKey};
use qcow::open::Format;
use serde::Serialize;

use super::print::{self, Output, STDOUT};
use super::{Backing, only_qcow2, open_for_change, reading};

/// List, take, apply or delete internal snapshots. Lists them if nothing else is said.
#[derive(Args)]
pub(crate) struct Snapshot {
    /// The image's format: qcow2.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::format)]
    format: Format,
    /// List the snapshots.
    #[arg(short, long, group = "what")]
    list: bool,
    /// Take a snapshot with this name.
    #[arg(short, long, value_name = "NAME", group = "what")]
    create: Option<String>,
    /// Make the disk what it was when this snapshot was taken; given by its ID, else by its name.
    /// What the disk holds now is lost.
    #[arg(short, long, value_name = "SNAPSHOT", group = "what")]
    apply: Option<String>,
    /// Delete a snapshot: the first one with this name, else the one with this ID.
    #[arg(short, long, value_name = "SNAPSHOT", group = "what")]
    delete: Option<String>,
    /// Print nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    /// List the snapshots even if somebody else writes to the image.
    #[arg(short = 'U', long, conflicts_with_all = ["create", "apply", "delete"])]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    /// The image.
    #[arg(value_name = "IMAGE", value_parser = super::node)]
    image: NodeSpec,
}

/// A snapshot that was taken.
#[derive(Serialize)]
struct Taken<'a> {
    id: String,
    name: &'a str,
}

/// Does it.
pub(crate) fn run(args: &Snapshot) -> anyhow::Result<()> {
    only_qcow2(args.format)?;
    let name = args.image.to_string();
    if let Some(new) = &args.create {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let mut source = open_for_change(&args.image)?;
        let now = now.unwrap_or(Duration::ZERO);
        let id = edit::create_snapshot(&mut source, &name, new, now)?;
        source.close()?;
        if args.output.is_json() {
            print::json(&Taken { id, name: new })?;
        }
    } else if let Some(key) = &args.apply {
        let mut source = open_for_change(&args.image)?;
        edit::apply_snapshot(&mut source, &name, SnapshotKey::IdOrName(key))?;
        source.close()?;
    } else if let Some(key) = &args.delete {
        let mut source = open_for_change(&args.image)?;
        edit::delete_snapshot(&mut source, &name, SnapshotKey::NameOrId(key))?;
        source.close()?;
    } else {
        list(args)?;
    }
    Ok(())
}

fn list(args: &Snapshot) -> anyhow::Result<()> {
    super::refuse_special(&args.image)?;
    let backing = Backing { backing_format: None, allow_backing: Vec::new() };
    let reading = reading(args.format, &backing, args.force_share);
    let mut chain = open_chain(&args.image, &OpenOptions { top_only: true, ..reading })?;
    let info = qcow::info::Info::of(&mut chain.layers[0], None)?;
    if args.output.is_json() {
        return print::json(&info.snapshots);
    }
    if args.quiet {
        return Ok(());
    }
    let mut out = print::out();
    super::info::snapshots(&mut out, &info.snapshots).context(STDOUT)?;
    out.flush().context(STDOUT)
}

/// What an option says that names a snapshot to read from.
pub(super) fn key(text: &str) -> SnapshotKey<'_> {
    if let Some(id) = text.strip_prefix("snapshot.id=") {
        SnapshotKey::Id(id)
    } else if let Some(name) = text.strip_prefix("snapshot.name=") {
        SnapshotKey::Name(name)
    } else {
        SnapshotKey::IdOrName(text)
    }
}
