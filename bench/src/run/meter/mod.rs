//! What a server takes while it is loaded: [`Meter`], and those of other processes.
//!
//! [`Costs`] reads what the kernel accounts anyway, so it may run while times count. [`Counts`] counts
//! instructions and system calls, by `perf` or else `strace`, which slow the server down: it is for a run
//! of its own. [`Server::with_counts`] puts the two together. [`ReactorMeter`] is both for a reactor of this
//! process.

mod counts;
mod reactor;

use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use std::time::Duration;

use super::{Outcome, Server};
use crate::Error;
pub use counts::Counts;
pub use reactor::ReactorMeter;

/// Tells what a server takes while requests are counted.
pub trait Meter {
    /// Counting begins; it has when this returns.
    ///
    /// # Errors
    /// If it cannot, as when the server has ended.
    fn begin(&mut self) -> Result<(), Error>;

    /// Counting ends, at once.
    ///
    /// # Errors
    /// As [`Meter::begin`].
    fn end(&mut self) -> Result<(), Error>;

    /// What was counted.
    ///
    /// # Errors
    /// As [`Meter::begin`].
    fn figures(&mut self) -> Result<Server, Error>;

    /// Why something of it could not be counted, and what to do about that.
    fn missing(&self) -> Option<&str> {
        None
    }
}

/// Processor time and context switches of a process.
///
/// Switches are those of its threads. Threads that end take theirs along, so a server whose threads live
/// as long as a connection must be measured within one.
pub struct Costs {
    pid: Pid,
    clock: ClockId,
    before: Server,
    after: Server,
}

impl Costs {
    /// Of the process of this ID.
    ///
    /// # Errors
    /// If there is none.
    pub fn of(pid: u32) -> Result<Costs, Error> {
        let raw = i32::try_from(pid).ok().filter(|&p| p > 0);
        let pid = raw.ok_or_else(|| Error::other(format!("process {pid}: no number of one")))?;
        let pid = Pid::from_raw(pid);
        let clock = clock_getcpuclockid(pid).map_err(|e| gone(pid, e))?;
        Ok(Costs { pid, clock, before: Server::default(), after: Server::default() })
    }

    /// Processor time that its threads have used so far, in the kernel too, in nanoseconds.
    ///
    /// # Errors
    /// If it has ended.
    pub fn cpu_ns(&self) -> Result<u64, Error> {
        let time = clock_gettime(self.clock).map_err(|e| gone(self.pid, e))?;
        Ok(Duration::from(time).as_nanos() as u64)
    }

    fn look(&self) -> Result<Server, Error> {
        let (cpu, switches) = (self.cpu_ns()?, switches(self.pid));
        Ok(Server { cpu_ns: Some(cpu), switches, ..Server::default() })
    }
}

impl Meter for Costs {
    fn begin(&mut self) -> Result<(), Error> {
        self.before = self.look()?;
        Ok(())
    }

    fn end(&mut self) -> Result<(), Error> {
        self.after = self.look()?;
        Ok(())
    }

    fn figures(&mut self) -> Result<Server, Error> {
        let since = |of: fn(&Server) -> Option<u64>| {
            of(&self.after).zip(of(&self.before)).map(|(a, b)| a.saturating_sub(b))
        };
        let (cpu_ns, switches) = (since(|s| s.cpu_ns), since(|s| s.switches));
        Ok(Server { cpu_ns, switches, ..Server::default() })
    }
}

impl Server {
    /// This one, of `outcome`, with instructions, system calls and allocations that were counted in a run
    /// of its own, in proportion to its requests.
    pub fn with_counts(self, requests: u64, counted: &Outcome) -> Server {
        let scale = |n: Option<u64>| {
            let each = n? as f64 / counted.requests.max(1) as f64;
            Some((each * requests as f64).round() as u64)
        };
        let c = &counted.server;
        Server {
            instructions: self.instructions.or(scale(c.instructions)),
            syscalls: self.syscalls.or(scale(c.syscalls)),
            allocations: self.allocations.or(scale(c.allocations)),
            ..self
        }
    }
}

fn gone(pid: Pid, e: impl std::fmt::Display) -> Error {
    Error::other(format!("process {pid} cannot be measured: {e}; has it ended?"))
}

/// Context switches of all threads so far, voluntary and not; `None` if the kernel does not say.
fn switches(pid: Pid) -> Option<u64> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        // A thread that has just ended has none any more.
        let Ok(text) = std::fs::read_to_string(task.ok()?.path().join("status")) else { continue };
        let lines = text.lines().filter_map(|l| l.split_once("ctxt_switches:"));
        sum += lines.filter_map(|(_, n)| n.trim().parse::<u64>().ok()).sum::<u64>();
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_of_a_process_are_its_own() {
        let mut own = Costs::of(std::process::id()).unwrap();
        own.begin().unwrap();
        let began = own.cpu_ns().unwrap();
        let mut n = 0u64;
        while own.cpu_ns().unwrap() - began < 5_000_000 {
            n = std::hint::black_box(n + 1);
        }
        std::thread::sleep(Duration::from_millis(1));
        own.end().unwrap();
        let s = own.figures().unwrap();
        assert!(s.cpu_ns.unwrap() >= 5_000_000 && s.switches.unwrap() >= 1, "{s:?}");
        assert_eq!((s.busy_ns, s.syscalls, s.instructions), (None, None, None));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let mut ended = Costs::of(child.id()).unwrap();
        child.wait().unwrap();
        assert!(ended.begin().unwrap_err().to_string().contains("has it ended?"));
        assert!(Costs::of(0).is_err() && Costs::of(u32::MAX).is_err());
    }

    #[test]
    fn counts_are_put_in_proportion() {
        let mut record = super::super::record::Record::new(1.0).unwrap();
        for n in 0..50 {
            record.answered(super::super::Kind::Read, 512, n, n);
        }
        let mut counted = record.outcome(1000).unwrap();
        counted.server.syscalls = Some(100);
        let costs = Server { cpu_ns: Some(7), ..Server::default() };
        let both = costs.with_counts(1000, &counted);
        assert_eq!(both, Server { syscalls: Some(2000), ..costs });
    }
}
