//! [`Buffers`]: the DMA memory of one seat, lent to the pieces of its connection's requests.
//!
//! Two sizes, so that small requests are many and large ones few. Reads and writes have a share
//! that the other kind cannot take: a client that sends data before it reads its replies is still
//! served. Owned by the service thread of the connection.

use std::sync::Arc;

use dma::{Buf, Pool, Region, Seg};

/// Size of a small buffer in bytes; two of the largest block fit.
pub(crate) const SMALL: u32 = 16 << 10;
/// Size of a large buffer in bytes.
pub(crate) const LARGE: u32 = 256 << 10;

/// Which size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    Small,
    Large,
}

/// What for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Use {
    Read,
    Write,
}

/// Buffers of each size that are kept for reads, and as many for writes.
const SHARE: usize = 2;

/// A buffer that is lent.
#[derive(Debug)]
pub(crate) struct Lent {
    buf: Buf,
    class: Class,
    what: Use,
}

impl Lent {
    /// The whole buffer.
    pub(crate) fn seg(&self) -> Seg {
        self.buf.seg()
    }

    /// The size that it is of.
    pub(crate) fn class(&self) -> Class {
        self.class
    }
}

/// The DMA memory of a seat.
#[derive(Debug)]
pub(crate) struct Buffers {
    pools: [Pool; 2],
    counts: [usize; 2],
    lent: [[usize; 2]; 2],
    scratch: Buf,
    zeroes: Buf,
}

impl Buffers {
    /// Memory for a seat: 10 MiB for one of the first seats, 2.5 MiB for the many others.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub(crate) fn new(roomy: bool) -> Result<Buffers, dma::Error> {
        // With the two that are taken out at once, the sizes make whole huge pages.
        let [small, large] = if roomy { [128, 32] } else { [32, 8] };
        let mut pools = [Pool::new(small, SMALL)?, Pool::new(large, LARGE)?];
        let scratch = pools[0].take().expect("a new pool is full");
        let zeroes = pools[1].take().expect("a new pool is full");
        pools[1].region().zero(zeroes.seg().offset() as usize, LARGE as usize);
        let counts = [small as usize - 1, large as usize - 1];
        Ok(Buffers { pools, counts, lent: [[0; 2]; 2], scratch, zeroes })
    }

    /// All memory of the seat.
    pub(crate) fn regions(&self) -> Vec<Arc<Region>> {
        self.pools.iter().map(|p| p.region().clone()).collect()
    }

    /// The region that buffers of a size lie in.
    pub(crate) fn region(&self, class: Class) -> &Arc<Region> {
        self.pools[class as usize].region()
    }

    /// A small buffer beside the pool, for the one read-modify-write of the connection.
    pub(crate) fn scratch(&self) -> Seg {
        self.scratch.seg()
    }

    /// A large buffer that holds zeroes; never written.
    pub(crate) fn zeroes(&self) -> Seg {
        self.zeroes.seg()
    }

    /// How many buffers of a size reads may have at a time.
    pub(crate) fn read_limit(&self, class: Class) -> usize {
        self.counts[class as usize] - SHARE
    }

    /// Lends a buffer, or `None` if there is none for this use now.
    pub(crate) fn take(&mut self, class: Class, what: Use) -> Option<Lent> {
        let lent = &mut self.lent[class as usize][what as usize];
        if *lent >= self.counts[class as usize] - SHARE {
            return None;
        }
        let buf = self.pools[class as usize].take()?;
        *lent += 1;
        Some(Lent { buf, class, what })
    }

    /// Takes a buffer back: nobody else may write to it any more.
    pub(crate) fn give(&mut self, lent: Lent) {
        self.lent[lent.class as usize][lent.what as usize] -= 1;
        self.pools[lent.class as usize].give(lent.buf);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_use_keeps_its_share() {
        let mut b = Buffers::new(false).unwrap();
        let reads: Vec<Lent> = std::iter::from_fn(|| b.take(Class::Large, Use::Read)).collect();
        assert_eq!((reads.len(), b.read_limit(Class::Large)), (5, 5));
        let writes: Vec<Lent> = std::iter::from_fn(|| b.take(Class::Large, Use::Write)).collect();
        assert_eq!(writes.len(), 2);
        assert!(b.take(Class::Small, Use::Read).is_some_and(|l| l.seg().len() == SMALL));
        for lent in reads {
            b.give(lent);
        }
        let more: Vec<Lent> = std::iter::from_fn(|| b.take(Class::Large, Use::Write)).collect();
        assert_eq!(more.len(), 3);
    }
}
