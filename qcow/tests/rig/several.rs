//! Several reactors that serve one image in memory, on one thread ([`Several`]), and clients that
//! send them random requests ([`Hammer`]).

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use block::{
    BlockQueue, Blocking, Completions, DeviceInfo, Flags, Full, HasWork, Layer, LeafAccess,
    MemQueue, Op, Port, Request, SegList, Status, Submit,
};
use dma::{Buf, Pool, Region};
use qcow::create::{CreateOptions, create};
use qcow::open::{Chain, ChainOptions, Format, Opened};
use qcow::run::{Image, Options, Satellite, Stack, Wakes};
use reactor::{Clock, Core, Portal, PortalFrontend, PortalRequest};

use super::{Rng, qemu_check, qemu_read};

pub(crate) const DEVICE: u64 = 24 << 20;

/// A queue to a device in memory that carries requests out late and in any order.
pub(crate) struct Late {
    pub(crate) inner: MemQueue,
    pub(crate) held: Vec<(Request<'static>, SegList)>,
    pub(crate) rng: Rng,
    /// Does nothing for now.
    pub(crate) stalled: bool,
}

impl Late {
    pub(crate) fn new(inner: MemQueue, seed: u64) -> Late {
        Late { inner, held: Vec::new(), rng: Rng(seed | 1), stalled: false }
    }
}

impl Submit for Late {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        self.inner.info(unit)
    }

    fn room(&self) -> usize {
        128 - self.held.len()
    }

    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        let segs = SegList::from_slice(r.segs).unwrap();
        self.held.push((Request { segs: &[], ..*r }, segs));
        Ok(())
    }
}

impl BlockQueue for Late {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.inner.register(region)
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        let mut i = 0;
        while i < self.held.len() && !self.stalled {
            if self.rng.one_in(3) {
                let (r, segs) = self.held.swap_remove(i);
                self.inner.submit(&Request { segs: segs.as_slice(), ..r }).unwrap();
            } else {
                i += 1;
            }
        }
        self.inner.poll(out)
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.inner.in_flight()
    }

    fn arm(&mut self) -> HasWork {
        if self.in_flight() > 0 { HasWork::Yes } else { HasWork::No }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl LeafAccess for Late {
    fn unit_len(&self, unit: u16) -> u64 {
        self.inner.unit_len(unit)
    }

    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
        self.inner.set_unit_len(unit, len)
    }
}

pub(crate) type Home = Core<Late, Image, PortalFrontend>;
pub(crate) type Away = Core<Late, Satellite, PortalFrontend>;

/// A portal with buffers.
pub(crate) struct Client {
    pub(crate) portal: Portal,
    pub(crate) pool: Pool,
    pub(crate) bufs: HashMap<u64, Buf>,
    pub(crate) next_id: u64,
}

pub(crate) type Answer = (u64, Status, Option<Vec<u8>>);

impl Client {
    pub(crate) fn new<I: Layer<Late>>(core: &mut Core<Late, I, PortalFrontend>) -> Client {
        let pool = Pool::new(32, 64 << 10).unwrap();
        let (portal, end) = Portal::new(32, vec![pool.region().clone()], core.wake()).unwrap();
        core.add_frontend(0, |owner, _| Ok(end(owner))).unwrap();
        Client { portal, pool, bufs: HashMap::new(), next_id: 0 }
    }

    pub(crate) fn send(&mut self, op: Op, flags: Flags, offset: u64, len: u64, data: &[u8]) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let seg = matches!(op, Op::Read | Op::Write).then(|| {
            let buf = self.pool.take().unwrap();
            let seg = buf.head(len as u32).unwrap();
            let filler = vec![0xEE; len as usize];
            self.pool.region().write_seg(&seg, if op == Op::Write { data } else { &filler });
            self.bufs.insert(id, buf);
            seg
        });
        self.portal.send(PortalRequest { id, op, flags, offset, len, seg }).unwrap();
        id
    }

    pub(crate) fn answers(&mut self) -> Vec<Answer> {
        let mut all = Vec::new();
        while let Some(r) = self.portal.receive() {
            let data = self.bufs.remove(&r.id).map(|buf| {
                let mut data = vec![0; buf.seg().len() as usize];
                self.pool.region().read_seg(&buf.seg(), &mut data);
                self.pool.give(buf);
                data
            });
            all.push((r.id, r.status, data));
        }
        all
    }
}

