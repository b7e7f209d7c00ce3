//! Images whose devices become larger: requests that find no space wait for some, and nothing hangs that
//! waits for them.

mod rig;

use block::{Flags, Layer, Op, Status};
use qcow::create::CreateOptions;
use qcow::open::Format;
use qcow::run::Options;
use rig::{LogQueue, Rig, check, fresh, qemu_check, qemu_read, same};

const DISK: u64 = 8 << 20;
const CLUSTER: u64 = 65536;
const MIB: u64 = 1 << 20;

/// An image on a device of one MiB, which may become one of 16.
fn small(slots: u16) -> Rig {
    let mut leaf = fresh(16 * MIB, 7, &CreateOptions::new(DISK));
    leaf.pretend(MIB, MIB);
    let mut rig = Rig::open(vec![leaf], &[Format::Qcow2], Options { slots, ..Options::default() });
    rig.image().may_grow(true);
    rig
}

fn turns(rig: &mut Rig) -> Vec<(u64, Status)> {
    (0..2000).flat_map(|_| rig.turn()).map(|(id, status, _)| (id, status)).collect()
}

impl Rig {
    fn grow(&mut self, to: u64) {
        self.leaf(0).pretend(to, to);
        self.image().has_more_space(to);
    }

    fn send_cluster(&mut self, n: u64) -> u64 {
        self.send(Op::Write, Flags::NONE, n * CLUSTER, CLUSTER, &[n as u8 + 1; CLUSTER as usize])
    }

    /// Writes clusters from the first on until one is not answered. Returns how many were.
    fn fill(&mut self) -> u64 {
        for n in 0..DISK / CLUSTER {
            self.send_cluster(n);
            match turns(self)[..] {
                [(_, Status::Ok)] => {}
                [] => return n,
                ref other => panic!("{other:?}"),
            }
        }
        panic!("never full");
    }
}

/// The clusters hold what [`Rig::send_cluster`] writes, and the others nothing.
fn judge(leaf: LogQueue, clusters: std::ops::Range<u64>) {
    let mut model = vec![0; DISK as usize];
    for n in clusters {
        model[(n * CLUSTER) as usize..((n + 1) * CLUSTER) as usize].fill(n as u8 + 1);
    }
    let data = leaf.data();
    let (_, bad, leaks) = check(leaf);
    assert_eq!((bad, leaks), (0, 0));
    if let Some(code) = qemu_check(&data) {
        assert_eq!(code, 0);
    }
    if let Some(read) = qemu_read(&data) {
        same(&read, &model, 0);
    }
}

#[test]
fn requests_wait_until_there_is_space() {
    let mut rig = small(64);
    let space = rig.image().space();
    let begin = space.used();
    assert!(begin > 0 && begin < MIB / 2, "{begin}");
    let full = rig.fill();
    assert!(full > 4 && space.used() == MIB, "{full}");
    assert_eq!(space.waiting(), 1);
    // Whatever needs no space goes on: what is there, flushes, other requests of all kinds.
    assert_eq!(rig.send_cluster(0), full + 1);
    rig.send(Op::Read, Flags::NONE, 0, CLUSTER, &[]);
    rig.send(Op::Flush, Flags::NONE, 0, 0, &[]);
    rig.send(Op::Read, Flags::NONE, full * CLUSTER, CLUSTER, &[]);
    assert_eq!(turns(&mut rig).len(), 4);
    // Others wait as well, some for the same cluster.
    for n in [full, full + 1, full + 2] {
        rig.send_cluster(n);
    }
    assert!(turns(&mut rig).is_empty());
    assert_eq!(space.waiting(), 3);
    // Too little for all of them.
    rig.grow(MIB + 2 * CLUSTER);
    let done = turns(&mut rig);
    assert!((2..4).contains(&done.len()) && done.iter().all(|d| d.1.is_ok()), "{done:?}");
    assert_eq!((space.waiting(), space.used()), (1, MIB + 2 * CLUSTER));
    rig.grow(2 * MIB);
    let rest = turns(&mut rig);
    assert!(done.len() + rest.len() == 4 && rest.iter().all(|d| d.1.is_ok()), "{rest:?}");
    assert_eq!((space.waiting(), space.used()), (0, MIB + 3 * CLUSTER));
    judge(rig.close().remove(0), 0..full + 3);
}

#[test]
fn there_is_none_to_be_had_until_that_is_taken_back() {
    let mut rig = small(64);
    let full = rig.fill();
    rig.send_cluster(full + 1);
    rig.image().may_grow(false);
    let done = turns(&mut rig);
    assert!(done.len() == 2 && done.iter().all(|d| d.1 == Status::NoSpace), "{done:?}");
    assert_eq!(rig.call(Op::Write, full * CLUSTER, 512, &[1; 512]).0, Status::NoSpace);
    // What is there can be written to.
    assert_eq!(rig.call(Op::Write, 0, 512, &[1; 512]).0, Status::Ok);
    rig.image().may_grow(true);
    rig.send_cluster(full);
    assert!(turns(&mut rig).is_empty());
    rig.grow(2 * MIB);
    assert_eq!(turns(&mut rig)[..], [(full + 4, Status::Ok)]);
    judge(rig.close().remove(0), 0..full + 1);
}

