//! Requests that are wrong in one field each, and grants that do not hold what the request says.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::Device;
use crate::guest::{DOM0, Granted};
use crate::ring::{
    BARRIER, DISCARD, FLUSH, INDIRECT, READ, Request, Response, WRITE, direct, discard, indirect,
    segment,
};
use crate::{ERROR, OKAY, Outcome, PAGE, Trick, UNSUPPORTED, equal, hold};

pub(crate) const TRICKS: [Trick; 3] = [
    ("fields that are wrong", fields),
    ("lists that are wrong", lists),
    ("a list that changes while it is read", changing_list),
];

pub(crate) const GRANTS: [Trick; 4] = [
    ("grants that are wrong", wrong_grants),
    ("one page for all", one_page),
    ("grants taken back in flight", revoked),
    ("more pages than are kept mapped", persistent),
];

/// Most segments of an indirect request that the backend offers, and the pages it may keep mapped for a
/// ring of one page: one for each segment of each of 32 requests, and one for the list of each.
const SEGMENTS: u16 = 32;
const KEPT: usize = 32 * (32 + 1);

/// Nothing that is granted has this number.
const NO_GRANT: u32 = 20_000;

fn statuses(answers: &[Response]) -> Vec<i16> {
    answers.iter().map(|a| a.2).collect()
}

fn fields(device: &Device) -> Outcome {
    let mut ring = device.connect(0, &[])?;
    let data = Granted::new(DOM0, 1, true)?;
    let (g, end) = (data.grefs[0], device.sectors()?);
    let page = [(g, 0, 7); 11];
    let one = |op, sector| direct(op, 1, sector, &page);
    let part = |op, first, last| direct(op, 1, 0, &[(g, first, last)]);
    let bad_one = |op| direct(op, 2, 0, &[(g, 0, 7), (g, 5, 4)]);
    let cases: Vec<(Request, u8, i16)> = vec![
        // How many segments.
        (direct(READ, 0, 0, &[]), READ, ERROR),
        (direct(WRITE, 0, 0, &[]), WRITE, ERROR),
        (direct(READ, 12, 0, &page), READ, ERROR),
        (direct(WRITE, 255, 0, &page), WRITE, ERROR),
        (direct(FLUSH, 12, 0, &page), FLUSH, ERROR),
        (direct(READ, 11, 0, &page), READ, OKAY),
        (direct(FLUSH, 0, 0, &[]), FLUSH, OKAY),
        // Which sectors of a page.
        (part(READ, 1, 0), READ, ERROR),
        (part(WRITE, 7, 6), WRITE, ERROR),
        (part(READ, 0, 8), READ, ERROR),
        (part(WRITE, 0, 255), WRITE, ERROR),
        (part(READ, 255, 255), READ, ERROR),
        (part(READ, 7, 7), READ, OKAY),
        (bad_one(READ), READ, ERROR),
        (bad_one(WRITE), WRITE, ERROR),
        (bad_one(FLUSH), FLUSH, ERROR),
        // Where on the disk.
        (one(READ, end), READ, ERROR),
        (one(WRITE, end - 7), WRITE, ERROR),
        (one(READ, u64::MAX), READ, ERROR),
        (one(WRITE, u64::MAX - 7), WRITE, ERROR),
        (one(READ, 1 << 55), READ, ERROR),
        (one(FLUSH, end), FLUSH, ERROR),
        (one(READ, end - 8), READ, OKAY),
        (discard(0, u64::MAX), DISCARD, ERROR),
        (discard(u64::MAX, 1), DISCARD, ERROR),
        (discard(end, 1), DISCARD, ERROR),
        (discard(1, end), DISCARD, ERROR),
        (discard(0, 0), DISCARD, OKAY),
        (discard(0, end), DISCARD, OKAY),
        // What is asked.
        (one(BARRIER, 0), BARRIER, UNSUPPORTED),
        (one(4, 0), 4, UNSUPPORTED),
        (one(7, 0), 7, UNSUPPORTED),
        (one(255, 0), 255, UNSUPPORTED),
        (indirect(INDIRECT, 1, 0, g), INDIRECT, ERROR),
        (indirect(FLUSH, 1, 0, g), FLUSH, ERROR),
        (indirect(255, 1, 0, g), 255, ERROR),
        // How many segments in a list, and where it begins.
        (indirect(READ, 0, 0, g), READ, ERROR),
        (indirect(WRITE, SEGMENTS + 1, 0, g), WRITE, ERROR),
        (indirect(READ, 512, 0, g), READ, ERROR),
        (indirect(READ, u16::MAX, 0, g), READ, ERROR),
        (indirect(READ, 1, u64::MAX, g), READ, ERROR),
        (indirect(WRITE, 1, end + 1, g), WRITE, ERROR),
    ];
    for (request, op, status) in cases {
        let [head, _, sector, ..] = request;
        let (_, its, ended) = ring.ask(request)?;
        if (its, ended) != (op, status) {
            return Err(format!(
                "a request {head:#x} at {sector} was answered {ended} for operation {its}, not {status} \
                 for {op}"
            )
            .into());
        }
    }
    Ok(())
}

