//! `polldisk bench full`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;

use super::folder;
use crate::output::STDOUT;

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

pub(super) fn full(f: &Full) -> anyhow::Result<u8> {
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
