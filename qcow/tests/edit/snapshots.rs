//! Internal snapshots: made, applied and deleted by both programs.

use std::time::Duration;

use block::Storage;
use qcow::edit::{self, SnapshotKey};
use qcow::{ChainReader, ImageMeta, Mode};

use crate::rig::{
    Disk, KINDS, Kind, Rng, clean, contents, image, judge, judged_clean, judged_contents, open,
    qemu_img,
};

const NOW: Duration = Duration::from_secs(1_700_000_000);

fn create(disk: &Disk, name: &str) -> qcow::Result<String> {
    edit::create_snapshot(&mut disk.clone(), "disk", name, NOW)
}

fn apply(disk: &Disk, key: &str) -> qcow::Result<()> {
    edit::apply_snapshot(&mut disk.clone(), "disk", SnapshotKey::IdOrName(key))
}

fn delete(disk: &Disk, key: &str) -> qcow::Result<()> {
    edit::delete_snapshot(&mut disk.clone(), "disk", SnapshotKey::NameOrId(key))
}

/// What the disk shows, or one of its snapshots.
fn shown(disk: &Disk, snapshot: Option<&str>) -> Vec<u8> {
    let reader = open(std::slice::from_ref(disk));
    let mut chain = reader.into_chain();
    if let Some(name) = snapshot {
        chain.show_snapshot(SnapshotKey::Name(name)).unwrap();
    }
    contents(&mut ChainReader::new(chain))
}

fn names(disk: &Disk) -> Vec<(String, String)> {
    let mut chain = open(std::slice::from_ref(disk)).into_chain();
    let info = qcow::info::Info::of(&mut chain.layers[0], None).unwrap();
    info.snapshots.into_iter().map(|s| (s.id, s.name)).collect()
}

/// Changes something on the disk, as a guest would: grown and shrunk, so that clusters come and go.
fn change(disk: &Disk, kind: &Kind, rng: &mut Rng) {
    let size = kind.size() + 512 * rng.below(3 * kind.cluster / 512 + 5);
    let size = if rng.below(2) == 0 { size } else { size / 2 / 512 * 512 };
    edit::resize(&mut open(std::slice::from_ref(disk)), size).unwrap();
}

fn wide() -> impl Iterator<Item = (usize, &'static Kind)> {
    KINDS.iter().enumerate().filter(|(_, k)| k.bits > 1)
}

#[test]
fn a_random_history_is_what_the_judge_reads() {
    let Some(dir) = judge() else { return };
    for (i, kind) in wide().filter(|(_, k)| k.version > 2) {
        let mut rng = Rng(i as u64);
        let disk = Disk::new(image(&kind.options(kind.size()), 40 + i as u64));
        let mut taken: Vec<(String, Vec<u8>)> = Vec::new();
        for step in 0..if kind.cluster > 65536 { 10 } else { 40 } {
            match rng.below(8) {
                0..3 => {
                    let name = format!("s{step}");
                    create(&disk, &name).unwrap();
                    taken.push((name, shown(&disk, None)));
                }
                3 if !taken.is_empty() => {
                    let (name, _) = taken.remove(rng.below(taken.len() as u64) as usize);
                    delete(&disk, &name).unwrap();
                }
                4 | 5 if !taken.is_empty() => {
                    let (name, holds) = &taken[rng.below(taken.len() as u64) as usize];
                    apply(&disk, name).unwrap();
                    assert!(shown(&disk, None) == *holds, "{kind:?} step {step}");
                }
                _ => change(&disk, kind, &mut rng),
            }
            let what = format!("{kind:?} step {step}");
            clean(&disk.bytes(), &what);
            for (name, holds) in &taken {
                assert!(shown(&disk, Some(name)) == *holds, "{what}: {name}");
            }
            if step % 8 == 7 {
                judged_clean(dir.path(), &disk.bytes(), &what);
                let now = shown(&disk, None);
                assert!(judged_contents(dir.path(), &disk.bytes(), None) == now, "{what}");
                for (name, holds) in &taken {
                    // The judge shows a snapshot with the size that the disk has now.
                    let mut holds = holds.clone();
                    let got = judged_contents(dir.path(), &disk.bytes(), Some(name));
                    let len = holds.len().min(got.len());
                    holds.truncate(len);
                    assert!(got[..len] == holds, "{what}: {name}");
                }
            }
        }
        for (name, _) in taken {
            delete(&disk, &name).unwrap();
        }
        judged_clean(dir.path(), &disk.bytes(), "all deleted");
        assert_eq!(names(&disk), []);
    }
}

