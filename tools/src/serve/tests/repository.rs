//! Guests whose disks are in a repository, by what the toolstack's plugins answer.

use std::sync::atomic::{AtomicBool, Ordering};

use super::died::Corpse;
use super::*;
use crate::serve::repositories::Coalescer;

pub(super) const SR: &str = "7c1b6e3a-0f5d-4a47-9d0e-3b8c2f1a6d55";

/// A repository on a file.
pub(super) struct Rig {
    pub(super) world: World,
    pub(super) device: PathBuf,
    _folder: tempfile::TempDir,
}

impl Rig {
    pub(super) fn new() -> Rig {
        Rig::of(160 << 20)
    }

    /// On a file of so many bytes.
    pub(super) fn of(bytes: u64) -> Rig {
        let world = World::new();
        // In memory, where there is some: else all of it waits for the drive that others write to.
        let memory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let folder = memory.unwrap();
        let device = folder.path().join("drive");
        std::fs::File::create(&device).unwrap().set_len(bytes).unwrap();
        Rig { world, device, _folder: folder }
    }

    /// The names of all volumes, as they are on the drive.
    pub(super) fn volumes(&self) -> Vec<String> {
        let storage = node::HostStorage::open(&self.device, false).unwrap();
        let repository = sr::Repository::look(vec![storage]).unwrap();
        repository.group().vg().lvs.iter().map(|lv| lv.name.clone()).collect()
    }

    pub(super) fn configuration(&self) -> Value {
        json!({"device": self.device.to_str().unwrap()})
    }

    pub(super) fn make(&self, ours: &Ours) {
        let configuration = self.configuration();
        let new =
            json!({"uuid": SR, "configuration": configuration, "name": "", "description": ""});
        ours.smapi("SR.create", new);
        assert_eq!(ours.smapi("SR.attach", json!({"configuration": configuration})), SR);
    }

    /// Plugs a disk in as the toolstack does, after it was activated.
    pub(super) fn plug(&self, ours: &Ours, domid: u16, key: &str) {
        let uri = uri(key);
        let domain = json!({"uri": uri, "domain": domid.to_string()});
        let answer = ours.smapi("Datapath.attach", domain.clone());
        ours.smapi("Datapath.activate", domain);
        let xen = &answer["implementations"][0];
        assert_eq!((&xen[0], &xen[1]["backend_type"]), (&json!("XenDisk"), &json!("qdisk")));
        self.world.plug(domid, "w", xen[1]["extra"]["polldisk"].as_str().unwrap());
    }

    pub(super) fn guest(&self, ours: &Ours, domid: u16, key: &str) -> Guest {
        self.plug(ours, domid, key);
        Guest::start(&self.world, domid, SETUP)
    }

    /// The guest closes its disk, and the toolstack takes it away.
    pub(super) fn unplug(&self, ours: &Ours, guest: Guest, key: &str) {
        let domid = guest.domid;
        guest.say("6");
        self.world.reaches(domid, "6");
        for method in ["deactivate", "deactivate", "detach"] {
            let args = json!({"uri": uri(key), "domain": domid.to_string()});
            assert_eq!(ours.smapi(&format!("Datapath.{method}"), args), Value::Null);
        }
        self.world.toolstack.rm(backend(domid)).unwrap();
        self.world.toolstack.rm(frontend(domid)).unwrap();
        wait("the end of the image", || {
            ours.images().iter().all(|i| i["name"] != format!("{SR}/{key}"))
        });
    }

