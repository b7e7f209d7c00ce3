//! [`Store`]: a blocking client of xenstore, for control threads.
//!
//! Any number of threads may use one; they take turns. Values and names are bytes, since guests
//! wrote many of them. After [`Error::Closed`] a new client has to be made and its watches set.

mod connection;
mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod nodes;
mod perms;
mod transaction;
mod watches;
mod wire;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;

use connection::{Connection, Failure, Kind, PATIENCE};
use wire::{bad_path, kind};

pub use error::Error;
pub use nodes::Nodes;
pub use perms::Perm;
pub use transaction::Transaction;
pub use watches::Event;

/// A connection to the store.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
}

impl Store {
    /// Connects where the environment says (`XENSTORED_PATH`, else `XENSTORED_RUNDIR`), else to the
    /// daemon's socket, else to the kernel's device.
    ///
    /// # Errors
    /// [`Error::Connect`] if there is none.
    pub fn connect() -> Result<Store, Error> {
        let places = places(|name| std::env::var_os(name));
        let mut last = Errno::ENOENT;
        for place in &places {
            match Store::open(place) {
                Ok(store) => return Ok(store),
                Err(why) => last = why,
            }
        }
        let at: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
        Err(Error::Connect { at: at.join(", "), why: last })
    }

    /// Connects to a socket or a device.
    ///
    /// # Errors
    /// [`Error::Connect`] if that fails.
    pub fn connect_to(place: &Path) -> Result<Store, Error> {
        Store::open(place).map_err(|why| Error::Connect { at: place.display().to_string(), why })
    }

    /// A client on a stream that is connected to a store already.
    ///
    /// # Errors
    /// [`Error::Connect`] if the process has no descriptor or thread left.
    pub fn from_stream(stream: UnixStream) -> Result<Store, Error> {
        let on = Store::on(stream, PATIENCE);
        on.map_err(|why| Error::Connect { at: "a socket".to_owned(), why })
    }

    fn on(stream: UnixStream, patience: Duration) -> Result<Store, Errno> {
        let os = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(0));
        stream.set_nonblocking(false).map_err(os)?;
        // A daemon that does not read must not hold a thread up for ever.
        stream.set_write_timeout(Some(patience)).map_err(os)?;
        let file = File::from(OwnedFd::from(stream));
        Ok(Store { connection: Connection::new(file, Kind::Socket, patience)? })
    }

    fn open(place: &Path) -> Result<Store, Errno> {
        let os = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(0));
        if std::fs::metadata(place).map_err(os)?.file_type().is_socket() {
            return Store::on(UnixStream::connect(place).map_err(os)?, PATIENCE);
        }
        let file = OpenOptions::new().read(true).write(true).open(place).map_err(os)?;
        Ok(Store { connection: Connection::new(file, Kind::Device, PATIENCE)? })
    }

    /// Watches a path and all below it (or a special one, as `@releaseDomain`), under a token that no
    /// other watch of this client has. There is one event at once, and there may be some for nothing.
    ///
    /// # Errors
    /// As all calls; [`Error::Request`] if the token is in use.
    pub fn watch(&self, path: impl AsRef<[u8]>, token: u64) -> Result<(), Error> {
        self.watch_levels(path.as_ref(), token, None)
    }

    /// The same, where events name at most so many levels below the path: what changes further down
    /// counts as a change there. So that a burst of changes in one place is one event.
    ///
    /// # Errors
    /// As [`Store::watch`].
    pub fn watch_down_to(
        &self,
        path: impl AsRef<[u8]>,
        levels: usize,
        token: u64,
    ) -> Result<(), Error> {
        self.watch_levels(path.as_ref(), token, Some(levels))
    }

    fn watch_levels(&self, path: &[u8], token: u64, levels: Option<usize>) -> Result<(), Error> {
        let what = || describe("watch", path);
        if let Some(why) = bad_path(path) {
            return Err(Error::Request { what: what(), why });
        }
        // Before it is sent: the first event may be quicker than the answer.
        if !self.connection.watches(|w| w.add(token, path, levels)) {
            return Err(Error::Request { what: what(), why: "a watch has this token" });
        }
        let done = self.talk(kind::WATCH, 0, path, format!("{token}\0").as_bytes());
        if done.is_err() {
            self.connection.watches(|w| w.remove(token));
        }
        done.map(drop).map_err(|e| explain(e, what))
    }

    /// Ends a watch; its events that were not taken are gone. Nothing happens if there is none.
    ///
    /// # Errors
    /// As all calls.
    pub fn unwatch(&self, token: u64) -> Result<(), Error> {
        let Some(path) = self.connection.watches(|w| w.remove(token)) else { return Ok(()) };
        let done = self.talk(kind::UNWATCH, 0, &path, format!("{token}\0").as_bytes());
        done.map(drop).map_err(|e| explain(e, || describe("unwatch", &path)))
    }

    /// The path of a watch.
    pub fn watched(&self, token: u64) -> Option<Vec<u8>> {
        self.connection.watches(|w| w.path(token).map(<[u8]>::to_vec))
    }

    /// Takes the next event, of each watch with events in turn. Waits as long as is said, or with
    /// `None` for ever; `Ok(None)` if there was none. Several threads
    /// may wait; each event goes to one of them.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn next_event(&self, wait: Option<Duration>) -> Result<Option<Event>, Error> {
        self.connection.next_event(wait).map_err(Error::Closed)
    }

    /// Readable while there are events to take, or the connection is over. Only to be polled.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.connection.ready()
    }

    fn talk(&self, kind: u32, tx_id: u32, path: &[u8], rest: &[u8]) -> Result<Vec<u8>, Failure> {
        let payload = [path, b"\0", rest].concat();
        if payload.len() > self.connection.room() {
            return Err(Failure::Refused(Errno::E2BIG));
        }
        self.connection.talk(kind, tx_id, &payload)
    }
}

/// Where a store may be, in the order in which it is looked for.
fn places(env: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    if let Some(place) = env("XENSTORED_PATH") {
        return vec![place.into()];
    }
    let run = env("XENSTORED_RUNDIR").map_or("/var/run/xenstored".into(), PathBuf::from);
    vec![run.join("socket"), "/dev/xen/xenbus".into(), "/proc/xen/xenbus".into()]
}

/// A request in words. Paths that came from a guest are made printable.
fn describe(verb: &str, path: &[u8]) -> String {
    format!("{verb} {}", path.escape_ascii())
}

fn explain(failure: Failure, what: impl FnOnce() -> String) -> Error {
    match failure {
        Failure::Refused(why) => Error::Refused { what: what(), why },
        Failure::Closed(why) => Error::Closed(why),
    }
}
