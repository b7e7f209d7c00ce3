//! Volumes as queues ([`block::SplitQueue`] over a [`volume::Map`]): random requests of all kinds
//! against plain bytes, on volumes of all shapes; what is read afterwards through
//! [`volume::View`], and that the volumes beside were not touched.

use block::{
    BlockQueue, Blocking, Completion, Completions, Delay, DelayQueue, Flags, MemQueue, Op, Request,
    SplitQueue, Status, Storage, Submit, Tag,
};
use dma::{PageSize, Region, Seg};
use volume::{Author, Group, Id, Map, NewGroup, Place, Segment, Shape, Vg};

const EXTENT: u64 = 32 << 10;
const DEVICE: u64 = 4 << 20;

type Device = Blocking<MemQueue>;
type Queue = SplitQueue<DelayQueue<MemQueue>, Map>;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 13) % n
    }
}

fn author() -> Author {
    Author { host: "here".to_owned(), time: 1_700_000_000 }
}

fn group(devices: usize) -> Group<Device> {
    let device = |_| Blocking::new(MemQueue::new(DEVICE, 512).unwrap(), 0).unwrap();
    let new = NewGroup {
        name: "vg".to_owned(),
        system_id: None,
        extent: EXTENT,
        metadata: 64 << 10,
        tags: Vec::new(),
    };
    Group::create((0..devices).map(device).collect(), &new, &author()).unwrap()
}

fn lv(vg: &mut Vg, name: &str, extents: u64, stripes: u32, size: u64) {
    let shape = Shape { stripes, stripe_size: size / 512 };
    vg.create_lv(Id::random().unwrap(), name, extents, shape, &author()).unwrap();
}

/// Puts a segment behind the others of the first volume, on extents that the caller says.
fn push(vg: &mut Vg, areas: &[(usize, u64)], depth: u64, size: u64) {
    let areas: Vec<Place> = areas.iter().map(|&(pv, extent)| Place { pv, extent }).collect();
    let (start, count) = (vg.lvs[0].extents(), depth * areas.len() as u64);
    let stripe_size = if areas.len() > 1 { size / 512 } else { 0 };
    let (tags, extra) = (Vec::new(), Vec::new());
    vg.lvs[0].segments.push(Segment { start, count, stripe_size, areas, tags, extra });
}

/// A group whose volume `v` has this shape, with others around it that are full of `0xee`.
fn shaped(devices: usize, make: impl FnOnce(&mut Vg)) -> Group<Device> {
    let mut group = group(devices);
    let edit = |vg: &mut Vg| {
        make(vg);
        // All that is free.
        lv(vg, "rest", vg.free_extents(), 1, 0);
        Ok(())
    };
    group.change(&author(), "", edit).unwrap();
    let mut rest = group.volume("rest").unwrap();
    let bytes = vec![0xee; rest.len() as usize];
    rest.write_at(0, &bytes).unwrap();
    group
}

fn queue(group: Group<Device>, seed: u64, read_only: bool) -> (Queue, Map) {
    let map = group.map("v").unwrap();
    let devices = group.into_devices().into_iter().zip(1..);
    let member = |(device, n): (Device, u64)| {
        (DelayQueue::new(device.into_leaf(), Delay::Random { seed: seed + n, most: 5 }), 0)
    };
    (SplitQueue::over(devices.map(member).collect(), map.clone(), read_only).unwrap(), map)
}

/// The group again, on other queues to the same memory.
fn again(queue: &Queue) -> Group<Device> {
    let another = |q: &DelayQueue<MemQueue>| Blocking::new(q.leaf().another(), 0).unwrap();
    Group::open(queue.members().map(another).collect(), None).unwrap()
}

fn request<'a>(tag: u16, op: Op, offset: u64, len: u64, segs: &'a [Seg]) -> Request<'a> {
    Request { tag: Tag::new(7, tag, 9), op, flags: Flags::NONE, unit: 0, offset, len, segs }
}

fn run(queue: &mut impl BlockQueue, r: &Request<'_>) -> Completion {
    queue.submit(r).unwrap();
    let mut out = Completions::new();
    for _ in 0..2000 {
        queue.poll(&mut out);
        if let Some(c) = out.iter().next() {
            assert_eq!((out.len(), queue.in_flight()), (1, 0));
            return c;
        }
    }
    panic!("no answer to {r:?}");
}

