//! [`Images`]: what the daemon serves, by name. Images come by `polldisk ctl attach` and by devices
//! whose xenstore entry says which image they want.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, bail};
use block::DeviceInfo;
use node::{Disk, Door, OpenOptions, Parts, Reactors};
use qcow::open::Format;
use reactor::sync::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::figures::Io;
use super::keep::{Keep, is_name};
use super::repositories::{Place, Repositories};
use crate::ctl::Changes;
use crate::nbd::DRAIN;

/// An image as somebody asks for it.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Wanted {
    /// Its name here; the node if that is not given.
    name: Option<String>,
    /// Where it lies: a node, or `fast:REPOSITORY/DISK@NODES`.
    node: String,
    /// `qcow2` or `raw`.
    #[serde(default = "qcow2")]
    format: String,
    #[serde(default)]
    read_only: bool,
    /// A socket on which it is served over NBD as well.
    nbd: Option<PathBuf>,
    /// The name that NBD clients ask for.
    #[serde(default)]
    export: String,
    /// Requests a second, and bytes; 0: as many as come. A repository knows those of its disks.
    #[serde(default)]
    iops: u64,
    #[serde(default)]
    bandwidth: u64,
}

fn qcow2() -> String {
    "qcow2".to_owned()
}

impl Wanted {
    /// A QCOW2 image for reading and writing.
    pub(crate) fn qcow2(node: &str) -> Wanted {
        let (node, format) = (node.to_owned(), qcow2());
        let (name, nbd, export) = (None, None, String::new());
        Wanted { name, node, format, read_only: false, nbd, export, iops: 0, bandwidth: 0 }
    }

    /// A disk of a repository.
    pub(crate) fn disk(
        node: &str,
        name: String,
        read_only: bool,
        nbd: PathBuf,
        export: &str,
    ) -> Wanted {
        let (name, nbd, export) = (Some(name), Some(nbd), export.to_owned());
        Wanted { name, read_only, nbd, export, ..Wanted::qcow2(node) }
    }

    /// The same, with this name if it has none.
    pub(crate) fn or_named(mut self, name: String) -> Wanted {
        self.name.get_or_insert(name);
        self
    }

    pub(crate) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.node)
    }

    /// Whether it is the same image, opened in the same way.
    fn is_same(&self, other: &Wanted) -> bool {
        let what = |w: &Wanted| (w.node.clone(), w.format.clone(), w.read_only);
        what(self) == what(other)
    }
}

/// An image that is served.
pub(crate) struct Image {
    pub(crate) name: String,
    wanted: Wanted,
    pub(crate) door: Door,
    pub(crate) changes: Arc<Changes>,
    info: DeviceInfo,
}

impl Image {
    /// The socket on which it is served over NBD.
    pub(crate) fn nbd(&self) -> Option<&Path> {
        self.wanted.nbd.as_deref()
    }

    /// What it is like, its size as it is by now.
    pub(crate) fn info(&self) -> DeviceInfo {
        let size = self.changes.size().load(Ordering::Relaxed);
        DeviceInfo { size, ..self.info.clone() }
    }
}

/// An image that somebody else has, who may let go of it.
#[derive(Debug, thiserror::Error)]
#[error("image {0:?} is in use by {1}")]
struct InUse(String, String);

/// Whether an image could not be had because somebody else has it.
pub(crate) fn is_in_use(e: &anyhow::Error) -> bool {
    e.is::<InUse>() || matches!(e.downcast_ref(), Some(node::Error::InUse { .. }))
}

/// What a daemon that died may have left of an image in its journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Left {
    /// Nothing that counts.
    Nothing,
    /// Its guest has let go of the disk, or is about to: what can be put in is.
    Perhaps,
    /// A guest that goes on was told of it: without, the image must not be served.
    Needed,
}

/// How long somebody who opens or closes an image is waited for, in nanoseconds.
const PATIENCE_NS: u64 = 30_000_000_000;

/// Between two looks whether he has done that.
const LOOK: std::time::Duration = std::time::Duration::from_millis(5);

/// The state of a name.
enum Entry {
    /// Somebody opens or closes it.
    Busy,
    Open {
        image: Arc<Image>,
        /// The device that it serves.
        user: Option<String>,
        /// It goes when that device does.
        passing: bool,
        nbd: Option<::nbd::Server>,
    },
}

