//! `cargo xtask`: the repository's own commands: the test command, the house checks, and the lab
//! that feeds real input to a built `polldisk`.
//!
//! Runs on one thread of an ordinary process, on a developer's machine or in CI. Nothing here is
//! part of the product, and no other crate imports it.
#![forbid(unsafe_code)]

mod cmd;
mod dist;
mod fuzz;
mod gates;
mod lab;
mod layers;
mod lexer;
mod matrix;
mod page;
mod perf;
mod qemu;
mod real_input;
mod simulate;
mod suite;
mod tidy;
mod tools;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The commands of the repository.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// The test command: unit and integration tests, house checks, then real input.
    Test(suite::Args),
    /// Real images, clients and a Linux kernel against `polldisk nbd`.
    RealInput(real_input::Args),
    /// Images on simulated disks, with faults and power cuts, from seeds.
    Simulate(simulate::Args),
    /// Images of all kinds, written by QEMU and by polldisk in turns.
    Matrix(matrix::Args),
    /// Feeds mutated input to everything that reads an image.
    Fuzz(fuzz::Args),
    /// Boots a machine with emulated hardware and drives that with `polldisk`.
    #[command(subcommand)]
    Lab(lab::Lab),
    /// The report of a comparison in a real browser: light, dark, on a phone, printed.
    Page(page::Args),
    /// The counts that a change may not raise, measured on the release binary.
    Gates,
    /// What requests cost in instructions, beside the table in the repository or another revision.
    Perf(perf::Args),
    /// Make a tarball, a .deb and an .rpm.
    Dist(dist::Args),
    /// Check the direction of imports between our crates.
    Layers,
    /// Check the house rules that no compiler lint knows.
    Tidy,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Task::Test(args) => suite::run(&args),
        Task::RealInput(args) => real_input::command(&args),
        Task::Simulate(args) => simulate::command(&args),
        Task::Matrix(args) => matrix::command(&args),
        Task::Fuzz(args) => fuzz::command(&args),
        Task::Lab(lab) => lab::command(&lab),
        Task::Page(args) => page::command(&args),
        Task::Gates => gates::command(),
        Task::Perf(args) => perf::command(&args),
        Task::Dist(args) => dist::command(&args),
        Task::Layers => layers::command(),
        Task::Tidy => tidy::command(),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The repository's root folder.
fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.ancestors().nth(2).unwrap_or(Path::new(".")).to_path_buf()
}

/// The folder for what is fetched or made once and used again. Git ignores it.
fn cache() -> PathBuf {
    root().join(".cache")
}

/// Whether this is a CI run, where a skipped part is a failure.
fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true")
}
