//! [`Counts`]: instructions and system calls of another process.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use super::{Meter, Server};
use crate::Error;

/// How long `perf` and `strace` may take to attach, to answer, and to end.
const PATIENCE: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(5);

/// Counts instructions and system calls of a process and all its threads: by `perf stat` where the kernel
/// lets it, else system calls alone, and slowly, by `strace`.
///
/// To be used once.
pub struct Counts {
    pid: u32,
    by: Option<By>,
    missing: Option<String>,
}

enum By {
    Perf(Perf),
    Strace(Tool),
}

impl Counts {
    /// Of the process of this ID. What cannot be counted here is `None` later, and
    /// [`Meter::missing`] says why.
    pub fn of(pid: u32) -> Counts {
        Counts { pid, by: None, missing: None }
    }
}

impl Meter for Counts {
    fn begin(&mut self) -> Result<(), Error> {
        let perf = match Perf::start(self.pid) {
            Ok(perf) => {
                self.by = Some(By::Perf(perf));
                return Ok(());
            }
            Err(e) => e,
        };
        match strace(self.pid) {
            Ok(tool) => {
                self.missing = Some(format!("instructions: {perf}"));
                self.by = Some(By::Strace(tool));
            }
            Err(e) => self.missing = Some(format!("system calls and instructions: {perf}; {e}")),
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), Error> {
        match &mut self.by {
            Some(By::Perf(perf)) => perf.tell("disable"),
            Some(By::Strace(tool)) => tool.interrupt(),
            None => Ok(()),
        }
    }

    fn figures(&mut self) -> Result<Server, Error> {
        match self.by.take() {
            Some(By::Perf(perf)) => {
                let s = perf.figures()?;
                if s.instructions.is_none() {
                    let why = "instructions: this machine has no counter of them that may be read";
                    self.missing = Some(why.to_owned());
                }
                Ok(s)
            }
            Some(By::Strace(mut tool)) => {
                let text = tool.finish()?;
                Ok(Server { syscalls: strace_total(&text), ..Server::default() })
            }
            None => Ok(Server::default()),
        }
    }

    fn missing(&self) -> Option<&str> {
        self.missing.as_deref()
    }
}

/// A tool that is attached; ended when dropped.
struct Tool {
    name: &'static str,
    child: Child,
    dir: tempfile::TempDir,
}

impl Tool {
    fn start(name: &'static str, dir: tempfile::TempDir, args: &[&str]) -> Result<Tool, Error> {
        let log = File::create(dir.path().join("log")).map_err(Error::other)?;
        let mut command = Command::new(name);
        command.args(args).current_dir(dir.path()).env("LC_ALL", "C");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = crate::server::spawn(name, &mut command)?;
        Ok(Tool { name, child, dir })
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(file)).unwrap_or_default()
    }

    /// What it says of why it does not do it.
    fn error(&self, what: &str) -> Error {
        let log = self.read("log");
        let said = log.lines().map(str::trim).find(|l| !l.is_empty()).unwrap_or("it says nothing");
        Error::other(format!("{} {what}: {said}", self.name))
    }

    fn ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    fn interrupt(&mut self) -> Result<(), Error> {
        let pid = i32::try_from(self.child.id()).map_err(Error::other)?;
        kill(Pid::from_raw(pid), Signal::SIGINT).map_err(|_| self.error("has ended"))
    }

