//! [`Limit`]: how many requests and bytes a second an image takes. Shared by the reactors that serve it;
//! nothing in it waits, and images without one never look at it.
//!
//! The generic cell rate algorithm (ITU-T I.371): each request moves on a time before which the next one
//! would be too early. A reactor takes requests while that time is less than [`BURST_NS`] ahead, and a
//! request that is larger than what was left is paid for afterwards.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{DeviceInfo, Full, Op, Request, Submit};

/// How much at once may come after a pause, in nanoseconds of the rate.
const BURST_NS: u64 = 10_000_000;

/// Picoseconds of a second.
const SECOND_PS: u64 = 1_000_000_000_000;

/// What an image may be asked in a second. 0 is no limit.
#[derive(Debug, Default)]
pub struct Limit {
    requests: Rate,
    bytes: Rate,
    /// Bytes of the last request: what the next ones are expected to have.
    last: AtomicU64,
}

/// One of both.
#[derive(Debug, Default)]
struct Rate {
    /// Picoseconds for each; 0: no limit.
    cost: AtomicU64,
    /// All that was taken is paid for at this time, in nanoseconds.
    paid: AtomicU64,
}

impl Rate {
    fn set(&self, per_second: u64) {
        let cost = SECOND_PS.checked_div(per_second).map_or(0, |cost| cost.max(1));
        self.cost.store(cost, Ordering::Relaxed);
        self.paid.store(0, Ordering::Relaxed);
    }

    fn charge(&self, count: u64, now: u64) {
        let cost = self.cost.load(Ordering::Relaxed);
        if cost == 0 {
            return;
        }
        let more = (u128::from(cost) * u128::from(count)).div_ceil(1000);
        let more = u64::try_from(more).unwrap_or(u64::MAX);
        let later = |paid: u64| Some(paid.max(now).saturating_add(more));
        let _ = self.paid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
    }

    /// How many may be taken; not more than what comes after a pause.
    fn room(&self, now: u64) -> u64 {
        let cost = self.cost.load(Ordering::Relaxed);
        if cost == 0 {
            return u64::MAX;
        }
        let ahead = self.paid.load(Ordering::Relaxed).saturating_sub(now);
        match BURST_NS.checked_sub(ahead) {
            Some(left) if left > 0 => left * 1000 / cost + 1,
            _ => 0,
        }
    }

    /// From when on there is room.
    fn opens(&self) -> u64 {
        match self.cost.load(Ordering::Relaxed) {
            0 => 0,
            _ => (self.paid.load(Ordering::Relaxed) + 1).saturating_sub(BURST_NS),
        }
    }
}

impl Limit {
    /// Sets both; from the next turn on.
    pub fn set(&self, requests: u64, bytes: u64) {
        self.requests.set(requests);
        self.bytes.set(bytes);
    }

    /// How many requests may be taken at this time, if they are as the last one was.
    fn room(&self, now: u64) -> usize {
        let bytes = self.bytes.room(now).div_ceil(self.last.load(Ordering::Relaxed).max(512));
        usize::try_from(self.requests.room(now).min(bytes)).unwrap_or(usize::MAX)
    }

    fn charge(&self, r: &Request<'_>, now: u64) {
        let moved = match r.op {
            // What was answered already is made durable, which nobody should wait for.
            Op::Flush => return,
            Op::Read | Op::Write => r.len,
            Op::WriteZeroes | Op::Discard => 0,
        };
        self.requests.charge(1, now);
        self.bytes.charge(moved, now);
        self.last.store(moved, Ordering::Relaxed);
    }

    /// From when on requests are taken, in nanoseconds.
    pub fn opens(&self) -> u64 {
        self.requests.opens().max(self.bytes.opens())
    }
}

/// A disk that takes only so much.
pub(crate) struct Limited<'l, D> {
    pub(crate) disk: D,
    pub(crate) limit: &'l Limit,
    pub(crate) now: u64,
}

impl<D: Submit> Submit for Limited<'_, D> {
    fn info(&self, unit: u16) -> Option<&DeviceInfo> {
        self.disk.info(unit)
    }

    fn room(&self) -> usize {
        self.disk.room().min(self.limit.room(self.now))
    }

    fn submit(&mut self, request: &Request<'_>) -> Result<(), Full> {
        self.disk.submit(request)?;
        self.limit.charge(request, self.now);
        Ok(())
    }

    fn prefetch(&self, sectors: impl Iterator<Item = u64>) {
        self.disk.prefetch(sectors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Takes all that is allowed, looking every so often; how many in a second after a pause.
    fn taken(limit: &Limit, len: u64, step: u64) -> u64 {
        let request = |len| Request {
            tag: crate::Tag::new(0, 0, 0),
            op: Op::Read,
            flags: crate::Flags::NONE,
            unit: 0,
            offset: 0,
            len,
            segs: &[],
        };
        let (begin, mut count) = (7 * SECOND, 0);
        for now in (begin..begin + SECOND).step_by(step as usize) {
            for _ in 0..limit.room(now).min(512) {
                limit.charge(&request(len), now);
                count += 1;
            }
            assert!(limit.room(now) > 0 || limit.opens() > now, "it opens later");
            assert!(limit.room(limit.opens().max(now)) > 0);
        }
        count
    }

    #[test]
    fn so_many_requests_or_bytes_in_a_second() {
        for (requests, bytes, len, wanted) in [
            (500, 0, 4096, 500),
            (100_000, 0, 4096, 100_000),
            (1, 0, 512, 1),
            (0, 10 << 20, 4096, 2560),
            (0, 1 << 20, 1 << 20, 1),
            (0, 1 << 30, 1 << 20, 1024),
            (1000, 10 << 20, 64 << 10, 160),
            (100, 1 << 40, 64 << 10, 100),
        ] {
            let limit = Limit::default();
            limit.set(requests, bytes);
            for step in [100_000, 3_000_000] {
                let count = taken(&limit, len, step);
                // And what comes at once after the pause: the burst, and one that is paid for later.
                let most = wanted + wanted / 100 + 64 + 2;
                assert!((wanted * 99 / 100..=most).contains(&count), "{count} of {wanted}");
                limit.set(requests, bytes);
            }
        }
        let free = Limit::default();
        assert!(free.room(0) > 1 << 40 && free.opens() == 0);
    }

    #[test]
    fn a_flush_is_free_and_numbers_do_not_overflow() {
        let limit = Limit::default();
        limit.set(1, 1);
        let flush = Request {
            tag: crate::Tag::new(0, 0, 0),
            op: Op::Flush,
            flags: crate::Flags::NONE,
            unit: 0,
            offset: 0,
            len: 0,
            segs: &[],
        };
        (0..100).for_each(|_| limit.charge(&flush, SECOND));
        assert_eq!(limit.room(SECOND), 1);
        limit.charge(&Request { op: Op::Write, len: u64::MAX, ..flush }, SECOND);
        assert_eq!(limit.room(u64::MAX - 1), 1, "however long it takes");
        limit.set(u64::MAX, u64::MAX);
        limit.charge(&Request { op: Op::Write, len: 512, ..flush }, SECOND);
        assert!(limit.room(SECOND) > 1000);
    }
}
