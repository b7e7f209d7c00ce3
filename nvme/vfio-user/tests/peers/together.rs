//! Our client and our server.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use dma::{PageSize, Region};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_user::wire::pci::{BAR0, CONFIG, MSIX};
use vfio_user::{Client, Error};

use crate::{BAR, LONG, Served, VECTORS, until};

const WORD: u64 = 0;
const ADDR: u64 = 8;
const LEN: u64 = 16;
const GO: u64 = 24;

fn connect(served: &Served) -> Client {
    Client::connect(served.path(), LONG).unwrap()
}

fn read(c: &Client, offset: u64) -> u64 {
    let mut b = [0; 8];
    c.read(BAR0, offset, &mut b).unwrap();
    u64::from_le_bytes(b)
}

fn write(c: &Client, offset: u64, value: u64) {
    c.write(BAR0, offset, &value.to_le_bytes()).unwrap();
}

/// Has the device do something, and waits for the outcome.
fn go(c: &Client, what: u64, addr: u64, len: u64) -> u64 {
    write(c, ADDR, addr);
    write(c, LEN, len);
    write(c, GO, what);
    until(|| read(c, GO) != 0);
    read(c, GO)
}

#[test]
fn registers_and_what_the_server_shares() {
    let served = Served::start();
    let c = connect(&served);
    assert!(c.info().reset && c.info().pci);
    let bar = c.region(BAR0).unwrap();
    assert_eq!((bar.size, bar.read, bar.write, bar.mapped.len()), (BAR, true, true, 1));
    let config = c.region(CONFIG).unwrap();
    assert_eq!((config.size, config.write, config.mapped.len()), (256, false, 0));
    assert_eq!(c.region(3).unwrap().size, 0);
    assert!(matches!(c.region(99), Err(Error::Refused { errno: 22, .. })));
    write(&c, WORD, 0x1122_3344_5566_7788);
    let mut part = [0; 3];
    c.read(BAR0, 1, &mut part).unwrap();
    assert_eq!(part, [0x77, 0x66, 0x55]);
    c.post(BAR0, WORD, 5);
    assert_eq!((read(&c, WORD), c.posted()), (5, 1), "in order");
    // The shared page, without a message.
    let page = &bar.mapped[0];
    assert_eq!((page.find(4096, 4), page.find(8188, 4)), (Some(0), Some(4092)));
    assert_eq!((page.find(4092, 4), page.find(8192, 4), page.find(8190, 4)), (None, None, None));
    page.memory.store32(page.find(4096, 4).unwrap(), 42, Ordering::Release);
    until(|| read(&c, 40) == 42);
    // Outside, and where it may not be written.
    assert!(c.read(BAR0, BAR - 1, &mut part).is_err());
    assert!(c.read(BAR0, u64::MAX, &mut part).is_err());
    assert!(c.write(CONFIG, 0, &[1]).is_err());
    assert!(c.read(CONFIG, 0, &mut [0; 256]).is_ok(), "what was refused did no harm");
    c.reset().unwrap();
    assert_eq!((served.resets.load(Ordering::Acquire), read(&c, WORD)), (1, 0));
}

