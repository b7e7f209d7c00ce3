//! Devices that misbehave: error statuses, retries, lost commands and the ladder.

use crate::common::*;
use block::{BlockQueue, Flags, Op, QUARANTINED, Status, Submit};
use nvme::{Error, State};
use nvme_spec::{Cc, offset};

fn one(rig: &mut Rig, op: Op) -> block::Tag {
    let seg = [rig.seg(0, 4096)];
    rig.send(op, Flags::NONE, 0, 0, &seg)
}

/// Turns for so much virtual time.
fn pass(rig: &mut Rig, time: u64) {
    let end = rig.world.now.get() + time;
    rig.turn_until(time + SECOND, |r| r.world.now.get() >= end);
}

#[test]
fn every_kind_of_status_arrives_with_what_the_device_said() {
    for (raw, want) in [
        (0x281u16, Status::Medium),
        (0x280, Status::Medium),
        (0x081, Status::NoSpace),
        (0x020, Status::ReadOnly),
        (0x182, Status::ReadOnly),
        (0x001, Status::Unsupported),
        (0x080, Status::Invalid),
        (0x002, Status::Invalid),
        (0x00b, Status::Gone),
        (0x007, Status::Timeout),
        (0x7c5, Status::Medium),
    ] {
        let mut rig = Setup::new(512, &format!("status={raw:x}:op=read,count=1")).open().unwrap();
        let tag = one(&mut rig, Op::Read);
        rig.drain();
        let c = rig.answer(tag);
        assert_eq!(c.status, want, "{raw:#x}");
        // The model sets More, and no Do Not Retry.
        assert_eq!(c.detail, raw | 0x2000);
        assert_eq!(rig.queue.stats().errors[want as usize], 1);
        let tag = one(&mut rig, Op::Read);
        rig.drain();
        assert_eq!((rig.answer(tag).status, rig.answer(tag).detail), (Status::Ok, 0));
    }
}

#[test]
fn an_error_in_one_part_of_a_long_request_is_the_answer_to_all_of_it() {
    let mut rig = Setup::new(512, "status=281:op=write,lba=1500-1500").open().unwrap();
    let seg = [rig.seg(0, 3 << 20)];
    let tag = rig.send(Op::Write, Flags::NONE, 0, 0, &seg);
    rig.drain();
    assert_eq!((rig.answer(tag).status, rig.answer(tag).detail & 0x7ff), (Status::Medium, 0x281));
    assert!(rig.queue.stats().submitted < 24, "no more of it was sent than was under way");
    assert_eq!(rig.queue.room(), rig.queue.depth());
}

#[test]
fn retryable_statuses_are_retried_a_few_times() {
    for (count, want) in [(1, Status::Ok), (4, Status::Ok), (5, Status::Medium)] {
        let mut rig = Setup::new(512, &format!("status=82:op=write,count={count}")).open().unwrap();
        let tag = one(&mut rig, Op::Write);
        let began = rig.world.now.get();
        rig.drain();
        assert_eq!(rig.answer(tag).status, want, "{count}");
        assert_eq!(rig.queue.stats().retries, count.min(4));
        let took = rig.world.now.get() - began;
        assert!(took >= count.min(4) * 10 * MS, "not without a pause: {took}");
    }
    // Others are not.
    let mut rig = Setup::new(512, "status=281:op=write,count=1").open().unwrap();
    let tag = one(&mut rig, Op::Write);
    rig.drain();
    assert_eq!((rig.answer(tag).status, rig.queue.stats().retries), (Status::Medium, 0));
}

#[test]
fn without_a_clock_retries_are_immediate_and_nothing_hangs() {
    let mut rig = Setup::new(512, "status=82:op=write,count=3").open().unwrap();
    let tag = one(&mut rig, Op::Write);
    let mut out = block::Completions::new();
    for _ in 0..20 {
        rig.queue.poll(&mut out);
        rig.world.turn();
    }
    assert_eq!((out.len(), out.get(0).tag, out.get(0).status), (1, tag, Status::Ok));
    assert_eq!(rig.queue.stats().retries, 3);
}

