//! What the commands print: JSON, sizes for people, progress.

use std::io::{BufWriter, StdoutLock, Write};

use anyhow::Context;
use clap::{Args, ValueEnum};
use reactor::Clock;
use serde::Serialize;

/// How results are printed.
#[derive(Args)]
pub(crate) struct Output {
    /// Print JSON, as --output=json.
    #[arg(long)]
    json: bool,
    /// Form of the output.
    #[arg(long, value_name = "FORM", value_enum, default_value = "human")]
    output: Form,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Form {
    Human,
    Json,
}

impl Output {
    /// Whether JSON is wanted.
    pub(crate) fn is_json(&self) -> bool {
        self.json || self.output == Form::Json
    }
}

/// Standard output, buffered. `println!` would panic when the reader is gone.
pub(crate) fn out() -> BufWriter<StdoutLock<'static>> {
    BufWriter::new(std::io::stdout().lock())
}

pub(crate) use crate::output::STDOUT;

/// Prints a value as JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = out();
    serde_json::to_writer_pretty(&mut out, value).context(STDOUT)?;
    writeln!(out).context(STDOUT)?;
    out.flush().context(STDOUT)
}

/// Prints a line.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    let mut out = out();
    writeln!(out, "{text}").context(STDOUT)?;
    out.flush().context(STDOUT)
}

/// A number of bytes for people, as qemu-img writes it: three digits and a binary unit.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // A unit begins at 1000 of the smaller one, so that three digits are enough.
    let mut unit = 0;
    let mut value = n as f64;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = match value {
        v if v < 1.0 && v > 0.0 => 3,
        v if v < 10.0 => 2,
        v if v < 100.0 => 1,
        _ => 0,
    };
    let mut digits = format!("{value:.decimals$}");
    if digits.contains('.') {
        digits.truncate(digits.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{digits} {}B", UNITS[unit])
}

/// Nanoseconds between two lines of progress.
const STEP: u64 = 100_000_000;

/// Progress on standard error, if it is wanted.
pub(crate) struct Progress {
    total: u64,
    next: u64,
    clock: Option<Clock>,
}

impl Progress {
    /// For work of `total` bytes.
    pub(crate) fn new(wanted: bool, total: u64) -> Progress {
        let mut progress = Progress { total, next: 0, clock: wanted.then(Clock::real) };
        progress.at(0);
        progress
    }

    /// So much is done.
    pub(crate) fn at(&mut self, done: u64) {
        let Some(clock) = &self.clock else { return };
        let now = clock.now();
        if now < self.next {
            return;
        }
        self.next = now + STEP;
        self.show(done);
    }

    fn show(&self, done: u64) {
        let percent = if self.total == 0 { 100.0 } else { done as f64 * 100.0 / self.total as f64 };
        // Nobody can be told that standard error is gone.
        let _ = write!(std::io::stderr(), "    ({percent:.2}/100%)\r");
    }

    /// All is done.
    pub(crate) fn finish(self) {
        if self.clock.is_some() {
            self.show(self.total);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.clock.is_some() {
            let _ = writeln!(std::io::stderr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_as_qemu_img_writes_them() {
        for (n, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (197_120, "192 KiB"),
            (200_704, "196 KiB"),
            (1_000_448, "977 KiB"),
            (1_500_000_000, "1.4 GiB"),
            (11 << 20, "11 MiB"),
            (64 << 30, "64 GiB"),
            ((1 << 40) + (1 << 39), "1.5 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }
}
