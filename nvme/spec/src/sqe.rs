//! The submission queue entry (§4.2; 2.0 §3.3.3.1), opcodes, and typed constructors of the
//! commands that the driver sends.

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::bits::codes;
use crate::{Cns, FeatureId, FeatureSelect, LogId, SQE_SIZE, SetFeatures};

codes! {
    /// Opcodes of the admin command set (§5, figure 139).
    pub enum AdminOpcode(u8) {
        /// Delete I/O Submission Queue (§5.6).
        DeleteIoSq = 0x00,
        /// Create I/O Submission Queue (§5.4).
        CreateIoSq = 0x01,
        /// Get Log Page (§5.14).
        GetLogPage = 0x02,
        /// Delete I/O Completion Queue (§5.5).
        DeleteIoCq = 0x04,
        /// Create I/O Completion Queue (§5.3).
        CreateIoCq = 0x05,
        /// Identify (§5.15).
        Identify = 0x06,
        /// Abort (§5.1).
        Abort = 0x08,
        /// Set Features (§5.21).
        SetFeatures = 0x09,
        /// Get Features (§5.13).
        GetFeatures = 0x0a,
        /// Asynchronous Event Request (§5.2).
        AsyncEventRequest = 0x0c,
        /// Namespace Management (§5.20).
        NamespaceManagement = 0x0d,
        /// Keep Alive (§5.18).
        KeepAlive = 0x18,
        /// Doorbell Buffer Config (§5.7).
        DoorbellBufferConfig = 0x7c,
        /// Format NVM (§5.23).
        FormatNvm = 0x80,
    }
}

codes! {
    /// Opcodes of the NVM command set (§6, figure 346; NVM §3.2).
    pub enum IoOpcode(u8) {
        /// Flush (§6.8).
        Flush = 0x00,
        /// Write (§6.15).
        Write = 0x01,
        /// Read (§6.9).
        Read = 0x02,
        /// Write Uncorrectable (§6.16).
        WriteUncorrectable = 0x04,
        /// Compare (§6.6).
        Compare = 0x05,
        /// Write Zeroes (§6.17).
        WriteZeroes = 0x08,
        /// Dataset Management (§6.7).
        DatasetManagement = 0x09,
    }
}

codes! {
    /// SES: what Format NVM does with the user data (§5.23, figure 330).
    pub enum SecureErase(u8) {
        /// No secure erase: the data may still be on the medium, but cannot be read.
        None = 0,
        /// User data erase: all of it is overwritten or erased.
        UserData = 1,
        /// Cryptographic erase: the key is thrown away.
        Crypto = 2,
    }
}

/// The namespace identifier that means all namespaces (§6.1).
pub const NSID_ALL: u32 = 0xffff_ffff;

/// Most ranges in one Dataset Management command (§6.7).
pub const MAX_DSM_RANGES: usize = 256;

/// A submission queue entry of 64 bytes.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Sqe {
    /// CDW0: opcode 7:0, FUSE 9:8, PSDT 15:14, CID 31:16.
    pub cdw0: U32,
    /// NSID.
    pub nsid: U32,
    /// CDW2, reserved for the commands used here.
    pub cdw2: U32,
    /// CDW3, reserved for the commands used here.
    pub cdw3: U32,
    /// MPTR, metadata pointer; 0 here.
    pub mptr: U64,
    /// PRP entry 1 of the data pointer.
    pub prp1: U64,
    /// PRP entry 2 of the data pointer, or the address of a PRP list.
    pub prp2: U64,
    /// Command dwords 10 to 15.
    pub cdw: [U32; 6],
}

const _: () = assert!(size_of::<Sqe>() == SQE_SIZE);
const _: () = assert!(offset_of!(Sqe, nsid) == 4);
const _: () = assert!(offset_of!(Sqe, mptr) == 16);
const _: () = assert!(offset_of!(Sqe, prp1) == 24);
const _: () = assert!(offset_of!(Sqe, prp2) == 32);
const _: () = assert!(offset_of!(Sqe, cdw) == 40);

