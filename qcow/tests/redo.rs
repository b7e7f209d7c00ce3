//! Changes of a process that died, put in by the next one: again and again, if that dies, too; and not
//! at all where somebody else has written to the image since.

mod rig;

use std::sync::Arc;

use block::{Blocking, Op, Status};
use dma::{PageSize, Region};
use qcow::create::CreateOptions;
use qcow::edit::redo;
use qcow::run::{Changes, Journal};
use rig::{LogQueue, Rig, Rng, check, cut, fresh, read_offline, snapshot};

const DEVICE: u64 = 4 << 20;
const DISK: u64 = 1 << 20;
const CLUSTER: u64 = 4096;

fn new() -> LogQueue {
    let mut options = CreateOptions::new(DISK);
    options.cluster_size = CLUSTER;
    fresh(DEVICE, 7, &options)
}

fn journal() -> Arc<Region> {
    Region::new(64 << 10, PageSize::Small).unwrap()
}

/// Serves an image until the process dies; what it leaves.
fn until_death(leaf: LogQueue, serve: impl FnOnce(&mut Rig)) -> (LogQueue, Changes) {
    let memory = journal();
    let mut rig = Rig::single(leaf);
    rig.image().keep_journal(Journal::new(memory.clone(), 3));
    serve(&mut rig);
    let leaf = rig.crash().remove(0);
    let changes = Journal::read(&memory).expect("all of it fits");
    assert_eq!(changes.owner, 3);
    (leaf, changes)
}

fn put_in(leaf: LogQueue, changes: &Changes) -> (LogQueue, Result<(), String>) {
    let mut storage = Blocking::new(leaf, 0).unwrap();
    let done = redo(&mut storage, "dead", changes).map_err(|e| e.to_string());
    (storage.into_leaf(), done)
}

/// No corruption; the disk's contents.
fn contents(leaf: LogQueue) -> (LogQueue, Vec<u8>) {
    let (leaf, corruptions, _) = check(leaf);
    assert_eq!(corruptions, 0);
    let bytes = read_offline(&leaf.data(), None, None);
    (leaf, bytes)
}

/// Some of it durable, some not, some mapped anew.
fn some_writes(rig: &mut Rig) {
    rig.write(0, &[1; 3 * CLUSTER as usize]);
    rig.flush();
    rig.write(CLUSTER, &[2; CLUSTER as usize]);
    rig.write(20 * CLUSTER, &[3; 4 * CLUSTER as usize]);
    rig.write(DISK - CLUSTER, &[4; 512]);
}

fn expect_some_writes(bytes: &[u8]) {
    let at = |cluster: u64| bytes[(cluster * CLUSTER) as usize];
    assert_eq!([0, 1, 2, 3, 19, 20, 23, 24, 255].map(at), [1, 2, 1, 0, 0, 3, 3, 0, 4]);
}

#[test]
fn who_dies_while_it_puts_them_in_is_followed_by_another() {
    let (mut leaf, changes) = until_death(new(), some_writes);
    assert!(!changes.list.is_empty());
    leaf.start_log();
    let (mut leaf, done) = put_in(leaf, &changes);
    done.unwrap();
    let (base, log) = leaf.take_log();
    let mut rng = Rng(9);
    for at in 0..=log.len() {
        let mut other = LogQueue::new(DEVICE, 1);
        other.load(&cut(&base, &log, at, true, &mut rng));
        for _ in 0..3 {
            let done;
            (other, done) = put_in(other, &changes);
            done.unwrap();
        }
        let (_, bytes) = contents(other);
        expect_some_writes(&bytes);
    }
    // The one after that serves the image at last, and dies, too.
    let (leaf, changes) = until_death(leaf, |rig| rig.write(30 * CLUSTER, &[9; 512]));
    let (leaf, done) = put_in(leaf, &changes);
    done.unwrap();
    let (_, bytes) = contents(leaf);
    expect_some_writes(&bytes);
    assert_eq!(bytes[30 * CLUSTER as usize], 9);
}