    /// All volumes, by their names, judged one by one.
    pub(super) fn check(&self) {
        let storage = node::HostStorage::open(&self.device, true).unwrap();
        let host = volume::HostIds::of_this_host().unwrap();
        let mut repository = sr::Repository::open(vec![storage], &host).unwrap();
        for lv in self.volumes() {
            let mut view = repository.storage(&lv).unwrap();
            let mut bytes = vec![0; block::Storage::len(&view) as usize];
            block::Storage::read_at(&mut view, 0, &mut bytes).unwrap();
            let path = self.world.dir.path().join("extracted");
            std::fs::write(&path, bytes).unwrap();
            let check = std::process::Command::new("qemu-img");
            let file = json!({"driver": "file", "filename": path});
            let image = json!({"driver": "qcow2", "backing": null, "file": file});
            let Ok(out) = { check }.args(["check", &format!("json:{image}")]).output() else {
                tell!("skipped: qemu-img is not installed");
                return;
            };
            // Its backing file is nowhere: the image itself is judged.
            let said = String::from_utf8_lossy(&out.stdout).into_owned();
            let why = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(out.status.success(), "{lv}: {said}{why}");
        }
    }
}

pub(super) fn uri(key: &str) -> String {
    format!("fast://{SR}/{key}")
}

/// The thread that merges, as long as this is.
pub(super) struct Merging {
    end: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Merging {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Ours {
    pub(super) fn merging(&self, rate: u64) -> Merging {
        let end = Arc::new(AtomicBool::new(false));
        let (repositories, images) =
            (self.control.repositories.clone(), self.control.images.clone());
        let coalescer = Coalescer::new(repositories, images, rate, end.clone());
        Merging { end, thread: Some(std::thread::spawn(|| coalescer.run())) }
    }

    pub(super) fn asked(&self, method: &str, args: Value) -> Value {
        self.call("smapiv3", json!({"method": method, "args": args}))
    }

    pub(super) fn smapi(&self, method: &str, args: Value) -> Value {
        let answer = self.asked(method, args);
        assert!(answer["error"].is_null(), "{method}: {answer}");
        answer["result"].clone()
    }

    pub(super) fn images(&self) -> Vec<Value> {
        self.call("list", json!({}))["images"].as_array().unwrap().clone()
    }

    pub(super) fn disk(&self, size: u64) -> String {
        let new =
            json!({"sr": SR, "name": "d", "description": "", "size": size, "sharable": false});
        self.smapi("Volume.create", new)["key"].as_str().unwrap().to_owned()
    }
}

#[test]
fn a_guest_on_a_disk_of_a_repository() {
    let rig = Rig::new();
    let ours = rig.world.serve(2, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 3, &key);
    guest.write(8, 5, 4096);
    // Activated twice, also for dom0, which reads by NBD.
    let dom0 = json!({"uri": uri(&key), "domain": "u0_vbd_0_xvda"});
    for _ in 0..2 {
        ours.smapi("Datapath.activate", dom0.clone());
    }
    let answer = ours.smapi("Datapath.attach", dom0.clone());
    let nbd = &answer["implementations"][1];
    let socket = rig.world.dir.path().join("state/nbd").join(&key);
    let wanted = format!("nbd:unix:{}:exportname={key}", socket.display());
    assert_eq!(*nbd, json!(["Nbd", {"uri": wanted}]));
    assert!(std::os::unix::net::UnixStream::connect(&socket).is_ok());
    // Who uses it keeps it.
    let refused = ours.asked("Volume.destroy", json!({"sr": SR, "key": key}));
    assert_eq!(refused["error"]["code"], "SR_BACKEND_FAILURE_24", "{refused}");
    rig.unplug_only(&ours, &guest, &key);
    assert_eq!(ours.images().len(), 1, "dom0 has it");
    ours.smapi("Datapath.deactivate", dom0);
    assert!(ours.images().is_empty() && !socket.exists());
    // The same disk in the guest's next life, and another beside it.
    let other = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 4, &key);
    let mut beside = rig.guest(&ours, 5, &other);
    guest.expect(8, 5, 4096);
    beside.expect(8, 0, 4096);
    beside.write(8, 6, 4096);
    guest.expect(8, 5, 4096);
    rig.unplug(&ours, guest, &key);
    rig.unplug(&ours, beside, &other);
    ours.smapi("Volume.destroy", json!({"sr": SR, "key": key}));
    for _ in 0..2 {
        ours.smapi("SR.detach", json!({"sr": SR}));
    }
    let gone = ours.asked("Datapath.attach", json!({"uri": uri(&other), "domain": "1"}));
    assert_eq!(gone["error"]["code"], "Sr_not_attached");
    // No toolstack ever sends these.
    for uri in ["fast://../x", "vhd://a/b", "fast://a/b/c", "", "fast:///"] {
        let refused = ours.asked("Datapath.attach", json!({"uri": uri, "domain": "1"}));
        assert!(refused["error"]["code"].is_string(), "{uri}");
    }
    ours.stop();
    rig.check();
}

impl Rig {
    pub(super) fn unplug_only(&self, ours: &Ours, guest: &Guest, key: &str) {
        let domid = guest.domid;
        guest.say("6");
        self.world.reaches(domid, "6");
        let args = json!({"uri": uri(key), "domain": domid.to_string()});
        ours.smapi("Datapath.deactivate", args);
        self.world.toolstack.rm(backend(domid)).unwrap();
        self.world.toolstack.rm(frontend(domid)).unwrap();
        wait("the end of its use", || ours.images().iter().all(|i| i["used-by"].is_null()));
    }
}

/// The daemon goes, in order and not; the next one knows of the repository and of its guests.
#[test]
fn another_daemon_finds_repository_and_guests() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 9, &key);
    guest.write(64, 7, 4096);
    ours.stop();
    let ours = rig.world.serve(1, Notify::Direct);
    guest.expect(64, 7, 4096);
    assert_eq!(ours.smapi("Volume.stat", json!({"sr": SR, "key": key}))["key"], *key);
    guest.write(128, 8, 4096);
    // What it would leave if it died now: what was answered is in the journal alone.
    let corpse = Corpse::of(&rig.world, &rig.device);
    ours.stop();
    corpse.lie(&rig.world, 9);
    let ours = rig.world.serve(1, Notify::Direct);
    guest.expect(64, 7, 4096);
    guest.expect(128, 8, 4096);
    assert_eq!(ours.images().len(), 1);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

