//! Hundreds of devices.

use super::*;

/// Many devices at once: seconds, not minutes. `SERVE_DEVICES=500` for a measurement.
#[test]
fn many_devices() {
    let count: u16 = std::env::var("SERVE_DEVICES").map_or(150, |n| n.parse().unwrap());
    let world = World::new();
    let base = world.image("base");
    for n in 0..count {
        std::fs::copy(&base, world.dir.path().join(format!("{n}"))).unwrap();
    }
    let ours = world.serve(2, Notify::Thread);
    for n in 0..count {
        world.plug(n + 1, "w", &node(&world.dir.path().join(format!("{n}"))));
    }
    let clock = Clock::real();
    let began = clock.now();
    let mut guests = Vec::new();
    for n in 0..count {
        guests.push(Guest::start(&world, n + 1, Setup { max_segments: 11, ..SETUP }));
    }
    let took = Duration::from_nanos(clock.now() - began);
    tell!("{count} devices connected in {took:?}");
    assert!(took < Duration::from_millis(100) * count.into(), "{took:?}");
    for (n, guest) in guests.iter_mut().enumerate().step_by(37) {
        guest.write(0, n as u8 | 1, 4096);
        guest.expect(0, n as u8 | 1, 4096);
    }
    ours.stop();
}
