//! A reactor turned by hand over images on devices in memory ([`LogQueue`]): the ground on which the
//! datapath's tests stand.

#![allow(dead_code, unused_imports, reason = "each test file uses its part")]

mod device;
mod hammer;
pub(crate) mod several;

use std::collections::HashMap;

use block::{Blocking, Flags, Op, Port, Status};
use dma::{Buf, Pool};
use qcow::ChainReader;
use qcow::build::Builder;
use qcow::create::{CreateOptions, create, create_with_data};
use qcow::edit::SnapshotKey;
use qcow::open::{Chain, ChainOptions, Format, Opened, Role};
use qcow::run::{Image, Options, Stack};
use reactor::{Clock, Core, Portal, PortalFrontend, PortalRequest};

pub(crate) use device::{Event, Fault, LogQueue, SECTOR, What, cut, each_alone};
pub(crate) use hammer::{hammer, read_all, same};

/// A small random generator (xorshift).
#[derive(Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

pub(crate) type RigCore = Core<LogQueue, Image, PortalFrontend>;

/// An image on a reactor, with a portal to send requests through.
pub(crate) struct Rig {
    pub(crate) core: RigCore,
    pub(crate) portal: Portal,
    pub(crate) pool: Pool,
    bufs: HashMap<u64, Buf>,
    next_id: u64,
}

/// A fresh image on a device.
pub(crate) fn fresh(device: u64, seed: u64, options: &CreateOptions) -> LogQueue {
    make(LogQueue::new(device, seed), options)
}

/// A fresh image on this device.
pub(crate) fn make(leaf: LogQueue, options: &CreateOptions) -> LogQueue {
    let mut storage = Blocking::new(leaf, 0).unwrap();
    create(&mut storage, "test", options).unwrap();
    storage.into_leaf()
}

/// A fresh image with an external data file, which is unit 1 of the device.
pub(crate) fn fresh_with_data(device: u64, seed: u64, options: &CreateOptions) -> LogQueue {
    let mut storage = Blocking::new(LogQueue::new(device, seed), 0).unwrap();
    let mut options = options.clone();
    options.data_file = Some("/data".to_owned());
    let mut data = Blocking::new(LogQueue::new(options.size, seed), 0).unwrap();
    create_with_data(&mut storage, &mut data, "test", &options).unwrap();
    let mut leaf = storage.into_leaf().and(options.size);
    if options.data_file_raw {
        leaf.poke(device, &data.into_leaf().data());
    }
    leaf
}

