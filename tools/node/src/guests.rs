//! [`Guests`]: rings of Xen guests on reactors. What [`blkif`] asks of the hypervisor is done by
//! [`xen`] here: the pages of a ring are one mapping, persistent grants are mapped by a thread, other
//! pages are copied by the hypervisor, and events are sent by a thread or by the reactor itself.
//!
//! Control path, but for the calls that a [`Backend`] makes on its reactor.

use std::cell::RefCell;
use std::hash::Hasher as _;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blkif::grants::{CopyOp, GrantError, Mapped, Page};
use blkif::negotiate::{Agreed, Offer, Queue};
use blkif::{Backend, EventChannel, Grants, KeptRing, RingMemory, Stats};
use block::{Completion, HasWork, Submit};
use dma::Region;
use fnv::FnvHasher;
use reactor::Mailbox;
use xen::evtchn::{Bell, Events, Listener, Notifier};
use xen::gntdev::{Gntdev, Mapper, Mapping, Pages, Settling};

use crate::copies::{Copies, Share};
use crate::{Door, Error, Frontend, ReactorCore, Reactors};

/// Pages that all guests together may have mapped for good. A domain of Xen has handles for twice as
/// many, of which one of the kind PV needs two for a page.
const MOST_PAGES: usize = 120_000;

/// How long the notifier looks for work before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// Requests of more than a page that a ring has under way at a time: 1 MiB with what is offered.
const LARGE: u16 = 8;

/// Between two looks whether a ring has come to its end.
const LOOK: Duration = Duration::from_micros(200);

/// How guests are told that there are responses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notify {
    /// By the reactors: a system call for each batch that a guest wants to hear of.
    Direct,
    /// By a thread that sleeps when there is nothing to do, and that reactors then have to wake.
    Thread,
    /// By a thread that never sleeps and takes a processor for itself: reactors make no system call.
    Spinning,
}

/// The way to guests of Xen, for the reactors of one process.
pub struct Guests {
    rings: Gntdev,
    mapper: Mapper,
    notifier: Option<Notifier>,
    /// By number of the reactor.
    reactors: Vec<OfReactor>,
}

/// A reactor's own devices.
struct OfReactor {
    events: Arc<Events>,
    listener: Arc<Listener>,
    copies: Gntdev,
}

fn fail(e: impl std::fmt::Display) -> Error {
    Error::node("xen", e.to_string())
}

impl Guests {
    /// By the kernel's devices.
    ///
    /// # Errors
    /// If there is no Xen, its drivers are not there or may not be used, or threads are short.
    pub fn open(reactors: &Reactors, notify: Notify) -> Result<Guests, Error> {
        Guests::by(reactors, notify, Gntdev::open, Events::open)
    }

    /// By devices that are opened so.
    ///
    /// # Errors
    /// As [`Guests::open`].
    pub fn by(
        reactors: &Reactors,
        notify: Notify,
        gntdev: impl Fn() -> Result<Gntdev, xen::Error>,
        events: impl Fn() -> Result<Arc<Events>, xen::Error>,
    ) -> Result<Guests, Error> {
        let notifier = match notify {
            Notify::Direct => None,
            Notify::Thread => Some(Notifier::start(Some(SPIN), None).map_err(fail)?),
            Notify::Spinning => Some(Notifier::start(None, None).map_err(fail)?),
        };
        let own = reactors.iter().map(|reactor| {
            let wake = reactor.mailbox().ask(|core| core.wake());
            let wake = wake.ok_or_else(|| fail("a reactor has ended"))?;
            let events = events().map_err(fail)?;
            let listener = Arc::new(Listener::start(events.clone(), wake).map_err(fail)?);
            Ok(OfReactor { events, listener, copies: gntdev().map_err(fail)? })
        });
        let own = own.collect::<Result<Vec<_>, Error>>()?;
        let mapper = Mapper::start(gntdev().map_err(fail)?, MOST_PAGES).map_err(fail)?;
        Ok(Guests { rings: gntdev().map_err(fail)?, mapper, notifier, reactors: own })
    }

    /// Connects to all rings of a device, and serves them: the first one on the image's home reactor,
    /// the others on the further ones in turn. After an error nothing of it is left.
    ///
    /// # Errors
    /// If the guest does not grant what it says, or memory is short.
    pub fn connect(
        &self,
        door: &Door,
        domid: u16,
        agreed: &Agreed,
        offer: &Offer,
        records: Records<'_>,
    ) -> Result<Rings, Error> {
        let mut rings = Rings { list: Vec::new() };
        for number in 0..agreed.queues.len() {
            match self.connect_one(door, domid, agreed, offer, number, &records) {
                Ok(ring) => rings.list.push(ring),
                Err(e) => {
                    rings.close();
                    return Err(e);
                }
            }
        }
        Ok(rings)
    }

