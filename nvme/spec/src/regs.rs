//! Controller registers in BAR0 (§3.1; 2.0 §3.1.3) and the doorbells behind them.

use crate::bits::{bitfields, codes};

/// Byte offsets of the controller registers from the start of BAR0 (§3.1, figure 69).
pub mod offset {
    /// CAP, Controller Capabilities, 64 bit, read only (§3.1.1).
    pub const CAP: u64 = 0x00;
    /// VS, Version, 32 bit, read only (§3.1.2).
    pub const VS: u64 = 0x08;
    /// INTMS, Interrupt Mask Set, 32 bit, write 1 to set (§3.1.3).
    pub const INTMS: u64 = 0x0c;
    /// INTMC, Interrupt Mask Clear, 32 bit, write 1 to clear (§3.1.4).
    pub const INTMC: u64 = 0x10;
    /// CC, Controller Configuration, 32 bit (§3.1.5).
    pub const CC: u64 = 0x14;
    /// CSTS, Controller Status, 32 bit (§3.1.6).
    pub const CSTS: u64 = 0x1c;
    /// NSSR, NVM Subsystem Reset, 32 bit, optional (§3.1.7).
    pub const NSSR: u64 = 0x20;
    /// AQA, Admin Queue Attributes, 32 bit (§3.1.8).
    pub const AQA: u64 = 0x24;
    /// ASQ, Admin Submission Queue Base Address, 64 bit (§3.1.9).
    pub const ASQ: u64 = 0x28;
    /// ACQ, Admin Completion Queue Base Address, 64 bit (§3.1.10).
    pub const ACQ: u64 = 0x30;
    /// CMBLOC, Controller Memory Buffer Location, 32 bit, optional (§3.1.11).
    pub const CMBLOC: u64 = 0x38;
    /// CMBSZ, Controller Memory Buffer Size, 32 bit, optional (§3.1.12).
    pub const CMBSZ: u64 = 0x3c;
    /// BPINFO, Boot Partition Information, 32 bit, optional (§3.1.13).
    pub const BPINFO: u64 = 0x40;
    /// BPRSEL, Boot Partition Read Select, 32 bit, optional (§3.1.14).
    pub const BPRSEL: u64 = 0x44;
    /// BPMBL, Boot Partition Memory Buffer Location, 64 bit, optional (§3.1.15).
    pub const BPMBL: u64 = 0x48;
    /// CMBMSC, Controller Memory Buffer Memory Space Control, 64 bit, optional (§3.1.16).
    pub const CMBMSC: u64 = 0x50;
    /// CMBSTS, Controller Memory Buffer Status, 32 bit, optional (§3.1.17).
    pub const CMBSTS: u64 = 0x58;
    /// PMRCAP, Persistent Memory Region Capabilities, 32 bit, optional (§3.1.18).
    pub const PMRCAP: u64 = 0xe00;
    /// First doorbell: the tail of the admin submission queue (§3.1.24).
    pub const DOORBELLS: u64 = 0x1000;
}

/// Value of NSSR that resets the NVM subsystem, "NVMe" in ASCII (§3.1.7).
pub const NSSR_MAGIC: u32 = 0x4e56_4d65;

bitfields! {
    /// CAP, Controller Capabilities (§3.1.1; 2.0 §3.1.3.1).
    pub struct Cap(u64) {
        /// MQES: largest queue size, in entries, 0's based (a value of 1 means 2 entries).
        mqes / with_mqes: 0, 16;
        /// CQR: 1 if queues must be physically contiguous.
        cqr / with_cqr: 16, 1;
        /// AMS: arbitration mechanisms beyond round robin (bit 0 weighted, bit 1 vendor).
        ams / with_ams: 17, 2;
        /// TO: worst time until CSTS.RDY follows CC.EN, in units of 500 ms.
        to / with_to: 24, 8;
        /// DSTRD: doorbells are `4 << dstrd` bytes apart.
        dstrd / with_dstrd: 32, 4;
        /// NSSRS: 1 if the subsystem reset register works.
        nssrs / with_nssrs: 36, 1;
        /// CSS: command sets supported (bit 0 NVM, bit 6 as Identify says, bit 7 admin only).
        css / with_css: 37, 8;
        /// BPS: 1 if boot partitions are supported.
        bps / with_bps: 45, 1;
        /// MPSMIN: smallest memory page is `4096 << mpsmin` bytes.
        mpsmin / with_mpsmin: 48, 4;
        /// MPSMAX: largest memory page is `4096 << mpsmax` bytes.
        mpsmax / with_mpsmax: 52, 4;
        /// PMRS: 1 if there is a persistent memory region.
        pmrs / with_pmrs: 56, 1;
        /// CMBS: 1 if there is a controller memory buffer.
        cmbs / with_cmbs: 57, 1;
    }
}

