//! Bitmaps where something goes wrong: a save that fails, a session that is killed, no room.

use block::Storage;

use super::*;
use crate::rig::{Event, Fault, What, each_alone};

const DEVICE: u64 = 3 << 20;

/// Flags of so many stand in two sectors.
const MANY: &[u64] = &[
    1 << 9,
    1 << 10,
    1 << 11,
    1 << 12,
    1 << 13,
    1 << 14,
    1 << 15,
    1 << 16,
    1 << 17,
    1 << 18,
    1 << 19,
    1 << 20,
    1 << 21,
    1 << 22,
    1 << 23,
    1 << 24,
    1 << 25,
    1 << 26,
];

/// Contents of a device with an image that has some clusters, and empty bitmaps whose bits have places.
fn placed(ground: &Ground) -> Vec<u8> {
    let mut options = CreateOptions::new(DISK);
    options.cluster_size = ground.cluster;
    let mut rig = Rig::single(fresh(DEVICE, 5, &options));
    for at in (0..1 << 19).step_by(64 << 10) {
        rig.write(at, &vec![1; 64 << 10]);
    }
    let (leaf, ()) = on_disk(rig.close().remove(0), |st| {
        for &g in ground.granularities {
            let add = [BitmapAction::Add { granularity: Some(g) }];
            edit::change_bitmap::<Blocking<LogQueue>>(st, "disk", &name(g), &add, None).unwrap();
        }
    });
    ground.open(leaf).close().remove(0).data()
}

fn device(data: &[u8]) -> LogQueue {
    let mut leaf = LogQueue::new(data.len() as u64, 99);
    leaf.load(data);
    leaf
}

/// Whatever of its log a device holds, no bitmap that is trusted lacks a bit for what is not as in
/// `old`. Returns how many could be trusted.
fn judge(mut leaf: LogQueue, old: &[u8], ground: &Ground, what: &str) -> usize {
    let all = leaf.data();
    let (base, log) = leaf.take_log();
    let mut trusted = 0;
    let mut see = |disk: &[u8], what: &str| {
        let (leaf, found) = bits(device(disk), ground);
        let some = found.iter().flatten().count();
        trusted += some;
        if some > 0 {
            covers(&found, old, &shows(leaf).1, what);
        }
    };
    see(&all, &format!("{what}, all of it"));
    let mut rng = Rng(77);
    for n in 0..4 {
        let disk = cut(&base, &log, log.len(), ground.cache, &mut rng);
        see(&disk, &format!("{what}, cut {n}"));
    }
    // In the durable way what is written through is relied on without a flush.
    if !ground.durable {
        each_alone(&base, &log, &mut rng, |at, disk| see(&disk, &format!("{what}, {at} alone")));
    }
    trusted
}

fn pause(rig: &mut Rig) -> Status {
    rig.image().pause();
    loop {
        if let Some(status) = rig.image().paused() {
            return status;
        }
        rig.turn();
    }
}

/// A write that changes no mapping, and is durable when it is answered.
fn write_through(rig: &mut Rig, at: u64) {
    let allocated = rig.image().counters().allocated.get();
    let data = [9; 512];
    assert_eq!(rig.call_flags(Op::Write, Flags::FUA, at, 512, &data).0, Status::Ok);
    assert_eq!(rig.image().counters().allocated.get(), allocated);
}

