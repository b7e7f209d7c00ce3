//! Get Log Page (§5.14) and the error log behind it.

use std::collections::VecDeque;

use nvme_spec::{
    ErrorLogEntry, FirmwareSlotLog, IoOpcode, LogId, NSID_ALL, NamespaceList, SmartLog, Sqe,
    Status, StatusCode,
};
use zerocopy::{FromZeros, IntoBytes};

use crate::controller::{Answer, Controller, deny};
use crate::identify::FIRMWARE;
use crate::memory::HostMemory;

/// Entries of the error log.
pub(crate) const ERROR_ENTRIES: usize = 64;

/// The error log, newest first. It outlives resets.
#[derive(Debug, Default)]
pub(crate) struct ErrorLog {
    entries: VecDeque<ErrorLogEntry>,
    count: u64,
}

impl ErrorLog {
    /// A command failed.
    pub(crate) fn command(&mut self, sqid: u16, sqe: &Sqe, status: Status) {
        let has_lba = sqid != 0
            && matches!(
                IoOpcode::from_code(sqe.opcode()),
                Some(IoOpcode::Read | IoOpcode::Write | IoOpcode::WriteZeroes)
            );
        self.push(ErrorLogEntry {
            sq_id: sqid.into(),
            cid: sqe.cid().into(),
            status: (status.raw() << 1).into(),
            parameter: 0xffff.into(),
            lba: if has_lba { sqe.slba() } else { 0 }.into(),
            nsid: sqe.nsid,
            ..ErrorLogEntry::default()
        });
    }

    /// A doorbell of a queue was written with a value that cannot be.
    pub(crate) fn doorbell(&mut self, qid: u16) {
        self.push(ErrorLogEntry {
            sq_id: qid.into(),
            cid: 0xffff.into(),
            parameter: 0xffff.into(),
            ..ErrorLogEntry::default()
        });
    }

    fn push(&mut self, mut entry: ErrorLogEntry) {
        self.count += 1;
        entry.error_count = self.count.into();
        self.entries.truncate(ERROR_ENTRIES - 1);
        self.entries.push_front(entry);
    }
}

/// Units of 1000 × 512 bytes, rounded up.
fn data_units(bytes: u64) -> u128 {
    bytes.div_ceil(512_000).into()
}

impl<M: HostMemory> Controller<M> {
    pub(crate) fn get_log_page(&mut self, sqe: &Sqe) -> Answer {
        let invalid = deny(StatusCode::INVALID_FIELD);
        let (bytes, offset) = (sqe.log_bytes(), sqe.log_offset());
        if bytes > self.options.max_transfer() || !offset.is_multiple_of(4) {
            return Err(invalid);
        }
        let page_id = LogId::from_code(sqe.dword(0) as u8);
        let page = match page_id {
            Some(LogId::Error) => self.error_log(),
            Some(LogId::Smart) => match sqe.nsid.get() {
                0 | NSID_ALL => self.smart_log().as_bytes().to_vec(),
                _ => return Err(invalid),
            },
            Some(LogId::FirmwareSlot) => {
                let mut log = FirmwareSlotLog::new_zeroed();
                log.active = 1;
                log.revisions[0][..FIRMWARE.len()].copy_from_slice(FIRMWARE.as_bytes());
                log.as_bytes().to_vec()
            }
            Some(LogId::ChangedNamespaces) => self.changed_namespaces().as_bytes().to_vec(),
            _ => return Err(deny(StatusCode::INVALID_LOG_PAGE)),
        };
        let Some(part) = usize::try_from(offset).ok().and_then(|o| page.get(o..)) else {
            return Err(invalid);
        };
        let n = part.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
        let answer = self.put(sqe, &part[..n])?;
        let retain = sqe.dword(0) & (1 << 15) != 0;
        if let Some(id) = page_id.filter(|_| !retain) {
            self.events.page_read(id);
        }
        Ok(answer)
    }

    fn error_log(&self) -> Vec<u8> {
        let mut page = vec![0; ERROR_ENTRIES * size_of::<ErrorLogEntry>()];
        for (slot, entry) in
            page.chunks_exact_mut(size_of::<ErrorLogEntry>()).zip(&self.errors.entries)
        {
            slot.copy_from_slice(entry.as_bytes());
        }
        page
    }

    fn smart_log(&self) -> SmartLog {
        let stats = self.stats.snapshot();
        let mut log = SmartLog::new_zeroed();
        log.critical_warning = self.life.critical_warning;
        log.temperature = 300.into();
        log.available_spare = 100;
        log.spare_threshold = 10;
        log.data_units_read = data_units(stats.read_bytes).into();
        log.data_units_written = data_units(stats.write_bytes).into();
        log.host_reads = u128::from(stats.reads).into();
        log.host_writes = u128::from(stats.writes).into();
        log.power_cycles = u128::from(self.life.power_cycles).into();
        log.unsafe_shutdowns = u128::from(self.life.unsafe_shutdowns).into();
        log.media_errors = u128::from(self.life.media_errors).into();
        log.error_log_entries = u128::from(self.errors.count).into();
        log
    }

    fn changed_namespaces(&self) -> NamespaceList {
        let mut list = NamespaceList::EMPTY;
        if self.events.changed.len() > list.ids.len() {
            // §5.14.1.4: too many to list.
            list.ids[0] = NSID_ALL.into();
            return list;
        }
        for (slot, &nsid) in list.ids.iter_mut().zip(&self.events.changed) {
            *slot = nsid.into();
        }
        list
    }
}
