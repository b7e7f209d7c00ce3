//! [`Images`]: what the daemon serves, by name. Images come by `polldisk ctl attach` and by devices
//! whose xenstore entry says which image they want.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, bail};
use block::DeviceInfo;
use node::{Disk, Door, NodeSpec, OpenOptions, Parts, Reactors};
use qcow::open::Format;
use reactor::sync::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};

use super::keep::{Keep, is_name, owner};
use crate::args;
use crate::ctl::Changes;

/// An image as somebody asks for it.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Wanted {
    /// Its name here; the node if that is not given.
    name: Option<String>,
    /// Where it lies.
    node: String,
    /// `qcow2` or `raw`.
    #[serde(default = "qcow2")]
    format: String,
    #[serde(default)]
    read_only: bool,
}

fn qcow2() -> String {
    "qcow2".to_owned()
}

impl Wanted {
    /// The same, with this name if it has none.
    pub(crate) fn or_named(mut self, name: String) -> Wanted {
        self.name.get_or_insert(name);
        self
    }

    pub(crate) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.node)
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
    /// What it is like, its size as it is by now.
    pub(crate) fn info(&self) -> DeviceInfo {
        let size = self.changes.size().load(Ordering::Relaxed);
        DeviceInfo { size, ..self.info.clone() }
    }
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
    },
}

