//! `polldisk volume import`: an image becomes a disk of a repository of type `fast`, by the daemon that has
//! it: as the toolstack would do it, and read back.

use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use nbd::{Client as Nbd, Remote};
use node::NodeSpec;
use qcow::Source;
use reactor::Clock;
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::AnyFormat;
use crate::ctl::rpc::Client;
use crate::image::convert::into_new_disk;
use crate::image::print::{self, Output, Progress};
use crate::image::reader::Reader;
use crate::image::{self, Backing};

/// How long the daemon may take for a request, in nanoseconds: it may wait for space.
const PATIENCE: u64 = 120_000_000_000;

/// Bytes that are compared at a time.
const PIECE: u64 = 1 << 20;

/// Make a disk of a repository of what is in an image.
#[derive(Args)]
pub(crate) struct Import {
    /// The image's format: qcow2, raw or vhd.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::any_format)]
    format: AnyFormat,
    /// UUID of the repository, which is attached.
    #[arg(long, value_name = "UUID")]
    sr: String,
    /// The disk's name, for people; that of the image if it is not given.
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Read backing files and parents, too: only those in this folder (may be given several times).
    /// Without, an image that names another file is refused: it may be somebody else's idea of what to
    /// read on this host.
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<std::path::PathBuf>,
    /// Show progress on standard error.
    #[arg(short, long)]
    progress: bool,
    #[command(flatten)]
    output: Output,
    /// The image.
    #[arg(value_name = "IMAGE", value_parser = image::node)]
    source: NodeSpec,
}

/// What was done.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    source: String,
    sr: String,
    key: String,
    /// Bytes of the image's disk. The new one is as large, rounded up to 2 MiB.
    virtual_size: u64,
    /// Bytes that were copied, and read back.
    data_bytes: u64,
}

/// Imports.
pub(crate) fn run(args: &Import) -> anyhow::Result<()> {
    let source = args.open()?;
    let virtual_size = source.size();
    let mut daemon = Daemon { client: crate::smapiv3::daemon()?, sr: &args.sr };
    let name = args.name.clone().unwrap_or_else(|| args.source.to_string());
    let new = json!({"sr": args.sr, "name": name, "description": format!("imported from {}", args.source),
        "size": virtual_size, "sharable": false});
    let made = daemon.ask("Volume.create", &new)?;
    let key = made["key"].as_str().context("the daemon says no key")?.to_owned();
    let copied = fill(args, source, &mut daemon, &key);
    let data_bytes = match copied {
        Ok(bytes) => bytes,
        Err(e) => {
            // Half a disk is none.
            let gone = daemon.ask("Volume.destroy", &json!({"sr": args.sr, "key": key}));
            return Err(match gone {
                Ok(_) => e.context("nothing was imported"),
                Err(left) => {
                    e.context(format!("the disk {key} is not whole, and is still there ({left})"))
                }
            });
        }
    };
    let (source, sr) = (args.source.to_string(), args.sr.clone());
    let done = Done { source, sr, key, virtual_size, data_bytes };
    match args.output.is_json() {
        true => print::json(&done),
        false => print::line(&format!(
            "{} is disk {} of {}: {}, of which {} are data, read back.",
            done.source,
            done.key,
            done.sr,
            print::bytes(virtual_size),
            print::bytes(data_bytes)
        )),
    }
}

impl Import {
    fn open(&self) -> anyhow::Result<Reader> {
        let backing = match self.allow_backing.is_empty() {
            true => Backing::nowhere(),
            false => Backing::in_folders(&self.allow_backing),
        };
        Reader::open_any(&self.source, self.format, &backing, false)
    }
}

/// The daemon, as the toolstack talks to it.
struct Daemon<'a> {
    client: Client,
    sr: &'a str,
}

impl Daemon<'_> {
    fn ask(&mut self, method: &str, args: &Value) -> anyhow::Result<Value> {
        let mut answer = self.client.call("smapiv3", json!({"method": method, "args": args}))?;
        match answer.get("error") {
            Some(error) => {
                let params = error["params"].as_array().map(Vec::as_slice).unwrap_or_default();
                let why: Vec<&str> = params.iter().filter_map(Value::as_str).collect();
                bail!("{method}: {} {}", error["code"].as_str().unwrap_or_default(), why.join(": "))
            }
            None => Ok(answer["result"].take()),
        }
    }
}

/// Copies the image into a disk, which is in use meanwhile, and compares. Returns the bytes of data.
fn fill(args: &Import, source: Reader, daemon: &mut Daemon<'_>, key: &str) -> anyhow::Result<u64> {
    let uri = format!("{}://{}/{key}", crate::serve::REPOSITORY_TYPE, daemon.sr);
    let domain = format!("u0_import_{}", std::process::id());
    let ours = json!({"uri": uri, "domain": domain});
    let attached = daemon.ask("Datapath.attach", &ours)?;
    daemon.ask("Datapath.activate", &ours)?;
    let done = remote(&attached).and_then(|remote| copy(args, source, &remote));
    daemon.ask("Datapath.deactivate", &ours)?;
    daemon.ask("Datapath.detach", &ours)?;
    done
}

/// Where the disk is offered over NBD.
fn remote(attached: &Value) -> anyhow::Result<Remote> {
    let all = attached["implementations"].as_array().map(Vec::as_slice).unwrap_or_default();
    let nbd = all.iter().find(|i| i[0] == "Nbd").and_then(|nbd| nbd[1]["uri"].as_str());
    let parts = nbd.and_then(|uri| uri.strip_prefix("nbd:unix:")?.rsplit_once(":exportname="));
    let (socket, export) = parts.context("the daemon does not offer the disk over NBD")?;
    let encoded: String = socket.bytes().map(|b| format!("%{b:02x}")).collect();
    Ok(Remote::parse(&format!("nbd+unix:///{export}?socket={encoded}"))?)
}

fn copy(args: &Import, source: Reader, remote: &Remote) -> anyhow::Result<u64> {
    let stop = Arc::default();
    let mut disk = Nbd::connect(remote, None, &Clock::real(), PATIENCE, stop)?;
    let written =
        into_new_disk(source, args.progress, &mut |at, bytes| Ok(disk.write(at, bytes)?))?;
    disk.flush()?;
    compare(args, &mut disk)?;
    disk.disconnect();
    Ok(written)
}

/// Reads everything again that the image holds. Nothing was written elsewhere in the disk, which is new.
fn compare(args: &Import, disk: &mut Nbd) -> anyhow::Result<()> {
    let mut source = args.open()?;
    let size = source.size();
    let mut progress = Progress::new(args.progress, size);
    let (mut want, mut got) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < size {
        let Some(span) = source.span(at, PIECE)? else { break };
        let len = span.len.min(PIECE);
        if !matches!(span.source, Source::Unallocated | Source::Zero(_)) {
            want.resize(len as usize, 0);
            got.resize(len as usize, 0);
            source.read_at(at, &mut want)?;
            disk.read(at, &mut got)?;
            if let Some(n) = want.iter().zip(&got).position(|(a, b)| a != b) {
                bail!("{}: the disk differs from it at {}", args.source, at + n as u64);
            }
        }
        at += len;
        progress.at(at);
    }
    progress.finish();
    Ok(())
}
