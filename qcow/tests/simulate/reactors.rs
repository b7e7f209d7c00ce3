//! The reactors that serve an image: its home, and others that come and go. Turned by hand on one
//! thread; one that sleeps is not turned before somebody woke it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{BlockQueue, Claims, HasWork, Layer, Port, RmwQueue, Status};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use qcow::run::{Image, Options, Satellite, Stack, Wakes};
use reactor::{Clock, Core};
use sim::{Disk, Guest, Rng, SimQueue, Trace};

pub(crate) type Leaf = RmwQueue<SimQueue>;

/// Queues to a disk at a time: one for each reactor.
const QUEUES: usize = 8;

/// One reactor.
pub(crate) struct Turned<I> {
    core: Core<Leaf, I, Guest>,
    asleep: bool,
    sleepy: bool,
}

/// What is done with a reactor, whatever it serves the image by.
pub(crate) trait Turn {
    /// One turn, unless it sleeps.
    fn turn(&mut self, rng: &mut Rng);
    fn guest(&mut self) -> &mut Guest;
    /// What somebody does who has something for it.
    fn wake(&mut self);
}

impl<I: Layer<Leaf>> Turned<I> {
    fn new(all: &Ground, sleepy: bool) -> Result<Turned<I>, String> {
        let mut core = Core::new(all.clock.clone()).map_err(|e| e.to_string())?;
        for (disk, claims) in all.disks.iter().zip(&all.claims) {
            core.add_leaf(RmwQueue::new(SimQueue::new(disk), claims)?)?;
        }
        Ok(Turned { core, asleep: false, sleepy })
    }

    fn add_guest(&mut self, all: &Ground) -> Result<(), String> {
        let (depth, trace) = (all.depth, all.trace.clone());
        let guest = move |owner| Guest::new(owner, depth, trace).map_err(|e| e.to_string());
        self.core.add_frontend(0, |owner, _| guest(owner)).map(drop)
    }

    fn close(&mut self) {
        if let Some(image) = self.core.image(0) {
            Layer::<Leaf>::close(image);
        }
        self.wake();
    }
}

impl<I: Layer<Leaf>> Turn for Turned<I> {
    fn turn(&mut self, rng: &mut Rng) {
        let wake = self.core.wake();
        if self.asleep {
            let mut fds = [PollFd::new(wake.fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::ZERO) != Ok(1) {
                return;
            }
            wake.awake();
            self.asleep = false;
        }
        if self.core.turn() || !self.sleepy || rng.one_in(2) {
            return;
        }
        wake.about_to_sleep();
        self.asleep = self.core.arm() == HasWork::No;
        if !self.asleep {
            wake.awake();
        }
    }

    fn guest(&mut self) -> &mut Guest {
        self.core.frontend(0).expect("it is attached")
    }

    fn wake(&mut self) {
        self.core.wake().wake();
    }
}

fn in_flight<I: Layer<Leaf>>(core: &mut Core<Leaf, I, Guest>) -> usize {
    core.leaves().iter().map(BlockQueue::in_flight).sum()
}

/// What all reactors share.
struct Ground {
    disks: Vec<Disk>,
    claims: Vec<Arc<Claims>>,
    ports: Vec<Port>,
    clock: Clock,
    depth: u16,
    trace: Trace,
}

/// See the module's text.
pub(crate) struct Reactors {
    ground: Ground,
    time: Arc<AtomicU64>,
    home: Turned<Image>,
    away: Vec<Turned<Satellite>>,
}

impl Reactors {
    /// A home reactor for an image whose layers are on these disks, the one that is written to first.
    pub(crate) fn new(
        disks: &[&Disk],
        make: impl FnOnce(&[Port]) -> Result<Stack, String>,
        options: Options,
        (depth, sleepy): (u16, bool),
        trace: Trace,
    ) -> Result<Reactors, String> {
        let (clock, time) = Clock::virtual_clock();
        let ports: Vec<Port> = (0..disks.len() as u16).map(|leaf| Port { leaf, unit: 0 }).collect();
        let claims = disks.iter().map(|_| Claims::new(QUEUES)).collect();
        let disks = disks.iter().map(|&disk| disk.clone()).collect();
        let ground = Ground { disks, claims, ports, clock, depth, trace };
        let mut home = Turned::new(&ground, sleepy)?;
        let stack = make(&ground.ports)?;
        home.core.add_image(|owner, leaves| Image::attach(stack, owner, leaves, options))?;
        home.add_guest(&ground)?;
        Ok(Reactors { ground, time, home, away: Vec::new() })
    }

