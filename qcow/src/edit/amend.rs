//! Changing options of an image that exists: the version, lazy refcounts, the external data file's
//! name and what it is.

use block::Storage;

use super::table::{join, raw_entries};
use super::tx::run;
use crate::format::{Extension, Header, autoclear, compatible, ext};
use crate::open::{ImageMeta, Mode};
use crate::{Error, Result};

/// What is to change; `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amend {
    /// The version: 3, or 2 if it is that already.
    pub version: Option<u32>,
    /// Whether refcounts may be written late; version 3.
    pub lazy_refcounts: Option<bool>,
    /// The external data file's name as it shall stand in the image. The file itself is the user's
    /// affair.
    pub data_file: Option<String>,
    /// Whether the external data file is the guest's disk by itself: can only be given up.
    pub data_file_raw: Option<bool>,
}

/// Changes options. From version 2 to 3 entries of the snapshot table get the disk's size, which
/// version 3 demands; then the header is replaced.
///
/// # Errors
/// If the version would fall, version 2 would get lazy refcounts, there is no external data file to
/// be named or it would become raw, or a write fails.
pub fn amend(st: &mut dyn Storage, name: &str, options: &Amend) -> Result<()> {
    let meta = ImageMeta::open(st, name, Mode::Write)?;
    let old = meta.header;
    let version = options.version.unwrap_or(old.version);
    if version < old.version {
        return Err(Error::refused(name, "cannot be brought back to version 2 (compat=0.10)"));
    }
    if version < 3 && options.lazy_refcounts == Some(true) {
        return Err(Error::refused(name, "lazy_refcounts=on needs compat=1.1"));
    }
    if (options.data_file.is_some() || options.data_file_raw == Some(true)) && !old.has_data_file()
    {
        return Err(Error::refused(name, "has no external data file"));
    }
    if options.data_file_raw == Some(true) && !old.raw_data() {
        return Err(Error::refused(name, "data_file_raw=on is only possible for a new image"));
    }
    if old.version < 3 && version >= 3 {
        complete_snapshots(st, name)?;
        let header = ImageMeta::open(st, name, Mode::Write)?.header;
        super::header::replace(st, name, &upgraded(&header))?;
    }
    if options.data_file_raw == Some(false) && old.raw_data() {
        run(st, name, |tx, _| {
            tx.meta.header.autoclear_features &= !autoclear::RAW_DATA;
            Ok(())
        })?;
    }
    if let Some(data_file) = &options.data_file {
        let mut new = ImageMeta::open(st, name, Mode::Write)?.header;
        new.extensions.retain(|e| e.kind != ext::DATA_FILE);
        let data = data_file.clone().into_bytes();
        // In front: what is known is not pushed out by what is for people.
        new.extensions.insert(0, Extension { kind: ext::DATA_FILE, data });
        super::header::replace(st, name, &new)?;
    }
    let lazy = options.lazy_refcounts.unwrap_or(old.lazy_refcounts());
    if lazy != old.lazy_refcounts() {
        run(st, name, |tx, _| {
            tx.meta.header.compatible_features ^= compatible::LAZY_REFCOUNTS;
            Ok(())
        })?;
    }
    Ok(())
}

/// A version 2 header as one of version 3.
fn upgraded(old: &Header) -> Header {
    let geometry = crate::format::Geometry::new(3, old.cluster_bits, 4, old.size)
        .expect("version 3 permits all that version 2 does");
    let blank = Header::new(&geometry);
    let mut new =
        Header { version: 3, header_length: blank.header_length, tail: blank.tail, ..old.clone() };
    let plain = new.clone();
    new.add_feature_names();
    if new.encode().is_ok() { new } else { plain }
}

/// Gives every entry of the snapshot table the extra data that version 3 demands.
fn complete_snapshots(st: &mut dyn Storage, name: &str) -> Result<()> {
    run(st, name, |tx, st| {
        let (all, mut entries) = raw_entries(st, name, &tx.meta.header)?;
        if all.iter().all(|s| s.disk_size.is_some()) {
            return Ok(());
        }
        for (snapshot, entry) in all.into_iter().zip(&mut entries) {
            if snapshot.disk_size.is_none() {
                let strings = entry_strings(entry);
                let mut whole = snapshot;
                whole.disk_size = Some(tx.meta.header.size);
                whole.icount = Some(0);
                *entry = whole.encode_with(&strings.0, &strings.1);
            }
        }
        tx.snapshots = Some(join(name, &entries)?);
        Ok(())
    })
    .map(|_| ())
}

/// ID and name of an entry that was parsed, byte for byte.
fn entry_strings(entry: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let short = |at: usize| usize::from(u16::from_be_bytes([entry[at], entry[at + 1]]));
    let extra = u32::from_be_bytes([entry[36], entry[37], entry[38], entry[39]]) as usize;
    let id = crate::format::Snapshot::FIXED_LEN + extra;
    let name = id + short(12);
    (entry[id..name].to_vec(), entry[name..name + short(14)].to_vec())
}
