//! Identify (§5.15): what the device says about itself.

use nvme_spec::{
    Cns, IdentifyController, IdentifyNamespace, MAX_ACTIVE_NAMESPACES, NamespaceIdDesc,
    NamespaceList, NidType, Sqe, StatusCode, Version,
};
use zerocopy::{FromZeros, IntoBytes};

use crate::controller::{Answer, Controller, deny};
use crate::format::formats;
use crate::logs::ERROR_ENTRIES;
use crate::memory::HostMemory;
use crate::namespace::Namespace;
use crate::rng::hash;

/// PCI vendor: that of QEMU's emulated controller, so that hosts know what it is.
pub(crate) const VENDOR: u16 = 0x1b36;

impl<M: HostMemory> Controller<M> {
    pub(crate) fn identify(&mut self, sqe: &Sqe) -> Answer {
        let nsid = sqe.nsid.get();
        match Cns::from_code(sqe.dword(0) as u8) {
            Some(Cns::Controller) => self.put(sqe, self.identify_controller().as_bytes()),
            Some(Cns::Namespace) => {
                let ns = self.known(nsid)?;
                let data = if ns.active { self.identify_namespace(nsid, ns) } else { zeroed() };
                self.put(sqe, data.as_bytes())
            }
            Some(Cns::ActiveNamespaces) => {
                if nsid >= 0xffff_fffe {
                    return Err(deny(StatusCode::INVALID_NAMESPACE));
                }
                let mut list = NamespaceList::EMPTY;
                let above = (1..).zip(&self.namespaces).filter(|(id, ns)| *id > nsid && ns.active);
                for ((id, _), slot) in above.zip(&mut list.ids[..MAX_ACTIVE_NAMESPACES]) {
                    *slot = id.into();
                }
                self.put(sqe, list.as_bytes())
            }
            Some(Cns::NamespaceIds) => {
                if !self.known(nsid)?.active {
                    return Err(deny(StatusCode::INVALID_NAMESPACE));
                }
                let mut page = [0u8; 4096];
                let eui64 = self.unique_id(nsid);
                let nguid = self.nguid(nsid);
                descriptor(&mut page[0..20], NidType::Nguid, &nguid);
                descriptor(&mut page[20..32], NidType::Eui64, &eui64);
                self.put(sqe, &page)
            }
            None => Err(deny(StatusCode::INVALID_FIELD)),
        }
    }

    /// A namespace that exists, active or not.
    fn known(&self, nsid: u32) -> Result<&Namespace, nvme_spec::Status> {
        let index = nsid.checked_sub(1).map(|i| i as usize);
        index.and_then(|i| self.namespaces.get(i)).ok_or(deny(StatusCode::INVALID_NAMESPACE))
    }

    fn identify_controller(&self) -> IdentifyController {
        let mut id: IdentifyController = zeroed();
        (id.vid, id.ssvid) = (VENDOR.into(), VENDOR.into());
        pad(&mut id.serial, &self.options.serial);
        pad(&mut id.model, &self.options.model);
        pad(&mut id.firmware, FIRMWARE);
        id.rab = 4;
        id.mdts = self.options.mdts;
        id.cntlid = 1.into();
        id.ver = Version::V1_4.0.into();
        id.rtd3e = 1_000_000.into();
        id.oaes = IdentifyController::OAES_NAMESPACE.into();
        id.cntrltype = 1;
        id.oacs = self.options.oacs().0.into();
        id.acl = 3;
        id.aerl = self.options.aerl;
        // One firmware slot, read only.
        id.frmw = 0x03;
        id.lpa = IdentifyController::LPA_EXTENDED;
        id.elpe = (ERROR_ENTRIES - 1) as u8;
        id.wctemp = 343.into();
        id.cctemp = 353.into();
        id.sqes = 0x66;
        id.cqes = 0x44;
        id.nn = (self.namespaces.len() as u32).into();
        id.oncs = self.options.oncs().0.into();
        id.fna = self.options.format.map_or(0, |fna| fna.0);
        id.vwc = IdentifyController::VWC_FLUSH_ALL
            | if self.options.vwc { IdentifyController::VWC_PRESENT } else { 0 };
        let nqn = format!("nqn.2014-08.org.nvmexpress:uuid:{}", self.uuid());
        id.subnqn[..nqn.len()].copy_from_slice(nqn.as_bytes());
        id
    }

    fn identify_namespace(&self, nsid: u32, ns: &Namespace) -> IdentifyNamespace {
        let mut id: IdentifyNamespace = zeroed();
        id.nsze = ns.blocks.into();
        id.ncap = ns.blocks.into();
        id.nuse = ns.blocks.into();
        // Deallocated blocks read as zeroes, and Write Zeroes may deallocate.
        id.dlfeat = 0b1001;
        id.nvmcap = (u128::from(ns.blocks) << ns.shift).into();
        id.nsattr = ns.read_only.into();
        let (formats, current) = formats(ns.shift);
        id.lbaf[..formats.len()].copy_from_slice(&formats);
        id.nlbaf = formats.len() as u8 - 1;
        id.flbas = current;
        id.fpi = IdentifyNamespace::FPI_SUPPORTED | self.format_progress(nsid);
        id.eui64 = self.unique_id(nsid);
        id.nguid = self.nguid(nsid);
        id
    }

    /// An EUI64 from serial number and namespace: locally administered, so that it claims no
    /// vendor.
    fn unique_id(&self, nsid: u32) -> [u8; 8] {
        let mut id = hash(self.serial_hash(), nsid.into()).to_be_bytes();
        id[0] = (id[0] & 0xfc) | 0x02;
        id
    }

    fn nguid(&self, nsid: u32) -> [u8; 16] {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&hash(self.serial_hash(), u64::from(nsid) << 32).to_be_bytes());
        id[8..].copy_from_slice(&self.unique_id(nsid));
        id
    }

    fn serial_hash(&self) -> u64 {
        self.options.serial.bytes().fold(0, |h, b| hash(h, b.into()))
    }

    fn uuid(&self) -> String {
        let (a, b) = (hash(self.serial_hash(), 1), hash(self.serial_hash(), 2));
        let (a, b) = (a & !0xf000 | 0x4000, b >> 2 | 1 << 63);
        format!(
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            a >> 32,
            a >> 16 & 0xffff,
            a & 0xffff,
            b >> 48,
            b & 0xffff_ffff_ffff
        )
    }
}

/// Revision of the firmware, 8 characters at most.
pub(crate) const FIRMWARE: &str = "1.0";

fn zeroed<T: FromZeros>() -> T {
    T::new_zeroed()
}

/// ASCII padded with spaces.
fn pad(field: &mut [u8], text: &str) {
    field.fill(b' ');
    let n = text.len().min(field.len());
    field[..n].copy_from_slice(&text.as_bytes()[..n]);
}

fn descriptor(at: &mut [u8], kind: NidType, id: &[u8]) {
    let header = NamespaceIdDesc { kind: kind.code(), length: id.len() as u8, reserved: [0; 2] };
    let (head, tail) = at.split_at_mut(size_of::<NamespaceIdDesc>());
    head.copy_from_slice(header.as_bytes());
    tail[..id.len()].copy_from_slice(id);
}