/// Snapshots and clones while the guest writes: each shows what was there when it was asked for.
#[test]
fn snapshots_and_clones_of_a_disk_that_is_written_to() {
    let rig = Rig::new();
    let ours = rig.world.serve(2, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 3, &key);
    let of = json!({"sr": SR, "key": key});
    let mut taken = Vec::new();
    let (clock, mut stalls) = (Clock::real(), Vec::new());
    for round in 1..=4u8 {
        for at in 0..32u64 {
            guest.write(at * 256, round, 4096);
        }
        // The guest goes on meanwhile.
        let method = if round == 3 { "Volume.clone" } else { "Volume.snapshot" };
        let made = std::thread::scope(|scope| {
            let caller = scope.spawn(|| ours.smapi(method, of.clone()));
            while !caller.is_finished() {
                let began = clock.now();
                guest.write(8, 0x80 | round, 4096);
                stalls.push(clock.now() - began);
            }
            caller.join().unwrap()
        });
        assert_eq!(made["read_write"], method == "Volume.clone");
        taken.push((made["key"].as_str().unwrap().to_owned(), round));
        guest.expect(0, round, 4096);
    }
    stalls.sort_unstable();
    tell!("a write beside a snapshot takes {} us at most", stalls[stalls.len() - 1] / 1000);
    // Each of them for another guest, the clone to be written to.
    for (n, (copy, round)) in taken.iter().enumerate() {
        let domid = 20 + n as u16;
        let mut other = rig.guest(&ours, domid, copy);
        for at in 0..32 {
            other.expect(at * 256, *round, 4096);
        }
        if *round == 3 {
            other.write(0, 0x33, 4096);
            other.expect(0, 0x33, 4096);
        }
        rig.unplug(&ours, other, copy);
    }
    guest.expect(0, 4, 4096);
    // The image's chain is none of ctl's business.
    let image = format!("{SR}/{key}");
    let refused = ours.control.call("stream", &json!({"image": image})).err().unwrap();
    assert!(refused.message.contains("use the toolstack"), "{}", refused.message);
    let chain = ours.call("chain", json!({"image": image}));
    assert_eq!(chain["layers"].as_array().unwrap().len(), 5, "{chain}");
    // A revert is for a disk that rests.
    let back = json!({"sr": SR, "key": key, "snapshot": taken[0].0});
    assert_eq!(ours.asked("Volume.revert", back.clone())["error"]["code"], "SR_BACKEND_FAILURE_24");
    rig.unplug(&ours, guest, &key);
    ours.smapi("Volume.revert", back);
    let mut guest = rig.guest(&ours, 4, &key);
    guest.expect(0, 1, 4096);
    guest.expect(31 * 256, 1, 4096);
    rig.unplug(&ours, guest, &key);
    // All go, in whatever order.
    for (copy, _) in [&taken[1], &taken[0], &taken[3], &taken[2]] {
        ours.smapi("Volume.destroy", json!({"sr": SR, "key": copy}));
    }
    ours.smapi("Volume.destroy", json!({"sr": SR, "key": key}));
    let stat = ours.smapi("SR.stat", json!({"sr": SR}));
    assert_eq!(stat["free_space"], stat["total_space"]);
    ours.stop();
}

