//! What a server does under load: its stacks, by `perf`, folded.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bench::Error;
use inferno::collapse::Collapse;
use inferno::collapse::perf::{Folder, Options};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::peer::{done_within, find};

/// Samples a second: no multiple of what else ticks.
const RATE: &str = "997";

/// How long perf may take to end, or to print what it has recorded.
const PATIENCE: Duration = Duration::from_secs(120);
const STEP: Duration = Duration::from_millis(10);

/// `perf record`, attached to a process; ended when dropped.
pub(crate) struct Sampler {
    child: Child,
    data: PathBuf,
}

impl Sampler {
    /// Begins.
    ///
    /// # Errors
    /// If there is no perf.
    pub(crate) fn start(pid: u32, scratch: &Path) -> Result<Sampler, Error> {
        let program = find("perf").ok_or_else(|| {
            Error::other("perf is not on PATH (on Debian: apt-get install linux-perf)")
        })?;
        let data = scratch.join("perf.data");
        let mut command = Command::new(program);
        command.args(["record", "-q", "-F", RATE, "-g", "-p", &pid.to_string(), "-o"]).arg(&data);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = bench::server::spawn("perf", &mut command)?;
        Ok(Sampler { child, data })
    }

    /// Ends, and folds what was seen.
    ///
    /// # Errors
    /// If perf could not attach, or saw nothing.
    pub(crate) fn finish(mut self) -> Result<Vec<String>, Error> {
        let pid = i32::try_from(self.child.id()).map_err(Error::other)?;
        // One that has ended by itself has said why in its status.
        let _ = kill(Pid::from_raw(pid), Signal::SIGINT);
        let mut steps = PATIENCE.as_millis() / STEP.as_millis();
        while self.child.try_wait().map_err(Error::other)?.is_none() {
            if steps == 0 {
                return Err(Error::other("perf record does not end"));
            }
            steps -= 1;
            std::thread::sleep(STEP);
        }
        let mut command = Command::new("perf");
        command.args(["script", "-f", "-i"]).arg(&self.data);
        let text = done_within(command, PATIENCE)?;
        fold(&text)
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // One that has ended needs no more.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.data);
    }
}

fn fold(script: &str) -> Result<Vec<String>, Error> {
    let mut folded = Vec::new();
    let collapsed = Folder::from(Options::default()).collapse(script.as_bytes(), &mut folded);
    collapsed.map_err(|e| Error::other(format!("what perf saw cannot be read: {e}")))?;
    let text = String::from_utf8_lossy(&folded);
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if lines.is_empty() {
        return Err(Error::other("perf saw nothing"));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacks_are_folded() {
        let script = "\
server 100 1.000000: 1 cpu-clock:
\tffffffff81000001 do_syscall_64+0x1 ([kernel.kallsyms])
\t    000000000001 write+0x1 (/lib/libc.so.6)
\t    000000000002 main+0x2 (/bin/server)

server 100 1.001000: 1 cpu-clock:
\tffffffff81000001 do_syscall_64+0x1 ([kernel.kallsyms])
\t    000000000001 write+0x1 (/lib/libc.so.6)
\t    000000000002 main+0x2 (/bin/server)

";
        assert_eq!(fold(script).unwrap(), ["server;main;write;do_syscall_64 2"]);
        assert!(fold("").is_err());
    }
}
