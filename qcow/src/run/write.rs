//! Writes that do not go straight down: allocation, copy-on-write, kept zero clusters.
//!
//! What is written to is claimed in the map, unit by unit (a unit is a cluster, or a subcluster where
//! L2 entries are extended); its new place is filled whole (old contents or zeroes around the
//! guest's bytes, in one device write), and only when that has completed is the L2 entry staged and
//! the new mapping published. A guest's bytes in a unit that is being filled wait for the claim, so
//! a fill never lies over newer data. Where a file has never been written to, zeroes need no fill.
//! Where that place is: [`super::place`].

use block::{Flags, Op, SegList, Status};
use dma::{Buf, Seg};

use super::io::Child;
use super::place::{Place, Target};
use super::read::check;
use super::shared::{Key, Shared};
use crate::format::L2Entry;
use crate::map::{Kind, Word};

/// Clusters that one write allocates at most, and bytes that it moves at most.
const RUN: u64 = 64;
const RUN_BYTES: u64 = 1 << 20;

/// What is written into fresh space is made up to pages of the host: no part of one is to be read.
const PAGE: u64 = 4096;

/// Units claimed together, side by side in one page of the map, to be written in one piece.
pub(super) struct Claim {
    pub(super) first: u64,
    pub(super) words: Vec<Word>,
}

impl Claim {
    pub(super) fn count(&self) -> u64 {
        self.words.len() as u64
    }
}

/// A guest's write, as far as it is not done.
pub(super) struct Rest<'s> {
    /// From here to there.
    at: u64,
    end: u64,
    /// Where the whole begins, and its bytes.
    offset: u64,
    segs: &'s [Seg],
    flags: Flags,
}

impl Rest<'_> {
    /// Nothing is to be written, only what is claimed from `at` on to be moved.
    pub(super) fn nothing(at: u64) -> Rest<'static> {
        Rest { at, end: at, offset: at, segs: &[], flags: Flags::NONE }
    }

    /// The bytes up to `to`.
    fn part(&self, to: u64) -> Result<SegList, Status> {
        let mut list = SegList::EMPTY;
        match list.push_part(self.segs, self.at - self.offset, to - self.at) {
            true => Ok(list),
            false => Err(Status::Invalid),
        }
    }
}

impl Shared {
    /// Writes `[offset, offset + len)` of the guest's disk from `segs`.
    pub(super) async fn write(
        &self,
        slot: u16,
        offset: u64,
        len: u64,
        segs: &[Seg],
        flags: Flags,
    ) -> Status {
        match self.write_runs(slot, offset, len, segs, flags).await {
            Err(status) => {
                let _ = self.wait(slot).await;
                status
            }
            Ok(()) => self.wait(slot).await,
        }
    }

    async fn write_runs(
        &self,
        slot: u16,
        offset: u64,
        len: u64,
        segs: &[Seg],
        flags: Flags,
    ) -> Result<(), Status> {
        let bits = self.geometry.unit_bits();
        let size = self.geometry.unit_size();
        let mut rest = Rest { at: offset, end: offset + len, offset, segs, flags };
        let end = rest.end;
        while rest.at < end {
            self.wait_if_crowded(slot).await?;
            let unit = rest.at >> bits;
            // Whatever a bitmap lacks, for this request it is recorded.
            let word = self.map.lookup(unit).marked();
            if word.writable_in_place(self.stack.top_number()) {
                let mut last = word;
                let mut to = end.min((unit + 1) << bits);
                while to < end {
                    let next = self.map.lookup(to >> bits).marked();
                    if !last.continued_by(next, size) {
                        break;
                    }
                    last = next;
                    to = end.min(to + size);
                }
                let host = word.host() + (rest.at & (size - 1));
                self.start_write(slot, host, rest.part(to)?, flags);
                rest.at = to;
                continue;
            }
            // From here on there is waiting; what is in flight may as well end first.
            check(self.wait(slot).await)?;
            let word = self.word(slot, unit).await?;
            if word.claimed() {
                self.at_rest(slot, self.park(slot, Key::Unit(unit))).await;
                continue;
            }
            if word.kind() == Kind::Corrupt {
                return Err(Status::Corrupt);
            }
            let Some(claim) = self.claim(unit, end) else { continue };
            rest.at = self.write_claimed(slot, claim, &rest).await?;
        }
        Ok(())
    }

    fn start_write(&self, slot: u16, host: u64, segs: SegList, flags: Flags) {
        let len = segs.bytes();
        let port = self.stack.top_layer().data_port();
        let child = Child { port, op: Op::Write, flags, offset: host, len, segs };
        self.start(slot, child);
    }

