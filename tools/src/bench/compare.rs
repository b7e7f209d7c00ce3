//! `polldisk bench compare`.

use std::io::Write;
use std::path::{Path, PathBuf};

use ::compare::page;
use ::compare::peer::Peer;
use ::compare::profiles::{PROFILES, Profile};
use ::compare::results::{Comparison, Frontend, PeerInfo, Row};
use ::compare::round::{Options, compare, free, space, usual_cores};
use anyhow::{Context, bail};
use clap::Args;
use vfio::Address;

use super::folder;
use crate::output::{STDOUT, usage};

/// Where images are if they may be in memory.
const MEMORY: &str = "/dev/shm";

/// polldisk and its peers under the same load, in turns.
#[derive(Args)]
pub(crate) struct Compare {
    /// What to compare; --list shows all.
    #[arg(long, value_name = "NAME", required_unless_present = "list",
          value_parser = |s: &str| profile(s))]
    profile: Option<&'static Profile>,
    /// Show profiles, and which peers are here.
    #[arg(long, conflicts_with = "profile")]
    list: bool,
    /// Less than a minute: fewer cases, smaller disks, shorter runs.
    #[arg(long)]
    quick: bool,
    /// Who takes part beside polldisk and the floor, nbdkit's memory plugin (may be given several times);
    /// everybody who is here, if not said.
    #[arg(long = "peer", value_name = "NAME", value_parser = |s: &str| Peer::from_name(s))]
    peers: Vec<Peer>,
    /// Rounds; medians count. 5, or 3 with --quick, if not said.
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Processors of the load generator and of servers; the last two, if not said.
    #[arg(long, value_name = "GENERATOR,SERVER", value_delimiter = ',', num_args = 1)]
    cores: Vec<usize>,
    /// A folder for images, on the file system of interest. If not said: in memory, or where what is
    /// temporary is for the profile that is about disks.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// A drive of this host that is read too, by its PCI address: by polldisk, by the kernel's driver and by
    /// spdk_nvme_perf, in turns. It is given to the kernel, and taken back, each time.
    #[arg(long, value_name = "ADDRESS")]
    device: Option<Address>,
    /// Sample stacks of servers under load, for flame graphs (needs perf).
    #[arg(long)]
    flame: bool,
    /// What was done to the drive before, in words, for the report.
    #[arg(long, value_name = "TEXT")]
    preconditioning: Option<String>,
    /// Put the report into this folder: report.html, results.json, results.csv and charts.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Seconds that a quick comparison may take for its measurements.
    #[arg(long, hide = true)]
    budget: Option<f64>,
}

fn profile(name: &str) -> Result<&'static Profile, String> {
    let known = || PROFILES.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
    Profile::find(name).ok_or_else(|| format!("unknown profile; there are {}", known()))
}

pub(super) fn run(c: &Compare) -> anyhow::Result<u8> {
    let Some(profile) = c.profile else { return list(c) };
    if let Some(rounds) = c.rounds
        && !(1..=1000).contains(&rounds)
    {
        return usage(format!("--rounds {rounds}: 1 to 1000 are possible"));
    }
    let cores = match c.cores[..] {
        [] => usual_cores()?,
        [generator, server] => Some([generator, server]),
        _ => return usage("--cores: two are needed, of the generator and of servers, like 0,1"),
    };
    if let Some(budget) = c.budget
        && !(0.1..=3600.0).contains(&budget)
    {
        return usage(format!("--budget {budget}: 0.1 to 3600 are possible"));
    }
    if let Some(out) = &c.out {
        std::fs::create_dir_all(out).with_context(|| format!("--out {}", out.display()))?;
    }
    let signals = crate::signals::Signals::take()?;
    let dir = folder(Some(&scratch(c, profile)?))?;
    // Servers are to be ended in any case.
    let told = signals.told();
    let stop = || told.try_recv().is_ok();
    let options = Options {
        profile,
        quick: c.quick,
        peers: c.peers.clone(),
        rounds: c.rounds,
        budget: c.budget,
        cores,
        program: std::env::current_exe().context("cannot find this program")?,
        device: c.device.map(|address| address.to_string()),
        preconditioning: c.preconditioning.clone(),
        flame: c.flame,
        command: command(),
        again: again(c, profile),
    };
    let mut tell = |text: &str| tell!("{text}");
    let comparison = compare(&options, dir.path(), &stop, &mut tell)?;
    if let Some(out) = &c.out {
        page::write(out, std::slice::from_ref(&comparison))?;
    }
    let mut out = std::io::stdout();
    if c.json {
        writeln!(out, "{}", serde_json::to_string(&comparison)?).context(STDOUT)?;
    } else {
        print(&mut out, &comparison).context(STDOUT)?;
    }
    Ok(0)
}

/// The command line, as it can be given again.
fn command() -> String {
    line(std::env::args().skip(1))
}