/// Random requests of all kinds against plain bytes.
fn against_bytes(what: &str, mut queue: Queue, seed: u64) {
    let total = queue.info(0).unwrap().size;
    let most = u64::from(queue.info(0).unwrap().max_transfer).min(256 << 10);
    let memory = Region::new(1 << 20, PageSize::Small).unwrap();
    queue.register(&memory).unwrap();
    let mut flat = vec![0u8; total as usize];
    let mut random = Random(seed);
    let ends: Vec<u64> = queue.layout(0).unwrap().clone().edges(total);
    for round in 0..500u32 {
        let op = [Op::Write, Op::Read, Op::Write, Op::WriteZeroes, Op::Discard, Op::Flush]
            [random.below(6) as usize];
        let longest = if matches!(op, Op::WriteZeroes | Op::Discard) { total } else { most };
        let mut len = (random.below(longest / 512) + 1) * 512;
        let mut offset = random.below((total - len) / 512 + 1) * 512;
        if random.below(2) == 0 {
            // Just across an edge.
            let edge = ends[random.below(ends.len() as u64) as usize];
            offset = edge.saturating_sub(random.below(4) * 512);
            len = ((random.below(12) + 1) * 512).min(total - offset).max(512);
            offset = offset.min(total - len);
        }
        let cut = random.below(len / 512) * 512;
        let moves = matches!(op, Op::Read | Op::Write);
        let segs: Vec<Seg> = [(0, cut), (512 << 10, len - cut)]
            .iter()
            .filter(|s| moves && s.1 > 0)
            .map(|s| memory.seg(s.0, s.1 as u32).unwrap())
            .collect();
        let range = offset as usize..(offset + len) as usize;
        match op {
            Op::Write => {
                let bytes: Vec<u8> = (0..len).map(|i| (i as u32 ^ (round * 7)) as u8).collect();
                memory.write(0, &bytes[..cut as usize]);
                memory.write(512 << 10, &bytes[cut as usize..]);
                flat[range.clone()].copy_from_slice(&bytes);
            }
            Op::WriteZeroes | Op::Discard => flat[range.clone()].fill(0),
            Op::Read | Op::Flush => {}
        }
        let (offset, len) = if op == Op::Flush { (0, 0) } else { (offset, len) };
        let r = request(round as u16, op, offset, len, &segs);
        let c = run(&mut queue, &r);
        assert_eq!((c.tag, c.status), (r.tag, Status::Ok), "{what}: {r:?}");
        if op == Op::Read {
            let mut got = vec![0; len as usize];
            memory.read(0, &mut got[..cut as usize]);
            memory.read(512 << 10, &mut got[cut as usize..]);
            assert!(got == flat[range], "{what}, round {round}: {offset:#x}+{len:#x}");
        }
    }
    assert_eq!(queue.strays(), 0);
    let mut group = again(&queue);
    let mut got = vec![0; total as usize];
    group.volume("v").unwrap().read_at(0, &mut got).unwrap();
    assert!(got == flat, "{what}: as a view");
    let mut rest = group.volume("rest").unwrap();
    let mut got = vec![0; rest.len() as usize];
    rest.read_at(0, &mut got).unwrap();
    assert!(got.iter().all(|&b| b == 0xee), "{what}: a volume beside was written to");
}

/// Where runs begin.
trait Edges {
    fn edges(&self, total: u64) -> Vec<u64>;
}

impl Edges for Map {
    fn edges(&self, total: u64) -> Vec<u64> {
        let (mut at, mut edges) = (0, Vec::new());
        while at < total {
            edges.push(at);
            at += self.find(at).unwrap().len;
        }
        edges
    }
}

