//! [`Registers`]: BAR0 as the host sees it, made of atomics.
//!
//! Shared by the host (any number of threads, usually one reactor per doorbell pair) and the
//! [`Controller`](crate::Controller), which looks at it once a step. A doorbell write is one load
//! and one release store on a cache line of that queue alone; there is no lock and no system call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use dma::Region;
use nvme_spec::{Cap, Cc, Csts, Version, offset};

/// Bit of the CC cell that says that EN went from 1 to 0 since the controller last looked, so that
/// a quick 1-0-1 is not missed.
const EN_CLEARED: u64 = 1 << 32;
/// Unit of the write count in the CC cell: a write of the same value is noticed too.
const CC_WRITE: u64 = 1 << 33;

/// The two doorbells of a queue identifier, alone on their cache lines: the tail of the
/// submission queue (index 0) and the head of the completion queue (index 1).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct DoorbellPair {
    cells: [AtomicU32; 2],
    /// Bit 0: the submission queue exists; bit 1: the completion queue exists.
    live: AtomicU32,
}

/// The registers of one controller.
#[derive(Debug)]
pub struct Registers {
    cap: Cap,
    version: Version,
    /// log2 of the distance between doorbells in bytes.
    stride_log2: u32,
    gone: AtomicBool,
    cc: AtomicU64,
    csts: AtomicU32,
    interrupt_mask: AtomicU32,
    aqa: AtomicU32,
    asq: [AtomicU32; 2],
    acq: [AtomicU32; 2],
    /// Writes to doorbells of queues that do not exist.
    stray_doorbells: AtomicU32,
    doorbells: Box<[DoorbellPair]>,
    /// Where the values are that were written to doorbells, if not in `doorbells`: memory laid out as
    /// BAR0, which the host may write by itself.
    shared: Option<Arc<Region>>,
}

/// Writes one doorbell; see [`Registers::doorbell_handle`].
#[derive(Clone, Debug)]
pub struct DoorbellHandle {
    registers: Arc<Registers>,
    pair: usize,
    which: usize,
}

impl DoorbellHandle {
    /// Writes the doorbell, as [`Registers::write32`] does. What this thread wrote before is seen
    /// by the controller when it sees the value.
    #[inline]
    pub fn ring(&self, value: u32) {
        self.registers.ring(Some((self.pair, self.which)), value);
    }
}

/// Which doorbell of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Doorbell {
    SqTail = 0,
    CqHead = 1,
}

/// What the controller finds in CC.
pub(crate) struct CcLook {
    pub(crate) cc: Cc,
    pub(crate) en_cleared: bool,
}

impl Registers {
    /// `shared` is long enough for all doorbells.
    pub(crate) fn new(
        cap: Cap,
        version: Version,
        io_queues: u16,
        shared: Option<Arc<Region>>,
    ) -> Registers {
        Registers {
            shared,
            cap,
            version,
            stride_log2: 2 + cap.dstrd() as u32,
            gone: AtomicBool::new(false),
            cc: AtomicU64::new(0),
            csts: AtomicU32::new(0),
            interrupt_mask: AtomicU32::new(0),
            aqa: AtomicU32::new(0),
            asq: Default::default(),
            acq: Default::default(),
            stray_doorbells: AtomicU32::new(0),
            doorbells: (0..=io_queues).map(|_| DoorbellPair::default()).collect(),
        }
    }

    /// Bytes of BAR0 that hold registers and doorbells, rounded up to a page.
    pub fn len(&self) -> u64 {
        let doorbells = (self.doorbells.len() as u64 * 2) << self.stride_log2;
        (offset::DOORBELLS + doorbells).next_multiple_of(4096)
    }

    /// Never: there are always registers.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Reads a 32-bit register (or half of a 64-bit one). Reserved, write-only and misaligned
    /// offsets read as 0, everything as all ones once the device is gone.
    pub fn read32(&self, register: u64) -> u32 {
        if self.gone.load(Ordering::Acquire) {
            return u32::MAX;
        }
        match register {
            offset::CAP => self.cap.0 as u32,
            0x04 => (self.cap.0 >> 32) as u32,
            offset::VS => self.version.0,
            offset::INTMS | offset::INTMC => self.interrupt_mask.load(Ordering::Acquire),
            offset::CC => self.cc.load(Ordering::Acquire) as u32,
            offset::CSTS => self.csts.load(Ordering::Acquire),
            offset::AQA => self.aqa.load(Ordering::Acquire),
            offset::ASQ => self.asq[0].load(Ordering::Acquire),
            0x2c => self.asq[1].load(Ordering::Acquire),
            offset::ACQ => self.acq[0].load(Ordering::Acquire),
            0x34 => self.acq[1].load(Ordering::Acquire),
            _ => 0,
        }
    }

