//! Other people's programs that the commands need: found, or installed as root on Debian, or named
//! as missing. Programs that would clash with installed ones are unpacked into the cache folder
//! instead, so that nothing installed is ever removed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cmd::{self, program, say};

/// Programs that may be installed with the package manager, and the Debian package of each.
const PACKAGES: [(&str, &str); 29] = [
    ("fio", "fio"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    // In qemu-utils since Debian 13.
    ("qemu-storage-daemon", "qemu-system-common"),
    ("mke2fs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("resize2fs", "e2fsprogs"),
    ("dpkg-deb", "dpkg"),
    ("lvm", "lvm2"),
    ("python3", "python3-minimal"),
    ("openssl", "openssl"),
    ("valgrind", "valgrind"),
    ("make", "make"),
    ("gcc", "gcc"),
    ("strace", "strace"),
    ("xz", "xz-utils"),
    ("gzip", "gzip"),
    ("tar", "tar"),
    ("strip", "binutils"),
    ("rpm", "rpm"),
    ("rpmbuild", "rpm"),
    ("mmdebstrap", "mmdebstrap"),
    ("unshare", "util-linux"),
    ("systemd-analyze", "systemd"),
    ("chromium-headless-shell", "chromium-headless-shell"),
];

/// Limit for one step of apt, which may have to wait for a slow mirror or another installation.
pub(crate) const APT: Duration = Duration::from_secs(600);

/// Something outside the repository is missing, so that a part cannot run here.
#[derive(Debug)]
pub(crate) struct Missing(pub(crate) String);

impl std::fmt::Display for Missing {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}

/// The full path of a program. System folders count also when PATH leaves them out.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// A command for a program that may live outside PATH.
pub(crate) fn command(name: &str) -> Command {
    Command::new(find(name).unwrap_or_else(|| PathBuf::from(name)))
}

/// Makes sure that all of `names` can be run; installs what is missing where that is possible.
/// Fails with [`Missing`] where it is not.
pub(crate) fn need(names: &[&str]) -> Result<()> {
    let absent: Vec<&str> = names.iter().copied().filter(|name| find(name).is_none()).collect();
    if absent.is_empty() {
        return Ok(());
    }
    let mut packages = Vec::new();
    for name in &absent {
        match PACKAGES.iter().find(|(program, _)| program == name) {
            Some((_, package)) if !packages.contains(package) => packages.push(*package),
            Some(_) => {}
            None => bail!("no package is known for `{name}`"),
        }
    }
    let wanted = packages.join(" ");
    if !nix::unistd::geteuid().is_root() || find("apt-get").is_none() {
        let absent = absent.join(", ");
        return Err(Missing(format!("{absent} (on Debian: apt-get install {wanted})")).into());
    }
    say(&format!("installing {wanted}"));
    let install = || {
        let mut apt = program(
            "apt-get",
            ["install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120"],
        );
        apt.args(&packages).env("DEBIAN_FRONTEND", "noninteractive");
        cmd::ok_within(&mut apt, APT)
    };
    with_update(install).map_err(|error| Missing(format!("{wanted}: {error:#}")))?;
    match absent.iter().find(|name| find(name).is_none()) {
        Some(name) => Err(Missing(format!("{name}, although its package was installed")).into()),
        None => Ok(()),
    }
}

/// Runs an apt action; when it fails, refreshes the package lists once and tries again, because a
/// new machine has none or old ones.
fn with_update<T>(action: impl Fn() -> Result<T>) -> Result<T> {
    let first = match action() {
        Err(error) => error,
        done => return done,
    };
    if !nix::unistd::geteuid().is_root() {
        return Err(first);
    }
    say("refreshing the package lists");
    cmd::ok_within(&mut program("apt-get", ["update", "-q"]), APT)?;
    action()
}

/// Unpacks Debian packages into `.cache/debian/NAME` without installing them, once.
/// `choose` gives the names of the packages.
pub(crate) fn unpack(name: &str, choose: impl Fn() -> Result<Vec<String>>) -> Result<PathBuf> {
    let folder = crate::cache().join("debian").join(name);
    if folder.is_dir() {
        return Ok(folder);
    }
    if find("apt-get").is_none() {
        return Err(Missing(format!("{name}: this needs apt-get (a Debian machine)")).into());
    }
    say(&format!("fetching Debian packages for {name} into {}", folder.display()));
    // Made beside its final place and renamed when complete: a cut run leaves nothing half done.
    let making = folder.with_file_name(format!("{name}.new"));
    let debs = folder.with_file_name(format!("{name}.debs"));
    for path in [&making, &debs] {
        if path.exists() {
            fs::remove_dir_all(path)?;
        }
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    with_update(|| {
        let packages = choose()?;
        let mut apt = program("apt-get", ["download", "-q"]);
        cmd::ok_within(apt.args(&packages).current_dir(&debs), APT)
    })
    .map_err(|error| Missing(format!("packages for {name}: {error:#}")))?;
    for deb in fs::read_dir(&debs)? {
        cmd::ok(program("dpkg-deb", ["-x"]).arg(deb?.path()).arg(&making))?;
    }
    fs::remove_dir_all(&debs)?;
    fs::rename(&making, &folder)?;
    Ok(folder)
}

/// The package and all it depends on that this machine lacks: what apt would install.
pub(crate) fn with_dependencies(package: &str) -> Result<Vec<String>> {
    let plan = cmd::ok(&mut program(
        "apt-get",
        ["install", "-s", "-q", "--no-install-recommends", package],
    ))?;
    let names = installs(&plan);
    if names.is_empty() {
        bail!("apt-get would install nothing for {package}:\n{}", cmd::tail(&plan, 1000));
    }
    Ok(names)
}

/// The names on the `Inst` lines of a simulated installation.
fn installs(plan: &str) -> Vec<String> {
    plan.lines()
        .filter_map(|line| line.strip_prefix("Inst "))
        .filter_map(|rest| rest.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// The package that a meta package stands for at present.
pub(crate) fn behind(meta: &str) -> Result<Vec<String>> {
    let mut packages = depends(meta)?;
    packages.truncate(1);
    Ok(packages)
}

/// The packages that a package names as needed, without what those need.
pub(crate) fn depends(package: &str) -> Result<Vec<String>> {
    let text = cmd::ok(&mut program("apt-cache", ["depends", package]))?;
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    // In angle brackets: a name that several packages provide.
    let names: Vec<String> = names.filter(|n| !n.starts_with('<')).map(str::to_owned).collect();
    if names.is_empty() {
        bail!("{package} depends on nothing");
    }
    Ok(names)
}

/// The only entry of a folder whose name starts with `prefix`.
pub(crate) fn entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        })
        .collect();
    found.sort();
    match found.as_slice() {
        [path] => Ok(path.clone()),
        _ => bail!("{} entries `{prefix}*` in {}, not one", found.len(), folder.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_program_is_found_and_an_unknown_one_is_refused() {
        assert!(find("sh").is_some());
        assert!(need(&["sh"]).is_ok());
        assert!(need(&["no-such-program-here"]).is_err());
    }

    #[test]
    fn only_installed_packages_are_read_from_the_plan() {
        let plan = "Remv qemu-utils [1:10]\nInst libfdt1 (1.6.1 Debian [amd64])\n\
                    Inst seabios [1.0] (1.16 Debian)\nConf libfdt1 (1.6.1)\n";
        assert_eq!(installs(plan), ["libfdt1", "seabios"]);
    }
}