impl Cap {
    /// Bit of [`Cap::css`] that says the NVM command set is there.
    pub const CSS_NVM: u64 = 1;
    /// Bit of [`Cap::css`] that says CC.CSS may be 110b (2.0 §3.1.3.1).
    pub const CSS_IO_SETS: u64 = 1 << 6;

    /// Largest queue in entries (1's based), 1 to 65536.
    #[inline]
    pub const fn max_queue_entries(self) -> u32 {
        self.mqes() as u32 + 1
    }

    /// Worst time in milliseconds until CSTS.RDY follows a change of CC.EN.
    #[inline]
    pub const fn timeout_ms(self) -> u32 {
        self.to() as u32 * 500
    }
}

bitfields! {
    /// CC, Controller Configuration (§3.1.5; 2.0 §3.1.3.5).
    pub struct Cc(u32) {
        /// EN: 1 enables the controller, a change to 0 resets it.
        en / with_en: 0, 1;
        /// CSS: command set selected; 0 is the NVM command set, 6 all supported ones.
        css / with_css: 4, 3;
        /// MPS: memory page is `4096 << mps` bytes.
        mps / with_mps: 7, 4;
        /// AMS: arbitration; 0 is round robin.
        ams / with_ams: 11, 3;
        /// SHN: shutdown notification, see [`ShutdownNotice`].
        shn / with_shn: 14, 2;
        /// IOSQES: log2 of the size of an I/O submission queue entry; 6 for the NVM command set.
        iosqes / with_iosqes: 16, 4;
        /// IOCQES: log2 of the size of an I/O completion queue entry; 4 for the NVM command set.
        iocqes / with_iocqes: 20, 4;
    }
}

bitfields! {
    /// CSTS, Controller Status (§3.1.6; 2.0 §3.1.3.6).
    pub struct Csts(u32) {
        /// RDY: the controller takes commands.
        rdy / with_rdy: 0, 1;
        /// CFS: fatal error; only a reset helps.
        cfs / with_cfs: 1, 1;
        /// SHST: progress of a shutdown, see [`ShutdownStatus`].
        shst / with_shst: 2, 2;
        /// NSSRO: a subsystem reset happened.
        nssro / with_nssro: 4, 1;
        /// PP: processing of commands is paused.
        pp / with_pp: 5, 1;
    }
}

impl Csts {
    /// What a register read gives when the device is no longer there (all bits one).
    pub const GONE: Csts = Csts(u32::MAX);
}

codes! {
    /// CC.SHN (§3.1.5).
    pub enum ShutdownNotice(u32) {
        /// No notification.
        None = 0,
        /// Normal shutdown: what is cached is written out first.
        Normal = 1,
        /// Abrupt shutdown: power goes away very soon.
        Abrupt = 2,
    }
}

codes! {
    /// CSTS.SHST (§3.1.6).
    pub enum ShutdownStatus(u32) {
        /// Normal operation, no shutdown was asked for.
        Normal = 0,
        /// Shutdown is under way.
        Occurring = 1,
        /// Shutdown is complete: power may go.
        Complete = 2,
    }
}

bitfields! {
    /// AQA, Admin Queue Attributes (§3.1.8).
    pub struct Aqa(u32) {
        /// ASQS: entries of the admin submission queue, 0's based, 1 to 4095.
        asqs / with_asqs: 0, 12;
        /// ACQS: entries of the admin completion queue, 0's based, 1 to 4095.
        acqs / with_acqs: 16, 12;
    }
}

