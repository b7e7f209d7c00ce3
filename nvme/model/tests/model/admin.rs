//! Identify, features, queues, log pages, Abort.

use nvme_model::Options;
use nvme_spec::{
    Cns, ErrorLogEntry, FeatureId, FeatureSelect, FirmwareSlotLog, IdentifyController,
    IdentifyNamespace, LogId, NSID_ALL, NamespaceList, Oncs, QueueCounts, SetFeatures, SmartLog,
    Sqe, StatusCode, VolatileWriteCache,
};
use zerocopy::FromBytes;

use crate::host::*;

fn identify<T: FromBytes>(host: &mut Host, cns: Cns, nsid: u32) -> T {
    // A buffer in mid-page, so that both entries are used.
    let at = DATA + 0x800;
    host.region.write(at, &[0xee; 4096]);
    let (prp1, prp2) = host.prps(at, 4096);
    host.ok(0, Sqe::identify(5, cns, nsid).with_prps(prp1, prp2));
    T::read_from_bytes(&host.data(at, size_of::<T>())).unwrap()
}

fn log(host: &mut Host, page: LogId, offset: u64, len: usize, retain: bool) -> Vec<u8> {
    let sqe = Sqe::get_log_page(6, 0, page, offset, len as u32, retain).with_prps(bus(DATA), 0);
    host.ok(0, sqe);
    host.data(DATA, len)
}

#[test]
fn identify_data() {
    let options = Options {
        serial: "S123".into(),
        model: "a model".into(),
        mdts: 7,
        vwc: true,
        dsm: false,
        ..Options::default()
    };
    let mut host = Host::new(options, vec![disk(1000, 512), disk(77, 4096), disk(8, 512)]);
    host.ctl.remove_namespace(1);
    let id: IdentifyController = identify(&mut host, Cns::Controller, 0);
    assert_eq!(id.serial, *b"S123                ");
    assert_eq!(id.model[..8], *b"a model ");
    assert_eq!((id.mdts, id.nn.get(), id.sqes, id.cqes), (7, 3, 0x66, 0x44));
    assert_eq!(id.ver.get(), 0x0001_0400);
    assert_eq!(id.vwc & 1, 1);
    let oncs = Oncs(id.oncs.get());
    assert_eq!((oncs.write_zeroes(), oncs.dsm(), oncs.compare()), (1, 0, 0));
    assert!(id.subnqn.starts_with(b"nqn.2014-08.org.nvmexpress:uuid:"));

    let ns: IdentifyNamespace = identify(&mut host, Cns::Namespace, 2);
    assert_eq!((ns.nsze.get(), ns.ncap.get(), ns.nvmcap.get()), (77, 77, 77 * 4096));
    assert_eq!(ns.format().unwrap().lbads, 12);
    let other: IdentifyNamespace = identify(&mut host, Cns::Namespace, 3);
    assert_ne!(ns.nguid, other.nguid);
    assert_ne!(ns.eui64, other.eui64);
    let gone: [u8; 4096] = identify(&mut host, Cns::Namespace, 1);
    assert_eq!(gone, [0; 4096]);

    let list: NamespaceList = identify(&mut host, Cns::ActiveNamespaces, 0);
    assert!(list.iter().eq([2, 3]));
    let list: NamespaceList = identify(&mut host, Cns::ActiveNamespaces, 2);
    assert!(list.iter().eq([3]));

    let ids: [u8; 4096] = identify(&mut host, Cns::NamespaceIds, 2);
    assert_eq!(ids[..4], [2, 16, 0, 0]);
    assert_eq!(ids[4..20], ns.nguid);
    assert_eq!(ids[20..24], [1, 8, 0, 0]);
    assert_eq!(ids[24..32], ns.eui64);
    assert_eq!(ids[32..36], [0; 4]);
}

