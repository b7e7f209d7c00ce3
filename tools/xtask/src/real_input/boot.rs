//! Boot cases: a Linux kernel uses the exported disk. The first boot checks every file and writes;
//! the second one, from a new server, must find what the first one wrote. Or the first one makes the
//! file system, on an image that polldisk made, and for the second one QEMU reads that image on its
//! own. After each boot `qemu-img check` must be clean, and at the end `e2fsck` judges the file system
//! on the host.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::disk::{self, Verdict, step};
use super::{Room, tree};
use crate::cmd;
use crate::lab::guest::programs;
use crate::qemu::Machine;
use crate::tools;

const INIT: &str = include_str!("../../../lab/guest-init.sh");

/// What the guest's disk needs.
const DRIVERS: [&str; 2] = ["virtio_pci", "virtio_blk"];

/// Files that the second boot reads again besides the written ones: one in so many.
const SAMPLE: usize = 8;

/// Two boots from one image.
pub(crate) fn case(room: &Room<'_>, name: &str) -> Result<String> {
    let machine = Machine::prepare()?;
    let assets = &room.lab.assets;
    let image = room.writable(name)?;
    let served = |mode, manifest| Boot { mode, manifest, links: &assets.links, served: true };
    let first = boot(room, &machine, &image, served("write", &assets.manifest))?;
    step(&format!("first boot: {}", first.summary));
    let second = expected(&assets.manifest, &first.hashes)?;
    let second = boot(room, &machine, &image, served("find", &second))?;
    step(&format!("second boot: {}", second.summary));
    file_system(room, &image)?;
    Ok(format!("{} files written and found again", first.hashes.len()))
}

/// How that image is made: what no other boot has.
const MADE: &str = "extended_l2=on,refcount_bits=8";

/// A file system that a guest makes on an image that polldisk made; then QEMU reads the image on its
/// own.
pub(crate) fn made(room: &Room<'_>) -> Result<String> {
    let machine = Machine::prepare()?;
    let image = room.folder.join("image.qcow2");
    let mut create = room.lab.template.maker();
    create.args(["create", "-q", "-f", "qcow2", "-o", MADE]).arg(&image);
    cmd::ok(create.arg(disk::SIZE.to_string()))?;
    let make = Boot { mode: "make", manifest: "", links: "", served: true };
    let first = boot(room, &machine, &image, make)?;
    step(&format!("first boot: {}", first.summary));
    let second = expected("", &first.hashes)?;
    let find = Boot { mode: "find", manifest: &second, links: "", served: false };
    let second = boot(room, &machine, &image, find)?;
    step(&format!("second boot, by QEMU alone: {}", second.summary));
    file_system(room, &image)?;
    Ok(format!("{} files written and found again", first.hashes.len()))
}

/// `e2fsck` must find nothing.
fn file_system(room: &Room<'_>, image: &Path) -> Result<()> {
    let raw = room.folder.join("after.raw");
    disk::as_raw(image, &raw)?;
    cmd::ok(tools::command("e2fsck").args(["-f", "-n"]).arg(&raw))?;
    Ok(())
}

/// One boot.
struct Boot<'a> {
    /// What the guest is told to do.
    mode: &'static str,
    /// `sha256sum` lines of what must be there.
    manifest: &'a str,
    links: &'a str,
    /// The disk is an export of a server; else QEMU reads and writes the image.
    served: bool,
}

/// What the guest said.
#[derive(Debug)]
struct Said {
    summary: String,
    /// Hash by name, of all files that the guest wrote.
    hashes: BTreeMap<String, String>,
}

