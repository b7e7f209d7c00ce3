//! Ends: of a reactor with askers, of a core with portals, of an image with frontends.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use block::{
    Completion, Flags, Frontend, HasWork, Layer, MemQueue, Op, Port, RawImage, Status, Submit,
};
use dma::{PageSize, Region};
use reactor::{Clock, Core, Policy, Portal, PortalFrontend, PortalRequest, Reactor, Start};

const SIZE: u64 = 1 << 20;

/// Measured once: that takes a while.
static CLOCK: LazyLock<Clock> = LazyLock::new(Clock::real);

fn core<F: Frontend>() -> Result<Core<MemQueue, RawImage, F>, String> {
    let mut core = Core::new(CLOCK.clone()).map_err(|e| e.to_string())?;
    let leaf = core.add_leaf(MemQueue::new(SIZE, 512).map_err(|e| e.to_string())?)?;
    add_image(&mut core, leaf);
    Ok(core)
}

fn add_image<F: Frontend>(core: &mut Core<MemQueue, RawImage, F>, leaf: u16) -> usize {
    let port = Port { leaf, unit: 0 };
    core.add_image(|owner, leaves| RawImage::new(leaves, port, SIZE, owner).ok_or("no unit"))
        .unwrap()
}

fn start() -> Reactor<MemQueue, RawImage, PortalFrontend> {
    Reactor::start("test", Start { cpu: None, policy: Policy::Adaptive }, core).unwrap()
}

fn read(id: u64, region: &Region) -> PortalRequest {
    let seg = region.seg(0, 512);
    PortalRequest { id, op: Op::Read, flags: Flags::NONE, offset: 0, len: 512, seg }
}

/// A portal with room for 4, attached to image 0 of a core turned by hand.
fn attach(core: &mut Core<MemQueue, RawImage, PortalFrontend>) -> (Portal, Arc<Region>) {
    let region = Region::new(4096, PageSize::Small).unwrap();
    let (portal, end) = Portal::new(4, vec![region.clone()], core.wake()).unwrap();
    core.add_frontend(0, |owner, _| Ok(end(owner))).unwrap();
    (portal, region)
}

/// Runs `f` on a thread of its own, which may hang.
fn apart<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (send, receive) = channel();
    std::thread::spawn(move || send.send(f()));
    receive
}

fn soon<T>(from: &Receiver<T>) -> T {
    from.recv_timeout(Duration::from_secs(10)).expect("it hangs")
}

#[test]
fn whoever_asks_a_reactor_that_has_ended_is_told() {
    let reactor = start();
    let mailbox = reactor.mailbox().clone();
    reactor.stop();
    assert_eq!(soon(&apart(move || mailbox.ask(|_| 1))), None);
}

#[test]
fn whoever_asks_while_a_reactor_ends_gets_an_answer_or_is_told() {
    for _ in 0..50 {
        let reactor = start();
        let askers: Vec<_> = (0..3)
            .map(|_| reactor.mailbox().clone())
            .map(|m| apart(move || while m.ask(|_| ()).is_some() {}))
            .collect();
        reactor.stop();
        askers.iter().for_each(soon);
    }
}

#[test]
fn requests_of_a_portal_whose_reactor_ends_are_answered() {
    let mut core = core().unwrap();
    let (mut portal, region) = attach(&mut core);
    portal.send(read(1, &region)).unwrap();
    core.turn();
    // Taken, answered by the leaf, not handed out; and one that is not even taken.
    portal.send(read(2, &region)).unwrap();
    drop(core);
    let answers = apart(move || {
        let mut all = [portal.wait(), portal.wait()];
        all.sort_by_key(|r| r.id);
        // It is not the last word either.
        portal.arm();
        assert!(!portal.has_reply());
        portal.disarm();
        (all.iter().map(|r| r.status).collect::<Vec<_>>(), portal.call(read(3, &region)))
    });
    assert_eq!(soon(&answers), (vec![Status::Gone; 2], Status::Gone));
}

#[test]
fn requests_of_a_portal_are_answered_however_the_end_falls() {
    for round in 0..200u64 {
        let reactor = start();
        let region = Region::new(4096, PageSize::Small).unwrap();
        let wake = reactor.mailbox().ask(|c| c.wake()).unwrap();
        let (mut portal, end) = Portal::new(4, vec![region.clone()], wake).unwrap();
        reactor.mailbox().ask(|c| c.add_frontend(0, |owner, _| Ok(end(owner)))).unwrap().unwrap();
        let client = apart(move || {
            let mut id = 0;
            loop {
                while portal.send(read(id, &region)).is_ok() {
                    id += 1;
                }
                if portal.wait().status == Status::Gone {
                    break;
                }
            }
            while portal.in_flight() > 0 {
                assert_eq!(portal.wait().status, Status::Gone);
            }
        });
        std::thread::sleep(Duration::from_micros(round * 3));
        reactor.stop();
        soon(&client);
    }
}

#[test]
#[should_panic(expected = "reply to nothing")]
fn waiting_for_nothing_panics() {
    let mut core = core().unwrap();
    attach(&mut core).0.wait();
}

#[test]
fn a_frontend_never_comes_to_stand_on_another_image() {
    let mut core = core().unwrap();
    let (mut portal, region) = attach(&mut core);
    Layer::<MemQueue>::close(core.image(0).unwrap());
    while core.remove_closed_image(0).is_none() {
        core.turn();
    }
    assert_eq!(add_image(&mut core, 0), 0, "the next image has the same place");
    portal.send(read(1, &region)).unwrap();
    let reply = std::iter::repeat_with(|| core.turn()).take(10).find_map(|_| portal.receive());
    assert_eq!(reply.unwrap().status, Status::Gone);
    assert_eq!(core.frontend_count(), 0);
}

#[test]
fn a_raw_image_takes_nothing_once_it_closes() {
    let mut core = core().unwrap();
    let (mut portal, region) = attach(&mut core);
    Layer::<MemQueue>::close(core.image(0).unwrap());
    portal.send(read(1, &region)).unwrap();
    for _ in 0..10 {
        core.turn();
    }
    assert!(portal.receive().is_none());
    assert!(core.remove_closed_image(0).is_some());
    core.turn();
    assert_eq!(portal.receive().map(|r| r.status), Some(Status::Gone));
}

/// A frontend that always has something to do, until it is told to close.
struct Busy(Arc<AtomicBool>);

impl Frontend for Busy {
    fn regions(&self) -> Vec<Arc<Region>> {
        Vec::new()
    }

    fn complete(&mut self, _done: Completion) -> bool {
        false
    }

    fn poll<D: Submit>(&mut self, _disk: &mut D, _now: u64) -> bool {
        true
    }

    fn arm(&mut self) -> HasWork {
        HasWork::Yes
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn closed(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[test]
fn frontends_that_come_and_go_beside_a_busy_one_do_not_pile_up() {
    let mut core = core::<Busy>().unwrap();
    core.add_frontend(0, |_, _| Ok(Busy(Arc::default()))).unwrap();
    let mailbox = core.mailbox();
    for _ in 0..20 {
        mailbox.post(|core| {
            core.add_frontend(0, |_, _| Ok(Busy(Arc::new(true.into())))).unwrap();
        });
        assert!(core.turn());
    }
    assert!(core.frontend_count() <= 2, "{} frontends", core.frontend_count());
}
