//! Tests of [`RmwQueue`] and [`Claims`], over a leaf whose requests are done late, in
//! any order, or when the test says so.

use std::collections::VecDeque;
use std::sync::Arc;

use dma::{Held, PageSize, Region, RegionId, Seg};

use crate::{
    BlockQueue, Claims, Completion, Completions, DeviceInfo, Fault, FaultQueue, Flags, Full,
    HasWork, MemQueue, Op, Request, RmwQueue, Rule, SegList, Status, Submit, Tag,
};

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 13) % n
    }
}

const BLOCK: u64 = 4096;

/// A request that the device has and has not done.
struct Todo {
    tag: Tag,
    op: Op,
    offset: usize,
    len: usize,
    segs: SegList,
}

/// A device of 4 KiB blocks in memory that several of these share.
struct Late {
    info: DeviceInfo,
    disk: Arc<Region>,
    regions: Vec<Option<Arc<Region>>>,
    todo: VecDeque<Todo>,
    done: VecDeque<Completion>,
    depth: usize,
    /// Whether it can reach more memory.
    takes_more: bool,
    /// Each poll does some of what is to do by chance; without it only `step` does.
    random: Option<Random>,
    seen: Vec<(Tag, Op, bool)>,
}

impl Late {
    fn new(disk: &Arc<Region>, random: Option<u64>) -> Late {
        Late {
            info: DeviceInfo {
                size: disk.len() as u64,
                block_size: BLOCK as u32,
                physical_block_size: BLOCK as u32,
                read_only: false,
                volatile_cache: true,
                write_zeroes: true,
                discard: true,
                discard_granularity: BLOCK as u32,
                max_transfer: 1 << 20,
            },
            disk: disk.clone(),
            regions: vec![None; RegionId::MAX],
            todo: VecDeque::new(),
            done: VecDeque::new(),
            depth: 64,
            takes_more: true,
            random: random.map(Random),
            seen: Vec::new(),
        }
    }

    /// Does one request.
    fn step(&mut self, at: usize) {
        let Some(t) = self.todo.remove(at) else { return };
        let mut pos = t.offset;
        match t.op {
            Op::WriteZeroes | Op::Discard => self.disk.zero(t.offset, t.len),
            Op::Flush => {}
            Op::Read | Op::Write => {
                for s in t.segs.as_slice() {
                    let region = self.regions[s.region().index()].as_ref().unwrap();
                    let (offset, len) = (s.offset() as usize, s.len() as usize);
                    if t.op == Op::Read {
                        dma::copy(&self.disk, pos, region, offset, len);
                    } else {
                        dma::copy(region, offset, &self.disk, pos, len);
                    }
                    pos += len;
                }
            }
        }
        self.done.push_back(Completion { tag: t.tag, status: Status::Ok, detail: 0 });
    }
}

impl Submit for Late {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        (unit == 0).then_some(&self.info)
    }

    fn room(&self) -> usize {
        self.depth - self.todo.len() - self.done.len()
    }

    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        if self.room() == 0 {
            return Err(Full);
        }
        assert!(r.unit == 0 && self.info.contains(r.offset, r.len) && r.segs_fit(), "{r:?}");
        assert!(r.segs.iter().all(|s| s.len() % 512 == 0));
        self.seen.push((r.tag, r.op, r.flags.has(Flags::FUA)));
        self.todo.push_back(Todo {
            tag: r.tag,
            op: r.op,
            offset: r.offset as usize,
            len: r.len as usize,
            segs: SegList::from_slice(r.segs).unwrap(),
        });
        Ok(())
    }
}

impl BlockQueue for Late {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        if !self.takes_more {
            return Err("no more memory".to_owned());
        }
        self.regions[region.id().index()] = Some(region.clone());
        Ok(())
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        if let Some(mut random) = self.random.take() {
            for _ in 0..random.below(4) {
                if !self.todo.is_empty() {
                    self.step(random.below(self.todo.len() as u64) as usize);
                }
            }
            self.random = Some(random);
        }
        let n = self.done.len().min(out.room());
        for c in self.done.drain(..n) {
            out.push(c);
        }
        n
    }

    fn in_flight(&self) -> usize {
        self.todo.len() + self.done.len()
    }

    fn arm(&mut self) -> HasWork {
        if self.in_flight() > 0 { HasWork::Yes } else { HasWork::No }
    }
}