    /// Waits for its end, and returns what it has written.
    fn finish(&mut self) -> Result<String, Error> {
        for _ in 0..PATIENCE.as_millis() / STEP.as_millis() {
            if self.ended() {
                return Ok(self.read("out"));
            }
            std::thread::sleep(STEP);
        }
        Err(self.error("does not end"))
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        // One that has ended needs no more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `perf stat`, told by a pipe when to count.
struct Perf {
    tool: Tool,
    orders: File,
    answers: File,
}

impl Perf {
    fn start(pid: u32) -> Result<Perf, Error> {
        let dir = tempfile::tempdir().map_err(Error::other)?;
        let pipe = |name: &str| {
            let path = dir.path().join(name);
            mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(Error::other)?;
            // For both, so that opening it waits for nobody.
            File::options().read(true).write(true).open(&path).map_err(Error::other)
        };
        let (orders, answers) = (pipe("orders")?, pipe("answers")?);
        let pid = pid.to_string();
        let events = "instructions,raw_syscalls:sys_enter";
        #[rustfmt::skip]
        let args = [
            "stat", "-D", "-1", "--control", "fifo:orders,answers", "-x", ",", "-o", "out", "-e",
            events, "-p", &pid,
        ];
        let tool = Tool::start("perf", dir, &args)?;
        let mut perf = Perf { tool, orders, answers };
        perf.tell("enable")?;
        Ok(perf)
    }

    /// Gives an order, and waits for the answer.
    fn tell(&mut self, order: &str) -> Result<(), Error> {
        self.orders.write_all(format!("{order}\n").as_bytes()).map_err(Error::other)?;
        for _ in 0..PATIENCE.as_millis() / 50 {
            let mut fds = [PollFd::new(self.answers.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(50u8)).is_ok_and(|n| n > 0) {
                let mut answer = [0; 64];
                let n = self.answers.read(&mut answer).map_err(Error::other)?;
                return match answer[..n].starts_with(b"ack") {
                    true => Ok(()),
                    false => Err(self.tool.error("does not understand")),
                };
            }
            if self.tool.ended() {
                return Err(self.tool.error("does not count"));
            }
        }
        Err(self.tool.error("does not answer"))
    }

    fn figures(mut self) -> Result<Server, Error> {
        self.tool.interrupt()?;
        let text = self.tool.finish()?;
        Ok(perf_figures(&text))
    }
}

/// Reads what `perf stat -x ,` prints: value, unit, event, and more of no interest.
fn perf_figures(text: &str) -> Server {
    let value = |event: &str| {
        let mut lines = text.lines().map(|l| l.split(',').collect::<Vec<_>>());
        // An event that counts no kernel has another name, and one that does not count no number.
        let line = lines.find(|l| l.get(2).is_some_and(|e| *e == event))?;
        line[0].parse::<u64>().ok()
    };
    Server {
        instructions: value("instructions"),
        syscalls: value("raw_syscalls:sys_enter"),
        ..Server::default()
    }
}

fn strace(pid: u32) -> Result<Tool, Error> {
    let dir = tempfile::tempdir().map_err(Error::other)?;
    let mut tool = Tool::start("strace", dir, &["-f", "-c", "-o", "out", "-p", &pid.to_string()])?;
    for _ in 0..PATIENCE.as_millis() / STEP.as_millis() {
        if Path::exists(&tool.dir.path().join("log")) && tool.read("log").contains(" attached") {
            return Ok(tool);
        }
        if tool.ended() {
            return Err(tool.error("does not attach"));
        }
        std::thread::sleep(STEP);
    }
    Err(tool.error("does not attach"))
}

/// Reads the table of `strace -c`: share, seconds, microseconds a call, calls, errors, name.
fn strace_total(text: &str) -> Option<u64> {
    let total = text.lines().rev().find(|l| l.trim_end().ends_with(" total"))?;
    total.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_tools_print_is_understood() {
        let text = "# started on Fri\n\n<not supported>,,instructions,0,100.00,,\n\
                    109,,raw_syscalls:sys_enter,1154784,100.00,,\n";
        let s = perf_figures(text);
        assert_eq!((s.instructions, s.syscalls), (None, Some(109)));
        let s = perf_figures(
            "5,,instructions:u,1,100.00,,\n<not counted>,,raw_syscalls:sys_enter,0,0.00,,",
        );
        assert_eq!((s.instructions, s.syscalls), (None, None));
        assert_eq!(perf_figures("77,,instructions,1,100.00,,").instructions, Some(77));
        let text = "% time     seconds  usecs/call     calls    errors syscall\n\
                    ------ ----------- ----------- --------- --------- ----------------\n\
                    100.00    0.000018           0       250         2 read\n\
                    ------ ----------- ----------- --------- --------- ----------------\n\
                    100.00    0.000018           0       251         2 total\n";
        assert_eq!((strace_total(text), strace_total("")), (Some(251), None));
    }

    /// Makes ten system calls a round until its standard input ends.
    const CALLS: &str =
        "while read -r line; do for i in 1 2 3 4 5 6 7 8 9 10; do : < /dev/null; done; echo; done";

    #[test]
    fn system_calls_of_a_process_are_counted() {
        let mut command = Command::new("sh");
        command.args(["-c", CALLS]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut round = || {
            to.write_all(b"\n").unwrap();
            from.read_exact(&mut [0]).unwrap();
        };
        round();
        let mut counts = Counts::of(child.id());
        counts.begin().unwrap();
        if let Some(why) = counts.missing().filter(|_| counts.by.is_none()) {
            println!("skipped: {why}");
        } else {
            (0..5).for_each(|_| round());
            counts.end().unwrap();
            round();
            let n = counts.figures().unwrap().syscalls.unwrap();
            // At least opening, moving and closing; and nothing of what came after the end.
            assert!((150..1000).contains(&n), "{n}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let mut none = Counts::of(child.id());
        none.begin().unwrap();
        assert!(none.missing().is_some() && none.figures().unwrap() == Server::default());
    }
}