    /// Reads a 64-bit register, as two reads of 32 bits, low half first.
    pub fn read64(&self, register: u64) -> u64 {
        let low = self.read32(register);
        let high = self.read32(register.wrapping_add(4));
        u64::from(low) | u64::from(high) << 32
    }

    /// Writes a 32-bit register (or half of a 64-bit one). Writes to read-only, reserved and
    /// misaligned offsets do nothing; to the doorbell of a queue that does not exist they raise
    /// an asynchronous error event.
    #[inline]
    pub fn write32(&self, register: u64, value: u32) {
        if register >= offset::DOORBELLS {
            self.ring(self.find(register - offset::DOORBELLS), value);
        } else {
            self.write_control(register, value);
        }
    }

    /// Writes a 64-bit register, as two writes of 32 bits, low half first.
    pub fn write64(&self, register: u64, value: u64) {
        self.write32(register, value as u32);
        self.write32(register.wrapping_add(4), (value >> 32) as u32);
    }

    /// A handle that writes one doorbell without looking it up again. `None` if `register` is not
    /// the offset of a doorbell of a queue that could exist.
    pub fn doorbell_handle(self: &Arc<Self>, register: u64) -> Option<DoorbellHandle> {
        let (pair, which) = self.find(register.checked_sub(offset::DOORBELLS)?)?;
        Some(DoorbellHandle { registers: Arc::clone(self), pair, which })
    }

    /// The doorbell at a distance from the first: its pair, and which of the two.
    #[inline]
    fn find(&self, from_first: u64) -> Option<(usize, usize)> {
        let index = from_first >> self.stride_log2;
        let aligned = index << self.stride_log2 == from_first;
        let pair = usize::try_from(index >> 1).ok()?;
        (aligned && pair < self.doorbells.len()).then_some((pair, (index & 1) as usize))
    }

    /// Offset of a doorbell in BAR0.
    fn at(&self, pair: usize, which: usize) -> usize {
        offset::DOORBELLS as usize + ((pair * 2 + which) << self.stride_log2)
    }

    #[inline]
    fn ring(&self, found: Option<(usize, usize)>, value: u32) {
        if let Some((index, which)) = found {
            let pair = &self.doorbells[index];
            if pair.live.load(Ordering::Relaxed) & (1 << which) != 0 {
                // Pairs with the acquire in `doorbell`: the entries written before are seen.
                match &self.shared {
                    None => pair.cells[which].store(value, Ordering::Release),
                    Some(bar) => bar.store32(self.at(index, which), value, Ordering::Release),
                }
                return;
            }
        }
        self.stray_doorbells.fetch_add(1, Ordering::Release);
    }

    #[cold]
    fn write_control(&self, register: u64, value: u32) {
        if self.gone.load(Ordering::Acquire) {
            return;
        }
        match register {
            offset::INTMS => {
                self.interrupt_mask.fetch_or(value, Ordering::AcqRel);
            }
            offset::INTMC => {
                self.interrupt_mask.fetch_and(!value, Ordering::AcqRel);
            }
            offset::CC => self.write_cc(value),
            offset::AQA => self.aqa.store(value, Ordering::Release),
            offset::ASQ => self.asq[0].store(value, Ordering::Release),
            0x2c => self.asq[1].store(value, Ordering::Release),
            offset::ACQ => self.acq[0].store(value, Ordering::Release),
            0x34 => self.acq[1].store(value, Ordering::Release),
            _ => {}
        }
    }

