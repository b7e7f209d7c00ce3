//! Disks of a repository after a daemon died in the middle of something.

use node::{Chain, GroupDevices, Member, NodeSpec};
use qcow::ChainReader;
use qcow::open::{ChainOptions, Format, Opened};
use sr::Repository;

use super::died::Corpse;
use super::repository::{Rig, SR, uri};
use super::*;
use crate::serve::images::{Left, Wanted};

impl Rig {
    /// The repository, while no daemon has it.
    fn offline<T>(&self, f: impl FnOnce(&mut Repository<Member>, &GroupDevices) -> T) -> T {
        let node = NodeSpec::parse(self.device.to_str().unwrap()).unwrap();
        let devices = GroupDevices::open(&[node]).unwrap();
        let host = volume::HostIds::of_this_host().unwrap();
        let mut repository = Repository::open(devices.members().unwrap(), &host).unwrap();
        let done = f(&mut repository, &devices);
        drop(repository);
        devices.close().unwrap();
        done
    }

    fn snapshot(&self, ours: &Ours, key: &str) -> String {
        let made = ours.smapi("Volume.snapshot", json!({"sr": SR, "key": key}));
        made["key"].as_str().unwrap().to_owned()
    }

    fn place(&self, key: &str) -> String {
        format!("fast:{SR}/{key}@{}", self.device.display())
    }
}

/// In the middle of a later one than the first.
#[test]
fn a_daemon_that_dies_in_the_middle_of_another_snapshot() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 9, &key);
    guest.write(64, 7, 4096);
    let first = rig.snapshot(&ours, &key);
    guest.write(64, 8, 4096);
    let corpse = Corpse::of(&rig.world, &rig.device);
    ours.stop();
    corpse.lie(&rig.world, 9);
    rig.offline(|repository, _| repository.snapshot(&key, &crate::volume::author()).unwrap());
    let ours = rig.world.serve(1, Notify::Direct);
    guest.expect(64, 8, 4096);
    let mut other = rig.guest(&ours, 10, &first);
    other.expect(64, 7, 4096);
    rig.unplug(&ours, other, &first);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

/// What was answered is in a journal alone: the image it belongs to stays as it is until that is put in.
#[test]
fn nothing_is_merged_before_what_was_left_is_put_in() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let (key, other) = (ours.disk(SIZE), ours.disk(SIZE));
    for disk in [&key, &other] {
        let snapshot = rig.snapshot(&ours, disk);
        ours.smapi("Volume.destroy", json!({"sr": SR, "key": snapshot}));
    }
    let mut guest = rig.guest(&ours, 9, &key);
    guest.write(64, 7, 4096);
    let corpse = Corpse::of(&rig.world, &rig.device);
    ours.stop();
    corpse.lie(&rig.world, 9);
    // The toolstack asks for something before the guest is taken up.
    let mut ours = rig.world.without_guests(Policy::Adaptive, 1);
    ours.smapi("SR.stat", json!({"sr": SR}));
    let merging = ours.merging(1 << 30);
    wait("a merge", || rig.volumes().len() == 3);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(rig.volumes().len(), 3);
    rig.world.take_up(&mut ours, Notify::Direct);
    guest.expect(64, 7, 4096);
    rig.unplug(&ours, guest, &key);
    wait("the other merge", || rig.volumes().len() == 2);
    drop(merging);
    ours.stop();
    rig.check();
}

/// A larger size is put into the image only after what was left.
#[test]
fn nothing_becomes_larger_before_what_was_left_is_put_in() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 9, &key);
    guest.write(64, 7, 4096);
    let corpse = Corpse::of(&rig.world, &rig.device);
    ours.stop();
    corpse.lie(&rig.world, 9);
    let mut ours = rig.world.without_guests(Policy::Adaptive, 1);
    ours.smapi("Volume.resize", json!({"sr": SR, "key": key, "new_size": 2 * SIZE}));
    rig.world.take_up(&mut ours, Notify::Direct);
    guest.expect(64, 7, 4096);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

/// A snapshot that somebody reads shows it, too.
#[test]
fn nothing_is_frozen_before_what_was_left_is_put_in() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 9, &key);
    guest.write(64, 7, 4096);
    let corpse = Corpse::of(&rig.world, &rig.device);
    ours.stop();
    corpse.lie(&rig.world, 9);
    let mut ours = rig.world.without_guests(Policy::Adaptive, 1);
    let snapshot = rig.snapshot(&ours, &key);
    let dom0 = json!({"uri": uri(&snapshot), "domain": "u0_vbd_0_xvda"});
    ours.smapi("Datapath.activate", dom0.clone());
    rig.world.take_up(&mut ours, Notify::Direct);
    guest.expect(64, 7, 4096);
    ours.smapi("Datapath.deactivate", dom0);
    let mut other = rig.guest(&ours, 10, &snapshot);
    other.expect(64, 7, 4096);
    rig.unplug(&ours, other, &snapshot);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

