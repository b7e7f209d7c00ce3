//! Our server against clients that do not play by the rules: it goes on, and serves the next.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use dma::{PageSize, Region};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_user::Client;
use vfio_user::wire::{
    Access, Dma, DmaMap, DmaUnmap, Header, IrqAction, IrqData, Kind, MAX_DATA, SetIrqs, command,
    encode_region_query, pci,
};

use crate::raw::Raw;
use crate::{SHORT, Served};

const EINVAL: u32 = 22;
const EEXIST: u32 = 17;
const ENOENT: u32 = 2;

/// The server is there for an ordinary client.
fn serves(served: &Served) {
    let c = Client::connect(served.path(), crate::LONG).unwrap();
    c.write(pci::BAR0, 0, &[9; 8]).unwrap();
    let mut back = [0; 8];
    c.read(pci::BAR0, 0, &mut back).unwrap();
    assert_eq!(back, [9; 8]);
}

fn map(address: u64, size: u64) -> Vec<u8> {
    DmaMap { readable: true, writable: true, offset: 0, address, size }.encode()
}

#[test]
fn those_that_break_the_protocol_are_left() {
    let served = Served::start();
    let bad_size = |n: u32| {
        let mut h = Header::new(1, command::VERSION, Kind::Command, 0).encode();
        h[4..8].copy_from_slice(&n.to_le_bytes());
        h.to_vec()
    };
    let message = |command, kind, body: &[u8]| {
        [&Header::new(1, command, kind, body.len()).encode()[..], body].concat()
    };
    for bytes in [
        bad_size(0),
        bad_size(u32::MAX),
        vec![0xff; 4096],
        message(command::DEVICE_RESET, Kind::Command, &[]),
        message(command::VERSION, Kind::Reply, b"\0\0\0\0"),
        message(command::VERSION, Kind::Command, b"\0\0\0"),
        message(command::VERSION, Kind::Command, b"\x01\0\0\0"),
        message(command::VERSION, Kind::Command, b"\0\0\0\0{]"),
    ] {
        let mut raw = Raw::connect(served.path());
        std::io::Write::write_all(&mut raw.0, &bytes).unwrap();
        assert!(raw.is_left());
    }
    let mut raw = Raw::greeted(served.path());
    raw.send(1, command::DMA_READ, Kind::Reply, &[0; 16]);
    assert!(raw.is_left(), "an answer to nothing");
    serves(&served);
}

#[test]
fn those_that_stall_are_left_in_time() {
    let served = Served::patient(SHORT);
    // The second says its version and then half a message; the first not even that.
    for greeted in [false, true] {
        let began = Instant::now();
        let mut raw =
            if greeted { Raw::greeted(served.path()) } else { Raw::connect(served.path()) };
        let header = Header::new(1, command::REGION_WRITE, Kind::Command, 100).encode();
        let n = if greeted { 16 } else { 3 };
        std::io::Write::write_all(&mut raw.0, &header[..n]).unwrap();
        assert!(raw.is_left());
        let took = began.elapsed();
        assert!(took >= SHORT / 2 && took < crate::LONG, "{took:?}");
    }
    // One that asks and asks, and never listens.
    let mut raw = Raw::greeted(served.path());
    raw.0.set_write_timeout(Some(crate::LONG)).unwrap();
    let access = Access { offset: 0, region: pci::BAR0, count: 8192 };
    for _ in 0..2000 {
        raw.send(1, command::REGION_READ, Kind::Command, &access.encode());
    }
    served.wait_resets(3);
    serves(&served);
}

