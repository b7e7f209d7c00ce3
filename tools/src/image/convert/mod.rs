//! `polldisk image convert`: a thread reads the source ([`plan`]), this one writes the
//! destination ([`target`]). So does `polldisk volume import` ([`into_new_disk`]).

mod plan;
mod target;

use std::sync::mpsc::sync_channel;

use anyhow::bail;
use clap::Args;
use node::{NodeSpec, OpenOptions};
use qcow::create::Preallocation;
use qcow::open::Format;
use serde::Serialize;

use super::fresh::{self, BackingFile, Pairs, Place, Wanted};
use super::print::{self, Output, Progress};
use super::reader::{Reader, file_id};
use super::{Backing, reading, snapshot, usage};
use plan::{Part, Piece, Plan, Under};
use target::{Existing, NewDisk, NewQcow, NewRaw, NewVhd, Target};

use crate::args::AnyFormat;

/// Copy an image to another format, or compress it.
#[derive(Args)]
pub(crate) struct Convert {
    /// The source's format: qcow2, raw or vhd.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::any_format)]
    format: AnyFormat,
    /// The destination's format: qcow2, raw or vhd.
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "qcow2",
          value_parser = crate::args::any_format)]
    output_format: AnyFormat,
    /// Options of the destination's format, as in cluster_size=64k,compression_type=zstd (may be
    /// given several times).
    #[arg(short, value_name = "OPTIONS", value_parser = fresh::pairs, conflicts_with = "no_create")]
    options: Vec<Pairs>,
    /// Compress the data.
    #[arg(short, long, conflicts_with = "no_create")]
    compress: bool,
    /// Backing file of the destination, which then holds only what differs from it. The name shall
    /// stand in the image like this: absolute, or relative to the destination.
    #[arg(short = 'B', short_alias = 'b', long, value_name = "FILE", conflicts_with = "no_create")]
    backing: Option<String>,
    /// Format of that backing file, and of the source's backing files whose image states none.
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = crate::args::format)]
    backing_format: Option<Format>,
    /// Only open backing files in this folder (may be given several times).
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<std::path::PathBuf>,
    /// Runs of zeroes at least this long are not written; 0 writes everything, zeroes and holes, too.
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4k", value_parser = super::size)]
    sparse_size: u64,
    /// Copy an internal snapshot of the source: snapshot.id=ID, snapshot.name=NAME, or one of both.
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Write into a destination that exists, instead of making it.
    #[arg(short, long)]
    no_create: bool,
    /// With -n: the destination reads as zeroes, so zeroes need not be written.
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,
    /// Show progress on standard error.
    #[arg(short, long)]
    progress: bool,
    /// Print nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    /// Open the source even if somebody else writes to it.
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    /// What to copy.
    #[arg(value_name = "SOURCE", value_parser = super::node)]
    source: NodeSpec,
    /// Where to.
    #[arg(value_name = "DESTINATION", value_parser = super::node)]
    destination: NodeSpec,
}

/// What was done.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    source: String,
    filename: String,
    format: &'static str,
    virtual_size: u64,
    #[serde(flatten)]
    moved: Moved,
}

/// How much of the disk went where.
#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Moved {
    /// Bytes of the disk that were copied.
    data_bytes: u64,
    /// Bytes that read as zeroes.
    zero_bytes: u64,
    /// Bytes left to the backing file.
    backing_bytes: u64,
}

/// Converts.
pub(crate) fn run(args: &Convert) -> anyhow::Result<()> {
    let allowed =
        Backing { backing_format: args.backing_format, allow_backing: args.allow_backing.clone() };
    let named = BackingFile { name: args.backing.clone(), format: args.backing_format };
    let mut wanted = Wanted::new(args.output_format, &args.options, &named)?;
    if args.compress && wanted.format != AnyFormat::Qcow2 {
        return usage("-c: only qcow2 images can be compressed");
    }
    if args.compress && wanted.qcow.preallocation != Preallocation::Off {
        return usage("-c: a compressed image cannot be preallocated");
    }
    if args.compress && wanted.qcow.data_file.is_some() {
        return usage("-c: an external data file cannot hold compressed clusters");
    }
    if wanted.qcow.size != 0 {
        return usage("-o size: the destination has the source's size");
    }
    if !args.sparse_size.is_multiple_of(512) {
        return usage("-S: a multiple of 512 is needed");
    }
    let snapshot = args.snapshot.as_deref().map(snapshot::key);
    let source = match (args.format.chained(), snapshot) {
        (Some(format), snapshot) => {
            let options = reading(format, &allowed, args.force_share);
            Reader::open_at(&args.source, &options, snapshot)?
        }
        (None, None) => Reader::open_any(&args.source, args.format, &allowed, args.force_share)?,
        (None, Some(_)) => return usage("-l: vhd images have no internal snapshots"),
    };
    if let Some(id) = args.destination.path().and_then(file_id)
        && source.find_file(id).is_some()
    {
        bail!("{}: is the source, or one of its backing files", args.destination);
    }
    wanted.qcow.size = source.size();
    let done = if args.no_create {
        into_existing(args, source, &wanted, &allowed)?
    } else {
        wanted.check(&args.destination)?;
        let under = under(&wanted, &source, args, &allowed)?;
        let mut place = Place::open(&args.destination, &wanted)?;
        let mut data = match wanted.open_data(&args.destination) {
            Ok(data) => data,
            Err(e) => return Err(place.failed(e)),
        };
        match into_new(args, source, &wanted, under, &mut place, data.as_mut()) {
            Ok((done, end)) => {
                if let Some(data) = data {
                    data.close(wanted.qcow.size)?;
                }
                place.close(end)?;
                done
            }
            Err(e) => return Err(place.both_failed(data, e)),
        }
    };
    if args.output.is_json() { print::json(&done) } else { Ok(()) }
}

