//! [`Error`]: what can go wrong with a peer.

use std::io;

/// What went wrong with a peer or its socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The peer closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// The peer took too long.
    #[error("no {0} in time")]
    Late(&'static str),
    /// The peer broke a rule of the protocol.
    #[error("the other side does not keep to the protocol: {0}")]
    Protocol(String),
    /// The peer answered that it did not do it.
    #[error("{what} was refused: {}", reason(*.errno))]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// Its errno; 0 if it did not say.
        errno: u32,
    },
    /// The connection ended before, for this reason.
    #[error("the device is gone: {0}")]
    Gone(String),
    /// The connection ended before the server said which version it speaks.
    #[error("the server took no client ({0}); it may have another one, and takes one at a time")]
    TurnedAway(String),
    /// What was asked for makes no sense for this device.
    #[error("{0}")]
    Invalid(String),
    /// Memory of the peer that cannot be mapped.
    #[error(transparent)]
    Memory(#[from] dma::Error),
}

impl Error {
    pub(crate) fn os(what: &'static str) -> impl Fn(nix::Error) -> Error {
        move |e| Error::Os { what, source: e.into() }
    }

    pub(crate) fn protocol<T>(what: impl Into<String>) -> Result<T, Error> {
        Err(Error::Protocol(what.into()))
    }
}

fn reason(errno: u32) -> String {
    match i32::try_from(errno) {
        Ok(0) | Err(_) => "no reason was given".to_owned(),
        Ok(n) => io::Error::from_raw_os_error(n).to_string(),
    }
}
