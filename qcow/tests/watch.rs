//! A copy of a disk that several reactors write to: what changed is taken, read once that has settled,
//! and put into the copy, while random requests go on, in a seeded order. At the end both are alike.

mod rig;

use block::{Flags, Op, Status};
use qcow::run::{Options, Taken};
use rig::Rng;
use rig::several::{Client, Hammer, Several};

/// Follows a disk.
struct Copier {
    client: Client,
    copy: Vec<u8>,
    at: u64,
    taken: Option<Taken>,
    /// Parts to be read, and those that are.
    parts: Vec<(u64, u64)>,
    reading: std::collections::HashMap<u64, (u64, u64)>,
    cluster: u64,
}

impl Copier {
    fn new(all: &mut Several, disk: u64, cluster: u64) -> Copier {
        all.home.image(0).unwrap().watch().unwrap();
        Copier {
            client: Client::new(&mut all.home),
            copy: vec![0xEE; disk as usize],
            at: 0,
            taken: None,
            parts: Vec::new(),
            reading: std::collections::HashMap::new(),
            cluster,
        }
    }

    fn step(&mut self, all: &mut Several, most: u64) {
        for (id, status, data) in self.client.answers() {
            assert_eq!(status, Status::Ok);
            let (at, len) = self.reading.remove(&id).unwrap();
            let to = &mut self.copy[at as usize..(at + len) as usize];
            to.copy_from_slice(&data.unwrap()[..len as usize]);
        }
        if self.reading.len() < 16
            && let Some((at, len)) = self.parts.pop()
        {
            // The rig takes so many pieces at a time.
            let n = len.min(8 * self.cluster).min(64 << 10);
            let id = self.client.send(Op::Read, Flags::NONE, at, n, &[]);
            self.reading.insert(id, (at, n));
            if len > n {
                self.parts.push((at + n, len - n));
            }
            return;
        }
        if !self.reading.is_empty() {
            return;
        }
        let image = all.home.image(0).unwrap();
        match self.taken.take() {
            Some(taken) if image.has_settled(taken.stamp) => self.parts = taken.parts,
            Some(taken) => self.taken = Some(taken),
            None => {
                let taken = image.take_changed(self.at, most).unwrap();
                self.at = taken.next.unwrap_or(0);
                self.taken = (!taken.parts.is_empty()).then_some(taken);
            }
        }
    }

    /// Goes on until nothing is left, while nobody writes.
    fn end(&mut self, all: &mut Several, most: u64, order: &mut Rng) {
        let mut turns = 0;
        while !self.is_idle() || all.home.image(0).unwrap().changed() != Some(0) {
            self.step(all, most);
            all.turn(order.below(all.clients.len() as u64) as usize);
            turns += 1;
            assert!(turns < 1_000_000, "never done");
        }
    }

    fn is_idle(&self) -> bool {
        self.taken.is_none() && self.parts.is_empty() && self.reading.is_empty()
    }
}

fn contents(all: &mut Several, disk: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < disk {
        let (status, data) = all.call(0, Op::Read, bytes.len() as u64, 32 << 10, &[]);
        assert_eq!(status, Status::Ok);
        bytes.extend(data);
    }
    bytes
}

#[test]
fn a_copy_follows_whatever_is_written() {
    // Cluster, stripe in sectors, reactors, bytes for the map, most to take at a time.
    let cases = [
        (512, 8, 2, 0, 1 << 20),
        (4096, 3, 3, 1 << 20, 64 << 10),
        (65536, 7, 3, 1 << 20, 256 << 10),
        (65536, 1024, 1, 0, 64 << 10),
        (2 << 20, 64, 2, 1 << 20, 1 << 20),
    ];
    for (i, (cluster, stripe, count, cache, most)) in cases.into_iter().enumerate() {
        let (seed, disk) = (311 + i as u64, 3 << 20);
        let options = Options { slots: 24, l2_cache: cache, ..Options::default() };
        let mut all = Several::new(count, cluster, disk, seed, options);
        let n = count as u64;
        let hammer = |c| Hammer::new((c, n), stripe, disk, cluster, seed * 91 + c, 500);
        let mut hammers: Vec<Hammer> = (0..n).map(hammer).collect();
        let mut order = Rng(seed * 5 + 1);
        let mut copier = None;
        // What was missed shows if nobody writes there again, so there are many ends.
        for phase in 0..40 {
            let mut turns = 0;
            while !hammers.iter().all(Hammer::done) {
                let who = order.below(n) as usize;
                hammers[who].step(&mut all.clients[who]);
                all.turn(order.below(n) as usize);
                // It begins in the middle of the traffic.
                if turns == 200 {
                    copier.get_or_insert_with(|| Copier::new(&mut all, disk, cluster));
                }
                if let Some(copier) = &mut copier {
                    copier.step(&mut all, most);
                }
                turns += 1;
                assert!(turns < 1_000_000, "never ends");
            }
            let copier = copier.as_mut().unwrap();
            copier.end(&mut all, most, &mut order);
            let now = contents(&mut all, disk);
            let wrong = (0..disk as usize / 512).find(|s| {
                let sector = s * 512..(s + 1) * 512;
                now[sector.clone()] != copier.copy[sector]
            });
            assert_eq!(wrong, None, "case {i}, phase {phase}: a sector differs");
            hammers.iter_mut().for_each(|h| h.left = 60);
        }
        let hits: u64 = all.away.iter_mut().map(|c| c.image(0).unwrap().hits()).sum();
        assert!(count == 1 || hits > 100, "only {hits} requests went straight down");
        drop(copier);
        all.close();
    }
}

#[test]
fn a_watch_costs_only_the_first_write_after_a_part_was_taken() {
    let options = Options { slots: 16, l2_cache: 1 << 20, ..Options::default() };
    let mut all = Several::new(1, 65536, 4 << 20, 7, options);
    let data = vec![1; 4096];
    let write = |all: &mut Several| {
        let before = all.home.image(0).unwrap().hits();
        assert_eq!(all.call(0, Op::Write, 65536, 4096, &data).0, Status::Ok);
        all.home.image(0).unwrap().hits() - before
    };
    write(&mut all);
    assert_eq!(write(&mut all), 1, "it goes straight down");
    all.home.image(0).unwrap().watch().unwrap();
    assert!(all.home.image(0).unwrap().watch().is_err(), "for one at a time");
    assert_eq!(write(&mut all), 1, "all counts as changed");
    let taken = all.home.image(0).unwrap().take_changed(0, u64::MAX).unwrap();
    assert_eq!((taken.parts, taken.next), (vec![(0, 4 << 20)], None));
    assert_eq!(all.home.image(0).unwrap().changed(), Some(0));
    assert_eq!(write(&mut all), 0, "it is recorded");
    assert_eq!(all.home.image(0).unwrap().changed(), Some(65536));
    assert_eq!(write(&mut all), 1, "once");
    let taken = all.home.image(0).unwrap().take_changed(0, 1).unwrap();
    assert_eq!((taken.parts, taken.next), (vec![(65536, 65536)], Some(131_072)));
    // What is left of it when it has ended goes with the next write.
    let image = all.home.image(0).unwrap();
    image.unwatch();
    assert_eq!((image.changed(), image.take_changed(0, 1)), (None, None));
    assert_eq!(write(&mut all), 0);
    assert_eq!(write(&mut all), 1);
    all.home.image(0).unwrap().watch().unwrap();
    all.close();
}
