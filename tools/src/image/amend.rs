//! `polldisk image amend`.

use clap::Args;
use node::NodeSpec;
use qcow::edit;
use qcow::open::Format;

use super::fresh::{self, Pairs};
use super::{only_qcow2, open_for_change, usage};

/// Change options of an image: compat=1.1, lazy_refcounts=on|off, data_file=NAME and
/// data_file_raw=off.
#[derive(Args)]
pub(crate) struct Amend {
    /// The image's format: qcow2.
    #[arg(short, long, default_value = "qcow2", value_parser = crate::args::format)]
    format: Format,
    /// What to change, as in compat=1.1,lazy_refcounts=on (may be given several times).
    #[arg(short, value_name = "OPTIONS", value_parser = fresh::pairs, required = true)]
    options: Vec<Pairs>,
    /// Print nothing but errors (nothing else is printed anyway).
    #[arg(short, long)]
    quiet: bool,
    /// The image.
    #[arg(value_name = "IMAGE", value_parser = super::node)]
    image: NodeSpec,
}

/// Changes them.
pub(crate) fn run(args: &Amend) -> anyhow::Result<()> {
    only_qcow2(args.format)?;
    let mut change = edit::Amend::default();
    for (name, value) in args.options.iter().flatten() {
        match (name.as_str(), value.as_str()) {
            ("compat", "0.10" | "v2") => change.version = Some(2),
            ("compat", "1.1" | "v3") => change.version = Some(3),
            ("lazy_refcounts", "on") => change.lazy_refcounts = Some(true),
            ("lazy_refcounts", "off") => change.lazy_refcounts = Some(false),
            ("data_file", _) if !value.is_empty() => change.data_file = Some(value.clone()),
            ("data_file_raw", "on") => change.data_file_raw = Some(true),
            ("data_file_raw", "off") => change.data_file_raw = Some(false),
            _ => {
                return usage(format!(
                    "option {name}={value}: compat=1.1, lazy_refcounts=on|off, data_file=NAME and \
                     data_file_raw=off can be changed"
                ));
            }
        }
    }
    let mut source = open_for_change(&args.image)?;
    edit::amend(&mut source, &args.image.to_string(), &change)?;
    Ok(source.close()?)
}
