//! [`Pool`]: equal buffers cut from one region, lent and taken back by one thread.
//!
//! Belongs to a reactor (or to a frontend on it). Taking and giving back are a push and a pop of an
//! index; the last buffer given back is lent next, since it is the warmest in the cache.

use std::sync::Arc;

use crate::{Error, Region, Seg};

/// A buffer of a [`Pool`], owned by whoever holds it. Does not go back by itself: a buffer may
/// only be given back when no device writes to it any more, which its owner alone knows.
#[derive(Debug)]
#[must_use = "give the buffer back to its pool"]
pub struct Buf {
    seg: Seg,
    index: u32,
}

impl Buf {
    /// The whole buffer as a segment.
    #[inline]
    pub fn seg(&self) -> Seg {
        self.seg
    }

    /// The first `len` bytes as a segment, or `None` if the buffer is shorter.
    #[inline]
    pub fn head(&self, len: u32) -> Option<Seg> {
        self.seg.slice(0, len)
    }
}

fn bytes(count: u32, size: u32) -> Result<usize, Error> {
    assert!(size.is_multiple_of(512) && size > 0, "a pool buffer is whole sectors");
    let bytes = (size as usize).checked_mul(count.max(1) as usize);
    bytes.ok_or(Error::Length(usize::MAX))
}

/// Equal buffers cut from a region of their own.
#[derive(Debug)]
pub struct Pool {
    region: Arc<Region>,
    size: u32,
    free: Vec<u32>,
    count: u32,
}

impl Pool {
    /// A pool of `count` buffers of `size` bytes, a multiple of 512, in fresh memory.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(count: u32, size: u32) -> Result<Pool, Error> {
        Ok(Pool::on(Region::new_best(bytes(count, size)?)?, count, size))
    }

    /// The same in memory that is taken as buffers are first used: see [`Region::new_lazy`].
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn new_lazy(count: u32, size: u32) -> Result<Pool, Error> {
        Ok(Pool::on(Region::new_lazy(bytes(count, size)?)?, count, size))
    }

    fn on(region: Arc<Region>, count: u32, size: u32) -> Pool {
        Pool { region, size, free: (0..count).rev().collect(), count }
    }

    /// The memory that the buffers are cut from, to be registered with the queues they go to.
    #[inline]
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Size of each buffer in bytes.
    #[inline]
    pub fn size(&self) -> u32 {
        self.size
    }

    /// How many buffers can be lent now.
    #[inline]
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// Lends a buffer, or `None` if all are out. Its old contents are whatever was there.
    #[inline]
    pub fn take(&mut self) -> Option<Buf> {
        let index = self.free.pop()?;
        let offset = u64::from(index) * u64::from(self.size);
        Some(Buf { seg: Seg { region: self.region.id(), len: self.size, offset }, index })
    }

    /// Takes a buffer back. Panics if it is of another pool.
    #[inline]
    pub fn give(&mut self, buf: Buf) {
        assert!(buf.seg.region == self.region.id(), "buffer of another pool");
        debug_assert!(self.free.len() < self.count as usize);
        // Never grows: at most `count` buffers exist.
        self.free.push(buf.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lends_each_buffer_once_and_the_last_returned_first() {
        let mut pool = Pool::new(3, 4096).unwrap();
        let bufs: Vec<Buf> = std::iter::from_fn(|| pool.take()).collect();
        let mut offsets: Vec<u64> = bufs.iter().map(|b| b.seg().offset()).collect();
        offsets.sort_unstable();
        assert_eq!(offsets, [0, 4096, 8192]);
        assert_eq!(pool.available(), 0);
        let mut last = 0;
        for b in bufs {
            last = b.seg().offset();
            pool.give(b);
        }
        assert_eq!(pool.take().unwrap().seg().offset(), last);
    }

    #[test]
    #[should_panic(expected = "another pool")]
    fn a_foreign_buffer_is_refused() {
        let mut a = Pool::new(1, 4096).unwrap();
        let mut b = Pool::new(1, 4096).unwrap();
        let buf = a.take().unwrap();
        b.give(buf);
    }
}