#[test]
fn the_judge_goes_on_with_ours_and_we_with_the_judges() {
    let Some(dir) = judge() else { return };
    for (i, kind) in wide() {
        let dir = dir.path();
        let disk = Disk::new(image(&kind.options(kind.size()), 60 + i as u64));
        create(&disk, "ours").unwrap();
        let first = shown(&disk, None);
        let file = dir.join("both");
        let run = |args: &str| {
            let (code, text) = qemu_img(dir, args);
            assert_eq!(code, 0, "{kind:?}: {args}: {text}");
            text
        };
        let write = |pattern: u8| {
            let command = format!("write -P {pattern} 0 {}", kind.size() / 2 / 512 * 512);
            let out = std::process::Command::new("qemu-io")
                .args(["-f", "qcow2", "both", "-c", &command])
                .current_dir(dir)
                .output()
                .unwrap();
            assert!(out.status.success(), "{out:?}");
        };
        std::fs::write(&file, disk.bytes()).unwrap();
        write(3);
        run("check both");
        run("snapshot -c theirs both");
        write(4);
        let disk = Disk::new(std::fs::read(&file).unwrap());
        clean(&disk.bytes(), "theirs");
        assert!(shown(&disk, Some("ours")) == first, "{kind:?}");
        let second = shown(&disk, Some("theirs"));
        assert!(second[0] == 3 && shown(&disk, None)[0] == 4);
        create(&disk, "third").unwrap();
        apply(&disk, "theirs").unwrap();
        assert!(shown(&disk, None) == second);
        judged_clean(dir, &disk.bytes(), "theirs applied");
        std::fs::write(&file, disk.bytes()).unwrap();
        write(5);
        run("snapshot -a ours both");
        run("check both");
        run("snapshot -d theirs both");
        run("check both");
        let disk = Disk::new(std::fs::read(&file).unwrap());
        assert!(shown(&disk, None) == first, "{kind:?}");
        delete(&disk, "ours").unwrap();
        judged_clean(dir, &disk.bytes(), "ours deleted");
        assert!(shown(&disk, None) == first, "{kind:?}");
        assert!(shown(&disk, Some("third"))[0] == 4);
        assert_eq!(names(&disk), [("3".to_owned(), "third".to_owned())]);
    }
}

#[test]
fn a_cut_leaves_all_as_it_was_or_as_it_shall_be() {
    let dir = judge();
    let mut judged = 0;
    for (i, kind) in wide().filter(|(_, k)| k.cluster <= 65536) {
        let mut rng = Rng(i as u64);
        let disk = Disk::new(image(&kind.options(kind.size()), 80 + i as u64));
        create(&disk, "a").unwrap();
        if kind.version > 2 {
            change(&disk, kind, &mut rng);
        }
        create(&disk, "b").unwrap();
        if kind.version > 2 {
            change(&disk, kind, &mut rng);
        }
        let made = disk.bytes();
        type Operation = fn(&Disk);
        let operations: [(&str, Operation); 5] = [
            ("create", |d| drop(create(d, "c").unwrap())),
            ("apply a", |d| apply(d, "a").unwrap()),
            ("apply b", |d| apply(d, "b").unwrap()),
            ("delete a", |d| delete(d, "a").unwrap()),
            ("delete b", |d| delete(d, "b").unwrap()),
        ];
        for (name, operation) in operations {
            let all = |d: &Disk| {
                let names = names(d);
                let mut all = vec![shown(d, None)];
                all.extend(names.iter().map(|n| shown(d, Some(&n.1))));
                (names, all)
            };
            let old = all(&Disk::new(made.clone()));
            let new = Disk::new(made.clone());
            operation(&new);
            let new = all(&new);
            let disk = Disk::new(made.clone());
            let mut seen = [0, 0];
            disk.cuts(
                i as u64,
                2,
                || operation(&disk),
                |what, disks| {
                    let what = format!("{kind:?} {name}, {what}");
                    clean(&disks[0], &what);
                    let now = all(&Disk::new(disks[0].clone()));
                    let is_new = now == new;
                    assert!(is_new || now == old, "{what}");
                    seen[usize::from(is_new)] += 1;
                    judged += 1;
                    if let Some(dir) = dir.as_ref().filter(|_| judged % 97 == 0) {
                        judged_clean(dir.path(), &disks[0], &what);
                    }
                },
            );
            assert!(seen[1] > 0, "{kind:?} {name}");
        }
    }
    assert!(judged > 500, "{judged}");
}

#[test]
fn narrow_refcounts_are_refused_and_nothing_changes() {
    for kind in KINDS.iter().filter(|k| k.bits == 1) {
        let made = image(&kind.options(kind.size()), 3);
        let disk = Disk::new(made.clone());
        let e = create(&disk, "x").unwrap_err().to_string();
        assert!(e.contains("refcounts have 1 bits"), "{e}");
        assert!(disk.bytes() == made);
        // An empty disk has nothing that would be shared.
        let mut empty = Disk::new(Vec::new());
        qcow::create::create(&mut empty, "empty", &kind.options(kind.size())).unwrap();
        create(&empty, "x").unwrap();
        clean(&empty.bytes(), "empty");
    }
    // Two bits: three references, so two snapshots beside the disk.
    let kind = Kind { cluster: 4096, bits: 2, version: 3 };
    let disk = Disk::new(image(&kind.options(kind.size()), 3));
    create(&disk, "x").unwrap();
    create(&disk, "y").unwrap();
    let made = disk.bytes();
    assert!(create(&disk, "z").unwrap_err().to_string().contains("2 bits"));
    assert!(disk.bytes() == made);
    clean(&made, "two bits");
}

