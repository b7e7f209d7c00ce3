//! Options that several commands share.

use anyhow::bail;
use clap::Args;
use reactor::Policy;

/// Where and how reactors run.
#[derive(Args)]
pub(crate) struct Reactor {
    /// Processors to run on, e.g. 2,3: the first is the reactor's.
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

    /// The first of `--cores`, if any were named.
    pub(crate) fn first_core(&self) -> anyhow::Result<Option<usize>> {
        Ok(if self.cores.is_empty() { None } else { self.cores(1)?[0] })
    }
}

/// Parses the name of an image format.
pub(crate) fn format(text: &str) -> Result<qcow::open::Format, String> {
    qcow::open::Format::from_name(text)
        .ok_or_else(|| format!("unknown format {text:?}; there are qcow2 and raw"))
}