    fn connect_one(
        &self,
        door: &Door,
        domid: u16,
        agreed: &Agreed,
        offer: &Offer,
        number: usize,
        records: &Records<'_>,
    ) -> Result<Ring, Error> {
        let at = door.entry(number);
        let own = &self.reactors[at.reactor];
        let queue = &agreed.queues[number];
        let of_queue = |e: &dyn std::fmt::Display| {
            Error::node(door.name(), format!("ring {number} of domain {domid}: {e}"))
        };
        let memory = self.rings.map(domid, &queue.ring_refs).map_err(|e| of_queue(&e))?;
        let memory = Arc::new(memory);
        let local = own.events.bind(domid, queue.event_channel).map_err(|e| of_queue(&e))?;
        let port = Port { events: own.events.clone(), local };
        let mut config = agreed.config(offer, 0);
        // A guest has other requests under way beside the large ones, and a host many guests.
        config.large_buffers = config.large_buffers.min(LARGE);
        let pages = self.mapper.pages(domid, config.persistent_pages);
        let settling = pages.settling();
        let bell = match &self.notifier {
            Some(notifier) => {
                let bell = notifier.bell(&own.events, local);
                Sender::Thread(bell.ok_or_else(|| of_queue(&"too many rings"))?)
            }
            None => Sender::Direct(own.events.clone(), local),
        };
        let device = own.copies.clone();
        let (abi, order) = (config.abi, config.order);
        let bytes = KeptRing::<RingPages>::record_bytes(abi, order).next_multiple_of(4096);
        let record = (records.open)(number, bytes as u64).map_err(|e| of_queue(&e))?;
        let identity = identity(queue);
        let ring_pages = RingPages { mapping: memory.clone(), mask: abi.slots(order) - 1 };
        if records.of_the_dead && !KeptRing::<RingPages>::is_of(&record, abi, order, identity) {
            return Err(of_queue(&"there is no record of what the daemon that died took from it"));
        }
        let ring = KeptRing::new(ring_pages, record, abi, order, identity);
        let listener = own.listener.clone();
        let (mailbox, image) = (at.mailbox.clone(), at.image);
        let added = mailbox.ask(move |core: &mut ReactorCore| {
            let mut stats = None;
            // All rings of a reactor have these in common.
            let copies = core.frontends().find_map(|f| match f {
                Frontend::Guest(guest) => Some(guest.copies.clone()),
                _ => None,
            });
            let copies = copies.unwrap_or_else(|| Copies::new(device));
            let index = core.add_frontend(image, |owner, _| {
                let config = blkif::Config { owner, ..config };
                let share = Share::new(copies.clone(), domid, config.most_copies());
                let grants = GuestGrants { share, pages };
                let backend = Backend::new(config, ring, grants, bell);
                let backend = backend.map_err(|e| e.to_string())?;
                stats = Some(backend.stats());
                Ok(Frontend::Guest(Box::new(GuestRing { backend, listener, copies })))
            })?;
            stats.map(|s| (index, s)).ok_or_else(|| "no ring was made".to_owned())
        });
        let added = added.unwrap_or_else(|| Err("the reactor has ended".into()));
        let (index, stats) = added.map_err(|e| of_queue(&e))?;
        Ok(Ring { mailbox, index, stats, settling, _port: port, _memory: memory })
    }
}

/// Where the records of a device's rings are.
pub struct Records<'a> {
    /// Memory of so many bytes that outlives the process, for the ring of this number.
    pub open: &'a dyn Fn(usize, u64) -> Result<Arc<Region>, String>,
    /// Another process served the rings and died: its records must be there.
    pub of_the_dead: bool,
}

/// Tells a ring from others of the same device: by its grants and its port.
fn identity(queue: &Queue) -> u64 {
    let mut hasher = FnvHasher::default();
    for word in queue.ring_refs.iter().chain([&queue.event_channel]) {
        hasher.write(&word.to_be_bytes());
    }
    hasher.finish()
}

/// A local port; unbound when it goes.
struct Port {
    events: Arc<Events>,
    local: u32,
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Err(e) = self.events.unbind(self.local) {
            log::warn!("{e}");
        }
    }
}

struct Ring {
    mailbox: Mailbox<ReactorCore>,
    /// Its frontend's index in the core.
    index: usize,
    stats: Arc<Stats>,
    settling: Settling,
    // Last, when the reactor has nothing of it any more.
    _port: Port,
    _memory: Arc<Mapping>,
}

/// The rings of a device. To be ended by [`Rings::close`].
pub struct Rings {
    list: Vec<Ring>,
}

impl Rings {
    /// Takes no more requests from them; those that were taken are answered.
    pub fn stop(&self) {
        for ring in &self.list {
            let (index, stats) = (ring.index, ring.stats.clone());
            ring.mailbox.post(move |core: &mut ReactorCore| {
                // The place may be another's by now.
                if let Some(Frontend::Guest(guest)) = core.frontend(index)
                    && Arc::ptr_eq(&guest.backend.stats(), &stats)
                {
                    guest.backend.stop();
                }
            });
        }
    }

