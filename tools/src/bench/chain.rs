//! `polldisk bench chain`.

use std::io::Write;
use std::path::PathBuf;

use ::bench::chain::{RATE_GOAL, STALL_GOAL_MS};
use anyhow::{Context, bail};
use clap::Args;

use super::folder;
use crate::output::STDOUT;

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

pub(super) fn chain(c: &Chain) -> anyhow::Result<u8> {
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