/// Boots once, from a server of its own if one serves it, and checks the image afterwards.
fn boot(room: &Room<'_>, machine: &Machine, image: &Path, what: Boot<'_>) -> Result<Said> {
    let Boot { mode, manifest, links, served } = what;
    let mut files = vec![("manifest", manifest.as_bytes()), ("links", links.as_bytes())];
    let tools = match mode {
        "make" => programs(&[tools::find("mke2fs").context("no mke2fs")?])?,
        _ => BTreeMap::new(),
    };
    files.extend(tools.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
    let initramfs = room.folder.join(format!("{mode}.cpio"));
    fs::write(&initramfs, machine.initramfs(INIT, &DRIVERS, &files)?)?;
    let server = if served { Some(room.serve(image)?) } else { None };
    let (file, format) = match &server {
        Some(server) => (server.uri(), "raw"),
        None => (image.display().to_string(), "qcow2"),
    };
    let console = machine.boot(&initramfs, (&file, format), &format!("lab={mode}"))?;
    fs::write(room.folder.join(format!("{mode}.console")), &console)?;
    server.map_or(Ok(()), |server| server.stop())?;
    let said = read(&console).with_context(|| format!("boot `{mode}`"))?;
    disk::check(image, Verdict::Clean).with_context(|| format!("after boot `{mode}`"))?;
    Ok(said)
}

/// Reads the console.
fn read(console: &str) -> Result<Said> {
    let lines: Vec<&str> = console
        .lines()
        .filter_map(|line| line.find("LAB ").map(|start| line[start + 4..].trim_end()))
        .collect();
    if let Some(fault) = lines.iter().find(|line| line.starts_with("FAIL ")) {
        bail!("the guest says {fault}\n{}", cmd::tail(console, 2000));
    }
    if !lines.iter().any(|line| line.starts_with("DONE")) {
        bail!("the guest did not come to its end\n{}", cmd::tail(console, 2000));
    }
    let mut hashes = BTreeMap::new();
    let mut notes = Vec::new();
    for line in lines {
        match line.strip_prefix("HASH ").and_then(|line| line.split_once(' ')) {
            Some((hash, name)) if hash.len() == 64 => {
                hashes.insert(name.trim_start().to_owned(), hash.to_owned());
            }
            Some(_) => bail!("an odd line from the guest: {line}"),
            None => notes.push(line),
        }
    }
    Ok(Said { summary: notes.join(", "), hashes })
}

/// The manifest for the second boot: all that was written, and some of what must be as before.
fn expected(manifest: &str, hashes: &BTreeMap<String, String>) -> Result<String> {
    if hashes.len() < 100 {
        bail!("the guest wrote only {} files", hashes.len());
    }
    let mut text = String::new();
    for (name, hash) in hashes {
        text.push_str(&format!("{hash}  {name}\n"));
    }
    let paths = tree::paths(manifest).map(|path| path.to_string_lossy().into_owned());
    let kept = manifest
        .lines()
        .zip(paths)
        .filter(|(_, path)| !path.starts_with("usr/include") && !hashes.contains_key(path));
    for (line, _) in kept.step_by(SAMPLE) {
        text.push_str(line);
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_are_judged() {
        let hash = "0".repeat(64);
        let good =
            format!("noise\r\n[ 1.0] xLAB mounted\r\nLAB HASH {hash}  new/a b\r\nLAB DONE 1\r\n");
        let said = read(&good).unwrap();
        assert_eq!(said.hashes.get("new/a b"), Some(&hash));
        assert_eq!(said.summary, "mounted, DONE 1");
        assert!(read(&good.replace("LAB DONE", "LAB")).is_err());
        assert!(read(&format!("{good}LAB FAIL umount\n")).is_err());
        assert!(read("Kernel panic\n").is_err());
    }

    #[test]
    fn second_manifest_leaves_out_what_was_changed() {
        let hash = "1".repeat(64);
        let manifest: String = ["usr/include/x.h", "special/sparse", "usr/bin/a"]
            .iter()
            .map(|name| format!("{hash}  ./{name}\n"))
            .collect();
        let mut hashes: BTreeMap<String, String> =
            (0..100).map(|index| (format!("new/{index}"), "2".repeat(64))).collect();
        hashes.insert("special/sparse".into(), "3".repeat(64));
        let text = expected(&manifest, &hashes).unwrap();
        assert!(text.contains(&format!("{hash}  ./usr/bin/a\n")) && !text.contains("x.h"));
        assert!(text.contains(&format!("{}  special/sparse\n", "3".repeat(64))));
        assert_eq!(text.matches("special/sparse").count(), 1);
        assert!(expected(&manifest, &BTreeMap::new()).is_err());
    }
}