/// What of it says how, but not who takes part nor what is left behind.
fn again(c: &Compare, profile: &Profile) -> String {
    let mut words = ["bench", "compare", "--profile", profile.name].map(str::to_owned).to_vec();
    words.extend(c.quick.then(|| "--quick".to_owned()));
    let mut add = |name: &str, value: Option<String>| {
        words.extend(value.into_iter().flat_map(|value| [name.to_owned(), value]));
    };
    add("--rounds", c.rounds.map(|n| n.to_string()));
    let cores = c.cores.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    add("--cores", (!cores.is_empty()).then_some(cores));
    add("--scratch", c.scratch.as_ref().map(|dir| dir.display().to_string()));
    add("--preconditioning", c.preconditioning.clone());
    line(words.into_iter())
}

/// A command line of these words.
fn line(words: impl Iterator<Item = String>) -> String {
    let words = words.map(|word| match word.contains([' ', '\'', '"', '$']) {
        true => format!("'{}'", word.replace('\'', r"'\''")),
        false => word,
    });
    std::iter::once("polldisk".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// The folder to make images in, which has room for them.
fn scratch(c: &Compare, profile: &Profile) -> anyhow::Result<PathBuf> {
    let need = space(profile, c.quick);
    let room = |dir: &Path| free(dir).is_ok_and(|free| free >= need);
    let chosen = match &c.scratch {
        Some(dir) => dir.clone(),
        None if !profile.on_disk && room(Path::new(MEMORY)) => PathBuf::from(MEMORY),
        None => {
            let dir = std::env::temp_dir();
            if !profile.on_disk {
                tell!("{MEMORY} has no room for images: they lie in {}, on a disk", dir.display());
            }
            dir
        }
    };
    let have = free(&chosen)?;
    if have < need {
        let gib = |n: u64| n as f64 / f64::from(1 << 30);
        bail!(
            "{}: images take up to {:.1} GiB, and {:.1} are free; --scratch names another folder",
            chosen.display(),
            gib(need),
            gib(have)
        );
    }
    Ok(chosen)
}

fn list(c: &Compare) -> anyhow::Result<u8> {
    let device = c.device.map(|address| address.to_string());
    let peers: Vec<PeerInfo> = Peer::ALL.iter().map(|p| p.look(device.as_deref())).collect();
    let mut out = std::io::stdout();
    if c.json {
        let profiles: Vec<_> = PROFILES
            .iter()
            .map(|p| serde_json::json!({ "name": p.name, "question": p.question }))
            .collect();
        let all = serde_json::json!({ "profiles": profiles, "peers": peers });
        writeln!(out, "{all}").context(STDOUT)?;
        return Ok(0);
    }
    let mut print = || {
        for p in &PROFILES {
            writeln!(out, "{:15} {}", p.name, p.question)?;
        }
        writeln!(out)?;
        peers.iter().try_for_each(|p| writeln!(out, "{:19} {}", p.name, state(p)))
    };
    print().context(STDOUT)?;
    Ok(0)
}

fn state(peer: &PeerInfo) -> String {
    match (&peer.absent, &peer.version) {
        (Some(why), _) => format!("absent: {why}"),
        (None, Some(version)) => version.clone(),
        (None, None) => "there".to_owned(),
    }
}

fn print(out: &mut impl Write, c: &Comparison) -> std::io::Result<()> {
    writeln!(out, "{}: {}", c.profile, c.question)?;
    for peer in &c.peers {
        writeln!(out, "{:19} {}", peer.name, state(peer))?;
    }
    let mut before = None;
    for row in &c.results {
        let what = (&row.workload, row.block_size, row.depth, &row.labels);
        if before.replace(what) != Some(what) {
            print_head(out, row)?;
        }
        print_row(out, row)?;
    }
    c.notes.iter().try_for_each(|note| writeln!(out, "note: {note}"))
}

fn print_head(out: &mut impl Write, row: &Row) -> std::io::Result<()> {
    let labels = row.labels.iter().map(|(k, v)| format!(", {k} {v}")).collect::<String>();
    let size = row.block_size >> 10;
    writeln!(out, "\n{} {size} KiB, depth {}{labels}", row.workload, row.depth)?;
    writeln!(
        out,
        "{:62}{:>9}{:>10}{:>10}{:>8}{:>9}  CPU, polldisk = 1",
        "", "IOPS", "p50 us", "CPU us", "above", "syscalls"
    )
}

fn print_row(out: &mut impl Write, row: &Row) -> std::io::Result<()> {
    let frontend = match row.frontend {
        Frontend::Ring => "ring",
        Frontend::Nbd => "nbd",
        Frontend::Kernel => "kernel",
        Frontend::Device => "device",
    };
    let number = |n: Option<f64>| n.map_or("-".to_owned(), |n| format!("{n:.2}"));
    let ratio = match (row.ratio, row.ratio_interval) {
        (Some(r), Some([low, high])) => format!("{r:.2} ({low:.2} to {high:.2})"),
        (Some(r), None) => format!("{r:.2}"),
        (None, _) => "-".to_owned(),
    };
    writeln!(
        out,
        "{:62}{:>9.0}{:>10.1}{:>10}{:>8}{:>9}  {ratio}",
        format!("{} {frontend} {}", row.peer, row.variant),
        row.iops,
        row.latency_ns as f64 / 1000.0,
        number(row.cpu_us_per_io),
        number(row.cpu_us_above_floor),
        number(row.syscalls_per_io),
    )
}
