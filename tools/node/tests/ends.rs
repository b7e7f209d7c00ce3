//! Running disks that end otherwise than in order.

use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use block::{Flags, Op, Status};
use dma::{PageSize, Region};
use node::{Disk, DiskOptions, ExtentSource, NodeSpec, OpenOptions, Parts, open_chain};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::{Clock, Policy, PortalRequest, Start};

fn make(path: &Path) {
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(path).unwrap();
    let mut storage = node::HostStorage::of(file, false).unwrap();
    create(&mut storage, "test", &CreateOptions::new(64 << 20)).unwrap();
}

fn serve(spec: &str) -> Disk {
    let chain = open_chain(&NodeSpec::parse(spec).unwrap(), &OpenOptions::write(Format::Qcow2));
    let options = DiskOptions {
        reactors: vec![Start { cpu: None, policy: Policy::Adaptive }],
        image: qcow::run::Options::default(),
    };
    Disk::start(Parts::new(chain.unwrap()).unwrap(), options, Clock::real()).unwrap()
}

#[test]
fn a_client_that_goes_on_does_not_keep_a_disk_from_closing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    make(&path);
    for spec in [format!("file:{}", path.display()), format!("model:{}", path.display())] {
        let disk = serve(&spec);
        let region = Region::new(65536, PageSize::Small).unwrap();
        let mut portal = disk.portal(16, vec![region.clone()]).unwrap();
        let door = disk.door();
        let (send, ended) = channel();
        std::thread::spawn(move || {
            let mut id = 0;
            let status = loop {
                while portal.room() > 0 {
                    let (offset, seg) = (id % 1024 * 65536, region.seg(0, 65536));
                    let (op, flags) = (Op::Write, Flags::NONE);
                    let request = PortalRequest { id, op, flags, offset, len: 65536, seg };
                    portal.send(request).unwrap();
                    id += 1;
                }
                match portal.wait().status {
                    Status::Ok => {}
                    status => break status,
                }
            };
            while portal.in_flight() > 0 {
                portal.wait();
            }
            send.send(status).unwrap();
        });
        disk.close().unwrap();
        assert_eq!(ended.recv_timeout(Duration::from_secs(10)), Ok(Status::Gone), "{spec}");
        assert!(door.open(1, Vec::new()).is_err(), "there is nothing left to attach to");
        let mut storage = node::HostStorage::open(&path, true).unwrap();
        let check = qcow::check::Repair::None;
        let check = qcow::check::run(&mut storage, "a", check, &mut |_| {}).unwrap();
        assert_eq!(check.corruptions + check.leaks + check.check_errors, 0, "{spec}");
    }
}

#[test]
fn an_image_whose_disk_is_not_closed_stays_locked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    make(&path);
    let spec = format!("file:{}", path.display());
    drop(serve(&spec));
    let again = open_chain(&NodeSpec::parse(&spec).unwrap(), &OpenOptions::write(Format::Qcow2));
    assert!(again.err().unwrap().to_string().contains("in use"));
}

#[test]
fn extents_of_nothing_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    make(&path);
    let disk = serve(&format!("file:{}", path.display()));
    let extents = ExtentSource::new(disk.door()).unwrap();
    assert_eq!(extents.status(0, 0, 1), Err(Status::Invalid));
    assert_eq!(extents.status(64 << 20, 512, 1), Err(Status::Invalid));
    assert_eq!(extents.status(u64::MAX - 511, 512, 1), Err(Status::Invalid));
    assert_eq!(extents.status(1000, 512, 1).unwrap()[0].len, 512);
    drop(extents);
    disk.close().unwrap();
}
