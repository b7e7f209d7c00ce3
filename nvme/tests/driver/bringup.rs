//! Bring-up: every state that the registers may be found in, limits honoured, and every way in
//! which it may fail.

use std::rc::Rc;

use crate::common::*;
use block::{Flags, Op, Status};
use nvme::{Controller, Error, Options, State};
use nvme_model::Options as ModelOptions;
use nvme_spec::{Cap, Cc, Csts, StatusCode, offset};

const CC_LINUX: u32 = 0x0046_0001;

fn open(world: &Rc<World>, memory: &Memory, options: Options) -> Result<Rig, Error> {
    Rig::open(world.clone(), memory.clone(), options)
}

#[test]
fn a_fresh_controller() {
    let rig = Setup::new(512, "").open().unwrap();
    let c = &rig.controller;
    assert_eq!(c.state(), State::Ready);
    let info = c.info().unwrap();
    assert_eq!((info.serial.as_str(), info.max_command), ("PDMODEL0001", 128 << 10));
    assert_eq!(c.namespaces().len(), 1);
    assert_eq!(c.namespaces()[0].info.size, 64 << 20);
    assert_eq!(rig.queue.depth(), 63);
    let cc = Cc(rig.world.regs().read32(offset::CC));
    assert_eq!(cc.0, CC_LINUX);
    // Never enabled before the admin queue was told.
    let writes = rig.world.writes.borrow();
    let order: Vec<u64> = writes.iter().map(|w| w.0).collect();
    assert_eq!(order, [offset::AQA, offset::ASQ, offset::ACQ, offset::CC]);
}

#[test]
fn a_controller_that_somebody_left_enabled() {
    let (world, memory, options) = Setup::new(512, "").world();
    world.regs().write32(offset::AQA, 0x001f_001f);
    world.regs().write32(offset::CC, CC_LINUX);
    world.turn();
    assert_eq!(world.regs().read32(offset::CSTS), 1);
    let rig = open(&world, &memory, options).unwrap();
    assert_eq!(rig.device().resets, 1, "it was reset before anything else");
}

#[test]
fn a_controller_that_is_just_being_enabled_is_waited_for() {
    let (world, memory, options) = Setup::new(512, "").world();
    world.regs().write32(offset::AQA, 0x001f_001f);
    world.regs().write32(offset::CC, CC_LINUX);
    // EN is 1, RDY is not: EN must not be touched.
    let mapper = std::sync::Arc::new(memory);
    let mut c = Controller::new(TestBar(world.clone()), mapper, options).unwrap();
    for now in 0..100 {
        assert_eq!(c.step(now), State::Starting);
    }
    assert_eq!(world.count(offset::CC), 0);
    world.turn();
    c.step(200);
    assert_eq!(world.writes.borrow().last().unwrap().0, offset::CC);
    assert_eq!(Cc(world.regs().read32(offset::CC)).en(), 0);
    while c.step(world.now.get()) != State::Ready {
        world.turn();
        assert!(world.now.get() < SECOND);
    }
}

#[test]
fn a_controller_that_is_still_being_disabled_is_waited_for() {
    let (world, memory, options) = Setup::new(512, "").world();
    world.csts.set(Some(1));
    let mapper = std::sync::Arc::new(memory);
    let mut c = Controller::new(TestBar(world.clone()), mapper, options).unwrap();
    for now in 0..100 {
        assert_eq!(c.step(now), State::Starting);
    }
    assert!(world.writes.borrow().is_empty(), "neither enabled nor disabled");
    world.csts.set(None);
    while c.step(world.now.get()) != State::Ready {
        world.turn();
        assert!(world.now.get() < SECOND);
    }
}

#[test]
fn a_controller_in_fatal_state_or_shut_down_is_reset() {
    for found in [Csts(0).with_cfs(1), Csts(0).with_rdy(1).with_cfs(1), Csts(0).with_shst(2)] {
        let (world, memory, options) = Setup::new(512, "").world();
        world.regs().write32(offset::AQA, 0x001f_001f);
        world.regs().write32(offset::CC, CC_LINUX);
        world.turn();
        world.csts.set(Some(found.0));
        let mapper = std::sync::Arc::new(memory);
        let mut c = Controller::new(TestBar(world.clone()), mapper, options).unwrap();
        c.step(0);
        assert_eq!(Cc(world.regs().read32(offset::CC)).en(), 0, "{found:?}");
        world.turn();
        world.csts.set(None);
        while c.step(world.now.get()) != State::Ready {
            world.turn();
            assert!(world.now.get() < SECOND);
        }
    }
}

