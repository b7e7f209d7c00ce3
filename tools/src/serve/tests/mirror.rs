//! Mirrors of disks whose guests go on, to NBD servers of ours and of QEMU.

use std::process::{Child, Command};

use super::repository::{Rig, uri};
use super::*;

fn remote(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

fn begin(ours: &Ours, key: &str, domain: &str, remote: &str) -> Value {
    ours.smapi("Data.mirror", json!({"uri": uri(key), "domain": domain, "remote": remote}))
}

fn stat(ours: &Ours, operation: &Value) -> Value {
    ours.smapi("Data.stat", json!({"operation": operation}))
}

/// Random writes of a guest, of which the model knows.
struct Writer {
    model: Vec<u8>,
    seed: u64,
}

impl Writer {
    fn new() -> Writer {
        Writer { model: vec![0; SIZE as usize], seed: 88 }
    }

    fn write(&mut self, guest: &mut Guest) {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let sector = (self.seed >> 33) % (SIZE / 512 - 8);
        let byte = (self.seed >> 24) as u8;
        guest.write(sector, byte, 4096);
        let at = sector as usize * 512;
        self.model[at..at + 4096].fill(byte);
    }
}

/// What a server of NBD has.
fn contents(socket: &Path, export: &str) -> Option<Vec<u8>> {
    let out = socket.with_extension("raw");
    let args = ["convert", "-f", "raw", "-O", "raw", &remote(socket, export)];
    let run = Command::new("qemu-img").args(args).arg(&out).output().ok()?;
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    Some(std::fs::read(&out).unwrap())
}

#[test]
fn a_mirror_has_all_that_a_guest_wrote_until_its_end() {
    let rig = Rig::new();
    let ours = rig.world.serve(2, Notify::Thread);
    rig.make(&ours);
    let (key, target) = (ours.disk(SIZE), ours.disk(SIZE));
    let there = json!({"uri": uri(&target), "domain": "mirror_vm"});
    ours.smapi("Datapath.activate", there.clone());
    let socket = rig.world.dir.path().join("state/nbd").join(&target);
    let mut guest = rig.guest(&ours, 3, &key);
    let mut writer = Writer::new();
    for _ in 0..200 {
        writer.write(&mut guest);
    }
    let operation = begin(&ours, &key, "3", &remote(&socket, &target));
    assert_eq!(operation[0], "MirrorV1");
    // All of it is on its way meanwhile.
    (0..300).for_each(|_| writer.write(&mut guest));
    assert_eq!(ours.smapi("Data.ls", json!({})), json!([operation]));
    // One at a time; and its size stays meanwhile.
    let again = json!({"uri": uri(&key), "domain": "3", "remote": remote(&socket, &target)});
    assert!(!ours.asked("Data.mirror", again)["error"].is_null());
    let larger = json!({"sr": super::repository::SR, "key": key, "new_size": SIZE * 2});
    assert_eq!(ours.asked("Volume.resize", larger)["error"]["code"], "SR_BACKEND_FAILURE_110");
    loop {
        let state = stat(&ours, &operation);
        assert_eq!(state["failed"], false, "{state}");
        if state["complete"] == true {
            assert_eq!(state["progress"], 1.0);
            break;
        }
        (0..20).for_each(|_| writer.write(&mut guest));
    }
    // It goes on, and nothing is missing however late it came.
    for _ in 0..300 {
        writer.write(&mut guest);
    }
    rig.unplug(&ours, guest, &key);
    let state = stat(&ours, &operation);
    assert_eq!((&state["failed"], &state["complete"]), (&json!(false), &json!(true)), "{state}");
    let Some(copied) = contents(&socket, &target) else {
        tell!("skipped: qemu-img is not installed");
        return;
    };
    let wrong = (0..SIZE as usize / 512).find(|s| {
        let sector = s * 512..(s + 1) * 512;
        copied[sector.clone()] != writer.model[sector]
    });
    assert_eq!(wrong, None, "a sector differs");
    ours.smapi("Data.destroy", json!({"operation": operation}));
    assert_eq!(ours.smapi("Data.ls", json!({})), json!([]));
    assert!(!ours.asked("Data.stat", json!({"operation": operation}))["error"].is_null());
    ours.smapi("Datapath.deactivate", there);
    ours.stop();
}

/// A server of QEMU's on a file, which dies with this.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qemu(dir: &Path) -> Option<(Qemu, PathBuf, PathBuf)> {
    let (file, socket) = (dir.join("remote"), dir.join("remote.sock"));
    std::fs::write(&file, vec![0xee; SIZE as usize]).unwrap();
    let mut command = Command::new("qemu-nbd");
    command.args(["-f", "raw", "-t", "-x", "there", "-k"]).arg(&socket).arg(&file);
    let Ok(child) = command.spawn() else {
        tell!("skipped: qemu-nbd is not installed");
        return None;
    };
    wait("qemu-nbd listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    Some((Qemu(child), file, socket))
}

#[test]
fn a_remote_side_that_dies_is_no_affair_of_the_guest() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let mut guest = rig.guest(&ours, 3, &key);
    let mut writer = Writer::new();
    for _ in 0..100 {
        writer.write(&mut guest);
    }
    let dir = tempfile::tempdir().unwrap();
    let Some((server, file, socket)) = qemu(dir.path()) else { return };
    let operation = begin(&ours, &key, "3", &remote(&socket, "there"));
    wait("the mirror", || {
        writer.write(&mut guest);
        stat(&ours, &operation)["complete"] == true
    });
    drop(server);
    let state = || stat(&ours, &operation);
    wait("its failure", || {
        writer.write(&mut guest);
        state()["failed"] == true
    });
    assert_eq!(state()["complete"], false);
    // The guest has noticed nothing, and its end is in order: the toolstack knows.
    writer.write(&mut guest);
    // Another one, which dies between the last look and the end: that must be told, once.
    let _ = std::fs::remove_file(&socket);
    let Some((server, _, socket)) = qemu(dir.path()) else { return };
    let operation = begin(&ours, &key, "3", &remote(&socket, "there"));
    wait("the mirror", || stat(&ours, &operation)["complete"] == true);
    drop(server);
    writer.write(&mut guest);
    guest.say("6");
    rig.world.reaches(3, "6");
    let args = json!({"uri": uri(&key), "domain": "3"});
    let told = ours.asked("Datapath.deactivate", args.clone());
    assert!(told["error"]["params"][1].as_str().unwrap().contains("lacks"), "{told}");
    ours.smapi("Datapath.deactivate", args);
    ours.stop();
    drop(file);
}

