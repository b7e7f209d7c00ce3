//! The datapath against a plain array: random requests at depth over devices that complete in any
//! order, then our checker, qemu-img's, and what qemu-img reads.

mod rig;

use std::collections::HashMap;

use block::{Flags, Op, Status};
use qcow::Compressor;
use qcow::create::CreateOptions;
use qcow::format::Compression;
use qcow::open::Format;
use qcow::run::Options;
use rig::{LogQueue, Rig, Rng, built, check, fresh, hammer, qemu_check, qemu_read, read_all, same};

const DISK: u64 = 3 << 20;
const DEVICE: u64 = 16 << 20;

fn options(cluster: u64, version: u32, bits: u32) -> CreateOptions {
    let mut o = CreateOptions::new(DISK);
    o.cluster_size = cluster;
    o.version = version;
    o.refcount_bits = bits;
    o
}

/// After a clean close: no leak, no error, and qemu-img reads what we wrote.
fn judge(leaf: LogQueue, model: &[u8], alone: bool) -> LogQueue {
    let data = leaf.data();
    let (leaf, bad, leaks) = check(leaf);
    assert_eq!((bad, leaks), (0, 0), "after a clean close");
    if let Some(code) = qemu_check(&data) {
        assert_eq!(code, 0, "qemu-img check");
    }
    if alone && let Some(read) = qemu_read(&data) {
        same(&read, model, 0);
    }
    leaf
}

#[test]
fn every_geometry() {
    for (i, (cluster, version, bits)) in [
        (512, 3, 16),
        (512, 3, 64),
        (1024, 3, 1),
        (4096, 3, 2),
        (4096, 2, 16),
        (16384, 3, 4),
        (65536, 3, 16),
        (65536, 2, 16),
        (65536, 3, 32),
        (262_144, 3, 8),
        (2 << 20, 3, 16),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = 77 + i as u64;
        let mut rng = Rng(seed);
        let mut model = vec![0; DISK as usize];
        let mut leaf = fresh(DEVICE, seed, &options(cluster, version, bits));
        for round in 0..3 {
            let mut rig = Rig::single(leaf);
            hammer(&mut rig, &mut model, &mut rng, 400);
            let now = read_all(&mut rig, DISK as usize);
            same(&now, &model, 0);
            leaf = rig.close().remove(0);
            println!("cluster {cluster} version {version} refcounts {bits} round {round}");
            leaf = judge(leaf, &model, true);
        }
        let mut rig = Rig::single(leaf);
        same(&read_all(&mut rig, DISK as usize), &model, 0);
    }
}

