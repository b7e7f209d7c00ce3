//! Changes of an image that is served: pauses, a new overlay in front, taking lower layers up, another
//! size; committing is in [`crate::commit`], internal snapshots are in [`crate::kept`].

use block::Status;
use qcow::ChainReader;
use qcow::edit::{resize, set_backing};
use sim::{Disk, Rng, SECTOR};

use crate::images::{Layer, open, overlay};
use crate::life::{Attached, Drive, Run, no_room};
use crate::plan::{Change, Life};
use crate::verify::Ended;

/// How far a change has come.
pub(crate) enum Stage {
    /// It begins later.
    Later,
    Streaming {
        /// Layers that stay, from the bottom.
        keep: usize,
    },
    Pausing(Then),
    /// See [`crate::commit`].
    Committing,
    Done,
}

/// What is done in a pause.
pub(crate) enum Then {
    Nothing,
    /// This comes in front; the number of its leaf queues.
    Overlay(Layer, u16),
    /// So many layers behind the one that is so many layers below the first go out of the chain.
    Cut {
        above: usize,
        gone: usize,
    },
    /// The disk gets so many sectors.
    Resize(u64),
    /// An internal snapshot is taken.
    Keep,
    /// One is deleted.
    Drop,
}

impl Run<'_> {
    /// Goes on with the change of this life. Returns whether the power failed in it.
    pub(crate) fn change(
        &mut self,
        life: &Life,
        a: &mut Attached,
        d: &mut Drive,
        rng: &mut Rng,
    ) -> Result<bool, String> {
        match &a.stage {
            Stage::Later => {
                let next = life.changes.get(a.begun).filter(|c| d.sent > c.1);
                let Some(&(change, _)) = next else { return Ok(false) };
                a.begun += 1;
                if let Change::Commit(depth) = change {
                    return self.commit(depth, life, a, d, rng);
                }
                self.begin(change, a, rng)?;
            }
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
                        Stage::Pausing(Then::Cut { above: 0, gone: a.layers.len() - keep - 1 })
                    }
                    // What was taken up stays there.
                    Some(_) => Stage::Done,
                };
            }
            Stage::Pausing(_) => {
                let Some(status) = a.reactors.image().paused() else { return Ok(false) };
                let stage = std::mem::replace(&mut a.stage, Stage::Done);
                if let (Stage::Pausing(then), Status::Ok) = (stage, status)
                    && self.rest(then, a, d, rng)?
                {
                    return Ok(true);
                }
                a.reactors.image().resume();
            }
            Stage::Done => a.stage = Stage::Later,
            Stage::Committing => {}
        }
        Ok(false)
    }

    fn begin(&mut self, change: Change, a: &mut Attached, rng: &mut Rng) -> Result<(), String> {
        a.stage = match change {
            Change::Nothing => Stage::Done,
            Change::Pause => Stage::Pausing(Then::Nothing),
            Change::Keep | Change::Drop if a.layers[0].data.is_some() => Stage::Done,
            Change::Keep => Stage::Pausing(Then::Keep),
            Change::Drop => Stage::Pausing(Then::Drop),
            Change::Snapshot => {
                let disk = Disk::new(self.plan.disk, Vec::new(), rng.fork(), self.trace.clone());
                self.last_name += 1;
                let sectors = self.model.len();
                let layer = overlay(self.plan, self.last_name, &a.layers[0], disk, sectors)?;
                let leaf = a.reactors.add_disk(&layer.disk)?;
                Stage::Pausing(Then::Overlay(layer, leaf))
            }
            Change::Resize(sectors) => match a.reactors.image().could_be(sectors * SECTOR as u64) {
                Ok(()) => Stage::Pausing(Then::Resize(sectors)),
                Err(_) => Stage::Done,
            },
            Change::Commit(_) => Stage::Done,
            // Snapshots show what is below.
            Change::Stream(_) if !a.layers[0].kept.is_empty() => Stage::Done,
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
    fn rest(
        &mut self,
        then: Then,
        a: &mut Attached,
        d: &mut Drive,
        rng: &mut Rng,
    ) -> Result<bool, String> {
        // All that was answered is durable: the lower image may be copied now.
        let now = self.model.tick();
        self.model.flushed(now);
        let frozen: Vec<Layer> = a.layers.iter().map(|l| l.frozen(rng)).collect();
        let held = self.verify(frozen.clone(), Ended::Rest)?.held;
        self.outcome.cuts += 1;
        match then {
            Then::Nothing => return Ok(false),
            Then::Keep | Then::Drop => return self.keep_at_rest(&then, &held, a, rng),
            Then::Overlay(layer, leaf) => {
                // Whichever of the two is served after a crash.
                let both = [vec![layer.frozen(rng)], frozen].concat();
                self.verify(both, Ended::Rest)?;
                self.bitmaps.forget();
                layer.disk.set_sabotage(self.sabotage);
                a.follow(layer, vec![leaf]);
                a.leaks = 0;
                self.restack(a, true)?;
                self.outcome.snapshots += 1;
            }
            Then::Cut { above, gone } => {
                let behind = above + 1 + gone;
                let below = a.layers.get(behind).map(|l| (l.path(), l.format));
                let below = below.as_ref().map(|(path, format)| (&path[..], *format));
                let disk = &mut a.layers[above].disk;
                disk.set_power_for(rng.pick(&[u64::MAX, u64::MAX, 0, 1, 2]));
                if set_backing(disk, "above", below).is_err() {
                    return Ok(true);
                }
                disk.set_power_for(u64::MAX);
                a.layers.drain(above + 1..behind);
                a.leaves.drain(above + 1..behind);
                self.restack(a, false)?;
                self.outcome.streams += 1;
            }
            Then::Resize(sectors) => {
                let chain = open(&a.layers, true)?;
                let disks: Vec<Disk> = a.layers[0].disks().cloned().collect();
                let failing = rng.below(disks.len() as u64) as usize;
                let power = rng.within(0, 12);
                disks[failing].set_power_for(rng.pick(&[u64::MAX, u64::MAX, power]));
                let changed = resize(&mut ChainReader::new(chain), sectors * SECTOR as u64);
                if changed.is_err() && disks[failing].is_out() {
                    self.resizing = Some(sectors);
                    return Ok(true);
                }
                disks[failing].set_power_for(u64::MAX);
                match changed {
                    Ok(()) => self.follow_size(sectors, d, rng),
                    Err(e) if no_room(&e.to_string()) || self.bitmaps.any_lost() => {}
                    Err(_) if self.plan.version == 2 && !a.layers[0].kept.is_empty() => {}
                    Err(e) => return Err(format!("no other size: {e}")),
                }
                self.restack(a, false)?;
            }
        }
        Ok(false)
    }

    /// The image rests, and goes on with the layers as they are on disk now.
    pub(crate) fn restack(&mut self, a: &mut Attached, keep: bool) -> Result<(), String> {
        let Attached { layers, leaves, reactors, .. } = a;
        let stack = |ports: &[block::Port]| self.stack(layers, ports);
        reactors.restack(stack, &leaves.concat(), keep)
    }
}
