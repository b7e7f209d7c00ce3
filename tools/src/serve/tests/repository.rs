//! Guests whose disks are in a repository, by what the toolstack's plugins answer.

use super::died::Corpse;
use super::*;

const SR: &str = "7c1b6e3a-0f5d-4a47-9d0e-3b8c2f1a6d55";

/// A repository on a file.
struct Rig {
    world: World,
    device: PathBuf,
}

impl Rig {
    fn new() -> Rig {
        let world = World::new();
        let device = world.dir.path().join("drive");
        std::fs::File::create(&device).unwrap().set_len(160 << 20).unwrap();
        Rig { world, device }
    }

    fn configuration(&self) -> Value {
        json!({"device": self.device.to_str().unwrap()})
    }

    fn make(&self, ours: &Ours) {
        let configuration = self.configuration();
        let new =
            json!({"uuid": SR, "configuration": configuration, "name": "", "description": ""});
        ours.smapi("SR.create", new);
        assert_eq!(ours.smapi("SR.attach", json!({"configuration": configuration})), SR);
    }

    /// Plugs a disk in as the toolstack does, after it was activated.
    fn plug(&self, ours: &Ours, domid: u16, key: &str) {
        let uri = uri(key);
        let domain = json!({"uri": uri, "domain": domid.to_string()});
        let answer = ours.smapi("Datapath.attach", domain.clone());
        ours.smapi("Datapath.activate", domain);
        let xen = &answer["implementations"][0];
        assert_eq!((&xen[0], &xen[1]["backend_type"]), (&json!("XenDisk"), &json!("qdisk")));
        self.world.plug(domid, "w", xen[1]["extra"]["polldisk"].as_str().unwrap());
    }

    fn guest(&self, ours: &Ours, domid: u16, key: &str) -> Guest {
        self.plug(ours, domid, key);
        Guest::start(&self.world, domid, SETUP)
    }

    /// The guest closes its disk, and the toolstack takes it away.
    fn unplug(&self, ours: &Ours, guest: Guest, key: &str) {
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
    fn check(&self) {
        let storage = node::HostStorage::open(&self.device, true).unwrap();
        let host = volume::HostIds::of_this_host().unwrap();
        let mut repository = sr::Repository::open(vec![storage], &host).unwrap();
        let names: Vec<String> =
            repository.group().vg().lvs.iter().map(|lv| lv.name.clone()).collect();
        for lv in names {
            let mut view = repository.storage(&lv).unwrap();
            let mut bytes = vec![0; block::Storage::len(&view) as usize];
            block::Storage::read_at(&mut view, 0, &mut bytes).unwrap();
            let path = self.world.dir.path().join("extracted");
            std::fs::write(&path, bytes).unwrap();
            let check = std::process::Command::new("qemu-img");
            let Ok(out) = { check }.args(["check", "-f", "qcow2"]).arg(&path).output() else {
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

fn uri(key: &str) -> String {
    format!("fast://{SR}/{key}")
}

impl Ours {
    fn asked(&self, method: &str, args: Value) -> Value {
        self.call("smapiv3", json!({"method": method, "args": args}))
    }

    fn smapi(&self, method: &str, args: Value) -> Value {
        let answer = self.asked(method, args);
        assert!(answer["error"].is_null(), "{method}: {answer}");
        answer["result"].clone()
    }

    fn images(&self) -> Vec<Value> {
        self.call("list", json!({}))["images"].as_array().unwrap().clone()
    }

    fn disk(&self, size: u64) -> String {
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
    fn unplug_only(&self, ours: &Ours, guest: &Guest, key: &str) {
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
