//! A guest's device, from the moment that the toolstack made its directory to its end. Each has a
//! thread of its own, the only one that writes its state: so no two teardowns can race. What is to
//! be done says [`blkif::Life`], from what stands in xenstore now; how much happened in between does
//! not matter.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::Duration;

use anyhow::{Context, bail};
use blkif::negotiate::{Offer, agree};
use blkif::{Action, Event, Life, State};
use node::{Records, Rings};
use xen::store::{Error as StoreError, Nodes, Store};

use super::devices::{Shared, by_script};
use super::figures::{Vbd, vbd_name, vm_of};
use super::images::{Image, Left, Wanted, is_in_use};

/// In our directory, while nobody serves the rings of a guest that is connected: they were left in
/// order, with all answered that was taken.
const HANDED_OVER: &str = "polldisk-handed-over";

/// In our directory from the first look on: one without it was made anew since, however quickly.
const SEEN: &str = "polldisk-seen";

/// Of rings that nobody knows enough of.
const DIED: &str = "the daemon that served this guest has died, and its rings cannot be taken up: the \
                    guest has to be started again";

/// Longest value that is looked at in the backend's directory, in bytes.
const LONGEST: usize = 4096;

/// Until something that the store refused is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// How long an image may still be in use by the guest's former domain: a toolstack makes the next one as
/// soon as that has closed its device. libxl waits 10 s for a device.
const PATIENCE_NS: u64 = 9_000_000_000;

/// Between two looks at a device that has ended.
const LOOK: Duration = Duration::from_secs(10);

/// Between two looks whether a ring was given up, which nobody tells of.
const LOOK_AT_RINGS: Duration = Duration::from_secs(5);

/// Between two lines about what a guest does wrong, in nanoseconds.
const SILENT_NS: u64 = 10_000_000_000;

/// Which device: the guest and the number of its disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Id {
    pub(crate) domid: u16,
    pub(crate) devid: u32,
}

impl Id {
    /// What its two watches go by: on the frontend's state, and on ours.
    pub(crate) fn tokens(self) -> [u64; 2] {
        [1, 2].map(|n| n << 48 | u64::from(self.domid) << 32 | u64::from(self.devid))
    }

    pub(crate) fn of_token(token: u64) -> Option<Id> {
        (token >> 48 != 0).then_some(Id { domid: (token >> 32) as u16, devid: token as u32 })
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "vbd {}/{}", self.domid, self.devid)
    }
}

/// How others reach a device's thread.
pub(crate) struct Bell {
    ring: SyncSender<()>,
    resized: AtomicBool,
    stop: AtomicBool,
    /// For those who ask what it does: see [`Device::tell`]. `None` before it has looked.
    pub(crate) seen: reactor::sync::Mutex<Option<Vbd>>,
}

impl Bell {
    pub(crate) fn new() -> (Arc<Bell>, Receiver<()>) {
        let (ring, hear) = std::sync::mpsc::sync_channel(1);
        let (resized, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        let seen = reactor::sync::Mutex::new(None);
        (Arc::new(Bell { ring, resized, stop, seen }), hear)
    }

    /// Something has changed.
    pub(crate) fn ring(&self) {
        // If it rings already, that will do.
        let _ = self.ring.try_send(());
    }

    /// Its disk has another size.
    pub(crate) fn resized(&self) {
        self.resized.store(true, Ordering::Release);
        self.ring();
    }

    /// Lets go of the guest's rings, for another daemon to take them up, and ends.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.ring();
    }
}

/// What stands in the device's directories.
#[derive(Default, Debug)]
struct Seen {
    /// Our own state; `None` if the toolstack has removed the device, or made it anew.
    own: Option<u32>,
    online: bool,
    frontend: Option<u32>,
}

