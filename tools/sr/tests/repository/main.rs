//! Repositories on devices in memory: operations against a plain model, cut at every write.

mod changed;
mod compose;
mod merges;
#[path = "../../../../nvme/volume/tests/rig/mod.rs"]
mod rig;

use std::collections::BTreeMap;
use std::time::Instant;

use block::Storage;
use rig::{Fault, Memory, author};
use sim::{Disk as SimDisk, DiskConfig, Rng, Sabotage, Trace};
use sr::fields::Fields;
use sr::{Disk, Error, NewDisk, NewRepository, Node, Repository, Text, probe};
use volume::{Group, HostIds, Id, Shape, Vg};

const MIB: u64 = 1 << 20;

fn new(stripes: u32) -> NewRepository {
    NewRepository {
        id: "0e6f7a3c-95a1-4b8e-9d5f-1c2b3a4d5e6f".to_owned(),
        name: "Fast ones".to_owned(),
        description: String::new(),
        stripes,
        system_id: Some("me".to_owned()),
    }
}

fn make(devices: usize, size: u64) -> (Vec<Memory>, Repository<Memory>) {
    let devices: Vec<Memory> = (0..devices).map(|_| Memory::new(size)).collect();
    let stripes = devices.len() as u32;
    let repository = Repository::create(devices.clone(), &new(stripes), &author()).unwrap();
    (devices, repository)
}

fn host(name: &str) -> HostIds {
    HostIds { lvm: Some(name.to_owned()), ..HostIds::default() }
}

fn open(devices: &[Memory]) -> Repository<Memory> {
    Repository::open(devices.iter().map(Memory::deep).collect(), &host("me")).unwrap()
}

/// Whether what stands in the images' headers is what is said of them.
fn fits<S: Storage>(repository: &mut Repository<S>) -> bool {
    let group = repository.stat().group;
    let keys: Vec<String> = repository.list().map(|(disk, _)| disk.key.clone()).collect();
    let chains = keys.iter().flat_map(|key| repository.chain(key).unwrap());
    let nodes: Vec<Node> = chains.cloned().collect();
    nodes.into_iter().all(|node| {
        let mut head = [0; 4096];
        repository.storage(&node.lv).unwrap().read_at(0, &mut head).unwrap();
        let word = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().unwrap());
        let (at, len) = (word(8) as usize, word(16) as usize >> 32);
        let backing = node.parent.map(|parent| format!("/dev/{group}/{parent}"));
        head.starts_with(b"QFI\xfb")
            && word(24) == node.size
            && head.get(at..at + len) == Some(backing.unwrap_or_default().as_bytes())
    })
}

/// All that is said of the disks, and is so.
fn seen<S: Storage>(repository: &mut Repository<S>) -> BTreeMap<String, (Disk, Node)> {
    assert!(fits(repository));
    let all = repository.list();
    all.map(|(disk, node)| (disk.key.clone(), (disk.clone(), node.clone()))).collect()
}

fn disk(size: u64) -> NewDisk {
    NewDisk { name: "a disk".to_owned(), size, ..NewDisk::default() }
}

#[test]
fn a_repository_is_found_again() {
    let (devices, mut r) = make(2, 256 * MIB);
    let key = r.create_disk(&disk(10 * MIB + 1), &author()).unwrap();
    r.set_key(&key, "vdi-type", Some("user"), &author()).unwrap();
    r.set_key(&key, "empty", Some(""), &author()).unwrap();
    r.set_key(&key, "gone", Some("x"), &author()).unwrap();
    r.set_key(&key, "gone", None, &author()).unwrap();
    r.set_text(&key, Text::Name, "Ünïcödé: 100 %\n", &author()).unwrap();
    let (stat, before) = (r.stat(), seen(&mut r));
    assert_eq!(stat.group, "pd-0e6f7a3c-95a1-4b8e-9d5f-1c2b3a4d5e6f");
    // Tables and all: in stripes over both, whole extents of 4 MiB.
    assert_eq!(stat.total - stat.free, before[&key].1.used);
    assert!(before[&key].1.used >= 12 * MIB);
    let mut again = open(&devices);
    assert_eq!((again.stat(), seen(&mut again)), (stat, before.clone()));
    let (known, node) = &before[&key];
    assert_eq!(node.size, 12 * MIB, "rounded up to 2 MiB");
    assert_eq!((&*known.name, known.read_only), ("Ünïcödé: 100 %\n", false));
    let keys: Vec<_> = known.keys.iter().map(|(k, v)| (&**k, &**v)).collect();
    assert_eq!(keys, [("empty", ""), ("vdi-type", "user")]);
    for device in &devices {
        assert_eq!(probe(&mut device.deep()).unwrap(), Some(new(1).id));
    }
    assert_eq!(probe(&mut Memory::new(64 * MIB)).unwrap(), None);
    let copies = || devices.iter().map(|device| device.deep().to_read()).collect();
    let elsewhere = Repository::open(copies(), &host("you"));
    assert!(matches!(elsewhere, Err(Error::Group(volume::Error::Foreign { .. }))));
    assert_eq!(seen(&mut Repository::look(copies()).unwrap()), before);
}

