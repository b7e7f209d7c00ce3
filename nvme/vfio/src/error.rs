//! [`Error`]: what could not be done, why, and what to do next. Control path only.

use nix::errno::Errno;

/// Why a function cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// A text that is no PCI address.
    #[error("{0:?} is no PCI address like 0000:01:00.0")]
    Address(String),
    /// The kernel refused.
    #[error("{what}: {why}")]
    Os {
        /// What was tried.
        what: String,
        /// The kernel's answer.
        why: Errno,
    },
    /// The host is not set up for it; the text says what is missing and the command that mends it.
    #[error("{0}")]
    Host(String),
    /// The kernel's or the device's answer makes no sense.
    #[error("{0}")]
    Odd(String),
    /// The function was taken away, or this process has let go of it.
    #[error("the device is gone")]
    Gone,
}

impl Error {
    pub(crate) fn os(what: impl Into<String>) -> impl FnOnce(Errno) -> Error {
        let what = what.into();
        move |why| Error::Os { what, why }
    }
}