/// CDW10 and CDW11 of a 64-bit starting LBA (NVM §3.2.4).
#[inline]
pub const fn cdw10_11_slba(slba: u64) -> (u32, u32) {
    (slba as u32, (slba >> 32) as u32)
}

/// Constructors. `cid` is the command identifier; bus addresses are what the device sees.
impl Sqe {
    /// FUA in CDW12 of Read, Write and Write Zeroes: forced unit access.
    pub const FUA: u32 = 1 << 30;
    /// DEAC in CDW12 of Write Zeroes: deallocate where that reads back as zero.
    pub const DEAC: u32 = 1 << 25;
    /// AD in CDW11 of Dataset Management: deallocate.
    pub const DSM_DEALLOCATE: u32 = 1 << 2;
    /// PC in CDW11 of Create I/O CQ and SQ: physically contiguous.
    pub const QUEUE_CONTIGUOUS: u32 = 1;
    /// IEN in CDW11 of Create I/O CQ: interrupts enabled.
    pub const CQ_INTERRUPTS: u32 = 1 << 1;

    /// An entry with opcode, command identifier and namespace, all else zero.
    #[inline]
    pub const fn new(opcode: u8, cid: u16, nsid: u32) -> Sqe {
        const Z: U32 = U32::ZERO;
        Sqe {
            cdw0: U32::new(opcode as u32 | (cid as u32) << 16),
            nsid: U32::new(nsid),
            cdw2: Z,
            cdw3: Z,
            mptr: U64::ZERO,
            prp1: U64::ZERO,
            prp2: U64::ZERO,
            cdw: [Z; 6],
        }
    }

    /// This entry with its data pointer set.
    #[inline]
    #[must_use]
    pub const fn with_prps(mut self, prp1: u64, prp2: u64) -> Sqe {
        self.prp1 = U64::new(prp1);
        self.prp2 = U64::new(prp2);
        self
    }

    /// This entry with command dword `10 + index` set, `index` 0 to 5.
    #[inline]
    #[must_use]
    pub const fn with_cdw(mut self, index: usize, value: u32) -> Sqe {
        self.cdw[index] = U32::new(value);
        self
    }

    const fn blocks(op: IoOpcode, cid: u16, nsid: u32, slba: u64, nlb0: u16, flags: u32) -> Sqe {
        let (lo, hi) = cdw10_11_slba(slba);
        Sqe::new(op.code(), cid, nsid)
            .with_cdw(0, lo)
            .with_cdw(1, hi)
            .with_cdw(2, nlb0 as u32 | flags)
    }

    /// Read of `nlb0 + 1` blocks from `slba` (§6.9). `flags`: 0 or [`Sqe::FUA`]. The data
    /// pointer is set with [`Sqe::with_prps`].
    #[inline]
    pub const fn read(cid: u16, nsid: u32, slba: u64, nlb0: u16, flags: u32) -> Sqe {
        Sqe::blocks(IoOpcode::Read, cid, nsid, slba, nlb0, flags)
    }

    /// Write of `nlb0 + 1` blocks at `slba` (§6.15). `flags`: 0 or [`Sqe::FUA`].
    #[inline]
    pub const fn write(cid: u16, nsid: u32, slba: u64, nlb0: u16, flags: u32) -> Sqe {
        Sqe::blocks(IoOpcode::Write, cid, nsid, slba, nlb0, flags)
    }

    /// Write Zeroes over `nlb0 + 1` blocks at `slba` (§6.17). `flags`: [`Sqe::FUA`],
    /// [`Sqe::DEAC`]. No data pointer.
    #[inline]
    pub const fn write_zeroes(cid: u16, nsid: u32, slba: u64, nlb0: u16, flags: u32) -> Sqe {
        Sqe::blocks(IoOpcode::WriteZeroes, cid, nsid, slba, nlb0, flags)
    }

    /// Flush of a namespace's volatile cache (§6.8).
    #[inline]
    pub const fn flush(cid: u16, nsid: u32) -> Sqe {
        Sqe::new(IoOpcode::Flush.code(), cid, nsid)
    }

