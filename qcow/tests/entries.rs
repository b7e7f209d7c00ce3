//! Images whose tables lie, met while they are served: an error for what is wrong, the rest goes on,
//! and nothing is written over metadata or over what another entry names.

mod rig;

use block::{Flags, Op, Status};
use qcow::create::CreateOptions;
use qcow::open::Format;
use qcow::run::Options;
use rig::{LogQueue, Rig, Rng, check, fresh, open_stack, repair};

const DISK: u64 = 4 << 20;
const DEVICE: u64 = 8 << 20;
const CLUSTER: u64 = 4096;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// An image whose first `clusters` clusters are written, and where its first L2 table lies.
fn image(clusters: u64) -> (LogQueue, u64) {
    let mut o = CreateOptions::new(DISK);
    o.cluster_size = CLUSTER;
    let mut rig = Rig::single(fresh(DEVICE, 11, &o));
    for n in 0..clusters {
        rig.write(n * CLUSTER, &[n as u8 + 1; CLUSTER as usize]);
    }
    let leaf = rig.close().remove(0);
    let l1 = word(&leaf, 40);
    let l2 = word(&leaf, l1) & !COPIED;
    (leaf, l2)
}

fn word(leaf: &LogQueue, at: u64) -> u64 {
    let mut bytes = [0; 8];
    leaf.peek(at, &mut bytes);
    u64::from_be_bytes(bytes)
}

/// For reading, since it may be marked as corrupt.
fn read_only(leaf: LogQueue) -> Rig {
    let (stack, leaves) = open_stack(vec![leaf], &[Format::Qcow2], false).unwrap();
    Rig::attach(stack, leaves, Options::default())
}

/// Whether a header says that the image is corrupt. The mark is taken off.
fn take_mark(header: &mut [u8]) -> bool {
    let marked = header[79] & 2 != 0;
    header[79] &= !2;
    marked
}

fn set_word(leaf: &mut LogQueue, at: u64, value: u64) {
    leaf.poke(at, &value.to_be_bytes());
}

/// Where the 16-bit refcount of a host cluster stands, in the first block.
fn count_at(leaf: &LogQueue, host: u64) -> u64 {
    word(leaf, word(leaf, 48)) + host / CLUSTER * 2
}

#[test]
fn entries_at_metadata_or_behind_the_end_are_refused_and_the_rest_goes_on() {
    let (leaf, l2) = image(8);
    let (l1, refs) = (word(&leaf, 40), word(&leaf, 48));
    let block = word(&leaf, refs);
    let sectors = 7 << 58 & !COPIED & !COMPRESSED;
    let bad = [
        COPIED | l1,
        COPIED | l2,
        refs,
        COPIED | block,
        COPIED | l2 | 1,
        COPIED | DEVICE,
        COPIED | ((1 << 56) - CLUSTER),
        1 << 61 | 0x8000,
        0x8200,
        COPIED,
        u64::MAX,
        // Compressed: in the header, over the L1 table, behind the end.
        COMPRESSED | 104,
        COMPRESSED | (l1 - 100) | sectors,
        COMPRESSED | (DEVICE + 5),
        COMPRESSED | ((1 << 56) - 1),
    ];
    for raw in bad {
        let mut leaf = LogQueue::new(DEVICE, 1);
        leaf.load(&image(8).0.data());
        set_word(&mut leaf, l2 + 8, raw);
        let before = leaf.data();
        let what = format!("entry {raw:#x}");
        let mut rig = Rig::single(leaf);
        for (op, len) in [
            (Op::Read, CLUSTER),
            (Op::Read, 512),
            (Op::Write, 512),
            (Op::Write, CLUSTER),
            (Op::WriteZeroes, CLUSTER),
            (Op::WriteZeroes, 512),
            (Op::Discard, CLUSTER),
        ] {
            let s = rig.call(op, CLUSTER, len, &vec![0xCC; len as usize]).0;
            assert_eq!(s, Status::Corrupt, "{what}: {op:?} of {len}");
        }
        assert_eq!(rig.read(0, CLUSTER), [1; CLUSTER as usize], "{what}");
        rig.write(2 * CLUSTER, &[0x77; CLUSTER as usize]);
        rig.write(100 * CLUSTER, &[0x66; CLUSTER as usize]);
        rig.flush();
        let leaf = rig.close().remove(0);
        let mut after = leaf.data();
        // What is only behind the end may be of a file that was cut.
        let behind = [COPIED | DEVICE, COPIED | ((1 << 56) - CLUSTER), COMPRESSED | (DEVICE + 5)];
        let behind = behind.contains(&raw) || raw == COMPRESSED | ((1 << 56) - 1);
        assert_eq!(take_mark(&mut after), !behind, "{what}: the mark");
        // Header, refcount table, L1 table: as they were. The L2 table and refcounts have new
        // entries, and the bad one is still there.
        for at in [0, l1, refs] {
            let range = at as usize..at as usize + 512;
            assert!(before[range.clone()] == after[range], "{what}: metadata at {at:#x} changed");
        }
        assert_eq!(word(&leaf, l2 + 8), raw, "{what}");
        assert_eq!(leaf.discards, 0, "{what}");
    }
}

