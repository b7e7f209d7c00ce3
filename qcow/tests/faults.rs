//! Devices that fail, lie and are slow. Whatever single request fails, the guest or its flush
//! hears of it, the image stays valid at any power cut, and what was flushed is there.

mod rig;

use block::{Flags, Layer, Op, Status};
use qcow::create::CreateOptions;
use qcow::open::Format;
use qcow::run::Options;
use rig::{Event, Fault, LogQueue, Rig, Rng, What, check, cut, each_alone, fresh};

const SECTOR: u64 = 512;

/// A step of a script: offsets and lengths in sectors.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, u64),
    Fua(u64, u64),
    Zero(u64, u64),
    /// Write zeroes, space stays.
    Keep(u64, u64),
    Discard(u64, u64),
    Read(u64, u64),
    Flush,
}

/// What a sector may hold: first what the last good flush vouched for, then what came later.
struct Model(Vec<Vec<u64>>);

impl Model {
    fn new(sectors: u64, at: impl Fn(u64) -> u64) -> Model {
        Model((0..sectors).map(|s| vec![at(s)]).collect())
    }

    /// A change that was answered with `ok`; one that failed may have happened or not.
    fn change(&mut self, first: u64, count: u64, value: u64, sure: bool) {
        for s in &mut self.0[first as usize..(first + count) as usize] {
            s.push(value);
            if sure {
                s.drain(..s.len() - 1);
            }
        }
    }
}

fn stamp(value: u64) -> [u8; SECTOR as usize] {
    value.to_le_bytes().repeat(SECTOR as usize / 8).try_into().unwrap()
}

/// Runs a script, one step after the other; `model` holds at the end what each sector may be once a
/// flush succeeds. Returns whether anything failed.
fn play(rig: &mut Rig, script: &[Step], model: &mut Model) -> bool {
    let mut failed = false;
    for (n, &step) in script.iter().enumerate() {
        let value = 1000 + n as u64;
        let (op, flags, first, count) = match step {
            Step::Write(a, b) => (Op::Write, Flags::NONE, a, b),
            Step::Fua(a, b) => (Op::Write, Flags::FUA, a, b),
            Step::Zero(a, b) => (Op::WriteZeroes, Flags::NONE, a, b),
            Step::Keep(a, b) => (Op::WriteZeroes, Flags::NO_UNMAP, a, b),
            Step::Discard(a, b) => (Op::Discard, Flags::NONE, a, b),
            Step::Read(a, b) => (Op::Read, Flags::NONE, a, b),
            Step::Flush => (Op::Flush, Flags::NONE, 0, 0),
        };
        let data = if op == Op::Write { stamp(value).repeat(count as usize) } else { Vec::new() };
        let (status, _) = rig.call_flags(op, flags, first * SECTOR, count * SECTOR, &data);
        failed |= !status.is_ok();
        match op {
            Op::Write => model.change(first, count, value, status.is_ok()),
            Op::WriteZeroes => model.change(first, count, 0, status.is_ok()),
            Op::Discard => model.change(first, count, 0, false),
            Op::Flush | Op::Read => {}
        }
    }
    failed
}

/// Fails each single request of a script in turn.
fn sweep(open: impl Fn() -> Rig, start: impl Fn() -> Model, script: &[Step], fault: Fault) {
    let mut n = 0;
    loop {
        let mut rig = open();
        rig.leaf(0).start_log();
        rig.leaf(0).requests = 0;
        rig.leaf(0).fail_at = Some((n, fault));
        let mut model = start();
        let failed = play(&mut rig, script, &mut model);
        if rig.leaf(0).requests <= n {
            assert!(n > 20, "{n} requests: too short a script");
            return;
        }
        let what = format!("{fault:?} at request {n} (a step failed: {failed})");
        rig.leaf(0).fail_at = None;
        let status = rig.call(Op::Flush, 0, 0, &[]).0;
        assert_eq!(status, Status::Ok, "{what}: the device is well again");
        verify(rig, &model, &what);
        n += 1;
    }
}

