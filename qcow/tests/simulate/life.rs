//! A run: an image on a simulated disk, opened, used and cut off, one life after another.

use block::{Flags, Op, Port, Status};
use qcow::check::Repair;
use qcow::run::{Options, Stack};
use sim::{Disk, Faults, Guest, GuestOp, Load, Model, Rng, Sabotage, Trace};

use crate::change::Stage;
use crate::images::{Images, Layer, make, open};
use crate::plan::{End, Life, Plan};
use crate::reactors::Reactors;
use crate::verify::{Ended, Verified, check, qemu, verify};

/// Turns without an answer after which a request is taken for lost. A disk's own time-out takes a
/// few thousand polls.
const PATIENCE: u64 = 100_000;

/// What a run did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Outcome {
    /// Over all that happened.
    pub(crate) hash: u64,
    pub(crate) requests: u64,
    /// Power cuts looked at.
    pub(crate) cuts: u64,
    pub(crate) lives: u64,
    /// Overlays put in front, and streams that ended.
    pub(crate) snapshots: u64,
    pub(crate) streams: u64,
    /// Pages of maps loaded, waits for other requests, clusters allocated.
    pub(crate) loads: u64,
    pub(crate) parked: u64,
    pub(crate) allocated: u64,
    /// Requests that failed, and those for want of space.
    pub(crate) failed: u64,
    pub(crate) no_space: u64,
    /// Images that qemu-img looked at; and those that it could not, as it is not there.
    pub(crate) qemu: u64,
    pub(crate) no_qemu: u64,
}

/// Runs a plan. The seed decides all that the plan leaves open.
pub(crate) fn run(plan: &Plan, seed: u64, sabotage: Sabotage) -> Result<Outcome, String> {
    let trace = Trace::default();
    // Other numbers than the plan was drawn from.
    let mut rng = Rng::new(!seed);
    let Images { layers, held } = make(plan, &mut rng, &trace)?;
    let mut run = Run {
        plan,
        model: Model::new(&held),
        layers,
        leaks: 0,
        last_name: 100,
        sabotage,
        trace,
        outcome: Outcome::default(),
    };
    for (n, life) in plan.lives.iter().enumerate() {
        run.life(life, &mut rng.fork()).map_err(|e| format!("life {}: {e}", n + 1))?;
    }
    run.outcome.hash = run.trace.hash();
    Ok(run.outcome)
}

/// See [`run`].
pub(crate) struct Run<'p> {
    pub(crate) plan: &'p Plan,
    pub(crate) model: Model,
    /// What there is between two lives, the image first.
    layers: Vec<Layer>,
    /// Clusters that leak in it.
    leaks: u64,
    /// Of overlays.
    pub(crate) last_name: u32,
    pub(crate) sabotage: Sabotage,
    pub(crate) trace: Trace,
    pub(crate) outcome: Outcome,
}

/// An image attached.
pub(crate) struct Attached {
    /// The image's disk.
    top: Disk,
    /// The image and what it stands on, and the numbers of their leaf queues.
    pub(crate) layers: Vec<Layer>,
    pub(crate) leaves: Vec<u16>,
    pub(crate) reactors: Reactors,
    pub(crate) stage: Stage,
    /// Clusters that leaked in it when it was opened.
    pub(crate) leaks: u64,
    faults: Faults,
    /// Changes of the disk after which its power fails.
    cut_at: u64,
}

impl Attached {
    fn is_cut(&self) -> bool {
        self.top.writes() >= self.cut_at
    }

    fn set_faults(&mut self, faults: Faults) {
        self.faults = faults;
        self.layers.iter().for_each(|l| l.disk.set_faults(faults));
    }

    /// The image is on this disk now.
    pub(crate) fn follow(&mut self, disk: &Disk) {
        if self.cut_at != u64::MAX {
            // As many changes more as there would have been.
            let left = self.cut_at - self.top.writes();
            self.cut_at = disk.writes() + left;
        }
        disk.set_faults(self.faults);
        self.top = disk.clone();
    }
}

