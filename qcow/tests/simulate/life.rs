//! A run: an image on a simulated disk, opened, used and cut off, one life after another.

use block::{Flags, Op, Port, Status, Storage};
use std::sync::Arc;

use dma::{PageSize, Region};
use qcow::check::Repair;
use qcow::edit::redo;
use qcow::run::{Journal, Options, Stack};
use sim::{Disk, Faults, Guest, GuestOp, Load, Model, Rng, SECTOR, Sabotage, Trace};

use crate::bitmaps::Bitmaps;
use crate::change::Stage;
use crate::images::{Images, Layer, make, open};
use crate::plan::{Change, End, Life, Plan};
use crate::reactors::Reactors;
use crate::verify::{Ended, Verified, check, qemu, verify};

/// Turns without an answer after which a request is taken for lost. A disk's own time-out takes a
/// few thousand polls, and a large cluster over small ones is filled by thousands of reads.
const PATIENCE: u64 = 5_000_000;

/// Looks at an image whose refcounts grow, in one life.
const MOST_LOOKS: u64 = 150;

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
    /// Internal snapshots taken.
    pub(crate) kept: u64,
    /// Layers committed down, disks that got another size.
    pub(crate) commits: u64,
    pub(crate) resizes: u64,
    /// Lives of images with a data file.
    pub(crate) data_files: u64,
    pub(crate) files: u64,
    /// Bitmaps for whose bits there was no room.
    pub(crate) no_place: u64,
    pub(crate) deaths: u64,
    pub(crate) redone: u64,
    /// Bitmaps that were compared, and that were not saved.
    pub(crate) trusted: u64,
    pub(crate) unsaved: u64,
    /// Pages of maps loaded, waits for other requests, clusters allocated.
    pub(crate) loads: u64,
    pub(crate) parked: u64,
    pub(crate) allocated: u64,
    /// Requests that failed, and those for want of space.
    pub(crate) failed: u64,
    pub(crate) no_space: u64,
    /// Times that a device became larger for requests that waited.
    pub(crate) extended: u64,
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
        bitmaps: Bitmaps::default(),
        held,
        layers,
        leaks: 0,
        hidden: false,
        resizing: None,
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
    pub(crate) bitmaps: Bitmaps,
    /// What each sector holds between two lives.
    pub(crate) held: Vec<u32>,
    /// What there is then, the image first.
    layers: Vec<Layer>,
    /// Clusters that leak in it.
    pub(crate) leaks: u64,
    /// More may be counted behind the end of its file: no check sees them before it grows.
    pub(crate) hidden: bool,
    /// The power failed while the disk got so many sectors.
    pub(crate) resizing: Option<u64>,
    /// Of overlays.
    pub(crate) last_name: u32,
    pub(crate) sabotage: Sabotage,
    pub(crate) trace: Trace,
    pub(crate) outcome: Outcome,
}

/// An image attached.
pub(crate) struct Attached {
    /// The image and what it stands on, and the numbers of the leaf queues of each.
    pub(crate) layers: Vec<Layer>,
    pub(crate) leaves: Vec<Vec<u16>>,
    pub(crate) reactors: Reactors,
    pub(crate) stage: Stage,
    /// How many of the life's changes were begun.
    pub(crate) begun: usize,
    /// Clusters that leaked in it when it was opened.
    pub(crate) leaks: u64,
    faults: Faults,
    /// What is not durable, if the process is to die.
    journal: Option<Arc<Region>>,
    /// Changes of the image's disks after which their power fails.
    cut_at: u64,
    /// Bytes of a device that becomes larger.
    size: Option<u64>,
}

/// How far a guest has come.
pub(crate) struct Drive {
    load: Load,
    pub(crate) sent: u64,
    /// Turns without an answer.
    idle: u64,
    probes: u64,
    full: bool,
    looked_at: u64,
    /// Looks at refcounts that grow.
    growth: u64,
}

