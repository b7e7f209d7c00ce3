//! Opening: a node as bytes ([`open_source`]), and an image with its backing files
//! ([`open_chain`]), under the locks that QEMU takes too.

use std::path::PathBuf;
use std::sync::Arc;

use block::{Claims, MemQueue, RmwQueue, StripeQueue};
use file::{ImageLock, LockError};
use qcow::open::{BackingRef, ChainOptions, FileId, Format, Opened, Role, allowed_host_file};
use reactor::Clock;

use crate::device::Device;
use crate::source::{Kind, Source, blocking};
use crate::{
    Error, HostStorage, Leaf, MOST_REACTORS, Model, ModelSpec, NodeSpec, groups, remote, vfio,
};

/// An image with its backing files, opened.
pub type Chain = qcow::open::Chain<Source>;

/// How long an image in use is waited for: a second.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The image's format; never guessed.
    pub format: Format,
    /// Open it for writing.
    pub writable: bool,
    /// Format of backing files whose image states none.
    pub backing_format: Option<Format>,
    /// Directories in which backing files must lie; anywhere if empty.
    pub allow_backing: Vec<PathBuf>,
    /// Leave backing files closed.
    pub top_only: bool,
    /// Open the chain to change its files offline: the bytes of the top and of this layer (0: of
    /// the top only) can be written, and are locked for that; the images in them are opened for
    /// reading all the same.
    pub edit: Option<usize>,
    /// Take no lock and respect none (`-U`); only for reading.
    pub force_share: bool,
    /// The time that drivers of devices go by.
    pub clock: Clock,
}

impl OpenOptions {
    /// For reading an image of this format.
    pub fn read(format: Format) -> OpenOptions {
        OpenOptions {
            format,
            writable: false,
            backing_format: None,
            allow_backing: Vec::new(),
            top_only: false,
            edit: None,
            force_share: false,
            clock: Clock::real(),
        }
    }

    /// For reading and writing an image of this format.
    pub fn write(format: Format) -> OpenOptions {
        OpenOptions { writable: true, ..OpenOptions::read(format) }
    }
}

/// Opens a node as bytes, locked.
///
/// # Errors
/// If it does not exist, is in use, or a device does not come up.
pub fn open_source(spec: &NodeSpec, options: &OpenOptions) -> Result<Source, Error> {
    let node = spec.to_string();
    let fail = |e: &dyn std::fmt::Display| Error::node(&node, e);
    match spec {
        NodeSpec::Mem(size) => {
            let leaf = Leaf::memory(MemQueue::new(*size, 512).map_err(|e| fail(&e))?);
            let storage = blocking(leaf, 0, &node)?;
            Ok(Source { kind: Kind::Leaf(storage, Vec::new()), locks: Vec::new(), id: None })
        }
        NodeSpec::File(path) => {
            let mut host = HostStorage::open(path, options.writable).map_err(|e| fail(&e))?;
            let locks = lock(&node, &mut host, options)?.into_iter().collect();
            let id = Some(file_id(&host).map_err(|e| fail(&e))?);
            Ok(Source { kind: Kind::Host(host), locks, id })
        }
        NodeSpec::Model(model) => open_model(model, &node, options),
        NodeSpec::Vfio(spec) => {
            let (leaf, unit, device) = vfio::open(*spec, options.writable, options.clock.clone())?;
            let storage = blocking(leaf, unit, &node)?;
            Ok(Source { kind: Kind::Leaf(storage, vec![device]), locks: Vec::new(), id: None })
        }
        NodeSpec::Remote(spec) => {
            let (leaf, unit, device) = remote::open(spec, options.writable, options.clock.clone())?;
            let storage = blocking(leaf, unit, &node)?;
            Ok(Source { kind: Kind::Leaf(storage, vec![device]), locks: Vec::new(), id: None })
        }
        NodeSpec::Stripe(size, nodes) => open_stripe(*size, nodes, &node, options),
        NodeSpec::Volume(spec) => groups::open(spec, options),
    }
}