#[test]
fn a_real_shutdown_is_recovered_from() {
    let (world, memory, options) = Setup::new(512, "").world();
    let rig = open(&world, &memory, options).unwrap();
    let mut clock = rig.clock();
    let Rig { controller, mut queue, .. } = rig;
    // The reactor goes on while the controller is closed by its thread.
    let mut out = block::Completions::new();
    let mut c = controller;
    c.begin_close();
    while c.step(world.now.get()) != State::Closed {
        block::BlockQueue::poll(&mut queue, &mut out);
        nvme::Clock::pause(&mut clock);
        assert!(world.now.get() < SECOND, "{c:?}");
    }
    let csts = Csts(world.regs().read32(offset::CSTS));
    assert_eq!((csts.rdy(), Cc(world.regs().read32(offset::CC)).en()), (0, 0));
    drop((c, queue));
    assert_eq!(world.model.borrow().stats().snapshot().resets, 1);
    open(&world, &memory, options).unwrap();
}

#[test]
fn never_ready_ends_after_cap_to_and_not_before() {
    let mut setup = Setup::new(512, "stuck");
    setup.model.timeout_500ms = 6;
    let (world, memory, options) = setup.world();
    world.tick.set(MS);
    let error = open(&world, &memory, options).unwrap_err();
    assert_eq!(error, Error::NotReady { what: "ready", ms: 3000 });
    let took = world.now.get() / MS;
    assert!((3000..3010).contains(&took), "{took}");
    assert_eq!(Cc(world.regs().read32(offset::CC)).en(), 0, "left disabled");
}

#[test]
fn never_disabled_climbs_the_ladder_and_says_so() {
    for (function_reset, bus_master_off, hooks) in [
        (Hook::Works, Hook::Works, &[FUNCTION_RESET][..]),
        (Hook::Lies, Hook::Works, &[FUNCTION_RESET, BUS_MASTER_OFF]),
        (Hook::Unsupported, Hook::Fails, &[FUNCTION_RESET, BUS_MASTER_OFF]),
    ] {
        let (world, memory, options) = Setup::new(512, "").world();
        world.csts.set(Some(1));
        world.function_reset.set(function_reset);
        world.bus_master_off.set(bus_master_off);
        let error = open(&world, &memory, options).unwrap_err();
        assert_eq!(error, Error::NotReady { what: "disabled", ms: 2000 });
        let writes = world.writes.borrow();
        let seen: Vec<u64> = writes.iter().map(|w| w.0).filter(|&o| o > 1 << 32).collect();
        assert_eq!(seen, hooks);
    }
}

#[test]
fn fatal_while_being_enabled() {
    // AQA of a controller that does not take it: the model fails when CC.EN is set.
    let (world, memory, options) = Setup::new(512, "").world();
    let mapper = std::sync::Arc::new(memory);
    let mut c = Controller::new(TestBar(world.clone()), mapper, options).unwrap();
    c.step(0);
    c.step(1);
    world.csts.set(Some(Csts(0).with_cfs(1).0));
    c.step(2);
    world.csts.set(None);
    while c.step(world.now.get()) != State::Failed {
        world.turn();
        assert!(world.now.get() < SECOND);
    }
    assert_eq!(c.error(), Some(&Error::Fatal));
    assert_eq!(Cc(world.regs().read32(offset::CC)).en(), 0);
}

#[test]
fn gone_before_during_and_after() {
    let (world, memory, options) = Setup::new(512, "").world();
    world.all_ones.set(true);
    assert_eq!(open(&world, &memory, options).unwrap_err(), Error::Gone);
    for steps in 1..40 {
        world.all_ones.set(false);
        let mapper = std::sync::Arc::new(memory.clone());
        let mut c = Controller::new(TestBar(world.clone()), mapper, options).unwrap();
        for _ in 0..steps {
            c.step(world.now.get());
            world.turn();
        }
        world.all_ones.set(true);
        world.bus_master_off.set(Hook::Works);
        for _ in 0..2000 {
            c.step(world.now.get());
            world.turn();
        }
        assert_eq!((c.state(), c.error()), (State::Failed, Some(&Error::Gone)), "{steps}");
    }
}

#[test]
fn an_unanswered_admin_command_ends_bring_up() {
    for (op, what) in
        [("identify", "Identify (controller)"), ("features", "Set Features (number of queues)")]
    {
        let (world, memory, options) = Setup::new(512, &format!("lost:op={op}")).world();
        world.tick.set(MS);
        let error = open(&world, &memory, options).unwrap_err();
        assert_eq!(error, Error::NoAnswer { what, ms: 15_000 });
        assert_eq!(Cc(world.regs().read32(offset::CC)).en(), 0);
    }
}