#[test]
fn volumes_of_all_shapes_are_what_plain_bytes_are() {
    type Make = fn(&mut Vg);
    let shapes: [(&str, usize, Make); 7] = [
        ("linear", 1, |vg| lv(vg, "v", 20, 1, 0)),
        ("linear over two devices", 2, |vg| lv(vg, "v", 120, 1, 0)),
        ("in several segments", 3, |vg| {
            lv(vg, "v", 3, 1, 0);
            push(vg, &[(2, 50)], 1, 0);
            push(vg, &[(0, 40)], 4, 0);
            push(vg, &[(0, 30)], 2, 0);
            push(vg, &[(1, 9)], 7, 0);
        }),
        ("two stripes", 2, |vg| lv(vg, "v", 40, 2, 8 << 10)),
        ("four stripes", 4, |vg| lv(vg, "v", 80, 4, 4 << 10)),
        ("three stripes in two segments", 4, |vg| {
            lv(vg, "v", 9, 3, EXTENT);
            push(vg, &[(3, 7), (1, 30), (0, 60)], 5, 16 << 10);
        }),
        ("stripes and lines", 4, |vg| {
            lv(vg, "v", 8, 2, 4 << 10);
            push(vg, &[(3, 1)], 3, 0);
            push(vg, &[(2, 10), (0, 40), (1, 20), (3, 11)], 6, 8 << 10);
            // Twice on one device.
            push(vg, &[(1, 60), (1, 50)], 2, 32 << 10);
        }),
    ];
    for (seed, (what, devices, make)) in (1..).zip(shapes) {
        let (queue, map) = queue(shaped(devices, make), seed, false);
        assert_eq!(queue.info(0).unwrap().size, map.len());
        assert!(map.align() >= 4096, "{what}");
        against_bytes(what, queue, seed * 77);
    }
}

#[test]
fn more_pieces_than_can_be_in_flight_are_done_all_the_same() {
    // Extents of two devices by turns: each is a segment.
    let make = |vg: &mut Vg| {
        lv(vg, "v", 1, 1, 0);
        for n in 1..100 {
            push(vg, &[(n as usize % 2, n / 2)], 1, 0);
        }
    };
    let (mut queue, map) = queue(shaped(2, make), 5, false);
    let memory = Region::new(64 << 10, PageSize::Small).unwrap();
    queue.register(&memory).unwrap();
    for op in [Op::WriteZeroes, Op::Discard] {
        let c = run(&mut queue, &request(1, op, 512, map.len() - 1024, &[]));
        assert_eq!((c.status, queue.strays()), (Status::Ok, 0));
    }
    against_bytes("a hundred segments", queue, 99);
}

#[test]
fn a_request_in_one_run_is_one_command_with_its_own_tag() {
    let (mut queue, map) = queue(shaped(2, |vg| lv(vg, "v", 120, 1, 0)), 5, false);
    let memory = Region::new(64 << 10, PageSize::Small).unwrap();
    queue.register(&memory).unwrap();
    let commands =
        |queue: &Queue| -> u64 { queue.members().map(|m| m.leaf().writes_and_flushes().0).sum() };
    let seg = [memory.seg(0, 8192).unwrap()];
    let edge = map.find(0).unwrap().len;
    for (offset, parts) in [(0, 1), (EXTENT - 4096, 1), (edge - 8192, 1), (edge - 4096, 2)] {
        let before = commands(&queue);
        let r = request(3, Op::Write, offset, 8192, &seg);
        assert_eq!(run(&mut queue, &r).tag, r.tag);
        assert_eq!(commands(&queue) - before, parts, "{offset:#x}");
    }
    // A flush goes to devices that have something of the volume.
    let (mut queue, _) = self::queue(shaped(3, |vg| lv(vg, "v", 4, 2, 4096)), 5, false);
    let flushes = |queue: &Queue| -> Vec<u64> {
        queue.members().map(|m| m.leaf().writes_and_flushes().1).collect()
    };
    let before = flushes(&queue);
    assert!(run(&mut queue, &request(1, Op::Flush, 0, 0, &[])).status.is_ok());
    let now = flushes(&queue);
    let more: Vec<u64> = now.iter().zip(&before).map(|(now, before)| now - before).collect();
    assert_eq!(more, [1, 1, 0]);
}

