//! What changed between snapshots, whatever becomes of their data.

use block::Storage;
use qcow::build::Builder;
use qcow::create::CreateOptions;
use qcow::format::BitmapEntry;
use qcow::open::Format;
use qcow::{ImageMeta, Mode};
use sr::changed::{BITMAP, BLOCK};
use sr::{Blocks, Error, NewDisk, Repository, note_held};

use super::merges::{merge, volume};
use super::rig::{Fault, Memory, author};
use super::{MIB, host, new};

const BLOCKS: u64 = 16 * MIB / BLOCK;

/// The same device.
fn open(device: &Memory) -> Repository<Memory> {
    Repository::open(vec![device.clone()], &host("me")).unwrap()
}

/// A repository with a disk whose changes are told.
fn make() -> (Memory, Repository<Memory>, String) {
    let device = Memory::new(1024 * MIB);
    let mut r = Repository::create(vec![device.clone()], &new(1), &author()).unwrap();
    let disk = NewDisk { size: BLOCKS * BLOCK, ..NewDisk::default() };
    let key = r.create_disk(&disk, &author()).unwrap();
    r.track(&key, true, &author()).unwrap();
    (device, r, key)
}

/// Makes the image of a disk, which nobody has written to yet, one that holds these blocks.
fn write(r: &mut Repository<Memory>, key: &str, blocks: &[u64]) {
    let node = r.disk(key).unwrap().1.clone();
    let group = r.stat().group;
    let backing = node.parent.map(|lv| (format!("/dev/{group}/{lv}"), Format::Qcow2));
    let options = CreateOptions { backing, ..CreateOptions::new(node.size) };
    let mut storage = r.storage(&node.lv).unwrap();
    let mut image = Builder::new(&mut storage, &node.lv, &options).unwrap();
    blocks.iter().for_each(|at| image.data(at * BLOCK, &[7; BLOCK as usize]).unwrap());
    image.finish().unwrap();
}

/// The blocks that are told; an error's text else.
fn told(r: &mut Repository<Memory>, from: &str, to: &str) -> Result<Vec<u64>, String> {
    let read = |r: &mut Repository<Memory>| -> sr::Result<Vec<u64>> {
        let difference = r.difference(from, to)?;
        let mut blocks = Blocks::new(&difference, 0, u64::MAX)?;
        for lv in &difference.images {
            blocks.add_image(r.storage(lv)?, lv)?;
        }
        for lv in &difference.records {
            blocks.add_record(&mut r.storage(lv)?, lv)?;
        }
        let count = blocks.bytes().len() as u64 * 8;
        Ok((0..count).filter(|at| blocks.run(at * BLOCK, 1).1).collect())
    };
    read(r).map_err(|e| e.to_string())
}

fn snapshot(r: &mut Repository<Memory>, key: &str) -> String {
    r.snapshot(key, &author()).unwrap().key
}

/// The next one.
fn merge_one(r: &mut Repository<Memory>) -> sr::Result<bool> {
    let next = r.merges().remove(0);
    merge(r, &next)
}

#[test]
fn what_images_between_two_hold_is_told() {
    let (_device, mut r, key) = make();
    write(&mut r, &key, &[0, 1, 2]);
    let first = snapshot(&mut r, &key);
    write(&mut r, &key, &[2, 9, 200]);
    let second = snapshot(&mut r, &key);
    write(&mut r, &key, &[255]);
    assert_eq!(told(&mut r, &first, &second).unwrap(), [2, 9, 200]);
    assert_eq!(told(&mut r, &second, &first).unwrap(), [2, 9, 200]);
    assert_eq!(told(&mut r, &first, &key).unwrap(), [2, 9, 200, 255]);
    // A disk that was made again what the first one is.
    r.revert(&first, &key, &author()).unwrap();
    write(&mut r, &key, &[77]);
    assert_eq!(told(&mut r, &first, &key).unwrap(), [77]);
    assert_eq!(told(&mut r, &second, &key).unwrap(), [2, 9, 77, 200]);
    // One that is larger.
    r.resized(&key, (BLOCKS + 32) * BLOCK, &author()).unwrap();
    let more = told(&mut r, &first, &key).unwrap();
    assert_eq!((more[0], more[1], more.len()), (77, BLOCKS, 33));
}

