//! Bitmaps that record what guests write: exactly that after a clean close, and after a crash at
//! least that, or they say that they were not saved.

#[path = "bitmaps/faults.rs"]
mod faults;
mod rig;

use block::{Blocking, Flags, Op, Status};
use qcow::create::CreateOptions;
use qcow::edit::{self, BitmapAction};
use qcow::open::Format;
use qcow::run::Options;
use qcow::{Bitmap, ImageMeta, Mode};
use rig::{LogQueue, Rig, Rng, check, cut, fresh, open_stack, qemu_check};

const SECTOR: u64 = 512;
const DISK: u64 = (1 << 20) + 3 * SECTOR;
const SECTORS: u64 = DISK / SECTOR;

/// Where it is tried.
#[derive(Clone, Copy, Debug)]
struct Ground {
    cluster: u64,
    granularities: &'static [u64],
    durable: bool,
    cache: bool,
}

impl Ground {
    fn options(&self) -> Options {
        // Few map pages: they come and go.
        Options { slots: 6, l2_cache: 0, durable_bitmaps: self.durable }
    }

    fn open(&self, leaf: LogQueue) -> Rig {
        Rig::open(vec![leaf], &[Format::Qcow2], self.options())
    }
}

const GROUNDS: [Ground; 6] = [
    Ground { cluster: 65536, granularities: &[65536], durable: false, cache: true },
    Ground { cluster: 65536, granularities: &[512, 1 << 20], durable: true, cache: true },
    Ground { cluster: 4096, granularities: &[4096, 1024], durable: true, cache: false },
    Ground { cluster: 512, granularities: &[4096, 512], durable: false, cache: false },
    Ground { cluster: 512, granularities: &[512], durable: true, cache: true },
    // With subclusters.
    Ground { cluster: 32768, granularities: &[4096, 512], durable: true, cache: true },
];

fn name(granularity: u64) -> String {
    format!("g{granularity}")
}

fn on_disk<T>(leaf: LogQueue, what: impl FnOnce(&mut Blocking<LogQueue>) -> T) -> (LogQueue, T) {
    let mut storage = Blocking::new(leaf, 0).unwrap();
    let result = what(&mut storage);
    (storage.into_leaf(), result)
}

/// An image with something on it, and bitmaps that are empty.
fn made(ground: &Ground, seed: u64) -> LogQueue {
    let mut options = CreateOptions::new(DISK);
    options.cluster_size = ground.cluster;
    options.extended_l2 = ground.cluster == 32768;
    let mut leaf = fresh(3 << 20, seed, &options);
    if !ground.cache {
        leaf = leaf.without_cache();
    }
    let mut rig = Rig::single(leaf);
    let mut rng = Rng(seed + 3);
    for n in 0..12 {
        let first = rng.below(SECTORS - 100);
        rig.write(first * SECTOR, &vec![0x80 + n; (rng.below(100) + 1) as usize * 512]);
    }
    let (leaf, ()) = on_disk(rig.close().remove(0), |st| {
        for &g in ground.granularities {
            let action = BitmapAction::Add { granularity: Some(g) };
            edit::change_bitmap::<Blocking<LogQueue>>(st, "disk", &name(g), &[action], None)
                .unwrap();
        }
    });
    leaf
}

/// Sectors whose bits are set, by bitmap; `None`: it was not saved.
fn bits(leaf: LogQueue, ground: &Ground) -> (LogQueue, Vec<Option<Vec<bool>>>) {
    on_disk(leaf, |st| {
        let meta = ImageMeta::open(st, "disk", Mode::Read).unwrap();
        let one = |&g: &u64| {
            let mut bitmap = match Bitmap::open(st, &meta, &name(g)) {
                Ok(bitmap) => bitmap,
                Err(e) => {
                    assert!(e.to_string().contains("not saved"), "{e}");
                    return None;
                }
            };
            let mut set = Vec::new();
            while let Some(run) = bitmap.run(st, set.len() as u64 * SECTOR, u64::MAX).unwrap() {
                set.resize(((run.offset + run.len) / SECTOR) as usize, run.dirty);
            }
            assert_eq!(set.len() as u64, SECTORS);
            Some(set)
        };
        ground.granularities.iter().map(one).collect()
    })
}

