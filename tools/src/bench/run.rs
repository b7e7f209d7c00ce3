//! `polldisk bench run`: the command line of the load generator, and how its outcome is printed.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use ::bench::run::meter::{Costs, Counts};
use ::bench::run::{
    Direct, Distribution, Job, Meter, Mix, Nbd, Outcome, Percentiles, Progress, Ring, RingOptions,
    Server, Shape, Sizes, Target, Verify,
};
use anyhow::{Context, bail};
use clap::{ArgGroup, Args, ValueEnum};
use node::NodeSpec;
use qcow::open::Format;
use reactor::{Policy, Start};
use serde::Serialize;

use crate::output::STDOUT;

/// How long an NBD server may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// Seconds before anything is counted.
const RAMP: f64 = 0.5;

/// A run that only counts is no longer than this, in seconds.
const COUNTING: f64 = 1.0;

/// After so many seconds it is told how far a run is, and again each time as many have passed.
const TELL: f64 = 5.0;

/// Load a guest's ring, an NBD server or a block node, and say what came of it.
///
/// Options are called as in fio, with - for _ (which is understood too). What is written to is what
/// --rw says: all but read and randread overwrite what the target holds.
#[derive(Args)]
#[command(group = ArgGroup::new("target").required(true))]
pub(crate) struct Run {
    /// Load the NBD server that listens on this unix socket.
    #[arg(long, value_name = "SOCKET", group = "target")]
    nbd: Option<PathBuf>,
    /// Name of the server's export.
    #[arg(long, value_name = "NAME", default_value = "", requires = "nbd")]
    export: String,
    /// Have a reactor of this process serve this node, and load its ring as a guest does.
    #[arg(long, value_name = "NODE", group = "target")]
    ring: Option<String>,
    /// Format of the image that a ring shows: qcow2 or raw.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::format)]
    format: Format,
    /// Load this node's bytes through its own queue, without image and ring.
    #[arg(long, value_name = "NODE", group = "target")]
    node: Option<String>,
    /// What requests do, and whether they are at random or one after the other.
    #[arg(long, default_value = "randread")]
    rw: Pattern,
    /// Reads among the requests of rw and randrw, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 50)]
    rwmixread: u8,
    /// Discards among the requests of rw and randrw, in percent; the rest are writes.
    #[arg(long, value_name = "PERCENT", default_value_t = 0)]
    rwmixtrim: u8,
    /// Bytes of a request; suffixes as in 64k.
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = size32)]
    bs: u32,
    /// Sizes of requests, each with its share in percent: 4k/60:64k/40.
    #[arg(long, value_name = "SIZE/PERCENT:…", conflicts_with = "bs", value_parser = sizes)]
    bssplit: Option<Sizes>,
    /// Requests under way; with --rate-iops, at most.
    #[arg(long, value_name = "N", default_value_t = 1)]
    iodepth: u32,
    /// Send so many requests a second, whatever the answers. Latencies count from when a request was
    /// due, so that what waits behind a slow one is seen.
    #[arg(long, value_name = "N", alias = "rate_iops")]
    rate_iops: Option<f64>,
    /// uniform, or zipf:THETA: the block that is the k-th in a random order as often as 1 / k^THETA.
    #[arg(long, value_name = "HOW", alias = "random_distribution", default_value = "uniform", value_parser = distribution)]
    random_distribution: Distribution,
    /// First byte of the range that is asked for.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size)]
    offset: u64,
    /// Its length; to the disk's end if not said.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: Option<u64>,
    /// Seconds before anything is counted; half a second if not said, and none with --number-ios.
    #[arg(long, value_name = "SECONDS", alias = "ramp_time")]
    ramp_time: Option<f64>,
    /// Seconds that are counted, at most.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    runtime: f64,
    /// Ends after so many requests that are counted.
    #[arg(long, value_name = "N", alias = "number_ios")]
    number_ios: Option<u64>,
    /// Flush after so many writes.
    #[arg(long, value_name = "N")]
    fsync: Option<u32>,
    /// Write blocks that can be told from all others, read all of them back at the end, and compare.
    #[arg(long)]
    verify: bool,
    /// Where random numbers begin: the same seed asks for the same.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// The NBD server's process: tells its processor time and context switches.
    #[arg(long, requires = "nbd")]
    pid: Option<u32>,
    /// Count what the server does, too, in a run of its own of a second at most, after the other: system
    /// calls, instructions (of a process by perf, else strace), allocations (of a reactor here).
    #[arg(long)]
    counts: bool,
    #[command(flatten)]
    reactor: crate::args::Reactor,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
