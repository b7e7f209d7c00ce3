//! A guest that breaks its ring.

use std::sync::atomic::Ordering;
use std::time::Duration;

use blkif::RingMemory as _;
use blkif::abi::REQ_PROD;
use node::Notify;
use serde_json::json;

use super::{Guest, SETUP, World, backend, node, wait};

/// A ring that a guest breaks is given up and the toolstack told; a new one is served.
#[test]
fn a_ring_that_is_broken() {
    let world = World::new();
    let ours = world.serve(1, Notify::Thread);
    world.plug(1, "w", &node(&world.image("a")));
    let mut guest = Guest::start(&world, 1, SETUP);
    guest.write(0, 1, 4096);
    let producer = |index| guest.ring.ring().store32(REQ_PROD, index, Ordering::Release);
    for index in [1000, 1] {
        producer(index);
        world.host.notify(1, guest.port());
        std::thread::sleep(Duration::from_millis(20));
    }
    wait("state 5", || {
        ours.call("list", json!({}));
        world.state(1).as_deref() == Some("5")
    });
    let why = world.read(&format!("{}/hotplug-error", backend(1))).unwrap();
    assert_eq!(why, "the guest broke its ring");
    guest.say("6");
    world.reaches(1, "6");
    guest.say("1");
    let mut guest = Guest::start(&world, 1, SETUP);
    guest.expect(0, 1, 4096);
    ours.stop();
}