#[test]
fn what_guests_empty_is_space_too() {
    let mut rig = small(64);
    let full = rig.fill();
    let space = rig.image().space();
    assert_eq!(rig.call(Op::Discard, 0, 2 * CLUSTER, &[]).0, Status::Ok);
    rig.send(Op::Flush, Flags::NONE, 0, 0, &[]);
    // A flush lets go of it, and what waits has it then.
    let done = turns(&mut rig);
    assert!(done.contains(&(full, Status::Ok)) && done.len() == 2, "{done:?}");
    assert_eq!((space.waiting(), space.used()), (0, MIB));
    // The same where nobody flushes, when there is nothing else to be had.
    rig.send_cluster(full + 1);
    rig.send_cluster(full + 2);
    turns(&mut rig);
    assert_eq!(space.waiting(), 1);
    assert_eq!(rig.call(Op::Discard, 2 * CLUSTER, CLUSTER, &[]).0, Status::Ok);
    assert!(turns(&mut rig).is_empty());
    rig.image().may_grow(false);
    assert!(matches!(turns(&mut rig)[..], [(_, Status::Ok)]));
    judge(rig.close().remove(0), 3..full + 3);
}

#[test]
fn a_close_waits_for_no_space() {
    for slots in [1, 2, 64] {
        let mut rig = small(slots);
        let full = rig.fill();
        for n in 1..4 {
            rig.send_cluster(full + n);
        }
        assert!(turns(&mut rig).is_empty());
        Layer::<LogQueue>::close(rig.image());
        // Nobody says so any more.
        rig.image().may_grow(true);
        let done = turns(&mut rig);
        assert_eq!(done[0], (full, Status::NoSpace));
        let ended = |s: Status| s == Status::NoSpace || s == Status::Gone;
        assert!(done.len() == 4 && done.iter().all(|d| ended(d.1)), "{done:?}");
        let (status, leaves) = rig.end();
        assert_eq!(status, Status::Ok);
        judge({ leaves }.remove(0), 0..full);
    }
}

#[test]
fn a_pause_is_reached_when_there_is_space_or_none() {
    for comes in [true, false] {
        let mut rig = small(64);
        let full = rig.fill();
        rig.image().pause();
        turns(&mut rig);
        assert_eq!(rig.image().paused(), None);
        // Given up, it changes nothing.
        rig.image().resume();
        assert!(turns(&mut rig).is_empty());
        rig.image().pause();
        if comes {
            rig.grow(2 * MIB);
        } else {
            rig.image().may_grow(false);
        }
        let status = if comes { Status::Ok } else { Status::NoSpace };
        assert_eq!(turns(&mut rig)[..], [(full, status)]);
        assert_eq!(rig.image().paused(), Some(Status::Ok));
        rig.image().resume();
        judge(rig.close().remove(0), 0..full + u64::from(comes));
    }
}

#[test]
fn an_image_out_of_service_lets_its_requests_go() {
    let mut rig = small(64);
    let full = rig.fill();
    rig.image().put_out_of_service();
    assert_eq!(turns(&mut rig)[..], [(full, Status::NoSpace)]);
}

/// The first write to a part of the disk makes a table for it: that waits as well.
#[test]
fn tables_wait_for_space() {
    let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(DISK) };
    let mut leaf = fresh(16 * MIB, 8, &options);
    let mut end = leaf.data().len() as u64;
    {
        let rig = Rig::single(leaf);
        let (status, at, mut leaves) = rig.end_at();
        assert_eq!(status, Status::Ok);
        (end, leaf) = (end.min(at), leaves.remove(0));
    }
    leaf.pretend(end, end);
    let mut rig = Rig::single(leaf);
    rig.image().may_grow(true);
    let space = rig.image().space();
    for n in 0..8u64 {
        rig.send(Op::Write, Flags::NONE, n * 512, 512, &[n as u8 + 1; 512]);
        rig.send(Op::Write, Flags::NONE, n * MIB / 4 + 4096, 512, &[n as u8 + 1; 512]);
    }
    let mut done = 0;
    let mut grown = 0;
    while done < 16 {
        let now = turns(&mut rig);
        assert!(now.iter().all(|d| d.1.is_ok()), "{now:?}");
        done += now.len();
        if done < 16 {
            assert!(space.waiting() > 0);
            end += 512;
            grown += 1;
            assert!(grown < 100);
            rig.grow(end);
        }
    }
    assert!(grown > 16, "{grown}");
    let leaf = rig.close().remove(0);
    let (_, bad, leaks) = check(leaf);
    assert_eq!((bad, leaks), (0, 0));
}
