//! The stepping thread, and the two halves on different threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dma::{PageSize, Region};
use nvme_model::{Controller, Options, RegionMemory, ThreadDriver, iommu};
use nvme_spec::{Aqa, Csts, Sqe, cq_head_doorbell, offset, sq_tail_doorbell};
use zerocopy::IntoBytes;

use crate::host::*;

const ENTRIES: u32 = 16;

/// A host with admin queue only, on this thread; the device is on another.
struct Threaded {
    driver: ThreadDriver<RegionMemory>,
    regs: Arc<nvme_model::Registers>,
    region: Arc<Region>,
    tail: u32,
    head: u32,
    phase: bool,
}

fn threaded() -> Threaded {
    let (mut host, memory) = iommu();
    let region = Region::new(DATA + 8192, PageSize::Small).unwrap();
    host.map_at(IOVA, &region).unwrap();
    let ctl = Controller::new(Options::default(), vec![disk(64, 512)], memory).unwrap();
    let regs = Arc::clone(ctl.registers());
    let driver = ThreadDriver::spawn(ctl, || {}).unwrap();
    regs.write32(offset::AQA, Aqa(0).with_asqs(ENTRIES - 1).with_acqs(ENTRIES - 1).0);
    regs.write64(offset::ASQ, bus(sq_at(0)));
    regs.write64(offset::ACQ, bus(cq_at(0)));
    regs.write32(offset::CC, Host::cc().0);
    while Csts(regs.read32(offset::CSTS)).rdy() == 0 {
        std::thread::yield_now();
    }
    Threaded { driver, regs, region, tail: 0, head: 0, phase: true }
}

impl Threaded {
    fn run(&mut self, sqe: Sqe) {
        self.region.write(sq_at(0) + self.tail as usize * 64, sqe.as_bytes());
        self.tail = (self.tail + 1) % ENTRIES;
        self.regs.write32(sq_tail_doorbell(0, 0), self.tail);
        let at = cq_at(0) + self.head as usize * 16 + 12;
        loop {
            let dw = self.region.load32(at, Ordering::Acquire);
            if (dw >> 16 & 1 == 1) == self.phase {
                assert_eq!((dw as u16, dw >> 17), (sqe.cid(), 0));
                break;
            }
            std::thread::yield_now();
        }
        self.head = (self.head + 1) % ENTRIES;
        self.phase ^= self.head == 0;
        self.regs.write32(cq_head_doorbell(0, 0), self.head);
    }
}

#[test]
fn commands_across_threads() {
    let mut host = threaded();
    for i in 0..2000u16 {
        let at = bus(DATA) + u64::from(i % 2) * 4096;
        host.run(Sqe::identify(i, nvme_spec::Cns::Namespace, 1).with_prps(at, 0));
        let offset = DATA + usize::from(i % 2) * 4096;
        // Data is there when the completion is.
        assert_eq!(host.region.load64(offset, Ordering::Relaxed), 64);
        host.region.store64(offset, 0, Ordering::Relaxed);
    }
    // Asleep by now; it wakes by itself.
    std::thread::sleep(Duration::from_millis(30));
    host.run(Sqe::abort(1, 0, 77));
}

#[test]
fn calls_stop_and_start() {
    let mut host = threaded();
    assert_eq!(host.driver.call(|ctl| ctl.resize_namespace(1, 99)), Some(true));
    host.run(Sqe::identify(1, nvme_spec::Cns::Namespace, 1).with_prps(bus(DATA), 0));
    assert_eq!(host.region.load64(DATA, Ordering::Relaxed), 99);
    let Threaded { driver, regs, region, tail, head, phase } = host;
    let mut ctl = driver.stop().unwrap();
    let stats = ctl.stats().snapshot();
    assert_eq!((stats.admin, stats.completions), (1, 1));
    assert!(!ctl.step(0));
    // Goes on where it was on another thread, which starts with what it is told.
    let started = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&started);
    let driver = ThreadDriver::spawn(ctl, move || seen.store(true, Ordering::Release)).unwrap();
    let mut host = Threaded { driver, regs, region, tail, head, phase };
    host.run(Sqe::abort(2, 0, 77));
    assert!(started.load(Ordering::Acquire));
}
