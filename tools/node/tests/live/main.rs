//! Changing the chain of an image while clients write to it from several reactors: every byte they
//! wrote is there afterwards, each file is clean, and qemu-img reads the same.

mod internal;
mod rebase;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::{Flags, Op, Status};
use dma::{Pool, Region};
use node::{Disk, DiskOptions, Door, JobWatch, NodeSpec, OpenOptions, Parts, open_chain};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::{Clock, Policy, PortalRequest, Start};

const SIZE: u64 = 32 << 20;
const PIECE: u64 = 4096;
const CLIENTS: u64 = 3;

/// Each test has several busy threads: one at a time.
static ALONE: reactor::sync::Mutex<()> = reactor::sync::Mutex::new(());

/// Ends the clients, also when the work they run beside fails.
struct Stop<'l>(&'l Load);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

fn make(path: &Path, size: u64) {
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(path).unwrap();
    let mut storage = node::HostStorage::of(file, false).unwrap();
    create(&mut storage, "test", &CreateOptions::new(size)).unwrap();
}

fn serve(node: &str, reactors: usize) -> Disk {
    let options = OpenOptions::write(Format::Qcow2);
    let chain = open_chain(&NodeSpec::parse(node).unwrap(), &options).unwrap();
    let start = Start { cpu: None, policy: Policy::Adaptive };
    let options = DiskOptions { reactors: vec![start; reactors], image: Default::default() };
    Disk::start(Parts::new(chain).unwrap(), options, Clock::real()).unwrap()
}

/// As fast as it goes, to the end.
struct Freely;

impl JobWatch for Freely {
    fn at(&mut self, done: u64, of: u64) -> bool {
        assert!(done <= of);
        true
    }

    fn allow(&mut self) -> u64 {
        1 << 40
    }
}

/// Clients that write pieces of their own over and over, until they are told to stop.
struct Load {
    stop: AtomicBool,
    rounds: AtomicU64,
}

impl Load {
    /// Runs `work` while clients write. Returns what each piece holds.
    fn during(disk: &mut Disk, work: impl FnOnce(&mut Disk, &Load)) -> Vec<u8> {
        let load = Load { stop: AtomicBool::new(false), rounds: AtomicU64::new(0) };
        let door = disk.door();
        let mut held = vec![0; (SIZE / PIECE) as usize];
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|k| {
                    let (door, load) = (&door, &load);
                    scope.spawn(move || load.client(door, k))
                })
                .collect();
            let stop = Stop(&load);
            work(disk, &load);
            drop(stop);
            for (k, client) in (0..).zip(clients) {
                for (n, byte) in client.join().unwrap() {
                    assert_eq!(n % CLIENTS, k);
                    held[n as usize] = byte;
                }
            }
        });
        held
    }

    /// Lets clients write so many rounds.
    fn go_on(&self, rounds: u64) {
        let until = self.rounds.load(Ordering::Relaxed) + rounds * CLIENTS;
        while self.rounds.load(Ordering::Relaxed) < until {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    }

    fn client(&self, door: &Door, k: u64) -> Vec<(u64, u8)> {
        let pool = Pool::new(1, PIECE as u32).unwrap();
        let region: &Region = pool.region();
        let seg = region.seg(0, PIECE as u32).unwrap();
        let mut portal = door.open(1, vec![pool.region().clone()]).unwrap();
        let mut held = std::collections::HashMap::new();
        let mut random = k + 1;
        while !self.stop.load(Ordering::Relaxed) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let n = (random >> 33) % (SIZE / PIECE / CLIENTS) * CLIENTS + k;
            let (id, offset, flags) = (n, n * PIECE, Flags::NONE);
            let mut call = |op, seg| {
                let len = if op == Op::Flush { 0 } else { PIECE };
                let offset = if op == Op::Flush { 0 } else { offset };
                portal.call(PortalRequest { id, op, flags, offset, len, seg })
            };
            if let Some(&byte) = held.get(&n)
                && random >> 60 < 8
            {
                assert_eq!(call(Op::Read, Some(seg)), Status::Ok);
                let mut data = [0; PIECE as usize];
                region.read_seg(&seg, &mut data);
                assert!(data.iter().all(|&b| b == byte), "piece {n}: {} is not {byte}", data[0]);
            } else {
                let byte = (random >> 40) as u8;
                region.write_seg(&seg, &[byte; PIECE as usize]);
                assert_eq!(call(Op::Write, Some(seg)), Status::Ok);
                held.insert(n, byte);
            }
            if random >> 56 == 0 {
                assert_eq!(call(Op::Flush, None), Status::Ok);
            }
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
        held.into_iter().collect()
    }
}

