//! Images that are about to be made: their options, and the place for them, opened under a lock
//! before anything in it is touched. For `create` and `convert`.

use std::fs::OpenOptions as FileOptions;
use std::io::{ErrorKind, Read};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, bail};
use block::{Storage, StorageError};
use nix::fcntl::{FallocateFlags, fallocate};
use node::{ModelSpec, NodeSpec, OpenOptions, Source, open_source};
use qcow::create::CreateOptions;
use qcow::open::Format;
use vhd::build::{BuildOptions, Subformat};

use super::reader::{Reader, file_id};
use super::{Backing, reading, usage};
use crate::args::AnyFormat;

/// Seconds from 1970 to 2000, where time begins in VHD files.
const VHD_EPOCH: u64 = 946_684_800;

/// Options given with -o, in their order.
pub(super) type Pairs = Vec<(String, String)>;

/// Parses one -o: names and values, separated by commas.
pub(super) fn pairs(text: &str) -> Result<Pairs, String> {
    text.split(',')
        .map(|part| {
            let (name, value) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?} is no name=value, like cluster_size=64k"))?;
            Ok((name.to_owned(), value.to_owned()))
        })
        .collect()
}

/// What is to be made.
pub(super) struct Wanted {
    /// The format.
    pub(super) format: AnyFormat,
    /// Options of a QCOW2 image; its size counts for the other formats, too.
    pub(super) qcow: CreateOptions,
    /// How much of a raw image is allocated.
    pub(super) raw: RawAllocation,
    /// Options of a VHD image, but for its size.
    vhd: BuildOptions,
}

/// How much of a raw image's space is allocated when it is made.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum RawAllocation {
    /// Nothing.
    Off,
    /// All, without writing to it.
    Reserved,
    /// All is written with zeroes.
    Full,
}

/// A backing file as the command line names it.
#[derive(Clone, Default)]
pub(super) struct BackingFile {
    /// Its name as it shall stand in the image.
    pub(super) name: Option<String>,
    /// Its format.
    pub(super) format: Option<Format>,
}

impl Wanted {
    /// Takes options and backing file apart; what -o says about size and backing file counts as if
    /// it were said otherwise. The size stays 0 if it is not among the options.
    pub(super) fn new(
        format: AnyFormat,
        options: &[Pairs],
        backing: &BackingFile,
    ) -> anyhow::Result<Wanted> {
        let vhd = new_vhd()?;
        let mut wanted =
            Wanted { format, qcow: CreateOptions::new(0), raw: RawAllocation::Off, vhd };
        let mut backing = backing.clone();
        for (name, value) in options.iter().flatten() {
            match (name.as_str(), value.as_str(), format) {
                ("size", _, _) => {
                    wanted.qcow.size = super::size(value).or_else(|e| usage(format!("-o {e}")))?;
                }
                ("backing_file", _, AnyFormat::Qcow2) => backing.name = Some(value.clone()),
                ("backing_fmt", _, AnyFormat::Qcow2) => {
                    backing.format = Some(crate::args::format(value).or_else(usage)?);
                }
                (_, _, AnyFormat::Qcow2) => wanted.qcow.set(name, value).or_else(usage)?,
                ("subformat", "dynamic", AnyFormat::Vhd) => {
                    wanted.vhd.subformat = Subformat::Dynamic;
                }
                ("subformat", "fixed", AnyFormat::Vhd) => wanted.vhd.subformat = Subformat::Fixed,
                ("force_size", "on", AnyFormat::Vhd) => wanted.vhd.exact = true,
                ("force_size", "off", AnyFormat::Vhd) => wanted.vhd.exact = false,
                (_, _, AnyFormat::Vhd) => {
                    return usage(format!(
                        "option {name}={value}: with format vhd there are size, \
                         subformat=dynamic|fixed and force_size=on|off"
                    ));
                }
                ("preallocation", "off", _) => wanted.raw = RawAllocation::Off,
                ("preallocation", "falloc", _) => wanted.raw = RawAllocation::Reserved,
                ("preallocation", "full", _) => wanted.raw = RawAllocation::Full,
                ("preallocation", _, _) => {
                    return usage(format!(
                        "option {name}={value}: off, falloc and full are possible"
                    ));
                }
                _ => return usage(format!("option {name}={value}: not possible with format raw")),
            }
        }
        match (backing.name, backing.format) {
            (None, _) => {}
            (Some(_), _) if format == AnyFormat::Raw => {
                return usage("a raw image cannot have a backing file");
            }
            (Some(_), _) if format == AnyFormat::Vhd => {
                return usage("vhd images with a parent are read, but not made");
            }
            (Some(name), Some(format)) => wanted.qcow.backing = Some((name, format)),
            (Some(name), None) => {
                return usage(format!(
                    "backing file {name:?}: state its format with -F; formats are not guessed"
                ));
            }
        }
        Ok(wanted)
    }

