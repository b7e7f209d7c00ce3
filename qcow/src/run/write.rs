//! Writes that do not go straight down: allocation, copy-on-write, kept zero clusters.
//!
//! A cluster is claimed in the map, its new place is filled whole (old contents or zeroes around
//! the guest's bytes, in one device write), and only when that has completed is the L2 entry staged
//! and the new mapping published. A guest's bytes in a cluster that is being filled wait for the
//! claim, so a fill never lies over newer data.

use block::{Flags, Op, SegList, Status};
use dma::{Buf, Seg};

use super::io::Child;
use super::read::check;
use super::shared::{Key, Shared};
use crate::format::L2Entry;
use crate::map::{Kind, Word};

/// Clusters that one write allocates at most, and bytes that it moves at most.
const RUN: u64 = 64;
const RUN_BYTES: u64 = 1 << 20;

/// Clusters claimed together, side by side in one page of the map, to be written in one piece.
pub(super) struct Claim {
    first: u64,
    words: Vec<Word>,
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
        let bits = self.geometry.cluster_bits();
        let size = self.geometry.cluster_size();
        let end = offset + len;
        let mut at = offset;
        while at < end {
            self.wait_if_crowded(slot).await?;
            let cluster = at >> bits;
            let word = self.map.lookup(cluster);
            if word.writable_in_place(self.stack.top_number()) {
                let mut last = word;
                let mut to = end.min((cluster + 1) << bits);
                while to < end {
                    let next = self.map.lookup(to >> bits);
                    if !last.continued_by(next, size) {
                        break;
                    }
                    last = next;
                    to = end.min(to + size);
                }
                let host = word.host() + (at & (size - 1));
                self.start_write(slot, host, part(segs, at - offset, to - at)?, flags);
                at = to;
                continue;
            }
            // From here on there is waiting; what is in flight may as well end first.
            check(self.wait(slot).await)?;
            let word = self.word(slot, cluster).await?;
            if word.claimed() {
                self.at_rest(slot, self.park(slot, Key::Cluster(cluster))).await;
                continue;
            }
            if word.kind() == Kind::Corrupt {
                return Err(Status::Corrupt);
            }
            let Some(claim) = self.claim(cluster, end) else { continue };
            at = self.write_claimed(slot, claim, at, end, offset, segs, flags).await?;
        }
        Ok(())
    }

    fn start_write(&self, slot: u16, host: u64, segs: SegList, flags: Flags) {
        let len = segs.bytes();
        let child = Child { port: self.top(), op: Op::Write, flags, offset: host, len, segs };
        self.start(slot, child);
    }

    /// Claims `cluster` and those behind it that a write up to `end` would allocate too. `None` if
    /// the cluster has changed meanwhile.
    fn claim(&self, cluster: u64, end: u64) -> Option<Claim> {
        let bits = self.geometry.cluster_bits();
        let word = self.map.lookup(cluster);
        if word.writable_in_place(self.stack.top_number()) || word.kind() == Kind::Absent {
            return None;
        }
        let mut claim = self.claim_alone(cluster, word)?;
        let last = (end - 1) >> bits;
        let most = RUN.min((RUN_BYTES >> bits).max(1));
        for next in cluster + 1..=last.min(cluster + most - 1) {
            let other = self.map.lookup(next);
            let alike = next >> self.map.page_bits() == cluster >> self.map.page_bits()
                && !self.kept_zero(word)
                && !self.kept_zero(other)
                && !other.writable_in_place(self.stack.top_number())
                && matches!(other.kind(), Kind::Hole | Kind::Zero | Kind::Mapped);
            // The last one may be written in part; then its old contents must be read, and one
            // buffer for that is what a task may hold.
            let covered = (next + 1) << bits <= end || Shared::reads_zero(other);
            if !alike || !covered || !self.claim_one(&mut claim, other) {
                break;
            }
        }
        Some(claim)
    }

    /// Claims one cluster whose word is `word`, if it still is.
    pub(super) fn claim_alone(&self, cluster: u64, word: Word) -> Option<Claim> {
        let mut claim = Claim { first: cluster, words: Vec::new() };
        self.claim_one(&mut claim, word).then_some(claim)
    }

    fn claim_one(&self, claim: &mut Claim, word: Word) -> bool {
        let cluster = claim.first + claim.words.len() as u64;
        if !self.map.claim(cluster, word) {
            return false;
        }
        self.pages.borrow_mut().hold(&self.map, cluster);
        claim.words.push(word);
        true
    }

    /// Ends the claims from the `keep`th cluster on without a change.
    fn unclaim(&self, claim: &mut Claim, keep: usize) {
        for i in (keep..claim.words.len()).rev() {
            let cluster = claim.first + i as u64;
            self.publish(cluster, claim.words[i]);
        }
        claim.words.truncate(keep);
    }

    /// Ends the claim on a cluster with its new (or old) word.
    pub(super) fn publish(&self, cluster: u64, word: Word) {
        self.map.publish(cluster, word);
        self.pages.borrow_mut().release(&self.map, cluster);
        self.unpark(Key::Cluster(cluster));
    }

    /// Writes into claimed clusters and ends the claims. Returns how far it came.
    #[expect(clippy::too_many_arguments, reason = "one step of the loop above, with its state")]
    pub(super) async fn write_claimed(
        &self,
        slot: u16,
        mut claim: Claim,
        at: u64,
        end: u64,
        offset: u64,
        segs: &[Seg],
        flags: Flags,
    ) -> Result<u64, Status> {
        let page = claim.first >> self.map.page_bits();
        let result = match self.slice_ready(slot, page).await {
            Ok(()) => {
                let r = self.write_held(slot, &mut claim, at, end, offset, segs, flags).await;
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

    #[expect(clippy::too_many_arguments, reason = "one step of the loop above, with its state")]
    async fn write_held(
        &self,
        slot: u16,
        claim: &mut Claim,
        at: u64,
        end: u64,
        offset: u64,
        segs: &[Seg],
        flags: Flags,
    ) -> Result<u64, Status> {
        let bits = self.geometry.cluster_bits();
        let kept = self.kept_zero(claim.words[0]);
        // As much as one write takes; a claim that got fewer clusters takes less.
        let host = if kept {
            claim.words[0].host()
        } else {
            let (cluster, count) = self.allocate(slot, claim.words.len() as u64).await?;
            self.unclaim(claim, count as usize);
            cluster << bits
        };
        let to = end.min((claim.first + claim.words.len() as u64) << bits);
        let guest = part(segs, at - offset, to - at)?;
        let filled = self.fill_and_write(slot, claim, at, to, host, guest, flags).await;
        if let Err(status) = filled {
            if !kept {
                self.unallocate(host >> bits, claim.words.len() as u64);
            }
            return Err(status);
        }
        let page = claim.first >> self.map.page_bits();
        for i in (0..claim.words.len()).rev() {
            let cluster = claim.first + i as u64;
            let place = host + ((i as u64) << bits);
            let index = (cluster - (page << self.map.page_bits())) as usize;
            let old = self.tables.borrow().entry(page, index).unwrap_or(0);
            let new = L2Entry::Normal { host: place, copied: true };
            self.tables.borrow_mut().stage(page, index, new.encode(&self.geometry));
            if !kept {
                self.free_old(cluster, old);
            }
            self.publish(cluster, Word::mapped(self.stack.top_number(), place, true));
        }
        claim.words.clear();
        Ok(to)
    }

    /// Fills the clusters at `host` whole: the guest's bytes and what belongs around them.
    #[expect(clippy::too_many_arguments, reason = "one step of the loop above, with its state")]
    async fn fill_and_write(
        &self,
        slot: u16,
        claim: &Claim,
        at: u64,
        to: u64,
        host: u64,
        guest: SegList,
        flags: Flags,
    ) -> Result<(), Status> {
        let bits = self.geometry.cluster_bits();
        let size = self.geometry.cluster_size();
        let start = claim.first << bits;
        let (head, tail) = (at - start, ((claim.words.len() as u64) << bits) - (to - start));
        let first = claim.words[0];
        // Only the first cluster can have old contents beside the guest's bytes; see `claim`.
        let copies =
            !Shared::reads_zero(first) && (head > 0 || (tail > 0 && claim.words.len() == 1));
        let old: Option<Buf> = match copies {
            true => Some(self.data_buf(slot).await),
            false => None,
        };
        let mut status = Status::Ok;
        if let Some(buf) = &old {
            status = self.read(slot, start, size, &[buf.seg()]).await;
        }
        let around = |from: u64, len: u64| match &old {
            Some(buf) => buf.seg().slice(from as u32, len as u32).unwrap_or(Seg::NONE),
            None => self.zero_seg(len),
        };
        if status.is_ok() {
            let mut all = SegList::EMPTY;
            let mut fits = all.push(around(0, head));
            fits &= all.push_part(guest.as_slice(), 0, to - at);
            fits &= all.push(match claim.words.len() {
                1 => around(size - tail, tail),
                _ => self.zero_seg(tail),
            });
            status = if fits {
                self.start_write(slot, host, all, flags);
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

    /// A zero cluster with a host cluster of its own that may be filled in place.
    fn kept_zero(&self, word: Word) -> bool {
        let ours = word.layer() == self.stack.top_number() && word.owned();
        word.kind() == Kind::Zero && word.host() != 0 && ours
    }
}

fn part(segs: &[Seg], from: u64, len: u64) -> Result<SegList, Status> {
    let mut list = SegList::EMPTY;
    if list.push_part(segs, from, len) { Ok(list) } else { Err(Status::Invalid) }
}
