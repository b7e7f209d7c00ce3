//! Changing the chain of an image that several reactors serve, under random requests: a new overlay
//! in front, taking layers up, another size.

mod rig;

use std::collections::HashMap;
use std::time::Duration;

use block::{Blocking, Layer, MemQueue, Op, Port, Status};
use qcow::create::{CreateOptions, create};
use qcow::edit::{SnapshotKey, create_snapshot, delete_snapshot};
use qcow::open::{Chain, ChainOptions, Format, Opened};
use qcow::run::{Image, Options, Stack};
use rig::several::{DEVICE, Hammer, Late, Several, alike, verify};
use rig::{Rng, qemu_read, qemu_read_snapshot, read_offline};

/// A memory device with a fresh overlay over the layer before it.
fn overlay(disk: u64, cluster: u64) -> MemQueue {
    let device = MemQueue::new(DEVICE, 512).unwrap();
    device.data().write(0, &vec![0xD5; DEVICE as usize]);
    let mut options = CreateOptions::new(disk);
    options.cluster_size = cluster;
    options.backing = Some(("/below".to_owned(), Format::Qcow2));
    create(&mut Blocking::new(device.another(), 0).unwrap(), "overlay", &options).unwrap();
    device
}

/// The chain of these devices, the one that is written to first.
fn open(devices: &[&MemQueue]) -> Chain<Blocking<MemQueue>> {
    let opened = |i: usize| Opened {
        storage: Blocking::new(devices[i].another(), 0).unwrap(),
        path: (i > 0).then(|| format!("/layer{i}").into()),
        name: format!("layer {i}"),
        id: None,
    };
    let options =
        ChainOptions { writable: true, format: Some(Format::Qcow2), ..Default::default() };
    let mut next = 0;
    Chain::open(opened(0), options, &mut |_| {
        next += 1;
        Ok(opened(next))
    })
    .unwrap()
}

/// An image with its chain: devices, the one that is written to last, each at the leaf of its
/// number.
struct Live {
    all: Several,
    devices: Vec<MemQueue>,
    /// By layer, from the bottom: which device.
    chain: Vec<usize>,
    order: Rng,
    hammers: Vec<Hammer>,
    disk: u64,
    cluster: u64,
}

impl Live {
    fn new(count: usize, cluster: u64, disk: u64, stripe: u64, seed: u64, work: u32) -> Live {
        let options = Options { slots: 24, l2_cache: 1 << 20, ..Options::default() };
        let all = Several::new(count, cluster, disk, seed, options);
        let devices = vec![all.device.another()];
        let n = count as u64;
        let hammers = (0..n)
            .map(|c| Hammer::new((c, n), stripe, disk, cluster, seed * 91 + c, work))
            .collect();
        Live { all, devices, chain: vec![0], order: Rng(seed), hammers, disk, cluster }
    }

    fn step(&mut self) {
        let n = self.all.clients.len() as u64;
        let who = self.order.below(n) as usize;
        self.hammers[who].step(&mut self.all.clients[who]);
        self.all.turn(self.order.below(n) as usize);
    }

    fn done(&self) -> bool {
        self.hammers.iter().all(Hammer::done)
    }

    fn pause(&mut self) {
        self.all.home.image(0).unwrap().pause();
        for turn in 0.. {
            assert!(turn < 100_000, "never at rest");
            self.step();
            if let Some(status) = self.all.home.image(0).unwrap().paused() {
                assert_eq!(status, Status::Ok);
                return;
            }
        }
    }

    fn ports(&self) -> Vec<Port> {
        self.chain.iter().rev().map(|&d| Port { leaf: d as u16, unit: 0 }).collect()
    }

    /// Reads the chain from its devices and serves it.
    fn restack(&mut self, keep: bool) {
        let ports = self.ports();
        let devices: Vec<&MemQueue> = self.chain.iter().rev().map(|&d| &self.devices[d]).collect();
        let new = Stack::new(&mut open(&devices), &ports).unwrap();
        self.serve(|i, leaves| i.restack(new, leaves, keep));
    }

    /// Gives all reactors what `f` makes the image.
    fn serve(&mut self, f: impl FnOnce(&mut Image, &mut [Late]) -> Result<(), String>) {
        let ports = self.ports();
        let home = &mut self.all.home;
        home.with_image(0, f).unwrap().unwrap();
        let news = home.image(0).unwrap().reseat();
        for core in &mut self.all.away {
            core.with_image(0, |s, leaves| s.reseat(&news, &ports, leaves)).unwrap().unwrap();
        }
    }

