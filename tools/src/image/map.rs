//! `polldisk image map`.

use std::io::Write;

use anyhow::Context;
use clap::Args;
use node::NodeSpec;
use qcow::extents::Extent;

use super::Backing;
use super::print::{self, Output, STDOUT};
use super::reader::Reader;
use crate::args::AnyFormat;

/// List which parts of the disk are data, zeroes or nothing, and where they are.
#[derive(Args)]
pub(crate) struct Map {
    /// The image's format: qcow2, raw or vhd.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::any_format)]
    format: AnyFormat,
    /// Where to begin.
    #[arg(short, long, value_name = "OFFSET", default_value = "0", value_parser = super::size)]
    start_offset: u64,
    /// How much of the disk to list.
    #[arg(short = 'l', long, value_name = "LENGTH", value_parser = super::size)]
    max_length: Option<u64>,
    /// Open the image even if somebody else writes to it.
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    backing: Backing,
    #[command(flatten)]
    output: Output,
    /// The image.
    #[arg(value_name = "IMAGE", value_parser = super::node)]
    image: NodeSpec,
}

/// Prints it, range by range: a map may be longer than memory.
pub(crate) fn run(args: &Map) -> anyhow::Result<()> {
    let mut reader = Reader::open_any(&args.image, args.format, &args.backing, args.force_share)?;
    let end = args.start_offset.saturating_add(args.max_length.unwrap_or(u64::MAX));
    let names = reader.names();
    let mut out = print::out();
    let json = args.output.is_json();
    let head = if json { "[" } else { "Offset          Length          Mapped to       File\n" };
    out.write_all(head.as_bytes()).context(STDOUT)?;
    let mut first = true;
    let result = walk(&mut reader, args.start_offset, end, |e| {
        if !json {
            return row(&mut out, &e, &names);
        }
        if !std::mem::take(&mut first) {
            out.write_all(b",\n")?;
        }
        serde_json::to_writer(&mut out, &e)?;
        Ok(())
    });
    if json {
        out.write_all(b"]\n").context(STDOUT)?;
    }
    out.flush().context(STDOUT)?;
    result
}

/// Calls `each` with the extents from `start` to `end`, merged.
fn walk(
    reader: &mut Reader,
    start: u64,
    end: u64,
    mut each: impl FnMut(Extent) -> std::io::Result<()>,
) -> anyhow::Result<()> {
    let mut at = start;
    let mut pending: Option<Extent> = None;
    while at < end {
        let Some(span) = reader.span(at, end - at)? else { break };
        at += span.len;
        let next = Extent::of(span);
        match &mut pending {
            Some(p) if p.continues_with(&next) => p.length += next.length,
            _ => {
                if let Some(done) = pending.replace(next) {
                    each(done).context(STDOUT)?;
                }
            }
        }
    }
    pending.map_or(Ok(()), |last| each(last).context(STDOUT))
}

fn row(out: &mut impl Write, e: &Extent, names: &[String]) -> std::io::Result<()> {
    if !e.data {
        return Ok(());
    }
    let place = e.offset.map_or("compressed".to_owned(), hex);
    let name = &names[e.depth];
    writeln!(out, "{:<16}{:<16}{place:<16}{name}", hex(e.start), hex(e.length))
}

/// As C's %#x: no prefix for 0.
fn hex(n: u64) -> String {
    if n == 0 { "0".to_owned() } else { format!("{n:#x}") }
}