    /// Checks the options against each other; to be called when the size is known. Length in bytes
    /// of the empty image.
    ///
    /// # Errors
    /// Says what is wrong.
    pub(super) fn check(&self, target: &NodeSpec) -> anyhow::Result<u64> {
        match self.format {
            AnyFormat::Raw => Ok(self.qcow.size),
            AnyFormat::Vhd if !matches!(target, NodeSpec::File(_)) => {
                bail!("{target}: vhd images are only made in files")
            }
            AnyFormat::Vhd => self.vhd().image_len().map_err(|e| anyhow!("{target}: {e}")),
            AnyFormat::Qcow2 => match self.qcow.image_len() {
                Ok(len) => Ok(len),
                Err(e) => bail!("{target}: {e}"),
            },
        }
    }

    /// Options of a VHD image; to be called when the size is known.
    pub(super) fn vhd(&self) -> BuildOptions {
        BuildOptions { size: self.qcow.size, ..self.vhd.clone() }
    }

    /// Bytes of the new disk.
    ///
    /// # Errors
    /// If the format does not have disks of that size.
    pub(super) fn disk_size(&self) -> anyhow::Result<u64> {
        match self.format {
            AnyFormat::Vhd => self.vhd().disk_size().map_err(anyhow::Error::msg),
            _ => Ok(self.qcow.size),
        }
    }

    /// Opens the backing file that the new image will name, for reading.
    ///
    /// # Errors
    /// If it cannot be opened, the name would be refused later, or it is the new image itself.
    pub(super) fn open_backing(
        &self,
        target: &NodeSpec,
        backing: &Backing,
    ) -> anyhow::Result<Option<Reader>> {
        let Some((name, format)) = &self.qcow.backing else { return Ok(None) };
        let path = folder(target).join(plain_path("backing file", name)?);
        let reader = Reader::open(&NodeSpec::File(path), &reading(*format, backing, false))
            .with_context(|| format!("backing file {name:?}"))?;
        if target.path().and_then(file_id).is_some_and(|id| reader.find_file(id).is_some()) {
            bail!("{target}: is in the backing chain that it should get");
        }
        Ok(Some(reader))
    }

    /// Opens the external data file that the new image will name; a file that does not exist is
    /// made. Nothing in an existing one is changed yet.
    ///
    /// # Errors
    /// If it is in use (also as the new image itself), the name would be refused later, or it cannot
    /// be opened for writing.
    pub(super) fn open_data(&self, target: &NodeSpec) -> anyhow::Result<Option<Place>> {
        let Some(name) = &self.qcow.data_file else { return Ok(None) };
        let path = folder(target).join(plain_path("data file", name)?);
        let place = Place::open(&NodeSpec::File(path), self);
        place.map(Some).with_context(|| format!("data file {name:?}"))
    }
}

/// What names in the image are relative to.
fn folder(target: &NodeSpec) -> PathBuf {
    target.path().and_then(|p| p.parent()).map(PathBuf::from).unwrap_or_default()
}