    fn resume(&mut self) {
        self.all.home.image(0).unwrap().resume();
    }

    /// A device more, known to all reactors.
    fn add_device(&mut self, device: MemQueue) -> usize {
        let n = self.devices.len();
        let leaf = |k: usize| Late::new(device.another(), (n * 10 + k) as u64);
        assert_eq!(usize::from(self.all.home.add_leaf(leaf(0)).unwrap()), n);
        for (k, core) in self.all.away.iter_mut().enumerate() {
            assert_eq!(usize::from(core.add_leaf(leaf(k + 1)).unwrap()), n);
        }
        let home = &mut self.all.home;
        home.with_image(0, |i, leaves| i.take_leaf(n as u16, leaves)).unwrap().unwrap();
        self.devices.push(device);
        n
    }

    /// Puts a new overlay in front. Returns the hammers' models at that moment.
    fn snapshot(&mut self) -> Vec<std::collections::HashMap<u64, u16>> {
        let n = self.add_device(overlay(self.disk, self.cluster));
        let storage = Blocking::new(self.devices[n].another(), 0).unwrap();
        let (path, name, id) = (None, "overlay".to_owned(), None);
        let options = ChainOptions {
            writable: true,
            format: Some(Format::Qcow2),
            top_only: true,
            ..Default::default()
        };
        let alone = Opened { storage, path, name, id };
        let mut chain = Chain::open(alone, options, &mut |_| unreachable!()).unwrap();
        let port = Port { leaf: n as u16, unit: 0 };
        let overlay = Stack::new(&mut chain, &[port]).unwrap();
        self.pause();
        self.chain.push(n);
        self.serve(|i, leaves| i.put_in_front(overlay, leaves));
        for (hammer, client) in self.hammers.iter_mut().zip(&mut self.all.clients) {
            hammer.layered = true;
            hammer.take_answers(client);
        }
        let models = self.hammers.iter().map(|h| h.model.clone()).collect();
        self.resume();
        models
    }

    /// Takes an internal snapshot of the image and returns what it is of; or deletes one.
    fn internal(&mut self, name: &str, take: bool) -> Vec<HashMap<u64, u16>> {
        self.pause();
        let top = *self.chain.last().unwrap();
        let st = &mut Blocking::new(self.devices[top].another(), 0).unwrap();
        if take {
            create_snapshot(st, "live", name, Duration::ZERO).unwrap();
        } else {
            delete_snapshot(st, "live", SnapshotKey::Name(name)).unwrap();
        }
        self.restack(false);
        for (hammer, client) in self.hammers.iter_mut().zip(&mut self.all.clients) {
            hammer.take_answers(client);
        }
        let models = self.hammers.iter().map(|h| h.model.clone()).collect();
        self.resume();
        models
    }

    /// Takes all up into the last layer and cuts the chain below it.
    fn stream(&mut self) -> u64 {
        assert!(self.all.home.image(0).unwrap().start_stream(0, None));
        let mut paused = 0;
        let copied = loop {
            for _ in 0..200 {
                self.step();
            }
            self.all.home.image(0).unwrap().grant_stream(4 * self.cluster);
            let progress = self.all.home.image(0).unwrap().stream_progress();
            if let Some(ended) = progress.ended {
                assert_eq!(ended, Status::Ok);
                break progress.copied;
            }
            if progress.at > progress.of / 2 && paused == 0 {
                // A pause in its middle changes nothing.
                self.pause();
                self.restack(true);
                self.resume();
                paused += 1;
            }
        };
        self.pause();
        let top = *self.chain.last().unwrap();
        let mut storage = Blocking::new(self.devices[top].another(), 0).unwrap();
        qcow::edit::set_backing(&mut storage, "top", None).unwrap();
        self.chain = vec![top];
        self.restack(false);
        self.resume();
        copied
    }

    fn finish(mut self) {
        while !self.done() {
            self.step();
        }
        let top = *self.chain.last().unwrap();
        let (hammers, disk) = (self.hammers, self.disk);
        self.all.close();
        if self.chain.len() == 1 {
            verify(&self.devices[top], &hammers, disk);
        }
    }
}

