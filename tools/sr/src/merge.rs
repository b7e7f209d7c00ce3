//! Nodes that nobody needs apart any more: what is left of snapshots that were taken away.
//!
//! A merge has four steps, each of which leaves every disk what it was, so that the power may fail after
//! any write:
//! 1. What the upper image holds is written into the lower one ([`Merge::commit`]). Through the upper one
//!    nobody sees that.
//! 2. Records that stand at the lower image note what the upper one holds ([`crate::changed`]): if too much,
//!    that is not wrong.
//! 3. What stands on the upper image names the lower one, which shows the same by now.
//! 4. One commit of the group makes them one ([`Repository::merged`]).
//!
//! After a cut all of it is done again. Until then an image may name the lower one although the repository
//! says that it stands on the upper one: it is opened like that ([`crate::open_chain`]), and the merge
//! *below* waits ([`Repository::comes_first`]), which would take away what only the repository thinks is
//! named by the upper one alone.

use std::collections::BTreeSet;

use block::Storage;
use qcow::ChainReader;
use qcow::edit::Watch;
use qcow::open::{Chain, Format};
use volume::{Author, Group};

use crate::change::{lv, most_bytes, put};
use crate::changed::note_held;
use crate::error::{Result, refused};
use crate::images::backing;
use crate::repository::Repository;
use crate::state::{Node, Record};

/// A node, and the hidden one below it on which nothing else stands: the images in them can become one,
/// which lies in the lower one's volume and is what the upper one is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Merge {
    /// The volume of the upper one, which goes.
    pub upper: String,
    /// The volume of the lower one.
    pub lower: String,
    /// Bytes of the upper volume.
    pub used: u64,
}

impl Merge {
    /// Writes what the upper image holds into the lower one: those are the first two of this chain, and
    /// the lower one's volume can be written to, and is large enough.
    ///
    /// # Errors
    /// If the upper image has another one below it, as [`qcow::edit::commit`], or if `watch` says so. It
    /// can be done again.
    pub fn commit<T: Storage>(&self, chain: Chain<T>, watch: &mut dyn Watch) -> Result<()> {
        let ends = |n: usize, lv: &str| {
            chain.layers.get(n).is_some_and(|layer| layer.name.ends_with(&format!("/{lv}")))
        };
        if !ends(0, &self.upper) || !ends(1, &self.lower) {
            return refused(format!("{} does not stand on {} by itself", self.upper, self.lower));
        }
        qcow::edit::commit(&mut ChainReader::new(chain), 1, false, watch)?;
        Ok(())
    }
}

impl<S: Storage> Repository<S> {
    /// All that can be merged.
    pub fn merges(&self) -> Vec<Merge> {
        let nodes = &self.state().nodes;
        let hidden = |lv: &String| nodes.get(lv).filter(|node| node.disk.is_none());
        // What is being put on one, and what that is put on, stay.
        let targets: BTreeSet<&str> = nodes.values().filter_map(|n| n.onto.as_deref()).collect();
        let settled = nodes.values().filter(|n| n.onto.is_none() && !targets.contains(&*n.lv));
        let merges = settled.filter_map(|upper| {
            let lower = hidden(upper.parent.as_ref()?)?;
            // Records say what was there by what the lower one is: nobody may write to it then.
            let writable = upper.disk.as_ref().is_some_and(|disk| !disk.read_only);
            let frozen = !writable || self.records_at(&lower.lv).next().is_none();
            (self.state().children(&lower.lv) == 1 && frozen).then(|| Merge {
                upper: upper.lv.clone(),
                lower: lower.lv.clone(),
                used: upper.used,
            })
        });
        merges.collect()
    }

    /// The nodes that stand on one.
    pub fn above(&self, lv: &str) -> impl Iterator<Item = &Node> {
        self.state().nodes.values().filter(move |node| node.parent.as_deref() == Some(lv))
    }

    /// A node's volume and those of the nodes below it, in this order.
    pub fn down_from(&self, lv: &str) -> Vec<String> {
        self.state().chain(lv).map(|node| node.lv.clone()).collect()
    }

