//! One image on several reactors, over every kind of node: several clients at once in the same
//! clusters, every byte compared, qemu-img as the judge; sleeping reactors that wake each other; the
//! end.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use block::{Flags, Op, Status};
use dma::{Buf, Pool, Region};
use node::{Disk, DiskOptions, Door, MOST_REACTORS, NodeSpec, OpenOptions, Parts, open_chain};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::{Clock, Policy, Portal, PortalRequest, Start};

fn make(path: &Path, size: u64) {
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(path).unwrap();
    let mut storage = node::HostStorage::of(file, false).unwrap();
    create(&mut storage, "test", &CreateOptions::new(size)).unwrap();
}

fn serve(spec: &str, format: Format, reactors: usize, policy: Policy) -> Result<Disk, node::Error> {
    let chain = open_chain(&NodeSpec::parse(spec)?, &OpenOptions::write(format))?;
    let start = Start { cpu: None, policy };
    let options = DiskOptions { reactors: vec![start; reactors], image: Default::default() };
    Disk::start(Parts::new(chain)?, options, Clock::real())
}

/// Bytes of a piece: 16 of them to a cluster, and clients have every `n`th, so that they meet in
/// clusters.
const PIECE: u64 = 4096;

/// Pieces that are used: 8 MiB.
const PIECES: u64 = 2048;

fn request(id: u64, op: Op, offset: u64, len: u64, seg: Option<dma::Seg>) -> PortalRequest {
    PortalRequest { id, op, flags: Flags::NONE, offset, len, seg }
}

/// A portal with buffers of a piece.
struct Client {
    portal: Portal,
    pool: Pool,
}

impl Client {
    fn new(door: &Door) -> Client {
        let pool = Pool::new(16, PIECE as u32).unwrap();
        let portal = door.open(16, vec![pool.region().clone()]).unwrap();
        Client { portal, pool }
    }

    fn region(&self) -> &Region {
        self.pool.region()
    }

    /// Does `op` to pieces, as deep as can be: of a write with `byte` of each, a read's is compared.
    fn each(&mut self, op: Op, pieces: impl Iterator<Item = u64>, byte: impl Fn(u64) -> u8) {
        let mut pieces = pieces.peekable();
        let mut bufs: HashMap<u64, Buf> = HashMap::new();
        while pieces.peek().is_some() || !bufs.is_empty() {
            while self.portal.room() > 0
                && let Some(n) = pieces.next()
            {
                let buf = self.pool.take().unwrap();
                let filler = if op == Op::Write { byte(n) } else { !byte(n) };
                self.region().write_seg(&buf.seg(), &[filler; PIECE as usize]);
                self.portal.send(request(n, op, n * PIECE, PIECE, Some(buf.seg()))).unwrap();
                bufs.insert(n, buf);
            }
            let reply = self.portal.wait();
            assert_eq!(reply.status, Status::Ok, "{op:?} of piece {}", reply.id);
            let buf = bufs.remove(&reply.id).unwrap();
            if op == Op::Read {
                let mut data = [0; PIECE as usize];
                self.region().read_seg(&buf.seg(), &mut data);
                let right = data.iter().all(|&b| b == byte(reply.id));
                assert!(right, "piece {}: {} is not {}", reply.id, data[0], byte(reply.id));
            }
            self.pool.give(buf);
        }
    }

    fn flush(&mut self) {
        assert_eq!(self.portal.call(request(0, Op::Flush, 0, 0, None)), Status::Ok);
    }
}

/// What piece `n` holds after a pass.
fn byte(n: u64, pass: u64) -> u8 {
    (n * 7 + n / 256 + pass * 101) as u8
}

/// As many clients as reactors write every piece between them, twice, and read all of it, at the
/// same time.
fn exercise(disk: &Disk, clients: u64) {
    let door = disk.door();
    std::thread::scope(|scope| {
        for k in 0..clients {
            let door = &door;
            scope.spawn(move || {
                let mut client = Client::new(door);
                for pass in 0..2 {
                    let own = || (0..PIECES).filter(move |n| n % clients == k);
                    client.each(Op::Write, own(), |n| byte(n, pass));
                    client.each(Op::Read, own(), |n| byte(n, pass));
                    client.flush();
                }
            });
        }
    });
    // What one wrote the others read.
    for _ in 0..clients {
        Client::new(&door).each(Op::Read, 0..PIECES, |n| byte(n, 1));
    }
    for (n, reactor) in disk.reactors().enumerate() {
        let done = reactor.stats().completions.get();
        assert!(done > PIECES, "reactor {n} did {done} requests");
    }
}

