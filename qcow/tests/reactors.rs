//! One image on several reactors: random requests from all of them, compared with a plain array, on
//! one thread turned in a seeded order and on real threads; the reuse of freed clusters; the end.

mod rig;

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
use reactor::{Clock, Core, Policy, Portal, PortalFrontend, PortalRequest, Reactor, Start};
use rig::{Rng, qemu_check, qemu_read};

const DEVICE: u64 = 24 << 20;

/// A queue to a device in memory that carries requests out late and in any order.
struct Late {
    inner: MemQueue,
    held: Vec<(Request<'static>, SegList)>,
    rng: Rng,
    /// Does nothing for now.
    stalled: bool,
}

impl Late {
    fn new(inner: MemQueue, seed: u64) -> Late {
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

type Home = Core<Late, Image, PortalFrontend>;
type Away = Core<Late, Satellite, PortalFrontend>;

/// A portal with buffers.
struct Client {
    portal: Portal,
    pool: Pool,
    bufs: HashMap<u64, Buf>,
    next_id: u64,
}

type Answer = (u64, Status, Option<Vec<u8>>);

impl Client {
    fn new<I: Layer<Late>>(core: &mut Core<Late, I, PortalFrontend>) -> Client {
        let pool = Pool::new(32, 64 << 10).unwrap();
        let (portal, end) = Portal::new(32, vec![pool.region().clone()], core.wake()).unwrap();
        core.add_frontend(0, |owner, _| Ok(end(owner))).unwrap();
        Client { portal, pool, bufs: HashMap::new(), next_id: 0 }
    }

    fn send(&mut self, op: Op, flags: Flags, offset: u64, len: u64, data: &[u8]) -> u64 {
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

    fn answers(&mut self) -> Vec<Answer> {
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
fn image(device: &MemQueue, cluster: u64, disk: u64) -> Stack {
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

fn home(leaf: Late, stack: Stack, options: Options) -> Home {
    let mut core = Home::new(Clock::virtual_clock().0).unwrap();
    core.add_leaf(leaf).unwrap();
    core.add_image(|owner, l| Image::attach(stack, owner, l, options)).unwrap();
    core
}

fn away(leaf: Late, home: &mut Home) -> Away {
    let mut core = Away::new(Clock::virtual_clock().0).unwrap();
    core.add_leaf(leaf).unwrap();
    let wakes = Wakes { home: home.wake(), away: core.wake() };
    let seat = home.image(0).unwrap().seat(wakes);
    core.add_image(|owner, l| Satellite::attach(seat, &[Port { leaf: 0, unit: 0 }], owner, l))
        .unwrap();
    core
}

/// Several reactors on one thread.
struct Several {
    home: Home,
    away: Vec<Away>,
    clients: Vec<Client>,
    device: MemQueue,
}

impl Several {
    fn new(count: usize, cluster: u64, disk: u64, seed: u64, options: Options) -> Several {
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

    fn turn(&mut self, n: usize) {
        match n {
            0 => self.home.turn(),
            n => self.away[n - 1].turn(),
        };
    }

    /// Sends one request by a reactor and turns all until it is answered.
    fn call(&mut self, n: usize, op: Op, offset: u64, len: u64, data: &[u8]) -> (Status, Vec<u8>) {
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

    fn close(mut self) -> MemQueue {
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
enum Expect {
    Write(Vec<u8>),
    Read,
    Zero,
    Discard,
    Flush,
}

/// Random requests of one client to its own sectors, at most 16 in flight.
struct Hammer {
    flying: HashMap<u64, (u64, u64, Expect)>,
    model: HashMap<u64, u8>,
    /// Whose stripes: this one of so many, each of so many sectors.
    of: (u64, u64),
    stripe: u64,
    disk: u64,
    cluster: u64,
    rng: Rng,
    left: u32,
}

impl Hammer {
    fn new(of: (u64, u64), stripe: u64, disk: u64, cluster: u64, seed: u64, left: u32) -> Hammer {
        let (flying, model, rng) = (HashMap::new(), HashMap::new(), Rng(seed | 1));
        Hammer { flying, model, of, stripe, disk, cluster, rng, left }
    }

    /// A range of the client's own, in bytes.
    fn range(&mut self) -> (u64, u64) {
        let stripes = self.disk / 512 / self.stripe / self.of.1;
        let start = (self.rng.below(stripes) * self.of.1 + self.of.0) * self.stripe;
        let most = if self.rng.one_in(4) { 120 } else { 10 };
        let n = (1 + self.rng.below(most)).min(self.stripe);
        ((start + self.rng.below(self.stripe - n + 1)) * 512, n * 512)
    }

    fn step(&mut self, client: &mut Client) {
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
        for (id, status, data) in client.answers() {
            let (at, len, expect) = self.flying.remove(&id).unwrap();
            assert_eq!(status, Status::Ok);
            let sectors = at / 512..(at + len) / 512;
            match expect {
                // Each sector holds one byte, repeated.
                Expect::Write(d) => {
                    self.model.extend(sectors.zip(d.chunks(512).map(|c| c[0])));
                }
                Expect::Zero => self.model.extend(sectors.map(|s| (s, 0))),
                Expect::Discard => {
                    let (from, to) = (at.next_multiple_of(self.cluster), at + len);
                    let to = to / self.cluster * self.cluster;
                    self.model.extend((from / 512..to / 512).map(|s| (s, 0)));
                }
                Expect::Read => {
                    for (sector, is) in sectors.zip(data.unwrap().chunks(512)) {
                        let want = self.model.get(&sector).copied().unwrap_or(0);
                        let same = is.iter().all(|&b| b == want);
                        assert!(same, "sector {sector}: {:#x} instead of {want:#x}", is[0]);
                    }
                }
                Expect::Flush => {}
            }
        }
    }

    fn done(&self) -> bool {
        self.left == 0 && self.flying.is_empty()
    }
}

/// Compares the closed image with what the clients wrote.
fn verify(device: &MemQueue, hammers: &[Hammer], disk: u64) {
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
        assert!(is.iter().all(|&b| b == want), "sector {sector} on disk");
    }
}

#[test]
fn random_requests_from_several_reactors() {
    // Cluster, stripe in sectors (small: clusters are shared), reactors, bytes for the map.
    let cases = [
        (512, 8, 2, 0),
        (4096, 3, 3, 1 << 20),
        (4096, 2048, 2, 0),
        (65536, 7, 3, 1 << 20),
        (65536, 1024, 2, 1 << 20),
    ];
    for (i, (cluster, stripe, count, cache)) in cases.into_iter().enumerate() {
        let seed = 77 + i as u64;
        let disk = 3 << 20;
        let options = Options { slots: 24, l2_cache: cache };
        let mut all = Several::new(count, cluster, disk, seed, options);
        let n = count as u64;
        let mut hammers: Vec<Hammer> = (0..n)
            .map(|c| Hammer::new((c, n), stripe, disk, cluster, seed * 91 + c, 1500))
            .collect();
        let mut order = Rng(seed * 5 + 1);
        let mut turns = 0;
        while !hammers.iter().all(Hammer::done) {
            let who = order.below(n) as usize;
            hammers[who].step(&mut all.clients[who]);
            all.turn(order.below(n) as usize);
            turns += 1;
            assert!(turns < 2_000_000, "never ends");
        }
        let hits: u64 = all.away.iter_mut().map(|c| c.image(0).unwrap().hits()).sum();
        assert!(hits > 100, "only {hits} requests went straight down");
        verify(&all.close(), &hammers, disk);
    }
}

#[test]
fn random_requests_from_threads() {
    let (disk, cluster, count) = (3 << 20, 4096, 3u64);
    let device = MemQueue::new(DEVICE, 512).unwrap();
    let stack = image(&device, cluster, disk);
    let start = Start { cpu: None, policy: Policy::Adaptive };
    let leaf = Late::new(device.another(), 1);
    let options = Options { slots: 24, l2_cache: 0 };
    let first = Reactor::start("home", start, move || Ok(home(leaf, stack, options))).unwrap();
    let mut clients = vec![first.mailbox().ask(Client::new).unwrap()];
    let mut others = Vec::new();
    for n in 1..count {
        let leaf = Late::new(device.another(), 1 + n);
        let other = Reactor::start("away", start, move || {
            let mut core = Away::new(Clock::virtual_clock().0).map_err(|e| e.to_string())?;
            core.add_leaf(leaf)?;
            Ok(core)
        });
        let other = other.unwrap();
        let woken = other.mailbox().ask(|c| c.wake()).unwrap();
        let seat = first.mailbox().ask(move |c: &mut Home| {
            let wakes = Wakes { home: c.wake(), away: woken };
            c.image(0).unwrap().seat(wakes)
        });
        let seat = seat.unwrap();
        let client = other.mailbox().ask(move |c: &mut Away| {
            let ports = [Port { leaf: 0, unit: 0 }];
            c.add_image(|owner, l| Satellite::attach(seat, &ports, owner, l)).unwrap();
            Client::new(c)
        });
        clients.push(client.unwrap());
        others.push(other);
    }
    let mut hammers: Vec<Hammer> =
        (0..count).map(|c| Hammer::new((c, count), 5, disk, cluster, 400 + c, 4000)).collect();
    while !hammers.iter().all(Hammer::done) {
        for (h, c) in hammers.iter_mut().zip(&mut clients) {
            h.step(c);
        }
    }
    drop(clients);
    // Satellites leave by themselves when the image closes.
    first.mailbox().post(|c: &mut Home| Layer::<Late>::close(c.image(0).unwrap()));
    let closed = |c: &mut Home| c.remove_closed_image(0).map(|(_, status)| status);
    let status = loop {
        if let Some(status) = first.mailbox().ask(closed).unwrap() {
            break status;
        }
        std::thread::yield_now();
    };
    assert_eq!(status, Status::Ok);
    others.into_iter().for_each(Reactor::stop);
    first.stop();
    verify(&device, &hammers, disk);
}

/// A read that another reactor has on the way must not see what comes to lie in its cluster.
#[test]
fn a_freed_cluster_waits_for_requests_of_other_reactors() {
    const CLUSTER: u64 = 4096;
    let options = Options { slots: 16, l2_cache: 1 << 20 };
    let mut all = Several::new(2, CLUSTER, 8 << 20, 5, options);
    let old = vec![0x11; CLUSTER as usize];
    assert_eq!(all.call(1, Op::Write, 0, CLUSTER, &old).0, Status::Ok);
    assert_eq!(all.call(1, Op::Flush, 0, 0, &[]).0, Status::Ok);
    let (_, place) = all.away[0].image(0).unwrap().translate(Op::Read, 0).unwrap();
    // The satellite's read is on the way, and stays there.
    all.away[0].leaves()[0].stalled = true;
    let id = all.clients[1].send(Op::Read, Flags::NONE, 0, CLUSTER, &[]);
    all.turn(1);
    assert_eq!(all.away[0].leaves()[0].in_flight(), 1);
    assert_eq!(all.call(0, Op::Discard, 0, CLUSTER, &[]).0, Status::Ok);
    let mut places = Vec::new();
    let mut fill = |all: &mut Several, from: u64| {
        for n in from..from + 40 {
            let new = vec![0x22; CLUSTER as usize];
            assert_eq!(all.call(0, Op::Write, n * CLUSTER, CLUSTER, &new).0, Status::Ok);
            assert_eq!(all.call(0, Op::Flush, 0, 0, &[]).0, Status::Ok);
            let image = all.home.image(0).unwrap();
            places.push(image.translate(Op::Read, n * CLUSTER).unwrap().1);
        }
        places.contains(&place)
    };
    assert!(!fill(&mut all, 100), "used again with a read on the way");
    all.away[0].leaves()[0].stalled = false;
    let mut answer = None;
    while answer.is_none() {
        all.turn(1);
        answer = all.clients[1].answers().pop();
    }
    let (answered, status, data) = answer.unwrap();
    assert_eq!((answered, status), (id, Status::Ok));
    assert!(data.unwrap()[..CLUSTER as usize] == old[..], "other data");
    assert!(fill(&mut all, 200), "never used again");
    all.close();
}

/// A reactor that sleeps keeps nothing from being used again; when it wakes it sees the new state.
#[test]
fn a_sleeping_reactor_is_not_waited_for() {
    const CLUSTER: u64 = 4096;
    let options = Options { slots: 16, l2_cache: 1 << 20 };
    let mut all = Several::new(2, CLUSTER, 8 << 20, 9, options);
    let data = |byte: u8| vec![byte; CLUSTER as usize];
    assert_eq!(all.call(1, Op::Write, 0, CLUSTER, &data(1)).0, Status::Ok);
    let (_, place) = all.away[0].image(0).unwrap().translate(Op::Read, 0).unwrap();
    assert_eq!(all.away[0].arm(), HasWork::No);
    let home_alone = |all: &mut Several, op, offset, bytes: &[u8]| {
        all.clients[0].send(op, Flags::NONE, offset, bytes.len() as u64, bytes);
        while all.clients[0].answers().is_empty() {
            all.turn(0);
        }
    };
    home_alone(&mut all, Op::Discard, 0, &[0; CLUSTER as usize]);
    let mut found = false;
    for n in 1..20 {
        home_alone(&mut all, Op::Flush, 0, &[]);
        home_alone(&mut all, Op::Write, n * CLUSTER, &data(2));
        let at = all.home.image(0).unwrap().translate(Op::Read, n * CLUSTER);
        found |= at.unwrap().1 == place;
    }
    assert!(found, "a sleeping reactor was waited for");
    assert!(all.call(1, Op::Read, 0, CLUSTER, &[]) == (Status::Ok, data(0)));
    assert!(all.call(1, Op::Read, CLUSTER, CLUSTER, &[]) == (Status::Ok, data(2)));
    all.close();
}

/// The home reactor ends without a close: what it had of others is answered, by them.
#[test]
fn the_home_reactor_goes() {
    let options = Options { slots: 16, l2_cache: 1 << 20 };
    let mut all = Several::new(2, 4096, 8 << 20, 3, options);
    assert_eq!(all.call(1, Op::Write, 0, 4096, &[7; 4096]).0, Status::Ok);
    all.home.leaves()[0].stalled = true;
    let id = all.clients[1].send(Op::Write, Flags::NONE, 1 << 20, 4096, &[8; 4096]);
    for _ in 0..10 {
        all.turn(1);
        all.turn(0);
    }
    assert!(all.clients[1].answers().is_empty());
    let Several { home, mut away, mut clients, .. } = all;
    drop(home);
    let mut seen = Vec::new();
    for _ in 0..20 {
        away[0].turn();
        seen.extend(clients[1].answers().iter().map(|a| (a.0, a.1)));
    }
    assert_eq!(seen, [(id, Status::Gone)]);
    let id = clients[1].send(Op::Read, Flags::NONE, 0, 4096, &[]);
    away[0].turn();
    away[0].turn();
    assert_eq!(
        clients[1].answers().iter().map(|a| (a.0, a.1)).collect::<Vec<_>>(),
        [(id, Status::Gone)]
    );
    Layer::<Late>::close(away[0].image(0).unwrap());
    assert!(away[0].remove_closed_image(0).is_some());
}