#[test]
fn a_request_that_fails_in_a_first_write_or_a_save_costs_no_bits() {
    let ground = Ground { cluster: 4096, granularities: MANY, durable: false, cache: true };
    let data = placed(&ground);
    let (_, old) = shows(device(&data));
    for in_save in [false, true] {
        for (fault, close) in
            [(Fault::Nothing, false), (Fault::Done, false), (Fault::Nothing, true)]
        {
            let (mut failed, mut n) = (0, 0);
            loop {
                let what = format!("save {in_save}, {fault:?}, close {close}, request {n}");
                let mut leaf = device(&data);
                leaf.start_log();
                let mut rig = ground.open(leaf);
                let arm = |rig: &mut Rig| {
                    let at = rig.leaf(0).requests + n;
                    rig.leaf(0).fail_at = Some((at, fault));
                    at
                };
                let mut at = if in_save { 0 } else { arm(&mut rig) };
                let mut status = rig.call(Op::Write, 0, 512, &[9; 512]).0;
                if in_save {
                    assert_eq!(status, Status::Ok);
                    at = arm(&mut rig);
                    status = pause(&mut rig);
                    rig.image().resume();
                }
                let hit = rig.leaf(0).requests > at;
                rig.leaf(0).fail_at = None;
                assert!(hit || status == Status::Ok, "{what}: {status}");
                failed += u32::from(status != Status::Ok);
                if close {
                    if !in_save {
                        rig.read(0, 512);
                    }
                    let (leaf, found) = bits(rig.close().remove(0), &ground);
                    let (_, new) = shows(leaf);
                    assert!(found.iter().all(Option::is_some), "{what}: not saved");
                    covers(&found, &old, &new, &what);
                } else {
                    write_through(&mut rig, 1 << 18);
                    judge(rig.crash().remove(0), &old, &ground, &what);
                }
                if !hit {
                    break;
                }
                n += 1;
            }
            assert!(failed >= 4, "save {in_save}, {fault:?}: {failed} of {n} failed");
        }
    }
}

/// Where the first bits of the first bitmap stand.
fn first_bits(leaf: LogQueue) -> (LogQueue, u64) {
    on_disk(leaf, |st| {
        let word = |st: &mut Blocking<LogQueue>, at| {
            let mut bytes = [0; 8];
            st.read_at(at, &mut bytes).unwrap();
            u64::from_be_bytes(bytes)
        };
        let header = ImageMeta::open(st, "disk", Mode::Read).unwrap().header;
        let table = word(st, header.bitmaps().unwrap().directory_offset);
        word(st, table)
    })
}

#[test]
fn bits_that_a_failed_flush_may_have_lost_are_written_again() {
    let ground = Ground { cluster: 4096, granularities: &[4096], durable: false, cache: true };
    let (leaf, place) = first_bits(device(&placed(&ground)));
    let mut rig = ground.open(leaf);
    let first = |rig: &mut Rig| {
        let mut byte = [0];
        rig.leaf(0).peek(place, &mut byte);
        byte[0]
    };
    rig.write(0, &[9; 512]);
    assert_eq!(first(&mut rig), 0);
    rig.image().pause();
    while first(&mut rig) == 0 {
        rig.turn();
    }
    rig.leaf(0).fail = Some((Op::Flush, Status::Medium, 1));
    assert_eq!(pause(&mut rig), Status::Medium);
    rig.leaf(0).poke(place, &[0]);
    rig.image().resume();
    let (_, found) = bits(rig.close().remove(0), &ground);
    assert!(found[0].as_ref().unwrap()[0]);
}

#[test]
fn what_a_killed_session_left_in_a_cache_is_not_believed_before_it_is_durable() {
    for durable in [false, true] {
        let ground = Ground { cluster: 4096, granularities: &[4096], durable, cache: true };
        let data = placed(&ground);
        let (_, old) = shows(device(&data));
        let mut leaf = device(&data);
        leaf.start_log();
        let mut rig = ground.open(leaf);
        rig.send(Op::Write, Flags::NONE, 0, 512, &[9; 512]);
        // The flag or the bits are written, and nothing has been flushed since.
        let mut written = None;
        while written.is_none() {
            rig.turn();
            let log = &mut rig.leaf(0).log;
            written = log.iter_mut().find(|e| matches!(e.what, What::Write { .. }));
            if let Some(Event { what: What::Write { fua, .. }, .. }) = &mut written {
                // Killed between the write and the rest of it.
                *fua = false;
            }
        }
        let mut leaf = rig.crash().remove(0);
        leaf.forget();
        assert_eq!(leaf.log.iter().filter(|e| matches!(e.what, What::Write { .. })).count(), 1);
        let mut rig = ground.open(leaf);
        write_through(&mut rig, 0);
        write_through(&mut rig, 4096);
        let trusted = judge(rig.crash().remove(0), &old, &ground, &format!("durable: {durable}"));
        assert_eq!(trusted > 0, durable);
    }
}

