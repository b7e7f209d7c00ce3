//! Indices and slots that change under the backend, and storms: of events, connections, states, keys. At
//! last the end in the middle of all.

use std::sync::atomic::{AtomicBool, Ordering};

use reactor::Clock;
use xen::store::Nodes;

use crate::device::Device;
use crate::guest::{DOM0, Granted};
use crate::ring::{READ, Request, Ring, WRITE, direct, indirect};
use crate::{ERROR, OKAY, Outcome, Trick, UNSUPPORTED, equal, hold};

pub(crate) const RING: [Trick; 3] = [
    ("a producer that runs away", runaway),
    ("indices of the backend's that are overwritten", overwritten),
    ("slots that change while they are read", changing_slots),
];

pub(crate) const STORMS: [Trick; 6] = [
    ("events without end", events),
    ("coming and going", coming_and_going),
    ("broken and made anew", broken_again),
    ("a kernel that starts anew in the middle", anew),
    ("states without end", toggling),
    ("keys without end", garbage),
];

const SECOND: u64 = 1_000_000_000;

/// A full ring of requests for one page, and the page.
fn fill(ring: &mut Ring<'_>) -> Result<Granted, crate::Fault> {
    let data = Granted::new(DOM0, 1, true)?;
    for i in 0..ring.slots() {
        let op = if i & 1 == 0 { WRITE } else { READ };
        ring.put(direct(op, 11, 88 * u64::from(i), &[(data.grefs[0], 0, 7); 11]));
    }
    ring.push()?;
    Ok(data)
}

/// The ring is given up: nothing more is answered, the toolstack is told, and the frontend too.
fn runaway(device: &Device) -> Outcome {
    for jump in [33, u32::MAX] {
        let mut ring = device.connect(0, &[])?;
        let data = Granted::new(DOM0, 1, true)?;
        let read = direct(READ, 1, 0, &[(data.grefs[0], 0, 7)]);
        equal!(ring.ask(read)?.2, OKAY);
        ring.put(read);
        ring.jump(1u32.wrapping_add(jump))?;
        equal!(ring.more(3000), 0);
        ring.push()?;
        equal!(ring.more(3000), 0);
        device.refuses("the guest broke its ring")?;
        device.rewind()?;
    }
    Ok(())
}

