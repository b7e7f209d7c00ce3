//! Targets in this process, over what a machine has anyway. More of them, through the command: `tools/tests`.

use std::path::Path;

use node::NodeSpec;
use qcow::create::CreateOptions;
use qcow::open::Format;
use reactor::{Policy, Start};

use super::super::{Direct, Distribution, Job, Meter, Mix, Shape, Sizes, Verify, run};
use super::*;

fn options() -> RingOptions {
    RingOptions {
        format: Format::Raw,
        writable: true,
        reactor: Start { cpu: None, policy: Policy::Adaptive },
        here: None,
        l2_cache: 16 << 20,
        depth: 300,
    }
}

fn image(path: &Path, size: u64) {
    let mut files = std::fs::File::options();
    let file = files.create(true).truncate(true).read(true).write(true).open(path).unwrap();
    let mut storage = node::HostStorage::of(file, false).unwrap();
    qcow::create::create(&mut storage, "test", &CreateOptions::new(size)).unwrap();
}

fn job() -> Job {
    Job {
        mix: Mix { reads: 40, trims: 10 },
        sizes: Sizes(vec![(4096, 60), (1 << 16, 40)]),
        shape: Shape::Depth(24),
        seconds: 60.0,
        requests: Some(1000),
        flush_every: Some(9),
        verify: Verify::Stamped,
        ..Job::default()
    }
}

#[test]
fn a_ring_over_an_image_on_the_model_is_verified() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    image(&path, 8 << 20);
    let spec = NodeSpec::Model(node::ModelSpec::new(&path));
    let mut ring = Ring::open(&spec, &RingOptions { format: Format::Qcow2, ..options() }).unwrap();
    // As deep as it was asked to be.
    assert!((300..=512).contains(&ring.limits().max_depth), "{:?}", ring.limits());
    assert_eq!((ring.limits().size, ring.limits().max_len), (8 << 20, 1 << 17));
    let o = run(&job(), &mut ring, None, &mut |_| {}).unwrap();
    assert_eq!((o.requests, o.errors), (1000, 0));
    assert!(o.verified_bytes > 4 << 20 && o.trims.is_some() && o.flushes.is_some(), "{o:?}");
    let mut meter = ring.meter(false);
    let reads =
        Job { mix: Mix { reads: 100, trims: 0 }, flush_every: None, verify: Verify::No, ..job() };
    let o = run(&reads, &mut ring, Some(&mut meter), &mut |_| {}).unwrap();
    let s = o.server;
    assert!(s.cpu_ns.unwrap() > 0 && s.busy_ns.unwrap() > 0 && s.switches.is_some(), "{s:?}");
    assert_eq!((s.syscalls, meter.missing()), (None, None));
    ring.close().unwrap();
}

#[test]
fn a_ring_for_reading_refuses_writes() {
    let spec = NodeSpec::parse("mem:1M").unwrap();
    let mut ring = Ring::open(&spec, &RingOptions { writable: false, ..options() }).unwrap();
    let error = run(&job(), &mut ring, None, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("the ring of mem:1048576 cannot be written to"), "{error}");
    let sequential = Distribution::Sequential;
    let sizes = Sizes(vec![(512, 100)]);
    let requests = Some(3000);
    let job = Job { distribution: sequential, sizes, requests, ..Job::default() };
    assert_eq!(run(&job, &mut ring, None, &mut |_| {}).unwrap().bytes, 3000 * 512);
    ring.close().unwrap();
}

#[test]
fn a_queue_is_loaded_and_its_failures_have_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    let spec = NodeSpec::parse(&format!("model:{}", path.display())).unwrap();
    let mut direct = Direct::open(&spec, true).unwrap();
    let o = run(&Job { mix: Mix { reads: 50, trims: 0 }, ..job() }, &mut direct, None, &mut |_| {});
    let o = o.unwrap();
    assert_eq!((o.requests, o.errors), (1000, 0));
    assert!(o.verified_bytes > 4 << 20, "{o:?}");
    direct.close().unwrap();
    // Every read of this model fails: unrecovered read errors.
    let spec = format!("model:{}?fault=status=281:op=read", path.display());
    let mut direct = Direct::open(&NodeSpec::parse(&spec).unwrap(), false).unwrap();
    let job = Job { requests: Some(5), ..Job::default() };
    let o = run(&job, &mut direct, None, &mut |_| {}).unwrap();
    assert_eq!((o.requests, o.errors), (0, 5));
    let error = run(&Job::default(), &mut direct, None, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("I/O error"), "{error}");
    direct.close().unwrap();
}

#[test]
fn a_reactor_s_system_calls_are_counted() {
    let spec = NodeSpec::parse("mem:1M").unwrap();
    let start = Start { cpu: None, policy: Policy::Poll };
    let ring = Ring::open(&spec, &RingOptions { reactor: start, ..options() }).unwrap();
    let mut meter = ring.meter(true);
    assert!(meter.figures().is_err() && meter.end().is_err());
    for calls in [0, 50] {
        meter.begin().unwrap();
        let call = |_| {
            let _ = std::process::id();
        };
        ask(&ring.disk, move |_| (0..calls).for_each(call)).unwrap();
        meter.end().unwrap();
        // A few are of the answer to this thread.
        match meter.figures().unwrap().syscalls {
            Some(n) => assert!((calls..=calls + 5).contains(&n), "{n}"),
            None => assert!(meter.missing().is_some()),
        }
    }
    ring.close().unwrap();
}