/// A snapshot that cannot be had leaves all as it was, also while the guest writes.
#[test]
fn a_snapshot_for_which_there_is_no_space() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 3, &key);
    guest.write(8, 1, 4096);
    let asked = |of: &str| ours.asked("Volume.snapshot", json!({"sr": SR, "key": of}));
    let mut count = 0;
    let refused = loop {
        let answer = asked(&key);
        if answer["error"].is_object() {
            break answer;
        }
        count += 1;
        guest.write(8, count, 4096);
    };
    assert_eq!(refused["error"]["code"], "SR_BACKEND_FAILURE_44", "{refused}");
    assert!(count > 3, "{count}");
    guest.expect(8, count, 4096);
    guest.write(16, 9, 4096);
    let disks = ours.smapi("SR.ls", json!({"sr": SR}));
    assert_eq!(disks.as_array().unwrap().len(), usize::from(count) + 1);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

/// The daemon dies between the commit of a snapshot and the moment from which the guest writes to the new
/// volume: what was answered is in the old one, and in its journal.
#[test]
fn a_daemon_that_dies_in_the_middle_of_a_snapshot() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 9, &key);
    guest.write(64, 7, 4096);
    let corpse = Corpse::of(&rig.world, &rig.device);
    ours.stop();
    corpse.lie(&rig.world, 9);
    // What would be on the drive then.
    let storage = node::HostStorage::open(&rig.device, true).unwrap();
    let host = volume::HostIds::of_this_host().unwrap();
    let mut repository = sr::Repository::open(vec![storage], &host).unwrap();
    let taken = repository.snapshot(&key, &crate::volume::author()).unwrap();
    drop(repository);
    let ours = rig.world.serve(1, Notify::Direct);
    guest.expect(64, 7, 4096);
    guest.write(64, 8, 4096);
    let mut other = rig.guest(&ours, 10, &taken.key);
    other.expect(64, 7, 4096);
    rig.unplug(&ours, other, &taken.key);
    // After it, and the guest has written to both: the journal is of the new one.
    let again = ours.smapi("Volume.snapshot", json!({"sr": SR, "key": key}));
    guest.write(128, 9, 4096);
    let corpse = Corpse::of(&rig.world, &rig.device);
    ours.stop();
    corpse.lie(&rig.world, 9);
    let ours = rig.world.serve(1, Notify::Direct);
    guest.expect(64, 8, 4096);
    guest.expect(128, 9, 4096);
    let again = again["key"].as_str().unwrap();
    let mut other = rig.guest(&ours, 11, again);
    other.expect(128, 0, 4096);
    rig.unplug(&ours, other, again);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

