//! The status field of a completion (§4.6.1; 2.0 §3.3.3.2.1): type, code, and the retry bits.

use core::fmt;

/// A status type and code as one number: type in bits 10:8, code in bits 7:0. Also the form in
/// which statuses are written in logs (`281h` is a media error, unrecovered read).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StatusCode(pub u16);

/// SCT, the type of a status code (§4.6.1.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum StatusType {
    /// 0: applies to any command (§4.6.1.2.1).
    Generic,
    /// 1: meaning depends on the opcode (§4.6.1.2.2).
    CommandSpecific,
    /// 2: media and data integrity (§4.6.1.2.3).
    Media,
    /// 3: path to the namespace (§4.6.1.2.4).
    Path,
    /// 7: vendor specific.
    Vendor,
    /// 4 to 6: reserved.
    Reserved(u8),
}

macro_rules! status_codes {
    ($( $(#[$meta:meta])* $name:ident = $code:literal, $text:literal; )*) => {
        impl StatusCode {
            $( $(#[$meta])* #[doc = concat!($text, ".")] pub const $name: StatusCode = StatusCode($code); )*

            /// The specification's name of the status, or `None` for one not listed here.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $( $code => Some($text), )*
                    _ => None,
                }
            }

            /// Every status listed here, in ascending order.
            pub const ALL: &'static [StatusCode] = &[$( StatusCode($code), )*];
        }
    };
}

status_codes! {
    SUCCESS = 0x000, "Successful Completion";
    INVALID_OPCODE = 0x001, "Invalid Command Opcode";
    INVALID_FIELD = 0x002, "Invalid Field in Command";
    CID_CONFLICT = 0x003, "Command ID Conflict";
    DATA_TRANSFER_ERROR = 0x004, "Data Transfer Error";
    ABORTED_POWER_LOSS = 0x005, "Commands Aborted due to Power Loss Notification";
    INTERNAL_ERROR = 0x006, "Internal Error";
    ABORT_REQUESTED = 0x007, "Command Abort Requested";
    ABORTED_SQ_DELETION = 0x008, "Command Aborted due to SQ Deletion";
    FAILED_FUSED = 0x009, "Command Aborted due to Failed Fused Command";
    MISSING_FUSED = 0x00a, "Command Aborted due to Missing Fused Command";
    INVALID_NAMESPACE = 0x00b, "Invalid Namespace or Format";
    SEQUENCE_ERROR = 0x00c, "Command Sequence Error";
    INVALID_SGL_SEGMENT = 0x00d, "Invalid SGL Segment Descriptor";
    INVALID_SGL_COUNT = 0x00e, "Invalid Number of SGL Descriptors";
    DATA_SGL_LENGTH = 0x00f, "Data SGL Length Invalid";
    METADATA_SGL_LENGTH = 0x010, "Metadata SGL Length Invalid";
    SGL_TYPE = 0x011, "SGL Descriptor Type Invalid";
    INVALID_CMB_USE = 0x012, "Invalid Use of Controller Memory Buffer";
    INVALID_PRP_OFFSET = 0x013, "PRP Offset Invalid";
    ATOMIC_WRITE_EXCEEDED = 0x014, "Atomic Write Unit Exceeded";
    OPERATION_DENIED = 0x015, "Operation Denied";
    SGL_OFFSET = 0x016, "SGL Offset Invalid";
    HOST_ID_FORMAT = 0x018, "Host Identifier Inconsistent Format";
    KEEP_ALIVE_EXPIRED = 0x019, "Keep Alive Timer Expired";
    KEEP_ALIVE_INVALID = 0x01a, "Keep Alive Timeout Invalid";
    ABORTED_PREEMPT = 0x01b, "Command Aborted due to Preempt and Abort";
    SANITIZE_FAILED = 0x01c, "Sanitize Failed";
    SANITIZE_IN_PROGRESS = 0x01d, "Sanitize In Progress";
    SGL_GRANULARITY = 0x01e, "SGL Data Block Granularity Invalid";
    NOT_IN_CMB_QUEUE = 0x01f, "Command Not Supported for Queue in CMB";
    WRITE_PROTECTED = 0x020, "Namespace is Write Protected";
    INTERRUPTED = 0x021, "Command Interrupted";
    TRANSIENT_TRANSPORT = 0x022, "Transient Transport Error";
    LOCKED_DOWN = 0x023, "Command Prohibited by Command and Feature Lockdown";
    MEDIA_NOT_READY = 0x024, "Admin Command Media Not Ready";
    LBA_OUT_OF_RANGE = 0x080, "LBA Out of Range";
    CAPACITY_EXCEEDED = 0x081, "Capacity Exceeded";
    NAMESPACE_NOT_READY = 0x082, "Namespace Not Ready";
    RESERVATION_CONFLICT = 0x083, "Reservation Conflict";
    FORMAT_IN_PROGRESS = 0x084, "Format In Progress";
    CQ_INVALID = 0x100, "Completion Queue Invalid";
    INVALID_QUEUE_ID = 0x101, "Invalid Queue Identifier";
    INVALID_QUEUE_SIZE = 0x102, "Invalid Queue Size";
    ABORT_LIMIT = 0x103, "Abort Command Limit Exceeded";
    AER_LIMIT = 0x105, "Asynchronous Event Request Limit Exceeded";
    INVALID_FIRMWARE_SLOT = 0x106, "Invalid Firmware Slot";
    INVALID_FIRMWARE_IMAGE = 0x107, "Invalid Firmware Image";
    INVALID_INTERRUPT_VECTOR = 0x108, "Invalid Interrupt Vector";
    INVALID_LOG_PAGE = 0x109, "Invalid Log Page";
    INVALID_FORMAT = 0x10a, "Invalid Format";
    FIRMWARE_NEEDS_RESET = 0x10b, "Firmware Activation Requires Conventional Reset";
    INVALID_QUEUE_DELETION = 0x10c, "Invalid Queue Deletion";
    FEATURE_NOT_SAVEABLE = 0x10d, "Feature Identifier Not Saveable";
    FEATURE_NOT_CHANGEABLE = 0x10e, "Feature Not Changeable";
    FEATURE_NOT_NAMESPACE = 0x10f, "Feature Not Namespace Specific";
    OVERLAPPING_RANGE = 0x114, "Overlapping Range";
    NAMESPACE_NOT_ATTACHED = 0x11a, "Namespace Not Attached";
    CONFLICTING_ATTRIBUTES = 0x180, "Conflicting Attributes";
    INVALID_PROTECTION_INFO = 0x181, "Invalid Protection Information";
    WRITE_TO_READ_ONLY = 0x182, "Attempted Write to Read Only Range";
    WRITE_FAULT = 0x280, "Write Fault";
    UNRECOVERED_READ = 0x281, "Unrecovered Read Error";
    GUARD_CHECK = 0x282, "End-to-end Guard Check Error";
    APP_TAG_CHECK = 0x283, "End-to-end Application Tag Check Error";
    REF_TAG_CHECK = 0x284, "End-to-end Reference Tag Check Error";
    COMPARE_FAILURE = 0x285, "Compare Failure";
    ACCESS_DENIED = 0x286, "Access Denied";
    DEALLOCATED_BLOCK = 0x287, "Deallocated or Unwritten Logical Block";
    PATH_INTERNAL = 0x300, "Internal Path Error";
    ANA_PERSISTENT_LOSS = 0x301, "Asymmetric Access Persistent Loss";
    ANA_INACCESSIBLE = 0x302, "Asymmetric Access Inaccessible";
    ANA_TRANSITION = 0x303, "Asymmetric Access Transition";
    CONTROLLER_PATH = 0x360, "Controller Pathing Error";
    HOST_PATH = 0x370, "Host Pathing Error";
    ABORTED_BY_HOST = 0x371, "Command Aborted By Host";
}

impl StatusCode {
    /// Builds a code from its type (0 to 7) and its code within the type.
    pub const fn new(sct: u8, sc: u8) -> StatusCode {
        StatusCode(((sct as u16 & 7) << 8) | sc as u16)
    }

    /// SC, the code within the type.
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }

    /// SCT, the type.
    pub const fn kind(self) -> StatusType {
        match (self.0 >> 8) & 7 {
            0 => StatusType::Generic,
            1 => StatusType::CommandSpecific,
            2 => StatusType::Media,
            3 => StatusType::Path,
            7 => StatusType::Vendor,
            other => StatusType::Reserved(other as u8),
        }
    }
}

impl fmt::Display for StatusCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({:x}h)", self.0),
            None => write!(f, "status type {} code {:x}h", (self.0 >> 8) & 7, self.sc()),
        }
    }
}