/// Cuts the power after a flush, opens again, reads all and goes on.
fn verify(rig: Rig, model: &Model, what: &str) {
    let mut leaves = rig.crash();
    let mut top = leaves.remove(0);
    let (base, log) = top.take_log();
    let mut rng = Rng(log.len() as u64 | 1);
    for at in [rng.below(log.len() as u64 + 1) as usize, log.len()] {
        let disk = cut(&base, &log, at, true, &mut rng);
        let mut leaf = LogQueue::new(disk.len() as u64, 7);
        leaf.load(&disk);
        let (leaf, bad, _) = check(leaf);
        assert_eq!(bad, 0, "{what}: corruption at {at} of {}", log.len());
        if at < log.len() {
            continue;
        }
        let mut formats = vec![Format::Qcow2];
        let mut all = vec![leaf];
        for l in &leaves {
            let data = l.data();
            let mut copy = LogQueue::new(data.len() as u64, 8);
            copy.load(&data);
            all.push(copy);
            formats.push(Format::Raw);
        }
        let mut rig = Rig::open(all, &formats, Options::default());
        for first in (0..model.0.len()).step_by(256) {
            let count = (model.0.len() - first).min(256) as u64;
            let data = rig.read(first as u64 * SECTOR, count * SECTOR);
            for (i, sector) in data.as_chunks::<{ SECTOR as usize }>().0.iter().enumerate() {
                let s = first + i;
                let fine = model.0[s].iter().any(|&v| *sector == stamp(v));
                assert!(fine, "{what}: sector {s} holds {:x?}", &sector[..8]);
            }
        }
        rig.write(0, &[9; 4096]);
        let (_, bad, _) = check(rig.close().remove(0));
        assert_eq!(bad, 0, "{what}: corruption after going on");
    }
}

/// Clusters of 512 bytes, 64-bit refcounts: a refcount block for each 32 KiB, and a refcount table
/// that must move when the file passes 2 MiB.
fn small_clusters(device: u64) -> (Vec<u8>, u64) {
    let mut o = CreateOptions::new(4 << 20);
    o.cluster_size = 512;
    o.refcount_bits = 64;
    let mut rig = Rig::single(fresh(device, 5, &o));
    let piece = stamp(7).repeat(128);
    let mut sectors = 0;
    while block_end(&mut rig) < (2 << 20) - (100 << 10) {
        rig.write(sectors * SECTOR, &piece);
        sectors += 128;
    }
    (rig.close().remove(0).data(), sectors)
}

fn block_end(rig: &mut Rig) -> u64 {
    rig.image().end()
}

const SMALL: u64 = 4 << 20;

/// Goes on where [`small_clusters`] ended, past the end of the refcount table.
fn growing(sectors: u64) -> [Step; 9] {
    [
        Step::Write(sectors, 64),
        Step::Flush,
        Step::Write(sectors + 64, 100),
        Step::Discard(0, 40),
        Step::Write(sectors + 200, 90),
        Step::Flush,
        Step::Write(0, 8),
        Step::Write(sectors + 400, 128),
        Step::Flush,
    ]
}

/// What was on the disk before in places that are used for the first time is rubbish or zeroes: a
/// count of 0 is worse than a wrong one.
#[test]
fn each_write_relies_on_durable_ones_while_refcount_structures_grow() {
    let (image, sectors) = small_clusters(SMALL);
    let end = image.iter().rposition(|&b| b != 0xD5).unwrap() + 1;
    for filler in [0xD5, 0] {
        let mut leaf = LogQueue::new(SMALL, 3);
        leaf.load(&image);
        leaf.poke(end as u64, &vec![filler; image.len() - end]);
        leaf.start_log();
        let mut rig = Rig::single(leaf);
        let mut model = Model::new(8192, |s| if s < sectors { 7 } else { 0 });
        assert!(!play(&mut rig, &growing(sectors), &mut model));
        let (base, log) = rig.close().remove(0).take_log();
        assert_ne!(base[48..60], last_header(&log)[48..60], "the refcount table has not moved");
        let mut leaf = Some(LogQueue::new(SMALL, 7));
        each_alone(&base, &log, &mut Rng(u64::from(filler) | 1), |at, disk| {
            let mut on = leaf.take().unwrap();
            on.load(&disk);
            let (on, bad, _) = check(on);
            assert_eq!(bad, 0, "corruption if write {at} of {} lands alone", log.len());
            leaf = Some(on);
        });
    }
}

