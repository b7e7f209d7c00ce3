//! One image on several reactors: random requests from all of them, compared with a plain array, on
//! one thread turned in a seeded order and on real threads; the reuse of freed clusters; the end.

mod rig;

use block::{BlockQueue, Flags, HasWork, Layer, MemQueue, Op, Port, Status};
use qcow::run::{Options, Satellite, Wakes};
use reactor::{Clock, Policy, Reactor, Start};
use rig::Rng;
use rig::several::{Away, Client, DEVICE, Hammer, Home, Late, Several, home, image, verify};

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
        let options = Options { slots: 24, l2_cache: cache, ..Options::default() };
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
    let options = Options { slots: 24, l2_cache: 0, ..Options::default() };
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
            c.add_image(|_, l| Satellite::attach(seat, &ports, l)).unwrap();
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
    let options = Options { slots: 16, l2_cache: 1 << 20, ..Options::default() };
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
    let options = Options { slots: 16, l2_cache: 1 << 20, ..Options::default() };
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
    let options = Options { slots: 16, l2_cache: 1 << 20, ..Options::default() };
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
