//! The way of a command: from its submission queue, past the fault list, perhaps held back for a
//! while, to its completion.
//!
//! Part of the [`Controller`], on the thread that steps it.

use nvme_spec::{Cqe, Sqe, Status, StatusCode, error_event};

use crate::controller::{Answer, Controller, State, deny};
use crate::fault::{Delay, Effects};
use crate::memory::{DmaFault, HostMemory};
use crate::queues::{Look, Watch};
use crate::registers::Doorbell;

/// Commands taken from one submission queue per step, so that queues take turns.
const BURST: u32 = 16;

/// Completions beyond those owed that wait for room at most.
const MAX_EXTRAS: usize = 1024;

/// When a command that was taken is carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum When {
    /// From this step on.
    Step(u64),
    /// From this time on, in nanoseconds.
    Time(u64),
}

/// A command that was taken and not carried out yet; an entry of its completion queue is
/// reserved for it.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) sqid: u16,
    pub(crate) sqe: Sqe,
    pub(crate) when: When,
    /// When it was taken, in the unit of `when`.
    pub(crate) since: u64,
    effects: Effects,
}

/// A completion beyond those owed, which waits for room.
#[derive(Debug)]
pub(crate) struct Extra {
    pub(crate) sqid: u16,
    named_sqid: u16,
    cid: u16,
    answer: Answer,
}

impl<M: HostMemory> Controller<M> {
    /// Takes commands of the submission queue that is watched at `at`. Whether there were any.
    #[inline]
    pub(crate) fn run_queue(&mut self, at: usize) -> bool {
        let Some(&watch) = self.queues.watch.get(at) else { return false };
        let rung = self.regs.doorbell(watch.sqid, Doorbell::SqTail) != watch.tail
            || self.regs.doorbell(watch.cqid, Doorbell::CqHead) != watch.head;
        let awake = self.shadow.is_some() && (rung || watch.awake);
        if awake {
            self.look_at_shadow(watch);
        }
        let Some(watch) = self.queues.watch.get_mut(at) else { return false };
        watch.tail = self.regs.doorbell(watch.sqid, Doorbell::SqTail);
        watch.head = self.regs.doorbell(watch.cqid, Doorbell::CqHead);
        let Watch { sqid, cqid, tail, head, .. } = *watch;
        let tail = self.queues.sq(sqid).map_or(Look::Same, |sq| sq.look(tail));
        let head = self.queues.cq(cqid).map_or(Look::Same, |cq| cq.look(head));
        match tail {
            Look::Same => {}
            Look::Moved => self.stats.sq_doorbells.add(1),
            Look::Bad => self.note_bad_doorbell(sqid),
        }
        match head {
            Look::Same => {}
            Look::Moved => self.stats.cq_doorbells.add(1),
            Look::Bad => self.note_bad_doorbell(cqid),
        }
        let mut taken = 0;
        while taken < BURST && self.state == State::Ready && self.take(sqid) {
            taken += 1;
        }
        // Commands may be left, for want of turns or of room.
        let mut more = self.queues.sq(sqid).is_some_and(|sq| sq.head != sq.tail);
        if awake {
            let settled = !more && self.in_flight.is_empty();
            if let Some(&watch) = self.queues.watch.get(at) {
                more |= settled && self.ask_for_doorbells(watch);
            }
            if let Some(watch) = self.queues.watch.get_mut(at) {
                watch.awake = more || !settled;
            }
        }
        self.unsettled |= more;
        taken > 0
    }

    /// Takes one command, if there is one and room for its completion.
    #[inline]
    fn take(&mut self, sqid: u16) -> bool {
        match self.queues.cq_of(sqid) {
            Some((_, cq)) if cq.room() > 0 => {}
            _ => return false,
        }
        let Some(sq) = self.queues.sq(sqid) else { return false };
        if sq.head == sq.tail {
            return false;
        }
        let address = sq.head_address();
        sq.advance();
        match self.mem.read_sqe(address) {
            Ok(sqe) => self.start(sqid, sqe),
            Err(fault) => {
                // The queue itself cannot be reached: nothing can be told any more.
                self.note_fault(fault);
                self.fail();
            }
        }
        true
    }

    #[inline]
    fn start(&mut self, sqid: u16, sqe: Sqe) {
        if sqid == 0 {
            self.stats.admin.add(1);
        }
        let conflict = |f: &InFlight| f.sqid == sqid && f.sqe.cid() == sqe.cid();
        if self.in_flight.iter().any(conflict) {
            self.complete(sqid, &sqe, Err(deny(StatusCode::CID_CONFLICT)), &Effects::default());
            return;
        }
        let effects = if self.options.faults.is_empty() {
            Effects::default()
        } else {
            match self.inject(sqid, &sqe) {
                Some(effects) => effects,
                None => return,
            }
        };
        let when = match effects.delay {
            Some(Delay::Steps(n)) => When::Step(self.steps.saturating_add(n)),
            Some(Delay::Nanos(n)) => When::Time(self.now_ns.saturating_add(n)),
            None if self.shuffle.is_some() && sqid != 0 => When::Step(self.steps),
            None => {
                self.finish(sqid, &sqe, &effects);
                return;
            }
        };
        if let Some((_, cq)) = self.queues.cq_of(sqid) {
            cq.reserved += 1;
        }
        let since = match when {
            When::Step(_) => self.steps,
            When::Time(_) => self.now_ns,
        };
        self.in_flight.push(InFlight { sqid, sqe, when, since, effects });
    }

