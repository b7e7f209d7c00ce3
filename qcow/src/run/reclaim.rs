//! The way back of host clusters that were let go of.
//!
//! A cluster passes three gates before it is used again: the change that freed it is durable
//! ([`super::flush`]); every request that began before has completed, since its I/O may still be
//! under way to the old place (epochs); its refcount in memory is lowered. The refcount on disk
//! follows in a later batch, so it is never too low.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use block::{Flags, Op, SegList, Status};

use super::corrupt::Mark;
use super::epochs;
use super::io::Child;
use super::link::Link;
use super::read::check;
use super::shared::{Key, Shared};
use crate::format::L2Entry;

/// Clusters that go back at a time: between two times others have their turn.
const CHUNK: u64 = 256;

/// Dirty refcount slices at which the rest waits for the next batch.
const DIRTY_MAX: usize = 2048;

/// Clusters that guests may have let go of before a writer has to write metadata back.
const STAGED_MAX: u64 = 1 << 16;

/// References to host clusters, as runs (first, count).
#[derive(Default)]
struct Runs {
    runs: VecDeque<(u64, u64)>,
    clusters: u64,
}

impl Runs {
    fn push(&mut self, first: u64, count: u64) {
        self.clusters += count;
        match self.runs.back_mut() {
            Some(last) if last.0 + last.1 == first => last.1 += count,
            Some(last) if first + count == last.0 => *last = (first, last.1 + count),
            _ => self.runs.push_back((first, count)),
        }
    }

    /// Takes up to `most` clusters out.
    fn take(&mut self, most: u64) -> Vec<u64> {
        let mut taken = Vec::new();
        while let Some(run) = self.runs.front_mut()
            && (taken.len() as u64) < most
        {
            let n = run.1.min(most - taken.len() as u64);
            taken.extend(run.0..run.0 + n);
            *run = (run.0 + n, run.1 - n);
            if run.1 == 0 {
                self.runs.pop_front();
            }
        }
        self.clusters -= taken.len() as u64;
        taken
    }
}

/// Clusters on their way back.
#[derive(Default)]
pub(super) struct LetGo {
    /// By changes that no batch has taken.
    staged: Runs,
    /// Durably, by the epoch at which that was so.
    retired: VecDeque<(u64, Runs)>,
    /// All of these, and those that a batch or a task has in hand.
    clusters: u64,
}

/// What a batch lets go of when it is durable.
pub(super) struct Frees(Runs);

impl LetGo {
    /// What was staged so far, for a batch that begins.
    pub(super) fn seal(&mut self) -> Frees {
        Frees(std::mem::take(&mut self.staged))
    }

    /// The batch failed.
    pub(super) fn unseal(&mut self, frees: Frees) {
        for (first, count) in frees.0.runs {
            self.staged.push(first, count);
        }
    }

    pub(super) fn is_anything(&self) -> bool {
        self.clusters > 0
    }

    /// Whether so much waits for a batch that one should run.
    pub(super) fn is_much(&self) -> bool {
        self.staged.clusters > STAGED_MAX
    }
}

impl Shared {
    /// Notes clusters to be let go of when the change that frees them is durable.
    pub(super) fn free_later(&self, first: u64, count: u64) {
        let mut let_go = self.let_go.borrow_mut();
        let_go.staged.push(first, count);
        let_go.clusters += count;
    }

    /// Notes that what an L2 entry pointed to is not needed any more once the change is durable.
    pub(super) fn free_old(&self, old: L2Entry) {
        let g = &self.geometry;
        match (old, old.host_cluster()) {
            // Nothing is counted in an external data file.
            _ if g.data_file() => {}
            (L2Entry::Compressed { host, len }, _) => {
                let first = g.cluster(host);
                self.free_later(first, g.cluster(host + u64::from(len) - 1) - first + 1);
            }
            (_, Some((host, _))) => self.free_later(g.cluster(host), 1),
            (_, None) => {}
        }
    }

    /// Gives clusters back that were just allocated and never written into a table.
    pub(super) fn unallocate(&self, first: u64, count: u64) {
        let mut runs = Runs::default();
        runs.push(first, count);
        self.let_go.borrow_mut().clusters += count;
        self.retire(Frees(runs));
    }

    /// Takes over what is durably let go of.
    pub(super) fn retire(&self, frees: Frees) {
        if frees.0.clusters > 0 {
            let epoch = self.begin_epoch();
            self.let_go.borrow_mut().retired.push_back((epoch, frees.0));
        }
    }

    /// Lowers the refcounts of clusters that passed all gates, and tells the device of those that
    /// are free now.
    pub(super) async fn reclaim(&self, slot: u16) {
        while !self.let_go.borrow().retired.is_empty() {
            self.lock_alloc(slot).await;
            let full = self.alloc.borrow().dirty_slices() >= DIRTY_MAX;
            let clusters = if full { Vec::new() } else { self.take_retired() };
            self.lower(slot, &clusters).await;
            self.let_go.borrow_mut().clusters -= clusters.len() as u64;
            self.unlock_alloc();
            self.unpark(Key::Space);
            if clusters.is_empty() {
                return;
            }
            self.pause(slot).await;
        }
    }

    /// Takes some clusters out whose epoch is over.
    fn take_retired(&self) -> Vec<u64> {
        let mut let_go = self.let_go.borrow_mut();
        match let_go.retired.front_mut() {
            Some((epoch, runs)) if self.is_past(*epoch) => {
                let taken = runs.take(CHUNK);
                if runs.clusters == 0 {
                    let_go.retired.pop_front();
                }
                taken
            }
            _ => Vec::new(),
        }
    }