    /// One more reactor.
    pub(crate) fn join(&mut self) -> Result<(), String> {
        let mut new: Turned<Satellite> = Turned::new(&self.ground, self.home.sleepy)?;
        let wakes = Wakes { home: self.home.core.wake(), away: new.core.wake() };
        let seat = self.home.core.image(0).ok_or("no image")?.seat(wakes);
        let ports = &self.ground.ports;
        new.core.add_image(|_, leaves| Satellite::attach(seat, ports, leaves))?;
        new.add_guest(&self.ground)?;
        self.away.push(new);
        Ok(())
    }

    /// The last one that joined goes, if nothing of its guest is open.
    pub(crate) fn leave(&mut self) {
        if let Some(mut last) = self.away.pop_if(|last| last.guest().open() == 0) {
            last.close();
        }
    }

    /// One more disk for all of them: the number of its leaf queues.
    pub(crate) fn add_disk(&mut self, disk: &Disk) -> Result<u16, String> {
        let claims = Claims::new(QUEUES);
        for away in &mut self.away {
            away.core.add_leaf(RmwQueue::new(SimQueue::new(disk), &claims)?)?;
        }
        let number = self.home.core.add_leaf(RmwQueue::new(SimQueue::new(disk), &claims)?)?;
        self.home
            .core
            .with_image(0, |i, leaves| i.take_leaf(number, leaves))
            .ok_or("no image")??;
        self.ground.disks.push(disk.clone());
        self.ground.claims.push(claims);
        Ok(number)
    }

    /// The image, for what somebody asks of it. Its reactor is woken.
    pub(crate) fn image(&mut self) -> &mut Image {
        self.home.wake();
        self.home.core.image(0).expect("it is attached")
    }

    /// Whether requests wait for space. Nobody is woken for that.
    pub(crate) fn waits_for_space(&mut self) -> bool {
        self.home.core.image(0).is_some_and(|i| i.space().waiting() > 0)
    }

    /// The image rests: from now on it has these layers.
    pub(crate) fn restack(
        &mut self,
        make: impl FnOnce(&[Port]) -> Result<Stack, String>,
        leaves: &[u16],
        keep: bool,
    ) -> Result<(), String> {
        let ports: Vec<Port> = leaves.iter().map(|&leaf| Port { leaf, unit: 0 }).collect();
        let stack = make(&ports)?;
        let restacked = self.home.core.with_image(0, |i, l| i.restack(stack, l, keep));
        restacked.ok_or("no image")??;
        let news = self.image().reseat();
        for away in &mut self.away {
            let reseated = away.core.with_image(0, |s, l| s.reseat(&news, &ports, l));
            reseated.ok_or("no satellite")??;
        }
        self.ground.ports = ports;
        Ok(())
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        1 + self.away.len()
    }

    pub(crate) fn at(&mut self, n: usize) -> &mut dyn Turn {
        match n {
            0 => &mut self.home,
            n => &mut self.away[n - 1],
        }
    }

    /// Time passes, and one of them has a turn.
    pub(crate) fn turn(&mut self, rng: &mut Rng) {
        self.time.fetch_add(rng.within(1, 20_000), Ordering::Relaxed);
        let n = rng.below(self.count() as u64) as usize;
        self.at(n).turn(rng);
    }

    /// Requests whose answers nobody has looked at.
    pub(crate) fn open(&mut self) -> usize {
        (0..self.count()).map(|n| self.at(n).guest().open()).sum()
    }

    /// What each reactor waits for, for a message.
    pub(crate) fn explain(&mut self) -> String {
        let mut text = String::new();
        for n in 0..self.count() {
            let (asleep, in_flight) = match n {
                0 => (self.home.asleep, in_flight(&mut self.home.core)),
                n => (self.away[n - 1].asleep, in_flight(&mut self.away[n - 1].core)),
            };
            let guest = self.at(n).guest();
            text += &format!(
                "; reactor {n}: {} open, {} taken, asleep: {asleep}, {in_flight} with disks",
                guest.open(),
                block::Frontend::in_flight(guest)
            );
        }
        text
    }

    /// Begins the close, on all of them in any order.
    pub(crate) fn close(&mut self, rng: &mut Rng) {
        let first = rng.one_in(2);
        if first {
            self.home.close();
        }
        self.away.iter_mut().for_each(Turned::close);
        if !first {
            self.home.close();
        }
    }

    /// How the close ended; `None` while it has not.
    pub(crate) fn closed(&mut self) -> Option<Status> {
        self.away.retain_mut(|a| a.core.remove_closed_image(0).is_none());
        self.home.core.remove_closed_image(0).map(|(_, status)| status)
    }

    /// What the image did: pages of its map that were loaded, requests that waited for others,
    /// clusters that were allocated.
    pub(crate) fn counters(&mut self) -> Option<(u64, u64, u64)> {
        let c = self.home.core.image(0)?.counters();
        Some((c.page_loads.get(), c.parked.get(), c.allocated.get()))
    }
}
