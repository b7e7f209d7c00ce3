//! Throughput of one image on one reactor and on two, each on a thread of its own that is the guest
//! too, over memory. Times: so only reported, and only where there are idle processors for them.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use blkif::Signal;
use block::{Blocking, Layer, MemQueue, Port};
use node::{Image, Leaf, ReactorCore};
use qcow::create::{CreateOptions, create};
use qcow::open::{Chain, ChainOptions, Format, Opened};
use qcow::run::{Options, Seat, Stack};
use reactor::{Clock, Mailbox, Wake};
use serde::Serialize;

use crate::Error;
use crate::guest::{Guest, Kick, Mix};
use crate::rig::{BLOCKS, ORDER, add_ring, close_further};
use crate::stamp::BLOCK;

/// Requests in flight of each guest.
const DEPTH: usize = 32;

/// Random reads that hit, per second.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Several {
    /// By one reactor; `null` where it was not measured.
    pub one: Option<f64>,
    /// By two at a time, together.
    pub two: Option<f64>,
    /// `two / one`.
    pub ratio: Option<f64>,
    /// Why it was not measured.
    pub reason: Option<String>,
}

/// What the threads do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Phase {
    Prepare,
    One,
    Pause,
    Two,
    End,
}

/// What the threads know of each other.
struct Shared {
    phase: AtomicUsize,
    /// By reactor: reads of the phase that is measured.
    reads: [AtomicU64; 2],
    /// The satellite's guest asks for nothing any more.
    away_rests: AtomicBool,
    device: MemQueue,
}

impl Shared {
    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Prepare,
            1 => Phase::One,
            2 => Phase::Pause,
            3 => Phase::Two,
            _ => Phase::End,
        }
    }

    fn enter(&self, phase: Phase) {
        self.phase.store(phase as usize, Ordering::Release);
    }
}

/// Measures both for `seconds` each.
///
/// # Errors
/// If it cannot be set up, or an answer was wrong.
pub fn several(seconds: f64) -> Result<Several, Error> {
    let idle = idle_processors()?;
    if idle < 2 {
        let reason = format!("two reactors need two idle processors; there are {idle}");
        return Ok(Several { reason: Some(reason), ..Several::default() });
    }
    let device = MemQueue::new(4 * BLOCKS * BLOCK as u64, 512).map_err(Error::other)?;
    let (phase, reads) = (AtomicUsize::new(0), [const { AtomicU64::new(0) }; 2]);
    let shared = Shared { phase, reads, away_rests: AtomicBool::new(false), device };
    let (send, receive) = std::sync::mpsc::channel();
    let clock = Clock::real();
    std::thread::scope(|scope| {
        let home = scope.spawn(|| {
            let done = home(&shared, send);
            // Nobody waits for what does not come.
            shared.enter(Phase::End);
            done
        });
        let measured = receive.recv().map(|(mailbox, generations)| {
            let away = scope.spawn(|| away(&shared, mailbox, generations));
            let window = |phase: Phase, after: Phase| {
                let before = shared.reads.each_ref().map(|r| r.load(Ordering::Relaxed));
                let began = clock.now();
                shared.enter(phase);
                std::thread::sleep(Duration::from_secs_f64(seconds));
                shared.enter(after);
                let took = (clock.now() - began) as f64 / 1e9;
                let after = shared.reads.each_ref().map(|r| r.load(Ordering::Relaxed));
                after.iter().zip(before).map(|(a, b)| (a - b) as f64).sum::<f64>() / took
            };
            std::thread::sleep(Duration::from_millis(100));
            let one = window(Phase::One, Phase::Pause);
            std::thread::sleep(Duration::from_millis(100));
            let two = window(Phase::Two, Phase::End);
            (one, two, away.join())
        });
        let panicked = |_| Error::other("a reactor thread panicked");
        home.join().map_err(panicked)??;
        let (one, two, away) = measured.map_err(|_| Error::other("the home reactor has ended"))?;
        away.map_err(panicked)??;
        let ratio = Some(two / one);
        Ok(Several { one: Some(one), two: Some(two), ratio, reason: None })
    })
}

/// A fresh image in the device's memory.
fn image(device: &MemQueue) -> Result<Stack, Error> {
    let leaf = Leaf::memory(device.another());
    let mut storage = Blocking::new(leaf, 0).map_err(Error::other)?;
    let options = CreateOptions::new(BLOCKS * BLOCK as u64);
    create(&mut storage, "bench", &options).map_err(node::Error::from)?;
    let top = Opened { storage, path: None, name: "bench".to_owned(), id: None };
    let format = Some(Format::Qcow2);
    let options = ChainOptions { writable: true, format, ..ChainOptions::default() };
    let none =
        &mut |_: &qcow::open::BackingRef| Err(qcow::Error::refused("bench", "has a backing file"));
    let mut chain = Chain::open(top, options, none).map_err(node::Error::from)?;
    Ok(Stack::new(&mut chain, &[Port { leaf: 0, unit: 0 }]).map_err(node::Error::from)?)
}

/// One reactor with its guest.
struct Pair {
    core: ReactorCore,
    image: usize,
    guest: Guest,
    frontend: usize,
    clock: Clock,
}

