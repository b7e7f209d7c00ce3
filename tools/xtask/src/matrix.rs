//! `cargo xtask matrix`: images of all kinds, written by QEMU and by polldisk in turns (the test
//! `matrix` of the crate `polldisk`). It is built as the tests are, so that it costs no build of its
//! own.

use std::time::Duration;

use anyhow::Result;

use crate::cmd::say;
use crate::simulate::seed_of_commit;
use crate::suite::{Tally, cargo, counted_within};
use crate::tools::{self, Missing};

/// The whole matrix, on a machine that others use too, may take so long.
const LIMIT: Duration = Duration::from_secs(90 * 60);

/// What the command can be told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only so many images, which cover as many pairs of properties as they can.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    images: Option<u64>,
    /// What decides which they are, and what happens to them. If it is not given the last commit
    /// does.
    #[arg(long)]
    seed: Option<u64>,
    /// Begin no further image after so many seconds.
    #[arg(long)]
    seconds: Option<u64>,
}

/// The command; false when an image failed.
pub(crate) fn command(args: &Args) -> Result<bool> {
    Ok(run(args)?.good())
}

/// The step of the test command: bounded, also on a machine that is busy.
pub(crate) fn step() -> Result<Tally> {
    run(&Args { images: Some(50), seed: None, seconds: Some(45) })
}

fn run(args: &Args) -> Result<Tally> {
    match tools::need(&["qemu-img", "qemu-io"]) {
        Err(error) if error.is::<Missing>() => {
            println!("skipped: matrix: {error}");
            return Ok(Tally { skipped: 1, ..Tally::default() });
        }
        done => done?,
    }
    let seed = args.seed.unwrap_or_else(seed_of_commit);
    let images = args.images.map_or("all".to_owned(), |n| n.to_string());
    say(&format!("matrix: {images} images from seed {seed}"));
    let mut command = cargo();
    command.args(["test", "--quiet", "--package", "polldisk", "--test", "matrix", "--"]);
    command.args(["images", "--exact", "--nocapture"]);
    command.env("MATRIX_IMAGES", images).env("MATRIX_SEED", seed.to_string());
    if let Some(seconds) = args.seconds {
        command.env("MATRIX_SECONDS", seconds.to_string());
    }
    counted_within(command, LIMIT)
}
