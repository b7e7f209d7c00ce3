//! Counters of what the device did, readable from any thread while it runs.
//!
//! The stepping thread is the only writer, so a count is a plain load and store, no
//! read-modify-write.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter with a single writer.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($( $(#[$meta:meta])* $name:ident, )*) => {
        /// Counters since the model was made; resets do not clear them. Shared, see
        /// [`Stats::snapshot`].
        #[derive(Debug, Default)]
        pub struct Stats {
            $( pub(crate) $name: Counter, )*
        }

        /// The counters at one moment. Each is exact; they are not read at the same instant.
        #[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
        pub struct StatsSnapshot {
            $( $(#[$meta])* pub $name: u64, )*
        }

        impl Stats {
            /// Reads all counters.
            pub fn snapshot(&self) -> StatsSnapshot {
                StatsSnapshot { $( $name: self.$name.get(), )* }
            }
        }

        impl StatsSnapshot {
            /// What was counted since `earlier`.
            #[must_use]
            pub fn since(&self, earlier: &StatsSnapshot) -> StatsSnapshot {
                StatsSnapshot { $( $name: self.$name.wrapping_sub(earlier.$name), )* }
            }
        }
    };
}

counters! {
    /// Read commands that succeeded.
    reads,
    /// Bytes of those.
    read_bytes,
    /// Write commands that succeeded.
    writes,
    /// Bytes of those.
    write_bytes,
    /// Writes and Write Zeroes among them that carried FUA.
    fua_writes,
    /// Write Zeroes commands that succeeded.
    write_zeroes,
    /// Bytes of those.
    zeroed_bytes,
    /// Ranges deallocated by Dataset Management.
    deallocations,
    /// Bytes of those.
    deallocated_bytes,
    /// Flush commands that succeeded.
    flushes,
    /// Admin commands taken.
    admin,
    /// Completion queue entries posted.
    completions,
    /// Changes of a submission queue tail that a step saw; writes between two steps count once.
    sq_doorbells,
    /// Changes of a completion queue head that a step saw.
    cq_doorbells,
    /// Doorbell writes to queues that do not exist or with a value that cannot be.
    bad_doorbells,
    /// Commands that completed with an error status, injected ones among them.
    errors,
    /// Accesses to bus addresses that nothing was mapped at.
    dma_faults,
    /// Faults of the fault list that took effect.
    injected,
    /// Controller resets (CC.EN from 1 to 0) carried out.
    resets,
}

impl StatsSnapshot {
    /// Commands that changed the medium: writes and Write Zeroes. Flushes and deallocations are
    /// apart.
    pub fn device_writes(&self) -> u64 {
        self.writes + self.write_zeroes
    }
}
