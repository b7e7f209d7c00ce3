//! [`run`]: the loop that loads a target.

use reactor::Clock;

use super::choose::{Choice, Chooser};
use super::record::Record;
use super::verify::Written;
use super::{Done, Job, Kind, Meter, Outcome, Request, Shape, Target, Verify};
use crate::Error;

/// Longest wait at a time, in nanoseconds: how late the end of a job may be noticed.
const WAIT: u64 = 20_000_000;

/// Requests that may fail before the job is given up.
const MOST_ERRORS: u64 = 1000;

/// Requests that were never sent and are recorded one by one, about.
const MOST_LATE: f64 = 1e6;

/// How often is told how far a job has come, in nanoseconds.
const TELL: u64 = 500_000_000;

/// How far a job has come.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Progress {
    /// It is ramping up, or reading back what it wrote; else what is sent counts.
    pub counting: bool,
    /// Seconds since it began, or began to count.
    pub seconds: f64,
    /// Requests that were answered since then.
    pub requests: u64,
}

#[derive(Clone, Copy)]
struct Flight {
    choice: Choice,
    /// From when on it takes time.
    since: u64,
}

/// What the loop knows.
struct State {
    flights: Vec<Flight>,
    free: Vec<u32>,
    record: Record,
    written: Option<Written>,
    /// When counting began.
    counts: Option<u64>,
    /// Counting has ended.
    over: bool,
    errors: u64,
    failure: Option<Error>,
    clock: Clock,
    /// When something was last answered, or there was nothing to answer.
    heard: u64,
}

impl State {
    fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Takes an answer that came at `now`.
    #[inline]
    fn done(&mut self, done: &Done<'_>, now: u64, paced: bool) {
        let Some(&Flight { choice, since }) = self.flights.get(done.slot as usize) else { return };
        self.free.push(done.slot);
        let failed = done.error.is_some();
        if let Some(written) = &mut self.written
            && choice.kind != Kind::Flush
            && let Err(e) = written.end(&choice, failed, done.data)
        {
            self.failure.get_or_insert(e);
        }
        if let Some(error) = done.error {
            self.failed(&choice, error);
            return;
        }
        let Some(began) = self.counts else { return };
        if !self.over {
            self.record.answered(choice.kind, choice.len, now - began, now.saturating_sub(since));
        } else if paced {
            self.record.late(choice.kind, now.saturating_sub(since), 1);
        }
    }

    #[cold]
    fn failed(&mut self, choice: &Choice, error: i32) {
        self.errors += 1;
        if self.errors >= MOST_ERRORS {
            let Choice { kind, offset, len } = choice;
            self.failure.get_or_insert(Error::other(format!(
                "{MOST_ERRORS} requests failed; the last one, a {} of {len} bytes at {offset}, with: {}",
                kind.name(),
                nix::errno::Errno::from_raw(error).desc()
            )));
        }
    }

    fn check(&mut self) -> Result<(), Error> {
        self.failure.take().map_or(Ok(()), Err)
    }

    /// Has the target send, and takes what it answers.
    fn poll<T: Target>(&mut self, target: &mut T, wait: u64, paced: bool) -> Result<(), Error> {
        // All that comes at once came at the same time.
        let mut now = 0;
        target.poll(wait, &mut |done| {
            if now == 0 {
                now = self.clock.now();
            }
            self.done(&done, now, paced);
        })?;
        if self.failure.is_some() {
            return self.check();
        }
        if now != 0 {
            self.heard = now;
        }
        Ok(())
    }

    /// Whether the target has been silent for too long.
    fn check_patience<T: Target>(&mut self, target: &T, now: u64) -> Result<(), Error> {
        let l = target.limits();
        if self.in_flight() == 0 {
            self.heard = now;
        } else if now.saturating_sub(self.heard) > l.patience {
            let (name, n, seconds) = (&l.name, self.in_flight(), l.patience as f64 / 1e9);
            return Err(Error::other(format!(
                "{name} has answered none of {n} requests for {seconds} s: given up"
            )));
        }
        Ok(())
    }

    /// Sends one request; false if there is no room.
    #[inline]
    fn send<T: Target>(
        &mut self,
        target: &mut T,
        choice: Choice,
        since: u64,
    ) -> Result<bool, Error> {
        let Some(&slot) = self.free.last() else { return Ok(false) };
        let Choice { kind, offset, len } = choice;
        let request = Request { slot, kind, offset, len };
        let sent = match &mut self.written {
            Some(written) if kind != Kind::Flush => {
                let data = written.begin(&choice);
                let sent = target.send(&request, data)?;
                if !sent {
                    written.undo(&choice);
                }
                sent
            }
            _ => target.send(&request, None)?,
        };
        if sent {
            self.free.pop();
            self.flights[slot as usize] = Flight { choice, since };
        }
        Ok(sent)
    }

