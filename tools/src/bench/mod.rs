//! `polldisk bench …`: measurements that anybody can rerun.

mod chain;
mod compare;
mod device;
mod doctor;
mod fresh;
mod full;
mod path;
mod reactors;
mod report;
mod run;

use anyhow::Context;
use clap::Subcommand;

/// The commands.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Load a guest's ring, an NBD server or a block node, as fio does.
    Run(Box<run::Run>),
    /// What a request costs on its path, layer by layer, in instructions (needs valgrind).
    Path(path::Path),
    /// What a device gives, and what driving it costs: 4 KiB at random, without an image.
    Device(device::Device),
    /// How long a snapshot keeps a guest waiting, and how fast streams and commits are.
    Chain(chain::Chain),
    /// Random writes into an empty image, beside QEMU's server of images (needs QEMU).
    Fresh(fresh::Fresh),
    /// An image of 1 TiB, all allocated: reads for its translation, memory, its check.
    Full(full::Full),
    /// How many reads of one image that hit one reactor serves, and two at once.
    Reactors(reactors::Reactors),
    /// polldisk beside its peers, under the same load (uses those that are here).
    Compare(compare::Compare),
    /// Make the page of a comparison anew, from results that were kept as JSON.
    Report(report::Report),
    /// Tell whether this host is fit for measuring, and what would mend it.
    Doctor(doctor::Doctor),
    /// Runs one scenario once; what `path` runs under valgrind.
    #[command(hide = true)]
    PathWorker(path::Worker),
}

/// Runs a measurement.
pub(crate) fn run(command: &Bench) -> anyhow::Result<u8> {
    match command {
        Bench::Run(r) => run::run(r),
        Bench::Path(p) => path::path(p),
        Bench::Device(d) => device::device(d),
        Bench::Chain(c) => chain::chain(c),
        Bench::Fresh(f) => fresh::fresh(f),
        Bench::Full(f) => full::full(f),
        Bench::Reactors(r) => reactors::reactors(r),
        Bench::Compare(c) => compare::run(c),
        Bench::Report(r) => report::report(r),
        Bench::Doctor(d) => doctor::doctor(d),
        Bench::PathWorker(w) => path::worker(w),
    }
}

/// A scratch folder.
fn folder(within: Option<&std::path::Path>) -> anyhow::Result<tempfile::TempDir> {
    let dir = match within {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    dir.context("cannot make a scratch folder")
}
