//! [`ImageLock`]: the locks by which QEMU's programs keep others off an image file.
//!
//! QEMU locks single bytes of an image with open file description locks: byte 100 + n for "I do n",
//! byte 200 + n for "nobody else may do n", where n counts its block permissions: 0 consistent read,
//! 1 write, 2 write unchanged data, 3 resize. All are read locks; whoever has taken his own then
//! looks whether a write lock could be had on the bytes that contradict. What is locked here is just
//! what QEMU locks for a QCOW2 image, so each side refuses what the other has open.
//!
//! Control path. The locks go with the open file, so closing one frees them.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};

const READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const RESIZE: u8 = 1 << 3;

/// First of the bytes that say what is done, and of those that say what others may not do.
const DOES: i64 = 100;
const FORBIDS: i64 = 200;
/// How many bytes after each may be locked.
const BITS: i64 = 8;

/// Why an image could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has the image open in a way that excludes ours.
    #[error("the image is in use by another process, which {0}")]
    InUse(&'static str),
    /// The file system does not do locks, or the kernel refused otherwise.
    #[error("cannot lock the image: {0}")]
    Os(io::Error),
}

impl From<nix::Error> for LockError {
    fn from(e: nix::Error) -> LockError {
        LockError::Os(e.into())
    }
}

/// A lock on an image, held until it is dropped or every descriptor of the opened file is closed.
///
/// It belongs to the opened file, not to the process: one process that opens an image twice gets in
/// its own way as two would. Lock an opened file once only.
#[derive(Debug)]
pub struct ImageLock {
    file: File,
}

impl ImageLock {
    /// For an image that is going to be written: nobody else may have it open but with locks off.
    ///
    /// # Errors
    /// If it is in use, or the file system does no locking.
    pub fn exclusive(file: &File) -> Result<ImageLock, LockError> {
        ImageLock::take(file, READ | WRITE | RESIZE)
    }

    /// For an image that is only read, and for backing files: others may read it too, but nobody
    /// may write to it.
    ///
    /// # Errors
    /// If somebody writes to it, or the file system does no locking.
    pub fn shared(file: &File) -> Result<ImageLock, LockError> {
        ImageLock::take(file, READ)
    }

    /// Makes a shared lock an exclusive one.
    ///
    /// # Errors
    /// If somebody else uses the image; the lock is shared as before then.
    pub fn upgrade(&self) -> Result<(), LockError> {
        self.acquire(READ | WRITE | RESIZE).inspect_err(|_| self.share())
    }

    /// Makes an exclusive lock a shared one.
    pub fn share(&self) {
        for n in (0..BITS).filter(|n| (WRITE | RESIZE) >> n & 1 != 0) {
            let _ = self.set(libc::F_UNLCK, DOES + n, 1);
        }
    }

    fn take(file: &File, does: u8) -> Result<ImageLock, LockError> {
        // From here on, dropping it gives back whatever was taken.
        let lock = ImageLock { file: file.try_clone().map_err(LockError::Os)? };
        lock.acquire(does)?;
        Ok(lock)
    }

    fn acquire(&self, does: u8) -> Result<(), LockError> {
        const FORBIDDEN: u8 = WRITE | RESIZE;
        for n in 0..BITS {
            if does >> n & 1 != 0 {
                self.set(libc::F_RDLCK, DOES + n, 1)?;
            }
            if FORBIDDEN >> n & 1 != 0 {
                self.set(libc::F_RDLCK, FORBIDS + n, 1)?;
            }
        }
        // Ours are visible; now look for those that contradict. Two that come at the same time may
        // both back off, but never both stay.
        for n in 0..BITS {
            if does >> n & 1 != 0 && self.taken(FORBIDS + n)? {
                let what = if n == 0 { "lets nobody read it" } else { "lets nobody write to it" };
                return Err(LockError::InUse(what));
            }
            if FORBIDDEN >> n & 1 != 0 && self.taken(DOES + n)? {
                return Err(LockError::InUse("writes to it"));
            }
        }
        Ok(())
    }

    fn set(&self, kind: libc::c_int, start: i64, len: i64) -> Result<(), nix::Error> {
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&range(kind, start, len))).map(|_| ())
    }

    /// Whether somebody else holds a lock on the byte.
    fn taken(&self, byte: i64) -> Result<bool, nix::Error> {
        let mut found = range(libc::F_WRLCK, byte, 1);
        fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut found))?;
        Ok(i32::from(found.l_type) != libc::F_UNLCK)
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        let _ = self.set(libc::F_UNLCK, DOES, BITS);
        let _ = self.set(libc::F_UNLCK, FORBIDS, BITS);
    }
}

