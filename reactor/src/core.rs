//! [`Core`]: what one reactor owns, and one turn of its loop.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use block::{
    BlockQueue, Completion, Completions, DeviceInfo, Frontend, HasWork, Layer, Limit, Status, Tag,
};

use nix::poll::PollFlags;

use crate::lodger::{CROWDED_NS, LODGERS, NAP_NS};
use crate::{Clock, Lodger, Mailbox, Stats, Turn, Wake};

/// An owner number is an index into the frontends, or with this bit an index into the images.
const IMAGE: u16 = 1 << 15;
/// What is neither that bit nor a layer's ([`Tag::MARK`]).
const INDEX: u16 = Tag::MARK - 1;

struct Attached<F> {
    frontend: F,
    /// Index of its image, or [`NO_IMAGE`].
    image: usize,
}

/// Leaves whose wake-up descriptors a sleeping reactor listens to, at most.
const LEAF_WAKERS: usize = 15;
/// Most of [`Core::wakers`].
pub(crate) const WAKERS: usize = LEAF_WAKERS + LODGERS;

/// Of a frontend whose image was closed.
const NO_IMAGE: usize = usize::MAX;

impl<F: Frontend> Attached<F> {
    /// Whether its other side or its image has gone.
    fn has_ended(&self) -> bool {
        self.image == NO_IMAGE || self.frontend.closed()
    }
}

/// Leaf queues, images and frontends of one reactor. Built and used on the reactor's thread, or
/// turned by hand on any thread in tests and measurements.
pub struct Core<L, I, F> {
    // First, so that they are dropped, and done with all memory, before its owners.
    leaves: Vec<L>,
    images: Vec<Option<I>>,
    /// The leaf queues that each image stands on; `None`: any.
    places: Vec<Option<Box<[u16]>>>,
    /// How much each image takes, if that is limited.
    limits: Vec<Option<Arc<Limit>>>,
    /// When the first of those opens that requests wait for, as of the last [`Core::arm`].
    opens: Option<u64>,
    frontends: Vec<Option<Attached<F>>>,
    lodgers: Vec<Box<dyn Lodger>>,
    /// Lodgers may come: the reactor sleeps where there is nothing to do.
    sleeps: bool,
    /// What the reactor has worked by [`Stats::busy_ns`] when it last slept.
    worked: u64,
    /// The frontend that had work since then, and whether it was not the only one.
    worker: Option<usize>,
    several: bool,
    /// It was a lodger's, the last time that there was work.
    by_lodger: bool,
    /// Which frontend is looked at next for whether its other side has gone.
    look: usize,
    done: Completions,
    out: Completions,
    clock: Clock,
    now: u64,
    /// The turn that began at `now` had work.
    busy: bool,
    stats: Arc<Stats>,
    mailbox: Mailbox<Core<L, I, F>>,
    wake: Wake,
    stop: bool,
}

impl<L: BlockQueue, I: Layer<L>, F: Frontend> Core<L, I, F> {
    /// An empty core.
    ///
    /// # Errors
    /// If the process has no descriptor left for the wake-up.
    pub fn new(clock: Clock) -> Result<Self, nix::Error> {
        let (wake, now) = (Wake::new()?, clock.now());
        Ok(Core {
            leaves: Vec::new(),
            images: Vec::new(),
            places: Vec::new(),
            limits: Vec::new(),
            opens: None,
            frontends: Vec::new(),
            lodgers: Vec::new(),
            sleeps: false,
            worked: 0,
            worker: None,
            several: false,
            by_lodger: false,
            look: 0,
            done: Completions::new(),
            out: Completions::new(),
            clock,
            now,
            busy: false,
            stats: Arc::default(),
            mailbox: Mailbox::new(wake.clone()),
            wake,
            stop: false,
        })
    }

    /// The way in for other threads.
    pub fn mailbox(&self) -> Mailbox<Self> {
        self.mailbox.clone()
    }

    /// What wakes this reactor.
    pub fn wake(&self) -> Wake {
        self.wake.clone()
    }

    /// Counters, readable from any thread.
    pub fn stats(&self) -> Arc<Stats> {
        self.stats.clone()
    }

    /// The clock.
    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The reactor's time of this turn, in nanoseconds.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Takes a leaf queue in; returns its index for [`block::Port::leaf`].
    ///
    /// # Errors
    /// If it cannot reach the memory of a frontend that is already attached.
    pub fn add_leaf(&mut self, mut leaf: L) -> Result<u16, String> {
        let index = u16::try_from(self.leaves.len()).map_err(|_| "too many leaf queues")?;
        for f in self.frontends.iter().flatten() {
            for region in f.frontend.regions() {
                leaf.register(&region)?;
            }
        }
        self.leaves.push(leaf);
        Ok(index)
    }