/// The header as it was written last.
fn last_header(log: &[Event]) -> &[u8] {
    let mut headers = log.iter().filter_map(|e| match &e.what {
        What::Write { offset: 0, data, .. } => Some(&data[..]),
        _ => None,
    });
    headers.next_back().expect("a header was written")
}

#[test]
fn any_single_failure_while_refcount_structures_grow() {
    let (image, sectors) = small_clusters(SMALL);
    let open = || {
        let mut leaf = LogQueue::new(SMALL, 3);
        leaf.load(&image);
        Rig::single(leaf)
    };
    let start = || Model::new(8192, |s| if s < sectors { 7 } else { 0 });
    let script = growing(sectors);
    for fault in [Fault::Nothing, Fault::Done] {
        sweep(open, start, &script, fault);
    }
}

#[test]
fn any_single_failure_over_a_backing_file() {
    let mut o = CreateOptions::new(8 << 20);
    o.cluster_size = 4096;
    o.backing = Some(("/layer1".to_owned(), Format::Raw));
    let image = fresh(2 << 20, 5, &o).data();
    let open = || {
        let mut leaf = LogQueue::new(2 << 20, 3);
        leaf.load(&image);
        let mut raw = LogQueue::new(1 << 20, 4);
        raw.load(&stamp(7).repeat(2048));
        Rig::open(vec![leaf, raw], &[Format::Qcow2, Format::Raw], Options::default())
    };
    let start = || Model::new(16384, |s| if s < 2048 { 7 } else { 0 });
    let script = [
        Step::Write(3, 2),
        Step::Write(8, 32),
        Step::Flush,
        Step::Write(10, 1),
        Step::Keep(8, 16),
        Step::Write(4096 + 5, 20),
        Step::Flush,
        Step::Write(9, 3),
        Step::Discard(24, 16),
        Step::Zero(100, 60),
        Step::Flush,
        Step::Fua(8200, 9),
        Step::Read(0, 200),
        Step::Write(24, 8),
        Step::Fua(17, 1),
        Step::Flush,
        Step::Flush,
    ];
    for fault in [Fault::Nothing, Fault::Done] {
        sweep(open, start, &script, fault);
    }
}

/// The image is closed after the first failure, and its file cut where the image says: what the disk
/// may name since then must still be there.
#[test]
fn a_close_after_any_failure_cuts_nothing_that_is_named() {
    let (image, sectors) = small_clusters(SMALL);
    for fault in [Fault::Nothing, Fault::Done] {
        for n in 0.. {
            let mut leaf = LogQueue::new(SMALL, 3);
            leaf.load(&image);
            let mut rig = Rig::single(leaf);
            rig.leaf(0).requests = 0;
            rig.leaf(0).fail_at = Some((n, fault));
            let mut model = Model::new(8192, |_| 0);
            let script = growing(sectors);
            let failed = script.iter().any(|&step| play(&mut rig, &[step], &mut model));
            if !failed && rig.leaf(0).requests <= n {
                break;
            }
            rig.leaf(0).fail_at = None;
            let (status, end, mut leaves) = rig.end_at();
            assert_eq!(status, Status::Ok, "{fault:?} at request {n}");
            let data = leaves.remove(0).data();
            let mut leaf = LogQueue::new(end, 7);
            leaf.load(&data[..end as usize]);
            let (_, bad, _) = check(leaf);
            assert_eq!(bad, 0, "{fault:?} at request {n}, cut at {end:#x}");
        }
    }
}