#[test]
fn room_in_memory_is_made_only_by_what_is_durable() {
    // One page of bits for each step, and one page more than there is room for.
    const STEP: u64 = 1 << 24;
    const PAGES: u64 = 2048;
    let mut options = CreateOptions::new((PAGES + 1) * STEP);
    options.cluster_size = 65536;
    let mut rig = Rig::single(fresh(16 << 20, 5, &options));
    rig.write(0, &[1; 512]);
    let (leaf, ()) = on_disk(rig.close().remove(0), |st| {
        let add = [BitmapAction::Add { granularity: Some(512) }];
        edit::change_bitmap::<Blocking<LogQueue>>(st, "disk", "all", &add, None).unwrap();
    });
    let mut leaf = Rig::single(leaf).close().remove(0);
    leaf.start_log();
    let mut rig = Rig::single(leaf);
    rig.leaf(0).fail = Some((Op::Flush, Status::Medium, u32::MAX));
    for n in 0..=PAGES {
        assert_eq!(rig.call(Op::Write, n * STEP, 512, &[9; 512]).0, Status::Medium);
    }
    rig.leaf(0).fail = None;
    write_through(&mut rig, 0);
    let mut leaf = rig.crash().remove(0);
    let (base, log) = leaf.take_log();
    let mut rng = Rng(3);
    for _ in 0..24 {
        let disk = cut(&base, &log, log.len(), true, &mut rng);
        let (leaf, dirty) = on_disk(device(&disk), |st| {
            let meta = ImageMeta::open(st, "disk", Mode::Read).unwrap();
            let bitmap = Bitmap::open(st, &meta, "all");
            bitmap.map(|mut b| b.run(st, 0, 512).unwrap().unwrap().dirty)
        });
        assert_eq!(Rig::single(leaf).read(0, 512), [9; 512]);
        assert!(dirty.unwrap_or(true), "the bit is clear, and nothing says that it was not saved");
    }
}

/// Flags of a bitmap, as `image info` shows them.
fn flags(leaf: LogQueue, bitmap: &str) -> (LogQueue, Vec<&'static str>) {
    let mut chain = open_chain(leaf);
    let info = qcow::info::Info::of(&mut chain.layers[0], None).unwrap();
    let all = info.format_specific.unwrap().data.bitmaps;
    let flags = all.into_iter().find(|b| b.name == bitmap).unwrap().flags;
    (chain.layers.remove(0).storage.into_leaf(), flags)
}

fn open_chain(leaf: LogQueue) -> qcow::open::Chain<Blocking<LogQueue>> {
    let storage = Blocking::new(leaf, 0).unwrap();
    let first = qcow::open::Opened { storage, path: None, name: "disk".to_owned(), id: None };
    qcow::open::Chain::open(first, Default::default(), &mut |_| unreachable!()).unwrap()
}

#[test]
fn bitmaps_with_too_many_bits_are_lost_and_the_disk_is_served() {
    // More clusters of bits than get a place; one that is small stands behind it.
    let mut options = CreateOptions::new((1 << 40) + (1 << 24));
    options.cluster_size = 4096;
    let (leaf, ()) = on_disk(fresh(8 << 20, 5, &options), |st| {
        for (name, granularity) in [("large", 512), ("small", 1 << 24)] {
            let add = [BitmapAction::Add { granularity: Some(granularity) }];
            edit::change_bitmap::<Blocking<LogQueue>>(st, "disk", name, &add, None).unwrap();
        }
    });
    let mut rig = Rig::single(leaf);
    rig.write(0, &[1; 512]);
    let (leaf, large) = flags(rig.close().remove(0), "large");
    assert_eq!(large, ["in-use", "auto"]);
    let (leaf, run) = on_disk(leaf, |st| {
        let meta = ImageMeta::open(st, "disk", Mode::Read).unwrap();
        Bitmap::open(st, &meta, "small").unwrap().run(st, 0, u64::MAX).unwrap().unwrap()
    });
    assert!(run.dirty && run.len == 1 << 24);
    let (leaf, bad, leaks) = check(leaf);
    assert_eq!((bad, leaks), (0, 0));
    assert!(matches!(qemu_check(&leaf.data()), None | Some(0)));
}

