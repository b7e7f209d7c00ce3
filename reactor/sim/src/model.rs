//! [`Model`]: what each sector of a guest's disk was told to hold, and so what it may hold: while
//! the guest runs, and after a power cut.

use std::collections::BTreeSet;

use crate::SECTOR;

/// Contents that come from the layers below: identities from here up. A guest's writes have lower
/// ones, and 0 stands for zeroes.
pub const BELOW: u32 = 0xb000_0000;

/// Writes the contents of `into.len() / 512` sectors, from `first` on, of this identity. Each
/// sector says what wrote it and where it belongs.
pub fn fill(id: u32, first: u64, into: &mut [u8]) {
    for (sector, bytes) in (first..).zip(into.chunks_mut(SECTOR)) {
        let word = if id == 0 { 0 } else { u64::from(id) << 32 | sector & 0xffff_ffff };
        for place in bytes.chunks_exact_mut(8) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Whose contents these are, if they are one identity's, whole, and belong to this sector.
pub fn ident(sector: u64, bytes: &[u8]) -> Option<u32> {
    let word = u64::from_le_bytes(bytes[..8].try_into().ok()?);
    if bytes.chunks_exact(8).any(|w| w != word.to_le_bytes()) {
        return None;
    }
    let (id, at) = ((word >> 32) as u32, word & 0xffff_ffff);
    match id {
        0 => (word == 0).then_some(0),
        _ => (at == sector & 0xffff_ffff).then_some(id),
    }
}

/// Not answered yet.
const NEVER: u64 = u64::MAX;

/// Something that a sector was told to hold.
#[derive(Clone, Copy, Debug)]
struct Told {
    id: u32,
    sent: u64,
    done: u64,
    /// It was done: neither a hint nor failed.
    sure: bool,
    /// A flush or FUA vouched for it.
    durable: bool,
}

impl Told {
    /// Whether the other one certainly came after this one.
    fn before(&self, other: &Told) -> bool {
        self.done < other.sent
    }
}

/// The history of every sector, as far as it still matters. Its time is a count of what happened.
#[derive(Clone, Debug)]
pub struct Model {
    sectors: Vec<Vec<Told>>,
    /// When the reads in flight were sent.
    reads: BTreeSet<u64>,
    now: u64,
    last: u32,
}

impl Model {
    /// A disk whose sectors hold, durably, contents of these identities.
    pub fn new(held: &[u32]) -> Model {
        let one = |&id: &u32| vec![Told { id, sent: 0, done: 0, sure: true, durable: true }];
        Model { sectors: held.iter().map(one).collect(), reads: BTreeSet::new(), now: 0, last: 0 }
    }

    /// The same disk in its next life: it holds these contents, durably. Identities go on.
    pub fn restart(&mut self, held: &[u32]) {
        let last = self.last;
        *self = Model { last, ..Model::new(held) };
    }

    /// An identity that was not used yet.
    pub fn identity(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    /// A moment after all that happened so far.
    pub fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// Whether a change of one of the sectors is in flight.
    pub fn is_busy(&self, first: u64, count: u64) -> bool {
        let range = &self.sectors[first as usize..(first + count) as usize];
        range.iter().any(|s| s.iter().any(|t| t.done == NEVER))
    }

    /// Sectors of the disk.
    pub fn len(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// Whether there is no sector.
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// Without what lies behind the end, which may have moved while a request was on its way.
    fn range(&mut self, first: u64, count: u64) -> &mut [Vec<Told>] {
        let end = first.saturating_add(count).min(self.len());
        &mut self.sectors[first.min(end) as usize..end as usize]
    }

    /// The disk has so many sectors from now on, durably; new ones hold zeroes.
    pub fn resize(&mut self, sectors: u64) {
        let zeroes = vec![Told { id: 0, sent: 0, done: 0, sure: true, durable: true }];
        self.sectors.resize(sectors as usize, zeroes);
    }

    /// A change is sent. Returns when.
    pub fn sent(&mut self, first: u64, count: u64, id: u32) -> u64 {
        let sent = self.tick();
        for s in self.range(first, count) {
            s.push(Told { id, sent, done: NEVER, sure: false, durable: false });
        }
        sent
    }

    /// The change that was sent at `sent` was answered. `sure`: it was done; else it may have been
    /// done to any of its sectors. `durable`: the answer vouches for it.
    pub fn done(&mut self, first: u64, count: u64, sent: u64, sure: bool, durable: bool) {
        let now = self.tick();
        for s in self.range(first, count) {
            for told in s.iter_mut().filter(|t| t.sent == sent && t.done == NEVER) {
                (told.done, told.sure, told.durable) = (now, sure, sure && durable);
            }
        }
    }

    /// A read is sent. Returns when.
    pub fn read_sent(&mut self) -> u64 {
        let sent = self.tick();
        self.reads.insert(sent);
        sent
    }

    /// A read that was sent then was answered.
    pub fn read_done(&mut self, sent: u64) {
        self.reads.remove(&sent);
    }

    /// A flush that was sent at `sent` succeeded: what was done before that is durable.
    pub fn flushed(&mut self, sent: u64) {
        let oldest = self.reads.first().copied().unwrap_or(NEVER);
        for s in self.sectors.iter_mut().filter(|s| s.len() > 1) {
            s.iter_mut().filter(|t| t.sure && t.done < sent).for_each(|t| t.durable = true);
            // Nobody can see any more what something durable came after, before all open reads.
            let newer = s.iter().filter(|t| t.durable && t.done < oldest).map(|t| t.sent).max();
            s.retain(|t| newer.is_none_or(|newer| t.done >= newer));
        }
    }

    /// Whether a read that was sent at `sent` and is answered now may show this.
    pub fn may_read(&self, sector: u64, id: u32, sent: u64) -> bool {
        let s = &self.sectors[sector as usize];
        let gone = |t: &Told| s.iter().any(|o| o.sure && o.done < sent && t.before(o));
        s.iter().any(|t| t.id == id && !gone(t))
    }

    /// Whether the sector may hold this after a power cut now.
    pub fn may_survive(&self, sector: u64, id: u32) -> bool {
        let s = &self.sectors[sector as usize];
        let gone = |t: &Told| s.iter().any(|o| o.durable && t.before(o));
        s.iter().any(|t| t.id == id && !gone(t))
    }

    /// What the sector was told, for a message.
    pub fn explain(&self, sector: u64) -> String {
        let show = |t: &Told| {
            let done = if t.done == NEVER { "-".to_owned() } else { t.done.to_string() };
            let what = match (t.durable, t.sure) {
                (true, _) => "durable",
                (_, true) => "done",
                _ if t.done == NEVER => "in flight",
                _ => "failed or a hint",
            };
            format!("{:#x} ({what}, {}..{done})", t.id, t.sent)
        };
        self.sectors[sector as usize].iter().map(show).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_say_whose_they_are_and_where_they_belong() {
        let mut bytes = vec![0; 2 * SECTOR];
        fill(7, 40, &mut bytes);
        assert_eq!(ident(40, &bytes[..SECTOR]), Some(7));
        assert_eq!(ident(41, &bytes[SECTOR..]), Some(7));
        assert_eq!(ident(41, &bytes[..SECTOR]), None, "another sector's");
        bytes[100] ^= 1;
        assert_eq!(ident(40, &bytes[..SECTOR]), None, "torn");
        assert_eq!(ident(3, &[0; SECTOR]), Some(0));
        assert_eq!(ident(3, &[0xf0; SECTOR]), None, "foreign");
    }

    #[test]
    fn what_was_flushed_is_there_and_newer_may_be() {
        let mut m = Model::new(&[0, 0]);
        let sent = m.sent(0, 2, 1);
        assert!(m.may_survive(0, 0) && m.may_survive(0, 1) && m.is_busy(1, 1));
        let early = m.tick();
        m.done(0, 2, sent, true, false);
        m.flushed(early);
        assert!(m.may_survive(0, 0), "the flush was sent before the answer was seen");
        let late = m.tick();
        m.flushed(late);
        assert!(!m.may_survive(0, 0) && m.may_survive(0, 1) && !m.is_busy(0, 2));
        let sent = m.sent(0, 1, 2);
        let during = m.tick();
        m.done(0, 1, sent, true, false);
        let after = m.tick();
        assert!(m.may_survive(0, 1) && m.may_survive(0, 2) && !m.may_survive(1, 2));
        assert!(!m.may_read(0, 1, after) && m.may_read(0, 2, after) && m.may_read(0, 1, during));
    }

    #[test]
    fn a_read_may_show_what_it_was_sent_before() {
        let mut m = Model::new(&[5]);
        let read = m.read_sent();
        let sent = m.sent(0, 1, 1);
        m.done(0, 1, sent, true, false);
        let flush = m.tick();
        m.flushed(flush);
        assert!(m.may_read(0, 5, read) && !m.may_read(0, 5, flush) && !m.may_survive(0, 5));
        m.read_done(read);
        m.flushed(flush);
        assert_eq!(m.sectors[0].len(), 1);
    }

    #[test]
    fn another_size() {
        let mut m = Model::new(&[5, 5, 5]);
        let sent = m.sent(1, 2, 1);
        m.resize(2);
        m.done(1, 2, sent, true, true);
        m.resize(3);
        assert!(m.may_survive(1, 1) && !m.may_survive(1, 5));
        assert!(m.may_survive(2, 0) && !m.may_survive(2, 1) && !m.may_survive(2, 5));
    }

    #[test]
    fn overlapping_and_failed_writes_leave_either() {
        let mut m = Model::new(&[0]);
        let (a, b) = (m.sent(0, 1, 1), m.sent(0, 1, 2));
        m.done(0, 1, b, true, false);
        m.done(0, 1, a, true, false);
        let flush = m.tick();
        m.flushed(flush);
        assert!(m.may_survive(0, 1) && m.may_survive(0, 2) && !m.may_survive(0, 0));
        let failed = m.sent(0, 1, 3);
        m.done(0, 1, failed, false, true);
        let flush = m.tick();
        m.flushed(flush);
        assert!(m.may_read(0, 1, flush) && m.may_read(0, 3, flush));
        let fua = m.sent(0, 1, 4);
        m.done(0, 1, fua, true, true);
        assert!(!m.may_survive(0, 3) && m.may_survive(0, 4));
    }
}