/// An image that `fill` writes front to back, on a device.
pub(crate) fn built(
    device: u64,
    seed: u64,
    options: &CreateOptions,
    fill: impl FnOnce(&mut Builder<'_>),
) -> LogQueue {
    let mut storage = Blocking::new(LogQueue::new(device, seed), 0).unwrap();
    let mut builder = Builder::new(&mut storage, "test", options).unwrap();
    fill(&mut builder);
    builder.finish().unwrap();
    storage.into_leaf()
}

/// Opens a chain of devices, the first one writable; each next one is the backing file.
pub(crate) fn open_stack(
    leaves: Vec<LogQueue>,
    formats: &[Format],
    writable: bool,
) -> Result<(Stack, Vec<LogQueue>), qcow::Error> {
    let opened = |i: usize, leaf| Opened {
        storage: Blocking::new(leaf, 0).unwrap(),
        path: (i > 0).then(|| format!("/layer{i}").into()),
        name: format!("layer {i}"),
        id: None,
    };
    let count = leaves.len();
    let second = leaves[0].second.as_ref().map(|s| s.1.size);
    let mut rest = leaves.into_iter().enumerate();
    let (i, first) = rest.next().unwrap();
    let options = ChainOptions { writable, format: Some(formats[0]), ..Default::default() };
    let mut chain = Chain::open(opened(i, first), options, &mut |named| {
        if named.role == Role::Data {
            // Opening only looks at its size: the real one is unit 1 of the first device.
            let size = second.expect("a second unit");
            return Ok(Opened { name: "data".to_owned(), ..opened(0, LogQueue::new(size, 1)) });
        }
        let (i, leaf) = rest.next().expect("a layer for each backing name");
        Ok(opened(i, leaf))
    })?;
    let mut ports: Vec<Port> = (0..count as u16).map(|leaf| Port { leaf, unit: 0 }).collect();
    if second.is_some() {
        ports.insert(1, Port { leaf: 0, unit: 1 });
    }
    let stack = Stack::new(&mut chain, &ports)?;
    Ok((stack, chain.layers.into_iter().map(|l| l.storage.into_leaf()).collect()))
}

impl Rig {
    pub(crate) fn open(leaves: Vec<LogQueue>, formats: &[Format], options: Options) -> Rig {
        let (stack, leaves) = open_stack(leaves, formats, true).unwrap();
        Rig::attach(stack, leaves, options)
    }

    pub(crate) fn single(leaf: LogQueue) -> Rig {
        Rig::open(vec![leaf], &[Format::Qcow2], Options::default())
    }

    pub(crate) fn attach(stack: Stack, leaves: Vec<LogQueue>, options: Options) -> Rig {
        let mut core = RigCore::new(Clock::virtual_clock().0).unwrap();
        for leaf in leaves {
            core.add_leaf(leaf).unwrap();
        }
        core.add_image(|owner, l| Image::attach(stack, owner, l, options)).unwrap();
        let pool = Pool::new(64, 256 << 10).unwrap();
        let (portal, end) = Portal::new(64, vec![pool.region().clone()], core.wake()).unwrap();
        core.add_frontend(0, |owner, _| Ok(end(owner))).unwrap();
        Rig { core, portal, pool, bufs: HashMap::new(), next_id: 0 }
    }

    pub(crate) fn leaf(&mut self, index: usize) -> &mut LogQueue {
        &mut self.core.leaves()[index]
    }

    pub(crate) fn image(&mut self) -> &mut Image {
        self.core.image(0).unwrap()
    }

    /// Sends a request; data of a write is given. Returns its id.
    pub(crate) fn send(&mut self, op: Op, flags: Flags, offset: u64, len: u64, data: &[u8]) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let seg = matches!(op, Op::Read | Op::Write).then(|| {
            let buf = self.pool.take().expect("a buffer");
            let seg = buf.head(len as u32).unwrap();
            if op == Op::Write {
                self.pool.region().write_seg(&seg, data);
            } else {
                self.pool.region().write_seg(&seg, &vec![0xEE; len as usize]);
            }
            self.bufs.insert(id, buf);
            seg
        });
        self.portal.send(PortalRequest { id, op, flags, offset, len, seg }).unwrap();
        id
    }

    /// One turn; what was answered, with the data of reads.
    pub(crate) fn turn(&mut self) -> Vec<(u64, Status, Option<Vec<u8>>)> {
        self.core.turn();
        let mut done = Vec::new();
        while let Some(r) = self.portal.receive() {
            let data = self.bufs.remove(&r.id).map(|buf| {
                let mut data = vec![0; buf.seg().len() as usize];
                self.pool.region().read_seg(&buf.seg(), &mut data);
                self.pool.give(buf);
                data
            });
            done.push((r.id, r.status, data));
        }
        done
    }

    /// Turns until everything sent was answered; the answers.
    pub(crate) fn settle(&mut self) -> Vec<(u64, Status, Option<Vec<u8>>)> {
        let mut all = Vec::new();
        for _ in 0..2_000_000 {
            if self.portal.in_flight() == 0 {
                return all;
            }
            all.extend(self.turn());
        }
        panic!("{} requests were never answered", self.portal.in_flight());
    }

    /// Sends one request and turns until it is answered.
    pub(crate) fn call(&mut self, op: Op, offset: u64, len: u64, data: &[u8]) -> (Status, Vec<u8>) {
        self.call_flags(op, Flags::NONE, offset, len, data)
    }

    pub(crate) fn call_flags(
        &mut self,
        op: Op,
        flags: Flags,
        offset: u64,
        len: u64,
        data: &[u8],
    ) -> (Status, Vec<u8>) {
        let id = self.send(op, flags, offset, len, data);
        for _ in 0..2_000_000 {
            if let Some((done, status, data)) = self.turn().pop() {
                assert_eq!(done, id);
                let mut data = data.unwrap_or_default();
                data.truncate(len as usize);
                return (status, data);
            }
        }
        panic!("a {op:?} of {len} bytes at {offset:#x} was never answered");
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let s = self.call(Op::Write, offset, data.len() as u64, data).0;
        assert_eq!(s, Status::Ok, "write at {offset:#x}");
    }

    pub(crate) fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let (s, data) = self.call(Op::Read, offset, len, &[]);
        assert_eq!(s, Status::Ok, "read at {offset:#x}");
        data
    }

    pub(crate) fn flush(&mut self) {
        assert_eq!(self.call(Op::Flush, 0, 0, &[]).0, Status::Ok);
    }

    /// Closes the image cleanly and returns the devices.
    pub(crate) fn close(self) -> Vec<LogQueue> {
        let (status, leaves) = self.end();
        assert_eq!(status, Status::Ok);
        leaves
    }

    /// Closes the image, however that ends, and returns the devices.
    pub(crate) fn end(self) -> (Status, Vec<LogQueue>) {
        let (status, _, leaves) = self.end_at();
        (status, leaves)
    }

    /// The same, and where the file may be cut.
    pub(crate) fn end_at(mut self) -> (Status, u64, Vec<LogQueue>) {
        block::Layer::<LogQueue>::close(self.image());
        for _ in 0..2_000_000 {
            self.core.turn();
            if let Some((image, status)) = self.core.remove_closed_image(0) {
                return (status, image.end(), self.core.take_leaves());
            }
        }
        panic!("the close never ended");
    }

    /// Forgets the image as a crash does and returns the devices.
    pub(crate) fn crash(mut self) -> Vec<LogQueue> {
        self.core.take_leaves()
    }
}

