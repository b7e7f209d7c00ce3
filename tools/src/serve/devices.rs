//! [`Devices`]: watches xenstore for devices of our kind, and has a thread for each of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use node::Guests;
use reactor::sync::Mutex;
use xen::store::{Error as StoreError, Event, Nodes, Store};

use super::device::{Bell, Device, Id};
use super::figures::Vbd;
use super::images::Images;

/// How a device of ours begins its `qemu-params`.
pub(crate) const PREFIX: &str = "polldisk:";

/// How the hotplug script of a device of ours is called, which xl is told of.
const SCRIPT: &str = "/block-polldisk";

/// The watch on all backends of our kind.
const ALL: u64 = 0;

/// Until the store is looked for again.
const RETRY: Duration = Duration::from_secs(1);

/// Longest wait for an event: how soon an end is noticed.
const LOOK: Duration = Duration::from_millis(200);

/// Stack of a device's thread, in bytes.
const STACK: usize = 512 << 10;

/// How to get a connection to the store.
pub(crate) type Connect = Box<dyn Fn() -> Result<Store, StoreError> + Send + Sync>;

/// A device: how its thread is reached, and how its end is seen.
type Running = (Arc<Bell>, JoinHandle<()>);

/// What all devices share.
pub(crate) struct Shared {
    store: Mutex<Arc<Store>>,
    connect: Connect,
    /// `/local/domain/N`, and in it the directory of all backends of our kind.
    home: String,
    kind: String,
    pub(crate) images: Arc<Images>,
    pub(crate) guests: Guests,
    all: Mutex<BTreeMap<Id, Running>>,
    stop: AtomicBool,
}

impl Shared {
    /// The connection as it is now.
    pub(crate) fn store(&self) -> Arc<Store> {
        self.store.lock().clone()
    }

    fn base(&self) -> String {
        format!("{}/backend/{}", self.home, self.kind)
    }

    pub(crate) fn dir_of(&self, id: Id) -> String {
        format!("{}/{}/{}", self.base(), id.domid, id.devid)
    }

    /// Where an error of a backend is written.
    pub(crate) fn error_of(&self, dir: &str) -> String {
        format!("{}/error{}/error", self.home, dir.strip_prefix(&self.home).unwrap_or(dir))
    }
}

/// The devices of all guests.
pub(crate) struct Devices {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Devices {
    /// Takes up the devices that are there, and from now on those that come.
    pub(crate) fn start(
        connect: Connect,
        kind: &str,
        images: Arc<Images>,
        guests: Guests,
    ) -> anyhow::Result<Devices> {
        let store = connect()?;
        let ours = store.read("domid")?.and_then(|v| String::from_utf8(v).ok());
        let ours: u16 = match ours {
            Some(text) => text.parse().context("xenstore: domid")?,
            None => 0,
        };
        let shared = Arc::new(Shared {
            store: Mutex::new(Arc::new(store)),
            connect,
            home: format!("/local/domain/{ours}"),
            kind: kind.to_owned(),
            images,
            guests,
            all: Mutex::new(BTreeMap::new()),
            stop: AtomicBool::new(false),
        });
        shared.store().watch_down_to(shared.base(), 2, ALL)?;
        let its = shared.clone();
        let body = move || its.run();
        let thread = std::thread::Builder::new().name("xenstore".to_owned()).spawn(body);
        let thread = Mutex::new(Some(thread.context("cannot start a thread")?));
        Ok(Devices { shared, thread })
    }

    /// What each does.
    pub(crate) fn list(&self) -> Vec<Vbd> {
        let all = self.shared.all.lock();
        all.values().filter_map(|(bell, _)| bell.seen.lock().clone()).collect()
    }

    /// The devices of an image whose size has changed are told.
    pub(crate) fn resized(&self, image: &str) {
        for (bell, _) in self.shared.all.lock().values() {
            let its = bell.seen.lock().as_ref().and_then(|vbd| vbd.image.clone());
            if its.as_deref() == Some(image) {
                bell.resized();
            }
        }
    }

    /// Lets go of all rings, which stay as they are for another daemon, and of the images.
    pub(crate) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        let thread = self.thread.lock().take();
        if thread.is_some_and(|t| t.join().is_err()) {
            log::error!("the xenstore thread panicked");
        }
        let all = std::mem::take(&mut *self.shared.all.lock());
        all.values().for_each(|(bell, _)| bell.stop());
        for (id, (_, thread)) in all {
            if thread.join().is_err() {
                log::error!("{id}: its thread panicked");
            }
        }
    }
}

impl Shared {
    fn run(self: Arc<Self>) {
        // Those that are there are taken up whatever their state is: they may be another daemon's.
        let mut first = true;
        while !self.stop.load(Ordering::Acquire) {
            match self.store().next_event(Some(LOOK)) {
                Ok(None) => {}
                Ok(Some(event)) => {
                    if let Err(e) = self.event(&event, first) {
                        log::warn!("xenstore: {e}");
                    }
                    first &= event.token != ALL;
                }
                Err(e) => {
                    log::error!("{e}; guests are served on");
                    self.again();
                }
            }
            self.bury();
        }
    }