/// Entries that follow each other as those of a file written in order do, of which one is metadata.
#[test]
fn of_a_run_only_what_is_metadata_is_refused() {
    let (leaf, l2) = image(8);
    // Where the run begins, and which of its clusters is a table.
    let (before, after) = (l2 - CLUSTER, l2 + CLUSTER);
    let data: Vec<u64> = (0..8).map(|n| word(&leaf, l2 + n * 8) & !COPIED).collect();
    let whose = |host: u64| data.iter().position(|&d| d == host).map(|n| n as u8 + 1);
    assert!(whose(after).is_some() && whose(l2).is_none());
    let mut leaf = LogQueue::new(DEVICE, 1);
    leaf.load(&image(8).0.data());
    for (n, host) in [before, l2, after, after + CLUSTER].into_iter().enumerate() {
        set_word(&mut leaf, l2 + (n as u64 + 1) * 8, COPIED | host);
    }
    let mut rig = Rig::single(leaf);
    for (n, host) in [before, l2, after, after + CLUSTER].into_iter().enumerate() {
        let (status, bytes) = rig.call(Op::Read, (n as u64 + 1) * CLUSTER, CLUSTER, &[]);
        match whose(host) {
            Some(byte) => {
                assert_eq!((status, bytes), (Status::Ok, vec![byte; CLUSTER as usize]));
            }
            None => assert_eq!(status, Status::Corrupt, "{host:#x}"),
        }
    }
    assert_eq!(rig.read(7 * CLUSTER, CLUSTER), [8; CLUSTER as usize], "behind the run");
}

#[test]
fn wrong_l1_entries_fail_what_they_map_alone() {
    let (leaf, l2) = image(8);
    let l1 = word(&leaf, 40);
    // Read-only: for writing, opening refuses most of these.
    for raw in [COPIED | DEVICE, COPIED | ((1 << 56) - CLUSTER), l2 + 512, 1 << 60, COPIED] {
        let mut leaf = LogQueue::new(DEVICE, 1);
        leaf.load(&image(8).0.data());
        set_word(&mut leaf, l1 + 8, raw);
        let mut rig = read_only(leaf);
        assert_eq!(rig.call(Op::Read, 512 * CLUSTER, 512, &[]).0, Status::Corrupt, "{raw:#x}");
        assert_eq!(rig.read(CLUSTER, 512), [2; 512]);
        assert_eq!(rig.read(511 * CLUSTER, 512), [0; 512]);
        let s = rig.call(Op::Read, 511 * CLUSTER, 2 * CLUSTER, &[]).0;
        assert_eq!(s, Status::Corrupt, "{raw:#x}");
    }
}

/// Clusters in use with refcount 0: nothing is handed out twice once one was seen.
#[test]
fn a_cluster_in_use_without_a_count_stops_allocation() {
    for behind_all in [false, true] {
        let (mut leaf, l2) = image(8);
        // The last ones written lie behind all that will be counted then.
        for n in if behind_all { 6..8 } else { 2..3 } {
            let host = word(&leaf, l2 + n * 8) & !COPIED;
            let at = count_at(&leaf, host);
            leaf.poke(at, &[0, 0]);
        }
        let mut rig = Rig::single(leaf);
        if !behind_all {
            // The counts come into memory with the first allocation, the entries with a look.
            let s = rig.call(Op::Write, 600 * CLUSTER, CLUSTER, &[9; CLUSTER as usize]).0;
            assert!(matches!(s, Status::Ok | Status::Corrupt));
        }
        let old: Vec<Vec<u8>> = (0..8).map(|n| rig.read(n * CLUSTER, CLUSTER)).collect();
        let s = rig.call(Op::Write, 300 * CLUSTER, CLUSTER, &[0xAA; CLUSTER as usize]).0;
        assert_eq!(s, Status::Corrupt, "behind all: {behind_all}");
        // In place is still fine.
        rig.write(3 * CLUSTER, &[4; CLUSTER as usize]);
        for (n, old) in old.iter().enumerate() {
            assert_eq!(rig.read(n as u64 * CLUSTER, CLUSTER), *old);
        }
    }
}