    /// Applies the fault list to a command. `None`: it goes no further.
    #[cold]
    fn inject(&mut self, sqid: u16, sqe: &Sqe) -> Option<Effects> {
        let effects = self.options.faults.command(sqid == 0, sqe);
        self.stats.injected.add(effects.injected);
        if let Some((nsid, blocks)) = effects.resize {
            self.resize_namespace(nsid, blocks);
        }
        if let Some(nsid) = effects.remove {
            self.remove_namespace(nsid);
        }
        if effects.warn != 0 {
            self.raise_warning(effects.warn);
        }
        if effects.gone {
            self.remove();
            return None;
        }
        if effects.fatal {
            self.fail();
            return None;
        }
        if let Some(done) = effects.lost {
            if let Some(cid) = effects.extra_cid {
                self.extra(Extra { sqid, named_sqid: sqid, cid, answer: Ok(0) });
            }
            if done {
                let _ = self.execute(sqid, sqe);
            }
            return None;
        }
        Some(effects)
    }

    /// Carries out commands that were held back.
    pub(crate) fn run_in_flight(&mut self) -> bool {
        let (steps, now) = (self.steps, self.now_ns);
        let ready = |f: &InFlight| match f.when {
            When::Step(step) => step <= steps,
            When::Time(time) => time <= now,
        };
        if self.shuffle.is_none() {
            let mut busy = false;
            let mut at = 0;
            while at < self.in_flight.len() && self.state == State::Ready {
                if ready(&self.in_flight[at]) {
                    let flight = self.in_flight.remove(at);
                    self.land(&flight);
                    busy = true;
                } else {
                    at += 1;
                }
            }
            return busy;
        }
        let count = self.in_flight.iter().filter(|f| ready(f)).count();
        if count == 0 {
            return false;
        }
        let turns = 1 + self.draw(count);
        for left in (count - turns + 1..=count).rev() {
            let pick = self.draw(left);
            let found = self.in_flight.iter().enumerate().filter(|(_, f)| ready(f)).nth(pick);
            let Some((at, _)) = found else { break };
            let flight = self.in_flight.swap_remove(at);
            self.land(&flight);
            if self.state != State::Ready {
                break;
            }
        }
        true
    }

    fn draw(&mut self, bound: usize) -> usize {
        self.shuffle.as_mut().map_or(0, |rng| rng.below(bound))
    }

    /// Carries out a command that was held back; its reservation ends.
    fn land(&mut self, flight: &InFlight) {
        if let Some((_, cq)) = self.queues.cq_of(flight.sqid) {
            cq.reserved = cq.reserved.saturating_sub(1);
        }
        self.finish(flight.sqid, &flight.sqe, &flight.effects);
    }

    #[inline]
    fn finish(&mut self, sqid: u16, sqe: &Sqe, effects: &Effects) {
        let answer = match effects.status {
            Some(code) => Some(Err(Status::retryable(code))),
            None => self.execute(sqid, sqe),
        };
        if let Some(answer) = answer {
            self.complete(sqid, sqe, answer, effects);
        }
    }

    /// Carries out a command. `None`: its completion comes later (asynchronous events).
    #[inline]
    fn execute(&mut self, sqid: u16, sqe: &Sqe) -> Option<Answer> {
        if sqid == 0 { self.admin(sqe) } else { Some(self.io(sqe)) }
    }

    /// Completes a command for which its completion queue has room.
    #[inline]
    fn complete(&mut self, sqid: u16, sqe: &Sqe, answer: Answer, effects: &Effects) {
        let answer = match answer {
            Ok(_) => answer,
            Err(status) => Err(self.note_error(sqid, sqe, status)),
        };
        if let Some(cid) = effects.extra_cid {
            self.extra(Extra { sqid, named_sqid: sqid, cid, answer: Ok(0) });
        }
        let named_sqid = effects.sqid.unwrap_or(sqid);
        self.post(sqid, named_sqid, sqe.cid(), answer);
        if effects.duplicate {
            self.extra(Extra { sqid, named_sqid: sqid, cid: sqe.cid(), answer });
        }
    }

    #[cold]
    fn note_error(&mut self, sqid: u16, sqe: &Sqe, status: Status) -> Status {
        self.stats.errors.add(1);
        if status.code().0 >> 8 == 2 {
            self.life.media_errors += 1;
        }
        let status = status.with_more();
        self.errors.command(sqid, sqe, status);
        status
    }