#[test]
fn what_cannot_be_known_is_an_error() {
    let (_device, mut r, key) = make();
    let first = snapshot(&mut r, &key);
    let second = snapshot(&mut r, &key);
    let other = r.create_disk(&NewDisk { size: 1, ..NewDisk::default() }, &author()).unwrap();
    let refused = |r: &mut Repository<Memory>, from: &str, to: &str, why: &str| {
        let e = r.difference(from, to).unwrap_err();
        assert!(matches!(e, Error::NoChanges { .. }) && e.to_string().contains(why), "{e}");
    };
    refused(&mut r, &first, &first, "one");
    refused(&mut r, &key, &first, "no snapshot");
    refused(&mut r, &first, &other, "not enabled");
    r.track(&other, true, &author()).unwrap();
    refused(&mut r, &first, &other, "in common");
    assert!(matches!(r.difference("none", &key), Err(Error::NoDisk(_))));
    // A copy is a disk of its own.
    let copy = r.clone_disk(&first, &author()).unwrap().key;
    refused(&mut r, &first, &copy, "not enabled");
    r.track(&key, false, &author()).unwrap();
    refused(&mut r, &first, &key, "not enabled");
    assert!(r.difference(&first, &second).is_ok(), "they are as they were taken");
    // Snapshots stay as they are, and data is not destroyed for nothing.
    for on in [true, false] {
        assert_eq!(r.track(&first, on, &author()).is_ok(), on);
    }
    assert!(r.destroy_data(&copy, &author()).is_err());
    let untold = snapshot(&mut r, &key);
    assert!(r.destroy_data(&untold, &author()).is_err());
}

#[test]
fn a_record_is_no_disk_and_goes() {
    let (device, mut r, key) = make();
    write(&mut r, &key, &[3]);
    let first = snapshot(&mut r, &key);
    let volumes = |r: &Repository<Memory>| r.group().vg().lvs.len();
    for _ in 0..2 {
        r.destroy_data(&first, &author()).unwrap();
        assert_eq!(volumes(&r), 3);
    }
    let used = r.disk(&first).unwrap().1.used;
    assert_eq!(used, 4 * MIB, "one extent");
    r.set_key(&first, "vdi-type", Some("cbt_metadata"), &author()).unwrap();
    for of in [r.snapshot(&first, &author()).map(drop), r.clone_disk(&first, &author()).map(drop)] {
        assert!(of.unwrap_err().to_string().contains("was destroyed"));
    }
    assert!(r.revert(&first, &key, &author()).is_err());
    let r = &mut open(&device);
    let (disk, node) = r.disk(&first).unwrap();
    assert_eq!((&*disk.keys["vdi-type"], disk.read_only, disk.cbt), ("cbt_metadata", true, true));
    // Standard tools find the bitmap.
    let lv = node.lv.clone();
    let image = ImageMeta::open(&mut r.storage(&lv).unwrap(), &lv, Mode::Read).unwrap();
    assert_eq!(image.header.bitmaps().unwrap().count, 1);
    assert_eq!(told(r, &first, &key).unwrap(), []);
    r.destroy(&first, &author()).unwrap();
    assert_eq!(volumes(r), 2);
    // The last one to show it goes: there is a record, and nothing to compare it with.
    let second = snapshot(r, &key);
    r.destroy(&key, &author()).unwrap();
    r.destroy_data(&second, &author()).unwrap();
    assert_eq!(volumes(r), 1);
    r.destroy(&second, &author()).unwrap();
    assert_eq!(r.stat().free, r.stat().total);
}

/// Data of one after the other goes, and what is between them is merged.
#[test]
fn records_tell_what_merges_take_away() {
    let (device, mut r, key) = make();
    write(&mut r, &key, &[1]);
    let mut keys = Vec::new();
    for at in 10..14 {
        keys.push(snapshot(&mut r, &key));
        write(&mut r, &key, &[at, 100 + at]);
    }
    let want = |from: usize, to: usize| -> Vec<u64> {
        let both = (from..to).flat_map(|n| [10 + n as u64, 110 + n as u64]);
        let mut all: Vec<u64> = both.collect();
        all.sort_unstable();
        all
    };
    for key in &keys[..3] {
        r.destroy_data(key, &author()).unwrap();
    }
    let pairs = || (0..4).flat_map(|to| (0..to).map(move |from| (from, to)));
    for (from, to) in pairs() {
        assert_eq!(told(&mut r, &keys[from], &keys[to]).unwrap(), want(from, to));
    }
    // One that is not noted is refused, and changes nothing.
    let at = r.merges().remove(0);
    assert!(r.merged(&at, &[], &author()).unwrap_err().to_string().contains("not noted"));
    while !r.merges().is_empty() {
        merge_one(&mut r).unwrap();
        r = open(&device);
        for (from, to) in pairs() {
            let told = told(&mut r, &keys[from], &keys[to]).unwrap();
            let exact = want(from, to);
            assert!(exact.iter().all(|at| told.contains(at)), "{from} {to} {told:?}");
            // What is not wanted any more may be told too much of.
            assert!(to < 3 || told == exact, "{from} {to} {told:?}");
        }
    }
    // The disk goes on above the node where the records are: else it would be changed under them.
    assert_eq!(r.chain(&key).unwrap().len(), 2);
    r.destroy_data(&keys[3], &author()).unwrap();
    assert!(r.merges().is_empty(), "the disk alone is above");
    assert_eq!(told(&mut r, &keys[3], &key).unwrap(), [13, 113]);
    for key in &keys {
        r.destroy(key, &author()).unwrap();
    }
    assert_eq!(r.merges().len(), 1);
    merge_one(&mut r).unwrap();
    assert_eq!(r.chain(&key).unwrap().len(), 1);
}