    /// Puts a leaf queue at an index, in the place of one that nothing is asked of any more. Where
    /// there was none before it, `vacant` makes something that stands there. For an image that says
    /// so by [`Core::stand_on`].
    ///
    /// # Errors
    /// If requests of the old one are in flight.
    pub fn put_leaf(
        &mut self,
        index: u16,
        leaf: L,
        mut vacant: impl FnMut() -> L,
    ) -> Result<(), String> {
        while self.leaves.len() <= usize::from(index) {
            self.leaves.push(vacant());
        }
        let place = &mut self.leaves[usize::from(index)];
        if place.in_flight() > 0 {
            return Err("the leaf queue is in use".to_owned());
        }
        *place = leaf;
        Ok(())
    }

    /// Takes a leaf queue out, to be closed by whoever opened it; `vacant` stands in its place. `None`
    /// if there is none.
    pub fn take_leaf(&mut self, index: u16, vacant: L) -> Option<L> {
        let place = self.leaves.get_mut(usize::from(index))?;
        Some(std::mem::replace(place, vacant))
    }

    /// The leaf queues.
    pub fn leaves(&mut self) -> &mut [L] {
        &mut self.leaves
    }

    /// Takes an image in; `make` is given its owner number and the leaf queues. Returns its index.
    ///
    /// # Errors
    /// What `make` says.
    pub fn add_image<E>(
        &mut self,
        make: impl FnOnce(u16, &mut [L]) -> Result<I, E>,
    ) -> Result<usize, E> {
        let index = free_place(&mut self.images);
        self.images[index] = Some(make(owner(index) | IMAGE, &mut self.leaves)?);
        self.places.resize_with(self.images.len(), || None);
        self.places[index] = None;
        self.limits.resize(self.images.len(), None);
        self.limits[index] = None;
        Ok(index)
    }

    /// Limits what an image takes, or does not any more.
    pub fn limit(&mut self, image: usize, limit: Option<Arc<Limit>>) {
        if let Some(place) = self.limits.get_mut(image) {
            *place = limit;
        }
    }

