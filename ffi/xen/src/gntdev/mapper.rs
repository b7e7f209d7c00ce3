//! [`Mapper`]: the thread that maps and unmaps pages for reactors.
//!
//! Mapping costs system calls, hypercalls and page tables; unmapping also disturbs all processors of
//! the process. So reactors leave both to this thread. What they ask for at a time is mapped as one
//! range, which is faster, and the kernel bears only so many ranges; a range is unmapped when none
//! of its pages is used, a little later and with others. A page that is asked for again before that
//! is still the guest's same page (it cannot take back what is mapped), and is handed out again.
//!
//! A guest can make this thread busy, but rings take turns. What it can make us map is bounded by twice
//! the limit of its ring, and by what all may have together; so are the ranges, of which a process that
//! has too many can get no memory at all. What is refused is copied.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use reactor::sync::Mutex;
use reactor::{Clock, Wake};

use super::memory::Page;
use super::pages::{End, Job, Link, Pages};
use super::{Gntdev, MapError, Mapping};
use crate::Error;

/// Most pages of one range, and most mappings of a ring before the next has its turn.
const BATCH: usize = 64;
/// Ranges of which nothing is used are unmapped when they have so many pages.
const UNUSED_PAGES: usize = 256;
/// Or when they have been that for so long, in nanoseconds.
const UNUSED_NS: u64 = 1_000_000_000;
/// A ring may have half as many ranges as pages, and so many more.
const LEAST_RANGES: usize = 16;
/// How often that is looked at while there are some, in milliseconds.
const LOOK_MS: u16 = 250;
/// The same complaint is not repeated for so long, in nanoseconds.
const SILENT_NS: u64 = 60_000_000_000;

#[derive(Debug)]
struct Shared {
    /// Rings that the thread has not taken up yet.
    new: Mutex<Vec<Arc<Link>>>,
    stop: AtomicBool,
}

/// The thread. It ends when this is dropped; pages that are mapped then stay until they are given up.
#[derive(Debug)]
pub struct Mapper {
    shared: Arc<Shared>,
    wake: Wake,
    thread: Option<JoinHandle<()>>,
}

impl Mapper {
    /// Starts it on a device of its own, for at most `most_pages` mapped pages in all. Xen has 262,144
    /// handles for a domain unless told otherwise, and a domain of the kind PV needs two for a page.
    ///
    /// # Errors
    /// If the process has no thread or descriptor left.
    pub fn start(device: Gntdev, most_pages: usize) -> Result<Mapper, Error> {
        let kernel = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
        let kernel = kernel.and_then(|text| text.trim().parse().ok()).unwrap_or(65_530);
        Mapper::with(device, most_pages, usize::min(kernel, 1 << 20) / 2)
    }

    pub(super) fn with(
        device: Gntdev,
        most_pages: usize,
        most_ranges: usize,
    ) -> Result<Mapper, Error> {
        let wake = Wake::new().map_err(|why| Error::Os { what: "eventfd", why })?;
        let shared = Arc::new(Shared { new: Mutex::default(), stop: AtomicBool::new(false) });
        let mut work = Work {
            shared: shared.clone(),
            wake: wake.clone(),
            device,
            rings: Vec::new(),
            mapped: 0,
            most: most_pages,
            ranges: 0,
            most_ranges,
            clock: Clock::real(),
            silent_until: 0,
        };
        let thread =
            std::thread::Builder::new().name("xen-mapper".into()).spawn(move || work.run());
        let thread = thread.map_err(|e| Error::io("start a thread", &e))?;
        Ok(Mapper { shared, wake, thread: Some(thread) })
    }

