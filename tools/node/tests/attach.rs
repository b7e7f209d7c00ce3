//! A disk of which one reactor cannot start. Alone in its process: threads are counted.

use node::{Disk, DiskOptions, NodeSpec, OpenOptions, Parts, open_chain};
use qcow::create::{CreateOptions, create};
use qcow::open::Format;
use reactor::{Clock, Policy, Start};

/// Names of the process's threads.
fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    tasks.filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok()).collect()
}

#[test]
fn a_reactor_that_cannot_start_leaves_nothing_running() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let file = std::fs::File::options().create_new(true).read(true).write(true).open(&path);
    let mut storage = node::HostStorage::of(file.unwrap(), false).unwrap();
    create(&mut storage, "test", &CreateOptions::new(64 << 20)).unwrap();
    let before = threads();
    for (format, scheme) in
        [(Format::Qcow2, "file:"), (Format::Qcow2, "model:"), (Format::Raw, "file:")]
    {
        let spec = NodeSpec::parse(&format!("{scheme}{}", path.display())).unwrap();
        let parts = Parts::new(open_chain(&spec, &OpenOptions::write(format)).unwrap()).unwrap();
        let start = |cpu| Start { cpu, policy: Policy::Adaptive };
        // The third of four: one further reactor runs by then, and one never comes.
        let reactors = vec![start(None), start(None), start(Some(100_000)), start(None)];
        let options = DiskOptions { reactors, image: Default::default() };
        let error = Disk::start(parts, options, Clock::real()).err().unwrap().to_string();
        assert!(error.contains("reactor 3") && error.contains("100000"), "{error}");
        // One that was joined may still stand there for a moment.
        let gone = (0..500).any(|_| {
            let gone = threads().len() == before.len();
            if !gone {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            gone
        });
        assert!(gone, "{spec}: {:?}", threads());
        // Nobody holds a lock.
        drop(open_chain(&spec, &OpenOptions::write(format)).unwrap());
    }
}
