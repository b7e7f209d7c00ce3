//! [`Attached`]: a repository that the toolstack has attached, and which of them there are: that outlives
//! the daemon, as the toolstack does not attach them again for the next one.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use node::{GroupDevices, Member};
use reactor::sync::Mutex;
use sr::Repository;

use super::fault::Fault;
use super::{Repositories, host, nodes};

/// Longest list of attached repositories that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// An attached repository.
pub(super) struct Attached {
    // First: it is over the devices.
    pub(super) repository: Mutex<Repository<Member>>,
    pub(super) devices: GroupDevices,
    /// What it was attached by.
    pub(super) device: String,
}

impl Attached {
    fn open(device: &str) -> Result<Attached, Fault> {
        let nodes = nodes(device)?;
        let devices = GroupDevices::open(&nodes)?;
        let repository = Repository::open(devices.members()?, &host()?)?;
        let vg = repository.group().vg();
        if let Some(why) = vg.lvs.iter().find_map(|lv| node::active_volume(&nodes, vg, lv)) {
            return Err(Fault::other(why));
        }
        let (repository, device) = (Mutex::new(repository), device.to_owned());
        Ok(Attached { repository, devices, device })
    }

    /// Ends it; nobody else may still have it.
    pub(super) fn close(attached: Arc<Attached>) -> Result<(), Fault> {
        match Arc::try_unwrap(attached) {
            Ok(Attached { repository, devices, .. }) => {
                drop(repository);
                Ok(devices.close()?)
            }
            Err(_) => Err(Fault::other("somebody is using it".to_owned())),
        }
    }
}

impl Repositories {
    /// Attaches the repository on these devices, if it is not.
    pub(super) fn attach_by(&self, device: &str) -> Result<String, Fault> {
        // Under the lock: who comes at the same time waits, and finds it attached.
        let mut all = self.all.lock();
        if let Some((sr, _)) = all.iter().find(|(_, attached)| attached.device == device) {
            return Ok(sr.clone());
        }
        let attached = Attached::open(device)?;
        let sr = attached.repository.lock().stat().id;
        if all.contains_key(&sr) {
            return Err(Fault::other(format!(
                "repository {sr} is attached by other devices already"
            )));
        }
        all.insert(sr.clone(), Arc::new(attached));
        self.remember(&all)?;
        Ok(sr)
    }

    /// An attached one, also if a daemon before this one had it.
    pub(super) fn attached(&self, sr: &str) -> Result<Arc<Attached>, Fault> {
        if let Some(found) = self.all.lock().get(sr) {
            return Ok(found.clone());
        }
        let device = self.remembered()?.remove(sr);
        let device = device.ok_or_else(|| Fault::of("Sr_not_attached", sr))?;
        self.attach_by(&device)?;
        let found = self.all.lock().get(sr).cloned();
        found.ok_or_else(|| Fault::other(format!("{device} has another repository by now")))
    }

    /// Takes one out of the list. Under the lock of those that are attached.
    pub(super) fn forget(&self, sr: &str) -> Result<(), Fault> {
        let mut list = self.remembered()?;
        match list.remove(sr) {
            Some(_) => self.write(&list),
            None => Ok(()),
        }
    }

    fn remember(&self, all: &BTreeMap<String, Arc<Attached>>) -> Result<(), Fault> {
        let mut list = self.remembered()?;
        list.extend(all.iter().map(|(sr, attached)| (sr.clone(), attached.device.clone())));
        self.write(&list)
    }

    fn list(&self) -> PathBuf {
        self.run.join("repositories.json")
    }

    fn remembered(&self) -> Result<BTreeMap<String, String>, Fault> {
        use std::io::Read as _;
        let failed = |e: &dyn std::fmt::Display| {
            Fault::other(format!("{}: {e}: remove it, and attach again", self.list().display()))
        };
        let mut text = Vec::new();
        match std::fs::File::open(self.list()) {
            Ok(file) => file.take(LONGEST).read_to_end(&mut text).map_err(|e| failed(&e))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(e) => return Err(failed(&e)),
        };
        serde_json::from_slice(&text).map_err(|e| failed(&e))
    }

    /// All or nothing of it: the daemon may die in between.
    fn write(&self, list: &BTreeMap<String, String>) -> Result<(), Fault> {
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&self.run)?;
            file.write_all(&serde_json::to_vec(list)?)?;
            file.persist(self.list())?;
            Ok(())
        };
        write().map_err(|e| Fault::other(format!("{}: {e}", self.list().display())))
    }
}