#[value(rename_all = "lower")]
enum Pattern {
    Read,
    Write,
    #[value(name = "rw")]
    Mixed,
    Trim,
    RandRead,
    RandWrite,
    #[value(name = "randrw")]
    RandMixed,
    RandTrim,
}

fn size(text: &str) -> Result<u64, String> {
    node::parse_size(text).ok_or_else(|| "a size like 64k is needed".to_owned())
}

fn size32(text: &str) -> Result<u32, String> {
    u32::try_from(size(text)?).map_err(|_| "that is too long for a request".to_owned())
}

fn sizes(text: &str) -> Result<Sizes, String> {
    let each = |part: &str| {
        let (bytes, share) = part.split_once('/').ok_or("sizes and shares like 4k/60:64k/40")?;
        let share = share.parse().map_err(|_| format!("{share:?} is no share in percent"))?;
        Ok((size32(bytes)?, share))
    };
    text.split(':').map(each).collect::<Result<_, String>>().map(Sizes)
}

fn distribution(text: &str) -> Result<Distribution, String> {
    match text.split_once(':') {
        None if text == "uniform" => Ok(Distribution::Uniform),
        Some(("zipf", theta)) => {
            theta.parse().map(Distribution::Zipf).map_err(|_| format!("{theta:?} is no number"))
        }
        _ => Err("uniform and zipf:THETA are possible".to_owned()),
    }
}

impl Run {
    fn job(&self) -> anyhow::Result<Job> {
        use Pattern::{Mixed, RandMixed, RandRead, RandTrim, RandWrite, Read, Trim, Write};
        if self.rwmixread.saturating_add(self.rwmixtrim) > 100 {
            bail!("--rwmixread and --rwmixtrim are more than 100 % together");
        }
        let mix = match self.rw {
            Read | RandRead => Mix { reads: 100, trims: 0 },
            Write | RandWrite => Mix { reads: 0, trims: 0 },
            Trim | RandTrim => Mix { reads: 0, trims: 100 },
            Mixed | RandMixed => Mix { reads: self.rwmixread, trims: self.rwmixtrim },
        };
        let distribution = match self.rw {
            Read | Write | Trim | Mixed => Distribution::Sequential,
            _ => self.random_distribution,
        };
        let depth = self.iodepth;
        Ok(Job {
            name: self.rw.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned()),
            mix,
            sizes: self.bssplit.clone().unwrap_or_else(|| Sizes(vec![(self.bs, 100)])),
            distribution,
            shape: match self.rate_iops {
                Some(per_second) => Shape::Rate { per_second, depth },
                None => Shape::Depth(depth),
            },
            offset: self.offset,
            length: self.size,
            ramp: self.ramp_time.unwrap_or(if self.number_ios.is_some() { 0.0 } else { RAMP }),
            seconds: self.runtime,
            requests: self.number_ios,
            flush_every: self.fsync,
            verify: if self.verify { Verify::Stamped } else { Verify::No },
            seed: self.seed,
        })
    }

    /// Runs the job, and then once more if there is something to count.
    fn load<T: Target>(
        &self,
        job: &Job,
        target: &mut T,
        costs: Option<&mut dyn Meter>,
        counts: Option<&mut dyn Meter>,
    ) -> anyhow::Result<(Outcome, Option<String>)> {
        let mut outcome = ::bench::run::run(job, target, costs, &mut self.teller())?;
        let Some(counts) = counts.filter(|_| self.counts) else { return Ok((outcome, None)) };
        let seconds = job.seconds.min(COUNTING);
        let short = Job { seconds, ramp: job.ramp.min(COUNTING), ..job.clone() };
        let counted = ::bench::run::run(&short, target, Some(&mut *counts), &mut |_| {})?;
        outcome.server = outcome.server.with_counts(outcome.requests, &counted);
        Ok((outcome, counts.missing().map(str::to_owned)))
    }

    /// Says now and then how far it is.
    fn teller(&self) -> impl FnMut(Progress) {
        let (mut next, quiet) = (TELL, self.json);
        move |p: Progress| {
            if p.seconds < next {
                // It has begun to count, or to read back.
                next = next.min((p.seconds / TELL).floor() * TELL + TELL);
            } else if !quiet {
                next += TELL;
                let counting = if p.counting { "counting" } else { "not counting" };
                tell!("{:.0} s, {} requests, {counting}", p.seconds, p.requests);
            }
        }
    }
}

