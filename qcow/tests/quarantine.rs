//! A device that was lost and could not be stopped takes the whole image out of service: what other
//! layers hold must not be read into memory that the device may still write to.

mod rig;

use block::{Op, Status};
use qcow::create::CreateOptions;
use qcow::open::Format;
use qcow::run::Options;
use rig::{Fault, LogQueue, Rig, fresh};

const SIZE: u64 = 4 << 20;
const CLUSTER: u64 = 64 << 10;

/// A disk whose first cluster lies in the top layer; the rest is the backing file's.
fn disk() -> Rig {
    let mut over = CreateOptions::new(SIZE);
    over.backing = Some(("/layer1".to_owned(), Format::Raw));
    let leaves = vec![fresh(8 << 20, 1, &over), LogQueue::new(SIZE, 2)];
    let mut rig = Rig::open(leaves, &[Format::Qcow2, Format::Raw], Options::default());
    assert_eq!(rig.call(Op::Write, 0, CLUSTER, &vec![7; CLUSTER as usize]).0, Status::Ok);
    assert_eq!(rig.call(Op::Read, CLUSTER, 4096, &[]).0, Status::Ok);
    rig
}

#[test]
fn an_image_over_a_device_that_could_not_be_stopped_refuses_everything() {
    // The straight way, and a request of a task.
    for (op, offset, len) in [(Op::Read, 0, 4096), (Op::Write, 0, 4096), (Op::Write, CLUSTER, 512)]
    {
        let mut rig = disk();
        let leaf = rig.leaf(0);
        leaf.fail_at = Some((leaf.requests, Fault::Stuck));
        let data = vec![9; len as usize];
        assert_eq!(rig.call(op, offset, len, &data).0, Status::Gone, "{op:?}");
        // The backing file's device is well, and is not asked.
        let before = rig.leaf(1).requests;
        for (op, offset) in [(Op::Read, CLUSTER), (Op::Read, 0), (Op::Write, 0), (Op::Flush, 0)] {
            let len = if op == Op::Flush { 0 } else { 4096 };
            assert_eq!(rig.call(op, offset, len, &[1; 4096]).0, Status::Gone, "{op:?}");
        }
        assert_eq!(rig.leaf(1).requests, before);
    }
}

#[test]
fn a_device_that_is_gone_but_still_takes_only_its_own_layer() {
    let mut rig = disk();
    rig.leaf(0).fail = Some((Op::Read, Status::Gone, 1));
    assert_eq!(rig.call(Op::Read, 0, 4096, &[]).0, Status::Gone);
    assert_eq!(rig.call(Op::Read, CLUSTER, 4096, &[]).0, Status::Ok);
}
