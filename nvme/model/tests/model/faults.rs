//! Each action of the fault list, as the host sees it.

use nvme_spec::{AsyncEventConfig, Cns, SetFeatures, Sqe, StatusCode, offset};

use crate::host::*;

fn read(cid: u16, lba: u64) -> Sqe {
    Sqe::read(cid, 1, lba, 0, 0).with_prps(bus(DATA), 0)
}

#[test]
fn status_by_range() {
    let mut host = Host::faulty("status=281:op=read,lba=100-103;status=280:op=write,lba=7,count=1");
    host.region.write(DATA, &[0xaa; 512]);
    for lba in [100, 103] {
        let cqe = host.run(1, read(1, lba));
        assert_eq!(cqe.status().code(), StatusCode::UNRECOVERED_READ);
        assert!(!cqe.status().do_not_retry());
    }
    assert_eq!(host.data(DATA, 512), [0xaa; 512], "no data moved");
    host.ok(1, read(1, 99));
    host.ok(1, read(1, 104));
    assert_eq!(host.write_blocks(0, 8, 5, 0).code(), StatusCode::WRITE_FAULT);
    assert_eq!(host.read_values(0, 8), [0; 8]);
    assert!(host.write_blocks(0, 8, 5, 0).is_success());
    assert_eq!(host.read_values(0, 8), [5; 8]);
    let stats = host.ctl.stats().snapshot();
    assert_eq!((stats.injected, stats.errors), (3, 3));
}

#[test]
fn lost_before_and_after() {
    let mut host = Host::faulty("lost:op=write,nth=1,count=1;lost=done:op=write,nth=2,count=1");
    for (cid, value) in [(1, 0x10), (2, 0x20)] {
        host.region.write(DATA, &[value; 512]);
        let sqe = Sqe::write(cid, 1, cid.into(), 0, 0).with_prps(bus(DATA), 0);
        host.submit(1, &sqe);
        host.ring_tail(1);
        assert!(host.wait(1).is_none());
    }
    assert_eq!(host.read_values(1, 2), [0, 0x20]);
    // The identifier may be used again: the device has forgotten it.
    host.ok(1, read(1, 0));
}

#[test]
fn delays_by_steps_and_by_time() {
    let mut host = Host::faulty("delay=5:op=flush;delay=20us:op=read");
    assert!(host.ctl.wants_time());
    host.submit(1, &Sqe::flush(1, 1));
    host.submit(1, &read(2, 0));
    host.submit(1, &Sqe::write_zeroes(3, 1, 0, 0, 0));
    host.ring_tail(1);
    host.now = 1_000;
    host.step();
    assert_eq!(host.reap(1).unwrap().cid.get(), 3);
    for _ in 0..4 {
        assert!(host.reap(1).is_none());
        host.step();
    }
    assert!(host.reap(1).is_none());
    host.step();
    assert_eq!(host.reap(1).unwrap().cid.get(), 1);
    host.now = 20_999;
    assert!(!host.step());
    assert!(host.reap(1).is_none());
    host.now = 21_000;
    assert!(host.step());
    assert_eq!(host.reap(1).unwrap().cid.get(), 2);
}

#[test]
fn a_delayed_command_takes_its_data_when_it_is_carried_out() {
    let mut host = Host::faulty("delay=2:op=write");
    host.region.write(DATA, &[1; 512]);
    host.submit(1, &Sqe::write(1, 1, 0, 0, 0).with_prps(bus(DATA), 0));
    host.ring_tail(1);
    host.step();
    host.region.write(DATA, &[2; 512]);
    host.wait(1).unwrap();
    assert_eq!(host.read_values(0, 1), [2]);
}

#[test]
fn identifiers_in_use_conflict() {
    let mut host = Host::faulty("delay=10:op=flush");
    host.submit(1, &Sqe::flush(1, 1));
    host.submit(1, &read(1, 0));
    host.ring_tail(1);
    assert_eq!(host.wait(1).unwrap().status().code(), StatusCode::CID_CONFLICT);
    assert_ok(&host.wait(1).unwrap());
}

#[test]
fn completions_that_should_not_be() {
    let mut host = Host::faulty("dup:nth=1,count=1;badcid=999:nth=2,count=1;badsqid=3:nth=3");
    for cid in [1, 2, 3] {
        host.submit(1, &read(cid, 0));
    }
    host.ring_tail(1);
    host.step();
    let mut seen = Vec::new();
    while let Some(cqe) = host.reap(1) {
        seen.push((cqe.cid.get(), cqe.sq_id.get()));
    }
    assert_eq!(seen, [(1, 1), (1, 1), (999, 1), (2, 1), (3, 3)]);
}