/// Clusters that nobody has counted are another's by now.
#[test]
fn not_into_an_image_that_others_wrote_to() {
    let write = |leaf: LogQueue| {
        let mut rig = Rig::single(leaf);
        rig.write(100 * CLUSTER, &[7; 8 * CLUSTER as usize]);
        rig.close().remove(0)
    };
    let (leaf, changes) = until_death(new(), some_writes);
    let (leaf, before) = contents(write(leaf));
    let (leaf, done) = put_in(leaf, &changes);
    assert!(done.unwrap_err().contains("changed by others"));
    assert!(contents(leaf).1 == before);
}

/// What a snapshot shares must not count as the disk's own again.
#[test]
fn not_into_an_image_with_a_new_snapshot() {
    for durable in [false, true] {
        let (mut leaf, mut changes) = until_death(new(), |rig| {
            rig.write(0, &[1; 3 * CLUSTER as usize]);
        });
        if durable {
            // All of it went to disk, and the process died before it knew.
            leaf = put_in(leaf, &changes).0;
        }
        leaf = snapshot(leaf, "kept");
        let before = leaf.data();
        let done;
        (leaf, done) = put_in(leaf, &changes);
        assert!(done.unwrap_err().contains("changed by others"));
        assert!(leaf.data() == before);
        changes.list.clear();
        put_in(leaf, &changes).1.unwrap();
    }
}

/// Parts of a cluster that a snapshot shares read as zeroes; it stays shared.
#[test]
fn zeroes_in_what_a_snapshot_shares() {
    let options =
        CreateOptions { cluster_size: 4 * CLUSTER, extended_l2: true, ..CreateOptions::new(DISK) };
    let mut rig = Rig::single(fresh(DEVICE, 7, &options));
    rig.write(0, &[1; 8 * CLUSTER as usize]);
    let leaf = snapshot(rig.close().remove(0), "kept");
    let (leaf, changes) = until_death(leaf, |rig| {
        let zeroes = rig.call(Op::WriteZeroes, CLUSTER, CLUSTER, &[]);
        assert_eq!(zeroes.0, Status::Ok);
        rig.write(4 * CLUSTER, &[2; CLUSTER as usize]);
    });
    assert_eq!(changes.list.len(), 2);
    let (leaf, done) = put_in(leaf, &changes);
    done.unwrap();
    let (leaf, bytes) = contents(leaf);
    assert_eq!([0, 1, 2, 4, 5].map(|n| bytes[n * CLUSTER as usize]), [1, 0, 1, 2, 1]);
    let kept = read_offline(&leaf.data(), None, Some("kept"));
    assert!(kept[..8 * CLUSTER as usize].iter().all(|&byte| byte == 1));
}

/// What others have made of a journal's entries gives errors, and nothing worse.
#[test]
fn entries_that_cannot_be() {
    let (leaf, changes) = until_death(new(), some_writes);
    let (mut leaf, mut rng, mut refused) = (leaf, Rng(3), 0);
    let before = leaf.data();
    for _ in 0..150 {
        let mut wrong = changes.clone();
        let n = rng.below(wrong.list.len() as u64) as usize;
        let other = wrong.list[rng.below(n as u64 + 1) as usize].word;
        let one = &mut wrong.list[n];
        match rng.below(4) {
            0 => one.cluster = rng.next(),
            1 => one.word ^= 1 << rng.below(64),
            2 => one.word = rng.next(),
            _ => one.word = other,
        }
        let done;
        (leaf, done) = put_in(leaf, &wrong);
        refused += u32::from(done.is_err());
        let found;
        (leaf, found, _) = check(leaf);
        assert_eq!(found, 0, "{wrong:?}");
        leaf.load(&before);
    }
    assert!(refused > 50, "{refused}");
}
