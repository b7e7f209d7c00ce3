//! A host side made by hand: memory, queue pairs, doorbells; and nothing that hides a mistake of
//! the device. It checks of every completion that the queue, the head and the phase are right.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dma::{PageSize, Region};
use nvme_model::{
    Controller, Iommu, NamespaceConfig, Options, RegionMemory, Registers, Store, iommu,
};
use nvme_spec::{
    Aqa, Cc, Cqe, Csts, Sqe, Status, StatusCode, cq_head_doorbell, offset, sq_tail_doorbell,
};
use zerocopy::IntoBytes;

/// Bus address of the region.
pub(crate) const IOVA: u64 = 0x40_0000;
/// Offset of the data area in the region.
pub(crate) const DATA: usize = 4 << 20;
/// Size of the data area.
pub(crate) const DATA_LEN: usize = 4 << 20;
/// Offset of an area for PRP lists.
pub(crate) const LISTS: usize = 2 << 20;

/// A queue pair from the host's view.
pub(crate) struct Pair {
    pub(crate) qid: u16,
    pub(crate) entries: u32,
    pub(crate) tail: u32,
    pub(crate) head: u32,
    pub(crate) phase: bool,
}

pub(crate) struct Host {
    pub(crate) ctl: Controller<RegionMemory>,
    pub(crate) regs: Arc<Registers>,
    /// Kept: the mappings live as long as it does not unmap them.
    _iommu: Iommu,
    pub(crate) region: Arc<Region>,
    pub(crate) pairs: Vec<Pair>,
    pub(crate) now: u64,
    dstrd: u8,
}

pub(crate) fn disk(blocks: u64, lba: u32) -> NamespaceConfig {
    NamespaceConfig { store: Store::memory(), blocks, lba, read_only: false }
}

/// Where the rings of queue `qid` (0 to 7) are in the region.
pub(crate) fn sq_at(qid: u16) -> usize {
    usize::from(qid) * 0x2_0000
}

pub(crate) fn cq_at(qid: u16) -> usize {
    sq_at(qid) + 0x1_0000
}

pub(crate) fn bus(at: usize) -> u64 {
    IOVA + at as u64
}

impl Host {
    /// A controller that has power and is not enabled yet.
    pub(crate) fn cold(options: Options, namespaces: Vec<NamespaceConfig>) -> Host {
        let (mut iommu, memory) = iommu();
        let region = Region::new(DATA + DATA_LEN, PageSize::Small).unwrap();
        iommu.map_at(IOVA, &region).unwrap();
        let dstrd = options.dstrd;
        let ctl = Controller::new(options, namespaces, memory).unwrap();
        let regs = Arc::clone(ctl.registers());
        Host { ctl, regs, _iommu: iommu, region, pairs: Vec::new(), now: 0, dstrd }
    }

    /// Enabled, with I/O queue pair 1 of 64 entries.
    pub(crate) fn new(options: Options, namespaces: Vec<NamespaceConfig>) -> Host {
        let mut host = Host::cold(options, namespaces);
        host.enable(32);
        host.create_pair(1, 64);
        host
    }

    /// A default device with 2048 blocks of 512 bytes.
    pub(crate) fn simple() -> Host {
        Host::new(Options::default(), vec![disk(2048, 512)])
    }

    /// A device with a fault list.
    pub(crate) fn faulty(faults: &str) -> Host {
        let options = Options { faults: faults.parse().unwrap(), ..Options::default() };
        Host::new(options, vec![disk(2048, 512)])
    }

    pub(crate) fn csts(&self) -> Csts {
        Csts(self.regs.read32(offset::CSTS))
    }

    pub(crate) fn set_cc(&mut self, cc: Cc) {
        self.regs.write32(offset::CC, cc.0);
        self.step();
    }

    pub(crate) fn cc() -> Cc {
        Cc(0).with_en(1).with_iosqes(6).with_iocqes(4)
    }

    /// Programs the admin queues and sets CC.EN; whether the controller got ready.
    pub(crate) fn try_enable(&mut self, entries: u32) -> bool {
        self.pairs = vec![Pair { qid: 0, entries, tail: 0, head: 0, phase: true }];
        self.region.zero(cq_at(0), entries as usize * 16);
        self.regs.write32(offset::AQA, Aqa(0).with_asqs(entries - 1).with_acqs(entries - 1).0);
        self.regs.write64(offset::ASQ, bus(sq_at(0)));
        self.regs.write64(offset::ACQ, bus(cq_at(0)));
        self.set_cc(Host::cc());
        self.csts().rdy() == 1
    }

    pub(crate) fn enable(&mut self, entries: u32) {
        assert!(self.try_enable(entries), "{:?}", self.csts());
    }

    /// CC.EN=0 and all rings forgotten.
    pub(crate) fn disable(&mut self) {
        self.set_cc(Cc(0));
        self.pairs.clear();
    }

    pub(crate) fn create_pair(&mut self, qid: u16, entries: u32) {
        self.region.zero(cq_at(qid), entries as usize * 16);
        let cq = Sqe::create_io_cq(1, qid, entries, bus(cq_at(qid)), None);
        assert_ok(&self.run(0, cq));
        let sq = Sqe::create_io_sq(2, qid, entries, bus(sq_at(qid)), qid);
        assert_ok(&self.run(0, sq));
        self.pairs.push(Pair { qid, entries, tail: 0, head: 0, phase: true });
    }

    pub(crate) fn pair(&mut self, qid: u16) -> &mut Pair {
        self.pairs.iter_mut().find(|p| p.qid == qid).expect("such a queue pair")
    }

