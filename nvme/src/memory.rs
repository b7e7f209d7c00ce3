//! Bus addresses: [`DmaMapper`] says where a device sees a region, [`AddressTable`] is what a queue
//! pair looks that up in, and [`keep_for_good`] is where memory goes that a device may never let go.
//!
//! Mapping is control path. Looking up is hot: one table entry per segment, then arithmetic.

use std::any::Any;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use dma::{Held, Region, RegionId, Seg};
use reactor::sync::Mutex;

/// Size of the pages that [`IovaMap::Pages`] counts in, as a power of two.
const PAGE_SHIFT: u32 = 12;
const PAGE: u64 = 1 << PAGE_SHIFT;

/// Where a device sees a region.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IovaMap {
    /// In one piece, from this address on: an IOMMU, or memory that is contiguous for the bus.
    Contiguous(u64),
    /// In single pages of 4 KiB, wherever each lies: no IOMMU. One address per page, in order.
    Pages(Box<[u64]>),
}

/// Makes regions reachable for one device. Called by control paths only.
pub trait DmaMapper: Send + Sync {
    /// Makes the region reachable and says where. The memory stays where it is until
    /// [`DmaMapper::unmap`]. Not called again for a region that is mapped. Who keeps the region does so
    /// by a [`Held`]: an `Arc` would make it one of the users, while any of whom is left the driver lets
    /// no region go.
    ///
    /// # Errors
    /// Says why the device cannot reach it. An address that is not certain is an error: a guessed
    /// one lets the device write over somebody's memory.
    fn map(&self, region: &Arc<Region>) -> Result<IovaMap, String>;

    /// The device need not reach the region any more; its memory may go away after this.
    fn unmap(&self, region: &Region);
}

/// A region that is mapped, by region id: under which number, by whom, and where.
struct Live {
    number: u64,
    mapping: Weak<Mapping>,
    map: IovaMap,
}

/// All that one device can reach. Shared by the controller and its queue pairs, so that a region
/// that several of them know is mapped once.
pub(crate) struct DeviceMemory {
    mapper: Arc<dyn DmaMapper>,
    page_shift: u32,
    live: Mutex<Vec<Option<Live>>>,
}

impl DeviceMemory {
    /// For a controller with memory pages of `1 << page_shift` bytes.
    pub(crate) fn new(mapper: Arc<dyn DmaMapper>, page_shift: u32) -> Arc<DeviceMemory> {
        let live = (0..RegionId::MAX).map(|_| None).collect();
        Arc::new(DeviceMemory { mapper, page_shift, live: Mutex::new(live) })
    }

    /// The controller's memory page, as a power of two.
    pub(crate) fn page_shift(&self) -> u32 {
        self.page_shift
    }

