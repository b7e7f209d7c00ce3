//! Client and server against each other, and each against a peer that does not play by the rules.

#![expect(clippy::disallowed_methods, reason = "tests of what takes how long")]

mod clients;
mod raw;
mod servers;
mod together;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use dma::{PageSize, Region};
use vfio_user::wire::{Area, pci};
use vfio_user::{Bus, Device, Server, Shape};

/// How long a peer may take that takes too long.
const SHORT: Duration = Duration::from_millis(300);

/// How long any other may take: the machine may be busy.
const LONG: Duration = Duration::from_secs(20);

/// A device with a few registers in BAR0:
/// - 0: a word that can be written and read;
/// - 8: a bus address; 16: a length;
/// - 24: writing 1 reads that memory, adds 1 to each byte and writes it back; 2 publishes the word
///   at 0 there; the outcome can be read here: 0 not done, 1 done, 2 fault;
/// - 32: writing raises that vector;
/// - 4096: a page that is shared; the word at its begin is copied to 40 when it changes.
pub(crate) struct Toy {
    bus: Bus,
    shared: Arc<Region>,
    words: [u64; 6],
    todo: u64,
    resets: Arc<AtomicU32>,
}

pub(crate) const BAR: u64 = 8192;
pub(crate) const VECTORS: u32 = 70;

impl Device for Toy {
    fn shape(&self, index: u32) -> Shape {
        match index {
            pci::BAR0 => {
                let areas = vec![Area { offset: 4096, size: 4096 }];
                Shape { size: BAR, write: true, shared: Some((self.shared.clone(), areas)) }
            }
            pci::CONFIG => Shape { size: 256, write: false, shared: None },
            _ => Shape::default(),
        }
    }

    fn vectors(&self) -> u32 {
        VECTORS
    }

    fn read(&mut self, region: u32, offset: u64, into: &mut [u8]) {
        let mut bytes = vec![0; into.len() + offset as usize];
        if region == pci::BAR0 {
            for (to, word) in bytes.chunks_mut(8).zip(self.words) {
                to.copy_from_slice(&word.to_le_bytes()[..to.len()]);
            }
        }
        into.copy_from_slice(&bytes[offset as usize..]);
    }

    fn write(&mut self, _region: u32, offset: u64, from: &[u8]) {
        let mut word = [0; 8];
        let n = from.len().min(8);
        word[..n].copy_from_slice(&from[..n]);
        let word = u64::from_le_bytes(word);
        match offset {
            24 => (self.todo, self.words[3]) = (word, 0),
            32 => self.bus.raise(word as u16),
            _ if offset < 24 => self.words[(offset / 8) as usize] = word,
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.resets.fetch_add(1, Ordering::Release);
        self.words = [0; 6];
        self.todo = 0;
        self.shared.zero(4096, 4096);
    }

    fn step(&mut self, _now: u64) -> bool {
        let bell = u64::from(self.shared.load32(4096, Ordering::Acquire));
        let rung = std::mem::replace(&mut self.words[5], bell) != bell;
        let todo = std::mem::take(&mut self.todo);
        let [word, addr, len, ..] = self.words;
        let done = match todo {
            0 => return rung,
            1 => {
                let mut bytes = vec![0; len as usize];
                self.bus.read(addr, &mut bytes).and_then(|()| {
                    bytes.iter_mut().for_each(|b| *b = b.wrapping_add(1));
                    self.bus.write(addr, &bytes)
                })
            }
            _ => self.bus.publish(addr, [word, !word]),
        };
        self.words[3] = if done.is_ok() { 1 } else { 2 };
        true
    }
}

/// A served toy.
pub(crate) struct Served {
    pub(crate) path: PathBuf,
    pub(crate) resets: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Served {
    pub(crate) fn start() -> Served {
        Served::patient(LONG)
    }

    /// One that clients must not keep waiting for longer.
    pub(crate) fn patient(patience: Duration) -> Served {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (stop, resets) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (stopping, counter) = (stop.clone(), resets.clone());
        let thread = std::thread::spawn(move || {
            let shared = Region::new(BAR as usize, PageSize::Small).unwrap();
            let server = Server::new(listener, patience, |bus| {
                let (words, todo, resets) = ([0; 6], 0, counter);
                Ok::<_, ()>(Toy { bus, shared, words, todo, resets })
            });
            server.unwrap().unwrap().run(&stopping).unwrap();
        });
        Served { path, resets, stop, thread: Some(thread), _dir: dir }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until it was reset so often.
    pub(crate) fn wait_resets(&self, n: u32) {
        until(|| self.resets.load(Ordering::Acquire) >= n);
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

/// Waits until something is so; not for ever.
pub(crate) fn until(mut so: impl FnMut() -> bool) {
    for _ in 0..5000 {
        if so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("it never came");
}
