//! `cargo xtask real-input`: a real file system inside images made by qemu-img, served by
//! `polldisk nbd`, read by nbdcopy and qemu-img, written by nbdcopy, fio and a Linux kernel, and
//! killed in the middle. After each case `qemu-img check` judges the image.
//!
//! One case after another on the main thread; each has its own folder, removed at its end. What
//! every run needs again (file system, images, QEMU, kernel) stays in the cache folder.

mod assets;
mod boot;
mod client;
mod crash;
mod disk;
mod read;
mod server;
mod tree;
mod write;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::cmd::{now, say};
use crate::suite::Tally;
use crate::tools::{self, Missing};
use assets::Assets;
use server::{Server, Template};

/// What the command can be told.
#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Another server: a command line with {socket} and {node} in it. `--read-only` is added
    /// behind it where nothing is written.
    #[arg(long, value_name = "CMD")]
    server: Option<String>,
    /// Run only the cases whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// The node kinds that each kind of case goes through.
const NODES: [&str; 2] = ["file", "model"];

/// What all cases share.
struct Lab {
    template: Template,
    assets: Assets,
    /// Folder for what cases write, on the same file system as the images.
    work: PathBuf,
}

/// What a case does; returns a note for the progress line.
type Action = Box<dyn Fn(&Room<'_>) -> Result<String>>;

/// One case: `name` is `KIND-INPUT-NODE`.
struct Case {
    name: String,
    run: Action,
}

/// What one case works with.
struct Room<'lab> {
    lab: &'lab Lab,
    /// `file` or `model`.
    kind: &'static str,
    /// The case's own folder.
    folder: PathBuf,
}

impl Room<'_> {
    /// The node string of an image.
    fn node(&self, image: &Path) -> String {
        format!("{}:{}", self.kind, image.display())
    }

    /// An image that the case may write, with the content of one of [`assets::IMAGES`]: a new
    /// overlay on the chain, a copy of any other.
    fn writable(&self, name: &str) -> Result<PathBuf> {
        let image = self.folder.join("image.qcow2");
        let from = self.lab.assets.image(name);
        if name == "chain" {
            disk::overlay(&image, &from, "")?;
        } else {
            disk::copy(&from, &image)?;
        }
        Ok(image)
    }

    /// Serves an image for reading and writing.
    fn serve(&self, image: &Path) -> Result<Server> {
        Server::start(&self.lab.template, &self.folder, &self.node(image), false)
    }

    /// Serves an image for reading.
    fn serve_read_only(&self, image: &Path) -> Result<Server> {
        Server::start(&self.lab.template, &self.folder, &self.node(image), true)
    }
}

/// Runs the command; false when a case failed.
pub(crate) fn command(args: &Args) -> Result<bool> {
    let tally = run(args)?;
    println!("{tally}");
    Ok(tally.good())
}

/// Runs all cases. A missing prerequisite is one skipped case.
pub(crate) fn run(args: &Args) -> Result<Tally> {
    let mut tally = Tally::default();
    let (lab, _lock) = match prepare(args) {
        Ok(ready) => ready,
        Err(error) => match error.downcast_ref::<Missing>() {
            Some(missing) => {
                println!("skipped: real-input: {missing}");
                tally.skipped += 1;
                return Ok(tally);
            }
            None => return Err(error),
        },
    };
    let mut cases = 0;
    for kind in NODES {
        for case in list(kind) {
            if args.only.as_ref().is_some_and(|text| !case.name.contains(text.as_str())) {
                continue;
            }
            cases += 1;
            let folder = lab.work.join(&case.name);
            fs::create_dir_all(&folder)?;
            let start = now();
            let room = Room { lab: &lab, kind, folder };
            let done = (case.run)(&room);
            let seconds = start.elapsed().as_secs_f64();
            let _ = fs::remove_file(server::socket(&room.folder));
            match done {
                Ok(note) => {
                    say(&format!("real-input: {}: ok, {seconds:.1} s; {note}", case.name));
                    tally.passed += 1;
                    fs::remove_dir_all(&room.folder)?;
                }
                Err(error) if error.is::<Missing>() => {
                    println!("skipped: real-input: {}: {error}", case.name);
                    tally.skipped += 1;
                }
                Err(error) => {
                    say(&format!("real-input: {}: FAILED, {seconds:.1} s: {error:#}", case.name));
                    say(&format!("real-input: its files stay in {}", room.folder.display()));
                    tally.failed += 1;
                }
            }
        }
    }
    if cases == 0 {
        bail!("no case has this text in its name");
    }
    Ok(tally)
}

/// All cases of one node kind.
fn list(kind: &'static str) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: String, run: Action| {
        cases.push(Case { name: format!("{name}-{kind}"), run });
    };
    for image in assets::IMAGES {
        add(format!("read-{image}"), Box::new(move |room| read::case(room, image)));
    }
    add("copy-empty".to_owned(), Box::new(write::copy));
    for start in [write::Start::Empty, write::Start::Chain, write::Start::Compressed] {
        add(format!("fio-{}", start.name()), Box::new(move |room| write::fio(room, start)));
    }
    // A boot is slow: each image once is enough, the other cases cover the combinations.
    let boots: &[&str] = if kind == "file" { &["plain", "deflate"] } else { &["chain"] };
    for image in boots {
        add(format!("boot-{image}"), Box::new(move |room| boot::case(room, image)));
    }
    if kind == "file" {
        add("boot-made".to_owned(), Box::new(boot::made));
    }
    for image in ["chain", "deflate"] {
        add(format!("kill-{image}"), Box::new(move |room| crash::case(room, image)));
    }
    cases
}

/// Gets everything ready: programs, the server, the cached images. The lock keeps a second run of
/// the lab away until this one ends.
fn prepare(args: &Args) -> Result<(Lab, Flock<fs::File>)> {
    tools::need(&["fio", "nbdcopy", "qemu-img", "qemu-io", "qemu-nbd", "mke2fs", "e2fsck"])?;
    let folder = crate::cache().join("real-input");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let lock = fs::File::create(folder.join("lock"))?;
    let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    let template = match &args.server {
        Some(text) => Template::parse(text)?,
        None => Template::polldisk()?,
    };
    let assets = Assets::prepare(&folder)?;
    let work = folder.join("work");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    fs::create_dir_all(&work)?;
    Ok((Lab { template, assets, work }, lock))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_case_goes_through_every_node() {
        for kind in NODES {
            let names: Vec<String> = list(kind).into_iter().map(|case| case.name).collect();
            for part in ["read-", "copy-", "fio-", "boot-", "kill-"] {
                assert!(names.iter().any(|name| name.starts_with(part)), "{part} {names:?}");
            }
            assert!(names.iter().all(|name| name.ends_with(kind)));
        }
    }
}
