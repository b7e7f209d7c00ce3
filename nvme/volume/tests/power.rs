//! Power cuts: after each write of each operation, with any part of what was not flushed on the
//! disk, sector by sector. Afterwards the group is in its old or its new state on all its devices.

use block::Storage;
use sim::{Disk, DiskConfig, Rng, Sabotage, Trace};
use volume::{Area, Author, Error, Group, Id, Label, MetadataArea, NewGroup, Shape, Vg, probe};

const SIZE: u64 = 3 << 19;
const US: Option<&str> = Some("me");

fn disk(bytes: Vec<u8>, volatile_cache: bool) -> Disk {
    let config = DiskConfig {
        size: SIZE,
        block_size: 512,
        volatile_cache,
        discarded: None,
        fresh: 0,
        file: false,
    };
    Disk::new(config, bytes, Rng::new(1), Trace::default())
}

fn author() -> Author {
    Author { host: "here".to_owned(), time: 1 }
}

fn new_group() -> NewGroup {
    NewGroup {
        name: "vg".into(),
        system_id: Some("me".into()),
        tags: Vec::new(),
        extent: 4096,
        metadata: 4096,
    }
}

/// A change of a random kind.
fn edit(vg: &mut Vg, rng: &mut Rng) -> volume::Result<()> {
    let names: Vec<String> = vg.lvs.iter().map(|lv| lv.name.clone()).collect();
    let name = |rng: &mut Rng| names[rng.below(names.len() as u64) as usize].clone();
    if names.is_empty() || rng.one_in(3) {
        let noise = std::array::from_fn(|_| rng.below(62) as u8);
        let n = rng.below(1 << 30);
        let stripes = if vg.pvs.len() > 1 && rng.one_in(2) { 2 } else { 1 };
        let shape = Shape { stripes, stripe_size: 8 };
        return vg.create_lv(
            Id::from_noise(noise),
            &format!("v{n}"),
            rng.within(1, 4),
            shape,
            &author(),
        );
    }
    let one = name(rng);
    match rng.below(5) {
        0 => vg.remove_lv(&one),
        1 => vg.grow_lv(&one, 1).map(|_| ()),
        // Texts of many sectors, so that a cut goes through their middle.
        2 => (0..rng.below(40)).try_for_each(|i| vg.tag_lv(&one, &format!("{i:0>200}"))),
        3 => vg.rename_lv(&one, &format!("r{}", rng.below(1 << 30))),
        _ => vg.extend_lv(&one, rng.within(1, 3)),
    }
}

/// Makes the metadata areas smaller, and puts the text near the ring's end, at no sector: so that the
/// next ones go round it.
fn shrink(images: &mut [Vec<u8>], rng: &mut Rng) {
    const SECTORS: u64 = 90;
    for bytes in images {
        let mut disk = disk(std::mem::take(bytes), false);
        let mut label = Label::read(&mut disk).unwrap().unwrap();
        let mut area = MetadataArea::read(&mut disk, label.metadata[0]).unwrap();
        let mut text = area.text(&mut disk).unwrap().unwrap();
        text.push(0);
        area.area.size = SECTORS * 512;
        let place = area.live.as_mut().unwrap();
        place.offset = (SECTORS - rng.within(1, 30)) * 512 + rng.below(512);
        area.put(&mut disk, &area.live.unwrap(), &text).unwrap();
        area.write(&mut disk).unwrap();
        label.metadata = vec![area.area];
        label.write(&mut disk).unwrap();
        *bytes = disk.take_bytes();
    }
}

/// What an operation leaves when the power of all devices fails after so many changes of each.
fn cut(disks: &[Disk], rng: &mut Rng) -> Vec<Vec<u8>> {
    disks.iter().map(|disk| disk.survivor(rng)).collect()
}

fn open(images: &[Vec<u8>]) -> volume::Result<Group<Disk>> {
    Group::open(images.iter().map(|bytes| disk(bytes.clone(), true)).collect(), US)
}

/// All devices have the state, on stable storage.
fn settled(group: Group<Disk>, rng: &mut Rng) -> Vg {
    let vg = group.vg().clone();
    for disk in group.into_devices() {
        // Nothing of a repair may still be in a cache.
        let mut left = self::disk(disk.survivor(rng), true);
        assert_eq!(probe(&mut left).unwrap().unwrap().group.as_ref(), Some(&vg));
    }
    vg
}

/// Opens the group, which may have to be repaired, and cuts that too. Returns what is left, and which
/// state was seen.
fn cut_opening(
    images: &[Vec<u8>],
    sabotage: Sabotage,
    rng: &mut Rng,
) -> (Vec<Vec<u8>>, Option<Vg>) {
    let disks: Vec<Disk> = images.iter().map(|b| disk(b.clone(), true)).collect();
    for disk in &disks {
        disk.set_sabotage(sabotage);
        disk.set_power_for(rng.below(4));
    }
    let seen = Group::open(disks.clone(), US).ok().map(|group| group.vg().clone());
    (cut(&disks, rng), seen)
}