/// Somebody else than the guest that goes on has the disk opened first.
#[test]
fn whoever_comes_first_puts_in_what_was_left() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 9, &key);
    guest.write(64, 7, 4096);
    let corpse = Corpse::of(&rig.world, &rig.device);
    ours.stop();
    corpse.lie(&rig.world, 9);
    let mut ours = rig.world.without_guests(Policy::Adaptive, 1);
    let dom0 = json!({"uri": uri(&key), "domain": "u0_vbd_0_xvda"});
    ours.smapi("Datapath.activate", dom0.clone());
    rig.world.take_up(&mut ours, Notify::Direct);
    guest.expect(64, 7, 4096);
    ours.smapi("Datapath.deactivate", dom0);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

/// The toolstack and a guest's device want the same disk at the same time.
#[test]
fn a_device_waits_for_who_opens_its_image() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let (images, name) = (&ours.control.images, format!("{SR}/{key}"));
    let nbd = rig.world.dir.path().join("nbd");
    let wanted = Wanted::disk(&rig.place(&key), name.clone(), false, nbd, &key);
    let begin = std::sync::Barrier::new(2);
    for _ in 0..10 {
        std::thread::scope(|scope| {
            let holds = scope.spawn(|| {
                begin.wait();
                images.hold(wanted.clone()).unwrap();
            });
            begin.wait();
            let image = images.open_for(wanted.clone(), "vbd 1/1", Left::Nothing).unwrap();
            holds.join().unwrap();
            assert!(images.release(image, false));
        });
        images.let_go(&name).unwrap();
        assert!(ours.images().is_empty());
    }
    ours.stop();
}

/// The image has its new size already, and the repository does not know.
#[test]
fn a_daemon_that_dies_before_a_new_size_is_noted() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    ours.stop();
    rig.offline(|repository, devices| {
        let lv = repository.disk(&key).unwrap().1.lv.clone();
        let storage = devices.volume(repository.group(), &lv, true).unwrap();
        let opened = Opened { storage, path: None, name: lv, id: None };
        let options = ChainOptions { format: Some(Format::Qcow2), ..Default::default() };
        let chain = Chain::open(opened, options, &mut |_| unreachable!()).unwrap();
        qcow::edit::resize(&mut ChainReader::new(chain), 4 * SIZE).unwrap();
    });
    let ours = rig.world.serve(1, Notify::Thread);
    let mut guest = rig.guest(&ours, 3, &key);
    // The guest sees all of it, and so does whoever asks.
    let last = 4 * SIZE / 512 - 8;
    guest.write(last, 7, 4096);
    let of = json!({"sr": SR, "key": key});
    assert_eq!(ours.smapi("Volume.stat", of)["virtual_size"], 4 * SIZE);
    let smaller = json!({"sr": SR, "key": key, "new_size": 2 * SIZE});
    let refused = ours.asked("Volume.resize", smaller);
    assert_eq!(refused["error"]["code"], "SR_BACKEND_FAILURE_110", "{refused}");
    rig.unplug(&ours, guest, &key);
    rig.snapshot(&ours, &key);
    let mut guest = rig.guest(&ours, 3, &key);
    guest.expect(last, 7, 4096);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

