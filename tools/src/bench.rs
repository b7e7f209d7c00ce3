//! `polldisk bench …`: measurements that anybody can rerun.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use ::bench::callgrind::{Atomics, Profile, profile};
use ::bench::chain::{RATE_GOAL, STALL_GOAL_MS};
use ::bench::device::{MAX_DEPTH, Options, Report};
use ::bench::figures::{Fill, Open, fill, open_16t};
use ::bench::fresh::median;
use ::bench::path::{Run, Scenario, measure};
use ::bench::several::{Several, several};
use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use node::{NodeSpec, OpenOptions, Parts};
use qcow::open::Format;
use serde::Serialize;

use crate::output::STDOUT;

/// The commands.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// What a request costs on its path, layer by layer, in instructions (needs valgrind).
    Path(Path),
    /// What a device gives, and what driving it costs: 4 KiB at random, without an image.
    Device(Device),
    /// How long a snapshot keeps a guest waiting, and how fast streams and commits are.
    Chain(Chain),
    /// Random writes into an empty image, beside QEMU's server of images (needs QEMU).
    Fresh(Fresh),
    /// An image of 1 TiB, all allocated: reads for its translation, memory, its check.
    Full(Full),
    /// How many reads of one image that hit one reactor serves, and two at once.
    Reactors(Reactors),
    /// Runs one scenario once; what `path` runs under valgrind.
    #[command(hide = true)]
    PathWorker(Worker),
}

