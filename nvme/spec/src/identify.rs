//! Identify (§5.15; 2.0 §5.17): the data structures and what selects them.

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::IDENTIFY_SIZE;
use crate::bits::{bitfields, codes};

codes! {
    /// CNS: what Identify returns (§5.15.1, figure 244).
    pub enum Cns(u8) {
        /// Identify Namespace of the NSID given.
        Namespace = 0x00,
        /// Identify Controller.
        Controller = 0x01,
        /// Active namespaces above the NSID given.
        ActiveNamespaces = 0x02,
        /// Namespace Identification Descriptors of the NSID given.
        NamespaceIds = 0x03,
    }
}

bitfields! {
    /// OACS: optional admin commands (§5.15.2.2, bytes 257:256 of Identify Controller).
    pub struct Oacs(u16) {
        /// Security Send and Receive.
        security / with_security: 0, 1;
        /// Format NVM.
        format / with_format: 1, 1;
        /// Firmware Commit and Download.
        firmware / with_firmware: 2, 1;
        /// Namespace Management and Attachment.
        namespaces / with_namespaces: 3, 1;
        /// Doorbell Buffer Config.
        doorbell_buffer / with_doorbell_buffer: 8, 1;
    }
}

bitfields! {
    /// ONCS: optional I/O commands (§5.15.2.2, bytes 521:520 of Identify Controller).
    pub struct Oncs(u16) {
        /// Compare.
        compare / with_compare: 0, 1;
        /// Write Uncorrectable.
        write_uncorrectable / with_write_uncorrectable: 1, 1;
        /// Dataset Management.
        dsm / with_dsm: 2, 1;
        /// Write Zeroes.
        write_zeroes / with_write_zeroes: 3, 1;
        /// Save and Select fields of Set and Get Features.
        save_select / with_save_select: 4, 1;
        /// Reservations.
        reservations / with_reservations: 5, 1;
        /// Timestamp feature.
        timestamp / with_timestamp: 6, 1;
    }
}

bitfields! {
    /// FNA: Format NVM attributes (§5.15.2.2, byte 524 of Identify Controller).
    pub struct Fna(u8) {
        /// A format of one namespace formats all of the subsystem.
        format_all / with_format_all: 0, 1;
        /// A secure erase of one namespace erases all of the subsystem.
        erase_all / with_erase_all: 1, 1;
        /// Cryptographic erase is supported.
        crypto / with_crypto: 2, 1;
    }
}

