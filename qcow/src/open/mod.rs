//! Opening images: one file ([`ImageMeta`]) and backing chains ([`Chain`]).
//!
//! Control path. Opening reads the header cluster, the L1 table and the refcount table, nothing
//! else, so its cost does not depend on how much of the disk is allocated.

mod chain;
mod metadata;
mod names;
mod tables;

pub(crate) use chain::can_be_chain;
pub use chain::{Chain, ChainOptions, DataFile, Layer, LayerKind, MAX_DEPTH, Opened};
pub use metadata::MetadataSet;
pub use names::{BackingRef, FileId, Format, HostFile, Role, allowed_host_file};
pub(crate) use tables::{read_snapshots, read_word_table};

use std::hash::Hasher as _;

use block::Storage;
use fnv::FnvHasher;

use crate::check;
use crate::edit::check_l1;
use crate::format::{FieldError, Geometry, Header, Snapshot, autoclear, field};
use crate::{Error, Result};

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Reading. Nothing is written, also not to a dirty image.
    Read,
    /// Reading and writing. A dirty image's refcounts are repaired first.
    Write,
    /// Checking and repairing: a refcount table or snapshot table that cannot be used is not an
    /// error yet.
    Check,
}

/// One QCOW2 file, opened: header and first-level tables in memory.
#[derive(Clone, Debug)]
pub struct ImageMeta {
    /// The file's name, for messages.
    pub name: String,
    /// What it was opened for.
    pub mode: Mode,
    /// The header.
    pub header: Header,
    /// The sizes.
    pub geometry: Geometry,
    /// The active L1 table's words in the CPU's byte order; decode with
    /// [`crate::format::L1Entry::decode`]. `header.l1_size` of them.
    pub l1: Vec<u64>,
    /// The refcount table's words in the CPU's byte order; decode with
    /// [`crate::format::decode_refcount_table_entry`]. Whole clusters of them. In [`Mode::Check`]
    /// empty if the table cannot be used.
    pub refcount_table: Vec<u64>,
    /// In [`Mode::Check`], why the refcount table cannot be used.
    pub refcount_table_error: Option<FieldError>,
}

impl ImageMeta {
    /// Tells an image from what it becomes when somebody changes it otherwise than by serving it: its
    /// size, snapshots, backing file, the place of its active tables.
    pub(crate) fn shape(&self) -> u64 {
        let h = &self.header;
        let mut hasher = FnvHasher::default();
        for word in [
            h.size,
            h.l1_table_offset,
            u64::from(h.l1_size),
            h.snapshots_offset,
            u64::from(h.nb_snapshots),
            u64::from(h.cluster_bits),
        ] {
            hasher.write(&word.to_be_bytes());
        }
        hasher.write(h.backing_name.as_deref().unwrap_or_default());
        hasher.finish()
    }

    /// Opens one QCOW2 file. `name` is for messages.
    ///
    /// # Errors
    /// If it is not a QCOW2 image, uses what is not done here, holds impossible fields or tables,
    /// may not be opened in this mode, or cannot be read.
    pub fn open(storage: &mut dyn Storage, name: &str, mode: Mode) -> Result<ImageMeta> {
        let header = read_header(storage, name)?;
        refuse_unsupported(&header, name)?;
        let meta = tables::load(storage, name, mode, header)?;
        if mode == Mode::Write {
            refuse_writing(&meta.header, name, storage.read_only())?;
            if meta.header.is_dirty() {
                repair_dirty(storage, name)?;
                return Self::open(storage, name, mode);
            }
        }
        Ok(meta)
    }

    /// First host offset that cannot hold anything: the file's end, rounded up to a cluster.
    pub fn host_end(&self, storage: &dyn Storage) -> u64 {
        self.geometry.round_up(storage.len()).unwrap_or(u64::MAX)
    }

    /// To be called before the first write to the image: clears the autoclear bits, since
    /// nothing that they vouch for (what is unknown here, and bitmaps but with `bitmaps`) is kept up
    /// to date, except for an external data file that is raw. Durable when it returns.
    ///
    /// # Errors
    /// If the header cannot be written.
    pub fn prepare_write(&mut self, storage: &mut dyn Storage, bitmaps: bool) -> Result<()> {
        let lost = if bitmaps { 0 } else { autoclear::BITMAPS };
        let kept = self.header.autoclear_features & autoclear::KNOWN & !lost;
        if self.header.autoclear_features == kept {
            return Ok(());
        }
        self.write_field(storage, field::AUTOCLEAR, kept)?;
        self.header.autoclear_features = kept;
        Ok(())
    }