impl fmt::Debug for StatusCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The 15-bit status field of a completion, without the phase bit: code in bits 10:0, CRD 12:11,
/// More 13, Do Not Retry 14.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(u16);

impl Status {
    /// Success.
    pub const SUCCESS: Status = Status(0);

    /// A status with Do Not Retry clear: the same command may succeed later.
    pub const fn retryable(code: StatusCode) -> Status {
        Status(code.0 & 0x7ff)
    }

    /// A status with Do Not Retry set: the same command will fail again.
    pub const fn fatal(code: StatusCode) -> Status {
        Status((code.0 & 0x7ff) | 0x4000)
    }

    /// From the 15-bit field; bit 15 is dropped.
    #[inline]
    pub const fn from_raw(raw: u16) -> Status {
        Status(raw & 0x7fff)
    }

    /// The 15-bit field.
    #[inline]
    pub const fn raw(self) -> u16 {
        self.0
    }

    /// This status with the More bit set: the error log has an entry for it (§4.6.1).
    #[must_use]
    pub const fn with_more(self) -> Status {
        Status(self.0 | 0x2000)
    }

    /// Type and code.
    #[inline]
    pub const fn code(self) -> StatusCode {
        StatusCode(self.0 & 0x7ff)
    }

    /// CRD: which of the Command Retry Delay times of Identify Controller applies, 0 for none.
    pub const fn crd(self) -> u8 {
        ((self.0 >> 11) & 3) as u8
    }