/// Reads all of an image and compares.
fn compare(top: &Path, held: &[u8]) {
    let disk = serve(top.to_str().unwrap(), 1);
    let pool = Pool::new(1, 1 << 20).unwrap();
    let seg = pool.region().seg(0, 1 << 20).unwrap();
    let mut portal = disk.door().open(1, vec![pool.region().clone()]).unwrap();
    for (at, part) in (0..).step_by(1 << 20).zip(held.chunks(256)) {
        let (op, flags, len) = (Op::Read, Flags::NONE, 1 << 20);
        let r = PortalRequest { id: 0, op, flags, offset: at, len, seg: Some(seg) };
        assert_eq!(portal.call(r), Status::Ok);
        let mut data = vec![0; 1 << 20];
        pool.region().read_seg(&seg, &mut data);
        for (n, (is, &want)) in data.chunks(PIECE as usize).zip(part).enumerate() {
            assert!(is.iter().all(|&b| b == want), "piece {n} at {at:#x}: {} is not {want}", is[0]);
        }
    }
    drop(portal);
    disk.close().unwrap();
}

/// qemu-img finds the files clean, and reads the same.
fn qemu_agrees(files: &[&Path], held: &[u8]) {
    for file in files {
        let Ok(out) = Command::new("qemu-img").arg("check").arg(file).output() else {
            println!("skipped: qemu-img is not installed");
            return;
        };
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{}: {text}", file.display());
    }
    let raw = tempfile::NamedTempFile::new().unwrap();
    let convert = ["convert", "-f", "qcow2", "-O", "raw"];
    let out = Command::new("qemu-img").args(convert).arg(files[0]).arg(raw.path()).output();
    assert!(out.unwrap().status.success());
    let data = std::fs::read(raw.path()).unwrap();
    for (n, (is, &want)) in data.chunks(PIECE as usize).zip(held).enumerate() {
        assert!(is.iter().all(|&b| b == want), "piece {n} as qemu-img reads it");
    }
}

fn files(dir: &Path, names: [&str; 4]) -> [PathBuf; 4] {
    names.map(|n| dir.join(n))
}

#[test]
fn snapshots_a_commit_and_a_stream() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    for node in ["", "model:"] {
        let sub = dir.path().join(format!("x{}", node.len()));
        std::fs::create_dir(&sub).unwrap();
        let [base, a, b, c] = files(&sub, ["base", "a", "b", "c"]);
        make(&base, SIZE);
        let mut disk = serve(&format!("{node}{}", base.display()), 2);
        let held = Load::during(&mut disk, |disk, load| {
            for overlay in [&a, &b, &c] {
                load.go_on(60);
                if node.is_empty() || overlay == &a {
                    disk.snapshot(overlay).unwrap();
                }
            }
            load.go_on(20);
            if node.is_empty() {
                assert_eq!(disk.chain().count(), 4);
                // b goes down into a, which lies over the base.
                disk.commit(1, &mut Freely).unwrap();
                assert_eq!(disk.chain().count(), 3);
                load.go_on(20);
                disk.stream(Some(2), &mut Freely).unwrap();
                assert_eq!(disk.chain().count(), 2);
                load.go_on(20);
            }
            disk.stream(None, &mut Freely).unwrap();
            assert_eq!(disk.chain().count(), 1);
            load.go_on(20);
        });
        disk.close().unwrap();
        let top = if node.is_empty() { &c } else { &a };
        // What was cut off is not needed, nor held open.
        std::fs::remove_file(&base).unwrap();
        compare(top, &held);
        qemu_agrees(&[top], &held);
    }
}

#[test]
fn commits_below_other_layers() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let [base, a, b, c] = files(dir.path(), ["base", "a", "b", "c"]);
    make(&base, SIZE);
    let mut disk = serve(base.to_str().unwrap(), 2);
    let held = Load::during(&mut disk, |disk, load| {
        for overlay in [&a, &b, &c] {
            load.go_on(60);
            disk.snapshot(overlay).unwrap();
        }
        // a goes down into the base, under b.
        disk.commit(2, &mut Freely).unwrap();
        load.go_on(20);
        disk.commit(1, &mut Freely).unwrap();
        load.go_on(20);
    });
    assert_eq!(disk.chain().count(), 2);
    disk.close().unwrap();
    for gone in [&a, &b] {
        std::fs::remove_file(gone).unwrap();
    }
    compare(&c, &held);
    qemu_agrees(&[&c, &base], &held);
}

