//! `polldisk image …`.

use clap::Subcommand;

/// The commands.
#[derive(Subcommand)]
pub(crate) enum Command {}

/// Runs one; returns the exit code.
pub(crate) fn run(command: Command) -> anyhow::Result<u8> {
    match command {}
}
