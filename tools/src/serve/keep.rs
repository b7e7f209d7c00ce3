//! [`Keep`]: what outlives a daemon that dies: the records of guests' rings, journals of images, and on
//! whose mirrors somebody relies.
//! Files in a folder of memory (on /run), which the next daemon reads.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use dma::Region;
use nix::fcntl::{FallocateFlags, fallocate};
use qcow::run::{Changes, Journal};
use reactor::sync::Mutex;

use super::device::Id;

/// How names of journals begin.
const IMAGE: &str = "image-";

/// Bytes of an image's journal: 8,190 changes, half of them at a time.
const JOURNAL: u64 = 256 << 10;

/// Longest name of an image that a file is named after, in bytes.
const LONGEST: usize = 100;

/// See the module's text.
pub(crate) struct Keep {
    dir: PathBuf,
    /// Whose the journals are, by the names of their files. Of one whose image lies in another file by
    /// now, whose it was.
    owners: Mutex<BTreeMap<String, u64>>,
}

impl Keep {
    /// In this folder, which is made if it is not there.
    pub(crate) fn new(dir: PathBuf) -> anyhow::Result<Keep> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.with_context(|| dir.display().to_string())?;
        let keep = Keep { dir, owners: Mutex::new(BTreeMap::new()) };
        for entry in std::fs::read_dir(&keep.dir)? {
            let Ok(name) = entry?.file_name().into_string() else { continue };
            if name.starts_with(IMAGE)
                && let Some(owner) = keep.owner(&name)?
            {
                keep.owners.lock().insert(name, owner);
            }
        }
        Ok(keep)
    }

    fn owner(&self, name: &str) -> anyhow::Result<Option<u64>> {
        Ok(Journal::owner(&*self.map(name, JOURNAL)?))
    }

    fn map(&self, name: &str, bytes: u64) -> anyhow::Result<Arc<Region>> {
        let path = self.dir.join(name);
        let open = || -> anyhow::Result<Arc<Region>> {
            let mut options = OpenOptions::new();
            let file: File = options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)?;
            // All of it: a page that the file system cannot give later would end the process.
            let all = i64::try_from(bytes).context("too many bytes")?;
            fallocate(&file, FallocateFlags::empty(), 0, all).context("no memory is left there")?;
            Ok(Region::of_file(file.into(), bytes)?)
        };
        open().with_context(|| path.display().to_string())
    }

    fn remove(&self, name: &str) {
        let path = self.dir.join(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                log::warn!("{}: {e}", path.display());
            }
            _ => {}
        }
    }

    /// Whoever migrates a disk was told that its mirror is complete.
    pub(crate) fn remember_mirror(&self, image: &str) -> anyhow::Result<()> {
        let path = self.dir.join(mirror(image));
        std::fs::write(&path, "").with_context(|| path.display().to_string())
    }

    /// That does not count any more.
    pub(crate) fn forget_mirror(&self, image: &str) {
        self.remove(&mirror(image));
    }

    /// Whether somebody relies on a mirror of an image, of this daemon or one before.
    pub(crate) fn has_mirror(&self, image: &str) -> bool {
        self.dir.join(mirror(image)).exists()
    }

    /// The record of a device's ring.
    pub(crate) fn record(&self, id: Id, ring: usize, bytes: u64) -> anyhow::Result<Arc<Region>> {
        self.map(&record(id, ring), bytes)
    }

    /// Whether there is a record of a device.
    pub(crate) fn has_record(&self, id: Id) -> bool {
        self.dir.join(record(id, 0)).exists()
    }

    /// A device's rings are over.
    pub(crate) fn forget_records(&self, id: Id) {
        (0..16).for_each(|ring| self.remove(&record(id, ring)));
    }

    /// What a daemon that died has left of an image: changes that are not on disk, and in which of the
    /// files that it lies in, the one that is written to first. `None`: it lost some, or nothing is known
    /// of it.
    pub(crate) fn changes(
        &self,
        image: &str,
        owners: &[u64],
    ) -> anyhow::Result<Option<(Changes, usize)>> {
        let name = journal(image);
        if !self.dir.join(&name).exists() {
            return Ok(None);
        }
        let Some(changes) = Journal::read(&*self.map(&name, JOURNAL)?) else { return Ok(None) };
        let which = match changes.owner {
            0 => Some(0),
            owner => owners.iter().position(|&of| of == owner),
        };
        Ok(which.map(|which| (changes, which)))
    }

    /// Whether there is a journal of an image.
    pub(crate) fn has_journal(&self, image: &str) -> bool {
        self.dir.join(journal(image)).exists()
    }

    /// Whether a daemon that died has left of an image what is not put in, or is not known.
    pub(crate) fn has_changes(&self, image: &str) -> bool {
        let read =
            || Some(Journal::read(&*self.map(&journal(image), JOURNAL).ok()?)?.list.is_empty());
        self.has_journal(image) && read() != Some(true)
    }

    /// What a journal holds is in its image by now.
    pub(crate) fn is_put_in(&self, image: &str, owner: u64) -> anyhow::Result<()> {
        Journal::new(self.map(&journal(image), JOURNAL)?, owner);
        Ok(())
    }

    /// An image file is going to be changed: what daemons that died have left of it by other names is
    /// outdated.
    pub(crate) fn forget_others(&self, image: &str, owner: u64) -> anyhow::Result<()> {
        let mine = journal(image);
        let mut owners = self.owners.lock();
        let others = owners.iter().filter(|&(name, &of)| of == owner && *name != mine);
        let others: Vec<String> = others.map(|(name, _)| name.clone()).collect();
        for name in others {
            if self.owner(&name)? == Some(owner) {
                log::warn!("{name}: its image is opened by another name now");
                self.remove(&name);
            }
            owners.remove(&name);
        }
        Ok(())
    }

    /// The journal of an image in this file that is going to be served.
    pub(crate) fn journal(&self, image: &str, owner: u64) -> anyhow::Result<Arc<Region>> {
        let name = journal(image);
        let memory = self.map(&name, JOURNAL)?;
        self.owners.lock().insert(name, owner);
        Ok(memory)
    }

    /// An image was closed in order.
    pub(crate) fn forget_journal(&self, image: &str) {
        let name = journal(image);
        self.remove(&name);
        self.owners.lock().remove(&name);
    }
}

