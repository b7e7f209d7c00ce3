//! Grants and events without a hypervisor: both ends of a ring live in this process.
//!
//! [`GrantTable`] is the part of Xen that both ends share, [`LocalGrants`] the backend's way to
//! it, [`Signal`] an event channel that costs one atomic. For the demo, measurements and tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dma::Region;

use crate::abi::PAGE;
use crate::grants::{
    CopyOp, Direction, EventChannel, GNTST_BAD_COPY_ARG, GNTST_BAD_GNTREF, GNTST_OKAY,
    GNTST_PERMISSION_DENIED, GrantError, Grants, Mapped, Page,
};

/// Entries at the start of a table that are never used, as in a real one.
pub(crate) const RESERVED_GRANTS: u32 = 8;

/// How many mappings can be started and not yet told of.
const MAPS: usize = 1024;

// An entry is one word: page number in the low half, then flags, then the count of mappings.
const VALID: u64 = 1 << 32;
const READ_ONLY: u64 = 1 << 33;
const MAPPING: u64 = 1 << 40;
const FRAME: u64 = 0xffff_ffff;

/// In place of the reference by which a page is mapped.
const UNMAPPED: u32 = u32::MAX;

/// What a frontend grants to a backend: page numbers within the frontend's region, by reference.
/// Both sides use it at once; each entry is one atomic word.
#[derive(Debug)]
pub struct GrantTable {
    entries: Box<[AtomicU64]>,
}

impl GrantTable {
    /// A table of `count` entries, all empty.
    pub fn new(count: u32) -> Arc<GrantTable> {
        Arc::new(GrantTable { entries: (0..count).map(|_| AtomicU64::new(0)).collect() })
    }

    /// How many entries there are.
    #[expect(clippy::len_without_is_empty, reason = "a table without entries is of no use")]
    pub fn len(&self) -> u32 {
        self.entries.len() as u32
    }

    fn entry(&self, gref: u32) -> Option<&AtomicU64> {
        self.entries.get(gref as usize)
    }

    /// The frontend grants access to its page number `page`. Panics if the entry is in use.
    pub fn grant(&self, gref: u32, page: u32, read_only: bool) {
        let word = u64::from(page) | VALID | if read_only { READ_ONLY } else { 0 };
        let entry = self.entry(gref).expect("the frontend hands out entries of its own table");
        let old = entry.swap(word, Ordering::AcqRel);
        assert!(old & VALID == 0, "grant reference {gref} is in use");
    }

    /// Whether the backend has the page mapped.
    #[inline]
    pub fn mapped(&self, gref: u32) -> bool {
        self.entry(gref).is_some_and(|e| e.load(Ordering::Acquire) >= MAPPING)
    }

    /// The frontend takes the grant back; false if the backend has it mapped.
    pub fn end_access(&self, gref: u32) -> bool {
        let Some(entry) = self.entry(gref) else { return true };
        entry
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |w| (w < MAPPING).then_some(0))
            .is_ok()
    }

    /// How many mappings exist in all.
    pub fn mappings(&self) -> u64 {
        self.entries.iter().map(|e| e.load(Ordering::Acquire) / MAPPING).sum()
    }

    /// The page that a reference grants, and whether it is for reading only.
    pub fn find(&self, gref: u32) -> Option<(u32, bool)> {
        let word = self.entry(gref)?.load(Ordering::Acquire);
        (word & VALID != 0).then_some(((word & FRAME) as u32, word & READ_ONLY != 0))
    }

    /// The backend maps a page, if it may write to it: the page's number.
    pub fn map(&self, gref: u32) -> Option<u32> {
        let take = |w: u64| (w & (VALID | READ_ONLY) == VALID).then_some(w + MAPPING);
        let old = self.entry(gref)?.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).ok()?;
        Some((old & FRAME) as u32)
    }

    /// The backend unmaps a page.
    pub fn unmap(&self, gref: u32) {
        if let Some(entry) = self.entry(gref) {
            let old = entry.fetch_sub(MAPPING, Ordering::AcqRel);
            debug_assert!(old >= MAPPING);
        }
    }
}

