//! `polldisk ctl`: asks a running server to change its images, or how far that is.

mod changes;
pub(crate) mod rpc;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use node::NodeSpec;
use qcow::open::Format;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::image::info::snapshots;
use crate::image::print::{Output, Progress, STDOUT, json as print_json, line, out};
use rpc::Client;

pub(crate) use changes::{Changes, Held, Shared, parse};
pub(crate) use rpc::Server;

/// The daemon's socket.
pub(crate) const DAEMON: &str = "/run/polldisk/control.sock";

/// Between two questions how far a job is.
const LOOK: Duration = Duration::from_millis(50);

/// Change the image of a running server (`polldisk nbd --control`), or those of the daemon.
#[derive(Args)]
pub(crate) struct Ctl {
    /// The server's control socket.
    #[arg(short, long, value_name = "PATH", default_value = DAEMON)]
    socket: PathBuf,
    /// Which of the daemon's images is meant, by its name.
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
    #[command(flatten)]
    output: Output,
    #[command(subcommand)]
    what: What,
}

/// How a job is to go.
#[derive(Args)]
struct Pace {
    /// Bytes a second at most; suffixes as in 100M.
    #[arg(long, value_name = "BYTES", value_parser = size)]
    rate: Option<u64>,
    /// Do not wait for the end: see `jobs`.
    #[arg(long)]
    detach: bool,
}

#[derive(Subcommand)]
enum What {
    /// Have the daemon open an image.
    Attach {
        /// Its name there, by which guests' devices and --image mean it.
        name: String,
        /// Where it lies.
        node: String,
        /// Its format.
        #[arg(short, long, value_name = "FORMAT", value_parser = crate::args::format,
              default_value = "qcow2")]
        format: Format,
        /// Do not write to it.
        #[arg(short, long)]
        read_only: bool,
        /// Serve it over NBD too, on this socket, as for a guest's firmware, which reads an emulated
        /// disk.
        #[arg(long, value_name = "PATH")]
        nbd: Option<PathBuf>,
    },
    /// Have the daemon close an image that no guest and no NBD client uses.
    Detach {
        /// Its name.
        name: String,
    },
    /// List the daemon's images, and the guests' devices.
    List,
    /// Counters of the daemon's reactors and of the guests' rings.
    Stats,
    /// List the files of the image's chain, the one that is written to first: layers 0, 1, …
    Chain,
    /// Put a new overlay in front of the image, which then stays as it is now.
    Snapshot {
        /// The overlay; it is made if it is not there, else it must be empty and name the image.
        overlay: PathBuf,
    },
    /// Take, delete or list snapshots inside the image that is written to.
    SnapshotInternal {
        #[command(subcommand)]
        what: Internal,
    },
    /// Give the disk another size, in bytes; suffixes as in 10G.
    Resize {
        /// The new size.
        #[arg(value_parser = size)]
        size: u64,
    },
    /// Take up into the top layer what lies below it, and cut that off.
    Stream {
        /// The first layer that stays, by its number; without it none does.
        #[arg(long, value_name = "LAYER")]
        base: Option<usize>,
        #[command(flatten)]
        pace: Pace,
    },
    /// Write what a layer below the top holds into the one below that, and take it out of the chain.
    Commit {
        /// The layer's number, at least 1.
        layer: usize,
        #[command(flatten)]
        pace: Pace,
    },
    /// Give the image another backing file. What the disk holds stays the same: what the new backing
    /// file has otherwise is taken up into the image.
    Rebase {
        /// The new backing file, as its name shall stand in the image: absolute, or relative to the
        /// image; "" for none.
        #[arg(short, long = "backing", value_name = "FILE")]
        backing_file: String,
        /// Its format.
        #[arg(short = 'F', long, value_name = "FORMAT", value_parser = crate::args::format,
              default_value = "qcow2")]
        backing_format: Format,
        #[command(flatten)]
        pace: Pace,
    },
    /// Limit what the disk takes in a second, of all guests and clients together; without an option
    /// it is limited no more.
    Limit {
        /// Reads, writes and discards.
        #[arg(long, value_name = "N")]
        iops: Option<u64>,
        /// Bytes read and written; suffixes as in 100M.
        #[arg(long, value_name = "BYTES", value_parser = size)]
        bandwidth: Option<u64>,
    },
    /// List jobs, those that have ended too.
    Jobs,
    /// Stop a job; it can be begun again later.
    Cancel {
        /// Its number.
        job: u64,
    },
}

