//! Reads and writes through every form of data pointer, on every kind of store; zeroes,
//! deallocation, and all refusals of the I/O command set.

use nvme_model::{NamespaceConfig, Options, Store};
use nvme_spec::{DsmRange, NSID_ALL, Sqe, StatusCode};
use zerocopy::IntoBytes;

use crate::host::*;

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31 + i / 512 * 7 + seed * 101) % 251) as u8).collect()
}

/// Writes through one layout and reads back through another.
fn round_trips(mut host: Host, lba: usize) {
    // Length in bytes, where the written buffer begins, where the read one does.
    for (i, (len, from, to)) in [
        (lba, 0, 0),
        (lba, 0xe00, 0x1ffc),
        (4096, 0, 0x200),
        (8192, 0, 0xffc),
        (8192, 0x800, 0),
        (16384, 0x10, 0x3004),
        (128 << 10, 0, 0x400),
        (128 << 10, 0xabc, 0),
    ]
    .into_iter()
    .enumerate()
    {
        let data = pattern(i, len);
        let (from, to) = (DATA + from, DATA + (1 << 20) + to);
        host.region.write(from, &data);
        let blocks = (len / lba) as u16 - 1;
        let slba = 3 + i as u64;
        let (prp1, prp2) = host.prps(from, len);
        host.ok(1, Sqe::write(i as u16, 1, slba, blocks, 0).with_prps(prp1, prp2));
        host.region.write(to - 4, &vec![0xee; len + 8]);
        let (prp1, prp2) = host.prps(to, len);
        host.ok(1, Sqe::read(i as u16, 1, slba, blocks, 0).with_prps(prp1, prp2));
        assert!(host.data(to, len) == data, "case {i}");
        // Not a byte beside the buffer was touched.
        assert_eq!(host.data(to - 4, 4), [0xee; 4]);
        assert_eq!(host.data(to + len, 4), [0xee; 4]);
        let mut stored = vec![0; len];
        host.ctl.peek(1, slba * lba as u64, &mut stored).unwrap().unwrap();
        assert!(stored == data, "case {i} as stored");
    }
}

#[test]
fn memory_512() {
    round_trips(Host::simple(), 512);
}

#[test]
fn memory_4096_with_cache() {
    let options = Options { vwc: true, cache_bytes: 64 << 10, ..Options::default() };
    round_trips(Host::new(options, vec![disk(1024, 4096)]), 4096);
}

#[test]
fn file_512() {
    let file = tempfile::tempfile().unwrap();
    let store = Store::file(file.try_clone().unwrap(), true).unwrap();
    let ns = NamespaceConfig { store, blocks: 2048, lba: 512, read_only: false };
    round_trips(Host::new(Options::default(), vec![ns]), 512);
    // The file holds what was written last, and no more than was written.
    assert_eq!(file.metadata().unwrap().len(), (3 + 7) * 512 + (128 << 10));
}

#[test]
fn scattered_pages_and_a_chained_list() {
    let options = Options { mdts: 0, ..Options::default() };
    let mut host = Host::new(options, vec![disk(8192, 512)]);
    // 2 MiB + 4 KiB as pages in descending order, through a list that begins in mid-page and goes
    // on twice.
    let pages = 513;
    let data = pattern(5, pages * 4096);
    let page_at = |i: usize| DATA + (pages - 1 - i) * 4096;
    for (i, page) in data.chunks(4096).enumerate() {
        host.region.write(page_at(i), page);
    }
    let list = |host: &Host, reversed: bool| {
        let at = |i: usize| if reversed { page_at(i) } else { DATA + i * 4096 };
        // List pages: the first has 3 slots, the second 512, the third what is left.
        let mut slots = vec![LISTS + 4096 - 24, LISTS + 4096 - 16];
        let mut next = 0x40;
        let mut left = pages - 1 - 2;
        host.region.write(LISTS + 4096 - 8, &bus(LISTS + next * 4096).to_le_bytes());
        while left > 512 {
            slots.extend((0..511).map(|i| LISTS + next * 4096 + i * 8));
            left -= 511;
            let more = LISTS + (next + 1) * 4096;
            host.region.write(LISTS + next * 4096 + 511 * 8, &bus(more).to_le_bytes());
            next += 1;
        }
        slots.extend((0..left).map(|i| LISTS + next * 4096 + i * 8));
        for (i, slot) in slots.into_iter().enumerate() {
            host.region.write(slot, &bus(at(i + 1)).to_le_bytes());
        }
        (bus(at(0)), bus(LISTS + 4096 - 24))
    };
    let blocks = (pages * 8 - 1) as u16;
    let (prp1, prp2) = list(&host, true);
    host.ok(1, Sqe::write(1, 1, 7, blocks, 0).with_prps(prp1, prp2));
    let mut stored = vec![0; data.len()];
    host.ctl.peek(1, 7 * 512, &mut stored).unwrap().unwrap();
    assert!(stored == data);
    let (prp1, prp2) = list(&host, false);
    host.ok(1, Sqe::read(1, 1, 7, blocks, 0).with_prps(prp1, prp2));
    assert!(host.data(DATA, data.len()) == data);
}

