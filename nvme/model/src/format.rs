//! Format NVM (§5.23): block size and contents of namespaces.
//!
//! Part of the [`Controller`], on the thread that steps it.

use nvme_spec::{AdminOpcode, Fna, LbaFormat, NSID_ALL, SecureErase, Sqe, StatusCode};

use crate::commands::When;
use crate::controller::{Answer, Controller, deny};
use crate::memory::HostMemory;

/// log2 of the block size of each LBA format, by its index.
const FORMATS: [u8; 2] = [9, 12];

/// The LBA formats as Identify Namespace lists them, and the index of the one in use.
pub(crate) fn formats(shift: u32) -> ([LbaFormat; FORMATS.len()], u8) {
    let list = FORMATS.map(|lbads| LbaFormat { lbads, ..LbaFormat::default() });
    (list, FORMATS.iter().position(|&f| u32::from(f) == shift).unwrap_or(0) as u8)
}

impl<M: HostMemory> Controller<M> {
    pub(crate) fn format_nvm(&mut self, sqe: &Sqe) -> Answer {
        let Some(fna) = self.options.format else { return Err(deny(StatusCode::INVALID_OPCODE)) };
        let (nsid, cdw10) = (sqe.nsid.get(), sqe.dword(0));
        let erase = SecureErase::from_code((cdw10 >> 9 & 7) as u8);
        let refused = match erase {
            None => true,
            Some(SecureErase::Crypto) => fna.crypto() == 0,
            Some(SecureErase::None | SecureErase::UserData) => false,
        };
        if refused {
            return Err(deny(StatusCode::INVALID_FIELD));
        }
        let all = nsid == NSID_ALL || formats_all(fna, erase);
        if nsid != NSID_ALL && self.active(nsid).is_none() {
            return Err(deny(StatusCode::INVALID_NAMESPACE));
        }
        // Metadata inside the data (bit 4) and protection (bits 8:5) are for formats that have
        // metadata, and none here has.
        let shift = FORMATS.get((cdw10 & 15) as usize).filter(|_| cdw10 >> 4 & 0x1f == 0);
        let Some(&shift) = shift else { return Err(deny(StatusCode::INVALID_FORMAT)) };
        let targets: Vec<u32> = (1..)
            .zip(&self.namespaces)
            .filter(|(id, ns)| ns.active && (all || *id == nsid))
            .map(|(id, _)| id)
            .collect();
        for &id in &targets {
            // Commands that were taken and are not completed yet (§5.23: may be refused so).
            if self.in_flight.iter().any(|f| f.sqid != 0 && f.sqe.nsid.get() == id) {
                return Err(deny(StatusCode::SEQUENCE_ERROR));
            }
            match self.active(id) {
                Some(ns) if ns.read_only => return Err(deny(StatusCode::WRITE_PROTECTED)),
                Some(ns) if ns.blocks << ns.shift >> shift == 0 => {
                    return Err(deny(StatusCode::INVALID_FORMAT));
                }
                _ => {}
            }
        }
        for id in targets {
            let cache = self.options.cache_bytes;
            let done = self.active(id).map_or(Ok(()), |ns| ns.format(shift.into(), cache));
            if done.is_err() {
                return Err(deny(StatusCode::WRITE_FAULT));
            }
            self.report_namespace(id);
        }
        Ok(0)
    }

    /// FPI of a namespace: how much of a format that is under way remains, in percent.
    pub(crate) fn format_progress(&self, nsid: u32) -> u8 {
        let here = |sqe: &Sqe| {
            let erase = SecureErase::from_code((sqe.dword(0) >> 9 & 7) as u8);
            let all = self.options.format.is_some_and(|fna| formats_all(fna, erase));
            sqe.opcode() == AdminOpcode::FormatNvm.code()
                && (all || [nsid, NSID_ALL].contains(&sqe.nsid.get()))
        };
        let flight = self.in_flight.iter().find(|f| f.sqid == 0 && here(&f.sqe));
        flight.map_or(0, |f| {
            let (end, now) = match f.when {
                When::Step(step) => (step, self.steps),
                When::Time(time) => (time, self.now_ns),
            };
            let (whole, left) = (end.saturating_sub(f.since), end.saturating_sub(now));
            (u128::from(left) * 100 / u128::from(whole.max(1))).min(100) as u8
        })
    }
}

/// Whether a format of one namespace is one of all.
fn formats_all(fna: Fna, erase: Option<SecureErase>) -> bool {
    let erases = erase.is_some_and(|e| e != SecureErase::None);
    fna.format_all() == 1 || (erases && fna.erase_all() == 1)
}
