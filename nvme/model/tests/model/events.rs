//! Asynchronous events: doorbells, namespaces, health; and the requests for them.

use nvme_model::Options;
use nvme_spec::{
    AsyncEvent, AsyncEventConfig, AsyncEventType, Cns, IdentifyNamespace, LogId, NSID_ALL,
    NamespaceList, SetFeatures, Sqe, StatusCode, cq_head_doorbell, error_event, notice_event,
    smart_event, sq_tail_doorbell,
};
use zerocopy::FromBytes;

use crate::host::*;

fn request(host: &mut Host, cid: u16) {
    host.submit(0, &Sqe::async_event_request(cid));
    host.ring_tail(0);
    host.step();
}

fn event(host: &mut Host) -> Option<(u16, AsyncEventType, u8, u8)> {
    let cqe = host.wait(0)?;
    assert_ok(&cqe);
    let e = AsyncEvent(cqe.result.get());
    Some((cqe.cid.get(), e.event_type().unwrap(), e.info() as u8, e.log_page() as u8))
}

fn read_page(host: &mut Host, page: LogId, retain: bool) -> Vec<u8> {
    let sqe = Sqe::get_log_page(1, NSID_ALL, page, 0, 512, retain).with_prps(bus(DATA), 0);
    host.ok(0, sqe);
    host.data(DATA, 512)
}

#[test]
fn doorbells_that_cannot_be() {
    use AsyncEventType::Error;
    let mut host = Host::simple();
    request(&mut host, 100);
    request(&mut host, 101);
    assert!(event(&mut host).is_none());
    // A queue that does not exist, within and beyond what there could be.
    host.regs.write32(sq_tail_doorbell(5, 0), 1);
    assert_eq!(event(&mut host), Some((100, Error, error_event::INVALID_DOORBELL, 1)));
    host.regs.write32(cq_head_doorbell(500, 0), 1);
    host.step();
    // A value out of range, and one past what was posted; masked until the page is read.
    host.regs.write32(sq_tail_doorbell(1, 0), 64);
    host.step();
    host.regs.write32(cq_head_doorbell(1, 0), 1);
    host.step();
    assert!(event(&mut host).is_none());
    read_page(&mut host, LogId::Error, true);
    assert!(event(&mut host).is_none());
    read_page(&mut host, LogId::Error, false);
    assert_eq!(event(&mut host), Some((101, Error, error_event::INVALID_DOORBELL, 1)));
    read_page(&mut host, LogId::Error, false);
    request(&mut host, 102);
    assert_eq!(event(&mut host), Some((102, Error, error_event::INVALID_DOORBELL_VALUE, 1)));
    assert_eq!(host.ctl.stats().snapshot().bad_doorbells, 4);
    // The queue goes on with the last good values.
    host.ok(1, Sqe::flush(1, 1));
    assert_eq!(host.csts().cfs(), 0);
}

#[test]
fn namespace_changes() {
    use AsyncEventType::Notice;
    let mut host = Host::new(Options::default(), vec![disk(64, 512), disk(64, 512)]);
    request(&mut host, 7);
    assert!(host.ctl.resize_namespace(1, 128));
    assert!(event(&mut host).is_none(), "not asked for");
    let config = AsyncEventConfig(0).with_namespace(1);
    host.submit(0, &Sqe::set_features(1, SetFeatures::AsyncEventConfig(config)));
    host.ring_tail(0);
    assert_ok(&host.wait(0).unwrap());
    assert!(host.ctl.resize_namespace(2, 32));
    assert!(host.ctl.remove_namespace(1));
    assert!(!host.ctl.remove_namespace(1));
    assert!(!host.ctl.resize_namespace(1, 1));
    assert!(!host.ctl.resize_namespace(2, 0));
    assert!(!host.ctl.resize_namespace(2, u64::MAX));
    assert!(!host.ctl.resize_namespace(0, 1));
    assert_eq!(event(&mut host), Some((7, Notice, notice_event::NAMESPACE_ATTRIBUTE, 4)));
    let sqe = Sqe::get_log_page(1, NSID_ALL, LogId::ChangedNamespaces, 0, 4096, false);
    host.ok(0, sqe.with_prps(bus(DATA), 0));
    let list = NamespaceList::read_from_bytes(&host.data(DATA, 4096)).unwrap();
    assert!(list.iter().eq([1, 2]));
    host.ok(0, sqe.with_prps(bus(DATA), 0));
    let list = NamespaceList::read_from_bytes(&host.data(DATA, 4096)).unwrap();
    assert_eq!(list.iter().count(), 0);
    host.ok(0, Sqe::identify(1, Cns::Namespace, 2).with_prps(bus(DATA), 0));
    let ns = IdentifyNamespace::read_from_bytes(&host.data(DATA, 4096)).unwrap();
    assert_eq!(ns.nsze.get(), 32);
    let read = |nsid, lba| Sqe::read(1, nsid, lba, 0, 0).with_prps(bus(DATA), 0);
    assert_eq!(host.fails(1, read(2, 32)), StatusCode::LBA_OUT_OF_RANGE);
    assert_eq!(host.fails(1, read(1, 0)), StatusCode::INVALID_FIELD);
}

#[test]
fn health_warnings() {
    let mut host = Host::faulty("warn=2:op=flush");
    let config = AsyncEventConfig(0).with_smart(0x02);
    host.ok(0, Sqe::set_features(1, SetFeatures::AsyncEventConfig(config)));
    request(&mut host, 8);
    host.ctl.raise_warning(0x04);
    assert!(event(&mut host).is_none(), "not asked for");
    host.ok(1, Sqe::flush(1, 1));
    let expect = (8, AsyncEventType::Smart, smart_event::TEMPERATURE, 2);
    assert_eq!(event(&mut host), Some(expect));
    assert_eq!(read_page(&mut host, LogId::Smart, false)[0], 0x06);
}

#[test]
fn an_idle_device_reports_too() {
    let mut host = Host::simple();
    host.ok(0, Sqe::set_features(1, SetFeatures::AsyncEventConfig(AsyncEventConfig(0x11f))));
    request(&mut host, 8);
    while host.step() {}
    host.step();
    host.ctl.raise_warning(0x01);
    assert!(!host.step(), "nothing but the event");
    assert_eq!(host.peek(0).unwrap().cid.get(), 8);
}

#[test]
fn more_requests_than_allowed() {
    let mut host = Host::cold(Options { aerl: 1, ..Options::default() }, vec![disk(8, 512)]);
    host.enable(32);
    request(&mut host, 1);
    request(&mut host, 2);
    request(&mut host, 3);
    let cqe = host.reap(0).unwrap();
    assert_eq!((cqe.cid.get(), cqe.status().code()), (3, StatusCode::AER_LIMIT));
    // One is taken back.
    host.submit(0, &Sqe::abort(9, 0, 1));
    host.ring_tail(0);
    let cqe = host.wait(0).unwrap();
    assert_eq!((cqe.cid.get(), cqe.status().code()), (1, StatusCode::ABORT_REQUESTED));
    let cqe = host.wait(0).unwrap();
    assert_eq!((cqe.cid.get(), cqe.result.get()), (9, 0));
    // A reset forgets them; no event can complete into the new life.
    host.disable();
    host.enable(32);
    host.regs.write32(sq_tail_doorbell(5, 0), 1);
    assert!(host.wait(0).is_none());
}