/// Identify Controller, 4096 bytes (§5.15.2.2, figure 247; 2.0 §5.17.2.1). Fields that are not
/// used here are inside the `reserved` arrays, named by their byte offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IdentifyController {
    /// VID: PCI vendor.
    pub vid: U16,
    /// SSVID: PCI subsystem vendor.
    pub ssvid: U16,
    /// SN: serial number, ASCII padded with spaces.
    pub serial: [u8; 20],
    /// MN: model number, ASCII padded with spaces.
    pub model: [u8; 40],
    /// FR: firmware revision, ASCII padded with spaces.
    pub firmware: [u8; 8],
    /// RAB: recommended arbitration burst, log2.
    pub rab: u8,
    /// IEEE OUI.
    pub ieee: [u8; 3],
    /// CMIC: multi-path and sharing capabilities.
    pub cmic: u8,
    /// MDTS: largest data transfer is `2^mdts` pages of CAP.MPSMIN; 0 means no limit.
    pub mdts: u8,
    /// CNTLID: controller identifier.
    pub cntlid: U16,
    /// VER, as register VS.
    pub ver: U32,
    /// RTD3R: resume latency in microseconds.
    pub rtd3r: U32,
    /// RTD3E: entry latency in microseconds: how long a normal shutdown may take.
    pub rtd3e: U32,
    /// OAES: optional asynchronous events; bit 8 namespace attributes, bit 9 firmware.
    pub oaes: U32,
    /// CTRATT: controller attributes.
    pub ctratt: U32,
    /// RRLS and reserved bytes.
    pub reserved100: [u8; 11],
    /// CNTRLTYPE: 1 is an I/O controller, 0 not reported.
    pub cntrltype: u8,
    /// FGUID.
    pub fguid: [u8; 16],
    /// CRDT1 to CRDT3: command retry delays in units of 100 ms.
    pub crdt: [U16; 3],
    /// Reserved and management interface bytes.
    pub reserved134: [u8; 122],
    /// OACS, see [`Oacs`].
    pub oacs: U16,
    /// ACL: concurrent Abort commands, 0's based.
    pub acl: u8,
    /// AERL: concurrent Asynchronous Event Requests, 0's based.
    pub aerl: u8,
    /// FRMW: firmware slots and update behaviour.
    pub frmw: u8,
    /// LPA: log page attributes; bit 0 SMART per namespace, bit 2 extended Get Log Page.
    pub lpa: u8,
    /// ELPE: entries of the error log, 0's based.
    pub elpe: u8,
    /// NPSS: power states, 0's based.
    pub npss: u8,
    /// AVSCC.
    pub avscc: u8,
    /// APSTA.
    pub apsta: u8,
    /// WCTEMP: warning temperature in kelvin.
    pub wctemp: U16,
    /// CCTEMP: critical temperature in kelvin.
    pub cctemp: U16,
    /// MTFA, HMPRE, HMMIN.
    pub reserved270: [u8; 10],
    /// TNVMCAP: total capacity in bytes.
    pub tnvmcap: U128,
    /// UNVMCAP: unallocated capacity in bytes.
    pub unvmcap: U128,
    /// RPMBS up to reserved bytes.
    pub reserved312: [u8; 200],
    /// SQES: size of a submission entry; required in bits 3:0, largest in 7:4, log2.
    pub sqes: u8,
    /// CQES: size of a completion entry; required in bits 3:0, largest in 7:4, log2.
    pub cqes: u8,
    /// MAXCMD: outstanding commands per queue, 0 for not reported.
    pub maxcmd: U16,
    /// NN: largest namespace identifier in use.
    pub nn: U32,
    /// ONCS, see [`Oncs`].
    pub oncs: U16,
    /// FUSES: fused operations.
    pub fuses: U16,
    /// FNA: Format NVM attributes, see [`Fna`].
    pub fna: u8,
    /// VWC: bit 0 a volatile write cache is there; bits 2:1 Flush with NSID FFFFFFFFh (10b not
    /// supported, 11b supported).
    pub vwc: u8,
    /// AWUN: atomic write unit, blocks, 0's based.
    pub awun: U16,
    /// AWUPF: atomic write unit at power fail, blocks, 0's based.
    pub awupf: U16,
    /// NVSCC.
    pub nvscc: u8,
    /// NWPC: namespace write protection.
    pub nwpc: u8,
    /// ACWU.
    pub acwu: U16,
    /// Reserved.
    pub reserved534: U16,
    /// SGLS: SGL support, 0 for none.
    pub sgls: U32,
    /// MNAN: most namespaces that may exist.
    pub mnan: U32,
    /// Reserved.
    pub reserved544: [u8; 224],
    /// SUBNQN: NVM subsystem qualified name, UTF-8, null terminated.
    pub subnqn: [u8; 256],
    /// Fabrics and reserved bytes.
    pub reserved1024: [u8; 1024],
    /// PSD0: the first power state descriptor.
    pub psd0: [u8; 32],
    /// Further power states and vendor bytes.
    pub reserved2080: [u8; 2016],
}

