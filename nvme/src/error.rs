//! [`Error`]: why a controller could not be brought up, used or closed. Control path only.

use nvme_spec::Status;

/// Why a controller cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// Registers read all ones: the device was pulled, or its link is down.
    #[error("the device is gone: its registers read all ones")]
    Gone,
    /// CSTS.CFS is set.
    #[error("the controller reports a fatal error (CSTS.CFS)")]
    Fatal,
    /// CSTS.RDY did not follow CC.EN.
    #[error("the controller did not become {what} within {ms} ms (CAP.TO)")]
    NotReady {
        /// "ready" or "disabled".
        what: &'static str,
        /// How long it was given, in milliseconds.
        ms: u64,
    },
    /// An admin command was not answered.
    #[error("the controller did not answer {what} within {ms} ms")]
    NoAnswer {
        /// The command.
        what: &'static str,
        /// How long it was given, in milliseconds.
        ms: u64,
    },
    /// An I/O command was not answered, and aborting it did not help.
    #[error("an I/O command on queue {qid} was lost")]
    Lost {
        /// The submission queue.
        qid: u16,
    },
    /// An admin command failed.
    #[error("{what} failed: {status}")]
    Command {
        /// The command.
        what: &'static str,
        /// What the controller answered.
        status: Status,
    },
    /// The controller lacks what this driver needs, or has what it must not have.
    #[error("this controller cannot be driven: {0}")]
    Unsupported(String),
    /// Memory could not be had, or the device cannot reach it.
    #[error("memory for {what}: {why}")]
    Memory {
        /// What it was for.
        what: &'static str,
        /// Why not.
        why: String,
    },
    /// The device that came back after a reset is not the one that was there before.
    #[error("after the reset the device is another one: {0}")]
    Changed(String),
    /// All I/O queues that the controller granted are in use.
    #[error("all {0} I/O queues of the controller are in use")]
    NoQueue(u16),
    /// A queue pair was neither dropped nor polled while the controller was being closed.
    #[error("queue pair {qid} is still in use and does not let go of its rings")]
    InUse {
        /// The submission queue.
        qid: u16,
    },
    /// A namespace cannot be formatted while queue pairs are there.
    #[error(
        "queue pair {qid} is in use; a namespace is formatted only when nothing uses the drive"
    )]
    Busy {
        /// The submission queue.
        qid: u16,
    },
    /// The device does not have what was asked for.
    #[error("{0}")]
    NotPossible(String),
    /// What was asked for needs a controller that is ready.
    #[error("the controller is not ready")]
    NotOpen,
    /// It fails again and again soon after it was reset.
    #[error("given up after {resets} resets, the last since {last}")]
    TooManyResets {
        /// How many there were in a row.
        resets: u32,
        /// Why the last one was.
        last: Box<Error>,
    },
}
