//! What Identify says (§5.15), checked and turned into what the rest of the driver works with.

use block::DeviceInfo;
use nvme_spec::{Cap, Fna, IdentifyController, IdentifyNamespace, Oacs, Oncs, Version};

use crate::Error;
use crate::prp;

/// Longest read or write that a queue pair takes, in bytes; it splits what is too long for one
/// command. A limit only so that sums of lengths stay far from any overflow.
const MAX_TRANSFER: u32 = 1 << 30;

/// What the controller is and can do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ControllerInfo {
    /// PCI vendor.
    pub vendor: u16,
    /// Model, without padding; anything that is no printable ASCII replaced.
    pub model: String,
    /// Serial number, likewise.
    pub serial: String,
    /// Firmware revision, likewise.
    pub firmware: String,
    /// Revision of the specification.
    pub version: Version,
    /// Most data that this driver moves with one command, in bytes: MDTS, or less.
    pub max_command: u32,
    /// There is a volatile write cache.
    pub volatile_cache: bool,
    /// The cache is on, so that writes need a Flush to be durable.
    pub cache_enabled: bool,
    /// Optional I/O commands.
    pub oncs: Oncs,
    /// It takes doorbells from memory (Doorbell Buffer Config).
    pub doorbell_buffer: bool,
    /// Optional admin commands.
    pub oacs: Oacs,
    /// What Format NVM does beyond one namespace.
    pub fna: Fna,
    /// Namespace attribute notices can be had.
    pub(crate) namespace_events: bool,
    /// Asynchronous Event Requests that may be outstanding.
    pub(crate) event_requests: u8,
    /// How long a shutdown may take, in microseconds; 0 not reported.
    pub(crate) shutdown_us: u32,
    /// Command retry delays 1 to 3 in units of 100 ms.
    pub(crate) retry_delays: [u16; 3],
    /// Largest namespace identifier.
    pub(crate) namespaces: u32,
    /// Most bytes of one Write Zeroes, `None` if there is no such limit.
    pub(crate) zeroes_limit: Option<u64>,
}

impl ControllerInfo {
    pub(crate) fn new(id: &IdentifyController, cap: Cap, vs: Version) -> Result<Self, Error> {
        let unsupported = |why: String| Err(Error::Unsupported(why));
        if id.cntrltype > 1 {
            return unsupported(format!("controller type {} does no I/O", id.cntrltype));
        }
        let (sqes, cqes) = (id.sqes, id.cqes);
        if !(sqes & 15..=sqes >> 4).contains(&6) || !(cqes & 15..=cqes >> 4).contains(&4) {
            return unsupported(format!(
                "queue entry sizes SQES {sqes:#04x} and CQES {cqes:#04x} exclude 64 and 16 bytes"
            ));
        }
        let mdts = id.max_transfer(cap.mpsmin() as u8).unwrap_or(u64::MAX);
        let vwc = id.vwc & IdentifyController::VWC_PRESENT != 0;
        Ok(ControllerInfo {
            vendor: id.vid.get(),
            model: text(&id.model),
            serial: text(&id.serial),
            firmware: text(&id.firmware),
            version: vs,
            max_command: mdts.min(u64::from(prp::MAX_BYTES)) as u32,
            volatile_cache: vwc,
            cache_enabled: vwc,
            oncs: Oncs(id.oncs.get()),
            doorbell_buffer: Oacs(id.oacs.get()).doorbell_buffer() == 1,
            oacs: Oacs(id.oacs.get()),
            fna: Fna(id.fna),
            namespace_events: id.oaes.get() & IdentifyController::OAES_NAMESPACE != 0,
            event_requests: id.aerl.saturating_add(1),
            shutdown_us: id.rtd3e.get(),
            retry_delays: id.crdt.map(|d| d.get()),
            namespaces: id.nn.get(),
            zeroes_limit: None,
        })
    }
}

/// ASCII padded with spaces, as text that is safe to print.
fn text(raw: &[u8]) -> String {
    let clean = |&b: &u8| if b.is_ascii_graphic() || b == b' ' { char::from(b) } else { '?' };
    let s: String = raw.iter().take_while(|&&b| b != 0).map(clean).collect();
    s.trim().to_owned()
}

/// A namespace that can be used: one unit of every queue pair.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Namespace {
    /// Its identifier.
    pub nsid: u32,
    /// Size, block size and abilities when it was last looked at.
    pub info: DeviceInfo,
    /// NGUID, zero if it has none.
    pub nguid: [u8; 16],
    /// EUI64, zero if it has none.
    pub eui64: [u8; 8],
    /// Block size as a power of two.
    pub(crate) block_shift: u32,
    /// Write Zeroes may deallocate and the blocks still read as zeroes.
    pub(crate) zeroes_deallocate: bool,
}

/// Why a namespace is not used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// Its identifier.
    pub nsid: u32,
    /// Why.
    pub why: String,
}

