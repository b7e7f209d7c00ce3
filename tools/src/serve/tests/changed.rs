//! What is told of changed blocks: never less than what differs.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sim::Rng;

use super::died::Corpse;
use super::repository::{Rig, SR};
use super::*;
use crate::serve::repositories::Coalescer;

/// Blocks of the test's disk.
const BLOCKS: u64 = SIZE / (64 << 10);
/// What is written at a time.
const UNIT: usize = 4096;

impl Ours {
    /// The blocks that have changed; the error's code else.
    fn changed(&self, from: &str, to: &str) -> Result<BTreeSet<u64>, String> {
        let args = json!({"sr": SR, "key": from, "key2": to, "offset": 0, "length": -1});
        let answer = self.asked("Volume.list_changed_blocks", args);
        if let Some(code) = answer["error"]["code"].as_str() {
            return Err(code.to_owned());
        }
        let result = &answer["result"];
        assert_eq!(result["granularity"], 65536);
        let bits = STANDARD.decode(result["bitmap"].as_str().unwrap()).unwrap();
        let is = |at: &u64| bits[(at / 8) as usize] & 0x80 >> (at % 8) != 0;
        Ok((0..bits.len() as u64 * 8).filter(is).collect())
    }

    fn of(&self, method: &str, key: &str) -> Value {
        self.smapi(&format!("Volume.{method}"), json!({"sr": SR, "key": key}))
    }

    fn taken(&self, key: &str) -> String {
        self.of("snapshot", key)["key"].as_str().unwrap().to_owned()
    }

    fn coalescer(&self) -> Coalescer {
        let (repositories, images) =
            (self.control.repositories.clone(), self.control.images.clone());
        Coalescer::new(repositories, images, 1 << 30, Arc::default())
    }
}

fn set(blocks: &[u64]) -> BTreeSet<u64> {
    blocks.iter().copied().collect()
}

/// A write into a block.
fn touch(guest: &mut Guest, block: u64, byte: u8) {
    guest.write(block * 128 + 8, byte, UNIT);
}