/// Random changes; what they touched is noted in `touched`, by bitmap.
fn change(rig: &mut Rig, rng: &mut Rng, count: u32, ground: &Ground, touched: &mut [Vec<bool>]) {
    let crowd = rng.below(SECTORS);
    let mut sent = 0;
    while sent < count || rig.portal.in_flight() > 0 {
        if sent < count && rig.portal.in_flight() < 6 {
            sent += 1;
            let n = if rng.one_in(6) { 1 + rng.below(400) } else { 1 + rng.below(16) };
            let first =
                if rng.one_in(2) { (crowd + rng.below(64)) % SECTORS } else { rng.below(SECTORS) };
            let n = n.min(SECTORS - first);
            let (op, flags) = match rng.below(12) {
                0..6 => (Op::Write, Flags::NONE),
                6 => (Op::Write, Flags::FUA),
                7 => (Op::WriteZeroes, Flags::NONE),
                8 => (Op::WriteZeroes, Flags::NO_UNMAP),
                9 => (Op::Discard, Flags::NONE),
                10 => (Op::Read, Flags::NONE),
                _ => (Op::Flush, Flags::NONE),
            };
            let (offset, len) = match op {
                Op::Flush => (0, 0),
                _ => (first * SECTOR, n * SECTOR),
            };
            let data = if op == Op::Write { vec![sent as u8 | 1; len as usize] } else { vec![] };
            rig.send(op, flags, offset, len, &data);
            if matches!(op, Op::Write | Op::WriteZeroes | Op::Discard) {
                for (&g, touched) in ground.granularities.iter().zip(touched.iter_mut()) {
                    let from = offset / g * g / SECTOR;
                    let to = (offset + len).next_multiple_of(g).min(DISK) / SECTOR;
                    touched[from as usize..to as usize].fill(true);
                }
            }
        }
        for (_, status, _) in rig.turn() {
            assert_eq!(status, Status::Ok);
        }
    }
}

fn untouched(ground: &Ground) -> Vec<Vec<bool>> {
    vec![vec![false; SECTORS as usize]; ground.granularities.len()]
}

#[test]
fn a_clean_close_leaves_the_bits_of_what_was_written_and_no_others() {
    for (i, ground) in GROUNDS.iter().enumerate() {
        let mut rng = Rng(50 + i as u64);
        let mut leaf = made(ground, 7 + i as u64);
        let mut touched = untouched(ground);
        for (round, count) in [0, 1, 5, 30, 60].into_iter().enumerate() {
            let what = format!("{ground:?} round {round}");
            let mut rig = ground.open(leaf);
            change(&mut rig, &mut rng, count, ground, &mut touched);
            leaf = rig.close().remove(0);
            let (l, found) = bits(leaf, ground);
            for (found, touched) in found.into_iter().zip(&touched) {
                assert!(found.unwrap() == *touched, "{what}");
            }
            let (l, bad, leaks) = check(l);
            assert_eq!((bad, leaks), (0, 0), "{what}");
            assert!(matches!(qemu_check(&l.data()), None | Some(0)), "{what}");
            leaf = l;
        }
    }
}

/// All that the disk shows.
fn shows(leaf: LogQueue) -> (LogQueue, Vec<u8>) {
    let (stack, leaves) = open_stack(vec![leaf], &[Format::Qcow2], false).unwrap();
    let mut rig = Rig::attach(stack, leaves, Options::default());
    let mut all = Vec::new();
    while (all.len() as u64) < DISK {
        let at = all.len() as u64;
        all.extend(rig.read(at, (DISK - at).min(128 << 10)));
    }
    (rig.close().remove(0), all)
}

/// Whether bitmaps that can be trusted have bits for all that differs.
#[track_caller]
fn covers(found: &[Option<Vec<bool>>], old: &[u8], new: &[u8], what: &str) {
    for found in found.iter().flatten() {
        for (i, (a, b)) in old.chunks(512).zip(new.chunks(512)).enumerate() {
            assert!(a == b || found[i], "{what}: sector {i} changed, and its bit is clear");
        }
    }
}