#[test]
fn another_size() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    make(&base, SIZE);
    let mut disk = serve(base.to_str().unwrap(), 2);
    let held = Load::during(&mut disk, |disk, load| {
        load.go_on(40);
        disk.resize(2 * SIZE).unwrap();
        assert_eq!(disk.info().size, 2 * SIZE);
        load.go_on(40);
        disk.resize(SIZE).unwrap();
        load.go_on(20);
        assert!(disk.resize(SIZE + 1).is_err());
        load.go_on(10);
    });
    disk.close().unwrap();
    compare(&base, &held);
    qemu_agrees(&[&base], &held);
}

/// Lower layers that were opened as backing files grow by a commit.
#[test]
fn a_commit_into_a_backing_file_that_grows() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let [base, a, b, _] = files(dir.path(), ["base", "a", "b", "c"]);
    make(&base, SIZE);
    for (overlay, byte) in [(&a, 1), (&b, 2)] {
        let node = if byte == 1 { &base } else { &a };
        let mut disk = serve(node.to_str().unwrap(), 1);
        let pieces = Pool::new(1, PIECE as u32).unwrap();
        let seg = pieces.region().seg(0, PIECE as u32);
        pieces.region().write(0, &[byte; PIECE as usize]);
        let mut portal = disk.door().open(1, vec![pieces.region().clone()]).unwrap();
        for n in (0..200).map(|n| n * 8 + u64::from(byte)) {
            let (op, flags, offset, len) = (Op::Write, Flags::NONE, n * PIECE, PIECE);
            let r = PortalRequest { id: 0, op, flags, offset, len, seg };
            assert_eq!(portal.call(r), Status::Ok);
        }
        drop(portal);
        disk.snapshot(overlay).unwrap();
        disk.close().unwrap();
    }
    for reactors in [1, 2] {
        let mut disk = serve(b.to_str().unwrap(), reactors);
        let load = |disk: &mut Disk, load: &Load| {
            load.go_on(20);
            if reactors == 1 {
                disk.commit(1, &mut Freely).unwrap();
                load.go_on(20);
            }
        };
        Load::during(&mut disk, load);
        disk.close().unwrap();
        for file in [&b, &base] {
            let out = Command::new("qemu-img").arg("check").arg(file).output();
            assert!(out.is_err() || out.unwrap().status.success(), "{}", file.display());
        }
    }
}

/// A layer that is committed down may be shorter than its neighbours: what it hid stays hidden.
#[test]
fn a_commit_keeps_the_zeroes_behind_a_short_layer() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let [base, a, b, _] = files(dir.path(), ["base", "a", "b", "c"]);
    make(&base, SIZE);
    let mut disk = serve(base.to_str().unwrap(), 2);
    let pieces = Pool::new(1, PIECE as u32).unwrap();
    let last = |disk: &Disk, op, byte: u8| {
        let seg = pieces.region().seg(0, PIECE as u32);
        pieces.region().write(0, &[byte; PIECE as usize]);
        let mut portal = disk.door().open(1, vec![pieces.region().clone()]).unwrap();
        let (flags, offset, len) = (Flags::NONE, SIZE - PIECE, PIECE);
        let r = PortalRequest { id: 0, op, flags, offset, len, seg };
        assert_eq!(portal.call(r), Status::Ok);
        let mut bytes = [0; PIECE as usize];
        pieces.region().read(0, &mut bytes);
        bytes
    };
    last(&disk, Op::Write, 9);
    disk.snapshot(&a).unwrap();
    disk.resize(SIZE / 2).unwrap();
    disk.snapshot(&b).unwrap();
    disk.resize(SIZE).unwrap();
    assert_eq!(last(&disk, Op::Read, 1), [0; PIECE as usize]);
    disk.commit(1, &mut Freely).unwrap();
    assert_eq!(last(&disk, Op::Read, 1), [0; PIECE as usize]);
    disk.close().unwrap();
}

/// Snapshots come and go: nothing is used up.
/// A raw file shorter than a sector stays as it is when nothing may go down into it.
#[test]
fn a_refused_commit_leaves_a_short_raw_file() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let [raw, a, b, _] = files(dir.path(), ["raw", "a", "b", "none"]);
    std::fs::write(&raw, [0xbb; 100]).unwrap();
    let mut options = CreateOptions::new(SIZE);
    options.backing = Some(("raw".to_owned(), Format::Raw));
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(&a);
    let mut storage = node::HostStorage::of(file.unwrap(), false).unwrap();
    create(&mut storage, "a", &options).unwrap();
    let mut disk = serve(a.to_str().unwrap(), 1);
    disk.take_internal_snapshot("kept", std::time::Duration::ZERO).unwrap();
    disk.snapshot(&b).unwrap();
    let e = disk.commit(1, &mut Freely).unwrap_err().to_string();
    assert!(e.contains("which would be lost"), "{e}");
    disk.close().unwrap();
    assert_eq!(std::fs::read(&raw).unwrap(), [0xbb; 100]);
}

