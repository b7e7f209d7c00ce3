//! What the tests share: a reactor with a memory disk that can hold back or fail requests, a
//! server on it, and a client written by hand that can also break rules.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block::{
    BlockQueue, Completion, Completions, DeviceInfo, Flags, Full, HasWork, MemQueue, Op, Port,
    RawImage, Request, Status, Submit,
};
use dma::Region;
use nbd::{Bitmap, Bitmaps, Export, Extent, Extents, Security, Server};
use reactor::sync::Mutex;
use reactor::{Clock, Core, Policy, Portal, PortalFrontend, Reactor, Start};

/// What the test may do to the disk, and see of it.
#[derive(Default)]
pub(crate) struct Control {
    /// Completions are held back.
    pub(crate) hold: AtomicBool,
    /// Write-zeroes requests are not known, though the disk says so only when it is asked.
    pub(crate) refuse_zeroes: AtomicBool,
    /// A request that begins in this range fails.
    pub(crate) bad: Mutex<Option<(std::ops::Range<u64>, Status)>>,
    /// Requests so far.
    pub(crate) log: Mutex<Vec<(Op, Flags, u64, u64)>>,
}

impl Control {
    pub(crate) fn hold(&self, yes: bool) {
        self.hold.store(yes, Ordering::Release);
    }

    pub(crate) fn fail(&self, range: std::ops::Range<u64>, status: Status) {
        *self.bad.lock() = Some((range, status));
    }

    /// Requests of one kind so far.
    pub(crate) fn seen(&self, op: Op) -> Vec<(Flags, u64, u64)> {
        self.log.lock().iter().filter(|r| r.0 == op).map(|r| (r.1, r.2, r.3)).collect()
    }
}

/// A memory disk under control.
pub(crate) struct Disk {
    inner: MemQueue,
    info: DeviceInfo,
    control: Arc<Control>,
    now: Completions,
    ready: VecDeque<Completion>,
}

impl Disk {
    fn zeroes(&self) -> bool {
        self.info.write_zeroes && !self.control.refuse_zeroes.load(Ordering::Acquire)
    }
}

impl Submit for Disk {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        (unit == 0).then_some(&self.info)
    }

    fn room(&self) -> usize {
        self.inner.room()
    }

    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        let entry = (request.op, request.flags, request.offset, request.len);
        self.control.log.lock().push(entry);
        let bad = self.control.bad.lock().clone();
        let status = match bad {
            Some((range, status)) if range.contains(&request.offset) => status,
            _ if request.op == Op::WriteZeroes && !self.zeroes() => Status::Unsupported,
            _ => return self.inner.submit(request),
        };
        self.ready.push_back(Completion { tag: request.tag, status, detail: 0 });
        Ok(())
    }
}

impl BlockQueue for Disk {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.inner.register(region)
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        self.now.clear();
        self.inner.poll(&mut self.now);
        self.ready.extend(self.now.iter());
        if self.control.hold.load(Ordering::Acquire) {
            return 0;
        }
        let n = self.ready.len().min(out.room());
        self.ready.drain(..n).for_each(|c| out.push(c));
        n
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.ready.len()
    }

    fn arm(&mut self) -> HasWork {
        if self.in_flight() > 0 { HasWork::Yes } else { HasWork::No }
    }
}

type TestCore = Core<Disk, RawImage, PortalFrontend>;

/// Looks into the disk's memory: chunks of 64 KiB that are all zero are holes.
struct Holes(Arc<Region>);

impl Extents for Holes {
    fn status(&self, offset: u64, len: u64, limit: usize) -> Result<Vec<Extent>, Status> {
        let mut list = Vec::new();
        let mut at = offset;
        while at < offset + len && list.len() < limit {
            let end = (at / 65536 + 1) * 65536;
            let n = end.min(self.0.len() as u64) - at;
            let mut chunk = vec![0; n as usize];
            self.0.read(at as usize, &mut chunk);
            let zero = chunk.iter().all(|&b| b == 0);
            list.push(Extent { len: n, hole: zero, zero });
            at += n;
        }
        Ok(list)
    }
}

/// A bitmap whose bits are set for the first half of each MiB.
pub(crate) struct Halves;

impl Bitmaps for Halves {
    fn names(&self) -> Vec<String> {
        vec!["half".to_owned()]
    }

    fn open(&self, name: &str) -> Option<Arc<dyn Bitmap>> {
        (name == "half").then(|| Arc::new(Halves) as Arc<dyn Bitmap>)
    }
}

