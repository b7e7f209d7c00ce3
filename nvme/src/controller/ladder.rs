//! The ladder: how a device that misbehaves is stopped, each rung only if the one before did not
//! certainly work. CC.EN=0; function reset; bus master off; and if none of it is confirmed, the
//! memory that the device knows is never used for anything again.
//!
//! Requests are answered only after a rung has worked, or after the last has not: never a buffer
//! given back under DMA, never silence.

use nvme_spec::{Cc, Csts, offset};

use super::boot::{Boot, Origin};
use super::{Controller, MS, Phase, Stage};
use crate::Error;
use crate::bar::Bar;
use crate::link::Order;

/// How long queue pairs are given to let go of their rings before the device is disabled anyway.
/// Nothing depends on it: a queue is made anew only when its queue pair has let go.
const QUIESCE: u64 = 100 * MS;

/// Resets in a row, each within [`STABLE`] of the one before, after which the device is given up.
const MAX_RESETS: u32 = 5;
const STABLE: u64 = 20_000 * MS;

/// A rung.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rung {
    Quiesce { until: u64 },
    Disable { until: u64 },
    FunctionReset,
    BusMasterOff,
}

/// A climb.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Ladder {
    rung: Rung,
    /// Why.
    cause: Error,
    /// Start again once the device is stopped.
    again: bool,
}

impl<B: Bar> Controller<B> {
    /// Something is wrong with the device: stops it, and then starts it again if that may help.
    pub(super) fn trouble(&mut self, now: u64, cause: Error) {
        let (name, was_ready) = (self.name().to_owned(), matches!(self.phase, Phase::Ready));
        let closing = matches!(self.phase, Phase::Closing(_));
        log::warn!("nvme {name}: {cause}");
        self.error = Some(cause.clone());
        for q in &mut self.queues {
            q.abort = None;
            if q.stage == Stage::Running {
                q.stage = Stage::Wanted;
            }
            if q.stage != Stage::Ended {
                q.link.give(Order::Wait);
            }
        }
        let mut climb = Ladder { rung: Rung::Quiesce { until: now + QUIESCE }, cause, again: true };
        if was_ready {
            let soon = now.saturating_sub(self.last_reset) < STABLE;
            self.resets = if soon { self.resets + 1 } else { 1 };
            self.last_reset = now;
            if self.resets > MAX_RESETS {
                let (resets, last) = (self.resets - 1, Box::new(climb.cause));
                climb.cause = Error::TooManyResets { resets, last };
                climb.again = false;
            }
        } else if closing {
            climb.again = false;
        } else {
            // Bring-up failed: the same again would not help, but a stronger reset may.
            match self.origin {
                Origin::Disable => climb.rung = Rung::FunctionReset,
                Origin::Open | Origin::Restart | Origin::FunctionReset => {
                    climb.again = false;
                    climb.rung = self.begin_disable(now);
                }
            }
        }
        self.phase = Phase::Ladder(climb);
    }

    /// Stops the device for good.
    pub(super) fn abandon(&mut self, cause: Error) {
        for q in self.queues.iter().filter(|q| q.stage != Stage::Ended) {
            q.link.give(Order::Wait);
        }
        self.disable();
        // The time is looked at in the next step.
        let rung = Rung::Quiesce { until: 0 };
        self.phase = Phase::Ladder(Ladder { rung, cause, again: false });
    }

    fn begin_disable(&self, now: u64) -> Rung {
        self.disable();
        Rung::Disable { until: now.saturating_add(self.ready_timeout()) }
    }

    /// One step of the climb.
    pub(super) fn climb(&mut self, now: u64) {
        let Phase::Ladder(ladder) = &self.phase else { return };
        let rung = match ladder.rung {
            Rung::Quiesce { until } => {
                let waiting =
                    self.queues.iter().any(|q| !q.link.is_dropped() && !q.link.acknowledged());
                if waiting && now < until {
                    return;
                }
                self.begin_disable(now)
            }
            Rung::Disable { until } => match self.csts() {
                Csts::GONE => Rung::FunctionReset,
                csts if csts.rdy() == 0 => return self.stopped(Origin::Disable),
                _ if now < until => return,
                _ => {
                    log::warn!("nvme {}: CC.EN=0 had no effect", self.name());
                    Rung::FunctionReset
                }
            },
            Rung::FunctionReset => match self.bar.function_reset() {
                Ok(()) if self.is_disabled() => return self.stopped(Origin::FunctionReset),
                Ok(()) => {
                    log::warn!("nvme {}: a function reset had no effect", self.name());
                    Rung::BusMasterOff
                }
                Err(e) => {
                    log::warn!("nvme {}: function reset: {e}", self.name());
                    Rung::BusMasterOff
                }
            },
            Rung::BusMasterOff => {
                let off = self.bar.bus_master_off();
                let cause = ladder.cause.clone();
                if let Err(e) = &off {
                    log::error!("nvme {}: bus master off: {e}", self.name());
                }
                return self.die(cause, off.is_ok());
            }
        };
        if let Phase::Ladder(ladder) = &mut self.phase {
            ladder.rung = rung;
        }
    }

    fn is_disabled(&self) -> bool {
        let csts = self.csts();
        csts != Csts::GONE && csts.rdy() == 0 && Cc(self.bar.read32(offset::CC)).en() == 0
    }

    /// The device certainly makes no access to memory any more, and has forgotten its queues.
    fn stopped(&mut self, by: Origin) {
        let Phase::Ladder(ladder) = &self.phase else { return };
        let (cause, again) = (ladder.cause.clone(), ladder.again);
        self.queues.retain(|q| !q.link.is_dropped());
        if !again {
            return self.die(cause, true);
        }
        log::warn!("nvme {}: reset, starting again", self.name());
        self.origin = by;
        self.phase = Phase::Boot(Boot::Begin);
    }
}
