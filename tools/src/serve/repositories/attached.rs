//! [`Attached`]: a repository that the toolstack has attached, and which of them there are: that outlives
//! the daemon, as the toolstack does not attach them again for the next one.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use node::{GroupDevices, Member};
use reactor::sync::Mutex;
use sr::Repository;

use super::coalesce::Merging;
use super::fault::Fault;
use super::{Repositories, author, host, nodes};

/// How often, and how long after each other, somebody is waited for who uses one.
const LOOKS: u32 = 1000;
const LOOK: std::time::Duration = std::time::Duration::from_millis(10);

/// Longest list of attached repositories that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// An attached repository.
pub(super) struct Attached {
    // First: it is over the devices.
    pub(super) repository: Mutex<Repository<Member>>,
    pub(super) devices: GroupDevices,
    /// What it was attached by.
    pub(super) device: String,
    /// What is being merged; set under the repository's lock.
    pub(super) merging: Mutex<Option<Merging>>,
}

impl Attached {
    fn open(device: &str) -> Result<Attached, Fault> {
        let nodes = nodes(device)?;
        let devices = GroupDevices::open(&nodes)?;
        let mut repository = Repository::open(devices.members()?, &host()?)?;
        let vg = repository.group().vg();
        if let Some(why) = vg.lvs.iter().find_map(|lv| node::active_volume(&nodes, vg, lv)) {
            return Err(Fault::other(why));
        }
        for (lv, error) in repository.finish(&author()) {
            log::error!("{lv} cannot be put on what it belongs on, and is not to be used: {error}");
        }
        let (repository, device) = (Mutex::new(repository), device.to_owned());
        Ok(Attached { repository, devices, device, merging: Mutex::default() })
    }

    /// Has a merge of some of these volumes end. Returns whether there is one, which ends soon.
    pub(super) fn interrupt(&self, volumes: &[String]) -> bool {
        let merging = self.merging.lock();
        let merging = merging.as_ref().filter(|merging| merging.touches(volumes));
        merging.inspect(|merging| merging.stop()).is_some()
    }

    /// Ends it.
    pub(super) fn close(self) -> Result<(), Fault> {
        drop(self.repository);
        Ok(self.devices.close()?)
    }
}

impl Repositories {
    /// Those that are attached.
    pub(super) fn names(&self) -> Vec<String> {
        self.all.lock().keys().cloned().collect()
    }

    /// One that is attached now.
    pub(super) fn at_hand(&self, sr: &str) -> Option<Arc<Attached>> {
        self.all.lock().get(sr).cloned()
    }

    /// Takes one out that nobody uses: merges are stopped for that, and calls waited for. Meanwhile it is as if it
    /// were not attached, and others are not held up.
    ///
    /// # Errors
    /// If somebody does.
    pub(super) fn take_out(&self, sr: &str) -> Result<Option<Attached>, Fault> {
        let Some(mut attached) = self.all.lock().remove(sr) else { return Ok(None) };
        for _ in 0..LOOKS {
            match Arc::try_unwrap(attached) {
                Ok(attached) => return Ok(Some(attached)),
                Err(again) => attached = again,
            }
            if let Some(merging) = &*attached.merging.lock() {
                merging.stop();
            }
            std::thread::sleep(LOOK);
        }
        self.put_back(sr, attached);
        Err(Fault::other(format!("repository {sr} is being used in this moment")))
    }

    /// After [`Repositories::take_out`]. Nobody else can have attached it: its devices are in use.
    pub(super) fn put_back(&self, sr: &str, attached: Arc<Attached>) {
        self.all.lock().insert(sr.to_owned(), attached);
    }

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
        if let Some(found) = self.at_hand(sr) {
            return Ok(found);
        }
        let device = self.remembered()?.remove(sr);
        let device = device.ok_or_else(|| Fault::of("Sr_not_attached", sr))?;
        self.attach_by(&device)?;
        let found = self.all.lock().get(sr).cloned();
        found.ok_or_else(|| Fault::other(format!("{device} has another repository by now")))
    }

    /// Takes one out of the list, which is not attached any more.
    pub(super) fn forget(&self, sr: &str) -> Result<(), Fault> {
        self.change(&self.all.lock(), |list| drop(list.remove(sr)))
    }

    fn remember(&self, all: &BTreeMap<String, Arc<Attached>>) -> Result<(), Fault> {
        self.change(all, |_| {})
    }

    /// Changes the list, in which at least those are that are attached. One that is damaged is made anew: it
    /// must not keep anybody from detaching.
    fn change(
        &self,
        all: &BTreeMap<String, Arc<Attached>>,
        edit: impl FnOnce(&mut BTreeMap<String, String>),
    ) -> Result<(), Fault> {
        let before = self.remembered();
        let mut list = match &before {
            Ok(list) => list.clone(),
            Err(fault) => {
                log::warn!("{fault}: made anew; what is not attached now is not in it any more");
                BTreeMap::new()
            }
        };
        list.extend(all.iter().map(|(sr, attached)| (sr.clone(), attached.device.clone())));
        edit(&mut list);
        match before {
            Ok(before) if before == list => Ok(()),
            _ => self.write(&list),
        }
    }

    fn list(&self) -> PathBuf {
        self.run.join("repositories.json")
    }

    fn remembered(&self) -> Result<BTreeMap<String, String>, Fault> {
        use std::io::Read as _;
        let failed = |e: &dyn std::fmt::Display| {
            let list = self.list();
            Fault::other(format!("{}: {e}: attach the repository again", list.display()))
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
