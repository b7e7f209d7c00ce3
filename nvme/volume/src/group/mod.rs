//! [`Group`]: an open volume group, and its changes in two phases.
//!
//! A change writes the new text into the ring of each metadata area, beside the text in force
//! ([`Group::prepare`]), then flushes, then writes the headers, device after device, each with a flush
//! behind it ([`Group::commit`]). The first header that is durable is the commit point: whoever opens
//! the group takes the highest number, and brings the other areas up to it. Whatever must be durable
//! together with the change is written between the two calls, to any device of the group.

mod open;
mod setup;

use std::collections::BTreeSet;
use std::sync::Arc;

use block::Storage;

use crate::error::{Error, Result, corrupt, refused};
use crate::label::Label;
use crate::map::Map;
use crate::mda::{MetadataArea, Place};
use crate::model::{Author, Run, Vg};
use crate::view::View;

pub use open::{Found, probe};
pub use setup::{DEFAULT_METADATA, NewGroup};

/// A device of an open group.
#[derive(Debug)]
pub(crate) struct Device<S> {
    pub(crate) storage: S,
    label: Label,
    areas: Vec<MetadataArea>,
}

impl<S: Storage> Device<S> {
    fn flush(&mut self) -> Result<()> {
        self.storage.flush().map_err(Error::io("flush of a device of the group"))
    }
}

/// An open volume group.
#[derive(Debug)]
pub struct Group<S> {
    vg: Vg,
    /// In the order of [`Vg::pvs`].
    devices: Vec<Device<S>>,
    /// Whose texts lie beside the ones in force: those of the change that was prepared last.
    latest: Arc<()>,
    /// A commit did not end well: what is in force on disk is not known.
    failed: bool,
}

/// A change whose text is on the devices, not in force yet. Dropping it is giving it up.
#[derive(Debug)]
pub struct Prepared {
    vg: Vg,
    /// For each area that is written to: device, area, where the text is.
    places: Vec<(usize, usize, Place)>,
    /// [`Group::latest`] when the texts were written.
    token: Arc<()>,
}

impl Prepared {
    /// The state to be.
    pub fn vg(&self) -> &Vg {
        &self.vg
    }
}

impl<S: Storage> Group<S> {
    /// The state in force.
    pub fn vg(&self) -> &Vg {
        &self.vg
    }

    /// Where the bytes of a volume are.
    ///
    /// # Errors
    /// If there is no such volume.
    pub fn map(&self, name: &str) -> Result<Map> {
        Ok(Map::new(&self.vg, self.vg.lv(name)?))
    }

