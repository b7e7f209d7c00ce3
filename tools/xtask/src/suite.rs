//! `cargo xtask test`: the README's test command. Runs the steps one after another, goes on after
//! a failed one, and ends with one line of counts.

use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cmd::{self, now, say};
use crate::{dist, fuzz, gates, layers, matrix, page, real_input, simulate, tidy, tools};

/// Running all tests may take so long on a slow machine; a hang takes longer.
const TESTS_LIMIT: Duration = Duration::from_secs(30 * 60);

/// What the command can be told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only what gates each commit: unit and integration tests, house checks.
    #[arg(long)]
    quick: bool,
}

/// Counts of tests.
#[derive(Default, Debug, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Tally {
    /// One check that passed or failed.
    fn one(passed: bool) -> Self {
        Self { passed: u64::from(passed), failed: u64::from(!passed), skipped: 0 }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Whether this is a success: nothing failed, something was there, and in CI nothing skipped.
    pub(crate) fn good(&self) -> bool {
        self.good_where(crate::in_ci())
    }

    fn good_where(&self, ci: bool) -> bool {
        self.failed == 0 && self.passed + self.skipped > 0 && (self.skipped == 0 || !ci)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(to, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

/// One part of the test command.
struct Step {
    name: &'static str,
    /// Whether `--quick` runs it too.
    quick: bool,
    /// Whether it may be skipped in CI too: it needs a nightly toolchain.
    optional: bool,
    run: fn() -> Result<Tally>,
}

impl Step {
    const fn new(name: &'static str, run: fn() -> Result<Tally>) -> Step {
        Step { name, quick: false, optional: false, run }
    }

    const fn quick(self) -> Step {
        Step { quick: true, ..self }
    }

    const fn optional(self) -> Step {
        Step { optional: true, ..self }
    }
}

/// All parts, cheap ones first.
const STEPS: [Step; 11] = [
    Step::new("layers", || layers::command().map(Tally::one)).quick(),
    Step::new("tidy", || tidy::command().map(Tally::one)).quick(),
    Step::new("tests", cargo_test).quick(),
    Step::new("simulate", simulate::step),
    Step::new("matrix", matrix::step),
    Step::new("fuzz", fuzz::step).optional(),
    Step::new("miri", miri).optional(),
    Step::new("gates", gates::run),
    Step::new("page", || page::run(&page::Args::default())),
    Step::new("dist", dist::step),
    Step::new("real-input", || real_input::run(&real_input::Args::default())),
];

/// Runs the command; false when something failed.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut total = Tally::default();
    let mut bad = Vec::new();
    for step in STEPS.iter().filter(|step| step.quick || !args.quick) {
        say(&format!("test: {}", step.name));
        let start = now();
        let tally = (step.run)().unwrap_or_else(|error| {
            println!("{}: {error:#}", step.name);
            Tally::one(false)
        });
        say(&format!("test: {}: {tally} in {:.1} s", step.name, start.elapsed().as_secs_f64()));
        if !tally.good_where(crate::in_ci() && !step.optional) {
            bad.push(step.name);
        }
        total.add(&tally);
    }
    if !bad.is_empty() {
        println!("not good: {}", bad.join(", "));
    }
    println!("{total}");
    Ok(bad.is_empty())
}

/// The cargo that runs this command.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(crate::root());
    command
}

/// The memory that devices and guests write, and what copies it, under Miri.
fn miri() -> Result<Tally> {
    let miri = || {
        let mut command = Command::new("rustup");
        command.args(["run", "nightly", "cargo", "miri"]).current_dir(crate::root());
        command.env("MIRIFLAGS", "-Zmiri-disable-isolation");
        command
    };
    let there = miri().arg("--version").output();
    if !there.is_ok_and(|out| out.status.success()) {
        println!("skipped: miri: a nightly toolchain with the component miri is not installed");
        return Ok(Tally { skipped: 1, ..Tally::default() });
    }
    let mut command = miri();
    command.args(["test", "--package", "dma", "--lib", "--target-dir", "target/miri"]);
    let mut tally = counted(command)?;
    // Some tests cannot run there, by nature.
    tally.skipped = 0;
    Ok(tally)
}

/// Unit, integration and documentation tests of all crates.
fn cargo_test() -> Result<Tally> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    let needs: [(&str, &[&str]); 5] = [
        ("images judged by QEMU", &["qemu-img", "qemu-io"]),
        ("peers of NBD", &["nbdinfo", "nbdcopy", "fio", "qemu-nbd", "openssl"]),
        ("peers under the same load", &["qemu-storage-daemon", "qemu-nbd", "nbdkit", "fio"]),
        ("volume groups judged by LVM2", &["lvm"]),
        ("plugins of the toolstack", &["python3"]),
    ];
    let missing: Vec<_> =
        needs.iter().filter_map(|n| Some((n.0, tools::need(n.1).err()?))).collect();
    // Compiling is no part of the tests' time.
    let built = cargo().args(["test", "--workspace", "--no-run", "--quiet"]).status()?;
    if !built.success() {
        bail!("the tests do not compile");
    }
    let mut tally = counted(command)?;
    for (what, missing) in missing {
        println!("skipped: {what}: {missing}");
        tally.skipped += 1;
    }
    Ok(tally)
}

