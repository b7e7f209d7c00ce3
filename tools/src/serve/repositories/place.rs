//! [`Place`]: where an image lies: on a node, or as a disk of a repository, which may be several images on
//! top of each other.

use std::fmt;
use std::hash::Hasher as _;
use std::os::unix::fs::MetadataExt as _;
use std::time::UNIX_EPOCH;

use anyhow::{Context, bail};
use fnv::FnvHasher;
use node::{Chain, Member, NodeSpec, OpenOptions, Source, open_chain, open_source};
use qcow::open::Format;
use sr::Repository;
use volume::Id;

use crate::args;

use super::{Repositories, TYPE, author};

/// Between two looks whether a merge has ended.
const LOOK: std::time::Duration = std::time::Duration::from_millis(5);

/// Longest key of a disk.
const KEY: usize = 64;

/// A disk of a repository: `fast:SR/KEY@NODES`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct DiskPlace {
    pub(super) sr: String,
    pub(super) key: String,
    /// What the repository is attached by.
    pub(super) device: String,
}

/// See the module's text.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Place {
    Node(NodeSpec),
    Disk(DiskPlace),
}

/// Whether a text may be an identifier, which files are named after.
pub(super) fn is_key(text: &str) -> bool {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    plain && !text.is_empty() && text.len() <= KEY
}

impl fmt::Display for DiskPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{TYPE}:{}/{}@{}", self.sr, self.key, self.device)
    }
}

impl DiskPlace {
    fn parse(text: &str) -> Option<DiskPlace> {
        let (disk, device) = text.split_once('@')?;
        let (sr, key) = disk.split_once('/')?;
        let [sr, key, device] = [sr, key, device].map(str::to_owned);
        (is_key(&sr) && is_key(&key)).then_some(DiskPlace { sr, key, device })
    }

    /// The image's name.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.sr, self.key)
    }

    /// The volumes of its images, the one that is written to first.
    fn volumes(&self, repository: &Repository<Member>) -> anyhow::Result<Vec<(String, Id)>> {
        if repository.is_pending(&self.key)? {
            bail!(
                "{self}: one disk was being put on another, which failed: detach and attach the repository"
            );
        }
        let vg = repository.group().vg();
        let chain = repository.chain(&self.key)?;
        if chain.iter().any(|node| node.record.is_some()) {
            bail!("{self}: its data was destroyed");
        }
        chain.iter().map(|node| Ok((node.lv.clone(), vg.lv(&node.lv)?.id))).collect()
    }

    fn open(&self, repositories: &Repositories, options: &OpenOptions) -> anyhow::Result<Chain> {
        let attached = repositories.of_place(self)?;
        // Until all of them are in use, so that the chain stays as it is.
        let mut repository = attached.repository.lock();
        if options.writable && repository.disk(&self.key)?.0.read_only {
            bail!(
                "{self}: is a snapshot, on which others may stand: it can be opened for reading only"
            );
        }
        let mut volumes = self.volumes(&repository)?;
        while attached.interrupt(&volumes.iter().map(|(lv, _)| lv.clone()).collect::<Vec<_>>()) {
            drop(repository);
            std::thread::sleep(LOOK);
            repository = attached.repository.lock();
            volumes = self.volumes(&repository)?;
        }
        let group = repository.group();
        let vg = &group.vg().name;
        let lvs: Vec<String> = volumes.into_iter().map(|(lv, _)| lv).collect();
        let top = lvs.first().context("the disk has no volume")?;
        let top = attached.devices.volume(group, top, options.writable)?;
        let chain = sr::open_chain(vg, &lvs, top, options.writable, &mut |lv| {
            let below = attached.devices.volume(group, lv, false);
            below.map_err(|e| qcow::Error::refused(lv, e.to_string()))
        })?;
        // A daemon may have died when the image had its new size already: guests see that.
        let size = chain.size();
        if options.writable && size > repository.disk(&self.key)?.1.size {
            repository.resized(&self.key, size, &author())?;
        }
        Ok(chain)
    }
}

