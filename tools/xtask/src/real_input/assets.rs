//! The disk and the images of the lab, made once and kept in the cache folder:
//!
//! | file | content |
//! |---|---|
//! | `disk.raw` | the ext4 file system, made by `mke2fs -d` from the tree |
//! | `plain.qcow2`, `deflate.qcow2`, `zstd.qcow2` | that disk by `qemu-img convert` |
//! | `chain.qcow2` → `chain2` → `chain1` → `chain0` | that disk again, as an overlay of depth 3 |
//! | `manifest`, `links` | SHA-256 of each file, target of each link |
//!
//! The lower layers of the chain hold garbage in places that the layers above put right, so a read
//! that stops at the wrong layer is seen by a compare and by the file system alike. All images show
//! the same disk.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::disk::{self, Random, SECTOR, SIZE, Verdict, step};
use super::tree;
use crate::cmd::{self, program, say};
use crate::tools;

/// The images, all with the content of the disk.
pub(crate) const IMAGES: [&str; 4] = ["plain", "deflate", "zstd", "chain"];

/// A changed recipe needs new files: part of the cache key.
const RECIPE: u32 = 2;

/// Options of the chain's layers above the lowest: other cluster sizes, another refcount width.
const LAYERS: [&str; 3] = ["cluster_size=512k", "cluster_size=4k,refcount_bits=64", ""];

/// Places put right by each layer.
const PLACES: u64 = 60;

/// The cached files.
pub(crate) struct Assets {
    folder: PathBuf,
    /// `sha256sum` lines of all files in the file system.
    pub(crate) manifest: String,
    /// `NAME TAB TARGET` lines of its links.
    pub(crate) links: String,
}

impl Assets {
    /// Uses the cached files, or makes them.
    pub(crate) fn prepare(cache: &Path) -> Result<Self> {
        let qemu = disk::qemu_img(["--version"])?;
        let qemu = qemu.split_whitespace().nth(2).context("no version of qemu-img")?.to_owned();
        let key = format!("images-{RECIPE}-{}-{qemu}", tree::VERSION);
        let folder = cache.join(&key);
        if let Err(reason) = complete(&folder) {
            say(&format!("real-input: making the images ({reason:#})"));
            for entry in fs::read_dir(cache)? {
                let path = entry?.path();
                if path.is_dir() {
                    fs::remove_dir_all(path)?;
                }
            }
            fs::create_dir_all(&folder)?;
            make(&folder)?;
            fs::write(folder.join("complete"), stamp(&folder)?.to_string())?;
        }
        let read = |name| fs::read_to_string(folder.join(name));
        let (manifest, links) = (read("manifest")?, read("links")?);
        say(&format!("real-input: images ready, {} files in them", manifest.lines().count()));
        Ok(Self { folder, manifest, links })
    }

    /// The raw disk that every image shows.
    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.join("disk.raw")
    }

    /// One of [`IMAGES`].
    pub(crate) fn image(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.qcow2"))
    }
}

/// All files of the folder that must not change, with size, time and, for the disk, hash.
fn stamp(folder: &Path) -> Result<Value> {
    let mut names: Vec<_> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.retain(|name| name != "complete");
    names.sort();
    let mut files = Vec::new();
    for name in names {
        let (size, time) = disk::looks(&folder.join(&name))?;
        let time = time.duration_since(std::time::UNIX_EPOCH)?.as_nanos().to_string();
        files.push(json!([name, size, time]));
    }
    Ok(json!({ "files": files, "disk": disk::sha256(&folder.join("disk.raw"))? }))
}

/// Fails when the folder is not complete and untouched.
fn complete(folder: &Path) -> Result<()> {
    let Ok(text) = fs::read_to_string(folder.join("complete")) else { bail!("there are none") };
    if serde_json::from_str::<Value>(&text)? != stamp(folder)? {
        bail!("the old ones were changed");
    }
    Ok(())
}

/// Makes everything, and checks with QEMU alone that the images are what they should be.
fn make(folder: &Path) -> Result<()> {
    let tree = folder.join("tree");
    step("directory tree");
    tree::make(&tree)?;
    fs::write(folder.join("manifest"), tree::manifest(&tree)?)?;
    fs::write(folder.join("links"), tree::links(&tree)?)?;
    let raw = folder.join("disk.raw");
    step("mke2fs");
    file_system(&tree, &raw)?;
    fs::remove_dir_all(&tree)?;
    step("qemu-img convert");
    for (name, options) in [
        ("plain", &[][..]),
        ("deflate", &["-c", "-o", "compression_type=zlib"]),
        ("zstd", &["-c", "-o", "compression_type=zstd"]),
    ] {
        let mut command = program("qemu-img", ["convert", "-f", "raw", "-O", "qcow2"]);
        cmd::ok(command.args(options).arg(&raw).arg(folder.join(format!("{name}.qcow2"))))?;
    }
    step("overlays");
    chain(folder, &raw)?;
    for name in IMAGES {
        let image = folder.join(format!("{name}.qcow2"));
        disk::check(&image, Verdict::Clean)?;
        compare(&raw, &image).with_context(|| format!("{name}: QEMU itself reads another disk"))?;
    }
    Ok(())
}

