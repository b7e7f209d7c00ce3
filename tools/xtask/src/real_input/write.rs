//! Write cases: nbdcopy writes a whole disk, fio writes with checksums. The result is judged by the
//! same server after a restart, by `qemu-img check`, and by QEMU reading the image on its own.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use super::server::{Server, Template};
use super::{Room, disk};
use crate::cmd::{self, program};
use disk::{SECTOR, SIZE, Verdict};

const MIB: u64 = 1 << 20;

/// Copies the disk into an empty image through the server.
pub(crate) fn copy(room: &Room<'_>) -> Result<String> {
    let image = empty(room)?;
    let disk = room.lab.assets.disk();
    let server = room.serve(&image)?;
    cmd::ok(program("nbdcopy", ["--flush"]).arg(&disk).arg(server.uri()))?;
    server.stop()?;
    disk::check(&image, Verdict::Clean)?;
    let mut compare = program("qemu-img", ["compare", "-f", "raw", "-F", "qcow2"]);
    cmd::ok(compare.arg(&disk).arg(&image))?;
    Ok("written by nbdcopy, checked and compared by qemu-img".to_owned())
}

/// What fio writes into.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// An empty image.
    Empty,
    /// A new overlay on the chain.
    Chain,
    /// An image of compressed clusters.
    Compressed,
}

impl Start {
    /// The word for it in the case's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Chain => "chain",
            Self::Compressed => "deflate",
        }
    }
}

/// An empty image in the case's folder.
fn empty(room: &Room<'_>) -> Result<PathBuf> {
    let image = room.folder.join("image.qcow2");
    let name = image.as_os_str();
    let words = ["create", "-q", "-f", "qcow2"].map(AsRef::as_ref);
    disk::qemu_img([&words[..], &[name, SIZE.to_string().as_ref()]].concat())?;
    Ok(image)
}

/// One region of the disk and the fio job that writes it. All sizes are in bytes.
struct Job {
    name: &'static str,
    offset: u64,
    size: u64,
    /// What the job does, one option a line.
    options: &'static str,
    /// Whether every byte of the region is written, with a checksum in each sector.
    whole: bool,
}

/// The jobs, one after another. What lies between and behind the regions must not change.
const JOBS: [Job; 5] = [
    Job {
        name: "sequential",
        offset: 0,
        size: 48 * MIB,
        options: "rw=write\nbssplit=4k/40:64k/30:256k/20:1m/10",
        whole: true,
    },
    Job {
        name: "random",
        offset: 64 * MIB,
        size: 48 * MIB,
        options: "rw=randwrite\nbssplit=512/10:4k/50:20k/20:64k/20\nfsync=100",
        whole: true,
    },
    // One 4 KiB block in each 64 KiB: the rest of each cluster is filled from below.
    Job {
        name: "strided",
        offset: 128 * MIB + STRIDE_AT,
        size: 32 * MIB,
        options: "rw=write:60k\nbs=4k\nio_size=2m\nfsync=50",
        whole: false,
    },
    // Written, thrown away in pieces, written again.
    Job {
        name: "trim",
        offset: 192 * MIB,
        size: 24 * MIB,
        options: "rw=randtrim\nbssplit=64k/60:4k/20:1m/20\nverify=0",
        whole: false,
    },
    Job {
        name: "again",
        offset: 192 * MIB,
        size: 24 * MIB,
        options: "rw=randwrite\nbssplit=4k/60:64k/40\nfsync=100",
        whole: true,
    },
];

/// Where in each 64 KiB the strided job writes: not at a cluster's start.
const STRIDE_AT: u64 = 12 << 10;
const STRIDE: u64 = 64 << 10;

/// Whether the jobs may change this sector.
fn written(sector: u64) -> bool {
    let at = sector * SECTOR as u64;
    JOBS.iter().any(|job| {
        let inside = (job.offset..job.offset + job.size).contains(&at);
        let strided = job.name == "strided";
        inside && (!strided || (at - job.offset) % STRIDE < 4 << 10)
    })
}

/// Writes with fio, then reads everything back through three different ways.
pub(crate) fn fio(room: &Room<'_>, start: Start) -> Result<String> {
    let image = match start {
        Start::Empty => empty(room)?,
        Start::Chain => room.writable("chain")?,
        Start::Compressed => room.writable("deflate")?,
    };
    let before = room.folder.join("before.raw");
    match start {
        Start::Empty => fs::File::create(&before)?.set_len(SIZE)?,
        Start::Chain | Start::Compressed => disk::copy(&room.lab.assets.disk(), &before)?,
    }

    let server = room.serve(&image)?;
    let written_bytes = run(room, &server, &write_jobs(&server.uri()))?;
    let memory = server.peak_memory()?;
    server.stop()?;
    disk::check(&image, Verdict::Clean)?;

    // The server again, with cold caches.
    let server = room.serve_read_only(&image)?;
    run(room, &server, &read_jobs(&server.uri()))?;
    server.stop()?;

    // QEMU on its own: fio's checksums, then everything that fio had no business to touch.
    let qemu = Template::parse("tools/lab/qemu-nbd-server {socket} {node}")?;
    let server = Server::start(&qemu, &room.folder, &room.node(&image), true)?;
    run(room, &server, &read_jobs(&server.uri()))?;
    server.stop()?;
    let after = room.folder.join("after.raw");
    disk::as_raw(&image, &after)?;
    disk::same(&before, &after, |sector| !written(sector))?;
    Ok(format!("{} MiB written, server used {memory} MiB", written_bytes >> 20))
}