    /// Stops them, waits for what was taken to be answered, and gives all of the guest's pages and
    /// ports back.
    pub fn close(self) {
        self.stop();
        for ring in self.list {
            let mut waits = 0u64;
            while !ring.stats.detached() && ring.mailbox.ask(|_| ()).is_some() {
                waits += 1;
                if waits.is_multiple_of(50_000) {
                    log::warn!("a guest's ring still has requests in flight");
                }
                std::thread::sleep(LOOK);
            }
            ring.settling.wait(None);
        }
    }

    /// Whether one was given up, since the guest broke the protocol.
    pub fn broken(&self) -> bool {
        self.stats().any(|stats| stats.ring_stops.get() > 0)
    }

    /// Counters of each, which stay readable when the rings have gone.
    pub fn stats(&self) -> impl Iterator<Item = &Arc<Stats>> {
        self.list.iter().map(|r| &r.stats)
    }
}

/// A ring of a guest on a reactor.
pub struct GuestRing {
    backend: Backend<KeptRing<RingPages>, GuestGrants, Sender>,
    listener: Arc<Listener>,
    copies: Rc<RefCell<Copies>>,
}

impl block::Frontend for GuestRing {
    fn regions(&self) -> Vec<Arc<Region>> {
        self.backend.regions()
    }

    #[inline]
    fn is_quiet(&self, now: u64) -> bool {
        self.backend.is_quiet(now)
    }

    fn complete(&mut self, done: Completion) -> bool {
        self.backend.complete(done)
    }

    #[inline]
    fn complete_run(&mut self, done: &[Completion]) -> (usize, usize) {
        self.backend.complete_run(done)
    }

    #[inline]
    fn poll<D: Submit>(&mut self, disk: &mut D, now: u64) -> bool {
        self.backend.poll(disk, now)
    }

    fn arm(&mut self) -> HasWork {
        // First: what comes from here on has to wake the reactor.
        self.listener.rearm();
        self.backend.arm()
    }

    fn in_flight(&self) -> usize {
        self.backend.in_flight()
    }

    fn closed(&self) -> bool {
        self.backend.closed()
    }
}

/// The pages of a ring.
#[derive(Debug)]
struct RingPages {
    mapping: Arc<Mapping>,
    mask: u32,
}

impl RingMemory for RingPages {
    type Entry = ();

    fn entry(&self, _slot: u16) {}

    #[inline]
    fn bytes(&self) -> usize {
        self.mapping.bytes()
    }

    #[inline]
    fn mask(&self) -> u32 {
        self.mask
    }

    #[inline]
    fn load32(&self, offset: usize, order: Ordering) -> u32 {
        self.mapping.load32(offset, order)
    }

    #[inline]
    fn store32(&self, offset: usize, value: u32, order: Ordering) {
        self.mapping.store32(offset, value, order);
    }

    #[inline]
    fn load64s<const N: usize>(&self, offset: usize) -> [u64; N] {
        self.mapping.load64s(offset)
    }

    #[inline]
    fn store64s<const N: usize>(&self, offset: usize, words: &[u64; N]) {
        self.mapping.store64s(offset, words);
    }
}

/// The pages that a guest grants.
#[derive(Debug)]
struct GuestGrants {
    share: Share,
    pages: Pages,
}

impl Grants for GuestGrants {
    fn attach(&mut self, local: &Arc<Region>) {
        self.share.attach(local);
    }

    fn start_copies(&mut self, ops: &mut Vec<CopyOp>) {
        self.share.start(ops);
    }

    fn end_copies(&mut self, ops: &mut Vec<CopyOp>) -> Result<(), GrantError> {
        self.share.end(ops)
    }

    #[inline]
    fn start_map(&mut self, gref: u32) -> bool {
        self.pages.start_map(gref)
    }

    #[inline]
    fn next_mapped(&mut self) -> Option<Mapped> {
        self.pages.next_mapped().map(|m| Mapped { gref: m.gref, page: m.page.map(Page) })
    }

    fn unmap(&mut self, page: Page) {
        self.pages.unmap(page.0);
    }

    fn settle(&mut self) {
        // Not waited for on a reactor: [`Rings::close`] does.
    }

    #[inline]
    fn read_page(&self, page: Page, offset: u32, local: &Region, at: usize, len: u32) {
        self.pages.read(page.0, offset, local, at, len);
    }

    #[inline]
    fn write_page(&self, page: Page, offset: u32, local: &Region, at: usize, len: u32) {
        self.pages.write(page.0, offset, local, at, len);
    }
}

/// Sends events to a guest.
#[derive(Debug)]
enum Sender {
    Thread(Bell),
    Direct(Arc<Events>, u32),
}

impl EventChannel for Sender {
    #[inline]
    fn notify(&mut self) {
        match self {
            Sender::Thread(bell) => bell.ring(),
            Sender::Direct(events, local) => {
                // It cannot fail while the port is bound; a guest that is gone hears nothing.
                if let Err(e) = events.notify(*local) {
                    log::debug!("{e}");
                }
            }
        }
    }
}
