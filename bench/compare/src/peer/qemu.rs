//! qemu-storage-daemon and qemu-nbd.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use bench::Error;
use bench::server::Server;

use super::process::{Child, Process};
use super::{EXPORT, Place};

/// How requests come to the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Aio {
    /// Linux' AIO.
    #[default]
    Native,
    /// io_uring.
    IoUring,
    /// A pool of threads.
    Threads,
}

impl Aio {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Aio::Native => "native",
            Aio::IoUring => "io_uring",
            Aio::Threads => "threads",
        }
    }
}

/// Memory for L2 tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cache {
    /// All of it, in bytes.
    pub bytes: u64,
    /// What is loaded at a time, in bytes.
    pub entry: u64,
}

/// How one of QEMU's programs is set up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// How requests come to the kernel.
    pub aio: Aio,
    /// Past the page cache.
    pub direct: bool,
    /// Guests' flushes are ignored.
    pub no_flush: bool,
    /// Served by a thread of its own, which polls for a while before it sleeps.
    pub iothread: bool,
    /// Memory for L2 tables, and the study's letter for that; QEMU's default without it.
    pub cache: Option<(char, Cache)>,
}

impl Default for Options {
    fn default() -> Options {
        Options { aio: Aio::Native, direct: true, no_flush: false, iothread: false, cache: None }
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "aio={}", self.aio.name())?;
        if self.iothread {
            f.write_str(", iothread")?;
        }
        if !self.direct {
            f.write_str(", page cache")?;
        }
        if self.no_flush {
            f.write_str(", no flush")?;
        }
        if let Some((letter, Cache { bytes, entry })) = self.cache {
            let mib = bytes as f64 / f64::from(1 << 20);
            write!(f, ", {letter}: l2-cache {mib} MiB, entries {} KiB", entry >> 10)?;
        }
        Ok(())
    }
}

/// A value in QEMU's lists, in which a comma is written twice.
pub(super) fn value(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn on(yes: bool) -> &'static str {
    if yes { "on" } else { "off" }
}

impl Options {
    /// Of the node of the file. Whether a flush is dropped is asked of every node.
    fn file(&self, path: &Path) -> String {
        let (direct, no_flush) = (on(self.direct), on(self.no_flush));
        format!(
            "driver=file,filename={},aio={},cache.direct={direct},cache.no-flush={no_flush},\
             discard=unmap",
            value(path),
            self.aio.name()
        )
    }

    /// Of the node of the format, without its driver.
    fn format(&self) -> String {
        let (direct, no_flush) = (on(self.direct), on(self.no_flush));
        let mut text = format!("cache.direct={direct},cache.no-flush={no_flush},discard=unmap");
        if let Some((_, Cache { bytes, entry })) = self.cache {
            text += &format!(",l2-cache-size={bytes},l2-cache-entry-size={entry}");
        }
        text
    }
}

/// The daemon, with an export for each image.
pub(super) fn start_daemon(
    options: &Options,
    images: &[PathBuf],
    place: &Place<'_>,
) -> Result<Box<dyn Process>, Error> {
    let (socket, log) = (place.socket("qsd"), place.log("qemu-storage-daemon"));
    let command = daemon(options, images, &socket);
    let name = format!("qemu-storage-daemon ({options})");
    let server = Server::start(&name, command, socket, log, place.core)?;
    Child::listening(server, (0..images.len()).map(export).collect())
}

/// The name of one of several exports.
fn export(number: usize) -> String {
    if number == 0 { EXPORT.into() } else { format!("{EXPORT}{number}") }
}

