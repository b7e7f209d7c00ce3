//! [`Frontend`]: the guest's end of a ring, in this process: for the demo, measurements and tests.
//!
//! Does what Linux blkfront does: a pool of pages granted for good, last used first, or one grant
//! per use; the ring's notification rules; and the same distrust of answers, any wrong one of
//! which ends the device. One thread at a time uses it, and not the reactor's if there are two.
//! Takes all its memory when it is made.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use dma::{PageSize, Region};

use crate::abi::{
    Abi, DIRECT_SEGMENTS, DISCARD, FLUSH_DISKCACHE, Head, INDIRECT_PAGES, MAX_ORDER, PAGE, READ,
    REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, SECTOR, SEGMENTS_PER_PAGE, Segment, WRITE,
    WRITE_BARRIER,
};
use crate::local::{GrantTable, LocalGrants, RESERVED_GRANTS};
use crate::{EventChannel, KeptRing, RegionRing, RingMemory, notify};

/// Sectors in a page.
const PER_PAGE: u32 = PAGE as u32 / SECTOR;
/// A page without a grant.
const NO_GRANT: u32 = u32::MAX;

/// What a frontend is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Layout of the slots.
    pub abi: Abi,
    /// Pages of the ring, as a power of two.
    pub order: u8,
    /// Keep pages granted for good.
    pub persistent: bool,
    /// Most segments of a request; more than 11 need indirect requests.
    pub max_segments: u16,
    /// Where the ring's indices begin: 0, but for tests of what happens when they wrap.
    pub start: u32,
}

/// Why a request cannot be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unsent {
    /// The ring is full: take answers first.
    #[error("the ring is full")]
    Full,
    /// No request can hold that much, or it is not whole sectors.
    #[error("a request cannot hold this")]
    Shape,
    /// The device was given up.
    #[error(transparent)]
    Dead(#[from] Dead),
}

/// Why the device was given up: what Linux calls "disabled for further use".
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Dead {
    /// An answer to no request.
    #[error("the backend answered request {0:#x}, which is not under way")]
    UnknownId(u64),
    /// An answer that names another operation.
    #[error("the backend answered operation {1} to an operation {0}")]
    WrongOperation(u8, u8),
    /// More answers than requests.
    #[error("the backend published {0} answers to {1} requests")]
    TooMany(u32, u32),
    /// A page without persistent grants that is still mapped.
    #[error("the backend still has grant {0} mapped")]
    StillMapped(u32),
}

/// A request's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Done {
    /// What the sender gave with the request.
    pub cookie: u64,
    /// The operation in the answer.
    pub operation: u8,
    /// The status in the answer.
    pub status: i16,
    /// Bytes of data that the request had.
    pub len: u32,
}

#[derive(Clone, Copy, Debug)]
struct Granted {
    page: u32,
    gref: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Shadow {
    cookie: u64,
    /// Counts uses, in the upper part of the id.
    uses: u64,
    len: u32,
    segments: u16,
    list_pages: u16,
    operation: u8,
    busy: bool,
}

/// How a request's data lies in pages.
#[derive(Clone, Copy)]
enum Shape<'a> {
    /// Full pages, and one that is begun.
    Pages(u32),
    /// First and last sector in each page.
    Parts(&'a [(u8, u8)]),
}

impl Shape<'_> {
    fn segments(self) -> usize {
        match self {
            Shape::Pages(len) => (len as usize).div_ceil(PAGE),
            Shape::Parts(parts) => parts.len(),
        }
    }

    fn bytes(self) -> usize {
        match self {
            Shape::Pages(len) => len as usize,
            Shape::Parts(parts) => parts
                .iter()
                .filter_map(|&(first, last)| Segment::new(0, first, last).sectors())
                .map(|n| (n * SECTOR) as usize)
                .sum(),
        }
    }

    fn sectors(self, i: usize) -> (u8, u8) {
        match self {
            Shape::Pages(len) => {
                let left = len / SECTOR - i as u32 * PER_PAGE;
                (0, left.min(PER_PAGE) as u8 - 1)
            }
            Shape::Parts(parts) => parts[i],
        }
    }
}