/// What qemu-img reads from a device that needs no other.
fn contents(device: &MemQueue) -> Option<Vec<u8>> {
    let mut bytes = vec![0; DEVICE as usize];
    device.data().read(0, &mut bytes);
    qemu_read(&bytes)
}

#[test]
fn a_snapshot_shows_one_moment_and_nobody_notices() {
    for (seed, cluster, stripe) in [(1, 4096, 5), (2, 65536, 1024), (3, 512, 8)] {
        let mut live = Live::new(3, cluster, 3 << 20, stripe, seed, 1200);
        for _ in 0..3000 {
            live.step();
        }
        let hits = |live: &mut Live| -> u64 {
            live.all.away.iter_mut().map(|c| c.image(0).unwrap().hits()).sum()
        };
        let models = live.snapshot();
        let before = hits(&mut live);
        for _ in 0..2000 {
            live.step();
        }
        assert!(hits(&mut live) > before, "the map is lost");
        // All that was written before is in the lower layer, and nothing that came later.
        if let Some(lower) = contents(&live.devices[0]) {
            for (sector, is) in (0..live.disk / 512).zip(lower.chunks(512)) {
                let want = models.iter().find_map(|m| m.get(&sector)).copied().unwrap_or(0);
                assert!(
                    alike(is, want),
                    "sector {sector} of the snapshot: {:#x}, not {want:#x}",
                    is[0]
                );
            }
        }
        live.snapshot();
        live.finish();
    }
}

#[test]
fn internal_snapshots_while_several_reactors_write() {
    for (seed, cluster, stripe) in [(11, 4096, 5), (12, 65536, 7), (13, 512, 8)] {
        let mut live = Live::new(3, cluster, 3 << 20, stripe, seed, 2000);
        let go_on = |live: &mut Live| (0..2500).for_each(|_| live.step());
        go_on(&mut live);
        let gone = live.internal("gone", true);
        go_on(&mut live);
        let kept = live.internal("kept", true);
        go_on(&mut live);
        shows(&live, "gone", &gone);
        live.internal("gone", false);
        go_on(&mut live);
        while !live.done() {
            live.step();
        }
        let hits: u64 = live.all.away.iter_mut().map(|c| c.image(0).unwrap().hits()).sum();
        assert!(hits > 100, "only {hits} requests went straight down");
        let device = live.devices[0].another();
        live.finish();
        shows_on(&device, "kept", &kept);
    }
}

fn shows(live: &Live, name: &str, models: &[HashMap<u64, u16>]) {
    shows_on(&live.devices[0], name, models);
}

/// A snapshot shows what it was taken of.
fn shows_on(device: &MemQueue, name: &str, models: &[HashMap<u64, u16>]) {
    let mut bytes = vec![0; DEVICE as usize];
    device.data().read(0, &mut bytes);
    let ours = read_offline(&bytes, None, Some(name));
    for shown in [Some(ours), qemu_read_snapshot(&bytes, name)].into_iter().flatten() {
        for (sector, is) in (0..).zip(shown.chunks(512)) {
            let want = models.iter().find_map(|m| m.get(&sector)).copied().unwrap_or(0);
            assert!(alike(is, want), "sector {sector} of {name}: {:#x}, not {want:#x}", is[0]);
        }
    }
}

#[test]
fn a_stream_takes_up_what_lies_below() {
    for (seed, cluster, stripe) in [(11, 4096, 5), (12, 65536, 1024), (13, 512, 8)] {
        let mut live = Live::new(2, cluster, 3 << 20, stripe, seed, 6000);
        for _ in 0..4000 {
            live.step();
        }
        live.snapshot();
        for _ in 0..1000 {
            live.step();
        }
        live.snapshot();
        assert!(live.stream() > 0, "nothing was copied");
        live.finish();
    }
}

