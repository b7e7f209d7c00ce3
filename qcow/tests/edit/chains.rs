//! Committing and rebasing, and options of an image.

use qcow::build::Builder;
use qcow::edit::{self, Amend, NewBacking};
use qcow::open::Format;

use crate::rig::{
    Accesses, Disk, KINDS, Kind, Rng, clean, contents, image, judge, judged_clean, judged_contents,
    open, open_from, qemu_img,
};

/// A chain of `depth` images over a raw file, each with another size; the top first. `mix`: their
/// clusters have other sizes, too.
fn layers(kind: &Kind, depth: usize, mix: bool, seed: u64) -> Vec<Vec<u8>> {
    let mut rng = Rng(seed);
    let raw = (0..kind.size() - kind.size() % 512).map(|i| (i / 700) as u8 | 1).collect();
    let mut all: Vec<Vec<u8>> = vec![raw];
    for d in 0..depth {
        let mut kind = *kind;
        if mix && d % 2 == 1 {
            kind.cluster = if kind.cluster == 512 { 4096 } else { 512 };
        }
        let size = kind.size() / 512 * 512 + 512 * rng.below(2000);
        let size = size.min(400 * kind.cluster) - 512 * rng.below(100);
        let mut o = kind.options(size);
        let format = if d == 0 { Format::Raw } else { Format::Qcow2 };
        o.backing = Some((format!("/{}", depth - d), format));
        all.push(image(&o, seed * 10 + d as u64));
    }
    all.reverse();
    all
}

fn small() -> impl Iterator<Item = (usize, &'static Kind)> {
    KINDS.iter().enumerate().filter(|(_, k)| k.cluster <= 65536)
}

#[test]
fn a_commit_changes_nothing_that_shows() {
    let dir = judge();
    for (i, kind) in KINDS.iter().enumerate() {
        for (depth, to, mix) in
            [(1, 1, false), (2, 1, false), (2, 1, true), (3, 1, true), (3, 2, true), (3, 3, false)]
        {
            let what = format!("{kind:?} {depth} to {to} {mix}");
            let made = layers(kind, depth, mix, i as u64 + 7);
            let disks = Disk::several(&made);
            let before = contents(&mut open(&disks));
            let mut reader = open(&disks);
            let base = reader.layers()[to].size();
            let mut last = 0;
            let done = edit::commit(&mut reader, to, to == 1, &mut |at| {
                assert!(at >= last, "{at} after {last}");
                last = at;
            })
            .unwrap();
            // With very few clusters there may be none of data.
            let full = done.data_bytes > 0;
            assert!(full || kind.cluster > 65536, "{what}");
            // The reader itself knows what changed.
            assert!(contents(&mut reader) == before, "{what}");
            assert!(contents(&mut open(&disks)) == before, "{what}");
            let below = contents(&mut open_from(&disks, to));
            assert!(below[..before.len()] == before, "{what}: below");
            assert_eq!(below.len() as u64, base.max(before.len() as u64));
            for disk in &disks[..depth] {
                clean(&disk.bytes(), &what);
                if let Some(dir) = &dir {
                    judged_clean(dir.path(), &disk.bytes(), &what);
                }
            }
            if to == 1 && full {
                let mut top = open(&disks);
                let span = top.span(0, u64::MAX).unwrap().unwrap();
                assert!(span.depth > 0 && disks[0].bytes().len() < made[0].len(), "{what}");
            }
        }
    }
}

