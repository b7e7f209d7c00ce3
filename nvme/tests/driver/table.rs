//! The table of faults in docs/reliability.md: each fault under a load that verifies, how often it
//! befell, what became of the requests. Printed by `cargo test -p nvme --test driver table --
//! --nocapture`.

use std::collections::BTreeMap;

use crate::common::*;
use block::{BlockQueue, Flags, Op, Status, Submit};
use nvme::State;
use std::sync::atomic::Ordering;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 512;
const REQUESTS: u64 = 6000;

struct Case {
    name: &'static str,
    faults: &'static str,
    setup: fn(&Rig),
    /// How requests may end besides well.
    may_fail: &'static [Status],
    /// Whether some must.
    must_fail: bool,
    /// What the controller is doing in the end.
    state: State,
    /// Controller resets, at most; and whether there are any.
    resets: u64,
}

const CASE: Case = Case {
    name: "",
    faults: "",
    setup: |_| {},
    may_fail: &[],
    must_fail: false,
    state: State::Ready,
    resets: 0,
};

const CASES: [Case; 14] = [
    Case { name: "none", ..CASE },
    Case {
        name: "media error (281h, 280h)",
        faults: "status=281:op=read,every=40;status=280:op=write,every=50",
        may_fail: &[Status::Medium],
        must_fail: true,
        ..CASE
    },
    Case {
        name: "namespace not ready (082h), to be retried",
        faults: "status=82:every=30",
        ..CASE
    },
    Case {
        name: "command lost, abort does not help",
        faults: "lost:nth=500,every=1500",
        may_fail: &[Status::Timeout],
        must_fail: true,
        resets: 4,
        ..CASE
    },
    Case {
        name: "command slower than its deadline",
        faults: "delay=9000ms:nth=100,every=1000",
        may_fail: &[Status::Timeout],
        must_fail: true,
        ..CASE
    },
    Case { name: "completions out of order", faults: "delay=3:every=3;delay=7:every=5", ..CASE },
    Case { name: "completion posted twice", faults: "dup:every=25", ..CASE },
    Case { name: "unknown CID", faults: "badcid:every=25", ..CASE },
    Case { name: "unknown SQ identifier", faults: "badsqid:every=25", ..CASE },
    Case {
        name: "controller fails (CSTS.CFS)",
        faults: "cfs:nth=1000,count=1;cfs:nth=4000,count=1",
        resets: 2,
        ..CASE
    },
    Case {
        name: "the same, CC.EN=0 ignored: function reset",
        faults: "cfs:nth=1000,count=1;noreset:count=1",
        setup: |rig| rig.world.function_reset.set(Hook::Works),
        ..CASE
    },
    Case {
        name: "the same, no function reset: bus master off",
        faults: "cfs:nth=1000,count=1;noreset",
        setup: |rig| rig.world.bus_master_off.set(Hook::Works),
        may_fail: &[Status::Gone],
        must_fail: true,
        state: State::Failed,
        ..CASE
    },
    Case {
        name: "the same, nothing stops it: quarantine",
        faults: "cfs:nth=1000,count=1;noreset",
        may_fail: &[Status::Gone],
        must_fail: true,
        state: State::Failed,
        ..CASE
    },
    Case {
        name: "surprise removal",
        faults: "gone:nth=3000",
        setup: |rig| rig.world.bus_master_off.set(Hook::Works),
        may_fail: &[Status::Gone],
        must_fail: true,
        state: State::Failed,
        ..CASE
    },
];

/// What may stand in a block: what was acknowledged last, and what failed since.
#[derive(Clone, Default)]
struct Expected {
    sure: u64,
    maybe: Vec<u64>,
}

impl Expected {
    fn allows(&self, word: u64) -> bool {
        word == self.sure || self.maybe.contains(&word)
    }
}

