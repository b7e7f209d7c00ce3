//! Several images on the same reactors: they come and go, and none minds the others.

use block::{Flags, Op, Status};
use node::{Disk, NodeSpec, OpenOptions, Parts, Reactors, open_chain};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::{Clock, Policy, PortalRequest, Start};

const SIZE: u64 = 16 << 20;

fn reactors(count: usize) -> std::sync::Arc<Reactors> {
    let start = Start { cpu: None, policy: Policy::Adaptive };
    Reactors::start(&vec![start; count], Clock::real()).unwrap()
}

fn image(dir: &std::path::Path, n: usize) -> NodeSpec {
    let path = dir.join(format!("{n}.qcow2"));
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(&path);
    let mut storage = node::HostStorage::of(file.unwrap(), false).unwrap();
    create(&mut storage, "test", &CreateOptions::new(SIZE)).unwrap();
    let scheme = if n.is_multiple_of(3) { "model:" } else { "file:" };
    NodeSpec::parse(&format!("{scheme}{}", path.display())).unwrap()
}

fn start(spec: &NodeSpec, on: &std::sync::Arc<Reactors>, numbers: &[usize]) -> Disk {
    let chain = open_chain(spec, &OpenOptions::write(Format::Qcow2)).unwrap();
    Disk::start_on(Parts::on(chain, on).unwrap(), on, numbers, Default::default()).unwrap()
}

/// Writes to every reactor of the disk in turn, or reads and compares.
fn touch(disk: &Disk, n: usize, write: bool) {
    let region = dma::Region::new(4096, dma::PageSize::Small).unwrap();
    let door = disk.door();
    for i in 0..8u64 {
        let mut portal = door.open(4, vec![region.clone()]).unwrap();
        let seg = region.seg(0, 4096).unwrap();
        let stamp = [n as u8 + 1, i as u8, 7, 7];
        let bytes = stamp.repeat(1024);
        let op = if write { Op::Write } else { Op::Read };
        region.write_seg(&seg, if write { &bytes } else { &[0; 4096] });
        let offset = (i * 7 + n as u64) % (SIZE / 4096) * 4096;
        let flags = Flags::NONE;
        let r = PortalRequest { id: 0, op, flags, offset, len: 4096, seg: Some(seg) };
        assert_eq!(portal.call(r), Status::Ok);
        let mut got = vec![0; 4096];
        region.read_seg(&seg, &mut got);
        assert!(got == bytes, "disk {n}, block {i}");
    }
}

#[test]
fn disks_come_and_go_on_shared_reactors() {
    let dir = tempfile::tempdir().unwrap();
    let on = reactors(2);
    let specs: Vec<NodeSpec> = (0..9).map(|n| image(dir.path(), n)).collect();
    let homes: [&[usize]; 3] = [&[0], &[1], &[1, 0]];
    let mut disks: Vec<Option<Disk>> =
        (0..9).map(|n| Some(start(&specs[n], &on, homes[n % 3]))).collect();
    for round in 0..3 {
        for (n, disk) in disks.iter().enumerate() {
            touch(disk.as_ref().unwrap(), n, true);
        }
        // Some go; the others serve on, and places are used again.
        for n in (round..9).step_by(2) {
            disks[n].take().unwrap().close().unwrap();
            for (m, disk) in disks.iter().enumerate().filter_map(|(m, d)| Some((m, d.as_ref()?))) {
                touch(disk, m, false);
            }
            disks[n] = Some(start(&specs[n], &on, homes[(n + 1 + round) % 3]));
            touch(disks[n].as_ref().unwrap(), n, false);
        }
    }
    for disk in disks {
        disk.unwrap().close().unwrap();
    }
    on.stop();
}

/// An image that cannot be attached leaves the others and their reactors as they are.
#[test]
fn a_refused_image_leaves_the_others_alone() {
    let dir = tempfile::tempdir().unwrap();
    let on = reactors(1);
    let good = start(&image(dir.path(), 1), &on, &[0]);
    let spec = image(dir.path(), 2);
    for numbers in [&[1][..], &[], &[0, 5]] {
        let chain = open_chain(&spec, &OpenOptions::write(Format::Qcow2)).unwrap();
        let parts = Parts::on(chain, &on).unwrap();
        let refused = Disk::start_on(parts, &on, numbers, Default::default()).err().unwrap();
        assert!(refused.to_string().contains("no such reactors"), "{refused}");
    }
    // Parts for others, too.
    let chain = open_chain(&spec, &OpenOptions::write(Format::Qcow2)).unwrap();
    let parts = Parts::new(chain).unwrap();
    assert!(Disk::start_on(parts, &on, &[0], Default::default()).is_err());
    touch(&good, 1, true);
    let again = start(&spec, &on, &[0]);
    touch(&again, 2, true);
    again.close().unwrap();
    good.close().unwrap();
    on.stop();
}
