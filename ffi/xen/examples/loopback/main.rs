//! Tries the crate on a real Xen, in dom0 alone: dom0 grants pages to itself, sends itself events, and
//! talks to its xenstore in both ways. Prints a line for each part; the status is 1 if one failed.
//!
//! A domain of another kind than PV cannot map its own grants: Xen then takes the page away from where it
//! was, under the kernel's feet. There only the rest is tried.
//!
//! `loopback` in a dom0 with the modules xen-gntdev, xen-gntalloc and xen-evtchn, as root.

mod guest;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dma::{PageSize, Region};
use guest::{DOM0, Granted, Ports};
use reactor::Wake;
use xen::evtchn::{Events, Listener, Notifier};
use xen::gntdev::{Copier, Copy, Direction, Gntdev, MapError, Mapped, Mapper, Pages};
use xen::store::{Event, Nodes, Perm, Store};

type Outcome = Result<(), Box<dyn Error>>;
type Part = (&'static str, fn() -> Outcome);

const PAGE: usize = 4096;
const SOON: Option<Duration> = Some(Duration::from_secs(10));

/// As `assert!`, but an error.
macro_rules! hold {
    ($that:expr) => {
        if !$that {
            return Err(concat!(stringify!($that), " does not hold").into());
        }
    };
}

fn main() -> ExitCode {
    let kind = std::fs::read_to_string("/sys/hypervisor/guest_type").unwrap_or_default();
    let parts: [Part; 5] = [
        ("store by the socket", || store(Store::connect()?)),
        ("store by the device", || store(Store::connect_to(Path::new("/dev/xen/xenbus"))?)),
        ("events", events),
        ("notifier and listener", helpers),
        ("copies", copies),
    ];
    let mappings: [Part; 3] =
        [("mapping", mapping), ("bad references", bad_references), ("mapper", mapper)];
    let maps = kind.trim() == "PV";
    if !maps {
        println!("skipped: mappings, in a domain that is {}", kind.trim());
    }
    let mut good = true;
    for (name, part) in parts.iter().chain(mappings.iter().filter(|_| maps)) {
        match part() {
            Ok(()) => println!("ok {name}"),
            Err(e) => {
                good = false;
                println!("FAIL {name}: {e}");
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn store(store: Store) -> Outcome {
    let other = Store::connect()?;
    store.rm("/polldisk-test")?;
    hold!(store.read("/polldisk-test/a")?.is_none());
    store.write("/polldisk-test/a", b"\xff value")?;
    hold!(other.read("/polldisk-test/a")?.as_deref() == Some(&b"\xff value"[..]));
    let perms = [Perm::none(0), Perm::read(7)];
    store.set_perms("/polldisk-test/a", &perms)?;
    hold!(other.perms("/polldisk-test/a")? == Some(perms.to_vec()));
    let event = |path: &str| Some(Event { token: 5, path: path.into() });
    store.watch("/polldisk-test", 5)?;
    hold!(store.next_event(SOON)? == event("/polldisk-test"));
    other.write("/polldisk-test/b/c", "")?;
    hold!(store.next_event(SOON)? == event("/polldisk-test/b/c"));
    let mut tries = 0;
    store.transaction(|t| -> Result<(), xen::store::Error> {
        tries += 1;
        t.read("/polldisk-test/a")?;
        if tries == 1 {
            other.write("/polldisk-test/a", "changed")?;
        }
        t.write("/polldisk-test/d", "")
    })?;
    hold!(tries == 2);
    hold!(store.next_event(SOON)? == event("/polldisk-test/a"));
    hold!(store.next_event(SOON)? == event("/polldisk-test/d"));
    store.unwatch(5)?;
    for i in 0..400 {
        store.mkdir(format!("/polldisk-test/many/name-number-{i:03}"))?;
    }
    match store.directory("/polldisk-test/many") {
        Err(e) if e.refusal() == Some(nix::errno::Errno::ENOSYS) => {
            println!("   this store has no lists longer than a message");
        }
        names => {
            let names = names?.unwrap_or_default();
            hold!(names.len() == 400 && names.iter().all(|n| n.len() == 15));
        }
    }
    hold!(store.watch("/polldisk-test", 6).is_ok());
    store.rm("/polldisk-test")?;
    hold!(store.directory("/polldisk-test")?.is_none());
    hold!(store.rm("/").is_err_and(|e| e.refusal().is_some()));
    hold!(store.read("/")?.is_some());
    Ok(())
}

fn events() -> Outcome {
    let (ports, events) = (Ports::new()?, Events::open()?);
    let port = ports.alloc(DOM0)?;
    let local = events.bind(DOM0, port)?;
    let pending = || -> Result<Vec<u32>, xen::Error> {
        let mut all = [0; 16];
        for _ in 0..1000 {
            let n = events.pending(&mut all)?;
            if n > 0 {
                return Ok(all[..n].to_vec());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Vec::new())
    };
    hold!(pending()? == [local]);
    ports.notify(port)?;
    std::thread::sleep(Duration::from_millis(20));
    hold!(events.pending(&mut [0; 4])? == 0);
    events.unmask(&[local])?;
    hold!(pending()? == [local]);
    events.unmask(&[local])?;
    events.notify(local)?;
    hold!(ports.fired(1000));
    hold!(events.bind(DOM0, port).is_err());
    events.unbind(local)?;
    hold!(events.notify(local).is_err());
    // Again, as after a restart.
    let local = events.bind(DOM0, port)?;
    events.notify(local)?;
    hold!(ports.fired(1000));
    ports.close(port)?;
    hold!(events.bind(DOM0, port).is_err());
    Ok(())
}

fn helpers() -> Outcome {
    let (ports, events) = (Ports::new()?, Events::open()?);
    let port = ports.alloc(DOM0)?;
    let local = events.bind(DOM0, port)?;
    let wake = Wake::new()?;
    let listener = Listener::start(events.clone(), wake.clone())?;
    let notifier = Notifier::start(Some(Duration::from_millis(1)), None)?;
    let bell = notifier.bell(&events, local).ok_or("no bell")?;
    for _ in 0..20 {
        bell.ring();
        hold!(ports.fired(1000));
        wake.about_to_sleep();
        listener.rearm();
        ports.notify(port)?;
        let mut fds = [nix::poll::PollFd::new(wake.fd(), nix::poll::PollFlags::POLLIN)];
        hold!(nix::poll::poll(&mut fds, 2000u16)? == 1);
        wake.awake();
    }
    hold!(notifier.sent() == 20);
    Ok(())
}

fn mapping() -> Outcome {
    let device = Gntdev::open()?;
    for pages in [1, 4, 16] {
        let granted = Granted::new(DOM0, pages, true)?;
        let mapping = device.map(DOM0, &granted.grefs)?;
        for page in 0..pages {
            let at = page * PAGE + 8 * page;
            granted.store32(at, 0x42);
            hold!(mapping.load32(at, Ordering::Acquire) == 0x42);
            mapping.store64s(at + 8, &[0x5152_5354_5556_5758, 1]);
            hold!(granted.load32(at + 8) == 0x5556_5758 && granted.get(at + 15) == 0x51);
        }
        drop(mapping);
        // And once more.
        hold!(device.map(DOM0, &granted.grefs)?.load32(0, Ordering::Relaxed) == 0x42);
    }
    Ok(())
}

fn bad_references() -> Outcome {
    let device = Gntdev::open()?;
    let granted = Granted::new(DOM0, 4, true)?;
    let read_only = Granted::new(DOM0, 1, false)?;
    let g = &granted.grefs;
    for bad in [1_000_000, u32::MAX, read_only.grefs[0]] {
        let tried = device.map(DOM0, &[g[0], bad, g[1]]);
        hold!(matches!(tried, Err(MapError::Grant)));
    }
    hold!(matches!(device.map(999, g), Err(MapError::Grant)));
    // Nothing of that is left.
    device.map(DOM0, g)?;
    Ok(())
}

fn copies() -> Outcome {
    let mut copier = Copier::new(Gntdev::open()?);
    let granted = Granted::new(DOM0, 40, true)?;
    let read_only = Granted::new(DOM0, 1, false)?;
    let region = Region::new(42 * PAGE, PageSize::Small)?;
    let copy = |gref, offset, len, local, direction| Copy {
        domid: DOM0,
        gref,
        offset,
        len,
        region: &region,
        local,
        direction,
    };
    // More than one batch of the kernel's, and across pages of ours.
    for (i, _) in granted.grefs.iter().enumerate() {
        region.write(100 + i * PAGE, &[i as u8 + 1; PAGE]);
    }
    let out = granted.grefs.iter().enumerate();
    let out = out.map(|(i, &g)| copy(g, 0, 4096, 100 + i * PAGE, Direction::ToGuest));
    copier.copy(out)?;
    hold!(copier.statuses().all(|status| status == 0));
    for i in 0..40 {
        hold!(granted.get(i * PAGE) == i as u8 + 1 && granted.get(i * PAGE + 4095) == i as u8 + 1);
    }
    granted.set(512, 0x99);
    let (first, only) = (granted.grefs[0], read_only.grefs[0]);
    let mixed = [
        copy(first, 512, 1024, 0, Direction::FromGuest),
        copy(only, 0, 512, 4096, Direction::FromGuest),
        copy(only, 0, 512, 4096, Direction::ToGuest),
        copy(1_000_000, 0, 512, 4096, Direction::FromGuest),
        copy(first, 4000, 512, 4096, Direction::FromGuest),
        Copy { domid: 999, ..copy(first, 0, 512, 4096, Direction::FromGuest) },
    ];
    copier.copy(mixed)?;
    let ends: Vec<i16> = copier.statuses().collect();
    println!("   statuses {ends:?}");
    hold!(ends[..2] == [0, 0] && ends[4] == -10);
    hold!(ends[2] < 0 && ends[3] < 0 && ends[5] < 0);
    let mut byte = [0];
    region.read(0, &mut byte);
    hold!(byte == [0x99]);
    Ok(())
}

fn ends(pages: &mut Pages, count: usize) -> Result<Vec<Mapped>, Box<dyn Error>> {
    let mut all = Vec::new();
    for _ in 0..10_000 {
        all.extend(std::iter::from_fn(|| pages.next_mapped()));
        if all.len() == count {
            return Ok(all);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(format!("{} of {count} ends came", all.len()).into())
}

fn mapper() -> Outcome {
    let mapper = Mapper::start(Gntdev::open()?, 1000)?;
    let granted = Granted::new(DOM0, 100, true)?;
    let region = Region::new(PAGE, PageSize::Small)?;
    let mut pages = mapper.pages(DOM0, 128);
    for round in 0..3u8 {
        let bad = [1_000_000, 1_000_001];
        for &gref in granted.grefs.iter().chain(&bad) {
            hold!(pages.start_map(gref));
        }
        let ends = ends(&mut pages, 102)?;
        for end in &ends {
            let i = granted.grefs.iter().position(|&g| g == end.gref);
            hold!(i.is_some() == end.page.is_some());
            let (Some(i), Some(page)) = (i, end.page) else { continue };
            granted.set(i * PAGE + 7, i as u8 ^ round);
            pages.read(page, 0, &region, 0, 4096);
            let mut bytes = [0; 8];
            region.read(0, &mut bytes);
            hold!(bytes[7] == i as u8 ^ round);
            region.write(0, &[0xee; 16]);
            pages.write(page, 2048, &region, 0, 16);
            hold!(granted.get(i * PAGE + 2048) == 0xee && granted.get(i * PAGE + 2063) == 0xee);
        }
        for page in ends.iter().filter_map(|e| e.page) {
            pages.unmap(page);
        }
        pages.settle();
    }
    Ok(())
}