    /// Claims `unit` and those behind it that a write up to `end` would allocate too. `None` if the
    /// unit has changed meanwhile.
    fn claim(&self, unit: u64, end: u64) -> Option<Claim> {
        let bits = self.geometry.unit_bits();
        let word = self.map.lookup(unit);
        if word.marked().writable_in_place(self.stack.top_number()) || word.kind() == Kind::Absent {
            return None;
        }
        let mut claim = Claim { first: unit, words: Vec::new() };
        if !self.claim_one(&mut claim, word) {
            return None;
        }
        let last = (end - 1) >> bits;
        let most = (RUN << self.geometry.sub_bits()).min((RUN_BYTES >> bits).max(1));
        for next in unit + 1..=last.min(unit + most - 1) {
            let other = self.map.lookup(next);
            let alike = next >> self.map.page_bits() == unit >> self.map.page_bits()
                && !other.marked().writable_in_place(self.stack.top_number())
                && !matches!(other.kind(), Kind::Absent | Kind::Corrupt);
            // The last one may be written in part; then its old contents must be read, and one
            // buffer for that is what a task may hold.
            let covered = (next + 1) << bits <= end || Shared::reads_zero(other);
            if !alike || !covered || !self.claim_one(&mut claim, other) {
                break;
            }
        }
        Some(claim)
    }

    fn claim_one(&self, claim: &mut Claim, word: Word) -> bool {
        let unit = claim.first + claim.count();
        if !self.map.claim(unit, word) {
            return false;
        }
        self.pages.borrow_mut().hold(&self.map, unit);
        claim.words.push(word);
        true
    }

    /// Claims the loaded units of a range, all or none of them. Else one that somebody else has
    /// claimed, or none if one is not loaded.
    pub(super) fn claim_range(&self, range: std::ops::Range<u64>) -> Result<Claim, Option<u64>> {
        let mut claim = Claim { first: range.start, words: Vec::new() };
        for unit in range {
            let word = self.map.lookup(unit);
            if word.kind() == Kind::Absent || !self.claim_one(&mut claim, word) {
                self.unclaim(&mut claim, 0);
                return Err(word.claimed().then_some(unit));
            }
        }
        Ok(claim)
    }

    /// Ends the claims from the `keep`th unit on without a change.
    pub(super) fn unclaim(&self, claim: &mut Claim, keep: usize) {
        for i in (keep..claim.words.len()).rev() {
            let unit = claim.first + i as u64;
            self.publish(unit, claim.words[i]);
        }
        claim.words.truncate(keep);
    }

    /// Ends the claim on a unit with its new (or old) word.
    pub(super) fn publish(&self, unit: u64, word: Word) {
        self.map.publish(unit, self.flagged(unit, word));
        self.pages.borrow_mut().release(&self.map, unit);
        self.unpark(Key::Unit(unit));
    }

    /// Writes into claimed units and ends the claims. Returns how far it came: no further if another
    /// task must be waited for, which was done.
    pub(super) async fn write_claimed(
        &self,
        slot: u16,
        mut claim: Claim,
        rest: &Rest<'_>,
    ) -> Result<u64, Status> {
        let page = claim.first >> self.map.page_bits();
        let result = match self.slice_ready(slot, page).await {
            Ok(()) => {
                let r = self.write_held(slot, &mut claim, rest).await;
                self.tables.borrow_mut().unuse(page);
                r
            }
            Err(status) => Err(status),
        };
        self.unclaim(&mut claim, 0);
        if result.is_ok() {
            self.write_back_if_much(slot).await?;
        }
        result
    }

    async fn write_held(
        &self,
        slot: u16,
        claim: &mut Claim,
        rest: &Rest<'_>,
    ) -> Result<u64, Status> {
        let bits = self.geometry.unit_bits();
        let (place, count) = self.place(claim)?;
        self.unclaim(claim, count);
        let target = match place {
            Place::There(host) => Target { host, whole: false, fresh: false },
            Place::New => self.allocate_for(slot, claim).await?,
            Place::Whole => {
                let sub = self.geometry.sub_bits();
                let first = claim.first >> sub << sub;
                let end = (first + (1 << sub)).min(self.map.clusters());
                self.unclaim(claim, 0);
                match self.claim_range(first..end) {
                    Ok(all) => *claim = all,
                    Err(Some(unit)) => {
                        self.at_rest(slot, self.park(slot, Key::Unit(unit))).await;
                        return Ok(rest.at);
                    }
                    Err(None) => return Ok(rest.at),
                }
                let run = self.allocate(slot, 1).await?;
                let host = run.first << self.geometry.cluster_bits();
                Target { host, whole: true, fresh: run.fresh }
            }
            Place::Busy(cluster) => {
                self.unclaim(claim, 0);
                self.at_rest(slot, self.park(slot, Key::Placing(cluster))).await;
                return Ok(rest.at);
            }
        };
        let to = rest.end.min((claim.first + claim.count()) << bits);
        let host = target.host;
        let filled = self.fill_and_write(slot, claim, rest, to, target).await;
        if filled.is_ok() {
            self.map_claimed(claim, host);
        }
        if place == Place::New {
            self.placed(claim);
        }
        if let Err(status) = filled {
            if !matches!(place, Place::There(_)) {
                let g = &self.geometry;
                let end = ((claim.first + claim.count()) << bits) - (claim.first << bits) + host;
                self.unallocate(g.cluster(host), g.cluster(end - 1) - g.cluster(host) + 1);
            }
            return Err(status);
        }
        claim.words.clear();
        Ok(to)
    }

