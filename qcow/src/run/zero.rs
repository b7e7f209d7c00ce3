//! Write-zeroes and discard: mappings change, data moves only at unaligned ends.

use block::{Flags, Op, SegList, Status};

use super::io::Child;
use super::read::check;
use super::shared::{Key, Shared};
use super::write::Claim;
use crate::format::L2Entry;
use crate::map::{Kind, Word};

/// Clusters (or parts of them) looked at before others of the same turn get their share.
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
        let last = self.inner_end(end, size);
        match self.empty(slot, first, last, Way::Discard).await {
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
        let size = self.geometry.unit_size();
        let end = offset + len;
        let first = offset.next_multiple_of(size);
        let last = self.inner_end(end, size);
        // Without a zero flag a cluster over a backing file can only be zeroed by writing.
        let slow = self.geometry.version() < 3 && !self.stands_alone();
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
            self.empty(slot, first, last, way).await?;
        }
        self.zero_part(slot, last.max(first), end).await
    }

    /// The end of the last whole block of `size` bytes before `end`; the disk's last one counts as
    /// whole.
    fn inner_end(&self, end: u64, size: u64) -> u64 {
        if end == self.info.size { end.next_multiple_of(size) } else { end & !(size - 1) }
    }

    /// Whether a part of one unit needs no writing to be zero.
    async fn reads_zero_now(&self, slot: u16, from: u64, to: u64) -> Result<bool, Status> {
        if from >= to {
            return Ok(true);
        }
        let word = self.word(slot, from >> self.geometry.unit_bits()).await?;
        Ok(!word.claimed() && Shared::reads_zero(word))
    }

    /// Zeroes a part of one unit by writing, unless it reads as zeroes anyway.
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

    /// Empties the units of `[from, to)`, both multiples of the unit.
    async fn empty(&self, slot: u16, from: u64, to: u64, way: Way) -> Result<(), Status> {
        let g = self.geometry;
        let (bits, sub) = (g.unit_bits(), g.sub_bits());
        let (mut unit, end) = (from >> bits, (to >> bits).min(self.map.clusters()));
        let mut looked = 0;
        while unit < end {
            looked += 1;
            if looked % STRIDE == 0 {
                self.at_rest(slot, self.pause(slot)).await;
            }
            // A whole L2 table that does not exist, with nothing below: nothing to do.
            let index = g.l1_index(unit << bits);
            if self.stands_alone() && self.tables.borrow().l1(index) == 0 {
                unit = (index + 1) << (g.l2_bits() + sub);
                continue;
            }
            let word = self.word(slot, unit).await?;
            if word.claimed() {
                self.at_rest(slot, self.park(slot, Key::Unit(unit))).await;
                continue;
            }
            // As much of the unit's cluster as is asked for, in one go. The disk's last cluster may
            // have fewer units.
            let start = unit >> sub << sub;
            let all = start..(start + (1 << sub)).min(self.map.clusters());
            let range = unit..end.min(all.end);
            let whole = range == all;
            if range.clone().all(|u| self.is_empty_enough(self.map.lookup(u), way)) {
                unit = range.end;
                continue;
            }
            if range.clone().any(|u| self.map.lookup(u).kind() == Kind::Corrupt) {
                return Err(Status::Corrupt);
            }
            let claim = match self.claim_range(range.clone()) {
                Ok(claim) => claim,
                Err(Some(busy)) => {
                    self.at_rest(slot, self.park(slot, Key::Unit(busy))).await;
                    continue;
                }
                Err(None) => continue,
            };
            if self.empty_claimed(slot, claim, whole, way).await? {
                self.write_back_if_much(slot).await?;
            } else {
                // A part of a compressed cluster: that makes it plain.
                self.zero_part(slot, unit << bits, (unit + 1) << bits).await?;
                continue;
            }
            unit = range.end;
        }
        Ok(())
    }

    /// Says in the layer that is written to that claimed units of one cluster read as zeroes, and ends
    /// the claims. `whole`: they are all that it has.
    pub(super) async fn zero_claimed(
        &self,
        slot: u16,
        claim: Claim,
        whole: bool,
    ) -> Result<bool, Status> {
        self.empty_claimed(slot, claim, whole, Way::Zero).await
    }

    /// Whether there is nothing to do for a unit.
    fn is_empty_enough(&self, word: Word, way: Way) -> bool {
        let top = self.stack.top_number();
        if self.stack.top_layer().raw_data {
            // A write that failed may have reached the file all the same.
            return false;
        }
        match (word.kind(), way) {
            _ if word.claimed() => false,
            (Kind::Hole, _) => true,
            (Kind::Zero, Way::ZeroKeep) => true,
            (Kind::Zero, _) => word.layer() != top || !word.keeps(),
            // A discard is a hint: it makes no metadata for what another layer holds.
            (Kind::Mapped | Kind::Compressed, Way::Discard) => word.layer() != top,
            (Kind::Split, Way::Discard) => true,
            _ => false,
        }
    }

    /// Changes the entry of claimed units of one cluster, and ends the claims. Returns whether that
    /// was possible: not for a part of a compressed cluster. `whole`: they are all that it has.
    async fn empty_claimed(
        &self,
        slot: u16,
        mut claim: Claim,
        whole: bool,
        way: Way,
    ) -> Result<bool, Status> {
        let page = claim.first >> self.map.page_bits();
        let result = match self.slice_ready(slot, page).await {
            Ok(()) => {
                let r = self.empty_held(slot, &mut claim, whole, way).await;
                self.tables.borrow_mut().unuse(page);
                r
            }
            Err(status) => Err(status),
        };
        self.unclaim(&mut claim, 0);
        result
    }

    async fn empty_held(
        &self,
        slot: u16,
        claim: &mut Claim,
        whole: bool,
        way: Way,
    ) -> Result<bool, Status> {
        let g = self.geometry;
        let (sub, bits) = (g.sub_bits(), g.unit_bits());
        let cluster = claim.first >> sub;
        let (page, index) = self.place_of_entry(cluster);
        let look = || {
            let raw = self.tables.borrow().entry(page, index).unwrap_or_default();
            self.decode(self.top_at(), &g, cluster << g.cluster_bits(), raw)
        };
        let mask = match whole {
            true => u32::MAX,
            false => (((1u64 << claim.count()) - 1) << (claim.first - (cluster << sub))) as u32,
        };
        if g.data_file() {
            self.zero_data(slot, claim, look()?.bits().0 & mask != 0, way).await?;
        }
        if self.stack.top_layer().raw_data {
            // It stays mapped. An entry that says zero could be on disk without what is written to
            // the file next, or that without the entry: then the two show different things for good.
            return Ok(true);
        }
        // Others may have changed the rest of the entry, but not what is claimed.
        let old = look()?;
        let Some(new) = self.emptied(old, mask, way) else { return Ok(false) };
        if new == old {
            return Ok(true);
        }
        self.tables.borrow_mut().stage(page, index, new.encode(&g));
        if new.host_cluster().is_none() {
            self.free_old(old);
        }
        for unit in claim.first..claim.first + claim.count() {
            let word = self.word_of(self.top_at(), &g, unit << bits, new);
            self.publish(unit, word.unwrap_or(Word::hole()));
        }
        claim.words.clear();
        Ok(true)
    }

    /// The entry of a cluster without the units in `mask`; `None` if it cannot be without them.
    fn emptied(&self, old: L2Entry, mask: u32, way: Way) -> Option<L2Entry> {
        let v3 = self.geometry.version() >= 3;
        let host = old.host_cluster();
        if mask != u32::MAX {
            let (alloc, zero) = old.bits();
            let compressed = matches!(old, L2Entry::Compressed { .. });
            return (!compressed).then(|| L2Entry::parts(host, alloc & !mask, zero | mask));
        }
        Some(match host {
            Some((host, true)) if way == Way::ZeroKeep && v3 => {
                L2Entry::ZeroAllocated { host, copied: true }
            }
            _ if self.stands_alone() => L2Entry::Unallocated,
            _ if v3 => L2Entry::Zero,
            // Version 2 over a backing file: a discard must not bring old contents back.
            _ => old,
        })
    }

    /// Makes the place of claimed units in the external data file zero before they are let go of, if
    /// they have `data` there; that gives space back. Where the file is the guest's disk by itself it
    /// must be zero in any case.
    async fn zero_data(
        &self,
        slot: u16,
        claim: &Claim,
        data: bool,
        way: Way,
    ) -> Result<(), Status> {
        let bits = self.geometry.unit_bits();
        let must = self.stack.top_layer().raw_data;
        let able = self.data_device.as_ref().is_some_and(|d| d.write_zeroes);
        if !(must || data && able && way != Way::ZeroKeep) {
            return Ok(());
        }
        let (offset, len) = (claim.first << bits, claim.count() << bits);
        let port = self.stack.top_layer().data_port();
        // Behind the disk there may be no device.
        let len = len.min(self.geometry.size().next_multiple_of(512) - offset);
        if able {
            let flags = if way == Way::ZeroKeep { Flags::NO_UNMAP } else { Flags::NONE };
            let segs = SegList::EMPTY;
            self.start(slot, Child { port, op: Op::WriteZeroes, flags, offset, len, segs });
            match self.wait(slot).await {
                // A file system may turn out not to be able to do it.
                Status::Unsupported if must => {}
                status if must => return check(status),
                _ => return Ok(()),
            }
        }
        let mut segs = SegList::EMPTY;
        let _one = segs.push(self.zero_seg(len));
        self.start(slot, Child { port, op: Op::Write, flags: Flags::NONE, offset, len, segs });
        check(self.wait(slot).await)
    }
}