    /// Connects again, and sets all watches again.
    fn again(&self) {
        while !self.stop.load(Ordering::Acquire) {
            let done = (self.connect)().and_then(|store| {
                store.watch_down_to(self.base(), 2, ALL)?;
                *self.store.lock() = Arc::new(store);
                Ok(())
            });
            match done {
                Ok(()) => break,
                Err(e) => log::debug!("{e}"),
            }
            std::thread::sleep(RETRY);
        }
        for (id, (bell, _)) in &*self.all.lock() {
            let watched = self.watch_states(*id);
            if let Err(e) = watched {
                log::error!("{id}: cannot be watched: {e}");
            }
            bell.ring();
        }
    }

    fn watch_states(&self, id: Id) -> Result<(), StoreError> {
        let (store, dir, [theirs, ours]) = (self.store(), self.dir_of(id), id.tokens());
        store.watch(format!("{dir}/state"), ours)?;
        match store.read(format!("{dir}/frontend"))? {
            Some(frontend) => store.watch([&frontend[..], b"/state"].concat(), theirs),
            None => Ok(()),
        }
    }

    fn event(self: &Arc<Self>, event: &Event, first: bool) -> Result<(), StoreError> {
        if event.token != ALL {
            let (all, id) = (self.all.lock(), Id::of_token(event.token));
            if let Some((bell, _)) = id.as_ref().and_then(|id| all.get(id)) {
                bell.ring();
            }
            return Ok(());
        }
        let base = self.base();
        let inside = event.path.strip_prefix(base.as_bytes()).unwrap_or_default();
        let mut names = inside.split(|&b| b == b'/').skip(1);
        match (names.next(), names.next()) {
            (Some(domain), Some(device)) => self.changed(domain, device, first)?,
            (Some(domain), None) => self.changed_domain(domain, first)?,
            (None, _) => {
                for domain in self.store().directory(&base)?.unwrap_or_default() {
                    self.changed_domain(&domain, first)?;
                }
            }
        }
        Ok(())
    }

    fn changed_domain(self: &Arc<Self>, domain: &[u8], first: bool) -> Result<(), StoreError> {
        let dir = [self.base().as_bytes(), b"/", domain].concat();
        for device in self.store().directory(&dir)?.unwrap_or_default() {
            self.changed(domain, &device, first)?;
        }
        Ok(())
    }

    /// A device's directory is new, or something in it has changed, which its own thread sees.
    fn changed(
        self: &Arc<Self>,
        domain: &[u8],
        device: &[u8],
        first: bool,
    ) -> Result<(), StoreError> {
        let text = |b: &[u8]| std::str::from_utf8(b).unwrap_or_default().to_owned();
        let (Ok(domid), Ok(devid)) = (text(domain).parse(), text(device).parse()) else {
            return Ok(());
        };
        let id = Id { domid, devid };
        if self.is_known(id) || !self.is_ours(id, first)? {
            return Ok(());
        }
        let (bell, hear) = Bell::new();
        let device = Device::new(self.clone(), id, bell.clone());
        let thread = std::thread::Builder::new()
            .name(format!("vbd-{domid}-{devid}"))
            .stack_size(STACK)
            .spawn(move || device.run(&hear));
        match thread {
            Ok(thread) => drop(self.all.lock().insert(id, (bell, thread))),
            Err(e) => log::error!("{id}: cannot start a thread: {e}"),
        }
        Ok(())
    }

    fn is_known(&self, id: Id) -> bool {
        self.all.lock().get(&id).is_some_and(|(_, thread)| !thread.is_finished())
    }

    /// Whether a device that has no thread is to get one: it names an image of ours, and either is
    /// new or was there before we were.
    fn is_ours(&self, id: Id, first: bool) -> Result<bool, StoreError> {
        let (store, dir) = (self.store(), self.dir_of(id));
        let read = |key: &str| store.read(format!("{dir}/{key}"));
        let state = read("state")?;
        let new = state.as_deref() == Some(b"1");
        let left = first && state.is_some() && read("online")?.as_deref() != Some(b"0");
        if !new && !left {
            return Ok(false);
        }
        if read("sm-data/polldisk")?.is_some() || by_script(&store, &dir)? {
            return Ok(true);
        }
        let params = read("qemu-params")?.unwrap_or_default();
        Ok(params.starts_with(PREFIX.as_bytes()) && !params.contains(&b' '))
    }

    /// Forgets devices that have ended.
    fn bury(&self) {
        self.all.lock().retain(|_, (_, thread)| !thread.is_finished());
    }
}

/// Whether the toolstack is libxl, which says by the name of a script whose device it is. It runs that
/// script when the device is in state 2, and takes what that says.
pub(crate) fn by_script(store: &Store, dir: &str) -> Result<bool, StoreError> {
    let script = store.read(format!("{dir}/script"))?;
    Ok(script.is_some_and(|name| name.ends_with(SCRIPT.as_bytes())))
}
