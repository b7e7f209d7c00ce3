//! `ladder ADDRESS`: what the lab runs on a device that is bound to vfio-pci, to see each rung of the
//! reset ladder on real registers with commands in flight. Prints a line for each; status 0 if all
//! were as they should be. Overwrites the start of the first namespace.
//!
//! The device is well; a wrapper around its registers lies about it once in a while, as told.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use block::{BlockQueue, Completions, Flags, Op, Request, Status, Submit, Tag};
use dma::Region;
use node::{VfioBar, VfioDoorbell, VfioMapper};
use nvme::{Bar, Controller, Options, QueuePair, ResetError, State};
use vfio::{Container, Device, Mode, Sysfs};

/// Requests in flight, each of so many bytes.
const DEPTH: usize = 32;
const BYTES: usize = 16384;

const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;

/// Lies to be told, and what really happened.
#[derive(Default)]
struct Script {
    /// CSTS shows a fatal error, once.
    fatal: AtomicBool,
    /// CC.EN=0 is not passed on, until a function reset.
    deaf: AtomicBool,
    /// Function resets fail.
    no_reset: AtomicBool,
    disables: AtomicU32,
    resets: AtomicU32,
    masters_off: AtomicU32,
}

struct Rough {
    bar: VfioBar,
    script: Arc<Script>,
}

impl Bar for Rough {
    type Doorbell = VfioDoorbell;

    fn read32(&self, offset: u64) -> u32 {
        let value = self.bar.read32(offset);
        match offset {
            CSTS if self.script.fatal.swap(false, Ordering::Relaxed) => value | 2,
            _ => value,
        }
    }

    fn read64(&self, offset: u64) -> u64 {
        self.bar.read64(offset)
    }

    fn write32(&self, offset: u64, value: u32) {
        if offset == CC && value & 1 == 0 {
            if self.script.deaf.load(Ordering::Relaxed) {
                return;
            }
            self.script.disables.fetch_add(1, Ordering::Relaxed);
        }
        self.bar.write32(offset, value);
    }

    fn write64(&self, offset: u64, value: u64) {
        self.bar.write64(offset, value);
    }

    fn doorbell(&self, offset: u64) -> Option<VfioDoorbell> {
        self.bar.doorbell(offset)
    }

