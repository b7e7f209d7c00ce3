//! `polldisk bench reactors`.

use std::io::Write;

use ::bench::several::several;
use anyhow::{Context, bail};
use clap::Args;

use crate::output::STDOUT;

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

pub(super) fn reactors(r: &Reactors) -> anyhow::Result<u8> {
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
