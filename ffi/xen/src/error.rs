//! [`Error`]: what could not be done with a device of Xen's. Control path only.

use nix::errno::Errno;

/// Why a device or a helper cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// The device is not there, or may not be used.
    #[error("cannot open {place}: {why}{hint}")]
    Open {
        /// Where it should be.
        place: &'static str,
        /// The kernel's answer.
        why: Errno,
        /// What to do about it, if that is known.
        hint: &'static str,
    },
    /// Another domain's port cannot be bound to.
    #[error("cannot bind to event channel {port} of domain {domid}: {why}")]
    Bind {
        /// The domain.
        domid: u16,
        /// Its port.
        port: u32,
        /// The kernel's or hypervisor's answer.
        why: Errno,
    },
    /// Events were lost: every ring has to be looked at. All ports are enabled again.
    #[error("the event channel device lost events")]
    Overflow,
    /// The kernel refused.
    #[error("{what}: {why}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        why: Errno,
    },
}

impl Error {
    pub(crate) fn open(place: &'static str, error: &std::io::Error) -> Error {
        let why = errno(error);
        let hint = match why {
            Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
                " (is this a domain of Xen? try: modprobe -a xen-gntdev xen-evtchn)"
            }
            _ => "",
        };
        Error::Open { place, why, hint }
    }

    pub(crate) fn io(what: &'static str, error: &std::io::Error) -> Error {
        Error::Os { what, why: errno(error) }
    }

    pub(crate) fn os(what: &'static str) -> impl Fn(Errno) -> Error {
        move |why| Error::Os { what, why }
    }
}

pub(crate) fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