/// The backup program's cycle, under a guest that writes: of the last snapshot but the record is left.
#[test]
fn a_backup_reads_what_has_changed_since_the_last_one() {
    let rig = Rig::new();
    let ours = rig.world.serve(2, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    assert_eq!(ours.of("stat", &key)["cbt_enabled"], false);
    let mut guest = rig.guest(&ours, 3, &key);
    touch(&mut guest, 1, 1);
    assert_eq!(ours.of("enable_cbt", &key), Value::Null);
    assert_eq!(ours.of("stat", &key)["cbt_enabled"], true);
    let mut last = ours.taken(&key);
    let mut coalescer = ours.coalescer();
    for round in 2..6u8 {
        assert_eq!(ours.of("data_destroy", &last), Value::Null);
        let stat = ours.of("stat", &last);
        assert_eq!(stat["volume_type"], json!(["CBT_Metadata", null]));
        assert_eq!((&stat["cbt_enabled"], &stat["read_write"]), (&json!(true), &json!(false)));
        let mut blocks = vec![u64::from(round), 100, 20 + u64::from(round)];
        blocks.iter().for_each(|&block| touch(&mut guest, block, round));
        // That of the round before, which came after the snapshot.
        blocks.extend((round > 2).then_some(60));
        // To the disk that is written to, whose tables are not on the drive yet.
        assert_eq!(ours.changed(&last, &key).unwrap(), set(&blocks));
        let next = ours.taken(&key);
        touch(&mut guest, 60, round);
        // What was the last one but one becomes one with what was the last one.
        for _ in 0..2 {
            assert_eq!(ours.changed(&last, &next).unwrap(), set(&blocks), "round {round}");
            coalescer.one();
        }
        ours.of("destroy", &last);
        coalescer.one();
        last = next;
    }
    // The volume of the last snapshot, and the disk's.
    assert_eq!(rig.volumes().len(), 2);
    // A record has no data that anybody could have.
    ours.of("data_destroy", &last);
    let domain = json!({"uri": super::repository::uri(&last), "domain": "1"});
    for method in ["Datapath.attach", "Datapath.activate"] {
        assert!(ours.asked(method, domain.clone())["error"].is_object());
    }
    for method in ["snapshot", "clone", "resize", "enable_cbt"] {
        let args = json!({"sr": SR, "key": last, "new_size": 2 * SIZE});
        let refused = ours.asked(&format!("Volume.{method}"), args);
        assert_eq!(refused["error"].is_object(), method != "enable_cbt", "{refused}");
    }
    let back = json!({"sr": SR, "key": key, "snapshot": last});
    rig.unplug(&ours, guest, &key);
    assert!(ours.asked("Volume.revert", back)["error"].is_object());
    assert_eq!(ours.changed(&last, &key).unwrap(), set(&[60]));
    // It rests, and stays on a volume of its own as long as the record tells of changes to it.
    coalescer.one();
    assert_eq!(rig.volumes().len(), 3);
    drop(coalescer);
    ours.stop();
    let ours = rig.world.serve(1, Notify::Direct);
    assert_eq!(ours.changed(&last, &key).unwrap(), set(&[60]));
    ours.of("destroy", &last);
    ours.coalescer().one();
    assert_eq!(rig.volumes().len(), 1);
    ours.stop();
    rig.check();
}

#[test]
fn who_asks_for_what_cannot_be_told_is_told_so() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let (key, other) = (ours.disk(SIZE), ours.disk(SIZE));
    let first = ours.taken(&key);
    const UNKNOWN: &str = "SR_BACKEND_FAILURE_460";
    assert_eq!(ours.changed(&first, &key).unwrap_err(), UNKNOWN, "not enabled");
    ours.of("enable_cbt", &key);
    ours.of("enable_cbt", &other);
    assert_eq!(ours.changed(&first, &key).unwrap_err(), UNKNOWN, "not enabled for both");
    let first = ours.taken(&key);
    assert_eq!(ours.changed(&first, &key).unwrap(), set(&[]));
    assert_eq!(ours.changed(&first, &other).unwrap_err(), UNKNOWN);
    assert_eq!(ours.changed(&first, &first).unwrap_err(), UNKNOWN);
    assert_eq!(ours.changed(&first, "none").unwrap_err(), "Volume_does_not_exist");
    // A part of it, and what is none.
    let part = |offset: i64, length: i64| {
        let args = json!({"sr": SR, "key": first, "key2": key, "offset": offset, "length": length});
        let answer = ours.asked("Volume.list_changed_blocks", args);
        answer["result"]["bitmap"].as_str().map(str::to_owned)
    };
    let mut guest = rig.guest(&ours, 3, &key);
    touch(&mut guest, 33, 1);
    assert_eq!(part(32 << 16, 64 << 16).unwrap(), STANDARD.encode([0x40, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(part(0, 1).unwrap(), STANDARD.encode([0; 4]));
    for (offset, length) in [(-1, 5), (0, -2), (i64::MIN, i64::MIN)] {
        assert_eq!(part(offset, length), None);
    }
    assert_eq!(part(i64::MAX, i64::MAX).unwrap(), "");
    // In use: its data is not taken from under a reader.
    rig.plug(&ours, 4, &first);
    let refused = ours.asked("Volume.data_destroy", json!({"sr": SR, "key": first}));
    assert_eq!(refused["error"]["code"], "SR_BACKEND_FAILURE_24", "{refused}");
    ours.of("disable_cbt", &key);
    assert_eq!(ours.changed(&first, &key).unwrap_err(), UNKNOWN);
    ours.stop();
}

/// A snapshot as it was, or the disk as it is.
#[derive(Clone)]
struct Point {
    key: String,
    units: Vec<u8>,
    /// How many writes there had been.
    at: usize,
    /// How often the disk had been made again what a snapshot was.
    life: u32,
    /// Its data is there.
    data: bool,
}

struct Trial {
    rig: Rig,
    rng: Rng,
    disk: Point,
    points: Vec<Point>,
    /// The blocks of each write.
    touched: Vec<u64>,
    asked: u32,
    exact: u32,
    told: usize,
}

/// Units of a block.
const PER: usize = (64 << 10) / UNIT;

fn differing(a: &[u8], b: &[u8]) -> BTreeSet<u64> {
    let of = |units: &[u8], at: usize| units[at * PER..][..PER].to_vec();
    let differs = |at: &u64| of(a, *at as usize) != of(b, *at as usize);
    (0..BLOCKS).filter(differs).collect()
}

impl Trial {
    fn new(seed: u64) -> (Trial, Ours) {
        let rig = Rig::of(256 << 20);
        let ours = rig.world.serve(1 + seed as usize % 2, Notify::Thread);
        rig.make(&ours);
        let key = ours.disk(SIZE);
        ours.of("enable_cbt", &key);
        let units = vec![0; SIZE as usize / UNIT];
        let disk = Point { key, units, at: 0, life: 0, data: true };
        let (rng, points, touched) = (Rng::new(seed), Vec::new(), Vec::new());
        (Trial { rig, rng, disk, points, touched, asked: 0, exact: 0, told: 0 }, ours)
    }

    fn write(&mut self, guest: &mut Guest) {
        let most = if self.rng.one_in(6) { 2 * PER } else { 9 };
        let len = self.rng.within(1, most as u64) as usize;
        let at = self.rng.below((self.disk.units.len() - len) as u64) as usize;
        let (first, units) = (at as u64 * 8, at..at + len);
        self.touched.extend((at / PER..=(at + len - 1) / PER).map(|block| block as u64));
        self.disk.at = self.touched.len();
        if len < 10 {
            let byte = self.rng.below(4) as u8;
            guest.write(first, byte, len * UNIT);
            return self.disk.units[units].fill(byte);
        }
        // Whole clusters of it become zeroes: what does is seen.
        guest.ring.discard(1, first, len as u64 * 8).unwrap();
        guest.ring.push();
        assert!(guest.answer(&mut []));
        for unit in units {
            guest.ring.read(1, unit as u64 * 8, UNIT as u32).unwrap();
            guest.ring.push();
            let mut data = vec![9; UNIT];
            assert!(guest.answer(&mut data));
            self.disk.units[unit] = data[0];
        }
    }

    /// Takes a snapshot, if there is space.
    fn snapshot(&mut self, ours: &Ours) {
        let made = ours.asked("Volume.snapshot", json!({"sr": SR, "key": self.disk.key}));
        match made["result"]["key"].as_str() {
            Some(key) => self.points.push(Point { key: key.to_owned(), ..self.disk.clone() }),
            None => assert_eq!(made["error"]["code"], "SR_BACKEND_FAILURE_44", "{made}"),
        }
    }

    fn any(&mut self) -> Option<usize> {
        let count = self.points.len() as u64;
        (count > 0).then(|| self.rng.below(count) as usize)
    }

    /// Of all pairs: all that differs is told, and, up to one that has its data, nothing that was not written to.
    fn ask(&mut self, ours: &Ours) {
        for from in &self.points {
            for to in self.points.iter().chain([&self.disk]).filter(|to| to.key != from.key) {
                let told = match ours.changed(&from.key, &to.key) {
                    Ok(told) => told,
                    // What showed the one of them is gone, as the disk is another by now.
                    Err(code) => {
                        assert_eq!(code, "SR_BACKEND_FAILURE_460");
                        let stays = |point: &Point| point.data || point.life == self.disk.life;
                        assert!(!(stays(from) && stays(to)), "{} {}", from.life, to.life);
                        continue;
                    }
                };
                let want = differing(&from.units, &to.units);
                assert!(told.is_superset(&want), "{told:?} lacks some of {want:?}");
                self.asked += 1;
                self.told += told.len();
                if to.data && from.life == to.life && from.at < to.at {
                    let most: BTreeSet<u64> =
                        self.touched[from.at..to.at].iter().copied().collect();
                    assert!(told.is_subset(&most), "{told:?} has more than {most:?}");
                    self.exact += 1;
                }
            }
        }
    }

    fn step(&mut self, mut ours: Ours, guest: &mut Option<Guest>) -> Ours {
        match self.rng.below(24) {
            0..=9 => {
                if let Some(guest) = guest {
                    (0..3).for_each(|_| self.write(guest));
                }
            }
            10..=12 => self.snapshot(&ours),
            13 => {
                if let Some(at) = self.any() {
                    ours.of("destroy", &self.points.remove(at).key);
                }
            }
            14..=16 => {
                let Some(at) = self.any() else { return ours };
                let of = json!({"sr": SR, "key": self.points[at].key});
                let done = ours.asked("Volume.data_destroy", of);
                if done["error"].is_null() {
                    self.points[at].data = false;
                } else {
                    assert_eq!(done["error"]["code"], "SR_BACKEND_FAILURE_44", "{done}");
                }
            }
            17..=19 => ours.coalescer().one(),
            20 => match guest.take() {
                Some(old) => self.rig.unplug(&ours, old, &self.disk.key),
                None => *guest = Some(self.rig.guest(&ours, 9, &self.disk.key)),
            },
            21 => {
                // The next daemon, or the one after one that died.
                let dies = guest.is_some() && self.rng.one_in(2);
                let corpse = dies.then(|| Corpse::of(&self.rig.world, &self.rig.device));
                ours.stop();
                corpse.inspect(|corpse| corpse.lie(&self.rig.world, 9));
                ours = self.rig.world.serve(1 + self.rng.below(2) as usize, Notify::Thread);
            }
            22 => {
                let Some(at) = self.any().filter(|&at| self.points[at].data) else { return ours };
                if guest.is_none() {
                    let (to, key) = (self.points[at].clone(), &self.disk.key);
                    let args = json!({"sr": SR, "key": key, "snapshot": to.key});
                    if ours.asked("Volume.revert", args)["error"].is_null() {
                        self.disk.units = to.units;
                        self.disk.life += 1;
                    }
                }
            }
            _ => self.ask(&ours),
        }
        ours
    }
}

/// Writes, snapshots, ends of snapshots and of their data, merges, reverts, daemons that go and that die, in any
/// order. As many trials as `CBT_TRIALS` says.
#[test]
fn whatever_happens_no_change_is_left_out() {
    let trials = std::env::var("CBT_TRIALS").map_or(4, |n| n.parse().unwrap());
    let (mut asked, mut exact, mut told) = (0, 0, 0);
    for seed in 0..trials {
        let (mut trial, mut ours) = Trial::new(seed);
        let mut guest = Some(trial.rig.guest(&ours, 9, &trial.disk.key));
        for _ in 0..120 {
            ours = trial.step(ours, &mut guest);
        }
        trial.ask(&ours);
        (asked, exact, told) = (asked + trial.asked, exact + trial.exact, told + trial.told);
        if let Some(guest) = guest {
            trial.rig.unplug(&ours, guest, &trial.disk.key);
        }
        ours.stop();
        trial.rig.check();
    }
    tell!("{asked} pairs, {exact} of them told exactly, {told} blocks");
    assert!(asked > 50 * trials as u32 && exact > 15 * trials as u32 && told > 500);
}
