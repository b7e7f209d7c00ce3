//! A run: an image on a simulated disk, opened, used and cut off, one life after another.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Claims, Flags, Layer, Op, Port, RmwQueue, Status};
use qcow::check::Repair;
use qcow::run::{Image, Options, Stack};
use reactor::{Clock, Core};
use sim::{Disk, Faults, Guest, GuestOp, Load, Model, Rng, Sabotage, SimQueue, Trace};

use crate::images::{Images, make, open};
use crate::plan::{End, Life, Plan};
use crate::verify::{Ended, Verified, check, qemu, verify};

type Leaf = RmwQueue<SimQueue>;
type SimCore = Core<Leaf, Image, Guest>;

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
    /// Images that qemu-img looked at; and those that it could not, as it is not there.
    pub(crate) qemu: u64,
    pub(crate) no_qemu: u64,
}

/// Runs a plan. The seed decides all that the plan leaves open.
pub(crate) fn run(plan: &Plan, seed: u64, sabotage: Sabotage) -> Result<Outcome, String> {
    let trace = Trace::default();
    // Other numbers than the plan was drawn from.
    let mut rng = Rng::new(!seed);
    let Images { mut disks, held } = make(plan, &mut rng, &trace)?;
    let top = disks.remove(0);
    let mut run = Run {
        plan,
        model: Model::new(&held),
        bytes: top.take_bytes(),
        leaks: 0,
        below: disks,
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

struct Run<'p> {
    plan: &'p Plan,
    model: Model,
    /// What the disk holds between two lives.
    bytes: Vec<u8>,
    /// Clusters that leak there.
    leaks: u64,
    below: Vec<Disk>,
    sabotage: Sabotage,
    trace: Trace,
    outcome: Outcome,
}

/// An image attached.
struct Attached {
    top: Disk,
    disks: Vec<Disk>,
    core: SimCore,
    time: Arc<AtomicU64>,
    /// Changes of the disk after which its power fails.
    cut_at: u64,
}

impl Attached {
    fn turn(&mut self, rng: &mut Rng) {
        self.time.fetch_add(rng.within(1, 20_000), Ordering::Relaxed);
        self.core.turn();
    }

    fn guest(&mut self) -> &mut Guest {
        self.core.frontend(0).expect("it is attached")
    }

    fn is_cut(&self) -> bool {
        self.top.writes() >= self.cut_at
    }

    fn set_faults(&self, faults: Faults) {
        self.disks.iter().for_each(|d| d.set_faults(faults));
    }
}

impl Run<'_> {
    fn life(&mut self, life: &Life, rng: &mut Rng) -> Result<(), String> {
        let bytes = std::mem::take(&mut self.bytes);
        let mut top = Disk::new(self.plan.disk, bytes, rng.fork(), self.trace.clone());
        if life.repair {
            self.leaks = check(&mut top, Repair::All)?;
        }
        top.set_sabotage(self.sabotage);
        let mut a = self.attach(life, top)?;
        let ended = self.drive(life, &mut a, rng)?;
        let ended = match ended {
            // A count that cannot be read to be lowered stays, which the image says in its log.
            Ended::Clean if self.leaks > 0 || life.is_broken() => Ended::CleanWithLeaks,
            other => other,
        };
        if ended != Ended::Cut {
            let now = self.model.tick();
            self.model.flushed(now);
        }
        // Also after a clean close: everything is durable then.
        let bytes = a.top.survivor(rng);
        drop(a);
        let Verified { held, leaks, bytes } =
            verify(self.plan, &self.below, bytes, &self.model, ended)?;
        self.trace.add(&held.iter().map(|&id| id.into()).collect::<Vec<_>>());
        if self.plan.qemu {
            let there = qemu(&bytes, ended)?;
            self.outcome.qemu += u64::from(there);
            self.outcome.no_qemu += u64::from(!there);
        }
        self.model.restart(&held);
        (self.bytes, self.leaks) = (bytes, leaks);
        self.outcome.lives += 1;
        self.outcome.cuts += u64::from(ended == Ended::Cut);
        Ok(())
    }

    fn attach(&self, life: &Life, top: Disk) -> Result<Attached, String> {
        let mut disks = vec![top.clone()];
        disks.extend_from_slice(&self.below);
        let mut chain = open(&disks, true)?;
        let ports: Vec<Port> = (0..disks.len() as u16).map(|leaf| Port { leaf, unit: 0 }).collect();
        let stack = Stack::new(&mut chain, &ports).map_err(|e| e.to_string())?;
        drop(chain);
        let (clock, time) = Clock::virtual_clock();
        let mut core = SimCore::new(clock).map_err(|e| e.to_string())?;
        for disk in &disks {
            core.add_leaf(RmwQueue::new(SimQueue::new(disk), &Claims::new(2))?)?;
        }
        let options = Options { slots: life.slots, l2_cache: life.l2_cache };
        core.add_image(|owner, leaves| Image::attach(stack, owner, leaves, options))?;
        let (depth, trace) = (life.depth, self.trace.clone());
        core.add_frontend(0, |owner, _| {
            Guest::new(owner, depth, trace).map_err(|e| e.to_string())
        })?;
        let cut_at = match life.end {
            End::Cut(n) => top.writes().saturating_add(n),
            End::CutClose(_) | End::Close => u64::MAX,
        };
        let a = Attached { top, disks, core, time, cut_at };
        a.set_faults(life.faults);
        Ok(a)
    }

    fn drive(&mut self, life: &Life, a: &mut Attached, rng: &mut Rng) -> Result<Ended, String> {
        let unit = 1 << (self.plan.cluster_bits - 9);
        let load = Load::draw(rng, self.plan.sectors, unit, Guest::LONGEST);
        let (mut sent, mut idle, mut probes) = (0, 0, life.probes);
        let mut full = false;
        while sent < life.requests || a.guest().open() > 0 {
            if life.full && rng.one_in(100) {
                full = !full;
                let from = if full { rng.below(self.plan.disk.size) } else { u64::MAX };
                a.top.set_no_space_from(from);
            }
            if sent < life.requests && rng.one_in(3) {
                for _ in 0..rng.within(1, 4) {
                    sent += u64::from(self.send(&load, a, rng));
                }
            }
            a.turn(rng);
            idle += 1;
            while let Some((op, status)) = a.guest().receive(&mut self.model)? {
                self.judge(life, &op, status)?;
                self.outcome.requests += 1;
                idle = 0;
            }
            if idle > PATIENCE {
                return Err(format!("{} requests are never answered", a.guest().open()));
            }
            if a.is_cut() {
                return Ok(Ended::Cut);
            }
            if probes > 0 && rng.one_in(150) {
                probes -= 1;
                self.probe(a, rng)?;
            }
        }
        if matches!(life.end, End::Cut(_)) {
            return Ok(Ended::Cut);
        }
        // All that is wrong with the disk ends: now everything must come right.
        a.set_faults(Faults::default());
        a.top.set_no_space_from(u64::MAX);
        if let End::CutClose(n) = life.end {
            a.cut_at = a.top.writes() + n;
        }
        let image = a.core.image(0).ok_or("no image")?;
        Layer::<Leaf>::close(image);
        for _ in 0..PATIENCE {
            a.turn(rng);
            if let Some((_, status)) = a.core.remove_closed_image(0) {
                return match status {
                    Status::Ok => Ok(Ended::Clean),
                    other => Err(format!("the close fails: {other}")),
                };
            }
            if a.is_cut() {
                return Ok(Ended::Cut);
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
        a.guest().send(op, &mut self.model, rng)
    }

    /// Whether a request may have ended like this.
    fn judge(&self, life: &Life, op: &GuestOp, status: Status) -> Result<(), String> {
        let broken = life.is_broken();
        let may = match status {
            Status::Ok => true,
            Status::Unsupported => op.flags.has(Flags::FAST_ONLY) || broken,
            Status::Medium | Status::Timeout => broken,
            // A read needs no space; what a flush needs was taken before.
            Status::NoSpace => !matches!(op.op, Op::Read),
            _ => false,
        };
        if may { Ok(()) } else { Err(format!("{op:?} ends with: {status}")) }
    }

    /// Looks at what a power cut would leave now.
    fn probe(&mut self, a: &Attached, rng: &mut Rng) -> Result<(), String> {
        let bytes = a.top.survivor(rng);
        verify(self.plan, &self.below, bytes, &self.model, Ended::Cut)?;
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
        self.qemu += other.qemu;
        self.no_qemu += other.no_qemu;
    }
}