#[test]
fn chains_of_any_cluster_size_and_length() {
    for (i, (top, middle, middle_size, base_raw)) in [
        (65536u64, 65536u64, DISK, false),
        (65536, 4096, DISK - (100 << 10), false),
        (4096, 65536, DISK + (1 << 20), false),
        (16384, 512, DISK, true),
        (512, 16384, 1 << 20, true),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = 1000 + i as u64;
        let mut rng = Rng(seed);
        // The base: raw bytes, or an image written through the datapath.
        let base_size = DISK - 512 * 7;
        let mut want: Vec<u8> = (0..base_size).map(|n| (n / 512 % 253) as u8 + 1).collect();
        let mut base = LogQueue::new(base_size.next_multiple_of(512), seed);
        base.load(&want);
        let mut formats = vec![Format::Qcow2, Format::Qcow2, Format::Raw];
        if !base_raw {
            let mut o = CreateOptions::new(base_size);
            o.cluster_size = 65536;
            let mut rig = Rig::single(fresh(DEVICE, seed, &o));
            hammer(&mut rig, &mut want[..0], &mut rng, 0);
            for (n, part) in want.chunks(128 << 10).enumerate() {
                rig.write(n as u64 * (128 << 10), part);
            }
            base = rig.close().remove(0);
            formats[2] = Format::Qcow2;
        }
        want.resize(middle_size as usize, 0);
        let with_backing = |size, cluster, name: &str, format: &str| {
            let mut o = CreateOptions::new(size);
            o.cluster_size = cluster;
            let format = if format == "raw" { Format::Raw } else { Format::Qcow2 };
            o.backing = Some((name.to_owned(), format));
            o
        };
        let base_format = if base_raw { "raw" } else { "qcow2" };
        let o = with_backing(middle_size, middle, "/layer2", base_format);
        let mut rig =
            Rig::open(vec![fresh(DEVICE, seed + 1, &o), base], &formats[1..], Options::default());
        hammer(&mut rig, &mut want, &mut rng, 200);
        let mut lower = rig.close();
        let base = lower.remove(1);
        let mid = judge(lower.remove(0), &want, false);

        want.resize(DISK as usize, 0);
        let o = with_backing(DISK, top, "/layer1", "qcow2");
        let mut rig =
            Rig::open(vec![fresh(DEVICE, seed + 2, &o), mid, base], &formats, Options::default());
        same(&read_all(&mut rig, DISK as usize), &want, 0);
        hammer(&mut rig, &mut want, &mut rng, 400);
        same(&read_all(&mut rig, DISK as usize), &want, 0);
        let leaves = rig.close();
        let top = leaves.into_iter().next().unwrap();
        judge(top, &want, false);
    }
}

#[test]
fn few_slots_and_a_tiny_cache_are_only_slower() {
    for (slots, requests) in [(1, 150), (2, 400), (1024, 200)] {
        let mut rng = Rng(5);
        let mut model = vec![0; DISK as usize];
        let tiny = Options { slots, l2_cache: 0, ..Options::default() };
        let leaf = fresh(DEVICE, 5, &options(512, 3, 16));
        let mut rig = Rig::open(vec![leaf], &[Format::Qcow2], tiny);
        hammer(&mut rig, &mut model, &mut rng, requests);
        if slots <= 2 {
            assert!(rig.image().counters().page_loads.get() > 96, "pages were evicted");
        }
        let leaf = rig.close().remove(0);
        judge(leaf, &model, true);
    }
}

#[test]
fn hits_go_straight_down() {
    let mut rig = Rig::single(fresh(DEVICE, 9, &options(65536, 3, 16)));
    rig.write(0, &vec![1; 256 << 10]);
    let slow = rig.image().counters().slow.get();
    rig.write(4096, &[2; 4096]);
    assert_eq!(rig.read(0, 128 << 10)[4096..8192], [2; 4096]);
    assert_eq!(rig.image().counters().slow.get(), slow);
    assert_eq!(rig.image().hits(), 2);
}

#[test]
fn device_errors_reach_the_guest_and_leave_the_image_valid() {
    let mut model = vec![0; DISK as usize];
    let mut leaf = fresh(DEVICE, 21, &options(65536, 3, 16));
    for n in 0..12u32 {
        let mut rig = Rig::single(leaf);
        rig.leaf(0).fail = Some((Op::Write, Status::Medium, 1));
        let at = u64::from(n) * (200 << 10);
        // Whichever write it hits (data, table, refcounts), the guest or its flush hears of it.
        let wrote = rig.call(Op::Write, at, 4096, &[n as u8 + 1; 4096]).0;
        let flushed = rig.call(Op::Flush, 0, 0, &[]).0;
        assert!(wrote == Status::Medium || flushed == Status::Medium, "{wrote} {flushed}");
        rig.write(at, &[n as u8 + 1; 4096]);
        rig.flush();
        model[at as usize..at as usize + 4096].fill(n as u8 + 1);
        leaf = rig.close().remove(0);
        leaf = judge(leaf, &model, true);
    }
}

