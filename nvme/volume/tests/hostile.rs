//! What is damaged, hostile, of others, or may only be read.

mod rig;

use block::Storage;
use rig::{Memory, author, group, new_group};
use volume::{Area, Error, Group, Id, Label, MetadataArea, Shape, Vg};

fn id(n: u8) -> Id {
    Id::from_noise([n; 32])
}

#[test]
fn devices_that_may_only_be_read_are_not_written_to() {
    let devices = group(2, 64 << 20).into_devices();
    let old = devices[1].deep();
    let mut g = Group::open(devices, Some("me")).unwrap();
    g.change(&author(), "a", |vg| vg.create_lv(id(1), "a", 1, Shape::LINEAR, &author())).unwrap();
    let vg = g.vg().clone();
    let some = [g.into_devices().remove(0), old];
    let before: Vec<u64> = some.iter().map(Memory::changes).collect();
    for locked in 0..2 {
        let open = || {
            let mut devices = some.to_vec();
            devices[locked] = devices[locked].to_read();
            Group::open(devices, Some("me")).unwrap()
        };
        let mut g = open();
        assert_eq!(*g.vg(), vg);
        assert!(g.volume("a").unwrap().read_only());
        assert!(g.change(&author(), "b", |vg| vg.remove_lv("a")).is_err());
        assert!(g.remove().is_err());
    }
    assert!(some.iter().map(Memory::changes).eq(before));
    let fresh = Memory::new(64 << 20);
    assert!(Group::create(vec![fresh.to_read()], &new_group(), &author()).is_err());
    assert_eq!(fresh.changes(), 0);
}

#[test]
fn what_is_not_ours_is_refused_and_not_written_to() {
    let mut g = group(2, 64 << 20);
    g.change(&author(), "a", |vg| vg.create_lv(id(1), "a", 2, Shape::LINEAR, &author())).unwrap();
    let vg = g.vg().clone();
    let devices = g.into_devices();
    let untouched = |devices: &[Memory], ours: Option<&str>, word: &str| {
        let watch: Vec<_> = devices.iter().map(|m| m.changes()).collect();
        let error = Group::open(devices.to_vec(), ours).unwrap_err().to_string();
        assert!(error.contains(word) && error.len() < 500, "{error} has no `{word}`");
        assert!(devices.iter().zip(watch).all(|(m, count)| m.changes() == count), "{word}");
    };
    untouched(&devices, Some("you"), "belongs to the system `me`");
    untouched(&devices, None, "belongs to the system `me`");
    untouched(&devices[..1], Some("me"), "is missing");
    untouched(&[devices[0].clone(), devices[1].clone(), devices[1].clone()], Some("me"), "not of");
    let short = [devices[0].clone(), devices[1].shorter(60 << 20)];
    untouched(&short, Some("me"), "smaller than its extents");
    untouched(&[devices[0].clone(), devices[1].shorter(16 << 20)], Some("me"), "past the end");
    let other = group(1, 64 << 20).into_devices().remove(0);
    // Nobody can say which one counts.
    let mut two = vg.clone();
    two.lvs[0].tags.push("other".to_owned());
    let mut twice = [devices[0].deep(), devices[1].deep()];
    rig::put(&mut twice[1], &[two.write(&author(), "x").as_bytes(), &[0]].concat());
    untouched(&twice, Some("me"), "two states");
    untouched(&[devices[0].clone(), devices[1].clone(), other], Some("me"), "different groups");
    assert!(Group::create(devices.clone(), &new_group(), &author()).is_err());
    // What a newer state may hold.
    type Spoil<'a> = (&'a str, &'a dyn Fn(String) -> String);
    let striped = |t: &str, size: u32| {
        let two = format!("2\nstripe_size = {size}\nstripes = [\"pv0\", 0, \"pv1\", 0]");
        t.replace("1\nstripes = [\"pv0\", 0]", &two)
    };
    let spoilers: [Spoil; 27] = [
        ("type `mirror`", &|t| t.replace("\"striped\"", "\"mirror\"")),
        ("type `thin-pool`", &|t| t.replace("\"striped\"", "\"thin-pool\"")),
        ("status LOCKED", &|t| t.replace("\"VISIBLE\"", "\"VISIBLE\", \"LOCKED\"")),
        ("locks of type `sanlock`", &|t| {
            t.replace("format =", "lock_type = \"sanlock\"\nformat =")
        }),
        ("`historical`", &|t| t.replace("logical_volumes {", "historical {}\nlogical_volumes {")),
        ("status EXPORTED", &|t| t.replace("\"READ\"]", "\"READ\", \"EXPORTED\"]")),
        ("used twice", &|t| {
            let at = t.find("a {\nid").unwrap();
            let end = t[at..].find("}\n}\n").unwrap() + at + 4;
            let copy = t[at..end].replacen("a {\nid = \"", "b {\nid = \"Z", 1);
            let copy = copy.replacen(&copy[11..12], "", 1);
            format!("{}{copy}{}", &t[..end], &t[end..])
        }),
        ("outside its device", &|t| {
            t.replace("\"pv1\", 0", "\"pv1\", 1000").replace("\"pv0\", 0", "\"pv0\", 1000")
        }),
        ("extents in its metadata", &|t| t.replace("pe_start = 34816", "pe_start = 16")),
        ("extents in its metadata", &|t| t.replace("pe_start = 34816", "pe_start = 2")),
        ("smaller than its extents", &|t| t.replace("pe_count = 11", "pe_count = 12")),
        ("may only be read", &|t| t.replace("\"WRITE_LOCKED\"", "")),
        ("extents of 1 sectors", &|t| t.replace("extent_size = 8192", "extent_size = 1")),
        ("status NEW", &|t| t.replace("\"ALLOCATABLE\"", "\"ALLOCATABLE\", \"NEW\"")),
        ("which was missing", &|t| {
            t.replace("flags = []\npe_start", "flags = [\"MISSING\"]\npe_start")
        }),
        ("size or identity of device", &|t| {
            t.replace("pe_start = 34816", &format!("pe_start = {}", i64::MAX / 512))
        }),
        ("version 2", &|t| t.replace("\nversion = 1", "\nversion = 2")),
        ("`lvm1`", &|t| t.replace("\"lvm2\"", "\"lvm1\"")),
        ("has 1 segments", &|t| t.replace("segment_count = 1", "segment_count = 2")),
        ("segment at 1", &|t| t.replace("start_extent = 0", "start_extent = 1")),
        ("segment at 0", &|t| t.replace("extent_count = 2", "extent_count = 0")),
        ("1 places", &|t| t.replace("stripe_count = 1", "stripe_count = 2\nstripe_size = 8")),
        ("segment at 0", &|t| striped(&t, 8).replace("extent_count = 2", "extent_count = 3")),
        ("stripes of 12 sectors", &|t| striped(&t, 12)),
        ("zero byte", &|t| t.replace("\"x\"", "\"x\0\"")),
        // No more of the disk's text than can be shown.
        ("type `\\u{1b}[2Jxxx", &|t| {
            t.replace("\"striped\"", &format!("\"\u{1b}[2J{}\"", "x".repeat(1 << 20)))
        }),
        ("line 1", &|t| t.replacen('{', "= {", 1)),
    ];
    for (word, spoil) in spoilers {
        let mut newer = vg.clone();
        newer.seqno += 1;
        let text = [spoil(newer.write(&author(), "x")).as_bytes(), &[0]].concat();
        let mut some = [devices[0].deep(), devices[1].deep()];
        rig::put(&mut some[0], &text);
        untouched(&some, Some("me"), word);
    }
}

