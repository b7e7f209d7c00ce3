//! Our client against servers that do not play by the rules: an error in time, never a hang.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dma::{PageSize, Region};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_user::wire::{
    self, Access, Area, DeviceInfo, Dma, HEADER, Header, Kind, command, encode_region_query, pci,
};
use vfio_user::{Client, Error};

use crate::raw::Raw;
use crate::{LONG, SHORT};

/// A server that answers properly until the client asks for `last`; then `then` has its turn, with
/// the header of that message. Returns what the client makes of it, and how long that took.
fn with<T>(
    patience: Duration,
    last: u16,
    then: impl FnOnce(&mut Raw, Header) + Send,
    client: impl FnOnce(Result<Client, Error>) -> T,
) -> (T, Duration) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::scope(|s| {
        s.spawn(move || {
            let mut raw = Raw::of(listener.accept().unwrap().0);
            loop {
                let Some((header, _)) = raw.receive() else { return };
                if header.command == last {
                    then(&mut raw, header);
                    return;
                }
                let body = match header.command {
                    command::VERSION => b"\0\0\0\0{}\0".to_vec(),
                    command::DEVICE_GET_INFO => info(9).encode(),
                    _ => vec![],
                };
                raw.send(header.id, header.command, Kind::Reply, &body);
            }
        });
        let began = Instant::now();
        let result = client(Client::connect(&path, patience));
        (result, began.elapsed())
    })
}

fn info(regions: u32) -> DeviceInfo {
    DeviceInfo { reset: true, pci: true, regions, irqs: 5 }
}

fn reply(raw: &mut Raw, h: Header, body: &[u8]) {
    raw.send(h.id, h.command, Kind::Reply, body);
}

/// Stays connected and does nothing until the client goes.
fn stay(raw: &mut Raw) {
    assert!(raw.is_left());
}

#[test]
fn no_answer_or_a_wrong_one() {
    type Then = fn(&mut Raw, Header);
    let cases: &[(&str, Then)] = &[
        ("silence", |_, _| {}),
        ("closed", |raw, _| raw.0.shutdown(std::net::Shutdown::Both).unwrap()),
        ("another id", |raw, h| raw.send(h.id ^ 1, h.command, Kind::Reply, &[0; 64])),
        ("another command", |raw, h| raw.send(h.id, h.command ^ 1, Kind::Reply, &[0; 64])),
        ("too short", |raw, h| reply(raw, h, &[0; 3])),
        ("half", |raw, h| {
            let header = Header::new(h.id, h.command, Kind::Reply, 1000);
            std::io::Write::write_all(&mut raw.0, &header.encode()).unwrap();
        }),
        ("a size that lies", |raw, _| {
            std::io::Write::write_all(&mut raw.0, &[0xff; HEADER]).unwrap();
        }),
        ("noise", |raw, _| {
            let _ = std::io::Write::write_all(&mut raw.0, &[0xa5; 10_000]);
        }),
        ("answers without end", |raw, h| {
            (0..10_000).for_each(|_| raw.send(h.id, h.command ^ 1, Kind::Reply, &[]));
        }),
    ];
    for last in [command::VERSION, command::DEVICE_GET_INFO, command::DEVICE_GET_REGION_INFO] {
        for (name, then) in cases {
            let answer = |raw: &mut Raw, h: Header| {
                then(raw, h);
                stay(raw);
            };
            let (failed, took) = with(SHORT, last, answer, |c| {
                let Ok(c) = c else { return true };
                let failed = c.region(pci::BAR0).is_err();
                // And all that follows, at once.
                let began = Instant::now();
                let later = c.read(pci::BAR0, 0, &mut [0; 4]);
                assert!(matches!(later, Err(Error::Gone(_))), "{name}: {later:?}");
                assert!(c.is_gone() && began.elapsed() < LONG / 4);
                failed
            });
            assert!(failed && took < LONG, "{name} to {last}: {took:?}");
        }
    }
}