#[test]
fn retries_of_bounced_and_listed_data_send_the_same_bytes() {
    let mut rig = Setup::new(512, "status=82:op=io,every=2").open().unwrap();
    let bytes = pattern(8, 1 << 20);
    rig.data.write(0, &bytes);
    let bounced = [rig.seg(512, 1024), rig.seg(8192, 512)];
    let listed = [rig.seg(512, 64 << 10)];
    let a = rig.send(Op::Write, Flags::NONE, 0, 0, &bounced);
    let b = rig.send(Op::Write, Flags::NONE, 0, 1 << 20, &listed);
    rig.drain();
    assert_eq!((rig.answer(a).status, rig.answer(b).status), (Status::Ok, Status::Ok));
    let got = rig.peek(1, 0, 1536);
    assert!(got[..1024] == bytes[512..1536] && got[1024..] == bytes[8192..8704]);
    assert!(rig.peek(1, 1 << 20, 64 << 10) == bytes[512..512 + (64 << 10)]);
}

#[test]
fn a_slow_command_is_aborted_and_that_is_all() {
    let mut setup = Setup::new(512, "delay=1000000:op=read,count=1");
    setup.options.command_timeout = 2 * SECOND;
    let mut rig = setup.open().unwrap();
    rig.world.tick.set(MS);
    let slow = one(&mut rig, Op::Read);
    let began = rig.world.now.get();
    // Others go on meanwhile.
    for _ in 0..1500 {
        if rig.queue.room() > 0 {
            one(&mut rig, Op::Write);
        }
        rig.turn();
    }
    assert!(rig.done.iter().all(|c| c.tag != slow && c.status == Status::Ok));
    rig.drain();
    let c = rig.answer(slow);
    assert_eq!((c.status, c.detail & 0x7ff), (Status::Timeout, 7), "as the abort has it end");
    let took = (rig.world.now.get() - began) / MS;
    assert!((2000..2020).contains(&took), "{took} ms");
    // Nor does the controller lose patience later over a command that has ended.
    pass(&mut rig, 10 * SECOND);
    assert_eq!((rig.device().resets, rig.controller.state()), (0, State::Ready));
}

#[test]
fn several_slow_commands_are_aborted_one_after_the_other() {
    let mut setup = Setup::new(512, "delay=1000000:op=read,count=3");
    setup.options.command_timeout = 2 * SECOND;
    let mut rig = setup.open().unwrap();
    rig.world.tick.set(MS);
    let tags: Vec<_> = (0..3).map(|_| one(&mut rig, Op::Read)).collect();
    rig.drain();
    for tag in tags {
        assert_eq!(rig.answer(tag).status, Status::Timeout);
    }
    assert!(rig.world.now.get() < 3 * SECOND);
    pass(&mut rig, 10 * SECOND);
    assert_eq!(rig.device().resets, 0);
}

#[test]
fn a_late_command_that_completes_after_all_is_good() {
    let mut setup = Setup::new(512, "delay=1500:op=read,count=1;lost:op=abort");
    setup.options.command_timeout = SECOND;
    let mut rig = setup.open().unwrap();
    rig.world.tick.set(MS);
    let slow = one(&mut rig, Op::Read);
    rig.drain();
    assert_eq!(rig.answer(slow).status, Status::Ok);
    assert_eq!(rig.device().resets, 0);
}

#[test]
fn deadlines_are_those_of_the_queues_present_owner() {
    let mut setup = Setup::new(512, "lost:op=read,count=1");
    setup.options.command_timeout = 2 * SECOND;
    let mut rig = setup.open().unwrap();
    rig.world.tick.set(MS);
    // Whoever had the queue before had a clock that was far ahead.
    rig.queue.set_now(5000 * SECOND);
    rig.queue.set_now(0);
    let lost = one(&mut rig, Op::Read);
    rig.turn_until(5 * SECOND, |r| r.queue.in_flight() == 0);
    rig.poll();
    assert_eq!(rig.answer(lost).status, Status::Timeout);
}