#[test]
fn a_disk_becomes_larger() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let resize =
        |size: u64| ours.asked("Volume.resize", json!({"sr": SR, "key": key, "new_size": size}));
    let size = || ours.smapi("Volume.stat", json!({"sr": SR, "key": key}))["virtual_size"].clone();
    assert!(resize(2 * SIZE - 5)["error"].is_null());
    assert_eq!(size(), 2 * SIZE);
    for (bytes, code) in [
        (SIZE, "SR_BACKEND_FAILURE_110"),
        (1 << 60, "SR_BACKEND_FAILURE"),
        (0, "SR_BACKEND_FAILURE"),
    ] {
        assert_eq!(resize(bytes)["error"]["code"], code, "{bytes}");
    }
    let mut guest = rig.guest(&ours, 3, &key);
    let sectors = || rig.world.read(&format!("{}/sectors", backend(3)));
    assert_eq!(sectors().unwrap(), (2 * SIZE / 512).to_string());
    assert!(resize(1 << 40)["error"].is_null());
    assert_eq!(size(), 1u64 << 40);
    wait("the new size", || sectors() == Some((1u64 << 31).to_string()));
    guest.write((1 << 31) - 8, 7, 4096);
    guest.expect((1 << 31) - 8, 7, 4096);
    guest.expect(0, 0, 4096);
    let snapshot = ours.smapi("Volume.snapshot", json!({"sr": SR, "key": key}));
    assert_eq!(snapshot["virtual_size"], 1u64 << 40);
    let refused = ours
        .asked("Volume.resize", json!({"sr": SR, "key": snapshot["key"], "new_size": 1u64 << 41}));
    assert_eq!(refused["error"]["code"], "SR_BACKEND_FAILURE_110");
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

/// Snapshots come and go under a guest that writes: what is left of them becomes one.
#[test]
fn what_is_left_of_snapshots_is_merged_while_the_guest_writes() {
    let rig = Rig::new();
    let ours = rig.world.serve(2, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let of = json!({"sr": SR, "key": key});
    let mut guest = rig.guest(&ours, 3, &key);
    let mut taken = Vec::new();
    for round in 1..=5u8 {
        // Each has something of its own, and all have one in common.
        guest.write(u64::from(round) * 1024, round, 16 << 10);
        guest.write(0, round, 4096);
        let made = ours.smapi("Volume.snapshot", of.clone());
        taken.push(made["key"].as_str().unwrap().to_owned());
    }
    assert_eq!(rig.volumes().len(), 6);
    // A copy of one in the middle, which another guest writes to.
    let copy = ours.smapi("Volume.clone", json!({"sr": SR, "key": taken[2]}))["key"].clone();
    let copy = copy.as_str().unwrap();
    let mut other = rig.guest(&ours, 4, copy);
    other.write(0, 0x44, 4096);
    for snapshot in &taken {
        ours.smapi("Volume.destroy", json!({"sr": SR, "key": snapshot}));
    }
    let merging = ours.merging(100 << 20);
    // The two lowest have two running guests above them, and stay apart; the two upper ones become one.
    wait("a merge", || {
        guest.write(8, 0x55, 4096);
        rig.volumes().len() == 6
    });
    rig.unplug(&ours, other, copy);
    ours.smapi("Volume.destroy", json!({"sr": SR, "key": copy}));
    // All but the uppermost, which is written to.
    wait("all merges", || {
        guest.write(8, 0x56, 4096);
        rig.volumes().len() == 2
    });
    guest.expect(0, 5, 4096);
    guest.expect(8, 0x56, 4096);
    for round in 1..=5u8 {
        guest.expect(u64::from(round) * 1024, round, 16 << 10);
    }
    // The daemon says so a moment after the drive.
    let chain = || ours.call("chain", json!({"image": format!("{SR}/{key}")}));
    wait("the end of the merge", || chain()["layers"].as_array().unwrap().len() == 2);
    // When it rests that one goes, too.
    rig.unplug(&ours, guest, &key);
    wait("the last merge", || rig.volumes().len() == 1);
    let mut guest = rig.guest(&ours, 3, &key);
    guest.expect(0, 5, 4096);
    guest.expect(4096, 4, 16 << 10);
    rig.unplug(&ours, guest, &key);
    drop(merging);
    ours.stop();
    rig.check();
}

/// Whoever needs a disk does not wait for a merge.
#[test]
fn a_merge_gives_way() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let of = json!({"sr": SR, "key": key});
    let mut guest = rig.guest(&ours, 3, &key);
    let snapshot = |guest: &mut Guest, byte: u8| {
        (0..60).for_each(|n| guest.write(n * 256, byte, 64 << 10));
        ours.smapi("Volume.snapshot", of.clone())["key"].as_str().unwrap().to_owned()
    };
    let first = snapshot(&mut guest, 1);
    let second = snapshot(&mut guest, 2);
    ours.smapi("Volume.destroy", json!({"sr": SR, "key": first}));
    // So slowly that it does not end by itself: the second snapshot goes into what was the first.
    let merging = ours.merging(4096);
    let jobs = || ours.call("jobs", json!({"image": format!("{SR}/{key}")}));
    wait("a merge", || jobs().as_array().unwrap().iter().any(|job| job["state"] == "running"));
    // A backup of the second one, another snapshot, the end of the guest.
    let clock = Clock::real();
    let began = clock.now();
    let mut backup = rig.guest(&ours, 4, &second);
    backup.expect(256, 2, 4096);
    rig.unplug(&ours, backup, &second);
    let third = snapshot(&mut guest, 3);
    rig.unplug(&ours, guest, &key);
    let mut guest = rig.guest(&ours, 3, &key);
    guest.expect(256, 3, 4096);
    let took = clock.now() - began;
    assert!(took < 20_000_000_000, "{took}");
    drop(merging);
    rig.unplug(&ours, guest, &key);
    // In time it ends.
    let merging = ours.merging(1 << 30);
    wait("the merge", || rig.volumes().len() == 3);
    for (of, byte) in [(&second, 2), (&third, 3)] {
        let mut guest = rig.guest(&ours, 5, of);
        guest.expect(256, byte, 4096);
        rig.unplug(&ours, guest, of);
    }
    drop(merging);
    ours.smapi("SR.detach", json!({"sr": SR}));
    ours.stop();
    rig.check();
}