    /// Dataset Management, deallocate, with `ranges0 + 1` ranges (§6.7) in the data buffer.
    #[inline]
    pub const fn deallocate(cid: u16, nsid: u32, ranges0: u8) -> Sqe {
        Sqe::new(IoOpcode::DatasetManagement.code(), cid, nsid)
            .with_cdw(0, ranges0 as u32)
            .with_cdw(1, Sqe::DSM_DEALLOCATE)
    }

    /// Identify (§5.15) into a 4096-byte buffer.
    pub const fn identify(cid: u16, cns: Cns, nsid: u32) -> Sqe {
        Sqe::new(AdminOpcode::Identify.code(), cid, nsid).with_cdw(0, cns.code() as u32)
    }

    /// Create I/O Completion Queue (§5.3), contiguous, of `entries` (2 to 65536) at `base`.
    /// `vector`: the interrupt vector, or `None` to have no interrupts.
    pub const fn create_io_cq(
        cid: u16,
        qid: u16,
        entries: u32,
        base: u64,
        vector: Option<u16>,
    ) -> Sqe {
        let cdw11 = match vector {
            Some(v) => (v as u32) << 16 | Sqe::CQ_INTERRUPTS | Sqe::QUEUE_CONTIGUOUS,
            None => Sqe::QUEUE_CONTIGUOUS,
        };
        Sqe::new(AdminOpcode::CreateIoCq.code(), cid, 0)
            .with_prps(base, 0)
            .with_cdw(0, qid as u32 | entries.wrapping_sub(1) << 16)
            .with_cdw(1, cdw11)
    }

    /// Create I/O Submission Queue (§5.4), contiguous, of `entries` (2 to 65536) at `base`,
    /// completing to `cqid`.
    pub const fn create_io_sq(cid: u16, qid: u16, entries: u32, base: u64, cqid: u16) -> Sqe {
        Sqe::new(AdminOpcode::CreateIoSq.code(), cid, 0)
            .with_prps(base, 0)
            .with_cdw(0, qid as u32 | entries.wrapping_sub(1) << 16)
            .with_cdw(1, (cqid as u32) << 16 | Sqe::QUEUE_CONTIGUOUS)
    }

    /// Delete I/O Submission Queue (§5.6).
    pub const fn delete_io_sq(cid: u16, qid: u16) -> Sqe {
        Sqe::new(AdminOpcode::DeleteIoSq.code(), cid, 0).with_cdw(0, qid as u32)
    }

    /// Delete I/O Completion Queue (§5.5).
    pub const fn delete_io_cq(cid: u16, qid: u16) -> Sqe {
        Sqe::new(AdminOpcode::DeleteIoCq.code(), cid, 0).with_cdw(0, qid as u32)
    }

    /// Abort command `victim` of submission queue `sqid` (§5.1).
    pub const fn abort(cid: u16, sqid: u16, victim: u16) -> Sqe {
        Sqe::new(AdminOpcode::Abort.code(), cid, 0).with_cdw(0, sqid as u32 | (victim as u32) << 16)
    }

    /// Asynchronous Event Request (§5.2).
    pub const fn async_event_request(cid: u16) -> Sqe {
        Sqe::new(AdminOpcode::AsyncEventRequest.code(), cid, 0)
    }

    /// Set Features (§5.21), not saved, of a feature without a data buffer.
    pub const fn set_features(cid: u16, feature: SetFeatures) -> Sqe {
        let (id, cdw11) = feature.encode();
        Sqe::new(AdminOpcode::SetFeatures.code(), cid, 0)
            .with_cdw(0, id.code() as u32)
            .with_cdw(1, cdw11)
    }

    /// Get Features (§5.13).
    pub const fn get_features(cid: u16, id: FeatureId, select: FeatureSelect) -> Sqe {
        Sqe::new(AdminOpcode::GetFeatures.code(), cid, 0)
            .with_cdw(0, id.code() as u32 | (select.code() as u32) << 8)
    }

