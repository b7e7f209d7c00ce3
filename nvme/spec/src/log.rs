//! Log pages (§5.14.1) and asynchronous events (§5.2).

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Status;
use crate::bits::{bitfields, codes};

codes! {
    /// Log page identifiers (§5.14.1, figure 190).
    pub enum LogId(u8) {
        /// Error Information (§5.14.1.1).
        Error = 0x01,
        /// SMART / Health Information (§5.14.1.2).
        Smart = 0x02,
        /// Firmware Slot Information (§5.14.1.3).
        FirmwareSlot = 0x03,
        /// Changed Namespace List (§5.14.1.4).
        ChangedNamespaces = 0x04,
        /// Commands Supported and Effects (§5.14.1.5).
        CommandEffects = 0x05,
    }
}

bitfields! {
    /// Critical Warning, the first byte of the SMART log (§5.14.1.2).
    pub struct CriticalWarning(u8) {
        /// Spare capacity is below its threshold.
        spare / with_spare: 0, 1;
        /// Temperature is outside its thresholds.
        temperature / with_temperature: 1, 1;
        /// Reliability is degraded.
        reliability / with_reliability: 2, 1;
        /// The media is read only.
        read_only / with_read_only: 3, 1;
        /// The backup of volatile memory has failed.
        backup / with_backup: 4, 1;
    }
}

/// SMART / Health Information log page, 512 bytes (§5.14.1.2, figure 194).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct SmartLog {
    /// See [`CriticalWarning`].
    pub critical_warning: u8,
    /// Composite temperature in kelvin.
    pub temperature: U16,
    /// Remaining spare capacity in percent.
    pub available_spare: u8,
    /// Percentage of spare below which a warning is raised.
    pub spare_threshold: u8,
    /// Life used in percent; may exceed 100, saturates at 255.
    pub percentage_used: u8,
    /// Critical warnings of endurance groups.
    pub endurance_warning: u8,
    /// Reserved.
    pub reserved7: [u8; 25],
    /// Units of 1000 × 512 bytes read by the host, rounded up.
    pub data_units_read: U128,
    /// Units of 1000 × 512 bytes written by the host, rounded up.
    pub data_units_written: U128,
    /// Read commands completed.
    pub host_reads: U128,
    /// Write commands completed.
    pub host_writes: U128,
    /// Minutes busy with I/O commands.
    pub busy_minutes: U128,
    /// Power cycles.
    pub power_cycles: U128,
    /// Hours with power.
    pub power_on_hours: U128,
    /// Power losses without a shutdown.
    pub unsafe_shutdowns: U128,
    /// Unrecovered data integrity errors.
    pub media_errors: U128,
    /// Error log entries over the life of the controller.
    pub error_log_entries: U128,
    /// Minutes above the warning temperature.
    pub warning_minutes: U32,
    /// Minutes above the critical temperature.
    pub critical_minutes: U32,
    /// Temperature sensors 1 to 8 in kelvin, 0 for none.
    pub sensors: [U16; 8],
    /// Thermal management counters and reserved bytes.
    pub reserved216: [u8; 296],
}

const _: () = assert!(size_of::<SmartLog>() == 512);
const _: () = assert!(offset_of!(SmartLog, temperature) == 1);
const _: () = assert!(offset_of!(SmartLog, percentage_used) == 5);
const _: () = assert!(offset_of!(SmartLog, data_units_read) == 32);
const _: () = assert!(offset_of!(SmartLog, host_reads) == 64);
const _: () = assert!(offset_of!(SmartLog, unsafe_shutdowns) == 144);
const _: () = assert!(offset_of!(SmartLog, error_log_entries) == 176);
const _: () = assert!(offset_of!(SmartLog, warning_minutes) == 192);
const _: () = assert!(offset_of!(SmartLog, sensors) == 200);

/// One entry of the Error Information log page, 64 bytes (§5.14.1.1, figure 191). The newest
/// comes first; an error count of 0 marks an unused entry.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct ErrorLogEntry {
    /// Serial number of the error, kept over resets.
    pub error_count: U64,
    /// Submission queue of the command, FFFFh if there is none.
    pub sq_id: U16,
    /// Identifier of the command, FFFFh if there is none.
    pub cid: U16,
    /// Status field in bits 15:1.
    pub status: U16,
    /// Byte (7:0) and bit (10:8) of the command that is at fault, FFFFh if none.
    pub parameter: U16,
    /// First LBA with the error.
    pub lba: U64,
    /// Namespace.
    pub nsid: U32,
    /// Log page with more, 0 for none.
    pub vendor_log: u8,
    /// Transport type; 0 for PCIe.
    pub transport: u8,
    /// Reserved.
    pub reserved30: [u8; 2],
    /// Command specific information.
    pub command_specific: U64,
    /// Transport specific information and reserved bytes.
    pub reserved40: [u8; 24],
}