impl Bitmap for Halves {
    fn run(&self, offset: u64, most: u64) -> (u64, bool) {
        let half = 512 << 10;
        ((half - offset % half).min(most), (offset / half).is_multiple_of(2))
    }
}

/// How to set up a [`Harness`].
pub(crate) struct Setup {
    pub(crate) size: u64,
    pub(crate) block: u32,
    pub(crate) name: &'static str,
    pub(crate) read_only: bool,
    pub(crate) write_zeroes: bool,
    /// There is a bitmap "half" ([`Halves`]).
    pub(crate) bitmaps: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        let (name, read_only, write_zeroes, bitmaps) = ("", false, true, false);
        Setup { size: 16 << 20, block: 512, name, read_only, write_zeroes, bitmaps }
    }
}

/// A reactor with a disk, and a server on it.
pub(crate) struct Harness {
    pub(crate) control: Arc<Control>,
    /// The disk's memory.
    pub(crate) data: Arc<Region>,
    pub(crate) path: PathBuf,
    pub(crate) server: Option<Server>,
    reactor: Option<Reactor<Disk, RawImage, PortalFrontend>>,
    _dir: tempfile::TempDir,
}

impl Harness {
    pub(crate) fn new(setup: Setup) -> Harness {
        Harness::with(setup, |path, export| Server::bind(path, export).unwrap())
    }

    /// On an address of the loopback.
    pub(crate) fn on_loopback(setup: Setup, security: Security) -> Harness {
        let any = "127.0.0.1:0".parse().unwrap();
        Harness::with(setup, |_, export| Server::listen(any, security, export).unwrap())
    }

    fn with(setup: Setup, bind: impl FnOnce(&std::path::Path, Export) -> Server) -> Harness {
        let control = Arc::new(Control::default());
        let c = control.clone();
        let (send, receive) = std::sync::mpsc::channel();
        let (size, block, write_zeroes) = (setup.size, setup.block, setup.write_zeroes);
        let build = move || -> Result<TestCore, String> {
            let inner = MemQueue::new(size, block).map_err(|e| e.to_string())?;
            let info = DeviceInfo { write_zeroes, ..inner.info(0).unwrap().clone() };
            send.send((inner.data().clone(), info.clone())).unwrap();
            let disk =
                Disk { inner, info, control: c, now: Completions::new(), ready: VecDeque::new() };
            let mut core = Core::new(Clock::real()).map_err(|e| e.to_string())?;
            let port = Port { leaf: core.add_leaf(disk)?, unit: 0 };
            core.add_image(|owner, l| RawImage::new(l, port, size, owner).ok_or("no unit"))?;
            Ok(core)
        };
        let start = Start { cpu: None, policy: Policy::Adaptive };
        let reactor = Reactor::start("disk", start, build).unwrap();
        let (data, info) = receive.recv().unwrap();
        let mailbox = reactor.mailbox().clone();
        let attach = move |depth: u16, regions: Vec<Arc<Region>>| {
            let ended = || "the reactor has ended".to_owned();
            let wake = mailbox.ask(|c: &mut TestCore| c.wake()).ok_or_else(ended)?;
            let (portal, end) = Portal::new(depth, regions, wake).map_err(|e| e.to_string())?;
            mailbox.ask(|c| c.add_frontend(0, |owner, _| Ok(end(owner)))).ok_or_else(ended)??;
            let to = mailbox.clone();
            Ok(portal.with_lodging(Arc::new(move |lodger| to.post(|c| c.lodge(lodger)))))
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let export = Export {
            size: None,
            name: setup.name.to_owned(),
            description: "a test disk".to_owned(),
            read_only: setup.read_only,
            info,
            attach: Box::new(attach),
            bitmaps: setup.bitmaps.then(|| Box::new(Halves) as Box<dyn Bitmaps>),
            extents: Box::new(Holes(data.clone())),
        };
        let server = Some(bind(&path, export));
        Harness { control, data, path, server, reactor: Some(reactor), _dir: dir }
    }

    pub(crate) fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    /// How many connections the reactor's own thread serves.
    pub(crate) fn lodgers(&self) -> usize {
        self.reactor.as_ref().unwrap().mailbox().ask(|core| core.lodger_count()).unwrap()
    }

    /// Turns of the reactor so far.
    pub(crate) fn turns(&self) -> u64 {
        self.reactor.as_ref().unwrap().stats().turns.get()
    }

    pub(crate) fn connect(&self) -> Client {
        Client::connect(&self.path)
    }

    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.data.read(offset as usize, &mut bytes);
        bytes
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.path.display())
    }

    /// Waits until no connection is left.
    pub(crate) fn wait_empty(&self) {
        eventually("connections end", || self.server().connections().is_empty());
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.control.hold(false);
        if let Some(server) = self.server.take() {
            let left = server.shutdown(Duration::ZERO);
            assert!(left == 0 || std::thread::panicking(), "{left} connections left");
        }
        self.reactor.take().unwrap().stop();
    }
}