#[test]
fn a_full_device_gives_no_space_and_goes_on() {
    let leaf = fresh(DEVICE, 31, &options(65536, 3, 16));
    let mut rig = Rig::single(leaf);
    rig.leaf(0).no_space_from = 1 << 20;
    let mut full = 0;
    for n in 0..20u64 {
        let s = rig.call(Op::Write, n * 65536, 65536, &[9; 65536]).0;
        full += u64::from(s == Status::NoSpace);
    }
    assert!(full > 5 && full < 20, "{full}");
    rig.flush();
    rig.leaf(0).no_space_from = u64::MAX;
    for n in 0..20u64 {
        rig.write(n * 65536, &[7; 65536]);
    }
    let mut model = vec![0; DISK as usize];
    model[..20 * 65536].fill(7);
    judge(rig.close().remove(0), &model, true);

    // And a device that ends: the allocator itself finds no place.
    let mut rig = Rig::single(fresh(1 << 20, 32, &options(65536, 3, 16)));
    let results: Vec<Status> =
        (0..20u64).map(|n| rig.call(Op::Write, n * 65536, 65536, &[9; 65536]).0).collect();
    assert_eq!(results[0], Status::Ok);
    assert_eq!(results[19], Status::NoSpace);
    assert_eq!(rig.call(Op::Discard, 0, 65536 * 4, &[]).0, Status::Ok);
    rig.flush();
    rig.flush();
    rig.write(19 * 65536, &[3; 65536]);
    let mut model = vec![0; DISK as usize];
    for (n, s) in results.iter().enumerate() {
        let byte = if n == 19 {
            3
        } else if n < 4 || !s.is_ok() {
            0
        } else {
            9
        };
        model[n * 65536..(n + 1) * 65536].fill(byte);
    }
    judge(rig.close().remove(0), &model, true);
}

#[test]
fn wrong_requests_are_refused() {
    let mut rig = Rig::single(fresh(DEVICE, 41, &options(65536, 3, 16)));
    assert_eq!(rig.call(Op::Read, DISK, 512, &[]).0, Status::Invalid);
    assert_eq!(rig.call(Op::Read, DISK - 512, 1024, &[]).0, Status::Invalid);
    assert_eq!(rig.call(Op::Read, 100, 512, &[]).0, Status::Invalid);
    assert_eq!(rig.call(Op::Discard, u64::MAX - 511, 512, &[]).0, Status::Invalid);
    assert_eq!(rig.call(Op::Write, 0, 0, &[]).0, Status::Invalid);
    assert_eq!(rig.call(Op::Discard, 0, 0, &[]).0, Status::Ok);
    let leaf = rig.close().remove(0);
    let (stack, leaves) = rig::open_stack(vec![leaf], &[Format::Qcow2], false).unwrap();
    let mut rig = Rig::attach(stack, leaves, Options::default());
    for op in [Op::Write, Op::WriteZeroes, Op::Discard] {
        assert_eq!(rig.call(op, 0, 512, &[0; 512]).0, Status::ReadOnly);
    }
    assert_eq!(rig.read(0, 512), [0; 512]);
    rig.flush();
    rig.close();
}

/// Guests that let go of clusters and never flush: the space comes back, and memory stays bounded.
#[test]
fn what_guests_let_go_of_comes_back_without_a_flush() {
    let mut rig = Rig::single(fresh(2 << 20, 51, &options(65536, 3, 16)));
    for round in 0..200u64 {
        for n in 0..16u64 {
            rig.send(Op::Write, Flags::NONE, n * 65536, 65536, &[round as u8 + 1; 65536]);
        }
        assert!(rig.settle().iter().all(|r| r.1.is_ok()), "round {round}: no space left");
        assert_eq!(rig.call(Op::Discard, 0, 16 * 65536, &[]).0, Status::Ok);
    }
    rig.write(0, &[5; 512]);
    let mut model = vec![0; DISK as usize];
    model[..512].fill(5);
    judge(rig.close().remove(0), &model, true);
}