    fn write_cc(&self, value: u32) {
        let mut old = self.cc.load(Ordering::Relaxed);
        loop {
            let cleared = Cc(old as u32).en() == 1 && Cc(value).en() == 0;
            let flags = (old & !u64::from(u32::MAX)).wrapping_add(CC_WRITE);
            let new = flags | u64::from(value) | if cleared { EN_CLEARED } else { 0 };
            match self.cc.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(seen) => old = seen,
            }
        }
    }

    // What follows is the controller's side.

    /// Puts what stands in the doorbell's shadow in place of the value that was `rung`, unless a
    /// newer one was rung meanwhile.
    pub(crate) fn take_doorbell(&self, qid: u16, which: Doorbell, rung: u32, value: u32) {
        if let Some(bar) = &self.shared {
            bar.replace32(self.at(usize::from(qid), which as usize), rung, value);
            return;
        }
        let cell = &self.doorbells[usize::from(qid)].cells[which as usize];
        let _ = cell.compare_exchange(rung, value, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// The CC cell, to be compared with the one of the last look.
    #[inline]
    pub(crate) fn cc_cell(&self) -> u64 {
        self.cc.load(Ordering::Acquire)
    }

    /// Takes note of CC: the value, whether EN was cleared in between, and the cell to compare
    /// with from now on.
    pub(crate) fn take_cc(&self) -> (CcLook, u64) {
        let cell = self.cc.fetch_and(!EN_CLEARED, Ordering::AcqRel);
        (CcLook { cc: Cc(cell as u32), en_cleared: cell & EN_CLEARED != 0 }, cell & !EN_CLEARED)
    }

    /// Puts CC back to its value after power-on.
    pub(crate) fn clear_control(&self) {
        self.cc.store(0, Ordering::Release);
        self.csts.store(0, Ordering::Release);
        self.interrupt_mask.store(0, Ordering::Release);
        self.aqa.store(0, Ordering::Release);
        for half in self.asq.iter().chain(&self.acq) {
            half.store(0, Ordering::Release);
        }
    }

    pub(crate) fn csts(&self) -> Csts {
        Csts(self.csts.load(Ordering::Relaxed))
    }

    pub(crate) fn set_csts(&self, csts: Csts) {
        self.csts.store(csts.0, Ordering::Release);
    }

    pub(crate) fn aqa(&self) -> nvme_spec::Aqa {
        nvme_spec::Aqa(self.aqa.load(Ordering::Acquire))
    }

    pub(crate) fn asq(&self) -> u64 {
        base_address(&self.asq)
    }

    pub(crate) fn acq(&self) -> u64 {
        base_address(&self.acq)
    }

    #[inline]
    pub(crate) fn stray_doorbells(&self) -> u32 {
        self.stray_doorbells.load(Ordering::Relaxed)
    }

    /// The value last written to a doorbell. Acquire: what the host wrote before is seen.
    #[inline]
    pub(crate) fn doorbell(&self, qid: u16, which: Doorbell) -> u32 {
        match &self.shared {
            None => self.doorbells[usize::from(qid)].cells[which as usize].load(Ordering::Acquire),
            Some(bar) => bar.load32(self.at(usize::from(qid), which as usize), Ordering::Acquire),
        }
    }

    /// A queue comes to life: its doorbell starts at 0 and takes writes.
    pub(crate) fn open_doorbell(&self, qid: u16, which: Doorbell) {
        let pair = &self.doorbells[usize::from(qid)];
        match &self.shared {
            None => pair.cells[which as usize].store(0, Ordering::Relaxed),
            // Whatever the host wrote while there was no queue.
            Some(bar) => {
                bar.store32(self.at(usize::from(qid), which as usize), 0, Ordering::Relaxed);
            }
        }
        pair.live.fetch_or(1 << which as u32, Ordering::Release);
    }

    /// A queue is gone: writes to its doorbell are stray from now on.
    pub(crate) fn close_doorbell(&self, qid: u16, which: Doorbell) {
        self.doorbells[usize::from(qid)].live.fetch_and(!(1 << which as u32), Ordering::Release);
    }

    pub(crate) fn close_all_doorbells(&self) {
        for pair in &self.doorbells {
            pair.live.store(0, Ordering::Release);
        }
    }

    /// Surprise removal: all reads give ones from now on, all writes are dropped.
    pub(crate) fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
        self.close_all_doorbells();
    }
}

