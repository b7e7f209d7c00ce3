//! Merging in the background: what is left of snapshots that were taken away becomes one with what stands
//! on it, while guests go on.
//!
//! What is written in which order, so that a daemon may die at any time, is in crate `sr`: see [`Merge`].
//! Here is who may use what meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use node::{Disk as Running, JobWatch, Member};
use qcow::edit::Watch;
use reactor::Clock;
use sr::{Merge, Repository};

use super::attached::Attached;
use super::fault::Fault;
use super::{Repositories, author};
use crate::serve::images::Images;

/// Between two merges, or looks whether there is something to do: each has guests wait a few times for a
/// moment, which they should not notice.
const REST: Duration = Duration::from_millis(500);

/// Between two looks whether a merge that waits is to end.
const TICK: Duration = Duration::from_millis(20);

/// Until a merge that failed is tried again, in nanoseconds, and one that gave way to somebody.
const AGAIN_NS: u64 = 30_000_000_000;
const SOON_NS: u64 = 500_000_000;

/// A merge that is under way.
#[derive(Clone)]
pub(super) struct Merging {
    volumes: [String; 2],
    stop: Arc<AtomicBool>,
}

impl Merging {
    /// Whether it has to do with one of these volumes.
    pub(super) fn touches(&self, volumes: &[String]) -> bool {
        self.volumes.iter().any(|lv| volumes.contains(lv))
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Merges, one at a time, until it is told to end.
pub(crate) struct Coalescer {
    repositories: Arc<Repositories>,
    images: Arc<Images>,
    /// Bytes a second.
    rate: u64,
    /// What failed, and until when it rests: repository, upper volume.
    failed: Vec<(String, String, u64)>,
    end: Arc<AtomicBool>,
}

/// How a merge ended that did not fail.
enum Outcome {
    Done,
    /// Nothing was begun: somebody uses what it needs.
    NotNow,
    /// It was stopped: somebody needs what it uses.
    GaveWay,
}

impl Coalescer {
    pub(crate) fn new(
        repositories: Arc<Repositories>,
        images: Arc<Images>,
        rate: u64,
        end: Arc<AtomicBool>,
    ) -> Coalescer {
        Coalescer { repositories, images, rate, failed: Vec::new(), end }
    }

    /// The thread's body.
    pub(crate) fn run(mut self) {
        while !self.end.load(Ordering::Relaxed) {
            self.one();
            std::thread::sleep(REST);
        }
    }

    fn clock(&self) -> &Clock {
        self.images.reactors().clock()
    }

    /// Looks for something to merge, and does that.
    pub(crate) fn one(&mut self) {
        let now = self.clock().now();
        self.failed.retain(|(_, _, until)| now < *until);
        for sr in self.repositories.names() {
            // One after the other: whoever detaches one waits only for what is done with that.
            let Some(attached) = self.repositories.at_hand(&sr) else { continue };
            let merges = attached.repository.lock().merges();
            for merge in merges {
                if self.failed.iter().any(|(of, lv, _)| (of, lv) == (&sr, &merge.upper)) {
                    continue;
                }
                match self.merge(&sr, &attached, &merge) {
                    Ok(Outcome::Done) => {
                        log::info!("{sr}: {} is one with {} now", merge.upper, merge.lower);
                        return;
                    }
                    Ok(Outcome::NotNow) => {}
                    Ok(Outcome::GaveWay) => {
                        let until = self.clock().now() + SOON_NS;
                        self.failed.push((sr.clone(), merge.upper.clone(), until));
                    }
                    Err(e) => {
                        log::info!(
                            "{sr}: {} and {} stay apart for now: {e}",
                            merge.upper,
                            merge.lower
                        );
                        let until = self.clock().now() + AGAIN_NS;
                        self.failed.push((sr.clone(), merge.upper.clone(), until));
                    }
                }
            }
        }
    }

    fn merge(&self, sr: &str, attached: &Attached, merge: &Merge) -> Result<Outcome, Fault> {
        // A running disk whose chain it is, if there is one.
        let over: Vec<String> =
            attached.repository.lock().over(&merge.upper).into_iter().map(str::to_owned).collect();
        // It belongs into an image as that is, which another backing file is the end of.
        if over.iter().any(|key| self.images.is_left(&format!("{sr}/{key}"))) {
            return Ok(Outcome::NotNow);
        }
        let mut running = over.iter().filter_map(|key| self.images.changes(&format!("{sr}/{key}")));
        let (changes, others) = (running.next(), running.count());
        if others > 0 {
            return Ok(Outcome::NotNow);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let gave_way = AtomicBool::new(false);
        {
            let mut repository = attached.repository.lock();
            if !begins(attached, &repository, merge, changes.is_some())?
                || repository.comes_first(merge)?
            {
                return Ok(Outcome::NotNow);
            }
            let lower = repository.group().vg().lv(&merge.lower).map_err(sr::Error::from)?;
            let used = lower.extents() * repository.group().vg().extent_bytes();
            repository.grow_to(&merge.lower, used.saturating_add(merge.used), &author())?;
            let volumes = [merge.upper.clone(), merge.lower.clone()];
            *attached.merging.lock() = Some(Merging { volumes, stop: stop.clone() });
        }
        let done = match changes {
            Some(changes) => changes
                .work("coalesce", Some(self.rate), |disk, watch| {
                    let (stop, end) = (&*stop, &*self.end);
                    let mut watch = Both { watch, stop, end, gave_way: &gave_way };
                    live(attached, merge, disk, &mut watch).map_err(|e| node::Error::Node {
                        node: merge.upper.clone(),
                        why: e.to_string(),
                    })
                })
                .map_err(|e| Fault::other(e.message)),
            None => {
                let mut pace =
                    Pace { stop: &stop, end: &self.end, rate: self.rate, name: &merge.upper };
                offline(attached, merge, &mut pace).and_then(|()| settle(attached, merge, None))
            }
        };
        *attached.merging.lock() = None;
        match done {
            Err(_) if gave_way.load(Ordering::Relaxed) || stop.load(Ordering::Relaxed) => {
                Ok(Outcome::GaveWay)
            }
            done => done.map(|()| Outcome::Done),
        }
    }
}

/// Whether a merge can begin: nobody uses what it changes, but the disk that runs.
fn begins(
    attached: &Attached,
    repository: &Repository<Member>,
    merge: &Merge,
    runs: bool,
) -> Result<bool, Fault> {
    let vg = repository.group().vg();
    let uses = |lv: &str| -> Result<usize, Fault> {
        Ok(attached.devices.uses(vg.lv(lv).map_err(sr::Error::from)?.id))
    };
    let most = usize::from(runs);
    if uses(&merge.upper)? > most || uses(&merge.lower)? > most {
        return Ok(false);
    }
    let above: Vec<usize> =
        repository.above(&merge.upper).map(|node| uses(&node.lv)).collect::<Result<_, _>>()?;
    // One that runs has one of them above it. The uppermost of a disk that runs is written to.
    Ok(above.iter().sum::<usize>() == most)
}

/// Merges in the chain of a disk that runs.
fn live(
    attached: &Attached,
    merge: &Merge,
    disk: &mut Running,
    watch: &mut dyn JobWatch,
) -> Result<(), Fault> {
    let (vg, map, id) = {
        let repository = attached.repository.lock();
        let group = repository.group();
        let map = group.map(&merge.lower).map_err(sr::Error::from)?;
        let id = group.vg().lv(&merge.lower).map_err(sr::Error::from)?.id;
        (group.vg().name.clone(), map, id)
    };
    let name = format!("{vg}/{}", merge.upper);
    let Some(depth) = disk.chain().position(|layer| layer == name) else {
        // The layer above names the lower one already: a daemon died before the repository knew.
        let lower = format!("{vg}/{}", merge.lower);
        let at = disk.chain().position(|layer| layer == lower);
        let above = at.and_then(|at| disk.chain().nth(at.checked_sub(1)?));
        let why = || Fault::other(format!("{name} is not in the chain any more"));
        return settle(attached, merge, Some(above.ok_or_else(why)?));
    };
    let below = disk.chain().nth(depth + 1);
    if below != Some(&*format!("{vg}/{}", merge.lower)) {
        return Err(Fault::other(format!("{name} does not stand on {} by itself", merge.lower)));
    }
    disk.volume_has_grown(id, &map)?;
    let above = disk.chain().nth(depth.saturating_sub(1)).map(str::to_owned);
    disk.commit(depth, watch)?;
    settle(attached, merge, above.as_deref())
}

/// Merges what no guest uses.
fn offline(attached: &Attached, merge: &Merge, watch: &mut dyn Watch) -> Result<(), Fault> {
    let chain = {
        let repository = attached.repository.lock();
        let group = repository.group();
        let open = |lv: &str| attached.devices.volume(group, lv, lv == merge.lower);
        let lvs = repository.down_from(&merge.upper);
        sr::open_chain(&group.vg().name, &lvs, open(&merge.upper)?, false, &mut |lv| {
            open(lv).map_err(|e| qcow::Error::refused(lv, e.to_string()))
        })
    };
    Ok(merge.commit(chain.map_err(sr::Error::from)?, watch)?)
}

/// The images are one: what stands on the upper one is told, but for the layer that has been, and the
/// repository.
fn settle(attached: &Attached, merge: &Merge, told: Option<&str>) -> Result<(), Fault> {
    let mut repository = attached.repository.lock();
    let told = told.and_then(|layer| layer.rsplit('/').next());
    repository.settle(merge, told, &author(), |group, lv| {
        attached.devices.volume(group, lv, true).map_err(|e| sr::Error::Refused(e.to_string()))
    })?;
    repository.discard();
    Ok(())
}

/// Ends a job if the job, somebody who needs the volumes, or the daemon says so.
struct Both<'a> {
    watch: &'a mut dyn JobWatch,
    stop: &'a AtomicBool,
    end: &'a AtomicBool,
    /// Set if it said so.
    gave_way: &'a AtomicBool,
}

impl JobWatch for Both<'_> {
    fn at(&mut self, done: u64, of: u64) -> bool {
        let goes_on = self.watch.at(done, of)
            && !self.stop.load(Ordering::Relaxed)
            && !self.end.load(Ordering::Relaxed);
        self.gave_way.fetch_or(!goes_on, Ordering::Relaxed);
        goes_on
    }

    fn allow(&mut self) -> u64 {
        self.watch.allow()
    }
}

/// Keeps a merge without guests to its rate: others use the drive.
struct Pace<'a> {
    stop: &'a AtomicBool,
    end: &'a AtomicBool,
    rate: u64,
    name: &'a str,
}

impl Watch for Pace<'_> {
    fn at(&mut self, _: u64) -> Result<(), qcow::Error> {
        match self.stop.load(Ordering::Relaxed) || self.end.load(Ordering::Relaxed) {
            true => Err(qcow::Error::refused(self.name, "stopped: others need it")),
            false => Ok(()),
        }
    }

    fn moves(&mut self, bytes: u64) -> Result<(), qcow::Error> {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate.max(1));
        let mut left = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        while !left.is_zero() {
            self.at(0)?;
            let step = left.min(TICK);
            std::thread::sleep(step);
            left -= step;
        }
        self.at(0)
    }
}
