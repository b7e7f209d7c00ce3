//! Helpers of the tests: files as storage, and QEMU's tools as judges.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use block::{Status, Storage, StorageError};
use qcow::open::{BackingRef, ChainOptions, Opened, allowed_host_file};
use qcow::{Chain, ChainReader, Result};

/// A file as storage.
pub(crate) struct FileStorage {
    file: File,
    read_only: bool,
    /// For a device: its size, which does not change.
    device: Option<u64>,
    /// Writes that still succeed; then all fail, as after a power cut.
    pub(crate) writes_left: Option<u64>,
    pub(crate) writes: u64,
    /// The read, counted down, that fails once.
    pub(crate) failing_read: Option<u64>,
    /// Bytes that cannot be read.
    pub(crate) bad: std::ops::Range<u64>,
}

impl FileStorage {
    pub(crate) fn open(path: &Path, writable: bool) -> FileStorage {
        let file = OpenOptions::new().read(true).write(writable).open(path).unwrap();
        FileStorage {
            file,
            read_only: !writable,
            device: None,
            writes_left: None,
            writes: 0,
            failing_read: None,
            bad: 0..0,
        }
    }

    /// Behaves like a device of the file's present size.
    pub(crate) fn device(path: &Path) -> FileStorage {
        let mut s = FileStorage::open(path, true);
        s.device = Some(s.file.metadata().unwrap().len());
        s
    }

    fn count_write(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.writes += 1;
        if let Some(left) = &mut self.writes_left {
            if *left == 0 {
                return Err(error("write", offset, len, Status::Medium));
            }
            *left -= 1;
        }
        if self.read_only || offset.checked_add(len).is_none_or(|end| end > self.capacity()) {
            return Err(error("write", offset, len, Status::Invalid));
        }
        Ok(())
    }
}

fn error(what: &'static str, offset: u64, len: u64, status: Status) -> StorageError {
    StorageError { what, offset, len, status, detail: 0 }
}

impl Storage for FileStorage {
    fn len(&self) -> u64 {
        self.device.unwrap_or_else(|| self.file.metadata().unwrap().len())
    }

    fn capacity(&self) -> u64 {
        self.device.unwrap_or(1 << 62)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let len = into.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.capacity()) {
            return Err(error("read", offset, len, Status::Invalid));
        }
        let bad = offset < self.bad.end && offset + len > self.bad.start;
        if bad || self.failing_read == Some(0) {
            self.failing_read = None;
            return Err(error("read", offset, len, Status::Medium));
        }
        self.failing_read = self.failing_read.map(|n| n - 1);
        let mut done = 0;
        while done < into.len() {
            match self.file.read_at(&mut into[done..], offset + done as u64) {
                Ok(0) => {
                    into[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(e) => panic!("{e}"),
            }
        }
        Ok(())
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.count_write(offset, from.len() as u64)?;
        self.file.write_all_at(from, offset).unwrap();
        Ok(())
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.count_write(offset, len)?;
        self.file.write_all_at(&vec![0; len as usize], offset).unwrap();
        Ok(())
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        if self.device.is_none() {
            self.file.set_len(len).unwrap();
        }
        Ok(())
    }
}

/// Opens a chain of files with the rules of the product.
pub(crate) fn open_chain(path: &Path, options: ChainOptions) -> Result<Chain<FileStorage>> {
    open_chain_allowing(path, options, &[])
}

pub(crate) fn open_chain_allowing(
    path: &Path,
    options: ChainOptions,
    allow: &[PathBuf],
) -> Result<Chain<FileStorage>> {
    let metadata = fs::metadata(path).unwrap();
    let top = Opened {
        storage: FileStorage::open(path, options.writable),
        path: Some(path.to_owned()),
        name: path.display().to_string(),
        id: Some(qcow::open::FileId::of(&metadata)),
    };
    let mut open = |backing: &BackingRef| {
        let host = allowed_host_file(backing, allow)?;
        Ok(Opened {
            storage: FileStorage::open(&host.path, false),
            path: Some(backing.path.clone()),
            name: backing.path.display().to_string(),
            id: Some(host.id),
        })
    };
    Chain::open(top, options, &mut open)
}

pub(crate) fn reader(path: &Path) -> ChainReader<FileStorage> {
    ChainReader::new(open_chain(path, ChainOptions::default()).unwrap())
}

/// Runs a program that must succeed.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let out = output(program, args);
    assert!(
        out.status.success(),
        "{program} {args:?}: {}\n{}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

pub(crate) fn output(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"))
}

pub(crate) fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args)
}

/// `qemu-img create -f qcow2`, options as `-o`.
pub(crate) fn qemu_create(path: &Path, options: &str, size: &str) {
    let path = path.to_str().unwrap();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([path, size]);
    qemu_img(&args);
}

/// qemu-io commands on a QCOW2 image.
pub(crate) fn qemu_io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(path.to_str().unwrap());
    let text = run("qemu-io", &args);
    assert!(!text.contains("failed"), "{commands:?}: {text}");
}

/// `qemu-img check`: exit code and JSON.
pub(crate) fn qemu_check(path: &Path, extra: &[&str]) -> (i32, serde_json::Value) {
    let mut args = vec!["check", "-f", "qcow2", "--output=json"];
    args.extend(extra);
    args.push(path.to_str().unwrap());
    let out = output("qemu-img", &args);
    let json = serde_json::from_slice(&out.stdout).unwrap_or(serde_json::Value::Null);
    (out.status.code().unwrap(), json)
}

#[track_caller]
pub(crate) fn assert_clean(path: &Path) {
    let (code, json) = qemu_check(path, &[]);
    assert_eq!(code, 0, "{}: {json}", path.display());
}

/// The image's contents, as qemu-img sees them.
pub(crate) fn qemu_contents(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("converted");
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        path.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(&raw).unwrap();
    bytes
}

/// The image's contents, as our reader sees them.
pub(crate) fn our_contents(path: &Path) -> Vec<u8> {
    let mut r = reader(path);
    let mut bytes = vec![0xaa; r.size() as usize];
    // Odd pieces, so that reads start and end inside clusters.
    let mut at = 0;
    for piece in bytes.chunks_mut(123_457) {
        r.read_at(at, piece).unwrap();
        at += piece.len() as u64;
    }
    bytes
}

/// Overwrites bytes of a file.
pub(crate) fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

pub(crate) fn peek_u64(path: &Path, offset: u64) -> u64 {
    let mut b = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut b, offset).unwrap();
    u64::from_be_bytes(b)
}

pub(crate) fn poke_u64(path: &Path, offset: u64, value: u64) {
    patch(path, offset, &value.to_be_bytes());
}

/// A small generator of numbers; the same for the same seed.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}
