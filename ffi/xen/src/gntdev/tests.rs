//! Grants against the stand-in: mappings that are all or nothing, copies, the mapper's thread.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dma::{PageSize, Region};
use nix::errno::Errno;

use super::{Copier, Copy, Direction, MapError, Mapped, Mapper, Pages};
use crate::abi::PAGE;
use crate::fake::{Guest, Host};

fn local(pages: usize) -> std::sync::Arc<Region> {
    Region::new(pages * PAGE, PageSize::Small).unwrap()
}

/// A guest of domain 3 that grants page n by reference 8 + n.
fn guest(host: &Host, pages: u32) -> Guest {
    let guest = host.guest(3, pages);
    for page in 0..pages {
        guest.grants().grant(8 + page, page, false);
    }
    guest
}

#[test]
fn a_mapping_is_the_guests_memory() {
    let host = Host::new();
    let guest = guest(&host, 8);
    let (device, memory) = (host.gntdev(), guest.memory());
    // Not in the order of the guest's pages.
    let m = device.map(3, &[13, 9, 8]).unwrap();
    assert_eq!((m.pages(), m.bytes(), host.mapped()), (3, 3 * PAGE, 3));
    m.store32(4, 0x0102_0304, Ordering::Release);
    m.store64s(PAGE + 8, &[7, 8]);
    assert_eq!(memory.load32(5 * PAGE + 4, Ordering::Acquire), 0x0102_0304);
    assert_eq!(memory.read_words::<2>(PAGE + 8), [7, 8]);
    memory.store32(PAGE - 4, 99, Ordering::Release);
    assert_eq!(m.load32(3 * PAGE - 4, Ordering::Acquire), 99);
    assert_eq!(m.load64s::<2>(PAGE + 8), [7, 8]);
    assert!(!guest.grants().end_access(9), "it is mapped");
    drop(m);
    assert!(guest.grants().end_access(9));
    assert_eq!((host.mapped(), host.calls().unmaps), (0, 1));
}

#[test]
#[should_panic(expected = "outside granted pages")]
fn accesses_outside_panic() {
    let host = Host::new();
    guest(&host, 1);
    host.gntdev().map(3, &[8]).unwrap().load32(PAGE, Ordering::Relaxed);
}

#[test]
fn one_bad_reference_fails_all() {
    let host = Host::new();
    let guest = guest(&host, 4);
    let device = host.gntdev();
    guest.grants().grant(100, 3, true);
    guest.grants().grant(101, 4000, false);
    for bad in [7, 100, 101, u32::MAX] {
        assert_eq!(device.map(3, &[8, bad, 9]).unwrap_err(), MapError::Grant, "{bad}");
    }
    assert_eq!(device.map(4, &[8]).unwrap_err(), MapError::Grant, "no such domain");
    assert_eq!(device.map(3, &[]).unwrap_err(), MapError::Host(Errno::EINVAL));
    assert_eq!(host.mapped(), 0);
    assert_eq!([8, 9].map(|g| guest.grants().mappings(g)), [0, 0]);
    // Nothing is left behind: entries begin where they did.
    assert_eq!(device.map(3, &[8]).unwrap().index(), 0);
    host.limit_handles(2);
    assert_eq!(device.map(3, &[8, 9, 10]).unwrap_err(), MapError::Grant);
    device.map(3, &[8, 9]).unwrap();
}

#[test]
fn pages_that_are_paged_out_are_waited_for_but_not_long() {
    let host = Host::new();
    guest(&host, 4);
    host.page_out(3, 9, 3);
    host.gntdev().map(3, &[8, 9]).unwrap();
    host.page_out(3, 9, 1000);
    assert_eq!(host.gntdev().map(3, &[8, 9]).unwrap_err(), MapError::PagedOut);
    assert_eq!(host.mapped(), 0);
}

#[test]
fn mappings_outlive_the_guest_and_the_handle() {
    let host = Host::new();
    guest(&host, 2);
    let device = host.gntdev();
    let m = device.map(3, &[8]).unwrap();
    host.destroy(3);
    drop(device);
    m.store32(0, 5, Ordering::Relaxed);
    assert_eq!(m.load32(0, Ordering::Relaxed), 5);
    drop(m);
    assert_eq!(host.mapped(), 0);
}