/// All is merged, and the image above names the lower one already; only the repository does not know.
#[test]
fn a_merge_that_was_not_noted_is_noted_while_the_guest_goes_on() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 9, &key);
    guest.write(0, 1, 4096);
    let first = rig.snapshot(&ours, &key);
    guest.write(256, 2, 4096);
    let second = rig.snapshot(&ours, &key);
    ours.smapi("Volume.destroy", json!({"sr": SR, "key": first}));
    guest.write(512, 3, 4096);
    ours.stop();
    rig.offline(|repository, devices| {
        let merge = repository.merges().remove(0);
        let (group, vg) = (repository.group(), repository.group().vg().name.clone());
        let open = |lv: &str, writable| {
            let storage = devices.volume(group, lv, writable).unwrap();
            Opened { storage, path: None, name: lv.to_owned(), id: None }
        };
        let options = ChainOptions { format: Some(Format::Qcow2), ..Default::default() };
        let (top, mut lower) = (open(&merge.upper, false), Some(open(&merge.lower, true)));
        let chain = Chain::open(top, options, &mut |_| Ok(lower.take().unwrap())).unwrap();
        let mut reader = ChainReader::new(chain);
        qcow::edit::commit(&mut reader, 1, false, &mut |_: u64| ()).unwrap();
        drop(reader);
        let above = repository.above(&merge.upper).next().unwrap().lv.clone();
        let mut storage = open(&above, true).storage;
        let lower = format!("/dev/{vg}/{}", merge.lower);
        qcow::edit::set_backing(&mut storage, &above, Some((&lower, Format::Qcow2))).unwrap();
        storage.close().unwrap();
    });
    let ours = rig.world.serve(1, Notify::Direct);
    guest.expect(512, 3, 4096);
    assert_eq!(rig.volumes().len(), 3);
    let merging = ours.merging(1 << 30);
    wait("the note", || rig.volumes().len() == 2);
    drop(merging);
    for (at, byte) in [(0, 1), (256, 2), (512, 3)] {
        guest.expect(at, byte, 4096);
    }
    let mut other = rig.guest(&ours, 10, &second);
    for (at, byte) in [(0, 1), (256, 2), (512, 0)] {
        other.expect(at, byte, 4096);
    }
    rig.unplug(&ours, other, &second);
    rig.unplug(&ours, guest, &key);
    ours.stop();
    rig.check();
}

/// Others stand on it.
#[test]
fn a_snapshot_is_not_opened_for_writing() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let place = rig.place(&rig.snapshot(&ours, &key));
    let refused = ours.control.call("attach", &json!({"name": "a", "node": place})).err().unwrap();
    assert!(refused.message.contains("for reading"), "{}", refused.message);
    ours.call("attach", json!({"name": "a", "node": place, "read-only": true}));
    ours.call("detach", json!({"name": "a"}));
    ours.stop();
}

/// However slowly it goes on.
#[test]
fn a_merge_without_guests_gives_way() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 3, &key);
    guest.write(0, 1, 4096);
    let snapshot = rig.snapshot(&ours, &key);
    (0..16).for_each(|n| guest.write(n * 1024, 2, 4096));
    rig.unplug(&ours, guest, &key);
    ours.smapi("Volume.destroy", json!({"sr": SR, "key": snapshot}));
    let merging = ours.merging(4096);
    // It has begun by then.
    std::thread::sleep(Duration::from_secs(1));
    let clock = Clock::real();
    let began = clock.now();
    let mut guest = rig.guest(&ours, 3, &key);
    guest.expect(0, 2, 4096);
    let took = clock.now() - began;
    assert!(took < 5_000_000_000, "{took}");
    rig.unplug(&ours, guest, &key);
    drop(merging);
    ours.stop();
    rig.check();
}

#[test]
fn a_list_of_repositories_that_is_damaged_is_made_anew() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let list = rig.world.dir.path().join("state/repositories.json");
    let listed = || serde_json::from_slice::<Value>(&std::fs::read(&list).unwrap()).unwrap();
    assert_eq!(listed(), json!({SR: rig.device}));
    for damage in [&b"{\"half"[..], b"", b"[1, 2]", &[0xff; 2 << 20]] {
        std::fs::write(&list, damage).unwrap();
        ours.smapi("SR.detach", json!({"sr": SR}));
        assert_eq!(listed(), json!({}));
        // Also of what is not attached.
        std::fs::write(&list, damage).unwrap();
        ours.smapi("SR.detach", json!({"sr": SR}));
        std::fs::write(&list, damage).unwrap();
        let why = ours.asked("SR.stat", json!({"sr": SR}))["error"]["params"][1].to_string();
        assert!(why.contains("repositories.json") && why.contains("attach"), "{why}");
        ours.smapi("SR.attach", json!({"configuration": rig.configuration()}));
        assert_eq!(listed(), json!({SR: rig.device}));
    }
    ours.stop();
}

#[test]
fn a_disk_of_a_repository_is_never_raw() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let node = format!("fast:{SR}/{}@{}", ours.disk(SIZE), rig.device.display());
    let attach = |format| json!({"name": "a", "node": node, "format": format});
    let raw = ours.control.call("attach", &attach("raw")).unwrap_err().message;
    assert!(raw.contains("qcow2, not raw"), "{raw}");
    ours.call("attach", attach("qcow2"));
    ours.stop();
}
