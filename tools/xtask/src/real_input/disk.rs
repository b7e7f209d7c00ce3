//! Small helpers around disk images: what cases and assets both need. Called on the main thread.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cmd::{self, LIMIT, program, say};

/// Size of every disk in the lab, in bytes.
pub(crate) const SIZE: u64 = 512 << 20;

/// Smallest unit that is compared or written.
pub(crate) const SECTOR: usize = 512;

/// A small random number generator (splitmix64): fixed seeds give the same test each time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// `qemu-img` with arguments, to its end.
pub(crate) fn qemu_img<S: AsRef<std::ffi::OsStr>>(
    arguments: impl IntoIterator<Item = S>,
) -> Result<String> {
    cmd::ok(&mut program("qemu-img", arguments))
}

/// What `qemu-img check` may find.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Clean,
    /// Clusters that nobody uses: allowed after a crash.
    LeaksAllowed,
}

/// `qemu-img check`; returns whether there are leaks. Corruption is an error in any case.
pub(crate) fn check(image: &Path, verdict: Verdict) -> Result<bool> {
    let mut tries = 0;
    let done = loop {
        let mut command = Command::new("qemu-img");
        command.args(["check", "-f", "qcow2"]).arg(image);
        let done = cmd::run(&mut command, LIMIT)?;
        // A killed process's writes in flight end in the kernel, and until then its lock stands:
        // rightly, since nobody may open the image before.
        let locked = done.status.code() == Some(1) && done.tail().contains("lock");
        if !locked || tries == 100 {
            break done;
        }
        tries += 1;
        std::thread::sleep(std::time::Duration::from_millis(100));
    };
    match (done.status.code(), verdict) {
        (Some(0), _) => Ok(false),
        (Some(3), Verdict::LeaksAllowed) => Ok(true),
        (code, _) => bail!("qemu-img check says {code:?}\n{}", done.tail()),
    }
}

/// The whole guest-visible content of an image as QEMU reads it, as a raw file.
pub(crate) fn as_raw(image: &Path, raw: &Path) -> Result<()> {
    qemu_img([
        "convert".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        "-O".as_ref(),
        "raw".as_ref(),
        image.as_os_str(),
        raw.as_os_str(),
    ])?;
    Ok(())
}

/// An overlay over a QCOW2 image.
pub(crate) fn overlay(image: &Path, backing: &Path, options: &str) -> Result<()> {
    let mut command = program("qemu-img", ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]);
    command.arg(backing);
    if !options.is_empty() {
        command.args(["-o", options]);
    }
    cmd::ok(command.arg(image))?;
    Ok(())
}

/// Copies an image, keeping holes; by reference where the file system can.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    cmd::ok(program("cp", ["--reflink=auto", "--sparse=always"]).arg(from).arg(to))?;
    Ok(())
}

/// Compares two raw files sector by sector where `wanted` (a sector number) says so, and reports
/// the first difference. Sizes must be equal.
pub(crate) fn same(left: &Path, right: &Path, wanted: impl Fn(u64) -> bool) -> Result<()> {
    let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
    let (a, b) = (open(left)?, open(right)?);
    let size = a.metadata()?.len();
    if size != b.metadata()?.len() {
        bail!("{} and {} have different sizes", left.display(), right.display());
    }
    let mut buffers = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < size {
        let length = usize::try_from((size - at).min(1 << 20))?;
        let (one, two) = (&mut buffers.0[..length], &mut buffers.1[..length]);
        a.read_exact_at(one, at)?;
        b.read_exact_at(two, at)?;
        if one != two {
            let pairs = one.chunks(SECTOR).zip(two.chunks(SECTOR));
            for (sector, (one, two)) in (at / SECTOR as u64..).zip(pairs) {
                if one != two && wanted(sector) {
                    let (left, right) = (left.display(), right.display());
                    bail!("{left} and {right} differ in sector {sector}");
                }
            }
        }
        at += length as u64;
    }
    Ok(())
}

/// Remembers how a file looks, to tell later that nobody touched it.
pub(crate) fn looks(file: &Path) -> Result<(u64, std::time::SystemTime)> {
    let data = fs::metadata(file).with_context(|| file.display().to_string())?;
    Ok((data.len(), data.modified()?))
}

/// The SHA-256 of a file, in hex.
pub(crate) fn sha256(file: &Path) -> Result<String> {
    let text = cmd::ok(&mut program("sha256sum", ["--".as_ref(), file.as_os_str()]))?;
    let hash = text.split_whitespace().next().context("no hash")?;
    Ok(hash.trim_start_matches('\\').to_owned())
}

/// A line of progress inside one step.
pub(crate) fn step(text: &str) {
    say(&format!("real-input:   {text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found_where_they_are_wanted() {
        let folder = std::env::temp_dir().join(format!("xtask-same-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (left, right) = (folder.join("l"), folder.join("r"));
        let mut bytes = vec![7; (1 << 20) + 1024];
        fs::write(&left, &bytes).unwrap();
        fs::write(&right, &bytes).unwrap();
        same(&left, &right, |_| true).unwrap();
        bytes[(1 << 20) + 600] = 8;
        fs::write(&right, &bytes).unwrap();
        let error = same(&left, &right, |_| true).unwrap_err().to_string();
        assert!(error.ends_with("differ in sector 2049"), "{error}");
        same(&left, &right, |sector| sector != 2049).unwrap();
        fs::write(&right, &bytes[1..]).unwrap();
        assert!(same(&left, &right, |_| false).is_err());
        fs::remove_dir_all(folder).unwrap();
    }
}