impl Pair {
    fn new(
        shared: &Shared,
        make: impl FnOnce(u16, &mut [Leaf], Wake) -> Result<Image, String>,
    ) -> Result<Pair, Error> {
        let clock = Clock::real();
        let mut core = ReactorCore::new(clock.clone()).map_err(Error::other)?;
        let leaf = Leaf::memory(shared.device.another());
        core.add_leaf(leaf).map_err(Error::other)?;
        let wake = core.wake();
        let made = core.add_image(|owner, leaves| make(owner, leaves, wake.clone()));
        let image = made.map_err(Error::other)?;
        let guest = Guest::new(ORDER, BLOCKS, Kick { signal: Signal::default(), wake })?;
        let frontend = add_ring(&mut core, image, &guest)?;
        Ok(Pair { core, image, guest, frontend, clock })
    }

    fn round(&mut self, mix: Mix, depth: usize) -> Result<u64, Error> {
        let now = self.clock.now();
        self.guest.send(mix, depth, now);
        self.core.turn();
        let done = self.guest.reap(now) as u64;
        self.guest.failure.as_ref().map_or(Ok(done), |e| Err(Error::other(e)))
    }

    /// Reads in the phases in which this reactor is measured, until the end.
    fn run(&mut self, shared: &Shared, number: usize, from: Phase) -> Result<(), Error> {
        let reads = &shared.reads[number];
        loop {
            let (phase, mut done) = (shared.phase(), 0);
            match phase {
                Phase::End => break,
                Phase::One | Phase::Two if phase >= from => {
                    // The other threads' lines are looked at rarely.
                    for _ in 0..64 {
                        done += self.round(Mix::Read, DEPTH)?;
                    }
                }
                _ => done += self.round(Mix::Read, 0)?,
            }
            reads.store(reads.load(Ordering::Relaxed) + done, Ordering::Relaxed);
        }
        while self.guest.in_flight() > 0 {
            self.round(Mix::Read, 0)?;
        }
        let removed = self.core.remove_frontend(self.frontend);
        removed.map(drop).ok_or_else(|| Error::other("the ring is still in use"))
    }
}

type Ready = (Mailbox<ReactorCore>, Vec<u32>);

fn home(shared: &Shared, ready: std::sync::mpsc::Sender<Ready>) -> Result<(), Error> {
    let stack = image(&shared.device)?;
    let mut pair = Pair::new(shared, |owner, leaves, _| {
        let image = qcow::run::Image::attach(stack, owner, leaves, Options::default())?;
        Ok(Image::Qcow(Box::new(image)))
    })?;
    while !pair.guest.at_end() || pair.guest.in_flight() > 0 {
        pair.round(Mix::Fill, DEPTH)?;
    }
    let ours = (pair.core.mailbox(), pair.guest.generations().to_vec());
    ready.send(ours).map_err(Error::other)?;
    pair.run(shared, 0, Phase::One)?;
    // What a guest asks for while the image closes is refused.
    while !shared.away_rests.load(Ordering::Acquire) {
        pair.core.turn();
    }
    // The close waits for the satellite, which closes too.
    pair.core.with_image(pair.image, |i, _| Layer::<Leaf>::close(i));
    while pair.core.remove_closed_image(pair.image).is_none() {
        pair.core.turn();
    }
    Ok(())
}

fn away(shared: &Shared, home: Mailbox<ReactorCore>, known: Vec<u32>) -> Result<(), Error> {
    let done = read_away(shared, home, known);
    shared.away_rests.store(true, Ordering::Release);
    let pair = done?;
    close_further(pair.core, pair.image)
}

fn read_away(shared: &Shared, home: Mailbox<ReactorCore>, known: Vec<u32>) -> Result<Pair, Error> {
    let mut pair = Pair::new(shared, |_, leaves, wake| {
        let seat = home.ask(|home: &mut ReactorCore| node::take_seat(home, 0, wake));
        let seat: Seat = seat.flatten().ok_or("the home reactor has ended")?;
        let ports = [Port { leaf: 0, unit: 0 }];
        let image = qcow::run::Satellite::attach(seat, &ports, leaves)?;
        Ok(Image::Satellite(Box::new(image)))
    })?;
    pair.guest.set_generations(known);
    pair.run(shared, 1, Phase::Two)?;
    Ok(pair)
}

/// How many processors were idle for most of a third of a second.
fn idle_processors() -> Result<usize, Error> {
    let before = idle_ticks()?;
    std::thread::sleep(Duration::from_millis(330));
    let after = idle_ticks()?;
    // 33 ticks of 10 ms.
    Ok(after.iter().zip(before).filter(|(a, b)| *a - b >= 30).count())
}

/// Idle ticks of each processor, those in which it waited for a disk too.
fn idle_ticks() -> Result<Vec<u64>, Error> {
    let text = std::fs::read_to_string("/proc/stat").map_err(Error::other)?;
    let cpus = text.lines().filter(|l| l.starts_with("cpu") && !l.starts_with("cpu "));
    let idle =
        |l: &str| l.split_whitespace().skip(4).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
    Ok(cpus.map(idle).collect())
}