    /// Maps a region for as long as the result lives.
    pub(crate) fn map(self: &Arc<Self>, region: &Arc<Region>) -> Result<Arc<Mapping>, String> {
        let mut live = self.live.lock();
        let slot = &mut live[region.id().index()];
        if let Some(mapping) = slot.as_ref().and_then(|l| l.mapping.upgrade()) {
            return Ok(mapping);
        }
        // An entry without a mapping: the last one is just being dropped on another thread. It
        // still holds the region, so the id is the same region's; its map is taken over.
        let map = match slot.take() {
            Some(old) => old.map,
            None => {
                let map = self.mapper.map(region)?;
                if let Err(why) = self.check(region, &map) {
                    self.mapper.unmap(region);
                    return Err(why);
                }
                map
            }
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mapping = Arc::new(Mapping {
            region: Held::new(region),
            map: map.clone(),
            number,
            memory: self.clone(),
        });
        *slot = Some(Live { number, mapping: Arc::downgrade(&mapping), map });
        Ok(mapping)
    }

    /// Whether a map makes sense.
    fn check(&self, region: &Region, map: &IovaMap) -> Result<(), String> {
        let page = 1u64 << self.page_shift;
        let len = region.len() as u64;
        match map {
            IovaMap::Contiguous(base) if !base.is_multiple_of(page) => {
                Err(format!("bus address {base:#x} is no multiple of the page size {page}"))
            }
            IovaMap::Contiguous(base) if base.checked_add(len).is_none() => {
                Err(format!("{len} bytes at bus address {base:#x} pass the end of the bus"))
            }
            IovaMap::Pages(_) if self.page_shift != PAGE_SHIFT => Err(format!(
                "the controller wants pages of {page} bytes in one piece, this memory has pieces \
                 of {PAGE}"
            )),
            IovaMap::Pages(p) if p.len() as u64 != len >> PAGE_SHIFT => {
                Err(format!("{} page addresses for {len} bytes", p.len()))
            }
            IovaMap::Pages(p) => match p.iter().find(|a| !a.is_multiple_of(PAGE)) {
                Some(bad) => Err(format!("page address {bad:#x} is no page")),
                None => Ok(()),
            },
            IovaMap::Contiguous(_) => Ok(()),
        }
    }
}

static NUMBER: AtomicU64 = AtomicU64::new(0);

/// A region that is mapped as long as this lives.
pub(crate) struct Mapping {
    region: Held,
    map: IovaMap,
    number: u64,
    memory: Arc<DeviceMemory>,
}

impl Mapping {
    /// The memory.
    pub(crate) fn region(&self) -> &Arc<Region> {
        self.region.memory()
    }

    /// Bus address of the byte at `offset`, which lies in the region.
    pub(crate) fn bus(&self, offset: u64) -> u64 {
        match &self.map {
            IovaMap::Contiguous(base) => base + offset,
            IovaMap::Pages(p) => p[(offset >> PAGE_SHIFT) as usize] + (offset & (PAGE - 1)),
        }
    }

    /// Whether the device sees `[offset, offset + len)` in one piece.
    pub(crate) fn contiguous(&self, offset: u64, len: u64) -> bool {
        let start = self.bus(offset);
        (0..len).step_by(PAGE as usize).all(|at| self.bus(offset + at) == start + at)
    }

    /// Length of the region in bytes.
    fn len(&self) -> u64 {
        self.region.len() as u64
    }

    /// Whether the region has no user any more, so that no new request can name it.
    fn is_unused(&self) -> bool {
        self.region.is_unused()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let mut live = self.memory.live.lock();
        let slot = &mut live[self.region.id().index()];
        // Unless a new mapping has taken it over.
        if slot.as_ref().is_some_and(|l| l.number == self.number) {
            *slot = None;
            self.memory.mapper.unmap(&self.region);
        }
    }
}

/// The hot half of a table entry.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry {
    /// Bus address of the region's first byte, a multiple of a page; or [`Entry::PAGED`].
    base: u64,
    /// Length in bytes of a region in one piece; 0 of others, and if there is nothing here, so that the
    /// bounds check finds that too.
    len: u64,
}

impl Entry {
    /// No bus address of a page: says that there is one address per page.
    const PAGED: u64 = 1;
    /// Of no region.
    const NONE: Entry = Entry { base: 0, len: 0 };
}

const _: () = assert!(size_of::<Entry>() == 16);

/// Where a segment lies on the bus.
#[derive(Clone, Copy)]
pub(crate) enum Place<'a> {
    /// In one piece from here.
    Run(u64),
    /// In pages: their addresses, and the segment's offset from the first.
    Pages(&'a [u64], u64),
}

/// The regions that one queue pair knows, by their id.
///
/// Holds each region, so that an id found here never means another one. A region that has no user
/// any more is let go, once every request that might name it has ended.
pub(crate) struct AddressTable {
    entries: Box<[Entry]>,
    mappings: Box<[Option<Arc<Mapping>>]>,
    retired: Vec<(RegionId, u64)>,
    memory: Arc<DeviceMemory>,
}

impl AddressTable {
    pub(crate) fn new(memory: Arc<DeviceMemory>) -> AddressTable {
        AddressTable {
            entries: vec![Entry::NONE; RegionId::MAX].into_boxed_slice(),
            mappings: (0..RegionId::MAX).map(|_| None).collect(),
            retired: Vec::new(),
            memory,
        }
    }