fn disk(len: usize) -> Arc<Region> {
    Region::new(len, PageSize::Small).unwrap()
}

fn queue(leaf: Late, claims: &Arc<Claims>, data: &Arc<Region>) -> RmwQueue<Late> {
    let mut q = RmwQueue::new(leaf, claims).unwrap();
    q.register(data).unwrap();
    q
}

fn request<'a>(slot: u16, op: Op, offset: u64, len: u64, segs: &'a [Seg]) -> Request<'a> {
    let tag = Tag::new(1, slot, 77);
    Request { tag, op, flags: Flags::NONE, unit: 0, offset, len, segs }
}

fn drain<Q: BlockQueue>(q: &mut RmwQueue<Q>) -> Vec<Completion> {
    let mut out = Completions::new();
    let mut all = Vec::new();
    for _ in 0..5_000_000 {
        if q.in_flight() == 0 {
            assert_eq!(q.arm(), HasWork::No);
            return all;
        }
        assert_eq!(q.arm(), HasWork::Yes);
        out.clear();
        if q.poll(&mut out) == 0 {
            std::thread::yield_now();
        }
        all.extend(out.iter());
    }
    panic!("{} requests hang", q.in_flight());
}

/// What a sector may hold: byte values of which each stands for the writer that left it.
type Allowed = Vec<Vec<u8>>;

/// Random requests that overlap as they like, several queues at a time. Afterwards each sector must
/// hold what one of its last concurrent writers wrote, or what was there if there was none.
fn overlapping(seed: u64, queues: usize, depth: usize) {
    const SECTORS: u64 = 64;
    let disk = disk((SECTORS * 512) as usize);
    let data = Region::new(4 << 20, PageSize::Small).unwrap();
    let claims = Claims::new(queues);
    let mut rng = Random(seed);
    let mut qs: Vec<_> = (0..queues)
        .map(|i| {
            let mut leaf = Late::new(&disk, Some(seed ^ (i as u64 + 1) << 32));
            leaf.depth = depth;
            queue(leaf, &claims, &data)
        })
        .collect();
    let mut old = vec![0u8; SECTORS as usize];
    for _ in 0..60 {
        let mut allowed: Allowed = old.iter().map(|&v| vec![v]).collect();
        let mut written = vec![false; SECTORS as usize];
        let mut reads = Vec::new();
        let mut at = 0;
        for n in 0..1 + rng.below(24) as u16 {
            let first = rng.below(SECTORS);
            let count = 1 + rng.below((SECTORS - first).min(20));
            let whole = rng.below(3) == 0;
            let (first, count) =
                if whole { (first / 8 * 8, count.next_multiple_of(8)) } else { (first, count) };
            let op = match rng.below(8) {
                0..=3 => Op::Write,
                4 => Op::WriteZeroes,
                5 => Op::Discard,
                _ => Op::Read,
            };
            let mut segs = Vec::new();
            if matches!(op, Op::Read | Op::Write) {
                let mut left = count;
                while left > 0 {
                    let n = 1 + rng.below(left);
                    segs.push(data.seg(at + 4, (n * 512) as u32).unwrap());
                    at += n * 512 + 4;
                    left -= n;
                }
            }
            let value = 1 + rng.below(255) as u8;
            for s in &segs {
                let fill = if op == Op::Write { value } else { 0xff };
                data.write_seg(s, &vec![fill; s.len() as usize]);
            }
            let r = request(n, op, first * 512, count * 512, &segs);
            let which = rng.below(queues as u64) as usize;
            qs[which].submit(&r).unwrap();
            let value = match op {
                Op::Write => value,
                Op::WriteZeroes | Op::Discard => 0,
                Op::Read => {
                    reads.push((first, segs));
                    continue;
                }
                Op::Flush => unreachable!(),
            };
            for s in first as usize..(first + count) as usize {
                // A discard is a hint: what it leaves alone may stay.
                if op != Op::Discard && !written[s] {
                    written[s] = true;
                    allowed[s].remove(0);
                }
                allowed[s].push(value);
            }
        }
        // Reads may also see what was there before.
        let mut out = Completions::new();
        while qs.iter().any(|q| q.in_flight() > 0) {
            for q in &mut qs {
                if rng.below(3) > 0 {
                    out.clear();
                    q.poll(&mut out);
                    assert!(out.iter().all(|c| c.status == Status::Ok));
                }
            }
        }
        let content: Vec<Vec<u8>> = (0..SECTORS as usize)
            .map(|s| {
                let mut bytes = vec![0; 512];
                disk.read(s * 512, &mut bytes);
                bytes
            })
            .collect();
        for (s, bytes) in content.iter().enumerate() {
            assert!(bytes.iter().all(|b| *b == bytes[0]), "torn sector {s}, seed {seed}");
            assert!(allowed[s].contains(&bytes[0]), "sector {s}: {bytes:?}, seed {seed}");
        }
        for (first, segs) in reads {
            let mut back = Vec::new();
            for s in &segs {
                let mut bytes = vec![0; s.len() as usize];
                data.read_seg(s, &mut bytes);
                back.extend(bytes);
            }
            for (i, sector) in back.chunks(512).enumerate() {
                let s = first as usize + i;
                let fine = sector[0] == old[s] || allowed[s].contains(&sector[0]);
                assert!(fine && sector.iter().all(|b| *b == sector[0]), "read {s}, seed {seed}");
            }
        }
        old = content.iter().map(|bytes| bytes[0]).collect();
    }
    assert!(qs.iter().all(|q| q.strays() == 0));
}

