//! A disk for which there is no memory. Alone in its process: the shortage is the process's.

use std::time::{Duration, Instant};

use dma::{PageSize, Region};
use node::{Disk, DiskOptions, NodeSpec, OpenOptions, Parts, open_chain};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::{Clock, Policy, Start};

#[test]
#[expect(clippy::disallowed_methods, reason = "times a test")]
fn a_disk_without_memory_gives_everything_back_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(&path);
    let mut storage = node::HostStorage::of(file.unwrap(), false).unwrap();
    create(&mut storage, "test", &CreateOptions::new(64 << 20)).unwrap();
    let spec = NodeSpec::parse(&format!("model:{}", path.display())).unwrap();
    let open = || Parts::new(open_chain(&spec, &OpenOptions::write(Format::Qcow2)).unwrap());
    let parts = open().unwrap();
    let regions: Vec<_> = std::iter::from_fn(|| Region::new(4096, PageSize::Small).ok())
        .take(dma::RegionId::MAX)
        .collect();
    let options = DiskOptions {
        reactors: vec![Start { cpu: None, policy: Policy::Adaptive }],
        image: qcow::run::Options::default(),
    };
    let began = Instant::now();
    let refused = Disk::start(parts, options, Clock::real()).err().unwrap().to_string();
    assert!(refused.contains("regions"), "{refused}");
    assert!(began.elapsed() < Duration::from_secs(3), "after {:?}", began.elapsed());
    drop(regions);
    open().unwrap();
}
