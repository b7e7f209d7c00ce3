//! `polldisk image compare`.

use clap::Args;
use node::NodeSpec;
use qcow::extents::Extent;
use serde::Serialize;

use super::Backing;
use super::print::{self, Output, Progress};
use super::reader::Reader;
use crate::args::AnyFormat;

/// Bytes read at a time from each image.
const PIECE: usize = 1 << 20;
/// The comparison itself failed.
const FAILED: u8 = 2;

/// Compare what two images hold. Exit codes: 0 same, 1 different, 2 failed.
#[derive(Args)]
pub(crate) struct Compare {
    /// The first image's format: qcow2, raw or vhd.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::any_format)]
    format: AnyFormat,
    /// The second image's format.
    #[arg(short = 'F', long, value_name = "FORMAT", default_value = "qcow2",
          value_parser = crate::args::any_format)]
    second_format: AnyFormat,
    /// Sizes and what is allocated must be the same, too.
    #[arg(short, long)]
    strict: bool,
    /// Print nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    /// Show progress on standard error.
    #[arg(short, long)]
    progress: bool,
    /// Open the images even if somebody else writes to them.
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    backing: Backing,
    #[command(flatten)]
    output: Output,
    /// The first image.
    #[arg(value_name = "IMAGE1", value_parser = super::node)]
    first: NodeSpec,
    /// The second image.
    #[arg(value_name = "IMAGE2", value_parser = super::node)]
    second: NodeSpec,
}

/// How it ended.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Outcome {
    identical: bool,
    virtual_sizes: [u64; 2],
    /// "content", "size" or "allocation"; the last two only in strict mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<&'static str>,
    /// Where the difference begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

/// Compares; returns the exit code.
pub(crate) fn run(args: &Compare) -> anyhow::Result<u8> {
    compare(args).or_else(|e| {
        tell!("polldisk: {}", crate::output::explain(&e));
        Ok(FAILED)
    })
}

fn compare(args: &Compare) -> anyhow::Result<u8> {
    let open = |spec, format| Reader::open_any(spec, format, &args.backing, args.force_share);
    let mut first = open(&args.first, args.format)?;
    let mut second = open(&args.second, args.second_format)?;
    let sizes = [first.size(), second.size()];
    let found = if args.strict && sizes[0] != sizes[1] {
        Some(("size", None))
    } else {
        find(&mut first, &mut second, args)?.map(|(what, at)| (what, Some(at)))
    };
    let outcome = Outcome {
        identical: found.is_none(),
        virtual_sizes: sizes,
        difference: found.map(|f| f.0),
        offset: found.and_then(|f| f.1),
    };
    if args.output.is_json() {
        print::json(&outcome)?;
    } else if !args.quiet {
        if sizes[0] != sizes[1] && !args.strict {
            print::line(&format!(
                "Warning: Image size mismatch! ({} and {} bytes)",
                sizes[0], sizes[1]
            ))?;
        }
        print::line(&match found {
            None => "Images are identical.".to_owned(),
            Some(("content", Some(at))) => format!("Content mismatch at offset {at}!"),
            Some((_, Some(at))) => format!("Strict mode: Offset {at} block status mismatch!"),
            Some((_, None)) => {
                format!("Strict mode: Image size mismatch! ({} and {} bytes)", sizes[0], sizes[1])
            }
        })?;
    }
    Ok(u8::from(found.is_some()))
}

/// The first difference: what it is and where. Where one image has ended, the other must be zero.
fn find(
    first: &mut Reader,
    second: &mut Reader,
    args: &Compare,
) -> anyhow::Result<Option<(&'static str, u64)>> {
    let size = first.size().max(second.size());
    let mut progress = Progress::new(args.progress, size);
    let (mut a, mut b) = (vec![0; PIECE], vec![0; PIECE]);
    let mut at = 0;
    while at < size {
        let (x, y) = (first.span(at, size - at)?, second.span(at, size - at)?);
        let len = [x, y].iter().flatten().map(|s| s.len).min().unwrap_or(size - at);
        let (x, y) = (x.map(Extent::of), y.map(Extent::of));
        if args.strict && x.map(status) != y.map(status) {
            return Ok(Some(("allocation", at)));
        }
        let zero = |e: Option<Extent>| e.is_none_or(|e| e.zero);
        if zero(x) && zero(y) {
            at += len;
            progress.at(at);
            continue;
        }
        let end = at + len;
        while at < end {
            let n = (end - at).min(PIECE as u64) as usize;
            first.read_at(at, &mut a[..n])?;
            second.read_at(at, &mut b[..n])?;
            if a[..n] != b[..n] {
                let same = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
                return Ok(Some(("content", at + same as u64)));
            }
            at += n as u64;
            progress.at(at);
        }
    }
    progress.finish();
    Ok(None)
}

/// What strict mode compares: where the data lies does not count.
fn status(e: Extent) -> (bool, bool, bool, bool) {
    (e.present, e.zero, e.data, e.compressed)
}
