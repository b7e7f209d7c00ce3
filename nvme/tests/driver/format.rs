//! Format NVM, and reading the health log on demand.

use block::{Flags, Op, Status};
use nvme::{Controller, Error, Format, State};
use nvme_model::Options as ModelOptions;
use nvme_spec::{Fna, SecureErase, StatusCode};

use crate::common::*;

fn format(nsid: u32, block_size: Option<u32>) -> Format {
    Format { nsid, block_size, erase: SecureErase::None }
}

/// An open controller without queue pairs; one was there.
fn idle(setup: Setup) -> (Controller<TestBar>, Turning) {
    let rig = setup.open().unwrap();
    let clock = rig.clock();
    let Rig { controller, queue, .. } = rig;
    drop(queue);
    (controller, clock)
}

fn close(controller: Controller<TestBar>, clock: &mut Turning) {
    controller.close(clock).unwrap();
    clock.0.turn();
}

#[test]
fn a_new_block_size_is_seen_afterwards() {
    let mut rig = Setup::new(512, "").open().unwrap();
    rig.data.write(0, &pattern(1, 4096));
    assert_eq!(rig.run(Op::Write, Flags::NONE, 0, 0, &[rig.seg(0, 4096)]), Status::Ok);
    let mut clock = rig.clock();
    let Rig { world, memory, mut controller, queue, data, .. } = rig;
    drop((queue, data));
    let formats = controller.block_formats(1, &mut clock).unwrap();
    let sizes: Vec<_> = formats.iter().map(|f| (f.index, f.block_size, f.in_use)).collect();
    assert_eq!(sizes, [(0, 512, true), (1, 4096, false)]);
    controller.format(&format(1, Some(4096)), &mut clock, |_| ()).unwrap();
    let ns = &controller.namespaces()[0];
    assert_eq!((ns.info.block_size, ns.info.size), (4096, 64 << 20));
    // A queue pair made now works with the new size.
    let mut rig = Rig::around(world, memory, controller).unwrap();
    rig.data.write(0, &pattern(1, 4096));
    assert_eq!(rig.run(Op::Read, Flags::NONE, 0, 0, &[rig.seg(8192, 4096)]), Status::Ok);
    let mut bytes = vec![1; 4096];
    rig.data.read(8192, &mut bytes);
    assert!(bytes.iter().all(|&b| b == 0), "the old data is gone");
    assert_eq!(rig.run(Op::Write, Flags::NONE, 0, 4096, &[rig.seg(0, 4096)]), Status::Ok);
    assert_eq!(rig.peek(1, 4096, 4096), pattern(1, 4096));
    assert_eq!(rig.run(Op::Write, Flags::NONE, 0, 512, &[rig.seg(0, 512)]), Status::Invalid);
}

#[test]
fn nothing_is_formatted_under_a_queue_pair() {
    let mut rig = Setup::new(512, "").open().unwrap();
    rig.data.write(0, &pattern(2, 4096));
    assert_eq!(rig.run(Op::Write, Flags::NONE, 0, 0, &[rig.seg(0, 4096)]), Status::Ok);
    let (admin, mut clock) = (rig.device().admin, rig.clock());
    let refused = rig.controller.format(&format(1, None), &mut clock, |_| ());
    assert_eq!(refused, Err(Error::Busy { qid: 1 }));
    assert_eq!(rig.device().admin, admin, "the device was asked something");
    assert_eq!(rig.run(Op::Read, Flags::NONE, 0, 0, &[rig.seg(8192, 4096)]), Status::Ok);
    let mut bytes = vec![0; 4096];
    rig.data.read(8192, &mut bytes);
    assert_eq!(bytes, pattern(2, 4096));
}

#[test]
fn an_hour_is_not_too_long_and_progress_is_told() {
    // Identify takes its time too while the drive is busy: none of it is late.
    let (mut c, mut clock) =
        idle(Setup::new(512, "delay=3600000ms:op=format;delay=60000ms:op=identify,nth=6,count=1"));
    clock.0.tick.set(SECOND);
    clock.0.patience.set(2 * 3600 * SECOND);
    let mut seen = Vec::new();
    c.format(&format(1, None), &mut clock, |remains| seen.extend(remains)).unwrap();
    assert!(clock.0.now.get() > 3600 * SECOND);
    assert!(seen.is_sorted_by(|a, b| a >= b), "{seen:?}");
    assert!(seen.contains(&50) && *seen.last().unwrap() <= 1, "{seen:?}");
    assert_eq!((c.state(), c.error()), (State::Ready, None));
    clock.0.tick.set(MS);
    close(c, &mut clock);
}