/// Runs it; the exit code is 1 if requests failed.
pub(super) fn run(r: &Run) -> anyhow::Result<u8> {
    let job = r.job()?;
    let named = r.reactor.named();
    let (what, (outcome, missing)) = match (&r.nbd, &r.ring, &r.node) {
        (Some(socket), ..) => {
            pin(named.first().copied())?;
            let mut costs = r.pid.map(Costs::of).transpose()?;
            let mut counts = r.pid.map(Counts::of);
            let mut nbd = Nbd::connect(socket, &r.export, PATIENCE)?;
            let what = nbd.limits().name.clone();
            let costs = costs.as_mut().map(|m| m as &mut dyn Meter);
            let counts = counts.as_mut().map(|m| m as &mut dyn Meter);
            let done = r.load(&job, &mut nbd, costs, counts)?;
            nbd.close()?;
            (what, done)
        }
        (_, Some(spec), _) => ring(r, &job, &NodeSpec::parse(spec)?)?,
        (.., spec) => {
            let spec = NodeSpec::parse(spec.as_deref().context("no target")?)?;
            pin(named.first().copied())?;
            let mut direct = Direct::open(&spec, job.changes())?;
            let done = r.load(&job, &mut direct, None, None);
            let closed = direct.close();
            (format!("node {spec}"), done.and_then(|done| Ok(closed.map(|()| done)?))?)
        }
    };
    let mut out = std::io::stdout();
    if let Some(why) = &missing {
        tell!("polldisk: not counted: {why}");
    }
    if r.json {
        let server_per_request = PerRequest::of(&outcome);
        let report = Report { target: what, job, outcome: &outcome, server_per_request, missing };
        writeln!(out, "{}", serde_json::to_string(&report)?).context(STDOUT)?;
    } else {
        print(&mut out, &what, &job, &outcome).context(STDOUT)?;
    }
    Ok(u8::from(outcome.errors > 0))
}

fn pin(cpu: Option<usize>) -> anyhow::Result<()> {
    cpu.map_or(Ok(()), |cpu| reactor::pin_current_thread(cpu).map_err(anyhow::Error::msg))
}

fn ring(
    r: &Run,
    job: &Job,
    spec: &NodeSpec,
) -> anyhow::Result<(String, (Outcome, Option<String>))> {
    let cores = r.reactor.cores(2)?;
    let alone = cores[0] == cores[1];
    let policy = r.reactor.policy.unwrap_or(if alone { Policy::Adaptive } else { Policy::Poll });
    let options = RingOptions {
        format: r.format,
        writable: job.changes(),
        reactor: Start { cpu: cores[0], policy },
        here: cores[1],
        l2_cache: r.reactor.l2_cache,
        depth: r.iodepth,
    };
    pin(cores[1])?;
    let mut ring = Ring::open(spec, &options)?;
    let (what, mut costs, mut counts) =
        (ring.limits().name.clone(), ring.meter(false), ring.meter(true));
    let done = r.load(job, &mut ring, Some(&mut costs), Some(&mut counts));
    // After an error the ring may have requests under way: the one to tell is the first.
    let closed = ring.close();
    let done = done?;
    closed?;
    Ok((what, done))
}