#[test]
fn identify_refusals() {
    let mut host = Host::simple();
    let id = |cns: u32, nsid| Sqe::new(6, 1, nsid).with_cdw(0, cns).with_prps(bus(DATA), 0);
    for nsid in [0, 2, NSID_ALL] {
        assert_eq!(host.fails(0, id(0, nsid)), StatusCode::INVALID_NAMESPACE);
        assert_eq!(host.fails(0, id(3, nsid)), StatusCode::INVALID_NAMESPACE);
    }
    assert_eq!(host.fails(0, id(2, NSID_ALL)), StatusCode::INVALID_NAMESPACE);
    assert_eq!(host.fails(0, id(2, NSID_ALL - 1)), StatusCode::INVALID_NAMESPACE);
    for cns in [4, 5, 0x10, 0x1c, 0xff] {
        assert_eq!(host.fails(0, id(cns, 1)), StatusCode::INVALID_FIELD);
    }
    let bad = Sqe::identify(1, Cns::Controller, 0).with_prps(0x10, 0);
    assert_eq!(host.fails(0, bad), StatusCode::DATA_TRANSFER_ERROR);
    for opcode in [0x0d, 0x10, 0x18, 0x7c, 0x84, 0xc0, 0xff] {
        assert_eq!(host.fails(0, Sqe::new(opcode, 1, 0)), StatusCode::INVALID_OPCODE);
    }
}

fn queue_count(sq: u16, cq: u16) -> Sqe {
    Sqe::set_features(3, SetFeatures::NumberOfQueues(QueueCounts { sq, cq }))
}

#[test]
fn queue_counts_are_negotiated() {
    let mut host = Host::cold(Options { queues: 4, ..Options::default() }, vec![]);
    host.enable(8);
    assert_eq!(host.ok(0, queue_count(64, 2)), 0x0001_0003);
    let get = Sqe::get_features(1, FeatureId::NumberOfQueues, FeatureSelect::Current);
    assert_eq!(host.ok(0, get), 0x0001_0003);
    let get = Sqe::get_features(1, FeatureId::NumberOfQueues, FeatureSelect::Default);
    assert_eq!(host.ok(0, get), 0x0003_0003);
    let nonsense = Sqe::new(9, 1, 0).with_cdw(0, 7).with_cdw(1, 0xffff);
    assert_eq!(host.fails(0, nonsense), StatusCode::INVALID_FIELD);
    // Two completion queues were granted, four submission queues.
    let cq = |qid| Sqe::create_io_cq(1, qid, 16, bus(cq_at(qid)), None);
    assert_eq!(host.fails(0, cq(3)), StatusCode::INVALID_QUEUE_ID);
    host.ok(0, cq(2));
    host.ok(0, Sqe::create_io_sq(1, 4, 16, bus(sq_at(4)), 2));
    assert_eq!(host.fails(0, queue_count(1, 1)), StatusCode::SEQUENCE_ERROR);
}

