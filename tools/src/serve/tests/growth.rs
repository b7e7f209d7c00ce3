//! Guests that write more than their disks' first volumes hold, until the repository is full and after.

use std::collections::BTreeSet;

use block::{Flags, Op, Status};
use reactor::PortalRequest;

use super::died::Corpse;
use super::repository::{Rig, SR};
use super::*;

const MIB: u64 = 1 << 20;
/// Bytes of a request.
const PIECE: usize = 128 << 10;

/// Pieces side by side, each with a byte of its own.
fn byte(piece: u64) -> u8 {
    (piece % 251) as u8 + 1
}

impl Guest {
    /// Writes pieces, several at a time, until all are written, or none is for a while and `full` says
    /// that there is no space. Returns those that were sent and are not written.
    fn try_fill(
        &mut self,
        pieces: std::ops::Range<u64>,
        mut full: impl FnMut() -> bool,
    ) -> BTreeSet<u64> {
        let clock = Clock::real();
        let (mut next, mut open, mut last) = (pieces.start, BTreeSet::new(), clock.now());
        while !open.is_empty() || next < pieces.end {
            while next < pieces.end && open.len() < 8 {
                self.ring.write(next, next * PIECE as u64 / 512, &vec![byte(next); PIECE]).unwrap();
                open.insert(next);
                next += 1;
            }
            self.ring.push();
            match self.ring.reap(&mut []).unwrap() {
                Some(done) => {
                    assert_eq!(done.status, 0, "piece {}", done.cookie);
                    assert!(open.remove(&done.cookie));
                    last = clock.now();
                }
                None if clock.now() - last > 3_000_000_000 && full() => break,
                None => std::thread::sleep(Duration::from_micros(100)),
            }
            assert!(clock.now() - last < 20_000_000_000, "never written: {open:?}");
        }
        open
    }

    fn fill(&mut self, pieces: std::ops::Range<u64>) {
        assert!(self.try_fill(pieces, || false).is_empty());
    }

    /// What was sent is written now.
    fn written(&mut self, mut open: BTreeSet<u64>) {
        while !open.is_empty() {
            let mut done = None;
            wait("an answer", || {
                done = self.ring.reap(&mut []).unwrap();
                done.is_some()
            });
            let done = done.unwrap();
            assert!(done.status == 0 && open.remove(&done.cookie));
        }
    }

    fn expect_pieces(&mut self, pieces: std::ops::Range<u64>) {
        for piece in pieces {
            self.expect(piece * PIECE as u64 / 512, byte(piece), PIECE);
        }
    }
}

impl Ours {
    fn free(&self) -> u64 {
        self.smapi("SR.stat", json!({"sr": SR}))["free_space"].as_u64().unwrap()
    }

    fn used(&self, key: &str) -> u64 {
        let stat = self.smapi("Volume.stat", json!({"sr": SR, "key": key}));
        stat["physical_utilisation"].as_u64().unwrap()
    }

    fn space(&self, key: &str) -> Value {
        let name = format!("{SR}/{key}");
        let images = self.images();
        images.iter().find(|i| i["name"] == name).unwrap()["space"].clone()
    }
}

impl Ours {
    /// A piece by a portal: how that ended, and the first byte that was read.
    fn direct(&self, key: &str, op: Op, offset: u64) -> (Status, u8) {
        let changes = self.control.images.changes(&format!("{SR}/{key}")).unwrap();
        let mut held = changes.hold().ok().unwrap();
        let mut pool = dma::Pool::new(1, PIECE as u32).unwrap();
        let buf = pool.take().unwrap();
        let region = pool.region().clone();
        region.write_seg(&buf.seg(), &[if op == Op::Write { byte(0) } else { 0 }; PIECE]);
        let mut portal = held.disk().portal(1, vec![region.clone()]).unwrap();
        let (id, flags, len, seg) = (0, Flags::NONE, PIECE as u64, Some(buf.seg()));
        let status = portal.call(PortalRequest { id, op, flags, offset, len, seg });
        drop(portal);
        let mut bytes = vec![0; PIECE];
        region.read_seg(&buf.seg(), &mut bytes);
        pool.give(buf);
        (status, if op == Op::Read { bytes[0] } else { 0 })
    }
}

impl Rig {
    fn segments(&self) -> Vec<usize> {
        let storage = node::HostStorage::open(&self.device, false).unwrap();
        let repository = sr::Repository::look(vec![storage]).unwrap();
        repository.group().vg().lvs.iter().map(|lv| lv.segments.len()).collect()
    }
}

#[test]
fn guests_fill_new_disks() {
    let rig = Rig::of(1400 * MIB);
    let ours = rig.world.serve(2, Notify::Thread);
    rig.make(&ours);
    let keys = [ours.disk(2048 * MIB), ours.disk(2048 * MIB)];
    assert_eq!(ours.used(&keys[0]), 64 * MIB);
    let clock = Clock::real();
    let began = clock.now();
    rig.plug(&ours, 3, &keys[0]);
    tell!("a disk is attached and active after {} us", (clock.now() - began) / 1000);
    let mut guest = Guest::start(&rig.world, 3, SETUP);
    // There before the guest writes anything.
    assert!(ours.used(&keys[0]) > 320 * MIB);
    let mut beside = rig.guest(&ours, 4, &keys[1]);
    let pieces = 400 * MIB / PIECE as u64;
    let began = clock.now();
    for part in 0..8 {
        let part = part * pieces / 8..(part + 1) * pieces / 8;
        guest.fill(part.clone());
        beside.fill(part.start / 4..part.end / 4);
    }
    tell!("500 MiB in {} ms", (clock.now() - began) / 1_000_000);
    assert!(ours.used(&keys[0]) > 400 * MIB && ours.space(&keys[0]).is_null());
    guest.expect_pieces(0..pieces);
    rig.unplug(&ours, guest, &keys[0]);
    rig.unplug(&ours, beside, &keys[1]);
    // Once more, with nothing in memory.
    let mut guest = rig.guest(&ours, 5, &keys[0]);
    guest.expect_pieces(0..pieces);
    let mut beside = rig.guest(&ours, 6, &keys[1]);
    beside.expect_pieces(0..pieces / 4);
    rig.unplug(&ours, guest, &keys[0]);
    rig.unplug(&ours, beside, &keys[1]);
    ours.stop();
    let segments = rig.segments();
    assert!(segments.iter().all(|&count| count <= 64), "{segments:?}");
    rig.check();
}