#[test]
fn after_a_power_cut_no_bitmap_that_is_trusted_lacks_a_bit() {
    for (i, ground) in GROUNDS.iter().enumerate() {
        let (mut trusted, mut lost) = (0, 0);
        for seed in 0..3 {
            let mut rng = Rng(1000 * seed + i as u64 + 1);
            let (mut leaf, old) = shows(made(ground, seed + 11));
            leaf.start_log();
            let mut rig = ground.open(leaf);
            let mut touched = untouched(ground);
            change(&mut rig, &mut rng, 40, ground, &mut touched);
            // Also in the middle of a close, or of the opening after it.
            let mut leaf = match rng.one_in(2) {
                true => rig.crash().remove(0),
                false => ground.open(rig.close().remove(0)).crash().remove(0),
            };
            let (base, log) = leaf.take_log();
            for _ in 0..8 {
                let at = rng.below(log.len() as u64 + 1) as usize;
                let what = format!("{ground:?} seed {seed}, cut at {at} of {}", log.len());
                let disk = cut(&base, &log, at, ground.cache, &mut rng);
                let mut leaf = LogQueue::new(3 << 20, 99);
                leaf.load(&disk);
                let (leaf, bad, _) = check(leaf);
                assert_eq!(bad, 0, "{what}");
                let (leaf, new) = shows(leaf);
                let (leaf, found) = bits(leaf, ground);
                covers(&found, &old, &new, &what);
                trusted += found.iter().flatten().count();
                lost += found.iter().filter(|f| f.is_none()).count();
                // And it goes on.
                let mut rig = ground.open(leaf);
                change(&mut rig, &mut rng, 6, ground, &mut untouched(ground));
                let (leaf, again) = bits(rig.close().remove(0), ground);
                let (_, new) = shows(leaf);
                covers(&again, &old, &new, &what);
                let gone =
                    |b: &[Option<Vec<bool>>]| b.iter().map(Option::is_none).collect::<Vec<_>>();
                assert_eq!(gone(&found), gone(&again), "{what}");
            }
        }
        assert_eq!(lost == 0, ground.durable, "{ground:?}: {trusted} trusted, {lost} lost");
        assert!(trusted > 0, "{ground:?}");
    }
}

#[test]
fn where_all_bits_are_set_writes_go_straight_down() {
    for durable in [false, true] {
        let ground = Ground { cluster: 65536, granularities: &[4096], durable, cache: true };
        let mut options = CreateOptions::new(DISK);
        options.cluster_size = ground.cluster;
        let mut rig = Rig::single(fresh(3 << 20, 5, &options));
        for at in (0..1 << 20).step_by(128 << 10) {
            rig.write(at, &vec![1; 128 << 10]);
        }
        let (leaf, ()) = on_disk(rig.close().remove(0), |st| {
            let add = BitmapAction::Add { granularity: Some(4096) };
            edit::change_bitmap::<Blocking<LogQueue>>(st, "disk", "g4096", &[add], None).unwrap();
        });
        let options = Options { durable_bitmaps: durable, ..Options::default() };
        let mut rig = Rig::open(vec![leaf], &[Format::Qcow2], options);
        let straight = |rig: &mut Rig, op, at: u64, len: u64| {
            let before = rig.image().hits();
            let data = vec![7; len as usize];
            assert_eq!(rig.call(op, at, len, &data).0, Status::Ok);
            rig.image().hits() - before == 1
        };
        // Reads load the map; then the flag does not bother them, nor the border to what is marked.
        straight(&mut rig, Op::Read, 0, 4096);
        assert!(!straight(&mut rig, Op::Write, 0, 65536), "to be recorded");
        assert!(straight(&mut rig, Op::Write, 0, 65536), "recorded");
        assert!(straight(&mut rig, Op::Write, 4096, 4096));
        assert!(straight(&mut rig, Op::Read, 32768, 65536));
        assert!(!straight(&mut rig, Op::Write, 65536, 4096), "a part of a cluster");
        assert!(!straight(&mut rig, Op::Write, 65536, 4096), "others of its bits are clear");
        assert!(!straight(&mut rig, Op::Write, 65536 + 4096, 65536 - 4096));
        assert!(straight(&mut rig, Op::Write, 0, 131072));
        // No cluster moved for any of this.
        assert_eq!(rig.image().counters().allocated.get(), 0);
        let (_, found) = bits(rig.close().remove(0), &ground);
        let set = found[0].as_ref().unwrap().iter().filter(|&&b| b).count();
        assert_eq!(set, 256);
    }
}