    /// More: the error information log has an entry.
    pub const fn more(self) -> bool {
        self.0 & 0x2000 != 0
    }

    /// DNR: the same command will fail again.
    pub const fn do_not_retry(self) -> bool {
        self.0 & 0x4000 != 0
    }

    /// Whether type and code are both zero.
    #[inline]
    pub const fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.code(), f)?;
        if self.do_not_retry() {
            f.write_str(", do not retry")?;
        }
        if self.more() {
            f.write_str(", see the error log")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::format;

    #[test]
    fn layout_and_names() {
        // Values seen from QEMU's controller: 4080h and 4002h carry DNR, 281h does not.
        let s = Status::from_raw(0x4080);
        assert_eq!(s.code(), StatusCode::LBA_OUT_OF_RANGE);
        assert!(s.do_not_retry() && !s.more());
        assert_eq!(Status::fatal(StatusCode::INVALID_FIELD).raw(), 0x4002);
        assert_eq!(Status::retryable(StatusCode::UNRECOVERED_READ).raw(), 0x281);
        assert_eq!(StatusCode::new(2, 0x81).kind(), StatusType::Media);
        assert_eq!(Status::from_raw(0x1800).crd(), 3);
        assert_eq!(format!("{s}"), "LBA Out of Range (80h), do not retry");
        assert_eq!(format!("{}", StatusCode::new(7, 0x12)), "status type 7 code 12h");
        assert!(Status::from_raw(0x8000).is_success());
    }

    #[test]
    fn codes_are_sorted_and_unique() {
        assert!(StatusCode::ALL.windows(2).all(|w| w[0] < w[1]));
        assert!(StatusCode::ALL.iter().all(|c| c.name().is_some()));
    }
}