/// Opens the members one by one; what was opened is closed again if one fails.
fn open_stripe(
    size: u64,
    nodes: &[NodeSpec],
    node: &str,
    options: &OpenOptions,
) -> Result<Source, Error> {
    // Dropped from the last to the first: a controller's queues before the controller.
    let mut locks = Vec::new();
    let mut devices = Vec::new();
    let mut leaves = Vec::new();
    for spec in nodes {
        // Members are whole devices: their length does not depend on what is in them.
        let source = open_source(spec, &OpenOptions { format: Format::Raw, ..options.clone() })?;
        locks.extend(source.locks);
        leaves.push(match source.kind {
            Kind::Leaf(storage, below) => {
                devices.extend(below);
                let unit = storage.unit();
                (storage.into_leaf(), unit)
            }
            Kind::Host(host) => {
                let leaf = file_leaf(vec![host.into_file()]);
                (leaf.map_err(|e| Error::node(spec.to_string(), e))?, 0)
            }
            Kind::Volume(view, lease) => {
                drop(view);
                let lease = lease.ok_or_else(|| Error::node(spec.to_string(), "is in use"))?;
                let leaf = lease.another_queue()?;
                devices.push(Device::Volume(lease));
                (leaf, 0)
            }
        });
    }
    let queue = StripeQueue::new(leaves, size).map_err(|e| Error::node(node, e))?;
    let storage = blocking(Leaf::Stripe(Box::new(queue)), 0, node)?;
    Ok(Source { kind: Kind::Leaf(storage, devices), locks, id: None })
}

fn open_model(spec: &ModelSpec, node: &str, options: &OpenOptions) -> Result<Source, Error> {
    let ModelFile { host, locks, id, capacity } = open_model_file(spec, node, options)?;
    let read_only = !options.writable;
    let (model, leaf) =
        Model::start(spec, host.into_file(), capacity, read_only, options.clock.clone())?;
    let devices = vec![Device::Model(model)];
    Ok(Source { kind: Kind::Leaf(blocking(leaf, 0, node)?, devices), locks, id: Some(id) })
}

/// The file of a model, opened.
pub(crate) struct ModelFile {
    pub(crate) host: HostStorage,
    pub(crate) locks: Vec<ImageLock>,
    pub(crate) id: FileId,
    /// Bytes that the namespace shall have.
    pub(crate) capacity: u64,
}

/// Opens the file of a model, locked.
pub(crate) fn open_model_file(
    spec: &ModelSpec,
    node: &str,
    options: &OpenOptions,
) -> Result<ModelFile, Error> {
    let fail = |e: &dyn std::fmt::Display| Error::node(node, e);
    let mut host = HostStorage::open(&spec.path, options.writable).map_err(|e| fail(&e))?;
    let locks = lock(node, &mut host, options)?.into_iter().collect();
    let id = file_id(&host).map_err(|e| fail(&e))?;
    let capacity = match spec.size {
        Some(size) => size,
        None => model_capacity(&mut host, node, options.format).map_err(Error::Image)?,
    };
    let capacity = capacity.next_multiple_of(4096);
    Ok(ModelFile { host, locks, id, capacity })
}

/// Which file it is: of the opened one, since the path may lead elsewhere by now.
pub(crate) fn file_id(host: &HostStorage) -> std::io::Result<FileId> {
    host.file().metadata().map(|m| FileId::of(&m))
}

/// Bytes that a model's namespace needs for an image to grow to its full size in it.
fn model_capacity(host: &mut HostStorage, node: &str, format: Format) -> qcow::Result<u64> {
    use block::Storage;
    let len = host.len().max(4096);
    if format == Format::Raw {
        return Ok(len);
    }
    let image = qcow::ImageMeta::open(host, node, qcow::Mode::Check)?;
    let g = &image.geometry;
    let data = g.guest_clusters().saturating_mul(g.cluster_size());
    // L2 tables: 8 bytes a cluster; refcounts: at most 8 bytes a cluster of all this; the rest is
    // header, L1, slack for what a crash leaked and for a refcount table that moves.
    let tables = g.guest_clusters().saturating_mul(24).saturating_add(data / 64);
    Ok(len.saturating_add(data).saturating_add(tables).saturating_add(64 << 20).min(1 << 62))
}

