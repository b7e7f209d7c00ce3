//! Guests without persistent grants.

use super::*;

/// Grant copies: all rings of a reactor share its calls, and none of them takes memory.
#[test]
fn copies_of_all_guests_are_at_most_one_call_a_turn_and_take_no_memory() {
    let world = World::new();
    let ours = world.serve(1, Notify::Thread);
    let mut guests: Vec<Guest> = (1..=4)
        .map(|domid| {
            let path = world.image(&domid.to_string());
            world.plug(domid, "w", &node(&path));
            Guest::start(&world, domid, Setup { persistent: false, ..SETUP })
        })
        .collect();
    let mailbox = ours.reactors.iter().next().unwrap().mailbox().clone();
    let measure = || {
        let of_reactor = mailbox.ask(|core| {
            let stats = core.stats();
            (::bench::allocations(), stats.turns.get() - stats.idle_turns.get())
        });
        (of_reactor.unwrap(), world.host.calls())
    };
    let (mut before, data, mut back) = (None, [5; 32 << 10], [0; 32 << 10]);
    for round in 0..40 {
        // Clusters are allocated, and the tables of the images loaded.
        if round == 8 {
            before = Some(measure());
        }
        for (n, guest) in guests.iter_mut().enumerate() {
            for i in 0..8 {
                let len = [4096, 512, 32 << 10, 12 << 10][(n + i) % 4];
                let sector = i as u64 * 128;
                match (round + i) % 2 {
                    0 => guest.ring.write(i as u64, sector, &data[..len]).unwrap(),
                    _ => guest.ring.read(i as u64, sector, len as u32).unwrap(),
                }
            }
            guest.ring.push();
        }
        for guest in &mut guests {
            (0..8).for_each(|_| assert!(guest.answer(&mut back)));
        }
    }
    let (before, after) = (before.unwrap(), measure());
    let [calls, segments] =
        [after.1.copies - before.1.copies, after.1.segments - before.1.segments];
    let turns = after.0.1 - before.0.1;
    tell!("{segments} copies of 1024 requests by {calls} calls in {turns} turns");
    assert!(segments > 2048 && calls <= turns, "{segments} {calls} {turns}");
    assert_eq!(after.0.0, before.0.0, "allocations on the reactor");
    ours.stop();
}