/// All images, and the reactors that serve them.
pub(crate) struct Images {
    reactors: Arc<Reactors>,
    options: qcow::run::Options,
    allow_backing: Vec<PathBuf>,
    pub(crate) keep: Arc<Keep>,
    repositories: Arc<Repositories>,
    all: Mutex<BTreeMap<String, Entry>>,
    /// The home of the next one.
    next: AtomicUsize,
}

impl Images {
    pub(crate) fn new(
        reactors: Arc<Reactors>,
        options: qcow::run::Options,
        allow_backing: Vec<PathBuf>,
        keep: Arc<Keep>,
        repositories: Arc<Repositories>,
    ) -> Images {
        let (all, next) = (Mutex::new(BTreeMap::new()), AtomicUsize::new(0));
        Images { reactors, options, allow_backing, keep, repositories, all, next }
    }

    pub(crate) fn reactors(&self) -> &Arc<Reactors> {
        &self.reactors
    }

    /// Opens an image, to be there until [`Images::detach`].
    pub(crate) fn attach(&self, wanted: Wanted) -> anyhow::Result<()> {
        begin(&mut self.all.lock(), wanted.name())?;
        self.open(wanted, None, Left::Nothing).map(drop)
    }

    /// Opens an image for a device, and for as long as that uses it; or gives it the one that is open.
    pub(crate) fn open_for(
        &self,
        wanted: Wanted,
        user: &str,
        left: Left,
    ) -> anyhow::Result<Arc<Image>> {
        let name = wanted.name();
        let there = self.at_peace(name, |all| match all.get(name) {
            Some(Entry::Busy) => None,
            Some(Entry::Open { image, .. }) if image.wanted.is_same(&wanted) => {
                Some(give(all, name, user).map(Some))
            }
            _ => Some(begin(all, name).map(|()| None)),
        })??;
        match there {
            Some(image) => Ok(image),
            None => self.open(wanted, Some(user), left),
        }
    }

    /// Whether a daemon that died has left changes of an image that is not open yet.
    pub(crate) fn is_left(&self, name: &str) -> bool {
        let all = self.all.lock();
        !matches!(all.get(name), Some(Entry::Open { .. })) && self.keep.has_changes(name)
    }

    /// Puts in what can be of that, as somebody is going to change the image. Whether nothing is left of it.
    pub(crate) fn put_in(&self, wanted: &Wanted) -> bool {
        // Whoever opens it does that himself, but may not have come to it.
        let name = wanted.name();
        let ours = self.at_peace(name, |all| match all.get(name) {
            Some(Entry::Busy) => None,
            Some(Entry::Open { .. }) => Some(false),
            None => {
                let left = self.keep.has_changes(name);
                // Nobody opens it meanwhile.
                left.then(|| all.insert(name.to_owned(), Entry::Busy));
                Some(left)
            }
        });
        let done = match ours {
            Ok(true) => {
                let done = self.redo(wanted);
                self.all.lock().remove(name);
                done
            }
            other => other.map(drop),
        };
        done.inspect_err(|e| log::warn!("{name}: {e:#}")).is_ok()
    }

    /// Opens an image, or keeps the one that a device has opened, until [`Images::let_go`].
    pub(crate) fn hold(&self, wanted: Wanted) -> anyhow::Result<()> {
        self.at_peace(wanted.name(), |all| match all.get_mut(wanted.name()) {
            Some(Entry::Open { image, passing, .. }) if image.wanted.is_same(&wanted) => {
                *passing = false;
                Some(Ok(true))
            }
            Some(Entry::Busy) => None,
            Some(Entry::Open { .. }) => Some(Err(())),
            None => {
                all.insert(wanted.name().to_owned(), Entry::Busy);
                Some(Ok(false))
            }
        })
        .and_then(|there| match there {
            Ok(true) => Ok(()),
            // Its guest may go on, and be found later.
            Ok(false) if self.keep.has_journal(wanted.name()) => {
                self.open(wanted, None, Left::Perhaps).map(drop)
            }
            Ok(false) => self.open(wanted, None, Left::Nothing).map(drop),
            Err(()) => bail!("another image has the name"),
        })
    }

    /// Ends [`Images::hold`]: closes the image, or leaves it to the device that uses it still. NBD clients
    /// are cut off.
    pub(crate) fn let_go(&self, name: &str) -> anyhow::Result<()> {
        let gone = self.at_peace(name, |all| match all.get_mut(name) {
            Some(Entry::Busy) => None,
            Some(Entry::Open { user: Some(_), passing, .. }) => {
                *passing = true;
                Some(None)
            }
            Some(entry) => Some(Some(std::mem::replace(entry, Entry::Busy))),
            None => Some(None),
        })?;
        match gone {
            Some(Entry::Open { image, nbd, .. }) => self.close(image, nbd, false),
            _ => Ok(()),
        }
    }

