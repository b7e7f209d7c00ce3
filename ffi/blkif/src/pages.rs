//! [`PageTable`]: which granted pages are mapped for good (persistent grants), by reference.
//!
//! One per ring, used by its reactor only. Bounded when it is made; a look-up is one multiplication
//! and normally one comparison, and never looks at more than a few places, whatever references a
//! guest chooses: a reference that finds no place near its home is copied instead of mapped.

use crate::grants::Page;

/// How far from its home an entry may lie.
const REACH: usize = 16;
/// Ages are kept in units of 2^27 ns, about an eighth of a second.
pub(crate) const AGE_SHIFT: u32 = 27;
/// A page unused for about a minute is given back.
const IDLE: u32 = (60_000_000_000u64 >> AGE_SHIFT) as u32;
/// When the table is full, about a second must do; a refused reference may be tried again then.
const SHORT: u32 = (1_000_000_000u64 >> AGE_SHIFT) as u32;
/// A sweep looks at this share of the table.
const SWEEP: usize = 16;

/// No entry here.
const NONE: u32 = u32::MAX;
/// The page is being mapped.
const PENDING: u32 = u32::MAX - 1;
/// The page could not be mapped.
const REFUSED: u32 = u32::MAX - 2;

#[derive(Clone, Copy, Debug)]
// Of a size by which an index is easily multiplied.
#[repr(align(16))]
struct Entry {
    gref: u32,
    /// A page below [`Page::LIMIT`], or one of the three above.
    page: u32,
    /// When last used.
    used: u32,
}

/// What is known of a reference that is not mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Absent {
    /// Nothing: a mapping may be started.
    Unknown,
    /// A mapping is on its way.
    Pending,
    /// Not to be mapped now.
    Refused,
}

/// Mapped pages by grant reference.
#[derive(Debug)]
pub(crate) struct PageTable {
    /// A power of two, and [`REACH`] more so that a probe need not wrap.
    entries: Box<[Entry]>,
    shift: u32,
    limit: u32,
    live: u32,
    pending: u32,
    hand: usize,
    full: bool,
}

impl PageTable {
    /// A table of at most `limit` pages; 0 for a frontend without persistent grants.
    pub(crate) fn new(limit: u32) -> PageTable {
        let homes = (limit as usize * 2).next_power_of_two().max(2);
        let none = Entry { gref: 0, page: NONE, used: 0 };
        PageTable {
            entries: vec![none; homes + REACH].into_boxed_slice(),
            shift: 32 - homes.ilog2(),
            limit,
            live: 0,
            pending: 0,
            hand: 0,
            full: false,
        }
    }

    /// References that guests hand out lie next to each other; this spreads them evenly.
    #[inline]
    fn home(&self, gref: u32) -> usize {
        (gref.wrapping_mul(0x9e37_79b1) >> self.shift) as usize
    }

    /// The page of a reference, if it is mapped and lies at its home, where nearly all do. `now` is
    /// the time in units of 2^27 ns.
    #[inline]
    pub(crate) fn find_at_home(&mut self, gref: u32, now: u32) -> Option<Page> {
        let home = self.home(gref);
        let entry = &mut self.entries[home];
        if entry.gref != gref || entry.page >= Page::LIMIT {
            return None;
        }
        entry.used = now;
        Some(Page(entry.page))
    }

    /// The page of a reference, if it is mapped.
    #[inline]
    pub(crate) fn find(&mut self, gref: u32, now: u32) -> Option<Page> {
        if self.live == 0 {
            return None;
        }
        self.find_at_home(gref, now).or_else(|| self.find_away(gref, now))
    }

    #[inline(never)]
    fn find_away(&mut self, gref: u32, now: u32) -> Option<Page> {
        let home = self.home(gref);
        let found = self.entries[home..home + REACH]
            .iter_mut()
            .find(|e| e.gref == gref && e.page < Page::LIMIT)?;
        found.used = now;
        Some(Page(found.page))
    }

    fn position(&self, gref: u32) -> Option<usize> {
        let home = self.home(gref);
        (home..home + REACH).find(|&i| self.entries[i].gref == gref && self.entries[i].page != NONE)
    }

    /// What is known of a reference that [`PageTable::find`] did not find.
    pub(crate) fn absent(&self, gref: u32) -> Absent {
        if self.limit == 0 {
            return Absent::Refused;
        }
        match self.position(gref).map(|i| self.entries[i].page) {
            None => Absent::Unknown,
            Some(PENDING) => Absent::Pending,
            Some(_) => Absent::Refused,
        }
    }

    /// Makes an entry for a mapping that is being started; false if there is no place for it.
    pub(crate) fn reserve(&mut self, gref: u32, now: u32) -> bool {
        debug_assert!(self.position(gref).is_none());
        if self.live >= self.limit {
            self.full = true;
            return false;
        }
        let home = self.home(gref);
        let place = self.entries[home..home + REACH].iter_mut().find(|e| e.page == NONE);
        let Some(entry) = place else { return false };
        *entry = Entry { gref, page: PENDING, used: now };
        self.live += 1;
        self.pending += 1;
        true
    }

    /// Takes a reservation back.
    pub(crate) fn cancel(&mut self, gref: u32) {
        if let Some(i) = self.position(gref) {
            debug_assert_eq!(self.entries[i].page, PENDING);
            self.entries[i].page = NONE;
            self.live -= 1;
            self.pending -= 1;
        }
    }

    /// A mapping for which there is a reservation ended.
    pub(crate) fn mapped(&mut self, gref: u32, page: Option<Page>, now: u32) {
        let place = self.position(gref).filter(|&i| self.entries[i].page == PENDING);
        let i = place.expect("grants tell the end of a mapping once, and of no other");
        debug_assert!(page.is_none_or(|p| p.0 < Page::LIMIT));
        self.entries[i] = Entry { gref, page: page.map_or(REFUSED, |p| p.0), used: now };
        self.pending -= 1;
    }

