//! Tests of [`StripeQueue`] over members in memory that are slow, narrow, or fail.

use std::sync::Arc;

use dma::{PageSize, Region, Seg};

use crate::{
    BlockQueue, Completion, Completions, Delay, DelayQueue, DeviceInfo, Fault, FaultQueue, Flags,
    Full, HasWork, LeafAccess, MemQueue, Op, QUARANTINED, Request, Rule, Status, StripeQueue,
    Submit, Tag,
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

/// A queue with room for few.
struct Narrow<Q> {
    queue: Q,
    depth: usize,
}

impl<Q: LeafAccess> Submit for Narrow<Q> {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        self.queue.info(unit)
    }
    fn room(&self) -> usize {
        self.depth - self.queue.in_flight()
    }
    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        assert!(self.room() > 0, "submitted without room");
        self.queue.submit(r)
    }
}

impl<Q: LeafAccess> BlockQueue for Narrow<Q> {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.queue.register(region)
    }
    fn poll(&mut self, out: &mut Completions) -> usize {
        self.queue.poll(out)
    }
    fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }
    fn arm(&mut self) -> HasWork {
        self.queue.arm()
    }
}

impl<Q: LeafAccess> LeafAccess for Narrow<Q> {
    fn unit_len(&self, unit: u16) -> u64 {
        self.queue.unit_len(unit)
    }
    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
        self.queue.set_unit_len(unit, len)
    }
}

type Member = Narrow<DelayQueue<MemQueue>>;

fn member(size: u64, depth: usize, seed: u64) -> (Member, u16) {
    let delay = Delay::Random { seed, most: 5 };
    (Narrow { queue: DelayQueue::new(MemQueue::new(size, 512).unwrap(), delay), depth }, 0)
}

fn request<'a>(tag: u16, op: Op, offset: u64, len: u64, segs: &'a [Seg]) -> Request<'a> {
    Request { tag: Tag::new(7, tag, 9), op, flags: Flags::NONE, unit: 0, offset, len, segs }
}

fn wait(queue: &mut impl BlockQueue, count: usize) -> Vec<Completion> {
    let (mut out, mut all) = (Completions::new(), Vec::new());
    for _ in 0..1000 {
        out.clear();
        queue.poll(&mut out);
        all.extend(out.iter());
        if all.len() == count {
            assert_eq!((queue.in_flight(), queue.arm()), (0, HasWork::No));
            return all;
        }
    }
    panic!("{} of {count} were answered", all.len());
}

#[test]
fn reads_give_what_was_written_whatever_the_layout() {
    for (members, size, depth) in [(2, 4096, 1), (3, 4096, 2), (4, 65536, 8), (5, 8192, 1)] {
        let one = 1 << 20;
        let list = (0..members).map(|i| member(one + i * 4096, depth, i + 1)).collect();
        let mut queue = StripeQueue::new(list, size).unwrap();
        let total = queue.info(0).unwrap().size;
        assert_eq!(total, one / size * size * members);
        let memory = Region::new(1 << 20, PageSize::Small).unwrap();
        queue.register(&memory).unwrap();
        let mut flat = vec![0u8; total as usize];
        let mut random = Random(members + size);
        for round in 0..600u32 {
            let most = u64::from(queue.info(0).unwrap().max_transfer).min(256 << 10);
            let len = (random.below(most / 512) + 1) * 512;
            let offset = random.below((total - len) / 512 + 1) * 512;
            // In two segments, cut anywhere.
            let cut = random.below(len / 512) * 512;
            let segs: Vec<Seg> = [(0, cut), (512 << 10, len - cut)]
                .iter()
                .filter(|s| s.1 > 0)
                .map(|s| memory.seg(s.0, s.1 as u32).unwrap())
                .collect();
            let range = offset as usize..(offset + len) as usize;
            let op = [Op::Write, Op::Read, Op::Write, Op::WriteZeroes, Op::Discard, Op::Flush]
                [random.below(6) as usize];
            let r = match op {
                Op::Write => {
                    let bytes: Vec<u8> = (0..len).map(|i| (i as u32 ^ (round * 7)) as u8).collect();
                    memory.write(0, &bytes[..cut as usize]);
                    memory.write(512 << 10, &bytes[cut as usize..]);
                    flat[range.clone()].copy_from_slice(&bytes);
                    request(1, op, offset, len, &segs)
                }
                Op::Read => request(1, op, offset, len, &segs),
                Op::Flush => request(1, op, 0, 0, &[]),
                Op::WriteZeroes | Op::Discard => {
                    flat[range.clone()].fill(0);
                    request(1, op, offset, len, &[])
                }
            };
            assert!(queue.room() > 0);
            queue.submit(&r).unwrap();
            let [c] = wait(&mut queue, 1)[..] else { unreachable!() };
            assert_eq!((c.tag, c.status), (r.tag, Status::Ok));
            if op == Op::Read {
                let mut got = vec![0; len as usize];
                memory.read(0, &mut got[..cut as usize]);
                memory.read(512 << 10, &mut got[cut as usize..]);
                assert!(got == flat[range], "round {round}: {offset:#x}+{len:#x}");
            }
        }
        // Neighbouring chunks lie on different members, so all of them were written to.
        assert!(queue.members().all(|m| m.queue.in_flight() == 0));
    }
}

