//! What a layer holds is committed into the one below it while guests go on. The control path does it
//! by blocking calls, between which the reactors have their turns.

use block::Status;
use qcow::edit::{self, Watch};
use qcow::{ChainReader, Error};
use sim::Rng;

use crate::change::{Stage, Then};
use crate::images::open;
use crate::life::{Attached, Drive, Run, no_room};
use crate::plan::Life;
use crate::verify::Ended;

/// Turns within which a pause is reached.
const PATIENCE: u64 = 2_000_000;

/// Who looks on at a commit.
struct Looking<'w, 'p> {
    run: &'w mut Run<'p>,
    life: &'w Life,
    a: &'w mut Attached,
    d: &'w mut Drive,
    rng: &'w mut Rng,
    /// What guests read lies where it did.
    keep: bool,
    /// This layer must hide what lies behind its end before it goes.
    lengthen: Option<usize>,
    /// It ended the life, or something is wrong.
    ended: Option<Result<Ended, String>>,
}

impl Looking<'_, '_> {
    fn step(&mut self) -> Result<(), Error> {
        match self.run.step(self.life, self.a, self.d, self.rng) {
            Ok(None) => return Ok(()),
            Ok(Some(ended)) => self.ended = Some(Ok(ended)),
            Err(e) => self.ended = Some(Err(e)),
        }
        // The power failed everywhere.
        self.a.layers.iter().flat_map(|l| l.disks()).for_each(|d| d.set_power_for(0));
        Err(stopped())
    }

    /// The image comes to rest, follows what is on disk, and goes on.
    fn follow(&mut self) -> Result<(), Error> {
        self.a.reactors.image().pause();
        let mut turns = 0;
        let status = loop {
            if let Some(status) = self.a.reactors.image().paused() {
                break status;
            }
            turns += 1;
            if turns > PATIENCE {
                self.ended = Some(Err("a pause is never reached".to_owned()));
                return Err(stopped());
            }
            self.step()?;
        };
        let followed = match status {
            Status::Ok => self.lengthen().and_then(|()| self.run.restack(self.a, self.keep)),
            // A disk fails: the commit ends, and guests go on.
            _ => Err(String::new()),
        };
        self.a.reactors.image().resume();
        match followed {
            Ok(()) => Ok(()),
            Err(e) if e.is_empty() => Err(stopped()),
            Err(e) => {
                self.ended = Some(Err(e));
                Err(stopped())
            }
        }
    }
}

impl Looking<'_, '_> {
    /// Where a layer that goes is shorter than the ones above and below it, it gets zeroes there: else
    /// what it hid would be seen.
    fn lengthen(&mut self) -> Result<(), String> {
        let Some(depth) = self.lengthen.take() else { return Ok(()) };
        let sizes: Vec<u64> =
            open(&self.a.layers[depth - 1..], false)?.layers.iter().map(|l| l.size()).collect();
        // Snapshots of the layer that goes would be lost; those of the one above may be of larger disks.
        let snapshots = |n: usize| !self.a.layers[depth - 1 + n].kept.is_empty();
        if snapshots(1) || (snapshots(0) && sizes[1] < sizes[2]) {
            return Err(String::new());
        }
        if sizes[1] < sizes[0].min(sizes[2]) {
            let mut reader = ChainReader::new(open(&self.a.layers[depth..], true)?);
            // Where that is not possible there is no commit.
            edit::resize(&mut reader, sizes[0]).map_err(|_| String::new())?;
        }
        Ok(())
    }
}

impl Watch for Looking<'_, '_> {
    fn at(&mut self, _: u64) -> Result<(), Error> {
        for _ in 0..self.rng.pick(&[0, 0, 5, 40]) {
            self.step()?;
        }
        // Somebody stops it.
        if self.rng.one_in(300) { Err(stopped()) } else { Ok(()) }
    }

    fn switched(&mut self) -> Result<(), Error> {
        self.follow()
    }
}

fn stopped() -> Error {
    Error::refused("commit", "stopped")
}

impl Run<'_> {
    /// Commits the layer that is `depth` layers below the first into the next one. Returns whether the
    /// power failed.
    pub(crate) fn commit(
        &mut self,
        depth: usize,
        life: &Life,
        a: &mut Attached,
        d: &mut Drive,
        rng: &mut Rng,
    ) -> Result<bool, String> {
        let depth = depth.min(a.layers.len().saturating_sub(2));
        if depth == 0 {
            return Ok(false);
        }
        a.stage = Stage::Committing;
        let lower = a.layers[depth + 1].clone();
        let power = rng.within(0, 40);
        lower.disk.set_power_for(rng.pick(&[u64::MAX, u64::MAX, u64::MAX, power]));
        let mut on =
            Looking { run: self, life, a, d, rng, keep: false, lengthen: Some(depth), ended: None };
        // An earlier try may have left tables that the reactors have not followed.
        let done = on.follow().and_then(|()| {
            let opened =
                open(&on.a.layers[depth..], false).map_err(|e| Error::refused("chain", e))?;
            let unit = |n: usize| {
                let g = opened.layers[n].image().map(|i| i.geometry);
                g.map_or((0, 0), |g| (g.unit_size(), g.cluster_size()))
            };
            // A cluster that is written anew there must not hold more than the upper one hides.
            let fits = unit(1).1 <= unit(0).0;
            on.keep = fits && opened.layers[1].size() >= opened.layers[0].size();
            edit::commit(&mut ChainReader::new(opened), 1, false, &mut on)
        });
        if let Some(ended) = on.ended {
            // A life ends in its middle by a power cut alone.
            return ended.map(|_| true);
        }
        if done.is_err() && lower.disk.is_out() {
            return Ok(true);
        }
        lower.disk.set_power_for(u64::MAX);
        match done {
            Ok(_) => {
                self.outcome.commits += 1;
                a.stage = Stage::Pausing(Then::Cut { above: depth - 1, gone: 1 });
                a.reactors.image().pause();
            }
            Err(e) => {
                let e = e.to_string();
                let refused = ["stopped", "fewer than", "snapshots"].iter().any(|w| e.contains(w));
                if !refused && !no_room(&e) {
                    return Err(format!("a commit fails: {e}"));
                }
                a.stage = Stage::Later;
            }
        }
        Ok(false)
    }
}
