//! [`Table`]: the regions that a queue was told about, and [`Held`]: one of them.
//!
//! A region's users (frontends, images, pools) hold it by an `Arc`, tables by a [`Held`]. So a table
//! can let go of memory that has no user any more, however many other tables hold it, of queues of
//! whatever kind: it need not count them, and two that let go at once do not disturb each other.
//! When the last has, the mapping and the region's number are free.

use std::ops::Deref;
use std::sync::Arc;

use crate::region::gone;
use crate::{Region, RegionId, Seg};

/// A region as a table holds it: the memory stays mapped, and its number its own, but the table is no
/// user of it.
#[derive(Clone, Debug)]
pub struct Held(Arc<Region>);

impl Held {
    /// Holds a region.
    pub fn new(region: &Arc<Region>) -> Held {
        Held(region.for_table())
    }

    /// Whether no user holds the region any more, so that no new request can name it rightly. If so,
    /// it stays so.
    pub fn is_unused(&self) -> bool {
        !self.0.is_used()
    }

    /// The memory for what is itself a part of a queue, such as its rings: that is no user either.
    pub fn memory(&self) -> &Arc<Region> {
        &self.0
    }
}

impl Deref for Held {
    type Target = Region;

    #[inline]
    fn deref(&self) -> &Region {
        &self.0
    }
}

/// The regions that a queue was told about, by their ids.
#[derive(Debug)]
pub struct Table {
    places: Box<[Option<Held>]>,
    /// [`gone`] when nothing was found that could have been let go.
    seen: u32,
}

impl Table {
    /// One without regions.
    pub fn new() -> Table {
        Table { places: vec![None; RegionId::MAX].into_boxed_slice(), seen: gone() }
    }

    /// Adds a region. `false` if it was there already.
    pub fn register(&mut self, region: &Arc<Region>) -> bool {
        // Its number cannot be another region's while the table holds that.
        let place = &mut self.places[region.id().index()];
        let new = place.is_none();
        place.get_or_insert_with(|| Held::new(region));
        new
    }

    /// Lets go of regions that have no user any more and for which `may_go` says that nothing which
    /// the queue does still needs them; those for which it does not are asked about again the next time.
    /// For control paths; cheap if no region has lost its last user since.
    pub fn prune(&mut self, mut may_go: impl FnMut(&Region) -> bool) {
        // Before the look: one that loses its last user during it counts up after this.
        let now = gone();
        if now == self.seen {
            return;
        }
        let mut kept = false;
        for place in &mut self.places {
            if let Some(region) = place
                && region.is_unused()
            {
                if may_go(region) {
                    *place = None;
                } else {
                    kept = true;
                }
            }
        }
        if !kept {
            self.seen = now;
        }
    }

    /// The region of a segment, if it was registered and the segment lies inside. One that was kept
    /// for longer than its region may name a region that has since got the number.
    #[inline(always)]
    pub fn find(&self, seg: &Seg) -> Option<&Region> {
        let region = self.places.get(seg.region().index())?.as_ref()?;
        let end = seg.offset().checked_add(u64::from(seg.len()))?;
        (end <= region.len() as u64).then_some(region)
    }

    /// All regions in it. Slow.
    pub fn iter(&self) -> impl Iterator<Item = &Region> {
        self.places.iter().flatten().map(|held| &**held)
    }
}

impl Default for Table {
    fn default() -> Table {
        Table::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageSize;

    fn region() -> Arc<Region> {
        Region::new(8192, PageSize::Small).unwrap()
    }

    #[test]
    fn a_region_goes_after_its_last_user_and_not_before() {
        let mut t = Table::new();
        let a = region();
        let seg = a.seg(4096, 4096).unwrap();
        assert!(t.find(&seg).is_none(), "not registered yet");
        assert!(t.register(&a) && !t.register(&a));
        assert_eq!(a.tables(), 1);
        let b = a.clone();
        drop(a);
        t.prune(|_| panic!("it has a user"));
        assert_eq!(t.find(&seg).unwrap().id(), seg.region());
        b.write(4096, &[7]);
        drop(b);
        t.prune(|_| false);
        let mut byte = [0];
        t.find(&seg).unwrap().read(4096, &mut byte);
        assert_eq!(byte, [7], "kept while the queue needs it");
        // Nothing has gone since, but one could not be let go.
        t.prune(|r| r.id() == seg.region());
        assert!(t.find(&seg).is_none());
        assert_eq!(t.iter().count(), 0);
    }

    #[test]
    fn tables_do_not_keep_regions_from_each_other() {
        let mut tables = [Table::new(), Table::new(), Table::new()];
        let a = region();
        let seg = a.seg(0, 1).unwrap();
        tables.iter_mut().for_each(|t| assert!(t.register(&a)));
        assert_eq!(a.tables(), 3);
        // A part of a queue is no user, and being told of that is being told of the region.
        let held = Held::new(Held::new(&a).memory());
        assert_eq!(a.tables(), 4);
        drop(a);
        assert!(held.is_unused());
        for at in 0..3 {
            tables[at].prune(|_| true);
            assert!(tables[at].find(&seg).is_none());
            assert_eq!(held.tables(), 3 - at);
            assert_eq!(tables.iter().filter(|t| t.find(&seg).is_some()).count(), 2 - at);
        }
        // The number is kept from others until the last has let go.
        assert_eq!(held.id(), seg.region());
        held.write(0, &[1]);
    }

    #[test]
    fn tables_on_many_threads_let_go_of_what_is_unused_only() {
        let (rounds, threads) = if cfg!(miri) { (3, 2) } else { (200, 4) };
        let (to, from): (Vec<_>, Vec<_>) =
            (0..threads).map(|_| std::sync::mpsc::sync_channel::<Arc<Region>>(1)).unzip();
        std::thread::scope(|s| {
            for from in from {
                s.spawn(move || {
                    let mut t = Table::new();
                    for a in from {
                        t.prune(|_| true);
                        t.register(&a);
                        t.prune(|_| true);
                        let seg = a.seg(0, 4096).unwrap();
                        assert!(t.find(&seg).is_some(), "it has a user: this thread");
                        assert!(t.iter().count() <= 3, "the others have gone");
                        drop(a);
                    }
                });
            }
            for _ in 0..rounds {
                let a = region();
                to.iter().for_each(|to| to.send(a.clone()).unwrap());
            }
            drop(to);
        });
    }

    #[test]
    fn a_segment_that_is_too_long_for_its_region_is_not_found() {
        let (long, short) = (Region::new(64 << 10, PageSize::Small).unwrap(), region());
        let mut t = Table::new();
        t.register(&short);
        // As if `short` had got the number of `long`.
        for (offset, len) in [(60 << 10, 4096), (8192, 1), (4096, 4097), (u64::MAX, 2)] {
            assert!(t.find(&Seg { region: short.id(), len, offset }).is_none());
        }
        assert!(t.find(&long.seg(0, 1).unwrap()).is_none());
        assert!(t.find(&Seg { region: short.id(), len: 1, offset: 8191 }).is_some());
    }
}
