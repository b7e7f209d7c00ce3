//! Where the bytes of claimed units go: into clusters that are there, into new ones, or into a new
//! one together with all that the old one holds.
//!
//! Claims are on units. Where a cluster has several of them (extended L2 entries), several tasks may
//! write to one cluster at a time, each to its own units; the one that gives it a host cluster notes
//! that in [`super::meta::Tables::placing`], and the others wait for it.

use block::Status;

use super::shared::{Key, Shared};
use super::write::Claim;
use crate::format::L2Entry;

/// Where claimed units are written to.
#[derive(Clone, Copy)]
pub(super) struct Target {
    /// Host offset of the first one.
    pub(super) host: u64,
    /// They are a cluster, whose old contents may be anything.
    pub(super) whole: bool,
    /// See [`super::alloc::Run::fresh`].
    pub(super) fresh: bool,
}

/// See the module's text.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Place {
    /// At this host offset, in clusters that are the image's own.
    There(u64),
    /// In new clusters.
    New,
    /// In a new cluster, and so must all else that the cluster holds: it is shared or compressed.
    Whole,
    /// Another task is about to give this guest cluster a place.
    Busy(u64),
}

impl Shared {
    /// Where the units of a claim go whose slice is in memory, and for how many of them that holds.
    pub(super) fn place(&self, claim: &Claim) -> Result<(Place, usize), Status> {
        let g = &self.geometry;
        let sub = g.sub_bits();
        let (first, end) = (claim.first >> sub, claim.first + claim.count());
        let inside = g.in_cluster(claim.first << g.unit_bits());
        let place = match self.place_of_cluster(first)? {
            Place::There(host) => Place::There(host + inside),
            other => other,
        };
        let mut last = first + 1;
        while last << sub < end {
            let next = self.place_of_cluster(last)?;
            let goes_on = match (place, next) {
                (Place::There(a), Place::There(b)) => {
                    a - inside + ((last - first) << g.cluster_bits()) == b
                }
                (Place::New, Place::New) => true,
                _ => false,
            };
            if !goes_on {
                break;
            }
            last += 1;
        }
        Ok((place, ((last << sub).min(end) - claim.first) as usize))
    }

    fn place_of_cluster(&self, cluster: u64) -> Result<Place, Status> {
        let g = &self.geometry;
        let guest = cluster << g.cluster_bits();
        let (page, index) = self.place_of_entry(cluster);
        let tables = self.tables.borrow();
        let entry =
            self.decode(self.top_at(), g, guest, tables.entry(page, index).unwrap_or_default())?;
        Ok(match (entry, entry.host_cluster()) {
            _ if g.data_file() => Place::There(guest),
            (_, Some((host, true))) => Place::There(host),
            _ if tables.placing.contains(&cluster) => Place::Busy(cluster),
            (L2Entry::Compressed { .. }, _) | (_, Some(_)) if g.extended_l2() => Place::Whole,
            _ => Place::New,
        })
    }

    /// Allocates clusters for a claim of which none has one; it is cut to what there was room for.
    /// With subclusters [`Shared::placed`] must follow.
    pub(super) async fn allocate_for(
        &self,
        slot: u16,
        claim: &mut Claim,
    ) -> Result<Target, Status> {
        let g = &self.geometry;
        let sub = g.sub_bits();
        let clusters =
            |claim: &Claim| claim.first >> sub..((claim.first + claim.count() - 1) >> sub) + 1;
        let wanted = clusters(claim);
        if g.extended_l2() {
            self.tables.borrow_mut().placing.extend(wanted.clone());
        }
        let got = self.allocate(slot, wanted.end - wanted.start).await;
        let count = got.map_or(0, |run| run.count);
        self.end_placing(wanted.start + count..wanted.end);
        let run = got?;
        let end = (wanted.start + count) << sub;
        self.unclaim(claim, claim.count().min(end - claim.first) as usize);
        let inside = g.in_cluster(claim.first << g.unit_bits());
        let host = (run.first << g.cluster_bits()) + inside;
        Ok(Target { host, whole: false, fresh: run.fresh })
    }

    /// The clusters of a claim have their places in their entries, or will not get them.
    pub(super) fn placed(&self, claim: &Claim) {
        let sub = self.geometry.sub_bits();
        self.end_placing(claim.first >> sub..((claim.first + claim.count() - 1) >> sub) + 1);
    }

    fn end_placing(&self, clusters: std::ops::Range<u64>) {
        if !self.geometry.extended_l2() {
            return;
        }
        for cluster in clusters {
            self.tables.borrow_mut().placing.remove(&cluster);
            self.unpark(Key::Placing(cluster));
        }
    }
}