#[test]
fn another_size_while_guests_go_on() {
    let mut live = Live::new(2, 4096, 3 << 20, 5, 21, 3000);
    for _ in 0..3000 {
        live.step();
    }
    live.pause();
    let size = 8 << 20;
    let chain = open(&[&live.devices[0]]);
    qcow::edit::resize(&mut qcow::ChainReader::new(chain), size).unwrap();
    live.restack(true);
    live.resume();
    assert_eq!(Layer::<Late>::info(live.all.home.image(0).unwrap()).size, size);
    let late = live.all.away[0].image(0).unwrap();
    assert_eq!(Layer::<Late>::info(late).size, size);
    while !live.done() {
        live.step();
    }
    assert_eq!(live.all.call(1, Op::Write, size - 512, 512, &[9; 512]).0, Status::Ok);
    assert_eq!(live.all.call(0, Op::Read, size - 512, 512, &[]), (Status::Ok, vec![9; 512]));
    live.finish();
}

#[test]
fn a_close_ends_a_pause_and_a_stream() {
    for state in 0..3 {
        let mut live = Live::new(2, 4096, 3 << 20, 5, 31 + state, 800);
        while !live.done() {
            live.step();
        }
        live.snapshot();
        match state {
            0 => live.pause(),
            1 => live.all.home.image(0).unwrap().pause(),
            _ => {
                let image = live.all.home.image(0).unwrap();
                assert!(image.start_stream(0, None) && !image.start_stream(0, None));
                image.grant_stream(4096);
                (0..20).for_each(|_| live.step());
            }
        }
        live.all.close();
    }
}

/// A layer that goes may be shorter than one that stays: what it hid must stay hidden.
#[test]
fn a_stream_keeps_the_zeroes_behind_a_short_layer() {
    let mut live = Live::new(2, 4096, 3 << 20, 5, 1, 0);
    assert_eq!(live.all.call(0, Op::Write, 2 << 20, 4096, &[9; 4096]).0, Status::Ok);
    for size in [1 << 20, 3 << 20] {
        let n = live.add_device(overlay(size, 4096));
        live.pause();
        live.chain.push(n);
        live.restack(false);
        live.resume();
    }
    assert_eq!(live.all.call(0, Op::Read, 2 << 20, 4096, &[]), (Status::Ok, vec![0; 4096]));
    let image = live.all.home.image(0).unwrap();
    assert!(image.start_stream(1, None));
    image.grant_stream(1 << 30);
    while live.all.home.image(0).unwrap().stream_progress().ended.is_none() {
        live.step();
    }
    live.pause();
    live.chain = vec![0, 2];
    live.restack(false);
    live.resume();
    assert_eq!(live.all.call(0, Op::Read, 2 << 20, 4096, &[]), (Status::Ok, vec![0; 4096]));
}

#[test]
fn a_stream_that_begins_in_a_pause_waits_for_its_end() {
    for restack in [false, true] {
        let mut live = Live::new(2, 4096, 3 << 20, 5, 1, 0);
        assert_eq!(live.all.call(0, Op::Write, 0, 4096, &[9; 4096]).0, Status::Ok);
        live.snapshot();
        live.pause();
        let image = live.all.home.image(0).unwrap();
        assert!(image.start_stream(0, None));
        image.grant_stream(1 << 30);
        (0..200).for_each(|_| live.step());
        let image = live.all.home.image(0).unwrap();
        assert_eq!((image.paused(), image.stream_progress().copied), (Some(Status::Ok), 0));
        if restack {
            live.restack(true);
        }
        live.resume();
        (0..20_000).for_each(|_| live.step());
        let progress = live.all.home.image(0).unwrap().stream_progress();
        assert_eq!((progress.ended, progress.copied), (Some(Status::Ok), 4096));
    }
}

/// A pause lets nothing leak and does not turn in circles while another reactor is slow.
#[test]
fn a_pause_ends_soon_and_leaks_nothing() {
    let mut live = Live::new(2, 4096, 3 << 20, 5, 1, 0);
    for op in [Op::Write, Op::Flush, Op::Discard] {
        for n in 0..8 {
            let at = if op == Op::Flush { (0, 0) } else { (n * 4096, 4096) };
            assert_eq!(live.all.call(1, op, at.0, at.1, &[9; 4096]).0, Status::Ok);
        }
    }
    let batches = |live: &mut Live| live.all.home.image(0).unwrap().counters().batches.get();
    let before = batches(&mut live);
    live.pause();
    assert!(batches(&mut live) - before < 10);
    live.restack(false);
    live.resume();
    live.finish();
}