/// Runs tests; their output is shown and counted.
pub(crate) fn counted(command: Command) -> Result<Tally> {
    counted_within(command, TESTS_LIMIT)
}

/// The same of tests that may take longer.
pub(crate) fn counted_within(mut command: Command, limit: Duration) -> Result<Tally> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let output = child.stdout.take().context("no output")?;
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut tally = Tally::default();
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if let Some(counts) = count(&line) {
                tally.add(&counts);
            }
            // A test that passed is one word too many here.
            if !line.ends_with(" ... ok") && !line.is_empty() {
                println!("{line}");
            }
        }
        let _ = sender.send(tally);
    });
    let status = cmd::wait(&mut child, limit)?;
    let mut tally =
        receiver.recv_timeout(Duration::from_secs(10)).context("output of the tests")?;
    match status {
        Some(status) if status.success() => {}
        Some(_) if tally.failed > 0 => {}
        // A crate that does not compile, or a test that ended its process, has no count of its own.
        Some(status) => {
            println!("FAILED: {status}, and no test says that it failed");
            tally.failed += 1;
        }
        None => {
            println!("FAILED: did not end within {} s", limit.as_secs());
            tally.failed += 1;
        }
    }
    if tally.passed + tally.failed == 0 {
        bail!("no test ran");
    }
    Ok(tally)
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
fn count(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut tally = Tally::default();
    for part in counts.split("; ") {
        let (number, what) = part.split_once(' ')?;
        match what {
            "passed" => tally.passed = number.parse().ok()?,
            "failed" => tally.failed = number.parse().ok()?,
            "ignored" => tally.skipped = number.parse().ok()?,
            _ => {}
        }
    }
    Some(tally)
}

/// Builds `polldisk` as it is given out and returns the binary's path. It is linked statically, with the
/// C library: so it runs whatever the host has, and what is tested here is what is given out.
pub(crate) fn build_polldisk() -> Result<PathBuf> {
    build_polldisk_of(&crate::root(), &target_folder()?)
}

/// The same of another tree of sources, in a target folder of its own.
pub(crate) fn build_polldisk_of(tree: &Path, target: &Path) -> Result<PathBuf> {
    let what = ["--package", "polldisk", "--bin", "polldisk"];
    // For the program alone: what the compiler itself loads (derives) cannot be static.
    let linked = ["--", "-C", "target-feature=+crt-static"];
    Ok(release_of(tree, target, "rustc", &[&what[..], &linked].concat())?.join("polldisk"))
}

/// Builds something for release and returns the folder of what is built.
pub(crate) fn build(what: &[&str]) -> Result<PathBuf> {
    release("build", what)
}

fn release(command: &str, what: &[&str]) -> Result<PathBuf> {
    release_of(&crate::root(), &target_folder()?, command, what)
}

fn release_of(tree: &Path, target: &Path, command: &str, what: &[&str]) -> Result<PathBuf> {
    say(&format!("building for release: {}", what.join(" ")));
    let mut cargo = cargo();
    cargo.current_dir(tree).arg(command).arg("--target-dir").arg(target);
    cargo.args(["--release", "--config", &no_paths(tree)?]).args(what);
    if !cargo.status()?.success() {
        bail!("{} does not build", what.join(" "));
    }
    Ok(target.join("release"))
}

/// Flags, beside those in .cargo/config.toml, by which nothing that is built tells where it was built.
fn no_paths(tree: &Path) -> Result<String> {
    let home = cargo_home()?;
    let maps = [(tree.to_path_buf(), "/polldisk"), (home, "/cargo")];
    let flags: Vec<String> = maps
        .iter()
        .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()))
        .collect();
    Ok(format!("target.x86_64-unknown-linux-gnu.rustflags={}", serde_json::to_string(&flags)?))
}

/// Where cargo keeps other people's sources.
pub(crate) fn cargo_home() -> Result<PathBuf> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"));
    let set = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    set.or_else(home).context("neither CARGO_HOME nor HOME is set")
}

/// The folder that cargo builds in.
pub(crate) fn target_folder() -> Result<PathBuf> {
    let text = cmd::ok(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    let target = metadata["target_directory"].as_str().context("no target folder")?;
    Ok(PathBuf::from(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let line = "test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.01s";
        assert_eq!(count(line), Some(Tally { passed: 12, failed: 2, skipped: 1 }));
        assert_eq!(count("test a::b ... ok"), None);
    }

    #[test]
    fn the_closing_line() {
        let mut tally = Tally::one(true);
        assert_eq!(tally.to_string(), "1 passed, 0 failed");
        assert!(tally.good_where(true) && tally.good_where(false));
        tally.add(&Tally { passed: 1, failed: 0, skipped: 2 });
        assert_eq!(tally.to_string(), "2 passed, 0 failed, 2 skipped");
        assert!(!tally.good_where(true) && tally.good_where(false));
        tally.add(&Tally::one(false));
        assert_eq!(tally.to_string(), "2 passed, 1 failed, 2 skipped");
        assert!(!tally.good_where(false) && !Tally::default().good_where(false));
    }
}
