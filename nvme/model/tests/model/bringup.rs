//! Registers, enable, reset, shutdown.

use nvme_model::Options;
use nvme_spec::{Cap, Cc, Csts, Sqe, offset};

use crate::host::*;

#[test]
fn capabilities_follow_the_options() {
    let options =
        Options { entries: 256, dstrd: 2, mpsmax: 4, timeout_500ms: 9, ..Options::default() };
    let mut host = Host::cold(options, vec![]);
    let cap = Cap(host.regs.read64(offset::CAP));
    assert_eq!(cap.max_queue_entries(), 256);
    assert_eq!((cap.cqr(), cap.dstrd(), cap.css(), cap.mpsmin(), cap.mpsmax()), (1, 2, 1, 0, 4));
    assert_eq!(cap.timeout_ms(), 4500);
    assert_eq!(host.regs.read32(offset::VS), 0x0001_0400);
    assert_eq!(host.csts(), Csts(0));
    // Doorbells at a stride work as well.
    host.enable(4);
    for _ in 0..10 {
        host.ok(0, Sqe::identify(3, nvme_spec::Cns::Controller, 0).with_prps(bus(DATA), 0));
    }
}

#[test]
fn ready_follows_enable_only_when_stepped() {
    let mut host = Host::cold(Options::default(), vec![]);
    assert!(!host.step());
    host.regs.write32(offset::AQA, 0x000f_000f);
    host.regs.write64(offset::ASQ, bus(sq_at(0)));
    host.regs.write64(offset::ACQ, bus(cq_at(0)));
    host.regs.write32(offset::CC, Host::cc().0);
    assert_eq!(host.csts().rdy(), 0);
    assert!(host.step());
    assert_eq!(host.csts(), Csts(0).with_rdy(1));
    assert!(!host.step());
}

#[test]
fn bad_configurations_are_fatal_until_reset() {
    let bad = [Host::cc().with_mps(1), Host::cc().with_css(6), Host::cc().with_ams(1)];
    for cc in bad {
        let mut host = Host::simple();
        host.disable();
        host.set_cc(cc);
        assert_eq!((host.csts().rdy(), host.csts().cfs()), (0, 1), "{cc:?}");
        host.disable();
        assert_eq!(host.csts(), Csts(0));
        host.enable(8);
    }
    let mut host = Host::simple();
    host.disable();
    host.regs.write32(offset::AQA, 0x000f_0000);
    host.set_cc(Host::cc());
    assert_eq!(host.csts().cfs(), 1);
}

#[test]
fn admin_queues_at_unmapped_addresses_are_fatal() {
    for register in [offset::ASQ, offset::ACQ] {
        let mut host = Host::simple();
        host.disable();
        host.enable(8);
        host.disable();
        host.regs.write64(register, 0x1000);
        host.set_cc(Host::cc());
        assert_eq!(host.csts().rdy(), 1);
        host.regs.write32(offset::DOORBELLS, 1);
        host.step();
        assert_eq!(host.csts().cfs(), 1);
        assert_eq!(host.ctl.stats().snapshot().dma_faults, 1);
        assert_eq!(host.ctl.last_fault().unwrap().addr, 0x1000);
        host.disable();
        host.enable(8);
        host.ok(0, Sqe::identify(3, nvme_spec::Cns::Controller, 0).with_prps(bus(DATA), 0));
    }
}

#[test]
fn a_reset_drops_what_is_in_flight() {
    let mut host = Host::faulty("delay=5:op=write");
    host.region.write(DATA, &[0x77; 512]);
    for cid in 0..10 {
        host.submit(1, &Sqe::write(cid, 1, cid.into(), 0, 0).with_prps(bus(DATA), 0));
    }
    host.ring_tail(1);
    host.step();
    assert!(host.ctl.has_in_flight());
    host.disable();
    assert_eq!(host.csts(), Csts(0));
    assert!(!host.ctl.has_in_flight());
    // New rings in the same memory: nothing of the old life shows up.
    host.enable(16);
    host.create_pair(1, 64);
    for _ in 0..20 {
        host.step();
    }
    assert!(host.reap(1).is_none());
    assert_eq!(host.read_values(0, 10), [0; 10]);
    assert_eq!(host.ctl.stats().snapshot().resets, 1);
}

#[test]
fn a_reset_between_two_steps_is_seen() {
    let mut host = Host::simple();
    host.regs.write32(offset::CC, 0);
    host.regs.write32(offset::CC, Host::cc().0);
    host.step();
    assert_eq!(host.csts().rdy(), 1);
    assert_eq!(host.ctl.stats().snapshot().resets, 1);
    // The I/O queue is gone: its doorbell is stray.
    host.ring_tail(1);
    host.step();
    assert_eq!(host.ctl.stats().snapshot().bad_doorbells, 1);
}

#[test]
fn shutdown_flushes_and_stops() {
    let options = Options { vwc: true, ..Options::default() };
    let mut host = Host::new(options, vec![disk(2048, 512)]);
    assert!(host.write_blocks(3, 1, 0x55, 0).is_success());
    host.set_cc(Host::cc().with_shn(1));
    assert_eq!(host.csts(), Csts(0).with_rdy(1).with_shst(2));
    // Commands are not taken any more.
    host.submit(1, &Sqe::flush(1, 1));
    host.ring_tail(1);
    assert!(host.wait(1).is_none());
    host.ctl.power_cut(0).unwrap();
    assert_eq!(host.csts(), Csts(0));
    host.enable(16);
    host.create_pair(1, 64);
    assert_eq!(host.read_values(3, 1), [0x55]);
    // A reset brings it back after a shutdown, too.
    host.set_cc(Host::cc().with_shn(2));
    host.disable();
    assert_eq!(host.csts(), Csts(0));
    host.enable(16);
}

#[test]
fn shutdown_of_a_disabled_controller() {
    let mut host = Host::cold(Options::default(), vec![]);
    host.set_cc(Cc(0).with_shn(1));
    assert_eq!(host.csts().shst(), 2);
    host.enable(8);
    assert_eq!(host.csts(), Csts(0).with_rdy(1));
}

#[test]
fn larger_memory_pages() {
    let options = Options { mpsmax: 1, ..Options::default() };
    let mut host = Host::cold(options, vec![disk(2048, 512)]);
    host.enable(8);
    host.disable();
    host.set_cc(Host::cc().with_mps(1));
    assert_eq!(host.csts().rdy(), 1);
    host.pairs = vec![Pair { qid: 0, entries: 8, tail: 0, head: 0, phase: true }];
    host.region.zero(cq_at(0), 128);
    host.create_pair(1, 16);
    // 8 KiB from the middle of a page of 8 KiB: two entries.
    let data: Vec<u8> = (0..8192u32).map(|i| (i / 7) as u8).collect();
    host.region.write(DATA + 0x1000, &data);
    host.ok(1, Sqe::write(1, 1, 0, 15, 0).with_prps(bus(DATA + 0x1000), bus(DATA + 0x2000)));
    let unaligned = Sqe::read(1, 1, 0, 15, 0).with_prps(bus(DATA + 0x1000), bus(DATA + 0x3000));
    assert_eq!(host.fails(1, unaligned), nvme_spec::StatusCode::INVALID_PRP_OFFSET);
    host.ok(1, Sqe::read(1, 1, 0, 15, 0).with_prps(bus(DATA + 0x8000), 0));
    assert!(host.data(DATA + 0x8000, 8192) == data);
}