/// Guests wait for space; others are told that there is none.
#[test]
fn a_full_repository_and_space_again() {
    let rig = Rig::of(300 * MIB);
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let (key, other) = (ours.disk(2048 * MIB), ours.disk(2048 * MIB));
    let mut guest = rig.guest(&ours, 3, &key);
    let held = ours.used(&other);
    let all = ours.free() + ours.used(&key);
    let end = 2048 * MIB / PIECE as u64;
    let full = || ours.space(&key) == "exhausted";
    let open = guest.try_fill(0..end, full);
    let written = *open.first().unwrap();
    assert_eq!((ours.free(), ours.used(&key)), (0, all), "it has all that there was");
    let bytes = written * PIECE as u64;
    assert!(bytes > all - 4 * MIB && bytes < all, "{bytes} of {all}");
    // Past the ring, which waits. What is there can be read and written.
    let last = (end - 1) * PIECE as u64;
    assert_eq!(ours.direct(&key, Op::Write, last), (Status::NoSpace, 0));
    assert_eq!(ours.direct(&key, Op::Read, last), (Status::Ok, 0));
    assert_eq!(ours.direct(&key, Op::Read, 0), (Status::Ok, byte(0)));
    assert_eq!(ours.direct(&key, Op::Write, 0).0, Status::Ok);
    // Without the other disk there is room.
    ours.smapi("Volume.destroy", json!({"sr": SR, "key": other}));
    let next = open.last().unwrap() + 1;
    guest.written(open);
    guest.write(0, byte(0), PIECE);
    guest.expect_pieces(0..next);
    let open = guest.try_fill(next..end, full);
    let more = *open.first().unwrap() - written;
    assert!(more * PIECE as u64 > held - 4 * MIB, "{more}");
    assert_eq!((ours.free(), ours.space(&key)), (0, json!("exhausted")));
    // The daemon ends all the same, also if requests have only just begun to wait; what the guest has not
    // been answered is in its ring.
    ours.control.repositories.wait_for_space(&format!("{SR}/{key}"));
    let clock = Clock::real();
    let began = clock.now();
    ours.stop();
    let took = (clock.now() - began) / 1_000_000;
    assert!(took < 15_000, "{took} ms");
    let ours = rig.world.serve(1, Notify::Thread);
    wait("the image", || !ours.images().is_empty());
    // The guest dies of it.
    rig.world.toolstack.rm(frontend(3)).unwrap();
    wait("the end of the image", || ours.images().is_empty());
    rig.world.toolstack.rm(backend(3)).unwrap();
    drop(guest);
    let mut guest = rig.guest(&ours, 4, &key);
    guest.expect_pieces(0..written + more);
    ours.stop();
    rig.check();
}

/// Whoever changes a disk has it for himself: growth goes on.
#[test]
fn a_disk_grows_while_it_is_being_changed() {
    let rig = Rig::of(900 * MIB);
    let ours = rig.world.serve(2, Notify::Direct);
    rig.make(&ours);
    let key = ours.disk(2048 * MIB);
    let mut guest = rig.guest(&ours, 3, &key);
    let changes = ours.control.images.changes(&format!("{SR}/{key}")).unwrap();
    let held = changes.hold().ok().unwrap();
    let before = ours.used(&key);
    let pieces = before / PIECE as u64;
    // More than there was ahead of it.
    guest.fill(0..pieces);
    assert!(ours.used(&key) > before);
    drop(held);
    // A snapshot while it is written to: the guest goes on in a new volume, which grows then.
    let snapshot = ours.smapi("Volume.snapshot", json!({"sr": SR, "key": key}));
    let snapshot = snapshot["key"].as_str().unwrap().to_owned();
    let frozen = ours.used(&snapshot);
    guest.fill(100..900);
    assert!(ours.used(&key) > 100 * MIB);
    assert_eq!(ours.used(&snapshot), frozen);
    guest.expect_pieces(0..pieces);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

#[test]
fn a_daemon_that_dies_before_the_image_knows_of_its_space() {
    let rig = Rig::of(600 * MIB);
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(2048 * MIB);
    let mut guest = rig.guest(&ours, 9, &key);
    guest.fill(0..100);
    let used = ours.used(&key);
    ours.control.repositories.grow_untold(SR, &key, 64 * MIB);
    assert_eq!(ours.used(&key), used + 64 * MIB);
    let corpse = Corpse::of(&rig.world, &rig.device);
    ours.stop();
    corpse.lie(&rig.world, 9);
    let ours = rig.world.serve(1, Notify::Direct);
    guest.expect_pieces(0..100);
    assert!(ours.used(&key) >= used + 64 * MIB);
    let pieces = (used + 32 * MIB) / PIECE as u64;
    guest.fill(100..pieces);
    guest.expect_pieces(0..pieces);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}
