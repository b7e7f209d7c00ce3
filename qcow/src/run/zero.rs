//! Write-zeroes and discard: mappings change, data moves only at unaligned ends.

use block::{Flags, Status};

use super::read::check;
use super::shared::{Key, Shared};
use crate::format::L2Entry;
use crate::map::{Kind, Word};

/// Clusters looked at before others of the same turn get their share.
const STRIDE: u32 = 256;

/// How a cluster shall be emptied.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// A hint: what is not ours stays as it is.
    Discard,
    /// Must read as zeroes; its space may go.
    Zero,
    /// Must read as zeroes; its space stays, if it has any that is its own.
    ZeroKeep,
}

impl Shared {
    /// [`block::Op::Discard`].
    pub(super) async fn discard(&self, slot: u16, offset: u64, len: u64) -> Status {
        let size = self.geometry.cluster_size();
        let end = offset + len;
        let first = offset.next_multiple_of(size);
        let last = self.inner_end(end);
        match self.empty_clusters(slot, first, last, Way::Discard).await {
            Ok(()) => Status::Ok,
            Err(status) => status,
        }
    }

    /// [`block::Op::WriteZeroes`].
    pub(super) async fn write_zeroes(
        &self,
        slot: u16,
        offset: u64,
        len: u64,
        flags: Flags,
    ) -> Status {
        match self.write_zeroes_parts(slot, offset, len, flags).await {
            Ok(()) => Status::Ok,
            Err(status) => status,
        }
    }

    async fn write_zeroes_parts(
        &self,
        slot: u16,
        offset: u64,
        len: u64,
        flags: Flags,
    ) -> Result<(), Status> {
        let size = self.geometry.cluster_size();
        let end = offset + len;
        let first = offset.next_multiple_of(size);
        let last = self.inner_end(end);
        // Without a zero flag a cluster over a backing file can only be zeroed by writing.
        let slow = self.geometry.version() < 3 && self.stack.layers.len() > 1;
        if flags.has(Flags::FAST_ONLY) {
            // Nothing may have changed when this says no.
            let fast = !slow
                && self.reads_zero_now(slot, offset, first.min(end)).await?
                && self.reads_zero_now(slot, last.max(first), end).await?;
            if !fast {
                return Err(Status::Unsupported);
            }
        }
        self.zero_part(slot, offset, first.min(end)).await?;
        if slow {
            let mut at = first;
            while at < last {
                self.zero_part(slot, at, at + size).await?;
                self.at_rest(slot, self.pause(slot)).await;
                at += size;
            }
        } else {
            let keep = flags.has(Flags::NO_UNMAP);
            let way = if keep { Way::ZeroKeep } else { Way::Zero };
            self.empty_clusters(slot, first, last, way).await?;
        }
        self.zero_part(slot, last.max(first), end).await
    }

    /// The end of the last whole cluster before `end`; the disk's last cluster counts as whole.
    fn inner_end(&self, end: u64) -> u64 {
        let size = self.geometry.cluster_size();
        if end == self.info.size { end.next_multiple_of(size) } else { end & !(size - 1) }
    }

    /// Whether a part of one cluster needs no writing to be zero.
    async fn reads_zero_now(&self, slot: u16, from: u64, to: u64) -> Result<bool, Status> {
        if from >= to {
            return Ok(true);
        }
        let word = self.word(slot, from >> self.geometry.cluster_bits()).await?;
        Ok(!word.claimed() && Shared::reads_zero(word))
    }

    /// Zeroes a part of one cluster by writing, unless it reads as zeroes anyway.
    async fn zero_part(&self, slot: u16, from: u64, to: u64) -> Result<(), Status> {
        let to = to.min(self.info.size);
        if from >= to {
            return Ok(());
        }
        if self.reads_zero_now(slot, from, to).await? {
            return Ok(());
        }
        let zeroes = [self.zero_seg(to - from)];
        check(self.write(slot, from, to - from, &zeroes, Flags::NONE).await)
    }

