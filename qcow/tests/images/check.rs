//! Checking and repairing, compared with qemu-img check: the same counts, and what is repaired is
//! clean for it.

use std::fs;
use std::path::{Path, PathBuf};

use qcow::check::{Repair, Report, run};
use qcow::{ImageMeta, Mode};

use crate::support::*;

fn check(path: &Path, repair: Repair) -> Report {
    let mut storage = FileStorage::open(path, repair != Repair::None);
    run(&mut storage, path.to_str().unwrap(), repair, &mut |_| {}).unwrap()
}

/// Where things are in an image.
struct Layout {
    meta: ImageMeta,
    /// Offset of the first L2 table.
    l2: u64,
    /// Offset of the first refcount block.
    block: u64,
}

fn layout(path: &Path) -> Layout {
    let mut s = FileStorage::open(path, false);
    let meta = ImageMeta::open(&mut s, "a", Mode::Check).unwrap();
    let l2 = meta.l1[0] & 0x00ff_ffff_ffff_fe00;
    let block = meta.refcount_table[0];
    Layout { meta, l2, block }
}

/// An image with data, zero clusters with and without a place, and compressed clusters.
fn sample(dir: &Path, options: &str) -> PathBuf {
    let path = dir.join("a.qcow2");
    let _ = fs::remove_file(&path);
    qemu_create(&path, options, "4M");
    qemu_io(
        &path,
        &[
            "write -c -P 9 3M 64k",
            "write -c -P 8 3200k 64k",
            "write -P 1 0 1M",
            "write -z 1M 128k",
            "write -z 192k 64k",
            "discard 512k 64k",
        ],
    );
    path
}

/// The counts that both programs report, without those that are only in one.
fn counts(json: &serde_json::Value) -> Vec<(&'static str, u64)> {
    [
        "check-errors",
        "corruptions",
        "leaks",
        "image-end-offset",
        "total-clusters",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
    ]
    .into_iter()
    .map(|key| (key, json[key].as_u64().unwrap_or(0)))
    .collect()
}

fn same_counts(path: &Path, what: &str) {
    let ours = serde_json::to_value(check(path, Repair::None)).unwrap();
    let (_, theirs) = qemu_check(path, &[]);
    assert_eq!(counts(&ours), counts(&theirs), "{what}");
}

/// Contents without what metadata that is mapped as data shows: that changes by repair.
fn visible(what: &str, path: &Path, mut contents: Vec<u8>) -> Vec<u8> {
    if what.starts_with("data over") {
        let cluster = 1 << layout(path).bits();
        contents.drain(cluster..2 * cluster);
    }
    contents
}