/// One L2 table for both halves of the disk, as after a snapshot: changes of one half never show in
/// the other, counts follow, and at the end nothing leaks.
#[test]
fn a_table_and_clusters_that_two_name_are_copied_before_they_change() {
    let (mut leaf, l2) = image(8);
    let (l1, half) = (word(&leaf, 40), DISK / 2);
    set_word(&mut leaf, l1, l2);
    set_word(&mut leaf, l1 + 8, l2);
    let mut twice = vec![l2];
    for n in 0..8 {
        let host = word(&leaf, l2 + n * 8) & !COPIED;
        // The last two are zeroes that keep their cluster.
        set_word(&mut leaf, l2 + n * 8, host | u64::from(n >= 6));
        twice.push(host);
    }
    for host in twice {
        let at = count_at(&leaf, host);
        leaf.poke(at, &2u16.to_be_bytes());
    }
    let (leaf, bad, leaks) = check(leaf);
    assert_eq!((bad, leaks), (0, 0));
    let size = CLUSTER as usize;
    let mut model: Vec<u8> =
        (0..8).flat_map(|n| vec![if n < 6 { n + 1 } else { 0 }; size]).collect();
    let other = model.clone();
    let mut rig = Rig::single(leaf);
    for n in [0, 1, 6] {
        let at = n * size + 512;
        rig.write(at as u64, &[0xF0; 1024]);
        model[at..at + 1024].fill(0xF0);
    }
    assert_eq!(rig.call(Op::Discard, 2 * CLUSTER, CLUSTER, &[]).0, Status::Ok);
    let keep = rig.call_flags(Op::WriteZeroes, Flags::NO_UNMAP, 3 * CLUSTER, CLUSTER, &[]).0;
    assert_eq!(keep, Status::Ok);
    model[2 * size..4 * size].fill(0);
    rig.flush();
    // What one half alone names now says so nowhere: a flag that a check finds, and no leak.
    let (leaf, _, leaks) = check(rig.close().remove(0));
    assert_eq!(leaks, 0);
    let mut rig = Rig::single(leaf);
    // A kept cluster of both, and then the other half lets go of all.
    rig.write(half + 6 * CLUSTER, &[0x0F; 512]);
    assert!(rig.read(0, 8 * CLUSTER) == model, "the changed half");
    assert!(rig.read(half, 6 * CLUSTER) == other[..6 * size], "the other half");
    assert_eq!(rig.call(Op::Discard, half, 8 * CLUSTER, &[]).0, Status::Ok);
    assert!(rig.read(0, 8 * CLUSTER) == model, "the changed half, again");
    let (leaf, _, leaks) = check(rig.close().remove(0));
    assert_eq!(leaks, 0);
    let (leaf, bad, leaks) = repair(leaf);
    assert_eq!((bad, leaks), (0, 0));
    assert!(Rig::single(leaf).read(0, 8 * CLUSTER) == model, "repaired");
}

/// Freed twice by two entries that name one cluster with count 1.
#[test]
fn a_cluster_that_two_entries_name_is_freed_once() {
    let (mut leaf, l2) = image(8);
    let first = word(&leaf, l2);
    set_word(&mut leaf, l2 + 8, first);
    let mut rig = Rig::single(leaf);
    assert_eq!(rig.call(Op::Discard, 0, CLUSTER, &[]).0, Status::Ok);
    assert_eq!(rig.call(Op::Discard, CLUSTER, CLUSTER, &[]).0, Status::Ok);
    rig.flush();
    rig.flush();
    let s = rig.call(Op::Write, 300 * CLUSTER, CLUSTER, &[0xAA; CLUSTER as usize]).0;
    assert_eq!(s, Status::Corrupt);
    assert_eq!(rig.read(5 * CLUSTER, CLUSTER), [6; CLUSTER as usize]);
}

