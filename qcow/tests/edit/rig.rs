//! Disks in memory that log what is done to them, and power cuts on them.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use block::{Status, Storage, StorageError};
use qcow::build::Builder;
use qcow::check::{Repair, Report};
use qcow::create::CreateOptions;
use qcow::open::{Chain, ChainOptions, FileId, Format, Opened};
use qcow::{ChainReader, Compressor};

const SECTOR: usize = 512;

#[derive(Clone)]
enum Event {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Flush,
}

/// All disks of a test.
#[derive(Default)]
struct World {
    disks: Vec<Vec<u8>>,
    log: Option<Vec<(usize, Event)>>,
    /// Changes and flushes that still work; then all fail.
    good: Option<usize>,
    /// What was done so far.
    accesses: Accesses,
}

/// What was done to disks.
#[derive(Clone, Copy, Default)]
pub(crate) struct Accesses {
    pub(crate) reads: usize,
    pub(crate) writes: usize,
    /// Bytes of which they were told that they will be read.
    pub(crate) told: u64,
}

impl World {
    fn fails(&mut self) -> bool {
        match &mut self.good {
            Some(0) => true,
            Some(n) => {
                *n -= 1;
                false
            }
            None => false,
        }
    }
}

/// One of them.
#[derive(Clone)]
pub(crate) struct Disk {
    world: Rc<RefCell<World>>,
    id: usize,
    pub(crate) room: u64,
}

impl Disk {
    pub(crate) fn new(bytes: Vec<u8>) -> Disk {
        let world = World { disks: vec![bytes], ..World::default() };
        Disk { world: Rc::new(RefCell::new(world)), id: 0, room: 1 << 40 }
    }

    /// Several disks that lose their power together.
    pub(crate) fn several(all: &[Vec<u8>]) -> Vec<Disk> {
        let world = Rc::new(RefCell::new(World { disks: all.to_vec(), ..World::default() }));
        (0..all.len()).map(|id| Disk { world: world.clone(), id, room: 1 << 40 }).collect()
    }

    /// From the change or flush after so many on all fail.
    pub(crate) fn fail_after(&self, good: Option<usize>) {
        self.world.borrow_mut().good = good;
    }

    fn failed(&self, what: &'static str, offset: u64, len: u64) -> Result<(), StorageError> {
        match self.world.borrow_mut().fails() {
            true => Err(StorageError { what, offset, len, status: Status::Medium, detail: 0 }),
            false => Ok(()),
        }
    }

    /// What `what` does to these disks.
    pub(crate) fn accesses(&self, what: impl FnOnce()) -> Accesses {
        self.world.borrow_mut().accesses = Accesses::default();
        what();
        self.world.borrow().accesses
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.world.borrow().disks[self.id].clone()
    }

    /// Runs something, and then calls `then` with the disks as they may be after a power cut at any
    /// point: of what no flush of its disk vouched for, any part may have arrived, sector by
    /// sector.
    pub(crate) fn cuts<T>(
        &self,
        seed: u64,
        tries: usize,
        what: impl FnOnce() -> T,
        mut then: impl FnMut(&str, &[Vec<u8>]),
    ) -> T {
        let before = self.world.borrow().disks.clone();
        self.world.borrow_mut().log = Some(Vec::new());
        let done = what();
        let log = self.world.borrow_mut().log.take().unwrap();
        let mut rng = Rng(seed);
        let mut durable = before;
        let mut late: Vec<(usize, Event)> = Vec::new();
        for at in 0..=log.len() {
            for t in 0..tries {
                let mut disks = durable.clone();
                for (id, event) in &late {
                    // Nearly all or nearly nothing finds other faults than half of it.
                    let odds = [50, 0, 100, 95, 5][(t + at) % 5];
                    land(&mut disks[*id], event, || rng.below(100) < odds);
                }
                then(&format!("cut at {at} of {}, try {t}", log.len()), &disks);
            }
            match log.get(at) {
                Some((id, Event::Flush)) => {
                    let mut left = Vec::new();
                    for (other, event) in late.drain(..) {
                        if other == *id {
                            land(&mut durable[other], &event, || true);
                        } else {
                            left.push((other, event));
                        }
                    }
                    late = left;
                }
                Some(event) => late.push(event.clone()),
                None => {}
            }
        }
        done
    }
}