#[test]
fn a_lost_command_leads_to_a_reset_and_the_others_are_sent_again() {
    let mut setup = Setup::new(512, "lost:op=read,count=1;lost:op=write,lba=800-900,count=3");
    setup.options.command_timeout = 2 * SECOND;
    let mut rig = setup.open().unwrap();
    rig.world.tick.set(MS);
    let lost = one(&mut rig, Op::Read);
    rig.turn();
    pass(&mut rig, 1500 * MS);
    // Three that are lost too, but not overdue yet when the first is; and a long one.
    let bytes = pattern(77, 4 << 20);
    rig.data.write(0, &bytes);
    let began = rig.world.now.get();
    pass(&mut rig, 2 * SECOND);
    let mut later = Vec::new();
    for i in 0..3 {
        let seg = [rig.seg(i * 4096, 4096)];
        later.push(rig.send(Op::Write, Flags::NONE, 0, (800 + i * 8) * 512, &seg));
    }
    let tail = [rig.seg(1 << 20, 1 << 20)];
    let long = rig.send(Op::Write, Flags::NONE, 0, 8 << 20, &tail);
    assert!(rig.done.is_empty(), "nothing is answered before the reset");
    rig.drain();
    let took = (rig.world.now.get() - began) / MS;
    assert!((2500..3000).contains(&took), "{took} ms");
    assert_eq!(rig.answer(lost).status, Status::Timeout);
    for (i, tag) in later.into_iter().enumerate() {
        assert_eq!(rig.answer(tag).status, Status::Ok, "{i}");
        assert!(rig.peek(1, (800 + i as u64 * 8) * 512, 4096) == bytes[i * 4096..(i + 1) * 4096]);
    }
    assert_eq!(rig.answer(long).status, Status::Ok);
    assert!(rig.peek(1, 8 << 20, 1 << 20) == bytes[1 << 20..2 << 20]);
    assert_eq!(rig.device().resets, 1);
    assert!(rig.queue.stats().resent >= 3);
    assert_eq!(rig.controller.error(), Some(&Error::Lost { qid: 1 }));
    assert_eq!((rig.queue.stats().stale_cids, rig.device().dma_faults), (0, 0));
}

#[test]
fn the_answer_comes_only_after_the_reset_is_confirmed() {
    let mut setup = Setup::new(512, "lost:op=read");
    setup.options.command_timeout = SECOND;
    let mut rig = setup.open().unwrap();
    rig.world.tick.set(MS);
    let lost = one(&mut rig, Op::Read);
    rig.turn();
    let mut disabled_at = None;
    while rig.done.is_empty() {
        rig.turn();
        if disabled_at.is_none() && Cc(rig.world.regs().read32(offset::CC)).en() == 0 {
            disabled_at = Some(rig.world.now.get());
            // The device takes its time.
            rig.world.csts.set(Some(1));
        }
        if disabled_at.is_some_and(|t| rig.world.now.get() - t > 1000 * MS) {
            rig.world.csts.set(None);
        } else {
            assert!(rig.done.is_empty(), "answered under DMA");
        }
        assert!(rig.world.now.get() < 60 * SECOND);
    }
    assert_eq!(rig.answer(lost).status, Status::Timeout);
}

#[test]
fn a_device_that_ignores_reset_is_stopped_by_the_next_rung() {
    // (function reset, bus master off) → what the requests get, whether the device serves again.
    let cases = [
        (Hook::Works, Hook::Unsupported, 0, true),
        (Hook::Unsupported, Hook::Works, 0, false),
        (Hook::Lies, Hook::Works, 0, false),
        (Hook::Fails, Hook::Fails, QUARANTINED, false),
        (Hook::Unsupported, Hook::Unsupported, QUARANTINED, false),
    ];
    for (function_reset, bus_master_off, detail, serves) in cases {
        let mut setup = Setup::new(512, "lost:op=read;noreset");
        setup.options.command_timeout = SECOND;
        let mut rig = setup.open().unwrap();
        rig.world.function_reset.set(function_reset);
        rig.world.bus_master_off.set(bus_master_off);
        rig.world.tick.set(MS);
        let lost = one(&mut rig, Op::Read);
        rig.turn();
        let kept = nvme::quarantined();
        rig.drain();
        let c = rig.answer(lost);
        assert_eq!((c.status, c.detail), (Status::Timeout, detail), "{function_reset:?}");
        if serves {
            let tag = one(&mut rig, Op::Write);
            rig.drain();
            assert_eq!(rig.answer(tag).status, Status::Ok);
            assert_eq!(rig.controller.state(), State::Ready);
            continue;
        }
        assert_eq!(rig.controller.state(), State::Failed);
        assert!(!rig.queue.is_running());
        // New requests are answered, and their buffers were never out.
        let tag = one(&mut rig, Op::Write);
        rig.poll();
        assert_eq!((rig.answer(tag).status, rig.answer(tag).detail), (Status::Gone, 0));
        // Memory is let go of, or kept: as the case may be.
        let Rig { memory, controller, queue, data, .. } = rig;
        let id = data.id();
        drop((controller, queue, data));
        if detail == 0 {
            assert_eq!(memory.mapped_pages(), 0, "{function_reset:?} {bus_master_off:?}");
        } else {
            assert!(nvme::quarantined() > kept);
            assert!(memory.mapped_pages() >= 1024, "the data too");
            // Its id is not free for others as long as the memory is kept.
            let other = dma::Region::new(4096, dma::PageSize::Small).unwrap();
            assert_ne!(other.id(), id);
        }
    }
}