/// No block counts anything, and the file is longer than the refcount table can count: all that is
/// known to be in use stays so, no cluster is handed out twice, and nothing is handed out any more
/// once an entry was seen whose cluster is not counted.
#[test]
fn a_refcount_table_of_nothing() {
    let mut o = CreateOptions::new(DISK);
    o.cluster_size = 512;
    o.refcount_bits = 64;
    let mut rig = Rig::single(fresh(DEVICE, 3, &o));
    rig.write(0, &[1; 512]);
    let mut leaf = rig.close().remove(0);
    let table = word(&leaf, 48);
    leaf.poke(table, &[0; 512]);
    leaf.pretend(DEVICE, 7 << 20);
    let header = leaf.data()[..512].to_vec();
    let (stack, leaves) = open_stack(vec![leaf], &[Format::Qcow2], true).unwrap();
    let mut rig = Rig::attach(stack, leaves, Options::default());
    // The first ones under an L2 table that is there, the others under new ones.
    let place = |n: u64| if n < 30 { n * 1024 } else { n * 65536 };
    for n in 30..50 {
        rig.write(place(n), &[n as u8 + 1; 512]);
    }
    for n in 1..30 {
        let s = rig.call(Op::Write, place(n), 512, &[0xEE; 512]).0;
        assert_eq!(s, Status::Corrupt);
    }
    rig.flush();
    let leaf = rig.close().remove(0);
    let mut after = leaf.data();
    assert!(take_mark(&mut after));
    assert_eq!(header[..40], after[..40]);
    assert_eq!(header[60..], after[60..512]);
    let mut rig = read_only(leaf);
    for n in 0..50 {
        let value = if (1..30).contains(&n) { 0 } else { n as u8 + 1 };
        assert_eq!(rig.read(place(n), 512), [value; 512]);
    }
}

/// What lies behind all that the refcount table can count is not overwritten when that table grows:
/// an L2 table, and data that was looked at.
#[test]
fn a_refcount_table_that_grows_spares_what_is_in_its_way() {
    const PLACE: u64 = 2 << 20;
    for table in [true, false] {
        let mut o = CreateOptions::new(DISK);
        o.cluster_size = 512;
        o.refcount_bits = 64;
        let mut rig = Rig::single(fresh(DEVICE, 3, &o));
        (0..64u64).for_each(|n| rig.write(n * 512, &[n as u8 + 1; 512]));
        let mut leaf = rig.close().remove(0);
        let l1 = word(&leaf, 40);
        let l2 = word(&leaf, l1) & !COPIED;
        let (name, old) = if table { (l1, l2) } else { (l2, word(&leaf, l2) & !COPIED) };
        let mut bytes = [0; 512];
        leaf.peek(old, &mut bytes);
        leaf.poke(PLACE, &bytes);
        set_word(&mut leaf, name, COPIED | PLACE);
        leaf.pretend(DEVICE, PLACE + 512);
        let mut rig = Rig::single(leaf);
        assert_eq!(rig.read(0, 512), [1; 512]);
        let ends: Vec<Status> = (1..96)
            .map(|n| rig.call(Op::Write, n * 32768, 32768, &[0xAA; 32768]).0)
            .filter(|s| !s.is_ok())
            .collect();
        assert!(ends.iter().all(|s| *s == Status::Corrupt) && !ends.is_empty(), "{ends:?}");
        let _ = rig.call(Op::Flush, 0, 0, &[]);
        let leaf = rig.end().1.remove(0);
        let mut now = [0; 512];
        leaf.peek(PLACE, &mut now);
        assert!(now == bytes, "table: {table}");
    }
}