#[derive(Serialize)]
struct Report<'a> {
    target: String,
    job: Job,
    outcome: &'a Outcome,
    server_per_request: PerRequest,
    /// Why something was not counted.
    missing: Option<String>,
}

/// What a request cost the server.
#[derive(Serialize)]
struct PerRequest {
    cpu_us: Option<f64>,
    busy_us: Option<f64>,
    instructions: Option<f64>,
    switches: Option<f64>,
    syscalls: Option<f64>,
    allocations: Option<f64>,
}

impl PerRequest {
    fn of(o: &Outcome) -> PerRequest {
        let each = |n: Option<u64>| n.map(|n| n as f64 / o.requests.max(1) as f64);
        let Server { cpu_ns, busy_ns, instructions, switches, syscalls, allocations } = o.server;
        PerRequest {
            cpu_us: each(cpu_ns).map(|ns| ns / 1000.0),
            busy_us: each(busy_ns).map(|ns| ns / 1000.0),
            instructions: each(instructions),
            switches: each(switches),
            syscalls: each(syscalls),
            allocations: each(allocations),
        }
    }
}

fn print(out: &mut impl Write, what: &str, job: &Job, o: &Outcome) -> std::io::Result<()> {
    let sizes: Vec<String> = match &job.sizes.0[..] {
        [(only, _)] => vec![format!("{only} bytes")],
        many => many.iter().map(|(bytes, share)| format!("{bytes} bytes {share} %")).collect(),
    };
    let shape = match job.shape {
        Shape::Depth(depth) => format!("depth {depth}"),
        Shape::Rate { per_second, depth } => {
            format!("{per_second} a second, depth {depth} at most")
        }
    };
    writeln!(out, "{}, {}, {shape}, on {what}", job.name, sizes.join(", "))?;
    let rate = o.bytes as f64 / o.seconds.max(1e-9) / 1_048_576.0;
    writeln!(
        out,
        "{} requests in {:.2} s: {:.0}/s, {rate:.1} MiB/s; {} failed",
        o.requests, o.seconds, o.iops, o.errors
    )?;
    writeln!(
        out,
        "{:<9}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
        "us", "mean", "min", "p50", "p90", "p99", "p99.9", "p99.99", "p99.999", "max"
    )?;
    let kinds = [
        ("reads", &o.reads),
        ("writes", &o.writes),
        ("discards", &o.trims),
        ("flushes", &o.flushes),
    ];
    for (name, percentiles) in kinds {
        if let Some(p) = percentiles {
            latencies(out, name, p)?;
        }
    }
    match o.steady {
        Some(s) => writeln!(
            out,
            "the rate {}: {:.1} % from its mean at most, slope {:+.1} %",
            if s.reached { "was steady" } else { "was NOT steady" },
            s.spread * 100.0,
            s.slope * 100.0
        )?,
        None => writeln!(out, "too short to tell whether the rate was steady")?,
    }
    let p = PerRequest::of(o);
    let figures = [
        (p.cpu_us, "us of processor time"),
        (p.busy_us, "us of it with work"),
        (p.instructions, "instructions"),
        (p.switches, "context switches"),
        (p.syscalls, "system calls"),
        (p.allocations, "allocations"),
    ];
    let known = figures.iter().filter_map(|(n, what)| n.map(|n| format!("{n:.3} {what}")));
    let known: Vec<String> = known.collect();
    if !known.is_empty() {
        writeln!(out, "the server, per request: {}", known.join(", "))?;
    }
    if job.verify == Verify::Stamped {
        writeln!(out, "verified: {} bytes were read and right", o.verified_bytes)?;
    }
    Ok(())
}