#[test]
fn many_at_once_are_answered_once_each() {
    let mut queue =
        StripeQueue::new((1..4).map(|i| member(1 << 20, 3, i)).collect(), 4096).unwrap();
    let memory = Region::new(1 << 20, PageSize::Small).unwrap();
    queue.register(&memory).unwrap();
    let (mut random, mut out) = (Random(5), Completions::new());
    let (mut sent, mut open, mut answered) = (0u16, std::collections::HashSet::new(), 0);
    while answered < 3000 {
        while queue.room() > 0 && sent < 3000 {
            let len = (random.below(40) + 1) * 512;
            let seg = [memory.seg(0, len as u32).unwrap()];
            let offset = random.below(((3 << 20) - len) / 512) * 512;
            queue.submit(&request(sent, Op::Read, offset, len, &seg)).unwrap();
            open.insert(sent);
            sent += 1;
        }
        out.clear();
        queue.poll(&mut out);
        for c in out.iter() {
            assert!(c.status.is_ok() && open.remove(&c.tag.slot()), "{c:?}");
            answered += 1;
        }
        assert_eq!(queue.in_flight(), open.len());
    }
    assert_eq!(queue.strays(), 0);
}

#[test]
fn zeroes_and_discards_are_one_range_on_each_member() {
    let list = (0..4).map(|_| (MemQueue::new(1 << 20, 512).unwrap(), 0)).collect();
    let mut queue = StripeQueue::new(list, 4096).unwrap();
    queue.submit(&request(1, Op::WriteZeroes, 2048, 3 << 20, &[])).unwrap();
    wait(&mut queue, 1);
    assert!(queue.members().all(|m| m.writes_and_flushes() == (1, 0)));
    queue.submit(&request(1, Op::Discard, 4096, 8192, &[])).unwrap();
    wait(&mut queue, 1);
    let writes: Vec<u64> = queue.members().map(|m| m.writes_and_flushes().0).collect();
    assert_eq!(writes, [1, 2, 2, 1]);
    queue.submit(&request(1, Op::Flush, 0, 0, &[])).unwrap();
    wait(&mut queue, 1);
    assert!(queue.members().all(|m| m.writes_and_flushes().1 == 1));
    queue.submit(&request(1, Op::WriteZeroes, 4096, 0, &[])).unwrap();
    assert!(wait(&mut queue, 1)[0].status.is_ok(), "nothing to do is done");
}

#[test]
fn a_failed_part_fails_the_request_once_all_are_back() {
    let list: Vec<_> = (0..3)
        .map(|i| {
            let mut q = FaultQueue::new(MemQueue::new(1 << 20, 512).unwrap());
            if i == 1 {
                q.add(Rule::all(Fault::Error(Status::Medium)).op(Op::Write));
                q.add(Rule::all(Fault::Error(Status::Gone)).op(Op::Flush));
                q.add(Rule::all(Fault::Delay(5)).op(Op::Read));
            }
            (q, 0)
        })
        .collect();
    let mut queue = StripeQueue::new(list, 4096).unwrap();
    let memory = Region::new(1 << 20, PageSize::Small).unwrap();
    queue.register(&memory).unwrap();
    let seg = [memory.seg(0, 12288).unwrap()];
    let mut run = |r: Request<'_>| {
        queue.submit(&r).unwrap();
        wait(&mut queue, 1)[0].status
    };
    assert_eq!(run(request(1, Op::Write, 0, 12288, &seg)), Status::Medium);
    assert_eq!(run(request(2, Op::Flush, 0, 0, &[])), Status::Gone);
    assert_eq!(run(request(3, Op::Read, 0, 12288, &seg)), Status::Ok);
    let small = [memory.seg(0, 4096).unwrap()];
    assert_eq!(run(request(4, Op::Write, 0, 4096, &small)), Status::Ok);
    assert_eq!(run(request(5, Op::Write, 4096, 4096, &small)), Status::Medium);
}

/// A device that is lost and was not stopped.
struct Stuck(MemQueue);

impl Submit for Stuck {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        self.0.info(unit)
    }
    fn room(&self) -> usize {
        self.0.room()
    }
    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        self.0.submit(r)
    }
}

impl BlockQueue for Stuck {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.0.register(region)
    }
    fn poll(&mut self, out: &mut Completions) -> usize {
        let mut inner = Completions::new();
        self.0.poll(&mut inner);
        for c in inner.iter() {
            out.push(Completion { status: Status::Gone, detail: QUARANTINED, ..c });
        }
        inner.len()
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
    fn arm(&mut self) -> HasWork {
        self.0.arm()
    }
}

