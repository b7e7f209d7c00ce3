//! The packages: files packed by the formats' own tools.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Release, tree};
use crate::cmd::{self, program};

const CONTROL: &str = include_str!("../../../dist/control");
const PRERM: &str = include_str!("../../../dist/prerm");
const POSTRM: &str = include_str!("../../../dist/postrm");
const SPEC: &str = include_str!("../../../dist/polldisk.spec");
const SUMMARY: &str = "virtual-disk datapath for Xen hosts, in user space";

/// Folders of every host, which belong to no package of ours.
pub(super) const SYSTEM: [&str; 13] = [
    "etc/",
    "usr/",
    "usr/bin/",
    "usr/lib/",
    "usr/lib/systemd/",
    "usr/lib/systemd/system/",
    "usr/lib/udev/",
    "usr/lib/udev/rules.d/",
    "usr/libexec/",
    "usr/share/",
    "usr/share/doc/",
    "usr/share/man/",
    "usr/share/man/man1/",
];

/// A kind of package.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    Tarball,
    Deb,
    Rpm,
}

impl Format {
    pub(super) const ALL: [Format; 3] = [Format::Tarball, Format::Deb, Format::Rpm];

    /// Where zsh looks for what packages bring.
    pub(super) fn zsh(self) -> &'static str {
        match self {
            Format::Deb => "usr/share/zsh/vendor-completions/_polldisk",
            Format::Tarball | Format::Rpm => "usr/share/zsh/site-functions/_polldisk",
        }
    }
}

/// One that was made.
#[derive(Debug)]
pub(super) struct Package {
    pub(super) format: Format,
    pub(super) release: Release,
    pub(super) path: PathBuf,
    /// Its files and folders, without a slash before them, folders with one behind.
    pub(super) files: Vec<String>,
}

/// Makes the package of this format in the folder `out`, of what is in `parts`.
pub(super) fn make(format: Format, release: &Release, parts: &Path, out: &Path) -> Result<Package> {
    let work = Work::new(&out.join("work"))?;
    let Release { version, time } = release;
    // An archive in which all has one folder above it, or what is below `/`.
    let name = format!("polldisk-{version}");
    let files = match format {
        Format::Tarball => work.0.join(&name),
        Format::Deb | Format::Rpm => work.0.join("files"),
    };
    tree::make(&files, format, parts)?;
    let list = tree::list(&files)?;
    let path = match format {
        Format::Tarball => {
            let tar = out.join(format!("{name}-x86_64.tar"));
            tarball(&work.0, &name, *time, &tar)?;
            tar.with_extension("tar.gz")
        }
        Format::Deb => {
            let path = out.join(format!("polldisk_{version}_amd64.deb"));
            deb(&files, &list, release, &path)?;
            path
        }
        Format::Rpm => {
            rpm(&work.0, &list, release, out)?;
            out.join(format!("polldisk-{version}-1.x86_64.rpm"))
        }
    };
    fs::metadata(&path).with_context(|| path.display().to_string())?;
    Ok(Package { format, release: release.clone(), path, files: list })
}

/// A folder that goes when it is not needed any more.
pub(super) struct Work(pub(super) PathBuf);

impl Work {
    /// A new one, empty.
    pub(super) fn new(folder: &Path) -> Result<Work> {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        Ok(Work(folder.canonicalize()?))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A command whose output depends on the time of the sources, not on today.
fn timed(name: &str, release: &Release) -> Command {
    let mut command = Command::new(name);
    command.env("SOURCE_DATE_EPOCH", release.time.to_string());
    command
}

fn tarball(folder: &Path, name: &str, time: u64, tar: &Path) -> Result<()> {
    let mut pack = program("tar", ["--sort=name", "--format=gnu", "--numeric-owner"]);
    pack.args(["--owner=0", "--group=0", &format!("--mtime=@{time}"), "-C"]).arg(folder);
    cmd::ok(pack.arg("-cf").arg(tar).arg(name))?;
    cmd::ok(program("gzip", ["-9nf"]).arg(tar))?;
    Ok(())
}

/// Fills a template in.
fn filled(template: &str, release: &Release) -> String {
    template
        .replace("@VERSION@", &release.version)
        .replace("@SUMMARY@", SUMMARY)
        .replace("@LICENCE@", env!("CARGO_PKG_LICENSE"))
        .replace("@HOME@", env!("CARGO_PKG_REPOSITORY"))
}

fn deb(files: &Path, list: &[String], release: &Release, path: &Path) -> Result<()> {
    let list: Vec<&String> = list.iter().filter(|name| !name.ends_with('/')).collect();
    let mut bytes = 0;
    for name in &list {
        bytes += fs::metadata(files.join(name))?.len();
    }
    let control = filled(CONTROL, release).replace("@SIZE@", &bytes.div_ceil(1024).to_string());
    let sums = cmd::ok(program("md5sum", ["--"]).args(&list).current_dir(files))?;
    let configuration: String =
        tree::CONFIGURATION.iter().map(|name| format!("/{name}\n")).collect();
    for (name, text, executable) in [
        ("control", control.as_str(), false),
        ("conffiles", &configuration, false),
        ("md5sums", &sums, false),
        ("prerm", PRERM, true),
        ("postrm", POSTRM, true),
    ] {
        tree::put(&files.join("DEBIAN").join(name), text.as_bytes(), executable)?;
    }
    let mut pack = timed("dpkg-deb", release);
    cmd::ok(pack.args(["--root-owner-group", "-Zxz", "--build"]).arg(files).arg(path))?;
    Ok(())
}

fn rpm(work: &Path, list: &[String], release: &Release, out: &Path) -> Result<()> {
    let mut files = String::new();
    for name in list.iter().filter(|name| !SYSTEM.contains(&name.as_str())) {
        let kind = match name.strip_suffix('/') {
            Some(_) => "%dir ",
            None if tree::CONFIGURATION.contains(&name.as_str()) => "%config(noreplace) ",
            None => "",
        };
        files.push_str(&format!("{kind}/{}\n", name.trim_end_matches('/')));
    }
    let spec = filled(SPEC, release)
        .replace("@FILES@", &files)
        .replace("@TREE@", &work.join("files").display().to_string());
    let path = work.join("polldisk.spec");
    fs::write(&path, spec)?;
    let define = |name: &str, value: &Path| format!("{name} {}", value.display());
    let mut build = timed("rpmbuild", release);
    // Settings of whoever runs this do not count.
    build.env("HOME", work).args(["-bb", "--quiet", "--target", "x86_64-linux"]);
    build.args(["--define", &define("_topdir", &work.join("rpm"))]);
    build.args(["--define", &define("_rpmdir", &out.canonicalize()?)]);
    build.args(["--define", "_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm"]);
    cmd::ok(build.arg(&path))?;
    Ok(())
}