#[test]
fn snapshots_and_clones_share_what_they_stand_on() {
    let (_, mut r) = make(1, 1024 * MIB);
    let a = r.create_disk(&disk(16 * MIB), &author()).unwrap();
    r.set_key(&a, "mine", Some("1"), &author()).unwrap();
    let s = r.snapshot(&a, &author()).unwrap().key;
    let c = r.clone_disk(&s, &author()).unwrap().key;
    let d = r.clone_disk(&a, &author()).unwrap().key;
    let all = seen(&mut r);
    let keys = |key: &str| all[key].0.keys.len();
    assert_eq!((keys(&a), keys(&s), keys(&c), keys(&d)), (1, 0, 0, 0));
    assert!(all[&s].0.read_only && !all[&c].0.read_only && !all[&d].0.read_only);
    let depth = |r: &Repository<Memory>, key: &str| r.chain(key).unwrap().len();
    // A is on what it had in common with D, which is on the snapshot.
    assert_eq!([&a, &s, &c, &d].map(|key| depth(&r, key)), [3, 1, 2, 3]);
    // What is written goes nowhere that another one reads.
    let lvs = |r: &Repository<Memory>| r.group().vg().lvs.len();
    assert_eq!(lvs(&r), 5);
    r.destroy(&s, &author()).unwrap();
    assert_eq!(lvs(&r), 5, "others stand on it");
    assert!(matches!(r.disk(&s), Err(Error::NoDisk(_))));
    r.destroy(&d, &author()).unwrap();
    assert_eq!(lvs(&r), 4);
    r.destroy(&c, &author()).unwrap();
    assert_eq!((lvs(&r), depth(&r, &a)), (3, 3));
    r.destroy(&a, &author()).unwrap();
    assert_eq!((lvs(&r), r.stat().free), (0, r.stat().total));
    assert!(matches!(r.destroy(&a, &author()), Err(Error::NoDisk(_))));
}

#[test]
fn a_revert_keeps_the_disk_and_gives_its_volume_back() {
    let (_, mut r) = make(1, 1024 * MIB);
    let a = r.create_disk(&disk(16 * MIB), &author()).unwrap();
    let s = r.snapshot(&a, &author()).unwrap().key;
    let top = r.disk(&a).unwrap().1.lv.clone();
    r.revert(&s, &a, &author()).unwrap();
    let all = seen(&mut r);
    assert_eq!(all[&a].1.parent.as_ref(), Some(&all[&s].1.lv));
    assert!(all[&a].1.lv != top && r.group().vg().lvs.len() == 2);
    for (snapshot, to) in [(&a, &s), (&s, &s), (&a, &a)] {
        assert!(matches!(r.revert(snapshot, to, &author()), Err(Error::Refused(_))));
    }
}