#[test]
fn a_failed_admin_command_ends_bring_up_with_its_status() {
    let (world, memory, options) = Setup::new(512, "status=6:op=identify").world();
    let error = open(&world, &memory, options).unwrap_err();
    let Error::Command { what: "Identify (controller)", status } = error else { panic!("{error}") };
    assert_eq!(status.code(), StatusCode::INTERNAL_ERROR);
    let text = error_text(&world, &memory, options);
    assert!(text.contains("Internal Error"), "{text}");
}

fn error_text(world: &Rc<World>, memory: &Memory, options: Options) -> String {
    open(world, memory, options).unwrap_err().to_string()
}

#[test]
fn without_an_active_list_every_identifier_is_asked() {
    for code in ["1", "2"] {
        let mut setup = Setup::new(512, &format!("status={code}:op=identify,nth=2,count=1"));
        setup.namespaces = vec![disk(64, 512), disk(64, 4096), disk(128, 512)];
        let (world, memory, options) = setup.world();
        world.model.borrow_mut().remove_namespace(2);
        let rig = open(&world, &memory, options).unwrap();
        let ids: Vec<u32> = rig.controller.namespaces().iter().map(|n| n.nsid).collect();
        assert_eq!(ids, [1, 3]);
    }
    // Any other failure of the list is a failure.
    let setup = Setup::new(512, "status=6:op=identify,nth=2,count=1");
    assert!(matches!(setup.open().unwrap_err(), Error::Command { .. }));
}

#[test]
fn revisions_without_an_active_list_and_with_further_limits() {
    let mut sent = Vec::new();
    for vs in [0x1_0000, 0x1_0100, 0x2_0000] {
        let mut setup = Setup::new(512, "");
        setup.namespaces.push(disk(64, 4096));
        let (world, memory, options) = setup.world();
        world.vs.set(Some(vs));
        let rig = open(&world, &memory, options).unwrap();
        let ids: Vec<u32> = rig.controller.namespaces().iter().map(|n| n.nsid).collect();
        assert_eq!(ids, [1, 2]);
        assert_eq!(rig.controller.info().unwrap().version.0, vs);
        sent.push(rig.device().admin);
    }
    // 1.1 has the list, 2.0 the limits of the command set: one command more each.
    assert_eq!((sent[1] - sent[0], sent[2] - sent[1]), (1, 1));
}

#[test]
fn a_search_for_namespaces_ends_where_there_are_none() {
    for vs in [0x1_0000, 0x1_0100] {
        let mut setup = Setup::new(512, "");
        setup.namespaces.clear();
        let (world, memory, options) = setup.world();
        world.vs.set(Some(vs));
        let bar = TestBar(world.clone());
        let mapper = std::sync::Arc::new(memory.clone());
        let mut controller = Controller::new(bar, mapper, options).unwrap();
        for _ in 0..1000 {
            world.turn();
            controller.step(world.now.get());
        }
        assert_eq!(controller.state(), State::Ready, "{vs:#x}");
        assert!(controller.namespaces().is_empty());
    }
}

#[test]
fn a_namespace_that_cannot_be_identified_is_refused_and_the_others_serve() {
    let mut setup = Setup::new(512, "status=281:op=identify,nth=4,count=1");
    setup.namespaces = vec![disk(64, 512), disk(64, 4096), disk(128, 512)];
    let rig = setup.open().unwrap();
    let ids: Vec<u32> = rig.controller.namespaces().iter().map(|n| n.nsid).collect();
    assert_eq!(ids, [1, 3]);
    assert_eq!(rig.controller.refused()[0].nsid, 2);
    assert!(rig.controller.refused()[0].why.contains("Unrecovered Read Error"));
}

#[test]
fn limits_of_the_registers_are_honoured() {
    for (entries, dstrd, asked, depth) in
        [(2, 0, 64, 1), (3, 1, 64, 1), (100, 4, 1024, 63), (1024, 10, 1024, 1023), (64, 2, 5, 3)]
    {
        let mut setup = Setup::new(512, "");
        setup.model = ModelOptions { entries, dstrd, ..ModelOptions::default() };
        setup.options.queue_entries = asked;
        let mut rig = setup.open().unwrap();
        assert_eq!(rig.queue.depth(), depth);
        let segs = [rig.seg(0, 4096)];
        for i in 0..5 {
            let status = rig.run(block::Op::Write, block::Flags::NONE, 0, i * 4096, &segs);
            assert_eq!(status, block::Status::Ok);
        }
    }
}

