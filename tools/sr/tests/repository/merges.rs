//! Merges whose power fails at any write: the disks show what they did, and the merges end some day.

use std::collections::BTreeMap;

use block::Storage;
use qcow::ChainReader;
use qcow::build::Builder;
use qcow::check::Repair;
use qcow::create::CreateOptions;
use qcow::open::Format;
use sim::{Disk as SimDisk, Rng, Sabotage};
use sr::{Error, Merge, Repository};
use volume::View;

use super::rig::{Fault, Memory, author};
use super::{MIB, disk, drive, fits, host, new};

/// What each disk shows.
type Contents = BTreeMap<String, Vec<u8>>;

const CLUSTER: usize = 65536;

pub(super) fn volume<S: Storage + Clone + 'static>(
    r: &Repository<S>,
    lv: &str,
    writable: bool,
) -> View<'static, S> {
    let group = r.group();
    View::own(group.map(lv).unwrap(), !writable, group.storages().cloned().collect())
}

pub(super) fn contents<S: Storage + Clone + 'static>(
    r: &Repository<S>,
    key: &str,
) -> Result<Vec<u8>, qcow::Error> {
    let lvs = r.down_from(&r.disk(key).unwrap().1.lv);
    let top = volume(r, &lvs[0], false);
    let vg = &r.group().vg().name;
    let chain = sr::open_chain(vg, &lvs, top, false, &mut |lv| Ok(volume(r, lv, false)))?;
    let mut reader = ChainReader::new(chain);
    let mut bytes = vec![0; reader.size() as usize];
    reader.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// Whether all disks show what they did.
fn right<S: Storage + Clone + 'static>(r: &Repository<S>, all: &Contents) -> bool {
    r.list().count() == all.len()
        && all.iter().all(|(key, bytes)| contents(r, key).ok().as_ref() == Some(bytes))
}

/// Writes to a disk whose uppermost image is empty.
pub(super) fn write<S: Storage + Clone + 'static>(
    r: &Repository<S>,
    key: &str,
    bytes: &mut [u8],
    rng: &mut Rng,
) {
    let node = r.disk(key).unwrap().1;
    let backing = node.parent.as_ref().map(|lv| format!("/dev/{}/{lv}", r.group().vg().name));
    let backing = backing.map(|name| (name, Format::Qcow2));
    let options = CreateOptions { backing, ..CreateOptions::new(node.size) };
    let mut storage = volume(r, &node.lv, true);
    let mut builder = Builder::new(&mut storage, &node.lv, &options).unwrap();
    for (n, cluster) in bytes.chunks_mut(CLUSTER).enumerate() {
        let guest = (n * CLUSTER) as u64;
        match rng.below(6) {
            0 | 1 => {
                cluster.fill(rng.within(1, 255) as u8);
                builder.data(guest, cluster).unwrap();
            }
            2 => {
                cluster.fill(0);
                builder.zeroes(guest, CLUSTER as u64).unwrap();
            }
            _ => {}
        }
    }
    builder.finish().unwrap();
}

/// Two disks on a snapshot, below which is what is left of two others.
fn build<S: Storage + Clone + 'static>(r: &mut Repository<S>, rng: &mut Rng) -> Contents {
    let one = r.create_disk(&disk(2 * MIB), &author()).unwrap();
    let mut bytes = vec![0; 2 << 20];
    let mut all = Contents::new();
    let mut gone = Vec::new();
    for n in 0..3 {
        write(r, &one, &mut bytes, rng);
        let snapshot = r.snapshot(&one, &author()).unwrap().key;
        match n {
            2 => drop(all.insert(snapshot, bytes.clone())),
            _ => gone.push(snapshot),
        }
    }
    let snapshot = all.keys().next().unwrap().clone();
    let two = r.clone_disk(&snapshot, &author()).unwrap().key;
    for key in [one, two] {
        let mut bytes = bytes.clone();
        write(r, &key, &mut bytes, rng);
        all.insert(key, bytes);
    }
    for key in gone {
        r.destroy(&key, &author()).unwrap();
    }
    all
}

/// As the daemon does it. Whether there was something to do before.
pub(super) fn merge<S: Storage + Clone + 'static>(
    r: &mut Repository<S>,
    merge: &Merge,
) -> sr::Result<bool> {
    if r.comes_first(merge)? {
        return Ok(false);
    }
    let used = r.group().vg().lv(&merge.lower)?.extents() * r.group().vg().extent_bytes();
    r.grow_to(&merge.lower, used + merge.used, &author())?;
    let lvs = r.down_from(&merge.upper);
    let open = |lv: &str| volume(r, lv, lv == merge.lower);
    let vg = &r.group().vg().name;
    let chain = sr::open_chain(vg, &lvs, open(&lvs[0]), false, &mut |lv| Ok(open(lv)))?;
    merge.commit(chain, &mut |_| {})?;
    r.settle(merge, None, &author(), |group, lv| {
        Ok(View::own(group.map(lv)?, false, group.storages().cloned().collect()))
    })?;
    r.discard();
    Ok(true)
}