/// Whatever stands in the tags.
#[test]
fn tags_that_make_no_sense_are_refused() {
    let (devices, mut r) = make(1, 256 * MIB);
    let a = r.create_disk(&disk(MIB), &author()).unwrap();
    r.snapshot(&a, &author()).unwrap();
    let parent = format!("pd:parent={}", r.chain(&a).unwrap()[1].lv);
    let mine = format!("pd:parent={}", r.chain(&a).unwrap()[0].lv);
    for (old, new) in [
        ("pd:size=2097152", "pd:size=18446744073709551104"),
        ("pd:size=2097152", "pd:size=513"),
        ("pd:size=2097152", "pd:size=0"),
        ("pd:size=2097152", "pd:size=-512"),
        (&*parent, "pd:parent=nobody"),
        (&*parent, &*mine),
        (&*format!("pd:key={a}"), "pd:key=#zz"),
        ("pd:ro=1", "pd:at="),
        (&*parent, "pd:at="),
    ] {
        let copy: Vec<Memory> = devices.iter().map(Memory::deep).collect();
        let mut group = Group::open(copy.clone(), Some("me")).unwrap();
        let edit = |vg: &mut Vg| {
            let tags = vg.lvs.iter_mut().flat_map(|lv| &mut lv.tags);
            let changed = tags.filter(|tag| *tag == old).map(|tag| *tag = new.to_owned()).count();
            assert!(changed > 0, "{old}");
            Ok(())
        };
        group.change(&author(), "by hand", edit).unwrap();
        let refused = Repository::open(copy, &host("me")).map(drop);
        assert!(matches!(refused, Err(Error::Corrupt(_))), "{new}: {refused:?}");
    }
}

#[test]
fn there_is_an_end_to_chains_texts_and_space() {
    let (_, mut r) = make(1, 4096 * MIB);
    let a = r.create_disk(&disk(1), &author()).unwrap();
    let depth = (0..).find(|_| r.snapshot(&a, &author()).is_err()).unwrap();
    assert_eq!(depth + 1, r.chain(&a).unwrap().len());
    assert!(r.snapshot(&a, &author()).unwrap_err().to_string().contains("delete snapshots"));
    let before = seen(&mut r);
    let long = "x".repeat(100_000);
    assert!(r.set_key(&a, "k", Some(&long), &author()).is_err());
    assert!(r.set_key(&a, &long, Some(""), &author()).is_err());
    assert!(r.create_disk(&disk(0), &author()).is_err());
    assert!(r.create_disk(&disk(u64::MAX), &author()).is_err());
    assert_eq!(seen(&mut r), before);
    let full = (0..).find_map(|_| r.create_disk(&disk(1 << 40), &author()).err()).unwrap();
    assert!(matches!(full, Error::Group(volume::Error::NoSpace { .. })), "{full}");
    let lv = r.disk(&a).unwrap().1.lv.clone();
    let grown = (0..).find_map(|_| r.grow(&lv, 1, &author()).err()).unwrap();
    assert!(matches!(grown, Error::Group(volume::Error::NoSpace { .. })), "{grown}");
    assert!(r.disk(&a).unwrap().1.used > 8 * MIB);
}

/// One operation of a random kind.
fn operate(r: &mut Repository<Memory>, rng: &mut Rng) -> sr::Result<()> {
    let keys: Vec<String> = r.list().map(|(disk, _)| disk.key.clone()).collect();
    if keys.is_empty() || rng.one_in(5) {
        return r.create_disk(&disk(rng.within(1, 40) * MIB), &author()).map(drop);
    }
    let key = keys[rng.below(keys.len() as u64) as usize].clone();
    let other = keys[rng.below(keys.len() as u64) as usize].clone();
    match rng.below(10) {
        0 | 1 => r.snapshot(&key, &author()).map(drop),
        2 => r.clone_disk(&key, &author()).map(drop),
        3 => r.destroy(&key, &author()),
        4 => r.revert(&other, &key, &author()),
        5 => r.set_key(&key, "k", Some(&"v".repeat(rng.below(3000) as usize)), &author()),
        6 => r.set_text(&key, Text::Description, "text", &author()),
        7 => r.track(&key, true, &author()),
        8 => r.destroy_data(&key, &author()),
        _ => {
            let lv = r.disk(&key)?.1.lv.clone();
            r.grow(&lv, 1, &author())
        }
    }
}

