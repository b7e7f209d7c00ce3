//! [`Seats`]: the bounded number of places for connections, with the DMA memory of each.
//!
//! The memory of a seat stays for the next connection on it: devices that know a region keep it
//! for as long as they are open, so fresh memory per client would never be given back. Control
//! path; called by the accepting thread, by service threads at their begin and end, by anybody
//! who reads counters.

use std::sync::Arc;

use reactor::sync::Mutex;

use crate::buffers::Buffers;
use crate::claims::Signal;
use crate::stats::{Cells, Clocked, Counters, Latencies};

/// How many connections there can be.
pub(crate) const SEATS: usize = 64;
/// How many of the seats have much memory: more clients than this are unusual.
const ROOMY: usize = 8;

/// A connection as others see it.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// Counted from 1 in the order of arrival.
    pub(crate) number: u64,
    pub(crate) cells: Arc<Cells>,
    pub(crate) latency: Arc<Clocked>,
    pub(crate) signal: Arc<Signal>,
}

#[derive(Debug, Default)]
struct Place {
    memory: Option<Buffers>,
    guest: Option<Guest>,
}

/// All seats of a server.
#[derive(Debug)]
pub(crate) struct Seats(Mutex<State>);

#[derive(Debug)]
struct State {
    places: Vec<Place>,
    guests: u64,
    /// What connections did that are gone.
    past: Counters,
    past_latencies: Latencies,
}

impl Seats {
    /// All free.
    pub(crate) fn new() -> Seats {
        let places = (0..SEATS).map(|_| Place::default()).collect();
        let (past, past_latencies) = (Counters::default(), Latencies::default());
        Seats(Mutex::new(State { places, guests: 0, past, past_latencies }))
    }

    /// Takes the first free seat; `None` if there is none or no descriptor for its wake-up.
    pub(crate) fn take(&self) -> Option<(usize, Guest)> {
        let mut s = self.0.lock();
        let seat = s.places.iter().position(|p| p.guest.is_none())?;
        let signal = Arc::new(Signal::new().ok()?);
        s.guests += 1;
        let (cells, latency) = (Arc::default(), Arc::default());
        let guest = Guest { number: s.guests, cells, latency, signal };
        s.places[seat].guest = Some(guest.clone());
        Some((seat, guest))
    }

    /// The memory of a seat that the caller has taken.
    ///
    /// # Errors
    /// If there is none yet and it cannot be had.
    pub(crate) fn memory(&self, seat: usize) -> Result<Buffers, dma::Error> {
        let kept = self.0.lock().places[seat].memory.take();
        kept.map_or_else(|| Buffers::new(seat < ROOMY), Ok)
    }

    /// Gives a seat back, with its memory if that was taken out.
    pub(crate) fn leave(&self, seat: usize, memory: Option<Buffers>) {
        let mut s = self.0.lock();
        let place = &mut s.places[seat];
        place.memory = memory.or(place.memory.take());
        if let Some(guest) = place.guest.take() {
            s.past += guest.cells.read();
            s.past_latencies.add(&guest.latency);
        }
    }

    /// The connections that are there.
    pub(crate) fn guests(&self) -> Vec<Guest> {
        self.0.lock().places.iter().filter_map(|p| p.guest.clone()).collect()
    }

    /// How long requests of all of them took.
    pub(crate) fn latencies(&self) -> Latencies {
        let s = self.0.lock();
        let mut all = s.past_latencies.clone();
        s.places.iter().filter_map(|p| p.guest.as_ref()).for_each(|g| all.add(&g.latency));
        all
    }

    /// How many connections came, and what all of them did, at one instant of the list.
    pub(crate) fn totals(&self) -> (u64, Counters) {
        let s = self.0.lock();
        let mut total = s.past;
        for guest in s.places.iter().filter_map(|p| p.guest.as_ref()) {
            total += guest.cells.read();
        }
        (s.guests, total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_bounded_and_keep_their_memory() {
        let seats = Seats::new();
        let taken: Vec<_> = std::iter::from_fn(|| seats.take()).collect();
        assert_eq!(taken.len(), SEATS);
        assert_eq!((taken[5].0, taken[5].1.number), (5, 6));
        let memory = seats.memory(20).unwrap();
        let region = memory.regions()[0].id();
        taken[20].1.cells.reads.add(3);
        seats.leave(20, Some(memory));
        let (seat, guest) = seats.take().unwrap();
        assert_eq!((seat, guest.number), (20, 65));
        guest.cells.reads.add(1);
        guest.latency.read.record(7000);
        seats.leave(seat, None);
        assert_eq!(seats.latencies().read.sum(), 7000);
        let (_, guest) = seats.take().unwrap();
        guest.latency.write.record(5);
        assert_eq!((seats.latencies().read.count(), seats.latencies().write.sum()), (1, 5));
        assert_eq!(seats.totals().1.reads, 4);
        assert_eq!(seats.memory(20).unwrap().regions()[0].id(), region);
        assert_eq!(seats.guests().len(), SEATS);
    }
}