/// All of them, in any order.
fn merge_all<S: Storage + Clone + 'static>(r: &mut Repository<S>, rng: &mut Rng) -> sr::Result<()> {
    loop {
        let mut merges = r.merges();
        if merges.is_empty() {
            return Ok(());
        }
        let mut done = false;
        while !done {
            // One of them can always be done.
            assert!(!merges.is_empty());
            let next = merges.swap_remove(rng.below(merges.len() as u64) as usize);
            done = match merge(r, &next) {
                // Something above has been told already; its merge is among the others.
                Err(Error::Refused(why)) if why.contains("by itself") => false,
                done => done?,
            };
        }
    }
}

/// All are merged, and everything is in order.
fn ended<S: Storage + Clone + 'static>(r: &mut Repository<S>) -> bool {
    let lvs: Vec<String> = r.group().vg().lvs.iter().map(|lv| lv.name.clone()).collect();
    // The snapshot, and two disks on it.
    lvs.len() == 3
        && fits(r)
        && lvs.iter().all(|lv| {
            let mut image = volume(r, lv, false);
            let report = qcow::check::run(&mut image, lv, Repair::None, &mut |_| {}).unwrap();
            (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)
        })
}

#[test]
fn a_daemon_that_dies_in_a_merge_leaves_the_disks_as_they_are() {
    let (mut cuts, mut unsettled) = (0, 0);
    for seed in 0..6 {
        let mut rng = Rng::new(seed);
        let device = Memory::new(256 * MIB);
        let mut r = Repository::create(vec![device.clone()], &new(1), &author()).unwrap();
        let all = build(&mut r, &mut rng);
        assert!(right(&r, &all) && r.merges().len() == 2);
        let open = |device: &Memory| Repository::open(vec![device.clone()], &host("me")).unwrap();
        for at in 0.. {
            let left = device.deep();
            let mut r = open(&left);
            left.set_fault(Some(Fault { after: at / 2, done: at % 2 == 1 }));
            let done = merge_all(&mut r, &mut rng).is_ok();
            if !left.has_failed() {
                assert!(done && ended(&mut r) && right(&r, &all));
                break;
            }
            cuts += 1;
            // It dies again, and is left alone then.
            let mut r = open(&left);
            assert!(right(&r, &all), "seed {seed}, write {at}");
            unsettled += u32::from(!fits(&mut r));
            left.set_fault(Some(Fault { after: rng.below(40), done: rng.one_in(2) }));
            let _ = merge_all(&mut r, &mut rng);
            left.set_fault(None);
            let mut r = open(&left);
            assert!(right(&r, &all), "seed {seed}, write {at} and another");
            merge_all(&mut r, &mut rng).unwrap();
            assert!(ended(&mut r) && right(&open(&left), &all), "seed {seed}, write {at}");
        }
    }
    assert!(cuts > 300 && unsettled > 30, "{cuts} {unsettled}");
}

/// The same with a drive with a cache: how often the disks were right after a cut, and how often not.
fn cut_a_cache(sabotage: Sabotage) -> (u32, u32) {
    let (mut good, mut bad) = (0, 0);
    let mut rng = Rng::new(5);
    let empty = vec![drive(vec![0xa5; 76 << 20])];
    let mut r = Repository::create(empty, &new(1), &author()).unwrap();
    let all = build(&mut r, &mut rng);
    let image = r.into_devices().remove(0).take_bytes();
    let open = |drive: SimDisk| Repository::open(vec![drive], &host("me"));
    for at in 0.. {
        let cut = drive(image.clone());
        let mut r = open(cut.clone()).unwrap();
        cut.set_sabotage(sabotage);
        cut.set_power_for(at);
        let done = merge_all(&mut r, &mut rng).is_ok();
        let left = open(drive(cut.survivor(&mut rng))).ok();
        let is_right = left.is_some_and(|mut left| {
            right(&left, &all)
                && merge_all(&mut left, &mut rng).is_ok()
                && ended(&mut left)
                && right(&left, &all)
        });
        good += u32::from(is_right);
        bad += u32::from(!is_right);
        if done && !cut.is_out() {
            break;
        }
    }
    (good, bad)
}

#[test]
fn a_merge_whose_power_fails_leaves_the_disks_as_they_are() {
    let (good, bad) = cut_a_cache(Sabotage::None);
    assert!(bad == 0 && good > 30, "{good} {bad}");
}

#[test]
fn a_merge_on_a_drive_that_lies_about_flushes_is_found_out() {
    // So the test before this one can fail.
    assert!(cut_a_cache(Sabotage::DropFlushes).1 > 0);
}