/// What it says, without the names that are drawn anew each time.
fn shape<S: Storage>(r: &mut Repository<S>) -> Vec<(String, usize, u64, u64, usize, String)> {
    let all = seen(r);
    let mut shape: Vec<_> = all
        .into_iter()
        .map(|(key, (disk, node))| {
            let depth = r.chain(&key).unwrap().len();
            let keys = disk.keys.values().map(String::len).sum();
            let flags = format!(
                "{} {} {:?}",
                disk.read_only,
                disk.cbt,
                node.record.map(|r| r.at.is_some())
            );
            (flags, depth, node.size, node.used, keys, disk.description)
        })
        .collect();
    shape.sort();
    shape
}

#[test]
fn a_cut_leaves_the_state_before_or_the_one_after() {
    let (mut old, mut new, mut done) = (0, 0, 0);
    for seed in 0..4 {
        let mut rng = Rng::new(seed);
        let (mut devices, r) = make(1 + seed as usize % 2, 1024 * MIB);
        drop(r);
        for _ in 0..25 {
            let (before, fork) = (shape(&mut open(&devices)), rng.fork());
            let mut r = open(&devices);
            if operate(&mut r, &mut fork.clone()).is_err() {
                assert_eq!(shape(&mut r), before);
                continue;
            }
            done += 1;
            let after = shape(&mut r);
            let next = r.into_devices();
            for at in 0.. {
                let cut: Vec<Memory> = devices.iter().map(Memory::deep).collect();
                let mut r = Repository::open(cut.clone(), &host("me")).unwrap();
                let fault = Fault { after: at / 2, done: at % 2 == 1 };
                let victim = rng.below(cut.len() as u64) as usize;
                cut[victim].set_fault(Some(fault));
                let result = operate(&mut r, &mut fork.clone());
                if !cut[victim].has_failed() {
                    break;
                }
                drop(r);
                cut[victim].set_fault(None);
                let left = shape(&mut open(&cut));
                assert!(left == after || (left == before && result.is_err()), "seed {seed}");
                old += u32::from(left == before);
                new += u32::from(left == after);
            }
            devices = next;
        }
    }
    assert!(done > 50 && old > 200 && new > 50, "{done} {old} {new}");
}

/// A drive with a volatile cache.
fn drive(bytes: Vec<u8>) -> SimDisk {
    let config = DiskConfig {
        size: bytes.len() as u64,
        block_size: 512,
        volatile_cache: true,
        discarded: None,
        fresh: 0,
        file: false,
    };
    SimDisk::new(config, bytes, Rng::new(1), Trace::default())
}

/// Operations on a drive with a volatile cache, of which any part is lost when its power fails: after
/// each write of each. How often old and new were left, and how often neither was.
fn cut_a_cache(sabotage: Sabotage) -> (u32, u32, u32) {
    let open = |drive: SimDisk| Repository::open(vec![drive], &host("me"));
    // What was there before must not be taken for an image's.
    let r = Repository::create(vec![drive(vec![0xa5; 56 << 20])], &new(1), &author()).unwrap();
    let (mut image, mut rng) = (r.into_devices().remove(0).take_bytes(), Rng::new(3));
    let (mut old, mut new, mut bad) = (0, 0, 0);
    for step in 0..4 {
        let operate = |r: &mut Repository<SimDisk>| {
            let first = r.list().next().map(|(disk, _)| disk.key.clone()).unwrap_or_default();
            match step {
                0 => r.create_disk(&disk(MIB), &author()).map(drop),
                1 => r.snapshot(&first, &author()).map(drop),
                2 => r.clone_disk(&first, &author()).map(drop),
                _ => r.destroy(&first, &author()),
            }
        };
        let mut r = open(drive(image.clone())).unwrap();
        let before = shape(&mut r);
        operate(&mut r).unwrap();
        let after = shape(&mut r);
        let next = r.into_devices().remove(0).take_bytes();
        for at in 0.. {
            let cut = drive(image.clone());
            cut.set_sabotage(sabotage);
            let mut r = open(cut.clone()).unwrap();
            cut.set_power_for(at);
            let done = operate(&mut r).is_ok();
            for _ in 0..3 {
                let left = open(drive(cut.survivor(&mut rng))).ok();
                let left = left.and_then(|mut left| fits(&mut left).then(|| shape(&mut left)));
                match left {
                    Some(left) if left == after => new += 1,
                    Some(left) if left == before && !done => old += 1,
                    _ => bad += 1,
                }
            }
            if done && !cut.is_out() {
                break;
            }
        }
        image = next;
    }
    (old, new, bad)
}