#[derive(Subcommand)]
enum Internal {
    /// Take a snapshot with this name. Guests wait while all tables are counted.
    Create {
        /// Its name.
        name: String,
    },
    /// Delete the first snapshot with this name, else the one with this ID.
    Delete {
        /// Its name or ID.
        snapshot: String,
    },
    /// List the snapshots.
    List,
}

impl Internal {
    /// The call and its parameters.
    fn call(&self) -> (&'static str, Value) {
        match self {
            Internal::Create { name } => ("snapshot-internal-create", json!({"name": name})),
            Internal::Delete { snapshot } => {
                ("snapshot-internal-delete", json!({"snapshot": snapshot}))
            }
            Internal::List => ("snapshot-internal-list", json!({})),
        }
    }
}

fn size(text: &str) -> Result<u64, String> {
    node::parse_size(text).ok_or_else(|| "a size like 4096, 100M or 10G is needed".to_owned())
}

/// Asks.
pub(crate) fn run(ctl: &Ctl) -> anyhow::Result<u8> {
    let mut client = Client::connect(&ctl.socket)?;
    let here = |path: &PathBuf| std::path::absolute(path).context("no current directory");
    let (method, mut params, pace) = match &ctl.what {
        What::Attach { name, node, format, read_only, nbd } => {
            let (node, nbd) = (absolute(node)?, nbd.as_ref().map(here).transpose()?);
            let wanted = json!({
                "name": name, "node": node, "format": format.name(), "read-only": read_only,
                "nbd": nbd,
            });
            ("attach", wanted, None)
        }
        What::Detach { name } => ("detach", json!({"name": name}), None),
        What::List => ("list", json!({}), None),
        What::Stats => ("stats", json!({}), None),
        What::Chain => ("chain", json!({}), None),
        // The server may run in another directory.
        What::Snapshot { overlay } => ("snapshot", json!({"overlay": here(overlay)?}), None),
        What::SnapshotInternal { what } => {
            let (method, params) = what.call();
            (method, params, None)
        }
        What::Resize { size } => ("resize", json!({"size": size}), None),
        What::Stream { base, pace } => {
            ("stream", json!({"base": base, "rate": pace.rate}), Some(pace))
        }
        What::Commit { layer, pace } => {
            ("commit", json!({"layer": layer, "rate": pace.rate}), Some(pace))
        }
        What::Rebase { backing_file, backing_format, pace } => {
            let to = (!backing_file.is_empty()).then_some((backing_file, backing_format.name()));
            let (file, format) = to.unzip();
            ("rebase", json!({"backing": file, "format": format, "rate": pace.rate}), Some(pace))
        }
        What::Limit { iops, bandwidth } => {
            ("limit", json!({"iops": iops, "bandwidth": bandwidth}), None)
        }
        What::Jobs => ("jobs", json!({}), None),
        What::Cancel { job } => ("cancel", json!({"job": job}), None),
    };
    if let Some(image) = &ctl.image {
        params["image"] = json!(image);
    }
    let mut result = client.call(method, params)?;
    if pace.is_some_and(|p| !p.detach) {
        result = wait(&mut client, &result, ctl.image.as_deref())?;
    }
    if ctl.output.is_json() {
        print_json(&result)?;
    } else {
        print(&result)?;
    }
    Ok(0)
}

/// Waits for a job, with progress; returns how it ended.
fn wait(client: &mut Client, begun: &Value, image: Option<&str>) -> anyhow::Result<Value> {
    let which = image.map_or(json!({}), |i| json!({"image": i}));
    let id = begun["job"].as_u64().context("the server names no job")?;
    let mut progress = None;
    loop {
        let jobs = client.call("jobs", which.clone())?;
        let all = jobs.as_array().context("the server lists no jobs")?;
        let job =
            all.iter().find(|j| j["job"] == id).context("the server has forgotten the job")?;
        let number = |key: &str| job[key].as_u64().unwrap_or(0);
        if number("of") > 0 {
            let shown = std::io::IsTerminal::is_terminal(&std::io::stderr());
            let p = progress.get_or_insert_with(|| Progress::new(shown, number("of")));
            p.at(number("done"));
        }
        match job["state"].as_str() {
            Some("running") => std::thread::sleep(LOOK),
            Some("done") => {
                if let Some(p) = progress {
                    p.finish();
                }
                return Ok(job.clone());
            }
            _ => bail!("job {id}: {}", job["error"].as_str().unwrap_or("failed")),
        }
    }
}

