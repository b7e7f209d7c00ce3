//! Making a group on devices, and taking it away again.

use std::sync::Arc;

use block::Storage;

use super::{Device, Group, Prepared, encode};
use crate::error::{Error, Result, refused};
use crate::host::check_system_id;
use crate::id::Id;
use crate::label::{Area, Label, SECTOR};
use crate::mda::MetadataArea;
use crate::model::{Author, Pv, Vg, WRITE_LOCKED, check_name, check_tag};
use crate::text::Node;

/// Bytes of a metadata area that suffice for a thousand volumes, twice.
pub const DEFAULT_METADATA: u64 = 16 << 20;
/// Where the metadata area begins: behind the first page, as LVM's tools put it.
const METADATA: u64 = 4096;
/// Extents begin at a multiple of this.
const ALIGN: u64 = 1 << 20;
/// So many bytes at a device's end are emptied: partition tables and RAIDs have copies there.
const TAIL: u64 = 1 << 20;

/// What a new group shall be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewGroup {
    /// Its name.
    pub name: String,
    /// The system ID of this host, if it has one: others will leave the group alone.
    pub system_id: Option<String>,
    /// Its tags.
    pub tags: Vec<String>,
    /// Bytes of an extent: a power of two, at least 4096.
    pub extent: u64,
    /// Bytes of a metadata area, at least; [`DEFAULT_METADATA`].
    pub metadata: u64,
}

impl<S: Storage> Group<S> {
    /// Makes a group of all these devices. A device that already has one is refused; anything else
    /// on them is lost, and what other tools know it by (at the begin and the end) is emptied: whether
    /// that is wanted has to be asked before.
    ///
    /// # Errors
    /// If a device is in a group, too small, or fails; if name, system ID or tags are none.
    pub fn create(storages: Vec<S>, new: &NewGroup, author: &Author) -> Result<Group<S>> {
        check_name("", &new.name)?;
        new.system_id.as_deref().map_or(Ok(()), check_system_id)?;
        new.tags.iter().try_for_each(|tag| check_tag(tag))?;
        if !new.extent.is_power_of_two() || new.extent < 4096 || new.extent / SECTOR > 1 << 31 {
            return refused(format!("extents of {} bytes", new.extent));
        }
        let start =
            METADATA.checked_add(new.metadata).and_then(|end| end.checked_next_multiple_of(ALIGN));
        let Some(start) = start else {
            return refused(format!("metadata areas of {} bytes", new.metadata));
        };
        let (mut pvs, mut devices) = (Vec::new(), Vec::new());
        for (number, mut storage) in storages.into_iter().enumerate() {
            check_free(&mut storage)?;
            let id = random()?;
            let size = storage.len();
            let count = size.saturating_sub(start) / new.extent;
            if count == 0 || count > u64::from(u32::MAX) {
                return refused(format!("a device of {size} bytes, extents of {}", new.extent));
            }
            let area = Area { offset: METADATA, size: start - METADATA };
            let (data, metadata) = (vec![Area { offset: start, size: 0 }], vec![area]);
            let label = Label { id, device_size: size, data, metadata, used: true, sector: 1 };
            pvs.push(Pv {
                key: format!("pv{number}"),
                id,
                status: vec!["ALLOCATABLE".to_owned()],
                flags: Vec::new(),
                tags: Vec::new(),
                pe_start: start / SECTOR,
                pe_count: count,
                extra: vec![
                    // A hint for people; LVM's tools look at the identity.
                    Node::text("device", "[unknown]"),
                    Node::int("dev_size", size / SECTOR),
                ],
            });
            devices.push(Device { storage, label, areas: vec![MetadataArea::empty(area)] });
        }
        let (status, flags): (&[&str], &[&str]) = match new.system_id {
            None => (&["RESIZEABLE", "READ", "WRITE"], &[]),
            Some(_) => (&["RESIZEABLE", "READ"], &[WRITE_LOCKED]),
        };
        let vg = Vg {
            name: new.name.clone(),
            id: random()?,
            seqno: 1,
            system_id: new.system_id.clone(),
            status: status.iter().map(|flag| (*flag).to_owned()).collect(),
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
            tags: new.tags.clone(),
            extent_size: new.extent / SECTOR,
            pvs,
            lvs: Vec::new(),
            extra: ["max_lv", "max_pv", "metadata_copies"].map(|key| Node::int(key, 0)).to_vec(),
        };
        vg.check()?;
        let text = encode(&vg, author, "created")?;
        let mut group = Group { vg, devices, latest: Arc::default(), failed: false };
        group.usable()?;
        group.label()?;
        // As any change: the first header is the commit point.
        let mut places = Vec::new();
        for (d, device) in group.devices.iter_mut().enumerate() {
            let place = device.areas[0].next(&text)?;
            device.areas[0].put(&mut device.storage, &place, &text)?;
            places.push((d, 0, place));
        }
        let (vg, token) = (group.vg.clone(), Arc::clone(&group.latest));
        let prepared = Prepared { vg, places, token };
        group.commit(prepared)?;
        Ok(group)
    }