    /// Pages of a domain: at most `limit` at a time.
    pub fn pages(&self, domid: u16, limit: u32) -> Pages {
        let pages = Pages::new(domid, limit, self.wake.clone());
        self.shared.new.lock().push(pages.link().clone());
        pages
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A range.
#[derive(Debug)]
struct Group {
    mapping: Arc<Mapping>,
    grefs: Vec<u32>,
    /// Pages that the reactor has.
    used: usize,
    /// Since when it has none.
    unused_since: u64,
}

#[derive(Debug)]
struct Ring {
    link: Arc<Link>,
    /// By the range's place in the device.
    groups: HashMap<u64, Group>,
    /// Pages that are mapped and that the reactor has not, by reference.
    spare: HashMap<u32, Page>,
    /// Pages of all groups, and of those of which none is used.
    mapped: usize,
    unused: usize,
}

struct Work {
    shared: Arc<Shared>,
    wake: Wake,
    device: Gntdev,
    rings: Vec<Ring>,
    mapped: usize,
    most: usize,
    /// The kernel bears so many ranges in a process, and others need some too.
    ranges: usize,
    most_ranges: usize,
    clock: Clock,
    silent_until: u64,
}

impl Work {
    fn run(&mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            if self.turn() {
                continue;
            }
            self.wake.about_to_sleep();
            if !self.turn() && !self.shared.stop.load(Ordering::Acquire) {
                let some = self.rings.iter().any(|r| r.unused > 0);
                let longest = if some { PollTimeout::from(LOOK_MS) } else { PollTimeout::NONE };
                let mut fds = [PollFd::new(self.wake.fd(), PollFlags::POLLIN)];
                let _ = poll(&mut fds, longest);
            }
            self.wake.awake();
        }
        self.adopt();
        for mut ring in std::mem::take(&mut self.rings) {
            ring.link.over.store(true, Ordering::Release);
            while self.jobs(&mut ring) > 0 {}
            self.unmap(&mut ring, |_| true);
            ring.told();
        }
    }

    fn adopt(&mut self) {
        for link in self.shared.new.lock().drain(..) {
            self.rings.push(Ring {
                link,
                groups: HashMap::new(),
                spare: HashMap::new(),
                mapped: 0,
                unused: 0,
            });
        }
    }

    /// Does some of what there is to do for each ring; whether there was anything.
    fn turn(&mut self) -> bool {
        self.adopt();
        let mut worked = false;
        let mut i = 0;
        while i < self.rings.len() {
            // Taken out, so that the ring and the rest can both be changed.
            let mut ring = self.rings.swap_remove(i);
            worked |= self.serve(&mut ring);
            if !self.over(&mut ring) {
                self.rings.push(ring);
                let last = self.rings.len() - 1;
                self.rings.swap(i, last);
                i += 1;
            }
        }
        worked
    }

    fn serve(&mut self, ring: &mut Ring) -> bool {
        // In this order: who drops its pages and then waits is told when all of them are gone.
        let (asked, settling) = {
            let settle = ring.link.settle.lock();
            (settle.asked, settle.asked > settle.done)
        };
        let closed = ring.link.closed.load(Ordering::Acquire);
        let waiting = ring.link.jobs.len();
        let mut done = self.jobs(ring);
        if closed || settling {
            // All that was given up before; it may be more than one batch.
            while done < waiting {
                done += self.jobs(ring);
            }
            if closed {
                self.take_back(ring);
            }
            self.unmap(ring, |_| true);
        } else if ring.unused >= UNUSED_PAGES {
            self.unmap(ring, |_| true);
        } else if ring.unused > 0 {
            let now = self.clock.now();
            self.unmap(ring, |g| now.saturating_sub(g.unused_since) >= UNUSED_NS);
        }
        if settling {
            ring.link.settle.lock().done = asked;
            ring.told();
        }
        done > 0 || settling
    }

    /// Whether a ring has nobody who asks, and nothing left.
    fn over(&mut self, ring: &mut Ring) -> bool {
        if !ring.link.closed.load(Ordering::Acquire) || !ring.link.jobs.is_empty() {
            return false;
        }
        self.take_back(ring);
        self.unmap(ring, |_| true);
        debug_assert_eq!((ring.mapped, ring.unused), (0, 0));
        self.mapped -= ring.mapped;
        self.ranges -= ring.groups.len();
        ring.link.over.store(true, Ordering::Release);
        ring.told();
        true
    }

    /// Ends that nobody will take any more.
    fn take_back(&mut self, ring: &mut Ring) {
        while let Some(end) = ring.link.ends.pop() {
            if let Some(page) = end.page {
                self.release(ring, end.gref, page);
            }
        }
    }

    /// Does a batch of jobs; how many.
    fn jobs(&mut self, ring: &mut Ring) -> usize {
        let mut grefs = Vec::new();
        let mut done = 0;
        while grefs.len() < BATCH
            && let Some(job) = ring.link.jobs.pop()
        {
            done += 1;
            match job {
                Job::Release(gref, page) => self.release(ring, gref, page),
                Job::Map(gref) => match ring.spare.remove(&gref) {
                    Some(page) => ring.hand_out(gref, page),
                    None => grefs.push(gref),
                },
            }
        }
        if !grefs.is_empty() {
            if ring.link.closed.load(Ordering::Acquire) {
                grefs.iter().for_each(|&gref| ring.refuse(gref));
            } else {
                self.map(ring, &grefs);
            }
        }
        done
    }

    fn release(&mut self, ring: &mut Ring, gref: u32, page: Page) {
        if let Some(group) = ring.groups.get_mut(&page.mapping().index()) {
            group.used -= 1;
            if group.used == 0 {
                group.unused_since = self.clock.now();
                ring.unused += group.grefs.len();
            }
        }
        ring.spare.insert(gref, page);
    }

    /// Maps what can be mapped; all ends are told.
    fn map(&mut self, ring: &mut Ring, grefs: &[u32]) {
        if !self.room(ring, grefs.len()) {
            self.unmap(ring, |_| true);
        }
        if !self.room(ring, grefs.len()) {
            grefs.iter().for_each(|&gref| ring.refuse(gref));
            return;
        }
        match self.device.map(ring.link.domid, grefs) {
            Ok(mapping) => {
                let mapping = Arc::new(mapping);
                let group = Group {
                    mapping: mapping.clone(),
                    grefs: grefs.to_vec(),
                    used: 0,
                    unused_since: 0,
                };
                ring.mapped += grefs.len();
                ring.unused += grefs.len();
                self.mapped += grefs.len();
                self.ranges += 1;
                ring.groups.insert(mapping.index(), group);
                for (i, &gref) in grefs.iter().enumerate() {
                    ring.hand_out(gref, Page::new(&mapping, i));
                }
            }
            Err(MapError::Grant) if grefs.len() > 1 => {
                // Which one it is the kernel does not say.
                let (left, right) = grefs.split_at(grefs.len() / 2);
                self.map(ring, left);
                self.map(ring, right);
            }
            Err(why) => {
                self.complain(ring.link.domid, why);
                grefs.iter().for_each(|&gref| ring.refuse(gref));
            }
        }
    }

    /// Whether so many pages more may be mapped for a ring, as one range.
    fn room(&self, ring: &Ring, pages: usize) -> bool {
        let limit = ring.link.limit as usize;
        ring.mapped + pages <= 2 * limit
            && ring.groups.len() < limit / 2 + LEAST_RANGES
            && self.mapped + pages <= self.most
            && self.ranges < self.most_ranges
    }

    /// What the host refuses is said, but not as often as a guest can make it happen.
    fn complain(&mut self, domid: u16, why: MapError) {
        let now = self.clock.now();
        if matches!(why, MapError::Host(_)) && now >= self.silent_until {
            self.silent_until = now + SILENT_NS;
            log::warn!("pages of domain {domid} are copied instead of mapped: {why}");
        }
    }

    /// Unmaps those ranges of which no page is used, if `which` says so too.
    fn unmap(&mut self, ring: &mut Ring, which: impl Fn(&Group) -> bool) {
        if ring.unused == 0 {
            return;
        }
        let gone: Vec<Group> =
            ring.groups.extract_if(|_, g| g.used == 0 && which(g)).map(|(_, g)| g).collect();
        for group in gone {
            for gref in &group.grefs {
                // Another range's page may be there, if a reference was mapped twice.
                let ours =
                    ring.spare.get(gref).is_some_and(|p| Arc::ptr_eq(p.mapping(), &group.mapping));
                if ours {
                    ring.spare.remove(gref);
                }
            }
            ring.mapped -= group.grefs.len();
            ring.unused -= group.grefs.len();
            self.mapped -= group.grefs.len();
            self.ranges -= 1;
            // The last to hold the range: it is unmapped here.
        }
    }
}

impl Ring {
    fn hand_out(&mut self, gref: u32, page: Page) {
        if let Some(group) = self.groups.get_mut(&page.mapping().index()) {
            if group.used == 0 {
                self.unused -= group.grefs.len();
            }
            group.used += 1;
        }
        self.end(End { gref, page: Some(page) });
    }

    /// To those who wait for what was given up.
    fn told(&self) {
        // Not between their look and their sleep.
        drop(self.link.settle.lock());
        self.link.settled.notify_all();
    }

    fn refuse(&self, gref: u32) {
        self.end(End { gref, page: None });
    }

    fn end(&self, end: End) {
        let pushed = self.link.ends.push(end);
        // As many as were asked for, which is no more than there is room for.
        debug_assert!(pushed.is_ok());
    }
}
