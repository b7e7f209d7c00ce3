//! Two rings of one guest on a reactor's own loop: attached, served, stopped and let go.

use blkif::abi::OKAY;
use blkif::{Abi, Backend, Config, Frontend, LocalGrants, RegionRing, Signal};
use block::{MemQueue, Port, RawImage};
use reactor::{Clock, Core};

use crate::common::setup;

type Ring = Backend<RegionRing, LocalGrants, Signal>;

#[test]
fn two_queues_of_one_disk_on_a_reactor() {
    let (clock, time) = Clock::virtual_clock();
    let mut core: Core<MemQueue, RawImage, Ring> = Core::new(clock).unwrap();
    core.add_leaf(MemQueue::new(1 << 20, 512).unwrap()).unwrap();
    let make = |owner, leaves: &mut [MemQueue]| {
        RawImage::new(leaves, Port { leaf: 0, unit: 0 }, u64::MAX, owner).ok_or("no unit")
    };
    let image = core.add_image(make).unwrap();
    let mut fronts = Vec::new();
    for _ in 0..2 {
        let front = Frontend::new(setup(Abi::NATIVE, 0, true), Signal::default()).unwrap();
        let (ring, grants) = (front.ring(), front.grants());
        let attached = core.add_frontend(image, |owner, _| {
            let config = Config { persistent_pages: 64, ..Config::new(owner, Abi::NATIVE, 0) };
            Backend::new(config, ring, grants, Signal::default()).map_err(|e| e.to_string())
        });
        fronts.push((front, attached.unwrap()));
    }
    let turn = |core: &mut Core<_, _, _>| {
        time.fetch_add(1000, std::sync::atomic::Ordering::Relaxed);
        core.turn()
    };
    // What one queue wrote, the other reads; its flush covers it, since the disk is one.
    for round in 1..100u8 {
        for (write, read) in [(0, 1), (1, 0)] {
            let sector = u64::from(round) * 8;
            fronts[write].0.write(1, sector, &[round; 4096]).unwrap();
            fronts[write].0.push();
            while fronts[write].0.reap(&mut []).unwrap().is_none() {
                turn(&mut core);
            }
            let other = &mut fronts[read].0;
            other.flush(2, 0, &[]).unwrap();
            other.read(3, sector, 4096).unwrap();
            other.push();
            let mut back = [0; 4096];
            while other.in_flight() > 0 {
                turn(&mut core);
                while let Some(done) = other.reap(&mut back).unwrap() {
                    assert_eq!(done.status, OKAY);
                }
            }
            assert_eq!(back, [round; 4096]);
        }
    }
    for (front, index) in &fronts {
        assert!(front.table().mappings() > 0);
        let ring = core.frontend(*index).unwrap();
        let stats = ring.stats();
        ring.stop();
        while turn(&mut core) {}
        assert!(core.frontend(*index).is_none(), "an idle turn lets it go");
        assert!(stats.detached());
        assert_eq!(front.table().mappings(), 0);
        assert_eq!((stats.flushes.get(), stats.errors.get()), (99, 0));
    }
}
