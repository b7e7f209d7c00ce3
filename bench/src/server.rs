//! [`Server`]: a server in a process of its own, to be loaded and measured from outside.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill};
use nix::unistd::Pid;

use crate::Error;
use crate::run::Nbd;
use crate::run::meter::Costs;

/// The export's name, at every server.
const EXPORT: &str = "bench";

/// How long a server may be silent.
const SILENCE: Duration = Duration::from_secs(60);

/// How often, and in which steps, a server is asked whether it listens, or has ended.
const TRIES: u32 = 6000;
const STEP: Duration = Duration::from_millis(5);

/// The process; ended when dropped.
pub(crate) struct Server {
    name: String,
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Server {
    /// This program's own server of a QCOW2 image.
    pub(crate) fn polldisk(image: &Path, scratch: &Path) -> Result<Server, Error> {
        let socket = scratch.join("polldisk.sock");
        let program = std::env::current_exe().map_err(Error::other)?;
        let mut command = Command::new(program);
        command.arg("nbd").arg("--socket").arg(&socket);
        command.args(["--export", EXPORT]).arg(image);
        Server::start("polldisk nbd", command, socket, scratch)
    }

    /// QEMU's, past the host's page cache. With `log` there is a node between format and file that
    /// writes down there what it passes on.
    pub(crate) fn qemu(
        aio: &str,
        image: &Path,
        log: Option<&Path>,
        scratch: &Path,
    ) -> Result<Server, Error> {
        let socket = scratch.join("qemu.sock");
        let mut command = Command::new("qemu-storage-daemon");
        let file = image.display();
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=file,filename={file},cache.direct=on,aio={aio}"));
        if let Some(log) = log {
            let log = log.display();
            command.arg("--blockdev").arg(format!("driver=file,node-name=log,filename={log}"));
            command.args(["--blockdev", "driver=blklogwrites,node-name=under,file=file,log=log"]);
        }
        let under = if log.is_some() { "under" } else { "file" };
        command.arg("--blockdev").arg(format!("driver=qcow2,node-name=image,file={under}"));
        command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        let export = format!("type=nbd,id=export,node-name=image,name={EXPORT},writable=on");
        command.arg("--export").arg(export);
        Server::start(&format!("qemu-storage-daemon, aio={aio}"), command, socket, scratch)
    }

    fn start(
        name: &str,
        mut command: Command,
        socket: PathBuf,
        scratch: &Path,
    ) -> Result<Server, Error> {
        let log = scratch.join("server.log");
        let to = File::create(&log).map_err(Error::other)?;
        let _ = std::fs::remove_file(&socket);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(to);
        let child = spawn(name, &mut command)?;
        Ok(Server { name: name.to_owned(), child, socket, log })
    }

    /// Connects as soon as it listens.
    pub(crate) fn connect(&mut self) -> Result<Nbd, Error> {
        for _ in 0..TRIES {
            if self.child.try_wait().map_err(Error::other)?.is_some() {
                break;
            }
            if self.socket.exists()
                && let Ok(client) = Nbd::connect(&self.socket, EXPORT, SILENCE)
            {
                return Ok(client);
            }
            std::thread::sleep(STEP);
        }
        Err(self.error("does not listen"))
    }

    fn error(&self, what: &str) -> Error {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        Error::other(format!("{}: {what}: {}", self.name, text.trim()))
    }

    /// Tells what it takes.
    pub(crate) fn costs(&self) -> Result<Costs, Error> {
        Costs::of(self.child.id())
    }

    fn pid(&self) -> Result<Pid, Error> {
        Ok(Pid::from_raw(i32::try_from(self.child.id()).map_err(Error::other)?))
    }

    /// Tells it to end, and waits until it has.
    pub(crate) fn stop(mut self) -> Result<(), Error> {
        kill(self.pid()?, Signal::SIGTERM).map_err(Error::other)?;
        for _ in 0..TRIES {
            match self.child.try_wait().map_err(Error::other)? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(self.error(&status.to_string())),
                None => std::thread::sleep(STEP),
            }
        }
        Err(self.error("does not end"))
    }
}

/// Starts a process that can be told to end: this program may have signals blocked, which a child
/// inherits.
pub(crate) fn spawn(name: &str, command: &mut Command) -> Result<Child, Error> {
    let mask = SigSet::empty().thread_swap_mask(SigmaskHow::SIG_SETMASK);
    let mask = mask.map_err(Error::other)?;
    let started = command.spawn().map_err(|e| Error::other(format!("{name}: {e}")));
    mask.thread_set_mask().map_err(Error::other)?;
    started
}

impl Drop for Server {
    fn drop(&mut self) {
        // Of one that has ended nothing is left to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