#[test]
fn fatal_status_in_flight() {
    let mut rig = Setup::new(512, "cfs:op=write,nth=20").open().unwrap();
    let mut tags = Vec::new();
    for _ in 0..40 {
        tags.push(one(&mut rig, Op::Write));
    }
    rig.drain();
    for tag in tags {
        assert_eq!(rig.answer(tag).status, Status::Ok, "sent again after the reset");
    }
    assert_eq!((rig.device().resets, rig.controller.error()), (1, Some(&Error::Fatal)));
}

#[test]
fn a_device_that_fails_again_and_again_is_given_up() {
    let faults = "cfs:op=write,count=1000";
    let mut rig = Setup::new(512, faults).open().unwrap();
    rig.world.tick.set(MS);
    let tag = one(&mut rig, Op::Write);
    rig.drain();
    // The request itself is given up before the device is.
    assert_eq!(rig.answer(tag).status, Status::Timeout);
    while rig.controller.state() != State::Failed {
        if rig.queue.room() > 0 {
            one(&mut rig, Op::Write);
        }
        rig.turn();
        assert!(rig.world.now.get() < 100 * SECOND);
    }
    assert!(matches!(rig.controller.error(), Some(Error::TooManyResets { resets: 5, .. })));
    rig.drain();
}

#[test]
fn all_ones_in_flight_and_back_again() {
    for (bus_master_off, detail) in [(Hook::Works, 0), (Hook::Fails, QUARANTINED)] {
        let mut rig = Setup::new(512, "lost:op=read,count=1").open().unwrap();
        rig.world.bus_master_off.set(bus_master_off);
        let bytes = pattern(5, 4096);
        rig.data.write(0, &bytes);
        let before = one(&mut rig, Op::Write);
        rig.drain();
        let flying = one(&mut rig, Op::Read);
        rig.turn();
        rig.world.all_ones.set(true);
        rig.drain();
        assert_eq!(rig.answer(before).status, Status::Ok);
        assert_eq!((rig.answer(flying).status, rig.answer(flying).detail), (Status::Gone, detail));
        assert_eq!(
            (rig.controller.state(), rig.controller.error()),
            (State::Failed, Some(&Error::Gone))
        );
        // It comes back, is taken up again, and the same queue pair serves.
        rig.world.all_ones.set(false);
        rig.controller.restart();
        rig.turn_until(SECOND * 5, |r| r.queue.is_running());
        let tag = one(&mut rig, Op::Read);
        rig.drain();
        assert_eq!(rig.answer(tag).status, Status::Ok);
    }
}

#[test]
fn a_device_pulled_for_good() {
    let mut rig = Setup::new(512, "gone:op=read,nth=3").open().unwrap();
    rig.world.bus_master_off.set(Hook::Works);
    let tags: Vec<_> = (0..6).map(|_| one(&mut rig, Op::Read)).collect();
    rig.drain();
    for (i, tag) in tags.into_iter().enumerate() {
        let want = if i < 2 { Status::Ok } else { Status::Gone };
        assert_eq!(rig.answer(tag).status, want, "{i}");
    }
    rig.controller.restart();
    rig.turn_until(SECOND * 5, |r| r.controller.state() == State::Failed);
    rig.poll();
    let tag = one(&mut rig, Op::Write);
    rig.drain();
    assert_eq!(rig.answer(tag).status, Status::Gone);
}