    /// Empties the clusters of `[from, to)`, both multiples of the cluster size.
    async fn empty_clusters(&self, slot: u16, from: u64, to: u64, way: Way) -> Result<(), Status> {
        let bits = self.geometry.cluster_bits();
        let (mut cluster, end) = (from >> bits, to >> bits);
        let mut looked = 0;
        while cluster < end {
            looked += 1;
            if looked % STRIDE == 0 {
                self.at_rest(slot, self.pause(slot)).await;
            }
            // A whole L2 table that does not exist, with nothing below: nothing to do.
            let index = self.geometry.l1_index(cluster << bits);
            if self.stack.layers.len() == 1 && self.tables.borrow().l1(index) == 0 {
                cluster = (index + 1) << self.geometry.l2_bits();
                continue;
            }
            let word = self.word(slot, cluster).await?;
            if word.claimed() {
                self.at_rest(slot, self.park(slot, Key::Cluster(cluster))).await;
                continue;
            }
            if self.is_empty_enough(word, way) {
                cluster += 1;
                continue;
            }
            if word.kind() == Kind::Corrupt {
                return Err(Status::Corrupt);
            }
            if self.empty_alone(slot, cluster, word, way).await? {
                cluster += 1;
            }
        }
        Ok(())
    }

    /// Says in the layer that is written to that a cluster reads as zeroes, if its word is still
    /// `word`. Returns whether it was.
    pub(super) async fn zero_alone(
        &self,
        slot: u16,
        cluster: u64,
        word: Word,
    ) -> Result<bool, Status> {
        self.empty_alone(slot, cluster, word, Way::Zero).await
    }

    async fn empty_alone(
        &self,
        slot: u16,
        cluster: u64,
        word: Word,
        way: Way,
    ) -> Result<bool, Status> {
        if !self.map.claim(cluster, word) {
            return Ok(false);
        }
        self.pages.borrow_mut().hold(&self.map, cluster);
        let new = self.empty_claimed(slot, cluster, word, way).await;
        self.publish(cluster, *new.as_ref().unwrap_or(&word));
        new?;
        self.write_back_if_much(slot).await?;
        Ok(true)
    }

    /// Whether there is nothing to do for a cluster.
    fn is_empty_enough(&self, word: Word, way: Way) -> bool {
        let top = self.stack.top_number();
        match (word.kind(), way) {
            (Kind::Hole, _) => true,
            (Kind::Zero, Way::ZeroKeep) => true,
            (Kind::Zero, _) => word.layer() != top || word.host() == 0,
            // A discard is a hint: it makes no metadata for what another layer holds.
            (Kind::Mapped | Kind::Compressed, Way::Discard) => word.layer() != top,
            (Kind::Split, Way::Discard) => true,
            _ => false,
        }
    }

    /// Changes the entry of a claimed cluster. Returns its new word.
    async fn empty_claimed(
        &self,
        slot: u16,
        cluster: u64,
        word: Word,
        way: Way,
    ) -> Result<Word, Status> {
        let page = cluster >> self.map.page_bits();
        self.slice_ready(slot, page).await?;
        let index = (cluster - (page << self.map.page_bits())) as usize;
        let old = self.tables.borrow().entry(page, index).unwrap_or(0);
        let alone = self.stack.layers.len() == 1;
        let top = self.stack.top_number();
        let v3 = self.geometry.version() >= 3;
        let keep = way == Way::ZeroKeep && v3 && word.layer() == top && word.owned();
        let result = if keep && matches!(word.kind(), Kind::Mapped) {
            let host = word.host();
            Ok((L2Entry::ZeroAllocated { host, copied: true }, Word::zero(top, host, true)))
        } else if alone {
            Ok((L2Entry::Unallocated, Word::hole()))
        } else if v3 {
            Ok((L2Entry::Zero, Word::zero(top, 0, false)))
        } else {
            // Version 2 over a backing file: a discard must not bring old contents back.
            Ok::<_, Status>((L2Entry::Unallocated, word))
        };
        let (entry, new) = result?;
        if new != word {
            self.tables.borrow_mut().stage(page, index, entry.encode(&self.geometry));
            if !matches!(entry, L2Entry::ZeroAllocated { .. }) {
                self.free_old(cluster, old);
            }
        }
        self.tables.borrow_mut().unuse(page);
        Ok(new)
    }
}