#[test]
fn copies_of_all_guests_are_one_call_and_each_has_its_end() {
    let host = Host::new();
    let guest = guest(&host, 4);
    let other = host.guest(5, 1);
    other.grants().grant(20, 0, true);
    other.memory().write(0, &[5; PAGE]);
    guest.memory().write(PAGE, &[7; PAGE]);
    host.page_out(3, 11, 1);
    let (one, two) = (local(2), local(1));
    one.write(0, &[1; PAGE]);
    let mut copier = Copier::new(host.gntdev());
    let copy = |domid, gref, offset, len, region, local, direction| Copy {
        domid,
        gref,
        offset,
        len,
        region,
        local,
        direction,
    };
    use Direction::{FromGuest, ToGuest};
    let copies = [
        // Across a page of ours.
        copy(3, 9, 512, 1024, &*one, PAGE - 512, FromGuest),
        copy(5, 20, 0, 4096, &*two, 0, FromGuest),
        copy(3, 8, 0, 512, &*one, 0, ToGuest),
        copy(5, 20, 0, 512, &*one, 0, ToGuest),
        copy(3, 7, 0, 512, &*one, 0, FromGuest),
        copy(9, 8, 0, 512, &*one, 0, FromGuest),
        copy(3, 8, 4000, 512, &*one, 0, ToGuest),
        copy(3, 11, 0, 512, &*one, 0, ToGuest),
        copy(3, 8, 0, 0, &*one, 0, ToGuest),
    ];
    copier.copy(copies).unwrap();
    let ends: Vec<i16> = copier.statuses().collect();
    assert_eq!(ends, [0, 0, 0, -1, -3, -2, -10, -12, 0]);
    assert_eq!((host.calls().copies, host.calls().segments), (1, 9));
    let mut bytes = vec![0; 2 * PAGE];
    one.read(0, &mut bytes);
    let sevens = PAGE - 512..PAGE + 512;
    for (i, &b) in bytes.iter().enumerate() {
        let expected = if sevens.contains(&i) { 7 } else { u8::from(i < PAGE) };
        assert_eq!(b, expected, "byte {i}");
    }
    two.read(0, &mut bytes[..PAGE]);
    assert!(bytes[..PAGE].iter().all(|&b| b == 5));
    guest.memory().read(0, &mut bytes[..PAGE]);
    assert!(bytes[..512].iter().all(|&b| b == 1) && bytes[512..PAGE].iter().all(|&b| b == 0));
    copier.copy([]).unwrap();
    assert_eq!(copier.statuses().len(), 0);
    assert_eq!(host.calls().copies, 1, "nothing to do is no call");
    host.fail_copies(1);
    assert_eq!(copier.copy(copies).unwrap_err(), Errno::EFAULT);
    assert_eq!(copier.statuses().len(), 0, "nothing is known of them");
    copier.copy(copies[..1].iter().copied()).unwrap();
    assert_eq!(copier.statuses().collect::<Vec<_>>(), [0]);
}