impl Drive {
    /// A guest with a disk of so many sectors.
    fn new(plan: &Plan, life: &Life, sectors: u64, rng: &mut Rng) -> Drive {
        let load = Drive::load(plan, sectors, rng);
        Drive { load, sent: 0, idle: 0, probes: life.probes, full: false, looked_at: 0, growth: 0 }
    }

    fn load(plan: &Plan, sectors: u64, rng: &mut Rng) -> Load {
        Load::draw(rng, sectors, 1 << (plan.cluster_bits - 9), Guest::LONGEST)
    }
}

impl Attached {
    fn is_cut(&self) -> bool {
        self.layers[0].writes() >= self.cut_at
    }

    fn set_faults(&mut self, faults: Faults) {
        self.faults = faults;
        self.layers.iter().flat_map(Layer::disks).for_each(|d| d.set_faults(faults));
    }

    /// The image is this one now, with these leaf queues.
    pub(crate) fn follow(&mut self, layer: Layer, leaves: Vec<u16>) {
        if self.cut_at != u64::MAX {
            // As many changes more as there would have been.
            let left = self.cut_at.saturating_sub(self.layers[0].writes());
            self.cut_at = layer.writes() + left;
        }
        layer.disks().for_each(|d| d.set_faults(self.faults));
        self.layers.insert(0, layer);
        self.leaves.insert(0, leaves);
    }
}

