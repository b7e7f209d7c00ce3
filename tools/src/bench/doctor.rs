//! `polldisk bench doctor`: whether this host is fit for figures that others shall believe.

use std::io::Write;
use std::path::PathBuf;

use ::compare::doctor::{Options, Report, State, look};
use ::compare::peer::folders;
use anyhow::Context;
use clap::Args;
use node::HostFiles;

use crate::output::STDOUT;

/// Tell what on this host makes figures worse, or hard to repeat, and what would mend it. Changes
/// nothing. Exit code 1 if there is a warning.
#[derive(Args)]
pub(crate) struct Doctor {
    /// The folder for images; the system's, for what is temporary, if not said.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Looks; exit code 1 if there is a warning.
pub(super) fn doctor(d: &Doctor) -> anyhow::Result<u8> {
    let scratch = d.scratch.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = scratch.canonicalize().with_context(|| format!("{}", scratch.display()))?;
    let report = look(&HostFiles::below("/"), &Options { scratch, programs: folders() });
    let mut out = std::io::stdout();
    if d.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?).context(STDOUT)?;
    } else {
        text(&mut out, &report).context(STDOUT)?;
    }
    Ok(u8::from(!report.ready))
}

fn text(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    for c in &report.checks {
        let mark = match c.state {
            State::Ok => "ok",
            State::Warn => "WARN",
            State::Unknown => "unknown",
        };
        writeln!(out, "{mark:<8} {}: {}", c.name, c.found)?;
        if let Some(advice) = &c.advice {
            writeln!(out, "{:<8} why: {}", "", c.why)?;
            writeln!(out, "{:<8} do:  {advice}", "")?;
        }
    }
    let count = |state| report.checks.iter().filter(|c| c.state == state).count();
    writeln!(
        out,
        "{} ok, {} warnings, {} unknown; report all of it with the figures",
        count(State::Ok),
        count(State::Warn),
        count(State::Unknown)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_is_printed_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { scratch: "/".into(), programs: Vec::new() };
        let report = look(&HostFiles::below(dir.path()), &options);
        let mut out = Vec::new();
        text(&mut out, &report).unwrap();
        let out = String::from_utf8(out).unwrap();
        for check in &report.checks {
            assert!(out.contains(&format!(" {}: {}\n", check.name, check.found)), "{check:?}");
            let advice = check.advice.as_deref().map(|a| format!("do:  {a}\n"));
            assert!(advice.is_none_or(|a| out.contains(&a)), "{check:?}");
        }
        assert!(out.contains("WARN     isolated-cores") && out.contains("unknown  turbo"), "{out}");
        assert!(out.ends_with("report all of it with the figures\n"));
    }
}