/// Locks an opened file. Its length is as it was found under the lock: whoever had it before may
/// have made it longer until then.
pub(crate) fn lock(
    node: &str,
    host: &mut HostStorage,
    options: &OpenOptions,
) -> Result<Option<ImageLock>, Error> {
    if options.force_share && !options.writable {
        return Ok(None);
    }
    let taken = wait_for_lock(node, host.file(), options)?;
    host.measure().map_err(|e| Error::node(node, e))?;
    Ok(taken)
}

fn wait_for_lock(
    node: &str,
    file: &std::fs::File,
    options: &OpenOptions,
) -> Result<Option<ImageLock>, Error> {
    let take =
        || if options.writable { ImageLock::exclusive(file) } else { ImageLock::shared(file) };
    let mut taken = take();
    // The writes of a process that was killed end in the kernel, and its lock stands until then: a
    // restart right after a crash waits for that.
    for _ in 0..LOCK_TRIES {
        if !matches!(taken, Err(LockError::InUse(_))) {
            break;
        }
        std::thread::sleep(LOCK_PAUSE);
        taken = take();
    }
    match taken {
        Ok(lock) => Ok(Some(lock)),
        Err(e @ LockError::InUse(_)) => Err(Error::in_use(node, e)),
        Err(LockError::Os(e)) => {
            log::warn!("{node}: the file system does no locking ({e}); nothing keeps others out");
            Ok(None)
        }
    }
}

/// Opens an image and its backing files.
///
/// # Errors
/// If a layer cannot be opened, is in use, is refused, or is no image.
pub fn open_chain(spec: &NodeSpec, options: &OpenOptions) -> Result<Chain, Error> {
    let editing = options.edit.is_some();
    let writable = options.writable || editing;
    let source = open_source(spec, &OpenOptions { writable, ..options.clone() })?;
    let id = source.id;
    let top = Opened {
        storage: source,
        path: spec.path().map(std::path::Path::to_path_buf),
        name: spec.to_string(),
        id,
    };
    let chain_options = ChainOptions {
        format: Some(options.format),
        writable: options.writable && !editing,
        backing_format: options.backing_format,
        top_only: options.top_only,
    };
    Chain::open(top, chain_options, &mut |backing| open_backing(backing, options))
        .map_err(Error::Image)
}

/// Opens a backing file that an image names, if it may be opened, under a lock.
pub(crate) fn open_backing(
    backing: &BackingRef,
    options: &OpenOptions,
) -> qcow::Result<Opened<Source>> {
    let found = allowed_host_file(backing, &options.allow_backing)?;
    let name = found.path.display().to_string();
    let what = backing.role.name();
    let refuse =
        |why: String| qcow::Error::refused(&backing.named_by, format!("{what} {name}: {why}"));
    // A data file is written along with its image.
    let with_top = backing.role == Role::Data && backing.depth == 0;
    let writable = options.edit == Some(backing.depth)
        || with_top && (options.writable || options.edit.is_some());
    let mut host = HostStorage::open(&found.path, writable).map_err(|e| refuse(e.to_string()))?;
    let id = file_id(&host).map_err(|e| refuse(e.to_string()))?;
    if id != found.id {
        return Err(refuse("was replaced while it was being opened".to_owned()));
    }
    let access = OpenOptions { writable, ..options.clone() };
    let lock = lock(&name, &mut host, &access).map_err(|e| refuse(e.to_string()))?;
    let locks = lock.into_iter().collect();
    let storage = Source { kind: Kind::Host(host), locks, id: Some(id) };
    Ok(Opened { storage, path: Some(found.path), name, id: Some(id) })
}

/// Puts files on one leaf queue.
pub(crate) fn file_leaf(files: Vec<std::fs::File>) -> Result<Leaf, String> {
    let engine = file::Engine::for_files(&files);
    let mut queue = file::FileQueue::new(engine).map_err(|e| e.to_string())?;
    for f in files {
        queue.add(f).map_err(|e| e.to_string())?;
    }
    // One for control code, if reactors share the file.
    let claims: Arc<Claims> = Claims::new(MOST_REACTORS + 1);
    Ok(Leaf::File(Box::new(RmwQueue::new(queue, &claims)?)))
}