#[test]
fn a_refusal_is_no_reason_to_go() {
    let answer = |raw: &mut Raw, h: Header| {
        raw.send(h.id, h.command, Kind::Failed(0), &[]);
        let (h, _) = raw.receive().unwrap();
        reply(raw, h, &[]);
        stay(raw);
    };
    with(LONG, command::DEVICE_RESET, answer, |c| {
        let c = c.unwrap();
        let e = c.reset().unwrap_err();
        assert!(matches!(e, Error::Refused { errno: 0, .. }));
        assert_eq!(e.to_string(), "reset was refused: no reason was given");
        c.reset().unwrap();
    });
}

#[test]
fn devices_that_are_none() {
    for bad in [info(3), DeviceInfo { pci: false, ..info(9) }] {
        let answer = move |raw: &mut Raw, h| {
            reply(raw, h, &bad.encode());
            stay(raw);
        };
        let (c, _) = with(LONG, command::DEVICE_GET_INFO, answer, |c| c.map(drop));
        assert!(matches!(c, Err(Error::Invalid(_))));
    }
}

/// What the client makes of a region's description and the descriptors that come with it.
fn region(info: wire::Region, fds: Vec<OwnedFd>) -> Result<usize, Error> {
    let answer = move |raw: &mut Raw, h: Header| {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        raw.send_fds(h.id, h.command, Kind::Reply, &info.encode(u32::MAX), &fds);
        // Whatever memory was passed goes away, as far as that is possible.
        for fd in fds {
            let _ = nix::unistd::ftruncate(fd, 0);
        }
        stay(raw);
    };
    let use_it = |c: Result<Client, Error>| {
        let c = c.unwrap();
        let region = c.region(pci::BAR0)?;
        for m in &region.mapped {
            m.memory.store32(0, 1, Ordering::Release);
            m.memory.store32(m.memory.len() - 4, 1, Ordering::Release);
        }
        Ok(region.mapped.len())
    };
    with(LONG, command::DEVICE_GET_REGION_INFO, answer, use_it).0
}

#[test]
fn regions_that_lie() {
    let area = |offset, size| Area { offset, size };
    let good = wire::Region {
        read: true,
        write: true,
        mmap: true,
        index: 0,
        size: 8192,
        offset: 0,
        areas: vec![area(4096, 4096)],
    };
    let sealed = || {
        let r = Region::new(8192, PageSize::Small).unwrap();
        vec![r.fd().try_clone_to_owned().unwrap()]
    };
    let loose = || {
        let fd = memfd_create("loose", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&fd, 8192).unwrap();
        vec![fd]
    };
    assert_eq!(region(good.clone(), sealed()).unwrap(), 1);
    let whole = wire::Region { areas: vec![], ..good.clone() };
    assert_eq!(region(whole, sealed()).unwrap(), 1);
    // What is not safe is not mapped, and reached by messages.
    assert_eq!(region(good.clone(), loose()).unwrap(), 0);
    let null = || vec![OwnedFd::from(std::fs::File::open("/dev/null").unwrap())];
    assert_eq!(region(good.clone(), null()).unwrap(), 0);
    for (size, offset, areas) in [
        (1 << 40, 0, vec![]),
        (1 << 40, 0, vec![area(1 << 39, 4096)]),
        (8192, 4096, vec![area(4096, 4096)]),
        (8192, 1, vec![area(4096, 4096)]),
        (8192, 0, vec![area(4000, 4096)]),
        (8192, 0, vec![area(4096, 100), area(4096, 0)]),
    ] {
        let lie = wire::Region { size, offset, areas, ..good.clone() };
        assert_eq!(region(lie, sealed()).unwrap(), 0);
    }
    // What contradicts itself ends it.
    let bad = |r: wire::Region, fds| assert!(matches!(region(r, fds), Err(Error::Protocol(_))));
    bad(good.clone(), vec![]);
    bad(good.clone(), [sealed(), sealed()].concat_fds());
    bad(wire::Region { index: 1, ..good.clone() }, sealed());
    bad(wire::Region { areas: vec![area(8192, 4096)], ..good.clone() }, sealed());
    bad(wire::Region { offset: u64::MAX, ..good.clone() }, sealed());
    bad(wire::Region { areas: vec![area(0, 4096); 65], ..good }, sealed());
}