#[test]
fn data_pointers_that_cannot_be() {
    let mut host = Host::simple();
    let read = |blocks, prp1, prp2| Sqe::read(4, 1, 0, blocks, 0).with_prps(prp1, prp2);
    let offset = StatusCode::INVALID_PRP_OFFSET;
    let transfer = StatusCode::DATA_TRANSFER_ERROR;
    assert_eq!(host.fails(1, read(0, bus(DATA) + 2, 0)), offset);
    assert_eq!(host.fails(1, read(8, bus(DATA), bus(DATA) + 512)), offset);
    assert_eq!(host.fails(1, read(31, bus(DATA), bus(LISTS) + 4)), offset);
    host.region.write(LISTS, &[bus(DATA), bus(DATA) + 8, bus(DATA)].map(u64::to_le_bytes).concat());
    assert_eq!(host.fails(1, read(31, bus(DATA), bus(LISTS))), offset);
    let before = host.ctl.stats().snapshot();
    assert_eq!(host.fails(1, read(0, 0x1000, 0)), transfer);
    assert_eq!(host.fails(1, read(8, bus(DATA), 0x1000)), transfer);
    assert_eq!(host.fails(1, read(31, bus(DATA), 0x1000)), transfer);
    assert_eq!(host.fails(1, read(0, u64::MAX - 511, 0)), transfer);
    // Past the end of the region.
    assert_eq!(
        host.fails(1, read(15, bus(DATA + DATA_LEN - 4096), bus(DATA + DATA_LEN))),
        transfer
    );
    let write = Sqe::write(4, 1, 0, 0, 0).with_prps(0x2000, 0);
    assert_eq!(host.fails(1, write), transfer);
    let since = host.ctl.stats().snapshot().since(&before);
    assert_eq!((since.dma_faults, since.errors, since.reads, since.writes), (6, 6, 0, 0));
    assert_eq!(host.csts().cfs(), 0);
}

