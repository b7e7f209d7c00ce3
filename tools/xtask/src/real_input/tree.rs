//! The real directory tree: files of this machine's `/usr`, cut to a few hundred MiB by a rule that
//! always gives the same cut, and the special cases that they lack: sparse and empty files, links,
//! odd names, a full folder. With it goes a manifest that does not depend on any image.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cmd::{self, program};

/// Where files come from, and how many MiB of them are taken.
const SOURCES: [(&str, u64); 5] = [
    ("/usr/bin", 80),
    ("/usr/lib", 110),
    ("/usr/share", 80),
    ("/usr/include", 30),
    ("/usr/sbin", 10),
];

/// Less than this is no test of several hundred MiB.
const LEAST: u64 = 150 << 20;

/// Larger files would leave no room for many.
const LARGEST_FILE: u64 = 24 << 20;

/// A file below this size is small, and only so many small ones are taken from one source: most of
/// `/usr` is small files, and the guest's check takes time per file too.
const SMALL: u64 = 64 << 10;
const MOST_SMALL: usize = 1000;

/// Deepest folder that is searched.
const DEEPEST: usize = 12;

/// A changed rule makes a changed tree: part of the cache key.
pub(crate) const VERSION: u32 = 2;

/// Makes the tree in `folder`.
pub(crate) fn make(folder: &Path) -> Result<()> {
    let mut bytes = 0;
    for (source, mebibytes) in SOURCES {
        bytes += copy_some(Path::new(source), folder, mebibytes << 20)?;
    }
    if bytes < LEAST {
        bail!("only {} MiB of files under /usr: too few for this test", bytes >> 20);
    }
    special(folder).context("special files")
}

/// Copies files of `source` up to `budget` bytes; returns how many bytes.
fn copy_some(source: &Path, into: &Path, budget: u64) -> Result<u64> {
    let mut files = Vec::new();
    walk(source, 0, &mut files);
    // The hash of the path decides: the same files each time, from all over the tree.
    files.sort_by_key(|(path, _)| (fnv(path), path.clone()));
    let (mut used, mut small) = (0, 0);
    for (path, size) in files {
        let is_small = size < SMALL;
        if used + size > budget || is_small && small == MOST_SMALL {
            continue;
        }
        let target = into.join(path.trim_start_matches('/'));
        let parent = target.parent().context("no parent")?;
        fs::create_dir_all(parent)?;
        // Unreadable ones are left out: the user may not be root.
        if let Ok(copied) = fs::copy(&path, &target) {
            used += copied;
            small += usize::from(is_small);
        }
    }
    Ok(used)
}

/// All regular files below `folder` that are not empty, with their sizes.
fn walk(folder: &Path, depth: usize, files: &mut Vec<(String, u64)>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        let Ok(data) = fs::symlink_metadata(&path) else { continue };
        if data.is_dir() && depth < DEEPEST {
            walk(&path, depth + 1, files);
        } else if data.is_file() && (1..=LARGEST_FILE).contains(&data.len()) {
            // sha256sum writes such names in another form.
            match path.to_str() {
                Some(name) if !name.contains(['\\', '\n', '\r']) => {
                    files.push((name.to_owned(), data.len()));
                }
                _ => {}
            }
        }
    }
}

/// FNV-1a, 64 bits.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The special cases.
fn special(folder: &Path) -> Result<()> {
    let base = folder.join("special");
    fs::create_dir_all(base.join("many"))?;
    fs::create_dir_all(base.join("empty folder"))?;
    fs::create_dir_all(base.join("überall spaces in names"))?;
    fs::write(base.join("überall spaces in names/größe 1"), "x")?;
    for index in 0..600 {
        fs::write(base.join(format!("many/file-{index:04}")), format!("number {index}\n"))?;
    }
    for index in 0..40 {
        File::create(base.join(format!("empty-{index}")))?;
    }
    // Islands of data in holes; the last one ends in a hole.
    for (name, size, gap) in
        [("islands", 64 << 20, 5 << 20), ("odd islands", (48 << 20) + 123, (3 << 20) + 511)]
    {
        let file = File::create(base.join(format!("sparse {name}")))?;
        file.set_len(size)?;
        let mut at = gap;
        while at + 8192 < size {
            let word = format!("island at {at} of {name}\n");
            file.write_all_at(word.repeat(8192 / word.len()).as_bytes(), at)?;
            at += gap;
        }
    }
    File::create(base.join("sparse hole"))?.set_len(32 << 20)?;
    fs::hard_link(base.join("many/file-0000"), base.join("hard link"))?;
    symlink("many/file-0001", base.join("relative link"))?;
    symlink("/nowhere/at/all", base.join("dangling link"))?;
    symlink("../special/many", base.join("folder link"))?;
    // Longer than what fits into the inode.
    symlink(format!("{}many/file-0002", "./".repeat(60)), base.join("long link"))?;
    Ok(())
}

/// The names of a tree's links and what they point at, one `NAME TAB TARGET` a line.
pub(crate) fn links(folder: &Path) -> Result<String> {
    let base = folder.join("special");
    let mut lines = Vec::new();
    for entry in fs::read_dir(&base)? {
        let path = entry?.path();
        if let Ok(target) = fs::read_link(&path) {
            let name = path.strip_prefix(folder)?;
            lines.push(format!("{}\t{}\n", name.display(), target.display()));
        }
    }
    lines.sort();
    Ok(lines.concat())
}

/// The SHA-256 of every regular file, in the form that `sha256sum -c` reads, sorted by name.
pub(crate) fn manifest(folder: &Path) -> Result<String> {
    let script = "find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum";
    let text = cmd::ok(program("sh", ["-c", script]).current_dir(folder))?;
    if text.lines().any(|line| line.len() < 67 || !line.is_char_boundary(64)) {
        bail!("sha256sum printed an odd line");
    }
    Ok(text)
}

/// The paths in a manifest, without `./`.
pub(crate) fn paths(manifest: &str) -> impl Iterator<Item = PathBuf> {
    manifest
        .lines()
        .filter_map(|line| line.get(66..))
        .map(|name| PathBuf::from(name.strip_prefix("./").unwrap_or(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_files_links_and_manifest() {
        let folder = std::env::temp_dir().join(format!("xtask-tree-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        special(&folder).unwrap();
        let links = links(&folder).unwrap();
        assert!(links.contains("special/dangling link\t/nowhere/at/all\n"));
        assert_eq!(links.lines().count(), 4);
        let manifest = manifest(&folder).unwrap();
        assert_eq!(paths(&manifest).count(), 600 + 40 + 3 + 1 + 1);
        assert!(paths(&manifest).any(|path| path == Path::new("special/hard link")));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_cut_keeps_to_its_budget_and_repeats() {
        let folder = std::env::temp_dir().join(format!("xtask-cut-{}", std::process::id()));
        let mut cuts = Vec::new();
        for name in ["a", "b"] {
            let into = folder.join(name);
            let used = copy_some(Path::new("/usr/bin"), &into, 1 << 20).unwrap();
            assert!(used <= 1 << 20);
            cuts.push(manifest(&into).unwrap());
        }
        assert!(!cuts[0].is_empty());
        assert_eq!(cuts[0], cuts[1]);
        fs::remove_dir_all(folder).unwrap();
    }
}