/// The backend goes by its own indices, whatever stands in the shared ones.
fn overwritten(device: &Device) -> Outcome {
    let mut ring = device.connect(0, &[])?;
    let data = Granted::new(DOM0, 1, true)?;
    let clock = Clock::real();
    for round in 0..40u32 {
        let answered = ring.answered();
        ring.scribble(round.wrapping_mul(0x9e37_79b9));
        ring.put(direct(READ, 1, 0, &[(data.grefs[0], 0, 7)]));
        ring.push()?;
        let end = clock.now() + 60 * SECOND;
        while ring.answered() != answered.wrapping_add(1) {
            hold!(clock.now() < end);
            // Without an event: where it is asked for was overwritten.
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        equal!(ring.take()?.len(), 1);
    }
    Ok(())
}

/// As many answers as requests, whatever they are made to.
fn changing_slots(device: &Device) -> Outcome {
    let mut ring = device.connect(0, &[])?;
    let data = Granted::new(DOM0, 1, true)?;
    let g = data.grefs[0];
    let over = AtomicBool::new(false);
    let slots = ring.slots();
    for round in 0..30 {
        for i in 0..slots {
            ring.put(if i & 1 == 0 {
                direct(WRITE, 11, 0, &[(g, 0, 7); 11])
            } else {
                indirect(READ, 32, 0, g)
            });
        }
        let pages = &ring.pages;
        over.store(false, Ordering::Relaxed);
        std::thread::scope(|scope| -> Outcome {
            let writer = scope.spawn(|| {
                let mut n: u32 = 12_345 + round;
                while !over.load(Ordering::Relaxed) {
                    n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let at = 64 + 4 * (n >> 8) as usize % (28 * slots as usize);
                    pages.store32(at, if n & 0x80 == 0 { n } else { n >> 28 });
                }
            });
            let pushed = ring.push();
            let clock = Clock::real();
            let end = clock.now() + 60 * SECOND;
            while ring.answered() != slots * (round + 1) && clock.now() < end {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            over.store(true, Ordering::Relaxed);
            let _ = writer.join();
            pushed
        })?;
        equal!(ring.answered(), slots * (round + 1));
        equal!(ring.take()?.len(), slots as usize);
    }
    Ok(())
}

fn events(device: &Device) -> Outcome {
    let mut ring = device.connect(0, &[])?;
    let data = Granted::new(DOM0, 1, true)?;
    let clock = Clock::real();
    let (end, mut sent) = (clock.now() + 5 * SECOND, 0u64);
    while clock.now() < end {
        for _ in 0..100 {
            device.ports.notify(ring.port)?;
        }
        sent += 100;
    }
    println!("   {sent} events");
    equal!(ring.ask(direct(READ, 1, 0, &[(data.grefs[0], 0, 7)]))?.2, OKAY);
    Ok(())
}

/// Connected and closed in all ways, most times with a ring that is full.
fn coming_and_going(device: &Device) -> Outcome {
    for round in 0..12 {
        let mut ring = device.connect(round % 3, &[])?;
        let _data = if round % 4 > 0 { Some(fill(&mut ring)?) } else { None };
        match round % 3 {
            0 => device.write("state", "5")?,
            1 => device.write("state", "1")?,
            _ => {}
        }
        device.rewind()?;
    }
    Ok(())
}

/// A guest that breaks its ring as often as it can: what is logged of it must not grow with that.
fn broken_again(device: &Device) -> Outcome {
    for _ in 0..12 {
        let ring = device.connect(0, &[])?;
        ring.jump(1000)?;
        device.rewind()?;
    }
    Ok(())
}

/// A kernel that finds the device in use walks the backend back; it waits 5 seconds for each step. Here
/// on a machine that is slower than any real one.
fn anew(device: &Device) -> Outcome {
    let clock = Clock::real();
    for _ in 0..3 {
        let mut ring = device.connect(2, &[("feature-persistent", "1")])?;
        let _data = fill(&mut ring)?;
        for (own, other) in [("5", "5"), ("6", "6"), ("1", "2")] {
            let start = clock.now();
            device.write("state", own)?;
            device.becomes(other)?;
            hold!(clock.now() - start < 15 * SECOND);
        }
        // Another kernel, another ring, without a word.
        device.offer(&device.ring(0)?)?;
    }
    Ok(())
}

/// From state to state without ever waiting for the backend.
fn toggling(device: &Device) -> Outcome {
    let ring = device.ring(0)?;
    device.offer(&ring)?;
    let clock = Clock::real();
    let (end, mut count) = (clock.now() + 8 * SECOND, 0u64);
    while clock.now() < end {
        for state in ["3", "6", "1", "4", "5", "3", "1", "7", "3", "4", "6"] {
            device.write("state", state)?;
            count += 1;
        }
    }
    println!("   {count} states");
    Ok(())
}

/// Values as long as the store allows, under keys that the backend reads and others, as fast as can be;
/// and keys until the store takes no more. The backend is asked to connect all the while.
fn garbage(device: &Device) -> Outcome {
    let ring = device.ring(0)?;
    device.offer(&ring)?;
    let clock = Clock::real();
    let (end, mut count) = (clock.now() + 8 * SECOND, 0u64);
    let long = "9".repeat(1900);
    device.write("state", "3")?;
    while clock.now() < end {
        for key in ["ring-ref", "event-channel", "protocol", "queue-0/ring-ref0", "junk/a", "state"]
        {
            device.write(key, &long)?;
            device.write(key, "3")?;
            count += 2;
        }
    }
    let mut made = 0;
    while made < 5000 && device.write(&format!("junk/{made}"), "").is_ok() {
        made += 1;
    }
    println!("   {count} writes, and {made} keys");
    Ok(())
}

/// The folder goes with requests in flight: as if the guest were destroyed.
pub(crate) fn vanish(device: &Device) -> Outcome {
    let mut ring = device.connect(2, &[])?;
    let _data = fill(&mut ring)?;
    device.store.rm(&device.front)?;
    device.becomes("6")
}

/// Requests of all kinds without end, until somebody ends the guest. Says when they begin.
pub(crate) fn flood(device: &Device) -> Outcome {
    let mut ring = device.connect(2, &[("feature-persistent", "1")])?;
    let data = Granted::new(DOM0, 128, true)?;
    let end = device.sectors()?;
    println!("flooding");
    for n in 0u64.. {
        for i in 0..u64::from(ring.slots()) {
            let g = data.grefs[(i % 128) as usize];
            let sector = (n.wrapping_mul(7919) + i * 104_729) % end;
            let op = [READ, WRITE, WRITE, 3][(i % 4) as usize];
            let request: Request = direct(op, (i % 13) as u8, sector, &[(g, 0, 7); 11]);
            ring.put(request);
        }
        ring.push()?;
        for (_, _, status) in ring.take()? {
            hold!([OKAY, ERROR, UNSUPPORTED].contains(&status));
        }
    }
    Ok(())
}