fn latencies(out: &mut impl Write, name: &str, p: &Percentiles) -> std::io::Result<()> {
    write!(out, "{name:<9}{:>10.1}", p.mean / 1000.0)?;
    for ns in [p.min, p.p50, p.p90, p.p99, p.p99_9, p.p99_99, p.p99_999, p.max] {
        write!(out, "{:>10.1}", ns as f64 / 1000.0)?;
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_distributions_are_understood() {
        assert_eq!(sizes("4k/60:64k/40").unwrap().0, [(4096, 60), (65536, 40)]);
        for bad in ["", "4k", "4k/", "4k/x", "4k/300", "8g/100", "4k/60:", "x/100"] {
            assert!(sizes(bad).is_err(), "{bad}");
        }
        assert_eq!(distribution("zipf:1.2").unwrap(), Distribution::Zipf(1.2));
        assert_eq!(distribution("uniform").unwrap(), Distribution::Uniform);
        for bad in ["zipf", "zipf:", "zipf:x", "pareto:1", "uniform:1"] {
            assert!(distribution(bad).is_err(), "{bad}");
        }
    }

    /// What this thread allocates for a job of so many requests.
    fn allocations(target: &mut impl Target, requests: u64) -> u64 {
        let (mix, shape) = (Mix { reads: 50, trims: 0 }, Shape::Depth(8));
        let (requests, flush_every) = (Some(requests), Some(10));
        let job = Job { mix, shape, requests, flush_every, seconds: 60.0, ..Job::default() };
        let before = ::bench::allocations();
        let outcome = ::bench::run::run(&job, target, None, &mut |_| {}).unwrap();
        assert_eq!((Some(outcome.requests), outcome.errors), (requests, 0));
        ::bench::allocations() - before
    }

    /// The program's allocator counts, so here it can be told.
    #[test]
    fn a_request_allocates_nothing() {
        let check = |few: u64, many: u64| {
            // The same for both, but for what becomes of more different latencies in the end.
            assert!(few > 0 && many < few + 20, "{few} for 1,000 requests, {many} for 11,000");
        };
        let spec = NodeSpec::parse("mem:1M").unwrap();
        let mut direct = Direct::open(&spec, true).unwrap();
        check(allocations(&mut direct, 1000), allocations(&mut direct, 11_000));
        direct.close().unwrap();
        let options = RingOptions {
            format: Format::Raw,
            writable: true,
            reactor: Start { cpu: None, policy: Policy::Adaptive },
            here: None,
            l2_cache: 1 << 20,
            depth: 8,
        };
        let mut ring = Ring::open(&spec, &options).unwrap();
        check(allocations(&mut ring, 1000), allocations(&mut ring, 11_000));
        ring.close().unwrap();
        // An NBD server, ours, on a thread of its own.
        let disk = node::Parts::new(
            node::open_chain(&spec, &node::OpenOptions::write(Format::Raw)).unwrap(),
        );
        let served = node::DiskOptions {
            reactors: vec![Start { cpu: None, policy: Policy::Adaptive }],
            image: qcow::run::Options::default(),
        };
        let disk = node::Disk::start(disk.unwrap(), served, reactor::Clock::real()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let export = crate::nbd::export(spec.to_string(), &disk.door(), disk.info()).unwrap();
        let server = ::nbd::Server::bind(&socket, export).unwrap();
        let mut nbd = Nbd::connect(&socket, "", PATIENCE).unwrap();
        check(allocations(&mut nbd, 1000), allocations(&mut nbd, 11_000));
        nbd.close().unwrap();
        server.shutdown(PATIENCE);
        disk.close().unwrap();
    }
}
