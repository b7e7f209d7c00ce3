//! Layouts and numbers of the NVM Express interface: registers, queue entries, status codes,
//! Identify data, log pages and features.
//!
//! Pure data: no I/O, no allocation, no thread. The driver (`nvme`) builds commands and reads
//! answers with these types and the controller model (`nvme-model`) does the reverse. A layout
//! error would thus cancel out between the two and hide, which is why every size and offset is
//! asserted at compile time against the figures of the specification.
//!
//! Section numbers are those of the NVM Express Base Specification 1.4; where revision 2.0 moved
//! or added something its section is given as "2.0 §…", and "NVM §…" means the NVM Command Set
//! Specification 1.0. All multi-byte fields on the wire are little-endian; the structures use
//! alignment-free little-endian integers, so they can be copied to and from device memory as
//! bytes on any host.
#![no_std]
#![forbid(unsafe_code)]

mod bits;
mod cqe;
mod feature;
mod identify;
mod log;
mod regs;
mod sqe;
mod status;

pub use cqe::Cqe;
pub use feature::{
    AsyncEventConfig, FeatureId, FeatureSelect, QueueCounts, SetFeatures, VolatileWriteCache,
};
pub use identify::{
    Cns, Fna, IdentifyController, IdentifyNamespace, LbaFormat, MAX_ACTIVE_NAMESPACES,
    NamespaceIdDesc, NamespaceList, NidType, Oacs, Oncs,
};
pub use log::{
    AsyncEvent, AsyncEventType, CriticalWarning, ErrorLogEntry, FirmwareSlotLog, LogId, SmartLog,
    error_event, notice_event, smart_event,
};
pub use regs::{
    Aqa, Cap, Cc, Csts, NSSR_MAGIC, ShutdownNotice, ShutdownStatus, Version, cq_head_doorbell,
    doorbell_of, offset, sq_tail_doorbell,
};
pub use sqe::{
    AdminOpcode, DsmRange, IoOpcode, MAX_DSM_RANGES, NSID_ALL, SecureErase, Sqe, cdw10_11_slba,
};
pub use status::{Status, StatusCode, StatusType};

/// Size of a submission queue entry in bytes: CC.IOSQES is 6 (§4.2).
pub const SQE_SIZE: usize = 64;
/// Size of a completion queue entry in bytes: CC.IOCQES is 4 (§4.6).
pub const CQE_SIZE: usize = 16;
/// Size of every Identify data structure in bytes (§5.15).
pub const IDENTIFY_SIZE: usize = 4096;
/// Size of one PRP entry in bytes (§4.3).
pub const PRP_ENTRY_SIZE: usize = 8;