/// Writes a list of segments into a page.
fn write_list(page: &Granted, list: impl IntoIterator<Item = (u32, u8, u8)>) {
    for (i, part) in list.into_iter().enumerate() {
        let word = segment(part);
        page.store32(8 * i, word as u32);
        page.store32(8 * i + 4, (word >> 32) as u32);
    }
}

fn lists(device: &Device) -> Outcome {
    let mut ring = device.connect(0, &[])?;
    let (list, data) = (Granted::new(DOM0, 1, true)?, Granted::new(DOM0, 1, true)?);
    let (l, g, end) = (list.grefs[0], data.grefs[0], device.sectors()?);
    write_list(&list, [(g, 0, 7); 32]);
    for op in [READ, WRITE] {
        equal!(ring.ask(indirect(op, 32, 0, l))?.1, op);
        equal!(ring.ask(indirect(op, 32, 8, l))?.2, OKAY);
        // Only the whole of it is too long.
        equal!(ring.ask(indirect(op, 32, end - 255, l))?.2, ERROR);
        equal!(ring.ask(indirect(op, 32, 0, NO_GRANT))?.2, ERROR);
        equal!(ring.ask(indirect(op, 32, 0, u32::MAX))?.2, ERROR);
    }
    for bad in [(g, 1, 0), (g, 0, 8), (g, 255, 255), (NO_GRANT, 0, 7), (u32::MAX, 0, 7)] {
        for at in [0, 17, 31] {
            write_list(&list, (0..32).map(|i| if i == at { bad } else { (g, 0, 7) }));
            equal!(ring.ask(indirect(READ, 32, 0, l))?.2, ERROR);
            equal!(ring.ask(indirect(WRITE, 32, 0, l))?.2, ERROR);
        }
    }
    Ok(())
}

/// Each time that it is looked at it is another one. Whatever is made of it, it is answered, once.
fn changing_list(device: &Device) -> Outcome {
    let mut ring = device.connect(0, &[])?;
    let (list, data) = (Granted::new(DOM0, 1, true)?, Granted::new(DOM0, 1, true)?);
    let (l, g, end) = (list.grefs[0], data.grefs[0], device.sectors()?);
    let over = AtomicBool::new(false);
    let mut seen = [0; 2];
    std::thread::scope(|scope| -> Outcome {
        scope.spawn(|| {
            let mut n = 1u32;
            while !over.load(Ordering::Relaxed) {
                n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let gref = if n & 0x30_0000 == 0 { n } else { g };
                let last = if n & 0xc0_0000 == 0 { (n >> 24) as u8 } else { 7 };
                let at = (n >> 8 & 31) as usize;
                list.store32(8 * at, gref);
                list.store32(8 * at + 4, u32::from(last) << 8);
            }
        });
        let mut play = || -> Outcome {
            for round in 0..12 {
                for i in 0..32 {
                    let op = if i & 1 == 0 { READ } else { WRITE };
                    let at = if round & 1 == 0 { 0 } else { end - 250 };
                    ring.put(indirect(op, SEGMENTS, at, l));
                }
                ring.push()?;
                let answers = ring.take()?;
                equal!(answers.len(), 32);
                for (i, (id, op, status)) in answers.into_iter().enumerate() {
                    equal!(
                        (id, op),
                        (round * 32 + i as u64, if i & 1 == 0 { READ } else { WRITE })
                    );
                    hold!(status == OKAY || status == ERROR);
                    seen[usize::from(status == OKAY)] += 1;
                }
            }
            Ok(())
        };
        let done = play();
        over.store(true, Ordering::Relaxed);
        done
    })?;
    println!("   {} of the changing lists were right, {} were not", seen[1], seen[0]);
    Ok(())
}

