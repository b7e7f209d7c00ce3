//! Changes of an image that is served: pauses, a new overlay in front, taking lower layers up.

use block::Status;
use qcow::edit::set_backing;
use qcow::run::Stack;
use sim::{Disk, Rng};

use crate::images::{Layer, open, overlay};
use crate::life::{Attached, Run};
use crate::plan::{Change, Life};
use crate::verify::{Ended, verify};

/// How far a change has come.
pub(crate) enum Stage {
    /// It begins later.
    Later,
    Streaming {
        /// Layers that stay, from the bottom.
        keep: usize,
    },
    Pausing(Then),
    Done,
}

/// What is done in a pause.
pub(crate) enum Then {
    Nothing,
    /// This comes in front; the number of its leaf queues.
    Overlay(Layer, u16),
    /// The chain ends behind the first layer, but for so many of the lowest ones.
    Cut(usize),
}

impl Run<'_> {
    /// Goes on with the change of this life. Returns whether the power failed in it.
    pub(crate) fn change(
        &mut self,
        life: &Life,
        a: &mut Attached,
        sent: u64,
        rng: &mut Rng,
    ) -> Result<bool, String> {
        match &a.stage {
            Stage::Later if sent > life.change.1 => self.begin(life.change.0, a, rng)?,
            Stage::Streaming { keep } => {
                let keep = *keep;
                if !rng.one_in(10) {
                    return Ok(false);
                }
                let bytes = rng.within(1, 8) << self.plan.cluster_bits;
                a.reactors.image().grant_stream(bytes);
                if rng.one_in(200) {
                    a.reactors.image().cancel_stream();
                }
                a.stage = match a.reactors.image().stream_progress().ended {
                    None => return Ok(false),
                    Some(Status::Ok) => {
                        a.reactors.image().pause();
                        Stage::Pausing(Then::Cut(keep))
                    }
                    // What was taken up stays there.
                    Some(_) => Stage::Done,
                };
            }
            Stage::Pausing(_) => {
                let Some(status) = a.reactors.image().paused() else { return Ok(false) };
                let stage = std::mem::replace(&mut a.stage, Stage::Done);
                if let (Stage::Pausing(then), Status::Ok) = (stage, status)
                    && self.rest(then, a, rng)?
                {
                    return Ok(true);
                }
                a.reactors.image().resume();
            }
            Stage::Later | Stage::Done => {}
        }
        Ok(false)
    }

    fn begin(&mut self, change: Change, a: &mut Attached, rng: &mut Rng) -> Result<(), String> {
        a.stage = match change {
            Change::Nothing => Stage::Done,
            Change::Pause => Stage::Pausing(Then::Nothing),
            Change::Snapshot => {
                let disk = Disk::new(self.plan.disk, Vec::new(), rng.fork(), self.trace.clone());
                self.last_name += 1;
                let layer = overlay(self.plan, self.last_name, &a.layers[0], disk)?;
                let leaf = a.reactors.add_disk(&layer.disk)?;
                Stage::Pausing(Then::Overlay(layer, leaf))
            }
            Change::Stream(keep) => {
                let keep = (keep as usize).min(a.layers.len() - 1);
                assert!(a.reactors.image().start_stream(keep, None));
                Stage::Streaming { keep }
            }
        };
        if matches!(a.stage, Stage::Pausing(_)) {
            a.reactors.image().pause();
        }
        Ok(())
    }

    /// The image rests, and all of it is on disk. Returns whether the power failed.
    fn rest(&mut self, then: Then, a: &mut Attached, rng: &mut Rng) -> Result<bool, String> {
        // All that was answered is durable: the lower image may be copied now.
        let now = self.model.tick();
        self.model.flushed(now);
        let frozen: Vec<Layer> = a.layers.iter().map(|l| l.frozen(rng)).collect();
        verify(frozen.clone(), &self.model, Ended::Cut)?;
        self.outcome.cuts += 1;
        match then {
            Then::Nothing => return Ok(false),
            Then::Overlay(layer, leaf) => {
                // Whichever of the two is served after a crash.
                let both = [vec![layer.frozen(rng)], frozen].concat();
                verify(both, &self.model, Ended::Cut)?;
                layer.disk.set_sabotage(self.sabotage);
                a.follow(&layer.disk);
                a.layers.insert(0, layer);
                a.leaves.insert(0, leaf);
                a.leaks = 0;
                self.restack(a, true)?;
                self.outcome.snapshots += 1;
            }
            Then::Cut(keep) => {
                let gone = a.layers.len() - keep;
                let below = a.layers.get(gone).map(|l| (l.path(), l.format));
                let below = below.as_ref().map(|(path, format)| (&path[..], *format));
                let top = &mut a.layers[0].disk;
                top.set_power_for(rng.pick(&[u64::MAX, u64::MAX, 0, 1, 2]));
                if set_backing(top, "top", below).is_err() {
                    return Ok(true);
                }
                top.set_power_for(u64::MAX);
                if gone > 1 {
                    a.layers.drain(1..gone);
                    a.leaves.drain(1..gone);
                }
                self.restack(a, false)?;
                self.outcome.streams += 1;
            }
        }
        Ok(false)
    }

    fn restack(&self, a: &mut Attached, keep: bool) -> Result<(), String> {
        let Attached { layers, leaves, reactors, .. } = a;
        let stack = |ports: &[block::Port]| {
            let mut chain = open(layers, true)?;
            Stack::new(&mut chain, ports).map_err(|e| e.to_string())
        };
        reactors.restack(stack, leaves, keep)
    }
}