const _: () = assert!(size_of::<IdentifyController>() == IDENTIFY_SIZE);
const _: () = assert!(offset_of!(IdentifyController, serial) == 4);
const _: () = assert!(offset_of!(IdentifyController, model) == 24);
const _: () = assert!(offset_of!(IdentifyController, firmware) == 64);
const _: () = assert!(offset_of!(IdentifyController, mdts) == 77);
const _: () = assert!(offset_of!(IdentifyController, cntlid) == 78);
const _: () = assert!(offset_of!(IdentifyController, ver) == 80);
const _: () = assert!(offset_of!(IdentifyController, rtd3e) == 88);
const _: () = assert!(offset_of!(IdentifyController, oaes) == 92);
const _: () = assert!(offset_of!(IdentifyController, cntrltype) == 111);
const _: () = assert!(offset_of!(IdentifyController, crdt) == 128);
const _: () = assert!(offset_of!(IdentifyController, oacs) == 256);
const _: () = assert!(offset_of!(IdentifyController, acl) == 258);
const _: () = assert!(offset_of!(IdentifyController, aerl) == 259);
const _: () = assert!(offset_of!(IdentifyController, elpe) == 262);
const _: () = assert!(offset_of!(IdentifyController, wctemp) == 266);
const _: () = assert!(offset_of!(IdentifyController, tnvmcap) == 280);
const _: () = assert!(offset_of!(IdentifyController, sqes) == 512);
const _: () = assert!(offset_of!(IdentifyController, nn) == 516);
const _: () = assert!(offset_of!(IdentifyController, oncs) == 520);
const _: () = assert!(offset_of!(IdentifyController, fna) == 524);
const _: () = assert!(offset_of!(IdentifyController, vwc) == 525);
const _: () = assert!(offset_of!(IdentifyController, awun) == 526);
const _: () = assert!(offset_of!(IdentifyController, nwpc) == 531);
const _: () = assert!(offset_of!(IdentifyController, sgls) == 536);
const _: () = assert!(offset_of!(IdentifyController, subnqn) == 768);
const _: () = assert!(offset_of!(IdentifyController, psd0) == 2048);

impl IdentifyController {
    /// Bit of `vwc` that says a volatile write cache is there.
    pub const VWC_PRESENT: u8 = 1;
    /// Bits of `vwc` that say Flush takes NSID FFFFFFFFh.
    pub const VWC_FLUSH_ALL: u8 = 3 << 1;
    /// Bit of `oaes` for namespace attribute notices.
    pub const OAES_NAMESPACE: u32 = 1 << 8;
    /// Bit of `lpa` for the extended fields (length and offset) of Get Log Page.
    pub const LPA_EXTENDED: u8 = 1 << 2;

    /// Largest data transfer in bytes for a smallest page of `4096 << mpsmin` bytes; `None` for
    /// no limit, also where the limit does not fit 64 bits.
    pub const fn max_transfer(&self, mpsmin: u8) -> Option<u64> {
        let shift = 12 + mpsmin as u32 + self.mdts as u32;
        if self.mdts == 0 || shift > 63 { None } else { Some(1 << shift) }
    }
}

/// One LBA format (§5.15.2.1, figure 246).
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct LbaFormat {
    /// MS: metadata bytes per block.
    pub metadata: U16,
    /// LBADS: log2 of the block size in bytes; at least 9, 0 for a format not available.
    pub lbads: u8,
    /// RP in bits 1:0: relative performance, 0 best.
    pub rp: u8,
}

const _: () = assert!(size_of::<LbaFormat>() == 4);