#[test]
fn another_device_in_its_place_is_not_taken_up() {
    let mut rig = Setup::new(512, "").open().unwrap();
    rig.world.bus_master_off.set(Hook::Works);
    rig.world.all_ones.set(true);
    rig.turn_until(SECOND * 5, |r| r.controller.state() == State::Failed);
    rig.world.all_ones.set(false);
    // Another serial number.
    let model =
        nvme_model::Options { serial: "ANOTHER".to_owned(), ..nvme_model::Options::default() };
    let other = Model::new(model, vec![disk(1000, 512)], rig.memory.clone()).unwrap();
    rig.world.swap(other);
    rig.controller.restart();
    rig.turn_until(SECOND * 5, |r| r.controller.state() == State::Failed);
    assert!(matches!(rig.controller.error(), Some(Error::Changed(_))), "{:?}", rig.controller);
}

#[test]
fn a_reset_that_succeeds_but_the_device_does_not_come_back() {
    for (function_reset, serves) in [(Hook::Works, true), (Hook::Unsupported, false)] {
        // The second enable never gets ready; the third, after a function reset, would.
        let mut setup = Setup::new(512, "lost:op=read,count=1;stuck:nth=2,count=1");
        setup.options.command_timeout = SECOND;
        let mut rig = setup.open().unwrap();
        rig.world.function_reset.set(function_reset);
        rig.world.bus_master_off.set(Hook::Works);
        rig.world.tick.set(MS);
        let lost = one(&mut rig, Op::Read);
        rig.turn();
        rig.drain();
        assert_eq!(rig.answer(lost).status, Status::Timeout);
        assert_eq!(rig.controller.state() == State::Ready, serves);
        assert_eq!(rig.world.count(FUNCTION_RESET), 1);
    }
}

#[test]
fn an_admin_command_that_is_lost_resets_too() {
    // The first Get Log Page is the health log, read right after the controller is ready.
    let mut rig = Setup::new(512, "lost:op=log,count=1").open().unwrap();
    rig.world.tick.set(MS);
    pass(&mut rig, 20 * SECOND);
    assert_eq!(rig.device().resets, 1);
    assert_eq!(rig.controller.error(), Some(&Error::NoAnswer { what: "Get Log Page", ms: 15_000 }));
    assert_eq!(rig.controller.state(), State::Ready);
    let tag = one(&mut rig, Op::Write);
    rig.drain();
    assert_eq!(rig.answer(tag).status, Status::Ok);
}

#[test]
fn a_namespace_that_grows_shrinks_and_goes() {
    let mut setup = Setup::new(512, "");
    setup.namespaces.push(disk(1000, 4096));
    let mut rig = setup.open().unwrap();
    pass(&mut rig, 50 * MS);
    let size = |r: &Rig, unit| r.queue.info(unit).unwrap().size;
    for blocks in [200_000, 100] {
        assert!(rig.world.model.borrow_mut().resize_namespace(1, blocks));
        rig.turn_until(SECOND, |r| size(r, 0) == blocks * 512);
        assert_eq!(rig.controller.namespaces()[0].info.size, blocks * 512);
    }
    let seg = [rig.seg(0, 4096)];
    assert_eq!(rig.run(Op::Read, Flags::NONE, 0, 100 * 512, &seg), Status::Invalid);
    assert_eq!(rig.run(Op::Read, Flags::NONE, 0, 92 * 512, &seg), Status::Ok);
    assert!(rig.world.model.borrow_mut().remove_namespace(1));
    rig.turn_until(SECOND, |r| size(r, 0) == 0);
    for op in [Op::Read, Op::Write] {
        assert_eq!(rig.run(op, Flags::NONE, 0, 0, &seg), Status::Gone);
    }
    assert_eq!(rig.run(Op::Write, Flags::NONE, 1, 0, &seg), Status::Ok, "the other stays");
    assert!(rig.controller.events().namespace >= 3);
}