/// Limits hold for all rings of a disk, follow it, and do not keep a reactor busy.
#[test]
fn a_disk_takes_so_much_in_a_second() {
    let rig = Rig::new();
    let ours = rig.world.serve(2, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let image = format!("{SR}/{key}");
    let mut guest = rig.guest(&ours, 3, &key);
    let clock = Clock::real();
    let rate = |guest: &mut Guest, count: u64| {
        let began = clock.now();
        (0..count).for_each(|n| guest.write(n % 64 * 128, 7, 4096));
        count * 1_000_000_000 / (clock.now() - began)
    };
    rate(&mut guest, 64);
    ours.call("limit", json!({"image": image, "iops": 200}));
    let limited = rate(&mut guest, 100);
    // A busy machine may be slower.
    assert!(limited <= 230, "{limited} a second");
    // In these 100 requests the reactor slept most of the time.
    let sleeps = || -> u64 {
        let stats = ours.call("stats", json!({}));
        stats["reactors"].as_array().unwrap().iter().map(|r| r["sleeps"].as_u64().unwrap()).sum()
    };
    let before = sleeps();
    rate(&mut guest, 50);
    assert!(sleeps() - before > 25, "{}", sleeps() - before);
    // 400 of 4 KiB.
    ours.call("limit", json!({"image": image, "bandwidth": 400 * 4096}));
    let limited = rate(&mut guest, 200);
    assert!(limited <= 460, "{limited} a second");
    // It is noted in the repository.
    rig.unplug(&ours, guest, &key);
    let mut guest = rig.guest(&ours, 4, &key);
    let limited = rate(&mut guest, 200);
    assert!(limited <= 460, "{limited} a second");
    ours.call("limit", json!({"image": image}));
    let refused = ours.control.call("limit", &json!({"image": image, "iops": -1}));
    assert!(refused.is_err());
    rig.unplug(&ours, guest, &key);
    let mut guest = rig.guest(&ours, 5, &key);
    (0..300).for_each(|n| guest.write(n % 64 * 128, 8, 4096));
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}
