//! What holds for every group, whether it was read or changed: no extent is in two volumes or
//! outside its device, and nothing is in it that would have to be understood.

use std::collections::HashSet;

use super::{Lv, Run, Segment, Vg};
use crate::error::{Result, corrupt, refused, unsupported};

/// Longest name of a group or volume.
const NAME: usize = 127;
/// Longest tag.
const TAG: usize = 1024;
/// Smallest stripe in sectors: LVM's tools make none below a page.
const STRIPE: u64 = 8;
/// Most stripes of a segment: LVM's tools make no more.
const STRIPES: usize = 128;
/// Starts of names that LVM's tools keep for themselves.
const PREFIXES: [&str; 2] = ["pvmove", "snapshot"];
/// Parts of names that LVM's tools keep for themselves.
const PARTS: [&str; 16] = [
    "_cdata", "_cmeta", "_corig", "_cpool", "_cvol", "_iorig", "_imeta", "_mimage", "_mlog",
    "_pmspare", "_rimage", "_rmeta", "_tdata", "_tmeta", "_vdata", "_vorigin",
];

fn of_name(text: &str) -> bool {
    let plain = text.bytes().all(|c| c.is_ascii_alphanumeric() || b"_.-+".contains(&c));
    plain
        && !text.is_empty()
        && text.len() <= NAME
        && !text.starts_with('-')
        && text != "."
        && text != ".."
}

/// Whether a new volume may have this name in this group.
///
/// # Errors
/// If not; the message says why.
pub fn check_name(group: &str, name: &str) -> Result<()> {
    if !of_name(name) {
        return refused(format!("`{name}` is no name for a volume"));
    }
    let kept = PREFIXES.iter().find(|part| name.starts_with(**part));
    if let Some(part) = kept.or(PARTS.iter().find(|part| name.contains(**part))) {
        return refused(format!("`{part}` in the name {name} has a meaning for LVM"));
    }
    // The kernel's name of the device has both, with each hyphen doubled.
    let long = |text: &str| text.len() + text.matches('-').count();
    if long(group) + 1 + long(name) > NAME {
        return refused(format!("the name {group}/{name} is too long for the kernel"));
    }
    Ok(())
}

/// Whether this may be a tag.
///
/// # Errors
/// If not.
pub fn check_tag(tag: &str) -> Result<()> {
    let plain = tag.bytes().all(|c| c.is_ascii_alphanumeric() || b"_+.-/=!:&#".contains(&c));
    if plain && !tag.is_empty() && tag.len() <= TAG && !tag.starts_with('-') {
        return Ok(());
    }
    refused(format!("`{tag}` is no tag"))
}

/// All flags are among the known ones.
fn known(what: &str, flags: &[String], known: &[&str]) -> Result<()> {
    match flags.iter().find(|flag| !known.contains(&flag.as_str())) {
        Some(flag) => unsupported(format!("{what} with the status {flag} is")),
        None => Ok(()),
    }
}

impl Vg {
    /// Checks all of it.
    pub(crate) fn check(&self) -> Result<()> {
        if !of_name(&self.name) {
            return corrupt("metadata: the volume group has an impossible name");
        }
        known("a volume group", &self.status, &["RESIZEABLE", "READ", "WRITE"])?;
        if !self.writable() {
            return unsupported("a volume group that may only be read is");
        }
        if self.extent_size < 2 || !self.extent_size.is_multiple_of(2) {
            return corrupt(format!("metadata: extents of {} sectors", self.extent_size));
        }
        self.check_pvs()?;
        let (mut names, mut ids) = (HashSet::new(), HashSet::new());
        for lv in &self.lvs {
            if !of_name(&lv.name) || !names.insert(&lv.name) || !ids.insert(lv.id) {
                return corrupt(format!("metadata: name or identity of volume {}", lv.name));
            }
            let what = format!("volume {}", lv.name);
            known(&what, &lv.status, &["READ", "WRITE", "VISIBLE", "FIXED_MINOR"])?;
            self.check_lv(lv)?;
        }
        self.check_overlaps()
    }

    fn check_pvs(&self) -> Result<()> {
        if self.pvs.is_empty() {
            return corrupt("metadata: a volume group without devices");
        }
        let mut ids = HashSet::new();
        for pv in &self.pvs {
            known(&format!("device {}", pv.key), &pv.status, &["ALLOCATABLE"])?;
            if pv.flags.iter().any(|flag| flag == "MISSING") {
                return unsupported(format!("device {}, which was missing, is", pv.key));
            }
            let sectors = pv.pe_count.checked_mul(self.extent_size);
            let end = sectors.and_then(|sectors| sectors.checked_add(pv.pe_start));
            // So that bytes can be counted without further care.
            if end.is_none_or(|end| end > i64::MAX as u64 / 512) || !ids.insert(pv.id) {
                return corrupt(format!("metadata: size or identity of device {}", pv.key));
            }
        }
        Ok(())
    }

    fn check_lv(&self, lv: &Lv) -> Result<()> {
        let mut at = 0;
        for segment in &lv.segments {
            let Segment { start, count, .. } = *segment;
            let stripes = segment.areas.len() as u64;
            if start != at || count == 0 || stripes == 0 || count % stripes != 0 {
                return corrupt(format!("metadata: the segment at {start} of volume {}", lv.name));
            }
            let size = segment.stripe_size;
            let odd = !size.is_power_of_two()
                || size < STRIPE
                || !self.extent_size.is_multiple_of(size.max(1));
            if stripes > 1 && odd {
                let name = &lv.name;
                return unsupported(format!("volume {name} with stripes of {size} sectors is"));
            }
            if segment.areas.len() > STRIPES {
                return unsupported(format!("volume {} with {stripes} stripes is", lv.name));
            }
            for run in segment.runs() {
                let end = run.first.checked_add(run.count);
                let inside =
                    self.pvs.get(run.pv).is_some_and(|pv| end.is_some_and(|e| e <= pv.pe_count));
                if !inside {
                    return corrupt(format!(
                        "metadata: volume {} lies outside its device",
                        lv.name
                    ));
                }
            }
            at += count;
        }
        if at > u64::from(u32::MAX) {
            return corrupt(format!("metadata: volume {} is too large", lv.name));
        }
        Ok(())
    }

    /// No extent is used twice.
    fn check_overlaps(&self) -> Result<()> {
        let mut runs: Vec<Run> = self.used().collect();
        runs.sort_unstable();
        for pair in runs.windows(2) {
            if pair[0].pv == pair[1].pv && pair[0].first + pair[0].count > pair[1].first {
                let Run { pv, first, .. } = pair[1];
                let key = &self.pvs[pv].key;
                return corrupt(format!("metadata: extent {first} of {key} is used twice"));
            }
        }
        Ok(())
    }
}