    /// Makes a region known; nothing if it is known already.
    pub(crate) fn register(&mut self, region: &Arc<Region>) -> Result<(), String> {
        let at = region.id().index();
        if self.mappings[at].is_some() {
            return Ok(());
        }
        let mapping = self.memory.map(region)?;
        self.entries[at] = match &mapping.map {
            IovaMap::Contiguous(base) => Entry { base: *base, len: region.len() as u64 },
            IovaMap::Pages(_) => Entry { base: Entry::PAGED, len: 0 },
        };
        self.mappings[at] = Some(mapping);
        Ok(())
    }

    /// Where a segment begins on the bus, if its region is known and in one piece there.
    #[inline(always)]
    pub(crate) fn run(&self, seg: &Seg) -> Option<u64> {
        let entry = self.entries.get(seg.region().index())?;
        // The segment lies inside the region it was made from, so the sum does not overflow.
        let inside = seg.offset() + u64::from(seg.len()) <= entry.len;
        inside.then(|| entry.base + seg.offset())
    }

    /// The place of a segment, `None` if its region is not known.
    #[inline]
    pub(crate) fn place(&self, seg: &Seg) -> Option<Place<'_>> {
        if let Some(bus) = self.run(seg) {
            return Some(Place::Run(bus));
        }
        let at = seg.region().index();
        if self.entries.get(at)?.base != Entry::PAGED {
            return None;
        }
        let mapping = self.mappings.get(at)?.as_ref()?;
        match &mapping.map {
            // As above.
            IovaMap::Pages(p) if seg.offset() + u64::from(seg.len()) <= mapping.len() => {
                Some(Place::Pages(p, seg.offset()))
            }
            _ => None,
        }
    }

    /// The memory of a region that is known.
    pub(crate) fn region(&self, id: RegionId) -> Option<&Region> {
        Some(self.mappings.get(id.index())?.as_ref()?.region())
    }

    /// Takes out of use the regions that only queues and mappers hold. `now` is the
    /// queue's time, and `oldest` the time of submission of its oldest request, if there is one.
    pub(crate) fn prune(&mut self, now: u64, oldest: Option<u64>) {
        self.retired.retain(|&(id, since)| {
            let wait = oldest.is_some_and(|t| t <= since);
            if !wait {
                self.mappings[id.index()] = None;
            }
            wait
        });
        for (entry, mapping) in self.entries.iter_mut().zip(&self.mappings) {
            if let Some(m) = mapping
                && *entry != Entry::NONE
                && m.is_unused()
            {
                *entry = Entry::NONE;
                self.retired.push((m.region.id(), now));
            }
        }
    }

    /// Takes all mappings out: for memory that must outlive the queue.
    pub(crate) fn take_mappings(&mut self) -> Vec<Arc<Mapping>> {
        self.entries.fill(Entry::NONE);
        self.mappings.iter_mut().filter_map(Option::take).collect()
    }
}

/// What is kept for good, as a list that only grows.
struct Kept {
    #[expect(dead_code, reason = "held, never looked at")]
    what: Arc<dyn Any + Send + Sync>,
    next: OnceLock<Box<Kept>>,
}

static KEPT: OnceLock<Box<Kept>> = OnceLock::new();
static KEPT_COUNT: AtomicUsize = AtomicUsize::new(0);

/// Keeps memory until the process ends, because a device that could not be stopped may still
/// write to it. The end of the process takes the device from it (the kernel resets what it owns).
pub(crate) fn keep_for_good(what: Arc<dyn Any + Send + Sync>) {
    KEPT_COUNT.fetch_add(1, Ordering::Relaxed);
    let mut node = Box::new(Kept { what, next: OnceLock::new() });
    let mut place = &KEPT;
    while let Err(back) = place.set(node) {
        node = back;
        match place.get() {
            Some(kept) => place = &kept.next,
            None => return,
        }
    }
}

