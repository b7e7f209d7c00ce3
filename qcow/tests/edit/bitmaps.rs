//! Persistent bitmaps: changed by both programs, at any power cut, and told lies about.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use block::Storage;
use qcow::edit::{self, BitmapAction, SnapshotKey};
use qcow::{Bitmap, ImageMeta, Mode};

use crate::rig::{
    Disk, KINDS, Kind, Rng, clean, contents, image, judge, judged_clean, open, open_from, qemu_img,
};

fn change(disk: &Disk, bitmap: &str, actions: &[BitmapAction]) -> qcow::Result<()> {
    edit::change_bitmap::<Disk>(&mut disk.clone(), "disk", bitmap, actions, None)
}

fn add(granularity: u64) -> BitmapAction {
    BitmapAction::Add { granularity: Some(granularity) }
}

/// Names, flags and set bits (as ranges of the disk) of all bitmaps; bits of those that were not
/// saved are none.
type Shown = BTreeMap<String, (Vec<&'static str>, u64, Vec<(u64, u64)>)>;

fn shown(disk: &Disk) -> Shown {
    let mut chain = open(std::slice::from_ref(disk)).into_chain();
    let info = qcow::info::Info::of(&mut chain.layers[0], None).unwrap();
    let mut st = disk.clone();
    let meta = ImageMeta::open(&mut st, "disk", Mode::Read).unwrap();
    let bitmaps = info.format_specific.unwrap().data.bitmaps;
    let show = |b: qcow::BitmapInfo| {
        let mut set = Vec::new();
        if !b.flags.contains(&"in-use") {
            let mut bitmap = Bitmap::open(&mut st, &meta, &b.name).unwrap();
            let mut at = 0;
            while let Some(run) = bitmap.run(&mut st, at, u64::MAX).unwrap() {
                at += run.len;
                if run.dirty {
                    set.push((run.offset, run.len));
                }
            }
            assert_eq!(at, bitmap.disk_size());
        }
        (b.name, (b.flags, b.granularity, set))
    };
    bitmaps.into_iter().map(show).collect()
}

fn resize(disk: &Disk, size: u64) -> qcow::Result<()> {
    edit::resize(&mut open(std::slice::from_ref(disk)), size)
}

/// Kinds that can have bitmaps.
fn kinds() -> impl Iterator<Item = (usize, &'static Kind)> {
    KINDS.iter().enumerate().filter(|(_, k)| k.version > 2)
}

/// What the judge says of a bitmap's bits.
fn judged_bits(dir: &Path, bytes: &[u8], bitmap: &str) -> Vec<(u64, u64)> {
    std::fs::write(dir.join("bits"), bytes).unwrap();
    // Only what records nothing may be shown without being written to.
    let (code, text) = qemu_img(dir, &format!("bitmap --disable -f qcow2 bits {bitmap}"));
    assert_eq!(code, 0, "{text}");
    let mut server = Command::new("qemu-nbd")
        .args(["-r", "-f", "qcow2", "-B", bitmap, "-k"])
        .arg(dir.join("socket"))
        .arg(dir.join("bits"))
        .spawn()
        .unwrap();
    let map = format!(
        "map --output=json --image-opts driver=nbd,server.type=unix,server.path=socket,\
         x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
    );
    // It may take a while until it listens.
    let mut tries = 0..500;
    let (code, text) = loop {
        let run = qemu_img(dir, &map);
        if run.0 == 0 || tries.next().is_none() {
            break run;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    server.wait().unwrap();
    let _gone = std::fs::remove_file(dir.join("socket"));
    assert_eq!(code, 0, "{text}");
    // Through this door it is the dirty ranges that are not data.
    let mut set: Vec<(u64, u64)> = Vec::new();
    for line in text.lines().filter(|l| l.contains("\"data\": false")) {
        let number = |key: &str| -> u64 {
            let rest = &line[line.find(key).unwrap() + key.len()..];
            rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
        };
        let (start, len) = (number("\"start\": "), number("\"length\": "));
        match set.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += len,
            _ => set.push((start, len)),
        }
    }
    set
}

/// The same in memory, one entry for each 512 bytes of the disk.
#[derive(Clone)]
struct Model {
    granularity: u64,
    enabled: bool,
    bits: Vec<bool>,
}

impl Model {
    fn set(&mut self, from: u64, to: u64, size: u64) {
        let first = from / self.granularity * self.granularity;
        let last = to.next_multiple_of(self.granularity).min(size);
        self.bits[(first / 512) as usize..(last / 512) as usize].fill(true);
    }

    fn ranges(&self) -> Vec<(u64, u64)> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        for (i, _) in self.bits.iter().enumerate().filter(|b| *b.1) {
            let at = i as u64 * 512;
            match all.last_mut() {
                Some(last) if last.0 + last.1 == at => last.1 += 512,
                _ => all.push((at, 512)),
            }
        }
        all
    }
}

#[test]
fn a_random_history_is_what_model_and_judge_have() {
    let dir = judge();
    for (i, kind) in kinds() {
        let mut rng = Rng(i as u64 + 7);
        let mut size = kind.size();
        let disk = Disk::new(image(&kind.options(size), 90 + i as u64));
        let mut model: BTreeMap<String, Model> = BTreeMap::new();
        for step in 0..if kind.cluster > 65536 { 20 } else { 60 } {
            let name = format!("b{}", rng.below(4));
            let what = format!("{kind:?} step {step} {name}");
            match rng.below(9) {
                0 | 1 => {
                    let granularity = 512 << rng.below(10);
                    let enabled = rng.below(2) == 0;
                    let off = if enabled { vec![] } else { vec![BitmapAction::Disable] };
                    let done = change(&disk, &name, &[vec![add(granularity)], off].concat());
                    assert_eq!(done.is_ok(), !model.contains_key(&name), "{what}");
                    model.entry(name).or_insert_with(|| Model {
                        granularity,
                        enabled,
                        bits: vec![false; (size / 512) as usize],
                    });
                }
                2 => {
                    let done = change(&disk, &name, &[BitmapAction::Remove]);
                    assert_eq!(done.is_ok(), model.remove(&name).is_some(), "{what}");
                }
                3 => {
                    let done = change(&disk, &name, &[BitmapAction::Clear]);
                    assert_eq!(done.is_ok(), model.contains_key(&name), "{what}");
                    model.entry(name).and_modify(|m| m.bits.fill(false));
                }
                4 => {
                    let (enabled, action) = match rng.below(2) {
                        0 => (false, BitmapAction::Disable),
                        _ => (true, BitmapAction::Enable),
                    };
                    let done = change(&disk, &name, &[action]);
                    assert_eq!(done.is_ok(), model.contains_key(&name), "{what}");
                    model.entry(name).and_modify(|m| m.enabled = enabled);
                }
                5 | 6 => {
                    let other = format!("b{}", rng.below(4));
                    let there = model.contains_key(&name) && model.contains_key(&other);
                    let done = change(&disk, &name, &[BitmapAction::Merge(other.clone())]);
                    assert_eq!(done.is_ok(), there, "{what}");
                    if there {
                        let from = model[&other].ranges();
                        let into = model.get_mut(&name).unwrap();
                        from.iter().for_each(|&(at, len)| into.set(at, at + len, size));
                    }
                }
                _ => {
                    let new = kind.size() / 512 * (1 + rng.below(5)) / 3 * 512;
                    resize(&disk, new).unwrap();
                    for m in model.values_mut() {
                        m.bits.resize((new / 512) as usize, false);
                        if m.enabled && new > size {
                            m.set(size, new, new);
                        } else if new > size {
                            // The last bit may stand for more than it did.
                            let last = (size / 512) as usize;
                            if size % m.granularity > 0 && m.bits[last - 1] {
                                m.set(size - 1, size, new);
                            }
                        }
                    }
                    size = new;
                }
            }
            let what = format!("{kind:?} step {step}");
            clean(&disk.bytes(), &what);
            let now = shown(&disk);
            assert_eq!(now.len(), model.len(), "{what}");
            for (name, m) in &model {
                let flags: &[&str] = if m.enabled { &["auto"] } else { &[] };
                assert_eq!(now[name], (flags.to_vec(), m.granularity, m.ranges()), "{what} {name}");
            }
            if let Some(dir) = dir.as_ref().filter(|_| step == 19) {
                judged_clean(dir.path(), &disk.bytes(), &what);
                for (name, m) in &model {
                    assert_eq!(judged_bits(dir.path(), &disk.bytes(), name), m.ranges(), "{what}");
                }
            }
        }
    }
}

#[test]
fn any_power_cut_leaves_the_old_bitmaps_or_the_new_ones() {
    let mut cuts = 0;
    for (i, kind) in kinds().filter(|(_, k)| k.cluster <= 65536) {
        let disk = Disk::new(image(&kind.options(kind.size()), 20 + i as u64));
        let held = contents(&mut open(std::slice::from_ref(&disk)));
        let steps: &[(&str, &[BitmapAction])] = &[
            ("a", &[add(512)]),
            ("b", &[add(4096), BitmapAction::Disable]),
            ("a", &[BitmapAction::Merge("b".to_owned())]),
            ("grow", &[]),
            ("b", &[BitmapAction::Merge("a".to_owned()), BitmapAction::Enable]),
            ("shrink", &[]),
            ("a", &[BitmapAction::Clear]),
            ("b", &[BitmapAction::Remove]),
            ("a", &[BitmapAction::Remove, add(65536), BitmapAction::Remove]),
        ];
        for (n, (name, actions)) in steps.iter().enumerate() {
            let old = shown(&disk);
            let mut seen = Vec::new();
            disk.cuts(
                n as u64,
                3,
                || match *name {
                    "grow" => resize(&disk, kind.size() * 2).unwrap(),
                    "shrink" => resize(&disk, kind.size()).unwrap(),
                    _ => change(&disk, name, actions).unwrap(),
                },
                |what, disks| {
                    let what = format!("{kind:?} step {n} {name}: {what}");
                    clean(&disks[0], &what);
                    let cut = Disk::new(disks[0].clone());
                    let shows = contents(&mut open(std::slice::from_ref(&cut)));
                    assert!(shows[..held.len()] == held, "{what}");
                    seen.push((what, shown(&cut)));
                    cuts += 1;
                },
            );
            let new = shown(&disk);
            for (what, bitmaps) in seen {
                assert!(bitmaps == old || bitmaps == new, "{what}: {bitmaps:?}");
            }
        }
        assert!(shown(&disk).is_empty());
    }
    assert!(cuts > 500, "{cuts}");
}

#[test]
fn the_judge_goes_on_with_ours_and_we_with_the_judges() {
    let Some(dir) = judge() else { return };
    let dir = dir.path();
    for (i, kind) in kinds().filter(|(_, k)| k.bits > 1) {
        let run = |args: &str| {
            let (code, text) = qemu_img(dir, args);
            assert_eq!(code, 0, "{kind:?}: {args}: {text}");
            text
        };
        let disk = Disk::new(image(&kind.options(kind.size()), 70 + i as u64));
        change(&disk, "ours", &[add(4096)]).unwrap();
        std::fs::write(dir.join("both"), disk.bytes()).unwrap();
        let io = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write 1k 512", "-c", "discard 12k 4k", "both"])
            .current_dir(dir)
            .output()
            .unwrap();
        assert!(io.status.success());
        run("bitmap --add -g 512 -f qcow2 both theirs");
        run("bitmap --merge ours -f qcow2 both theirs");
        run("snapshot -c s both");
        let info = run("info both");
        assert!(info.contains("name: ours") && info.contains("name: theirs"), "{info}");
        let disk = Disk::new(std::fs::read(dir.join("both")).unwrap());
        clean(&disk.bytes(), "the judge's");
        let set = vec![(0, 4096), (12288, 4096)];
        let now = shown(&disk);
        assert_eq!(now["ours"].2, set);
        assert_eq!(now["theirs"].2, set);
        // The judge refuses that, too.
        let e = edit::apply_snapshot(&mut disk.clone(), "disk", SnapshotKey::Name("s"));
        assert!(e.unwrap_err().to_string().contains("bitmaps"));
        edit::delete_snapshot(&mut disk.clone(), "disk", SnapshotKey::Name("s")).unwrap();
        change(&disk, "ours", &[BitmapAction::Remove]).unwrap();
        change(&disk, "theirs", &[BitmapAction::Disable]).unwrap();
        judged_clean(dir, &disk.bytes(), "ours again");
        assert_eq!(judged_bits(dir, &disk.bytes(), "theirs"), set);
        // Sizes change on both sides alike, where nothing is recorded.
        std::fs::write(dir.join("both"), disk.bytes()).unwrap();
        run("resize --shrink -f qcow2 both 13k");
        resize(&disk, 13 << 10).unwrap();
        let theirs = Disk::new(std::fs::read(dir.join("both")).unwrap());
        assert_eq!(shown(&disk), shown(&theirs), "{kind:?}");
        assert_eq!(shown(&disk)["theirs"].2, [(0, 4096), (12288, 1024)]);
        run("resize -f qcow2 both 1M");
        resize(&disk, 1 << 20).unwrap();
        let theirs = Disk::new(std::fs::read(dir.join("both")).unwrap());
        assert_eq!(shown(&disk), shown(&theirs), "{kind:?}");
    }
}

/// Sets or clears flags of the first entry of the directory.
fn flip_flags(disk: &Disk, flags: u32) {
    let mut st = disk.clone();
    let header = ImageMeta::open(&mut st, "disk", Mode::Read).unwrap().header;
    let at = header.bitmaps().unwrap().directory_offset + 12;
    let mut old = [0; 4];
    st.read_at(at, &mut old).unwrap();
    st.write_at(at, &(u32::from_be_bytes(old) ^ flags).to_be_bytes()).unwrap();
}

#[test]
fn what_was_not_saved_can_only_be_removed() {
    let disk = Disk::new(image(&KINDS[2].options(KINDS[2].size()), 3));
    change(&disk, "lost", &[add(512)]).unwrap();
    change(&disk, "good", &[add(512)]).unwrap();
    flip_flags(&disk, 1);
    assert_eq!(shown(&disk)["lost"].0, ["in-use", "auto"]);
    let merge = |name: &str| BitmapAction::Merge(name.to_owned());
    for (name, action) in [
        ("lost", BitmapAction::Clear),
        ("lost", BitmapAction::Enable),
        ("lost", BitmapAction::Disable),
        ("lost", merge("good")),
        ("good", merge("lost")),
    ] {
        let e = change(&disk, name, std::slice::from_ref(&action)).unwrap_err();
        assert!(e.to_string().contains("not saved"), "{action:?}: {e}");
    }
    assert!(change(&disk, "lost", &[add(512)]).unwrap_err().to_string().contains("already"));
    assert!(resize(&disk, 1 << 20).unwrap_err().to_string().contains("not saved"));
    let mut st = disk.clone();
    let meta = ImageMeta::open(&mut st, "disk", Mode::Read).unwrap();
    assert!(Bitmap::open(&mut st, &meta, "lost").is_err());
    clean(&disk.bytes(), "with one that was not saved");
    change(&disk, "lost", &[BitmapAction::Remove]).unwrap();
    resize(&disk, 1 << 20).unwrap();
    assert_eq!(shown(&disk)["good"].2.len(), 1);
    clean(&disk.bytes(), "without");
}

#[test]
fn limits_are_the_judges() {
    let kind = &KINDS[7];
    let disk = Disk::new(image(&kind.options(kind.size()), 3));
    let says = |name: &str, action: BitmapAction, part: &str| {
        let e = change(&disk, name, &[action]).unwrap_err().to_string();
        assert!(e.contains(part), "{e}");
    };
    for g in [0, 1, 256, 3000, 1 << 32, 1 << 40] {
        says("g", add(g), "granularity");
    }
    says("", add(512), "1023");
    says(&"n".repeat(1024), add(512), "1023");
    says("none", BitmapAction::Clear, "no bitmap");
    change(&disk, &"n".repeat(1023), &[add(512), BitmapAction::Disable]).unwrap();
    change(&disk, "ü", &[add(1 << 31)]).unwrap();
    let default = |cluster: u64| {
        let mut o = kind.options(1 << 20);
        o.cluster_size = cluster;
        let disk = Disk::new(image(&o, 1));
        let action = BitmapAction::Add { granularity: None };
        change(&disk, "d", &[action]).unwrap();
        shown(&disk)["d"].1
    };
    assert_eq!([512, 4096, 16384, 2 << 20].map(default), [4096, 4096, 16384, 65536]);
    // 512 MiB of bits: half as many bytes of disk a bit more than that is too much.
    let e = resize(&disk, (1 << 41) + 512).unwrap_err().to_string();
    assert!(e.contains("granularity"), "{e}");
    let old = Disk::new(image(&KINDS[8].options(1 << 20), 1));
    assert!(change(&old, "v", &[add(512)]).unwrap_err().to_string().contains("version 2"));
    if let Some(dir) = judge() {
        judged_clean(dir.path(), &disk.bytes(), "names");
    }
}

#[test]
fn merging_from_another_image() {
    let kind = &KINDS[5];
    let from = Disk::new(image(&kind.options(1 << 20), 5));
    change(&from, "src", &[add(1024)]).unwrap();
    resize(&from, (1 << 20) + 4096).unwrap();
    let to = Disk::new(image(&kind.options((1 << 20) + 4096), 6));
    let merge = |into: &Disk, name: &str| {
        let actions = [add(512), BitmapAction::Merge("src".to_owned())];
        let source = &mut from.clone();
        edit::change_bitmap(&mut into.clone(), "to", name, &actions, Some(("from", source)))
    };
    merge(&to, "dst").unwrap();
    assert_eq!(shown(&to)["dst"].2, [(1 << 20, 4096)]);
    clean(&to.bytes(), "merged");
    let other = Disk::new(image(&kind.options(1 << 20), 7));
    let before = other.bytes();
    let e = merge(&other, "dst").unwrap_err().to_string();
    assert!(e.contains("cannot be merged"), "{e}");
    assert!(other.bytes() == before, "all or nothing");
}

#[test]
fn commit_says_in_the_lower_layers_bitmaps_what_it_writes() {
    let kind = &KINDS[7];
    let size = kind.size();
    let mut options = kind.options(size);
    options.backing = Some(("/1".to_owned(), qcow::open::Format::Qcow2));
    let disks = Disk::several(&[image(&options, 11), image(&kind.options(size), 12), vec![]]);
    let mut st = disks[1].clone();
    edit::set_backing(&mut st, "base", Some(("/2", qcow::open::Format::Raw))).unwrap();
    change(&disks[1], "base", &[add(512)]).unwrap();
    change(&disks[1], "off", &[add(512), BitmapAction::Disable]).unwrap();
    change(&disks[0], "top", &[add(512)]).unwrap();
    let old = contents(&mut open_from(&disks, 1));
    let covered = |disk: &Disk, what: &str| {
        let new = contents(&mut open_from(&[disks[0].clone(), disk.clone(), disks[2].clone()], 1));
        let set = &shown_at(disk)["base"].2;
        for (i, (a, b)) in old.chunks(512).zip(new.chunks(512)).enumerate() {
            let at = i as u64 * 512;
            let marked = set.iter().any(|r| (r.0..r.0 + r.1).contains(&at));
            assert!(a == b || marked, "{what}: the sector at {at:#x} changed unmarked");
        }
    };
    disks[0].cuts(
        5,
        2,
        || edit::commit(&mut open_from(&disks, 0), 1, true, &mut |_| {}).unwrap(),
        |what, cut| {
            clean(&cut[1], what);
            covered(&Disk::several(cut).swap_remove(1), what);
        },
    );
    covered(&disks[1], "after");
    let now = shown_at(&disks[1]);
    assert!(!now["base"].2.is_empty() && now["off"].2.is_empty());
    assert!(shown_at(&disks[0])["top"].2.is_empty());
}

/// As [`shown`], whatever the backing file is.
fn shown_at(disk: &Disk) -> Shown {
    let copy = Disk::new(disk.bytes());
    edit::set_backing(&mut copy.clone(), "copy", None).unwrap();
    shown(&copy)
}
