//! Groups in memory: headers, texts, changes, mapping, copies that differ.

mod rig;

use block::Storage;
use rig::{Memory, author, group, new_group};
use volume::text::{Body, Node, Value};
use volume::{Area, Error, Group, Id, Label, MetadataArea, Shape, Vg, probe};

const STRIPES: Shape = Shape { stripes: 2, stripe_size: 128 };

fn reopen(group: Group<Memory>) -> Group<Memory> {
    Group::open(group.into_devices(), Some("me")).unwrap()
}

fn id(n: u8) -> Id {
    Id::from_noise([n; 32])
}

#[test]
fn volumes_are_made_changed_and_found_again() {
    let mut g = group(2, 64 << 20);
    g.change(&author(), "a", |vg| vg.create_lv(id(1), "pd-a", 5, Shape::LINEAR, &author()))
        .unwrap();
    g.change(&author(), "b", |vg| vg.create_lv(id(2), "pd-b", 5, STRIPES, &author())).unwrap();
    g.change(&author(), "t", |vg| {
        vg.tag_lv("pd-a", "x/y")?;
        vg.tag_lv("pd-b", "z")?;
        vg.untag_lv("pd-b", "z")?;
        vg.rename_lv("pd-b", "pd-c")?;
        vg.extend_lv("pd-c", 2)
    })
    .unwrap();
    let vg = g.vg().clone();
    let g = reopen(g);
    assert_eq!(*g.vg(), vg);
    assert_eq!((vg.seqno, vg.lvs.len()), (4, 2));
    let (a, c) = (vg.lv("pd-a").unwrap(), vg.lv("pd-c").unwrap());
    assert_eq!((a.extents(), a.tags.as_slice()), (5, ["x/y".to_owned()].as_slice()));
    // Five extents in two stripes are six; the two more lie right behind them.
    assert_eq!((c.extents(), c.segments.len(), c.segments[0].areas.len()), (8, 1, 2));
    let before = vg.free_extents();
    let mut g = g;
    let mut freed = g.change(&author(), "r", |vg| vg.remove_lv("pd-c")).unwrap();
    assert_eq!(freed.iter().map(|run| run.count).sum::<u64>(), 8);
    assert_eq!(g.vg().free_extents(), before + 8);
    assert!(matches!(g.map("pd-c"), Err(Error::NoVolume(_))));
    // What a volume has, and what is no extent, is not discarded whoever asks for it.
    freed.extend([
        volume::Run { pv: 0, first: 0, count: 1 },
        volume::Run { pv: 0, first: 14, count: 9 },
    ]);
    g.discard(&freed);
    let discarded: u64 = g.into_devices().iter().map(|d| d.discarded()).sum();
    assert_eq!(discarded, 8 * (4 << 20));
}