/// What the destination's backing file already holds.
fn under(
    wanted: &Wanted,
    source: &Reader,
    args: &Convert,
    allowed: &Backing,
) -> anyhow::Result<Under> {
    let Some(backing) = wanted.open_backing(&args.destination, allowed)? else {
        return Ok(Under::Nothing);
    };
    let id = backing.layers()[0].path.as_deref().and_then(file_id);
    Ok(match id.and_then(|id| source.find_file(id)) {
        Some(depth)
            if source
                .layers()
                .get(depth)
                .is_some_and(|l| l.format() == backing.layers()[0].format()) =>
        {
            Under::Layer { depth, size: backing.size() }
        }
        _ => Under::Other(Box::new(backing)),
    })
}

fn into_new(
    args: &Convert,
    source: Reader,
    wanted: &Wanted,
    under: Under,
    place: &mut Place,
    data: Option<&mut Place>,
) -> anyhow::Result<(Done, u64)> {
    match wanted.format {
        AnyFormat::Vhd => {
            let mut target = NewVhd::new(place, &wanted.vhd())?;
            let plan = Plan::new(source, under, None, args.sparse_size);
            let done = args.copy(plan, &mut target)?;
            Ok((Done { virtual_size: target.size(), ..done }, target.finish()?))
        }
        AnyFormat::Raw => {
            let mut target = NewRaw::new(place, wanted.qcow.size, wanted.raw)?;
            let plan = Plan::new(source, under, None, args.sparse_size);
            let done = args.copy(plan, &mut target)?;
            Ok((done, target.finish()?))
        }
        AnyFormat::Qcow2 => {
            let mut target = NewQcow::new(place, data, &wanted.qcow, args.compress)?;
            let cluster = Some(wanted.qcow.cluster_size);
            let plan = Plan::new(source, under, cluster, args.sparse_size);
            let done = args.copy(plan, &mut target)?;
            Ok((done, target.finish()?))
        }
    }
}

fn into_existing(
    args: &Convert,
    source: Reader,
    wanted: &Wanted,
    allowed: &Backing,
) -> anyhow::Result<Done> {
    super::refuse_special(&args.destination)?;
    let Some(format) = args.output_format.chained() else {
        return usage("-n: nothing is written into vhd images that exist");
    };
    let options = OpenOptions { writable: true, ..reading(format, allowed, false) };
    let mut target = Existing::open(&args.destination, &options, args.target_is_zero)?;
    let room = target.size();
    if room < wanted.qcow.size {
        let e = anyhow::anyhow!(
            "{}: has {room} bytes, but the source has {}",
            args.destination,
            wanted.qcow.size
        );
        target.finish()?;
        return Err(e);
    }
    let plan = Plan::new(source, Under::Nothing, target.cluster(), args.sparse_size);
    let done = args.copy(plan, &mut target);
    // Also after a failure: what was written must be in order.
    let finished = target.finish();
    let done =
        done.map_err(|e| e.context(format!("{}: a part of it was overwritten", args.destination)))?;
    finished?;
    Ok(done)
}

impl Convert {
    /// Moves everything.
    fn copy(&self, plan: Plan, target: &mut dyn Target) -> anyhow::Result<Done> {
        let virtual_size = plan.size();
        let moved = copy(plan, target, self.progress && !self.quiet)?;
        Ok(Done {
            source: self.source.to_string(),
            filename: self.destination.to_string(),
            format: self.output_format.name(),
            virtual_size,
            moved,
        })
    }
}

/// Copies all data of an image to a new disk, which reads as zeroes. Returns how many bytes that were.
///
/// # Errors
/// If the source cannot be read, or `write` fails.
pub(crate) fn into_new_disk(
    source: Reader,
    progress: bool,
    write: &mut dyn FnMut(u64, &[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    // In whole clusters of the image that the disk is: what is left out costs it nothing.
    let plan = Plan::new(source, Under::Nothing, Some(65536), 4096);
    Ok(copy(plan, &mut NewDisk(write), progress)?.data_bytes)
}

/// Moves everything.
fn copy(plan: Plan, target: &mut dyn Target, progress: bool) -> anyhow::Result<Moved> {
    let mut done = Moved::default();
    let mut progress = Progress::new(progress, plan.size());
    let (pieces, received) = sync_channel(4);
    let (used, empty) = sync_channel(8);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || plan.run(&pieces, &empty));
        for piece in received {
            match piece {
                Piece::Zeroes { at, len } => {
                    target.zeroes(at, len)?;
                    done.zero_bytes += len;
                    progress.at(at + len);
                }
                Piece::Kept { at, len } => {
                    done.backing_bytes += len;
                    progress.at(at + len);
                }
                Piece::Data { at, bytes, parts } => {
                    for (part, range) in parts {
                        let (guest, len) = (at + range.start as u64, range.len() as u64);
                        match part {
                            Part::Data => {
                                target.data(guest, &bytes[range])?;
                                done.data_bytes += len;
                            }
                            Part::Zeroes => {
                                target.zeroes(guest, len)?;
                                done.zero_bytes += len;
                            }
                            Part::Kept => done.backing_bytes += len,
                        }
                    }
                    progress.at(at + bytes.len() as u64);
                    // If it is not wanted any more, it is dropped.
                    let _ = used.try_send(bytes);
                }
            }
        }
        match reader.join() {
            Ok(result) => result,
            Err(_) => bail!("the reading thread panicked"),
        }
    })?;
    progress.finish();
    Ok(done)
}
