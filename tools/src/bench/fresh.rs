//! `polldisk bench fresh`.

use std::io::Write;
use std::path::PathBuf;

use ::bench::fresh::median;
use anyhow::{Context, bail};
use clap::Args;

use super::folder;
use crate::output::STDOUT;

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

pub(super) fn fresh(f: &Fresh) -> anyhow::Result<u8> {
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
