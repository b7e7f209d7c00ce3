//! `cargo xtask fuzz`: builds the fuzz targets (`tools/fuzz`) with the coverage that libFuzzer wants,
//! and runs them, each for a while. No nightly toolchain and no cargo-fuzz are needed for that: the
//! flags are in every compiler, and libFuzzer comes with its crate.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cmd::{self, say};
use crate::suite::Tally;
use crate::tools;

/// The targets, where their first inputs are, and how long an input may be.
const TARGETS: [(&str, &str, u32); 10] = [
    ("header", "qcow2", 4096),
    ("tables", "qcow2", 128 << 10),
    ("refcounts", "qcow2", 128 << 10),
    ("bitmaps", "qcow2", 128 << 10),
    ("snapshots", "qcow2", 128 << 10),
    ("compressed", "compressed", 4096),
    ("vhd", "vhd", 64 << 10),
    ("image", "image", 512),
    ("ring", "ring", 2048),
    ("group", "group", 8192),
];

/// What the compiler must add for libFuzzer: counters of edges, and hooks of comparisons.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                     -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares";

/// Seconds that one input may take.
const TIMEOUT: u32 = 10;
/// Memory that a target may take, in MiB; it also limits its own address space.
const MEMORY_MIB: u32 = 600;

/// What the command can be told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// One target; all of them if not given.
    target: Option<String>,
    /// How long each target runs.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
}

/// The command; false when something was found.
pub(crate) fn command(args: &Args) -> Result<bool> {
    Ok(run(args)?.good())
}

/// The step of the test command.
pub(crate) fn step() -> Result<Tally> {
    run(&Args { target: None, seconds: 8 })
}

fn run(args: &Args) -> Result<Tally> {
    let known = |name: &String| TARGETS.iter().any(|(known, ..)| known == name);
    if let Some(name) = args.target.as_ref().filter(|name| !known(name)) {
        let names: Vec<&str> = TARGETS.iter().map(|t| t.0).collect();
        bail!("there is no fuzz target {name:?}; there are {}", names.join(", "));
    }
    // libFuzzer is C++.
    if tools::find("c++").is_none() {
        println!("skipped: fuzz: a C++ compiler is not installed");
        return Ok(Tally { skipped: 1, ..Tally::default() });
    }
    let folder = crate::root().join("tools/fuzz");
    let built = build(&folder)?;
    let mut tally = Tally::default();
    for (name, seeds, longest) in TARGETS {
        if args.target.as_ref().is_some_and(|wanted| wanted != name) {
            continue;
        }
        let good = fuzz(&folder, &built, (name, seeds, longest), args.seconds)?;
        tally.add(&Tally { passed: u64::from(good), failed: u64::from(!good), skipped: 0 });
    }
    Ok(tally)
}

/// Builds all targets; the folder that they are in.
fn build(folder: &Path) -> Result<PathBuf> {
    say("fuzz: building the targets");
    let host = cmd::ok(Command::new("rustc").arg("-vV"))?;
    let host = host.lines().find_map(|l| l.strip_prefix("host: ")).context("rustc -vV")?;
    let target = crate::suite::target_folder()?.join("fuzz");
    // With --target the flags are not for build scripts.
    let mut command = crate::suite::cargo();
    command.args(["build", "--quiet", "--release", "--bins", "--target", host]);
    command.current_dir(folder).env("CARGO_TARGET_DIR", &target).env("RUSTFLAGS", FLAGS);
    command.env_remove("CARGO_ENCODED_RUSTFLAGS");
    if !command.status()?.success() {
        bail!("the fuzz targets do not build");
    }
    Ok(target.join(host).join("release"))
}

/// Runs one target; whether nothing was found. What is new goes to `corpus/NAME`, an input that was
/// found to `artifacts/NAME`: Git ignores both.
fn fuzz(
    folder: &Path,
    built: &Path,
    (name, seeds, longest): (&str, &str, u32),
    seconds: u64,
) -> Result<bool> {
    let corpus = folder.join("corpus").join(name);
    let artifacts = folder.join("artifacts").join(name);
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&artifacts)?;
    let mut command = Command::new(built.join(name));
    command.arg(&corpus).arg(folder.join("seeds").join(seeds)).args([
        format!("-max_total_time={seconds}"),
        format!("-max_len={longest}"),
        format!("-timeout={TIMEOUT}"),
        format!("-rss_limit_mb={MEMORY_MIB}"),
        format!("-artifact_prefix={}/", artifacts.display()),
        "-print_final_stats=1".to_owned(),
    ]);
    // Reading a large corpus takes time, too.
    let limit = Duration::from_secs(2 * seconds + 120);
    let done = cmd::run(&mut command, limit)?;
    let count = |what: &str| {
        let line = done.stderr.lines().find_map(|l| l.strip_prefix(&format!("stat::{what}: ")));
        line.map_or(0, |n| n.trim().parse::<u64>().unwrap_or(0))
    };
    let runs = count("number_of_executed_units");
    let good = done.status.success() && runs > 0;
    say(&format!("fuzz: {name}: {runs} inputs, {} new", count("new_units_added")));
    if !good {
        println!("fuzz: {name}: something was found:\n{}", done.tail());
        println!("try it again: {} FILE, with the file named above", built.join(name).display());
    }
    Ok(good)
}
