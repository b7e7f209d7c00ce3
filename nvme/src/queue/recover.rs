//! Orders of the controller, deadlines, and commands that are sent again.

use block::{QUARANTINED, Status as Outcome};

use super::tracker::Tracker;
use super::{Mode, NOT_RUNNING, QueuePair};
use crate::bar::Bar;
use crate::link::Order;
use crate::status;
use crate::units::Unit;

impl<B: Bar> QueuePair<B> {
    /// Obeys an order that is new. Returns whether the queue runs.
    #[cold]
    pub(super) fn obey(&mut self, word: u32) -> bool {
        if word != self.seen {
            self.seen = word;
            match Order::of(word) {
                Order::Wait => self.stop(Mode::Waiting),
                Order::Run => {
                    for (unit, changing) in self.units.iter_mut().zip(self.changing.iter()) {
                        unit.refresh(changing);
                    }
                    if self.mode != Mode::Running {
                        self.mode = Mode::Running;
                        self.start_anew();
                    }
                }
                Order::Gone => self.give_up(0),
                Order::Unsafe => self.give_up(QUARANTINED),
            }
            let runs = self.mode == Mode::Running;
            self.running = if runs { u64::from(word) } else { NOT_RUNNING };
            // Rings and doorbells are not touched any more, unless the queue runs.
            self.link.acknowledge(word);
        }
        self.mode == Mode::Running
    }

    /// Nothing goes straight to the device any more.
    fn stop(&mut self, mode: Mode) {
        self.mode = mode;
        self.units.iter_mut().for_each(Unit::stop);
    }

    /// The device has the queue afresh. What was in flight before the reset certainly is no more:
    /// overdue commands end now, the others are sent again.
    fn start_anew(&mut self) {
        self.sq.reset();
        self.cq.reset();
        self.clear_late();
        for slot in 0..self.trackers.items().len() {
            let Some(t) = self.trackers.get_mut(slot) else { break };
            if t.is(Tracker::FREE) || t.is(Tracker::WAITS) {
                continue;
            }
            if t.is(Tracker::LATE) || t.retries() >= status::MAX_RETRIES {
                self.end(slot, Outcome::Timeout, 0);
                continue;
            }
            t.count_retry();
            t.sent = self.now;
            self.stats.resent += 1;
            self.resend(slot);
        }
        self.next_timer = 0;
        self.work = true;
    }

    /// Gives a command to the ring again, under a new CID.
    pub(super) fn resend(&mut self, slot: usize) {
        let Some(t) = self.trackers.get_mut(slot) else { return };
        t.renew(0);
        let (command, cid) = (t.command(), t.cid());
        self.push(&command, cid);
    }

    /// Answers everything: the device is lost.
    fn give_up(&mut self, detail: u16) {
        self.stop(Mode::Gone(detail));
        self.clear_late();
        self.retries.clear();
        for slot in 0..self.trackers.items().len() {
            let t = &self.trackers.items()[slot];
            if t.is(Tracker::FREE) {
                continue;
            }
            let outcome = if t.is(Tracker::LATE) { Outcome::Timeout } else { Outcome::Gone };
            self.end(slot, outcome, detail);
        }
        while let Some(index) = self.longs.waiting.pop_front() {
            let long = self.longs.get_mut(index);
            long.queued = false;
            long.fail(Outcome::Gone, detail);
            self.end_long(index);
        }
    }

    /// Sends again what waited for it, and looks for overdue commands. Looks at every tracker, but
    /// only when something is due: a retry, or the command that was the oldest the last time. All
    /// commands sent since have later deadlines, so between two looks one comparison is enough.
    #[cold]
    pub(super) fn timers(&mut self) {
        if self.mode != Mode::Running {
            return;
        }
        let mut next = self.now.saturating_add(self.timeout);
        let mut i = 0;
        while let Some(&(due, slot)) = self.retries.get(i) {
            if due > self.now {
                next = next.min(due);
                i += 1;
                continue;
            }
            self.retries.swap_remove(i);
            let slot = usize::from(slot);
            let age = self.now.saturating_sub(self.trackers.items()[slot].sent);
            if age >= self.timeout {
                self.end(slot, Outcome::Timeout, 0);
            } else {
                self.stats.retries += 1;
                self.resend(slot);
            }
        }
        let mut worst: Option<(u64, u16)> = None;
        for slot in 0..self.trackers.items().len() {
            let Some(t) = self.trackers.get_mut(slot) else { break };
            if t.is(Tracker::FREE) || t.is(Tracker::WAITS) {
                continue;
            }
            let deadline = t.sent.saturating_add(self.timeout);
            if deadline > self.now {
                next = next.min(deadline);
                continue;
            }
            t.mark(Tracker::LATE);
            if worst.is_none_or(|(sent, _)| t.sent < sent) {
                worst = Some((t.sent, t.cid()));
            }
        }
        if let Some((_, cid)) = worst
            && self.late.is_none()
        {
            self.late_number += 1;
            self.late = Some(cid);
            self.link.set_late(Some(cid), self.late_number);
        }
        let oldest = self.oldest();
        self.table.prune(self.now, oldest);
        self.next_timer = next;
    }

    /// An overdue command was completed after all.
    pub(super) fn no_longer_late(&mut self, cid: u16) {
        if self.late == Some(cid) {
            self.clear_late();
            // There may be others, of which the controller was not told.
            self.next_timer = 0;
        }
    }

    fn clear_late(&mut self) {
        self.late = None;
        self.link.set_late(None, 0);
    }

    /// When the oldest request that is not answered was submitted.
    pub(super) fn oldest(&self) -> Option<u64> {
        let busy = self.trackers.items().iter().filter(|t| !t.is(Tracker::FREE));
        busy.map(|t| t.sent).chain(self.longs.oldest()).min()
    }
}