/// What lies side by side is read and written a MiB at a time.
#[test]
fn a_commit_and_a_rebase_of_much_take_few_reads_and_writes() {
    const MIB: usize = 40;
    // What tables, counts and the header take.
    const MORE: usize = 24;
    let kind = Kind { cluster: 65536, bits: 16, version: 3 };
    let size = (MIB as u64) << 20;
    let raw = vec![9; size as usize];
    let made = |backing: &str, first: usize, step: usize| {
        let mut o = kind.options(size);
        let format = if backing == "/2" { Format::Raw } else { Format::Qcow2 };
        o.backing = Some((backing.into(), format));
        let disk = Disk::new(Vec::new());
        let mut storage = disk.clone();
        let mut builder = Builder::new(&mut storage, "made", &o).unwrap();
        for cluster in (first..size as usize >> 16).step_by(step) {
            builder.data((cluster as u64) << 16, &vec![cluster as u8 | 1; 65536]).unwrap();
        }
        builder.finish().unwrap();
        disk.bytes()
    };
    let none = usize::MAX;
    // Clusters that lie as the guest sees them, and with the odd ones behind the even ones.
    let mixed = Disk::several(&[made("/1", 1, 2), made("/2", 0, 2), raw.clone()]);
    edit::commit(&mut open(&mixed), 1, false, &mut |_| {}).unwrap();
    for (upper, most) in
        [(made("/1", 0, 1), MIB + MORE), (mixed[1].bytes(), size as usize / 65536 + MORE)]
    {
        let disks = Disk::several(&[upper, made("/2", none, 1), raw.clone()]);
        edit::set_backing(&mut disks[0].clone(), "top", Some(("/1", Format::Qcow2))).unwrap();
        let before = contents(&mut open(&disks));
        // Into clusters that are new, into those in place, and into a raw image.
        for to in [1, 1, 2] {
            let Accesses { reads, writes, told } = disks[0].accesses(|| {
                edit::commit(&mut open(&disks), to, false, &mut |_| {}).unwrap();
            });
            assert!(reads <= most, "to {to}: {reads} reads, at most {most} are allowed");
            assert!(writes <= MIB + MORE, "to {to}: {writes} writes");
            assert_eq!(told, size, "to {to}: each byte is fetched ahead, once");
            assert!(contents(&mut open_from(&disks, to)) == before);
        }
    }
    let disks = Disk::several(&[made("/1", none, 1), made("/2", none, 1), raw]);
    let Accesses { reads, writes, .. } = disks[0].accesses(|| {
        rebase(&disks, None, false).unwrap();
    });
    assert!(reads <= MIB + MORE && writes <= MIB + MORE, "rebase: {reads} reads, {writes} writes");
    clean(&disks[0].bytes(), "rebased");
}

#[test]
fn a_cut_of_a_commit_changes_nothing_that_shows_and_it_can_be_repeated() {
    let mut cuts = 0;
    for (i, kind) in small() {
        for (depth, mix) in [(1, false), (2 + i % 2, i % 4 < 2)] {
            let made = layers(kind, depth, mix, i as u64 + 20);
            let disks = Disk::several(&made);
            let before = contents(&mut open(&disks));
            disks[0].cuts(
                i as u64,
                1,
                || edit::commit(&mut open(&disks), 1, true, &mut |_| {}).unwrap(),
                |what, after| {
                    cuts += 1;
                    let what = format!("{kind:?} {depth} {mix}, {what}");
                    for bytes in &after[..depth] {
                        clean(bytes, &what);
                    }
                    let disks = Disk::several(after);
                    assert!(contents(&mut open(&disks)) == before, "{what}");
                    if cuts % 7 == 0 {
                        edit::commit(&mut open(&disks), 1, true, &mut |_| {}).unwrap();
                        assert!(contents(&mut open(&disks)) == before, "{what}");
                        disks[..depth].iter().for_each(|d| clean(&d.bytes(), &what));
                    }
                },
            );
        }
    }
    assert!(cuts > 500, "{cuts}");
}

/// Rebases the top of `disks` to layer `to` of it, or to none; `shared`: tables may say that it is
/// the same file.
fn rebase(disks: &[Disk], to: Option<usize>, shared: bool) -> qcow::Result<edit::Rebased> {
    let mut reader = open(disks);
    let Some(to) = to else { return edit::rebase(&mut reader, None, &mut |_| {}) };
    let mut below = open_from(disks, to);
    let format = below.layers()[0].format();
    let depth = shared.then_some(to);
    let backing = NewBacking { name: &format!("/{to}"), format, reader: &mut below, depth };
    edit::rebase(&mut reader, Some(backing), &mut |_| {})
}