/// An ext4 file system with the tree in it; identifiers are fixed, so that it is the same each time.
fn file_system(tree: &Path, raw: &Path) -> Result<()> {
    const UUID: &str = "6d9ff7c4-5a42-4a9e-b6d5-9a5ed8a4a3c1";
    File::create(raw)?.set_len(SIZE)?;
    let mut mke2fs = tools::command("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-U", UUID]);
    mke2fs.args(["-E", &format!("hash_seed={UUID},root_owner=0:0"), "-d"]).arg(tree).arg(raw);
    cmd::ok(mke2fs.env("E2FSPROGS_FAKE_TIME", "1700000000"))?;
    Ok(())
}

/// `qemu-img compare` of the disk with an image, by QEMU alone.
fn compare(raw: &Path, image: &Path) -> Result<()> {
    let mut command = program("qemu-img", ["compare", "-f", "raw", "-F", "qcow2"]);
    cmd::ok(command.arg(raw).arg(image))?;
    Ok(())
}

/// A place of the disk: offset and length in bytes.
type Place = (u64, u64);

/// The places that each of the three layers puts right, from single sectors to a few clusters.
fn places() -> [Vec<Place>; 3] {
    let mut random = Random(7);
    [(); 3].map(|()| {
        let one = |_| {
            let sectors = match random.below(4) {
                0 => 1 + random.below(8),
                1 => 8 * (1 + random.below(8)),
                2 => 128,
                _ => 1 + random.below(512),
            };
            let start = random.below(SIZE / SECTOR as u64 - sectors);
            (start * SECTOR as u64, sectors * SECTOR as u64)
        };
        (0..PLACES).map(one).collect()
    })
}

/// Makes the chain. A place of layer n holds garbage in all layers below n and the truth in n.
fn chain(folder: &Path, raw: &Path) -> Result<()> {
    let truth = File::open(raw)?;
    let places = places();
    let base = folder.join("chain.raw");
    disk::copy(raw, &base)?;
    let file = File::options().write(true).open(&base)?;
    for (offset, length) in places.iter().flatten() {
        file.write_all_at(&vec![0xa5; usize::try_from(*length)?], *offset)?;
    }
    let (base, lowest) = (base.as_os_str(), folder.join("chain0.qcow2"));
    let words = ["convert", "-f", "raw", "-O", "qcow2"].map(AsRef::as_ref);
    disk::qemu_img([&words[..], &[base, lowest.as_os_str()]].concat())?;
    fs::remove_file(base)?;
    let names = ["chain0.qcow2", "chain1.qcow2", "chain2.qcow2", "chain.qcow2"];
    let slices = folder.join("slices");
    for (layer, options) in LAYERS.iter().enumerate() {
        let image = folder.join(names[layer + 1]);
        // The name of the layer below is relative to this one's folder.
        disk::overlay(&image, Path::new(names[layer]), options)?;
        fs::create_dir_all(&slices)?;
        let mut script = String::new();
        for (offset, length) in places[layer + 1..].iter().flatten() {
            script.push_str(&format!("write -P 0x{:x} {offset} {length}\n", 0xa6 + layer));
        }
        for (index, (offset, length)) in places[layer].iter().enumerate() {
            let mut bytes = vec![0; usize::try_from(*length)?];
            truth.read_exact_at(&mut bytes, *offset)?;
            let slice = slices.join(index.to_string());
            if bytes.iter().any(|byte| *byte != 0) {
                fs::write(&slice, &bytes)?;
                script.push_str(&format!("write -s slices/{index} {offset} {length}\n"));
            } else {
                let zero = if index % 2 == 0 { "write -z" } else { "write -z -u" };
                script.push_str(&format!("{zero} {offset} {length}\n"));
            }
        }
        qemu_io(folder, &image, &script)?;
        fs::remove_dir_all(&slices)?;
        // The layers above must matter.
        if layer + 1 < LAYERS.len() && compare(raw, &image).is_ok() {
            bail!("layer {layer} of the chain already shows the whole disk");
        }
    }
    Ok(())
}

/// Runs a script of `qemu-io` commands on an image; each of them must succeed.
fn qemu_io(folder: &Path, image: &Path, script: &str) -> Result<()> {
    let file = folder.join("script");
    fs::write(&file, script)?;
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2"]).arg(image).current_dir(folder).stdin(Stdio::null());
    let mut child = command.stdin(File::open(&file)?).stdout(Stdio::piped()).spawn()?;
    let mut text = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().context("no output")?, &mut text)?;
    let status = child.wait()?;
    fs::remove_file(&file)?;
    let wrote = text.matches("wrote ").count();
    if !status.success() || wrote != script.lines().count() {
        bail!("qemu-io: {status}, {wrote} writes done\n{}", cmd::tail(&text, 1500));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_lie_on_the_disk_and_repeat() {
        let all = places();
        assert_eq!(all, places());
        for (offset, length) in all.iter().flatten() {
            assert!(*length > 0 && offset + length <= SIZE && offset % 512 == 0);
        }
        assert!(all[0] != all[1] && all[1] != all[2]);
    }
}
