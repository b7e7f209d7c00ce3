//! [`Pages`]: a reactor's way to the pages of one guest that stay mapped.
//!
//! One per ring; used by its reactor alone. It asks the [`super::Mapper`]'s thread for pages by one
//! queue and gets them by another; no call here is a system call, but for waking that thread if it
//! sleeps, and [`Pages::settle`]. All memory is taken when it is made.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use dma::Region;
use reactor::Wake;
use reactor::sync::Mutex;

use super::memory::Page;

/// What a reactor asks for.
#[derive(Debug)]
pub(super) enum Job {
    /// Map the page of a reference.
    Map(u32),
    /// The page of a reference is not used any more.
    Release(u32, Page),
}

/// How a mapping ended.
#[derive(Debug)]
pub(super) struct End {
    pub(super) gref: u32,
    pub(super) page: Option<Page>,
}

#[derive(Default, Debug)]
pub(super) struct Settle {
    pub(super) asked: u64,
    pub(super) done: u64,
}

/// What a reactor and the thread share.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) domid: u16,
    /// Most pages that the reactor has or waits for.
    pub(super) limit: u32,
    pub(super) jobs: ArrayQueue<Job>,
    pub(super) ends: ArrayQueue<End>,
    /// The reactor's side is gone.
    pub(super) closed: AtomicBool,
    /// The thread serves this no more.
    pub(super) over: AtomicBool,
    pub(super) settle: Mutex<Settle>,
    pub(super) settled: std::sync::Condvar,
}

/// The end of a mapping that was started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapped {
    /// The grant reference.
    pub gref: u32,
    /// The number of its page, below the limit, or `None` if it could not be mapped.
    pub page: Option<u32>,
}

/// Pages of a guest, by numbers below the limit that was given.
#[derive(Debug)]
pub struct Pages {
    link: Arc<Link>,
    wake: Wake,
    places: Box<[Option<(u32, Page)>]>,
    free: Vec<u32>,
    /// Mappings that were started and not yet told of.
    started: u32,
}

impl Pages {
    pub(super) fn new(domid: u16, limit: u32, wake: Wake) -> Pages {
        let link = Link {
            domid,
            limit,
            // A map job goes in only while there are less than `limit`; then at most as many pages
            // are out as can be given up without another look: twice the limit is never full.
            jobs: ArrayQueue::new(2 * limit.max(1) as usize),
            ends: ArrayQueue::new(limit.max(1) as usize),
            closed: AtomicBool::new(false),
            over: AtomicBool::new(false),
            settle: Mutex::default(),
            settled: std::sync::Condvar::new(),
        };
        Pages {
            link: Arc::new(link),
            wake,
            places: (0..limit).map(|_| None).collect(),
            free: (0..limit).rev().collect(),
            started: 0,
        }
    }

    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Most pages that are mapped and on their way at a time.
    pub fn limit(&self) -> u32 {
        self.link.limit
    }

    /// Asks for the page of a reference, readable and writable. False if it cannot be asked for now;
    /// else [`Pages::next_mapped`] tells the end. A reference is not to be asked for again while its
    /// page is here or on its way.
    pub fn start_map(&mut self, gref: u32) -> bool {
        let room = self.started < self.free.len() as u32
            && !self.link.over.load(Ordering::Relaxed)
            && self.link.jobs.len() < self.link.limit as usize
            && self.link.jobs.push(Job::Map(gref)).is_ok();
        if room {
            self.started += 1;
            self.wake.wake();
        }
        room
    }

    /// The end of a mapping that was started.
    #[inline]
    pub fn next_mapped(&mut self) -> Option<Mapped> {
        if self.started == 0 {
            return None;
        }
        let end = self.link.ends.pop()?;
        self.started -= 1;
        let page = end.page.and_then(|page| {
            // One is free: `start_map` saw to it.
            let number = self.free.pop()?;
            self.places[number as usize] = Some((end.gref, page));
            Some(number)
        });
        Some(Mapped { gref: end.gref, page })
    }

    /// Gives a page up. The guest can have it back some time later: pages are unmapped together with
    /// those that they were mapped with, in batches. Nothing happens if there is no such page.
    pub fn unmap(&mut self, page: u32) {
        let place = self.places.get_mut(page as usize).and_then(Option::take);
        if let Some((gref, it)) = place {
            self.free.push(page);
            // There is room, see `new`; without, it would be unmapped here.
            let _ = self.link.jobs.push(Job::Release(gref, it));
            self.wake.wake();
        }
    }

    /// Copies from a page into a region. Panics if there is no such page, or a range lies outside.
    #[inline]
    pub fn read(&self, page: u32, offset: u32, local: &Region, at: usize, len: u32) {
        self.page(page).read(offset, local, at, len);
    }

    /// Copies from a region into a page. Panics if there is no such page, or a range lies outside.
    #[inline]
    pub fn write(&self, page: u32, offset: u32, local: &Region, at: usize, len: u32) {
        self.page(page).write(offset, local, at, len);
    }

    #[inline]
    fn page(&self, page: u32) -> &Page {
        match &self.places[page as usize] {
            Some((_, page)) => page,
            None => panic!("a granted page that is not mapped"),
        }
    }

    /// Waits until all pages that were given up are unmapped, as far as no page that was mapped with
    /// them is in use. Before a device is reported closed all have to be: give up all, or drop this
    /// and wait by [`Pages::settling`].
    pub fn settle(&mut self) {
        self.settling().wait(None);
    }

    /// To wait for that elsewhere: from a thread that nobody waits for.
    pub fn settling(&self) -> Settling {
        Settling { link: self.link.clone(), wake: self.wake.clone() }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        for place in &mut self.places {
            if let Some((gref, page)) = place.take() {
                let _ = self.link.jobs.push(Job::Release(gref, page));
            }
        }
        self.link.closed.store(true, Ordering::Release);
        self.wake.wake();
    }
}

/// Waits for pages to be unmapped; see [`Pages::settle`].
#[derive(Clone, Debug)]
pub struct Settling {
    link: Arc<Link>,
    wake: Wake,
}

impl Settling {
    /// Waits until what was given up before this call is unmapped; false if that took too long.
    pub fn wait(&self, longest: Option<Duration>) -> bool {
        let mine = {
            let mut settle = self.link.settle.lock();
            settle.asked += 1;
            settle.asked
        };
        self.wake.wake();
        let settle = self.link.settle.lock();
        let over = || self.link.over.load(Ordering::Acquire);
        let waits = |s: &mut Settle| s.done < mine && !over();
        let in_time = match longest {
            Some(longest) => {
                let waited = self.link.settled.wait_timeout_while(settle, longest, waits);
                !waited.unwrap_or_else(std::sync::PoisonError::into_inner).1.timed_out()
            }
            None => self.link.settled.wait_while(settle, waits).is_ok(),
        };
        if over() {
            // Nobody else does it any more.
            while self.link.jobs.pop().is_some() {}
        }
        in_time
    }
}