/// Refuses names that could not be opened when they stand in an image.
fn plain_path<'n>(what: &str, name: &'n str) -> anyhow::Result<&'n str> {
    let plain = name.strip_prefix("file:").unwrap_or(name);
    if plain.split_once(':').is_some_and(|(prefix, _)| !prefix.contains('/')) {
        bail!(
            "{what} {name:?}: only paths can stand in an image; write ./NAME for a file \
             whose name holds a colon"
        );
    }
    Ok(plain)
}

/// A place for a new image, opened for writing and locked. Notes whether anything was written.
pub(super) struct Place {
    source: Source,
    /// What to call it in messages.
    pub(super) name: String,
    /// The file below, if there is one.
    path: Option<PathBuf>,
    /// Whether that file was made here.
    made: bool,
    /// Whether it is a model's, whose file is cut afterwards.
    over_model: bool,
    /// Whether it is a device, which holds whatever was written to it before.
    device: bool,
    /// Whether what was in it is lost.
    touched: bool,
}

impl Place {
    /// Opens `spec` for an image of `wanted`'s kind; a file that does not exist is made. Nothing in
    /// an existing file is changed, except that one under a model is emptied.
    ///
    /// # Errors
    /// If it is in use, or cannot be opened for writing.
    pub(super) fn open(spec: &NodeSpec, wanted: &Wanted) -> anyhow::Result<Place> {
        super::refuse_special(spec)?;
        let name = spec.to_string();
        let path = spec.path().map(PathBuf::from);
        let made = match &path {
            None => false,
            Some(path) => match FileOptions::new().write(true).create_new(true).open(path) {
                Ok(_) => true,
                Err(e) if e.kind() == ErrorKind::AlreadyExists => false,
                Err(e) => return Err(e).with_context(|| format!("{name}: cannot be created")),
            },
        };
        let options = OpenOptions::write(Format::Raw);
        let opened = match spec {
            NodeSpec::Model(model) => sized(model, wanted, &options)
                .and_then(|spec| open_source(&spec, &options).map_err(anyhow::Error::new)),
            _ => open_source(spec, &options).map_err(anyhow::Error::new),
        };
        let over_model = matches!(spec, NodeSpec::Model(_));
        match opened {
            Ok(source) => {
                let device = matches!(
                    spec,
                    NodeSpec::Vfio(_)
                        | NodeSpec::Remote(_)
                        | NodeSpec::Stripe(..)
                        | NodeSpec::Volume(_)
                );
                Ok(Place { source, name, path, made, over_model, device, touched: over_model })
            }
            Err(e) => {
                if let (true, Some(path)) = (made, &path) {
                    // It is empty and ours.
                    let _ = std::fs::remove_file(path);
                }
                Err(e)
            }
        }
    }

    /// Whether it reads as zeroes when it was emptied: all but devices do.
    pub(super) fn is_blank(&self) -> bool {
        !self.device && self.path.as_deref().is_none_or(std::path::Path::is_file)
    }

    /// Says what is left after a failure. A file that did not exist before is removed.
    pub(super) fn failed(self, error: anyhow::Error) -> anyhow::Error {
        let Place { source, name, path, made, touched, .. } = self;
        drop(source);
        match path {
            Some(path) if made => match std::fs::remove_file(&path) {
                Ok(()) => error,
                Err(e) => error.context(format!("{name}: is left incomplete ({e})")),
            },
            Some(_) if touched => error.context(format!(
                "{name}: is left without a valid image, and what was in it before is lost"
            )),
            _ => error,
        }
    }

    /// The same for a place with one for an external data file.
    pub(super) fn both_failed(self, data: Option<Place>, error: anyhow::Error) -> anyhow::Error {
        let error = self.failed(error);
        match data {
            Some(data) => data.failed(error),
            None => error,
        }
    }

    /// Ends the use of the place. `end` is the image's length.
    pub(super) fn close(self, end: u64) -> anyhow::Result<()> {
        let Place { source, path, over_model, .. } = self;
        source.close()?;
        if let (Some(path), true) = (path, over_model) {
            let options = OpenOptions::write(Format::Raw);
            let mut file = open_source(&NodeSpec::File(path), &options)?;
            file.set_len(end)?;
            file.flush()?;
        }
        Ok(())
    }
}

