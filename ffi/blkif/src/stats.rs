//! [`Stats`]: what a ring has done, read from outside without disturbing its reactor; and the one
//! table from [`Status`] to a ring's status.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::Status;
use reactor::Histogram;

use crate::abi::{DISCARD, EOPNOTSUPP, ERROR, OKAY};

/// What a guest is told of the end of an operation.
///
/// `EOPNOTSUPP` makes Linux switch the operation off for good, and after a flush or barrier report
/// success: so it is said of a discard only, the one operation that may lack below although it
/// was offered and whose loss harms nobody.
#[inline]
pub fn ring_status(operation: u8, status: Status) -> i16 {
    match status {
        Status::Ok => OKAY,
        Status::Unsupported if operation == DISCARD => EOPNOTSUPP,
        Status::Unsupported
        | Status::Invalid
        | Status::ReadOnly
        | Status::NoSpace
        | Status::Medium
        | Status::Timeout
        | Status::Gone
        | Status::Corrupt => ERROR,
    }
}

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`; not a read-modify-write of the processor, since there is one writer.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.set(self.get().wrapping_add(n));
    }

    #[inline]
    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The value now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of one ring. Written by its reactor only, read by anybody.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Stats {
    /// Reads of one segment that went straight from the disk to a page mapped for good: one counter for
    /// what is several, see [`Stats::reads`] and [`Stats::page_hits`].
    pub(crate) plain_reads: Counter,
    /// The same of writes.
    pub(crate) plain_writes: Counter,
    pub(crate) other_reads: Counter,
    pub(crate) other_writes: Counter,
    /// Flushes taken.
    pub flushes: Counter,
    /// Barriers taken.
    pub barriers: Counter,
    /// Discards taken.
    pub discards: Counter,
    /// Of the reads and writes, those that were indirect.
    pub indirect: Counter,
    /// Bytes of reads that succeeded.
    pub read_bytes: Counter,
    /// Bytes of writes that were sent to the disk.
    pub written_bytes: Counter,
    pub(crate) other_hits: Counter,
    /// Segments and pages of segments that were copied by the hypervisor instead.
    pub page_misses: Counter,
    /// Turns whose copies were started: [`crate::Grants::start_copies`].
    pub copy_batches: Counter,
    /// Copies in them.
    pub copy_ops: Counter,
    /// Copies in them that failed.
    pub copy_errors: Counter,
    /// Pages mapped for good.
    pub pages_mapped: Counter,
    /// Pages given back while the ring was in use.
    pub pages_evicted: Counter,
    /// Times that answers were published.
    pub publishes: Counter,
    /// Events sent: publishes that the guest wanted to hear of.
    pub events: Counter,
    /// Answers other than okay.
    pub errors: Counter,
    /// Requests refused because a field had no right value.
    pub bad_requests: Counter,
    /// Requests refused because the disk has failed.
    pub refused: Counter,
    /// Rings given up because the guest broke the protocol: 0 or 1.
    pub ring_stops: Counter,
    /// Completions that belonged to no request.
    pub strays: Counter,
    /// Writes and flushes held now because there is no space: an alarm while it is not 0.
    pub held_no_space: Counter,
    /// Empty flushes that failed for good and are never answered.
    pub held_flushes: Counter,
    /// The disk could not flush: every later request fails. 0 or 1.
    pub failed: Counter,
    /// Requests taken and not yet answered.
    pub in_flight: Counter,
    /// How long requests were in flight, in nanoseconds: the sum over all of them, those that still are
    /// included. Its growth in a second is the mean depth of the queue; its growth by the number of
    /// requests that ended, what one took.
    pub in_flight_ns: Counter,
    /// How long reads took, of those that were watched: see [`crate::Backend`].
    pub read_latency: Histogram,
    /// The same of writes.
    pub write_latency: Histogram,
    pub(crate) detached: AtomicBool,
}

impl Stats {
    /// Reads, direct and indirect: those that came to their end, and those that wait for more than the
    /// disk.
    pub fn reads(&self) -> u64 {
        self.plain_reads.get() + self.other_reads.get()
    }

    /// Writes taken, direct and indirect.
    pub fn writes(&self) -> u64 {
        self.plain_writes.get() + self.other_writes.get()
    }

    /// Segments found at a page that was mapped for good.
    pub fn page_hits(&self) -> u64 {
        self.plain_reads.get() + self.plain_writes.get() + self.other_hits.get()
    }

    /// The backend is gone, and no page of the guest is mapped any more.
    pub fn detached(&self) -> bool {
        self.detached.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{FLUSH_DISKCACHE, READ, WRITE, WRITE_BARRIER};

    #[test]
    fn every_status_has_its_answer() {
        for s in Status::ALL {
            for op in [READ, WRITE, WRITE_BARRIER, FLUSH_DISKCACHE, DISCARD] {
                let expected = match s {
                    Status::Ok => 0,
                    Status::Unsupported if op == 5 => -2,
                    _ => -1,
                };
                assert_eq!(ring_status(op, s), expected, "{s}");
            }
        }
    }
}