#[test]
fn extra_completions_wait_for_room() {
    let mut host = Host::faulty("dup:op=io");
    host.create_pair(2, 2);
    host.submit(2, &Sqe::flush(5, 1));
    host.ring_tail(2);
    host.step();
    host.step();
    assert_eq!(host.peek(2).unwrap().cid.get(), 5);
    assert!(host.peek(2).is_none());
    host.ring_head(2);
    host.step();
    assert_eq!(host.reap(2).unwrap().cid.get(), 5);
    assert!(host.wait(2).is_none());
}

#[test]
fn fatal_after_some_commands() {
    let mut host = Host::faulty("cfs:nth=3");
    host.ok(1, read(1, 0));
    host.ok(1, read(2, 0));
    host.submit(1, &read(3, 0));
    host.ring_tail(1);
    assert!(host.wait(1).is_none());
    assert_eq!((host.csts().cfs(), host.csts().rdy()), (1, 1));
    host.disable();
    host.enable(8);
    host.create_pair(1, 8);
    host.ok(1, read(3, 0));
}

#[test]
fn surprise_removal() {
    let mut host = Host::faulty("gone:nth=3;delay=2:nth=2,count=1");
    host.ok(1, read(1, 0));
    host.region.write(DATA, &[0xaa; 512]);
    host.submit(1, &read(2, 0));
    host.submit(1, &read(3, 0));
    host.ring_tail(1);
    assert!(host.wait(1).is_none());
    for register in [offset::CAP, offset::CSTS, offset::CC, offset::DOORBELLS] {
        assert_eq!(host.regs.read64(register), u64::MAX);
    }
    // No DMA after it, and nothing brings it back.
    assert_eq!(host.data(DATA, 512), [0xaa; 512]);
    host.disable();
    host.set_cc(Host::cc());
    assert!(!host.step());
    assert_eq!(host.csts().0, u32::MAX);
    host.ctl.power_cut(1).unwrap();
    assert_eq!(host.csts().0, u32::MAX);
}

#[test]
fn resets_ignored() {
    let mut host = Host::faulty("delay=3:op=read;noreset:count=1");
    host.region.write(DATA, &[0xaa; 512]);
    host.submit(1, &read(1, 0));
    host.ring_tail(1);
    host.step();
    host.set_cc(nvme_spec::Cc(0));
    assert_eq!(host.csts().rdy(), 1, "the reset is ignored");
    // And DMA goes on: what a driver must fear.
    for _ in 0..5 {
        host.step();
    }
    assert_eq!(host.data(DATA, 512), [0; 512]);
    assert_eq!(host.reap(1).unwrap().cid.get(), 1);
    // The second attempt works, although CC already says 0.
    host.set_cc(nvme_spec::Cc(0));
    assert_eq!(host.csts().rdy(), 0);
}

#[test]
fn never_ready() {
    let options = nvme_model::Options {
        faults: "stuck:count=2".parse().unwrap(),
        ..nvme_model::Options::default()
    };
    let mut host = Host::cold(options, vec![]);
    for _ in 0..2 {
        assert!(!host.try_enable(8));
        for _ in 0..50 {
            host.step();
        }
        assert_eq!(host.csts().0, 0);
        host.disable();
    }
    host.enable(8);
}

#[test]
fn namespaces_change_by_fault() {
    let mut host = Host::faulty("resize=16:op=flush;remove:op=zeroes");
    let config = AsyncEventConfig(0).with_namespace(1);
    host.ok(0, Sqe::set_features(1, SetFeatures::AsyncEventConfig(config)));
    host.submit(0, &Sqe::async_event_request(50));
    host.ring_tail(0);
    host.ok(1, Sqe::flush(1, 1));
    assert_eq!(host.wait(0).unwrap().cid.get(), 50);
    assert_eq!(host.fails(1, read(1, 16)), StatusCode::LBA_OUT_OF_RANGE);
    host.ok(1, read(1, 15));
    // The removed namespace refuses the very command that removed it.
    let zeroes = Sqe::write_zeroes(1, 1, 0, 0, 0);
    assert_eq!(host.fails(1, zeroes), StatusCode::INVALID_FIELD);
}

#[test]
fn admin_commands_fail_too() {
    let options = nvme_model::Options {
        faults: "status=6:op=identify,count=1;lost:op=create,nth=2,count=1".parse().unwrap(),
        ..nvme_model::Options::default()
    };
    let mut host = Host::cold(options, vec![disk(64, 512)]);
    host.enable(8);
    let id = Sqe::identify(1, Cns::Controller, 0).with_prps(bus(DATA), 0);
    assert_eq!(host.fails(0, id), StatusCode::INTERNAL_ERROR);
    host.ok(0, id);
    host.ok(0, Sqe::create_io_cq(1, 1, 8, bus(cq_at(1)), None));
    host.submit(0, &Sqe::create_io_sq(2, 1, 8, bus(sq_at(1)), 1));
    host.ring_tail(0);
    assert!(host.wait(0).is_none());
}