impl Run<'_> {
    fn life(&mut self, life: &Life, rng: &mut Rng) -> Result<(), String> {
        let mut layers = std::mem::take(&mut self.layers);
        layers[0] = layers[0].revived(rng, &self.trace);
        if life.repair {
            layers = self.repair(life, layers, rng)?;
        }
        // What came later draws from its own, as in the plan.
        let aside = &mut Rng::new(rng.clone().draw() ^ 0x0ddb_a115);
        if life.changes.iter().any(|c| matches!(c.0, Change::Commit(_))) {
            layers[1..].iter_mut().for_each(|l| *l = l.revived(aside, &self.trace));
        }
        if let Some(marks) = &life.marks {
            self.bitmaps.on = layers[0].name;
            self.bitmaps.change(&mut layers[0].disk, marks, &self.held, aside)?;
            // They may have given leaks back, or brought some.
            self.leaks = check(&mut layers[0].disk, Repair::None)?;
        }
        if let Some(keeps) = &life.keeps {
            layers = self.keep(keeps, layers, aside)?;
        }
        if life.is_broken() || matches!(life.end, End::Lost(_)) {
            self.bitmaps.become_vague();
        }
        layers[0].disks().for_each(|d| d.set_sabotage(self.sabotage));
        let mut a = self.attach(life, layers)?;
        self.outcome.files += u64::from(a.layers[0].disk.config().file);
        self.outcome.data_files += u64::from(a.layers[0].data.is_some());
        let ended = self.drive(life, &mut a, rng)?;
        let ended = match ended {
            // A count that cannot be read to be lowered stays, which the image says in its log.
            Ended::Clean if a.leaks > 0 || self.hidden || life.is_broken() => Ended::CleanWithLeaks,
            other => other,
        };
        // What does not fit into a small journal is lost with the process, and only that says so.
        let changes = a.journal.as_ref().and_then(|region| Journal::read(region));
        let mut left: Option<Vec<Layer>> = None;
        let ended = match (ended, changes) {
            (Ended::Dead, Some(changes)) => {
                let mut layers: Vec<Layer> = a.layers.iter().map(|l| l.left(rng)).collect();
                match redo(&mut layers[0].disk, "dead", &changes) {
                    Ok(()) => {
                        self.outcome.redone += changes.list.len() as u64;
                        self.outcome.deaths += 1;
                        left = Some(layers);
                        Ended::Dead
                    }
                    // Tables need room; there is more some day. Here the run goes on without.
                    Err(e) if no_room(&e.to_string()) => Ended::Cut,
                    Err(e) => return Err(e.to_string()),
                }
            }
            (Ended::Dead, None) => Ended::Cut,
            (other, _) => other,
        };
        if ended != Ended::Cut {
            let now = self.model.tick();
            self.model.flushed(now);
        }
        // Also after a clean close: everything is durable then.
        let layers: Vec<Layer> =
            left.unwrap_or_else(|| a.layers.iter().map(|l| l.frozen(rng)).collect());
        drop(a);
        if let Some(sectors) = self.resizing.take()
            && open(&layers, false)?.size() == sectors * SECTOR as u64
        {
            self.resized(sectors);
        }
        let Verified { held, leaks, gone, mut layers } = self.verify(layers, ended)?;
        self.trace.add(&held.iter().map(|&id| id.into()).collect::<Vec<_>>());
        if self.plan.qemu {
            let there = qemu(&mut layers[0], ended)?;
            self.outcome.qemu += u64::from(there);
            self.outcome.no_qemu += u64::from(!there);
        }
        self.model.restart(&held);
        self.bitmaps.ended(&gone);
        (self.layers, self.leaks, self.held) = (layers, leaks, held);
        self.outcome.lives += 1;
        self.outcome.cuts += u64::from(matches!(ended, Ended::Cut | Ended::Dead));
        self.hidden |=
            matches!(ended, Ended::Cut | Ended::Dead) && self.layers[0].disk.config().file;
        Ok(())
    }

    /// Checks an image, reads all of it, and looks at its bitmaps.
    pub(crate) fn verify(&mut self, layers: Vec<Layer>, ended: Ended) -> Result<Verified, String> {
        let mut found = verify(layers, &self.model, ended)?;
        if let Some(layer) = found.layers.iter_mut().find(|l| l.name == self.bitmaps.on) {
            let (gone, trusted) = self.bitmaps.verify(&mut layer.disk, &found.held, ended)?;
            self.outcome.trusted += trusted;
            self.outcome.unsaved += gone.len() as u64;
            found.gone = gone;
        }
        Ok(found)
    }

    /// The disk has so many sectors from now on.
    fn resized(&mut self, sectors: u64) {
        self.model.resize(sectors);
        self.bitmaps.resized(sectors);
        self.outcome.resizes += 1;
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
            layers = self.verify(left, Ended::Cut)?.layers;
            layers[0] = layers[0].revived(rng, &self.trace);
            self.outcome.cuts += 1;
        }
        layers[0].disk.set_power_for(u64::MAX);
        match check(&mut layers[0].disk, Repair::All)? {
            0 => self.leaks = 0,
            n => return Err(format!("{n} clusters leak after a repair")),
        }
        Ok(layers)
    }

    /// Opens the layers, for reactors with these ports.
    pub(crate) fn stack(&mut self, layers: &[Layer], ports: &[Port]) -> Result<Stack, String> {
        let open = || {
            let mut chain = open(layers, true)?;
            Stack::new(&mut chain, ports).map_err(|e| e.to_string())
        };
        let opened = open().or_else(|e| {
            // There may be no room for the bits of bitmaps, which are refused then.
            let here = self.bitmaps.on == layers[0].name;
            if here && no_room(&e) && self.bitmaps.give_up(&mut layers[0].disk.clone())? {
                open()
            } else {
                Err(e)
            }
        });
        if opened.is_ok()
            && let Some(layer) = layers.iter().find(|l| l.name == self.bitmaps.on)
        {
            self.outcome.no_place += self.bitmaps.look(&mut layer.disk.clone())?;
        }
        opened
    }

    fn attach(&mut self, life: &Life, mut layers: Vec<Layer>) -> Result<Attached, String> {
        let mut size = None;
        if life.extends {
            let end = image_end(&mut layers[0].disk)?.next_multiple_of(4096);
            layers[0].disk.set_size(end);
            size = Some(end);
        }
        let mut count = 0..;
        let mut number = |l: &Layer| l.disks().zip(&mut count).map(|(_, n)| n).collect();
        let leaves = layers.iter().map(&mut number).collect();
        let disks: Vec<_> = layers.iter().flat_map(Layer::disks).collect();
        let durable_bitmaps = self.bitmaps.durable;
        let options = Options { slots: life.slots, l2_cache: life.l2_cache, durable_bitmaps };
        let (guest, trace) = ((life.depth, life.sleepy), self.trace.clone());
        let stack = |ports: &[Port]| self.stack(&layers, ports);
        let reactors = Reactors::new(&disks, stack, options, guest, trace)?;
        let cut_at = match life.end {
            End::Cut(n) | End::Lost(n) => layers[0].writes().saturating_add(n),
            End::CutClose(_) | End::Close => u64::MAX,
        };
        let (stage, begun, leaks) = (Stage::Later, 0, self.leaks);
        let faults = Faults::default();
        let journal = life.dies.map(|bytes| Region::new(bytes, PageSize::Small).expect("memory"));
        let mut a = Attached {
            layers,
            leaves,
            reactors,
            stage,
            begun,
            leaks,
            faults,
            journal,
            cut_at,
            size,
        };
        a.reactors.image().may_grow(life.extends);
        if let Some(region) = &a.journal {
            a.reactors.image().keep_journal(Journal::new(region.clone(), 0));
        }
        a.set_faults(life.faults);
        Ok(a)
    }

    fn drive(&mut self, life: &Life, a: &mut Attached, rng: &mut Rng) -> Result<Ended, String> {
        let mut d = Drive::new(self.plan, life, self.model.len(), rng);
        while d.sent < life.requests || a.reactors.open() > 0 {
            if let Some(ended) = self.step(life, a, &mut d, rng)? {
                return Ok(ended);
            }
        }
        if let Some((loads, parked, allocated)) = a.reactors.counters() {
            self.outcome.loads += loads;
            self.outcome.parked += parked;
            self.outcome.allocated += allocated;
        }
        if matches!(life.end, End::Cut(_) | End::Lost(_)) {
            return Ok(if life.dies.is_some() { Ended::Dead } else { Ended::Cut });
        }
        // All that is wrong with the disk ends: now everything must come right.
        a.set_faults(Faults::default());
        a.layers[0].disk.set_no_space_from(u64::MAX);
        if let End::CutClose(n) = life.end {
            a.cut_at = a.layers[0].writes() + n;
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

    /// Something happens. Returns how the life ended, if it did.
    pub(crate) fn step(
        &mut self,
        life: &Life,
        a: &mut Attached,
        d: &mut Drive,
        rng: &mut Rng,
    ) -> Result<Option<Ended>, String> {
        if life.full && rng.one_in(100) {
            d.full = !d.full;
            let from = if d.full { rng.below(self.plan.disk.size) } else { u64::MAX };
            a.layers[0].disk.set_no_space_from(from);
        }
        if life.satellites > 0 && rng.one_in(25) {
            if (a.reactors.count() as u64) <= life.satellites {
                a.reactors.join()?;
            } else if rng.one_in(8) {
                a.reactors.leave();
            }
        }
        self.extend(a, rng);
        if d.sent < life.requests && rng.one_in(3) {
            for _ in 0..rng.within(1, 4) {
                d.sent += u64::from(self.send(&d.load, a, rng));
            }
        }
        a.reactors.turn(rng);
        d.idle += 1;
        for n in 0..a.reactors.count() {
            while let Some((op, status)) = a.reactors.at(n).guest().receive(&mut self.model)? {
                self.judge(life, &op, status)?;
                self.outcome.requests += 1;
                self.outcome.failed += u64::from(!status.is_ok());
                self.outcome.no_space += u64::from(status == Status::NoSpace);
                d.idle = 0;
            }
        }
        if d.idle > PATIENCE {
            let (open, why) = (a.reactors.open(), a.reactors.explain());
            return Err(format!("{open} requests are never answered{why}"));
        }
        if a.is_cut() {
            if matches!(life.end, End::Cut(_)) {
                return Ok(Some(if life.dies.is_some() { Ended::Dead } else { Ended::Cut }));
            }
            a.layers[0].disks().for_each(Disk::lose);
            a.cut_at = u64::MAX;
        }
        if self.change(life, a, d, rng)? {
            return Ok(Some(Ended::Cut));
        }
        if life.dense && a.layers[0].writes() != d.looked_at {
            d.looked_at = a.layers[0].writes();
            check(&mut a.layers[0].disk.frozen(rng), Repair::None)?;
            self.outcome.cuts += 1;
        }
        if self.plan.solid > 0 && d.growth < MOST_LOOKS && is_growing(&a.layers[0].disk) {
            d.growth += 1;
            check(&mut a.layers[0].disk.frozen(rng), Repair::None)?;
            self.outcome.cuts += 1;
        }
        if d.probes > 0 && rng.one_in(150) {
            d.probes -= 1;
            self.probe(a, rng)?;
        }
        Ok(None)
    }

    /// Makes the device larger for those that wait, a little, until it is as large as it gets.
    fn extend(&mut self, a: &mut Attached, rng: &mut Rng) {
        let Some(size) = a.size.filter(|_| a.reactors.waits_for_space()) else { return };
        if !rng.one_in(50) {
            return;
        }
        if size >= self.plan.disk.size {
            a.reactors.image().may_grow(false);
            return;
        }
        let more = rng.within(1, 16) << self.plan.cluster_bits;
        let size = (size + more).next_multiple_of(4096).min(self.plan.disk.size);
        a.layers[0].disk.set_size(size);
        a.reactors.image().has_more_space(size);
        a.size = Some(size);
        self.outcome.extended += 1;
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
        if sent && changes {
            self.bitmaps.sent(&op);
        }
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
            // The disk became smaller while it was on its way.
            Status::Invalid => op.first + op.count > self.model.len(),
            // A read needs no space; what a flush needs was taken before.
            Status::NoSpace => !matches!(op.op, Op::Read),
            _ => false,
        };
        if may { Ok(()) } else { Err(format!("{op:?} ends with: {status}")) }
    }

    /// Looks at what a power cut would leave now.
    fn probe(&mut self, a: &Attached, rng: &mut Rng) -> Result<(), String> {
        let layers = a.layers.iter().map(|l| l.frozen(rng)).collect();
        self.verify(layers, Ended::Cut)?;
        self.outcome.cuts += 1;
        Ok(())
    }

    /// The image rests, and what is on disk has so many sectors now: guests know it, too.
    pub(crate) fn follow_size(&mut self, sectors: u64, d: &mut Drive, rng: &mut Rng) {
        self.resized(sectors);
        d.load = Drive::load(self.plan, sectors, rng);
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
        self.kept += other.kept;
        self.commits += other.commits;
        self.resizes += other.resizes;
        self.data_files += other.data_files;
        self.files += other.files;
        self.no_place += other.no_place;
        self.deaths += other.deaths;
        self.redone += other.redone;
        self.trusted += other.trusted;
        self.unsaved += other.unsaved;
        self.loads += other.loads;
        self.parked += other.parked;
        self.allocated += other.allocated;
        self.failed += other.failed;
        self.no_space += other.no_space;
        self.extended += other.extended;
        self.qemu += other.qemu;
        self.no_qemu += other.no_qemu;
    }
}

/// Where an image ends.
fn image_end(disk: &mut Disk) -> Result<u64, String> {
    let report = qcow::check::run(disk, "sim", Repair::None, &mut |_| {});
    report.map(|report| report.image_end_offset).map_err(|e| e.to_string())
}

/// Whether something was not done for want of space.
pub(crate) fn no_room(error: &str) -> bool {
    error.contains("no room") || error.contains("space")
}

/// Whether a cut would leave it to chance which refcount table there is, or what is in it.
fn is_growing(disk: &Disk) -> bool {
    let mut header = [0; 64];
    if disk.clone().read_at(0, &mut header).is_err() {
        return false;
    }
    let table = header[48..56].iter().fold(0, |n, &b| n << 8 | u64::from(b));
    let clusters = header[56..60].iter().fold(0, |n, &b| n << 8 | u64::from(b));
    disk.is_volatile(0, 64) || disk.is_volatile(table, clusters * 512)
}