    /// Cuts off the NBD clients of an image that is going to be let go. Until it is closed nobody is served
    /// over NBD any more.
    pub(crate) fn cut_off(&self, name: &str) -> anyhow::Result<()> {
        let server = self.at_peace(name, |all| match all.get_mut(name) {
            Some(Entry::Busy) => None,
            Some(Entry::Open { nbd, .. }) => Some(nbd.take()),
            None => Some(None),
        })?;
        server.map(|server| server.shutdown(DRAIN));
        Ok(())
    }

    /// Waits while somebody opens or closes an image, for which `f` says `None`.
    fn at_peace<T>(
        &self,
        name: &str,
        mut f: impl FnMut(&mut BTreeMap<String, Entry>) -> Option<T>,
    ) -> anyhow::Result<T> {
        let clock = self.reactors.clock();
        let late = clock.now() + PATIENCE_NS;
        loop {
            if let Some(done) = f(&mut self.all.lock()) {
                return Ok(done);
            }
            if clock.now() >= late {
                bail!("image {name:?} is being opened or closed for too long");
            }
            std::thread::sleep(LOOK);
        }
    }

    fn redo(&self, wanted: &Wanted) -> anyhow::Result<()> {
        let place = Place::parse(&wanted.node)?;
        let format = place.format(&wanted.format)?;
        if format != Format::Qcow2 || wanted.read_only {
            return Ok(());
        }
        let owners = place.owners(&self.repositories)?;
        let found = self.keep.changes(wanted.name(), &owners)?;
        let (changes, which) = found.with_context(|| {
            format!(
                "{}: the daemon that died has lost changes that its guest was told of",
                wanted.node
            )
        })?;
        if changes.list.is_empty() {
            return Ok(());
        }
        let options =
            OpenOptions { clock: self.reactors.clock().clone(), ..OpenOptions::write(format) };
        let mut source = place.open_image(&self.repositories, which, &options)?;
        qcow::edit::redo(&mut source, &wanted.node, &changes)?;
        source.close()?;
        // Others may stand on the image, or have it open, when this is asked for again.
        self.keep.is_put_in(wanted.name(), changes.owner)?;
        let count = changes.list.len();
        log::warn!("{}: {count} changes of a daemon that died are put in", wanted.node);
        Ok(())
    }

    /// Gives an attached image to a device.
    pub(crate) fn take(&self, name: &str, user: &str) -> anyhow::Result<Arc<Image>> {
        give(&mut self.all.lock(), name, user)
    }

    /// A device is done with its image, `for_all` if the daemon ends. Returns whether all that is
    /// closed by this is on disk.
    pub(crate) fn release(&self, image: Arc<Image>, for_all: bool) -> bool {
        let name = image.name.clone();
        drop(image);
        let gone = match self.all.lock().get_mut(&name) {
            Some(entry @ Entry::Open { passing: true, .. }) => {
                Some(std::mem::replace(entry, Entry::Busy))
            }
            Some(entry @ Entry::Open { .. }) if for_all => {
                Some(std::mem::replace(entry, Entry::Busy))
            }
            Some(Entry::Open { user, .. }) => {
                *user = None;
                None
            }
            _ => None,
        };
        if let Some(Entry::Open { image, nbd, .. }) = gone
            && let Err(e) = self.close(image, nbd, for_all)
        {
            log::error!("{name}: {e:#}");
            return false;
        }
        true
    }

    /// Closes an image that neither a device nor an NBD client uses.
    pub(crate) fn detach(&self, name: &str) -> anyhow::Result<()> {
        self.remove(name, false)
    }

    /// Closes an image that no device uses; NBD clients are cut off only if `cut`.
    fn remove(&self, name: &str, cut: bool) -> anyhow::Result<()> {
        let entry = {
            let mut all = self.all.lock();
            match all.get_mut(name) {
                None => bail!("there is no image {name:?}"),
                Some(Entry::Busy) => bail!("image {name:?} is being opened or closed"),
                Some(Entry::Open { user: Some(user), .. }) => {
                    bail!(InUse(name.to_owned(), user.clone()))
                }
                Some(Entry::Open { nbd, .. }) if !cut && clients(nbd).is_some_and(|n| n > 0) => {
                    bail!(InUse(name.to_owned(), "an NBD client".to_owned()))
                }
                Some(entry) => std::mem::replace(entry, Entry::Busy),
            }
        };
        match entry {
            Entry::Open { image, nbd, .. } => self.close(image, nbd, false),
            Entry::Busy => Ok(()),
        }
    }

