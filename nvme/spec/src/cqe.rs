//! The completion queue entry (§4.6; 2.0 §3.3.3.2).

use core::mem::{offset_of, size_of};

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{CQE_SIZE, Status};

/// A completion queue entry of 16 bytes.
#[derive(
    Clone, Copy, Default, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Cqe {
    /// DW0: command specific result.
    pub result: U32,
    /// DW1: reserved for the commands used here.
    pub reserved: U32,
    /// SQHD: the submission queue's head when this entry was made.
    pub sq_head: U16,
    /// SQID: the submission queue that the command came from.
    pub sq_id: U16,
    /// CID of the command.
    pub cid: U16,
    /// Bit 0 the phase tag, bits 15:1 the status field.
    pub status_phase: U16,
}

const _: () = assert!(size_of::<Cqe>() == CQE_SIZE);
const _: () = assert!(offset_of!(Cqe, sq_head) == 8);
const _: () = assert!(offset_of!(Cqe, sq_id) == 10);
const _: () = assert!(offset_of!(Cqe, cid) == 12);
const _: () = assert!(offset_of!(Cqe, status_phase) == Cqe::STATUS_OFFSET);

impl Cqe {
    /// Byte offset of the half-word that holds phase and status: a poller reads it first.
    pub const STATUS_OFFSET: usize = 14;

    /// An entry.
    #[inline]
    pub const fn new(
        result: u32,
        sq_head: u16,
        sq_id: u16,
        cid: u16,
        status: Status,
        phase: bool,
    ) -> Cqe {
        Cqe {
            result: U32::new(result),
            reserved: U32::new(0),
            sq_head: U16::new(sq_head),
            sq_id: U16::new(sq_id),
            cid: U16::new(cid),
            status_phase: U16::new((status.raw() << 1) | phase as u16),
        }
    }

    /// From the entry's four dwords, in order, as host integers.
    #[inline]
    pub const fn from_dwords(dw: [u32; 4]) -> Cqe {
        Cqe {
            result: U32::new(dw[0]),
            reserved: U32::new(dw[1]),
            sq_head: U16::new(dw[2] as u16),
            sq_id: U16::new((dw[2] >> 16) as u16),
            cid: U16::new(dw[3] as u16),
            status_phase: U16::new((dw[3] >> 16) as u16),
        }
    }

    /// The phase tag.
    #[inline]
    pub const fn phase(&self) -> bool {
        self.status_phase.get() & 1 != 0
    }

    /// The status field.
    #[inline]
    pub const fn status(&self) -> Status {
        Status::from_raw(self.status_phase.get() >> 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StatusCode;

    #[test]
    fn bytes() {
        let cqe = Cqe::new(
            0x1122_3344,
            0x0506,
            0x0708,
            0x090a,
            Status::fatal(StatusCode::INVALID_FIELD),
            true,
        );
        assert_eq!(
            cqe.as_bytes(),
            [0x44, 0x33, 0x22, 0x11, 0, 0, 0, 0, 6, 5, 8, 7, 0x0a, 9, 0x05, 0x80]
        );
        assert_eq!(Cqe::from_dwords([0x1122_3344, 0, 0x0708_0506, 0x8005_090a]), cqe);
        assert!(cqe.phase());
        assert_eq!(cqe.status().raw(), 0x4002);
    }
}