#[test]
fn overlapping_requests_lose_nothing() {
    for seed in 1..=20 {
        overlapping(seed * 7919, 1, 64);
        overlapping(seed * 104_729, 3, 64);
        // A device with hardly any places.
        overlapping(seed * 1_299_709, 2, 2);
    }
}

/// Two requests on two queues under every order of what happens, up to a length.
#[test]
fn every_short_interleaving_of_two_writers_is_right() {
    const STEPS: u32 = 7;
    let disk = disk(4 * BLOCK as usize);
    let data = Region::new(64 << 10, PageSize::Small).unwrap();
    let claims = Claims::new(2);
    let mut qs = [(); 2].map(|()| queue(Late::new(&disk, None), &claims, &data));
    // (first sector, sectors) of each: the same block, a whole block, blocks in common at an edge.
    let cases = [
        [(1, 1), (2, 1)],
        [(1, 2), (0, 8)],
        [(0, 16), (7, 3)],
        [(5, 6), (3, 8)],
        [(1, 20), (9, 14)],
    ];
    let mut out = Completions::new();
    for case in cases {
        for order in 0..4u32.pow(STEPS) {
            data.zero(0, data.len());
            disk.zero(0, disk.len());
            for (i, &(first, count)) in case.iter().enumerate() {
                let seg = data.seg(i as u64 * 32_768, count * 512).unwrap();
                data.write_seg(&seg, &vec![i as u8 + 1; count as usize * 512]);
                let segs = [seg];
                let r = request(0, Op::Write, first * 512, u64::from(count) * 512, &segs);
                qs[i].submit(&r).unwrap();
            }
            let mut code = order;
            for _ in 0..STEPS {
                let who = (code & 1) as usize;
                if code & 2 == 0 {
                    out.clear();
                    qs[who].poll(&mut out);
                } else {
                    qs[who].with_leaf(|leaf| leaf.step(0)).unwrap();
                }
                code >>= 2;
            }
            for turn in 0.. {
                assert!(turn < 100, "hangs: {case:?} {order:o}");
                if qs.iter().all(|q| q.in_flight() == 0) {
                    break;
                }
                for q in &mut qs {
                    q.with_leaf(|leaf| leaf.step(0)).unwrap();
                    out.clear();
                    q.poll(&mut out);
                }
            }
            for s in 0..32u64 {
                let mut byte = [0];
                disk.read(s as usize * 512 + 100, &mut byte);
                let by = case.map(|(first, count)| (first..first + u64::from(count)).contains(&s));
                let (none, one, two) = ([false, false], by[0], by[1]);
                let fine = match byte[0] {
                    0 => by == none,
                    1 => one,
                    _ => two,
                };
                assert!(fine, "sector {s} is of {}: {case:?} order {order:o}", byte[0]);
            }
        }
    }
}