/// A fresh image in memory, opened.
pub(crate) fn image(device: &MemQueue, cluster: u64, disk: u64) -> Stack {
    let mut options = CreateOptions::new(disk);
    options.cluster_size = cluster;
    let mut storage = Blocking::new(device.another(), 0).unwrap();
    create(&mut storage, "test", &options).unwrap();
    let first = Opened { storage, path: None, name: "test".into(), id: None };
    let options =
        ChainOptions { writable: true, format: Some(Format::Qcow2), ..Default::default() };
    let mut chain = Chain::open(first, options, &mut |_| unreachable!()).unwrap();
    Stack::new(&mut chain, &[Port { leaf: 0, unit: 0 }]).unwrap()
}

pub(crate) fn home(leaf: Late, stack: Stack, options: Options) -> Home {
    let mut core = Home::new(Clock::virtual_clock().0).unwrap();
    core.add_leaf(leaf).unwrap();
    core.add_image(|owner, l| Image::attach(stack, owner, l, options)).unwrap();
    core
}

pub(crate) fn away(leaf: Late, home: &mut Home) -> Away {
    let mut core = Away::new(Clock::virtual_clock().0).unwrap();
    core.add_leaf(leaf).unwrap();
    let wakes = Wakes { home: home.wake(), away: core.wake() };
    let seat = home.image(0).unwrap().seat(wakes);
    core.add_image(|_, l| Satellite::attach(seat, &[Port { leaf: 0, unit: 0 }], l)).unwrap();
    core
}

/// Several reactors on one thread.
pub(crate) struct Several {
    pub(crate) home: Home,
    pub(crate) away: Vec<Away>,
    pub(crate) clients: Vec<Client>,
    pub(crate) device: MemQueue,
}

impl Several {
    pub(crate) fn new(
        count: usize,
        cluster: u64,
        disk: u64,
        seed: u64,
        options: Options,
    ) -> Several {
        let device = MemQueue::new(DEVICE, 512).unwrap();
        device.data().write(0, &vec![0xD5; DEVICE as usize]);
        let stack = image(&device, cluster, disk);
        let leaf = |n: u64| Late::new(device.another(), seed.wrapping_mul(31) + n);
        let mut home = home(leaf(0), stack, options);
        let mut away: Vec<Away> = (1..count).map(|n| away(leaf(n as u64), &mut home)).collect();
        let mut clients = vec![Client::new(&mut home)];
        clients.extend(away.iter_mut().map(Client::new));
        Several { home, away, clients, device }
    }

    pub(crate) fn turn(&mut self, n: usize) {
        match n {
            0 => self.home.turn(),
            n => self.away[n - 1].turn(),
        };
    }

    /// Sends one request by a reactor and turns all until it is answered.
    pub(crate) fn call(
        &mut self,
        n: usize,
        op: Op,
        offset: u64,
        len: u64,
        data: &[u8],
    ) -> (Status, Vec<u8>) {
        self.clients[n].send(op, Flags::NONE, offset, len, data);
        for turn in 0..100_000 {
            self.turn(turn % self.clients.len());
            if let Some((_, status, data)) = self.clients[n].answers().pop() {
                let mut data = data.unwrap_or_default();
                data.truncate(len as usize);
                return (status, data);
            }
        }
        panic!("never answered");
    }

    pub(crate) fn close(mut self) -> MemQueue {
        Layer::<Late>::close(self.home.image(0).unwrap());
        for _ in 0..100_000 {
            for n in 0..self.clients.len() {
                self.turn(n);
            }
            for core in &mut self.away {
                if let Some(s) = core.image(0) {
                    Layer::<Late>::close(s);
                    core.remove_closed_image(0);
                }
            }
            if let Some((_, status)) = self.home.remove_closed_image(0) {
                assert_eq!(status, Status::Ok);
                return self.device;
            }
        }
        panic!("the close never ended");
    }
}

/// What a request in flight will have done.
pub(crate) enum Expect {
    Write(Vec<u8>),
    Read,
    Zero,
    Discard,
    Flush,
}

/// Random requests of one client to its own sectors, at most 16 in flight.
pub(crate) struct Hammer {
    pub(crate) flying: HashMap<u64, (u64, u64, Expect)>,
    /// What sectors hold; with [`OR_ZERO`] where a discard may have been followed or not.
    pub(crate) model: HashMap<u64, u16>,
    /// Discards may leave what lower layers show.
    pub(crate) layered: bool,
    /// Whose stripes: this one of so many, each of so many sectors.
    pub(crate) of: (u64, u64),
    pub(crate) stripe: u64,
    pub(crate) disk: u64,
    pub(crate) cluster: u64,
    pub(crate) rng: Rng,
    pub(crate) left: u32,
}

impl Hammer {
    pub(crate) fn new(
        of: (u64, u64),
        stripe: u64,
        disk: u64,
        cluster: u64,
        seed: u64,
        left: u32,
    ) -> Hammer {
        let (flying, model, rng) = (HashMap::new(), HashMap::new(), Rng(seed | 1));
        Hammer { flying, model, layered: false, of, stripe, disk, cluster, rng, left }
    }