#[test]
fn queue_creation_checks() {
    let options = Options { queues: 4, entries: 64, ..Options::default() };
    let mut host = Host::cold(options, vec![disk(64, 512)]);
    host.enable(8);
    let cq = |qid, n, base| Sqe::create_io_cq(1, qid, n, base, None);
    let base = bus(cq_at(1));
    assert_eq!(host.fails(0, cq(0, 16, base)), StatusCode::INVALID_QUEUE_ID);
    assert_eq!(host.fails(0, cq(5, 16, base)), StatusCode::INVALID_QUEUE_ID);
    assert_eq!(host.fails(0, cq(0xffff, 16, base)), StatusCode::INVALID_QUEUE_ID);
    assert_eq!(host.fails(0, cq(1, 1, base)), StatusCode::INVALID_QUEUE_SIZE);
    assert_eq!(host.fails(0, cq(1, 65, base)), StatusCode::INVALID_QUEUE_SIZE);
    assert_eq!(host.fails(0, cq(1, 16, base + 16)), StatusCode::INVALID_PRP_OFFSET);
    assert_eq!(host.fails(0, cq(1, 16, base).with_cdw(1, 0)), StatusCode::INVALID_FIELD);
    let vector = Sqe::create_io_cq(1, 1, 16, base, Some(5));
    assert_eq!(host.fails(0, vector), StatusCode::INVALID_INTERRUPT_VECTOR);
    host.ok(0, Sqe::create_io_cq(1, 1, 16, base, Some(4)));
    assert_eq!(host.fails(0, cq(1, 16, base)), StatusCode::INVALID_QUEUE_ID);

    let sq = |qid, n, base, cqid| Sqe::create_io_sq(1, qid, n, base, cqid);
    let base = bus(sq_at(1));
    assert_eq!(host.fails(0, sq(0, 16, base, 1)), StatusCode::INVALID_QUEUE_ID);
    assert_eq!(host.fails(0, sq(5, 16, base, 1)), StatusCode::INVALID_QUEUE_ID);
    assert_eq!(host.fails(0, sq(1, 16, base, 0)), StatusCode::INVALID_QUEUE_ID);
    assert_eq!(host.fails(0, sq(1, 16, base, 5)), StatusCode::INVALID_QUEUE_ID);
    assert_eq!(host.fails(0, sq(1, 16, base, 2)), StatusCode::CQ_INVALID);
    assert_eq!(host.fails(0, sq(1, 65, base, 1)), StatusCode::INVALID_QUEUE_SIZE);
    assert_eq!(host.fails(0, sq(1, 16, base + 64, 1)), StatusCode::INVALID_PRP_OFFSET);
    assert_eq!(host.fails(0, sq(1, 16, base, 1).with_cdw(1, 1 << 16)), StatusCode::INVALID_FIELD);
    host.ok(0, sq(1, 16, base, 1));
    assert_eq!(host.fails(0, sq(1, 16, base, 1)), StatusCode::INVALID_QUEUE_ID);

    assert_eq!(host.fails(0, Sqe::delete_io_cq(1, 1)), StatusCode::INVALID_QUEUE_DELETION);
    for qid in [0, 2, 9] {
        assert_eq!(host.fails(0, Sqe::delete_io_cq(1, qid)), StatusCode::INVALID_QUEUE_ID);
        assert_eq!(host.fails(0, Sqe::delete_io_sq(1, qid)), StatusCode::INVALID_QUEUE_ID);
    }
    host.ok(0, Sqe::delete_io_sq(1, 1));
    host.ok(0, Sqe::delete_io_cq(1, 1));
    // And again from the start.
    host.create_pair(1, 64);
    host.ok(1, Sqe::flush(7, 1));
}

#[test]
fn entry_sizes_must_be_set_before_queues() {
    let mut host = Host::cold(Options::default(), vec![]);
    host.enable(8);
    host.set_cc(Host::cc().with_iocqes(5).with_iosqes(5));
    let cq = Sqe::create_io_cq(1, 1, 16, bus(cq_at(1)), None);
    assert_eq!(host.fails(0, cq), StatusCode::INVALID_FIELD);
    host.set_cc(Host::cc().with_iosqes(5));
    host.ok(0, cq);
    let sq = Sqe::create_io_sq(1, 1, 16, bus(sq_at(1)), 1);
    assert_eq!(host.fails(0, sq), StatusCode::INVALID_FIELD);
}

#[test]
fn deleting_a_queue_completes_what_is_in_flight() {
    let mut host = Host::faulty("delay=1000:op=flush");
    for cid in 0..5 {
        host.submit(1, &Sqe::flush(cid, 1));
    }
    host.ring_tail(1);
    host.step();
    assert!(host.reap(1).is_none());
    host.ok(0, Sqe::delete_io_sq(1, 1));
    for cid in 0..5 {
        let cqe = host.reap(1).unwrap();
        assert_eq!(cqe.cid.get(), cid);
        assert_eq!(cqe.status().code(), StatusCode::ABORTED_SQ_DELETION);
    }
    assert!(!host.ctl.has_in_flight());
    host.ok(0, Sqe::delete_io_cq(1, 1));
}

