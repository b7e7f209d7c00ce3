//! Opening a group: which of the copies of its metadata counts, and what has to be repaired.

use std::sync::Arc;

use block::Storage;

use super::{Device, Group};
use crate::error::{Error, Result, corrupt, plain, refused};
use crate::label::{HEAD, Label, SECTOR};
use crate::mda::MetadataArea;
use crate::model::Vg;

/// What one device alone says.
#[derive(Clone, PartialEq, Debug)]
pub struct Found {
    /// Its label.
    pub label: Label,
    /// The state of the group that it has, if it has one. Another device may have a newer one.
    pub group: Option<Vg>,
}

/// Looks at a device without changing it. `None`: no physical volume of LVM2.
///
/// # Errors
/// If it cannot be read, is damaged, or has a group that is not done here.
pub fn probe(storage: &mut dyn Storage) -> Result<Option<Found>> {
    let Some(label) = Label::read(storage)? else { return Ok(None) };
    let mut best = Best::default();
    for copy in read_areas(storage, &label, &mut best)? {
        // A damaged copy is of no use here unless another one is there.
        if copy.damaged && best.vg.is_none() {
            return corrupt("the device's metadata is damaged");
        }
    }
    Ok(Some(Found { label, group: best.vg.map(|(vg, _)| vg) }))
}

/// The newest state that was seen, and its text.
#[derive(Default)]
struct Best {
    vg: Option<(Vg, Vec<u8>)>,
}

/// A metadata area, and what it has.
struct Copy {
    area: MetadataArea,
    /// Number of its text; 0: none.
    seqno: u32,
    /// Its header or text is not valid.
    damaged: bool,
}

impl Best {
    /// Takes note of a text with a valid checksum; returns its number.
    fn note(&mut self, text: Vec<u8>) -> Result<u32> {
        // A text that is valid and not understood may be the newest: nothing older counts then.
        match &self.vg {
            Some((best, same)) if *same == text => return Ok(best.seqno),
            _ => {}
        }
        let vg = Vg::read(&text)?;
        let seqno = vg.seqno;
        match &self.vg {
            Some((best, _)) if best.id != vg.id => {
                let (a, b) = (&best.name, &vg.name);
                return refused(format!("the devices are of different groups, {a} and {b}"));
            }
            Some((best, _)) if best.seqno == seqno && *best != vg => {
                let name = &vg.name;
                return corrupt(format!("two states of {name} have the same number {seqno}"));
            }
            Some((best, _)) if best.seqno >= seqno => {}
            _ => self.vg = Some((vg, text)),
        }
        Ok(seqno)
    }
}

/// Reads the metadata areas of a device.
fn read_areas(st: &mut dyn Storage, label: &Label, best: &mut Best) -> Result<Vec<Copy>> {
    let mut copies = Vec::new();
    for &place in &label.metadata {
        let empty = MetadataArea::empty(place);
        let copy = match MetadataArea::read(st, place) {
            Err(Error::Corrupt(_)) => Copy { area: empty, seqno: 0, damaged: true },
            Err(error) => return Err(error),
            Ok(area) if area.ignored => Copy { area, seqno: 0, damaged: false },
            Ok(area) => match area.text(st) {
                Err(Error::Corrupt(_)) => Copy { area: empty, seqno: 0, damaged: true },
                Err(error) => return Err(error),
                Ok(None) => Copy { area, seqno: 0, damaged: false },
                Ok(Some(text)) => Copy { area, seqno: best.note(text)?, damaged: false },
            },
        };
        copies.push(copy);
    }
    Ok(copies)
}

impl<S: Storage> Group<S> {
    /// Opens the group that is on these devices, which are all that it has, in any order. `ours` is
    /// the system ID of this host, if it has one. Where copies of the metadata differ the newest
    /// valid one is in force, and the others are brought up to it, unless a device may only be read.
    ///
    /// # Errors
    /// If devices are missing, too many, damaged or failing; if the group is another host's; if it
    /// holds what is not done here. Then nothing has been written. If a repair fails, or has no room:
    /// the state in force is as before.
    pub fn open(storages: Vec<S>, ours: Option<&str>) -> Result<Group<S>> {
        let mut best = Best::default();
        let mut found = Vec::new();
        for (number, mut storage) in storages.into_iter().enumerate() {
            let Some(label) = Label::read(&mut storage)? else {
                return refused(format!("device {number} is no physical volume of LVM2"));
            };
            let copies = read_areas(&mut storage, &label, &mut best)?;
            found.push((storage, label, copies));
        }
        let Some((vg, mut text)) = best.vg else {
            return match found.iter().flat_map(|(_, _, copies)| copies).any(|copy| copy.damaged) {
                true => corrupt("all copies of the metadata are damaged"),
                false => refused("there is no volume group on the devices"),
            };
        };
        if let Some(owner) = vg.system_id.as_ref().filter(|owner| Some(owner.as_str()) != ours) {
            let (group, owner) = (vg.name.clone(), plain(owner));
            return Err(Error::Foreign { group, owner, ours: ours.unwrap_or_default().to_owned() });
        }
        let mut devices = Vec::new();
        let mut stale = Vec::new();
        for pv in &vg.pvs {
            let Some(at) = found.iter().position(|(_, label, _)| label.id == pv.id) else {
                let name = &vg.name;
                return refused(format!(
                    "device {} ({}) of group {name} is missing",
                    pv.key, pv.id
                ));
            };
            let (storage, label, copies) = found.swap_remove(at);
            let start = pv.pe_start * SECTOR;
            let size = pv.pe_count * vg.extent_bytes();
            if start + size > storage.len() {
                return corrupt(format!("device {} is smaller than its extents", pv.key));
            }
            let hit =
                |area: &crate::Area| area.offset < start + size && start < area.offset + area.size;
            if label.metadata.iter().chain([&HEAD]).any(hit) {
                return corrupt(format!("device {} has extents in its metadata", pv.key));
            }
            for (a, copy) in copies.iter().enumerate() {
                if !copy.area.ignored && (copy.damaged || copy.seqno != vg.seqno) {
                    stale.push((devices.len(), a));
                }
            }
            let areas = copies.into_iter().map(|copy| copy.area).collect();
            devices.push(Device { storage, label, areas });
        }
        if let Some((_, label, _)) = found.first() {
            return refused(format!("device {} is not of group {}", label.id, vg.name));
        }
        let mut group = Group { vg, devices, latest: Arc::default(), failed: false };
        if group.usable().is_ok() {
            text.push(0);
            group.settle(&stale, &text)?;
        }
        Ok(group)
    }

    /// Brings areas up to the text in force, once that is durable.
    fn settle(&mut self, stale: &[(usize, usize)], text: &[u8]) -> Result<()> {
        let mut places = Vec::new();
        for &(d, a) in stale {
            let device = &mut self.devices[d];
            let place = device.areas[a].next(text)?;
            device.areas[a].put(&mut device.storage, &place, text)?;
            places.push((d, a, place));
        }
        // Also without repairs: whoever wrote what was read may have ended before its flush.
        self.devices.iter_mut().try_for_each(Device::flush)?;
        for (d, a, place) in places {
            let device = &mut self.devices[d];
            device.areas[a].live = Some(place);
            device.areas[a].write(&mut device.storage)?;
            device.flush()?;
        }
        Ok(())
    }
}
