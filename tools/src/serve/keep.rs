//! [`Keep`]: what outlives a daemon that dies: the records of guests' rings, and journals of images.
//! Files in a folder of memory (on /run), which the next daemon reads.

use std::fs::{DirBuilder, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use dma::Region;
use node::NodeSpec;
use qcow::run::{Changes, Journal};

use super::device::Id;

/// Bytes of an image's journal: 8,190 changes, half of them at a time.
const JOURNAL: u64 = 256 << 10;

/// Longest name of an image that a file is named after, in bytes.
const LONGEST: usize = 100;

/// See the module's text.
pub(crate) struct Keep {
    dir: PathBuf,
}

impl Keep {
    /// In this folder, which is made if it is not there.
    pub(crate) fn new(dir: PathBuf) -> anyhow::Result<Keep> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.with_context(|| dir.display().to_string())?;
        Ok(Keep { dir })
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
            if file.metadata()?.len() < bytes {
                file.set_len(bytes)?;
            }
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

    /// What a daemon that died has left of an image in this file: changes that are not on disk. `None`:
    /// it lost some, or nothing is known of it.
    pub(crate) fn changes(&self, image: &str, owner: u64) -> anyhow::Result<Option<Changes>> {
        let name = journal(image);
        if !self.dir.join(&name).exists() {
            return Ok(None);
        }
        let changes = Journal::read(&*self.map(&name, JOURNAL)?);
        Ok(changes.filter(|c| [0, owner].contains(&c.owner)))
    }

    /// An image file is going to be changed: what daemons that died have left of it by other names is
    /// outdated.
    pub(crate) fn forget_others(&self, image: &str, owner: u64) -> anyhow::Result<()> {
        let mine = journal(image);
        for entry in std::fs::read_dir(&self.dir)? {
            let Ok(name) = entry?.file_name().into_string() else { continue };
            if name.starts_with("image-")
                && name != mine
                && Journal::owner(&*self.map(&name, JOURNAL)?) == Some(owner)
            {
                log::warn!("{name}: its image is opened by another name now");
                self.remove(&name);
            }
        }
        Ok(())
    }

    /// The journal of an image that is going to be served.
    pub(crate) fn journal(&self, image: &str) -> anyhow::Result<Arc<Region>> {
        self.map(&journal(image), JOURNAL)
    }

    /// An image was closed in order.
    pub(crate) fn forget_journal(&self, image: &str) {
        self.remove(&journal(image));
    }
}

/// Tells an image's file from others, also from one that takes its name later. Not 0.
pub(crate) fn owner(spec: &NodeSpec) -> anyhow::Result<u64> {
    let mut hash = DefaultHasher::new();
    match spec {
        NodeSpec::File(path) => {
            let m = std::fs::metadata(path).with_context(|| path.display().to_string())?;
            (m.dev(), m.ino(), m.rdev(), m.created().ok()).hash(&mut hash);
        }
        other => other.to_string().hash(&mut hash),
    }
    Ok(hash.finish() | 1)
}

fn record(id: Id, ring: usize) -> String {
    format!("ring-{}-{}-{ring}", id.domid, id.devid)
}

/// Letters and digits as they are, all else by its code: two names never give the same.
fn journal(image: &str) -> String {
    let mut name = "image-".to_owned();
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
    (1..=LONGEST).contains(&journal(image).len().saturating_sub(6))
}
