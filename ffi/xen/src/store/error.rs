//! [`Error`]: what could not be done with the store, and why. Control path only.

use nix::errno::Errno;

/// Why a call failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// No store can be reached.
    #[error("cannot connect to xenstore at {at}: {why}")]
    Connect {
        /// All places that were tried.
        at: String,
        /// What the kernel said to the last one.
        why: Errno,
    },
    /// The store refused. The connection is as good as before.
    #[error("xenstore: {what}: {why}")]
    Refused {
        /// What was asked for.
        what: String,
        /// The error that the store named.
        why: Errno,
    },
    /// This cannot be asked for; nothing was sent.
    #[error("xenstore: {what}: {why}")]
    Request {
        /// What was to be asked for.
        what: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The connection is over; this and every later call fails. A new one has to be made, and the
    /// watches set again.
    #[error("the connection to xenstore is over: {0}")]
    Closed(String),
    /// Others changed what a transaction had seen, each time that it was tried.
    #[error("a xenstore transaction met others {0} times")]
    Conflict(u32),
}

impl Error {
    /// The error that the store named, if it was the store that refused.
    pub fn refusal(&self) -> Option<Errno> {
        match self {
            Error::Refused { why, .. } => Some(*why),
            _ => None,
        }
    }
}
