//! [`ReactorMeter`]: what a reactor in this process takes.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};
use node::ReactorCore;
use reactor::{Clock, Mailbox, Stats};

use super::{Meter, Server};
use crate::Error;
use crate::counters::Counters;

/// How long a reactor is waited for, in nanoseconds.
const PATIENCE: u64 = 10_000_000_000;

/// Processor time of a reactor's thread, the part of it in which it had work, its context switches and
/// allocations; and system calls, if that is asked for.
pub struct ReactorMeter {
    mailbox: Mailbox<ReactorCore>,
    stats: Arc<Stats>,
    traps: bool,
    began: Option<(Look, Counters)>,
    ended: Option<(Look, Counters)>,
    missing: Option<String>,
}

#[derive(Clone, Copy)]
struct Look {
    cpu_ns: u64,
    switches: u64,
    busy_ns: u64,
}

impl ReactorMeter {
    /// Of the reactor that this mailbox leads to. With `traps` system calls are counted: each that is made
    /// takes some microseconds more for that.
    pub fn new(mailbox: Mailbox<ReactorCore>, stats: Arc<Stats>, traps: bool) -> ReactorMeter {
        ReactorMeter { mailbox, stats, traps, began: None, ended: None, missing: None }
    }

    /// Runs `look` on the reactor. Its answer is left there for us: sending one may be a system call.
    fn on_reactor<T: Send + Sync + Copy + 'static>(
        &self,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, clock) = (Arc::new(OnceLock::new()), Clock::real());
        let (to, until) = (answer.clone(), clock.now() + PATIENCE);
        self.mailbox.post(move |_| {
            // It is set once.
            let _ = to.set(look());
        });
        while clock.now() < until {
            if let Some(&found) = answer.get() {
                return Ok(found);
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        Err(Error::other("the reactor did not say what it has counted: has it ended?"))
    }
}

fn look(stats: &Stats) -> Look {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    let switches = getrusage(UsageWho::RUSAGE_THREAD)
        .map_or(0, |u| u.voluntary_context_switches() + u.involuntary_context_switches());
    Look {
        cpu_ns: time.map_or(0, |t| Duration::from(t).as_nanos() as u64),
        switches: switches.unsigned_abs(),
        busy_ns: stats.busy_ns.get(),
    }
}

impl Meter for ReactorMeter {
    fn begin(&mut self) -> Result<(), Error> {
        let (stats, traps) = (self.stats.clone(), self.traps);
        self.began = Some(self.on_reactor(move || {
            let look = look(&stats);
            (look, if traps { Counters::start() } else { Counters::start_untrapped() })
        })?);
        Ok(())
    }

    fn end(&mut self) -> Result<(), Error> {
        let Some((_, began)) = self.began else {
            return Err(Error::other("a meter was ended before it began"));
        };
        let stats = self.stats.clone();
        self.ended = Some(self.on_reactor(move || {
            let done = Counters::finish(began);
            (look(&stats), done)
        })?);
        Ok(())
    }

    fn figures(&mut self) -> Result<Server, Error> {
        let (Some((before, _)), Some((after, done))) = (self.began.take(), self.ended.take())
        else {
            return Err(Error::other("a meter was asked before it ended"));
        };
        if self.traps && done.syscalls.is_none() {
            let why =
                "system calls: this kernel does not trap them (syscall user dispatch, Linux 5.11)";
            self.missing = Some(why.to_owned());
        }
        Ok(Server {
            cpu_ns: Some(after.cpu_ns.saturating_sub(before.cpu_ns)),
            busy_ns: Some(after.busy_ns.saturating_sub(before.busy_ns)),
            switches: Some(after.switches.saturating_sub(before.switches)),
            instructions: None,
            syscalls: done.syscalls,
            allocations: Some(done.allocations),
        })
    }

    fn missing(&self) -> Option<&str> {
        self.missing.as_deref()
    }
}
