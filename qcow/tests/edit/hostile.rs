//! Devices that fail, and images that lie.

use std::time::Duration;

use block::Storage;
use qcow::edit::{self, Amend, BitmapAction, SnapshotKey};
use qcow::{ChainReader, Error};

use crate::rig::{Disk, KINDS, Rng, clean, contents, image, open};

type Operation = fn(&Disk) -> Result<(), Error>;

fn grow(disk: &Disk) -> Result<(), Error> {
    let mut chain = chain(disk)?;
    edit::resize(&mut chain, 8 << 20)
}

fn shrink(disk: &Disk) -> Result<(), Error> {
    let mut chain = chain(disk)?;
    edit::resize(&mut chain, 512 * 20)
}

fn chain(disk: &Disk) -> Result<ChainReader<Disk>, Error> {
    use qcow::open::{Chain, ChainOptions, Opened};
    let top = Opened { storage: disk.clone(), path: None, name: "disk".to_owned(), id: None };
    let refuse = &mut |b: &qcow::open::BackingRef| Err(Error::refused(&b.name, "is not there"));
    Chain::open(top, ChainOptions::default(), refuse).map(ChainReader::new)
}

fn bitmap(disk: &Disk, name: &str, action: BitmapAction) -> Result<(), Error> {
    edit::change_bitmap::<Disk>(&mut disk.clone(), "d", name, &[action], None)
}

const OPERATIONS: [(&str, Operation); 11] = [
    ("grow", grow),
    ("shrink", shrink),
    ("create", |d| edit::create_snapshot(&mut d.clone(), "d", "new", Duration::ZERO).map(|_| ())),
    ("apply", |d| edit::apply_snapshot(&mut d.clone(), "d", SnapshotKey::Name("a"))),
    ("delete", |d| edit::delete_snapshot(&mut d.clone(), "d", SnapshotKey::Name("a"))),
    ("rebase", |d| {
        let mut chain = chain(d)?;
        edit::rebase(&mut chain, None, &mut |_| {}).map(|_| ())
    }),
    ("amend", |d| {
        let options = Amend { version: Some(3), lazy_refcounts: Some(true), ..Amend::default() };
        edit::amend(&mut d.clone(), "d", &options)
    }),
    ("add", |d| bitmap(d, "new", BitmapAction::Add { granularity: Some(512) })),
    ("remove", |d| bitmap(d, "full", BitmapAction::Remove)),
    ("clear", |d| bitmap(d, "full", BitmapAction::Clear)),
    ("merge", |d| bitmap(d, "empty", BitmapAction::Merge("full".to_owned()))),
];

/// An image with two snapshots of different sizes.
fn made(kind: usize) -> Vec<u8> {
    let kind = &KINDS[kind];
    let disk = Disk::new(image(&kind.options(kind.size()), 4));
    let mut st = disk.clone();
    edit::create_snapshot(&mut st, "d", "a", Duration::ZERO).unwrap();
    if kind.version > 2 {
        edit::resize(&mut open(std::slice::from_ref(&disk)), kind.size() / 1024 * 512).unwrap();
    }
    edit::create_snapshot(&mut st, "d", "b", Duration::ZERO).unwrap();
    disk.bytes()
}

/// The same with two bitmaps, one of which has bits.
fn with_bitmaps(kind: usize) -> Vec<u8> {
    let disk = Disk::new(made(kind));
    for name in ["full", "empty"] {
        bitmap(&disk, name, BitmapAction::Add { granularity: Some(512) }).unwrap();
    }
    bitmap(&disk, "empty", BitmapAction::Disable).unwrap();
    edit::resize(&mut open(std::slice::from_ref(&disk)), KINDS[kind].size()).unwrap();
    disk.bytes()
}

#[test]
fn a_device_that_fails_leaves_the_old_image_or_the_new_one() {
    let mut failures = 0;
    for (kind, bitmaps) in [(2, false), (4, false), (5, false), (2, true), (5, true)] {
        let made = if bitmaps { with_bitmaps(kind) } else { made(kind) };
        let shows = |disk: &Disk| contents(&mut open(std::slice::from_ref(disk)));
        for (name, operation) in OPERATIONS {
            let disk = Disk::new(made.clone());
            let old = shows(&disk);
            if operation(&disk).is_err() {
                continue;
            }
            let new = shows(&disk);
            let mut fine = 0;
            for good in 0.. {
                let disk = Disk::new(made.clone());
                disk.fail_after(Some(good));
                let done = operation(&disk);
                disk.fail_after(None);
                let what = format!("{name}, {good} good ones");
                clean(&disk.bytes(), &what);
                let now = shows(&disk);
                assert!(now == old || now == new, "{what}");
                if done.is_ok() {
                    assert!(now == new, "{what}");
                    // Moving tables to the front may fail; it is not what was asked for.
                    fine += 1;
                    if fine > 20 {
                        break;
                    }
                } else {
                    failures += 1;
                }
                assert!(good < 2000);
            }
        }
    }
    assert!(failures > 80, "{failures}");
}

#[test]
fn a_damaged_image_is_refused_or_changed_but_never_a_panic() {
    let (mut refused, mut done) = (0, 0);
    for (kind, bitmaps) in [(2, false), (4, false), (2, true), (3, true), (5, true)] {
        let made = if bitmaps { with_bitmaps(kind) } else { made(kind) };
        let mut rng = Rng(kind as u64);
        // Where tables are: all that is no noise lies in few places.
        let cluster = KINDS[kind].cluster as usize;
        for round in 0..1200 {
            let mut bytes = made.clone();
            for _ in 0..1 + rng.below(3) {
                let at = match rng.below(4) {
                    0 => rng.below(112),
                    1 => rng.below(bytes.len() as u64),
                    _ => {
                        // The start of an 8-byte word of some cluster that looks like a table.
                        let c = rng.below((bytes.len() / cluster) as u64) as usize * cluster;
                        (c + rng.below((cluster / 8).min(64) as u64) as usize * 8) as u64
                            + rng.below(8)
                    }
                };
                let bit = 1 << rng.below(8);
                let value = if rng.below(2) == 0 { bit } else { rng.below(256) as u8 };
                bytes[at as usize] ^= value;
            }
            if rng.below(10) == 0 {
                let len = rng.below(bytes.len() as u64);
                bytes.truncate(len as usize);
            }
            let mut disk = Disk::new(bytes);
            disk.room = 64 << 20;
            let (_, operation) = OPERATIONS[round % OPERATIONS.len()];
            match operation(&disk) {
                Ok(()) => done += 1,
                Err(_) => refused += 1,
            }
            assert!(disk.len() <= 64 << 20);
        }
    }
    assert!(done > 500 && refused > 500, "{done} done, {refused} refused");
}
