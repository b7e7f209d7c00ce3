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
use crate::error::{Result, refused};
use crate::images::backing;
use crate::repository::Repository;
use crate::state::{DEPTH, Node};

impl<S: Storage> Repository<S> {
    /// Puts a disk on another one, which it shows from then on wherever nothing was written to itself. The
    /// other one is nobody's disk any more. Neither is in use.
    ///
    /// # Errors
    /// If there is no such disk; if the disk stands on something that holds data, which it would not show any
    /// more, or on nothing and holds data itself, or changes of it are told; if the other one stands on it, or too many images would stand on each
    /// other; if a device fails.
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
        let alone = node.parent.is_none();
        for lv in self.down_from(&node.lv).into_iter().skip(usize::from(!alone)) {
            let image = ImageMeta::open(&mut self.storage(&lv)?, &lv, Mode::Read)?;
            if image.l1.iter().any(|&entry| entry != 0) {
                // In an image that stands on nothing, zeroes that were written may not be told from nothing.
                let why = if alone { "stands on nothing, but" } else { "stands on something that" };
                return refused(format!("{child} {why} holds data ({lv})"));
            }
        }
        let lv = node.lv.clone();
        let going = Node { onto: Some(below.lv), ..node };
        self.commit(author, &format!("compose {child}"), &[], |vg| put(vg, &going))?;
        self.put_onto(&lv, author)
    }

    /// Ends what was begun and not ended when the repository was used last: to be called before anything else.
    ///
    /// # Errors
    /// If a device fails, or an image is damaged.
    pub fn finish(&mut self, author: &Author) -> Result<()> {
        let begun = self.state().nodes.values().filter(|node| node.onto.is_some());
        let begun: Vec<String> = begun.map(|node| node.lv.clone()).collect();
        begun.iter().try_for_each(|lv| self.put_onto(lv, author))
    }

    fn put_onto(&mut self, lv: &str, author: &Author) -> Result<()> {
        let state = self.state().clone();
        let Some(node) = state.nodes.get(lv) else { return Ok(()) };
        let Some(below) = node.onto.as_ref().and_then(|onto| state.nodes.get(onto)) else {
            // Somebody else has taken it away.
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
