//! Format NVM.

use nvme_model::{NamespaceConfig, Options};
use nvme_spec::{
    Cns, Fna, IdentifyController, IdentifyNamespace, LogId, NSID_ALL, NamespaceList, Oacs,
    SecureErase, Sqe, StatusCode,
};
use zerocopy::FromBytes;

use crate::host::*;

fn host(fna: u8, namespaces: Vec<NamespaceConfig>) -> Host {
    let format = Some(Fna(fna));
    Host::new(Options { format, vwc: true, ..Options::default() }, namespaces)
}

fn identify<T: FromBytes>(host: &mut Host, cns: Cns, nsid: u32) -> T {
    host.ok(0, Sqe::identify(5, cns, nsid).with_prps(bus(DATA), 0));
    T::read_from_bytes(&host.data(DATA, size_of::<T>())).unwrap()
}

fn look(host: &mut Host, nsid: u32) -> (u64, u8, u8) {
    let id: IdentifyNamespace = identify(host, Cns::Namespace, nsid);
    (id.nsze.get(), id.format().unwrap().lbads, id.fpi)
}

fn format(nsid: u32, lbaf: u8, erase: SecureErase) -> Sqe {
    Sqe::format_nvm(7, nsid, lbaf, erase)
}

#[test]
fn a_format_empties_and_changes_the_block_size() {
    let mut host = host(0, vec![disk(2051, 512), disk(2048, 512)]);
    let id: IdentifyController = identify(&mut host, Cns::Controller, 0);
    assert_eq!((Oacs(id.oacs.get()).format(), id.fna), (1, 0));
    assert!(host.write_blocks(3, 8, 9, 0).is_success());
    assert!(host.write_blocks(16, 8, 7, Sqe::FUA).is_success());
    host.ok(0, format(1, 1, SecureErase::None));
    assert_eq!(look(&mut host, 1), (256, 12, 0x80), "what fills no block is lost");
    assert_eq!(look(&mut host, 2), (2048, 9, 0x80));
    let mut all = vec![1; 2048 * 512];
    host.ctl.peek(1, 0, &mut all).unwrap().unwrap();
    assert!(all.iter().all(|&b| b == 0), "old data, cached or not, is still there");
    // Blocks have the new size from now on.
    let (prp1, prp2) = host.prps(DATA, 8192);
    host.ok(1, Sqe::write(1, 1, 254, 1, 0).with_prps(prp1, prp2));
    let beyond = Sqe::write(1, 1, 255, 1, 0).with_prps(prp1, prp2);
    assert_eq!(host.fails(1, beyond), StatusCode::LBA_OUT_OF_RANGE);
    // The change is told: both namespaces' list is read through the log.
    let sqe = Sqe::get_log_page(6, 0, LogId::ChangedNamespaces, 0, 4096, false);
    host.ok(0, sqe.with_prps(bus(DATA), 0));
    let list = NamespaceList::read_from_bytes(&host.data(DATA, 4096)).unwrap();
    assert!(list.iter().eq([1]));
    host.ok(0, format(1, 0, SecureErase::UserData));
    assert_eq!(look(&mut host, 1), (2048, 9, 0x80));
}

#[test]
fn what_cannot_be_formatted() {
    let mut read_only = disk(64, 512);
    read_only.read_only = true;
    let mut host = host(0, vec![disk(64, 512), read_only, disk(7, 512), disk(64, 512)]);
    host.ctl.remove_namespace(4);
    let none = SecureErase::None;
    for (sqe, code) in [
        (format(0, 0, none), StatusCode::INVALID_NAMESPACE),
        (format(4, 0, none), StatusCode::INVALID_NAMESPACE),
        (format(5, 0, none), StatusCode::INVALID_NAMESPACE),
        (format(1, 2, none), StatusCode::INVALID_FORMAT),
        (format(1, 0, none).with_cdw(0, 1 << 4), StatusCode::INVALID_FORMAT),
        (format(1, 0, none).with_cdw(0, 1 << 5), StatusCode::INVALID_FORMAT),
        (format(1, 0, none).with_cdw(0, 3 << 9), StatusCode::INVALID_FIELD),
        (format(1, 0, SecureErase::Crypto), StatusCode::INVALID_FIELD),
        (format(2, 0, none), StatusCode::WRITE_PROTECTED),
        (format(3, 1, none), StatusCode::INVALID_FORMAT),
        (format(NSID_ALL, 0, none), StatusCode::WRITE_PROTECTED),
    ] {
        assert_eq!(host.fails(0, sqe), code, "{sqe:?}");
    }
    assert_eq!(look(&mut host, 1), (64, 9, 0x80));
    let options = Options { format: None, ..Options::default() };
    let mut host = Host::new(options, vec![disk(64, 512)]);
    let id: IdentifyController = identify(&mut host, Cns::Controller, 0);
    assert_eq!(id.oacs.get(), 0);
    assert_eq!(host.fails(0, format(1, 0, none)), StatusCode::INVALID_OPCODE);
}

#[test]
fn attributes_say_what_a_format_touches() {
    let two = || vec![disk(64, 512), disk(64, 512)];
    for (fna, nsid, erase, both) in [
        (4, 1, SecureErase::Crypto, false),
        (1, 1, SecureErase::None, true),
        (2, 1, SecureErase::None, false),
        (2, 1, SecureErase::UserData, true),
        (0, NSID_ALL, SecureErase::None, true),
    ] {
        let mut host = host(fna, two());
        host.ok(0, format(nsid, 1, erase));
        assert_eq!(look(&mut host, 1), (8, 12, 0x80));
        assert_eq!(look(&mut host, 2).1 == 12, both, "{fna} {nsid} {erase:?}");
    }
}

#[test]
fn commands_in_flight_are_not_formatted_away() {
    let mut host = Host::faulty("delay=50:op=read");
    host.submit(1, &Sqe::read(1, 1, 0, 0, 0).with_prps(bus(DATA), 0));
    host.ring_tail(1);
    host.step();
    assert_eq!(host.fails(0, format(1, 0, SecureErase::None)), StatusCode::SEQUENCE_ERROR);
    assert!(host.wait(1).is_some());
    host.ok(0, format(1, 0, SecureErase::None));
}

#[test]
fn progress_is_told() {
    let mut host = Host::faulty("delay=100:op=format");
    host.submit(0, &format(1, 1, SecureErase::None));
    host.ring_tail(0);
    let mut seen = Vec::new();
    let mut done = false;
    while !done {
        host.submit(0, &Sqe::identify(1, Cns::Namespace, 1).with_prps(bus(DATA), 0));
        host.ring_tail(0);
        while let Some(cqe) = host.wait(0) {
            assert_ok(&cqe);
            if cqe.cid.get() == 1 {
                let id = IdentifyNamespace::read_from_bytes(&host.data(DATA, 4096)).unwrap();
                seen.push(id.fpi);
                break;
            }
            done = true;
        }
    }
    assert!(seen[0] > 0x80 + 90 && seen.is_sorted_by(|a, b| a >= b), "{seen:?}");
    assert!(seen.iter().any(|&f| (0x81..0x80 + 50).contains(&f)), "{seen:?}");
    assert_eq!(look(&mut host, 1), (256, 12, 0x80));
}