#[test]
fn a_rebase_changes_nothing_that_shows() {
    let dir = judge();
    for (i, kind) in KINDS.iter().enumerate() {
        for (depth, to) in
            [(1, None), (2, Some(2)), (3, Some(2)), (3, Some(3)), (3, Some(1)), (3, None)]
        {
            for shared in [true, false] {
                let what = format!("{kind:?} {depth} to {to:?} {shared}");
                let made = layers(kind, depth, i % 2 == 0, i as u64 + 40);
                let disks = Disk::several(&made);
                let before = contents(&mut open(&disks));
                let done = rebase(&disks, to, shared).unwrap();
                if to == Some(1) {
                    assert_eq!(done, edit::Rebased::default(), "{what}");
                }
                let mut reader = open(&disks);
                assert_eq!(reader.layers().len(), to.map_or(1, |t| depth - t + 2), "{what}");
                assert!(contents(&mut reader) == before, "{what}");
                clean(&disks[0].bytes(), &what);
                if let Some(dir) = &dir {
                    judged_clean(dir.path(), &disks[0].bytes(), &what);
                    if to.is_none() {
                        let got = judged_contents(dir.path(), &disks[0].bytes(), None);
                        assert!(got == before, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_cut_of_a_rebase_changes_nothing_that_shows_and_it_can_be_repeated() {
    let mut cuts = 0;
    for (i, kind) in small() {
        for (depth, to) in [(1, None), (3, Some(2)), (3, Some(3))] {
            let made = layers(kind, depth, i % 2 == 0, i as u64 + 60);
            let disks = Disk::several(&made);
            let before = contents(&mut open(&disks));
            disks[0].cuts(
                i as u64,
                1,
                || rebase(&disks, to, true).unwrap(),
                |what, after| {
                    cuts += 1;
                    let what = format!("{kind:?} {depth} to {to:?}, {what}");
                    clean(&after[0], &what);
                    let disks = Disk::several(after);
                    assert!(contents(&mut open(&disks)) == before, "{what}");
                    if cuts % 7 == 0 {
                        rebase(&disks, to, false).unwrap();
                        assert!(contents(&mut open(&disks)) == before, "{what}");
                        clean(&disks[0].bytes(), &what);
                    }
                },
            );
        }
    }
    assert!(cuts > 300, "{cuts}");
}

#[test]
fn snapshots_that_would_change_are_in_the_way() {
    let made = layers(&KINDS[2], 2, false, 3);
    let disks = Disk::several(&made);
    edit::create_snapshot(&mut disks[0].clone(), "top", "x", std::time::Duration::ZERO).unwrap();
    let before = disks[0].bytes();
    let e = edit::commit(&mut open(&disks), 1, true, &mut |_| {}).unwrap_err();
    assert!(e.to_string().contains("internal snapshots"), "{e}");
    let e = rebase(&disks, None, false).unwrap_err();
    assert!(e.to_string().contains("internal snapshots"), "{e}");
    assert!(disks[0].bytes() == before && disks[1].bytes() == made[1]);
    // Those of the layer below are no matter: they keep what they hold.
    let disks = Disk::several(&made);
    edit::create_snapshot(&mut disks[1].clone(), "mid", "x", std::time::Duration::ZERO).unwrap();
    let held = contents(&mut open_from(&disks, 1));
    let before = contents(&mut open(&disks));
    edit::commit(&mut open(&disks), 1, true, &mut |_| {}).unwrap();
    assert!(contents(&mut open(&disks)) == before);
    let mut chain = open_from(&disks, 1).into_chain();
    chain.show_snapshot(edit::SnapshotKey::Name("x")).unwrap();
    assert!(contents(&mut qcow::ChainReader::new(chain)) == held);
    clean(&disks[1].bytes(), "with a snapshot");
}

#[test]
fn a_commit_grows_no_version_2_image_with_snapshots() {
    let kind = KINDS.iter().find(|k| k.version == 2 && k.cluster <= 65536).unwrap();
    let size = kind.size();
    let mut top = kind.options(size + kind.cluster);
    top.backing = Some(("/1".into(), Format::Qcow2));
    let disks = Disk::several(&[image(&top, 5), image(&kind.options(size), 6)]);
    edit::create_snapshot(&mut disks[1].clone(), "low", "x", std::time::Duration::ZERO).unwrap();
    let before = disks[1].bytes();
    let e = edit::commit(&mut open(&disks), 1, true, &mut |_| {}).unwrap_err();
    assert!(e.to_string().contains("cannot be resized"), "{e}");
    assert!(disks[1].bytes() == before);
}

#[test]
fn version_2_becomes_3_at_once() {
    let Some(dir) = judge() else { return };
    for kind in KINDS.iter().filter(|k| k.version == 2) {
        for snapshots in [false, true] {
            let made = Disk::new(image(&kind.options(kind.size()), 70));
            if snapshots {
                edit::create_snapshot(&mut made.clone(), "d", "x", std::time::Duration::ZERO)
                    .unwrap();
            }
            let before = contents(&mut open(std::slice::from_ref(&made)));
            let change = Amend { version: Some(3), lazy_refcounts: Some(true), ..Amend::default() };
            let disk = Disk::new(made.bytes());
            disk.cuts(
                1,
                4,
                || edit::amend(&mut disk.clone(), "d", &change).unwrap(),
                |what, after| {
                    clean(&after[0], what);
                    let disk = Disk::new(after[0].clone());
                    assert!(contents(&mut open(&[disk])) == before, "{what}");
                },
            );
            judged_clean(dir.path(), &disk.bytes(), "upgraded");
            let (_, info) = qemu_img(dir.path(), "info -f qcow2 judged");
            assert!(
                info.contains("compat: 1.1") && info.contains("lazy refcounts: true"),
                "{info}"
            );
            assert!(judged_contents(dir.path(), &disk.bytes(), None) == before);
            let back = Amend { version: Some(2), ..Amend::default() };
            assert!(edit::amend(&mut disk.clone(), "d", &back).is_err());
        }
    }
}