#[test]
fn every_changed_bit_of_the_headers_is_found_or_harmless() {
    let g = group(1, 64 << 20);
    let vg = g.vg().clone();
    let mut device = g.into_devices().remove(0);
    let mut head = vec![0; 8192];
    device.read_at(0, &mut head).unwrap();
    let mut refused = 0;
    for bit in (512 * 8..1024 * 8).chain(4096 * 8..5120 * 8) {
        let mut one = device.deep();
        head[bit / 8] ^= 1 << (bit % 8);
        one.write_at(0, &head).unwrap();
        head[bit / 8] ^= 1 << (bit % 8);
        match Group::open(vec![one], Some("me")) {
            Ok(g) => assert_eq!(*g.vg(), vg, "bit {bit}"),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 12_000, "{refused}");
}

#[test]
fn hostile_headers_with_right_checksums_are_refused() {
    let mut m = group(1, 64 << 20).into_devices().remove(0);
    let label = Label::read(&mut m).unwrap().unwrap();
    let at = |offset, size| vec![Area { offset, size }];
    for metadata in [
        at(4096, u64::MAX),
        at(u64::MAX - 4095, 8192),
        at(512, 8192),
        at(4096, 512),
        at(4097, 8192),
        at(4096, 64 << 20),
        [at(4096, 8192), at(8192, 8192)].concat(),
    ] {
        Label { metadata, ..label.clone() }.write(&mut m).unwrap();
        assert!(Label::read(&mut m).is_err());
    }
    let many = vec![Area { offset: 4096, size: 1024 }; 30];
    assert!(Label { metadata: many, ..label.clone() }.encode().is_err());
    label.write(&mut m).unwrap();
    let area = label.metadata[0];
    for (offset, size) in
        [(0x1fe, 10), (area.size, 1), (512, area.size), (512, u64::MAX), (u64::MAX, 1)]
    {
        let live = Some(volume::TextPlace { offset, size, checksum: 0 });
        MetadataArea { area, live, ignored: false }.write(&mut m).unwrap();
        assert!(MetadataArea::read(&mut m, area).is_err(), "{offset} {size}");
    }
}

#[test]
fn each_field_of_the_headers_is_looked_at() {
    let m = group(1, 64 << 20).into_devices().remove(0);
    // Where the sector is, which of its bytes the checksum is of, and where that stands.
    let (label, header) = ((512, 20, 16), (4096, 4, 0));
    for ((sector, from, sum), at, bytes, word) in [
        (label, 8, b"\x02".as_slice(), "says it is in sector 2"),
        (label, 31, b"2", "another kind"),
        (label, 20, b"\x08", "inside the label"),
        (label, 20, b"\xf0\x01", "past its sector"),
        (label, 32, b"*", "an identity"),
        (label, 88, b"\x01", "3 data areas"),
        (label, 136, b"\x03", "version 3"),
        (label, 140, b"\x03", "flags 0x3"),
        (header, 4, b"x", "not begin as it should"),
        (header, 20, b"\x02", "version 2"),
        (header, 24, b"\x01", "do not agree"),
    ] {
        let mut m = m.deep();
        let mut there = [0; 512];
        m.read_at(sector, &mut there).unwrap();
        there[at..at + bytes.len()].copy_from_slice(bytes);
        let mut hasher = crc32fast::Hasher::new_with_initial(!0xf597_a6cf);
        hasher.update(&there[from..]);
        there[sum..sum + 4].copy_from_slice(&(!hasher.finalize()).to_le_bytes());
        m.write_at(sector, &there).unwrap();
        let area = Area { offset: 4096, size: (17 << 20) - 4096 };
        let error = match Label::read(&mut m) {
            Ok(_) => MetadataArea::read(&mut m, area).unwrap_err(),
            Err(error) => error,
        };
        assert!(error.to_string().contains(word), "{error} has no `{word}`");
    }
    // Texts that are too long for us, not for the area.
    let (mut m, size) = (Memory::new(256 << 20), volume::MAX_TEXT + 1);
    let mut large = MetadataArea::empty(Area { offset: 4096, size: 128 << 20 });
    assert!(large.next(&vec![b'x'; size as usize]).is_err());
    large.live = Some(volume::TextPlace { offset: 512, size, checksum: 0 });
    large.write(&mut m).unwrap();
    let error = MetadataArea::read(&mut m, large.area).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
}

#[test]
fn hostile_texts_are_refused_or_kept_as_they_are() {
    let mut vg = group(4, 64 << 20).vg().clone();
    let four = Shape { stripes: 4, stripe_size: 128 };
    vg.create_lv(id(1), "a", 3, Shape::LINEAR, &author()).unwrap();
    vg.create_lv(id(2), "b", 8, four, &author()).unwrap();
    vg.extend_lv("a", 2).unwrap();
    vg.tag_lv("a", "x").unwrap();
    let text = vg.write(&author(), "x");
    let words = [
        "0",
        "1",
        "-1",
        "4294967295",
        "4294967296",
        "9223372036854775807",
        "{",
        "}",
        "[]",
        "\"\"",
        "=",
        "\"pv3\"",
        "\"a\"",
        "a",
        "#",
        "1.5",
        "\n",
        "segment_count",
        "extent_count",
    ];
    let (mut rng, mut taken) = (sim::Rng::new(4), 0);
    for round in 0..20_000 {
        let mut parts: Vec<&str> = text.split_inclusive([' ', '\n', ',']).collect();
        for _ in 0..rng.within(1, 3) {
            let at = rng.below(parts.len() as u64) as usize;
            match rng.below(3) {
                0 => parts[at] = words[rng.below(words.len() as u64) as usize],
                1 => drop(parts.remove(at)),
                _ => {
                    let other = rng.below(parts.len() as u64) as usize;
                    parts.swap(at, other);
                }
            }
        }
        let Ok(read) = Vg::read(parts.concat().as_bytes()) else { continue };
        taken += 1;
        let again = Vg::read(read.write(&author(), "y").as_bytes()).unwrap();
        assert_eq!(again, read, "round {round}");
        // And it can be used.
        let mut used = read;
        let _ = used.grow_lv("a", 1).and_then(|_| used.extend_lv("b", 4));
        if used.create_lv(id(9), "new", 2, Shape::LINEAR, &author()).is_ok() {
            Vg::read(used.write(&author(), "z").as_bytes()).unwrap();
        }
    }
    assert!((100..19_000).contains(&taken), "{taken}");
}
