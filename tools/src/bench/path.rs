//! `polldisk bench path`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use ::bench::callgrind::{Atomics, Profile, profile};
use ::bench::figures::{Fill, Open, fill, open_16t};
use ::bench::path::{Run, Scenario, measure};
use ::bench::several::{Several, several};
use anyhow::Context;
use clap::Args;
use serde::Serialize;

use crate::output::STDOUT;

/// Measure the path.
#[derive(Args)]
pub(crate) struct Path {
    /// Requests per run; two runs, of this many and of twice as many, give the figure.
    #[arg(long, default_value_t = 2048)]
    count: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One run.
#[derive(Args)]
pub(crate) struct Worker {
    #[arg(long, value_parser = |s: &str| Scenario::from_name(s).ok_or("unknown scenario"))]
    scenario: Scenario,
    #[arg(long)]
    depth: usize,
    #[arg(long)]
    count: u64,
    #[arg(long)]
    scratch: PathBuf,
}

#[derive(Serialize)]
struct PathReport {
    scenarios: Vec<Row>,
    /// Filling an empty image, without and with a volatile cache.
    fill: Vec<Fill>,
    /// Opening an image of 16 TiB.
    open_16t: Open,
    /// One image on one reactor and on two, with threads.
    two_reactors: Several,
}

/// How long one image is read by one reactor, and then by two, in seconds.
const SEVERAL: f64 = 1.0;

/// A scenario's figures, each per request (or per turn, translation, poll).
#[derive(Serialize)]
struct Row {
    name: String,
    depth: usize,
    instructions_per_request: f64,
    layers: BTreeMap<String, f64>,
    copy_instructions: f64,
    /// Atomic read-modify-writes.
    atomics: f64,
    ns_per_request: f64,
    syscalls: Option<f64>,
    allocations: f64,
    locks: f64,
}

pub(super) fn path(p: &Path) -> anyhow::Result<u8> {
    let mut out = std::io::stdout();
    let signals = crate::signals::Signals::take()?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let scratch = tempfile::Builder::new().prefix("polldisk-bench-").tempdir();
    let scratch = scratch.context("cannot make a scratch folder (TMPDIR names where)")?;
    let dir = scratch.path();
    signals.remove_at_end(dir);
    let atomics = Atomics::of(&program)?;
    let mut rows = Vec::new();
    for (scenario, depth) in Scenario::ALL {
        if !p.json {
            tell!("measuring {}, depth {depth}", scenario.name());
        }
        let n = p.count.max(100);
        let once = profile(&program, scenario, depth, n, dir, &atomics)?;
        let twice = profile(&program, scenario, depth, 2 * n, dir, &atomics)?;
        let timed = measure(scenario, depth, 20 * n, dir, true)?;
        rows.push(row(scenario, depth, &once, &twice, n, &timed)?);
    }
    let fill = vec![fill(false, dir)?, fill(true, dir)?];
    let (open_16t, two_reactors) = (open_16t(dir)?, several(SEVERAL)?);
    let report = PathReport { scenarios: rows, fill, open_16t, two_reactors };
    if p.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?).context(STDOUT)?;
    } else {
        print(&mut out, &report).context(STDOUT)?;
    }
    Ok(0)
}

fn row(
    scenario: Scenario,
    depth: usize,
    once: &Profile,
    twice: &Profile,
    n: u64,
    timed: &Run,
) -> anyhow::Result<Row> {
    let each = |b: u64, a: u64| (b as f64 - a as f64) / n as f64;
    let per = |v: u64| v as f64 / timed.requests as f64;
    let layers: BTreeMap<String, f64> = twice
        .layers
        .iter()
        .map(|(l, &b)| (l.clone(), each(b, once.layers.get(l).copied().unwrap_or(0))))
        .filter(|(_, v)| v.abs() >= 0.05)
        .collect();
    let copy = each(twice.copy, once.copy);
    let moves = scenario.moves();
    anyhow::ensure!(
        !moves || copy >= 512.0,
        "{}: the data copy was not found in the profile ({copy} instructions)",
        scenario.name()
    );
    let total = each(twice.total(), once.total());
    let least = if moves { 50.0 } else { 5.0 };
    anyhow::ensure!(total >= least, "{}: {total} instructions: not measured", scenario.name());
    Ok(Row {
        name: scenario.name(),
        depth,
        instructions_per_request: total,
        layers,
        copy_instructions: copy,
        atomics: each(twice.atomics, once.atomics),
        ns_per_request: per(timed.ns),
        syscalls: timed.syscalls.map(per),
        allocations: per(timed.allocations),
        locks: per(timed.locks),
    })
}

fn print(out: &mut impl Write, report: &PathReport) -> std::io::Result<()> {
    for r in &report.scenarios {
        let calls = r.syscalls.map_or("?".to_owned(), |n| format!("{n}"));
        writeln!(
            out,
            "{:<14} depth {:>3}: {:>7.1} instructions, copy {:>6.1}; {:>7.1} ns; {calls} syscalls, {} allocations, {} locks, {:.2} atomics",
            r.name,
            r.depth,
            r.instructions_per_request,
            r.copy_instructions,
            r.ns_per_request,
            r.allocations,
            r.locks,
            r.atomics
        )?;
        let layers: Vec<String> = r.layers.iter().map(|(l, n)| format!("{l} {n:.1}")).collect();
        writeln!(out, "{:<14}            {}", "", layers.join(", "))?;
    }
    for f in &report.fill {
        writeln!(
            out,
            "filling an empty image, {} volatile cache: {:.3} device writes per guest write, {} flushes in {} writes",
            if f.volatile_cache { "with" } else { "without" },
            f.writes_per_write,
            f.device_flushes,
            f.guest_writes
        )?;
    }
    writeln!(
        out,
        "opening a mapped image of 16 TiB: {:.1} ms, {:.1} MiB",
        report.open_16t.milliseconds,
        report.open_16t.memory_bytes as f64 / 1048576.0
    )?;
    let t = &report.two_reactors;
    match (t.one, t.two, t.ratio, &t.reason) {
        (Some(one), Some(two), Some(ratio), _) => writeln!(
            out,
            "random reads that hit: {one:.0} a second by one reactor, {two:.0} by two: {ratio:.2}"
        )?,
        (.., reason) => writeln!(
            out,
            "throughput of two reactors: not measured: {}",
            reason.as_deref().unwrap_or("no reason")
        )?,
    }
    Ok(())
}

/// Runs one scenario, and prints what it took.
pub(super) fn worker(w: &Worker) -> anyhow::Result<u8> {
    let run = measure(w.scenario, w.depth, w.count, &w.scratch, false)?;
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&run)?).context(STDOUT)?;
    Ok(0)
}