    /// Mappings started and not yet ended.
    #[inline]
    pub(crate) fn pending(&self) -> u32 {
        self.pending
    }

    /// Pages mapped, being mapped or refused.
    #[cfg(test)]
    pub(crate) fn live(&self) -> u32 {
        self.live
    }

    /// Looks at a part of the table and forgets what has not been used for long: all of it is seen
    /// within [`SWEEP`] calls. `unmap` is called with each page that is given up.
    pub(crate) fn sweep(&mut self, now: u32, mut unmap: impl FnMut(Page)) {
        if self.live == 0 {
            return;
        }
        let idle = if self.full { SHORT } else { IDLE };
        let end = (self.hand + self.entries.len().div_ceil(SWEEP)).min(self.entries.len());
        for entry in &mut self.entries[self.hand..end] {
            let age = now.wrapping_sub(entry.used);
            let old = match entry.page {
                NONE | PENDING => false,
                REFUSED => age >= SHORT,
                _ => age >= idle,
            };
            if old {
                if entry.page < Page::LIMIT {
                    unmap(Page(entry.page));
                }
                entry.page = NONE;
                self.live -= 1;
            }
        }
        self.hand = end;
        if end == self.entries.len() {
            self.hand = 0;
            self.full = false;
        }
    }

    /// Gives up all pages. Mappings on their way are forgotten.
    pub(crate) fn clear(&mut self, mut unmap: impl FnMut(Page)) {
        for entry in &mut self.entries {
            if entry.page < Page::LIMIT {
                unmap(Page(entry.page));
            }
            entry.page = NONE;
        }
        (self.live, self.pending) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(t: &mut PageTable, grefs: impl Iterator<Item = u32>, now: u32) -> u32 {
        let mut n = 0;
        for g in grefs {
            if t.reserve(g, now) {
                t.mapped(g, Some(Page(g & 0xffff ^ 0x5555)), now);
                n += 1;
            }
        }
        n
    }

    #[test]
    fn neighbouring_references_all_find_a_place_near_home() {
        for (first, step) in [(8u32, 1u32), (0, 1), (30_000, 1), (9, 2), (100, 16)] {
            let mut t = PageTable::new(1056);
            assert_eq!(fill(&mut t, (0..1056).map(|i| first + i * step), 0), 1056);
            for i in 0..1056 {
                let g = first + i * step;
                assert_eq!(t.find(g, 1), Some(Page(g ^ 0x5555)));
            }
            assert_eq!(t.find(first + 1056 * step, 1), None);
            assert_eq!(t.live(), 1056);
        }
    }

    #[test]
    fn reference_zero_is_not_taken_for_an_empty_entry() {
        let mut t = PageTable::new(4);
        assert_eq!(t.find(0, 0), None);
        assert_eq!(t.absent(0), Absent::Unknown);
        assert_eq!(fill(&mut t, 0..1, 0), 1);
        assert_eq!(t.find(0, 0), Some(Page(0x5555)));
    }

    #[test]
    fn references_made_to_collide_are_bounded() {
        // All with the home of 0: multiples of the multiplier's inverse, shifted out of sight.
        let mut t = PageTable::new(1000);
        let inverse = (0..5)
            .fold(1u32, |x, _| x.wrapping_mul(2u32.wrapping_sub(0x9e37_79b1u32.wrapping_mul(x))));
        let grefs: Vec<u32> = (0..500u32).map(|i| inverse.wrapping_mul(i)).collect();
        assert!(grefs.iter().all(|&g| t.home(g) == 0));
        assert_eq!(fill(&mut t, grefs.iter().copied(), 0), REACH as u32);
        assert_eq!(grefs.iter().filter(|&&g| t.find(g, 0).is_some()).count(), REACH);
    }

    #[test]
    fn a_full_table_refuses_then_forgets_what_was_not_used_for_a_second() {
        let mut t = PageTable::new(32);
        assert_eq!(fill(&mut t, 100..140, 0), 32);
        let mut gone = Vec::new();
        for g in 100..116 {
            t.find(g, SHORT);
        }
        for _ in 0..SWEEP {
            t.sweep(SHORT, |p| gone.push(p.0 ^ 0x5555));
        }
        gone.sort_unstable();
        assert_eq!(gone, (116..132).collect::<Vec<u32>>());
        // No longer full: a second's rest is fine again, a minute's is not.
        for _ in 0..SWEEP {
            t.sweep(10 * SHORT, |_| panic!("not idle for long"));
        }
        for _ in 0..SWEEP {
            t.sweep(SHORT + IDLE, |p| gone.push(p.0));
        }
        assert_eq!((gone.len(), t.live()), (32, 0));
    }

    #[test]
    fn pending_and_refused() {
        let mut t = PageTable::new(8);
        assert!(t.reserve(5, 0));
        assert_eq!((t.find(5, 0), t.absent(5), t.pending()), (None, Absent::Pending, 1));
        t.cancel(5);
        assert_eq!((t.absent(5), t.pending(), t.live()), (Absent::Unknown, 0, 0));
        assert!(t.reserve(5, 0));
        for _ in 0..SWEEP {
            t.sweep(10 * IDLE, |_| panic!("a page that is being mapped"));
        }
        t.mapped(5, None, 0);
        assert_eq!((t.find(5, 0), t.absent(5)), (None, Absent::Refused));
        for _ in 0..SWEEP {
            t.sweep(SHORT, |_| panic!("it had no page"));
        }
        assert_eq!((t.absent(5), t.live()), (Absent::Unknown, 0));
        assert_eq!(PageTable::new(0).absent(7), Absent::Refused);
    }
}