/// Identify Namespace, 4096 bytes (§5.15.2.1, figure 245; NVM §4.1.5.1). Fields that are not
/// used here are inside the `reserved` arrays, named by their byte offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// NSZE: size in blocks.
    pub nsze: U64,
    /// NCAP: capacity in blocks.
    pub ncap: U64,
    /// NUSE: blocks in use.
    pub nuse: U64,
    /// NSFEAT: bit 0 thin provisioning, bit 2 deallocated-block errors, bit 4 NPWG.. NOWS valid.
    pub nsfeat: u8,
    /// NLBAF: LBA formats, 0's based.
    pub nlbaf: u8,
    /// FLBAS: bits 3:0 the format in use, bit 4 metadata inside the data.
    pub flbas: u8,
    /// MC: metadata capabilities.
    pub mc: u8,
    /// DPC: protection capabilities.
    pub dpc: u8,
    /// DPS: protection in use, 0 for none.
    pub dps: u8,
    /// NMIC: bit 0 may be shared between controllers.
    pub nmic: u8,
    /// RESCAP: reservation capabilities.
    pub rescap: u8,
    /// FPI: format progress; bit 7 it is told, bits 6:0 percent that remain.
    pub fpi: u8,
    /// DLFEAT: bits 2:0 what deallocated blocks read as (1 zeroes, 2 ones), bit 3 Write Zeroes
    /// may deallocate.
    pub dlfeat: u8,
    /// NAWUN, NAWUPF, NACWU, NABSN, NABO, NABSPF.
    pub reserved34: [u8; 12],
    /// NOIOB: optimal I/O boundary in blocks, 0 for none.
    pub noiob: U16,
    /// NVMCAP: bytes allocated to the namespace.
    pub nvmcap: U128,
    /// NPWG: preferred write granularity, blocks, 0's based.
    pub npwg: U16,
    /// NPWA: preferred write alignment, blocks, 0's based.
    pub npwa: U16,
    /// NPDG: preferred deallocate granularity, blocks, 0's based.
    pub npdg: U16,
    /// NPDA: preferred deallocate alignment, blocks, 0's based.
    pub npda: U16,
    /// NOWS: optimal write size, blocks, 0's based.
    pub nows: U16,
    /// Copy limits and reserved bytes.
    pub reserved74: [u8; 18],
    /// ANAGRPID.
    pub anagrpid: U32,
    /// Reserved.
    pub reserved96: [u8; 3],
    /// NSATTR: bit 0 write protected.
    pub nsattr: u8,
    /// NVMSETID.
    pub nvmsetid: U16,
    /// ENDGID.
    pub endgid: U16,
    /// NGUID, big-endian, zero if none.
    pub nguid: [u8; 16],
    /// EUI64, big-endian, zero if none.
    pub eui64: [u8; 8],
    /// LBAF0 to LBAF15.
    pub lbaf: [LbaFormat; 16],
    /// Further formats of later revisions, reserved and vendor bytes.
    pub reserved192: [u8; 3904],
}

const _: () = assert!(size_of::<IdentifyNamespace>() == IDENTIFY_SIZE);
const _: () = assert!(offset_of!(IdentifyNamespace, nsfeat) == 24);
const _: () = assert!(offset_of!(IdentifyNamespace, flbas) == 26);
const _: () = assert!(offset_of!(IdentifyNamespace, dps) == 29);
const _: () = assert!(offset_of!(IdentifyNamespace, fpi) == 32);
const _: () = assert!(offset_of!(IdentifyNamespace, dlfeat) == 33);
const _: () = assert!(offset_of!(IdentifyNamespace, noiob) == 46);
const _: () = assert!(offset_of!(IdentifyNamespace, nvmcap) == 48);
const _: () = assert!(offset_of!(IdentifyNamespace, npwg) == 64);
const _: () = assert!(offset_of!(IdentifyNamespace, nows) == 72);
const _: () = assert!(offset_of!(IdentifyNamespace, anagrpid) == 92);
const _: () = assert!(offset_of!(IdentifyNamespace, nsattr) == 99);
const _: () = assert!(offset_of!(IdentifyNamespace, nguid) == 104);
const _: () = assert!(offset_of!(IdentifyNamespace, eui64) == 120);
const _: () = assert!(offset_of!(IdentifyNamespace, lbaf) == 128);

impl IdentifyNamespace {
    /// Bit of `fpi` that says that progress is told.
    pub const FPI_SUPPORTED: u8 = 1 << 7;

    /// The LBA format in use. `None` if FLBAS names a format beyond NLBAF or 15.
    pub const fn format(&self) -> Option<LbaFormat> {
        // Bits 6:5 hold the upper part of the index where there are more than 16 formats
        // (2.0, NVM §4.1.5.1); those formats are not looked at here.
        let index = (self.flbas & 0xf) as usize | (((self.flbas >> 5) & 3) as usize * 16);
        if index > self.nlbaf as usize || index > 15 { None } else { Some(self.lbaf[index]) }
    }
}

/// Most identifiers in one active namespace list (§5.15.2.3).
pub const MAX_ACTIVE_NAMESPACES: usize = 1024;

