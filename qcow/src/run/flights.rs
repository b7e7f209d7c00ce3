//! [`Flights`]: the requests that went straight down. They keep their frontend's tag, so that nothing
//! is stored for each of them here; all that must be known is whether there are any, and how old the
//! oldest look-up among them can be ([`super::epochs`]).
//!
//! They are counted in two groups, told apart by [`Tag::MARK`]: those looked up since some epoch, and
//! the ones before. When all of the older group have ended and there is a newer epoch, what is in flight
//! becomes the older group. So an age is never thought younger than it is, and once a request has ended
//! it keeps no cluster for longer than those that were in flight with it.

use std::cell::Cell;

use block::Tag;

use super::epochs::QUIET;

const MARK: u64 = Tag::new(Tag::MARK, 0, 0).bits();

/// See the module's text.
#[derive(Debug)]
pub(super) struct Flights {
    /// All that ever began.
    begun: Cell<u64>,
    /// What those that begin now have in their tags: [`Tag::MARK`] or 0.
    mark: Cell<u64>,
    /// In the newer group: how many had begun before it, how many of it have ended, and in which epoch the
    /// first can have been looked up.
    before: Cell<u64>,
    ended: Cell<u64>,
    since: Cell<u64>,
    /// How many of the older group are in flight, and the same of its epoch.
    old: Cell<u64>,
    old_since: Cell<u64>,
    /// The counts were wrong once.
    unsure: Cell<bool>,
}

impl Flights {
    /// None, in the first epoch.
    pub(super) fn new() -> Flights {
        let zero = || Cell::new(0);
        Flights {
            begun: zero(),
            mark: zero(),
            before: zero(),
            ended: zero(),
            since: zero(),
            old: zero(),
            old_since: zero(),
            unsure: Cell::new(false),
        }
    }

    /// A request is given to a leaf. Returns the tag under which it goes down.
    #[inline(always)]
    pub(super) fn begin(&self, up: Tag) -> Tag {
        self.begun.set(self.begun.get().wrapping_add(1));
        Tag::from_bits(up.bits() | self.mark.get())
    }

    /// The leaf did not take the last one.
    #[cold]
    pub(super) fn take_back(&self) {
        self.begun.set(self.begun.get().wrapping_sub(1));
    }

    /// So many ended, by the word of their frontends.
    #[inline]
    pub(super) fn end(&self, marked: bool, count: usize) {
        let count = count as u64;
        let newer = marked == (self.mark.get() != 0);
        let there = if newer { self.new_ones() } else { self.old.get() };
        let ended = if count <= there { count } else { self.too_many(there) };
        match newer {
            true => self.ended.set(self.ended.get() + ended),
            false => self.old.set(there - ended),
        }
    }

    /// Some ended more often than they began: which are in flight is not known any more, so what they may
    /// use is never used for anything else.
    #[cold]
    #[inline(never)]
    fn too_many(&self, there: u64) -> u64 {
        if !self.unsure.replace(true) {
            log::error!(
                "requests ended more often than they began: space that is freed in this image is not used \
                 again until it is opened anew"
            );
        }
        there
    }

    /// How many ever began.
    pub(super) fn begun(&self) -> u64 {
        self.begun.get()
    }

    /// How many of the newer group are in flight.
    #[inline]
    fn new_ones(&self) -> u64 {
        self.begun.get() - self.before.get() - self.ended.get()
    }

    /// How many are in flight.
    #[inline]
    pub(super) fn count(&self) -> usize {
        (self.new_ones() + self.old.get()) as usize
    }

    /// Look-ups from now on are made in this epoch or a later one.
    pub(super) fn see(&self, epoch: u64) {
        if self.since.get() == epoch || self.old.get() > 0 {
            return;
        }
        self.old.set(self.new_ones());
        self.old_since.set(self.since.get());
        self.before.set(self.begun.get());
        self.ended.set(0);
        self.since.set(epoch);
        self.mark.set(self.mark.get() ^ MARK);
    }

    /// No look-up of those in flight was made before this epoch; [`QUIET`] if there are none.
    pub(super) fn oldest(&self) -> u64 {
        if self.unsure.get() {
            return 0;
        }
        match (self.old.get(), self.new_ones()) {
            (0, 0) => QUIET,
            (0, _) => self.since.get(),
            _ => self.old_since.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against a list of all that are in flight, with their true epochs.
    #[test]
    fn nothing_is_thought_younger_than_it_is_and_nothing_waits_for_ever() {
        let mut state = 1u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        let f = Flights::new();
        let (mut all, mut epoch, mut begun): (Vec<(Tag, u64)>, _, _) = (Vec::new(), 0, 0);
        for round in 0..200_000u64 {
            match random(8) {
                0 => epoch += random(2),
                1 => f.see(epoch),
                2..=4 if all.len() < 40 => {
                    let up = Tag::new(3, round as u16, round as u32);
                    if random(4) == 0 {
                        f.begin(up);
                        f.take_back();
                    }
                    let tag = f.begin(up);
                    assert_eq!(tag.without_mark(), up);
                    begun += 1;
                    all.push((tag, epoch));
                }
                _ if !all.is_empty() => {
                    let (tag, _) = all.swap_remove(random(all.len() as u64) as usize);
                    f.end(tag.owner() & Tag::MARK != 0, 1);
                }
                _ => {}
            }
            assert_eq!((f.count(), f.begun()), (all.len(), begun));
            let oldest = all.iter().map(|&(_, epoch)| epoch).min();
            match oldest {
                None => assert_eq!(f.oldest(), QUIET),
                Some(oldest) => assert!(f.oldest() <= oldest),
            }
        }
        // When those have ended that were there at a look, the age is that of the look, whatever
        // came since.
        for _ in 0..100 {
            f.see(epoch);
            for (tag, _) in all.drain(..) {
                f.end(tag.owner() & Tag::MARK != 0, 1);
            }
            epoch += 1;
            f.see(epoch);
            let tag = f.begin(Tag::new(3, 0, 0));
            all.push((tag, epoch));
            assert_eq!(f.oldest(), epoch);
        }
    }

    #[test]
    fn whoever_ends_twice_costs_space_and_nothing_else() {
        let up = Tag::new(3, 0, 0);
        for older in [false, true] {
            let f = Flights::new();
            f.see(1);
            let marked = f.begin(up).owner() & Tag::MARK != 0;
            if older {
                f.see(2);
            }
            f.end(marked, 2);
            assert_eq!((f.count(), f.oldest()), (0, 0));
            f.see(3);
            let marked = f.begin(up).owner() & Tag::MARK != 0;
            assert_eq!((f.count(), f.oldest()), (1, 0));
            f.end(marked, 1);
            assert_eq!((f.count(), f.oldest()), (0, 0));
        }
    }
}
