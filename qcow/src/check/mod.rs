//! Checking and repairing, with the meaning of `qemu-img check`.
//!
//! All references to host clusters are counted again and compared with the refcounts on disk.
//! Memory is bounded: clusters are counted in windows ([`window`]), and each window walks the
//! tables once. A file with more than 2^31 clusters is refused.
//!
//! Repair never makes things worse when it is cut off: nothing is freed unless every reference
//! was read; refcounts are durable before the flags that rely on them; a rebuilt refcount
//! structure stands in clusters of its own until the header names it.

mod rebuild;
mod refs;
mod repair;
mod scan;
mod window;

use block::Storage;
use serde::Serialize;

use crate::format::incompatible;
use crate::open::{ImageMeta, Mode};
use crate::{Error, Result};

use refs::Refs;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: only look.
    None,
    /// Clusters that are counted but not used.
    Leaks,
    /// Everything that can be repaired.
    All,
}

/// The result, with the field names of `qemu-img check --output=json`. Counts are those of the
/// image as it is now, after a repair.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The image's name.
    pub filename: String,
    /// "qcow2".
    pub format: &'static str,
    /// What could not be checked, because it could not be read.
    pub check_errors: u64,
    /// End of the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// Places where the image contradicts itself.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Clusters whose refcount is higher than the references to them.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Corruptions that were repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Those that have a host cluster.
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    /// Those whose host cluster does not follow the one before.
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Checks an image and repairs what `repair` says. Each finding goes to `log` as a line of text;
/// a damaged image may have millions.
///
/// # Errors
/// If the file is not an image that can be opened for checking, is too large, or a repair cannot
/// be written. What stays wrong in the image is counted in the report instead.
pub fn run(
    storage: &mut dyn Storage,
    name: &str,
    repair: Repair,
    log: &mut dyn FnMut(&str),
) -> Result<Report> {
    if repair != Repair::None && storage.read_only() {
        return Err(Error::refused(name, "cannot be repaired: it is read-only"));
    }
    let before = Checker::open(storage, name, log)?.scan();
    let nothing_to_do = before.corruptions == 0 && before.leaks == 0;
    if repair == Repair::None || before.check_errors > 0 {
        return Ok(before.into_report(name));
    }
    let mut flags_fixed = 0;
    if !nothing_to_do {
        let mut checker = Checker::open(storage, name, log)?;
        if before.rebuild && repair == Repair::Leaks {
            checker.say("the refcount structures must be rebuilt, which needs a repair of all");
            let mut report = before.into_report(name);
            report.check_errors += 1;
            return Ok(report);
        }
        checker.meta.prepare_write(checker.storage, true)?;
        flags_fixed = checker.repair(repair, &before)?;
    }
    let mut quiet = |_: &str| {};
    let after = Checker::open(storage, name, &mut quiet)?.scan();
    if after.check_errors == 0 && after.corruptions == 0 {
        let mut meta = ImageMeta::open(storage, name, Mode::Check)?;
        if meta.header.is_dirty() || meta.header.is_corrupt() {
            meta.prepare_write(storage, true)?;
            // What was found right may be in a cache only: it comes before the mark's end.
            storage.flush().map_err(Error::io(name, "flush"))?;
            meta.set_incompatible(storage, 0, incompatible::DIRTY | incompatible::CORRUPT)?;
        }
    }
    let other = |s: &scan::Scan| s.corruptions - s.flags;
    let corruptions_fixed = other(&before).saturating_sub(other(&after)) + flags_fixed;
    let leaks_fixed = before.leaks.saturating_sub(after.leaks);
    let mut report = after.into_report(name);
    report.corruptions_fixed = corruptions_fixed;
    report.leaks_fixed = leaks_fixed;
    Ok(report)
}

/// An image that is being checked.
struct Checker<'a> {
    storage: &'a mut dyn Storage,
    meta: ImageMeta,
    /// The file's length in bytes.
    file_len: u64,
    /// Its length in clusters.
    clusters: u64,
    refs: Refs,
    log: &'a mut dyn FnMut(&str),
}

/// Most clusters that a file may have to be checked (QEMU's limit, too).
const MAX_CLUSTERS: u64 = i32::MAX as u64;

impl<'a> Checker<'a> {
    /// Opens the image and collects who refers to what, except for the contents of L2 tables.
    fn open(
        storage: &'a mut dyn Storage,
        name: &str,
        log: &'a mut dyn FnMut(&str),
    ) -> Result<Checker<'a>> {
        let meta = ImageMeta::open(storage, name, Mode::Check)?;
        let file_len = storage.len();
        let clusters = meta.geometry.clusters_for(file_len);
        if clusters > MAX_CLUSTERS {
            return Err(Error::refused(
                name,
                format!(
                    "has {clusters} clusters of {} bytes; at most {MAX_CLUSTERS} can be checked",
                    meta.geometry.cluster_size()
                ),
            ));
        }
        let refs = Refs::collect(storage, &meta, log);
        Ok(Checker { storage, meta, file_len, clusters, refs, log })
    }

    fn say(&mut self, line: &str) {
        (self.log)(line);
    }
}