    /// Makes the devices physical volumes without a group, and nothing else that they may have been.
    /// The labels are durable with the next flush, that of the commit.
    fn label(&mut self) -> Result<()> {
        // First of all no old label: it must lead neither to a new header nor to none.
        for device in &mut self.devices {
            Label::wipe(&mut device.storage)?;
        }
        self.devices.iter_mut().try_for_each(Device::flush)?;
        for Device { storage, label, areas } in &mut self.devices {
            let (start, size) = (label.data[0].offset, label.device_size);
            let tail = size.saturating_sub(TAIL).max(start);
            for (offset, len) in [(0, start), (tail, size - tail)] {
                storage.write_zeroes_at(offset, len).map_err(Error::io("what was there before"))?;
            }
            areas[0].write(storage)?;
        }
        // Headers before labels: a new label must not lead to what is no header.
        self.devices.iter_mut().try_for_each(Device::flush)?;
        for device in &mut self.devices {
            device.label.write(&mut device.storage)?;
        }
        for Device { storage, label, .. } in &mut self.devices {
            if Label::read(storage)?.as_ref() != Some(label) {
                return refused("two of the devices are one: its label is the other's");
            }
        }
        Ok(())
    }

    /// Removes the group and its labels, and gives the devices back.
    ///
    /// # Errors
    /// If it has volumes; if a device fails.
    pub fn remove(mut self) -> Result<Vec<S>> {
        self.usable()?;
        if !self.vg.lvs.is_empty() {
            return refused(format!("group {} has volumes", self.vg.name));
        }
        // The group is there as long as one header says so, and gone when none does: only then labels
        // go, so that it never lacks a device.
        for device in &mut self.devices {
            for area in device.areas.iter_mut().filter(|area| !area.ignored) {
                area.live = None;
                area.write(&mut device.storage)?;
            }
        }
        self.devices.iter_mut().try_for_each(Device::flush)?;
        for device in &mut self.devices {
            Label::wipe(&mut device.storage)?;
        }
        self.devices.iter_mut().try_for_each(Device::flush)?;
        Ok(self.into_devices())
    }
}

/// A device has no group, or one that was not made to the end.
fn check_free(storage: &mut dyn Storage) -> Result<()> {
    let Some(label) = Label::read(storage)? else { return Ok(()) };
    let mut silent = true;
    for &area in &label.metadata {
        let area = MetadataArea::read(storage, area)?;
        if area.live.is_some() {
            return refused(format!("device {} is in a volume group", label.id));
        }
        silent &= area.ignored;
    }
    // Without an area in use it may still be in a group that others describe.
    match label.used && silent {
        true => refused(format!("device {} is in a volume group", label.id)),
        false => Ok(()),
    }
}

fn random() -> Result<Id> {
    Id::random().map_err(|error| Error::Refused(format!("no random numbers: {error}")))
}