#[test]
fn table_of_faults() {
    println!("| fault | injected | requests | done | failed | sent again | resets |");
    println!("|---|---|---|---|---|---|---|");
    for case in &CASES {
        let mut setup = Setup::new(512, case.faults);
        setup.options.command_timeout = 2 * SECOND;
        let mut rig = setup.open().unwrap();
        (case.setup)(&rig);
        rig.world.tick.set(50 * MS);
        let failed = load(&mut rig, case);
        let device = rig.device();
        let s = rig.queue.stats();
        let count: u64 = failed.values().sum();
        let kinds: Vec<String> =
            failed.iter().map(|(status, n)| format!("{n} {}", Status::ALL[*status])).collect();
        println!(
            "| {} | {} | {REQUESTS} | {} | {} | {} | {} |",
            case.name,
            device.injected,
            REQUESTS - count,
            if kinds.is_empty() { "0".to_owned() } else { kinds.join(", ") },
            s.retries + s.resent,
            device.resets,
        );
        assert_eq!(case.faults.is_empty(), device.injected == 0, "{}", case.name);
        assert_eq!(case.must_fail, count > 0, "{}", case.name);
        assert_eq!(rig.controller.state(), case.state, "{}", case.name);
        assert_eq!(case.resets > 0, device.resets > 0, "{}", case.name);
        assert!(device.resets <= case.resets, "{}", case.name);
        assert_eq!(device.dma_faults, 0, "{}", case.name);
    }
}

/// Reads and writes at random until every request is answered; returns how many failed, by status.
/// Every block that is read, and at the end every block, holds what was acknowledged last, or what
/// a write that failed later would have left.
fn load(rig: &mut Rig, case: &Case) -> BTreeMap<usize, u64> {
    let mut blocks = vec![Expected::default(); BLOCKS as usize];
    let mut busy = vec![false; BLOCKS as usize];
    let mut flying = Vec::new();
    let mut failed = BTreeMap::new();
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut free: Vec<u64> = (0..64).collect();
    let mut sent = 0;
    let limit = rig.world.now.get() + 3600 * SECOND;
    while sent < REQUESTS || !flying.is_empty() {
        assert!(rig.world.now.get() < limit, "{}: hangs", case.name);
        while sent < REQUESTS && rig.queue.room() > 0 && !free.is_empty() {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let block = random % BLOCKS;
            if busy[block as usize] {
                break;
            }
            busy[block as usize] = true;
            let slot = free.pop().unwrap();
            let write = random & 1 << 40 != 0;
            let word = if write { sent + 1 } else { u64::MAX };
            rig.data.store64((slot * BLOCK) as usize, word, Ordering::Relaxed);
            let seg = [rig.seg(slot * BLOCK, BLOCK as u32)];
            let op = if write { Op::Write } else { Op::Read };
            let tag = rig.send(op, Flags::NONE, 0, block * BLOCK, &seg);
            flying.push((tag, block, slot, write.then_some(word)));
            sent += 1;
        }
        rig.turn();
        for c in std::mem::take(&mut rig.done) {
            let at = flying.iter().position(|f| f.0 == c.tag).expect("answered once");
            let (_, block, slot, written) = flying.swap_remove(at);
            busy[block as usize] = false;
            free.push(slot);
            let expected = &mut blocks[block as usize];
            if !c.status.is_ok() {
                assert!(case.may_fail.contains(&c.status), "{}: {c:?}", case.name);
                *failed.entry(c.status as usize).or_default() += 1;
                expected.maybe.extend(written);
                continue;
            }
            match written {
                Some(word) => *expected = Expected { sure: word, maybe: Vec::new() },
                None => {
                    let word = rig.data.load64((slot * BLOCK) as usize, Ordering::Relaxed);
                    assert!(expected.allows(word), "{}: block {block}", case.name);
                }
            }
        }
    }
    assert_eq!(rig.queue.in_flight(), 0);
    for (block, expected) in blocks.iter().enumerate() {
        let bytes = rig.peek(1, block as u64 * BLOCK, 8);
        let word = u64::from_le_bytes(bytes.try_into().unwrap());
        assert!(expected.allows(word), "{}: block {block} is lost", case.name);
    }
    failed
}
