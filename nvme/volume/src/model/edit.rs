//! Changes of a group, in memory. [`crate::Group`] makes them durable, all or none.

use super::check::{check_name, check_tag};
use super::{Author, Lv, Vg, WRITE_LOCKED};
use crate::error::{Error, Result, refused};
use crate::host::check_system_id;
use crate::id::Id;
use crate::text::Node;

/// How a volume lies on devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// On how many devices it is in stripes; 1: on one after another.
    pub stripes: u32,
    /// Sectors of a stripe: a power of two, at least 8, of which an extent is a multiple. Of no
    /// meaning for one stripe.
    pub stripe_size: u64,
}

impl Shape {
    /// No stripes.
    pub const LINEAR: Shape = Shape { stripes: 1, stripe_size: 0 };
}

impl Vg {
    /// Makes a volume of so many extents, rounded up to the number of stripes.
    ///
    /// # Errors
    /// If the name is taken or no name; if there is not enough space, or not of that shape.
    pub fn create_lv(
        &mut self,
        id: Id,
        name: &str,
        extents: u64,
        shape: Shape,
        author: &Author,
    ) -> Result<()> {
        check_name(&self.name, name)?;
        self.check_unused(name)?;
        let stripes = u64::from(shape.stripes);
        if stripes == 0 || shape.stripes as usize > self.pvs.len() {
            let have = self.pvs.len();
            return refused(format!("{stripes} stripes on {have} devices"));
        }
        let size = shape.stripe_size;
        let right = size.is_power_of_two() && size >= 8 && self.extent_size.is_multiple_of(size);
        if stripes > 1 && !right {
            return refused(format!("stripes of {size} sectors"));
        }
        let count = self.whole(extents.max(1), stripes)?;
        // As the group has it, so do its volumes.
        let (status, flags): (&[&str], &[&str]) = match self.system_id {
            None => (&["READ", "WRITE", "VISIBLE"], &[]),
            Some(_) => (&["READ", "VISIBLE"], &[WRITE_LOCKED]),
        };
        let text = |flag: &&str| (*flag).to_owned();
        let mut lv = Lv {
            name: name.to_owned(),
            id,
            status: status.iter().map(text).collect(),
            flags: flags.iter().map(text).collect(),
            tags: Vec::new(),
            segments: Vec::new(),
            extra: vec![
                Node::int("creation_time", author.time),
                Node::text("creation_host", &author.host),
            ],
        };
        self.give(&mut lv, count, shape.stripes as usize, size)?;
        self.lvs.push(lv);
        Ok(())
    }

    fn check_unused(&self, name: &str) -> Result<()> {
        match self.lv(name) {
            Ok(_) => refused(format!("volume {}/{name} exists", self.name)),
            Err(_) => Ok(()),
        }
    }

    /// Rounds up to whole stripes; metadata counts in 32 bits.
    fn whole(&self, extents: u64, stripes: u64) -> Result<u64> {
        let whole = extents.div_ceil(stripes).checked_mul(stripes);
        match whole.filter(|&whole| whole <= u64::from(u32::MAX)) {
            Some(whole) => Ok(whole),
            None => {
                let (group, free) = (self.name.clone(), self.free_extents());
                Err(Error::NoSpace { group, wanted: extents, free })
            }
        }
    }

    /// The place of a volume that may be changed.
    fn index(&self, name: &str) -> Result<usize> {
        let missing = || Error::NoVolume(format!("{}/{name}", self.name));
        let at = self.lvs.iter().position(|lv| lv.name == name).ok_or_else(missing)?;
        match self.lvs[at].visible() {
            true => Ok(at),
            false => refused(format!("{}/{name} is no volume of its own", self.name)),
        }
    }

    /// Gives the group to the host with this system ID.
    ///
    /// # Errors
    /// If it is none.
    pub fn set_system_id(&mut self, id: &str) -> Result<()> {
        check_system_id(id)?;
        self.system_id = Some(id.to_owned());
        // Tools that do not know of system IDs must take all of it as to be read only.
        let of_lvs = self.lvs.iter_mut().map(|lv| (&mut lv.status, &mut lv.flags));
        for (status, flags) in of_lvs.chain([(&mut self.status, &mut self.flags)]) {
            if status.iter().any(|flag| flag == "WRITE") {
                status.retain(|flag| flag != "WRITE");
                flags.push(WRITE_LOCKED.to_owned());
            }
        }
        Ok(())
    }

    /// Removes a volume.
    ///
    /// # Errors
    /// If there is none of this name, or it is hidden.
    pub fn remove_lv(&mut self, name: &str) -> Result<()> {
        let at = self.index(name)?;
        self.lvs.remove(at);
        Ok(())
    }

    /// Renames a volume.
    ///
    /// # Errors
    /// If there is none of this name; if the new name is taken or no name.
    pub fn rename_lv(&mut self, name: &str, new: &str) -> Result<()> {
        let at = self.index(name)?;
        check_name(&self.name, new)?;
        self.check_unused(new)?;
        new.clone_into(&mut self.lvs[at].name);
        Ok(())
    }

    /// Makes a volume `more` extents larger, rounded up to its number of stripes.
    ///
    /// # Errors
    /// If there is none of this name; if there is not enough space, or only in too small parts.
    pub fn extend_lv(&mut self, name: &str, more: u64) -> Result<()> {
        let at = self.index(name)?;
        let mut lv = self.lvs[at].clone();
        let (stripes, size) = match lv.segments.last() {
            Some(last) => (last.areas.len(), last.stripe_size),
            None => (1, 0),
        };
        let count = self.whole(more, stripes as u64)?;
        self.whole(lv.extents() + count, 1)?;
        self.give(&mut lv, count, stripes, size)?;
        self.lvs[at] = lv;
        Ok(())
    }

    /// Makes a volume at least `more` extents larger, in a step that keeps its segments few, as far
    /// as there is space. Returns its extents afterwards.
    ///
    /// # Errors
    /// As [`Vg::extend_lv`].
    pub fn grow_lv(&mut self, name: &str, more: u64) -> Result<u64> {
        let at = self.index(name)?;
        let step = self.step(&self.lvs[at], more);
        match self.extend_lv(name, step) {
            // Space that no shape fits into, or that rounding up went past.
            Err(Error::NoSpace { .. }) if step > more => self.extend_lv(name, more)?,
            other => other?,
        }
        Ok(self.lvs[at].extents())
    }

    /// Gives a volume a tag; nothing if it has it.
    ///
    /// # Errors
    /// If there is no such volume or it is no tag.
    pub fn tag_lv(&mut self, name: &str, tag: &str) -> Result<()> {
        check_tag(tag)?;
        let at = self.index(name)?;
        let tags = &mut self.lvs[at].tags;
        if !tags.iter().any(|have| have == tag) {
            tags.push(tag.to_owned());
        }
        Ok(())
    }

    /// Takes a tag from a volume; nothing if it has it not.
    ///
    /// # Errors
    /// If there is no such volume.
    pub fn untag_lv(&mut self, name: &str, tag: &str) -> Result<()> {
        let at = self.index(name)?;
        self.lvs[at].tags.retain(|have| have != tag);
        Ok(())
    }
}
