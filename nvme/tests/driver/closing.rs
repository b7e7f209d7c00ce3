//! Ends: queue pairs that are dropped, controllers that are closed, in order and otherwise.

use block::{BlockQueue, Flags, Op, Status};
use nvme::Error;
use nvme_spec::{Cc, Csts, offset};

use crate::common::*;

fn one(rig: &mut Rig, op: Op) -> block::Tag {
    let seg = [rig.seg(0, 4096)];
    rig.send(op, Flags::NONE, 0, 0, &seg)
}

#[test]
fn a_queue_pair_dropped_with_commands_in_flight_leaves_its_memory_to_the_controller() {
    let mut rig = Setup::new(512, "delay=2000:op=read").open().unwrap();
    for _ in 0..5 {
        one(&mut rig, Op::Read);
    }
    rig.poll();
    rig.world.turn();
    let pages = rig.memory.mapped_pages();
    let Rig { world, memory, mut controller, queue, data, .. } = rig;
    drop((queue, data));
    assert_eq!(memory.mapped_pages(), pages, "the device still has the commands");
    let mut clock = Turning(world.clone());
    for _ in 0..200 {
        nvme::Clock::pause(&mut clock);
        controller.step(world.now.get());
    }
    // The queues are deleted; only the admin queue's three pages are left.
    assert_eq!(memory.mapped_pages(), 3);
    assert_eq!(world.model.borrow().stats().snapshot().dma_faults, 0);
    controller.close(&mut clock).unwrap();
    assert_eq!(memory.mapped_pages(), 0);
}

#[test]
fn closing_in_order() {
    let mut rig = Setup::new(512, "").open().unwrap();
    one(&mut rig, Op::Write);
    rig.drain();
    let Rig { world, memory, controller, queue, data, .. } = rig;
    drop(queue);
    let mut clock = Turning(world.clone());
    controller.close(&mut clock).unwrap();
    drop(data);
    assert_eq!(memory.mapped_pages(), 0);
    let writes = world.writes.borrow();
    let ccs: Vec<Cc> =
        writes.iter().filter(|w| w.0 == offset::CC).map(|w| Cc(w.1 as u32)).collect();
    let last = &ccs[ccs.len() - 2..];
    assert_eq!((last[0].en(), last[0].shn()), (1, 1), "notified while enabled");
    assert_eq!((last[1].en(), last[1].shn()), (0, 0), "then disabled");
    let mut identify = world.model.borrow_mut();
    identify.step(0);
    assert_eq!(Csts(world.regs().read32(offset::CSTS)).rdy(), 0);
}

#[test]
fn closing_while_a_queue_pair_is_forgotten_about_ends_too() {
    let mut rig = Setup::new(512, "delay=1000000:op=write").open().unwrap();
    rig.world.tick.set(MS);
    let tag = one(&mut rig, Op::Write);
    rig.poll();
    let mut clock = rig.clock();
    let Rig { world, controller, mut queue, .. } = rig;
    let began = world.now.get();
    assert_eq!(controller.close(&mut clock), Err(Error::InUse { qid: 1 }));
    assert!((10..12).contains(&((world.now.get() - began) / SECOND)));
    // It was reset, so nothing of it is with the device, and the request gets its answer.
    let mut out = block::Completions::new();
    queue.poll(&mut out);
    assert_eq!((out.len(), out.get(0).tag, out.get(0).status), (1, tag, Status::Gone));
    assert_eq!(out.get(0).detail, 0);
}

#[test]
fn closing_a_device_that_does_not_care() {
    // The deletion of the queue is never answered: reset instead.
    let (world, memory, options) = Setup::new(512, "").world();
    let rig = Rig::open(world.clone(), memory, options).unwrap();
    let Rig { controller, queue, .. } = rig;
    drop(queue);
    world.mute.set(true);
    world.tick.set(MS);
    world.bus_master_off.set(Hook::Works);
    let mut clock = Turning(world.clone());
    let error = controller.close(&mut clock).unwrap_err();
    assert!(matches!(error, Error::NoAnswer { .. }), "{error}");
    assert_eq!(world.count(BUS_MASTER_OFF), 1);
}