#[test]
fn what_is_wrong_changes_nothing() {
    let mut g = group(2, 64 << 20);
    g.change(&author(), "a", |vg| vg.create_lv(id(1), "a", 1, Shape::LINEAR, &author())).unwrap();
    let was = g.vg().clone();
    let three = Shape { stripes: 3, stripe_size: 128 };
    let odd = Shape { stripes: 2, stripe_size: 100 };
    type Edit<'a> = &'a dyn Fn(&mut Vg) -> volume::Result<()>;
    let edits: [Edit; 17] = [
        &|vg| vg.create_lv(id(2), "a", 1, Shape::LINEAR, &author()),
        &|vg| vg.create_lv(id(1), "b", 1, Shape::LINEAR, &author()),
        &|vg| vg.create_lv(id(2), "-b", 1, Shape::LINEAR, &author()),
        &|vg| vg.create_lv(id(2), "a/b", 1, Shape::LINEAR, &author()),
        &|vg| vg.create_lv(id(2), "x_tdata", 1, Shape::LINEAR, &author()),
        &|vg| vg.create_lv(id(2), &"n".repeat(126), 1, Shape::LINEAR, &author()),
        &|vg| vg.create_lv(id(2), "b", 23, Shape::LINEAR, &author()),
        &|vg| vg.create_lv(id(2), "b", u64::MAX, STRIPES, &author()),
        &|vg| vg.create_lv(id(2), "b", 2, three, &author()),
        &|vg| vg.create_lv(id(2), "b", 2, odd, &author()),
        &|vg| vg.extend_lv("a", u64::MAX),
        &|vg| vg.tag_lv("a", "with space"),
        &|vg| vg.remove_lv("b"),
        &|vg| {
            vg.extent_size *= 2;
            Ok(())
        },
        &|vg| {
            vg.pvs[1].pe_count -= 1;
            Ok(())
        },
        &|vg| {
            vg.id = id(9);
            Ok(())
        },
        &|vg| {
            // Nobody who edits the state by hand puts an extent into two volumes.
            vg.create_lv(id(2), "b", 1, Shape::LINEAR, &author())?;
            vg.lvs[1].segments = vg.lvs[0].segments.clone();
            Ok(())
        },
    ];
    for (number, edit) in edits.iter().enumerate() {
        assert!(g.change(&author(), "x", edit).is_err(), "edit {number}");
        assert_eq!(*g.vg(), was, "edit {number}");
    }
    assert_eq!(*reopen(g).vg(), was);
}