/// A queue base address; bits 11:0 are reserved (§3.1.9).
fn base_address(halves: &[AtomicU32; 2]) -> u64 {
    let low = u64::from(halves[0].load(Ordering::Acquire));
    let high = u64::from(halves[1].load(Ordering::Acquire));
    (low | high << 32) & !0xfff
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(dstrd: u64) -> Registers {
        Registers::new(Cap(0).with_mqes(63).with_dstrd(dstrd), Version::V1_4, 2, None)
    }

    #[test]
    fn shared_doorbells_are_where_bar0_has_them() {
        for dstrd in [0u8, 5] {
            let bar = Region::new(8192, dma::PageSize::Small).unwrap();
            let cap = Cap(0).with_mqes(63).with_dstrd(u64::from(dstrd));
            let r = Registers::new(cap, Version::V1_4, 2, Some(bar.clone()));
            let (tail, head) =
                (nvme_spec::sq_tail_doorbell(2, dstrd), nvme_spec::cq_head_doorbell(2, dstrd));
            bar.store32(tail as usize, 9, Ordering::Release);
            r.open_doorbell(2, Doorbell::SqTail);
            r.open_doorbell(2, Doorbell::CqHead);
            assert_eq!(r.doorbell(2, Doorbell::SqTail), 0, "begins at 0");
            bar.store32(tail as usize, 3, Ordering::Release);
            r.write32(head, 4);
            assert_eq!(r.doorbell(2, Doorbell::SqTail), 3);
            assert_eq!(r.doorbell(2, Doorbell::CqHead), 4);
            assert_eq!(bar.load32(head as usize, Ordering::Relaxed), 4);
            r.close_doorbell(2, Doorbell::SqTail);
            r.write32(tail, 5);
            assert_eq!((bar.load32(tail as usize, Ordering::Relaxed), r.stray_doorbells()), (3, 1));
        }
    }

    #[test]
    fn halves_and_read_only() {
        let r = registers(0);
        r.write64(offset::ASQ, 0x1_2345_6fff);
        assert_eq!(r.read64(offset::ASQ), 0x1_2345_6fff);
        assert_eq!(r.asq(), 0x1_2345_6000);
        r.write64(offset::CAP, u64::MAX);
        assert_eq!(r.read64(offset::CAP), 63);
        r.write32(offset::CSTS, 0xff);
        assert_eq!(r.read32(offset::CSTS), 0);
        r.write32(offset::INTMS, 5);
        r.write32(offset::INTMC, 1);
        assert_eq!(r.read32(offset::INTMS), 4);
        r.write32(3, 1);
        assert_eq!(r.read32(3), 0);
        assert_eq!(r.len(), 0x2000);
    }

    #[test]
    fn a_quick_disable_is_not_missed() {
        let r = registers(0);
        r.write32(offset::CC, 1);
        let (_, cell) = r.take_cc();
        r.write32(offset::CC, 0);
        r.write32(offset::CC, 1);
        assert_ne!(r.cc_cell(), cell);
        let (look, cell) = r.take_cc();
        assert!(look.en_cleared && look.cc.en() == 1);
        assert_eq!(r.cc_cell(), cell);
        assert_eq!(r.read32(offset::CC), 1);
    }

    #[test]
    fn doorbells_of_living_queues_only() {
        for dstrd in [0, 4] {
            let r = registers(dstrd);
            r.write32(nvme_spec::sq_tail_doorbell(1, dstrd as u8), 7);
            assert_eq!(r.stray_doorbells(), 1);
            r.open_doorbell(1, Doorbell::SqTail);
            r.write32(nvme_spec::sq_tail_doorbell(1, dstrd as u8), 7);
            r.write32(nvme_spec::cq_head_doorbell(1, dstrd as u8), 9);
            assert_eq!(r.doorbell(1, Doorbell::SqTail), 7);
            assert_eq!(r.doorbell(1, Doorbell::CqHead), 0);
            assert_eq!(r.stray_doorbells(), 2);
            r.write32(nvme_spec::sq_tail_doorbell(1, dstrd as u8) + 2, 8);
            r.write32(nvme_spec::sq_tail_doorbell(3, dstrd as u8), 8);
            r.write32(u64::MAX, 8);
            assert_eq!(r.stray_doorbells(), 5);
            r.close_doorbell(1, Doorbell::SqTail);
            r.write32(nvme_spec::sq_tail_doorbell(1, dstrd as u8), 8);
            assert_eq!(r.doorbell(1, Doorbell::SqTail), 7);
        }
    }

    #[test]
    fn handles_write_their_doorbell() {
        let r = Arc::new(registers(2));
        r.open_doorbell(2, Doorbell::CqHead);
        let handle = r.doorbell_handle(nvme_spec::cq_head_doorbell(2, 2)).unwrap();
        handle.ring(5);
        assert_eq!(r.doorbell(2, Doorbell::CqHead), 5);
        r.close_doorbell(2, Doorbell::CqHead);
        handle.ring(6);
        assert_eq!((r.doorbell(2, Doorbell::CqHead), r.stray_doorbells()), (5, 1));
        assert!(r.doorbell_handle(nvme_spec::sq_tail_doorbell(3, 2)).is_none());
        assert!(r.doorbell_handle(offset::DOORBELLS + 4).is_none());
        assert!(r.doorbell_handle(offset::CC).is_none());
    }

    #[test]
    fn gone_reads_ones() {
        let r = registers(0);
        r.open_doorbell(0, Doorbell::SqTail);
        r.set_gone();
        r.write32(offset::CC, 1);
        r.write32(offset::DOORBELLS, 1);
        assert_eq!(r.read32(offset::CSTS), u32::MAX);
        assert_eq!(r.read64(offset::CAP), u64::MAX);
    }
}