/// The backend's access to the pages of a frontend in this process. `start_map` only notes the
/// reference; it is mapped when the end is asked for, in a later turn.
#[derive(Debug)]
pub struct LocalGrants {
    table: Arc<GrantTable>,
    guest: Arc<Region>,
    local: Option<Arc<Region>>,
    started: Vec<u32>,
    /// The reference that each page was mapped by, to unmap it.
    refs: Box<[u32]>,
}

impl LocalGrants {
    /// Access to the pages of `guest` as far as `table` grants it.
    pub fn new(table: Arc<GrantTable>, guest: Arc<Region>) -> LocalGrants {
        let pages = guest.len() / PAGE;
        LocalGrants {
            table,
            guest,
            local: None,
            started: Vec::with_capacity(MAPS),
            refs: vec![UNMAPPED; pages].into_boxed_slice(),
        }
    }

    fn copy_one(&self, local: &Region, op: &CopyOp) -> i16 {
        let word = self.table.entry(op.gref).map_or(0, |e| e.load(Ordering::Acquire));
        let (page, len) = ((word & FRAME) as usize, usize::from(op.len));
        if word & VALID == 0 || page >= self.refs.len() {
            return GNTST_BAD_GNTREF;
        }
        if usize::from(op.offset) + len > PAGE {
            return GNTST_BAD_COPY_ARG;
        }
        let (at, local_at) = (page * PAGE + usize::from(op.offset), op.local as usize);
        match op.direction {
            Direction::FromGuest => dma::copy(&self.guest, at, local, local_at, len),
            Direction::ToGuest if word & READ_ONLY != 0 => return GNTST_PERMISSION_DENIED,
            Direction::ToGuest => dma::copy(local, local_at, &self.guest, at, len),
        }
        GNTST_OKAY
    }
}

impl Grants for LocalGrants {
    fn attach(&mut self, local: &Arc<Region>) {
        self.local = Some(local.clone());
    }

    fn start_copies(&mut self, _ops: &mut Vec<CopyOp>) {}

    fn end_copies(&mut self, ops: &mut Vec<CopyOp>) -> Result<(), GrantError> {
        let local = self.local.as_deref().expect("a backend says first where its buffers are");
        for op in ops {
            op.status = self.copy_one(local, op);
        }
        Ok(())
    }

    fn start_map(&mut self, gref: u32) -> bool {
        let room = self.started.len() < MAPS;
        if room {
            self.started.push(gref);
        }
        room
    }

    fn next_mapped(&mut self) -> Option<Mapped> {
        let gref = self.started.pop()?;
        let frame = self.table.map(gref);
        let page = frame.and_then(|f| match self.refs.get_mut(f as usize) {
            Some(place) if *place == UNMAPPED => {
                *place = gref;
                Some(Page(f))
            }
            // A page that is not there, or is mapped by another reference already.
            _ => {
                self.table.unmap(gref);
                None
            }
        });
        Some(Mapped { gref, page })
    }

    fn unmap(&mut self, page: Page) {
        let gref = std::mem::replace(&mut self.refs[page.0 as usize], UNMAPPED);
        self.table.unmap(gref);
    }

    fn settle(&mut self) {}

    #[inline]
    fn read_page(&self, page: Page, offset: u32, local: &Region, at: usize, len: u32) {
        let from = page.0 as usize * PAGE + offset as usize;
        dma::copy(&self.guest, from, local, at, len as usize);
    }

    #[inline]
    fn write_page(&self, page: Page, offset: u32, local: &Region, at: usize, len: u32) {
        let to = page.0 as usize * PAGE + offset as usize;
        dma::copy(local, at, &self.guest, to, len as usize);
    }
}