#[test]
fn a_mirror_ends_by_cancel_snapshot_and_with_its_disk() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let dir = tempfile::tempdir().unwrap();
    let Some((_server, file, socket)) = qemu(dir.path()) else { return };
    // A disk that nobody has: it is opened for the mirror, and closed with it.
    let there = remote(&socket, "there");
    let operation = begin(&ours, &key, "5", &there);
    wait("the mirror", || stat(&ours, &operation)["complete"] == true);
    assert_eq!(ours.images().len(), 1);
    ours.smapi("Data.cancel", json!({"operation": operation}));
    assert_eq!(stat(&ours, &operation)["failed"], true);
    assert!(ours.images().is_empty());
    // The same, ended in order.
    let operation = begin(&ours, &key, "5", &there);
    wait("the mirror", || stat(&ours, &operation)["complete"] == true);
    ours.smapi("Datapath.deactivate", json!({"uri": uri(&key), "domain": "5"}));
    assert_eq!(stat(&ours, &operation)["failed"], false);
    assert!(ours.images().is_empty());
    assert!(std::fs::read(&file).unwrap().iter().all(|&b| b == 0));
    // A snapshot is how the toolstack has always ended them.
    let mut guest = rig.guest(&ours, 3, &key);
    let operation = begin(&ours, &key, "3", &there);
    wait("the mirror", || stat(&ours, &operation)["complete"] == true);
    let disk = json!({"sr": super::repository::SR, "key": key});
    let snapshot = ours.smapi("Volume.snapshot", disk)["key"].as_str().unwrap().to_owned();
    assert_eq!(stat(&ours, &operation)["failed"], true);
    guest.write(8, 5, 4096);
    guest.expect(8, 5, 4096);
    rig.unplug(&ours, guest, &key);
    // Snapshots are read as well.
    let operation = begin(&ours, &snapshot, "5", &there);
    wait("the mirror", || stat(&ours, &operation)["complete"] == true);
    ours.smapi("Data.destroy", json!({"operation": operation}));
    // What cannot be.
    for (remote, why) in [
        (remote(&socket, "elsewhere"), "export"),
        (remote(Path::new("/nonexistent"), ""), "cannot connect"),
        ("nbd://192.0.2.1/".to_owned(), "no network"),
        ("nbds://192.0.2.1/".to_owned(), "certificates"),
        ("/dev/null".to_owned(), "no address"),
    ] {
        let args = json!({"uri": uri(&key), "domain": "5", "remote": remote});
        let refused = ours.asked("Data.mirror", args)["error"].to_string();
        assert!(refused.contains(why), "{refused}: not {why:?}");
    }
    let larger = ours.disk(SIZE * 2);
    let args = json!({"uri": uri(&larger), "domain": "5", "remote": there});
    assert!(ours.asked("Data.mirror", args)["error"].to_string().contains("where the disk has"));
    let copy = json!({"operation": ["CopyV1", "x"]});
    assert_eq!(ours.asked("Data.stat", copy)["error"]["code"], "Unimplemented");
    assert!(ours.images().is_empty());
    ours.stop();
}