#[test]
fn ranges_namespaces_and_fields_that_cannot_be() {
    let read_only =
        NamespaceConfig { store: Store::memory(), blocks: 64, lba: 512, read_only: true };
    let mut host = Host::new(Options::default(), vec![disk(2048, 512), read_only, disk(8, 4096)]);
    host.ctl.remove_namespace(3);
    let at = |sqe: Sqe| sqe.with_prps(bus(DATA), bus(DATA + 4096));
    let range = StatusCode::LBA_OUT_OF_RANGE;
    for slba in [2048, 2047 + 1, u64::MAX, u64::MAX - 3] {
        assert_eq!(host.fails(1, at(Sqe::read(1, 1, slba, 0, 0))), range);
        assert_eq!(host.fails(1, at(Sqe::write(1, 1, slba, 0, 0))), range);
        assert_eq!(host.fails(1, at(Sqe::write_zeroes(1, 1, slba, 0, 0))), range);
    }
    assert_eq!(host.fails(1, at(Sqe::read(1, 1, 2041, 7, 0))), range);
    host.ok(1, at(Sqe::read(1, 1, 2040, 7, 0)));
    assert_eq!(host.fails(1, Sqe::write_zeroes(1, 1, 1, 2047, 0)), range);
    host.ok(1, Sqe::write_zeroes(1, 1, 0, 2047, 0));

    for nsid in [0, 4, 0x8000_0000, NSID_ALL] {
        let code = StatusCode::INVALID_NAMESPACE;
        assert_eq!(host.fails(1, at(Sqe::read(1, nsid, 0, 0, 0))), code);
        if nsid != NSID_ALL {
            assert_eq!(host.fails(1, Sqe::flush(1, nsid)), code);
        }
    }
    assert_eq!(host.fails(1, at(Sqe::read(1, 3, 0, 0, 0))), StatusCode::INVALID_FIELD);
    host.ok(1, Sqe::flush(1, NSID_ALL));

    // 128 KiB is the limit.
    assert_eq!(host.fails(1, at(Sqe::read(1, 1, 0, 256, 0))), StatusCode::INVALID_FIELD);
    let mut sgl = at(Sqe::read(1, 1, 0, 0, 0));
    sgl.cdw0 = (sgl.cdw0.get() | 0x4000).into();
    assert_eq!(host.fails(1, sgl), StatusCode::INVALID_FIELD);
    let mut fused = at(Sqe::read(1, 1, 0, 0, 0));
    fused.cdw0 = (fused.cdw0.get() | 0x100).into();
    assert_eq!(host.fails(1, fused), StatusCode::INVALID_FIELD);
    for opcode in [0x03, 0x04, 0x05, 0x0d, 0x7f, 0xff] {
        assert_eq!(host.fails(1, Sqe::new(opcode, 1, 1)), StatusCode::INVALID_OPCODE);
    }

    assert_eq!(host.fails(1, at(Sqe::write(1, 2, 0, 0, 0))), StatusCode::WRITE_PROTECTED);
    assert_eq!(host.fails(1, Sqe::write_zeroes(1, 2, 0, 0, 0)), StatusCode::WRITE_PROTECTED);
    host.region.write(DATA, DsmRange { blocks: 1.into(), ..DsmRange::default() }.as_bytes());
    assert_eq!(host.fails(1, at(Sqe::deallocate(1, 2, 0))), StatusCode::WRITE_PROTECTED);
    host.ok(1, at(Sqe::read(1, 2, 63, 0, 0)));
}

#[test]
fn optional_commands_can_be_absent() {
    let options = Options { write_zeroes: false, dsm: false, ..Options::default() };
    let mut host = Host::new(options, vec![disk(64, 512)]);
    assert_eq!(host.fails(1, Sqe::write_zeroes(1, 1, 0, 0, 0)), StatusCode::INVALID_OPCODE);
    let dsm = Sqe::deallocate(1, 1, 0).with_prps(bus(DATA), 0);
    assert_eq!(host.fails(1, dsm), StatusCode::INVALID_OPCODE);
}

#[test]
fn zeroes_and_deallocation() {
    for (file, vwc) in [(false, false), (true, false), (true, true)] {
        let store = if file {
            Store::file(tempfile::tempfile().unwrap(), false).unwrap()
        } else {
            Store::memory()
        };
        let ns = NamespaceConfig { store, blocks: 2048, lba: 512, read_only: false };
        let mut host = Host::new(Options { vwc, ..Options::default() }, vec![ns]);
        assert!(host.write_blocks(0, 64, 0x11, 0).is_success());
        host.ok(1, Sqe::write_zeroes(1, 1, 4, 3, 0));
        host.ok(1, Sqe::write_zeroes(1, 1, 16, 7, Sqe::DEAC));
        let ranges: Vec<DsmRange> = [(30u64, 2u32), (40, 0), (50, 10)]
            .map(|(slba, blocks)| DsmRange {
                slba: slba.into(),
                blocks: blocks.into(),
                ..DsmRange::default()
            })
            .into();
        // The ranges straddle a page of host memory.
        let at = DATA + 4096 - 16;
        host.region.write(at, ranges.as_bytes());
        let prps = host.prps(at, 48);
        host.ok(1, Sqe::deallocate(1, 1, 2).with_prps(prps.0, prps.1));
        // Without the deallocate bit it is a hint.
        host.region.write(DATA, DsmRange { blocks: 64.into(), ..DsmRange::default() }.as_bytes());
        host.ok(1, Sqe::deallocate(1, 1, 0).with_prps(bus(DATA), 0).with_cdw(1, 3));
        let zero = |b: usize| {
            (4..8).contains(&b)
                || (16..24).contains(&b)
                || (30..32).contains(&b)
                || (50..60).contains(&b)
        };
        let expect: Vec<u8> = (0..64).map(|b| if zero(b) { 0 } else { 0x11 }).collect();
        assert_eq!(host.read_values(0, 64), expect);
        host.ok(1, Sqe::flush(1, 1));
        assert_eq!(host.read_values(0, 64), expect);
        let stats = host.ctl.stats().snapshot();
        assert_eq!((stats.writes, stats.write_zeroes, stats.zeroed_bytes), (1, 2, 12 * 512));
        assert_eq!((stats.deallocations, stats.deallocated_bytes), (3, 12 * 512));
        assert_eq!((stats.device_writes(), stats.flushes), (3, 1));
        assert_eq!(stats.read_bytes, 2 * 64 * 512);
    }
}