impl Run<'_> {
    fn life(&mut self, life: &Life, rng: &mut Rng) -> Result<(), String> {
        let mut layers = std::mem::take(&mut self.layers);
        let bytes = layers[0].disk.clone().take_bytes();
        layers[0].disk = Disk::new(self.plan.disk, bytes, rng.fork(), self.trace.clone());
        if life.repair {
            layers = self.repair(life, layers, rng)?;
        }
        layers[0].disk.set_sabotage(self.sabotage);
        let mut a = self.attach(life, layers)?;
        let ended = self.drive(life, &mut a, rng)?;
        let ended = match ended {
            // A count that cannot be read to be lowered stays, which the image says in its log.
            Ended::Clean if a.leaks > 0 || life.is_broken() => Ended::CleanWithLeaks,
            other => other,
        };
        if ended != Ended::Cut {
            let now = self.model.tick();
            self.model.flushed(now);
        }
        // Also after a clean close: everything is durable then.
        let layers = a.layers.iter().map(|l| l.frozen(rng)).collect();
        drop(a);
        let Verified { held, leaks, mut layers } = verify(layers, &self.model, ended)?;
        self.trace.add(&held.iter().map(|&id| id.into()).collect::<Vec<_>>());
        if self.plan.qemu {
            let there = qemu(&mut layers[0].disk, ended)?;
            self.outcome.qemu += u64::from(there);
            self.outcome.no_qemu += u64::from(!there);
        }
        self.model.restart(&held);
        (self.layers, self.leaks) = (layers, leaks);
        self.outcome.lives += 1;
        self.outcome.cuts += u64::from(ended == Ended::Cut);
        Ok(())
    }

    /// Repairs the image, with a power cut on the way: that must not have made anything worse.
    fn repair(
        &mut self,
        life: &Life,
        mut layers: Vec<Layer>,
        rng: &mut Rng,
    ) -> Result<Vec<Layer>, String> {
        layers[0].disk.set_power_for(life.cut_repair);
        if check(&mut layers[0].disk, Repair::All).is_err() {
            let left = layers.iter().map(|l| l.frozen(rng)).collect();
            layers = verify(left, &self.model, Ended::Cut)?.layers;
            let bytes = layers[0].disk.clone().take_bytes();
            layers[0].disk = Disk::new(self.plan.disk, bytes, rng.fork(), self.trace.clone());
            self.outcome.cuts += 1;
        }
        layers[0].disk.set_power_for(u64::MAX);
        match check(&mut layers[0].disk, Repair::All)? {
            0 => self.leaks = 0,
            n => return Err(format!("{n} clusters leak after a repair")),
        }
        Ok(layers)
    }

    fn attach(&self, life: &Life, layers: Vec<Layer>) -> Result<Attached, String> {
        let disks: Vec<Disk> = layers.iter().map(|l| l.disk.clone()).collect();
        let stack = |ports: &[Port]| {
            let mut chain = open(&layers, true)?;
            Stack::new(&mut chain, ports).map_err(|e| e.to_string())
        };
        let options = Options { slots: life.slots, l2_cache: life.l2_cache, ..Options::default() };
        let guest = (life.depth, life.sleepy);
        let reactors = Reactors::new(&disks, stack, options, guest, self.trace.clone())?;
        let top = disks[0].clone();
        let cut_at = match life.end {
            End::Cut(n) | End::Lost(n) => top.writes().saturating_add(n),
            End::CutClose(_) | End::Close => u64::MAX,
        };
        let leaves = (0..layers.len() as u16).collect();
        let (stage, leaks, faults) = (Stage::Later, self.leaks, Faults::default());
        let mut a = Attached { top, layers, leaves, reactors, stage, leaks, faults, cut_at };
        a.set_faults(life.faults);
        Ok(a)
    }

    fn drive(&mut self, life: &Life, a: &mut Attached, rng: &mut Rng) -> Result<Ended, String> {
        let unit = 1 << (self.plan.cluster_bits - 9);
        let load = Load::draw(rng, self.plan.sectors, unit, Guest::LONGEST);
        let (mut sent, mut idle, mut probes) = (0, 0, life.probes);
        let (mut full, mut looked_at) = (false, 0);
        while sent < life.requests || a.reactors.open() > 0 {
            if life.full && rng.one_in(100) {
                full = !full;
                let from = if full { rng.below(self.plan.disk.size) } else { u64::MAX };
                a.top.set_no_space_from(from);
            }
            if life.satellites > 0 && rng.one_in(25) {
                if (a.reactors.count() as u64) <= life.satellites {
                    a.reactors.join()?;
                } else if rng.one_in(8) {
                    a.reactors.leave();
                }
            }
            if sent < life.requests && rng.one_in(3) {
                for _ in 0..rng.within(1, 4) {
                    sent += u64::from(self.send(&load, a, rng));
                }
            }
            a.reactors.turn(rng);
            idle += 1;
            for n in 0..a.reactors.count() {
                while let Some((op, status)) = a.reactors.at(n).guest().receive(&mut self.model)? {
                    self.judge(life, &op, status)?;
                    self.outcome.requests += 1;
                    self.outcome.failed += u64::from(!status.is_ok());
                    self.outcome.no_space += u64::from(status == Status::NoSpace);
                    idle = 0;
                }
            }
            if idle > PATIENCE {
                let (open, why) = (a.reactors.open(), a.reactors.explain());
                return Err(format!("{open} requests are never answered{why}"));
            }
            if a.is_cut() {
                if matches!(life.end, End::Cut(_)) {
                    return Ok(Ended::Cut);
                }
                a.top.lose();
                a.cut_at = u64::MAX;
            }
            if self.change(life, a, sent, rng)? {
                return Ok(Ended::Cut);
            }
            if life.dense && a.top.writes() != looked_at {
                looked_at = a.top.writes();
                check(&mut a.top.frozen(rng), Repair::None)?;
                self.outcome.cuts += 1;
            }
            if probes > 0 && rng.one_in(150) {
                probes -= 1;
                self.probe(a, rng)?;
            }
        }
        if let Some((loads, parked, allocated)) = a.reactors.counters() {
            self.outcome.loads += loads;
            self.outcome.parked += parked;
            self.outcome.allocated += allocated;
        }
        if matches!(life.end, End::Cut(_) | End::Lost(_)) {
            return Ok(Ended::Cut);
        }
        // All that is wrong with the disk ends: now everything must come right.
        a.set_faults(Faults::default());
        a.top.set_no_space_from(u64::MAX);
        if let End::CutClose(n) = life.end {
            a.cut_at = a.top.writes() + n;
        }
        a.reactors.close(rng);
        for _ in 0..PATIENCE {
            a.reactors.turn(rng);
            match a.reactors.closed() {
                Some(Status::Ok) => return Ok(Ended::Clean),
                Some(other) => return Err(format!("the close fails: {other}")),
                None if a.is_cut() => return Ok(Ended::Cut),
                None => {}
            }
        }
        Err("the close never ends".to_owned())
    }

    fn send(&mut self, load: &Load, a: &mut Attached, rng: &mut Rng) -> bool {
        let op = load.next(rng, self.model.len());
        let changes = !matches!(op.op, Op::Read | Op::Flush);
        if changes && !load.overlap && self.model.is_busy(op.first, op.count) {
            return false;
        }
        let n = rng.below(a.reactors.count() as u64) as usize;
        let at = a.reactors.at(n);
        let sent = at.guest().send(op, &mut self.model, rng);
        at.wake();
        sent
    }

    /// Whether a request may have ended like this.
    fn judge(&self, life: &Life, op: &GuestOp, status: Status) -> Result<(), String> {
        let broken = life.is_broken();
        let may = match status {
            Status::Ok => true,
            Status::Unsupported => op.flags.has(Flags::FAST_ONLY) || broken,
            Status::Medium | Status::Timeout => broken,
            Status::Gone => matches!(life.end, End::Lost(_)),
            // A read needs no space; what a flush needs was taken before.
            Status::NoSpace => !matches!(op.op, Op::Read),
            _ => false,
        };
        if may { Ok(()) } else { Err(format!("{op:?} ends with: {status}")) }
    }

    /// Looks at what a power cut would leave now.
    fn probe(&mut self, a: &Attached, rng: &mut Rng) -> Result<(), String> {
        let layers = a.layers.iter().map(|l| l.frozen(rng)).collect();
        verify(layers, &self.model, Ended::Cut)?;
        self.outcome.cuts += 1;
        Ok(())
    }
}

impl Outcome {
    /// Adds another run; in any order.
    pub(crate) fn add(&mut self, other: &Outcome) {
        self.hash = self.hash.wrapping_add(other.hash);
        self.requests += other.requests;
        self.cuts += other.cuts;
        self.lives += other.lives;
        self.snapshots += other.snapshots;
        self.streams += other.streams;
        self.loads += other.loads;
        self.parked += other.parked;
        self.allocated += other.allocated;
        self.failed += other.failed;
        self.no_space += other.no_space;
        self.qemu += other.qemu;
        self.no_qemu += other.no_qemu;
    }
}
