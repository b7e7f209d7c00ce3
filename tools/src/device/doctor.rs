//! `polldisk device doctor`: whether this host can drive NVMe devices, and how well; each finding
//! with what mends it. Changes nothing.

mod cpu;
mod iommu;
mod memory;
#[cfg(test)]
mod tests;

use std::io::Write;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::host::Host;
use crate::image::print::{self, Output, STDOUT};

/// Tell whether this host is ready to drive NVMe devices, and what would mend it.
#[derive(Args)]
pub(crate) struct Doctor {
    #[command(flatten)]
    output: Output,
}

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// It works, but slower or less safely than it could, or after one more command.
    Warning,
    /// It makes `vfio:` nodes impossible.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    text: String,
    /// The command or setting that mends it.
    mend: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, text: impl Into<String>) -> Finding {
        Finding { check, level: Level::Ok, text: text.into(), mend: None }
    }

    fn warning(check: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding { check, level: Level::Warning, text: text.into(), mend: Some(mend.into()) }
    }

    fn problem(check: &'static str, text: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding { check, level: Level::Problem, text: text.into(), mend: Some(mend.into()) }
    }
}

#[derive(Serialize)]
struct Report {
    /// Whether `vfio:` nodes can work here.
    possible: bool,
    findings: Vec<Finding>,
}

/// Looks; exit code 1 if something makes `vfio:` nodes impossible.
pub(crate) fn run(host: &Host, args: &Doctor) -> anyhow::Result<u8> {
    let report = look(host);
    if args.output.is_json() {
        print::json(&report)?;
    } else {
        let mut out = print::out();
        text(&mut out, &report).and_then(|()| out.flush()).context(STDOUT)?;
    }
    Ok(u8::from(!report.possible))
}

fn look(host: &Host) -> Report {
    let mut findings = Vec::new();
    iommu::look(host, &mut findings);
    memory::look(host, &mut findings);
    cpu::look(host, &mut findings);
    let possible = !findings.iter().any(|f| f.level == Level::Problem);
    Report { possible, findings }
}

fn text(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    for f in &report.findings {
        let mark = match f.level {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Problem => "PROBLEM",
        };
        writeln!(out, "{mark:<8} {}: {}", f.check, f.text)?;
        if let Some(mend) = &f.mend {
            writeln!(out, "{:<8} -> {mend}", "")?;
        }
    }
    let verdict = if report.possible { "can" } else { "cannot" };
    writeln!(out, "NVMe devices {verdict} be driven here (vfio: nodes)")
}