impl Place {
    pub(crate) fn parse(text: &str) -> anyhow::Result<Place> {
        match text.strip_prefix(TYPE).and_then(|rest| rest.strip_prefix(':')) {
            Some(disk) => DiskPlace::parse(disk)
                .map(Place::Disk)
                .with_context(|| format!("{text:?} is no {TYPE}:REPOSITORY/DISK@NODES")),
            None => Ok(Place::Node(NodeSpec::parse(text)?)),
        }
    }

    /// Its format, of which somebody said this.
    pub(crate) fn format(&self, said: &str) -> anyhow::Result<Format> {
        match (self, args::format(said).map_err(anyhow::Error::msg)?) {
            (Place::Disk(disk), Format::Raw) => bail!("{disk}: is an image in qcow2, not raw"),
            (_, format) => Ok(format),
        }
    }

    /// The UUID of the repository that it is in, if it is in one.
    pub(crate) fn repository(&self) -> Option<&str> {
        match self {
            Place::Node(_) => None,
            Place::Disk(disk) => Some(&disk.sr),
        }
    }

    /// What tells each of its images from others that take its name later, the one that is written to
    /// first; none is 0.
    pub(crate) fn owners(&self, repositories: &Repositories) -> anyhow::Result<Vec<u64>> {
        match self {
            Place::Node(spec) => Ok(vec![owner(spec)?]),
            Place::Disk(disk) => {
                let attached = repositories.of_place(disk)?;
                let volumes = disk.volumes(&attached.repository.lock())?;
                Ok(volumes.iter().map(|(_, id)| volume_owner(id)).collect())
            }
        }
    }

    /// Requests and bytes a second that a repository says of its disk.
    pub(crate) fn limits(&self, repositories: &Repositories) -> anyhow::Result<Option<(u64, u64)>> {
        let Place::Disk(disk) = self else { return Ok(None) };
        let attached = repositories.of_place(disk)?;
        let repository = attached.repository.lock();
        let (disk, _) = repository.disk(&disk.key)?;
        Ok(Some((disk.iops, disk.bandwidth)))
    }

    /// Notes them.
    pub(crate) fn set_limits(
        &self,
        repositories: &Repositories,
        iops: u64,
        bandwidth: u64,
    ) -> anyhow::Result<()> {
        let Place::Disk(disk) = self else { return Ok(()) };
        let attached = repositories.of_place(disk)?;
        let mut repository = attached.repository.lock();
        Ok(repository.set_limits(&disk.key, iops, bandwidth, &author())?)
    }

    pub(crate) fn open(
        &self,
        repositories: &Repositories,
        options: &OpenOptions,
    ) -> anyhow::Result<Chain> {
        match self {
            Place::Node(spec) => Ok(open_chain(spec, options)?),
            Place::Disk(disk) => disk.open(repositories, options),
        }
    }

    /// One of its images as bytes that can be written to, while nobody uses it.
    pub(crate) fn open_image(
        &self,
        repositories: &Repositories,
        which: usize,
        options: &OpenOptions,
    ) -> anyhow::Result<Source> {
        match self {
            Place::Node(spec) => Ok(open_source(spec, options)?),
            Place::Disk(disk) => {
                let attached = repositories.of_place(disk)?;
                let repository = attached.repository.lock();
                let volumes = disk.volumes(&repository)?;
                let (lv, _) = volumes.get(which).context("the disk has fewer images")?;
                Ok(attached.devices.volume(repository.group(), lv, true)?)
            }
        }
    }
}

/// Tells a node from others, also from one that takes its name later. Not 0.
fn owner(spec: &NodeSpec) -> anyhow::Result<u64> {
    let what = match spec {
        NodeSpec::File(path) => {
            let m = std::fs::metadata(path).with_context(|| path.display().to_string())?;
            let born = m.created().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
            format!("{} {} {} {born:?}", m.dev(), m.ino(), m.rdev())
        }
        other => other.to_string(),
    };
    Ok(hash(what.as_bytes()))
}

/// The same of a volume.
pub(super) fn volume_owner(id: &Id) -> u64 {
    hash(id.raw())
}

/// Not a hash of `std`, which may be another in the next version of the daemon.
fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = FnvHasher::default();
    hasher.write(bytes);
    hasher.finish() | 1
}
