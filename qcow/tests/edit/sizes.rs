//! Growing and shrinking.

use qcow::edit;

use crate::rig::{
    Disk, KINDS, Kind, clean, contents, image, judge, judged_clean, judged_contents, open,
};

fn sizes_of(kind: &Kind) -> Vec<u64> {
    let (size, c) = (kind.size(), kind.cluster);
    // Into the same cluster, into the same table, far behind it, and down to everything.
    let far = if c >= 65536 { 4 << 30 } else { 8 << 20 };
    vec![size + 512, size + 3 * c, far, size - 512, size / 2 / 512 * 512, 512, 0]
}

#[test]
fn any_size_reads_as_before_and_then_zeroes() {
    let Some(dir) = judge() else { return };
    for (i, kind) in KINDS.iter().enumerate() {
        let made = image(&kind.options(kind.size()), i as u64);
        let before = contents(&mut open(&[Disk::new(made.clone())]));
        for size in sizes_of(kind) {
            let what = format!("{kind:?} to {size}");
            let disk = Disk::new(made.clone());
            edit::resize(&mut open(std::slice::from_ref(&disk)), size).unwrap();
            judged_clean(dir.path(), &disk.bytes(), &what);
            let mut reader = open(std::slice::from_ref(&disk));
            assert_eq!(reader.size(), size);
            if size == 512 {
                let most = 12 * kind.cluster as usize;
                assert!(disk.bytes().len() <= most, "{what}: {} bytes left", disk.bytes().len());
            }
            let mut expected = before.clone();
            expected.resize(size.min(9 << 20) as usize, 0);
            let mut got = vec![1; expected.len()];
            reader.read_at(0, &mut got).unwrap();
            assert!(got == expected, "{what}");
            // And back again: nothing of what was cut off shows.
            edit::resize(&mut reader, kind.size()).unwrap();
            judged_clean(dir.path(), &disk.bytes(), &what);
            expected.resize(kind.size() as usize, 0);
            assert!(judged_contents(dir.path(), &disk.bytes(), None) == expected, "{what}, back");
        }
    }
}

#[test]
fn what_a_longer_backing_file_holds_does_not_show() {
    let Some(dir) = judge() else { return };
    for (i, kind) in KINDS.iter().enumerate() {
        for depth in 1..=3 {
            let size = kind.size();
            let mut layers = vec![vec![0x5a; (size + 9 * kind.cluster) as usize]];
            for d in 0..depth {
                let mut o =
                    kind.options(if d + 1 == depth { size } else { size + 5 * kind.cluster });
                let format =
                    if d == 0 { qcow::open::Format::Raw } else { qcow::open::Format::Qcow2 };
                o.backing = Some((format!("/{}", depth - d), format));
                layers.push(image(&o, i as u64 + d as u64));
            }
            layers.reverse();
            let disks = Disk::several(&layers);
            let before = contents(&mut open(&disks));
            for new in [size + 512, size + 4 * kind.cluster, size + 20 * kind.cluster] {
                let disks = Disk::several(&layers);
                edit::resize(&mut open(&disks), new).unwrap();
                let mut expected = before.clone();
                expected.resize(new as usize, 0);
                assert!(contents(&mut open(&disks)) == expected, "{kind:?} {depth} {new}");
                judged_clean(dir.path(), &disks[0].bytes(), "grown");
            }
        }
    }
}

#[test]
fn a_cut_leaves_the_old_size_or_the_new_one() {
    let dir = judge();
    let mut judged = 0;
    for (i, kind) in KINDS.iter().enumerate().filter(|(_, k)| k.cluster <= 65536) {
        let made = image(&kind.options(kind.size()), 100 + i as u64);
        for size in sizes_of(kind) {
            let disk = Disk::new(made.clone());
            let before = contents(&mut open(std::slice::from_ref(&disk)));
            let all = [disk.clone()];
            let mut seen = [0, 0];
            disk.cuts(
                size,
                2,
                || edit::resize(&mut open(&all), size).unwrap(),
                |what, disks| {
                    let what = format!("{kind:?} to {size}, {what}");
                    clean(&disks[0], &what);
                    let mut reader = open(&[Disk::new(disks[0].clone())]);
                    let new = reader.size() == size;
                    seen[usize::from(new)] += 1;
                    assert!(new || reader.size() == kind.size(), "{what}");
                    let mut expected = before.clone();
                    expected.resize(reader.size().min(9 << 20) as usize, 0);
                    let mut got = vec![1; expected.len()];
                    reader.read_at(0, &mut got).unwrap();
                    assert!(got == expected, "{what}");
                    judged += 1;
                    if let Some(dir) = dir.as_ref().filter(|_| judged % 97 == 0) {
                        judged_clean(dir.path(), &disks[0], &what);
                    }
                },
            );
            assert!(seen[0] > 0 && seen[1] > 0, "{kind:?} to {size}: {seen:?}");
        }
    }
    assert!(judged > 500, "{judged}");
}

#[test]
fn a_full_device_leaves_the_image_as_it_was() {
    let kind = KINDS[2];
    let made = image(&kind.options(kind.size()), 5);
    let mut refused = 0;
    for extra in 0..40 {
        let mut disk = Disk::new(made.clone());
        disk.room = made.len() as u64 + extra * 512;
        let result = edit::resize(&mut open(std::slice::from_ref(&disk)), 8 << 20);
        match result {
            Ok(()) => clean(&disk.bytes(), "grown"),
            Err(e) => {
                assert!(e.to_string().contains("room"), "{e}");
                assert!(disk.bytes() == made);
                refused += 1;
            }
        }
    }
    assert!((5..35).contains(&refused), "{refused}");
}

#[test]
fn impossible_sizes_are_refused() {
    for (kind, size, text) in [
        (KINDS[2], 1000, "no multiple of 512"),
        (KINDS[2], 1 << 63, "below 2^63"),
        (KINDS[2], 1 << 40, "too large for clusters"),
        (KINDS[9], i64::MAX as u64 & !511, "too large for clusters"),
    ] {
        let made = image(&kind.options(kind.size()), 7);
        let disk = Disk::new(made.clone());
        let e = edit::resize(&mut open(std::slice::from_ref(&disk)), size).unwrap_err();
        assert!(e.to_string().contains(text), "{e}");
        assert!(disk.bytes() == made);
    }
}