    /// Waits for everything that is under way.
    fn drain<T: Target>(&mut self, target: &mut T, paced: bool) -> Result<(), Error> {
        while self.in_flight() > 0 {
            self.poll(target, WAIT, paced)?;
            self.check_patience(target, self.clock.now())?;
        }
        Ok(())
    }
}

/// What is sent next, and when.
struct Sender {
    chooser: Chooser,
    shape: Shape,
    depth: usize,
    flush_every: u64,
    unflushed: u64,
    /// Chosen, and not sent yet.
    next: Option<Choice>,
    /// When the next one is due.
    due: f64,
    /// Nanoseconds between two.
    step: f64,
}

impl Sender {
    fn new(job: &Job, start: u64, len: u64, now: u64) -> Sender {
        let step = match job.shape {
            Shape::Depth(_) => 0.0,
            Shape::Rate { per_second, .. } => 1e9 / per_second,
        };
        Sender {
            chooser: Chooser::new(job, start, len),
            shape: job.shape,
            depth: job.depth() as usize,
            flush_every: job.flush_every.map_or(u64::MAX, u64::from),
            unflushed: 0,
            next: None,
            due: now as f64,
            step,
        }
    }

    fn paced(&self) -> bool {
        matches!(self.shape, Shape::Rate { .. })
    }

    /// The next request; none while those that are under way are in its way.
    #[inline]
    fn choose(&mut self, written: Option<&Written>) -> Option<Choice> {
        if let Some(next) = self.next.take() {
            return Some(next);
        }
        if self.unflushed >= self.flush_every {
            self.unflushed = 0;
            return Some(Choice { kind: Kind::Flush, offset: 0, len: 0 });
        }
        let choice = self.chooser.next();
        self.unflushed += u64::from(choice.kind == Kind::Write);
        if written.is_some_and(|w| !w.is_free(&choice)) {
            self.next = Some(choice);
            return None;
        }
        Some(choice)
    }

    /// Sends what may be sent now: at most `most` requests.
    fn send<T: Target>(
        &mut self,
        state: &mut State,
        target: &mut T,
        now: u64,
        most: u64,
    ) -> Result<(), Error> {
        let paced = self.paced();
        let mut left = most;
        while left > 0 && state.in_flight() < self.depth && (!paced || self.due <= now as f64) {
            let blocked = match (&self.next, &state.written) {
                (Some(c), Some(w)) => c.kind != Kind::Flush && !w.is_free(c),
                _ => false,
            };
            if blocked {
                return Ok(());
            }
            let Some(choice) = self.choose(state.written.as_ref()) else { return Ok(()) };
            let since = if paced { self.due as u64 } else { now };
            if !state.send(target, choice, since)? {
                self.next = Some(choice);
                return Ok(());
            }
            if choice.kind != Kind::Flush {
                self.due += self.step;
                left -= 1;
            }
        }
        Ok(())
    }

    /// Records those that were due before `ended` and not sent, as if all were answered at `now`.
    fn give_up(&mut self, record: &mut Record, ended: u64, now: u64) {
        // Of very many, one stands for some.
        let each = ((ended as f64 - self.due) / self.step / MOST_LATE).ceil().max(1.0);
        while self.due < ended as f64 {
            record.late(self.chooser.next().kind, now.saturating_sub(self.due as u64), each as u64);
            self.due += self.step * each;
        }
    }

    /// How long there is nothing to send, in nanoseconds, as far as that is known.
    fn wait(&self, state: &State, now: u64) -> u64 {
        match self.shape {
            Shape::Rate { .. } if state.in_flight() < self.depth => {
                (self.due as u64).saturating_sub(now)
            }
            _ => u64::MAX,
        }
    }
}

/// Sends a job to a target, on the calling thread. `meter` tells what the server takes while requests are
/// counted; `tell` is told how far it is, twice a second.
///
/// Time is counted from the end of the ramp. At a fixed rate what is due waits where as many requests
/// are under way as may be; those that are not answered when the time is over count in the latencies,
/// with the time that they have waited at least.
///
/// # Errors
/// If the job is impossible there, the target goes away or answers nothing for too long, a thousand
/// requests fail, or data is wrong. A few requests that fail are in the outcome.
pub fn run<T: Target>(
    job: &Job,
    target: &mut T,
    meter: Option<&mut dyn Meter>,
    tell: &mut dyn FnMut(Progress),
) -> Result<Outcome, Error> {
    run_by(Clock::real(), job, target, meter, tell)
}