    fn function_reset(&self) -> Result<(), ResetError> {
        if self.script.no_reset.load(Ordering::Relaxed) {
            return Err(ResetError::Failed("so it was told to".to_owned()));
        }
        self.bar.function_reset()?;
        self.script.deaf.store(false, Ordering::Relaxed);
        self.script.resets.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn bus_master_off(&self) -> Result<(), ResetError> {
        self.bar.bus_master_off()?;
        self.script.masters_off.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn bus_master_on(&self) -> Result<(), ResetError> {
        self.bar.bus_master_on()
    }
}

struct Time(reactor::Clock);

impl nvme::Clock for Time {
    fn now(&mut self) -> u64 {
        self.0.now()
    }

    fn pause(&mut self) {
        std::thread::sleep(Duration::from_micros(50));
    }
}

struct Rig {
    controller: Controller<Rough>,
    queue: QueuePair<Rough>,
    region: Arc<Region>,
    script: Arc<Script>,
    time: Time,
    done: Completions,
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

impl Rig {
    fn open(address: &str) -> Outcome<Rig> {
        let sysfs = Sysfs::default();
        let function = sysfs.function(address.parse()?)?;
        let container = Container::open(Mode::Iommu, sysfs.clone(), &function)?;
        let device = Arc::new(Device::open(&container, &sysfs, function.address)?);
        let interrupt = device.admin_interrupt()?.ok_or("no MSI-X")?;
        let script = Arc::new(Script::default());
        let bar = Rough { bar: VfioBar::new(device), script: script.clone() };
        let mut time = Time(reactor::Clock::real());
        let mapper = Arc::new(VfioMapper::new(container));
        let mut controller = Controller::open(bar, mapper, Options::default(), &mut time)?;
        let heard = interrupt.read()?;
        println!("ok: up, {heard} interrupts of the admin queue");
        let mut queue = controller.create_queue_pair(&mut time)?;
        let region = Region::new_best(2 * DEPTH * BYTES)?;
        queue.register(&region)?;
        Ok(Rig { controller, queue, region, script, time, done: Completions::new() })
    }

    /// Sends requests of one kind, all at once; `meanwhile` is called when they are with the device.
    /// Returns their statuses.
    fn batch(&mut self, op: Op, meanwhile: impl FnOnce(&mut Rig)) -> Outcome<Vec<Status>> {
        let base = if op == Op::Read { DEPTH * BYTES } else { 0 };
        for i in 0..DEPTH {
            let seg =
                self.region.seg((base + i * BYTES) as u64, BYTES as u32).ok_or("no segment")?;
            let request = Request {
                tag: Tag::new(0, i as u16, 1),
                op,
                flags: Flags::NONE,
                unit: 0,
                offset: (i * BYTES) as u64,
                len: BYTES as u64,
                segs: &[seg],
            };
            self.queue.submit(&request).map_err(|_| "the queue is full")?;
        }
        self.queue.start();
        meanwhile(self);
        let mut statuses = Vec::new();
        let end = nvme::Clock::now(&mut self.time) + 60_000_000_000;
        while statuses.len() < DEPTH {
            let now = nvme::Clock::now(&mut self.time);
            if now > end {
                return Err(format!("{} of {DEPTH} requests were answered", statuses.len()).into());
            }
            self.controller.step(now);
            self.queue.set_now(now);
            self.done.clear();
            self.queue.poll(&mut self.done);
            statuses.extend(self.done.iter().map(|c| c.status));
        }
        Ok(statuses)
    }

    /// Writes new data, with something going wrong meanwhile, and reads it back.
    fn round(&mut self, seed: u8, meanwhile: impl FnOnce(&mut Rig)) -> Outcome<()> {
        let data: Vec<u8> = (0..DEPTH * BYTES).map(|i| (i / 509) as u8 ^ seed).collect();
        self.region.write(0, &data);
        self.region.zero(DEPTH * BYTES, DEPTH * BYTES);
        self.all_ok(Op::Write, meanwhile)?;
        self.all_ok(Op::Read, |_| {})?;
        let mut found = vec![0; DEPTH * BYTES];
        self.region.read(DEPTH * BYTES, &mut found);
        if found == data { Ok(()) } else { Err("what was read is not what was written".into()) }
    }

    fn all_ok(&mut self, op: Op, meanwhile: impl FnOnce(&mut Rig)) -> Outcome<()> {
        let statuses = self.batch(op, meanwhile)?;
        match statuses.iter().find(|s| **s != Status::Ok) {
            Some(s) => Err(format!("{op:?}: {s}").into()),
            None => Ok(()),
        }
    }

    /// Has the controller see a fatal error, before any answer is taken.
    fn fail(&mut self) {
        self.script.fatal.store(true, Ordering::Relaxed);
        while self.controller.state() == State::Ready {
            let now = nvme::Clock::now(&mut self.time);
            self.controller.step(now);
        }
    }

    /// Steps until the controller is in that state.
    fn wait(&mut self, state: State) -> Outcome<()> {
        let end = nvme::Clock::now(&mut self.time) + 60_000_000_000;
        loop {
            let now = nvme::Clock::now(&mut self.time);
            let there = self.controller.step(now) == state;
            if there && self.queue.is_running() == (state == State::Ready) {
                return Ok(());
            }
            if now > end {
                return Err(format!("it is {:?}, not {state:?}", self.controller.state()).into());
            }
            self.done.clear();
            self.queue.poll(&mut self.done);
            nvme::Clock::pause(&mut self.time);
        }
    }
}

fn count(n: &AtomicU32) -> u32 {
    n.load(Ordering::Relaxed)
}

fn run(address: &str) -> Outcome<()> {
    let mut rig = Rig::open(address)?;
    let script = rig.script.clone();
    rig.round(1, |_| {})?;
    let before = (count(&script.disables), rig.queue.stats().resent);
    rig.round(2, Rig::fail)?;
    if count(&script.disables) != before.0 + 1 || count(&script.resets) != 0 {
        return Err("it was not disabled once".into());
    }
    let again = rig.queue.stats().resent - before.1;
    if again == 0 {
        return Err("no write was in flight".into());
    }
    println!("ok: disabled with {again} of {DEPTH} writes in flight; all answered, data right");

    rig.round(3, |rig| {
        rig.script.deaf.store(true, Ordering::Relaxed);
        rig.fail();
    })?;
    if count(&script.resets) != 1 {
        return Err("the function was not reset once".into());
    }
    println!("ok: CC.EN=0 without effect, function reset; all of them answered, data right");

    script.no_reset.store(true, Ordering::Relaxed);
    let statuses = rig.batch(Op::Read, |rig| {
        rig.script.deaf.store(true, Ordering::Relaxed);
        rig.fail();
    })?;
    rig.wait(State::Failed)?;
    if count(&script.masters_off) != 1 || nvme::quarantined() != 0 {
        return Err("bus mastering was not switched off once, or memory is quarantined".into());
    }
    if statuses.iter().any(|s| !matches!(s, Status::Ok | Status::Gone)) {
        return Err(format!("answers {statuses:?}").into());
    }
    println!("ok: no reset works, bus mastering off; all of them answered");

    script.no_reset.store(false, Ordering::Relaxed);
    script.deaf.store(false, Ordering::Relaxed);
    rig.controller.restart();
    rig.wait(State::Ready)?;
    rig.round(4, |_| {})?;
    println!("ok: taken up again, data right");
    let Rig { controller, queue, mut time, .. } = rig;
    drop(queue);
    controller.close(&mut time)?;
    println!("ok: closed");
    Ok(())
}

fn main() -> std::process::ExitCode {
    let Some(address) = std::env::args().nth(1) else {
        println!("FAIL: an address is needed");
        return std::process::ExitCode::FAILURE;
    };
    match run(&address) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            println!("FAIL: {e}");
            std::process::ExitCode::FAILURE
        }
    }
}