/// Two reactors write sectors of their own, and whole blocks beside them, on one device.
#[test]
fn two_threads_lose_nothing() {
    const BLOCKS: u64 = 4;
    const ROUNDS: u32 = 3000;
    let disk = disk((BLOCKS * BLOCK) as usize);
    let claims = Claims::new(2);
    std::thread::scope(|scope| {
        for t in 0..2u64 {
            let (disk, claims) = (&disk, &claims);
            scope.spawn(move || {
                let data = Region::new(64 << 10, PageSize::Small).unwrap();
                let mut q = queue(Late::new(disk, Some(t + 99)), claims, &data);
                let mut rng = Random(t + 12345);
                let mut last = [[0u32; 4]; BLOCKS as usize];
                for round in 1..=ROUNDS {
                    // A few at a time, each in a block of its own: blocks are common to both
                    // threads, sectors are not.
                    for block in 0..BLOCKS {
                        let k = rng.below(4);
                        let seg = data.seg(block * 512, 512).unwrap();
                        data.write_seg(&seg, &round.to_le_bytes().repeat(128));
                        last[block as usize][k as usize] = round;
                        let sector = block * 8 + 2 * k + t;
                        q.submit(&request(0, Op::Write, sector * 512, 512, &[seg])).unwrap();
                    }
                    assert_eq!(drain(&mut q).len(), BLOCKS as usize);
                    // Ours must still be there, whatever the other does to its neighbours.
                    let block = rng.below(BLOCKS);
                    let mut sectors = vec![0; BLOCK as usize];
                    disk.read((block * BLOCK) as usize, &mut sectors);
                    for (k, &wrote) in last[block as usize].iter().enumerate() {
                        let at = (2 * k + t as usize) * 512;
                        let found = u32::from_le_bytes(sectors[at..at + 4].try_into().unwrap());
                        assert_eq!(found, wrote, "round {round}");
                    }
                }
                assert_eq!(q.strays(), 0);
            });
        }
    });
}

#[test]
fn whole_blocks_go_through_as_they_are() {
    let disk = disk(1 << 20);
    let data = Region::new(64 << 10, PageSize::Small).unwrap();
    let mut q = queue(Late::new(&disk, Some(5)), &Claims::new(1), &data);
    let info = q.info(0).unwrap();
    assert_eq!((info.block_size, info.physical_block_size, info.size), (512, 4096, 1 << 20));
    assert!(q.info(1).is_none());
    let seg = [data.seg(4, 8192).unwrap()];
    q.submit(&request(1, Op::Read, 4096, 8192, &seg)).unwrap();
    q.submit(&request(2, Op::Flush, 0, 0, &[])).unwrap();
    q.submit(&Request { flags: Flags::FUA, ..request(3, Op::Write, 0, 8192, &seg) }).unwrap();
    q.submit(&request(4, Op::Discard, 8192, 4096, &[])).unwrap();
    assert_eq!(q.in_flight(), 4);
    let mut done: Vec<u16> = drain(&mut q).iter().map(|c| c.tag.slot()).collect();
    done.sort_unstable();
    assert_eq!(done, [1, 2, 3, 4]);
    let seen = &q.leaf().seen;
    assert_eq!(seen.len(), 4);
    assert_eq!(seen[0].0, Tag::new(1, 1, 77), "a read keeps its tag");
    assert_eq!((seen[2].1, seen[2].2), (Op::Write, true));
    assert!(q.pool.is_none() && q.slots.len() < 4, "what is not used takes no memory");
}

#[test]
fn without_memory_for_an_edge_the_request_fails_and_others_go_on() {
    let disk = disk(1 << 20);
    let data = Region::new(64 << 10, PageSize::Small).unwrap();
    let mut q = queue(Late::new(&disk, Some(5)), &Claims::new(1), &data);
    q.leaf.takes_more = false;
    let seg = [data.seg(0, 8192).unwrap()];
    for (op, offset) in [(Op::Write, 512), (Op::Read, 512), (Op::Write, 4096)] {
        q.submit(&request(offset as u16, op, offset, 8192, &seg)).unwrap();
        let expected = if offset == 512 { Status::Medium } else { Status::Ok };
        let done = drain(&mut q);
        assert_eq!((done.len(), done[0].status, q.in_flight()), (1, expected, 0));
    }
    q.leaf.takes_more = true;
    q.submit(&request(1, Op::Write, 512, 8192, &seg)).unwrap();
    assert_eq!(drain(&mut q)[0].status, Status::Ok);
}

