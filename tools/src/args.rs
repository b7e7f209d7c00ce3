//! Options that several commands share.

use anyhow::bail;
use clap::Args;
use qcow::open::Format;
use reactor::Policy;

/// Where and how reactors run.
#[derive(Args)]
pub(crate) struct Reactor {
    /// Processors to run on, e.g. 2,3. nbd: a reactor on each. demo and bench run: the reactor, if there
    /// is one, then guest and device.
    #[arg(long, value_delimiter = ',')]
    cores: Vec<usize>,
    /// What a reactor does when idle: poll (never sleeps) or adaptive.
    #[arg(long, value_parser = |s: &str| s.parse::<Policy>())]
    pub(crate) policy: Option<Policy>,
    /// Memory for an image's map, in bytes; suffixes as in 64M.
    #[arg(long, default_value = "128M", value_parser = |s: &str| {
        node::parse_size(s).ok_or("a size like 128M is needed")
    })]
    pub(crate) l2_cache: u64,
}

impl Reactor {
    /// Processors as given.
    pub(crate) fn named(&self) -> &[usize] {
        &self.cores
    }

    /// Processors for `count` threads: as given, else the first ones that are online; the last one
    /// again where there are too few.
    pub(crate) fn cores(&self, count: usize) -> anyhow::Result<Vec<Option<usize>>> {
        let online = reactor::online_cpus().map_err(anyhow::Error::msg)?;
        if let Some(c) = self.cores.iter().find(|c| !online.contains(c)) {
            bail!("processor {c} is not online; online are {online:?}");
        }
        let from = if self.cores.is_empty() { &online } else { &self.cores };
        Ok((0..count).map(|i| from.get(i).or(from.last()).copied()).collect())
    }

    /// Processors for reactors that serve together: those of `--cores`, else one for the scheduler
    /// to choose.
    pub(crate) fn each_core(&self) -> anyhow::Result<Vec<Option<usize>>> {
        let again = |&(i, c): &(usize, &usize)| self.cores[..i].contains(c);
        if let Some((_, c)) = self.cores.iter().enumerate().find(again) {
            bail!("processor {c} is named twice");
        }
        if self.cores.is_empty() { Ok(vec![None]) } else { self.cores(self.cores.len()) }
    }
}

/// A format of images. Of these only QCOW2 and raw images stand in backing chains ([`Format`]); VHD
/// files have parents of their own kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AnyFormat {
    /// QCOW2.
    Qcow2,
    /// Bytes as they are.
    Raw,
    /// VHD, which QEMU calls vpc.
    Vhd,
}

impl AnyFormat {
    /// The name that is printed.
    pub(crate) fn name(self) -> &'static str {
        match self.chained() {
            Some(format) => format.name(),
            None => "vhd",
        }
    }

    /// As a format of backing chains; `None` for VHD.
    pub(crate) fn chained(self) -> Option<Format> {
        match self {
            AnyFormat::Qcow2 => Some(Format::Qcow2),
            AnyFormat::Raw => Some(Format::Raw),
            AnyFormat::Vhd => None,
        }
    }
}

/// Parses the name of an image format.
pub(crate) fn any_format(text: &str) -> Result<AnyFormat, String> {
    match text {
        "qcow2" => Ok(AnyFormat::Qcow2),
        "raw" => Ok(AnyFormat::Raw),
        "vhd" | "vpc" => Ok(AnyFormat::Vhd),
        _ => Err(format!("unknown format {text:?}; there are qcow2, raw and vhd")),
    }
}

/// Parses the name of a format that can stand in a backing chain, or be changed.
pub(crate) fn format(text: &str) -> Result<Format, String> {
    Format::from_name(text).ok_or_else(|| match text {
        "vhd" | "vpc" => "not done with vhd images: convert it to qcow2 first".to_owned(),
        _ => format!("unknown format {text:?}; there are qcow2 and raw"),
    })
}