/// Requests at depth over a device on which one request in `one_in` fails.
#[test]
fn failures_at_depth() {
    for seed in 1..9 {
        let mut rng = Rng(seed * 77);
        let mut o = CreateOptions::new(2 << 20);
        o.cluster_size = if seed % 2 == 0 { 4096 } else { 512 };
        o.refcount_bits = if seed % 2 == 0 { 16 } else { 64 };
        let mut rig = Rig::single(fresh(6 << 20, seed, &o));
        rig.leaf(0).start_log();
        let mut model = Model::new(4096, |_| 0);
        for round in 0..60u64 {
            if rng.one_in(2) {
                let n = rig.leaf(0).requests + rng.below(30);
                let fault = if rng.one_in(2) { Fault::Nothing } else { Fault::Done };
                rig.leaf(0).fail_at = Some((n, fault));
            }
            // Side by side, none over another.
            let mut sent = Vec::new();
            let mut at = rng.below(200);
            while at < 4096 {
                let most = if rng.one_in(3) { 200 } else { 20 };
                let n = (1 + rng.below(most)).min(4096 - at);
                let value = round * 1000 + at;
                let (op, flags, value) = match rng.below(8) {
                    0 => (Op::Discard, Flags::NONE, 0),
                    1 => (Op::WriteZeroes, Flags::NONE, 0),
                    2 => (Op::WriteZeroes, Flags::NO_UNMAP, 0),
                    3 => (Op::Write, Flags::FUA, value),
                    _ => (Op::Write, Flags::NONE, value),
                };
                let data = stamp(value).repeat(if op == Op::Write { n as usize } else { 0 });
                let id = rig.send(op, flags, at * SECTOR, n * SECTOR, &data);
                sent.push((id, at, n, value, op));
                if sent.len() == 20 {
                    break;
                }
                at += n + rng.below(200);
            }
            for (id, status, _) in rig.settle() {
                let &(_, at, n, value, op) = sent.iter().find(|s| s.0 == id).unwrap();
                model.change(at, n, value, status.is_ok() && op != Op::Discard);
            }
            if rng.one_in(4) {
                let _ = rig.call(Op::Flush, 0, 0, &[]);
            }
        }
        rig.leaf(0).fail_at = None;
        rig.flush();
        verify(rig, &model, &format!("seed {seed}"));
    }
}

/// Answers that come twice, at any time, are counted and change nothing.
#[test]
fn repeated_answers_are_not_followed() {
    let mut o = CreateOptions::new(2 << 20);
    o.cluster_size = 4096;
    let mut rig = Rig::single(fresh(6 << 20, 3, &o));
    rig.leaf(0).repeats = 3;
    let mut rng = Rng(99);
    let mut model = Model::new(4096, |_| 0);
    for round in 0..150u64 {
        let mut sent = Vec::new();
        let mut at = 0;
        while sent.len() < 24 && at < 4096 {
            let n = (1 + rng.below(250)).min(4096 - at);
            let value = round * 5000 + at + 1;
            let id = match rng.below(4) {
                0 => rig.send(Op::Read, Flags::NONE, at * SECTOR, n * SECTOR, &[]),
                1 => rig.send(Op::WriteZeroes, Flags::NONE, at * SECTOR, n * SECTOR, &[]),
                _ => {
                    let data = stamp(value).repeat(n as usize);
                    rig.send(Op::Write, Flags::NONE, at * SECTOR, n * SECTOR, &data)
                }
            };
            sent.push((id, at, n, value));
            at += n + rng.below(60);
        }
        let mut changes = Vec::new();
        for (id, status, data) in rig.settle() {
            assert_eq!(status, Status::Ok);
            changes.push((sent.iter().find(|s| s.0 == id).unwrap(), data));
        }
        // Who was a write is told by what is read back.
        let _ = changes;
        for &(_, at, n, value) in &sent {
            let data = rig.read(at * SECTOR, n * SECTOR);
            let (sectors, _) = data.as_chunks::<{ SECTOR as usize }>();
            let first = sectors[0];
            for (i, s) in sectors.iter().enumerate() {
                let old = model.0[at as usize + i][0];
                let all_new = first == stamp(value) || first == stamp(0);
                let fine = *s == stamp(old) || (all_new && *s == first);
                assert!(fine, "round {round}: sector {} holds {:x?}", at + i as u64, &s[..8]);
            }
            for (i, s) in sectors.iter().enumerate() {
                model.0[at as usize + i][0] = u64::from_le_bytes(s[..8].try_into().unwrap());
            }
        }
    }
    let stale = rig.image().counters().stale.get();
    assert!(stale > 50, "{stale} repeated answers");
    let (_, bad, leaks) = check(rig.close().remove(0));
    assert_eq!((bad, leaks), (0, 0));
}