fn qemu_check(path: &Path) {
    let Ok(out) = Command::new("qemu-img").arg("check").arg(path).output() else {
        println!("skipped: qemu-img is not installed");
        return;
    };
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

#[test]
fn qcow2_on_files_and_models() {
    let dir = tempfile::tempdir().unwrap();
    let mut n = 0;
    for (reactors, policy) in [(2, Policy::Adaptive), (3, Policy::Adaptive), (2, Policy::Poll)] {
        for kind in ["file:", "model:", "model:?lba=4096&vwc=1&mdts=1"] {
            n += 1;
            let path = dir.path().join(format!("{n}.qcow2"));
            make(&path, 64 << 20);
            let (scheme, options) = kind.split_at(kind.find(':').unwrap() + 1);
            let node = format!("{scheme}{}{options}", path.display());
            let disk = serve(&node, Format::Qcow2, reactors, policy).unwrap();
            exercise(&disk, reactors as u64);
            disk.close().unwrap();
            qemu_check(&path);
            let len = std::fs::metadata(&path).unwrap().len();
            assert!(len < 10 << 20, "{node}: the file was left {len} bytes long");
            let disk = serve(&node, Format::Qcow2, 1, policy).unwrap();
            Client::new(&disk.door()).each(Op::Read, 0..PIECES, |n| byte(n, 1));
            disk.close().unwrap();
        }
    }
}

#[test]
fn raw_on_memory_and_files() {
    let disk = serve("mem:16M", Format::Raw, 3, Policy::Adaptive).unwrap();
    exercise(&disk, 3);
    disk.close().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(16 << 20).unwrap();
    let node = format!("file:{}", file.path().display());
    let disk = serve(&node, Format::Raw, 2, Policy::Adaptive).unwrap();
    exercise(&disk, 2);
    disk.close().unwrap();
    let data = std::fs::read(file.path()).unwrap();
    assert!(data.chunks(PIECE as usize).zip(0..PIECES).all(|(d, n)| d[77] == byte(n, 1)));
}

#[test]
fn qcow2_on_stripes() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<_> = (0..3).map(|i| dir.path().join(format!("m{i}"))).collect();
    for path in &paths {
        std::fs::File::create(path).unwrap().set_len(16 << 20).unwrap();
    }
    let [a, b, c] = [0, 1, 2].map(|i: usize| paths[i].display().to_string());
    let node = format!("stripe:16k,model:{a}?lba=4096,file:{b},model:{c}?lba=4096");
    let mut bytes =
        node::open_source(&NodeSpec::parse(&node).unwrap(), &OpenOptions::write(Format::Raw))
            .unwrap();
    create(&mut bytes, "test", &CreateOptions::new(32 << 20)).unwrap();
    bytes.close().unwrap();
    let disk = serve(&node, Format::Qcow2, 3, Policy::Adaptive).unwrap();
    exercise(&disk, 3);
    disk.close().unwrap();
    let disk = serve(&node, Format::Qcow2, 1, Policy::Adaptive).unwrap();
    Client::new(&disk.door()).each(Op::Read, 0..PIECES, |n| byte(n, 1));
    disk.close().unwrap();
    assert!(paths.iter().all(|p| std::fs::metadata(p).unwrap().len() == 16 << 20));
}

#[test]
fn a_backing_file_on_every_reactor() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base.qcow2"), dir.path().join("top.qcow2"));
    make(&base, 64 << 20);
    let disk = serve(base.to_str().unwrap(), Format::Qcow2, 1, Policy::Adaptive).unwrap();
    Client::new(&disk.door()).each(Op::Write, 0..PIECES, |n| byte(n, 9));
    disk.close().unwrap();
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(&top).unwrap();
    let mut options = CreateOptions::new(64 << 20);
    options.backing = Some(("base.qcow2".to_owned(), Format::Qcow2));
    create(&mut node::HostStorage::of(file, false).unwrap(), "test", &options).unwrap();
    let disk =
        serve(&format!("model:{}", top.display()), Format::Qcow2, 2, Policy::Adaptive).unwrap();
    for _ in 0..2 {
        Client::new(&disk.door()).each(Op::Read, 0..PIECES, |n| byte(n, 9));
    }
    exercise(&disk, 2);
    disk.close().unwrap();
    qemu_check(&top);
}