    /// Get Log Page (§5.14) of `bytes` (a multiple of 4, at least 4) from byte `offset` of the
    /// page. `retain` keeps the asynchronous event that announced the page pending (RAE).
    pub const fn get_log_page(
        cid: u16,
        nsid: u32,
        page: LogId,
        offset: u64,
        bytes: u32,
        retain: bool,
    ) -> Sqe {
        let numd0 = (bytes / 4).wrapping_sub(1);
        Sqe::new(AdminOpcode::GetLogPage.code(), cid, nsid)
            .with_cdw(0, page.code() as u32 | (retain as u32) << 15 | numd0 << 16)
            .with_cdw(1, numd0 >> 16)
            .with_cdw(2, offset as u32)
            .with_cdw(3, (offset >> 32) as u32)
    }

    /// Format NVM (§5.23) to LBA format `lbaf` (0 to 15), without protection information and with
    /// metadata, if any, apart from the data.
    pub const fn format_nvm(cid: u16, nsid: u32, lbaf: u8, erase: SecureErase) -> Sqe {
        let cdw10 = (lbaf & 15) as u32 | (erase.code() as u32) << 9;
        Sqe::new(AdminOpcode::FormatNvm.code(), cid, nsid).with_cdw(0, cdw10)
    }

    /// Doorbell Buffer Config (§5.7): pages of shadow doorbells and of event indexes.
    pub const fn doorbell_buffer_config(cid: u16, shadow: u64, event_index: u64) -> Sqe {
        Sqe::new(AdminOpcode::DoorbellBufferConfig.code(), cid, 0).with_prps(shadow, event_index)
    }
}

/// Accessors, used by the side that takes commands.
impl Sqe {
    /// The opcode.
    #[inline]
    pub const fn opcode(&self) -> u8 {
        self.cdw0.get() as u8
    }

    /// FUSE, 0 for a command that is not fused.
    #[inline]
    pub const fn fuse(&self) -> u8 {
        (self.cdw0.get() >> 8) as u8 & 3
    }

    /// PSDT, 0 when the data pointer holds PRPs, else SGLs.
    #[inline]
    pub const fn psdt(&self) -> u8 {
        (self.cdw0.get() >> 14) as u8 & 3
    }

    /// The command identifier.
    #[inline]
    pub const fn cid(&self) -> u16 {
        (self.cdw0.get() >> 16) as u16
    }

    /// Replaces the command identifier.
    #[inline]
    pub const fn set_cid(&mut self, cid: u16) {
        self.cdw0 = U32::new((self.cdw0.get() & 0xffff) | (cid as u32) << 16);
    }

    /// Command dword `10 + index`, `index` 0 to 5.
    #[inline]
    pub const fn dword(&self, index: usize) -> u32 {
        self.cdw[index].get()
    }

    /// Starting LBA of Read, Write, Write Zeroes.
    #[inline]
    pub const fn slba(&self) -> u64 {
        self.dword(0) as u64 | (self.dword(1) as u64) << 32
    }

    /// Blocks of Read, Write, Write Zeroes, 1's based: 1 to 65536.
    #[inline]
    pub const fn block_count(&self) -> u32 {
        (self.dword(2) & 0xffff) + 1
    }

    /// Whether FUA is set (Read, Write, Write Zeroes).
    #[inline]
    pub const fn fua(&self) -> bool {
        self.dword(2) & Sqe::FUA != 0
    }

    /// Queue identifier in CDW10 (Create and Delete queue; Abort's SQID).
    pub const fn queue_id(&self) -> u16 {
        self.dword(0) as u16
    }

    /// Queue size in entries, 1's based (Create queue).
    pub const fn queue_entries(&self) -> u32 {
        (self.dword(0) >> 16) + 1
    }

    /// Bytes asked for by Get Log Page.
    pub const fn log_bytes(&self) -> u64 {
        let numd0 = (self.dword(0) >> 16) as u64 | (self.dword(1) as u64 & 0xffff) << 16;
        (numd0 + 1) * 4
    }

    /// Byte offset into the page asked for by Get Log Page.
    pub const fn log_offset(&self) -> u64 {
        self.dword(2) as u64 | (self.dword(3) as u64) << 32
    }
}

