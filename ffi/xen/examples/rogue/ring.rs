//! [`Ring`]: the frontend's end of a ring, as the header of the protocol has it, without any of the care
//! that a driver takes. 64-bit layout.

use std::sync::atomic::{Ordering, fence};

use reactor::Clock;

use crate::Fault;
use crate::device::PATIENCE_NS;
use crate::guest::{Granted, Ports};

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;
const SLOTS: usize = 64;
const SLOT: usize = 112;

pub(crate) const READ: u8 = 0;
pub(crate) const WRITE: u8 = 1;
pub(crate) const BARRIER: u8 = 2;
pub(crate) const FLUSH: u8 = 3;
pub(crate) const DISCARD: u8 = 5;
pub(crate) const INDIRECT: u8 = 6;

/// What stands in a slot.
pub(crate) type Request = [u64; 14];

/// A response: whose, of what operation, how it ended.
pub(crate) type Response = (u64, u8, i16);

/// A part of a page: its grant, the first and the last sector in it.
pub(crate) type Segment = (u32, u8, u8);

pub(crate) fn segment((gref, first, last): Segment) -> u64 {
    u64::from(gref) | u64::from(first) << 32 | u64::from(last) << 40
}

/// A request with its segments in the slot. It says that there are `count` of them.
pub(crate) fn direct(op: u8, count: u8, sector: u64, segments: &[Segment]) -> Request {
    let mut words = [0; 14];
    words[0] = u64::from(op) | u64::from(count) << 8;
    words[2] = sector;
    for (word, &s) in words[3..].iter_mut().zip(segments) {
        *word = segment(s);
    }
    words
}

/// A request with its segments in a granted page.
pub(crate) fn indirect(op: u8, count: u16, sector: u64, page: u32) -> Request {
    let mut words = [0; 14];
    words[0] = u64::from(INDIRECT) | u64::from(op) << 8 | u64::from(count) << 16;
    words[2] = sector;
    words[3] = u64::from(page) << 32;
    words
}

pub(crate) fn discard(sector: u64, count: u64) -> Request {
    let mut words = direct(DISCARD, 0, sector, &[]);
    words[3] = count;
    words
}

pub(crate) struct Ring<'a> {
    pub(crate) pages: Granted,
    pub(crate) port: u32,
    ports: &'a Ports,
    slots: u32,
    req_prod: u32,
    rsp_cons: u32,
}

impl Drop for Ring<'_> {
    fn drop(&mut self) {
        let _ = self.ports.close(self.port);
    }
}

impl Ring<'_> {
    /// A fresh one.
    pub(crate) fn new(pages: Granted, ports: &Ports, port: u32) -> Ring<'_> {
        let slots = 32 * pages.grefs.len() as u32;
        pages.store32(REQ_EVENT, 1);
        pages.store32(RSP_EVENT, 1);
        Ring { pages, port, ports, slots, req_prod: 0, rsp_cons: 0 }
    }

    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    fn at(&self, index: u32) -> usize {
        SLOTS + SLOT * (index & (self.slots - 1)) as usize
    }

    /// Writes a request into the next slot; nobody sees it yet. Its id is the index.
    pub(crate) fn put(&mut self, mut request: Request) {
        request[1] = u64::from(self.req_prod);
        self.put_as_is(request);
    }

    pub(crate) fn put_as_is(&mut self, request: Request) {
        let at = self.at(self.req_prod);
        for (i, word) in request.into_iter().enumerate() {
            self.pages.store32(at + 8 * i, word as u32);
            self.pages.store32(at + 8 * i + 4, (word >> 32) as u32);
        }
        self.req_prod = self.req_prod.wrapping_add(1);
    }

    /// Publishes all that was put.
    pub(crate) fn push(&self) -> Result<(), Fault> {
        self.jump(self.req_prod)
    }

    /// Writes any number where the requests' producer index stands.
    pub(crate) fn jump(&self, index: u32) -> Result<(), Fault> {
        fence(Ordering::SeqCst);
        self.pages.store32(REQ_PROD, index);
        fence(Ordering::SeqCst);
        Ok(self.ports.notify(self.port)?)
    }

    /// Overwrites what only the backend writes, and the index at which it is to send an event.
    pub(crate) fn scribble(&self, value: u32) {
        for at in [REQ_EVENT, RSP_PROD, RSP_EVENT] {
            self.pages.store32(at, value);
        }
    }

    /// The index up to which the backend has answered, as it stands there now.
    pub(crate) fn answered(&self) -> u32 {
        self.pages.load32(RSP_PROD)
    }

    /// How many answers more there are, within so many milliseconds.
    pub(crate) fn more(&self, ms: u32) -> u32 {
        let count = || self.pages.load32(RSP_PROD).wrapping_sub(self.rsp_cons);
        let clock = Clock::real();
        let end = clock.now() + u64::from(ms) * 1_000_000;
        while count() == 0 && clock.now() < end {
            self.pages.store32(RSP_EVENT, self.rsp_cons.wrapping_add(1));
            fence(Ordering::SeqCst);
            if count() == 0 {
                // Perhaps of a port that was closed.
                self.ports.fired(10);
            }
        }
        fence(Ordering::SeqCst);
        count()
    }

    /// Waits until all that was pushed is answered: the answers by id.
    pub(crate) fn take(&mut self) -> Result<Vec<Response>, Fault> {
        let clock = Clock::real();
        let end = clock.now() + PATIENCE_NS;
        let mut all = Vec::new();
        while self.rsp_cons != self.req_prod {
            let (count, due) = (self.more(20), self.req_prod.wrapping_sub(self.rsp_cons));
            if count > due {
                return Err(format!("{count} answers to {due} requests").into());
            }
            if count == 0 && clock.now() > end {
                return Err(format!("{due} requests are not answered").into());
            }
            for _ in 0..count {
                let at = self.at(self.rsp_cons);
                let [low, high, end] = [0, 4, 8].map(|i| self.pages.load32(at + i));
                let id = u64::from(low) | u64::from(high) << 32;
                all.push((id, end as u8, (end >> 16) as i16));
                self.rsp_cons = self.rsp_cons.wrapping_add(1);
            }
        }
        all.sort_unstable();
        Ok(all)
    }

    /// Sends one request and waits for its end.
    pub(crate) fn ask(&mut self, request: Request) -> Result<Response, Fault> {
        self.put(request);
        self.push()?;
        Ok(self.take()?[0])
    }
}
