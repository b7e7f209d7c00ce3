//! Making and removing the socket file. Called by whoever binds and ends a server.

use std::ffi::OsStr;
use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

/// Why a server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another server listens on the socket.
    #[error("{}: another server is listening there", .0.display())]
    Live(PathBuf),
    /// Something that is no socket has the name.
    #[error("{}: exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("{}: {what}: {source}", path.display())]
    Os {
        /// The socket's name.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Whoever is on the network could read what is served, and write it.
    #[error(
        "{0}: not without TLS, as it is no address of this host's loopback; give certificates, or say \
         that plain text is meant"
    )]
    Plain(SocketAddr),
    /// The export makes no sense.
    #[error("cannot serve this export: {0}")]
    Export(&'static str),
}

/// The socket file that a server made, told from one that somebody else made since.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

/// Listens on a new socket of mode 0600. A socket file that nobody listens on is replaced. Also for
/// servers of other protocols.
///
/// # Errors
/// If somebody listens there, the name is another thing's, or the kernel refuses.
pub fn listen_on(path: &Path) -> Result<(UnixListener, SocketFile), Error> {
    let os = |what| {
        move |e: Errno| Error::Os { path: path.to_owned(), what, source: std::io::Error::from(e) }
    };
    let io = |what| move |source| Error::Os { path: path.to_owned(), what, source };
    let address = UnixAddr::new(path).map_err(os("not a socket name"))?;
    let _lock = lock_folder(path);
    clear(path, &address)?;
    let fd = new_socket().map_err(os("cannot make a socket"))?;
    // A socket file gets its mode from the socket when it is bound, less the umask: so there is no
    // moment in which others could connect.
    fchmod(fd.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR).map_err(os("cannot set the mode"))?;
    bind(fd.as_raw_fd(), &address).map_err(os("cannot bind"))?;
    let meta = std::fs::symlink_metadata(path).map_err(io("cannot look at the new socket"))?;
    let file = SocketFile { path: path.to_owned(), identity: (meta.dev(), meta.ino()) };
    if let Err(e) = Backlog::new(128).and_then(|backlog| listen(&fd, backlog)) {
        file.remove();
        return Err(os("cannot listen")(e));
    }
    Ok((UnixListener::from(fd), file))
}

fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

/// Keeps two servers from finding the same stale socket at once and removing each other's new one.
/// Where the lock cannot be had soon (somebody else uses it for another purpose) goes on without.
fn lock_folder(path: &Path) -> Option<Flock<File>> {
    let folder = path.parent().filter(|p| *p != OsStr::new("")).unwrap_or(Path::new("."));
    let mut file = File::open(folder).ok()?;
    for _ in 0..100 {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((back, _)) => file = back,
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    None
}

/// Removes a socket file that nobody listens on.
fn clear(path: &Path, address: &UnixAddr) -> Result<(), Error> {
    let os = |what| move |source| Error::Os { path: path.to_owned(), what, source };
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(os("cannot look at it")(e)),
    };
    if !meta.file_type().is_socket() {
        return Err(Error::NotASocket(path.to_owned()));
    }
    let probe = new_socket().map_err(|e| os("cannot make a socket")(e.into()))?;
    match connect(probe.as_raw_fd(), address) {
        Err(Errno::ECONNREFUSED) => std::fs::remove_file(path).map_err(os("cannot replace it")),
        Err(Errno::ENOENT) => Ok(()),
        // A full backlog (EAGAIN) is somebody alive too.
        Ok(()) | Err(Errno::EAGAIN) => Err(Error::Live(path.to_owned())),
        Err(e) => Err(os("cannot tell whether a server is listening there")(e.into())),
    }
}

impl SocketFile {
    /// Removes the file if it is still the one that was made.
    pub fn remove(&self) {
        let ours = |m: std::fs::Metadata| (m.dev(), m.ino()) == self.identity;
        if std::fs::symlink_metadata(&self.path).is_ok_and(ours)
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            log::warn!("cannot remove the socket {}: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let (listener, file) = listen_on(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(listen_on(&path), Err(Error::Live(_))));
        UnixStream::connect(&path).unwrap();
        drop(listener);
        file.remove();
        assert!(!path.exists());
    }

    #[test]
    fn other_things_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let error = listen_on(&path).unwrap_err();
        assert!(error.to_string().ends_with("exists and is not a socket"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
        let long = dir.path().join("n".repeat(200));
        assert!(matches!(listen_on(&long), Err(Error::Os { what: "not a socket name", .. })));
        let nowhere = dir.path().join("no/folder");
        assert!(matches!(listen_on(&nowhere), Err(Error::Os { what: "cannot bind", .. })));
    }

    #[test]
    fn a_socket_of_somebody_else_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_listener, file) = listen_on(&path).unwrap();
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        file.remove();
        assert!(path.exists());
    }
}