#[test]
fn queue_counts_are_negotiated() {
    for (has, asks, gets) in [(1, 16, 1), (3, 16, 3), (16, 2, 2), (4, 0, 1)] {
        let mut setup = Setup::new(512, "");
        setup.model.queues = has;
        setup.options.io_queues = asks;
        let mut rig = setup.open().unwrap();
        assert_eq!(rig.controller.max_queue_pairs(), gets);
        let mut clock = rig.clock();
        let mut more = Vec::new();
        for _ in 1..gets {
            more.push(rig.controller.create_queue_pair(&mut clock).unwrap());
        }
        let error = rig.controller.create_queue_pair(&mut clock).unwrap_err();
        assert_eq!(error, Error::NoQueue(gets));
        // A queue pair that is dropped makes place for another.
        if let Some(one) = more.pop() {
            drop(one);
            rig.turn_until(SECOND, |r| r.device().admin > 0 && r.world.now.get() > 500 * MS);
            rig.controller.create_queue_pair(&mut clock).unwrap();
        }
    }
}

#[test]
fn a_refused_queue_is_an_error_and_leaves_nothing_behind() {
    // The second creation of each pair fails: the submission queue.
    for nth in [3, 4] {
        let faults = format!("status=102:op=create,nth={nth},count=1");
        let mut rig = Setup::new(512, &faults).open().unwrap();
        let mut clock = rig.clock();
        let pages = rig.memory.mapped_pages();
        let error = rig.controller.create_queue_pair(&mut clock).unwrap_err();
        let Error::Command { status, .. } = error else { panic!("{error}") };
        assert_eq!(status.code(), StatusCode::INVALID_QUEUE_SIZE);
        let soon = rig.world.now.get() + 100 * MS;
        rig.turn_until(SECOND, |r| r.world.now.get() > soon);
        assert_eq!(rig.memory.mapped_pages(), pages, "its memory is free again");
        rig.controller.create_queue_pair(&mut clock).unwrap();
    }
}

#[test]
fn a_creation_that_is_lost_comes_after_the_reset_or_ends_in_an_error() {
    for lost in ["lost:op=create,count=1", "lost:op=create,nth=2,count=1"] {
        let mut rig = Setup::new(512, lost).open().unwrap();
        assert_eq!(rig.device().resets, 1, "{lost}");
        let data = [rig.seg(0, 4096)];
        assert_eq!(rig.run(Op::Write, Flags::NONE, 0, 0, &data), Status::Ok, "{lost}");
    }
    let error = Setup::new(512, "lost:op=create").open().unwrap_err();
    assert!(matches!(error, Error::TooManyResets { .. }), "{error}");
}

#[test]
fn controllers_that_cannot_be_driven() {
    let cap = |f: fn(Cap) -> Cap| {
        let (world, memory, options) = Setup::new(512, "").world();
        world.cap.set(Some(f(Cap(world.regs().read64(offset::CAP))).0));
        error_text(&world, &memory, options)
    };
    assert!(cap(|c| c.with_css(0x80)).contains("no NVM command set"));
    assert!(cap(|c| c.with_mqes(0)).contains("MQES"));
    assert!(cap(|c| c.with_dstrd(15)).contains("doorbells"));
    assert!(cap(|c| c.with_mpsmin(15).with_mpsmax(15)).contains("pages of 131072 KiB"));
}

#[test]
fn large_pages_only_work_where_memory_is_contiguous() {
    // A controller whose smallest page is 16 KiB. The model has none; that CC.MPS is set is seen.
    let (world, memory, options) = Setup::new(512, "").world();
    world.cap.set(Some(Cap(world.regs().read64(offset::CAP)).with_mpsmin(2).with_mpsmax(2).0));
    world.csts.set(Some(0));
    let mapper = std::sync::Arc::new(memory);
    let mut c = Controller::new(TestBar(world.clone()), mapper, options).unwrap();
    c.step(0);
    c.step(1);
    let (at, cc) = *world.writes.borrow().last().unwrap();
    assert_eq!((at, Cc(cc as u32).mps()), (offset::CC, 2));
    let (world, memory, options) =
        Setup { layout: Layout::Scattered, ..Setup::new(512, "") }.world();
    world.cap.set(Some(Cap(world.regs().read64(offset::CAP)).with_mpsmin(2).with_mpsmax(2).0));
    assert!(error_text(&world, &memory, options).contains("pages of 16384 bytes"));
}

#[test]
fn dropping_a_controller_disables_it() {
    let (world, memory, options) = Setup::new(512, "").world();
    let before = nvme::quarantined();
    drop(open(&world, &memory, options).unwrap());
    assert_eq!(Cc(world.regs().read32(offset::CC)).en(), 0);
    // The model had no turn to confirm it: the memory is kept rather than trusted to be free.
    assert!(nvme::quarantined() > before);
    assert!(memory.mapped_pages() > 0);
}