/// An image of compressed clusters, and what it holds.
fn compressed(cluster: u64, count: u64, compression: Compression) -> (LogQueue, Vec<u8>) {
    let mut o = CreateOptions::new(count * cluster);
    o.cluster_size = cluster;
    o.compression = compression;
    let mut model = Vec::new();
    let leaf = built(40 << 20, 61, &o, |b| {
        let mut c = Compressor::new(compression);
        for n in 0..count {
            let plain: Vec<u8> = (0..cluster).map(|i| (n + 1 + i / 700) as u8).collect();
            let mut packed = Vec::new();
            assert!(c.encode(&plain, &mut packed));
            b.compressed(n * cluster, &packed).unwrap();
            model.extend(plain);
        }
    });
    (leaf, model)
}

/// Parts of compressed clusters overwritten, many at once: each needs its old contents, and there
/// are far fewer buffers for that than requests.
/// Many readers of a few clusters, which threads decompress.
#[test]
fn workers_decompress() {
    let cluster = 65536u64;
    let (leaf, model) = compressed(cluster, 16, Compression::Zstd);
    let mut rig = Rig::single(leaf);
    let wake = rig.core.wake();
    rig.image().use_workers(qcow::run::Workers::new(2), wake);
    for round in 0..4 {
        let mut sent = HashMap::new();
        for n in 0..3u64 {
            let first = (round * 4 + n) * cluster;
            for at in (0..16).map(|i| first + i * 4096) {
                sent.insert(rig.send(Op::Read, Flags::NONE, at, 4096, &[]), at as usize);
            }
        }
        for (id, status, data) in rig.settle() {
            assert_eq!(status, Status::Ok);
            let at = sent[&id];
            same(&data.unwrap()[..4096], &model[at..at + 4096], at as u64);
        }
    }
    rig.close();
}

#[test]
fn compressed_clusters_are_read_and_overwritten() {
    for (cluster, compression, over) in [
        (2u64 << 20, Compression::Deflate, false),
        (65536, Compression::Zstd, false),
        (65536, Compression::Deflate, true),
        (4096, Compression::Deflate, true),
    ] {
        let count = ((24 << 20) / cluster).min(300);
        let (leaf, mut model) = compressed(cluster, count, compression);
        let mut leaves = vec![leaf];
        if over {
            let mut o = CreateOptions::new(count * cluster);
            o.cluster_size = cluster;
            o.backing = Some(("/layer1".to_owned(), Format::Qcow2));
            leaves.insert(0, fresh(40 << 20, 62, &o));
        }
        let formats = [Format::Qcow2; 2];
        let mut rig = Rig::open(leaves, &formats, Options::default());
        same(&read_all(&mut rig, model.len()), &model, 0);
        let base = usize::from(over);
        rig.leaf(base).slow_reads = true;
        for n in (0..count).step_by(1 + count as usize / 50) {
            let at = n * cluster + cluster / 2;
            rig.send(Op::Write, Flags::NONE, at, 1024, &[0xF0; 1024]);
            model[at as usize..at as usize + 1024].fill(0xF0);
        }
        // All get as far as they can before the first one goes on.
        for _ in 0..1000 {
            assert!(rig.turn().is_empty());
        }
        rig.leaf(base).slow_reads = false;
        assert!(rig.settle().iter().all(|r| r.1.is_ok()));
        same(&read_all(&mut rig, model.len()), &model, 0);
        assert_eq!(rig.call(Op::WriteZeroes, cluster, 2 * cluster, &[]).0, Status::Ok);
        model[cluster as usize..3 * cluster as usize].fill(0);
        let mut leaves = rig.close();
        let top = judge(leaves.remove(0), &model, !over);
        leaves.insert(0, top);
        let mut rig = Rig::open(leaves, &formats, Options::default());
        same(&read_all(&mut rig, model.len()), &model, 0);
    }
}