    /// Whether what stands on the upper volume of a merge has to be merged into that first, because this
    /// was begun, and something above names it already.
    ///
    /// # Errors
    /// If an image cannot be read.
    pub fn comes_first(&mut self, merge: &Merge) -> Result<bool> {
        let upper = backing(&self.group().vg().name, &merge.upper);
        let above: Vec<String> = self.above(&merge.upper).map(|node| node.lv.clone()).collect();
        let over: Vec<String> =
            above.iter().flat_map(|lv| self.above(lv)).map(|node| node.lv.clone()).collect();
        for lv in over {
            let named = qcow::open::backing_name(&mut self.storage(&lv)?, &lv)?;
            if named.is_some_and(|named| named == upper.as_bytes()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The disks and snapshots whose images include a node's.
    pub fn over(&self, lv: &str) -> Vec<&str> {
        let includes = |of: &Node| self.state().chain(&of.lv).any(|node| node.lv == lv);
        let over = self.list().filter(|(_, node)| includes(node));
        over.map(|(disk, _)| disk.key.as_str()).collect()
    }

    /// Makes a node's volume larger, up to so many bytes or as far as its image can need it.
    ///
    /// # Errors
    /// If there is no such node, or no space.
    pub fn grow_to(&mut self, of: &str, bytes: u64, author: &Author) -> Result<()> {
        let Some(node) = self.state().nodes.get(of) else { return refused(format!("no {of}")) };
        // What is above may be of a time when the disk was larger.
        let size = self.above(of).map(|above| above.size).fold(node.size, u64::max);
        let more = bytes.min(most_bytes(size)).saturating_sub(node.used);
        match more {
            0 => Ok(()),
            more => self.grow(of, more, author),
        }
    }

    /// Ends a merge when the lower image shows what the upper one does: records that stand at the lower one are
    /// told what the upper one holds, and what stands on the upper one what is below it now, but for the image in
    /// `told`, which knows; then [`Repository::merged`]. `open` opens a volume for writing.
    ///
    /// # Errors
    /// If a volume cannot be opened or written to, and as [`Repository::merged`]. It can be done again.
    pub fn settle<T: Storage>(
        &mut self,
        merge: &Merge,
        told: Option<&str>,
        author: &Author,
        mut open: impl FnMut(&Group<S>, &str) -> Result<T>,
    ) -> Result<()> {
        let records: Vec<String> =
            self.records_at(&merge.lower).map(|record| record.lv.clone()).collect();
        for record in &records {
            let upper = open(self.group(), &merge.upper)?;
            note_held((&mut open(self.group(), record)?, record), (upper, &merge.upper))?;
        }
        let lower = backing(&self.group().vg().name, &merge.lower);
        for node in self.above(&merge.upper).filter(|node| Some(&*node.lv) != told) {
            let mut storage = open(self.group(), &node.lv)?;
            qcow::edit::set_backing(&mut storage, &node.lv, Some((&lower, Format::Qcow2)))?;
        }
        self.merged(merge, &records, author)
    }

    /// Notes that two nodes are one: the lower image holds all that the upper one does, and what stood
    /// on the upper one names the lower one. The upper volume goes. `noted`: the volumes of the records that stand at
    /// the lower one, in which it was noted what the upper one holds ([`crate::note_held`]).
    ///
    /// # Errors
    /// If they are not what they were, there is a record that is not among those, or a device fails.
    pub fn merged(&mut self, merge: &Merge, noted: &[String], author: &Author) -> Result<()> {
        let now = self
            .merges()
            .into_iter()
            .find(|m| (&m.upper, &m.lower) == (&merge.upper, &merge.lower));
        let nodes = &self.state().nodes;
        let both = nodes.get(&merge.upper).zip(nodes.get(&merge.lower));
        let (Some(_), Some((upper, lower))) = (now, both) else {
            return refused(format!(
                "{} cannot become one with {} any more",
                merge.upper, merge.lower
            ));
        };
        if let Some(record) = self.records_at(&merge.lower).find(|r| !noted.contains(&r.lv)) {
            return refused(format!(
                "{}: it was not noted what {} changes: later changes could be told wrong",
                record.lv, merge.upper
            ));
        }
        let one = Node {
            lv: lower.lv.clone(),
            parent: lower.parent.clone(),
            used: lower.used,
            ..upper.clone()
        };
        let above: Vec<Node> = self.above(&merge.upper).cloned().collect();
        let records: Vec<Node> = self.records_at(&merge.upper).cloned().collect();
        self.commit(author, &format!("merge {}", merge.upper), &[], |vg| {
            lv(vg, &merge.upper)?;
            vg.remove_lv(&merge.upper)?;
            put(vg, &one)?;
            for node in records {
                put(vg, &Node { record: Some(Record { at: Some(one.lv.clone()) }), ..node })?;
            }
            above
                .into_iter()
                .try_for_each(|node| put(vg, &Node { parent: Some(one.lv.clone()), ..node }))
        })
    }
}