/// Whether a tool can be run; where `CI` is set it must be.
pub(crate) fn have(tool: &str) -> bool {
    let arg = if tool == "openssl" { "version" } else { "--version" };
    let run = Command::new(tool).arg(arg).stdout(Stdio::null()).status();
    let there = run.is_ok_and(|s| s.success());
    if !there {
        assert!(std::env::var_os("CI").is_none_or(|v| v.is_empty()), "{tool} is not installed");
        println!("skipped: {tool} is not installed");
    }
    there
}

/// Waits for something that happens soon.
pub(crate) fn eventually(what: &str, mut happens: impl FnMut() -> bool) {
    for _ in 0..5000 {
        if happens() {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("never: {what}");
}

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const ZEROES: u16 = 6;
pub(crate) const STATUS: u16 = 7;
pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;
pub(crate) const DF: u16 = 4;
pub(crate) const REQ_ONE: u16 = 8;
pub(crate) const FAST: u16 = 16;

/// What came back for a request.
#[derive(Default, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) error: u32,
    /// Of an error chunk.
    pub(crate) error_at: Option<u64>,
    /// `(offset, bytes)` of each chunk; offset 0 in a simple reply.
    pub(crate) data: Vec<(u64, Vec<u8>)>,
    pub(crate) extents: Vec<(u32, u32)>,
    /// The same of the second context.
    pub(crate) seconds: Vec<(u32, u32)>,
}

impl Answer {
    /// The bytes of a read that was answered well, put together.
    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        assert_eq!(self.error, 0);
        let mut all = vec![0; len];
        let mut count = 0;
        for (at, bytes) in &self.data {
            let at = (at - offset) as usize;
            all[at..at + bytes.len()].copy_from_slice(bytes);
            count += bytes.len();
        }
        assert_eq!(count, len);
        all
    }
}

/// A client by hand.
pub(crate) struct Client {
    pub(crate) s: UnixStream,
    pub(crate) structured: bool,
    cookie: u64,
}