/// The node, for a daemon that runs in another directory.
fn absolute(node: &str) -> anyhow::Result<String> {
    let NodeSpec::File(path) = NodeSpec::parse(node)? else { return Ok(node.to_owned()) };
    if path.is_absolute() {
        return Ok(node.to_owned());
    }
    let path = std::path::absolute(path).context("no current directory")?;
    match path.to_str() {
        Some(text) if !text.contains([':', '?', '%']) => Ok(text.to_owned()),
        _ => bail!("{node}: give the whole path, as file: with percent-encoding"),
    }
}

fn print_daemon(result: &Value) -> anyhow::Result<()> {
    let list = |key: &str| result[key].as_array().cloned().unwrap_or_default();
    for image in list("images") {
        let text = |key: &str| image[key].as_str().unwrap_or("-").to_owned();
        let size = image["virtual-size"].as_u64().unwrap_or(0);
        let (name, state, node) = (text("name"), text("state"), text("node"));
        let (format, user) = (text("format"), text("used-by"));
        let nbd = match (image["nbd"].as_str(), image["nbd-clients"].as_u64()) {
            (Some(path), Some(n)) => format!(", on {path} by {n} NBD clients"),
            _ => String::new(),
        };
        let space = match image["space"].as_str() {
            Some(space) => format!(", space {space}"),
            None => String::new(),
        };
        line(&format!("image {name} {state} {node} {format} {size} used by {user}{nbd}{space}"))?;
    }
    for (n, reactor) in list("reactors").iter().enumerate() {
        let busy = reactor["busy-ns"].as_f64().unwrap_or(0.0);
        let idle = reactor["idle-ns"].as_f64().unwrap_or(0.0);
        let share = 100.0 * busy / (busy + idle).max(1.0);
        let (turns, sleeps) = (&reactor["turns"], &reactor["sleeps"]);
        line(&format!("reactor {n} turns {turns} sleeps {sleeps} busy {share:.1} %"))?;
    }
    for device in list("devices") {
        let text = |key: &str| device[key].as_str().unwrap_or("-").to_owned();
        let (state, image) = (text("state"), text("image"));
        line(&format!("vbd {}/{} {state} image {image}", device["domid"], device["devid"]))?;
        for (n, ring) in device["rings"].as_array().into_iter().flatten().enumerate() {
            let number = |key: &str| ring[key].as_u64().unwrap_or(0);
            let (reads, writes, flushes) = (number("reads"), number("writes"), number("flushes"));
            line(&format!("  ring {n} reads {reads} writes {writes} flushes {flushes}"))?;
        }
    }
    Ok(())
}

fn print(result: &Value) -> anyhow::Result<()> {
    print_daemon(result)?;
    if let Some(layers) = result["layers"].as_array() {
        for (n, layer) in layers.iter().enumerate() {
            line(&format!("{n} {}", layer.as_str().unwrap_or_default()))?;
        }
    }
    if let Ok(list) = Vec::<qcow::info::SnapshotInfo>::deserialize(&result["snapshots"]) {
        let mut out = out();
        snapshots(&mut out, &list).and_then(|()| out.flush()).context(STDOUT)?;
    }
    let jobs = result
        .as_array()
        .cloned()
        .unwrap_or_else(|| if result["job"].is_null() { Vec::new() } else { vec![result.clone()] });
    for job in jobs {
        let text = |key: &str| job[key].as_str().unwrap_or_default().to_owned();
        let (id, done, of) = (&job["job"], &job["done"], &job["of"]);
        let error = text("error");
        let more = if error.is_empty() { String::new() } else { format!(": {error}") };
        match job["state"].is_null() {
            true => line(&format!("job {id}"))?,
            false => {
                let (what, state) = (text("what"), text("state"));
                line(&format!("job {id} {what} {state} {done}/{of}{more}"))?;
            }
        }
    }
    Ok(())
}
