//! Lodgers: who is let in, when they have to go, and that a sleeping reactor hears them.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use block::{Completion, Frontend, HasWork, MemQueue, Port, RawImage, Submit};
use dma::Region;
use nix::poll::PollFlags;
use reactor::{Clock, Core, Lodger, Policy, Reactor, Start, Turn};

type TestCore = Core<MemQueue, RawImage, Guest>;

/// A guest that wants nothing, or no guest.
struct Guest(bool);

impl Frontend for Guest {
    fn regions(&self) -> Vec<Arc<Region>> {
        Vec::new()
    }

    fn complete(&mut self, _done: Completion) -> bool {
        false
    }

    fn poll<D: Submit>(&mut self, _disk: &mut D, _now: u64) -> bool {
        false
    }

    fn arm(&mut self) -> HasWork {
        HasWork::No
    }

    fn is_guest(&self) -> bool {
        self.0
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn closed(&self) -> bool {
        false
    }
}

/// Sends back what it is sent, and counts how many of its kind there are.
struct Echo(UnixStream, Arc<AtomicU32>);

impl Echo {
    fn pair(count: &Arc<AtomicU32>) -> (UnixStream, Box<Echo>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        theirs.set_nonblocking(true).unwrap();
        count.fetch_add(1, Ordering::SeqCst);
        (ours, Box::new(Echo(theirs, count.clone())))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Lodger for Echo {
    fn turn(&mut self, _now: u64) -> Turn {
        let mut byte = [0];
        match self.0.read(&mut byte) {
            Ok(1) => {
                self.0.write_all(&byte).unwrap();
                Turn::Busy
            }
            Ok(_) => Turn::Leave,
            Err(_) => Turn::Idle,
        }
    }

    fn arm(&mut self) -> HasWork {
        HasWork::No
    }

    fn waits_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        Some((self.0.as_fd(), PollFlags::POLLIN))
    }

    fn heard(&mut self, _events: PollFlags) {}
}

fn core() -> Result<TestCore, String> {
    let mut core = Core::new(Clock::real()).map_err(|e| e.to_string())?;
    let leaf = core.add_leaf(MemQueue::new(1 << 20, 512).map_err(|e| e.to_string())?)?;
    let port = Port { leaf, unit: 0 };
    core.add_image(|owner, leaves| RawImage::new(leaves, port, 1 << 20, owner).ok_or("no unit"))?;
    Ok(core)
}

fn start(policy: Policy) -> Reactor<MemQueue, RawImage, Guest> {
    Reactor::start("test", Start { cpu: None, policy }, core).unwrap()
}

/// Lets so many in; returns their other ends and how many of them stayed.
fn let_in(
    reactor: &Reactor<MemQueue, RawImage, Guest>,
    count: &Arc<AtomicU32>,
    n: usize,
) -> (Vec<UnixStream>, usize) {
    let (ends, lodgers): (Vec<_>, Vec<_>) = (0..n).map(|_| Echo::pair(count)).unzip();
    let stayed = reactor.mailbox().ask(move |core| {
        lodgers.into_iter().for_each(|l| core.lodge(l));
        core.lodger_count()
    });
    (ends, stayed.unwrap())
}

fn echoes(mut end: &UnixStream) -> bool {
    let mut byte = [0];
    end.write_all(b"x").is_ok() && matches!(end.read(&mut byte), Ok(1))
}

#[test]
fn a_sleeping_reactor_hears_them_and_does_not_spin() {
    let count = Arc::default();
    let reactor = start(Policy::Adaptive);
    let (ends, stayed) = let_in(&reactor, &count, 3);
    assert_eq!(stayed, 3);
    for round in 0..50 {
        // It sleeps in between.
        std::thread::sleep(Duration::from_millis(1));
        assert!(echoes(&ends[round % 3]), "round {round}");
    }
    let sleeps = reactor.stats().sleeps.get();
    assert!(sleeps >= 25, "{sleeps} sleeps");
    std::thread::sleep(Duration::from_millis(30));
    let turns = reactor.stats().turns.get();
    std::thread::sleep(Duration::from_millis(150));
    let more = reactor.stats().turns.get() - turns;
    assert!(more < 20, "{more} turns of an idle reactor");
    reactor.stop();
    assert_eq!(count.load(Ordering::SeqCst), 0, "they go when the reactor ends");
}

#[test]
fn one_whose_other_end_closes_leaves() {
    let count = Arc::default();
    let reactor = start(Policy::Adaptive);
    let (mut ends, _) = let_in(&reactor, &count, 2);
    ends.pop();
    assert!(echoes(&ends[0]));
    for _ in 0..5000 {
        if reactor.mailbox().ask(|core| core.lodger_count()) == Some(1) {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(count.load(Ordering::SeqCst), 1);
    assert!(echoes(&ends[0]));
    reactor.stop();
}

#[test]
fn no_more_than_a_reactor_can_listen_to() {
    let count = Arc::default();
    let reactor = start(Policy::Adaptive);
    let (ends, stayed) = let_in(&reactor, &count, 40);
    assert_eq!((stayed, count.load(Ordering::SeqCst)), (32, 32));
    // The last of them is heard too.
    assert!(echoes(&ends[31]));
    reactor.stop();
}

#[test]
fn nobody_comes_to_a_reactor_that_never_sleeps() {
    let count = Arc::default();
    let reactor = start(Policy::Poll);
    assert_eq!(let_in(&reactor, &count, 1).1, 0);
    assert_eq!(count.load(Ordering::SeqCst), 0);
    reactor.stop();
    // One that is turned by hand neither.
    let mut core = core().unwrap();
    core.lodge(Echo::pair(&count).1);
    assert_eq!((core.lodger_count(), count.load(Ordering::SeqCst)), (0, 0));
}

#[test]
fn guests_have_a_reactor_for_themselves() {
    let count = Arc::default();
    let reactor = start(Policy::Adaptive);
    let add = |guest| {
        let add = move |core: &mut TestCore| core.add_frontend(0, |_, _| Ok(Guest(guest)));
        reactor.mailbox().ask(add).unwrap().unwrap()
    };
    add(false);
    assert_eq!(let_in(&reactor, &count, 2).1, 2);
    let guest = add(true);
    assert_eq!(count.load(Ordering::SeqCst), 0, "they had to go");
    assert_eq!(let_in(&reactor, &count, 2).1, 0, "and are not let in again");
    assert!(reactor.mailbox().ask(move |core| core.remove_frontend(guest).is_some()).unwrap());
    assert_eq!(let_in(&reactor, &count, 2).1, 2);
    reactor.stop();
}