impl Rig {
    /// A disk for mirrors to go to, and how it is reached.
    fn target(&self, ours: &Ours) -> (String, PathBuf) {
        let target = ours.disk(SIZE);
        let there = json!({"uri": uri(&target), "domain": "mirror_vm"});
        ours.smapi("Datapath.activate", there);
        let socket = self.world.dir.path().join("state/nbd").join(&target);
        (target, socket)
    }
}

fn complete(ours: &Ours, operation: &Value) {
    wait("the mirror", || stat(ours, operation)["complete"] == true);
}

#[test]
fn who_relies_on_a_mirror_is_told_of_its_end_by_the_next_daemon() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let (target, socket) = rig.target(&ours);
    let mut guest = rig.guest(&ours, 3, &key);
    let there = remote(&socket, &target);
    complete(&ours, &begin(&ours, &key, "3", &there));
    ours.stop();
    let ours = rig.world.serve(1, Notify::Thread);
    guest.write(8, 5, 4096);
    guest.say("6");
    rig.world.reaches(3, "6");
    let args = json!({"uri": uri(&key), "domain": "3"});
    let told = ours.asked("Datapath.deactivate", args.clone());
    assert!(told["error"]["params"][1].as_str().unwrap().contains("lacks"), "{told}");
    ours.smapi("Datapath.deactivate", args.clone());
    // Whoever has given it up himself relies on nothing.
    let target = json!({"uri": uri(&target), "domain": "mirror_vm"});
    ours.smapi("Datapath.activate", target.clone());
    for method in ["Data.cancel", "Data.destroy"] {
        let operation = begin(&ours, &key, "5", &there);
        complete(&ours, &operation);
        ours.smapi(method, json!({"operation": operation}));
        ours.smapi("Datapath.deactivate", args.clone());
    }
    ours.smapi("Datapath.deactivate", target);
    ours.stop();
}