/// Disks and layers that end within a sector.
#[test]
fn sizes_that_are_no_whole_sectors() {
    // A disk of 100,100 bytes: what lies behind its last whole sector is nobody's.
    let mut leaf = fresh(DEVICE, 71, &options(4096, 3, 16));
    leaf.poke(24, &100_100u64.to_be_bytes());
    let mut rig = Rig::single(leaf);
    assert_eq!(rig.call(Op::Read, 100_100 & !511, 512, &[]).0, Status::Invalid);
    rig.write(98_304, &[1; 512]);
    rig.write(99_328, &[2; 512]);
    assert_eq!(rig.call(Op::Discard, 98_304, 1536, &[]).0, Status::Ok);
    rig.write(98_816, &[3; 512]);
    assert_eq!(rig.read(98_304, 1536), [[0; 512], [3; 512], [0; 512]].concat());
    judge(rig.close().remove(0), &[], false);

    // Over a qcow2 file of that size and a raw one: the bytes to the end, then zeroes.
    for raw in [false, true] {
        let mut base = LogQueue::new(DEVICE, 72);
        if raw {
            base.load(&vec![7; 100_352]);
            base.pretend(100_352, 100_100);
        } else {
            let mut o = options(4096, 3, 16);
            o.size = 100_352;
            let mut rig = Rig::single(rig::make(base, &o));
            rig.write(0, &vec![7; 100_352]);
            base = rig.close().remove(0);
            base.poke(24, &100_100u64.to_be_bytes());
        }
        let format = if raw { Format::Raw } else { Format::Qcow2 };
        for cluster in [512, 4096, 65536] {
            let mut o = options(cluster, 3, 16);
            o.backing = Some(("/layer1".to_owned(), format));
            let top = fresh(DEVICE, 73, &o);
            let mut rig = Rig::open(vec![top, base], &[Format::Qcow2, format], Options::default());
            let mut want = vec![7; 100_100];
            want.resize(DISK as usize, 0);
            same(&read_all(&mut rig, DISK as usize), &want, 0);
            rig.write(99_328, &[9; 512]);
            rig.write(100_352, &[8; 512]);
            want[99_328..99_840].fill(9);
            want[100_352..100_864].fill(8);
            same(&read_all(&mut rig, DISK as usize), &want, 0);
            let mut leaves = rig.close();
            base = leaves.remove(1);
            judge(leaves.remove(0), &[], false);
        }
    }
}

/// Write-zeroes that must be fast or nothing; unaligned ends; version 2 over a backing file.
#[test]
fn zeroes_fast_or_not_at_all() {
    let mut rig = Rig::single(fresh(DEVICE, 81, &options(65536, 3, 16)));
    let fast = Flags::FAST_ONLY;
    rig.write(0, &vec![5; 256 << 10]);
    let zero =
        |rig: &mut Rig, offset, len| rig.call_flags(Op::WriteZeroes, fast, offset, len, &[]).0;
    // Parts of clusters with data would have to be written: not fast, and nothing changes.
    assert_eq!(zero(&mut rig, 512, 65536 * 2), Status::Unsupported);
    assert_eq!(zero(&mut rig, 0, 65536 + 512), Status::Unsupported);
    assert_eq!(rig.read(0, 256 << 10), vec![5; 256 << 10]);
    assert_eq!(zero(&mut rig, 65536, 65536), Status::Ok);
    assert_eq!(zero(&mut rig, 65536 + 512, 512), Status::Ok);
    assert_eq!(zero(&mut rig, (256 << 10) + 512, DISK - (256 << 10) - 512), Status::Ok);
    let mut model = vec![0; DISK as usize];
    model[..65536].fill(5);
    model[131_072..262_144].fill(5);
    same(&read_all(&mut rig, DISK as usize), &model, 0);
    judge(rig.close().remove(0), &model, true);

    let mut o = options(65536, 2, 16);
    o.backing = Some(("/layer1".to_owned(), Format::Raw));
    let mut base = LogQueue::new(DISK, 82);
    base.load(&vec![7; DISK as usize]);
    let top = fresh(DEVICE, 83, &o);
    let mut rig = Rig::open(vec![top, base], &[Format::Qcow2, Format::Raw], Options::default());
    assert_eq!(zero(&mut rig, 0, 65536), Status::Unsupported);
    assert_eq!(rig.call(Op::Discard, 0, DISK, &[]).0, Status::Ok);
    assert_eq!(rig.call(Op::WriteZeroes, 1024, 200_000 & !511, &[]).0, Status::Ok);
    let mut model = vec![7; DISK as usize];
    model[1024..1024 + (200_000 & !511)].fill(0);
    same(&read_all(&mut rig, DISK as usize), &model, 0);
    // A discard must not bring back what is below.
    assert_eq!(rig.call(Op::Discard, 0, DISK, &[]).0, Status::Ok);
    same(&read_all(&mut rig, DISK as usize), &model, 0);
    judge(rig.close().remove(0), &model, false);
}

