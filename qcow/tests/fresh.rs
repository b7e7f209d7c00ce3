//! Space that a file never had: only what the guest writes goes down there, and nothing old shows.

mod rig;

use block::{Op, Status};
use qcow::create::CreateOptions;
use rig::{LogQueue, Rig, check, fresh, qemu_check, read_offline};

const CLUSTER: u64 = 64 << 10;
const DEVICE: u64 = 8 << 20;
/// An empty image ends before this, and the file of these tests here.
const LEN: u64 = 8 * CLUSTER;

/// An image in a file: behind its end there are zeroes, before it rubbish where nobody wrote.
fn in_file() -> LogQueue {
    let mut leaf = fresh(DEVICE, 5, &CreateOptions::new(4 << 20));
    leaf.poke(LEN, &vec![0; (DEVICE - LEN) as usize]);
    leaf.pretend(DEVICE, LEN);
    leaf
}

/// Bytes that `f` has written to the device.
fn written(rig: &mut Rig, f: impl FnOnce(&mut Rig)) -> u64 {
    let before = rig.leaf(0).written;
    f(rig);
    rig.leaf(0).written - before
}

#[test]
fn only_what_the_guest_writes_goes_into_fresh_space() {
    let mut rig = Rig::single(in_file());
    let mut want = vec![0; 4 << 20];
    let mut put = |rig: &mut Rig, at: u64, len: usize, byte: u8| {
        rig.write(at, &vec![byte; len]);
        want[at as usize..][..len].fill(byte);
    };
    // The first clusters lie where the file has something already.
    let filled =
        written(&mut rig, |rig| (0..4).for_each(|n| put(rig, n * CLUSTER + 8192, 4096, 1)));
    assert!(filled >= 4 * CLUSTER, "{filled} bytes written over what nobody knows");
    let bare = written(&mut rig, |rig| {
        (8..40).for_each(|n| put(rig, n * CLUSTER + n * 1024 / 4096 * 4096, 4096, 2));
    });
    assert!(bare <= 32 * 4096 + 8 * 4096, "{bare} bytes written for 32 pages");
    // Parts of pages are made up to pages; a write over several clusters has two ends.
    let odd = written(&mut rig, |rig| {
        put(rig, 41 * CLUSTER + 512, 1024, 3);
        put(rig, 43 * CLUSTER - 512, CLUSTER as usize + 1024, 4);
    });
    assert!(odd <= 4096 + CLUSTER + 2 * 4096 + 4 * 4096, "{odd} bytes written");
    // What was used before is not fresh.
    assert_eq!(rig.call(Op::Discard, 8 * CLUSTER, 4 * CLUSTER, &[]).0, Status::Ok);
    want[8 * CLUSTER as usize..12 * CLUSTER as usize].fill(0);
    rig.flush();
    rig.flush();
    let mut put = |rig: &mut Rig, at: u64, byte: u8| {
        rig.write(at, &[byte; 512]);
        want[at as usize..][..512].fill(byte);
    };
    let again = written(&mut rig, |rig| (50..54).for_each(|n| put(rig, n * CLUSTER + 4608, 5)));
    assert!(again >= 4 * CLUSTER, "{again} bytes written over what was freed");
    for n in 0..64 {
        let at = n * CLUSTER;
        assert!(rig.read(at, CLUSTER) == want[at as usize..][..CLUSTER as usize], "cluster {n}");
    }
    let mut leaf = rig.close().remove(0);
    leaf.pretend(DEVICE, DEVICE);
    let data = leaf.data();
    let (_, bad, leaks) = check(leaf);
    assert_eq!((bad, leaks), (0, 0));
    assert!(read_offline(&data, None, None) == want);
    assert!(matches!(qemu_check(&data), None | Some(0)));
}

/// A crash leaves a longer file, in which anything may stand that no table knows of.
#[test]
fn what_a_crash_left_is_not_fresh() {
    let mut rig = Rig::single(in_file());
    rig.write(0, &[1; 4096]);
    rig.flush();
    let mut leaf = rig.crash().remove(0);
    leaf.poke(LEN, &vec![0xD5; 16 * CLUSTER as usize]);
    leaf.pretend(DEVICE, LEN + 16 * CLUSTER);
    let mut rig = Rig::single(leaf);
    for n in 1..30 {
        rig.write(n * CLUSTER + 4096, &[n as u8; 4096]);
    }
    for n in 1..30 {
        let got = rig.read(n * CLUSTER, CLUSTER);
        assert!(got[4096..8192].iter().all(|&b| b == n as u8), "cluster {n}");
        assert!(
            got[..4096].iter().chain(&got[8192..]).all(|&b| b == 0),
            "cluster {n} shows old bytes"
        );
    }
    rig.close();
}

/// A device never says that nobody wrote to it.
#[test]
fn a_device_has_no_fresh_space() {
    let mut rig = Rig::single(fresh(DEVICE, 6, &CreateOptions::new(4 << 20)));
    let filled = written(&mut rig, |rig| (0..32).for_each(|n| rig.write(n * CLUSTER, &[7; 4096])));
    assert!(filled >= 32 * CLUSTER);
    assert!(rig.read(CLUSTER, CLUSTER)[4096..].iter().all(|&b| b == 0));
    rig.close();
}
