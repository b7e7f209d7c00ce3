//! Internal snapshots: taken and deleted before a life begins, or in a pause of the served image.
//! Whatever happens later, each shows what it was taken of.

use std::rc::Rc;
use std::time::Duration;

use qcow::check::Repair;
use qcow::edit::{SnapshotKey, create_snapshot, delete_snapshot};
use qcow::{ChainReader, Error};
use sim::{Disk, Rng, SECTOR, ident, show};

use crate::change::Then;
use crate::images::{Layer, open};
use crate::life::{Attached, Run, no_room};
use crate::plan::Keeps;
use crate::verify::{Ended, Verified, check};

/// An internal snapshot.
#[derive(Clone)]
pub(crate) struct Kept {
    name: String,
    /// What each sector held.
    held: Rc<[u32]>,
    /// It must be there: the power did not fail while it was taken or deleted.
    sure: bool,
}

/// How a change of snapshots ended.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Came {
    Done,
    /// There is no room, refcounts are too narrow, or there is nothing to delete.
    Refused,
    /// The power failed in it.
    Cut,
}

fn came(layer: &Layer, done: Result<(), Error>) -> Result<Came, String> {
    match done {
        Ok(()) => Ok(Came::Done),
        Err(Error::Refused { reason, .. })
            if no_room(&reason) || reason.contains("cannot count") =>
        {
            Ok(Came::Refused)
        }
        Err(Error::Io { .. }) if layer.disk.is_out() => Ok(Came::Cut),
        Err(e) => Err(format!("a change of snapshots fails: {e}")),
    }
}

/// Takes a snapshot of an image that shows `held`.
fn take(layer: &mut Layer, number: u32, held: &[u32]) -> Result<Came, String> {
    let name = format!("at {number}");
    let taken = Duration::from_secs(u64::from(number));
    let done = create_snapshot(&mut layer.disk, "sim", &name, taken).map(|_| ());
    let came = came(layer, done)?;
    if came != Came::Refused {
        layer.kept.push(Kept { name, held: held.into(), sure: came == Came::Done });
    }
    Ok(came)
}

/// Deletes one of the snapshots, if there is one.
fn delete(layer: &mut Layer, rng: &mut Rng) -> Result<Came, String> {
    if layer.kept.is_empty() {
        return Ok(Came::Refused);
    }
    let at = rng.below(layer.kept.len() as u64) as usize;
    let name = layer.kept[at].name.clone();
    let done = delete_snapshot(&mut layer.disk, "sim", SnapshotKey::Name(&name));
    let came = came(layer, done)?;
    match came {
        Came::Done => drop(layer.kept.remove(at)),
        Came::Cut => layer.kept[at].sure = false,
        Came::Refused => {}
    }
    Ok(came)
}

/// The first of the layers has so many snapshots, which are those that it should have, and each shows
/// what it was taken of. It is known of all then whether they are there.
pub(crate) fn verify_kept(layers: &mut [Layer], count: u32) -> Result<(), String> {
    let mut found = Vec::new();
    for kept in std::mem::take(&mut layers[0].kept) {
        let mut chain = open(layers, false)?;
        match chain.show_snapshot(SnapshotKey::Name(&kept.name)) {
            Err(Error::Refused { .. }) if !kept.sure => continue,
            shown => shown.map_err(|e| e.to_string())?,
        }
        let mut reader = ChainReader::new(chain);
        let (name, len) = (&kept.name, kept.held.len() * SECTOR);
        if reader.size() != len as u64 {
            let size = reader.size();
            return Err(format!("snapshot {name:?} shows {size} bytes, not {len}"));
        }
        let mut bytes = vec![0; len];
        reader.read_at(0, &mut bytes).map_err(|e| e.to_string())?;
        for ((sector, bytes), &held) in (0..).zip(bytes.chunks(SECTOR)).zip(&*kept.held) {
            if ident(sector, bytes) != Some(held) {
                let found = show(sector, bytes);
                return Err(format!("sector {sector} of snapshot {name:?} {found}, not {held:#x}"));
            }
        }
        found.push(Kept { sure: true, ..kept });
    }
    if found.len() as u64 != u64::from(count) {
        return Err(format!("there are {count} snapshots and not {}", found.len()));
    }
    layers[0].kept = found;
    Ok(())
}

impl Run<'_> {
    /// Deletes and takes snapshots before a life; the power may fail in that.
    pub(crate) fn keep(
        &mut self,
        keeps: &Keeps,
        mut layers: Vec<Layer>,
        rng: &mut Rng,
    ) -> Result<Vec<Layer>, String> {
        let top = &mut layers[0];
        if top.data.is_some() {
            return Ok(layers);
        }
        top.disk.set_power_for(keeps.cut);
        let mut came = if keeps.drops { delete(top, rng)? } else { Came::Done };
        if keeps.takes && came != Came::Cut {
            self.last_name += 1;
            came = take(top, self.last_name, &self.held)?;
            self.outcome.kept += u64::from(came == Came::Done);
        }
        self.outcome.cuts += u64::from(came == Came::Cut);
        let left = layers.iter().map(|l| l.frozen(rng)).collect();
        let Verified { mut layers, leaks, .. } = self.verify(left, Ended::CleanWithLeaks)?;
        self.leaks = leaks;
        layers[0] = layers[0].revived(rng, &self.trace);
        Ok(layers)
    }

    /// The same in a pause, in which the disk holds what `held` says. Returns whether the power failed.
    pub(crate) fn keep_at_rest(
        &mut self,
        then: &Then,
        held: &[u32],
        a: &mut Attached,
        rng: &mut Rng,
    ) -> Result<bool, String> {
        // A write that failed for want of space has left something that a power cut may take back, in
        // this image or one that was the top before: nobody knows what a snapshot of it holds.
        let vague = |d: &Disk| d.is_volatile(0, d.config().size);
        if matches!(then, Then::Keep) && a.layers.iter().flat_map(Layer::disks).any(vague) {
            return Ok(false);
        }
        let top = &mut a.layers[0];
        top.disk.set_power_for(rng.pick(&[u64::MAX, u64::MAX, 0, 1, 5, 9]));
        let came = if matches!(then, Then::Keep) {
            self.last_name += 1;
            take(top, self.last_name, held)?
        } else {
            delete(top, rng)?
        };
        match came {
            Came::Cut => return Ok(true),
            Came::Done => self.outcome.kept += u64::from(matches!(then, Then::Keep)),
            // What was done until then may leak.
            Came::Refused => a.leaks = check(&mut top.disk.clone(), Repair::None)?,
        }
        top.disk.set_power_for(u64::MAX);
        self.restack(a, false)?;
        Ok(false)
    }
}
