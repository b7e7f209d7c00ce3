//! The volatile write cache and power cuts, through commands.

use std::collections::BTreeSet;

use nvme_model::{NamespaceConfig, Options, Store};
use nvme_spec::{NSID_ALL, SetFeatures, Sqe, VolatileWriteCache};

use crate::host::*;

fn host(vwc: bool, store: Store) -> Host {
    let ns = NamespaceConfig { store, blocks: 2048, lba: 512, read_only: false };
    Host::new(Options { vwc, ..Options::default() }, vec![ns])
}

fn cut(host: &mut Host, seed: u64) {
    host.ctl.power_cut(seed).unwrap();
    host.enable(16);
    host.create_pair(1, 64);
}

#[test]
fn without_a_cache_completed_writes_are_durable() {
    for seed in 0..20 {
        let mut host = host(false, Store::memory());
        assert!(host.write_blocks(0, 8, 7, 0).is_success());
        cut(&mut host, seed);
        assert_eq!(host.read_values(0, 8), [7; 8]);
    }
}

#[test]
fn flushed_and_fua_writes_are_durable_and_others_may_be_lost() {
    let mut seen = BTreeSet::new();
    for seed in 0..100 {
        let mut host = host(true, Store::memory());
        assert!(host.write_blocks(0, 4, 1, 0).is_success());
        host.ok(1, Sqe::flush(1, if seed % 2 == 0 { 1 } else { NSID_ALL }));
        assert!(host.write_blocks(4, 4, 2, Sqe::FUA).is_success());
        host.ok(1, Sqe::write_zeroes(1, 1, 8, 3, Sqe::FUA));
        assert!(host.write_blocks(0, 2, 3, 0).is_success());
        assert!(host.write_blocks(12, 4, 4, 0).is_success());
        assert_eq!(host.read_values(0, 16), [3, 3, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 4, 4, 4, 4]);
        cut(&mut host, seed);
        let after = host.read_values(0, 16);
        assert_eq!(after[2..12], [1, 1, 2, 2, 2, 2, 0, 0, 0, 0]);
        assert!(after[..2].iter().all(|v| [1, 3].contains(v)));
        assert!(after[12..].iter().all(|v| [0, 4].contains(v)));
        seen.insert((after[0], after[1], after[12] + after[13] + after[14] + after[15]));
    }
    // Lost, kept and torn, one independent of the other.
    assert!(seen.contains(&(1, 1, 0)) && seen.contains(&(3, 3, 16)));
    assert!(seen.contains(&(1, 1, 16)) && seen.contains(&(3, 3, 0)));
    assert!(seen.iter().any(|&(a, b, _)| a != b));
    assert!(seen.iter().any(|&(_, _, sum)| sum != 0 && sum != 16));
}

#[test]
fn the_same_seed_cuts_the_same_way() {
    let run = |seed| {
        let mut host = host(true, Store::memory());
        for i in 0..20u8 {
            assert!(host.write_blocks(u64::from(i) * 3, 8, i + 1, 0).is_success());
        }
        cut(&mut host, seed);
        host.read_values(0, 64)
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

#[test]
fn a_file_holds_only_what_is_durable() {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile().unwrap();
    let mut host = host(true, Store::file(file.try_clone().unwrap(), true).unwrap());
    assert!(host.write_blocks(0, 1, 9, 0).is_success());
    assert_eq!(file.metadata().unwrap().len(), 0);
    host.ok(1, Sqe::flush(1, 1));
    let mut data = [0; 512];
    file.read_exact_at(&mut data, 0).unwrap();
    assert_eq!(data, [9; 512]);
}

#[test]
fn a_controller_reset_keeps_the_cache() {
    let mut host = host(true, Store::memory());
    assert!(host.write_blocks(0, 8, 6, 0).is_success());
    host.disable();
    host.enable(8);
    host.create_pair(1, 16);
    assert_eq!(host.read_values(0, 8), [6; 8]);
}

#[test]
fn a_reset_turns_the_cache_on_again() {
    let mut lost = 0;
    for seed in 0..40 {
        let mut host = host(true, Store::memory());
        let off = SetFeatures::VolatileWriteCache(VolatileWriteCache(0));
        host.ok(0, Sqe::set_features(1, off));
        host.disable();
        host.enable(8);
        host.create_pair(1, 16);
        assert!(host.write_blocks(0, 1, 6, 0).is_success());
        cut(&mut host, seed);
        lost += u32::from(host.read_values(0, 1) == [0]);
    }
    assert!((1..40).contains(&lost), "{lost}");
}

#[test]
fn writes_in_flight_at_the_cut_are_lost_kept_or_torn() {
    let mut sums = BTreeSet::new();
    for seed in 0..60 {
        let options = Options { faults: "delay=9:op=write".parse().unwrap(), ..Options::default() };
        let mut host = Host::new(options, vec![disk(64, 512)]);
        host.region.write(DATA, &[1; 4096]);
        host.submit(1, &Sqe::write(1, 1, 0, 7, 0).with_prps(bus(DATA), 0));
        host.ring_tail(1);
        host.step();
        cut(&mut host, seed);
        sums.insert(host.read_values(0, 8).iter().map(|&v| u32::from(v)).sum::<u32>());
    }
    assert!(sums.contains(&0) && sums.contains(&8) && sums.len() > 3, "{sums:?}");
}