    /// A range of the client's own, in bytes.
    pub(crate) fn range(&mut self) -> (u64, u64) {
        let stripes = self.disk / 512 / self.stripe / self.of.1;
        let start = (self.rng.below(stripes) * self.of.1 + self.of.0) * self.stripe;
        let most = if self.rng.one_in(4) { 120 } else { 10 };
        let n = (1 + self.rng.below(most)).min(self.stripe);
        ((start + self.rng.below(self.stripe - n + 1)) * 512, n * 512)
    }

    pub(crate) fn step(&mut self, client: &mut Client) {
        if self.left > 0 && self.flying.len() < 16 {
            let (at, len) = self.range();
            let clash = self.flying.values().any(|f| at < f.0 + f.1 && f.0 < at + len);
            let rng = &mut self.rng;
            if !clash {
                let (op, flags, expect) = match rng.below(20) {
                    0..=9 => {
                        let byte = rng.next() as u8;
                        let data = (0..len).map(|i| byte ^ (i >> 9) as u8).collect();
                        let fua = if rng.one_in(8) { Flags::FUA } else { Flags::NONE };
                        (Op::Write, fua, Expect::Write(data))
                    }
                    10..=14 => (Op::Read, Flags::NONE, Expect::Read),
                    15 | 16 => (Op::WriteZeroes, Flags::NONE, Expect::Zero),
                    17 | 18 => (Op::Discard, Flags::NONE, Expect::Discard),
                    _ => (Op::Flush, Flags::NONE, Expect::Flush),
                };
                let (at, len) = if op == Op::Flush { (0, 0) } else { (at, len) };
                let data: &[u8] = if let Expect::Write(d) = &expect { d } else { &[] };
                let id = client.send(op, flags, at, len, data);
                self.flying.insert(id, (at, len, expect));
                self.left -= 1;
            }
        }
        self.take_answers(client);
    }

    pub(crate) fn take_answers(&mut self, client: &mut Client) {
        for (id, status, data) in client.answers() {
            let (at, len, expect) = self.flying.remove(&id).unwrap();
            assert_eq!(status, Status::Ok);
            let sectors = at / 512..(at + len) / 512;
            match expect {
                // Each sector holds one byte, repeated.
                Expect::Write(d) => {
                    self.model.extend(sectors.zip(d.chunks(512).map(|c| c[0].into())));
                }
                Expect::Zero => self.model.extend(sectors.map(|s| (s, 0))),
                Expect::Discard => {
                    let (from, to) = (at.next_multiple_of(self.cluster), at + len);
                    let to = to / self.cluster * self.cluster;
                    for sector in from / 512..to / 512 {
                        let was = self.model.entry(sector).or_default();
                        *was = if self.layered { *was | OR_ZERO } else { 0 };
                    }
                }
                Expect::Read => {
                    for (sector, is) in sectors.zip(data.unwrap().chunks(512)) {
                        let want = self.model.get(&sector).copied().unwrap_or(0);
                        let same = alike(is, want);
                        assert!(same, "sector {sector}: {:#x} instead of {want:#x}", is[0]);
                    }
                }
                Expect::Flush => {}
            }
        }
    }

    pub(crate) fn done(&self) -> bool {
        self.left == 0 && self.flying.is_empty()
    }
}

/// In a model: or it reads as zeroes.
const OR_ZERO: u16 = 0x100;

/// Whether a sector holds what a model says.
pub(crate) fn alike(is: &[u8], want: u16) -> bool {
    let all = |byte| is.iter().all(|&b| b == byte);
    all(want as u8) || want & OR_ZERO != 0 && all(0)
}

/// Compares the closed image with what the clients wrote.
pub(crate) fn verify(device: &MemQueue, hammers: &[Hammer], disk: u64) {
    let mut bytes = vec![0; DEVICE as usize];
    device.data().read(0, &mut bytes);
    let mut storage = Blocking::new(device.another(), 0).unwrap();
    let none = qcow::check::Repair::None;
    let report = qcow::check::run(&mut storage, "test", none, &mut |l| eprintln!("{l}")).unwrap();
    assert_eq!((report.corruptions, report.check_errors, report.leaks), (0, 0, 0));
    assert!(matches!(qemu_check(&bytes), None | Some(0)));
    let Some(raw) = qemu_read(&bytes) else { return };
    for (sector, is) in (0..disk / 512).zip(raw.chunks(512)) {
        let want = hammers.iter().find_map(|h| h.model.get(&sector)).copied().unwrap_or(0);
        assert!(alike(is, want), "sector {sector} on disk");
    }
}
