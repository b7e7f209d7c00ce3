//! Hundreds of devices.

use nix::sys::resource::{UsageWho, getrusage};

use super::*;

/// Many devices at once: seconds, not minutes. `SERVE_DEVICES=500` for a measurement.
#[test]
fn many_devices() {
    let count: u16 = std::env::var("SERVE_DEVICES").map_or(300, |n| n.parse().unwrap());
    let world = World::new();
    let base = world.image("base");
    for n in 0..=count {
        std::fs::copy(&base, world.dir.path().join(format!("{n}"))).unwrap();
    }
    let plug = |n: u16| world.plug(n + 1, "w", &node(&world.dir.path().join(format!("{n}"))));
    let start = |n: u16| Guest::start(&world, n + 1, Setup { max_segments: 11, ..SETUP });
    let ours = world.serve(2, Notify::Thread);
    let clock = Clock::real();
    let since = |began| Duration::from_nanos(clock.now() - began);
    let (began, worked, memory) = (clock.now(), worked(), memory());
    for n in 0..count {
        plug(n);
    }
    let plugged = clock.now();
    let mut guests: Vec<Guest> = (0..count).map(start).collect();
    let (took, all) = (since(plugged), since(began));
    tell!("{count} devices connected in {took:?}, {all:?} with the toolstack's work");
    let cpu = self::worked() - worked;
    let each = (self::memory() - memory) / u64::from(count);
    tell!("{cpu:?} of processor time, {each} KiB of memory for each; the guests' too");
    // Five times what it takes on a busy machine.
    assert!(took < Duration::from_millis(50) * count.into(), "{took:?}");
    let began = clock.now();
    plug(count);
    guests.push(start(count));
    tell!("one more: {:?}", since(began));
    for (n, guest) in guests.iter_mut().enumerate().step_by(37) {
        guest.write(0, n as u8 | 1, 4096);
        guest.expect(0, n as u8 | 1, 4096);
    }
    ours.stop();
}

/// Processor time of this process so far.
fn worked() -> Duration {
    let used = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let time = used.user_time() + used.system_time();
    Duration::from_micros(nix::sys::time::TimeValLike::num_microseconds(&time) as u64)
}

/// Resident memory of this process, in KiB.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
