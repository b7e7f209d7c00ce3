//! `polldisk image resize`.

use anyhow::{Context, bail};
use block::Storage;
use clap::Args;
use node::{NodeSpec, open_chain};
use qcow::ChainReader;
use qcow::open::Format;
use serde::Serialize;

use super::print::{self, Output};
use super::{Backing, close, editing, usage};

/// Change the size of the disk. What is added reads as zeroes.
#[derive(Args)]
pub(crate) struct Resize {
    /// The image's format: qcow2 or raw.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::format)]
    format: Format,
    /// The size may become smaller; what is cut off is lost.
    #[arg(long)]
    shrink: bool,
    /// What is laid out in advance; only off is possible.
    #[arg(long, value_name = "MODE", value_parser = ["off"])]
    preallocation: Option<String>,
    /// Print nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    backing: Backing,
    #[command(flatten)]
    output: Output,
    /// The image.
    #[arg(value_name = "IMAGE", value_parser = super::node)]
    image: NodeSpec,
    /// The new size, as in 10G; +10G and -10G count from the old one.
    #[arg(value_name = "[+|-]SIZE", allow_hyphen_values = true, value_parser = change)]
    size: Change,
}

/// A size as it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    To(u64),
    Grow(u64),
    Shrink(u64),
}

fn change(text: &str) -> Result<Change, String> {
    let mut rest = text.chars();
    match rest.next() {
        Some('+') => super::size(rest.as_str()).map(Change::Grow),
        Some('-') => super::size(rest.as_str()).map(Change::Shrink),
        _ => super::size(text).map(Change::To),
    }
}

impl Change {
    fn of(self, old: u64) -> Option<u64> {
        match self {
            Change::To(size) => Some(size),
            Change::Grow(by) => old.checked_add(by),
            Change::Shrink(by) => old.checked_sub(by).filter(|&n| n > 0),
        }
        .filter(|&n| i64::try_from(n).is_ok())
    }
}

/// What was done.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Done {
    filename: String,
    format: &'static str,
    old_virtual_size: u64,
    virtual_size: u64,
}

/// Resizes.
pub(crate) fn run(args: &Resize) -> anyhow::Result<()> {
    super::refuse_special(&args.image)?;
    let name = args.image.to_string();
    let chain = open_chain(&args.image, &editing(args.format, &args.backing, 0))?;
    let mut reader = ChainReader::new(chain);
    let old = reader.size();
    let Some(size) = args.size.of(old) else {
        return usage(format!(
            "{name}: has {old} bytes, and cannot get the size that is asked for"
        ));
    };
    if size < old && !args.shrink {
        bail!("{name}: would lose what is behind {size} of its {old} bytes; say --shrink for that");
    }
    match args.format {
        Format::Qcow2 => {
            qcow::edit::resize(&mut reader, size)?;
            close(reader)?;
        }
        Format::Raw => {
            let layer = reader.into_chain().layers.swap_remove(0);
            let mut storage = layer.storage;
            storage.set_len(size).with_context(|| name.clone())?;
            if storage.len() != size {
                bail!("{name}: has {} bytes, which cannot be changed", storage.len());
            }
            storage.flush().with_context(|| name.clone())?;
            storage.close()?;
        }
    }
    let format = args.format.name();
    let done = Done { filename: name, format, old_virtual_size: old, virtual_size: size };
    if args.output.is_json() {
        print::json(&done)
    } else if args.quiet {
        Ok(())
    } else {
        print::line("Image resized.")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_count_from_the_old_one() {
        for (text, old, new) in [
            ("1M", 5, Some(1 << 20)),
            ("+1k", 512, Some(1536)),
            ("-512", 1024, Some(512)),
            ("-512", 512, None),
            ("-1k", 512, None),
            ("+1", i64::MAX as u64, None),
        ] {
            assert_eq!(change(text).unwrap().of(old), new, "{text} of {old}");
        }
        for text in ["", "+", "-", "--1", "+-1", "x", "1x", "+9999999P"] {
            assert!(change(text).is_err(), "{text}");
        }
    }
}
