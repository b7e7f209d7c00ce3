//! Reactors that wait for guests: what that costs, idle and when a request comes.

use super::*;

/// With a guest that does nothing reactors sleep, and wake up when it asks for something.
#[test]
fn an_idle_guest_costs_next_to_nothing() {
    let world = World::new();
    let ours = world.serve(2, Notify::Thread);
    world.plug(1, "w", &node(&world.image("a")));
    let mut guest = Guest::start(&world, 1, SETUP);
    guest.write(0, 1, 4096);
    std::thread::sleep(Duration::from_millis(300));
    let before = ours.call("stats", json!({}))["reactors"].clone();
    std::thread::sleep(Duration::from_secs(2));
    let after = ours.call("stats", json!({}))["reactors"].clone();
    for n in 0..2 {
        let rise = |key: &str| after[n][key].as_u64().unwrap() - before[n][key].as_u64().unwrap();
        // Ten looks a second, each of 50 us of spinning: 0.05 %.
        assert!((10..60).contains(&rise("sleeps")), "reactor {n} slept {} times", rise("sleeps"));
        assert!(rise("turns") < 60_000, "reactor {n} turned {} times", rise("turns"));
    }
    let events = world.host.calls().event_calls;
    guest.expect(0, 1, 4096);
    assert!(world.host.calls().event_calls > events, "it was woken by an event");
    ours.stop();
}

/// What it costs a guest that the reactor sleeps when its request comes: from the event to the answer, all
/// threads in between. The read needs no device. A measurement with `--nocapture`, built for release.
#[test]
fn the_cost_of_a_wake_up() {
    const ROUNDS: u64 = 200;
    let measured = |policy| {
        let world = World::new();
        let ours = world.serve_by(policy, 1, Notify::Thread);
        world.plug(1, "w", &node(&world.image("a")));
        let mut guest = Guest::start(&world, 1, SETUP);
        guest.expect(0, 0, 4096);
        let sleeps = || ours.call("stats", json!({}))["reactors"][0]["sleeps"].as_u64().unwrap();
        let (clock, before) = (Clock::real(), sleeps());
        let mut times = Vec::new();
        for round in 0..ROUNDS {
            std::thread::sleep(Duration::from_millis(3));
            let began = clock.now();
            guest.ring.read(round, 0, 4096).unwrap();
            guest.ring.push();
            let mut data = [0; 4096];
            while guest.ring.reap(&mut data).unwrap().is_none() {
                assert!(clock.now() - began < 20_000_000_000, "no answer");
                std::hint::spin_loop();
            }
            times.push(clock.now() - began);
        }
        let slept = sleeps() - before;
        ours.stop();
        times.sort_unstable();
        ([times[times.len() / 10], times[times.len() / 2]], slept)
    };
    let (polled, none) = measured(Policy::Poll);
    let (woken, slept) = measured(Policy::Adaptive);
    // On a busy machine only the fastest say something.
    tell!(
        "a read takes (fastest tenth, half; ns) {polled:?} if the reactor polls, {woken:?} if it sleeps"
    );
    assert_eq!(none, 0);
    // Busy machines may keep a reactor from falling asleep in time.
    assert!(slept > ROUNDS / 2, "it slept {slept} times before {ROUNDS} requests");
}