#[test]
fn a_cut_of_a_drive_with_a_cache_leaves_whole_images() {
    let (old, new, bad) = cut_a_cache(Sabotage::None);
    assert!(bad == 0 && old > 30 && new > 10, "{old} {new} {bad}");
}

#[test]
fn a_drive_that_lies_about_flushes_is_found_out() {
    // So the test before this one can fail.
    let (_, _, bad) = cut_a_cache(Sabotage::DropFlushes);
    assert!(bad > 0);
}

#[expect(clippy::disallowed_methods, reason = "a test on no reactor")]
fn now() -> Instant {
    Instant::now()
}

/// What a thousand disks cost: writes are counted, times are shown.
#[test]
fn a_thousand_disks() {
    let (devices, r) = make(1, 80 << 30);
    // All in one change: to make one after the other is what is not measured here.
    let mut group = Group::open(r.into_devices(), Some("me")).unwrap();
    let key = |n: u32| format!("key-{n}");
    let all = |vg: &mut Vg| {
        for n in 0..1000 {
            let (name, mut fields) = (format!("pd-{n}"), Fields::default());
            let id = Id::random().unwrap();
            vg.create_lv(id, &name, 16, Shape::LINEAR, &author())?;
            for (k, v) in [("key", &*key(n)), ("name", "a disk"), ("size", "107374182400")] {
                fields.set(k, v);
            }
            for k in ["vdi-type", "content_id", "snapshot_time", "is_a_snapshot", "snapshot_of"] {
                fields.set(&format!("k.{k}"), "0e6f7a3c-95a1-4b8e-9d5f-1c2b3a4d5e6f");
            }
            fields.write(&mut vg.lvs[n as usize].tags).unwrap();
        }
        Ok(())
    };
    group.change(&author(), "all", all).unwrap();
    let timed = |what: &str, began: Instant| println!("{what}: {:?}", began.elapsed());
    let began = now();
    let mut r = Repository::open(group.into_devices(), &host("me")).unwrap();
    timed("1000 disks opened", began);
    let began = now();
    assert_eq!(r.list().filter(|(disk, _)| disk.keys.len() == 5).count(), 1000);
    timed("listed", began);
    let writes = devices[0].changes();
    let began = now();
    r.set_key(&key(500), "k", Some("v"), &author()).unwrap();
    timed("a key set", began);
    assert!(devices[0].changes() - writes <= 4, "{}", devices[0].changes() - writes);
    let began = now();
    r.create_disk(&disk(100 << 30), &author()).unwrap();
    timed("a disk made", began);
    let began = now();
    r.snapshot(&key(7), &author()).unwrap();
    timed("a snapshot made", began);
    assert_eq!(r.chain(&key(7)).unwrap().len(), 2);
    let again = open(&devices);
    assert_eq!(again.list().count(), 1002);
    assert_eq!(again.disk(&key(500)).unwrap(), r.disk(&key(500)).unwrap());
}

/// The disk became larger after the lower image was frozen.
#[test]
fn a_lower_image_gets_space_for_a_larger_one_above() {
    let (_devices, mut r) = make(1, 1024 * MIB);
    let key = r.create_disk(&disk(8 * MIB), &author()).unwrap();
    let first = r.snapshot(&key, &author()).unwrap();
    r.resized(&key, 512 * MIB, &author()).unwrap();
    r.snapshot(&key, &author()).unwrap();
    r.destroy(&first.key, &author()).unwrap();
    let merge = r.merges().remove(0);
    let used = |r: &Repository<Memory>| r.chain(&key).unwrap()[2].used;
    r.grow_to(&merge.lower, 300 * MIB, &author()).unwrap();
    assert_eq!(used(&r), 300 * MIB);
    // Not more than the larger one can need.
    r.grow_to(&merge.lower, 4096 * MIB, &author()).unwrap();
    assert_eq!(used(&r), 520 * MIB);
}
