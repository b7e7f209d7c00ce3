//! The loop with real parts: a memory leaf, a raw image on it, a portal to another thread.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use block::{
    BlockQueue, Completions, DeviceInfo, Flags, Full, HasWork, MemQueue, Op, Port, RawImage,
    Request, Status, Submit,
};
use dma::{Pool, Region};
use reactor::{Clock, Core, Policy, Portal, PortalFrontend, PortalRequest, Reactor, Start};

type TestCore = Core<MemQueue, RawImage, PortalFrontend>;

const SIZE: u64 = 8 << 20;

fn core() -> Result<TestCore, String> {
    core_with(Clock::real())
}

fn core_with(clock: Clock) -> Result<TestCore, String> {
    let mut core = Core::new(clock).map_err(|e| e.to_string())?;
    let leaf = core.add_leaf(MemQueue::new(SIZE, 512).map_err(|e| e.to_string())?)?;
    let port = Port { leaf, unit: 0 };
    core.add_image(|owner, leaves| RawImage::new(leaves, port, SIZE, owner).ok_or("no unit"))?;
    Ok(core)
}

fn request(id: u64, op: Op, offset: u64, seg: Option<dma::Seg>) -> PortalRequest {
    let len = seg.map_or(0, |s| u64::from(s.len()));
    PortalRequest { id, op, flags: Flags::NONE, offset, len, seg }
}

/// Writes through a portal at depth 16 and reads back, under the policy given.
fn traffic(policy: Policy) {
    let reactor = Reactor::start("test", Start { cpu: None, policy }, core).unwrap();
    let mut pool = Pool::new(16, 4096).unwrap();
    let region = pool.region().clone();
    let wake = reactor.mailbox().ask(|c| c.wake()).unwrap();
    let (mut portal, end) = Portal::new(16, vec![region.clone()], wake).unwrap();
    let attached = reactor.mailbox().ask(|c| c.add_frontend(0, |owner, _| Ok(end(owner)))).unwrap();
    attached.unwrap();

    let mut bufs: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
    let blocks = SIZE / 4096;
    for op in [Op::Write, Op::Read] {
        let (mut next, mut answered) = (0, 0);
        let mut out: Vec<Option<dma::Buf>> = (0..blocks).map(|_| None).collect();
        while answered < blocks {
            while next < blocks && portal.room() > 0 {
                let buf = bufs.pop().unwrap();
                if op == Op::Write {
                    region.write_seg(&buf.seg(), &[(next % 255) as u8; 4096]);
                }
                portal.send(request(next, op, next * 4096, Some(buf.seg()))).unwrap();
                out[next as usize] = Some(buf);
                next += 1;
            }
            let reply = portal.wait();
            assert_eq!(reply.status, Status::Ok);
            let buf = out[reply.id as usize].take().unwrap();
            if op == Op::Read {
                let mut data = [0; 4096];
                region.read_seg(&buf.seg(), &mut data);
                assert_eq!(data, [(reply.id % 255) as u8; 4096]);
            }
            bufs.push(buf);
            answered += 1;
        }
        // Long enough that an adaptive reactor goes to sleep and has to be woken.
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let seg = bufs[0].seg();
    assert_eq!(portal.call(request(0, Op::Read, SIZE, Some(seg))), Status::Invalid);
    assert_eq!(portal.call(request(0, Op::Flush, 0, None)), Status::Ok);
    drop(portal);
    while reactor.mailbox().ask(|c| c.frontend(0).is_some()).unwrap() {
        std::thread::yield_now();
    }
    reactor.mailbox().post(|c| block::Layer::<MemQueue>::close(c.image(0).unwrap()));
    let status = loop {
        if let Some((_, s)) = reactor.mailbox().ask(|c| c.remove_closed_image(0)).unwrap() {
            break s;
        }
    };
    assert_eq!(status, Status::Ok);
    let slept = reactor.stats().sleeps.get();
    assert_eq!(slept > 0, policy == Policy::Adaptive, "{slept} sleeps");
    assert_eq!(reactor.stats().strays.get(), 0);
    reactor.stop();
}

#[test]
fn traffic_while_polling() {
    traffic(Policy::Poll);
}

#[test]
fn traffic_with_sleeps() {
    traffic(Policy::Adaptive);
}

#[test]
fn time_counts_for_the_turn_in_which_it_passed() {
    let (clock, time) = Clock::virtual_clock();
    let mut core = core_with(clock).unwrap();
    let mut turn_at = |now, work| {
        time.store(now, Relaxed);
        if work {
            core.mailbox().post(|_| ());
        }
        assert_eq!(core.turn(), work);
        (core.stats().busy_ns.get(), core.stats().idle_ns.get())
    };
    turn_at(10, false);
    // Here the reactor slept until there was work.
    assert_eq!(turn_at(1_000_010, true), (0, 1_000_010));
    assert_eq!(turn_at(1_000_710, false), (700, 1_000_010));
    assert_eq!(turn_at(1_000_910, false), (700, 1_000_210));
    // A processor whose counter is a little behind.
    assert_eq!(turn_at(1_000_900, false), (700, 1_000_210));
}

/// A device with a request in flight that says by a descriptor when that ends.
struct Slow(std::fs::File);

impl Submit for Slow {
    fn info(&self, _unit: u16) -> Option<&DeviceInfo> {
        None
    }

    fn room(&self) -> usize {
        0
    }

    fn submit(&mut self, _request: &Request<'_>) -> Result<(), Full> {
        Err(Full)
    }
}

impl BlockQueue for Slow {
    fn register(&mut self, _region: &Arc<Region>) -> Result<(), String> {
        Ok(())
    }

    fn poll(&mut self, _out: &mut Completions) -> usize {
        0
    }

    fn in_flight(&self) -> usize {
        1
    }

    fn arm(&mut self) -> HasWork {
        HasWork::No
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

#[test]
fn a_reactor_sleeps_over_no_device_that_it_does_not_listen_to() {
    let mut core: Core<Slow, RawImage, PortalFrontend> =
        Core::new(Clock::virtual_clock().0).unwrap();
    for _ in 0..15 {
        core.add_leaf(Slow(std::fs::File::open("/dev/null").unwrap())).unwrap();
        assert_eq!(core.arm(), HasWork::No);
    }
    core.add_leaf(Slow(std::fs::File::open("/dev/null").unwrap())).unwrap();
    assert_eq!(core.arm(), HasWork::Yes);
}

#[test]
fn a_core_that_cannot_be_built_says_why() {
    let start = Start { cpu: None, policy: Policy::Adaptive };
    let r = Reactor::<MemQueue, RawImage, PortalFrontend>::start("t", start, || Err("no".into()));
    assert_eq!(r.err().unwrap(), "no");
    let start = Start { cpu: Some(1000), policy: Policy::Adaptive };
    let r = Reactor::<MemQueue, RawImage, PortalFrontend>::start("t", start, core);
    assert!(r.err().unwrap().contains("processor 1000"));
}
