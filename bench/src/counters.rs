//! System calls, allocations and locks of the calling thread.

use serde::Serialize;

use crate::{alloc, trap};

/// What a thread has done so far. Only differences mean something.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Counters {
    /// System calls; `None` where they cannot be trapped, or not any more (see `trap`).
    pub syscalls: Option<u64>,
    /// Allocations.
    pub allocations: u64,
    /// Locks of [`reactor::sync::Mutex`], the only one that the lints permit.
    pub locks: u64,
}

impl Counters {
    /// Begins to count the calling thread.
    pub fn start() -> Counters {
        let trapped = trap::start();
        Counters {
            syscalls: if trapped { trap::count() } else { None },
            ..Counters::start_untrapped()
        }
    }

    /// The same without system calls, for a process that runs under a tool which makes them.
    pub fn start_untrapped() -> Counters {
        Counters {
            syscalls: None,
            allocations: alloc::allocations(),
            locks: reactor::sync::locks_taken(),
        }
    }

    /// What the calling thread has done since `start`; stops counting.
    pub fn finish(start: Counters) -> Counters {
        let done = Counters {
            syscalls: start.syscalls.and_then(|n| Some(trap::count()? - n)),
            allocations: alloc::allocations() - start.allocations,
            locks: reactor::sync::locks_taken() - start.locks,
        };
        if start.syscalls.is_some() {
            trap::stop();
        }
        done
    }
}