/// Active Namespace ID list, 4096 bytes (§5.15.2.3): ascending, ended by 0 when not full. Also
/// the layout of the Changed Namespace List log page (§5.14.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct NamespaceList {
    /// Identifiers.
    pub ids: [U32; MAX_ACTIVE_NAMESPACES],
}

const _: () = assert!(size_of::<NamespaceList>() == IDENTIFY_SIZE);

impl NamespaceList {
    /// A list without namespaces.
    pub const EMPTY: NamespaceList = NamespaceList { ids: [U32::ZERO; MAX_ACTIVE_NAMESPACES] };

    /// The identifiers up to the first 0.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.ids.iter().map(|id| id.get()).take_while(|&id| id != 0)
    }
}

codes! {
    /// NIDT: type of a namespace identification descriptor (§5.15.2.4, figure 249).
    pub enum NidType(u8) {
        /// EUI64, 8 bytes.
        Eui64 = 1,
        /// NGUID, 16 bytes.
        Nguid = 2,
        /// UUID, 16 bytes.
        Uuid = 3,
        /// CSI, command set identifier, 1 byte (2.0 §5.17.2.3).
        CommandSet = 4,
    }
}

/// Header of a namespace identification descriptor; `length` bytes of identifier follow. A
/// length of 0 ends the list (§5.15.2.4).
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct NamespaceIdDesc {
    /// NIDT, see [`NidType`].
    pub kind: u8,
    /// NIDL: bytes that follow.
    pub length: u8,
    /// Reserved.
    pub reserved: [u8; 2],
}

const _: () = assert!(size_of::<NamespaceIdDesc>() == 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controller_bytes() {
        let mut bytes = [0u8; IDENTIFY_SIZE];
        bytes[77] = 5;
        bytes[516] = 3;
        bytes[520] = 0x0c;
        bytes[525] = 7;
        let id = IdentifyController::read_from_bytes(&bytes).unwrap();
        assert_eq!(id.max_transfer(0), Some(128 << 10));
        assert_eq!(id.max_transfer(1), Some(256 << 10));
        assert_eq!(id.nn.get(), 3);
        let oncs = Oncs(id.oncs.get());
        assert_eq!((oncs.dsm(), oncs.write_zeroes(), oncs.compare()), (1, 1, 0));
        assert_eq!(id.vwc, IdentifyController::VWC_PRESENT | IdentifyController::VWC_FLUSH_ALL);
        bytes[77] = 0;
        assert_eq!(IdentifyController::read_from_bytes(&bytes).unwrap().max_transfer(0), None);
        bytes[77] = 255;
        assert_eq!(IdentifyController::read_from_bytes(&bytes).unwrap().max_transfer(0), None);
    }

    #[test]
    fn namespace_format() {
        let mut bytes = [0u8; IDENTIFY_SIZE];
        bytes[25] = 1;
        bytes[26] = 1;
        bytes[128..132].copy_from_slice(&[0, 0, 9, 0]);
        bytes[132..136].copy_from_slice(&[8, 0, 12, 1]);
        let id = IdentifyNamespace::read_from_bytes(&bytes).unwrap();
        let f = id.format().unwrap();
        assert_eq!((f.lbads, f.metadata.get()), (12, 8));
        bytes[26] = 2;
        assert!(IdentifyNamespace::read_from_bytes(&bytes).unwrap().format().is_none());
        bytes[25] = 63;
        bytes[26] = 0x20;
        assert!(IdentifyNamespace::read_from_bytes(&bytes).unwrap().format().is_none());
    }

    #[test]
    fn list_ends_at_zero() {
        let mut list = NamespaceList::EMPTY;
        assert_eq!(list.iter().count(), 0);
        list.ids[0] = U32::new(1);
        list.ids[1] = U32::new(7);
        list.ids[3] = U32::new(9);
        assert!(list.iter().eq([1, 7]));
        list.ids = [U32::new(2); MAX_ACTIVE_NAMESPACES];
        assert_eq!(list.iter().count(), MAX_ACTIVE_NAMESPACES);
    }
}