#[test]
fn abort_finds_what_is_in_flight() {
    let mut host = Host::faulty("delay=1000:op=flush;lost:op=zeroes;delay=1000:op=features");
    host.submit(1, &Sqe::flush(40, 1));
    host.submit(1, &Sqe::write_zeroes(41, 1, 0, 0, 0));
    host.ring_tail(1);
    host.step();
    // Lost is lost; another identifier or queue is not it.
    for (sqid, cid) in [(1, 41), (1, 42), (0, 40), (2, 40), (0xffff, 0xffff)] {
        assert_eq!(host.ok(0, Sqe::abort(1, sqid, cid)), 1);
    }
    assert!(host.reap(1).is_none());
    assert_eq!(host.ok(0, Sqe::abort(1, 1, 40)), 0);
    let cqe = host.reap(1).unwrap();
    assert_eq!((cqe.cid.get(), cqe.status().code()), (40, StatusCode::ABORT_REQUESTED));
    // An admin command, too.
    host.submit(0, &queue_count(1, 1));
    host.submit(0, &Sqe::abort(9, 0, 3));
    host.ring_tail(0);
    let cqe = host.wait(0).unwrap();
    assert_eq!((cqe.cid.get(), cqe.status().code()), (3, StatusCode::ABORT_REQUESTED));
    let cqe = host.wait(0).unwrap();
    assert_eq!((cqe.cid.get(), cqe.result.get()), (9, 0));
}

#[test]
fn volatile_cache_feature() {
    let set = |on| {
        let v = VolatileWriteCache(0).with_enabled(on);
        Sqe::set_features(1, SetFeatures::VolatileWriteCache(v))
    };
    let get = Sqe::get_features(1, FeatureId::VolatileWriteCache, FeatureSelect::Current);
    let mut host = Host::simple();
    assert_eq!(host.fails(0, set(1)), StatusCode::INVALID_FIELD);
    assert_eq!(host.fails(0, get), StatusCode::INVALID_FIELD);

    let mut host = Host::new(Options { vwc: true, ..Options::default() }, vec![disk(64, 512)]);
    assert_eq!(host.ok(0, get), 1);
    assert!(host.write_blocks(0, 1, 1, 0).is_success());
    host.ok(0, set(0));
    assert_eq!(host.ok(0, get), 0);
    assert!(host.write_blocks(1, 1, 2, 0).is_success());
    // What was cached went out with the switch, what came later was never cached.
    for seed in 0..20 {
        host.ctl.power_cut(seed).unwrap();
    }
    host.enable(8);
    host.create_pair(1, 16);
    assert_eq!(host.read_values(0, 2), [1, 2]);
    assert_eq!(host.ok(0, get), 1, "on again after a reset");
}

#[test]
fn feature_refusals() {
    let mut host = Host::simple();
    let set = |id: u32, value| Sqe::new(9, 1, 0).with_cdw(0, id).with_cdw(1, value);
    assert_eq!(host.fails(0, set(0x00, 0)), StatusCode::INVALID_FIELD);
    assert_eq!(host.fails(0, set(0x7f, 0)), StatusCode::INVALID_FIELD);
    assert_eq!(host.fails(0, set(0x8000_0001, 0)), StatusCode::FEATURE_NOT_SAVEABLE);
    assert_eq!(host.fails(0, set(0x02, 3)), StatusCode::INVALID_FIELD);
    host.ok(0, set(0x01, 0x0102_0305));
    let get = |sel: u32| Sqe::new(10, 1, 0).with_cdw(0, 1 | sel << 8);
    assert_eq!(host.ok(0, get(0)), 0x0102_0305);
    assert_eq!(host.ok(0, get(1)), 7);
    assert_eq!(host.ok(0, get(2)), 7);
    assert_eq!(host.ok(0, get(3)), 4);
    assert_eq!(host.fails(0, get(4)), StatusCode::INVALID_FIELD);
}