/// How many pieces of memory are kept for good in this process, since a device could not be
/// stopped: for diagnosis.
pub fn quarantined() -> usize {
    KEPT_COUNT.load(Ordering::Relaxed)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use dma::PageSize;

    /// Maps regions as a test says, and counts what is mapped.
    pub(crate) struct FakeMapper {
        pub(crate) map: Box<dyn Fn(&Region) -> IovaMap + Send + Sync>,
        pub(crate) mapped: AtomicUsize,
    }

    impl FakeMapper {
        pub(crate) fn new(
            map: impl Fn(&Region) -> IovaMap + Send + Sync + 'static,
        ) -> Arc<FakeMapper> {
            Arc::new(FakeMapper { map: Box::new(map), mapped: AtomicUsize::new(0) })
        }
    }

    impl DmaMapper for FakeMapper {
        fn map(&self, region: &Arc<Region>) -> Result<IovaMap, String> {
            self.mapped.fetch_add(1, Ordering::Relaxed);
            Ok((self.map)(region))
        }

        fn unmap(&self, _: &Region) {
            self.mapped.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn pages(region: &Region) -> IovaMap {
        // Backwards, with holes.
        let n = region.len() as u64 / PAGE;
        IovaMap::Pages((0..n).map(|i| 0x100_0000 - i * 2 * PAGE).collect())
    }

    #[test]
    fn segments_resolve_inside_known_regions_only() {
        let a = Region::new(8192, PageSize::Small).unwrap();
        let b = Region::new(8192, PageSize::Small).unwrap();
        let (ida, mapper) = (
            a.id(),
            FakeMapper::new({
                let id = a.id();
                move |r| if r.id() == id { IovaMap::Contiguous(0x7000) } else { pages(r) }
            }),
        );
        let mut t = AddressTable::new(DeviceMemory::new(mapper.clone(), 12));
        assert!(t.place(&a.seg(0, 512).unwrap()).is_none());
        t.register(&a).unwrap();
        t.register(&a).unwrap();
        assert_eq!(mapper.mapped.load(Ordering::Relaxed), 1);
        assert!(matches!(t.place(&a.seg(512, 4096).unwrap()), Some(Place::Run(0x7200))));
        assert!(t.place(&b.seg(0, 512).unwrap()).is_none());
        t.register(&b).unwrap();
        let Some(Place::Pages(p, at)) = t.place(&b.seg(5000, 100).unwrap()) else { panic!() };
        assert_eq!((p, at), (&[0x100_0000, 0xff_e000][..], 5000));
        assert_eq!(t.region(ida).unwrap().id(), ida);
    }

    #[test]
    fn a_region_that_nobody_holds_is_let_go_after_its_requests() {
        let mapper = FakeMapper::new(|_| IovaMap::Contiguous(0x1000));
        let mut t = AddressTable::new(DeviceMemory::new(mapper.clone(), 12));
        let a = Region::new(4096, PageSize::Small).unwrap();
        let seg = a.seg(0, 512).unwrap();
        t.register(&a).unwrap();
        t.prune(10, None);
        assert!(t.place(&seg).is_some(), "still held");
        drop(a);
        t.prune(20, Some(15));
        assert!(t.place(&seg).is_none(), "not for new requests");
        t.prune(30, Some(20));
        assert_eq!(mapper.mapped.load(Ordering::Relaxed), 1, "an old request is in flight");
        t.prune(40, Some(21));
        assert_eq!(mapper.mapped.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn queues_of_other_devices_do_not_keep_a_region() {
        let table = || {
            let mapper = FakeMapper::new(|_| IovaMap::Contiguous(0x1000));
            (AddressTable::new(DeviceMemory::new(mapper.clone(), 12)), mapper)
        };
        let (mut nvme, mut files) = ([table(), table()], dma::Table::new());
        let a = Region::new(4096, PageSize::Small).unwrap();
        nvme.iter_mut().for_each(|(t, _)| t.register(&a).unwrap());
        files.register(&a);
        assert_eq!(a.tables(), 3);
        let user = a.clone();
        drop(a);
        let seg = user.seg(0, 512).unwrap();
        files.prune(|_| true);
        for (t, mapper) in &mut nvme {
            t.prune(1, None);
            t.prune(2, None);
            assert!(t.place(&seg).is_some());
            assert_eq!(mapper.mapped.load(Ordering::Relaxed), 1);
        }
        drop(user);
        for (t, mapper) in &mut nvme {
            t.prune(3, None);
            t.prune(4, None);
            assert!(t.place(&seg).is_none());
            assert_eq!(mapper.mapped.load(Ordering::Relaxed), 0);
        }
        assert!(files.find(&seg).is_some(), "each lets go for itself");
        files.prune(|_| true);
        assert!(files.find(&seg).is_none());
    }

    #[test]
    fn queues_share_a_mapping_and_let_go_one_by_one() {
        let mapper = FakeMapper::new(|_| IovaMap::Contiguous(0x1000));
        let memory = DeviceMemory::new(mapper.clone(), 12);
        let mut tables = [AddressTable::new(memory.clone()), AddressTable::new(memory)];
        let a = Region::new(4096, PageSize::Small).unwrap();
        for t in &mut tables {
            t.register(&a).unwrap();
        }
        assert_eq!(mapper.mapped.load(Ordering::Relaxed), 1);
        drop(a);
        for (t, left) in tables.iter_mut().zip([1, 0]) {
            t.prune(1, None);
            t.prune(2, None);
            assert_eq!(mapper.mapped.load(Ordering::Relaxed), left);
        }
    }

    #[test]
    fn a_mapping_that_is_dropped_while_another_begins_stays_mapped() {
        let mapper = FakeMapper::new(|_| IovaMap::Contiguous(0x1000));
        let memory = DeviceMemory::new(mapper.clone(), 12);
        let region = Region::new(4096, PageSize::Small).unwrap();
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    for _ in 0..300 {
                        let m = memory.map(&region).unwrap();
                        assert_eq!(mapper.mapped.load(Ordering::Relaxed), 1);
                        drop(m);
                    }
                });
            }
        });
        assert_eq!(mapper.mapped.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn maps_that_make_no_sense_are_refused() {
        let region = Region::new(8192, PageSize::Small).unwrap();
        for (map, shift) in [
            (IovaMap::Contiguous(0x1200), 12),
            (IovaMap::Contiguous(0x1000), 13),
            (IovaMap::Contiguous(u64::MAX - 4095), 12),
            (IovaMap::Pages(Box::new([0x1000])), 12),
            (IovaMap::Pages(Box::new([0x1000, 0x2001])), 12),
            (IovaMap::Pages(Box::new([0x1000, 0x2000])), 13),
        ] {
            let mapper = FakeMapper::new(move |_| map.clone());
            let memory = DeviceMemory::new(mapper.clone(), shift);
            assert!(memory.map(&region).is_err());
            assert_eq!(mapper.mapped.load(Ordering::Relaxed), 0, "a refused map is undone");
        }
    }

    #[test]
    fn contiguity() {
        let region = Region::new(3 << 12, PageSize::Small).unwrap();
        let mapper = FakeMapper::new(|_| IovaMap::Pages(Box::new([0x1000, 0x2000, 0x5000])));
        let m = DeviceMemory::new(mapper, 12).map(&region).unwrap();
        assert!(m.contiguous(0, 8192));
        assert!(!m.contiguous(0, 8193));
        assert!(!m.contiguous(4096, 8192));
        assert_eq!(m.bus(8193), 0x5001);
    }

    #[test]
    fn what_is_kept_stays() {
        let thing = Arc::new(5u32);
        let before = quarantined();
        keep_for_good(thing.clone());
        keep_for_good(thing.clone());
        assert_eq!(Arc::strong_count(&thing), 3);
        // Other tests of this process may keep things meanwhile.
        assert!(quarantined() - before >= 2);
    }
}
