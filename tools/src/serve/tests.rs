//! Guests, toolstack and hypervisor are stand-ins here; all else is what serves real guests.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blkif::{Abi, EventChannel, Frontend, GrantTable, Setup};
use node::{Guests, Notify, Reactors};
use reactor::{Clock, Policy, Start};
use serde_json::{Value, json};
use xen::fake::Host;
use xen::store::fake::Daemon;
use xen::store::{Nodes, Perm, Store};

use super::control::Control;
use super::devices::Devices;
use super::images::Images;
use super::keep::Keep;
use super::repositories::{Growth, Repositories};
use crate::ctl::rpc::Service as _;

mod broken;
mod changed;
mod compose;
mod copies;
mod died;
mod figures;
mod growth;
mod left;
mod many;
mod measures;
mod mirror;
mod nbd;
mod repository;
mod waiting;

const SIZE: u64 = 8 << 20;
const DEVID: u32 = 51712;

/// Machine, store and toolstack, which outlive daemons of ours.
struct World {
    host: Host,
    store: Arc<Daemon>,
    toolstack: Store,
    dir: tempfile::TempDir,
}

/// A daemon of ours.
struct Ours {
    control: Control,
    reactors: Arc<Reactors>,
    growth: Growth,
}

impl World {
    fn new() -> World {
        let store = Arc::new(Daemon::start());
        let toolstack = store.connect(0);
        toolstack.write("/local/domain/0/domid", "0").unwrap();
        World { host: Host::new(), store, toolstack, dir: tempfile::tempdir().unwrap() }
    }

    fn serve(&self, reactors: usize, notify: Notify) -> Ours {
        self.serve_by(Policy::Adaptive, reactors, notify)
    }

    fn serve_by(&self, policy: Policy, reactors: usize, notify: Notify) -> Ours {
        let mut ours = self.without_guests(policy, reactors);
        self.take_up(&mut ours, notify);
        ours
    }

    /// A daemon that has not looked for guests yet.
    fn without_guests(&self, policy: Policy, reactors: usize) -> Ours {
        let start = Start { cpu: None, policy };
        let reactors = Reactors::start(&vec![start; reactors], Clock::real()).unwrap();
        let keep = Arc::new(Keep::new(self.dir.path().join("state")).unwrap());
        let repositories = Arc::new(Repositories::new(self.dir.path().join("state"), None));
        let growth = Growth::start(repositories.clone(), Clock::real()).unwrap();
        let (options, allow) = (Default::default(), Vec::new());
        let images =
            Arc::new(Images::new(reactors.clone(), options, allow, keep, repositories.clone()));
        Ours { control: Control { images, repositories, devices: None }, reactors, growth }
    }

    /// It does.
    fn take_up(&self, ours: &mut Ours, notify: Notify) {
        let (host, store) = (self.host.clone(), self.store.clone());
        let (gntdev, events) = (|| Ok(host.gntdev()), || Ok(host.events()));
        let guests = Guests::by(&ours.reactors, notify, gntdev, events).unwrap();
        let connect = Box::new(move || Ok(store.connect(0)));
        let devices = Devices::start(connect, "qdisk", ours.control.images.clone(), guests);
        ours.control.devices = Some(Arc::new(devices.unwrap()));
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        let file = std::fs::File::options().create_new(true).read(true).write(true).open(&path);
        let mut storage = node::HostStorage::of(file.unwrap(), false).unwrap();
        let options = qcow::create::CreateOptions::new(SIZE);
        qcow::create::create(&mut storage, "test", &options).unwrap();
        path
    }

    /// The toolstack makes a device.
    fn plug(&self, domid: u16, mode: &str, wanted: &str) {
        let (be, fe) = (backend(domid), frontend(domid));
        let keys = [
            (format!("{be}/frontend"), fe.clone()),
            (format!("{be}/frontend-id"), domid.to_string()),
            (format!("{be}/online"), "1".into()),
            (format!("{be}/mode"), mode.into()),
            (format!("{be}/sm-data/polldisk"), wanted.into()),
            (format!("{be}/state"), "1".into()),
            (format!("{fe}/backend"), be.clone()),
            (format!("{fe}/backend-id"), "0".into()),
            (format!("{fe}/virtual-device"), DEVID.to_string()),
            (format!("{fe}/state"), "1".into()),
        ];
        let done = self.toolstack.transaction(|tx| {
            // If it is there, it is made anew.
            if tx.read(format!("{be}/state"))?.is_some() {
                tx.rm(&be)?;
                tx.rm(&fe)?;
            }
            tx.mkdir(&be)?;
            tx.set_perms(&be, &[Perm::none(0), Perm::read(domid)])?;
            tx.mkdir(&fe)?;
            tx.set_perms(&fe, &[Perm::none(domid), Perm::read(0)])?;
            keys.iter().try_for_each(|(key, value)| tx.write(key, value))
        });
        done.map_err(|e: xen::store::Error| e.to_string()).unwrap();
    }

