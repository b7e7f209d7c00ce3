//! [`Remote`]: where a remote export is, as NBD's addresses say it (doc/uri.md of the NBD project).

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::ClientError;
use crate::gate::watch_over;
use crate::proto;

/// NBD's own port.
const PORT: u16 = 10809;

/// What an address needs of the network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Network {
    /// Nothing: it is a socket of this host.
    No,
    /// A connection in plain text.
    Plain,
    /// A connection with TLS.
    Tls,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    Unix(PathBuf),
    Network(SocketAddr),
}

/// The address of a remote export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Remote {
    uri: String,
    place: Place,
    export: String,
    /// With TLS: what the server's certificate is for.
    secure: Option<String>,
}

impl fmt::Display for Remote {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(&self.uri)
    }
}

/// Resolves `%XX`.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        // `from_str_radix` would take a sign.
        let digits = digits.iter().all(u8::is_ascii_hexdigit).then_some(digits)?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = after;
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

impl Remote {
    /// From `nbd+unix:///EXPORT?socket=PATH`, `nbd://ADDRESS[:PORT]/EXPORT` or
    /// `nbds://ADDRESS[:PORT]/EXPORT[?tls-hostname=NAME]`. Hosts are addresses: no names are looked up.
    ///
    /// # Errors
    /// If it is none of these.
    pub fn parse(uri: &str) -> Result<Remote, ClientError> {
        let fail = |why: &str| ClientError::Refused(format!("{uri:?}: {why}"));
        let (scheme, rest) = uri.split_once("://").ok_or_else(|| fail("is no address of NBD"))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(export).filter(|e| e.len() <= proto::MAX_STRING);
        let export = export.ok_or_else(|| fail("its export has no name that can be"))?;
        let (mut path, mut name) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value).ok_or_else(|| fail("holds a wrong % sequence"))?;
            match (scheme, key) {
                ("nbd+unix", "socket") => path = Some(PathBuf::from(value)),
                ("nbds", "tls-hostname") => name = Some(value),
                _ => return Err(fail(&format!("{key:?} is not known here"))),
            }
        }
        let place = match scheme {
            "nbd+unix" if host.is_empty() => {
                Place::Unix(path.ok_or_else(|| fail("names no socket"))?)
            }
            "nbd" | "nbds" => {
                let address = host.parse().ok();
                let address = address.or_else(|| {
                    let ip = host.trim_start_matches('[').trim_end_matches(']').parse().ok()?;
                    Some(SocketAddr::new(ip, PORT))
                });
                let why = "its host is no address (names are not looked up)";
                Place::Network(address.ok_or_else(|| fail(why))?)
            }
            _ => return Err(fail("not nbd+unix:///, nbd:// or nbds://")),
        };
        let secure = match &place {
            Place::Network(a) if scheme == "nbds" => {
                Some(name.unwrap_or_else(|| a.ip().to_string()))
            }
            _ => None,
        };
        Ok(Remote { uri: uri.to_owned(), place, export, secure })
    }

    /// What it needs of the network.
    pub fn network(&self) -> Network {
        match (&self.place, &self.secure) {
            (Place::Unix(_), _) => Network::No,
            (Place::Network(_), None) => Network::Plain,
            (Place::Network(_), Some(_)) => Network::Tls,
        }
    }

    /// Whether it is on this host, by an address of the loopback.
    pub fn is_loopback(&self) -> bool {
        matches!(self.place, Place::Network(address) if address.ip().is_loopback())
    }

    pub(super) fn export(&self) -> &str {
        &self.export
    }

    /// For what the server's certificate must be, if it is by TLS.
    pub(super) fn secure(&self) -> Option<&str> {
        self.secure.as_deref()
    }

    /// A new connection.
    pub(super) fn connect(&self, patience: Duration) -> io::Result<OwnedFd> {
        match &self.place {
            Place::Network(address) => {
                let stream = TcpStream::connect_timeout(address, patience)?;
                stream.set_nodelay(true)?;
                watch_over(&stream);
                Ok(stream.into())
            }
            Place::Unix(path) => {
                let fd =
                    socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
                // For a server whose queue is full.
                let seconds = i64::try_from(patience.as_secs()).unwrap_or(i64::MAX).max(1);
                setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(seconds, 0))?;
                connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
                Ok(fd)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_others_write_them() {
        let remote = |uri: &str| Remote::parse(uri).unwrap();
        let r = remote("nbd+unix:///a%20disk?socket=/var/run/nbdproxy/export/vm%2F1");
        assert_eq!(r.place, Place::Unix("/var/run/nbdproxy/export/vm/1".into()));
        assert_eq!((r.export(), r.secure(), r.network()), ("a disk", None, Network::No));
        let r = remote("nbd://10.0.0.1");
        assert_eq!(r.place, Place::Network("10.0.0.1:10809".parse().unwrap()));
        assert_eq!((r.export(), r.network()), ("", Network::Plain));
        let r = remote("nbds://[::1]:99/x/y?tls-hostname=host.example");
        assert_eq!(r.place, Place::Network("[::1]:99".parse().unwrap()));
        assert_eq!((r.export(), r.secure()), ("x/y", Some("host.example")));
        assert_eq!(remote("nbds://[fe80::1]/").secure(), Some("fe80::1"));
        assert_eq!(r.to_string(), "nbds://[::1]:99/x/y?tls-hostname=host.example");
    }

    #[test]
    fn what_is_none_is_refused() {
        for bad in [
            "",
            "/a/path",
            "nbd+unix:///x",
            "nbd+unix://host/x?socket=/a",
            "nbd://host.example/",
            "nbd://1.2.3.4:99999/",
            "nbd://1.2.3.4/%0",
            "nbd://1.2.3.4/%zz",
            "nbd://1.2.3.4/%00",
            "nbd://1.2.3.4/%+1",
            "nbd://1.2.3.4/%ff",
            "nbd://1.2.3.4/x?tls-hostname=y",
            "nbds+unix:///x?socket=/a",
            "http://1.2.3.4/",
            &format!("nbd://1.2.3.4/{}", "x".repeat(4097)),
        ] {
            let e = Remote::parse(bad).unwrap_err().to_string();
            assert!(e.contains("refuses"), "{e}");
        }
    }
}
