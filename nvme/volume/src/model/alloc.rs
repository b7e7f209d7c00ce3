//! Which free extents a volume gets. A volume has few segments: new extents go behind its last ones
//! where these are free, and growth is in steps that become larger with the number of segments.

use super::{Lv, Place, Run, Segment, Vg};
use crate::error::{Error, Result, refused};

/// Most segments of a volume that is made or grown here.
pub const MAX_SEGMENTS: usize = 64;

impl Vg {
    /// Free extents by device, in order.
    pub fn free(&self) -> Vec<Vec<Run>> {
        let mut used: Vec<Vec<Run>> = vec![Vec::new(); self.pvs.len()];
        for run in self.used() {
            used[run.pv].push(run);
        }
        let free = |(pv, mut runs): (usize, Vec<Run>)| {
            runs.sort_unstable();
            let (mut at, mut free) = (0, Vec::new());
            let end = Run { pv, first: self.pvs[pv].pe_count, count: 0 };
            for run in runs.into_iter().chain([end]) {
                if run.first > at {
                    free.push(Run { pv, first: at, count: run.first - at });
                }
                at = run.first + run.count;
            }
            free
        };
        used.into_iter().enumerate().map(free).collect()
    }

    /// How many extents are free on devices that may be allocated from.
    pub fn free_extents(&self) -> u64 {
        let free = self.free();
        let counted = free.iter().flatten().filter(|run| self.pvs[run.pv].allocatable());
        counted.map(|run| run.count).sum()
    }

    /// By how many extents to grow a volume of which `wanted` more are needed: so many more that it
    /// never has more than [`MAX_SEGMENTS`] segments, wherever the free extents are. With `s`
    /// segments it grows by `s` 64ths of its size at least: by little while space behind it is free.
    pub(super) fn step(&self, lv: &Lv, wanted: u64) -> u64 {
        let share = lv.extents().saturating_mul(lv.segments.len() as u64) / MAX_SEGMENTS as u64;
        wanted.max(share.min(self.free_extents()))
    }

    /// Adds `count` extents to a volume that is not (or not yet) in the group, in as many stripes as
    /// its last segment has or, if it has none, as said. `count` is a multiple of them.
    pub(super) fn give(&self, lv: &mut Lv, count: u64, stripes: usize, size: u64) -> Result<()> {
        let mut free = self.free();
        for (pv, runs) in free.iter_mut().enumerate() {
            if !self.pvs[pv].allocatable() {
                runs.clear();
            }
        }
        // A volume that is in the group has extents that are not free.
        let total: u64 = free.iter().flatten().map(|run| run.count).sum();
        let nothing = || Error::NoSpace { group: self.name.clone(), wanted: count, free: total };
        let mut depth = count / stripes as u64;
        while depth > 0 {
            let behind = lv.segments.last().and_then(|last| behind(last, &free, stripes, size));
            let (places, room) = match behind {
                Some(found) => found,
                None => spread(&free, stripes, depth).ok_or_else(nothing)?,
            };
            let taken = room.min(depth);
            for place in &places {
                take(&mut free[place.pv], *place, taken);
            }
            push(lv, places, taken, size);
            depth -= taken;
            // Not only at the end: there may be a hundred thousand free runs.
            if lv.segments.len() > MAX_SEGMENTS {
                let name = format!("{}/{}", self.name, lv.name);
                return refused(format!(
                    "{name} would have more than {MAX_SEGMENTS} segments: free space is in small parts"
                ));
            }
        }
        Ok(())
    }
}

/// The extents right behind a segment, if they are free on all its devices, and how many on each.
fn behind(
    last: &Segment,
    free: &[Vec<Run>],
    stripes: usize,
    size: u64,
) -> Option<(Vec<Place>, u64)> {
    let plain = last.tags.is_empty() && last.extra.is_empty();
    if !plain || last.areas.len() != stripes || (stripes > 1 && last.stripe_size != size) {
        return None;
    }
    let next = |a: &Place| Place { pv: a.pv, extent: a.extent + last.depth() };
    let places: Vec<Place> = last.areas.iter().map(next).collect();
    let room = |place: &Place| {
        let runs = free[place.pv].iter();
        runs.filter(|run| run.first == place.extent).map(|run| run.count).next()
    };
    let rooms: Option<Vec<u64>> = places.iter().map(room).collect();
    Some((places, rooms?.into_iter().min()?))
}

/// A run of each of `stripes` devices, and how many extents they have in common. Of each device it
/// is the smallest run that is long enough, else the longest.
fn spread(free: &[Vec<Run>], stripes: usize, depth: u64) -> Option<(Vec<Place>, u64)> {
    let best = |runs: &Vec<Run>| {
        let enough = runs.iter().filter(|run| run.count >= depth).min_by_key(|run| run.count);
        enough.or(runs.iter().max_by_key(|run| run.count)).copied()
    };
    let mut runs: Vec<Run> = free.iter().filter_map(best).collect();
    // Devices that have room first, and of these the emptiest, so that they fill up evenly.
    let total = |run: &Run| free[run.pv].iter().map(|run| run.count).sum::<u64>();
    runs.sort_by_key(|run| std::cmp::Reverse((run.count.min(depth), total(run))));
    runs.truncate(stripes);
    if runs.len() < stripes {
        return None;
    }
    // In the order of the devices, whatever their sizes.
    runs.sort_unstable();
    let room = runs.iter().map(|run| run.count).min()?;
    Some((runs.iter().map(|run| Place { pv: run.pv, extent: run.first }).collect(), room))
}

/// Takes extents off the begin of a free run.
fn take(runs: &mut Vec<Run>, place: Place, count: u64) {
    for run in runs.iter_mut().filter(|run| run.first == place.extent) {
        run.first += count;
        run.count -= count;
    }
    runs.retain(|run| run.count > 0);
}

/// Puts extents at a volume's end, into its last segment if they are right behind it.
fn push(lv: &mut Lv, places: Vec<Place>, depth: u64, size: u64) {
    let count = depth * places.len() as u64;
    let start = lv.extents();
    if let Some(last) = lv.segments.last_mut() {
        let follows =
            |(a, b): (&Place, &Place)| a.pv == b.pv && a.extent + last.depth() == b.extent;
        let same =
            last.areas.len() == places.len() && last.tags.is_empty() && last.extra.is_empty();
        let size = places.len() == 1 || last.stripe_size == size;
        if same && size && last.areas.iter().zip(&places).all(follows) {
            last.count += count;
            return;
        }
    }
    let stripe_size = if places.len() > 1 { size } else { 0 };
    let (tags, extra) = (Vec::new(), Vec::new());
    lv.segments.push(Segment { start, count, stripe_size, areas: places, tags, extra });
}
