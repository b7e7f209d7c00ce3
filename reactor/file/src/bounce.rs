//! [`Bounces`]: buffers for requests whose memory direct I/O cannot take. Belongs to a
//! [`crate::FileQueue`], which makes them when the first request needs one.

use dma::{Buf, Pool};

use crate::memory::Vecs;
use crate::unit::MAX_TRANSFER;

/// How many requests may be bounced at a time. Bouncing is for the rare frontend or device whose
/// alignments do not match, so a few buffers are enough to keep the device busy.
const BOUNCES: u32 = 8;

/// Bounce buffers, and for each the list of the memory that it stands for.
#[derive(Debug)]
pub(crate) struct Bounces {
    pub(crate) pool: Pool,
    real: [Vecs; BOUNCES as usize],
}

impl Bounces {
    /// Of the length of the longest request each.
    pub(crate) fn new() -> Result<Bounces, dma::Error> {
        let pool = Pool::new(BOUNCES, MAX_TRANSFER)?;
        Ok(Bounces { pool, real: [Vecs::EMPTY; BOUNCES as usize] })
    }

    /// Notes what memory a buffer stands for.
    pub(crate) fn stand_for(&mut self, buf: &Buf, real: &Vecs) {
        self.real[number(buf)] = *real;
    }

    /// What memory a buffer stands for.
    pub(crate) fn of(&self, buf: &Buf) -> &Vecs {
        &self.real[number(buf)]
    }
}

/// Which of the pool's buffers it is.
fn number(buf: &Buf) -> usize {
    (buf.seg().offset() / u64::from(MAX_TRANSFER)) as usize
}
