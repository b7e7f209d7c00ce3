//! `cargo xtask dist`: what is given out: a tarball, a .deb and an .rpm with the same files, of one static
//! program. `--check` installs each in a clean root, runs what it brought, and takes it away again.

mod check;
mod licences;
mod pack;
mod roots;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cmd::{self, program, say};
use crate::suite::{self, Tally};
use crate::tools::{self, Missing};
use pack::{Format, Package};

/// What is built or written once for all packages, in the folder that they are put into.
const PROGRAM: &str = "polldisk";
const COPYRIGHT: &str = "copyright";

/// What the command can be told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also install and remove them in clean roots, which takes root's rights.
    #[arg(long)]
    check: bool,
    /// Where they are put; without it the folder `dist` beside what cargo builds.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command; false when a check failed.
pub(crate) fn command(args: &Args) -> Result<bool> {
    let out = match &args.out {
        Some(out) => out.clone(),
        None => suite::target_folder()?.join("dist"),
    };
    if !args.check {
        make(&out)?;
        return Ok(true);
    }
    let tally = tested(&out)?;
    println!("{tally}");
    Ok(tally.good())
}

/// The part of the test command.
pub(crate) fn step() -> Result<Tally> {
    tested(&suite::target_folder()?.join("dist"))
}

fn tested(out: &Path) -> Result<Tally> {
    let checked = make(out).and_then(|packages| check::run(&packages, out));
    match checked {
        Err(error) if error.is::<Missing>() => {
            println!("skipped: dist: {error}");
            Ok(Tally { skipped: 1, ..Tally::default() })
        }
        done => done,
    }
}

/// Builds the program and makes all packages.
fn make(out: &Path) -> Result<Vec<Package>> {
    tools::need(&["dpkg-deb", "rpmbuild", "strip", "tar", "gzip", "xz"])?;
    let release = Release::this()?;
    let built = suite::build_polldisk()?;
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let binary = out.join(PROGRAM);
    // Names of functions stay, for what a crash prints.
    cmd::ok(program("strip", ["--strip-debug", "-o"]).arg(&binary).arg(&built))?;
    fs::write(out.join(COPYRIGHT), licences::text()?)?;
    let packages = Format::ALL.map(|format| pack::make(format, &release, out, out));
    let packages: Vec<Package> = packages.into_iter().collect::<Result<_>>()?;
    for package in &packages {
        let size = fs::metadata(&package.path)?.len();
        say(&format!("dist: {} ({} KiB)", package.path.display(), size / 1024));
    }
    Ok(packages)
}

/// Which state of the sources is given out.
#[derive(Clone, Debug)]
struct Release {
    /// As packages are named by it.
    version: String,
    /// Seconds since 1970 that all files have: same sources, same bytes.
    time: u64,
}

impl Release {
    /// What git has here.
    fn this() -> Result<Release> {
        let git = |args: &[&str]| -> Result<String> {
            let text = cmd::ok(program("git", args).current_dir(crate::root()))?;
            Ok(text.trim().to_owned())
        };
        let numbered = env!("CARGO_PKG_VERSION");
        let tag = format!("v{numbered}");
        let described =
            ["describe", "--tags", "--always", "--dirty", "--abbrev=10", "--match", &tag];
        let commits = git(&["rev-list", "--count", "HEAD"])?;
        let version = version(numbered, &git(&described)?, &commits);
        let time = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(time) => time,
            Err(_) => git(&["log", "-1", "--format=%ct"])?,
        };
        let Ok(time) = time.parse() else { bail!("SOURCE_DATE_EPOCH: {time:?} is no time") };
        Ok(Release { version, time })
    }
}

/// The version of packages: `numbered`, which Cargo.toml says, if git describes the commit by its tag;
/// less than that before the tag, and more after it. There is no hyphen in it, which parts other fields.
fn version(numbered: &str, described: &str, commits: &str) -> String {
    let (commit, dirty) = match described.strip_suffix("-dirty") {
        Some(commit) => (commit, ".dirty"),
        None => (described, ""),
    };
    let tag = commit.strip_prefix('v').and_then(|rest| rest.strip_prefix(numbered));
    match tag.map(|rest| rest.trim_start_matches('-').replace('-', ".")) {
        Some(rest) if rest.is_empty() && dirty.is_empty() => numbered.to_owned(),
        Some(rest) if rest.is_empty() => format!("{numbered}+dirty"),
        Some(rest) => format!("{numbered}+{rest}{dirty}"),
        None => format!("{numbered}~{commits}.g{commit}{dirty}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_grow_from_commit_to_tag_to_commit() {
        assert_eq!(version("0.1.0", "214d63d0aa", "321"), "0.1.0~321.g214d63d0aa");
        assert_eq!(version("0.1.0", "214d63d0aa-dirty", "321"), "0.1.0~321.g214d63d0aa.dirty");
        assert_eq!(version("0.1.0", "v0.1.0", "322"), "0.1.0");
        assert_eq!(version("0.1.0", "v0.1.0-dirty", "322"), "0.1.0+dirty");
        assert_eq!(version("0.1.0", "v0.1.0-3-g214d63d0aa", "325"), "0.1.0+3.g214d63d0aa");
    }
}
