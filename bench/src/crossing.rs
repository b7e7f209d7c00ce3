//! What it takes to copy a page that another processor has just written: of each request through a ring that
//! much is the host's memory, whatever the server does.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dma::{PageSize, Region};
use reactor::Clock;

use crate::Error;
use crate::stamp::BLOCK;

/// Pages that change hands at a time, as the requests of a ring do.
const PAGES: usize = 32;

/// How often they do; the median counts.
const ROUNDS: usize = 400;

/// Nanoseconds for each page.
#[derive(Clone, Copy, Debug)]
pub struct Crossing {
    /// The processor had both pages itself.
    pub own: f64,
    /// The other one has written the page that is copied, and read the one it is copied to.
    pub from_other: f64,
}

/// Has processor `to` copy pages that processor `from` works on.
///
/// # Errors
/// If a processor or memory is not to be had.
pub fn crossing(from: usize, to: usize) -> Result<Crossing, Error> {
    let pages = || Region::new(PAGES * BLOCK, PageSize::Small).map_err(Error::other);
    let (source, target) = (pages()?, pages()?);
    // Even: the copier's turn.
    let turn = Arc::new(AtomicUsize::new(1));
    let (s, t, there) = (source.clone(), target.clone(), turn.clone());
    let other = std::thread::spawn(move || {
        let pinned = reactor::pin_current_thread(from);
        let mut page = [0; BLOCK];
        for round in 0..ROUNDS {
            while there.load(Ordering::Acquire) != 2 * round + 1 {
                std::thread::yield_now();
            }
            for at in (0..PAGES).map(|n| n * BLOCK) {
                t.read(at, &mut page);
                s.write(at, &page);
            }
            there.store(2 * round + 2, Ordering::Release);
        }
        pinned
    });
    let copier = std::thread::spawn(move || {
        let pinned = reactor::pin_current_thread(to);
        let clock = Clock::real();
        let copy = || {
            let began = clock.now();
            for at in (0..PAGES).map(|n| n * BLOCK) {
                dma::copy(&source, at, &target, at, BLOCK);
            }
            (clock.now() - began) as f64 / PAGES as f64
        };
        let (mut own, mut from_other) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            while turn.load(Ordering::Acquire) != 2 * round + 2 {
                std::thread::yield_now();
            }
            from_other.push(copy());
            own.push(copy());
            turn.store(2 * round + 3, Ordering::Release);
        }
        pinned.map(|()| Crossing { own: median(own), from_other: median(from_other) })
    });
    let ended = |_| Error::other("a thread ended");
    let copied = copier.join().map_err(ended)?;
    other.join().map_err(ended)?.map_err(Error::Other)?;
    copied.map_err(Error::Other)
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_take_time() {
        let all = crate::server::allowed().unwrap();
        let (from, to) = (all[0], all[all.len() - 1]);
        let found = crossing(from, to).unwrap();
        // No processor copies a page in less than a cycle a cache line.
        assert!(found.own > 10.0 && found.from_other > 10.0, "{found:?}");
        assert!(crossing(from, usize::MAX).is_err());
    }
}
