//! [`Chain`]: an image with its backing files.

use std::path::{Path, PathBuf};

use block::Storage;

use super::names::{BackingRef, FileId, Format};
use super::{ImageMeta, Mode};
use crate::edit::{SnapshotKey, find_snapshot};
use crate::{Error, Result};

/// Most layers of a chain, the top one included. QEMU has no limit; this one keeps a hostile
/// chain from taking all file descriptors.
pub const MAX_DEPTH: usize = 200;

/// Most bytes of L1 tables that a chain may have in memory: one image's largest, twice. A hostile
/// chain of sparse files could ask for 6 GiB.
const MAX_CHAIN_L1_BYTES: usize = 2 * crate::format::MAX_L1_BYTES as usize;

/// A layer's storage, opened by whoever knows what names mean.
pub struct Opened<S> {
    /// The bytes.
    pub storage: S,
    /// The path under which it was opened: names in it are relative to its directory. `None` if
    /// it is no file.
    pub path: Option<PathBuf>,
    /// What to call it in messages.
    pub name: String,
    /// Which file it is, to find cycles. `None` if that cannot be said; then only [`MAX_DEPTH`]
    /// stops a cycle.
    pub id: Option<FileId>,
}

/// How to open a chain.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainOptions {
    /// The top layer's format; QCOW2 if not said.
    pub format: Option<Format>,
    /// Whether the top layer may be written. All others are opened for reading.
    pub writable: bool,
    /// Format of backing files whose image states none.
    pub backing_format: Option<Format>,
    /// Whether backing files and data files stay closed: only the top layer's image is opened.
    pub top_only: bool,
}

/// What a layer is.
#[derive(Debug)]
pub enum LayerKind {
    /// A QCOW2 image.
    Qcow2(Box<ImageMeta>),
    /// Bytes as they are, this many.
    Raw(u64),
}

/// A layer's external data file, opened.
pub struct DataFile<S> {
    /// The bytes.
    pub storage: S,
    /// What to call it in messages.
    pub name: String,
}

/// One layer of a chain.
pub struct Layer<S> {
    /// The bytes.
    pub storage: S,
    /// What to call it in messages.
    pub name: String,
    /// The path under which it was opened.
    pub path: Option<PathBuf>,
    /// What it is.
    pub kind: LayerKind,
    /// Where its guest clusters stand, if that is another file and was opened.
    pub data: Option<DataFile<S>>,
    /// The backing file it names, with the path that leads to.
    pub backing: Option<BackingRef>,
}

impl<S> Layer<S> {
    /// Bytes that a guest sees.
    pub fn size(&self) -> u64 {
        match &self.kind {
            LayerKind::Qcow2(image) => image.geometry.size(),
            LayerKind::Raw(size) => *size,
        }
    }

    /// The QCOW2 image, if it is one.
    pub fn image(&self) -> Option<&ImageMeta> {
        match &self.kind {
            LayerKind::Qcow2(image) => Some(image),
            LayerKind::Raw(_) => None,
        }
    }

    /// Its files: the image's own, and its data file.
    pub fn storages(&self) -> impl Iterator<Item = &S> + Clone {
        [Some(&self.storage), self.data.as_ref().map(|d| &d.storage)].into_iter().flatten()
    }

    /// The same, taken apart.
    pub fn into_storages(self) -> impl Iterator<Item = S> {
        [Some(self.storage), self.data.map(|d| d.storage)].into_iter().flatten()
    }

    /// The bytes in which its guest clusters stand: the layer's own, or its data file's.
    pub(crate) fn data_storage(&mut self) -> &mut S {
        match &mut self.data {
            Some(data) => &mut data.storage,
            None => &mut self.storage,
        }
    }

    /// Its format.
    pub fn format(&self) -> Format {
        match self.kind {
            LayerKind::Qcow2(_) => Format::Qcow2,
            LayerKind::Raw(_) => Format::Raw,
        }
    }
}

/// An opened chain. Layer 0 is the image itself; each next one is the backing file of the one
/// before. Where a layer ends before the image does, zeroes follow.
pub struct Chain<S> {
    /// At least one.
    pub layers: Vec<Layer<S>>,
}

/// Whether a chain of so many layers, with so many bytes of L1 tables, can be opened.
///
/// # Errors
/// Why not.
pub(crate) fn can_be_chain(layers: usize, l1_bytes: usize) -> std::result::Result<(), String> {
    if layers > MAX_DEPTH {
        return Err(format!("backing chain has more than {MAX_DEPTH} layers"));
    }
    if l1_bytes > MAX_CHAIN_L1_BYTES {
        return Err(format!(
            "the L1 tables of the backing chain up to here have {l1_bytes} bytes; at most \
             {MAX_CHAIN_L1_BYTES} are possible"
        ));
    }
    Ok(())
}

