//! `polldisk volume …`: volume groups of LVM2, one file a command. Control path throughout, on the
//! main thread.
//!
//! One convention for all: what is acted on comes first, all devices of the group come last, in any
//! order. Each device is a node string.

mod check;
mod create;
mod create_group;
mod export_text;
mod extend;
mod import;
mod kernel;
mod list;
mod open;
mod remove;
mod remove_group;
mod rename;
mod signature;
mod take_over;

use clap::{Args, Subcommand};
use node::NodeSpec;

pub(crate) use create_group::contents;
pub(crate) use kernel::claim;
pub(crate) use open::author;

/// The commands.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make a volume group; devices that hold something are refused.
    CreateGroup(create_group::CreateGroup),
    /// Remove a volume group without volumes.
    RemoveGroup(remove_group::RemoveGroup),
    /// Tell what a volume group is and which volumes it has.
    List(list::List),
    /// Make a volume.
    Create(create::Create),
    /// Remove a volume: what is in it is lost.
    Remove(remove::Remove),
    /// Make a volume larger.
    Extend(extend::Extend),
    /// Make a disk of a repository of what is in an image.
    Import(import::Import),
    /// Give a volume another name.
    Rename(rename::Rename),
    /// Tell whether a volume group is sound; exit code 1 if not.
    Check(check::Check),
    /// Print a group's metadata, as vgcfgbackup saves it.
    ExportText(export_text::ExportText),
    /// Make a group of another host, which is gone for good, one of this host.
    TakeOver(take_over::TakeOver),
}

/// Runs one; returns the exit code.
pub(crate) fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::CreateGroup(c) => create_group::run(&c).map(|()| 0),
        Command::RemoveGroup(c) => remove_group::run(&c).map(|()| 0),
        Command::List(c) => list::run(&c).map(|()| 0),
        Command::Create(c) => create::run(&c).map(|()| 0),
        Command::Remove(c) => remove::run(&c).map(|()| 0),
        Command::Extend(c) => extend::run(&c).map(|()| 0),
        Command::Import(c) => import::run(&c).map(|()| 0),
        Command::Rename(c) => rename::run(&c).map(|()| 0),
        Command::Check(c) => check::run(&c),
        Command::ExportText(c) => export_text::run(&c).map(|()| 0),
        Command::TakeOver(c) => take_over::run(&c).map(|()| 0),
    }
}

/// The devices, and who we are.
#[derive(Args)]
struct Devices {
    /// System ID of this host, instead of the one that its LVM has, else /etc/machine-id.
    #[arg(long, value_name = "ID", value_parser = system_id)]
    system_id: Option<String>,
    /// All devices of the group, in any order: files, kernel block devices, model:, vfio: and
    /// vfio-user: nodes.
    #[arg(value_name = "NODE", required = true, value_parser = node)]
    nodes: Vec<NodeSpec>,
}

/// Name of a volume with its group's.
#[derive(Clone)]
struct VolumeName {
    group: String,
    name: String,
}

impl std::fmt::Display for VolumeName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.group, self.name)
    }
}

/// Parses GROUP/NAME, for clap.
fn volume_name(text: &str) -> Result<VolumeName, String> {
    match text.split_once('/') {
        Some((group, name)) if !group.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(VolumeName { group: group.to_owned(), name: name.to_owned() })
        }
        _ => Err(format!("{text:?} is no GROUP/NAME, like vg0/disk1")),
    }
}

/// Parses a node of the kinds that can be in a group, for clap.
fn node(text: &str) -> Result<NodeSpec, String> {
    if text.starts_with("vol:") {
        return Err("a volume is no device of a group; name the group's devices".to_owned());
    }
    match NodeSpec::parse(text).map_err(|e| e.to_string())? {
        NodeSpec::Mem(_) => Err("memory holds no group: it is gone at the end".to_owned()),
        NodeSpec::Stripe(..) => {
            Err("name its devices one by one; `volume create --stripes` makes stripes".to_owned())
        }
        node => Ok(node),
    }
}

/// Parses a size, for clap.
fn size(text: &str) -> Result<u64, String> {
    node::parse_size(text)
        .filter(|&n| n > 0 && i64::try_from(n).is_ok())
        .ok_or_else(|| format!("{text:?} is no size like 65536, 64k, 10G or 1T"))
}

/// Parses a tag, for clap.
fn tag(text: &str) -> Result<String, String> {
    volume::check_tag(text).map(|()| text.to_owned()).map_err(|e| {
        format!("{e}: letters, digits and _ + . - / = ! : & # are possible, not - at the begin")
    })
}

/// Parses a system ID, for clap.
fn system_id(text: &str) -> Result<String, String> {
    volume::check_system_id(text).map(|()| text.to_owned()).map_err(|e| e.to_string())
}

/// Says that a size was rounded up, if it was.
fn tell_rounded(what: &VolumeName, asked: u64, got: u64, unit: u64) {
    if got != asked {
        tell!(
            "polldisk: {what}: {asked} bytes are rounded up to {got}, a multiple of {}",
            crate::image::print::bytes(unit)
        );
    }
}