/// The guest's end of a ring.
#[derive(Debug)]
pub struct Frontend<E> {
    setup: Setup,
    memory: RegionRing,
    region: Arc<Region>,
    table: Arc<GrantTable>,
    events: E,
    req_prod: u32,
    published: u32,
    rsp_cons: u32,
    /// Answers seen: up to here they may be read.
    rsp_seen: u32,
    /// The event that was last asked for.
    rsp_event: u32,
    shadows: Box<[Shadow]>,
    free: Vec<u16>,
    /// Pages not in use; those with a live grant at the front.
    pool: VecDeque<Granted>,
    grefs: Vec<u32>,
    /// Pages of each request under way: its data, then its lists.
    used: Box<[Granted]>,
    parts: Box<[Segment]>,
    dead: Option<Dead>,
    events_sent: u64,
}

impl<E: EventChannel> Frontend<E> {
    /// A frontend with a fresh ring. `events` reaches the backend.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn new(setup: Setup, events: E) -> Result<Frontend<E>, dma::Error> {
        assert!(setup.order <= MAX_ORDER, "ring order");
        let most = INDIRECT_PAGES * SEGMENTS_PER_PAGE;
        assert!((1..=most).contains(&usize::from(setup.max_segments)), "segments per request");
        let slots = setup.abi.slots(setup.order);
        let each = pages_each(&setup);
        let ring_pages = 1 << setup.order;
        let data_pages = slots * each as u32;
        let region = Region::new_best(PAGE * (ring_pages + data_pages as usize))?;
        let memory = RegionRing::new(region.clone(), 0, setup.order);
        let memory = memory.expect("the region was made for it");
        memory.store32(REQ_PROD, setup.start, Ordering::Relaxed);
        memory.store32(RSP_PROD, setup.start, Ordering::Relaxed);
        memory.store32(REQ_EVENT, setup.start.wrapping_add(1), Ordering::Relaxed);
        memory.store32(RSP_EVENT, setup.start.wrapping_add(1), Ordering::Release);
        let none = Granted { page: 0, gref: NO_GRANT };
        let pages =
            (0..data_pages).map(|p| Granted { page: ring_pages as u32 + p, gref: NO_GRANT });
        Ok(Frontend {
            setup,
            memory,
            region,
            table: GrantTable::new(RESERVED_GRANTS + data_pages),
            events,
            req_prod: setup.start,
            published: setup.start,
            rsp_cons: setup.start,
            rsp_seen: setup.start,
            rsp_event: setup.start.wrapping_add(1),
            shadows: vec![Shadow::default(); slots as usize].into_boxed_slice(),
            free: (0..slots as u16).rev().collect(),
            pool: pages.collect(),
            grefs: (RESERVED_GRANTS..RESERVED_GRANTS + data_pages).rev().collect(),
            used: vec![none; slots as usize * each].into_boxed_slice(),
            parts: vec![Segment::default(); slots as usize * each].into_boxed_slice(),
            dead: None,
            events_sent: 0,
        })
    }

    /// The same with another way to the backend.
    pub fn with_events(mut self, events: E) -> Frontend<E> {
        self.events = events;
        self
    }

    /// The way to the backend.
    pub fn events(&self) -> &E {
        &self.events
    }

    /// The ring's pages, for the backend.
    pub fn ring(&self) -> RegionRing {
        self.memory.clone()
    }

    /// The ring's memory, for a backend whose requests are kept as those of guests are: see
    /// [`KeptRing`].
    ///
    /// # Errors
    /// If there is no memory for that.
    pub fn kept_ring(&self) -> Result<KeptRing<RegionRing>, dma::Error> {
        let bytes = KeptRing::<RegionRing>::record_bytes(self.setup.abi, self.setup.order);
        let record = Region::new(bytes, PageSize::Small)?;
        Ok(KeptRing::new(self.ring(), record, self.setup.abi, self.setup.order, 0))
    }

    /// A way to the granted pages, for the backend.
    pub fn grants(&self) -> LocalGrants {
        LocalGrants::new(self.table.clone(), self.region.clone())
    }

    /// What is granted.
    pub fn table(&self) -> &Arc<GrantTable> {
        &self.table
    }

    /// Most bytes that one request can hold.
    pub fn max_bytes(&self) -> u32 {
        u32::from(self.setup.max_segments) * PAGE as u32
    }

    /// How many more requests can be sent now.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Requests sent and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.shadows.len() - self.free.len()
    }

    /// Events sent so far.
    pub fn events_sent(&self) -> u64 {
        self.events_sent
    }

    /// Why the device was given up, if it was.
    pub fn dead(&self) -> Option<Dead> {
        self.dead
    }

    /// Reads `len` bytes, whole sectors.
    ///
    /// # Errors
    /// If the request cannot be sent now, or ever.
    pub fn read(&mut self, cookie: u64, sector: u64, len: u32) -> Result<(), Unsent> {
        self.send_data(cookie, READ, sector, Shape::Pages(len), None)
    }

    /// Writes `data`, whole sectors.
    ///
    /// # Errors
    /// If the request cannot be sent now, or ever.
    pub fn write(&mut self, cookie: u64, sector: u64, data: &[u8]) -> Result<(), Unsent> {
        self.send_data(cookie, WRITE, sector, whole(data)?, Some(data))
    }

    /// Reads into parts of pages: the first and last sector in each.
    ///
    /// # Errors
    /// If the request cannot be sent now, or ever.
    pub fn read_parts(
        &mut self,
        cookie: u64,
        sector: u64,
        parts: &[(u8, u8)],
    ) -> Result<(), Unsent> {
        self.send_data(cookie, READ, sector, Shape::Parts(parts), None)
    }

    /// Writes from parts of pages: the first and last sector in each.
    ///
    /// # Errors
    /// If the request cannot be sent now, or ever.
    pub fn write_parts(
        &mut self,
        cookie: u64,
        sector: u64,
        parts: &[(u8, u8)],
        data: &[u8],
    ) -> Result<(), Unsent> {
        self.send_data(cookie, WRITE, sector, Shape::Parts(parts), Some(data))
    }

    /// Flushes; with data, which may be empty, flushes before it is written.
    ///
    /// # Errors
    /// If the request cannot be sent now, or ever.
    pub fn flush(&mut self, cookie: u64, sector: u64, data: &[u8]) -> Result<(), Unsent> {
        self.send_data(cookie, FLUSH_DISKCACHE, sector, whole(data)?, Some(data))
    }

    /// A barrier, with data, which may be empty.
    ///
    /// # Errors
    /// If the request cannot be sent now, or ever.
    pub fn barrier(&mut self, cookie: u64, sector: u64, data: &[u8]) -> Result<(), Unsent> {
        self.send_data(cookie, WRITE_BARRIER, sector, whole(data)?, Some(data))
    }

    /// Discards `count` sectors.
    ///
    /// # Errors
    /// If the request cannot be sent now.
    pub fn discard(&mut self, cookie: u64, sector: u64, count: u64) -> Result<(), Unsent> {
        let shadow = self.take_shadow(cookie, DISCARD)?;
        self.put(Head::direct(DISCARD, 0, self.id(shadow), sector, count), &[]);
        Ok(())
    }

    fn id(&self, shadow: u16) -> u64 {
        self.shadows[usize::from(shadow)].uses << 16 | u64::from(shadow)
    }

    fn take_shadow(&mut self, cookie: u64, operation: u8) -> Result<u16, Unsent> {
        if let Some(dead) = self.dead {
            return Err(dead.into());
        }
        let index = self.free.pop().ok_or(Unsent::Full)?;
        let shadow = &mut self.shadows[usize::from(index)];
        let uses = shadow.uses.wrapping_add(1) & 0xffff_ffff_ffff;
        *shadow = Shadow { cookie, uses, operation, busy: true, ..Shadow::default() };
        Ok(index)
    }

    fn put(&mut self, head: Head, tail: &[u64]) {
        self.setup.abi.store_request(&self.memory, self.req_prod, head, tail);
        self.req_prod = self.req_prod.wrapping_add(1);
    }

    fn send_data(
        &mut self,
        cookie: u64,
        operation: u8,
        sector: u64,
        shape: Shape<'_>,
        data: Option<&[u8]>,
    ) -> Result<(), Unsent> {
        let count = shape.segments();
        let most = match operation {
            READ | WRITE => usize::from(self.setup.max_segments),
            _ => DIRECT_SEGMENTS,
        };
        let empty = count == 0 && matches!(operation, READ | WRITE);
        let odd = matches!(shape, Shape::Pages(l) if !l.is_multiple_of(SECTOR));
        if count > most || empty || odd || data.is_some_and(|d| d.len() != shape.bytes()) {
            return Err(Unsent::Shape);
        }
        let index = self.take_shadow(cookie, operation)?;
        let base = usize::from(index) * pages_each(&self.setup);
        let mut len = 0;
        for i in 0..count {
            let (first, last) = shape.sectors(i);
            let granted = self.grant_page(operation != READ);
            let segment = Segment::new(granted.gref, first, last);
            let bytes = segment.sectors().map_or(0, |n| n * SECTOR);
            if let Some(data) = data {
                let at = granted.page as usize * PAGE + segment.offset() as usize;
                self.region.write(at, &data[len..len + bytes as usize]);
            }
            len += bytes as usize;
            self.used[base + i] = granted;
            self.parts[base + i] = segment;
        }
        let mut lists = 0;
        let id = self.id(index);
        if count <= DIRECT_SEGMENTS {
            let mut words = [0; DIRECT_SEGMENTS];
            for (word, part) in words.iter_mut().zip(&self.parts[base..base + count]) {
                *word = part.0;
            }
            let head = Head::direct(operation, count as u8, id, sector, words[0]);
            self.put(head, &words[1..count.max(1)]);
        } else {
            let mut grefs = [0; INDIRECT_PAGES];
            lists = count.div_ceil(SEGMENTS_PER_PAGE);
            for (l, gref) in grefs.iter_mut().enumerate().take(lists) {
                let granted = self.grant_page(true);
                let at = granted.page as usize * PAGE;
                let from = l * SEGMENTS_PER_PAGE;
                for i in from..count.min(from + SEGMENTS_PER_PAGE) {
                    let word = self.parts[base + i].0;
                    self.region.write_words(at + 8 * (i - from), &[word]);
                }
                self.used[base + count + l] = granted;
                *gref = granted.gref;
            }
            let pair =
                |i: usize| u64::from(grefs[i]) | u64::from(*grefs.get(i + 1).unwrap_or(&0)) << 32;
            let head = Head::indirect(operation, count as u16, id, sector, grefs[0]);
            self.put(head, &[pair(1), pair(3), pair(5), pair(7)]);
        }
        let shadow = &mut self.shadows[usize::from(index)];
        shadow.len = len as u32;
        shadow.segments = count as u16;
        shadow.list_pages = lists as u16;
        Ok(())
    }

    /// A page that the backend may access: one that it has mapped already, if there is one.
    fn grant_page(&mut self, read_only: bool) -> Granted {
        let mut granted = self.pool.pop_front().expect("a page for each segment of each request");
        if granted.gref == NO_GRANT {
            granted.gref = self.grefs.pop().expect("a reference for each page");
            let read_only = read_only && !self.setup.persistent;
            self.table.grant(granted.gref, granted.page, read_only);
        }
        granted
    }

    /// Takes a page back: to the front if the backend keeps it mapped, else without its grant.
    fn return_page(&mut self, mut granted: Granted) -> Result<(), Dead> {
        if self.setup.persistent && self.table.mapped(granted.gref) {
            self.pool.push_front(granted);
            return Ok(());
        }
        let gref = granted.gref;
        if !self.table.end_access(gref) {
            // Mapped in this moment, or although it must not be.
            self.pool.push_front(granted);
            return if self.setup.persistent { Ok(()) } else { Err(Dead::StillMapped(gref)) };
        }
        self.grefs.push(gref);
        granted.gref = NO_GRANT;
        self.pool.push_back(granted);
        Ok(())
    }

    /// Publishes what was sent, and sends an event if the backend wants one. Returns whether.
    pub fn push(&mut self) -> bool {
        let old = self.published;
        if old == self.req_prod || self.dead.is_some() {
            return false;
        }
        self.published = self.req_prod;
        self.memory.store32(REQ_PROD, self.req_prod, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = self.memory.load32(REQ_EVENT, Ordering::Relaxed);
        let wanted = notify(old, self.req_prod, event);
        if wanted {
            self.events_sent += 1;
            self.events.notify();
        }
        wanted
    }

    /// Takes one answer. The data of a read that succeeded is copied into `into`, as far as that
    /// is long enough. When none is left, an event is asked for before the last look.
    ///
    /// # Errors
    /// If the backend breaks the protocol: the device is given up.
    pub fn reap(&mut self, into: &mut [u8]) -> Result<Option<Done>, Dead> {
        if let Some(dead) = self.dead {
            return Err(dead);
        }
        let found = self.next_answer(into);
        if let Err(dead) = found {
            self.dead = Some(dead);
        }
        found
    }

    fn look(&mut self) -> Result<bool, Dead> {
        let seen = self.memory.load32(RSP_PROD, Ordering::Acquire);
        let (answers, requests) =
            (seen.wrapping_sub(self.rsp_cons), self.published.wrapping_sub(self.rsp_cons));
        if answers > requests {
            return Err(Dead::TooMany(answers, requests));
        }
        self.rsp_seen = seen;
        Ok(answers > 0)
    }

    fn next_answer(&mut self, into: &mut [u8]) -> Result<Option<Done>, Dead> {
        if self.rsp_seen == self.rsp_cons && !self.look()? {
            let event = self.rsp_cons.wrapping_add(1);
            if self.rsp_event == event {
                return Ok(None);
            }
            self.rsp_event = event;
            self.memory.store32(RSP_EVENT, event, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if !self.look()? {
                return Ok(None);
            }
        }
        let r = self.setup.abi.load_response(&self.memory, self.rsp_cons);
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        let index = r.id as u16;
        let shadow = self.shadows.get(usize::from(index)).copied().unwrap_or_default();
        if !shadow.busy || r.id != self.id(index) {
            return Err(Dead::UnknownId(r.id));
        }
        if r.operation != shadow.operation {
            return Err(Dead::WrongOperation(shadow.operation, r.operation));
        }
        let base = usize::from(index) * pages_each(&self.setup);
        let segments = usize::from(shadow.segments);
        if r.operation == READ && r.status == crate::abi::OKAY {
            let mut at = 0;
            for i in base..base + segments {
                let part = self.parts[i];
                let Some(to) = into.get_mut(at..at + part.bytes() as usize) else { break };
                let from = self.used[i].page as usize * PAGE + part.offset() as usize;
                self.region.read(from, to);
                at += to.len();
            }
        }
        for i in base..base + segments + usize::from(shadow.list_pages) {
            self.return_page(self.used[i])?;
        }
        self.shadows[usize::from(index)].busy = false;
        self.free.push(index);
        Ok(Some(Done {
            cookie: shadow.cookie,
            operation: r.operation,
            status: r.status,
            len: shadow.len,
        }))
    }
}

fn whole(data: &[u8]) -> Result<Shape<'_>, Unsent> {
    u32::try_from(data.len()).map(Shape::Pages).map_err(|_| Unsent::Shape)
}

/// Pages that a request can need.
fn pages_each(setup: &Setup) -> usize {
    let segments = usize::from(setup.max_segments);
    let lists = if segments > DIRECT_SEGMENTS { segments.div_ceil(SEGMENTS_PER_PAGE) } else { 0 };
    segments.max(DIRECT_SEGMENTS) + lists
}