#[test]
fn media_that_turns_read_only() {
    let mut rig = Setup::new(512, "warn=8:op=write,nth=2").open().unwrap();
    pass(&mut rig, 50 * MS);
    assert_eq!(rig.controller.smart().unwrap().critical_warning, 0);
    one(&mut rig, Op::Write);
    one(&mut rig, Op::Write);
    rig.drain();
    rig.turn_until(SECOND, |r| r.queue.info(0).unwrap().read_only);
    assert_eq!(rig.controller.events().smart, 1);
    let tag = one(&mut rig, Op::Write);
    rig.drain();
    assert_eq!(rig.answer(tag).status, Status::ReadOnly);
}

#[test]
fn event_requests_are_kept_out_after_events_and_resets() {
    let mut rig = Setup::new(512, "cfs:op=write,count=1").open().unwrap();
    for i in 0..20u64 {
        pass(&mut rig, 20 * MS);
        assert!(rig.world.model.borrow_mut().resize_namespace(1, 1000 + i));
        if i == 10 {
            one(&mut rig, Op::Write);
        }
        rig.turn_until(SECOND, |r| r.queue.info(0).unwrap().size == (1000 + i) * 512);
    }
    assert_eq!(rig.device().resets, 1);
}

#[test]
fn a_controller_without_events_is_fine() {
    // After five commands of bring-up come the event requests; they are refused.
    let mut rig = Setup::new(512, "status=105:op=any,nth=6,count=4").open().unwrap();
    pass(&mut rig, 500 * MS);
    assert_eq!(rig.device().errors, 4, "asked no more");
    assert!(rig.world.model.borrow_mut().resize_namespace(1, 1000));
    let tag = one(&mut rig, Op::Write);
    rig.drain();
    assert_eq!(rig.answer(tag).status, Status::Ok);
}

#[test]
fn two_queue_pairs_recover_together() {
    let mut setup = Setup::new(512, "cfs:op=write,nth=30");
    setup.options.command_timeout = SECOND;
    let mut rig = setup.open().unwrap();
    let mut clock = rig.clock();
    let mut second = rig.controller.create_queue_pair(&mut clock).unwrap();
    second.register(&rig.data.clone()).unwrap();
    let mut out = block::Completions::new();
    let mut ended = 0;
    for i in 0..100u32 {
        if rig.queue.room() > 0 {
            one(&mut rig, Op::Write);
        }
        if second.room() > 0 {
            let segs = [rig.seg(0, 4096)];
            let (flags, unit, offset, len) = (Flags::NONE, 0, 1 << 20, 4096);
            let tag = block::Tag::new(2, 2, i);
            let r = block::Request { tag, op: Op::Write, flags, unit, offset, len, segs: &segs };
            second.submit(&r).unwrap();
        }
        rig.turn();
        second.set_now(rig.world.now.get());
        out.clear();
        second.poll(&mut out);
        ended += out.iter().filter(|c| c.status == Status::Ok).count();
    }
    while second.in_flight() > 0 || rig.queue.in_flight() > 0 {
        rig.turn();
        out.clear();
        second.poll(&mut out);
        ended += out.iter().filter(|c| c.status == Status::Ok).count();
        assert!(rig.world.now.get() < 60 * SECOND);
    }
    assert!(rig.done.iter().all(|c| c.status == Status::Ok));
    assert!(ended > 20, "{ended}");
    assert_eq!(rig.device().resets, 1);
}

#[test]
fn a_reactor_that_sleeps_does_not_hold_up_the_others() {
    let mut rig = Setup::new(512, "cfs:op=write,nth=3").open().unwrap();
    let mut clock = rig.clock();
    // This one is never polled until everything is over.
    let mut sleeper = rig.controller.create_queue_pair(&mut clock).unwrap();
    sleeper.register(&rig.data.clone()).unwrap();
    let tags: Vec<_> = (0..5).map(|_| one(&mut rig, Op::Write)).collect();
    rig.drain();
    for tag in tags {
        assert_eq!(rig.answer(tag).status, Status::Ok);
    }
    assert_eq!(sleeper.arm(), block::HasWork::Yes, "it has an order to obey");
    let mut out = block::Completions::new();
    sleeper.poll(&mut out);
    assert!(!sleeper.is_running() && sleeper.room() == 0);
    for _ in 0..50 {
        rig.turn();
        sleeper.poll(&mut out);
    }
    assert!(sleeper.is_running() && sleeper.room() > 0);
}