    fn read(&self, path: &str) -> Option<String> {
        self.toolstack.read(path).unwrap().map(|v| String::from_utf8(v).unwrap())
    }

    fn state(&self, domid: u16) -> Option<String> {
        self.read(&format!("{}/state", backend(domid)))
    }

    /// Waits for our state.
    fn reaches(&self, domid: u16, state: &str) {
        wait(&format!("state {state} of domain {domid}"), || {
            self.state(domid).as_deref() == Some(state)
        });
    }
}

impl Ours {
    fn call(&self, method: &str, params: Value) -> Value {
        self.control.call(method, &params).map_err(|e| e.message).unwrap()
    }

    fn stop(self) {
        let Control { images, devices, .. } = self.control;
        devices.inspect(|devices| devices.stop());
        self.growth.stop();
        images.close_all().unwrap();
        drop(images);
        self.reactors.stop();
    }
}

fn backend(domid: u16) -> String {
    format!("/local/domain/0/backend/qdisk/{domid}/{DEVID}")
}

fn frontend(domid: u16) -> String {
    format!("/local/domain/{domid}/device/vbd/{DEVID}")
}

fn node(path: &Path) -> String {
    json!({"node": path.to_str().unwrap()}).to_string()
}

fn wait(what: &str, mut is: impl FnMut() -> bool) {
    let clock = Clock::real();
    let began = clock.now();
    while !is() {
        assert!(clock.now() - began < 20_000_000_000, "never: {what}");
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// A guest's grants, as the machine asks for them.
#[derive(Debug)]
struct Table(Arc<GrantTable>);

impl xen::fake::Grants for Table {
    fn find(&self, gref: u32) -> Option<(u32, bool)> {
        self.0.find(gref)
    }

    fn map(&self, gref: u32) -> Option<u32> {
        self.0.map(gref)
    }

    fn unmap(&self, gref: u32) {
        self.0.unmap(gref);
    }
}

struct Kick {
    host: Host,
    domid: u16,
    port: u32,
}

impl EventChannel for Kick {
    fn notify(&mut self) {
        self.host.notify(self.domid, self.port);
    }
}

/// A guest with a ring.
struct Guest {
    domid: u16,
    store: Store,
    ring: Frontend<Kick>,
}

const SETUP: Setup =
    Setup { abi: Abi::X86_64, order: 0, persistent: true, max_segments: 32, start: 0 };

impl Guest {
    /// Makes a ring, and tells of it.
    fn start(world: &World, domid: u16, setup: Setup) -> Guest {
        let store = world.store.connect(domid);
        let kick = |port| Kick { host: world.host.clone(), domid, port };
        let ring = Frontend::new(setup, kick(0)).unwrap();
        let table = Arc::new(Table(ring.table().clone()));
        world.host.guest_of(domid, ring.ring().region().clone(), table);
        // Ports belong to a domain that there is.
        let ring = ring.with_events(kick(world.host.alloc_port(domid)));
        let mut guest = Guest { domid, store, ring };
        guest.offer(setup, world);
        guest
    }

    fn offer(&mut self, setup: Setup, world: &World) {
        let fe = frontend(self.domid);
        let mut keys = vec![
            ("protocol".to_owned(), "x86_64-abi".to_owned()),
            ("feature-persistent".into(), u8::from(setup.persistent).to_string()),
            ("event-channel".into(), self.port().to_string()),
        ];
        for page in 0..1u32 << setup.order {
            self.ring.table().grant(page + 1, page, false);
            let key =
                if setup.order == 0 { "ring-ref".to_owned() } else { format!("ring-ref{page}") };
            keys.push((key, (page + 1).to_string()));
        }
        if setup.order > 0 {
            keys.push(("ring-page-order".into(), setup.order.to_string()));
        }
        world.reaches(self.domid, "2");
        for (key, value) in keys {
            self.store.write(format!("{fe}/{key}"), value).unwrap();
        }
        self.say("3");
        world.reaches(self.domid, "4");
        self.say("4");
    }

    fn port(&self) -> u32 {
        self.ring.events().port
    }

    fn say(&self, state: &str) {
        self.store.write(format!("{}/state", frontend(self.domid)), state).unwrap();
    }

    /// Reaps one answer: whether it is a good one.
    fn answer(&mut self, into: &mut [u8]) -> bool {
        let mut done = None;
        wait("an answer", || {
            done = self.ring.reap(into).unwrap();
            done.is_some()
        });
        done.unwrap().status == 0
    }

    fn write(&mut self, sector: u64, byte: u8, len: usize) {
        self.ring.write(sector, sector, &vec![byte; len]).unwrap();
        self.ring.push();
        assert!(self.answer(&mut []), "write at {sector}");
    }

    fn expect(&mut self, sector: u64, byte: u8, len: usize) {
        self.ring.read(sector, sector, len as u32).unwrap();
        self.ring.push();
        let mut data = vec![0; len];
        assert!(self.answer(&mut data), "read at {sector}");
        assert!(data.iter().all(|&b| b == byte), "sector {sector}: {:#x}", data[0]);
    }
}

#[test]
fn a_guest_comes_works_and_goes() {
    for (notify, persistent, order) in
        [(Notify::Thread, true, 0), (Notify::Direct, false, 0), (Notify::Thread, true, 2)]
    {
        let world = World::new();
        let ours = world.serve(2, notify);
        let path = world.image("a");
        world.plug(7, "w", &node(&path));
        let mut guest = Guest::start(&world, 7, Setup { persistent, order, ..SETUP });
        assert_eq!(world.read(&format!("{}/sectors", backend(7))).unwrap(), "16384");
        assert_eq!(world.read(&format!("{}/hotplug-status", backend(7))).unwrap(), "connected");
        for i in 0..40u64 {
            guest.write(i * 300, i as u8 + 1, 4096 * (1 + i as usize % 9));
        }
        for i in 0..40u64 {
            guest.expect(i * 300, i as u8 + 1, 4096);
        }
        guest.ring.flush(1, 0, &[]).unwrap();
        guest.ring.push();
        assert!(guest.answer(&mut []));
        let list = ours.call("list", json!({}));
        assert_eq!(list["devices"][0]["state"], "Connected", "{list}");
        assert_eq!(list["images"][0]["used-by"], format!("vbd 7/{DEVID}"));
        // A clean end, with nothing of the guest's in our hands.
        guest.say("5");
        world.reaches(7, "5");
        guest.say("6");
        world.reaches(7, "6");
        assert_eq!(guest.ring.table().mappings(), 0);
        assert_eq!(world.host.bound().len(), 0);
        // It comes back with a new ring.
        guest.say("1");
        drop(guest);
        let mut guest = Guest::start(&world, 7, Setup { persistent, order, ..SETUP });
        guest.expect(300, 2, 4096);
        // And is destroyed in the middle of its work.
        guest.ring.write(0, 0, &[9; 4096]).unwrap();
        guest.ring.push();
        world.toolstack.rm(frontend(7)).unwrap();
        wait("the end of the image", || {
            ours.call("list", json!({}))["images"].as_array().unwrap().is_empty()
        });
        // A toolstack that asks for the end of what has ended is answered.
        world.reaches(7, "6");
        let done = world.toolstack.transaction(|tx| {
            tx.write(format!("{}/online", backend(7)), "0")?;
            tx.write(format!("{}/state", backend(7)), "5")
        });
        done.map_err(|e: xen::store::Error| e.to_string()).unwrap();
        world.reaches(7, "6");
        world.toolstack.rm(backend(7)).unwrap();
        wait("the end of the device", || {
            ours.call("list", json!({}))["devices"].as_array().unwrap().is_empty()
        });
        assert_eq!(guest.ring.table().mappings(), 0);
        ours.stop();
        assert_eq!(world.host.mapped(), 0);
    }
}

/// XAPI's clean unplug: online = 0 and our own state 5, in one transaction.
#[test]
fn the_toolstack_unplugs() {
    let world = World::new();
    let ours = world.serve(1, Notify::Thread);
    world.plug(3, "w", &node(&world.image("a")));
    let guest = Guest::start(&world, 3, SETUP);
    let be = backend(3);
    let done = world.toolstack.transaction(|tx| {
        tx.write(format!("{be}/online"), "0")?;
        tx.write(format!("{be}/state"), "5")
    });
    done.map_err(|e: xen::store::Error| e.to_string()).unwrap();
    guest.say("5");
    guest.say("6");
    world.reaches(3, "6");
    assert_eq!(guest.ring.table().mappings(), 0);
    wait("the end of the image", || {
        ours.call("list", json!({}))["images"].as_array().unwrap().is_empty()
    });
    ours.stop();
}

/// A daemon that goes and one that comes: the guest sees a pause.
#[test]
fn another_daemon_takes_the_rings_up() {
    let world = World::new();
    let ours = world.serve(2, Notify::Thread);
    let path = world.image("a");
    world.plug(9, "w", &node(&path));
    let mut guest = Guest::start(&world, 9, SETUP);
    guest.write(0, 1, 4096);
    let marked = || world.read(&format!("{}/polldisk-handed-over", backend(9))).is_some();
    assert!(!marked());
    ours.stop();
    assert_eq!(world.state(9).unwrap(), "4");
    assert!(marked());
    // Nobody is there.
    guest.ring.write(1, 8, &[2; 4096]).unwrap();
    guest.ring.push();
    let ours = world.serve(1, Notify::Direct);
    assert!(guest.answer(&mut []));
    guest.expect(0, 1, 4096);
    guest.expect(8, 2, 4096);
    assert_eq!(world.state(9).unwrap(), "4");
    assert!(!marked());
    ours.stop();
    // One that dies leaves no mark, but records of the rings: these are enough.
    let unmark = || world.toolstack.rm(format!("{}/polldisk-handed-over", backend(9))).unwrap();
    unmark();
    let ours = world.serve(1, Notify::Direct);
    guest.expect(8, 2, 4096);
    guest.write(16, 3, 4096);
    ours.stop();
    // Without them the rings are not touched.
    unmark();
    std::fs::remove_dir_all(world.dir.path().join("state")).unwrap();
    let ours = world.serve(1, Notify::Direct);
    let error = format!("/local/domain/0/error/backend/qdisk/9/{DEVID}/error");
    wait("the refusal", || world.read(&error).is_some_and(|e| e.contains("has died")));
    guest.ring.read(0, 0, 4096).unwrap();
    guest.ring.push();
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.ring.reap(&mut [0; 4096]).unwrap().is_none());
    // The guest is started again.
    world.toolstack.rm(backend(9)).unwrap();
    world.toolstack.rm(frontend(9)).unwrap();
    wait("the end", || ours.call("list", json!({}))["images"].as_array().unwrap().is_empty());
    world.plug(9, "w", &node(&path));
    let mut guest = Guest::start(&world, 9, SETUP);
    guest.expect(8, 2, 4096);
    ours.stop();
}

/// A toolstack may be quicker than we are: what was there is gone, and the next one is there, before
/// anybody has looked.
#[test]
fn a_device_that_is_made_anew_between_two_looks() {
    let world = World::new();
    let ours = world.serve(1, Notify::Thread);
    let error = format!("{}/hotplug-error", backend(9));
    // First one whose image cannot be opened, then one that is served.
    world.plug(9, "w", &node(&world.dir.path().join("none")));
    wait("the refusal", || world.read(&error).is_some());
    let paths = ["a", "b"].map(|name| world.image(name));
    for path in &paths {
        world.plug(9, "w", &node(path));
        let mut guest = Guest::start(&world, 9, SETUP);
        guest.expect(0, 0, 4096);
        guest.write(0, 1, 4096);
        assert_eq!(world.read(&error), None);
        let list = ours.call("list", json!({}));
        assert_eq!(list["images"].as_array().unwrap().len(), 1, "{list}");
        assert_eq!(list["images"][0]["node"], path.to_str().unwrap());
    }
    ours.stop();
}

#[test]
fn images_by_name_and_one_user_each() {
    let world = World::new();
    let ours = world.serve(1, Notify::Thread);
    let path = world.image("a");
    ours.call("attach", json!({"name": "disk", "node": path.to_str().unwrap()}));
    world.plug(1, "r", "disk");
    let mut guest = Guest::start(&world, 1, SETUP);
    assert_eq!(world.read(&format!("{}/info", backend(1))).unwrap(), "4");
    guest.ring.write(0, 0, &[1; 512]).unwrap();
    guest.ring.push();
    assert!(!guest.answer(&mut []), "a write to a disk that is for reading");
    guest.expect(0, 0, 512);
    // Others are refused, and are told why.
    let error = |domid: u16| format!("/local/domain/0/error/backend/qdisk/{domid}/{DEVID}/error");
    let wrong = [
        (2, "disk".to_owned(), "in use by vbd 1/51712"),
        (3, "none".to_owned(), "no image"),
        (4, node(&path), "in use by another process"),
        (5, node(Path::new("/no/such/file")), "No such file"),
        (6, "{\"node\": 5}".to_owned(), "what image"),
    ];
    wrong.iter().for_each(|(domid, wanted, _)| world.plug(*domid, "w", wanted));
    for (domid, _, why) in wrong {
        wait(why, || world.read(&error(domid)).is_some());
        let said = world.read(&error(domid)).unwrap();
        assert!(said.contains(why), "{said}");
        assert_eq!(world.read(&format!("{}/hotplug-error", backend(domid))).unwrap(), said);
    }
    // One that is wrong from the start is forgotten when it goes.
    world.plug(7, "w", "disk");
    world.toolstack.write(format!("{}/frontend-id", backend(7)), "8").unwrap();
    let known = || ours.call("list", json!({}))["devices"].as_array().unwrap().clone();
    wait("the wrong device", || known().iter().any(|d| d["domid"] == 7));
    world.toolstack.rm(backend(7)).unwrap();
    wait("its end", || known().iter().all(|d| d["domid"] != 7));
    let refused = ours.control.call("detach", &json!({"name": "disk"})).err().unwrap();
    assert!(refused.message.contains("in use"), "{}", refused.message);
    guest.say("6");
    world.reaches(1, "6");
    world.toolstack.rm(frontend(1)).unwrap();
    wait("detach", || ours.control.call("detach", &json!({"name": "disk"})).is_ok());
    ours.stop();
}

#[test]
fn a_guest_sees_another_size() {
    let world = World::new();
    let ours = world.serve(1, Notify::Thread);
    let path = world.image("a");
    ours.call("attach", json!({"name": "disk", "node": path.to_str().unwrap()}));
    world.plug(1, "w", "disk");
    let mut guest = Guest::start(&world, 1, SETUP);
    let watch = world.store.connect(1);
    watch.watch(format!("{}/state", backend(1)), 1).unwrap();
    while watch.next_event(Some(Duration::from_millis(50))).unwrap().is_some() {}
    ours.call("resize", json!({"image": "disk", "size": 2 * SIZE}));
    let event = watch.next_event(Some(Duration::from_secs(10))).unwrap();
    assert!(event.is_some(), "the frontend looks again when our state is written");
    assert_eq!(world.read(&format!("{}/sectors", backend(1))).unwrap(), "32768");
    guest.write(2 * SIZE / 512 - 8, 3, 4096);
    guest.expect(2 * SIZE / 512 - 8, 3, 4096);
    ours.stop();
}

/// A frontend whose state runs wild, and whose keys are rubbish.
#[test]
fn wild_states_and_keys() {
    let world = World::new();
    let ours = world.serve(1, Notify::Thread);
    world.plug(1, "w", &node(&world.image("a")));
    world.plug(2, "w", &node(&world.image("b")));
    let mut good = Guest::start(&world, 2, SETUP);
    let bad = world.store.connect(1);
    let fe = frontend(1);
    let mut rng = numbers();
    for _ in 0..300 {
        let state = ["0", "1", "2", "3", "4", "5", "6", "7", "x", "", "4294967296"];
        let key = ["state", "ring-ref", "event-channel", "protocol", "ring-page-order"];
        let (k, v) = (key[rng() % key.len()], state[rng() % state.len()]);
        bad.write(format!("{fe}/{k}"), v).unwrap();
        if rng().is_multiple_of(3) {
            bad.write(format!("{fe}/state"), state[rng() % 7]).unwrap();
        }
    }
    good.write(0, 7, 4096);
    good.expect(0, 7, 4096);
    assert_eq!(world.state(2).unwrap(), "4");
    ours.stop();
}

fn numbers() -> impl FnMut() -> usize {
    let mut x = 88_172_645_463_325_252u64;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as usize
    }
}
