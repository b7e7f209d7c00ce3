//! [`FaultQueue`]: a leaf that fails on demand, for tests of what stands above.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use dma::Region;

use crate::{
    BlockQueue, Completion, Completions, DeviceInfo, Full, HasWork, LeafAccess, Op, Request,
    Status, Submit, Tag,
};

/// What happens to a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It is not done, and ends like this.
    Error(Status),
    /// It is done, but ends like this: a device that wrote and then failed to say so.
    ErrorAfter(Status),
    /// It is done, but its completion is kept until [`FaultQueue::release`].
    Lose,
    /// It is done, but its completion is kept for this many polls.
    Delay(u32),
}

/// Which requests a fault befalls: those of `op`, if given, that touch `bytes` (every flush counts
/// as touching), after the first `skip` of them, `count` times.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// This operation only.
    pub op: Option<Op>,
    /// These bytes of the device.
    pub bytes: Range<u64>,
    /// How many requests that match pass unharmed first.
    pub skip: u32,
    /// How many after them are struck; `u32::MAX` for all.
    pub count: u32,
    /// What befalls them.
    pub fault: Fault,
}

impl Rule {
    /// Befalls every request.
    pub fn all(fault: Fault) -> Rule {
        Rule { op: None, bytes: 0..u64::MAX, skip: 0, count: u32::MAX, fault }
    }

    /// Only requests of this operation.
    pub fn op(self, op: Op) -> Rule {
        Rule { op: Some(op), ..self }
    }

    /// Only requests that touch these bytes.
    pub fn bytes(self, bytes: Range<u64>) -> Rule {
        Rule { bytes, ..self }
    }

    /// Only the `n`th request of those, counted from 0.
    pub fn nth(self, n: u32) -> Rule {
        Rule { skip: n, count: 1, ..self }
    }

    /// Whether the request is struck; counts it if it matches.
    fn strikes(&mut self, r: &Request<'_>) -> bool {
        let touches = r.op == Op::Flush
            || (r.offset < self.bytes.end && r.offset.saturating_add(r.len) > self.bytes.start);
        if self.op.is_some_and(|op| op != r.op) || !touches {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        if self.count != u32::MAX {
            let left = self.count;
            self.count = left.saturating_sub(1);
            return left > 0;
        }
        true
    }
}

/// A completion that is kept back.
#[derive(Clone, Copy, Debug)]
struct Kept {
    completion: Completion,
    /// The poll in which it is due; `None` if lost.
    due: Option<u64>,
}

/// Strikes requests to the leaf below by a list of rules; the first that applies, does.
#[derive(Debug)]
pub struct FaultQueue<Q> {
    leaf: Q,
    rules: Vec<Rule>,
    /// Requests in the leaf whose completions are to be changed or kept.
    marked: Vec<(Tag, Fault)>,
    kept: Vec<Kept>,
    now: u64,
    struck: u64,
    inner: Completions,
}

impl<Q: BlockQueue> FaultQueue<Q> {
    /// Puts the queue over a leaf. Without rules it changes nothing.
    pub fn new(leaf: Q) -> FaultQueue<Q> {
        FaultQueue {
            leaf,
            rules: Vec::new(),
            marked: Vec::new(),
            kept: Vec::new(),
            now: 0,
            struck: 0,
            inner: Completions::new(),
        }
    }

    /// The leaf.
    pub fn leaf_mut(&mut self) -> &mut Q {
        &mut self.leaf
    }

    /// Adds a rule, behind those that are there.
    pub fn add(&mut self, rule: Rule) {
        self.rules.push(rule);
    }

    /// Forgets all rules. What they did stays done.
    pub fn heal(&mut self) {
        self.rules.clear();
    }

    /// How many requests were struck so far.
    pub fn struck(&self) -> u64 {
        self.struck
    }

    /// How many completions are lost.
    pub fn lost(&self) -> usize {
        self.kept.iter().filter(|k| k.due.is_none()).count()
    }

    /// Finds the lost completions again: the next polls hand them out.
    pub fn release(&mut self) {
        for k in &mut self.kept {
            k.due.get_or_insert(self.now);
        }
    }
}

impl<Q: BlockQueue> Submit for FaultQueue<Q> {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        self.leaf.info(unit)
    }

    fn room(&self) -> usize {
        self.leaf.room()
    }

    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        if self.leaf.room() == 0 {
            return Err(Full);
        }
        let fault =
            self.rules.iter_mut().find_map(|rule| rule.strikes(request).then_some(rule.fault));
        if let Some(fault) = fault {
            self.struck += 1;
            if let Fault::Error(status) = fault {
                let completion = Completion { tag: request.tag, status, detail: 0 };
                self.kept.push(Kept { completion, due: Some(self.now) });
                return Ok(());
            }
            self.marked.push((request.tag, fault));
        }
        self.leaf.submit(request)
    }
}