/// Runs a chain of changes; each is cut at every write. Returns how often old and new were left, and
/// how often neither was.
fn run(seed: u64, devices: usize, sabotage: Sabotage) -> (u32, u32, u32) {
    let mut rng = Rng::new(seed);
    let (mut old, mut new, mut bad) = (0, 0, 0);
    let fresh = (0..devices).map(|_| disk(Vec::new(), true)).collect();
    let group = Group::create(fresh, &new_group(), &author()).unwrap();
    let mut images = cut(&group.into_devices(), &mut rng);
    shrink(&mut images, &mut rng);
    for _ in 0..6 {
        let (was, fork) = (open(&images).unwrap().vg().clone(), rng.fork());
        // Nothing has failed: what is there in the end is the next state.
        let mut group = open(&images).unwrap();
        match group.change(&author(), "change", |vg| edit(vg, &mut fork.clone())) {
            Ok(_) => {}
            Err(Error::NoSpace { .. } | Error::Refused(_) | Error::MetadataFull { .. }) => continue,
            Err(error) => panic!("{error}"),
        }
        let want = settled(group, &mut rng);
        // One device loses its power earlier than the others: so any of them is the one.
        for at in 0..8 * devices as u64 {
            let disks: Vec<Disk> = images.iter().map(|b| disk(b.clone(), true)).collect();
            let first = rng.below(devices as u64) as usize;
            let mut group = Group::open(disks.clone(), US).unwrap();
            for (n, disk) in disks.iter().enumerate() {
                disk.set_sabotage(sabotage);
                disk.set_power_for(if n == first { at % 8 } else { rng.within(at % 8, 8) });
            }
            let done = group.change(&author(), "change", |vg| edit(vg, &mut fork.clone()));
            if done.is_err() && sabotage == Sabotage::None {
                // After a commit that failed nothing more is done.
                let again = group.change(&author(), "again", |_| Ok(()));
                assert!(again.is_err());
            }
            let (left, seen) = cut_opening(&cut(&disks, &mut rng), sabotage, &mut rng);
            match open(&left) {
                // What was in force once stays so.
                Ok(after) if seen.is_some_and(|seen| seen != *after.vg()) => bad += 1,
                Ok(after) if *after.vg() == want => {
                    new += 1;
                    settled(after, &mut rng);
                }
                Ok(after) if *after.vg() == was && done.is_err() => {
                    old += 1;
                    settled(after, &mut rng);
                }
                _ => bad += 1,
            }
        }
        let mut group = open(&images).unwrap();
        let state = want.clone();
        group
            .change(&author(), "change", |vg| {
                vg.lvs = state.lvs;
                Ok(())
            })
            .unwrap();
        images = cut(&group.into_devices(), &mut rng);
    }
    (old, new, bad)
}

#[test]
fn a_cut_leaves_the_old_or_the_new_state() {
    let (mut old, mut new) = (0, 0);
    for seed in 0..2 {
        for devices in [1, 2, 3] {
            let (o, n, bad) = run(seed * 3 + devices as u64, devices, Sabotage::None);
            assert_eq!(bad, 0, "seed {seed}, {devices} devices");
            old += o;
            new += n;
        }
    }
    assert!(old > 80 && new > 80, "{old} {new}");
}

#[test]
fn a_device_that_lies_about_flushes_is_found_out() {
    // So this test can fail: without flushes headers come before their texts.
    let bad: u32 = (0..3).map(|seed| run(seed, 1, Sabotage::DropFlushes).2).sum();
    assert!(bad > 0);
}

#[test]
fn making_and_removing_a_group_is_cut() {
    let mut rng = Rng::new(9);
    let (mut none, mut whole) = (0, 0);
    // A physical volume of others, in no group, with another area at the same place.
    let mut other = disk(Vec::new(), false);
    let area = Area { offset: 4096, size: 8192 };
    MetadataArea::empty(area).write(&mut other).unwrap();
    let (data, metadata) = (vec![Area { offset: 1 << 20, size: 0 }], vec![area]);
    let id = Id::from_noise([1; 32]);
    let label = Label { id, device_size: SIZE, data, metadata, used: false, sector: 1 };
    label.write(&mut other).unwrap();
    let other = other.take_bytes();
    for round in 0..150_u64 {
        let devices = rng.within(1, 3);
        let bytes = |n: u64| if n == round / 2 % 4 { other.clone() } else { Vec::new() };
        let disks: Vec<Disk> = (0..devices).map(|n| disk(bytes(n), true)).collect();
        let made = round % 2 == 0;
        if made {
            disks.iter().for_each(|disk| disk.set_power_for(rng.below(9)));
            let _ = Group::create(disks.clone(), &new_group(), &author());
        } else {
            let group = Group::create(disks.clone(), &new_group(), &author()).unwrap();
            disks.iter().for_each(|disk| disk.set_power_for(rng.below(6)));
            let _ = group.remove();
        }
        let left = cut(&disks, &mut rng);
        match open(&left) {
            Ok(group) => {
                whole += 1;
                assert_eq!(settled(group, &mut rng).seqno, 1);
            }
            // There is none, and one can be made.
            Err(Error::Refused(_)) => {
                none += 1;
                let disks = left.into_iter().map(|bytes| disk(bytes, true)).collect();
                Group::create(disks, &new_group(), &author()).unwrap();
            }
            Err(error) => panic!("round {round}: {error}"),
        }
    }
    assert!(none > 25 && whole > 25, "{none} {whole}");
}

#[test]
fn a_change_is_few_writes() {
    for devices in [1, 2] {
        let disks: Vec<Disk> = (0..devices).map(|_| disk(Vec::new(), true)).collect();
        let mut group = Group::create(disks.clone(), &new_group(), &author()).unwrap();
        let before: u64 = disks.iter().map(Disk::writes).sum();
        group
            .change(&author(), "x", |vg| {
                vg.create_lv(Id::from_noise([1; 32]), "x", 1, Shape::LINEAR, &author())
            })
            .unwrap();
        let writes: u64 = disks.iter().map(Disk::writes).sum::<u64>() - before;
        assert_eq!(writes, 2 * devices);
        assert!(disks[0].len() == SIZE);
    }
}