pub(crate) struct Device {
    shared: Arc<Shared>,
    id: Id,
    bell: Arc<Bell>,
    /// Our directory, and the frontend's.
    dir: String,
    frontend: String,
    /// What the toolstack calls the disk in the guest, and the guest: [`Vbd::vm`].
    name: String,
    vm: Option<String>,
    life: Life,
    image: Option<Arc<Image>>,
    offer: Option<Offer>,
    rings: Option<Rings>,
    /// [`SEEN`] was written.
    marked: bool,
    /// [`Action::Remove`] was done.
    over: bool,
    /// What a daemon that died may have left of its image. [`Left::Needed`] until the rings are
    /// connected to, which that daemon served.
    left: Left,
    /// Before then nothing more is logged of what the guest does wrong, in nanoseconds.
    silent_until: u64,
}

impl Device {
    pub(crate) fn new(shared: Arc<Shared>, id: Id, bell: Arc<Bell>) -> Device {
        let dir = shared.dir_of(id);
        Device {
            shared,
            id,
            bell,
            dir,
            frontend: String::new(),
            name: vbd_name(id.devid),
            vm: None,
            life: Life::new(),
            image: None,
            offer: None,
            rings: None,
            marked: false,
            over: false,
            left: Left::Nothing,
            silent_until: 0,
        }
    }

    /// The thread's body.
    pub(crate) fn run(mut self, hear: &Receiver<()>) {
        loop {
            self.live(hear);
            if !self.rest(hear) {
                break;
            }
            self = Device::new(self.shared, self.id, self.bell);
        }
        for token in self.id.tokens() {
            let _ = self.shared.store().unwatch(token);
        }
    }

    /// When all is over: the toolstack may still ask us to close, and waits for that. Returns whether
    /// it made the device anew.
    fn rest(&self, hear: &Receiver<()>) -> bool {
        while !self.bell.stop.load(Ordering::Acquire) {
            match self.store().read(self.key("state")) {
                Ok(None) => return false,
                Ok(Some(v)) if v == b"1" => return true,
                Ok(Some(v)) if v == b"5" => self.write(State::Closed, false),
                Ok(Some(_)) => {}
                Err(e) => log::debug!("{}: {e}", self.id),
            }
            self.tell();
            // A directory that somebody leaves behind for ever is looked at now and then.
            let _ = hear.recv_timeout(LOOK);
        }
        false
    }

    /// From the first look at a device to its end.
    fn live(&mut self, hear: &Receiver<()>) {
        match self.mark().and_then(|()| self.open()) {
            Ok(()) => {
                // Where the guest is by now decides what being ready means: it may be connected to
                // a daemon that has gone.
                if let Err(e) = self.look() {
                    log::warn!("{}: {e}", self.id);
                }
                self.event(Event::Ready);
            }
            Err(e) => {
                self.report(&format!("{e:#}"));
                // The script tells the user, and is not run before that.
                if matches!(by_script(&self.store(), &self.dir), Ok(true)) {
                    self.write(State::InitWait, false);
                }
            }
        }
        while !self.over && !self.bell.stop.load(Ordering::Acquire) {
            let again = match self.look() {
                Ok(()) => None,
                Err(e) => {
                    // A guest can change its state as fast as it likes, and be always quicker.
                    if self.may_log() {
                        log::warn!("{}: {e}", self.id);
                    }
                    Some(RETRY)
                }
            };
            self.tell();
            if self.over {
                break;
            }
            match again {
                None => self.wait(hear),
                Some(wait) => drop(hear.recv_timeout(wait)),
            }
        }
        let mut had_rings = false;
        // What was taken from the rings is answered, and nothing of the guest is mapped any more.
        if let Some(rings) = self.rings.take() {
            rings.close();
            had_rings = true;
        }
        if let Some(image) = self.image.take() {
            let ends = self.bell.stop.load(Ordering::Acquire);
            let closed = self.shared.images.release(image, ends);
            // Not before all is on disk. Else the next daemon needs the journal.
            if had_rings && closed {
                self.hand_over();
            }
        }
    }

    /// Waits until something has changed.
    fn wait(&self, hear: &Receiver<()>) {
        while hear.recv_timeout(LOOK_AT_RINGS) == Err(RecvTimeoutError::Timeout) && !self.broken() {
        }
    }

    fn broken(&self) -> bool {
        self.rings.as_ref().is_some_and(Rings::broken)
    }

    fn store(&self) -> Arc<Store> {
        self.shared.store()
    }