    /// Begins a new epoch; returns the one that ended.
    pub(super) fn begin_epoch(&self) -> u64 {
        let ended = self.common.epoch.advance();
        self.flights.see(self.common.epoch.get());
        ended
    }

    /// Whether nothing is in flight, here or elsewhere, that was looked up in `epoch` or before.
    pub(super) fn is_past(&self, epoch: u64) -> bool {
        self.flights.see(self.common.epoch.get());
        if self.flights.oldest() <= epoch {
            return false;
        }
        let oldest = (0..self.slots()).map(|s| self.work(s as u16).epoch.get()).min();
        oldest.is_none_or(|o| o > epoch) && self.all_past(epoch)
    }

    /// Whether nothing is in flight on another reactor that was looked up in `epoch` or before.
    fn all_past(&self, epoch: u64) -> bool {
        let links = self.links.borrow();
        let pause = self.common.pause();
        // What rests has nothing in flight, and looks up again behind the end of the pause.
        let awake = |l: &&Arc<Link>| pause.is_multiple_of(2) || !l.rests(pause);
        let announced = links.iter().filter(awake).map(|l| &l.announced);
        links.is_empty() || epochs::all_past(announced, epoch)
    }

    async fn lower(&self, slot: u16, clusters: &[u64]) {
        let mut free = BTreeSet::new();
        for &cluster in clusters {
            if let Err(status) = self.ref_slice(slot, cluster).await {
                self.leak(cluster, status);
                continue;
            }
            let mut a = self.alloc.borrow_mut();
            match a.get(cluster) {
                // Counted until the device was told, so that nobody takes it before.
                Some(1) if free.insert(cluster) => {}
                Some(n) if n > 1 => a.set(cluster, n - 1),
                _ => {
                    drop(a);
                    self.miscounted(cluster);
                }
            }
        }
        if self.device.discard && !free.is_empty() {
            self.discard_clusters(slot, &free).await;
        }
        for cluster in free {
            match self.ref_slice(slot, cluster).await {
                Ok(()) => {
                    let mut a = self.alloc.borrow_mut();
                    a.set(cluster, 0);
                    a.put_free(cluster);
                }
                Err(status) => self.leak(cluster, status),
            }
        }
    }

    /// The count stays too high, which a check finds.
    fn leak(&self, cluster: u64, status: Status) {
        let what = format_args!("host cluster {cluster:#x} leaks, its refcount is lost: {status}");
        self.complain(self.top_at(), what);
    }

    /// A cluster is (or was) in use, and its refcount says that it is free: no other refcount can be
    /// believed, so nothing is allocated any more.
    pub(super) fn miscounted(&self, cluster: u64) {
        if self.alloc.borrow_mut().distrust() {
            return;
        }
        self.mark.set(Mark::Wanted);
        let name = &self.stack.top_layer().name;
        let at = cluster << self.geometry.cluster_bits();
        log::error!(
            "{name}: the cluster at offset {at:#x} is in use with a refcount of 0: nothing more is \
             allocated before `image check --repair all` has counted again"
        );
    }

    /// Tells the device that clusters are free. A hint: how it ends does not matter.
    async fn discard_clusters(&self, slot: u16, clusters: &BTreeSet<u64>) {
        let bits = self.geometry.cluster_bits();
        let mut runs = Runs::default();
        clusters.iter().for_each(|&c| runs.push(c, 1));
        for (first, count) in runs.runs {
            let child = Child {
                port: self.top(),
                op: Op::Discard,
                flags: Flags::NONE,
                offset: first << bits,
                len: count << bits,
                segs: SegList::EMPTY,
            };
            self.start(slot, child);
            let _ = self.wait_if_crowded(slot).await;
        }
        let _ = self.wait(slot).await;
    }

    /// Writes metadata back if so much of it waits that it should not go on. For a task as in
    /// [`Shared::at_rest`], with no claim.
    pub(super) async fn write_back_if_much(&self, slot: u16) -> Result<(), Status> {
        let slices = self.tables.borrow().slice_count();
        let noted = self.tables.borrow().journal.as_ref().is_some_and(super::Journal::is_much);
        if slices > super::flush::SLICES_MAX || noted || self.let_go.borrow().is_much() {
            return self.write_back(slot).await;
        }
        Ok(())
    }

    /// Writes metadata back. For a task as in [`Shared::at_rest`].
    pub(super) async fn write_back(&self, slot: u16) -> Result<(), Status> {
        check(self.at_rest(slot, self.flush_tables(slot)).await)
    }

    /// Waits without keeping any cluster from being reused. For a task that has no I/O under way and
    /// knows no mapping that others may change (it may hold claims).
    pub(super) async fn at_rest<T>(&self, slot: u16, wait: impl Future<Output = T>) -> T {
        self.work(slot).epoch.set(u64::MAX);
        let result = wait.await;
        self.work(slot).epoch.set(self.common.epoch.get());
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_grow_at_both_ends_and_are_taken_in_parts() {
        let mut r = Runs::default();
        for (first, count) in [(10, 2), (12, 1), (9, 1), (9, 1), (30, 4)] {
            r.push(first, count);
        }
        assert_eq!(r.runs, [(9, 4), (9, 1), (30, 4)]);
        assert_eq!(r.clusters, 9);
        assert_eq!(r.take(3), [9, 10, 11]);
        assert_eq!(r.take(100), [12, 9, 30, 31, 32, 33]);
        assert_eq!((r.clusters, r.runs.len()), (0, 0));
    }
}