/// All images, and the reactors that serve them.
pub(crate) struct Images {
    reactors: Arc<Reactors>,
    options: qcow::run::Options,
    allow_backing: Vec<PathBuf>,
    pub(crate) keep: Arc<Keep>,
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
    ) -> Images {
        let (all, next) = (Mutex::new(BTreeMap::new()), AtomicUsize::new(0));
        Images { reactors, options, allow_backing, keep, all, next }
    }

    pub(crate) fn reactors(&self) -> &Arc<Reactors> {
        &self.reactors
    }

    /// Opens an image, to be there until [`Images::detach`].
    pub(crate) fn attach(&self, wanted: Wanted) -> anyhow::Result<()> {
        self.begin(wanted.name())?;
        self.open(wanted, None, Left::Nothing).map(drop)
    }

    /// Opens an image for a device, and for as long as that uses it.
    pub(crate) fn open_for(
        &self,
        wanted: Wanted,
        user: &str,
        left: Left,
    ) -> anyhow::Result<Arc<Image>> {
        self.begin(wanted.name())?;
        self.open(wanted, Some(user), left)
    }

    fn redo(&self, wanted: &Wanted) -> anyhow::Result<()> {
        let format = args::format(&wanted.format).map_err(anyhow::Error::msg)?;
        if format != Format::Qcow2 || wanted.read_only {
            return Ok(());
        }
        let spec = NodeSpec::parse(&wanted.node)?;
        let changes = self.keep.changes(wanted.name(), owner(&spec)?)?.with_context(|| {
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
        let mut source = node::open_source(&spec, &options)?;
        qcow::edit::redo(&mut source, &wanted.node, &changes)?;
        let count = changes.list.len();
        log::warn!("{}: {count} changes of a daemon that died are put in", wanted.node);
        Ok(())
    }

    /// Gives an attached image to a device.
    pub(crate) fn take(&self, name: &str, user: &str) -> anyhow::Result<Arc<Image>> {
        match self.all.lock().get_mut(name) {
            Some(Entry::Open { user: Some(other), .. }) => {
                bail!("image {name:?} is in use by {other}")
            }
            Some(Entry::Open { image, user: free, .. }) => {
                *free = Some(user.to_owned());
                Ok(image.clone())
            }
            Some(Entry::Busy) => bail!("image {name:?} is being opened or closed"),
            None => bail!("there is no image {name:?}; polldisk ctl attach opens one"),
        }
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
        if let Some(Entry::Open { image, .. }) = gone
            && let Err(e) = self.close(image, for_all)
        {
            log::error!("{name}: {e:#}");
            return false;
        }
        true
    }

    /// Closes an image that no device uses.
    pub(crate) fn detach(&self, name: &str) -> anyhow::Result<()> {
        let entry = {
            let mut all = self.all.lock();
            match all.get_mut(name) {
                None => bail!("there is no image {name:?}"),
                Some(Entry::Busy) => bail!("image {name:?} is being opened or closed"),
                Some(Entry::Open { user: Some(user), .. }) => {
                    bail!("image {name:?} is in use by {user}")
                }
                Some(entry) => std::mem::replace(entry, Entry::Busy),
            }
        };
        match entry {
            Entry::Open { image, .. } => self.close(image, false),
            Entry::Busy => Ok(()),
        }
    }

    /// Closes all; devices are gone by then.
    pub(crate) fn close_all(&self) -> anyhow::Result<()> {
        let mut first = Ok(());
        loop {
            let name = self.all.lock().keys().next().cloned();
            let Some(name) = name else { return first };
            let closed = self.detach(&name);
            if first.is_ok() {
                first = closed;
            }
            // Whatever it was, it is not tried again.
            self.all.lock().remove(&name);
        }
    }

    /// The changes of one of them, for calls.
    pub(crate) fn changes(&self, name: &str) -> Option<Arc<Changes>> {
        match self.all.lock().get(name)? {
            Entry::Open { image, .. } => Some(image.changes.clone()),
            Entry::Busy => None,
        }
    }

    pub(crate) fn list(&self) -> Value {
        let one = |(name, entry): (&String, &Entry)| match entry {
            Entry::Busy => json!({"name": name, "state": "busy"}),
            Entry::Open { image, user, .. } => json!({
                "name": name,
                "state": "open",
                "node": image.wanted.node,
                "format": image.wanted.format,
                "read-only": image.wanted.read_only,
                "virtual-size": image.info().size,
                "used-by": user,
            }),
        };
        self.all.lock().iter().map(one).collect()
    }

    /// Takes the name.
    fn begin(&self, name: &str) -> anyhow::Result<()> {
        if !is_name(name) {
            bail!("image {name:?}: a shorter name is needed, and not none");
        }
        let mut all = self.all.lock();
        if all.contains_key(name) {
            bail!("there is an image {name:?} already");
        }
        all.insert(name.to_owned(), Entry::Busy);
        Ok(())
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
        match redone.and_then(|()| self.start(&wanted)) {
            Ok(disk) => {
                let (door, info) = (disk.door(), disk.info().clone());
                let clock = self.reactors.clock().clone();
                let changes = Changes::new(disk, clock, self.allow_backing.clone());
                let image = Arc::new(Image { name: name.clone(), wanted, door, changes, info });
                let entry = Entry::Open {
                    image: image.clone(),
                    user: user.map(str::to_owned),
                    passing: user.is_some(),
                };
                self.all.lock().insert(name, entry);
                Ok(image)
            }
            Err(e) => {
                self.all.lock().remove(&name);
                Err(e)
            }
        }
    }

    fn start(&self, wanted: &Wanted) -> anyhow::Result<Disk> {
        let spec = NodeSpec::parse(&wanted.node)?;
        let format = args::format(&wanted.format).map_err(anyhow::Error::msg)?;
        let options = OpenOptions {
            writable: !wanted.read_only,
            allow_backing: self.allow_backing.clone(),
            clock: self.reactors.clock().clone(),
            ..OpenOptions::read(format)
        };
        let (chain, owner) = (node::open_chain(&spec, &options)?, owner(&spec)?);
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
            let kept =
                self.keep.journal(wanted.name()).and_then(|j| Ok(disk.keep_journal(j, owner)?));
            if let Err(e) = kept {
                if let Err(e) = disk.close() {
                    log::error!("{e}");
                }
                return Err(e);
            }
        }
        Ok(disk)
    }

    /// `goes_on`: another daemon will serve its guest, who must know that nothing is missing.
    fn close(&self, image: Arc<Image>, goes_on: bool) -> anyhow::Result<()> {
        let closed = image.changes.end().close().context("closing it");
        if closed.is_ok() && !goes_on {
            self.keep.forget_journal(&image.name);
        }
        self.all.lock().remove(&image.name);
        closed
    }
}