/// A kind of damage: name, and what does it.
type Damage = (&'static str, fn(&Path, &Layout));

/// Damage that qemu-img counts as we do and that can be repaired completely.
const REPAIRABLE: &[Damage] = &[
    ("leaked cluster", |p, l| set_refcount(p, l, free_cluster(p, l), 1)),
    ("refcount too high", |p, l| set_refcount(p, l, l.l2 >> l.bits(), 3)),
    ("refcount of a table zero", |p, l| set_refcount(p, l, l.l2 >> l.bits(), 0)),
    ("refcount of the header zero", |p, l| set_refcount(p, l, 0, 0)),
    ("COPIED flag missing", |p, l| poke_u64(p, l.l2, peek_u64(p, l.l2) & !(1 << 63))),
    ("COPIED flag of an L2 table missing", |p, l| {
        poke_u64(p, l.meta.header.l1_table_offset, l.l2);
    }),
    ("two entries for one cluster", |p, l| poke_u64(p, l.l2 + 8, peek_u64(p, l.l2))),
    ("data over its own L2 table", |p, l| poke_u64(p, l.l2 + 8, (1 << 63) | l.l2)),
    ("refcount block missing", |p, l| poke_u64(p, l.meta.header.refcount_table_offset, 0)),
    ("unusable: refcount block not aligned", |p, l| {
        poke_u64(p, l.meta.header.refcount_table_offset, l.block + 512);
    }),
    ("unusable: refcount table entry with reserved bits", |p, l| {
        poke_u64(p, l.meta.header.refcount_table_offset, l.block + 1);
    }),
    ("unusable: two refcount table entries for one block", |p, l| {
        poke_u64(p, l.meta.header.refcount_table_offset + 8, l.block);
    }),
    ("data over the refcount block", |p, l| poke_u64(p, l.l2 + 8, (1 << 63) | l.block)),
    ("data over the refcount table", |p, l| {
        poke_u64(p, l.l2 + 8, (1 << 63) | l.meta.header.refcount_table_offset);
    }),
    ("misaligned place for zeroes", |p, l| {
        poke_u64(p, l.l2 + 8 * ((1 << 20) >> l.bits()), (1 << 63) | 0x200 | 1)
    }),
    ("entry dropped", |p, l| poke_u64(p, l.l2, 0)),
];

impl Layout {
    fn bits(&self) -> u32 {
        self.meta.geometry.cluster_bits()
    }
}

/// A cluster inside the file that nothing uses.
fn free_cluster(path: &Path, l: &Layout) -> u64 {
    let bytes = fs::read(path).unwrap();
    let count = bytes.len() as u64 >> l.bits();
    (0..count)
        .find(|n| bytes[(l.block + n * 2) as usize..][..2] == [0, 0])
        .expect("the image has a discarded cluster")
}

/// Sets a 16-bit refcount.
fn set_refcount(path: &Path, l: &Layout, cluster: u64, value: u16) {
    patch(path, l.block + cluster * 2, &value.to_be_bytes());
}

#[test]
fn damage_is_counted_as_by_qemu_and_repaired_to_what_it_calls_clean() {
    let dir = tempfile::tempdir().unwrap();
    let good = sample(dir.path(), "");
    same_counts(&good, "good");
    let theirs = dir.path().join("theirs.qcow2");
    let ours = dir.path().join("ours.qcow2");
    for (what, damage) in REPAIRABLE {
        fs::copy(&good, &ours).unwrap();
        damage(&ours, &layout(&ours));
        let contents = |path| visible(what, path, our_contents(path));
        // A damaged entry that nothing but repair can read.
        let unreadable = what.starts_with("misaligned");
        let before = contents(if unreadable { &good } else { &ours });
        // QEMU calls refcounts that it cannot read errors; for us they are zero, so corruptions.
        // And it counts a block's second use only.
        if !what.starts_with("unusable") {
            same_counts(&ours, what);
        }
        fs::copy(&ours, &theirs).unwrap();
        let report = check(&ours, Repair::All);
        assert_eq!((report.check_errors, report.corruptions, report.leaks), (0, 0, 0), "{what}");
        assert!(report.corruptions_fixed + report.leaks_fixed > 0, "{what}");
        let (code, json) = qemu_check(&ours, &[]);
        assert_eq!(code, 0, "{what}: {json}");
        // QEMU's own repair must not give other contents.
        qemu_check(&theirs, &["-r", "all"]);
        assert!(contents(&ours) == before, "{what}: repair changed the contents");
        let theirs = visible(what, &theirs, qemu_contents(&theirs));
        assert!(theirs == before, "{what}: we repaired otherwise than QEMU");
        // A second repair finds nothing and writes nothing.
        let bytes = fs::read(&ours).unwrap();
        let again = check(&ours, Repair::All);
        assert_eq!((again.corruptions_fixed, again.leaks_fixed), (0, 0), "{what}");
        assert!(fs::read(&ours).unwrap() == bytes, "{what}");
    }
}

#[test]
fn counts_of_what_was_fixed() {
    let dir = tempfile::tempdir().unwrap();
    let good = sample(dir.path(), "");
    let theirs = dir.path().join("theirs.qcow2");
    for (what, damage) in [REPAIRABLE[0], REPAIRABLE[1], REPAIRABLE[4], REPAIRABLE[6]] {
        let path = dir.path().join("b.qcow2");
        fs::copy(&good, &path).unwrap();
        damage(&path, &layout(&path));
        fs::copy(&path, &theirs).unwrap();
        let report = check(&path, Repair::All);
        let (_, json) = qemu_check(&theirs, &["-r", "all"]);
        let want = ["corruptions-fixed", "leaks-fixed"].map(|k| json[k].as_u64().unwrap_or(0));
        assert_eq!([report.corruptions_fixed, report.leaks_fixed], want, "{what}");
    }
}

#[test]
fn repair_of_leaks_only_lowers() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample(dir.path(), "");
    let l = layout(&path);
    set_refcount(&path, &l, free_cluster(&path, &l), 7);
    set_refcount(&path, &l, l.block >> 16, 2);
    set_refcount(&path, &l, l.l2 >> 16, 0);
    let report = check(&path, Repair::Leaks);
    assert_eq!((report.leaks, report.leaks_fixed), (0, 2));
    // The refcount that is too low, and the flag that contradicts it.
    assert_eq!((report.corruptions, report.corruptions_fixed), (2, 0));
    let report = check(&path, Repair::All);
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
    assert_clean(&path);
    // Where the refcounts must be rebuilt, freeing alone is not possible.
    poke_u64(&path, l.meta.header.refcount_table_offset, 0);
    let bytes = fs::read(&path).unwrap();
    let report = check(&path, Repair::Leaks);
    assert_eq!(report.check_errors, 1);
    assert!(report.corruptions > 0);
    assert!(fs::read(&path).unwrap() == bytes);
}