#[test]
fn maps_that_cannot_be() {
    let served = Served::start();
    let mut raw = Raw::greeted(served.path());
    let region = Region::new(8192, PageSize::Small).unwrap();
    let fd = region.fd();
    for (address, size) in [
        (0x1000, 0),
        (0x1000, 100),
        (0x1001, 4096),
        (0x1000, 8192 + 4096),
        (0x1000, 1 << 62),
        (u64::MAX - 4095, 4096),
        (0x1000, !4095u64),
    ] {
        let answer = raw.ask_fds(command::DMA_MAP, &map(address, size), &[fd]);
        assert!(matches!(answer, Err(EINVAL | 12)), "{address:#x} {size:#x}: {answer:?}");
    }
    let mut outside = DmaMap { readable: true, writable: true, offset: 0, address: 0, size: 8192 };
    for offset in [4096, 1, u64::MAX - 4095, 1 << 63] {
        outside.offset = offset;
        assert_eq!(raw.ask_fds(command::DMA_MAP, &outside.encode(), &[fd]), Err(EINVAL));
    }
    assert_eq!(raw.ask_fds(command::DMA_MAP, &map(0, 4096), &[fd, fd]), Err(EINVAL));
    assert_eq!(raw.ask(command::DMA_MAP, &map(0, 4096)[..31]), Err(EINVAL));
    // Over another, from each side.
    raw.ask_fds(command::DMA_MAP, &map(0x10000, 8192), &[fd]).unwrap();
    for (address, size) in [(0x10000, 4096), (0x11000, 8192), (0xf000, 8192), (0xf000, 0x4000)] {
        assert_eq!(raw.ask(command::DMA_MAP, &map(address, size)), Err(EEXIST));
    }
    raw.ask(command::DMA_MAP, &map(0xf000, 4096)).unwrap();
    raw.ask(command::DMA_MAP, &map(0x12000, 4096)).unwrap();
    // Only what was mapped, and as it was, is unmapped.
    let unmap = |address, size| DmaUnmap { all: false, address, size }.encode();
    for (address, size) in [(0x10000, 4096), (0x11000, 4096), (0, 8192), (0xf000, 0x4000)] {
        assert_eq!(raw.ask(command::DMA_UNMAP, &unmap(address, size)), Err(ENOENT));
    }
    assert_eq!(raw.ask(command::DMA_UNMAP, &unmap(0x10000, 8192)), Ok(unmap(0x10000, 8192)));
    raw.ask_fds(command::DMA_MAP, &map(0x10000, 8192), &[fd]).unwrap();
    raw.ask(command::DMA_UNMAP, &DmaUnmap { all: true, address: 0, size: 0 }.encode()).unwrap();
    // As many as there may be, and no more.
    for i in 0..256 {
        raw.ask(command::DMA_MAP, &map(i << 12, 4096)).unwrap();
    }
    assert_eq!(raw.ask(command::DMA_MAP, &map(1 << 40, 4096)), Err(28));
    drop(raw);
    serves(&served);
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    let served = Served::start();
    let mut raw = Raw::greeted(served.path());
    assert_eq!(raw.ask(command::VERSION, b"\0\0\0\0"), Err(95), "once is enough");
    for command in [0, 11, 12, 14, 15, 16, 17, 999] {
        assert_eq!(raw.ask(command, &[0; 64]), Err(95), "{command}");
    }
    for command in command::DMA_MAP..=command::REGION_WRITE {
        assert_eq!(raw.ask(command, &[0; 3]), Err(EINVAL), "{command}");
        let info = command == command::DEVICE_GET_INFO;
        assert_eq!(raw.ask(command, &[0xff; 64]).is_ok(), info, "{command}");
    }
    let access = |offset, region, count| Access { offset, region, count }.encode();
    for bad in [
        access(8192, pci::BAR0, 1),
        access(u64::MAX, pci::BAR0, 4),
        access(0, 9, 4),
        access(0, u32::MAX, 4),
        access(0, 1, 4),
        access(0, pci::BAR0, MAX_DATA as u32 + 1),
    ] {
        assert_eq!(raw.ask(command::REGION_READ, &bad), Err(EINVAL));
        assert_eq!(raw.ask(command::REGION_WRITE, &[&bad[..], &[0; 4]].concat()), Err(EINVAL));
    }
    // Less data than is said, and more.
    for n in [3, 5] {
        let body = [&access(0, pci::BAR0, 4)[..], &vec![0; n]].concat();
        assert_eq!(raw.ask(command::REGION_WRITE, &body), Err(EINVAL));
    }
    let info = raw.ask(command::DEVICE_GET_REGION_INFO, &encode_region_query(32, 0)).unwrap();
    assert_eq!((info.len(), info[0]), (32, 64), "the areas take more room than was offered");
    assert_eq!(raw.ask(command::DEVICE_GET_REGION_INFO, &encode_region_query(31, 0)), Err(EINVAL));
    let fds = raw.ask(command::DEVICE_GET_REGION_IO_FDS, &encode_region_query(16, 0)).unwrap();
    assert_eq!(fds, [16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let set = |data, action, start, count| {
        SetIrqs { data, action, index: pci::MSIX, start, count }.encode()
    };
    let (none, all) = (IrqData::None, IrqAction::Trigger);
    assert_eq!(raw.ask(command::DEVICE_SET_IRQS, &set(none, all, 69, 2)), Err(EINVAL));
    assert_eq!(raw.ask(command::DEVICE_SET_IRQS, &set(none, IrqAction::Mask, 0, 1)), Err(EINVAL));
    assert_eq!(raw.ask(command::DEVICE_SET_IRQS, &set(none, all, 0, 70)), Ok(vec![]));
    let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let two = set(IrqData::Eventfd, all, 0, 2);
    assert_eq!(raw.ask_fds(command::DEVICE_SET_IRQS, &two, &[null.as_fd()]), Err(EINVAL));
    drop(raw);
    serves(&served);
}

/// Has the toy add 1 to each byte of memory that is reached by messages; plays the client's part.
/// Returns what the device says.
fn by_messages(raw: &mut Raw, memory: &mut [u8], base: u64) -> u8 {
    let write = |offset, value: u64| {
        let access = Access { offset, region: pci::BAR0, count: 8 };
        [&access.encode()[..], &value.to_le_bytes()].concat()
    };
    raw.ask(command::REGION_WRITE, &write(8, base)).unwrap();
    raw.ask(command::REGION_WRITE, &write(16, memory.len() as u64)).unwrap();
    raw.ask(command::REGION_WRITE, &write(24, 1)).unwrap();
    let read = Access { offset: 24, region: pci::BAR0, count: 1 }.encode();
    // It is asked while the device is at work: served later, in order.
    raw.send(5, command::REGION_READ, Kind::Command, &read);
    loop {
        let (header, body) = raw.receive().expect("a message");
        if header.kind == Kind::Reply {
            assert_eq!(header.id, 5);
            if body[16] != 0 {
                return body[16];
            }
            raw.send(5, command::REGION_READ, Kind::Command, &read);
            continue;
        }
        let (dma, data) = Dma::decode(&body).unwrap();
        let at = (dma.address - base) as usize;
        let part = &mut memory[at..at + dma.count as usize];
        let mut answer = dma.encode().to_vec();
        if header.command == command::DMA_READ {
            answer.extend_from_slice(part);
        } else {
            part.copy_from_slice(data);
        }
        raw.send(header.id, header.command, Kind::Reply, &answer);
    }
}

#[test]
fn memory_that_is_not_shared_is_reached_by_messages() {
    let served = Served::start();
    let mut raw = Raw::greeted(served.path());
    // Longer than one message.
    let mut memory = vec![3; (1 << 20) + 8192];
    raw.ask(command::DMA_MAP, &map(1 << 30, memory.len() as u64)).unwrap();
    assert_eq!(by_messages(&mut raw, &mut memory, 1 << 30), 1);
    assert!(memory.iter().all(|&b| b == 4));
    // Memory that its owner could shorten is not mapped either: it is no risk.
    let loose = memfd_create("loose", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&loose, 4096).unwrap();
    raw.ask_fds(command::DMA_MAP, &map(0x1000, 4096), &[loose.as_fd()]).unwrap();
    nix::unistd::ftruncate(&loose, 0).unwrap();
    let mut page = vec![1; 4096];
    assert_eq!(by_messages(&mut raw, &mut page, 0x1000), 1);
    assert!(page.iter().all(|&b| b == 2));
    drop(raw);
    serves(&served);
}

#[test]
fn those_that_do_not_answer_for_their_memory() {
    let served = Served::patient(SHORT);
    for how in 0..5 {
        let mut raw = Raw::greeted(served.path());
        raw.ask(command::DMA_MAP, &map(0, 4096)).unwrap();
        let write = |offset, value: u64| {
            let access = Access { offset, region: pci::BAR0, count: 8 };
            [&access.encode()[..], &value.to_le_bytes()].concat()
        };
        raw.ask(command::REGION_WRITE, &write(16, 8)).unwrap();
        raw.ask(command::REGION_WRITE, &write(24, 1)).unwrap();
        let (header, body) = raw.receive().unwrap();
        assert_eq!(header.command, command::DMA_READ);
        match how {
            0 => raw.send(header.id, header.command, Kind::Reply, &body),
            1 => raw.send(header.id.wrapping_add(1), header.command, Kind::Reply, &[0; 24]),
            2 => (0..100).for_each(|_| raw.send(1, command::DEVICE_RESET, Kind::Command, &[])),
            3 => {}
            _ => {
                // It may refuse: that is a fault for the device, and no reason to leave.
                raw.send(header.id, header.command, Kind::Failed(14), &[]);
                let read = Access { offset: 24, region: pci::BAR0, count: 1 }.encode();
                assert_eq!(raw.ask(command::REGION_READ, &read).unwrap()[16], 2);
                continue;
            }
        }
        assert!(raw.is_left(), "{how}");
    }
    serves(&served);
}

#[test]
fn noise() {
    let served = Served::start();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut noise = || {
        seed ^= seed >> 12;
        seed ^= seed << 25;
        seed ^= seed >> 27;
        seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    for _ in 0..40 {
        let mut raw = Raw::greeted(served.path());
        for _ in 0..50 {
            let n = (noise() % 80) as usize;
            let mut body: Vec<u8> = (0..n).map(|_| noise() as u8).collect();
            if noise() % 2 == 0 {
                body.iter_mut().enumerate().filter(|(i, _)| i % 4 > 0).for_each(|(_, b)| *b = 0);
            }
            raw.send(1, (noise() % 19) as u16, Kind::Command, &body);
        }
    }
    serves(&served);
}