/// An event channel between two threads that both poll: a counter, on a cache line of its own.
#[derive(Clone, Debug, Default)]
pub struct Signal(Arc<Line>);

#[derive(Debug, Default)]
#[repr(align(128))]
struct Line(AtomicU64);

impl Signal {
    /// How many events were sent so far.
    #[inline]
    pub fn count(&self) -> u64 {
        self.0.0.load(Ordering::Acquire)
    }
}

impl EventChannel for Signal {
    #[inline]
    fn notify(&mut self) {
        // One sender, so this need not be a read-modify-write of the processor.
        let count = self.0.0.load(Ordering::Relaxed);
        self.0.0.store(count.wrapping_add(1), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(gref: u32, offset: u16, len: u16, direction: Direction) -> CopyOp {
        CopyOp { gref, local: 512, offset, len, direction, status: 99 }
    }

    #[test]
    fn copies_are_checked_one_by_one() {
        let guest = Region::new(2 * PAGE, dma::PageSize::Small).unwrap();
        let local = Region::new(2 * PAGE, dma::PageSize::Small).unwrap();
        guest.write(PAGE, &[7; PAGE]);
        let table = GrantTable::new(16);
        table.grant(8, 1, true);
        table.grant(9, 0, false);
        table.grant(10, 2, false);
        let mut g = LocalGrants::new(table.clone(), guest.clone());
        g.attach(&local);
        let mut ops = vec![
            op(8, 0, 1024, Direction::FromGuest),
            op(9, 512, 1024, Direction::ToGuest),
            op(8, 0, 512, Direction::ToGuest),
            op(9, 4000, 512, Direction::FromGuest),
            op(10, 0, 512, Direction::FromGuest),
            op(11, 0, 512, Direction::FromGuest),
            op(u32::MAX, 0, 512, Direction::FromGuest),
        ];
        g.end_copies(&mut ops).unwrap();
        let statuses: Vec<i16> = ops.iter().map(|o| o.status).collect();
        assert_eq!(statuses, [0, 0, -8, -10, -3, -3, -3]);
        let mut back = [0; 1536];
        guest.read(512, &mut back);
        assert!(back[..1024].iter().all(|&b| b == 7) && back[1024..].iter().all(|&b| b == 0));
    }

    #[test]
    fn a_mapped_page_cannot_be_taken_back() {
        let guest = Region::new(4 * PAGE, dma::PageSize::Small).unwrap();
        let table = GrantTable::new(16);
        table.grant(8, 3, false);
        table.grant(9, 2, true);
        let mut g = LocalGrants::new(table.clone(), guest);
        assert!(g.start_map(8) && g.start_map(9) && g.start_map(12));
        let ends: Vec<Mapped> = std::iter::from_fn(|| g.next_mapped()).collect();
        let page = |gref| ends.iter().find(|m| m.gref == gref).unwrap().page;
        assert_eq!((page(8), page(9), page(12)), (Some(Page(3)), None, None));
        assert!(table.mapped(8) && !table.end_access(8));
        g.unmap(Page(3));
        assert!(!table.mapped(8) && table.end_access(8) && table.end_access(9));
        assert_eq!(table.mappings(), 0);
        // The page is gone for copies too.
        let local = Region::new(PAGE, dma::PageSize::Small).unwrap();
        g.attach(&local);
        let mut ops = vec![op(8, 0, 512, Direction::FromGuest)];
        g.end_copies(&mut ops).unwrap();
        assert_eq!(ops[0].status, GNTST_BAD_GNTREF);
    }

    #[test]
    fn started_maps_are_bounded() {
        let guest = Region::new(PAGE, dma::PageSize::Small).unwrap();
        let mut g = LocalGrants::new(GrantTable::new(16), guest);
        assert_eq!((0..2000).filter(|_| g.start_map(8)).count(), MAPS);
    }
}
