//! [`Trace`]: a hash over everything that happened in a run, which says whether two runs were the
//! same.

use std::cell::Cell;
use std::rc::Rc;

/// A running hash that all parts of a run add to. Clones are the same hash.
#[derive(Clone, Debug)]
pub struct Trace(Rc<Cell<u64>>);

impl Default for Trace {
    fn default() -> Trace {
        Trace(Rc::new(Cell::new(0xcbf2_9ce4_8422_2325)))
    }
}

impl Trace {
    /// Adds numbers, in their order.
    pub fn add(&self, words: &[u64]) {
        let mut h = self.0.get();
        for w in words {
            h = (h ^ w).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
        self.0.set(h);
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.0.get()
    }
}