fn run_by<T: Target>(
    clock: Clock,
    job: &Job,
    target: &mut T,
    mut meter: Option<&mut dyn Meter>,
    tell: &mut dyn FnMut(Progress),
) -> Result<Outcome, Error> {
    let (start, len) = job.check(target.limits())?;
    let depth = job.depth();
    let largest = job.sizes.0.iter().map(|s| s.0).max().unwrap_or(0);
    let verify = job.verify == Verify::Stamped;
    target.prepare(depth, largest, verify)?;
    let mut now = clock.now();
    let none = Flight { choice: Choice { kind: Kind::Flush, offset: 0, len: 0 }, since: 0 };
    let mut state = State {
        flights: vec![none; depth as usize],
        free: (0..depth).rev().collect(),
        record: Record::new(job.seconds)?,
        written: verify.then(|| Written::new(largest)),
        counts: None,
        over: false,
        errors: 0,
        failure: None,
        clock: clock.clone(),
        heard: now,
    };
    let mut sender = Sender::new(job, start, len, now);
    let paced = sender.paced();
    let (most, length) = (job.requests.unwrap_or(u64::MAX), (job.seconds * 1e9) as u64);
    let ramp_ends = now + (job.ramp * 1e9) as u64;
    let (mut end, mut began, mut told) = (ramp_ends, now, now);
    let seconds = |since: u64, now: u64| now.saturating_sub(since) as f64 / 1e9;
    loop {
        now = clock.now();
        if now >= end {
            if state.counts.is_some() {
                break;
            }
            // The meter takes its time, in which answers would wait.
            state.drain(target, paced)?;
            if let Some(meter) = &mut meter {
                meter.begin()?;
            }
            now = clock.now();
            began = now;
            end = now + length;
            state.counts = Some(now);
            state.errors = 0;
            // What was due while the meter began is not the target's fault.
            sender.due = sender.due.max(now as f64);
        }
        let counted = state.record.requests + state.errors;
        if counted >= most {
            break;
        }
        let may = match state.counts {
            Some(_) => most.saturating_sub(counted + state.in_flight() as u64),
            None => u64::MAX,
        };
        sender.send(&mut state, target, now, may)?;
        let wait = sender.wait(&state, now).min(end - now).min(WAIT);
        state.poll(target, wait, paced)?;
        state.check_patience(target, now)?;
        if now - told >= TELL {
            told = now;
            let counting = state.counts.is_some();
            let requests = state.record.requests;
            tell(Progress { counting, seconds: seconds(began, now), requests });
        }
    }
    let ended = clock.now();
    if let Some(meter) = &mut meter {
        meter.end()?;
    }
    state.over = true;
    state.drain(target, paced)?;
    if paced && state.record.requests + state.errors < most {
        // What was due and could not be sent has waited until now at least.
        sender.give_up(&mut state.record, ended, clock.now());
    }
    let server = meter.map(|m| m.figures()).transpose()?.unwrap_or_default();
    let (errors, written) = (state.errors, state.written.take());
    let flights = state.flights.len();
    let record = std::mem::replace(&mut state.record, Record::new(0.0)?);
    let mut outcome = record.outcome(ended - began)?;
    (outcome.errors, outcome.server) = (errors, server);
    if let Some(written) = written {
        state.written = Some(written);
        state.counts = None;
        state.errors = 0;
        outcome.verified_bytes = read_back(&mut state, target, largest, flights, tell)?;
    }
    Ok(outcome)
}

/// Reads all that was written, and is still there; returns how many bytes were right in all.
fn read_back<T: Target>(
    state: &mut State,
    target: &mut T,
    largest: u32,
    depth: usize,
    tell: &mut dyn FnMut(Progress),
) -> Result<u64, Error> {
    let began = state.clock.now();
    let mut told = began;
    state.heard = began;
    let reads = state.written.as_ref().map(|w| w.all(largest)).unwrap_or_default();
    let mut sent = 0;
    while sent < reads.len() || state.in_flight() > 0 {
        let now = state.clock.now();
        while let Some(&read) = reads.get(sent)
            && state.in_flight() < depth
            && state.send(target, read, now)?
        {
            sent += 1;
        }
        state.poll(target, WAIT, false)?;
        state.check_patience(target, now)?;
        if state.errors > 0 {
            return Err(Error::other("verification: what was written cannot be read back"));
        }
        if now - told >= TELL {
            told = now;
            let seconds = (now - began) as f64 / 1e9;
            tell(Progress { counting: false, seconds, requests: sent as u64 });
        }
    }
    Ok(state.written.as_ref().map_or(0, |w| w.verified_bytes))
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