impl Namespace {
    /// Looks at an active namespace; the error says why it cannot be used.
    pub(crate) fn new(
        nsid: u32,
        id: &IdentifyNamespace,
        controller: &ControllerInfo,
    ) -> Result<Namespace, String> {
        let format = id.format().ok_or_else(|| {
            format!("its LBA format (FLBAS {:#04x}) is not among the {} listed", id.flbas, {
                u32::from(id.nlbaf) + 1
            })
        })?;
        if format.metadata.get() != 0 {
            return Err(format!("it has {} bytes of metadata per block", format.metadata.get()));
        }
        if id.dps & 7 != 0 {
            return Err(format!("it has protection information of type {}", id.dps & 7));
        }
        if format.lbads != 9 && format.lbads != 12 {
            return Err(format!("its blocks have 2^{} bytes, not 512 or 4096", format.lbads));
        }
        let block_shift = u32::from(format.lbads);
        let block = 1u32 << block_shift;
        let size = id.nsze.get().checked_mul(u64::from(block)).filter(|&s| s <= i64::MAX as u64);
        let size = size.ok_or_else(|| format!("a size of {} blocks is absurd", id.nsze.get()))?;
        // NSFEAT bit 4: the preferred granularities are there. Advice, so nonsense is ignored.
        let preferred = |blocks0: u16| {
            let bytes = (u32::from(blocks0) + 1) * block;
            (id.nsfeat & 0x10 != 0 && bytes.is_power_of_two()).then_some(bytes)
        };
        let dealloc_reads_zero = id.dlfeat & 7 == 1;
        Ok(Namespace {
            nsid,
            info: DeviceInfo {
                size,
                block_size: block,
                physical_block_size: preferred(id.npwg.get()).unwrap_or(block).max(4096),
                read_only: id.nsattr & 1 != 0,
                volatile_cache: controller.cache_enabled,
                write_zeroes: controller.oncs.write_zeroes() != 0,
                discard: controller.oncs.dsm() != 0,
                discard_granularity: preferred(id.npdg.get()).unwrap_or(block),
                max_transfer: MAX_TRANSFER,
            },
            nguid: id.nguid,
            eui64: id.eui64,
            block_shift,
            zeroes_deallocate: dealloc_reads_zero && id.dlfeat & 8 != 0,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use nvme_spec::IDENTIFY_SIZE;
    use zerocopy::FromBytes;

    pub(crate) fn controller(patch: impl FnOnce(&mut [u8])) -> Result<ControllerInfo, Error> {
        let mut bytes = [0u8; IDENTIFY_SIZE];
        bytes[4..10].copy_from_slice(b"S1\x07\xff9 ");
        bytes[24..34].copy_from_slice(b"  a model ");
        bytes[512] = 0x66;
        bytes[513] = 0x44;
        bytes[520] = 0x0c;
        patch(&mut bytes);
        let id = IdentifyController::read_from_bytes(&bytes).unwrap();
        ControllerInfo::new(&id, Cap(0), Version::V1_4)
    }

    fn namespace(patch: impl FnOnce(&mut [u8])) -> Result<Namespace, String> {
        let mut bytes = [0u8; IDENTIFY_SIZE];
        bytes[0..8].copy_from_slice(&1000u64.to_le_bytes());
        bytes[130] = 9;
        patch(&mut bytes);
        let id = IdentifyNamespace::read_from_bytes(&bytes).unwrap();
        Namespace::new(7, &id, &controller(|_| ()).unwrap())
    }

    #[test]
    fn text_is_safe_to_print() {
        let c = controller(|_| ()).unwrap();
        assert_eq!((c.serial.as_str(), c.model.as_str()), ("S1??9", "a model"));
    }

    #[test]
    fn transfers_are_limited_by_mdts_and_by_the_list() {
        let max = |mdts| controller(|b| b[77] = mdts).unwrap().max_command;
        assert_eq!((max(0), max(1), max(5), max(9)), (1 << 20, 8192, 128 << 10, 1 << 20));
        assert_eq!(max(255), 1 << 20);
    }

    #[test]
    fn controllers_that_cannot_be_driven() {
        assert!(controller(|b| b[111] = 3).is_err());
        assert!(controller(|b| b[512] = 0x77).is_err());
        assert!(controller(|b| b[513] = 0x33).is_err());
        assert!(controller(|b| b[512] = 0x76).is_ok());
    }

    #[test]
    fn block_sizes() {
        let n = namespace(|_| ()).unwrap();
        assert_eq!((n.info.size, n.info.block_size, n.block_shift), (512_000, 512, 9));
        assert_eq!(n.info.physical_block_size, 4096);
        let n = namespace(|b| b[130] = 12).unwrap();
        assert_eq!((n.info.size, n.info.block_size), (4_096_000, 4096));
        for bad in [0, 8, 10, 11, 13, 16, 255] {
            assert!(namespace(|b| b[130] = bad).unwrap_err().contains("not 512 or 4096"));
        }
    }

    #[test]
    fn namespaces_that_are_refused() {
        assert!(namespace(|b| b[128] = 8).unwrap_err().contains("8 bytes of metadata"));
        assert!(namespace(|b| b[29] = 1).unwrap_err().contains("protection information"));
        assert!(namespace(|b| b[26] = 3).unwrap_err().contains("LBA format"));
        assert!(namespace(|b| b[7] = 0xff).unwrap_err().contains("absurd"));
    }

    #[test]
    fn advice_that_makes_no_sense_is_ignored() {
        let n = namespace(|b| {
            b[24] = 0x10;
            b[64] = 31; // NPWG: 16 KiB
            b[68] = 255; // NPDG: 128 KiB
        })
        .unwrap();
        assert_eq!((n.info.physical_block_size, n.info.discard_granularity), (16384, 128 << 10));
        let n = namespace(|b| {
            b[24] = 0x10;
            b[64] = 2;
            b[68] = 4;
        })
        .unwrap();
        assert_eq!((n.info.physical_block_size, n.info.discard_granularity), (4096, 512));
    }

    #[test]
    fn zeroes_deallocate_only_if_blocks_then_read_as_zeroes() {
        for (dlfeat, want) in [(0, false), (1, false), (8, false), (9, true), (0xa, false)] {
            assert_eq!(namespace(|b| b[33] = dlfeat).unwrap().zeroes_deallocate, want);
        }
    }
}