    /// Stages the entries of what was written to `host`, and publishes the new mapping.
    fn map_claimed(&self, claim: &Claim, host: u64) {
        let g = &self.geometry;
        let (sub, bits) = (g.sub_bits(), g.unit_bits());
        let end = claim.first + claim.count();
        let at = |unit: u64| host + ((unit - claim.first) << bits);
        let mut tables = self.tables.borrow_mut();
        for cluster in claim.first >> sub..=(end - 1) >> sub {
            let (first, last) =
                ((cluster << sub).max(claim.first), ((cluster + 1) << sub).min(end));
            let (page, index) = self.place_of_entry(cluster);
            let raw = tables.entry(page, index).unwrap_or_default();
            let old = self.decode(self.top_at(), g, cluster << g.cluster_bits(), raw);
            let old = old.unwrap_or(L2Entry::Unallocated);
            let base = g.cluster_start(at(first));
            let (mut alloc, mut zero) = match old.host_cluster() {
                Some((host, _)) if host == base => old.bits(),
                Some(_) => {
                    self.free_old(old);
                    (0, 0)
                }
                None => {
                    self.free_old(old);
                    (0, old.bits().1)
                }
            };
            let mask = match sub {
                0 => u32::MAX,
                _ => (((1u64 << (last - first)) - 1) << (first - (cluster << sub))) as u32,
            };
            alloc |= mask;
            zero &= !mask;
            let new = L2Entry::parts(Some((base, true)), alloc, zero);
            tables.stage(page, index, new.encode(g));
        }
        drop(tables);
        for unit in (claim.first..end).rev() {
            self.publish(unit, Word::mapped(self.stack.top_number(), at(unit), true));
        }
    }

    /// Fills the claimed units' place whole: the guest's bytes up to `to`, and what belongs around
    /// them.
    async fn fill_and_write(
        &self,
        slot: u16,
        claim: &Claim,
        rest: &Rest<'_>,
        to: u64,
        Target { host, whole, fresh }: Target,
    ) -> Result<(), Status> {
        let bits = self.geometry.unit_bits();
        let start = claim.first << bits;
        let len = claim.count() << bits;
        let at = rest.at;
        // Behind the disk there may be no data file.
        let stop = match self.geometry.data_file() {
            true => (start + len).min(self.geometry.size().next_multiple_of(512)),
            false => start + len,
        };
        let (mut head, mut tail) = (at - start, stop - to);
        // What is read for the fill: all of it, or the first unit, since only that can have old
        // contents beside the guest's bytes; see `claim`.
        let all = whole || claim.words.len() == 1 || rest.at == rest.end;
        let span = if all { len } else { self.geometry.unit_size() };
        let zeroes = |words: &[Word]| words.iter().all(|&w| Shared::reads_zero(w));
        let old_zero = if all { zeroes(&claim.words) } else { zeroes(&claim.words[..1]) };
        let copies = !old_zero && (head > 0 || (tail > 0 && all));
        let mut first = host;
        if fresh && !copies && to > at {
            let inner = host + head..host + (to - start);
            first = host.max(inner.start & !(PAGE - 1));
            head = inner.start - first;
            tail = tail.min(inner.end.next_multiple_of(PAGE) - inner.end);
        }
        let old: Option<Buf> = match copies {
            true => Some(self.data_buf(slot).await),
            false => None,
        };
        let mut status = Status::Ok;
        if let Some(buf) = &old {
            let part = buf.head(span as u32).unwrap_or(Seg::NONE);
            status = self.read(slot, start, span, &[part]).await;
        }
        let around = |from: u64, len: u64| match &old {
            Some(buf) => buf.seg().slice(from as u32, len as u32).unwrap_or(Seg::NONE),
            None => self.zero_seg(len),
        };
        if status.is_ok() {
            let mut list = SegList::EMPTY;
            let mut fits = list.push(around(0, head));
            fits &= list.push_part(rest.segs, at - rest.offset, to - at);
            fits &= list.push(if all { around(to - start, tail) } else { self.zero_seg(tail) });
            status = if fits {
                self.start_write(slot, first, list, rest.flags);
                self.wait(slot).await
            } else {
                Status::Invalid
            };
        }
        if let Some(buf) = old {
            self.give_data(buf);
        }
        check(status)
    }
}