/// Any word anywhere in the L2 table: no panic, no hang, and clusters that are fine stay fine.
#[test]
fn rubbish_in_an_l2_table() {
    let (good, l2) = image(64);
    let good = good.data();
    let mut rng = Rng(4);
    for round in 0..60 {
        let mut leaf = LogQueue::new(DEVICE, round + 1);
        leaf.load(&good);
        let mut hurt = Vec::new();
        for _ in 0..12 {
            let n = 32 + rng.below(32);
            let raw = match rng.below(4) {
                0 => (rng.next() << 40) ^ rng.next(),
                1 => COPIED | (rng.below(DEVICE / 512) * 512),
                2 => (rng.below(DEVICE / CLUSTER) * CLUSTER) | rng.below(2),
                _ => COMPRESSED | (rng.below(4) << 58) | rng.below(DEVICE),
            };
            set_word(&mut leaf, l2 + n * 8, raw);
            hurt.push(n);
        }
        let mut rig = Rig::single(leaf);
        for _ in 0..60 {
            let (n, len) = (32 + rng.below(32), 512 * (1 + rng.below(16)));
            let len = len.min(DISK - n * CLUSTER);
            let (op, flags) = match rng.below(6) {
                0 => (Op::Discard, Flags::NONE),
                1 => (Op::WriteZeroes, Flags::NO_UNMAP),
                2 => (Op::WriteZeroes, Flags::NONE),
                3 | 4 => (Op::Read, Flags::NONE),
                _ => (Op::Write, Flags::NONE),
            };
            rig.send(op, flags, n * CLUSTER, len, &vec![1; len as usize]);
        }
        rig.settle();
        let _ = rig.call(Op::Flush, 0, 0, &[]);
        let (_, mut leaves) = rig.end();
        let mut back = read_only(leaves.remove(0));
        let all = back.read(0, 256 * 512);
        for n in 0..32u64 {
            // Unless an entry named it too, and was written to.
            let got = &all[(n * CLUSTER) as usize..][..CLUSTER as usize];
            let kept = got.iter().all(|&b| b == n as u8 + 1);
            let touched = got.iter().any(|&b| b <= 1 || b == 0xB7);
            assert!(kept || touched, "round {round}: cluster {n} holds {:x?}", &got[..8]);
        }
    }
}

/// Marked by the first write that meets it, not by a read; then it is opened for writing only after a
/// repair.
#[test]
fn a_contradiction_marks_the_image() {
    let (mut leaf, l2) = image(8);
    let l1 = word(&leaf, 40);
    set_word(&mut leaf, l2 + 8, COPIED | l1);
    let mut rig = Rig::single(leaf);
    assert_eq!(rig.call(Op::Read, CLUSTER, 512, &[]).0, Status::Corrupt);
    let leaf = rig.close().remove(0);
    assert!(!take_mark(&mut leaf.data()));
    let mut rig = Rig::single(leaf);
    assert_eq!(rig.call(Op::Write, CLUSTER, 512, &[3; 512]).0, Status::Corrupt);
    // The mark is durable when the write has failed, whatever happens next.
    let leaf = rig.end().1.remove(0);
    assert!(take_mark(&mut leaf.data()));
    let e = open_stack(vec![leaf], &[Format::Qcow2], true).err().unwrap().to_string();
    assert!(e.contains("marked corrupt"), "{e}");
    let (mut leaf, l2) = image(8);
    set_word(&mut leaf, l2 + 8, COPIED | l1);
    leaf.poke(79, &[2]);
    let (leaf, bad, _) = repair(leaf);
    assert_eq!(bad, 0);
    assert!(!take_mark(&mut leaf.data()));
    Rig::single(leaf).write(2 * CLUSTER, &[3; 512]);
}

/// A raw backing file larger than an L2 entry could say.
#[test]
fn a_backing_file_beyond_64_pib() {
    let size = (1 << 56) + (64 << 20);
    let mut o = CreateOptions::new(size);
    o.cluster_size = 2 << 20;
    o.backing = Some(("/layer1".to_owned(), Format::Raw));
    let top = fresh(32 << 20, 3, &o);
    let mut raw = LogQueue::new(1 << 20, 4);
    raw.pretend(1 << 57, 1 << 57);
    let mut rig = Rig::open(vec![top, raw], &[Format::Qcow2, Format::Raw], Options::default());
    assert_eq!(rig.read(4096, 512), [0xD5; 512]);
    for at in [1 << 56, (1 << 56) - 512, size - 512] {
        assert_ne!(rig.call(Op::Read, at, 512, &[]).0, Status::Ok, "{at:#x}");
    }
    // Once it is in the overlay, all is well.
    assert_eq!(rig.call(Op::WriteZeroes, 1 << 56, 2 << 20, &[]).0, Status::Ok);
    rig.write((1 << 56) + (256 << 10), &[4; 512]);
    assert_eq!(rig.read((1 << 56) + (256 << 10), 1024), [[4; 512], [0; 512]].concat());
}