/// Measure the path.
#[derive(Args)]
pub(crate) struct Path {
    /// Requests per run; two runs, of this many and of twice as many, give the figure.
    #[arg(long, default_value_t = 2000)]
    count: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Read by one reactor and by two, each with a guest, over memory. Needs two idle processors.
#[derive(Args)]
pub(crate) struct Reactors {
    /// How long each, in seconds.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Change chains.
#[derive(Args)]
pub(crate) struct Chain {
    /// MiB of data in the image.
    #[arg(long, default_value_t = 256)]
    mib: u64,
    /// How often a stream and a commit are measured, each time beside a plain copy.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: u64,
    /// A folder for images of some times that size in each round; the system's, for what is temporary, if not said.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Write to an empty image.
#[derive(Args)]
pub(crate) struct Fresh {
    /// Writes of 4 KiB in a round.
    #[arg(long, default_value_t = 10000)]
    writes: u64,
    /// Rounds; medians count.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// A folder for images, on the file system that is to be written to; the system's, for what is
    /// temporary, if not said.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Measure a full image.
#[derive(Args)]
pub(crate) struct Full {
    /// How often to check it; medians count.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// A folder for the image, which takes some 170 MiB; the system's, for what is temporary, if not
    /// said.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Load a device.
#[derive(Args)]
pub(crate) struct Device {
    /// The node. `randwrite` overwrites what it holds.
    node: String,
    /// Requests in flight.
    #[arg(long, default_value_t = 32)]
    depth: usize,
    /// randread or randwrite.
    #[arg(long, default_value = "randread")]
    rw: Rw,
    /// How long, in seconds.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// The processor to run on.
    #[arg(long)]
    core: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Rw {
    #[value(name = "randread")]
    Read,
    #[value(name = "randwrite")]
    Write,
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

/// Runs a measurement.
pub(crate) fn run(command: &Bench) -> anyhow::Result<u8> {
    let mut out = std::io::stdout();
    match command {
        Bench::Path(p) => path(p),
        Bench::Device(d) => device(d),
        Bench::Chain(c) => chain(c),
        Bench::Fresh(f) => fresh(f),
        Bench::Full(f) => full(f),
        Bench::Reactors(r) => reactors(r),
        Bench::PathWorker(w) => {
            let run = measure(w.scenario, w.depth, w.count, &w.scratch, false)?;
            writeln!(out, "{}", serde_json::to_string(&run)?).context(STDOUT)?;
            Ok(0)
        }
    }
}

fn reactors(r: &Reactors) -> anyhow::Result<u8> {
    if !(0.01..=3600.0).contains(&r.seconds) {
        bail!("--seconds {}: 0.01 to 3600 are possible", r.seconds);
    }
    let done = several(r.seconds)?;
    let mut out = std::io::stdout();
    let line = match (done.one, done.two, done.ratio) {
        _ if r.json => serde_json::to_string(&done)?,
        (Some(one), Some(two), Some(ratio)) => {
            format!("one: {one:.0}/s, two: {two:.0}/s, {ratio:.2} times as many (goal: 1.9)")
        }
        _ => format!("not measured: {}", done.reason.as_deref().unwrap_or_default()),
    };
    writeln!(out, "{line}").context(STDOUT)?;
    Ok(0)
}

fn chain(c: &Chain) -> anyhow::Result<u8> {
    if !(1..=1 << 20).contains(&c.mib) {
        bail!("--mib {}: 1 to 1048576 are possible", c.mib);
    }
    if !(1..=100).contains(&c.rounds) {
        bail!("--rounds {}: 1 to 100 are possible", c.rounds);
    }
    let dir = folder(c.scratch.as_deref())?;
    let r = ::bench::chain::run(dir.path(), c.mib, c.rounds)?;
    let mut out = std::io::stdout();
    if c.json {
        writeln!(out, "{}", serde_json::to_string(&r)?).context(STDOUT)?;
        return Ok(0);
    }
    let shares = |rate: fn(&::bench::chain::Round) -> f64| -> Vec<u32> {
        let share = |r| (rate(r) / r.copy_mib_s * 100.0).round() as u32;
        r.rounds.iter().map(share).collect()
    };
    let lines = format!(
        "{} MiB\n\
         snapshot: the guest waits {:.2} ms (median; {:.2?}; goal: below {STALL_GOAL_MS}), \
         undisturbed {:.2} ms at most\n\
         a plain copy: {:.0} MiB/s\n\
         stream: {:.0} MiB/s, {:.0} % of it (median; {:?}; goal: {goal:.0} %)\n\
         commit: {:.0} MiB/s, {:.0} % of it (median; {:?}; goal: {goal:.0} %)",
        r.mib,
        r.snapshot_stall_ms,
        r.snapshot_stalls_ms,
        r.undisturbed_ms,
        r.copy_mib_s,
        r.stream_mib_s,
        r.stream_share * 100.0,
        shares(|r| r.stream_mib_s),
        r.commit_mib_s,
        r.commit_share * 100.0,
        shares(|r| r.commit_mib_s),
        goal = RATE_GOAL * 100.0,
    );
    writeln!(out, "{lines}").context(STDOUT)?;
    Ok(0)
}

/// A scratch folder.
fn folder(within: Option<&std::path::Path>) -> anyhow::Result<tempfile::TempDir> {
    let dir = match within {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    dir.context("cannot make a scratch folder")
}

fn fresh(f: &Fresh) -> anyhow::Result<u8> {
    if !(1..=1 << 24).contains(&f.writes) || !(1..=1000).contains(&f.rounds) {
        bail!("--writes: 1 to {} are possible, --rounds: 1 to 1000", 1 << 24);
    }
    let signals = crate::signals::Signals::take()?;
    let dir = folder(f.scratch.as_deref())?;
    signals.remove_at_end(dir.path());
    let r = ::bench::fresh::fresh(dir.path(), f.writes, f.rounds)?;
    let mut out = std::io::stdout();
    if f.json {
        writeln!(out, "{}", serde_json::to_string(&r)?).context(STDOUT)?;
    } else {
        print_fresh(&mut out, &r).context(STDOUT)?;
    }
    Ok(0)
}

fn print_fresh(out: &mut impl Write, r: &::bench::fresh::Report) -> std::io::Result<()> {
    writeln!(out, "{} writes of 4 KiB into {} clusters of 64 KiB", r.writes, r.clusters)?;
    for (who, rate) in std::iter::once(("", &r.polldisk)).chain(r.qemu.iter().map(|q| ("qemu ", q)))
    {
        writeln!(
            out,
            "{who}{}: {:.0} writes per CPU second (median of {:.0?}), {:.0} per second",
            rate.server,
            rate.median(),
            rate.per_cpu_second,
            median(&rate.iops)
        )?;
    }
    writeln!(out, "writes per CPU second: {:.2} times QEMU's best (goal: 3)", r.ratio)?;
    for (who, c) in [("polldisk", &r.polldisk_device), ("qemu", &r.qemu_device)] {
        let each = |n: u64| n as f64 / c.guest_writes as f64;
        writeln!(
            out,
            "{who}, per guest write: {:.3} device writes ({:.3} of them zeroes), {:.0} bytes; {} \
             flushes in {} writes",
            each(c.writes),
            each(c.zeroes),
            each(c.bytes),
            c.flushes,
            c.guest_writes
        )?;
    }
    Ok(())
}

fn full(f: &Full) -> anyhow::Result<u8> {
    if !(1..=1000).contains(&f.rounds) {
        bail!("--rounds {}: 1 to 1000 are possible", f.rounds);
    }
    let signals = crate::signals::Signals::take()?;
    let dir = folder(f.scratch.as_deref())?;
    signals.remove_at_end(dir.path());
    let r = ::bench::full::full(dir.path(), f.rounds)?;
    let mut out = std::io::stdout();
    if f.json {
        writeln!(out, "{}", serde_json::to_string(&r)?).context(STDOUT)?;
    } else {
        print_full(&mut out, &r).context(STDOUT)?;
    }
    Ok(0)
}

fn print_full(out: &mut impl Write, r: &::bench::full::Report) -> std::io::Result<()> {
    let mib = |n: u64| n as f64 / 1_048_576.0;
    writeln!(out, "1 TiB in {} clusters, all allocated", r.clusters)?;
    for (when, x) in [("cold", &r.missing), ("warm", &r.warm)] {
        writeln!(
            out,
            "{when}: {} reads, {} misses, {} reads of the device, {} bytes",
            x.reads, x.misses, x.device_reads, x.device_bytes
        )?;
    }
    writeln!(
        out,
        "memory: {:.1} MiB, {:.1} MiB of them for an image of any size; {:.3} bytes for each cluster \
         (goal: 8.4)",
        mib(r.memory_bytes),
        mib(r.small_bytes),
        r.bytes_per_cluster
    )?;
    let most = mib(r.check.refcount_bytes / 4) + 64.0;
    for (who, u) in [("polldisk image", Some(r.check.polldisk)), ("qemu-img", r.check.qemu_img)] {
        match u {
            Some(u) => writeln!(
                out,
                "{who} check: {:.2} s, {:.2} s of processor time, {:.1} MiB",
                u.seconds,
                u.cpu_seconds,
                mib(u.peak_bytes)
            )?,
            None => writeln!(out, "{who} check: not there")?,
        }
    }
    writeln!(out, "goal: not slower than qemu-img, and at most {most:.0} MiB")
}

fn device(d: &Device) -> anyhow::Result<u8> {
    if !(0.1..=86_400.0).contains(&d.seconds) {
        bail!("--seconds {}: 0.1 to 86400 are possible", d.seconds);
    }
    if !(1..=MAX_DEPTH).contains(&d.depth) {
        bail!("--depth {}: 1 to {MAX_DEPTH} are possible", d.depth);
    }
    let spec = NodeSpec::parse(&d.node)?;
    let write = d.rw == Rw::Write;
    let (raw, core) = (Format::Raw, d.core);
    let open = if write { OpenOptions::write(raw) } else { OpenOptions::read(raw) };
    let parts = Parts::new(node::open_chain(&spec, &open)?)?;
    let options = Options { depth: d.depth, write, seconds: d.seconds, core };
    let report = ::bench::device::run(parts, &options)?;
    let mut out = std::io::stdout();
    if d.json {
        writeln!(out, "{}", serde_json::to_string(&report)?).context(STDOUT)?;
    } else {
        print_device(&mut out, &report).context(STDOUT)?;
    }
    Ok(0)
}

fn print_device(out: &mut impl Write, r: &Report) -> std::io::Result<()> {
    let us = |ns: u64| ns as f64 / 1000.0;
    let or_unknown = |n: Option<f64>| n.map_or("?".to_owned(), |n| format!("{n:.0}"));
    let per = |n: Option<u64>| {
        n.filter(|&n| n > 0)
            .map_or("?".to_owned(), |n| format!("{:.1}", r.requests as f64 / n as f64))
    };
    let l = &r.latency_ns;
    writeln!(
        out,
        "{} 4 KiB, depth {}: {:.0} IOPS; latency p50 {:.1}, p99 {:.1}, p99.9 {:.1} us",
        r.rw,
        r.depth,
        r.iops,
        us(l.p50),
        us(l.p99),
        us(l.p999)
    )?;
    writeln!(
        out,
        "{} requests in {} polls, {} of them empty; {} requests per submission doorbell, {} per completion doorbell",
        r.requests,
        r.polls,
        r.empty_polls,
        per(r.sq_doorbells),
        per(r.cq_doorbells)
    )?;
    writeln!(
        out,
        "cycles of the time stamp counter: {} per request, {} per empty poll (fit over {} slices, {:.1} % off)",
        or_unknown(r.cycles_per_request),
        or_unknown(r.cycles_per_empty_poll),
        r.fit_slices,
        r.fit_error.unwrap_or(0.0) * 100.0
    )?;
    writeln!(
        out,
        "disturbed by {} involuntary switches and {} ms of steal",
        r.involuntary_switches,
        r.steal_ms.map_or("?".to_owned(), |n| n.to_string())
    )
}

fn path(p: &Path) -> anyhow::Result<u8> {
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