#[test]
fn growth_keeps_segments_few_however_free_space_lies() {
    // Two volumes grow by turns, so that space behind one is always the other's.
    let mut g = group(1, 17 << 30);
    g.change(&author(), "a", |vg| {
        vg.create_lv(id(1), "a", 1, Shape::LINEAR, &author())?;
        vg.create_lv(id(2), "b", 1, Shape::LINEAR, &author())?;
        while vg.free_extents() > 0 {
            for name in ["a", "b"] {
                match vg.grow_lv(name, 1) {
                    Err(Error::NoSpace { .. }) => {}
                    other => drop(other?),
                }
            }
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(g.vg().free_extents(), 0);
    for lv in &g.vg().lvs {
        assert!(lv.segments.len() <= 64, "{} has {}", lv.name, lv.segments.len());
        assert!(lv.extents() > 1000);
    }
}

#[test]
fn a_view_reads_what_lies_where_the_map_says() {
    let mut g = group(4, 64 << 20);
    let four = Shape { stripes: 4, stripe_size: 16 };
    g.change(&author(), "v", |vg| {
        vg.create_lv(id(1), "a", 2, Shape::LINEAR, &author())?;
        vg.create_lv(id(2), "v", 8, four, &author())?;
        vg.create_lv(id(3), "b", 1, Shape::LINEAR, &author())?;
        vg.create_lv(id(4), "c", 1, Shape::LINEAR, &author())?;
        vg.extend_lv("v", 8)
    })
    .unwrap();
    let map = g.map("v").unwrap();
    let len = map.len();
    assert_eq!(len, 16 * (4 << 20));
    let mut view = g.volume("v").unwrap();
    let pattern = |at: u64| (at / 512).wrapping_mul(0x9e37_79b9).to_le_bytes()[1];
    let bytes: Vec<u8> = (0..len).map(pattern).collect();
    view.write_at(0, &bytes).unwrap();
    assert!(view.write_at(len - 1, &[0; 2]).is_err() && view.read_at(len, &mut [0]).is_err());
    let mut part = vec![0; 100_000];
    view.read_at(8_000_001, &mut part).unwrap();
    assert!(part == bytes[8_000_001..8_100_001]);
    let vg = g.vg().clone();
    let mut devices = g.into_devices();
    // By the definition of stripes, not by the map.
    let lv = vg.lv("v").unwrap();
    for segment in &lv.segments {
        let base = segment.start * (4 << 20);
        for chunk in 0..segment.count * (4 << 20) / 8192 {
            let area = segment.areas[(chunk % 4) as usize];
            let at = vg.pvs[area.pv].pe_start * 512 + area.extent * (4 << 20) + chunk / 4 * 8192;
            let mut found = [0; 8192];
            devices[area.pv].read_at(at, &mut found).unwrap();
            let from = (base + chunk * 8192) as usize;
            assert!(found == bytes[from..from + 8192], "chunk {chunk}");
        }
    }
}

#[test]
fn the_newest_copy_counts_and_the_others_are_repaired() {
    let mut g = group(3, 64 << 20);
    let old = g.vg().clone();
    g.change(&author(), "a", |vg| vg.create_lv(id(1), "a", 1, Shape::LINEAR, &author())).unwrap();
    let vg = g.vg().clone();
    let devices = g.into_devices();
    let spoilers: [&dyn Fn(&mut Memory); 4] = [
        // The old text is in force.
        &|m| {
            let area = Label::read(m).unwrap().unwrap().metadata[0];
            let text = [old.write(&author(), "old").as_bytes(), &[0]].concat();
            let mut a = MetadataArea::empty(area);
            let place = a.next(&text).unwrap();
            a.put(m, &place, &text).unwrap();
            a.live = Some(place);
            a.write(m).unwrap();
        },
        &|m| m.write_at(4096, &[0xff; 512]).unwrap(),
        &|m| m.write_at(4096, &[0; 4096]).unwrap(),
        &|m| {
            let area = Label::read(m).unwrap().unwrap().metadata[0];
            let at = MetadataArea::read(m, area).unwrap();
            m.write_at(4096 + at.live.unwrap().offset + 20, b"#").unwrap();
        },
    ];
    for (number, spoil) in spoilers.iter().enumerate() {
        for good in 0..3 {
            let mut some: Vec<Memory> = devices.iter().map(Memory::deep).collect();
            some.iter_mut().enumerate().filter(|(n, _)| *n != good).for_each(|(_, m)| spoil(m));
            some.rotate_left(number % 3);
            let fixed = Group::open(some, Some("me")).unwrap();
            assert_eq!(*fixed.vg(), vg, "{number} {good}");
            let mut devices = fixed.into_devices();
            let writes: u64 = devices.iter().map(Memory::changes).sum();
            for m in &mut devices {
                assert_eq!(probe(m).unwrap().unwrap().group, Some(vg.clone()));
            }
            // What is repaired needs no second repair.
            let again = Group::open(devices, Some("me")).unwrap().into_devices();
            assert_eq!(again.iter().map(Memory::changes).sum::<u64>(), writes);
        }
        let mut none: Vec<Memory> = devices.iter().map(Memory::deep).collect();
        none.iter_mut().for_each(spoil);
        match Group::open(none, Some("me")) {
            Ok(g) => assert!(number == 0 && *g.vg() == old),
            Err(_) => assert!(number > 0),
        }
    }
}

#[test]
fn an_area_that_is_not_in_use_is_neither_read_nor_written_to() {
    let mut g = group(2, 64 << 20);
    g.change(&author(), "a", |vg| vg.create_lv(id(1), "a", 1, Shape::LINEAR, &author())).unwrap();
    let vg = g.vg().clone();
    let mut devices = g.into_devices();
    // The header that is not in use leads to a newer text, with another volume.
    let mut newer = vg.clone();
    newer.seqno += 7;
    newer.lvs[0].name = "b".to_owned();
    rig::put(&mut devices[1], &[newer.write(&author(), "x").as_bytes(), &[0]].concat());
    let place = Label::read(&mut devices[1]).unwrap().unwrap().metadata[0];
    let mut area = MetadataArea::read(&mut devices[1], place).unwrap();
    area.ignored = true;
    area.write(&mut devices[1]).unwrap();
    let (watch, before) = (devices[1].clone(), devices[1].changes());
    let mut g = Group::open(devices, Some("me")).unwrap();
    assert_eq!(*g.vg(), vg);
    g.change(&author(), "t", |vg| vg.tag_lv("a", "t")).unwrap();
    g.change(&author(), "r", |vg| vg.remove_lv("a")).unwrap();
    assert_eq!(watch.changes(), before);
    assert_eq!(probe(&mut watch.clone()).unwrap().unwrap().group, None);
    // The group is gone with its other device; this one loses its label alone.
    g.remove().unwrap();
    assert_eq!(watch.changes(), before + 1);
}

#[test]
fn what_has_no_meaning_here_is_kept() {
    let mut vg = group(1, 64 << 20).vg().clone();
    vg.create_lv(id(1), "a", 1, Shape::LINEAR, &author()).unwrap();
    let strange = Node { key: "strange".into(), body: Body::Value(Value::Float("1.50".into())) };
    vg.extra.push(strange.clone());
    vg.pvs[0].extra.push(strange.clone());
    vg.lvs[0].extra.push(strange.clone());
    vg.lvs[0].segments[0].extra.push(strange);
    vg.lvs[0].flags.push("ACTIVATION_SKIP".into());
    let text = vg.write(&author(), "a \"quoted\" \\ reason");
    assert_eq!(Vg::read(text.as_bytes()).unwrap(), vg);
    // Space behind a part with unknown values is not put into it.
    vg.extend_lv("a", 1).unwrap();
    assert_eq!(vg.lvs[0].segments.len(), 2);
}

#[test]
fn texts_go_round_the_ring_and_never_over_the_one_in_force() {
    let mut m = Memory::new(1 << 20);
    // 12 sectors for texts.
    let mut area = MetadataArea::empty(Area { offset: 4096, size: 13 * 512 });
    let mut wrapped = 0;
    for round in 0..200_usize {
        let text = vec![b'a' + (round % 26) as u8; 1 + round * 37 % 3000];
        let place = area.next(&text).unwrap();
        let last = area.text(&mut m).unwrap();
        area.put(&mut m, &place, &text).unwrap();
        assert_eq!(area.text(&mut m).unwrap(), last, "round {round}");
        wrapped += usize::from(place.offset + place.size > 13 * 512);
        area.live = Some(place);
        area.write(&mut m).unwrap();
        area = MetadataArea::read(&mut m, area.area).unwrap();
        assert_eq!(area.text(&mut m).unwrap(), Some(text));
    }
    assert!(wrapped > 10);
    assert!(matches!(area.next(&[b'x'; 6000]), Err(Error::MetadataFull { .. })));
    // Whole sectors do not go round such an area.
    let odd = MetadataArea::empty(Area { offset: 4096, size: 13 * 512 + 100 });
    assert!(odd.next(b"text").is_err());
}

#[test]
fn two_at_once_are_noticed() {
    let devices = group(1, 64 << 20).into_devices();
    let mut a = Group::open(devices.clone(), Some("me")).unwrap();
    let mut b = Group::open(devices, Some("me")).unwrap();
    b.change(&author(), "b", |vg| vg.create_lv(id(2), "b", 1, Shape::LINEAR, &author())).unwrap();
    let error = a.change(&author(), "a", |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("somebody else"), "{error}");
    // A change that was prepared before another is not put in force.
    let first = b.prepare(&author(), "1", |vg| vg.tag_lv("b", "one")).unwrap();
    b.change(&author(), "2", |vg| vg.tag_lv("b", "two")).unwrap();
    assert!(b.commit(first).is_err());
    let mut b = reopen(b);
    assert_eq!(b.vg().lvs[0].tags, ["two"]);
    // Nor one whose texts another has taken the place of, nor one of another group.
    let first = b.prepare(&author(), "1", |vg| vg.tag_lv("b", "three")).unwrap();
    let other = group(2, 64 << 20).prepare(&author(), "o", |_| Ok(())).unwrap();
    let second = b.prepare(&author(), "2", |vg| vg.tag_lv("b", "a-longer-four")).unwrap();
    assert!(b.commit(first).is_err() && b.commit(other).is_err());
    b.commit(second).unwrap();
    assert_eq!(reopen(b).vg().lvs[0].tags, ["two", "a-longer-four"]);
}

#[test]
fn a_group_is_removed_and_its_devices_are_free_again() {
    let mut g = group(2, 64 << 20);
    g.change(&author(), "a", |vg| vg.create_lv(id(1), "a", 1, Shape::LINEAR, &author())).unwrap();
    g.change(&author(), "a", |vg| vg.remove_lv("a")).unwrap();
    let mut devices = g.remove().unwrap();
    assert_eq!(probe(&mut devices[0]).unwrap(), None);
    assert!(Group::open(devices.clone(), Some("me")).is_err());
    Group::create(devices, &new_group(), &author()).unwrap();
}

#[test]
fn what_a_device_was_before_is_gone() {
    const SIZE: u64 = 64 << 20;
    let mut m = Memory::new(SIZE);
    let start = 17 << 20;
    m.write_at(0, &vec![0xee; start]).unwrap();
    m.write_at(SIZE - (1 << 20), &vec![0xee; 1 << 20]).unwrap();
    let mut m = Group::create(vec![m], &new_group(), &author()).unwrap().into_devices().remove(0);
    let mut bytes = vec![0; SIZE as usize];
    m.read_at(0, &mut bytes).unwrap();
    // A checksum may have such a byte.
    assert!(!bytes.chunks(8).any(|eight| eight == [0xee; 8]));
    // The same device twice makes no group.
    let one = Memory::new(SIZE);
    let twice = vec![one.clone(), one.clone()];
    let error = Group::create(twice, &new_group(), &author()).unwrap_err().to_string();
    assert!(error.contains("two of the devices are one"), "{error}");
    Group::create(vec![one], &new_group(), &author()).unwrap();
    // It may be in a group whose metadata others have.
    let mut m = m.deep();
    let label = Label::read(&mut m).unwrap().unwrap();
    let ignored = MetadataArea { ignored: true, ..MetadataArea::empty(label.metadata[0]) };
    ignored.write(&mut m).unwrap();
    let error = Group::create(vec![m.clone()], &new_group(), &author()).unwrap_err().to_string();
    assert!(error.contains("is in a volume group"), "{error}");
    Label { metadata: Vec::new(), ..label.clone() }.write(&mut m).unwrap();
    assert!(Group::create(vec![m.clone()], &new_group(), &author()).is_err());
    // Not if the label says that it is in none.
    Label { used: false, ..label }.write(&mut m).unwrap();
    Group::create(vec![m], &new_group(), &author()).unwrap();
}

#[test]
fn free_space_in_very_many_parts_is_given_up_soon() {
    let mut vg = group(1, 17 << 30).vg().clone();
    (vg.extent_size, vg.pvs[0].pe_count) = (8, 400_000);
    vg.create_lv(id(1), "a", 1, Shape::LINEAR, &author()).unwrap();
    let one = vg.lvs[0].segments[0].clone();
    let every_second = |n| volume::Segment {
        start: n,
        areas: vec![volume::Place { pv: 0, extent: 2 * n }],
        ..one.clone()
    };
    vg.lvs[0].segments = (0..200_000).map(every_second).collect();
    let error = vg.create_lv(id(2), "b", 200_000, Shape::LINEAR, &author()).unwrap_err();
    assert!(error.to_string().contains("segments"), "{error}");
}

#[test]
fn a_thousand_volumes_fit_and_a_change_is_quick() {
    let mut g = group(1, 17 << 30);
    g.change(&author(), "many", |vg| {
        for n in 0..1000_u32 {
            let mut noise = [7; 32];
            noise[..4].copy_from_slice(&n.to_le_bytes().map(|b| b % 62));
            noise[4] = (n / 62 % 62) as u8;
            noise[5] = (n / 62 / 62) as u8;
            noise[0] = (n % 62) as u8;
            vg.create_lv(Id::from_noise(noise), &format!("pd-{n}"), 4, Shape::LINEAR, &author())?;
        }
        Ok(())
    })
    .unwrap();
    g.change(&author(), "one", |vg| vg.tag_lv("pd-7", "x")).unwrap();
    let g = reopen(g);
    assert_eq!(g.vg().lvs.len(), 1000);
}