fn land(disk: &mut Vec<u8>, event: &Event, mut lands: impl FnMut() -> bool) {
    match event {
        Event::Write(offset, data) => {
            let mut at = *offset as usize;
            let mut data = &data[..];
            while !data.is_empty() {
                let n = (SECTOR - at % SECTOR).min(data.len());
                if lands() {
                    if disk.len() < at + n {
                        disk.resize(at + n, 0);
                    }
                    disk[at..at + n].copy_from_slice(&data[..n]);
                }
                at += n;
                data = &data[n..];
            }
        }
        Event::SetLen(len) if lands() => disk.resize(*len as usize, 0),
        Event::SetLen(_) | Event::Flush => {}
    }
}

impl Storage for Disk {
    fn len(&self) -> u64 {
        self.world.borrow().disks[self.id].len() as u64
    }

    fn capacity(&self) -> u64 {
        self.room
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        let world = &mut *self.world.borrow_mut();
        world.accesses.reads += 1;
        let have = world.disks[self.id].get(offset as usize..).unwrap_or_default();
        let n = have.len().min(into.len());
        into[..n].copy_from_slice(&have[..n]);
        into[n..].fill(0);
        Ok(())
    }

    fn will_read(&mut self, _: u64, len: u64) {
        self.world.borrow_mut().accesses.told += len;
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        let len = from.len() as u64;
        if offset + len > self.room {
            let status = Status::NoSpace;
            return Err(StorageError { what: "write", offset, len, status, detail: 0 });
        }
        self.failed("write", offset, len)?;
        let world = &mut *self.world.borrow_mut();
        world.accesses.writes += 1;
        let event = Event::Write(offset, from.to_vec());
        land(&mut world.disks[self.id], &event, || true);
        world.log.iter_mut().for_each(|l| l.push((self.id, event.clone())));
        Ok(())
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.write_at(offset, &vec![0; len as usize])
    }

    fn discard_at(&mut self, offset: u64, len: u64) {
        // Whatever a device makes of it.
        let end = (offset + len).min(self.len());
        if offset < end {
            let world = &mut *self.world.borrow_mut();
            let event = Event::Write(offset, vec![0xd5; (end - offset) as usize]);
            land(&mut world.disks[self.id], &event, || true);
            world.log.iter_mut().for_each(|l| l.push((self.id, event.clone())));
        }
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        self.failed("flush", 0, 0)?;
        let world = &mut *self.world.borrow_mut();
        world.log.iter_mut().for_each(|l| l.push((self.id, Event::Flush)));
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        // Cutting works always, as it does on a full disk.
        let world = &mut *self.world.borrow_mut();
        world.disks[self.id].resize(len as usize, 0);
        world.log.iter_mut().for_each(|l| l.push((self.id, Event::SetLen(len))));
        Ok(())
    }
}

pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

/// A kind of image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) cluster: u64,
    pub(crate) bits: u32,
    pub(crate) version: u32,
}

/// The kinds that are tried.
pub(crate) const KINDS: [Kind; 10] = [
    Kind { cluster: 512, bits: 16, version: 2 },
    Kind { cluster: 512, bits: 1, version: 3 },
    Kind { cluster: 512, bits: 16, version: 3 },
    Kind { cluster: 512, bits: 64, version: 3 },
    Kind { cluster: 4096, bits: 16, version: 2 },
    Kind { cluster: 4096, bits: 64, version: 3 },
    Kind { cluster: 65536, bits: 1, version: 3 },
    Kind { cluster: 65536, bits: 16, version: 3 },
    Kind { cluster: 65536, bits: 16, version: 2 },
    Kind { cluster: 2 << 20, bits: 64, version: 3 },
];

impl Kind {
    pub(crate) fn options(&self, size: u64) -> CreateOptions {
        let mut o = CreateOptions::new(size);
        (o.cluster_size, o.refcount_bits, o.version) = (self.cluster, self.bits, self.version);
        o
    }

    /// A disk with a few dozen clusters, some of them cut.
    pub(crate) fn size(&self) -> u64 {
        match self.cluster {
            512 => 512 * 150,
            4096 => 4096 * 60 + 512,
            65536 => 65536 * 11 + 1024,
            _ => self.cluster * 3 + 512,
        }
    }
}