impl<S: Storage> Chain<S> {
    /// Opens an image, its backing files and the external data files of all of them.
    /// `open_backing` opens the file that a name leads to (see [`super::allowed_host_file`]): for
    /// reading only, but for the data file of the top layer if that is writable.
    ///
    /// # Errors
    /// If a layer cannot be opened, a name is refused, the chain is a cycle or too deep.
    pub fn open(
        top: Opened<S>,
        options: ChainOptions,
        open_backing: &mut dyn FnMut(&BackingRef) -> Result<Opened<S>>,
    ) -> Result<Chain<S>> {
        let mut ids: Vec<FileId> = Vec::new();
        let mut layers: Vec<Layer<S>> = Vec::new();
        let mut l1_bytes = 0;
        let mut next = Some((top, options.format.unwrap_or(Format::Qcow2)));
        while let Some((opened, format)) = next.take() {
            if let Some(id) = opened.id {
                if ids.contains(&id) {
                    return Err(Error::refused(
                        &layers[layers.len() - 1].name,
                        format!("backing chain is a cycle: {} is in it already", opened.name),
                    ));
                }
                ids.push(id);
            }
            let path = opened.path.clone();
            let mode = if options.writable && layers.is_empty() { Mode::Write } else { Mode::Read };
            let mut layer = Self::open_layer(opened, format, mode, options, layers.len())?;
            if let LayerKind::Qcow2(image) = &layer.kind
                && image.header.has_data_file()
                && !options.top_only
            {
                let named = data_of(image, path.as_deref(), layers.len())?;
                let opened = open_backing(&named)?;
                if opened.id.is_some_and(|id| ids.contains(&id)) {
                    return Err(Error::refused(
                        &layer.name,
                        format!("its data file {} is a file of the chain already", opened.name),
                    ));
                }
                ids.extend(opened.id);
                layer.data = Some(fit_data(opened, image, mode)?);
            }
            l1_bytes += layer.image().map_or(0, |i| i.l1.len() * 8);
            let refuse = |why: String| Error::refused(&layer.name, why);
            can_be_chain(layers.len() + 1, l1_bytes).map_err(refuse)?;
            if let Some(backing) = layer.backing.as_ref().filter(|_| !options.top_only) {
                can_be_chain(layers.len() + 2, l1_bytes).map_err(refuse)?;
                next = Some((open_backing(backing)?, backing.format));
            }
            layers.push(layer);
        }
        Ok(Chain { layers })
    }

    fn open_layer(
        mut opened: Opened<S>,
        format: Format,
        mode: Mode,
        options: ChainOptions,
        index: usize,
    ) -> Result<Layer<S>> {
        let (kind, backing) = match format {
            Format::Raw => {
                if mode == Mode::Write && opened.storage.read_only() {
                    return Err(Error::refused(
                        &opened.name,
                        "cannot be opened for writing: the file or device is read-only",
                    ));
                }
                (LayerKind::Raw(opened.storage.len()), None)
            }
            Format::Qcow2 => {
                let mut image = ImageMeta::open(&mut opened.storage, &opened.name, mode)?;
                if index > 0 {
                    // Nothing is allocated in a backing file.
                    image.refcount_table = Vec::new();
                }
                let backing =
                    backing_of(&image, opened.path.as_deref(), options.backing_format, index + 1);
                let backing = if options.top_only { backing.ok().flatten() } else { backing? };
                (LayerKind::Qcow2(Box::new(image)), backing)
            }
        };
        let Opened { storage, path, name, .. } = opened;
        Ok(Layer { storage, name, path, kind, data: None, backing })
    }

    /// Bytes that a guest sees.
    pub fn size(&self) -> u64 {
        self.layers[0].size()
    }

    /// Shows the disk as it was when an internal snapshot of the top layer was taken, instead of
    /// what it holds now. For chains that were opened for reading.
    ///
    /// # Errors
    /// If there is no such snapshot, or its entry or its L1 table is impossible.
    pub fn show_snapshot(&mut self, key: SnapshotKey<'_>) -> Result<()> {
        let Layer { storage, name, kind, .. } = &mut self.layers[0];
        let LayerKind::Qcow2(image) = kind else {
            return Err(Error::refused(name, "is raw, and so has no snapshots"));
        };
        let (_, snapshot) = find_snapshot(storage, name, &image.header, key)?;
        image.show_snapshot(storage, &snapshot)
    }
}

/// The external data file that an image names.
fn data_of(image: &ImageMeta, path: Option<&Path>, depth: usize) -> Result<BackingRef> {
    let Some(name) = image.header.data_file_name() else {
        return Err(Error::refused(&image.name, "has an external data file, but does not name it"));
    };
    BackingRef::data_file(&image.name, name, path, depth)
}

/// Looks whether a data file can hold the image's disk. A file that is shorter reads as zeroes
/// behind its end, and grows.
fn fit_data<S: Storage>(opened: Opened<S>, image: &ImageMeta, mode: Mode) -> Result<DataFile<S>> {
    let Opened { storage, name, .. } = opened;
    let refuse = |reason: String| Err(Error::refused(&image.name, reason));
    if mode == Mode::Write && storage.read_only() {
        return refuse(format!("cannot be opened for writing: its data file {name} is read-only"));
    }
    let (room, size) = (storage.capacity(), image.geometry.size());
    if room < size {
        return refuse(format!("its data file {name} has {room} bytes, but the disk has {size}"));
    }
    Ok(DataFile { storage, name })
}

/// The backing file that an image names.
fn backing_of(
    image: &ImageMeta,
    path: Option<&Path>,
    default_format: Option<Format>,
    depth: usize,
) -> Result<Option<BackingRef>> {
    let Some(name) = &image.header.backing_name else { return Ok(None) };
    let stated = image.header.backing_format();
    BackingRef::new(&image.name, name, path, stated.as_deref(), default_format, depth).map(Some)
}