    pub(crate) fn step(&mut self) -> bool {
        self.ctl.step(self.now)
    }

    /// Writes an entry without ringing.
    pub(crate) fn submit(&mut self, qid: u16, sqe: &Sqe) {
        let pair = self.pair(qid);
        let at = sq_at(qid) + pair.tail as usize * 64;
        pair.tail = (pair.tail + 1) % pair.entries;
        self.region.write(at, sqe.as_bytes());
    }

    pub(crate) fn ring_tail(&mut self, qid: u16) {
        let tail = self.pair(qid).tail;
        self.regs.write32(sq_tail_doorbell(qid, self.dstrd), tail);
    }

    pub(crate) fn ring_head(&mut self, qid: u16) {
        let head = self.pair(qid).head;
        self.regs.write32(cq_head_doorbell(qid, self.dstrd), head);
    }

    /// Takes the next completion that is there, without stepping or ringing the head doorbell.
    pub(crate) fn peek(&mut self, qid: u16) -> Option<Cqe> {
        let pair = self.pairs.iter_mut().find(|p| p.qid == qid)?;
        let at = cq_at(qid) + pair.head as usize * 16;
        let last = self.region.load32(at + 12, Ordering::Acquire);
        if (last >> 16 & 1 == 1) != pair.phase {
            return None;
        }
        let dw = [0, 4, 8].map(|o| self.region.load32(at + o, Ordering::Relaxed));
        let cqe = Cqe::from_dwords([dw[0], dw[1], dw[2], last]);
        assert!(u32::from(cqe.sq_head.get()) < pair.entries, "head out of range: {cqe:?}");
        pair.head += 1;
        if pair.head == pair.entries {
            pair.head = 0;
            pair.phase = !pair.phase;
        }
        Some(cqe)
    }

    /// Takes the next completion that is there and rings the head doorbell.
    pub(crate) fn reap(&mut self, qid: u16) -> Option<Cqe> {
        let cqe = self.peek(qid)?;
        self.ring_head(qid);
        Some(cqe)
    }

    /// Steps until a completion comes, 100 times at most.
    pub(crate) fn wait(&mut self, qid: u16) -> Option<Cqe> {
        for _ in 0..100 {
            if let Some(cqe) = self.reap(qid) {
                return Some(cqe);
            }
            self.step();
        }
        None
    }

    /// Carries out one command.
    pub(crate) fn run(&mut self, qid: u16, sqe: Sqe) -> Cqe {
        self.submit(qid, &sqe);
        self.ring_tail(qid);
        let cqe = self.wait(qid).expect("a completion");
        assert_eq!((cqe.cid.get(), cqe.sq_id.get()), (sqe.cid(), qid));
        let tail = self.pair(qid).tail;
        assert_eq!(u32::from(cqe.sq_head.get()), tail, "head after the only command");
        cqe
    }

    /// Carries out one command that must fail.
    pub(crate) fn fails(&mut self, qid: u16, sqe: Sqe) -> StatusCode {
        let cqe = self.run(qid, sqe);
        assert!(!cqe.status().is_success(), "{sqe:?} succeeded");
        cqe.status().code()
    }

    pub(crate) fn ok(&mut self, qid: u16, sqe: Sqe) -> u32 {
        let cqe = self.run(qid, sqe);
        assert_ok(&cqe);
        cqe.result.get()
    }

    /// Reads a data area of `len` bytes into a vector.
    pub(crate) fn data(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.region.read(at, &mut bytes);
        bytes
    }

    /// Writes the block range from `at` of the data area, which must suit PRP1 and PRP2 or a list
    /// made at [`LISTS`].
    pub(crate) fn write_blocks(&mut self, lba: u64, blocks: u16, value: u8, flags: u32) -> Status {
        let bytes = usize::from(blocks) * 512;
        self.region.write(DATA, &vec![value; bytes]);
        let (prp1, prp2) = self.prps(DATA, bytes);
        let sqe = Sqe::write(9, 1, lba, blocks - 1, flags).with_prps(prp1, prp2);
        self.run(1, sqe).status()
    }

    /// First byte of each block of a range, which must be uniform.
    pub(crate) fn read_values(&mut self, lba: u64, blocks: u16) -> Vec<u8> {
        let bytes = usize::from(blocks) * 512;
        let at = DATA + (1 << 20);
        self.region.write(at, &vec![0xee; bytes]);
        let (prp1, prp2) = self.prps(at, bytes);
        self.ok(1, Sqe::read(9, 1, lba, blocks - 1, 0).with_prps(prp1, prp2));
        let data = self.data(at, bytes);
        data.chunks(512)
            .map(|block| {
                assert!(block.iter().all(|&b| b == block[0]), "a block is not uniform");
                block[0]
            })
            .collect()
    }

    /// Data pointer of a contiguous buffer; a list, if needed, is made at [`LISTS`].
    pub(crate) fn prps(&self, at: usize, len: usize) -> (u64, u64) {
        let first = 4096 - at % 4096;
        if len <= first {
            return (bus(at), 0);
        }
        let pages: Vec<u64> = (at + first..at + len).step_by(4096).map(bus).collect();
        if pages.len() == 1 {
            return (bus(at), pages[0]);
        }
        assert!(pages.len() <= 512);
        self.region.write(LISTS, pages.as_bytes());
        (bus(at), bus(LISTS))
    }
}

#[track_caller]
pub(crate) fn assert_ok(cqe: &Cqe) {
    assert!(cqe.status().is_success(), "{}", cqe.status());
}