#[test]
fn a_write_with_fua_is_durable_in_all_its_parts() {
    let disk = disk(1 << 20);
    let data = Region::new(64 << 10, PageSize::Small).unwrap();
    let mut q = queue(Late::new(&disk, Some(5)), &Claims::new(1), &data);
    let seg = [data.seg(0, 9216).unwrap()];
    q.submit(&Request { flags: Flags::FUA, ..request(0, Op::Write, 3584, 9216, &seg) }).unwrap();
    drain(&mut q);
    let mut seen: Vec<_> = q.leaf().seen.iter().map(|&(_, op, fua)| (op as u8, fua)).collect();
    seen.sort_unstable();
    let (read, write) = (Op::Read as u8, Op::Write as u8);
    assert_eq!(seen, [(read, false), (read, false), (write, true), (write, true), (write, true)]);
    // A discard below a block's size is nothing; zeroing it is not.
    q.submit(&request(0, Op::Discard, 512, 7000 / 512 * 512, &[])).unwrap();
    assert_eq!(drain(&mut q)[0].status, Status::Ok);
    assert_eq!(q.leaf().seen.len(), 5);
    disk.write(0, &[7; 8192]);
    q.submit(&request(0, Op::WriteZeroes, 512, 4096, &[])).unwrap();
    assert_eq!(drain(&mut q)[0].status, Status::Ok);
    let mut now = [0; 8192];
    disk.read(0, &mut now);
    assert!(now[..512].iter().chain(&now[4608..]).all(|&b| b == 7));
    assert!(now[512..4608].iter().all(|&b| b == 0));
}

#[test]
fn room_is_honest_when_leaf_and_buffers_run_out() {
    for depth in [3, 64] {
        let disk = disk(1 << 20);
        let data = Region::new(64 << 10, PageSize::Small).unwrap();
        let mut leaf = Late::new(&disk, Some(9));
        leaf.depth = depth;
        let mut q = queue(leaf, &Claims::new(1), &data);
        let mut rng = Random(4711);
        let (mut taken, mut ended) = (0, 0);
        let mut out = Completions::new();
        for _ in 0..3000 {
            for _ in 0..q.room() {
                // Each time as many as promised, the costly kind and the cheap.
                let (op, offset) = match rng.below(3) {
                    0 => (Op::Read, rng.below(200) * 4096),
                    1 => (Op::Write, rng.below(200) * 4096),
                    _ => (Op::Write, rng.below(200) * 4096 + 2048),
                };
                let seg = [data.seg(rng.below(8) * 4096, 4096).unwrap()];
                q.submit(&request(0, op, offset, 4096, &seg)).unwrap();
                taken += 1;
            }
            out.clear();
            ended += q.poll(&mut out);
        }
        // And beyond the promise, until it says that it is full.
        let seg = [data.seg(0, 1024).unwrap()];
        while q.submit(&request(0, Op::Write, 3584, 1024, &seg)).is_ok() {
            taken += 1;
            assert!(taken < 1_000_000);
        }
        assert_eq!(q.room(), 0);
        ended += drain(&mut q).len();
        assert_eq!(ended, taken);
    }
}

#[test]
fn wrong_requests_are_refused_before_anything_is_done() {
    let disk = disk(1 << 20);
    let data = Region::new(2 << 20, PageSize::Small).unwrap();
    let foreign = Region::new(4096, PageSize::Small).unwrap();
    let mut q = queue(Late::new(&disk, Some(3)), &Claims::new(1), &data);
    let s = |len| [data.seg(0, len).unwrap()];
    let mut ask = |r: Request<'_>| {
        q.submit(&r).unwrap();
        drain(&mut q)[0].status
    };
    assert_eq!(ask(request(0, Op::Write, (1 << 20) - 512, 1024, &s(1024))), Status::Invalid);
    assert_eq!(ask(request(0, Op::Write, 100, 512, &s(512))), Status::Invalid);
    assert_eq!(ask(request(0, Op::Write, 512, 1024, &s(512))), Status::Invalid);
    assert_eq!(ask(request(0, Op::Read, u64::MAX - 511, 512, &s(512))), Status::Invalid);
    assert_eq!(ask(request(0, Op::Read, 512, 0, &[])), Status::Invalid);
    let strange = [foreign.seg(0, 512).unwrap()];
    assert_eq!(ask(request(0, Op::Write, 512, 512, &strange)), Status::Invalid);
    let unit = Request { unit: 9, ..request(0, Op::Write, 512, 512, &strange) };
    assert_eq!(ask(unit), Status::Invalid);
    // A tag that looks like one of the queue's own comes back all the same.
    let block = s(4096);
    let own = Request { tag: Tag::new(0xfffe, 3, 8), ..request(0, Op::Read, 0, 4096, &block) };
    assert_eq!(ask(own), Status::Ok);
    q.with_leaf(|leaf| leaf.info.read_only = true).unwrap();
    q.submit(&request(0, Op::Write, 512, 512, &s(512))).unwrap();
    assert_eq!(drain(&mut q)[0].status, Status::ReadOnly);
    assert_eq!(q.leaf().seen.len(), 1);
    assert!(Claims::new(1).join().is_some());
}