const _: () = assert!(size_of::<ErrorLogEntry>() == 64);
const _: () = assert!(offset_of!(ErrorLogEntry, status) == 12);
const _: () = assert!(offset_of!(ErrorLogEntry, lba) == 16);
const _: () = assert!(offset_of!(ErrorLogEntry, nsid) == 24);
const _: () = assert!(offset_of!(ErrorLogEntry, command_specific) == 32);

impl ErrorLogEntry {
    /// The status that the command completed with.
    pub const fn status(&self) -> Status {
        Status::from_raw(self.status.get() >> 1)
    }
}

/// Firmware Slot Information log page, 512 bytes (§5.14.1.3, figure 195).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct FirmwareSlotLog {
    /// AFI: active slot in bits 2:0, slot after the next reset in bits 6:4.
    pub active: u8,
    /// Reserved.
    pub reserved1: [u8; 7],
    /// Revisions in slots 1 to 7, ASCII, zero for an empty slot.
    pub revisions: [[u8; 8]; 7],
    /// Reserved.
    pub reserved64: [u8; 448],
}

const _: () = assert!(size_of::<FirmwareSlotLog>() == 512);
const _: () = assert!(offset_of!(FirmwareSlotLog, revisions) == 8);

codes! {
    /// Type of an asynchronous event (§5.2, figure 145).
    pub enum AsyncEventType(u8) {
        /// Error status, see [`error_event`].
        Error = 0,
        /// SMART / health status, see [`smart_event`].
        Smart = 1,
        /// Notice, see [`notice_event`].
        Notice = 2,
        /// I/O command set specific.
        IoCommandSet = 6,
        /// Vendor specific.
        Vendor = 7,
    }
}

/// Information of events of type [`AsyncEventType::Error`] (§5.2, figure 147).
pub mod error_event {
    /// Write to a doorbell of a queue that does not exist.
    pub const INVALID_DOORBELL: u8 = 0;
    /// Value written to a doorbell is out of range, or moves past what there is.
    pub const INVALID_DOORBELL_VALUE: u8 = 1;
    /// Diagnostic failure.
    pub const DIAGNOSTIC_FAILURE: u8 = 2;
    /// Persistent internal error.
    pub const PERSISTENT_INTERNAL: u8 = 3;
    /// Transient internal error.
    pub const TRANSIENT_INTERNAL: u8 = 4;
}

/// Information of events of type [`AsyncEventType::Smart`] (§5.2, figure 148).
pub mod smart_event {
    /// Reliability is compromised.
    pub const RELIABILITY: u8 = 0;
    /// Temperature crossed a threshold.
    pub const TEMPERATURE: u8 = 1;
    /// Spare fell below its threshold.
    pub const SPARE: u8 = 2;
}

/// Information of events of type [`AsyncEventType::Notice`] (§5.2, figure 149).
pub mod notice_event {
    /// Identify Namespace data, or the list of namespaces, changed.
    pub const NAMESPACE_ATTRIBUTE: u8 = 0;
    /// Firmware activation starts.
    pub const FIRMWARE_ACTIVATION: u8 = 1;
}

bitfields! {
    /// Dword 0 of the completion of an Asynchronous Event Request (§5.2.1, figure 146).
    pub struct AsyncEvent(u32) {
        /// Type, see [`AsyncEventType`].
        kind / with_kind: 0, 3;
        /// What happened, by type.
        info / with_info: 8, 8;
        /// Log page that tells more; reading it clears the event.
        log_page / with_log_page: 16, 8;
    }
}

impl AsyncEvent {
    /// An event.
    pub const fn new(kind: AsyncEventType, info: u8, page: LogId) -> AsyncEvent {
        AsyncEvent(0)
            .with_kind(kind.code() as u32)
            .with_info(info as u32)
            .with_log_page(page.code() as u32)
    }

    /// The type, `None` if it is reserved.
    pub const fn event_type(self) -> Option<AsyncEventType> {
        AsyncEventType::from_code(self.kind() as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events() {
        let e = AsyncEvent::new(
            AsyncEventType::Notice,
            notice_event::NAMESPACE_ATTRIBUTE,
            LogId::ChangedNamespaces,
        );
        assert_eq!(e.0, 0x0004_0002);
        assert_eq!(e.event_type(), Some(AsyncEventType::Notice));
        assert_eq!(AsyncEvent(0x3).event_type(), None);
    }

    #[test]
    fn smart_bytes() {
        let mut bytes = [0u8; 512];
        bytes[0] = 0x02;
        bytes[1..3].copy_from_slice(&[0x2c, 0x01]);
        bytes[112] = 9;
        let log = SmartLog::read_from_bytes(&bytes).unwrap();
        assert_eq!(CriticalWarning(log.critical_warning).temperature(), 1);
        assert_eq!((log.temperature.get(), log.power_cycles.get()), (300, 9));
    }
}