/// A guest discards what it still writes to or reads. The device is late with that, and the cluster
/// must not belong to somebody else by then.
#[test]
fn late_requests_meet_nobody_elses_data() {
    for cluster in [4096u64, 65536] {
        late(Op::Write, cluster, false);
        late(Op::Read, cluster, false);
        late(Op::Write, cluster, true);
    }
}

/// `waits`: the late request first had to wait for another one's claim.
fn late(op: Op, cluster: u64, waits: bool) {
    let mut o = CreateOptions::new(2 << 20);
    o.cluster_size = cluster;
    let mut rig = Rig::single(fresh(4 << 20, 7, &o));
    let late = if waits {
        let data = vec![1; cluster as usize];
        let first = rig.send(Op::Write, Flags::NONE, 0, cluster, &data);
        let late = rig.send(op, Flags::NONE, 512, 1024, &[2; 1024]);
        let answered = (0..10_000).find_map(|_| rig.turn().pop()).unwrap();
        assert_eq!((answered.0, answered.1), (first, Status::Ok));
        late
    } else {
        rig.write(0, &vec![1; cluster as usize]);
        rig.flush();
        let late = rig.send(op, Flags::NONE, 512, 1024, &[2; 1024]);
        // It goes down at the end of the turn.
        assert!(rig.turn().is_empty());
        late
    };
    assert_eq!(block::BlockQueue::in_flight(rig.leaf(0)), 1);
    rig.leaf(0).stall(true);
    assert_eq!(rig.call(Op::Discard, 0, cluster, &[]).0, Status::Ok);
    for n in 1..6 {
        rig.flush();
        rig.write(n * cluster, &vec![0x30 + n as u8; cluster as usize]);
    }
    rig.leaf(0).stall(false);
    let done = rig.settle();
    assert_eq!((done[0].0, done[0].1), (late, Status::Ok));
    if op == Op::Read {
        let data = &done[0].2.as_ref().unwrap()[..1024];
        assert!(data.iter().all(|&b| b <= 1), "{op:?} met {:#x}", data[0]);
    }
    for n in 1..6 {
        let data = rig.read(n * cluster, cluster);
        assert!(data.iter().all(|&b| b == 0x30 + n as u8), "{op:?} into cluster {n}");
    }
    // And in the end it is used again.
    rig.flush();
    rig.flush();
    let (_, bad, leaks) = check(rig.close().remove(0));
    assert_eq!((bad, leaks), (0, 0));
}

/// A file that could grow for ever on a file system that is full: no search for space that is there
/// in name only.
#[test]
fn a_full_file_system_says_so_at_once() {
    let mut o = CreateOptions::new(4 << 20);
    o.cluster_size = 512;
    o.refcount_bits = 64;
    let mut leaf = fresh(2 << 20, 7, &o);
    leaf.pretend(1 << 50, 1 << 20);
    leaf.no_space_from = 1 << 20;
    let (stack, leaves) = rig::open_stack(vec![leaf], &[Format::Qcow2], true).unwrap();
    let mut rig = Rig::attach(stack, leaves, Options::default());
    let mut at = 0;
    loop {
        let s = rig.call(Op::Write, at, 512, &[1; 512]).0;
        if s == Status::NoSpace {
            break;
        }
        assert_eq!(s, Status::Ok);
        at += 512;
    }
    assert!(at > 512 << 10, "{at}");
    // And on the way to more refcount blocks, too.
    for n in 1..200 {
        let before = rig.leaf(0).requests;
        let s = rig.call(Op::Write, at + n * 8192, 8192, &[1; 8192]).0;
        assert_eq!(s, Status::NoSpace);
        assert!(rig.leaf(0).requests - before < 40, "{n}");
    }
    // Until there is room again.
    rig.leaf(0).no_space_from = u64::MAX;
    rig.write(at, &[2; 8192]);
    assert_eq!(rig.read(0, 512), [1; 512]);
    let mut leaf = rig.end().1.remove(0);
    leaf.pretend(2 << 20, 2 << 20);
    let (_, bad, _) = check(leaf);
    assert_eq!(bad, 0);
}

