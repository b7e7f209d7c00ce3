//! [`Limiter`]: how much a running disk takes in a second.

use std::sync::Arc;

use block::Limit;

use crate::door::Entry;
use crate::{Disk, ReactorCore};

/// Sets the limits of a running disk, whatever else is done to it.
#[derive(Clone)]
pub struct Limiter {
    entries: Arc<[Entry]>,
    limit: Arc<Limit>,
}

impl Limiter {
    /// From now on the disk takes so many requests and bytes a second, of all its guests and clients
    /// together; 0: as many as come.
    pub fn set(&self, requests: u64, bytes: u64) {
        self.limit.set(requests, bytes);
        let limited = requests > 0 || bytes > 0;
        for entry in &*self.entries {
            let (image, limit) = (entry.image, limited.then(|| self.limit.clone()));
            entry.mailbox.post(move |core: &mut ReactorCore| core.limit(image, limit));
        }
    }
}

impl Disk {
    /// What sets its limits; it has none at first.
    pub fn limiter(&self) -> Limiter {
        Limiter { entries: self.entries(), limit: Arc::default() }
    }
}
