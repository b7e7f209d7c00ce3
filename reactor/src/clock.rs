//! [`Clock`]: nanoseconds since the reactor began, from the TSC, or from a test's hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A source of time. Read once in each turn and passed down.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The processor's time stamp counter (invariant on every x86-64 server processor).
    Tsc {
        /// The counter at time 0, a little before anybody asks.
        zero: u64,
        /// Nanoseconds per tick, as a fraction of 2^32.
        scale: u64,
    },
    /// Where there is no usable counter: the kernel's monotonic clock.
    Monotonic(Instant),
    /// A time that somebody sets: tests and simulation.
    Virtual(Arc<AtomicU64>),
}

impl Clock {
    /// The real clock; the first one takes 10 ms, in which the counter's rate is measured.
    pub fn real() -> Clock {
        #[cfg(target_arch = "x86_64")]
        {
            static RATE: std::sync::OnceLock<Option<Rate>> = std::sync::OnceLock::new();
            if let Some(Rate { scale, ticks }) = *RATE.get_or_init(rate) {
                // Of a while ago: no processor whose counter is a little behind can see a time before 0.
                return Clock::Tsc { zero: tsc().wrapping_sub(ticks), scale };
            }
        }
        Clock::Monotonic(instant())
    }

    /// A clock that stands still at 0 until somebody stores another time in the returned word.
    pub fn virtual_clock() -> (Clock, Arc<AtomicU64>) {
        let word = Arc::new(AtomicU64::new(0));
        (Clock::Virtual(word.clone()), word)
    }

    /// Nanoseconds since some moment shortly before the clock was made.
    #[inline]
    pub fn now(&self) -> u64 {
        match self {
            Clock::Tsc { zero, scale } => {
                let ticks = u128::from(tsc().wrapping_sub(*zero));
                ((ticks * u128::from(*scale)) >> 32) as u64
            }
            Clock::Monotonic(zero) => zero.elapsed().as_nanos() as u64,
            Clock::Virtual(word) => word.load(Ordering::Relaxed),
        }
    }

    /// Ticks of the time stamp counter per nanosecond; `None` if time comes from elsewhere.
    pub fn ticks_per_ns(&self) -> Option<f64> {
        match self {
            Clock::Tsc { scale, .. } => Some((1u64 << 32) as f64 / *scale as f64),
            Clock::Monotonic(_) | Clock::Virtual(_) => None,
        }
    }
}

/// How fast the time stamp counter runs, as it was measured.
#[cfg(target_arch = "x86_64")]
struct Rate {
    /// See [`Clock::Tsc`].
    scale: u64,
    /// Of the measurement.
    ticks: u64,
}

/// `None` if the counter cannot be used.
#[cfg(target_arch = "x86_64")]
fn rate() -> Option<Rate> {
    // The kernel uses the TSC as its clock source only where it found it stable.
    let source = "/sys/devices/system/clocksource/clocksource0/available_clocksource";
    if !std::fs::read_to_string(source).ok()?.split_whitespace().any(|s| s == "tsc") {
        return None;
    }
    let (c0, t0) = least_disturbed((0..TRIES).map(|_| (tsc(), instant(), tsc())))?;
    std::thread::sleep(std::time::Duration::from_millis(10));
    let (c1, t1) = least_disturbed((0..TRIES).map(|_| (tsc(), instant(), tsc())))?;
    let (nanos, ticks) = ((t1 - t0).as_nanos(), c1.wrapping_sub(c0));
    let scale = u64::try_from((nanos << 32).checked_div(u128::from(ticks))?).ok()?;
    Some(Rate { scale, ticks })
}

/// How often counter and clock are read together.
#[cfg(target_arch = "x86_64")]
const TRIES: usize = 16;

/// Counter and time of one moment, out of (counter before, time, counter after): the reading that
/// took the least. A thread that was not running between the two would set the clock's rate wrong
/// for good.
#[cfg(target_arch = "x86_64")]
fn least_disturbed<T>(readings: impl Iterator<Item = (u64, T, u64)>) -> Option<(u64, T)> {
    let best = readings.min_by_key(|(before, _, after)| after.wrapping_sub(*before))?;
    Some((best.0, best.1))
}

#[expect(clippy::disallowed_methods, reason = "this is the clock that others use instead")]
fn instant() -> Instant {
    Instant::now()
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn tsc() -> u64 {
    // SAFETY: the instruction is part of every x86-64 processor and has no precondition.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn tsc() -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_time_runs_at_the_right_rate() {
        let clock = Clock::real();
        let (a, t) = (clock.now(), instant());
        std::thread::sleep(std::time::Duration::from_millis(40));
        let (ours, kernels) = (clock.now() - a, t.elapsed().as_nanos() as u64);
        assert!(ours.abs_diff(kernels) < kernels / 10, "{ours} against {kernels}");
    }

    #[test]
    fn each_clock_begins_when_it_is_made() {
        let first = Clock::real();
        std::thread::sleep(std::time::Duration::from_millis(60));
        let (old, new) = (first.now(), Clock::real().now());
        assert!(old >= new + 40_000_000 && new < 20_000_000_000, "{old}, {new}");
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_reading_that_was_interrupted_is_not_used() {
        let readings = [(10, 'a', 5000), (6000, 'b', 6030), (7000, 'c', 7031), (8000, 'd', 99_999)];
        assert_eq!(least_disturbed(readings.into_iter()), Some((6000, 'b')));
    }

    #[test]
    fn virtual_time_is_set() {
        let (clock, word) = Clock::virtual_clock();
        assert_eq!(clock.now(), 0);
        word.store(77, Ordering::Relaxed);
        assert_eq!(clock.now(), 77);
    }
}
