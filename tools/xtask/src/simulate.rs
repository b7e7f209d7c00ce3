//! `cargo xtask simulate`: runs the deterministic simulation (the test `simulate` of the crate `qcow`)
//! over many seeds. It is built as the tests are, so that it costs no build of its own and has its
//! assertions.

use std::process::Command;

use anyhow::Result;

use crate::cmd::say;
use crate::suite::{Tally, cargo, counted};

/// What the command can be told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many runs.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// The first run's seed; the next ones follow. If it is not given the last commit decides.
    #[arg(long)]
    seed: Option<u64>,
    /// Longer runs on larger disks.
    #[arg(long)]
    long: bool,
}

/// The command; false when a run failed.
pub(crate) fn command(args: &Args) -> Result<bool> {
    Ok(run(args)?.good())
}

/// The step of the test command.
pub(crate) fn step() -> Result<Tally> {
    run(&Args { seeds: 2000, seed: None, long: false })
}

fn run(args: &Args) -> Result<Tally> {
    let seed = args.seed.unwrap_or_else(seed_of_commit);
    say(&format!("simulate: {} runs from seed {seed}", args.seeds));
    let mut command = cargo();
    command.args(["test", "--quiet", "--package", "qcow", "--test", "simulate", "--"]);
    command.args(["seeds", "--exact", "--nocapture"]);
    command.env("SIM_SEEDS", args.seeds.to_string()).env("SIM_SEED", seed.to_string());
    if args.long {
        command.env("SIM_LONG", "1");
    }
    counted(command)
}

/// Each commit tries other seeds, and the same ones when it is tried again. 1 without Git.
pub(crate) fn seed_of_commit() -> u64 {
    let head = Command::new("git").args(["rev-parse", "HEAD"]).current_dir(crate::root()).output();
    let text = head.ok().map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    text.and_then(|t| u64::from_str_radix(t.get(..8)?, 16).ok()).unwrap_or(1)
}