#[test]
fn what_cannot_be_repaired_is_said_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    let good = sample(dir.path(), "");
    let cases: &[Damage] = &[
        ("reserved bits in an L2 entry", |p, l| poke_u64(p, l.l2, peek_u64(p, l.l2) | 4)),
        ("reserved bits in an L1 entry", |p, l| {
            poke_u64(p, l.meta.header.l1_table_offset, l.l2 | (1 << 63) | 2);
        }),
        ("data not aligned", |p, l| poke_u64(p, l.l2, peek_u64(p, l.l2) + 0x200)),
        ("data far past the end", |p, l| poke_u64(p, l.l2 + 64, (1 << 63) | (1 << 45))),
        ("L2 table far past the end", |p, l| {
            poke_u64(p, l.meta.header.l1_table_offset, (1 << 63) | (1 << 45));
        }),
    ];
    for (what, damage) in cases {
        let path = dir.path().join("b.qcow2");
        fs::copy(&good, &path).unwrap();
        damage(&path, &layout(&path));
        let before = check(&path, Repair::None);
        assert!(before.corruptions > 0, "{what}");
        let after = check(&path, Repair::All);
        assert!(after.corruptions > 0, "{what}");
        assert!(after.corruptions <= before.corruptions, "{what}");
        let (code, _) = qemu_check(&path, &[]);
        assert_eq!(code, 2, "{what}");
        let bytes = fs::read(&path).unwrap();
        check(&path, Repair::All);
        assert!(fs::read(&path).unwrap() == bytes, "{what}: a second repair changed something");
    }
}

#[test]
fn flags_where_there_can_be_none_are_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample(dir.path(), "");
    let l = layout(&path);
    let compressed = l.l2 + 48 * 8;
    assert_ne!(peek_u64(&path, compressed) & (1 << 62), 0);
    poke_u64(&path, compressed, peek_u64(&path, compressed) | (1 << 63));
    let empty = l.l2 + 40 * 8;
    poke_u64(&path, empty, 1 << 63);
    let mut lines = Vec::new();
    let mut storage = FileStorage::open(&path, false);
    let report = run(&mut storage, "a", Repair::None, &mut |l| lines.push(l.to_owned())).unwrap();
    assert_eq!(report.corruptions, 2);
    assert!(lines[0].ends_with("is 0x8000000000000000: the COPIED flag is set without a cluster"));
    assert!(lines[1].ends_with("the COPIED flag is set on a compressed cluster"), "{lines:?}");
    let report = check(&path, Repair::All);
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 2));
    assert_clean(&path);
}

#[test]
fn every_refcount_width_and_cluster_size() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = Rng(11);
    for order in 0..=6u32 {
        for bits in [[9, 16], [12, 21]][order as usize % 2] {
            let path = dir.path().join("a.qcow2");
            qemu_create(
                &path,
                &format!("cluster_size={},refcount_bits={}", 1 << bits, 1 << order),
                "5M",
            );
            qemu_io(&path, &["write -P 1 0 1M", "write -P 2 3M 512k", "discard 64k 300k"]);
            same_counts(&path, "good");
            let l = layout(&path);
            // Noise in the refcount block, in the part that covers the file.
            let file = fs::metadata(&path).unwrap().len();
            let used = ((l.meta.geometry.clusters_for(file) << order) / 8).min(1 << bits);
            for _ in 0..20 {
                patch(&path, l.block + rng.below(used.max(1)), &[rng.next() as u8]);
            }
            let before = our_contents(&path);
            same_counts(&path, "noise");
            let report = check(&path, Repair::All);
            assert_eq!((report.check_errors, report.corruptions, report.leaks), (0, 0, 0));
            assert_clean(&path);
            // And with no refcount blocks at all.
            let table = l.meta.header.refcount_table_offset;
            patch(&path, table, &vec![0; l.meta.refcount_table.len() * 8]);
            let report = check(&path, Repair::All);
            assert_eq!((report.check_errors, report.corruptions, report.leaks), (0, 0, 0));
            assert_clean(&path);
            assert!(our_contents(&path) == before);
        }
    }
}