#[test]
fn a_pause_saves_and_what_follows_is_recorded_again() {
    let ground = Ground { cluster: 4096, granularities: &[4096], durable: false, cache: true };
    let mut rig = ground.open(made(&ground, 3));
    let in_use = |rig: &mut Rig| {
        let data = rig.leaf(0).data();
        let mut copy = LogQueue::new(3 << 20, 1);
        copy.load(&data);
        bits(copy, &ground).1[0].clone()
    };
    assert!(in_use(&mut rig).is_some(), "nothing is recorded yet");
    rig.write(0, &[1; 512]);
    assert!(in_use(&mut rig).is_none());
    let pause = |rig: &mut Rig| {
        rig.image().pause();
        while rig.image().paused().is_none() {
            rig.turn();
        }
        assert_eq!(rig.image().paused(), Some(Status::Ok));
    };
    pause(&mut rig);
    let first = in_use(&mut rig).unwrap();
    assert_eq!(first.iter().filter(|&&b| b).count(), 8);
    rig.image().resume();
    rig.write(512, &[2; 512]);
    assert_eq!(in_use(&mut rig), Some(first), "that bit is there");
    rig.write(8192, &[2; 512]);
    assert!(in_use(&mut rig).is_none());
    let (_, found) = bits(rig.close().remove(0), &ground);
    assert_eq!(found[0].as_ref().unwrap().iter().filter(|&&b| b).count(), 16);
}

#[test]
fn bits_that_cannot_be_written_are_in_the_way_of_the_data_only_as_long() {
    for durable in [false, true] {
        let ground = Ground { cluster: 4096, granularities: &[4096], durable, cache: true };
        let mut rig = ground.open(made(&ground, 3));
        rig.leaf(0).fail = Some((Op::Write, Status::Medium, 1));
        assert_eq!(rig.call(Op::Write, 0, 512, &[1; 512]).0, Status::Medium);
        let (leaf, found) = bits(rig.crash().remove(0), &ground);
        assert!(!found[0].as_ref().is_some_and(|b| b[0]));
        let mut rig = ground.open(leaf);
        rig.write(0, &[1; 512]);
        let (leaf, found) = bits(rig.close().remove(0), &ground);
        assert!(found[0].as_ref().unwrap()[0]);
        // Bits that cannot be read are taken for set.
        let mut rig = ground.open(leaf);
        rig.read(0, 512);
        rig.leaf(0).fail = Some((Op::Read, Status::Medium, 1));
        rig.write(0, &[1; 512]);
        let (_, found) = bits(rig.close().remove(0), &ground);
        assert!(found[0].as_ref().unwrap().iter().all(|&b| b));
    }
}

#[test]
fn bitmaps_that_make_no_sense_are_given_up_and_the_disk_is_served() {
    use block::Storage;
    let ground = GROUNDS[0];
    let vouched = |leaf: LogQueue| {
        on_disk(leaf, |st| {
            ImageMeta::open(st, "disk", Mode::Read).unwrap().header.autoclear_features & 1 != 0
        })
    };
    for (what, at, byte) in [("flags", 12, 0x80), ("granularity", 17, 99), ("table", 5, 0xff)] {
        let (leaf, ()) = on_disk(made(&ground, 3), |st| {
            let header = ImageMeta::open(st, "disk", Mode::Read).unwrap().header;
            let place = header.bitmaps().unwrap().directory_offset + at;
            st.write_at(place, &[byte]).unwrap();
        });
        let (leaf, there) = vouched(leaf);
        assert!(there);
        let mut rig = ground.open(leaf);
        rig.write(0, &[1; 512]);
        let (leaf, there) = vouched(rig.close().remove(0));
        assert!(!there, "{what}");
        let (_, bad, _) = check(leaf);
        assert_eq!(bad, 0, "{what}");
    }
    // One that was not saved stays so; one that records nothing stays as it is.
    let (leaf, ()) = on_disk(made(&ground, 3), |st| {
        let off = [BitmapAction::Add { granularity: None }, BitmapAction::Disable];
        edit::change_bitmap::<Blocking<LogQueue>>(st, "disk", "off", &off, None).unwrap();
        let header = ImageMeta::open(st, "disk", Mode::Read).unwrap().header;
        let flags = header.bitmaps().unwrap().directory_offset + 12;
        st.write_at(flags, &3u32.to_be_bytes()).unwrap();
    });
    let mut rig = ground.open(leaf);
    rig.write(0, &[1; 512]);
    let (leaf, found) = bits(rig.close().remove(0), &ground);
    assert!(found[0].is_none());
    let (leaf, run) = on_disk(leaf, |st| {
        let meta = ImageMeta::open(st, "disk", Mode::Read).unwrap();
        Bitmap::open(st, &meta, "off").unwrap().run(st, 0, u64::MAX).unwrap().unwrap()
    });
    assert!(!run.dirty && run.len == DISK);
    assert_eq!(check(leaf).1, 0);
}