#[test]
fn many_with_long_names_and_ids_as_qemu_gives_them() {
    let Some(dir) = judge() else { return };
    let kind = KINDS[2];
    let disk = Disk::new(image(&kind.options(kind.size()), 9));
    for n in 1..=64 {
        let name = format!("{n}-{}", "long".repeat(n * 3 % 60));
        assert_eq!(create(&disk, &name).unwrap(), n.to_string());
    }
    judged_clean(dir.path(), &disk.bytes(), "64");
    let (code, list) = qemu_img(dir.path(), "snapshot -l judged");
    assert!(code == 0 && list.lines().count() == 66, "{list}");
    delete(&disk, "30").unwrap();
    delete(&disk, "64").unwrap();
    assert_eq!(create(&disk, "again").unwrap(), "64");
    // Names need not be unique; one that is another's ID does not hide that one from `apply`.
    assert_eq!(create(&disk, "again").unwrap(), "65");
    assert_eq!(create(&disk, "7").unwrap(), "66");
    delete(&disk, "7").unwrap();
    assert_eq!(names(&disk).iter().filter(|n| n.0 == "7").count(), 1);
    delete(&disk, "again").unwrap();
    assert_eq!(names(&disk).iter().filter(|n| n.1 == "again").count(), 1);
    for (name, text) in [(String::new(), "1 to 255"), ("x".repeat(256), "1 to 255")] {
        assert!(create(&disk, &name).unwrap_err().to_string().contains(text));
    }
    assert!(delete(&disk, "none").unwrap_err().to_string().contains("no snapshot \"none\""));
    assert!(apply(&disk, "none").unwrap_err().to_string().contains("no snapshot \"none\""));
    judged_clean(dir.path(), &disk.bytes(), "in the end");
}

#[test]
fn entries_of_others_are_kept_byte_for_byte() {
    let kind = KINDS[5];
    let disk = Disk::new(image(&kind.options(kind.size()), 11));
    create(&disk, "a").unwrap();
    // Rewritten by hand with more extra data, a name that is no UTF-8, a clock and a VM state.
    let mut st = disk.clone();
    let header = ImageMeta::open(&mut st, "disk", Mode::Check).unwrap().header;
    let mut old = vec![0; 80];
    st.read_at(header.snapshots_offset, &mut old).unwrap();
    let mut entry = old[..40].to_vec();
    entry[12..16].copy_from_slice(&[0, 3, 0, 4]);
    entry[24..36].copy_from_slice(&[0, 0, 0, 1, 2, 3, 4, 5, 0, 0, 0x40, 0]);
    entry[36..40].copy_from_slice(&40u32.to_be_bytes());
    entry.extend_from_slice(&old[40..64]);
    entry[40..48].copy_from_slice(&0x4000u64.to_be_bytes());
    entry.extend_from_slice(&[0xab; 16]);
    entry.extend_from_slice(b"900\xff\xfe\x80z\0");
    assert_eq!(entry.len() % 8, 0);
    st.write_at(header.snapshots_offset, &entry).unwrap();
    assert_eq!(create(&disk, "b").unwrap(), "901");
    create(&disk, "c").unwrap();
    delete(&disk, "b").unwrap();
    apply(&disk, "900").unwrap();
    let header = ImageMeta::open(&mut st, "disk", Mode::Check).unwrap().header;
    let mut now = vec![0; entry.len()];
    st.read_at(header.snapshots_offset, &mut now).unwrap();
    assert_eq!(now, entry);
    let mut chain = open(std::slice::from_ref(&disk)).into_chain();
    let info = qcow::info::Info::of(&mut chain.layers[0], None).unwrap();
    let first = &info.snapshots[0];
    assert_eq!((first.id.as_str(), first.vm_state_size), ("900", 0x4000));
    clean(&disk.bytes(), "kept");
}

#[test]
fn version_2_with_snapshots_keeps_its_size() {
    let kind = KINDS[4];
    let disk = Disk::new(image(&kind.options(kind.size()), 12));
    create(&disk, "a").unwrap();
    let made = disk.bytes();
    let mut reader = open(std::slice::from_ref(&disk));
    let e = edit::resize(&mut reader, 1 << 20).unwrap_err().to_string();
    assert!(e.contains("version 2") && disk.bytes() == made, "{e}");
}
