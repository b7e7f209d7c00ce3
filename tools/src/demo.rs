//! `polldisk demo`: the main job on the embedded default, shown and verified.

use std::io::Write;
use std::path::PathBuf;

use ::bench::demo::{Inject, Options, Report, What};
use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use reactor::Policy;

use crate::output::STDOUT;

/// Serve a guest ring from a QCOW2 image through the NVMe driver, and verify every byte.
#[derive(Args)]
pub(crate) struct Demo {
    /// How long to measure, in seconds.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Size of the image, all of which is written and read back.
    #[arg(long, default_value = "256M", value_parser = size, conflicts_with = "image")]
    size: u64,
    /// Serve this image instead, through a scratch overlay; its contents are compared too.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Format of that image: qcow2 or raw.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::format)]
    format: qcow::open::Format,
    /// Write to that image itself. This overwrites what it holds.
    #[arg(long, requires = "image")]
    write: bool,
    #[command(flatten)]
    reactor: crate::args::Reactor,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Do something wrong on purpose, to see that it is noticed.
    #[arg(long, hide = true)]
    inject: Option<Wrong>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Wrong {
    Syscall,
    Alloc,
    Lock,
    Corrupt,
}

fn size(text: &str) -> Result<u64, String> {
    let n = node::parse_size(text).ok_or("a size like 256M is needed")?;
    if !(1 << 20..=1 << 40).contains(&n) || !n.is_multiple_of(1 << 20) {
        return Err("whole MiB from 1M to 1T are possible".to_owned());
    }
    Ok(n)
}

/// Runs the demo; the exit code is 1 if anything did not verify.
pub(crate) fn run(demo: &Demo) -> anyhow::Result<u8> {
    if !(0.05..=86_400.0).contains(&demo.seconds) {
        bail!("--seconds {}: 0.05 to 86400 are possible", demo.seconds);
    }
    let signals = crate::signals::Signals::take()?;
    let scratch = tempfile::Builder::new().prefix("polldisk-demo-").tempdir();
    let scratch = scratch.context("cannot make a scratch folder (TMPDIR names where)")?;
    signals.remove_at_end(scratch.path());
    let cores = demo.reactor.cores(2)?;
    let alone = cores[0] == cores[1];
    let options = Options {
        seconds: demo.seconds,
        cores: [cores[0], cores[1]],
        policy: demo.reactor.policy.unwrap_or(if alone { Policy::Adaptive } else { Policy::Poll }),
        l2_cache: demo.reactor.l2_cache,
        scratch: PathBuf::from(scratch.path()),
        disk: match &demo.image {
            None => What::Fresh(demo.size / 4096),
            Some(path) => {
                What::Image { path: path.clone(), format: demo.format, write: demo.write }
            }
        },
        inject: demo.inject.map(|w| match w {
            Wrong::Syscall => Inject::Syscall,
            Wrong::Alloc => Inject::Alloc,
            Wrong::Lock => Inject::Lock,
            Wrong::Corrupt => Inject::Corrupt,
        }),
    };
    let mut out = std::io::stdout();
    if !demo.json {
        writeln!(
            out,
            "guest ring (blkif, 128 slots) -> QCOW2 -> NVMe driver -> NVMe model on {}",
            scratch.path().display()
        )?;
        match (cores[0], cores[1]) {
            (Some(a), Some(b)) if a != b => {
                writeln!(
                    out,
                    "reactor on processor {a}, policy {}; guest and device on {b}",
                    options.policy.as_str()
                )?;
            }
            _ => writeln!(out, "one processor for all: this will be slow")?,
        }
    }
    let mut say = |line: &str| {
        if !demo.json {
            // What matters is printed at the end, and then a failure counts.
            let _ = writeln!(std::io::stdout(), "  {line}");
        }
    };
    let report = ::bench::demo::run(&options, &mut say)?;
    if demo.json {
        writeln!(out, "{}", serde_json::to_string(&report)?).context(STDOUT)?;
    } else {
        print(&mut out, &report).context(STDOUT)?;
    }
    Ok(u8::from(!report.verified))
}

fn print(out: &mut impl Write, r: &Report) -> std::io::Result<()> {
    writeln!(out)?;
    writeln!(
        out,
        "{:<18} {:>5} {:>10} {:>9} {:>9} {:>9}   per request on the reactor",
        "4 KiB", "depth", "IOPS", "p50 us", "p99 us", "p99.9 us"
    )?;
    for p in &r.phases {
        let us = |ns: u64| ns as f64 / 1000.0;
        let q = &p.per_request;
        let calls = q.syscalls.map_or("?".to_owned(), count);
        writeln!(
            out,
            "{:<18} {:>5} {:>10.0} {:>9.1} {:>9.1} {:>9.1}   {} syscalls, {} allocations, {} locks, {:.3} notifications",
            p.name,
            p.depth,
            p.iops,
            us(p.latency_ns.p50),
            us(p.latency_ns.p99),
            us(p.latency_ns.p999),
            calls,
            count(q.allocations),
            count(q.locks),
            q.notifications
        )?;
    }
    writeln!(out)?;
    if let Some(n) = r.fill_writes_per_write {
        writeln!(out, "filling the empty image took {n:.3} device writes per guest write")?;
    }
    if let Some(with) = r.compared_with {
        writeln!(out, "the image's own contents were compared with {with}")?;
    }
    writeln!(
        out,
        "{} MiB written, {} MiB read back and compared, {} MiB of that after closing and opening again",
        r.written_bytes >> 20,
        r.verified_bytes >> 20,
        r.reread_bytes >> 20
    )?;
    match &r.failure {
        None => writeln!(out, "verified: every byte is right, and the image checks clean"),
        Some(why) => writeln!(out, "NOT VERIFIED: {why}"),
    }
}

/// A count per request: 0 is exactly 0.
fn count(n: f64) -> String {
    if n == 0.0 { "0".to_owned() } else { format!("{n:.4}") }
}