#[test]
fn bitmaps_without_room_are_lost_and_the_disk_is_served() {
    let mut options = CreateOptions::new(64 << 20);
    options.cluster_size = 512;
    let mut rig = Rig::single(fresh(DEVICE, 5, &options));
    rig.write(0, &[1; 512]);
    let (mut leaf, ()) = on_disk(rig.close().remove(0), |st| {
        let add = [BitmapAction::Add { granularity: Some(512) }];
        edit::change_bitmap::<Blocking<LogQueue>>(st, "disk", "g512", &add, None).unwrap();
    });
    // Everything but some holes is full.
    let end = leaf.data().iter().rposition(|&b| b != 0xD5).unwrap() as u64;
    leaf.no_space_from = end.next_multiple_of(512);
    let mut rig = Rig::single(leaf);
    rig.write(0, &[2; 512]);
    assert_eq!(rig.read(0, 512), [2; 512]);
    let (leaf, now) = flags(rig.close().remove(0), "g512");
    assert_eq!(now, ["in-use", "auto"]);
    let (leaf, bad, leaks) = check(leaf);
    assert_eq!((bad, leaks), (0, 0));
    assert!(matches!(qemu_check(&leaf.data()), None | Some(0)));
}

#[test]
fn nothing_vouches_for_what_is_unknown_once_an_image_was_changed() {
    use qcow::check::{self, Repair};
    const UNKNOWN: u8 = 0x80;
    let ground = GROUNDS[0];
    let data = placed(&ground);
    let autoclear = |leaf: &LogQueue| {
        let mut bytes = [0; 8];
        leaf.peek(88, &mut bytes);
        (bytes[0], bytes[7])
    };
    let start = |also: &dyn Fn(&mut LogQueue)| {
        let mut leaf = device(&data);
        leaf.poke(88, &[UNKNOWN]);
        also(&mut leaf);
        assert_eq!(autoclear(&leaf), (UNKNOWN, 1));
        leaf.start_log();
        leaf
    };
    // A name in the header changes.
    let (leaf, ()) = on_disk(start(&|_| ()), |st| {
        edit::set_backing(st, "disk", Some(("/below", Format::Raw))).unwrap();
    });
    assert_eq!(autoclear(&leaf), (0, 1));
    // A repair, of a mark alone and of a refcount; before anything else is written.
    let leak = |leaf: &mut LogQueue| {
        let mut word = [0; 8];
        leaf.peek(48, &mut word);
        leaf.peek(u64::from_be_bytes(word), &mut word);
        // Of the device's last cluster.
        leaf.poke(u64::from_be_bytes(word) + 2 * (DEVICE / 65536 - 1), &[0, 1]);
    };
    let dirty = |leaf: &mut LogQueue| leaf.poke(79, &[1]);
    for (also, leaks) in [(&leak as &dyn Fn(&mut LogQueue), true), (&dirty, false)] {
        let (leaf, report) =
            on_disk(start(also), |st| check::run(st, "disk", Repair::All, &mut |_| ()).unwrap());
        assert_eq!((report.corruptions, report.leaks), (0, 0));
        assert_eq!(report.leaks_fixed, u64::from(leaks));
        assert_eq!(autoclear(&leaf), (0, 1));
        let first: Vec<_> = leaf.log.iter().map(|e| &e.what).take(2).collect();
        assert!(matches!(first[..], [What::Write { offset: 0, .. }, What::Flush]));
    }
    // One that finds nothing to do changes nothing.
    let (leaf, _) =
        on_disk(start(&|_| ()), |st| check::run(st, "disk", Repair::All, &mut |_| ()).unwrap());
    assert!(leaf.log.is_empty());
}

#[test]
fn a_directory_may_be_as_large_as_qemu_permits() {
    on_disk(device(&placed(&GROUNDS[0])), |st| {
        let mut header = vec![0; 65536];
        st.read_at(0, &mut header).unwrap();
        let kind = 0x2385_2875_u32.to_be_bytes();
        let at = header.windows(4).position(|w| w == kind).unwrap() as u64;
        st.write_at(at + 16, &(1u64 << 40).to_be_bytes()).unwrap();
        let meta = ImageMeta::open(st, "disk", Mode::Read).unwrap();
        let e = Bitmap::open(st, &meta, "g65536").unwrap_err();
        assert!(e.to_string().contains("at most 67107840 bytes"), "{e}");
    });
}