#[test]
fn no_satellite_starves_another() {
    let mut live = Live::new(3, 4096, 3 << 20, 5, 1, 0);
    let all = &mut live.all;
    let flush = |all: &mut Several, n: usize| {
        all.clients[n].send(Op::Flush, block::Flags::NONE, 0, 0, &[]);
    };
    flush(all, 2);
    let mut flying = 0;
    for _ in 0..2000 {
        while flying < 24 {
            flush(all, 1);
            flying += 1;
        }
        [1, 2, 0, 1].into_iter().for_each(|n| all.turn(n));
        flying -= all.clients[1].answers().len();
        if !all.clients[2].answers().is_empty() {
            return;
        }
    }
    panic!("never answered");
}

/// What a satellite has left behind is done before a pause is reached.
#[test]
fn an_errand_of_a_reactor_that_is_gone() {
    let mut live = Live::new(2, 4096, 3 << 20, 5, 1, 0);
    live.all.clients[1].send(Op::Write, block::Flags::NONE, 0, 4096, &[7; 4096]);
    live.all.turn(1);
    drop(live.all.away.remove(0));
    live.all.home.leaves()[0].stalled = true;
    live.all.home.image(0).unwrap().pause();
    (0..20).for_each(|_| live.all.turn(0));
    assert_eq!(live.all.home.image(0).unwrap().paused(), None);
    live.all.home.leaves()[0].stalled = false;
    (0..200).for_each(|_| live.all.turn(0));
    assert_eq!(live.all.home.image(0).unwrap().paused(), Some(Status::Ok));
}

/// The home reactor goes while others have errands in its queue, or rest for its pause.
#[test]
fn the_home_reactor_goes_in_a_pause() {
    for paused in [false, true] {
        let mut live = Live::new(2, 4096, 3 << 20, 5, 1, 0);
        let send = |client: &mut rig::several::Client, n: u64| {
            (0..n).for_each(|_| {
                client.send(Op::Flush, block::Flags::NONE, 0, 0, &[]);
            });
        };
        if paused {
            live.pause();
        }
        let Several { home, mut away, mut clients, .. } = live.all;
        send(&mut clients[1], 14);
        away[0].turn();
        drop(home);
        send(&mut clients[1], 4);
        away[0].turn();
        send(&mut clients[1], 10);
        (0..20).for_each(|_| {
            away[0].turn();
        });
        let answers = clients[1].answers();
        assert_eq!(answers.len(), 28);
        assert!(answers.iter().all(|a| a.1 == Status::Gone));
    }
}

/// Whoever asked for a pause and went away leaves an image that goes on.
#[test]
fn a_pause_that_is_given_up() {
    let mut live = Live::new(2, 4096, 3 << 20, 5, 1, 0);
    for looks in 0..12 {
        assert_eq!(live.all.call(1, Op::Write, looks * 4096, 4096, &[7; 4096]).0, Status::Ok);
        live.all.home.image(0).unwrap().pause();
        (0..looks).for_each(|_| live.step());
        live.all.home.image(0).unwrap().resume();
        assert_eq!(live.all.call(0, Op::Write, 1 << 20, 4096, &[8; 4096]).0, Status::Ok);
        assert_eq!(live.all.call(1, Op::Read, looks * 4096, 4096, &[]).1, [7; 4096]);
    }
    live.all.close();
}

/// A satellite that was not told of new layers sends everything home.
#[test]
fn a_satellite_that_was_not_told() {
    let mut live = Live::new(2, 4096, 3 << 20, 5, 1, 0);
    assert_eq!(live.all.call(1, Op::Write, 0, 4096, &[1; 4096]).0, Status::Ok);
    let n = live.add_device(overlay(live.disk, 4096));
    live.pause();
    live.chain.push(n);
    let ports = live.ports();
    let new = Stack::new(&mut open(&[&live.devices[1], &live.devices[0]]), &ports).unwrap();
    let home = &mut live.all.home;
    home.with_image(0, |i, leaves| i.restack(new, leaves, true)).unwrap().unwrap();
    live.resume();
    assert_eq!(live.all.call(1, Op::Write, 0, 4096, &[2; 4096]).0, Status::Ok);
    assert_eq!(live.all.call(0, Op::Read, 0, 4096, &[]), (Status::Ok, vec![2; 4096]));
    live.pause();
    if let Some(lower) = contents(&live.devices[0]) {
        assert!(lower[..4096].iter().all(|&b| b == 1), "the layer below was written to");
    }
}