/// One range of Dataset Management (§6.7, figure 369).
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct DsmRange {
    /// Context attributes; 0 when only deallocating.
    pub attributes: U32,
    /// Length in logical blocks; not 0's based.
    pub blocks: U32,
    /// First LBA.
    pub slba: U64,
}

const _: () = assert!(size_of::<DsmRange>() == 16);
const _: () = assert!(offset_of!(DsmRange, blocks) == 4);
const _: () = assert!(offset_of!(DsmRange, slba) == 8);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::QueueCounts;

    #[test]
    fn a_write_as_bytes() {
        let sqe = Sqe::write(0x1234, 1, 0x1_0000_0007, 7, Sqe::FUA).with_prps(0x5000, 0x6000);
        let b = sqe.as_bytes();
        assert_eq!(b[0..8], [0x01, 0, 0x34, 0x12, 1, 0, 0, 0]);
        assert_eq!(b[24..32], [0, 0x50, 0, 0, 0, 0, 0, 0]);
        assert_eq!(b[32..40], [0, 0x60, 0, 0, 0, 0, 0, 0]);
        assert_eq!(b[40..52], [7, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0x40]);
        assert!(b[52..].iter().all(|&x| x == 0));
        assert_eq!((sqe.slba(), sqe.block_count(), sqe.fua()), (0x1_0000_0007, 8, true));
        assert_eq!((sqe.cid(), sqe.opcode(), sqe.psdt(), sqe.fuse()), (0x1234, 1, 0, 0));
    }

    #[test]
    fn admin_commands() {
        let cq = Sqe::create_io_cq(1, 3, 1024, 0xa000, None);
        assert_eq!((cq.dword(0), cq.dword(1)), (0x03ff_0003, 1));
        assert_eq!((cq.queue_id(), cq.queue_entries()), (3, 1024));
        let cq = Sqe::create_io_cq(1, 3, 65536, 0xa000, Some(5));
        assert_eq!((cq.dword(0), cq.dword(1)), (0xffff_0003, 0x0005_0003));
        let sq = Sqe::create_io_sq(1, 3, 2, 0xb000, 4);
        assert_eq!((sq.dword(0), sq.dword(1)), (0x0001_0003, 0x0004_0001));
        let n = SetFeatures::NumberOfQueues(QueueCounts { sq: 64, cq: 32 });
        let set = Sqe::set_features(1, n);
        assert_eq!((set.dword(0), set.dword(1)), (0x07, 0x001f_003f));
        let log = Sqe::get_log_page(1, NSID_ALL, LogId::Smart, 8, 512, true);
        assert_eq!(log.dword(0), 0x007f_8002);
        assert_eq!((log.log_bytes(), log.log_offset()), (512, 8));
        let log = Sqe::get_log_page(1, 0, LogId::Error, 0, 4 << 17, false);
        assert_eq!((log.dword(0), log.dword(1)), (0xffff_0001, 1));
        assert_eq!(log.log_bytes(), 4 << 17);
        assert_eq!(Sqe::abort(9, 2, 77).dword(0), 77 << 16 | 2);
        let mut a = Sqe::async_event_request(3);
        a.set_cid(0xffff);
        assert_eq!((a.cid(), a.opcode()), (0xffff, 0x0c));
        let d = Sqe::deallocate(1, 1, 255);
        assert_eq!((d.dword(0), d.dword(1)), (255, 4));
        let f = Sqe::format_nvm(1, 2, 3, SecureErase::Crypto);
        assert_eq!((f.opcode(), f.nsid.get(), f.dword(0)), (0x80, 2, 2 << 9 | 3));
    }

    #[test]
    fn codes_round_trip() {
        for code in 0..=255u8 {
            if let Some(op) = AdminOpcode::from_code(code) {
                assert_eq!(op.code(), code);
            }
            if let Some(op) = IoOpcode::from_code(code) {
                assert_eq!(op.code(), code);
            }
        }
        assert_eq!(IoOpcode::from_code(3), None);
    }
}
