//! How long a repository's operations take. Measurements with `--nocapture`, built for release; the bounds
//! are wide, for busy machines.

use super::repository::{Rig, SR, uri};
use super::*;

/// Listing, opening and changing a repository of many disks. `SR_DISKS=1000` for the figures.
#[test]
fn a_repository_of_many_disks() {
    let count: u64 = std::env::var("SR_DISKS").map_or(40, |n| n.parse().unwrap());
    let rig = Rig::of(count * (16 << 20) + (128 << 20));
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let clock = Clock::real();
    let keys: Vec<String> = (0..count).map(|_| ours.disk(SIZE)).collect();
    let timed = |what: &str, most_ms: u64, f: &dyn Fn()| {
        let began = clock.now();
        f();
        let took = clock.now() - began;
        tell!("{what} of {count} disks: {} us", took / 1000);
        assert!(took < most_ms * 1_000_000, "{what}: {took} ns");
    };
    timed("SR.ls", 1000, &|| {
        let all = ours.smapi("SR.ls", json!({"sr": SR}));
        assert_eq!(all.as_array().unwrap().len() as u64, count);
    });
    let domain = json!({"uri": uri(&keys[0]), "domain": "7"});
    timed("attach and activate", 2000, &|| {
        ours.smapi("Datapath.attach", domain.clone());
        ours.smapi("Datapath.activate", domain.clone());
    });
    timed("a snapshot", 5000, &|| {
        ours.smapi("Volume.snapshot", json!({"sr": SR, "key": keys[0]}));
    });
    timed("a key", 5000, &|| {
        ours.smapi("Volume.set", json!({"sr": SR, "key": keys[1], "k": "a", "v": "b"}));
    });
    ours.smapi("Datapath.deactivate", domain.clone());
    timed("SR.attach", 5000, &|| {
        ours.smapi("SR.detach", json!({"sr": SR}));
        ours.smapi("SR.attach", json!({"configuration": rig.configuration()}));
    });
    ours.stop();
}

/// What a guest notices while a chain of ten deleted snapshots is merged.
#[test]
fn a_chain_of_ten_is_merged_under_load() {
    let rig = Rig::of(512 << 20);
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(32 << 20);
    let of = json!({"sr": SR, "key": key});
    let mut guest = rig.guest(&ours, 3, &key);
    let mut seed = 1u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    let mut taken = Vec::new();
    for round in 1..=10u8 {
        (0..64).for_each(|_| guest.write(random() % 512 * 128, round, 64 << 10));
        taken.push(ours.smapi("Volume.snapshot", of.clone())["key"].clone());
    }
    let clock = Clock::real();
    let mut one = |guest: &mut Guest| {
        let (sector, began) = (random() % 8192 * 8, clock.now());
        match random() % 3 {
            0 => guest.write(sector, 0x77, 4096),
            _ => {
                guest.ring.read(sector, sector, 4096).unwrap();
                guest.ring.push();
                assert!(guest.answer(&mut [0; 4096]));
            }
        }
        clock.now() - began
    };
    let percentile = |times: &mut Vec<u64>| {
        times.sort_unstable();
        (times[times.len() / 2], times[times.len() * 99 / 100], times[times.len() - 1])
    };
    // Until all clusters are the guest's own, both before and while it merges, it is the same load.
    let _warm: u64 = (0..20_000).map(|_| one(&mut guest)).sum();
    let mut quiet: Vec<u64> = (0..20_000).map(|_| one(&mut guest)).collect();
    for snapshot in &taken {
        ours.smapi("Volume.destroy", json!({"sr": SR, "key": snapshot}));
    }
    let merging = ours.merging(100 << 20);
    let layers = || {
        let chain = ours.call("chain", json!({"image": format!("{SR}/{key}")}));
        chain["layers"].as_array().unwrap().len()
    };
    let mut merged = Vec::new();
    let began = clock.now();
    while layers() > 2 {
        merged.extend((0..500).map(|_| one(&mut guest)));
        assert!(clock.now() - began < 120_000_000_000, "{} layers are left", layers());
    }
    let took = clock.now() - began;
    drop(merging);
    let (before, during) = (percentile(&mut quiet), percentile(&mut merged));
    tell!(
        "(half, 99 %, most; ns) {before:?} before, {during:?} in {} ms of merging",
        took / 1_000_000
    );
    assert!(during.1 < 10 * before.1.max(2_000_000), "the guest notices it");
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}
