//! The rings and what keeps them honest: wrap-around, order, room, doorbells, identifiers.

use crate::common::*;
use block::{BlockQueue, Completions, Flags, Full, HasWork, Op, Request, Status, Submit};
use nvme_spec::{cq_head_doorbell, sq_tail_doorbell};

/// Writes and reads single blocks at full depth for a while; every block is checked against what
/// was last written to it.
fn churn(rig: &mut Rig, requests: usize, seed: u64) {
    const BLOCKS: u64 = 4096;
    let mut shadow = vec![0u64; BLOCKS as usize];
    let mut busy = vec![false; BLOCKS as usize];
    let mut flying = Vec::new();
    let mut random = seed;
    let mut next = |below: u64| {
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let slots = rig.data.len() as u64 / 512;
    let mut free: Vec<u64> = (0..slots).collect();
    let mut sent = 0;
    while sent < requests || !flying.is_empty() {
        while sent < requests && rig.queue.room() > 0 {
            let lba = next(BLOCKS);
            if busy[lba as usize] {
                break;
            }
            let slot = free.pop().unwrap();
            let seg = [rig.seg(slot * 512, 512)];
            let value = next(u64::MAX >> 2) | 1;
            let write = next(2) == 0;
            let word = if write { value } else { !0 };
            rig.data.store64(slot as usize * 512, word, std::sync::atomic::Ordering::Relaxed);
            let op = if write { Op::Write } else { Op::Read };
            let tag = rig.send(op, Flags::NONE, 0, lba * 512, &seg);
            busy[lba as usize] = true;
            flying.push((tag, lba, slot, write.then_some(value)));
            sent += 1;
        }
        rig.turn();
        for c in std::mem::take(&mut rig.done) {
            assert_eq!(c.status, Status::Ok);
            let at = flying.iter().position(|f| f.0 == c.tag).expect("answered once");
            let (_, lba, slot, written) = flying.swap_remove(at);
            let word = rig.data.load64(slot as usize * 512, std::sync::atomic::Ordering::Relaxed);
            match written {
                Some(v) => shadow[lba as usize] = v,
                None => assert_eq!(word, shadow[lba as usize], "block {lba}"),
            }
            busy[lba as usize] = false;
            free.push(slot);
        }
    }
    assert_eq!(rig.queue.in_flight(), 0);
}

#[test]
fn rings_wrap_many_times_at_full_depth() {
    for entries in [2, 4, 16, 64] {
        let mut setup = Setup::new(512, "");
        setup.options.queue_entries = entries;
        let mut rig = setup.open().unwrap();
        let requests = if entries < 16 { 500 } else { 5000 };
        churn(&mut rig, requests, 11);
        let s = rig.queue.stats();
        assert_eq!((s.submitted, s.completed, s.stale_cids), (requests as u64, requests as u64, 0));
        assert_eq!(rig.device().bad_doorbells, 0);
    }
}

#[test]
fn completions_in_any_order() {
    for seed in 0..5 {
        let mut setup = Setup::new(512, "");
        setup.model.shuffle = Some(seed);
        let mut rig = setup.open().unwrap();
        churn(&mut rig, 2000, seed);
        assert_eq!(rig.queue.stats().stale_cids, 0);
    }
}

#[test]
fn delayed_commands_among_others() {
    let mut rig = Setup::new(512, "delay=40:op=io,every=7").open().unwrap();
    churn(&mut rig, 2000, 5);
}

#[test]
fn room_is_what_submit_takes() {
    let mut rig = Setup::new(512, "").open().unwrap();
    let depth = rig.queue.depth();
    assert_eq!(rig.queue.room(), depth, "one tracker each");
    for left in (0..depth).rev() {
        let seg = [rig.seg(0, 512)];
        rig.send(Op::Read, Flags::NONE, 0, 0, &seg);
        assert_eq!(rig.queue.room(), left);
    }
    let segs = [rig.seg(0, 512)];
    let tag = rig.tag();
    let r = Request {
        tag,
        op: Op::Read,
        flags: Flags::NONE,
        unit: 0,
        offset: 0,
        len: 512,
        segs: &segs,
    };
    assert_eq!(rig.queue.submit(&r), Err(Full));
    assert_eq!(rig.queue.in_flight(), depth, "nothing of it was taken");
    rig.drain();
    assert_eq!((rig.queue.room(), rig.done.len()), (depth, depth));
}

#[test]
fn long_requests_are_taken_whole_even_when_no_tracker_is_free() {
    let mut rig = Setup::new(512, "").open().unwrap();
    // 4 MiB at 128 KiB per command: 32 commands each, far more than there are trackers.
    let want = pattern(1, 1 << 20);
    rig.data.write(0, &want);
    let mut tags = Vec::new();
    while rig.queue.room() > 0 && tags.len() < 40 {
        let seg = [rig.seg(0, 1 << 20)];
        let at = (tags.len() as u64) << 20;
        tags.push(rig.send(Op::Write, Flags::NONE, 0, at, &seg));
    }
    assert!(tags.len() >= 8, "{}", tags.len());
    rig.drain();
    for (i, tag) in tags.iter().enumerate() {
        assert_eq!(rig.answer(*tag).status, Status::Ok);
        assert!(rig.peek(1, (i as u64) << 20, 1 << 20) == want);
    }
    let s = rig.queue.stats();
    assert_eq!((s.submitted, s.splits), (tags.len() as u64 * 8, tags.len() as u64));
    assert_eq!(rig.queue.room(), rig.queue.depth());
}

#[test]
fn more_bounced_requests_than_bounce_buffers() {
    let mut rig = Setup::new(512, "").open().unwrap();
    let bytes = pattern(4, 1 << 20);
    rig.data.write(0, &bytes);
    let mut tags = Vec::new();
    for i in 0..40u64 {
        // Two sectors that do not meet at a page.
        let segs = [rig.seg(i * 8192, 512), rig.seg(i * 8192 + 1024, 512)];
        tags.push(rig.send(Op::Write, Flags::NONE, 0, i * 1024, &segs));
    }
    rig.drain();
    for (i, tag) in tags.into_iter().enumerate() {
        assert_eq!(rig.answer(tag).status, Status::Ok);
        let got = rig.peek(1, i as u64 * 1024, 1024);
        assert!(got[..512] == bytes[i * 8192..i * 8192 + 512]);
        assert!(got[512..] == bytes[i * 8192 + 1024..i * 8192 + 1536]);
    }
    assert_eq!((rig.queue.stats().bounces, rig.queue.stats().splits), (40, 0));
}

#[test]
fn immediate_answers_are_bounded_too() {
    let mut rig = Setup::new(512, "").open().unwrap();
    let mut taken = 0;
    loop {
        let tag = rig.tag();
        let r = Request {
            tag,
            op: Op::Flush,
            flags: Flags::NONE,
            unit: 0,
            offset: 0,
            len: 0,
            segs: &[],
        };
        let room = rig.queue.room();
        match rig.queue.submit(&r) {
            Ok(()) => taken += 1,
            Err(Full) => {
                assert_eq!(room, 0);
                break;
            }
        }
        assert!(taken < 10_000);
    }
    let mut got = 0;
    while rig.queue.in_flight() > 0 {
        let n = rig.poll();
        assert!(n > 0 && n <= Completions::CAPACITY);
        got += n;
    }
    assert_eq!(got, taken);
}

#[test]
fn a_full_array_loses_nothing() {
    let mut rig = Setup::new(512, "").open().unwrap();
    let mut tags = Vec::new();
    for _ in 0..20 {
        let seg = [rig.seg(0, 512)];
        tags.push(rig.send(Op::Read, Flags::NONE, 0, 0, &seg));
    }
    for _ in 0..5 {
        tags.push(rig.send_len(Op::Flush, Flags::NONE, 0, 0, 0, &[]));
    }
    let mut out = Completions::new();
    let filler = block::Tag::new(1, 1, 1);
    while out.room() > 0 {
        out.ok(filler);
    }
    for _ in 0..5 {
        assert_eq!(rig.queue.poll(&mut out), 0);
        rig.world.turn();
    }
    assert_eq!(rig.queue.in_flight(), 25);
    rig.drain();
    for tag in tags {
        assert_eq!(rig.answer(tag).status, Status::Ok);
    }
}

#[test]
fn doorbells_are_rung_once_per_poll_and_for_completions_once_per_quarter() {
    let mut rig = Setup::new(512, "").open().unwrap();
    let (sq, cq) = (sq_tail_doorbell(1, 0), cq_head_doorbell(1, 0));
    let count = |rig: &Rig, at| rig.world.doorbells.borrow().get(&at).copied().unwrap_or(0);
    for _ in 0..12 {
        let seg = [rig.seg(0, 512)];
        rig.send(Op::Read, Flags::NONE, 0, 0, &seg);
    }
    assert_eq!((count(&rig, sq), count(&rig, cq)), (0, 0), "not before the poll");
    rig.poll();
    assert_eq!((count(&rig, sq), count(&rig, cq)), (1, 0));
    rig.world.turn();
    assert_eq!(rig.poll(), 12);
    assert_eq!((count(&rig, sq), count(&rig, cq)), (1, 0), "12 of 64 are no quarter");
    for _ in 0..100 {
        assert_eq!(rig.poll(), 0);
    }
    assert_eq!((count(&rig, sq), count(&rig, cq)), (1, 0), "nothing to say, nothing said");
    for _ in 0..4 {
        let seg = [rig.seg(0, 512)];
        rig.send(Op::Read, Flags::NONE, 0, 0, &seg);
    }
    rig.poll();
    rig.world.turn();
    assert_eq!(rig.poll(), 4);
    assert_eq!((count(&rig, sq), count(&rig, cq)), (2, 1));
    let s = rig.queue.stats();
    assert_eq!((s.sq_doorbells, s.cq_doorbells, s.polls - s.empty_polls), (2, 1, 2));
    assert!(s.empty_polls >= 101);
}

#[test]
fn a_device_that_posts_too_much_is_told_of_room_in_time() {
    // Completions that nobody asked for take room in the ring too, and the device is told of room
    // only now and then. (Not so many that a doubled one comes 64 uses of its slot too late: by
    // then its CID is somebody else's.)
    for entries in [2, 4, 8, 64] {
        for faults in
            ["dup:every=3", "badcid:every=2", "dup:every=4;badcid:every=4;delay=2:every=3"]
        {
            let mut setup = Setup::new(512, faults);
            setup.options.queue_entries = entries;
            let mut rig = setup.open().unwrap();
            churn(&mut rig, 1000, u64::from(entries));
            let s = rig.queue.stats();
            assert!(s.stale_cids > 300 && s.cq_doorbells > 0, "{entries} {faults}: {s:?}");
        }
    }
}

/// Writes of the two doorbell registers of queue 1, as the bar saw them.
fn register_writes(rig: &Rig) -> u64 {
    let at = [sq_tail_doorbell(1, 0), cq_head_doorbell(1, 0)];
    let seen = rig.world.doorbells.borrow();
    at.iter().map(|a| seen.get(a).copied().unwrap_or(0)).sum()
}

#[test]
fn shadow_doorbells_spare_register_writes_and_lose_none() {
    for entries in [2, 4, 16, 64] {
        let mut setup = Setup::new(512, "delay=2:op=read,every=3;cfs:op=write,nth=1000");
        setup.options.queue_entries = entries;
        setup.model.doorbell_buffer = true;
        let mut rig = setup.open().unwrap();
        churn(&mut rig, 4000, u64::from(entries));
        let s = rig.queue.stats();
        assert_eq!(s.sq_doorbells + s.cq_doorbells, register_writes(&rig));
        assert!(s.sq_doorbells > 0, "a device that sleeps is woken");
        assert!(entries < 16 || s.cq_doorbells < s.completed / 2, "{s:?}");
        // A reset makes the device forget them, and it is told again.
        assert_eq!((rig.device().resets, rig.device().dma_faults), (1, 0));
    }
}

#[test]
fn while_the_device_is_busy_no_register_is_written() {
    let mut setup = Setup::new(512, "delay=50:op=read,count=1");
    setup.model.doorbell_buffer = true;
    let mut rig = setup.open().unwrap();
    let seg = [rig.seg(0, 512)];
    rig.send(Op::Read, Flags::NONE, 0, 0, &seg);
    rig.turn();
    assert_eq!(register_writes(&rig), 1);
    for _ in 0..20 {
        rig.send(Op::Write, Flags::NONE, 0, 4096, &seg);
        rig.turn();
        rig.turn();
    }
    assert!(rig.done.len() >= 19, "the others go on");
    let s = rig.queue.stats();
    assert!(s.sq_doorbells == 1 && s.cq_doorbells <= 1, "{s:?}");
    rig.drain();
}

#[test]
fn a_device_that_refuses_shadow_doorbells_is_driven_by_its_registers() {
    let mut setup = Setup::new(512, "status=0x002:op=doorbells");
    setup.model.doorbell_buffer = true;
    let mut rig = setup.open().unwrap();
    churn(&mut rig, 500, 5);
    let s = rig.queue.stats();
    assert_eq!(s.sq_doorbells + s.cq_doorbells, register_writes(&rig));
    assert!(s.sq_doorbells >= 500 / 63);
}

#[test]
fn arm_says_whether_to_poll_again() {
    let mut rig = Setup::new(512, "").open().unwrap();
    assert_eq!(rig.queue.arm(), HasWork::No);
    let seg = [rig.seg(0, 512)];
    rig.send(Op::Read, Flags::NONE, 0, 0, &seg);
    assert_eq!(rig.queue.arm(), HasWork::Yes);
    rig.drain();
    assert_eq!(rig.queue.arm(), HasWork::No);
    rig.send_len(Op::Flush, Flags::NONE, 0, 0, 0, &[]);
    assert_eq!(rig.queue.arm(), HasWork::Yes);
    rig.drain();
    assert_eq!(rig.queue.arm(), HasWork::No);
}

#[test]
fn doubled_and_invented_completions_are_counted_and_not_followed() {
    for (faults, each) in [
        ("dup:op=io", 1),
        ("badcid:op=io", 1),
        ("badcid=0:op=io", 1),
        // A slot that exists, in a generation that does not; and one beyond the last slot.
        ("badcid=64000:op=io", 1),
        ("badcid=1000:op=io", 1),
        ("dup:op=io;badcid=3000:op=io", 2),
    ] {
        let mut setup = Setup::new(512, faults);
        setup.options.queue_entries = 16;
        let mut rig = setup.open().unwrap();
        churn(&mut rig, 600, 3);
        let s = rig.queue.stats();
        assert_eq!((s.submitted, s.completed), (600, 600), "{faults}");
        // Some of them the model may have had no room for.
        assert!(s.stale_cids > 300 && s.stale_cids <= 600 * each, "{faults}: {}", s.stale_cids);
    }
}

#[test]
fn a_wrong_queue_identifier_does_no_harm() {
    let mut rig = Setup::new(512, "badsqid:op=io").open().unwrap();
    churn(&mut rig, 200, 9);
}

#[test]
fn the_admin_queue_ignores_them_too() {
    let mut rig = Setup::new(512, "dup:op=admin;badcid=5:op=admin").open().unwrap();
    rig.turn_until(SECOND, |r| r.world.now.get() > 200 * MS);
    assert!(rig.controller.stale_admin_cids() > 5);
    churn(&mut rig, 100, 9);
}
