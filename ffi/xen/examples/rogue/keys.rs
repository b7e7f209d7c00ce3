//! What a frontend writes into xenstore before it is connected: each wrong key is refused in words.

use xen::store::Nodes;

use crate::device::{Device, keys};
use crate::guest::{DOM0, Granted};
use crate::ring::{READ, direct};
use crate::{Fault, OKAY, Outcome, Trick, equal, hold};

pub(crate) const TRICKS: [Trick; 6] = [
    ("wrong values", values),
    ("pages that are not granted", grants),
    ("ports of others", ports),
    ("a ring that is wrong from the start", born_wrong),
    ("one page for two rings", twice),
    ("states that do not exist", states),
];

/// Nothing that is granted, and no port, has these numbers.
const NO_GRANT: u32 = 20_000;
const NO_PORT: u32 = 4_000;
/// A domain that is not there.
const NOBODY: u16 = 999;

/// Right keys but for these (or without them), and what the backend says of it.
fn refused(device: &Device, wrong: &[(&str, Option<&str>)], why: &str) -> Outcome {
    let ring = device.ring(0)?;
    device.offer(&ring)?;
    for (key, value) in wrong {
        match value {
            Some(value) => device.write(key, value)?,
            None => device.store.rm(format!("{}/{key}", device.front))?,
        }
    }
    device.write("state", "3")?;
    device.refuses(why)?;
    device.rewind()
}

fn values(device: &Device) -> Outcome {
    let long = "1".repeat(1900);
    let (number, few, most) = ("is not a number", "is not within 1 to 4", "is not within 0 to 2");
    for (key, value, why) in [
        ("ring-ref", None, "is missing"),
        ("ring-ref", Some("8x"), number),
        ("ring-ref", Some("-1"), number),
        ("ring-ref", Some("4294967296"), "is not within 0 to 4294967295"),
        ("ring-ref", Some(&long), "is too long"),
        ("event-channel", None, "is missing"),
        ("event-channel", Some("0"), "is not within"),
        ("event-channel", Some(""), number),
        ("ring-page-order", Some("3"), most),
        ("ring-page-order", Some("4294967295"), most),
        ("num-ring-pages", Some("3"), few),
        ("multi-queue-num-queues", Some("5"), few),
        ("multi-queue-num-queues", Some("0"), few),
        ("protocol", Some("x86_128-abi"), "is not known"),
        ("feature-persistent", Some("maybe"), number),
    ] {
        refused(device, &[(key, value)], &format!("frontend key {key}: {why}"))
            .map_err(|e| format!("{key} = {:.20?}: {e}", value))?;
    }
    Ok(())
}

/// Keys of a ring whose pages are these, and what the backend says of it.
fn refused_pages(device: &Device, grefs: &[u32]) -> Outcome {
    let port = device.ports.alloc(DOM0)?;
    for (key, value) in keys(grefs, port) {
        device.write(&key, value)?;
    }
    device.write("state", "3")?;
    device.refuses("a grant reference cannot be mapped")?;
    device.rewind()?;
    Ok(device.ports.close(port)?)
}

fn grants(device: &Device) -> Outcome {
    let good = Granted::new(DOM0, 4, true)?;
    let (read_only, others) = (Granted::new(DOM0, 1, false)?, Granted::new(NOBODY, 1, true)?);
    for bad in [NO_GRANT, u32::MAX, read_only.grefs[0], others.grefs[0]] {
        let g = &good.grefs;
        refused_pages(device, &[bad]).map_err(|e| format!("{bad}: {e}"))?;
        refused_pages(device, &[g[0], g[1], bad, g[2]]).map_err(|e| format!("{bad}: {e}"))?;
    }
    Ok(())
}

fn ports(device: &Device) -> Outcome {
    let others = device.ports.alloc(NOBODY)?;
    for port in [NO_PORT, u32::MAX, others] {
        let port = port.to_string();
        refused(device, &[("event-channel", Some(&port))], "cannot bind to event channel")?;
    }
    device.ports.close(others)?;
    let closed = device.ring(0)?;
    device.offer(&closed)?;
    device.ports.close(closed.port)?;
    device.write("state", "3")?;
    device.refuses("cannot bind to event channel")?;
    device.rewind()?;
    // Two rings with the port of the first: the second is refused, and nothing is left of the first.
    let ring = device.ring(0)?;
    two_queues(device, ring.pages.grefs[0], [ring.port; 2])?;
    device.refuses("cannot bind to event channel")?;
    Ok(())
}

/// Keys of two rings in one page, and the step to state 3.
fn two_queues(device: &Device, gref: u32, ports: [u32; 2]) -> Outcome {
    device.write("protocol", "x86_64-abi")?;
    device.write("multi-queue-num-queues", "2")?;
    for (i, port) in ports.into_iter().enumerate() {
        device.write(&format!("queue-{i}/ring-ref"), gref.to_string())?;
        device.write(&format!("queue-{i}/event-channel"), port.to_string())?;
    }
    device.write("state", "3")
}

/// Indices that no ring can have are found when it is attached to.
fn born_wrong(device: &Device) -> Outcome {
    for index in [33, 1000, u32::MAX] {
        let ring = device.ring(0)?;
        device.offer(&ring)?;
        ring.jump(index)?;
        device.write("state", "3")?;
        device.refuses("request producer")?;
        device.rewind()?;
    }
    Ok(())
}

/// Two backends on one page. Whatever answers they write over each other's, they end.
fn twice(device: &Device) -> Outcome {
    let mut ring = device.ring(0)?;
    let second = device.ports.alloc(DOM0)?;
    two_queues(device, ring.pages.grefs[0], [ring.port, second])?;
    device.becomes("4")?;
    device.write("state", "4")?;
    let data = Granted::new(DOM0, 1, true)?;
    for _ in 0..20 {
        ring.put(direct(READ, 1, 0, &[(data.grefs[0], 0, 7)]));
    }
    ring.push()?;
    device.ports.notify(second)?;
    hold!(ring.more(30_000) > 0);
    device.rewind()?;
    Ok(device.ports.close(second)?)
}

fn states(device: &Device) -> Outcome {
    for state in ["9", "x", "", "-1", "4294967300", &"4".repeat(1900)] {
        let mut ring = device.connect(0, &[])?;
        let data = Granted::new(DOM0, 1, true)?;
        equal!(ring.ask(direct(READ, 1, 0, &[(data.grefs[0], 0, 7)]))?.2, OKAY);
        device.write("state", state)?;
        device
            .refuses("the frontend's state is no XenbusState")
            .map_err(|e| Fault::from(format!("state {state:.20}: {e}")))?;
        device.rewind()?;
    }
    Ok(())
}