#[test]
fn smart_and_firmware_logs() {
    let mut host = Host::faulty("status=281:op=read,nth=2,count=1");
    assert!(host.write_blocks(0, 100, 1, 0).is_success());
    assert_eq!(host.read_values(0, 100), [1; 100]);
    let read = Sqe::read(1, 1, 0, 0, 0).with_prps(bus(DATA), 0);
    assert_eq!(host.fails(1, read), StatusCode::UNRECOVERED_READ);
    host.ctl.power_cut(1).unwrap();
    host.enable(8);
    let smart = SmartLog::read_from_bytes(&log(&mut host, LogId::Smart, 0, 512, false)).unwrap();
    assert_eq!((smart.host_reads.get(), smart.host_writes.get()), (1, 1));
    assert_eq!((smart.data_units_read.get(), smart.data_units_written.get()), (1, 1));
    assert_eq!((smart.media_errors.get(), smart.error_log_entries.get()), (1, 1));
    assert_eq!((smart.power_cycles.get(), smart.unsafe_shutdowns.get()), (2, 1));
    let fw = log(&mut host, LogId::FirmwareSlot, 0, 512, false);
    let fw = FirmwareSlotLog::read_from_bytes(&fw).unwrap();
    assert_eq!((fw.active, &fw.revisions[0][..3]), (1, &b"1.0"[..]));
}

#[test]
fn error_log_is_newest_first() {
    let mut host = Host::simple();
    let cqe = host.run(1, Sqe::read(0x77, 1, 5000, 0, 0).with_prps(bus(DATA), 0));
    assert!(cqe.status().more() && cqe.status().do_not_retry());
    host.fails(1, Sqe::flush(0x78, 9));
    let page = log(&mut host, LogId::Error, 0, 64 * 3, false);
    let entry = |i: usize| ErrorLogEntry::read_from_bytes(&page[i * 64..][..64]).unwrap();
    assert_eq!((entry(0).error_count.get(), entry(0).cid.get()), (2, 0x78));
    assert_eq!(entry(0).status().code(), StatusCode::INVALID_NAMESPACE);
    assert_eq!((entry(1).error_count.get(), entry(1).lba.get()), (1, 5000));
    assert_eq!((entry(1).sq_id.get(), entry(1).nsid.get()), (1, 1));
    assert_eq!(entry(2).error_count.get(), 0);
    for _ in 0..100 {
        host.fails(1, Sqe::flush(1, 9));
    }
    let page = log(&mut host, LogId::Error, 63 * 64, 64, false);
    assert_eq!(ErrorLogEntry::read_from_bytes(&page).unwrap().error_count.get(), 39);
}

#[test]
fn log_page_refusals() {
    let mut host = Host::simple();
    let get = |page: u32, nsid| Sqe::new(2, 1, nsid).with_cdw(0, page | 15 << 16);
    let get = |page, nsid| get(page, nsid).with_prps(bus(DATA), 0);
    for page in [0, 5, 0x70, 0xff] {
        assert_eq!(host.fails(0, get(page, 0)), StatusCode::INVALID_LOG_PAGE);
    }
    host.ok(0, get(2, NSID_ALL));
    assert_eq!(host.fails(0, get(2, 1)), StatusCode::INVALID_FIELD);
    assert_eq!(host.fails(0, get(2, 0).with_cdw(2, 2)), StatusCode::INVALID_FIELD);
    assert_eq!(host.fails(0, get(2, 0).with_cdw(2, 516)), StatusCode::INVALID_FIELD);
    assert_eq!(host.fails(0, get(2, 0).with_cdw(3, 1)), StatusCode::INVALID_FIELD);
    // Beyond the largest transfer: 16 GiB.
    let huge = get(2, 0).with_cdw(0, 0xffff_0002).with_cdw(1, 0xffff);
    assert_eq!(host.fails(0, huge), StatusCode::INVALID_FIELD);
    // Longer than the page: what is there is given.
    host.region.write(DATA, &[0xee; 4096]);
    host.ok(0, get(3, 0).with_cdw(0, 3 | 1023 << 16));
    assert_eq!(host.data(DATA + 508, 8), [0, 0, 0, 0, 0xee, 0xee, 0xee, 0xee]);
}