/// 4 KiB writes one after the other into an empty image at depth 32: what that costs the device.
#[test]
fn sequential_writes_cost_little_more_than_their_data() {
    for cache in [true, false] {
        for flush_every in [None, Some(4096u64)] {
            let size = 64 << 20;
            let mut o = CreateOptions::new(size);
            o.cluster_size = 65536;
            let mut leaf = fresh(size + (4 << 20), 91, &o);
            if !cache {
                leaf = leaf.without_cache();
            }
            let mut rig = Rig::single(leaf);
            let before = rig.leaf(0).writes + rig.leaf(0).discards;
            let flushed_before = rig.leaf(0).flushes;
            let (mut sent, mut flushes) = (0, 0);
            let count = size / 4096;
            while sent < count || rig.portal.in_flight() > 0 {
                while sent < count && rig.portal.in_flight() < 32 {
                    rig.send(Op::Write, Flags::NONE, sent * 4096, 4096, &[sent as u8; 4096]);
                    sent += 1;
                    if flush_every.is_some_and(|n| sent.is_multiple_of(n)) {
                        rig.send(Op::Flush, Flags::NONE, 0, 0, &[]);
                        flushes += 1;
                    }
                }
                assert!(rig.turn().iter().all(|r| r.1.is_ok()));
            }
            let device = rig.leaf(0).writes + rig.leaf(0).discards - before;
            let flushed = rig.leaf(0).flushes - flushed_before;
            let per_write = device as f64 / count as f64;
            println!(
                "cache {cache}, {flushes} flushes: {device} device writes for {count} ({per_write:.3}), \
                 {flushed} device flushes"
            );
            assert!(per_write <= 1.2, "{device} device writes for {count}");
            let most = if cache { 2 * flushes + 8 } else { 0 };
            assert!(flushed <= most, "{flushed} device flushes");
            for n in (0..count).step_by(377) {
                assert_eq!(rig.read(n * 4096, 4096), [n as u8; 4096]);
            }
            let (_, bad, leaks) = check(rig.close().remove(0));
            assert_eq!((bad, leaks), (0, 0));
        }
    }
}

/// A reactor may have hundreds of leaf queues, of as many images.
#[test]
fn an_image_is_known_to_the_leaves_that_it_lies_on_only() {
    let leaf = fresh(DEVICE, 5, &CreateOptions::new(4 << 20));
    let (stack, mut leaves) = rig::open_stack(vec![leaf], &[Format::Qcow2], true).unwrap();
    leaves.push(LogQueue::new(DEVICE, 1));
    let mut rig = Rig::attach(stack, leaves, Options::default());
    // The frontend's memory, as nobody said on which leaves the image stands.
    assert_eq!(rig.leaf(1).registered, 1);
    assert!(rig.leaf(0).registered > 1);
    rig.write(0, &[7; 4096]);
    assert_eq!(rig.read(0, 4096), [7; 4096]);
}