    /// Closes all; devices are gone by then.
    pub(crate) fn close_all(&self) -> anyhow::Result<()> {
        let mut first = Ok(());
        loop {
            let name = self.all.lock().keys().next().cloned();
            let Some(name) = name else { return first };
            let closed = self.remove(&name, true);
            if first.is_ok() {
                first = closed;
            }
            // Whatever it was, it is not tried again.
            self.all.lock().remove(&name);
        }
    }

    /// One that is open.
    pub(crate) fn image(&self, name: &str) -> Option<Arc<Image>> {
        match self.all.lock().get(name)? {
            Entry::Open { image, .. } => Some(image.clone()),
            Entry::Busy => None,
        }
    }

    /// The changes of one of them, for calls.
    pub(crate) fn changes(&self, name: &str) -> Option<Arc<Changes>> {
        match self.all.lock().get(name)? {
            Entry::Open { image, .. } => Some(image.changes.clone()),
            Entry::Busy => None,
        }
    }

    /// The disk of a repository that an image is.
    pub(crate) fn disk(&self, name: &str) -> Option<Place> {
        let node = match self.all.lock().get(name)? {
            Entry::Open { image, .. } => image.wanted.node.clone(),
            Entry::Busy => return None,
        };
        Place::parse(&node).ok().filter(|place| matches!(place, Place::Disk(_)))
    }

    pub(crate) fn list(&self) -> Value {
        let one = |(name, entry): (&String, &Entry)| match entry {
            Entry::Busy => json!({"name": name, "state": "busy"}),
            Entry::Open { image, user, nbd, .. } => json!({
                "name": name,
                "state": "open",
                "node": image.wanted.node,
                "format": image.wanted.format,
                "read-only": image.wanted.read_only,
                "virtual-size": image.info().size,
                "used-by": user,
                "nbd": image.wanted.nbd,
                "nbd-clients": clients(nbd),
                "space": self.repositories.is_exhausted(name).then_some("exhausted"),
            }),
        };
        self.all.lock().iter().map(one).collect()
    }

    /// What was done over NBD with each that is served so.
    pub(crate) fn nbd_io(&self) -> Vec<(String, Io)> {
        let all = self.all.lock();
        let served = all.iter().filter_map(|(name, entry)| match entry {
            Entry::Open { nbd: Some(server), .. } => Some((name.clone(), Io::of_nbd(server))),
            _ => None,
        });
        served.collect()
    }

    /// Opens an image whose name was taken.
    fn open(&self, wanted: Wanted, user: Option<&str>, left: Left) -> anyhow::Result<Arc<Image>> {
        let name = wanted.name().to_owned();
        let redone = match left {
            Left::Nothing => Ok(()),
            Left::Needed => self.redo(&wanted),
            Left::Perhaps => self.redo(&wanted).or_else(|e| {
                log::warn!("{name}: {e:#}");
                Ok(())
            }),
        };
        let opened = redone
            .and_then(|()| self.start(&wanted))
            .and_then(|(disk, place)| self.serve(wanted, disk, &place));
        let mut all = self.all.lock();
        match opened {
            Ok((image, nbd)) => {
                let (user, passing) = (user.map(str::to_owned), user.is_some());
                all.insert(name, Entry::Open { image: image.clone(), user, passing, nbd });
                Ok(image)
            }
            Err(e) => {
                all.remove(&name);
                Err(e)
            }
        }
    }