#[test]
fn errors_come_up_and_claims_are_given_back() {
    let data = Region::new(64 << 10, PageSize::Small).unwrap();
    for op in [Op::Read, Op::Write] {
        for nth in 0..2 {
            let leaf = FaultQueue::new(MemQueue::new(1 << 20, 4096).unwrap());
            let mut q = RmwQueue::new(leaf, &Claims::new(1)).unwrap();
            q.register(&data).unwrap();
            q.with_leaf(|l| l.add(Rule::all(Fault::Error(Status::Medium)).op(op).nth(nth)))
                .unwrap();
            let seg = [data.seg(0, 9216).unwrap()];
            q.submit(&request(0, Op::Write, 3584, 9216, &seg)).unwrap();
            assert_eq!(drain(&mut q)[0].status, Status::Medium);
            q.submit(&request(0, Op::Write, 3584, 9216, &seg)).unwrap();
            assert_eq!(drain(&mut q)[0].status, Status::Ok);
            q.submit(&request(0, Op::Write, 0, 8192, &[data.seg(0, 8192).unwrap()])).unwrap();
            assert_eq!(drain(&mut q)[0].status, Status::Ok);
        }
    }
}

#[test]
fn answers_to_nothing_are_counted() {
    let disk = disk(1 << 20);
    let data = Region::new(64 << 10, PageSize::Small).unwrap();
    let mut q = queue(Late::new(&disk, None), &Claims::new(1), &data);
    q.submit(&request(0, Op::Write, 512, 512, &[data.seg(0, 512).unwrap()])).unwrap();
    let tag = q.leaf().seen[0].0;
    let invented = [
        tag,
        tag,
        Tag::new(tag.owner(), tag.slot(), tag.generation() + 8),
        Tag::new(tag.owner(), tag.slot(), (tag.generation() + 8) | 4),
        Tag::new(tag.owner(), 5000, 0),
        Tag::new(tag.owner(), tag.slot(), tag.generation() | 7),
    ];
    q.with_leaf(|leaf| {
        leaf.step(0);
        leaf.done.clear();
        // The first is the true answer; its double must not pass for that of the write after it.
        for tag in invented {
            leaf.done.push_back(Completion { tag, status: Status::Ok, detail: 0 });
        }
    })
    .unwrap();
    let mut out = Completions::new();
    q.poll(&mut out);
    q.poll(&mut out);
    assert_eq!((out.len(), q.strays(), q.in_flight()), (0, 5, 1));
    q.with_leaf(|leaf| leaf.step(0)).unwrap();
    assert_eq!(drain(&mut q).len(), 1);
}

#[test]
fn a_region_stays_while_an_edge_needs_it() {
    let leaf = MemQueue::new(64 << 10, 4096).unwrap();
    let mut q = RmwQueue::new(leaf, &Claims::new(1)).unwrap();
    let [r, other] = [0, 1].map(|_| Region::new(4096, PageSize::Small).unwrap());
    let (held, seg) = (Held::new(&r), r.seg(0, 512).unwrap());
    q.register(&r).unwrap();
    assert_eq!(held.tables(), 3, "the queue's, the leaf's, this");
    r.write(0, &[0x42; 512]);
    q.submit(&request(0, Op::Write, 512, 512, &[seg])).unwrap();
    drop(r);
    q.register(&other).unwrap();
    assert_eq!(held.tables(), 2, "the leaf needs it no more");
    assert_eq!(drain(&mut q)[0].status, Status::Ok);
    let mut byte = [0];
    q.leaf().data().read(1023, &mut byte);
    assert_eq!(byte, [0x42]);
    // Gone with the look before the sleep, that `drain` ends with.
    assert_eq!(held.tables(), 1);
    q.submit(&request(0, Op::Write, 512, 512, &[seg])).unwrap();
    assert_eq!(drain(&mut q)[0].status, Status::Invalid);
}