#[test]
fn a_refcount_that_does_not_fit_its_width_stays_a_corruption() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, "refcount_bits=1", "4M");
    qemu_io(&path, &["write -P 1 0 256k"]);
    let l = layout(&path);
    poke_u64(&path, l.l2 + 8, peek_u64(&path, l.l2));
    let report = check(&path, Repair::All);
    assert_eq!(report.check_errors, 0);
    assert!(report.corruptions > 0);
}

#[test]
fn snapshots_and_bitmaps_count_as_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample(dir.path(), "");
    let p = path.to_str().unwrap();
    qemu_img(&["snapshot", "-c", "one", p]);
    qemu_io(&path, &["write -P 4 100k 500k", "discard 2M 64k"]);
    qemu_img(&["snapshot", "-c", "two", p]);
    qemu_img(&["bitmap", "--add", p, "b0"]);
    qemu_io(&path, &["write -P 5 700k 1M"]);
    assert_clean(&path);
    same_counts(&path, "snapshots and bitmaps");
    let l = layout(&path);
    set_refcount(&path, &l, 9, 1);
    set_refcount(&path, &l, 30, 5);
    same_counts(&path, "damaged");
    check(&path, Repair::All);
    assert_clean(&path);
    // Contents of the snapshots survived.
    let raw = dir.path().join("snapshot.raw");
    qemu_img(&["convert", "-l", "one", "-O", "raw", p, raw.to_str().unwrap()]);
    assert!(fs::read(&raw).unwrap()[..192 << 10].iter().all(|&b| b == 1));
    // Without its feature bit the bitmap is a leak, as for QEMU.
    poke_u64(&path, 88, 0);
    let (code, theirs) = qemu_check(&path, &[]);
    let ours = check(&path, Repair::None);
    assert_eq!((code, ours.leaks), (3, theirs["leaks"].as_u64().unwrap()));
    assert!(ours.leaks > 0);

    // A snapshot table that leads nowhere: nothing may be freed.
    patch(&path, 64, &(1u64 << 50).to_be_bytes());
    let bytes = fs::read(&path).unwrap();
    let report = check(&path, Repair::All);
    assert!(report.check_errors > 0 && report.corruptions > 0);
    assert!(fs::read(&path).unwrap() == bytes);
}

#[test]
fn corrupt_and_dirty_bits_are_cleared_by_a_repair_that_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample(dir.path(), "");
    for repair in [Repair::None, Repair::All] {
        patch(&path, 79, &[3]);
        check(&path, repair);
        let l = layout(&path);
        assert_eq!(l.meta.header.incompatible_features, if repair == Repair::None { 3 } else { 0 });
    }
    let l = layout(&path);
    poke_u64(&path, l.l2, peek_u64(&path, l.l2) | 4);
    patch(&path, 79, &[2]);
    check(&path, Repair::All);
    assert!(layout(&path).meta.header.is_corrupt());
}

#[test]
fn a_device_without_room_behind_the_image_is_rebuilt_inside() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample(dir.path(), "cluster_size=4096");
    let before = our_contents(&path);
    // A logical volume: larger than the image, of a size that does not change.
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(fs::metadata(&path).unwrap().len().next_multiple_of(4096) + 40960).unwrap();
    let l = layout(&path);
    poke_u64(&path, l.meta.header.refcount_table_offset, 0);
    let report = run(&mut FileStorage::device(&path), "a", Repair::All, &mut |_| {}).unwrap();
    assert_eq!((report.check_errors, report.corruptions, report.leaks), (0, 0, 0));
    assert_clean(&path);
    assert!(our_contents(&path) == before);
    // With no room at all it says so and leaves the image alone.
    let path = sample(dir.path(), "cluster_size=4096");
    qemu_io(&path, &["write -P 3 512k 64k"]);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let end = check(&path, Repair::None).image_end_offset;
    file.set_len(end).unwrap();
    poke_u64(&path, layout(&path).meta.header.refcount_table_offset, 0);
    let bytes = fs::read(&path).unwrap();
    let mut device = FileStorage::device(&path);
    let e = run(&mut device, "a", Repair::All, &mut |_| {}).unwrap_err();
    assert_eq!(
        e.to_string(),
        "a: the refcount structures cannot be rebuilt: there is no free space for them"
    );
    assert!(fs::read(&path).unwrap() == bytes);
}