fn record(id: Id, ring: usize) -> String {
    format!("ring-{}-{}-{ring}", id.domid, id.devid)
}

fn journal(image: &str) -> String {
    named(IMAGE, image)
}

fn mirror(image: &str) -> String {
    named("mirror-", image)
}

/// Letters and digits as they are, all else by its code: two names never give the same.
fn named(prefix: &str, image: &str) -> String {
    let mut name = prefix.to_owned();
    for byte in image.bytes() {
        match byte.is_ascii_alphanumeric() {
            true => name.push(byte.into()),
            false => name.push_str(&format!("%{byte:02x}")),
        }
    }
    name
}

/// Whether an image may have this name: a file is named after it.
pub(crate) fn is_name(image: &str) -> bool {
    (1..=LONGEST).contains(&journal(image).len().saturating_sub(IMAGE.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_goes_when_its_image_is_opened_by_another_name() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Keep::new(dir.path().to_owned()).unwrap();
        let make = |keep: &Keep, name: &str, owner| {
            Journal::new(keep.journal(name, owner).unwrap(), owner);
        };
        make(&keep, "a", 1);
        make(&keep, "b/2", 3);
        // Also for the next daemon, which did not make them.
        let keep = Keep::new(dir.path().to_owned()).unwrap();
        make(&keep, "c", 3);
        keep.forget_others("c", 3).unwrap();
        let is_there = |name: &str, owner| keep.changes(name, &[owner]).unwrap().is_some();
        assert!(is_there("a", 1) && is_there("c", 3) && !is_there("b/2", 3));
        // Another's is not read; one of an image further down is, and it is said of which.
        assert!(!is_there("a", 3));
        assert_eq!(keep.changes("a", &[3, 1]).unwrap().unwrap().1, 1);
        keep.forget_journal("a");
        assert!(!is_there("a", 1));
    }

    #[test]
    fn what_is_mapped_is_there_to_be_written() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let keep = Keep::new(dir.path().to_owned()).unwrap();
        let id = Id { domid: 3, devid: 51712 };
        keep.journal("a", 1).unwrap();
        keep.record(id, 0, 8192).unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let file = entry.unwrap().metadata().unwrap();
            assert!(file.len() > 0 && file.blocks() * 512 >= file.len(), "a page may be missing");
        }
        assert!(keep.has_record(id));
        keep.forget_records(id);
        assert!(!keep.has_record(id));
    }
}