/// A wrong entry below fails what comes from there, not what the overlay has.
#[test]
fn wrong_l1_entries_of_a_backing_file() {
    let (mut base, _) = image(8);
    let l1 = word(&base, 40);
    set_word(&mut base, l1, COPIED | DEVICE);
    let mut o = CreateOptions::new(DISK);
    o.cluster_size = CLUSTER;
    o.backing = Some(("/layer1".to_owned(), Format::Qcow2));
    let mut rig =
        Rig::open(vec![fresh(DEVICE, 5, &o), base], &[Format::Qcow2; 2], Options::default());
    assert_eq!(rig.call(Op::Read, CLUSTER, 512, &[]).0, Status::Corrupt);
    assert_eq!(rig.call(Op::Write, CLUSTER, CLUSTER, &[1; 4096]).0, Status::Corrupt);
    rig.write(600 * CLUSTER, &[7; 512]);
    assert_eq!(rig.read(600 * CLUSTER, 1024), [[7; 512], [0; 512]].concat());
    // What the overlay has in the same page of the map stays there.
    let mut leaves = rig.close();
    let mut base = leaves.remove(1);
    set_word(&mut base, l1, 0);
    let mut rig = Rig::open(vec![leaves.remove(0), base], &[Format::Qcow2; 2], Options::default());
    rig.write(2 * CLUSTER, &[8; CLUSTER as usize]);
    let mut leaves = rig.close();
    let mut base = leaves.remove(1);
    set_word(&mut base, l1, COPIED | DEVICE);
    let mut rig = Rig::open(vec![leaves.remove(0), base], &[Format::Qcow2; 2], Options::default());
    assert_eq!(rig.call(Op::Read, CLUSTER, 512, &[]).0, Status::Corrupt);
    assert_eq!(rig.read(2 * CLUSTER, CLUSTER), [8; CLUSTER as usize]);
}

/// Counts may be wrong: a file is not cut into what was there when it was opened.
#[test]
fn a_close_leaves_what_no_count_speaks_of() {
    let (mut leaf, l2) = image(64);
    let last = word(&leaf, l2 + 63 * 8) & !COPIED;
    for n in 60..64 {
        let host = word(&leaf, l2 + n * 8) & !COPIED;
        let at = count_at(&leaf, host);
        leaf.poke(at, &[0, 0]);
    }
    leaf.pretend(DEVICE, last + CLUSTER);
    let mut rig = Rig::single(leaf);
    assert_eq!(rig.image().end(), last + CLUSTER);
    // And once it is known that counts are wrong, it is not cut at all.
    rig.read(63 * CLUSTER, 512);
    assert_eq!(rig.image().end(), u64::MAX);
}

/// An entry behind the end of a file, which no refcount knows of: nobody else gets that cluster.
#[test]
fn an_uncounted_entry_behind_the_end_stops_allocation() {
    let (mut leaf, l2) = image(64);
    let end = (word(&leaf, l2 + 63 * 8) & !COPIED) + CLUSTER;
    set_word(&mut leaf, l2 + 100 * 8, COPIED | (end + 3 * CLUSTER));
    leaf.pretend(DEVICE, end);
    let mut rig = Rig::single(leaf);
    assert_eq!(rig.call(Op::Read, 100 * CLUSTER, 512, &[]).0, Status::Corrupt);
    assert_eq!(rig.call(Op::Write, 300 * CLUSTER, 512, &[0xAA; 512]).0, Status::Corrupt);
    rig.write(63 * CLUSTER, &[5; 512]);
    assert_eq!(rig.read(63 * CLUSTER, 512), [5; 512]);
}

/// Tables cut off with the file: an error, not zeroes.
#[test]
fn a_file_that_was_cut() {
    let (mut leaf, l2) = image(64);
    let last = word(&leaf, l2 + 63 * 8) & !COPIED;
    leaf.pretend(DEVICE, last);
    let mut rig = Rig::single(leaf);
    assert_eq!(rig.call(Op::Read, 63 * CLUSTER, 512, &[]).0, Status::Corrupt);
    assert_eq!(rig.read(62 * CLUSTER, 512), [63; 512]);
    let (_, bad, _) = check(rig.end().1.remove(0));
    assert!(bad > 0);
}