#[test]
fn a_repair_that_is_cut_off_can_be_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let good = sample(dir.path(), "cluster_size=4096");
    let path = dir.path().join("cut.qcow2");
    for (what, damage) in REPAIRABLE {
        let mut writes = 0;
        loop {
            fs::copy(&good, &path).unwrap();
            damage(&path, &layout(&path));
            let contents = |path| visible(what, path, our_contents(path));
            let unreadable = what.starts_with("misaligned");
            let before = contents(if unreadable { &good } else { &path });
            let mut storage = FileStorage::open(&path, true);
            storage.writes_left = Some(writes);
            let done = run(&mut storage, "a", Repair::All, &mut |_| {}).is_ok();
            if done || !unreadable {
                assert!(contents(&path) == before, "{what} after {writes} writes");
            }
            let report = check(&path, Repair::All);
            assert_eq!(
                (report.check_errors, report.corruptions, report.leaks),
                (0, 0, 0),
                "{what}"
            );
            assert!(contents(&path) == before, "{what} after {writes} writes");
            if done {
                break;
            }
            writes += 1;
        }
        assert!(writes > 0, "{what}");
        assert_clean(&path);
    }
}

#[test]
fn what_cannot_be_checked_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_create(&path, "", "1M");
    patch(&path, 35, &[2]);
    let e = run(&mut FileStorage::open(&path, false), "a", Repair::None, &mut |_| {}).unwrap_err();
    assert!(matches!(e, qcow::Error::Unsupported { .. }), "{e}");
    qemu_create(&path, "cluster_size=512", "1M");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(3 << 40).unwrap();
    let e = run(&mut FileStorage::open(&path, false), "a", Repair::None, &mut |_| {}).unwrap_err();
    assert_eq!(
        e.to_string(),
        "a: has 6442450944 clusters of 512 bytes; at most 2147483647 can be checked"
    );
    let e = run(&mut FileStorage::open(&path, false), "a", Repair::All, &mut |_| {}).unwrap_err();
    assert_eq!(e.to_string(), "a: cannot be repaired: it is read-only");
}

#[test]
fn what_cannot_be_read_is_counted_and_nothing_is_repaired_then() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample(dir.path(), "");
    let l = layout(&path);
    set_refcount(&path, &l, free_cluster(&path, &l), 1);
    let bytes = fs::read(&path).unwrap();
    for (what, offset) in [("L2 table", l.l2), ("refcount block", l.block)] {
        let mut storage = FileStorage::open(&path, true);
        storage.bad = offset..offset + 512;
        let mut lines = Vec::new();
        let report =
            run(&mut storage, "a", Repair::All, &mut |l| lines.push(l.to_owned())).unwrap();
        assert!(report.check_errors > 0);
        let want =
            format!("ERROR a: {what}: read of 65536 bytes at offset {offset:#x}: medium error");
        assert!(lines.contains(&want), "{lines:?}");
        assert!(fs::read(&path).unwrap() == bytes);
    }
}

#[test]
fn one_failing_read_at_any_point_frees_nothing_that_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let good = sample(dir.path(), "cluster_size=4096");
    let l = layout(&good);
    set_refcount(&good, &l, free_cluster(&good, &l), 1);
    set_refcount(&good, &l, l.l2 >> 12, 3);
    let before = our_contents(&good);
    let path = dir.path().join("b.qcow2");
    for n in 0.. {
        fs::copy(&good, &path).unwrap();
        let mut storage = FileStorage::open(&path, true);
        storage.failing_read = Some(n);
        let result = run(&mut storage, "a", Repair::All, &mut |_| {});
        let report = check(&path, Repair::None);
        // The flag of the table whose refcount was too high may still be as it was.
        assert!(report.corruptions <= 1, "read {n}: {report:?}");
        assert!(our_contents(&path) == before, "read {n}");
        if storage.failing_read.is_some() {
            assert_eq!(result.unwrap().leaks_fixed, 2);
            break;
        }
    }
    assert_clean(&path);
}