/// Idle reactors sleep; a request that needs both wakes both, and is not found by the time-out.
#[test]
#[expect(clippy::disallowed_methods, reason = "times a test")]
fn sleeping_reactors_wake_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    make(&path, 64 << 20);
    let disk =
        serve(&format!("file:{}", path.display()), Format::Qcow2, 2, Policy::Adaptive).unwrap();
    let door = disk.door();
    let _at_home = Client::new(&door);
    let mut client = Client::new(&door);
    let sleeps = || disk.reactors().map(|r| r.stats().sleeps.get()).collect::<Vec<_>>();
    let calls = || disk.reactors().map(|r| r.stats().busy_ns.get()).collect::<Vec<_>>();
    let mut took = Vec::new();
    for n in 0..30 {
        let (before, began) = (sleeps(), Instant::now());
        while sleeps().iter().zip(&before).any(|(now, before)| now <= before) {
            assert!(began.elapsed() < Duration::from_secs(10), "they do not sleep: {before:?}");
            std::thread::sleep(Duration::from_micros(500));
        }
        let (busy, began) = (calls(), Instant::now());
        // A cluster that is not there yet: it has to go home.
        client.each(Op::Write, std::iter::once(n * 16), |n| byte(n, 0));
        took.push(began.elapsed());
        let worked = calls().iter().zip(&busy).all(|(now, before)| now > before);
        assert!(worked || n > 0, "only one of the reactors had work");
    }
    took.sort();
    // The time-out of a sleep is 100 ms, and there are two ways to go.
    assert!(took[15] < Duration::from_millis(40), "{took:?}");
    drop((client, _at_home));
    disk.close().unwrap();
}

#[test]
fn clients_that_go_on_do_not_keep_it_from_closing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    make(&path, 64 << 20);
    for spec in [format!("file:{}", path.display()), format!("model:{}", path.display())] {
        let disk = serve(&spec, Format::Qcow2, 3, Policy::Adaptive).unwrap();
        let door = disk.door();
        let (send, ended) = channel();
        for k in 0..6 {
            let (door, send) = (door.clone(), send.clone());
            let Client { mut portal, mut pool } = Client::new(&door);
            std::thread::spawn(move || {
                let seg = pool.take().unwrap().seg();
                let mut id = k;
                let status = loop {
                    while portal.room() > 0 {
                        // Overwrites, and clusters that are not there yet.
                        let n = if id % 5 == 0 { id * 3 % (PIECES * 8) } else { k };
                        let r = request(id, Op::Write, n * PIECE, PIECE, Some(seg));
                        portal.send(r).unwrap();
                        id += 1;
                    }
                    match portal.wait().status {
                        Status::Ok => {}
                        status => break status,
                    }
                };
                while portal.in_flight() > 0 {
                    portal.wait();
                }
                send.send(status).unwrap();
            });
        }
        disk.close().unwrap();
        for _ in 0..6 {
            assert_eq!(ended.recv_timeout(Duration::from_secs(10)), Ok(Status::Gone), "{spec}");
        }
        assert!(door.open(1, Vec::new()).is_err(), "there is nothing left to attach to");
        let mut storage = node::HostStorage::open(&path, true).unwrap();
        let check = qcow::check::Repair::None;
        let check = qcow::check::run(&mut storage, "a", check, &mut |_| {}).unwrap();
        assert_eq!(check.corruptions + check.leaks + check.check_errors, 0, "{spec}");
    }
}

#[test]
fn as_many_reactors_as_may_be_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    make(&path, 64 << 20);
    for scheme in ["file:", "model:"] {
        let spec = format!("{scheme}{}", path.display());
        let disk = serve(&spec, Format::Qcow2, MOST_REACTORS, Policy::Adaptive).unwrap();
        Client::new(&disk.door()).each(Op::Write, 0..16, |n| byte(n, 0));
        disk.close().unwrap();
        for count in [0, MOST_REACTORS + 1] {
            let error = serve(&spec, Format::Qcow2, count, Policy::Adaptive).err().unwrap();
            assert!(error.to_string().contains("reactor"), "{error}");
        }
    }
}