#[test]
fn many_snapshots() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    make(&base, SIZE);
    let mut disk = serve(base.to_str().unwrap(), 2);
    let mut held_open = Vec::new();
    let held = Load::during(&mut disk, |disk, load| {
        for n in 0..8 {
            disk.snapshot(&dir.path().join(format!("s{n}"))).unwrap();
            load.go_on(3);
            if n > 0 {
                disk.commit(1, &mut Freely).unwrap();
            }
            // Others' tests run beside this one: files of this folder alone.
            let open = std::fs::read_dir("/proc/self/fd").unwrap();
            let open = open.filter_map(|f| std::fs::read_link(f.unwrap().path()).ok());
            held_open.push(open.filter(|f| f.starts_with(dir.path())).count());
        }
    });
    // The reactors close them soon, not at once.
    assert!(held_open[7] <= held_open[2] + 2, "files stay open: {held_open:?}");
    assert_eq!(disk.chain().count(), 2);
    disk.close().unwrap();
    let top = dir.path().join("s7");
    compare(&top, &held);
    qemu_agrees(&[&top, &base], &held);
}

/// Sizes change again and again: nothing is used up.
#[test]
fn many_sizes() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    make(&base, SIZE);
    let mut disk = serve(base.to_str().unwrap(), 1);
    for n in 1..40 {
        disk.resize(SIZE + n * 65536).unwrap();
    }
    let e = disk.resize(1 << 61).unwrap_err().to_string();
    assert!(!e.is_empty());
    let held = Load::during(&mut disk, |_, load| load.go_on(20));
    disk.resize(SIZE).unwrap();
    disk.close().unwrap();
    compare(&base, &held);
    qemu_agrees(&[&base], &held);
}

/// Stops after a while, and allows little at a time.
struct Stops(u32);

impl JobWatch for Stops {
    fn at(&mut self, _: u64, _: u64) -> bool {
        self.0 -= 1;
        self.0 > 0
    }

    fn allow(&mut self) -> u64 {
        64 << 10
    }
}

#[test]
fn jobs_that_are_stopped_change_nothing_and_go_again() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let [base, a, b, _] = files(dir.path(), ["base", "a", "b", "c"]);
    make(&base, SIZE);
    let mut disk = serve(base.to_str().unwrap(), 1);
    let held = Load::during(&mut disk, |disk, load| {
        load.go_on(250);
        disk.snapshot(&a).unwrap();
        load.go_on(250);
        disk.snapshot(&b).unwrap();
        let e = disk.stream(None, &mut Stops(5)).unwrap_err().to_string();
        assert!(e.contains("stopped"), "{e}");
        let e = disk.commit(1, &mut Stops(5)).unwrap_err().to_string();
        assert!(e.contains("stopped"), "{e}");
        assert_eq!(disk.chain().count(), 3);
        load.go_on(10);
        disk.commit(1, &mut Freely).unwrap();
        disk.stream(None, &mut Freely).unwrap();
    });
    disk.close().unwrap();
    compare(&b, &held);
    qemu_agrees(&[&b], &held);
}

#[test]
fn what_cannot_be_done_is_refused() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let [base, a, other, full] = files(dir.path(), ["base", "a", "other", "full"]);
    make(&base, SIZE);
    make(&other, SIZE);
    let mut disk = serve(base.to_str().unwrap(), 2);
    let refused = |disk: &mut Disk, path: &Path, why: &str| {
        let e = disk.snapshot(path).unwrap_err().to_string();
        assert!(e.contains(why), "{e}");
    };
    refused(&mut disk, &base, "in the chain already");
    refused(&mut disk, &other, "does not name the image");
    refused(&mut disk, &dir.path().join("no/such"), "No such file");
    std::fs::write(&full, "text").unwrap();
    refused(&mut disk, &full, "QFI");
    assert!(disk.commit(1, &mut Freely).is_err());
    assert!(disk.commit(0, &mut Freely).is_err());
    assert!(disk.stream(Some(2), &mut Freely).is_err());
    disk.snapshot(&a).unwrap();
    // Somebody else reads the base: fine for him, until it is to be changed.
    let other = open_chain(
        &NodeSpec::parse(base.to_str().unwrap()).unwrap(),
        &OpenOptions::read(Format::Qcow2),
    );
    assert!(other.is_ok());
    disk.snapshot(&dir.path().join("b")).unwrap();
    let e = disk.commit(1, &mut Freely).unwrap_err().to_string();
    assert!(e.contains("in use"), "{e}");
    drop(other);
    disk.commit(1, &mut Freely).unwrap();
    disk.close().unwrap();
}