#[test]
fn a_cut_of_a_merge_loses_no_change() {
    let (mut old, mut new) = (0, 0);
    let (device, mut r, key) = make();
    let first = snapshot(&mut r, &key);
    write(&mut r, &key, &[5, 6, 7, 250]);
    let second = snapshot(&mut r, &key);
    write(&mut r, &key, &[8]);
    r.destroy_data(&first, &author()).unwrap();
    drop(r);
    for at in 0.. {
        let cut = device.deep();
        let mut r = open(&cut);
        cut.set_fault(Some(Fault { after: at / 2, done: at % 2 == 1 }));
        let result = merge_one(&mut r);
        let over = !cut.has_failed();
        drop(r);
        cut.set_fault(None);
        let mut r = open(&cut);
        assert_eq!(told(&mut r, &first, &second).unwrap(), [5, 6, 7, 250], "{at}");
        assert_eq!(told(&mut r, &first, &key).unwrap(), [5, 6, 7, 8, 250], "{at}");
        let merged = r.chain(&key).unwrap().len() == 2;
        assert!(merged || result.is_err());
        old += u32::from(!merged);
        new += u32::from(merged);
        if over {
            break;
        }
    }
    assert!(old > 10 && new > 1, "{old} {new}");
}

/// Bits that were not saved are not believed, and nothing is merged that would need them.
#[test]
fn a_bitmap_that_means_nothing_is_an_error() {
    let (_device, mut r, key) = make();
    let first = snapshot(&mut r, &key);
    write(&mut r, &key, &[5]);
    snapshot(&mut r, &key);
    r.destroy_data(&first, &author()).unwrap();
    let lv = r.disk(&first).unwrap().1.lv.clone();
    let at = |r: &mut Repository<Memory>| {
        let image = ImageMeta::open(&mut r.storage(&lv).unwrap(), &lv, Mode::Read).unwrap();
        image.header.bitmaps().unwrap().directory_offset + BitmapEntry::FLAGS_AT as u64
    };
    let at = at(&mut r);
    r.storage(&lv).unwrap().write_at(at, &BitmapEntry::IN_USE.to_be_bytes()).unwrap();
    let why = told(&mut r, &first, &key).unwrap_err();
    assert!(why.contains("was not saved") && why.contains(BITMAP), "{why}");
    assert!(merge_one(&mut r).is_err());
    assert_eq!(r.chain(&key).unwrap().len(), 3);
    // Without the record it goes on.
    r.destroy(&first, &author()).unwrap();
    merge_one(&mut r).unwrap();
}

/// As many different bits as there can be, twice, fit into what a record gets.
#[test]
fn a_record_of_a_large_disk_has_room() {
    let (_device, mut r, _) = make();
    let size = 4096 << 30;
    let key = r.create_disk(&NewDisk { size, ..NewDisk::default() }, &author()).unwrap();
    r.track(&key, true, &author()).unwrap();
    let first = snapshot(&mut r, &key);
    // Each cluster of bits has some of its own.
    let blocks: Vec<u64> = (0..size / BLOCK).step_by(400_000).collect();
    for _ in 0..3 {
        write(&mut r, &key, &blocks);
        snapshot(&mut r, &key);
    }
    r.destroy_data(&first, &author()).unwrap();
    let lv = r.disk(&first).unwrap().1.lv.clone();
    let uppers: Vec<String> = r.chain(&key).unwrap().iter().map(|n| n.lv.clone()).collect();
    for upper in &uppers {
        let (mut record, image) = (volume(&r, &lv, true), volume(&r, upper, false));
        note_held((&mut record, &lv), (image, upper)).unwrap();
    }
    let told = told(&mut r, &first, &key).unwrap();
    assert_eq!(told, blocks);
}