/// An image of random pieces: data, zeroes, compressed data, nothing.
pub(crate) fn image(options: &CreateOptions, seed: u64) -> Vec<u8> {
    let disk = Disk::new(Vec::new());
    let mut storage = disk.clone();
    let mut rng = Rng(seed);
    let mut builder = Builder::new(&mut storage, "made", options).unwrap();
    let mut compressor = Compressor::new(options.compression);
    let cluster = options.cluster_size;
    let mut at = 0;
    while at < options.size {
        let len = (cluster * (1 + rng.below(4))).min(options.size - at);
        // Compressed clusters share a host cluster, which narrow counts do not bear.
        let kinds = if options.refcount_bits == 2 { [0, 1, 3, 3, 3] } else { [0, 1, 2, 3, 3] };
        match kinds[rng.below(5) as usize] {
            0 => builder.zeroes(at, len).unwrap(),
            1 => {}
            2 => {
                for c in (at..at + len).step_by(cluster as usize) {
                    let mut plain = vec![rng.below(255) as u8 + 1; cluster as usize];
                    let noise = rng.below(cluster / 2) as usize;
                    plain.iter_mut().take(noise).for_each(|b| *b = rng.below(256) as u8);
                    let mut packed = Vec::new();
                    if compressor.encode(&plain, &mut packed) {
                        builder.compressed(c, &packed).unwrap();
                    }
                }
            }
            _ => {
                let bytes: Vec<u8> = (0..len).map(|_| rng.below(256) as u8).collect();
                builder.data(at, &bytes).unwrap();
            }
        }
        at += len;
    }
    builder.finish().unwrap();
    disk.bytes()
}

/// Opens disks as a chain.
pub(crate) fn open(disks: &[Disk]) -> ChainReader<Disk> {
    open_from(disks, 0)
}

/// Opens the chain that begins with this one of several disks, of which the last one is raw.
pub(crate) fn open_from(disks: &[Disk], first: usize) -> ChainReader<Disk> {
    let opened = |i: usize| Opened {
        storage: disks[i].clone(),
        path: Some(format!("/{i}").into()),
        name: format!("layer {i}"),
        id: Some(FileId { dev: 1, ino: i as u64 }),
    };
    let raw = disks.len() > 1 && first + 1 == disks.len();
    let format = if raw { Format::Raw } else { Format::Qcow2 };
    let options = ChainOptions { format: Some(format), ..ChainOptions::default() };
    let chain = Chain::open(opened(first), options, &mut |backing| {
        Ok(opened(backing.path.to_str().unwrap().trim_start_matches('/').parse().unwrap()))
    });
    ChainReader::new(chain.unwrap())
}

/// All that a chain shows.
pub(crate) fn contents(reader: &mut ChainReader<Disk>) -> Vec<u8> {
    let mut bytes = vec![0; reader.size() as usize];
    reader.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Our checker finds nothing at all.
#[track_caller]
pub(crate) fn clean(bytes: &[u8], what: &str) {
    let mut said = Vec::new();
    let report = check(bytes, &mut said);
    let bad = (report.corruptions, report.leaks, report.check_errors);
    assert_eq!(bad, (0, 0, 0), "{what}: {:?}", &said[..said.len().min(10)]);
}

fn check(bytes: &[u8], said: &mut Vec<String>) -> Report {
    let mut disk = Disk::new(bytes.to_vec());
    qcow::check::run(&mut disk, "disk", Repair::None, &mut |l| said.push(l.to_owned())).unwrap()
}

/// A folder for the judge; `None` where it is not installed.
pub(crate) fn judge() -> Option<tempfile::TempDir> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "qemu-img is not installed");
        return None;
    }
    Some(tempfile::tempdir().unwrap())
}

/// Runs the judge: exit code and output.
pub(crate) fn qemu_img(dir: &Path, args: &str) -> (i32, String) {
    let out =
        Command::new("qemu-img").args(args.split_whitespace()).current_dir(dir).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    (out.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

/// The judge finds nothing, not even a leak.
#[track_caller]
pub(crate) fn judged_clean(dir: &Path, bytes: &[u8], what: &str) {
    std::fs::write(dir.join("judged"), bytes).unwrap();
    // Without the backing file, which does not stand where the name says.
    let node =
        r#"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"judged"}}"#;
    let (code, text) = qemu_img(dir, &format!("check {node}"));
    assert_eq!(code, 0, "{what}: {text}");
}

/// What the judge reads.
pub(crate) fn judged_contents(dir: &Path, bytes: &[u8], snapshot: Option<&str>) -> Vec<u8> {
    std::fs::write(dir.join("judged"), bytes).unwrap();
    let which = snapshot.map_or(String::new(), |s| format!("-l snapshot.name={s}"));
    let (code, text) = qemu_img(dir, &format!("convert -f qcow2 -O raw {which} judged raw"));
    assert_eq!(code, 0, "{text}");
    std::fs::read(dir.join("raw")).unwrap()
}