    /// Posts a completion beyond those owed: at once if that leaves room for one that is owed.
    #[cold]
    fn extra(&mut self, extra: Extra) {
        match self.queues.cq_of(extra.sqid) {
            Some((_, cq)) if cq.room() > 1 => {
                self.post(extra.sqid, extra.named_sqid, extra.cid, extra.answer);
            }
            Some(_) if self.extras.len() < MAX_EXTRAS => self.extras.push(extra),
            _ => {}
        }
    }

    #[cold]
    pub(crate) fn post_extras(&mut self) {
        for extra in std::mem::take(&mut self.extras) {
            if self.state != State::Ready {
                return;
            }
            match self.queues.cq_of(extra.sqid) {
                Some((_, cq)) if cq.room() > 0 => {
                    self.post(extra.sqid, extra.named_sqid, extra.cid, extra.answer);
                }
                Some(_) => self.extras.push(extra),
                None => {}
            }
        }
    }

    /// Writes a completion queue entry, for which there must be room.
    #[inline]
    fn post(&mut self, sqid: u16, named_sqid: u16, cid: u16, answer: Answer) {
        let Some(sq) = self.queues.sq(sqid) else { return };
        let (cqid, sq_head) = (sq.cqid, sq.head as u16);
        let Some(cq) = self.queues.cq(cqid) else { return };
        let (result, status) = match answer {
            Ok(result) => (result, Status::SUCCESS),
            Err(status) => (0, status),
        };
        let cqe = Cqe::new(result, sq_head, named_sqid, cid, status, cq.phase);
        let (address, vector) = (cq.tail_address(), cq.vector);
        cq.advance();
        self.stats.completions.add(1);
        if let Err(fault) = self.mem.write_cqe(address, &cqe) {
            self.note_fault(fault);
            self.fail();
        } else if let Some(vector) = vector {
            self.mem.raise(vector);
        }
    }

    #[cold]
    pub(crate) fn note_fault(&mut self, fault: DmaFault) {
        self.stats.dma_faults.add(1);
        self.last_fault = Some(fault);
    }

    #[cold]
    pub(crate) fn note_stray_doorbells(&mut self) {
        let count = self.regs.stray_doorbells();
        self.stats.bad_doorbells.add(u64::from(count.wrapping_sub(self.stray_seen)));
        self.stray_seen = count;
        if self.state == State::Ready {
            self.report_doorbell(error_event::INVALID_DOORBELL);
        }
    }

    #[cold]
    fn note_bad_doorbell(&mut self, qid: u16) {
        self.stats.bad_doorbells.add(1);
        self.errors.doorbell(qid);
        self.report_doorbell(error_event::INVALID_DOORBELL_VALUE);
    }

    /// Completes event requests with the events that are due, as far as there is room.
    #[cold]
    pub(crate) fn post_events(&mut self) {
        while self.queues.cq(0).is_some_and(|cq| cq.room() > 0) {
            let Some((cid, event)) = self.events.take() else { return };
            self.post(0, 0, cid, Ok(event.0));
        }
    }

    /// Takes a command back before it is carried out; completes it with `code`. Whether it was
    /// found.
    pub(crate) fn abort_in_flight(&mut self, sqid: u16, cid: u16) -> bool {
        let wanted = |f: &InFlight| f.sqid == sqid && f.sqe.cid() == cid;
        let Some(at) = self.in_flight.iter().position(wanted) else { return false };
        let flight = self.in_flight.remove(at);
        self.abandon(&flight, StatusCode::ABORT_REQUESTED);
        true
    }

    /// Completes all that is in flight of a submission queue that is about to be deleted.
    pub(crate) fn abort_queue(&mut self, sqid: u16) {
        while let Some(at) = self.in_flight.iter().position(|f| f.sqid == sqid) {
            let flight = self.in_flight.remove(at);
            self.abandon(&flight, StatusCode::ABORTED_SQ_DELETION);
        }
        self.extras.retain(|e| e.sqid != sqid);
    }

    fn abandon(&mut self, flight: &InFlight, code: StatusCode) {
        if let Some((_, cq)) = self.queues.cq_of(flight.sqid) {
            cq.reserved = cq.reserved.saturating_sub(1);
        }
        let answer = Err(Status::retryable(code));
        self.complete(flight.sqid, &flight.sqe, answer, &Effects::default());
    }

    /// Completes an event request that was aborted.
    pub(crate) fn abort_event_request(&mut self, cid: u16) -> bool {
        // The Abort command needs an entry of its own.
        let room = self.queues.cq(0).is_some_and(|cq| cq.room() > 1);
        if !room || !self.events.withdraw(cid) {
            return false;
        }
        self.post(0, 0, cid, Err(Status::retryable(StatusCode::ABORT_REQUESTED)));
        true
    }
}
