//! What a command's status means to the layers above, and whether it is worth sending it again.

use block::Status as Outcome;
use nvme_spec::{Status, StatusCode, StatusType};

/// How often a command is sent again at most, for whatever reason.
pub(crate) const MAX_RETRIES: u8 = 4;

/// The outcome that the layers above see. The one table; every documented value has a test.
pub(crate) fn outcome(status: Status) -> Outcome {
    use StatusCode as C;
    if status.is_success() {
        return Outcome::Ok;
    }
    match status.code() {
        // The command, or a feature of it, is not known to the controller.
        C::INVALID_OPCODE | C::LOCKED_DOWN | C::INVALID_LOG_PAGE => Outcome::Unsupported,
        // The media may not be written.
        C::WRITE_PROTECTED | C::WRITE_TO_READ_ONLY => Outcome::ReadOnly,
        C::CAPACITY_EXCEEDED => Outcome::NoSpace,
        // Ended because we, or time, said so.
        C::ABORT_REQUESTED | C::ABORTED_BY_HOST | C::KEEP_ALIVE_EXPIRED => Outcome::Timeout,
        // The namespace, the queue or the power went away.
        C::INVALID_NAMESPACE
        | C::NAMESPACE_NOT_ATTACHED
        | C::ABORTED_SQ_DELETION
        | C::ABORTED_POWER_LOSS
        | C::ANA_PERSISTENT_LOSS => Outcome::Gone,
        // The command was well formed, and the device could not do it now or any more.
        C::DATA_TRANSFER_ERROR
        | C::INTERNAL_ERROR
        | C::OPERATION_DENIED
        | C::ABORTED_PREEMPT
        | C::SANITIZE_FAILED
        | C::SANITIZE_IN_PROGRESS
        | C::INTERRUPTED
        | C::TRANSIENT_TRANSPORT
        | C::MEDIA_NOT_READY
        | C::NAMESPACE_NOT_READY
        | C::RESERVATION_CONFLICT
        | C::FORMAT_IN_PROGRESS => Outcome::Medium,
        code => match code.kind() {
            // All others of these two types say that the command itself was wrong.
            StatusType::Generic if code.sc() < 0xc0 => Outcome::Invalid,
            StatusType::CommandSpecific if code.sc() < 0xc0 => Outcome::Invalid,
            // Media errors, path errors, vendor codes and what nobody has defined.
            _ => Outcome::Medium,
        },
    }
}

/// Whether the same command may well succeed a little later.
pub(crate) fn retryable(status: Status) -> bool {
    !status.do_not_retry()
        && matches!(
            status.code(),
            StatusCode::NAMESPACE_NOT_READY
                | StatusCode::FORMAT_IN_PROGRESS
                | StatusCode::INTERRUPTED
                | StatusCode::TRANSIENT_TRANSPORT
                | StatusCode::PATH_INTERNAL
                | StatusCode::ANA_TRANSITION
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every status that the specification documents, by outcome.
    const TABLE: &[(Outcome, &[u16])] = &[
        (Outcome::Ok, &[0x000]),
        (
            Outcome::Invalid,
            &[
                0x002, 0x003, 0x009, 0x00a, 0x00c, 0x00d, 0x00e, 0x00f, 0x010, 0x011, 0x012, 0x013,
                0x014, 0x016, 0x018, 0x01a, 0x01e, 0x01f, 0x080, 0x100, 0x101, 0x102, 0x103, 0x105,
                0x106, 0x107, 0x108, 0x10a, 0x10b, 0x10c, 0x10d, 0x10e, 0x10f, 0x114, 0x180, 0x181,
            ],
        ),
        (Outcome::ReadOnly, &[0x020, 0x182]),
        (Outcome::NoSpace, &[0x081]),
        (Outcome::Unsupported, &[0x001, 0x023, 0x109]),
        (
            Outcome::Medium,
            &[
                0x004, 0x006, 0x015, 0x01b, 0x01c, 0x01d, 0x021, 0x022, 0x024, 0x082, 0x083, 0x084,
                0x280, 0x281, 0x282, 0x283, 0x284, 0x285, 0x286, 0x287, 0x300, 0x302, 0x303, 0x360,
                0x370,
            ],
        ),
        (Outcome::Timeout, &[0x007, 0x019, 0x371]),
        (Outcome::Gone, &[0x005, 0x008, 0x00b, 0x11a, 0x301]),
    ];

    #[test]
    fn every_documented_status_has_its_outcome() {
        let mut seen = Vec::new();
        for &(want, codes) in TABLE {
            for &code in codes {
                // Do Not Retry, More and the retry delay change nothing about it.
                for high in [0, 0x4000, 0x2000, 0x1800, 0x7800] {
                    let status = Status::from_raw(code | high);
                    assert_eq!(outcome(status), want, "{status}");
                }
                seen.push(StatusCode(code));
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, StatusCode::ALL, "the table covers what is documented, once each");
    }

    #[test]
    fn unknown_statuses_are_errors() {
        for raw in 0..0x800u16 {
            let code = StatusCode(raw);
            if raw != 0 {
                assert_ne!(outcome(Status::from_raw(raw)), Outcome::Ok, "{code}");
            }
        }
        assert_eq!(outcome(Status::from_raw(0x7c5)), Outcome::Medium);
        assert_eq!(outcome(Status::from_raw(0x0c1)), Outcome::Medium);
    }

    #[test]
    fn retries_are_few_and_honour_dnr() {
        let list: Vec<u16> = (0..0x800).filter(|&raw| retryable(Status::from_raw(raw))).collect();
        assert_eq!(list, [0x021, 0x022, 0x082, 0x084, 0x300, 0x303]);
        assert!(list.iter().all(|raw| !retryable(Status::from_raw(raw | 0x4000))));
    }
}