fn daemon(options: &Options, images: &[PathBuf], socket: &Path) -> Command {
    let mut command = Command::new("qemu-storage-daemon");
    if options.iothread {
        command.args(["--object", "iothread,id=thread"]);
    }
    for (n, image) in images.iter().enumerate() {
        command.arg("--blockdev").arg(format!("{},node-name=file{n}", options.file(image)));
        let format = options.format();
        let node = format!("driver=qcow2,node-name=image{n},file=file{n},{format}");
        command.arg("--blockdev").arg(node);
    }
    command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", value(socket)));
    for n in 0..images.len() {
        let mut text =
            format!("type=nbd,id=export{n},node-name=image{n},name={},writable=on", export(n));
        if options.iothread {
            text += ",iothread=thread";
        }
        command.arg("--export").arg(text);
    }
    command
}

/// qemu-nbd, with one image.
pub(super) fn start_nbd(
    options: &Options,
    image: &Path,
    place: &Place<'_>,
) -> Result<Box<dyn Process>, Error> {
    let (socket, log) = (place.socket("qemu-nbd"), place.log("qemu-nbd"));
    let name = format!("qemu-nbd ({options})");
    let server = Server::start(&name, nbd(options, image, &socket), socket, log, place.core)?;
    Child::listening(server, vec![EXPORT.into()])
}

fn nbd(options: &Options, image: &Path, socket: &Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.arg("--socket").arg(socket).args(["--export-name", EXPORT, "--persistent"]);
    let cache = match (options.direct, options.no_flush) {
        (true, _) => "none",
        (false, false) => "writeback",
        (false, true) => "unsafe",
    };
    command.arg(format!("--cache={cache}")).arg(format!("--aio={}", options.aio.name()));
    command.args(["--discard=unmap", "--format=qcow2"]).arg(image);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(command: &Command) -> String {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_daemons_command_line() {
        let cache = Some(('H', Cache { bytes: 6_553_600, entry: 8192 }));
        let options = Options { aio: Aio::IoUring, iothread: true, cache, ..Options::default() };
        let images = ["/s/a,b.qcow2", "/s/c"].map(PathBuf::from);
        assert_eq!(
            args(&daemon(&options, &images, Path::new("/s/q.sock"))),
            "qemu-storage-daemon --object iothread,id=thread \
             --blockdev driver=file,filename=/s/a,,b.qcow2,aio=io_uring,cache.direct=on,\
             cache.no-flush=off,discard=unmap,node-name=file0 \
             --blockdev driver=qcow2,node-name=image0,file=file0,cache.direct=on,\
             cache.no-flush=off,discard=unmap,l2-cache-size=6553600,l2-cache-entry-size=8192 \
             --blockdev driver=file,filename=/s/c,aio=io_uring,cache.direct=on,\
             cache.no-flush=off,discard=unmap,node-name=file1 \
             --blockdev driver=qcow2,node-name=image1,file=file1,cache.direct=on,\
             cache.no-flush=off,discard=unmap,l2-cache-size=6553600,l2-cache-entry-size=8192 \
             --nbd-server addr.type=unix,addr.path=/s/q.sock \
             --export type=nbd,id=export0,node-name=image0,name=bench,writable=on,iothread=thread \
             --export type=nbd,id=export1,node-name=image1,name=bench1,writable=on,iothread=thread"
        );
        assert_eq!(
            options.to_string(),
            "aio=io_uring, iothread, H: l2-cache 6.25 MiB, entries 8 KiB"
        );
    }

    #[test]
    fn the_page_cache_and_dropped_flushes_are_asked_for() {
        let options = Options { direct: false, no_flush: true, ..Options::default() };
        let line = args(&daemon(&options, &["/s/a".into()], Path::new("/s/q.sock")));
        assert_eq!(line.matches("cache.direct=off,cache.no-flush=on").count(), 2, "{line}");
    }

    #[test]
    fn the_command_line_of_qemu_nbd() {
        let options = Options::default();
        assert_eq!(
            args(&nbd(&options, Path::new("/s/a"), Path::new("/s/n.sock"))),
            "qemu-nbd --socket /s/n.sock --export-name bench --persistent --cache=none \
             --aio=native --discard=unmap --format=qcow2 /s/a"
        );
    }
}
