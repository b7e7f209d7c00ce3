//! [`Chain`]: a VHD file with its parents.

use std::path::PathBuf;
use std::sync::Arc;

use block::Storage;

use crate::format::DiskType;
use crate::image::Image;
use crate::{Error, Result};

/// Most layers of a chain, the top one included. XenServer makes 30.
pub const MAX_DEPTH: usize = 200;
/// Most bytes of block allocation tables that a chain may have in memory.
const MAX_TABLE_BYTES: usize = 256 << 20;

/// A layer's storage, opened by whoever knows what names mean.
pub struct Opened<S> {
    /// The bytes.
    pub storage: S,
    /// The path under which it was opened: names in it are relative to its folder.
    pub path: Option<PathBuf>,
    /// What to call it in messages.
    pub name: String,
    /// Which file it is, to find cycles: two numbers that no other file has. `None` if that cannot
    /// be said; then only [`MAX_DEPTH`] stops a cycle.
    pub id: Option<(u64, u64)>,
}

/// A parent as its child names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentRef {
    /// The child, for messages.
    pub named_by: String,
    /// The path of the child.
    pub child: Option<PathBuf>,
    /// The names, the best one first; at least one.
    pub names: Vec<String>,
    /// The parent is a raw disk.
    pub raw: bool,
    /// Its place in the chain: 1 for the top image's parent.
    pub depth: usize,
}

/// How to open a chain.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainOptions {
    /// Parents stay closed: only the top layer is opened.
    pub top_only: bool,
}

/// What a layer is.
#[derive(Debug)]
pub enum Kind {
    /// A VHD image.
    Vhd(Arc<Image>),
    /// The raw disk at the end of a chain, this many bytes.
    Raw(u64),
}

/// One layer.
pub struct Layer<S> {
    /// The bytes.
    pub storage: S,
    /// The path under which it was opened.
    pub path: Option<PathBuf>,
    /// What to call it in messages.
    pub name: String,
    /// What it is.
    pub kind: Kind,
}

impl<S> Layer<S> {
    /// The VHD image, if it is one.
    pub fn image(&self) -> Option<&Image> {
        match &self.kind {
            Kind::Vhd(image) => Some(image),
            Kind::Raw(_) => None,
        }
    }
}

/// An opened chain. Layer 0 is the image itself; each next one is the parent of the one before.
pub struct Chain<S> {
    /// At least one.
    pub layers: Vec<Layer<S>>,
}

impl<S: Storage> Chain<S> {
    /// Opens an image and its parents. `open_parent` opens what a name leads to, for reading.
    ///
    /// # Errors
    /// If a layer cannot be opened, a name is refused, a parent is not the one that the child was
    /// made for, the chain is a cycle or too deep.
    pub fn open(
        top: Opened<S>,
        options: ChainOptions,
        open_parent: &mut dyn FnMut(&ParentRef) -> Result<Opened<S>>,
    ) -> Result<Chain<S>> {
        let mut layers: Vec<Layer<S>> = Vec::new();
        let mut ids = Vec::new();
        let mut table_bytes = 0;
        let mut next = Some((top, false, None));
        while let Some((opened, raw, expected)) = next.take() {
            let Opened { mut storage, path, name, id } = opened;
            if id.is_some_and(|id| ids.contains(&id)) {
                let child = &layers[layers.len() - 1].name;
                let why = format!("chain of parents is a cycle: {name} is in it already");
                return Err(Error::refused(child, why));
            }
            ids.extend(id);
            if raw {
                let kind = Kind::Raw(storage.len());
                layers.push(Layer { storage, path, name, kind });
                break;
            }
            let image = match layers.is_empty() {
                true => Image::read(&mut storage, &name)?,
                false => Image::read_parent(&mut storage, &name)?,
            };
            if expected.is_some_and(|uuid| uuid != image.footer.uuid) {
                let child = &layers[layers.len() - 1].name;
                let why = format!(
                    "its parent is the disk {}, but {name} is the disk {}",
                    uuid_text(&expected.unwrap_or_default()),
                    uuid_text(&image.footer.uuid)
                );
                return Err(Error::refused(child, why));
            }
            image.verify()?;
            if image.size() != image.footer.whole_size() {
                log::warn!(
                    "{name}: shown are the {} bytes that its geometry has, as its creator {:?} does \
                     it; by its current size, which tapdisk and Hyper-V go by, it has {}",
                    image.size(),
                    image.footer.creator.name(),
                    image.footer.whole_size()
                );
            }
            table_bytes += image.table.len() * 4;
            if table_bytes > MAX_TABLE_BYTES {
                let why = format!(
                    "the block allocation tables of the chain up to here have {table_bytes} bytes; \
                     at most {MAX_TABLE_BYTES} are possible"
                );
                return Err(Error::refused(&name, why));
            }
            if image.footer.disk_type == DiskType::Differencing && !options.top_only {
                let parent = parent_of(&image, path.clone(), layers.len() + 1)?;
                let uuid = image.header.as_ref().map_or([0; 16], |h| h.parent_uuid);
                let expected = (!parent.raw).then_some(uuid);
                next = Some((open_parent(&parent)?, parent.raw, expected));
            }
            layers.push(Layer { storage, path, name, kind: Kind::Vhd(Arc::new(image)) });
        }
        Ok(Chain { layers })
    }

    /// Bytes that a guest sees.
    pub fn size(&self) -> u64 {
        match &self.layers[0].kind {
            Kind::Vhd(image) => image.size(),
            Kind::Raw(size) => *size,
        }
    }
}

fn parent_of(image: &Image, child: Option<PathBuf>, depth: usize) -> Result<ParentRef> {
    if depth >= MAX_DEPTH {
        let why = format!("chain of parents has more than {MAX_DEPTH} layers");
        return Err(Error::refused(&image.name, why));
    }
    if image.parents.is_empty() {
        return Err(Error::refused(
            &image.name,
            "is a differencing disk, but has no name of a parent that means anything here",
        ));
    }
    let raw = image.header.as_ref().is_some_and(|h| h.parent_uuid == [0; 16]);
    let names = image.parents.clone();
    Ok(ParentRef { named_by: image.name.clone(), child, names, raw, depth })
}

/// An identity as it is usually written.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::new();
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}