#[test]
fn a_bad_range_deallocates_nothing() {
    let mut host = Host::simple();
    assert!(host.write_blocks(0, 8, 0x22, 0).is_success());
    let good = DsmRange { blocks: 8.into(), ..DsmRange::default() };
    let bad = DsmRange { blocks: u32::MAX.into(), slba: u64::MAX.into(), ..DsmRange::default() };
    host.region.write(DATA, [good, bad].as_bytes());
    let sqe = Sqe::deallocate(1, 1, 1).with_prps(bus(DATA), 0);
    assert_eq!(host.fails(1, sqe), StatusCode::LBA_OUT_OF_RANGE);
    assert_eq!(host.read_values(0, 8), [0x22; 8]);
}

#[test]
fn a_short_file_reads_zeroes_and_grows() {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[0x33; 700], 0).unwrap();
    let store = Store::file(file.try_clone().unwrap(), true).unwrap();
    let ns = NamespaceConfig { store, blocks: 1 << 30, lba: 512, read_only: false };
    let mut host = Host::new(Options::default(), vec![ns]);
    let prp = bus(DATA);
    host.ok(1, Sqe::read(1, 1, 0, 7, 0).with_prps(prp, 0));
    let data = host.data(DATA, 4096);
    assert!(data[..700] == [0x33; 700] && data[700..] == [0; 4096 - 700]);
    // Zeroing beyond the end need not grow the file.
    host.ok(1, Sqe::write_zeroes(1, 1, 1000, 100, 0));
    assert_eq!(file.metadata().unwrap().len(), 700);
    host.ok(1, Sqe::write_zeroes(1, 1, 1, 100, 0));
    assert_eq!(file.metadata().unwrap().len(), 700);
    host.ok(1, Sqe::read(1, 1, 0, 7, 0).with_prps(prp, 0));
    let data = host.data(DATA, 4096);
    assert!(data[..512] == [0x33; 512] && data[512..] == [0; 4096 - 512]);
    assert!(host.write_blocks(10, 1, 0x44, 0).is_success());
    assert_eq!(file.metadata().unwrap().len(), 11 * 512);
    assert_eq!(host.read_values(9, 3), [0, 0x44, 0]);
    let last = (1 << 30) - 1;
    assert_eq!(host.read_values(last, 1), [0]);
    let back = host.ctl.into_stores().unwrap().remove(0).into_file().unwrap();
    assert_eq!(back.metadata().unwrap().len(), 11 * 512);
}

#[test]
fn errors_of_the_file_become_statuses() {
    // A file that cannot be written: opened for reading only.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0x66; 4096]).unwrap();
    let store = Store::file(std::fs::File::open(&path).unwrap(), true).unwrap();
    let ns = NamespaceConfig { store, blocks: 8, lba: 512, read_only: false };
    let mut host = Host::new(Options::default(), vec![ns]);
    assert_eq!(host.write_blocks(0, 1, 0, 0).code(), StatusCode::WRITE_FAULT);
    assert_eq!(host.fails(1, Sqe::write_zeroes(1, 1, 0, 0, 0)), StatusCode::WRITE_FAULT);
    assert_eq!(host.read_values(0, 8), [0x66; 8]);
    // A device that is full.
    let full = std::fs::OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
    let store = Store::file(full, true).unwrap();
    let ns = NamespaceConfig { store, blocks: 8, lba: 512, read_only: false };
    let mut host = Host::new(Options::default(), vec![ns]);
    assert_eq!(host.write_blocks(0, 1, 1, 0).code(), StatusCode::CAPACITY_EXCEEDED);
}