/// Our checker's verdict on a device: (corruptions + errors, leaks).
pub(crate) fn check(leaf: LogQueue) -> (LogQueue, u64, u64) {
    let mut storage = Blocking::new(leaf, 0).unwrap();
    let mut text = String::new();
    let report = qcow::check::run(&mut storage, "test", qcow::check::Repair::None, &mut |l| {
        text += &format!("{l}\n");
    })
    .unwrap();
    let bad = report.corruptions + report.check_errors;
    if bad > 0 {
        eprintln!("{text}");
    }
    (storage.into_leaf(), bad, report.leaks)
}

/// Repairs all, as a user does after a crash, and returns what is left: (corruptions + errors, leaks).
pub(crate) fn repair(leaf: LogQueue) -> (LogQueue, u64, u64) {
    let mut storage = Blocking::new(leaf, 0).unwrap();
    let report =
        qcow::check::run(&mut storage, "test", qcow::check::Repair::All, &mut |_| {}).unwrap();
    (storage.into_leaf(), report.corruptions + report.check_errors, report.leaks)
}

/// An image's files for qemu-img, with its name for them: the image, its external data file.
fn qemu_files(image: &[u8], data: &[u8]) -> ([tempfile::NamedTempFile; 2], String) {
    let files = [image, data].map(|bytes| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    });
    let part = |name: &str, file: &tempfile::NamedTempFile| {
        let path = file.path().display();
        format!(r#""{name}":{{"driver":"file","filename":"{path}"}}"#)
    };
    let mut parts = part("file", &files[0]);
    if !data.is_empty() {
        parts += &format!(",{}", part("data-file", &files[1]));
    }
    // Backing files are devices in memory, which qemu-img cannot open.
    (files, format!(r#"json:{{"driver":"qcow2","backing":null,{parts}}}"#))
}

/// qemu-img's verdict on a device's contents: its exit code, or `None` if there is no qemu-img.
pub(crate) fn qemu_check(image: &[u8]) -> Option<i32> {
    qemu_check_with(image, &[])
}

/// The same with an external data file.
pub(crate) fn qemu_check_with(image: &[u8], data: &[u8]) -> Option<i32> {
    let (_files, name) = qemu_files(image, data);
    let out = std::process::Command::new("qemu-img").args(["check", "-q", &name]).output().ok()?;
    if !matches!(out.status.code(), Some(0)) {
        eprintln!("{}", String::from_utf8_lossy(&out.stderr));
        eprintln!("{}", String::from_utf8_lossy(&out.stdout));
    }
    out.status.code()
}

/// What our reader finds in an image over this raw layer; in one of its snapshots if that is named.
pub(crate) fn read_offline(image: &[u8], below: Option<&[u8]>, snapshot: Option<&str>) -> Vec<u8> {
    let opened = |bytes: &[u8], name: &str| {
        let mut leaf = LogQueue::new(bytes.len() as u64, 1);
        leaf.load(bytes);
        let storage = Blocking::new(leaf, 0).unwrap();
        Opened { storage, path: Some(format!("/{name}").into()), name: name.to_owned(), id: None }
    };
    let options = ChainOptions { format: Some(Format::Qcow2), ..Default::default() };
    let mut below = |_: &qcow::open::BackingRef| Ok(opened(below.expect("a layer below"), "below"));
    let mut chain = Chain::open(opened(image, "image"), options, &mut below).unwrap();
    if let Some(name) = snapshot {
        chain.show_snapshot(SnapshotKey::Name(name)).unwrap();
    }
    let mut reader = ChainReader::new(chain);
    let mut all = vec![0; reader.size() as usize];
    reader.read_at(0, &mut all).unwrap();
    all
}

/// Takes a snapshot of an image that nobody uses, if that is possible.
pub(crate) fn try_snapshot(leaf: LogQueue, name: &str) -> (LogQueue, qcow::Result<String>) {
    let mut storage = Blocking::new(leaf, 0).unwrap();
    let time = std::time::Duration::ZERO;
    let taken = qcow::edit::create_snapshot(&mut storage, "test", name, time);
    (storage.into_leaf(), taken)
}

/// Takes a snapshot of an image that nobody uses.
pub(crate) fn snapshot(leaf: LogQueue, name: &str) -> LogQueue {
    let (leaf, taken) = try_snapshot(leaf, name);
    taken.unwrap();
    leaf
}

/// What qemu-img reads out of a snapshot, or `None` if there is no qemu-img.
pub(crate) fn qemu_read_snapshot(image: &[u8], snapshot: &str) -> Option<Vec<u8>> {
    let (_files, name) = qemu_files(image, &[]);
    let raw = tempfile::NamedTempFile::new().unwrap();
    let out = std::process::Command::new("qemu-img")
        .args(["convert", "-O", "raw", "-l", &format!("snapshot.name={snapshot}"), &name])
        .arg(raw.path())
        .output()
        .ok()?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(std::fs::read(raw.path()).unwrap())
}

/// What qemu-img reads out of a device's contents, or `None` if there is no qemu-img.
pub(crate) fn qemu_read(image: &[u8]) -> Option<Vec<u8>> {
    qemu_read_with(image, &[])
}

/// The same with an external data file.
pub(crate) fn qemu_read_with(image: &[u8], data: &[u8]) -> Option<Vec<u8>> {
    let (_files, name) = qemu_files(image, data);
    let raw = tempfile::NamedTempFile::new().unwrap();
    let out = std::process::Command::new("qemu-img")
        .args(["convert", "-O", "raw", &name])
        .arg(raw.path())
        .output()
        .ok()?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(std::fs::read(raw.path()).unwrap())
}
