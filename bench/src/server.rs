//! [`Server`]: a server in a process of its own, to be loaded and measured from outside; and starting
//! processes as such, where they should run.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
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
const ENDING: u32 = 40;

/// Bytes of a log's end that are told.
const LOG: usize = 2000;

/// The calling thread.
const THIS: Pid = Pid::from_raw(0);

/// The process; ended when dropped.
pub struct Server {
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
        Server::start("polldisk nbd", command, socket, scratch.join("server.log"), None)
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
        let name = format!("qemu-storage-daemon, aio={aio}");
        Server::start(&name, command, socket, scratch.join("server.log"), None)
    }

    /// Starts the server `command`, which will listen at `socket`. What it says of errors goes to `log`.
    /// `core`: the processor that all of it runs on.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(
        name: &str,
        mut command: Command,
        socket: PathBuf,
        log: PathBuf,
        core: Option<usize>,
    ) -> Result<Server, Error> {
        let to = File::create(&log).map_err(Error::other)?;
        let _ = std::fs::remove_file(&socket);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(to);
        let child = pinned(core, || spawn(name, &mut command))?;
        Ok(Server { name: name.to_owned(), child, socket, log })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The number of its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until its socket is there. It may take a moment more until it listens.
    ///
    /// # Errors
    /// If it ends before, or takes too long; with the end of its log.
    pub fn wait_for_socket(&mut self) -> Result<(), Error> {
        for _ in 0..TRIES {
            if self.child.try_wait().map_err(Error::other)?.is_some() {
                break;
            }
            if self.socket.exists() {
                return Ok(());
            }
            std::thread::sleep(STEP);
        }
        Err(self.explain("does not listen"))
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
        Err(self.explain("does not listen"))
    }

    /// An error that says what went wrong, whether the server has ended, and what its log says last.
    pub fn explain(&mut self, what: &str) -> Error {
        // A connection that breaks tells of an end a little before the process has.
        let mut status = None;
        for _ in 0..ENDING {
            status = self.child.try_wait().ok().flatten();
            if status.is_some() {
                break;
            }
            std::thread::sleep(STEP);
        }
        let ended = status.map_or(String::new(), |status| format!(" (it has ended: {status})"));
        let text = std::fs::read(&self.log).unwrap_or_default();
        let last = &text[text.len().saturating_sub(LOG)..];
        let last = String::from_utf8_lossy(last);
        let lines: Vec<&str> = last.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        let last = if lines.is_empty() { "is empty".to_owned() } else { lines.join("; ") };
        let log = self.log.display();
        Error::other(format!("{}: {what}{ended}; its log {log}: {last}", self.name))
    }

    /// Tells what it takes.
    pub(crate) fn costs(&self) -> Result<Costs, Error> {
        Costs::of(self.child.id())
    }

    fn pid(&self) -> Result<Pid, Error> {
        Ok(Pid::from_raw(i32::try_from(self.child.id()).map_err(Error::other)?))
    }

    /// Tells it to end, and waits until it has.
    ///
    /// # Errors
    /// If it does not, or not well; with the end of its log.
    pub fn stop(mut self) -> Result<(), Error> {
        // One that has ended already is told nothing.
        if self.child.try_wait().map_err(Error::other)?.is_none() {
            kill(self.pid()?, Signal::SIGTERM).map_err(Error::other)?;
        }
        for _ in 0..TRIES {
            match self.child.try_wait().map_err(Error::other)? {
                Some(status) if status.success() => return Ok(()),
                Some(_) => return Err(self.explain("was told to end")),
                None => std::thread::sleep(STEP),
            }
        }
        Err(self.explain("does not end"))
    }
}

/// Starts a process that can be told to end: this program may have signals blocked, which a child
/// inherits.
///
/// # Errors
/// If it cannot be started.
pub fn spawn(name: &str, command: &mut Command) -> Result<Child, Error> {
    let mask = SigSet::empty().thread_swap_mask(SigmaskHow::SIG_SETMASK);
    let mask = mask.map_err(Error::other)?;
    let started = command.spawn().map_err(|e| Error::other(format!("{name}: {e}")));
    mask.thread_set_mask().map_err(Error::other)?;
    started
}

/// Does something on one processor, which processes that are started meanwhile inherit.
///
/// # Errors
/// If the processor is not to be had; and as `what`.
pub fn pinned<T>(core: Option<usize>, what: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let Some(core) = core else { return what() };
    let before = sched_getaffinity(THIS).map_err(Error::other)?;
    reactor::pin_current_thread(core).map_err(Error::other)?;
    let done = what();
    sched_setaffinity(THIS, &before).map_err(Error::other)?;
    done
}

/// Processors that this process may use.
///
/// # Errors
/// If the kernel does not say which.
pub fn allowed() -> Result<Vec<usize>, Error> {
    let set = sched_getaffinity(THIS).map_err(Error::other)?;
    Ok((0..CpuSet::count()).filter(|&c| set.is_set(c).unwrap_or(false)).collect())
}

impl Drop for Server {
    fn drop(&mut self) {
        // Of one that has ended nothing is left to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, scratch: &Path) -> Server {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let (socket, log) = (scratch.join("s.sock"), scratch.join("s.log"));
        Server::start("a server", command, socket, log, None).unwrap()
    }

    #[test]
    fn one_that_ends_says_why_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut server = shell("echo no such image >&2; exit 3", dir.path());
        let e = server.wait_for_socket().unwrap_err().to_string();
        for text in ["a server", "does not listen", "exit status: 3", "s.log", "no such image"] {
            assert!(e.contains(text), "{e}");
        }
    }

    #[test]
    fn children_run_where_they_are_started() {
        let Some(&last) = allowed().unwrap().last() else { panic!("no processor") };
        let list = || {
            let out =
                Command::new("cat").arg("/proc/self/status").output().map_err(Error::other)?;
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            let line = text.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
            Ok(line.unwrap_or_default().trim().to_owned())
        };
        let before = allowed().unwrap();
        assert_eq!(pinned(Some(last), list).unwrap(), last.to_string());
        assert_eq!(allowed().unwrap(), before);
        assert!(pinned(Some(1 << 20), list).is_err());
    }
}
