//! The wire against itself, against bytes written down by hand, and against noise.

use super::*;

/// xorshift64*: enough for noise.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

#[test]
fn bytes_as_the_specification_has_them() {
    let header = Header::new(0x0102, command::DMA_MAP, Kind::Posted, 32);
    assert_eq!(header.encode(), [2, 1, 2, 0, 48, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0]);
    let failed = Header::new(1, command::DEVICE_RESET, Kind::Failed(17), 0);
    assert_eq!(failed.encode(), [1, 0, 13, 0, 16, 0, 0, 0, 0x21, 0, 0, 0, 17, 0, 0, 0]);
    let map = DmaMap { readable: true, writable: true, offset: 1, address: 2, size: 3 };
    let mut bytes = vec![32, 0, 0, 0, 3, 0, 0, 0];
    for n in [1u8, 2, 3] {
        bytes.extend([n, 0, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(map.encode(), bytes);
    let areas = vec![Area { offset: 0x1000, size: 0x1000 }];
    let region =
        Region { read: true, write: true, mmap: true, index: 0, size: 0x4000, offset: 0, areas };
    let bytes = region.encode(64);
    assert_eq!(bytes.len(), 64);
    assert_eq!(bytes[..16], [64, 0, 0, 0, 15, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0]);
    assert_eq!(bytes[32..48], [1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let short = region.encode(32);
    assert_eq!((short.len(), short[0], short[12]), (32, 64, 0), "how much it takes, and no more");
}

#[test]
fn what_is_written_is_what_is_read() {
    let mut noise = Noise(7);
    for _ in 0..2000 {
        let n = noise.next();
        let (a, b, c) = (noise.next(), noise.next(), noise.next());
        let kinds = [Kind::Command, Kind::Posted, Kind::Reply, Kind::Failed(a as u32)];
        let body = (b % (MAX_MESSAGE - HEADER) as u64) as usize;
        let h = Header::new(n as u16, c as u16, kinds[(n % 4) as usize], body);
        assert_eq!(Header::decode(&h.encode()), Some(h));
        assert_eq!(h.body(), body);
        let (readable, writable) = (n & 1 == 1, n & 2 == 2);
        let map = DmaMap { readable, writable, offset: a, address: b, size: c };
        assert_eq!(DmaMap::decode(&map.encode()), Some(map));
        let unmap = DmaUnmap { all: n & 1 == 1, address: a, size: b };
        assert_eq!(DmaUnmap::decode(&unmap.encode()), Some(unmap));
        let info = DeviceInfo { reset: readable, pci: writable, regions: a as u32, irqs: b as u32 };
        assert_eq!(DeviceInfo::decode(&info.encode()), Some(info));
        let irq = Irq { eventfd: readable, index: a as u32, count: b as u32 };
        assert_eq!(Irq::decode(&irq.encode()), Some(irq));
        let access =
            Access { offset: a, region: b as u32, count: (c % (MAX_DATA as u64 + 1)) as u32 };
        assert_eq!(Access::decode(&access.encode()), Some((access, &[][..])));
        let dma = Dma { address: a, count: c % (MAX_DATA as u64 + 1) };
        assert_eq!(Dma::decode(&dma.encode()), Some((dma, &[][..])));
        let size = a >> 1;
        let areas = (0..n % 9)
            .map(|i| Area {
                offset: (b >> 2) % (size + 1),
                size: i.min(size - (b >> 2) % (size + 1)),
            })
            .collect();
        let region = Region {
            read: readable,
            write: writable,
            mmap: n & 4 == 4,
            index: b as u32,
            size,
            offset: c,
            areas,
        };
        let whole = region.encode(u32::MAX);
        assert_eq!(Region::decode(&whole), Some((region, whole.len() as u32)));
        let bools = noise.bytes((n % 20) as usize);
        let data = [IrqData::None, IrqData::Bool(&bools), IrqData::Eventfd][(n % 3) as usize];
        let action = [IrqAction::Mask, IrqAction::Unmask, IrqAction::Trigger][(a % 3) as usize];
        let set = SetIrqs {
            data,
            action,
            index: a as u32,
            start: b as u32 >> 1,
            count: bools.len() as u32,
        };
        assert_eq!(SetIrqs::decode(&set.encode()), Some(set));
    }
}

#[test]
fn noise_and_cut_messages_are_no_harm() {
    let mut noise = Noise(99);
    for round in 0..20_000usize {
        let mut bytes = noise.bytes(round % 120);
        // Mostly small numbers get further than noise does.
        if round % 3 == 0 {
            bytes.iter_mut().enumerate().filter(|(i, _)| i % 4 != 0).for_each(|(_, b)| *b = 0);
        }
        if let Some((region, _)) = Region::decode(&bytes) {
            assert!(region.areas.len() <= MAX_AREAS);
            assert!(region.areas.iter().all(|a| a.offset + a.size <= region.size));
        }
        let _ = DmaMap::decode(&bytes);
        let _ = DmaUnmap::decode(&bytes);
        let _ = DeviceInfo::decode(&bytes);
        let _ = Irq::decode(&bytes);
        let _ = decode_region_query(&bytes);
        if let Some(set) = SetIrqs::decode(&bytes) {
            assert!(set.start.checked_add(set.count).is_some());
        }
        if let Some((access, rest)) = Access::decode(&bytes) {
            assert!(access.count as usize <= MAX_DATA && rest.len() + 16 == bytes.len());
        }
        if let Some((dma, _)) = Dma::decode(&bytes) {
            assert!(dma.count <= MAX_DATA as u64);
        }
        if let Some(head) = bytes.first_chunk()
            && let Some(h) = Header::decode(head)
        {
            assert!(h.body() <= MAX_MESSAGE - HEADER);
        }
    }
    // Every message, cut anywhere.
    let map = DmaMap { readable: true, writable: true, offset: 0, address: 0, size: 0 }.encode();
    assert!((0..map.len()).all(|n| DmaMap::decode(&map[..n]).is_none()));
    let unmap = DmaUnmap { all: false, address: 0, size: 0 }.encode();
    assert!((0..unmap.len()).all(|n| DmaUnmap::decode(&unmap[..n]).is_none()));
    let areas = vec![Area { offset: 0, size: 1 }; 3];
    let region = Region { size: 9, areas, ..Region::default() }.encode(1000);
    assert!((0..region.len()).all(|n| Region::decode(&region[..n]).is_none()));
    let set = SetIrqs {
        data: IrqData::Bool(&[1, 0, 1]),
        action: IrqAction::Trigger,
        index: 2,
        start: 0,
        count: 3,
    }
    .encode();
    assert!((0..set.len()).all(|n| SetIrqs::decode(&set[..n]).is_none()));
}

#[test]
fn contradictions_are_refused() {
    let areas = vec![Area { offset: 0, size: 4096 }];
    let good = Region { mmap: true, size: 4096, areas, ..Region::default() };
    let edit = |at: usize, bytes: &[u8]| {
        let mut m = good.encode(100);
        m[at..at + bytes.len()].copy_from_slice(bytes);
        Region::decode(&m)
    };
    assert!(edit(0, &[]).is_some());
    assert_eq!(edit(56, &4097u64.to_le_bytes()), None, "an area outside the region");
    assert_eq!(edit(48, &u64::MAX.to_le_bytes()), None, "an area around the end of everything");
    assert_eq!(edit(40, &u32::MAX.to_le_bytes()), None, "more areas than the message holds");
    assert_eq!(edit(36, &32u32.to_le_bytes()), None, "capabilities in a circle");
    assert_eq!(edit(36, &1000u32.to_le_bytes()), None, "capabilities outside");
    assert_eq!(edit(12, &u32::MAX.to_le_bytes()), None, "capabilities outside");

    let size = |n: u32| {
        let mut h = Header::new(0, 1, Kind::Command, 0).encode();
        h[4..8].copy_from_slice(&n.to_le_bytes());
        Header::decode(&h)
    };
    assert!(size(16).is_some() && size(MAX_MESSAGE as u32).is_some());
    for bad in [0, 15, MAX_MESSAGE as u32 + 1, u32::MAX] {
        assert_eq!(size(bad), None);
    }
    let mut other = Header::new(0, 1, Kind::Command, 0).encode();
    other[8] = 2;
    assert_eq!(Header::decode(&other), None, "neither command nor reply");

    let flags = |flags: u32| {
        let body: Vec<u8> = words([20, flags, 2, 0, 1]).collect();
        SetIrqs::decode(&body).is_some()
    };
    assert!(flags(1 << 5 | 1) && flags(1 << 3 | 4));
    for bad in [0, 1, 1 << 5, 1 << 5 | 3, 3 << 4 | 1, 1 << 6 | 1, u32::MAX] {
        assert!(!flags(bad), "{bad:#x}");
    }
    let past: Vec<u8> = words([20, 1 << 5 | 1, 2, u32::MAX, 1]).collect();
    assert_eq!(SetIrqs::decode(&past), None);
    let long = Access { offset: 0, region: 0, count: MAX_DATA as u32 + 1 };
    assert_eq!(Access::decode(&long.encode()), None);
    let long = Dma { address: 0, count: 1 << 40 };
    assert_eq!(Dma::decode(&long.encode()), None);
    let map = DmaMap { readable: true, writable: true, offset: 0, address: 0, size: 1 };
    let mut bytes = map.encode();
    bytes[4] = 4;
    assert_eq!(DmaMap::decode(&bytes), None, "flags of another protocol");
}