    fn key(&self, key: &str) -> String {
        format!("{}/{key}", self.dir)
    }

    /// Our own state, unless the toolstack has removed the device, or made it anew: what is written then
    /// would be the next one's.
    fn own(&self, nodes: &impl Nodes) -> Result<Option<Vec<u8>>, StoreError> {
        match !self.marked || nodes.read(self.key(SEEN))?.is_some() {
            true => nodes.read(self.key("state")),
            false => Ok(None),
        }
    }

    fn mark(&mut self) -> anyhow::Result<()> {
        self.store().transaction(|tx| match self.own(tx)? {
            Some(_) => tx.write(self.key(SEEN), "1"),
            None => Ok::<_, StoreError>(()),
        })?;
        self.marked = true;
        Ok(())
    }

    /// Opens the image, and writes what is offered.
    fn open(&mut self) -> anyhow::Result<()> {
        let (store, dir) = (self.store(), self.dir.clone());
        let read = |key: &str| -> anyhow::Result<Option<Vec<u8>>> {
            let value = store.read(format!("{dir}/{key}"))?;
            Ok(value.filter(|v| v.len() <= LONGEST))
        };
        let text = |key: &str| -> anyhow::Result<String> {
            let value = read(key)?.with_context(|| format!("{dir}/{key} is missing"))?;
            String::from_utf8(value).with_context(|| format!("{dir}/{key} is no text"))
        };
        self.frontend = text("frontend")?;
        // First: whatever is wrong with the device, its end must be seen.
        let [theirs, ours] = self.id.tokens();
        // Not for a device that was made anew: its frontend may be another.
        store.unwatch(theirs)?;
        store.watch(format!("{}/state", self.frontend), theirs)?;
        store.unwatch(ours)?;
        store.watch(format!("{dir}/state"), ours)?;
        if text("frontend-id")?.parse() != Ok(self.id.domid) {
            bail!("{dir}/frontend-id names another domain");
        }
        self.vm = vm_of(&store, self.id.domid)?;
        let plain = |name: &String| {
            let bytes = name.as_bytes();
            (1..=16).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_alphanumeric)
        };
        if let Some(name) = text("dev").ok().filter(plain) {
            self.name = name;
        }
        let handed_over = self.take_over()?;
        let scripted = by_script(&store, &dir)?;
        let which = match scripted {
            true => targeted(&text("params")?)?,
            false => wanted(&text("sm-data/polldisk").or_else(|_| text("qemu-params"))?)?,
        };
        let image = self.take(which)?;
        if handed_over {
            // From here on there is a journal, and nothing was served yet.
            store.rm(self.key(HANDED_OVER))?;
        }
        let mut offer = Offer::new(&image.info());
        offer.read_only |= !text("mode")?.contains('w');
        if read("discard-enable")?.as_deref() == Some(b"0") {
            offer.discard = None;
        }
        self.image = Some(image.clone());
        let done = store.transaction(|tx| {
            for (key, value) in offer.transport_keys().into_iter().chain(offer.device_keys()) {
                tx.write(self.key(key), value)?;
            }
            // libxl has the emulated disk of an HVM guest read this.
            if let (true, Some(nbd)) = (scripted, image.nbd()) {
                tx.write(self.key("physical-device-path"), format!("nbd:unix:{}", nbd.display()))?;
            }
            // The toolstack waits for this.
            tx.write(self.key("hotplug-status"), "connected")
        });
        self.offer = Some(offer);
        Ok(done?)
    }

    /// The image, which the guest that had it before may have to the end of its life.
    fn take(&self, which: Which) -> anyhow::Result<Arc<Image>> {
        let (images, user) = (&self.shared.images, self.id.to_string());
        let clock = images.reactors().clock();
        let late = clock.now() + PATIENCE_NS;
        loop {
            let taken = match which.clone() {
                Which::Attached(_) if self.left == Left::Needed => bail!(DIED),
                Which::Attached(name) => images.take(&name, &user),
                Which::New(wanted) => {
                    // By this, `ctl --image` means it.
                    let name = format!("{}/{}", self.id.domid, self.id.devid);
                    images.open_for(wanted.or_named(name), &user, self.left)
                }
            };
            match taken {
                Err(e) if is_in_use(&e) && clock.now() < late => {
                    if self.bell.stop.load(Ordering::Acquire) {
                        return Err(e);
                    }
                    std::thread::sleep(RETRY);
                }
                done => return done,
            }
        }
    }

    /// A guest that is connected to somebody else's rings is taken up if they were left in order, or if
    /// there are records of what a daemon that died had taken from them and not answered, and answered
    /// and not written down: to go on without would lose a guest's data silently. Returns whether they
    /// were left in order.
    fn take_over(&mut self) -> anyhow::Result<bool> {
        let store = self.store();
        let number = |path: String| -> anyhow::Result<Option<u32>> {
            Ok(store.read(path)?.and_then(|v| decimal(&v)))
        };
        let [connected, closing] = [State::Connected, State::Closing].map(|s| Some(s as u32));
        let own = number(self.key("state"))?;
        let handed_over = store.read(self.key(HANDED_OVER))?.is_some();
        if own != connected || number(format!("{}/state", self.frontend))? != connected {
            // The frontend may begin anew with rings that look like the old ones.
            self.shared.images.keep.forget_records(self.id);
            if [connected, closing].contains(&own) && !handed_over {
                self.left = Left::Perhaps;
            }
            return Ok(handed_over);
        }
        if handed_over {
            return Ok(true);
        }
        if !self.shared.images.keep.has_record(self.id) {
            bail!(DIED);
        }
        log::warn!("{}: the daemon that served it has died; its rings are taken up", self.id);
        self.left = Left::Needed;
        Ok(false)
    }

    fn hand_over(&self) {
        let done = self.store().transaction(|tx| {
            // A device that was removed does not come back.
            match self.own(tx)? {
                Some(_) => tx.write(self.key(HANDED_OVER), "1"),
                None => Ok(()),
            }
        });
        if let Err::<(), StoreError>(e) = done {
            log::warn!("{}: the next daemon will not take its rings up: {e}", self.id);
        }
    }

    /// Looks at what stands in xenstore, and does what follows from it.
    fn look(&mut self) -> Result<(), StoreError> {
        let seen = self.store().transaction(|tx| {
            let number = |v: Option<Vec<u8>>| v.map(|v| decimal(&v).unwrap_or(u32::MAX));
            Ok::<_, StoreError>(Seen {
                own: number(self.own(tx)?),
                online: number(tx.read(self.key("online"))?) != Some(0),
                frontend: number(tx.read(format!("{}/state", self.frontend))?),
            })
        })?;
        if self.bell.resized.swap(false, Ordering::AcqRel) {
            self.resized();
        }
        if self.broken() {
            self.event(Event::Broken);
        }
        let there = seen.own.is_some();
        self.event(Event::Online(seen.online && there));
        if seen.own == Some(State::Closing as u32) && self.life.state() != State::Closing {
            self.event(Event::AskedToClose);
        }
        self.event(Event::Frontend(seen.frontend.filter(|_| there)));
        Ok(())
    }

    fn resized(&mut self) {
        if let (Some(image), Some(offer)) = (&self.image, &mut self.offer) {
            offer.sectors = Offer::new(&image.info()).sectors;
            self.event(Event::Resized);
        }
    }

    fn event(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.life.event(event, &mut actions);
        for action in actions {
            log::debug!("{}: {event:?}: {action:?}", self.id);
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Write(state) => self.write(state, state == State::Connected),
            Action::WriteSize => self.write(self.life.state(), true),
            Action::Connect => match self.connect() {
                Ok(rings) => {
                    self.left = Left::Nothing;
                    self.rings = Some(rings);
                    self.event(Event::Connected);
                }
                Err(e) => {
                    self.report(&format!("{e:#}"));
                    self.event(Event::ConnectFailed);
                }
            },
            Action::Stop => {
                if let Some(rings) = &self.rings {
                    rings.stop();
                }
            }
            Action::Disconnect => {
                if let Some(rings) = self.rings.take() {
                    rings.close();
                }
                self.shared.images.keep.forget_records(self.id);
                self.event(Event::Disconnected);
            }
            Action::Report(why) => self.report(why),
            Action::Remove => self.over = true,
        }
    }

    fn connect(&self) -> anyhow::Result<Rings> {
        let (Some(image), Some(offer)) = (&self.image, &self.offer) else {
            bail!("its image is not open");
        };
        let agreed = self.store().transaction(|tx| {
            let failed = RefCell::new(None);
            let agreed = agree(offer, |key| {
                tx.read(format!("{}/{key}", self.frontend)).unwrap_or_else(|e| {
                    failed.borrow_mut().get_or_insert(e);
                    None
                })
            });
            match failed.into_inner() {
                Some(e) => Err(e),
                None => Ok(agreed),
            }
        })??;
        let open = |ring: usize, bytes: u64| {
            let record = self.shared.images.keep.record(self.id, ring, bytes);
            record.map_err(|e| format!("{e:#}"))
        };
        let records = Records { open: &open, of_the_dead: self.left == Left::Needed };
        Ok(self.shared.guests.connect(&image.door, self.id.domid, &agreed, offer, records)?)
    }

    /// Writes our state, with all that a frontend reads at it if `keys`.
    fn write(&self, state: State, keys: bool) {
        let keys = self.offer.as_ref().filter(|_| keys).map(Offer::device_keys);
        let done = self.store().transaction(|tx| {
            // A device that was removed does not come back.
            if self.own(tx)?.is_none() {
                return Ok(());
            }
            for (key, value) in keys.iter().flatten() {
                tx.write(self.key(key), value)?;
            }
            tx.write(self.key("state"), (state as u32).to_string())
        });
        if let Err::<(), StoreError>(e) = done {
            log::warn!("{}: state {state:?} is not written: {e}", self.id);
        }
    }

    /// Whether a line about what the guest does may be logged: it can do it as fast as it likes.
    fn may_log(&mut self) -> bool {
        let now = self.shared.images.reactors().clock().now();
        let may = now >= self.silent_until;
        if may {
            self.silent_until = now + SILENT_NS;
        }
        may
    }

    /// Writes an error where the toolstack looks for it.
    fn report(&mut self, why: &str) {
        if self.may_log() {
            log::error!("{}: {why}", self.id);
        }
        let path = self.shared.error_of(&self.dir);
        let done = self.store().transaction(|tx| {
            if self.own(tx)?.is_none() {
                return Ok(());
            }
            tx.write(&path, why)?;
            tx.write(self.key("hotplug-error"), why)
        });
        if let Err::<(), StoreError>(e) = done {
            log::warn!("{}: the toolstack is not told: {e}", self.id);
        }
    }

    /// For those who ask.
    fn tell(&self) {
        *self.bell.seen.lock() = Some(Vbd {
            id: self.id,
            name: self.name.clone(),
            vm: self.vm.clone(),
            image: self.image.as_ref().map(|i| i.name.clone()),
            state: self.life.state(),
            rings: self.rings.iter().flat_map(Rings::stats).cloned().collect(),
        });
    }
}

/// Which image a device wants.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Which {
    /// One that `polldisk ctl attach` has opened.
    Attached(String),
    New(Wanted),
}

/// What `sm-data/polldisk` or `qemu-params` says: a name, or an object of JSON as `ctl attach` takes
/// it; in `qemu-params` behind `polldisk:`, in which others' devices have something else.
fn wanted(text: &str) -> anyhow::Result<Which> {
    let text = text.strip_prefix(super::devices::PREFIX).unwrap_or(text);
    if !text.starts_with('{') {
        return Ok(Which::Attached(text.to_owned()));
    }
    let wanted = serde_json::from_str(text).context("what image is wanted")?;
    Ok(Which::New(wanted))
}

/// What libxl passes on as the target of a disk: the same, or a node, which holds a QCOW2 image.
fn targeted(target: &str) -> anyhow::Result<Which> {
    match target.contains(['/', ':']) && !target.starts_with('{') {
        true => Ok(Which::New(Wanted::qcow2(target))),
        false => wanted(target),
    }
}

fn decimal(text: &[u8]) -> Option<u32> {
    // `parse` alone would take a sign.
    let digits = text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}