#[test]
fn a_mirror_ends_with_who_has_the_disk_whatever_he_is_called() {
    let rig = Rig::new();
    let ours = rig.world.serve(2, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let (target, socket) = rig.target(&ours);
    let there = remote(&socket, &target);
    let mut guest = rig.guest(&ours, 3, &key);
    // With two of them nobody knows who is meant.
    let dom0 = json!({"uri": uri(&key), "domain": "u0_vbd_0_xvda"});
    ours.smapi("Datapath.activate", dom0.clone());
    let args = json!({"uri": uri(&key), "domain": "7", "remote": there});
    let refused = ours.asked("Data.mirror", args)["error"].to_string();
    assert!(refused.contains("whose end"), "{refused}");
    ours.smapi("Datapath.deactivate", dom0);
    let operation = begin(&ours, &key, "7", &there);
    let mut writer = Writer::new();
    complete(&ours, &operation);
    for _ in 0..300 {
        writer.write(&mut guest);
    }
    rig.unplug(&ours, guest, &key);
    assert_eq!(stat(&ours, &operation)["failed"], false);
    ours.smapi("Data.destroy", json!({"operation": operation}));
    if let Some(copied) = contents(&socket, &target) {
        assert!(copied[..SIZE as usize] == writer.model, "a sector differs");
    }
    ours.stop();
}

#[test]
fn what_a_mirror_has_opened_may_be_taken_over() {
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let (target, socket) = rig.target(&ours);
    let there = remote(&socket, &target);
    let operation = begin(&ours, &key, "5", &there);
    complete(&ours, &operation);
    let args = json!({"uri": uri(&key), "domain": "5"});
    ours.smapi("Datapath.activate", args.clone());
    ours.smapi("Data.cancel", json!({"operation": operation}));
    assert_eq!(ours.images().len(), 2, "somebody has it");
    // Also when it has ended with its domain, which has it again.
    ours.smapi("Datapath.deactivate", args.clone());
    let operation = begin(&ours, &key, "5", &there);
    complete(&ours, &operation);
    ours.smapi("Datapath.deactivate", args.clone());
    ours.smapi("Datapath.activate", args.clone());
    ours.smapi("Data.destroy", json!({"operation": operation}));
    assert_eq!(ours.images().len(), 2, "somebody has it");
    // One that has failed, of which nobody was told, counts until there is another.
    let disk = json!({"sr": super::repository::SR, "key": key});
    complete(&ours, &begin(&ours, &key, "5", &there));
    ours.smapi("Volume.snapshot", disk.clone());
    let told = ours.asked("Datapath.deactivate", args.clone());
    assert!(told["error"].to_string().contains("lacks"), "{told}");
    complete(&ours, &begin(&ours, &key, "5", &there));
    ours.smapi("Volume.snapshot", disk);
    complete(&ours, &begin(&ours, &key, "5", &there));
    ours.smapi("Datapath.deactivate", args);
    assert_eq!(ours.images().len(), 1);
    ours.stop();
}

/// What was answered is on the target, also if somebody writes until he is cut off.
#[test]
fn nobody_writes_to_a_disk_whose_mirror_has_been_finished() {
    use std::io::{Read as _, Write as _};

    let rig = Rig::new();
    let ours = rig.world.serve(2, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let (target, socket) = rig.target(&ours);
    let args = json!({"uri": uri(&key), "domain": "3"});
    ours.smapi("Datapath.activate", args.clone());
    let near = rig.world.dir.path().join("state/nbd").join(&key);
    let mut near = std::os::unix::net::UnixStream::connect(near).unwrap();
    near.read_exact(&mut [0; 18]).unwrap();
    let length = (key.len() as u32).to_be_bytes();
    near.write_all(&[b"\0\0\0\x03IHAVEOPT\0\0\0\x01", &length[..], key.as_bytes()].concat())
        .unwrap();
    near.read_exact(&mut [0; 10]).unwrap();
    let operation = begin(&ours, &key, "3", &remote(&socket, &target));
    complete(&ours, &operation);
    let (written, writes) = std::sync::mpsc::channel();
    let writer = std::thread::spawn(move || {
        // Sector after sector, each with its own bytes, one at a time.
        for sector in 0.. {
            let at: u64 = sector % (SIZE / 512) * 512;
            let byte = (sector / (SIZE / 512) + 1) as u8;
            let mut request = b"\x25\x60\x95\x13\0\0\0\x01abcdefgh".to_vec();
            request.extend(at.to_be_bytes());
            request.extend(512u32.to_be_bytes());
            request.extend([byte; 512]);
            let mut reply = [0; 16];
            let asked = near.write_all(&request).and_then(|()| near.read_exact(&mut reply));
            if asked.is_err() || reply[4..8] != [0; 4] {
                break;
            }
            written.send((at as usize, byte)).unwrap();
        }
    });
    let first = writes.recv().unwrap();
    ours.smapi("Datapath.deactivate", args);
    writer.join().unwrap();
    assert_eq!(stat(&ours, &operation)["failed"], false);
    let last: std::collections::BTreeMap<usize, u8> = [first].into_iter().chain(writes).collect();
    if let Some(copied) = contents(&socket, &target) {
        // One more may be there, which was cut off before its answer.
        let lacks = last.iter().find(|&(&at, &byte)| copied[at] < byte);
        assert_eq!(lacks, None, "of {} sectors", last.len());
    }
    ours.stop();
}

/// The toolstack hands over a connection from another host.
#[test]
fn a_connection_that_is_handed_over_is_served() {
    use std::io::{IoSlice, Read as _, Write as _};
    use std::os::fd::AsRawFd as _;
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let rig = Rig::new();
    let ours = rig.world.serve(1, Notify::Thread);
    rig.make(&ours);
    let key = ours.disk(SIZE);
    let there = json!({"uri": uri(&key), "domain": "mirror_vm"});
    let path = ours.smapi("Datapath.import_activate", there.clone());
    assert_eq!(ours.smapi("Datapath.import_activate", there.clone()), path);
    let path = PathBuf::from(path.as_str().unwrap());
    let hand_over = |stream: &UnixStream| {
        let control = UnixStream::connect(&path).unwrap();
        let fds = [stream.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        let text = [IoSlice::new(b"a datapath")];
        sendmsg::<()>(control.as_raw_fd(), &text, &rights, MsgFlags::empty(), None).unwrap();
    };
    let (mut near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    hand_over(&far);
    drop(far);
    near.read_exact(&mut [0; 18]).unwrap();
    // Whatever name is asked for.
    near.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03any").unwrap();
    let mut answer = [0; 10];
    near.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..8], SIZE.to_be_bytes());
    let mut request = b"\x25\x60\x95\x13\0\0\0\x01abcdefgh\0\0\0\0\0\0\x10\0\0\0\x02\0".to_vec();
    request.extend([7; 512]);
    near.write_all(&request).unwrap();
    near.read_exact(&mut [0; 16]).unwrap();
    let mut guest = rig.guest(&ours, 3, &key);
    guest.expect(8, 7, 512);
    // No descriptor, one that is no socket, and nothing at all.
    UnixStream::connect(&path).unwrap().write_all(b"nothing").unwrap();
    drop(UnixStream::connect(&path).unwrap());
    rig.unplug_only(&ours, &guest, &key);
    ours.smapi("Datapath.deactivate", there);
    assert!(!path.exists() && near.read(&mut [0; 1]).unwrap_or(0) == 0);
    assert!(ours.images().is_empty());
    ours.stop();
}