/// A close waits for what is in flight, however long that takes.
#[test]
fn a_close_waits_for_a_slow_device() {
    let mut o = CreateOptions::new(2 << 20);
    o.cluster_size = 4096;
    let mut rig = Rig::single(fresh(6 << 20, 7, &o));
    rig.write(0, &[1; 65536]);
    rig.leaf(0).slow_reads = true;
    let id = rig.send(Op::Read, Flags::NONE, 0, 4096, &[]);
    rig.turn();
    Layer::<LogQueue>::close(rig.image());
    for _ in 0..5000 {
        assert!(rig.turn().is_empty());
        assert!(rig.core.remove_closed_image(0).is_none(), "closed with a read in flight");
    }
    rig.leaf(0).slow_reads = false;
    let done = rig.settle();
    assert_eq!((done[0].0, done[0].1), (id, Status::Ok));
    let (_, bad, leaks) = check(rig.close().remove(0));
    assert_eq!((bad, leaks), (0, 0));
}

/// A close waits for what is in flight, and answers all of it.
#[test]
fn a_close_waits_for_what_is_in_flight() {
    for seed in 1..20 {
        let mut o = CreateOptions::new(2 << 20);
        o.cluster_size = 4096;
        let mut rig = Rig::single(fresh(6 << 20, seed, &o));
        rig.write(0, &[1; 65536]);
        for n in 0..24u64 {
            rig.send(Op::Write, Flags::NONE, n * 40960, 6144, &[2; 6144]);
        }
        for _ in 0..seed {
            rig.turn();
        }
        let answered = 24 - rig.portal.in_flight();
        Layer::<LogQueue>::close(rig.image());
        let mut done = answered;
        let mut closed = None;
        for _ in 0..100_000 {
            let got = rig.turn();
            assert!(got.iter().all(|g| g.1.is_ok()));
            done += got.len();
            if let Some((_, status)) = rig.core.remove_closed_image(0) {
                closed = Some(status);
                break;
            }
        }
        while let Some(r) = rig.portal.receive() {
            assert!(r.status.is_ok());
            done += 1;
        }
        assert_eq!(closed, Some(Status::Ok), "seed {seed}");
        assert_eq!(done, 24, "seed {seed}: closed before all was answered");
        let leaf = rig.crash().remove(0);
        let (leaf, bad, leaks) = check(leaf);
        assert_eq!((bad, leaks), (0, 0), "seed {seed}");
        let mut rig = Rig::single(leaf);
        for n in 0..24u64 {
            assert_eq!(rig.read(n * 40960, 6144), [2; 6144], "seed {seed}");
        }
    }
}

/// A device with room for one request at a time: everything ends all the same, in a fair order.
#[test]
fn a_device_of_depth_one() {
    let mut o = CreateOptions::new(4 << 20);
    o.cluster_size = 4096;
    let mut rig = Rig::single(fresh(8 << 20, 3, &o));
    rig.write(0, &vec![1; 256 << 10]);
    rig.leaf(0).depth = 1;
    // Hits without end beside writes that allocate.
    let slow: Vec<u64> = (0..8u64)
        .map(|n| rig.send(Op::Write, Flags::NONE, (1 << 20) + n * 8192, 6144, &[3; 6144]))
        .collect();
    let mut left = slow.len();
    let mut hits = 0;
    for _ in 0..20_000 {
        while rig.portal.in_flight() < 20 {
            rig.send(Op::Read, Flags::NONE, (hits % 32) * 4096, 4096, &[]);
            hits += 1;
        }
        for (id, status, _) in rig.turn() {
            assert_eq!(status, Status::Ok);
            left -= usize::from(slow.contains(&id));
        }
        if left == 0 {
            break;
        }
    }
    assert_eq!(left, 0, "hits starve what is slow: {hits} hits");
    rig.settle();
    let (_, bad, leaks) = check(rig.close().remove(0));
    assert_eq!((bad, leaks), (0, 0));
}