impl<Q: BlockQueue> BlockQueue for FaultQueue<Q> {
    fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        self.leaf.register(region)
    }

    fn poll(&mut self, out: &mut Completions) -> usize {
        self.inner.clear();
        self.leaf.poll(&mut self.inner);
        for mut completion in self.inner.iter() {
            let mark = self.marked.iter().position(|&(tag, _)| tag == completion.tag);
            let due = match mark.map(|at| self.marked.swap_remove(at).1) {
                Some(Fault::Lose) => None,
                Some(Fault::Delay(polls)) => Some(self.now + u64::from(polls)),
                Some(Fault::ErrorAfter(status) | Fault::Error(status)) => {
                    completion.status = status;
                    Some(self.now)
                }
                None => Some(self.now),
            };
            self.kept.push(Kept { completion, due });
        }
        let (now, before) = (self.now, out.len());
        self.now += 1;
        self.kept.retain(|k| {
            let keep = k.due.is_none_or(|due| due > now) || out.room() == 0;
            if !keep {
                out.push(k.completion);
            }
            keep
        });
        out.len() - before
    }

    fn start(&mut self) {
        self.leaf.start();
    }

    fn in_flight(&self) -> usize {
        self.leaf.in_flight() + self.kept.len()
    }

    fn arm(&mut self) -> HasWork {
        if self.kept.iter().any(|k| k.due.is_some()) { HasWork::Yes } else { self.leaf.arm() }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.leaf.wake_fd()
    }

    fn set_now(&mut self, now: u64) {
        self.leaf.set_now(now);
    }
}

impl<Q: LeafAccess> LeafAccess for FaultQueue<Q> {
    fn unit_len(&self, unit: u16) -> u64 {
        self.leaf.unit_len(unit)
    }

    fn set_unit_len(&mut self, unit: u16, len: u64) -> Result<(), Status> {
        self.leaf.set_unit_len(unit, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Flags, MemQueue};

    struct Rig {
        q: FaultQueue<MemQueue>,
        region: Arc<Region>,
        out: Completions,
    }

    impl Rig {
        fn new() -> Rig {
            let mut q = FaultQueue::new(MemQueue::new(1 << 20, 512).unwrap());
            let region = Region::new(4096, dma::PageSize::Small).unwrap();
            q.register(&region).unwrap();
            Rig { q, region, out: Completions::new() }
        }

        fn submit(&mut self, slot: u16, op: Op, offset: u64) {
            let seg = self.region.seg(0, 4096).unwrap();
            let (len, segs) =
                if op == Op::Flush { (0, &[][..]) } else { (4096, std::slice::from_ref(&seg)) };
            let tag = Tag::new(0, slot, 0);
            let r = Request { tag, op, flags: Flags::NONE, unit: 0, offset, len, segs };
            self.q.submit(&r).unwrap();
        }

        fn poll(&mut self) -> Vec<(u16, Status)> {
            self.out.clear();
            self.q.poll(&mut self.out);
            self.out.iter().map(|c| (c.tag.slot(), c.status)).collect()
        }

        fn on_disk(&mut self, at: usize) -> u8 {
            let mut byte = [0];
            self.q.leaf_mut().data().read(at, &mut byte);
            byte[0]
        }
    }

    #[test]
    fn rules_pick_by_operation_place_and_number() {
        let mut rig = Rig::new();
        let rule = Rule::all(Fault::Error(Status::Medium)).op(Op::Write).bytes(8192..8193);
        rig.q.add(rule.nth(1));
        rig.q.add(Rule::all(Fault::Error(Status::Timeout)).op(Op::Flush));
        rig.region.write(0, &[7; 4096]);
        for (slot, offset) in [(0, 4096), (1, 8192), (2, 8192), (3, 8192)] {
            rig.submit(slot, Op::Write, offset);
        }
        rig.submit(4, Op::Read, 8192);
        rig.submit(5, Op::Flush, 0);
        let mut got = rig.poll();
        got.sort_by_key(|g| g.0);
        use Status::{Medium, Ok, Timeout};
        assert_eq!(got, [(0, Ok), (1, Ok), (2, Medium), (3, Ok), (4, Ok), (5, Timeout)]);
        assert_eq!((rig.q.struck(), rig.q.in_flight()), (2, 0));
        rig.q.heal();
        rig.submit(0, Op::Flush, 0);
        assert_eq!(rig.poll(), [(0, Ok)]);
    }

    #[test]
    fn an_error_is_not_done_and_a_late_error_is() {
        let mut rig = Rig::new();
        rig.region.write(0, &[9; 4096]);
        rig.q.add(Rule::all(Fault::Error(Status::NoSpace)).nth(0));
        rig.q.add(Rule::all(Fault::ErrorAfter(Status::Medium)).nth(0));
        rig.submit(0, Op::Write, 0);
        rig.submit(1, Op::Write, 4096);
        let mut got = rig.poll();
        got.sort_by_key(|g| g.0);
        assert_eq!(got, [(0, Status::NoSpace), (1, Status::Medium)]);
        assert_eq!((rig.on_disk(0), rig.on_disk(4096)), (0, 9));
    }

    #[test]
    fn lost_ones_come_when_released_and_late_ones_when_due() {
        let mut rig = Rig::new();
        rig.q.add(Rule::all(Fault::Lose).nth(0));
        rig.q.add(Rule::all(Fault::Delay(2)).nth(0));
        for slot in 0..3 {
            rig.submit(slot, Op::Read, 0);
        }
        assert_eq!(rig.poll(), [(2, Status::Ok)]);
        assert_eq!((rig.poll(), rig.q.arm()), (vec![], HasWork::Yes));
        assert_eq!(rig.poll(), [(1, Status::Ok)]);
        assert_eq!((rig.q.lost(), rig.q.in_flight(), rig.q.arm()), (1, 1, HasWork::No));
        rig.q.release();
        assert_eq!(rig.poll(), [(0, Status::Ok)]);
    }
}