/// Ends of so many mappings, in the order of their references.
fn ends(pages: &mut Pages, count: usize) -> Vec<Mapped> {
    let mut ends = Vec::new();
    for _ in 0..10_000 {
        while let Some(end) = pages.next_mapped() {
            ends.push(end);
        }
        if ends.len() >= count {
            ends.sort_by_key(|e| e.gref);
            return ends;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{} of {count} ends came", ends.len());
}

fn mapper(host: &Host) -> Mapper {
    Mapper::start(host.gntdev(), 100_000).unwrap()
}

#[test]
fn the_mapper_maps_what_it_can() {
    let host = Host::new();
    let guest = guest(&host, 200);
    let mapper = mapper(&host);
    let mut pages = mapper.pages(3, 300);
    // Some of them bad, among good ones.
    let bad: HashSet<u32> = [8, 9, 40, 77, 150, 151, 207].into();
    for gref in &bad {
        assert!(guest.grants().end_access(*gref));
    }
    for gref in 8..208 {
        assert!(pages.start_map(gref));
    }
    let ends = ends(&mut pages, 200);
    let mut numbers = HashSet::new();
    for (end, gref) in ends.iter().zip(8..) {
        assert_eq!((end.gref, end.page.is_none()), (gref, bad.contains(&gref)));
        assert!(end.page.is_none_or(|p| p < 300 && numbers.insert(p)));
    }
    assert_eq!(host.mapped(), 193);
    let ours = local(1);
    for end in &ends {
        let Some(page) = end.page else { continue };
        ours.write(100, &end.gref.to_le_bytes());
        pages.write(page, 4092, &ours, 100, 4);
        let at = (end.gref as usize - 8) * PAGE + 4092;
        assert_eq!(guest.memory().load32(at, Ordering::Relaxed), end.gref);
        guest.memory().store32(at, !end.gref, Ordering::Relaxed);
        pages.read(page, 4092, &ours, 200, 4);
        assert_eq!(ours.load32(200, Ordering::Relaxed), !end.gref);
    }
    // Much fewer ranges than pages.
    assert!(host.calls().maps < 120, "{}", host.calls().maps);
}

#[test]
fn pages_are_unmapped_together_and_settled() {
    let host = Host::new();
    let guest = guest(&host, 32);
    let mapper = mapper(&host);
    let mut pages = mapper.pages(3, 32);
    for gref in 8..40 {
        assert!(pages.start_map(gref));
    }
    assert!(!pages.start_map(40), "the limit");
    let first = ends(&mut pages, 32);
    let number = |gref: u32| first[gref as usize - 8].page.unwrap();
    for gref in 8..39 {
        pages.unmap(number(gref));
        pages.unmap(number(gref));
    }
    pages.settle();
    assert!(guest.grants().mappings(39) == 1);
    pages.unmap(number(39));
    pages.settle();
    assert_eq!((host.mapped(), host.calls().unmaps), (0, host.calls().maps));
    assert!((8..40).all(|gref| guest.grants().end_access(gref)));
    // And again from the beginning.
    guest.grants().grant(8, 5, false);
    assert!(pages.start_map(8));
    assert!(ends(&mut pages, 1)[0].page.is_some());
    let settling = pages.settling();
    drop(pages);
    assert!(settling.wait(Some(Duration::from_secs(10))));
    assert_eq!(host.mapped(), 0);
}

#[test]
fn a_page_that_is_still_mapped_is_handed_out_again() {
    let host = Host::new();
    guest(&host, 4);
    let mapper = mapper(&host);
    let mut pages = mapper.pages(3, 4);
    pages.start_map(8);
    let page = ends(&mut pages, 1)[0].page.unwrap();
    for _ in 0..50 {
        pages.unmap(page);
        assert!(pages.start_map(8));
        assert_eq!(ends(&mut pages, 1)[0].page, Some(page));
    }
    assert_eq!((host.calls().maps, host.mapped()), (1, 1));
    // Left alone it goes by itself, within a second or two.
    pages.unmap(page);
    for _ in 0..5000 {
        if host.mapped() == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("it stays mapped");
}

#[test]
fn what_a_guest_can_make_us_map_is_bounded() {
    let host = Host::new();
    guest(&host, 2000);
    let mapper = Mapper::start(host.gntdev(), 150).unwrap();
    let mut pages = mapper.pages(3, 40);
    let mut held = std::collections::VecDeque::new();
    let mut refused = 0;
    // Keeps one page of each batch, so that batches are never free.
    for batch in 0..40u32 {
        let mut started = 0;
        for i in 0..8 {
            started += usize::from(pages.start_map(8 + batch * 8 + i));
        }
        for (i, end) in ends(&mut pages, started).into_iter().enumerate() {
            match end.page {
                Some(page) if i == 0 => held.push_back(page),
                Some(page) => pages.unmap(page),
                None => refused += 1,
            }
        }
        assert!(host.mapped() <= 80, "{}", host.mapped());
    }
    assert!(refused > 0);
    // All of them together.
    let mut more: Vec<Pages> = (0..4).map(|_| mapper.pages(3, 60)).collect();
    for p in &mut more {
        let started = (500..560).filter(|&g| p.start_map(g)).count();
        ends(p, started);
    }
    assert!(host.mapped() <= 150, "{}", host.mapped());
    drop(more);
    for page in held {
        pages.unmap(page);
    }
    pages.settle();
    assert!(pages.start_map(8));
    assert!(ends(&mut pages, 1)[0].page.is_some(), "there is room again");
}

#[test]
fn ranges_are_bounded_as_well() {
    let host = Host::new();
    guest(&host, 200);
    for (most, expected) in [(1000, 36), (10, 10)] {
        let mapper = Mapper::with(host.gntdev(), 1000, most).unwrap();
        let mut pages = mapper.pages(3, 40);
        // One by one, so that each is a range of its own.
        let mut one = |gref| {
            assert!(pages.start_map(gref));
            ends(&mut pages, 1)[0].page
        };
        let numbers: Vec<u32> = (8..47).filter_map(&mut one).collect();
        assert_eq!((numbers.len(), host.mapped()), (expected, expected));
        assert_eq!(one(100), None);
        numbers.into_iter().for_each(|n| pages.unmap(n));
        pages.settle();
        assert!(pages.start_map(100));
        assert!(ends(&mut pages, 1)[0].page.is_some(), "there is room again");
    }
}

#[test]
fn ends_that_nobody_asked_for_are_undone() {
    let host = Host::new();
    guest(&host, 64);
    let mapper = mapper(&host);
    for round in 0..20 {
        let mut pages = mapper.pages(3, 64);
        for gref in 8..72 {
            assert!(pages.start_map(gref));
        }
        if round % 2 == 0 {
            ends(&mut pages, 64);
        }
        let settling = pages.settling();
        drop(pages);
        // Told when all is undone, and not only what was given up.
        assert!(settling.wait(Some(Duration::from_secs(10))));
        assert_eq!(host.mapped(), 0);
    }
}

#[test]
fn the_mapper_may_go_first() {
    let host = Host::new();
    guest(&host, 8);
    let mapper = mapper(&host);
    let mut pages = mapper.pages(3, 8);
    (8..12).for_each(|gref| assert!(pages.start_map(gref)));
    let numbers: Vec<u32> = ends(&mut pages, 4).iter().map(|e| e.page.unwrap()).collect();
    drop(mapper);
    let ours = local(1);
    pages.read(numbers[0], 0, &ours, 0, 4096);
    assert!(!pages.start_map(12));
    numbers.into_iter().for_each(|n| pages.unmap(n));
    pages.settle();
    drop(pages);
    assert_eq!(host.mapped(), 0);
}

/// Many rings at once, pages asked for and given up in any order: contents are right all the while.
#[test]
fn any_order() {
    let host = Host::new();
    let guest = guest(&host, 256);
    let mapper = mapper(&host);
    for page in 0..256usize {
        guest.memory().store32(page * PAGE, page as u32 ^ 0xabcd, Ordering::Relaxed);
    }
    std::thread::scope(|s| {
        for seed in 1..=2u64 {
            let mut pages = mapper.pages(3, 48);
            s.spawn(move || {
                let mut state = seed;
                let mut random = |n: u64| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 33) % n
                };
                let (mut here, mut asked) = (Vec::<(u32, u32)>::new(), HashSet::new());
                let ours = local(1);
                for _ in 0..3000 {
                    let gref = 8 + random(300) as u32;
                    match random(4) {
                        0 | 1 => {
                            let known = asked.contains(&gref) || here.iter().any(|h| h.0 == gref);
                            if !known && pages.start_map(gref) {
                                asked.insert(gref);
                            }
                        }
                        2 if !here.is_empty() => {
                            let (_, page) = here.swap_remove(random(here.len() as u64) as usize);
                            pages.unmap(page);
                        }
                        _ => {}
                    }
                    while let Some(end) = pages.next_mapped() {
                        assert!(asked.remove(&end.gref));
                        assert_eq!(end.page.is_some(), end.gref < 8 + 256);
                        here.extend(end.page.map(|p| (end.gref, p)));
                    }
                    for &(gref, page) in &here {
                        pages.read(page, 0, &ours, 0, 4);
                        assert_eq!(ours.load32(0, Ordering::Relaxed), (gref - 8) ^ 0xabcd);
                    }
                }
            });
        }
    });
    drop(mapper);
    assert_eq!(host.mapped(), 0);
}