fn range(kind: libc::c_int, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        // Must be 0 for locks of open files.
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::path::Path;
    use std::process::{Command, Stdio};

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn writers_exclude_all_and_readers_only_writers() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let (a, b, c) = (open(temp.path()), open(temp.path()), open(temp.path()));
        let writer = ImageLock::exclusive(&a).unwrap();
        assert!(matches!(ImageLock::exclusive(&b), Err(LockError::InUse(_))));
        assert!(matches!(ImageLock::shared(&b), Err(LockError::InUse("writes to it"))));
        drop(writer);
        let first = ImageLock::shared(&b).unwrap();
        let second = ImageLock::shared(&c).unwrap();
        let refused = ImageLock::exclusive(&a);
        assert!(matches!(refused, Err(LockError::InUse("lets nobody write to it"))));
        drop(first);
        assert!(matches!(ImageLock::exclusive(&a), Err(LockError::InUse(_))));
        drop(second);
        // The refused attempts left nothing behind.
        drop(ImageLock::exclusive(&a).unwrap());
        drop(ImageLock::exclusive(&b).unwrap());
        // Only reading needs no more than a file opened for reading.
        drop(ImageLock::shared(&File::open(temp.path()).unwrap()).unwrap());
    }

    #[test]
    fn a_lock_changes_its_kind() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(temp.path()), open(temp.path()));
        let lock = ImageLock::exclusive(&a).unwrap();
        lock.share();
        let other = ImageLock::shared(&b).unwrap();
        assert!(lock.upgrade().is_err(), "somebody else reads");
        drop(ImageLock::shared(&open(temp.path())).unwrap());
        drop(other);
        lock.upgrade().unwrap();
        assert!(ImageLock::shared(&b).is_err());
        drop(lock);
        drop(ImageLock::exclusive(&b).unwrap());
    }

    fn qemu_io(path: &Path, args: &[&str]) -> (bool, String) {
        let out =
            Command::new("qemu-io").args(args).args(["-f", "qcow2"]).arg(path).output().unwrap();
        let text = [out.stdout, out.stderr].concat();
        (out.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    /// QEMU's tools refuse what is locked here, and the other way round.
    #[test]
    fn qemu_and_we_respect_each_other() {
        if Command::new("qemu-io").arg("--version").output().is_err() {
            eprintln!("skipped: no qemu-io");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let created = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&path)
            .arg("1M")
            .status();
        assert!(created.unwrap().success());
        let file = open(&path);

        let lock = ImageLock::exclusive(&file).unwrap();
        let (ok, text) = qemu_io(&path, &["-c", "write 0 4k"]);
        assert!(!ok && text.contains("Failed to get \"write\" lock"), "{text}");
        let (ok, text) = qemu_io(&path, &["-r", "-c", "read 0 4k"]);
        assert!(!ok && text.contains("Failed to get shared \"write\" lock"), "{text}");
        drop(lock);

        let lock = ImageLock::shared(&file).unwrap();
        let (ok, text) = qemu_io(&path, &["-c", "write 0 4k"]);
        assert!(!ok && text.contains("Failed to get \"write\" lock"), "{text}");
        let (ok, text) = qemu_io(&path, &["-r", "-c", "read 0 4k"]);
        assert!(ok, "{text}");
        drop(lock);
        assert!(qemu_io(&path, &["-c", "write 0 4k"]).0);

        for (how, shared_too) in [(None, false), (Some("-r"), true)] {
            let mut qemu = Command::new("qemu-io")
                .args(how)
                .args(["-f", "qcow2"])
                .arg(&path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // An answer shows that the image is open and stays so until the input ends.
            let mut input = qemu.stdin.take().unwrap();
            writeln!(input, "read 0 512").unwrap();
            let mut lines = BufReader::new(qemu.stdout.take().unwrap()).lines();
            assert!(lines.any(|l| l.unwrap().contains("read 512/512")));
            assert!(matches!(ImageLock::exclusive(&file), Err(LockError::InUse(_))));
            assert_eq!(ImageLock::shared(&file).is_ok(), shared_too);
            drop(input);
            assert!(qemu.wait().unwrap().success());
            drop(ImageLock::exclusive(&file).unwrap());
        }
    }
}