    /// From now on an image asks only these of the leaf queues; its frontends' memory is made known
    /// to them.
    ///
    /// # Errors
    /// If one of them cannot reach that memory.
    pub fn stand_on(&mut self, image: usize, leaves: &[u16]) -> Result<(), String> {
        if let Some(place) = self.places.get_mut(image) {
            *place = Some(leaves.into());
        }
        for a in self.frontends.iter().flatten().filter(|a| a.image == image) {
            for region in a.frontend.regions() {
                for &at in leaves {
                    if let Some(leaf) = self.leaves.get_mut(usize::from(at)) {
                        leaf.register(&region)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// An image.
    pub fn image(&mut self, index: usize) -> Option<&mut I> {
        self.images.get_mut(index)?.as_mut()
    }

    /// Lends an image together with the leaf queues; `None` if there is no such image.
    pub fn with_image<R>(
        &mut self,
        index: usize,
        f: impl FnOnce(&mut I, &mut [L]) -> R,
    ) -> Option<R> {
        let image = self.images.get_mut(index)?.as_mut()?;
        Some(f(image, &mut self.leaves))
    }

    /// Attaches a frontend to an image; `make` is given its owner number. Returns its index.
    ///
    /// # Errors
    /// What `make` says; or if a leaf cannot reach the frontend's memory, or there is no such
    /// image.
    pub fn add_frontend(
        &mut self,
        image: usize,
        make: impl FnOnce(u16, &DeviceInfo) -> Result<F, String>,
    ) -> Result<usize, String> {
        let index = free_place(&mut self.frontends);
        if index > usize::from(INDEX) {
            return Err("a reactor has at most 16,384 frontends".to_owned());
        }
        let Some(Some(of)) = self.images.get_mut(image) else {
            return Err(format!("there is no image {image}"));
        };
        let frontend = make(owner(index), of.info())?;
        if frontend.is_guest() {
            self.lodgers.clear();
        }
        for region in frontend.regions() {
            of.register(&region);
            for (at, leaf) in self.leaves.iter_mut().enumerate() {
                let places = self.places[image].as_ref();
                if places.is_none_or(|p| p.iter().any(|&p| usize::from(p) == at)) {
                    leaf.register(&region)?;
                }
            }
        }
        self.frontends[index] = Some(Attached { frontend, image });
        Ok(index)
    }

    /// A frontend.
    pub fn frontend(&mut self, index: usize) -> Option<&mut F> {
        self.frontends.get_mut(index)?.as_mut().map(|a| &mut a.frontend)
    }

    /// All frontends.
    pub fn frontends(&self) -> impl Iterator<Item = &F> {
        self.frontends.iter().flatten().map(|a| &a.frontend)
    }

    /// How many frontends are attached.
    pub fn frontend_count(&mut self) -> usize {
        self.frontends.iter().flatten().count()
    }

    /// How many frontends are attached to an image.
    pub fn frontends_of(&self, image: usize) -> usize {
        self.frontends.iter().flatten().filter(|a| a.image == image).count()
    }

    /// Takes a frontend out; only when nothing of it is in flight, else it stays (`None`).
    pub fn remove_frontend(&mut self, index: usize) -> Option<F> {
        let place = self.frontends.get_mut(index)?;
        if place.as_ref()?.frontend.in_flight() > 0 {
            return None;
        }
        Some(place.take()?.frontend)
    }

    /// Takes a closed image out, with how its close ended; `None` while it is not closed. Frontends
    /// that are still attached are dropped soon, once nothing of them is in flight.
    pub fn remove_closed_image(&mut self, index: usize) -> Option<(I, Status)> {
        let place = self.images.get_mut(index)?;
        let status = place.as_ref()?.closed()?;
        let image = place.take()?;
        // The place may be the next image's, which they must never come to stand on.
        for a in self.frontends.iter_mut().flatten().filter(|a| a.image == index) {
            a.image = NO_IMAGE;
        }
        Some((image, status))
    }

    /// Lets a service do its work on this thread, or drops it: where the reactor never sleeps, has
    /// guests, or lodgers enough.
    pub fn lodge(&mut self, lodger: Box<dyn Lodger>) {
        if self.sleeps && self.lodgers.len() < LODGERS && !self.frontends().any(F::is_guest) {
            self.lodgers.push(lodger);
        }
    }

    /// How many lodgers there are.
    pub fn lodger_count(&self) -> usize {
        self.lodgers.len()
    }

    /// Takes the leaf queues out, to be closed by whoever opened them.
    pub fn take_leaves(&mut self) -> Vec<L> {
        std::mem::take(&mut self.leaves)
    }

    /// Has the loop of [`crate::Reactor`] end after this turn.
    pub fn stop(&mut self) {
        self.stop = true;
    }

    /// Whether [`Core::stop`] was called.
    pub fn stopping(&self) -> bool {
        self.stop
    }

    /// One turn: polls everything once. Returns whether there was anything to do.
    #[inline]
    pub fn turn(&mut self) -> bool {
        // What has passed since was the last turn's, and a sleep's where that had no work. A thread
        // that is not pinned may come to a processor whose counter is a little behind.
        let now = self.clock.now();
        let passed = now.saturating_sub(self.now);
        let spent = if self.busy { &self.stats.busy_ns } else { &self.stats.idle_ns };
        spent.add(passed);
        self.now = now;
        let mut busy = false;
        if !self.mailbox.is_empty() {
            self.run_calls();
            busy = true;
        }
        for l in 0..self.leaves.len() {
            let leaf = &mut self.leaves[l];
            leaf.set_now(self.now);
            if leaf.poll(&mut self.done) > 0 {
                busy = true;
                self.dispatch();
            }
        }
        for image in self.images.iter_mut().flatten() {
            busy |= image.poll(&mut self.leaves, &mut self.out);
            if !self.out.is_empty() {
                answer(&mut self.out, &mut self.frontends, &self.stats);
            }
        }
        let lodging = !self.lodgers.is_empty();
        let by_lodger = lodging && self.turn_lodgers();
        busy |= by_lodger;
        for (at, a) in self.frontends.iter_mut().enumerate() {
            let Some(a) = a else { continue };
            if a.frontend.is_quiet(self.now) {
                continue;
            }
            let Some(Some(image)) = self.images.get_mut(a.image) else { continue };
            let worked = match &self.limits[a.image] {
                None => image.serve(&mut self.leaves, &mut a.frontend, self.now),
                Some(l) => image.serve_within(l, &mut self.leaves, &mut a.frontend, self.now),
            };
            busy |= worked;
            if lodging && worked {
                self.several |= self.worker.replace(at).is_some_and(|before| before != at);
            }
        }
        self.stats.turns.add(1);
        if busy {
            self.by_lodger = by_lodger;
            // What this turn took is started now, not in the next turn.
            for leaf in &mut self.leaves {
                leaf.start();
            }
        } else {
            self.stats.idle_turns.add(1);
            // Looks at one of them: idle turns come often, and with many rings should be cheap.
            self.drop_if_closed(self.look);
            self.look = if self.look < self.frontends.len() { self.look + 1 } else { 0 };
        }
        self.busy = busy;
        busy
    }

    /// Has lodgers take answers, and ask for what they need, before frontends are polled.
    #[inline(never)]
    fn turn_lodgers(&mut self) -> bool {
        let worked = self.stats.busy_ns.get().wrapping_sub(self.worked);
        if self.several && worked > CROWDED_NS {
            self.lodgers.clear();
        }
        let (mut busy, now) = (false, self.now);
        self.lodgers.retain_mut(|lodger| {
            let turn = lodger.turn(now);
            busy |= turn != Turn::Idle;
            turn != Turn::Leave
        });
        busy
    }

    /// Hands what a leaf completed to its owners.
    #[inline]
    fn dispatch(&mut self) {
        self.stats.completions.add(self.done.len() as u64);
        if self.done.any_failed() {
            self.tell_of_losses();
        }
        let mut rest = self.done.as_slice();
        while let Some(first) = rest.first() {
            let owner = first.tag.owner();
            let index = usize::from(owner & INDEX);
            let mut taken = 1;
            if owner & IMAGE != 0 {
                let image = self.images.get_mut(index);
                to_image(*first, image, &mut self.leaves, &mut self.frontends, &self.stats);
            } else if let Some(Some(a)) = self.frontends.get_mut(index) {
                let ended;
                (taken, ended) = a.frontend.complete_run(rest);
                if let Some(Some(image)) = self.images.get_mut(a.image) {
                    image.ended(owner & Tag::MARK != 0, ended);
                }
            } else {
                self.stats.strays.add(1);
            }
            // At least one, so that this has an end.
            rest = rest.get(taken.max(1)..).unwrap_or_default();
        }
        self.done.clear();
    }

    /// Has images know of devices that were lost and may still use memory, before frontends know.
    #[cold]
    fn tell_of_losses(&mut self) {
        for c in self.done.iter().filter(Completion::is_quarantined) {
            let index = usize::from(c.tag.owner() & INDEX);
            if c.tag.owner() & IMAGE == 0
                && let Some(Some(a)) = self.frontends.get(index)
                && let Some(Some(image)) = self.images.get_mut(a.image)
            {
                image.lost_device();
            }
        }
    }

    #[cold]
    fn run_calls(&mut self) {
        // Frontends come by calls: so however busy the reactor is, those that go do not pile up.
        self.drop_closed();
        // Bounded, so that a flood of calls does not starve the rings.
        for _ in 0..16 {
            let Some(call) = self.mailbox.take() else { break };
            self.stats.calls.add(1);
            call(self);
        }
    }

    /// Forgets frontends whose other side or image has gone. Nothing is urgent here.
    #[cold]
    fn drop_closed(&mut self) {
        for at in 0..self.frontends.len() {
            self.drop_if_closed(at);
        }
    }

    fn drop_if_closed(&mut self, at: usize) {
        if let Some(Some(a)) = self.frontends.get(at)
            && a.has_ended()
        {
            drop(self.remove_frontend(at));
        }
    }

    /// The final check before sleep: whether anything at all wants another turn.
    pub fn arm(&mut self) -> HasWork {
        let mut work = !self.mailbox.is_empty() || self.stop;
        let mut wakers = 0;
        for leaf in &mut self.leaves {
            let can_wake = leaf.wake_fd().is_some() && wakers < LEAF_WAKERS;
            wakers += usize::from(can_wake);
            // A device command in flight is polled for, never slept over, unless the leaf can wake.
            work |= leaf.arm() == HasWork::Yes || (leaf.in_flight() > 0 && !can_wake);
        }
        for image in self.images.iter_mut().flatten() {
            work |= image.arm() == HasWork::Yes;
        }
        for lodger in &mut self.lodgers {
            work |= lodger.arm() == HasWork::Yes;
        }
        self.opens = None;
        for a in self.frontends.iter_mut().flatten() {
            let its = a.frontend.arm() == HasWork::Yes;
            let limit = self.limits.get(a.image).and_then(Option::as_ref);
            match limit.map(|limit| limit.opens()).filter(|&opens| opens > self.now) {
                // Its requests wait for that, and nothing else wakes the reactor.
                Some(opens) if its => {
                    self.opens = Some(self.opens.map_or(opens, |first| first.min(opens)));
                }
                _ => work |= its,
            }
            // It goes in one of the next turns.
            work |= a.has_ended() && a.frontend.in_flight() == 0;
        }
        if work { HasWork::Yes } else { HasWork::No }
    }
}

impl<L, I, F> Drop for Core<L, I, F> {
    fn drop(&mut self) {
        // Nobody runs calls any more. The fields go after this, leaves first: a frontend that goes
        // with requests in flight can say that nothing touches their memory any more.
        self.mailbox.close();
        self.lodgers.clear();
    }
}

impl<L, I, F> Core<L, I, F> {
    /// Whoever turns the core sleeps where there is nothing to do; said at first and after each sleep.
    pub(crate) fn sleeps(&mut self) {
        self.sleeps = true;
        (self.worked, self.worker, self.several) = (self.stats.busy_ns.get(), None, false);
    }

    /// How long a reactor may sleep after [`Core::arm`] before requests that wait for a limit can be
    /// taken, in nanoseconds. `None`: there are none.
    pub(crate) fn nap(&self) -> Option<u64> {
        self.opens.map(|opens| opens.saturating_sub(self.now))
    }
}

impl<L: BlockQueue, I, F: Frontend> Core<L, I, F> {
    /// Whether the next work comes by a lodger's socket, as the last did: a client's answer takes longer
    /// than a spin is worth.
    pub(crate) fn waits_for_sockets(&self) -> bool {
        let idle = |a: &Attached<F>| a.frontend.in_flight() == 0;
        self.by_lodger
            && !self.lodgers.is_empty()
            && self.leaves.iter().all(|leaf| leaf.in_flight() == 0)
            && self.frontends.iter().flatten().all(idle)
    }

    /// What a sleeping reactor is woken by, beside its [`Wake`]: leaves only by what they are asked.
    pub(crate) fn wakers(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let leaves = self.leaves.iter().filter(|leaf| leaf.in_flight() > 0);
        let leaves = leaves.filter_map(BlockQueue::wake_fd).take(LEAF_WAKERS);
        let lodgers = self.lodgers.iter().filter_map(|lodger| lodger.waits_for());
        leaves.map(|fd| (fd, PollFlags::POLLIN)).chain(lodgers)
    }

    /// How many of them are lodgers', the last ones.
    pub(crate) fn lodger_wakers(&self) -> usize {
        self.lodgers.iter().filter(|lodger| lodger.waits_for().is_some()).count()
    }

    /// What came of the lodgers' part of [`Core::wakers`], after a sleep of so many nanoseconds.
    pub(crate) fn slept(&mut self, took: u64, events: impl Iterator<Item = PollFlags>) {
        if took >= NAP_NS {
            self.sleeps();
        }
        let waited = self.lodgers.iter_mut().filter(|lodger| lodger.waits_for().is_some());
        waited.zip(events).for_each(|(lodger, events)| lodger.heard(events));
    }
}

/// A free place in a list, made if there is none.
fn free_place<T>(list: &mut Vec<Option<T>>) -> usize {
    list.iter().position(Option::is_none).unwrap_or_else(|| {
        list.push(None);
        list.len() - 1
    })
}

/// The owner number of a frontend.
fn owner(index: usize) -> u16 {
    // Each owner holds memory and descriptors; the process is out of both long before this.
    assert!(index <= usize::from(INDEX), "at most 16,384 images and as many frontends");
    index as u16
}

/// Hands what an image asked for to it, and on to a frontend what ends by that.
#[inline(never)]
fn to_image<L: BlockQueue, I: Layer<L>, F: Frontend>(
    mut done: Completion,
    image: Option<&mut Option<I>>,
    leaves: &mut [L],
    frontends: &mut [Option<Attached<F>>],
    stats: &Stats,
) {
    let Some(Some(image)) = image else { return stats.strays.add(1) };
    if image.complete(leaves, &mut done) {
        to_frontend(done, frontends, stats);
    }
}

#[inline(always)]
fn to_frontend<F: Frontend>(c: Completion, frontends: &mut [Option<Attached<F>>], stats: &Stats) {
    if let Some(Some(a)) = frontends.get_mut(usize::from(c.tag.owner())) {
        a.frontend.complete(c);
    } else {
        stats.strays.add(1);
    }
}

#[inline(never)]
fn answer<F: Frontend>(
    out: &mut Completions,
    frontends: &mut [Option<Attached<F>>],
    stats: &Stats,
) {
    for c in out.iter() {
        to_frontend(c, frontends, stats);
    }
    out.clear();
}
