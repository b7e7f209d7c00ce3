//! `polldisk bench device`.

use std::io::Write;

use ::bench::device::{MAX_DEPTH, Options, Report};
use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use node::{NodeSpec, OpenOptions, Parts};
use qcow::open::Format;

use crate::output::STDOUT;

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

pub(super) fn device(d: &Device) -> anyhow::Result<u8> {
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