impl Client {
    /// Connects, and does nothing yet.
    pub(crate) fn connect(path: &std::path::Path) -> Client {
        let s = UnixStream::connect(path).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        s.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        Client { s, structured: false, cookie: 0 }
    }

    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut raw = [0; N];
        self.s.read_exact(&mut raw).unwrap();
        raw
    }

    /// The greeting.
    pub(crate) fn greet(&mut self) {
        assert_eq!(&self.take::<18>(), b"NBDMAGICIHAVEOPT\0\x03");
        self.s.write_all(&[0, 0, 0, 3]).unwrap();
    }

    /// An option; returns the type of its final reply.
    pub(crate) fn option(&mut self, option: u32, data: &[u8]) -> u32 {
        let mut raw = b"IHAVEOPT".to_vec();
        raw.extend(option.to_be_bytes());
        raw.extend((data.len() as u32).to_be_bytes());
        raw.extend(data);
        self.s.write_all(&raw).unwrap();
        loop {
            let head = self.take::<20>();
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let len = u32::from_be_bytes(head[16..].try_into().unwrap());
            self.s.read_exact(&mut vec![0; len as usize]).unwrap();
            if kind == 1 || kind >> 31 == 1 {
                return kind;
            }
        }
    }

    /// Enters transmission by GO with the default export.
    pub(crate) fn go(mut self, structured: bool, aligned: bool) -> Client {
        self.greet();
        if structured {
            assert_eq!(self.option(8, b""), 1);
            let mut set = [0; 8].to_vec();
            set[7] = 1;
            set.extend(15u32.to_be_bytes());
            set.extend(b"base:allocation");
            assert_eq!(self.option(10, &set), 1);
        }
        let ask: &[u8] = if aligned { b"\0\0\0\0\0\x01\0\x03" } else { b"\0\0\0\0\0\0" };
        assert_eq!(self.option(7, ask), 1);
        self.structured = structured;
        self
    }

    /// The same connection once more, for another thread to read from.
    pub(crate) fn twin(&self) -> Client {
        Client { s: self.s.try_clone().unwrap(), structured: self.structured, cookie: 0 }
    }

    /// The cookie of the last request.
    pub(crate) fn sent(&self) -> u64 {
        self.cookie
    }

    /// A request's bytes.
    pub(crate) fn raw(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let mut raw = 0x2560_9513u32.to_be_bytes().to_vec();
        raw.extend(flags.to_be_bytes());
        raw.extend(command.to_be_bytes());
        raw.extend(cookie.to_be_bytes());
        raw.extend(offset.to_be_bytes());
        raw.extend(len.to_be_bytes());
        raw
    }

    /// Sends a request and its data; returns its cookie.
    pub(crate) fn send(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> u64 {
        self.cookie += 1;
        self.s.write_all(&Client::raw(command, flags, self.cookie, offset, len)).unwrap();
        self.s.write_all(data).unwrap();
        self.cookie
    }

    /// Receives one reply message: `(cookie, whether it was the last of its request)`, adding it to
    /// `into`. `read` is the length that a simple reply to a good read has.
    pub(crate) fn message(&mut self, read: usize, into: &mut Answer) -> (u64, bool) {
        self.message_of(|_| read, into)
    }

    /// As [`Client::message`], where the length depends on the cookie.
    pub(crate) fn message_of(
        &mut self,
        read: impl Fn(u64) -> usize,
        into: &mut Answer,
    ) -> (u64, bool) {
        let magic = u32::from_be_bytes(self.take());
        if magic == 0x6744_6698 {
            into.error = u32::from_be_bytes(self.take());
            let cookie = u64::from_be_bytes(self.take());
            let read = read(cookie);
            if read > 0 && into.error == 0 {
                assert!(!self.structured);
                let mut bytes = vec![0; read];
                self.s.read_exact(&mut bytes).unwrap();
                into.data.push((0, bytes));
            }
            return (cookie, true);
        }
        assert_eq!(magic, 0x668e_33ef);
        assert!(self.structured);
        let [_, done, k0, k1] = self.take::<4>();
        let cookie = u64::from_be_bytes(self.take());
        let len = u32::from_be_bytes(self.take()) as usize;
        let mut payload = vec![0; len];
        self.s.read_exact(&mut payload).unwrap();
        match u16::from_be_bytes([k0, k1]) {
            0 => assert!(payload.is_empty() && done == 1),
            1 => {
                let at = u64::from_be_bytes(payload[..8].try_into().unwrap());
                into.data.push((at, payload[8..].to_vec()));
            }
            5 => {
                let list = match payload[..4] {
                    [0, 0, 0, 1] => &mut into.extents,
                    [0, 0, 0, 2] => &mut into.seconds,
                    _ => panic!("context {:?}", &payload[..4]),
                };
                let word = |b: &[u8]| u32::from_be_bytes(b.try_into().unwrap());
                let each = payload[4..].chunks(8).map(|c| (word(&c[..4]), word(&c[4..])));
                list.extend(each);
            }
            kind @ (0x8001 | 0x8002) => {
                into.error = u32::from_be_bytes(payload[..4].try_into().unwrap());
                let text = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
                assert!(std::str::from_utf8(&payload[6..6 + text]).is_ok_and(|t| !t.is_empty()));
                let rest = &payload[6 + text..];
                assert_eq!(rest.len(), if kind == 0x8002 { 8 } else { 0 });
                into.error_at = rest.try_into().ok().map(u64::from_be_bytes);
            }
            other => panic!("chunk type {other}"),
        }
        (cookie, done == 1)
    }

    /// Sends a request and waits for its answer; nothing else must be in flight.
    pub(crate) fn ask(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> Answer {
        let sent = self.send(command, flags, offset, len, data);
        let mut answer = Answer::default();
        let read = if command == READ { len as usize } else { 0 };
        loop {
            let (cookie, last) = self.message(read, &mut answer);
            assert_eq!(cookie, sent);
            if last {
                if !self.structured {
                    answer.data.iter_mut().for_each(|d| d.0 = offset);
                }
                return answer;
            }
        }
    }

    /// Reads, and expects success.
    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.ask(READ, 0, offset, len, b"").bytes(offset, len as usize)
    }

    /// Writes; returns the error.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.ask(WRITE, 0, offset, data.len() as u32, data).error
    }

    /// Whether the server closes the connection without another byte.
    pub(crate) fn is_closed(&mut self) -> bool {
        match self.s.read(&mut [0; 1]) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

/// A generator of numbers that is the same in each run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let x = (self.0 ^ self.0 >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((u128::from(x ^ x >> 32) * u128::from(n)) >> 64) as u64
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let seed = self.below(u64::MAX);
        (0..len as u64).map(|i| (seed.wrapping_mul(i + 1) >> 56) as u8).collect()
    }
}
