//! Persistent bitmaps of the image: what was on the disk when each was made, what was written since,
//! and so what its bits must say after whatever happened.

use qcow::edit::{self, BitmapAction};
use qcow::{Bitmap, ImageMeta, Mode};
use sim::{Disk, GuestOp, Rng, SECTOR};

use crate::plan::Marks;
use crate::verify::Ended;

/// A bitmap.
struct Recorded {
    name: String,
    /// Sectors that a bit stands for.
    granularity: u64,
    /// What each sector held when the bitmap was made or cleared.
    base: Vec<u32>,
    /// Sectors whose bit somebody had a reason to set since then.
    touched: Vec<bool>,
    /// It was not saved once, and means nothing any more.
    lost: bool,
    /// Bits may be set for no reason: some could not be read.
    vague: bool,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Bitmaps {
    all: Vec<Recorded>,
    /// The layer that they are in.
    pub(crate) on: u32,
    /// Bits go to disk before the data.
    pub(crate) durable: bool,
    /// How many were made so far.
    made: u64,
}

impl Bitmaps {
    /// What somebody does to them between two lives, when each sector holds what `held` says.
    pub(crate) fn change(
        &mut self,
        disk: &mut Disk,
        marks: &Marks,
        held: &[u32],
        rng: &mut Rng,
    ) -> Result<(), String> {
        self.durable = marks.durable;
        let mut all = std::mem::take(&mut self.all);
        for mut one in all.drain(..) {
            let goes = one.lost || rng.one_in(6);
            if goes && edit(disk, &one.name, BitmapAction::Remove).is_ok() {
                continue;
            }
            if rng.one_in(4) && edit(disk, &one.name, BitmapAction::Clear).is_ok() {
                (one.base, one.vague) = (held.to_vec(), false);
                one.touched.fill(false);
            }
            self.all.push(one);
        }
        for &bits in marks.add.iter().flatten() {
            self.made += 1;
            let (name, granularity) = (format!("bitmap {}", self.made), 1 << bits);
            // There may be no room for it.
            if edit(disk, &name, BitmapAction::Add { granularity: Some(granularity) }).is_ok() {
                self.all.push(Recorded {
                    name,
                    granularity: granularity / SECTOR as u64,
                    base: held.to_vec(),
                    touched: vec![false; held.len()],
                    lost: false,
                    vague: false,
                });
            }
        }
        Ok(())
    }

    /// There is no room for their bits in the image: they go. Whether there were any.
    pub(crate) fn give_up(&mut self, disk: &mut Disk) -> Result<bool, String> {
        let any = !self.all.is_empty();
        for one in std::mem::take(&mut self.all) {
            edit(disk, &one.name, BitmapAction::Remove)?;
        }
        Ok(any)
    }

    /// The image was just opened: those for whose bits there was no room are lost. How many.
    pub(crate) fn look(&mut self, disk: &mut Disk) -> Result<u64, String> {
        let mut count = 0;
        if self.all.iter().any(|one| !one.lost) {
            let meta = ImageMeta::open(disk, "sim", Mode::Read).map_err(|e| e.to_string())?;
            for one in self.all.iter_mut().filter(|one| !one.lost) {
                let opened = Bitmap::open(disk, &meta, &one.name);
                one.lost = opened.is_err_and(|e| e.to_string().contains("not saved"));
                count += u64::from(one.lost);
            }
        }
        Ok(count)
    }

    /// The image goes below another one, where nothing is recorded any more.
    pub(crate) fn forget(&mut self) {
        self.all.clear();
    }

    /// Bits that cannot be read count as set from now on.
    pub(crate) fn become_vague(&mut self) {
        self.all.iter_mut().for_each(|one| one.vague = true);
    }

    /// A change was sent.
    pub(crate) fn sent(&mut self, op: &GuestOp) {
        for one in &mut self.all {
            let g = one.granularity;
            let from = op.first / g * g;
            let end = (op.first + op.count).next_multiple_of(g).min(one.touched.len() as u64);
            one.touched[from.min(end) as usize..end as usize].fill(true);
        }
    }

    /// The disk has another size now. What is new counts as written to.
    pub(crate) fn resized(&mut self, sectors: u64) {
        for one in &mut self.all {
            let old = one.touched.len() as u64;
            one.base.resize(sectors as usize, 0);
            one.touched.resize(sectors as usize, true);
            if sectors > old {
                one.touched[(old / one.granularity * one.granularity) as usize..].fill(true);
            }
        }
    }

    /// Looks at the bits on disk, when sectors hold what `held` says. Returns the names of those that
    /// were not saved, and how many can be trusted.
    pub(crate) fn verify(
        &self,
        disk: &mut Disk,
        held: &[u32],
        ended: Ended,
    ) -> Result<(Vec<String>, u64), String> {
        let (mut gone, mut trusted) = (Vec::new(), 0);
        if self.all.is_empty() {
            return Ok((gone, trusted));
        }
        let meta = ImageMeta::open(disk, "sim", Mode::Read).map_err(|e| e.to_string())?;
        for one in &self.all {
            let name = &one.name;
            let mut bitmap = match Bitmap::open(disk, &meta, name) {
                Ok(bitmap) => bitmap,
                Err(e) if e.to_string().contains("not saved") => {
                    let may =
                        one.lost || (matches!(ended, Ended::Cut | Ended::Dead) && !self.durable);
                    if !may {
                        return Err(format!("{name} was not saved, without a reason"));
                    }
                    gone.push(name.clone());
                    continue;
                }
                Err(e) => return Err(format!("{name}: {e}")),
            };
            if one.lost {
                return Err(format!("{name} was not saved once, and counts as saved now"));
            }
            trusted += 1;
            let precise = !matches!(ended, Ended::Cut | Ended::Dead) && !one.vague;
            let mut at = 0;
            while let Some(run) = bitmap
                .run(disk, at * SECTOR as u64, u64::MAX)
                .map_err(|e| format!("{name}: {e}"))?
            {
                let end = at + run.len / SECTOR as u64;
                for s in at as usize..end as usize {
                    if !run.dirty && held[s] != one.base[s] {
                        let (held, base) = (held[s], one.base[s]);
                        return Err(format!(
                            "{name}: sector {s} holds {held:#x} and not {base:#x} as at first, and \
                             its bit is clear"
                        ));
                    }
                    if run.dirty && precise && !one.touched[s] {
                        return Err(format!(
                            "{name}: nobody wrote to sector {s}, whose bit is set"
                        ));
                    }
                }
                at = end;
            }
            if at != held.len() as u64 {
                return Err(format!("{name} has bits for {at} sectors of {}", held.len()));
            }
        }
        Ok((gone, trusted))
    }

    /// The life ended, and these were not saved.
    pub(crate) fn ended(&mut self, gone: &[String]) {
        self.all.iter_mut().for_each(|one| one.lost |= gone.contains(&one.name));
    }

    /// Whether some were not saved, which keeps the disk from getting another size.
    pub(crate) fn any_lost(&self) -> bool {
        self.all.iter().any(|one| one.lost)
    }
}

fn edit(disk: &mut Disk, name: &str, action: BitmapAction) -> Result<(), String> {
    edit::change_bitmap::<Disk>(disk, "sim", name, &[action], None).map_err(|e| e.to_string())
}
