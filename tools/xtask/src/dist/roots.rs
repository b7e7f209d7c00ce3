//! Clean roots: file systems in which nothing is but what a test put there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::pack::Work;
use crate::cmd::{self, program, say};
use crate::tools::{self, Missing};

/// Has the kernel's own file systems in the root, for these processes alone, and goes there.
const ENTER: &str = "mount -t proc proc \"$0/proc\" && mount --rbind /sys \"$0/sys\" && \
                     exec chroot \"$0\" \"$@\"";

/// A root. It goes when it is not needed any more.
pub(super) struct Root(Work);

impl Root {
    /// One with nothing in it but folders and the kernel's random numbers.
    pub(super) fn empty(out: &Path) -> Result<Root> {
        let root = Root(Work::new(&out.join("root"))?);
        for folder in ["proc", "sys", "dev", "tmp", "run"] {
            fs::create_dir(root.path().join(folder))?;
        }
        let device = root.path().join("dev/urandom");
        cmd::ok(program("mknod", ["-m", "666"]).arg(device).args(["c", "1", "9"]))?;
        Ok(root)
    }

    /// Debian as this host is, with what is essential and python3.
    pub(super) fn debian(out: &Path) -> Result<Root> {
        let archive = archive()?;
        let root = Root(Work::new(&out.join("root"))?);
        cmd::ok(
            program("tar", ["--numeric-owner", "-xf"]).arg(archive).arg("-C").arg(root.path()),
        )?;
        // As every host that was booted once has one.
        fs::write(root.path().join("etc/machine-id"), "0123456789abcdef0123456789abcdef\n")?;
        Ok(root)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0.0
    }

    /// A command in the root. What it starts ends with it.
    pub(super) fn command(&self, words: &[&str]) -> Command {
        let mut command = program("unshare", ["--mount", "--pid", "--fork", "--kill-child"]);
        command.args(["sh", "-c", ENTER]).arg(self.path()).args(words);
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/").env("LC_ALL", "C");
        command.env_remove("TMPDIR");
        command
    }

    /// Runs one that must exit with 0, for what it prints.
    pub(super) fn run(&self, words: &[&str]) -> Result<String> {
        cmd::ok(&mut self.command(words))
    }
}

/// The root as an archive, made once.
pub(super) fn archive() -> Result<PathBuf> {
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let Some(name) = system.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")) else {
        return Err(Missing("a clean root: this is no Debian machine".to_owned()).into());
    };
    let archive = crate::cache().join("debian").join(format!("root-{name}.tar"));
    if archive.is_file() {
        return Ok(archive);
    }
    say(&format!("making a clean root of Debian {name}"));
    fs::create_dir_all(archive.parent().context("no folder")?)?;
    let making = archive.with_extension("new.tar");
    let mut make =
        program("mmdebstrap", ["--variant=essential", "--include=python3-minimal", name]);
    cmd::ok_within(make.arg(&making), tools::APT)
        .map_err(|error| Missing(format!("a clean root of Debian: {error:#}")))?;
    fs::rename(&making, &archive)?;
    Ok(archive)
}
