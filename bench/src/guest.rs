//! A guest in this process: sends 4 KiB requests over a blkif ring and checks each answer.

use blkif::{EventChannel, Frontend, Setup, Signal};
use hdrhistogram::Histogram;
use reactor::Wake;

use crate::Error;
use crate::reference::Reference;
use crate::rig::PAGE_BLOCKS;
use crate::stamp::{self, BLOCK};

/// Sectors of 512 bytes in a block.
const SECTORS: u64 = (BLOCK / 512) as u64;

/// The way from the guest to a reactor that may sleep.
pub(crate) struct Kick {
    pub(crate) signal: Signal,
    pub(crate) wake: Wake,
}

impl EventChannel for Kick {
    fn notify(&mut self) {
        self.signal.notify();
        self.wake.wake();
    }
}

/// What to send.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Mix {
    /// Writes one after the other.
    Fill,
    /// Random reads.
    Read,
    /// Random overwrites.
    Write,
    /// Random, 7 reads to 3 writes.
    Mixed,
    /// Reads one after the other, once over everything.
    Verify,
    /// Reads, each in another page of the map than the last ones.
    Pages,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Read,
    Write,
    Flush,
}

#[derive(Clone, Copy)]
struct Flight {
    lba: u64,
    sent: u64,
    kind: Kind,
}

/// The guest.
pub(crate) struct Guest {
    ring: Frontend<Kick>,
    order: u8,
    flights: Vec<Flight>,
    free: Vec<u16>,
    /// How often each block was written; what a read must find.
    generations: Vec<u32>,
    /// What blocks hold that were never written; zeroes without it.
    pub(crate) reference: Option<Reference>,
    /// Blocks with a request under way: a second one would race with it.
    busy: Vec<bool>,
    next: u64,
    rng: u64,
    out: Box<[u8; BLOCK]>,
    into: Box<[u8; BLOCK]>,
    pub(crate) latency: Histogram<u64>,
    pub(crate) requests: u64,
    pub(crate) written_bytes: u64,
    pub(crate) verified_bytes: u64,
    /// What went wrong first.
    pub(crate) failure: Option<String>,
}

impl Guest {
    /// A guest with a ring of `1 << order` pages on a disk of `blocks` blocks, all zeroes.
    pub(crate) fn new(order: u8, blocks: u64, kick: Kick) -> Result<Guest, Error> {
        let setup =
            Setup { abi: blkif::Abi::X86_64, order, persistent: true, max_segments: 11, start: 0 };
        let ring = Frontend::new(setup, kick).map_err(Error::other)?;
        let slots = ring.room();
        let none = Flight { lba: 0, sent: 0, kind: Kind::Flush };
        let blocks = usize::try_from(blocks).map_err(Error::other)?;
        Ok(Guest {
            ring,
            order,
            flights: vec![none; slots],
            free: (0..slots as u16).rev().collect(),
            generations: vec![0; blocks],
            reference: None,
            busy: vec![false; blocks],
            next: 0,
            rng: 0x1234_5678_9abc_def1,
            out: Box::new([0; BLOCK]),
            into: Box::new([0; BLOCK]),
            latency: Histogram::new_with_bounds(1, 60_000_000_000, 3).map_err(Error::other)?,
            requests: 0,
            written_bytes: 0,
            verified_bytes: 0,
            failure: None,
        })
    }

    pub(crate) fn ring(&self) -> &Frontend<Kick> {
        &self.ring
    }

    /// log2 of the ring's pages.
    pub(crate) fn order(&self) -> u8 {
        self.order
    }

    /// The disk's blocks as they should be, for a guest that goes on with the same disk.
    pub(crate) fn generations(&self) -> &[u32] {
        &self.generations
    }

    pub(crate) fn set_generations(&mut self, generations: Vec<u32>) {
        self.busy = vec![false; generations.len()];
        self.generations = generations;
    }

    /// Begins a pass over the disk from its first block.
    pub(crate) fn rewind(&mut self) {
        self.next = 0;
    }

    /// Whether a pass has come to the disk's end.
    pub(crate) fn at_end(&self) -> bool {
        self.next == self.generations.len() as u64
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }

    fn random(&mut self) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        self.rng >> 16
    }

    /// The next block to send a request to, and whether to write it.
    fn choose(&mut self, mix: Mix) -> Option<(u64, bool)> {
        let blocks = self.generations.len() as u64;
        if matches!(mix, Mix::Fill | Mix::Verify) {
            if self.next == blocks {
                return None;
            }
            self.next += 1;
            return Some((self.next - 1, mix == Mix::Fill));
        }
        if mix == Mix::Pages {
            let (n, pages) = (self.next, (blocks / PAGE_BLOCKS).max(1));
            self.next += 1;
            return Some((n % pages * PAGE_BLOCKS + n / pages % PAGE_BLOCKS, false));
        }
        // Some tries: with few blocks most may be busy.
        for _ in 0..4 {
            let lba = self.random() % blocks;
            if !self.busy[lba as usize] {
                let write = match mix {
                    Mix::Read => false,
                    Mix::Write => true,
                    _ => self.random() % 10 < 3,
                };
                return Some((lba, write));
            }
        }
        None
    }

    /// Sends requests until `depth` are under way. `now` in nanoseconds.
    pub(crate) fn send(&mut self, mix: Mix, depth: usize, now: u64) {
        while self.ring.in_flight() < depth && self.failure.is_none() {
            let Some((lba, write)) = self.choose(mix) else { break };
            let Some(id) = self.free.pop() else { break };
            let sent = if write {
                let generation = self.generations[lba as usize].wrapping_add(1).max(1);
                stamp::fill(&mut self.out, lba, generation);
                self.generations[lba as usize] = generation;
                self.ring.write(u64::from(id), lba * SECTORS, &self.out[..])
            } else {
                self.ring.read(u64::from(id), lba * SECTORS, BLOCK as u32)
            };
            if let Err(e) = sent {
                self.failure = Some(format!("block {lba}: {e}"));
                return;
            }
            self.busy[lba as usize] = true;
            let kind = if write { Kind::Write } else { Kind::Read };
            self.flights[usize::from(id)] = Flight { lba, sent: now, kind };
        }
        self.ring.push();
    }

    /// Takes all answers that are there. Returns how many.
    pub(crate) fn reap(&mut self, now: u64) -> usize {
        let mut n = 0;
        loop {
            let done = match self.ring.reap(&mut self.into[..]) {
                Ok(Some(done)) => done,
                Ok(None) => return n,
                Err(e) => {
                    self.failure.get_or_insert(e.to_string());
                    return n;
                }
            };
            n += 1;
            let Some(&f) = self.flights.get(done.cookie as usize) else { continue };
            self.free.push(done.cookie as u16);
            if f.kind != Kind::Flush {
                self.busy[f.lba as usize] = false;
            }
            self.requests += 1;
            // Beyond the histogram's bounds is beyond any deadline, and recorded as that.
            self.latency.saturating_record(now.saturating_sub(f.sent).max(1));
            let generation = self.generations[f.lba as usize];
            let mut right = || match (&mut self.reference, generation) {
                (Some(reference), 0) => reference.matches(f.lba, &self.into[..]),
                _ => stamp::verify(&self.into[..], f.lba, generation),
            };
            match f.kind {
                _ if done.status != 0 => {
                    let (kind, lba, status) = (f.kind, f.lba, done.status);
                    self.failure.get_or_insert(format!("{kind:?} of block {lba}: status {status}"));
                }
                Kind::Write => self.written_bytes += BLOCK as u64,
                Kind::Read if right() => self.verified_bytes += BLOCK as u64,
                Kind::Read => {
                    self.failure.get_or_insert(format!("block {} holds wrong data", f.lba));
                }
                Kind::Flush => {}
            }
        }
    }

    /// Sends a flush and returns whether it could be sent.
    pub(crate) fn send_flush(&mut self, now: u64) -> bool {
        let Some(id) = self.free.pop() else { return false };
        self.flights[usize::from(id)] = Flight { lba: 0, sent: now, kind: Kind::Flush };
        match self.ring.flush(u64::from(id), 0, &[]) {
            Ok(()) => {
                self.ring.push();
                true
            }
            Err(e) => {
                self.failure.get_or_insert(format!("flush: {e}"));
                false
            }
        }
    }

    /// Forgets what was measured, but not what the disk holds.
    pub(crate) fn reset_figures(&mut self) {
        self.latency.reset();
        self.requests = 0;
    }
}