trait ConcatFds {
    fn concat_fds(self) -> Vec<OwnedFd>;
}

impl ConcatFds for [Vec<OwnedFd>; 2] {
    fn concat_fds(self) -> Vec<OwnedFd> {
        self.into_iter().flatten().collect()
    }
}

#[test]
fn memory_by_messages_within_what_was_mapped() {
    let answer = |raw: &mut Raw, h: Header| {
        reply(raw, h, &[]);
        let mut ask = |command, address, count, data: &[u8]| {
            let body = [&Dma { address, count }.encode()[..], data].concat();
            raw.ask(command, &body).map(|b| b[16..].to_vec())
        };
        let (read, write) = (command::DMA_READ, command::DMA_WRITE);
        assert_eq!(ask(write, 0x1ffe, 2, &[8, 9]), Ok(vec![]));
        assert_eq!(ask(read, 0x1ffd, 3, &[]), Ok(vec![0, 8, 9]));
        for (address, count) in
            [(0x1fff, 2), (0xfff, 1), (0x2000, 1), (u64::MAX, 2), (0x1000, u64::MAX)]
        {
            assert!(ask(read, address, count, &[]).is_err(), "{address:#x} {count}");
            assert!(ask(write, address, count, &[1, 2]).is_err());
        }
        assert!(ask(write, 0x1000, 2, &[1]).is_err(), "less than is said");
        assert!(raw.ask(read, &[0; 5]).is_err());
        assert!(raw.ask(99, &[0; 50]).is_err());
        // And an answer to nothing, at the end.
        raw.send(9, command::DEVICE_RESET, Kind::Reply, &[]);
        raw.send(9, command::DEVICE_RESET, Kind::Reply, &[]);
        stay(raw);
    };
    with(LONG, command::DMA_MAP, answer, |c| {
        let c = c.unwrap();
        let region = Region::new(4096, PageSize::Small).unwrap();
        c.map(0x1000, &region).unwrap();
        crate::until(|| c.is_gone());
        assert!(c.unmap(0x1000, &region).is_err());
        let mut last = [0; 2];
        region.read(4094, &mut last);
        assert_eq!(last, [8, 9]);
    });
}

#[test]
fn posted_writes_to_a_server_that_does_not_read_end_in_time() {
    let answer = |raw: &mut Raw, h: Header| {
        reply(raw, h, &[]);
        std::thread::sleep(SHORT * 10);
        drop(raw.0.shutdown(std::net::Shutdown::Both));
    };
    let ((), took) = with(SHORT, command::DEVICE_RESET, answer, |c| {
        let c = c.unwrap();
        c.reset().unwrap();
        while !c.is_gone() {
            c.post(pci::BAR0, 0x1000, 1);
        }
        assert!(c.posted() > 50, "{}", c.posted());
    });
    assert!(took < SHORT * 9, "{took:?}");
}

#[test]
fn reads_that_answer_with_too_little() {
    for n in [0, 15, 16, 17, 21] {
        let answer = move |raw: &mut Raw, h: Header| {
            let body = Access { offset: 0, region: 0, count: 4 }.encode();
            reply(raw, h, &[&body[..], &[0; 16]].concat()[..n]);
            stay(raw);
        };
        with(LONG, command::REGION_READ, answer, |c| {
            assert!(c.unwrap().read(pci::BAR0, 0, &mut [0; 4]).is_err());
        });
    }
    assert_eq!(encode_region_query(1, 2).len(), 32);
}