#[test]
fn memory_until_it_is_taken_back() {
    let served = Served::start();
    let c = connect(&served);
    let region = Region::new(8192, PageSize::Small).unwrap();
    assert_eq!(go(&c, 1, 0x10000, 16), 2, "nothing is mapped there");
    c.map(0x10000, &region).unwrap();
    assert!(matches!(c.map(0x11000, &region), Err(Error::Refused { errno: 17, .. })));
    region.write(4090, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    assert_eq!(go(&c, 1, 0x10000 + 4090, 12), 1);
    let mut back = [0; 13];
    region.read(4090, &mut back);
    assert_eq!(back, [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0]);
    assert_eq!(go(&c, 1, 0x12000 - 4, 5), 2, "the last byte is outside");
    // Two windows side by side are one for the device.
    let second = Region::new(4096, PageSize::Small).unwrap();
    c.map(0x12000, &second).unwrap();
    assert_eq!(go(&c, 1, 0x12000 - 4, 5), 1);
    second.read(0, &mut back[..1]);
    assert_eq!(back[0], 1);
    write(&c, WORD, 0x55);
    assert_eq!(go(&c, 2, 0x12010, 0), 1);
    assert_eq!(second.read_words::<2>(16), [0x55, !0x55]);
    assert_eq!(go(&c, 2, 0x12018, 0), 2, "no multiple of 16");
    c.unmap(0x12000, &second).unwrap();
    assert_eq!(go(&c, 1, 0x12000, 1), 2);
    assert!(c.unmap(0x12000, &second).is_err());
    assert_eq!((region.tables(), second.tables()), (1, 0));
    assert_eq!(go(&c, 1, 0x10000, 1), 1, "the rest is as it was");
}

#[test]
fn interrupts() {
    let served = Served::start();
    let c = connect(&served);
    assert_eq!((c.irqs(MSIX).unwrap(), c.irqs(0).unwrap()), (VECTORS, 0));
    assert!(c.irqs(5).is_err());
    let fds: Vec<EventFd> = (0..VECTORS)
        .map(|_| EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap())
        .collect();
    let borrowed: Vec<_> = fds.iter().map(|e| e.as_fd()).collect();
    c.set_irqs(MSIX, 0, &borrowed).unwrap();
    for vector in [0u64, 69] {
        write(&c, 32, vector);
        write(&c, GO, 0);
        // It is told of after a step that did something.
        c.map(0x10000, &Region::new(4096, PageSize::Small).unwrap()).unwrap();
        assert_eq!(go(&c, 1, 0x10000, 1), 1);
        until(|| fds[vector as usize].read() == Ok(1));
        c.unmap(0x10000, &Region::new(4096, PageSize::Small).unwrap()).unwrap();
    }
    assert!(fds.iter().all(|e| e.read() == Err(nix::Error::EAGAIN)), "and no other");
    // One that nobody is told of, and one that is not there.
    c.set_irqs(MSIX, 0, &[]).unwrap();
    write(&c, 32, 0);
    write(&c, 32, 60000);
    assert_eq!(go(&c, 1, 0, 1), 2);
    assert_eq!(fds[0].read(), Err(nix::Error::EAGAIN));
    assert!(c.set_irqs(MSIX, VECTORS, &borrowed[..1]).is_err());
    assert!(c.set_irqs(0, 0, &borrowed[..1]).is_err());
    let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(c.set_irqs(MSIX, 0, &[file.as_fd()]).is_err(), "no eventfd");
    assert!(!c.is_gone());
}

#[test]
fn one_client_after_the_other() {
    let served = Served::start();
    let region = Region::new(4096, PageSize::Small).unwrap();
    for round in 0..5 {
        let c = connect(&served);
        assert_eq!(read(&c, WORD), 0, "as new");
        write(&c, WORD, 7);
        c.map(0x1000, &region).unwrap();
        assert_eq!(go(&c, 1, 0x1000, 4096), 1);
        if round == 0 {
            // Somebody else meanwhile is turned away, and does no harm.
            assert!(Client::connect(served.path(), LONG).is_err());
        }
        drop(c);
    }
    served.wait_resets(5);
    let mut byte = [0];
    region.read(4095, &mut byte);
    assert_eq!(byte, [5]);
}

#[test]
fn nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    assert!(matches!(Client::connect(&path, LONG), Err(Error::Os { .. })));
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(matches!(Client::connect(&path, LONG), Err(Error::Os { .. })));
}

#[test]
fn a_server_that_goes_is_noticed_at_once() {
    let served = Served::start();
    let c = connect(&served);
    drop(served);
    until(|| c.is_gone());
    let began = std::time::Instant::now();
    for _ in 0..1000 {
        assert!(matches!(c.read(BAR0, 0, &mut [0; 4]), Err(Error::Gone(_))));
        c.post(BAR0, 0, 1);
    }
    assert!(began.elapsed() < LONG / 4);
}
