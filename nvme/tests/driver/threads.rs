//! Everything on threads of its own: the model, the control thread, and two reactors that write
//! and verify while the controller is reset under them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{Layout, Memory, disk};
use block::{BlockQueue, Completions, Flags, Op, Request, Status, Submit, Tag};
use dma::{PageSize, Region};
use nvme::{Bar, Clock, Controller, DmaMapper, Doorbell, Options, QueuePair, State};
use nvme_model::{Registers, ThreadDriver};

struct RegisterBar(Arc<Registers>);

struct RegisterBell(Arc<Registers>, u64);

impl Doorbell for RegisterBell {
    fn ring(&self, value: u32) {
        self.0.write32(self.1, value);
    }
}

impl Bar for RegisterBar {
    type Doorbell = RegisterBell;

    fn read32(&self, at: u64) -> u32 {
        self.0.read32(at)
    }

    fn read64(&self, at: u64) -> u64 {
        self.0.read64(at)
    }

    fn write32(&self, at: u64, value: u32) {
        self.0.write32(at, value);
    }

    fn write64(&self, at: u64, value: u64) {
        self.0.write64(at, value);
    }

    fn doorbell(&self, at: u64) -> Option<RegisterBell> {
        Some(RegisterBell(self.0.clone(), at))
    }
}

struct RealTime(reactor::Clock);

impl Clock for RealTime {
    fn now(&mut self) -> u64 {
        self.0.now()
    }

    fn pause(&mut self) {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Writes blocks of its half of the disk and reads them back, one generation after the other.
fn reactor_thread(mut queue: QueuePair<RegisterBar>, who: u64, rounds: u64) -> (u64, u64) {
    const DEPTH: usize = 16;
    let clock = reactor::Clock::real();
    let data = Region::new(DEPTH * 4096, PageSize::Small).unwrap();
    queue.register(&data).unwrap();
    let mut out = Completions::new();
    let (mut good, mut failed) = (0, 0);
    let word = |round: u64, i: u64| who << 56 | round << 16 | i;
    for round in 0..rounds {
        for op in [Op::Write, Op::Read] {
            let mut waiting = 0u32;
            for i in 0..DEPTH as u64 {
                let v = if op == Op::Write { word(round, i) } else { 0 };
                data.write_words(i as usize * 4096 + 4088, &[v]);
                let segs = [data.seg(i * 4096, 4096).unwrap()];
                let r = Request {
                    tag: Tag::new(who as u16, i as u16, round as u32),
                    op,
                    flags: Flags::NONE,
                    unit: 0,
                    offset: (who << 20) + i * 4096,
                    len: 4096,
                    segs: &segs,
                };
                while queue.submit(&r).is_err() {
                    turn(&mut queue, &clock, &mut out, &mut waiting, &mut failed, round);
                }
                waiting |= 1 << i;
            }
            while waiting != 0 {
                turn(&mut queue, &clock, &mut out, &mut waiting, &mut failed, round);
            }
        }
        let failures_so_far = failed;
        for i in 0..DEPTH as u64 {
            let [v] = data.read_words(i as usize * 4096 + 4088);
            if v == word(round, i) {
                good += 1;
            } else {
                assert!(failures_so_far > 0, "{who} {round} {i}: {v:#x}");
            }
        }
    }
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(queue.stats().stale_cids, 0);
    (good, failed)
}

fn turn(
    queue: &mut QueuePair<RegisterBar>,
    clock: &reactor::Clock,
    out: &mut Completions,
    waiting: &mut u32,
    failed: &mut u64,
    round: u64,
) {
    queue.set_now(clock.now());
    out.clear();
    if queue.poll(out) == 0 {
        std::thread::yield_now();
    }
    for c in out.iter() {
        assert_eq!(u64::from(c.tag.generation()), round & 0xffff_ffff);
        let bit = 1 << c.tag.slot();
        assert!(*waiting & bit != 0, "answered twice");
        *waiting &= !bit;
        if c.status != Status::Ok {
            assert_eq!(c.status, Status::Timeout);
            *failed += 1;
        }
    }
}

#[test]
fn resets_under_load_from_another_thread() {
    resets_under_load(false);
}

#[test]
fn resets_under_load_with_shadow_doorbells() {
    resets_under_load(true);
}

fn resets_under_load(doorbell_buffer: bool) {
    let memory = Memory::new(Layout::Contiguous);
    let faults = "cfs:op=write,nth=400;cfs:op=read,nth=1300;lost:op=write,nth=2000,count=2;\
                  delay=3:op=read,every=5";
    let options = nvme_model::Options {
        faults: faults.parse().unwrap(),
        doorbell_buffer,
        ..nvme_model::Options::default()
    };
    let model =
        nvme_model::Controller::new(options, vec![disk(16384, 512)], memory.clone()).unwrap();
    let (registers, stats) = (model.registers().clone(), model.stats().clone());
    let device = ThreadDriver::spawn(model, || ()).unwrap();
    let mut clock = RealTime(reactor::Clock::real());
    let options = Options {
        io_queues: 2,
        queue_entries: 32,
        // The abort's patience is real time too, so only one of the lost ones is waited for.
        command_timeout: 300_000_000,
    };
    let mapper: Arc<dyn DmaMapper> = Arc::new(memory.clone());
    let mut controller =
        Controller::open(RegisterBar(registers), mapper, options, &mut clock).unwrap();
    let queues = [(); 2].map(|()| controller.create_queue_pair(&mut clock).unwrap());
    let stop = AtomicBool::new(false);
    let results = std::thread::scope(|s| {
        let control = s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let state = controller.step(clock.now());
                assert_ne!(state, State::Failed, "{controller:?}");
                clock.pause();
            }
        });
        let reactors = queues
            .into_iter()
            .enumerate()
            .map(|(i, q)| s.spawn(move || reactor_thread(q, i as u64 + 1, 80)))
            .collect::<Vec<_>>();
        // Stopped before anything can fail here: a thread that goes on would hang the test.
        let results: Vec<_> = reactors.into_iter().map(|r| r.join()).collect();
        stop.store(true, Ordering::Relaxed);
        control.join().unwrap();
        results.into_iter().map(Result::unwrap).collect::<Vec<_>>()
    });
    for (good, failed) in results {
        assert!(good > 80 * 16 - 200 && failed <= 4, "{good} good, {failed} failed");
    }
    assert_eq!(stats.snapshot().dma_faults, 0);
    assert!(stats.snapshot().resets >= 3, "{:?}", stats.snapshot());
    controller.close(&mut clock).unwrap();
    drop(device);
    assert_eq!(memory.mapped_pages(), 0, "all memory is free of the device");
}
