//! The files of a package, as they lie on a host.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::pack::Format;
use crate::cmd::{self, program};

/// What an administrator changes, and a removal leaves.
pub(super) const CONFIGURATION: [&str; 2] = ["etc/polldisk.toml", "etc/xen/scripts/block-polldisk"];

/// The program, where the unit and the plugins look for it.
pub(super) const PROGRAM: &str = "usr/bin/polldisk";
/// The folder of the toolstack's plugins.
pub(super) const PLUGINS: &str = "usr/libexec/xapi-storage-script";
const MANUAL: &str = "usr/share/man/man1";
const DOCUMENTS: &str = "usr/share/doc/polldisk";

/// Files of the repository: from, to, executable.
const FILES: [(&str, &str, bool); 6] = [
    ("tools/dist/polldisk.service", "usr/lib/systemd/system/polldisk.service", false),
    ("tools/dist/60-polldisk.rules", "usr/lib/udev/rules.d/60-polldisk.rules", false),
    ("tools/dist/polldisk.toml", "etc/polldisk.toml", false),
    ("tools/xen/block-polldisk", "etc/xen/scripts/block-polldisk", true),
    ("README.md", "usr/share/doc/polldisk/README.md", false),
    ("CHANGELOG.md", "usr/share/doc/polldisk/CHANGELOG.md", false),
];

/// Puts all files of a package of this format under `root`, which is made. `parts` has the program and the
/// copyright notices.
pub(super) fn make(root: &Path, format: Format, parts: &Path) -> Result<()> {
    let binary = &parts.join(super::PROGRAM);
    let repository = crate::root();
    for (from, to, executable) in FILES {
        put(&root.join(to), &fs::read(repository.join(from)).context(from)?, executable)?;
    }
    put(&root.join(PROGRAM), &fs::read(binary)?, true)?;
    let copyright = root.join(DOCUMENTS).join(super::COPYRIGHT);
    put(&copyright, &fs::read(parts.join(super::COPYRIGHT))?, false)?;
    for entry in fs::read_dir(repository.join("docs"))? {
        let entry = entry?;
        let to = root.join(DOCUMENTS).join("docs").join(entry.file_name());
        put(&to, &fs::read(entry.path())?, false)?;
    }
    let plugins = root.join(PLUGINS);
    folder(&plugins)?;
    let install = ["smapiv3", "install", "--binary", "/usr/bin/polldisk", "--root"];
    cmd::ok(Command::new(binary).args(install).arg(&plugins))?;
    let manual = root.join(MANUAL);
    folder(&manual)?;
    cmd::ok(Command::new(binary).arg("man").arg(&manual))?;
    cmd::ok(program("gzip", ["-9nr"]).arg(&manual))?;
    for (shell, to) in [
        ("bash", "usr/share/bash-completion/completions/polldisk"),
        ("fish", "usr/share/fish/vendor_completions.d/polldisk.fish"),
        ("zsh", format.zsh()),
    ] {
        let text = cmd::ok(Command::new(binary).args(["completions", shell]))?;
        put(&root.join(to), text.as_bytes(), false)?;
    }
    usual_modes(root)
}

/// What programs wrote has the mode that it has with the usual mask, whatever this process's is.
fn usual_modes(root: &Path) -> Result<()> {
    for name in list(root)? {
        let path = root.join(name);
        let executable = fs::metadata(&path)?.permissions().mode() & 0o100 != 0;
        let mode = if executable { 0o755 } else { 0o644 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Writes a file with the mode that packages have, whatever this process's mask is.
pub(super) fn put(path: &Path, contents: &[u8], executable: bool) -> Result<()> {
    let at = || path.display().to_string();
    folder(path.parent().context("no folder")?)?;
    fs::write(path, contents).with_context(at)?;
    let mode = if executable { 0o755 } else { 0o644 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).with_context(at)
}

/// Makes a folder and those above it.
fn folder(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    folder(path.parent().context("no folder")?)?;
    fs::create_dir(path).with_context(|| path.display().to_string())?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

/// All paths under `root`, folders with a slash at the end, sorted.
pub(super) fn list(root: &Path) -> Result<Vec<String>> {
    fn walk(folder: &Path, root: &Path, into: &mut Vec<String>) -> Result<()> {
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            let path = entry.path();
            let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                into.push(format!("{name}/"));
                walk(&path, root, into)?;
            } else {
                into.push(name);
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    walk(root, root, &mut found)?;
    found.sort();
    Ok(found)
}