#[test]
fn what_goes_past_the_end_finds_no_space_and_what_may_only_be_read_stays() {
    for read_only in [false, true] {
        let (mut queue, map) = queue(shaped(2, |vg| lv(vg, "v", 8, 2, 4096)), 5, read_only);
        let memory = Region::new(64 << 10, PageSize::Small).unwrap();
        queue.register(&memory).unwrap();
        let seg = [memory.seg(0, 4096).unwrap()];
        let end = map.len();
        for (op, offset, len, status) in [
            (Op::Write, end, 4096, Status::NoSpace),
            (Op::Write, end - 2048, 4096, Status::NoSpace),
            (Op::Write, 1 << 60, 4096, Status::NoSpace),
            (Op::WriteZeroes, end - 4096, 8192, Status::NoSpace),
            (Op::WriteZeroes, end - 2048, 2048, Status::Ok),
            (Op::Write, end - 4096, 4096, Status::Ok),
            (Op::Write, end + 100, 4096, Status::Invalid),
            (Op::Write, u64::MAX - 511, 4096, Status::Invalid),
            (Op::Read, end, 4096, Status::Invalid),
            (Op::Read, end - 2048, 4096, Status::Invalid),
            (Op::Discard, end, 4096, Status::Invalid),
            (Op::Discard, 0, end, Status::Ok),
            (Op::Read, end - 4096, 4096, Status::Ok),
            (Op::Flush, 0, 0, Status::Ok),
        ] {
            let segs = if matches!(op, Op::Read | Op::Write) { &seg[..] } else { &[] };
            let got = run(&mut queue, &request(1, op, offset, len, segs)).status;
            let writes = !matches!(op, Op::Read | Op::Flush);
            match (read_only && writes, status) {
                (true, Status::Ok) => assert_eq!(got, Status::ReadOnly, "{op:?} {offset:#x}"),
                _ => assert_eq!(got, status, "{op:?} {offset:#x}"),
            }
        }
    }
}

#[test]
fn a_volume_that_has_grown_is_served_on_while_requests_are_in_flight() {
    let mut group = group(2);
    let edit = |vg: &mut Vg| {
        lv(vg, "v", 8, 2, 4096);
        Ok(())
    };
    group.change(&author(), "", edit).unwrap();
    let (mut queue, old) = queue(group, 5, false);
    let memory = Region::new(512 << 10, PageSize::Small).unwrap();
    queue.register(&memory).unwrap();
    let seg = |len| [memory.seg(0, len).unwrap()];
    let behind = request(1, Op::Write, old.len(), 4096, &seg(4096)).offset;
    assert_eq!(
        run(&mut queue, &request(1, Op::Write, behind, 4096, &seg(4096))).status,
        Status::NoSpace
    );
    memory.write(0, &[0x5a; 64 << 10]);
    // In parts, of which some wait.
    queue.submit(&request(2, Op::Write, 512, 64 << 10, &seg(64 << 10))).unwrap();
    queue.submit(&request(3, Op::Discard, 0x20000, 0x10000, &[])).unwrap();
    let mut group = again(&queue);
    group.change(&author(), "", |vg| vg.extend_lv("v", 4)).unwrap();
    group
        .change(&author(), "", |vg| {
            push(vg, &[(1, 40)], 3, 0);
            Ok(())
        })
        .unwrap();
    let new = group.map("v").unwrap();
    assert!(new.extends(&old) && !old.extends(&new) && new.extends(&new));
    queue.grow(0, new.clone()).unwrap();
    assert!(queue.grow(0, old).is_err(), "it cannot become smaller");
    let mut out = Completions::new();
    let mut tags = Vec::new();
    while tags.len() < 2 {
        out.clear();
        queue.poll(&mut out);
        tags.extend(out.iter().map(|c| (c.tag.slot(), c.status)));
    }
    tags.sort_by_key(|t| t.0);
    assert_eq!(tags, [(2, Status::Ok), (3, Status::Ok)]);
    assert_eq!(queue.info(0).unwrap().size, new.len());
    let offset = new.len() - 4096;
    for at in [behind, behind - 2048, offset] {
        let c = run(&mut queue, &request(1, Op::Write, at, 4096, &seg(4096)));
        assert_eq!(c.status, Status::Ok, "{at:#x}");
    }
    let mut group = again(&queue);
    let mut view = group.volume("v").unwrap();
    for at in [512, 512 + (60 << 10), behind, offset] {
        let mut got = [0; 4096];
        view.read_at(at, &mut got).unwrap();
        assert!(got.iter().all(|&b| b == 0x5a), "{at:#x}");
    }
    // Another volume's map is none of this one.
    group.change(&author(), "", |vg| vg.extend_lv("v", 1)).unwrap();
    let edit = |vg: &mut Vg| {
        lv(vg, "w", 8, 2, 4096);
        Ok(())
    };
    group.change(&author(), "", edit).unwrap();
    assert!(!group.map("w").unwrap().extends(&group.map("v").unwrap()));
    assert!(!group.map("v").unwrap().extends(&group.map("w").unwrap()));
}