    /// All that belongs to an image that runs.
    fn serve(
        &self,
        wanted: Wanted,
        disk: Disk,
        place: &Place,
    ) -> anyhow::Result<(Arc<Image>, Option<::nbd::Server>)> {
        let (door, info, growing) = (disk.door(), disk.info().clone(), disk.growing());
        let clock = self.reactors.clock();
        let changes = Changes::new(disk, clock.clone(), self.allow_backing.clone());
        let listen = |path: &PathBuf| {
            let export = ::nbd::Export {
                name: wanted.export.clone(),
                read_only: wanted.read_only,
                size: Some(changes.size()),
                bitmaps: self.repositories.bitmaps(place, &self.keep)?,
                ..crate::nbd::export(wanted.node.clone(), &door, &info)?
            };
            anyhow::Ok(::nbd::Server::bind(path, export)?)
        };
        let ready = place.limits(&self.repositories).and_then(|limits| {
            let (iops, bandwidth) = limits.unwrap_or((wanted.iops, wanted.bandwidth));
            if iops > 0 || bandwidth > 0 {
                changes.limit(iops, bandwidth);
            }
            self.repositories.watch(wanted.name(), place, growing, changes.size(), clock);
            wanted.nbd.as_ref().map(listen).transpose()
        });
        match ready {
            Ok(nbd) => {
                let name = wanted.name().to_owned();
                Ok((Arc::new(Image { name, wanted, door, changes, info }), nbd))
            }
            Err(e) => {
                self.repositories.unwatch(wanted.name());
                if let Err(e) = changes.end().close() {
                    log::error!("{}: {e}", wanted.name());
                }
                Err(e)
            }
        }
    }

    fn start(&self, wanted: &Wanted) -> anyhow::Result<(Disk, Place)> {
        let place = Place::parse(&wanted.node)?;
        let format = place.format(&wanted.format)?;
        let options = OpenOptions {
            writable: !wanted.read_only,
            allow_backing: self.allow_backing.clone(),
            clock: self.reactors.clock().clone(),
            ..OpenOptions::read(format)
        };
        let chain = place.open(&self.repositories, &options)?;
        let owner = place.owners(&self.repositories)?[0];
        if !wanted.read_only {
            // Before anything in it changes.
            self.keep.forget_others(wanted.name(), owner)?;
        }
        let parts = Parts::on(chain, &self.reactors)?;
        let count = self.reactors.count();
        let home = self.next.fetch_add(1, Ordering::Relaxed);
        let numbers: Vec<usize> = (0..count).map(|n| (home + n) % count).collect();
        let disk = Disk::start_on(parts, &self.reactors, &numbers, self.options)?;
        if format == Format::Qcow2 && !wanted.read_only {
            let journal = self.keep.journal(wanted.name(), owner);
            let kept = journal.and_then(|j| Ok(disk.keep_journal(j, owner)?));
            if let Err(e) = kept {
                if let Err(e) = disk.close() {
                    log::error!("{e}");
                }
                return Err(e);
            }
        }
        Ok((disk, place))
    }

    /// `goes_on`: another daemon will serve its guest, who must know that nothing is missing.
    fn close(
        &self,
        image: Arc<Image>,
        nbd: Option<::nbd::Server>,
        goes_on: bool,
    ) -> anyhow::Result<()> {
        self.repositories.before_close(&image.name);
        let left = nbd.map_or(0, |server| server.shutdown(DRAIN));
        if left > 0 {
            log::warn!("{}: {left} NBD clients had requests in flight after {DRAIN:?}", image.name);
        }
        self.repositories.unwatch(&image.name);
        let closed = image.changes.end().close().context("closing it");
        if closed.is_ok() && !goes_on {
            self.keep.forget_journal(&image.name);
        }
        self.all.lock().remove(&image.name);
        closed
    }
}

/// Takes a name.
fn begin(all: &mut BTreeMap<String, Entry>, name: &str) -> anyhow::Result<()> {
    if !is_name(name) {
        bail!("image {name:?}: a shorter name is needed, and not none");
    }
    if all.contains_key(name) {
        bail!("there is an image {name:?} already");
    }
    all.insert(name.to_owned(), Entry::Busy);
    Ok(())
}

/// Gives an image that is open to a device.
fn give(all: &mut BTreeMap<String, Entry>, name: &str, user: &str) -> anyhow::Result<Arc<Image>> {
    match all.get_mut(name) {
        Some(Entry::Open { user: Some(other), .. }) => bail!(InUse(name.to_owned(), other.clone())),
        Some(Entry::Open { image, user: free, .. }) => {
            *free = Some(user.to_owned());
            Ok(image.clone())
        }
        Some(Entry::Busy) => bail!("image {name:?} is being opened or closed"),
        None => bail!("there is no image {name:?}; polldisk ctl attach opens one"),
    }
}

/// How many NBD clients there are, where there can be some.
fn clients(nbd: &Option<::nbd::Server>) -> Option<usize> {
    nbd.as_ref().map(|server| server.connections().len())
}