bitfields! {
    /// VS, Version (§3.1.2), also the VER field of Identify Controller.
    pub struct Version(u32) {
        /// Tertiary version number.
        tertiary / with_tertiary: 0, 8;
        /// Minor version number.
        minor / with_minor: 8, 8;
        /// Major version number.
        major / with_major: 16, 16;
    }
}

impl Version {
    /// Revision 1.4.0.
    pub const V1_4: Version = Version(0x0001_0400);
    /// Revision 2.0.0.
    pub const V2_0: Version = Version(0x0002_0000);
}

/// Offset of the tail doorbell of submission queue `qid` for a stride CAP.DSTRD (§3.1.24).
#[inline]
pub const fn sq_tail_doorbell(qid: u16, dstrd: u8) -> u64 {
    offset::DOORBELLS + (2 * qid as u64) * (4 << (dstrd & 15))
}

/// Offset of the head doorbell of completion queue `qid` for a stride CAP.DSTRD (§3.1.25).
#[inline]
pub const fn cq_head_doorbell(qid: u16, dstrd: u8) -> u64 {
    offset::DOORBELLS + (2 * qid as u64 + 1) * (4 << (dstrd & 15))
}

/// The doorbell that a BAR0 offset names: queue identifier, and whether it is the completion
/// queue's head. `None` if the offset lies below the doorbells, between two of them, or beyond
/// the last queue identifier.
#[inline]
pub const fn doorbell_of(register: u64, dstrd: u8) -> Option<(u16, bool)> {
    if register < offset::DOORBELLS {
        return None;
    }
    let stride = 4u64 << (dstrd & 15);
    let from_first = register - offset::DOORBELLS;
    let index = from_first / stride;
    if !from_first.is_multiple_of(stride) || index > 2 * u16::MAX as u64 + 1 {
        return None;
    }
    Some(((index / 2) as u16, index % 2 == 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_sit_where_the_figures_say() {
        let cap = Cap(0)
            .with_mqes(0x3ff)
            .with_cqr(1)
            .with_to(15)
            .with_dstrd(2)
            .with_css(Cap::CSS_NVM)
            .with_mpsmax(4);
        assert_eq!(cap.0, 0x0040_0022_0f01_03ff);
        assert_eq!(cap.max_queue_entries(), 1024);
        assert_eq!(cap.timeout_ms(), 7500);
        // The value that a Linux host leaves in CC on a drive with 4 KiB pages.
        let cc = Cc(0).with_en(1).with_iosqes(6).with_iocqes(4);
        assert_eq!(cc.0, 0x0046_0001);
        assert_eq!(Cc(0).with_shn(ShutdownNotice::Normal.code()).0, 0x4000);
        assert_eq!(Csts(0x8).shst(), ShutdownStatus::Complete.code());
        assert_eq!(Aqa(0).with_asqs(31).with_acqs(63).0, 0x003f_001f);
        // A setter cannot spill into the neighbour.
        assert_eq!(Aqa(0).with_asqs(0xffff).0, 0x0fff);
        assert_eq!((Version::V1_4.major(), Version::V1_4.minor()), (1, 4));
    }

    #[test]
    fn doorbells_with_stride() {
        assert_eq!(sq_tail_doorbell(0, 0), 0x1000);
        assert_eq!(cq_head_doorbell(0, 0), 0x1004);
        assert_eq!(sq_tail_doorbell(3, 0), 0x1018);
        assert_eq!(cq_head_doorbell(1, 4), 0x1000 + 3 * 64);
        for dstrd in 0..=15 {
            for qid in [0, 1, 7, 255, 65535] {
                assert_eq!(doorbell_of(sq_tail_doorbell(qid, dstrd), dstrd), Some((qid, false)));
                assert_eq!(doorbell_of(cq_head_doorbell(qid, dstrd), dstrd), Some((qid, true)));
            }
        }
        assert_eq!(doorbell_of(0xffc, 0), None);
        assert_eq!(doorbell_of(0x1002, 0), None);
        assert_eq!(doorbell_of(0x1004, 1), None);
        assert_eq!(doorbell_of(sq_tail_doorbell(65535, 0) + 8, 0), None);
    }
}