impl Storage for Place {
    fn len(&self) -> u64 {
        self.source.len()
    }

    fn capacity(&self) -> u64 {
        self.source.capacity()
    }

    fn read_only(&self) -> bool {
        self.source.read_only()
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), StorageError> {
        self.source.read_at(offset, into)
    }

    fn write_at(&mut self, offset: u64, from: &[u8]) -> Result<(), StorageError> {
        self.touched = true;
        self.source.write_at(offset, from)
    }

    fn write_zeroes_at(&mut self, offset: u64, len: u64) -> Result<(), StorageError> {
        self.touched = true;
        self.source.write_zeroes_at(offset, len)
    }

    fn flush(&mut self) -> Result<(), StorageError> {
        self.source.flush()
    }

    fn set_len(&mut self, len: u64) -> Result<(), StorageError> {
        let before = self.source.len();
        let result = self.source.set_len(len);
        self.touched |= self.source.len() != before;
        result
    }
}

/// A VHD image of no size, with an identity of its own. Its disk gets exactly the size that is asked
/// for.
fn new_vhd() -> anyhow::Result<BuildOptions> {
    let mut uuid = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut uuid))
        .context("/dev/urandom")?;
    // As RFC 4122 has random ones.
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let timestamp = since.saturating_sub(VHD_EPOCH).min(u64::from(u32::MAX)) as u32;
    Ok(BuildOptions { size: 0, subformat: Subformat::Dynamic, exact: true, uuid, timestamp })
}

/// A model node with room for the image; its file is emptied first, under a lock.
fn sized(model: &ModelSpec, wanted: &Wanted, options: &OpenOptions) -> anyhow::Result<NodeSpec> {
    let mut file = open_source(&NodeSpec::File(model.path.clone()), options)?;
    file.set_len(0)?;
    let size = wanted.qcow.size;
    let need = match wanted.format {
        AnyFormat::Raw | AnyFormat::Vhd => size,
        // As much as the image may ever need: clusters, at most 24 bytes of tables for each, and
        // what is there anyway.
        AnyFormat::Qcow2 => {
            let clusters = size.div_ceil(wanted.qcow.cluster_size) + 1;
            clusters.saturating_mul(wanted.qcow.cluster_size + 24).saturating_add(64 << 20)
        }
    };
    let most = (i64::MAX as u64) & !4095;
    let room = need.checked_next_multiple_of(4096).unwrap_or(most).clamp(4096, most);
    Ok(NodeSpec::Model(ModelSpec { size: model.size.or(Some(room)), ..model.clone() }))
}

/// Makes an empty raw image of `size` bytes.
///
/// # Errors
/// If there is no room, or a write fails.
pub(super) fn make_raw(place: &mut Place, size: u64, how: RawAllocation) -> anyhow::Result<()> {
    let name = place.name.clone();
    if place.capacity() < size {
        bail!("{name}: has room for {} bytes, but the new image needs {size}", place.capacity());
    }
    place.set_len(0).with_context(|| name.clone())?;
    place.set_len(size).with_context(|| name.clone())?;
    match how {
        RawAllocation::Off => {}
        RawAllocation::Reserved => {
            let Some(host) = place.source.host().filter(|_| size > 0) else {
                bail!("{name}: preallocation=falloc is only possible for files with a size");
            };
            fallocate(host.file(), FallocateFlags::empty(), 0, size as i64)
                .with_context(|| format!("{name}: cannot allocate {size} bytes"))?;
        }
        RawAllocation::Full => {
            let zeroes = vec![0; 1 << 20];
            let mut at = 0;
            while at < size {
                let n = (size - at).min(zeroes.len() as u64);
                place.write_at(at, &zeroes[..n as usize]).with_context(|| name.clone())?;
                at += n;
            }
        }
    }
    place.flush().with_context(|| name.clone())
}
