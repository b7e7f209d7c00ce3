//! Completions and the fixed array in which a queue hands them out.

use crate::{Status, Tag};

/// A request's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// The tag of the request.
    pub tag: Tag,
    /// How it ended.
    pub status: Status,
    /// What the device itself said, for logs: an NVMe status field (15 bits) or an errno; 0 if
    /// nothing. And [`QUARANTINED`].
    pub detail: u16,
}

/// Set in [`Completion::detail`] when the device could not be stopped: it may still read or write
/// the request's buffers, which must therefore never be used for anything else. Whoever answers
/// from several devices refuses everything from then on, so that nothing is read into such a buffer
/// again. The memory itself stays mapped until the process ends.
pub const QUARANTINED: u16 = 1 << 15;

impl Completion {
    /// Whether the device may still use the request's buffers: see [`QUARANTINED`].
    #[inline]
    pub fn is_quarantined(&self) -> bool {
        self.detail & QUARANTINED != 0
    }
}

/// A fixed array that [`crate::BlockQueue::poll`] fills. Made once per reactor.
#[derive(Debug)]
pub struct Completions {
    items: Box<[Completion; Completions::CAPACITY]>,
    len: usize,
    /// Some that failed were added since it was empty.
    failed: bool,
}

impl Completions {
    /// How many completions one poll hands out at most.
    pub const CAPACITY: usize = 128;

    /// An empty array.
    pub fn new() -> Completions {
        let none = Completion { tag: Tag::new(0, 0, 0), status: Status::Ok, detail: 0 };
        Completions { items: Box::new([none; Completions::CAPACITY]), len: 0, failed: false }
    }

    /// How many more fit.
    #[inline]
    pub fn room(&self) -> usize {
        Completions::CAPACITY - self.len
    }

    /// How many are there.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none is there.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds one. Panics if there is no room: whoever fills asks [`Completions::room`] first.
    #[inline(always)]
    pub fn push(&mut self, c: Completion) {
        self.failed |= !c.status.is_ok();
        self.items[self.len] = c;
        self.len += 1;
    }

    /// Adds one that succeeded.
    #[inline]
    pub fn ok(&mut self, tag: Tag) {
        self.push(Completion { tag, status: Status::Ok, detail: 0 });
    }

    /// Adds one that succeeded for each tag that `next` gives, until it gives none or no more fit.
    /// Returns how many.
    #[inline(always)]
    pub fn fill_ok(&mut self, mut next: impl FnMut() -> Option<Tag>) -> usize {
        // No counter but the places that are left.
        let mut places = self.items[self.len..].iter_mut();
        let mut count = places.len();
        while let Some(place) = places.next() {
            let Some(tag) = next() else {
                count -= places.len() + 1;
                break;
            };
            *place = Completion { tag, status: Status::Ok, detail: 0 };
        }
        self.len += count;
        count
    }

    /// The `index`th one.
    #[inline]
    pub fn get(&self, index: usize) -> Completion {
        self.items[..self.len][index]
    }

    /// All of them.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = Completion> + '_ {
        self.items[..self.len].iter().copied()
    }

    /// Keeps, of those from the `from`th on, the ones that `keep` says, in their order.
    pub fn retain_from(&mut self, from: usize, mut keep: impl FnMut(&Completion) -> bool) {
        let mut kept = from;
        for i in from..self.len {
            let c = self.items[i];
            if keep(&c) {
                self.items[kept] = c;
                kept += 1;
            }
        }
        self.len = kept.min(self.len);
    }

    /// Those from the `from`th on.
    #[inline]
    pub fn iter_from(&self, from: usize) -> impl Iterator<Item = &Completion> + '_ {
        self.items[..self.len].iter().skip(from)
    }

    /// Whether one of them failed. May say so of one that was taken out again.
    #[inline]
    pub fn any_failed(&self) -> bool {
        self.failed
    }

    /// All of them.
    #[inline]
    pub fn as_slice(&self) -> &[Completion] {
        &self.items[..self.len]
    }

    /// Empties the array.
    #[inline]
    pub fn clear(&mut self) {
        self.len = 0;
        self.failed = false;
    }
}

impl Default for Completions {
    fn default() -> Completions {
        Completions::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_and_empties() {
        let mut c = Completions::new();
        for i in 0..Completions::CAPACITY {
            c.ok(Tag::new(1, i as u16, 0));
        }
        assert_eq!((c.room(), c.len()), (0, Completions::CAPACITY));
        assert_eq!(c.get(5).tag.slot(), 5);
        assert_eq!(c.fill_ok(|| panic!("there is no room")), 0);
        c.clear();
        assert!(c.is_empty());
        let mut tags = (1..4).map(|slot| Tag::new(1, slot, 0));
        c.ok(Tag::new(0, 0, 0));
        assert_eq!((c.fill_ok(|| tags.next()), c.len(), c.get(1).tag.slot()), (3, 4, 1));
        assert!(!c.any_failed());
        c.push(Completion { tag: Tag::new(1, 9, 0), status: Status::Medium, detail: 0 });
        c.ok(Tag::new(1, 9, 0));
        assert_eq!((c.any_failed(), c.as_slice().len()), (true, 6));
        c.clear();
        assert!(!c.any_failed() && c.as_slice().is_empty());
    }
}
