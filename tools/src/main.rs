//! `polldisk`: the one binary. Parses the command line and hands over to the command's module.

#![forbid(unsafe_code)]
// They panic when the other end of the pipe is gone.
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
mod output;

mod args;
mod bench;
mod ctl;
mod demo;
mod describe;
mod device;
mod image;
mod model;
mod nbd;
mod serve;
mod signals;
mod smapiv3;
mod top;
mod volume;

use clap::{Parser, Subcommand};

// Counts what each thread takes, for the figures of `demo` and `bench`: one addition a call.
#[global_allocator]
static ALLOCATOR: ::bench::CountingAllocator = ::bench::CountingAllocator;

/// The fastest way from a Xen guest's disk ring to an NVMe drive.
#[derive(Parser)]
#[command(name = "polldisk", version, disable_help_subcommand = true)]
struct Cli {
    /// Print what is done; twice for more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Drive vfio: devices that no IOMMU keeps from memory: one that misbehaves can write anywhere.
    #[arg(long, global = true)]
    unsafe_noiommu: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a guest ring from a QCOW2 image through the NVMe driver, every byte verified.
    Demo(demo::Demo),
    /// Serve one image over NBD on a unix socket.
    Nbd(nbd::Nbd),
    /// Serve the disks of Xen guests, and images that are attached.
    Serve(serve::Serve),
    /// Change the image of a running server: snapshots, commits, streams, its size.
    Ctl(ctl::Ctl),
    /// Show what the daemon's reactors and disks are doing.
    Top(top::Top),
    /// The plugins by which the toolstack (xapi) uses repositories of type fast.
    #[command(subcommand)]
    Smapiv3(smapiv3::Command),
    /// Serve an NVMe controller model to another process, over vfio-user.
    Model(model::Model),
    /// Measurements.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// NVMe devices: list, bind, unbind, identify, health, format; and the host's readiness: doctor.
    #[command(subcommand)]
    Device(device::Command),
    /// Images: info, check, create, map, convert, compare.
    #[command(subcommand)]
    Image(image::Command),
    /// Volume groups of LVM2: create-group, list, create, remove, extend, rename, check.
    #[command(subcommand)]
    Volume(volume::Command),
    /// Print what completes this command line in a shell: bash, zsh, fish and others.
    Completions(describe::Completions),
    /// Write the manual pages into a folder.
    Man(describe::Man),
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    output::init_log(cli.verbose);
    signals::outlive_file_limit();
    if cli.unsafe_noiommu {
        node::use_unsafe_noiommu();
    }
    let result = match cli.command {
        Command::Demo(demo) => demo::run(&demo),
        Command::Nbd(nbd) => nbd::run(&nbd),
        Command::Serve(serve) => serve::run(&serve, cli.unsafe_noiommu),
        Command::Ctl(ctl) => ctl::run(&ctl),
        Command::Top(top) => top::run(&top),
        Command::Smapiv3(command) => smapiv3::run(command),
        Command::Model(model) => model::run(&model),
        Command::Bench(bench) => bench::run(&bench),
        Command::Device(command) => device::run(command),
        Command::Image(command) => image::run(command),
        Command::Volume(command) => volume::run(command),
        Command::Completions(args) => describe::completions(&args),
        Command::Man(args) => describe::man(&args),
    };
    let result = result.or_else(output::usage_code);
    match result {
        Ok(code) => std::process::ExitCode::from(code),
        Err(e) => {
            tell!("polldisk: {}", output::explain(&e));
            std::process::ExitCode::FAILURE
        }
    }
}
