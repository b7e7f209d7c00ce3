//! What a model needs to be another process's device: interrupts, doorbells in shared memory, and a
//! reset of the function.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dma::{PageSize, Region};
use nvme_model::{Controller, DmaFault, HostMemory, Iommu, Options, RegionMemory, iommu};
use nvme_spec::{Cns, Cqe, Csts, Sqe, cq_head_doorbell, offset, sq_tail_doorbell};
use zerocopy::IntoBytes;

use crate::host::{IOVA, bus, cq_at, disk, sq_at};

/// Memory that notes the interrupts.
struct Listening(RegionMemory, Vec<u16>);

impl HostMemory for Listening {
    fn read(&mut self, addr: u64, into: &mut [u8]) -> Result<(), DmaFault> {
        self.0.read(addr, into)
    }

    fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), DmaFault> {
        self.0.write(addr, from)
    }

    fn read_u32(&mut self, addr: u64) -> Result<u32, DmaFault> {
        self.0.read_u32(addr)
    }

    fn write_u32(&mut self, addr: u64, value: u32) -> Result<(), DmaFault> {
        self.0.write_u32(addr, value)
    }

    fn write_cqe(&mut self, addr: u64, cqe: &Cqe) -> Result<(), DmaFault> {
        self.0.write_cqe(addr, cqe)
    }

    fn raise(&mut self, vector: u16) {
        self.1.push(vector);
    }
}

struct Rig {
    ctl: Controller<Listening>,
    bar: Arc<Region>,
    memory: Arc<Region>,
    _iommu: Iommu,
}

const DSTRD: u8 = 4;

impl Rig {
    fn new() -> Rig {
        let (mut iommu, memory) = iommu();
        let region = Region::new(1 << 20, PageSize::Small).unwrap();
        iommu.map_at(IOVA, &region).unwrap();
        let options = Options { dstrd: DSTRD, ..Options::default() };
        let bar = Region::new(options.bar_len() as usize, PageSize::Small).unwrap();
        let ctl = Controller::with_shared_doorbells(
            options,
            vec![disk(2048, 512)],
            Listening(memory, Vec::new()),
            bar.clone(),
        );
        Rig { ctl: ctl.unwrap(), bar, memory: region, _iommu: iommu }
    }

    fn enable(&mut self) {
        let regs = self.ctl.registers().clone();
        self.memory.zero(cq_at(0), 4096);
        regs.write32(offset::AQA, 0x000f_000f);
        regs.write64(offset::ASQ, bus(sq_at(0)));
        regs.write64(offset::ACQ, bus(cq_at(0)));
        regs.write32(offset::CC, crate::host::Host::cc().0);
        self.ctl.step(0);
        assert_eq!(Csts(regs.read32(offset::CSTS)), Csts(0).with_rdy(1));
    }

    /// The `n`th command of a queue, by the shared doorbells alone. Returns the vectors raised.
    fn run(&mut self, qid: u16, n: u32, sqe: Sqe) -> Vec<u16> {
        self.memory.write(sq_at(qid) + (n as usize - 1) * 64, sqe.as_bytes());
        self.bar.store32(sq_tail_doorbell(qid, DSTRD) as usize, n, Ordering::Release);
        assert!(self.ctl.step(0));
        let at = cq_at(qid) + (n as usize - 1) * 16 + 12;
        assert_eq!(
            self.memory.load32(at, Ordering::Acquire) >> 16,
            1,
            "success, in the first round"
        );
        self.bar.store32(cq_head_doorbell(qid, DSTRD) as usize, n, Ordering::Release);
        self.ctl.step(0);
        std::mem::take(&mut self.ctl.memory().1)
    }
}

#[test]
fn each_queue_raises_its_vector_or_none() {
    let mut rig = Rig::new();
    rig.enable();
    let id = Sqe::identify(1, Cns::Controller, 0).with_prps(bus(0x8_0000), 0);
    assert_eq!(rig.run(0, 1, id), [0]);
    for (i, vector) in [Some(5), None].into_iter().enumerate() {
        let qid = i as u16 + 1;
        let n = 2 * i as u32;
        let cq = Sqe::create_io_cq(1, qid, 16, bus(cq_at(qid)), vector);
        assert_eq!(rig.run(0, n + 2, cq), [0]);
        let sq = Sqe::create_io_sq(2, qid, 16, bus(sq_at(qid)), qid);
        assert_eq!(rig.run(0, n + 3, sq), [0]);
        let flush = Sqe::flush(3, 1);
        assert_eq!(rig.run(qid, 1, flush), vector.as_slice());
    }
}

#[test]
fn a_function_reset_forgets_queues_and_doorbells() {
    let mut rig = Rig::new();
    for round in 0..3 {
        rig.enable();
        let id = Sqe::identify(1, Cns::Controller, 0).with_prps(bus(0x8_0000), 0);
        assert_eq!(rig.run(0, 1, id), [0]);
        // As if the host went on, not knowing of the reset.
        rig.ctl.function_reset();
        let regs = rig.ctl.registers().clone();
        for register in [offset::CC, offset::CSTS, offset::AQA, offset::ASQ, offset::ACQ] {
            assert_eq!(regs.read32(register), 0);
        }
        rig.bar.store32(sq_tail_doorbell(0, DSTRD) as usize, 9, Ordering::Release);
        assert!(!rig.ctl.step(0), "round {round}: nothing is done for a disabled controller");
    }
    rig.ctl.remove();
    rig.ctl.function_reset();
    assert_eq!(rig.ctl.registers().read32(offset::CSTS), u32::MAX, "what is gone stays gone");
}

#[test]
fn memory_that_is_too_short_for_the_doorbells_is_refused() {
    let (_iommu, memory) = iommu();
    let options = Options { queues: 100, dstrd: 4, ..Options::default() };
    let bar = Region::new(8192, PageSize::Small).unwrap();
    assert!(options.bar_len() > 8192);
    assert!(Controller::with_shared_doorbells(options, vec![], memory, bar).is_err());
}
