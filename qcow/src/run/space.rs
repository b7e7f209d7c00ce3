//! [`Space`]: how much of its device an image uses, told to those who can make the device larger.
//!
//! An image that may grow ([`Image::may_grow`]) has a request that finds no space wait for some, before
//! it writes anything of what it needs it for. Control code sees that, and how far the image has come,
//! without asking the reactor, which may sleep meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::image::Image;
use super::shared::{Key, Shared};

/// What an image uses of the device that the layer lies on to which it writes. Written by its home
/// reactor where that hands out clusters, read by anybody.
#[derive(Debug, Default)]
pub struct Space {
    used: AtomicU64,
    waiting: AtomicU32,
}

impl Space {
    /// First byte behind everything that was ever in use; before it some may be free again.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Requests that wait for more.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::Relaxed)
    }

    pub(super) fn set_used(&self, bytes: u64) {
        self.used.store(bytes, Ordering::Relaxed);
    }
}

impl Image {
    /// How much of its device the image uses, from now on.
    pub fn space(&self) -> Arc<Space> {
        self.shared.space.clone()
    }

    /// The device of the layer that is written to has so many bytes now, more than before: what found
    /// no space on it finds some.
    pub fn has_more_space(&mut self, capacity: u64) {
        self.shared.alloc.borrow_mut().has_more_space(capacity);
        self.shared.unpark(Key::Space);
    }

    /// Whether somebody makes the device larger when it becomes full: then requests that find no space
    /// wait until [`Image::has_more_space`]. Else, and from the close on, they fail with
    /// [`block::Status::NoSpace`], as do those that wait when this is taken back.
    pub fn may_grow(&mut self, yes: bool) {
        self.shared.grows.set(yes && !self.closing && !self.lost);
        self.shared.unpark(Key::Space);
    }
}

impl Shared {
    /// Waits for space, if some may come. Returns whether it is to be looked for again. For a task as
    /// in [`Shared::at_rest`].
    pub(super) async fn wait_for_space(&self, slot: u16) -> bool {
        if !self.grows.get() {
            return false;
        }
        let waiting = &self.space.waiting;
        waiting.fetch_add(1, Ordering::Relaxed);
        self.at_rest(slot, self.park(slot, Key::Space)).await;
        waiting.fetch_sub(1, Ordering::Relaxed);
        true
    }
}