    /// A volume as storage, as long as it is.
    ///
    /// # Errors
    /// If there is no such volume.
    pub fn volume(&mut self, name: &str) -> Result<View<'_, S>> {
        let map = self.map(name)?;
        let read_only = !self.vg.lv(name)?.writable();
        Ok(View::new(map, read_only, &mut self.devices))
    }

    /// A volume that a change will make, as storage: what must be in it when the change is in force. Its
    /// extents are nobody's now.
    ///
    /// # Errors
    /// If there is no such volume, or an extent of it is in use now.
    pub fn new_volume(&mut self, prepared: &Prepared, name: &str) -> Result<View<'_, S>> {
        let lv = prepared.vg.lv(name)?;
        let runs: Vec<Run> = lv.segments.iter().flat_map(crate::Segment::runs).collect();
        if subtract(runs.clone(), self.vg.used().collect()) != runs {
            return refused(format!("volume {name} has extents already that are in use"));
        }
        Ok(View::new(Map::new(&prepared.vg, lv), false, &mut self.devices))
    }

    /// The devices, in the order of [`Vg::pvs`].
    pub fn storages(&self) -> impl Iterator<Item = &S> {
        self.devices.iter().map(|device| &device.storage)
    }

    /// The devices, given back, in the order of [`Vg::pvs`].
    pub fn into_devices(self) -> Vec<S> {
        self.devices.into_iter().map(|device| device.storage).collect()
    }

    /// Changes the group: both phases at once. Returns the extents that no volume has any more.
    ///
    /// # Errors
    /// As of both phases.
    pub fn change(
        &mut self,
        author: &Author,
        why: &str,
        edit: impl FnOnce(&mut Vg) -> Result<()>,
    ) -> Result<Vec<Run>> {
        let prepared = self.prepare(author, why, edit)?;
        self.commit(prepared)
    }

    /// Makes a change in memory and writes its text. Nothing is in force yet, nor durable.
    ///
    /// # Errors
    /// What `edit` says; if there is no room for the text; if a device fails, or was written to by
    /// somebody else. The old state is in force then.
    pub fn prepare(
        &mut self,
        author: &Author,
        why: &str,
        edit: impl FnOnce(&mut Vg) -> Result<()>,
    ) -> Result<Prepared> {
        self.usable()?;
        let mut vg = self.vg.clone();
        edit(&mut vg)?;
        let same = |(a, b): (&crate::Pv, &crate::Pv)| {
            (a.id, a.pe_start, a.pe_count) == (b.id, b.pe_start, b.pe_count)
        };
        let pvs = vg.pvs.len() == self.vg.pvs.len() && vg.pvs.iter().zip(&self.vg.pvs).all(same);
        if !pvs || vg.id != self.vg.id || vg.extent_size != self.vg.extent_size {
            return refused("the devices and extents of a group cannot be changed here");
        }
        vg.seqno = match self.vg.seqno.checked_add(1) {
            Some(seqno) => seqno,
            None => return refused("the group has been changed as often as its number can count"),
        };
        let text = encode(&vg, author, why)?;
        let mut places = Vec::new();
        for (d, device) in self.devices.iter_mut().enumerate() {
            for (a, area) in device.areas.iter().enumerate().filter(|(_, area)| !area.ignored) {
                if MetadataArea::read(&mut device.storage, area.area)? != *area {
                    return refused("somebody else has changed the metadata: open the group again");
                }
                places.push((d, a, area.next(&text)?));
            }
        }
        // They take the place of the texts of a change that was prepared before.
        self.latest = Arc::default();
        for (d, a, place) in &places {
            let device = &mut self.devices[*d];
            device.areas[*a].put(&mut device.storage, place, &text)?;
        }
        Ok(Prepared { vg, places, token: Arc::clone(&self.latest) })
    }

    /// Puts a change in force, the one that was prepared last. Returns the extents that no volume has
    /// any more.
    ///
    /// # Errors
    /// If another change was prepared since. If a device fails: unless it was the first flush, the
    /// state in force is not known then, and the group has to be opened again.
    pub fn commit(&mut self, prepared: Prepared) -> Result<Vec<Run>> {
        self.usable()?;
        let Prepared { vg, places, token } = prepared;
        if !Arc::ptr_eq(&token, &self.latest) {
            return refused("another change was prepared since this one: its texts are gone");
        }
        // All devices: they also hold what was written for this change.
        self.devices.iter_mut().try_for_each(Device::flush)?;
        self.failed = true;
        for at in 0..places.len() {
            let (d, a, place) = places[at];
            let device = &mut self.devices[d];
            let area = MetadataArea { live: Some(place), ..device.areas[a].clone() };
            area.write(&mut device.storage)?;
            device.areas[a] = area;
            // One flush for the headers of one device.
            if places.get(at + 1).is_none_or(|next| next.0 != d) {
                device.flush()?;
            }
        }
        let was = std::mem::replace(&mut self.vg, vg);
        self.failed = false;
        Ok(subtract(was.used().collect(), self.vg.used().collect()))
    }

    /// Tells the devices that nobody needs the contents of these extents, as far as no volume has
    /// them now.
    pub fn discard(&mut self, runs: &[Run]) {
        let gone = subtract(runs.to_vec(), self.vg.used().collect());
        let extent = self.vg.extent_bytes();
        for run in gone {
            let (Some(pv), Some(device)) = (self.vg.pvs.get(run.pv), self.devices.get_mut(run.pv))
            else {
                continue;
            };
            if run.first.checked_add(run.count).is_some_and(|end| end <= pv.pe_count) {
                let start = pv.pe_start * crate::label::SECTOR + run.first * extent;
                device.storage.discard_at(start, run.count * extent);
            }
        }
    }

    fn usable(&self) -> Result<()> {
        if self.failed {
            return refused("a change of the group has failed half way: open the group again");
        }
        if self.devices.iter().any(|device| device.storage.read_only()) {
            return refused("a device of the group may only be read");
        }
        Ok(())
    }
}

/// The text of a state, with its zero byte. It has been read again.
fn encode(vg: &Vg, author: &Author, why: &str) -> Result<Vec<u8>> {
    let mut text = vg.write(author, why).into_bytes();
    // Whatever was changed can be opened again, also by us.
    if Vg::read(&text)? != *vg {
        return corrupt("metadata would not be read as it was written");
    }
    text.push(0);
    Ok(text)
}

/// The extents of `of` that are not in `from`.
fn subtract(of: Vec<Run>, from: Vec<Run>) -> Vec<Run> {
    let from: BTreeSet<Run> = from.into_iter().filter(|run| run.count > 0).collect();
    let mut left = Vec::new();
    for run in of {
        let end = run.first.saturating_add(run.count);
        let mut at = run.first;
        let key = |first| Run { pv: run.pv, first, count: 0 };
        // The one that begins before may reach into it; those of a group do not overlap.
        let before = from.range(..key(run.first)).next_back().filter(|f| f.pv == run.pv);
        let within = from.range(key(run.first)..key(end));
        for f in before.into_iter().chain(within) {
            if f.first > at {
                left.push(Run { pv: run.pv, first: at, count: f.first - at });
            }
            at = at.max(f.first.saturating_add(f.count));
        }
        if end > at {
            left.push(Run { pv: run.pv, first: at, count: end - at });
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_extents_are_what_is_in_no_volume() {
        let run = |pv, first, count| Run { pv, first, count };
        let left = subtract(
            vec![run(0, 10, 10), run(1, 0, 5), run(1, 20, 4)],
            vec![run(0, 0, 12), run(0, 14, 2), run(0, 19, 9), run(1, 5, 15), run(1, 21, 1)],
        );
        let want = [run(0, 12, 2), run(0, 16, 3), run(1, 0, 5), run(1, 20, 1), run(1, 22, 2)];
        assert_eq!(left, want);
    }
}
