//! Processes of peers.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use bench::Error;
use bench::server::Server;

/// How long a program may take to say its version, or to do one thing of control; how often it is looked
/// at.
const SOON: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_millis(5);

/// Steps between a socket's being there and somebody's listening, at most.
const LISTENING: u32 = 200;

/// Bytes that are read of what a program prints.
const MOST: u64 = 64 << 20;

/// A server that runs, and is asked by NBD. Ended when dropped.
pub(crate) trait Process {
    /// Where it listens.
    fn socket(&self) -> &Path;

    /// Names of its exports.
    fn exports(&self) -> &[String];

    /// The process that does the work.
    fn pid(&self) -> u32;

    /// What is to be said of it now that talking to it has failed like this: whether it has died, and
    /// the end of its log.
    fn explain(&mut self, why: &str) -> Error;

    /// Ends it in order.
    ///
    /// # Errors
    /// If it does not end, or not well.
    fn stop(self: Box<Self>) -> Result<(), Error>;
}

/// A server that is a child of this process.
pub(crate) struct Child {
    server: Server,
    exports: Vec<String>,
}

impl Child {
    pub(crate) fn new(server: Server, exports: Vec<String>) -> Child {
        Child { server, exports }
    }

    /// One that has begun to listen.
    pub(crate) fn listening(
        mut server: Server,
        exports: Vec<String>,
    ) -> Result<Box<dyn Process>, Error> {
        server.wait_for_socket()?;
        Ok(Box::new(Child::new(server, exports)))
    }

    /// Waits until it has ended, which it was told, or tells it.
    pub(crate) fn end(self) -> Result<(), Error> {
        self.server.stop()
    }
}

impl Process for Child {
    fn socket(&self) -> &Path {
        self.server.socket()
    }

    fn exports(&self) -> &[String] {
        &self.exports
    }

    fn pid(&self) -> u32 {
        self.server.id()
    }

    fn explain(&mut self, why: &str) -> Error {
        self.server.explain(why)
    }

    fn stop(self: Box<Self>) -> Result<(), Error> {
        self.end()
    }
}

/// Tries to connect until somebody listens, for as long as that may take.
pub(crate) fn connect<T>(to: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
    for _ in 0..LISTENING {
        if let Ok(connected) = to() {
            return Ok(connected);
        }
        std::thread::sleep(STEP);
    }
    to()
}

/// Where programs are that PATH does not name: system folders, and where XCP-ng has qemu-dp and tapdisk.
const FOLDERS: [&str; 5] =
    ["/usr/sbin", "/sbin", "/usr/lib64/qemu-dp/bin", "/usr/libexec", "/opt/spdk/build/bin"];

/// Folders in which programs of peers are looked for: those of PATH, and where hosts have them else.
pub fn folders() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(FOLDERS.map(PathBuf::from)).collect()
}

/// The program of that name.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    folders().into_iter().map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// What a program prints, on both ways out; `None` if it does not end soon, or cannot be run.
pub(crate) fn output(program: &str, args: &[&str]) -> Option<String> {
    let mut command = Command::new(find(program)?);
    command.args(args);
    ask(command, SOON).ok().map(|(_, text)| text)
}

/// Runs a command; whether it succeeded, and what it printed.
///
/// # Errors
/// If it cannot be run, or does not end in that time.
pub(crate) fn ask(mut command: Command, within: Duration) -> Result<(bool, String), Error> {
    let name = command.get_program().display().to_string();
    let fail = |e: &dyn std::fmt::Display| Error::other(format!("{name}: {e}"));
    // In a file: a pipe could be full, and children that live on could hold it open.
    let mut out = tempfile::tempfile().map_err(|e| fail(&e))?;
    let (to, too) =
        (out.try_clone().map_err(|e| fail(&e))?, out.try_clone().map_err(|e| fail(&e))?);
    command.stdin(Stdio::null()).stdout(to).stderr(too);
    let mut child = bench::server::spawn(&name, &mut command)?;
    for _ in 0..within.as_millis() / STEP.as_millis() {
        if let Some(status) = child.try_wait().map_err(|e| fail(&e))? {
            let mut text = Vec::new();
            out.seek(SeekFrom::Start(0)).map_err(|e| fail(&e))?;
            out.take(MOST).read_to_end(&mut text).map_err(|e| fail(&e))?;
            return Ok((status.success(), String::from_utf8_lossy(&text).into_owned()));
        }
        std::thread::sleep(STEP);
    }
    let _ = child.kill();
    let _ = child.wait();
    Err(fail(&format!("did not end within {} s", within.as_secs())))
}

/// The same of one that must succeed, and soon.
pub(crate) fn done(command: Command) -> Result<String, Error> {
    done_within(command, SOON)
}

/// The same of one that may take longer.
pub(crate) fn done_within(command: Command, within: Duration) -> Result<String, Error> {
    let text = format!("{command:?}");
    match ask(command, within)? {
        (true, out) => Ok(out),
        (false, out) => Err(Error::other(format!("{text}: {}", out.trim()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_a_program_prints_comes_back_however_much_it_is() {
        let text = done(shell("head -c 300000 /dev/zero | tr '\\0' x; echo y >&2")).unwrap();
        assert_eq!((text.len(), text.ends_with("xy\n")), (300_002, true));
    }

    #[test]
    fn failure_and_silence_are_errors() {
        let e = done(shell("echo no disk; exit 3")).unwrap_err().to_string();
        assert!(e.contains("no disk"), "{e}");
        let e = ask(shell("sleep 60"), Duration::from_millis(100)).unwrap_err().to_string();
        assert!(e.contains("did not end"), "{e}");
        assert_eq!(output("no-such-program-here", &[]), None);
    }
}
