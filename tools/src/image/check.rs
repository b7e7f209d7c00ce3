//! `polldisk image check`.

use std::io::{IsTerminal, Write};

use anyhow::Context;
use block::{Storage, StorageError};
use clap::{Args, ValueEnum};
use node::{NodeSpec, OpenOptions, open_source};
use qcow::check::{Repair, Report};
use qcow::open::Format;
use reactor::Clock;

use super::print::{self, Output, STDOUT, bytes};
use super::vhd_image;
use crate::args::AnyFormat;

/// Corruption was found and is still there.
const CORRUPT: u8 = 2;
/// No corruption, but clusters that are counted and not used.
const LEAKS: u8 = 3;
/// There is nothing that could be checked, or not by this program.
const UNSUPPORTED: u8 = 63;

/// Find and repair damage. Exit codes: 0 clean, 1 failed, 2 corruption, 3 leaks, 63 not supported.
#[derive(Args)]
pub(crate) struct Check {
    /// The image's format: qcow2, raw or vhd.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::any_format)]
    format: AnyFormat,
    /// Repair leaked clusters only, or all that can be repaired.
    #[arg(short, long, value_name = "WHAT", value_enum, conflicts_with = "force_share")]
    repair: Option<What>,
    /// Print nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    /// Show progress on standard error, also if that is no terminal.
    #[arg(short, long)]
    progress: bool,
    /// Open the image even if somebody else writes to it.
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    /// The image.
    #[arg(value_name = "IMAGE", value_parser = super::node)]
    image: NodeSpec,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    Leaks,
    All,
}

/// Checks; returns the exit code.
pub(crate) fn run(args: &Check) -> anyhow::Result<u8> {
    if args.format == AnyFormat::Raw {
        tell!("polldisk: {}: a raw image holds nothing that could be checked", args.image);
        return Ok(UNSUPPORTED);
    }
    super::refuse_special(&args.image)?;
    if args.format == AnyFormat::Vhd {
        return check_vhd(args);
    }
    let options = OpenOptions {
        writable: args.repair.is_some(),
        force_share: args.force_share,
        ..OpenOptions::read(Format::Qcow2)
    };
    let mut source = open_source(&args.image, &options)?;
    let repair = match args.repair {
        None => Repair::None,
        Some(What::Leaks) => Repair::Leaks,
        Some(What::All) => Repair::All,
    };
    let name = args.image.to_string();
    let show = args.progress || std::io::stderr().is_terminal();
    let mut findings = Findings { printed: 0, more: 0 };
    let mut watched = Watched::new(&mut source, show);
    let result = qcow::check::run(&mut watched, &name, repair, &mut |line| findings.add(line));
    drop(watched);
    findings.finish();
    let report = match result {
        Ok(report) => report,
        Err(e @ qcow::Error::Unsupported { .. }) => {
            tell!("polldisk: {e}");
            return Ok(UNSUPPORTED);
        }
        Err(e) => return Err(e.into()),
    };
    source.close()?;
    if args.output.is_json() {
        print::json(&report)?;
    } else if !args.quiet {
        human(&report)?;
    }
    Ok(match report {
        Report { check_errors: 1.., .. } => 1,
        Report { corruptions: 1.., .. } => CORRUPT,
        Report { leaks: 1.., .. } => LEAKS,
        _ => 0,
    })
}

fn check_vhd(args: &Check) -> anyhow::Result<u8> {
    if args.repair.is_some() {
        tell!("polldisk: {}: vhd images are not repaired, only read", args.image);
        return Ok(UNSUPPORTED);
    }
    let mut findings = Findings { printed: 0, more: 0 };
    let result = vhd_image::check(
        &args.image,
        args.force_share,
        args.output.is_json(),
        args.quiet,
        &mut |line| findings.add(line),
    );
    findings.finish();
    Ok(if result? == 0 { 0 } else { CORRUPT })
}

fn human(r: &Report) -> anyhow::Result<()> {
    let mut out = print::out();
    let mut text = String::new();
    if r.corruptions_fixed > 0 || r.leaks_fixed > 0 {
        text += &format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
             {} corruptions\n\nThe repaired image was checked again:\n",
            r.leaks_fixed, r.corruptions_fixed
        );
    }
    if r.corruptions > 0 {
        text += &format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.\n",
            r.corruptions
        );
    }
    if r.leaks > 0 {
        text += &format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.\n",
            r.leaks
        );
    }
    if r.check_errors > 0 {
        text += &format!(
            "\n{} parts of the image could not be checked, so this is not the whole picture.\n",
            r.check_errors
        );
    }
    if r.corruptions == 0 && r.leaks == 0 && r.check_errors == 0 {
        text += "No errors were found on the image.\n";
    }
    if r.total_clusters > 0 && r.allocated_clusters > 0 {
        let of = |n: u64, all: u64| n as f64 * 100.0 / all as f64;
        text += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            r.allocated_clusters,
            r.total_clusters,
            of(r.allocated_clusters, r.total_clusters),
            of(r.fragmented_clusters, r.allocated_clusters),
            of(r.compressed_clusters, r.allocated_clusters),
        );
    }
    if r.image_end_offset > 0 {
        text += &format!("Image end offset: {}\n", r.image_end_offset);
    }
    out.write_all(text.as_bytes()).context(STDOUT)?;
    out.flush().context(STDOUT)
}

/// What was found, on standard error. A damaged image may have millions of findings, which nobody
/// reads.
struct Findings {
    printed: u32,
    more: u64,
}

impl Findings {
    const MOST: u32 = 1000;

    fn add(&mut self, line: &str) {
        if self.printed == Self::MOST {
            self.more += 1;
            return;
        }
        self.printed += 1;
        tell!("{line}");
    }

    fn finish(&self) {
        if self.more > 0 {
            tell!("… and {} more lines like these", self.more);
        }
    }
}

/// Storage that says now and then how much of it was read.
struct Watched<'s> {
    inner: &'s mut dyn Storage,
    read: u64,
    clock: Option<Clock>,
    next: u64,
}

impl<'s> Watched<'s> {
    /// Nanoseconds before the first line, and between lines.
    const STEP: u64 = 1_000_000_000;

    fn new(inner: &'s mut dyn Storage, show: bool) -> Watched<'s> {
        Watched { inner, read: 0, clock: show.then(Clock::real), next: Self::STEP }
    }

    fn look(&mut self, bytes_read: u64) {
        self.read += bytes_read;
        let Some(clock) = &self.clock else { return };
        if clock.now() >= self.next {
            self.next = clock.now() + Self::STEP;
            tell!("polldisk: checking: {} of tables read", bytes(self.read));
        }
    }
}

impl Storage for Watched<'_> {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn capacity(&self) -> u64 {
        self.inner.capacity()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.look(into.len() as u64);
        self.inner.read_at(offset, into)
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.inner.write_at(offset, from)
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.inner.write_zeroes_at(offset, len)
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        self.inner.flush()
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        self.inner.set_len(len)
    }
}