fn wrong_grants(device: &Device) -> Outcome {
    let (good, read_only) = (Granted::new(DOM0, 1, true)?, Granted::new(DOM0, 1, false)?);
    let others = Granted::new(999, 1, true)?;
    let (g, r, o) = (good.grefs[0], read_only.grefs[0], others.grefs[0]);
    for persistent in ["0", "1"] {
        let mut ring = device.connect(0, &[("feature-persistent", persistent)])?;
        for at in 0..PAGE {
            good.set(at, 0x77);
            read_only.set(at, 0x33);
        }
        equal!(ring.ask(direct(WRITE, 1, 0, &[(g, 0, 7)]))?.2, OKAY);
        for bad in [r, o, NO_GRANT, u32::MAX] {
            equal!(ring.ask(direct(READ, 1, 0, &[(bad, 0, 7)]))?.2, ERROR);
            equal!(ring.ask(direct(READ, 3, 0, &[(g, 0, 7), (g, 0, 7), (bad, 0, 7)]))?.2, ERROR);
        }
        hold!((0..PAGE).all(|at| read_only.get(at) == 0x33));
        for bad in [o, NO_GRANT, u32::MAX] {
            equal!(ring.ask(direct(WRITE, 1, 8, &[(bad, 0, 7)]))?.2, ERROR);
            equal!(ring.ask(direct(WRITE, 2, 8, &[(g, 0, 7), (bad, 0, 7)]))?.2, ERROR);
        }
        // To be read it may be granted so.
        equal!(ring.ask(direct(WRITE, 1, 16, &[(r, 0, 7)]))?.2, OKAY);
        equal!(ring.ask(direct(READ, 1, 16, &[(g, 0, 7)]))?.2, OKAY);
        hold!((0..PAGE).all(|at| good.get(at) == 0x33));
        device.rewind()?;
    }
    Ok(())
}

/// All segments of all requests are one page, and all requests have one id.
fn one_page(device: &Device) -> Outcome {
    let data = Granted::new(DOM0, 1, true)?;
    let g = data.grefs[0];
    for persistent in ["0", "1"] {
        let mut ring = device.connect(2, &[("feature-persistent", persistent)])?;
        let slots = ring.slots();
        for round in 0..3 {
            for _ in 0..slots {
                let mut request = direct(READ, 11, 88, &[(g, 0, 7); 11]);
                request[1] = u64::MAX;
                ring.put_as_is(request);
            }
            ring.push()?;
            let answers = ring.take()?;
            equal!((round, answers.len()), (round, slots as usize));
            hold!(answers.iter().all(|&a| a == (u64::MAX, READ, OKAY)));
        }
        device.rewind()?;
    }
    Ok(())
}

/// Pages are not granted any more while the requests that name them are under way.
fn revoked(device: &Device) -> Outcome {
    let mut seen = [0; 2];
    for persistent in ["0", "1"] {
        let mut ring = device.connect(0, &[("feature-persistent", persistent)])?;
        for round in 0..12u64 {
            let data = Granted::new(DOM0, 32, true)?;
            for (i, &g) in data.grefs.iter().enumerate() {
                let op = if i & 1 == 0 { READ } else { WRITE };
                ring.put(direct(op, 1, 8 * (32 * round + i as u64), &[(g, 0, 7)]));
            }
            ring.push()?;
            drop(data);
            let ends = statuses(&ring.take()?);
            equal!(ends.len(), 32);
            hold!(ends.iter().all(|&s| s == OKAY || s == ERROR));
            ends.iter().for_each(|&s| seen[usize::from(s == OKAY)] += 1);
        }
        device.rewind()?;
    }
    println!(
        "   of requests whose grants were taken back {} ended well, {} did not",
        seen[1], seen[0]
    );
    Ok(())
}

/// With persistent grants: more pages than the backend keeps mapped. The others are copied.
fn persistent(device: &Device) -> Outcome {
    let pages = KEPT + 200;
    std::fs::write("/sys/module/xen_gntalloc/parameters/limit", (pages + 200).to_string())?;
    for _ in 0..2 {
        let mut ring = device.connect(0, &[("feature-persistent", "1")])?;
        // The kernel grants at most so many at a time.
        let lots = (0..pages).step_by(128).map(|at| Granted::new(DOM0, 128.min(pages - at), true));
        let lots = lots.collect::<Result<Vec<_>, _>>()?;
        let grefs: Vec<u32> = lots.iter().flat_map(|lot| &lot.grefs).copied().collect();
        equal!(grefs.len(), pages);
        for _ in 0..2 {
            for some in grefs.chunks(32 * 11) {
                for each in some.chunks(11) {
                    let segments: Vec<_> = each.iter().map(|&g| (g, 0, 7)).collect();
                    ring.put(direct(READ, each.len() as u8, 0, &segments));
                }
                ring.push()?;
                hold!(statuses(&ring.take()?).iter().all(|&s| s == OKAY));
            }
        }
        device.rewind()?;
    }
    Ok(())
}