#[test]
fn an_identify_that_is_out_when_the_format_ends_is_waited_for() {
    let (mut c, mut clock) =
        idle(Setup::new(512, "delay=5000ms:op=format;delay=9000ms:op=identify,nth=5,count=1"));
    clock.0.tick.set(SECOND / 10);
    c.format(&format(1, Some(4096)), &mut clock, |_| ()).unwrap();
    assert!(clock.0.now.get() > 9 * SECOND);
    assert_eq!(c.namespaces()[0].info.block_size, 4096);
    clock.0.tick.set(MS);
    close(c, &mut clock);
}

#[test]
fn a_format_that_never_ends() {
    let (mut c, mut clock) = idle(Setup::new(512, "lost:op=format"));
    clock.0.tick.set(10 * SECOND);
    clock.0.patience.set(13 * 3600 * SECOND);
    let e = c.format(&format(1, Some(4096)), &mut clock, |_| ()).unwrap_err();
    assert!(matches!(e, Error::NoAnswer { what: "Format NVM", .. }), "{e}");
    assert!(clock.0.now.get() >= 12 * 3600 * SECOND);
    // The controller is reset, and the drive is as it was.
    clock.0.tick.set(MS);
    while c.step(clock.0.now.get()) != State::Ready {
        clock.0.turn();
    }
    assert_eq!(c.namespaces()[0].info.block_size, 512);
    close(c, &mut clock);
}

#[test]
fn refusals_and_failures() {
    let of = |faults: &str| idle(Setup::new(512, faults));
    let (mut c, mut clock) = of("status=10a:op=format,count=1");
    let e = c.format(&format(1, None), &mut clock, |_| ()).unwrap_err();
    let Error::Command { what: "Format NVM", status } = e else { panic!("{e}") };
    assert_eq!(status.code(), StatusCode::INVALID_FORMAT);
    assert_eq!((c.state(), c.namespaces().len()), (State::Ready, 1));
    for nsid in [0, 2, u32::MAX] {
        assert!(c.format(&format(nsid, None), &mut clock, |_| ()).is_err(), "{nsid}");
    }
    let e = c.format(&format(1, Some(1024)), &mut clock, |_| ()).unwrap_err();
    assert!(e.to_string().contains("it can have: 512, 4096"), "{e}");
    assert!(c.block_formats(7, &mut clock).is_err());
    c.format(&format(1, None), &mut clock, |_| ()).unwrap();
    close(c, &mut clock);

    let (mut c, mut clock) = of("cfs:op=format");
    assert_eq!(c.format(&format(1, None), &mut clock, |_| ()), Err(Error::Fatal));
    let (mut c, mut clock) = of("gone:op=format");
    assert_eq!(c.format(&format(1, None), &mut clock, |_| ()), Err(Error::Gone));
    assert_eq!(c.format(&format(1, None), &mut clock, |_| ()), Err(Error::NotOpen));
}

#[test]
fn abilities_are_looked_at_first() {
    let with = |format| {
        let mut setup = Setup::new(512, "");
        setup.namespaces.push(disk(64, 4096));
        setup.model = ModelOptions { format, ..setup.model };
        idle(setup)
    };
    let (mut c, mut clock) = with(None);
    let e = c.format(&format(1, None), &mut clock, |_| ()).unwrap_err();
    assert!(e.to_string().contains("no Format NVM"), "{e}");
    let (mut c, mut clock) = with(Some(Fna(2)));
    let crypto = Format { erase: SecureErase::Crypto, ..format(1, None) };
    let e = c.format(&crypto, &mut clock, |_| ()).unwrap_err();
    assert!(e.to_string().contains("no cryptographic erase"), "{e}");
    assert_eq!(c.format_touches(2, SecureErase::None), [2]);
    assert_eq!(c.format_touches(2, SecureErase::UserData), [1, 2]);
    let (mut c, mut clock) = with(Some(Fna(1)));
    assert_eq!(c.format_touches(2, SecureErase::None), [1, 2]);
    c.format(&format(2, Some(512)), &mut clock, |_| ()).unwrap();
    let sizes: Vec<_> = c.namespaces().iter().map(|n| n.info.block_size).collect();
    assert_eq!(sizes, [512, 512]);
    close(c, &mut clock);
}

#[test]
fn health_on_demand() {
    let (mut c, mut clock) = idle(Setup::new(512, "status=2:op=log,nth=3,count=1"));
    let smart = c.read_smart(&mut clock).unwrap();
    assert_eq!((smart.critical_warning, smart.available_spare), (0, 100));
    clock.0.model.borrow_mut().raise_warning(4);
    // The event has it read, too: whichever is the third fails.
    let reads = [c.read_smart(&mut clock), c.read_smart(&mut clock)];
    assert!(reads.iter().any(|r| matches!(r, Err(Error::Command { what: "Get Log Page", .. }))));
    assert_eq!(c.read_smart(&mut clock).unwrap().critical_warning, 4);
    close(c, &mut clock);
}
