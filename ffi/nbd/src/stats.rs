//! [`Counters`]: what connections did. Written by one service thread each, read by anybody.

use std::sync::atomic::{AtomicU64, Ordering};

use reactor::{Distribution, Histogram};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts of one connection, or the sums over all.
        #[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// The words behind [`Counters`], with one writer.
        #[derive(Default, Debug)]
        #[repr(align(128))]
        pub(crate) struct Cells {
            $(pub(crate) $name: Cell,)*
        }

        impl Cells {
            /// The values now.
            pub(crate) fn read(&self) -> Counters {
                Counters { $($name: self.$name.0.load(Ordering::Relaxed),)* }
            }
        }

        impl std::ops::AddAssign for Counters {
            fn add_assign(&mut self, other: Counters) {
                $(self.$name = self.$name.wrapping_add(other.$name);)*
            }
        }
    };
}

counters! {
    /// Requests of all kinds that were found right.
    begun,
    /// Those of them whose reply was sent.
    ended,
    /// Read requests.
    reads,
    /// Write requests.
    writes,
    /// Flush requests.
    flushes,
    /// Trim requests.
    trims,
    /// Write-zeroes requests.
    zeroes,
    /// Block-status requests.
    statuses,
    /// Bytes that clients asked to read.
    read_bytes,
    /// Bytes of data that clients sent to be written.
    written_bytes,
    /// Requests answered with an error.
    errors,
    /// Times that a service thread took bytes from its socket.
    receives,
    /// Times that a service thread put bytes into its socket.
    sends,
    /// Times that a service thread went to sleep.
    sleeps,
}

/// A counter with one writer: not a read-modify-write of the processor.
#[derive(Default, Debug)]
pub(crate) struct Cell(AtomicU64);

impl Cell {
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
}

/// How long requests took, from being read off the socket to the end of their reply.
#[derive(Clone, Default, Debug)]
pub struct Latencies {
    /// Read requests.
    pub read: Distribution,
    /// Write requests.
    pub write: Distribution,
}

/// The same as it is counted, by one writer.
#[derive(Default, Debug)]
pub(crate) struct Clocked {
    pub(crate) read: Histogram,
    pub(crate) write: Histogram,
}

impl Latencies {
    /// Adds those of a connection.
    pub(crate) fn add(&mut self, of: &Clocked) {
        self.read += &of.read.read();
        self.write += &of.write.read();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums() {
        let cells = Cells::default();
        cells.reads.add(2);
        cells.read_bytes.add(4096);
        let mut total = cells.read();
        total += cells.read();
        assert_eq!(total, Counters { reads: 4, read_bytes: 8192, ..Counters::default() });
    }
}
