//! What packages must be and do, tried in clean roots.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::pack::{self, Format, Package};
use super::roots::{self, Root};
use super::{Release, tree};
use crate::cmd::{self, program, say};
use crate::suite::{self, Tally};
use crate::tools::{self, Missing};

/// A whole life of a repository through the plugins as they are installed; the daemon is started by them.
const LIFE: &str = r#"
set -e
cd /usr/libexec/xapi-storage-script/volume/org.xen.xapi.storage.fast
id=6f5d9a52-1d3b-4a2f-8f0a-2c7b8e9d0a11
config='"configuration": {"device": "/drive"}'
call() {
    echo "{\"dbg\": \"\", $2}" | "./$1" --json > /tmp/answer || { cat /tmp/answer /run/polldisk/*.log >&2; exit 1; }
}
truncate -s 256M /drive
call SR.create "\"uuid\": \"$id\", \"name\": \"fast\", \"description\": \"\", $config"
call SR.attach "$config"
call Volume.create "\"sr\": \"$id\", \"name\": \"root\", \"description\": \"\", \"size\": 5000000, \"sharable\": false"
call SR.ls "\"sr\": \"$id\""
cat /tmp/answer
polldisk ctl list > /dev/null
rm /drive
rm -r /run/polldisk
"#;

/// What the rpm of CentOS 7 knows of.
const RPM_NEEDS: [&str; 5] = [
    "/bin/sh",
    "rpmlib(CompressedFileNames) <= 3.0.4-1",
    "rpmlib(FileDigests) <= 4.6.0-1",
    "rpmlib(PayloadFilesHavePrefix) <= 4.0-1",
    "rpmlib(TildeInVersions) <= 4.10.0-1",
];

/// Where rpm keeps what it knows: Debian's would have it elsewhere.
const RPM_DATA: &str = "/var/lib/rpm";

/// What an administrator has put into the configuration.
const CHANGED: &str = "l2-cache = \"64M\"\n";

/// Checks packages that were made in `out`.
pub(super) fn run(packages: &[Package], out: &Path) -> Result<Tally> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Missing("clean roots take root's rights".to_owned()).into());
    }
    tools::need(&["rpm", "mmdebstrap", "unshare", "systemd-analyze"])?;
    let binary = out.join(super::PROGRAM);
    // That it cannot be had is no failure of a package.
    roots::archive()?;
    let mut tally = Tally::default();
    let mut judge = |name: &str, result: Result<()>| {
        match &result {
            Ok(()) => say(&format!("dist: {name}: ok")),
            Err(e) => say(&format!("dist: {name}: FAILED: {e:#}")),
        }
        tally.passed += u64::from(result.is_ok());
        tally.failed += u64::from(result.is_err());
    };
    judge("the program does not tell where it was built", no_paths(&binary));
    judge("the program runs where there is no C library", alone(&binary, out));
    judge("the same files give the same bytes", again(packages, out));
    for package in packages {
        let (name, check) = match package.format {
            Format::Tarball => ("tarball", tarball as fn(&Package, &Path) -> Result<()>),
            Format::Deb => (".deb", deb as _),
            Format::Rpm => (".rpm", rpm as _),
        };
        judge(&format!("{name}: installed, used, upgraded, removed"), check(package, out));
    }
    fs::remove_dir_all(out.join("older"))?;
    Ok(tally)
}

fn no_paths(binary: &Path) -> Result<()> {
    let bytes = fs::read(binary)?;
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    ensure!(holds("/cargo/registry"), "no path is found at all, so none is looked for rightly");
    for folder in [crate::root(), suite::cargo_home()?, suite::target_folder()?] {
        let text = folder.display().to_string();
        ensure!(!holds(&text), "it holds {text}");
    }
    Ok(())
}

/// This is also what the oldest C library is: none.
fn alone(binary: &Path, out: &Path) -> Result<()> {
    let root = Root::empty(out)?;
    fs::copy(binary, root.path().join("polldisk"))?;
    let run = |line: &str| root.run(&line.split(' ').collect::<Vec<_>>());
    let version = run("/polldisk --version")?;
    ensure!(version == concat!("polldisk ", env!("CARGO_PKG_VERSION"), "\n"), "{version}");
    run("/polldisk image create a.qcow2 64M")?;
    run("/polldisk image check a.qcow2")?;
    run("/polldisk serve --check")?;
    let report: Value =
        serde_json::from_str(&run("/polldisk demo --json --seconds 0.5 --size 16M")?)?;
    ensure!(report["verified"] == true, "the demo did not verify: {report}");
    Ok(())
}

fn again(packages: &[Package], out: &Path) -> Result<()> {
    let second = out.join("again");
    fs::create_dir_all(&second)?;
    for package in packages {
        let other = pack::make(package.format, &package.release, out, &second)?;
        let same = fs::read(&package.path)? == fs::read(&other.path)?;
        ensure!(same, "{} differs from {}", other.path.display(), package.path.display());
    }
    Ok(fs::remove_dir_all(second)?)
}

/// A package of an earlier version.
fn older(package: &Package, out: &Path) -> Result<Package> {
    let release = Release { version: "0.0.1".to_owned(), time: 1_000_000_000 };
    let folder = out.join("older");
    fs::create_dir_all(&folder)?;
    pack::make(package.format, &release, out, &folder)
}

/// What is installed in the root does what it is there for.
fn works(root: &Root, package: &Package) -> Result<()> {
    for name in &package.files {
        let path = root.path().join(name);
        let data = fs::symlink_metadata(&path).with_context(|| format!("/{name}"))?;
        ensure!((data.uid(), data.gid()) == (0, 0), "/{name} is not root's");
        // A folder that was there before is as it was.
        ensure!(data.mode() & 0o022 == 0, "/{name} can be written to by others");
        ensure!(data.mode() & 0o444 == 0o444, "/{name} cannot be read by all");
    }
    root.run(&["polldisk", "--version"])?;
    root.run(&["/usr/bin/polldisk", "serve", "--check", "--config", "/etc/polldisk.toml"])?;
    for plugin in ["volume/org.xen.xapi.storage.fast", "datapath/fast"] {
        let query = root.run(&[&format!("/{}/{plugin}/Plugin.query", tree::PLUGINS), "--json"])?;
        let query: Value = serde_json::from_str(&query)?;
        ensure!(query["plugin"] == "fast", "{plugin}/Plugin.query says {query}");
    }
    let disks: Value = serde_json::from_str(&root.run(&["sh", "-c", LIFE])?)?;
    ensure!(disks[0]["name"] == "root", "the repository's disks are {disks}");
    root.run(&["bash", "-n", "/usr/share/bash-completion/completions/polldisk"])?;
    let page = root.run(&["zcat", "/usr/share/man/man1/polldisk-image-check.1.gz"])?;
    ensure!(page.contains("SYNOPSIS"), "the manual page is {page:?}");
    verify_unit(root)
}

/// The unit, as systemd reads it.
fn verify_unit(root: &Root) -> Result<()> {
    let done = cmd::run(
        tools::command("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no"])
            .arg(format!("--root={}", root.path().display()))
            .arg("polldisk.service"),
        cmd::LIMIT,
    )?;
    let said = done.tail();
    ensure!(done.status.success() && !said.contains("polldisk"), "systemd-analyze verify: {said}");
    Ok(())
}

/// Puts a package into the root, for the root's own tools.
fn bring(root: &Root, package: &Package) -> Result<String> {
    let name = package.path.file_name().context("a package without a name")?;
    fs::copy(&package.path, root.path().join("tmp").join(name))?;
    Ok(format!("/tmp/{}", name.to_string_lossy()))
}

/// An administrator changes the configuration; what it is then must stay.
fn change(root: &Root) -> Result<()> {
    Ok(fs::write(root.path().join("etc/polldisk.toml"), CHANGED)?)
}

fn unchanged(root: &Root, name: &str) -> Result<()> {
    let text = fs::read_to_string(root.path().join(name)).with_context(|| name.to_owned())?;
    ensure!(text == CHANGED, "/{name} is not what it was: {text}");
    Ok(())
}

/// What is in the root beside what was there before, without what packagers keep for themselves.
fn added(root: &Root, before: &[String]) -> Result<Vec<String>> {
    const THEIRS: [&str; 5] = ["var/lib/dpkg/", "var/lib/rpm", "var/log/", "var/cache/", "tmp/"];
    let after = tree::list(root.path())?;
    let gone: Vec<_> = before.iter().filter(|name| after.binary_search(name).is_err()).collect();
    ensure!(gone.is_empty(), "not there any more: {gone:?}");
    let new = |name: &&String| {
        before.binary_search(name).is_err() && !THEIRS.iter().any(|theirs| name.starts_with(theirs))
    };
    Ok(after.iter().filter(new).cloned().collect())
}

fn deb(package: &Package, out: &Path) -> Result<()> {
    let root = Root::debian(out)?;
    let before = tree::list(root.path())?;
    let (old, new) = (bring(&root, &older(package, out)?)?, bring(&root, package)?);
    root.run(&["dpkg", "--force-unsafe-io", "-i", &old])?;
    change(&root)?;
    root.run(&["dpkg", "--force-unsafe-io", "-i", &new])?;
    unchanged(&root, "etc/polldisk.toml")?;
    let state = root.run(&["dpkg-query", "-W", "-f", "${Version} ${Status}", "polldisk"])?;
    ensure!(state == format!("{} install ok installed", package.release.version), "{state}");
    works(&root, package)?;
    // A `c` stands before configuration files, and only one of them was changed.
    let verified = root.run(&["dpkg", "-V", "polldisk"])?;
    ensure!(verified == "??5?????? c /etc/polldisk.toml\n", "dpkg -V: {verified}");
    root.run(&["dpkg", "-r", "polldisk"])?;
    unchanged(&root, "etc/polldisk.toml")?;
    let left = added(&root, &before)?;
    let files: Vec<_> = left.iter().filter(|name| !name.ends_with('/')).collect();
    ensure!(files == tree::CONFIGURATION.each_ref(), "a removal leaves {left:?}");
    root.run(&["dpkg", "-P", "polldisk"])?;
    let left = added(&root, &before)?;
    ensure!(left.is_empty(), "a purge leaves {left:?}");
    Ok(())
}

fn rpm(package: &Package, out: &Path) -> Result<()> {
    let root = Root::debian(out)?;
    let before = tree::list(root.path())?;
    // Run from outside, as the root has no rpm; Debian's asks whether alien was not meant.
    let rpm = |arguments: &[&str]| {
        let mut rpm = program("rpm", ["--force-debian", "--dbpath", RPM_DATA, "--root"]);
        cmd::ok(rpm.arg(root.path()).args(arguments))
    };
    let query = |what: &[&str]| cmd::ok(program("rpm", ["-qp"]).args(what).arg(&package.path));
    let payload = query(&["--qf", "%{PAYLOADFORMAT} %{PAYLOADCOMPRESSOR} %{ARCH} %{OS}"])?;
    ensure!(payload == "cpio gzip x86_64 linux", "{payload}");
    for need in query(&["--requires"])?.lines() {
        ensure!(RPM_NEEDS.contains(&need), "it requires {need}");
    }
    let (old, new) = (older(package, out)?, package);
    let path = |package: &Package| package.path.display().to_string();
    // It needs a shell, which is there and which rpm does not know of.
    rpm(&["--nodeps", "-i", &path(&old)])?;
    change(&root)?;
    rpm(&["--nodeps", "-U", &path(new)])?;
    unchanged(&root, "etc/polldisk.toml")?;
    let version = rpm(&["-q", "--qf", "%{VERSION}", "polldisk"])?;
    ensure!(version == package.release.version, "{version} is installed");
    works(&root, package)?;
    let mut verify = program("rpm", ["--dbpath", RPM_DATA, "--root"]);
    let verified =
        cmd::run(verify.arg(root.path()).args(["-V", "--nodeps", "polldisk"]), cmd::LIMIT)?;
    let verified = verified.tail();
    let changed = verified.lines().count() == 1 && verified.ends_with("c /etc/polldisk.toml");
    ensure!(changed, "rpm -V: {verified}");
    rpm(&["--nodeps", "-e", "polldisk"])?;
    unchanged(&root, "etc/polldisk.toml.rpmsave")?;
    let left = added(&root, &before)?;
    let expected = |name: &String| {
        // Its own folders are of no package: rpm makes them and leaves them, as on any Debian.
        name == "etc/polldisk.toml.rpmsave" || pack::SYSTEM.contains(&name.as_str())
    };
    ensure!(left.iter().all(expected), "a removal leaves {left:?}");
    Ok(())
}

/// As docs/operations.md says.
fn tarball(package: &Package, out: &Path) -> Result<()> {
    let root = Root::debian(out)?;
    let before = tree::list(root.path())?;
    let (old, new) = (bring(&root, &older(package, out)?)?, bring(&root, package)?);
    root.run(&["tar", "-xzf", &old, "-C", "/", "--strip-components=1"])?;
    change(&root)?;
    let keep = "--exclude=*/etc/polldisk.toml";
    root.run(&["tar", "-xzf", &new, "-C", "/", "--strip-components=1", keep])?;
    unchanged(&root, "etc/polldisk.toml")?;
    works(&root, package)?;
    let remove = "cd / && tar -tzf \"$0\" | grep -v '/$' | cut -d/ -f2- | xargs rm";
    root.run(&["sh", "-c", remove, &new])?;
    let left = added(&root, &before)?;
    ensure!(left.iter().all(|name| name.ends_with('/')), "a removal leaves {left:?}");
    Ok(())
}
