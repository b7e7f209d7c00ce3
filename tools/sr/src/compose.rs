//! Putting a disk on another one: what a migration received as what was written since on what there was
//! before, each by itself.
//!
//! The image has to name what it stands on, and the repository to say so: two writes, of which a power cut may
//! leave the first. So the repository notes first what is going to be done, and whoever opens it next ends that
//! ([`Repository::finish`]), before anybody uses the disk.

use block::Storage;
use qcow::open::{Format, ImageMeta, Mode};
use volume::Author;

use crate::change::{put, remove};
use crate::error::{Error, Result, refused};
use crate::images::backing;
use crate::repository::Repository;
use crate::state::{DEPTH, Node};

impl<S: Storage> Repository<S> {
    /// Puts a disk on another one, which it shows from then on wherever nothing was written to itself. The
    /// other one is nobody's disk any more. Neither is in use.
    ///
    /// # Errors
    /// If there is no such disk, or their sizes differ; if the disk stands on nothing, or on something that holds
    /// data, which it would not show any more, or changes of it are told; if the other one stands on it, or too
    /// many images would stand on each other; if a device fails.
    pub fn compose(&mut self, child: &str, parent: &str, author: &Author) -> Result<()> {
        let (disk, node) = self.with_data(child)?;
        let (_, below) = self.with_data(parent)?;
        if disk.read_only || disk.cbt {
            return refused(format!(
                "{child} is a snapshot, or its changes are told: it stays on what it is"
            ));
        }
        let down = self.down_from(&below.lv);
        if down.contains(&node.lv) {
            return refused(format!("{parent} stands on {child}"));
        }
        if down.len() >= DEPTH {
            return refused(format!("{} images would stand on each other", down.len() + 1));
        }
        if node.size != below.size {
            return refused(format!("{child} has {} bytes, {parent} {}", node.size, below.size));
        }
        let under: Vec<String> = self.down_from(&node.lv).into_iter().skip(1).collect();
        if under.is_empty() {
            // Zeroes that were written to such an image may not be told from nothing.
            return refused(format!(
                "{child} stands on nothing: take a snapshot of it before it is filled"
            ));
        }
        for lv in under {
            let image = ImageMeta::open(&mut self.storage(&lv)?, &lv, Mode::Read)?;
            if image.l1.iter().any(|&entry| entry != 0) {
                return refused(format!("{child} stands on {lv}, which holds data"));
            }
        }
        let lv = node.lv.clone();
        let going = Node { onto: Some(below.lv), ..node };
        self.commit(author, &format!("compose {child}"), &[], |vg| put(vg, &going))?;
        self.put_onto(&lv, author)
    }

    /// Ends what was begun and not ended when the repository was used last: to be called before anything else.
    /// Returns what cannot be ended: those disks stay as they are ([`Repository::is_pending`]).
    pub fn finish(&mut self, author: &Author) -> Vec<(String, Error)> {
        let begun = self.state().nodes.values().filter(|node| node.onto.is_some());
        let begun: Vec<String> = begun.map(|node| node.lv.clone()).collect();
        let failed = |lv: String| self.put_onto(&lv, author).err().map(|e| (lv, e));
        begun.into_iter().filter_map(failed).collect()
    }

    /// Whether a disk is being put on another one, or that one is it: nobody may use either meanwhile.
    ///
    /// # Errors
    /// If there is no such disk.
    pub fn is_pending(&self, key: &str) -> Result<bool> {
        let (_, node) = self.disk(key)?;
        let chain = self.down_from(&node.lv);
        let of_it = |other: &Node| {
            let onto = other.onto.as_deref();
            onto == Some(&node.lv) || (onto.is_some() && chain.contains(&other.lv))
        };
        Ok(self.state().nodes.values().any(of_it))
    }

    fn put_onto(&mut self, lv: &str, author: &Author) -> Result<()> {
        let state = self.state().clone();
        let Some(node) = state.nodes.get(lv) else { return Ok(()) };
        let below = node.onto.as_ref().and_then(|onto| state.nodes.get(onto));
        let can_be = |below: &&Node| {
            below.record.is_none()
                && node.record.is_none()
                && state.chain(&below.lv).all(|other| other.lv != lv)
        };
        let Some(below) = below.filter(can_be) else {
            // Somebody else has changed the tags.
            let as_it_is = Node { onto: None, ..node.clone() };
            return self.commit(author, &format!("{lv} stays"), &[], |vg| put(vg, &as_it_is));
        };
        let name = backing(&self.group().vg().name, &below.lv);
        qcow::edit::set_backing(&mut self.storage(lv)?, lv, Some((&name, Format::Qcow2)))?;
        let hidden = Node { disk: None, ..below.clone() };
        let one = Node { parent: Some(below.lv.clone()), onto: None, ..node.clone() };
        let before = node.parent.as_ref().and_then(|parent| state.nodes.get(parent));
        // What it stood on, if nobody else needs that.
        let gone =
            before.filter(|n| n.disk.is_none() && state.children(&n.lv) == 1 && n.lv != below.lv);
        self.commit(author, &format!("{lv} on {}", below.lv), &[], |vg| {
            put(vg, &hidden)?;
            put(vg, &one)?;
            gone.map_or(Ok(()), |gone| remove(vg, &state, gone))
        })
    }
}