impl LeafAccess for Stuck {
    fn unit_len(&self, unit: u16) -> u64 {
        self.0.unit_len(unit)
    }
    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
        self.0.set_unit_len(unit, len)
    }
}

/// One of two kinds of member.
enum Either {
    Good(MemQueue),
    Bad(Stuck),
}

macro_rules! either {
    ($self:expr, $q:ident => $e:expr) => {
        match $self {
            Either::Good($q) => $e,
            Either::Bad($q) => $e,
        }
    };
}

impl Submit for Either {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        either!(self, q => q.info(unit))
    }
    fn room(&self) -> usize {
        either!(self, q => q.room())
    }
    fn submit(&mut self, r: &Request<'_>) -> Result<(), Full> {
        either!(self, q => q.submit(r))
    }
}

impl BlockQueue for Either {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        either!(self, q => q.register(region))
    }
    fn poll(&mut self, out: &mut Completions) -> usize {
        either!(self, q => q.poll(out))
    }
    fn in_flight(&self) -> usize {
        either!(self, q => q.in_flight())
    }
    fn arm(&mut self) -> HasWork {
        either!(self, q => q.arm())
    }
}

impl LeafAccess for Either {
    fn unit_len(&self, unit: u16) -> u64 {
        either!(self, q => q.unit_len(unit))
    }
    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
        either!(self, q => q.set_unit_len(unit, len))
    }
}

#[test]
fn a_member_that_could_not_be_stopped_takes_the_stripe_with_it() {
    for len in [4096, 12288] {
        let mem = || MemQueue::new(1 << 20, 512).unwrap();
        let list = vec![(Either::Good(mem()), 0), (Either::Bad(Stuck(mem())), 0)];
        let mut queue = StripeQueue::new(list, 4096).unwrap();
        let memory = Region::new(1 << 20, PageSize::Small).unwrap();
        queue.register(&memory).unwrap();
        let mut run = |r: Request<'_>| {
            queue.submit(&r).unwrap();
            wait(&mut queue, 1)[0]
        };
        let seg = [memory.seg(0, 4096).unwrap()];
        let more = [memory.seg(0, len).unwrap()];
        assert_eq!(run(request(1, Op::Read, 0, 4096, &seg)).status, Status::Ok);
        let c = run(request(2, Op::Read, 4096, len.into(), &more));
        assert_eq!((c.status, c.is_quarantined()), (Status::Gone, true), "{len}");
        assert_eq!(run(request(3, Op::Read, 0, 4096, &seg)).status, Status::Gone);
        assert_eq!(run(request(4, Op::Flush, 0, 0, &[])).status, Status::Gone);
    }
}

#[test]
fn what_is_wrong_is_answered_and_not_sent() {
    let list = (0..2).map(|_| (MemQueue::new(1 << 20, 512).unwrap(), 0)).collect();
    let mut queue = StripeQueue::new(list, 4096).unwrap();
    let memory = Region::new(1 << 20, PageSize::Small).unwrap();
    queue.register(&memory).unwrap();
    let seg = [memory.seg(0, 4096).unwrap()];
    let long = [memory.seg(0, 132 << 10).unwrap()];
    for r in [
        request(1, Op::Read, 2 << 20, 4096, &seg),
        request(1, Op::Read, (2 << 20) - 2048, 4096, &seg),
        request(1, Op::Read, u64::MAX - 4095, 4096, &seg),
        request(1, Op::Read, 100, 4096, &seg),
        request(1, Op::Read, 0, 8192, &seg),
        request(1, Op::Read, 0, 0, &[]),
        request(1, Op::Write, 0, 132 << 10, &long),
        request(1, Op::Discard, 1 << 20, 2 << 20, &[]),
    ] {
        queue.submit(&r).unwrap();
        assert_eq!(wait(&mut queue, 1)[0].status, Status::Invalid, "{r:?}");
    }
    assert!(queue.members().all(|m| m.writes_and_flushes().0 == 0));
}

#[test]
fn members_that_do_not_fit_together_are_refused() {
    let mem = |size, block| (MemQueue::new(size, block).unwrap(), 0);
    let new = |list, size| StripeQueue::new(list, size).map(|_| ()).unwrap_err();
    assert!(new(vec![mem(1 << 20, 512)], 4096).contains("1 members"));
    assert!(new(vec![mem(1 << 20, 512), mem(1 << 20, 4096)], 4096).contains("blocks of 512"));
    assert!(new(vec![mem(1 << 20, 512), mem(8192, 512)], 65536).contains("smaller than one"));
    assert!(new(vec![mem(1 << 20, 512), mem(1 << 20, 512)], 5000).contains("power of two"));
    let other = (MemQueue::new(1 << 20, 512).unwrap(), 3);
    assert!(new(vec![mem(1 << 20, 512), other], 4096).contains("no unit 3"));
}