/// All volumes of a group as units of one queue, each with requests in flight at the same time.
#[test]
fn volumes_as_units_of_one_queue() {
    let mut group = group(2);
    let names = ["a", "b", "c"];
    let edit = |vg: &mut Vg| {
        names.iter().zip([1, 2, 1]).for_each(|(name, stripes)| lv(vg, name, 8, stripes, 4096));
        Ok(())
    };
    group.change(&author(), "", edit).unwrap();
    let maps = names.map(|name| group.map(name).unwrap());
    let devices = group.into_devices().into_iter().zip(1..);
    let members = devices.map(|(device, n)| {
        (DelayQueue::new(device.into_leaf(), Delay::Random { seed: n, most: 5 }), 0)
    });
    let mut queue: Queue = SplitQueue::of(members.collect()).unwrap();
    assert!(queue.info(0).is_none());
    let memory = Region::new(3 * 4096 * 8, PageSize::Small).unwrap();
    queue.register(&memory).unwrap();
    let ask = |unit, r: Request<'static>| Request { unit, ..r };
    assert_eq!(run(&mut queue, &ask(1, request(1, Op::Flush, 0, 0, &[]))).status, Status::Invalid);
    for (unit, map) in [1, 2, 5].into_iter().zip(&maps) {
        // The last one is for reading.
        queue.put(unit, map.clone(), unit == 5).unwrap();
        assert!(queue.put(unit, map.clone(), false).unwrap_err().contains("already"));
    }
    let mut random = Random(11);
    let mut out = Completions::new();
    for round in 0..50u8 {
        let offset = random.below(maps[0].len() / 4096 - 8) * 4096 + 512;
        let (mut sent, mut answered) = (0, Vec::new());
        for (n, unit) in [1u16, 2, 5].into_iter().enumerate() {
            let at = n as u64 * 4096 * 8;
            memory.write(at as usize, &[round + n as u8; 4096 * 8]);
            let segs = [memory.seg(at, 4096 * 8).unwrap()];
            let r = Request { unit, ..request(n as u16, Op::Write, offset, 4096 * 8, &segs) };
            queue.submit(&r).unwrap();
            sent += 1;
        }
        while answered.len() < sent {
            out.clear();
            queue.poll(&mut out);
            answered.extend(out.iter().map(|c| (c.tag.slot(), c.status)));
        }
        answered.sort_by_key(|a| a.0);
        assert_eq!(answered, [(0, Status::Ok), (1, Status::Ok), (2, Status::ReadOnly)]);
        let mut group = again(&queue);
        for (n, name) in names.iter().enumerate() {
            let mut got = vec![0; 4096 * 8];
            group.volume(name).unwrap().read_at(offset, &mut got).unwrap();
            let wanted = if n < 2 { round + n as u8 } else { 0 };
            assert!(got.iter().all(|&b| b == wanted), "{name} in round {round}");
        }
    }
    // A number is free again when its unit has gone.
    assert!(!queue.remove(2));
    assert_eq!(run(&mut queue, &ask(2, request(1, Op::Flush, 0, 0, &[]))).status, Status::Invalid);
    queue.put(2, maps[2].clone(), false).unwrap();
    let segs = [memory.seg(0, 512).unwrap()];
    let written = run(&mut queue, &Request { unit: 2, ..request(1, Op::Write, 0, 512, &segs) });
    assert_eq!(written.status, Status::Ok);
    let mut got = [0; 512];
    again(&queue).volume("c").unwrap().read_at(0, &mut got).unwrap();
    assert_eq!(got, [49; 512]);
    assert!(!queue.remove(1) && !queue.remove(5) && queue.remove(2));
}

#[test]
fn devices_that_are_too_short_or_too_many_are_refused() {
    let map = shaped(2, |vg| lv(vg, "v", 120, 1, 0)).map("v").unwrap();
    let mem = |size| (MemQueue::new(size, 512).unwrap(), 0);
    let over = |members| SplitQueue::over(members, map.clone(), false).map(|_| ()).unwrap_err();
    let short = over(vec![mem(DEVICE), mem(1 << 20)]);
    assert!(short.contains("member 1 has 1048576 bytes"), "{short}");
    let one = over(vec![mem(DEVICE)]);
    assert!(one.contains("1 members; 2 are needed"), "{one}");
    assert!(over(Vec::new()).contains("0 members"));
    assert!(over((0..33).map(|_| mem(DEVICE)).collect()).contains("33 members"));
}