/// Options of all jobs.
fn global(uri: &str) -> String {
    format!(
        "[global]\nioengine=nbd\nuri={uri}\niodepth=16\nverify=crc32c\nverify_interval=512\n\
         verify_fatal=1\nverify_dump=0\nrandrepeat=1\nstonewall\n"
    )
}

/// A job file that writes, and verifies each job after its writes.
fn write_jobs(uri: &str) -> String {
    let mut text = global(uri);
    for Job { name, offset, size, options, .. } in &JOBS {
        let _ = write!(text, "[{name}]\noffset={offset}\nsize={size}\n{options}\n");
        if *name == "trim" {
            // fio's trims need something to throw away.
            let fill = "rw=write\nbs=1m\nverify=0";
            let job = format!("[fill]\noffset={offset}\nsize={size}\n{fill}\n");
            text.insert_str(text.find("[trim]").unwrap_or(0), &job);
        }
    }
    text
}

/// A job file that only verifies what the other one left.
fn read_jobs(uri: &str) -> String {
    let mut text = global(uri);
    for Job { name, offset, size, options, whole } in &JOBS {
        let how = if *whole { "rw=read\nbs=64k" } else { "rw=read:60k\nbs=4k\nio_size=2m" };
        if !options.contains("verify=0") {
            let _ = write!(text, "[{name}]\noffset={offset}\nsize={size}\n{how}\n");
        }
    }
    text
}

/// Runs fio; returns how many bytes it wrote.
fn run(room: &Room<'_>, server: &Server, jobs: &str) -> Result<u64> {
    let file = room.folder.join("jobs.fio");
    fs::write(&file, jobs)?;
    let mut fio = Command::new("fio");
    fio.args(["--output-format=json", "--eta=never"]).arg(&file).current_dir(&room.folder);
    let done = cmd::run(&mut fio, cmd::LIMIT)?;
    if !done.status.success() {
        bail!("fio: {} on {}\n{}", done.status, server.socket().display(), done.tail());
    }
    report(&done.stdout, jobs)
}

/// Reads fio's report: every job must have moved data and met no error.
fn report(text: &str, jobs: &str) -> Result<u64> {
    // fio may print notes before the object.
    let start = text.find('{').unwrap_or(0);
    let report: serde_json::Value = serde_json::from_str(&text[start..])?;
    let empty = Vec::new();
    let results = report["jobs"].as_array().unwrap_or(&empty);
    let wanted = jobs.lines().filter(|line| line.starts_with('[')).count() - 1;
    if results.len() != wanted {
        bail!("fio reports {} jobs, not {wanted}", results.len());
    }
    let mut bytes = 0;
    for job in results {
        let moved = |kind: &str| job[kind]["io_bytes"].as_u64().unwrap_or(0);
        if job["error"] != 0 || moved("read") + moved("write") + moved("trim") == 0 {
            bail!("fio job {} did nothing or failed: error {}", job["jobname"], job["error"]);
        }
        bytes += moved("write");
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_do_not_meet_and_lie_on_the_disk() {
        assert!(written(0) && written(64 * 2048) && written(192 * 2048));
        assert!(!written(48 * 2048) && !written(216 * 2048) && !written(SIZE / 512 - 1));
        let strided = (128 * MIB + STRIDE_AT) / 512;
        assert!(written(strided) && written(strided + 7));
        assert!(!written(strided - 1) && !written(strided + 8));
    }

    #[test]
    fn reports_of_fio() {
        let jobs = "[global]\n[a]\n";
        let good = r#"note {"jobs": [{"jobname": "a", "error": 0, "write": {"io_bytes": 5}}]}"#;
        assert_eq!(report(good, jobs).unwrap(), 5);
        assert!(report(&good.replace("\"error\": 0", "\"error\": 84"), jobs).is_err());
        assert!(report(&good.replace(": 5", ": 0"), jobs).is_err());
        assert!(report(good, "[global]\n[a]\n[b]\n").is_err());
    }

    #[test]
    fn what_is_written_is_verified() {
        let (writes, reads) = (write_jobs("u"), read_jobs("u"));
        assert!(writes.find("[fill]") < writes.find("[trim]"));
        for job in &JOBS {
            assert!(writes.contains(&format!("[{}]", job.name)));
        }
        for name in ["sequential", "random", "strided", "again"] {
            assert!(reads.contains(&format!("[{name}]")));
        }
        assert!(!reads.contains("[trim]"));
    }
}