    /// Sets or clears incompatible feature bits (dirty, corrupt) on disk; durable when it returns.
    /// Version 2 has none: nothing happens.
    ///
    /// # Errors
    /// If the header cannot be written.
    pub fn set_incompatible(
        &mut self,
        storage: &mut dyn Storage,
        set: u64,
        clear: u64,
    ) -> Result<()> {
        let bits = (self.header.incompatible_features | set) & !clear;
        if self.header.version < 3 || bits == self.header.incompatible_features {
            return Ok(());
        }
        self.write_field(storage, field::INCOMPATIBLE, bits)?;
        self.header.incompatible_features = bits;
        Ok(())
    }

    /// Shows the disk as a snapshot has it.
    fn show_snapshot(&mut self, storage: &mut dyn Storage, s: &Snapshot) -> Result<()> {
        check_l1(self, s, storage.len())?;
        let size = s.disk_size.unwrap_or(self.header.size);
        let geometry = Some(self.geometry.with_size(size))
            .filter(|g| i64::try_from(size).is_ok() && g.l1_entries() <= u64::from(s.l1_size))
            .ok_or_else(|| {
                Error::refused(
                    &self.name,
                    format!(
                        "snapshot {:?} claims a disk of {size} bytes, but its L1 table has {} \
                         entries",
                        s.name, s.l1_size
                    ),
                )
            })?;
        let len = u64::from(s.l1_size) * 8;
        let what = "snapshot's L1 table";
        self.l1 = read_word_table(storage, &self.name, what, s.l1_table_offset, len)?;
        self.header.l1_table_offset = s.l1_table_offset;
        self.header.l1_size = s.l1_size;
        self.header.size = size;
        self.geometry = geometry;
        Ok(())
    }

    fn write_field(&self, storage: &mut dyn Storage, offset: u64, value: u64) -> Result<()> {
        let io = |e| Error::io(&self.name, "header")(e);
        storage.write_at(offset, &value.to_be_bytes()).map_err(io)?;
        storage.flush().map_err(io)
    }
}

/// The name of the backing file that an image's header gives, and nothing else of the image.
///
/// # Errors
/// If the header cannot be read, or is none.
pub fn backing_name(storage: &mut dyn Storage, name: &str) -> Result<Option<Vec<u8>>> {
    Ok(read_header(storage, name)?.backing_name)
}

/// Reads and parses the first cluster.
fn read_header(storage: &mut dyn Storage, name: &str) -> Result<Header> {
    let io = Error::io(name, "header");
    let field = |e| Error::field(name, e);
    let len = storage.len();
    let mut start = [0; Header::PEEK];
    let have = len.min(start.len() as u64) as usize;
    storage.read_at(0, &mut start[..have]).map_err(io)?;
    let bits = Header::peek_cluster_bits(&start[..have]).map_err(field)?;
    let mut cluster = vec![0; len.min(1 << bits) as usize];
    storage.read_at(0, &mut cluster).map_err(Error::io(name, "header"))?;
    Header::parse(&cluster).map_err(field)
}

/// Refuses what is not done here, by name.
fn refuse_unsupported(header: &Header, name: &str) -> Result<()> {
    let unknown = header.unknown_incompatible();
    let feature = if !unknown.is_empty() {
        format!("unknown incompatible features {} are", unknown.join(", "))
    } else if header.crypt_method == 1 {
        "AES encryption is".to_owned()
    } else if header.crypt_method == 2 {
        "LUKS encryption is".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::unsupported(name, feature))
}

fn refuse_writing(header: &Header, name: &str, read_only: bool) -> Result<()> {
    let reason = if read_only {
        "cannot be opened for writing: the file or device is read-only".to_owned()
    } else if header.is_corrupt() {
        "is marked corrupt; it can be read, but not be written before \
         `image check --repair all` has brought it back"
            .to_owned()
    } else if header.nb_snapshots > 0 && header.has_data_file() {
        // Clusters in a data file cannot be shared: writing would change what snapshots hold.
        "has internal snapshots and an external data file, which exclude each other; it can be read, \
         but not be written"
            .to_owned()
    } else {
        return Ok(());
    };
    Err(Error::refused(name, reason))
}

/// Rebuilds the refcounts of an image that was not closed cleanly, as QEMU does on opening.
fn repair_dirty(storage: &mut dyn Storage, name: &str) -> Result<()> {
    log::warn!("{name}: was not closed cleanly; repairing its refcounts");
    let mut lines = 0;
    let mut log = |line: &str| {
        // There may be millions; the first few show what kind they are.
        let level = if lines < 10 { log::Level::Warn } else { log::Level::Debug };
        log::log!(level, "{line}");
        lines += 1;
    };
    let report = check::run(storage, name, check::Repair::All, &mut log)?;
    if report.check_errors > 0 || report.corruptions > 0 {
        return Err(Error::refused(
            name,
            format!(
                "was not closed cleanly, and repairing its refcounts left {} errors and {} \
                 corruptions; it can be read, but not be written",
                report.check_errors, report.corruptions
            ),
        ));
    }
    Ok(())
}
